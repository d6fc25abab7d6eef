//! The second moment of Prodigy+, whole or as two means over the largest dimensions.

use candle_core::Tensor;

use crate::error::Result;
use crate::prodigy_plus::{COL, ROW, V};
use crate::slot::Buffer;

/// The largest dimensions from which a tensor is factored.
const LEAST_DIMENSION: usize = 32;

/// A tensor seen as `[outer, low, middle, high, inner]`, `low` and `high` being its two
/// largest dimensions in order of position.
#[derive(Debug, Clone, Copy)]
pub(super) struct Factoring {
    outer: usize,
    low: usize,
    middle: usize,
    high: usize,
    inner: usize,
    /// The largest dimension is the first of the two: `R` reduces it.
    largest_is_low: bool,
    /// Blocks of the row factor over which its mean is taken: (before, dimension, after).
    mean: (usize, usize, usize),
}

impl Factoring {
    /// `None` for tensors that keep the whole second moment.
    pub(super) fn of(dims: &[usize], narrow_row_mean: bool) -> Option<Self> {
        if dims.len() < 2 || dims.iter().all(|d| *d < LEAST_DIMENSION) {
            return None;
        }
        let mut order: Vec<(usize, usize)> =
            dims.iter().enumerate().map(|(i, d)| (*d, i)).collect();
        order.sort_unstable();
        let (largest, second) = (order[order.len() - 1].1, order[order.len() - 2].1);
        let (low, high) = (largest.min(second), largest.max(second));
        let product = |range: std::ops::Range<usize>| dims[range].iter().product::<usize>();
        // The row factor keeps the dimension `second`; its mean belongs over that.
        let over = if narrow_row_mean && second > largest {
            second - 1
        } else {
            second
        };
        let mut row_dims = dims.to_vec();
        row_dims[largest] = 1;
        let row = |range: std::ops::Range<usize>| row_dims[range].iter().product::<usize>();
        Some(Self {
            outer: product(0..low),
            low: dims[low],
            middle: product(low + 1..high),
            high: dims[high],
            inner: product(high + 1..dims.len()),
            largest_is_low: largest == low,
            mean: (row(0..over), row_dims[over], row(over + 1..dims.len())),
        })
    }

    fn without_low(self) -> usize {
        self.outer * self.middle * self.high * self.inner
    }

    fn without_high(self) -> usize {
        self.outer * self.low * self.middle * self.inner
    }

    /// Numbers of row and column means.
    pub(super) fn lengths(self) -> (usize, usize) {
        self.in_order(self.without_low(), self.without_high())
    }

    pub(super) fn zeros(self) -> (Buffer, Buffer) {
        let (rows, cols) = self.lengths();
        (Buffer::F32(vec![0.0; rows]), Buffer::F32(vec![0.0; cols]))
    }

    /// What is without the low and without the high dimension, as rows and columns; and
    /// back.
    fn in_order<T>(self, low: T, high: T) -> (T, T) {
        if self.largest_is_low {
            (low, high)
        } else {
            (high, low)
        }
    }

    /// Row and column means of a whole tensor, as vectors.
    pub(super) fn means(self, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let dims = [self.outer, self.low, self.middle, self.high, self.inner];
        let values = values.reshape(&dims)?;
        let (low, high) = (values.mean(1)?, values.mean(3)?);
        Ok(self.in_order(low.flatten_all()?, high.flatten_all()?))
    }

    /// The second moment that the means stand for, as `[outer, low, middle, high, inner]`.
    pub(super) fn restored(self, rows: &Tensor, cols: &Tensor) -> Result<Tensor> {
        let shaped = rows.reshape(self.mean)?;
        let mean = shaped.mean_keepdim(1)?.affine(1.0, 1e-30)?;
        let rows = shaped.broadcast_div(&mean)?;
        let (low, high) = self.in_order(&rows, cols);
        let low = low.reshape(&[self.outer, 1, self.middle, self.high, self.inner])?;
        let high = high.reshape(&[self.outer, self.low, self.middle, 1, self.inner])?;
        Ok(low.broadcast_mul(&high)?)
    }

