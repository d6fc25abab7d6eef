//! A running mean of a matrix of squares, kept as its row means and column means.
//!
//! The matrix is restored as `R / mean(R) * C` (Shazeer and Stern 2018): n + m numbers in
//! place of n * m. Leading dimensions are a batch of matrices.

use candle_core::{DType, Device, Tensor};

use crate::error::Result;
use crate::plain::mix;
use crate::slot::Buffer;

/// Batches, rows and columns of a tensor, over its last two dimensions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrices {
    pub(crate) batches: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Matrices {
    /// `None` for fewer than two dimensions: those keep the full running mean.
    pub(crate) fn of(dims: &[usize]) -> Option<Self> {
        match dims {
            [batch @ .., rows, cols] => Some(Self {
                batches: batch.iter().product(),
                rows: *rows,
                cols: *cols,
            }),
            _ => None,
        }
    }

    /// Zero row and column means.
    pub(crate) fn zeros(self) -> (Buffer, Buffer) {
        (
            Buffer::F32(vec![0.0; self.batches * self.rows]),
            Buffer::F32(vec![0.0; self.batches * self.cols]),
        )
    }

    /// `mean = beta * mean + (1 - beta) * mean of value(i)`, for rows and columns.
    pub(crate) fn update(
        self,
        row_means: &mut [f32],
        col_means: &mut [f32],
        beta: f64,
        mut value: impl FnMut(usize) -> f32,
    ) {
        let (keep, gain) = (beta as f32, 1.0 - beta);
        let mut sums = vec![0.0f64; self.cols];
        for b in 0..self.batches {
            sums.fill(0.0);
            for r in 0..self.rows {
                let row = b * self.rows + r;
                let mut total = 0.0f64;
                for (c, sum) in sums.iter_mut().enumerate() {
                    let x = f64::from(value(row * self.cols + c));
                    total += x;
                    *sum += x;
                }
                row_means[row] = row_means[row] * keep + (gain * total / self.cols as f64) as f32;
            }
            for (mean, sum) in col_means[b * self.cols..].iter_mut().zip(&sums) {
                *mean = *mean * keep + (gain * sum / self.rows as f64) as f32;
            }
        }
    }

    /// Calls `visit(i, 1 / sqrt(restored mean square))` for every element in order.
    pub(crate) fn for_each(
        self,
        row_means: &[f32],
        col_means: &[f32],
        mut visit: impl FnMut(usize, f32),
    ) {
        for b in 0..self.batches {
            let rows = &row_means[b * self.rows..(b + 1) * self.rows];
            let cols = &col_means[b * self.cols..(b + 1) * self.cols];
            let mean = (rows.iter().map(|&x| f64::from(x)).sum::<f64>() / self.rows as f64) as f32;
            for (r, row_mean) in rows.iter().enumerate() {
                let row_factor = 1.0 / (row_mean / mean).sqrt();
                let start = (b * self.rows + r) * self.cols;
                for (c, col_mean) in cols.iter().enumerate() {
                    visit(start + c, row_factor * (1.0 / col_mean.sqrt()));
                }
            }
        }
    }

    /// Zero row and column means on a device.
    pub(crate) fn zeros_on(self, device: &Device) -> Result<(Tensor, Tensor)> {
        let zeros = |len: usize| Tensor::zeros(len, DType::F32, device);
        Ok((
            zeros(self.batches * self.rows)?,
            zeros(self.batches * self.cols)?,
        ))
    }

    /// A tensor as its batch of matrices.
    pub(crate) fn shaped(self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.reshape((self.batches, self.rows, self.cols))?)
    }

    /// As [`Matrices::update`], for whole tensors: the new row and column means.
    pub(crate) fn updated(
        self,
        row_means: &Tensor,
        col_means: &Tensor,
        beta: f64,
        values: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let values = self.shaped(values)?;
        let (rows, cols) = (values.mean(2)?, values.mean(1)?);
        Ok((
            mix(
                &row_means.flatten_all()?,
                beta,
                &rows.flatten_all()?,
                1.0 - beta,
            )?,
            mix(
                &col_means.flatten_all()?,
                beta,
                &cols.flatten_all()?,
                1.0 - beta,
            )?,
        ))
    }

    /// `matrices / sqrt(restored mean square)`.
    pub(crate) fn normalised(
        self,
        matrices: &Tensor,
        row_means: &Tensor,
        col_means: &Tensor,
    ) -> Result<Tensor> {
        let rows = row_means.reshape((self.batches, self.rows, 1))?;
        let cols = col_means.reshape((self.batches, 1, self.cols))?;
        let row_factors = rows
            .broadcast_div(&rows.mean_keepdim(1)?)?
            .sqrt()?
            .recip()?;
        Ok(self
            .shaped(matrices)?
            .broadcast_mul(&row_factors)?
            .broadcast_mul(&cols.sqrt()?.recip()?)?)
    }
}

/// Root of the mean square.
pub(crate) fn rms(values: &[f32]) -> f64 {
    (values
        .iter()
        .map(|&x| f64::from(x) * f64::from(x))
        .sum::<f64>()
        / values.len().max(1) as f64)
        .sqrt()
}
