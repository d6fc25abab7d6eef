//! The dataset config file: what it resolves to and how it refuses.

use std::path::Path;

use lora_data::{
    ConfigFile, ConfigSyntax, DataConfig, DatasetConfig, Error, FindingKind, Interpolation, Size,
};

fn parse(text: &str) -> lora_data::Result<ConfigFile> {
    let fallback = DatasetConfig::sd_scripts();
    ConfigFile::parse(
        text,
        ConfigSyntax::Toml,
        Path::new("d.toml"),
        &fallback,
        &DataConfig::default(),
    )
}

/// `line: key` of every fault.
fn faults(text: &str) -> Vec<String> {
    match parse(text) {
        Err(Error::Config { faults, .. }) => faults
            .iter()
            .map(|f| format!("{}: {}: {}", f.line.unwrap_or(0), f.key, f.what))
            .collect(),
        other => panic!("expected faults, got {other:?}"),
    }
}

#[test]
fn inner_levels_win() {
    let text = r#"
        [general]
        keep_tokens = 1
        resize_interpolation = "lanczos"
        [[datasets]]
        resolution = [768, 512]
        keep_tokens = 2
        [[datasets.subsets]]
        image_dir = "a"
        [[datasets.subsets]]
        image_dir = "b"
        keep_tokens = 3
        custom_attributes = { diff_output_preservation = true, note = "x" }
    "#;
    let file = parse(text).unwrap();
    let dataset = &file.config.datasets[0];
    assert_eq!(dataset.resolution, Size::new(768, 512));
    assert_eq!(dataset.resize_interpolation, Some(Interpolation::Lanczos));
    let kept: Vec<_> = dataset
        .subsets
        .iter()
        .map(|subset| subset.captions.keep_tokens)
        .collect();
    assert_eq!(kept, [2, 3]);
    assert!(dataset.subsets[1].diff_output_preservation);
    assert!(
        file.findings
            .iter()
            .all(|f| f.kind == FindingKind::OptionWithoutEffect)
    );
    assert_eq!(file.findings.len(), 1);
}

#[test]
fn every_fault_is_reported_with_its_line_and_a_suggestion() {
    let text = "\
[general]
shufle_caption = true
is_reg = true
prior_loss_weight = 1.0
[[datasets]]
batch_size = \"4\"
resolution = 512.5
[[datasets.subsets]]
num_repeat = 10
image_dir = \"a\"
enable_bucket = true
[[datasets.subsets]]
[dataset]
";
    let found = faults(text);
    let wanted = [
        "2: general.shufle_caption: unknown option, did you mean `shuffle_caption`?",
        "3: general.is_reg: this option stands only in [[datasets.subsets]]",
        "4: general.prior_loss_weight: unknown option, it is an option of the whole run, not of a dataset",
        "6: datasets[0].batch_size: expected a whole number of 0 or more, found the text \"4\"",
        "7: datasets[0].resolution: expected a whole number or [width, height] in whole numbers, found the number 512.5",
        "9: datasets[0].subsets[0].num_repeat: unknown option, did you mean `num_repeats`?",
        "11: datasets[0].subsets[0].enable_bucket: this option stands in [general] or [[datasets]], not in a subset",
        "12: datasets[0].subsets[1].image_dir: it is missing: name the folder of images",
        "13: dataset: options stand in [general], [[datasets]] or [[datasets.subsets]], did you mean `datasets`?",
    ];
    assert_eq!(found, wanted);
}

#[test]
fn values_that_cannot_be_used_have_lines_too() {
    let text = "[general]\nbatch_size = 0\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\ncaption_dropout_rate = 2\n";
    let found = faults(text);
    assert!(
        found[0].starts_with("2: datasets[0].batch_size: "),
        "{found:?}"
    );
    assert!(
        found[1].starts_with("6: datasets[0].subsets[0].caption_dropout_rate: 2 "),
        "{found:?}"
    );
}

#[test]
fn broken_syntax_and_masks_without_masked_loss_are_refused() {
    assert!(faults("[general]\nkeep_tokens = = 1\n")[0].starts_with("2: TOML: "));
    let masks =
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nconditioning_data_dir = 'm'\n";
    assert!(faults(masks)[0].contains("masked_loss is off"));
    let run = DataConfig {
        masked_loss: true,
        ..Default::default()
    };
    let fallback = DatasetConfig::sd_scripts();
    assert!(
        ConfigFile::parse(
            masks,
            ConfigSyntax::Toml,
            Path::new("d.toml"),
            &fallback,
            &run
        )
        .is_ok()
    );
}
