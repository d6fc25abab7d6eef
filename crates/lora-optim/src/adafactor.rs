//! Adafactor (Shazeer and Stern 2018), as the transformers library does it.
//!
//! The second moment of a tensor with two or more dimensions is kept as row and column
//! means over its last two dimensions, so there is almost no state. With t from 1:
//!
//! 1. `rate = lr`, or with `relative_step` `min(1e-2, 1 / sqrt(t))` (`warmup_init`: `1e-6 * t`
//!    in place of 1e-2); `scale_parameter` multiplies it with `max(eps2, rms(p))`
//! 2. `beta = 1 - t^decay_rate`; the running mean of `g^2 + eps1` gives v
//! 3. `u = g / sqrt(v)`, `u = u / max(1, rms(u) / clip_threshold) * rate`
//! 4. with `beta1`: `m = beta1 * m + (1 - beta1) * u`, and m in place of u
//! 5. `p = p * (1 - wd * rate) - u`
//!
//! State: `exp_avg_sq_row`, `exp_avg_sq_col` (or `exp_avg_sq`), `exp_avg` with `beta1`.
//! Set gradient clipping to 0: step 3 clips already. <https://arxiv.org/abs/1804.04235>

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, check, check_beta, check_not_negative, check_positive};
use crate::factored::{Matrices, rms};
use crate::plain::{self, clip_factor, mix};
use crate::slot::{Buffer, Slot};
use crate::stepper::{Rule, RuleConfig, Stepper};
use crate::table::{GroupDefaults, Table};

/// Options of [`Adafactor`].
///
/// | name | default | meaning | range |
/// |---|---|---|---|
/// | `lr` | none | fixed rate; needed without `relative_step`, refused with it | 0 or more |
/// | `eps` | (1e-30, 1e-3) | added to the squares; least parameter scale | above 0 |
/// | `clip_threshold` | 1 | largest root mean square of an update | above 0 |
/// | `decay_rate` | -0.8 | power in the decay of the second moment | below 0 |
/// | `beta1` | none | decay of a first moment | [0, 1) |
/// | `weight_decay` | 0 | | 0 or more |
/// | `scale_parameter` | true | steps relative to the size of the tensor | |
/// | `relative_step` | true | rate from the step number | |
/// | `warmup_init` | false | slower start; needs `relative_step` | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdafactorConfig {
    /// Fixed learning rate.
    pub lr: Option<f64>,
    /// Added to the squares; least scale of a tensor.
    pub eps: (f64, f64),
    /// Largest root mean square of an update.
    pub clip_threshold: f64,
    /// Power in the decay of the second moment.
    pub decay_rate: f64,
    /// Decay rate of a first moment.
    pub beta1: Option<f64>,
    /// Weight decay.
    pub weight_decay: f64,
    /// Make steps relative to the size of the tensor.
    pub scale_parameter: bool,
    /// Take the rate from the step number.
    pub relative_step: bool,
    /// Start slower.
    pub warmup_init: bool,
}

impl Default for AdafactorConfig {
    fn default() -> Self {
        Self {
            lr: None,
            eps: (1e-30, 1e-3),
            clip_threshold: 1.0,
            decay_rate: -0.8,
            beta1: None,
            weight_decay: 0.0,
            scale_parameter: true,
            relative_step: true,
            warmup_init: false,
        }
    }
}

impl RuleConfig for AdafactorConfig {
    fn validate(&self) -> Result<()> {
        if let Some(lr) = self.lr {
            check_not_negative("lr", lr)?;
        }
        check_positive("eps", self.eps.0)?;
        check_positive("eps", self.eps.1)?;
        check_positive("clip_threshold", self.clip_threshold)?;
        check(
            self.decay_rate < 0.0,
            "decay_rate",
            self.decay_rate,
            "a number below 0, usually -0.8",
        )?;
        if let Some(beta1) = self.beta1 {
            check_beta("beta1", beta1)?;
        }
        check_not_negative("weight_decay", self.weight_decay)?;
        let refuse = |what: &str, instead| {
            Err(Error::Combination {
                what: what.into(),
                instead,
            })
        };
        match (self.relative_step, self.lr, self.warmup_init) {
            (true, Some(_), _) => refuse(
                "lr and relative_step",
                "leave lr out, or set relative_step to false for a fixed rate",
            ),
            (false, _, true) => refuse(
                "warmup_init without relative_step",
                "set relative_step to true, or use a schedule with warm-up",
            ),
            (false, None, _) => refuse("relative_step = false without lr", "give lr"),
            _ => Ok(()),
        }
    }

    fn defaults(&self) -> GroupDefaults {
        GroupDefaults {
            lr: self.lr.unwrap_or(0.0),
            weight_decay: self.weight_decay,
            betas: None,
            eps: None,
        }
    }
}

