//! How much memory a run takes, and how much there is.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use lora_data::{Dataset, Size};
use lora_optim::ParamGroup;

use crate::config::TrainConfig;
use crate::model::Model;
use crate::samples::SamplePrompt;
use crate::{Result, setup};

/// The program itself, its threads and their buffers.
const PROGRAM: usize = 20 << 20;

/// The allocator's gaps between blocks of different sizes, as a share of what comes and goes.
const GAPS: f64 = 1.05;

/// The largest batch of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LargestBatch {
    /// Pictures in it.
    pub pictures: usize,
    /// Their size.
    pub size: Size,
    /// Whether the text encoder learns.
    pub text_encoder: bool,
    /// The largest sample picture, if any are drawn.
    pub sample: Option<Size>,
}

/// What a model needs beside the adapters' own values, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ModelMemory {
    /// Its frozen weights.
    pub weights: usize,
    /// The same if the denoiser's are rounded to 16 bits.
    pub narrow_weights: usize,
    /// A training step on the largest batch.
    pub step: usize,
    /// Encoding one picture of that size.
    pub encoding: usize,
    /// Decoding a sample picture.
    pub drawing: usize,
}

/// What a run will take at most, in bytes; compare with the peak of the process.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryEstimate {
    /// The model's part.
    pub model: ModelMemory,
    /// Adapters.
    pub adapters: usize,
    /// Their gradients, the optimizer's state and the average.
    pub optimizer: usize,
    /// The batch it is for.
    pub batch: LargestBatch,
    /// What the system, or the GPU, has left for this process, where it tells.
    pub available: Option<usize>,
    /// What would help, and what the run would take then.
    pub savings: Vec<(String, usize)>,
}

impl MemoryEstimate {
    /// The most that the run holds at once.
    pub fn peak(&self) -> usize {
        peak(self.model, self.adapters, self.optimizer)
    }

    /// What to say when there is not enough: which settings help, and how much each.
    pub fn warning(&self) -> Option<String> {
        let available = self.available.filter(|there| self.peak() > *there)?;
        let mut text = format!(
            "this run will need about {}, and {} are free: it will probably fail",
            megabytes(self.peak()),
            megabytes(available)
        );
        for (setting, peak) in &self.savings {
            text += &format!("\n  {setting}: {} less", megabytes(self.peak() - peak));
        }
        Some(text)
    }
}

impl std::fmt::Display for MemoryEstimate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let LargestBatch { pictures, size, .. } = self.batch;
        write!(
            f,
            "memory: about {} with batches of {pictures} at {size} ({} weights, {} adapters and optimizer, {} a step)",
            megabytes(self.peak()),
            megabytes(self.model.weights),
            megabytes(self.adapters + self.optimizer),
            megabytes(self.model.step)
        )?;
        match self.available {
            Some(there) => write!(f, "; {} are free", megabytes(there)),
            None => Ok(()),
        }
    }
}

/// Pictures are encoded before the optimizer keeps anything.
fn peak(model: ModelMemory, adapters: usize, optimizer: usize) -> usize {
    let with_gaps = |bytes: usize| (bytes as f64 * GAPS) as usize;
    let encoding = with_gaps(model.encoding);
    let training = optimizer + with_gaps(model.step.max(model.drawing));
    PROGRAM + model.weights + adapters + encoding.max(training)
}

fn megabytes(bytes: usize) -> String {
    format!("{} MB", bytes.div_ceil(1_000_000))
}

/// The estimate for a run whose adapters are attached; `None` when the model does not say.
pub(crate) fn estimate(
    config: &TrainConfig,
    dataset: &Dataset,
    model: &mut dyn Model,
    device: &Device,
    trained: usize,
    text_encoder: bool,
    samples: &[SamplePrompt],
) -> Result<Option<MemoryEstimate>> {
    let Some(batch) = largest_batch(dataset, text_encoder, samples) else {
        return Ok(None);
    };
    let Some(needs) = model.memory(&batch) else {
        return Ok(None);
    };
    // Gradients, their sum over several batches, the average.
    let copies = 1.0
        + f64::from(u8::from(config.gradient_accumulation_steps > 1))
        + f64::from(u8::from(config.ema_decay.is_some()));
    let state = match device.is_cpu() {
        true => state_bytes(config)?,
        // It is on the CPU; gradients and weights are joined on their way.
        false => 8.0,
    };
    let optimizer = (trained as f64 * (4.0 * copies + state)) as usize;
    let mut estimate = MemoryEstimate {
        model: needs,
        adapters: 4 * trained,
        optimizer,
        batch,
        available: match device {
            Device::Cpu => available().map(|free| free + resident().unwrap_or(0)),
            // The weights are there already.
            _ => lora_kernels::device_memory(device).map(|(free, _)| free + needs.weights),
        },
        savings: Vec::new(),
    };
    estimate.savings = savings(config, model, &estimate)?;
    Ok(Some(estimate))
}

