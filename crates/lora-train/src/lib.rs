//! The training loop of a LoRA trainer, as a library whose parts are usable alone.
//!
//! * [`Settings`] and [`TrainConfig`]: sd-scripts' options from TOML and command line
//! * [`Plan`]: pictures, repeats, batches, updates
//! * [`Captions`], [`LatentCache`]: what the UNet is shown
//! * [`make_noise`], [`diffusion_loss`]: one step's mathematics
//! * [`Trainer`]: all of it wired, telling an [`Observer`] what happens
//! * [`metadata`], [`Naming`]: what result files say and are called

mod config;
mod error;
mod latents;
mod loss;
pub mod metadata;
mod naming;
mod network;
mod noise;
mod observer;
pub mod options;
mod plan;
mod preset;
mod setup;
mod text;
mod trainer;

pub use config::{Steps, TrainConfig};
pub use error::{Error, Result};
pub use latents::{LatentBatch, LatentCache};
pub use loss::{
    HuberSchedule, LossConfig, LossType, SampleWeights, diffusion_loss, elementwise_loss,
};
pub use naming::{Naming, outdated_epoch, outdated_step};
pub use network::NetworkArgs;
pub use noise::{Draws, NoiseConfig, NoisyBatch, StepDraws, make_noise};
pub use observer::{BatchReport, Event, LossAverage, Observer};
pub use options::Settings;
pub use plan::Plan;
pub use setup::param_groups;
pub use text::{Captions, TextConfig, join_chunks};
pub use trainer::{Outcome, Trainer};

/// The README's programs, compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct ReadmeDoctests;
