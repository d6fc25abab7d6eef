//! What can stop a training run.

use std::path::PathBuf;

/// Errors of this crate.
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
    /// A setting that cannot be understood or is out of range.
    #[error("{place}: {what}")]
    Config {
        /// The file, or "command line".
        place: String,
        /// The option and what is wrong with it.
        what: String,
    },
    /// An option of sd-scripts that is not supported.
    #[error("{place}: option {name} is not supported: {advice}")]
    Refused {
        /// The option.
        name: String,
        /// The file, or "command line".
        place: String,
        /// What to do instead.
        advice: &'static str,
    },
    /// An option that has to be given.
    #[error("{name} is missing: {what}")]
    Missing {
        /// The option.
        name: &'static str,
        /// What it is for.
        what: &'static str,
    },
    /// Losses or gradients were not finite several times in a row.
    #[error(
        "the loss was not finite {times} times in a row, last at step {step} with {images}; the learning rate is probably too high"
    )]
    NotFinite {
        /// How many times.
        times: usize,
        /// The update that failed.
        step: usize,
        /// The pictures of the last batch.
        images: String,
    },
    /// Trained weights that must not be written: a file of them would draw black pictures.
    #[error("{} is not written: {parameter} {what}", path.display())]
    BadWeights {
        /// The file or folder.
        path: PathBuf,
        /// The parameter.
        parameter: String,
        /// What is wrong with it, and what helps.
        what: &'static str,
    },
    /// The device has not enough memory for a batch.
    #[error("not enough memory for {pictures} pictures of {size}{advice}: {source}")]
    OutOfMemory {
        /// Pictures in the batch.
        pictures: usize,
        /// Their size.
        size: lora_data::Size,
        /// Settings that would help, in brackets, or nothing.
        advice: String,
        /// What the device said.
        source: Box<Error>,
    },
    /// Another run is writing files of the same name into the same folder.
    #[error(
        "{}: another run{process} is writing {name} there; wait for it, or give this one another output_name or output_dir",
        path.display()
    )]
    Busy {
        /// The output folder.
        path: PathBuf,
        /// The output name.
        name: String,
        /// The process that holds it, in brackets, or nothing.
        process: String,
    },
    /// A state folder does not fit the run, or is damaged.
    #[error("cannot go on from {}: {what}", path.display())]
    Resume {
        /// The folder.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// Reading the dataset failed.
    #[error(transparent)]
    Data(#[from] lora_data::Error),
    /// Adapters or their files.
    #[error(transparent)]
    Adapter(#[from] lora_core::Error),
    /// The model.
    #[error(transparent)]
    Model(#[from] lora_sd15::Error),
    /// The optimizer or its schedule.
    #[error(transparent)]
    Optimizer(#[from] lora_optim::Error),
    /// A tensor operation.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn resume(path: &std::path::Path, what: impl ToString) -> Self {
        Error::Resume {
            path: path.to_path_buf(),
            what: what.to_string(),
        }
    }

    /// Wraps an I/O error with the file it concerns.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;
