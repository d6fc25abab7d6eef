//! Diag-OFT: blocks of output rows are rotated; and sd-scripts' own OFT, its near twin.
//!
//! `oft_blocks` `[num, n, n]` with `num n` outputs, zero at first; `R` of each block is the
//! Cayley transform of `X - X^T`, and the rows of block k become `R_k^T` times themselves.
//! `alpha` is no scale but the constraint: above 0, the Frobenius norm of all skew blocks
//! together is held to `alpha * outputs`. Optional `rescale` `[o, 1]` or `[o, 1, 1, 1]`
//! multiplies the rows of the result. `oft_diag`, of older LyCORIS, holds the rotations
//! themselves and is read, not trained by the reference any more.
//!
//! A multiplier m means `R_m = I + m (R - I)`; `rescale` is not interpolated, as in
//! LyCORIS. The layer's bias stays; LyCORIS' bypass form rotates it too, see
//! [`Reading::through_bias`]. Paper: Qiu et al. 2023. Block sizes are
//! [`factorization`](crate::factorization) of the outputs with the rank as bound.
//!
//! sd-scripts' `networks.oft` writes the same keys behind `oft_unet_` instead of
//! `lora_unet_`. There the rank is the number of blocks, and the skew blocks are always
//! multiplied by `(min(n, c) + 1e-8) / (n + 1e-8)`, `n` being their norm and `c = alpha *
//! outputs`: an `alpha` of 0 holds them near zero instead of setting them free.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use rand::RngCore;

use super::{Entry, Fresh, Parts, cayley, factorization, precision};
use crate::Error;
use crate::adapter::{Adapter, Family, Reading, misfit};

pub(super) const ENTRY: Entry = Entry {
    family: Family::Oft,
    detect: |parts| {
        !parts.kohya_oft && (parts.axes("oft_blocks") == Some(3) || parts.has("oft_diag"))
    },
    read,
    create,
};

/// The table's row of sd-scripts' OFT.
pub(super) const KOHYA: Entry = Entry {
    family: Family::KohyaOft,
    detect: |parts| parts.kohya_oft && parts.axes("oft_blocks") == Some(3),
    read,
    create,
};

/// What the blocks of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blocks {
    /// Skew parts, as LyCORIS bounds them.
    Skew,
    /// Skew parts, as sd-scripts bounds them.
    Kohya,
    /// Rotations already (`oft_diag`).
    Rotations,
}

/// Block rotations of one layer.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::{Adapter, Oft};
/// let blocks = Tensor::new(&[[[0f32, 0.], [1., 0.]]], &Device::Cpu)?; // a quarter turn
/// let oft = Oft::new("fc", blocks, None, 0.0)?;
/// let base = Tensor::new(&[[1f32], [2.]], &Device::Cpu)?;
/// // W' = [[0, 1], [-1, 0]] W = [2, -1]
/// assert_eq!(oft.delta(&base, 1.0)?.to_vec2::<f32>()?, [[1.], [-3.]]);
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Oft {
    blocks: Tensor,
    kind: Blocks,
    rescale: Option<Tensor>,
    constraint: f64,
    reading: Reading,
}

impl Oft {
    /// From the unconstrained blocks, the row factors and the constraint (0: none).
    /// `layer` is for messages.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when blocks are not square or the factors do not fit.
    pub fn new(
        layer: &str,
        blocks: Tensor,
        rescale: Option<Tensor>,
        constraint: f64,
    ) -> crate::Result<Self> {
        let outputs = match *blocks.dims() {
            [num, n, m] if n == m && num * n > 0 => num * n,
            _ => {
                return Err(Error::ShapeMismatch {
                    layer: layer.into(),
                    tensor: "oft_blocks".into(),
                    expected: "[blocks, size, size]".into(),
                    got: blocks.dims().to_vec(),
                });
            }
        };
        check_rescale(layer, rescale.as_ref(), outputs)?;
        Ok(Self {
            blocks,
            kind: Blocks::Skew,
            rescale,
            constraint,
            reading: Reading::default(),
        })
    }

    /// The same as sd-scripts' `networks.oft` means it.
    pub fn kohya(self) -> Self {
        Self {
            kind: Blocks::Kohya,
            ..self
        }
    }

    fn outputs(&self) -> usize {
        self.blocks.dims().iter().take(2).product()
    }

    /// Rotates the rows of `[o, ..]`.
    fn turn(&self, rows: &Tensor, multiplier: f64) -> Result<Tensor> {
        let (num, n, _) = self.blocks.dims3()?;
        let blocks = self.blocks.to_dtype(rows.dtype())?;
        let limit = self.constraint * self.outputs() as f64;
        let rotation = match self.kind {
            Blocks::Rotations => blocks,
            Blocks::Skew => cayley::rotations(&blocks, cayley::Bound::Positive(limit))?,
            Blocks::Kohya => cayley::rotations(&blocks, cayley::Bound::Always(limit))?,
        };
        let rotation = cayley::interpolated(&rotation, multiplier)?
            .transpose(1, 2)?
            .contiguous()?;
        let turned = rotation.matmul(&rows.reshape((num, n, ()))?)?;
        rescaled(turned.reshape((self.outputs(), ()))?, self.rescale.as_ref())?
            .reshape(rows.shape())
    }
}

