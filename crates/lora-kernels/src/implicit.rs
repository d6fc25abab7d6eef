//! 3x3 convolutions of bf16 without a matrix of patches.
//!
//! Pictures are laid out once with a border of zeros, two channels of a pixel to a word,
//! `[image][pair][row][column]`. Sixteen pixels of a row, of one pair after the other, are then a
//! right operand as it lies, and so are the same pixels moved by a tap. Weights are laid out
//! once for all images. Sums run over blocks of 32 channels, and in a block over the nine
//! taps, while its pixels are in the first-level cache.
//!
//! Where rows are not made of whole vectors they are multiplied with their border: what is
//! summed across the border is dropped when the sums are written out.

use std::arch::x86_64::*;

use rayon::prelude::*;

use crate::amx::{self, Registers, SIDE};
use crate::avx512::{Arithmetic, Bf16, Element, Shared, pairs};
use crate::buffer::in_parts;
use crate::conv3x3::{Conv3x3, TAPS, Way};
use crate::matrix::{PARALLEL_PRODUCTS, Values};

/// Channels of a block.
const BLOCK: usize = 2 * SIDE;
/// Words of a block's weights.
const WORDS: usize = TAPS * SIDE;
/// Output channels per task in matrix registers.
const CHANNELS: usize = 2 * SIDE;

/// Output channels and vectors of a tile that is summed in vector registers.
const TILE: usize = 6;
const VECTORS: usize = 4;
/// Blocks that are summed before sums are written: their pixels (25 KB) stay in the
/// first-level cache for all output channels of a task.
const PART: usize = 2;
/// Fewer pixels than this do not pay for laying out the weights, which for patches are read where
/// they lie; transposed ones are laid out there, too, but not value by value.
const MIN_PIXELS: usize = 512;
/// Most output channels and vectors per task.
const TASK_CHANNELS: usize = 16 * TILE;
const TASK_VECTORS: usize = 64;

/// A convolution done this way.
pub(crate) struct Implicit(pub(crate) Conv3x3);

/// Sixteen sums of an output channel: the first one's place in the picture, its place in the
/// output, and which of them are inside.
#[derive(Clone, Copy)]
struct Sixteen {
    from: usize,
    to: usize,
    inside: __mmask16,
}

impl Way for Implicit {
    fn conv(&self) -> &Conv3x3 {
        &self.0
    }

    /// The channels read have to be whole blocks, and there have to be instructions for it.
    fn pays(&self) -> bool {
        let enough = self.0.images * self.0.area() >= MIN_PIXELS;
        self.0.in_blocks() && (enough || self.in_registers())
    }

    fn run(&self, y: &mut [f32], accumulate: bool, x: &[f32], weight: Values<'_>) {
        assert!(self.0.in_blocks() && x.len() >= self.0.images * self.0.c * self.0.area());
        assert!(weight.len() >= self.0.o * self.0.c * TAPS);
        let pictures = self.pictures(x);
        let weights = match weight {
            Values::F32(w) => self.weights(w),
            Values::Bf16(w) => self.weights(w),
        };
        let y = &mut y[..self.0.images * self.0.o * self.0.area()];
        if self.in_registers() {
            let images = y.chunks_mut(self.0.o * self.0.area());
            for (y, picture) in images.zip(pictures.chunks(self.picture())) {
                self.in_matrices(y, accumulate, picture, &weights);
            }
        } else {
            self.in_vectors(y, accumulate, &pictures, &weights);
        }
    }
}

impl Implicit {
    /// Whether matrix registers do it.
    fn in_registers(&self) -> bool {
        crate::matrix_registers() && self.0.o.is_multiple_of(CHANNELS)
    }

    /// Words of a row with its border.
    fn line(&self) -> usize {
        self.0.w + 2
    }

    /// Words of a plane with its border, and as many behind it as a task may read too far.
    fn plane(&self) -> usize {
        (self.0.h + 2) * self.line() + BLOCK + 2
    }

    /// Words of an image.
    fn picture(&self) -> usize {
        self.0.c / 2 * self.plane()
    }

