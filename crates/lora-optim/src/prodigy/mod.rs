//! Prodigy (Mishchenko and Defazio 2024): Adam that estimates its own step size.
//!
//! `d` is a lower bound on the distance from the start x0 to the solution; the step is
//! `d * lr`, so `lr` is a pure multiplier and normally 1. With `bc = 1` (or the bias
//! correction `sqrt(1 - b2^(k+1)) / (1 - b1^(k+1))`), `dlr = d * lr * bc` and d as it was
//! before the step:
//!
//! 1. `g = g + wd * p` (only without `decouple`)
//! 2. `delta += d / d0 * dlr * sum(g * (x0 - p))`
//! 3. `m = b1 * m + d * (1 - b1) * g`, `v = b2 * v + d^2 * (1 - b2) * g^2`
//! 4. `s = b3 * s + d / d0 * dlr * g` (with `safeguard_warmup`: `d` in place of `dlr`), `den += sum |s|`
//! 5. `den == 0`: the step ends here. Otherwise `num = b3 * num + delta`,
//!    `d_hat = d_coef * num / den`; `d` becomes the largest `d_hat` so far, growing by no
//!    more than `growth_rate` per step
//! 6. `p = p * (1 - wd * dlr)`; `p = p - dlr * m / (sqrt(v) + d * eps)` with the new d in the last term
//!
//! State: `exp_avg` m, `exp_avg_sq` v, `s`, `p0` the start (a single 0 for tensors that
//! start at zero). Follows `prodigyopt` 1.1.2 number by number; beyond it: one d per group
//! (`split_groups`), [`crate::ParamGroup::multiplier`] under a shared d, `d_limit`,
//! `freeze_d_after`, `limit_first_jump`, `init_d`, `exact_displacement`.
//! <https://arxiv.org/abs/2306.06101>

mod config;
mod kernels;
mod sliced;

pub use config::ProdigyConfig;

use crate::error::{Error, Result};
use crate::plain::every;
use crate::prodigy::kernels::{Apply, Both, Moments, Statistics, WithDisplacement};
use crate::prodigy::sliced::{sliced, sliced_tensors, start};
use crate::slot::{Buffer, Slot, Source};
use crate::stepper::{Rule, Stepper};
use crate::table::Table;

/// Prodigy: `lr` 1 and no learning rate to tune.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use lora_optim::{Optimizer, ParamGroup, Prodigy, ProdigyConfig};
/// let x = Var::zeros(3, DType::F32, &Device::Cpu)?;
/// let target = Tensor::new(&[1f32, -2., 3.], &Device::Cpu)?;
/// let groups = vec![ParamGroup::new("x", vec![("x".into(), x.clone())])];
/// let mut prodigy = Prodigy::new(groups, ProdigyConfig::default())?;
/// for _ in 0..200 {
///     let loss = (x.as_tensor() - &target)?.sqr()?.sum_all()?;
///     prodigy.step(&loss.backward()?)?;
/// }
/// let distance = (x.as_tensor() - &target)?.sqr()?.sum_all()?.to_scalar::<f32>()?;
/// assert!(distance < 0.01 && prodigy.effective_lr(0) > 1e-3);
/// # Ok::<(), lora_optim::Error>(())
/// ```
pub type Prodigy = Stepper<ProdigyRule>;

const M: usize = 0;
const V: usize = 1;
const S: usize = 2;
const P0: usize = 3;
const U: usize = 4;

/// The estimate of d: one for all groups, or one for each.
#[derive(Debug, Clone, Copy)]
struct Estimate {
    d: f64,
    d_max: f64,
    d_hat: f64,
    numerator: f64,
    denominator: f64,
    k: f64,
}

const MIXED: &str = "give every group the same lr (unet_lr, text_encoder_lr; no LoRA+ ratio, no block weights), or add split_groups=True to the optimizer's arguments for one d per group; programs may set ParamGroup::multiplier instead";

/// The update rule of [`Prodigy`].
#[derive(Debug)]
pub struct ProdigyRule {
    estimates: Vec<Estimate>,
    split: bool,
}

impl ProdigyRule {
    fn estimate_of(&self, group: usize) -> usize {
        if self.split { group } else { 0 }
    }

