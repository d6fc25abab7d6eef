//! Products of rows with rows, outputs multiplied by a number per channel, groups mixed by a
//! small matrix: what LoHa, DoRA and LoKr do beside products. candle's broadcasts do the same, but their backward passes
//! sum slowly.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use crate::buffer::{copied, in_parts, with, with_both, zeros};
use crate::fast;
use crate::gradient::Gradient;
use crate::math::{sum2, vectorized};
use crate::node::{Saved, Value, node};

/// The elementwise products of every row of `a` `[r, n]` with every row of `b` `[s, n]`:
/// `[r s, n]`, row `p s + q` being `a_p b_q`.
///
/// With it the elementwise product of two low-rank products is a low-rank product itself:
/// `(u1 v1) o (u2 v2)` is `t(row_products(t(u1), t(u2)))` times `row_products(v1, v2)`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let a = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let b = Tensor::new(&[[5f32, 6.]], &Device::Cpu)?;
/// let products = lora_kernels::row_products(&a, &b)?;
/// assert_eq!(products.to_vec2::<f32>()?, [[5., 12.], [15., 24.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When the shapes do not fit.
pub fn row_products(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let ((r, n), (s, columns)) = (a.dims2()?, b.dims2()?);
    if n != columns {
        candle_core::bail!("row products: rows of {n} and of {columns} values");
    }
    if n == 0 || !fast(&[a, b]) {
        return a
            .unsqueeze(1)?
            .broadcast_mul(&b.unsqueeze(0)?)?
            .reshape((r * s, n));
    }
    let args = [a, b];
    let [a, b] = [a.detach().contiguous()?, b.detach().contiguous()?];
    let products = with_both(&a, &b, |a, b| {
        in_parts(r * s * n, s * n, |first, products: &mut [f32]| {
            let a = &a[first / s..][..n];
            vectorized(
                #[inline(always)]
                || {
                    for (products, b) in products.chunks_exact_mut(n).zip(b.chunks_exact(n)) {
                        for ((product, a), b) in products.iter_mut().zip(a).zip(b) {
                            *product = a * b;
                        }
                    }
                },
            )
        })
    })?;
    let wanted = args.map(Tensor::track_op);
    let gradients = move |dy: &Tensor| {
        let dy = dy.contiguous()?;
        // Rows of dy, `step` apart, times the rows of the other side.
        let gradient = |other: &Tensor, first: usize, step: usize| {
            let (other, dy) = (other.clone(), dy.clone());
            Gradient::values(move |sums, _| {
                with_both(&other, &dy, |other, dy| {
                    let rows = sums.par_chunks_mut(n).enumerate();
                    rows.for_each(|(row, sums)| {
                        let dy = dy.chunks_exact(n).skip(row * first).step_by(step);
                        let terms: Vec<_> = dy.zip(other.chunks_exact(n)).collect();
                        for (block, sums) in sums.chunks_mut(COLUMNS).enumerate() {
                            let at = block * COLUMNS..block * COLUMNS + sums.len();
                            for (dy, other) in &terms {
                                add_products(sums, &dy[at.clone()], &other[at.clone()]);
                            }
                        }
                    });
                })
            })
        };
        let to_a = wanted[0].then(|| gradient(&b, s, 1));
        let to_b = wanted[1].then(|| gradient(&a, 1, s));
        Ok(vec![to_a, to_b])
    };
    let value = Value::cpu(products, (r * s, n));
    node("row_products", &args, value, Box::new(gradients))
}

/// Columns that are summed at a time.
const COLUMNS: usize = 1 << 12;

fn add_products(sums: &mut [f32], a: &[f32], b: &[f32]) {
    vectorized(
        #[inline(always)]
        || {
            for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
                *sum += a * b;
            }
        },
    );
}

