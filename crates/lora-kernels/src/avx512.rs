//! Matrix products with AVX-512, in f32 or with operands rounded to bf16.
//!
//! The inner dimension is cut into words of 32 bits: one f32 value, or two bf16 values that
//! follow one another, which is what `vdpbf16ps` multiplies. The left operand lies row by
//! row, the right one in panels of 64 columns, `[word][column]`; a tile of 6 rows by 64
//! columns is summed in registers. A left operand whose rows are stored that way already is
//! read where it lies. Everything else is laid out (and rounded, to nearest, ties to even)
//! once per product: for the operand with fewer rows or columns at once, for the other one
//! block by block, by the thread that multiplies it.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use half::bf16;
use rayon::prelude::*;

use crate::amx;
use crate::buffer::{Onto, Start, share, zeros};
use crate::conv3x3::TAPS;
use crate::matrix::{PANEL, PARALLEL_PRODUCTS};

/// Rows of a tile; with four vectors of 16 columns its sums fill 24 registers.
pub(crate) const TILE: usize = 6;
/// Words of a line of the caches.
const LINE: usize = 16;
/// Vectors of a panel's line.
pub(crate) const VECTORS: usize = PANEL / 16;
/// Most words multiplied before sums are written: a panel's part (160 KB) stays in the
/// second-level cache.
const DEPTH: usize = 640;
/// From how many words on what a tile writes to is fetched before it is summed.
const LONG: usize = 64;
/// Rows, or panels, per task.
const TASK_ROWS: usize = 16 * TILE;
const TASK_PANELS: usize = 2;

/// Whether this processor can do it. BF16 and VNNI, which comes with it, are asked for by the f32
/// products, too, so that all functions here are compiled for one set of instructions.
pub(crate) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512vnni")
}

pub(crate) fn check_processor() {
    assert!(
        available(),
        "the processor lacks AVX-512 with BF16 and VNNI"
    );
}

/// How words are multiplied.
pub(crate) trait Arithmetic: Copy + Send + Sync + 'static {
    /// What a word is made of.
    type Value: Copy;
    /// Values per word.
    const VALUES: usize;
    /// Whether matrix registers can do it, where there are any.
    const MATRIX: bool;

    /// `sum + a b`, where words of several values add all their products.
    ///
    /// # Safety
    /// The processor is able.
    unsafe fn add_product(sum: __m512, a: __m512i, b: __m512i) -> __m512;

    /// The lower half of that, in half the time where there are no units for more; the upper half may be
    /// anything.
    ///
    /// # Safety
    /// The processor is able.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn add_half_product(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: the caller's word.
        unsafe { Self::add_product(sum, a, b) }
    }

    /// 16 words, of a value of each of these, or of `first` alone.
    ///
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI.
    unsafe fn word(first: __m512, second: __m512) -> __m512i;

    /// 16 words of as many values in their order as they are made of: `low`, then `high`.
    ///
    /// # Safety
    /// AVX-512 with BF16.
    unsafe fn words(low: __m512, high: __m512) -> __m512i;
}

/// f32 throughout.
#[derive(Clone, Copy)]
pub(crate) struct F32;

/// Operands in bf16, sums in f32.
#[derive(Clone, Copy)]
pub(crate) struct Bf16;

/// Operands in whole numbers of 16 bits, sums in 32 bits, which nothing here keeps from overflowing.
/// Sums are numbers of that kind in vectors of f32, for [`multiply_to`] only.
#[derive(Clone, Copy)]
pub(crate) struct Int16;

