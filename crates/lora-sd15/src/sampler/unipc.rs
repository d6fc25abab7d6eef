//! UniPC (Zhao et al. 2023): predictor and corrector of the same order, data prediction.

use candle_core::{Result, Tensor};

use super::descent::mix;
use super::{Query, Sampler, StepNoise};
use crate::NoiseSchedule;
use crate::schedule::TIMESTEPS;

/// How the times of the steps are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UniPcTimes {
    /// Even in time.
    #[default]
    Uniform,
    /// Even in the square root of time.
    Quadratic,
    /// Even in the logarithm of the signal-to-noise ratio.
    LogSnr,
}

/// The function by which differences are weighed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UniPcVariant {
    /// `h`.
    #[default]
    Bh1,
    /// `exp(h) - 1`.
    Bh2,
}

/// Options of [`UniPc`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UniPcOptions {
    /// 1 to 3; at most the number of steps.
    pub order: usize,
    /// The weighing function.
    pub variant: UniPcVariant,
    /// The times of the steps.
    pub times: UniPcTimes,
    /// Lowers the order in the last steps, which keeps short runs stable.
    pub lower_order_final: bool,
    /// Where to start in (0, 1]: 1 is pure noise.
    pub start: f64,
}

impl Default for UniPcOptions {
    fn default() -> Self {
        Self {
            order: 3,
            variant: UniPcVariant::Bh1,
            times: UniPcTimes::Uniform,
            lower_order_final: true,
            start: 1.0,
        }
    }
}

/// UniPC on variance-preserving latents.
#[derive(Debug, Clone)]
pub struct UniPc {
    x: Tensor,
    clock: Clock,
    options: UniPcOptions,
    times: Vec<f64>,
    /// Denoised latents at the last times, newest first.
    known: Vec<(f64, Tensor)>,
    /// Latents of the next question and the plan of the step they belong to.
    trial: Option<Trial>,
    done: usize,
}

#[derive(Debug, Clone)]
struct Trial {
    x: Tensor,
    time: f64,
    plan: Plan,
}

/// What a step's predictor and corrector share.
#[derive(Debug, Clone)]
struct Plan {
    base: Tensor,
    differences: Vec<Tensor>,
    /// Weights of the corrector, the newest last.
    corrector: Vec<f64>,
    scale: f64,
}

impl UniPc {
    /// Starts from standard normal `x` (or noisy latents of [`UniPcOptions::start`]) and
    /// takes `steps` steps.
    pub fn new(x: Tensor, steps: usize, schedule: &NoiseSchedule, options: UniPcOptions) -> Self {
        let clock = Clock::new(schedule);
        let times = clock.times(steps.max(1), &options);
        let order = options.order.clamp(1, 3).min(steps.max(1));
        Self {
            x,
            clock,
            options: UniPcOptions { order, ..options },
            times,
            known: Vec::new(),
            trial: None,
            done: 0,
        }
    }

    /// The times of the steps, falling, in (0, 1].
    pub fn times(&self) -> &[f64] {
        &self.times
    }

    /// Denoised latents from a noise prediction at a time.
    fn data(&self, x: &Tensor, time: f64, eps: &Tensor) -> Result<Tensor> {
        let (alpha, sigma) = self.clock.alpha_sigma(time);
        mix(1.0 / alpha, x, -sigma / alpha, eps)
    }

    /// Goes on from `self.x` until the denoiser is needed again.
    fn next_step(&mut self) -> Result<()> {
        let steps = self.times.len().saturating_sub(1);
        let k = self.done + 1;
        let Some(&time) = self.times.get(k).filter(|_| k <= steps) else {
            return Ok(());
        };
        let order = self.options.order;
        let order = match k {
            k if k < order => k,
            _ if self.options.lower_order_final => order.min(steps + 1 - k),
            _ => order,
        };
        let (plan, predicted) = self.plan(time, order)?;
        if k == steps && k >= self.options.order {
            self.x = predicted;
            self.done = k;
        } else {
            self.trial = Some(Trial {
                x: predicted,
                time,
                plan,
            });
        }
        Ok(())
    }

