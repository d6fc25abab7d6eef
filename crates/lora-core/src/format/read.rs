//! Reading a file in any supported layout.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::file::TensorFile;
use super::modules::layer_path;
use super::names::{Key, translate};
use super::peft::Scales;
use super::report::{BaseModel, FileReport, Finding, FindingKind, LayerReport};
use crate::family::{Outcome, Parts};
use crate::{AdapterSet, Component, Error, Result};

/// Keys with this prefix are embeddings that come with an adapter (the web UI's bundles).
pub(crate) const BUNDLE: &str = "bundle_emb.";

/// What becomes of a file that is not wholly understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strictness {
    /// The first error is returned: for tools that work on files.
    #[default]
    Strict,
    /// Layers and keys with errors are left out, which [`AdapterSet::left_out`] lists: for
    /// programs that draw pictures.
    Lenient,
}

/// How [`AdapterSet::load_with`] reads.
///
/// | name | default | meaning |
/// |---|---|---|
/// | `strictness` | strict | what becomes of keys and layers with errors |
/// | `check_values` | true | NaN and infinite values are errors |
///
/// ```
/// use candle_core::Device;
/// use lora_core::{AdapterSet, format::{LoadOptions, Strictness}};
/// let options = LoadOptions { strictness: Strictness::Lenient, ..Default::default() };
/// assert!(AdapterSet::load_with("absent.safetensors", &Device::Cpu, &options).is_err());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    /// What becomes of keys and layers with errors.
    pub strictness: Strictness,
    /// Whether NaN and infinite values are errors; reads every value once.
    pub check_values: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            strictness: Strictness::Strict,
            check_values: true,
        }
    }
}

/// Where the values of tensors come from.
pub(super) enum Values<'a> {
    /// Copied to a device.
    Loaded(&'a Device),
    /// Left in the file: large tensors are stood in for by a zero spread over their shape.
    Shapes,
}

impl Values<'_> {
    fn fetch(&self, file: &TensorFile, name: &str) -> Result<Tensor> {
        match self {
            Values::Loaded(device) => file.tensor(name, device),
            Values::Shapes => {
                let shape = file.shape(name).unwrap_or_default();
                let whole = file.dtype(name).is_none_or(|d| d.is_int());
                if whole || shape.iter().product::<usize>() <= 1 {
                    return file.tensor(name, &Device::Cpu);
                }
                let dtype = file.dtype(name).unwrap_or(DType::F32);
                let zero = Tensor::zeros((), dtype, &Device::Cpu)?;
                Ok(zero.broadcast_as(shape)?)
            }
        }
    }
}

/// A file's contents and all that is to be said about them.
pub(super) struct Examined {
    pub(super) set: AdapterSet,
    pub(super) report: FileReport,
    /// The errors behind the report's, in the same order.
    errors: Vec<Error>,
}

/// One layer of a file: its parts and the keys that they stand under.
#[derive(Default)]
struct FileLayer {
    path: Option<String>,
    kohya_oft: bool,
    parts: BTreeMap<String, (String, Key)>,
}

/// Reads a file in any supported format.
pub(crate) fn load(path: &Path, device: &Device, options: &LoadOptions) -> Result<AdapterSet> {
    let file = TensorFile::open(path)?;
    let mut examined = examine(&file, &Values::Loaded(device))?;
    if options.check_values {
        for (key, count) in file.not_finite() {
            let layer = translate(&key).map(|k| k.layer);
            let error = Error::NotFinite {
                path: path.to_path_buf(),
                key,
                count,
            };
            // Left out of the set, which a strict reader never sees.
            examined.set.retain(|name| Some(name) != layer.as_deref());
            examined.errors.push(error);
        }
    }
    let fatal = |e: &Error| matches!(e, Error::NoAdapter { .. } | Error::Unsupported { .. });
    let strict = options.strictness == Strictness::Strict;
    let stop = examined.errors.iter().position(|e| strict || fatal(e));
    if let Some(first) = stop {
        return Err(examined.errors.swap_remove(first));
    }
    let left_out = examined.errors.iter().map(Error::to_string).collect();
    Ok(examined.set.with_left_out(left_out))
}

