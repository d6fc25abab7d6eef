//! Run states: everything needed to go on exactly where a run stood.
//!
//! A state is a folder that appears whole or not at all:
//!
//! | file | content |
//! |---|---|
//! | `model.safetensors` | the trained tensors, f32, by their names in adapter files |
//! | `optimizer.safetensors` | the optimizer's state, see [`lora_optim::state`] |
//! | `ema.safetensors` | averaged weights, if the run keeps them |
//! | `train_state.json` | a [`RunState`]: settings, dataset, position |
//!
//! There is no generator to save: every random number of a run is found from its seed and
//! its place in the run (see [`Streams`](lora_data::Streams)).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use lora_core::format::{TensorFile, write_atomically, write_tensors};
use lora_data::{Dataset, Place, Streams};
use lora_optim::OptimizerState;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::config::{LENGTH, TrainConfig};
use crate::naming::Naming;
use crate::{Error, Result};

const FORMAT: u32 = 1;

/// Settings that may differ between a state and the run that goes on from it: they do not
/// change what is learned.
const FREE: &[&str] = &[
    "resume",
    "extend_run",
    "output_dir",
    "output_name",
    "pretrained_model_name_or_path",
    "train_data_dir",
    "reg_data_dir",
    "dataset_config",
    "in_json",
    "conditioning_data_dir",
    "vae",
    "network_weights",
    "base_weights",
    "gradient_checkpointing",
    "cache_latents_to_disk",
    "no_metadata",
    "training_comment",
    "logging_dir",
    "log_with",
    "log_prefix",
    "log_tracker_name",
    "max_validation_steps",
    "validate_every_n_epochs",
    "validate_every_n_steps",
];

fn is_free(name: &str) -> bool {
    FREE.contains(&name)
        || ["save_", "sample_", "metadata_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
}

/// Where a run stands, and what it must agree with to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Format of this folder.
    pub format: u32,
    /// Every setting of the run.
    pub config: Value,
    /// A hash of the dataset: pictures, sizes, captions, repeats.
    pub dataset: String,
    /// SHA-256 of the checkpoint, where it is one file.
    pub model: Option<String>,
    /// The seed.
    pub seed: u64,
    /// Unix time at which the run was first started.
    pub started_at: f64,
    /// Updates of the whole run.
    pub total_steps: usize,
    /// The epoch in progress, counted from 1.
    pub epoch: usize,
    /// Batches of it that are done.
    pub position: usize,
    /// Batches done in all.
    pub batch: u64,
    /// Updates made.
    pub step: usize,
    /// Non-finite results in a row.
    pub failures: usize,
    /// Non-finite results in all.
    pub skipped: usize,
    /// The running average of the loss.
    pub loss_slots: Vec<f64>,
    /// Validation losses so far: update, loss.
    pub validation: Vec<(usize, f64)>,
}

impl RunState {
    /// The format that this version writes.
    pub const FORMAT: u32 = FORMAT;

    /// Checks that a run that would start as `now` may go on from this state.
    ///
    /// # Errors
    /// [`Error::Resume`] listing what differs.
    pub fn check(&self, path: &Path, config: &TrainConfig, now: &RunState) -> Result<()> {
        let total_steps = now.total_steps;
        let mut differences = Vec::new();
        if self.format != FORMAT {
            differences.push(format!(
                "it has format {}, this version reads {FORMAT}",
                self.format
            ));
        }
        let (Value::Object(saved), Value::Object(settings)) = (&self.config, &now.config) else {
            return Err(Error::resume(path, "its settings cannot be read"));
        };
        let names: std::collections::BTreeSet<&String> =
            saved.keys().chain(settings.keys()).collect();
        for name in names {
            let (was, is) = (saved.get(name), settings.get(name));
            if was == is || is_free(name) || LENGTH.contains(&name.as_str()) {
                continue;
            }
            let text = |v: Option<&Value>| v.map_or("not given".into(), Value::to_string);
            differences.push(format!("{name} was {}, now {}", text(was), text(is)));
        }
        if self.total_steps != total_steps && !config.extend_run {
            differences.push(format!(
                "the run had {} updates, now {total_steps}; give extend_run to change its length",
                self.total_steps
            ));
        }
        if self.dataset != now.dataset {
            differences.push("pictures or captions are not the same".into());
        }
        if self.model.is_some() && now.model.is_some() && self.model != now.model {
            differences.push("the checkpoint is not the same".into());
        }
        // A run that ended before its last file was written still has that to do.
        let written = config.output_dir.as_ref().is_some_and(|folder| {
            let name = Naming::new(config.output_name.as_deref()).last();
            folder.join(name).exists()
        });
        if self.step > total_steps || self.step == total_steps && written {
            differences.push(format!(
                "all {total_steps} updates are done; give extend_run and more epochs or steps to go on"
            ));
        }
        if differences.is_empty() {
            Ok(())
        } else {
            Err(Error::resume(path, differences.join("; ")))
        }
    }
}

