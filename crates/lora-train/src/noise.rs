//! Noise, timesteps and noisy latents of one step, as sd-scripts makes them.

use candle_core::{DType, Device, Result, Tensor};
use lora_data::{Place, Purpose, Streams};
use lora_sd15::{NoiseSchedule, TIMESTEPS};
use rand::Rng;
use rand_distr::{Distribution, StandardNormal};

/// How noise is made. Names and defaults are sd-scripts'.
///
/// | name | default | meaning |
/// |---|---|---|
/// | `noise_offset` | 0 | adds a constant per sample and channel of this strength |
/// | `noise_offset_random_strength` | false | the strength is drawn from 0 to that |
/// | `adaptive_noise_scale` | 0 | added to the strength, times the latents' mean magnitude |
/// | `multires_noise_iterations` | 0 | coarser noise added this many times |
/// | `multires_noise_discount` | 0.3 | factor per iteration |
/// | `ip_noise_gamma` | 0 | extra noise on the input only |
/// | `ip_noise_gamma_random_strength` | false | its strength is drawn from 0 to that |
/// | `min_timestep`, `max_timestep` | 0, 1000 | range of timesteps, the end excluded |
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoiseConfig {
    /// Strength of the constant per sample and channel.
    pub noise_offset: f64,
    /// Whether that strength is drawn anew for each batch.
    pub noise_offset_random_strength: bool,
    /// Added strength per mean magnitude of the latents.
    pub adaptive_noise_scale: f64,
    /// Number of coarser noises.
    pub multires_noise_iterations: usize,
    /// Their factor per iteration.
    pub multires_noise_discount: f64,
    /// Strength of input perturbation.
    pub ip_noise_gamma: f64,
    /// Whether that strength is drawn anew for each batch.
    pub ip_noise_gamma_random_strength: bool,
    /// First timestep.
    pub min_timestep: usize,
    /// End of the timesteps, excluded.
    pub max_timestep: usize,
}

impl Default for NoiseConfig {
    fn default() -> Self {
        Self {
            noise_offset: 0.0,
            noise_offset_random_strength: false,
            adaptive_noise_scale: 0.0,
            multires_noise_iterations: 0,
            multires_noise_discount: 0.3,
            ip_noise_gamma: 0.0,
            ip_noise_gamma_random_strength: false,
            min_timestep: 0,
            max_timestep: TIMESTEPS,
        }
    }
}

/// Where a step's random numbers come from, in the order they are needed.
pub trait Draws {
    /// Standard normal numbers of this shape; the first axis is the batch.
    ///
    /// # Errors
    /// When the tensor cannot be made.
    fn normal(&mut self, shape: &[usize]) -> Result<Tensor>;
    /// One number in `[0, 1)` for the whole batch.
    fn uniform(&mut self) -> f64;
    /// One timestep in `[low, high)` per sample.
    fn timesteps(&mut self, low: usize, high: usize, n: usize) -> Vec<usize>;
}

/// Draws from named streams: each sample's numbers depend on (seed, step, position
/// in the batch) only.
#[derive(Debug, Clone)]
pub struct StepDraws {
    streams: Streams,
    step: u64,
    calls: u64,
    device: Device,
}

impl StepDraws {
    /// The draws of one micro-step.
    pub fn new(streams: Streams, step: u64, device: &Device) -> Self {
        Self {
            streams,
            step,
            calls: 0,
            device: device.clone(),
        }
    }

    /// A place of its own for each (call, item) of the step.
    fn place(&self, item: usize) -> Place {
        Place {
            epoch: self.calls,
            step: self.step,
            item: item as u64,
        }
    }
}

impl Draws for StepDraws {
    fn normal(&mut self, shape: &[usize]) -> Result<Tensor> {
        self.calls += 1;
        let n = shape.first().copied().unwrap_or(1);
        let each: usize = shape.iter().skip(1).product();
        let mut values: Vec<f32> = Vec::with_capacity(n * each);
        for item in 0..n {
            let mut rng = self.streams.stream(Purpose::NOISE, self.place(item));
            values.extend((0..each).map(|_| -> f32 { StandardNormal.sample(&mut rng) }));
        }
        Tensor::from_vec(values, shape, &self.device)
    }

    fn uniform(&mut self) -> f64 {
        self.calls += 1;
        self.streams.stream(Purpose::NOISE, self.place(0)).random()
    }

    fn timesteps(&mut self, low: usize, high: usize, n: usize) -> Vec<usize> {
        let draw = |item| {
            self.streams
                .stream(Purpose::TIMESTEPS, Place::step(self.step, item as u64))
                .random_range(low..high)
        };
        (0..n).map(draw).collect()
    }
}

/// What the network is shown and what it should answer.
#[derive(Debug, Clone)]
pub struct NoisyBatch {
    /// The noise to predict, `[n, 4, h, w]`.
    pub noise: Tensor,
    /// Latents with noise, `[n, 4, h, w]`.
    pub noisy: Tensor,
    /// One timestep per sample.
    pub timesteps: Vec<usize>,
}

