//! GLoRA: `delta = multiplier * alpha / rank * (W (a1 a2) + b1 b2)`.
//!
//! | layer | `a1.weight` | `a2.weight` | `b1.weight` | `b2.weight` |
//! |---|---|---|---|---|
//! | linear | `[i, r]` | `[r, i]` | `[o, r]` | `[r, i]` |
//! | convolution | `[i, r, 1, 1]` | `[r, i, 1, 1]` | `[o, r, 1, 1]` | `[r, i, kh, kw]` |
//!
//! plus `alpha`. In the product with `W`, the input channels are summed at every tap of a
//! kernel. Older LyCORIS wrote each pair the other way round (`a1` `[r, i]`, `a2` `[i, r]`,
//! `b1` `[r, i]`, `b2` `[o, r]`); such files are known by their shapes and written in the
//! new order. Paper: Chavan et al. 2023. Fresh factors: `a1`, `b1` from `U(-b, b)`,
//! `b = 1 / sqrt(fan_in)`, `a2` and `b2` zero.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::RngCore;

use super::{Entry, Fresh, Parts, precision, variable};
use crate::adapter::{Adapter, Family, var};
use crate::{Error, init};

pub(super) const ENTRY: Entry = Entry {
    family: Family::Glora,
    detect: |parts| parts.has("a1.weight"),
    read,
    create,
};

const NAMES: [&str; 4] = ["a1.weight", "a2.weight", "b1.weight", "b2.weight"];

/// Factors of one layer's GLoRA.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::{Adapter, Glora};
/// let row = |a: f32, b: f32| Tensor::new(&[[a, b]], &Device::Cpu);
/// let a = [row(1., 2.)?.t()?, row(1., 1.)?];
/// let b = [Tensor::new(&[[1f32]], &Device::Cpu)?, row(5., 7.)?];
/// let glora = Glora::new("fc", a, b, 1.0)?;
/// // W (a1 a2) = [[10 + 40, 10 + 40]], b1 b2 = [[5, 7]]
/// assert_eq!(glora.delta(&row(10., 20.)?, 1.0)?.to_vec2::<f32>()?, [[55., 57.]]);
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Glora {
    factors: [Tensor; 4],
    rank: usize,
    alpha: f64,
}

impl Glora {
    /// From the pairs `[a1, a2]` and `[b1, b2]`, in the new or the old order.
    /// `layer` is for messages.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the factors fit neither.
    pub fn new(layer: &str, a: [Tensor; 2], b: [Tensor; 2], alpha: f64) -> crate::Result<Self> {
        let ([a1, a2], [b1, b2]) = (a, b);
        let size = |t: &Tensor, axis: usize| t.dims().get(axis).copied().unwrap_or(0);
        let rank_new = size(&a1, 1);
        let rank_old = size(&a1, 0);
        let agree = |rank: usize, others: [usize; 3]| rank > 0 && others == [rank; 3];
        let new = agree(rank_new, [size(&a2, 0), size(&b1, 1), size(&b2, 0)]);
        let old = agree(rank_old, [size(&a2, 1), size(&b1, 0), size(&b2, 1)]);
        let (factors, rank) = if old && !new {
            ([a2, a1, b2, b1], rank_old)
        } else {
            ([a1, a2, b1, b2], rank_new)
        };
        let inputs = size(&factors[0], 0);
        let sound = (new || old)
            && size(&factors[1], 1) == inputs
            && size(&factors[3], 1) == inputs
            && factors.iter().all(|t| t.elem_count() > 0)
            && factors.iter().all(|t| matches!(t.rank(), 2 | 4))
            && factors[..3]
                .iter()
                .all(|t| t.dims().iter().skip(2).all(|n| *n == 1));
        if sound {
            return Ok(Self {
                factors,
                rank,
                alpha,
            });
        }
        let shapes: Vec<&[usize]> = factors.iter().map(Tensor::dims).collect();
        Err(Error::ShapeMismatch {
            layer: layer.into(),
            tensor: "a1.weight".into(),
            expected: format!("factors that share rank and inputs, a1 a2 b1 b2 are {shapes:?}"),
            got: factors[0].dims().to_vec(),
        })
    }

    fn named(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        NAMES.into_iter().zip(&self.factors)
    }