    /// The learning rate of each estimate; groups that share one must agree or be 0.
    fn shared_lrs(&self, config: &ProdigyConfig, table: &Table) -> Result<Vec<f64>> {
        for g in 0..table.groups.len() {
            if table.numbers[g].lr == 0.0 && config.betas.0 == 0.0 {
                return Err(Error::Combination {
                    what: "beta1 = 0 and a group with lr 0".into(),
                    instead: "leave the group out of the optimizer, or use beta1 > 0 (its first step would divide by d * eps)",
                });
            }
        }
        let groups = 0..table.groups.len();
        let members = |e| groups.clone().filter(move |g| self.estimate_of(*g) == e);
        (0..self.estimates.len())
            .map(|e| table.shared_lr(members(e), MIXED))
            .collect()
    }
}

/// Numbers of one group's step.
#[derive(Debug, Clone, Copy)]
struct GroupStep {
    estimate: usize,
    active: bool,
    d: f64,
    dlr: f64,
    decay: f64,
    eps: f64,
    multiplier: f64,
}

impl Rule for ProdigyRule {
    type Config = ProdigyConfig;
    const NAME: &'static str = "Prodigy";
    const BUFFERS: &'static [&'static str] = &["exp_avg", "exp_avg_sq", "s", "p0", "displacement"];

    fn new(config: &ProdigyConfig, table: &Table) -> Result<Self> {
        let d = config.init_d.unwrap_or(config.d0);
        let fresh = Estimate {
            d,
            d_max: d,
            d_hat: f64::NAN,
            numerator: 0.0,
            denominator: f64::NAN,
            k: 0.0,
        };
        let count = if config.split_groups {
            table.groups.len()
        } else {
            1
        };
        let rule = Self {
            estimates: vec![fresh; count],
            split: config.split_groups,
        };
        rule.shared_lrs(config, table)?;
        Ok(rule)
    }

    fn update(&mut self, config: &ProdigyConfig, table: &mut Table) -> Result<()> {
        let lrs = self.shared_lrs(config, table)?;
        let (b1, b2) = config.betas;
        let b3 = config.beta3.unwrap_or_else(|| b2.sqrt());
        let steps = table.per_group(|g, n| {
            let e = self.estimate_of(g);
            let Estimate { d, k, .. } = self.estimates[e];
            let t = k as i32 + 1;
            let correction = if config.use_bias_correction {
                (1.0 - b2.powi(t)).sqrt() / (1.0 - b1.powi(t))
            } else {
                1.0
            };
            GroupStep {
                estimate: e,
                active: table.lr(g) > 0.0,
                d,
                dlr: d * lrs[e] * correction,
                decay: n.weight_decay,
                eps: n.eps,
                multiplier: n.multiplier,
            }
        });
        let frozen: Vec<bool> = self
            .estimates
            .iter()
            .map(|e| config.freeze_d_after.is_some_and(|n| e.k >= n as f64))
            .collect();

        table.for_each_sum(|slot| {
            let step = &steps[slot.group];
            prepare(config, slot)?;
            if step.active {
                gather(config, b3, step, frozen[step.estimate], slot)
            } else {
                Ok(())
            }
        })?;

        let mut delta = vec![0.0; self.estimates.len()];
        let mut denominator = vec![0.0; self.estimates.len()];
        for slot in table.active() {
            let step = &steps[slot.group];
            if step.active {
                delta[step.estimate] += step.d / config.d0 * step.dlr * slot.sums[0];
                denominator[step.estimate] += step.multiplier * slot.sums[1];
            }
        }
        for (e, estimate) in self.estimates.iter_mut().enumerate() {
            if !frozen[e] && denominator[e] != 0.0 {
                estimate.update(config, b3 * estimate.numerator + delta[e], denominator[e]);
            }
        }

        let estimates = &self.estimates;
        let moves: Vec<bool> = (0..estimates.len())
            .map(|e| frozen[e] || denominator[e] != 0.0)
            .collect();
        table.for_each(|slot| {
            let step = &steps[slot.group];
            if moves[step.estimate] {
                apply(config, step, estimates[step.estimate].d, slot)
            } else {
                Ok(())
            }
        })?;
        for (estimate, moved) in self.estimates.iter_mut().zip(moves) {
            estimate.k += f64::from(u8::from(moved));
        }
        Ok(())
    }

    fn scalars(&self) -> Vec<(&'static str, Vec<f64>)> {
        let each = |f: fn(&Estimate) -> f64| self.estimates.iter().map(f).collect::<Vec<_>>();
        vec![
            ("d", each(|e| e.d)),
            ("d_max", each(|e| e.d_max)),
            ("d_hat", each(|e| e.d_hat)),
            ("d_numerator", each(|e| e.numerator)),
            ("d_denom", each(|e| e.denominator)),
            ("k", each(|e| e.k)),
        ]
    }

    fn set_scalars(&mut self, values: &[Vec<f64>]) {
        for (e, estimate) in self.estimates.iter_mut().enumerate() {
            let at = |i: usize| values[i][e];
            *estimate = Estimate {
                d: at(0),
                d_max: at(1),
                d_hat: at(2),
                numerator: at(3),
                denominator: at(4),
                k: at(5),
            };
        }
    }

    fn d(&self, group: usize) -> Option<f64> {
        Some(self.estimates[self.estimate_of(group)].d)
    }

    fn d_hat(&self, group: usize) -> Option<f64> {
        Some(self.estimates[self.estimate_of(group)].d_hat)
    }

    fn distance(&self, slot: &Slot) -> Result<Option<f64>> {
        let square = |values: &mut dyn Iterator<Item = f32>| {
            values.map(|x| f64::from(x) * f64::from(x)).sum::<f64>()
        };
        Ok(match (&slot.buffers[U], &slot.buffers[P0]) {
            (Some(Buffer::Device(u)), _) => {
                Some(f64::from(u.sqr()?.sum_all()?.to_scalar::<f32>()?))
            }
            (Some(u), _) => Some(square(&mut u.f32().iter().copied())),
            (None, Some(Buffer::Device(p0))) => {
                let p = match slot.weights()? {
                    Buffer::Device(p) => p,
                    other => candle_core::Tensor::from_slice(
                        other.f32(),
                        slot.dims(),
                        slot.var.device(),
                    )?,
                };
                let moved = if p0.elem_count() == 1 {
                    p.broadcast_sub(&p0.flatten_all()?)?
                } else if p0.elem_count() == p.elem_count() {
                    (p - p0.reshape(slot.dims())?)?
                } else {
                    return Ok(None);
                };
                Some(f64::from(moved.sqr()?.sum_all()?.to_scalar::<f32>()?))
            }
            (None, Some(p0)) => {
                let p = slot.weights()?;
                let (p, p0) = (p.f32(), p0.f32());
                match p0.len() {
                    n if n == p.len() => Some(square(&mut p.iter().zip(p0).map(|(a, b)| b - a))),
                    1 => Some(square(&mut p.iter().copied())),
                    _ => None,
                }
            }
            (None, None) => None,
        })
    }

    /// Scaling moves the start along, so that x0 - x stays what the optimizer itself
    /// did; replacing starts anew.
    fn weights_changed(
        &mut self,
        config: &ProdigyConfig,
        slot: &mut Slot,
        factor: Option<f64>,
    ) -> Result<()> {
        if slot.buffers[S].is_none() {
            return Ok(());
        }
        let factor = factor.filter(|f| *f != 0.0);
        if config.exact_displacement {
            if factor.is_none() {
                slot.buffers[U] = Some(slot.zeros()?);
            }
            return Ok(());
        }
        let (Some(factor), Some(p0)) = (factor, slot.buffers[P0].clone()) else {
            slot.buffers[P0] = Some(start(config.slice_p, slot)?);
            return Ok(());
        };
        let share = 1.0 - 1.0 / factor;
        slot.buffers[P0] = Some(match (slot.weights()?, p0) {
            (Buffer::Device(p), Buffer::Device(p0)) => {
                let moved = every(&p, config.slice_p)?.affine(share, 0.0)?;
                let p0 = moved.broadcast_add(&p0.flatten_all()?)?;
                Buffer::Device(if config.slice_p == 1 {
                    p0.reshape(slot.dims())?
                } else {
                    p0
                })
            }
            (p, p0) => {
                let p0 = p0.f32();
                let whole = |i: usize| if p0.len() == 1 { p0[0] } else { p0[i] };
                let moved = p.f32().iter().step_by(config.slice_p).enumerate();
                Buffer::F32(moved.map(|(i, p)| whole(i) + p * share as f32).collect())
            }
        });
        Ok(())
    }
}