/// Reads what a file consists of: shapes, dtypes and single numbers are right, the factors
/// are zeros that take no memory.
pub(crate) fn outline(path: &Path) -> Result<AdapterSet> {
    let file = TensorFile::open(path)?;
    let mut examined = examine(&file, &Values::Shapes)?;
    match examined.errors.is_empty() {
        true => Ok(examined.set),
        false => Err(examined.errors.swap_remove(0)),
    }
}

/// Goes through a file, collecting everything worth a remark.
///
/// # Errors
/// Only those of reading itself; what is wrong with the contents is in the result.
pub(super) fn examine(file: &TensorFile, values: &Values<'_>) -> Result<Examined> {
    let path = file.path();
    let names = file.names();
    let mut examined = Examined {
        set: AdapterSet::from_file(path, file.metadata()),
        report: FileReport {
            path: path.to_path_buf(),
            tensors: names.len(),
            formats: BTreeMap::new(),
            base_model: BaseModel::Unknown,
            layers: BTreeMap::new(),
            embeddings: BTreeSet::new(),
            metadata: file.metadata(),
            findings: Vec::new(),
        },
        errors: Vec::new(),
    };
    if let Err((kind, error)) = recognise(path, &names) {
        let key = names.first().cloned().unwrap_or_default();
        examined.fail(kind, key, error);
    }
    let scales = match Scales::find(path, &examined.report.metadata, &names) {
        Ok(scales) => scales,
        Err(error) => {
            examined.fail(
                FindingKind::Unsupported,
                "adapter_config.json".into(),
                error,
            );
            Scales::default()
        }
    };
    let layers = examined.gather(file, values, &names)?;
    let dylora = dylora_block(&examined.report.metadata);
    for (name, layer) in &layers {
        examined.read_layer(file, values, &scales, dylora, name, layer);
    }
    examined.report.base_model = base_model(&names, &examined.report);
    if dylora.is_some() {
        // The set holds plain LoRA with the scale of all blocks from now on.
        plain_lora(examined.set.metadata_mut());
    }
    Ok(examined)
}

impl Examined {
    fn fail(&mut self, kind: FindingKind, key: String, error: Error) {
        let error = error.in_file(&self.report.path);
        self.note(kind, key, error.to_string());
        self.errors.push(error);
    }

    fn note(&mut self, kind: FindingKind, key: String, message: String) {
        self.report.findings.push(Finding { kind, key, message });
    }

    /// Sorts the keys into layers and embeddings.
    fn gather(
        &mut self,
        file: &TensorFile,
        values: &Values<'_>,
        names: &[String],
    ) -> Result<BTreeMap<String, FileLayer>> {
        let path = self.report.path.clone();
        let mut layers: BTreeMap<String, FileLayer> = BTreeMap::new();
        for name in names {
            if let Some(rest) = name.strip_prefix(BUNDLE) {
                let embedding = rest.split('.').next().unwrap_or(rest);
                self.report.embeddings.insert(embedding.to_string());
                match values.fetch(file, name) {
                    Ok(tensor) => self.set.insert_bundled(name.clone(), tensor),
                    Err(error) => self.fail(FindingKind::Shape, name.clone(), error),
                }
                continue;
            }
            let Some(key) = translate(name) else {
                let error = Error::UnknownKeys {
                    path: path.clone(),
                    layer: "(none)".into(),
                    keys: vec![name.clone()],
                };
                self.fail(FindingKind::UnknownKey, name.clone(), error);
                continue;
            };
            *self.report.formats.entry(key.format).or_insert(0) += 1;
            let layer = layers.entry(key.layer.clone()).or_default();
            layer.path = layer.path.take().or(key.path.clone());
            layer.kohya_oft |= key.format == super::Format::KohyaOft;
            if layer.parts.contains_key(&key.part) {
                let error = Error::Malformed {
                    path: path.clone(),
                    reason: format!("{name} is the second key for {} of {}", key.part, key.layer),
                };
                self.fail(FindingKind::Duplicate, name.clone(), error);
                continue;
            }
            layer.parts.insert(key.part.clone(), (name.clone(), key));
        }
        Ok(layers)
    }