    /// Sums per channel, those across the border included.
    fn sums(&self) -> usize {
        self.0.h * self.line()
    }

    /// Words of one output channel's weights.
    fn depth(&self) -> usize {
        self.0.c / BLOCK * WORDS
    }

    /// The pictures with their borders, in pairs of channels.
    fn pictures(&self, x: &[f32]) -> Vec<u32> {
        let (area, plane) = (self.0.area(), self.plane());
        in_parts(self.0.images * self.picture(), plane, |at, out| {
            let (first, second) = x[at / plane * 2 * area..][..2 * area].split_at(area);
            for row in 0..self.0.h {
                let line = row * self.0.w..(row + 1) * self.0.w;
                let start = (row + 1) * self.line() + 1;
                let out = &mut out[start..start + self.0.w];
                pairs(&first[line.clone()], &second[line], out);
            }
        })
    }

    /// The weights in bf16, `[output channel][block][tap][channel of the block]`.
    fn weights<T: Element<Bf16>>(&self, w: &[T]) -> Vec<u32> {
        let (c, o, depth) = (self.0.c, self.0.o, self.depth());
        in_parts(o * depth, SIDE * depth, |at, out: &mut [u32]| {
            let (first, channels) = (at / depth, out.len() / depth);
            if self.0.transposed {
                // Columns are the taps of one output channel after those of the other.
                let taps = self.0.taps(w, first, channels);
                let mut words = [[0; SIDE]; SIDE];
                for block in 0..c / BLOCK {
                    for column in (0..channels * TAPS).step_by(SIDE) {
                        taps.words_of::<Bf16>(column, block * SIDE, &mut words);
                        for (at, words) in (column..channels * TAPS).zip(&words) {
                            let (to, tap) = (at / TAPS, TAPS - 1 - at % TAPS);
                            let start = to * depth + block * WORDS + tap * SIDE;
                            out[start..start + SIDE].copy_from_slice(words);
                        }
                    }
                }
            } else {
                let mut words = [[0; SIDE]; SIDE];
                for (to, out) in out.chunks_exact_mut(depth).enumerate() {
                    let taps = self.0.taps(w, first + to, 1);
                    for (block, out) in out.chunks_exact_mut(WORDS).enumerate() {
                        taps.words_of::<Bf16>(0, block * SIDE, &mut words);
                        for (out, words) in out.chunks_exact_mut(SIDE).zip(&words) {
                            out.copy_from_slice(words);
                        }
                    }
                }
            }
        })
    }

    /// Where each tap reads, in words from the picture's corner.
    fn offsets(&self) -> [usize; TAPS] {
        std::array::from_fn(|tap| tap / 3 * self.line() + tap % 3)
    }

    /// The vectors of all images' sums.
    fn vectors(&self) -> Vec<Sixteen> {
        let mut vectors = Vec::new();
        for image in 0..self.0.images {
            let (picture, mut to) = (image * self.picture(), image * self.0.o * self.0.area());
            let mut add = |from: usize, inside: __mmask16| {
                let from = picture + from;
                vectors.push(Sixteen { from, to, inside });
                to += inside.count_ones() as usize;
            };
            if self.0.w.is_multiple_of(SIDE) {
                for row in 0..self.0.h {
                    let columns = (0..self.0.w).step_by(SIDE);
                    columns.for_each(|column| add(row * self.line() + column, !0));
                }
            } else {
                for from in (0..self.sums()).step_by(SIDE) {
                    let inside = |lane: usize| {
                        let at = from + lane;
                        at < self.sums() && at % self.line() < self.0.w
                    };
                    let lanes = (0..SIDE).filter(|lane| inside(*lane));
                    add(from, lanes.fold(0, |mask, lane| mask | 1 << lane));
                }
            }
        }
        vectors
    }

