//! The nearest Kronecker product and the nearest elementwise product of two low-rank
//! matrices.

use candle_core::{DType, Device, Tensor};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};

use super::Svd;
use super::svd::matrix_dims;
use crate::family::factorization;
use crate::{Error, Result};

/// The Kronecker product nearest to a weight change in the Frobenius norm.
///
/// `change` is `[o, i]` or `[o, i, kh, kw]`; `o` and `i` are split by
/// [`factorization`] with `factor`, as LoKr does. Returns `w1` `[a, c]` and `w2`
/// `[b, d]` or `[b, d, kh, kw]`, both of equal norm. The change's blocks become the rows
/// of a matrix whose best approximation of rank 1 is the answer (Van Loan and Pitsianis
/// 1993).
///
/// # Errors
/// [`Error::ShapeMismatch`] for other shapes, [`Error::BadValue`] for numbers that are
/// not finite.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::algebra::nearest_kronecker;
/// let change = Tensor::new(&[[2f32, 4., 3., 6.]], &Device::Cpu)?; // [2, 3] kron [1, 2]
/// let (w1, w2) = nearest_kronecker(&change, 2)?;
/// let ratio = (w1.get(0)?.get(1)? / w1.get(0)?.get(0)?)?.to_scalar::<f32>()?;
/// assert!((ratio - 1.5).abs() < 1e-5);
/// assert_eq!(w2.dims(), [1, 2]);
/// # Ok::<(), lora_core::Error>(())
/// ```
pub fn nearest_kronecker(change: &Tensor, factor: i64) -> Result<(Tensor, Tensor)> {
    let (o, i, taps) = match *change.dims() {
        [o, i] => (o, i, 1),
        [o, i, kh, kw] => (o, i, kh * kw),
        _ => {
            return Err(Error::ShapeMismatch {
                layer: "nearest Kronecker product".into(),
                tensor: "weight".into(),
                expected: "a linear or convolution weight".into(),
                got: change.dims().to_vec(),
            });
        }
    };
    let (a, b) = factorization(o, factor);
    let (c, d) = factorization(i, factor);
    let blocks = change
        .to_dtype(DType::F32)?
        .reshape(&[a, b, c, d, taps])?
        .permute([0, 2, 1, 3, 4])?
        .contiguous()?
        .reshape((a * c, b * d * taps))?;
    let (left, right) = Svd::truncated(&blocks, 1)?.balanced_factors(1)?;
    let w2 = match *change.dims() {
        [_, _, kh, kw] => right.reshape((b, d, kh, kw))?,
        _ => right.reshape((b, d))?,
    };
    Ok((left.reshape((a, c))?, w2))
}

/// Most rounds of the alternating fit, and the gain below which it ends.
const ROUNDS: usize = 20;
const GAIN: f64 = 1e-3;

/// Factors of LoHa, row-major: `[w1_a, w1_b, w2_a, w2_b]`, `a` `[o, r]`, `b` `[r, n]`,
/// that approximate a matrix `[o, n]`. There is no closed form: starting from the matrix'
/// magnitudes, one factor after another is set to its best value by least squares. The
/// error falls with every step, to a local minimum.
///
/// # Errors
/// As [`nearest_kronecker`].
pub(crate) fn nearest_hadamard(change: &Tensor, rank: usize) -> Result<[Tensor; 4]> {
    let (o, n) = matrix_dims(change);
    let values = change
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    // |E| = sqrt|E| o sqrt|E|, the sign with the first.
    let start = |sign: bool| -> Result<(Mat<f32>, Mat<f32>)> {
        let half = values.iter().map(|v| {
            let root = v.abs().sqrt();
            if sign { root.copysign(*v) } else { root }
        });
        let half = Tensor::from_vec(half.collect::<Vec<f32>>(), (o, n), &Device::Cpu)?;
        let svd = Svd::truncated(&half, rank)?;
        let (a, b) = svd.balanced_factors(rank)?;
        Ok((
            widened(&a, o, rank)?,
            widened(&b.t()?.contiguous()?, n, rank)?,
        ))
    };
    let e = MatRef::from_row_major_slice(&values, o, n).to_owned();
    let ((mut a1, mut b1), (mut a2, mut b2)) = (start(true)?, start(false)?);
    let total: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
    let mut last = f64::INFINITY;
    for _ in 0..ROUNDS {
        let second = times(a2.as_ref(), b2.transpose());
        let weighted = Mat::from_fn(o, n, |i, j| e[(i, j)] * second[(i, j)]);
        let squared = Mat::from_fn(o, n, |i, j| second[(i, j)].powi(2));
        a1 = solve_rows(&weighted, &squared, &b1);
        b1 = solve_rows(
            &weighted.transpose().to_owned(),
            &squared.transpose().to_owned(),
            &a1,
        );
        let first = times(a1.as_ref(), b1.transpose());
        let weighted = Mat::from_fn(o, n, |i, j| e[(i, j)] * first[(i, j)]);
        let squared = Mat::from_fn(o, n, |i, j| first[(i, j)].powi(2));
        a2 = solve_rows(&weighted, &squared, &b2);
        b2 = solve_rows(
            &weighted.transpose().to_owned(),
            &squared.transpose().to_owned(),
            &a2,
        );
        let second = times(a2.as_ref(), b2.transpose());
        let error: f64 = (0..n)
            .map(|j| -> f64 {
                (0..o)
                    .map(|i| f64::from(e[(i, j)] - first[(i, j)] * second[(i, j)]).powi(2))
                    .sum()
            })
            .sum();
        if !error.is_finite() || last - error <= GAIN * error || error <= 1e-12 * total {
            break;
        }
        last = error;
    }
    let tensor = |m: &Mat<f32>, transposed: bool| -> Result<Tensor> {
        let (rows, columns) = (m.nrows(), m.ncols());
        let values: Vec<f32> = (0..rows)
            .flat_map(|i| (0..columns).map(move |j| (i, j)))
            .map(|at| m[at])
            .collect();
        let tensor = Tensor::from_vec(values, (rows, columns), &Device::Cpu)?;
        Ok(if transposed {
            tensor.t()?.contiguous()?
        } else {
            tensor
        })
    };
    Ok([
        tensor(&a1, false)?,
        tensor(&b1, true)?,
        tensor(&a2, false)?,
        tensor(&b2, true)?,
    ])
}

