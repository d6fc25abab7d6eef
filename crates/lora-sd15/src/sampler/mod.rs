//! Samplers as small state machines that a caller drives step by step: any
//! denoiser, any latents, preview and cancel at every step.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use lora_sd15::sampler::{Euler, Query, Sampler};
//! // A "denoiser" that always answers 1: the sampler must arrive there.
//! let x = Tensor::new(&[10f32], &Device::Cpu)?;
//! let mut sampler = Euler::new(x, vec![10.0, 5.0, 0.0], Default::default());
//! let mut noise = |_: f64, _: f64| Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu);
//! while let Some(Query::Sigma { x, .. }) = sampler.query() {
//!     let denoised = x.ones_like()?;
//!     sampler.advance(&denoised, &mut noise)?;
//! }
//! assert_eq!(sampler.latents().to_vec1::<f32>()?, [1.0]);
//! # Ok::<(), candle_core::Error>(())
//! ```

mod beta;
mod ddim;
mod denoiser;
mod descent;
mod euler;
mod kind;
mod lcm;
mod multistep;
mod sde;
mod second_order;
mod sigmas;
mod unipc;

use candle_core::{Result, Tensor};

pub use ddim::{Ddim, Plms, ddim_timesteps};
pub use denoiser::{Denoiser, Prediction};
pub use descent::{Churn, Renewal};
pub use euler::{Euler, EulerAncestral};
pub use kind::{SamplerKind, SamplerOptions, noisy_at};
pub use lcm::{Lcm, lcm_sigmas};
pub use multistep::{Dpmpp2m, Lms};
pub use sde::{Dpmpp2mSde, Dpmpp3mSde, DpmppSde, SdeSolver};
pub use second_order::{Dpm2, Dpm2Ancestral, Dpmpp2sAncestral, Heun};
pub use sigmas::{SigmaOptions, SigmaSchedule};
pub use unipc::{UniPc, UniPcOptions, UniPcTimes, UniPcVariant};

/// What a sampler wants evaluated next.
#[derive(Debug, Clone)]
pub enum Query {
    /// The denoised latents for `x = x0 + sigma * noise`.
    Sigma {
        /// Current latents, of standard deviation about `sqrt(sigma^2 + 1)`.
        x: Tensor,
        /// Noise level.
        sigma: f64,
    },
    /// The network's own answer (noise prediction) for variance-preserving latents.
    Timestep {
        /// Current latents, of standard deviation about 1.
        x: Tensor,
        /// Timestep, 0 to 999.
        timestep: f64,
    },
}

/// Noise for samplers that add some at every step: called with the sigma it is added
/// at and the next one (plain sources ignore both).
pub type StepNoise<'a> = dyn FnMut(f64, f64) -> Result<Tensor> + 'a;

/// A sampler in the middle of its work.
pub trait Sampler {
    /// Draws the noise that some samplers add before the denoiser is asked. Call it
    /// before each [`query`](Sampler::query); most samplers do nothing.
    ///
    /// # Errors
    /// When `noise` fails.
    fn prepare(&mut self, _noise: &mut StepNoise<'_>) -> Result<()> {
        Ok(())
    }

    /// What to evaluate next; `None` when the latents are finished.
    fn query(&self) -> Option<Query>;

    /// Goes on with the answer to [`query`](Sampler::query).
    ///
    /// # Errors
    /// When shapes differ or `noise` fails.
    fn advance(&mut self, answer: &Tensor, noise: &mut StepNoise<'_>) -> Result<()>;

    /// The current latents.
    fn latents(&self) -> &Tensor;

    /// Steps done and steps in all.
    fn progress(&self) -> (usize, usize);
}
