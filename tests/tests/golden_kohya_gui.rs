//! Configs of the two GUIs, against the trainer configs that the GUIs themselves write.

use std::collections::BTreeSet;
use std::path::Path;

use lora_sd15::Image;
use lora_tests::{Report, bundled_json, golden_or_bundled_json};
use lora_train::gui::{Form, read_config, to_kohya_json};
use lora_train::options::{Settings, Status, all_options};
use lora_train::{TrainConfig, line_options};
use serde_json::{Map, Value};

/// Pictures as the golden files describe them: 12 and 7, sizes cycling.
fn pictures(folder: &Path) {
    let sizes = [(512, 512), (640, 448), (448, 640)];
    for (name, count) in [("img/10_alice", 12), ("img/3_style", 7), ("reg/1_girl", 1)] {
        let folder = folder.join(name);
        std::fs::create_dir_all(&folder).unwrap();
        for i in 0..count {
            let (width, height) = sizes[i % 3];
            let image = Image {
                width,
                height,
                rgb: vec![100 + i as u8; 3 * width * height],
            };
            image
                .save_png(folder.join(format!("{i}.png")), None)
                .unwrap();
            std::fs::write(folder.join(format!("{i}.txt")), format!("tag {i}")).unwrap();
        }
    }
}

/// The trainer config of the golden file, as this trainer's settings. Keys that the
/// trainer does not know are the GUI's own.
fn reference(config: &Map<String, Value>) -> Settings {
    let mut settings = Settings::default();
    for (name, value) in config {
        if !all_options().any(|o| o.name == name) {
            continue;
        }
        let value: toml::Value = serde_json::from_value(value.clone()).unwrap();
        settings.set(name, value, "golden").unwrap();
    }
    settings
}

/// What the settings mean: each option that is used, `network_args` by what they select.
fn meaning(settings: &Settings) -> (Map<String, Value>, String, BTreeSet<String>) {
    let mut used = settings.used().unwrap();
    used.remove("sample_prompts");
    used.remove("sample_sampler");
    used.remove("network_args");
    // The order of arguments does not matter.
    if let Some(toml::Value::Array(items)) = used.get_mut("lr_scheduler_args") {
        items.sort_by_key(ToString::to_string);
    }
    let optimizer_args = match used.remove("optimizer_args") {
        Some(toml::Value::Array(items)) => items.iter().map(ToString::to_string).collect(),
        _ => BTreeSet::new(),
    };
    let config = TrainConfig {
        pretrained_model_name_or_path: Some("m".into()),
        output_dir: Some("o".into()),
        train_data_dir: Some("t".into()),
        network_module: settings
            .get("network_module")
            .and_then(|v| v.as_str())
            .map(str::to_string),
        network_args: settings
            .get("network_args")
            .and_then(|v| v.as_array())
            .map(|a| {
                a.iter()
                    .filter_map(|v| v.as_str())
                    .map(str::to_string)
                    .collect()
            })
            .unwrap_or_default(),
        ..TrainConfig::default()
    };
    let network = format!("{:?}", config.network().unwrap());
    let Value::Object(mut used) = serde_json::to_value(used).unwrap() else {
        panic!("a table")
    };
    // Empty lists are the same as absent ones.
    used.retain(|_, v| v.as_array().is_none_or(|a| !a.is_empty()));
    (used, network, optimizer_args)
}

fn compare(report: &mut Report, name: &str, got: &Settings, want: &Settings, skip: &[&str]) {
    let (got, got_network, got_args) = meaning(got);
    let (want, want_network, want_args) = meaning(want);
    report.equal(name, "network_args", &got_network, &want_network);
    report.equal(name, "optimizer_args", &got_args, &want_args);
    for key in got.keys().chain(want.keys()).collect::<BTreeSet<_>>() {
        if skip.contains(&key.as_str()) {
            continue;
        }
        report.equal(name, key, &got.get(key), &want.get(key));
    }
}

#[test]
fn golden_kohya_gui_kohya_ss() {
    let golden = golden_or_bundled_json("kohya", "gui_kohya_ss.json");
    let folder = tempfile::tempdir().unwrap();
    pictures(folder.path());
    let dir = folder.path().to_str().unwrap();
    let mut report = Report::default();
    for case in golden["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let text = case["gui"].to_string().replace("DIR/", &format!("{dir}/"));
        let path = folder.path().join("settings.json");
        std::fs::write(&path, text).unwrap();
        let import = read_config(&path).unwrap();
        report.equal(name, "form", &import.form, &Form::KohyaSs);

        let want = case["trainer_config"]
            .to_string()
            .replace("DIR/", &format!("{dir}/"));
        let mut want: Map<String, Value> = serde_json::from_str(&want).unwrap();
        // The trainer takes the number of epochs where both are given.
        if want.contains_key("max_train_epochs") {
            want.remove("max_train_steps");
        }
        let words: Vec<String> = case["extra_command_line"]
            .as_array()
            .unwrap()
            .iter()
            .map(|w| w.as_str().unwrap().to_string())
            .collect();
        let mut want = reference(&want);
        want.overlay(Settings::from_arguments(&words).unwrap().0);
        // Zeros that the GUI loses are kept, each with a note.
        let kept: Vec<&str> = import
            .changed
            .iter()
            .filter(|line| line.contains("kept"))
            .filter_map(|line| line.split(' ').next())
            .collect();
        compare(&mut report, name, &import.settings, &want, &kept);
    }
    report.finish();
}

