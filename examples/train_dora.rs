//! DoRA: direction and length of the weights are learned apart.
//!
//! ```text
//! cargo run --release --example train_dora -- v1-5-pruned-emaonly.safetensors img out/dora
//! ```
//!
//! `dora_wd=True` adds a trained length per row to a LoRA. It often reaches more with a
//! low rank, at some cost in time.
//!
//! Without arguments it runs on the bundled miniature and pictures.

use std::error::Error;

use lora_examples::{recipe, train};
use lora_train::TrainConfig;

fn main() -> Result<(), Box<dyn Error>> {
    train(TrainConfig {
        network_module: Some("lycoris.kohya".into()),
        network_dim: Some(8),
        network_alpha: 4.0,
        network_args: vec![
            "algo=lora".into(),
            "preset=attn-mlp".into(),
            "dora_wd=True".into(),
        ],
        learning_rate: Some(1e-4),
        lr_scheduler: "constant_with_warmup".into(),
        lr_warmup_steps: Some(lora_train::Steps::Share(0.05)),
        ..recipe("dora")?
    })
}
