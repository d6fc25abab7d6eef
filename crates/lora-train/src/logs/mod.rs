//! Observers that write: a JSON log, TensorBoard event files, a picture of the loss.

mod curve;
mod json;
mod tensorboard;

use std::path::PathBuf;

pub use curve::{Curve, draw_curves};
pub use json::JsonLog;
pub use tensorboard::TensorBoard;

use crate::metadata::{compact_time, unix_time};
use crate::observer::{Event, Observer};
use crate::{Result, TrainConfig};

/// Several observers as one. The [trouble](Observer::trouble) of one is a warning to all.
///
/// ```
/// use lora_train::{Event, Observer, logs::Observers};
/// let mut count = 0;
/// let mut all = Observers::default();
/// all.add(|_: &Event<'_>| println!("something happened"));
/// all.event(&Event::EpochStarted { epoch: 1 });
/// # count += 1;
/// ```
#[derive(Default)]
pub struct Observers<'a>(Vec<Box<dyn Observer + 'a>>);

impl std::fmt::Debug for Observers<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} observers", self.0.len())
    }
}

impl<'a> Observers<'a> {
    /// The logs that a run's settings ask for: the JSON log and the loss curve beside the
    /// result always, TensorBoard files when there is a `logging_dir`.
    ///
    /// # Errors
    /// When a log file cannot be created.
    pub fn for_run(config: &TrainConfig) -> Result<Self> {
        let mut all = Self::default();
        let base = |suffix: &str| {
            config
                .output_dir()
                .join(format!("{}{suffix}", config.name()))
        };
        all.add(JsonLog::new(
            &base(".log.jsonl"),
            &base("-loss.png"),
            config.resume.is_some(),
        ));
        if let Some(folder) = tensorboard_folder(config) {
            all.add(TensorBoard::create(&folder)?);
        }
        Ok(all)
    }

    /// Adds one.
    pub fn add(&mut self, observer: impl Observer + 'a) {
        self.0.push(Box::new(observer));
    }
}

impl Observer for Observers<'_> {
    fn event(&mut self, event: &Event<'_>) {
        for observer in &mut self.0 {
            observer.event(event);
        }
        while let Some(trouble) = self.0.iter_mut().find_map(|o| o.trouble()) {
            for observer in &mut self.0 {
                observer.event(&Event::Warning(&trouble));
            }
        }
    }
}

/// `LOGGING_DIR/PREFIXyyyymmddHHMMSS/network_train`, as sd-scripts names it.
fn tensorboard_folder(config: &TrainConfig) -> Option<PathBuf> {
    let folder = config.logging_dir.as_ref()?;
    let prefix = config.log_prefix.as_deref().unwrap_or("");
    let name = config
        .log_tracker_name
        .as_deref()
        .unwrap_or("network_train");
    Some(
        folder
            .join(format!("{prefix}{}", compact_time(unix_time())))
            .join(name),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_cannot_be_written_is_told_to_the_others_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut warnings = Vec::new();
        let mut all = Observers::default();
        all.add(|event: &Event<'_>| {
            if let Event::Warning(text) = event {
                warnings.push(text.to_string());
            }
        });
        all.add(JsonLog::new(
            &folder.path().join("no/log.jsonl"),
            &folder.path().join("x.png"),
            true,
        ));
        for _ in 0..2 {
            all.event(&Event::Resumed {
                path: folder.path(),
                epoch: 1,
                step: 0,
            });
        }
        drop(all);
        assert!(
            matches!(&warnings[..], [one] if one.contains("log.jsonl")),
            "{warnings:?}"
        );
    }
}