/// `[rows, rank]`, columns that are not there filled with small numbers: a column of
/// zeros would stay zero.
fn widened(factor: &Tensor, rows: usize, rank: usize) -> Result<Mat<f32>> {
    let have = factor.dim(1)?;
    let values = factor.flatten_all()?.to_vec1::<f32>()?;
    let factor = MatRef::from_row_major_slice(&values, rows, have);
    Ok(Mat::from_fn(rows, rank, |i, j| {
        if j < have {
            factor[(i, j)]
        } else {
            1e-3 * ((i * 7 + j * 13) % 11) as f32
        }
    }))
}

/// `[m, r]`: for every row the least-squares solution against `basis` `[n, r]`, given
/// `weighted = e o w` and `squared = w o w` `[m, n]`.
fn solve_rows(weighted: &Mat<f32>, squared: &Mat<f32>, basis: &Mat<f32>) -> Mat<f32> {
    let (n, r) = (basis.nrows(), basis.ncols());
    let pairs = Mat::from_fn(n, r * r, |i, k| basis[(i, k / r)] * basis[(i, k % r)]);
    let normal = times(squared.as_ref(), pairs.as_ref());
    let right = times(weighted.as_ref(), basis.as_ref());
    let mut out = Mat::zeros(weighted.nrows(), r);
    for row in 0..weighted.nrows() {
        let mut system: Vec<f64> = (0..r * r).map(|k| f64::from(normal[(row, k)])).collect();
        let mut x: Vec<f64> = (0..r).map(|k| f64::from(right[(row, k)])).collect();
        cholesky_solve(&mut system, &mut x);
        for (k, x) in x.into_iter().enumerate() {
            out[(row, k)] = x as f32;
        }
    }
    out
}

/// Solves a symmetric positive system `[r, r]` in place, slightly damped; a direction
/// without any weight gets 0.
fn cholesky_solve(system: &mut [f64], x: &mut [f64]) {
    let r = x.len();
    let trace: f64 = (0..r).map(|k| system[k * r + k]).sum();
    let damping = 1e-7 * trace / r.max(1) as f64;
    for j in 0..r {
        let mut pivot = system[j * r + j] + damping;
        for k in 0..j {
            pivot -= system[j * r + k].powi(2);
        }
        let pivot = if pivot > 0.0 {
            pivot.sqrt()
        } else {
            f64::INFINITY
        };
        system[j * r + j] = pivot;
        for i in j + 1..r {
            let mut value = system[i * r + j];
            for k in 0..j {
                value -= system[i * r + k] * system[j * r + k];
            }
            system[i * r + j] = value / pivot;
        }
    }
    for i in 0..r {
        for k in 0..i {
            x[i] -= system[i * r + k] * x[k];
        }
        x[i] /= system[i * r + i];
    }
    for i in (0..r).rev() {
        for k in i + 1..r {
            x[i] -= system[k * r + i] * x[k];
        }
        x[i] /= system[i * r + i];
    }
}

fn times(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Mat<f32> {
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    matmul(&mut out, Accum::Replace, a, b, 1.0, Par::Seq);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algebra::delta::norm;

    #[test]
    fn hadamard_fit_recovers_what_is_one() {
        let factor = |rows: usize, columns: usize, seed: usize| {
            let values = (0..rows * columns).map(|k| ((k * 37 + seed * 101) as f32).sin() + 0.3);
            Tensor::from_vec(values.collect::<Vec<_>>(), (rows, columns), &Device::Cpu).unwrap()
        };
        let product = |[a1, b1, a2, b2]: &[Tensor; 4]| {
            (a1.matmul(b1).unwrap() * a2.matmul(b2).unwrap()).unwrap()
        };
        let truth = product(&[
            factor(24, 2, 1),
            factor(2, 20, 2),
            factor(24, 2, 3),
            factor(2, 20, 4),
        ]);
        let fitted = product(&nearest_hadamard(&truth, 2).unwrap());
        let error = norm(&(&fitted - &truth).unwrap()).unwrap() / norm(&truth).unwrap();
        assert!(error < 0.03, "{error}");
    }
}
