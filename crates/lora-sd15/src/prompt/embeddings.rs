//! Textual inversion: words whose vectors were learned.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use lora_core::AdapterSet;
use lora_core::format::TensorFile;

use crate::tokenizer::{CHUNK, Tokenizer};
use crate::{Error, Result};

/// Learned words by name.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use lora_sd15::{Tokenizer, prompt::Embeddings};
/// let mut words = Embeddings::default();
/// let vectors = Tensor::zeros((2, 768), DType::F32, &Device::Cpu)?;
/// words.insert(&Tokenizer::new(), "my-style", vectors)?;
/// assert_eq!(words.names().collect::<Vec<_>>(), ["my-style"]);
/// # Ok::<(), lora_sd15::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Embeddings {
    words: BTreeMap<String, Word>,
}

#[derive(Debug, Clone)]
struct Word {
    tokens: Vec<u32>,
    vectors: Tensor,
    hash: Option<String>,
}

/// A word found in a prompt.
pub(super) struct Found<'a> {
    pub(super) name: &'a str,
    /// How many tokens of the prompt it takes.
    pub(super) tokens: usize,
    /// How many slots it fills.
    pub(super) vectors: usize,
}

impl Embeddings {
    /// Adds a word: `vectors` is `[n, width]` or `[width]`.
    ///
    /// # Errors
    /// [`Error::Embedding`] for an empty name, another shape or more vectors than a chunk
    /// has tokens.
    pub fn insert(&mut self, tokenizer: &Tokenizer, name: &str, vectors: Tensor) -> Result<()> {
        let bad = |what: String| Error::Embedding {
            name: name.to_string(),
            what,
        };
        let vectors = match vectors.rank() {
            1 => vectors.unsqueeze(0)?,
            2 => vectors,
            _ => {
                return Err(bad(format!(
                    "expected [vectors, width], got {:?}",
                    vectors.dims()
                )));
            }
        };
        let count = vectors.dim(0)?;
        if !(1..=CHUNK).contains(&count) {
            return Err(bad(format!("has {count} vectors, expected 1 to {CHUNK}")));
        }
        let tokens = tokenizer.encode(name);
        if tokens.is_empty() {
            return Err(bad("the name has no letters".into()));
        }
        let word = Word {
            tokens,
            vectors: vectors.to_dtype(DType::F32)?,
            hash: None,
        };
        self.words.insert(name.to_string(), word);
        Ok(())
    }

    /// Reads an embedding file; its name is the file's stem, which is returned.
    ///
    /// # Errors
    /// [`Error::Embedding`] for `.pt` and `.bin` files, which are Python pickles, and for
    /// files without vectors; as [`TensorFile::open`].
    pub fn load(&mut self, tokenizer: &Tokenizer, path: &Path, device: &Device) -> Result<String> {
        let name = path
            .file_stem()
            .and_then(|s| s.to_str())
            .unwrap_or("")
            .to_string();
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        if ["pt", "bin", "ckpt", "pth"].contains(&extension.to_lowercase().as_str()) {
            let what = format!(
                "{} is a Python pickle, which can run code when read; convert it to .safetensors with the tensor emb_params",
                path.display()
            );
            return Err(Error::Embedding { name, what });
        }
        let file = TensorFile::open(path)?;
        let names = file.names();
        let key = ["emb_params", "clip_l", "*", "string_to_param.*"]
            .into_iter()
            .find(|key| names.iter().any(|n| n == key))
            .map(str::to_string)
            .or_else(|| names.first().filter(|_| names.len() == 1).cloned());
        let Some(key) = key else {
            let what = format!(
                "{}: expected one tensor or emb_params, found {}",
                path.display(),
                names.join(", ")
            );
            return Err(Error::Embedding { name, what });
        };
        self.insert(tokenizer, &name, file.tensor(&key, device)?)?;
        if let Some(word) = self.words.get_mut(&name) {
            let hash = lora_core::format::sha256_of_file(path)?;
            word.hash = Some(hash.chars().take(12).collect());
        }
        Ok(name)
    }

    /// Takes over the embeddings that came inside an adapter's file; returns their names.
    ///
    /// # Errors
    /// As [`insert`](Self::insert).
    pub fn add_bundled(&mut self, tokenizer: &Tokenizer, set: &AdapterSet) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for (key, vectors) in set.bundled_embeddings() {
            // NAME.string_to_param.*, NAME.emb_params or NAME.clip_l
            let name = key.split('.').next().unwrap_or(key);
            let part = key.get(name.len()..).unwrap_or("").trim_start_matches('.');
            if !matches!(
                part,
                "" | "string_to_param.*" | "*" | "emb_params" | "clip_l"
            ) {
                continue;
            }
            self.insert(tokenizer, name, vectors.clone())?;
            names.push(name.to_string());
        }
        Ok(names)
    }

    /// The words, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.words.keys().map(String::as_str)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// The vectors `[n, width]` of a word.
    pub fn vectors(&self, name: &str) -> Option<&Tensor> {
        self.words.get(name).map(|word| &word.vectors)
    }

    /// The first 12 hex digits of the hash of a word's file.
    pub fn hash(&self, name: &str) -> Option<&str> {
        self.words.get(name)?.hash.as_deref()
    }

    /// The longest word at the start of these tokens.
    pub(super) fn at(&self, tokens: &[u32]) -> Option<Found<'_>> {
        let fits = |word: &Word| tokens.starts_with(&word.tokens);
        let (name, word) = self
            .words
            .iter()
            .filter(|(_, word)| fits(word))
            .max_by_key(|(_, word)| word.tokens.len())?;
        Some(Found {
            name,
            tokens: word.tokens.len(),
            vectors: word.vectors.dim(0).unwrap_or(0),
        })
    }
}
