//! Learning-rate schedules: pure functions of the step number.
//!
//! A schedule is a body, such as [`Cosine`], and wrappers around it: [`Warmup`] before it,
//! a [`Floor`] under it, [`Hold`] after its end. Steps are optimizer steps (after gradient
//! accumulation), the first is 0.
//!
//! ```
//! use lora_optim::schedule::{Cosine, LrSchedule, Warmup};
//! let schedule = Warmup { steps: 10, body: Cosine::new(90) };
//! assert_eq!(schedule.factor(5), 0.5);
//! assert_eq!(schedule.factor(10), 1.0);
//! assert_eq!(schedule.factor(55), 0.5);
//! assert!(schedule.factor(1000) < 1e-9);
//! ```

mod cycles;
mod decay;
mod stable;

use std::fmt::Debug;

pub use cycles::{CosineAnnealing, CycleShape, OneCycle, PeakDecayCycles, WarmRestarts};
pub use decay::{Cosine, CosineRestarts, InverseSqrt, Linear, Piecewise, Polynomial, Rex};
pub use stable::{RampShape, WarmupStableDecay};

use crate::optimizer::Optimizer;

/// A learning rate over time.
///
/// Pure: the same step gives the same factor, there is no hidden counter, and going on
/// after an interruption needs the step number only.
pub trait LrSchedule: Debug + Send + Sync {
    /// Factor on `base_lr`, a group's learning rate, for optimizer step number `step + 1`
    /// (the first step asks for 0). Defined for every step, past the end too. Only
    /// schedules with an absolute smallest or largest rate look at `base_lr`.
    fn factor_for(&self, step: u64, base_lr: f64) -> f64;

    /// The factor on a base rate of 1.
    fn factor(&self, step: u64) -> f64 {
        self.factor_for(step, 1.0)
    }

    /// Sets the factor of every group for the step to come.
    fn apply(&self, step: u64, optimizer: &mut dyn Optimizer) {
        for group in 0..optimizer.groups().len() {
            let factor = self.factor_for(step, optimizer.base_lr(group));
            optimizer.set_group_lr_factor(group, factor);
        }
    }
}

impl<S: LrSchedule + ?Sized> LrSchedule for Box<S> {
    fn factor_for(&self, step: u64, base_lr: f64) -> f64 {
        (**self).factor_for(step, base_lr)
    }
}

/// Always the base rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Constant;

impl LrSchedule for Constant {
    fn factor_for(&self, _step: u64, _base_lr: f64) -> f64 {
        1.0
    }
}

/// A straight rise from 0 over `steps` steps, then the body from its own step 0.
///
/// As in transformers and sd-scripts, the **first step has rate 0**;
/// [`WarmupFromFirst`] does not waste it.
#[derive(Debug, Clone, PartialEq)]
pub struct Warmup<B> {
    /// Steps of the rise.
    pub steps: u64,
    /// What comes after.
    pub body: B,
}

impl<B: LrSchedule> LrSchedule for Warmup<B> {
    fn factor_for(&self, step: u64, base_lr: f64) -> f64 {
        if step < self.steps {
            step as f64 / self.steps as f64
        } else {
            self.body.factor_for(step - self.steps, base_lr)
        }
    }
}

/// A rise that ends at 1 in its last step and begins with `start`, or with
/// `1 / steps` where that is not given; then the body from its own step 0.
#[derive(Debug, Clone, PartialEq)]
pub struct WarmupFromFirst<B> {
    /// Steps of the rise.
    pub steps: u64,
    /// Factor of the first step.
    pub start: Option<f64>,
    /// What comes after.
    pub body: B,
}

impl<B: LrSchedule> LrSchedule for WarmupFromFirst<B> {
    fn factor_for(&self, step: u64, base_lr: f64) -> f64 {
        if step >= self.steps {
            return self.body.factor_for(step - self.steps, base_lr);
        }
        match self.start {
            None => (step + 1) as f64 / self.steps as f64,
            Some(start) => {
                start + (1.0 - start) * step as f64 / self.steps.saturating_sub(1).max(1) as f64
            }
        }
    }
}

/// The body pressed into the range from `min` to 1: `min + (1 - min) * f`.
#[derive(Debug, Clone, PartialEq)]
pub struct Floor<B> {
    /// Factor where the body is 0.
    pub min: f64,
    /// The schedule above.
    pub body: B,
}

impl<B: LrSchedule> LrSchedule for Floor<B> {
    fn factor_for(&self, step: u64, base_lr: f64) -> f64 {
        self.min + (1.0 - self.min) * self.body.factor_for(step, base_lr)
    }
}

/// The body up to step `last`, and its value there ever after.
#[derive(Debug, Clone, PartialEq)]
pub struct Hold<B> {
    /// The last step that the body decides.
    pub last: u64,
    /// The schedule before.
    pub body: B,
}

impl<B: LrSchedule> LrSchedule for Hold<B> {
    fn factor_for(&self, step: u64, base_lr: f64) -> f64 {
        self.body.factor_for(step.min(self.last), base_lr)
    }
}

/// The body, `by` steps early.
#[derive(Debug, Clone, PartialEq)]
pub struct Advance<B> {
    /// Steps to skip.
    pub by: u64,
    /// The schedule.
    pub body: B,
}

impl<B: LrSchedule> LrSchedule for Advance<B> {
    fn factor_for(&self, step: u64, base_lr: f64) -> f64 {
        self.body.factor_for(step + self.by, base_lr)
    }
}