/// What to say before weights of `bytes` are read for which there is not enough memory; with
/// 16 bits per value the denoiser's would leave `narrow`.
pub(crate) fn too_large(bytes: usize, narrow: usize) -> Option<String> {
    let free = available().filter(|free| bytes > *free)?;
    let mut text = format!(
        "the weights alone need {}, and {} are free: the system will probably end this program while it reads them",
        megabytes(bytes),
        megabytes(free)
    );
    if narrow < bytes {
        text += &format!(
            "; with mixed_precision = \"bf16\" they need {}",
            megabytes(narrow)
        );
    }
    Some(text)
}

/// The settings that would make the peak smaller.
fn savings(
    config: &TrainConfig,
    model: &mut dyn Model,
    now: &MemoryEstimate,
) -> Result<Vec<(String, usize)>> {
    let mut others = Vec::new();
    if !config.gradient_checkpointing && model.set_gradient_checkpointing(true).is_ok() {
        let needs = model.memory(&now.batch);
        model.set_gradient_checkpointing(false)?;
        others.push(("gradient_checkpointing = true".to_string(), needs));
    }
    if config.mixed_precision == "no" {
        let needs = ModelMemory {
            weights: now.model.narrow_weights,
            ..now.model
        };
        others.push(("mixed_precision = \"bf16\"".into(), Some(needs)));
    }
    if now.batch.pictures > 1 {
        let batch = LargestBatch {
            pictures: 1,
            ..now.batch
        };
        let text = format!(
            "train_batch_size = 1 (gradient_accumulation_steps = {} keeps the updates as they are)",
            now.batch.pictures * config.gradient_accumulation_steps
        );
        others.push((text, model.memory(&batch)));
    }
    let smaller = |side: u32| (side * 3 / 4 / 64 * 64).max(64);
    let size = Size::new(
        smaller(now.batch.size.width),
        smaller(now.batch.size.height),
    );
    let batch = LargestBatch { size, ..now.batch };
    others.push((
        format!("a resolution with buckets of {size}"),
        model.memory(&batch),
    ));
    Ok(others
        .into_iter()
        .filter_map(|(text, needs)| Some((text, peak(needs?, now.adapters, now.optimizer))))
        .filter(|(_, peak)| *peak < now.peak())
        .collect())
}

/// The batch with the most pixels; none when nothing is trained on.
fn largest_batch(
    dataset: &Dataset,
    text_encoder: bool,
    samples: &[SamplePrompt],
) -> Option<LargestBatch> {
    let plans = dataset.epoch(1, 0).batches;
    let sizes = plans.iter().filter_map(|batch| {
        let size = batch.items.first()?.size;
        Some((batch.items.len(), size))
    });
    let (pictures, size) = sizes.max_by_key(|(pictures, size)| *pictures as u64 * size.area())?;
    let sample = samples
        .iter()
        .map(|prompt| Size::new(prompt.width as u32, prompt.height as u32))
        .max_by_key(|size| size.area());
    Some(LargestBatch {
        pictures,
        size,
        sample,
        text_encoder,
    })
}

/// Bytes of state that the optimizer keeps per trained value, found by letting it take a step
/// on a small matrix.
fn state_bytes(config: &TrainConfig) -> Result<f64> {
    const SIDE: usize = 128;
    // Not zeros: of these Prodigy keeps no copy.
    let ones = Tensor::ones((SIDE, SIDE), DType::F32, &Device::Cpu)?;
    let var = Var::from_tensor(&ones)?;
    let group = ParamGroup::new("unet", vec![("probe".to_string(), var.clone())]);
    let mut optimizer = setup::optimizer(config, vec![group])?;
    optimizer.set_training(true)?;
    let grads: BTreeMap<String, Tensor> = [("probe".to_string(), var.ones_like()?)].into();
    optimizer.step(&grads)?;
    let state = optimizer.state()?;
    let bytes = state
        .tensors
        .iter()
        .filter(|(name, _)| name.starts_with("state."))
        // State of bf16 is rounded f32 in memory.
        .map(|(_, t)| match t.dtype() {
            DType::BF16 => 4 * t.elem_count(),
            dtype => dtype.size_in_bytes() * t.elem_count(),
        })
        .sum::<usize>();
    Ok(bytes as f64 / (SIDE * SIDE) as f64)
}

