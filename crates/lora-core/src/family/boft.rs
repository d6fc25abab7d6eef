//! BOFT: butterfly rotations of the output rows, several sparse stages in a row.
//!
//! `oft_blocks` `[stages, num, n, n]` with `num n` outputs, zero at first; constraint
//! (`alpha`) and `rescale` as in [`Oft`](crate::Oft). Stage i groups rows that lie
//! `2^i n / 2` apart: rows `(c, 2, k)`, `k = 2^i n / 2`, are reordered to `(c, k, 2)`, cut
//! in blocks of n, each multiplied by its `R` (not transposed, unlike Diag-OFT), and put
//! back.
//!
//! A multiplier m means `I + m (R - I)` in every stage, as in LyCORIS; the web UI
//! interpolates the result instead, see [`Reading::boft_interpolate`]. Paper: Liu et al.
//! 2023. Fresh blocks have the largest even size up to the rank that divides the outputs
//! into a power of two.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use rand::RngCore;

use super::oft::{check_outputs, check_rescale, fresh_rescale, rescaled};
use super::{Entry, Fresh, Parts, cayley, precision};
use crate::Error;
use crate::adapter::{Adapter, Family, Reading};

pub(super) const ENTRY: Entry = Entry {
    family: Family::Boft,
    detect: |parts| parts.axes("oft_blocks") == Some(4),
    read,
    create,
};

/// Butterfly rotations of one layer.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::{Adapter, Boft};
/// let blocks = Tensor::new(&[[[[0f32, 0.], [1., 0.]]]], &Device::Cpu)?; // a quarter turn
/// let boft = Boft::new("fc", blocks, None, 0.0)?;
/// let base = Tensor::new(&[[1f32], [2.]], &Device::Cpu)?;
/// // W' = [[0, -1], [1, 0]] W = [-2, 1]
/// assert_eq!(boft.delta(&base, 1.0)?.to_vec2::<f32>()?, [[-3.], [-1.]]);
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Boft {
    blocks: Tensor,
    rescale: Option<Tensor>,
    constraint: f64,
    reading: Reading,
}

impl Boft {
    /// From the unconstrained blocks, the row factors and the constraint (0: none).
    /// `layer` is for messages.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the blocks make no butterfly or the factors do not
    /// fit.
    pub fn new(
        layer: &str,
        blocks: Tensor,
        rescale: Option<Tensor>,
        constraint: f64,
    ) -> crate::Result<Self> {
        let outputs = match *blocks.dims() {
            [stages, num, n, m] if n == m && fits(stages, num, n) => num * n,
            _ => {
                return Err(Error::ShapeMismatch {
                    layer: layer.into(),
                    tensor: "oft_blocks".into(),
                    expected: "[stages, blocks, size, size] with an even size and outputs that every stage divides".into(),
                    got: blocks.dims().to_vec(),
                });
            }
        };
        check_rescale(layer, rescale.as_ref(), outputs)?;
        Ok(Self {
            blocks,
            rescale,
            constraint,
            reading: Reading::default(),
        })
    }

    fn outputs(&self) -> usize {
        self.blocks.dims().iter().skip(1).take(2).product()
    }

    /// Rotates the rows of `[o, ..]`.
    fn turn(&self, rows: &Tensor, multiplier: f64) -> Result<Tensor> {
        let (stages, num, n, _) = self.blocks.dims4()?;
        let outputs = self.outputs();
        let blocks = self.blocks.to_dtype(rows.dtype())?;
        let rotations = cayley::rotations(
            &blocks,
            cayley::Bound::Positive(self.constraint * outputs as f64),
        )?;
        let rotations = cayley::interpolated(&rotations, multiplier)?;
        let columns = rows.elem_count() / outputs;
        let mut turned = rows.reshape((outputs, columns))?;
        for stage in 0..stages {
            let k = (n / 2) << stage;
            let groups = outputs / (2 * k);
            turned = turned
                .reshape((groups, 2, k, columns))?
                .transpose(1, 2)?
                .contiguous()?
                .reshape((num, n, columns))?;
            turned = rotations.get(stage)?.matmul(&turned)?;
            turned = turned
                .reshape((groups, k, 2, columns))?
                .transpose(1, 2)?
                .contiguous()?
                .reshape((outputs, columns))?;
        }
        rescaled(turned, self.rescale.as_ref())?.reshape(rows.shape())
    }
}

