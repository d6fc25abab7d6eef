//! Graph nodes with any number of arguments, which candle's custom operations lack: they
//! have three at most. And gradients that do not go through candle's store, which fills a
//! tensor with zeros for each and adds to it on one thread.
//!
//! Every value stands beside a token, one number, and candle's graph is made of the tokens. Of
//! `node(args, value, gradients)`:
//!
//! ```text
//! token of an argument -------\
//!          ...                 cat -> [k] -> Joint -> token -> Expand -> value
//! other argument -> Handle -> /
//! ```
//!
//! Nodes find the token of an argument by its id and hang on that. In the backward pass `Joint`
//! takes the sum of the gradients that uses of its value have left ([`Sum`]), computes those of
//! its arguments and leaves them there; candle adds single numbers only. candle's own
//! operations use the value; their gradient reaches the sum by `Expand`. Arguments that
//! are no values of nodes, such as variables, have a `Handle`, which hands their gradient to candle.
//! Values are held by those who read them only: the graph does not.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::backprop::GradStore;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, MetalStorage, Result, Shape,
    Storage, Tensor, TensorId, Var,
};

use crate::buffer::copied;
use crate::gradient::{Gradient, Sum};

/// What a node evaluates to.
pub(crate) enum Value {
    /// A tensor of this shape on the CPU.
    Cpu(Vec<f32>, Shape),
    /// A tensor on any device, copied once.
    Tensor(Tensor),
}

impl Value {
    pub(crate) fn cpu(values: Vec<f32>, shape: impl Into<Shape>) -> Self {
        Self::Cpu(values, shape.into())
    }

    fn shape(&self) -> &Shape {
        match self {
            Self::Cpu(_, shape) => shape,
            Self::Tensor(t) => t.shape(),
        }
    }

    fn into_tensor(self) -> Result<Tensor> {
        match self {
            Value::Cpu(values, shape) => Tensor::from_vec(values, shape, &Device::Cpu),
            Value::Tensor(t) => Ok(t),
        }
    }
}

/// Computes the gradients of all arguments from that of the value; those of arguments that
/// are not tracked are dropped.
pub(crate) type Gradients = Box<dyn Fn(&Tensor) -> Result<Vec<Option<Gradient>>> + Send + Sync>;

/// `value` as a node of the graph that depends on `args`.
pub(crate) fn node(
    name: &'static str,
    args: &[&Tensor],
    value: Value,
    gradients: Gradients,
) -> Result<Tensor> {
    repeatable(name, args, value, gradients, None)
}

/// Computes a value once more.
pub(crate) type Again = Arc<dyn Fn() -> Result<Tensor> + Send + Sync>;

/// A [`node`] whose value is made again where the backward pass needs it, instead of being kept.
pub(crate) fn repeatable(
    name: &'static str,
    args: &[&Tensor],
    value: Value,
    gradients: Gradients,
    again: Option<Again>,
) -> Result<Tensor> {
    let value = match value {
        Value::Tensor(t) if args.iter().any(|arg| arg.track_op()) => Value::Tensor(compact(&t)?),
        other => other,
    };
    let sum = Sum::new(value.shape());
    let Some(token) = joint(name, args, &sum, gradients)? else {
        return value.into_tensor();
    };
    let names = Names::default();
    let value = token.apply_op1(Expand {
        name,
        value: Mutex::new(Some(value)),
        sum: sum.clone(),
        names: names.clone(),
    })?;
    let place = Place {
        token,
        sum,
        names,
        again,
    };
    register(&value, place);
    Ok(value)
}

/// The same values in another shape. A use of the result is summed with other uses of the result,
/// before the sum joins those of other uses of `x`.
pub(crate) fn view(x: &Tensor, shape: Shape) -> Result<Tensor> {
    let y = x.reshape(&shape)?;
    let Some(Place { names, again, .. }) = place(x) else {
        return Ok(y);
    };
    let again = again.map(|again| Arc::new(move || again()?.reshape(&shape)) as Again);
    let (sum, before) = (Sum::new(y.shape()), x.shape().clone());
    let back = move |dy: &Tensor| Ok(vec![Some(dy.reshape(&before)?.into())]);
    if let Some(token) = joint("view", &[x], &sum, Box::new(back))? {
        let place = Place {
            token,
            sum,
            names,
            again,
        };
        register(&y, place);
    }
    Ok(y)
}

