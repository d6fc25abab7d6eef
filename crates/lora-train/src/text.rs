//! Captions as what the UNet is shown.

use std::collections::HashMap;

use candle_core::{DType, Result, Tensor};
use lora_sd15::prompt::parse_attention;
use lora_sd15::tokenizer::{CHUNK, END, START, chunk_ids};
use lora_sd15::{TextEncoder, Tokenizer, weigh};

/// Captions kept: a quarter of a megabyte each for 75 tokens.
const MOST_KEPT: usize = 256;

/// How captions are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextConfig {
    /// 1, 2 or 3 chunks: `max_token_length` 75, 150 or 225.
    pub chunks: usize,
    /// 1 is the last layer, 2 the one before.
    pub clip_skip: usize,
    /// Whether `(word:1.2)` sets weights.
    pub weighted: bool,
}

impl Default for TextConfig {
    /// 75 tokens, the last layer, no weights.
    fn default() -> Self {
        Self {
            chunks: 1,
            clip_skip: 1,
            weighted: false,
        }
    }
}

/// Encodes captions as sd-scripts does for training.
#[derive(Debug)]
pub struct Captions {
    tokenizer: Tokenizer,
    config: TextConfig,
    /// Encoded captions, kept while the text encoder does not change.
    cache: HashMap<String, Tensor>,
}

impl Captions {
    /// Nothing is encoded yet.
    pub fn new(config: TextConfig) -> Self {
        Self {
            tokenizer: Tokenizer::new(),
            config,
            cache: HashMap::new(),
        }
    }

    /// Context for a batch of captions: `[n, 75 * chunks + 2, width]`. With `fixed`, the
    /// text encoder is the same as at the last call with `fixed`: what was encoded is kept.
    ///
    /// # Errors
    /// When the encoder fails.
    pub fn encode(
        &mut self,
        captions: &[String],
        encoder: &TextEncoder,
        fixed: bool,
    ) -> Result<Tensor> {
        if !fixed {
            self.cache.clear();
        }
        let mut contexts = Vec::with_capacity(captions.len());
        for caption in captions {
            let context = match self.cache.get(caption) {
                Some(context) => context.clone(),
                None => self.encode_one(caption, encoder)?,
            };
            if fixed {
                // Detached: adapters on a text encoder that is not trained take no gradient.
                let kept = context.detach();
                if self.cache.len() >= MOST_KEPT {
                    // Shuffled captions hardly ever come again.
                    self.cache.clear();
                }
                self.cache.insert(caption.clone(), kept.clone());
                contexts.push(kept);
            } else {
                contexts.push(context);
            }
        }
        Tensor::cat(&contexts, 0)
    }

    fn encode_one(&self, caption: &str, encoder: &TextEncoder) -> Result<Tensor> {
        let device = encoder.device().clone();
        let (ids, weights) = self.tokens(caption);
        let fold = |id: &u32| encoder.config().fold(*id);
        let chunks = chunk_ids(&ids, self.config.chunks, START, END);
        let flat: Vec<u32> = chunks.iter().flatten().map(fold).collect();
        let ids = Tensor::from_vec(flat, (chunks.len(), CHUNK + 2), &device)?;
        let states = join_chunks(&encoder.forward(&ids, self.config.clip_skip)?)?;
        match weights {
            None => Ok(states),
            Some(weights) => weigh(&states, &Tensor::new(weights, &device)?.unsqueeze(0)?),
        }
    }

    /// Token ids, and a weight per position of the joined chunks if any differs from 1.
    fn tokens(&self, caption: &str) -> (Vec<u32>, Option<Vec<f32>>) {
        if !self.config.weighted {
            return (self.tokenizer.encode(caption), None);
        }
        let (mut ids, mut weights) = (Vec::new(), vec![1.0]);
        for piece in parse_attention(caption) {
            let piece_ids = self.tokenizer.encode(&piece.text);
            weights.extend(piece_ids.iter().map(|_| piece.weight as f32));
            ids.extend(piece_ids);
        }
        let length = CHUNK * self.config.chunks;
        ids.truncate(length);
        weights.truncate(length + 1);
        weights.resize(length + 2, 1.0);
        let uniform = weights.iter().all(|w| *w == 1.0);
        (ids, (!uniform).then_some(weights))
    }
}

/// States of several chunks `[chunks, 77, width]` as one context
/// `[1, 75 * chunks + 2, width]`: the first start, all inner positions, the last end.
///
/// # Errors
/// When there is no chunk.
pub fn join_chunks(states: &Tensor) -> Result<Tensor> {
    let (chunks, length, _) = states.dims3()?;
    let mut parts = vec![states.narrow(0, 0, 1)?.narrow(1, 0, 1)?];
    for i in 0..chunks {
        parts.push(states.narrow(0, i, 1)?.narrow(1, 1, length - 2)?);
    }
    parts.push(states.narrow(0, chunks - 1, 1)?.narrow(1, length - 1, 1)?);
    Tensor::cat(&parts, 1)?.to_dtype(DType::F32)
}