/// Whether every stage can pair its rows: `2^i n` divides the outputs.
fn fits(stages: usize, num: usize, n: usize) -> bool {
    let last = u32::try_from(stages.saturating_sub(1)).unwrap_or(u32::MAX);
    n >= 2
        && n.is_multiple_of(2)
        && num > 0
        && stages > 0
        && 1usize
            .checked_shl(last)
            .is_some_and(|span| span > 0 && num.is_multiple_of(span))
}

impl Adapter for Boft {
    fn family(&self) -> Family {
        Family::Boft
    }

    fn alpha(&self) -> Option<f64> {
        Some(self.constraint)
    }

    fn matrix_dims(&self) -> (usize, usize) {
        // The inputs are not known.
        (self.outputs(), 1)
    }

    fn check(&self, layer: &str, weight: &[usize]) -> crate::Result<()> {
        check_outputs(layer, &self.factors(), self.outputs(), weight)
    }

    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        let weight = base.to_dtype(precision(base))?;
        let delta = if self.reading.boft_interpolate {
            ((self.turn(&weight, 1.0)? - weight)? * multiplier)?
        } else {
            (self.turn(&weight, multiplier)? - weight)?
        };
        delta.to_dtype(base.dtype())
    }

    fn bias_delta(&self, bias: Option<&Tensor>, multiplier: f64) -> Result<Option<Tensor>> {
        let Some(bias) = bias.filter(|_| self.reading.through_bias) else {
            return Ok(None);
        };
        self.delta(bias, multiplier).map(Some)
    }

    fn factors(&self) -> Vec<(&'static str, &Tensor)> {
        let rescale = self.rescale.as_ref().map(|t| ("rescale", t));
        [("oft_blocks", &self.blocks)]
            .into_iter()
            .chain(rescale)
            .collect()
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Self {
            blocks: f(&self.blocks)?,
            rescale: self.rescale.as_ref().map(f).transpose()?,
            ..*self
        }))
    }

    fn norm(&self) -> Result<Option<f64>> {
        Ok(None)
    }

    fn read_as(&self, reading: &Reading) -> Option<Arc<dyn Adapter>> {
        Some(Arc::new(Self {
            reading: *reading,
            ..self.clone()
        }))
    }
}

fn read(parts: &mut Parts<'_>) -> crate::Result<Arc<dyn Adapter>> {
    let blocks = parts.require("oft_blocks")?;
    let rescale = parts.take("rescale");
    let constraint = parts.take_constraint()?;
    let boft = Boft::new(parts.layer, blocks, rescale, constraint)?;
    Ok(Arc::new(boft))
}

/// LyCORIS' block size and number of blocks: the largest even size up to `bound` that
/// divides `n` into a power of two.
fn power2_factorization(n: usize, bound: usize) -> Option<(usize, usize)> {
    let splits = |m: &usize| n.is_multiple_of(*m) && (n / m).is_power_of_two();
    (1..=bound.min(n) / 2)
        .rev()
        .map(|half| 2 * half)
        .find(splits)
        .map(|m| (m, n / m))
}

fn create(fresh: &Fresh<'_>, _rng: &mut dyn RngCore) -> crate::Result<Arc<dyn Adapter>> {
    let (o, _, _) = fresh.matrix()?;
    let Some((n, num)) = power2_factorization(o, fresh.rank) else {
        return Err(Error::BadValue {
            layer: fresh.layer.to_string(),
            name: "rank",
            value: fresh.rank.to_string(),
            expected: "expected a larger bound: no even block size up to it divides the outputs into a power of two",
        });
    };
    let stages = (num - 1).count_ones() as usize + 1;
    let blocks = Tensor::zeros((stages, num, n, n), DType::F32, fresh.device)?;
    let rescale = fresh_rescale(fresh, o)?;
    Ok(Boft::new(fresh.layer, blocks, rescale, fresh.config.constraint)?.trainable()?)
}

#[cfg(test)]
mod tests {
    use super::power2_factorization;

    #[test]
    fn block_sizes_of_sd15() {
        assert_eq!(power2_factorization(320, 10), Some((10, 32)));
        assert_eq!(power2_factorization(320, 9), None);
        assert_eq!(power2_factorization(768, 6), Some((6, 128)));
    }
}