/// A leaf of a graph of its own, whose gradient is summed as that of a node's value.
pub(crate) struct Leaf {
    pub(crate) tensor: Tensor,
    sum: Sum,
    names: Names,
}

impl Leaf {
    /// With a copy of the values.
    pub(crate) fn new(t: &Tensor) -> Result<Self> {
        Self::of(Var::from_tensor(t)?)
    }

    pub(crate) fn of(var: Var) -> Result<Self> {
        let tensor = var.into_inner();
        let (sum, names) = (Sum::new(tensor.shape()), Names::default());
        let token = Var::zeros(1, DType::F32, tensor.device())?.into_inner();
        let place = Place {
            token,
            sum: sum.clone(),
            names: names.clone(),
            again: None,
        };
        register(&tensor, place);
        Ok(Self { tensor, sum, names })
    }

    /// Its gradient after the backward pass, with what candle's operations gave it.
    pub(crate) fn gradient(&self, store: &mut GradStore) -> Result<Option<Gradient>> {
        if let Some(gradient) = store.remove(&self.tensor) {
            self.sum.add(gradient.into())?;
        }
        Ok(self.sum.take().map(|(gradient, own)| match own {
            true => Gradient::Tensor(gradient),
            false => Gradient::Shared(gradient),
        }))
    }
}

impl Drop for Leaf {
    fn drop(&mut self) {
        forget(&self.names);
    }
}

/// Runs the backward pass from `y`, whose gradient is `dy`.
pub(crate) fn backward_from(y: &Tensor, dy: Tensor) -> Result<GradStore> {
    match place(y) {
        Some(place) => {
            place.sum.add(Gradient::Shared(dy))?;
            place.token.backward()
        }
        None => y.apply_op1(Seed(dy))?.backward(),
    }
}

/// Where a value stands in the graph.
#[derive(Clone)]
struct Place {
    token: Tensor,
    sum: Sum,
    names: Names,
    again: Option<Again>,
}

/// What the backward pass needs of a value: the value, or how to make it again.
pub(crate) struct Saved(Source);

enum Source {
    Value(Tensor),
    Again(Again),
}

impl Saved {
    pub(crate) fn of(x: &Tensor) -> Result<Arc<Self>> {
        Ok(Arc::new(Self(
            match place(x).and_then(|place| place.again) {
                Some(again) => Source::Again(again),
                None => Source::Value(x.detach().contiguous()?),
            },
        )))
    }

    /// The value, contiguous.
    pub(crate) fn value(&self) -> Result<Tensor> {
        match &self.0 {
            Source::Value(x) => Ok(x.clone()),
            Source::Again(again) => again()?.contiguous(),
        }
    }
}

/// Under which ids a value and its views are registered.
type Names = Arc<Mutex<Vec<TensorId>>>;

fn places() -> MutexGuard<'static, HashMap<TensorId, Place>> {
    static PLACES: OnceLock<Mutex<HashMap<TensorId, Place>>> = OnceLock::new();
    let places = PLACES.get_or_init(Mutex::default);
    places.lock().unwrap_or_else(|e| e.into_inner())
}

fn place(value: &Tensor) -> Option<Place> {
    places().get(&value.id()).cloned()
}

fn register(value: &Tensor, place: Place) {
    let mut names = place.names.lock().unwrap_or_else(|e| e.into_inner());
    names.push(value.id());
    drop(names);
    places().insert(value.id(), place);
}

fn forget(names: &Names) {
    let ids = std::mem::take(&mut *names.lock().unwrap_or_else(|e| e.into_inner()));
    // They are dropped after the lock is released: with them others may go.
    let _dropped: Vec<Option<Place>> = {
        let mut places = places();
        ids.iter().map(|id| places.remove(id)).collect()
    };
}

