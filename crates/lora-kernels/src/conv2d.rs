//! Convolution by matrix products over strips of output rows.
//!
//! Per group and strip the input patches are laid out as the columns of a matrix
//! `[c k, pixels]`; then forward is `W col`, the gradient to the input is `W^T dy` folded
//! back, and the gradient to the weight is `dy col^T`. A strip is some rows of an image, so
//! that the patch matrix stays a few megabytes small whatever the image size, or several
//! small images. 1x1 convolutions of one image skip the layout step.

use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::{Result, Shape, Tensor};
use rayon::prelude::*;

use crate::added::{Added, conv2d_added, frozen};
use crate::buffer::{Onto, Start, each_written, in_parts, maybe_with, with_both, written, zeros};
use crate::channels::{add_to_channels, plane_sums};
use crate::conv3x3::{Conv3x3, Way};
use crate::gradient::Gradient;
use crate::matrix::{Values, View, multiply_in, multiply_onto, reads_narrow};
use crate::node::{Value, node};
use crate::winograd;
use crate::{Compute, as_nodes, composed, fast, plain};
#[cfg(target_arch = "x86_64")]
use crate::{
    avx512::{Bf16, F32},
    implicit::Implicit,
    winograd_avx512::{Four, Two, Winograd},
    winograd_int16::Fixed,
};

/// Stride, padding (zeros, on all sides), dilation and groups of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv2dParams {
    /// Step between output pixels, in both directions.
    pub stride: usize,
    /// Zeros added on each side.
    pub padding: usize,
    /// Step between kernel taps.
    pub dilation: usize,
    /// Number of independent channel groups.
    pub groups: usize,
}

impl Default for Conv2dParams {
    fn default() -> Self {
        Self {
            stride: 1,
            padding: 0,
            dilation: 1,
            groups: 1,
        }
    }
}

/// Convolution of `x` `[n, i, h, w]` with `weight` `[o, i / groups, kh, kw]` and an
/// optional `bias` `[o]`; returns `[n, o, h', w']`.
///
/// # Errors
/// When the shapes do not fit.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    params: Conv2dParams,
) -> Result<Tensor> {
    if frozen(weight, bias) || weight.dtype() != x.dtype() {
        return conv2d_added(x, weight, bias, params, Compute::F32, &Added::default());
    }
    trained(x, weight, bias, params, Compute::F32)
}

/// [`conv2d`] of operands of one dtype.
pub(crate) fn trained(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    params: Conv2dParams,
    compute: Compute,
) -> Result<Tensor> {
    let operands: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    if !fast(&operands) {
        let y = match as_nodes() {
            true => composed::conv2d(x, weight, params)?,
            false => plain::conv2d(x, weight, None, params)?,
        };
        return match bias {
            Some(bias) => add_to_channels(&y, &bias.reshape((1, ()))?),
            None => Ok(y),
        };
    }
    let g = Geometry::new(x.shape(), weight.shape(), params)?;
    if bias.is_some_and(|b| b.dims() != [g.o]) {
        candle_core::bail!("conv2d: the bias does not fit weight {:?}", weight.shape());
    }
    let (input, w) = (x.detach().contiguous()?, weight.detach().contiguous()?);
    let plane = g.oh * g.ow;
    let mut y = maybe_with(bias, |bias| {
        in_parts(g.n * g.o * plane, plane, |first, y: &mut [f32]| {
            if let Some(bias) = bias {
                y.fill(bias[first / plane.max(1) % g.o]);
            }
        })
    })?;
    with_both(&input, &w, |x, w| {
        g.forward(compute, &mut y, bias.is_some(), x, w.into());
    })?;
    let wanted = [x, weight].map(Tensor::track_op);
    let to_bias = bias.is_some_and(Tensor::track_op);
    let backward = move |dy: &Tensor| {
        let dy = dy.contiguous()?;
        let mut all = Vec::from(gradients(params, &input, &w, &dy, compute, wanted)?);
        all.push(match to_bias {
            true => Some(plane_sums(&dy)?.sum(0)?.into()),
            false => None,
        });
        Ok(all)
    };
    let shape = (g.n, g.o, g.oh, g.ow);
    node(
        "conv2d",
        &operands,
        Value::cpu(y, shape),
        Box::new(backward),
    )
}

/// Most values of one patch matrix (8 MB).
const STRIP_VALUES: usize = 2 << 20;

/// Images with at most this many output pixels share a strip: a product with few columns wastes
/// vectors, and one with few pixels to sum over reads and writes the weight's gradient for little.
const SMALL_PLANE: usize = 256;

