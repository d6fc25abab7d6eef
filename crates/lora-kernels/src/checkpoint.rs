//! Gradient checkpointing: a part of a network that keeps nothing but its inputs.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};

use crate::gradient::Gradient;
use crate::node::{Leaf, Value, backward_from, node};

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
    let args = inputs;
    let inputs: Vec<Input> = inputs.iter().map(|x| Input::new(x)).collect();
    let values: Vec<Tensor> = inputs.iter().map(|input| input.kept.clone()).collect();
    let y = f(&values)?;
    // The graph of this run is only good for finding the variables.
    let nodes = y.sorted_nodes().into_iter();
    let variables: Vec<Tensor> = nodes.filter(|t| t.is_variable()).cloned().collect();
    let value = y.detach();
    drop((y, values));
    let args: Vec<&Tensor> = args.iter().copied().chain(&variables).collect();
    let trained = variables.clone();
    let gradients = move |dy: &Tensor| {
        let again: Vec<Again> = inputs.iter().map(Input::again).collect::<Result<_>>()?;
        let y = f(&tensors_of(&again))?;
        let mut store = backward_from(&y, dy.clone())?;
        drop(y);
        let mut all = Vec::with_capacity(inputs.len() + trained.len());
        for input in again {
            all.push(input.gradient(&mut store)?);
        }
        let trained = trained.iter().map(|variable| store.remove(variable));
        all.extend(trained.map(|gradient| gradient.map(Gradient::Tensor)));
        Ok(all)
    };
    node(
        "checkpoint",
        &args,
        Value::Tensor(value),
        Box::new(gradients),
    )
}

/// What a checkpoint keeps.
pub(crate) struct Input {
    pub(crate) kept: Tensor,
    tracked: bool,
}

impl Input {
    pub(crate) fn new(x: &Tensor) -> Self {
        Self {
            kept: x.detach(),
            tracked: x.track_op(),
        }
    }

    /// The same for the backward pass.
    pub(crate) fn again(&self) -> Result<Again> {
        match self.tracked {
            true => Leaf::new(&self.kept).map(Again::Leaf),
            false => Ok(Again::Constant(self.kept.clone())),
        }
    }
}

/// A tensor once more: as a leaf of a new graph if it was tracked.
pub(crate) enum Again {
    Leaf(Leaf),
    Constant(Tensor),
}

impl Again {
    /// What the backward pass has left for it.
    pub(crate) fn gradient(&self, store: &mut GradStore) -> Result<Option<Gradient>> {
        match self {
            Self::Leaf(leaf) => leaf.gradient(store),
            Self::Constant(_) => Ok(None),
        }
    }
}

/// What a function of them takes.
pub(crate) fn tensors_of(leaves: &[Again]) -> Vec<Tensor> {
    let tensor = |leaf: &Again| match leaf {
        Again::Leaf(leaf) => leaf.tensor.clone(),
        Again::Constant(tensor) => tensor.clone(),
    };
    leaves.iter().map(tensor).collect()
}
