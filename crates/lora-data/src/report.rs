//! What a run will do with a dataset, in numbers: the sum that decides how many updates are made.

use std::fmt;
use std::path::PathBuf;

use crate::{
    BucketCount, CaptionSource, CaptionTime, Dataset, ImageRecord, Layout, PlanItem, Role, Size,
    StepCount, Streams, SubsetStats,
};

/// What the report should assume about the run.
///
/// | name | default | meaning |
/// |---|---|---|
/// | `gradient_accumulation_steps` | 1 | batches per update |
/// | `length` | 10 epochs | how long the run is |
/// | `seed` | 0 | seed of the captions shown |
/// | `captions` | 3 | processed captions shown |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReportConfig {
    /// Batches per update.
    pub gradient_accumulation_steps: usize,
    /// How long the run is.
    pub length: RunLength,
    /// Seed of the captions shown.
    pub seed: u64,
    /// How many processed captions are shown.
    pub captions: usize,
}

impl Default for ReportConfig {
    fn default() -> Self {
        Self {
            gradient_accumulation_steps: 1,
            length: RunLength::Epochs(10),
            seed: 0,
            captions: 3,
        }
    }
}

/// The length of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunLength {
    /// This many epochs.
    Epochs(usize),
    /// This many updates, also in the middle of an epoch.
    Steps(usize),
}

/// Numbers of a dataset and a run over it. `Display` writes them for people.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetReport {
    /// How each path was understood; empty when a dataset config names the folders.
    pub layouts: Vec<(PathBuf, Layout)>,
    /// One entry per dataset.
    pub datasets: Vec<DatasetLines>,
    /// Batches and updates.
    pub steps: StepCount,
    /// Batches per update.
    pub gradient_accumulation_steps: usize,
    /// Epochs begun.
    pub epochs: usize,
    /// Updates of the whole run.
    pub total_steps: usize,
    /// Images that lose more than 15 % of their area to the crop, most first.
    pub cropped: Vec<(PathBuf, f64)>,
    /// Images that are enlarged, and how many times, most first.
    pub enlarged: Vec<(PathBuf, f64)>,
    /// Captions of the first draws: file, text as read, text as the model sees it.
    pub captions: Vec<(PathBuf, String, String)>,
    /// The most frequent tags and in how many images they are.
    pub tags: Vec<(String, usize)>,
}

/// Numbers of one dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetLines {
    /// Target resolution.
    pub resolution: Size,
    /// Images per batch.
    pub batch_size: usize,
    /// Training images times repeats.
    pub train: usize,
    /// Regularization images times repeats, after balancing.
    pub regularization: usize,
    /// Batches per epoch.
    pub batches: usize,
    /// Its folders.
    pub folders: Vec<SubsetStats>,
    /// Sizes and numbers of images times repeats.
    pub buckets: Vec<BucketCount>,
}

const CROP_WORTH_SAYING: f64 = 0.15;
const TAGS_SHOWN: usize = 20;
const NAMES_SHOWN: usize = 5;

impl DatasetReport {
    /// Counts; no picture is decoded.
    pub fn new(dataset: &Dataset, config: &ReportConfig) -> Self {
        let steps = StepCount::new(
            dataset.batches_per_epoch(),
            config.gradient_accumulation_steps,
        );
        let (epochs, total_steps) = match config.length {
            RunLength::Epochs(epochs) => (epochs, steps.total(epochs)),
            RunLength::Steps(steps_wanted) => (steps.epochs_for(steps_wanted), steps_wanted),
        };
        let worst = |measure: fn(&ImageRecord) -> f64, limit: f64| {
            let images = dataset
                .images()
                .iter()
                .map(|image| (image.path.clone(), measure(image)));
            let mut images: Vec<_> = images.filter(|(_, value)| *value > limit).collect();
            images.sort_by(|a, b| b.1.total_cmp(&a.1));
            images
        };
        Self {
            layouts: dataset.layouts().to_vec(),
            datasets: (0..dataset.stats().len())
                .map(|number| dataset_lines(dataset, number))
                .collect(),
            steps,
            gradient_accumulation_steps: config.gradient_accumulation_steps.max(1),
            epochs,
            total_steps,
            cropped: worst(ImageRecord::cropped, CROP_WORTH_SAYING),
            enlarged: worst(ImageRecord::enlarged, 1.0),
            captions: captions(dataset, config),
            tags: tags(dataset),
        }
    }
}

impl ImageRecord {
    /// Part of the picture that a centre crop removes, from 0 to 1.
    pub fn cropped(&self) -> f64 {
        1.0 - self.bucket.area() as f64 / self.resized.area().max(1) as f64
    }

    /// How many times the picture is enlarged along a side; below 1 when it shrinks.
    pub fn enlarged(&self) -> f64 {
        f64::from(self.resized.width) / f64::from(self.size.width.max(1))
    }
}

fn dataset_lines(dataset: &Dataset, number: usize) -> DatasetLines {
    let stats = &dataset.stats()[number];
    let options = &dataset.config().datasets[number];
    let draws =
        |image: &&ImageRecord| image.dataset == number && image.role == Role::Regularization;
    let buckets = dataset
        .buckets()
        .iter()
        .filter(|((of, _), _)| *of == number);
    let count = |images: &[usize]| {
        images
            .iter()
            .map(|&i| dataset.images()[i].repeats as usize)
            .sum()
    };
    DatasetLines {
        resolution: options.resolution,
        batch_size: options.batch_size,
        train: stats.num_train_images,
        regularization: dataset
            .images()
            .iter()
            .filter(draws)
            .map(|image| image.repeats as usize)
            .sum(),
        batches: stats.batches_per_epoch,
        folders: stats.subsets.clone(),
        buckets: buckets
            .map(|((_, size), images)| BucketCount {
                resolution: *size,
                count: count(images),
            })
            .collect(),
    }
}

