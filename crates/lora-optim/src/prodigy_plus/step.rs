//! One parameter's step of Prodigy+.

use crate::error::{Error, Result};
use crate::factored::rms;
use crate::lane::lerp;
use crate::prodigy_plus::second_moment::{self, Factoring};
use crate::prodigy_plus::tensors;
use crate::prodigy_plus::{M, P0, ProdigyPlusConfig, S, SPEED, Z};
use crate::rounding::nearest;
use crate::slot::{Buffer, Slot};

/// Statistics take every so-manieth value.
pub(super) const STRIDE: usize = 11;

/// Numbers that all parameters of a group share in a step.
#[derive(Debug, Clone, Copy)]
pub(super) struct GroupStep {
    pub(super) d: f64,
    pub(super) dlr: f64,
    pub(super) b1: f64,
    pub(super) b2: f64,
    pub(super) beta3: f64,
    /// False while RAdam's rectification is undefined.
    pub(super) settled: bool,
    pub(super) k: f64,
    pub(super) c: f64,
    pub(super) xy: f64,
    pub(super) weight_sum: f64,
    pub(super) weight_decay: f64,
    /// d is still being estimated.
    pub(super) adapting: bool,
}

/// Steps one parameter; returns its part of the numerator and of the denominator, and 1
/// when it moved.
pub(super) fn step(
    config: &ProdigyPlusConfig,
    group: &GroupStep,
    slot: &mut Slot,
) -> Result<[f64; 4]> {
    let factoring = Factoring::of(slot.dims(), config.narrow_row_mean)
        .filter(|_| config.factored && !config.use_focus);
    if slot.plain {
        let moved = tensors::step(config, group, factoring, slot)?;
        return Ok([0.0, 0.0, f64::from(u8::from(moved)), 0.0]);
    }
    let (scale, len) = (slot.grad_scale, slot.numel());
    slot.on_host(|p, g, buffers| {
        prepare(config, factoring, p, buffers);
        let grad = |i: usize| g[i] * scale;
        let mut work = Work {
            config,
            group,
            factoring,
            update: Vec::with_capacity(len),
        };
        let Some(denominators) = work.second_moment(p, &grad, buffers) else {
            return Ok([0.0; 4]);
        };
        if !config.use_schedulefree {
            work.first_moment(p, &denominators, buffers);
        }
        work.limit(p, buffers);
        let start = if config.use_schedulefree {
            buffers[Z].clone()
        } else {
            None
        };
        let point = start.as_ref().map_or(&*p, Buffer::f32);
        let [numerator, denominator] = statistics(config, group, point, &grad, buffers)?;
        if config.use_schedulefree {
            work.move_average(p, buffers)
        } else {
            work.move_plain(p)
        }
        Ok([numerator, denominator, 1.0, 0.0])
    })
}

fn statistics_buffer(config: &ProdigyPlusConfig, values: Vec<f32>) -> Buffer {
    if config.bf16_statistics {
        Buffer::Bf16(
            values
                .into_iter()
                .map(|x| nearest(x, candle_core::DType::BF16))
                .collect(),
        )
    } else {
        Buffer::F32(values)
    }
}

fn start(config: &ProdigyPlusConfig, p: &[f32]) -> Buffer {
    let zero = p.iter().all(|x| *x == 0.0);
    statistics_buffer(
        config,
        if zero {
            vec![0.0]
        } else {
            p.iter().copied().step_by(STRIDE).collect()
        },
    )
}

/// Creates the state at the first gradient.
fn prepare(
    config: &ProdigyPlusConfig,
    factoring: Option<Factoring>,
    p: &[f32],
    buffers: &mut [Option<Buffer>],
) {
    let first = if config.use_schedulefree { Z } else { M };
    if buffers[first].is_some() {
        return;
    }
    buffers[first] = Some(Buffer::F32(if config.use_schedulefree {
        p.to_vec()
    } else {
        vec![0.0; p.len()]
    }));
    second_moment::prepare(factoring, p.len(), buffers);
    buffers[P0] = Some(start(config, p));
    if !config.use_speed {
        buffers[S] = Some(statistics_buffer(
            config,
            vec![0.0; p.len().div_ceil(STRIDE)],
        ));
    }
}

