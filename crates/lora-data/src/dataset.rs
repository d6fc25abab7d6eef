//! The dataset: every image with its caption, bucket and repeats.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::{
    CaptionTime, DataConfig, DatasetConfig, EpochPlan, Finding, PlanItem, Result, Size, Streams,
};

/// The images of a run.
#[derive(Debug, Clone)]
pub struct Dataset {
    config: DataConfig,
    images: Vec<ImageRecord>,
    findings: Vec<Finding>,
}

/// One image of a dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRecord {
    /// The file.
    pub path: PathBuf,
    /// Number of its dataset.
    pub dataset: usize,
    /// Number of its subset in that dataset.
    pub subset: usize,
    /// Times it is seen per epoch.
    pub repeats: u32,
    /// Its caption as read.
    pub caption: String,
    /// Width and height as shown (after EXIF orientation).
    pub size: Size,
    /// Its bucket.
    pub bucket: Size,
    /// The size it is resized to before cropping.
    pub resized: Size,
}

/// An image as the model sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// Width and height.
    pub size: Size,
    /// Red, green, blue planes, row by row, from -1 to 1: `3 x height x width`.
    pub data: Vec<f32>,
    /// Weight of each pixel in the loss, from 0 to 1: `height x width`.
    pub mask: Option<Vec<f32>>,
}

/// Numbers of one folder, as kept in a LoRA's metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FolderStats {
    /// Base name of the folder.
    pub name: String,
    /// Repeats as given.
    pub n_repeats: u32,
    /// Images in it.
    pub img_count: usize,
}

impl Dataset {
    /// Parent of `N_name` folders, one such folder, or a plain folder.
    ///
    /// # Errors
    /// When nothing is found or nothing can be decoded.
    pub fn from_folder(_root: impl AsRef<Path>, _options: &DatasetConfig) -> Result<Self> {
        todo!()
    }

    /// Training folders, regularization folders and run-wide options.
    ///
    /// # Errors
    /// When nothing is found or nothing can be decoded.
    pub fn from_folders(
        _train: &Path,
        _regularization: Option<&Path>,
        _options: &DatasetConfig,
        _run: &DataConfig,
    ) -> Result<Self> {
        todo!()
    }

    /// Every dataset and subset of a config.
    ///
    /// # Errors
    /// When nothing is found or nothing can be decoded.
    pub fn load(_config: DataConfig) -> Result<Self> {
        todo!()
    }

    /// All images, in order.
    pub fn images(&self) -> &[ImageRecord] {
        &self.images
    }

    /// The options in effect.
    pub fn config(&self) -> &DataConfig {
        &self.config
    }

    /// What was noticed while listing.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Batches per epoch.
    pub fn batches_per_epoch(&self) -> usize {
        todo!()
    }

    /// Training images times repeats.
    pub fn num_train_images(&self) -> usize {
        todo!()
    }

    /// Regularization images times repeats, before balancing.
    pub fn num_reg_images(&self) -> usize {
        todo!()
    }

    /// The batches of an epoch (counted from 1) in training order.
    pub fn epoch(&self, _epoch: usize, _seed: u64) -> EpochPlan {
        todo!()
    }

    /// The caption of a draw, processed.
    pub fn caption(&self, _item: &PlanItem, _time: CaptionTime, _streams: Streams) -> String {
        todo!()
    }

    /// Decodes, resizes and crops one draw.
    ///
    /// # Errors
    /// When the file is gone, has changed or cannot be decoded.
    pub fn pixels(&self, _item: &PlanItem) -> Result<Pixels> {
        todo!()
    }

    /// Folders with repeats and image counts: training, then regularization.
    pub fn folders(&self) -> (Vec<FolderStats>, Vec<FolderStats>) {
        todo!()
    }

    /// Per folder, how many images have each tag.
    pub fn tag_frequency(&self) -> BTreeMap<String, BTreeMap<String, usize>> {
        todo!()
    }
}
