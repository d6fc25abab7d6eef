//! Methods that ask the denoiser twice per step: Heun, DPM2, DPM2 a, DPM++ 2S a.

use candle_core::{Result, Tensor};

use super::descent::{Churned, Descent, ancestral, mix, slope_step};
use super::{Churn, Query, Renewal, Sampler, StepNoise};

/// The second question of a step.
#[derive(Debug, Clone)]
struct Halfway {
    x: Tensor,
    sigma: f64,
    /// The answer to the first question.
    denoised: Tensor,
}

impl Halfway {
    fn query(&self) -> Query {
        Query::Sigma {
            x: self.x.clone(),
            sigma: self.sigma,
        }
    }
}

/// Heun's method: Euler's step, corrected by the slope at its end.
#[derive(Debug, Clone)]
pub struct Heun {
    path: Churned,
    halfway: Option<Halfway>,
}

impl Heun {
    /// Starts from `x`, noise times the first sigma. `sigmas` fall and end in 0.
    pub fn new(x: Tensor, sigmas: Vec<f64>, options: Churn) -> Self {
        Self {
            path: Churned::new(x, sigmas, options),
            halfway: None,
        }
    }
}

impl Sampler for Heun {
    fn prepare(&mut self, noise: &mut StepNoise<'_>) -> Result<()> {
        self.path.prepare(noise)
    }

    fn query(&self) -> Option<Query> {
        match &self.halfway {
            Some(halfway) => Some(halfway.query()),
            None => self.path.query(),
        }
    }

    fn advance(&mut self, denoised: &Tensor, _: &mut StepNoise<'_>) -> Result<()> {
        let Some((sigma, next)) = self.path.pair() else {
            return Ok(());
        };
        let x = &self.path.path.x;
        let x = match self.halfway.take() {
            None => {
                let predicted = slope_step(x, x, denoised, sigma, next - sigma)?;
                if next > 0.0 {
                    self.halfway = Some(Halfway {
                        x: predicted,
                        sigma: next,
                        denoised: denoised.clone(),
                    });
                    return Ok(());
                }
                predicted
            }
            Some(halfway) => {
                let by = (next - sigma) / 2.0;
                let x2 = slope_step(x, x, &halfway.denoised, sigma, by)?;
                slope_step(&x2, &halfway.x, denoised, next, by)?
            }
        };
        self.path.arrive(x);
        Ok(())
    }

    fn latents(&self) -> &Tensor {
        &self.path.path.x
    }

    fn progress(&self) -> (usize, usize) {
        self.path.path.progress()
    }
}

/// DPM-Solver-2 in Karras' form: the slope at the middle of the step in log sigma.
#[derive(Debug, Clone)]
pub struct Dpm2 {
    path: Churned,
    halfway: Option<Halfway>,
}

impl Dpm2 {
    /// Starts from `x`, noise times the first sigma. `sigmas` fall and end in 0.
    pub fn new(x: Tensor, sigmas: Vec<f64>, options: Churn) -> Self {
        Self {
            path: Churned::new(x, sigmas, options),
            halfway: None,
        }
    }
}

impl Sampler for Dpm2 {
    fn prepare(&mut self, noise: &mut StepNoise<'_>) -> Result<()> {
        self.path.prepare(noise)
    }

    fn query(&self) -> Option<Query> {
        match &self.halfway {
            Some(halfway) => Some(halfway.query()),
            None => self.path.query(),
        }
    }

    fn advance(&mut self, denoised: &Tensor, _: &mut StepNoise<'_>) -> Result<()> {
        let Some((sigma, next)) = self.path.pair() else {
            return Ok(());
        };
        let x = &self.path.path.x;
        let x = match self.halfway.take() {
            None if next > 0.0 => {
                let middle = (sigma * next).sqrt();
                self.halfway = Some(Halfway {
                    x: slope_step(x, x, denoised, sigma, middle - sigma)?,
                    sigma: middle,
                    denoised: denoised.clone(),
                });
                return Ok(());
            }
            None => slope_step(x, x, denoised, sigma, next - sigma)?,
            Some(h) => slope_step(x, &h.x, denoised, h.sigma, next - sigma)?,
        };
        self.path.arrive(x);
        Ok(())
    }

    fn latents(&self) -> &Tensor {
        &self.path.path.x
    }

    fn progress(&self) -> (usize, usize) {
        self.path.path.progress()
    }
}