    /// A factor as a matrix: its first axis by the rest.
    fn matrix(&self, index: usize, dtype: DType) -> Result<Tensor> {
        self.factors[index].to_dtype(dtype)?.flatten_from(1)
    }
}

impl Adapter for Glora {
    fn family(&self) -> Family {
        Family::Glora
    }

    fn rank(&self) -> Option<usize> {
        Some(self.rank)
    }

    fn alpha(&self) -> Option<f64> {
        Some(self.alpha)
    }

    fn matrix_dims(&self) -> (usize, usize) {
        let [_, _, b1, b2] = &self.factors;
        (b1.elem_count() / self.rank, b2.elem_count() / self.rank)
    }

    fn check(&self, layer: &str, weight: &[usize]) -> crate::Result<()> {
        let (o, i) = self.matrix_dims();
        let inputs = self.factors[0].elem_count() / self.rank;
        if weight.first() == Some(&o)
            && weight.get(1) == Some(&inputs)
            && weight.iter().skip(1).product::<usize>() == i
        {
            return Ok(());
        }
        Err(Error::ShapeMismatch {
            layer: layer.into(),
            tensor: "b1 b2".into(),
            expected: format!("the size of the layer's weight {weight:?}"),
            got: vec![o, i],
        })
    }

    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        let dtype = precision(base);
        let weight = base.to_dtype(dtype)?;
        let mix = self.matrix(0, dtype)?.matmul(&self.matrix(1, dtype)?)?;
        let (o, i) = (weight.dim(0)?, weight.dim(1)?);
        let taps = weight.elem_count() / (o * i).max(1);
        // [o, i, k] -> [o k, i], so that one product sums the inputs of every tap.
        let rows = weight
            .reshape((o, i, taps))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((o * taps, i))?;
        let mixed = rows
            .matmul(&mix)?
            .reshape((o, taps, i))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((o, i * taps))?;
        let plain = self.matrix(2, dtype)?.matmul(&self.matrix(3, dtype)?)?;
        let scale = self.alpha / self.rank as f64 * multiplier;
        ((mixed + plain)? * scale)?
            .reshape(base.shape())?
            .to_dtype(base.dtype())
    }

    fn vars(&self) -> Vec<(&'static str, Var)> {
        self.named()
            .filter_map(|(name, t)| Some((name, var(t)?)))
            .collect()
    }

    fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let alpha = Tensor::new(self.alpha as f32, &Device::Cpu)?;
        Ok(self
            .named()
            .map(|(name, t)| (name, t.clone()))
            .chain([("alpha", alpha)])
            .collect())
    }

    fn trainable(&self) -> Result<Arc<dyn Adapter>> {
        let [a1, a2, b1, b2] = &self.factors;
        Ok(Arc::new(Self {
            factors: [variable(a1)?, variable(a2)?, variable(b1)?, variable(b2)?],
            ..*self
        }))
    }

    fn norm(&self) -> Result<Option<f64>> {
        Ok(None)
    }
}

fn read(parts: &mut Parts<'_>) -> crate::Result<Arc<dyn Adapter>> {
    let [a1, a2, b1, b2] = NAMES;
    let a = [parts.require(a1)?, parts.require(a2)?];
    let b = [parts.require(b1)?, parts.require(b2)?];
    let mut glora = Glora::new(parts.layer, a, b, 0.0)?;
    glora.alpha = parts.take_alpha(glora.rank)?;
    Ok(Arc::new(glora))
}

fn create(fresh: &Fresh<'_>, rng: &mut dyn RngCore) -> crate::Result<Arc<dyn Adapter>> {
    let (o, i, (kh, kw)) = fresh.matrix()?;
    let r = fresh.rank;
    let shape = |m: usize, n: usize, kernel: (usize, usize)| match fresh.weight.len() {
        2 => vec![m, n],
        _ => vec![m, n, kernel.0, kernel.1],
    };
    let bound = 1.0 / (r as f64).sqrt();
    let mut uniform = |m: usize| init::uniform(&shape(m, r, (1, 1)), bound, rng, fresh.device);
    let (a1, b1) = (uniform(i)?, uniform(o)?);
    let zeros = |kernel| Tensor::zeros(shape(r, i, kernel), DType::F32, fresh.device);
    let (a2, b2) = (zeros((1, 1))?, zeros((kh, kw))?);
    Ok(Glora::new(fresh.layer, [a1, a2], [b1, b2], fresh.alpha)?.trainable()?)
}
