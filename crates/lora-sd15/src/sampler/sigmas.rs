//! Sigma schedules: how noise levels fall over the steps.

use super::beta;
use crate::NoiseSchedule;
use crate::schedule::TIMESTEPS;
use crate::{Error, Result};

/// A rule for `n` falling noise levels.
///
/// ```
/// use lora_sd15::NoiseSchedule;
/// use lora_sd15::sampler::SigmaSchedule;
/// let sigmas = SigmaSchedule::from_name("karras")?.sigmas(5, &NoiseSchedule::sd15_f64());
/// assert_eq!((sigmas.len(), sigmas[5]), (6, 0.0));
/// # Ok::<(), lora_sd15::Error>(())
/// ```
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
    /// Even in log sigma, bent by rho (1: not at all).
    Polyexponential,
    /// Even in timesteps with the last one left out, as Stability's code does.
    SgmUniform,
    /// Even in the angle whose tangent is sigma (Sabour et al. 2024); ends above 0.
    KlOptimal,
    /// The levels found for SD1.5 by Sabour et al. 2024, interpolated.
    AlignYourSteps,
    /// Picked from the table at even distances.
    Simple,
    /// Even in timesteps between the ends of the table.
    Normal,
    /// DDIM's timesteps; the list may be longer than asked for.
    Ddim,
    /// Quantiles of beta(0.6, 0.6): dense at both ends.
    Beta,
}

/// Ends and curvature of a schedule; what is not given is the model's and the schedule's.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SigmaOptions {
    /// Lowest level above 0.
    pub min: Option<f64>,
    /// Highest level.
    pub max: Option<f64>,
    /// Exponent of [`SigmaSchedule::Karras`] and [`SigmaSchedule::Polyexponential`].
    pub rho: Option<f64>,
}

/// [`SigmaSchedule::AlignYourSteps`] for ten steps.
const ALIGNED: [f64; 11] = [
    14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029,
];

impl SigmaSchedule {
    /// Names as the web UI shows them.
    pub const ALL: [(&'static str, SigmaSchedule); 11] = [
        ("Uniform", SigmaSchedule::Uniform),
        ("Karras", SigmaSchedule::Karras),
        ("Exponential", SigmaSchedule::Exponential),
        ("Polyexponential", SigmaSchedule::Polyexponential),
        ("SGM Uniform", SigmaSchedule::SgmUniform),
        ("KL Optimal", SigmaSchedule::KlOptimal),
        ("Align Your Steps", SigmaSchedule::AlignYourSteps),
        ("Simple", SigmaSchedule::Simple),
        ("Normal", SigmaSchedule::Normal),
        ("DDIM", SigmaSchedule::Ddim),
        ("Beta", SigmaSchedule::Beta),
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

    /// `n` noise levels, the last step ending in 0.
    pub fn sigmas(self, n: usize, schedule: &NoiseSchedule) -> Vec<f64> {
        self.sigmas_with(n, schedule, &SigmaOptions::default())
    }

    /// The same with other ends or another curvature. Schedules read off the table of
    /// timesteps keep the table's ends.
    pub fn sigmas_with(
        self,
        n: usize,
        schedule: &NoiseSchedule,
        options: &SigmaOptions,
    ) -> Vec<f64> {
        let low = options.min.unwrap_or(schedule.sigma(0));
        let high = options.max.unwrap_or(schedule.sigma(TIMESTEPS - 1));
        // 0, 1/(n-1), ..., 1
        let ramp = |i: usize, n: usize| {
            if n > 1 {
                i as f64 / (n - 1) as f64
            } else {
                0.0
            }
        };
        let between = |a: f64, b: f64, share: f64| a + share * (b - a);
        let times = || (schedule.timestep(high), schedule.timestep(low));
        let last = (TIMESTEPS - 1) as f64;
        let level = |i: usize| match self {
            Self::Uniform => schedule.sigma_at(last * (1.0 - ramp(i, n))),
            Self::Normal => {
                let (first, last) = times();
                schedule.sigma_at(between(first, last, ramp(i, n)))
            }
            Self::SgmUniform => {
                let (first, last) = times();
                schedule.sigma_at(between(first, last, ramp(i, n + 1)))
            }
            Self::Karras => {
                let rho = options.rho.unwrap_or(7.0);
                between(high.powf(1.0 / rho), low.powf(1.0 / rho), ramp(i, n)).powf(rho)
            }
            Self::Exponential => between(high.ln(), low.ln(), ramp(i, n)).exp(),
            Self::Polyexponential => {
                let share = (1.0 - ramp(i, n)).powf(options.rho.unwrap_or(1.0));
                between(low.ln(), high.ln(), share).exp()
            }
            Self::Simple => schedule.sigma(TIMESTEPS - 1 - i * TIMESTEPS / n),
            Self::Beta => between(low, high, beta::quantile(1.0 - ramp(i, n), 0.6, 0.6)),
            Self::AlignYourSteps => aligned(ramp(i, n)),
            Self::KlOptimal => between(high.atan(), low.atan(), i as f64 / n.max(1) as f64).tan(),
            // Handled below.
            Self::Ddim => 0.0,
        };
        match self {
            Self::KlOptimal => (0..=n).map(level).collect(),
            Self::Ddim => {
                let stride = (TIMESTEPS / n.max(1)).max(1);
                let mut levels: Vec<f64> = (1..TIMESTEPS)
                    .step_by(stride)
                    .map(|t| schedule.sigma(t))
                    .collect();
                levels.reverse();
                levels.push(0.0);
                levels
            }
            _ => (0..n).map(level).chain([0.0]).collect(),
        }
    }
}

/// The aligned levels between their entries, linear in log sigma; 0 is the first, 1 the
/// last.
fn aligned(share: f64) -> f64 {
    let place = share.clamp(0.0, 1.0) * (ALIGNED.len() - 1) as f64;
    let log = |i: usize| ALIGNED.get(i).or(ALIGNED.last()).map_or(0.0, |s| s.ln());
    let low = place.floor();
    let weight = place - low;
    ((1.0 - weight) * log(low as usize) + weight * log(low as usize + 1)).exp()
}
