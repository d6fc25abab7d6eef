//! Attention that never holds the whole score matrix: queries are taken in blocks,
//! and the backward pass computes the scores again.

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod tiles;

use std::sync::{Arc, OnceLock};

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use crate::buffer::{in_parts, rows_of, with, with_both};
use crate::gradient::Gradient;
use crate::math::{exp, sum, sum2, vectorized};
use crate::matrix::{View, multiply_here};
use crate::node::{Value, node};
use crate::{Compute, as_nodes, composed, fast, plain};
#[cfg(target_arch = "x86_64")]
use crate::{avx512, matrix::native_products};

/// Scaled dot-product attention over `heads`: `q` `[n, lq, c]`, `k` and `v`
/// `[n, lk, c]`, heads side by side in `c`; returns `[n, lq, c]`. With `causal`,
/// position i sees 0 to i. With [`Compute::Bf16`] the operands of all products are rounded
/// to bf16; the softmax stays f32.
///
/// # Errors
/// When the shapes do not fit.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    causal: bool,
    compute: Compute,
) -> Result<Tensor> {
    if !fast(&[q, k, v]) {
        return match as_nodes() {
            true => composed::attention(q, k, v, heads, causal, compute),
            false => plain::attention(q, k, v, heads, causal),
        };
    }
    let args = [q, k, v];
    let [q, k, v] = [q.detach(), k.detach(), v.detach()];
    let sizes = Sizes::new([&q, &k, &v], heads, causal, compute)?;
    let (y, lse) = with_both(&q, &k, |q, k| {
        with(&v, |v| {
            let tasks = (0..sizes.n * heads).into_par_iter();
            let parts: Vec<_> = tasks.map(|task| sizes.forward(q, k, v, task)).collect();
            let outputs: Vec<&[f32]> = parts.iter().map(|(out, _)| out.as_slice()).collect();
            let lse: Vec<f32> = parts.iter().flat_map(|(_, lse)| lse).copied().collect();
            (sizes.interleave(&outputs, sizes.lq), lse)
        })
    })??;
    // The backward pass reads the result, too.
    let result = Arc::new(OnceLock::new());
    let (kept, wanted) = (result.clone(), args.map(Tensor::track_op));
    let value = Value::cpu(y, q.shape());
    let gradients = move |dy: &Tensor| {
        let Some(y) = kept.get() else {
            candle_core::bail!("attention: no result to go back from");
        };
        let keys = wanted[1] || wanted[2];
        let heads: Vec<[Vec<f32>; 3]> = with_both(&q, &k, |q, k| {
            with_both(&v, y, |v, y| {
                with(dy, |dy| {
                    let lse = lse.as_slice();
                    let saved = Saved {
                        q,
                        k,
                        v,
                        y,
                        dy,
                        lse,
                    };
                    let tasks = (0..sizes.n * sizes.heads).into_par_iter();
                    tasks.map(|t| sizes.backward(&saved, t, keys)).collect()
                })
            })
        })???;
        let collect = |which: usize, length: usize| {
            let parts: Vec<&[f32]> = heads.iter().map(|head| head[which].as_slice()).collect();
            let values = sizes.interleave(&parts, length);
            let shape = (sizes.n, length, sizes.c);
            Tensor::from_vec(values, shape, &Device::Cpu).map(Gradient::from)
        };
        let lengths = [sizes.lq, sizes.lk, sizes.lk];
        let each = wanted.into_iter().zip(lengths).enumerate();
        each.map(|(which, (wanted, length))| wanted.then(|| collect(which, length)).transpose())
            .collect()
    };
    let y = node("attention", &args, value, Box::new(gradients))?;
    // A detached tensor: it shares the values, but is no part of the graph.
    let _ = result.set(y.detach());
    Ok(y)
}

/// Queries per block.
const BLOCK: usize = 128;

#[derive(Clone, Copy)]
struct Sizes {
    n: usize,
    lq: usize,
    lk: usize,
    c: usize,
    heads: usize,
    /// Width of a head.
    d: usize,
    scale: f32,
    causal: bool,
    compute: Compute,
}

