//! The training loop of a LoRA trainer, as a library whose parts are usable alone.
//!
//! * [`Settings`] and [`TrainConfig`]: sd-scripts' options from TOML and command line
//! * [`Plan`]: pictures, repeats, batches, updates
//! * [`Captions`], [`LatentSource`]: what the UNet is shown
//! * [`make_noise`], [`diffusion_loss`]: one step's mathematics
//! * [`Trainer`]: all of it wired, telling an [`Observer`] what happens
//! * [`metadata`], [`Naming`]: what result files say and are called

#![forbid(unsafe_code)]

mod config;
mod error;
pub mod gui;
mod latents;
mod lock;
pub mod logs;
mod loss;
mod memory;
pub mod metadata;
mod model;
mod naming;
mod network;
mod noise;
mod observer;
pub mod options;
pub mod pick;
mod plan;
mod preset;
mod samples;
mod saving;
mod setup;
mod state;
mod step;
mod text;
mod trainer;
mod validation;
mod warnings;

pub use config::{Inline, Steps, TrainConfig};
pub use error::{Error, Result};
pub use latents::{LatentBatch, LatentSource};
pub use loss::{
    HuberSchedule, LossConfig, LossType, SampleWeights, diffusion_loss, elementwise_loss,
};
pub use memory::{LargestBatch, MemoryEstimate, ModelMemory};
pub use model::{Model, Parts, Sd15};
pub use naming::{Naming, outdated_epoch, outdated_step};
pub use network::NetworkArgs;
pub use noise::{Draws, NoiseConfig, NoisyBatch, StepDraws, make_noise};
pub use observer::{BatchReport, Event, LossAverage, Observer};
pub use options::Settings;
pub use plan::{Plan, TrainedKind};
pub use samples::{SamplePrompt, line_options, read_sample_prompts};
pub use setup::param_groups;
pub use state::RunState;
pub use text::{Captions, TextConfig, join_chunks};
pub use trainer::{Outcome, Trainer};
pub use validation::{ValidationReport, turning_point};

/// The README's programs, compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct ReadmeDoctests;
