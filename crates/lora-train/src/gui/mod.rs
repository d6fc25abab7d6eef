//! Configs of the two usual GUIs: kohya_ss (JSON) and LoRA_Easy_Training_Scripts (TOML).
//!
//! [`read_config`] tells them from sd-scripts' own TOML by their keys and translates them.
//! Nothing is dropped silently: the [`Import`] lists what was taken over, what was
//! changed and why, and what has no counterpart.

mod easy;
mod kohya;
mod write;

use std::path::Path;

use lora_data::{ConfigFile, ConfigSyntax, DataConfig, Dataset, DatasetConfig, SubsetConfig};
use serde_json::Value;

use crate::options::Settings;
use crate::{Error, Result};

pub use write::to_kohya_json;

/// A config that was read, and what became of its keys.
#[derive(Debug, Clone, Default)]
pub struct Import {
    /// The form that was recognised.
    pub form: Form,
    /// The settings.
    pub settings: Settings,
    /// Keys that were changed, with the reason.
    pub changed: Vec<String>,
    /// Keys that have no counterpart and were left out, with the reason.
    pub left_out: Vec<String>,
}

/// The form of a config file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// sd-scripts' `--config_file`, and this trainer's own.
    #[default]
    SdScripts,
    /// Saved by kohya_ss.
    KohyaSs,
    /// Saved by LoRA_Easy_Training_Scripts.
    LoraEasy,
}

impl std::fmt::Display for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Form::SdScripts => "sd-scripts TOML",
            Form::KohyaSs => "kohya_ss JSON",
            Form::LoraEasy => "LoRA_Easy_Training_Scripts TOML",
        })
    }
}

impl std::fmt::Display for Import {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}: {} settings taken over",
            self.form,
            self.settings.iter().count()
        )?;
        for line in &self.changed {
            write!(f, "\nchanged: {line}")?;
        }
        for line in &self.left_out {
            write!(f, "\nleft out: {line}")?;
        }
        Ok(())
    }
}

/// Reads a config file of any of the three forms. `.toml` is appended to a name without
/// extension, as sd-scripts does.
///
/// # Errors
/// [`Error::Io`]; [`Error::Config`] for a file that cannot be parsed, an unknown key, a
/// value of the wrong type.
pub fn read_config(path: &Path) -> Result<Import> {
    let path = match path.extension() {
        Some(_) => path.to_path_buf(),
        None => path.with_extension("toml"),
    };
    let is_json = path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("json"));
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let text = text.trim_start_matches('\u{feff}');
    let place = path.display().to_string();
    let fault = |what: String| Error::Config {
        place: place.clone(),
        what,
    };
    let value: Value = if is_json {
        serde_json::from_str(text).map_err(|e| fault(e.to_string()))?
    } else {
        toml::from_str(text).map_err(|e| fault(e.to_string().trim().to_string()))?
    };
    let Value::Object(map) = value else {
        return Err(fault("expected an object of settings".into()));
    };
    if map.contains_key("LoRA_type") || map.contains_key("max_resolution") {
        return kohya::import(&map, &place);
    }
    let panels = [
        "general_args",
        "optimizer_args",
        "network_args",
        "saving_args",
    ];
    let panel = |name: &&str| map.get(*name).and_then(|v| v.get("args")).is_some();
    if panels.iter().any(panel) {
        return easy::import(&map, &place);
    }
    if is_json {
        return Err(fault(
            "it is no kohya_ss config: neither LoRA_type nor max_resolution is in it".into(),
        ));
    }
    Ok(Import {
        settings: Settings::from_toml(&path)?,
        ..Import::default()
    })
}

/// Pictures times repeats of the folders named, as the GUIs count them.
fn count_images(train: &str, batch_size: usize) -> Result<usize> {
    let options = DatasetConfig {
        batch_size,
        subset: SubsetConfig::default(),
        ..DatasetConfig::default()
    };
    let none: Option<&Path> = None;
    let dataset = Dataset::from_folders(Path::new(train), none, &options, &DataConfig::default())?;
    Ok(dataset.num_train_images())
}

/// Batches of one epoch of a dataset config.
fn count_batches(dataset: &str) -> Result<usize> {
    let file = ConfigFile::parse(
        dataset,
        ConfigSyntax::Toml,
        Path::new("dataset part of the config"),
        &DatasetConfig::default(),
        &DataConfig::default(),
    )?;
    Ok(Dataset::load(file.config)?.batches_per_epoch())
}

/// JSON as the TOML value that settings hold.
fn to_toml(value: &Value) -> Option<toml::Value> {
    Some(match value {
        Value::Bool(b) => toml::Value::Boolean(*b),
        Value::Number(n) => match n.as_i64() {
            Some(i) => toml::Value::Integer(i),
            None => toml::Value::Float(n.as_f64()?),
        },
        Value::String(s) => toml::Value::String(s.clone()),
        Value::Array(items) => {
            toml::Value::Array(items.iter().map(to_toml).collect::<Option<Vec<_>>>()?)
        }
        Value::Null | Value::Object(_) => return None,
    })
}

/// A value as Python prints it in `key=value` arguments.
fn python_text(value: &Value) -> String {
    match value {
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::String(s) => s.clone(),
        Value::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(i), _) => i.to_string(),
            (None, Some(f)) => crate::metadata::py_float(f),
            _ => n.to_string(),
        },
        Value::Array(items) => items.iter().map(python_text).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}
