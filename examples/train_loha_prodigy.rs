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

use lora_examples::{recipe, train};
use lora_train::TrainConfig;

fn main() -> Result<(), Box<dyn Error>> {
    train(TrainConfig {
        network_module: Some("lycoris.kohya".into()),
        network_dim: Some(2),
        network_alpha: 1.0,
        network_args: vec!["algo=loha".into(), "preset=attn-mlp".into()],
        optimizer_type: "Prodigy".into(),
        optimizer_args: vec!["betas=0.9,0.99".into(), "weight_decay=0.01".into()],
        shuffle_caption: true,
        keep_tokens: 1,
        save_every_n_epochs: Some(1),
        ..recipe("character")?
    })
}
