//! Adapter files.
//!
//! Inside the crate a layer is known by the name that kohya's files give it:
//! component prefix and diffusers path, dots replaced by underscores. Readers of
//! other formats translate to it.

mod file;
mod hash;
mod kohya;
mod names;
mod peft;
mod read;

pub use file::{TensorFile, write_atomically, write_tensors};
pub use hash::{data_hash_of_file, legacy_hash, model_hash, model_hash_of_file, sha256_of_file};
pub use kohya::SaveOptions;
pub(crate) use kohya::save;
pub use names::layer_from_ldm;
pub(crate) use read::{BUNDLE, load};
