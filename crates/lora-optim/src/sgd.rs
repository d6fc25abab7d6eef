//! Stochastic gradient descent with momentum, as PyTorch does it.
//!
//! 1. `g = g + wd * p`
//! 2. with momentum mu: `buf = g` at the first step, then `buf = mu * buf + (1 - dampening) * g`
//! 3. `nesterov`: `g = g + mu * buf`, otherwise `g = buf`
//! 4. `p = p - lr * g`
//!
//! State: `momentum_buffer`.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, check_not_negative};
use crate::lane::{Lane, decay_into};
use crate::slot::{Kernel, Source};
use crate::stepper::{Rule, RuleConfig, Stepper};
use crate::table::{GroupDefaults, Table};

/// Options of [`Sgd`].
///
/// | name | default | meaning | range |
/// |---|---|---|---|
/// | `lr` | 1e-3 | | 0 or more |
/// | `momentum` | 0 | 0 keeps no state | 0 or more |
/// | `dampening` | 0 | takes this share off the new gradient | finite |
/// | `weight_decay` | 0 | added to the gradient | 0 or more |
/// | `nesterov` | false | needs momentum and no dampening | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SgdConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the running sum of gradients.
    pub momentum: f64,
    /// Share of the new gradient that is left out.
    pub dampening: f64,
    /// Weight decay, added to the gradient.
    pub weight_decay: f64,
    /// Look one momentum step ahead.
    pub nesterov: bool,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            momentum: 0.0,
            dampening: 0.0,
            weight_decay: 0.0,
            nesterov: false,
        }
    }
}

impl RuleConfig for SgdConfig {
    fn validate(&self) -> Result<()> {
        check_not_negative("lr", self.lr)?;
        check_not_negative("momentum", self.momentum)?;
        check_not_negative("weight_decay", self.weight_decay)?;
        crate::error::check(
            self.dampening.is_finite(),
            "dampening",
            self.dampening,
            "a finite number",
        )?;
        if self.nesterov && (self.momentum == 0.0 || self.dampening != 0.0) {
            return Err(Error::Combination {
                what: format!(
                    "nesterov with momentum {} and dampening {}",
                    self.momentum, self.dampening
                ),
                instead: "nesterov needs momentum above 0 (usually 0.9) and dampening 0",
            });
        }
        Ok(())
    }

    fn defaults(&self) -> GroupDefaults {
        GroupDefaults {
            lr: self.lr,
            weight_decay: self.weight_decay,
            betas: None,
            eps: None,
        }
    }
}

/// Stochastic gradient descent.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora_optim::{Optimizer, ParamGroup, Sgd, SgdConfig};
/// let w = Var::from_tensor(&Tensor::new(&[3f32], &Device::Cpu)?)?;
/// let groups = vec![ParamGroup::new("all", vec![("w".into(), w.clone())])];
/// let mut sgd = Sgd::new(groups, SgdConfig { lr: 0.25, momentum: 0.5, ..Default::default() })?;
/// for wanted in [1.5, 0.0] {
///     sgd.step(&w.as_tensor().sqr()?.sum_all()?.backward()?)?;
///     assert_eq!(w.to_vec1::<f32>()?, [wanted]);
/// }
/// # Ok::<(), lora_optim::Error>(())
/// ```
pub type Sgd = Stepper<SgdRule>;

/// The update rule of [`Sgd`].
#[derive(Debug)]
pub struct SgdRule;

const BUF: usize = 0;

impl Rule for SgdRule {
    type Config = SgdConfig;
    const NAME: &'static str = "SGD";
    const BUFFERS: &'static [&'static str] = &["momentum_buffer"];

    fn new(_: &SgdConfig, _: &Table) -> Result<Self> {
        Ok(Self)
    }

    fn update(&mut self, config: &SgdConfig, table: &mut Table) -> Result<()> {
        let numbers = table.per_group(|g, n| (table.rate(g) as f32, n.weight_decay as f32));
        table.for_each(|slot| {
            let (lr, decay) = numbers[slot.group];
            let mut step = SgdStep {
                lr,
                decay,
                keep: config.momentum as f32,
                gain: (1.0 - config.dampening) as f32,
                ahead: None,
            };
            if config.momentum == 0.0 {
                return slot.run([Source::Param], [Source::Grad], &step);
            }
            if slot.buffers[BUF].is_none() {
                slot.ensure_zeros(BUF)?;
                (step.keep, step.gain) = (0.0, 1.0);
            }
            step.ahead = config.nesterov.then_some(config.momentum as f32);
            slot.run([Source::Param, Source::State(BUF)], [Source::Grad], &step)
        })
    }
}

/// Numbers of one parameter's step.
struct SgdStep {
    lr: f32,
    decay: f32,
    keep: f32,
    gain: f32,
    ahead: Option<f32>,
}

impl Kernel<1, 1, 0> for SgdStep {
    #[inline(always)]
    fn element<L: Lane>(&self, [p]: &mut [L; 1], [g]: [L; 1]) -> [L; 0] {
        let g = g + p.clone().times(self.decay);
        *p = p.clone() - g.times(self.lr);
        []
    }
}

impl Kernel<2, 1, 0> for SgdStep {
    #[inline(always)]
    fn element<L: Lane>(&self, [p, buf]: &mut [L; 2], [g]: [L; 1]) -> [L; 0] {
        let g = g + p.clone().times(self.decay);
        *buf = decay_into(buf.clone(), g.clone(), self.keep, self.gain);
        let direction = match self.ahead {
            Some(momentum) => g + buf.clone().times(momentum),
            None => buf.clone(),
        };
        *p = p.clone() - direction.times(self.lr);
        []
    }
}
