//! Singular value decompositions: exact for small matrices, subspace iteration with a
//! checked residual for large ones.
//!
//! Everything runs on the calling thread, from a fixed seed: the same matrix gives the
//! same factors whatever the number of threads.

use candle_core::{DType, Device, Tensor};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};

use super::RankRule;
use crate::{Error, Result};

/// Matrices whose smaller side is at most this are always decomposed exactly.
const EXACT_SIDE: usize = 192;
/// Up to this side the exact decomposition is computed in f64, above in f32.
const DOUBLE_SIDE: usize = 512;
/// The iteration ends when a round lowers the squared error by less than this part.
const CONVERGED: f64 = 1e-3;
/// Rounds after which a matrix counts as one that the iteration does not suit.
const MAX_ROUNDS: usize = 12;
/// First of the seeds of the random starts.
const SEED: u64 = 0x5eed_0fad_a97e;

/// The leading part of a singular value decomposition `A = U diag(s) V^T`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::algebra::Svd;
/// let a = Tensor::new(&[[3f32, 0.], [0., 4.], [0., 0.]], &Device::Cpu)?;
/// let svd = Svd::exact(&a)?;
/// assert_eq!(svd.values().iter().map(|s| s.round()).collect::<Vec<_>>(), [4., 3.]);
/// assert_eq!(svd.energy().round(), 25.);
/// let (up, down) = svd.factors(1)?; // up carries the singular value
/// assert_eq!((up.dims(), down.dims()), (&[3, 1][..], &[1, 2][..]));
/// assert!((svd.error(1) - 0.6).abs() < 1e-6);
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Svd {
    /// `[m, k]`, orthonormal columns.
    u: Mat<f32>,
    /// Descending.
    values: Vec<f64>,
    /// `[n, k]`, orthonormal columns.
    v: Mat<f32>,
    /// Squared Frobenius norm of the whole matrix.
    energy: f64,
}

impl Svd {
    /// All `min(m, n)` singular values and vectors of a matrix `[m, n]`, or of a
    /// convolution weight `[m, i, kh, kw]` seen as `[m, i kh kw]`.
    ///
    /// # Errors
    /// [`Error::BadValue`] for a matrix that holds NaN or infinity, or when the
    /// decomposition does not converge.
    pub fn exact(matrix: &Tensor) -> Result<Self> {
        exact(to_mat(matrix)?.as_ref())
    }

    /// The leading `rank` singular values and vectors: exact where that is cheap, else by
    /// subspace iteration from a random start, repeated until a round no longer improves
    /// the error of the rank-`rank` approximation by a thousandth. A matrix on which that
    /// does not happen in 12 rounds is decomposed exactly.
    ///
    /// # Errors
    /// As [`Svd::exact`].
    pub fn truncated(matrix: &Tensor, rank: usize) -> Result<Self> {
        truncated(to_mat(matrix)?.as_ref(), rank)
    }

    /// As many leading values as `rule` needs to decide.
    ///
    /// # Errors
    /// As [`Svd::exact`].
    pub fn for_rule(matrix: &Tensor, rule: RankRule) -> Result<Self> {
        let matrix = to_mat(matrix)?;
        let matrix = matrix.as_ref();
        let side = matrix.nrows().min(matrix.ncols());
        let mut rank = match rule {
            RankRule::Fixed(rank) => return truncated(matrix, rank),
            _ if rule.needs_all() => return exact(matrix),
            _ => 64,
        };
        while rank * 4 <= side {
            let svd = truncated(matrix, rank)?;
            if rule.decided(&svd.values, svd.energy) {
                return Ok(svd);
            }
            rank *= 4;
        }
        exact(matrix)
    }

    /// The decomposition of `up down` (`[m, r]`, `[r, n]`) through its factors, in f64;
    /// the product is never built. At most `min(m, n, r)` values.
    ///
    /// # Errors
    /// As [`Svd::exact`].
    pub fn of_product(up: &Tensor, down: &Tensor) -> Result<Self> {
        let (up, down) = (to_f64(up)?, to_f64(down)?);
        if up.ncols() != down.nrows() {
            return Err(Error::ShapeMismatch {
                layer: "product of factors".into(),
                tensor: "down".into(),
                expected: format!("[{}, ...]", up.ncols()),
                got: vec![down.nrows(), down.ncols()],
            });
        }
        let (left, right) = (up.qr(), down.transpose().qr());
        let core = left.thin_R() * right.thin_R().transpose();
        let inner = core.thin_svd().map_err(|_| diverged())?;
        let values: Vec<f64> = inner.S().column_vector().iter().copied().collect();
        let u = left.compute_thin_Q() * inner.U();
        let v = right.compute_thin_Q() * inner.V();
        Ok(Self {
            energy: values.iter().map(|s| s * s).sum(),
            u: to_single(u.as_ref()),
            v: to_single(v.as_ref()),
            values,
        })
    }

