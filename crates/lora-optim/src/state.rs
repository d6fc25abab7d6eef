//! Saving an optimizer and going on from it, bit for bit.
//!
//! One safetensors file holds everything: tensors by name, and the options as JSON in
//! the header's metadata under `optimizer`.
//!
//! | tensor | dtype | meaning |
//! |---|---|---|
//! | `weight.PARAM` | f32 | the trained weights (the master copy of half-precision ones) |
//! | `state.PARAM.KIND` | f32, bf16 or u8 | state of one kind, with the name the reference uses (`exp_avg`, `exp_avg_sq`, `s`, `p0`, ...) |
//! | `step.PARAM` | i64 | steps this parameter has taken |
//! | `scalar.NAME` | f64 | one value per group, or one |

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::error::{Error, Result};

/// Format number written into every state.
pub(crate) const FORMAT: u64 = 1;

/// Everything an optimizer needs to go on.
#[derive(Debug, Clone)]
pub struct OptimizerState {
    /// Algorithm, configuration, groups and parameter shapes.
    pub options: Value,
    /// All tensors by name; see the module documentation.
    pub tensors: BTreeMap<String, Tensor>,
}

/// What to do when the saved options differ from the present ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnChange {
    /// Refuse, and list every difference.
    #[default]
    Refuse,
    /// Go on with the present options, and return the differences.
    UseNew,
}

/// One option that differs between a saved state and the present optimizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedOption {
    /// Path of the option: `config.betas`, `groups[0].lr`.
    pub option: String,
    /// Value in the saved state.
    pub saved: String,
    /// Value now.
    pub now: String,
}

impl fmt::Display for ChangedOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was {}, now {}", self.option, self.saved, self.now)
    }
}

impl OptimizerState {
    /// Writes the state to one file. The file appears complete or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Safetensors`] with the path.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let io = |source| Error::Io {
            path: path.to_path_buf(),
            source,
        };
        let metadata = [(
            "optimizer".to_string(),
            serde_json::to_string(&self.options)?,
        )]
        .into();
        let bytes =
            safetensors::serialize(self.tensors.iter(), Some(metadata)).map_err(|source| {
                Error::Safetensors {
                    path: path.to_path_buf(),
                    source,
                }
            })?;
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let mut file = std::fs::File::create(&partial).map_err(io)?;
        std::io::Write::write_all(&mut file, &bytes).map_err(io)?;
        file.sync_all().map_err(io)?;
        std::fs::rename(&partial, path).map_err(io)
    }

    /// Reads a state written by [`OptimizerState::save`].
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Safetensors`], [`Error::State`] with the path.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|source| Error::Io {
            path: path.to_path_buf(),
            source,
        })?;
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|source| {
            Error::Safetensors {
                path: path.to_path_buf(),
                source,
            }
        })?;
        let text = header.metadata().as_ref().and_then(|m| m.get("optimizer"));
        let text = text.ok_or_else(|| {
            Error::state(format!(
                "{} has no optimizer options in its header",
                path.display()
            ))
        })?;
        let options = serde_json::from_str(text)?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?
            .into_iter()
            .collect();
        Ok(Self { options, tensors })
    }

    /// A tensor by name.
    pub(crate) fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::Missing {
            what: "tensor",
            name: name.to_string(),
        })
    }
}

/// Lists the leaves in which two JSON values differ.
pub(crate) fn differences(path: &str, saved: &Value, now: &Value, out: &mut Vec<ChangedOption>) {
    match (saved, now) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let at = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                differences(
                    &at,
                    a.get(key).unwrap_or(&Value::Null),
                    b.get(key).unwrap_or(&Value::Null),
                    out,
                );
            }
        }
        (Value::Array(a), Value::Array(b))
            if a.len() == b.len() && a.iter().any(Value::is_object) =>
        {
            for (i, (x, y)) in a.iter().zip(b).enumerate() {
                differences(&format!("{path}[{i}]"), x, y, out);
            }
        }
        _ if saved != now => {
            out.push(ChangedOption {
                option: path.to_string(),
                saved: saved.to_string(),
                now: now.to_string(),
            });
        }
        _ => {}
    }
}
