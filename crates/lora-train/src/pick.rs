//! Which of a run's files is best: validation loss, drift, variety.
//!
//! A run that goes on too long draws the training pictures again and again: poses freeze,
//! prompts no longer act, and pictures that have nothing to do with the subject change
//! too. Each of these is measured on pictures drawn with fixed seeds.

use std::path::{Path, PathBuf};

use lora_core::format::TensorFile;
use lora_sd15::Image;

use crate::samples::SamplePrompt;
use crate::trainer::Trainer;
use crate::{Error, Result};

/// What is drawn to judge a file.
#[derive(Debug, Clone, PartialEq)]
pub struct PickConfig {
    /// Prompts of the subject, with its trigger word.
    pub prompts: Vec<SamplePrompt>,
    /// Prompts without the trigger word, which should not change.
    pub neutral: Vec<SamplePrompt>,
    /// Seeds per prompt, at least 2.
    pub seeds: Vec<u64>,
}

/// What was found about one file. All but `loss` are ratios to the model without adapter
/// or differences of pixel values from 0 to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// The file.
    pub file: PathBuf,
    /// Mean squared error on the held-out pictures, or on the training pictures where
    /// none were held out; see [`Judgement::held_out`].
    pub loss: f64,
    /// Whether `loss` is of held-out pictures.
    pub held_out: bool,
    /// How much of the way from the loss of the model without adapter to the lowest loss of all
    /// files this one has come, from 0 to 1; below 0 when it is worse than no adapter.
    pub learned: f64,
    /// Mean pixel difference to the plain model on prompts without the trigger word.
    pub drift: f64,
    /// Difference between seeds of one prompt, as part of that of the plain model.
    pub variety: f64,
    /// Difference between prompts of one seed, as part of that of the plain model.
    pub response: f64,
    /// Smaller is better; see [`judge`].
    pub score: f64,
}

impl Judgement {
    /// The numbers in words.
    pub fn reasons(&self) -> String {
        let loss = if self.held_out {
            "validation loss"
        } else {
            "loss on the training pictures"
        };
        format!(
            "{loss} {:.4}, {:.0} % of the way to the lowest; pictures without the trigger word change by {:.1} %; seeds differ {:.0} % and prompts {:.0} % as much as without the adapter",
            self.loss,
            100.0 * self.learned,
            100.0 * self.drift,
            100.0 * self.variety,
            100.0 * self.response
        )
    }
}

/// Judges adapter files of the trainer's own run, best first.
///
/// The score is the part of the way to the lowest loss that is missing, plus the drift, plus what
/// is missing of variety and of response to 70 % of the plain model's: a good adapter narrows what
/// is drawn, so some loss of both is wanted. A file that has learned little changes little, too:
/// it scores no better than the model without adapter.
///
/// # Errors
/// When a file does not fit the run, or drawing fails.
pub fn judge(
    trainer: &mut Trainer,
    files: &[PathBuf],
    config: &PickConfig,
) -> Result<Vec<Judgement>> {
    if config.seeds.len() < 2 || config.prompts.is_empty() || files.is_empty() {
        return Err(Error::Config {
            place: "pick".into(),
            what: "needs at least one file, one prompt and two seeds".into(),
        });
    }
    trainer.set_multiplier(0.0);
    let plain = draw_all(trainer, &config.prompts, &config.seeds)?;
    let plain_neutral = draw_all(trainer, &config.neutral, &config.seeds)?;
    let (plain_loss, _) = trainer.fixed_loss()?;
    trainer.set_multiplier(1.0);
    let mut list = Vec::new();
    for file in files {
        trainer.show(file)?;
        let (loss, held_out) = trainer.fixed_loss()?;
        let drawn = draw_all(trainer, &config.prompts, &config.seeds)?;
        let neutral = draw_all(trainer, &config.neutral, &config.seeds)?;
        let pairs = neutral.iter().flatten().zip(plain_neutral.iter().flatten());
        list.push(Judgement {
            file: file.clone(),
            loss,
            held_out,
            learned: 0.0,
            drift: mean(pairs.map(|(a, b)| difference(a, b))),
            variety: ratio(between_seeds(&drawn), between_seeds(&plain)),
            response: ratio(between_prompts(&drawn), between_prompts(&plain)),
            score: 0.0,
        });
    }
    let best = list.iter().map(|j| j.loss).fold(f64::INFINITY, f64::min);
    for judgement in &mut list {
        // Nothing was learned where no file is better than the model without adapter.
        judgement.learned = match plain_loss > best {
            true => (plain_loss - judgement.loss) / (plain_loss - best),
            false => 0.0,
        };
        let missing = |part: f64| (0.7 - part).max(0.0);
        judgement.score = (1.0 - judgement.learned)
            + judgement.drift
            + missing(judgement.variety)
            + missing(judgement.response);
    }
    list.sort_by(|a, b| a.score.total_cmp(&b.score));
    Ok(list)
}

