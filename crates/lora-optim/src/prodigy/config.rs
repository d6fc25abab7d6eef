//! Options of Prodigy.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, check, check_beta, check_not_negative, check_positive};
use crate::stepper::RuleConfig;
use crate::table::GroupDefaults;

/// Options of [`crate::Prodigy`].
///
/// | name | default | meaning | range |
/// |---|---|---|---|
/// | `lr` | 1 | multiplier of d; tune `d_coef` instead | above 0 |
/// | `betas` | (0.9, 0.99) | what users of diffusion models settled on; the reference has (0.9, 0.999), which inflates the first steps up to 6.6 times | [0, 1) |
/// | `beta3` | none | decay of the statistics; none is `sqrt(b2)` | [0, 1) |
/// | `eps` | 1e-8 | | above 0 |
/// | `weight_decay` | 0 | | 0 or more |
/// | `decouple` | true | decay as in AdamW | |
/// | `use_bias_correction` | false | | |
/// | `safeguard_warmup` | false | keep small warm-up rates out of the denominator of d; set it with warm-up or restarts | |
/// | `d0` | 1e-6 | first d; 1e-5 or 1e-4 when d does not move within 100 steps | above 0 |
/// | `init_d` | none | start from the d of an earlier run, `d0` staying the unit of the sums | above 0 |
/// | `d_coef` | 1 | factor on the estimate, usually 0.5 to 2 | above 0 |
/// | `growth_rate` | infinite | most that d grows per step | 1 or more |
/// | `limit_first_jump` | false | `growth_rate` also limits the jump away from d0 (not in the reference) | |
/// | `d_limit` | infinite | d never exceeds this | above 0 |
/// | `freeze_d_after` | none | d stays as it is after so many steps | |
/// | `slice_p` | 1 | statistics from every n-th value only: less memory | 1 or more |
/// | `split_groups` | false | one d per group | |
/// | `exact_displacement` | false | sum up the displacement itself instead of subtracting rounded weights; closer to exact arithmetic than the reference | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProdigyConfig {
    /// Multiplier of d.
    pub lr: f64,
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Decay rate of the statistics behind d.
    pub beta3: Option<f64>,
    /// Added to the denominator, times d.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Decay apart from the gradient.
    pub decouple: bool,
    /// Adam's bias correction on the step size.
    pub use_bias_correction: bool,
    /// Leave the learning rate out of the denominator of d.
    pub safeguard_warmup: bool,
    /// First d.
    pub d0: f64,
    /// d to start from, if not `d0`.
    pub init_d: Option<f64>,
    /// Factor on the estimate.
    pub d_coef: f64,
    /// Largest growth of d per step.
    #[serde(with = "crate::number")]
    pub growth_rate: f64,
    /// Apply `growth_rate` to the first jump too.
    pub limit_first_jump: bool,
    /// Upper bound of d.
    #[serde(with = "crate::number")]
    pub d_limit: f64,
    /// Number of steps after which d stays.
    pub freeze_d_after: Option<u64>,
    /// Stride of the values that the statistics use.
    pub slice_p: usize,
    /// One d per group.
    pub split_groups: bool,
    /// Keep the displacement instead of the start.
    pub exact_displacement: bool,
}

impl Default for ProdigyConfig {
    fn default() -> Self {
        Self {
            lr: 1.0,
            betas: (0.9, 0.99),
            beta3: None,
            eps: 1e-8,
            weight_decay: 0.0,
            decouple: true,
            use_bias_correction: false,
            safeguard_warmup: false,
            d0: 1e-6,
            init_d: None,
            d_coef: 1.0,
            growth_rate: f64::INFINITY,
            limit_first_jump: false,
            d_limit: f64::INFINITY,
            freeze_d_after: None,
            slice_p: 1,
            split_groups: false,
            exact_displacement: false,
        }
    }
}

impl ProdigyConfig {
    /// The authors' recommendation for diffusion models: weight decay 0.01, bias
    /// correction and the warm-up safeguard. Slow to start and steady.
    pub fn recommended() -> Self {
        Self {
            weight_decay: 0.01,
            use_bias_correction: true,
            safeguard_warmup: true,
            ..Default::default()
        }
    }
}

impl RuleConfig for ProdigyConfig {
    /// prodigyopt's defaults: betas (0.9, 0.999).
    fn reference() -> Self {
        Self {
            betas: (0.9, 0.999),
            ..Default::default()
        }
    }

    fn validate(&self) -> Result<()> {
        check_positive("lr", self.lr)?;
        check_beta("betas", self.betas.0)?;
        check_beta("betas", self.betas.1)?;
        if let Some(beta3) = self.beta3 {
            check_beta("beta3", beta3)?;
        }
        check_positive("eps", self.eps)?;
        check_not_negative("weight_decay", self.weight_decay)?;
        check_positive("d0", self.d0)?;
        if let Some(d) = self.init_d {
            check_positive("init_d", d)?;
        }
        check_positive("d_coef", self.d_coef)?;
        check(
            self.growth_rate >= 1.0,
            "growth_rate",
            self.growth_rate,
            "1 or more",
        )?;
        check(self.d_limit > 0.0, "d_limit", self.d_limit, "above 0")?;
        check(self.slice_p > 0, "slice_p", self.slice_p, "1 or more")?;
        if self.exact_displacement && self.slice_p > 1 {
            return Err(Error::Combination {
                what: "exact_displacement and slice_p > 1".into(),
                instead: "the displacement needs every value; choose one of the two",
            });
        }
        Ok(())
    }

    fn defaults(&self) -> GroupDefaults {
        GroupDefaults {
            lr: self.lr,
            weight_decay: self.weight_decay,
            betas: None,
            eps: Some(self.eps),
        }
    }
}
