#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod adafactor;
mod adamw;
mod adamw8bit;
mod came;
mod clip;
pub mod compat;
mod dadapt;
mod dadapt_preprint;
mod diagnostics;
mod ema;
mod error;
mod factored;
mod group;
pub mod kohya;
mod lane;
mod lion;
mod lion8bit;
mod number;
mod on_host;
mod optimizer;
mod plain;
mod prodigy;
mod prodigy_plus;
pub mod quantize;
mod quantize_tensor;
mod registry;
mod rounding;
pub mod schedule;
mod schedule_free;
mod sgd;
mod slot;
pub mod state;
mod stepper;
mod table;
mod walk;

// The optimizers and their options.
pub use adafactor::{Adafactor, AdafactorConfig};
pub use adamw::{AdamW, AdamWConfig};
pub use adamw8bit::{AdamW8bit, AdamW8bitConfig};
pub use came::{Came, CameConfig};
pub use dadapt::{DAdaptAdam, DAdaptConfig};
pub use dadapt_preprint::DAdaptAdamPreprint;
pub use lion::{Lion, LionConfig};
pub use lion8bit::Lion8bit;
pub use prodigy::{Prodigy, ProdigyConfig};
pub use prodigy_plus::{ProdigyPlus, ProdigyPlusConfig};
pub use schedule_free::{ScheduleFree, ScheduleFreeBase, ScheduleFreeConfig};
pub use sgd::{Sgd, SgdConfig};

// What they share.
pub use error::{Error, Result};
pub use group::{GradSource, ParamGroup};
pub use on_host::OnHost;
pub use optimizer::{GroupReport, Optimizer, StepOptions, StepReport, WeightChange};
pub use registry::{REFERENCE_NAMES, from_reference};
pub use schedule::LrSchedule;
pub use slot::HalfPrecision;
pub use state::{ChangedOption, OnChange, OptimizerState};
pub use stepper::{RuleConfig, Stepper};

// What stands beside them.
pub use clip::clip_grad_norm;
pub use diagnostics::{Advice, Watch};
pub use ema::{Ema, EmaConfig};
pub use rounding::{Stream, stochastic_bf16, stochastic_round_bf16};

/// The parts behind [`Stepper`]: named here because they occur in types, not to be called.
pub mod rule {
    pub use crate::adafactor::AdafactorRule;
    pub use crate::adamw::AdamWRule;
    pub use crate::adamw8bit::AdamW8bitRule;
    pub use crate::came::CameRule;
    pub use crate::dadapt::DAdaptRule;
    pub use crate::dadapt_preprint::DAdaptPreprintRule;
    pub use crate::lion::LionRule;
    pub use crate::lion8bit::Lion8bitRule;
    pub use crate::prodigy::ProdigyRule;
    pub use crate::prodigy_plus::ProdigyPlusRule;
    pub use crate::schedule_free::ScheduleFreeRule;
    pub use crate::sgd::SgdRule;
    pub use crate::slot::{Buffer, Slot};
    pub use crate::stepper::Rule;
    pub use crate::table::{GroupDefaults, GroupNumbers, Table};
}
