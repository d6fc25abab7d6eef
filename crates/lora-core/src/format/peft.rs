//! What PEFT keeps outside the tensors: `alpha` and its exceptions, in
//! `adapter_config.json` beside the file or in diffusers' header metadata.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// The scales of a file's layers, for the formats that keep them apart.
#[derive(Debug, Default)]
pub(super) struct Scales {
    /// By component: `unet`, `text_encoder`; the empty name stands for any.
    configs: BTreeMap<String, Map<String, Value>>,
}

impl Scales {
    /// Finds them for a file with these keys.
    ///
    /// # Errors
    /// When a PEFT file's `adapter_config.json` is missing or unreadable: without it the
    /// scale is unknown.
    pub(super) fn find(
        path: &Path,
        metadata: &BTreeMap<String, String>,
        names: &[String],
    ) -> Result<Self> {
        let mut configs = BTreeMap::new();
        if let Some(key) = names.iter().find(|n| n.starts_with("base_model.model.")) {
            configs.insert(String::new(), read_config(path, key)?);
        } else if let Some(text) = metadata.get("lora_adapter_metadata") {
            let what = "header metadata lora_adapter_metadata";
            for (name, value) in object(path, what, text.as_bytes())? {
                let (component, option) = name.split_once('.').unwrap_or(("", &name));
                let config: &mut Map<String, Value> =
                    configs.entry(component.to_string()).or_default();
                config.insert(option.to_string(), value);
            }
        }
        Ok(Self { configs })
    }

    /// Adds `alpha` to the parts of the layer at a dotted path, as their file would hold
    /// it had it one.
    ///
    /// # Errors
    /// When an option has a value that makes no sense.
    pub(super) fn apply(
        &self,
        layer: &str,
        path: &str,
        parts: &mut BTreeMap<String, Tensor>,
    ) -> Result<()> {
        let (component, inner) = match path.split_once('.') {
            Some((c @ ("unet" | "text_encoder"), inner)) => (c, inner),
            _ => ("unet", path),
        };
        let config = self.configs.get(component).or(self.configs.get(""));
        let (Some(config), false) = (config, parts.contains_key("alpha")) else {
            return Ok(());
        };
        let Some(alpha) = config.get("lora_alpha").or(config.get("alpha")) else {
            return Ok(());
        };
        let number = |value: &Value| {
            let number = value.as_f64().filter(|v| v.is_finite());
            number.ok_or_else(|| Error::BadValue {
                layer: layer.to_string(),
                name: "lora_alpha",
                value: value.to_string(),
                expected: "expected a finite number",
            })
        };
        let alpha = number(pattern(config, "alpha_pattern", inner).unwrap_or(alpha))?;
        let full = parts.contains_key("lokr_w1") && parts.contains_key("lokr_w2");
        let rank = match rank(parts) {
            Some(rank) if !full => rank as f64,
            _ => match pattern(config, "rank_pattern", inner).or(config.get("r")) {
                Some(rank) => number(rank)?,
                None => return Ok(()),
            },
        };
        let root = config.get("use_rslora").and_then(Value::as_bool) == Some(true);
        let alpha = if root { alpha * rank.sqrt() } else { alpha };
        match parts.get_mut("lokr_w1").filter(|_| full) {
            // Full matrices have no scale in other programs' files: it goes into them.
            Some(w1) if rank > 0.0 => *w1 = (&*w1 * (alpha / rank))?,
            _ => {
                parts.insert("alpha".into(), Tensor::new(alpha as f32, &Device::Cpu)?);
            }
        }
        Ok(())
    }
}

/// The rank as the factors tell it.
fn rank(parts: &BTreeMap<String, Tensor>) -> Option<usize> {
    ["lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"]
        .iter()
        .find_map(|name| parts.get(*name)?.dims().first().copied())
}

/// An exception for a layer: the entry whose key is the path or its last segments.
fn pattern<'a>(config: &'a Map<String, Value>, name: &str, path: &str) -> Option<&'a Value> {
    let patterns = config.get(name)?.as_object()?;
    patterns.iter().find_map(|(key, value)| {
        let matches = match key.strip_prefix('^') {
            Some(whole) => path == whole,
            None => path
                .strip_suffix(key.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
        };
        matches.then_some(value)
    })
}

/// Where the configuration of a file stands.
pub(super) fn config_path(path: &Path) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    match stem.strip_suffix("adapter_model") {
        Some(start) => path.with_file_name(format!("{start}adapter_config.json")),
        None => path.with_file_name("adapter_config.json"),
    }
}

/// `adapter_config.json` of an `adapter_model.safetensors`.
fn read_config(path: &Path, key: &str) -> Result<Map<String, Value>> {
    let beside = config_path(path);
    if !beside.is_file() {
        return Err(Error::Unsupported {
            path: path.to_path_buf(),
            what: format!("a PEFT file without {}", beside.display()),
            key: key.to_string(),
            advice: "put adapter_config.json beside it: the scale stands only there",
        });
    }
    let text = std::fs::read(&beside).map_err(Error::io(&beside))?;
    let config = object(&beside, "adapter_config.json", &text)?;
    if config.get("fan_in_fan_out").and_then(Value::as_bool) == Some(true) {
        return Err(Error::Unsupported {
            path: beside,
            what: "an adapter for transposed weights".into(),
            key: "fan_in_fan_out".into(),
            advice: "Stable Diffusion has no such layers",
        });
    }
    Ok(config)
}

fn object(path: &Path, what: &str, text: &[u8]) -> Result<Map<String, Value>> {
    let malformed = |reason: String| Error::Malformed {
        path: path.to_path_buf(),
        reason: format!("{what}: {reason}"),
    };
    match serde_json::from_slice(text).map_err(|e| malformed(e.to_string()))? {
        Value::Object(map) => Ok(map),
        _ => Err(malformed("expected a JSON object".into())),
    }
}
