//! Strided matrix views and their product: the safe face of the matrix kernels.

use std::borrow::Cow;

use gemm::Parallelism;
use half::bf16;
use rayon::prelude::*;

use crate::Compute;
use crate::buffer::Onto;
#[cfg(target_arch = "x86_64")]
use crate::{Path, avx512, path};

/// A right operand of f32 with at most this many columns, whose rows are this far apart, is
/// read where it lies.
pub(crate) const PANEL: usize = 64;

/// Products with fewer multiplications run on the calling thread.
pub(crate) const PARALLEL_PRODUCTS: usize = 1 << 20;

/// The values of an operand, as they are stored.
#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> From<&'a [f32]> for Values<'a> {
    fn from(values: &'a [f32]) -> Self {
        Values::F32(values)
    }
}

impl<'a> From<&'a [bf16]> for Values<'a> {
    fn from(values: &'a [bf16]) -> Self {
        Values::Bf16(values)
    }
}

impl<'a> Values<'a> {
    pub(crate) fn len(self) -> usize {
        match self {
            Values::F32(v) => v.len(),
            Values::Bf16(v) => v.len(),
        }
    }

    /// The values from `start` on.
    pub(crate) fn from(self, start: usize) -> Self {
        match self {
            Values::F32(v) => Values::F32(&v[start..]),
            Values::Bf16(v) => Values::Bf16(&v[start..]),
        }
    }

    fn wide(self) -> Cow<'a, [f32]> {
        match self {
            Values::F32(v) => Cow::Borrowed(v),
            Values::Bf16(v) => Cow::Owned(v.iter().map(|v| v.to_f32()).collect()),
        }
    }

    fn rounded(self, at: usize) -> f32 {
        match self {
            Values::F32(v) => bf16::from_f32(v[at]).to_f32(),
            Values::Bf16(v) => v[at].to_f32(),
        }
    }
}

/// A read-only matrix inside a slice: element `(i, j)` lies at `i * rows + j * cols`; one of
/// the strides is 1.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    data: Values<'a>,
    height: usize,
    width: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// `height` rows of `width` values, each row `stride` after the one before.
    pub(crate) fn rows(
        data: impl Into<Values<'a>>,
        height: usize,
        width: usize,
        stride: usize,
    ) -> Self {
        let data = data.into();
        let view = View {
            data,
            height,
            width,
            row_stride: stride,
            col_stride: 1,
        };
        assert!(view.extent() <= data.len(), "matrix view exceeds its slice");
        view
    }

    /// The transposed matrix over the same values.
    pub(crate) fn t(self) -> Self {
        View {
            height: self.width,
            width: self.height,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    fn extent(&self) -> usize {
        extent(self.height, self.width, self.row_stride, self.col_stride)
    }

    /// The values rounded to bf16, in f32; they and the view over them lie apart.
    fn rounded(self) -> (Vec<f32>, impl Fn(&'_ [f32]) -> View<'_>) {
        let rows = self.col_stride == 1;
        let (outer, inner, stride) = match rows {
            true => (self.height, self.width, self.row_stride),
            false => (self.width, self.height, self.col_stride),
        };
        let mut values = vec![0f32; outer * inner];
        let lines = values.par_chunks_mut(inner.max(1)).enumerate();
        lines.for_each(|(o, line)| {
            for (i, value) in line.iter_mut().enumerate() {
                *value = self.data.rounded(o * stride + i);
            }
        });
        (values, move |values| {
            let view = View::rows(values, outer, inner, inner);
            if rows { view } else { view.t() }
        })
    }
}

fn extent(height: usize, width: usize, row_stride: usize, col_stride: usize) -> usize {
    if height == 0 || width == 0 {
        0
    } else {
        (height - 1) * row_stride + (width - 1) * col_stride + 1
    }
}

/// `dst = a b`, or `dst += a b` with `accumulate`; `dst` is `a.height` rows of
/// `b.width` values, each row `dst_stride` after the one before. Large products use
/// several threads.
///
/// The order of the sums depends on the sizes only, not on the number of threads.
pub(crate) fn multiply(
    dst: &mut [f32],
    dst_stride: usize,
    accumulate: bool,
    a: View<'_>,
    b: View<'_>,
) {
    multiply_in(Compute::F32, dst, dst_stride, accumulate, a, b);
}

/// The same; under [`Compute::Bf16`] both operands are rounded to bf16 first.
pub(crate) fn multiply_in(
    compute: Compute,
    dst: &mut [f32],
    dst_stride: usize,
    accumulate: bool,
    a: View<'_>,
    b: View<'_>,
) {
    // Waking other threads costs more than a small product.
    let parallel = a.height * a.width * b.width >= PARALLEL_PRODUCTS;
    dispatch(compute, dst, dst_stride, accumulate, a, b, parallel);
}

/// `onto = a b`, with `more` products of f32 operands and `chains`, all of it: `a.height` rows of `b.width`
/// values. Under [`Compute::Bf16`] all operands are rounded to bf16 first.
pub(crate) fn multiply_onto<'d>(
    compute: Compute,
    onto: Onto<'d, '_>,
    (a, b): (View<'_>, View<'_>),
    more: &[(View<'_>, View<'_>)],
    chains: &mut [Chain<'_, '_>],
) -> &'d mut [f32] {
    #[cfg(target_arch = "x86_64")]
    if native_products() {
        let parallel = a.height * a.width * b.width >= PARALLEL_PRODUCTS;
        return match compute {
            Compute::F32 => native_onto::<avx512::F32>(onto, (a, b), more, chains, parallel),
            Compute::Bf16 => native_onto::<avx512::Bf16>(onto, (a, b), more, chains, parallel),
        };
    }
    let dst = onto.begun(b.width);
    for (a, b) in std::iter::once(&(a, b)).chain(more) {
        multiply_in(compute, dst, b.width, true, *a, *b);
    }
    for Chain { p, q, middle } in chains {
        multiply_in(compute, middle, p.width, false, a, *p);
        let middle = View::rows(&**middle, a.height, p.width, p.width);
        multiply_in(compute, dst, b.width, true, middle, *q);
    }
    dst
}