#[test]
fn every_field_of_kohya_ss_is_known() {
    let golden = bundled_json("kohya", "gui_kohya_ss.json");
    let mut gui = golden["cases"][0]["gui"].as_object().unwrap().clone();
    for key in golden["all_gui_keys"].as_array().unwrap() {
        gui.entry(key.as_str().unwrap())
            .or_insert(Value::Bool(true));
    }
    // Switched on, these have a meaning of their own or are refused later, by name.
    for (key, value) in [
        ("optimizer_args", ""),
        ("max_train_steps", "10"),
        ("sample_prompts", "a"),
    ] {
        gui.insert(key.into(), value.into());
    }
    let text = Value::Object(gui).to_string();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("all.json");
    std::fs::write(&path, text).unwrap();
    if let Err(error) = read_config(&path) {
        assert!(!error.to_string().contains("unknown field"), "{error}");
    }
}

#[test]
fn golden_kohya_gui_lora_easy() {
    let golden = golden_or_bundled_json("kohya", "gui_lora_easy.json");
    let folder = tempfile::tempdir().unwrap();
    pictures(folder.path());
    let dir = folder.path().to_str().unwrap();
    let mut report = Report::default();
    for case in golden["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let text = case["easy_toml"]
            .as_str()
            .unwrap()
            .replace("DIR/", &format!("{dir}/"));
        let path = folder.path().join("easy.toml");
        std::fs::write(&path, text).unwrap();
        let import = read_config(&path).unwrap();
        report.equal(name, "form", &import.form, &Form::LoraEasy);
        let want = case["trainer_config"]
            .to_string()
            .replace("DIR/", &format!("{dir}/"));
        let want = reference(&serde_json::from_str(&want).unwrap());
        compare(&mut report, name, &import.settings, &want, &[]);

        let dataset: Value =
            toml::from_str(import.settings.inline.dataset.as_ref().unwrap()).unwrap();
        let written = case["dataset_toml_written"]
            .as_str()
            .unwrap()
            .replace("DIR/", &format!("{dir}/"));
        let written: Value = toml::from_str(&written).unwrap();
        report.equal(name, "dataset", &dataset, &written);
    }
    report.finish();
}

#[test]
fn golden_kohya_trainer_options() {
    let golden = golden_or_bundled_json("kohya", "trainer_options.json");
    let mut report = Report::default();
    let options = golden["options"].as_array().unwrap();
    for option in options {
        let name = option["name"].as_str().unwrap();
        let row = all_options().find(|row| row.name == name);
        match row.map(|row| row.status) {
            None => report.fail(name, "option", "unknown"),
            Some(Status::NoEffect(reason) | Status::Refused(reason)) if reason.is_empty() => {
                report.fail(name, "option", "no reason is given");
            }
            Some(_) => {}
        }
    }
    report.equal(
        "options",
        "count",
        &options.len(),
        &lora_train::options::OPTIONS.len(),
    );
    report.finish();
}

#[test]
fn golden_kohya_sample_prompt_lines() {
    let golden = golden_or_bundled_json("kohya", "captions.json");
    let mut report = Report::default();
    for row in golden["sample_prompt_lines"].as_array().unwrap() {
        let line = row["line"].as_str().unwrap();
        let got = Value::Object(line_options(line));
        report.equal(line, "options", &got, &row["dict"]);
    }
    report.finish();
}

#[test]
fn settings_survive_the_way_through_kohya_ss_json() {
    let config = TrainConfig {
        pretrained_model_name_or_path: Some("m.safetensors".into()),
        train_data_dir: Some("img".into()),
        output_dir: Some("out".into()),
        network_module: Some("lycoris.kohya".into()),
        network_dim: Some(4),
        network_alpha: 2.0,
        network_args: vec![
            "algo=loha".into(),
            "preset=attn-mlp".into(),
            "conv_dim=2".into(),
        ],
        optimizer_type: "Prodigy".into(),
        optimizer_args: vec!["betas=0.9,0.99".into(), "weight_decay=0.01".into()],
        learning_rate: Some(1.0),
        unet_lr: Some(1.0),
        network_train_unet_only: true,
        max_train_epochs: Some(10),
        noise_offset: Some(0.03),
        seed: Some(5),
        ..TrainConfig::default()
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("zoe.json");
    std::fs::write(&path, to_kohya_json(&config).unwrap()).unwrap();
    let import = read_config(&path).unwrap();
    let back = TrainConfig::from_settings(&import.settings).unwrap();
    assert_eq!(back.network().unwrap(), config.network().unwrap());
    let plain = |c: &TrainConfig| TrainConfig {
        network_args: Vec::new(),
        // kohya_ss keeps both rates.
        unet_lr: None,
        text_encoder_lr: Vec::new(),
        ..c.clone()
    };
    assert_eq!(plain(&back), plain(&config));
}
