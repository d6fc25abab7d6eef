//! 3x3 convolutions by Winograd's algorithm (Lavin and Gray 2015) with AVX-512: F(4x4, 3x3) in
//! f32, 36 products per 16 outputs and channel pair instead of 144, or F(2x2, 3x3) in f32 or
//! bf16, 16 products per 4 outputs instead of 36.
//!
//! Input tiles of all images are transformed in f32, rounded if need be, and laid out as panels of
//! 64 tiles, `v[panel][point][word][64]`; a word is a channel, or two channels in bf16. A task takes
//! some output channels and panels: it transforms its weights, `u[output][point][word]`,
//! multiplies, `m = u v`, and transforms `m` back to output tiles. Transformed weights are never
//! kept.
//!
//! In bf16, what is rounded are sums of four inputs and of up to nine weights. Against inputs and
//! weights rounded themselves the error is 1.7 times as large for values that are independent of
//! one another: 25 instead of 9 products add their errors to an output. F(4x4, 3x3) would round
//! some six times worse, and is for f32 here (`winograd_int16.rs` has it for less), where the result differs from direct summation by
//! a few 1e-6 of the output's size.

use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::sync::Mutex;

use rayon::prelude::*;

use crate::avx512::{self, Arithmetic, F32, Shared, TILE, Taps};
use crate::buffer::{Start, share};
use crate::conv3x3::{Conv3x3, TAPS, Way};
use crate::matrix::{PANEL, PARALLEL_PRODUCTS, Values};

/// Lanes of a vector, and words that weights are laid out in at once.
const SIDE: usize = 16;
/// With fewer output channels transforming the input does not pay.
const MIN_OUTPUTS: usize = 32;
/// Most output channels per task: whole tiles of six.
const TASK_OUTPUTS: usize = 96;
/// Most words of transformed input at a time (32 MB), which is read once for each 96 outputs.
const MAX_WORDS: usize = 8 << 20;

/// One of Winograd's algorithms, in one dimension.
pub(crate) trait Algorithm: Copy + Send + Sync + 'static {
    /// Outputs of a tile.
    const OUTPUTS: usize;
    /// With fewer tiles transforming the weights does not pay.
    const MIN_TILES: usize;
    /// Inputs of a tile, and its points: `OUTPUTS + 2`.
    const INPUTS: usize = Self::OUTPUTS + 2;
    /// Points of a tile in two dimensions.
    const POINTS: usize = Self::INPUTS * Self::INPUTS;

    /// `B^T d`, the first `INPUTS` of each.
    ///
    /// # Safety
    /// AVX-512.
    unsafe fn input_points(d: [__m512; MOST]) -> [__m512; MOST];

    /// `G g`, the first `INPUTS`.
    ///
    /// # Safety
    /// AVX-512.
    unsafe fn weight_points(g: [__m512; 3]) -> [__m512; MOST];

    /// `A^T m` of the first `INPUTS`, the first `OUTPUTS`.
    ///
    /// # Safety
    /// AVX-512.
    unsafe fn output_points(m: [__m512; MOST]) -> [__m512; MOST];
}

/// Most inputs of a tile in one dimension.
const MOST: usize = 6;

/// F(2x2, 3x3).
#[derive(Clone, Copy)]
pub(crate) struct Two;

/// F(4x4, 3x3).
#[derive(Clone, Copy)]
pub(crate) struct Four;

/// A convolution done this way.
pub(crate) struct Winograd<S, A> {
    conv: Conv3x3,
    kind: PhantomData<(S, A)>,
}

/// What the tasks of a convolution have in common. They work in a `W`, transformed weights, and in
/// their products.
pub(crate) struct Task<'a, W> {
    pub(crate) begin: Begin<'a>,
    /// Most output channels of a task.
    pub(crate) outputs: usize,
    /// Of threads that have done their task, to be used again.
    pub(crate) buffers: Mutex<Vec<(W, Vec<f32>)>>,
}

