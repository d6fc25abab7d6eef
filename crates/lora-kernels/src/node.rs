//! Graph nodes with any number of arguments, which candle's custom operations lack: they
//! have three at most.
//!
//! candle's graph of `node(args, value, gradients)`, with one scalar handle per tracked
//! argument:
//!
//! ```text
//! argument -> Handle -> [1] -\
//!             ...             cat -> [k] -> Joint -> value
//! argument -> Handle -> [1] -/
//! ```
//!
//! In the backward pass `Joint` computes all gradients and puts them into slots shared
//! with the handles, and each handle then returns its slot's gradient as its own.

use std::sync::{Arc, Mutex};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, MetalStorage, Result, Shape,
    Storage, Tensor,
};

/// What a node evaluates to.
pub(crate) enum Value {
    /// A tensor of this shape on the CPU.
    Cpu(Vec<f32>, Shape),
    /// A tensor on any device, copied once.
    Tensor(Tensor),
}

impl Value {
    fn into_tensor(self) -> Result<Tensor> {
        match self {
            Value::Cpu(values, shape) => Tensor::from_vec(values, shape, &Device::Cpu),
            Value::Tensor(t) => Ok(t),
        }
    }
}

/// Computes the gradients of all arguments from that of the value; those of arguments that
/// are not tracked are dropped.
pub(crate) type Gradients = Box<dyn Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

/// `value` as a node of the graph that depends on `args`.
pub(crate) fn node(
    name: &'static str,
    args: &[&Tensor],
    value: Value,
    gradients: Gradients,
) -> Result<Tensor> {
    let mut slots = Vec::with_capacity(args.len());
    let mut handles = Vec::new();
    for arg in args {
        if !arg.track_op() {
            slots.push(None);
            continue;
        }
        let slot = Slot::default();
        handles.push(arg.apply_op1(Handle {
            slot: slot.clone(),
            // A tracked value that is no variable must get a gradient, if only zeros.
            essential: !arg.is_variable(),
        })?);
        slots.push(Some(slot));
    }
    if handles.is_empty() {
        return value.into_tensor();
    }
    let value = match value {
        Value::Tensor(t) => Value::Tensor(compact(&t)?),
        other => other,
    };
    Tensor::cat(&handles, 0)?.apply_op1(Joint {
        name,
        gradients,
        slots,
        value: Mutex::new(Some(value)),
    })
}

/// A gradient on its way from [`Joint`] to a [`Handle`].
type Slot = Arc<Mutex<Option<Tensor>>>;

fn put(slot: &Slot, gradient: Option<Tensor>) {
    *slot.lock().unwrap_or_else(|e| e.into_inner()) = gradient;
}

/// The tensor alone in its storage, as the copy on the CPU wants it.
fn compact(t: &Tensor) -> Result<Tensor> {
    let alone = {
        let (storage, layout) = t.storage_and_layout();
        let whole = match &*storage {
            Storage::Cpu(storage) => cpu_len(storage) == t.elem_count(),
            _ => return Ok(t.clone()),
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

/// Stands for a tensor in the list of a [`Joint`]'s arguments.
struct Handle {
    slot: Slot,
    /// Zeros when there is no gradient.
    essential: bool,
}

impl CustomOp1 for Handle {
    fn name(&self) -> &'static str {
        "handle"
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

/// The operation proper; its argument is the list of handles.
struct Joint {
    name: &'static str,
    gradients: Gradients,
    /// One per argument, where a gradient is wanted.
    slots: Vec<Option<Slot>>,
    /// The result, until the operation's forward hands it out.
    value: Mutex<Option<Value>>,
}

impl Joint {
    fn take(&self) -> Result<Value> {
        let value = self.value.lock().unwrap_or_else(|e| e.into_inner()).take();
        value.ok_or_else(|| candle_core::Error::Msg(format!("{}: applied twice", self.name)))
    }

    /// A copy of the value's storage, by `copy`, which is for one kind of device.
    fn copied<S>(
        &self,
        copy: impl FnOnce(&Storage, &Layout) -> Result<Option<S>>,
    ) -> Result<(S, Shape)> {
        let value = self.take()?.into_tensor()?;
        let (storage, layout) = value.storage_and_layout();
        match copy(&storage, layout)? {
            Some(copied) => Ok((copied, layout.shape().clone())),
            None => candle_core::bail!("{}: arguments and result on two devices", self.name),
        }
    }
}

/// The laid out part of a storage as a storage of its own.
fn copy<S>(storage: &S, layout: &Layout) -> Result<S>
where
    S: BackendStorage<Device: BackendDevice<Storage = S>>,
{
    let device = storage.device();
    let mut copy = device.zeros_impl(layout.shape(), storage.dtype())?;
    storage.copy_strided_src(&mut copy, 0, layout)?;
    Ok(copy)
}

impl CustomOp1 for Joint {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let value = match self.take()? {
            Value::Cpu(values, shape) => return Ok((CpuStorage::F32(values), shape)),
            Value::Tensor(t) => t,
        };
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cpu(s) => Ok((s.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("{}: arguments and result on two devices", self.name),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.copied(|storage, layout| match storage {
            Storage::Cuda(s) => copy(s, layout).map(Some),
            _ => Ok(None),
        })
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.copied(|storage, layout| match storage {
            Storage::Metal(s) => copy(s, layout).map(Some),
            _ => Ok(None),
        })
    }

    fn bwd(&self, handles: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let gradients = (self.gradients)(&dy.detach())?;
        for (slot, gradient) in self.slots.iter().zip(gradients) {
            if let Some(slot) = slot {
                put(slot, gradient);
            }
        }
        handles.zeros_like().map(Some)
    }
}
