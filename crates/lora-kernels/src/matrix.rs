//! Strided matrix views and their product: the safe face of the gemm kernel.

use gemm::Parallelism;

/// Products with fewer multiplications run on the calling thread.
const PARALLEL_PRODUCTS: usize = 1 << 20;

/// A read-only matrix inside a slice: element `(i, j)` lies at `i * rows + j * cols`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    height: usize,
    width: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// `height` rows of `width` values, each row `stride` after the one before.
    pub(crate) fn rows(data: &'a [f32], height: usize, width: usize, stride: usize) -> Self {
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
    // Waking other threads costs more than a small product.
    let small = a.height * a.width * b.width < PARALLEL_PRODUCTS;
    let parallelism = if small {
        Parallelism::None
    } else {
        Parallelism::Rayon(0)
    };
    product(dst, dst_stride, accumulate, a, b, parallelism);
}

/// The same on the calling thread, for callers that divide the work themselves.
pub(crate) fn multiply_here(
    dst: &mut [f32],
    dst_stride: usize,
    accumulate: bool,
    a: View<'_>,
    b: View<'_>,
) {
    product(dst, dst_stride, accumulate, a, b, Parallelism::None);
}

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
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
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