/// What a convolution's sums are added to.
#[derive(Clone, Copy)]
pub(crate) struct Begin<'a> {
    /// What is in the output already.
    accumulate: bool,
    start: Start<'a>,
}

impl<'a> Begin<'a> {
    /// That of one plane.
    fn plane(&self, number: usize, area: usize) -> Self {
        let start = self.start.of_rows(number, 1, area);
        Self { start, ..*self }
    }
}

/// Runs by the panels that they belong to.
pub(crate) fn panels(runs: &[Run]) -> Vec<&[Run]> {
    let same = |a: &Run, b: &Run| a.tile / PANEL == b.tile / PANEL;
    runs.chunk_by(same).collect()
}

/// Up to 16 tiles that lie side by side, in one row of tiles and one panel.
#[derive(Clone, Copy)]
pub(crate) struct Run {
    /// The first one's number among all tiles.
    pub(crate) tile: usize,
    pub(crate) image: usize,
    row: usize,
    column: usize,
    pub(crate) tiles: usize,
}

impl<S: Arithmetic, A: Algorithm> Way for Winograd<S, A> {
    /// The channels read have to be whole blocks, and the products not those of matrix registers,
    /// beside which transforming takes too long.
    fn pays(&self) -> bool {
        self.fits() && self.tiles() >= A::MIN_TILES && self.conv.o >= MIN_OUTPUTS
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

/// Has `convolve` write the output's planes, or add to them: they are good for reading and writing.
pub(crate) fn into_sum(
    conv: &Conv3x3,
    y: &mut [f32],
    accumulate: bool,
    convolve: impl FnOnce(*mut f32, Begin<'_>),
) {
    assert!(y.len() >= conv.images * conv.o * conv.area());
    let start = Start::default();
    convolve(y.as_mut_ptr(), Begin { accumulate, start });
}

/// Has `convolve` write the output's planes, which begin with `start`: they are good for writing, and
/// what they begin with is of their size.
///
/// # Safety
/// `convolve` writes all planes, and reads none.
pub(crate) unsafe fn into_new<'d>(
    conv: &Conv3x3,
    y: &'d mut [MaybeUninit<f32>],
    start: Start<'_>,
    convolve: impl FnOnce(*mut f32, Begin<'_>),
) -> &'d mut [f32] {
    start.check(conv.images * conv.o, conv.area());
    assert_eq!(y.len(), conv.images * conv.o * conv.area());
    let accumulate = false;
    convolve(y.as_mut_ptr().cast(), Begin { accumulate, start });
    // SAFETY: the caller's word.
    unsafe { y.assume_init_mut() }
}

impl<S: Arithmetic, A: Algorithm> Winograd<S, A> {
    pub(crate) fn new(conv: Conv3x3) -> Self {
        Self {
            conv,
            kind: PhantomData,
        }
    }

    pub(crate) fn fits(&self) -> bool {
        self.conv.in_blocks() && !(S::MATRIX && crate::matrix_registers())
    }

    fn rows(&self) -> usize {
        self.conv.h.div_ceil(A::OUTPUTS)
    }

    fn columns(&self) -> usize {
        self.conv.w.div_ceil(A::OUTPUTS)
    }

    /// Tiles of all images.
    fn tiles(&self) -> usize {
        self.conv.images * self.rows() * self.columns()
    }

    /// Words of a pixel's channels.
    fn words(&self) -> usize {
        self.conv.c / S::VALUES
    }

    /// Words of a transformed panel.
    fn panel(&self) -> usize {
        A::POINTS * self.words() * PANEL
    }

    /// Words of one output channel's transformed weights.
    fn depth(&self) -> usize {
        A::POINTS * self.words()
    }

    /// Writes the convolution of all images to `y`, or adds it.
    ///
    /// # Safety
    /// `y` is good for writing all planes of the output, and for reading them where `begin` says
    /// so; what it begins with is of that size.
    unsafe fn convolve(&self, y: *mut f32, begin: Begin<'_>, x: &[f32], weight: Values<'_>) {
        assert!(self.fits() && x.len() >= self.conv.images * self.conv.c * self.conv.area());
        assert!(weight.len() >= self.conv.o * self.conv.c * TAPS);
        let runs = self.runs();
        let y = Shared::new(y);
        let mut v = Vec::new();
        let task = Task {
            begin,
            outputs: share(self.conv.o, TASK_OUTPUTS, TILE),
            buffers: Mutex::default(),
        };
        for panels in self.at_once(&panels(&runs), self.panel()) {
            self.transform_inputs(x, panels, &mut v);
            let weights = |first: usize, outputs: usize, u: &mut Vec<u32>| {
                u.resize(outputs * self.depth(), 0);
                match weight {
                    // SAFETY: the processor is able (`fits`), and there are so many outputs.
                    Values::F32(w) => unsafe { self.transform_weights(w, first, u) },
                    // SAFETY: as above.
                    Values::Bf16(w) => unsafe { self.transform_weights(w, first, u) },
                }
            };
            let multiply = |number: usize, outputs: usize, u: &mut Vec<u32>, m: &mut [f32]| {
                let tiles = panels[number].iter().map(|run| run.tiles).sum();
                let v = v[number * self.panel()..].chunks_exact(self.words() * PANEL);
                let points = m.chunks_exact_mut(outputs * PANEL).zip(v);
                for (point, (m, v)) in points.enumerate() {
                    let u = avx512::left(&u[point * self.words()..], self.depth());
                    avx512::multiply_panel::<S>(m, PANEL, (outputs, tiles), false, u, v);
                }
            };
            // SAFETY: the caller's word.
            unsafe { self.multiply_panels(y, &task, panels, weights, multiply) };
        }
    }

    /// As many panels at a time as fit into memory of [`MAX_WORDS`], if one takes `words`: as even
    /// as can be, as weights are transformed for each.
    pub(crate) fn at_once<'p, 'r>(
        &self,
        panels: &'p [&'r [Run]],
        words: usize,
    ) -> std::slice::Chunks<'p, &'r [Run]> {
        let most = (MAX_WORDS / words).max(1);
        panels.chunks(panels.len().div_ceil(panels.len().div_ceil(most)))
    }

    /// The output's part that these panels make. Each task has some output channels and panels:
    /// `weights(first, outputs, work)` transforms the weights of as many outputs, then
    /// `multiply(panel, outputs, work, m)` leaves the products `[point][output][64]` of each of
    /// its panels.
    ///
    /// # Safety
    /// `y` is good for writing all planes of the output, and for reading them where the task
    /// begins with them.
    pub(crate) unsafe fn multiply_panels<W: Default + Send>(
        &self,
        y: Shared<f32>,
        task: &Task<'_, W>,
        panels: &[&[Run]],
        weights: impl Fn(usize, usize, &mut W) + Sync,
        multiply: impl Fn(usize, usize, &mut W, &mut [f32]) + Sync,
    ) {
        let Task { begin, buffers, .. } = task;
        // Each task transforms its weights: few panels per task are for many threads only.
        let parts = self.conv.o.div_ceil(task.outputs);
        let divided = (3 * rayon::current_num_threads()).div_ceil(parts);
        let per_task = panels.len().div_ceil(divided);
        let groups = panels.len().div_ceil(per_task);
        let run = |number: usize| {
            let (first, group) = (number / groups * task.outputs, number % groups);
            let outputs = task.outputs.min(self.conv.o - first);
            let spare = buffers.lock().ok().and_then(|mut all| all.pop());
            let (mut work, mut m) = spare.unwrap_or_default();
            m.resize(A::POINTS * outputs * PANEL, 0.0);
            weights(first, outputs, &mut work);
            let numbers = (group * per_task..panels.len()).take(per_task);
            for number in numbers {
                multiply(number, outputs, &mut work, &mut m);
                let sums = m.as_ptr();
                for run in panels[number] {
                    for output in 0..outputs {
                        let plane = run.image * self.conv.o + first + output;
                        let line = output * PANEL + run.tile % PANEL;
                        // SAFETY: the processor is able (`fits`). All points of this output
                        // have a line of 64 sums in `m`, of which those of the run are read.
                        // The plane is inside the output, and no other task writes to this
                        // run of it.
                        unsafe {
                            let to = y.at(plane * self.conv.area());
                            let begin = begin.plane(plane, self.conv.area());
                            self.transform_output(run, sums.add(line), outputs * PANEL, to, begin);
                        }
                    }
                }
            }
            if let Ok(mut all) = buffers.lock() {
                all.push((work, m));
            }
        };
        let tasks = parts * groups;
        if self.conv.o * self.conv.c * TAPS * self.conv.images * self.conv.area()
            < PARALLEL_PRODUCTS
        {
            (0..tasks).for_each(run);
        } else {
            (0..tasks).into_par_iter().with_max_len(1).for_each(run);
        }
    }

    /// All tiles, in their order.
    pub(crate) fn runs(&self) -> Vec<Run> {
        let mut runs = Vec::new();
        let mut tile = 0;
        for line in 0..self.conv.images * self.rows() {
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

    /// The channels `[image][c][h][w]` of these panels' tiles to `[panel][point][word][64]`, zeros
    /// behind the last tile.
    fn transform_inputs(&self, x: &[f32], panels: &[&[Run]], v: &mut Vec<u32>) {
        let length = panels.len() * self.panel();
        v.clear();
        v.reserve(length);
        let words = Shared::new(v.as_mut_ptr());
        let word = |word: usize| {
            for (panel, runs) in panels.iter().enumerate() {
                let to = panel * self.panel() + word * PANEL;
                for run in *runs {
                    let first = (run.image * self.conv.c + S::VALUES * word) * self.conv.area();
                    let planes = &x[first..][..S::VALUES * self.conv.area()];
                    // SAFETY: the processor is able (`fits`). The run is inside the picture; each
                    // point has a line of this word, of which the run's lanes are written, for
                    // this word only.
                    unsafe { self.transform_input(run, planes, words.at(to + run.tile % PANEL)) };
                }
                let lanes = runs.iter().map(|run| run.tiles).sum();
                for point in 0..A::POINTS {
                    for lane in lanes..PANEL {
                        let at = to + point * self.words() * PANEL + lane;
                        // SAFETY: inside the panel, and written for this word only.
                        unsafe { words.at(at).write(0) };
                    }
                }
            }
        };
        if length < PARALLEL_PRODUCTS {
            (0..self.words()).for_each(word);
        } else {
            (0..self.words()).into_par_iter().for_each(word);
        }
        // SAFETY: there is room for so many words; of every panel all points' lines of all words have
        // been written, the lanes of tiles and those behind them.
        unsafe { v.set_len(length) };
    }

    /// The tiles `B^T d B` of a word's planes to a line per point.
    ///
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI. The run is inside planes of this size, of which there are
    /// `S::VALUES`; `to` is good for writing the run's words, in lines `64 * words` apart.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn transform_input(&self, run: &Run, planes: &[f32], to: *mut u32) {
        let area = self.conv.area();
        let mut points = [[_mm512_setzero_ps(); MOST * MOST]; 2];
        // SAFETY: the caller's word; the mask keeps writes to the run's words.
        unsafe {
            for (plane, points) in planes.chunks_exact(area).zip(&mut points) {
                self.points(run, plane, points);
            }
            let mask = avx512::mask16(run.tiles);
            let [first, second] = points;
            for (point, (a, b)) in first.into_iter().zip(second).enumerate().take(A::POINTS) {
                let to = to.add(point * self.words() * PANEL);
                _mm512_mask_storeu_epi32(to.cast(), mask, S::word(a, b));
            }
        }
    }

    /// Sets `points` to `B^T d B` of a run of one plane.
    ///
    /// # Safety
    /// AVX-512; the run is inside planes of this size.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    pub(crate) unsafe fn points(
        &self,
        run: &Run,
        plane: &[f32],
        points: &mut [__m512; MOST * MOST],
    ) {
        assert!(plane.len() >= self.conv.area());
        let left = A::OUTPUTS * run.column;
        // Transformed in one direction: [line][point].
        let mut lines = [[_mm512_setzero_ps(); MOST]; MOST];
        for (line, values) in lines.iter_mut().enumerate().take(A::INPUTS) {
            let Some(y) = (A::OUTPUTS * run.row + line)
                .checked_sub(1)
                .filter(|y| *y < self.conv.h)
            else {
                continue;
            };
            let from = plane.as_ptr().wrapping_add(y * self.conv.w);
            // 16 values from column `at - 1` on, zeros outside.
            let load = |at: usize| {
                let inside = avx512::mask16((self.conv.w + 1).saturating_sub(at));
                let mask = if at == 0 { inside & !1 } else { inside };
                // SAFETY: the line is inside the plane, and the mask keeps to the line.
                unsafe { _mm512_maskz_loadu_ps(mask, from.wrapping_add(at).wrapping_sub(1)) }
            };
            let vectors = |at: usize| {
                let mut vectors = [_mm512_setzero_ps(); 4];
                for (number, vector) in vectors.iter_mut().enumerate().take(A::OUTPUTS) {
                    *vector = load(at + number * SIDE);
                }
                vectors
            };
            // Columns past a tile's outputs are the next tile's first ones.
            let own = each_of::<A>(vectors(left));
            let next = each_of::<A>(vectors(left + A::OUTPUTS));
            let mut columns = [_mm512_setzero_ps(); MOST];
            columns[..A::OUTPUTS].copy_from_slice(&own[..A::OUTPUTS]);
            columns[A::OUTPUTS..A::INPUTS].copy_from_slice(&next[..2]);
            // SAFETY: the caller's word.
            *values = unsafe { A::input_points(columns) };
        }
        for column in 0..A::INPUTS {
            let values = std::array::from_fn(|line| lines[line][column]);
            // SAFETY: the caller's word.
            let values = unsafe { A::input_points(values) };
            let points = points[column..].iter_mut().step_by(A::INPUTS);
            for (point, value) in points.zip(&values[..A::INPUTS]) {
                *point = *value;
            }
        }
    }

    /// The weights of output channels from `first` on, as many as there is room for:
    /// `[output][point][word]`.
    ///
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI; the output channels exist.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    pub(crate) unsafe fn transform_weights<T: Taps>(&self, w: &[T], first: usize, u: &mut [u32]) {
        let (c, depth) = (self.conv.c, self.depth());
        let outputs = u.len() / depth;
        let mut kernels = [[_mm512_setzero_ps(); TAPS]; 2];
        let blocks = (0..c).step_by(S::VALUES * SIDE);
        if !self.conv.transposed {
            // In the order that they are stored in.
            for output in 0..outputs {
                for channel in blocks.clone() {
                    let from = ((first + output) * c + channel) * TAPS;
                    let values = &w[from..][..S::VALUES * SIDE * TAPS];
                    let parts = values.chunks_exact(SIDE * TAPS);
                    for (taps, part) in kernels.iter_mut().zip(parts) {
                        // SAFETY: the caller's word; there are sixteen kernels.
                        unsafe { T::taps(part.as_ptr(), taps) };
                    }
                    let out = &mut u[output * depth + channel / S::VALUES..];
                    // SAFETY: the caller's word.
                    unsafe { self.transform_kernels(&kernels, out) };
                }
            }
            return;
        }
        let taps = self.conv.taps(w, first, outputs);
        taps.check();
        for channel in blocks {
            let word = channel / S::VALUES;
            let mut parts = [[_mm512_setzero_si512(); SIDE]; 2];
            for column in (0..outputs * TAPS).step_by(SIDE) {
                if column.is_multiple_of(2 * SIDE) {
                    // What the next channels have here, which lies far apart.
                    let columns = column..(column + 2 * SIDE).min(outputs * TAPS);
                    for next in (0..S::VALUES).map(|part| channel + (S::VALUES + part) * SIDE) {
                        taps.fetch::<F32>(columns.start, columns.end, next);
                    }
                }
                for (part, words) in parts.iter_mut().enumerate().take(S::VALUES) {
                    let channel = channel + part * SIDE;
                    // SAFETY: the caller's word; column and channels are inside.
                    unsafe { taps.block::<F32>(column, channel, false, words) };
                }
                for at in column..(column + SIDE).min(outputs * TAPS) {
                    let tap = at % TAPS;
                    for (kernels, part) in kernels.iter_mut().zip(&parts) {
                        // Turned around.
                        kernels[TAPS - 1 - tap] = _mm512_castsi512_ps(part[at - column]);
                    }
                    if tap == TAPS - 1 {
                        let out = &mut u[at / TAPS * depth + word..];
                        // SAFETY: the caller's word.
                        unsafe { self.transform_kernels(&kernels, out) };
                    }
                }
            }
        }
    }

    /// Kernels of one output, of 16 channels for each value of a word, `[value][tap]`, as
    /// `G g G^T`, rounded if need be, to a line for each point, of which 16 words are written.
    ///
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn transform_kernels(&self, kernels: &[[__m512; TAPS]; 2], out: &mut [u32]) {
        let mut points = [[_mm512_setzero_ps(); MOST * MOST]; 2];
        for (points, kernel) in points.iter_mut().zip(kernels).take(S::VALUES) {
            // SAFETY: the caller's word.
            unsafe { kernel_points::<A>(kernel, points) };
        }
        for point in 0..A::POINTS {
            let out = &mut out[point * self.words()..][..SIDE];
            // SAFETY: the caller's word; 16 words fit.
            unsafe {
                let words = S::words(points[0][point], points[1][point]);
                _mm512_storeu_si512(out.as_mut_ptr().cast(), words);
            }
        }
    }

    /// A run's output tiles `A^T m A` to one plane of the output, or added to it.
    ///
    /// # Safety
    /// AVX-512. All points, `stride` apart, are good for reading the run's sums from `m` on; the
    /// run is inside the plane, of which it is read where `begin` says so, and nothing else uses it.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn transform_output(
        &self,
        run: &Run,
        m: *const f32,
        stride: usize,
        plane: *mut f32,
        begin: Begin<'_>,
    ) {
        let constant = begin.start.rows.map_or(0.0, |rows| rows[0]);
        let residual = begin.start.residual.map(<[f32]>::as_ptr);
        let tiles = avx512::mask16(run.tiles);
        let left = A::OUTPUTS * run.column;
        let width = (A::OUTPUTS * run.tiles).min(self.conv.w - left);
        // SAFETY: the caller's word; masks keep reads to the run's sums, and writes to its pixels
        // inside the picture.
        unsafe {
            let mut lines = [[_mm512_setzero_ps(); MOST]; MOST];
            for column in 0..A::INPUTS {
                let mut points = [_mm512_setzero_ps(); MOST];
                for (line, point) in points.iter_mut().enumerate().take(A::INPUTS) {
                    let m = m.add((A::INPUTS * line + column) * stride);
                    *point = _mm512_maskz_loadu_ps(tiles, m);
                }
                for (line, value) in lines.iter_mut().zip(A::output_points(points)) {
                    line[column] = value;
                }
            }
            for (line, points) in lines.into_iter().enumerate().take(A::OUTPUTS) {
                let y = A::OUTPUTS * run.row + line;
                if y >= self.conv.h {
                    break;
                }
                let place = y * self.conv.w + left;
                let vectors = together::<A>(A::output_points(points));
                for (part, mut values) in vectors.into_iter().enumerate().take(A::OUTPUTS) {
                    let mask = avx512::mask16(width.saturating_sub(part * SIDE));
                    let place = place + part * SIDE;
                    let to = plane.wrapping_add(place);
                    if begin.accumulate {
                        values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, to));
                    }
                    if let Some(residual) = residual {
                        let from = residual.wrapping_add(place);
                        values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, from));
                    }
                    values = _mm512_add_ps(values, _mm512_set1_ps(constant));
                    _mm512_mask_storeu_ps(to, mask, values);
                }
            }
        }
    }
}

