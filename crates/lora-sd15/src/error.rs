//! What can go wrong with checkpoints, prompts and generation.

use std::path::PathBuf;

use crate::Part;

/// Errors of this crate. Each names the file, key and shapes concerned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what was asked for; `what` says what it is and what to do.
    #[error("{}: {what}", path.display())]
    NotSd15 {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        what: String,
    },
    /// A checkpoint without the UNet, VAE or text encoder.
    #[error("{}: has no {part}; {advice}", path.display())]
    MissingPart {
        /// The file.
        path: PathBuf,
        /// The part.
        part: Part,
        /// Where to get it from.
        advice: &'static str,
    },
    /// A part lacks tensors.
    #[error("{}: {part} lacks {} tensors, for example {}", path.display(), keys.len(), keys.first().map_or("", String::as_str))]
    MissingKeys {
        /// The file.
        path: PathBuf,
        /// The part.
        part: Part,
        /// Their names in the diffusers layout, sorted.
        keys: Vec<String>,
    },
    /// A part has tensors that the model has no place for.
    #[error("{}: {part} has {} tensors that Stable Diffusion 1.5 has no place for, for example {}; it is a different model", path.display(), keys.len(), keys.first().map_or("", String::as_str))]
    ExtraKeys {
        /// The file.
        path: PathBuf,
        /// The part.
        part: Part,
        /// Their names in the file, sorted.
        keys: Vec<String>,
    },
    /// A tensor of another shape than the model's.
    #[error("{}: {key} has shape {got:?}, expected {expected:?}", path.display())]
    WrongShape {
        /// The file.
        path: PathBuf,
        /// Its name in the file.
        key: String,
        /// The model's shape.
        expected: Vec<usize>,
        /// The file's shape.
        got: Vec<usize>,
    },
    /// A configuration that cannot describe a model.
    #[error("{place}: {what}")]
    BadConfig {
        /// The file or field.
        place: String,
        /// What is wrong.
        what: String,
    },
    /// Picture sizes that do not suit the model.
    #[error("{width}x{height}: width and height must be multiples of 8 and at least 64")]
    BadSize {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
    },
    /// A name that is not in a list of known ones.
    #[error("unknown {what} {name:?}; known are {known}")]
    UnknownName {
        /// Sampler, schedule ...
        what: &'static str,
        /// What was asked for.
        name: String,
        /// The list.
        known: String,
    },
    /// A prompt with syntax that is not supported.
    #[error("prompt {prompt:?}: {what}")]
    Prompt {
        /// The prompt.
        prompt: String,
        /// The syntax, and what to do.
        what: String,
    },
    /// A list of styles that cannot be read.
    #[error("styles: {what}")]
    Styles {
        /// What is wrong.
        what: String,
    },
    /// An embedding that cannot be used.
    #[error("embedding {name:?}: {what}")]
    Embedding {
        /// Its name.
        name: String,
        /// What is wrong, and what to do.
        what: String,
    },
    /// An upscaling network that cannot be used.
    #[error("upscaler {}: {what}", path.display())]
    Upscaler {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        what: String,
    },
    /// A picture that cannot be used.
    #[error("{what}")]
    Picture {
        /// Which one, what is wrong, and what to do.
        what: String,
    },
    /// A number out of range.
    #[error("{name} is {value}; {expected}")]
    BadValue {
        /// The option.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// The model produced NaN or infinity.
    #[error("{what} contains NaN or infinity: {advice}")]
    NotFinite {
        /// Which tensor.
        what: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// Reading an adapter or checkpoint file failed.
    #[error(transparent)]
    Adapter(#[from] lora_core::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// Wraps an I/O error with the file it concerns.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }
}

/// The result of this crate's functions that touch files, names or options.
pub type Result<T> = std::result::Result<T, Error>;
