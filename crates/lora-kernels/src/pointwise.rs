//! SiLU and GEGLU with gradients in one pass over the data.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use crate::buffer::{added_in_parts, in_parts, rows_of, with, with_both};
use crate::gradient::Gradient;
use crate::math::{normal_cdf, normal_pdf, sigmoid, vectorized};
use crate::node::{Leaf, Value, backward_from, node, repeatable};
use crate::{as_nodes, fast, plain};

/// Values per task.
const BLOCK: usize = 1 << 14;

/// `x * sigmoid(x)`.
///
/// # Errors
/// When the operation is not defined for the dtype.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if fast(&[x]) { silu_node(x) } else { x.silu() }
}

/// The gated unit of transformers: `x` `[.., 2c]` is split in two; returns the first
/// half times gelu (exact form) of the second, `[.., c]`. Layers behind it do not keep what it gives for
/// their gradients: it is computed again from `x`.
///
/// # Errors
/// When the last axis is odd.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    if fast(&[x]) {
        geglu_node(x)
    } else if as_nodes() {
        composed_geglu(x)
    } else {
        plain::geglu(x)
    }
}

fn silu_node(x: &Tensor) -> Result<Tensor> {
    let input = x.detach().contiguous()?;
    let y = with(&input, |x| {
        in_parts(x.len(), BLOCK, |first, y: &mut [f32]| {
            vectorized(
                #[inline(always)]
                || {
                    for (y, x) in y.iter_mut().zip(&x[first..]) {
                        *y = x * sigmoid(*x);
                    }
                },
            )
        })
    })?;
    let gradients = move |dy: &Tensor| {
        let (x, dy) = (input.clone(), dy.contiguous()?);
        let to_x = Gradient::made(move |dx| {
            with_both(&x, &dy, |x, dy| {
                added_in_parts(dx, x.len(), BLOCK, |first, dx| {
                    vectorized(
                        #[inline(always)]
                        || {
                            add_silu_gradient(dx, &x[first..], &dy[first..]);
                        },
                    )
                })
            })
        });
        Ok(vec![Some(to_x)])
    };
    let value = Value::cpu(y, x.shape());
    node("silu", &[x], value, Box::new(gradients))
}

/// Adds the gradient of SiLU.
#[inline(always)]
fn add_silu_gradient(dx: &mut [f32], x: &[f32], dy: &[f32]) {
    for (dx, (x, dy)) in dx.iter_mut().zip(x.iter().zip(dy)) {
        let s = sigmoid(*x);
        *dx += dy * s * (1.0 + x * (1.0 - s));
    }
}

/// Half of the last axis, and the shape of the result.
fn halved(x: &Tensor) -> Result<(usize, Vec<usize>)> {
    let mut dims = x.dims().to_vec();
    match dims.last_mut() {
        Some(last) if *last % 2 == 0 && *last > 0 => {
            *last /= 2;
            Ok((*last, dims))
        }
        _ => candle_core::bail!("geglu: the last axis of {dims:?} cannot be halved"),
    }
}

/// A value times gelu of its gate.
#[inline(always)]
pub(crate) fn gate(value: f32, gate: f32) -> f32 {
    value * gate * normal_cdf(gate)
}

/// Rows of `2c` values to rows of `c`.
fn gated(x: &Tensor, c: usize) -> Result<Vec<f32>> {
    with(x, |x| {
        in_parts(x.len() / 2, rows_of(c), |first, y: &mut [f32]| {
            let rows = y
                .chunks_exact_mut(c)
                .zip(x[2 * first..].chunks_exact(2 * c));
            vectorized(
                #[inline(always)]
                || {
                    for (y, x) in rows {
                        let (value, gate) = x.split_at(c);
                        for ((y, value), g) in y.iter_mut().zip(value).zip(gate) {
                            *y = self::gate(*value, *g);
                        }
                    }
                },
            );
        })
    })
}

