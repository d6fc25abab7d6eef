//! Attention over tiles of queries and keys, with the softmax computed on the way (Dao et al.
//! 2022, "FlashAttention"). Scores become weights, and gradients of weights gradients of scores,
//! while they are in registers, and are written as operands of the next product.

use std::arch::x86_64::*;
use std::f32::consts::{LN_2, LOG2_E};

use super::{Saved, Sizes};
use crate::avx512::{
    self, Arithmetic, Bf16, Element, F32, Finish, Operand, Panels, Rows, TILE, VECTORS,
};
use crate::matrix::PANEL;

/// How weights are computed and multiplied.
pub(super) trait Kernel: Arithmetic {
    /// `2^r` for `|r| <= 1/2`: coefficients of `r`, `r^2` and so on, after 1, of least relative
    /// error.
    const POWERS: &'static [f32];
}

impl Kernel for F32 {
    /// Error below 1.1e-7.
    const POWERS: &'static [f32] = &[
        LN_2,
        2.402_228_2e-1,
        5.550_558e-2,
        9.669_692e-3,
        1.330_060_6e-3,
    ];
}

impl Kernel for Bf16 {
    /// Error below 1.1e-4, a twentieth of a rounding to bf16.
    const POWERS: &'static [f32] = &[6.932_83e-1, 2.422_11e-1, 5.500_893e-2];
}

/// `2^x` where the mask is set, else 0; infinite above 128.
///
/// # Safety
/// AVX-512.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn exp2<S: Kernel>(mask: __mmask16, x: __m512) -> __m512 {
    let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let r = _mm512_sub_ps(x, whole);
    let coefficients = S::POWERS.iter().rev().chain(&[1.0]);
    let power = coefficients
        .map(|coefficient| _mm512_set1_ps(*coefficient))
        .reduce(|power, coefficient| _mm512_fmadd_ps(power, r, coefficient))
        .unwrap_or_else(|| _mm512_setzero_ps());
    _mm512_maskz_scalef_ps(mask, power, whole)
}

/// Queries of the backward pass's tile; a multiple of what is taken at once.
const QUERIES: usize = 96;
/// Keys of the backward pass's tile.
const KEYS: usize = 256;
/// Words of keys that the forward pass takes at a time: their weights (24 KB) stay in the
/// first-level cache.
const WORDS: usize = 96;
/// Keys from whose scores the forward pass guesses the size of all scores.
const FIRST: usize = TILE;
/// Weights are relative to that guess. Sums that are greater than this may have lost values, or
/// overflow when multiplied: then the largest score is looked for.
const MOST: f32 = 1.2e27;

/// Queries whose scores the backward pass computes at once.
fn lines_at_once() -> usize {
    if crate::matrix_registers() { 32 } else { TILE }
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

/// The largest scores of 64 queries.
struct Largest {
    scores: [__m512; VECTORS],
}

impl Finish for Largest {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn tile<const R: usize>(&mut self, _: usize, sums: [[__m512; VECTORS]; R]) {
        for sums in sums {
            for (largest, sum) in self.scores.iter_mut().zip(sums) {
                *largest = _mm512_max_ps(*largest, sum);
            }
        }
    }
}

/// Scores of keys and 64 queries become a panel of weights, `[word of keys][64]`.
struct Weights<'a, S> {
    /// Factor of scores, in powers of two.
    scale: __m512,
    /// What weights are relative to, in the same.
    reference: [__m512; VECTORS],
    /// Sums of weights.
    totals: [__m512; VECTORS],
    panel: &'a mut [u32],
    arithmetic: std::marker::PhantomData<S>,
}