/// Adafactor: almost no state.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use lora_optim::{Adafactor, AdafactorConfig, Optimizer, ParamGroup};
/// let w = Var::ones((3, 2), DType::F32, &Device::Cpu)?;
/// let groups = vec![ParamGroup::new("all", vec![("w".into(), w.clone())])];
/// let config = AdafactorConfig { lr: Some(0.25), relative_step: false, scale_parameter: false, ..Default::default() };
/// let mut optimizer = Adafactor::new(groups, config)?;
/// optimizer.step(&w.as_tensor().sqr()?.sum_all()?.backward()?)?;
/// assert_eq!(w.mean_all()?.to_scalar::<f32>()?, 0.75);
/// # Ok::<(), lora_optim::Error>(())
/// ```
pub type Adafactor = Stepper<AdafactorRule>;

const ROW: usize = 0;
const COL: usize = 1;
const V: usize = 2;
const M: usize = 3;

/// The update rule of [`Adafactor`].
#[derive(Debug)]
pub struct AdafactorRule {
    /// Rate of each group's first parameter in the last step.
    shown: Vec<f64>,
}

impl Rule for AdafactorRule {
    type Config = AdafactorConfig;
    const NAME: &'static str = "Adafactor";
    const BUFFERS: &'static [&'static str] =
        &["exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "exp_avg"];

    fn new(config: &AdafactorConfig, table: &Table) -> Result<Self> {
        if config.relative_step && table.groups.iter().any(|g| g.lr.is_some()) {
            return Err(Error::Combination {
                what: "a group's lr and relative_step".into(),
                instead: "leave the groups' lr out, or set relative_step to false",
            });
        }
        Ok(Self {
            shown: table.per_group(|_, n| n.lr),
        })
    }

    fn update(&mut self, config: &AdafactorConfig, table: &mut Table) -> Result<()> {
        let numbers = table.per_group(|g, n| (table.rate(g), *n));
        table.for_each_sum(|slot| {
            let (lr, n) = numbers[slot.group];
            step(
                config,
                if config.relative_step { None } else { Some(lr) },
                n.multiplier,
                n.weight_decay,
                slot,
            )
        })?;
        for slot in table.slots.iter().rev().filter(|s| s.grad.is_some()) {
            self.shown[slot.group] = slot.sums[0];
        }
        Ok(())
    }

    fn shown_lr(&self, group: usize) -> Option<f64> {
        Some(self.shown[group])
    }

    fn scalars(&self) -> Vec<(&'static str, Vec<f64>)> {
        vec![("rate", self.shown.clone())]
    }

    fn set_scalars(&mut self, values: &[Vec<f64>]) {
        self.shown.clone_from(&values[0]);
    }
}

fn step(
    config: &AdafactorConfig,
    lr: Option<f64>,
    multiplier: f64,
    decay: f64,
    slot: &mut Slot,
) -> Result<()> {
    let t = slot.steps as f64;
    let numbers = Numbers {
        rate: lr.unwrap_or_else(|| {
            multiplier * (1.0 / t.sqrt()).min(if config.warmup_init { 1e-6 * t } else { 1e-2 })
        }),
        beta: 1.0 - t.powf(config.decay_rate),
        decay,
    };
    if slot.plain {
        step_tensors(config, &numbers, slot)
    } else {
        step_slices(config, &numbers, slot)
    }
}

/// Numbers of one parameter's step.
struct Numbers {
    /// Before the scale of the parameter.
    rate: f64,
    beta: f64,
    decay: f64,
}

