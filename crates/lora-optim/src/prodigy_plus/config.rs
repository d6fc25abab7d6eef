//! Options of Prodigy+.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, check_beta, check_not_negative, check_positive};
use crate::stepper::RuleConfig;
use crate::table::GroupDefaults;

/// Options of [`crate::ProdigyPlus`].
///
/// | name | default | meaning | range |
/// |---|---|---|---|
/// | `lr` | 1 | multiplier of d | above 0 |
/// | `betas` | (0.9, 0.99) | interpolation between z and x, decay of v | [0, 1) |
/// | `beta3` | none | decay of the statistics; none is `sqrt(b2)` | [0, 1) |
/// | `weight_decay` | 0 | | 0 or more |
/// | `weight_decay_by_lr` | true | multiply the decay with the step size | |
/// | `d0` | 1e-6 | first d | above 0 |
/// | `d_coef` | 1 | factor on the estimate | above 0 |
/// | `d_limiter` | true | d grows by at most 19 % per step | |
/// | `prodigy_steps` | 0 | d stays after so many steps; 0 = never | |
/// | `schedulefree_c` | 0 | strength of the averaging; 0 = `1 / (1 - b1)`, the plain method | 0 or more |
/// | `eps` | 1e-8 | none: atan2 in place of the division | above 0 |
/// | `split_groups` | true | one d per group | |
/// | `split_groups_mean` | false | step with the harmonic mean of all d | |
/// | `factored` | true | second moment as row and column means | |
/// | `use_bias_correction` | false | RAdam's correction | |
/// | `use_stableadamw` | true | scale down updates whose root mean square is above 1 | |
/// | `use_schedulefree` | true | average; false is plain Prodigy+ with a first moment | |
/// | `use_speed` | false | estimate d from the growth of the numerator alone | |
/// | `use_cautious` | false | leave out values whose update disagrees with the average (needs `use_schedulefree`) | |
/// | `use_grams` | false | size from the average, sign from the update | |
/// | `use_adopt` | false | divide by the second moment before this gradient | |
/// | `use_orthograd` | false | take off the part of the update along the weights | |
/// | `use_focus` | false | sign updates drawn towards an average of the weights | |
/// | `bf16_statistics` | false | keep p0 and s in bfloat16 as the reference does | |
/// | `narrow_row_mean` | false | average the row factor over the dimension that the reference takes | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProdigyPlusConfig {
    /// Multiplier of d.
    pub lr: f64,
    /// Interpolation (or first moment), and decay rate of the second moment.
    pub betas: (f64, f64),
    /// Decay rate of the statistics behind d.
    pub beta3: Option<f64>,
    /// Weight decay.
    pub weight_decay: f64,
    /// Multiply the decay with the step size.
    pub weight_decay_by_lr: bool,
    /// First d.
    pub d0: f64,
    /// Factor on the estimate.
    pub d_coef: f64,
    /// Limit the growth of d per step to 2^(1/4).
    pub d_limiter: bool,
    /// Steps after which d stays; 0 = never.
    pub prodigy_steps: u64,
    /// Strength of the averaging; 0 = the plain method.
    pub schedulefree_c: f64,
    /// Added to the denominator, times d; none = atan2.
    pub eps: Option<f64>,
    /// One d per group.
    pub split_groups: bool,
    /// Step with the harmonic mean of all d.
    pub split_groups_mean: bool,
    /// Keep the second moment as row and column means.
    pub factored: bool,
    /// RAdam's bias correction.
    pub use_bias_correction: bool,
    /// Scale down large updates.
    pub use_stableadamw: bool,
    /// Schedule-free averaging.
    pub use_schedulefree: bool,
    /// Estimate d from the growth of the numerator.
    pub use_speed: bool,
    /// Leave out values whose update disagrees with the average.
    pub use_cautious: bool,
    /// Size from the average, sign from the update.
    pub use_grams: bool,
    /// Divide by the second moment before this gradient.
    pub use_adopt: bool,
    /// Take off the part of the update along the weights.
    pub use_orthograd: bool,
    /// Sign updates drawn towards an average of the weights.
    pub use_focus: bool,
    /// Keep p0 and s in bfloat16.
    pub bf16_statistics: bool,
    /// Take the row factor's mean over the reference's dimension.
    pub narrow_row_mean: bool,
}

impl Default for ProdigyPlusConfig {
    fn default() -> Self {
        Self {
            lr: 1.0,
            betas: (0.9, 0.99),
            beta3: None,
            weight_decay: 0.0,
            weight_decay_by_lr: true,
            d0: 1e-6,
            d_coef: 1.0,
            d_limiter: true,
            prodigy_steps: 0,
            schedulefree_c: 0.0,
            eps: Some(1e-8),
            split_groups: true,
            split_groups_mean: false,
            factored: true,
            use_bias_correction: false,
            use_stableadamw: true,
            use_schedulefree: true,
            use_speed: false,
            use_cautious: false,
            use_grams: false,
            use_adopt: false,
            use_orthograd: false,
            use_focus: false,
            bf16_statistics: false,
            narrow_row_mean: false,
        }
    }
}

impl ProdigyPlusConfig {
    /// A sum, in f32 where the reference's sums are wanted bit for bit: with statistics
    /// in bfloat16 a difference of one bit now and then grows to 2^-8.
    pub(super) fn rounded(&self, sum: f64) -> f64 {
        if self.bf16_statistics {
            f64::from(sum as f32)
        } else {
            sum
        }
    }
}

impl RuleConfig for ProdigyPlusConfig {
    fn validate(&self) -> Result<()> {
        check_positive("lr", self.lr)?;
        check_beta("betas", self.betas.0)?;
        check_beta("betas", self.betas.1)?;
        if let Some(beta3) = self.beta3 {
            check_beta("beta3", beta3)?;
        }
        check_not_negative("weight_decay", self.weight_decay)?;
        check_positive("d0", self.d0)?;
        check_positive("d_coef", self.d_coef)?;
        check_not_negative("schedulefree_c", self.schedulefree_c)?;
        if let Some(eps) = self.eps {
            check_positive("eps", eps)?;
        }
        let refuse = |what: &str, instead| {
            Err(Error::Combination {
                what: what.into(),
                instead,
            })
        };
        if self.use_cautious && self.use_grams {
            return refuse("use_cautious and use_grams", "choose one of the two");
        }
        if self.use_cautious && !self.use_schedulefree {
            return refuse(
                "use_cautious without use_schedulefree",
                "set use_schedulefree, or use_grams in its place",
            );
        }
        Ok(())
    }

    /// Version 2.0.1 number by number: bfloat16 statistics and its row mean.
    fn reference() -> Self {
        Self {
            bf16_statistics: true,
            narrow_row_mean: true,
            ..Self::default()
        }
    }

    fn defaults(&self) -> GroupDefaults {
        GroupDefaults {
            lr: self.lr,
            weight_decay: self.weight_decay,
            betas: Some(self.betas),
            eps: None,
        }
    }
}