impl<S: Kernel> Finish for Weights<'_, S> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn tile<const R: usize>(&mut self, row: usize, sums: [[__m512; VECTORS]; R]) {
        let panel = &mut self.panel[row / S::VALUES * PANEL..][..R.div_ceil(S::VALUES) * PANEL];
        for v in 0..VECTORS {
            let mut weights = [_mm512_setzero_ps(); TILE + 1];
            let mut total = _mm512_setzero_ps();
            for (weight, sums) in weights.iter_mut().zip(&sums) {
                // SAFETY: the caller's word.
                unsafe {
                    let x = _mm512_fmsub_ps(sums[v], self.scale, self.reference[v]);
                    *weight = exp2::<S>(!0, x);
                }
                total = _mm512_add_ps(total, *weight);
            }
            self.totals[v] = _mm512_add_ps(self.totals[v], total);
            for (word, r) in (0..R).step_by(S::VALUES).enumerate() {
                // SAFETY: the caller's word; the panel has a line of 64 for each word.
                unsafe {
                    let to = panel.as_mut_ptr().add(word * PANEL + 16 * v);
                    _mm512_storeu_si512(to.cast(), S::word(weights[r], weights[r + 1]));
                }
            }
        }
    }
}

/// One head's keys and values, as the forward pass reads them.
struct Context {
    keys: Rows,
    values: Rows,
    lk: usize,
    d: usize,
}

/// What the forward pass works in.
#[derive(Default)]
struct Work {
    weights: Vec<u32>,
    /// Sums over values, `[d][64]`.
    sums: Vec<f32>,
    registers: Vec<f32>,
}

impl Context {
    /// Largest scores of a panel of queries against the first `keys` keys, in powers of two.
    ///
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn largest<S: Kernel>(
        &self,
        queries: &[u32],
        keys: usize,
        scale: __m512,
        work: &mut Work,
    ) -> [__m512; VECTORS] {
        let mut largest = Largest {
            scores: [_mm512_set1_ps(f32::NEG_INFINITY); VECTORS],
        };
        let rows = self.keys.at(0, 0);
        avx512::multiply_to::<S, _>(&mut largest, keys, rows, queries, &mut work.registers);
        largest.scores.map(|score| _mm512_mul_ps(score, scale))
    }

    /// Leaves sums of values by weights relative to `reference` in `work`, and returns the sums of
    /// weights.
    ///
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn sum<S: Kernel>(
        &self,
        queries: &[u32],
        reference: [__m512; VECTORS],
        scale: __m512,
        work: &mut Work,
    ) -> [__m512; VECTORS] {
        let mut totals = [_mm512_setzero_ps(); VECTORS];
        work.weights.resize(WORDS * PANEL, 0);
        work.sums.resize(self.d * PANEL, 0.0);
        let at_once = WORDS * S::VALUES;
        for start in (0..self.lk).step_by(at_once) {
            let keys = at_once.min(self.lk - start);
            let mut weights = Weights::<S> {
                scale,
                reference,
                totals,
                panel: &mut work.weights,
                arithmetic: std::marker::PhantomData,
            };
            let rows = self.keys.at(start, 0);
            avx512::multiply_to::<S, _>(&mut weights, keys, rows, queries, &mut work.registers);
            totals = weights.totals;
            let panel = &work.weights[..keys.div_ceil(S::VALUES) * PANEL];
            let values = self.values.at(0, start / S::VALUES);
            let sums = &mut work.sums;
            let size = (self.d, PANEL);
            avx512::multiply_panel::<S>(sums, PANEL, size, start > 0, values, panel);
        }
        totals
    }

    /// Results and logarithms of denominators of the queries of one panel.
    ///
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn attend<S: Kernel>(
        &self,
        queries: &[u32],
        scale: f32,
        out: &mut [f32],
        lse: &mut [f32],
        work: &mut Work,
    ) {
        let scale = _mm512_set1_ps(scale * LOG2_E);
        // SAFETY: the caller's word.
        let (reference, total) = unsafe {
            let mut reference = self.largest::<S>(queries, FIRST.min(self.lk), scale, work);
            let mut total = lanes(self.sum::<S>(queries, reference, scale, work));
            // Not a number is no less, either.
            if !total[..lse.len()].iter().all(|total| *total < MOST) {
                reference = self.largest::<S>(queries, self.lk, scale, work);
                total = lanes(self.sum::<S>(queries, reference, scale, work));
            }
            (lanes(reference), total)
        };
        for ((lse, total), reference) in lse.iter_mut().zip(&total).zip(reference) {
            *lse = reference * LN_2 + total.ln();
        }
        let sums = Operand {
            data: work.sums.as_slice(),
            outer: PANEL,
            inner: self.d,
            outer_stride: 1,
            inner_stride: PANEL,
        };
        let mut block = [[0; 16]; 16];
        for first in (0..lse.len()).step_by(16) {
            for column in (0..self.d).step_by(16) {
                sums.words_of::<F32>(first, column, &mut block);
                let rows = out[first * self.d..]
                    .chunks_mut(self.d)
                    .zip(&total[first..]);
                for ((row, total), values) in rows.zip(&block) {
                    let inverse = 1.0 / total;
                    for (out, value) in row[column..].iter_mut().zip(values) {
                        *out = f32::from_bits(*value) * inverse;
                    }
                }
            }
        }
    }
}

