//! Sigma schedules: how noise levels fall over the steps.

use crate::NoiseSchedule;
use crate::{Error, Result};

/// A rule for `n` falling noise levels, followed by 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum SigmaSchedule {
    /// Even in timesteps: the sampler's default before schedules could be chosen.
    #[default]
    Uniform,
    /// Karras et al. 2022, rho 7.
    Karras,
    /// Even in log sigma.
    Exponential,
    /// Even in timesteps with the last one left out, as Stability's code does.
    SgmUniform,
    /// Picked from the table at even distances.
    Simple,
}

impl SigmaSchedule {
    /// Names as the web UI shows them.
    pub const ALL: [(&'static str, SigmaSchedule); 5] = [
        ("Uniform", SigmaSchedule::Uniform),
        ("Karras", SigmaSchedule::Karras),
        ("Exponential", SigmaSchedule::Exponential),
        ("SGM Uniform", SigmaSchedule::SgmUniform),
        ("Simple", SigmaSchedule::Simple),
    ];

    /// Finds a schedule by its name, in any letter case, blanks or underscores.
    ///
    /// # Errors
    /// [`Error::UnknownName`] with the list.
    pub fn from_name(name: &str) -> Result<Self> {
        let plain = |s: &str| s.to_lowercase().replace(['_', '-'], " ");
        let known = || {
            Self::ALL
                .iter()
                .map(|(n, _)| *n)
                .collect::<Vec<_>>()
                .join(", ")
        };
        let found = Self::ALL.iter().find(|(n, _)| plain(n) == plain(name));
        found.map(|(_, s)| *s).ok_or_else(|| Error::UnknownName {
            what: "schedule type",
            name: name.to_string(),
            known: known(),
        })
    }

    /// The web UI's name.
    pub fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(_, s)| *s == self)
            .map_or("Uniform", |(n, _)| n)
    }

    /// `n` noise levels and a final 0.
    pub fn sigmas(self, n: usize, schedule: &NoiseSchedule) -> Vec<f64> {
        let last = (crate::schedule::TIMESTEPS - 1) as f64;
        let (low, high) = (schedule.sigma(0), schedule.sigma(last as usize));
        // 0, 1/(n-1), ..., 1
        let ramp = |i: usize, n: usize| {
            if n > 1 {
                i as f64 / (n - 1) as f64
            } else {
                0.0
            }
        };
        let level = |i: usize| match self {
            SigmaSchedule::Uniform => schedule.sigma_at(last * (1.0 - ramp(i, n))),
            SigmaSchedule::Karras => {
                let (a, b) = (high.powf(1.0 / 7.0), low.powf(1.0 / 7.0));
                (a + ramp(i, n) * (b - a)).powi(7)
            }
            SigmaSchedule::Exponential => (high.ln() + ramp(i, n) * (low.ln() - high.ln())).exp(),
            SigmaSchedule::SgmUniform => schedule.sigma_at(last * (1.0 - ramp(i, n + 1))),
            SigmaSchedule::Simple => {
                schedule.sigma(crate::schedule::TIMESTEPS - 1 - i * crate::schedule::TIMESTEPS / n)
            }
        };
        (0..n).map(level).chain([0.0]).collect()
    }
}