/// Output pixels of one group, whose patches are the columns of one matrix.
struct Strip {
    images: Range<usize>,
    group: usize,
    /// All of them where there are several images.
    rows: Range<usize>,
}

/// Sizes of one convolution.
#[derive(Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) n: usize,
    c: usize,
    h: usize,
    w: usize,
    pub(crate) o: usize,
    kh: usize,
    kw: usize,
    pub(crate) oh: usize,
    pub(crate) ow: usize,
    p: Conv2dParams,
}

impl Geometry {
    pub(crate) fn new(x: &Shape, weight: &Shape, p: Conv2dParams) -> Result<Self> {
        let (n, c, h, w) = x.dims4()?;
        let (o, ci, kh, kw) = weight.dims4()?;
        let size = |len: usize, k: usize| {
            let window = p.dilation * (k.max(1) - 1) + 1;
            (len + 2 * p.padding)
                .checked_sub(window)
                .map(|room| room / p.stride.max(1) + 1)
        };
        match (size(h, kh), size(w, kw)) {
            (Some(oh), Some(ow))
                if p.groups > 0 && p.stride > 0 && ci * p.groups == c && o % p.groups == 0 =>
            {
                Ok(Self {
                    n,
                    c,
                    h,
                    w,
                    o,
                    kh,
                    kw,
                    oh,
                    ow,
                    p,
                })
            }
            _ => {
                candle_core::bail!("conv2d: input {x:?} does not fit weight {weight:?} with {p:?}")
            }
        }
    }

    /// Input channels per group.
    fn cg(&self) -> usize {
        self.c / self.p.groups
    }

    /// Output channels per group.
    fn og(&self) -> usize {
        self.o / self.p.groups
    }

    /// Rows of the patch matrix.
    fn patch(&self) -> usize {
        self.cg() * self.kh * self.kw
    }

    /// A 1x1 convolution reads its input as it is.
    fn pointwise(&self) -> bool {
        (self.kh, self.kw, self.p.stride, self.p.padding) == (1, 1, 1, 0)
    }

    /// Whether a product for each image is all there is to do.
    fn product_per_image(&self) -> bool {
        let large = self.n == 1 || self.plane() > SMALL_PLANE;
        self.pointwise() && self.p.groups == 1 && large
    }

    /// Output pixels of a channel.
    fn plane(&self) -> usize {
        self.oh * self.ow
    }

    /// Images and output rows per strip; they depend on sizes only, so sums do not depend on
    /// threads.
    fn strip(&self) -> (usize, usize) {
        let rows = STRIP_VALUES / (self.patch() * self.ow).max(1);
        let images = match self.p.groups == 1 && self.plane() <= SMALL_PLANE {
            true => rows / self.oh.max(1),
            false => 1,
        };
        (
            images.clamp(1, self.n.max(1)),
            rows.clamp(1, self.oh.max(1)),
        )
    }

    /// Input position of tap `k` for output position `out`, if inside.
    fn source(&self, out: usize, k: usize, len: usize) -> Option<usize> {
        (out * self.p.stride + k * self.p.dilation)
            .checked_sub(self.p.padding)
            .filter(|&i| i < len)
    }

    /// Lays out a strip's patches: `[patch, pixels]`.
    fn unfold(&self, x: &[f32], strip: &Strip, col: &mut [f32]) {
        let (taps, area) = (self.kh * self.kw, self.h * self.w);
        let pixels = strip.rows.len() * self.ow;
        each_chunk(col, strip.images.len() * pixels, |row, out| {
            let (channel, tap) = (row / taps, row % taps);
            let (ky, kx) = (tap / self.kw, tap % self.kw);
            for (image, out) in strip.images.clone().zip(out.chunks_mut(pixels)) {
                let plane = &x[self.input(image, strip.group) + channel * area..][..area];
                for (line, oy) in out.chunks_mut(self.ow).zip(strip.rows.clone()) {
                    match self.source(oy, ky, self.h) {
                        Some(iy) => self.unfold_line(&plane[iy * self.w..][..self.w], kx, line),
                        None => line.fill(0.0),
                    }
                }
            }
        });
    }

