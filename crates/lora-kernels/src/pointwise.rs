//! SiLU and GEGLU with gradients in one pass over the data.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::buffer::{copied, in_parts, rows_of};
use crate::math::{normal_cdf, normal_pdf, sigmoid, vectorized};
use crate::{as_nodes, checkpoint, fast, plain, values};

/// Values per task.
const BLOCK: usize = 1 << 14;

/// `x * sigmoid(x)`.
///
/// # Errors
/// When the operation is not defined for the dtype.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if fast(&[x]) {
        x.contiguous()?.apply_op1(Silu)
    } else {
        x.silu()
    }
}

/// The gated unit of transformers: `x` `[.., 2c]` is split in two; returns the first
/// half times gelu (exact form) of the second, `[.., c]`.
///
/// # Errors
/// When the last axis is odd.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    if fast(&[x]) {
        x.contiguous()?.apply_op1(Geglu)
    } else if as_nodes() {
        checkpoint(&[x], |t| plain::geglu(&t[0]))
    } else {
        plain::geglu(x)
    }
}

/// Applies `f` block by block to (output, input), on several threads.
fn map(n: usize, body: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    in_parts(n, BLOCK, |first, y| vectorized(|| body(first, y)))
}

struct Silu;

impl CustomOp1 for Silu {
    fn name(&self) -> &'static str {
        "silu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let y = map(
            x.len(),
            #[inline(always)]
            |start, y| {
                for (y, x) in y.iter_mut().zip(&x[start..]) {
                    *y = x * sigmoid(*x);
                }
            },
        );
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let dx = with_values(x, &dy.contiguous()?, |x, dy| {
            map(
                x.len(),
                #[inline(always)]
                |start, out| {
                    for ((out, x), dy) in out.iter_mut().zip(&x[start..]).zip(&dy[start..]) {
                        let s = sigmoid(*x);
                        *out = dy * s * (1.0 + x * (1.0 - s));
                    }
                },
            )
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

struct Geglu;

impl Geglu {
    fn width(shape: &Shape) -> Result<usize> {
        match shape.dims().last() {
            Some(last) if last % 2 == 0 && *last > 0 => Ok(last / 2),
            _ => candle_core::bail!("geglu: the last axis of {shape:?} cannot be halved"),
        }
    }
}

impl CustomOp1 for Geglu {
    fn name(&self) -> &'static str {
        "geglu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let c = Self::width(layout.shape())?;
        let y = in_parts(x.len() / 2, rows_of(c), |first, y: &mut [f32]| {
            let rows = y
                .chunks_exact_mut(c)
                .zip(x[2 * first..].chunks_exact(2 * c));
            vectorized(
                #[inline(always)]
                || {
                    for (y, x) in rows {
                        let (value, gate) = x.split_at(c);
                        for ((y, value), gate) in y.iter_mut().zip(value).zip(gate) {
                            *y = value * gate * normal_cdf(*gate);
                        }
                    }
                },
            );
        });
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = c;
        }
        Ok((CpuStorage::F32(y), dims.into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let c = Self::width(x.shape())?;
        let dx = with_values(x, &dy.contiguous()?, |x, dy| {
            let mut dx = copied(x);
            // The input is in `dx` already and is replaced by its gradient.
            each_row(&mut dx, 2 * c, dy, c, |dx, dy| {
                let (value, gate) = dx.split_at_mut(c);
                for ((value, gate), dy) in value.iter_mut().zip(gate).zip(dy) {
                    let (v, g) = (*value, *gate);
                    let cdf = normal_cdf(g);
                    *value = dy * g * cdf;
                    *gate = dy * v * (cdf + g * normal_pdf(g));
                }
            });
            dx
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// Calls `body` with each row of `out` and the row of `input` that belongs to it.
pub(crate) fn each_row(
    out: &mut [f32],
    out_width: usize,
    input: &[f32],
    in_width: usize,
    body: impl Fn(&mut [f32], &[f32]) + Sync,
) {
    let rows = (BLOCK / out_width.max(in_width)).max(1);
    let run = |out: &mut [f32], input: &[f32]| {
        vectorized(
            #[inline(always)]
            || {
                for (out, input) in out
                    .chunks_exact_mut(out_width)
                    .zip(input.chunks_exact(in_width))
                {
                    body(out, input);
                }
            },
        );
    };
    if out.len() <= rows * out_width {
        run(out, input);
    } else {
        out.par_chunks_mut(rows * out_width)
            .zip(input.par_chunks(rows * in_width))
            .for_each(|(out, input)| run(out, input));
    }
}

/// Runs `body` on the f32 values of two contiguous CPU tensors.
pub(crate) fn with_values<R>(
    a: &Tensor,
    b: &Tensor,
    body: impl FnOnce(&[f32], &[f32]) -> R,
) -> Result<R> {
    let a = a.contiguous()?;
    let (a_storage, a_layout) = a.storage_and_layout();
    let (b_storage, b_layout) = b.storage_and_layout();
    match (&*a_storage, &*b_storage) {
        (candle_core::Storage::Cpu(a), candle_core::Storage::Cpu(b)) => {
            Ok(body(values(a, a_layout)?, values(b, b_layout)?))
        }
        _ => candle_core::bail!("expected tensors on the CPU"),
    }
}
