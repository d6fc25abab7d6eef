//! Rotations from unconstrained blocks: the Cayley transform, and the batched matrix
//! inverse that it needs.

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor};

/// How the Frobenius norm of all skew blocks together is held down.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bound {
    /// To this number if it is above 0, else not at all: LyCORIS'.
    Positive(f64),
    /// To this number whatever it is: sd-scripts'.
    Always(f64),
}

/// Rotations of `blocks` `[.., n, n]`: `Q = X - X^T`, held down by `bound`,
/// `R = (I + Q)(I - Q)^-1`.
pub(super) fn rotations(blocks: &Tensor, bound: Bound) -> Result<Tensor> {
    let n = blocks.dim(blocks.rank().saturating_sub(1))?;
    let flat = blocks.reshape(((), n, n))?;
    let mut skew = (&flat - flat.transpose(1, 2)?)?;
    let (limit, slack) = match bound {
        Bound::Positive(limit) => (limit, 0.0),
        Bound::Always(limit) => (limit, 1e-8),
    };
    if limit > 0.0 || matches!(bound, Bound::Always(_)) {
        let norm = (skew.sqr()?.sum_all()?.sqrt()? + 1e-8)?;
        if norm.detach().to_dtype(DType::F64)?.to_scalar::<f64>()? > limit + slack {
            skew = skew.broadcast_mul(&(norm.recip()? * (limit + slack))?)?;
        }
    }
    let identity = identity(n, &flat)?;
    let inverse = inverse(&identity.broadcast_sub(&skew)?)?;
    identity
        .broadcast_add(&skew)?
        .matmul(&inverse)?
        .reshape(blocks.shape())
}

/// `I + m (R - I)` for rotations `[.., n, n]`.
pub(super) fn interpolated(rotations: &Tensor, multiplier: f64) -> Result<Tensor> {
    let n = rotations.dim(rotations.rank().saturating_sub(1))?;
    let identity = (identity(n, rotations)? * (1.0 - multiplier))?;
    (rotations * multiplier)?.broadcast_add(&identity)
}

fn identity(n: usize, like: &Tensor) -> Result<Tensor> {
    Tensor::eye(n, like.dtype(), like.device())
}

/// Inverse of every matrix of `[batch, n, n]`, differentiable. Computed on the host in
/// f64: the blocks are small.
fn inverse(matrices: &Tensor) -> Result<Tensor> {
    matrices
        .contiguous()?
        .to_device(&Device::Cpu)?
        .apply_op1(Inverse)?
        .to_device(matrices.device())
}

struct Inverse;

impl CustomOp1 for Inverse {
    fn name(&self) -> &'static str {
        "inverse"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, n, _) = layout.shape().dims3()?;
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("inverse: the matrices must be contiguous");
        };
        let all = |values: Vec<f64>| -> Result<Vec<f64>> {
            let inverses: Result<Vec<Vec<f64>>> = values
                .chunks_exact((n * n).max(1))
                .map(|matrix| invert(matrix, n))
                .collect();
            Ok(inverses?.concat())
        };
        let storage = match storage {
            CpuStorage::F32(values) => {
                let values = values[start..end].iter().map(|v| f64::from(*v)).collect();
                CpuStorage::F32(all(values)?.into_iter().map(|v| v as f32).collect())
            }
            CpuStorage::F64(values) => CpuStorage::F64(all(values[start..end].to_vec())?),
            _ => candle_core::bail!("inverse: only f32 and f64 matrices"),
        };
        Ok((storage, layout.shape().clone()))
    }

    /// `d(A^-1) = -A^-1 dA A^-1`.
    fn bwd(&self, _arg: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let transposed = res.transpose(1, 2)?.contiguous()?;
        let gradient = transposed
            .matmul(&grad.contiguous()?)?
            .matmul(&transposed)?;
        Ok(Some(gradient.neg()?))
    }
}

/// Gauss-Jordan elimination with row pivots on a row-major `n x n` matrix.
fn invert(matrix: &[f64], n: usize) -> Result<Vec<f64>> {
    let mut left = matrix.to_vec();
    let mut right = vec![0.0; n * n];
    right.iter_mut().step_by(n + 1).for_each(|v| *v = 1.0);
    for column in 0..n {
        let size = |row: &usize| left[row * n + column].abs();
        let pivot = (column..n)
            .max_by(|a, b| size(a).total_cmp(&size(b)))
            .unwrap_or(column);
        let value = left[pivot * n + column];
        if value == 0.0 || !value.is_finite() {
            candle_core::bail!("inverse: a matrix has none");
        }
        for half in [&mut left, &mut right] {
            for j in 0..n {
                half.swap(pivot * n + j, column * n + j);
                half[column * n + j] /= value;
            }
        }
        for row in (0..n).filter(|row| *row != column) {
            let factor = left[row * n + column];
            for half in [&mut left, &mut right] {
                for j in 0..n {
                    half[row * n + j] -= factor * half[column * n + j];
                }
            }
        }
    }
    Ok(right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn() -> Result<()> {
        // Q = [[0, -1], [1, 0]] gives (I + Q)(I - Q)^-1 = Q itself.
        let blocks = Tensor::new(&[[[0f32, 0.], [1., 0.]]], &Device::Cpu)?;
        let turn = rotations(&blocks, Bound::Positive(0.0))?;
        assert_eq!(turn.to_vec3::<f32>()?, [[[0., -1.], [1., 0.]]]);
        Ok(())
    }

    #[test]
    fn singular_matrices_are_an_error() -> Result<()> {
        assert!(inverse(&Tensor::zeros((1, 2, 2), DType::F32, &Device::Cpu)?).is_err());
        Ok(())
    }
}
