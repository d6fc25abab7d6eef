//! What the ways to compute a 3x3 convolution share.

use std::mem::MaybeUninit;

use crate::buffer::Start;
use crate::matrix::Values;
#[cfg(target_arch = "x86_64")]
use crate::{avx512::Operand, matrix::native_products};

pub(crate) const TAPS: usize = 9;
/// Channels of a block.
#[cfg(target_arch = "x86_64")]
const BLOCK: usize = 32;

/// A 3x3 convolution of stride and padding 1, or, transposed, its gradient to the input.
#[derive(Clone, Copy)]
pub(crate) struct Conv3x3 {
    pub(crate) images: usize,
    /// Channels read, and written.
    pub(crate) c: usize,
    pub(crate) o: usize,
    pub(crate) h: usize,
    pub(crate) w: usize,
    pub(crate) transposed: bool,
}

impl Conv3x3 {
    /// Pixels of a channel.
    pub(crate) fn area(&self) -> usize {
        self.h * self.w
    }
}

/// A way to compute it without a matrix of patches.
pub(crate) trait Way {
    fn conv(&self) -> &Conv3x3;

    /// Whether this is the faster way.
    fn pays(&self) -> bool;

    /// Writes the convolution of all images to `y`, or adds it with `accumulate`; `weight` is
    /// `[o, c, 3, 3]`, or `[c, o, 3, 3]` if transposed.
    fn run(&self, y: &mut [f32], accumulate: bool, x: &[f32], weight: Values<'_>);

    /// Writes all of `y`: `start`, whose rows are the planes of the output, and the convolution.
    fn run_new<'d>(
        &self,
        y: &'d mut [MaybeUninit<f32>],
        start: Start<'_>,
        x: &[f32],
        weight: Values<'_>,
    ) -> &'d mut [f32] {
        let y = start.written(y, self.conv().area());
        self.run(y, true, x, weight);
        y
    }
}

#[cfg(target_arch = "x86_64")]
impl Conv3x3 {
    /// Whether the channels read are whole blocks of 32, there is something to do, and there are
    /// instructions for it.
    pub(crate) fn in_blocks(&self) -> bool {
        let blocks = self.c > 0 && self.c.is_multiple_of(BLOCK);
        blocks && self.images * self.o * self.area() > 0 && native_products()
    }

    /// The taps of output channels from `first` on, channel of the input by channel of the input:
    /// of `outputs` of them, one after the other, if transposed, else of one.
    pub(crate) fn taps<'a, T>(&self, w: &'a [T], first: usize, outputs: usize) -> Operand<'a, T> {
        let (start, outer, inner_stride) = match self.transposed {
            true => (first, outputs * TAPS, self.o * TAPS),
            false => (first * self.c, TAPS, TAPS),
        };
        Operand {
            data: &w[start * TAPS..],
            outer,
            inner: self.c,
            outer_stride: 1,
            inner_stride,
        }
    }
}
