//! LoRA_Easy_Training_Scripts: one TOML table per panel.

use serde_json::{Map, Value};

use super::{Form, Import, count_batches, python_text, to_toml};
use crate::options::Settings;
use crate::{Error, Result};

/// Keys that the GUI itself uses.
const GUI_ONLY: &[&str] = &[
    "easy_name",
    "tag_occurrence",
    "tag_file_location",
    "save_toml",
    "save_toml_location",
];

/// Schedules of the GUI's own package: they take their length as arguments.
const OWN_SCHEDULES: &str = "LoraEasyCustomOptimizer.";

pub(super) fn import(map: &Map<String, Value>, place: &str) -> Result<Import> {
    let mut args = Map::new();
    let mut general = Map::new();
    for (panel, tables) in map {
        match (panel.as_str(), tables) {
            ("subsets" | "train_mode", _) => {}
            (_, Value::Object(tables)) => {
                for (name, table) in tables {
                    let target = match name.as_str() {
                        "args" => &mut args,
                        "dataset_args" => &mut general,
                        other => return unknown(place, &format!("{panel}.{other}")),
                    };
                    let Value::Object(table) = table else {
                        return unknown(place, &format!("{panel}.{name}"));
                    };
                    target.extend(table.clone());
                }
            }
            (other, _) => return unknown(place, other),
        }
    }
    let mode = map
        .get("train_mode")
        .and_then(|t| t.get("train_mode"))
        .and_then(Value::as_str);
    if mode.is_some_and(|mode| mode != "lora") {
        return Err(fault(place, "train_mode: only lora is supported".into()));
    }
    let mut import = Import {
        form: Form::LoraEasy,
        ..Import::default()
    };
    let dataset = dataset(map.get("subsets"), &general, place)?;
    let name = take_text(&mut args, "easy_name");
    for key in GUI_ONLY {
        if args.remove(*key).is_some_and(|v| truthy(&v)) {
            import
                .left_out
                .push(format!("{key}: concerns the GUI, not the training"));
        }
    }
    // Needs the number of updates.
    let warmup = args.remove("warmup_ratio").and_then(|v| v.as_f64());
    let cycles = args.get("lr_scheduler_num_cycles").and_then(Value::as_u64);
    let own_schedule = args
        .get("lr_scheduler_type")
        .and_then(Value::as_str)
        .is_some_and(|class| class.starts_with(OWN_SCHEDULES));
    let total = match warmup.is_some() || own_schedule {
        true => total_steps(&args, &dataset)?,
        false => 0,
    };
    let mut schedule_args = table(&mut args, "lr_scheduler_args");
    if own_schedule {
        args.remove("lr_scheduler_num_cycles");
        let cycles = cycles.unwrap_or(1).max(1);
        let warmup = (total as f64 * warmup.unwrap_or(0.0)).round_ties_even() as u64 / cycles;
        schedule_args.insert("warmup_steps".into(), warmup.into());
        schedule_args.insert("first_cycle_max_steps".into(), (total / cycles).into());
    } else if let Some(ratio) = warmup {
        let steps = (total as f64 * ratio).round_ties_even() as i64;
        import.changed.push(format!(
            "warmup_ratio {ratio}: becomes lr_warmup_steps {steps} of {total}"
        ));
        set(
            &mut import.settings,
            "lr_warmup_steps",
            toml::Value::Integer(steps),
            place,
        )?;
    }
    let network_args = table(&mut args, "network_args");
    let module = if network_args.contains_key("algo") {
        "lycoris.kohya"
    } else if network_args.contains_key("unit") {
        "networks.dylora"
    } else if args.remove("fa").is_some_and(|v| truthy(&v)) {
        "networks.lora_fa"
    } else {
        "networks.lora"
    };
    set(&mut import.settings, "network_module", module.into(), place)?;
    for (key, table, capitalised) in [
        ("network_args", network_args, false),
        ("lr_scheduler_args", schedule_args, false),
        ("optimizer_args", table(&mut args, "optimizer_args"), true),
    ] {
        if !table.is_empty() {
            let list = list(&table, capitalised);
            set(&mut import.settings, key, list, place)?;
        }
    }
    if let Some(file) = take_text(&mut args, "dim_from_weights") {
        // A path here; the trainer takes a switch and the path.
        set(&mut import.settings, "dim_from_weights", true.into(), place)?;
        args.insert("network_weights".into(), file.into());
    }
    for (key, value) in &args {
        if !truthy(value) {
            continue;
        }
        let value = match value.as_str() {
            Some("true") => Value::Bool(true),
            Some("false") => continue,
            Some(text) => Value::from(text.replace("${replace}", name.as_deref().unwrap_or(""))),
            None => value.clone(),
        };
        let Some(value) = to_toml(&value) else {
            return unknown(place, key);
        };
        set(&mut import.settings, key, value, place)?;
    }
    import.settings.inline.dataset = Some(dataset);
    Ok(import)
}