/// Memory that this process holds now, where the system tells.
fn resident() -> Option<usize> {
    kilobytes(&read("/proc/self/status")?, "VmRSS:")
}

/// Memory that processes may still take: what the system has, or what is left below the limit
/// of this process' control group. `None` where the system does not tell.
fn available() -> Option<usize> {
    let free = kilobytes(&read("/proc/meminfo")?, "MemAvailable:")?;
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    Some(
        groups
            .lines()
            .filter_map(left_in_group)
            .fold(free, usize::min),
    )
}

/// What is left in the group of one line of `/proc/self/cgroup`, all groups above it included;
/// files that are cached in it count as free.
fn left_in_group(line: &str) -> Option<usize> {
    let (_, rest) = line.split_once(':')?;
    let (controllers, path) = rest.split_once(':')?;
    let (root, limit, usage) = match controllers {
        "" => ("/sys/fs/cgroup", "memory.max", "memory.current"),
        "memory" => (
            "/sys/fs/cgroup/memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        ),
        _ => return None,
    };
    let mut folders: Vec<String> = vec![root.to_string()];
    for part in path.split('/').filter(|part| !part.is_empty()) {
        folders.push(format!("{}/{part}", folders.last()?));
    }
    folders
        .iter()
        .filter_map(|folder| {
            // "max" is no number: no limit.
            let limit: usize = read(&format!("{folder}/{limit}"))?.trim().parse().ok()?;
            let used: usize = read(&format!("{folder}/{usage}"))?.trim().parse().ok()?;
            let stat = read(&format!("{folder}/memory.stat")).unwrap_or_default();
            let cached = stat
                .lines()
                .find_map(|line| line.strip_prefix("inactive_file "))
                .and_then(|n| n.trim().parse().ok())
                .unwrap_or(0);
            Some(limit.saturating_sub(used.saturating_sub(cached)))
        })
        .min()
}

fn read(path: &str) -> Option<String> {
    // Elsewhere there is no such file.
    cfg!(target_os = "linux")
        .then(|| std::fs::read_to_string(path).ok())
        .flatten()
}

/// The value of `name` in a file of lines such as `MemFree:  123 kB`, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number: usize = line.split_whitespace().next()?.parse().ok()?;
    Some(number * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(available: usize) -> MemoryEstimate {
        MemoryEstimate {
            model: ModelMemory {
                weights: 2_000_000_000,
                narrow_weights: 2_000_000_000,
                step: 1_000_000_000,
                encoding: 600_000_000,
                drawing: 0,
            },
            adapters: 20_000_000,
            optimizer: 80_000_000,
            batch: LargestBatch {
                pictures: 2,
                size: Size::new(512, 768),
                text_encoder: true,
                sample: None,
            },
            available: Some(available),
            savings: vec![("gradient_checkpointing = true".into(), 2_200_000_000)],
        }
    }

    #[test]
    fn it_warns_only_when_there_is_too_little_and_says_what_helps() {
        assert_eq!(estimate(8_000_000_000).warning(), None);
        let warning = estimate(3_000_000_000).warning().unwrap();
        for part in [
            "3000 MB are free",
            "gradient_checkpointing = true: 971 MB less",
        ] {
            assert!(warning.contains(part), "{warning}");
        }
    }

    #[test]
    fn the_state_of_an_optimizer_is_counted() {
        let bytes = |name: &str| {
            let config = TrainConfig {
                optimizer_type: name.into(),
                ..TrainConfig::default()
            };
            state_bytes(&config).unwrap()
        };
        // Two averages; one; and Prodigy's beside these the first weights and a sum.
        assert_eq!(bytes("AdamW"), 8.0);
        assert_eq!(bytes("Lion"), 4.0);
        assert_eq!(bytes("Prodigy"), 16.0);
        assert!(bytes("AdamW8bit") < 3.0);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_tells_how_much_there_is() {
        let (free, own) = (available().unwrap(), resident().unwrap());
        assert!(free > 1 << 20 && own > 1 << 20);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn weights_that_cannot_fit_are_said_before_they_are_read() {
        assert_eq!(too_large(1 << 20, 1 << 19), None);
        let warning = too_large(1 << 60, 1 << 59).unwrap();
        assert!(warning.contains("mixed_precision"), "{warning}");
    }
}
