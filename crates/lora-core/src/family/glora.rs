//! GLoRA: `delta = multiplier * alpha / rank * (W (a1 a2) + b1 b2)`.
//!
//! | layer | `a1.weight` | `a2.weight` | `b1.weight` | `b2.weight` |
//! |---|---|---|---|---|
//! | linear | `[i, r]` | `[r, i]` | `[o, r]` | `[r, i]` |
//! | convolution | `[i, r, 1, 1]` | `[r, i, 1, 1]` | `[o, r, 1, 1]` | `[r, i, kh, kw]` |
//!
//! plus `alpha`. With a Tucker core `bm.weight` `[r, r, kh, kw]`, `b2.weight` is
//! `[r, i, 1, 1]` and the second product `b1 bm b2`; LyCORIS defines it, its trainers never
//! write it. In the product with `W`, the input channels are summed at every tap of a
//! kernel. Older LyCORIS wrote each pair the other way round (`a1` `[r, i]`, `a2` `[i, r]`,
//! `b1` `[r, i]`, `b2` `[o, r]`); such files are known by their shapes and written in the
//! new order. Paper: Chavan et al. 2023. Fresh factors: `a1`, `b1` from `U(-b, b)`,
//! `b = 1 / sqrt(fan_in)`, `a2` and `b2` zero.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use rand::RngCore;

use super::{Entry, Fresh, Parts, core_times, fold, kernel_of, precision, scaled_like};
use crate::adapter::{Adapter, Family, misfit};
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
    /// a1, a2, b1, b2.
    factors: [Tensor; 4],
    core: Option<Tensor>,
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
                core: None,
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

    /// The same with a Tucker core between `b1` and `b2`. `layer` is for messages.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the core does not fit the other factors.
    pub fn with_core(self, layer: &str, core: Tensor) -> crate::Result<Self> {
        let r = self.rank;
        let pointwise = self.factors[3].elem_count() == self.factors[0].elem_count();
        if pointwise && matches!(*core.dims(), [p, q, kh, kw] if p == r && q == r && kh * kw > 0) {
            return Ok(Self {
                core: Some(core),
                ..self
            });
        }
        Err(Error::ShapeMismatch {
            layer: layer.into(),
            tensor: "bm.weight".into(),
            expected: format!("[{r}, {r}, kh, kw] beside a b2.weight of [{r}, inputs, 1, 1]"),
            got: core.dims().to_vec(),
        })
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
        let taps = self.kernel().filter(|_| self.core.is_some());
        let taps = taps.map_or(1, |(kh, kw)| kh * kw);
        (
            b1.elem_count() / self.rank,
            b2.elem_count() / self.rank * taps,
        )
    }

    fn kernel(&self) -> Option<(usize, usize)> {
        kernel_of(self.core.as_ref().unwrap_or(&self.factors[3]))
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
        Err(misfit(layer, &self.factors(), weight, vec![o, i]))
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
        let right = match &self.core {
            None => self.matrix(3, dtype)?,
            Some(core) => core_times(&core.to_dtype(dtype)?, &self.matrix(3, dtype)?)?,
        };
        let plain = self.matrix(2, dtype)?.matmul(&right)?;
        scaled_like(&(mixed + plain)?, base, self.scale() * multiplier)
    }

    fn factors(&self) -> Vec<(&'static str, &Tensor)> {
        let core = self.core.as_ref().map(|core| ("bm.weight", core));
        NAMES.into_iter().zip(&self.factors).chain(core).collect()
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Arc<dyn Adapter>> {
        let [a1, a2, b1, b2] = &self.factors;
        Ok(Arc::new(Self {
            factors: [f(a1)?, f(a2)?, f(b1)?, f(b2)?],
            core: self.core.as_ref().map(f).transpose()?,
            ..*self
        }))
    }

    fn norm(&self) -> Result<Option<f64>> {
        Ok(None)
    }
}

fn read(parts: &mut Parts<'_>) -> crate::Result<Arc<dyn Adapter>> {
    let [a1, a2, b1, b2] = NAMES;
    let scalar = parts.take_scalar()?;
    let a = [parts.require(a1)?, fold(parts.require(a2)?, scalar)?];
    let b = [parts.require(b1)?, fold(parts.require(b2)?, scalar)?];
    let mut glora = Glora::new(parts.layer, a, b, 0.0)?;
    if let Some(core) = parts.take("bm.weight") {
        glora = glora.with_core(parts.layer, core)?;
    }
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