    fn read_layer(
        &mut self,
        file: &TensorFile,
        values: &Values<'_>,
        scales: &Scales,
        dylora: Option<usize>,
        name: &str,
        layer: &FileLayer,
    ) {
        let tensors = (|| -> Result<BTreeMap<String, Tensor>> {
            let mut tensors = BTreeMap::new();
            for (part, (full, key)) in &layer.parts {
                tensors.insert(part.clone(), oriented(key, values.fetch(file, full)?)?);
            }
            if let Some(dotted) = &layer.path {
                scales.apply(name, dotted, &mut tensors)?;
            }
            Ok(tensors)
        })();
        let tensors = match tensors {
            Ok(tensors) => tensors,
            Err(error) => return self.fail(kind_of(&error), name.to_string(), error),
        };
        let mut parts = Parts::new(name, tensors);
        parts.kohya_oft = layer.kohya_oft;
        parts.dylora_block = dylora;
        let outcome = parts.read();
        let full = |part: &str| match layer.parts.get(part) {
            Some((full, _)) => full.clone(),
            None => format!("{name}.{part}"),
        };
        self.take_outcome(name, outcome, &full);
    }

    fn take_outcome(&mut self, name: &str, outcome: Outcome, full: &dyn Fn(&str) -> String) {
        for note in outcome.notes {
            let kind = match (note.part.as_str(), note.missing) {
                ("alpha", true) => FindingKind::MissingAlpha,
                _ => FindingKind::Remark,
            };
            let key = full(&note.part);
            self.note(kind, key.clone(), format!("{key}: {}", note.text));
        }
        let adapter = match outcome.adapter {
            Ok(adapter) => adapter,
            Err(error) => {
                let key = match &error {
                    Error::ShapeMismatch { tensor, .. } => full(tensor),
                    Error::BadValue { name, .. } => full(name),
                    Error::MissingPart { missing, .. } => full(missing),
                    _ => name.to_string(),
                };
                return self.fail(kind_of(&error), key, error);
            }
        };
        if !outcome.unknown.is_empty() {
            for part in &outcome.unknown {
                let error = Error::UnknownKeys {
                    path: self.report.path.clone(),
                    layer: name.to_string(),
                    keys: vec![part.clone()],
                };
                self.fail(FindingKind::UnknownKey, full(part), error);
            }
        }
        let matrix = adapter.matrix_dims();
        let known = Component::Unet.owns(name) || Component::TextEncoder.owns(name);
        if known && layer_path(name).is_none() {
            let text = format!("{name}: Stable Diffusion 1.x has no such layer");
            self.note(FindingKind::UnknownLayer, name.to_string(), text);
        }
        let smaller = matrix.0.min(matrix.1);
        let low_rank = matches!(adapter.family(), crate::Family::Lora | crate::Family::Dora);
        if let Some(rank) = adapter.rank().filter(|r| low_rank && *r > smaller) {
            let text = format!(
                "{name}: rank {rank} is more than a matrix of {} by {} can have",
                matrix.0, matrix.1
            );
            self.note(FindingKind::LargeRank, name.to_string(), text);
        }
        let layer = LayerReport {
            family: adapter.family(),
            rank: adapter.rank(),
            alpha: adapter.alpha(),
            scale: adapter.scale(),
            matrix,
            parameters: adapter.parameter_count(),
        };
        self.report.layers.insert(name.to_string(), layer);
        self.set.insert(name, adapter);
    }
}

/// What kind of finding an error is.
fn kind_of(error: &Error) -> FindingKind {
    match error {
        Error::UnknownKeys { .. } => FindingKind::UnknownKey,
        Error::MissingPart { .. } => FindingKind::MissingPart,
        Error::BadValue { .. } => FindingKind::BadValue,
        Error::Unsupported { .. } => FindingKind::Unsupported,
        _ => FindingKind::Shape,
    }
}

/// DyLoRA's block size, where the metadata say that LyCORIS trained one: its files hold
/// the configured `alpha`, which readers divide by the whole rank, while all blocks
/// together were trained at `alpha / blocks`.
fn dylora_block(metadata: &BTreeMap<String, String>) -> Option<usize> {
    if metadata.get("ss_network_module").map(String::as_str) != Some("lycoris.kohya") {
        return None;
    }
    let args: serde_json::Value = serde_json::from_str(metadata.get("ss_network_args")?).ok()?;
    if !args.get("algo")?.as_str()?.eq_ignore_ascii_case("dylora") {
        return None;
    }
    let size = match args.get("block_size") {
        None | Some(serde_json::Value::Null) => 4,
        Some(serde_json::Value::String(text)) => text.trim().parse().ok()?,
        Some(number) => usize::try_from(number.as_u64()?).ok()?,
    };
    (size > 0).then_some(size)
}

