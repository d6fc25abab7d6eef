//! Counts of a dataset, in the form in which they are kept in a LoRA's metadata.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::Size;
use crate::caption::CaptionSource;

/// Counts of one dataset.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DatasetStats {
    /// Training images times repeats.
    pub num_train_images: usize,
    /// Regularization images times repeats as given, before balancing.
    pub num_reg_images: usize,
    /// Batches of one epoch.
    pub batches_per_epoch: usize,
    /// Its buckets; none when buckets are off.
    pub bucket_info: Option<BucketInfo>,
    /// Its folders, in the order of the config.
    pub subsets: Vec<SubsetStats>,
    /// Per folder name, how many images have each tag.
    pub tag_frequency: BTreeMap<String, BTreeMap<String, usize>>,
}

/// Counts of one folder.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SubsetStats {
    /// Base name of the folder or the metadata file.
    pub name: String,
    /// Regularization images.
    pub is_reg: bool,
    /// Repeats as given.
    pub n_repeats: u32,
    /// Usable images, those held back for validation included.
    pub img_count: usize,
    /// Images held back for validation.
    pub validation_count: usize,
    /// Images that cannot be decoded and were left out.
    pub undecodable: usize,
    /// Where captions came from.
    pub captions: BTreeMap<CaptionSource, usize>,
}

/// The buckets in use.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BucketInfo {
    /// Sorted by width and height; empty ones are left out.
    pub buckets: Vec<BucketCount>,
    /// Mean over images of the difference between bucket and image aspect ratio.
    pub mean_img_ar_error: f64,
}

/// One bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketCount {
    /// Its size.
    pub resolution: Size,
    /// Images in it, times repeats.
    pub count: usize,
}

impl BucketInfo {
    /// The JSON that sd-scripts keeps as `ss_bucket_info`.
    pub fn to_json(&self) -> Value {
        let bucket = |b: &BucketCount| json!({ "resolution": b.resolution, "count": b.count });
        let buckets = self.buckets.iter().enumerate();
        let buckets: serde_json::Map<_, _> =
            buckets.map(|(i, b)| (i.to_string(), bucket(b))).collect();
        json!({ "buckets": buckets, "mean_img_ar_error": self.mean_img_ar_error })
    }
}

impl DatasetStats {
    /// The JSON that sd-scripts keeps as `ss_dataset_dirs` (or `ss_reg_dataset_dirs`).
    pub fn dirs_json(&self, is_reg: bool) -> Value {
        let folders = self.subsets.iter().filter(|subset| subset.is_reg == is_reg);
        let entry = |s: &SubsetStats| json!({ "n_repeats": s.n_repeats, "img_count": s.img_count });
        Value::Object(folders.map(|s| (s.name.clone(), entry(s))).collect())
    }
}

/// Adds the tags of one caption: split at commas, trimmed, lower case, without empty ones.
pub(super) fn count_tags(caption: &str, counts: &mut BTreeMap<String, usize>) {
    for tag in caption
        .split(',')
        .map(|tag| tag.trim().to_lowercase())
        .filter(|tag| !tag.is_empty())
    {
        *counts.entry(tag).or_default() += 1;
    }
}
