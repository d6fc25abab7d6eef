//! Gradient checkpointing: a part of a network that keeps nothing but its inputs.
//!
//! candle's graph of `checkpoint(inputs, f)`, with one scalar handle per gradient:
//!
//! ```text
//! input, variable -> Handle -> [1] -\
//!                    ...             cat -> [k] -> Rerun -> y
//! input, variable -> Handle -> [1] -/
//! ```
//!
//! In the backward pass `Rerun` runs `f` again, puts the gradients of inputs and
//! variables into slots shared with the handles, and each handle then returns its slot's
//! gradient as its own. So gradients of any number of inputs and of all variables used
//! inside `f` reach candle's `GradStore` in the usual way.

use std::sync::{Arc, Mutex};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, MetalStorage, Result, Shape, Storage,
    Tensor, Var,
};

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
    let y = f(&detached)?;
    let mut slots = Vec::new();
    let mut handles = Vec::new();
    let mut handle = |t: &Tensor, essential: bool| -> Result<Slot> {
        let slot = Slot::default();
        let op = Handle {
            slot: slot.clone(),
            essential,
        };
        handles.push(t.apply_op1(op)?);
        Ok(slot)
    };
    for input in inputs {
        // A tracked value that is no variable must get a gradient, if only zeros.
        let tracked = input.track_op();
        slots.push(match tracked {
            true => Some(handle(input, !input.is_variable())?),
            false => None,
        });
    }
    let mut variables = Vec::new();
    for node in y.sorted_nodes() {
        if node.is_variable() {
            variables.push((node.clone(), handle(node, false)?));
        }
    }
    if handles.is_empty() {
        return Ok(y);
    }
    let op = Rerun {
        f: Box::new(f),
        inputs: detached,
        slots,
        variables,
        value: Mutex::new(Some(compact(&y.detach())?)),
    };
    drop(y);
    Tensor::cat(&handles, 0)?.apply_op1(op)
}

/// A gradient on its way from [`Rerun`] to a [`Handle`].
type Slot = Arc<Mutex<Option<Tensor>>>;

fn put(slot: &Slot, gradient: Option<Tensor>) {
    *slot.lock().unwrap_or_else(|e| e.into_inner()) = gradient;
}

/// The tensor alone in its storage.
fn compact(t: &Tensor) -> Result<Tensor> {
    let alone = {
        let (storage, layout) = t.storage_and_layout();
        let whole = match &*storage {
            Storage::Cpu(storage) => cpu_len(storage) == t.elem_count(),
            _ => false,
        };
        whole && layout.is_contiguous() && layout.start_offset() == 0
    };
    if alone {
        Ok(t.clone())
    } else {
        t.force_contiguous()
    }
}

fn cpu_len(storage: &CpuStorage) -> usize {
    match storage {
        CpuStorage::F32(v) => v.len(),
        CpuStorage::F16(v) => v.len(),
        CpuStorage::BF16(v) => v.len(),
        CpuStorage::F64(v) => v.len(),
        _ => 0,
    }
}

/// Stands for a tensor in the list of what a [`Rerun`] has gradients for.
struct Handle {
    slot: Slot,
    /// Zeros when there is no gradient.
    essential: bool,
}

impl CustomOp1 for Handle {
    fn name(&self) -> &'static str {
        "checkpoint_handle"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), 1.into()))
    }

    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let shape = Shape::from(1);
        Ok((s.device().zeros_impl(&shape, DType::F32)?, shape))
    }

    fn metal_fwd(&self, s: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        let shape = Shape::from(1);
        Ok((s.device().zeros_impl(&shape, DType::F32)?, shape))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        let gradient = self.slot.lock().unwrap_or_else(|e| e.into_inner()).take();
        match gradient {
            None if self.essential => arg.zeros_like().map(Some),
            other => Ok(other),
        }
    }
}

type Function = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + Send + Sync>;

/// The part that is run again; its argument is the list of handles.
struct Rerun {
    f: Function,
    inputs: Vec<Tensor>,
    /// One per input, where a gradient is wanted.
    slots: Vec<Option<Slot>>,
    variables: Vec<(Tensor, Slot)>,
    /// What `f` returned, until the operation's own forward hands it out.
    value: Mutex<Option<Tensor>>,
}

impl Rerun {
    fn take(&self) -> Result<Tensor> {
        let value = self.value.lock().unwrap_or_else(|e| e.into_inner()).take();
        value.ok_or_else(|| candle_core::Error::Msg("checkpoint: applied twice".into()))
    }
}

impl CustomOp1 for Rerun {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cpu(s) => Ok((s.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("checkpoint: the result is on another device"),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cuda(s) => Ok((s.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("checkpoint: the result is on another device"),
        }
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Metal(s) => Ok((s.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("checkpoint: the result is on another device"),
        }
    }

    fn bwd(&self, handles: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let mut inputs = Vec::with_capacity(self.inputs.len());
        let mut leaves = Vec::with_capacity(self.inputs.len());
        for (input, slot) in self.inputs.iter().zip(&self.slots) {
            let leaf = match slot {
                Some(slot) => {
                    let var = Var::from_tensor(input)?;
                    leaves.push((var.as_tensor().clone(), slot));
                    var.into_inner()
                }
                None => input.clone(),
            };
            inputs.push(leaf);
        }
        let y = (self.f)(&inputs)?;
        drop(inputs);
        let mut gradients = y.apply_op1(Seed(dy.detach()))?.backward()?;
        for (leaf, slot) in leaves {
            put(slot, gradients.remove(&leaf));
        }
        for (variable, slot) in &self.variables {
            put(slot, gradients.remove(variable));
        }
        handles.zeros_like().map(Some)
    }
}

/// A scalar whose gradient with respect to its argument is the given tensor.
struct Seed(Tensor);

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