fn fault(place: &str, what: String) -> Error {
    Error::Config {
        place: place.to_string(),
        what,
    }
}

fn unknown<T>(place: &str, key: &str) -> Result<T> {
    Err(fault(
        place,
        format!("{key:?} is not a part of a LoRA_Easy_Training_Scripts config"),
    ))
}

fn set(settings: &mut Settings, name: &str, value: toml::Value, place: &str) -> Result<()> {
    settings.set(name, value, place)
}

/// The backend drops what Python counts as false.
fn truthy(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::Bool(true) => true,
    }
}

fn take_text(args: &mut Map<String, Value>, key: &str) -> Option<String> {
    match args.get(key) {
        Some(Value::String(_)) => match args.remove(key) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        },
        _ => None,
    }
}

fn table(args: &mut Map<String, Value>, key: &str) -> Map<String, Value> {
    match args.remove(key) {
        Some(Value::Object(table)) => table,
        _ => Map::new(),
    }
}

/// `key=value` texts.
fn list(table: &Map<String, Value>, capitalised: bool) -> toml::Value {
    let word = |(key, value): (&String, &Value)| {
        let text = match python_text(value).as_str() {
            "true" if capitalised => "True".to_string(),
            "false" if capitalised => "False".to_string(),
            other => other.to_string(),
        };
        toml::Value::String(format!("{key}={text}"))
    };
    toml::Value::Array(table.iter().map(word).collect())
}

/// The dataset config that the backend writes.
fn dataset(subsets: Option<&Value>, general: &Map<String, Value>, place: &str) -> Result<String> {
    let Some(Value::Array(subsets)) = subsets else {
        return Err(fault(place, "there are no [[subsets]]".into()));
    };
    let clean = |map: &Map<String, Value>, skip: &[&str]| {
        let mut table = toml::Table::new();
        for (key, value) in map {
            if !truthy(value) || skip.contains(&key.as_str()) {
                continue;
            }
            if key == "max_token_length" && value.as_u64() == Some(75) {
                continue;
            }
            let value = match value.as_str() {
                Some("true") => Value::Bool(true),
                Some("false") => continue,
                _ => value.clone(),
            };
            if let Some(value) = to_toml(&value) {
                table.insert(key.clone(), value);
            }
        }
        table
    };
    let mut list = Vec::new();
    for subset in subsets {
        let Value::Object(subset) = subset else {
            return Err(fault(place, "[[subsets]] are not tables".into()));
        };
        list.push(toml::Value::Table(clean(subset, &["name"])));
    }
    let mut one = toml::Table::new();
    one.insert("subsets".into(), toml::Value::Array(list));
    let mut file = toml::Table::new();
    file.insert("general".into(), toml::Value::Table(clean(general, &[])));
    file.insert(
        "datasets".into(),
        toml::Value::Array(vec![toml::Value::Table(one)]),
    );
    toml::to_string(&file).map_err(|e| fault(place, e.to_string()))
}

/// Updates of the whole run, as the backend counts them.
fn total_steps(args: &Map<String, Value>, dataset: &str) -> Result<u64> {
    let number = |key: &str| args.get(key).and_then(Value::as_u64);
    if let Some(steps) = number("max_train_steps") {
        return Ok(steps);
    }
    let batches = count_batches(dataset)? as u64;
    let accumulation = number("gradient_accumulation_steps").unwrap_or(1).max(1);
    Ok(batches.div_ceil(accumulation) * number("max_train_epochs").unwrap_or(1))
}
