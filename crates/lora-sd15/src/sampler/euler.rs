//! Euler's method with and without added noise (Karras et al. 2022, algorithm 2).

use candle_core::{Result, Tensor};

use super::{Query, Sampler, StepNoise, ancestral};

/// Options of [`Euler`]: stochastic "churn" between steps, off by default.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EulerOptions {
    /// Total amount of noise raised over all steps.
    pub s_churn: f64,
    /// Lowest sigma at which it happens.
    pub s_tmin: f64,
    /// Highest sigma at which it happens.
    pub s_tmax: f64,
    /// Standard deviation of the added noise.
    pub s_noise: f64,
}

impl Default for EulerOptions {
    fn default() -> Self {
        Self {
            s_churn: 0.0,
            s_tmin: 0.0,
            s_tmax: f64::INFINITY,
            s_noise: 1.0,
        }
    }
}

/// Euler's method.
#[derive(Debug, Clone)]
pub struct Euler {
    x: Tensor,
    sigmas: Vec<f64>,
    step: usize,
    options: EulerOptions,
    /// Latents and sigma after churn, once noise was drawn for this step.
    raised: Option<(Tensor, f64)>,
}

impl Euler {
    /// Starts from `x`, noise times the first sigma. `sigmas` fall and end in 0.
    pub fn new(x: Tensor, sigmas: Vec<f64>, options: EulerOptions) -> Self {
        Self {
            x,
            sigmas,
            step: 0,
            options,
            raised: None,
        }
    }
}

impl Sampler for Euler {
    fn prepare(&mut self, noise: &mut StepNoise<'_>) -> Result<()> {
        let Some(&[sigma, next]) = self.sigmas.get(self.step..self.step + 2) else {
            return Ok(());
        };
        if self.options.s_churn == 0.0 || self.raised.is_some() {
            return Ok(());
        }
        let steps = (self.sigmas.len() - 1) as f64;
        let active = (self.options.s_tmin..=self.options.s_tmax).contains(&sigma);
        let most = std::f64::consts::SQRT_2 - 1.0;
        let gamma = if active {
            (self.options.s_churn / steps).min(most)
        } else {
            0.0
        };
        let raised = sigma * (1.0 + gamma);
        let eps = noise(sigma, next)?;
        let mut x = self.x.clone();
        if gamma > 0.0 {
            x = (x + (eps * (self.options.s_noise * (raised.powi(2) - sigma.powi(2)).sqrt()))?)?;
        }
        self.raised = Some((x, raised));
        Ok(())
    }

    fn query(&self) -> Option<Query> {
        let &[sigma, _] = self.sigmas.get(self.step..self.step + 2)? else {
            return None;
        };
        let (x, sigma) = self.raised.clone().unwrap_or((self.x.clone(), sigma));
        Some(Query::Sigma { x, sigma })
    }

    fn advance(&mut self, denoised: &Tensor, _: &mut StepNoise<'_>) -> Result<()> {
        let Some(&[sigma, next]) = self.sigmas.get(self.step..self.step + 2) else {
            return Ok(());
        };
        let (x, sigma) = self.raised.take().unwrap_or((self.x.clone(), sigma));
        let derivative = ((&x - denoised)? / sigma)?;
        self.x = (x + derivative * (next - sigma))?;
        self.step += 1;
        Ok(())
    }

    fn latents(&self) -> &Tensor {
        &self.x
    }

    fn progress(&self) -> (usize, usize) {
        (self.step, self.sigmas.len().saturating_sub(1))
    }
}

/// Options of [`EulerAncestral`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EulerAncestralOptions {
    /// Share of noise that is renewed: 1 is all, 0 makes it plain Euler.
    pub eta: f64,
    /// Standard deviation of the added noise.
    pub s_noise: f64,
}

impl Default for EulerAncestralOptions {
    fn default() -> Self {
        Self {
            eta: 1.0,
            s_noise: 1.0,
        }
    }
}

/// Euler steps that go below the next sigma and add fresh noise ("Euler a").
#[derive(Debug, Clone)]
pub struct EulerAncestral {
    x: Tensor,
    sigmas: Vec<f64>,
    step: usize,
    options: EulerAncestralOptions,
}

impl EulerAncestral {
    /// Starts from `x`, noise times the first sigma. `sigmas` fall and end in 0.
    pub fn new(x: Tensor, sigmas: Vec<f64>, options: EulerAncestralOptions) -> Self {
        Self {
            x,
            sigmas,
            step: 0,
            options,
        }
    }
}

impl Sampler for EulerAncestral {
    fn query(&self) -> Option<Query> {
        let &[sigma, _] = self.sigmas.get(self.step..self.step + 2)? else {
            return None;
        };
        Some(Query::Sigma {
            x: self.x.clone(),
            sigma,
        })
    }

    fn advance(&mut self, denoised: &Tensor, noise: &mut StepNoise<'_>) -> Result<()> {
        let Some(&[sigma, next]) = self.sigmas.get(self.step..self.step + 2) else {
            return Ok(());
        };
        let (down, up) = ancestral(sigma, next, self.options.eta);
        let derivative = ((&self.x - denoised)? / sigma)?;
        self.x = (&self.x + derivative * (down - sigma))?;
        if next > 0.0 {
            self.x = (&self.x + noise(sigma, next)? * (self.options.s_noise * up))?;
        }
        self.step += 1;
        Ok(())
    }

    fn latents(&self) -> &Tensor {
        &self.x
    }

    fn progress(&self) -> (usize, usize) {
        (self.step, self.sigmas.len().saturating_sub(1))
    }
}