/// Captions of a few images spread over the dataset, as drawn in the first epoch.
fn captions(dataset: &Dataset, config: &ReportConfig) -> Vec<(PathBuf, String, String)> {
    let items: Vec<_> = dataset
        .each_once(|role| role == Role::Train)
        .into_iter()
        .flat_map(|b| b.items)
        .collect();
    let stride = (items.len() / config.captions.max(1)).max(1);
    // After any token warm-up, so that all tags are there.
    let time = CaptionTime {
        epoch: 1,
        step: usize::MAX,
        max_train_steps: 1,
    };
    let shown = items.iter().step_by(stride).take(config.captions);
    let line = |item: &PlanItem| {
        let image = &dataset.images()[item.image];
        (
            image.path.clone(),
            image.caption.clone(),
            dataset.caption(item, time, Streams::new(config.seed)),
        )
    };
    shown.map(line).collect()
}

fn tags(dataset: &Dataset) -> Vec<(String, usize)> {
    let mut counts = std::collections::BTreeMap::<&str, usize>::new();
    for (tag, count) in dataset
        .stats()
        .iter()
        .flat_map(|s| s.tag_frequency.values())
        .flatten()
    {
        *counts.entry(tag).or_default() += count;
    }
    let mut counts: Vec<(String, usize)> = counts
        .into_iter()
        .map(|(tag, n)| (tag.to_owned(), n))
        .collect();
    counts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    counts.truncate(TAGS_SHOWN);
    counts
}

impl fmt::Display for DatasetReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (path, layout) in &self.layouts {
            writeln!(f, "{}: read as {layout}", path.display())?;
        }
        if self.layouts.is_empty() {
            writeln!(
                f,
                "Folders as the dataset config or metadata file names them"
            )?;
        }
        for (number, dataset) in self.datasets.iter().enumerate() {
            if self.datasets.len() > 1 {
                writeln!(f, "Dataset {}", number + 1)?;
            }
            dataset.fmt(f)?;
        }
        self.write_sum(f)?;
        write_images(
            f,
            "lose more than 15 % at the edges",
            &self.cropped,
            |part| format!("{:.0} %", part * 100.0),
        )?;
        write_images(f, "are enlarged", &self.enlarged, |factor| {
            format!("{factor:.2} times")
        })?;
        for (path, raw, processed) in &self.captions {
            writeln!(
                f,
                "Caption of {}\n  as read      {raw}\n  as trained   {processed}",
                name(path)
            )?;
        }
        if !self.tags.is_empty() {
            let tags: Vec<String> = self
                .tags
                .iter()
                .map(|(tag, count)| format!("{tag} {count}"))
                .collect();
            writeln!(f, "Tags: {}", tags.join(", "))?;
        }
        Ok(())
    }
}

impl DatasetReport {
    fn write_sum(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StepCount {
            batches_per_epoch,
            updates_per_epoch,
        } = self.steps;
        let per_update = match self.gradient_accumulation_steps {
            1 => String::new(),
            n => format!(" / {n} per update, rounded up"),
        };
        writeln!(
            f,
            "Epoch: {batches_per_epoch} batches{per_update} = {updates_per_epoch} updates"
        )?;
        writeln!(
            f,
            "Run: {} epochs, {} updates",
            self.epochs, self.total_steps
        )
    }
}

impl fmt::Display for DatasetLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for folder in &self.folders {
            let kind = if folder.is_reg {
                "regularization"
            } else {
                "training"
            };
            let SubsetStats {
                name,
                img_count,
                n_repeats,
                ..
            } = folder;
            write!(f, "  {name}: {img_count} {kind} images x {n_repeats}")?;
            let count = |source| folder.captions.get(&source).copied().unwrap_or(0);
            let captioned =
                img_count - count(CaptionSource::ClassTokens) - count(CaptionSource::Nothing);
            write!(f, ", {captioned} captions")?;
            if folder.validation_count > 0 {
                write!(f, ", {} held back", folder.validation_count)?;
            }
            if folder.undecodable > 0 {
                write!(f, ", {} unreadable", folder.undecodable)?;
            }
            writeln!(f)?;
        }
        for bucket in &self.buckets {
            let batches = bucket.count.div_ceil(self.batch_size.max(1));
            writeln!(
                f,
                "  bucket {}: {} draws, {batches} batches",
                bucket.resolution, bucket.count
            )?;
        }
        let (train, reg, batches) = (self.train, self.regularization, self.batches);
        writeln!(
            f,
            "  {train} + {reg} regularization draws in batches of {} = {batches} batches",
            self.batch_size
        )
    }
}

fn write_images(
    f: &mut fmt::Formatter<'_>,
    what: &str,
    images: &[(PathBuf, f64)],
    measure: impl Fn(f64) -> String,
) -> fmt::Result {
    if images.is_empty() {
        return Ok(());
    }
    let shown = images.iter().take(NAMES_SHOWN);
    let mut shown: Vec<String> = shown
        .map(|(path, value)| format!("{} ({})", name(path), measure(*value)))
        .collect();
    if images.len() > NAMES_SHOWN {
        shown.push("...".into());
    }
    writeln!(f, "{} images {what}: {}", images.len(), shown.join(", "))
}

fn name(path: &std::path::Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
