//! Saving a set: layout, metadata of sd-scripts (`ss_*`), hashes.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DType;

use super::file::{bytes, refuse_not_finite, safetensors_dtype, write_tensors};
use super::hash::{legacy_hash, model_hash};
use super::write::{SaveLayout, laid_out, write_config};
use crate::{AdapterSet, Result};

/// How [`AdapterSet::save`] writes.
#[derive(Debug, Clone, Default)]
pub struct SaveOptions {
    /// Dtype of all tensors of real numbers, `alpha` included; `None` keeps each as it is.
    pub dtype: Option<DType>,
    /// Metadata to write beside the set's own, overriding it.
    pub metadata: BTreeMap<String, String>,
    /// The layout of keys.
    pub layout: SaveLayout,
}

/// Writes a set; returns `sshs_model_hash`.
pub(crate) fn save(set: &AdapterSet, path: &Path, options: &SaveOptions) -> Result<String> {
    let written = laid_out(set, options.layout, options.dtype)?;
    let tensors = written.tensors;
    for (key, tensor) in &tensors {
        refuse_not_finite(path, key, safetensors_dtype(key, tensor)?, &bytes(tensor)?)?;
    }
    let mut metadata = set.metadata().clone();
    // What it tells is in the layers now, or written anew.
    metadata.remove("lora_adapter_metadata");
    metadata.extend(written.metadata);
    metadata.extend(options.metadata.iter().map(|(k, v)| (k.clone(), v.clone())));
    metadata.retain(|k, _| !k.starts_with("sshs_"));
    let hash = model_hash(&tensors)?;
    metadata.insert("sshs_legacy_hash".into(), legacy_hash(&tensors, &metadata)?);
    metadata.insert("sshs_model_hash".into(), hash.clone());
    if let Some(config) = &written.config {
        write_config(path, config)?;
    }
    write_tensors(path, &tensors, &metadata)?;
    Ok(hash)
}
