//! 3x3 convolutions of bf16 in matrix registers, without a matrix of patches.
//!
//! The picture is laid out once with a border of zeros, two channels of a pixel to a word,
//! `[pair][row][column]`. Sixteen pixels of a row, sixteen pairs deep, are then a right
//! operand as it lies, and so are the same pixels moved by a tap. Sums run over blocks of 32
//! channels, and in a block over the nine taps, while its pixels are in the first-level cache.
//!
//! Rows are multiplied with their border: what is summed across the border is dropped when
//! the sums are written out.

use half::bf16;
use rayon::prelude::*;

use crate::amx::{Registers, SIDE, Tile};
use crate::avx512::pairs;
use crate::matrix::Values;

const TAPS: usize = 9;
/// Channels of a block.
const BLOCK: usize = 2 * SIDE;
/// Output channels per task.
const CHANNELS: usize = 2 * SIDE;

/// A convolution of stride and padding 1, or, transposed, its gradient to the input.
pub(crate) struct Implicit {
    /// Channels read, and written.
    pub(crate) c: usize,
    pub(crate) o: usize,
    pub(crate) h: usize,
    pub(crate) w: usize,
    pub(crate) transposed: bool,
}

impl Implicit {
    /// Whether the channels are whole blocks, and enough of them, and there are such registers.
    pub(crate) fn fits(&self) -> bool {
        let blocks = |n: usize| n > 0 && n.is_multiple_of(BLOCK);
        crate::matrix_registers() && blocks(self.c) && blocks(self.o) && self.h * self.w > 0
    }

    /// Words of a row with its border.
    fn line(&self) -> usize {
        self.w + 2
    }

    /// Words of a plane with its border, and as many behind it as a task may read too far.
    fn plane(&self) -> usize {
        (self.h + 2) * self.line() + BLOCK + 2
    }

    /// Sums per channel, those across the border included.
    fn sums(&self) -> usize {
        self.h * self.line()
    }

    /// Writes the convolution of one image to `y`, or adds it with `accumulate`; `weight` is
    /// `[o, c, 3, 3]`, or `[c, o, 3, 3]` if transposed.
    pub(crate) fn run(&self, y: &mut [f32], accumulate: bool, x: &[f32], weight: Values<'_>) {
        assert!(self.fits() && x.len() >= self.c * self.h * self.w);
        assert!(weight.len() >= self.o * self.c * TAPS);
        let picture = self.picture(x);
        let weights = match weight {
            Values::F32(w) => self.weights(w, bf16::from_f32),
            Values::Bf16(w) => self.weights(w, |w| w),
        };
        let offsets = self.offsets();
        let area = self.h * self.w;
        let channels = y[..self.o * area].par_chunks_mut(CHANNELS * area);
        channels.enumerate().for_each(|(chunk, y)| {
            let mut sums = vec![0f32; CHANNELS * self.sums().next_multiple_of(BLOCK)];
            let weights = &weights[chunk * CHANNELS * self.depth()..];
            self.sum(&mut sums, weights, &picture, &offsets);
            let stride = sums.len() / CHANNELS;
            for (y, sums) in y.chunks_mut(area).zip(sums.chunks(stride)) {
                let lines = y.chunks_mut(self.w).zip(sums.chunks(self.line()));
                for (y, sums) in lines {
                    match accumulate {
                        true => y.iter_mut().zip(sums).for_each(|(y, s)| *y += s),
                        false => y.copy_from_slice(&sums[..self.w]),
                    }
                }
            }
        });
    }

    /// Values of one output channel's weights.
    fn depth(&self) -> usize {
        self.c * TAPS
    }

    /// The picture with its border, in pairs of channels.
    fn picture(&self, x: &[f32]) -> Vec<u32> {
        let mut picture = vec![0u32; self.c / 2 * self.plane()];
        let area = self.h * self.w;
        let planes = picture.par_chunks_mut(self.plane());
        planes.zip(x.par_chunks(2 * area)).for_each(|(out, x)| {
            let (first, second) = x.split_at(area);
            for row in 0..self.h {
                let line = row * self.w..(row + 1) * self.w;
                let start = (row + 1) * self.line() + 1;
                let out = &mut out[start..start + self.w];
                pairs(&first[line.clone()], &second[line], out);
            }
        });
        picture
    }

    /// The weights in bf16, `[output channel][block][tap][channel of the block]`.
    fn weights<T: Copy + Sync>(&self, w: &[T], narrow: impl Fn(T) -> bf16 + Sync) -> Vec<bf16> {
        let mut weights = vec![bf16::ZERO; self.o * self.depth()];
        let (c, o) = (self.c, self.o);
        let rows = weights.par_chunks_mut(self.depth()).enumerate();
        rows.for_each(|(to, row)| {
            for (block, out) in row.chunks_exact_mut(BLOCK * TAPS).enumerate() {
                for i in 0..BLOCK {
                    let from = block * BLOCK + i;
                    let start = match self.transposed {
                        true => (from * o + to) * TAPS,
                        false => (to * c + from) * TAPS,
                    };
                    for (tap, w) in w[start..start + TAPS].iter().enumerate() {
                        let tap = match self.transposed {
                            true => TAPS - 1 - tap,
                            false => tap,
                        };
                        out[tap * BLOCK + i] = narrow(*w);
                    }
                }
            }
        });
        weights
    }

    /// Where each tap reads, in bytes from the picture's corner.
    fn offsets(&self) -> [usize; TAPS] {
        std::array::from_fn(|tap| size_of::<u32>() * (tap / 3 * self.line() + tap % 3))
    }

    /// All sums of 32 output channels.
    fn sum(&self, sums: &mut [f32], weights: &[bf16], picture: &[u32], offsets: &[usize; TAPS]) {
        let stride = sums.len() / CHANNELS;
        assert!(stride.is_multiple_of(BLOCK) && weights.len() >= CHANNELS * self.depth());
        assert!(picture.len() >= self.c / 2 * self.plane());
        let last = stride - BLOCK + offsets[TAPS - 1] / size_of::<u32>() + BLOCK;
        assert!(last <= self.plane(), "a tap reads beyond its plane");
        // SAFETY: `fits` has looked for the registers, and nothing else here takes them. The
        // left operand has 32 rows of `depth` values, in steps of 32. The right one has 16
        // planes per block of channels, of which words up to `last` are read. The sums have 32
        // rows of `stride`, of which 32 from `column` on are written.
        unsafe {
            let mut registers = Registers::take();
            for column in (0..stride).step_by(BLOCK) {
                registers.multiply::<2, 2>(&Tile {
                    a: weights.as_ptr().cast(),
                    a_stride: size_of::<bf16>() * self.depth(),
                    b: picture.as_ptr().add(column),
                    b_stride: size_of::<u32>() * self.plane(),
                    offsets,
                    step: size_of::<u32>() * self.plane() * SIDE,
                    steps: self.c / BLOCK,
                    c: sums.as_mut_ptr().add(column),
                    c_stride: size_of::<f32>() * stride,
                    add: false,
                });
            }
        }
    }
}
