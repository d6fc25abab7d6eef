//! Convolution by matrix products over strips of output rows.
//!
//! Per image, group and strip the input patches are laid out as the columns of a
//! matrix `[c k, pixels]`; then forward is `W col`, the gradient to the input is
//! `W^T dy` folded back, and the gradient to the weight is `dy col^T`. A strip
//! keeps the patch matrix a few megabytes small whatever the image size. 1x1
//! convolutions skip the layout step.

use candle_core::{Result, Shape, Tensor};
use rayon::prelude::*;

use crate::added::{Added, conv2d_added, frozen};
use crate::buffer::{in_parts, maybe_with, with_both};
use crate::channels::{add_to_channels, plane_sums};
use crate::conv3x3::Conv3x3;
use crate::gradient::Gradient;
use crate::matrix::{Values, View, multiply_in, reads_narrow};
use crate::node::{Value, node};
use crate::winograd;
use crate::{Compute, as_nodes, composed, fast, plain};
#[cfg(target_arch = "x86_64")]
use crate::{
    avx512::{Bf16, F32},
    implicit::Implicit,
    winograd_avx512::{Four, Two, Winograd},
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

/// A way without a matrix of patches: writes the convolution of all images to the first argument,
/// or adds it if the second one is set; then come input and weights.
type Direct = Box<dyn Fn(&mut [f32], bool, &[f32], Values<'_>)>;

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

    /// Output rows per strip; depends on sizes only, so sums do not depend on threads.
    fn strip(&self) -> usize {
        (STRIP_VALUES / (self.patch() * self.ow).max(1)).clamp(1, self.oh.max(1))
    }

    /// Input position of tap `k` for output position `out`, if inside.
    fn source(&self, out: usize, k: usize, len: usize) -> Option<usize> {
        (out * self.p.stride + k * self.p.dilation)
            .checked_sub(self.p.padding)
            .filter(|&i| i < len)
    }

    /// Lays out the patches of output rows `rows` of one group: `[patch, rows * ow]`.
    fn unfold(&self, x: &[f32], rows: std::ops::Range<usize>, col: &mut [f32]) {
        let pixels = rows.len() * self.ow;
        let taps = self.kh * self.kw;
        each_chunk(col, pixels, |row, out| {
            let (channel, tap) = (row / taps, row % taps);
            let (ky, kx) = (tap / self.kw, tap % self.kw);
            let plane = &x[channel * self.h * self.w..][..self.h * self.w];
            for (line, oy) in out.chunks_mut(self.ow).zip(rows.clone()) {
                match self.source(oy, ky, self.h) {
                    Some(iy) => self.unfold_line(&plane[iy * self.w..][..self.w], kx, line),
                    None => line.fill(0.0),
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

    /// Adds patch gradients back onto the input of one group.
    fn fold(&self, col: &[f32], rows: std::ops::Range<usize>, dx: &mut [f32]) {
        let pixels = rows.len() * self.ow;
        let taps = self.kh * self.kw;
        each_chunk(dx, self.h * self.w, |channel, plane| {
            for tap in 0..taps {
                let (ky, kx) = (tap / self.kw, tap % self.kw);
                let patch = &col[(channel * taps + tap) * pixels..][..pixels];
                for (line, oy) in patch.chunks(self.ow).zip(rows.clone()) {
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

    /// Calls `body(image, group, output rows)` for every strip, in a fixed order.
    fn each_strip(&self, mut body: impl FnMut(usize, usize, std::ops::Range<usize>)) {
        for image in 0..self.n {
            for group in 0..self.p.groups {
                for start in (0..self.oh).step_by(self.strip()) {
                    body(image, group, start..(start + self.strip()).min(self.oh));
                }
            }
        }
    }

    /// Where one group of an image's input starts, and its length.
    fn input(&self, image: usize, group: usize) -> std::ops::Range<usize> {
        let len = self.cg() * self.h * self.w;
        let start = (image * self.p.groups + group) * len;
        start..start + len
    }

    /// Where a strip of one group of an image's output starts; rows of the strip
    /// as a matrix are `oh * ow` apart.
    fn output(&self, image: usize, group: usize, first_row: usize) -> usize {
        ((image * self.o) + group * self.og()) * self.oh * self.ow + first_row * self.ow
    }

    fn weight<'a>(&self, w: Values<'a>, group: usize) -> View<'a> {
        let len = self.og() * self.patch();
        View::rows(w.from(group * len), self.og(), self.patch(), self.patch())
    }

    /// The faster way for this convolution or its gradient to the input, if there is one.
    fn direct(&self, compute: Compute, transposed: bool) -> Option<Direct> {
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
        #[cfg(target_arch = "x86_64")]
        match compute {
            Compute::Bf16 => {
                let (winograd, implicit) = (Winograd::<Bf16, Two>::new(conv), Implicit(conv));
                if winograd.pays() {
                    return Some(Box::new(move |y, add, x, w| winograd.run(y, add, x, w)));
                }
                if implicit.pays() {
                    return Some(Box::new(move |y, add, x, w| implicit.run(y, add, x, w)));
                }
            }
            Compute::F32 => {
                let large = Winograd::<F32, Four>::new(conv);
                if large.pays() {
                    return Some(Box::new(move |y, add, x, w| large.run(y, add, x, w)));
                }
                let small = Winograd::<F32, Two>::new(conv);
                if small.pays() {
                    return Some(Box::new(move |y, add, x, w| small.run(y, add, x, w)));
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = compute;
        let winograd = winograd::Winograd(conv);
        if winograd.pays() {
            return Some(Box::new(move |y, add, x, w| winograd.run(y, add, x, w)));
        }
        None
    }

    /// Whether [`forward`](Self::forward), or with `transposed`
    /// [`input_gradient`](Self::input_gradient), takes weights of bf16 as they are.
    pub(crate) fn reads_narrow(&self, compute: Compute, transposed: bool) -> bool {
        reads_narrow(compute) || self.direct(compute, transposed).is_some()
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
        let plane = self.oh * self.ow;
        if let Some(direct) = self.direct(compute, false) {
            return direct(y, accumulate, x, w);
        }
        let mut col = Vec::new();
        self.each_strip(|image, group, rows| {
            let pixels = rows.len() * self.ow;
            let input = &x[self.input(image, group)];
            let out = &mut y[self.output(image, group, rows.start)..];
            let patches = if self.pointwise() {
                View::rows(&input[rows.start * self.ow..], self.cg(), pixels, plane)
            } else {
                col.resize(self.patch() * pixels, 0.0);
                self.unfold(input, rows, &mut col);
                View::rows(col.as_slice(), self.patch(), pixels, pixels)
            };
            let weight = self.weight(w, group);
            multiply_in(compute, out, plane, accumulate, weight, patches);
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
        let plane = self.oh * self.ow;
        if let Some(direct) = self.direct(compute, true) {
            return direct(dx, add, dy, w);
        }
        let mut col = Vec::new();
        self.each_strip(|image, group, rows| {
            let pixels = rows.len() * self.ow;
            let dy = View::rows(
                &dy[self.output(image, group, rows.start)..],
                self.og(),
                pixels,
                plane,
            );
            let target = &mut dx[self.input(image, group)];
            if self.pointwise() {
                multiply_in(
                    compute,
                    &mut target[rows.start * self.ow..],
                    plane,
                    add,
                    self.weight(w, group).t(),
                    dy,
                );
            } else {
                col.resize(self.patch() * pixels, 0.0);
                multiply_in(
                    compute,
                    &mut col,
                    pixels,
                    false,
                    self.weight(w, group).t(),
                    dy,
                );
                self.fold(&col, rows, target);
            }
        });
    }

    /// Adds the gradient to the weight to `dw`.
    fn weight_gradient(&self, compute: Compute, dw: &mut [f32], x: &[f32], dy: &[f32]) {
        let plane = self.oh * self.ow;
        let len = self.og() * self.patch();
        let mut col = Vec::new();
        self.each_strip(|image, group, rows| {
            let pixels = rows.len() * self.ow;
            let dy = View::rows(
                &dy[self.output(image, group, rows.start)..],
                self.og(),
                pixels,
                plane,
            );
            let input = &x[self.input(image, group)];
            let target = &mut dw[group * len..][..len];
            if self.pointwise() {
                let patches = View::rows(&input[rows.start * self.ow..], self.cg(), pixels, plane);
                multiply_in(compute, target, self.patch(), true, dy, patches.t());
            } else {
                col.resize(self.patch() * pixels, 0.0);
                self.unfold(input, rows, &mut col);
                multiply_in(
                    compute,
                    target,
                    self.patch(),
                    true,
                    dy,
                    View::rows(col.as_slice(), self.patch(), pixels, pixels).t(),
                );
            }
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