/// A hash of everything that decides which picture and caption is shown when: so a resumed
/// run notices changed files.
pub(crate) fn fingerprint(dataset: &Dataset, streams: Streams) -> String {
    let mut hash = Sha256::new();
    for image in dataset.images() {
        let name = image.path.file_name().unwrap_or_default();
        hash.update(name.as_encoded_bytes());
        hash.update(format!("{image_size:?}", image_size = image.size));
        hash.update(format!("{:?}", image.bucket));
    }
    // The first epoch as it would be drawn: repeats, buckets, order and captions.
    let time = lora_data::CaptionTime {
        epoch: 1,
        step: 0,
        max_train_steps: 1,
    };
    for batch in dataset.epoch(1, streams.seed()).batches {
        for item in &batch.items {
            hash.update(Place::item(item.key()).item.to_le_bytes());
            hash.update(dataset.caption(item, time, streams));
        }
    }
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// What a state folder holds, apart from [`RunState`].
pub(crate) struct Weights<'a> {
    /// The trained tensors.
    pub(crate) params: &'a [(String, Var)],
    /// The optimizer.
    pub(crate) optimizer: OptimizerState,
    /// Averaged weights.
    pub(crate) ema: Option<BTreeMap<String, Tensor>>,
}

/// Writes a state folder: into a temporary one first, which is then renamed. An older
/// state of the same name stays until the new one is complete.
pub(crate) fn save(path: &Path, state: &RunState, weights: &Weights<'_>) -> Result<()> {
    let partial = beside(path, "partial");
    remove_folder(&partial)?;
    fs::create_dir_all(&partial).map_err(Error::io(&partial))?;
    if let Err(error) = write_files(&partial, state, weights) {
        // A full disk needs the room; the first error is the one to report.
        remove_folder(&partial).unwrap_or_default();
        return Err(error);
    }
    let old = beside(path, "old");
    remove_folder(&old)?;
    if path.exists() {
        fs::rename(path, &old).map_err(Error::io(path))?;
    }
    fs::rename(&partial, path).map_err(Error::io(path))?;
    sync_parent(path)?;
    remove_folder(&old)
}

fn write_files(folder: &Path, state: &RunState, weights: &Weights<'_>) -> Result<()> {
    let nothing = BTreeMap::new();
    let tensors: BTreeMap<String, Tensor> = weights
        .params
        .iter()
        .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
        .collect();
    write_tensors(&folder.join("model.safetensors"), &tensors, &nothing)?;
    let optimizer = folder.join("optimizer.safetensors");
    weights.optimizer.save(optimizer)?;
    if let Some(ema) = &weights.ema {
        write_tensors(&folder.join("ema.safetensors"), ema, &nothing)?;
    }
    let text = serde_json::to_string_pretty(state).map_err(|e| Error::resume(folder, e))?;
    write_atomically(&folder.join("train_state.json"), |out| {
        out.write_all(text.as_bytes())
    })?;
    Ok(())
}

/// Removes a state folder; when a kill interrupts that, what is left of it does not look
/// like a state. Returns whether there was one.
pub(crate) fn remove(path: &Path) -> Result<bool> {
    let partial = beside(path, "partial");
    remove_folder(&partial)?;
    match fs::rename(path, &partial) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        renamed => renamed.map_err(Error::io(path))?,
    }
    remove_folder(&partial)?;
    Ok(true)
}

/// Removes a folder, if there is one.
fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}

/// Renames are on the disk when their folder is.
fn sync_parent(path: &Path) -> Result<()> {
    #[cfg(unix)]
    if let Some(parent) = path.parent() {
        let parent = if parent.as_os_str().is_empty() {
            Path::new(".")
        } else {
            parent
        };
        fs::File::open(parent)
            .and_then(|folder| folder.sync_all())
            .map_err(Error::io(parent))?;
    }
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(".");
    name.push(suffix);
    name.into()
}

/// A state folder that was read.
pub(crate) struct Loaded {
    pub(crate) path: PathBuf,
    pub(crate) state: RunState,
    pub(crate) optimizer: OptimizerState,
}

/// Reads a state folder. When a kill came between the two renames of [`save`], the state
/// before it is still there under another name and is used.
pub(crate) fn load(path: &Path) -> Result<Loaded> {
    let mut path = path.to_path_buf();
    if !path.exists() && beside(&path, "old").exists() {
        path = beside(&path, "old");
    }
    let json = path.join("train_state.json");
    let text = fs::read_to_string(&json).map_err(Error::io(&json))?;
    let state: RunState = serde_json::from_str(&text).map_err(|e| Error::resume(&json, e))?;
    let optimizer = OptimizerState::load(path.join("optimizer.safetensors"))?;
    Ok(Loaded {
        path,
        state,
        optimizer,
    })
}

impl Loaded {
    /// Puts the saved tensors into the adapters' variables.
    pub(crate) fn restore(&self, params: &[(String, Var)]) -> Result<()> {
        let file = TensorFile::open(self.path.join("model.safetensors"))?;
        for (name, var) in params {
            let Some(shape) = file.shape(name) else {
                return Err(Error::resume(
                    &self.path,
                    format!("model.safetensors has no {name}"),
                ));
            };
            if shape != var.dims() {
                return Err(Error::resume(
                    &self.path,
                    format!("{name} has shape {shape:?}, expected {:?}", var.dims()),
                ));
            }
            let tensor = file.tensor(name, &Device::Cpu)?.to_dtype(DType::F32)?;
            var.set(&tensor.to_device(var.device())?)?;
        }
        Ok(())
    }

    /// The averaged weights.
    pub(crate) fn ema(&self) -> Result<BTreeMap<String, Tensor>> {
        let file = TensorFile::open(self.path.join("ema.safetensors"))?;
        file.names()
            .into_iter()
            .map(|name| {
                let tensor = file.tensor(&name, &Device::Cpu)?;
                Ok((name, tensor))
            })
            .collect()
    }
}