/// A product `a p q` of f32 operands that is added to a product `a b`, and where `a p` is left.
pub(crate) struct Chain<'a, 'm> {
    pub(crate) p: View<'a>,
    pub(crate) q: View<'a>,
    /// As many rows as `a` has, of as many values as `p` has columns.
    pub(crate) middle: &'m mut [f32],
}

/// [`multiply_in`] on the calling thread, for callers that divide the work themselves.
pub(crate) fn multiply_here(
    compute: Compute,
    dst: &mut [f32],
    dst_stride: usize,
    accumulate: bool,
    a: View<'_>,
    b: View<'_>,
) {
    dispatch(compute, dst, dst_stride, accumulate, a, b, false);
}

/// Whether products run on the kernels here; else on those of the gemm crate.
pub(crate) fn native_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    return matches!(path(), Path::Native | Path::Vectors) && avx512::available();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether operands of bf16 need no widening before a product; elsewhere each product widens
/// them for itself.
pub(crate) fn reads_narrow(compute: Compute) -> bool {
    compute == Compute::Bf16 || native_products()
}

fn dispatch(
    compute: Compute,
    dst: &mut [f32],
    stride: usize,
    accumulate: bool,
    a: View<'_>,
    b: View<'_>,
    parallel: bool,
) {
    #[cfg(target_arch = "x86_64")]
    if native_products() {
        return match compute {
            Compute::F32 => native::<avx512::F32>(dst, stride, accumulate, a, b, parallel),
            Compute::Bf16 => native::<avx512::Bf16>(dst, stride, accumulate, a, b, parallel),
        };
    }
    let parallelism = match parallel {
        true => Parallelism::Rayon(0),
        false => Parallelism::None,
    };
    match compute {
        Compute::F32 => product(dst, stride, accumulate, a, b, parallelism),
        Compute::Bf16 => {
            let ((a, view_a), (b, view_b)) = (a.rounded(), b.rounded());
            product(dst, stride, accumulate, view_a(&a), view_b(&b), parallelism);
        }
    }
}

/// A view as the left operand over `data`, its values.
#[cfg(target_arch = "x86_64")]
fn left<'a, T>(data: &'a [T], a: View<'_>) -> avx512::Operand<'a, T> {
    avx512::Operand {
        data,
        outer: a.height,
        inner: a.width,
        outer_stride: a.row_stride,
        inner_stride: a.col_stride,
    }
}

