//! One parameter with its optimizer state, and the fused loop over both.
//!
//! On a CPU the parameter's own storage, the gradient and the state buffers are
//! walked once, in place, without a temporary. Elsewhere the same [`Kernel`] runs as
//! candle operations on whole tensors.

use std::sync::Mutex;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Storage, Tensor, Var};

use crate::error::{Error, Result};
use crate::lane::{Lane, TensorLane};
use crate::rounding;
use crate::walk::walk;

/// State of one kind for one parameter.
#[derive(Debug, Clone)]
pub enum Buffer {
    /// 32-bit values in memory.
    F32(Vec<f32>),
    /// Values that are always rounded to bfloat16 (saved as such).
    Bf16(Vec<f32>),
    /// Codes of a block-wise quantized state.
    U8(Vec<u8>),
    /// Values on the parameter's device.
    Device(Tensor),
}

impl Buffer {
    pub(crate) fn f32(&self) -> &[f32] {
        match self {
            Self::F32(v) | Self::Bf16(v) => v,
            Self::U8(_) | Self::Device(_) => &[],
        }
    }

    pub(crate) fn f32_mut(&mut self) -> &mut [f32] {
        match self {
            Self::F32(v) | Self::Bf16(v) => v,
            Self::U8(_) | Self::Device(_) => &mut [],
        }
    }

    pub(crate) fn u8_mut(&mut self) -> &mut [u8] {
        match self {
            Self::U8(v) => v,
            _ => &mut [],
        }
    }
}

/// What a kernel reads or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The parameter in f32 (the master copy of a half-precision one).
    Param,
    /// The gradient, already scaled.
    Grad,
    /// A state buffer by its position.
    State(usize),
}

/// One elementwise update: `W` values written, `C` values read, `R` values to sum.
pub(crate) trait Kernel<const W: usize, const C: usize, const R: usize>: Sync {
    fn element<L: Lane>(&self, write: &mut [L; W], read: [L; C]) -> [L; R];
}

/// A parameter of half precision: how its f32 value is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum HalfPrecision {
    /// A 32-bit master copy in the optimizer; the parameter is its rounded image.
    #[default]
    Master,
    /// No master copy: the stepped value is rounded stochastically into the
    /// parameter, so that steps below half a unit are not lost on average. The random
    /// bits depend on (seed, step, parameter, element) alone.
    Stochastic {
        /// Seed of the rounding stream.
        seed: u64,
    },
}

/// One parameter: its variable, state buffers and step counter.
#[derive(Debug)]
pub struct Slot {
    pub(crate) name: String,
    pub(crate) var: Var,
    pub(crate) group: usize,
    pub(crate) index: usize,
    /// Steps this parameter has taken (it may have been without gradient in others).
    pub(crate) steps: u64,
    pub(crate) buffers: Vec<Option<Buffer>>,
    /// f32 weights of a half-precision parameter.
    pub(crate) master: Option<Buffer>,
    pub(crate) half: HalfPrecision,
    /// Gradient of the step in progress: f32, contiguous.
    pub(crate) grad: Option<Tensor>,
    pub(crate) grad_scale: f32,
    /// Results of the last kernel that sums something.
    pub(crate) sums: [f64; 4],
    device_sums: Vec<Tensor>,
    /// Plain candle operations even on a CPU.
    pub(crate) plain: bool,
}

impl Slot {
    pub(crate) fn new(name: String, var: Var, group: usize, index: usize, buffers: usize) -> Self {
        let plain = !matches!(var.device(), Device::Cpu);
        Self {
            name,
            var,
            group,
            index,
            steps: 0,
            buffers: vec![None; buffers],
            master: None,
            half: HalfPrecision::default(),
            grad: None,
            grad_scale: 1.0,
            sums: [0.0; 4],
            device_sums: Vec::new(),
            plain,
        }
    }

    pub(crate) fn numel(&self) -> usize {
        self.var.elem_count()
    }

    pub(crate) fn dims(&self) -> &[usize] {
        self.var.dims()
    }

    pub(crate) fn is_half(&self) -> bool {
        self.var.dtype() != DType::F32
    }

