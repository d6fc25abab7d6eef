//! The trainer: wires dataset, model, adapters and optimizer, and runs the loop.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use lora_core::{AdapterSet, Component};
use lora_data::{BatchPlan, Dataset, DatasetReport, Pixels, ReportConfig, RunLength, Streams};
use lora_optim::{Ema, EmaConfig, LrSchedule, Optimizer, StepOptions, Watch, WeightChange};
use lora_sd15::NoiseSchedule;
use rand::Rng;

use crate::config::TrainConfig;
use crate::latents::LatentSource;
use crate::lock::RunLock;
use crate::metadata::{Metadata, training_metadata, unix_time};
use crate::model::{Model, Parts, Sd15};
use crate::naming::Naming;
use crate::observer::{BatchReport, Event, LossAverage, Observer};
use crate::samples::SamplePrompt;
use crate::state::{self, RunState, fingerprint};
use crate::{Error, MemoryEstimate, Plan, Result, memory, setup};

/// So many batches in a row without a finite loss end the run.
const MAX_NOT_FINITE: usize = 10;

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All updates were made; the adapter is in this file.
    Finished(PathBuf),
    /// It was stopped; what there was is in this file, and a state folder beside it.
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
    pub(crate) config: TrainConfig,
    pub(crate) plan: Plan,
    pub(crate) naming: Naming,
    pub(crate) dataset: Arc<Dataset>,
    pub(crate) model: Box<dyn Model>,
    pub(crate) adapters: AdapterSet,
    /// The same values without gradients, for pictures and validation; see
    /// [`without_gradients`](Self::without_gradients).
    shown: AdapterSet,
    /// How strongly they act there.
    pub(crate) multiplier: f64,
    pub(crate) optimizer: Box<dyn Optimizer>,
    pub(crate) ema: Option<Ema>,
    lr_schedule: Box<dyn LrSchedule>,
    pub(crate) noise_schedule: NoiseSchedule,
    pub(crate) latents: LatentSource,
    pub(crate) streams: Streams,
    pub(crate) metadata: Metadata,
    pub(crate) samples: Vec<SamplePrompt>,
    /// The text encoder learns before this update; `None` when it never does.
    pub(crate) text_encoder_until: Option<usize>,
    pub(crate) device: Device,
    /// Where the run stands.
    pub(crate) at: RunState,
    pub(crate) average: LossAverage,
    watch: Watch,
    /// Where it stood after the last complete update.
    pub(crate) good: RunState,
    /// The state folder that the run went on from.
    resumed: Option<PathBuf>,
    /// Updates of the run that this one extends.
    pub(crate) extended_from: Option<usize>,
    /// Keeps other runs away from this one's files.
    _lock: RunLock,
}

impl Trainer {
    /// Checks everything, then loads it: settings, output folder, pictures and
    /// captions, checkpoint; creates adapters and optimizer; encodes the pictures. With
    /// `resume`, everything is put back as it was.
    ///
    /// # Errors
    /// The first thing that is wrong; nothing was written by then. [`Error::Busy`] when
    /// another run writes the same files.
    pub fn new(config: TrainConfig, device: &Device, observer: &mut dyn Observer) -> Result<Self> {
        Self::build(config, None, device, observer)
    }

