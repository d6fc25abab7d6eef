//! From prompts to what the UNet is steered by.

use candle_core::{DType, Device, Tensor};

use super::job::{Emphasis, Txt2Img};
use crate::prompt::{
    Chunk, Embeddings, Piece, StepCount, Stretch, chunk_pieces, parse_attention, schedule_prompt,
    strip_comments,
};
use crate::text_encoder::{weigh, weigh_restoring_mean};
use crate::{Error, Result, TextEncoder, Tokenizer};

/// A prompt over the steps.
#[derive(Debug, Clone)]
pub(super) struct Contexts(Vec<(usize, Tensor)>);

impl Contexts {
    /// What to show the UNet at a call of the denoiser, counted from 0.
    pub(super) fn at(&self, call: usize) -> Option<&Tensor> {
        let found = self.0.iter().find(|(until, _)| call <= *until);
        found.or(self.0.last()).map(|(_, context)| context)
    }

    /// How many rows the UNet attends to; the same at all steps.
    fn rows(&self) -> usize {
        self.0.first().map_or(0, |(_, t)| t.dim(1).unwrap_or(0))
    }

    /// Appends copies of what `filling` answers up to `rows` rows.
    fn lengthen(
        &mut self,
        rows: usize,
        filling: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<()> {
        for (_, context) in &mut self.0 {
            let missing = rows.saturating_sub(context.dim(1)?);
            if missing > 0 {
                let filling = filling(context)?;
                let more = filling.repeat((1, missing / filling.dim(1)?.max(1), 1))?;
                *context = Tensor::cat(&[&*context, &more], 1)?;
            }
        }
        Ok(())
    }
}

/// All prompts of a pass.
#[derive(Debug, Clone)]
pub(super) struct Steering {
    /// Weight and prompt of each part joined by `AND`.
    pub(super) parts: Vec<(f64, Contexts)>,
    /// What to steer away from.
    pub(super) negative: Option<Contexts>,
}

/// What encoding a prompt takes.
pub(super) struct Encoding<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) encoder: &'a TextEncoder,
    pub(super) embeddings: &'a Embeddings,
    pub(super) device: &'a Device,
    pub(super) dtype: DType,
}