fn step_slices(config: &AdafactorConfig, numbers: &Numbers, slot: &mut Slot) -> Result<()> {
    let (scale, len) = (slot.grad_scale, slot.numel());
    let matrices = Matrices::of(slot.dims());
    if config.beta1.is_some() && slot.buffers[M].is_none() {
        slot.buffers[M] = Some(Buffer::F32(vec![0.0; len]));
    }
    match matrices {
        Some(matrices) if slot.buffers[ROW].is_none() => {
            let (rows, cols) = matrices.zeros();
            (slot.buffers[ROW], slot.buffers[COL]) = (Some(rows), Some(cols));
        }
        None if slot.buffers[V].is_none() => slot.buffers[V] = Some(Buffer::F32(vec![0.0; len])),
        _ => {}
    }
    let Numbers { beta, decay, .. } = *numbers;
    let rate = slot.on_host(|p, g, buffers| {
        let mut rate = numbers.rate;
        if config.scale_parameter {
            rate *= rms(p).max(config.eps.1);
        }
        let square = |i: usize| (g[i] * scale) * (g[i] * scale) + config.eps.0 as f32;
        let mut squares = 0.0f64;
        let mut update = Update {
            rate: rate as f32,
            beta1: config.beta1,
            keep: (1.0 - decay * rate) as f32,
        };
        let (front, back) = buffers.split_at_mut(M);
        let m = back[0].as_mut().map(Buffer::f32_mut);
        let mut count = |u: f32| squares += f64::from(u) * f64::from(u);
        match (front, matrices) {
            ([Some(rows), Some(cols), _], Some(matrices)) => {
                matrices.update(rows.f32_mut(), cols.f32_mut(), beta, square);
                matrices.for_each(rows.f32(), cols.f32(), |i, f| count(g[i] * scale * f));
                update.clip(squares, len, config.clip_threshold);
                let mut m = m;
                matrices.for_each(rows.f32(), cols.f32(), |i, f| {
                    update.apply(
                        &mut p[i],
                        m.as_deref_mut().map(|m| &mut m[i]),
                        g[i] * scale * f,
                    )
                });
            }
            ([.., Some(v)], None) => {
                let v = v.f32_mut();
                for (i, v) in v.iter_mut().enumerate() {
                    *v = *v * beta as f32 + square(i) * (1.0 - beta) as f32;
                    count(g[i] * scale * (1.0 / v.sqrt()));
                }
                update.clip(squares, len, config.clip_threshold);
                let mut m = m;
                for (i, v) in v.iter().enumerate() {
                    update.apply(
                        &mut p[i],
                        m.as_deref_mut().map(|m| &mut m[i]),
                        g[i] * scale * (1.0 / v.sqrt()),
                    );
                }
            }
            _ => return Err(Error::state("Adafactor's second moment is missing")),
        }
        Ok(rate)
    })?;
    slot.sums[0] = rate;
    Ok(())
}

/// The same with whole tensors. The rate of a scaled parameter stays on the device; it
/// comes back with those of all others, to be shown.
fn step_tensors(config: &AdafactorConfig, numbers: &Numbers, slot: &mut Slot) -> Result<()> {
    let Numbers { beta, decay, .. } = *numbers;
    let (p, g) = (slot.weights_tensor(), slot.grad_tensor()?);
    let squares = g.sqr()?.affine(1.0, config.eps.0)?;
    let mut update = match Matrices::of(slot.dims()) {
        Some(matrices) => {
            if slot.buffers[ROW].is_none() {
                let (rows, cols) = matrices.zeros_on(p.device())?;
                slot.put_state(ROW, rows);
                slot.put_state(COL, cols);
            }
            let (rows, cols) = (slot.state_tensor(ROW)?, slot.state_tensor(COL)?);
            let (rows, cols) = matrices.updated(rows, cols, beta, &squares)?;
            let update = matrices.normalised(&g, &rows, &cols)?;
            slot.put_state(ROW, rows);
            slot.put_state(COL, cols);
            update.reshape(slot.dims())?
        }
        None => {
            slot.ensure_zeros(V)?;
            let v = mix(slot.state_tensor(V)?, beta, &squares, 1.0 - beta)?;
            let update = (g * v.sqrt()?.recip()?)?;
            slot.put_state(V, v);
            update
        }
    };
    let clip = clip_factor(&update, config.clip_threshold)?;
    let kept = if config.scale_parameter {
        let rate = plain::rms(&p)?
            .maximum(config.eps.1)?
            .affine(numbers.rate, 0.0)?;
        update = update.broadcast_mul(&(clip * &rate)?)?;
        let kept = p.broadcast_mul(&rate.affine(-decay, 1.0)?)?;
        slot.restore_device_sums(vec![rate]);
        kept
    } else {
        slot.sums[0] = numbers.rate;
        update = update.broadcast_mul(&clip.affine(numbers.rate, 0.0)?)?;
        p.affine(1.0 - decay * numbers.rate, 0.0)?
    };
    if let Some(beta1) = config.beta1 {
        slot.ensure_zeros(M)?;
        update = mix(slot.state_tensor(M)?, beta1, &update, 1.0 - beta1)?;
        slot.put_state(M, update.clone());
    }
    slot.put_weights(&(kept - update)?)
}

/// The last part of a step: scale, first moment, decay, subtraction.
struct Update {
    rate: f32,
    beta1: Option<f64>,
    keep: f32,
}

impl Update {
    /// Takes the clipping into the rate.
    fn clip(&mut self, squares: f64, len: usize, threshold: f64) {
        let rms = (squares / len.max(1) as f64).sqrt();
        self.rate = (f64::from(self.rate) / (rms / threshold).max(1.0)) as f32;
    }

    #[inline]
    fn apply(&self, p: &mut f32, m: Option<&mut f32>, u: f32) {
        let mut u = u * self.rate;
        if let (Some(m), Some(beta1)) = (m, self.beta1) {
            *m = *m * beta1 as f32 + u * (1.0 - beta1) as f32;
            u = *m;
        }
        *p = *p * self.keep - u;
    }
}
