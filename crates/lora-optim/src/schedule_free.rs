//! Schedule-free AdamW, RAdam and SGD (Defazio et al. 2024): averaging in place of a
//! learning-rate schedule.
//!
//! The model holds y, the point where gradients are taken; z is the plain optimizer's
//! sequence; x is their running average: what is saved and sampled from. With the
//! group's step counter k from 0:
//!
//! 1. `lr_k = lr * min(1, (k + 1) / warmup_steps)`; `lr_max = max(lr_max, lr_k)`
//! 2. `w = (k + 1)^r * lr_max^weight_lr_power`; `weight_sum += w`; `c = w / weight_sum`
//! 3. AdamW: `v = b2 * v + (1 - b2) * g^2`, `u = g / (sqrt(v / (1 - b2^(k+1))) + eps)`;
//!    SGD: `u = g`. RAdam scales lr with its rectification and uses `u = g` while that is
//!    undefined. Then `u = u + wd * y`
//! 4. `y = lerp(y, z, c) + lr_k * (b1 * (1 - c) - 1) * u`; `z = z - lr_k * u`
//!
//! Evaluation: `x = y + (1 - 1 / b1) * (z - y)`. The training point is kept aside
//! meanwhile, so that sampling changes no bit of a run. Use a constant schedule.
//! State: `z`, `exp_avg_sq` v. Follows `schedulefree` 1.4.1.
//! <https://arxiv.org/abs/2405.15682>

use serde::{Deserialize, Serialize};

use crate::error::{Result, check, check_beta, check_not_negative};
use crate::lane::{Lane, decay_into_square, lerp};
use crate::slot::{Buffer, Kernel, Source};
use crate::stepper::{Rule, RuleConfig, Stepper};
use crate::table::{GroupDefaults, Table};

/// The optimizer that schedule-free averaging is put around.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ScheduleFreeBase {
    /// AdamW.
    #[default]
    AdamW,
    /// RAdam: AdamW whose first steps are held back by their variance; no warm-up needed.
    RAdam,
    /// Plain gradient descent; `betas.0` is the momentum.
    Sgd,
}

/// Options of [`ScheduleFree`].
///
/// | name | default | meaning | range |
/// |---|---|---|---|
/// | `base` | AdamW | inner optimizer | |
/// | `lr` | 0.0025 | (SGD: the reference has 1.0) | 0 or more |
/// | `betas` | (0.9, 0.999) | interpolation between z and x, decay of v | (0, 1), [0, 1) |
/// | `eps` | 1e-8 | | 0 or more |
/// | `weight_decay` | 0 | acts at y | 0 or more |
/// | `warmup_steps` | 0 | linear warm-up of lr (not with RAdam) | |
/// | `r` | 0 | power of the step number in the average's weight | 0 or more |
/// | `weight_lr_power` | 2 | power of the largest lr in it | 0 or more |
/// | `silent_sgd_phase` | true | RAdam: no step while the rectification is undefined | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleFreeConfig {
    /// Inner optimizer.
    pub base: ScheduleFreeBase,
    /// Learning rate.
    pub lr: f64,
    /// Interpolation, and decay rate of the second moment.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Power of the step number in the average's weight.
    pub r: f64,
    /// Power of the largest learning rate in the average's weight.
    pub weight_lr_power: f64,
    /// RAdam: stand still while the rectification is undefined.
    pub silent_sgd_phase: bool,
}

impl Default for ScheduleFreeConfig {
    fn default() -> Self {
        Self {
            base: ScheduleFreeBase::AdamW,
            lr: 0.0025,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.0,
            warmup_steps: 0,
            r: 0.0,
            weight_lr_power: 2.0,
            silent_sgd_phase: true,
        }
    }
}