    /// Calls `visit(element, row index, column index)` in row-major order.
    fn for_each(self, mut visit: impl FnMut(usize, usize, usize)) {
        let mut element = 0;
        for o in 0..self.outer {
            for a in 0..self.low {
                for m in 0..self.middle {
                    for b in 0..self.high {
                        let without_low = ((o * self.middle + m) * self.high + b) * self.inner;
                        let without_high = ((o * self.low + a) * self.middle + m) * self.inner;
                        for n in 0..self.inner {
                            let (x, y) = (without_low + n, without_high + n);
                            if self.largest_is_low {
                                visit(element, x, y)
                            } else {
                                visit(element, y, x)
                            }
                            element += 1;
                        }
                    }
                }
            }
        }
    }

    /// The row factor divided by its mean.
    fn relative_rows(self, rows: &[f32]) -> Vec<f32> {
        let (before, dimension, after) = self.mean;
        let mut out = rows.to_vec();
        for b in 0..before {
            for a in 0..after {
                let at = |i: usize| (b * dimension + i) * after + a;
                let mean =
                    (0..dimension).map(|i| f64::from(rows[at(i)])).sum::<f64>() / dimension as f64;
                for i in 0..dimension {
                    out[at(i)] = rows[at(i)] / (mean as f32 + 1e-30);
                }
            }
        }
        out
    }

    fn update(
        self,
        rows: &mut [f32],
        cols: &mut [f32],
        keep: f32,
        gain: f64,
        square: impl Fn(usize) -> f64,
    ) {
        let mut row_sums = vec![0.0f64; rows.len()];
        let mut col_sums = vec![0.0f64; cols.len()];
        self.for_each(|element, row, col| {
            let x = square(element);
            row_sums[row] += x;
            col_sums[col] += x;
        });
        let (row_count, col_count) = if self.largest_is_low {
            (self.low, self.high)
        } else {
            (self.high, self.low)
        };
        for (means, sums, count) in [(rows, row_sums, row_count), (cols, col_sums, col_count)] {
            for (mean, sum) in means.iter_mut().zip(sums) {
                *mean = *mean * keep + (gain * sum / count as f64) as f32;
            }
        }
    }
}

/// Creates the buffers at the first gradient.
pub(super) fn prepare(factoring: Option<Factoring>, len: usize, buffers: &mut [Option<Buffer>]) {
    match factoring {
        Some(factoring) => {
            let (rows, cols) = factoring.zeros();
            (buffers[ROW], buffers[COL]) = (Some(rows), Some(cols));
        }
        None => buffers[V] = Some(Buffer::F32(vec![0.0; len])),
    }
}

/// `v = b2 * v + (1 - b2) * d^2 * value^2`, whole or as means. (With focus: of the value
/// itself, not its square.)
pub(super) fn update(
    factoring: Option<Factoring>,
    buffers: &mut [Option<Buffer>],
    b2: f64,
    d: f64,
    squared: bool,
    value: impl Fn(usize) -> f32,
) {
    let gain = (1.0 - b2) * d * d;
    let (front, back) = buffers.split_at_mut(ROW);
    match (factoring, &mut front[V], back) {
        (Some(factoring), _, [Some(rows), Some(cols), ..]) => {
            let square = |i: usize| f64::from(value(i)) * f64::from(value(i));
            factoring.update(rows.f32_mut(), cols.f32_mut(), b2 as f32, gain, square);
        }
        (None, Some(v), _) => {
            for (i, v) in v.f32_mut().iter_mut().enumerate() {
                let x = value(i);
                *v = *v * b2 as f32
                    + if squared {
                        gain as f32 * x * x
                    } else {
                        gain as f32 * x
                    };
            }
        }
        _ => {}
    }
}

/// Writes sqrt(v) to `out` (with focus: v itself).
pub(super) fn denominator(
    factoring: Option<Factoring>,
    buffers: &[Option<Buffer>],
    root: bool,
    out: &mut [f32],
) {
    match (factoring, buffers) {
        (Some(factoring), [_, _, _, Some(rows), Some(cols), ..]) => {
            let (rows, cols) = (factoring.relative_rows(rows.f32()), cols.f32());
            factoring.for_each(|element, row, col| out[element] = (rows[row] * cols[col]).sqrt());
        }
        (None, [_, _, Some(v), ..]) => {
            for (out, v) in out.iter_mut().zip(v.f32()) {
                *out = if root { v.sqrt() } else { *v };
            }
        }
        _ => {}
    }
}
