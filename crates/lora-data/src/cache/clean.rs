//! What changed and removed pictures leave behind in a cache folder.
//!
//! A cache never serves an old entry, so it grows with every edit. Each file names the
//! content it was made of; files of content that the dataset no longer has are of no use to it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::Key;
use super::entry::Header;
use crate::{Dataset, Error, Result};

/// A file of a cache folder that no picture of the dataset needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// The file.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Why it is of no use.
    pub reason: &'static str,
}

/// The files in a folder of cached latents that no picture of `dataset` needs, by name: of
/// pictures that were edited or removed, damaged ones, and what a killed process left. Entries
/// of other resolutions and other models are kept, and so are files that are not the cache's.
///
/// Give a dataset with all pictures that share the folder.
///
/// # Errors
/// [`Error::Io`] when the folder or a picture cannot be read.
pub fn leftovers(folder: &Path, dataset: &Dataset) -> Result<Vec<Leftover>> {
    let mut pictures = HashSet::new();
    for image in dataset.images() {
        pictures.insert(Key::of_file(&image.path)?.hex());
    }
    let io = |e| Error::io(folder, e);
    let mut list = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        let path = entry.path();
        if let Some(reason) = reason(&path, &pictures) {
            let bytes = entry.metadata().map_err(|e| Error::io(&path, e))?.len();
            list.push(Leftover {
                path,
                bytes,
                reason,
            });
        }
    }
    list.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(list)
}

/// Deletes what [`leftovers`] found. Runs that use the folder at the same time encode again
/// what they miss when they start anew.
///
/// # Errors
/// [`Error::Io`] naming the first file that cannot be deleted.
pub fn remove_leftovers(list: &[Leftover]) -> Result<()> {
    for leftover in list {
        std::fs::remove_file(&leftover.path).map_err(|e| Error::io(&leftover.path, e))?;
    }
    Ok(())
}

/// Why a file is of no use; `None` when it is, or is not a file of the cache.
fn reason(path: &Path, pictures: &HashSet<String>) -> Option<&'static str> {
    let name = path.file_name()?.to_str()?;
    let (hash, rest) = name.split_once('.')?;
    let is_hash = hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit());
    if !is_hash || !path.is_file() {
        return None;
    }
    if rest.starts_with("safetensors.") && rest.ends_with(".tmp") {
        return Some("half-written by a process that was ended");
    }
    if rest != "safetensors" {
        return None;
    }
    let Some(header) = Header::read(path) else {
        return Some("damaged");
    };
    match header.picture {
        Some(picture) if pictures.contains(&picture) => None,
        Some(_) => Some("of a picture that was changed or removed"),
        // Text-encoder outputs belong to no picture.
        None => (header.names.iter().any(|name| name == "mean"))
            .then_some("of a picture that it does not name"),
    }
}