/// Row factors must be one per output.
pub(super) fn check_rescale(
    layer: &str,
    rescale: Option<&Tensor>,
    outputs: usize,
) -> crate::Result<()> {
    match rescale {
        Some(t) if t.elem_count() != outputs || t.dims().first() != Some(&outputs) => {
            Err(Error::ShapeMismatch {
                layer: layer.into(),
                tensor: "rescale".into(),
                expected: format!("[{outputs}, 1] or [{outputs}, 1, 1, 1]"),
                got: t.dims().to_vec(),
            })
        }
        _ => Ok(()),
    }
}

/// The rows of a matrix times the row factors.
pub(super) fn rescaled(rows: Tensor, rescale: Option<&Tensor>) -> Result<Tensor> {
    match rescale {
        None => Ok(rows),
        Some(t) => rows.broadcast_mul(&t.to_dtype(rows.dtype())?.reshape(((), 1))?),
    }
}

/// Row factors of a fresh adapter: ones, if wanted.
pub(super) fn fresh_rescale(fresh: &Fresh<'_>, outputs: usize) -> Result<Option<Tensor>> {
    let mut shape = vec![1; fresh.weight.len()];
    if let Some(size) = shape.first_mut() {
        *size = outputs;
    }
    fresh
        .config
        .rescaled
        .then(|| Tensor::ones(shape, DType::F32, fresh.device))
        .transpose()
}

impl Adapter for Oft {
    fn family(&self) -> Family {
        match self.kind {
            Blocks::Kohya => Family::KohyaOft,
            _ => Family::Oft,
        }
    }

    fn alpha(&self) -> Option<f64> {
        (self.kind != Blocks::Rotations).then_some(self.constraint)
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
        (self.turn(&weight, multiplier)? - weight)?.to_dtype(base.dtype())
    }

    fn bias_delta(&self, bias: Option<&Tensor>, multiplier: f64) -> Result<Option<Tensor>> {
        let Some(bias) = bias.filter(|_| self.reading.through_bias) else {
            return Ok(None);
        };
        self.delta(bias, multiplier).map(Some)
    }

    fn factors(&self) -> Vec<(&'static str, &Tensor)> {
        let name = match self.kind {
            Blocks::Rotations => "oft_diag",
            _ => "oft_blocks",
        };
        let rescale = self.rescale.as_ref().map(|t| ("rescale", t));
        [(name, &self.blocks)].into_iter().chain(rescale).collect()
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

/// The layer must have as many outputs as the blocks rotate.
pub(super) fn check_outputs(
    layer: &str,
    factors: &[(&'static str, &Tensor)],
    outputs: usize,
    weight: &[usize],
) -> crate::Result<()> {
    if weight.first() == Some(&outputs) {
        return Ok(());
    }
    Err(misfit(layer, factors, weight, vec![outputs]))
}

fn read(parts: &mut Parts<'_>) -> crate::Result<Arc<dyn Adapter>> {
    let rescale = parts.take("rescale");
    let constraint = parts.take_constraint()?;
    if let Some(rotations) = parts.take("oft_diag") {
        let oft = Oft::new(parts.layer, rotations, rescale, 0.0)?;
        return Ok(Arc::new(Oft {
            kind: Blocks::Rotations,
            ..oft
        }));
    }
    let blocks = parts.require("oft_blocks")?;
    let oft = Oft::new(parts.layer, blocks, rescale, constraint)?;
    Ok(Arc::new(if parts.kohya_oft { oft.kohya() } else { oft }))
}

fn create(fresh: &Fresh<'_>, _rng: &mut dyn RngCore) -> crate::Result<Arc<dyn Adapter>> {
    let (o, _, _) = fresh.matrix()?;
    let kohya = fresh.config.family == Family::KohyaOft;
    let (n, num) = if !kohya {
        factorization(o, i64::try_from(fresh.rank).unwrap_or(i64::MAX))
    } else if o.is_multiple_of(fresh.rank) {
        (o / fresh.rank, fresh.rank)
    } else {
        return Err(Error::BadValue {
            layer: fresh.layer.to_string(),
            name: "rank",
            value: fresh.rank.to_string(),
            expected: "expected a number of blocks that divides the layer's outputs",
        });
    };
    let blocks = Tensor::zeros((num, n, n), DType::F32, fresh.device)?;
    let rescale = fresh_rescale(fresh, o)?;
    let oft = Oft::new(fresh.layer, blocks, rescale, fresh.config.constraint)?;
    Ok(if kohya { oft.kohya() } else { oft }.trainable()?)
}