    fn unfold_line(&self, input: &[f32], kx: usize, line: &mut [f32]) {
        if self.p.stride == 1 {
            // Inside the border the line is a shifted copy.
            let shift = kx * self.p.dilation;
            let first = self.p.padding.saturating_sub(shift).min(line.len());
            let last = (self.w + self.p.padding)
                .saturating_sub(shift)
                .clamp(first, line.len());
            line[..first].fill(0.0);
            line[last..].fill(0.0);
            let from = first + shift - self.p.padding.min(first + shift);
            line[first..last].copy_from_slice(&input[from..from + (last - first)]);
        } else {
            for (ox, value) in line.iter_mut().enumerate() {
                *value = self.source(ox, kx, self.w).map_or(0.0, |ix| input[ix]);
            }
        }
    }

    /// Adds patch gradients of a strip back onto the input.
    fn fold(&self, col: &[f32], strip: &Strip, dx: &mut [f32]) {
        let (taps, area) = (self.kh * self.kw, self.h * self.w);
        let pixels = strip.rows.len() * self.ow;
        let images = strip.images.len();
        // Of several groups there is one image only, so these planes lie one after the other.
        let start = self.input(strip.images.start, strip.group);
        let planes = &mut dx[start..][..images * self.cg() * area];
        each_chunk(planes, area, |number, plane| {
            let (image, channel) = (number / self.cg(), number % self.cg());
            for tap in 0..taps {
                let (ky, kx) = (tap / self.kw, tap % self.kw);
                let row = (channel * taps + tap) * images + image;
                let patch = &col[row * pixels..][..pixels];
                for (line, oy) in patch.chunks(self.ow).zip(strip.rows.clone()) {
                    let Some(iy) = self.source(oy, ky, self.h) else {
                        continue;
                    };
                    let target = &mut plane[iy * self.w..][..self.w];
                    for (ox, value) in line.iter().enumerate() {
                        if let Some(ix) = self.source(ox, kx, self.w) {
                            target[ix] += value;
                        }
                    }
                }
            }
        });
    }

    /// Calls `body` for every strip, in a fixed order.
    fn each_strip(&self, mut body: impl FnMut(&Strip)) {
        let (images, rows) = self.strip();
        for image in (0..self.n).step_by(images) {
            for group in 0..self.p.groups {
                for row in (0..self.oh).step_by(rows) {
                    body(&Strip {
                        images: image..(image + images).min(self.n),
                        group,
                        rows: row..(row + rows).min(self.oh),
                    });
                }
            }
        }
    }

    /// Columns of a strip's matrix.
    fn pixels(&self, strip: &Strip) -> usize {
        strip.images.len() * strip.rows.len() * self.ow
    }

    /// Where one group of an image's input starts.
    fn input(&self, image: usize, group: usize) -> usize {
        (image * self.c + group * self.cg()) * self.h * self.w
    }

    /// Where a strip's output starts in its first image; the rows of that part of the output as
    /// a matrix are a plane apart.
    fn output(&self, strip: &Strip) -> usize {
        let channel = strip.images.start * self.o + strip.group * self.og();
        channel * self.plane() + strip.rows.start * self.ow
    }

    /// Where the pixels of each output channel and image of a strip of several images lie, in
    /// the order that they have in the strip's matrix.
    fn planes(&self, strip: &Strip) -> impl Iterator<Item = Range<usize>> {
        let (o, plane, images) = (self.o, self.plane(), strip.images.clone());
        (0..o).flat_map(move |channel| {
            let starts = images
                .clone()
                .map(move |image| (image * o + channel) * plane);
            starts.map(move |start| start..start + plane)
        })
    }

    /// A strip's patches `[patch, pixels]`, where they lie or in `buffer`.
    fn patches<'a>(&self, x: &'a [f32], strip: &Strip, buffer: &'a mut Vec<f32>) -> View<'a> {
        let pixels = self.pixels(strip);
        if self.pointwise() && strip.images.len() == 1 {
            let start = self.input(strip.images.start, strip.group) + strip.rows.start * self.ow;
            return View::rows(&x[start..], self.cg(), pixels, self.plane());
        }
        buffer.resize(self.patch() * pixels, 0.0);
        self.unfold(x, strip, buffer);
        View::rows(buffer.as_slice(), self.patch(), pixels, pixels)
    }

    /// A strip's gradients `[o, pixels]`, where they lie or in `buffer`.
    fn gradients<'a>(&self, dy: &'a [f32], strip: &Strip, buffer: &'a mut Vec<f32>) -> View<'a> {
        let pixels = self.pixels(strip);
        if strip.images.len() == 1 {
            return View::rows(&dy[self.output(strip)..], self.og(), pixels, self.plane());
        }
        buffer.clear();
        self.planes(strip)
            .for_each(|plane| buffer.extend_from_slice(&dy[plane]));
        View::rows(buffer.as_slice(), self.o, pixels, pixels)
    }

