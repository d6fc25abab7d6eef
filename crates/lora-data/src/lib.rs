//! Image and caption folders as Stable Diffusion trainers keep them.

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
    CacheConfig, CachedLatents, EncoderError, LatentCache, LatentEncoder, Latents, TextCache,
    TextEncoder, TextOutput,
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
