//! Options of a dataset: plain data with the defaults a user wants.
//!
//! Names are sd-scripts' names. Where a default differs from sd-scripts', the
//! field says so; [`DatasetConfig::sd_scripts`] gives theirs.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::caption::CaptionConfig;
use crate::{Error, Result, Size};

/// Everything needed to load the data of a run.
///
/// | name | default | meaning |
/// |---|---|---|
/// | `datasets` | empty | the datasets, pooled and shuffled together |
/// | `prior_loss_weight` | 1.0 | loss weight of regularization images, 0 or more |
/// | `masked_loss` | false | use the masks of `conditioning_data_dir` |
/// | `exif_orientation` | true | turn photos as their camera says; sd-scripts does not |
/// | `transparency` | composite on white | what to do with transparent pixels |
/// | `decode_check` | quick | how thoroughly images are checked when listed |
/// | `threads` | 0 | threads for listing and decoding, 0 for one per core |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// The datasets. Their batches are pooled and shuffled together.
    pub datasets: Vec<DatasetConfig>,
    /// Loss weight of regularization images.
    pub prior_loss_weight: f32,
    /// Read masks from the subsets' `conditioning_data_dir`.
    pub masked_loss: bool,
    /// Apply the EXIF orientation of photos. sd-scripts ignores it.
    pub exif_orientation: bool,
    /// What to do with transparent pixels of images without `alpha_mask`.
    pub transparency: Transparency,
    /// How thoroughly images are checked when they are listed.
    pub decode_check: DecodeCheck,
    /// Threads for listing and decoding; 0 means one per core.
    pub threads: usize,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            datasets: Vec::new(),
            prior_loss_weight: 1.0,
            masked_loss: false,
            exif_orientation: true,
            transparency: Transparency::default(),
            decode_check: DecodeCheck::default(),
            threads: 0,
        }
    }
}

impl DataConfig {
    /// Checks every option of every dataset.
    ///
    /// # Errors
    /// [`Error::Option`] for the first value that cannot be used.
    pub fn validate(&self) -> Result<()> {
        if !(self.prior_loss_weight.is_finite() && self.prior_loss_weight >= 0.0) {
            let weight = self.prior_loss_weight;
            return Err(Error::option(
                "prior_loss_weight",
                format!("{weight} is not a number of 0 or more"),
            ));
        }
        self.datasets.iter().try_for_each(DatasetConfig::validate)
    }
}

/// What becomes of transparent pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transparency {
    /// Lay the image on this colour. White by default.
    Composite([u8; 3]),
    /// Drop the alpha channel and show whatever colour is stored, as sd-scripts does.
    Drop,
}

impl Default for Transparency {
    fn default() -> Self {
        Self::Composite([255; 3])
    }
}

/// How thoroughly images are checked when they are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecodeCheck {
    /// Read the header and look for the end of the file; decode only what looks wrong.
    #[default]
    Quick,
    /// Decode every image once, so that none can fail later.
    Full,
}

/// One dataset: a resolution, a batch size, its buckets and its folders.
///
/// | name | default | meaning | range |
/// |---|---|---|---|
/// | `resolution` | 512 | target area, as `512`, `[768, 512]` or `"768,512"` | multiples of 8 |
/// | `batch_size` | 1 | images per batch | 1 or more |
/// | `enable_bucket` | true (sd-scripts: false) | keep aspect ratios | |
/// | `min_bucket_reso` | 256 | smallest bucket side | up to the resolution |
/// | `max_bucket_reso` | 1024 | largest bucket side | from the resolution |
/// | `bucket_reso_steps` | 64 | bucket sides are multiples of this | multiples of 8 |
/// | `bucket_no_upscale` | false | never enlarge an image | |
/// | `resize_interpolation` | area down, Lanczos up | one filter for both | |
/// | `validation_split` | 0 | part held back for validation | 0 to below 1 |
/// | `validation_seed` | 0 | decides which part | |
/// | `subset` | | options of folders found by [`Dataset::from_folder`](crate::Dataset::from_folder) | |
/// | `subsets` | empty | folders given one by one | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatasetConfig {
    /// Target resolution; with buckets its area.
    pub resolution: Size,
    /// Images per batch.
    pub batch_size: usize,
    /// Sort images into buckets of similar aspect ratio.
    pub enable_bucket: bool,
    /// Smallest side of a bucket.
    pub min_bucket_reso: u32,
    /// Largest side of a bucket.
    pub max_bucket_reso: u32,
    /// Bucket sides are multiples of this.
    pub bucket_reso_steps: u32,
    /// Never enlarge an image; buckets are made to fit.
    pub bucket_no_upscale: bool,
    /// One filter for all resizing; none means area down and Lanczos up.
    pub resize_interpolation: Option<Interpolation>,
    /// Part of each training folder that is held back for validation.
    pub validation_split: f64,
    /// Seed that decides which images are held back; none means 0, so that all runs hold back the same.
    pub validation_seed: Option<u64>,
    /// Options of the folders that [`Dataset::from_folder`](crate::Dataset::from_folder) finds.
    pub subset: SubsetConfig,
    /// Folders given one by one.
    pub subsets: Vec<SubsetConfig>,
}

impl Default for DatasetConfig {
    fn default() -> Self {
        Self {
            enable_bucket: true,
            ..Self::sd_scripts()
        }
    }
}

