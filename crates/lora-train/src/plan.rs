//! The sum that people get wrong: pictures, repeats, batches, updates, epochs.

use lora_data::{Dataset, StepCount};

use crate::config::TrainConfig;

/// What a run will do.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Training pictures times repeats.
    pub train_images: usize,
    /// Regularization pictures times repeats, before balancing.
    pub reg_images: usize,
    /// Batches of one epoch.
    pub batches_per_epoch: usize,
    /// Updates of one epoch.
    pub updates_per_epoch: usize,
    /// Epochs, the last perhaps cut short.
    pub epochs: usize,
    /// Updates in all.
    pub total_steps: usize,
    /// The master seed.
    pub seed: u64,
    /// Layers with an adapter: text encoder, UNet.
    pub adapters: (usize, usize),
    /// Trainable values.
    pub parameters: usize,
    /// Intermediate files by epoch: one every so many epochs.
    pub save_every_n_epochs: Option<usize>,
}

impl Plan {
    /// Works out the numbers that depend on the dataset.
    pub fn new(config: &TrainConfig, dataset: &Dataset, seed: u64) -> Self {
        let batches_per_epoch = dataset.batches_per_epoch();
        let count = StepCount::new(batches_per_epoch, config.gradient_accumulation_steps);
        let (epochs, total_steps) = match config.max_train_epochs {
            Some(epochs) => (epochs, count.total(epochs)),
            None => (
                count.epochs_for(config.max_train_steps),
                config.max_train_steps,
            ),
        };
        let by_ratio = config
            .save_n_epoch_ratio
            .map(|ratio| (epochs / ratio).max(1));
        Self {
            train_images: dataset.num_train_images(),
            reg_images: dataset.num_reg_images(),
            batches_per_epoch,
            updates_per_epoch: count.updates_per_epoch,
            epochs,
            total_steps,
            seed,
            adapters: (0, 0),
            parameters: 0,
            save_every_n_epochs: by_ratio.or(config.save_every_n_epochs),
        }
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{} pictures a pass ({} for regularization) -> {} batches -> {} updates per epoch; {} epochs, {} updates",
            self.train_images + self.reg_images,
            self.reg_images,
            self.batches_per_epoch,
            self.updates_per_epoch,
            self.epochs,
            self.total_steps
        )?;
        let (text, unet) = self.adapters;
        write!(
            f,
            "adapters on {unet} UNet and {text} text encoder layers, {} parameters; seed {}",
            self.parameters, self.seed
        )
    }
}
