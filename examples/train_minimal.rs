//! A LoRA trainer in one screen, composed from the crates without `Trainer`:
//! `cargo run --release --example train_minimal`

use std::sync::Arc;

use candle_core::{Device, Tensor};
use lora_core::{AdapterConfig, AdapterSet, SaveOptions, Targets};
use lora_data::{CaptionTime, Dataset, DatasetConfig, Place, Purpose, Size, Streams};
use lora_optim::{Optimizer, ParamGroup, Prodigy, ProdigyConfig};
use lora_sd15::{Checkpoint, NoiseSchedule, WeightStorage};
use lora_train::{
    LatentSource, LossConfig, Model, NoiseConfig, SampleWeights, Sd15, StepDraws, TextConfig,
    diffusion_loss, make_noise,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (device, streams, epochs) = (Device::Cpu, Streams::new(42), 5);
    let checkpoint = Checkpoint::open(lora_examples::demo_model())?;
    let mut model = Sd15::load(
        &checkpoint,
        TextConfig::default(),
        false,
        WeightStorage::AsStored,
        &device,
    )?;

    // What is trained.
    let config = AdapterConfig {
        rank: 4,
        alpha: 4.0,
        ..Default::default()
    };
    let mut rng = streams.stream(Purpose::ADAPTER_INIT, Place::default());
    let unet = model.parts().unet;
    let mut adapters = AdapterSet::create(unet, &config, &Targets::attn_mlp(), &mut rng)?;
    adapters.attach(unet, 1.0)?;

    // On what: folders named `10_name`, captions in .txt files beside the images.
    let resolution = Size {
        width: 128,
        height: 128,
    };
    let options = DatasetConfig {
        resolution,
        min_bucket_reso: 64,
        batch_size: 2,
        ..Default::default()
    };
    let pictures = lora_examples::demo_pictures();
    let dataset = Arc::new(Dataset::from_folder(pictures, &options)?);
    let latents = LatentSource::new(&dataset, &model, false, None, &device, |_, _| {})?;

    // How.
    let groups = vec![ParamGroup::new("unet", adapters.params())];
    let mut optimizer = Prodigy::new(groups, ProdigyConfig::default())?;
    let schedule = NoiseSchedule::sd15();

    let mut step = 0;
    for epoch in 1..=epochs {
        for batch in dataset.epoch(epoch, 42).batches {
            step += 1;
            adapters.begin_step(step);
            let time = CaptionTime {
                epoch,
                step: step as usize,
                max_train_steps: 0,
            };
            let texts: Vec<_> = batch
                .items
                .iter()
                .map(|item| dataset.caption(item, time, streams))
                .collect();
            let context = model.encode_captions(&texts, true)?;
            let x0 = latents
                .batch(&dataset, &batch, None, &model, streams, step)?
                .latents;
            let mut draws = StepDraws::new(streams, step, &device);
            let noise = make_noise(&x0, &NoiseConfig::default(), &schedule, &mut draws)?;
            let t: Vec<f32> = noise.timesteps.iter().map(|t| *t as f32).collect();
            let pred = model.predict(&noise.noisy, &Tensor::new(t, &device)?, &context)?;
            let weights = SampleWeights::default();
            let loss = diffusion_loss(
                &pred,
                &noise.noise,
                &noise.timesteps,
                &weights,
                &LossConfig::default(),
                &schedule,
            )?;
            optimizer.step(&loss.backward()?)?;
            println!(
                "step {step}: loss {:.4}, lr {:.2e}",
                loss.to_scalar::<f32>()?,
                optimizer.effective_lr(0)
            );
        }
    }
    std::fs::create_dir_all("out")?;
    adapters.save("out/minimal.safetensors", &SaveOptions::default())?;
    Ok(())
}
