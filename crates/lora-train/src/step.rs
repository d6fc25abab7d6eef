//! One batch: from a plan to a loss.

use candle_core::Tensor;
use lora_core::Component;
use lora_data::{BatchPlan, CaptionTime, Pixels, Place, Purpose};
use rand::Rng;

use crate::Result;
use crate::latents::LatentBatch;
use crate::loss::{SampleWeights, diffusion_loss};
use crate::noise::{NoisyBatch, StepDraws, make_noise};
use crate::trainer::Trainer;

impl Trainer {
    /// The loss of a batch, with gradients to every adapter that is trained.
    pub(crate) fn loss(
        &mut self,
        batch: &BatchPlan,
        pixels: Option<Vec<Pixels>>,
    ) -> Result<Tensor> {
        let step = self.at.batch;
        let seed = self
            .streams
            .stream(Purpose::ADAPTER_DROPOUT, Place::step(step, 0))
            .random();
        self.adapters.begin_step(seed);
        let model = self.model.as_ref();
        let data = self
            .latents
            .batch(&self.dataset, batch, pixels, model, self.streams, step)?;
        let context = self.context(batch)?;
        let mut draws = StepDraws::new(self.streams, step, &self.device);
        let noise = make_noise(
            &data.latents,
            &self.config.noise(),
            &self.noise_schedule,
            &mut draws,
        )?;
        let timesteps: Vec<f32> = noise.timesteps.iter().map(|t| *t as f32).collect();
        let timesteps = Tensor::new(timesteps, &self.device)?;
        let target = self.target(batch, &data, &noise, &timesteps, &context)?;
        let pred = self.model.predict(&noise.noisy, &timesteps, &context)?;
        let samples = SampleWeights {
            weights: batch.items.iter().map(|item| item.loss_weight).collect(),
            mask: data.mask,
        };
        Ok(diffusion_loss(
            &pred,
            &target,
            &noise.timesteps,
            &samples,
            &self.config.loss()?,
            &self.noise_schedule,
        )?)
    }

    /// The encoded captions of a batch.
    fn context(&mut self, batch: &BatchPlan) -> Result<Tensor> {
        let time = CaptionTime {
            epoch: self.at.epoch,
            step: self.at.step,
            max_train_steps: self.plan.total_steps,
        };
        let captions: Vec<String> = batch
            .items
            .iter()
            .map(|item| self.dataset.caption(item, time, self.streams))
            .collect();
        let fixed = !self.trains_text_encoder();
        self.model.encode_captions(&captions, fixed)
    }

    /// Whether the text encoder learns at the present step.
    pub(crate) fn trains_text_encoder(&self) -> bool {
        self.text_encoder_until
            .is_some_and(|until| self.at.step < until)
    }

    /// What the denoiser should answer.
    fn target(
        &mut self,
        batch: &BatchPlan,
        data: &LatentBatch,
        noise: &NoisyBatch,
        timesteps: &Tensor,
        context: &Tensor,
    ) -> Result<Tensor> {
        let target = if self.config.v_parameterization {
            self.noise_schedule
                .velocity(&data.latents, &noise.noise, &noise.timesteps)?
        } else {
            noise.noise.clone()
        };
        let preserved: Vec<bool> = batch
            .items
            .iter()
            .map(|item| {
                let image = self.dataset.images().get(item.image);
                image.is_some_and(|i| self.dataset.subset(i).diff_output_preservation)
            })
            .collect();
        if !preserved.contains(&true) {
            return Ok(target);
        }
        // The model's own answer without the adapters is the target of these samples.
        self.adapters.set_multiplier(&Component::Unet, 0.0);
        let plain = self.model.predict(&noise.noisy, timesteps, context);
        self.adapters.set_multiplier(&Component::Unet, 1.0);
        let plain = plain?.detach();
        let rows: candle_core::Result<Vec<Tensor>> = preserved
            .iter()
            .enumerate()
            .map(|(i, keep)| if *keep { &plain } else { &target }.narrow(0, i, 1))
            .collect();
        Ok(Tensor::cat(&rows?, 0)?)
    }
}