/// Draws noise and timesteps for scaled `latents` `[n, 4, h, w]`, in sd-scripts'
/// order: noise, offset, multires, timesteps, input perturbation.
///
/// # Errors
/// When a tensor cannot be made.
pub fn make_noise(
    latents: &Tensor,
    config: &NoiseConfig,
    schedule: &NoiseSchedule,
    draws: &mut dyn Draws,
) -> Result<NoisyBatch> {
    let (n, c, h, w) = latents.dims4()?;
    let mut noise = draws.normal(&[n, c, h, w])?;
    if config.noise_offset != 0.0 {
        noise = offset(&noise, latents, config, draws)?;
    }
    if config.multires_noise_iterations > 0 {
        noise = multires(&noise, config, draws)?;
    }
    let (low, high) = (config.min_timestep, config.max_timestep);
    let timesteps = if low < high {
        draws.timesteps(low, high, n)
    } else {
        vec![high.min(TIMESTEPS - 1); n]
    };
    let mut shown = noise.clone();
    if config.ip_noise_gamma != 0.0 {
        let random = config.ip_noise_gamma_random_strength;
        let strength = if random {
            draws.uniform() * config.ip_noise_gamma
        } else {
            config.ip_noise_gamma
        };
        shown = (shown + (draws.normal(&[n, c, h, w])? * strength)?)?;
    }
    let noisy = schedule.add_noise(latents, &shown, &timesteps)?;
    Ok(NoisyBatch {
        noise,
        noisy,
        timesteps,
    })
}

fn offset(
    noise: &Tensor,
    latents: &Tensor,
    config: &NoiseConfig,
    draws: &mut dyn Draws,
) -> Result<Tensor> {
    let (n, c, _, _) = latents.dims4()?;
    let random = config.noise_offset_random_strength;
    let base = if random {
        draws.uniform() * config.noise_offset
    } else {
        config.noise_offset
    };
    let strength = if config.adaptive_noise_scale == 0.0 {
        Tensor::full(base as f32, (n, c, 1, 1), latents.device())?
    } else {
        let magnitude = latents.to_dtype(DType::F32)?.mean_keepdim((2, 3))?.abs()?;
        ((magnitude * config.adaptive_noise_scale)? + base)?.maximum(0.0)?
    };
    noise.broadcast_add(&(strength * draws.normal(&[n, c, 1, 1])?)?)
}

fn multires(noise: &Tensor, config: &NoiseConfig, draws: &mut dyn Draws) -> Result<Tensor> {
    let (n, c, h, w) = noise.dims4()?;
    let mut sum = noise.clone();
    for i in 0..config.multires_noise_iterations {
        let r = draws.uniform() * 2.0 + 2.0;
        let smaller = |side: usize| ((side as f64 / r.powi(i as i32)) as usize).max(1);
        let (sh, sw) = (smaller(h), smaller(w));
        let coarse = bilinear(&draws.normal(&[n, c, sh, sw])?, h, w)?;
        sum = (sum + (coarse * config.multires_noise_discount.powi(i as i32))?)?;
        if sh == 1 || sw == 1 {
            break;
        }
    }
    let flat = sum.flatten_all()?;
    let mean = flat.mean_all()?;
    let count = flat.elem_count() as f64;
    let variance = (flat.broadcast_sub(&mean)?.sqr()?.sum_all()? / (count - 1.0))?;
    sum.broadcast_div(&variance.sqrt()?)
}

/// Bilinear resize of `[n, c, h, w]` with pixel centres at halves, as two matrix
/// products.
fn bilinear(x: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (n, c, from_h, from_w) = x.dims4()?;
    if (from_h, from_w) == (h, w) {
        return Ok(x.clone());
    }
    let rows = weights(from_h, h, x.device())?;
    let columns = weights(from_w, w, x.device())?.t()?.contiguous()?;
    let x = x.reshape((n * c * from_h, from_w))?.matmul(&columns)?;
    let x = x.reshape((n * c, from_h, w))?;
    rows.unsqueeze(0)?
        .broadcast_as((n * c, h, from_h))?
        .contiguous()?
        .matmul(&x)?
        .reshape((n, c, h, w))
}

/// `[to, from]` interpolation weights.
fn weights(from: usize, to: usize, device: &Device) -> Result<Tensor> {
    let mut values = vec![0f32; to * from];
    for i in 0..to {
        let position = ((i as f32 + 0.5) * (from as f32 / to as f32) - 0.5).max(0.0);
        let low = (position as usize).min(from - 1);
        let high = (low + 1).min(from - 1);
        let part = position - low as f32;
        values[i * from + low] += 1.0 - part;
        values[i * from + high] += part;
    }
    Tensor::from_vec(values, (to, from), device)
}
