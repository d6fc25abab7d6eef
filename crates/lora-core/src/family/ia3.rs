//! (IA)^3: `delta = multiplier * weight o W`, one learned factor per output or per input.
//!
//! `weight` `[o]` or `[i]` for a linear layer, `[1, o, 1, 1]` or `[1, i, 1, 1]` for a
//! convolution, zero at first; `on_input`, an integer, says which. Paper: Liu et al. 2022;
//! files as LyCORIS writes them. Factors on outputs leave the layer's bias alone; LyCORIS'
//! bypass form scales it too, see [`Reading::through_bias`].

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use rand::RngCore;

use super::{Entry, Fresh, Parts, precision};
use crate::Error;
use crate::adapter::{Adapter, Family, Reading, misfit};

pub(super) const ENTRY: Entry = Entry {
    family: Family::Ia3,
    detect: |parts| parts.has("on_input"),
    read,
    create,
};

/// Factors on a layer's outputs or inputs.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::{Adapter, Ia3};
/// let base = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let ia3 = Ia3::new("fc", Tensor::new(&[10f32, 100.], &Device::Cpu)?, false)?;
/// assert_eq!(ia3.delta(&base, 1.0)?.to_vec2::<f32>()?, [[10., 20.], [300., 400.]]);
/// let ia3 = Ia3::new("fc", Tensor::new(&[10f32, 100.], &Device::Cpu)?, true)?;
/// assert_eq!(ia3.delta(&base, 1.0)?.to_vec2::<f32>()?, [[10., 200.], [30., 400.]]);
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Ia3 {
    weight: Tensor,
    on_input: bool,
    reading: Reading,
}

impl Ia3 {
    /// From the factors. `layer` is for messages.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when they are not a row.
    pub fn new(layer: &str, weight: Tensor, on_input: bool) -> crate::Result<Self> {
        match *weight.dims() {
            [n] | [1, n, 1, 1] if n > 0 => Ok(Self {
                weight,
                on_input,
                reading: Reading::default(),
            }),
            _ => Err(Error::ShapeMismatch {
                layer: layer.into(),
                tensor: "weight".into(),
                expected: "[channels] or [1, channels, 1, 1]".into(),
                got: weight.dims().to_vec(),
            }),
        }
    }
}

impl Adapter for Ia3 {
    fn family(&self) -> Family {
        Family::Ia3
    }

    fn matrix_dims(&self) -> (usize, usize) {
        // Only one of the two is known.
        match self.on_input {
            true => (1, self.weight.elem_count()),
            false => (self.weight.elem_count(), 1),
        }
    }

    fn check(&self, layer: &str, weight: &[usize]) -> crate::Result<()> {
        let axis = usize::from(self.on_input);
        let count = self.weight.elem_count();
        if weight.len() >= 2 && weight.get(axis) == Some(&count) {
            return Ok(());
        }
        Err(misfit(layer, &self.factors(), weight, vec![count]))
    }

    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        let axis = usize::from(self.on_input);
        let mut shape = vec![1; base.rank()];
        if let Some(size) = shape.get_mut(axis) {
            *size = self.weight.elem_count();
        }
        let dtype = precision(base);
        let factors = (self.weight.to_dtype(dtype)?.reshape(shape)? * multiplier)?;
        base.to_dtype(dtype)?
            .broadcast_mul(&factors)?
            .to_dtype(base.dtype())
    }

    fn bias_delta(&self, bias: Option<&Tensor>, multiplier: f64) -> Result<Option<Tensor>> {
        match bias {
            Some(bias) if self.reading.through_bias && !self.on_input => {
                let factors = self.weight.flatten_all()?.to_dtype(bias.dtype())?;
                Ok(Some(((bias * factors)? * multiplier)?))
            }
            _ => Ok(None),
        }
    }

    fn factors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("weight", &self.weight)]
    }

    fn constants(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let on_input = Tensor::new(i64::from(self.on_input), &Device::Cpu)?;
        Ok(vec![("on_input", on_input)])
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Self {
            weight: f(&self.weight)?,
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
    let weight = parts.require("weight")?;
    let on_input = parts.take_number("on_input")?.unwrap_or(0.0) != 0.0;
    parts.ignore("alpha", "(IA)^3 has no rank to scale by");
    Ok(Arc::new(Ia3::new(parts.layer, weight, on_input)?))
}

fn create(fresh: &Fresh<'_>, _rng: &mut dyn RngCore) -> crate::Result<Arc<dyn Adapter>> {
    let (o, i, _) = fresh.matrix()?;
    let on_input = fresh.config.train_on_input;
    let n = if on_input { i } else { o };
    let shape = match fresh.weight.len() {
        2 => vec![n],
        _ => vec![1, n, 1, 1],
    };
    let weight = Tensor::zeros(shape, DType::F32, fresh.device)?;
    Ok(Ia3::new(fresh.layer, weight, on_input)?.trainable()?)
}