/// Keeps x0 - x through a scaling by `factor`; starts anew without one.
pub(super) fn rebase(
    config: &ProdigyPlusConfig,
    slot: &mut Slot,
    factor: Option<f64>,
) -> Result<()> {
    if slot.buffers[P0].is_none() {
        return Ok(());
    }
    // What the statistics subtract is z (still unscaled here) when averaging, else p.
    let share = factor.filter(|f| *f != 0.0).map(|f| {
        if config.use_schedulefree {
            f - 1.0
        } else {
            1.0 - 1.0 / f
        }
    });
    if slot.plain {
        return tensors::rebase(config, slot, share);
    }
    let now = slot.weights()?;
    let now = now.f32();
    slot.buffers[P0] = match (share, &slot.buffers[P0], &slot.buffers[Z]) {
        (Some(share), Some(p0), z) => {
            let moved = z.as_ref().map_or(now, Buffer::f32);
            let p0 = p0.f32();
            let at = |i: usize| if p0.len() == 1 { p0[0] } else { p0[i] };
            let moved = moved.iter().step_by(STRIDE).enumerate();
            Some(statistics_buffer(
                config,
                moved.map(|(i, x)| at(i) + x * share as f32).collect(),
            ))
        }
        _ => Some(start(config, now)),
    };
    Ok(())
}

/// An update under construction.
struct Work<'a> {
    config: &'a ProdigyPlusConfig,
    group: &'a GroupStep,
    factoring: Option<Factoring>,
    update: Vec<f32>,
}