impl Sizes {
    fn new([q, k, v]: [&Tensor; 3], heads: usize, causal: bool, compute: Compute) -> Result<Self> {
        let ((n, lq, c), (kn, lk, kc)) = (q.dims3()?, k.dims3()?);
        let fit = k.dims() == v.dims() && (n, c) == (kn, kc);
        if !fit || heads == 0 || c % heads != 0 || lk == 0 {
            candle_core::bail!(
                "attention: {:?}, {:?}, {:?} do not fit {heads} heads",
                q.shape(),
                k.shape(),
                v.shape(),
            );
        }
        let d = c / heads;
        Ok(Self {
            n,
            lq,
            lk,
            c,
            heads,
            d,
            scale: (d as f32).sqrt().recip(),
            causal,
            compute,
        })
    }

    /// Rows `start..start + rows` of one head of one image.
    fn head<'a>(
        &self,
        data: &'a [f32],
        length: usize,
        task: usize,
        start: usize,
        rows: usize,
    ) -> View<'a> {
        let (image, head) = (task / self.heads, task % self.heads);
        View::rows(
            &data[(image * length + start) * self.c + head * self.d..],
            rows,
            self.d,
            self.c,
        )
    }

    fn queries<'a>(&self, q: &'a [f32], task: usize, start: usize, rows: usize) -> View<'a> {
        self.head(q, self.lq, task, start, rows)
    }

    fn keys<'a>(&self, k: &'a [f32], task: usize) -> View<'a> {
        self.head(k, self.lk, task, 0, self.lk)
    }

    /// Blocks of queries: first row and number of rows.
    fn blocks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let lq = self.lq;
        (0..lq)
            .step_by(BLOCK)
            .map(move |start| (start, BLOCK.min(lq - start)))
    }

    /// Whether the kernel for this processor applies.
    #[cfg(target_arch = "x86_64")]
    fn native(&self) -> bool {
        native_products() && !self.causal && self.d > 0
    }

    /// How many keys a query sees.
    fn visible(&self, query: usize) -> usize {
        if self.causal {
            (query + 1).min(self.lk)
        } else {
            self.lk
        }
    }

    /// Puts per-head results `[heads][l, d]` of each image side by side.
    fn interleave(&self, parts: &[&[f32]], length: usize) -> Vec<f32> {
        let values = self.n * length * self.c;
        in_parts(values, rows_of(self.c), |first, out: &mut [f32]| {
            let rows = out.chunks_exact_mut(self.c).zip(first / self.c..);
            for (out, row) in rows {
                let (image, row) = (row / length, row % length);
                for (head, out) in out.chunks_exact_mut(self.d).enumerate() {
                    let part = parts[image * self.heads + head];
                    out.copy_from_slice(&part[row * self.d..][..self.d]);
                }
            }
        })
    }

    /// Output `[lq, d]` and denominators `[lq]` of one head.
    fn forward(&self, q: &[f32], k: &[f32], v: &[f32], task: usize) -> (Vec<f32>, Vec<f32>) {
        #[cfg(target_arch = "x86_64")]
        if self.native() {
            return match self.compute {
                Compute::F32 => tiles::forward::<avx512::F32>(self, q, k, v, task),
                Compute::Bf16 => tiles::forward::<avx512::Bf16>(self, q, k, v, task),
            };
        }
        let mut out = vec![0f32; self.lq * self.d];
        let mut lse = vec![0f32; self.lq];
        let mut scores = vec![0f32; BLOCK.min(self.lq) * self.lk];
        for (start, rows) in self.blocks() {
            let scores = &mut scores[..rows * self.lk];
            multiply_here(
                self.compute,
                scores,
                self.lk,
                false,
                self.queries(q, task, start, rows),
                self.keys(k, task).t(),
            );
            vectorized(
                #[inline(always)]
                || {
                    for (i, row) in scores.chunks_exact_mut(self.lk).enumerate() {
                        lse[start + i] = softmax(row, self.visible(start + i), self.scale);
                    }
                },
            );
            let weights = View::rows(&*scores, rows, self.lk, self.lk);
            multiply_here(
                self.compute,
                &mut out[start * self.d..],
                self.d,
                false,
                weights,
                self.keys(v, task),
            );
        }
        (out, lse)
    }

    /// Gradients of one head: `[lq, d]`, and `[lk, d]` twice when `keys` asks for them.
    fn backward(&self, t: &Saved<'_>, task: usize, keys: bool) -> [Vec<f32>; 3] {
        #[cfg(target_arch = "x86_64")]
        if self.native() {
            return match self.compute {
                Compute::F32 => tiles::backward::<avx512::F32>(self, t, task, keys),
                Compute::Bf16 => tiles::backward::<avx512::Bf16>(self, t, task, keys),
            };
        }
        let mut dq = vec![0f32; self.lq * self.d];
        let sizes = if keys { self.lk * self.d } else { 0 };
        let (mut dk, mut dv) = (vec![0f32; sizes], vec![0f32; sizes]);
        let block = BLOCK.min(self.lq) * self.lk;
        let (mut p, mut ds) = (vec![0f32; block], vec![0f32; block]);
        for (start, rows) in self.blocks() {
            let (p, ds) = (&mut p[..rows * self.lk], &mut ds[..rows * self.lk]);
            let q = self.queries(t.q, task, start, rows);
            let dy = self.queries(t.dy, task, start, rows);
            multiply_here(self.compute, p, self.lk, false, q, self.keys(t.k, task).t());
            multiply_here(
                self.compute,
                ds,
                self.lk,
                false,
                dy,
                self.keys(t.v, task).t(),
            );
            let lse = &t.lse[task * self.lq + start..];
            vectorized(
                #[inline(always)]
                || {
                    let lines = p
                        .chunks_exact_mut(self.lk)
                        .zip(ds.chunks_exact_mut(self.lk));
                    for (i, (p, ds)) in lines.enumerate() {
                        let dot = self.dot(t, task, start + i);
                        score_gradients(p, ds, self.visible(start + i), self.scale, lse[i], dot);
                    }
                },
            );
            let scores = View::rows(&*ds, rows, self.lk, self.lk);
            multiply_here(
                self.compute,
                &mut dq[start * self.d..],
                self.d,
                false,
                scores,
                self.keys(t.k, task),
            );
            if keys {
                multiply_here(self.compute, &mut dk, self.d, true, scores.t(), q);
                multiply_here(
                    self.compute,
                    &mut dv,
                    self.d,
                    true,
                    View::rows(&*p, rows, self.lk, self.lk).t(),
                    dy,
                );
            }
        }
        [dq, dk, dv]
    }

    /// Sum over a query's output times its gradient.
    #[inline(always)]
    fn dot(&self, t: &Saved<'_>, task: usize, query: usize) -> f32 {
        let (image, head) = (task / self.heads, task % self.heads);
        let at = (image * self.lq + query) * self.c + head * self.d;
        sum2(
            &t.y[at..at + self.d],
            &t.dy[at..at + self.d],
            #[inline(always)]
            |y, dy| y * dy,
        ) as f32
    }
}