    /// All images, in vector registers.
    fn in_vectors(&self, y: &mut [f32], accumulate: bool, pictures: &[u32], weights: &[u32]) {
        let vectors = self.vectors();
        let offsets = self.offsets();
        let furthest = (self.0.c / 2 - 1) * self.plane() + offsets[TAPS - 1] + SIDE;
        for vector in &vectors {
            let written = (self.0.o - 1) * self.0.area() + vector.inside.count_ones() as usize;
            assert!(vector.to + written <= y.len());
            assert!(vector.from + furthest <= pictures.len());
        }
        assert!(weights.len() >= self.0.o * self.depth());
        let even = self.0.o.div_ceil(self.0.o.div_ceil(TASK_CHANNELS));
        let channels = even.next_multiple_of(TILE);
        let groups: Vec<_> = vectors.chunks(TASK_VECTORS).collect();
        let sums = Shared::new(y.as_mut_ptr());
        let task = |number: usize| {
            let (first, group) = (number / groups.len() * channels, number % groups.len());
            let last = (first + channels).min(self.0.o);
            for part in (0..self.0.c / BLOCK).step_by(PART) {
                for vectors in groups[group].chunks(VECTORS) {
                    for channel in (first..last).step_by(TILE) {
                        let tile = Tile {
                            blocks: PART.min(self.0.c / BLOCK - part),
                            pictures: pictures[part * SIDE * self.plane()..].as_ptr(),
                            plane: self.plane(),
                            offsets: &offsets,
                            weights: weights[channel * self.depth() + part * WORDS..].as_ptr(),
                            depth: self.depth(),
                            sums: sums.at(channel * self.0.area()),
                            area: self.0.area(),
                            add: accumulate || part > 0,
                        };
                        // SAFETY: the processor is able (`in_blocks`); the assertions above keep
                        // reads and writes of these channels and vectors inside, and no
                        // other task writes to them.
                        unsafe { tile.run(TILE.min(last - channel), vectors) };
                    }
                }
            }
        };
        let tasks = self.0.o.div_ceil(channels) * groups.len();
        if y.len() * self.0.c * TAPS < PARALLEL_PRODUCTS {
            (0..tasks).for_each(task);
        } else {
            (0..tasks).into_par_iter().with_max_len(1).for_each(task);
        }
    }

    /// One image, in matrix registers.
    fn in_matrices(&self, y: &mut [f32], accumulate: bool, picture: &[u32], weights: &[u32]) {
        let offsets = self.offsets().map(|offset| size_of::<u32>() * offset);
        let channels = y.par_chunks_mut(CHANNELS * self.0.area());
        channels.enumerate().for_each(|(chunk, y)| {
            let mut sums = vec![0f32; CHANNELS * self.sums().next_multiple_of(BLOCK)];
            let weights = &weights[chunk * CHANNELS * self.depth()..];
            self.sum_in_matrices(&mut sums, weights, picture, &offsets);
            let stride = sums.len() / CHANNELS;
            for (y, sums) in y.chunks_mut(self.0.area()).zip(sums.chunks(stride)) {
                let lines = y.chunks_mut(self.0.w).zip(sums.chunks(self.line()));
                for (y, sums) in lines {
                    match accumulate {
                        true => y.iter_mut().zip(sums).for_each(|(y, s)| *y += s),
                        false => y.copy_from_slice(&sums[..self.0.w]),
                    }
                }
            }
        });
    }

