//! The step of Prodigy+ with whole tensors. The two sums behind d come back once per step
//! for all parameters together; every other number stays on the device.

use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::plain::{clip_factor, every, mix};
use crate::prodigy_plus::second_moment::Factoring;
use crate::prodigy_plus::step::{GroupStep, STRIDE};
use crate::prodigy_plus::{COL, M, P0, ProdigyPlusConfig, ROW, S, SPEED, V, Z};
use crate::slot::Slot;

/// Steps one parameter and leaves its parts of the numerator and of the denominator to be
/// collected; returns whether it moved.
pub(super) fn step(
    config: &ProdigyPlusConfig,
    group: &GroupStep,
    factoring: Option<Factoring>,
    slot: &mut Slot,
) -> Result<bool> {
    prepare(config, factoring, slot)?;
    let (p, g) = (slot.weights_tensor(), slot.grad_tensor()?);
    let z = if config.use_schedulefree {
        Some(slot.state_tensor(Z)?.clone())
    } else {
        None
    };
    let point = z.as_ref().unwrap_or(&p);
    let work = Work { config, group };

    let collect = config.use_adopt && group.k == 1.0;
    let before = if config.use_adopt && !collect {
        Some(denominators(config, factoring, slot)?)
    } else {
        None
    };
    let b2 = if collect { 0.0 } else { group.b2 };
    let taken = if config.use_focus { point } else { &g };
    second_moment(config, factoring, b2, group.d, taken, slot)?;
    if collect {
        return Ok(false);
    }
    let denominators = match before {
        Some(before) => before,
        None => denominators(config, factoring, slot)?,
    };

    let mut update = match (config.use_schedulefree, config.use_adopt) {
        (true, _) if group.settled => {
            work.divide(&g.affine(group.d, 0.0)?, &denominators, point)?
        }
        (false, true) => {
            let reach = group.k.powf(0.25);
            work.divide(&g, &denominators, point)?
                .clamp(-reach, reach)?
        }
        _ => g.clone(),
    };
    if !config.use_schedulefree {
        update = work.first_moment(&update, &denominators, &p, slot)?;
    }
    if config.use_orthograd {
        update = orthogonal(&update, point)?;
    }
    if config.use_stableadamw && config.eps.is_some() {
        update = update.broadcast_mul(&clip_factor(&update, 1.0)?.sqrt()?)?;
    }
    statistics(config, group, point, &g, slot)?;
    match &z {
        Some(z) => work.move_average(update, &p, z, slot)?,
        None => {
            let decay = group.weight_decay;
            let by_lr = if config.weight_decay_by_lr {
                group.dlr
            } else {
                1.0
            };
            slot.put_weights(&mix(&p, 1.0 - decay * by_lr, &update, -group.dlr)?)?;
        }
    }
    Ok(true)
}

/// Type in which the statistics are kept.
fn kept(config: &ProdigyPlusConfig) -> DType {
    if config.bf16_statistics {
        DType::BF16
    } else {
        DType::F32
    }
}

/// Creates the state at the first gradient.
fn prepare(
    config: &ProdigyPlusConfig,
    factoring: Option<Factoring>,
    slot: &mut Slot,
) -> Result<()> {
    let first = if config.use_schedulefree { Z } else { M };
    if slot.buffers[first].is_some() {
        return Ok(());
    }
    let p = slot.weights_tensor();
    if config.use_schedulefree {
        slot.buffers[Z] = Some(slot.weights()?);
    } else {
        slot.ensure_zeros(M)?;
    }
    match factoring {
        Some(factoring) => {
            let (rows, cols) = factoring.lengths();
            slot.ensure_device_zeros(ROW, rows)?;
            slot.ensure_device_zeros(COL, cols)?;
        }
        None => slot.ensure_zeros(V)?,
    }
    let start = every(&p, STRIDE)?.to_dtype(kept(config))?;
    if !config.use_speed {
        slot.put_state(S, start.zeros_like()?);
    }
    slot.put_state(P0, start.copy()?);
    Ok(())
}

/// As [`super::step::rebase`]: keeps x0 - x through a scaling, or starts anew.
pub(super) fn rebase(
    config: &ProdigyPlusConfig,
    slot: &mut Slot,
    share: Option<f64>,
) -> Result<()> {
    let now = slot.weights_tensor();
    let start = match share {
        Some(share) => {
            let moved = if slot.buffers[Z].is_some() {
                slot.state_tensor(Z)?
            } else {
                &now
            };
            let moved = every(moved, STRIDE)?.affine(share, 0.0)?;
            let p0 = slot.state_tensor(P0)?.to_dtype(DType::F32)?;
            moved.broadcast_add(&p0.flatten_all()?)?
        }
        None => every(&now, STRIDE)?.copy()?,
    };
    slot.put_state(P0, start.to_dtype(kept(config))?);
    Ok(())
}

