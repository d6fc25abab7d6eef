//! The noise schedule of SD1.x: 1000 steps, scaled-linear betas.

use candle_core::{Device, Result, Tensor};

/// Number of training timesteps.
pub const TIMESTEPS: usize = 1000;

/// `betas = linspace(sqrt(0.00085), sqrt(0.012), 1000)^2` and what follows from it.
///
/// ```
/// let schedule = lora_sd15::NoiseSchedule::sd15();
/// assert!((schedule.sigma(0) - 0.0291675).abs() < 1e-6);
/// assert!((schedule.sigma(999) - 14.6146).abs() < 1e-3);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseSchedule {
    betas: Vec<f32>,
    alphas_cumprod: Vec<f32>,
}

impl NoiseSchedule {
    /// Computed in f32 as diffusers and sd-scripts do for training.
    pub fn sd15() -> Self {
        let (start, end) = (0.00085f64.sqrt() as f32, 0.012f64.sqrt() as f32);
        let step = (end - start) / (TIMESTEPS - 1) as f32;
        // As torch.linspace: each half counts from its own end.
        let root = |i: usize| {
            if i < TIMESTEPS / 2 {
                start + step * i as f32
            } else {
                end - step * (TIMESTEPS - 1 - i) as f32
            }
        };
        let betas: Vec<f32> = (0..TIMESTEPS).map(|i| root(i) * root(i)).collect();
        let mut product = 1f64;
        let alphas_cumprod = betas
            .iter()
            .map(|b| {
                product *= f64::from(1.0 - b);
                product as f32
            })
            .collect();
        Self {
            betas,
            alphas_cumprod,
        }
    }

    /// Computed in f64 and rounded at the end, as the web UI does for sampling.
    pub fn sd15_f64() -> Self {
        let (start, end) = (0.00085f64.sqrt(), 0.012f64.sqrt());
        let step = (end - start) / (TIMESTEPS - 1) as f64;
        let mut product = 1.0;
        let (mut betas, mut alphas_cumprod) = (Vec::new(), Vec::new());
        for i in 0..TIMESTEPS {
            let beta = (start + step * i as f64).powi(2);
            product *= 1.0 - beta;
            betas.push(beta as f32);
            alphas_cumprod.push(product as f32);
        }
        Self {
            betas,
            alphas_cumprod,
        }
    }

    /// Rescaled so that the last step is pure noise (Lin et al. 2023); for
    /// v-prediction.
    #[must_use]
    pub fn zero_terminal_snr(&self) -> Self {
        let roots: Vec<f32> = self.alphas_cumprod.iter().map(|a| a.sqrt()).collect();
        let (first, last) = (roots[0], roots[TIMESTEPS - 1]);
        let scaled: Vec<f32> = roots
            .iter()
            .map(|r| ((r - last) * (first / (first - last))).powi(2))
            .collect();
        let alphas: Vec<f32> = (0..TIMESTEPS)
            .map(|i| {
                if i == 0 {
                    scaled[0]
                } else {
                    scaled[i] / scaled[i - 1]
                }
            })
            .collect();
        let mut product = 1f64;
        let alphas_cumprod = alphas
            .iter()
            .map(|a| {
                product *= f64::from(1.0 - (1.0 - a));
                product as f32
            })
            .collect();
        Self {
            betas: alphas.iter().map(|a| 1.0 - a).collect(),
            alphas_cumprod,
        }
    }

    /// Betas by timestep.
    pub fn betas(&self) -> &[f32] {
        &self.betas
    }

    /// Cumulative products of `1 - beta` by timestep.
    pub fn alphas_cumprod(&self) -> &[f32] {
        &self.alphas_cumprod
    }

    /// `sqrt((1 - acp) / acp)`. Timesteps past the end count as the last.
    pub fn sigma(&self, timestep: usize) -> f64 {
        let acp = f64::from(self.alphas_cumprod[timestep.min(TIMESTEPS - 1)]);
        ((1.0 - acp) / acp).sqrt()
    }