/// The values of a panel's line.
///
/// # Safety
/// AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn lanes(vectors: [__m512; VECTORS]) -> [f32; PANEL] {
    let mut lanes = [0f32; PANEL];
    for (lanes, vector) in lanes.as_chunks_mut::<16>().0.iter_mut().zip(vectors) {
        // SAFETY: the caller's word; 16 values fit.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), vector) };
    }
    lanes
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
    let context = Context {
        keys: Rows::new::<S, _>(Head::new(sizes, k, lk, task).along_width()),
        values: Rows::new::<S, _>(Head::new(sizes, v, lk, task).along_rows()),
        lk,
        d,
    };
    let mut queries = Panels::<S>::new();
    queries.lay(Head::new(sizes, q, lq, task).along_width());
    let mut work = Work::default();
    let (mut out, mut lse) = (vec![0f32; lq * d], vec![0f32; lq]);
    let panels = out.chunks_mut(PANEL * d).zip(lse.chunks_mut(PANEL));
    for (number, (out, lse)) in panels.enumerate() {
        let queries = queries.panel(number);
        // SAFETY: `Panels::lay` has looked at the processor.
        unsafe { context.attend::<S>(queries, sizes.scale, out, lse, &mut work) };
    }
    (out, lse)
}

/// Scores of queries and 64 keys become weights.
struct Again<'a, S> {
    /// Factor of scores, in powers of two.
    scale: __m512,
    /// Logarithms of the queries' denominators.
    lse: &'a [f32],
    /// Which keys there are.
    masks: [__mmask16; VECTORS],
    /// Weights, `[query][64]`.
    weights: &'a mut [f32],
    /// The same as a panel, `[word of queries][64]`.
    panel: &'a mut [u32],
    arithmetic: std::marker::PhantomData<S>,
}

impl<S: Kernel> Finish for Again<'_, S> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn tile<const R: usize>(&mut self, row: usize, sums: [[__m512; VECTORS]; R]) {
        let mut weights = [[_mm512_setzero_ps(); VECTORS]; R];
        let kept = &mut self.weights[row * PANEL..][..R * PANEL];
        for (r, (weights, sums)) in weights.iter_mut().zip(sums).enumerate() {
            let lse = _mm512_set1_ps(self.lse[row + r] * LOG2_E);
            for (v, (weight, sum)) in weights.iter_mut().zip(sums).enumerate() {
                // SAFETY: the caller's word; there is a line of 64 for each row.
                unsafe {
                    let x = _mm512_fmsub_ps(sum, self.scale, lse);
                    *weight = exp2::<S>(self.masks[v], x);
                    let to = kept.as_mut_ptr().add(r * PANEL + 16 * v);
                    _mm512_storeu_ps(to, *weight);
                }
            }
        }
        // SAFETY: the caller's word.
        unsafe { store_panel::<S, R>(self.panel, row, weights) };
    }
}

/// Products of gradients and 64 values become gradients of scaled scores.
struct ScoreGradients<'a, S> {
    /// Sums over the queries' results times their gradients.
    dots: &'a [f32],
    /// Weights, `[query][64]`.
    weights: &'a [f32],
    /// Gradients, `[query][word of keys]`, so many words apart.
    rows: &'a mut [u32],
    stride: usize,
    /// The same as a panel, `[word of queries][64]`.
    panel: &'a mut [u32],
    arithmetic: std::marker::PhantomData<S>,
}

