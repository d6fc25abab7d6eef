//! Captions as what the UNet is shown.

use std::collections::HashMap;

use candle_core::{DType, Result, Tensor};
use lora_sd15::prompt::parse_attention;
use lora_sd15::tokenizer::{CHUNK, END, START, chunk_ids};
use lora_sd15::{TextEncoder, Tokenizer, weigh};

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

/// Encodes captions as sd-scripts does for training.
#[derive(Debug)]
pub struct Captions {
    tokenizer: Tokenizer,
    config: TextConfig,
    /// Encoded captions, kept while the text encoder does not change.
    cache: Option<HashMap<String, Tensor>>,
}

impl Captions {
    /// `cache` keeps what was encoded; leave it off while the text encoder is trained.
    pub fn new(config: TextConfig, cache: bool) -> Self {
        Self {
            tokenizer: Tokenizer::new(),
            config,
            cache: cache.then(HashMap::new),
        }
    }

    /// Context for a batch of captions: `[n, 75 * chunks + 2, width]`.
    ///
    /// # Errors
    /// When the encoder fails.
    pub fn encode(&mut self, captions: &[String], encoder: &TextEncoder) -> Result<Tensor> {
        let mut contexts = Vec::with_capacity(captions.len());
        for caption in captions {
            let known = self.cache.as_ref().and_then(|c| c.get(caption)).cloned();
            let context = match known {
                Some(context) => context,
                None => {
                    let context = self.encode_one(caption, encoder)?;
                    if let Some(cache) = &mut self.cache {
                        cache.insert(caption.clone(), context.detach());
                    }
                    context
                }
            };
            contexts.push(context);
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
