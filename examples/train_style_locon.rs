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

use lora_examples::{recipe, train};
use lora_train::TrainConfig;

fn main() -> Result<(), Box<dyn Error>> {
    train(TrainConfig {
        network_dim: Some(16),
        network_alpha: 8.0,
        network_args: vec!["conv_dim=8".into(), "conv_alpha=4".into()],
        network_train_unet_only: true,
        learning_rate: Some(2e-4),
        lr_scheduler: "cosine_with_restarts".into(),
        lr_scheduler_num_cycles: 2,
        noise_offset: Some(0.03),
        min_snr_gamma: Some(5.0),
        ..recipe("style")?
    })
}
