//! One line of JSON per batch, validation and file.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use lora_core::format::write_atomically;
use serde_json::{Value, json};

use super::curve::{Curve, draw_curves};
use crate::observer::{Event, Observer};
use crate::validation::turning_point;
use crate::{Error, Result};

/// Writes what happens to a `.jsonl` file, and a picture of the losses at the end.
///
/// A resumed run goes on in the same file: lines of updates that are made again are taken
/// out first.
#[derive(Debug)]
pub struct JsonLog {
    path: PathBuf,
    curve: PathBuf,
    go_on: bool,
    /// Opened when the run is known to be possible: a run that is refused must not empty
    /// the log of the one before it.
    file: Option<File>,
    waiting: Vec<Value>,
    validations: Vec<(usize, f64)>,
    broken: bool,
    trouble: Option<String>,
}

impl JsonLog {
    /// A log in this file, which is begun anew when the run is planned unless it goes on
    /// from a state. `curve` is where the picture goes.
    pub fn new(path: &Path, curve: &Path, go_on: bool) -> Self {
        Self {
            path: path.to_path_buf(),
            curve: curve.to_path_buf(),
            go_on,
            file: None,
            waiting: Vec::new(),
            validations: Vec::new(),
            broken: false,
            trouble: None,
        }
    }

    fn open(&mut self) {
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .append(self.go_on)
            .truncate(!self.go_on)
            .open(&self.path);
        match file {
            Ok(file) => self.file = Some(file),
            Err(error) => self.give_up(&error),
        }
        for line in std::mem::take(&mut self.waiting) {
            self.write(line);
        }
    }

    /// The log is no reason to end a run of hours.
    fn give_up(&mut self, error: &dyn std::fmt::Display) {
        if !std::mem::replace(&mut self.broken, true) {
            let path = self.path.display();
            self.trouble = Some(format!("{path}: {error}; no more is logged"));
        }
    }

    fn write(&mut self, line: Value) {
        if self.broken {
            return;
        }
        let Some(file) = &mut self.file else {
            self.waiting.push(line);
            return;
        };
        if let Err(error) = writeln!(file, "{line}") {
            self.give_up(&error);
        }
    }

    /// The complete lines so far.
    fn lines(&self) -> Vec<Value> {
        let Ok(file) = File::open(&self.path) else {
            return Vec::new();
        };
        BufReader::new(file)
            .lines()
            .map_while(std::result::Result::ok)
            .filter_map(|line| serde_json::from_str(&line).ok())
            .collect()
    }

    /// Keeps what came before the state that the run goes on from.
    fn cut(&mut self, step: usize) -> Result<()> {
        let after = |line: &Value| {
            line.get("step")
                .and_then(Value::as_u64)
                .is_some_and(|s| s > step as u64)
        };
        let kept: Vec<Value> = self.lines().into_iter().filter(|l| !after(l)).collect();
        self.validations = kept
            .iter()
            .filter(|line| line.get("event").and_then(Value::as_str) == Some("validation"))
            .filter_map(|line| {
                Some((
                    line.get("step")?.as_u64()? as usize,
                    line.get("loss")?.as_f64()?,
                ))
            })
            .collect();
        write_atomically(&self.path, |out| {
            kept.iter().try_for_each(|line| writeln!(out, "{line}"))
        })?;
        let file = OpenOptions::new().append(true).open(&self.path);
        self.file = Some(file.map_err(Error::io(&self.path))?);
        Ok(())
    }

    fn draw(&self) -> Result<()> {
        let lines = self.lines();
        let points = |event: &str, key: &str| -> Vec<(f64, f64)> {
            lines
                .iter()
                .filter(|line| line.get("event").and_then(Value::as_str) == Some(event))
                .filter_map(|line| Some((line.get("step")?.as_f64()?, line.get(key)?.as_f64()?)))
                .collect()
        };
        let image = draw_curves(
            "loss",
            &[
                Curve::new("batch", [205, 215, 230], points("batch", "loss")),
                Curve::new("average", [30, 90, 180], points("batch", "average")),
                Curve::new("validation", [200, 60, 40], points("validation", "loss")),
            ],
        );
        let png = image.to_png(None).map_err(Error::io(&self.curve))?;
        Ok(write_atomically(&self.curve, |out| out.write_all(&png))?)
    }
}

impl Observer for JsonLog {
    fn event(&mut self, event: &Event<'_>) {
        let line = match event {
            Event::Planned(_) => return self.open(),
            Event::Resumed { step, .. } => {
                if let Err(error) = self.cut(*step) {
                    self.give_up(&error);
                }
                return;
            }
            Event::Batch(b) => {
                let rates: Vec<Value> = b
                    .learning_rates
                    .iter()
                    .map(|(name, lr, effective)| match b.adaptive && *lr != 0.0 {
                        true => json!({"group": name, "lr": lr, "effective": effective, "d": effective / lr}),
                        false => json!({"group": name, "lr": lr, "effective": effective}),
                    })
                    .collect();
                json!({
                    "event": "batch", "step": b.step, "batch": b.batch, "epoch": b.epoch,
                    "loss": b.loss, "average": b.average_loss, "grad_norm": b.grad_norm,
                    "rates": rates, "seconds": b.elapsed.as_secs_f64(),
                    "waited": b.waited.as_secs_f64(),
                })
            }
            Event::EpochFinished {
                epoch,
                step,
                average_loss,
            } => json!({"event": "epoch", "step": step, "epoch": epoch, "average": average_loss}),
            Event::Validated(v) => {
                self.validations.push((v.step, v.loss));
                json!({
                    "event": "validation", "step": v.step, "epoch": v.epoch, "loss": v.loss,
                    "by_timestep": v.by_timestep, "best": v.best,
                })
            }
            Event::Skipped { step, what } => {
                json!({"event": "skipped", "step": step, "what": what})
            }
            Event::Warning(what) => json!({"event": "warning", "what": what}),
            Event::Saved(path) => json!({"event": "saved", "path": path}),
            Event::StateSaved(path) => json!({"event": "state", "path": path}),
            Event::Sample { path, step, .. } => {
                json!({"event": "sample", "step": step, "path": path})
            }
            Event::Finished { path, skipped } => {
                let lowest = turning_point(&self.validations);
                json!({
                    "event": "finished", "path": path, "skipped": skipped,
                    "lowest_validation": lowest.map(|(step, loss, _)| json!({"step": step, "loss": loss})),
                })
            }
            _ => return,
        };
        self.write(line);
        if matches!(event, Event::Finished { .. })
            && let Err(error) = self.draw()
        {
            self.trouble = Some(error.to_string());
        }
    }

    fn trouble(&mut self) -> Option<String> {
        self.trouble.take()
    }
}
