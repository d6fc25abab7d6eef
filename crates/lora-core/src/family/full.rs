//! Full: `delta = multiplier * diff`, `bias delta = multiplier * diff_b`.
//!
//! `diff` has the shape of the layer's weight, `diff_b` that of its bias; `diff_b` may
//! be missing. No rank, no `alpha`. The format of LyCORIS, whose trainer moves the
//! absolute weight and writes the difference to the original; here the difference itself
//! is trained, from zero, which has the same gradients.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor, Var};
use rand::RngCore;

use super::{Entry, Fresh, Parts, scaled_like, variable};
use crate::Error;
use crate::adapter::{Adapter, Family, var};

pub(super) const ENTRY: Entry = Entry {
    family: Family::Full,
    detect: |parts| parts.has("diff"),
    read,
    create,
};

/// A layer's whole weight difference.
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
    diff: Tensor,
    bias: Option<Tensor>,
}

impl Full {
    /// From the differences of weight and bias. `layer` is for messages.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the two disagree about the number of outputs.
    pub fn new(layer: &str, diff: Tensor, bias: Option<Tensor>) -> crate::Result<Self> {
        let mismatch = |tensor: &str, expected: String, got: &Tensor| {
            Err(Error::ShapeMismatch {
                layer: layer.into(),
                tensor: tensor.into(),
                expected,
                got: got.dims().to_vec(),
            })
        };
        let Some(&outputs) = diff.dims().first().filter(|_| diff.elem_count() > 0) else {
            return mismatch("diff", "the shape of the layer's weight".into(), &diff);
        };
        match &bias {
            Some(bias) if bias.dims() != [outputs] => {
                mismatch("diff_b", format!("[{outputs}]"), bias)
            }
            _ => Ok(Self { diff, bias }),
        }
    }

    fn factors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let bias = self.bias.as_ref().map(|bias| ("diff_b", bias));
        [("diff", &self.diff)].into_iter().chain(bias)
    }
}

impl Adapter for Full {
    fn family(&self) -> Family {
        Family::Full
    }

    fn rank(&self) -> Option<usize> {
        None
    }

    fn alpha(&self) -> Option<f64> {
        None
    }

    fn matrix_dims(&self) -> (usize, usize) {
        let outputs = self.diff.dims().first().copied().unwrap_or(1).max(1);
        (outputs, self.diff.elem_count() / outputs)
    }

    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        scaled_like(&self.diff, base, multiplier)
    }

    fn bias_delta(&self, bias: Option<&Tensor>, multiplier: f64) -> Result<Option<Tensor>> {
        self.bias
            .as_ref()
            .map(|diff| scaled_like(diff, bias.unwrap_or(diff), multiplier))
            .transpose()
    }

    fn vars(&self) -> Vec<(&'static str, Var)> {
        self.factors()
            .filter_map(|(name, t)| Some((name, var(t)?)))
            .collect()
    }

    fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>> {
        Ok(self.factors().map(|(name, t)| (name, t.clone())).collect())
    }

    fn trainable(&self) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Self {
            diff: variable(&self.diff)?,
            bias: self.bias.as_ref().map(variable).transpose()?,
        }))
    }

    fn rescale(&self, ratio: f64) -> Result<f64> {
        for (_, var) in self.vars() {
            var.set(&(var.as_detached_tensor() * ratio)?)?;
        }
        Ok(ratio)
    }
}

fn read(parts: &mut Parts<'_>) -> crate::Result<Arc<dyn Adapter>> {
    let diff = parts.require("diff")?;
    let bias = parts.take("diff_b");
    Ok(Arc::new(Full::new(parts.layer, diff, bias)?))
}

fn create(fresh: &Fresh<'_>, _rng: &mut dyn RngCore) -> crate::Result<Arc<dyn Adapter>> {
    let zeros = |t: &Tensor| Tensor::zeros(t.shape(), DType::F32, fresh.device);
    let bias = fresh.base.bias.as_ref().map(zeros).transpose()?;
    let full = Full::new(fresh.layer, zeros(&fresh.base.weight)?, bias)?;
    Ok(full.trainable()?)
}