impl Estimate {
    fn update(&mut self, config: &ProdigyConfig, numerator: f64, denominator: f64) {
        self.numerator = numerator;
        self.denominator = denominator;
        self.d_hat = config.d_coef * numerator / denominator;
        if self.d == config.d0 && !config.limit_first_jump {
            self.d = self.d.max(self.d_hat);
        }
        self.d_max = self.d_max.max(self.d_hat);
        self.d = self
            .d_max
            .min(self.d * config.growth_rate)
            .min(config.d_limit);
    }
}

/// Creates the state at a parameter's first gradient.
fn prepare(config: &ProdigyConfig, slot: &mut Slot) -> Result<()> {
    if slot.buffers[V].is_some() {
        return Ok(());
    }
    if config.betas.0 > 0.0 {
        slot.ensure_zeros(M)?;
    }
    slot.ensure_zeros(V)?;
    if config.slice_p > 1 {
        let len = slot.numel().div_ceil(config.slice_p);
        if slot.plain {
            slot.ensure_device_zeros(S, len)?;
        } else {
            slot.buffers[S] = Some(Buffer::F32(vec![0.0; len]));
        }
    } else {
        slot.ensure_zeros(S)?;
    }
    if config.exact_displacement {
        slot.ensure_zeros(U)
    } else {
        slot.buffers[P0] = Some(start(config.slice_p, slot)?);
        Ok(())
    }
}