    fn plan(&self, time: f64, order: usize) -> Result<(Plan, Tensor)> {
        let Some((time0, newest)) = self.known.first() else {
            candle_core::bail!("UniPC: a step before the first answer");
        };
        let clock = &self.clock;
        let (lambda0, lambda) = (clock.lambda(*time0), clock.lambda(time));
        let h = lambda - lambda0;
        let ((alpha, sigma), (_, sigma0)) = (clock.alpha_sigma(time), clock.alpha_sigma(*time0));
        let (mut ratios, mut differences) = (Vec::new(), Vec::new());
        for (earlier, data) in self.known.iter().skip(1).take(order.saturating_sub(1)) {
            let ratio = (clock.lambda(*earlier) - lambda0) / h;
            differences.push(((data - newest)? / ratio)?);
            ratios.push(ratio);
        }
        ratios.push(1.0);
        let order = ratios.len();
        let hh = -h;
        let weight = match self.options.variant {
            UniPcVariant::Bh1 => hh,
            UniPcVariant::Bh2 => hh.exp_m1(),
        };
        let (mut rows, mut right) = (Vec::new(), Vec::new());
        let mut phi = hh.exp_m1() / hh - 1.0;
        let mut factorial = 1.0;
        for k in 1..=order {
            rows.push(
                ratios
                    .iter()
                    .map(|r| r.powi(k as i32 - 1))
                    .collect::<Vec<f64>>(),
            );
            right.push(phi * factorial / weight);
            factorial *= (k + 1) as f64;
            phi = phi / hh - 1.0 / factorial;
        }
        let base = mix(sigma / sigma0, &self.x, -alpha * hh.exp_m1(), newest)?;
        let scale = alpha * weight;
        let predictor = match order {
            1 => Vec::new(),
            2 => vec![0.5],
            _ => solve(
                rows.iter()
                    .take(order - 1)
                    .map(|row| row.iter().take(order - 1).copied().collect())
                    .collect(),
                right.iter().take(order - 1).copied().collect(),
            ),
        };
        let mut predicted = base.clone();
        for (rho, difference) in predictor.iter().zip(&differences) {
            predicted = (predicted - difference * (scale * rho))?;
        }
        let corrector = if order == 1 {
            vec![0.5]
        } else {
            solve(rows, right)
        };
        let plan = Plan {
            base,
            differences,
            corrector,
            scale,
        };
        Ok((plan, predicted))
    }
}

impl Sampler for UniPc {
    fn query(&self) -> Option<Query> {
        let (x, time) = match &self.trial {
            Some(trial) => (trial.x.clone(), trial.time),
            None if self.known.is_empty() => (self.x.clone(), *self.times.first()?),
            None => return None,
        };
        let timestep = (time - 1.0 / TIMESTEPS as f64) * TIMESTEPS as f64;
        Some(Query::Timestep { x, timestep })
    }

    fn advance(&mut self, eps: &Tensor, _: &mut StepNoise<'_>) -> Result<()> {
        match self.trial.take() {
            None => {
                let Some(time) = self
                    .times
                    .first()
                    .copied()
                    .filter(|_| self.known.is_empty())
                else {
                    return Ok(());
                };
                let data = self.data(&self.x, time, eps)?;
                self.known.push((time, data));
            }
            Some(Trial { x, time, plan }) => {
                let data = self.data(&x, time, eps)?;
                let mut corrected = plan.base;
                for (rho, difference) in plan.corrector.iter().zip(&plan.differences) {
                    corrected = (corrected - difference * (plan.scale * rho))?;
                }
                if let (Some(rho), Some((_, newest))) = (plan.corrector.last(), self.known.first())
                {
                    corrected = (corrected - (&data - newest)? * (plan.scale * rho))?;
                }
                self.x = corrected;
                self.known.insert(0, (time, data));
                self.known.truncate(self.options.order);
                self.done += 1;
            }
        }
        self.next_step()
    }

    fn latents(&self) -> &Tensor {
        &self.x
    }

    fn progress(&self) -> (usize, usize) {
        (self.done, self.times.len().saturating_sub(1))
    }
}

