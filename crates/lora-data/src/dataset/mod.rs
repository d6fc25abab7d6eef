//! The dataset: every image with its caption, bucket and repeats.

mod balance;
mod build;
mod listing;
mod load;
mod split;
mod stats;

pub use balance::balance_regularization;
pub(crate) use build::build;
pub(crate) use listing::{base_name, some_names};
pub use load::Pixels;
pub(crate) use load::crop;
pub use split::split_sizes;
pub use stats::{BucketCount, BucketInfo, DatasetStats, SubsetStats};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::caption::CaptionSource;
use crate::{
    BatchPlan, CaptionConfig, CaptionTime, DataConfig, DatasetConfig, Finding, Layout, Place,
    PlanItem, Purpose, Result, Size, Streams, SubsetConfig, find_subsets, process_caption,
};

/// The images of a run: listed, captioned and sorted into buckets, not yet decoded.
///
/// ```no_run
/// use lora_data::{CaptionTime, Dataset, DatasetConfig, Streams};
///
/// // A parent of folders named `10_name`, one such folder, or a plain folder.
/// let options = DatasetConfig { batch_size: 2, ..Default::default() };
/// let dataset = Dataset::from_folder("photos", &options)?;
/// for finding in dataset.findings() {
///     eprintln!("{finding}");
/// }
/// let plan = dataset.epoch(1, 42);
/// for batch in &plan.batches {
///     for item in &batch.items {
///         let pixels = dataset.pixels(item)?;
///         let caption = dataset.caption(item, CaptionTime { epoch: 1, ..Default::default() }, Streams::new(42));
///         println!("{}: {caption}", pixels.size);
///     }
/// }
/// # Ok::<(), lora_data::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Dataset {
    config: DataConfig,
    images: Vec<ImageRecord>,
    stats: Vec<DatasetStats>,
    findings: Vec<Finding>,
    buckets: BTreeMap<(usize, Size), Vec<usize>>,
    layouts: Vec<(PathBuf, Layout)>,
}

/// What an image is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// It is what the adapter learns.
    Train,
    /// It shows what the base model should keep, weighted by `prior_loss_weight`.
    Regularization,
    /// It is held back to measure the loss and never trained.
    Validation,
}

/// One image of a dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRecord {
    /// The file.
    pub path: PathBuf,
    /// The file of its mask, if it has one.
    pub mask: Option<PathBuf>,
    /// Number of its dataset in [`DataConfig::datasets`].
    pub dataset: usize,
    /// Number of its subset in that dataset.
    pub subset: usize,
    /// What it is for.
    pub role: Role,
    /// Times it is seen per epoch, after balancing.
    pub repeats: u32,
    /// Its caption as read, before any processing.
    pub caption: String,
    /// Where the caption came from.
    pub caption_source: CaptionSource,
    /// Width and height as shown, after the EXIF orientation.
    pub size: Size,
    /// Its bucket: what the model sees.
    pub bucket: Size,
    /// The size it is resized to before it is cropped to the bucket.
    pub resized: Size,
    /// Aspect ratio of the bucket minus that of the image.
    pub aspect_error: f64,
}

impl Dataset {
    /// Reads a parent of `N_name` folders, one such folder, or a plain folder of images.
    ///
    /// # Errors
    /// [`Error::NothingFound`](crate::Error::NothingFound) with every folder looked at,
    /// [`Error::NothingDecodes`](crate::Error::NothingDecodes), or a bad option or caption file.
    pub fn from_folder(root: impl AsRef<Path>, options: &DatasetConfig) -> Result<Self> {
        Self::from_folders(root, None::<&Path>, options, &DataConfig::default())
    }

