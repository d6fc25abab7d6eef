//! Reading a file in any supported layout.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::file::TensorFile;
use super::names::{Key, translate};
use super::peft::Scales;
use crate::family::Parts;
use crate::{AdapterSet, Error, Result};

/// Keys with this prefix are embeddings that come with an adapter (the web UI's bundles).
pub(crate) const BUNDLE: &str = "bundle_emb.";

/// One layer of a file.
#[derive(Default)]
struct FileLayer {
    path: Option<String>,
    parts: BTreeMap<String, Tensor>,
}

/// Reads a file in any supported format.
pub(crate) fn load(path: &Path, device: &Device) -> Result<AdapterSet> {
    load_by(path, &|file, name| file.tensor(name, device))
}

/// Reads a file's layers without the values of their factors: tensors of the same shapes
/// that take no memory. Single numbers (`alpha`) are read.
pub(crate) fn outline(path: &Path) -> Result<AdapterSet> {
    load_by(
        path,
        &|file, name| match (file.shape(name), file.dtype(name)) {
            (Some(shape), Some(dtype)) if shape.iter().product::<usize>() > 1 => {
                Ok(Tensor::zeros((), dtype, &Device::Cpu)?.broadcast_as(shape)?)
            }
            _ => file.tensor(name, &Device::Cpu),
        },
    )
}

fn load_by(path: &Path, read: &dyn Fn(&TensorFile, &str) -> Result<Tensor>) -> Result<AdapterSet> {
    let file = TensorFile::open(path)?;
    let names = file.names();
    recognise(path, &names)?;
    let metadata = file.metadata();
    let scales = Scales::find(path, &metadata, &names)?;
    let mut set = AdapterSet::default();
    let mut layers: BTreeMap<String, FileLayer> = BTreeMap::new();
    for name in names {
        let tensor = read(&file, &name)?;
        if name.starts_with(BUNDLE) {
            set.insert_bundled(name, tensor);
            continue;
        }
        let key = translate(&name).ok_or_else(|| Error::UnknownKeys {
            path: path.to_path_buf(),
            layer: "(none)".into(),
            keys: vec![name.clone()],
        })?;
        let tensor = oriented(&key, tensor)?;
        let layer = layers.entry(key.layer.clone()).or_default();
        layer.path = layer.path.take().or(key.path);
        if layer.parts.insert(key.part.clone(), tensor).is_some() {
            return Err(Error::Malformed {
                path: path.to_path_buf(),
                reason: format!("{name} is the second key for {} of {}", key.part, key.layer),
            });
        }
    }
    for (name, mut layer) in layers {
        if let Some(dotted) = &layer.path {
            scales.apply(&name, dotted, &mut layer.parts)?;
        }
        let parts = Parts {
            path,
            layer: &name,
            tensors: layer.parts,
        };
        let adapter = parts.read()?;
        set.insert(name, adapter);
    }
    set.set_metadata(metadata);
    Ok(set)
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

/// Refuses, by name, what is not an adapter for this architecture.
fn recognise(path: &Path, names: &[String]) -> Result<()> {
    let unsupported = |what: &str, key: &str| {
        Err(Error::Unsupported {
            path: path.to_path_buf(),
            what: what.into(),
            key: key.into(),
            advice: "use one made for Stable Diffusion 1.x",
        })
    };
    let find = |starts: &[&str]| {
        let mut names = names.iter();
        names.find(|n| starts.iter().any(|start| n.starts_with(start)))
    };
    if let Some(key) = find(&["lora_te2_", "text_encoder_2."]) {
        return unsupported("an SDXL adapter", key);
    }
    let others = [
        "lora_unet_double_blocks",
        "lora_unet_single_blocks",
        "lora_transformer_",
        "transformer.",
    ];
    if let Some(key) = find(&others) {
        return unsupported("an adapter for another architecture (Flux or SD3)", key);
    }
    if let Some(key) = find(&["oft_unet_", "oft_te_"]) {
        return Err(Error::Unsupported {
            path: path.to_path_buf(),
            what: "sd-scripts' own OFT".into(),
            key: key.clone(),
            advice: "train it as LyCORIS' diag-oft",
        });
    }
    if names.iter().any(|name| translate(name).is_some()) {
        return Ok(());
    }
    let found = match names.first() {
        None => "the file has no tensors".to_string(),
        Some(_) if find(&["model.diffusion_model."]).is_some() => "it is a whole checkpoint".into(),
        Some(first) => format!("its {} keys start with {first}", names.len()),
    };
    Err(Error::NoAdapter {
        path: path.to_path_buf(),
        found,
    })
}
