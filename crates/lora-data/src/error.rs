//! The crate's error type. Every variant locates the fault and says what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::{FolderFound, Size};

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong between a folder on disk and a batch of pixels.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // The environment.
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A picture that was there when the dataset was listed is gone or has another size now.
    #[error("{}: {what}; do not change the dataset while it is in use, or list it again", path.display())]
    Changed {
        /// The picture.
        path: PathBuf,
        /// What is different.
        what: String,
    },

    // The data.
    /// No usable picture in the folders given.
    #[error("no training images found in {}\n{}", path.display(), folder_lines(looked_at))]
    NothingFound {
        /// The folder given.
        path: PathBuf,
        /// Each folder that was looked at and why it gave nothing.
        looked_at: Vec<FolderFound>,
    },
    /// Pictures were found but none of them can be decoded.
    #[error("none of the {} images can be decoded; the first: {first}", count)]
    NothingDecodes {
        /// Number of pictures found.
        count: usize,
        /// The first picture and what is wrong with it.
        first: String,
    },
    /// One picture cannot be decoded.
    #[error("{}: not a readable image: {reason}", path.display())]
    Decode {
        /// The picture.
        path: PathBuf,
        /// What the decoder said.
        reason: String,
    },
    /// A caption or metadata file is not UTF-8.
    #[error("{}: not UTF-8 (first bad byte at offset {offset}); save the file as UTF-8", path.display())]
    NotUtf8 {
        /// The text file.
        path: PathBuf,
        /// Offset of the first byte that is not UTF-8.
        offset: usize,
    },
    /// A metadata file (`in_json`) is malformed.
    #[error("{}{}: {what}", path.display(), line_suffix(*line))]
    Metadata {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1, where known.
        line: Option<usize>,
        /// What is wrong.
        what: String,
    },
    /// A mask is missing, superfluous or of another size than its picture.
    #[error("{}: {what}", path.display())]
    Mask {
        /// The mask file or folder, or the picture without a mask.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// A picture is so narrow that no bucket of at least one step fits it.
    #[error("an image of {image} fits no bucket in steps of {step} pixels without upscaling")]
    TooNarrow {
        /// Size of the picture.
        image: Size,
        /// The bucket step.
        step: u32,
    },

    // Options.
    /// An option has a value that cannot be used.
    #[error("{key}: {what}")]
    Option {
        /// Name of the option.
        key: &'static str,
        /// The value found, what is allowed, what to do.
        what: String,
    },
    /// A dataset config file has one or more faults.
    #[error("{}", config_lines(path, faults))]
    Config {
        /// The file.
        path: PathBuf,
        /// Every fault found, in file order.
        faults: Vec<ConfigFault>,
    },

    // Callers.
    /// An image, batch or item number beyond the dataset.
    #[error("no {what} number {index}, there are {count}")]
    OutOfRange {
        /// Kind of thing.
        what: &'static str,
        /// The number asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// The encoder behind a cache failed.
    #[error("encoding {what} for the cache: {source}")]
    Encoder {
        /// The picture or caption.
        what: String,
        /// The encoder's own error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A loader thread died.
    #[error("a loader thread stopped unexpectedly while loading {what}")]
    LoaderStopped {
        /// What was being loaded.
        what: String,
    },
}

/// One fault in a dataset config file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFault {
    /// Line, counted from 1, where known.
    pub line: Option<usize>,
    /// Path of the key, for example `datasets[0].subsets[1].num_repeats`.
    pub key: String,
    /// What is wrong and what to do.
    pub what: String,
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }

    pub(crate) fn decode(path: &Path, reason: impl ToString) -> Self {
        Self::Decode {
            path: path.to_path_buf(),
            reason: reason.to_string(),
        }
    }

    pub(crate) fn option(key: &'static str, what: impl Into<String>) -> Self {
        Self::Option {
            key,
            what: what.into(),
        }
    }
}

fn line_suffix(line: Option<usize>) -> String {
    line.map_or_else(String::new, |line| format!(", line {line}"))
}

fn folder_lines(folders: &[FolderFound]) -> String {
    let mut text = String::from("looked at:");
    for folder in folders {
        text.push_str(&format!("\n  {folder}"));
    }
    text.push_str(
        "\ngive a folder of images, one folder named like `10_name`, or the parent of such folders",
    );
    text
}

fn config_lines(path: &Path, faults: &[ConfigFault]) -> String {
    let mut lines = Vec::with_capacity(faults.len());
    for fault in faults {
        let place = line_suffix(fault.line);
        lines.push(format!(
            "{}{place}: {}: {}",
            path.display(),
            fault.key,
            fault.what
        ));
    }
    lines.join("\n")
}