impl DatasetConfig {
    /// The defaults of sd-scripts.
    pub fn sd_scripts() -> Self {
        Self {
            resolution: Size::square(512),
            batch_size: 1,
            enable_bucket: false,
            min_bucket_reso: 256,
            max_bucket_reso: 1024,
            bucket_reso_steps: 64,
            bucket_no_upscale: false,
            resize_interpolation: None,
            validation_split: 0.0,
            validation_seed: None,
            subset: SubsetConfig::default(),
            subsets: Vec::new(),
        }
    }

    /// Checks every option.
    ///
    /// # Errors
    /// [`Error::Option`] for the first value that cannot be used.
    pub fn validate(&self) -> Result<()> {
        if self.batch_size == 0 {
            return Err(Error::option(
                "batch_size",
                "0 images make no batch, give 1 or more",
            ));
        }
        let Size { width, height } = self.resolution;
        if width == 0 || height == 0 || !width.is_multiple_of(8) || !height.is_multiple_of(8) {
            let what = format!(
                "{} has a side that is not a multiple of 8 pixels",
                self.resolution
            );
            return Err(Error::option("resolution", what));
        }
        if self.enable_bucket
            && (self.bucket_reso_steps == 0 || !self.bucket_reso_steps.is_multiple_of(8))
        {
            let what = format!(
                "{} is not a multiple of 8 pixels (64 is usual)",
                self.bucket_reso_steps
            );
            return Err(Error::option("bucket_reso_steps", what));
        }
        if !(0.0..1.0).contains(&self.validation_split) {
            let what = format!("{} is not a part from 0 to below 1", self.validation_split);
            return Err(Error::option("validation_split", what));
        }
        if self.enable_bucket && !self.bucket_no_upscale {
            crate::BucketTable::new(self)?;
        }
        self.subset.validate()?;
        self.subsets.iter().try_for_each(SubsetConfig::validate)
    }
}

/// One folder of images, or one metadata file, with its options.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SubsetConfig {
    /// The folder of images. Its name has no meaning here.
    pub image_dir: Option<PathBuf>,
    /// Metadata JSON with captions, instead of caption files.
    pub metadata_file: Option<PathBuf>,
    /// Folder of masks, one per image with the same base name, or with a folder of these named
    /// like `image_dir`. Subsets may share it. Needs `masked_loss`.
    pub conditioning_data_dir: Option<PathBuf>,
    /// These are regularization images.
    pub is_reg: bool,
    /// How often each image is seen per epoch.
    pub num_repeats: u32,
    /// Caption of images without a caption file.
    pub class_tokens: Option<String>,
    /// Extension of caption files. None means `.txt`, and `.caption` where there is no `.txt`.
    pub caption_extension: Option<String>,
    /// How captions are processed each time they are drawn.
    pub captions: CaptionConfig,
    /// Mirror half of the draws.
    pub flip_aug: bool,
    /// Vary colours slightly in a third of the draws.
    pub color_aug: bool,
    /// Crop at a random place instead of the centre.
    pub random_crop: bool,
    /// Crop around the face named in the file name, face size relative to the picture from..to.
    /// Only used with buckets off.
    pub face_crop_aug_range: Option<(f64, f64)>,
    /// Use the alpha channel as a mask for the loss.
    pub alpha_mask: bool,
    /// Overrides the dataset's filter.
    pub resize_interpolation: Option<Interpolation>,
    /// Replace the target by the base model's own prediction for these images.
    pub diff_output_preservation: bool,
}

impl Default for SubsetConfig {
    fn default() -> Self {
        Self {
            image_dir: None,
            metadata_file: None,
            conditioning_data_dir: None,
            is_reg: false,
            num_repeats: 1,
            class_tokens: None,
            caption_extension: None,
            captions: CaptionConfig::default(),
            flip_aug: false,
            color_aug: false,
            random_crop: false,
            face_crop_aug_range: None,
            alpha_mask: false,
            resize_interpolation: None,
            diff_output_preservation: false,
        }
    }
}

impl SubsetConfig {
    /// Checks every option.
    ///
    /// # Errors
    /// [`Error::Option`] for the first value that cannot be used.
    pub fn validate(&self) -> Result<()> {
        if self.num_repeats == 0 {
            return Err(Error::option(
                "num_repeats",
                "0 repeats would leave the folder out, give 1 or more",
            ));
        }
        if let Some((from, to)) = self.face_crop_aug_range
            && !(from > 0.0 && from <= to && to.is_finite())
        {
            let what = format!("{from},{to} is not a range of factors above 0, smaller first");
            return Err(Error::option("face_crop_aug_range", what));
        }
        self.captions.validate()
    }
}

/// A resize filter, by sd-scripts' name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    /// Mean of the covered area (OpenCV `INTER_AREA`).
    Area,
    /// Lanczos with three lobes (Pillow).
    Lanczos,
    /// Bilinear (OpenCV `INTER_LINEAR`).
    #[serde(alias = "linear")]
    Bilinear,
    /// Bicubic (OpenCV `INTER_CUBIC`).
    #[serde(alias = "cubic")]
    Bicubic,
    /// Nearest pixel (OpenCV `INTER_NEAREST_EXACT`).
    Nearest,
    /// Box filter (Pillow).
    Box,
}

impl std::str::FromStr for Interpolation {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "area" => Self::Area,
            "lanczos" | "lanczos4" => Self::Lanczos,
            "bilinear" | "linear" => Self::Bilinear,
            "bicubic" | "cubic" => Self::Bicubic,
            "nearest" => Self::Nearest,
            "box" => Self::Box,
            other => {
                let what = format!(
                    "`{other}` is not one of area, lanczos, bilinear, bicubic, nearest, box"
                );
                return Err(Error::option("resize_interpolation", what));
            }
        })
    }
}
