//! DPM-Solver++ of stochastic differential equations: SDE, 2M SDE, 3M SDE.
//!
//! Their noise should come from a Brownian motion, see [`BrownianTree`](crate::BrownianTree):
//! then the same picture appears with any number of steps.

use candle_core::{Result, Tensor};

use super::descent::{Descent, ancestral, mix, slope_step};
use super::second_order::exponential_step;
use super::{Query, Renewal, Sampler, StepNoise};

/// DPM++ SDE: two questions per step.
#[derive(Debug, Clone)]
pub struct DpmppSde {
    path: Descent,
    options: Renewal,
    /// Latents and level of the second question.
    halfway: Option<(Tensor, f64)>,
}

impl DpmppSde {
    /// Starts from `x`, noise times the first sigma. `sigmas` fall and end in 0.
    pub fn new(x: Tensor, sigmas: Vec<f64>, options: Renewal) -> Self {
        Self {
            path: Descent::new(x, sigmas),
            options,
            halfway: None,
        }
    }

    /// Towards `to` with noise renewed on the way.
    fn towards(
        &self,
        denoised: &Tensor,
        from: f64,
        to: f64,
        noise: &mut StepNoise<'_>,
    ) -> Result<Tensor> {
        let (down, up) = ancestral(from, to, self.options.eta);
        let x = exponential_step(&self.path.x, denoised, from, down)?;
        x + noise(from, to)? * (self.options.s_noise * up)
    }
}

impl Sampler for DpmppSde {
    fn query(&self) -> Option<Query> {
        match self.halfway.clone() {
            Some((x, sigma)) => Some(Query::Sigma { x, sigma }),
            None => self.path.query(),
        }
    }

    fn advance(&mut self, denoised: &Tensor, noise: &mut StepNoise<'_>) -> Result<()> {
        let Some((sigma, next)) = self.path.pair() else {
            return Ok(());
        };
        let x = if next == 0.0 {
            slope_step(&self.path.x, &self.path.x, denoised, sigma, next - sigma)?
        } else if self.halfway.take().is_none() {
            let middle = (sigma * next).sqrt();
            self.halfway = Some((self.towards(denoised, sigma, middle, noise)?, middle));
            return Ok(());
        } else {
            self.towards(denoised, sigma, next, noise)?
        };
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

/// How [`Dpmpp2mSde`] uses the previous answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SdeSolver {
    /// "DPM++ 2M SDE".
    #[default]
    Midpoint,
    /// "DPM++ 2M SDE Heun".
    Heun,
}

/// DPM++ 2M SDE: multistep of second order.
#[derive(Debug, Clone)]
pub struct Dpmpp2mSde {
    path: Descent,
    options: Renewal,
    solver: SdeSolver,
    /// The last answer and its step length.
    previous: Option<(Tensor, f64)>,
}

impl Dpmpp2mSde {
    /// Starts from `x`, noise times the first sigma. `sigmas` fall and end in 0.
    pub fn new(x: Tensor, sigmas: Vec<f64>, options: Renewal, solver: SdeSolver) -> Self {
        Self {
            path: Descent::new(x, sigmas),
            options,
            solver,
            previous: None,
        }
    }
}

impl Sampler for Dpmpp2mSde {
    fn query(&self) -> Option<Query> {
        self.path.query()
    }

    fn advance(&mut self, denoised: &Tensor, noise: &mut StepNoise<'_>) -> Result<()> {
        let Some((sigma, next)) = self.path.pair() else {
            return Ok(());
        };
        if next == 0.0 {
            self.path.arrive(denoised.clone());
            return Ok(());
        }
        let h = sigma.ln() - next.ln();
        let eta_h = self.options.eta * h;
        let decay = (-h - eta_h).exp_m1();
        let mut x = mix(
            next / sigma * (-eta_h).exp(),
            &self.path.x,
            -decay,
            denoised,
        )?;
        if let Some((previous, last_h)) = &self.previous {
            let r = last_h / h;
            let weight = match self.solver {
                SdeSolver::Midpoint => -0.5 * decay / r,
                SdeSolver::Heun => (decay / (h + eta_h) + 1.0) / r,
            };
            x = (x + (denoised - previous)? * weight)?;
        }
        if self.options.eta != 0.0 {
            let spread = next * (-(-2.0 * eta_h).exp_m1()).sqrt() * self.options.s_noise;
            x = (x + noise(sigma, next)? * spread)?;
        }
        self.previous = Some((denoised.clone(), h));
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

/// DPM++ 3M SDE: multistep of third order.
#[derive(Debug, Clone)]
pub struct Dpmpp3mSde {
    path: Descent,
    options: Renewal,
    /// The last two answers with their step lengths, newest first.
    previous: Vec<(Tensor, f64)>,
}

impl Dpmpp3mSde {
    /// Starts from `x`, noise times the first sigma. `sigmas` fall and end in 0.
    pub fn new(x: Tensor, sigmas: Vec<f64>, options: Renewal) -> Self {
        Self {
            path: Descent::new(x, sigmas),
            options,
            previous: Vec::new(),
        }
    }
}

impl Sampler for Dpmpp3mSde {
    fn query(&self) -> Option<Query> {
        self.path.query()
    }

    fn advance(&mut self, denoised: &Tensor, noise: &mut StepNoise<'_>) -> Result<()> {
        let Some((sigma, next)) = self.path.pair() else {
            return Ok(());
        };
        if next == 0.0 {
            self.path.arrive(denoised.clone());
            return Ok(());
        }
        let h = sigma.ln() - next.ln();
        let q = h * (1.0 + self.options.eta);
        let mut x = mix((-q).exp(), &self.path.x, -(-q).exp_m1(), denoised)?;
        let phi2 = (-q).exp_m1() / q + 1.0;
        match self.previous.as_slice() {
            [(one, h1), (two, h2), ..] => {
                let (r0, r1) = (h1 / h, h2 / h);
                let near = ((denoised - one)? / r0)?;
                let far = ((one - two)? / r1)?;
                let change = (&near - far)?;
                let first = mix(1.0, &near, r0 / (r0 + r1), &change)?;
                let second = (change / (r0 + r1))?;
                let phi3 = phi2 / q - 0.5;
                x = (x + mix(phi2, &first, -phi3, &second)?)?;
            }
            [(one, h1)] => x = (x + (denoised - one)? * (phi2 * h / h1))?,
            [] => {}
        }
        if self.options.eta != 0.0 {
            let spread = (-(-2.0 * h * self.options.eta).exp_m1()).sqrt();
            x = (x + noise(sigma, next)? * (next * spread * self.options.s_noise))?;
        }
        self.previous.insert(0, (denoised.clone(), h));
        self.previous.truncate(2);
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
