//! Products with a weight that is computed from trained factors.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::checkpoint::{Again, Input, tensors_of};
use crate::gradient::Gradient;
use crate::node::{Saved, Value, backward_from, node};
use crate::{Compute, Conv2dParams, as_nodes, composed, conv2d, fast, linear};

/// How a computed weight is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// `x W^T`, as [`linear`](crate::linear()).
    Linear,
    /// As [`conv2d`](crate::conv2d()).
    Conv2d(Conv2dParams),
}

impl Product {
    fn apply(self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        match self {
            Self::Linear => linear::linear(x, weight, None),
            Self::Conv2d(params) => conv2d::conv2d(x, weight, None, params),
        }
    }

    /// The gradients to x, if wanted, and to the weight.
    fn gradients(
        self,
        x: &Arc<Saved>,
        weight: &Tensor,
        dy: &Tensor,
        to_x: bool,
    ) -> Result<(Option<Gradient>, Tensor)> {
        let kernels = fast(&[weight, dy]);
        let (weight, wanted) = (&weight.contiguous()?, [to_x, true]);
        let [dx, dw] = match self {
            Self::Linear if kernels => linear::gradients(x, weight, dy, Compute::F32, wanted)?,
            Self::Linear => composed::linear_gradients(&x.value()?, weight, dy, wanted)?,
            Self::Conv2d(p) if kernels => {
                conv2d::gradients(p, &x.value()?, weight, dy, Compute::F32, wanted)?
            }
            Self::Conv2d(p) => composed::conv2d_gradients(p, &x.value()?, weight, dy, wanted)?,
        };
        match dw {
            Some(dw) => Ok((dx, dw.into_tensor(weight.shape())?)),
            None => candle_core::bail!("no gradient to a computed weight"),
        }
    }
}

/// The product of `x` and the weight `f(factors)`, of which the graph keeps x and the factors
/// only: the backward pass computes the weight again. Gradients go to x and to the factors.
///
/// `f` must compute the same when called again and take everything that is tracked from its
/// argument.
///
/// ```
/// use candle_core::{Device, Var};
/// use lora_kernels::{Product, with_computed_weight};
/// let x = Var::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let root = Var::new(&[[3f32, 4.]], &Device::Cpu)?;
/// let y = with_computed_weight(Product::Linear, &x, &[&root], |t| t[0].sqr())?;
/// assert_eq!(y.to_vec2::<f32>()?, [[41.0]]);
/// let grads = y.backward()?;
/// assert_eq!(grads.get(&root).unwrap().to_vec2::<f32>()?, [[6.0, 16.0]]); // 2 root x
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Those of `f`, and when the shapes do not fit.
pub fn with_computed_weight(
    product: Product,
    x: &Tensor,
    factors: &[&Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !as_nodes() {
        let factors: Vec<Tensor> = factors.iter().map(|t| (*t).clone()).collect();
        return product.apply(x, &f(&factors)?);
    }
    let inputs: Vec<Input> = factors.iter().map(|t| Input::new(t)).collect();
    let detached: Vec<Tensor> = inputs.iter().map(|input| input.kept.clone()).collect();
    let (saved, to_x) = (Saved::of(x)?, x.track_op());
    let y = product.apply(&x.detach(), &f(&detached)?)?;
    let gradients = move |dy: &Tensor| {
        let leaves: Vec<Again> = inputs.iter().map(Input::again).collect::<Result<_>>()?;
        let weight = f(&tensors_of(&leaves))?;
        let dy = dy.contiguous()?;
        let (dx, dw) = product.gradients(&saved, &weight.detach(), &dy, to_x)?;
        let mut all = vec![dx];
        let mut store = backward_from(&weight, dw)?;
        for leaf in &leaves {
            all.push(leaf.gradient(&mut store)?);
        }
        Ok(all)
    };
    let args: Vec<&Tensor> = std::iter::once(x).chain(factors.iter().copied()).collect();
    node(
        "computed_weight",
        &args,
        Value::Tensor(y),
        Box::new(gradients),
    )
}