impl Work<'_> {
    /// The numerator divided by the denominator, in the chosen way.
    fn divide(&self, numerator: f32, denominator: f32, weight: f32) -> f32 {
        match self.config.eps {
            _ if self.config.use_focus => sign(numerator) - 0.1 * sign(denominator - weight),
            None => numerator.atan2(denominator) * 1.273_239_5,
            Some(eps) => numerator / (denominator + (self.group.d * eps) as f32),
        }
    }

    /// Takes the gradient into the second moment. Leaves the update (schedule-free) or
    /// what the first moment takes in [`Work::update`]; returns the denominators, or
    /// `None` when this step only collects.
    fn second_moment(
        &mut self,
        p: &[f32],
        grad: &dyn Fn(usize) -> f32,
        buffers: &mut [Option<Buffer>],
    ) -> Option<Vec<f32>> {
        let (config, group) = (self.config, self.group);
        let z = if config.use_schedulefree {
            buffers[Z].take()
        } else {
            None
        };
        let weight = |i: usize| z.as_ref().map_or(p[i], |z| z.f32()[i]);
        let root = !config.use_focus;
        let collect = config.use_adopt && group.k == 1.0;
        let mut denominators = vec![0.0f32; p.len()];
        if config.use_adopt && !collect {
            second_moment::denominator(self.factoring, buffers, root, &mut denominators);
        }
        let b2 = if collect { 0.0 } else { group.b2 };
        if config.use_focus {
            second_moment::update(self.factoring, buffers, b2, group.d, false, weight);
        } else {
            second_moment::update(self.factoring, buffers, b2, group.d, true, grad);
        }
        if !config.use_adopt {
            second_moment::denominator(self.factoring, buffers, root, &mut denominators);
        }
        if !collect {
            let d = group.d as f32;
            let reach = group.k.powf(0.25) as f32;
            let divided =
                |i: usize, numerator: f32| self.divide(numerator, denominators[i], weight(i));
            self.update = (0..p.len())
                .map(|i| match (config.use_schedulefree, config.use_adopt) {
                    (true, _) if !group.settled => grad(i),
                    (true, _) => divided(i, grad(i) * d),
                    (false, true) => divided(i, grad(i)).clamp(-reach, reach),
                    (false, false) => grad(i),
                })
                .collect();
        }
        if let Some(z) = z {
            buffers[Z] = Some(z);
        }
        (!collect).then_some(denominators)
    }

    /// Without averaging: the first moment of what [`Work::update`] holds becomes the update.
    fn first_moment(&mut self, p: &[f32], denominators: &[f32], buffers: &mut [Option<Buffer>]) {
        let Some(m) = &mut buffers[M] else { return };
        let (keep, gain) = (
            self.group.b1 as f32,
            ((1.0 - self.group.b1) * self.group.d) as f32,
        );
        let mut update = std::mem::take(&mut self.update);
        let moments = m.f32_mut().iter_mut().zip(denominators.iter().zip(p));
        for (u, (m, (denominator, p))) in update.iter_mut().zip(moments) {
            *m = *m * keep + *u * gain;
            let numerator = if self.config.use_grams {
                m.abs() * sign(*u)
            } else {
                *m
            };
            *u = if self.config.use_adopt {
                numerator
            } else {
                self.divide(numerator, *denominator, *p)
            };
        }
        self.update = update;
    }

    /// Orthogonal gradients and the limit on the root mean square.
    fn limit(&mut self, p: &[f32], buffers: &[Option<Buffer>]) {
        if self.config.use_orthograd {
            let z = if self.config.use_schedulefree {
                buffers[Z].as_ref()
            } else {
                None
            };
            orthogonal(&mut self.update, z.map_or(p, Buffer::f32));
        }
        if self.config.use_stableadamw && self.config.eps.is_some() {
            let factor = (1.0 / rms(&self.update).max(1.0).sqrt()) as f32;
            self.update.iter_mut().for_each(|u| *u *= factor);
        }
    }

    fn move_plain(&self, p: &mut [f32]) {
        let (decay, dlr) = (self.group.weight_decay, self.group.dlr);
        let keep = (1.0
            - if self.config.weight_decay_by_lr {
                decay * dlr
            } else {
                decay
            }) as f32;
        for (p, u) in p.iter_mut().zip(&self.update) {
            *p = *p * keep - u * dlr as f32;
        }
    }

    fn move_average(&mut self, y: &mut [f32], buffers: &mut [Option<Buffer>]) {
        let Some(z) = &mut buffers[Z] else { return };
        let z = z.f32_mut();
        let (config, group) = (self.config, self.group);
        let (c, dlr, y_rate) = (
            group.c as f32,
            group.dlr as f32,
            (group.dlr * group.xy) as f32,
        );
        let decay = group.weight_decay as f32;
        if decay != 0.0 && config.weight_decay_by_lr {
            self.update
                .iter_mut()
                .zip(&*y)
                .for_each(|(u, y)| *u += decay * y);
        }
        let fixed = if config.weight_decay_by_lr {
            0.0
        } else {
            group.weight_decay
        };
        let (z_decay, y_decay) = (fixed as f32, (fixed * group.xy) as f32);
        let toward = |y: f32, z: f32, u: f32| (y - z) * c + u * y_rate;
        let mut share = 1.0;
        if config.use_cautious {
            let pairs = self.update.iter().zip(y.iter().zip(z.iter()));
            let kept = pairs
                .filter(|(u, (y, z))| **u * toward(**y, **z, **u) > 0.0)
                .count();
            share = 1.0 / (kept as f32 / y.len().max(1) as f32).max(1e-3);
        }
        for ((y, z), u) in y.iter_mut().zip(z).zip(&self.update) {
            let before = *y;
            if config.use_cautious || config.use_grams {
                let step = toward(*y, *z, *u);
                *y -= match config.use_cautious {
                    true if *u * step > 0.0 => step * share,
                    true => 0.0,
                    false => step.abs() * sign(*u),
                };
            } else {
                *y = lerp(*y, *z, c) - u * y_rate;
            }
            *z -= u * dlr;
            if fixed != 0.0 {
                *z -= before * z_decay;
                *y -= before * y_decay;
            }
        }
    }
}

