//! The trainer: wires dataset, model, adapters and optimizer, and runs the loop.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use lora_core::format::write_atomically;
use lora_core::{AdapterSet, SaveOptions};
use lora_data::{BatchPlan, CaptionTime, Dataset, Place, Purpose, Streams};
use lora_optim::{LrSchedule, Optimizer, StepOptions, WeightChange};
use lora_sd15::{Checkpoint, NoiseSchedule, Part, TextEncoder, UNet, Vae};
use rand::Rng;

use crate::config::TrainConfig;
use crate::latents::LatentCache;
use crate::loss::{SampleWeights, diffusion_loss};
use crate::metadata::{Metadata, ModelSpec, training_metadata, unix_seconds};
use crate::naming::{Naming, outdated_epoch, outdated_step};
use crate::noise::{StepDraws, make_noise};
use crate::observer::{BatchReport, Event, LossAverage, Observer};
use crate::text::Captions;
use crate::{Error, Plan, Result, setup};

/// So many batches in a row without a finite loss end the run.
const MAX_NOT_FINITE: usize = 10;

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All updates were made; the adapter is in this file.
    Finished(PathBuf),
    /// It was stopped; what there was is in this file.
    Stopped(PathBuf),
}

/// A run, ready to start.
///
/// ```no_run
/// use std::sync::atomic::AtomicBool;
/// use candle_core::Device;
/// use lora_train::{Event, TrainConfig, Trainer};
/// let config = TrainConfig {
///     pretrained_model_name_or_path: Some("v1-5-pruned-emaonly.safetensors".into()),
///     train_data_dir: Some("img".into()),
///     output_dir: Some("out".into()),
///     output_name: Some("zoe".into()),
///     max_train_epochs: Some(10),
///     ..Default::default()
/// };
/// let mut print = |event: &Event<'_>| {
///     if let Event::Batch(batch) = event {
///         println!("{}/{}: {:.4}", batch.step, batch.total_steps, batch.average_loss);
///     }
/// };
/// let mut trainer = Trainer::new(config, &Device::Cpu, &mut print)?;
/// trainer.run(&mut print, &AtomicBool::new(false))?;
/// # Ok::<(), lora_train::Error>(())
/// ```
#[derive(Debug)]
pub struct Trainer {
    config: TrainConfig,
    plan: Plan,
    dataset: Dataset,
    unet: UNet,
    text_encoder: TextEncoder,
    vae: Vae,
    adapters: AdapterSet,
    optimizer: Box<dyn Optimizer>,
    lr_schedule: Box<dyn LrSchedule>,
    noise_schedule: NoiseSchedule,
    latents: LatentCache,
    captions: Captions,
    streams: Streams,
    metadata: Metadata,
    device: Device,
}

