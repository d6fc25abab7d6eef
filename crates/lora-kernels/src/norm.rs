//! Layer norm and group norm, SiLU fused behind the latter. The backward pass recomputes
//! the statistics instead of keeping them.

use candle_core::{Device, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::buffer::{added_in_parts, in_parts, with, with_both};
use crate::gradient::Gradient;
use crate::math::{sigmoid, sum, sum2, vectorized};
use crate::node::{Value, node};
use crate::{as_nodes, composed, fast, plain};

/// Layer norm over the last axis: `x` `[.., c]`, `weight` and `bias` `[c]`.
///
/// # Errors
/// When the shapes do not fit.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if !fast(&[x, weight, bias]) {
        let trained = weight.track_op() || bias.track_op();
        return match as_nodes() && !trained {
            true => composed::norm(x, weight, bias, None, eps, false),
            false => plain::layer_norm(x, weight, bias, eps),
        };
    }
    let norm = Norm {
        groups: None,
        eps,
        silu: false,
    };
    norm.apply(x, weight, bias)
}

/// Group norm of `x` `[n, c, h, w]`, `weight` and `bias` `[c]`; with `silu` the result
/// is passed through SiLU.
///
/// # Errors
/// When the shapes do not fit.
pub fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    if !fast(&[x, weight, bias]) {
        let trained = weight.track_op() || bias.track_op();
        return match as_nodes() && !trained {
            true => composed::norm(x, weight, bias, Some(groups), eps, silu),
            false => plain::group_norm(x, weight, bias, groups, eps, silu),
        };
    }
    let norm = Norm {
        groups: Some(groups),
        eps,
        silu,
    };
    norm.apply(x, weight, bias)
}

/// Both norms: a "row" is normalized as a whole and consists of segments that share
/// one scale and shift (group norm), or has one of each per value (layer norm).
#[derive(Clone, Copy)]
struct Norm {
    groups: Option<usize>,
    eps: f64,
    silu: bool,
}

/// How values, rows and scales lie in memory.
#[derive(Clone, Copy)]
struct Rows {
    /// Values normalized together.
    width: usize,
    /// Values that share a scale; 1 for layer norm.
    segment: usize,
    /// Rows until the scales repeat.
    period: usize,
}

impl Norm {
    fn rows(&self, shape: &Shape, channels: usize) -> Result<Rows> {
        let dims = shape.dims();
        let rows = match self.groups {
            None if dims.last() == Some(&channels) => Rows {
                width: channels,
                segment: 1,
                period: 1,
            },
            Some(groups)
                if dims.len() >= 2
                    && dims[1] == channels
                    && groups > 0
                    && channels.is_multiple_of(groups) =>
            {
                let segment = dims[2..].iter().product();
                Rows {
                    width: channels / groups * segment,
                    segment,
                    period: groups,
                }
            }
            _ => candle_core::bail!("norm: input {shape:?} does not fit {channels} channels"),
        };
        if rows.width == 0 {
            candle_core::bail!("norm: input {shape:?} is empty");
        }
        Ok(rows)
    }
}

impl Rows {
    /// Scales of row number `row`.
    fn scales<'a>(&self, weight: &'a [f32], row: usize) -> &'a [f32] {
        let n = self.width / self.segment;
        &weight[row % self.period * n..][..n]
    }
}

/// What normalizes a row. Values are taken relative to the row's first, so that a
/// large mean does not cancel digits away.
#[derive(Clone, Copy)]
struct Statistics {
    first: f32,
    /// Mean minus `first`.
    mean: f32,
    /// 1 / standard deviation.
    r: f32,
}

impl Statistics {
    #[inline(always)]
    fn of(x: &[f32], eps: f64) -> Self {
        let n = x.len() as f64;
        let first = x.first().copied().unwrap_or(0.0);
        let mean = (sum(
            x,
            #[inline(always)]
            |v| v - first,
        ) / n) as f32;
        let variance = sum2(
            x,
            x,
            #[inline(always)]
            |a, b| ((a - first) - mean) * ((b - first) - mean),
        ) / n;
        Self {
            first,
            mean,
            r: (1.0 / (variance + eps).sqrt()) as f32,
        }
    }

    #[inline(always)]
    fn normal(&self, x: f32) -> f32 {
        ((x - self.first) - self.mean) * self.r
    }
}

/// SiLU, or nothing.
#[inline(always)]
fn activate(z: f32, silu: bool) -> f32 {
    if silu { z * sigmoid(z) } else { z }
}

/// The derivative of [`activate`].
#[inline(always)]
fn slope_of(z: f32, silu: bool) -> f32 {
    let s = sigmoid(z);
    if silu { s * (1.0 + z * (1.0 - s)) } else { 1.0 }
}