    /// Accepts the gradient of this step, in f32 and contiguous.
    pub(crate) fn take_grad(&mut self, grad: &Tensor) -> Result<()> {
        if grad.dims() != self.var.dims() {
            return Err(Error::Shape {
                what: "gradient".into(),
                name: self.name.clone(),
                expected: self.var.dims().to_vec(),
                got: grad.dims().to_vec(),
            });
        }
        // A gradient in the parameter's own memory would be locked for reading and writing
        // at once: work on a copy.
        let shared = grad.is_variable() || same_memory(grad, &self.var);
        let grad = if shared {
            grad.copy()?.detach()
        } else {
            grad.detach()
        };
        self.grad = Some(grad.to_dtype(DType::F32)?.contiguous()?);
        Ok(())
    }

    /// Creates the f32 master copy of a half-precision parameter, and takes over what
    /// somebody else has written into the parameter since.
    pub(crate) fn sync_master(&mut self) -> Result<()> {
        if !self.is_half() {
            return Ok(());
        }
        let current = self.var.as_detached_tensor().to_dtype(DType::F32)?;
        if self.plain {
            let keep = match (&self.master, self.half) {
                (Some(Buffer::Device(master)), HalfPrecision::Master) => {
                    let image = master.to_dtype(self.var.dtype())?.to_dtype(DType::F32)?;
                    image.eq(&current)?.where_cond(master, &current)?
                }
                _ => current,
            };
            self.master = Some(Buffer::Device(keep));
            return Ok(());
        }
        let current = current.flatten_all()?.to_vec1::<f32>()?;
        match (&mut self.master, self.half) {
            (Some(Buffer::F32(master)), HalfPrecision::Master) => {
                let dtype = self.var.dtype();
                for (m, c) in master.iter_mut().zip(&current) {
                    if rounding::nearest(*m, dtype) != *c {
                        *m = *c;
                    }
                }
            }
            _ => self.master = Some(Buffer::F32(current)),
        }
        Ok(())
    }

    /// Writes the master copy back into a half-precision parameter.
    pub(crate) fn publish(&mut self, step: u64) -> Result<()> {
        let Some(master) = self.master.as_mut() else {
            return Ok(());
        };
        if let (HalfPrecision::Stochastic { seed }, Buffer::F32(values)) = (self.half, &mut *master)
            && self.var.dtype() == DType::BF16
        {
            rounding::stochastic_in_place(
                values,
                rounding::Stream::new(seed, step, self.index as u64),
            );
        }
        let tensor = match master {
            Buffer::Device(tensor) => tensor.clone(),
            other => Tensor::from_slice(other.f32(), self.var.dims(), self.var.device())?,
        };
        self.var.set(&tensor.to_dtype(self.var.dtype())?)?;
        Ok(())
    }

    /// Zeros of the parameter's size, where the kernels want them.
    pub(crate) fn zeros(&self) -> Result<Buffer> {
        Ok(if self.plain {
            Buffer::Device(Tensor::zeros(
                self.var.dims(),
                DType::F32,
                self.var.device(),
            )?)
        } else {
            Buffer::F32(vec![0.0; self.numel()])
        })
    }

    /// A copy of the f32 weights, where the kernels want them.
    pub(crate) fn weights(&self) -> Result<Buffer> {
        if let Some(master) = &self.master {
            return Ok(master.clone());
        }
        let tensor = self.var.as_detached_tensor();
        Ok(if self.plain {
            Buffer::Device(tensor.copy()?)
        } else {
            Buffer::F32(tensor.flatten_all()?.to_vec1()?)
        })
    }

    /// Overwrites the weights.
    pub(crate) fn set_weights(&mut self, values: &Buffer) -> Result<()> {
        let tensor = match values {
            Buffer::Device(tensor) => tensor.clone(),
            other => Tensor::from_slice(other.f32(), self.var.dims(), self.var.device())?,
        };
        if self.is_half() {
            self.master = Some(values.clone());
        }
        self.var.set(&tensor.to_dtype(self.var.dtype())?)?;
        Ok(())
    }

    /// Creates a zero state buffer if it does not exist.
    pub(crate) fn ensure_zeros(&mut self, index: usize) -> Result<()> {
        if self.buffers[index].is_none() {
            self.buffers[index] = Some(self.zeros()?);
        }
        Ok(())
    }

    /// Runs `kernel` over all elements. The sums come to [`Slot::sums`] (through
    /// [`collect_sums`] on a device).
    pub(crate) fn run<const W: usize, const C: usize, const R: usize, K: Kernel<W, C, R>>(
        &mut self,
        write: [Source; W],
        read: [Source; C],
        kernel: &K,
    ) -> Result<()> {
        if self.plain {
            self.run_tensors(write, read, kernel)
        } else {
            self.run_slices(write, read, kernel)
        }
    }

