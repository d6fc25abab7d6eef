//! 3x3 convolutions of bf16 by Winograd's algorithm F(2x2, 3x3) (Lavin and Gray 2015): 16
//! products per 4 outputs and channel pair instead of 36.
//!
//! 4x4 input tiles of all images are transformed in f32, rounded, and laid out as panels of 64
//! tiles, `v[panel][16][pair][64]`, two channels to a word. A task takes some output channels
//! and panels: it transforms its weights, `u[output][16][pair]`, multiplies, `m = u v`, and
//! transforms `m` back to 2x2 output tiles. Transformed weights are never kept.
//!
//! What is rounded are sums of four inputs and of up to nine weights. Against inputs and weights
//! rounded themselves the error is 1.7 times as large for values that are independent of one
//! another: 25 instead of 9 products add their errors to an output.

use std::arch::x86_64::*;
use std::sync::Mutex;

use rayon::prelude::*;

use crate::avx512::{self, Bf16, Element, F32, Shared};
use crate::implicit::Conv3x3;
use crate::matrix::{PANEL, PARALLEL_PRODUCTS, Values};

/// Points of a transformed tile.
const POINTS: usize = 16;
const TAPS: usize = 9;
/// Lanes of a vector, and words that weights are laid out in at once.
const SIDE: usize = 16;
/// Channels of so many words.
const BLOCK: usize = 2 * SIDE;
/// With fewer tiles a panel is half empty, and transforming the weights does not pay.
const MIN_TILES: usize = 64;
/// With fewer output channels transforming the input does not pay.
const MIN_OUTPUTS: usize = 32;
/// Most output channels per task: whole tiles of six.
const TASK_OUTPUTS: usize = 96;
/// Most words of transformed input at a time (16 MB), which is read once for each 96 outputs.
const MAX_WORDS: usize = 4 << 20;

/// A convolution done this way.
pub(crate) struct WinogradBf16(pub(crate) Conv3x3);

/// What a task works in: transformed weights, and their products.
type Buffers = (Vec<u32>, Vec<f32>);

/// Up to 16 tiles that lie side by side, in one row of tiles and one panel.
#[derive(Clone, Copy)]
struct Run {
    /// The first one's number among all tiles.
    tile: usize,
    image: usize,
    row: usize,
    column: usize,
    tiles: usize,
}

impl WinogradBf16 {
    /// Whether this is the faster way: the channels read are whole blocks, and the products are not
    /// those of matrix registers, beside which transforming takes too long.
    pub(crate) fn pays(&self) -> bool {
        self.fits() && self.tiles() >= MIN_TILES && self.0.o >= MIN_OUTPUTS
    }

    fn fits(&self) -> bool {
        self.0.in_blocks() && !crate::matrix_registers()
    }

    fn rows(&self) -> usize {
        self.0.h.div_ceil(2)
    }

    fn columns(&self) -> usize {
        self.0.w.div_ceil(2)
    }

    /// Tiles of all images.
    fn tiles(&self) -> usize {
        self.0.images * self.rows() * self.columns()
    }

    /// Words of a pixel's channels.
    fn pairs(&self) -> usize {
        self.0.c / 2
    }

    /// Words of a transformed panel.
    fn panel(&self) -> usize {
        POINTS * self.pairs() * PANEL
    }

    /// Words of one output channel's transformed weights.
    fn depth(&self) -> usize {
        POINTS * self.pairs()
    }

