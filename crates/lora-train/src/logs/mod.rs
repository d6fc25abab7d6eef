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

/// Several observers as one.
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