    /// The singular values that were computed, descending.
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// The squared Frobenius norm of the whole matrix, values left out included.
    pub fn energy(&self) -> f64 {
        self.energy
    }

    /// `|A - A_rank| / |A|` in the Frobenius norm; 0 for a zero matrix.
    pub fn error(&self, rank: usize) -> f64 {
        let kept: f64 = self.values.iter().take(rank).map(|s| s * s).sum();
        if self.energy == 0.0 {
            return 0.0;
        }
        ((self.energy - kept).max(0.0) / self.energy).sqrt()
    }

    /// `up = U_r diag(s_r)` `[m, r]` and `down = V_r^T` `[r, n]`, f32, `r` being at most
    /// the number of values there are.
    ///
    /// # Errors
    /// When the tensors cannot be made.
    pub fn factors(&self, rank: usize) -> Result<(Tensor, Tensor)> {
        self.scaled_factors(rank, |s| (s, 1.0))
    }

    /// The same with the singular value split over both sides by its square root.
    pub(crate) fn balanced_factors(&self, rank: usize) -> Result<(Tensor, Tensor)> {
        self.scaled_factors(rank, |s| (s.sqrt(), s.sqrt()))
    }

    fn scaled_factors(
        &self,
        rank: usize,
        split: impl Fn(f64) -> (f64, f64),
    ) -> Result<(Tensor, Tensor)> {
        let rank = rank.min(self.values.len());
        let (m, n) = (self.u.nrows(), self.v.nrows());
        let mut up = Vec::with_capacity(m * rank);
        for i in 0..m {
            up.extend(
                (0..rank).map(|k| (f64::from(self.u[(i, k)]) * split(self.values[k]).0) as f32),
            );
        }
        let mut down = Vec::with_capacity(rank * n);
        for k in 0..rank {
            let scale = split(self.values[k]).1;
            down.extend((0..n).map(|j| (f64::from(self.v[(j, k)]) * scale) as f32));
        }
        Ok((
            Tensor::from_vec(up, (m, rank), &Device::Cpu)?,
            Tensor::from_vec(down, (rank, n), &Device::Cpu)?,
        ))
    }
}

fn diverged() -> Error {
    Error::BadValue {
        layer: "singular value decomposition".into(),
        name: "matrix",
        value: "not decomposable".into(),
        expected: "expected finite numbers",
    }
}

/// Rows and columns of a weight seen as a matrix.
pub(crate) fn matrix_dims(weight: &Tensor) -> (usize, usize) {
    let rows = weight.dims().first().copied().unwrap_or(1);
    (rows, weight.elem_count() / rows.max(1))
}

fn flat(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok(tensor
        .detach()
        .to_device(&Device::Cpu)?
        .to_dtype(dtype)?
        .flatten_all()?)
}

fn to_mat(tensor: &Tensor) -> Result<Mat<f32>> {
    let (m, n) = matrix_dims(tensor);
    let values = flat(tensor, DType::F32)?.to_vec1::<f32>()?;
    if m == 0 || n == 0 || !values.iter().all(|v| v.is_finite()) {
        return Err(diverged());
    }
    Ok(MatRef::from_row_major_slice(&values, m, n).to_owned())
}

fn to_f64(tensor: &Tensor) -> Result<Mat<f64>> {
    let (m, n) = matrix_dims(tensor);
    let values = flat(tensor, DType::F64)?.to_vec1::<f64>()?;
    if m == 0 || n == 0 || !values.iter().all(|v| v.is_finite()) {
        return Err(diverged());
    }
    Ok(MatRef::from_row_major_slice(&values, m, n).to_owned())
}

fn to_single(matrix: MatRef<'_, f64>) -> Mat<f32> {
    Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| matrix[(i, j)] as f32)
}

fn energy(matrix: MatRef<'_, f32>) -> f64 {
    let column = |j| -> f64 {
        (0..matrix.nrows())
            .map(|i| f64::from(matrix[(i, j)]).powi(2))
            .sum()
    };
    (0..matrix.ncols()).map(column).sum()
}

fn exact(matrix: MatRef<'_, f32>) -> Result<Svd> {
    if matrix.nrows().min(matrix.ncols()) > DOUBLE_SIDE {
        let svd = matrix.thin_svd().map_err(|_| diverged())?;
        let values = svd.S().column_vector().iter().map(|s| f64::from(*s));
        return Ok(Svd {
            values: values.collect(),
            u: svd.U().to_owned(),
            v: svd.V().to_owned(),
            energy: energy(matrix),
        });
    }
    let double = Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| {
        f64::from(matrix[(i, j)])
    });
    let svd = double.thin_svd().map_err(|_| diverged())?;
    Ok(Svd {
        values: svd.S().column_vector().iter().copied().collect(),
        u: to_single(svd.U()),
        v: to_single(svd.V()),
        energy: energy(matrix),
    })
}

