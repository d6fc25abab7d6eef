//! The documentation in `docs/` against the programs: the table of options, the commands and
//! settings in code blocks, the links.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use lora_train::TrainConfig;
use lora_train::options::{Kind, OptionRow, Settings, Status, all_options};

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

fn pages() -> Vec<(PathBuf, String)> {
    let mut pages: Vec<_> = std::fs::read_dir(docs())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "md"))
        .map(|path| (path.clone(), std::fs::read_to_string(path).unwrap()))
        .collect();
    pages.push((
        docs().join("../README.md"),
        std::fs::read_to_string(docs().join("../README.md")).unwrap(),
    ));
    pages.sort();
    pages
}

/// Code blocks of one language.
fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let opening = format!("```{language}\n");
    text.split(opening.as_str())
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect()
}

/// The first sentence of each setting's documentation, by name.
fn meanings() -> BTreeMap<String, String> {
    let source = include_str!("../../crates/lora-train/src/config.rs");
    let mut meanings = BTreeMap::new();
    let mut comment = String::new();
    for line in source.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("/// ") {
            if !comment.is_empty() {
                comment.push(' ');
            }
            comment.push_str(text);
        } else if let Some(field) = line.strip_prefix("pub ").and_then(|l| l.split_once(": ")) {
            meanings
                .entry(field.0.to_string())
                .or_insert(std::mem::take(&mut comment));
        } else if !line.starts_with('#') {
            comment.clear();
        }
    }
    meanings
}

fn row(
    option: &OptionRow,
    defaults: &serde_json::Value,
    meanings: &BTreeMap<String, String>,
) -> String {
    let takes = match option.kind {
        Kind::Switch => "switch",
        Kind::Integer => "whole number",
        Kind::Number => "number",
        Kind::Text => "text",
        Kind::List => "list",
        Kind::Numbers => "numbers",
        Kind::Steps => "steps or share",
    };
    let default = match &defaults[option.name] {
        serde_json::Value::Null => String::new(),
        serde_json::Value::Array(list) if list.is_empty() => String::new(),
        serde_json::Value::String(text) if text.is_empty() => String::new(),
        value => format!("`{value}`"),
    };
    let mut meaning = match option.status {
        Status::Used if option.name == "config_file" => "Settings in a file.".into(),
        Status::Used => meanings.get(option.name).cloned().unwrap_or_default(),
        Status::NoEffect(reason) => format!("No effect: {reason}."),
        Status::Refused(advice) => format!("Refused: {advice}."),
    };
    if !option.choices.is_empty() {
        let _ = write!(meaning, " One of {}.", option.choices.join(", "));
    }
    format!(
        "| `{}` | {takes} | {default} | {} |",
        option.name,
        meaning.trim().replace('|', "\\|")
    )
}

#[test]
fn the_table_of_options_is_the_programs() {
    let defaults = serde_json::to_value(TrainConfig::default()).unwrap();
    let meanings = meanings();
    let mut text = String::from(
        "# Options\n\nEvery option of sd-scripts for training a LoRA, and ours. Names are the same on the command line\n\
         (`--name value`) and in config files. This page is made by `cargo test -p lora-tests --test book`\n\
         with `UPDATE_DOCS=1`.\n\n| option | takes | default | meaning |\n|---|---|---|---|\n",
    );
    for option in all_options() {
        text.push_str(&row(option, &defaults, &meanings));
        text.push('\n');
    }
    let path = docs().join("options.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap();
    assert!(
        written == text,
        "docs/options.md is out of date: run with UPDATE_DOCS=1"
    );
    let without: Vec<&str> = all_options()
        .filter(|o| matches!(o.status, Status::Used) && o.choices.is_empty())
        .filter(|o| o.name != "config_file")
        .filter(|o| meanings.get(o.name).is_none_or(String::is_empty))
        .map(|o| o.name)
        .collect();
    assert!(
        without.is_empty(),
        "options without a word of documentation: {without:?}"
    );
}

#[test]
fn training_commands_in_the_documentation_are_accepted() {
    let mut commands = 0;
    for (page, text) in pages() {
        for block in blocks(&text, "sh") {
            let joined = block.replace("\\\n", " ");
            for line in joined.lines() {
                let Some((_, arguments)) = line.split_once("--example train -- ") else {
                    continue;
                };
                let mut arguments: Vec<String> = arguments
                    .split_whitespace()
                    .map(|a| a.trim_matches('"').to_string())
                    .collect();
                arguments.retain(|a| a != "--dump-config");
                if let Some(at) = arguments.iter().position(|a| a == "--device") {
                    arguments.drain(at..at + 2);
                }
                let (settings, rest) = Settings::from_arguments(&arguments)
                    .unwrap_or_else(|e| panic!("{}: {line}: {e}", page.display()));
                assert!(rest.is_empty(), "{}: {line}: {rest:?}", page.display());
                // A config file of the text does not exist here; all other settings must fit together.
                if settings.get("config_file").is_none() {
                    TrainConfig::from_settings(&settings)
                        .unwrap_or_else(|e| panic!("{}: {line}: {e}", page.display()));
                }
                commands += 1;
            }
        }
    }
    assert!(commands >= 5, "{commands} commands found");
}

#[test]
fn settings_files_in_the_documentation_are_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let mut files = 0;
    for (page, text) in pages() {
        for block in blocks(&text, "toml") {
            if block.contains("[dependencies]") || block.contains("[[datasets]]") {
                continue;
            }
            let path = folder.path().join("settings.toml");
            std::fs::write(&path, block).unwrap();
            let settings =
                Settings::from_toml(&path).unwrap_or_else(|e| panic!("{}: {e}", page.display()));
            TrainConfig::from_settings(&settings)
                .unwrap_or_else(|e| panic!("{}: {e}", page.display()));
            files += 1;
        }
    }
    assert!(files >= 1, "{files} files found");
}

#[test]
fn links_between_pages_lead_somewhere() {
    for (page, text) in pages() {
        let folder = page.parent().unwrap();
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let file = link.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            assert!(folder.join(file).exists(), "{}: {link}", page.display());
        }
    }
}