/// Of `OUTPUTS` vectors of values, every `OUTPUTS`th from the first one on, from the second one
/// on, and so forth.
#[inline]
#[target_feature(enable = "avx512f")]
fn each_of<A: Algorithm>([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
    let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    let odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    let halves = |a, b| {
        [
            _mm512_permutex2var_ps(a, even, b),
            _mm512_permutex2var_ps(a, odd, b),
        ]
    };
    let [evens, odds] = halves(a, b);
    if A::OUTPUTS == 2 {
        return [evens, odds, c, d];
    }
    let [evens2, odds2] = halves(c, d);
    let ([first, third], [second, fourth]) = (halves(evens, evens2), halves(odds, odds2));
    [first, second, third, fourth]
}

/// The opposite of [`each_of`], of the first `OUTPUTS`.
#[inline]
#[target_feature(enable = "avx512f")]
fn together<A: Algorithm>([a, b, c, d, ..]: [__m512; MOST]) -> [__m512; 4] {
    let low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    let high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    let merged = |a, b| {
        [
            _mm512_permutex2var_ps(a, low, b),
            _mm512_permutex2var_ps(a, high, b),
        ]
    };
    if A::OUTPUTS == 2 {
        let [first, second] = merged(a, b);
        return [first, second, c, d];
    }
    let ([evens, evens2], [odds, odds2]) = (merged(a, c), merged(b, d));
    let ([first, second], [third, fourth]) = (merged(evens, odds), merged(evens2, odds2));
    [first, second, third, fourth]
}

/// Sets `points` to `G g G^T` of 16 channels.
///
/// # Safety
/// AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
unsafe fn kernel_points<A: Algorithm>(taps: &[__m512; TAPS], points: &mut [__m512; MOST * MOST]) {
    let mut lines = [[_mm512_setzero_ps(); MOST]; 3];
    for (line, taps) in lines.iter_mut().zip(taps.as_chunks::<3>().0) {
        // SAFETY: the caller's word.
        *line = unsafe { A::weight_points(*taps) };
    }
    for column in 0..A::INPUTS {
        // SAFETY: the caller's word.
        let values = unsafe { A::weight_points([0, 1, 2].map(|line| lines[line][column])) };
        let points = points[column..].iter_mut().step_by(A::INPUTS);
        for (point, value) in points.zip(&values[..A::INPUTS]) {
            *point = *value;
        }
    }
}

impl Algorithm for Two {
    const OUTPUTS: usize = 2;
    const MIN_TILES: usize = 32;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn input_points([a, b, c, d, ..]: [__m512; MOST]) -> [__m512; MOST] {
        let none = _mm512_setzero_ps();
        [
            _mm512_sub_ps(a, c),
            _mm512_add_ps(b, c),
            _mm512_sub_ps(c, b),
            _mm512_sub_ps(b, d),
            none,
            none,
        ]
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn weight_points([a, b, c]: [__m512; 3]) -> [__m512; MOST] {
        let (none, half) = (_mm512_setzero_ps(), _mm512_set1_ps(0.5));
        let ends = _mm512_mul_ps(_mm512_add_ps(a, c), half);
        [
            a,
            _mm512_fmadd_ps(b, half, ends),
            _mm512_fnmadd_ps(b, half, ends),
            c,
            none,
            none,
        ]
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn output_points([a, b, c, d, ..]: [__m512; MOST]) -> [__m512; MOST] {
        let none = _mm512_setzero_ps();
        [
            _mm512_add_ps(_mm512_add_ps(a, b), c),
            _mm512_sub_ps(_mm512_sub_ps(b, c), d),
            none,
            none,
            none,
            none,
        ]
    }
}

/// Points 0, infinity, and these, which round two to three times less than the usual 1 and 2.
const NEAR: f32 = std::f32::consts::FRAC_1_SQRT_2;
const FAR: f32 = std::f32::consts::SQRT_2;

impl Algorithm for Four {
    const OUTPUTS: usize = 4;
    const MIN_TILES: usize = 64;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn input_points([a, b, c, d, e, f]: [__m512; MOST]) -> [__m512; MOST] {
        let times = |n: f32| _mm512_set1_ps(n);
        let (two, half) = (times(FAR * FAR), times(NEAR * NEAR));
        let both = times(FAR * FAR + NEAR * NEAR);
        let near = _mm512_mul_ps(times(NEAR), _mm512_fnmadd_ps(two, b, d));
        let far = _mm512_mul_ps(times(FAR), _mm512_fnmadd_ps(half, b, d));
        let (even, even2) = (_mm512_fnmadd_ps(two, c, e), _mm512_fnmadd_ps(half, c, e));
        [
            _mm512_fnmadd_ps(both, c, _mm512_add_ps(a, e)),
            _mm512_add_ps(even, near),
            _mm512_sub_ps(even, near),
            _mm512_add_ps(even2, far),
            _mm512_sub_ps(even2, far),
            _mm512_fnmadd_ps(both, d, _mm512_add_ps(b, f)),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn weight_points([a, b, c]: [__m512; 3]) -> [__m512; MOST] {
        let times = |n: f32| _mm512_set1_ps(n);
        // (a +- p b + p^2 c) over the product of the distances between p and the other points.
        let (to_near, to_far) = (times(-1.0 / 1.5), times(1.0 / 6.0));
        let near = _mm512_mul_ps(_mm512_fmadd_ps(c, times(NEAR * NEAR), a), to_near);
        let far = _mm512_mul_ps(_mm512_fmadd_ps(c, times(FAR * FAR), a), to_far);
        [
            a,
            _mm512_fmadd_ps(b, times(-NEAR / 1.5), near),
            _mm512_fmadd_ps(b, times(NEAR / 1.5), near),
            _mm512_fmadd_ps(b, times(FAR / 6.0), far),
            _mm512_fmadd_ps(b, times(-FAR / 6.0), far),
            c,
        ]
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn output_points([m, b, c, d, e, f]: [__m512; MOST]) -> [__m512; MOST] {
        let times = |n: f32| _mm512_set1_ps(n);
        let (near, far) = (_mm512_add_ps(b, c), _mm512_add_ps(d, e));
        let near2 = _mm512_mul_ps(_mm512_sub_ps(b, c), times(NEAR));
        let far2 = _mm512_mul_ps(_mm512_sub_ps(d, e), times(FAR));
        let none = _mm512_setzero_ps();
        let (half, two) = (times(NEAR * NEAR), times(FAR * FAR));
        let cubes = _mm512_fmadd_ps(near2, half, _mm512_mul_ps(far2, two));
        [
            _mm512_add_ps(_mm512_add_ps(m, near), far),
            _mm512_add_ps(near2, far2),
            _mm512_fmadd_ps(near, half, _mm512_mul_ps(far, two)),
            _mm512_add_ps(cubes, f),
            none,
            none,
        ]
    }
}
