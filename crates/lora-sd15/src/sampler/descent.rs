//! What all samplers over sigmas share: latents, the list of levels, the position.

use candle_core::{Result, Tensor};

use super::{Query, StepNoise};

/// Latents on their way down a list of noise levels.
#[derive(Debug, Clone)]
pub(super) struct Descent {
    pub(super) x: Tensor,
    sigmas: Vec<f64>,
    step: usize,
}

impl Descent {
    pub(super) fn new(x: Tensor, sigmas: Vec<f64>) -> Self {
        Self { x, sigmas, step: 0 }
    }

    /// This level and the next one; `None` at the end.
    pub(super) fn pair(&self) -> Option<(f64, f64)> {
        match self.sigmas.get(self.step..self.step + 2)? {
            &[sigma, next] => Some((sigma, next)),
            _ => None,
        }
    }

    /// The level `back` steps ago.
    pub(super) fn earlier(&self, back: usize) -> Option<f64> {
        self.sigmas.get(self.step.checked_sub(back)?).copied()
    }

    pub(super) fn query(&self) -> Option<Query> {
        let (sigma, _) = self.pair()?;
        Some(Query::Sigma {
            x: self.x.clone(),
            sigma,
        })
    }

    /// Ends a step with these latents.
    pub(super) fn arrive(&mut self, x: Tensor) {
        self.x = x;
        self.step += 1;
    }

    pub(super) fn progress(&self) -> (usize, usize) {
        (self.step, self.sigmas.len().saturating_sub(1))
    }
}

/// Noise raised before a step (Karras et al. 2022, algorithm 2), off by default.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Churn {
    /// Total amount of noise raised over all steps.
    pub s_churn: f64,
    /// Lowest sigma at which it happens.
    pub s_tmin: f64,
    /// Highest sigma at which it happens.
    pub s_tmax: f64,
    /// Standard deviation of the added noise.
    pub s_noise: f64,
}

impl Default for Churn {
    fn default() -> Self {
        Self {
            s_churn: 0.0,
            s_tmin: 0.0,
            s_tmax: f64::INFINITY,
            s_noise: 1.0,
        }
    }
}

/// A descent whose latents are raised before each step.
#[derive(Debug, Clone)]
pub(super) struct Churned {
    pub(super) path: Descent,
    options: Churn,
    /// The level reached by raising, once noise was drawn for this step.
    raised: Option<f64>,
}

impl Churned {
    pub(super) fn new(x: Tensor, sigmas: Vec<f64>, options: Churn) -> Self {
        Self {
            path: Descent::new(x, sigmas),
            options,
            raised: None,
        }
    }

    pub(super) fn prepare(&mut self, noise: &mut StepNoise<'_>) -> Result<()> {
        let Some((sigma, next)) = self.path.pair() else {
            return Ok(());
        };
        if self.options.s_churn == 0.0 || self.raised.is_some() {
            return Ok(());
        }
        let steps = self.path.progress().1 as f64;
        let active = (self.options.s_tmin..=self.options.s_tmax).contains(&sigma);
        let most = std::f64::consts::SQRT_2 - 1.0;
        let gamma = if active {
            (self.options.s_churn / steps).min(most)
        } else {
            0.0
        };
        let raised = sigma * (1.0 + gamma);
        // Drawn even when unused, as the reference does.
        let eps = noise(sigma, next)?;
        if gamma > 0.0 {
            let spread = self.options.s_noise * (raised.powi(2) - sigma.powi(2)).sqrt();
            self.path.x = (&self.path.x + (eps * spread)?)?;
        }
        self.raised = Some(raised);
        Ok(())
    }

    /// The level of the latents now, and the next one.
    pub(super) fn pair(&self) -> Option<(f64, f64)> {
        let (sigma, next) = self.path.pair()?;
        Some((self.raised.unwrap_or(sigma), next))
    }

    pub(super) fn query(&self) -> Option<Query> {
        let (sigma, _) = self.pair()?;
        Some(Query::Sigma {
            x: self.path.x.clone(),
            sigma,
        })
    }

    pub(super) fn arrive(&mut self, x: Tensor) {
        self.raised = None;
        self.path.arrive(x);
    }
}

/// Share of noise renewed at each step, and its size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Renewal {
    /// 1 renews all that the next level allows, 0 none.
    pub eta: f64,
    /// Standard deviation of the added noise.
    pub s_noise: f64,
}

impl Default for Renewal {
    fn default() -> Self {
        Self {
            eta: 1.0,
            s_noise: 1.0,
        }
    }
}

/// `(down, up)`: where an ancestral step goes, and how much noise is added there.
pub(super) fn ancestral(sigma: f64, next: f64, eta: f64) -> (f64, f64) {
    if eta == 0.0 {
        return (next, 0.0);
    }
    let up = next.min(eta * (next.powi(2) * (sigma.powi(2) - next.powi(2)) / sigma.powi(2)).sqrt());
    ((next.powi(2) - up.powi(2)).max(0.0).sqrt(), up)
}

/// `x` moved along the slope `(from_x - denoised) / sigma` by `by`.
pub(super) fn slope_step(
    x: &Tensor,
    slope_at: &Tensor,
    denoised: &Tensor,
    sigma: f64,
    by: f64,
) -> Result<Tensor> {
    let slope = ((slope_at - denoised)? / sigma)?;
    x + slope * by
}

/// `a * x + b * y`.
pub(super) fn mix(a: f64, x: &Tensor, b: f64, y: &Tensor) -> Result<Tensor> {
    (x * a)? + (y * b)?
}
