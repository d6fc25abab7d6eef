//! Exact arithmetic on adapters and checkpoints: merging into a file, composing,
//! extracting, resizing, converting, comparing.
//!
//! Everything is computed in f32 or better and rounded once. Results do not depend on
//! the number of threads.

mod chunk;
mod clients;
mod compare;
mod compose;
mod delta;
mod extract;
mod fit;
mod for_client;
mod live;
mod merge_file;
mod merge_folder;
mod rank;
mod strength;
mod svd;
mod weights;

pub use clients::{Client, ClientReport, Finding, Outcome, review_clients};
pub use compare::{LayerDifference, difference};
pub use compose::{ResizeOptions, compose, compose_as_sd_scripts, convert, resize};
pub use delta::LayerReport;
pub use extract::{Clamp, ExtractFamily, ExtractOptions, extract, extract_layer, largest_entries};
pub use fit::nearest_kronecker;
pub use for_client::{ClientChange, convert_for};
pub use live::LiveMerge;
pub use merge_file::{MergeOptions, MergeReport, merge_into_file};
pub use rank::RankRule;
pub use strength::{Strength, block_of};
pub use svd::Svd;
pub use weights::Weights;
