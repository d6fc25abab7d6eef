//! The smallest files: LoKr, a Kronecker product of two matrices.
//!
//! ```text
//! cargo run --release --example train_lokr -- v1-5-pruned-emaonly.safetensors img out/lokr
//! ```
//!
//! `factor=8` splits each layer into blocks of 8; the second matrix is decomposed to dim 4.
//! LoKr wants a higher learning rate than LoRA.
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
        [] => (demo_model(), demo_pictures(), "out/lokr".into()),
        _ => return Err("expected: MODEL PICTURES OUTPUT".into()),
    };
    let resolution = if paths.is_empty() { "128" } else { "512" };
    let config = TrainConfig {
        pretrained_model_name_or_path: Some(model),
        train_data_dir: Some(pictures),
        output_dir: Some(output),
        output_name: Some("lokr".into()),
        resolution: resolution.into(),
        min_bucket_reso: 64,
        network_module: Some("lycoris.kohya".into()),
        network_dim: Some(4),
        network_alpha: 4.0,
        network_args: vec![
            "algo=lokr".into(),
            "factor=8".into(),
            "preset=attn-mlp".into(),
        ],
        learning_rate: Some(1e-3),
        lr_scheduler: "cosine".into(),
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