/// Which rule [`Ancestral`] follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Dpm2,
    Dpmpp2s,
}

/// The common part of the ancestral methods of second order.
#[derive(Debug, Clone)]
struct Ancestral {
    path: Descent,
    options: Renewal,
    halfway: Option<Halfway>,
    rule: Rule,
}

impl Ancestral {
    fn new(x: Tensor, sigmas: Vec<f64>, options: Renewal, rule: Rule) -> Self {
        Self {
            path: Descent::new(x, sigmas),
            options,
            halfway: None,
            rule,
        }
    }

    fn query(&self) -> Option<Query> {
        match &self.halfway {
            Some(halfway) => Some(halfway.query()),
            None => self.path.query(),
        }
    }

    fn advance(&mut self, denoised: &Tensor, noise: &mut StepNoise<'_>) -> Result<()> {
        let Some((sigma, next)) = self.path.pair() else {
            return Ok(());
        };
        let (down, up) = ancestral(sigma, next, self.options.eta);
        let x = &self.path.x;
        let mut moved = match self.halfway.take() {
            None if down > 0.0 => {
                let middle = (sigma * down).sqrt();
                let halfway = match self.rule {
                    Rule::Dpm2 => slope_step(x, x, denoised, sigma, middle - sigma)?,
                    Rule::Dpmpp2s => exponential_step(x, denoised, sigma, middle)?,
                };
                self.halfway = Some(Halfway {
                    x: halfway,
                    sigma: middle,
                    denoised: denoised.clone(),
                });
                return Ok(());
            }
            None => slope_step(x, x, denoised, sigma, down - sigma)?,
            Some(h) => match self.rule {
                Rule::Dpm2 => slope_step(x, &h.x, denoised, h.sigma, down - sigma)?,
                Rule::Dpmpp2s => exponential_step(x, denoised, sigma, down)?,
            },
        };
        if next > 0.0 {
            moved = (moved + noise(sigma, next)? * (self.options.s_noise * up))?;
        }
        self.path.arrive(moved);
        Ok(())
    }
}

/// `(to / from) x - expm1(ln to - ln from) denoised`: exact when the denoised latents stay
/// as they are.
pub(super) fn exponential_step(
    x: &Tensor,
    denoised: &Tensor,
    from: f64,
    to: f64,
) -> Result<Tensor> {
    mix(to / from, x, -(to.ln() - from.ln()).exp_m1(), denoised)
}

/// DPM2 with noise renewed at every step ("DPM2 a").
#[derive(Debug, Clone)]
pub struct Dpm2Ancestral(Ancestral);

/// DPM-Solver++ of second order in single steps, with noise renewed ("DPM++ 2S a").
#[derive(Debug, Clone)]
pub struct Dpmpp2sAncestral(Ancestral);

impl Dpm2Ancestral {
    /// Starts from `x`, noise times the first sigma. `sigmas` fall and end in 0.
    pub fn new(x: Tensor, sigmas: Vec<f64>, options: Renewal) -> Self {
        Self(Ancestral::new(x, sigmas, options, Rule::Dpm2))
    }
}

impl Dpmpp2sAncestral {
    /// Starts from `x`, noise times the first sigma. `sigmas` fall and end in 0.
    pub fn new(x: Tensor, sigmas: Vec<f64>, options: Renewal) -> Self {
        Self(Ancestral::new(x, sigmas, options, Rule::Dpmpp2s))
    }
}

impl Sampler for Dpm2Ancestral {
    fn query(&self) -> Option<Query> {
        self.0.query()
    }

    fn advance(&mut self, denoised: &Tensor, noise: &mut StepNoise<'_>) -> Result<()> {
        self.0.advance(denoised, noise)
    }

    fn latents(&self) -> &Tensor {
        &self.0.path.x
    }

    fn progress(&self) -> (usize, usize) {
        self.0.path.progress()
    }
}

impl Sampler for Dpmpp2sAncestral {
    fn query(&self) -> Option<Query> {
        self.0.query()
    }

    fn advance(&mut self, denoised: &Tensor, noise: &mut StepNoise<'_>) -> Result<()> {
        self.0.advance(denoised, noise)
    }

    fn latents(&self) -> &Tensor {
        &self.0.path.x
    }

    fn progress(&self) -> (usize, usize) {
        self.0.path.progress()
    }
}