/// A view as the right operand.
#[cfg(target_arch = "x86_64")]
fn right<'a, T>(data: &'a [T], b: View<'_>) -> avx512::Operand<'a, T> {
    left(data, b.t())
}

/// # Panics
/// When an operand of `more` or `chains` is not f32.
#[cfg(target_arch = "x86_64")]
fn native_onto<'d, S: avx512::Arithmetic>(
    onto: Onto<'d, '_>,
    (a, b): (View<'_>, View<'_>),
    more: &[(View<'_>, View<'_>)],
    chains: &mut [Chain<'_, '_>],
    parallel: bool,
) -> &'d mut [f32]
where
    f32: avx512::Element<S>,
    bf16: avx512::Element<S>,
{
    use avx512::multiply_onto;
    fn wide<'a>(view: View<'a>) -> &'a [f32] {
        match view.data {
            Values::F32(values) => values,
            Values::Bf16(_) => panic!("products that are added have operands of f32"),
        }
    }
    let more = more.iter();
    let more: Vec<_> = more
        .map(|(a, b)| (left(wide(*a), *a), right(wide(*b), *b)))
        .collect();
    let chains = chains.iter_mut();
    let mut chains: Vec<_> = chains
        .map(|Chain { p, q, middle }| avx512::Chain {
            p: right(wide(*p), *p),
            q: right(wide(*q), *q),
            middle,
        })
        .collect();
    let chains = &mut chains;
    match (a.data, b.data) {
        (Values::F32(x), Values::F32(y)) => {
            multiply_onto::<S, _, _>(onto, left(x, a), right(y, b), &more, chains, parallel)
        }
        (Values::F32(x), Values::Bf16(y)) => {
            multiply_onto::<S, _, _>(onto, left(x, a), right(y, b), &more, chains, parallel)
        }
        (Values::Bf16(x), Values::F32(y)) => {
            multiply_onto::<S, _, _>(onto, left(x, a), right(y, b), &more, chains, parallel)
        }
        (Values::Bf16(x), Values::Bf16(y)) => {
            multiply_onto::<S, _, _>(onto, left(x, a), right(y, b), &more, chains, parallel)
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn native<S: avx512::Arithmetic>(
    dst: &mut [f32],
    stride: usize,
    accumulate: bool,
    a: View<'_>,
    b: View<'_>,
    parallel: bool,
) where
    f32: avx512::Element<S>,
    bf16: avx512::Element<S>,
{
    use avx512::multiply;
    let add = accumulate;
    match (a.data, b.data) {
        (Values::F32(x), Values::F32(y)) => {
            multiply::<S, _, _>(dst, stride, add, left(x, a), right(y, b), parallel);
        }
        (Values::F32(x), Values::Bf16(y)) => {
            multiply::<S, _, _>(dst, stride, add, left(x, a), right(y, b), parallel);
        }
        (Values::Bf16(x), Values::F32(y)) => {
            multiply::<S, _, _>(dst, stride, add, left(x, a), right(y, b), parallel);
        }
        (Values::Bf16(x), Values::Bf16(y)) => {
            multiply::<S, _, _>(dst, stride, add, left(x, a), right(y, b), parallel);
        }
    }
}

/// The product in f32, whatever the operands are stored in.
#[allow(unsafe_code)]
fn product(
    dst: &mut [f32],
    dst_stride: usize,
    accumulate: bool,
    a: View<'_>,
    b: View<'_>,
    parallelism: Parallelism,
) {
    let (m, k, n) = (a.height, a.width, b.width);
    assert_eq!(k, b.height, "inner dimensions differ");
    assert!(
        extent(m, n, dst_stride, 1) <= dst.len(),
        "product exceeds its slice"
    );
    assert!(
        a.extent() <= a.data.len() && b.extent() <= b.data.len(),
        "operand exceeds its slice"
    );
    if m == 0 || n == 0 {
        return;
    }
    let (a_values, b_values) = (a.data.wide(), b.data.wide());
    // SAFETY: the three assertions above keep every element that the kernel
    // touches inside the slices; `dst` is borrowed exclusively, so it cannot
    // overlap the operands.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            dst_stride as isize,
            accumulate,
            a_values.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b_values.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Writes `row` into each row of `dst`.
pub(crate) fn fill_rows(dst: &mut [f32], row: &[f32]) {
    for out in dst.chunks_exact_mut(row.len().max(1)) {
        out.copy_from_slice(row);
    }
}
