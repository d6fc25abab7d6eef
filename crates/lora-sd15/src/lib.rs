//! Stable Diffusion 1.x for candle, every layer open to adapters.
//!
//! * [`StableDiffusion`]: the whole pipeline; [`Txt2Img`] and [`Img2Img`] describe jobs
//! * [`Checkpoint`]: single-file and diffusers-folder models, recognised and checked
//! * [`UNet`], [`TextEncoder`], [`Vae`], [`Tokenizer`]: the parts, usable alone;
//!   the first two implement [`lora_core::Adaptable`]
//! * [`TrainableModel`]: all weights as variables, to train from scratch or in full
//! * [`NoiseSchedule`], [`sampler`], [`BatchNoise`], [`BrownianTree`]: the diffusion
//!   around them
//! * [`prompt`]: attention weights, schedules, composition, chunks, `<lora:...>` tags
//! * [`Infotext`]: the text in the web UI's pictures; [`Sweep`]: X/Y/Z grids
//!
//! ```no_run
//! use candle_core::{DType, Device};
//! use lora_sd15::{StableDiffusion, Txt2Img};
//! let mut sd = StableDiffusion::load("v1-5-pruned-emaonly.safetensors", DType::F32, &Device::Cpu)?;
//! let request = Txt2Img { prompt: "a lighthouse in a storm".into(), ..Default::default() };
//! let images = sd.txt2img(&request, &mut |_| true)?;
//! images[0].save_png("lighthouse.png", None)?;
//! # Ok::<(), lora_sd15::Error>(())
//! ```

#![forbid(unsafe_code)]

mod brownian;
mod checkpoint;
mod config;
mod error;
mod grid;
mod image;
mod infotext;
mod mask;
mod noise;
mod pipeline;
pub mod prompt;
mod resample;
mod rng;
pub mod sampler;
mod schedule;
mod sweep;
mod text_encoder;
pub mod tokenizer;
mod trainable;
mod unet;
mod upscale;
mod vae;

pub use brownian::{BrownianTree, seed_sequence};
pub use checkpoint::{Checkpoint, Part, WeightStorage, diffusers_to_ldm, ldm_to_diffusers};
pub use config::{ModelConfig, TextConfig, UnetConfig, VaeConfig};
pub use error::{Error, Result};
pub use grid::Grid;
pub use image::Image;
pub use infotext::{Infotext, infotext};
pub use noise::{BatchNoise, NoiseRequest};
pub use pipeline::{
    AdapterMode, Emphasis, Hires, Img2Img, Inpaint, MaskedContent, OnStep, StableDiffusion, Step,
    Txt2Img, Upscaler, Variation, find_adapter, find_model, find_upscaler, img2img_steps,
};
pub use resample::{Filter, ResizeMode};
pub use rng::{NoiseGenerator, NoiseSource, philox_words};
pub use sampler::SamplerKind;
pub use schedule::{NoiseSchedule, TIMESTEPS};
pub use sweep::{Axis, Cell, Sweep};
pub use text_encoder::{TextEncoder, weigh, weigh_restoring_mean};
pub use tokenizer::Tokenizer;
pub use trainable::TrainableModel;
pub use unet::{StepSize, UNet, UnevenSize, timestep_embedding};
pub use upscale::UpscaleNetwork;
pub use vae::{Posterior, Vae};

/// The README's programs, compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct ReadmeDoctests;
