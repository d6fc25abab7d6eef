//! Adapter files.
//!
//! Inside the crate a layer is known by the name that kohya's files give it:
//! component prefix and diffusers path, dots replaced by underscores. Readers of
//! other formats translate to it.

mod file;
mod hash;
mod modules;
mod names;
mod peft;
mod read;
mod report;
mod save;
mod write;

pub use file::{TensorFile, write_atomically, write_tensors};
pub(crate) use file::{refuse_not_finite, replace_file};
pub use hash::{data_hash_of_file, legacy_hash, model_hash, model_hash_of_file, sha256_of_file};
pub use modules::{layer_from_ldm, layer_path, layer_to_ldm};
pub(crate) use read::{BUNDLE, load, outline};
pub use read::{LoadOptions, Strictness};
pub use report::{BaseModel, FileReport, Finding, FindingKind, Format, LayerReport};
pub use save::SaveOptions;
pub(crate) use save::save;
pub use write::SaveLayout;
