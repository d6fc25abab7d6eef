//! Sampling of latent consistency models (Luo et al. 2023).

use candle_core::{Result, Tensor};

use super::descent::Descent;
use super::{Query, Sampler, StepNoise};
use crate::NoiseSchedule;
use crate::schedule::TIMESTEPS;

/// How many of the timesteps a consistency model was distilled on.
const LEVELS: usize = 50;
const STRIDE: usize = TIMESTEPS / LEVELS;

/// Jumps to the denoised latents and adds fresh noise of the next level. The denoiser has
/// to be a consistency model's, see [`Denoiser::lcm`](super::Denoiser::lcm).
#[derive(Debug, Clone)]
pub struct Lcm(Descent);

impl Lcm {
    /// Starts from `x`, noise times the first sigma; levels are those of [`lcm_sigmas`].
    pub fn new(x: Tensor, sigmas: Vec<f64>) -> Self {
        Self(Descent::new(x, sigmas))
    }
}

impl Sampler for Lcm {
    fn query(&self) -> Option<Query> {
        self.0.query()
    }

    fn advance(&mut self, denoised: &Tensor, noise: &mut StepNoise<'_>) -> Result<()> {
        let Some((sigma, next)) = self.0.pair() else {
            return Ok(());
        };
        let mut x = denoised.clone();
        if next > 0.0 {
            x = (x + noise(sigma, next)? * next)?;
        }
        self.0.arrive(x);
        Ok(())
    }

    fn latents(&self) -> &Tensor {
        &self.0.x
    }

    fn progress(&self) -> (usize, usize) {
        self.0.progress()
    }
}

/// The levels of `n` LCM steps and a final 0: even in timesteps over the 50 that the model
/// knows.
pub fn lcm_sigmas(n: usize, schedule: &NoiseSchedule) -> Vec<f64> {
    let (first, last) = ((TIMESTEPS - 1) as f64, (STRIDE - 1) as f64);
    let step = if n > 1 {
        (first - last) / (n - 1) as f64
    } else {
        0.0
    };
    let level = |i: usize| {
        let place =
            ((first - step * i as f64 - last) / STRIDE as f64).clamp(0.0, (LEVELS - 1) as f64);
        let log = |index: usize| schedule.sigma(STRIDE * index + STRIDE - 1).ln();
        let weight = place - place.floor();
        ((1.0 - weight) * log(place.floor() as usize) + weight * log(place.ceil() as usize)).exp()
    };
    (0..n).map(level).chain([0.0]).collect()
}

/// The nearest timestep that a consistency model knows.
pub(super) fn lcm_timestep(sigma: f64, schedule: &NoiseSchedule) -> usize {
    let distance = |index: &usize| {
        let level = schedule.sigma(STRIDE * index + STRIDE - 1);
        (level.ln() - sigma.ln()).abs()
    };
    let nearest = (0..LEVELS).min_by(|a, b| distance(a).total_cmp(&distance(b)));
    nearest.unwrap_or(LEVELS - 1) * STRIDE + STRIDE - 1
}
