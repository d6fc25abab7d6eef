//! The dataset config file of sd-scripts (`--dataset_config`), validated strictly.
//!
//! Levels are `[general]`, `[[datasets]]` and `[[datasets.subsets]]`. A subset's option
//! is looked up in the subset, its dataset, `[general]`, and then in the options given
//! beside the file. Folder names have no meaning here. Every fault is reported at once,
//! with its line and the nearest known name.

mod node;
mod resolve;
mod schema;

use std::path::Path;

use crate::caption::file::read_text;
use crate::{DataConfig, Dataset, DatasetConfig, Error, Finding, Result, dataset};
use schema::Checker;

/// Syntax of a dataset config.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigSyntax {
    /// TOML.
    Toml,
    /// JSON.
    Json,
}

/// What a dataset config file says.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigFile {
    /// The datasets with every level resolved, and the run-wide options given.
    pub config: DataConfig,
    /// Options that are accepted and have no effect.
    pub findings: Vec<Finding>,
}

impl ConfigFile {
    /// Reads a `.toml` or `.json` file.
    ///
    /// `fallback` holds the options given beside the file, on a command line for example;
    /// its `subset` those of subsets. Start from [`DatasetConfig::sd_scripts`] to get what
    /// sd-scripts would. `run` gives the run-wide options; its datasets are replaced.
    ///
    /// # Errors
    /// [`Error::Config`] with every fault of the file, [`Error::Io`], [`Error::NotUtf8`].
    pub fn read(path: &Path, fallback: &DatasetConfig, run: &DataConfig) -> Result<Self> {
        let text = read_text(path)?;
        let is_json = path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("json"));
        let syntax = if is_json {
            ConfigSyntax::Json
        } else {
            ConfigSyntax::Toml
        };
        Self::parse(&text, syntax, path, fallback, run)
    }

    /// Reads a config from text; `origin` is named in errors.
    ///
    /// ```
    /// use lora_data::{ConfigFile, ConfigSyntax, DataConfig, DatasetConfig};
    ///
    /// let text = "
    /// [general]
    /// shufle_caption = true
    /// ";
    /// let fallback = DatasetConfig::sd_scripts();
    /// let error = ConfigFile::parse(text, ConfigSyntax::Toml, "d.toml".as_ref(), &fallback, &DataConfig::default())
    ///     .unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "d.toml, line 3: general.shufle_caption: unknown option, did you mean `shuffle_caption`?"
    /// );
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] with every fault.
    pub fn parse(
        text: &str,
        syntax: ConfigSyntax,
        origin: &Path,
        fallback: &DatasetConfig,
        run: &DataConfig,
    ) -> Result<Self> {
        let faulty = |mut faults: Vec<crate::ConfigFault>| {
            faults.sort_by_key(|fault| fault.line);
            Error::Config {
                path: origin.to_path_buf(),
                faults,
            }
        };
        let root = match syntax {
            ConfigSyntax::Toml => node::from_toml(text),
            ConfigSyntax::Json => node::from_json(text),
        };
        let root = root.map_err(|fault| faulty(vec![fault]))?;
        let mut checker = Checker::new(run.masked_loss);
        checker.check_root(&root);
        if !checker.faults.is_empty() {
            return Err(faulty(checker.faults));
        }
        let datasets = resolve::datasets(&root, fallback).map_err(faulty)?;
        let config = DataConfig {
            datasets,
            ..run.clone()
        };
        Ok(Self {
            config,
            findings: checker.without_effect(origin),
        })
    }
}

impl Dataset {
    /// Reads a dataset config file and the folders it names. See [`ConfigFile::read`].
    ///
    /// # Errors
    /// As [`ConfigFile::read`] and [`Dataset::load`].
    pub fn from_config_file(
        path: impl AsRef<Path>,
        fallback: &DatasetConfig,
        run: &DataConfig,
    ) -> Result<Self> {
        let file = ConfigFile::read(path.as_ref(), fallback, run)?;
        dataset::build(file.config, file.findings)
    }
}
