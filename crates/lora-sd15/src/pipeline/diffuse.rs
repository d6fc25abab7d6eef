//! Running a sampler over the networks.

use candle_core::Tensor;

use super::conditioning::Steering;
use super::guidance::{Guidance, LatentMask};
use super::job::{Txt2Img, bad};
use super::{OnStep, StableDiffusion, Step};
use crate::brownian::BrownianBatch;
use crate::noise::BatchNoise;
use crate::resample::Filter;
use crate::sampler::{Denoiser, Sampler, SamplerKind, ddim_timesteps, lcm_sigmas, noisy_at};
use crate::{NoiseSchedule, Result};

/// Steps of the table and steps before the last one that drawing from a picture takes:
/// `(total, t_enc)`. `t_enc + 1` steps are made, from level `total - t_enc - 1` on.
///
/// By default a share `strength` of `steps` is made; `exactly` stretches the table so that
/// `steps` are made.
///
/// ```
/// assert_eq!(lora_sd15::img2img_steps(20, 0.5, false), (20, 10));
/// assert_eq!(lora_sd15::img2img_steps(20, 0.5, true), (40, 19));
/// ```
pub fn img2img_steps(steps: usize, strength: f64, exactly: bool) -> (usize, usize) {
    let strength = strength.min(0.999);
    if !exactly {
        (steps, (strength * steps as f64) as usize)
    } else if strength > 0.0 {
        ((steps as f64 / strength) as usize, steps.saturating_sub(1))
    } else {
        (0, steps.saturating_sub(1))
    }
}

/// A picture to start from.
pub(super) struct Start {
    /// Its latents, one per picture of the batch.
    pub(super) latents: Tensor,
    /// Steps of the table, and steps before the last.
    pub(super) steps: (usize, usize),
    /// Noise added beyond the level's.
    pub(super) extra_noise: f64,
    /// Factor on the noise.
    pub(super) noise_multiplier: f64,
}

/// One run of a sampler.
pub(super) struct Pass<'a> {
    pub(super) job: &'a Txt2Img,
    pub(super) steering: &'a Steering,
    pub(super) steps: usize,
    pub(super) noise: &'a mut BatchNoise,
    /// Latent height and width.
    pub(super) size: (usize, usize),
    pub(super) start: Option<Start>,
    pub(super) mask: Option<&'a LatentMask>,
    /// The conditioning of inpainting models.
    pub(super) extra: Option<Tensor>,
}

/// Counts the steps of all passes of a job.
pub(super) struct Progress<'a, 'b> {
    pub(super) on_step: &'a mut OnStep<'b>,
    pub(super) before: usize,
    /// Steps of the passes still to come.
    pub(super) after: usize,
    pub(super) cancelled: bool,
}

impl StableDiffusion {
    pub(super) fn schedule(&self) -> NoiseSchedule {
        let schedule = NoiseSchedule::sd15_f64();
        if self.zero_terminal_snr {
            schedule.zero_terminal_snr_for_sampling()
        } else {
            schedule
        }
    }

    /// Text to latents, with the second pass if there is one.
    pub(super) fn sample(
        &self,
        job: &Txt2Img,
        prompt: &str,
        on_step: &mut OnStep<'_>,
    ) -> Result<Tensor> {
        let second = job.hires.as_ref().map(|hires| {
            let steps = if hires.steps > 0 {
                hires.steps
            } else {
                job.steps
            };
            (hires, steps)
        });
        if let Some(hires) = &job.hires {
            hires.check_network(&self.upscalers)?;
        }
        let mut progress = Progress {
            on_step,
            before: 0,
            after: second.map_or(0, |(_, steps)| steps),
            cancelled: false,
        };
        let size = (job.height / 8, job.width / 8);
        let mut noise = BatchNoise::new(job.noise_request(size.0, size.1));
        let steering = self.encoding().steering(job, prompt, job.steps, None)?;
        let pass = Pass {
            job,
            steering: &steering,
            steps: job.steps,
            noise: &mut noise,
            size,
            start: None,
            mask: None,
            extra: self.blank_conditioning(job.batch_size, size)?,
        };
        let latents = self.run_pass(pass, &mut progress)?;
        let Some((hires, steps)) = second.filter(|_| !progress.cancelled) else {
            return Ok(latents);
        };

        let (width, height) = hires.target(job);
        let size = (height / 8, width / 8);
        let latents = match hires.enlarge(job, &latents)? {
            Some(latents) => latents,
            None => {
                let large = |picture| {
                    let large = hires.enlarge_picture(job, &self.upscalers, &picture)?;
                    self.encode(&large)
                };
                let pictures = self.decode(&latents)?.into_iter();
                Tensor::cat(&pictures.map(large).collect::<Result<Vec<_>>>()?, 0)?
            }
        };
        let mut noise = BatchNoise::new(job.noise_request(size.0, size.1));
        let steering = self
            .encoding()
            .steering(job, prompt, steps, Some(job.steps))?;
        progress.after = 0;
        let pass = Pass {
            job,
            steering: &steering,
            steps,
            noise: &mut noise,
            size,
            start: Some(Start {
                latents,
                steps: img2img_steps(steps, hires.strength, true),
                extra_noise: 0.0,
                noise_multiplier: 1.0,
            }),
            mask: None,
            extra: self.blank_conditioning(job.batch_size, size)?,
        };
        self.run_pass(pass, &mut progress)
    }

