//! Parameters, their names, and the groups that share a learning rate.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use crate::error::{Error, Result, check, check_beta, check_not_negative, check_positive};

/// Parameters that share a learning rate and a few other numbers.
///
/// `None` means "what the optimizer's own options say".
///
/// | field | default | meaning |
/// |---|---|---|
/// | `name` | "" | for logs and the saved state: "unet", "text_encoder", "unet plus" |
/// | `params` | empty | named variables, in a fixed order |
/// | `lr` | `None` | learning rate before the schedule's factor, 0 or more |
/// | `weight_decay` | `None` | 0 or more |
/// | `betas` | `None` | refused by optimizers that have no pair of betas per group |
/// | `eps` | `None` | above 0; refused like `betas` |
/// | `multiplier` | 1 | factor on this group's steps. Under Prodigy and D-Adaptation the estimate of d stays shared, so this is how a text encoder gets half the U-Net's step; elsewhere it multiplies the learning rate |
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use lora_optim::ParamGroup;
/// let up = Var::zeros((4, 2), DType::F32, &Device::Cpu)?;
/// let group = ParamGroup { lr: Some(1e-4), ..ParamGroup::new("unet", vec![("up".into(), up)]) };
/// assert_eq!(group.numel(), 8);
/// # Ok::<(), lora_optim::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ParamGroup {
    /// Name for logs and the saved state.
    pub name: String,
    /// Named variables. The order is kept and part of the saved state.
    pub params: Vec<(String, Var)>,
    /// Learning rate before the schedule's factor.
    pub lr: Option<f64>,
    /// Weight decay.
    pub weight_decay: Option<f64>,
    /// Decay rates of the two moments.
    pub betas: Option<(f64, f64)>,
    /// Term added to the denominator.
    pub eps: Option<f64>,
    /// Factor on this group's steps.
    pub multiplier: f64,
}

impl Default for ParamGroup {
    fn default() -> Self {
        Self {
            name: String::new(),
            params: Vec::new(),
            lr: None,
            weight_decay: None,
            betas: None,
            eps: None,
            multiplier: 1.0,
        }
    }
}

impl ParamGroup {
    /// A group that takes every number from the optimizer's options.
    pub fn new(name: impl Into<String>, params: Vec<(String, Var)>) -> Self {
        Self {
            name: name.into(),
            params,
            ..Default::default()
        }
    }

    /// Number of trained values.
    pub fn numel(&self) -> usize {
        self.params.iter().map(|(_, var)| var.elem_count()).sum()
    }

    /// Checks the numbers of one group and the dtypes of its parameters.
    ///
    /// # Errors
    /// [`Error::Option`] and [`Error::ParameterDtype`].
    pub fn validate(&self) -> Result<()> {
        if let Some(lr) = self.lr {
            check_not_negative("lr", lr)?;
        }
        if let Some(wd) = self.weight_decay {
            check_not_negative("weight_decay", wd)?;
        }
        if let Some((b1, b2)) = self.betas {
            check_beta("betas", b1)?;
            check_beta("betas", b2)?;
        }
        if let Some(eps) = self.eps {
            check_positive("eps", eps)?;
        }
        check(
            self.multiplier.is_finite() && self.multiplier > 0.0,
            "multiplier",
            self.multiplier,
            "a finite number above 0",
        )?;
        for (name, var) in &self.params {
            if !matches!(var.dtype(), DType::F32 | DType::BF16 | DType::F16) {
                return Err(Error::ParameterDtype {
                    name: name.clone(),
                    dtype: var.dtype().as_str(),
                });
            }
        }
        Ok(())
    }
}

/// Checks each group, and that no name and no variable occurs twice.
pub(crate) fn validate_groups(groups: &[ParamGroup]) -> Result<()> {
    let mut names = BTreeSet::new();
    let mut ids = Vec::new();
    for group in groups {
        group.validate()?;
        for (name, var) in &group.params {
            if !names.insert(name.as_str()) || ids.contains(&var.id()) {
                return Err(Error::DuplicateParameter { name: name.clone() });
            }
            ids.push(var.id());
        }
    }
    if names.is_empty() {
        Err(Error::NoParameters)
    } else {
        Ok(())
    }
}

/// Where an optimizer finds gradients.
///
/// A parameter without a gradient is left alone completely: no decay, no change
/// of its state, its step counter does not advance. A zero gradient is different:
/// everything happens.
pub trait GradSource: Sync {
    /// The gradient of one parameter, if it has one.
    fn grad(&self, name: &str, var: &Var) -> Option<&Tensor>;
}

impl GradSource for GradStore {
    fn grad(&self, _name: &str, var: &Var) -> Option<&Tensor> {
        self.get(var.as_tensor())
    }
}

/// Gradients by parameter name: what a trainer accumulates over micro-batches.
impl GradSource for BTreeMap<String, Tensor> {
    fn grad(&self, name: &str, _var: &Var) -> Option<&Tensor> {
        self.get(name)
    }
}
