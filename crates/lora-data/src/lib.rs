//! Image and caption folders as Stable Diffusion trainers keep them.
//!
//! Point it at the folder or the dataset config that a user of kohya's sd-scripts
//! already has, and get the same images, buckets, captions and step counts; what
//! goes wrong silently there is an error or a [`Finding`] here. Nothing is printed.
//!
//! * [`Dataset`] lists images with captions, sizes and buckets; nothing is decoded yet.
//! * [`Dataset::epoch`] plans the batches of an epoch, a pure function of epoch and seed.
//! * [`Dataset::pixels`] decodes one planned image; [`Loader`] does so ahead, in threads.
//! * [`Dataset::caption`] and [`process_caption`] give the text of a draw.
//! * [`LatentCache`] and [`TextCache`] keep what frozen models make of them.
//! * [`DatasetReport`], [`doctor`] and [`write_contact_sheet`] are for people.
//! * [`BucketTable`], [`resize`] and [`Streams`] are useful alone.
//!
//! ```sh
//! cargo add lora-data
//! ```
//!
//! ```
//! use lora_data::{CaptionTime, Dataset, DatasetConfig, Size, Streams};
//! # let folder = tempfile::tempdir()?;
//! # let photos = folder.path().join("2_alice");
//! # std::fs::create_dir(&photos)?;
//! # image::RgbImage::new(640, 480).save(photos.join("a.png"))?;
//! # std::fs::write(photos.join("a.txt"), "alice, smile")?;
//! # let folder = folder.path();
//!
//! // The folder holds 2_alice/a.png and 2_alice/a.txt.
//! let dataset = Dataset::from_folder(folder, &DatasetConfig::default())?;
//! assert_eq!(dataset.num_train_images(), 2);
//!
//! let plan = dataset.epoch(1, 42);
//! let item = &plan.batches[0].items[0];
//! let pixels = dataset.pixels(item)?;
//! assert_eq!(pixels.size, Size::new(576, 448));
//! assert_eq!(pixels.data.len(), 3 * 576 * 448);
//!
//! let time = CaptionTime { epoch: 1, ..Default::default() };
//! assert_eq!(dataset.caption(item, time, Streams::new(42)), "alice, smile");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Where it differs from sd-scripts
//!
//! On purpose, each to cure a trap: every image is drawn exactly `repeats` times an
//! epoch; epochs are right for every caption; folders and files are sorted, found in any
//! letter case, and EXIF orientation is applied ([`DataConfig::exif_orientation`]);
//! transparent pixels are laid on white ([`Transparency`]); captions lose a byte-order
//! mark and the `keep_tokens_separator`; empty captions do not stop the run; images of
//! another size without buckets are resized instead of refused; validation images are
//! never trained; caches notice every change.

#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}

mod atomic;
mod bucket;
mod cache;
mod caption;
mod config;
mod config_file;
mod contact_sheet;
mod dataset;
pub mod doctor;
mod error;
mod face;
mod finding;
mod folder;
mod loader;
mod mask;
mod metadata;
mod picture;
mod plan;
mod report;
mod size;
mod streams;

pub use bucket::{BucketFit, BucketTable, crop_ltrb, side_limits};
pub use cache::{
    CacheConfig, CachedLatents, EncoderError, LatentCache, LatentEncoder, Latents, Leftover,
    TextCache, TextEncoder, TextOutput, leftovers, remove_leftovers,
};
pub use caption::{CaptionConfig, CaptionDraws, CaptionSource, CaptionTime, process_caption};
pub use config::{
    DataConfig, DatasetConfig, DecodeCheck, Interpolation, SubsetConfig, Transparency,
};
pub use config_file::{ConfigFile, ConfigSyntax};
pub use contact_sheet::{ContactSheetConfig, write_contact_sheet};
pub use dataset::{
    BucketCount, BucketInfo, Dataset, DatasetStats, ImageRecord, Pixels, Role, SubsetStats,
    balance_regularization, split_sizes,
};
pub use error::{ConfigFault, Error, Result};
pub use finding::{Finding, FindingKind, Severity};
pub use folder::{FolderFound, Layout, SubsetsFound, find_subsets};
pub use loader::{LoadedBatch, Loader, LoaderConfig};
pub use mask::shrink_mask;
pub use picture::{DecodeOptions, Header, Picture, decode_file, read_header, resize};
pub use plan::{BatchPlan, ColorShift, EpochPlan, PlanItem, StepCount};
pub use report::{DatasetLines, DatasetReport, ReportConfig, RunLength};
pub use size::Size;
pub use streams::{Place, Purpose, Streams};
