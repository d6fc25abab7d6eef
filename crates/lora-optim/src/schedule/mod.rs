//! Learning-rate schedules: pure functions of the step number.

use std::fmt::Debug;

/// A learning rate over time.
///
/// Pure: the same step gives the same factor, there is no hidden counter, and going on
/// after an interruption needs the step number only.
pub trait LrSchedule: Debug + Send + Sync {
    /// Factor on a base learning rate for optimizer step number `step + 1` (so the
    /// first step asks for 0). Defined for every step, past the end too.
    fn factor(&self, step: u64) -> f64;
}
