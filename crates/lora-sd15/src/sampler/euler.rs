//! Euler's method with and without added noise (Karras et al. 2022, algorithm 2).

use candle_core::{Result, Tensor};

use super::descent::{Churned, Descent, ancestral, slope_step};
use super::{Churn, Query, Renewal, Sampler, StepNoise};

/// Euler's method.
#[derive(Debug, Clone)]
pub struct Euler(Churned);

impl Euler {
    /// Starts from `x`, noise times the first sigma. `sigmas` fall and end in 0.
    pub fn new(x: Tensor, sigmas: Vec<f64>, options: Churn) -> Self {
        Self(Churned::new(x, sigmas, options))
    }
}

impl Sampler for Euler {
    fn prepare(&mut self, noise: &mut StepNoise<'_>) -> Result<()> {
        self.0.prepare(noise)
    }

    fn query(&self) -> Option<Query> {
        self.0.query()
    }

    fn advance(&mut self, denoised: &Tensor, _: &mut StepNoise<'_>) -> Result<()> {
        let Some((sigma, next)) = self.0.pair() else {
            return Ok(());
        };
        let x = &self.0.path.x;
        let x = slope_step(x, x, denoised, sigma, next - sigma)?;
        self.0.arrive(x);
        Ok(())
    }

    fn latents(&self) -> &Tensor {
        &self.0.path.x
    }

    fn progress(&self) -> (usize, usize) {
        self.0.path.progress()
    }
}

/// Euler steps that go below the next sigma and add fresh noise ("Euler a").
#[derive(Debug, Clone)]
pub struct EulerAncestral {
    path: Descent,
    options: Renewal,
}

impl EulerAncestral {
    /// Starts from `x`, noise times the first sigma. `sigmas` fall and end in 0.
    pub fn new(x: Tensor, sigmas: Vec<f64>, options: Renewal) -> Self {
        Self {
            path: Descent::new(x, sigmas),
            options,
        }
    }
}

impl Sampler for EulerAncestral {
    fn query(&self) -> Option<Query> {
        self.path.query()
    }

    fn advance(&mut self, denoised: &Tensor, noise: &mut StepNoise<'_>) -> Result<()> {
        let Some((sigma, next)) = self.path.pair() else {
            return Ok(());
        };
        let (down, up) = ancestral(sigma, next, self.options.eta);
        let mut x = slope_step(&self.path.x, &self.path.x, denoised, sigma, down - sigma)?;
        if next > 0.0 {
            x = (x + noise(sigma, next)? * (self.options.s_noise * up))?;
        }
        self.path.arrive(x);
        Ok(())
    }

    fn latents(&self) -> &Tensor {
        &self.path.x
    }

    fn progress(&self) -> (usize, usize) {
        self.path.progress()
    }
}