    /// The same for a model of your own; `pretrained_model_name_or_path` only names it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_model(
        config: TrainConfig,
        model: Box<dyn Model>,
        device: &Device,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        Self::build(config, Some(model), device, observer)
    }

    fn build(
        mut config: TrainConfig,
        model: Option<Box<dyn Model>>,
        device: &Device,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        config.validate()?;
        let resumed = config.resume.as_deref().map(state::load).transpose()?;
        if let Some(loaded) = &resumed {
            // A run without a seed goes on with the one it had drawn.
            config.seed.get_or_insert(loaded.state.seed);
        }
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
        let mut warn = |text: &str| observer.event(&Event::Warning(text));
        let lock = RunLock::take(config.output_dir(), config.name(), &mut warn)?;
        let samples = setup::samples(&config)?;
        let (dataset, noticed) = setup::dataset(&config)?;
        let dataset = Arc::new(dataset);
        let findings = dataset.findings().iter().map(ToString::to_string);
        for text in noticed.into_iter().chain(findings) {
            observer.event(&Event::Warning(&text));
        }
        let mut plan = Plan::new(&config, &dataset, seed);
        let report = ReportConfig {
            gradient_accumulation_steps: config.gradient_accumulation_steps,
            length: RunLength::Steps(plan.total_steps),
            seed,
            ..ReportConfig::default()
        };
        observer.event(&Event::Dataset(&DatasetReport::new(&dataset, &report)));
        let lr_schedule = setup::lr_schedule(&config, &plan)?;

        let mut model = match model {
            Some(model) => model,
            None => {
                let checkpoint = setup::checkpoint(&config)?;
                let (text, v) = (config.text(), config.v_parameterization);
                let storage = config.weight_storage();
                let (bytes, narrow) = Sd15::weight_bytes(&checkpoint, storage);
                if device.is_cpu()
                    && let Some(warning) = memory::too_large(bytes, narrow)
                {
                    observer.event(&Event::Warning(&warning));
                }
                Box::new(Sd15::load(&checkpoint, text, v, storage, device)?)
            }
        };
        model.set_gradient_checkpointing(config.gradient_checkpointing)?;
        let Parts { unet, text_encoder } = model.parts();
        unet.set_compute(config.compute())?;
        setup::merge_base_weights(&config, unet, text_encoder, device)?;
        let mut warn = |text: &str| observer.event(&Event::Warning(text));
        let adapters = setup::adapters(&config, unet, text_encoder, streams, &mut warn)?;
        let mut shown = adapters.without_gradients()?;
        shown.attach(unet, 0.0)?;
        shown.attach(text_encoder, 0.0)?;
        if let Some(warning) = setup::alpha_without_effect(&adapters) {
            observer.event(&Event::Warning(&warning));
        }
        let groups = setup::param_groups(&config, &adapters)?;
        plan.set_adapters(&adapters, &groups);
        let text_encoder_until = groups
            .iter()
            .any(|g| g.name.starts_with("textencoder"))
            .then(|| match config.stop_text_encoder_training {
                Some(steps) => steps.of(plan.total_steps) as usize,
                None => usize::MAX,
            });
        let mut optimizer = setup::optimizer(&config, groups)?;
        optimizer.set_step_options(StepOptions {
            max_grad_norm: config.max_grad_norm,
            ..StepOptions::default()
        })?;
        let ema = config
            .ema_decay
            .map(|decay| {
                let ema = EmaConfig {
                    decay,
                    ..EmaConfig::default()
                };
                Ema::new(&adapters.params(), ema)
            })
            .transpose()?;

        let metadata = training_metadata(&config, &dataset, &plan, unix_time())?;
        let mut at = RunState {
            format: RunState::FORMAT,
            config: config.to_value()?,
            dataset: fingerprint(&dataset, streams),
            model: metadata.get("ss_new_sd_model_hash").cloned(),
            seed,
            started_at: unix_time(),
            total_steps: plan.total_steps,
            epoch: 1,
            position: 0,
            batch: 0,
            step: 0,
            failures: 0,
            skipped: 0,
            loss_slots: Vec::new(),
            validation: Vec::new(),
        };
        if let Some(loaded) = &resumed {
            loaded.state.check(&loaded.path, &config, &at)?;
        }
        let learns_text = text_encoder_until.is_some();
        plan.memory = memory::estimate(
            &config,
            &dataset,
            model.as_mut(),
            device,
            plan.parameters(),
            learns_text,
            &samples,
        )?;
        observer.event(&Event::Planned(&plan));
        if let Some(warning) = plan.memory.as_ref().and_then(MemoryEstimate::warning) {
            observer.event(&Event::Warning(&warning));
        }
        let folder = config
            .cache_latents_to_disk
            .then(|| config.output_dir().join("latent-cache"));
        let latents = LatentSource::new(
            &dataset,
            model.as_ref(),
            config.caches_latents(),
            folder,
            device,
            |done, total| observer.event(&Event::Encoding { done, total }),
        )?;
        let mut trainer = Self {
            naming: Naming::new(config.output_name.as_deref()),
            noise_schedule: config.schedule(),
            device: device.clone(),
            good: at.clone(),
            average: LossAverage::default(),
            watch: Watch::default(),
            resumed: None,
            extended_from: None,
            _lock: lock,
            config,
            plan,
            dataset,
            model,
            adapters,
            shown,
            multiplier: 1.0,
            optimizer,
            ema,
            lr_schedule,
            latents,
            streams,
            metadata,
            samples,
            text_encoder_until,
            at: {
                at.loss_slots.clear();
                at
            },
        };
        if let Some(loaded) = resumed {
            trainer.go_on_from(loaded)?;
        }
        Ok(trainer)
    }

    /// Puts weights, optimizer and position back.
    fn go_on_from(&mut self, loaded: state::Loaded) -> Result<()> {
        loaded.restore(&self.adapters.params())?;
        self.optimizer.set_training(true)?;
        let extended = loaded.state.total_steps != self.plan.total_steps;
        let on_change = if extended {
            // Options that follow from the length of the run may differ.
            lora_optim::OnChange::UseNew
        } else {
            lora_optim::OnChange::Refuse
        };
        self.optimizer.load_state(&loaded.optimizer, on_change)?;
        if let Some(ema) = &mut self.ema {
            ema.load_state(&loaded.ema()?)?;
        }
        self.extended_from = extended.then_some(loaded.state.total_steps);
        self.average = LossAverage::from_slots(loaded.state.loss_slots.clone());
        let config = std::mem::take(&mut self.at.config);
        self.at = RunState {
            config,
            total_steps: self.plan.total_steps,
            model: self.at.model.take(),
            ..loaded.state
        };
        if let Some(started) = self.metadata.get_mut("ss_training_started_at") {
            *started = crate::metadata::py_float(self.at.started_at);
        }
        self.good = self.at.clone();
        self.resumed = Some(loaded.path);
        Ok(())
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

    /// The model being trained.
    pub fn model(&self) -> &dyn Model {
        self.model.as_ref()
    }

    /// Trains to the end, or until `stop` is set; then what there is is saved, with a
    /// state to go on from. Settings are written beside the result as `NAME.toml` and
    /// `NAME.json`.
    ///
    /// # Errors
    /// When a file cannot be written, a picture vanished, or losses stay non-finite. If
    /// possible, a state is saved then, too.
    pub fn run(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Outcome> {
        self.write_settings()?;
        match &self.resumed {
            Some(path) => {
                observer.event(&Event::Resumed {
                    path,
                    epoch: self.at.epoch,
                    step: self.at.step,
                });
                self.keep_result(observer)?;
            }
            None => {
                self.warn_of_earlier_result(observer);
                if self.config.sample_at_first {
                    self.draw_samples(None, observer)?;
                }
            }
        }
        self.optimizer.set_training(true)?;
        let result = self.epochs(observer, stop);
        match &result {
            Ok(None) => {}
            Ok(Some(_)) => return self.stopped(observer),
            Err(_) if self.good.step > 0 => {
                // The first error is the one to report.
                if let Err(error) =
                    self.save_state(&self.naming.step_state(self.good.step), observer)
                {
                    observer.event(&Event::Warning(&format!(
                        "the state could not be saved: {error}"
                    )));
                }
            }
            Err(_) => {}
        }
        result?;
        self.finish(observer)
    }

    /// All epochs that are left; `Some` when the run was stopped.
    fn epochs(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Option<()>> {
        while self.at.epoch <= self.plan.epochs && self.at.step < self.plan.total_steps {
            let epoch = self.at.epoch;
            observer.event(&Event::EpochStarted { epoch });
            if !self.batches(observer, stop)? {
                return Ok(Some(()));
            }
            let is_over = self.at.position >= self.plan.batches_per_epoch;
            self.end_epoch(epoch, is_over, observer)?;
        }
        Ok(None)
    }

    /// The batches that are left of the present epoch; `false` when the run was stopped.
    fn batches(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<bool> {
        let batches = self.dataset.epoch(self.at.epoch, self.plan.seed).batches;
        let left = batches.get(self.at.position..).unwrap_or(&[]);
        let mut ahead = self.latents.load_ahead(&self.dataset, left)?;
        let mut window = Window::default();
        for (i, batch) in left.iter().enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let waiting = Instant::now();
            let pixels = match ahead.as_mut().and_then(Iterator::next) {
                Some(loaded) => Some(loaded?.pixels),
                None => None,
            };
            window.waited = waiting.elapsed();
            let last = i + 1 == left.len();
            if self.train_batch(batch, pixels, last, &mut window, observer)? {
                self.good = RunState {
                    loss_slots: self.average.slots().to_vec(),
                    ..self.at.clone()
                };
                self.after_update(observer)?;
            }
            if self.at.step >= self.plan.total_steps {
                break;
            }
        }
        Ok(true)
    }

    /// One batch; returns whether it completed an update.
    fn train_batch(
        &mut self,
        batch: &BatchPlan,
        pixels: Option<Vec<Pixels>>,
        last: bool,
        window: &mut Window,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        let started = Instant::now();
        let position = self.at.position;
        self.at.batch += 1;
        self.at.position += 1;
        let loss = self.loss(batch, pixels);
        let loss = loss.map_err(|error| self.explain(error, batch))?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        if value.is_finite() {
            let batches = self.config.gradient_accumulation_steps as f64;
            let loss = (loss / batches)?;
            let gradients = lora_kernels::on_worker(loss.device(), || loss.backward());
            drop(loss);
            let gradients = gradients.map_err(|error| self.explain(error.into(), batch))?;
            window.add(&gradients, &self.adapters.params())?;
        } else {
            drop(loss);
            self.not_finite("the loss", batch, observer)?;
        }
        window.batches += 1;
        let mut grad_norm = None;
        let updated = window.batches == self.config.gradient_accumulation_steps || last;
        if updated {
            window.batches = 0;
            let grads = std::mem::take(&mut window.grads);
            if !grads.is_empty() {
                self.lr_schedule
                    .apply(self.at.step as u64, self.optimizer.as_mut());
                let optimizer = self.optimizer.as_mut();
                let report = lora_kernels::on_worker(&self.device, || optimizer.step(&grads))?;
                grad_norm = report.grad_norm;
                match report.non_finite {
                    None => self.at.failures = 0,
                    Some(name) => {
                        self.not_finite(&format!("the gradient of {name}"), batch, observer)?;
                    }
                }
            }
            self.at.step += 1;
            let reports = self.optimizer.report()?;
            for advice in self.watch.observe(self.at.step as u64, &reports) {
                observer.event(&Event::Warning(&advice.to_string()));
            }
        }
        // Weights change at updates only. Scaling twice would round twice, and a run that
        // goes on from the last update could not repeat that.
        let norms = if updated { self.scale_norms()? } else { None };
        if updated && let Some(ema) = &mut self.ema {
            ema.update()?;
        }
        let average_loss = if value.is_finite() {
            self.average.add(position, value)
        } else {
            self.average.average()
        };
        let report = BatchReport {
            step: self.at.step,
            total_steps: self.plan.total_steps,
            epoch: self.at.epoch,
            batch: self.at.batch,
            updated,
            loss: value,
            average_loss,
            learning_rates: self.learning_rates(),
            adaptive: self.config.adaptive(),
            grad_norm,
            norms,
            elapsed: started.elapsed(),
            waited: window.waited,
        };
        observer.event(&Event::Batch(&report));
        Ok(updated)
    }

    /// Says which batch a device had no memory for, and what would help.
    fn explain(&self, error: Error, batch: &BatchPlan) -> Error {
        let text = error.to_string().to_lowercase().replace('_', " ");
        let (Some(item), true) = (batch.items.first(), text.contains("out of memory")) else {
            return error;
        };
        let savings = self.plan.memory.as_ref().map(|memory| &memory.savings);
        let helps: Vec<&str> = savings
            .into_iter()
            .flatten()
            .map(|(setting, _)| setting.as_str())
            .collect();
        Error::OutOfMemory {
            pictures: batch.items.len(),
            size: item.size,
            advice: match helps.is_empty() {
                true => String::new(),
                false => format!(" (what helps: {})", helps.join("; ")),
            },
            source: Box::new(error),
        }
    }

    fn not_finite(
        &mut self,
        what: &str,
        batch: &BatchPlan,
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
            step: self.at.step,
            what: &text,
        });
        self.at.failures += 1;
        self.at.skipped += 1;
        if self.at.failures >= MAX_NOT_FINITE {
            return Err(Error::NotFinite {
                times: self.at.failures,
                step: self.at.step,
                images,
            });
        }
        Ok(())
    }

    fn scale_norms(&mut self) -> Result<Option<lora_core::NormReport>> {
        let Some(max_norm) = self.config.max_norm() else {
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

    /// Puts the weights in place that are saved and judged (`true`): those of schedule-free
    /// optimizers and averages differ from the trained ones. `false` puts the trained ones
    /// back, bit for bit.
    pub(crate) fn averaged(&mut self, on: bool) -> Result<()> {
        if on {
            self.optimizer.set_training(false)?;
        }
        if let Some(ema) = &mut self.ema {
            ema.swap_in(on)?;
        }
        if !on {
            self.optimizer.set_training(true)?;
        }
        Ok(())
    }

    /// Runs `body` with adapters that record no gradients and have no dropout: a picture of 20
    /// steps would keep the activations of all of them.
    pub(crate) fn without_gradients<R>(
        &mut self,
        body: impl FnOnce(&mut Self) -> Result<R>,
    ) -> Result<R> {
        self.adapters.end_training();
        let act = |set: &AdapterSet, multiplier| {
            for component in [Component::Unet, Component::TextEncoder] {
                set.set_multiplier(&component, multiplier);
            }
        };
        act(&self.adapters, 0.0);
        act(&self.shown, self.multiplier);
        let result = body(self);
        act(&self.shown, 0.0);
        act(&self.adapters, 1.0);
        result
    }

    /// The folder that results go to.
    pub(crate) fn folder(&self) -> &Path {
        self.config.output_dir()
    }
}

/// An accumulation window.
#[derive(Debug, Default)]
struct Window {
    /// Batches in it.
    batches: usize,
    /// Sums by parameter name.
    grads: BTreeMap<String, Tensor>,
    /// Time spent waiting for the pictures of the last batch.
    waited: std::time::Duration,
}

impl Window {
    /// Sums gradients over the window. Of a batch's gradients only those of the parameters are
    /// kept: the others are as large as its activations.
    fn add(&mut self, grads: &GradStore, params: &[(String, Var)]) -> Result<()> {
        for (name, var) in params {
            let Some(grad) = grads.get(var) else {
                continue;
            };
            let sum = match self.grads.get(name) {
                Some(sum) => (sum + grad)?,
                None => grad.clone(),
            };
            self.grads.insert(name.clone(), sum.detach());
        }
        Ok(())
    }
}
