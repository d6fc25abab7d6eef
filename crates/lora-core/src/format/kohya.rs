//! Writing the format of sd-scripts and LyCORIS: `lora_unet_LAYER.PART`, one 0-d `alpha`
//! per layer, `ss_*` metadata.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DType;

use super::file::write_tensors;
use super::hash::{legacy_hash, model_hash};
use crate::{AdapterSet, Result};

/// How [`AdapterSet::save`] writes.
#[derive(Debug, Clone, Default)]
pub struct SaveOptions {
    /// Dtype of all tensors, `alpha` included; `None` keeps each as it is.
    pub dtype: Option<DType>,
    /// Metadata to write beside the set's own, overriding it.
    pub metadata: BTreeMap<String, String>,
}

/// Writes a set; returns `sshs_model_hash`.
pub(crate) fn save(set: &AdapterSet, path: &Path, options: &SaveOptions) -> Result<String> {
    let tensors = set.tensors(options.dtype)?;
    let mut metadata = set.metadata().clone();
    // The scale it tells is in the layers' `alpha` now.
    metadata.remove("lora_adapter_metadata");
    metadata.extend(options.metadata.iter().map(|(k, v)| (k.clone(), v.clone())));
    metadata.retain(|k, _| !k.starts_with("sshs_"));
    let hash = model_hash(&tensors)?;
    metadata.insert("sshs_legacy_hash".into(), legacy_hash(&tensors, &metadata)?);
    metadata.insert("sshs_model_hash".into(), hash.clone());
    write_tensors(path, &tensors, &metadata)?;
    Ok(hash)
}
