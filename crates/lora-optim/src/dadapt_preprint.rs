//! D-Adaptation Adam as in the first preprint: what sd-scripts' `DAdaptation` means.
//!
//! With `dlr = d * lr`:
//!
//! 1. `g = g + wd * p` (only without `decouple`)
//! 2. `m = b1 * m + dlr * (1 - b1) * g`, `v = b2 * v + (1 - b2) * g^2`, `D = sqrt(v) + eps`
//! 3. `G += sum(g^2 / D)`, `s = b2 * s + dlr * (1 - b2) * g`, `S += sum(s^2 / D)`, `L += sum |s|`
//! 4. `L == 0`: the step ends here. Otherwise `gsq = b2 * gsq + G * dlr^2 * (1 - b2)`,
//!    `d_hat = (S / (1 - b2) - gsq) / L`, `d = max(d, min(d_hat, d * growth_rate))`
//! 5. `p = p * (1 - wd * dlr)` (with `decouple`, where the group's lr is above 0), `p = p - m / D`
//!
//! State: `exp_avg`, `exp_avg_sq`, `s`. Follows `dadaptation` 3.2.
//! <https://arxiv.org/abs/2301.07733v1>

use crate::dadapt::{Apply, DAdaptConfig, MIXED};
use crate::error::{Error, Result};
use crate::lane::{Lane, decay_into};
use crate::slot::{Kernel, Source};
use crate::stepper::{Rule, Stepper};
use crate::table::Table;

/// D-Adaptation Adam of the first preprint.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use lora_optim::{DAdaptAdamPreprint, DAdaptConfig, Optimizer, ParamGroup};
/// let x = Var::zeros(3, DType::F32, &Device::Cpu)?;
/// let target = Tensor::new(&[1f32, -2., 3.], &Device::Cpu)?;
/// let groups = vec![ParamGroup::new("x", vec![("x".into(), x.clone())])];
/// let mut optimizer = DAdaptAdamPreprint::new(groups, DAdaptConfig::default())?;
/// for _ in 0..200 {
///     let loss = (x.as_tensor() - &target)?.sqr()?.sum_all()?;
///     optimizer.step(&loss.backward()?)?;
/// }
/// assert!(optimizer.effective_lr(0) > 0.01);
/// # Ok::<(), lora_optim::Error>(())
/// ```
pub type DAdaptAdamPreprint = Stepper<DAdaptPreprintRule>;

const M: usize = 0;
const V: usize = 1;
const S: usize = 2;

/// The update rule of [`DAdaptAdamPreprint`].
#[derive(Debug)]
pub struct DAdaptPreprintRule {
    d: f64,
    d_hat: f64,
    gsq: f64,
    k: f64,
}

impl Rule for DAdaptPreprintRule {
    type Config = DAdaptConfig;
    const NAME: &'static str = "DAdaptAdamPreprint";
    const BUFFERS: &'static [&'static str] = &["exp_avg", "exp_avg_sq", "s"];

    fn new(config: &DAdaptConfig, table: &Table) -> Result<Self> {
        if config.use_bias_correction || table.numbers.iter().any(|n| n.multiplier != 1.0) {
            return Err(Error::Combination {
                what: "use_bias_correction or a group multiplier and DAdaptAdamPreprint".into(),
                instead: "DAdaptAdam has both",
            });
        }
        table.shared_lr(
            0..table.groups.len(),
            "use Prodigy or DAdaptAdam, whose groups have multipliers",
        )?;
        Ok(Self {
            d: config.d0,
            d_hat: f64::NAN,
            gsq: 0.0,
            k: 0.0,
        })
    }

    fn update(&mut self, config: &DAdaptConfig, table: &mut Table) -> Result<()> {
        let lr = table.shared_lr(0..table.groups.len(), MIXED)?;
        let (b1, b2) = config.betas;
        let dlr = self.d * lr;
        let gathers = table.per_group(|g, n| {
            (table.lr(g) > 0.0).then_some(Gather {
                coupled: if config.decouple {
                    0.0
                } else {
                    n.weight_decay as f32
                },
                eps: n.eps as f32,
                b1: b1 as f32,
                m_new: (dlr * (1.0 - b1)) as f32,
                b2: b2 as f32,
                v_new: (1.0 - b2) as f32,
                s_new: (dlr * (1.0 - b2)) as f32,
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

        let mut sums = [0.0; 3];
        for slot in table.active() {
            for (total, part) in sums.iter_mut().zip(slot.sums) {
                *total += part;
            }
        }
        let [gradients, weighted, length] = sums;
        if length == 0.0 {
            return Ok(());
        }
        self.gsq = b2 * self.gsq + gradients * dlr * dlr * (1.0 - b2);
        if lr > 0.0 {
            self.d_hat = (weighted / (1.0 - b2) - self.gsq) / length;
            self.d = self.d.max(self.d_hat.min(self.d * config.growth_rate));
        }
        let applies = table.per_group(|g, n| Apply {
            decay: if config.decouple && table.lr(g) > 0.0 {
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
            ("gsq_weighted", vec![self.gsq]),
            ("k", vec![self.k]),
        ]
    }

    fn set_scalars(&mut self, values: &[Vec<f64>]) {
        (self.d, self.d_hat, self.gsq, self.k) =
            (values[0][0], values[1][0], values[2][0], values[3][0]);
    }

    fn d(&self, _group: usize) -> Option<f64> {
        Some(self.d)
    }

    fn d_hat(&self, _group: usize) -> Option<f64> {
        Some(self.d_hat)
    }
}

struct Gather {
    coupled: f32,
    eps: f32,
    b1: f32,
    m_new: f32,
    b2: f32,
    v_new: f32,
    s_new: f32,
}

impl Kernel<3, 2, 3> for Gather {
    #[inline(always)]
    fn element<L: Lane>(&self, [m, v, s]: &mut [L; 3], [g, p]: [L; 2]) -> [L; 3] {
        let g = g + p.times(self.coupled);
        let square = g.clone() * g.clone();
        *m = decay_into(m.clone(), g.clone(), self.b1, self.m_new);
        *v = decay_into(v.clone(), square.clone(), self.b2, self.v_new);
        let denominator = v.clone().sqrt().plus(self.eps);
        *s = decay_into(s.clone(), g, self.b2, self.s_new);
        [
            square / denominator.clone(),
            s.clone() * s.clone() / denominator,
            s.clone().abs(),
        ]
    }
}
