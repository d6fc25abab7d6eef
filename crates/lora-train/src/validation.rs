//! Validation: the loss on pictures that are not trained on.

use candle_core::{DType, Tensor};
use lora_data::{BatchPlan, Place, Purpose, Role, Streams};
use rand_distr::{Distribution, StandardNormal};

use crate::Result;
use crate::trainer::Trainer;

/// Numbers of one validation.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidationReport {
    /// Updates made.
    pub step: usize,
    /// Epoch in progress, counted from 1.
    pub epoch: usize,
    /// Mean squared error over all pictures and timesteps.
    pub loss: f64,
    /// The same per timestep.
    pub by_timestep: Vec<(usize, f64)>,
    /// This loss minus the running average of the training loss (`divergence` in
    /// sd-scripts).
    pub divergence: f64,
    /// Whether it is the lowest so far.
    pub best: bool,
}

/// Where the validation loss was lowest, and whether it has risen since.
///
/// ```
/// let losses = [(10, 0.30), (20, 0.21), (30, 0.22), (40, 0.25)];
/// let (step, loss, rising) = lora_train::turning_point(&losses).unwrap();
/// assert_eq!((step, loss, rising), (20, 0.21, true));
/// ```
pub fn turning_point(losses: &[(usize, f64)]) -> Option<(usize, f64, bool)> {
    let (at, best) = losses
        .iter()
        .enumerate()
        .min_by(|a, b| a.1.1.total_cmp(&b.1.1))?;
    let after = losses.get(at + 1..).unwrap_or(&[]);
    let rising = after.len() >= 2 && after.iter().all(|(_, loss)| *loss > best.1);
    Some((best.0, best.1, rising))
}

impl Trainer {
    /// The loss on the held-out pictures, each with its whole caption at four timesteps with
    /// the same noise every time: figures of different epochs, and of runs with the same validation pictures,
    /// can be compared. It is the plain mean squared error, whatever loss is trained.
    ///
    /// # Errors
    /// When a picture cannot be read or the model fails.
    pub fn validate(&mut self) -> Result<Option<ValidationReport>> {
        let mut batches = self.dataset.validation();
        if let Some(most) = self.config.max_validation_steps {
            batches.truncate(most);
        }
        if batches.is_empty() {
            return Ok(None);
        }
        self.averaged(true)?;
        let result = self.without_gradients(|trainer| trainer.validation_loss(&batches));
        self.averaged(false)?;
        let by_timestep = result?;
        let loss = mean(&by_timestep);
        let best = self.at.validation.iter().all(|(_, other)| loss < *other);
        self.at.validation.push((self.at.step, loss));
        Ok(Some(ValidationReport {
            step: self.at.step,
            epoch: self.at.epoch,
            loss,
            by_timestep,
            divergence: loss - self.average.average(),
            best,
        }))
    }

    /// The same loss with the adapters as they are now, on the held-out pictures or, where
    /// there are none, on those that are trained; and which of both.
    pub(crate) fn fixed_loss(&mut self) -> Result<(f64, bool)> {
        let mut batches = self.dataset.validation();
        let held_out = !batches.is_empty();
        if !held_out {
            batches = self.dataset.each_once(|role| role == Role::Train);
        }
        let losses = self.without_gradients(|trainer| trainer.validation_loss(&batches))?;
        Ok((mean(&losses), held_out))
    }

    fn validation_loss(&mut self, batches: &[BatchPlan]) -> Result<Vec<(usize, f64)>> {
        // Not the run's seed: runs with different seeds are compared too.
        let streams = Streams::new(self.config.validation_seed.unwrap_or(0));
        let noise = self.config.noise();
        let grid = grid(noise.min_timestep, noise.max_timestep);
        let mut sums = vec![0.0; grid.len()];
        let mut count = 0;
        for batch in batches {
            let data = self
                .latents
                .means(&self.dataset, batch, self.model.as_ref())?;
            // All tags, whenever it is measured and whatever the run drops.
            let captions: Vec<String> = batch
                .items
                .iter()
                .map(|item| self.dataset.complete_caption(item, streams))
                .collect();
            let fixed = !self.trains_text_encoder();
            let context = self.model.encode_captions(&captions, fixed)?.detach();
            let shape = data.latents.dims().to_vec();
            let each: usize = shape.iter().skip(1).product();
            for (k, (t, sum)) in grid.iter().zip(&mut sums).enumerate() {
                let mut values = Vec::with_capacity(each * batch.items.len());
                for item in &batch.items {
                    let place = Place::step(k as u64, item.key());
                    let mut rng = streams.stream(Purpose::named("validation noise"), place);
                    values.extend((0..each).map(|_| -> f32 { StandardNormal.sample(&mut rng) }));
                }
                let noise = Tensor::from_vec(values, shape.as_slice(), &self.device)?;
                let timesteps = vec![*t; batch.items.len()];
                let noisy = self
                    .noise_schedule
                    .add_noise(&data.latents, &noise, &timesteps)?;
                let target = if self.config.v_parameterization {
                    self.noise_schedule
                        .velocity(&data.latents, &noise, &timesteps)?
                } else {
                    noise
                };
                let times = Tensor::full(*t as f32, batch.items.len(), &self.device)?;
                let pred = self.model.predict(&noisy, &times, &context)?.detach();
                let mut error = (pred.to_dtype(DType::F32)? - target)?.sqr()?;
                if let Some(mask) = &data.mask {
                    error = error.broadcast_mul(mask)?;
                }
                *sum += f64::from(error.mean_all()?.to_scalar::<f32>()?) * batch.items.len() as f64;
            }
            count += batch.items.len();
        }
        Ok(grid
            .into_iter()
            .zip(sums)
            .map(|(t, sum)| (t, sum / count.max(1) as f64))
            .collect())
    }
}

fn mean(by_timestep: &[(usize, f64)]) -> f64 {
    by_timestep.iter().map(|(_, loss)| loss).sum::<f64>() / by_timestep.len().max(1) as f64
}

/// Four timesteps, evenly spaced inside the range: 200, 400, 600 and 800 of the whole.
fn grid(min: usize, max: usize) -> Vec<usize> {
    (1..=4).map(|k| min + (max - min) * k / 5).collect()
}