/// The token of a value that depends on `args` and whose gradients are summed in `sum`; none if
/// no argument is tracked.
fn joint(
    name: &'static str,
    args: &[&Tensor],
    sum: &Sum,
    gradients: Gradients,
) -> Result<Option<Tensor>> {
    let mut targets = Vec::with_capacity(args.len());
    let mut tokens = Vec::new();
    for arg in args {
        if !arg.track_op() {
            targets.push(None);
            continue;
        }
        let target = match place(arg) {
            Some(place) => {
                tokens.push(place.token);
                place.sum
            }
            None => {
                let sum = Sum::new(arg.shape());
                tokens.push(arg.apply_op1(Handle {
                    sum: sum.clone(),
                    // A tracked value that is no variable must get a gradient, if only zeros.
                    essential: !arg.is_variable(),
                })?);
                sum
            }
        };
        targets.push(Some(target));
    }
    if tokens.is_empty() {
        return Ok(None);
    }
    let joint = Joint {
        name,
        gradients,
        sum: sum.clone(),
        targets,
    };
    Tensor::cat(&tokens, 0)?.apply_op1(joint).map(Some)
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

/// One zero, on each kind of device.
macro_rules! one_number {
    () => {
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
    };
}

/// The token of an argument that has none.
struct Handle {
    sum: Sum,
    /// Zeros when there is no gradient.
    essential: bool,
}

impl CustomOp1 for Handle {
    fn name(&self) -> &'static str {
        "handle"
    }

    one_number!();

    fn bwd(&self, arg: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        match self.sum.take() {
            None if self.essential => arg.zeros_like().map(Some),
            sum => Ok(sum.map(|(gradient, _)| gradient)),
        }
    }
}

/// The operation proper; its argument is the list of tokens, its result the value's token.
struct Joint {
    name: &'static str,
    gradients: Gradients,
    /// What the uses of the value have left.
    sum: Sum,
    /// One per argument, where a gradient is wanted.
    targets: Vec<Option<Sum>>,
}

impl CustomOp1 for Joint {
    fn name(&self) -> &'static str {
        self.name
    }

    one_number!();

    fn bwd(&self, tokens: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        if let Some((dy, own)) = self.sum.take() {
            let dy = dy.detach();
            let gradients = (self.gradients)(&dy)?;
            let pairs = self.targets.iter().zip(gradients);
            let wanted: Vec<(&Sum, Gradient)> = pairs
                .filter_map(|(target, gradient)| target.as_ref().zip(gradient))
                .collect();
            let is_view = |(_, gradient): &(&Sum, Gradient)| gradient.is_view_of(&dy);
            // First what is computed from dy: its memory may be handed on then, and added to.
            let (views, new): (Vec<_>, Vec<_>) = wanted.into_iter().partition(is_view);
            for (target, gradient) in new {
                target.add(gradient)?;
            }
            let shared = !own || views.len() > 1;
            for (target, gradient) in views {
                target.add(match gradient {
                    Gradient::Tensor(t) if shared => Gradient::Shared(t),
                    gradient => gradient,
                })?;
            }
        }
        tokens.zeros_like().map(Some)
    }
}

/// From a value's token to the value.
struct Expand {
    name: &'static str,
    /// The value, until the operation's forward hands it out.
    value: Mutex<Option<Value>>,
    sum: Sum,
    names: Names,
}

impl Drop for Expand {
    fn drop(&mut self) {
        forget(&self.names);
    }
}

impl Expand {
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

impl CustomOp1 for Expand {
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
            Storage::Cpu(CpuStorage::F32(v)) if v.len() == layout.shape().elem_count() => {
                Ok((CpuStorage::F32(copied(v)), layout.shape().clone()))
            }
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

    fn bwd(&self, token: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        self.sum.add(Gradient::Shared(dy.detach()))?;
        token.zeros_like().map(Some)
    }
}

/// A scalar whose gradient with respect to its argument is the given tensor.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    one_number!();

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
