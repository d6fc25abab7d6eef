//! Gradients on their way between nodes, summed in place.

use std::sync::{Arc, Mutex};

use candle_core::{
    CpuStorage, DType, Device, InplaceOp1, Layout, Result, Shape, Tensor, backend::BackendStorage,
};
use rayon::prelude::*;

use crate::buffer::{copied, with, zeros};

/// What a node gives to one of its arguments.
pub(crate) enum Gradient {
    /// A tensor: a new one, or the gradient of the node's result, or a view of that.
    Tensor(Tensor),
    /// A tensor whose memory others may read.
    Shared(Tensor),
    /// f32 values on the CPU, of the target's size. They are all zeros where none are there yet.
    Values(Box<Write>),
    /// The same, made where none are there yet.
    Made(Box<Make>),
}

/// Writes values or, with `true`, adds them to what is there.
type Write = dyn FnOnce(&mut [f32], bool) -> Result<()>;

/// Adds to values, or, where there are none, returns them.
type Make = dyn FnOnce(Option<&mut [f32]>) -> Result<Vec<f32>>;

impl Gradient {
    pub(crate) fn values(write: impl FnOnce(&mut [f32], bool) -> Result<()> + 'static) -> Self {
        Self::Values(Box::new(write))
    }

    /// Values that `make` adds to those it gets, or else returns.
    pub(crate) fn made(
        make: impl FnOnce(Option<&mut [f32]>) -> Result<Vec<f32>> + 'static,
    ) -> Self {
        Self::Made(Box::new(make))
    }

    /// The tensor, made if need be, of this shape.
    pub(crate) fn into_tensor(self, shape: &Shape) -> Result<Tensor> {
        match self {
            Self::Tensor(t) | Self::Shared(t) => Ok(t),
            Self::Values(write) => {
                let mut values = zeros(shape.elem_count());
                write(&mut values, false)?;
                Tensor::from_vec(values, shape, &Device::Cpu)
            }
            Self::Made(make) => Tensor::from_vec(make(None)?, shape, &Device::Cpu),
        }
    }

    /// Whether this is, or views, the given tensor.
    pub(crate) fn is_view_of(&self, other: &Tensor) -> bool {
        let (Self::Tensor(t) | Self::Shared(t)) = self else {
            return false;
        };
        let ((a, _), (b, _)) = (t.storage_and_layout(), other.storage_and_layout());
        std::ptr::eq(&*a, &*b)
    }
}

impl From<Tensor> for Gradient {
    fn from(t: Tensor) -> Self {
        Self::Tensor(t)
    }
}

/// The sum of the gradients that the uses of a value give it.
#[derive(Clone)]
pub(crate) struct Sum {
    shape: Shape,
    total: Arc<Mutex<Option<Total>>>,
}

struct Total {
    tensor: Tensor,
    /// Nobody else reads its memory.
    own: bool,
}

impl Sum {
    pub(crate) fn new(shape: &Shape) -> Self {
        Self {
            shape: shape.clone(),
            total: Arc::default(),
        }
    }

    /// What has been added so far, and whether nobody else reads its memory.
    pub(crate) fn take(&self) -> Option<(Tensor, bool)> {
        let total = self.total.lock().unwrap_or_else(|e| e.into_inner()).take();
        total.map(|total| (total.tensor, total.own))
    }

    /// Adds a gradient.
    pub(crate) fn add(&self, gradient: Gradient) -> Result<()> {
        let (tensor, own) = match (self.take(), gradient) {
            (None, Gradient::Shared(t)) => (t, false),
            (None, gradient) => (gradient.into_tensor(&self.shape)?, true),
            (Some((sum, sum_own)), gradient) if host(&sum) => {
                let sum = match sum_own && sum.is_contiguous() {
                    true => sum,
                    false => {
                        let values = with(&sum, copied)?;
                        Tensor::from_vec(values, &self.shape, &Device::Cpu)?
                    }
                };
                sum.inplace_op1(&AddGradient(Mutex::new(Some(gradient))))?;
                (sum, true)
            }
            (Some((sum, _)), gradient) => ((sum + gradient.into_tensor(&self.shape)?)?, true),
        };
        *self.total.lock().unwrap_or_else(|e| e.into_inner()) = Some(Total { tensor, own });
        Ok(())
    }
}

/// Whether the values are f32 on the CPU.
fn host(t: &Tensor) -> bool {
    t.device().is_cpu() && t.dtype() == DType::F32
}

/// Adds a gradient to the values of a tensor.
struct AddGradient(Mutex<Option<Gradient>>);

impl InplaceOp1 for AddGradient {
    fn name(&self) -> &'static str {
        "add_gradient"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let gradient = self.0.lock().unwrap_or_else(|e| e.into_inner()).take();
        let (dtype, place) = (storage.dtype(), layout.contiguous_offsets());
        let (CpuStorage::F32(values), Some((start, end))) = (storage, place) else {
            candle_core::bail!("cannot add a gradient to {dtype:?}, {layout:?}");
        };
        let sum = &mut values[start..end];
        match gradient {
            Some(Gradient::Values(write)) => write(sum, true),
            Some(Gradient::Made(make)) => make(Some(sum)).map(|_| ()),
            Some(Gradient::Tensor(t) | Gradient::Shared(t)) => with(&t, |t| add(sum, t)),
            None => Ok(()),
        }
    }
}

/// Adds `values` to `sum`.
pub(crate) fn add(sum: &mut [f32], values: &[f32]) {
    const PART: usize = 1 << 15;
    let parts = sum.par_chunks_mut(PART).zip(values.par_chunks(PART));
    parts.for_each(|(sum, values)| sum.iter_mut().zip(values).for_each(|(sum, v)| *sum += v));
}