/// `y` times a number per channel, plus a bias per channel and a residual: `y` `[.., c]`, or
/// with `axis` 1 `[n, c, h, w]`; `scale` and `bias` `[c]`; `residual` in the shape of `y`. Gradients go to
/// y, scale and residual.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let y = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let scale = Tensor::new(&[3f32, 4.], &Device::Cpu)?;
/// let scaled = lora_kernels::scale_channels(&y, 1, &scale, Some(&scale), None)?;
/// assert_eq!(scaled.to_vec2::<f32>()?, [[6., 12.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When the shapes do not fit.
pub fn scale_channels(
    y: &Tensor,
    axis: usize,
    scale: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let channels = y.dim(axis)?;
    let misfit = |t: &&Tensor| t.dims() != [channels];
    if misfit(&scale) || bias.as_ref().is_some_and(misfit) {
        candle_core::bail!("scale_channels: scale or bias do not fit {:?}", y.dims());
    }
    if residual.is_some_and(|r| r.dims() != y.dims()) {
        candle_core::bail!("scale_channels: the residual does not fit {:?}", y.dims());
    }
    let operands = [Some(y), Some(scale), bias, residual];
    let operands: Vec<&Tensor> = operands.into_iter().flatten().collect();
    if !fast(&operands) || bias.is_some_and(Tensor::track_op) {
        let mut per_channel = vec![1; y.rank()];
        per_channel[axis] = channels;
        let mut scaled = y.broadcast_mul(&scale.reshape(per_channel.as_slice())?)?;
        if let Some(bias) = bias {
            scaled = scaled.broadcast_add(&bias.reshape(per_channel)?)?;
        }
        return match residual {
            Some(residual) => scaled + residual,
            None => Ok(scaled),
        };
    }
    // Values with one channel that follow each other, and channels until they repeat.
    let run = y.dims()[axis + 1..].iter().product::<usize>();
    let per_channel = |t: &Tensor| t.detach().to_vec1::<f32>();
    let factors = per_channel(scale)?;
    let bias = bias.map(per_channel).transpose()?;
    let (kept, shape) = (y.detach().contiguous()?, y.shape().clone());
    let mut value = match residual {
        Some(residual) => with(residual, copied)?,
        None => zeros(kept.elem_count()),
    };
    with(&kept, |y| {
        by_channel(&mut value, y, run, &factors, bias.as_deref())
    })?;
    let (to_y, to_scale, to_residual) = (
        y.track_op(),
        scale.track_op(),
        residual.is_some_and(Tensor::track_op),
    );
    let gradients = move |dy: &Tensor| {
        let dy = dy.contiguous()?;
        let to_y = to_y.then(|| {
            let (dy, factors) = (dy.clone(), factors.clone());
            Gradient::values(move |dy_scaled, _| {
                with(&dy, |dy| by_channel(dy_scaled, dy, run, &factors, None))
            })
        });
        let sums = match to_scale {
            true => {
                let sums = with_both(&kept, &dy, |y, dy| channel_sums(y, dy, run, channels))?;
                Some(Tensor::from_vec(sums, channels, &Device::Cpu)?.into())
            }
            false => None,
        };
        let to_residual = to_residual.then(|| dy.into());
        Ok(vec![to_y, sums, to_residual])
    };
    let args: Vec<&Tensor> = [y, scale].into_iter().chain(residual).collect();
    node(
        "scale_channels",
        &args,
        Value::Cpu(value, shape),
        Box::new(gradients),
    )
}

/// Adds `x` times its channel's factor, plus its channel's bias, to `out`. `run` values of a
/// channel follow each other.
fn by_channel(out: &mut [f32], x: &[f32], run: usize, factors: &[f32], bias: Option<&[f32]>) {
    let channels = factors.len();
    if run > 1 {
        let planes = out.par_chunks_mut(run).zip(x.par_chunks(run)).enumerate();
        return planes.for_each(|(plane, (out, x))| {
            let factor = factors[plane % channels];
            let bias = bias.map_or(0.0, |b| b[plane % channels]);
            vectorized(
                #[inline(always)]
                || {
                    out.iter_mut()
                        .zip(x)
                        .for_each(|(out, x)| *out += x * factor + bias)
                },
            )
        });
    }
    let blocks = out.par_chunks_mut(STRETCH * channels);
    blocks
        .zip(x.par_chunks(STRETCH * channels))
        .for_each(|(out, x)| {
            for (out, x) in out.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                add_products(out, x, factors);
                for (out, bias) in out.iter_mut().zip(bias.unwrap_or_default()) {
                    *out += bias;
                }
            }
        });
}