    /// Writes the convolution of all images to `y`, or adds it with `accumulate`; `weight` is
    /// `[o, c, 3, 3]`, or `[c, o, 3, 3]` if transposed.
    pub(crate) fn run(&self, y: &mut [f32], accumulate: bool, x: &[f32], weight: Values<'_>) {
        assert!(self.fits() && x.len() >= self.0.images * self.0.c * self.0.area());
        assert!(weight.len() >= self.0.o * self.0.c * TAPS);
        assert!(y.len() >= self.0.images * self.0.o * self.0.area());
        let runs = self.runs();
        let panels: Vec<&[Run]> = runs
            .chunk_by(|a, b| a.tile / PANEL == b.tile / PANEL)
            .collect();
        let y = Shared::new(y.as_mut_ptr());
        let mut v = Vec::new();
        // Of threads that have done their task, to be used again.
        let buffers = Mutex::new(Vec::new());
        for panels in panels.chunks((MAX_WORDS / self.panel()).max(1)) {
            self.transform_inputs(x, panels, &mut v);
            self.multiply_panels(y, accumulate, weight, (panels, &v), &buffers);
        }
    }

    /// The output's part that these panels make.
    fn multiply_panels(
        &self,
        y: Shared<f32>,
        accumulate: bool,
        weight: Values<'_>,
        (panels, v): (&[&[Run]], &[u32]),
        buffers: &Mutex<Vec<Buffers>>,
    ) {
        let outputs = self.outputs_per_task();
        // Each task transforms its weights: few panels per task are for many threads only.
        let divided = (3 * rayon::current_num_threads()).div_ceil(self.0.o.div_ceil(outputs));
        let per_task = panels.len().div_ceil(divided);
        let groups: Vec<_> = panels
            .chunks(per_task)
            .zip(v.chunks(per_task * self.panel()))
            .collect();
        let tasks = self.0.o.div_ceil(outputs) * groups.len();
        let task = |number: usize| {
            let (first, (panels, v)) = (
                number / groups.len() * outputs,
                groups[number % groups.len()],
            );
            let outputs = outputs.min(self.0.o - first);
            let spare = buffers.lock().ok().and_then(|mut all| all.pop());
            let (mut u, mut m) = spare.unwrap_or_default();
            u.resize(outputs * self.depth(), 0);
            m.resize(POINTS * outputs * PANEL, 0.0);
            match weight {
                Values::F32(w) => self.transform_weights(w, first, &mut u),
                Values::Bf16(w) => self.transform_weights(w, first, &mut u),
            }
            for (runs, v) in panels.iter().zip(v.chunks_exact(self.panel())) {
                let points = m.chunks_exact_mut(outputs * PANEL);
                for (point, (m, v)) in points.zip(v.chunks_exact(self.pairs() * PANEL)).enumerate()
                {
                    let u = avx512::left(&u[point * self.pairs()..], self.depth());
                    avx512::multiply_panel::<Bf16>(m, outputs, u, v);
                }
                let sums = m.as_ptr();
                for run in *runs {
                    for output in 0..outputs {
                        let plane = (run.image * self.0.o + first + output) * self.0.area();
                        let line = output * PANEL + run.tile % PANEL;
                        // SAFETY: the processor is able (`fits`). All 16 points of this output
                        // have a line of 64 sums in `m`, of which those of the run are read.
                        // The plane is inside the output (`run`), and no other task writes to
                        // this run of it.
                        unsafe {
                            let (from, to) = (sums.add(line), y.at(plane));
                            self.transform_output(run, from, outputs * PANEL, to, accumulate);
                        }
                    }
                }
            }
            if let Ok(mut all) = buffers.lock() {
                all.push((u, m));
            }
        };
        if self.0.o * self.0.c * TAPS * self.0.images * self.0.area() < PARALLEL_PRODUCTS {
            (0..tasks).for_each(task);
        } else {
            (0..tasks).into_par_iter().with_max_len(1).for_each(task);
        }
    }

    /// Output channels per task, as even as whole tiles of six allow.
    fn outputs_per_task(&self) -> usize {
        self.0
            .o
            .div_ceil(self.0.o.div_ceil(TASK_OUTPUTS))
            .next_multiple_of(6)
    }

