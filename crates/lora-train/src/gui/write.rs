//! Settings in kohya_ss' form.

use serde_json::{Map, Value};

use crate::{Result, TrainConfig};

/// The settings as a JSON object that kohya_ss loads: its names where they differ, text
/// for lists of arguments, 0 and "" where an option is not given.
///
/// # Errors
/// When a value cannot be written as JSON.
pub fn to_kohya_json(config: &TrainConfig) -> Result<String> {
    let Value::Object(mut map) = config.to_value()? else {
        return Ok("{}".into());
    };
    let args = texts(map.remove("network_args"));
    let find = |name: &str| {
        args.iter()
            .filter_map(|arg| arg.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.to_string())
    };
    let module = map.remove("network_module");
    let lycoris = module.as_ref().and_then(Value::as_str) == Some("lycoris.kohya");
    let kind = match (lycoris, find("algo").as_deref()) {
        (false, _) if find("conv_dim").is_some() => "Kohya LoCon",
        (false, _) => "Standard",
        (true, Some("loha")) => "LyCORIS/LoHa",
        (true, Some("lokr")) => "LyCORIS/LoKr",
        (true, Some("ia3")) => "LyCORIS/iA3",
        (true, Some("glora")) => "LyCORIS/GLoRA",
        (true, Some("boft")) => "LyCORIS/BOFT",
        (true, Some("diag-oft")) => "LyCORIS/Diag-OFT",
        (true, Some("full")) => "LyCORIS/Native Fine-Tuning",
        (true, _) => "LyCORIS/LoCon",
    };
    map.insert("LoRA_type".into(), kind.into());
    for (key, value) in args.iter().filter_map(|arg| arg.split_once('=')) {
        let name = match key {
            "algo" => continue,
            "preset" => "LyCORIS_preset",
            "constraint" => "constrain",
            other => other,
        };
        map.insert(name.into(), gui_value(value));
    }
    for key in ["optimizer_args", "lr_scheduler_args"] {
        let words = texts(map.remove(key));
        map.insert(key.into(), words.join(" ").into());
    }
    rename(&mut map, "resolution", "max_resolution");
    rename(&mut map, "optimizer_type", "optimizer");
    if config.optimizer_type.is_empty() {
        map.insert("optimizer".into(), "AdamW".into());
    }
    // A learning rate of 0 means "not trained" there.
    let unet = if config.network_train_text_encoder_only {
        0.0
    } else {
        config.unet_learning_rate()
    };
    let text = if config.network_train_unet_only {
        0.0
    } else {
        config.text_learning_rate()
    };
    map.insert("unet_lr".into(), unet.into());
    map.insert("text_encoder_lr".into(), text.into());
    map.remove("network_train_unet_only");
    map.remove("network_train_text_encoder_only");
    match config.lr_warmup_steps {
        Some(crate::Steps::Share(part)) => {
            map.insert("lr_warmup".into(), (part * 100.0).into());
            map.insert("lr_warmup_steps".into(), 0.into());
        }
        Some(crate::Steps::Count(n)) => {
            map.insert("lr_warmup_steps".into(), n.into());
        }
        None => {
            map.insert("lr_warmup".into(), 0.into());
            map.insert("lr_warmup_steps".into(), 0.into());
        }
    }
    if let Some(crate::Steps::Share(part)) = config.stop_text_encoder_training {
        map.insert("stop_text_encoder_training".into(), (part * 100.0).into());
    }
    let multires = config.multires_noise_iterations.is_some();
    map.insert(
        "noise_offset_type".into(),
        if multires { "Multires" } else { "Original" }.into(),
    );
    // The GUI prefers steps; 0 leaves the decision to the epochs.
    let epochs = config.max_train_epochs.unwrap_or(0);
    map.insert("max_train_epochs".into(), epochs.into());
    if epochs > 0 {
        map.insert("max_train_steps".into(), 0.into());
    }
    map.insert("epoch".into(), epochs.into());
    let samples = match (&config.inline.samples, &config.sample_prompts) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => std::fs::read_to_string(path).unwrap_or_default(),
        (None, None) => String::new(),
    };
    map.insert("sample_prompts".into(), samples.into());
    map.insert("xformers".into(), "sdpa".into());
    let mut text = serde_json::to_string_pretty(&map).map_err(|e| crate::Error::Config {
        place: "settings".into(),
        what: e.to_string(),
    })?;
    text.push('\n');
    Ok(text)
}

fn rename(map: &mut Map<String, Value>, from: &str, to: &str) {
    if let Some(value) = map.remove(from) {
        map.insert(to.into(), value);
    }
}

fn texts(list: Option<Value>) -> Vec<String> {
    match list {
        Some(Value::Array(items)) => items
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_string)
            .collect(),
        _ => Vec::new(),
    }
}

/// Numbers and switches as such, everything else as text.
fn gui_value(text: &str) -> Value {
    match text {
        "True" | "true" => Value::Bool(true),
        "False" | "false" => Value::Bool(false),
        _ => text
            .parse::<i64>()
            .map(Value::from)
            .or_else(|_| text.parse::<f64>().map(Value::from))
            .unwrap_or_else(|_| text.into()),
    }
}