impl Trainer {
    /// Checks everything, then loads it: settings, output folder, pictures and
    /// captions, checkpoint; creates adapters and optimizer; encodes the pictures.
    ///
    /// # Errors
    /// The first thing that is wrong; nothing was written by then but a probe file in
    /// the output folder.
    pub fn new(config: TrainConfig, device: &Device, observer: &mut dyn Observer) -> Result<Self> {
        config.validate()?;
        let mut config = config;
        let seed = *config
            .seed
            .get_or_insert_with(|| u64::from(rand::rng().random::<u32>()));
        let streams = Streams::new(seed);
        for warning in config.warnings() {
            observer.event(&Event::Warning(&warning));
        }
        // The settings written beside the result are those in effect.
        let rate = config.learning_rate();
        config.learning_rate.get_or_insert(rate);
        let rank = config.network_rank();
        config.network_dim.get_or_insert(rank);
        setup::check_output(config.output_dir())?;
        let (dataset, noticed) = setup::dataset(&config)?;
        for finding in noticed.iter().chain(dataset.findings()) {
            observer.event(&Event::Warning(&finding.to_string()));
        }
        let checkpoint = setup::checkpoint(&config)?;
        let mut plan = Plan::new(&config, &dataset, seed);
        let lr_schedule = setup::lr_schedule(&config, &plan)?;

        let vb = |part| checkpoint.var_builder(part, DType::F32, device);
        let (unet_vb, text_vb, vae_vb) = (vb(Part::Unet)?, vb(Part::TextEncoder)?, vb(Part::Vae)?);
        let model = checkpoint.config();
        let mut unet = UNet::new(&model.unet, unet_vb)?;
        let mut text_encoder = TextEncoder::new(&model.text, text_vb)?;
        let vae = Vae::new(&model.vae, vae_vb)?;

        setup::merge_base_weights(&config, &mut unet, &mut text_encoder, device)?;
        let mut warn = |text: &str| observer.event(&Event::Warning(text));
        let adapters = setup::adapters(&config, &mut unet, &mut text_encoder, streams, &mut warn)?;
        plan.adapters = (
            adapters.count(&lora_core::Component::TextEncoder),
            adapters.count(&lora_core::Component::Unet),
        );
        plan.parameters = adapters.parameter_count();
        let groups = setup::param_groups(&config, &adapters)?;
        let trains_text = groups.iter().any(|g| g.name.starts_with("textencoder"));
        let mut optimizer = setup::optimizer(&config, groups)?;
        optimizer.set_step_options(StepOptions {
            max_grad_norm: config.max_grad_norm,
            ..StepOptions::default()
        })?;

        let metadata =
            training_metadata(&config, &dataset, &plan, unix_seconds(SystemTime::now()))?;
        observer.event(&Event::Planned(&plan));
        let noise_schedule = config.schedule();
        let captions = Captions::new(config.text(), !trains_text);
        let mut trainer = Self {
            latents: LatentCache::new(config.cache_latents),
            device: device.clone(),
            config,
            plan,
            dataset,
            unet,
            text_encoder,
            vae,
            adapters,
            optimizer,
            lr_schedule,
            noise_schedule,
            captions,
            streams,
            metadata,
        };
        trainer.encode_pictures(observer)?;
        Ok(trainer)
    }

    /// What the run will do.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The settings, seed included.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The adapters being trained.
    pub fn adapters(&self) -> &AdapterSet {
        &self.adapters
    }

    fn encode_pictures(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let total = self.dataset.images().len();
        let mut done = 0;
        for batch in self.dataset.each_once(|_| true) {
            for item in &batch.items {
                self.latents
                    .warm(&self.dataset, item, &self.vae, &self.device)?;
                done += 1;
                observer.event(&Event::Encoding { done, total });
            }
        }
        Ok(())
    }