    fn weight<'a>(&self, w: Values<'a>, group: usize) -> View<'a> {
        let len = self.og() * self.patch();
        View::rows(w.from(group * len), self.og(), self.patch(), self.patch())
    }

    /// The faster way for this convolution or its gradient to the input, if there is one.
    fn direct(&self, compute: Compute, transposed: bool) -> Option<Box<dyn Way>> {
        let shape = (self.kh, self.kw, self.p.stride, self.p.padding);
        if shape != (3, 3, 1, 1) || self.p.dilation != 1 || self.p.groups != 1 {
            return None;
        }
        let (c, o) = match transposed {
            true => (self.o, self.c),
            false => (self.c, self.o),
        };
        let conv = Conv3x3 {
            images: self.n,
            c,
            o,
            h: self.h,
            w: self.w,
            transposed,
        };
        let mut ways: Vec<Box<dyn Way>> = Vec::new();
        #[cfg(target_arch = "x86_64")]
        match compute {
            Compute::Bf16 => {
                ways.push(Box::new(Fixed::new(conv)));
                ways.push(Box::new(Winograd::<Bf16, Two>::new(conv)));
                ways.push(Box::new(Implicit(conv)));
            }
            Compute::F32 => {
                ways.push(Box::new(Winograd::<F32, Four>::new(conv)));
                ways.push(Box::new(Winograd::<F32, Two>::new(conv)));
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = compute;
        ways.push(Box::new(winograd::Winograd(conv)));
        ways.into_iter().find(|way| way.pays())
    }

    /// Whether [`forward`](Self::forward), or with `transposed`
    /// [`input_gradient`](Self::input_gradient), takes weights of bf16 as they are.
    pub(crate) fn reads_narrow(&self, compute: Compute, transposed: bool) -> bool {
        reads_narrow(compute) || self.direct(compute, transposed).is_some()
    }

    /// Writes `start`, whose rows are the output's planes, the convolution, and products `up middle`
    /// to all of `y`; `low_rank` has `middle` `[n, r, h', w']`, `up` `[o, r]`, and `r`.
    pub(crate) fn forward_new<'p, 'd>(
        &self,
        compute: Compute,
        y: &'d mut [MaybeUninit<f32>],
        start: Start<'_>,
        x: &[f32],
        w: Values<'_>,
        low_rank: &[(&'p [f32], &'p [f32], usize)],
    ) -> &'d mut [f32] {
        let plane = self.plane();
        let pair = |(m, u, r): &(&'p [f32], &'p [f32], usize), image: usize| {
            let m = View::rows(&m[image * r * plane..], *r, plane, plane);
            (View::rows(*u, self.o, *r, *r), m)
        };
        if self.product_per_image() {
            return each_written(y, self.o * plane, |image, y| {
                let x = View::rows(&x[self.input(image, 0)..], self.c, plane, plane);
                let start = start.of_rows(image * self.o, self.o, plane);
                let more: Vec<_> = low_rank.iter().map(|m| pair(m, image)).collect();
                let onto = Onto::New(y, start);
                multiply_onto(compute, onto, (self.weight(w, 0), x), &more, &mut [])
            });
        }
        let y = match self.direct(compute, false) {
            Some(direct) => direct.run_new(y, start, x, w),
            None => {
                let y = start.written(y, plane);
                self.forward(compute, y, true, x, w);
                y
            }
        };
        for (image, y) in y.chunks_mut((self.o * plane).max(1)).enumerate() {
            for (up, middle) in low_rank.iter().map(|m| pair(m, image)) {
                multiply_in(compute, y, plane, true, up, middle);
            }
        }
        y
    }

    /// Writes the convolution to `y`, or adds it with `accumulate`.
    pub(crate) fn forward(
        &self,
        compute: Compute,
        y: &mut [f32],
        accumulate: bool,
        x: &[f32],
        w: Values<'_>,
    ) {
        if let Some(direct) = self.direct(compute, false) {
            return direct.run(y, accumulate, x, w);
        }
        let (mut col, mut sums) = (Vec::new(), Vec::new());
        self.each_strip(|strip| {
            let patches = self.patches(x, strip, &mut col);
            let weight = self.weight(w, strip.group);
            if strip.images.len() == 1 {
                let y = &mut y[self.output(strip)..];
                return multiply_in(compute, y, self.plane(), accumulate, weight, patches);
            }
            let pixels = self.pixels(strip);
            sums.resize(self.o * pixels, 0.0);
            multiply_in(compute, &mut sums, pixels, false, weight, patches);
            for (plane, sums) in self.planes(strip).zip(sums.chunks(self.plane())) {
                let y = &mut y[plane];
                match accumulate {
                    true => y.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum),
                    false => y.copy_from_slice(sums),
                }
            }
        });
    }

    /// Adds the gradient to the input to `dx`, which is all zeros unless `add` is set.
    pub(crate) fn input_gradient(
        &self,
        compute: Compute,
        dx: &mut [f32],
        add: bool,
        w: Values<'_>,
        dy: &[f32],
    ) {
        if let Some(direct) = self.direct(compute, true) {
            return direct.run(dx, add, dy, w);
        }
        let (mut col, mut buffer) = (Vec::new(), Vec::new());
        self.each_strip(|strip| {
            let dy = self.gradients(dy, strip, &mut buffer);
            let weight = self.weight(w, strip.group).t();
            if self.pointwise() && strip.images.len() == 1 {
                let start = self.input(strip.images.start, strip.group);
                let dx = &mut dx[start + strip.rows.start * self.ow..];
                return multiply_in(compute, dx, self.plane(), add, weight, dy);
            }
            let pixels = self.pixels(strip);
            col.resize(self.patch() * pixels, 0.0);
            multiply_in(compute, &mut col, pixels, false, weight, dy);
            self.fold(&col, strip, dx);
        });
    }

    /// The gradient to the input.
    pub(crate) fn new_input_gradient(
        &self,
        compute: Compute,
        w: Values<'_>,
        dy: &[f32],
    ) -> Vec<f32> {
        let (start, area) = (Start::default(), self.h * self.w);
        let n = self.n * self.c * area;
        if let Some(direct) = self.direct(compute, true) {
            return written(n, |dx| direct.run_new(dx, start, dy, w));
        }
        if self.product_per_image() {
            return written(n, |dx| {
                each_written(dx, self.c * area, |image, dx| {
                    let dy = View::rows(&dy[image * self.o * area..], self.o, area, area);
                    let onto = Onto::New(dx, start);
                    multiply_onto(compute, onto, (self.weight(w, 0).t(), dy), &[], &mut [])
                })
            });
        }
        let mut dx = zeros(n);
        self.input_gradient(compute, &mut dx, false, w, dy);
        dx
    }

    /// Adds the gradient to the weight to `dw`.
    fn weight_gradient(&self, compute: Compute, dw: &mut [f32], x: &[f32], dy: &[f32]) {
        let len = self.og() * self.patch();
        let (mut col, mut buffer) = (Vec::new(), Vec::new());
        self.each_strip(|strip| {
            let patches = self.patches(x, strip, &mut col);
            let dy = self.gradients(dy, strip, &mut buffer);
            let dw = &mut dw[strip.group * len..][..len];
            multiply_in(compute, dw, self.patch(), true, dy, patches.t());
        });
    }
}

