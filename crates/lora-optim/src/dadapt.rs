//! D-Adaptation Adam (Defazio and Mishchenko 2023): the predecessor of Prodigy.
//!
//! With `dlr = d * lr * bc` (bc as in [`crate::Prodigy`]), q = sqrt(b2) and r the group's
//! multiplier (the reference's `layer_scale`):
//!
//! 1. `g = g + wd * p` (only without `decouple`)
//! 2. `acc += r * dlr * sum(g * s / (sqrt(v) + eps))`, with the old s and v
//! 3. `m = b1 * m + r * dlr * (1 - b1) * g`, `v = b2 * v + (1 - b2) * g^2`,
//!    `s = q * s + dlr * (1 - q) * g`, `L += r * sum |s|`
//! 4. `L == 0`: the step ends here. Otherwise `W = q * W + (1 - q) * acc`,
//!    `d_hat = W / ((1 - q) * L)`, `d = max(d, min(d_hat, d * growth_rate))`
//! 5. `p = p * (1 - wd * dlr)` (with `decouple`), `p = p - m / (sqrt(v) + eps)`
//!
//! The step size sits inside m, so a change of d acts gradually, and no start is
//! subtracted, so rounding of the weights does no harm. State: `exp_avg`, `exp_avg_sq`,
//! `s`. Follows `dadaptation` 3.2. <https://arxiv.org/abs/2301.07733>

use serde::{Deserialize, Serialize};

use crate::error::{Result, check, check_beta, check_not_negative, check_positive};
use crate::lane::{Lane, decay_into, decay_into_square};
use crate::slot::{Kernel, Slot, Source};
use crate::stepper::{Rule, RuleConfig, Stepper};
use crate::table::{GroupDefaults, Table};

/// Options of [`DAdaptAdam`] and [`crate::DAdaptAdamPreprint`].
///
/// | name | default | meaning | range |
/// |---|---|---|---|
/// | `lr` | 1 | multiplier of d | above 0 |
/// | `betas` | (0.9, 0.999) | | [0, 1) |
/// | `eps` | 1e-8 | | above 0 |
/// | `weight_decay` | 0 | | 0 or more |
/// | `decouple` | false | decay as in AdamW | |
/// | `use_bias_correction` | false | not in the preprint's version | |
/// | `d0` | 1e-6 | first d | above 0 |
/// | `growth_rate` | infinite | most that d grows per step | 1 or more |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DAdaptConfig {
    /// Multiplier of d.
    pub lr: f64,
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Decay apart from the gradient.
    pub decouple: bool,
    /// Adam's bias correction on the step size.
    pub use_bias_correction: bool,
    /// First d.
    pub d0: f64,
    /// Largest growth of d per step.
    #[serde(with = "crate::number")]
    pub growth_rate: f64,
}

impl Default for DAdaptConfig {
    fn default() -> Self {
        Self {
            lr: 1.0,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.0,
            decouple: false,
            use_bias_correction: false,
            d0: 1e-6,
            growth_rate: f64::INFINITY,
        }
    }
}

