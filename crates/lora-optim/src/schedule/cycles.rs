//! Schedules that repeat, and one-cycle.

use std::f64::consts::PI;

use crate::schedule::LrSchedule;

/// Half a cosine from the base rate to `min_lr` and back, with period `2 * half_period`;
/// PyTorch's `CosineAnnealingLR`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CosineAnnealing {
    /// Steps from top to bottom (`T_max`).
    pub half_period: u64,
    /// Lowest rate, absolute (`eta_min`).
    pub min_lr: f64,
}

impl LrSchedule for CosineAnnealing {
    fn factor_for(&self, step: u64, base_lr: f64) -> f64 {
        let min = self.min_lr / base_lr;
        min + (1.0 - min) * (1.0 + (PI * step as f64 / self.half_period.max(1) as f64).cos()) / 2.0
    }
}

/// Falls along half a cosine and starts again at the top, each cycle `growth` times as
/// long as the one before; PyTorch's `CosineAnnealingWarmRestarts` (Loshchilov and Hutter
/// 2017).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WarmRestarts {
    /// Steps of the first cycle (`T_0`).
    pub first: u64,
    /// Factor on the length of each following cycle (`T_mult`), 1 or more.
    pub growth: u64,
    /// Lowest rate, absolute (`eta_min`).
    pub min_lr: f64,
}

impl LrSchedule for WarmRestarts {
    fn factor_for(&self, step: u64, base_lr: f64) -> f64 {
        let (mut length, mut position) = (self.first.max(1), step);
        if self.growth <= 1 {
            position %= length;
        }
        while position >= length {
            position -= length;
            length = length.saturating_mul(self.growth);
        }
        let min = self.min_lr / base_lr;
        min + (1.0 - min) * (1.0 + (PI * position as f64 / length as f64).cos()) / 2.0
    }
}

/// Up to the largest rate and down far below the start (Smith and Topin 2018), PyTorch's
/// `OneCycleLR`. Past the end the last value stays (PyTorch raises an error).
///
/// Only the learning rate: PyTorch also moves momentum or beta1 unless told not to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OneCycle {
    /// All steps.
    pub total: u64,
    /// Largest rate, absolute; none is the base rate.
    pub max_lr: Option<f64>,
    /// Share of the steps that go up.
    pub rise: f64,
    /// The start is the largest rate divided by this.
    pub start_divisor: f64,
    /// The end is the start divided by this.
    pub end_divisor: f64,
    /// Down to the start at the pace of the rise, then on to the end.
    pub three_phases: bool,
    /// Straight lines in place of half cosines.
    pub linear: bool,
}

impl OneCycle {
    /// PyTorch's defaults: 30 % up from 1/25, down to 1/250000, half cosines.
    pub fn new(total: u64) -> Self {
        Self {
            total,
            max_lr: None,
            rise: 0.3,
            start_divisor: 25.0,
            end_divisor: 1e4,
            three_phases: false,
            linear: false,
        }
    }
}

impl LrSchedule for OneCycle {
    fn factor_for(&self, step: u64, base_lr: f64) -> f64 {
        let top = self.max_lr.map_or(1.0, |lr| lr / base_lr);
        let start = top / self.start_divisor;
        let end = start / self.end_divisor;
        let total = self.total.max(1) as f64;
        let peak = self.rise * total - 1.0;
        let two = [(peak, start, top), (total - 1.0, top, end)];
        let three = [
            (peak, start, top),
            (2.0 * self.rise * total - 2.0, top, start),
            (total - 1.0, start, end),
        ];
        let phases: &[(f64, f64, f64)] = if self.three_phases { &three } else { &two };
        let at = (step as f64).min(total - 1.0);
        let mut begin = 0.0;
        for (i, (until, from, to)) in phases.iter().enumerate() {
            if at <= *until || i + 1 == phases.len() {
                let x = if *until > begin {
                    (at - begin) / (until - begin)
                } else {
                    1.0
                };
                return if self.linear {
                    (to - from) * x + from
                } else {
                    to + (from - to) / 2.0 * (1.0 + (PI * x).cos())
                };
            }
            begin = *until;
        }
        end
    }
}

/// Shape of the fall in [`PeakDecayCycles`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum CycleShape {
    /// Half a cosine.
    Cosine,
    /// [`crate::schedule::Rex`] with this d.
    Rex(f64),
}

/// Restarts with a rise in every cycle and a lower peak each time: the two schedules of
/// LoRA_Easy_Training_Scripts, `CosineAnnealingWarmRestarts` and
/// `RexAnnealingWarmRestarts`.
///
/// Cycle k has the peak `base * gamma^k`; its length grows by `growth` without the rise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PeakDecayCycles {
    /// Steps of the first cycle, the rise included.
    pub first: u64,
    /// Steps of the rise in each cycle.
    pub warmup: u64,
    /// Factor on the length of the fall from cycle to cycle.
    pub growth: f64,
    /// Factor on the peak from cycle to cycle.
    pub gamma: f64,
    /// Lowest rate, absolute; with Rex it is 0 where the base rate is not above it.
    pub min_lr: f64,
    /// Shape of the fall.
    pub shape: CycleShape,
}

impl LrSchedule for PeakDecayCycles {
    fn factor_for(&self, step: u64, base_lr: f64) -> f64 {
        let (mut length, mut position, mut peak) = (self.first.max(1), step, base_lr);
        while position >= length {
            position -= length;
            let fall = length.saturating_sub(self.warmup) as f64 * self.growth;
            // Python rounds halves to the even neighbour.
            length = (fall.round_ties_even() as u64 + self.warmup).max(1);
            peak *= self.gamma;
        }
        let rex = matches!(self.shape, CycleShape::Rex(_));
        let min = if rex && self.min_lr >= base_lr {
            0.0
        } else {
            self.min_lr
        };
        if peak <= min {
            return min / base_lr;
        }
        let share = if position < self.warmup {
            position as f64 / self.warmup as f64
        } else {
            let x =
                (position - self.warmup) as f64 / length.saturating_sub(self.warmup).max(1) as f64;
            match self.shape {
                CycleShape::Cosine => (1.0 + (PI * x).cos()) / 2.0,
                CycleShape::Rex(d) => (1.0 - x) / ((1.0 - d) + d * (1.0 - x)),
            }
        };
        (min + (peak - min) * share) / base_lr
    }
}