/// Calls `body(number, chunk)` for each chunk, on several threads when there is enough
/// to do. Chunks are independent, so the result is the same.
fn each_chunk(data: &mut [f32], size: usize, body: impl Fn(usize, &mut [f32]) + Sync) {
    const PARALLEL_VALUES: usize = 1 << 17;
    if data.len() < PARALLEL_VALUES {
        data.chunks_mut(size)
            .enumerate()
            .for_each(|(i, chunk)| body(i, chunk));
    } else {
        data.par_chunks_mut(size)
            .enumerate()
            .for_each(|(i, chunk)| body(i, chunk));
    }
}

/// The gradients to x and weight that are wanted; all contiguous.
pub(crate) fn gradients(
    params: Conv2dParams,
    x: &Tensor,
    w: &Tensor,
    dy: &Tensor,
    compute: Compute,
    wanted: [bool; 2],
) -> Result<[Option<Gradient>; 2]> {
    let g = Geometry::new(x.shape(), w.shape(), params)?;
    let to_x = wanted[0].then(|| {
        let (dy, w) = (dy.clone(), w.clone());
        Gradient::values(move |dx, add| {
            with_both(&dy, &w, |dy, w| {
                g.input_gradient(compute, dx, add, w.into(), dy)
            })
        })
    });
    let to_w = wanted[1].then(|| {
        let (dy, x) = (dy.clone(), x.clone());
        Gradient::values(move |dw, _| {
            with_both(&x, &dy, |x, dy| g.weight_gradient(compute, dw, x, dy))
        })
    });
    Ok([to_x, to_w])
}
