//! What a run writes: adapter files, states, settings, sample pictures.

use std::path::Path;

use candle_core::DType;
use lora_core::SaveOptions;
use lora_core::format::write_atomically;
use lora_data::{Place, Purpose};
use rand::Rng;

use crate::config::TrainConfig;
use crate::metadata::{ModelSpec, compact_time, unix_time};
use crate::naming::{outdated_epoch, outdated_step};
use crate::observer::{Event, Observer};
use crate::state::{self, Weights};
use crate::trainer::{Outcome, Trainer};
use crate::{Error, Result, gui};

impl TrainConfig {
    /// Writes the settings as TOML that [`Settings::from_toml`](crate::Settings::from_toml) and
    /// sd-scripts' `--config_file` read. What the config of a GUI holds of datasets and sample
    /// prompts goes into files beside it, to which it refers.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let config = self.with_inline_in_files(
            &path.with_extension("dataset.toml"),
            &path.with_extension("prompts.txt"),
        )?;
        let toml = config.to_toml()?;
        Ok(write_atomically(path, |out| {
            out.write_all(toml.as_bytes())
        })?)
    }

    /// The same settings with the texts inside them, if there are any, in files.
    fn with_inline_in_files(&self, dataset: &Path, samples: &Path) -> Result<Self> {
        let mut config = self.clone();
        let inline = std::mem::take(&mut config.inline);
        for (text, path, setting) in [
            (inline.dataset, dataset, &mut config.dataset_config),
            (inline.samples, samples, &mut config.sample_prompts),
        ] {
            let Some(text) = text else { continue };
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
            }
            write_atomically(path, |out| out.write_all(text.as_bytes()))?;
            *setting = Some(path.to_path_buf());
        }
        Ok(config)
    }
}

impl Trainer {
    /// `NAME.toml` for sd-scripts and this trainer, `NAME.json` for kohya_ss.
    pub(crate) fn write_settings(&self) -> Result<()> {
        let name = self.config.name();
        let config = self.config.with_inline_in_files(
            &self.folder().join(format!("{name}.dataset.toml")),
            &self.folder().join("sample").join("prompt.txt"),
        )?;
        let toml = config.to_toml()?;
        write_atomically(&self.folder().join(format!("{name}.toml")), |out| {
            out.write_all(toml.as_bytes())
        })?;
        let json = gui::to_kohya_json(&config)?;
        write_atomically(&self.folder().join(format!("{name}.json")), |out| {
            out.write_all(json.as_bytes())
        })?;
        Ok(())
    }

    /// What is due after an update: validation, pictures, files.
    pub(crate) fn after_update(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let step = self.at.step;
        let due = |every: Option<usize>| every.is_some_and(|n| n > 0 && step.is_multiple_of(n));
        if due(self.config.validate_every_n_steps) {
            self.report_validation(observer)?;
        }
        let by_epochs = self.config.sample_every_n_epochs > Some(0);
        if !by_epochs && due(self.config.sample_every_n_steps) {
            self.draw_samples(None, observer)?;
        }
        if !due(self.config.save_every_n_steps) {
            return Ok(());
        }
        let every = self.config.save_every_n_steps.unwrap_or(1);
        let path = self.naming.step(step);
        self.save(&path, self.at.epoch - 1, observer)?;
        let healthy = self.is_healthy();
        let outdated = |keep| {
            outdated_step(step, every, keep)
                .filter(|s| *s > 0 && healthy)
                .map(|s| s as usize)
        };
        let keep = self.config.save_last_n_steps;
        if let Some(old) = outdated(keep) {
            self.remove(&self.naming.step(old), observer)?;
        }
        if self.config.save_state {
            self.save_state(&self.naming.step_state(step), observer)?;
            if let Some(old) = outdated(self.config.save_last_n_steps_state.or(keep)) {
                self.remove_state(&self.naming.step_state(old), observer)?;
            }
        }
        Ok(())
    }

