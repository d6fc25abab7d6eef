//! 3x3 convolutions by Winograd's algorithm F(4x4, 3x3) with operands in whole numbers of 16 bits,
//! for what is asked for in bf16: 36 products per 16 outputs and channel pair at the speed of
//! those of bf16, of which F(2x2, 3x3) takes 64.
//!
//! In bf16 the transformed values of 4x4 tiles would round some six times worse than inputs
//! themselves. They are of one size, though, as they are sums over a tile: those of a tile's point
//! over all channels are rounded to multiples of an 8191st of the largest, those of an output
//! channel's point to multiples of about as fine a step. So the error is below that of bf16 inputs
//! and weights (`tests/bf16.rs`), unless channels differ much in size (`docs/performance.md` of the
//! repository has figures). Sums are exact, in 32 bits: weights are scaled so that their sizes, added
//! up, times 8191 cannot leave these, whatever the inputs; sums over more than 480 channels are made
//! in parts.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::sync::Mutex;

use rayon::prelude::*;

use crate::avx512::{self, Arithmetic, F32, Finish, Int16, Shared, TILE, Taps, VECTORS};
use crate::buffer::{Start, share};
use crate::conv3x3::{Conv3x3, TAPS, Way};
use crate::matrix::{PANEL, Values};
use crate::winograd_avx512::{
    Algorithm, Begin, Four, Run, Task, Winograd, into_new, into_sum, panels,
};

const POINTS: usize = Four::POINTS;
/// Lanes of a vector, and words that are laid out at once.
const SIDE: usize = 16;
/// The largest transformed input.
const LARGEST: f32 = 8191.0;
/// The largest sum of sizes of weights: times `LARGEST` below 2^31, with room for rounding each.
const LARGEST_SUM: f32 = 261_600.0;
/// The largest weight.
const LARGEST_WEIGHT: f32 = 32_700.0;
/// Most words whose products are summed in 32 bits.
const PART: usize = 240;
/// Most output channels per task.
const TASK_OUTPUTS: usize = 48;
/// Most words of weights that are transformed at once, before they are scaled (1 MB), and most
/// output channels of these where those of one lie apart: lines of memory are read for several.
const WIDE: usize = 256 << 10;
const AT_ONCE: usize = 4;

/// A convolution done this way.
pub(crate) struct Fixed {
    conv: Conv3x3,
    /// What does not depend on how values are rounded.
    wide: Winograd<F32, Four>,
}

/// Transformed weights of some output channels.
#[derive(Default)]
struct Weights {
    /// `[output][point][word]`.
    words: Vec<u32>,
    /// What a whole number stands for, `[point][output]`.
    steps: Vec<f32>,
    /// Before they are scaled, `[output][point][channel]`.
    wide: Vec<u32>,
}

impl Way for Fixed {
    fn pays(&self) -> bool {
        self.wide.pays() && !crate::matrix_registers()
    }

    fn conv(&self) -> &Conv3x3 {
        &self.conv
    }

    fn run(&self, y: &mut [f32], accumulate: bool, x: &[f32], weight: Values<'_>) {
        // SAFETY: what is handed out is what `convolve` asks for.
        into_sum(&self.conv, y, accumulate, |y, begin| unsafe {
            self.convolve(y, begin, x, weight);
        });
    }

    fn run_new<'d>(
        &self,
        y: &'d mut [MaybeUninit<f32>],
        start: Start<'_>,
        x: &[f32],
        weight: Values<'_>,
    ) -> &'d mut [f32] {
        let convolve = |y: *mut f32, begin: Begin<'_>| {
            // SAFETY: what is handed out is what `convolve` asks for.
            unsafe { self.convolve(y, begin, x, weight) };
        };
        // SAFETY: `convolve` writes all planes.
        unsafe { into_new(&self.conv, y, start, convolve) }
    }
}

impl Fixed {
    pub(crate) fn new(conv: Conv3x3) -> Self {
        Self {
            conv,
            wide: Winograd::new(conv),
        }
    }

