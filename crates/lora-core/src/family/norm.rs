//! Normalization layers: `gamma' = gamma + multiplier * w_norm`,
//! `beta' = beta + multiplier * b_norm`, all of shape `[channels]`.
//!
//! LyCORIS' `train_norm`, for layer and group norms; both start at zero. `b_norm` may be
//! missing in a file.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use rand::RngCore;

use super::{Entry, Fresh, Parts, scaled_like};
use crate::Error;
use crate::adapter::{Adapter, Family, multiply};

pub(super) const ENTRY: Entry = Entry {
    family: Family::Norm,
    detect: |parts| parts.has("w_norm"),
    read,
    create,
};

/// Changes of a normalization layer's weight and bias.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::{Adapter, Norm};
/// let row = |a: f32, b: f32| Tensor::new(&[a, b], &Device::Cpu);
/// let norm = Norm::new("norm", row(2., 4.)?, Some(row(6., 8.)?))?;
/// assert_eq!(norm.delta(&row(1., 1.)?, 0.5)?.to_vec1::<f32>()?, [1., 2.]);
/// let beta = norm.bias_delta(Some(&row(0., 0.)?), 0.5)?.unwrap();
/// assert_eq!(beta.to_vec1::<f32>()?, [3., 4.]);
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Norm {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Norm {
    /// From the two changes. `layer` is for messages.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when they are not rows of one length.
    pub fn new(layer: &str, weight: Tensor, bias: Option<Tensor>) -> crate::Result<Self> {
        let mismatch = |tensor: &str, expected: &str, got: &Tensor| {
            Err(Error::ShapeMismatch {
                layer: layer.into(),
                tensor: tensor.into(),
                expected: expected.into(),
                got: got.dims().to_vec(),
            })
        };
        if weight.rank() != 1 || weight.elem_count() == 0 {
            return mismatch("w_norm", "[channels]", &weight);
        }
        match &bias {
            Some(bias) if bias.dims() != weight.dims() => {
                mismatch("b_norm", "the shape of w_norm", bias)
            }
            _ => Ok(Self { weight, bias }),
        }
    }
}

impl Adapter for Norm {
    fn family(&self) -> Family {
        Family::Norm
    }

    fn matrix_dims(&self) -> (usize, usize) {
        (self.weight.elem_count(), 1)
    }

    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        scaled_like(&self.weight, base, multiplier)
    }

    fn bias_delta(&self, bias: Option<&Tensor>, multiplier: f64) -> Result<Option<Tensor>> {
        self.bias
            .as_ref()
            .map(|change| scaled_like(change, bias.unwrap_or(change), multiplier))
            .transpose()
    }

    fn factors(&self) -> Vec<(&'static str, &Tensor)> {
        let bias = self.bias.as_ref().map(|bias| ("b_norm", bias));
        [("w_norm", &self.weight)].into_iter().chain(bias).collect()
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Self {
            weight: f(&self.weight)?,
            bias: self.bias.as_ref().map(f).transpose()?,
        }))
    }

    fn rescale(&self, ratio: f64) -> Result<f64> {
        multiply(self.vars(), ratio)?;
        Ok(ratio)
    }
}

fn read(parts: &mut Parts<'_>) -> crate::Result<Arc<dyn Adapter>> {
    let weight = parts.require("w_norm")?;
    let bias = parts.take("b_norm");
    Ok(Arc::new(Norm::new(parts.layer, weight, bias)?))
}

fn create(fresh: &Fresh<'_>, _rng: &mut dyn RngCore) -> crate::Result<Arc<dyn Adapter>> {
    let zeros = |t: &Tensor| Tensor::zeros(t.shape(), DType::F32, fresh.device);
    let bias = fresh.base.bias.as_ref().map(zeros).transpose()?;
    let norm = Norm::new(fresh.layer, zeros(&fresh.base.weight)?, bias)?;
    Ok(norm.trainable()?)
}
