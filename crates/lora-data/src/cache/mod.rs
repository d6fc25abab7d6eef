//! Caches of what frozen models make of images and captions.
//!
//! An entry's key is a hash of everything it depends on: the content of the
//! picture (not its name or date), its bucket and crop, the options that change
//! its pixels, and the encoder. So an edited picture, another resolution or another
//! VAE is never served an old entry, and two runs may share one folder: equal keys
//! mean equal content, and files appear whole or not at all.

mod clean;
mod entry;
mod latents;
mod text;

pub use clean::{Leftover, leftovers, remove_leftovers};
pub use latents::{CachedLatents, LatentCache, LatentEncoder, Latents};
pub use text::{TextCache, TextEncoder, TextOutput};

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::{Error, Result};
use entry::Entry;

/// Error of an encoder behind a cache.
pub type EncoderError = Box<dyn std::error::Error + Send + Sync>;

/// Where a cache lives and how it is filled.
///
/// | name | default | meaning |
/// |---|---|---|
/// | `dir` | none | folder for cache files; none keeps entries in memory |
/// | `batch_size` | 1 | images or texts encoded at once (`vae_batch_size`) |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheConfig {
    /// Folder for cache files; none keeps entries in memory.
    pub dir: Option<PathBuf>,
    /// Images or texts encoded at once.
    pub batch_size: usize,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            dir: None,
            batch_size: 1,
        }
    }
}

/// The name of an entry: a hash of everything it depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key([u8; 32]);

impl Key {
    /// Hashes parts with their lengths, so that no two lists of parts run together.
    fn of(parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self(hash.finalize().into())
    }

    /// Hash of a file's content.
    fn of_file(path: &Path) -> Result<Self> {
        let mut file = fs::File::open(path).map_err(|e| Error::io(path, e))?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            match file.read(&mut buffer).map_err(|e| Error::io(path, e))? {
                0 => return Ok(Self(hash.finalize().into())),
                count => hash.update(&buffer[..count]),
            }
        }
    }

    fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn file_name(&self) -> String {
        format!("{}.safetensors", self.hex())
    }
}

/// Entries in memory or in a folder.
#[derive(Debug)]
enum Store {
    Memory(HashMap<Key, Arc<Entry>>),
    Folder(PathBuf),
}

impl Store {
    fn new(config: &CacheConfig) -> Result<Self> {
        let Some(dir) = &config.dir else {
            return Ok(Self::Memory(HashMap::new()));
        };
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        Ok(Self::Folder(dir.clone()))
    }

    /// The entry, if it is there. A damaged file counts as absent and is written again.
    fn get(&self, key: Key) -> Option<Arc<Entry>> {
        match self {
            Self::Memory(entries) => entries.get(&key).cloned(),
            Self::Folder(dir) => Entry::read(&dir.join(key.file_name())).map(Arc::new),
        }
    }

    fn put(&mut self, key: Key, entry: Entry) -> Result<Arc<Entry>> {
        let entry = Arc::new(entry);
        match self {
            Self::Memory(entries) => {
                entries.insert(key, entry.clone());
            }
            Self::Folder(dir) => entry.write(&dir.join(key.file_name()))?,
        }
        Ok(entry)
    }
}