    /// Trains to the end, or until `stop` is set; then what there is is saved.
    /// Settings are written beside the result as `NAME.toml`.
    ///
    /// # Errors
    /// When a file cannot be written, a picture vanished, or losses stay non-finite.
    pub fn run(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Outcome> {
        let folder = self.config.output_dir().to_path_buf();
        let naming = Naming::new(self.config.output_name.as_deref());
        let settings = self.config.to_toml()?;
        let toml = folder.join(format!("{}.toml", self.config.name()));
        write_atomically(&toml, |out| out.write_all(settings.as_bytes()))?;

        let mut progress = Progress::default();
        self.optimizer.set_training(true)?;
        for epoch in 1..=self.plan.epochs {
            observer.event(&Event::EpochStarted { epoch });
            let batches = self.dataset.epoch(epoch, self.plan.seed).batches;
            for (position, batch) in batches.iter().enumerate() {
                if stop.load(Ordering::Relaxed) {
                    let path = folder.join(naming.step(progress.step));
                    self.save(&path, epoch - 1, progress.step, observer)?;
                    return Ok(Outcome::Stopped(path));
                }
                let last = position + 1 == batches.len();
                let updated =
                    self.train_batch(batch, epoch, position, last, &mut progress, observer)?;
                if updated {
                    self.save_step(&folder, &naming, epoch, progress.step, observer)?;
                }
                if progress.step >= self.plan.total_steps {
                    break;
                }
            }
            let average_loss = progress.average.average();
            observer.event(&Event::EpochFinished {
                epoch,
                average_loss,
            });
            if epoch < self.plan.epochs {
                self.save_epoch(&folder, &naming, epoch, progress.step, observer)?;
            }
        }
        self.adapters.end_training();
        let path = folder.join(naming.last());
        self.save(&path, self.plan.epochs, progress.step, observer)?;
        Ok(Outcome::Finished(path))
    }

    /// One batch; returns whether it completed an update.
    fn train_batch(
        &mut self,
        batch: &BatchPlan,
        epoch: usize,
        position: usize,
        last: bool,
        progress: &mut Progress,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        let started = Instant::now();
        progress.batch += 1;
        let loss = self.loss(batch, epoch, progress)?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        if value.is_finite() {
            let window = self.config.gradient_accumulation_steps as f64;
            let grads = (loss / window)?.backward()?;
            progress.add(grads)?;
        } else {
            self.not_finite("the loss", batch, progress, observer)?;
        }
        progress.in_window += 1;
        let mut grad_norm = None;
        let complete = progress.in_window == self.config.gradient_accumulation_steps || last;
        let mut updated = false;
        if complete {
            progress.in_window = 0;
            if let Some(grads) = progress.grads.take() {
                self.lr_schedule
                    .apply(progress.step as u64, self.optimizer.as_mut());
                let report = self.optimizer.step(&grads)?;
                grad_norm = report.grad_norm;
                match report.non_finite {
                    None => progress.failures = 0,
                    Some(name) => self.not_finite(
                        &format!("the gradient of {name}"),
                        batch,
                        progress,
                        observer,
                    )?,
                }
            }
            progress.step += 1;
            updated = true;
        }
        let norms = self.scale_norms()?;
        let average_loss = if value.is_finite() {
            progress.average.add(epoch, position, value)
        } else {
            progress.average.average()
        };
        let report = BatchReport {
            step: progress.step,
            total_steps: self.plan.total_steps,
            epoch,
            loss: value,
            average_loss,
            learning_rates: self.learning_rates(),
            grad_norm,
            norms,
            elapsed: started.elapsed(),
        };
        observer.event(&Event::Batch(&report));
        Ok(updated)
    }

    fn loss(&mut self, batch: &BatchPlan, epoch: usize, progress: &Progress) -> Result<Tensor> {
        let step = progress.batch;
        let seed = self
            .streams
            .stream(Purpose::ADAPTER_DROPOUT, Place::step(step, 0))
            .random();
        self.adapters.begin_step(seed);
        let data = self.latents.batch(
            &self.dataset,
            batch,
            &self.vae,
            self.streams,
            step,
            &self.device,
        )?;
        let time = CaptionTime {
            epoch,
            step: progress.step,
            max_train_steps: self.plan.total_steps,
        };
        let captions: Vec<String> = batch
            .items
            .iter()
            .map(|item| self.dataset.caption(item, time, self.streams))
            .collect();
        let context = self.captions.encode(&captions, &self.text_encoder)?;
        let mut draws = StepDraws::new(self.streams, step, &self.device);
        let noise = make_noise(
            &data.latents,
            &self.config.noise(),
            &self.noise_schedule,
            &mut draws,
        )?;
        let loss = self.config.loss()?;
        let target = if loss.v_parameterization {
            self.noise_schedule
                .velocity(&data.latents, &noise.noise, &noise.timesteps)?
        } else {
            noise.noise
        };
        let timesteps: Vec<f32> = noise.timesteps.iter().map(|t| *t as f32).collect();
        let pred = self.unet.forward(
            &noise.noisy,
            &Tensor::new(timesteps, &self.device)?,
            &context,
        )?;
        let samples = SampleWeights {
            weights: batch.items.iter().map(|item| item.loss_weight).collect(),
            mask: data.mask,
        };
        Ok(diffusion_loss(
            &pred,
            &target,
            &noise.timesteps,
            &samples,
            &loss,
            &self.noise_schedule,
        )?)
    }

    fn not_finite(
        &self,
        what: &str,
        batch: &BatchPlan,
        progress: &mut Progress,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let name = |image: usize| {
            self.dataset
                .images()
                .get(image)
                .map(|i| i.path.display().to_string())
        };
        let images: Vec<String> = batch
            .items
            .iter()
            .filter_map(|item| name(item.image))
            .collect();
        let images = images.join(", ");
        let text = format!("{what} is not finite, with {images}");
        observer.event(&Event::Skipped {
            step: progress.step,
            what: &text,
        });
        progress.failures += 1;
        if progress.failures >= MAX_NOT_FINITE {
            return Err(Error::NotFinite {
                times: progress.failures,
                step: progress.step,
                images,
            });
        }
        Ok(())
    }

    fn scale_norms(&mut self) -> Result<Option<lora_core::NormReport>> {
        let Some(max_norm) = self.config.scale_weight_norms else {
            return Ok(None);
        };
        let report = self.adapters.scale_norms(max_norm)?;
        for (name, factor) in &report.factors {
            let vars = self
                .adapters
                .get(name)
                .map(|a| a.vars())
                .unwrap_or_default();
            // A Tucker core is left alone by LoRA's scaling.
            for (suffix, _) in vars
                .iter()
                .filter(|(suffix, _)| *suffix != "lora_mid.weight")
            {
                let param = format!("{name}.{suffix}");
                let trained = self
                    .optimizer
                    .groups()
                    .iter()
                    .any(|g| g.params.iter().any(|(n, _)| *n == param));
                if trained {
                    self.optimizer.weights_changed(&WeightChange::Scaled {
                        name: &param,
                        factor: *factor,
                    })?;
                }
            }
        }
        Ok(Some(report))
    }

    fn learning_rates(&self) -> Vec<(String, f64, f64)> {
        let groups = self.optimizer.groups().iter().enumerate();
        groups
            .map(|(i, g)| {
                (
                    g.name.clone(),
                    self.optimizer.lr(i),
                    self.optimizer.effective_lr(i),
                )
            })
            .collect()
    }

    fn save_step(
        &mut self,
        folder: &Path,
        naming: &Naming,
        epoch: usize,
        step: usize,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let Some(every) = self.config.save_every_n_steps else {
            return Ok(());
        };
        if !step.is_multiple_of(every) {
            return Ok(());
        }
        self.save(&folder.join(naming.step(step)), epoch - 1, step, observer)?;
        if let Some(old) =
            outdated_step(step, every, self.config.save_last_n_steps).filter(|s| *s > 0)
        {
            remove(&folder.join(naming.step(old as usize)), observer)?;
        }
        Ok(())
    }

    fn save_epoch(
        &mut self,
        folder: &Path,
        naming: &Naming,
        epoch: usize,
        step: usize,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let Some(every) = self.plan.save_every_n_epochs else {
            return Ok(());
        };
        if !epoch.is_multiple_of(every) {
            return Ok(());
        }
        self.save(&folder.join(naming.epoch(epoch)), epoch, step, observer)?;
        if let Some(old) =
            outdated_epoch(epoch, every, self.config.save_last_n_epochs).filter(|e| *e > 0)
        {
            remove(&folder.join(naming.epoch(old as usize)), observer)?;
        }
        Ok(())
    }

    /// Writes the adapter as it is now.
    fn save(
        &mut self,
        path: &Path,
        epoch: usize,
        step: usize,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        self.optimizer.set_training(false)?;
        let now = unix_seconds(SystemTime::now());
        let mut metadata = self.metadata.clone();
        if !self.config.no_metadata {
            metadata.insert(
                "ss_training_finished_at".into(),
                crate::metadata::py_float(now),
            );
            metadata.insert("ss_steps".into(), step.to_string());
            metadata.insert("ss_epoch".into(), epoch.to_string());
        }
        metadata.extend(ModelSpec::from_config(&self.config, now)?.metadata());
        let options = SaveOptions {
            dtype: Some(self.config.save_dtype()?),
            metadata,
            ..Default::default()
        };
        self.adapters.save(path, &options)?;
        self.optimizer.set_training(true)?;
        observer.event(&Event::Saved(path));
        Ok(())
    }
}

fn remove(path: &Path, observer: &mut dyn Observer) -> Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => observer.event(&Event::Removed(path)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io(path)(e)),
    }
    Ok(())
}

/// Where a run stands.
#[derive(Debug, Default)]
struct Progress {
    /// Batches seen, counted from 1.
    batch: u64,
    /// Updates made.
    step: usize,
    /// Batches in the current accumulation window.
    in_window: usize,
    /// Non-finite results in a row.
    failures: usize,
    grads: Option<GradStore>,
    average: LossAverage,
}

impl Progress {
    /// Sums gradients over the window.
    fn add(&mut self, grads: GradStore) -> Result<()> {
        match &mut self.grads {
            None => self.grads = Some(grads),
            Some(sum) => sum.extend(grads)?,
        }
        Ok(())
    }
}

/// Opens the checkpoint with its separate VAE, if one is given.
pub(crate) fn open_checkpoint(path: &Path, vae: Option<&Path>) -> Result<Checkpoint> {
    let checkpoint = Checkpoint::open(path)?;
    Ok(match vae {
        Some(vae) => checkpoint.with_vae(vae)?,
        None => checkpoint,
    })
}
