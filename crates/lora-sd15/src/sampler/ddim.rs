//! DDIM (Song et al. 2020) in the web UI's indexing.

use candle_core::{Result, Tensor};

use super::{Query, Sampler, StepNoise};
use crate::schedule::TIMESTEPS;

/// The web UI's timesteps for a number of steps, ascending; the list may have one
/// entry more than asked for, and one step is taken per pair of neighbours.
///
/// ```
/// assert_eq!(lora_sd15::sampler::ddim_timesteps(4), [1, 251, 501, 751]);
/// ```
pub fn ddim_timesteps(steps: usize) -> Vec<usize> {
    let stride = (TIMESTEPS / steps.clamp(1, TIMESTEPS)).max(1);
    (0..TIMESTEPS)
        .step_by(stride)
        .map(|t| (t + 1).min(TIMESTEPS - 1))
        .collect()
}

/// DDIM: works on variance-preserving latents and noise predictions.
#[derive(Debug, Clone)]
pub struct Ddim {
    x: Tensor,
    timesteps: Vec<usize>,
    alphas_cumprod: Vec<f32>,
    eta: f64,
    done: usize,
}

impl Ddim {
    /// Starts from standard normal `x`. `timesteps` ascend, see [`ddim_timesteps`];
    /// `eta` 0 is deterministic, 1 adds as much noise as DDPM.
    pub fn new(x: Tensor, timesteps: Vec<usize>, alphas_cumprod: &[f32], eta: f64) -> Self {
        Self {
            x,
            timesteps,
            alphas_cumprod: alphas_cumprod.to_vec(),
            eta,
            done: 0,
        }
    }

    /// This step's timestep and the next lower one.
    fn pair(&self) -> Option<(usize, usize)> {
        let index = (self.timesteps.len() - 1)
            .checked_sub(self.done)
            .filter(|i| *i >= 1)?;
        Some((*self.timesteps.get(index)?, *self.timesteps.get(index - 1)?))
    }

    fn acp(&self, timestep: usize) -> f64 {
        self.alphas_cumprod
            .get(timestep)
            .copied()
            .map_or(1.0, f64::from)
    }
}

impl Sampler for Ddim {
    fn query(&self) -> Option<Query> {
        let (timestep, _) = self.pair()?;
        Some(Query::Timestep {
            x: self.x.clone(),
            timestep: timestep as f64,
        })
    }

    fn advance(&mut self, eps: &Tensor, noise: &mut StepNoise<'_>) -> Result<()> {
        let Some((timestep, previous)) = self.pair() else {
            return Ok(());
        };
        let (a, ap) = (self.acp(timestep), self.acp(previous));
        let s = self.eta * ((1.0 - ap) / (1.0 - a) * (1.0 - a / ap)).sqrt();
        let x0 = ((&self.x - eps * (1.0 - a).sqrt())? / a.sqrt())?;
        self.x = ((x0 * ap.sqrt())? + eps * (1.0 - ap - s * s).max(0.0).sqrt())?;
        // Drawn even when unused, as the reference does: later draws stay in place.
        let fresh = noise(timestep as f64, previous as f64)?;
        if s > 0.0 {
            self.x = (&self.x + fresh * s)?;
        }
        self.done += 1;
        Ok(())
    }

    fn latents(&self) -> &Tensor {
        &self.x
    }

    fn progress(&self) -> (usize, usize) {
        (self.done, self.timesteps.len().saturating_sub(1))
    }
}