    /// What is due after an epoch; then the next one is begun. An epoch that the end of the run
    /// cut short is not over: a longer run goes on in it.
    pub(crate) fn end_epoch(
        &mut self,
        epoch: usize,
        is_over: bool,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        observer.event(&Event::EpochFinished {
            epoch,
            step: self.at.step,
            average_loss: self.average.average(),
        });
        let due = |every: usize| every > 0 && epoch.is_multiple_of(every);
        let by_steps = self.config.validate_every_n_steps.is_some();
        if due(self
            .config
            .validate_every_n_epochs
            .unwrap_or(usize::from(!by_steps)))
        {
            self.report_validation(observer)?;
        }
        if due(self.config.sample_every_n_epochs.unwrap_or(0)) {
            self.draw_samples(Some(epoch), observer)?;
        }
        if is_over {
            self.at.epoch += 1;
            self.at.position = 0;
        }
        self.at.loss_slots = self.average.slots().to_vec();
        self.good = self.at.clone();
        let every = self.plan.save_every_n_epochs.unwrap_or(0);
        if !due(every) || epoch >= self.plan.epochs {
            return Ok(());
        }
        self.save(&self.naming.epoch(epoch), epoch, observer)?;
        let healthy = self.is_healthy();
        let outdated = |keep| {
            outdated_epoch(epoch, every, keep)
                .filter(|e| *e > 0 && healthy)
                .map(|e| e as usize)
        };
        let keep = self.config.save_last_n_epochs;
        if let Some(old) = outdated(keep) {
            self.remove(&self.naming.epoch(old), observer)?;
        }
        if self.config.save_state {
            self.save_state(&self.naming.epoch_state(epoch), observer)?;
            if let Some(old) = outdated(self.config.save_last_n_epochs_state.or(keep)) {
                self.remove_state(&self.naming.epoch_state(old), observer)?;
            }
        }
        Ok(())
    }

    /// Whether the last batch was used. While batches fail, the files of the time before are
    /// the good ones: none is removed.
    fn is_healthy(&self) -> bool {
        self.at.failures == 0
    }

    fn report_validation(&mut self, observer: &mut dyn Observer) -> Result<()> {
        if let Some(report) = self.validate()? {
            self.good.validation = self.at.validation.clone();
            observer.event(&Event::Validated(&report));
        }
        Ok(())
    }

    /// The end of a complete run.
    pub(crate) fn finish(&mut self, observer: &mut dyn Observer) -> Result<Outcome> {
        self.adapters.end_training();
        let name = self.naming.last();
        self.save(&name, self.plan.epochs, observer)?;
        if self.config.save_state || self.config.save_state_on_train_end {
            self.keep_state(observer)?;
            self.save_state(&self.naming.last_state(), observer)?;
        }
        let path = self.folder().join(name);
        observer.event(&Event::Finished {
            path: &path,
            skipped: self.at.skipped,
        });
        Ok(Outcome::Finished(path))
    }

    /// Says so when the result of another run is about to be replaced, as sd-scripts does
    /// without a word.
    pub(crate) fn warn_of_earlier_result(&self, observer: &mut dyn Observer) {
        let path = self.folder().join(self.naming.last());
        if path.exists() {
            observer.event(&Event::Warning(&format!(
                "{} of an earlier run will be replaced; another output_name keeps it",
                path.display()
            )));
        }
    }

    /// Gives the result of the run that this one extends the name of its last update, so that it
    /// is not replaced. At the start: an extended run may be interrupted and gone on with.
    pub(crate) fn keep_result(&self, observer: &mut dyn Observer) -> Result<()> {
        match self.extended_from {
            Some(steps) => self.keep(&self.naming.last(), &self.naming.step(steps), observer),
            None => Ok(()),
        }
    }

    /// The same for its state, at the end: until then one may have to go on from it again.
    fn keep_state(&self, observer: &mut dyn Observer) -> Result<()> {
        let (last, naming) = (self.naming.last_state(), &self.naming);
        match self.extended_from {
            Some(steps) => self.keep(&last, &naming.step_state(steps), observer),
            None => Ok(()),
        }
    }

    fn keep(&self, from: &str, to: &str, observer: &mut dyn Observer) -> Result<()> {
        let (from, to) = (self.folder().join(from), self.folder().join(to));
        if from.exists() && !to.exists() {
            std::fs::rename(&from, &to).map_err(Error::io(&from))?;
            observer.event(&Event::Warning(&format!(
                "what the run had before it was extended is now {}",
                to.display()
            )));
        }
        Ok(())
    }

    /// The end of a run that was stopped: what there was at the last update.
    pub(crate) fn stopped(&mut self, observer: &mut dyn Observer) -> Result<Outcome> {
        let step = self.good.step;
        let name = self.naming.step(step);
        self.save(&name, self.good.epoch - 1, observer)?;
        self.save_state(&self.naming.step_state(step), observer)?;
        Ok(Outcome::Stopped(self.folder().join(name)))
    }

