//! Captions: the files they come from and what is done to them at every draw.

pub(crate) mod file;
mod process;

pub use file::CaptionSource;
pub use process::{CaptionDraws, CaptionTime, process_caption};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How a caption is processed each time its image is drawn.
///
/// | name | default | meaning | range |
/// |---|---|---|---|
/// | `shuffle_caption` | false | shuffle the flexible tags | |
/// | `caption_separator` | `,` | splits a caption into tags | not empty |
/// | `keep_tokens` | 0 | tags at the front that stay where they are | |
/// | `keep_tokens_separator` | empty | marker between fixed and flexible tags | |
/// | `secondary_separator` | none | joins tags that move together | |
/// | `enable_wildcard` | false | choose lines and `{a\|b}` alternatives | |
/// | `caption_prefix`, `caption_suffix` | none | added to every caption | |
/// | `caption_dropout_rate` | 0 | part of draws with an empty caption | 0 to 1 |
/// | `caption_dropout_every_n_epochs` | 0 | epochs with empty captions only | |
/// | `caption_tag_dropout_rate` | 0 | part of flexible tags left out | 0 to 1 |
/// | `token_warmup_min` | 1 | flexible tags at step 0 | |
/// | `token_warmup_step` | 0 | step of the full caption, below 1 a part of the run | 0 or more |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CaptionConfig {
    /// Shuffle the flexible tags.
    pub shuffle_caption: bool,
    /// Text between two tags.
    pub caption_separator: String,
    /// Number of tags at the front that are neither moved nor dropped.
    pub keep_tokens: usize,
    /// Marker that separates fixed tags from flexible ones; empty for none.
    pub keep_tokens_separator: String,
    /// Text between tags that stay together; becomes `caption_separator` at the end.
    pub secondary_separator: Option<String>,
    /// Choose one line of several and one alternative of each `{a|b}`.
    pub enable_wildcard: bool,
    /// Put before every caption with a space.
    pub caption_prefix: Option<String>,
    /// Put after every caption with a space.
    pub caption_suffix: Option<String>,
    /// Probability of an empty caption.
    pub caption_dropout_rate: f64,
    /// Empty captions in every epoch divisible by this; 0 for never.
    pub caption_dropout_every_n_epochs: usize,
    /// Probability that a flexible tag is left out.
    pub caption_tag_dropout_rate: f64,
    /// Flexible tags at step 0 of the warm-up.
    pub token_warmup_min: usize,
    /// Step at which all tags are there; below 1 a part of the run's steps.
    pub token_warmup_step: f64,
}

impl Default for CaptionConfig {
    fn default() -> Self {
        Self {
            shuffle_caption: false,
            caption_separator: ",".into(),
            keep_tokens: 0,
            keep_tokens_separator: String::new(),
            secondary_separator: None,
            enable_wildcard: false,
            caption_prefix: None,
            caption_suffix: None,
            caption_dropout_rate: 0.0,
            caption_dropout_every_n_epochs: 0,
            caption_tag_dropout_rate: 0.0,
            token_warmup_min: 1,
            token_warmup_step: 0.0,
        }
    }
}

impl CaptionConfig {
    /// Checks every option.
    ///
    /// # Errors
    /// [`Error::Option`] for the first value that cannot be used.
    pub fn validate(&self) -> Result<()> {
        if self.caption_separator.is_empty() {
            return Err(Error::option(
                "caption_separator",
                "an empty text separates nothing, `,` is usual",
            ));
        }
        if self.secondary_separator.as_deref() == Some("") {
            return Err(Error::option(
                "secondary_separator",
                "an empty text separates nothing, leave it out",
            ));
        }
        let rates = [
            ("caption_dropout_rate", self.caption_dropout_rate),
            ("caption_tag_dropout_rate", self.caption_tag_dropout_rate),
        ];
        for (key, rate) in rates {
            if !(0.0..=1.0).contains(&rate) {
                return Err(Error::option(
                    key,
                    format!("{rate} is not a probability from 0 to 1"),
                ));
            }
        }
        if !(self.token_warmup_step.is_finite() && self.token_warmup_step >= 0.0) {
            let what = format!(
                "{} is neither a step nor a part of the run",
                self.token_warmup_step
            );
            return Err(Error::option("token_warmup_step", what));
        }
        Ok(())
    }

    /// The same without what leaves out or moves tags in training: dropout, shuffling, warm-up.
    /// For measuring a loss that is to be compared with others.
    pub fn complete(&self) -> Self {
        Self {
            shuffle_caption: false,
            caption_dropout_rate: 0.0,
            caption_dropout_every_n_epochs: 0,
            caption_tag_dropout_rate: 0.0,
            token_warmup_step: 0.0,
            ..self.clone()
        }
    }

    /// Whether every draw of a caption gives the same text, so that its encoding can be cached.
    pub fn is_static(&self) -> bool {
        !self.shuffle_caption
            && !self.enable_wildcard
            && self.caption_dropout_rate == 0.0
            && self.caption_dropout_every_n_epochs == 0
            && self.caption_tag_dropout_rate == 0.0
            && self.token_warmup_step == 0.0
    }
}