/// `v = b2 * v + (1 - b2) * d^2 * value^2`, whole or as means. (With focus: of the value
/// itself, not its square.)
fn second_moment(
    config: &ProdigyPlusConfig,
    factoring: Option<Factoring>,
    b2: f64,
    d: f64,
    value: &Tensor,
    slot: &mut Slot,
) -> Result<()> {
    let gain = (1.0 - b2) * d * d;
    if let Some(factoring) = factoring {
        let (rows, cols) = factoring.means(&value.sqr()?)?;
        for (index, means) in [(ROW, rows), (COL, cols)] {
            let state = slot.state_tensor(index)?.flatten_all()?;
            slot.put_state(index, mix(&state, b2, &means, gain)?);
        }
        return Ok(());
    }
    let mut taken = value.affine(gain, 0.0)?;
    if !config.use_focus {
        taken = (taken * value)?;
    }
    let v = (slot.state_tensor(V)?.affine(b2, 0.0)? + taken)?;
    slot.put_state(V, v);
    Ok(())
}

/// sqrt(v), with focus v itself.
fn denominators(
    config: &ProdigyPlusConfig,
    factoring: Option<Factoring>,
    slot: &Slot,
) -> Result<Tensor> {
    Ok(match factoring {
        Some(factoring) => {
            let product = factoring.restored(slot.state_tensor(ROW)?, slot.state_tensor(COL)?)?;
            product.sqrt()?.reshape(slot.dims())?
        }
        None if config.use_focus => slot.state_tensor(V)?.clone(),
        None => slot.state_tensor(V)?.sqrt()?,
    })
}

/// What the parts of a step share.
struct Work<'a> {
    config: &'a ProdigyPlusConfig,
    group: &'a GroupStep,
}

impl Work<'_> {
    /// The numerator divided by the denominator, in the chosen way.
    fn divide(&self, numerator: &Tensor, denominator: &Tensor, weight: &Tensor) -> Result<Tensor> {
        Ok(match self.config.eps {
            _ if self.config.use_focus => {
                let pull = (denominator - weight)?.sign()?.affine(0.1, 0.0)?;
                (numerator.sign()? - pull)?
            }
            None => angle(numerator, denominator)?.affine(f64::from(1.273_239_5f32), 0.0)?,
            Some(eps) => (numerator / denominator.affine(1.0, self.group.d * eps)?)?,
        })
    }

    /// Without averaging: takes `update` into the first moment; returns what becomes of it.
    fn first_moment(
        &self,
        update: &Tensor,
        denominators: &Tensor,
        p: &Tensor,
        slot: &mut Slot,
    ) -> Result<Tensor> {
        let group = self.group;
        let gain = (1.0 - group.b1) * group.d;
        let m = mix(slot.state_tensor(M)?, group.b1, update, gain)?;
        slot.put_state(M, m.clone());
        let numerator = if self.config.use_grams {
            (m.abs()? * update.sign()?)?
        } else {
            m
        };
        if self.config.use_adopt {
            Ok(numerator)
        } else {
            self.divide(&numerator, denominators, p)
        }
    }

    /// Moves y (the parameter) and z.
    fn move_average(&self, update: Tensor, y: &Tensor, z: &Tensor, slot: &mut Slot) -> Result<()> {
        let (config, group) = (self.config, self.group);
        let decay = group.weight_decay;
        let update = if decay != 0.0 && config.weight_decay_by_lr {
            (update + y.affine(decay, 0.0)?)?
        } else {
            update
        };
        let step = update.affine(group.dlr * group.xy, 0.0)?;
        let toward = || -> Result<Tensor> { Ok(((y - z)?.affine(group.c, 0.0)? + &step)?) };
        let mut next_y = if config.use_cautious {
            let toward = toward()?;
            let agree = (&update * &toward)?.gt(0f32)?.to_dtype(DType::F32)?;
            let share = agree.mean_all()?.maximum(1e-3)?.recip()?;
            (y - (toward * agree)?.broadcast_mul(&share)?)?
        } else if config.use_grams {
            (y - (toward()?.abs()? * update.sign()?)?)?
        } else if group.c < 0.5 {
            ((y + (z - y)?.affine(group.c, 0.0)?)? - step)?
        } else {
            ((z - (z - y)?.affine(1.0 - group.c, 0.0)?)? - step)?
        };
        let mut next_z = (z - update.affine(group.dlr, 0.0)?)?;
        if decay != 0.0 && !config.weight_decay_by_lr {
            next_z = (next_z - y.affine(decay, 0.0)?)?;
            next_y = (next_y - y.affine(decay * group.xy, 0.0)?)?;
        }
        slot.put_state(Z, next_z);
        slot.put_weights(&next_y)
    }
}

/// Takes off the part along `weights`, keeping the length. (Of weights that are all zero
/// there is no part.)
fn orthogonal(update: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let length = |t: &Tensor| -> Result<Tensor> { Ok(t.sqr()?.sum_all()?.sqrt()?) };
    let square = weights.sqr()?.sum_all()?.affine(1.0, 1e-30)?;
    let along = ((weights * update)?.sum_all()? / square)?;
    let rest = (update - weights.broadcast_mul(&along)?)?;
    let factor = (length(update)? / length(&rest)?.affine(1.0, 1e-30)?)?;
    Ok(rest.broadcast_mul(&factor)?)
}