/// What the backward pass reads.
struct Saved<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    y: &'a [f32],
    dy: &'a [f32],
    lse: &'a [f32],
}

/// Softmax of `row * scale` over its first `visible` entries, the others 0; returns the
/// logarithm of the denominator.
#[inline(always)]
fn softmax(row: &mut [f32], visible: usize, scale: f32) -> f32 {
    let (seen, hidden) = row.split_at_mut(visible);
    hidden.fill(0.0);
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in seen.chunks(16) {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = if *v > *lane { *v } else { *lane };
        }
    }
    let max = lanes
        .iter()
        .fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a })
        * scale;
    for v in seen.iter_mut() {
        *v = exp(*v * scale - max);
    }
    let total = sum(
        seen,
        #[inline(always)]
        |v| v,
    ) as f32;
    let inverse = 1.0 / total;
    for v in seen.iter_mut() {
        *v *= inverse;
    }
    max + total.ln()
}

/// Scores in `p` become weights, gradients of weights in `ds` gradients of products.
#[inline(always)]
fn score_gradients(p: &mut [f32], ds: &mut [f32], visible: usize, scale: f32, lse: f32, dot: f32) {
    p[visible..].fill(0.0);
    ds[visible..].fill(0.0);
    for (p, ds) in p[..visible].iter_mut().zip(&mut ds[..visible]) {
        *p = exp(*p * scale - lse);
        *ds = *p * (*ds - dot) * scale;
    }
}