/// Rows of one task, which are summed in f32 before the sum goes on in f64.
const STRETCH: usize = 64;

/// The sums of `a b` over everything but the channels.
fn channel_sums(a: &[f32], b: &[f32], run: usize, channels: usize) -> Vec<f32> {
    if run > 1 {
        let of = |channel: usize| {
            let starts = (channel * run..a.len()).step_by(channels * run);
            let sums = starts.map(|start| {
                let at = start..start + run;
                vectorized(
                    #[inline(always)]
                    || sum2(&a[at.clone()], &b[at], |a, b| a * b),
                )
            });
            sums.sum::<f64>() as f32
        };
        return (0..channels).into_par_iter().map(of).collect();
    }
    let stretches = a
        .par_chunks(STRETCH * channels)
        .zip(b.par_chunks(STRETCH * channels));
    let partial: Vec<Vec<f32>> = stretches
        .map(|(a, b)| {
            let mut sums = vec![0f32; channels];
            for (a, b) in a.chunks_exact(channels).zip(b.chunks_exact(channels)) {
                add_products(&mut sums, a, b);
            }
            sums
        })
        .collect();
    let total = |channel: usize| partial.iter().map(|p| f64::from(p[channel])).sum::<f64>();
    (0..channels).map(|channel| total(channel) as f32).collect()
}

/// `mixing` `[a, c]` times every matrix `[c, b]` of `x` `[rows, c, b]`: `[rows, a, b]`. For many small
/// matrices, as in a Kronecker product.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let mixing = Tensor::new(&[[1f32, 10.]], &Device::Cpu)?;
/// let x = Tensor::new(&[[[1f32, 2.], [3., 4.]]], &Device::Cpu)?;
/// let mixed = lora_kernels::mix_groups(&mixing, &x)?;
/// assert_eq!(mixed.to_vec3::<f32>()?, [[[31., 42.]]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When the shapes do not fit.
pub fn mix_groups(mixing: &Tensor, x: &Tensor) -> Result<Tensor> {
    let ((a, c), (rows, groups, b)) = (mixing.dims2()?, x.dims3()?);
    if groups != c {
        candle_core::bail!("mix_groups: {groups} groups, mixed by [{a}, {c}]");
    }
    if x.elem_count() == 0 || !fast(&[mixing, x]) {
        let columns = x.transpose(1, 2)?.contiguous()?.reshape((rows * b, c))?;
        let mixed = crate::linear(&columns, mixing, None)?;
        return mixed.reshape((rows, b, a))?.transpose(1, 2)?.contiguous();
    }
    let args = [mixing, x];
    let (mixing, saved) = (mixing.detach().contiguous()?, Saved::of(x)?);
    let mixed = with_both(&mixing, &x.detach(), |mixing, x| mix(mixing, x, c, b))?;
    let wanted = args.map(Tensor::track_op);
    let gradients = move |dy: &Tensor| {
        let dy = dy.contiguous()?;
        let to_mixing = || {
            let x = saved.value()?;
            let sums = with_both(&x, &dy, |x, dy| mixing_gradient(x, dy, a, c, b))?;
            Ok::<_, candle_core::Error>(Tensor::from_vec(sums, (a, c), &Device::Cpu)?.into())
        };
        let to_x = || {
            let back = mixing.t()?.contiguous()?;
            let dx = with_both(&back, &dy, |back, dy| mix(back, dy, a, b))?;
            Ok::<_, candle_core::Error>(Tensor::from_vec(dx, (rows, c, b), &Device::Cpu)?.into())
        };
        Ok(vec![
            wanted[0].then(to_mixing).transpose()?,
            wanted[1].then(to_x).transpose()?,
        ])
    };
    let value = Value::cpu(mixed, (rows, a, b));
    node("mix_groups", &args, value, Box::new(gradients))
}

