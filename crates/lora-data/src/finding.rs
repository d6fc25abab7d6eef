//! What was noticed about a dataset. The library never prints: findings are data.

use std::fmt;
use std::path::PathBuf;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Worth knowing, nothing to do.
    Note,
    /// Probably not what was meant.
    Warning,
    /// Training will go wrong.
    Problem,
}

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FindingKind {
    /// A folder was passed over.
    FolderPassedOver,
    /// Files that belong to no folder named `N_name`.
    FilesOutside,
    /// The same folder was given twice.
    DuplicateFolder,
    /// An image that cannot be decoded was left out.
    Undecodable,
    /// An empty caption file.
    EmptyCaption,
    /// Images without a caption file.
    MissingCaptions,
    /// Captions were read from files with the second-choice extension.
    CaptionExtension,
    /// Regularization images that are never used.
    UnusedRegularization,
    /// An image smaller than a bucket step was enlarged in spite of `bucket_no_upscale`.
    TooSmall,
    /// An image of another size than the resolution while buckets are off.
    SizeWithoutBuckets,
    /// sd-scripts' own cache files, which are not read.
    ForeignCache,
    /// An option that is accepted and has no effect.
    OptionWithoutEffect,
    /// Transparent images while `alpha_mask` is off, or masks that are asked for and absent.
    Masks,
    /// An entry of a metadata file without an image, or the other way round.
    Metadata,
    // From the doctor.
    /// Many images have the same caption file text.
    IdenticalCaptions,
    /// The trigger word is not first or not everywhere.
    Trigger,
    /// The trigger word is spelt in several ways.
    TriggerSpelling,
    /// Tags of one kind mix underscores and spaces.
    TagSpelling,
    /// Nearly every caption has the same background tag.
    CommonBackground,
    /// A caption is longer than the text encoder reads at once.
    LongCaption,
    /// Pictures that look the same.
    NearDuplicates,
    /// Pictures that are enlarged a lot.
    Enlarged,
    /// Pictures that lose a lot at the edges.
    Cropped,
    /// Few pictures.
    FewImages,
    /// Repeats that do not look intended.
    Repeats,
    /// Regularization images and training images do not fit together.
    Regularization,
}

/// One thing noticed: what, where, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What kind of thing.
    pub kind: FindingKind,
    /// How much it matters.
    pub severity: Severity,
    /// File or folder it is about, if one.
    pub path: Option<PathBuf>,
    /// What was found.
    pub what: String,
    /// What it does to the training and what to do; empty when there is nothing to do.
    pub advice: String,
}

impl Finding {
    pub(crate) fn note(kind: FindingKind, what: impl Into<String>) -> Self {
        Self {
            kind,
            severity: Severity::Note,
            path: None,
            what: what.into(),
            advice: String::new(),
        }
    }

    pub(crate) fn warning(
        kind: FindingKind,
        what: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            severity: Severity::Warning,
            advice: advice.into(),
            ..Self::note(kind, what)
        }
    }

    pub(crate) fn at(self, path: impl Into<PathBuf>) -> Self {
        Self {
            path: Some(path.into()),
            ..self
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "{}: ", path.display())?;
        }
        f.write_str(&self.what)?;
        if !self.advice.is_empty() {
            write!(f, "; {}", self.advice)?;
        }
        Ok(())
    }
}