    fn run_slices<const W: usize, const C: usize, const R: usize, K: Kernel<W, C, R>>(
        &mut self,
        write: [Source; W],
        read: [Source; C],
        kernel: &K,
    ) -> Result<()> {
        let half = self.is_half();
        let scale = read.map(|s| {
            if s == Source::Grad {
                self.grad_scale
            } else {
                1.0
            }
        });
        // Buffers leave the slot for the duration, so that they can be borrowed side by side.
        let mut written: [Option<Buffer>; W] = write.map(|s| match s {
            Source::State(i) => self.buffers[i].take(),
            Source::Param if half => self.master.take(),
            _ => None,
        });
        let run = |param: Option<&mut [f32]>, this: &Slot| -> Result<[f64; R]> {
            let mut param = param;
            let guard_param;
            let mut param_read: &[f32] = &[];
            if read.contains(&Source::Param) {
                match &this.master {
                    Some(master) => param_read = master.f32(),
                    None => {
                        guard_param = this.var.storage_and_layout();
                        param_read = cpu_slice(&guard_param.0, guard_param.1)?;
                    }
                }
            }
            let guard_grad;
            let mut grad: &[f32] = &[];
            if let (true, Some(tensor)) = (read.contains(&Source::Grad), &this.grad) {
                guard_grad = tensor.storage_and_layout();
                grad = cpu_slice(&guard_grad.0, guard_grad.1)?;
            }
            let reads: [&[f32]; C] = read.map(|s| match s {
                Source::Param => param_read,
                Source::Grad => grad,
                Source::State(i) => this.buffers[i].as_ref().map_or(&[][..], Buffer::f32),
            });
            let mut slices: [&mut [f32]; W] = std::array::from_fn(|_| &mut [][..]);
            for ((slice, source), buffer) in slices.iter_mut().zip(write).zip(written.iter_mut()) {
                *slice = match (source, buffer) {
                    (_, Some(buffer)) => buffer.f32_mut(),
                    (_, None) => param.take().unwrap_or(&mut []),
                };
            }
            Ok(walk(slices, reads, scale, this.numel(), kernel))
        };
        let sums = if write.contains(&Source::Param) && !half {
            let mut run = run;
            let this = &*self;
            in_place(&this.var, |values| run(Some(values), this))?
        } else {
            let mut run = run;
            run(None, self)?
        };
        for (source, buffer) in write.into_iter().zip(written) {
            match source {
                Source::State(i) => self.buffers[i] = buffer,
                Source::Param if half => self.master = buffer,
                _ => {}
            }
        }
        self.sums[..R].copy_from_slice(&sums);
        Ok(())
    }

    fn run_tensors<const W: usize, const C: usize, const R: usize, K: Kernel<W, C, R>>(
        &mut self,
        write: [Source; W],
        read: [Source; C],
        kernel: &K,
    ) -> Result<()> {
        let lane = |source: Source| -> Result<TensorLane> {
            Ok(TensorLane::new(match source {
                Source::Param => match &self.master {
                    Some(Buffer::Device(tensor)) => tensor.clone(),
                    _ => self.var.as_detached_tensor(),
                },
                Source::Grad => {
                    let grad = self.grad.as_ref().ok_or_else(|| Error::Missing {
                        what: "gradient",
                        name: self.name.clone(),
                    })?;
                    if self.grad_scale == 1.0 {
                        grad.clone()
                    } else {
                        grad.affine(f64::from(self.grad_scale), 0.0)?
                    }
                }
                Source::State(i) => match &self.buffers[i] {
                    Some(Buffer::Device(tensor)) => tensor.clone(),
                    _ => {
                        return Err(Error::Missing {
                            what: "state",
                            name: self.name.clone(),
                        });
                    }
                },
            }))
        };
        let mut writes = Vec::with_capacity(W);
        for source in write {
            writes.push(lane(source)?);
        }
        let mut reads = Vec::with_capacity(C);
        for source in read {
            reads.push(lane(source)?);
        }
        let (Ok(mut writes), Ok(reads)) = (
            <[TensorLane; W]>::try_from(writes),
            <[TensorLane; C]>::try_from(reads),
        ) else {
            return Err(Error::state("kernel arity"));
        };
        let sums = kernel.element(&mut writes, reads);
        for (source, value) in write.into_iter().zip(writes) {
            let tensor = value.finish()?;
            match source {
                Source::State(i) => self.buffers[i] = Some(Buffer::Device(tensor)),
                _ if self.is_half() => self.master = Some(Buffer::Device(tensor)),
                _ => self.var.set(&tensor)?,
            }
        }
        self.device_sums.clear();
        for sum in sums {
            self.device_sums
                .push(sum.finish()?.sum_all()?.to_dtype(DType::F32)?);
        }
        Ok(())
    }