impl RuleConfig for ScheduleFreeConfig {
    fn validate(&self) -> Result<()> {
        check_not_negative("lr", self.lr)?;
        check(
            self.betas.0 > 0.0 && self.betas.0 < 1.0,
            "betas",
            self.betas.0,
            "a first beta above 0 and below 1: without it there is no average to evaluate",
        )?;
        check_beta("betas", self.betas.1)?;
        check_not_negative("eps", self.eps)?;
        check_not_negative("weight_decay", self.weight_decay)?;
        check_not_negative("r", self.r)?;
        check_not_negative("weight_lr_power", self.weight_lr_power)
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

/// Schedule-free AdamW, RAdam or SGD.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora_optim::{Optimizer, ParamGroup, ScheduleFree, ScheduleFreeConfig};
/// let w = Var::from_tensor(&Tensor::new(&[3f32], &Device::Cpu)?)?;
/// let groups = vec![ParamGroup::new("all", vec![("w".into(), w.clone())])];
/// let mut optimizer = ScheduleFree::new(groups, ScheduleFreeConfig { lr: 0.1, ..Default::default() })?;
/// for _ in 0..100 {
///     optimizer.step(&w.as_tensor().sqr()?.sum_all()?.backward()?)?;
/// }
/// let trained = w.to_vec1::<f32>()?;
/// optimizer.set_training(false)?; // the averaged weights: save and sample now
/// assert_ne!(w.to_vec1::<f32>()?, trained);
/// optimizer.set_training(true)?;
/// assert_eq!(w.to_vec1::<f32>()?, trained);
/// # Ok::<(), lora_optim::Error>(())
/// ```
pub type ScheduleFree = Stepper<ScheduleFreeRule>;

const Z: usize = 0;
const V: usize = 1;

/// Scalars of one group.
#[derive(Debug, Clone, Copy)]
struct Average {
    weight_sum: f64,
    lr_max: f64,
    scheduled_lr: f64,
    k: f64,
}

/// The update rule of [`ScheduleFree`].
#[derive(Debug)]
pub struct ScheduleFreeRule {
    groups: Vec<Average>,
}

impl Rule for ScheduleFreeRule {
    type Config = ScheduleFreeConfig;
    const NAME: &'static str = "ScheduleFree";
    const BUFFERS: &'static [&'static str] = &["z", "exp_avg_sq"];

    fn new(_: &ScheduleFreeConfig, table: &Table) -> Result<Self> {
        let fresh = Average {
            weight_sum: 0.0,
            lr_max: -1.0,
            scheduled_lr: 0.0,
            k: 0.0,
        };
        Ok(Self {
            groups: vec![fresh; table.groups.len()],
        })
    }

    fn update(&mut self, config: &ScheduleFreeConfig, table: &mut Table) -> Result<()> {
        let mut steps = Vec::with_capacity(self.groups.len());
        for (g, average) in self.groups.iter_mut().enumerate() {
            let n = table.numbers[g];
            let step = average.k + 1.0;
            let mut adaptive = config.base != ScheduleFreeBase::Sgd;
            let factor = match config.base {
                ScheduleFreeBase::RAdam => {
                    let rectified = rectification(n.betas.1, step);
                    adaptive = rectified.is_some();
                    rectified.unwrap_or(f64::from(u8::from(!config.silent_sgd_phase)))
                }
                _ if step < config.warmup_steps as f64 => step / config.warmup_steps as f64,
                _ => 1.0,
            };
            let lr = table.rate(g) * factor;
            average.scheduled_lr = lr;
            average.lr_max = average.lr_max.max(lr);
            let weight = step.powf(config.r) * average.lr_max.powf(config.weight_lr_power);
            average.weight_sum += weight;
            let c = if average.weight_sum == 0.0 {
                0.0
            } else {
                weight / average.weight_sum
            };
            average.k = step;
            let v_scale = 1.0 / (1.0 - n.betas.1.powi(step as i32));
            steps.push(FreeStep {
                c: c as f32,
                y_rate: (lr * (n.betas.0 * (1.0 - c) - 1.0)) as f32,
                z_rate: lr as f32,
                decay: n.weight_decay as f32,
                b2: n.betas.1 as f32,
                one_minus_b2: (1.0 - n.betas.1) as f32,
                v_scale: v_scale as f32,
                eps: n.eps as f32,
                adaptive,
            });
        }
        table.for_each(|slot| {
            let step = &steps[slot.group];
            if slot.buffers[Z].is_none() {
                slot.buffers[Z] = Some(slot.weights()?);
            }
            let (y, z) = (Source::Param, Source::State(Z));
            if config.base == ScheduleFreeBase::Sgd {
                return slot.run([y, z], [Source::Grad], step);
            }
            slot.ensure_zeros(V)?;
            slot.run([y, z, Source::State(V)], [Source::Grad], step)
        })
    }

    fn scalars(&self) -> Vec<(&'static str, Vec<f64>)> {
        let each = |f: fn(&Average) -> f64| self.groups.iter().map(f).collect::<Vec<_>>();
        vec![
            ("weight_sum", each(|a| a.weight_sum)),
            ("lr_max", each(|a| a.lr_max)),
            ("scheduled_lr", each(|a| a.scheduled_lr)),
            ("k", each(|a| a.k)),
        ]
    }

    fn set_scalars(&mut self, values: &[Vec<f64>]) {
        for (g, average) in self.groups.iter_mut().enumerate() {
            let at = |i: usize| values[i][g];
            *average = Average {
                weight_sum: at(0),
                lr_max: at(1),
                scheduled_lr: at(2),
                k: at(3),
            };
        }
    }

    fn averaged(
        &self,
        _: &ScheduleFreeConfig,
        table: &Table,
        slot: usize,
    ) -> Result<Option<Buffer>> {
        let slot = &table.slots[slot];
        let b1 = table.numbers[slot.group].betas.0;
        extrapolate(slot, Z, 1.0 - 1.0 / b1)
    }

    fn weights_changed(
        &mut self,
        _: &ScheduleFreeConfig,
        slot: &mut crate::slot::Slot,
        factor: Option<f64>,
    ) -> Result<()> {
        follow(slot, Z, factor)
    }
}

/// The base sequence goes along when somebody scales or replaces the weights.
pub(crate) fn follow(slot: &mut crate::slot::Slot, z: usize, factor: Option<f64>) -> Result<()> {
    if slot.buffers[z].is_none() {
        return Ok(());
    }
    match (factor, &mut slot.buffers[z]) {
        (Some(factor), Some(Buffer::Device(tensor))) => *tensor = tensor.affine(factor, 0.0)?,
        (Some(factor), Some(buffer)) => buffer
            .f32_mut()
            .iter_mut()
            .for_each(|x| *x *= factor as f32),
        _ => slot.buffers[z] = Some(slot.weights()?),
    }
    Ok(())
}

/// `y + weight * (z - y)`: the averaged point.
pub(crate) fn extrapolate(
    slot: &crate::slot::Slot,
    z: usize,
    weight: f64,
) -> Result<Option<Buffer>> {
    Ok(match &slot.buffers[z] {
        None => None,
        Some(z) => Some(match (slot.weights()?, z) {
            (Buffer::Device(y), Buffer::Device(z)) => {
                Buffer::Device((&y + (z - &y)?.affine(weight, 0.0)?)?)
            }
            (y, z) => {
                let host_y;
                let y = match &y {
                    Buffer::Device(tensor) => {
                        host_y = tensor.flatten_all()?.to_vec1::<f32>()?;
                        &host_y[..]
                    }
                    other => other.f32(),
                };
                Buffer::F32(
                    y.iter()
                        .zip(z.f32())
                        .map(|(y, z)| lerp(*y, *z, weight as f32))
                        .collect(),
                )
            }
        }),
    })
}

/// RAdam's factor on the learning rate, once it is defined.
pub(crate) fn rectification(b2: f64, step: f64) -> Option<f64> {
    let power = b2.powf(step);
    let limit = 2.0 / (1.0 - b2) - 1.0;
    let rho = limit - 2.0 * step * power / (1.0 - power);
    (rho > 4.0)
        .then(|| ((rho - 4.0) * (rho - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * rho)).sqrt())
}

/// Numbers of one group's step.
struct FreeStep {
    c: f32,
    y_rate: f32,
    z_rate: f32,
    decay: f32,
    b2: f32,
    one_minus_b2: f32,
    v_scale: f32,
    eps: f32,
    adaptive: bool,
}

impl FreeStep {
    #[inline(always)]
    fn apply<L: Lane>(&self, y: &mut L, z: &mut L, u: L) {
        let u = u + y.clone().times(self.decay);
        *y = lerp(y.clone(), z.clone(), self.c) + u.clone().times(self.y_rate);
        *z = z.clone() - u.times(self.z_rate);
    }
}

impl Kernel<3, 1, 0> for FreeStep {
    #[inline(always)]
    fn element<L: Lane>(&self, [y, z, v]: &mut [L; 3], [g]: [L; 1]) -> [L; 0] {
        *v = decay_into_square(v.clone(), g.clone(), self.b2, self.one_minus_b2);
        let u = if self.adaptive {
            g / v.clone().times(self.v_scale).sqrt().plus(self.eps)
        } else {
            g
        };
        self.apply(y, z, u);
        []
    }
}

impl Kernel<2, 1, 0> for FreeStep {
    #[inline(always)]
    fn element<L: Lane>(&self, [y, z]: &mut [L; 2], [g]: [L; 1]) -> [L; 0] {
        self.apply(y, z, g);
        []
    }
}
