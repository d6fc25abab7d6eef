//! A style: LoCon, which trains the convolutions too.
//!
//! ```text
//! cargo run --release --example train_style_locon -- v1-5-pruned-emaonly.safetensors img out/style
//! ```
//!
//! Style lives in texture, so the 3x3 convolutions get adapters of their own rank
//! (`conv_dim`). The text encoder is left alone, and noise offset helps dark and bright
//! pictures.
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
        [] => (demo_model(), demo_pictures(), "out/style".into()),
        _ => return Err("expected: MODEL PICTURES OUTPUT".into()),
    };
    let resolution = if paths.is_empty() { "128" } else { "512" };
    let config = TrainConfig {
        pretrained_model_name_or_path: Some(model),
        train_data_dir: Some(pictures),
        output_dir: Some(output),
        output_name: Some("style".into()),
        resolution: resolution.into(),
        min_bucket_reso: 64,
        network_dim: Some(16),
        network_alpha: 8.0,
        network_args: vec!["conv_dim=8".into(), "conv_alpha=4".into()],
        network_train_unet_only: true,
        learning_rate: Some(2e-4),
        lr_scheduler: "cosine_with_restarts".into(),
        lr_scheduler_num_cycles: 2,
        noise_offset: Some(0.03),
        min_snr_gamma: Some(5.0),
        train_batch_size: 2,
        max_train_epochs: Some(4),
        seed: Some(1),
        ..TrainConfig::default()
    };
    let mut trainer = Trainer::new(config, &Device::Cpu, &mut print_events)?;
    match trainer.run(&mut print_events, &AtomicBool::new(false))? {
        Outcome::Finished(file) | Outcome::Stopped(file) => println!("{}", file.display()),
    }
    Ok(())
}
