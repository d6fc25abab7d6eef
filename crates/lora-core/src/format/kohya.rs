//! The format of sd-scripts and LyCORIS: `lora_unet_LAYER.PART`, one 0-d `alpha`
//! per layer, `ss_*` metadata.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};

use super::file::{TensorFile, write_tensors};
use super::hash::{legacy_hash, model_hash};
use crate::family::Parts;
use crate::{AdapterSet, Error, Result};

/// How [`AdapterSet::save`] writes.
#[derive(Debug, Clone, Default)]
pub struct SaveOptions {
    /// Dtype of all tensors, `alpha` included; `None` keeps each as it is.
    pub dtype: Option<DType>,
    /// Metadata to write beside the set's own, overriding it.
    pub metadata: BTreeMap<String, String>,
}

/// Reads a file in any supported format.
pub(crate) fn load(path: &Path, device: &Device) -> Result<AdapterSet> {
    let file = TensorFile::open(path)?;
    let names = file.names();
    recognise(path, &names)?;
    let mut layers: BTreeMap<String, BTreeMap<String, candle_core::Tensor>> = BTreeMap::new();
    for name in names {
        let (layer, part) = split(&name).ok_or_else(|| Error::UnknownKeys {
            path: path.to_path_buf(),
            layer: "(none)".into(),
            keys: vec![name.clone()],
        })?;
        let tensor = file.tensor(&name, device)?;
        layers
            .entry(layer)
            .or_default()
            .insert(part.to_string(), tensor);
    }
    let mut set = AdapterSet::default();
    for (layer, tensors) in layers {
        let adapter = Parts {
            path,
            layer: &layer,
            tensors,
        }
        .read()?;
        set.insert(layer, adapter);
    }
    set.set_metadata(file.metadata());
    Ok(set)
}

/// Layer name and part of a key: split at the first dot; `lora_te1_`, which some
/// trainers write for the only text encoder, becomes `lora_te_`.
fn split(name: &str) -> Option<(String, &str)> {
    let (layer, part) = name.split_once('.')?;
    let layer = match layer.strip_prefix("lora_te1_") {
        Some(rest) => format!("lora_te_{rest}"),
        None => layer.to_string(),
    };
    Some((layer, part))
}

/// Refuses, by name, what is not an adapter in this format.
fn recognise(path: &Path, names: &[String]) -> Result<()> {
    let unsupported = |what: &str, key: &str, advice| {
        Err(Error::Unsupported {
            path: path.to_path_buf(),
            what: what.into(),
            key: key.into(),
            advice,
        })
    };
    let find = |test: &dyn Fn(&str) -> bool| names.iter().find(|n| test(n)).map(String::as_str);
    if let Some(key) = find(&|n| n.starts_with("lora_te2_")) {
        return unsupported(
            "an SDXL adapter",
            key,
            "use one made for Stable Diffusion 1.x",
        );
    }
    if let Some(key) =
        find(&|n| n.starts_with("lora_unet_double_blocks") || n.starts_with("lora_transformer_"))
    {
        return unsupported(
            "an adapter for another architecture (Flux or SD3)",
            key,
            "use one made for Stable Diffusion 1.x",
        );
    }
    if let Some(key) =
        find(&|n| n.contains(".lora_A.") || n.contains(".processor.") || n.contains(".lora.down."))
    {
        return unsupported(
            "the diffusers/PEFT layout",
            key,
            "convert it to the kohya layout first",
        );
    }
    if let Some(key) = find(&|n| {
        n.starts_with("lora_unet_input_blocks_") || n.starts_with("lora_unet_output_blocks_")
    }) {
        return unsupported(
            "a kohya file with LDM layer names",
            key,
            "convert it to diffusers layer names first",
        );
    }
    if find(&|n| n.starts_with("lora_") && n.contains('.')).is_some() {
        return Ok(());
    }
    let found = match names.first() {
        None => "the file has no tensors".to_string(),
        Some(_) if find(&|n| n.starts_with("model.diffusion_model.")).is_some() => {
            "it is a whole checkpoint".into()
        }
        Some(first) => format!("its {} keys start with {first}", names.len()),
    };
    Err(Error::NoAdapter {
        path: path.to_path_buf(),
        found,
    })
}

/// Writes a set; returns `sshs_model_hash`.
pub(crate) fn save(set: &AdapterSet, path: &Path, options: &SaveOptions) -> Result<String> {
    let tensors = set.tensors(options.dtype)?;
    let mut metadata = set.metadata().clone();
    metadata.extend(options.metadata.iter().map(|(k, v)| (k.clone(), v.clone())));
    metadata.retain(|k, _| !k.starts_with("sshs_"));
    let hash = model_hash(&tensors)?;
    metadata.insert("sshs_legacy_hash".into(), legacy_hash(&tensors, &metadata)?);
    metadata.insert("sshs_model_hash".into(), hash.clone());
    write_tensors(path, &tensors, &metadata)?;
    Ok(hash)
}