/// One row forward.
#[inline(always)]
fn forward(y: &mut [f32], x: &[f32], rows: Rows, w: &[f32], b: &[f32], eps: f64, silu: bool) {
    let stats = Statistics::of(x, eps);
    if rows.segment == 1 {
        for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
            *y = activate(stats.normal(*x) * w + b, silu);
        }
        return;
    }
    let segments = y
        .chunks_exact_mut(rows.segment)
        .zip(x.chunks_exact(rows.segment));
    for (((y, x), w), b) in segments.zip(w).zip(b) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = activate(stats.normal(*x) * w + b, silu);
        }
    }
}

/// Layer norm of rows of as many values as there are scales.
#[cfg(target_arch = "x86_64")]
pub(crate) fn normalize(y: &mut [f32], x: &[f32], (w, b): (&[f32], &[f32]), eps: f64) {
    let rows = Rows {
        width: w.len(),
        segment: 1,
        period: 1,
    };
    vectorized(
        #[inline(always)]
        || {
            let pairs = y.chunks_exact_mut(rows.width);
            for (y, x) in pairs.zip(x.chunks_exact(rows.width)) {
                forward(y, x, rows, w, b, eps, false);
            }
        },
    );
}

/// One row backward: writes the gradient of the input to `dx`, or adds it. `normal` is memory for
/// the gradient of the normalized values.
#[inline(always)]
fn backward(
    (dx, add): (&mut [f32], bool),
    normal: &mut [f32],
    (x, dy): (&[f32], &[f32]),
    rows: Rows,
    (w, b): (&[f32], &[f32]),
    norm: Norm,
) {
    let Norm { eps, silu, .. } = norm;
    let stats = Statistics::of(x, eps);
    if rows.segment == 1 {
        let values = normal.iter_mut().zip(x).zip(dy);
        for (((normal, x), dy), (w, b)) in values.zip(w.iter().zip(b)) {
            *normal = dy * (w * slope_of(stats.normal(*x) * w + b, silu));
        }
    } else {
        let segments = normal
            .chunks_exact_mut(rows.segment)
            .zip(x.chunks_exact(rows.segment))
            .zip(dy.chunks_exact(rows.segment));
        for (((normal, x), dy), (w, b)) in segments.zip(w.iter().zip(b)) {
            for ((normal, x), dy) in normal.iter_mut().zip(x).zip(dy) {
                *normal = dy * (w * slope_of(stats.normal(*x) * w + b, silu));
            }
        }
    }
    let n = x.len() as f64;
    let average = (sum(
        normal,
        #[inline(always)]
        |g| g,
    ) / n) as f32;
    let slope = (sum2(
        normal,
        x,
        #[inline(always)]
        |g, x| g * stats.normal(x),
    ) / n) as f32;
    let gradients = normal.iter().zip(x);
    if add {
        for (dx, (g, x)) in dx.iter_mut().zip(gradients) {
            *dx += stats.r * (g - average - stats.normal(*x) * slope);
        }
    } else {
        for (dx, (g, x)) in dx.iter_mut().zip(gradients) {
            *dx = stats.r * (g - average - stats.normal(*x) * slope);
        }
    }
}

/// Gradients of weight and bias. Rows are summed in parts that do not depend on the number
/// of threads, the parts in their order.
fn scale_gradients(
    norm: Norm,
    rows: Rows,
    (x, dy): (&[f32], &[f32]),
    (w, b): (&[f32], &[f32]),
) -> [Vec<f32>; 2] {
    /// Rows of a part, where all have the same scales.
    const PART: usize = 64;
    let per_part = if rows.period == 1 { PART } else { 1 };
    let values = per_part * rows.width;
    let parts: Vec<[Vec<f32>; 2]> = x
        .par_chunks(values)
        .zip(dy.par_chunks(values))
        .enumerate()
        .map(|(part, (x, dy))| {
            let (w, b) = (rows.scales(w, part), rows.scales(b, part));
            let mut sums = [vec![0f32; w.len()], vec![0f32; w.len()]];
            vectorized(
                #[inline(always)]
                || {
                    let pairs = x.chunks_exact(rows.width).zip(dy.chunks_exact(rows.width));
                    for (x, dy) in pairs {
                        add_scale_gradients(&mut sums, norm, rows.segment, (x, dy), (w, b));
                    }
                },
            );
            sums
        })
        .collect();
    let mut totals = [vec![0f64; w.len()], vec![0f64; w.len()]];
    for (part, sums) in parts.iter().enumerate() {
        for (total, sums) in totals.iter_mut().zip(sums) {
            let first = part % rows.period * sums.len();
            for (total, sum) in total[first..].iter_mut().zip(sums) {
                *total += f64::from(*sum);
            }
        }
    }
    totals.map(|total| total.into_iter().map(|v| v as f32).collect())
}

