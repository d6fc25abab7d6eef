//! Attention over tiles of queries and keys that stay in the second-level cache,
//! with the softmax computed on the way (Dao et al. 2022, "FlashAttention").

use std::f32::consts::{LN_2, LOG2_E};

use half::bf16;

use super::{Saved, Sizes};
use crate::avx512::{self, Arithmetic, Bf16, Element, F32, Operand, Panels, Rows};
use crate::math::{LANES, exp2, vectorized};

/// How tiles of weights are multiplied.
pub(super) trait Kernel: Arithmetic<Value: Element<Self>> {
    /// A tile of zeros.
    fn tile() -> Vec<Self::Value>;

    /// Converts a line of a tile.
    fn convert(values: &[f32], out: &mut [Self::Value]);
}

impl Kernel for F32 {
    fn tile() -> Vec<f32> {
        vec![0.0; QUERIES * KEYS]
    }

    fn convert(values: &[f32], out: &mut [f32]) {
        out.copy_from_slice(values);
    }
}

impl Kernel for Bf16 {
    fn tile() -> Vec<bf16> {
        vec![bf16::ZERO; QUERIES * KEYS]
    }

    fn convert(values: &[f32], out: &mut [bf16]) {
        avx512::narrow(values, out);
    }
}

/// Queries of a tile; even, since products may run over pairs of them.
const QUERIES: usize = 96;
/// Keys of a tile.
const KEYS: usize = 256;

/// Queries whose scores are computed and used at once: as many as a product takes, so that scores
/// stay in the first-level cache.
fn lines_at_once() -> usize {
    if crate::matrix_registers() { 32 } else { 6 }
}

/// One head of a tensor `[n, length, c]`, from row `start` on.
struct Head<'a> {
    data: &'a [f32],
    rows: usize,
    width: usize,
    stride: usize,
}

impl<'a> Head<'a> {
    fn new(sizes: &Sizes, data: &'a [f32], length: usize, task: usize) -> Self {
        let (image, head) = (task / sizes.heads, task % sizes.heads);
        Self {
            data: &data[image * length * sizes.c + head * sizes.d..],
            rows: length,
            width: sizes.d,
            stride: sizes.c,
        }
    }

    /// `rows` rows from `start` on.
    fn part(&self, start: usize, rows: usize) -> Self {
        Self {
            data: &self.data[start * self.stride..],
            rows,
            ..*self
        }
    }

    /// Products run over the width of the head.
    fn along_width(&self) -> Operand<'a, f32> {
        Operand {
            data: self.data,
            outer: self.rows,
            inner: self.width,
            outer_stride: self.stride,
            inner_stride: 1,
        }
    }

    /// Products run over the rows.
    fn along_rows(&self) -> Operand<'a, f32> {
        Operand {
            data: self.data,
            outer: self.width,
            inner: self.rows,
            outer_stride: 1,
            inner_stride: self.stride,
        }
    }
}

/// Changes a tile by `line(row, values)` and converts it.
fn each_line<S: Kernel>(
    tile: &mut [f32],
    keys: usize,
    out: &mut [S::Value],
    mut line: impl FnMut(usize, &mut [f32]),
) {
    let lines = tile.chunks_exact_mut(KEYS).zip(out.chunks_exact_mut(KEYS));
    for (i, (values, out)) in lines.enumerate() {
        line(i, &mut values[..keys]);
        // One more, so that an odd number of keys ends with a zero.
        values[keys..].fill(0.0);
        S::convert(values, out);
    }
}

