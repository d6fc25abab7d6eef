//! What can go wrong, with the place and the allowed form.

use std::path::PathBuf;

/// Everything this crate reports.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // The caller's options.
    /// An option has a value that the optimizer or schedule cannot run with.
    #[error("{option} = {value}: expected {expected}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// The value found, as text.
        value: String,
        /// The allowed form.
        expected: &'static str,
    },
    /// Options or groups that are fine alone and refused together.
    #[error("{what} cannot be combined: {instead}")]
    Combination {
        /// The combination.
        what: String,
        /// What to do instead.
        instead: &'static str,
    },
    /// A name that no table knows.
    #[error("unknown {kind} {name:?}{}; known: {}", suggestion(.nearest), .known.join(", "))]
    Unknown {
        /// What was looked up: "optimizer", "scheduler", "option of Prodigy", ...
        kind: String,
        /// The name that was asked for.
        name: String,
        /// The nearest known name, if one is near.
        nearest: Option<String>,
        /// All known names.
        known: Vec<String>,
    },
    /// A known name of the field that this crate deliberately does not implement.
    #[error("{name} is not implemented here: {instead}")]
    NotImplemented {
        /// The name.
        name: String,
        /// What to use instead.
        instead: &'static str,
    },
    /// A `key=value` argument that cannot be read.
    #[error("argument {argument:?}: {problem}")]
    Argument {
        /// The argument as written.
        argument: String,
        /// What is wrong with it and how to write it.
        problem: String,
    },

    // Parameters and gradients.
    /// No trainable parameter was given.
    #[error("no parameters: every group is empty")]
    NoParameters,
    /// Two parameters have one name, or one variable is listed twice.
    #[error("parameter {name:?} is listed twice")]
    DuplicateParameter {
        /// The second name.
        name: String,
    },
    /// A parameter's type is not a floating type we can train.
    #[error("parameter {name:?} has dtype {dtype}: expected f32, bf16 or f16")]
    ParameterDtype {
        /// The parameter.
        name: String,
        /// Its dtype.
        dtype: &'static str,
    },
    /// A tensor does not have the parameter's shape.
    #[error("{what} of {name:?} has shape {got:?}: expected {expected:?}")]
    Shape {
        /// "gradient", "weight", "exp_avg", ...
        what: String,
        /// The parameter.
        name: String,
        /// Shape expected.
        expected: Vec<usize>,
        /// Shape found.
        got: Vec<usize>,
    },
    /// A name or index of a group or parameter that does not exist.
    #[error("no {what} {name}")]
    Missing {
        /// "group", "parameter", "tensor".
        what: &'static str,
        /// The name asked for.
        name: String,
    },
    /// Too many steps in a row had a gradient that is not finite.
    #[error(
        "{count} steps in a row had non-finite gradients (first in {name:?}): lower the learning rate or the loss scale"
    )]
    NonFinite {
        /// Steps skipped in a row.
        count: u64,
        /// A parameter whose gradient was not finite.
        name: String,
    },
    /// `step` was called while the averaged weights are in place.
    #[error("{algorithm}: step in evaluation mode; call set_training(true) first")]
    NotTraining {
        /// The optimizer.
        algorithm: &'static str,
    },

    // Saved state.
    /// The state was written with other options.
    #[error("the saved state was written with other options: {}", .changes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    OptionsChanged {
        /// Every difference.
        changes: Vec<crate::ChangedOption>,
    },
    /// The state's structure is not what this optimizer wrote.
    #[error("saved optimizer state: {problem}")]
    State {
        /// What is wrong.
        problem: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file is not a safetensors file.
    #[error("{}: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: safetensors::SafeTensorError,
    },
    /// Options could not be read from or written to JSON.
    #[error("options as JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An option out of its range.
    pub(crate) fn option(
        option: &'static str,
        value: impl std::fmt::Debug,
        expected: &'static str,
    ) -> Self {
        Self::Option {
            option,
            value: format!("{value:?}"),
            expected,
        }
    }

    /// A name missing from `known`, with the nearest of them.
    pub(crate) fn unknown(kind: impl Into<String>, name: &str, known: &[&str]) -> Self {
        let near = known
            .iter()
            .map(|k| (edit_distance(&name.to_lowercase(), &k.to_lowercase()), k))
            .min()
            .filter(|(distance, k)| *distance <= 1 + k.len() / 3)
            .map(|(_, k)| (*k).to_string());
        let known = known.iter().map(|k| (*k).to_string()).collect();
        Self::Unknown {
            kind: kind.into(),
            name: name.to_string(),
            nearest: near,
            known,
        }
    }

    pub(crate) fn state(problem: impl Into<String>) -> Self {
        Self::State {
            problem: problem.into(),
        }
    }
}

fn suggestion(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map(|n| format!(" (did you mean {n:?}?)"))
        .unwrap_or_default()
}

/// Levenshtein distance of two short names.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let next = (diagonal + usize::from(x != *y))
                .min(row[j] + 1)
                .min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()]
}

/// `Ok` when `good`, else an [`Error::Option`].
pub(crate) fn check(
    good: bool,
    option: &'static str,
    value: impl std::fmt::Debug,
    expected: &'static str,
) -> Result<()> {
    if good {
        Ok(())
    } else {
        Err(Error::option(option, value, expected))
    }
}

/// Betas must lie in [0, 1).
pub(crate) fn check_beta(option: &'static str, beta: f64) -> Result<()> {
    check(
        (0.0..1.0).contains(&beta),
        option,
        beta,
        "a number from 0 up to, not including, 1",
    )
}

/// Finite and not negative.
pub(crate) fn check_not_negative(option: &'static str, value: f64) -> Result<()> {
    check(
        value.is_finite() && value >= 0.0,
        option,
        value,
        "a finite number, 0 or more",
    )
}

/// Finite and more than zero.
pub(crate) fn check_positive(option: &'static str, value: f64) -> Result<()> {
    check(
        value.is_finite() && value > 0.0,
        option,
        value,
        "a finite number above 0",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_suggests_the_nearest() {
        let text = Error::unknown("optimizer", "prodgy", &["AdamW", "Prodigy"]).to_string();
        assert_eq!(
            text,
            "unknown optimizer \"prodgy\" (did you mean \"Prodigy\"?); known: AdamW, Prodigy"
        );
        let text = Error::unknown("optimizer", "zzzzzz", &["AdamW", "Prodigy"]).to_string();
        assert!(!text.contains("did you mean"));
    }
}