impl Encoding<'_> {
    /// Everything that steers a pass of `steps` steps; `before` are the steps of the pass
    /// before it.
    pub(super) fn steering(
        &self,
        job: &Txt2Img,
        prompt: &str,
        steps: usize,
        before: Option<usize>,
    ) -> Result<Steering> {
        let count = StepCount {
            steps: job.counted(steps),
            before: before.map(|b| job.counted(b)),
        };
        let parts = job.parts(prompt);
        let single = matches!(parts.as_slice(), [part] if part.weight == 1.0);
        let mut negative = if job.guidance_scale == 1.0 && single {
            None
        } else {
            let text = strip_comments(&job.negative);
            Some(self.contexts(job, &schedule_prompt(&text, count))?)
        };
        let mut encoded = Vec::new();
        for part in parts {
            let contexts = self.contexts(job, &schedule_prompt(&part.text, count))?;
            encoded.push((part.weight, contexts));
        }
        // Parts are drawn together: the shorter ones repeat their last row.
        let longest = encoded.iter().map(|(_, c)| c.rows()).max().unwrap_or(0);
        for (_, contexts) in &mut encoded {
            contexts.lengthen(longest, |context| {
                context.narrow(1, context.dim(1)?.saturating_sub(1), 1)
            })?;
        }
        if let Some(negative) = negative.as_mut().filter(|_| job.pad) {
            let empty = self.encode(&[""], job.clip_skip, job.emphasis, job.comma_backtrack)?;
            let empty = empty.to_dtype(self.dtype)?;
            let longest = longest.max(negative.rows());
            negative.lengthen(longest, |_| Ok(empty.clone()))?;
            for (_, contexts) in &mut encoded {
                contexts.lengthen(longest, |_| Ok(empty.clone()))?;
            }
        }
        Ok(Steering {
            parts: encoded,
            negative,
        })
    }

    /// The texts of one prompt, encoded together.
    fn contexts(&self, job: &Txt2Img, stretches: &[Stretch]) -> Result<Contexts> {
        let texts: Vec<&str> = stretches.iter().map(|s| s.text.as_str()).collect();
        let states = self.encode(&texts, job.clip_skip, job.emphasis, job.comma_backtrack)?;
        let mut contexts = Vec::new();
        for (i, stretch) in stretches.iter().enumerate() {
            let context = states.narrow(0, i, 1)?.contiguous()?.to_dtype(self.dtype)?;
            contexts.push((stretch.until, context));
        }
        Ok(Contexts(contexts))
    }

    /// `[texts, 77 * chunks, width]`: shorter texts get empty chunks.
    pub(super) fn encode(
        &self,
        texts: &[&str],
        clip_skip: usize,
        emphasis: Emphasis,
        backtrack: usize,
    ) -> Result<Tensor> {
        let mut chunked: Vec<Vec<Chunk>> = texts
            .iter()
            .map(|text| {
                let pieces = match emphasis {
                    Emphasis::None => vec![Piece {
                        text: (*text).to_string(),
                        weight: 1.0,
                    }],
                    _ => parse_attention(text),
                };
                chunk_pieces(self.tokenizer, &pieces, backtrack, self.embeddings)
            })
            .collect();
        let most = chunked.iter().map(Vec::len).max().unwrap_or(1);
        chunked
            .iter_mut()
            .for_each(|c| c.resize(most, Chunk::empty()));
        let mut states = Vec::new();
        for i in 0..most {
            let row: Vec<&Chunk> = chunked.iter().filter_map(|c| c.get(i)).collect();
            states.push(self.encode_chunks(&row, clip_skip, emphasis)?);
        }
        Ok(Tensor::cat(&states, 1)?)
    }

    fn encode_chunks(
        &self,
        chunks: &[&Chunk],
        clip_skip: usize,
        emphasis: Emphasis,
    ) -> Result<Tensor> {
        let config = self.encoder.config();
        let layers = config.num_hidden_layers;
        if !(1..=layers).contains(&clip_skip) {
            return super::job::bad(
                "clip_skip",
                clip_skip,
                "expected 1 to the number of the text encoder's layers",
            );
        }
        let (mut ids, mut weights, mut learned) = (Vec::new(), Vec::new(), Vec::new());
        for (row, chunk) in chunks.iter().enumerate() {
            ids.extend(chunk.tokens.iter().map(|id| config.fold(*id)));
            weights.extend_from_slice(&chunk.weights);
            for (slot, name) in &chunk.embeddings {
                let Some(vectors) = self.embeddings.vectors(name) else {
                    continue;
                };
                let width = vectors.dim(1)?;
                if width != config.hidden_size {
                    let what = format!(
                        "its vectors have {width} numbers, this model's {}: it was made for another model",
                        config.hidden_size
                    );
                    let name = name.clone();
                    return Err(Error::Embedding { name, what });
                }
                learned.push((row, *slot, vectors.clone()));
            }
        }
        let shape = (chunks.len(), ids.len() / chunks.len().max(1));
        let ids = Tensor::from_vec(ids, shape, self.device)?;
        let encoded = self.encoder.forward_with(&ids, &learned, clip_skip)?;
        if weights.iter().all(|w| *w == 1.0) {
            return Ok(encoded);
        }
        let weights = Tensor::from_vec(weights, shape, self.device)?;
        Ok(match emphasis {
            Emphasis::Original => weigh_restoring_mean(&encoded, &weights)?,
            Emphasis::NoNorm => weigh(&encoded, &weights)?,
            Emphasis::Ignore | Emphasis::None => encoded,
        })
    }
}
