//! candle-nn's own `Optimizer` trait for every optimizer of this crate, so that they drop
//! into code written for it.
//!
//! ```
//! use candle_core::{DType, Device, Var};
//! use candle_nn::Optimizer;
//! use lora_optim::{Prodigy, ProdigyConfig};
//! let x = Var::ones(2, DType::F32, &Device::Cpu)?;
//! let mut optimizer = <Prodigy as Optimizer>::new(vec![x.clone()], ProdigyConfig::default())?;
//! optimizer.backward_step(&x.as_tensor().sqr()?.sum_all()?)?;
//! assert_eq!(optimizer.learning_rate(), 1.0);
//! # Ok::<(), candle_core::Error>(())
//! ```

use candle_core::Var;
use candle_core::backprop::GradStore;

use crate::error::Error;
use crate::group::ParamGroup;
use crate::optimizer::Optimizer;
use crate::stepper::{Rule, Stepper};

fn wrap(error: Error) -> candle_core::Error {
    match error {
        Error::Candle(error) => error,
        other => candle_core::Error::wrap(other),
    }
}

/// One group named "all", parameters named by their position: `var0`, `var1`, ...
/// Variables that are not floating are left out, as candle-nn does.
impl<R: Rule> candle_nn::Optimizer for Stepper<R> {
    type Config = R::Config;

    fn new(vars: Vec<Var>, config: R::Config) -> candle_core::Result<Self> {
        let floats = vars.into_iter().filter(|v| v.dtype().is_float());
        let params = floats
            .enumerate()
            .map(|(i, v)| (format!("var{i}"), v))
            .collect();
        Stepper::new(vec![ParamGroup::new("all", params)], config).map_err(wrap)
    }

    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        Optimizer::step(self, grads).map(|_| ()).map_err(wrap)
    }

    /// The rate of the first group.
    fn learning_rate(&self) -> f64 {
        self.base_lr(0)
    }

    /// Sets the rate of every group.
    fn set_learning_rate(&mut self, lr: f64) {
        for group in 0..self.groups().len() {
            // The only error is a bad rate, which this signature cannot report: keep the old one.
            let _ = self.set_group_lr(group, lr);
        }
    }
}
