//! One cache file: a few named f32 tensors as safetensors, written whole or not at all.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use crate::{Result, atomic};

/// Named tensors of f32 values.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Entry {
    pub(super) tensors: BTreeMap<String, Tensor>,
    /// Hash of the picture that it was made of, in hex.
    pub(super) picture: Option<String>,
}

/// What the header of a cache file says.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Header {
    pub(super) names: Vec<String>,
    pub(super) picture: Option<String>,
}

impl Header {
    /// None when the file is missing or damaged.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let bytes = std::fs::read(path).ok()?;
        let names = SafeTensors::deserialize(&bytes).ok()?;
        Some(Self {
            names: names.names().into_iter().map(ToString::to_string).collect(),
            picture: picture(&bytes),
        })
    }
}

/// The metadata entry of that name.
fn picture(bytes: &[u8]) -> Option<String> {
    let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
    header.metadata().as_ref()?.get(PICTURE).cloned()
}

/// Where a file says which picture it was made of.
const PICTURE: &str = "picture_sha256";

/// Shape and values, row-major.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tensor {
    pub(super) shape: Vec<usize>,
    pub(super) data: Vec<f32>,
}

impl Entry {
    pub(super) fn with(mut self, name: &str, shape: Vec<usize>, data: Vec<f32>) -> Self {
        self.tensors.insert(name.to_owned(), Tensor { shape, data });
        self
    }

    /// None when the file is missing or damaged.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let bytes = std::fs::read(path).ok()?;
        let file = SafeTensors::deserialize(&bytes).ok()?;
        let mut entry = Self {
            picture: picture(&bytes),
            ..Self::default()
        };
        for (name, view) in file.iter() {
            if view.dtype() != Dtype::F32 {
                return None;
            }
            let data = view
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&bytes| f32::from_le_bytes(bytes))
                .collect();
            entry = entry.with(name, view.shape().to_vec(), data);
        }
        Some(entry)
    }

    /// Safetensors layout: length, JSON header with sorted names, values.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        if let Some(picture) = &self.picture {
            header.insert("__metadata__".into(), json!({ PICTURE: picture }));
        }
        for (name, tensor) in &self.tensors {
            let start = data.len();
            data.extend(tensor.data.iter().flat_map(|value| value.to_le_bytes()));
            let offsets = [start, data.len()];
            let entry = json!({ "dtype": "F32", "shape": tensor.shape, "data_offsets": offsets });
            header.insert(name.clone(), entry);
        }
        let mut header = serde_json::Value::Object(header).to_string().into_bytes();
        // Values start at a multiple of 8 bytes.
        header.resize(header.len().next_multiple_of(8), b' ');
        let length = (header.len() as u64).to_le_bytes();
        atomic::write(path, &[&length, &header, &data])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_a_cut_file_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let mut entry = Entry::default()
            .with("mean", vec![1, 2, 2], vec![1.0, -2.5, 0.0, 3.0])
            .with("x", vec![0], vec![]);
        entry.picture = Some("12ab".into());
        entry.write(&path).unwrap();
        assert_eq!(Entry::read(&path), Some(entry));
        let bytes = std::fs::read(&path).unwrap();
        for length in [0, 7, 20, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..length]).unwrap();
            assert_eq!(Entry::read(&path), None);
        }
    }
}