/// The parameter's part of the numerator and the denominator of d.
fn statistics(
    config: &ProdigyPlusConfig,
    group: &GroupStep,
    point: &Tensor,
    grad: &Tensor,
    slot: &mut Slot,
) -> Result<()> {
    if !group.adapting {
        (slot.buffers[S], slot.buffers[P0]) = (None, None);
        return Ok(());
    }
    let p0 = slot.state_tensor(P0)?.to_dtype(DType::F32)?.flatten_all()?;
    let displacement = every(point, STRIDE)?.neg()?.broadcast_add(&p0)?;
    let grad = every(grad, STRIDE)?;
    let gain = group.d * group.d / config.d0.sqrt();
    let dot = (&grad * &displacement)?.sum_all()?;
    let sums = if config.use_speed {
        speed(group.k, gain, &dot, &displacement, slot)?
    } else {
        let kind = kept(config);
        let round = |t: Tensor| -> Result<Tensor> { Ok(t.to_dtype(kind)?.to_dtype(DType::F32)?) };
        let s = slot.state_tensor(S)?.to_dtype(DType::F32)?.flatten_all()?;
        let s = round(s.affine(group.beta3, 0.0)?)?;
        let s = round((s + grad.affine(gain, 0.0)?)?)?;
        slot.put_state(S, s.to_dtype(kind)?);
        vec![dot.affine(gain, 0.0)?, round(s.abs()?.sum_all()?)?]
    };
    slot.restore_device_sums(sums);
    Ok(())
}

/// The variant without a running sum of gradients; see [`super::step`].
fn speed(
    k: f64,
    gain: f64,
    dot: &Tensor,
    displacement: &Tensor,
    slot: &mut Slot,
) -> Result<Vec<Tensor>> {
    let (l1, l2) = (
        displacement.abs()?.sum_all()?,
        displacement.sqr()?.sum_all()?.sqrt()?,
    );
    let (mean, most_l1, most_l2) = if slot.buffers[SPEED].is_some() {
        let memory = slot.state_tensor(SPEED)?.flatten_all()?;
        (memory.get(0)?, memory.get(1)?, memory.get(2)?)
    } else {
        (dot.clone(), dot.zeros_like()?, dot.zeros_like()?)
    };
    let beta = 1.0 - k.powf(-0.75);
    let mean = mix(&mean, beta, dot, 1.0 - beta)?;
    let most_l1 = most_l1.maximum(&l1)?.maximum(1e-8)?;
    let most_l2 = most_l2.maximum(&l2)?.maximum(1e-8)?;
    let reach = most_l2.affine(1.0, 1.0)?.sqr()?;
    let numerator = ((mean.affine(gain, 0.0)? / reach)? / &most_l1)?;
    slot.put_state(SPEED, Tensor::stack(&[&mean, &most_l1, &most_l2], 0)?);
    Ok(vec![numerator, most_l2])
}

/// `atan2(y, x)` for x of 0 and above. Two halvings bring the angle under 0.2, where four
/// terms of the series suffice: the next is below 2e-8 of the result.
fn angle(y: &Tensor, x: &Tensor) -> Result<Tensor> {
    let size = y.abs()?;
    let steep = size.gt(x)?;
    let ratio = (size.minimum(x)? / size.maximum(x)?.maximum(1e-37)?)?;
    let halved = |t: &Tensor| -> Result<Tensor> {
        Ok((t / t.sqr()?.affine(1.0, 1.0)?.sqrt()?.affine(1.0, 1.0)?)?)
    };
    let t = halved(&halved(&ratio)?)?;
    let square = t.sqr()?;
    let mut series = square.affine(1.0 / 9.0, -1.0 / 7.0)?;
    for term in [1.0 / 5.0, -1.0 / 3.0, 1.0] {
        series = (series * &square)?.affine(1.0, term)?;
    }
    let flat = (series * t)?.affine(4.0, 0.0)?;
    let angle = steep.where_cond(&flat.affine(-1.0, std::f64::consts::FRAC_PI_2)?, &flat)?;
    Ok((angle * y.sign()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn angles_are_those_of_the_library() -> Result<()> {
        let pairs: Vec<(f32, f32)> = (0..400)
            .map(|i| {
                let t = i as f32;
                (
                    (t * 0.7).sin() * 10f32.powi(i % 7 - 3),
                    (t * 1.3).cos().abs(),
                )
            })
            .chain([(0.0, 0.0), (1e-20, 0.0), (-3.0, 0.0), (0.0, 2.0)])
            .collect();
        let (y, x): (Vec<f32>, Vec<f32>) = pairs.iter().copied().unzip();
        let on = |v: &[f32]| Tensor::from_slice(v, v.len(), &Device::Cpu);
        let angles = angle(&on(&y)?, &on(&x)?)?.to_vec1::<f32>()?;
        for ((y, x), angle) in pairs.iter().zip(angles) {
            // A few roundings of values up to pi / 2.
            let expected = y.atan2(*x);
            assert!(
                (angle - expected).abs() <= 4e-7 * expected.abs().max(1e-30),
                "{y} {x}"
            );
        }
        Ok(())
    }
}