    /// Words of a pixel's channels.
    fn words(&self) -> usize {
        self.conv.c / Int16::VALUES
    }

    /// Words of a transformed panel, and of one output channel's transformed weights.
    fn panel(&self) -> usize {
        self.depth() * PANEL
    }

    fn depth(&self) -> usize {
        POINTS * self.words()
    }

    /// Parts of the words, by the first one and their number.
    fn parts(&self) -> impl Iterator<Item = (usize, usize)> {
        let words = self.words();
        let depth = words.div_ceil(words.div_ceil(PART)).next_multiple_of(SIDE);
        let firsts = (0..words).step_by(depth);
        firsts.map(move |first| (first, depth.min(words - first)))
    }

    /// # Safety
    /// As for [`Winograd`]'s.
    unsafe fn convolve(&self, y: *mut f32, begin: Begin<'_>, x: &[f32], weight: Values<'_>) {
        assert!(self.wide.fits() && x.len() >= self.conv.images * self.conv.c * self.conv.area());
        assert!(weight.len() >= self.conv.o * self.conv.c * TAPS);
        let runs = self.wide.runs();
        let y = Shared::new(y);
        let (mut v, mut steps) = (Vec::new(), Vec::new());
        let task = Task {
            begin,
            outputs: share(self.conv.o, TASK_OUTPUTS, TILE),
            buffers: Mutex::default(),
        };
        for panels in self.wide.at_once(&panels(&runs), self.panel()) {
            self.transform_inputs(x, panels, &mut v, &mut steps);
            let weights = |first, outputs, u: &mut Weights| match weight {
                // SAFETY: the processor is able (`fits`), and there are so many outputs.
                Values::F32(w) => unsafe { self.transform_weights(w, first, outputs, u) },
                // SAFETY: as above.
                Values::Bf16(w) => unsafe { self.transform_weights(w, first, outputs, u) },
            };
            let multiply = |number: usize, outputs: usize, u: &mut Weights, m: &mut [f32]| {
                let v = v[number * self.panel()..].chunks_exact(self.words() * PANEL);
                let steps = steps[number * POINTS * PANEL..].chunks_exact(PANEL);
                let points = m.chunks_exact_mut(outputs * PANEL).zip(v).zip(steps);
                for (point, ((m, v), steps)) in points.enumerate() {
                    for (first, words) in self.parts() {
                        let mut sums = Sums {
                            m,
                            rows: &u.steps[point * outputs..][..outputs],
                            columns: steps,
                            add: first > 0,
                        };
                        let at = point * self.words() + first;
                        let u = avx512::left(&u.words[at..], self.depth());
                        let v = &v[first * PANEL..][..words * PANEL];
                        let none = &mut Vec::new();
                        avx512::multiply_to::<Int16, _>(&mut sums, outputs, u, v, none);
                    }
                }
            };
            // SAFETY: the caller's word.
            unsafe {
                self.wide
                    .multiply_panels(y, &task, panels, weights, multiply)
            };
        }
    }

