//! The trait that every optimizer implements, and what a step tells.

use std::fmt::Debug;

use crate::error::Result;
use crate::group::{GradSource, ParamGroup};
use crate::slot::HalfPrecision;
use crate::state::{ChangedOption, OnChange, OptimizerState};

/// Settings that concern every optimizer in the same way.
///
/// | field | default | meaning |
/// |---|---|---|
/// | `max_grad_norm` | 0 | clip all gradients together to this L2 norm; 0 = off (sd-scripts and OneTrainer use 1) |
/// | `grad_scale` | 1 | factor on every gradient before anything else (1 / loss scale, 1 / micro-batches) |
/// | `check_finite` | true | look at the gradients before the step; one that is not finite skips the step and leaves every state as it was |
/// | `max_skips` | 100 | this many skipped steps in a row are an error |
/// | `half_precision` | master copy | how f16 and bf16 parameters are kept |
#[derive(Debug, Clone, PartialEq)]
pub struct StepOptions {
    /// Largest L2 norm of all gradients together, 0 = no limit.
    pub max_grad_norm: f64,
    /// Factor on every gradient.
    pub grad_scale: f64,
    /// Skip steps whose gradients are not finite.
    pub check_finite: bool,
    /// Error after this many skipped steps in a row.
    pub max_skips: u64,
    /// How half-precision parameters are kept.
    pub half_precision: HalfPrecision,
}

impl Default for StepOptions {
    fn default() -> Self {
        Self {
            max_grad_norm: 0.0,
            grad_scale: 1.0,
            check_finite: true,
            max_skips: 100,
            half_precision: HalfPrecision::Master,
        }
    }
}

/// What one call of [`Optimizer::step`] did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// False when the step was skipped because a gradient was not finite.
    pub applied: bool,
    /// L2 norm of all gradients before clipping (after `grad_scale`). `None` when it
    /// was not needed: no clipping and no check.
    pub grad_norm: Option<f64>,
    /// Factor that clipping applied, 1 when the norm was within the limit.
    pub clip: f64,
    /// The first parameter whose gradient was not finite.
    pub non_finite: Option<String>,
}

/// Numbers of one group for a log line.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GroupReport {
    /// Name of the group.
    pub name: String,
    /// Learning rate of the last step: the group's own times the schedule's factor.
    pub lr: f64,
    /// Estimated step size of Prodigy and D-Adaptation, `None` elsewhere.
    pub d: Option<f64>,
    /// The last raw estimate of d, before the maximum is taken.
    pub d_hat: Option<f64>,
    /// What the step is really multiplied with: `d * lr * multiplier`.
    pub effective_lr: f64,
    /// L2 distance of the weights from where they started, where the optimizer keeps
    /// the start (Prodigy with `slice_p` 1).
    pub distance: Option<f64>,
    /// L2 norm of this group's gradients before clipping, in the last step.
    pub grad_norm: Option<f64>,
}

/// A change of the weights that somebody other than the optimizer made.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum WeightChange<'a> {
    /// The parameter was multiplied by a factor (max-norm scaling).
    Scaled {
        /// The parameter.
        name: &'a str,
        /// The factor.
        factor: f64,
    },
    /// The parameter was overwritten; it starts anew from its present value.
    Replaced {
        /// The parameter.
        name: &'a str,
    },
}

/// An optimizer over named parameters in groups.
///
/// Object safe: a trainer holds a `Box<dyn Optimizer>`. A learning rate in force is
/// the group's own `lr` times the schedule's factor.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use lora_optim::{AdamW, AdamWConfig, Optimizer, ParamGroup};
/// let x = Var::from_tensor(&Tensor::new(&[1f32, -2.], &Device::Cpu)?)?;
/// let group = ParamGroup::new("x", vec![("x".into(), x.clone())]);
/// let config = AdamWConfig { lr: 0.1, weight_decay: 0.0, ..Default::default() };
/// let mut optimizer: Box<dyn Optimizer> = Box::new(AdamW::new(vec![group], config)?);
/// let loss = x.as_tensor().sqr()?.sum_all()?;
/// optimizer.step(&loss.backward()?)?;
/// // The first step of Adam moves every value by lr against the sign of its gradient.
/// assert_eq!(x.to_vec1::<f32>()?, [0.9, -1.9]);
/// # Ok::<(), lora_optim::Error>(())
/// ```
pub trait Optimizer: Debug + Send {
    /// Name of the algorithm, as in `from_kohya` and in saved states.
    fn algorithm(&self) -> &'static str;