impl<S: Kernel> Finish for ScoreGradients<'_, S> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn tile<const R: usize>(&mut self, row: usize, sums: [[__m512; VECTORS]; R]) {
        let mut gradients = sums;
        let weights = &self.weights[row * PANEL..][..R * PANEL];
        for (r, gradients) in gradients.iter_mut().enumerate() {
            let dot = _mm512_set1_ps(self.dots[row + r]);
            for (v, gradient) in gradients.iter_mut().enumerate() {
                // SAFETY: there is a line of 64 for each row.
                let weight = unsafe { _mm512_loadu_ps(weights.as_ptr().add(r * PANEL + 16 * v)) };
                *gradient = _mm512_mul_ps(weight, _mm512_sub_ps(*gradient, dot));
            }
            let line = &mut self.rows[(row + r) * self.stride..][..PANEL / S::VALUES];
            for (word, v) in (0..VECTORS).step_by(S::VALUES).enumerate() {
                // SAFETY: the caller's word; the line has as many words.
                unsafe {
                    let words = S::words(gradients[v], gradients[(v + 1) % VECTORS]);
                    _mm512_storeu_si512(line.as_mut_ptr().add(16 * word).cast(), words);
                }
            }
        }
        // SAFETY: the caller's word.
        unsafe { store_panel::<S, R>(self.panel, row, gradients) };
    }
}

