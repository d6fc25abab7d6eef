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

use lora_examples::{recipe, train};
use lora_train::TrainConfig;

fn main() -> Result<(), Box<dyn Error>> {
    train(TrainConfig {
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
        ..recipe("lokr")?
    })
}
