//! The sum that people get wrong: pictures, repeats, batches, updates, epochs.

use std::collections::HashSet;

use lora_core::{Adapter, AdapterConfig, AdapterSet, Family};
use lora_data::{Dataset, Role, StepCount};
use lora_optim::ParamGroup;

use crate::config::TrainConfig;
use crate::{MemoryEstimate, Naming};

/// Layers of one kind that get adapters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainedKind {
    /// `text encoder`, `self attention`, `cross attention`, `feed-forward`, ...
    pub kind: &'static str,
    /// Number of layers.
    pub layers: usize,
    /// Trainable values in them.
    pub parameters: usize,
    /// Whether any of them learns: with a learning rate of 0 they stay as they are.
    pub learns: bool,
}

/// What a run will do.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Training pictures times repeats.
    pub train_images: usize,
    /// Regularization pictures times repeats, before balancing.
    pub reg_images: usize,
    /// The same as they are drawn, after balancing.
    pub reg_draws: usize,
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
    /// The family of the adapters and what its dim means, such as `LoHa of dim 2, alpha 1: rank
    /// up to 4`.
    pub network: String,
    /// How captions are encoded, such as `captions: up to 75 tokens, clip skip 1`.
    pub captions: String,
    /// What is trained, by kind of layer.
    pub trained: Vec<TrainedKind>,
    /// Factor of the loss of regularization pictures.
    pub prior_loss_weight: f64,
    /// Bytes per value of the files.
    pub value_size: usize,
    /// Adapter files and state folders that will be there at the end.
    pub files: Vec<String>,
    /// Intermediate files by epoch: one every so many epochs.
    pub save_every_n_epochs: Option<usize>,
    /// What the run will take of memory, where the model can tell.
    pub memory: Option<MemoryEstimate>,
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
            reg_draws: dataset
                .images()
                .iter()
                .filter(|image| image.role == Role::Regularization)
                .map(|image| image.repeats as usize)
                .sum(),
            batches_per_epoch,
            updates_per_epoch: count.updates_per_epoch,
            epochs,
            total_steps,
            seed,
            network: network(config),
            captions: captions(config),
            trained: Vec::new(),
            prior_loss_weight: config.prior_loss_weight,
            value_size: config.save_dtype().map_or(4, |dtype| dtype.size_in_bytes()),
            files: Vec::new(),
            save_every_n_epochs: by_ratio.or(config.save_every_n_epochs),
            memory: None,
        }
        .with_files(config)
    }

    /// Trainable values.
    pub fn parameters(&self) -> usize {
        self.trained.iter().map(|kind| kind.parameters).sum()
    }

    /// Notes what is trained: `groups` are those that the optimizer gets.
    pub(crate) fn set_adapters(&mut self, adapters: &AdapterSet, groups: &[ParamGroup]) {
        let learning: HashSet<&str> = groups
            .iter()
            .flat_map(|group| group.params.iter().map(|(name, _)| name.as_str()))
            .collect();
        let ranks = || {
            let adapters = adapters.iter();
            adapters.filter_map(|(_, adapter)| kronecker_rank(adapter.as_ref()))
        };
        if let (Some(least), Some(most)) = (ranks().min(), ranks().max()) {
            self.network += &match least == most {
                true => format!(": rank up to {most}"),
                false => {
                    format!(": rank up to {least} in the smallest layers, {most} in the largest")
                }
            };
        }
        for (name, adapter) in adapters.iter() {
            let kind = kind_of(name);
            let vars = adapter.vars();
            let parameters: usize = vars.iter().map(|(_, v)| v.elem_count()).sum();
            let in_group = |suffix: &str| learning.contains(format!("{name}.{suffix}").as_str());
            let learns = vars.iter().any(|(suffix, _)| in_group(suffix));
            match self.trained.iter_mut().find(|known| known.kind == kind) {
                Some(known) => {
                    known.layers += 1;
                    known.parameters += parameters;
                    known.learns |= learns;
                }
                None => self.trained.push(TrainedKind {
                    kind,
                    layers: 1,
                    parameters,
                    learns,
                }),
            }
        }
    }

    fn with_files(mut self, config: &TrainConfig) -> Self {
        let naming = Naming::new(config.output_name.as_deref());
        let kept = |count: usize, keep: Option<usize>, every: usize| match keep {
            Some(keep) if every > 0 => count.min(keep.div_ceil(every).max(1)),
            _ => count,
        };
        if let Some(every) = config.save_every_n_steps {
            let count = self.total_steps / every;
            let keep = config.save_last_n_steps;
            let first = count - kept(count, keep, every);
            self.files
                .extend((first..count).map(|i| naming.step((i + 1) * every)));
            if config.save_state {
                let keep = config.save_last_n_steps_state.or(keep);
                let first = count - kept(count, keep, every);
                self.files
                    .extend((first..count).map(|i| naming.step_state((i + 1) * every)));
            }
        }
        if let Some(every) = self.save_every_n_epochs {
            let count = self.epochs.saturating_sub(1) / every;
            let keep = config.save_last_n_epochs;
            let first = count - kept(count, keep, 1);
            self.files
                .extend((first..count).map(|i| naming.epoch((i + 1) * every)));
            if config.save_state {
                let keep = config.save_last_n_epochs_state.or(keep);
                let first = count - kept(count, keep, 1);
                self.files
                    .extend((first..count).map(|i| naming.epoch_state((i + 1) * every)));
            }
        }
        self.files.push(naming.last());
        if config.save_state || config.save_state_on_train_end {
            self.files.push(naming.last_state());
        }
        self
    }
}