/// Writes rows to a panel, `[word of rows][64]`, from an even row on; zeros behind an odd one.
///
/// # Safety
/// AVX-512 with BW, VL, BF16 and VNNI.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
unsafe fn store_panel<S: Kernel, const R: usize>(
    panel: &mut [u32],
    row: usize,
    rows: [[__m512; VECTORS]; R],
) {
    let panel = &mut panel[row / S::VALUES * PANEL..][..R.div_ceil(S::VALUES) * PANEL];
    for (word, r) in (0..R).step_by(S::VALUES).enumerate() {
        for v in 0..VECTORS {
            let second = match rows.get(r + 1) {
                Some(row) => row[v],
                None => _mm512_setzero_ps(),
            };
            // SAFETY: the caller's word; the panel has a line of 64 for each word.
            unsafe {
                let to = panel.as_mut_ptr().add(word * PANEL + 16 * v);
                _mm512_storeu_si512(to.cast(), S::word(rows[r][v], second));
            }
        }
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
    avx512::check_processor();
    // SAFETY: the processor is able.
    unsafe { gradients::<S>(sizes, t, task, keys_too) }
}

/// # Safety
/// AVX-512 with BW, VL, BF16 and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
unsafe fn gradients<S: Kernel>(
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
    let scale = _mm512_set1_ps(sizes.scale * LOG2_E);
    let mut dq = vec![0f32; lq * d];
    let size = if keys_too { lk * d } else { 0 };
    let (mut dk, mut dv) = (vec![0f32; size], vec![0f32; size]);
    let lines_at_once = lines_at_once();
    let mut weights = vec![0f32; lines_at_once * PANEL];
    let mut registers = Vec::new();
    // A tile's gradients of scores by queries, and those and weights as panels.
    let stride = KEYS / S::VALUES;
    let mut ds_rows = vec![0; QUERIES * stride];
    let panel = QUERIES / S::VALUES * PANEL;
    let mut p_panels = vec![0; KEYS / PANEL * panel];
    let mut ds_panels = p_panels.clone();
    // Gradients of a tile's keys and values, transposed.
    let (mut dk_part, mut dv_part) = (vec![0f32; d * KEYS], vec![0f32; d * KEYS]);
    let mut panels = [(); 3].map(|()| Panels::<S>::new());
    let [k_panels, v_panels, k_turned] = &mut panels;
    for start in (0..lk).step_by(KEYS) {
        let keys = KEYS.min(lk - start);
        let (k, v) = (k.part(start, keys), v.part(start, keys));
        k_panels.lay(k.along_width());
        v_panels.lay(v.along_width());
        k_turned.lay(k.along_rows());
        for first in (0..lq).step_by(QUERIES) {
            let rows = QUERIES.min(lq - first);
            let tiles = p_panels.chunks_mut(panel).zip(ds_panels.chunks_mut(panel));
            for (number, (p_panel, ds_panel)) in tiles.enumerate().take(keys.div_ceil(PANEL)) {
                let here = keys - number * PANEL;
                let masks = [0, 1, 2, 3].map(|v| avx512::mask16(here.saturating_sub(16 * v)));
                for line in (0..rows).step_by(lines_at_once) {
                    let (query, lines) = (first + line, lines_at_once.min(rows - line));
                    let word = line / S::VALUES * PANEL;
                    let mut again = Again::<S> {
                        scale,
                        lse: &lse[query..],
                        masks,
                        weights: &mut weights,
                        panel: &mut p_panel[word..],
                        arithmetic: std::marker::PhantomData,
                    };
                    avx512::multiply_to::<S, _>(
                        &mut again,
                        lines,
                        q_rows.at(query, 0),
                        k_panels.panel(number),
                        &mut registers,
                    );
                    let mut scores = ScoreGradients::<S> {
                        dots: &dots[query..],
                        weights: &weights,
                        rows: &mut ds_rows[line * stride + number * PANEL / S::VALUES..],
                        stride,
                        panel: &mut ds_panel[word..],
                        arithmetic: std::marker::PhantomData,
                    };
                    avx512::multiply_to::<S, _>(
                        &mut scores,
                        lines,
                        dy_rows.at(query, 0),
                        v_panels.panel(number),
                        &mut registers,
                    );
                }
            }
            let dq = &mut dq[first * d..];
            k_turned.multiply(dq, d, rows, true, avx512::left(&ds_rows, stride));
            if let Some((q_turned, dy_turned)) = &turned {
                let (add, word) = (first > 0, first / S::VALUES);
                let depth = rows.div_ceil(S::VALUES) * PANEL;
                let products = [
                    (&mut dk_part, &ds_panels, q_turned),
                    (&mut dv_part, &p_panels, dy_turned),
                ];
                for (part, panels, turned) in products {
                    for (number, panel) in panels.chunks(panel).enumerate() {
                        if number * PANEL < keys {
                            let (part, panel) = (&mut part[number * PANEL..], &panel[..depth]);
                            let left = turned.at(0, word);
                            let size = (d, PANEL);
                            avx512::multiply_panel::<S>(part, KEYS, size, add, left, panel);
                        }
                    }
                }
            }
        }
        if keys_too {
            let parts = [(&mut dk, &dk_part, sizes.scale), (&mut dv, &dv_part, 1.0)];
            for (out, part, scale) in parts {
                let rows = out[start * d..].chunks_exact_mut(d).take(keys);
                for (j, out) in rows.enumerate() {
                    for (out, line) in out.iter_mut().zip(part.chunks_exact(KEYS)) {
                        *out = line[j] * scale;
                    }
                }
            }
        }
    }
    dq.iter_mut().for_each(|dq| *dq *= sizes.scale);
    [dq, dk, dv]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_agree_with_double_precision() {
        /// Largest relative error.
        fn error<S: Kernel>() -> f64 {
            let mut largest = 0f64;
            for first in -7_800..=7_900i16 {
                let x = std::array::from_fn::<f32, 16, _>(|i| {
                    (f32::from(first) + i as f32 / 16.0) / 64.0
                });
                let mut powers = [0f32; 16];
                // SAFETY: the caller has looked at the processor; 16 values fit.
                unsafe {
                    _mm512_storeu_ps(
                        powers.as_mut_ptr(),
                        exp2::<S>(!0, _mm512_loadu_ps(x.as_ptr())),
                    );
                }
                for (x, power) in x.into_iter().zip(powers) {
                    let want = f64::from(x).exp2();
                    largest = largest.max((f64::from(power) - want).abs() / want);
                }
            }
            largest
        }
        if !avx512::available() {
            return;
        }
        assert!(error::<F32>() < 2e-7, "{}", error::<F32>());
        assert!(error::<Bf16>() < 1.1e-4, "{}", error::<Bf16>());
    }
}
