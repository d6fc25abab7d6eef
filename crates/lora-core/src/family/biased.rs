//! `diff_b` beside the parts of another family: a bias change that comes with any
//! adapter, `bias delta = multiplier * diff_b` on top of the family's own.
//!
//! Some trainers and extraction tools write it; ComfyUI honours it with every family.

use std::sync::Arc;

use candle_core::{Result, Tensor, Var};

use super::{Parts, scaled_like, variable};
use crate::Error;
use crate::adapter::{Adapter, Family, Reading, var};
use crate::control::Pass;
use crate::layer::{BaseLayer, LayerOp};

/// An adapter of any family, and a bias change.
#[derive(Debug, Clone)]
struct Biased {
    inner: Arc<dyn Adapter>,
    bias: Tensor,
}

/// Adds the file's `diff_b`, if there is one left over, to an adapter.
pub(super) fn with_bias(
    inner: Arc<dyn Adapter>,
    parts: &mut Parts<'_>,
) -> crate::Result<Arc<dyn Adapter>> {
    let Some(bias) = parts.take("diff_b") else {
        return Ok(inner);
    };
    if bias.rank() != 1 || bias.elem_count() == 0 {
        return Err(mismatch(parts.layer, "[outputs]".into(), &bias));
    }
    Ok(Arc::new(Biased { inner, bias }))
}

fn mismatch(layer: &str, expected: String, got: &Tensor) -> Error {
    Error::ShapeMismatch {
        layer: layer.into(),
        tensor: "diff_b".into(),
        expected,
        got: got.dims().to_vec(),
    }
}

impl Adapter for Biased {
    fn family(&self) -> Family {
        self.inner.family()
    }

    fn rank(&self) -> Option<usize> {
        self.inner.rank()
    }

    fn alpha(&self) -> Option<f64> {
        self.inner.alpha()
    }

    fn matrix_dims(&self) -> (usize, usize) {
        self.inner.matrix_dims()
    }

    fn check(&self, layer: &str, weight: &[usize]) -> crate::Result<()> {
        self.inner.check(layer, weight)?;
        if weight.first() == Some(&self.bias.elem_count()) {
            return Ok(());
        }
        let expected = format!("one value per output of the layer's weight {weight:?}");
        Err(mismatch(layer, expected, &self.bias))
    }

    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        self.inner.delta(base, multiplier)
    }

    fn bias_delta(&self, bias: Option<&Tensor>, multiplier: f64) -> Result<Option<Tensor>> {
        let own = scaled_like(&self.bias, bias.unwrap_or(&self.bias), multiplier)?;
        match self.inner.bias_delta(bias, multiplier)? {
            Some(inner) => Ok(Some((inner + own)?)),
            None => Ok(Some(own)),
        }
    }

    fn branch(
        &self,
        x: &Tensor,
        layer: &BaseLayer,
        multiplier: f64,
        pass: Option<&Pass<'_>>,
    ) -> Result<Tensor> {
        let y = self.inner.branch(x, layer, multiplier, pass)?;
        let bias = (self.bias.to_dtype(y.dtype())? * multiplier)?;
        match layer.op {
            LayerOp::Conv2d(_) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
            _ => y.broadcast_add(&bias),
        }
    }

    fn vars(&self) -> Vec<(&'static str, Var)> {
        let bias = var(&self.bias).map(|v| ("diff_b", v));
        self.inner.vars().into_iter().chain(bias).collect()
    }

    fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let mut tensors = self.inner.tensors()?;
        tensors.push(("diff_b", self.bias.clone()));
        Ok(tensors)
    }

    fn trainable(&self) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Self {
            inner: self.inner.trainable()?,
            bias: variable(&self.bias)?,
        }))
    }

    fn product(&self) -> Result<Option<(Tensor, Tensor)>> {
        self.inner.product()
    }

    fn norm(&self) -> Result<Option<f64>> {
        self.inner.norm()
    }

    fn read_as(&self, reading: &Reading) -> Option<Arc<dyn Adapter>> {
        Some(Arc::new(Self {
            inner: self.inner.read_as(reading)?,
            bias: self.bias.clone(),
        }))
    }

    fn rescale(&self, ratio: f64) -> Result<f64> {
        self.inner.rescale(ratio)
    }
}