    /// The channels `[image][c][h][w]` of these panels' tiles to `[panel][point][word][64]`, and
    /// what a whole number stands for, `[panel][point][64]`; both are zeros behind the last tile.
    fn transform_inputs(
        &self,
        x: &[f32],
        panels: &[&[Run]],
        v: &mut Vec<u32>,
        steps: &mut Vec<f32>,
    ) {
        let (words, lines) = (panels.len() * self.panel(), panels.len() * POINTS * PANEL);
        v.clear();
        v.reserve(words);
        steps.clear();
        steps.resize(lines, 0.0);
        let (to, steps) = (Shared::new(v.as_mut_ptr()), Shared::new(steps.as_mut_ptr()));
        let numbered = panels.iter().enumerate();
        let runs: Vec<_> = numbered
            .clone()
            .flat_map(|(panel, runs)| runs.iter().map(move |run| (panel, run)))
            .collect();
        runs.into_par_iter().for_each(|(panel, run)| {
            let lane = run.tile % PANEL;
            let steps = steps.at(panel * POINTS * PANEL + lane);
            let to = to.at(panel * self.panel() + lane);
            // SAFETY: the processor is able (`fits`), the run is inside the pictures. Each point has
            // a line of each word in its panel, and one of steps, of which the run's lanes are
            // written, for this run only.
            unsafe { self.transform_input(run, x, to, steps) };
        });
        for (panel, runs) in numbered {
            let lanes: usize = runs.iter().map(|run| run.tiles).sum();
            for line in (0..self.panel()).step_by(PANEL).filter(|_| lanes < PANEL) {
                let behind = to.at(panel * self.panel() + line + lanes);
                // SAFETY: the lanes behind the last tile are inside the line.
                unsafe { behind.write_bytes(0, PANEL - lanes) };
            }
        }
        // SAFETY: there is room for so many words; of every panel all lines have been written, the
        // lanes of tiles and those behind them.
        unsafe { v.set_len(words) };
    }

    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI. The run is inside the pictures `x`. `v` and `steps` are
    /// good for writing as many lanes as the run has to each line of a panel.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn transform_input(&self, run: &Run, x: &[f32], v: *mut u32, steps: *mut f32) {
        let (area, mask) = (self.conv.area(), avx512::mask16(run.tiles));
        let planes = &x[run.image * self.conv.c * area..][..self.conv.c * area];
        let size = _mm512_set1_epi32(i32::MAX);
        // As bits without sign: those of what is no number are the largest.
        let mut largest = [_mm512_setzero_si512(); POINTS];
        let mut points = [[_mm512_setzero_ps(); POINTS]; 2];
        for plane in planes.chunks_exact(area) {
            // SAFETY: the caller's word.
            unsafe { self.wide.points(run, plane, &mut points[0]) };
            for (largest, point) in largest.iter_mut().zip(&points[0]) {
                let bits = _mm512_and_si512(_mm512_castps_si512(*point), size);
                *largest = _mm512_max_epu32(*largest, bits);
            }
        }
        let mut factors = [_mm512_setzero_ps(); POINTS];
        for (number, (factor, largest)) in factors.iter_mut().zip(largest).enumerate() {
            let some = _mm512_test_epi32_mask(largest, largest);
            let largest = _mm512_castsi512_ps(largest);
            *factor = _mm512_maskz_div_ps(some, _mm512_set1_ps(LARGEST), largest);
            let step = _mm512_mul_ps(largest, _mm512_set1_ps(1.0 / LARGEST));
            // SAFETY: the mask keeps to the run's lanes of the point's line.
            unsafe { _mm512_mask_storeu_ps(steps.add(number * PANEL), mask, step) };
        }
        for (word, planes) in planes.chunks_exact(Int16::VALUES * area).enumerate() {
            let (first, second) = planes.split_at(area);
            // SAFETY: the caller's word; the mask keeps to the run's lanes of the word's lines.
            unsafe {
                self.wide.points(run, first, &mut points[0]);
                self.wide.points(run, second, &mut points[1]);
                for (number, factor) in factors.iter().enumerate() {
                    let [a, b] = [points[0][number], points[1][number]];
                    let words = Int16::word(_mm512_mul_ps(a, *factor), _mm512_mul_ps(b, *factor));
                    let to = v.add((number * self.words() + word) * PANEL);
                    _mm512_mask_storeu_epi32(to.cast(), mask, words);
                }
            }
        }
    }

    /// The weights of `outputs` output channels from `first` on.
    ///
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI; the output channels exist.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn transform_weights<T: Taps>(
        &self,
        w: &[T],
        first: usize,
        outputs: usize,
        u: &mut Weights,
    ) {
        u.words.resize(outputs * self.depth(), 0);
        u.steps.resize(POINTS * outputs, 0.0);
        let most = if self.conv.transposed { AT_ONCE } else { 1 };
        let at_once = (WIDE / (POINTS * self.conv.c)).clamp(1, most);
        for output in (0..outputs).step_by(at_once) {
            let now = at_once.min(outputs - output);
            u.wide.resize(now * POINTS * self.conv.c, 0);
            // SAFETY: the caller's word.
            unsafe { self.wide.transform_weights(w, first + output, &mut u.wide) };
            let lines = u.wide.chunks_exact(self.conv.c).enumerate();
            for (number, line) in lines {
                let (output, point) = (output + number / POINTS, number % POINTS);
                let words = &mut u.words[output * self.depth() + point * self.words()..];
                // SAFETY: the caller's word.
                let step = unsafe { self.scale(line, &mut words[..self.words()]) };
                u.steps[point * outputs + output] = step;
            }
        }
    }

    /// Writes a line of weights as whole numbers, and returns what one stands for.
    ///
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn scale(&self, line: &[u32], words: &mut [u32]) -> f32 {
        let (mut largest, mut sum, mut all) = (0f32, 0f32, 0f32);
        for (first, words) in self.parts() {
            let part = &line[first * Int16::VALUES..][..words * Int16::VALUES];
            let (mut most, mut total) = (_mm512_setzero_ps(), _mm512_setzero_ps());
            for values in part.as_chunks::<SIDE>().0 {
                // SAFETY: 16 values are read.
                let values = unsafe { _mm512_loadu_ps(values.as_ptr().cast()) };
                let size = _mm512_abs_ps(values);
                most = _mm512_max_ps(most, size);
                total = _mm512_add_ps(total, size);
            }
            largest = largest.max(_mm512_reduce_max_ps(most));
            let total = _mm512_reduce_add_ps(total);
            sum = sum.max(total);
            all += total;
        }
        if !all.is_finite() {
            // A weight is no number, and so is what is summed with it.
            words.fill(0);
            return f32::NAN;
        }
        let step = (sum / LARGEST_SUM).max(largest / LARGEST_WEIGHT);
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        let factor = _mm512_set1_ps(inverse);
        let pairs = line.as_chunks::<{ 2 * SIDE }>().0.iter();
        for (values, words) in pairs.zip(words.as_chunks_mut::<SIDE>().0) {
            // SAFETY: 32 values are read, and as many written.
            unsafe {
                let low = _mm512_loadu_ps(values.as_ptr().cast());
                let high = _mm512_loadu_ps(values.as_ptr().cast::<f32>().add(SIDE));
                let [low, high] = [low, high].map(|v| _mm512_mul_ps(v, factor));
                _mm512_storeu_si512(words.as_mut_ptr().cast(), Int16::words(low, high));
            }
        }
        step
    }
}

