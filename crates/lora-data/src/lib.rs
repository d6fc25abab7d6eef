//! Image and caption folders as Stable Diffusion trainers keep them.

mod bucket;
mod caption;
mod config;
mod dataset;
mod error;
mod finding;
mod folder;
mod plan;
mod size;
mod streams;

pub use bucket::{BucketFit, BucketTable, crop_ltrb, side_limits};
pub use caption::{CaptionConfig, CaptionDraws, CaptionTime, process_caption};
pub use config::{
    DataConfig, DatasetConfig, DecodeCheck, Interpolation, SubsetConfig, Transparency,
};
pub use dataset::{Dataset, ImageRecord, Pixels};
pub use error::{ConfigFault, Error, Result};
pub use finding::{Finding, FindingKind, Severity};
pub use folder::{FolderFound, find_subsets};
pub use plan::{BatchPlan, ColorShift, EpochPlan, PlanItem};
pub use size::Size;
pub use streams::{Place, Purpose, Streams};