/// Columns that are held in registers.
const WIDE: usize = 16;

/// Every matrix `[c, b]` of x multiplied by `[a, c]`.
fn mix(mixing: &[f32], x: &[f32], c: usize, b: usize) -> Vec<f32> {
    let (a, matrices) = (mixing.len() / c, x.len() / (c * b));
    let mut mixed = vec![0f32; matrices * a * b];
    let blocks = mixed.par_chunks_mut(STRETCH * a * b);
    blocks
        .zip(x.par_chunks(STRETCH * c * b))
        .for_each(|(out, x)| {
            vectorized(
                #[inline(always)]
                || {
                    for (out, x) in out.chunks_exact_mut(a * b).zip(x.chunks_exact(c * b)) {
                        let mut at = 0;
                        while at + WIDE <= b {
                            mix_columns::<WIDE>(out, mixing, x, c, b, at);
                            at += WIDE;
                        }
                        while at + WIDE / 2 <= b {
                            mix_columns::<{ WIDE / 2 }>(out, mixing, x, c, b, at);
                            at += WIDE / 2;
                        }
                        while at < b {
                            mix_columns::<1>(out, mixing, x, c, b, at);
                            at += 1;
                        }
                    }
                },
            )
        });
    mixed
}

/// `N` columns of the product of one matrix, from column `at` on.
#[inline(always)]
fn mix_columns<const N: usize>(
    out: &mut [f32],
    mixing: &[f32],
    x: &[f32],
    c: usize,
    b: usize,
    at: usize,
) {
    for (out, mixing) in out.chunks_exact_mut(b).zip(mixing.chunks_exact(c)) {
        let mut sums = [0f32; N];
        for (x, factor) in x.chunks_exact(b).zip(mixing) {
            for (sum, x) in sums.iter_mut().zip(&x[at..at + N]) {
                *sum += x * factor;
            }
        }
        out[at..at + N].copy_from_slice(&sums);
    }
}

/// The sum over all matrices of `dy [a, b]` times the transposed `x [c, b]`.
fn mixing_gradient(x: &[f32], dy: &[f32], a: usize, c: usize, b: usize) -> Vec<f32> {
    let blocks = x
        .par_chunks(STRETCH * c * b)
        .zip(dy.par_chunks(STRETCH * a * b));
    let partial: Vec<Vec<f32>> = blocks
        .map(|(x, dy)| {
            // Lane by lane, added up in the end.
            let mut sums = vec![[0f32; WIDE]; a * c];
            vectorized(
                #[inline(always)]
                || {
                    for (x, dy) in x.chunks_exact(c * b).zip(dy.chunks_exact(a * b)) {
                        for (dy, sums) in dy.chunks_exact(b).zip(sums.chunks_exact_mut(c)) {
                            for (x, sums) in x.chunks_exact(b).zip(sums) {
                                add_lanes(sums, x, dy);
                            }
                        }
                    }
                },
            );
            sums.iter().map(|lanes| lanes.iter().sum()).collect()
        })
        .collect();
    let total = |at: usize| partial.iter().map(|p| f64::from(p[at])).sum::<f64>();
    (0..a * c).map(|at| total(at) as f32).collect()
}

#[inline(always)]
fn add_lanes(sums: &mut [f32; WIDE], x: &[f32], y: &[f32]) {
    let (wide_x, wide_y) = (x.chunks_exact(WIDE), y.chunks_exact(WIDE));
    let (rest_x, rest_y) = (wide_x.remainder(), wide_y.remainder());
    let mut lanes = *sums;
    for (x, y) in wide_x.zip(wide_y) {
        for (lane, (x, y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane += x * y;
        }
    }
    for (lane, (x, y)) in lanes.iter_mut().zip(rest_x.iter().zip(rest_y)) {
        *lane += x * y;
    }
    *sums = lanes;
}
