//! Base weights by layer name, from a checkpoint file, a diffusers folder or memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use crate::format::{TensorFile, layer_from_ldm};
use crate::{Component, Error, Result};

/// How a file names its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Naming {
    /// A single file in LDM's layout: all parts, with prefixes.
    Ldm,
    /// The UNet of a diffusers folder.
    Unet,
    /// The text encoder of a diffusers folder.
    TextEncoder,
}

/// The name `LAYER.weight` or `LAYER.bias` of a checkpoint's key, the layer spelled as
/// adapter files do; `None` for tensors that no adapter touches.
pub(crate) fn place(naming: Naming, key: &str) -> Option<String> {
    let (path, part) = key.rsplit_once('.')?;
    if !matches!(part, "weight" | "bias") {
        return None;
    }
    let text = |path: &str| {
        let path = path.strip_prefix("text_model.").unwrap_or(path);
        let known = ["embeddings.", "encoder.layers.", "final_layer_norm"];
        let known = known.iter().any(|start| path.starts_with(start));
        known.then(|| Component::TextEncoder.layer_name(&format!("text_model.{path}")))
    };
    let layer = match naming {
        Naming::Unet => Component::Unet.layer_name(path),
        Naming::TextEncoder => text(path)?,
        Naming::Ldm => match path.strip_prefix("model.diffusion_model.") {
            Some(path) => Component::Unet.layer_name(&layer_from_ldm(&path.replace('.', "_"))?),
            None => text(path.strip_prefix("cond_stage_model.transformer.")?)?,
        },
    };
    Some(format!("{layer}.{part}"))
}

/// The weight files of a diffusers folder that adapters can change.
pub(crate) fn folder_files(folder: &Path) -> Result<Vec<(PathBuf, Naming)>> {
    let mut files = Vec::new();
    for (part, naming) in [
        ("unet", Naming::Unet),
        ("text_encoder", Naming::TextEncoder),
    ] {
        let part = folder.join(part);
        if !part.is_dir() {
            continue;
        }
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&part).map_err(Error::io(&part))? {
            let path = entry.map_err(Error::io(&part))?.path();
            if path.extension().is_some_and(|e| e == "safetensors") {
                names.push(path);
            }
        }
        names.sort();
        // Variants (`model.fp16.safetensors`) hold the same tensors once more.
        let variant = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.matches('.').count() > 1
        };
        if names.iter().any(|path| !variant(path)) {
            names.retain(|path| !variant(path));
        }
        files.extend(names.into_iter().map(|path| (path, naming)));
    }
    if files.is_empty() {
        return Err(Error::Malformed {
            path: folder.to_path_buf(),
            reason: "a folder without unet/*.safetensors or text_encoder/*.safetensors: not a diffusers model".into(),
        });
    }
    Ok(files)
}

/// Weights and biases of a model, by the layer names of adapter files, read one at a
/// time.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::algebra::Weights;
/// let weight = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let weights = Weights::from_tensors([("lora_unet_fc.weight".to_string(), weight)].into());
/// assert_eq!(weights.layers().collect::<Vec<_>>(), ["lora_unet_fc"]);
/// assert!(weights.bias("lora_unet_fc")?.is_none());
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Weights {
    source: Source,
    layers: BTreeSet<String>,
}

#[derive(Debug)]
enum Source {
    Files {
        files: Vec<TensorFile>,
        places: BTreeMap<String, (usize, String)>,
    },
    Memory(BTreeMap<String, Tensor>),
}

impl Weights {
    /// Opens a single-file checkpoint (LDM names) or a diffusers folder, memory-mapped.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it is neither, or as [`TensorFile::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let list = if path.is_dir() {
            folder_files(path)?
        } else {
            vec![(path.to_path_buf(), Naming::Ldm)]
        };
        let (mut files, mut places) = (Vec::new(), BTreeMap::new());
        for (path, naming) in list {
            let file = TensorFile::open(&path)?;
            for key in file.names() {
                if let Some(name) = place(naming, &key) {
                    places.insert(name, (files.len(), key));
                }
            }
            files.push(file);
        }
        if places.is_empty() {
            return Err(Error::Malformed {
                path: path.to_path_buf(),
                reason: "no tensor named like model.diffusion_model.input_blocks...: not a Stable Diffusion 1.x checkpoint".into(),
            });
        }
        let layers = layer_names(places.keys());
        Ok(Self {
            source: Source::Files { files, places },
            layers,
        })
    }

    /// Weights at hand, named `LAYER.weight` and `LAYER.bias`.
    pub fn from_tensors(tensors: BTreeMap<String, Tensor>) -> Self {
        let layers = layer_names(tensors.keys());
        Self {
            source: Source::Memory(tensors),
            layers,
        }
    }

    /// The layer names, sorted.
    pub fn layers(&self) -> impl Iterator<Item = &str> {
        self.layers.iter().map(String::as_str)
    }

    /// A layer's weight, in the dtype of the file, on the CPU.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn weight(&self, layer: &str) -> Result<Option<Tensor>> {
        self.get(&format!("{layer}.weight"))
    }

    /// A layer's bias, if it has one.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn bias(&self, layer: &str) -> Result<Option<Tensor>> {
        self.get(&format!("{layer}.bias"))
    }

    fn get(&self, name: &str) -> Result<Option<Tensor>> {
        match &self.source {
            Source::Memory(tensors) => Ok(tensors.get(name).cloned()),
            Source::Files { files, places } => places
                .get(name)
                .and_then(|(file, key)| Some((files.get(*file)?, key)))
                .map(|(file, key)| file.tensor(key, &Device::Cpu))
                .transpose(),
        }
    }

    /// A layer's weight, or the error that the base has no such layer.
    pub(crate) fn require(&self, layer: &str) -> Result<Tensor> {
        self.weight(layer)?.ok_or_else(|| Error::UnmatchedLayers {
            layers: vec![layer.to_string()],
        })
    }
}

fn layer_names<'a>(names: impl Iterator<Item = &'a String>) -> BTreeSet<String> {
    names
        .filter_map(|name| Some(name.rsplit_once('.')?.0.to_string()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_lead_to_layers() {
        let cases = [
            (
                Naming::Ldm,
                "model.diffusion_model.output_blocks.2.1.conv.bias",
                Some("lora_unet_up_blocks_0_upsamplers_0_conv.bias"),
            ),
            (
                Naming::Ldm,
                "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight",
                Some("lora_te_text_model_encoder_layers_3_mlp_fc1.weight"),
            ),
            (
                Naming::Ldm,
                "cond_stage_model.transformer.encoder.layers.3.mlp.fc1.weight",
                Some("lora_te_text_model_encoder_layers_3_mlp_fc1.weight"),
            ),
            (Naming::Ldm, "first_stage_model.quant_conv.weight", None),
            (Naming::Ldm, "alphas_cumprod", None),
            (
                Naming::Unet,
                "mid_block.resnets.0.norm1.weight",
                Some("lora_unet_mid_block_resnets_0_norm1.weight"),
            ),
        ];
        for (naming, key, want) in cases {
            assert_eq!(place(naming, key).as_deref(), want, "{key}");
        }
    }
}