    /// Takes one step.
    ///
    /// # Errors
    /// A gradient of the wrong shape, too many skipped steps in a row, evaluation
    /// mode, or a failed tensor operation.
    fn step(&mut self, grads: &dyn GradSource) -> Result<StepReport>;

    /// The groups as they were given.
    fn groups(&self) -> &[ParamGroup];

    /// Steps taken (skipped ones not counted).
    fn steps(&self) -> u64;

    /// The settings that all optimizers share.
    fn step_options(&self) -> &StepOptions;

    /// Changes them.
    ///
    /// # Errors
    /// Negative or non-finite numbers.
    fn set_step_options(&mut self, options: StepOptions) -> Result<()>;

    /// Sets the schedule's factor for the following steps.
    fn set_lr_factor(&mut self, factor: f64);

    /// Sets the schedule's factor of one group (see [`crate::LrSchedule::apply`]); a group
    /// that does not exist is ignored.
    fn set_group_lr_factor(&mut self, group: usize, factor: f64);

    /// One group's learning rate before the schedule's factor.
    fn base_lr(&self, group: usize) -> f64;

    /// Replaces one group's learning rate.
    ///
    /// # Errors
    /// No such group, or a negative rate.
    fn set_group_lr(&mut self, group: usize, lr: f64) -> Result<()>;

    /// One group's learning rate in force: its own times the schedule's factor.
    fn lr(&self, group: usize) -> f64;

    /// What the steps of a group are really multiplied with (Prodigy: `d * lr`).
    fn effective_lr(&self, group: usize) -> f64;

    /// Numbers for a log line, one entry per group. Computes norms: call it when a
    /// line is written, not for every step of a tiny model.
    ///
    /// # Errors
    /// A failed tensor operation.
    fn report(&self) -> Result<Vec<GroupReport>>;

    /// The algorithm's own named numbers (d, d_numerator, weight_sum, ...), one value
    /// per group or one for all.
    fn scalars(&self) -> Vec<(&'static str, Vec<f64>)>;

    /// Tells the optimizer that somebody else moved a weight.
    ///
    /// # Errors
    /// No such parameter, or a failed tensor operation.
    fn weights_changed(&mut self, change: &WeightChange<'_>) -> Result<()>;

    /// Switches between the weights that are trained (`true`) and the weights to save
    /// and sample from (`false`): they differ for schedule-free optimizers. Switching
    /// to evaluation and back changes no bit.
    ///
    /// # Errors
    /// A failed tensor operation.
    fn set_training(&mut self, on: bool) -> Result<()>;

    /// The options as JSON: algorithm, configuration, groups and parameter shapes.
    ///
    /// # Errors
    /// Never in practice: all options are plain numbers.
    fn options(&self) -> Result<serde_json::Value>;

    /// Everything needed to go on as if nothing had happened, weights included.
    ///
    /// # Errors
    /// A failed tensor operation.
    fn state(&self) -> Result<OptimizerState>;

    /// Goes on from a saved state: weights, state and counters. Returns the options
    /// that differ from the saved ones (only with [`OnChange::UseNew`]).
    ///
    /// # Errors
    /// Other parameters or shapes, another algorithm, a changed option
    /// ([`OnChange::Refuse`]), missing tensors. On an error nothing is changed.
    fn load_state(
        &mut self,
        state: &OptimizerState,
        on_change: OnChange,
    ) -> Result<Vec<ChangedOption>>;

    /// Runs plain candle operations even on a CPU: slower, for comparison. Only
    /// before the first step.
    ///
    /// # Errors
    /// After the first step.
    fn use_plain_operations(&mut self) -> Result<()>;
}