    /// What an inpainting model is shown when everything is to be painted: a mask of ones
    /// and a grey picture.
    pub(super) fn blank_conditioning(
        &self,
        batch: usize,
        (h, w): (usize, usize),
    ) -> Result<Option<Tensor>> {
        if self.unet.in_channels() != 9 {
            return Ok(None);
        }
        let grey = Tensor::zeros((1, 3, 8 * h, 8 * w), candle_core::DType::F32, self.device())?;
        let latents = self.vae.encode(&grey)?.mode(self.vae.scaling_factor())?;
        let mask = Tensor::ones((1, 1, h, w), candle_core::DType::F32, self.device())?;
        let both = Tensor::cat(&[&mask, &latents], 1)?;
        Ok(Some(both.repeat((batch, 1, 1, 1))?))
    }

    pub(super) fn run_pass(
        &self,
        pass: Pass<'_>,
        progress: &mut Progress<'_, '_>,
    ) -> Result<Tensor> {
        let Pass {
            job,
            steering,
            noise,
            mask,
            ..
        } = pass;
        let schedule = self.schedule();
        let device = self.device();
        let first = noise.next(device)?;
        let kind = job.sampler;
        let (mut sampler, sigmas) =
            make_sampler(job, pass.steps, first, pass.start.as_ref(), &schedule)?;
        let mut brownian = kind.is_brownian().then(|| {
            let request = job.noise_request(pass.size.0, pass.size.1);
            BrownianBatch::new(request.source, &request.seeds, request.shape, &sigmas)
        });
        let mut draw = |from: f64, to: f64| match &mut brownian {
            Some(tree) => tree.between(from, to, device),
            None => noise.next(device),
        };
        let denoiser = if kind == SamplerKind::Lcm {
            Denoiser::lcm(schedule.clone(), self.prediction)
        } else {
            Denoiser::new(schedule.clone(), self.prediction)
        };
        let mut guidance = Guidance {
            unet: &self.unet,
            dtype: self.dtype(),
            denoiser,
            steering,
            scale: job.guidance_scale,
            skip_negative_below: job.skip_negative_below,
            mask,
            extra: pass.extra.as_ref(),
            calls: 0,
        };
        loop {
            sampler.prepare(&mut draw)?;
            let Some(query) = sampler.query() else { break };
            let answer = guidance.answer(&query)?;
            let (before, _) = sampler.progress();
            sampler.advance(&answer, &mut draw)?;
            let (done, total) = sampler.progress();
            if done == before {
                continue;
            }
            let step = Step {
                done: progress.before + done,
                total: progress.before + total + progress.after,
                latents: sampler.latents(),
            };
            if !(progress.on_step)(step) {
                progress.cancelled = true;
                break;
            }
        }
        progress.before += sampler.progress().1;
        let latents = sampler.latents().clone();
        match mask {
            Some(mask) => mask.blend(&latents),
            None => Ok(latents),
        }
    }
}

/// The noise levels of `n` steps.
fn levels(job: &Txt2Img, n: usize, schedule: &NoiseSchedule) -> Vec<f64> {
    if job.sampler == SamplerKind::Lcm {
        return lcm_sigmas(n, schedule);
    }
    let discard = job.sampler.discards_next_to_last();
    let kind = job.schedule.unwrap_or(job.sampler.automatic_schedule());
    let mut sigmas = kind.sigmas_with(n + usize::from(discard), schedule, &job.sigmas);
    if discard && sigmas.len() > 2 {
        sigmas.remove(sigmas.len() - 2);
    }
    sigmas
}

/// The sampler and the whole list of levels.
fn make_sampler(
    job: &Txt2Img,
    steps: usize,
    noise: Tensor,
    start: Option<&Start>,
    schedule: &NoiseSchedule,
) -> Result<(Box<dyn Sampler>, Vec<f64>)> {
    let kind = job.sampler;
    let (total, t_enc) = start.map_or((steps, 0), |s| s.steps);
    let noise = match start {
        Some(start) if start.noise_multiplier != 1.0 => (noise * start.noise_multiplier)?,
        _ => noise,
    };
    let timesteps = ddim_timesteps(total);
    let partial = start.is_some();
    let short = timesteps.get(..t_enc.max(1)).unwrap_or(&timesteps).to_vec();
    let at = timesteps
        .get(t_enc)
        .or(timesteps.last())
        .copied()
        .unwrap_or(0);
    if kind.on_timesteps() {
        let (x, timesteps) = match start {
            None => (noise, timesteps),
            Some(s) => {
                let mut x = noisy_at(&s.latents, &noise, at, schedule)?;
                if s.extra_noise > 0.0 {
                    x = (x + (&noise * s.extra_noise)?)?;
                }
                (x, short)
            }
        };
        let sampler = kind.over_timesteps(x, timesteps, schedule, &job.options, partial);
        return match sampler {
            Some(sampler) => Ok((sampler, Vec::new())),
            None => bad(
                "sampler",
                kind.name(),
                "expected one that works on timesteps",
            ),
        };
    }
    let sigmas = levels(job, total, schedule);
    let from = match start {
        None => 0,
        Some(_) => total
            .saturating_sub(t_enc + 1)
            .min(sigmas.len().saturating_sub(2)),
    };
    let left = sigmas.get(from..).unwrap_or(&sigmas).to_vec();
    let level = left.first().copied().unwrap_or(1.0);
    let scale = match start {
        None if job.sgm_noise => (1.0 + level * level).sqrt(),
        _ => level,
    };
    let mut x = (&noise * scale)?;
    if let Some(start) = start {
        x = (x + &start.latents)?;
        if start.extra_noise > 0.0 {
            x = (x + (&noise * start.extra_noise)?)?;
        }
    }
    match kind.over_sigmas(x, left, &job.options) {
        Some(sampler) => Ok((sampler, sigmas)),
        None => bad(
            "sampler",
            kind.name(),
            "expected one that works on noise levels",
        ),
    }
}

/// Latents of a mask: 1 where it is bright, at a latent size.
pub(super) const MASK_FILTER: Filter = Filter::Bicubic { antialias: true };