    /// Signal-to-noise ratio `acp / (1 - acp)`, computed from roots as sd-scripts does.
    pub fn snr(&self, timestep: usize) -> f32 {
        let acp = self.alphas_cumprod[timestep.min(TIMESTEPS - 1)];
        (acp.sqrt() / (1.0 - acp).sqrt()).powi(2)
    }

    /// `sqrt(acp) x0 + sqrt(1 - acp) noise` per sample; `timesteps` has one entry per
    /// sample of `latents` `[n, c, h, w]`.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn add_noise(
        &self,
        latents: &Tensor,
        noise: &Tensor,
        timesteps: &[usize],
    ) -> Result<Tensor> {
        let (signal, spread) = self.factors(timesteps, latents)?;
        latents.broadcast_mul(&signal)? + noise.broadcast_mul(&spread)?
    }

    /// The target of v-prediction: `sqrt(acp) noise - sqrt(1 - acp) x0`.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn velocity(
        &self,
        latents: &Tensor,
        noise: &Tensor,
        timesteps: &[usize],
    ) -> Result<Tensor> {
        let (signal, spread) = self.factors(timesteps, latents)?;
        noise.broadcast_mul(&signal)? - latents.broadcast_mul(&spread)?
    }

    fn factors(&self, timesteps: &[usize], like: &Tensor) -> Result<(Tensor, Tensor)> {
        if timesteps.len() != like.dim(0)? || timesteps.iter().any(|t| *t >= TIMESTEPS) {
            candle_core::bail!(
                "timesteps {timesteps:?} do not fit latents {:?}",
                like.shape()
            );
        }
        let column = |f: &dyn Fn(f32) -> f32| {
            let values: Vec<f32> = timesteps
                .iter()
                .map(|t| f(self.alphas_cumprod[*t]))
                .collect();
            Tensor::new(values, &Device::Cpu)?
                .reshape(((), 1, 1, 1))?
                .to_device(like.device())?
                .to_dtype(like.dtype())
        };
        Ok((column(&f32::sqrt)?, column(&|a| (1.0 - a).sqrt())?))
    }

    /// The timestep at which the network saw noise of this sigma: linear in log sigma
    /// between table entries, clamped to the table.
    pub fn timestep(&self, sigma: f64) -> f64 {
        let log = sigma.ln();
        let logs = |t: usize| self.sigma(t).ln();
        let above = (1..TIMESTEPS)
            .find(|t| logs(*t) >= log)
            .unwrap_or(TIMESTEPS - 1);
        let (low, high) = (logs(above - 1), logs(above));
        (above - 1) as f64 + ((log - low) / (high - low)).clamp(0.0, 1.0)
    }

    /// The inverse of [`timestep`](Self::timestep).
    pub fn sigma_at(&self, timestep: f64) -> f64 {
        let t = timestep.clamp(0.0, (TIMESTEPS - 1) as f64);
        let low = t.floor() as usize;
        let weight = t - low as f64;
        ((1.0 - weight) * self.sigma(low).ln() + weight * self.sigma(low + 1).ln()).exp()
    }

    /// The table entry nearest to a noise level in log sigma.
    pub fn nearest_timestep(&self, sigma: f64) -> usize {
        let log = sigma.ln();
        let distance = |t: &usize| (self.sigma(*t).ln() - log).abs();
        (0..TIMESTEPS)
            .min_by(|a, b| distance(a).total_cmp(&distance(b)))
            .unwrap_or(0)
    }

    /// The cumulative product at a fractional timestep, by [`sigma_at`](Self::sigma_at).
    pub fn alpha_cumprod_at(&self, timestep: f64) -> f64 {
        1.0 / (1.0 + self.sigma_at(timestep).powi(2))
    }

    /// [`zero_terminal_snr`](Self::zero_terminal_snr) for sampling: the last noise level is
    /// very large instead of infinite, the web UI's value.
    #[must_use]
    pub fn zero_terminal_snr_for_sampling(&self) -> Self {
        let mut rescaled = self.zero_terminal_snr();
        if let Some(last) = rescaled.alphas_cumprod.last_mut() {
            *last = 4.897_345e-8;
        }
        rescaled
    }
}