/// First pass: moments and statistics.
fn gather(
    config: &ProdigyConfig,
    b3: f64,
    step: &GroupStep,
    frozen: bool,
    slot: &mut Slot,
) -> Result<()> {
    let (b1, b2) = config.betas;
    let GroupStep { d, dlr, .. } = *step;
    let coupled = if config.decouple {
        0.0
    } else {
        step.decay as f32
    };
    let moments = Moments {
        coupled,
        b1: b1 as f32,
        m_new: (d * (1.0 - b1)) as f32,
        b2: b2 as f32,
        v_new: (d * d * (1.0 - b2)) as f32,
    };
    let gain = d / config.d0 * if config.safeguard_warmup { d } else { dlr };
    let stats = Statistics {
        coupled,
        b3: b3 as f32,
        gain: gain as f32,
    };
    let (m, v, s) = (Source::State(M), Source::State(V), Source::State(S));
    let (g, p) = (Source::Grad, Source::Param);
    let zero_start = slot.numel() > 1
        && slot.buffers[P0].as_ref().is_some_and(|p0| match p0 {
            Buffer::Device(p0) => p0.elem_count() == 1,
            host => host.f32().len() == 1,
        });
    if b1 > 0.0 && config.slice_p == 1 && !config.exact_displacement && !frozen {
        let both = Both { moments, stats };
        return if zero_start {
            slot.run([m, v, s], [g, p], &both)
        } else {
            slot.run([m, v, s], [g, p, Source::State(P0)], &both)
        };
    }
    // The statistics come first: they overwrite nothing that the moments read.
    let sums = if frozen {
        [0.0; 2]
    } else if config.slice_p > 1 {
        slot.sums = [0.0; 4];
        if slot.plain {
            sliced_tensors(&stats, config.slice_p, slot)?;
            [0.0; 2]
        } else {
            sliced(&stats, config.slice_p, slot)?
        }
    } else if config.exact_displacement {
        slot.run([s], [g, p, Source::State(U)], &WithDisplacement(stats))?;
        [slot.sums[0], slot.sums[1]]
    } else if zero_start {
        slot.run([s], [g, p], &stats)?;
        [slot.sums[0], slot.sums[1]]
    } else {
        slot.run([s], [g, p, Source::State(P0)], &stats)?;
        [slot.sums[0], slot.sums[1]]
    };
    let kept = slot.keep_device_sums();
    if b1 > 0.0 {
        slot.run([m, v], [g, p], &moments)?
    } else {
        slot.run([v], [g, p], &moments)?
    }
    slot.restore_device_sums(kept);
    slot.sums[..2].copy_from_slice(&sums);
    Ok(())
}

/// Second pass: the step itself, with the new d.
fn apply(config: &ProdigyConfig, step: &GroupStep, d: f64, slot: &mut Slot) -> Result<()> {
    let dlr = step.dlr * step.multiplier;
    let decay = if config.decouple {
        step.decay * dlr
    } else {
        0.0
    };
    let (p, m, v, u) = (
        Source::Param,
        Source::State(M),
        Source::State(V),
        Source::State(U),
    );
    let mut kernel = Apply {
        decay: decay as f32,
        coupled: 0.0,
        step: dlr as f32,
        eps: (d * step.eps) as f32,
    };
    let source = if config.betas.0 > 0.0 {
        m
    } else {
        // Without a first moment the gradient takes its place, with the new d.
        kernel.step = (dlr * d) as f32;
        kernel.coupled = if config.decouple {
            0.0
        } else {
            step.decay as f32
        };
        Source::Grad
    };
    if config.exact_displacement {
        slot.run([p, u], [source, v], &kernel)
    } else {
        slot.run([p], [source, v], &kernel)
    }
}