/// The gradients to a value and its gate.
#[inline(always)]
fn gate_gradients(value: f32, gate: f32, dy: f32) -> (f32, f32) {
    let cdf = normal_cdf(gate);
    let slope = cdf + gate * normal_pdf(gate);
    (dy * gate * cdf, dy * value * slope)
}

/// Adds the gradient of one row.
#[inline(always)]
fn add_gated_gradient(dx: &mut [f32], x: &[f32], dy: &[f32], c: usize) {
    /// Through arrays of their own, of which the compiler knows that they lie apart from one another.
    const LANES: usize = 16;
    let ((dv, dg), (value, gate)) = (dx.split_at_mut(c), x.split_at(c));
    let ((dv, dv_rest), (dg, dg_rest)) = (dv.as_chunks_mut::<LANES>(), dg.as_chunks_mut::<LANES>());
    let ((v, v_rest), (g, g_rest)) = (value.as_chunks::<LANES>(), gate.as_chunks::<LANES>());
    let (dy, dy_rest) = dy.as_chunks::<LANES>();
    for (((dv, dg), dy), (v, g)) in dv.iter_mut().zip(dg).zip(dy).zip(v.iter().zip(g)) {
        let (mut to_value, mut to_gate) = ([0f32; LANES], [0f32; LANES]);
        for lane in 0..LANES {
            (to_value[lane], to_gate[lane]) = gate_gradients(v[lane], g[lane], dy[lane]);
        }
        dv.iter_mut().zip(to_value).for_each(|(dv, v)| *dv += v);
        dg.iter_mut().zip(to_gate).for_each(|(dg, g)| *dg += g);
    }
    let rest = dv_rest.iter_mut().zip(dg_rest).zip(dy_rest);
    for (((dv, dg), dy), (v, g)) in rest.zip(v_rest.iter().zip(g_rest)) {
        let (to_value, to_gate) = gate_gradients(*v, *g, *dy);
        *dv += to_value;
        *dg += to_gate;
    }
}

/// The gradient to `x` from that to [`gated`].
fn gated_gradient(x: &Tensor, dy: &Tensor, c: usize) -> Result<Gradient> {
    let (x, dy) = (x.clone(), dy.contiguous()?);
    Ok(Gradient::made(move |dx| {
        with_both(&x, &dy, |x, dy| {
            added_in_parts(dx, x.len(), rows_of(2 * c), |first, dx| {
                let inputs = x[first..]
                    .chunks_exact(2 * c)
                    .zip(dy[first / 2..].chunks_exact(c));
                vectorized(
                    #[inline(always)]
                    || {
                        for (dx, (x, dy)) in dx.chunks_exact_mut(2 * c).zip(inputs) {
                            add_gated_gradient(dx, x, dy, c);
                        }
                    },
                );
            })
        })
    }))
}

fn geglu_node(x: &Tensor) -> Result<Tensor> {
    let (c, dims) = halved(x)?;
    let kept = x.detach().contiguous()?;
    let value = Value::cpu(gated(&kept, c)?, dims.as_slice());
    let input = kept.clone();
    let again = move || Tensor::from_vec(gated(&input, c)?, dims.as_slice(), &Device::Cpu);
    let gradients = move |dy: &Tensor| Ok(vec![Some(gated_gradient(&kept, dy, c)?)]);
    let (gradients, again) = (Box::new(gradients), Arc::new(again));
    repeatable("geglu", &[x], value, gradients, Some(again))
}

/// [`geglu`] of candle's operations.
fn composed_geglu(x: &Tensor) -> Result<Tensor> {
    let kept = x.detach();
    let value = Value::Tensor(plain::geglu(&kept)?);
    let input = kept.clone();
    let again = move || plain::geglu(&input);
    let gradients = move |dy: &Tensor| {
        let leaf = Leaf::new(&kept)?;
        let mut store = backward_from(&plain::geglu(&leaf.tensor)?, dy.clone())?;
        Ok(vec![leaf.gradient(&mut store)?])
    };
    let (gradients, again) = (Box::new(gradients), Arc::new(again));
    repeatable("geglu", &[x], value, gradients, Some(again))
}