/// See [`Sizes::forward`].
pub(super) fn forward<S: Kernel>(
    sizes: &Sizes,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    task: usize,
) -> (Vec<f32>, Vec<f32>)
where
    f32: Element<S>,
{
    let (lq, lk, d) = (sizes.lq, sizes.lk, sizes.d);
    let scale = sizes.scale * LOG2_E;
    let queries = Rows::new::<S, _>(Head::new(sizes, q, lq, task).along_width());
    let (k, v) = (Head::new(sizes, k, lk, task), Head::new(sizes, v, lk, task));
    let mut out = vec![0f32; lq * d];
    // Largest score so far, as a power of two, and sum of the powers relative to it.
    let (mut max, mut total) = (vec![f32::NEG_INFINITY; lq], vec![0f32; lq]);
    let lines_at_once = lines_at_once();
    let mut scores = vec![0f32; lines_at_once * KEYS];
    let mut weights = S::tile();
    let (mut k_panels, mut v_panels) = (Panels::<S>::new(), Panels::<S>::new());
    for start in (0..lk).step_by(KEYS) {
        let keys = KEYS.min(lk - start);
        k_panels.lay(k.part(start, keys).along_width());
        v_panels.lay(v.part(start, keys).along_rows());
        for first in (0..lq).step_by(QUERIES) {
            let rows = QUERIES.min(lq - first);
            for line in (0..rows).step_by(lines_at_once) {
                let lines = lines_at_once.min(rows - line);
                let scores = &mut scores[..lines * KEYS];
                k_panels.multiply(scores, KEYS, lines, false, queries.at(first + line, 0));
                each_line::<S>(scores, keys, &mut weights[line * KEYS..], |i, values| {
                    let query = first + line + i;
                    let (max, total) = (&mut max[query], &mut total[query]);
                    let grown = vectorized(
                        #[inline(always)]
                        || exponentials(values, scale, max, total),
                    );
                    if grown != 1.0 {
                        let out = &mut out[query * d..][..d];
                        out.iter_mut().for_each(|o| *o *= grown);
                    }
                });
            }
            let out = &mut out[first * d..];
            v_panels.multiply(out, d, rows, true, avx512::left(&weights, KEYS));
        }
    }
    for ((out, total), max) in out.chunks_exact_mut(d).zip(&total).zip(&mut max) {
        let inverse = 1.0 / total;
        out.iter_mut().for_each(|o| *o *= inverse);
        *max = *max * LN_2 + total.ln();
    }
    (out, max)
}

/// Scores become powers of two relative to the largest score so far; returns the factor by
/// which what was summed before has to be multiplied. `scale` and `max` count in powers of two.
#[inline(always)]
fn exponentials(line: &mut [f32], scale: f32, max: &mut f32, total: &mut f32) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (wide, rest) = line.as_chunks_mut::<LANES>();
    for chunk in &*wide {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = if *v > *lane { *v } else { *lane };
        }
    }
    let largest = lanes
        .iter()
        .chain(&*rest)
        .fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
    let new = if largest * scale > *max {
        largest * scale
    } else {
        *max
    };
    let grown = if *max == f32::NEG_INFINITY {
        0.0
    } else {
        exp2(*max - new)
    };
    let mut sums = [0f32; LANES];
    for chunk in wide {
        for (v, sum) in chunk.iter_mut().zip(&mut sums) {
            *v = exp2(v.mul_add(scale, -new));
            *sum += *v;
        }
    }
    let mut here: f32 = sums.iter().sum();
    for v in rest {
        *v = exp2(v.mul_add(scale, -new));
        here += *v;
    }
    *total = total.mul_add(grown, here);
    *max = new;
    grown
}

/// Scores in `p` become weights, gradients of weights in `ds` gradients of products.
/// `log2_scale` and `lse` count in powers of two.
#[inline(always)]
fn score_gradients(
    p: &mut [f32],
    ds: &mut [f32],
    (scale, log2_scale): (f32, f32),
    lse: f32,
    dot: f32,
) {
    for (p, ds) in p.iter_mut().zip(ds) {
        *p = exp2(p.mul_add(log2_scale, -lse));
        *ds = *p * (*ds - dot) * scale;
    }
}

