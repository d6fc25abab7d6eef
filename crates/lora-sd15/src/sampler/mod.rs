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

mod ddim;
mod dpmpp;
mod euler;
mod sigmas;

use candle_core::{Result, Tensor};

pub use ddim::{Ddim, ddim_timesteps};
pub use dpmpp::Dpmpp2m;
pub use euler::{Euler, EulerAncestral, EulerAncestralOptions, EulerOptions};
pub use sigmas::SigmaSchedule;

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

/// `(down, up)`: where an ancestral step goes, and how much noise is added there.
fn ancestral(sigma: f64, next: f64, eta: f64) -> (f64, f64) {
    if eta == 0.0 {
        return (next, 0.0);
    }
    let up = next.min(eta * (next.powi(2) * (sigma.powi(2) - next.powi(2)) / sigma.powi(2)).sqrt());
    ((next.powi(2) - up.powi(2)).max(0.0).sqrt(), up)
}