    /// All tiles, in their order.
    fn runs(&self) -> Vec<Run> {
        let mut runs = Vec::new();
        let mut tile = 0;
        for line in 0..self.0.images * self.rows() {
            let mut column = 0;
            while column < self.columns() {
                let tiles = SIDE.min(self.columns() - column).min(PANEL - tile % PANEL);
                runs.push(Run {
                    tile,
                    image: line / self.rows(),
                    row: line % self.rows(),
                    column,
                    tiles,
                });
                (tile, column) = (tile + tiles, column + tiles);
            }
        }
        runs
    }

    /// The channels `[image][c][h][w]` of these panels' tiles to `[panel][16][pair][64]`, zeros behind
    /// the last tile.
    fn transform_inputs(&self, x: &[f32], panels: &[&[Run]], v: &mut Vec<u32>) {
        let length = panels.len() * self.panel();
        v.clear();
        v.reserve(length);
        let words = Shared::new(v.as_mut_ptr());
        let pair = |pair: usize| {
            for (panel, runs) in panels.iter().enumerate() {
                let to = panel * self.panel() + pair * PANEL;
                for run in *runs {
                    let first = (run.image * self.0.c + 2 * pair) * self.0.area();
                    let planes = &x[first..][..2 * self.0.area()];
                    // SAFETY: the processor is able (`fits`). The run is inside the picture; each
                    // of 16 points has a line of this pair, of which the run's words are
                    // written, for this pair only.
                    unsafe { self.transform_input(run, planes, words.at(to + run.tile % PANEL)) };
                }
                let lanes = runs.iter().map(|run| run.tiles).sum();
                for point in 0..POINTS {
                    for lane in lanes..PANEL {
                        let at = to + point * self.pairs() * PANEL + lane;
                        // SAFETY: inside the panel, and written for this pair only.
                        unsafe { words.at(at).write(0) };
                    }
                }
            }
        };
        if length < PARALLEL_PRODUCTS {
            (0..self.pairs()).for_each(pair);
        } else {
            (0..self.pairs()).into_par_iter().for_each(pair);
        }
        // SAFETY: there is room for so many words; of every panel all points' lines of all pairs have
        // been written, the lanes of tiles and those behind them.
        unsafe { v.set_len(length) };
    }

