//! Layer norm and group norm, SiLU fused behind the latter. The backward pass recomputes
//! the statistics instead of keeping them.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::buffer::{copied, zeros};
use crate::math::{sigmoid, sum, sum2, vectorized};
use crate::pointwise::with_values;
use crate::{as_nodes, composed, fast, plain, values};

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
    let op = Norm {
        groups: None,
        eps,
        silu: false,
    };
    x.contiguous()?
        .apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
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
    let op = Norm {
        groups: Some(groups),
        eps,
        silu,
    };
    x.contiguous()?
        .apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
}

/// Both norms: a "row" is normalized as a whole and consists of segments that share
/// one scale and shift (group norm), or has one of each per value (layer norm).
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

/// One row backward: `dx` holds the gradient of the output and is replaced by the
/// gradient of the input.
#[inline(always)]
fn backward(dx: &mut [f32], x: &[f32], rows: Rows, w: &[f32], b: &[f32], eps: f64, silu: bool) {
    let stats = Statistics::of(x, eps);
    // First the gradient of the normalized value, in place.
    if rows.segment == 1 {
        for (((dx, x), w), b) in dx.iter_mut().zip(x).zip(w).zip(b) {
            *dx *= w * slope_of(stats.normal(*x) * w + b, silu);
        }
    } else {
        let segments = dx
            .chunks_exact_mut(rows.segment)
            .zip(x.chunks_exact(rows.segment));
        for (((dx, x), w), b) in segments.zip(w).zip(b) {
            for (dx, x) in dx.iter_mut().zip(x) {
                *dx *= w * slope_of(stats.normal(*x) * w + b, silu);
            }
        }
    }
    let n = x.len() as f64;
    let average = (sum(
        dx,
        #[inline(always)]
        |g| g,
    ) / n) as f32;
    let slope = (sum2(
        dx,
        x,
        #[inline(always)]
        |g, x| g * stats.normal(x),
    ) / n) as f32;
    for (dx, x) in dx.iter_mut().zip(x) {
        *dx = stats.r * (*dx - average - stats.normal(*x) * slope);
    }
}

/// Gradients of weight and bias. Rows are summed in parts that do not depend on the number
/// of threads, the parts in their order.
fn scale_gradients(
    norm: &Norm,
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
    norm: &Norm,
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

/// Calls `body(row number, out, input)` for each row, several rows per task.
fn each_row(
    out: &mut [f32],
    input: &[f32],
    width: usize,
    body: impl Fn(usize, &mut [f32], &[f32]) + Sync,
) {
    const TASK: usize = 1 << 14;
    let rows = (TASK / width).max(1);
    let run = |first: usize, out: &mut [f32], input: &[f32]| {
        vectorized(
            #[inline(always)]
            || {
                let pairs = out.chunks_exact_mut(width).zip(input.chunks_exact(width));
                for (i, (out, input)) in pairs.enumerate() {
                    body(first + i, out, input);
                }
            },
        );
    };
    if out.len() <= rows * width {
        run(0, out, input);
    } else {
        out.par_chunks_mut(rows * width)
            .zip(input.par_chunks(rows * width))
            .enumerate()
            .for_each(|(i, (out, input))| run(i * rows, out, input));
    }
}

impl CustomOp3 for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w, b) = (values(s1, l1)?, values(s2, l2)?, values(s3, l3)?);
        let rows = self.rows(l1.shape(), w.len())?;
        if b.len() != w.len() {
            candle_core::bail!("norm: weight and bias differ in length");
        }
        let mut y = zeros(x.len());
        let (eps, silu) = (self.eps, self.silu);
        each_row(
            &mut y,
            x,
            rows.width,
            #[inline(always)]
            |row, y, x| {
                forward(
                    y,
                    x,
                    rows,
                    rows.scales(w, row),
                    rows.scales(b, row),
                    eps,
                    silu,
                );
            },
        );
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let rows = self.rows(x.shape(), w.elem_count())?;
        let (eps, silu) = (self.eps, self.silu);
        let to_x = x.track_op();
        let to_scales = w.track_op() || b.track_op();
        let (dx, scales) = with_values(w, b, |w, b| {
            with_values(x, &dy.contiguous()?, |x, dy| {
                let scales = to_scales.then(|| scale_gradients(self, rows, (x, dy), (w, b)));
                let dx = to_x.then(|| {
                    let mut dx = copied(dy);
                    each_row(
                        &mut dx,
                        x,
                        rows.width,
                        #[inline(always)]
                        |row, dx, x| {
                            let (w, b) = (rows.scales(w, row), rows.scales(b, row));
                            backward(dx, x, rows, w, b, eps, silu);
                        },
                    );
                    dx
                });
                (dx, scales)
            })
        })??;
        let tensor = |values: Option<Vec<f32>>, like: &Tensor| {
            let values = values.filter(|_| like.track_op());
            let tensor = |values| Tensor::from_vec(values, like.shape(), like.device());
            values.map(tensor).transpose()
        };
        let (dw, db) = scales.map(|[dw, db]| (dw, db)).unzip();
        Ok((tensor(dx, x)?, tensor(dw, w)?, tensor(db, b)?))
    }
}