/// Takes off the part along `weights`, keeping the length.
fn orthogonal(update: &mut [f32], weights: &[f32]) {
    let dot = |a: &[f32], b: &[f32]| {
        a.iter()
            .zip(b)
            .map(|(x, y)| f64::from(*x) * f64::from(*y))
            .sum::<f64>()
    };
    let square = dot(weights, weights);
    if square.sqrt() <= 1e-30 {
        return;
    }
    let length = dot(update, update).sqrt();
    let along = (dot(weights, update) / (square + 1e-30)) as f32;
    update
        .iter_mut()
        .zip(weights)
        .for_each(|(u, w)| *u -= along * w);
    let factor = (length / (dot(update, update).sqrt() + 1e-30)) as f32;
    update.iter_mut().for_each(|u| *u *= factor);
}

/// The parameter's part of the numerator and the denominator of d.
fn statistics(
    config: &ProdigyPlusConfig,
    group: &GroupStep,
    point: &[f32],
    grad: &dyn Fn(usize) -> f32,
    buffers: &mut [Option<Buffer>],
) -> Result<[f64; 2]> {
    if !group.adapting {
        (buffers[S], buffers[P0]) = (None, None);
        return Ok([0.0; 2]);
    }
    let (front, back) = buffers.split_at_mut(S);
    let Some(p0) = &front[P0] else {
        return Err(Error::state("p0 is missing"));
    };
    let p0 = p0.f32();
    let start = |i: usize| if p0.len() == 1 { p0[0] } else { p0[i] };
    let displacement = || {
        point
            .iter()
            .step_by(STRIDE)
            .enumerate()
            .map(|(i, x)| start(i) - x)
    };
    let gradient = |i: usize| grad(i * STRIDE);
    let gain = group.d * group.d / config.d0.sqrt();
    let products = displacement().enumerate();
    let products = products.map(|(i, u)| f64::from(gradient(i)) * f64::from(u));
    let dot = config.rounded(products.sum());
    if config.use_speed {
        return Ok(speed(
            group.k,
            gain,
            dot,
            displacement(),
            &mut back[SPEED - S],
        ));
    }
    let Some(s) = &mut back[0] else {
        return Err(Error::state("s is missing"));
    };
    let round = |x: f32| {
        if config.bf16_statistics {
            nearest(x, candle_core::DType::BF16)
        } else {
            x
        }
    };
    let mut sum = 0.0f64;
    for (i, s) in s.f32_mut().iter_mut().enumerate() {
        *s = round(round(*s * group.beta3 as f32) + gradient(i) * gain as f32);
        sum += f64::from(s.abs());
    }
    Ok([config.rounded(gain) * dot, f64::from(round(sum as f32))])
}

/// The variant that needs no running sum of gradients: a running mean of the dot product
/// over the largest distance so far.
fn speed(
    k: f64,
    gain: f64,
    dot: f64,
    displacement: impl Iterator<Item = f32>,
    memory: &mut Option<Buffer>,
) -> [f64; 2] {
    let (l1, square) = displacement.fold((0.0f64, 0.0f64), |(l1, square), u| {
        (l1 + f64::from(u.abs()), square + f64::from(u).powi(2))
    });
    let memory = memory.get_or_insert_with(|| Buffer::F32(vec![dot as f32, 1e-8, 1e-8]));
    let [mean, most_l1, most_l2] = memory.f32_mut() else {
        return [0.0; 2];
    };
    let beta = 1.0 - k.powf(-0.75);
    *mean = (f64::from(*mean) * beta + dot * (1.0 - beta)) as f32;
    *most_l1 = most_l1.max(l1 as f32);
    *most_l2 = most_l2.max(square.sqrt() as f32);
    let l2 = f64::from(*most_l2);
    [
        gain / ((l2 + 1.0) * (l2 + 1.0)) * f64::from(*mean) / f64::from(*most_l1),
        l2,
    ]
}

/// -1, 0 or 1.
fn sign(x: f32) -> f32 {
    crate::lane::Lane::sign(x)
}
