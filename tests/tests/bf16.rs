//! Training with products in bf16 learns what training in f32 learns.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use lora_core::{Adaptable, AdapterConfig, AdapterSet, Compute, Targets};
use lora_optim::{AdamW, AdamWConfig, Optimizer, ParamGroup};
use lora_sd15::{Checkpoint, NoiseSchedule, Part, UNet, WeightStorage};
use lora_tests::golden_path;
use rand::{Rng, SeedableRng, rngs::StdRng};

const STEPS: usize = 200;

/// Sums of twelve uniform values: close enough to the normal distribution.
fn noise(dims: &[usize], rng: &mut StdRng) -> Tensor {
    let mut value = || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
    let values: Vec<f32> = (0..dims.iter().product()).map(|_| value()).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

/// The losses of a LoRA on a checkpoint, which learns one picture of `side` by `side` latents.
fn losses(path: &Path, side: usize, compute: Compute, storage: WeightStorage) -> Vec<f64> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let config = &checkpoint.config().unet;
    let vb = checkpoint
        .stored_var_builder(Part::Unet, storage, &Device::Cpu)
        .unwrap();
    let mut unet = UNet::new(config, vb).unwrap();
    unet.set_compute(compute).unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    let adapter = AdapterConfig {
        rank: 4,
        alpha: 4.0,
        ..AdapterConfig::default()
    };
    let targets = Targets::attn_mlp();
    let mut set = AdapterSet::create(&mut unet, &adapter, &targets, &mut rng).unwrap();
    set.attach(&mut unet, 1.0).unwrap().strict().unwrap();
    let groups = vec![ParamGroup::new("unet", set.params())];
    let options = AdamWConfig {
        lr: 2e-3,
        ..AdamWConfig::default()
    };
    let mut optimizer = AdamW::new(groups, options).unwrap();
    let clean = noise(&[1, config.in_channels, side, side], &mut rng);
    let context = noise(&[1, 77, config.cross_attention_dim], &mut rng);
    let schedule = NoiseSchedule::sd15();
    let mut step = || {
        let timesteps = [rng.random_range(0..1000usize)];
        let noise = noise(clean.dims(), &mut rng);
        let noisy = schedule.add_noise(&clean, &noise, &timesteps).unwrap();
        let at = Tensor::new(timesteps.map(|t| t as f32).as_slice(), &Device::Cpu).unwrap();
        let pred = unet.forward(&noisy, &at, &context).unwrap();
        let loss = (pred - noise).unwrap().sqr().unwrap().mean_all().unwrap();
        optimizer.step(&loss.backward().unwrap()).unwrap();
        f64::from(
            loss.to_dtype(DType::F32)
                .unwrap()
                .to_scalar::<f32>()
                .unwrap(),
        )
    };
    (0..STEPS).map(|_| step()).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Both end at the same loss, which is lower than the first ones.
fn compare(path: PathBuf, side: usize) {
    let wide = losses(&path, side, Compute::F32, WeightStorage::F32);
    let narrow = losses(&path, side, Compute::Bf16, WeightStorage::Bf16);
    let (start, end) = (mean(&wide[..20]), mean(&wide[STEPS - 50..]));
    let narrow_end = mean(&narrow[STEPS - 50..]);
    // The mean's own uncertainty: each loss is of one noise and timestep.
    let squares = wide[STEPS - 50..].iter().map(|l| (l - end).powi(2));
    let noise = (squares.sum::<f64>() / 50.0 / 49.0).sqrt();
    let text =
        format!("loss {start:.5}, at the end {end:.5} +- {noise:.5}, in bf16 {narrow_end:.5}");
    println!("{text}");
    assert!(narrow != wide, "bf16 changed nothing");
    assert!(start - end > 0.1 * end, "nothing learned: {text}");
    assert!((narrow_end - end).abs() < noise.min(0.01 * end), "{text}");
}

#[test]
fn bf16_ends_within_noise_of_f32() {
    compare(golden_path("sd15", "mini_ldm.safetensors"), 8);
}

#[test]
fn bf16_ends_within_noise_of_f32_on_the_miniature_that_draws() {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets");
    compare(assets.join("mini/mini.safetensors"), 16);
}
