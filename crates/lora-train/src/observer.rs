//! What a trainer tells while it works.

use std::path::Path;
use std::time::Duration;

use lora_data::DatasetReport;
use lora_sd15::Image;

use crate::{Plan, ValidationReport};

/// Something that happened.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Something to know that stops nothing.
    Warning(&'a str),
    /// The pictures and captions, before the model is loaded.
    Dataset(&'a DatasetReport),
    /// The run as it will be, before the first long work.
    Planned(&'a Plan),
    /// Pictures encoded so far, and in all.
    Encoding {
        /// So far.
        done: usize,
        /// In all.
        total: usize,
    },
    /// An epoch starts, counted from 1.
    EpochStarted {
        /// Its number.
        epoch: usize,
    },
    /// A batch was trained on.
    Batch(&'a BatchReport),
    /// A batch was left out because something was not finite.
    Skipped {
        /// Updates made so far.
        step: usize,
        /// What was not finite, and the pictures.
        what: &'a str,
    },
    /// The run goes on from a state.
    Resumed {
        /// The state folder.
        path: &'a Path,
        /// Epoch in progress, counted from 1.
        epoch: usize,
        /// Updates made.
        step: usize,
    },
    /// The loss on the held-out pictures was measured.
    Validated(&'a ValidationReport),
    /// A sample picture was drawn.
    Sample {
        /// Its file.
        path: &'a Path,
        /// Number of the prompt, from 0.
        index: usize,
        /// Updates made.
        step: usize,
        /// The picture.
        image: &'a Image,
        /// The picture as it is in the file.
        png: &'a [u8],
    },
    /// A state folder was written.
    StateSaved(&'a Path),
    /// The run is complete.
    Finished {
        /// The adapter file.
        path: &'a Path,
        /// Batches left out because something was not finite.
        skipped: usize,
    },
    /// A file was written.
    Saved(&'a Path),
    /// An old intermediate file was removed.
    Removed(&'a Path),
    /// An epoch ended.
    EpochFinished {
        /// Its number.
        epoch: usize,
        /// Updates made.
        step: usize,
        /// Mean loss over the last epoch's worth of batches.
        average_loss: f64,
    },
}

/// Numbers of one batch.
#[derive(Debug, Clone)]
pub struct BatchReport {
    /// Updates made, this batch's included if it completed one.
    pub step: usize,
    /// Updates in all.
    pub total_steps: usize,
    /// Epoch, counted from 1.
    pub epoch: usize,
    /// Batches in all.
    pub batch: u64,
    /// Whether this batch completed an update.
    pub updated: bool,
    /// Loss of this batch.
    pub loss: f64,
    /// Mean loss over the last epoch's worth of batches.
    pub average_loss: f64,
    /// Per parameter group: name, learning rate, effective learning rate (`d * lr`).
    pub learning_rates: Vec<(String, f64, f64)>,
    /// Whether the optimizer finds its own learning rate.
    pub adaptive: bool,
    /// Norm of all gradients before clipping, if an update was made.
    pub grad_norm: Option<f64>,
    /// Layers scaled by `scale_weight_norms`, and the mean norm.
    pub norms: Option<lora_core::NormReport>,
    /// Time this batch took.
    pub elapsed: Duration,
    /// Time spent waiting for its pictures before that.
    pub waited: Duration,
}

/// Receives events: a progress bar, a log, a test.
pub trait Observer {
    /// Called as things happen, on the training thread.
    fn event(&mut self, event: &Event<'_>);

    /// What went wrong with the observer itself, such as a log that cannot be written on;
    /// told once. [`Observers`](crate::logs::Observers) pass it on as a warning.
    fn trouble(&mut self) -> Option<String> {
        None
    }
}

impl<F: FnMut(&Event<'_>)> Observer for F {
    fn event(&mut self, event: &Event<'_>) {
        self(event);
    }
}

/// sd-scripts' running average: a slot per batch of the epoch, replaced when the
/// same position comes round again.
///
/// ```
/// let mut average = lora_train::LossAverage::default();
/// average.add(0, 1.0);
/// assert_eq!(average.add(1, 3.0), 2.0);
/// assert_eq!(average.add(0, 5.0), 4.0);
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LossAverage {
    slots: Vec<f64>,
}

impl LossAverage {
    /// Goes on from saved slots.
    pub fn from_slots(slots: Vec<f64>) -> Self {
        Self { slots }
    }

    /// The losses by position in the epoch.
    pub fn slots(&self) -> &[f64] {
        &self.slots
    }

    /// Adds the loss of a batch, by its position in the epoch; returns the average.
    pub fn add(&mut self, position: usize, loss: f64) -> f64 {
        match self.slots.get_mut(position) {
            Some(slot) => *slot = loss,
            None => self.slots.push(loss),
        }
        self.average()
    }

    /// The average, 0 before the first batch.
    pub fn average(&self) -> f64 {
        self.slots.iter().sum::<f64>() / self.slots.len().max(1) as f64
    }
}
