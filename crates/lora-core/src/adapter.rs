//! What every adapter family has in common.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{Result, Tensor, Var};

use crate::control::Pass;
use crate::layer::BaseLayer;

/// An adapter family: the formula by which factors become a weight change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Low-rank product `up down` (Hu et al. 2021), with LoCon's convolutions.
    Lora,
    /// Elementwise product of two low-rank products (Hyeon-Woo et al. 2021).
    Loha,
    /// Kronecker product (Yeh et al. 2023).
    Lokr,
}

impl Family {
    /// The name in LyCORIS' `algo=` option.
    pub fn name(self) -> &'static str {
        match self {
            Family::Lora => "lora",
            Family::Loha => "loha",
            Family::Lokr => "lokr",
        }
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// One layer's adapter.
///
/// [`delta`](Adapter::delta) defines what it means; every other path agrees with
/// it. Shapes: linear weight `[o, i]`, convolution weight `[o, i / groups, kh, kw]`.
pub trait Adapter: Debug + Send + Sync {
    /// The family.
    fn family(&self) -> Family;

    /// The rank read from the factors, for families that have one.
    fn rank(&self) -> Option<usize>;

    /// `alpha`, for families that have one.
    fn alpha(&self) -> Option<f64>;

    /// Outputs, and inputs times kernel area, of the weights this adapter is for.
    fn matrix_dims(&self) -> (usize, usize);

    /// Whether this adapter fits a layer whose weight has these dimensions.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`](crate::Error::ShapeMismatch), naming `layer`.
    fn check(&self, layer: &str, weight: &[usize]) -> crate::Result<()> {
        let (o, i) = self.matrix_dims();
        if weight.first() == Some(&o) && weight.iter().skip(1).product::<usize>() == i {
            return Ok(());
        }
        Err(crate::Error::ShapeMismatch {
            layer: layer.to_string(),
            tensor: format!("{} delta", self.family()),
            expected: format!("the size of the layer's weight {weight:?}"),
            got: vec![o, i],
        })
    }

    /// Weight change for `base`, in its shape and dtype, scale (`alpha / rank`) and
    /// multiplier included. Additive families ignore the values of `base`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor>;

    /// Bias change, for the families that have one.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn bias_delta(&self, _bias: Option<&Tensor>, _multiplier: f64) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// What the adapter adds to the layer's output for input `x`. The default runs
    /// the layer's operation with [`delta`](Adapter::delta).
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn branch(
        &self,
        x: &Tensor,
        layer: &BaseLayer,
        multiplier: f64,
        _pass: Option<&Pass<'_>>,
    ) -> Result<Tensor> {
        let delta = self.delta(&layer.weight, multiplier)?;
        let bias = self.bias_delta(layer.bias.as_ref(), multiplier)?;
        layer.op.apply(x, &delta, bias.as_ref())
    }

    /// The trainable factors in a fixed order, named by file suffix; empty for an
    /// adapter loaded for inference.
    fn vars(&self) -> Vec<(&'static str, Var)>;

    /// What a file holds, named by suffix (`lora_down.weight`, `alpha`, ...).
    ///
    /// # Errors
    /// When a tensor cannot be made.
    fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>>;

    /// The same adapter with factors that record gradients, as f32.
    ///
    /// # Errors
    /// When the factors cannot be copied.
    fn trainable(&self) -> Result<Arc<dyn Adapter>>;

    /// Multiplies the delta by `ratio`, spread evenly over the factors in place; for
    /// max-norm scaling. Does nothing to an adapter loaded for inference. Returns the
    /// number each factor was multiplied by.
    ///
    /// # Errors
    /// When a factor cannot be written.
    fn rescale(&self, ratio: f64) -> Result<f64> {
        let vars = self.vars();
        let factor = ratio.powf(1.0 / vars.len().max(1) as f64);
        for (_, var) in vars {
            var.set(&(var.as_detached_tensor() * factor)?)?;
        }
        Ok(factor)
    }
}

/// The variable behind a factor, if it is one.
pub(crate) fn var(factor: &Tensor) -> Option<Var> {
    // For a variable `from_tensor` returns the same variable, not a copy.
    factor
        .is_variable()
        .then(|| Var::from_tensor(factor).ok())
        .flatten()
}
