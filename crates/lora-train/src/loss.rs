//! From prediction to loss, in sd-scripts' order.

use candle_core::{DType, Device, Result, Tensor};
use lora_sd15::NoiseSchedule;

/// Distance of a prediction from its target, element by element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LossType {
    /// Squared difference.
    #[default]
    L2,
    /// Absolute difference.
    L1,
    /// `2c (sqrt(d^2 + c^2) - c)`.
    Huber,
    /// `2 (sqrt(d^2 + c^2) - c)`.
    SmoothL1,
}

/// How Huber's `c` depends on the timestep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HuberSchedule {
    /// Always `huber_c * huber_scale`.
    Constant,
    /// Falls from `huber_scale` to `huber_c * huber_scale` over the timesteps.
    Exponential,
    /// By the noise level; `huber_scale` has no effect, as in sd-scripts.
    #[default]
    Snr,
}

/// Loss and weighting. Names and defaults are sd-scripts'.
///
/// | name | default | meaning |
/// |---|---|---|
/// | `loss_type` | l2 | distance |
/// | `huber_schedule`, `huber_c`, `huber_scale` | snr, 0.1, 1 | for huber and smooth_l1 |
/// | `v_parameterization` | false | the model predicts v |
/// | `min_snr_gamma` | 0 | weight min(snr, gamma) / snr; 0 = off |
/// | `debiased_estimation_loss` | false | weight 1 / sqrt(snr) |
/// | `scale_v_pred_loss_like_noise_pred` | false | for v-prediction |
/// | `v_pred_like_loss` | 0 | for noise prediction |
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossConfig {
    /// Distance.
    pub loss_type: LossType,
    /// How `c` depends on the timestep.
    pub huber_schedule: HuberSchedule,
    /// Huber's `c`.
    pub huber_c: f64,
    /// Its factor.
    pub huber_scale: f64,
    /// Whether the model predicts v instead of noise.
    pub v_parameterization: bool,
    /// Min-SNR gamma (Hang et al. 2023); 0 = off.
    pub min_snr_gamma: f64,
    /// Debiased estimation (Yu et al. 2023).
    pub debiased_estimation_loss: bool,
    /// Weight s / (s + 1).
    pub scale_v_pred_loss_like_noise_pred: bool,
    /// Adds this share of the loss times (s + 1) / s.
    pub v_pred_like_loss: f64,
}

impl Default for LossConfig {
    fn default() -> Self {
        Self {
            loss_type: LossType::L2,
            huber_schedule: HuberSchedule::Snr,
            huber_c: 0.1,
            huber_scale: 1.0,
            v_parameterization: false,
            min_snr_gamma: 0.0,
            debiased_estimation_loss: false,
            scale_v_pred_loss_like_noise_pred: false,
            v_pred_like_loss: 0.0,
        }
    }
}

impl LossConfig {
    /// Huber's `c` at a timestep.
    pub fn huber_c_at(&self, timestep: usize, schedule: &NoiseSchedule) -> f64 {
        match self.huber_schedule {
            HuberSchedule::Constant => self.huber_c * self.huber_scale,
            HuberSchedule::Exponential => {
                (timestep as f64 * self.huber_c.ln() / 1000.0).exp() * self.huber_scale
            }
            HuberSchedule::Snr => {
                (1.0 - self.huber_c) / (1.0 + schedule.sigma(timestep)).powi(2) + self.huber_c
            }
        }
    }

    /// The factor of a sample's loss at a timestep: all weights that are switched on,
    /// multiplied.
    pub fn weight(&self, timestep: usize, schedule: &NoiseSchedule) -> f64 {
        let snr = f64::from(schedule.snr(timestep));
        let v = self.v_parameterization;
        let mut weight = 1.0;
        if self.min_snr_gamma > 0.0 {
            weight *= snr.min(self.min_snr_gamma) / if v { snr + 1.0 } else { snr };
        }
        let capped = snr.min(1000.0);
        if self.scale_v_pred_loss_like_noise_pred {
            weight *= capped / (capped + 1.0);
        }
        if self.v_pred_like_loss != 0.0 {
            weight *= 1.0 + self.v_pred_like_loss * (capped + 1.0) / capped;
        }
        if self.debiased_estimation_loss {
            weight *= if v {
                1.0 / (capped + 1.0)
            } else {
                1.0 / capped.sqrt()
            };
        }
        weight
    }
}

/// Element-wise distance of `pred` and `target` `[n, ...]`, computed in f32.
///
/// # Errors
/// When the shapes differ.
pub fn elementwise_loss(
    pred: &Tensor,
    target: &Tensor,
    timesteps: &[usize],
    config: &LossConfig,
    schedule: &NoiseSchedule,
) -> Result<Tensor> {
    let difference = (pred.to_dtype(DType::F32)? - target.to_dtype(DType::F32)?)?;
    match config.loss_type {
        LossType::L2 => return difference.sqr(),
        LossType::L1 => return difference.abs(),
        LossType::Huber | LossType::SmoothL1 => {}
    }
    let c: Vec<f32> = timesteps
        .iter()
        .map(|t| config.huber_c_at(*t, schedule) as f32)
        .collect();
    let c = column(c, &difference)?;
    let root = difference
        .sqr()?
        .broadcast_add(&c.sqr()?)?
        .sqrt()?
        .broadcast_sub(&c)?;
    match config.loss_type {
        LossType::Huber => root.broadcast_mul(&(c * 2.0)?),
        _ => root * 2.0,
    }
}

/// One value per sample, shaped to multiply onto `like`.
fn column(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    let mut dims = vec![1; like.rank()];
    if let Some(first) = dims.first_mut() {
        *first = values.len();
    }
    Tensor::new(values, &Device::Cpu)?
        .reshape(dims)?
        .to_device(like.device())
}

/// What weighs on the samples of a batch.
#[derive(Debug, Clone, Default)]
pub struct SampleWeights {
    /// A factor per sample: 1, or `prior_loss_weight` for regularization pictures.
    pub weights: Vec<f32>,
    /// A mask at latent size, `[n, 1, h, w]`, multiplied onto the elements.
    pub mask: Option<Tensor>,
}

/// The loss of a batch, a 0-d tensor: element loss, mask, mean per sample, sample
/// weights, timestep weights, mean. The mean under a mask is over all elements, as
/// in sd-scripts.
///
/// # Errors
/// When the shapes differ.
pub fn diffusion_loss(
    pred: &Tensor,
    target: &Tensor,
    timesteps: &[usize],
    samples: &SampleWeights,
    config: &LossConfig,
    schedule: &NoiseSchedule,
) -> Result<Tensor> {
    let mut loss = elementwise_loss(pred, target, timesteps, config, schedule)?;
    if let Some(mask) = &samples.mask {
        loss = loss.broadcast_mul(mask)?;
    }
    let per_sample = loss.flatten_from(1)?.mean(1)?;
    let factors: Vec<f32> = timesteps
        .iter()
        .enumerate()
        .map(|(i, t)| {
            samples.weights.get(i).copied().unwrap_or(1.0) * config.weight(*t, schedule) as f32
        })
        .collect();
    (per_sample * Tensor::new(factors, pred.device())?)?.mean_all()
}
