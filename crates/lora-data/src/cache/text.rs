//! Outputs of a frozen text encoder, by text.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::entry::Entry;
use super::{CacheConfig, EncoderError, Key, Store};
use crate::{CaptionTime, Dataset, Error, Result, Streams};

/// What a text encoder makes of one text.
#[derive(Debug, Clone, PartialEq)]
pub struct TextOutput {
    /// Shape, for example 77 x 768.
    pub shape: Vec<usize>,
    /// Values, row-major.
    pub data: Vec<f32>,
}

/// An encoder of captions.
pub trait TextEncoder {
    /// A text that changes whenever the encoder's results do: weights, clip skip, token length.
    fn key(&self) -> String;

    /// Encodes texts, in order.
    ///
    /// # Errors
    /// Whatever can go wrong; it is passed on.
    fn encode(&self, texts: &[&str]) -> std::result::Result<Vec<TextOutput>, EncoderError>;
}

/// Text-encoder outputs in memory or in a folder. It grows with every distinct text.
///
/// ```
/// use lora_data::{CacheConfig, EncoderError, TextCache, TextEncoder, TextOutput};
///
/// struct Length;
/// impl TextEncoder for Length {
///     fn key(&self) -> String {
///         "length".into()
///     }
///     fn encode(&self, texts: &[&str]) -> Result<Vec<TextOutput>, EncoderError> {
///         Ok(texts.iter().map(|t| TextOutput { shape: vec![1], data: vec![t.len() as f32] }).collect())
///     }
/// }
///
/// let mut cache = TextCache::new(&CacheConfig::default())?;
/// assert_eq!(cache.get_or_encode(&["a cat", "", "a cat"], &Length)?[2].data, [5.0]);
/// # Ok::<(), lora_data::Error>(())
/// ```
#[derive(Debug)]
pub struct TextCache {
    store: Store,
    batch_size: usize,
}

impl TextCache {
    /// An empty cache in memory, or the one in a folder.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be made.
    pub fn new(config: &CacheConfig) -> Result<Self> {
        Ok(Self {
            store: Store::new(config)?,
            batch_size: config.batch_size.max(1),
        })
    }

    /// Encodes all captions of a dataset, and the empty one.
    ///
    /// # Errors
    /// [`Error::Option`] when captions differ from draw to draw; as [`TextCache::get_or_encode`].
    pub fn fill(&mut self, dataset: &Dataset, encoder: &dyn TextEncoder) -> Result<()> {
        let subsets = dataset.config().datasets.iter().flat_map(|d| &d.subsets);
        if subsets
            .into_iter()
            .any(|subset| !subset.captions.is_static())
        {
            let what = "text-encoder outputs cannot be cached while captions are shuffled, dropped or chosen \
                        by chance; turn that or the cache off";
            return Err(Error::option("cache_text_encoder_outputs", what));
        }
        let items = dataset
            .each_once(|_| true)
            .into_iter()
            .flat_map(|batch| batch.items);
        // Nothing is drawn for such captions, so time and seed do not matter.
        let caption = |item| dataset.caption(&item, CaptionTime::default(), Streams::new(0));
        let texts: BTreeSet<String> = items.map(caption).chain([String::new()]).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        for texts in texts.chunks(self.batch_size) {
            self.get_or_encode(texts, encoder)?;
        }
        Ok(())
    }

    /// The outputs of texts, in order, encoding those that are not there.
    ///
    /// # Errors
    /// [`Error::Encoder`], also for values that are not finite; file errors.
    pub fn get_or_encode(
        &mut self,
        texts: &[&str],
        encoder: &dyn TextEncoder,
    ) -> Result<Vec<Arc<TextOutput>>> {
        let encoder_key = encoder.key();
        let key =
            |text: &str| Key::of(&[b"lora-data text 1", encoder_key.as_bytes(), text.as_bytes()]);
        let mut outputs: Vec<Option<Arc<TextOutput>>> =
            texts.iter().map(|text| self.get(key(text))).collect();
        let missing: BTreeSet<&str> = texts
            .iter()
            .zip(&outputs)
            .filter(|(_, output)| output.is_none())
            .map(|(text, _)| *text)
            .collect();
        let missing: Vec<&str> = missing.into_iter().collect();
        for part in missing.chunks(self.batch_size) {
            let what = || part.join(" | ");
            let encoded = encoder.encode(part).map_err(|source| Error::Encoder {
                what: what(),
                source,
            })?;
            let is_usable = |output: &TextOutput| {
                output.data.len() == output.shape.iter().product::<usize>()
                    && output.data.iter().all(|value| value.is_finite())
            };
            if encoded.len() != part.len() || !encoded.iter().all(is_usable) {
                let source = "the outputs are not finite or not of their shape".into();
                return Err(Error::Encoder {
                    what: what(),
                    source,
                });
            }
            for (text, output) in part.iter().zip(encoded) {
                let entry =
                    Entry::default().with("output", output.shape.clone(), output.data.clone());
                self.store.put(key(text), entry)?;
                let output = Arc::new(output);
                for (slot, _) in outputs
                    .iter_mut()
                    .zip(texts)
                    .filter(|(_, other)| *other == text)
                {
                    *slot = Some(output.clone());
                }
            }
        }
        Ok(outputs.into_iter().flatten().collect())
    }

    fn get(&self, key: Key) -> Option<Arc<TextOutput>> {
        let entry = self.store.get(key)?;
        let tensor = entry.tensors.get("output")?;
        Some(Arc::new(TextOutput {
            shape: tensor.shape.clone(),
            data: tensor.data.clone(),
        }))
    }
}