    /// Writes the adapter as it is now.
    ///
    /// # Errors
    /// When the file cannot be written, or a value is not finite: such a file would draw
    /// black pictures.
    fn save(&mut self, name: &str, epoch: usize, observer: &mut dyn Observer) -> Result<()> {
        let path = self.folder().join(name);
        let now = unix_time();
        let mut metadata = self.metadata.clone();
        if !self.config.no_metadata {
            metadata.insert(
                "ss_training_finished_at".into(),
                crate::metadata::py_float(now),
            );
            metadata.insert("ss_steps".into(), self.at.step.to_string());
            metadata.insert("ss_epoch".into(), epoch.to_string());
        }
        metadata.extend(ModelSpec::from_config(&self.config, now)?.metadata());
        let options = SaveOptions {
            dtype: Some(self.config.save_dtype()?),
            metadata,
            ..Default::default()
        };
        self.averaged(true)?;
        let saved = self
            .check_finite(&path, self.config.save_dtype()?)
            .and_then(|()| Ok(self.adapters.save(&path, &options)?));
        self.averaged(false)?;
        saved?;
        observer.event(&Event::Saved(&path));
        Ok(())
    }

    /// Checks that every value is a number, also in the precision of the file.
    fn check_finite(&self, path: &Path, dtype: DType) -> Result<()> {
        for (name, var) in self.adapters.params() {
            let saved = var.to_dtype(dtype)?.to_dtype(DType::F32)?;
            if saved.sum_all()?.to_scalar::<f32>()?.is_finite() {
                continue;
            }
            let what = match var.sum_all()?.to_scalar::<f32>()?.is_finite() {
                true => "has values too large for save_precision fp16; use float or bf16",
                false => "has values that are no numbers; the learning rate is probably too high",
            };
            return Err(Error::BadWeights {
                path: path.to_path_buf(),
                parameter: name,
                what,
            });
        }
        Ok(())
    }

    /// Writes what is needed to go on from the last complete update.
    pub(crate) fn save_state(&self, name: &str, observer: &mut dyn Observer) -> Result<()> {
        let path = self.folder().join(name);
        self.check_finite(&path, DType::F32)?;
        let weights = Weights {
            params: &self.adapters.params(),
            optimizer: self.optimizer.state()?,
            ema: self.ema.as_ref().map(|ema| ema.state()).transpose()?,
        };
        state::save(&path, &self.good, &weights)?;
        observer.event(&Event::StateSaved(&path));
        Ok(())
    }

    /// Removes an old file of this run.
    fn remove(&self, name: &str, observer: &mut dyn Observer) -> Result<()> {
        let path = self.folder().join(name);
        match std::fs::remove_file(&path) {
            Ok(()) => observer.event(&Event::Removed(&path)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(path)(e)),
        }
        Ok(())
    }

    /// Removes an old state of this run.
    fn remove_state(&self, name: &str, observer: &mut dyn Observer) -> Result<()> {
        let path = self.folder().join(name);
        if state::remove(&path)? {
            observer.event(&Event::Removed(&path));
        }
        Ok(())
    }

    /// Draws the sample prompts into `OUTPUT/sample`, with names as sd-scripts gives them.
    /// A prompt that cannot be drawn is a warning: training goes on.
    pub(crate) fn draw_samples(
        &mut self,
        epoch: Option<usize>,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        if self.samples.is_empty() {
            return Ok(());
        }
        let folder = self.folder().join("sample");
        std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        self.averaged(true)?;
        let result = self.without_gradients(|trainer| trainer.draw_into(&folder, epoch, observer));
        self.averaged(false)?;
        result
    }

    fn draw_into(
        &mut self,
        folder: &Path,
        epoch: Option<usize>,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let when = match epoch {
            Some(epoch) => format!("e{epoch:06}"),
            None => format!("{:06}", self.at.step),
        };
        let prefix = match &self.config.output_name {
            Some(name) => format!("{name}_"),
            None => String::new(),
        };
        let time = compact_time(unix_time());
        for (i, prompt) in self.samples.clone().into_iter().enumerate() {
            let mut drawn = prompt.clone();
            let place = Place::step(self.at.step as u64, i as u64);
            let seed = drawn.seed.get_or_insert_with(|| {
                let mut rng = self.streams.stream(Purpose::named("sample seed"), place);
                u64::from(rng.random::<u32>())
            });
            let suffix = prompt.seed.map_or(String::new(), |_| format!("_{seed}"));
            let path = folder.join(format!("{prefix}{when}_{i:02}_{time}{suffix}.png"));
            match self.model.draw(&drawn) {
                Ok(image) => {
                    let request = drawn.request(self.config.text().clip_skip)?;
                    let text = lora_sd15::infotext(
                        &request.prompt,
                        &request.negative,
                        &request.parameters(0),
                    );
                    let png = image.to_png(Some(&text)).map_err(Error::io(&path))?;
                    write_atomically(&path, |out| out.write_all(&png))?;
                    observer.event(&Event::Sample {
                        path: &path,
                        index: i,
                        step: self.at.step,
                        image: &image,
                        png: &png,
                    });
                }
                Err(error) => observer.event(&Event::Warning(&format!(
                    "sample {i} was not drawn: {error}"
                ))),
            }
        }
        Ok(())
    }
}
