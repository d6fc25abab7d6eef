//! A character in a small file: LoHa of dim 2 with Prodigy.
//!
//! ```text
//! cargo run --release --example train_loha_prodigy -- v1-5-pruned-emaonly.safetensors img out/character
//! ```
//!
//! LoHa multiplies two low-rank matrices element by element: dim 2 reaches rank 4 with the
//! parameters of a LoRA of dim 4. Prodigy finds the learning rate; betas of (0.9, 0.99) let
//! it react within a short run.
//!
//! Without arguments it runs on the bundled miniature and pictures.

use std::error::Error;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use candle_core::Device;
use lora_examples::{demo_model, demo_pictures, print_events};
use lora_train::{Outcome, TrainConfig, Trainer};

fn main() -> Result<(), Box<dyn Error>> {
    lora_kernels::keep_freed_memory();
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let (model, pictures, output) = match paths.as_slice() {
        [model, pictures, output] => (model.clone(), pictures.clone(), output.clone()),
        [] => (demo_model(), demo_pictures(), "out/character".into()),
        _ => return Err("expected: MODEL PICTURES OUTPUT".into()),
    };
    let resolution = if paths.is_empty() { "128" } else { "512" };
    let config = TrainConfig {
        pretrained_model_name_or_path: Some(model),
        train_data_dir: Some(pictures),
        output_dir: Some(output),
        output_name: Some("character".into()),
        resolution: resolution.into(),
        min_bucket_reso: 64,
        network_module: Some("lycoris.kohya".into()),
        network_dim: Some(2),
        network_alpha: 1.0,
        network_args: vec!["algo=loha".into(), "preset=attn-mlp".into()],
        optimizer_type: "Prodigy".into(),
        optimizer_args: vec!["betas=0.9,0.99".into(), "weight_decay=0.01".into()],
        shuffle_caption: true,
        keep_tokens: 1,
        train_batch_size: 2,
        max_train_epochs: Some(4),
        save_every_n_epochs: Some(1),
        seed: Some(1),
        ..TrainConfig::default()
    };
    let mut trainer = Trainer::new(config, &Device::Cpu, &mut print_events)?;
    match trainer.run(&mut print_events, &AtomicBool::new(false))? {
        Outcome::Finished(file) | Outcome::Stopped(file) => println!("{}", file.display()),
    }
    Ok(())
}