/// See [`Sizes::backward`].
pub(super) fn backward<S: Kernel>(
    sizes: &Sizes,
    t: &Saved<'_>,
    task: usize,
    keys_too: bool,
) -> [Vec<f32>; 3]
where
    f32: Element<S>,
{
    let (lq, lk, d) = (sizes.lq, sizes.lk, sizes.d);
    let (q, dy) = (
        Head::new(sizes, t.q, lq, task),
        Head::new(sizes, t.dy, lq, task),
    );
    let (k, v) = (
        Head::new(sizes, t.k, lk, task),
        Head::new(sizes, t.v, lk, task),
    );
    let (q_rows, dy_rows) = (
        Rows::new::<S, _>(q.along_width()),
        Rows::new::<S, _>(dy.along_width()),
    );
    let turned = keys_too.then(|| {
        (
            Rows::new::<S, _>(q.along_rows()),
            Rows::new::<S, _>(dy.along_rows()),
        )
    });
    let dots: Vec<f32> = (0..lq).map(|query| sizes.dot(t, task, query)).collect();
    let lse = &t.lse[task * lq..][..lq];
    let scales = (sizes.scale, sizes.scale * LOG2_E);
    let mut dq = vec![0f32; lq * d];
    let size = if keys_too { lk * d } else { 0 };
    let (mut dk, mut dv) = (vec![0f32; size], vec![0f32; size]);
    let lines_at_once = lines_at_once();
    let mut p = vec![0f32; lines_at_once * KEYS];
    let mut ds = p.clone();
    let (mut p_tile, mut ds_tile) = (S::tile(), S::tile());
    // Gradients of a tile's keys and values, transposed.
    let (mut dk_part, mut dv_part) = (vec![0f32; d * KEYS], vec![0f32; d * KEYS]);
    let mut panels = [(); 4].map(|()| Panels::<S>::new());
    let [k_panels, v_panels, k_turned, tile] = &mut panels;
    for start in (0..lk).step_by(KEYS) {
        let keys = KEYS.min(lk - start);
        let (k, v) = (k.part(start, keys), v.part(start, keys));
        k_panels.lay(k.along_width());
        v_panels.lay(v.along_width());
        k_turned.lay(k.along_rows());
        for first in (0..lq).step_by(QUERIES) {
            let rows = QUERIES.min(lq - first);
            for line in (0..rows).step_by(lines_at_once) {
                let lines = lines_at_once.min(rows - line);
                let (p, ds) = (&mut p[..lines * KEYS], &mut ds[..lines * KEYS]);
                k_panels.multiply(p, KEYS, lines, false, q_rows.at(first + line, 0));
                v_panels.multiply(ds, KEYS, lines, false, dy_rows.at(first + line, 0));
                each_line::<S>(p, keys, &mut p_tile[line * KEYS..], |i, p| {
                    let query = first + line + i;
                    let (lse, dot) = (lse[query] * LOG2_E, dots[query]);
                    let ds = &mut ds[i * KEYS..][..keys];
                    vectorized(
                        #[inline(always)]
                        || score_gradients(p, ds, scales, lse, dot),
                    );
                });
                each_line::<S>(ds, keys, &mut ds_tile[line * KEYS..], |_, _| {});
            }
            let dq = &mut dq[first * d..];
            k_turned.multiply(dq, d, rows, true, avx512::left(&ds_tile, KEYS));
            if let Some((q_turned, dy_turned)) = &turned {
                let (add, word) = (first > 0, first / S::VALUES);
                let along_queries = |data| Operand {
                    data,
                    outer: keys,
                    inner: rows,
                    outer_stride: 1,
                    inner_stride: KEYS,
                };
                tile.lay(along_queries(ds_tile.as_slice()));
                tile.multiply(&mut dk_part, KEYS, d, add, q_turned.at(0, word));
                tile.lay(along_queries(p_tile.as_slice()));
                tile.multiply(&mut dv_part, KEYS, d, add, dy_turned.at(0, word));
            }
        }
        if keys_too {
            for (out, part) in [(&mut dk, &dk_part), (&mut dv, &dv_part)] {
                let rows = out[start * d..].chunks_exact_mut(d).take(keys);
                for (j, out) in rows.enumerate() {
                    for (out, line) in out.iter_mut().zip(part.chunks_exact(KEYS)) {
                        *out = line[j];
                    }
                }
            }
        }
    }
    [dq, dk, dv]
}