/// Solves a small linear system by elimination with pivots; a singular one gives zeros.
fn solve(mut rows: Vec<Vec<f64>>, mut right: Vec<f64>) -> Vec<f64> {
    let n = right.len();
    let at = |rows: &[Vec<f64>], i: usize, j: usize| {
        rows.get(i)
            .and_then(|row| row.get(j))
            .copied()
            .unwrap_or(0.0)
    };
    for column in 0..n {
        let pivot = (column..n)
            .max_by(|a, b| {
                at(&rows, *a, column)
                    .abs()
                    .total_cmp(&at(&rows, *b, column).abs())
            })
            .unwrap_or(column);
        rows.swap(column, pivot);
        right.swap(column, pivot);
        let head = at(&rows, column, column);
        if head == 0.0 {
            return vec![0.0; n];
        }
        let (top, value) = (
            rows.get(column).cloned().unwrap_or_default(),
            right.get(column).copied().unwrap_or(0.0),
        );
        for i in (0..n).filter(|i| *i != column) {
            let factor = at(&rows, i, column) / head;
            if let (Some(row), Some(r)) = (rows.get_mut(i), right.get_mut(i)) {
                row.iter_mut().zip(&top).for_each(|(v, t)| *v -= factor * t);
                *r -= factor * value;
            }
        }
    }
    (0..n)
        .zip(&right)
        .map(|(i, r)| r / at(&rows, i, i))
        .collect()
}

/// Continuous time: the noise schedule's table read between its entries.
#[derive(Debug, Clone)]
struct Clock {
    /// `ln alpha` at times `(i + 1) / 1000`.
    log_alphas: Vec<f64>,
}

impl Clock {
    fn new(schedule: &NoiseSchedule) -> Self {
        let logs = schedule.alphas_cumprod().iter();
        Self {
            log_alphas: logs.map(|a| 0.5 * f64::from(*a).ln()).collect(),
        }
    }

    fn log_alpha(&self, time: f64) -> f64 {
        let n = TIMESTEPS as f64;
        let low = ((time * n).ceil() - 2.0).clamp(0.0, n - 2.0) as usize;
        let at = |i: usize| self.log_alphas.get(i).copied().unwrap_or(0.0);
        let weight = time * n - (low + 1) as f64;
        at(low) + weight * (at(low + 1) - at(low))
    }

    fn alpha_sigma(&self, time: f64) -> (f64, f64) {
        let log = self.log_alpha(time);
        (log.exp(), (-(2.0 * log).exp_m1()).max(0.0).sqrt())
    }

    /// Half the logarithm of the signal-to-noise ratio.
    fn lambda(&self, time: f64) -> f64 {
        let log = self.log_alpha(time);
        log - 0.5 * (-(2.0 * log).exp_m1()).ln()
    }

    /// The time of a `lambda`.
    fn time_of(&self, lambda: f64) -> f64 {
        // ln alpha = -ln(1 + exp(-2 lambda)) / 2, which falls with time.
        let log = -0.5 * (-2.0 * lambda).exp().ln_1p();
        let above = self
            .log_alphas
            .iter()
            .position(|l| *l <= log)
            .unwrap_or(TIMESTEPS - 1)
            .clamp(1, TIMESTEPS - 1);
        let at = |i: usize| self.log_alphas.get(i).copied().unwrap_or(0.0);
        let (low, high) = (at(above - 1), at(above));
        (above as f64 + (log - low) / (high - low)) / TIMESTEPS as f64
    }

    fn times(&self, steps: usize, options: &UniPcOptions) -> Vec<f64> {
        let (first, last) = (options.start, 1.0 / TIMESTEPS as f64);
        let even = |a: f64, b: f64| (0..=steps).map(move |i| a + (b - a) * i as f64 / steps as f64);
        match options.times {
            UniPcTimes::Uniform => even(first, last).collect(),
            UniPcTimes::Quadratic => even(first.sqrt(), last.sqrt()).map(|t| t * t).collect(),
            UniPcTimes::LogSnr => even(self.lambda(first), self.lambda(last))
                .map(|lambda| self.time_of(lambda))
                .collect(),
        }
    }
}
