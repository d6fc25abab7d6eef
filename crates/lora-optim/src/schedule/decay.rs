//! Bodies that go down once: what follows a warm-up. `total` counts the body's own steps.

use std::f64::consts::PI;

use crate::error::{Error, Result};
use crate::schedule::LrSchedule;

/// Position in the body, 0 at its start and 1 at its end.
fn progress(step: u64, total: u64) -> f64 {
    step as f64 / total.max(1) as f64
}

/// A straight line from 1 to 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Linear {
    /// Steps until 0.
    pub total: u64,
}

impl LrSchedule for Linear {
    fn factor_for(&self, step: u64, _: f64) -> f64 {
        self.total.saturating_sub(step) as f64 / self.total.max(1) as f64
    }
}

/// Waves of a cosine between 1 and `min`: half a wave goes from 1 down to `min` at the end.
///
/// In the references the curve **rises again past the end**; [`Cosine::new`] stays at the
/// end's value, set `hold` to false for their numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cosine {
    /// Steps until the end.
    pub total: u64,
    /// Waves until the end.
    pub waves: f64,
    /// Lowest factor.
    pub min: f64,
    /// Stay at the end's value.
    pub hold: bool,
}

impl Cosine {
    /// From 1 to 0, and 0 ever after.
    pub fn new(total: u64) -> Self {
        Self {
            total,
            waves: 0.5,
            min: 0.0,
            hold: true,
        }
    }
}

impl LrSchedule for Cosine {
    fn factor_for(&self, step: u64, _: f64) -> f64 {
        let step = if self.hold {
            step.min(self.total)
        } else {
            step
        };
        let wave = 0.5 * (1.0 + (PI * self.waves * 2.0 * progress(step, self.total)).cos());
        (wave * (1.0 - self.min) + self.min).max(0.0)
    }
}

/// `cycles` times from 1 to 0 along half a cosine, 0 after the end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CosineRestarts {
    /// Steps until the end.
    pub total: u64,
    /// Number of descents.
    pub cycles: f64,
}

impl LrSchedule for CosineRestarts {
    fn factor_for(&self, step: u64, _: f64) -> f64 {
        let progress = progress(step, self.total);
        if progress >= 1.0 {
            0.0
        } else {
            0.5 * (1.0 + (PI * ((self.cycles * progress) % 1.0)).cos())
        }
    }
}

/// A power of the remaining share, from the base rate down to `end_lr`.
///
/// The share of `end_lr` is taken of `reference_lr` (in sd-scripts the main learning
/// rate), not of each group's rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Polynomial {
    /// Steps until the end.
    pub total: u64,
    /// 1 is a straight line.
    pub power: f64,
    /// Rate at the end.
    pub end_lr: f64,
    /// Rate at the start.
    pub reference_lr: f64,
}

impl Polynomial {
    /// Checks that the rate goes down.
    ///
    /// # Errors
    /// `end_lr` is not below `reference_lr`.
    pub fn validate(&self) -> Result<()> {
        if self.end_lr < self.reference_lr {
            return Ok(());
        }
        Err(Error::Combination {
            what: format!(
                "polynomial schedule to {} and learning rate {}",
                self.end_lr, self.reference_lr
            ),
            instead: "the learning rate must be above the end of the schedule",
        })
    }
}

impl LrSchedule for Polynomial {
    fn factor_for(&self, step: u64, _: f64) -> f64 {
        if step > self.total {
            return self.end_lr / self.reference_lr;
        }
        let remaining = 1.0 - progress(step, self.total);
        ((self.reference_lr - self.end_lr) * remaining.powf(self.power) + self.end_lr)
            / self.reference_lr
    }
}

/// `1 / sqrt(1 + step / timescale)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InverseSqrt {
    /// Steps until the factor has fallen to 0.71; the references take the warm-up's
    /// length, or 10000.
    pub timescale: f64,
}

impl LrSchedule for InverseSqrt {
    fn factor_for(&self, step: u64, _: f64) -> f64 {
        1.0 / ((step as f64 + self.timescale) / self.timescale).sqrt()
    }
}

/// "Reflected exponential" (Chen et al. 2021): stays high and falls late.
///
/// `z / ((1 - d) + d * z)` with z the remaining share, 0 after the end. The paper has
/// d = 0.5, OneTrainer and the kohya forks 0.9. <https://arxiv.org/abs/2107.04197>
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rex {
    /// Steps until 0.
    pub total: u64,
    /// Curvature: 0 is a straight line, near 1 falls at the very end.
    pub d: f64,
}

impl LrSchedule for Rex {
    fn factor_for(&self, step: u64, _: f64) -> f64 {
        if step >= self.total {
            return 0.0;
        }
        let z = 1.0 - progress(step, self.total);
        z / ((1.0 - self.d) + self.d * z)
    }
}

/// Constant pieces: each factor until its step, then the last one.
///
/// ```
/// use lora_optim::schedule::{LrSchedule, Piecewise};
/// let schedule: Piecewise = "1:10,0.1:20,0.005".parse()?;
/// assert_eq!([9, 10, 19, 20].map(|i| schedule.factor(i)), [1.0, 0.1, 0.1, 0.005]);
/// # Ok::<(), lora_optim::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Piecewise {
    /// Factor and the step before which it holds, in rising order of steps.
    pub pieces: Vec<(f64, u64)>,
    /// Factor after the last of them.
    pub last: f64,
}

impl LrSchedule for Piecewise {
    fn factor_for(&self, step: u64, _: f64) -> f64 {
        self.pieces
            .iter()
            .find(|(_, end)| step < *end)
            .map_or(self.last, |(factor, _)| *factor)
    }
}

impl std::str::FromStr for Piecewise {
    type Err = Error;

    /// Reads diffusers' form `1:10,0.1:20,0.005`: factor 1 until step 10, 0.1 until step
    /// 20, then 0.005.
    fn from_str(text: &str) -> Result<Self> {
        let fail = || Error::Argument {
            argument: text.to_string(),
            problem: "expected factor:step,...,factor with rising steps, such as 1:10,0.1:20,0.005"
                .into(),
        };
        let mut parts: Vec<&str> = text.split(',').map(str::trim).collect();
        let last = parts.pop().and_then(|f| f.parse().ok()).ok_or_else(fail)?;
        let mut pieces = Vec::with_capacity(parts.len());
        for part in parts {
            let (factor, step) = part.split_once(':').ok_or_else(fail)?;
            pieces.push((
                factor.trim().parse().map_err(|_| fail())?,
                step.trim().parse().map_err(|_| fail())?,
            ));
        }
        if pieces.windows(2).any(|w: &[(f64, u64)]| w[0].1 >= w[1].1) {
            return Err(fail());
        }
        Ok(Self { pieces, last })
    }
}
