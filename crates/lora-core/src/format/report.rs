//! What an adapter file holds: format, families, ranks, base model, and every key
//! accounted for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::file::TensorFile;
use super::read::{self, Values};
use crate::{Component, Error, Family, Result};

/// A layout of keys in adapter files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Format {
    /// sd-scripts, LyCORIS: `lora_unet_LAYER.PART`, diffusers' layer names.
    Kohya,
    /// The same with LDM's layer names.
    KohyaLdm,
    /// sd-scripts' `networks.oft`: `oft_unet_LAYER.PART`.
    KohyaOft,
    /// LyCORIS' wrapper of any model: `lycoris_LAYER.PART`.
    LycorisWrapper,
    /// diffusers' attention processors: `PATH.processor.to_q_lora.up.weight`.
    DiffusersOld,
    /// diffusers since PEFT: `unet.PATH.lora_A.weight`.
    Diffusers,
    /// PEFT: `base_model.model.PATH.lora_A.weight` and `adapter_config.json`.
    Peft,
    /// ComfyUI: `diffusion_model.PATH.lora_up.weight`, LDM's paths.
    Comfy,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Format::Kohya => "kohya",
            Format::KohyaLdm => "kohya with LDM names",
            Format::KohyaOft => "sd-scripts OFT",
            Format::LycorisWrapper => "LyCORIS wrapper",
            Format::DiffusersOld => "diffusers attention processors",
            Format::Diffusers => "diffusers",
            Format::Peft => "PEFT",
            Format::Comfy => "ComfyUI",
        })
    }
}

/// The model that an adapter was made for.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum BaseModel {
    /// Stable Diffusion 1.x: text context of 768 numbers.
    Sd1,
    /// Stable Diffusion 2.x: 1024.
    Sd2,
    /// Stable Diffusion XL: 2048.
    Sdxl,
    /// Another one, by name.
    Other(String),
    /// Nothing in the file tells.
    Unknown,
}

impl std::fmt::Display for BaseModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            BaseModel::Sd1 => "Stable Diffusion 1.x",
            BaseModel::Sd2 => "Stable Diffusion 2.x",
            BaseModel::Sdxl => "Stable Diffusion XL",
            BaseModel::Other(name) => name,
            BaseModel::Unknown => "unknown",
        })
    }
}

/// What a finding in a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum FindingKind {
    /// A key that belongs to no known layout or part.
    UnknownKey,
    /// A part without which the layer means nothing.
    MissingPart,
    /// Parts whose shapes contradict each other.
    Shape,
    /// A number that makes no sense.
    BadValue,
    /// Two keys for one part.
    Duplicate,
    /// Values that are NaN or infinite.
    NotFinite,
    /// The adapter is for another architecture.
    WrongModel,
    /// A format that is recognised and not supported.
    Unsupported,
    /// No key of the file belongs to an adapter.
    NoAdapter,
    /// No `alpha`, so the scale is 1. A remark.
    MissingAlpha,
    /// A key that is read in a special way or means nothing where it stands. A remark.
    Remark,
    /// A layer that Stable Diffusion 1.x does not have. A remark: other models may.
    UnknownLayer,
    /// A rank above the smaller side of the layer's matrix. A remark: trainers make such
    /// factors for thin layers.
    LargeRank,
}

impl FindingKind {
    /// Whether it keeps the layer, or the file, from being read as it was meant.
    pub fn is_error(self) -> bool {
        !matches!(
            self,
            Self::MissingAlpha | Self::Remark | Self::UnknownLayer | Self::LargeRank
        )
    }
}

/// One thing found in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What kind of thing.
    pub kind: FindingKind,
    /// The key as the file spells it, or the layer's name where a key is missing.
    pub key: String,
    /// A sentence for the user, with file, key and shapes where they matter.
    pub message: String,
}

/// One layer's adapter in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerReport {
    /// The family.
    pub family: Family,
    /// The rank, for families that have one.
    pub rank: Option<usize>,
    /// `alpha`, for families that have one; the constraint of OFT and BOFT.
    pub alpha: Option<f64>,
    /// What the factors' product is multiplied by.
    pub scale: f64,
    /// Outputs, and inputs times kernel area, as far as the factors tell.
    pub matrix: (usize, usize),
    /// Values in all factors.
    pub parameters: usize,
}