/// The family, dim and alpha, and the rank that a layer's change can reach.
fn network(config: &TrainConfig) -> String {
    let Ok(adapter) = config.adapter() else {
        return String::new();
    };
    let AdapterConfig {
        family,
        rank,
        alpha,
        ..
    } = adapter;
    let name = match adapter.weight_decompose {
        true => format!("{family} with magnitudes (DoRA)"),
        false => family.to_string(),
    };
    match family {
        Family::Lora => format!("{name} of dim {rank}, alpha {alpha}: rank up to {rank}"),
        Family::Loha => format!(
            "{name} of dim {rank}, alpha {alpha}: rank up to {}, with the parameters of a LoRA of dim {}",
            rank * rank,
            2 * rank
        ),
        // Its rank follows from the layers.
        Family::Lokr => format!("{name} of dim {rank}, alpha {alpha}"),
        Family::Ia3 => format!("{name}: one factor per channel"),
        Family::Full => format!("{name}: every weight, any rank"),
        _ => name,
    }
}

/// The rank that a LoKr's change can have: the product of its factors' ranks. `None` for other
/// families.
fn kronecker_rank(adapter: &dyn Adapter) -> Option<usize> {
    let factors = adapter.factors();
    let dims = |name: &str| {
        let (_, tensor) = factors.iter().find(|(known, _)| *known == name)?;
        let (rows, rest) = tensor.dims().split_first()?;
        Some((*rows).min(rest.iter().product()))
    };
    // A low-rank factor is as wide as its rank, or as high where it has a core.
    let first = dims("lokr_w1").or_else(|| dims("lokr_w1_a"))?;
    let second = dims("lokr_w2").or_else(|| dims("lokr_w2_a"))?;
    Some(first * second)
}

/// Length, clip skip and weights of captions: what sample pictures elsewhere must agree with.
fn captions(config: &TrainConfig) -> String {
    let text = config.text();
    format!(
        "captions: up to {} tokens, clip skip {}{}",
        75 * text.chunks,
        text.clip_skip,
        match text.weighted {
            true => ", (word:1.2) weighs",
            false => "",
        }
    )
}

/// The kind of a layer, from its name in adapter files.
fn kind_of(name: &str) -> &'static str {
    let has = |part: &str| name.contains(part);
    if name.starts_with("lora_te") {
        "text encoder"
    } else if has("_attn1_") {
        "self attention"
    } else if has("_attn2_") {
        "cross attention"
    } else if has("_ff_") {
        "feed-forward"
    } else if has("_proj_in") || has("_proj_out") {
        "transformer in/out"
    } else if has("_norm") {
        "norms"
    } else {
        "convolutions and time"
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{} pictures a pass ({} for regularization) -> {} batches -> {} updates per epoch; {} epochs, {} updates",
            self.train_images + self.reg_draws,
            self.reg_draws,
            self.batches_per_epoch,
            self.updates_per_epoch,
            self.epochs,
            self.total_steps
        )?;
        if !self.network.is_empty() {
            writeln!(f, "{}", self.network)?;
        }
        writeln!(f, "{}", self.captions)?;
        for kind in &self.trained {
            writeln!(
                f,
                "  {}: {} layers, {} parameters{}",
                kind.kind,
                kind.layers,
                grouped(kind.parameters),
                match kind.learns {
                    true => "",
                    false => "; not trained: the learning rate is 0",
                }
            )?;
        }
        if self.reg_images > 0 {
            writeln!(
                f,
                "regularization: training pictures like the others, repeated until they are as many, whose \
                 loss counts {} times (prior_loss_weight); to keep what the base model draws instead, \
                 set custom_attributes.diff_output_preservation in a dataset_config",
                self.prior_loss_weight
            )?;
        }
        let text = self.trained.iter().any(|kind| kind.kind == "text encoder");
        writeln!(
            f,
            "{} parameters, files of about {:.1} MB{}; seed {}",
            grouped(self.parameters()),
            (self.parameters() * self.value_size) as f64 / 1e6,
            if text {
                ""
            } else {
                "; text encoder: not trained"
            },
            self.seed
        )?;
        if let Some(memory) = &self.memory {
            writeln!(f, "{memory}")?;
        }
        write!(f, "files: ")?;
        match self.files.as_slice() {
            [first, second, .., before, last] if self.files.len() > 5 => write!(
                f,
                "{first}, {second}, ... {before}, {last} ({} in all)",
                self.files.len()
            ),
            files => f.write_str(&files.join(", ")),
        }
    }
}

/// `1234567` as `1,234,567`.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