fn truncated(matrix: MatRef<'_, f32>, rank: usize) -> Result<Svd> {
    let side = matrix.nrows().min(matrix.ncols());
    let width = rank + (rank / 2).max(16);
    if side <= EXACT_SIDE || width * 4 > side {
        let mut svd = exact(matrix)?;
        svd.values.truncate(rank.max(1));
        return Ok(svd);
    }
    match iterate(matrix, rank.max(1), width) {
        Some(svd) => Ok(svd),
        None => {
            let mut svd = exact(matrix)?;
            svd.values.truncate(rank.max(1));
            Ok(svd)
        }
    }
}

/// Subspace iteration; `None` when it does not settle.
fn iterate(a: MatRef<'_, f32>, rank: usize, width: usize) -> Option<Svd> {
    let total = energy(a);
    let mut rng = ChaCha12Rng::seed_from_u64(SEED ^ ((a.nrows() as u64) << 32) ^ a.ncols() as u64);
    let mut v: Mat<f32> = Mat::from_fn(a.ncols(), width, |_, _| StandardNormal.sample(&mut rng));
    let mut captured = 0.0f64;
    for round in 0..MAX_ROUNDS {
        let y = product(a, v.as_ref());
        let q = y.qr().compute_thin_Q();
        let z = product(a.transpose(), q.as_ref());
        let right = z.qr();
        let core = right.thin_R().transpose().to_owned();
        let inner = core.thin_svd().ok()?;
        let values: Vec<f64> = (inner.S().column_vector().iter().take(rank))
            .map(|s| f64::from(*s))
            .collect();
        let now: f64 = values.iter().map(|s| s * s).sum();
        let rest = (total - now).max(0.0);
        v = right.compute_thin_Q();
        if round > 0 && (now - captured <= CONVERGED * rest || rest <= 1e-9 * total) {
            let kept = |m: MatRef<'_, f32>| m.subcols(0, values.len()).to_owned();
            return Some(Svd {
                u: product(q.as_ref(), kept(inner.U()).as_ref()),
                v: product(v.as_ref(), kept(inner.V()).as_ref()),
                values,
                energy: total,
            });
        }
        captured = now;
    }
    None
}

/// `a b` on this thread.
fn product(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Mat<f32> {
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    matmul(&mut out, Accum::Replace, a, b, 1.0, Par::Seq);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `U diag(1 / i) V^T + noise` with orthonormal random factors.
    fn spectrum(m: usize, n: usize) -> Mat<f32> {
        let mut rng = ChaCha12Rng::seed_from_u64(3);
        let side = m.min(n);
        let mut orthonormal = |rows| {
            let g: Mat<f32> = Mat::from_fn(rows, side, |_, _| StandardNormal.sample(&mut rng));
            g.qr().compute_thin_Q()
        };
        let (mut u, v) = (orthonormal(m), orthonormal(n));
        for k in 0..side {
            u.col_mut(k).iter_mut().for_each(|x| *x /= (k + 1) as f32);
        }
        product(u.as_ref(), v.transpose())
    }

    #[test]
    fn iteration_is_near_the_best_approximation() {
        let a = spectrum(300, 260);
        let best = exact(a.as_ref()).unwrap();
        for rank in [1, 8, 32] {
            let near = iterate(a.as_ref(), rank, rank + (rank / 2).max(16)).unwrap();
            let ratio = near.error(rank) / best.error(rank);
            assert!((1.0 - 1e-4..1.005).contains(&ratio), "rank {rank}: {ratio}");
            for (got, want) in near.values.iter().zip(&best.values) {
                assert!((got - want).abs() < 0.02 * want, "{got} {want}");
            }
            let approximation = {
                let mut us = near.u.clone();
                for k in 0..rank {
                    let s = near.values[k] as f32;
                    us.col_mut(k).iter_mut().for_each(|x| *x *= s);
                }
                product(us.as_ref(), near.v.transpose())
            };
            let residual = (energy((&a - approximation).as_ref()) / near.energy).sqrt();
            assert!((residual / near.error(rank) - 1.0).abs() < 1e-3);
        }
    }

    #[test]
    fn same_factors_with_any_number_of_threads() {
        let a = spectrum(280, 400);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.unwrap()
                .install(|| truncated(a.as_ref(), 4).unwrap().u)
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn bad_numbers_are_refused() {
        let a = Tensor::new(&[[1f32, f32::NAN]], &Device::Cpu).unwrap();
        assert!(Svd::exact(&a).is_err());
        assert!(Svd::of_product(&a, &a).is_err());
    }
}