/// Pictures by prompt and seed.
fn draw_all(
    trainer: &mut Trainer,
    prompts: &[SamplePrompt],
    seeds: &[u64],
) -> Result<Vec<Vec<Image>>> {
    prompts
        .iter()
        .map(|prompt| {
            seeds
                .iter()
                .map(|seed| {
                    trainer.draw(&SamplePrompt {
                        seed: Some(*seed),
                        ..prompt.clone()
                    })
                })
                .collect()
        })
        .collect()
}

/// Mean absolute difference of pixel values, from 0 to 1.
pub fn difference(a: &Image, b: &Image) -> f64 {
    let sum: u64 = a
        .rgb
        .iter()
        .zip(&b.rgb)
        .map(|(x, y)| u64::from(x.abs_diff(*y)))
        .sum();
    sum as f64 / 255.0 / a.rgb.len().max(1) as f64
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(s, n), v| (s + v, n + 1));
    sum / count.max(1) as f64
}

/// `a / b`; 1 where the plain model differs in nothing.
fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 1.0 }
}

/// Mean difference of all pairs.
fn pairwise(images: &[&Image]) -> f64 {
    let pairs = (0..images.len()).flat_map(|i| (0..i).map(move |j| (i, j)));
    mean(pairs.filter_map(|(i, j)| Some(difference(images.get(i)?, images.get(j)?))))
}

fn between_seeds(drawn: &[Vec<Image>]) -> f64 {
    mean(
        drawn
            .iter()
            .map(|row| pairwise(&row.iter().collect::<Vec<_>>())),
    )
}

fn between_prompts(drawn: &[Vec<Image>]) -> f64 {
    if drawn.len() < 2 {
        return 1.0;
    }
    let seeds = drawn.first().map_or(0, Vec::len);
    mean((0..seeds).map(|k| {
        pairwise(
            &drawn
                .iter()
                .filter_map(|row| row.get(k))
                .collect::<Vec<_>>(),
        )
    }))
}

impl Trainer {
    /// Puts the weights of a file of this run in place of the trained ones.
    ///
    /// # Errors
    /// [`Error::Config`] when the file lacks a tensor of the run or has another shape.
    pub fn show(&mut self, file: &Path) -> Result<()> {
        let tensors = TensorFile::open(file)?;
        for (name, var) in self.adapters.params() {
            if name.ends_with(".scalar") && tensors.shape(&name).is_none() {
                // It is multiplied into a factor in files.
                var.set(&var.ones_like()?)?;
                continue;
            }
            let shape = tensors.shape(&name).map(<[usize]>::to_vec);
            if shape.as_deref() != Some(var.dims()) {
                return Err(Error::Config {
                    place: file.display().to_string(),
                    what: format!(
                        "{name} has shape {shape:?}, the run {:?}: it is no file of this run",
                        var.dims()
                    ),
                });
            }
            let tensor = tensors.tensor(&name, var.device())?;
            var.set(&tensor.to_dtype(var.dtype())?)?;
        }
        Ok(())
    }

    /// Sets how strongly the adapters act in pictures and in validation.
    pub fn set_multiplier(&mut self, multiplier: f64) {
        self.multiplier = multiplier;
    }

    /// Draws a picture with the adapters as they are now.
    ///
    /// # Errors
    /// As [`Model::draw`](crate::Model::draw).
    pub fn draw(&mut self, prompt: &SamplePrompt) -> Result<Image> {
        self.without_gradients(|trainer| trainer.model.draw(prompt))
    }
}
