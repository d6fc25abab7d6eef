//! Adapters for candle models: LoRA and its relatives, their files, attaching,
//! merging.
//!
//! An [`AdapterSet`] is what a file holds or a training run produces. Use it in one
//! of three ways:
//!
//! * [`AdapterSet::merged`] wraps a `VarBuilder`: any candle model, unchanged, is
//!   built with the adapter in its weights;
//! * [`AdapterSet::attach`] puts adapters beside the frozen weights of a model made
//!   of this crate's [`Layer`]s, to train them or to change their strength between
//!   two images;
//! * [`AdapterSet::merge`] adds them to such a model's weights for good.
//!
//! ```no_run
//! use candle_core::{DType, Device};
//! use candle_nn::VarBuilder;
//! use lora_core::{AdapterSet, Component};
//! let device = Device::Cpu;
//! let base = VarBuilder::from_buffered_safetensors(std::fs::read("unet.safetensors")?, DType::F32, &device)?;
//! let style = AdapterSet::load("style.safetensors", &device)?;
//! let vb = style.merged(base, Component::Unet, 0.8);
//! // hand `vb` to the model's constructor
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Conventions
//!
//! `W' = W + multiplier * alpha / rank * delta`, the scale applied once. Layer names
//! are those of kohya's sd-scripts: prefix and diffusers path with underscores. The
//! base weight is never written to except by [`AdapterSet::merge`].

// Mapping files and giving their pages back; see docs/unsafe.md.
#![deny(unsafe_code)]

mod adapter;
pub mod algebra;
mod blocks;
mod component;
mod config;
mod control;
mod create;
mod error;
mod family;
pub mod format;
mod held;
mod init;
mod layer;
mod max_norm;
pub mod merge;
mod set;
mod targets;

pub use adapter::{Adapter, DoraMultiplier, Family, LowRank, Middle, Reading};
pub use blocks::{Block, BlockValues};
pub use component::Component;
pub use config::{AdapterConfig, Override};
pub use control::{Draws, Dropout, DropoutKind, Pass};
pub use error::{Error, Result};
pub use family::{
    Boft, Dora, Full, Glora, Ia3, Loha, Lokr, LokrFactor, Lora, Norm, Oft, Tlora, factorization,
};
pub use format::{FileReport, SaveOptions};
pub use held::Held;
pub use layer::{Adaptable, BaseLayer, Layer, LayerOp};
pub use lora_kernels::{Compute, Conv2dParams};
pub use max_norm::NormReport;
pub use set::{AdapterSet, AttachReport};
pub use targets::Targets;

/// The README's programs, compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct ReadmeDoctests;
