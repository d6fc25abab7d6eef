//! The denoiser that samplers ask: UNet, guidance, masks.

use candle_core::{DType, Tensor};

use super::conditioning::Steering;
use crate::sampler::{Denoiser, Query};
use crate::{Result, UNet};

/// What is kept while the rest is painted anew.
#[derive(Debug, Clone)]
pub(super) struct LatentMask {
    /// Latents of the picture.
    pub(super) kept: Tensor,
    /// 1 where it is painted anew, `[1, 1, h, w]`.
    pub(super) repaint: Tensor,
}

impl LatentMask {
    /// `x` where it is painted anew, the picture elsewhere.
    pub(super) fn blend(&self, x: &Tensor) -> Result<Tensor> {
        let keep = self.repaint.affine(-1.0, 1.0)?;
        let new = x.broadcast_mul(&self.repaint)?;
        Ok((new + self.kept.broadcast_mul(&keep)?)?)
    }
}

/// Classifier-free guidance around the UNet for one pass.
pub(super) struct Guidance<'a> {
    pub(super) unet: &'a UNet,
    pub(super) dtype: DType,
    pub(super) denoiser: Denoiser,
    pub(super) steering: &'a Steering,
    pub(super) scale: f64,
    pub(super) skip_negative_below: f64,
    pub(super) mask: Option<&'a LatentMask>,
    /// Mask and masked picture for inpainting models, `[n, 5, h, w]`.
    pub(super) extra: Option<&'a Tensor>,
    /// How often the denoiser was asked.
    pub(super) calls: usize,
}

impl Guidance<'_> {
    /// Answers a sampler's question.
    pub(super) fn answer(&mut self, query: &Query) -> Result<Tensor> {
        let answer = match query {
            Query::Sigma { x, sigma } => {
                let (input, timestep) = self.denoiser.input(x, *sigma)?;
                let answer = self.guided(&input, timestep, *sigma)?;
                let denoised = self.denoiser.denoised(x, *sigma, &answer)?;
                match self.mask {
                    Some(mask) => mask.blend(&denoised)?,
                    None => denoised,
                }
            }
            Query::Timestep { x, timestep } => {
                let x = match self.mask {
                    Some(mask) => mask.blend(x)?,
                    None => x.clone(),
                };
                let sigma = self.denoiser.sigma_of(*timestep);
                let answer = self.guided(&x, *timestep, sigma)?;
                self.denoiser.epsilon(&x, *timestep, &answer)?
            }
        };
        self.calls += 1;
        Ok(answer)
    }

    /// The network's answer to scaled latents, steered. Answers are linear in what they
    /// predict, so that steering them steers the denoised latents.
    fn guided(&self, x: &Tensor, timestep: f64, sigma: f64) -> Result<Tensor> {
        let negative = self
            .steering
            .negative
            .as_ref()
            .and_then(|n| n.at(self.calls));
        let skipped = self.calls % 2 == 1 && sigma < self.skip_negative_below;
        let mut contexts: Vec<&Tensor> = Vec::new();
        for (_, part) in &self.steering.parts {
            contexts.extend(part.at(self.calls));
        }
        let prompts = contexts.len();
        contexts.extend(negative.filter(|_| !skipped));
        let answers = self.run(x, timestep, &contexts)?;
        let base = match (answers.get(prompts), answers.first()) {
            (Some(negative), _) => negative,
            (None, Some(first)) => first,
            (None, None) => return super::job::bad("prompt", "", "expected at least one"),
        };
        let mut result = base.clone();
        for ((weight, _), answer) in self.steering.parts.iter().zip(&answers) {
            let scale = if self.steering.negative.is_some() {
                weight * self.scale
            } else {
                1.0
            };
            result = (result + ((answer - base)? * scale)?)?;
        }
        Ok(result)
    }

    /// One network call when all contexts have the same length, else one for each.
    fn run(&self, x: &Tensor, timestep: f64, contexts: &[&Tensor]) -> Result<Vec<Tensor>> {
        let n = x.dim(0)?;
        let input = match self.extra {
            Some(extra) => Tensor::cat(&[x, extra], 1)?,
            None => x.clone(),
        };
        let input = input.to_dtype(self.dtype)?;
        let call = |contexts: &[&Tensor]| -> Result<Vec<Tensor>> {
            let repeated: candle_core::Result<Vec<Tensor>> =
                contexts.iter().map(|c| c.repeat((n, 1, 1))).collect();
            let t = Tensor::full(timestep as f32, n, input.device())?;
            let out = self
                .unet
                .forward(&input, &t, &Tensor::cat(&repeated?, 0)?)?;
            let out = out.to_dtype(DType::F32)?;
            let parts: candle_core::Result<Vec<Tensor>> = (0..contexts.len())
                .map(|i| out.narrow(0, i * n, n)?.contiguous())
                .collect();
            Ok(parts?)
        };
        let same = contexts.windows(2).all(|w| match w {
            [a, b] => a.dims() == b.dims(),
            _ => true,
        });
        if same {
            return call(contexts);
        }
        let mut all = Vec::new();
        for context in contexts {
            all.extend(call(&[context])?);
        }
        Ok(all)
    }
}