    /// Reads training folders and regularization folders; `run` gives the run-wide options.
    ///
    /// # Errors
    /// As [`Dataset::from_folder`], for both paths.
    pub fn from_folders(
        train: impl AsRef<Path>,
        regularization: Option<impl AsRef<Path>>,
        options: &DatasetConfig,
        run: &DataConfig,
    ) -> Result<Self> {
        let found = find_subsets(train.as_ref(), false, &options.subset)?;
        let mut findings = found.findings;
        let mut layouts = vec![(train.as_ref().to_path_buf(), found.layout)];
        let mut dataset = DatasetConfig {
            subsets: found.subsets,
            ..options.clone()
        };
        if let Some(path) = regularization {
            let found = find_subsets(path.as_ref(), true, &options.subset)?;
            findings.extend(found.findings);
            layouts.push((path.as_ref().to_path_buf(), found.layout));
            dataset.subsets.extend(found.subsets);
        }
        let config = DataConfig {
            datasets: vec![dataset],
            ..run.clone()
        };
        Ok(Self {
            layouts,
            ..build::build(config, findings)?
        })
    }

    /// Reads every dataset and subset of a config.
    ///
    /// # Errors
    /// As [`Dataset::from_folder`].
    pub fn load(config: DataConfig) -> Result<Self> {
        build::build(config, Vec::new())
    }

    /// All images: per dataset the training images, then regularization, then validation.
    pub fn images(&self) -> &[ImageRecord] {
        &self.images
    }

    /// The options in effect, with the folders that were found.
    pub fn config(&self) -> &DataConfig {
        &self.config
    }

    /// What was noticed while listing. Nothing is printed.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// How each path that was searched for folders was understood; empty for a dataset config,
    /// which names its folders.
    pub fn layouts(&self) -> &[(PathBuf, Layout)] {
        &self.layouts
    }

    /// Counts per dataset, for reports and metadata.
    pub fn stats(&self) -> &[DatasetStats] {
        &self.stats
    }

    /// The options of an image's folder.
    pub fn subset(&self, image: &ImageRecord) -> &SubsetConfig {
        // Records are made from these very lists.
        &self.config.datasets[image.dataset].subsets[image.subset]
    }

    /// Batches per epoch over all datasets.
    pub fn batches_per_epoch(&self) -> usize {
        self.stats.iter().map(|stats| stats.batches_per_epoch).sum()
    }

    /// Training images times repeats.
    pub fn num_train_images(&self) -> usize {
        self.stats.iter().map(|stats| stats.num_train_images).sum()
    }

    /// Regularization images times repeats as given, before balancing.
    pub fn num_reg_images(&self) -> usize {
        self.stats.iter().map(|stats| stats.num_reg_images).sum()
    }

    /// Validation images.
    pub fn num_validation_images(&self) -> usize {
        self.images
            .iter()
            .filter(|image| image.role == Role::Validation)
            .count()
    }

    /// The batches of the validation images, always the same.
    pub fn validation(&self) -> Vec<BatchPlan> {
        self.each_once(|role| role == Role::Validation)
    }

    /// The caption of one draw as the model sees it: a pure function of its arguments.
    pub fn caption(&self, item: &PlanItem, time: CaptionTime, streams: Streams) -> String {
        let options = |image| &self.subset(image).captions;
        self.images
            .get(item.image)
            .map_or_else(String::new, |i| caption(i, options(i), item, time, streams))
    }

    /// The caption of one draw with all its tags in their order, whatever training drops or
    /// shuffles: for validation. Wildcards are chosen by `streams`.
    pub fn complete_caption(&self, item: &PlanItem, streams: Streams) -> String {
        let options = |image| self.subset(image).captions.complete();
        let time = CaptionTime::default();
        self.images.get(item.image).map_or_else(String::new, |i| {
            caption(i, &options(i), item, time, streams)
        })
    }

    /// Images that are trained, by dataset and bucket.
    pub(crate) fn buckets(&self) -> &BTreeMap<(usize, Size), Vec<usize>> {
        &self.buckets
    }

    pub(crate) fn batch_size(&self, dataset: usize) -> usize {
        self.config
            .datasets
            .get(dataset)
            .map_or(1, |d| d.batch_size.max(1))
    }
}

fn caption(
    image: &ImageRecord,
    options: &CaptionConfig,
    item: &PlanItem,
    time: CaptionTime,
    streams: Streams,
) -> String {
    let place = Place {
        epoch: time.epoch as u64,
        step: 0,
        item: item.key(),
    };
    let mut stream = streams.stream(Purpose::CAPTION, place);
    process_caption(&image.caption, options, time, &mut stream)
}
