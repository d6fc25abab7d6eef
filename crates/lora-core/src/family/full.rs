//! Full: `delta = multiplier * diff`, `bias delta = multiplier * diff_b`.
//!
//! `diff` has the shape of the layer's weight, `diff_b` that of its bias; either may be
//! missing. No rank; an `alpha` beside them means nothing. The format of LyCORIS, whose
//! trainer moves the absolute weight and writes the difference to the original; here the
//! difference itself is trained, from zero, which has the same gradients.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use rand::RngCore;

use super::{Entry, Fresh, Parts, scaled_like};
use crate::Error;
use crate::adapter::{Adapter, Family, misfit, multiply};

pub(super) const ENTRY: Entry = Entry {
    family: Family::Full,
    detect: |parts| parts.has("diff") || parts.has("diff_b"),
    read,
    create,
};

/// A layer's whole weight difference, or that of its bias alone.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::{Adapter, Full};
/// let diff = Tensor::new(&[[2f32, 4.]], &Device::Cpu)?;
/// let full = Full::new("fc", diff.clone(), Some(Tensor::new(&[6f32], &Device::Cpu)?))?;
/// assert_eq!(full.delta(&diff.zeros_like()?, 0.5)?.to_vec2::<f32>()?, [[1., 2.]]);
/// let bias = Tensor::new(&[0f32], &Device::Cpu)?;
/// assert_eq!(full.bias_delta(Some(&bias), 0.5)?.unwrap().to_vec1::<f32>()?, [3.]);
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Full {
    diff: Option<Tensor>,
    bias: Option<Tensor>,
}

impl Full {
    /// From the differences of weight and bias. `layer` is for messages.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the two disagree about the number of outputs.
    pub fn new(layer: &str, diff: Tensor, bias: Option<Tensor>) -> crate::Result<Self> {
        Self::checked(layer, Some(diff), bias)
    }

    /// The difference of a bias alone, `[o]`. `layer` is for messages.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when it is not a row.
    pub fn bias_alone(layer: &str, bias: Tensor) -> crate::Result<Self> {
        Self::checked(layer, None, Some(bias))
    }

    fn checked(layer: &str, diff: Option<Tensor>, bias: Option<Tensor>) -> crate::Result<Self> {
        let mismatch = |tensor: &str, expected: &str, got: &Tensor| {
            Err(Error::ShapeMismatch {
                layer: layer.into(),
                tensor: tensor.into(),
                expected: expected.into(),
                got: got.dims().to_vec(),
            })
        };
        if let Some(diff) = diff
            .as_ref()
            .filter(|t| t.rank() == 0 || t.elem_count() == 0)
        {
            return mismatch("diff", "the shape of the layer's weight", diff);
        }
        let outputs = diff.as_ref().and_then(|t| t.dims().first().copied());
        match &bias {
            Some(bias)
                if bias.rank() != 1
                    || bias.elem_count() == 0
                    || outputs.is_some_and(|o| o != bias.elem_count()) =>
            {
                mismatch("diff_b", "one value per output", bias)
            }
            _ => Ok(Self { diff, bias }),
        }
    }
}

impl Adapter for Full {
    fn family(&self) -> Family {
        Family::Full
    }

    fn matrix_dims(&self) -> (usize, usize) {
        match (&self.diff, &self.bias) {
            (Some(diff), _) => {
                let outputs = diff.dims().first().copied().unwrap_or(1).max(1);
                (outputs, diff.elem_count() / outputs)
            }
            // The inputs are not known.
            (None, bias) => (bias.as_ref().map_or(0, Tensor::elem_count), 1),
        }
    }

    fn check(&self, layer: &str, weight: &[usize]) -> crate::Result<()> {
        let (o, i) = self.matrix_dims();
        let inputs = weight.iter().skip(1).product::<usize>();
        if weight.first() == Some(&o) && (self.diff.is_none() || inputs == i) {
            return Ok(());
        }
        Err(misfit(layer, &self.factors(), weight, vec![o, i]))
    }

    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        match &self.diff {
            Some(diff) => scaled_like(diff, base, multiplier),
            None => base.zeros_like(),
        }
    }

    fn bias_delta(&self, bias: Option<&Tensor>, multiplier: f64) -> Result<Option<Tensor>> {
        self.bias
            .as_ref()
            .map(|diff| scaled_like(diff, bias.unwrap_or(diff), multiplier))
            .transpose()
    }

    fn factors(&self) -> Vec<(&'static str, &Tensor)> {
        let diff = self.diff.as_ref().map(|t| ("diff", t));
        let bias = self.bias.as_ref().map(|t| ("diff_b", t));
        diff.into_iter().chain(bias).collect()
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Self {
            diff: self.diff.as_ref().map(&mut *f).transpose()?,
            bias: self.bias.as_ref().map(f).transpose()?,
        }))
    }

    fn norm(&self) -> Result<Option<f64>> {
        let Some(diff) = &self.diff else {
            return Ok(None);
        };
        let diff = diff.detach().to_dtype(DType::F64)?;
        Ok(Some(diff.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()))
    }

    fn rescale(&self, ratio: f64) -> Result<f64> {
        multiply(self.vars(), ratio)?;
        Ok(ratio)
    }
}

fn read(parts: &mut Parts<'_>) -> crate::Result<Arc<dyn Adapter>> {
    let (diff, bias) = (parts.take("diff"), parts.take("diff_b"));
    parts.ignore("alpha", "a whole difference has no rank to scale by");
    Ok(Arc::new(Full::checked(parts.layer, diff, bias)?))
}

fn create(fresh: &Fresh<'_>, _rng: &mut dyn RngCore) -> crate::Result<Arc<dyn Adapter>> {
    let zeros = |t: &Tensor| Tensor::zeros(t.shape(), DType::F32, fresh.device);
    let bias = fresh.base.bias.as_ref().map(zeros).transpose()?;
    let full = Full::new(fresh.layer, zeros(&fresh.base.weight)?, bias)?;
    Ok(full.trainable()?)
}
