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
                            let values = x[first..].iter().zip(&dy[first..]);
                            for (dx, (x, dy)) in dx.iter_mut().zip(values) {
                                let s = sigmoid(*x);
                                *dx += dy * s * (1.0 + x * (1.0 - s));
                            }
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
                            let ((dv, dg), (value, gate)) = (dx.split_at_mut(c), x.split_at(c));
                            let gradients = dv.iter_mut().zip(dg).zip(dy);
                            for (((dv, dg), dy), (v, g)) in gradients.zip(value.iter().zip(gate)) {
                                let cdf = normal_cdf(*g);
                                *dv += dy * g * cdf;
                                *dg += dy * v * (cdf + g * normal_pdf(*g));
                            }
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