    /// Gives `work` the weights, the gradient (unscaled) and the buffers as slices in
    /// memory. For the fused path only.
    pub(crate) fn on_host<R>(
        &mut self,
        work: impl FnOnce(&mut [f32], &[f32], &mut [Option<Buffer>]) -> Result<R>,
    ) -> Result<R> {
        let mut buffers = std::mem::take(&mut self.buffers);
        let result = self.with_host_slices(|p, g| work(p, g, &mut buffers));
        self.buffers = buffers;
        result
    }

    fn with_host_slices<R>(
        &mut self,
        work: impl FnOnce(&mut [f32], &[f32]) -> Result<R>,
    ) -> Result<R> {
        let Some(grad) = self.grad.clone() else {
            return Err(Error::Missing {
                what: "gradient",
                name: self.name.clone(),
            });
        };
        let guard = grad.storage_and_layout();
        let slice = cpu_slice(&guard.0, guard.1)?;
        match &mut self.master {
            Some(master) => work(master.f32_mut(), slice),
            None => in_place(&self.var, |values| work(values, slice)),
        }
    }
}

/// Brings the sums of device tensors to the host, all of them in one transfer.
pub(crate) fn collect_sums<'a>(slots: impl Iterator<Item = &'a mut Slot>) -> Result<()> {
    let mut slots: Vec<&mut Slot> = slots.filter(|s| !s.device_sums.is_empty()).collect();
    let scalars: Vec<Tensor> = slots
        .iter()
        .flat_map(|s| s.device_sums.iter().cloned())
        .collect();
    if scalars.is_empty() {
        return Ok(());
    }
    let values = Tensor::stack(&scalars, 0)?.to_vec1::<f32>()?;
    let mut values = values.into_iter();
    for slot in &mut slots {
        for i in 0..slot.device_sums.len() {
            slot.sums[i] = values.next().map_or(f64::NAN, f64::from);
        }
        slot.device_sums.clear();
    }
    Ok(())
}

/// Whether two f32 tensors on a CPU share their storage.
fn same_memory(a: &Tensor, b: &Tensor) -> bool {
    let start = |t: &Tensor| match &*t.storage_and_layout().0 {
        Storage::Cpu(CpuStorage::F32(values)) => Some(values.as_ptr()),
        _ => None,
    };
    let start_of_a = start(a);
    start_of_a.is_some() && start_of_a == start(b)
}

fn cpu_slice<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (Storage::Cpu(cpu), Some((start, end))) => Ok(&cpu.as_slice::<f32>()?[start..end]),
        _ => Err(Error::state("a tensor is not contiguous in CPU memory")),
    }
}

/// Lets `work` change a variable's values where they lie.
fn in_place<R>(var: &Var, work: impl FnOnce(&mut [f32]) -> Result<R>) -> Result<R> {
    struct Work<F, R>(Mutex<(Option<F>, Option<Result<R>>)>);
    impl<R, F: FnOnce(&mut [f32]) -> Result<R>> InplaceOp1 for Work<F, R> {
        fn name(&self) -> &'static str {
            "optimizer-step"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            let (CpuStorage::F32(values), Some((start, end))) =
                (storage, layout.contiguous_offsets())
            else {
                candle_core::bail!("a parameter is not contiguous f32")
            };
            if let Ok(mut cell) = self.0.lock()
                && let Some(work) = cell.0.take()
            {
                cell.1 = Some(work(&mut values[start..end]));
            }
            Ok(())
        }
    }
    let op = Work(Mutex::new((Some(work), None)));
    var.inplace_op1(&op)?;
    let outcome =
        op.0.into_inner()
            .map_err(|_| Error::state("a step panicked"))?
            .1;
    outcome.unwrap_or_else(|| Err(Error::state("a step did not run")))
}

impl Slot {
    /// Sets the sums of the last kernel aside, so that another one may run.
    pub(crate) fn keep_device_sums(&mut self) -> Vec<Tensor> {
        std::mem::take(&mut self.device_sums)
    }

    /// Puts them back.
    pub(crate) fn restore_device_sums(&mut self, sums: Vec<Tensor>) {
        self.device_sums = sums;
    }
}