/// What a file holds. Made from header, shapes and single numbers alone: the factors are
/// neither read nor copied, so that a large file takes milliseconds.
///
/// Whether values are finite is not looked at by [`FileReport::open`]; see
/// [`FileReport::open_checking_values`].
///
/// ```
/// use std::collections::BTreeMap;
/// use candle_core::{DType, Device, Tensor};
/// use lora_core::format::{FileReport, FindingKind, Format, write_tensors};
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("style.safetensors");
/// let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F16, &Device::Cpu);
/// let layer = "lora_unet_mid_block_attentions_0_proj_in";
/// let tensors = BTreeMap::from([
///     (format!("{layer}.lora_down.weight"), zeros((4, 1280))?),
///     (format!("{layer}.lora_up.weight"), zeros((1280, 4))?),
///     ("surplus".to_string(), zeros((1, 1))?),
/// ]);
/// write_tensors(&path, &tensors, &BTreeMap::new())?;
/// let report = FileReport::open(&path)?;
/// assert_eq!(report.format(), Some(Format::Kohya));
/// assert_eq!(report.layers[layer].rank, Some(4));
/// assert_eq!(report.errors().next().unwrap().kind, FindingKind::UnknownKey);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct FileReport {
    /// The file.
    pub path: PathBuf,
    /// How many tensors it holds.
    pub tensors: usize,
    /// How many keys are written in each layout.
    pub formats: BTreeMap<Format, usize>,
    /// The model it was made for.
    pub base_model: BaseModel,
    /// The layers that can be read, by the name that kohya's files give them.
    pub layers: BTreeMap<String, LayerReport>,
    /// Names of embeddings bundled with the adapter.
    pub embeddings: BTreeSet<String>,
    /// The header's free-form metadata.
    pub metadata: BTreeMap<String, String>,
    /// Everything worth a remark, errors included. A key that is neither part of a layer
    /// nor of an embedding is always here.
    pub findings: Vec<Finding>,
}

impl FileReport {
    /// Opens a file and reports on it.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Pickle`] or [`Error::Malformed`] when it is no safetensors
    /// file at all; everything else is in [`findings`](Self::findings).
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let file = TensorFile::open(path)?;
        Ok(read::examine(&file, &Values::Shapes)?.report)
    }

    /// The same, and reads every value once to find those that are NaN or infinite.
    ///
    /// # Errors
    /// As [`FileReport::open`].
    pub fn open_checking_values(path: impl AsRef<Path>) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let mut report = read::examine(&file, &Values::Shapes)?.report;
        for (key, count) in file.not_finite() {
            let error = Error::NotFinite {
                path: file.path().to_path_buf(),
                key: key.clone(),
                count,
            };
            report.findings.push(Finding {
                kind: FindingKind::NotFinite,
                key,
                message: error.to_string(),
            });
        }
        Ok(report)
    }

    /// The layout that most keys are written in.
    pub fn format(&self) -> Option<Format> {
        let most = self.formats.iter().max_by_key(|(_, count)| **count);
        most.map(|(format, _)| *format)
    }

    /// The findings that are errors.
    pub fn errors(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|f| f.kind.is_error())
    }

    /// How many layers there are of each family.
    pub fn families(&self) -> BTreeMap<Family, usize> {
        tally(self.layers.values().map(|l| l.family))
    }

    /// How many layers there are of each rank.
    pub fn ranks(&self) -> BTreeMap<usize, usize> {
        tally(self.layers.values().filter_map(|l| l.rank))
    }

    /// The different values of `alpha`, sorted.
    pub fn alphas(&self) -> Vec<f64> {
        let mut all: Vec<f64> = self.layers.values().filter_map(|l| l.alpha).collect();
        all.sort_by(f64::total_cmp);
        all.dedup();
        all
    }

    /// How many layers of one component have an adapter.
    pub fn count(&self, component: &Component) -> usize {
        self.layers
            .keys()
            .filter(|name| component.owns(name))
            .count()
    }

    /// Values in all factors.
    pub fn parameters(&self) -> usize {
        self.layers.values().map(|l| l.parameters).sum()
    }
}

fn tally<T: Ord>(items: impl Iterator<Item = T>) -> BTreeMap<T, usize> {
    let mut counts = BTreeMap::new();
    for item in items {
        *counts.entry(item).or_insert(0) += 1;
    }
    counts
}

impl std::fmt::Display for FileReport {
    /// Several lines of text, the last one without an end.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |items: Vec<String>| match items.is_empty() {
            true => "none".to_string(),
            false => items.join(", "),
        };
        let format = self.format().map_or("none".into(), |f| f.to_string());
        let families = self.families();
        let ranks = self.ranks();
        writeln!(f, "file        {}", self.path.display())?;
        writeln!(f, "format      {format}")?;
        writeln!(f, "base model  {}", self.base_model)?;
        writeln!(
            f,
            "layers      {} UNet, {} text encoder, {} in all",
            self.count(&Component::Unet),
            self.count(&Component::TextEncoder),
            self.layers.len()
        )?;
        let families = families.iter().map(|(k, n)| format!("{k} ({n})"));
        writeln!(f, "family      {}", list(families.collect()))?;
        let ranks = ranks.iter().map(|(k, n)| format!("{k} ({n})"));
        writeln!(f, "rank        {}", list(ranks.collect()))?;
        let alphas = self.alphas();
        let alphas = alphas.iter().map(ToString::to_string);
        writeln!(f, "alpha       {}", list(alphas.collect()))?;
        write!(f, "values      {}", self.parameters())?;
        if !self.embeddings.is_empty() {
            let names = self.embeddings.iter().cloned().collect();
            write!(f, "\nembeddings  {}", list(names))?;
        }
        for finding in &self.findings {
            let word = if finding.kind.is_error() {
                "error"
            } else {
                "note"
            };
            write!(f, "\n{word}: {}", finding.message)?;
        }
        Ok(())
    }
}
