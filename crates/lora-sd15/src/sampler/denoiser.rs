//! From a network's answer to denoised latents.

use candle_core::{Result, Tensor};

use super::descent::mix;
use super::lcm::lcm_timestep;
use crate::NoiseSchedule;

/// What a network was trained to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Prediction {
    /// The noise in its input: SD1.x.
    #[default]
    Epsilon,
    /// `sqrt(acp) noise - sqrt(1 - acp) x0`: "v".
    V,
}

impl Prediction {
    /// By name: `epsilon` (`eps`) or `v` (`v_prediction`).
    ///
    /// # Errors
    /// [`Error::UnknownName`](crate::Error::UnknownName).
    pub fn from_name(name: &str) -> crate::Result<Self> {
        match name.to_lowercase().replace('-', "_").as_str() {
            "epsilon" | "eps" => Ok(Self::Epsilon),
            "v" | "v_prediction" | "v_pred" => Ok(Self::V),
            _ => Err(crate::Error::UnknownName {
                what: "prediction",
                name: name.to_string(),
                known: "epsilon, v".into(),
            }),
        }
    }
}

/// Turns a network into the denoiser that samplers ask: scales its input, finds its
/// timestep, and reads its answer.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_sd15::NoiseSchedule;
/// use lora_sd15::sampler::{Denoiser, Prediction};
/// let denoiser = Denoiser::new(NoiseSchedule::sd15_f64(), Prediction::Epsilon);
/// let x = Tensor::new(&[3f32], &Device::Cpu)?;
/// let (input, timestep) = denoiser.input(&x, 2.0)?;
/// let answer = (input * 0.5)?; // a network
/// let denoised = denoiser.denoised(&x, 2.0, &answer)?;
/// assert!(timestep > 0.0 && denoised.to_vec1::<f32>()?[0] < 3.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Denoiser {
    schedule: NoiseSchedule,
    prediction: Prediction,
    quantized: bool,
    consistency: bool,
}

impl Denoiser {
    /// For a network trained on this schedule.
    pub fn new(schedule: NoiseSchedule, prediction: Prediction) -> Self {
        Self {
            schedule,
            prediction,
            quantized: false,
            consistency: false,
        }
    }

    /// For a latent consistency model: its 50 timesteps, and its answer bent so that it
    /// gives the input back at no noise.
    pub fn lcm(schedule: NoiseSchedule, prediction: Prediction) -> Self {
        Self {
            consistency: true,
            ..Self::new(schedule, prediction)
        }
    }

    /// Uses the nearest whole timestep instead of fractional ones.
    #[must_use]
    pub fn quantized(self) -> Self {
        Self {
            quantized: true,
            ..self
        }
    }

    /// The network's timestep for a noise level.
    pub fn timestep(&self, sigma: f64) -> f64 {
        if self.consistency {
            lcm_timestep(sigma, &self.schedule) as f64
        } else if self.quantized {
            self.schedule.nearest_timestep(sigma) as f64
        } else {
            self.schedule.timestep(sigma)
        }
    }

    /// The noise level at a timestep.
    pub fn sigma_of(&self, timestep: f64) -> f64 {
        self.schedule.sigma_at(timestep)
    }

    /// The network's input for `x = x0 + sigma * noise`, and its timestep.
    ///
    /// # Errors
    /// When the tensor operation fails.
    pub fn input(&self, x: &Tensor, sigma: f64) -> Result<(Tensor, f64)> {
        let scaled = (x / (sigma * sigma + 1.0).sqrt())?;
        Ok((scaled, self.timestep(sigma)))
    }

    /// Denoised latents from the network's answer to [`input`](Self::input).
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn denoised(&self, x: &Tensor, sigma: f64, answer: &Tensor) -> Result<Tensor> {
        let denoised = match self.prediction {
            Prediction::Epsilon => mix(1.0, x, -sigma, answer)?,
            Prediction::V => {
                let square = sigma * sigma + 1.0;
                mix(1.0 / square, x, -sigma / square.sqrt(), answer)?
            }
        };
        if !self.consistency {
            return Ok(denoised);
        }
        let time = self.timestep(sigma) * 10.0;
        let square = time * time + 0.25;
        mix(time / square.sqrt(), &denoised, 0.25 / square, x)
    }

    /// The noise prediction for variance-preserving `x` at a timestep, from the network's
    /// answer to `x`.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn epsilon(&self, x: &Tensor, timestep: f64, answer: &Tensor) -> Result<Tensor> {
        match self.prediction {
            Prediction::Epsilon => Ok(answer.clone()),
            Prediction::V => {
                let acp = self.schedule.alpha_cumprod_at(timestep);
                mix(acp.sqrt(), answer, (1.0 - acp).sqrt(), x)
            }
        }
    }
}