    /// All sums of 32 output channels.
    fn sum_in_matrices(
        &self,
        sums: &mut [f32],
        weights: &[u32],
        picture: &[u32],
        offsets: &[usize; TAPS],
    ) {
        let stride = sums.len() / CHANNELS;
        assert!(stride.is_multiple_of(BLOCK) && weights.len() >= CHANNELS * self.depth());
        assert!(picture.len() >= self.picture());
        let last = stride - BLOCK + offsets[TAPS - 1] / size_of::<u32>() + BLOCK;
        assert!(last <= self.plane(), "a tap reads beyond its plane");
        // SAFETY: `run` has looked for the registers, and nothing else here takes them. The
        // left operand has 32 rows of `depth` words, in steps of 16. The right one has 16
        // planes per block of channels, of which words up to `last` are read. The sums have 32
        // rows of `stride`, of which 32 from `column` on are written.
        unsafe {
            let mut registers = Registers::take();
            for column in (0..stride).step_by(BLOCK) {
                registers.multiply::<2, 2>(&amx::Tile {
                    a: weights.as_ptr().cast(),
                    a_stride: size_of::<u32>() * self.depth(),
                    b: picture.as_ptr().add(column),
                    b_stride: size_of::<u32>() * self.plane(),
                    offsets,
                    step: size_of::<u32>() * self.plane() * SIDE,
                    steps: self.0.c / BLOCK,
                    c: sums.as_mut_ptr().add(column),
                    c_stride: size_of::<f32>() * stride,
                    add: false,
                });
            }
        }
    }
}

/// Sums of a few output channels, in registers. Distances are in words.
struct Tile<'a> {
    blocks: usize,
    /// The first block's first plane.
    pictures: *const u32,
    plane: usize,
    offsets: &'a [usize; TAPS],
    /// The first channel's weights, from the first block on.
    weights: *const u32,
    depth: usize,
    /// The first channel of the output.
    sums: *mut f32,
    area: usize,
    add: bool,
}

impl Tile<'_> {
    /// # Safety
    /// AVX-512 with BW, VL, BF16 and VNNI. There are weights of that many channels and blocks; all
    /// vectors, moved by any tap, are inside the planes of these blocks; their sums are inside the
    /// output, and nothing else uses them.
    unsafe fn run(&self, channels: usize, vectors: &[Sixteen]) {
        // SAFETY: the caller's word.
        unsafe {
            match *vectors {
                [] => {}
                [a] => self.run_channels(channels, [a]),
                [a, b] => self.run_channels(channels, [a, b]),
                [a, b, c] => self.run_channels(channels, [a, b, c]),
                [a, b, c, d, ..] => self.run_channels(channels, [a, b, c, d]),
            }
        }
    }

    /// # Safety
    /// As for `run`.
    unsafe fn run_channels<const V: usize>(&self, channels: usize, vectors: [Sixteen; V]) {
        // SAFETY: the caller's word.
        unsafe {
            match channels {
                0 => {}
                1 => self.sum::<1, V>(vectors),
                2 => self.sum::<2, V>(vectors),
                3 => self.sum::<3, V>(vectors),
                4 => self.sum::<4, V>(vectors),
                5 => self.sum::<5, V>(vectors),
                _ => self.sum::<TILE, V>(vectors),
            }
        }
    }

    /// # Safety
    /// As for `run`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")]
    unsafe fn sum<const R: usize, const V: usize>(&self, vectors: [Sixteen; V]) {
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        // SAFETY: the caller's word.
        unsafe {
            let from = vectors.map(|vector| self.pictures.add(vector.from));
            for block in 0..self.blocks {
                for (tap, offset) in self.offsets.iter().enumerate() {
                    let weights = self.weights.add(block * WORDS + tap * SIDE);
                    let first = block * SIDE * self.plane + offset;
                    for pair in 0..SIDE {
                        let at = first + pair * self.plane;
                        let b = from.map(|from| _mm512_loadu_si512(from.add(at).cast()));
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let word = *weights.add(r * self.depth + pair);
                            let a = _mm512_set1_epi32(word.cast_signed());
                            for (sum, b) in sums.iter_mut().zip(b) {
                                *sum = Bf16::add_product(*sum, a, b);
                            }
                        }
                    }
                }
            }
            for (r, sums) in sums.into_iter().enumerate() {
                for (mut sum, vector) in sums.into_iter().zip(vectors) {
                    let to = self.sums.add(r * self.area + vector.to);
                    sum = _mm512_maskz_compress_ps(vector.inside, sum);
                    let inside = ((1u32 << vector.inside.count_ones()) - 1) as __mmask16;
                    if self.add {
                        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(inside, to));
                    }
                    _mm512_mask_storeu_ps(to, inside, sum);
                }
            }
        }
    }
}