impl RuleConfig for DAdaptConfig {
    fn validate(&self) -> Result<()> {
        check_positive("lr", self.lr)?;
        check_beta("betas", self.betas.0)?;
        check_beta("betas", self.betas.1)?;
        check_positive("eps", self.eps)?;
        check_not_negative("weight_decay", self.weight_decay)?;
        check_positive("d0", self.d0)?;
        check(
            self.growth_rate >= 1.0,
            "growth_rate",
            self.growth_rate,
            "1 or more",
        )
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

/// D-Adaptation Adam.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use lora_optim::{DAdaptAdam, DAdaptConfig, Optimizer, ParamGroup};
/// let x = Var::zeros(3, DType::F32, &Device::Cpu)?;
/// let target = Tensor::new(&[1f32, -2., 3.], &Device::Cpu)?;
/// let groups = vec![ParamGroup::new("x", vec![("x".into(), x.clone())])];
/// let mut optimizer = DAdaptAdam::new(groups, DAdaptConfig::default())?;
/// for _ in 0..200 {
///     let loss = (x.as_tensor() - &target)?.sqr()?.sum_all()?;
///     optimizer.step(&loss.backward()?)?;
/// }
/// assert!(optimizer.effective_lr(0) > 0.01);
/// # Ok::<(), lora_optim::Error>(())
/// ```
pub type DAdaptAdam = Stepper<DAdaptRule>;

const M: usize = 0;
const V: usize = 1;
const S: usize = 2;

/// The update rule of [`DAdaptAdam`].
#[derive(Debug)]
pub struct DAdaptRule {
    d: f64,
    d_hat: f64,
    numerator: f64,
    k: f64,
}

impl Rule for DAdaptRule {
    type Config = DAdaptConfig;
    const NAME: &'static str = "DAdaptAdam";
    const BUFFERS: &'static [&'static str] = &["exp_avg", "exp_avg_sq", "s"];

    fn new(config: &DAdaptConfig, table: &Table) -> Result<Self> {
        table.shared_lr(0..table.groups.len(), MIXED)?;
        Ok(Self {
            d: config.d0,
            d_hat: f64::NAN,
            numerator: 0.0,
            k: 0.0,
        })
    }

    fn update(&mut self, config: &DAdaptConfig, table: &mut Table) -> Result<()> {
        let lr = table.shared_lr(0..table.groups.len(), MIXED)?;
        let (b1, b2) = config.betas;
        let q = b2.sqrt();
        let t = self.k as i32 + 1;
        let correction = if config.use_bias_correction {
            (1.0 - b2.powi(t)).sqrt() / (1.0 - b1.powi(t))
        } else {
            1.0
        };
        let dlr = self.d * lr * correction;
        let gathers = table.per_group(|g, n| {
            (table.lr(g) > 0.0).then_some(Gather {
                coupled: if config.decouple {
                    0.0
                } else {
                    n.weight_decay as f32
                },
                eps: n.eps as f32,
                b1: b1 as f32,
                m_new: (n.multiplier * dlr * (1.0 - b1)) as f32,
                b2: b2 as f32,
                v_new: (1.0 - b2) as f32,
                q: q as f32,
                s_new: (dlr * (1.0 - q)) as f32,
            })
        });
        table.for_each_sum(|slot| {
            (M..=S).try_for_each(|i| slot.ensure_zeros(i))?;
            match &gathers[slot.group] {
                Some(gather) => slot.run(
                    [Source::State(M), Source::State(V), Source::State(S)],
                    [Source::Grad, Source::Param],
                    gather,
                ),
                None => Ok(()),
            }
        })?;

        let (mut acc, mut length) = (0.0, 0.0);
        for slot in table.active() {
            let r = table.numbers[slot.group].multiplier;
            acc += r * dlr * slot.sums[0];
            length += r * slot.sums[1];
        }
        if length == 0.0 {
            return Ok(());
        }
        self.numerator = q * self.numerator + (1.0 - q) * acc;
        if lr > 0.0 {
            self.d_hat = self.numerator / ((1.0 - q) * length);
            self.d = self.d.max(self.d_hat.min(self.d * config.growth_rate));
        }
        let applies = table.per_group(|_, n| Apply {
            decay: if config.decouple {
                (n.weight_decay * dlr) as f32
            } else {
                0.0
            },
            eps: n.eps as f32,
        });
        self.k += 1.0;
        table.for_each(|slot| applies[slot.group].run(slot))
    }

    fn scalars(&self) -> Vec<(&'static str, Vec<f64>)> {
        vec![
            ("d", vec![self.d]),
            ("d_hat", vec![self.d_hat]),
            ("numerator_weighted", vec![self.numerator]),
            ("k", vec![self.k]),
        ]
    }

    fn set_scalars(&mut self, values: &[Vec<f64>]) {
        (self.d, self.d_hat, self.numerator, self.k) =
            (values[0][0], values[1][0], values[2][0], values[3][0]);
    }

    fn d(&self, _group: usize) -> Option<f64> {
        Some(self.d)
    }

    fn d_hat(&self, _group: usize) -> Option<f64> {
        Some(self.d_hat)
    }
}

/// What to do about unequal learning rates.
pub(crate) const MIXED: &str = "give every group the same lr (unet_lr, text_encoder_lr; no LoRA+ ratio, no block weights); programs set ParamGroup::multiplier";

struct Gather {
    coupled: f32,
    eps: f32,
    b1: f32,
    m_new: f32,
    b2: f32,
    v_new: f32,
    q: f32,
    s_new: f32,
}

impl Kernel<3, 2, 2> for Gather {
    #[inline(always)]
    fn element<L: Lane>(&self, [m, v, s]: &mut [L; 3], [g, p]: [L; 2]) -> [L; 2] {
        let g = g + p.times(self.coupled);
        let dot = g.clone() * s.clone() / v.clone().sqrt().plus(self.eps);
        *m = decay_into(m.clone(), g.clone(), self.b1, self.m_new);
        *v = decay_into_square(v.clone(), g.clone(), self.b2, self.v_new);
        *s = decay_into(s.clone(), g, self.q, self.s_new);
        [dot, s.clone().abs()]
    }
}

/// `p = p - decay * p - m / (sqrt(v) + eps)`
pub(crate) struct Apply {
    pub(crate) decay: f32,
    pub(crate) eps: f32,
}

impl Apply {
    pub(crate) fn run(&self, slot: &mut Slot) -> Result<()> {
        slot.run([Source::Param], [Source::State(M), Source::State(V)], self)
    }
}

impl Kernel<1, 2, 0> for Apply {
    #[inline(always)]
    fn element<L: Lane>(&self, [p]: &mut [L; 1], [m, v]: [L; 2]) -> [L; 0] {
        *p = p.clone() - p.clone().times(self.decay) - m / v.sqrt().plus(self.eps);
        []
    }
}