impl Arithmetic for Int16 {
    type Value = i16;
    const VALUES: usize = 2;
    const MATRIX: bool = false;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn add_product(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        let mut sum = sum;
        // The intrinsic becomes a product and an addition, which take half as long again.
        // SAFETY: the instruction is there by the caller's word, and touches these registers only.
        unsafe {
            std::arch::asm!(
                "vpdpwssd {sum}, {a}, {b}",
                sum = inout(zmm_reg) sum,
                a = in(zmm_reg) a,
                b = in(zmm_reg) b,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        sum
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn word(first: __m512, second: __m512) -> __m512i {
        let [first, second] = [first, second].map(|value| _mm512_cvtps_epi32(value));
        let low = _mm512_and_si512(first, _mm512_set1_epi32(0xffff));
        _mm512_or_si512(low, _mm512_slli_epi32::<16>(second))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn words(low: __m512, high: __m512) -> __m512i {
        let [low, high] = [low, high].map(|v| _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
    }
}

impl Arithmetic for F32 {
    type Value = f32;
    const VALUES: usize = 1;
    const MATRIX: bool = false;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn add_product(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn add_half_product(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        let [a, b] = [a, b].map(|word| _mm256_castsi256_ps(_mm512_castsi512_si256(word)));
        _mm512_castps256_ps512(_mm256_fmadd_ps(a, b, _mm512_castps512_ps256(sum)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn word(first: __m512, _: __m512) -> __m512i {
        _mm512_castps_si512(first)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn words(low: __m512, _: __m512) -> __m512i {
        _mm512_castps_si512(low)
    }
}

impl Arithmetic for Bf16 {
    type Value = bf16;
    const VALUES: usize = 2;
    const MATRIX: bool = true;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn add_product(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: both types are 64 bytes without invalid values.
        let [a, b] = [a, b].map(|word| unsafe { std::mem::transmute::<__m512i, __m512bh>(word) });
        _mm512_dpbf16_ps(sum, a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn add_half_product(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: both types are 32 bytes without invalid values.
        let [a, b] = [a, b].map(|word| unsafe {
            std::mem::transmute::<__m256i, __m256bh>(_mm512_castsi512_si256(word))
        });
        _mm512_castps256_ps512(_mm256_dpbf16_ps(_mm512_castps512_ps256(sum), a, b))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn word(first: __m512, second: __m512) -> __m512i {
        let turns = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
            4, 19, 3, 18, 2, 17, 1, 16, 0,
        );
        // SAFETY: the caller's word.
        unsafe { _mm512_permutexvar_epi16(turns, Self::words(first, second)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn words(low: __m512, high: __m512) -> __m512i {
        // SAFETY: both types are 64 bytes without invalid values.
        unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
    }
}

/// A value that words can be made of.
pub(crate) trait Element<S: Arithmetic>: Plain + Copy + Send + Sync {
    /// Whether values are stored as in words.
    const IN_PLACE: bool;

    /// `n` values in their order as 16 words, zeros behind them.
    ///
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI; `from` is good for reading `n` values.
    unsafe fn along(from: *const Self, n: usize) -> __m512i;

    /// 16 words of values of one row, or, where a word has two, of two rows: `n` words, then
    /// zeros; zeros for the second row where `single`.
    ///
    /// # Safety
    /// As for `along`, for both pointers; the second is not read where `single`.
    unsafe fn across(first: *const Self, second: *const Self, n: usize, single: bool) -> __m512i;
}

/// A value that kernels of 3x3 convolutions are made of.
pub(crate) trait Taps: Element<F32> {
    /// Sixteen kernels, one after the other, tap by tap.
    ///
    /// # Safety
    /// AVX-512 with BW; `from` is good for reading 144 values.
    unsafe fn taps(from: *const Self, taps: &mut [__m512; TAPS]);
}

impl Taps for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn taps(from: *const f32, taps: &mut [__m512; TAPS]) {
        let kernels = _mm512_mullo_epi32(
            _mm512_set1_epi32(TAPS as i32),
            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
        );
        for (tap, values) in taps.iter_mut().enumerate() {
            // SAFETY: the caller's word.
            *values = unsafe { _mm512_i32gather_ps::<4>(kernels, from.add(tap)) };
        }
    }
}

/// For each tap, where its sixteen values are among 144: the lower bits of their places, in the upper
/// half of each lane, and which of them are among the first 64, the next 64, and the last 16.
static PLACES: [([u16; 32], [u32; 3]); TAPS] = {
    let mut places = [([0; 32], [0; 3]); TAPS];
    let mut tap = 0;
    while tap < TAPS {
        let mut lane = 0;
        while lane < 16 {
            let at = lane * TAPS + tap;
            places[tap].0[2 * lane + 1] = (at % 64) as u16;
            places[tap].1[at / 64] |= 1 << (2 * lane + 1);
            lane += 1;
        }
        tap += 1;
    }
    places
};

impl Taps for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn taps(from: *const bf16, taps: &mut [__m512; TAPS]) {
        // SAFETY: the caller's word: 4 times 32 values, and 16.
        let ([a, b, c, d], e) = unsafe {
            (
                [0, 1, 2, 3].map(|part| _mm512_loadu_si512(from.add(32 * part).cast())),
                _mm512_zextsi256_si512(_mm256_loadu_si256(from.add(128).cast())),
            )
        };
        for (values, (places, [first, next, last])) in taps.iter_mut().zip(&PLACES) {
            // SAFETY: 32 places are read.
            let at = unsafe { _mm512_loadu_si512(places.as_ptr().cast()) };
            let first = _mm512_maskz_permutex2var_epi16(*first, a, at, b);
            let next = _mm512_maskz_permutex2var_epi16(*next, c, at, d);
            let last = _mm512_maskz_permutexvar_epi16(*last, at, e);
            let all = _mm512_or_si512(_mm512_or_si512(first, next), last);
            *values = _mm512_castsi512_ps(all);
        }
    }
}

/// The lower lanes of a vector.
const HALF: __mmask16 = 0xff;

/// The first `n` lanes, at most 16.
pub(crate) fn mask16(n: usize) -> __mmask16 {
    ((1u32 << n.min(16)) - 1) as __mmask16
}

impl Element<F32> for f32 {
    const IN_PLACE: bool = true;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn along(from: *const f32, n: usize) -> __m512i {
        // SAFETY: the mask keeps the reads to `n` values.
        unsafe { _mm512_maskz_loadu_epi32(mask16(n), from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn across(first: *const f32, _: *const f32, n: usize, _: bool) -> __m512i {
        // SAFETY: the caller's word.
        unsafe { <f32 as Element<F32>>::along(first, n) }
    }
}

impl Element<F32> for bf16 {
    const IN_PLACE: bool = false;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn along(from: *const bf16, n: usize) -> __m512i {
        // SAFETY: the mask keeps the reads to `n` values.
        let narrow = unsafe { _mm256_maskz_loadu_epi16(mask16(n), from.cast()) };
        _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn across(first: *const bf16, _: *const bf16, n: usize, _: bool) -> __m512i {
        // SAFETY: the caller's word.
        unsafe { <bf16 as Element<F32>>::along(first, n) }
    }
}

impl Element<Bf16> for f32 {
    const IN_PLACE: bool = false;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn along(from: *const f32, n: usize) -> __m512i {
        // SAFETY: masks keep the reads to `n` values.
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask16(n), from);
            let high = _mm512_maskz_loadu_ps(mask16(n.saturating_sub(16)), from.wrapping_add(16));
            Bf16::words(low, high)
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn across(first: *const f32, second: *const f32, n: usize, single: bool) -> __m512i {
        // SAFETY: as in `along`.
        unsafe {
            let mask = mask16(n);
            let a = _mm512_maskz_loadu_ps(mask, first);
            let b = _mm512_maskz_loadu_ps(if single { 0 } else { mask }, second);
            Bf16::word(a, b)
        }
    }
}

impl Element<Bf16> for bf16 {
    const IN_PLACE: bool = true;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn along(from: *const bf16, n: usize) -> __m512i {
        let mask = ((1u64 << n.min(32)) - 1) as __mmask32;
        // SAFETY: the mask keeps the reads to `n` values.
        unsafe { _mm512_maskz_loadu_epi16(mask, from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn across(first: *const bf16, second: *const bf16, n: usize, single: bool) -> __m512i {
        let mask = mask16(n);
        // SAFETY: the masks keep the reads to `n` values.
        unsafe {
            let a = _mm256_maskz_loadu_epi16(mask, first.cast());
            let b = _mm256_maskz_loadu_epi16(if single { 0 } else { mask }, second.cast());
            let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(b));
            _mm512_or_si512(_mm512_cvtepu16_epi32(a), high)
        }
    }
}

/// An operand: `outer` rows (of the left one) or columns (of the right one) by `inner`
/// values; element `(o, i)` lies at `o * outer_stride + i * inner_stride`, and one of
/// the strides is 1.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) outer: usize,
    pub(crate) inner: usize,
    pub(crate) outer_stride: usize,
    pub(crate) inner_stride: usize,
}

impl<'a, T: Copy> Operand<'a, T> {
    /// One whose rows (or columns) are stored one after the other.
    pub(crate) fn dense(data: &'a [T], outer: usize, inner: usize) -> Self {
        Self {
            data,
            outer,
            inner,
            outer_stride: inner,
            inner_stride: 1,
        }
    }

    pub(crate) fn check(&self) {
        assert!(
            self.outer_stride == 1 || self.inner_stride == 1,
            "one dimension must be contiguous"
        );
        if self.outer > 0 && self.inner > 0 {
            let last = (self.outer - 1) * self.outer_stride + (self.inner - 1) * self.inner_stride;
            assert!(last < self.data.len(), "operand exceeds its slice");
        }
    }

    /// Words along the inner dimension.
    fn words<S: Arithmetic>(&self) -> usize {
        self.inner.div_ceil(S::VALUES)
    }

    /// Sets `words` to 16 by 16 words from row (or column) `o` and word `w` on, `[o][word]`, or with
    /// `turned` `[word][o]`; zeros beyond the ends.
    ///
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI, `check` has passed, `o < outer`, `w < words()`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    pub(crate) unsafe fn block<S: Arithmetic>(
        &self,
        o: usize,
        w: usize,
        turned: bool,
        words: &mut [__m512i; 16],
    ) where
        T: Element<S>,
    {
        let start = self.data.as_ptr();
        words.fill(_mm512_setzero_si512());
        if self.inner_stride == 1 {
            let i = S::VALUES * w;
            let n = (self.inner - i).min(16 * S::VALUES);
            let rows = (self.outer - o).min(16);
            for (r, word) in words.iter_mut().enumerate().take(rows) {
                // SAFETY: row `o + r` exists and has `n` values from `i` on.
                *word = unsafe { T::along(start.add((o + r) * self.outer_stride + i), n) };
            }
            if turned {
                transpose(words);
            }
        } else {
            let (count, n) = ((self.words::<S>() - w).min(16), (self.outer - o).min(16));
            for (r, word) in words.iter_mut().enumerate().take(count) {
                let i = S::VALUES * (w + r);
                let single = i + 1 == self.inner;
                // SAFETY: inner rows `i` and, where it is read, `i + 1` exist, and have `n`
                // values from `o` on.
                *word = unsafe {
                    let first = start.add(i * self.inner_stride + o);
                    T::across(first, first.wrapping_add(self.inner_stride), n, single)
                };
            }
            if !turned {
                transpose(words);
            }
        }
    }

    /// Writes 16 words from word `w` on of up to 16 rows (or columns) from `o` on; zeros beyond
    /// the ends.
    pub(crate) fn words_of<S: Arithmetic>(&self, o: usize, w: usize, out: &mut [[u32; 16]; 16])
    where
        T: Element<S>,
    {
        check_processor();
        self.check();
        assert!(o < self.outer && w < self.words::<S>());
        // SAFETY: the processor is able, the operand is checked, `o` and `w` are inside.
        unsafe { self.write_block::<S>(o, w, out) };
    }

    /// # Safety
    /// As for `block`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn write_block<S: Arithmetic>(&self, o: usize, w: usize, out: &mut [[u32; 16]; 16])
    where
        T: Element<S>,
    {
        let mut words = [_mm512_setzero_si512(); 16];
        // SAFETY: the caller's word.
        unsafe { self.block::<S>(o, w, false, &mut words) };
        for (out, word) in out.iter_mut().zip(&words) {
            store(out, *word);
        }
    }

    /// The left operand's rows `from..to`, `[row][stride]`.
    ///
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI, `check` has passed.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn rows<S: Arithmetic>(&self, from: usize, to: usize, out: &mut Vec<u32>)
    where
        T: Element<S>,
    {
        let stride = self.words::<S>().next_multiple_of(16);
        grow(out, (to - from).next_multiple_of(16) * stride);
        if self.inner_stride == 1 {
            for (row, out) in (from..to).zip(out.chunks_exact_mut(stride.max(1))) {
                for (w, out) in out.chunks_exact_mut(16).enumerate() {
                    let i = 16 * S::VALUES * w;
                    let n = (self.inner - i).min(16 * S::VALUES);
                    // SAFETY: the row exists and has `n` values from `i` on.
                    let words = unsafe {
                        let start = self.data.as_ptr().add(row * self.outer_stride + i);
                        T::along(start, n)
                    };
                    store(out, words);
                }
            }
            return;
        }
        let mut words = [_mm512_setzero_si512(); 16];
        // What lies far apart is read once.
        for w in (0..self.words::<S>()).step_by(16) {
            self.fetch::<S>(from, to, w + 16);
            for o in (from..to).step_by(16) {
                // SAFETY: `o` and `w` are inside.
                unsafe { self.block::<S>(o, w, false, &mut words) };
                for (r, word) in words.iter().enumerate() {
                    let at = (o - from + r) * stride + w;
                    store(&mut out[at..at + 16], *word);
                }
            }
        }
    }

    /// Part of one panel of the right operand, `[word][64]`: `depth` words from `first` on (a
    /// multiple of 16) of the columns from `column` on.
    ///
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI, `check` has passed.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn panel<S: Arithmetic>(
        &self,
        column: usize,
        first: usize,
        depth: usize,
        out: &mut [u32],
    ) where
        T: Element<S>,
    {
        let columns = PANEL.min(self.outer - column);
        let mut words = [_mm512_setzero_si512(); 16];
        let mut lay = |o: usize, w: usize| {
            // SAFETY: column and word are inside.
            unsafe { self.block::<S>(column + o, first + w, true, &mut words) };
            for (r, word) in words.iter().enumerate() {
                let at = (w + r) * PANEL + o;
                store(&mut out[at..at + 16], *word);
            }
        };
        if self.inner_stride == 1 {
            for o in (0..columns).step_by(16) {
                (0..depth).step_by(16).for_each(|w| lay(o, w));
            }
            return;
        }
        for w in (0..depth).step_by(16) {
            self.fetch::<S>(column, column + columns, first + w + 16);
            (0..columns).step_by(16).for_each(|o| lay(o, w));
        }
    }

    /// Has the second-level cache, which keeps more requests going than the first, fetch 16 words from
    /// word `w` on of these rows (or columns), where values of a word lie apart.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn fetch<S: Arithmetic>(&self, from: usize, to: usize, w: usize) {
        let inner = (S::VALUES * w).min(self.inner)..(S::VALUES * (w + 16)).min(self.inner);
        for i in inner {
            let start = self
                .data
                .as_ptr()
                .wrapping_add(i * self.inner_stride + from);
            for byte in (0..(to - from) * size_of::<T>()).step_by(64) {
                _mm_prefetch::<_MM_HINT_T1>(start.cast::<i8>().wrapping_add(byte));
            }
        }
    }
}

/// Memory that is fetched while something else is computed: so many lines of the caches, row by row.
struct Ahead {
    row: *const i8,
    stride: usize,
    rows: usize,
    /// Lines of a row, and how many of the present one have been fetched.
    lines: usize,
    fetched: usize,
    /// Lines at a time.
    at_once: usize,
}

impl Ahead {
    /// What [`Operand::panel`] reads for `columns` columns from the given one on and the words of a part.
    fn of<S: Arithmetic, T: Copy>(
        b: &Operand<'_, T>,
        (column, columns): (usize, usize),
        (first, depth): (usize, usize),
    ) -> Self {
        let along = S::VALUES * first..(S::VALUES * (first + depth)).min(b.inner);
        let (rows, stride, values) = match b.inner_stride {
            1 => (columns, b.outer_stride, along.len()),
            _ if columns == 0 => (0, 0, 0),
            _ => (along.len(), b.inner_stride, columns),
        };
        let start = column * b.outer_stride + along.start * b.inner_stride;
        Self {
            row: b.data.as_ptr().wrapping_add(start).cast(),
            stride: stride * size_of::<T>(),
            rows,
            lines: values * size_of::<T>() / 64 + 1,
            fetched: 0,
            at_once: 0,
        }
    }

    /// All of it in so many times.
    fn in_times(self, times: usize) -> Self {
        let at_once = (self.rows * self.lines).div_ceil(times.max(1));
        Self { at_once, ..self }
    }

    /// What is not there is not fetched.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn fetch(&mut self) {
        for _ in 0..self.at_once {
            if self.rows == 0 {
                return;
            }
            _mm_prefetch::<_MM_HINT_T1>(self.row.wrapping_add(64 * self.fetched));
            self.fetched += 1;
            if self.fetched == self.lines {
                self.fetched = 0;
                self.rows -= 1;
                self.row = self.row.wrapping_add(self.stride);
            }
        }
    }
}

/// At least `length` words; what they are does not matter.
fn grow(out: &mut Vec<u32>, length: usize) {
    if out.len() < length {
        out.resize(length, 0);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(out: &mut [u32], word: __m512i) {
    assert!(out.len() >= 16);
    // SAFETY: 16 words fit.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), word) }
}

/// Rows become columns.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(w: &mut [__m512i; 16]) {
    for i in (0..16).step_by(2) {
        let (a, b) = (w[i], w[i + 1]);
        (w[i], w[i + 1]) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }
    let mut v = *w;
    for i in (0..16).step_by(4) {
        v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
    }
    // Now row 4 a + b has columns b, 4 + b, 8 + b, 12 + b of rows 4 a to 4 a + 3.
    for b in 0..4 {
        let (r0, r1, r2, r3) = (v[b], v[4 + b], v[8 + b], v[12 + b]);
        let low = _mm512_shuffle_i32x4::<0x88>(r0, r1);
        let high = _mm512_shuffle_i32x4::<0xdd>(r0, r1);
        let low2 = _mm512_shuffle_i32x4::<0x88>(r2, r3);
        let high2 = _mm512_shuffle_i32x4::<0xdd>(r2, r3);
        w[b] = _mm512_shuffle_i32x4::<0x88>(low, low2);
        w[8 + b] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
        w[4 + b] = _mm512_shuffle_i32x4::<0x88>(high, high2);
        w[12 + b] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
    }
}

/// Memory that several tasks write to, each its own elements.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T);

// SAFETY: tasks write disjoint elements.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(start: *mut T) -> Self {
        Self(start)
    }

    pub(crate) fn at(&self, number: usize) -> *mut T {
        self.0.wrapping_add(number)
    }
}

/// A matrix that several threads write to, each its own elements.
#[derive(Clone, Copy)]
struct Output {
    start: *mut f32,
    stride: usize,
    columns: usize,
    /// Whether sums are added to what is there.
    add: bool,
    begin: Begin,
    /// What is fetched meanwhile; null for nothing. It belongs to the task that has this copy.
    ahead: *mut Ahead,
}

/// What the sums of an [`Output`], of a [`Part`] of it, or of a [`Tile`], begin with, beside what
/// may be there; null where there is nothing.
#[derive(Clone, Copy)]
struct Begin {
    /// Rows as far apart as those of the output.
    residual: *const f32,
    /// A value for each column, and for each row.
    columns: *const f32,
    rows: *const f32,
}

impl Begin {
    const NOTHING: Self = Self {
        residual: std::ptr::null(),
        columns: std::ptr::null(),
        rows: std::ptr::null(),
    };

    fn of(start: Start<'_>) -> Self {
        let pointer = |values: Option<&[f32]>| values.map_or(std::ptr::null(), <[f32]>::as_ptr);
        Self {
            residual: pointer(start.residual),
            columns: pointer(start.columns),
            rows: pointer(start.rows),
        }
    }

    fn is_nothing(self) -> bool {
        self.residual.is_null() && self.columns.is_null() && self.rows.is_null()
    }

    /// From this row and column on, of rows that are `stride` apart.
    fn from(self, row: usize, column: usize, stride: usize) -> Self {
        let at = |start: *const f32, place: usize| match start.is_null() {
            true => start,
            false => start.wrapping_add(place),
        };
        Self {
            residual: at(self.residual, row * stride + column),
            columns: at(self.columns, column),
            rows: at(self.rows, row),
        }
    }
}

impl Output {
    /// The same, with something fetched meanwhile.
    fn fetching(self, ahead: &mut Ahead) -> Self {
        Self { ahead, ..self }
    }

    /// The same, to be added to once more.
    fn adding(self) -> Self {
        Self {
            add: true,
            begin: Begin::NOTHING,
            ahead: std::ptr::null_mut(),
            ..self
        }
    }
}

// SAFETY: tasks write disjoint elements, and what is fetched ahead is set by a task for itself.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// Left rows ready to be multiplied.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    /// Words in halves, `[row][stride]`: rows of bf16 need not begin at a word.
    halves: &'a [u16],
    stride: usize,
}

/// `dst = a b`, or `dst += a b` with `accumulate`; `a`'s outer dimension are the rows of
/// `dst`, `stride` apart, `b`'s its columns. Sums run over the inner dimension in an order
/// that depends on its length only.
pub(crate) fn multiply<S: Arithmetic, A: Element<S>, B: Element<S>>(
    dst: &mut [f32],
    stride: usize,
    accumulate: bool,
    a: Operand<'_, A>,
    b: Operand<'_, B>,
    parallel: bool,
) where
    f32: Element<S>,
{
    let (m, n) = (a.outer, b.outer);
    if m == 0 || n == 0 {
        return;
    }
    assert!(
        n <= stride && (m - 1) * stride + n <= dst.len(),
        "product exceeds its slice"
    );
    if a.inner == 0 && !accumulate {
        let rows = dst.chunks_mut(stride).take(m);
        rows.for_each(|d| d[..n].fill(0.0));
    }
    let out = Output {
        start: dst.as_mut_ptr(),
        stride,
        columns: n,
        add: accumulate,
        begin: Begin::NOTHING,
        ahead: std::ptr::null_mut(),
    };
    // SAFETY: the assertion above, and the values of `dst` are there.
    unsafe { product(out, a, b, &[], &mut [], parallel) };
}

/// `onto = a b` with `more` products and `chains`, all of it, of as many rows and columns as the operands
/// have.
pub(crate) fn multiply_onto<'d, S: Arithmetic, A: Element<S>, B: Element<S>>(
    mut onto: Onto<'d, '_>,
    a: Operand<'_, A>,
    b: Operand<'_, B>,
    more: More<'_>,
    chains: &mut [Chain<'_, '_>],
    parallel: bool,
) -> &'d mut [f32]
where
    f32: Element<S>,
{
    let (m, n) = (a.outer, b.outer);
    assert_eq!(m * n, onto.len(), "product of another size");
    if m == 0 || n == 0 || a.inner == 0 {
        let dst = onto.begun(n);
        for (a, b) in more {
            multiply::<S, _, _>(dst, n, true, *a, *b, parallel);
        }
        chains.iter_mut().for_each(|chain| chain.middle.fill(0.0));
        return dst;
    }
    let (start, add, begin) = match &mut onto {
        Onto::New(dst, start) => {
            start.check(m, n);
            (dst.as_mut_ptr().cast(), false, Begin::of(*start))
        }
        Onto::Sum(dst) => (dst.as_mut_ptr(), true, Begin::NOTHING),
    };
    let out = Output {
        start,
        stride: n,
        columns: n,
        add,
        begin,
        ahead: std::ptr::null_mut(),
    };
    // SAFETY: sizes are those asserted and checked above; values are there if they are added to.
    unsafe { product(out, a, b, more, chains, parallel) };
    match onto {
        // SAFETY: as nothing is added to what is there, the product writes every value before any is
        // read.
        Onto::New(dst, _) => unsafe { dst.assume_init_mut() },
        Onto::Sum(dst) => dst,
    }
}

/// # Safety
/// `out` has as many rows and columns as `a` and `b`, and so has what its sums begin with; its
/// values are there if it adds to them.
unsafe fn product<S: Arithmetic, A: Element<S>, B: Element<S>>(
    out: Output,
    a: Operand<'_, A>,
    b: Operand<'_, B>,
    more: More<'_>,
    chains: &mut [Chain<'_, '_>],
    parallel: bool,
) where
    f32: Element<S>,
{
    let (m, n, k) = (a.outer, b.outer, a.inner);
    check_processor();
    assert_eq!(k, b.inner, "inner dimensions differ");
    a.check();
    b.check();
    for (a, b) in more {
        assert_eq!((a.outer, b.outer, a.inner), (m, n, b.inner), "sizes differ");
        a.check();
        b.check();
    }
    for Chain { p, q, middle } in &*chains {
        assert_eq!((p.inner, q.outer, q.inner), (k, n, p.outer), "sizes differ");
        assert_eq!(middle.len(), m * p.outer, "middle of another size");
        p.check();
        q.check();
    }
    if k == 0 {
        return;
    }
    let parallel = parallel && m * n * k >= PARALLEL_PRODUCTS;
    let laid = |(a, b): &(_, _)| (Rows::new::<S, f32>(*a), Panels::of(*b, parallel));
    let mut more: Vec<_> = more.iter().filter(|(a, _)| a.inner > 0).map(laid).collect();
    if more.is_empty() && chains.is_empty() && a.inner_stride != 1 && n <= PANEL && m >= 4 * n {
        // SAFETY: the caller's word.
        return unsafe { turned::<S, A, B>(out, a, b, parallel) };
    }
    let chains = chains.iter_mut().filter(|chain| chain.p.outer > 0);
    let chains: Vec<_> = chains.collect();
    // SAFETY: the processor is able, both operands are checked, and the caller's word.
    unsafe {
        let alone = more.is_empty() && chains.is_empty();
        if let Some(panel) = panel_in_place::<S, B>(b).filter(|_| alone) {
            by_panels::<S, A>(out, a, panel, panel.len(), &[], &[], parallel);
        } else if m >= n {
            let chains: Vec<_> = chains
                .into_iter()
                .map(|chain| Links {
                    p: Panels::of(chain.p, parallel),
                    q: Panels::of(chain.q, parallel),
                    middle: Shared::new(chain.middle.as_mut_ptr()),
                })
                .collect();
            by_rows::<S, A, B>(out, a, b, &more, &chains, parallel);
        } else {
            for Chain { p, q, middle } in chains {
                multiply::<S, _, _>(middle, p.outer, false, a, *p, parallel);
                let middle = Operand::dense(middle, m, p.outer);
                more.push((Rows::new::<S, f32>(middle), Panels::of(*q, parallel)));
            }
            by_columns::<S, A, B>(out, a, b, &more, parallel);
        }
    }
}

/// A product `a p q` that is added to a product `a b`, and where `a p` is left.
pub(crate) struct Chain<'a, 'm> {
    pub(crate) p: Operand<'a, f32>,
    pub(crate) q: Operand<'a, f32>,
    /// As many rows as `a` has, of as many values as `p` has columns.
    pub(crate) middle: &'m mut [f32],
}

/// A [`Chain`] whose right operands are laid out.
struct Links<S> {
    p: Panels<S>,
    q: Panels<S>,
    middle: Shared<f32>,
}

/// Products that are added to another one of the same size.
pub(crate) type More<'a> = &'a [(Operand<'a, f32>, Operand<'a, f32>)];

/// The product as columns, which become rows in the end: a large left operand whose values of a word
/// lie apart is laid out in half the instructions as a right one.
///
/// # Safety
/// As for [`product`].
unsafe fn turned<S: Arithmetic, A: Element<S>, B: Element<S>>(
    out: Output,
    a: Operand<'_, A>,
    b: Operand<'_, B>,
    parallel: bool,
) {
    let (m, n) = (a.outer, b.outer);
    let mut columns: Vec<f32> = zeros(m * n);
    let sums = Output {
        start: columns.as_mut_ptr(),
        stride: m,
        columns: m,
        add: false,
        begin: Begin::NOTHING,
        ahead: std::ptr::null_mut(),
    };
    // SAFETY: operands are checked, and there are as many sums.
    unsafe { by_columns::<S, B, A>(sums, b, a, &[], parallel) };
    let sums = Operand {
        data: columns.as_slice(),
        outer: m,
        inner: n,
        outer_stride: 1,
        inner_stride: m,
    };
    let mut block = [[0; 16]; 16];
    for row in (0..m).step_by(16) {
        for column in (0..n).step_by(16) {
            sums.words_of::<F32>(row, column, &mut block);
            for (row, values) in (row..m).zip(&block) {
                let to = Target {
                    c: out.start.wrapping_add(row * out.stride + column),
                    stride: out.stride,
                    last: mask16(n - column),
                    add: out.add,
                    begin: out.begin.from(row, column, out.stride),
                };
                // SAFETY: the processor is able; row and columns, under the mask, are inside.
                unsafe { to.write([[_mm512_loadu_ps(values.as_ptr().cast())]]) };
            }
        }
    }
}

/// Calls `body` with a buffer for each number below `n`.
fn each<B: Default>(n: usize, parallel: bool, body: impl Fn(&mut B, usize) + Sync) {
    if parallel && n > 1 {
        let numbers = (0..n).into_par_iter().with_max_len(1);
        numbers.for_each_init(B::default, |buffer, i| body(buffer, i));
    } else {
        let mut buffer = B::default();
        (0..n).for_each(|i| body(&mut buffer, i));
    }
}

/// The halves of words that `T`s are, in whole or in part.
fn halves<T: Plain>(values: &[T]) -> &[u16] {
    let per_value = size_of::<T>() / size_of::<u16>();
    // SAFETY: a `T` has no padding, and its alignment is at least that of u16.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), per_value * values.len()) }
}

/// Number types, any bits of which are a row of u16.
pub(crate) trait Plain {}
impl Plain for u32 {}
impl Plain for f32 {}
impl Plain for bf16 {}

/// Where `a` can be read as it lies.
fn in_place<'a, S: Arithmetic, T: Element<S>>(a: Operand<'a, T>) -> Option<Left<'a>> {
    let fits = a.inner_stride == 1 && a.inner.is_multiple_of(S::VALUES);
    (T::IN_PLACE && fits).then(|| left(a.data, a.outer_stride))
}

/// Values, row by row, as a left operand.
pub(crate) fn left<T: Plain>(values: &[T], stride: usize) -> Left<'_> {
    Left {
        halves: halves(values),
        stride: stride * size_of::<T>() / size_of::<u16>(),
    }
}

/// What [`Operand::rows`] has written.
fn packed(rows: &[u32], words: usize) -> Left<'_> {
    left(rows, words.next_multiple_of(16))
}

/// Parts of the inner dimension: first word and number of words. All firsts are multiples
/// of 16.
fn parts(words: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = words.div_ceil(DEPTH).max(1);
    let depth = words.div_ceil(count).next_multiple_of(16);
    (0..words)
        .step_by(depth)
        .map(move |first| (first, depth.min(words - first)))
}

/// `b` as a panel, where it is one as it lies.
fn panel_in_place<'a, S: Arithmetic, T: Element<S>>(b: Operand<'a, T>) -> Option<&'a [u32]> {
    let fits = b.outer <= PANEL && b.outer_stride == 1 && b.inner_stride == PANEL;
    let whole = b.data.len() >= b.inner * PANEL;
    if !(T::IN_PLACE && S::VALUES == 1 && fits && whole) {
        return None;
    }
    // SAFETY: words of one value are stored as that value, of 32 bits.
    Some(unsafe { std::slice::from_raw_parts(b.data.as_ptr().cast(), b.inner * PANEL) })
}

/// The right operand is laid out at once, rows of the left one are divided.
///
/// # Safety
/// AVX-512 with BW, VL, BF16 and VNNI; operands are checked, `out` has their sizes.
unsafe fn by_rows<S: Arithmetic, A: Element<S>, B: Element<S>>(
    out: Output,
    a: Operand<'_, A>,
    b: Operand<'_, B>,
    more: &[(Rows, Panels<S>)],
    chains: &[Links<S>],
    parallel: bool,
) where
    f32: Element<S>,
{
    let panels = Panels::<S>::of(b, parallel);
    let (values, length) = (&panels.values, panels.length);
    // SAFETY: the caller's word, and the panels are laid out.
    unsafe { by_panels::<S, A>(out, a, values, length, more, chains, parallel) };
}

/// The right operand is laid out in panels of `length` words, rows of the left one are divided.
///
/// # Safety
/// AVX-512 with BW, VL, BF16 and VNNI; the operand is checked, the panels have its words, `out` the
/// sizes of both, and so have `more` products and `chains`.
unsafe fn by_panels<S: Arithmetic, A: Element<S>>(
    out: Output,
    a: Operand<'_, A>,
    panels: &[u32],
    length: usize,
    more: &[(Rows, Panels<S>)],
    chains: &[Links<S>],
    parallel: bool,
) where
    f32: Element<S>,
{
    let words = a.words::<S>();
    let own = in_place::<S, A>(a);
    let per_task = match parallel {
        true => share(a.outer, TASK_ROWS, TILE),
        false => TASK_ROWS,
    };
    let task = |(buffer, middles): &mut (Vec<u32>, Vec<Rows>), task: usize| {
        let from = task * per_task;
        let rows = (from, per_task.min(a.outer - from));
        let left = match own {
            Some(left) => (left, from),
            None => {
                // SAFETY: the caller's word, and rows are inside.
                unsafe { a.rows::<S>(from, from + rows.1, buffer) };
                (packed(buffer, words), 0)
            }
        };
        middles.resize_with(chains.len(), Rows::default);
        for (Links { p, middle, .. }, own) in chains.iter().zip(&mut *middles) {
            let start = middle.at(from * p.columns);
            let out = Output {
                start,
                stride: p.columns,
                columns: p.columns,
                add: false,
                begin: Begin::NOTHING,
                ahead: std::ptr::null_mut(),
            };
            for number in 0..p.columns.div_ceil(PANEL) {
                let (rows, column) = ((0, rows.1), number * PANEL);
                // SAFETY: rows and columns are inside, and these rows are this task's.
                unsafe { whole_panel::<S>(out, rows, column, left, p.panel(number), words) };
            }
            // SAFETY: all of them have just been written, by this task.
            let middle = unsafe { std::slice::from_raw_parts(start, rows.1 * p.columns) };
            own.lay::<S, f32>(Operand::dense(middle, rows.1, p.columns));
        }
        for (number, panel) in panels.chunks(length).enumerate() {
            let column = number * PANEL;
            // SAFETY: rows and columns are inside.
            unsafe {
                whole_panel::<S>(out, rows, column, left, panel, words);
                for (left, panels) in more {
                    let left = (left.at(0, 0), from);
                    let panel = panels.panel(number);
                    whole_panel::<S>(out.adding(), rows, column, left, panel, panels.words);
                }
                for (Links { q, .. }, middle) in chains.iter().zip(&*middles) {
                    let left = (middle.at(0, 0), 0);
                    whole_panel::<S>(out.adding(), rows, column, left, q.panel(number), q.words);
                }
            }
        }
    };
    each(a.outer.div_ceil(per_task), parallel, task);
}

/// The output's rows, from the first one on as many, by one panel: all parts of the inner dimension,
/// of the left operand's rows from the given one on.
///
/// # Safety
/// As for [`block`].
unsafe fn whole_panel<S: Arithmetic>(
    out: Output,
    (row, rows): (usize, usize),
    column: usize,
    (left, left_row): (Left<'_>, usize),
    panel: &[u32],
    words: usize,
) {
    for (first, depth) in parts(words) {
        let panel = &panel[first * PANEL..];
        // SAFETY: the caller's word.
        unsafe { block::<S>(out, row, rows, column, left, left_row, panel, first, depth) };
    }
}

/// The left operand is laid out at once, columns of the right one are divided.
///
/// # Safety
/// As for [`by_rows`].
unsafe fn by_columns<S: Arithmetic, A: Element<S>, B: Element<S>>(
    out: Output,
    a: Operand<'_, A>,
    b: Operand<'_, B>,
    more: &[(Rows, Panels<S>)],
    parallel: bool,
) {
    let words = a.words::<S>();
    let mut rows = Vec::new();
    let left = match in_place::<S, A>(a) {
        Some(left) => left,
        None => {
            // SAFETY: the caller's word, and rows are inside.
            unsafe { a.rows::<S>(0, a.outer, &mut rows) };
            packed(&rows, words)
        }
    };
    let panels = b.outer.div_ceil(PANEL);
    let per_task = TASK_PANELS.min(panels.div_ceil(4)).max(1);
    let parts: Vec<_> = parts(words).collect();
    let numbers = |task: usize| task * per_task..((task + 1) * per_task).min(panels);
    let run = |buffer: &mut Vec<u32>, task: usize| {
        let own = numbers(task);
        for (part, (first, depth)) in parts.iter().copied().enumerate() {
            let length = PANEL * depth.next_multiple_of(16);
            grow(buffer, own.len() * length);
            for (number, out) in own.clone().zip(buffer.chunks_mut(length)) {
                // SAFETY: the caller's word, and columns are inside.
                unsafe { b.panel::<S>(number * PANEL, first, depth, out) };
            }
            // What this thread lays out next, most probably.
            let (task, part) = match part + 1 < parts.len() {
                true => (task, part + 1),
                false => (task + 1, 0),
            };
            let columns = (numbers(task).start * PANEL).min(b.outer);
            let beyond = (numbers(task).end * PANEL).min(b.outer);
            let times = a.outer.div_ceil(TILE) * own.len() * depth.div_ceil(LINE);
            let columns = (columns, beyond.saturating_sub(columns));
            let mut ahead = Ahead::of::<S, B>(&b, columns, parts[part]).in_times(times);
            // They are added to blocks that are in the cache.
            let more = if first + depth == words { more } else { &[] };
            for row in (0..a.outer).step_by(TASK_ROWS) {
                let rows = TASK_ROWS.min(a.outer - row);
                for (number, panel) in own.clone().zip(buffer.chunks(length)) {
                    let column = number * PANEL;
                    let out = out.fetching(&mut ahead);
                    // SAFETY: rows and columns are inside.
                    unsafe {
                        block::<S>(out, row, rows, column, left, row, panel, first, depth);
                        for (left, panels) in more {
                            let (rows, left) = ((row, rows), (left.at(0, 0), row));
                            let panel = panels.panel(number);
                            whole_panel::<S>(out.adding(), rows, column, left, panel, panels.words);
                        }
                    }
                }
            }
        }
    };
    each(panels.div_ceil(per_task), parallel, run);
}

/// A left operand, laid out; zeros after the last row and value.
#[derive(Default)]
pub(crate) struct Rows {
    words: Vec<u32>,
    stride: usize,
}

impl Rows {
    pub(crate) fn new<S: Arithmetic, T: Element<S>>(a: Operand<'_, T>) -> Self {
        let mut rows = Self::default();
        rows.lay::<S, T>(a);
        rows
    }

    /// Takes another operand.
    pub(crate) fn lay<S: Arithmetic, T: Element<S>>(&mut self, a: Operand<'_, T>) {
        check_processor();
        a.check();
        // SAFETY: the processor is able, the operand is checked.
        unsafe { a.rows::<S>(0, a.outer, &mut self.words) };
        self.stride = a.words::<S>().next_multiple_of(16);
    }

    /// From row `row` and word `word` on.
    pub(crate) fn at(&self, row: usize, word: usize) -> Left<'_> {
        left(&self.words[row * self.stride + word..], self.stride)
    }
}

/// A right operand, laid out; nothing at first.
pub(crate) struct Panels<S> {
    values: Vec<u32>,
    words: usize,
    columns: usize,
    /// Words of a panel.
    length: usize,
    arithmetic: PhantomData<S>,
}

impl<S: Arithmetic> Panels<S> {
    pub(crate) fn new() -> Self {
        Self {
            values: Vec::new(),
            words: 0,
            columns: 0,
            length: 0,
            arithmetic: PhantomData,
        }
    }

    /// An operand, laid out by all threads if `parallel`.
    pub(crate) fn of<T: Element<S>>(b: Operand<'_, T>, parallel: bool) -> Self {
        check_processor();
        b.check();
        let words = b.words::<S>();
        let length = PANEL * words.next_multiple_of(16).max(16);
        let mut values: Vec<u32> = zeros(b.outer.div_ceil(PANEL) * length);
        // SAFETY: the processor is able, the operand is checked; columns are inside.
        let lay = |(number, out): (usize, &mut [u32])| unsafe {
            b.panel::<S>(number * PANEL, 0, words, out);
        };
        match parallel {
            true => values.par_chunks_mut(length).enumerate().for_each(lay),
            false => values.chunks_mut(length).enumerate().for_each(lay),
        }
        Self {
            values,
            words,
            columns: b.outer,
            length,
            arithmetic: PhantomData,
        }
    }

    /// Takes another operand.
    pub(crate) fn lay<T: Element<S>>(&mut self, b: Operand<'_, T>) {
        check_processor();
        b.check();
        self.words = b.words::<S>();
        self.columns = b.outer;
        self.length = PANEL * self.words.next_multiple_of(16);
        grow(&mut self.values, b.outer.div_ceil(PANEL) * self.length);
        let panels = self.values.chunks_mut(self.length.max(1));
        for (column, out) in (0..b.outer).step_by(PANEL).zip(panels) {
            // SAFETY: the processor is able, the operand is checked.
            unsafe { b.panel::<S>(column, 0, self.words, out) };
        }
    }

    /// Panel `number`, `[word][64]`.
    pub(crate) fn panel(&self, number: usize) -> &[u32] {
        &self.values[number * self.length..][..self.words * PANEL]
    }

    /// `dst = start + a b`, rows of as many columns as the panels have; sums are those of
    /// [`multiply_onto`] to the bit.
    pub(crate) fn multiply_from(&self, dst: &mut [f32], start: Start<'_>, a: Left<'_>) {
        if self.columns == 0 || dst.is_empty() || self.words == 0 {
            return;
        }
        let rows = dst.len() / self.columns;
        assert_eq!(rows * self.columns, dst.len());
        start.check(rows, self.columns);
        let out = Output {
            start: dst.as_mut_ptr(),
            stride: self.columns,
            columns: self.columns,
            add: false,
            begin: Begin::of(start),
            ahead: std::ptr::null_mut(),
        };
        for number in 0..self.columns.div_ceil(PANEL) {
            let (column, panel) = (number * PANEL, self.panel(number));
            // SAFETY: who laid out the panels has looked at the processor; rows and columns are
            // inside.
            unsafe { whole_panel::<S>(out, (0, rows), column, (a, 0), panel, self.words) };
        }
    }

    /// `dst = a b`, or `dst += a b` with `add`: `rows` rows, `stride` apart, of as many
    /// columns as the panels have.
    pub(crate) fn multiply(
        &self,
        dst: &mut [f32],
        stride: usize,
        rows: usize,
        add: bool,
        a: Left<'_>,
    ) {
        assert!(self.columns <= stride);
        if rows == 0 || self.columns == 0 {
            return;
        }
        assert!((rows - 1) * stride + self.columns <= dst.len());
        let out = Output {
            start: dst.as_mut_ptr(),
            stride,
            columns: self.columns,
            add,
            begin: Begin::NOTHING,
            ahead: std::ptr::null_mut(),
        };
        let panels = self.values.chunks(self.length.max(1));
        for (column, panel) in (0..self.columns).step_by(PANEL).zip(panels) {
            // SAFETY: `lay` has looked at the processor; rows and columns are inside.
            unsafe { block::<S>(out, 0, rows, column, a, 0, panel, 0, self.words) };
        }
    }
}

/// `dst = a b`, or `dst += a b` with `add`, for a right operand that lies as a panel,
/// `[word][64]`: `rows` rows, `stride` apart, of the panel's first `columns` columns.
pub(crate) fn multiply_panel<S: Arithmetic>(
    dst: &mut [f32],
    stride: usize,
    (rows, columns): (usize, usize),
    add: bool,
    a: Left<'_>,
    panel: &[u32],
) {
    check_processor();
    assert!(rows > 0 && columns > 0 && columns <= PANEL.min(stride));
    assert!((rows - 1) * stride + columns <= dst.len());
    let out = Output {
        start: dst.as_mut_ptr(),
        stride,
        columns,
        add,
        begin: Begin::NOTHING,
        ahead: std::ptr::null_mut(),
    };
    // SAFETY: the processor is able; rows and columns are inside.
    unsafe { block::<S>(out, 0, rows, 0, a, 0, panel, 0, panel.len() / PANEL) };
}

/// What becomes of a product's sums while they are in registers.
pub(crate) trait Finish {
    /// Sums of `R` rows, from `row` on, by 64 columns.
    ///
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI.
    unsafe fn tile<const R: usize>(&mut self, row: usize, sums: [[__m512; VECTORS]; R]);
}

/// The product of `rows` rows and a panel, given to `finish` up to six rows at a time. `buffer` is
/// for sums of matrix registers.
pub(crate) fn multiply_to<S: Arithmetic, F: Finish>(
    finish: &mut F,
    rows: usize,
    a: Left<'_>,
    panel: &[u32],
    buffer: &mut Vec<f32>,
) {
    check_processor();
    let depth = panel.len() / PANEL;
    if S::MATRIX && crate::matrix_registers() {
        if buffer.len() < rows * PANEL {
            buffer.resize(rows * PANEL, 0.0);
        }
        multiply_panel::<S>(buffer, PANEL, (rows, PANEL), false, a, panel);
    } else {
        assert!(rows > 0 && (rows - 1) * a.stride + 2 * depth <= a.halves.len());
        buffer.clear();
    }
    // SAFETY: the processor is able; rows and words are inside, and `buffer` is empty or has all
    // sums.
    unsafe { finish_tiles::<S, F>(finish, rows, a, panel, buffer) };
}

/// # Safety
/// AVX-512 with BW, VL, BF16 and VNNI. If `buffer` is empty, `a` has `rows` rows of as many words as
/// `panel`; else it has `rows` rows of 64 sums.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
unsafe fn finish_tiles<S: Arithmetic, F: Finish>(
    finish: &mut F,
    rows: usize,
    a: Left<'_>,
    panel: &[u32],
    buffer: &[f32],
) {
    for row in (0..rows).step_by(TILE) {
        // SAFETY: the caller's word, for the rows from `row` on.
        unsafe {
            let tile = Tile {
                depth: panel.len() / PANEL,
                a: a.halves.as_ptr().add(row * a.stride),
                a_stride: a.stride,
                b: panel.as_ptr(),
                ahead: std::ptr::null_mut(),
            };
            let sums = buffer.as_ptr().wrapping_add(row * PANEL);
            match (rows - row, buffer.is_empty()) {
                (1, true) => finish.tile(row, tile.sums::<S, 1, VECTORS, false>()),
                (2, true) => finish.tile(row, tile.sums::<S, 2, VECTORS, false>()),
                (3, true) => finish.tile(row, tile.sums::<S, 3, VECTORS, false>()),
                (4, true) => finish.tile(row, tile.sums::<S, 4, VECTORS, false>()),
                (5, true) => finish.tile(row, tile.sums::<S, 5, VECTORS, false>()),
                (_, true) => finish.tile(row, tile.sums::<S, TILE, VECTORS, false>()),
                (1, false) => finish.tile(row, loaded::<1>(sums)),
                (2, false) => finish.tile(row, loaded::<2>(sums)),
                (3, false) => finish.tile(row, loaded::<3>(sums)),
                (4, false) => finish.tile(row, loaded::<4>(sums)),
                (5, false) => finish.tile(row, loaded::<5>(sums)),
                (_, false) => finish.tile(row, loaded::<TILE>(sums)),
            }
        }
    }
}

/// `R` rows of 64 sums.
///
/// # Safety
/// AVX-512; `from` is good for reading them.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn loaded<const R: usize>(from: *const f32) -> [[__m512; VECTORS]; R] {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; R];
    for (number, sum) in sums.as_flattened_mut().iter_mut().enumerate() {
        // SAFETY: the caller's word.
        *sum = unsafe { _mm512_loadu_ps(from.add(16 * number)) };
    }
    sums
}

/// Words of a value of each, rounded to bf16.
pub(crate) fn pairs(first: &[f32], second: &[f32], out: &mut [u32]) {
    check_processor();
    let values = first.chunks(16).zip(second.chunks(16));
    for ((first, second), out) in values.zip(out.chunks_mut(16)) {
        let n = first.len().min(second.len()).min(out.len());
        // SAFETY: the processor is able; `n` values are read and, under the mask, written.
        unsafe {
            let words = <f32 as Element<Bf16>>::across(first.as_ptr(), second.as_ptr(), n, false);
            _mm512_mask_storeu_epi32(out.as_mut_ptr().cast(), mask16(n), words);
        }
    }
}

/// Multiplies `rows` rows of `left` from `left_row` on by one panel and writes to the output from
/// (`row`, `column`) on, or adds; sums of words from the first one on begin as the output's.
///
/// # Safety
/// AVX-512 with BW, VL, BF16 and VNNI; `left` has `depth` words from word `first` on in each
/// row, `panel` has `depth` words, and the output's rows and columns exist.
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
unsafe fn block<S: Arithmetic>(
    out: Output,
    row: usize,
    rows: usize,
    column: usize,
    left: Left<'_>,
    left_row: usize,
    panel: &[u32],
    first: usize,
    depth: usize,
) {
    let columns = PANEL.min(out.columns - column);
    assert!((left_row + rows - 1) * left.stride + 2 * (first + depth) <= left.halves.len());
    assert!(depth * PANEL <= panel.len());
    let a = &left.halves[left_row * left.stride + 2 * first..];
    // SAFETY: the assertions above and the caller's word.
    unsafe {
        let whole = Part {
            rows,
            columns,
            depth,
            a: a.as_ptr(),
            a_stride: left.stride,
            b: panel.as_ptr(),
            c: out.start.add(row * out.stride + column),
            c_stride: out.stride,
            add: out.add || first > 0,
            begin: match first {
                0 => out.begin.from(row, column, out.stride),
                _ => Begin::NOTHING,
            },
            ahead: out.ahead,
        };
        if S::MATRIX && crate::matrix_registers() {
            whole.begun().sum_in_matrices::<S>();
        } else {
            whole.sum::<S>();
        }
    }
}

/// A block of the output and what it is the product of.
#[derive(Clone, Copy)]
struct Part {
    rows: usize,
    /// At most [`PANEL`].
    columns: usize,
    /// Words.
    depth: usize,
    /// Words in halves.
    a: *const u16,
    a_stride: usize,
    b: *const u32,
    c: *mut f32,
    c_stride: usize,
    add: bool,
    begin: Begin,
    ahead: *mut Ahead,
}

impl Part {
    /// From this row, column and word on.
    fn from(self, row: usize, column: usize, word: usize) -> Self {
        Self {
            rows: self.rows - row,
            columns: self.columns - column,
            depth: self.depth - word,
            a: self.a.wrapping_add(row * self.a_stride + 2 * word),
            b: self.b.wrapping_add(word * PANEL + column),
            c: self.c.wrapping_add(row * self.c_stride + column),
            add: self.add || word > 0,
            begin: match word {
                0 => self.begin.from(row, column, self.c_stride),
                _ => Begin::NOTHING,
            },
            ..self
        }
    }

    /// Writes, or adds, what sums begin with; what is left is to add them.
    ///
    /// # Safety
    /// As for `block`.
    #[target_feature(enable = "avx512f")]
    unsafe fn begun(self) -> Self {
        if self.begin.is_nothing() {
            return self;
        }
        for row in 0..self.rows {
            for column in (0..self.columns).step_by(16) {
                let to = Target {
                    c: self.c.wrapping_add(row * self.c_stride + column),
                    stride: self.c_stride,
                    last: mask16(self.columns - column),
                    add: self.add,
                    begin: self.begin.from(row, column, self.c_stride),
                };
                // SAFETY: the caller's word; the mask keeps to columns inside.
                unsafe { to.write([[_mm512_setzero_ps()]]) };
            }
        }
        Self {
            add: true,
            begin: Begin::NOTHING,
            ..self
        }
    }

    /// # Safety
    /// As for `block`, for rows, columns and words of this part.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn sum<S: Arithmetic>(self) {
        if self.columns == 0 {
            return;
        }
        let last = mask16((self.columns - 1) % 16 + 1);
        for r in (0..self.rows).step_by(TILE) {
            // SAFETY: the caller's word; `run` touches `TILE` rows at most, here
            // `rows - r`, and columns under the mask.
            unsafe {
                let tile = Tile {
                    depth: self.depth,
                    a: self.a.add(r * self.a_stride),
                    a_stride: self.a_stride,
                    b: self.b,
                    ahead: self.ahead,
                };
                let to = Target {
                    c: self.c.add(r * self.c_stride),
                    stride: self.c_stride,
                    last,
                    add: self.add,
                    begin: self.begin.from(r, 0, self.c_stride),
                };
                let rows = (self.rows - r).min(TILE);
                tile.run::<S>(rows, self.columns.div_ceil(16), to);
            }
        }
    }

    /// The same, as far as there are whole matrix registers of rows, columns and words.
    ///
    /// # Safety
    /// As for [`sum`](Self::sum), and there are matrix registers.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn sum_in_matrices<S: Arithmetic>(self) {
        let whole = |n: usize| n / amx::SIDE * amx::SIDE;
        let (rows, columns, depth) = (whole(self.rows), whole(self.columns), whole(self.depth));
        if rows == 0 || columns == 0 || depth == 0 {
            // SAFETY: the caller's word.
            return unsafe { self.sum::<S>() };
        }
        // SAFETY: there are matrix registers, and nothing else here takes them; rows, columns
        // and words are inside this part.
        unsafe {
            let mut registers = amx::Registers::take();
            // A panel's 32 columns stay in the first-level cache for all rows.
            for column in (0..columns).step_by(2 * amx::SIDE) {
                for row in (0..rows).step_by(2 * amx::SIDE) {
                    let part = self.from(row, column, 0);
                    let tile = amx::Tile {
                        a: part.a,
                        a_stride: size_of::<u16>() * part.a_stride,
                        b: part.b,
                        b_stride: size_of::<u32>() * PANEL,
                        offsets: &[0],
                        step: size_of::<u32>() * PANEL * amx::SIDE,
                        steps: depth / amx::SIDE,
                        c: part.c,
                        c_stride: size_of::<f32>() * part.c_stride,
                        add: part.add,
                    };
                    registers.multiply_up_to(rows - row, columns - column, &tile);
                }
            }
            drop(registers);
            let inside = Self {
                rows,
                columns,
                ..self
            };
            if depth < self.depth {
                inside.from(0, 0, depth).sum::<S>();
            }
            let beside = Self { rows, ..self };
            beside.from(0, columns, 0).sum::<S>();
            self.from(rows, 0, 0).sum::<S>();
        }
    }
}

/// One small product, sums in registers.
#[derive(Clone, Copy)]
struct Tile {
    depth: usize,
    /// Words in halves.
    a: *const u16,
    a_stride: usize,
    b: *const u32,
    /// Null, or fetched with each 16 words; the task's own.
    ahead: *mut Ahead,
}

/// Where sums are written.
#[derive(Clone, Copy)]
struct Target {
    c: *mut f32,
    stride: usize,
    /// Columns of the last vector.
    last: __mmask16,
    add: bool,
    begin: Begin,
}

impl Tile {
    /// # Safety
    /// As for `block`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn run<S: Arithmetic>(self, rows: usize, vectors: usize, to: Target) {
        if self.depth >= LONG {
            to.fetch(rows, vectors);
        }
        // SAFETY: the caller's word.
        unsafe {
            match vectors {
                1 => self.run_rows::<S, 1, false>(rows, to),
                2 => self.run_rows::<S, 2, false>(rows, to),
                // 40 columns are the heads' of the largest attention.
                3 if to.last <= HALF => self.run_rows::<S, 3, true>(rows, to),
                3 => self.run_rows::<S, 3, false>(rows, to),
                _ => self.run_rows::<S, VECTORS, false>(rows, to),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn run_rows<S: Arithmetic, const V: usize, const H: bool>(
        self,
        rows: usize,
        to: Target,
    ) {
        // SAFETY: the caller's word.
        unsafe {
            match rows {
                1 => to.write(self.sums::<S, 1, V, H>()),
                2 => to.write(self.sums::<S, 2, V, H>()),
                3 => to.write(self.sums::<S, 3, V, H>()),
                4 => to.write(self.sums::<S, 4, V, H>()),
                5 => to.write(self.sums::<S, 5, V, H>()),
                _ => to.write(self.sums::<S, TILE, V, H>()),
            }
        }
    }

    /// Sums of `R` rows by `V` vectors, of the last one, with `H`, its lower half.
    ///
    /// # Safety
    /// As for `block`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn sums<S: Arithmetic, const R: usize, const V: usize, const H: bool>(
        self,
    ) -> [[__m512; V]; R] {
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        for part in (0..self.depth).step_by(LINE) {
            // SAFETY: the caller's word: where there is something, it is this task's.
            if let Some(ahead) = unsafe { self.ahead.as_mut() } {
                ahead.fetch();
            }
            for r in R..2 * R {
                // Rows that are multiplied next; what is not there is not fetched.
                let line = self.a.wrapping_add(r * self.a_stride + 2 * part);
                _mm_prefetch::<_MM_HINT_T0>(line.cast());
            }
            for w in part..(part + LINE).min(self.depth) {
                // SAFETY: the caller's word.
                unsafe {
                    let mut b = [_mm512_setzero_si512(); V];
                    for (v, b) in b.iter_mut().enumerate() {
                        *b = _mm512_loadu_si512(self.b.add(w * PANEL + 16 * v).cast());
                    }
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let word = self.a.add(r * self.a_stride + 2 * w).cast::<i32>();
                        let a = _mm512_set1_epi32(word.read_unaligned());
                        for (v, (sum, b)) in sums.iter_mut().zip(b).enumerate() {
                            *sum = match H && v + 1 == V {
                                true => S::add_half_product(*sum, a, b),
                                false => S::add_product(*sum, a, b),
                            };
                        }
                    }
                }
            }
        }
        sums
    }
}

impl Target {
    /// Has the first-level cache fetch what sums are going to be written to, and added to.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn fetch(self, rows: usize, vectors: usize) {
        for r in 0..rows {
            for v in 0..vectors {
                let place = r * self.stride + 16 * v;
                // What is not there is not fetched.
                _mm_prefetch::<_MM_HINT_ET0>(self.c.wrapping_add(place).cast());
                if !self.begin.residual.is_null() {
                    let from = self.begin.residual.wrapping_add(place);
                    _mm_prefetch::<_MM_HINT_T0>(from.cast());
                }
            }
        }
    }

    /// # Safety
    /// AVX-512; the target and what it begins with have so many rows, and columns under the mask.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn write<const R: usize, const V: usize>(self, sums: [[__m512; V]; R]) {
        // SAFETY: the caller's word.
        unsafe {
            match (self.begin.is_nothing(), self.add) {
                (true, false) => self.write_with(sums, |sum, _, _, _| sum),
                (true, true) => self.write_with(sums, |sum, r, v, mask| {
                    let there = self.c.wrapping_add(r * self.stride + 16 * v);
                    _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, there))
                }),
                (false, _) => self.write_begun(&sums),
            }
        }
    }