    /// Two planes' tiles `B^T d B`, a word of both, to 16 lines.
    ///
    /// # Safety
    /// AVX-512 with BW, VL and BF16. The run is inside planes of this size; `to` is good for writing
    /// the run's words, in 16 lines, `64 * pairs` words apart.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn transform_input(&self, run: &Run, planes: &[f32], to: *mut u32) {
        let (first, second) = planes.split_at(self.0.area());
        // SAFETY: the caller's word; the mask keeps writes to the run's words.
        unsafe {
            let (first, second) = (self.points(run, first), self.points(run, second));
            let mask = avx512::mask16(run.tiles);
            for (point, (a, b)) in first.into_iter().zip(second).enumerate() {
                let to = to.add(point * self.pairs() * PANEL);
                _mm512_mask_storeu_epi32(to.cast(), mask, avx512::paired(a, b));
            }
        }
    }

    /// `B^T d B` of a run of one plane.
    ///
    /// # Safety
    /// AVX-512; the run is inside planes of this size.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn points(&self, run: &Run, plane: &[f32]) -> [__m512; POINTS] {
        assert!(plane.len() >= self.0.area());
        let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        let odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        // Columns of the tiles' four lines: [line][column].
        let mut d = [[_mm512_setzero_ps(); 4]; 4];
        let left = 2 * run.column;
        for (line, d) in d.iter_mut().enumerate() {
            let Some(y) = (2 * run.row + line)
                .checked_sub(1)
                .filter(|y| *y < self.0.h)
            else {
                continue;
            };
            let from = plane.as_ptr().wrapping_add(y * self.0.w);
            // 16 values from column `at - 1` on, zeros outside.
            let load = |at: usize| {
                let inside = avx512::mask16((self.0.w + 1).saturating_sub(at));
                let mask = if at == 0 { inside & !1 } else { inside };
                // SAFETY: the line is inside the plane, and the mask keeps to the line.
                unsafe { _mm512_maskz_loadu_ps(mask, from.wrapping_add(at).wrapping_sub(1)) }
            };
            let (a, b) = (load(left), load(left + SIDE));
            let (c, e) = (load(left + 2), load(left + 2 + SIDE));
            *d = [
                _mm512_permutex2var_ps(a, even, b),
                _mm512_permutex2var_ps(a, odd, b),
                _mm512_permutex2var_ps(c, even, e),
                _mm512_permutex2var_ps(c, odd, e),
            ];
        }
        let mut lines = [[_mm512_setzero_ps(); 4]; 4];
        for column in 0..4 {
            let points = input_points([d[0][column], d[1][column], d[2][column], d[3][column]]);
            for (line, point) in lines.iter_mut().zip(points) {
                line[column] = point;
            }
        }
        let mut points = [_mm512_setzero_ps(); POINTS];
        for (points, line) in points.chunks_exact_mut(4).zip(lines) {
            points.copy_from_slice(&input_points(line));
        }
        points
    }

    /// The weights of output channels from `first` on, as many as there is room for:
    /// `[output][16][pair]`.
    fn transform_weights<T: Element<F32>>(&self, w: &[T], first: usize, u: &mut [u32]) {
        let (c, depth) = (self.0.c, self.depth());
        let outputs = u.len() / depth;
        // Of two times 16 channels: what is read, and one output's kernels.
        let mut halves = [[[0; SIDE]; SIDE]; 2];
        let mut kernels = [[[0; SIDE]; TAPS]; 2];
        for channel in (0..c).step_by(BLOCK) {
            let read =
                |taps: &avx512::Operand<'_, T>, column: usize, halves: &mut [[_; SIDE]; 2]| {
                    for (half, words) in halves.iter_mut().enumerate() {
                        taps.words_of::<F32>(column, channel + half * SIDE, words);
                    }
                };
            let mut store = |output: usize, kernels: &[[[u32; SIDE]; TAPS]; 2]| {
                let out = &mut u[output * depth + channel / 2..];
                // SAFETY: the processor is able (`fits`).
                unsafe { transform_kernels(kernels, out, self.pairs()) };
            };
            if self.0.transposed {
                let taps = self.0.taps(w, first, outputs);
                for column in (0..outputs * TAPS).step_by(SIDE) {
                    read(&taps, column, &mut halves);
                    for at in column..(column + SIDE).min(outputs * TAPS) {
                        let tap = at % TAPS;
                        for (kernels, half) in kernels.iter_mut().zip(&halves) {
                            kernels[TAPS - 1 - tap] = half[at - column];
                        }
                        if tap == TAPS - 1 {
                            store(at / TAPS, &kernels);
                        }
                    }
                }
            } else {
                for output in 0..outputs {
                    let taps = self.0.taps(w, first + output, 1);
                    read(&taps, 0, &mut halves);
                    for (kernels, half) in kernels.iter_mut().zip(&halves) {
                        kernels.copy_from_slice(&half[..TAPS]);
                    }
                    store(output, &kernels);
                }
            }
        }
    }

    /// A run's 2x2 output tiles `A^T m A` to one plane of the output, or added to it.
    ///
    /// # Safety
    /// AVX-512. 16 points, `stride` apart, are good for reading the run's sums from `m` on; the
    /// run is inside the plane, and nothing else uses it.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn transform_output(
        &self,
        run: &Run,
        m: *const f32,
        stride: usize,
        plane: *mut f32,
        accumulate: bool,
    ) {
        let low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        let high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
        let tiles = avx512::mask16(run.tiles);
        let left = 2 * run.column;
        let width = (2 * run.tiles).min(self.0.w - left);
        let masks = [width, width.saturating_sub(SIDE)].map(avx512::mask16);
        // SAFETY: the caller's word; masks keep reads to the run's sums, and writes to its pixels
        // inside the picture.
        unsafe {
            let (mut upper, mut lower) = ([_mm512_setzero_ps(); 4], [_mm512_setzero_ps(); 4]);
            for (column, (upper, lower)) in upper.iter_mut().zip(&mut lower).enumerate() {
                let mut points = [_mm512_setzero_ps(); 4];
                for (line, point) in points.iter_mut().enumerate() {
                    *point = _mm512_maskz_loadu_ps(tiles, m.add((4 * line + column) * stride));
                }
                [*upper, *lower] = output_points(points);
            }
            for (line, points) in [upper, lower].into_iter().enumerate() {
                let y = 2 * run.row + line;
                if y >= self.0.h {
                    break;
                }
                let [a, b] = output_points(points);
                let to = plane.add(y * self.0.w + left);
                let both = [
                    _mm512_permutex2var_ps(a, low, b),
                    _mm512_permutex2var_ps(a, high, b),
                ];
                for (part, (mut values, mask)) in both.into_iter().zip(masks).enumerate() {
                    let to = to.wrapping_add(part * SIDE);
                    if accumulate {
                        values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, to));
                    }
                    _mm512_mask_storeu_ps(to, mask, values);
                }
            }
        }
    }
}

