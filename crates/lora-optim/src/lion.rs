//! Lion (Chen et al. 2023): every value moves by exactly the learning rate.
//!
//! 1. `p = p * (1 - lr * wd)`
//! 2. `p = p - lr * sign(b1 * m + (1 - b1) * g)`, where the sign of 0 is 0
//! 3. `m = b2 * m + (1 - b2) * g`
//!
//! Wants a learning rate 3 to 10 times smaller and a decay 3 to 10 times larger than
//! AdamW. State: `exp_avg` m. Follows `lion-pytorch` 0.2.5, its
//! `decoupled_weight_decay` included. <https://arxiv.org/abs/2302.06675>

use serde::{Deserialize, Serialize};

use crate::error::{Result, check_beta, check_not_negative, check_positive};
use crate::lane::{Lane, decay_into};
use crate::slot::{Kernel, Source};
use crate::stepper::{Rule, RuleConfig, Stepper};
use crate::table::{GroupDefaults, GroupNumbers, Table};

/// Options of [`Lion`].
///
/// | name | default | meaning | range |
/// |---|---|---|---|
/// | `lr` | 1e-4 | | above 0 |
/// | `betas` | (0.9, 0.99) | mix for the sign, decay of the average | [0, 1) |
/// | `weight_decay` | 0 | | 0 or more |
/// | `decoupled_weight_decay` | false | divide the decay by the initial lr, so that it does not depend on it | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LionConfig {
    /// Learning rate.
    pub lr: f64,
    /// Mix for the sign, and decay rate of the average.
    pub betas: (f64, f64),
    /// Weight decay.
    pub weight_decay: f64,
    /// Divide the decay by the learning rate given at construction.
    pub decoupled_weight_decay: bool,
}

impl Default for LionConfig {
    fn default() -> Self {
        Self {
            lr: 1e-4,
            betas: (0.9, 0.99),
            weight_decay: 0.0,
            decoupled_weight_decay: false,
        }
    }
}

impl LionConfig {
    /// Factor that the decay leaves of a weight at learning rate `lr`.
    pub(crate) fn keep(&self, lr: f64, numbers: &GroupNumbers) -> f64 {
        let unit = if self.decoupled_weight_decay && numbers.initial_lr > 0.0 {
            numbers.initial_lr
        } else {
            1.0
        };
        1.0 - lr * numbers.weight_decay / unit
    }
}

impl RuleConfig for LionConfig {
    fn validate(&self) -> Result<()> {
        check_positive("lr", self.lr)?;
        check_beta("betas", self.betas.0)?;
        check_beta("betas", self.betas.1)?;
        check_not_negative("weight_decay", self.weight_decay)
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

/// Lion.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora_optim::{Lion, LionConfig, Optimizer, ParamGroup};
/// let w = Var::from_tensor(&Tensor::new(&[3f32, -0.5, 0.], &Device::Cpu)?)?;
/// let groups = vec![ParamGroup::new("all", vec![("w".into(), w.clone())])];
/// let mut lion = Lion::new(groups, LionConfig { lr: 0.25, ..Default::default() })?;
/// lion.step(&w.as_tensor().sqr()?.sum_all()?.backward()?)?;
/// assert_eq!(w.to_vec1::<f32>()?, [2.75, -0.25, 0.]);
/// # Ok::<(), lora_optim::Error>(())
/// ```
pub type Lion = Stepper<LionRule>;

/// The update rule of [`Lion`].
#[derive(Debug)]
pub struct LionRule;

const M: usize = 0;

impl Rule for LionRule {
    type Config = LionConfig;
    const NAME: &'static str = "Lion";
    const BUFFERS: &'static [&'static str] = &["exp_avg"];

    fn new(_: &LionConfig, _: &Table) -> Result<Self> {
        Ok(Self)
    }

    fn update(&mut self, config: &LionConfig, table: &mut Table) -> Result<()> {
        let steps = table.per_group(|g, n| {
            let lr = table.rate(g);
            LionStep::new(lr, config.keep(lr, n), n.betas)
        });
        table.for_each(|slot| {
            slot.ensure_zeros(M)?;
            slot.run(
                [Source::Param, Source::State(M)],
                [Source::Grad],
                &steps[slot.group],
            )
        })
    }
}

/// Numbers of one group's step.
pub(crate) struct LionStep {
    keep: f32,
    lr: f32,
    betas: [f32; 2],
    rest: [f32; 2],
}

impl LionStep {
    pub(crate) fn new(lr: f64, keep: f64, betas: (f64, f64)) -> Self {
        Self {
            keep: keep as f32,
            lr: lr as f32,
            betas: [betas.0 as f32, betas.1 as f32],
            rest: [(1.0 - betas.0) as f32, (1.0 - betas.1) as f32],
        }
    }
}

impl Kernel<2, 1, 0> for LionStep {
    #[inline(always)]
    fn element<L: Lane>(&self, [p, m]: &mut [L; 2], [g]: [L; 1]) -> [L; 0] {
        let direction = decay_into(m.clone(), g.clone(), self.betas[0], self.rest[0]).sign();
        *p = p.clone().times(self.keep) - direction.times(self.lr);
        *m = decay_into(m.clone(), g, self.betas[1], self.rest[1]);
        []
    }
}