/// Says in the metadata that this is plain LoRA, so that the scale is not corrected twice.
fn plain_lora(metadata: &mut BTreeMap<String, String>) {
    let Some(text) = metadata.get_mut("ss_network_args") else {
        return;
    };
    if let Ok(serde_json::Value::Object(mut args)) = serde_json::from_str(text) {
        args.insert("algo".into(), "lora".into());
        args.remove("block_size");
        *text = serde_json::Value::Object(args).to_string();
    }
}

/// PEFT's magnitude vectors, `[o]` or `[1, o, 1, 1]`, in the shape that tells their axis.
fn oriented(key: &Key, tensor: Tensor) -> Result<Tensor> {
    if !key.magnitude {
        return Ok(tensor);
    }
    let mut shape = vec![1; tensor.rank().max(2)];
    if let Some(size) = shape.first_mut() {
        *size = tensor.elem_count();
    }
    Ok(tensor.reshape(shape)?)
}

/// Which model the layers fit; shapes count for more than metadata.
fn base_model(names: &[String], report: &FileReport) -> BaseModel {
    let starts = |prefix: &str| names.iter().any(|n| n.starts_with(prefix));
    if starts("lora_te2_") || starts("text_encoder_2.") {
        return BaseModel::Sdxl;
    }
    if OTHERS.iter().any(|prefix| starts(prefix)) {
        return BaseModel::Other("another architecture (Flux, SD3 or the like)".into());
    }
    let by_inputs = report.layers.iter().find_map(|(name, layer)| {
        let context = name.ends_with("attn2_to_k") || name.ends_with("attn2_to_v");
        match (context, layer.matrix.1) {
            (true, 768) => Some(BaseModel::Sd1),
            (true, 1024) => Some(BaseModel::Sd2),
            (true, 2048) => Some(BaseModel::Sdxl),
            _ => None,
        }
    });
    if let Some(model) = by_inputs {
        return model;
    }
    let metadata = |key: &str| report.metadata.get(key).map_or("", String::as_str);
    let written = metadata("ss_base_model_version");
    match (written, metadata("modelspec.architecture")) {
        (v, _) if v.starts_with("sd_v1") => BaseModel::Sd1,
        (v, _) if v.starts_with("sd_v2") => BaseModel::Sd2,
        (v, _) if v.starts_with("sdxl") => BaseModel::Sdxl,
        ("", a) if a.starts_with("stable-diffusion-v1") => BaseModel::Sd1,
        ("", a) if a.starts_with("stable-diffusion-v2") => BaseModel::Sd2,
        ("", a) if a.starts_with("stable-diffusion-xl") => BaseModel::Sdxl,
        ("", "") => BaseModel::Unknown,
        ("", other) | (other, _) => BaseModel::Other(other.to_string()),
    }
}

/// Beginnings of keys of other architectures.
const OTHERS: [&str; 4] = [
    "lora_unet_double_blocks",
    "lora_unet_single_blocks",
    "lora_transformer_",
    "transformer.",
];

/// Refuses, by name, what is not an adapter for this architecture.
fn recognise(path: &Path, names: &[String]) -> std::result::Result<(), (FindingKind, Error)> {
    let unsupported = |what: &str, key: &str| {
        let error = Error::Unsupported {
            path: path.to_path_buf(),
            what: what.into(),
            key: key.into(),
            advice: "use one made for Stable Diffusion 1.x",
        };
        Err((FindingKind::WrongModel, error))
    };
    let find = |starts: &[&str]| {
        let mut names = names.iter();
        names.find(|n| starts.iter().any(|start| n.starts_with(start)))
    };
    if let Some(key) = find(&["lora_te2_", "text_encoder_2."]) {
        return unsupported("an SDXL adapter", key);
    }
    if let Some(key) = find(&OTHERS) {
        return unsupported("an adapter for another architecture (Flux or SD3)", key);
    }
    if names.iter().any(|name| translate(name).is_some()) {
        return Ok(());
    }
    let found = match names.first() {
        None => "the file has no tensors".to_string(),
        Some(_) if find(&["model.diffusion_model."]).is_some() => "it is a whole checkpoint".into(),
        Some(first) => format!("its {} keys start with {first}", names.len()),
    };
    let error = Error::NoAdapter {
        path: path.to_path_buf(),
        found,
    };
    Err((FindingKind::NoAdapter, error))
}
