//! An optimizer for parameters on a GPU that computes on the CPU.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};

use crate::error::Result;
use crate::group::{GradSource, ParamGroup};
use crate::optimizer::{GroupReport, Optimizer, StepOptions, StepReport, WeightChange};
use crate::state::{ChangedOption, OnChange, OptimizerState};

/// An optimizer on copies of the parameters in the CPU's memory: gradients come over in one
/// transfer per step, weights go back in another.
///
/// An adapter has hundreds of small tensors. On a GPU each costs a dozen launches per step,
/// which take longer than the whole step on a CPU with both transfers, and its state takes
/// the GPU's memory. The numbers are those of the CPU's optimizer, to the bit.
///
/// After the parameters were written by somebody else, [`Optimizer::weights_changed`] or
/// [`Optimizer::load_state`] takes them over.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use lora_optim::{OnHost, Optimizer, ParamGroup, kohya::from_kohya};
/// use std::collections::BTreeMap;
/// # let gpu = Device::Cpu;
/// let w = Var::zeros(4, DType::F32, &gpu)?;
/// let groups = vec![ParamGroup::new("unet", vec![("w".into(), w.clone())])];
/// let mut optimizer = OnHost::new(groups, |groups| from_kohya("Lion", &[], 0.1, groups))?;
/// let gradient = Tensor::ones(4, DType::F32, &gpu)?;
/// optimizer.step(&BTreeMap::from([("w".to_string(), gradient)]))?;
/// assert_eq!(w.to_vec1::<f32>()?, [-0.1; 4]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct OnHost {
    inner: Box<dyn Optimizer>,
    params: Vec<Param>,
}

/// A parameter and its copy on the CPU.
#[derive(Debug)]
struct Param {
    name: String,
    there: Var,
    here: Var,
}

impl OnHost {
    /// `build` makes the optimizer, of groups with the copies.
    ///
    /// # Errors
    /// Those of `build`, and failed transfers.
    pub fn new(
        mut groups: Vec<ParamGroup>,
        build: impl FnOnce(Vec<ParamGroup>) -> Result<Box<dyn Optimizer>>,
    ) -> Result<Self> {
        let mut params = Vec::new();
        for (name, var) in groups.iter_mut().flat_map(|group| &mut group.params) {
            let copy = var.as_detached_tensor().to_device(&Device::Cpu)?.copy()?;
            let here = Var::from_tensor(&copy)?;
            params.push(Param {
                name: name.clone(),
                there: std::mem::replace(var, here.clone()),
                here,
            });
        }
        let inner = build(groups)?;
        Ok(Self { inner, params })
    }

    /// Brings one parameter here, or all.
    fn pull(&self, name: Option<&str>) -> Result<()> {
        let concerned = |param: &&Param| name.is_none_or(|name| name == param.name);
        for Param { there, here, .. } in self.params.iter().filter(concerned) {
            here.set(&there.as_detached_tensor().to_device(&Device::Cpu)?)?;
        }
        Ok(())
    }

    /// Brings all parameters there.
    fn push(&self) -> Result<()> {
        let here = self.params.iter().map(|p| p.here.as_detached_tensor());
        let Some(first) = self.params.first() else {
            return Ok(());
        };
        let moved = joined(here)?.to_device(first.there.device())?;
        let mut start = 0;
        for Param { there, .. } in &self.params {
            let part = moved.narrow(0, start, there.elem_count())?;
            there.set(&part.reshape(there.shape())?.to_dtype(there.dtype())?)?;
            start += there.elem_count();
        }
        Ok(())
    }
}

/// All values in f32, one tensor after the other.
fn joined(tensors: impl Iterator<Item = Tensor>) -> Result<Tensor> {
    let flat = tensors.map(|t| t.to_dtype(DType::F32)?.flatten_all());
    Ok(Tensor::cat(
        &flat.collect::<candle_core::Result<Vec<_>>>()?,
        0,
    )?)
}

impl Optimizer for OnHost {
    fn algorithm(&self) -> &'static str {
        self.inner.algorithm()
    }

    fn step(&mut self, grads: &dyn GradSource) -> Result<StepReport> {
        let found: Vec<(&Param, &Tensor)> = self
            .params
            .iter()
            .filter_map(|param| Some((param, grads.grad(&param.name, &param.there)?)))
            .collect();
        let mut here = BTreeMap::new();
        if !found.is_empty() {
            let moved = joined(found.iter().map(|(_, grad)| grad.detach()))?;
            let moved = moved.to_device(&Device::Cpu)?;
            let mut start = 0;
            for (param, grad) in found {
                let part = moved.narrow(0, start, grad.elem_count())?;
                here.insert(param.name.clone(), part.reshape(grad.shape())?);
                start += grad.elem_count();
            }
        }
        let report = self.inner.step(&here)?;
        if report.applied {
            self.push()?;
        }
        Ok(report)
    }

    fn groups(&self) -> &[ParamGroup] {
        self.inner.groups()
    }

    fn steps(&self) -> u64 {
        self.inner.steps()
    }

    fn step_options(&self) -> &StepOptions {
        self.inner.step_options()
    }

    fn set_step_options(&mut self, options: StepOptions) -> Result<()> {
        self.inner.set_step_options(options)
    }

    fn set_lr_factor(&mut self, factor: f64) {
        self.inner.set_lr_factor(factor);
    }

    fn set_group_lr_factor(&mut self, group: usize, factor: f64) {
        self.inner.set_group_lr_factor(group, factor);
    }

    fn base_lr(&self, group: usize) -> f64 {
        self.inner.base_lr(group)
    }

    fn set_group_lr(&mut self, group: usize, lr: f64) -> Result<()> {
        self.inner.set_group_lr(group, lr)
    }

    fn lr(&self, group: usize) -> f64 {
        self.inner.lr(group)
    }

    fn effective_lr(&self, group: usize) -> f64 {
        self.inner.effective_lr(group)
    }

    fn report(&self) -> Result<Vec<GroupReport>> {
        self.inner.report()
    }

    fn scalars(&self) -> Vec<(&'static str, Vec<f64>)> {
        self.inner.scalars()
    }

    fn weights_changed(&mut self, change: &WeightChange<'_>) -> Result<()> {
        let (WeightChange::Scaled { name, .. } | WeightChange::Replaced { name }) = change;
        self.pull(Some(name))?;
        self.inner.weights_changed(change)
    }

    fn set_training(&mut self, on: bool) -> Result<()> {
        self.inner.set_training(on)?;
        self.push()
    }

    fn options(&self) -> Result<serde_json::Value> {
        self.inner.options()
    }

    fn state(&self) -> Result<OptimizerState> {
        self.inner.state()
    }

    fn load_state(
        &mut self,
        state: &OptimizerState,
        on_change: OnChange,
    ) -> Result<Vec<ChangedOption>> {
        self.pull(None)?;
        let changed = self.inner.load_state(state, on_change)?;
        self.push()?;
        Ok(changed)
    }

    fn use_plain_operations(&mut self) -> Result<()> {
        self.inner.use_plain_operations()
    }
}
