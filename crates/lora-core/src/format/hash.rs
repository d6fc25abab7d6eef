//! The hashes by which tools recognise adapters and checkpoints.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use candle_core::Tensor;
use sha2::{Digest, Sha256};

use super::file::{bytes, lay_out};
use crate::{Error, Result};

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// `sshs_model_hash`: SHA-256 of the tensor data without the header, so independent
/// of metadata.
///
/// # Errors
/// When a tensor cannot be read.
pub fn model_hash(tensors: &BTreeMap<String, Tensor>) -> Result<String> {
    let mut digest = Sha256::new();
    for name in lay_out(tensors, &BTreeMap::new())?.order {
        digest.update(bytes(&tensors[&name])?);
    }
    Ok(hex(&digest.finalize()))
}

/// First byte and length of the window that the old short hashes are computed over.
const LEGACY_WINDOW: (usize, usize) = (0x10_0000, 0x1_0000);

/// `sshs_legacy_hash`: 8 hex digits over 64 KiB at 1 MiB of a file whose metadata
/// holds only the `ss_*` keys.
///
/// # Errors
/// When a tensor cannot be read.
pub fn legacy_hash(
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<String> {
    let training: BTreeMap<_, _> = metadata
        .iter()
        .filter(|(k, _)| k.starts_with("ss_"))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    let layout = lay_out(tensors, &training)?;
    let (start, length) = LEGACY_WINDOW;
    let mut position = 0;
    let mut digest = Sha256::new();
    let mut feed = |part: &[u8]| {
        let from = start.saturating_sub(position).min(part.len());
        let to = (start + length).saturating_sub(position).min(part.len());
        digest.update(&part[from..to.max(from)]);
        position += part.len();
        position < start + length
    };
    let mut more = feed(&layout.header);
    for name in &layout.order {
        if !more {
            break;
        }
        more = feed(&bytes(&tensors[name])?);
    }
    Ok(hex(&digest.finalize())[..8].to_string())
}

/// The old short hash of any file (`ss_sd_model_hash`): 8 hex digits over 64 KiB at
/// 1 MiB.
///
/// # Errors
/// [`Error::Io`].
pub fn model_hash_of_file(path: &Path) -> Result<String> {
    let (start, length) = LEGACY_WINDOW;
    let mut file = File::open(path).map_err(Error::io(path))?;
    file.seek(SeekFrom::Start(start as u64))
        .map_err(Error::io(path))?;
    let mut window = Vec::new();
    file.take(length as u64)
        .read_to_end(&mut window)
        .map_err(Error::io(path))?;
    Ok(hex(&Sha256::digest(&window))[..8].to_string())
}

/// [`model_hash`] of a file on disk, which the web UI shows as "Lora hashes": the SHA-256
/// of everything behind the header.
///
/// # Errors
/// As [`TensorFile::open`](super::TensorFile::open).
pub fn data_hash_of_file(path: &Path) -> Result<String> {
    let file = super::TensorFile::open(path)?;
    Ok(hex(&Sha256::digest(file.data())))
}

/// SHA-256 of a whole file (`ss_new_sd_model_hash`); its first 10 digits are the
/// model hash that the web UI shows.
///
/// # Errors
/// [`Error::Io`].
pub fn sha256_of_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(Error::io(path))?;
        if n == 0 {
            return Ok(hex(&digest.finalize()));
        }
        digest.update(&buffer[..n]);
    }
}