/// Products of a point as what they stand for.
struct Sums<'a> {
    /// `[output][64]`.
    m: &'a mut [f32],
    /// What whole numbers of each output, and of each tile, stand for.
    rows: &'a [f32],
    columns: &'a [f32],
    add: bool,
}

impl Finish for Sums<'_> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn tile<const R: usize>(&mut self, row: usize, sums: [[__m512; VECTORS]; R]) {
        assert!(self.columns.len() >= PANEL);
        let m = &mut self.m[row * PANEL..][..R * PANEL];
        let rows = &self.rows[row..][..R];
        for (r, (sums, step)) in sums.into_iter().zip(rows).enumerate() {
            let step = _mm512_set1_ps(*step);
            for (v, sum) in sums.into_iter().enumerate() {
                // SAFETY: there are 64 steps, and a line of 64 for each row.
                unsafe {
                    let columns = _mm512_loadu_ps(self.columns.as_ptr().add(16 * v));
                    let to = m.as_mut_ptr().add(r * PANEL + 16 * v);
                    let whole = _mm512_cvtepi32_ps(_mm512_castps_si512(sum));
                    let mut value = _mm512_mul_ps(whole, _mm512_mul_ps(step, columns));
                    if self.add {
                        value = _mm512_add_ps(value, _mm512_loadu_ps(to));
                    }
                    _mm512_storeu_ps(to, value);
                }
            }
        }
    }
}
