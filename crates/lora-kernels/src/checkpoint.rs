//! Gradient checkpointing: a part of a network that keeps nothing but its inputs.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, MetalStorage, Result, Shape, Tensor, Var,
};

use crate::node::{Value, node};

/// Runs `f` on `inputs` and keeps only these and the result; the backward pass runs `f`
/// again. Gradients, of `inputs` and of every variable that `f` uses, are those of
/// `f(inputs)` to the bit where an input has no other use; where it has, its gradient is
/// summed over `f` first.
///
/// `f` must compute the same when called again (dropout masks included) and must take
/// everything that is tracked, except variables and what is computed from them inside,
/// from its argument. When nothing is tracked this is `f(inputs)`.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// let w = Var::new(&[3f32], &Device::Cpu)?;
/// let x = Var::new(&[2f32], &Device::Cpu)?;
/// let inner = w.as_tensor().clone();
/// let y = lora_kernels::checkpoint(&[x.as_tensor()], move |t| (&t[0] * &inner)?.sqr())?;
/// let grads = y.backward()?;
/// assert_eq!(grads.get(&x).unwrap().to_vec1::<f32>()?, [36.0]); // 2 w^2 x
/// assert_eq!(grads.get(&w).unwrap().to_vec1::<f32>()?, [24.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Those of `f`.
pub fn checkpoint(
    inputs: &[&Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let detached: Vec<Tensor> = inputs.iter().map(|t| t.detach()).collect();
    let tracked: Vec<bool> = inputs.iter().map(|t| t.track_op()).collect();
    let y = f(&detached)?;
    // The graph of this run is only good for finding the variables.
    let nodes = y.sorted_nodes().into_iter();
    let variables: Vec<Tensor> = nodes.filter(|t| t.is_variable()).cloned().collect();
    let value = y.detach();
    drop(y);
    let args: Vec<&Tensor> = inputs.iter().copied().chain(&variables).collect();
    let leaves = variables.clone();
    let gradients = move |dy: &Tensor| {
        let inputs = leaves_of(&detached, &tracked)?;
        let y = f(&inputs)?;
        let mut store = y.apply_op1(Seed(dy.clone()))?.backward()?;
        let all = inputs.iter().chain(&leaves);
        Ok(all.map(|leaf| store.remove(leaf)).collect())
    };
    node(
        "checkpoint",
        &args,
        Value::Tensor(value),
        Box::new(gradients),
    )
}

/// The tensors once more, those that were tracked as leaves of a new graph.
pub(crate) fn leaves_of(tensors: &[Tensor], tracked: &[bool]) -> Result<Vec<Tensor>> {
    let pairs = tensors.iter().zip(tracked);
    pairs
        .map(|(tensor, tracked)| match tracked {
            true => Ok(Var::from_tensor(tensor)?.into_inner()),
            false => Ok(tensor.clone()),
        })
        .collect()
}

/// A scalar whose gradient with respect to its argument is the given tensor.
pub(crate) struct Seed(pub(crate) Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "checkpoint_seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), ().into()))
    }

    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let shape = Shape::from(());
        Ok((s.device().zeros_impl(&shape, DType::F32)?, shape))
    }

    fn metal_fwd(&self, s: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        let shape = Shape::from(());
        Ok((s.device().zeros_impl(&shape, DType::F32)?, shape))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