/// Kernels of 32 channels of one output, `[half][tap][channel]`, `G g G^T`, rounded, to 16 lines of
/// `stride` words, of which 16 words each are written.
///
/// # Safety
/// AVX-512 with BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn transform_kernels(taps: &[[[u32; SIDE]; TAPS]; 2], out: &mut [u32], stride: usize) {
    // SAFETY: the caller's word.
    let (low, high) = unsafe { (kernel_points(&taps[0]), kernel_points(&taps[1])) };
    for (point, (low, high)) in low.into_iter().zip(high).enumerate() {
        let out = &mut out[point * stride..][..SIDE];
        // SAFETY: the caller's word; 16 words fit.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), avx512::narrowed(low, high)) };
    }
}

/// `G g G^T` of 16 channels.
///
/// # Safety
/// AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn kernel_points(taps: &[[u32; SIDE]; TAPS]) -> [__m512; POINTS] {
    let mut lines = [[_mm512_setzero_ps(); 3]; 4];
    for column in 0..3 {
        let mut kernel = [_mm512_setzero_ps(); 3];
        for (line, tap) in kernel.iter_mut().enumerate() {
            // SAFETY: a tap is 16 values.
            *tap = unsafe { _mm512_loadu_ps(taps[3 * line + column].as_ptr().cast()) };
        }
        for (line, point) in lines.iter_mut().zip(weight_points(kernel)) {
            line[column] = point;
        }
    }
    let mut points = [_mm512_setzero_ps(); POINTS];
    for (points, line) in points.chunks_exact_mut(4).zip(lines) {
        points.copy_from_slice(&weight_points(line));
    }
    points
}

/// `B^T d`.
#[inline]
#[target_feature(enable = "avx512f")]
fn input_points([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
    [
        _mm512_sub_ps(a, c),
        _mm512_add_ps(b, c),
        _mm512_sub_ps(c, b),
        _mm512_sub_ps(b, d),
    ]
}

/// `G g`.
#[inline]
#[target_feature(enable = "avx512f")]
fn weight_points([a, b, c]: [__m512; 3]) -> [__m512; 4] {
    let half = _mm512_set1_ps(0.5);
    let ends = _mm512_mul_ps(_mm512_add_ps(a, c), half);
    [
        a,
        _mm512_fmadd_ps(b, half, ends),
        _mm512_fnmadd_ps(b, half, ends),
        c,
    ]
}

/// `A^T m`.
#[inline]
#[target_feature(enable = "avx512f")]
fn output_points([a, b, c, d]: [__m512; 4]) -> [__m512; 2] {
    [
        _mm512_add_ps(_mm512_add_ps(a, b), c),
        _mm512_sub_ps(_mm512_sub_ps(b, c), d),
    ]
}
