//! What can go wrong with adapters and their files.

use std::path::PathBuf;

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
    /// A file is not a well-formed safetensors file.
    #[error("{}: not a readable safetensors file: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is a pickle (`.ckpt`, `.pt`), which can run code when opened.
    #[error("{}: pickle files are not supported because opening one can run code; convert it to .safetensors", path.display())]
    Pickle {
        /// The file.
        path: PathBuf,
    },
    /// A safetensors file without a single adapter key.
    #[error("{}: no adapter in this file ({found}); expected keys such as lora_unet_..._attn1_to_q.lora_down.weight", path.display())]
    NoAdapter {
        /// The file.
        path: PathBuf,
        /// What the keys look like instead.
        found: String,
    },
    /// Keys of a format or family that is recognised but not readable yet.
    #[error("{}: {what} is not supported (first key: {key}); {advice}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The format or family.
        what: String,
        /// A key that shows it.
        key: String,
        /// What to do.
        advice: &'static str,
    },
    /// Keys that belong to no known part of an adapter.
    #[error("{}: layer {layer} has parts that are not understood: {}", path.display(), keys.join(", "))]
    UnknownKeys {
        /// The file.
        path: PathBuf,
        /// The layer's name in the file.
        layer: String,
        /// The parts.
        keys: Vec<String>,
    },
    /// A part of a layer's adapter is missing.
    #[error("{}: layer {layer} lacks {missing}", path.display())]
    MissingPart {
        /// The file.
        path: PathBuf,
        /// The layer's name in the file.
        layer: String,
        /// The key that is missing.
        missing: &'static str,
    },
    /// Parts of one adapter disagree, or do not fit the layer.
    #[error("{layer}: {tensor} has shape {got:?}, expected {expected}")]
    ShapeMismatch {
        /// The layer's name.
        layer: String,
        /// The tensor.
        tensor: String,
        /// What would fit, in words.
        expected: String,
        /// What was found.
        got: Vec<usize>,
    },
    /// A number that makes no sense where it stands.
    #[error("{layer}: {name} is {value}; {expected}")]
    BadValue {
        /// The layer's name, or the option's place.
        layer: String,
        /// The value's name.
        name: &'static str,
        /// The value.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// A selection of layers matched none of the model's.
    #[error(
        "no layer of the model is selected by {targets}; the model has {layers} layers, for example {example}"
    )]
    NothingSelected {
        /// The selection.
        targets: String,
        /// How many layers the model has.
        layers: usize,
        /// One of them.
        example: String,
    },
    /// None of an adapter's layers exists in the model: it was made for another one.
    #[error(
        "none of the adapter's {adapter_layers} layers ({example}, ...) exists in the model's {component}: the adapter was made for another architecture"
    )]
    NothingMatched {
        /// Layers in the adapter for this component.
        adapter_layers: usize,
        /// One of them.
        example: String,
        /// The part of the model.
        component: String,
    },
    /// Some of an adapter's layers do not exist in the model.
    #[error("{} of the adapter's layers do not exist in the model: {}", layers.len(), layers.join(", "))]
    UnmatchedLayers {
        /// Their names.
        layers: Vec<String>,
    },
    /// A tensor holds values that are not numbers or infinite.
    #[error("{}: {key} holds {count} values that are NaN or infinite", path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// How many of its values are not finite.
        count: usize,
    },
    /// A tensor that was about to be written holds values that are not numbers or infinite,
    /// because they are, or because the file's dtype ends before them.
    #[error(
        "{}: not written: {key} would hold {count} values that are NaN or infinite in {dtype} (f32 and bf16 reach further than f16)",
        path.display()
    )]
    WouldNotBeFinite {
        /// The file that was to be written.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// How many of its values are not finite.
        count: usize,
        /// The dtype of the file.
        dtype: String,
    },
    /// A layer's adapter cannot be written in the wanted layout.
    #[error("{layer}: {what} cannot be written in {layout} layout; {advice}")]
    NotWritable {
        /// The layer's name, or what stands for it.
        layer: String,
        /// What it is.
        what: String,
        /// The layout.
        layout: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// Another error, with the file that it concerns.
    #[error("{}: {source}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// Something that cannot be done with this layer's adapter.
    #[error("{layer}: {what} is not possible; {advice}")]
    NotPossible {
        /// The layer's name.
        layer: String,
        /// What was wanted.
        what: String,
        /// What to do instead.
        advice: &'static str,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// Says which file an error concerns, where it does not say so itself.
    pub fn in_file(self, file: &std::path::Path) -> Error {
        match self {
            Error::UnknownKeys { layer, keys, .. } => Error::UnknownKeys {
                path: file.to_path_buf(),
                layer,
                keys,
            },
            Error::MissingPart { layer, missing, .. } => Error::MissingPart {
                path: file.to_path_buf(),
                layer,
                missing,
            },
            Error::ShapeMismatch { .. } | Error::BadValue { .. } | Error::Candle(_) => {
                Error::InFile {
                    path: file.to_path_buf(),
                    source: Box::new(self),
                }
            }
            other => other,
        }
    }

    /// Wraps an I/O error with the file it concerns.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }
}

/// The result of this crate's functions that touch files, names or options.
/// Pure tensor functions return [`candle_core::Result`].
pub type Result<T> = std::result::Result<T, Error>;