/// Adds what one row gives to the gradients of its weights and biases.
#[inline(always)]
fn add_scale_gradients(
    [to_w, to_b]: &mut [Vec<f32>; 2],
    norm: Norm,
    segment: usize,
    (x, dy): (&[f32], &[f32]),
    (w, b): (&[f32], &[f32]),
) {
    let (stats, silu) = (Statistics::of(x, norm.eps), norm.silu);
    let scales = w.iter().zip(b);
    let sums = to_w.iter_mut().zip(to_b);
    if segment == 1 {
        let values = x.iter().zip(dy);
        for (((x, dy), (w, b)), (to_w, to_b)) in values.zip(scales).zip(sums) {
            let normal = stats.normal(*x);
            let dz = dy * slope_of(normal * w + b, silu);
            *to_w += dz * normal;
            *to_b += dz;
        }
        return;
    }
    let segments = x.chunks_exact(segment).zip(dy.chunks_exact(segment));
    for (((x, dy), (w, b)), (to_w, to_b)) in segments.zip(scales).zip(sums) {
        *to_w += sum2(
            x,
            dy,
            #[inline(always)]
            |x, dy| {
                let normal = stats.normal(x);
                dy * slope_of(normal * w + b, silu) * normal
            },
        ) as f32;
        *to_b += sum2(
            x,
            dy,
            #[inline(always)]
            |x, dy| dy * slope_of(stats.normal(x) * w + b, silu),
        ) as f32;
    }
}

/// Values per task; at least one row.
const TASK: usize = 1 << 14;

impl Norm {
    fn apply(self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let args = [x, weight, bias];
        let [x, w, b] = [x.detach(), weight.detach(), bias.detach()];
        let x = x.contiguous()?;
        let rows = self.rows(x.shape(), w.elem_count())?;
        if b.elem_count() != w.elem_count() {
            candle_core::bail!("norm: weight and bias differ in length");
        }
        let y = with(&x, |x| {
            with_both(&w, &b, |w, b| self.forward(rows, x, w, b))
        })??;
        let wanted = args.map(Tensor::track_op);
        let shape = x.shape().clone();
        let gradients = move |dy: &Tensor| {
            let dy = dy.contiguous()?;
            let scales = (wanted[1] || wanted[2])
                .then(|| {
                    with_both(&x, &dy, |x, dy| {
                        with_both(&w, &b, |w, b| scale_gradients(self, rows, (x, dy), (w, b)))
                    })?
                })
                .transpose()?;
            let [x, w, b] = [&x, &w, &b].map(Tensor::clone);
            let shape = w.shape().clone();
            let to_x = wanted[0].then(|| {
                Gradient::made(move |dx| {
                    with_both(&x, &dy, |x, dy| {
                        with_both(&w, &b, |w, b| self.backward(rows, dx, (x, dy), (w, b)))
                    })?
                })
            });
            let mut all = vec![to_x];
            for values in scales.into_iter().flatten() {
                let gradient = Tensor::from_vec(values, &shape, &Device::Cpu)?;
                all.push(Some(gradient.into()));
            }
            Ok(all)
        };
        node("norm", &args, Value::Cpu(y, shape), Box::new(gradients))
    }

    fn forward(self, rows: Rows, x: &[f32], w: &[f32], b: &[f32]) -> Vec<f32> {
        let width = rows.width;
        let part = width * (TASK / width).max(1);
        in_parts(x.len(), part, |first, y: &mut [f32]| {
            vectorized(
                #[inline(always)]
                || {
                    let pairs = y
                        .chunks_exact_mut(width)
                        .zip(x[first..].chunks_exact(width));
                    for (row, (y, x)) in (first / width..).zip(pairs) {
                        let (w, b) = (rows.scales(w, row), rows.scales(b, row));
                        forward(y, x, rows, w, b, self.eps, self.silu);
                    }
                },
            );
        })
    }

    fn backward(
        self,
        rows: Rows,
        dx: Option<&mut [f32]>,
        (x, dy): (&[f32], &[f32]),
        (w, b): (&[f32], &[f32]),
    ) -> Vec<f32> {
        let (width, add) = (rows.width, dx.is_some());
        let part = width * (TASK / width).max(1);
        added_in_parts(dx, x.len(), part, |first, dx| {
            let mut normal = vec![0f32; width];
            vectorized(
                #[inline(always)]
                || {
                    let values = x[first..]
                        .chunks_exact(width)
                        .zip(dy[first..].chunks_exact(width));
                    let lines = dx.chunks_exact_mut(width).zip(values);
                    for (row, (dx, pair)) in (first / width..).zip(lines) {
                        let scales = (rows.scales(w, row), rows.scales(b, row));
                        backward((dx, add), &mut normal, pair, rows, scales, self);
                    }
                },
            );
        })
    }
}
