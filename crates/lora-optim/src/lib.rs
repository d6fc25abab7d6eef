//! AdamW, Prodigy and their peers for candle, with exact resume, parameter groups and learning-rate schedules.

mod adamw;
mod error;
mod group;
mod lane;
mod number;
mod optimizer;
mod prodigy;
mod rounding;
pub mod schedule;
mod slot;
mod state;
mod stepper;
mod table;

pub use adamw::{AdamW, AdamWConfig, AdamWRule};
pub use error::{Error, Result};
pub use group::{GradSource, ParamGroup};
pub use optimizer::{GroupReport, Optimizer, StepOptions, StepReport, WeightChange};
pub use prodigy::{Prodigy, ProdigyConfig, ProdigyRule};
pub use rounding::{Stream, stochastic_bf16, stochastic_round_bf16};
pub use schedule::LrSchedule;
pub use slot::{Buffer, HalfPrecision, Slot};
pub use state::{ChangedOption, OnChange, OptimizerState};
pub use stepper::{Rule, RuleConfig, Stepper};
pub use table::{GroupDefaults, GroupNumbers, Table};