    /// # Safety
    /// As for `write`.
    #[target_feature(enable = "avx512f")]
    unsafe fn write_begun<const R: usize, const V: usize>(self, sums: &[[__m512; V]; R]) {
        let begin = self.begin;
        let values = |start: *const f32, place: usize, mask| match start.is_null() {
            true => _mm512_setzero_ps(),
            // SAFETY: the caller's word, for what is not null.
            false => unsafe { _mm512_maskz_loadu_ps(mask, start.add(place)) },
        };
        let there = if self.add {
            self.c
        } else {
            std::ptr::null_mut()
        };
        // SAFETY: the caller's word.
        unsafe {
            self.write_with(*sums, |sum, r, v, mask| {
                let place = r * self.stride + 16 * v;
                let constant = match begin.rows.is_null() {
                    true => 0.0,
                    false => *begin.rows.add(r),
                };
                let start = _mm512_add_ps(
                    values(begin.residual, place, mask),
                    values(begin.columns, 16 * v, mask),
                );
                let start = _mm512_add_ps(start, values(there, place, mask));
                _mm512_add_ps(sum, _mm512_add_ps(start, _mm512_set1_ps(constant)))
            });
        }
    }

    /// Writes what becomes of each vector of sums, by its row, its number and its mask.
    ///
    /// # Safety
    /// As for `write`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn write_with<const R: usize, const V: usize>(
        self,
        sums: [[__m512; V]; R],
        value: impl Fn(__m512, usize, usize, __mmask16) -> __m512,
    ) {
        for (r, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let mask = if v + 1 == V { self.last } else { !0 };
                let sum = value(sum, r, v, mask);
                // SAFETY: the caller's word.
                unsafe { _mm512_mask_storeu_ps(self.c.add(r * self.stride + 16 * v), mask, sum) };
            }
        }
    }
}
