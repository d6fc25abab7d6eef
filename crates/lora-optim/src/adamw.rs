//! AdamW and Adam (Loshchilov and Hutter 2019, Kingma and Ba 2015), as PyTorch does it.
//!
//! For each parameter with gradient g, its own step counter t counting from 1:
//!
//! 1. `p = p * (1 - lr * wd)` (AdamW), or `g = g + wd * p` (Adam, `decoupled` off)
//! 2. `m = m + (1 - b1) * (g - m)`, `v = b2 * v + (1 - b2) * g^2`
//! 3. `amsgrad`: `vmax = max(vmax, v)`, used instead of v below
//! 4. `p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)`
//!
//! The decay is multiplied with the learning rate, as in PyTorch and unlike the paper.
//! State: `exp_avg` m, `exp_avg_sq` v, `max_exp_avg_sq` with `amsgrad`.
//! <https://arxiv.org/abs/1711.05101>

use serde::{Deserialize, Serialize};

use crate::error::{Result, check_beta, check_not_negative};
use crate::lane::{Lane, average, decay_into_square};
use crate::slot::{Kernel, Source};
use crate::stepper::{Rule, RuleConfig, Stepper};
use crate::table::{GroupDefaults, Table};

/// Options of [`AdamW`].
///
/// | name | default | meaning | range |
/// |---|---|---|---|
/// | `lr` | 1e-3 | learning rate | 0 or more |
/// | `betas` | (0.9, 0.999) | decay of the running means of g and g^2 | [0, 1) |
/// | `eps` | 1e-8 | added to the denominator after bias correction | 0 or more |
/// | `weight_decay` | 0.01 | | 0 or more |
/// | `amsgrad` | false | divide by the largest v so far | |
/// | `decoupled` | true | AdamW; false is Adam with L2 regularisation | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Divide by the largest v so far.
    pub amsgrad: bool,
    /// Decay apart from the gradient (AdamW) or inside it (Adam).
    pub decoupled: bool,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.01,
            amsgrad: false,
            decoupled: true,
        }
    }
}

impl RuleConfig for AdamWConfig {
    fn validate(&self) -> Result<()> {
        check_not_negative("lr", self.lr)?;
        check_beta("betas", self.betas.0)?;
        check_beta("betas", self.betas.1)?;
        check_not_negative("eps", self.eps)?;
        check_not_negative("weight_decay", self.weight_decay)
    }

    fn defaults(&self) -> GroupDefaults {
        GroupDefaults {
            lr: self.lr,
            weight_decay: self.weight_decay,
            betas: Some(self.betas),
            eps: Some(self.eps),
        }
    }
}

/// AdamW, or Adam with `decoupled: false`.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora_optim::{AdamW, AdamWConfig, Optimizer, ParamGroup};
/// let w = Var::from_tensor(&Tensor::new(&[3f32], &Device::Cpu)?)?;
/// let mut adamw = AdamW::new(vec![ParamGroup::new("all", vec![("w".into(), w.clone())])],
///                            AdamWConfig { lr: 0.5, weight_decay: 0.1, ..Default::default() })?;
/// adamw.step(&w.as_tensor().sqr()?.sum_all()?.backward()?)?;
/// assert_eq!(w.to_vec1::<f32>()?, [3.0 * (1.0 - 0.5 * 0.1) - 0.5]);
/// # Ok::<(), lora_optim::Error>(())
/// ```
pub type AdamW = Stepper<AdamWRule>;

/// The update rule of [`AdamW`].
#[derive(Debug)]
pub struct AdamWRule;

const M: usize = 0;
const V: usize = 1;
const V_MAX: usize = 2;

impl Rule for AdamWRule {
    type Config = AdamWConfig;
    const NAME: &'static str = "AdamW";
    const BUFFERS: &'static [&'static str] = &["exp_avg", "exp_avg_sq", "max_exp_avg_sq"];

    fn new(_: &AdamWConfig, _: &Table) -> Result<Self> {
        Ok(Self)
    }

    fn update(&mut self, config: &AdamWConfig, table: &mut Table) -> Result<()> {
        let numbers = table.per_group(|g, n| (table.rate(g), *n));
        table.for_each(|slot| {
            let (lr, n) = numbers[slot.group];
            let t = slot.steps as i32;
            let correction1 = 1.0 - n.betas.0.powi(t);
            let correction2 = 1.0 - n.betas.1.powi(t);
            let step = AdamStep {
                keep: if config.decoupled {
                    (1.0 - lr * n.weight_decay) as f32
                } else {
                    1.0
                },
                coupled: if config.decoupled {
                    0.0
                } else {
                    n.weight_decay as f32
                },
                one_minus_b1: (1.0 - n.betas.0) as f32,
                b2: n.betas.1 as f32,
                one_minus_b2: (1.0 - n.betas.1) as f32,
                lr: (lr / correction1) as f32,
                v_scale: (1.0 / correction2.sqrt()) as f32,
                eps: n.eps as f32,
            };
            slot.ensure_zeros(M)?;
            slot.ensure_zeros(V)?;
            let state = [Source::Param, Source::State(M), Source::State(V)];
            if config.amsgrad {
                slot.ensure_zeros(V_MAX)?;
                slot.run(
                    [state[0], state[1], state[2], Source::State(V_MAX)],
                    [Source::Grad],
                    &step,
                )
            } else {
                slot.run(state, [Source::Grad], &step)
            }
        })
    }
}

/// Numbers of one parameter's step.
struct AdamStep {
    keep: f32,
    coupled: f32,
    one_minus_b1: f32,
    b2: f32,
    one_minus_b2: f32,
    lr: f32,
    v_scale: f32,
    eps: f32,
}

impl AdamStep {
    #[inline(always)]
    fn moments<L: Lane>(&self, p: &L, m: &mut L, v: &mut L, g: L) {
        let g = g + p.clone().times(self.coupled);
        *m = average(m.clone(), g.clone(), self.one_minus_b1);
        *v = decay_into_square(v.clone(), g, self.b2, self.one_minus_b2);
    }

    #[inline(always)]
    fn apply<L: Lane>(&self, p: &mut L, m: L, v: L) {
        let denominator = v.sqrt().affine(self.v_scale, self.eps);
        *p = p.clone().times(self.keep) - m.times(self.lr) / denominator;
    }
}

impl Kernel<3, 1, 0> for AdamStep {
    #[inline(always)]
    fn element<L: Lane>(&self, [p, m, v]: &mut [L; 3], [g]: [L; 1]) -> [L; 0] {
        self.moments(p, m, v, g);
        self.apply(p, m.clone(), v.clone());
        []
    }
}

impl Kernel<4, 1, 0> for AdamStep {
    #[inline(always)]
    fn element<L: Lane>(&self, [p, m, v, v_max]: &mut [L; 4], [g]: [L; 1]) -> [L; 0] {
        self.moments(p, m, v, g);
        *v_max = v_max.clone().max(v.clone());
        self.apply(p, m.clone(), v_max.clone());
        []
    }
}
