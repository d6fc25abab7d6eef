//! DDIM (Song et al. 2020) and PLMS (Liu et al. 2022) in the web UI's indexing.

use candle_core::{Result, Tensor};

use super::descent::mix;
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

/// Latents on their way down a list of timesteps.
#[derive(Debug, Clone)]
struct Stairs {
    x: Tensor,
    timesteps: Vec<usize>,
    alphas_cumprod: Vec<f32>,
    done: usize,
}

impl Stairs {
    fn new(x: Tensor, timesteps: Vec<usize>, alphas_cumprod: &[f32]) -> Self {
        Self {
            x,
            timesteps,
            alphas_cumprod: alphas_cumprod.to_vec(),
            done: 0,
        }
    }

    /// This step's timestep and the next lower one.
    fn pair(&self) -> Option<(usize, usize)> {
        let index = self
            .timesteps
            .len()
            .checked_sub(1 + self.done)
            .filter(|i| *i >= 1)?;
        Some((*self.timesteps.get(index)?, *self.timesteps.get(index - 1)?))
    }

    fn acp(&self, timestep: usize) -> f64 {
        self.alphas_cumprod
            .get(timestep)
            .copied()
            .map_or(1.0, f64::from)
    }

    /// One step towards `previous`, leaving room for noise of size `spread`.
    fn moved(&self, eps: &Tensor, timestep: usize, previous: usize, spread: f64) -> Result<Tensor> {
        let (a, ap) = (self.acp(timestep), self.acp(previous));
        let x0 = ((&self.x - eps * (1.0 - a).sqrt())? / a.sqrt())?;
        mix(
            ap.sqrt(),
            &x0,
            (1.0 - ap - spread * spread).max(0.0).sqrt(),
            eps,
        )
    }

    fn arrive(&mut self, x: Tensor) {
        self.x = x;
        self.done += 1;
    }

    fn progress(&self) -> (usize, usize) {
        (self.done, self.timesteps.len().saturating_sub(1))
    }
}

/// DDIM: works on variance-preserving latents and noise predictions.
#[derive(Debug, Clone)]
pub struct Ddim {
    stairs: Stairs,
    eta: f64,
}

impl Ddim {
    /// Starts from standard normal `x`. `timesteps` ascend, see [`ddim_timesteps`];
    /// `eta` 0 is deterministic, 1 adds as much noise as DDPM.
    pub fn new(x: Tensor, timesteps: Vec<usize>, alphas_cumprod: &[f32], eta: f64) -> Self {
        Self {
            stairs: Stairs::new(x, timesteps, alphas_cumprod),
            eta,
        }
    }
}

impl Sampler for Ddim {
    fn query(&self) -> Option<Query> {
        let (timestep, _) = self.stairs.pair()?;
        Some(Query::Timestep {
            x: self.stairs.x.clone(),
            timestep: timestep as f64,
        })
    }

    fn advance(&mut self, eps: &Tensor, noise: &mut StepNoise<'_>) -> Result<()> {
        let Some((timestep, previous)) = self.stairs.pair() else {
            return Ok(());
        };
        let (a, ap) = (self.stairs.acp(timestep), self.stairs.acp(previous));
        let spread = self.eta * ((1.0 - ap) / (1.0 - a) * (1.0 - a / ap)).sqrt();
        let mut x = self.stairs.moved(eps, timestep, previous, spread)?;
        // Drawn even when unused, as the reference does: later draws stay in place.
        let fresh = noise(timestep as f64, previous as f64)?;
        if spread > 0.0 {
            x = (x + fresh * spread)?;
        }
        self.stairs.arrive(x);
        Ok(())
    }

    fn latents(&self) -> &Tensor {
        &self.stairs.x
    }

    fn progress(&self) -> (usize, usize) {
        self.stairs.progress()
    }
}

/// PLMS: DDIM steps along a noise prediction that is extrapolated from the last four.
#[derive(Debug, Clone)]
pub struct Plms {
    stairs: Stairs,
    /// The last predictions, newest first.
    old: Vec<Tensor>,
    /// Latents, timestep and first answer of the first step's second question.
    second: Option<(Tensor, usize, Tensor)>,
}

impl Plms {
    /// Starts from standard normal `x`. `timesteps` ascend, see [`ddim_timesteps`].
    pub fn new(x: Tensor, timesteps: Vec<usize>, alphas_cumprod: &[f32]) -> Self {
        Self {
            stairs: Stairs::new(x, timesteps, alphas_cumprod),
            old: Vec::new(),
            second: None,
        }
    }
}

impl Sampler for Plms {
    fn query(&self) -> Option<Query> {
        if let Some((x, timestep, _)) = &self.second {
            return Some(Query::Timestep {
                x: x.clone(),
                timestep: *timestep as f64,
            });
        }
        let (timestep, _) = self.stairs.pair()?;
        Some(Query::Timestep {
            x: self.stairs.x.clone(),
            timestep: timestep as f64,
        })
    }

    fn advance(&mut self, eps: &Tensor, _: &mut StepNoise<'_>) -> Result<()> {
        let Some((timestep, previous)) = self.stairs.pair() else {
            return Ok(());
        };
        let (newest, direction) = match (self.second.take(), self.old.as_slice()) {
            (Some((_, _, first)), _) => {
                let mean = mix(0.5, &first, 0.5, eps)?;
                (first, mean)
            }
            (None, []) => {
                let x = self.stairs.moved(eps, timestep, previous, 0.0)?;
                self.second = Some((x, previous, eps.clone()));
                return Ok(());
            }
            (None, [one]) => (eps.clone(), mix(1.5, eps, -0.5, one)?),
            (None, [one, two]) => {
                let recent = mix(23.0 / 12.0, eps, -16.0 / 12.0, one)?;
                (eps.clone(), (recent + two * (5.0 / 12.0))?)
            }
            (None, [one, two, three, ..]) => {
                let recent = mix(55.0 / 24.0, eps, -59.0 / 24.0, one)?;
                let older = mix(37.0 / 24.0, two, -9.0 / 24.0, three)?;
                (eps.clone(), (recent + older)?)
            }
        };
        self.old.insert(0, newest);
        self.old.truncate(3);
        let x = self.stairs.moved(&direction, timestep, previous, 0.0)?;
        self.stairs.arrive(x);
        Ok(())
    }

    fn latents(&self) -> &Tensor {
        &self.stairs.x
    }

    fn progress(&self) -> (usize, usize) {
        self.stairs.progress()
    }
}
