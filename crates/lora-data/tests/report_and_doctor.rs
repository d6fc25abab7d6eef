//! The sum, the contact sheet, and what the doctor finds.

mod common;

use common::Folder;
use lora_data::doctor::{DoctorConfig, examine};
use lora_data::{
    ContactSheetConfig, Dataset, DatasetConfig, DatasetReport, FindingKind, ReportConfig,
    RunLength, write_contact_sheet,
};

fn load(folder: &Folder) -> Dataset {
    Dataset::from_folder(
        folder.path(),
        &DatasetConfig {
            batch_size: 2,
            ..Default::default()
        },
    )
    .expect("a dataset")
}

fn troubled() -> Folder {
    let folder = Folder::new();
    let captions = [
        "alicechan, red_hair, white background",
        "alice-chan, red hair, white background",
        "alicechan, smile, white background",
        "smile, alicechan, white background",
        "alicechan, sitting, white background",
        "running, white background",
        "alicechan, white background",
    ];
    for (i, caption) in captions.iter().enumerate() {
        folder.image(&format!("3_alice/{i}.png"), 500 + 60 * i as u32, 512);
        folder.file(&format!("3_alice/{i}.txt"), caption.as_bytes());
    }
    folder
        .image("3_alice/copy.png", 500, 512)
        .file("3_alice/copy.txt", b"alicechan, again, white background");
    folder
        .image("3_alice/tiny.png", 100, 100)
        .file("3_alice/tiny.txt", b"alicechan, small, white background");
    folder
        .image("3_alice/wide.png", 2000, 500)
        .file("3_alice/wide.txt", "alicechan, a ".repeat(60).as_bytes());
    folder
}

#[test]
fn the_doctor_names_what_is_wrong_and_what_to_do() {
    let folder = troubled();
    let dataset = load(&folder);
    let findings = examine(
        &dataset,
        &DoctorConfig {
            look_at_images: false,
            trigger: None,
        },
    );
    let found = |kind, text: &str| {
        let hit = findings
            .iter()
            .find(|f| f.kind == kind && f.what.contains(text));
        assert!(
            hit.is_some_and(|f| !f.advice.is_empty()),
            "no {kind:?} with `{text}` in {findings:#?}"
        );
    };
    found(
        FindingKind::Trigger,
        "`alicechan` is not in 2 of 10 captions",
    );
    found(FindingKind::Trigger, "not the first tag in 1");
    found(FindingKind::TriggerSpelling, "alice-chan");
    found(FindingKind::TagSpelling, "red_hair");
    found(FindingKind::CommonBackground, "white background");
    found(FindingKind::LongCaption, "wide.png");
    found(FindingKind::Enlarged, "tiny.png");
    let duplicates = examine(&dataset, &DoctorConfig::default());
    let duplicates = duplicates
        .iter()
        .find(|f| f.kind == FindingKind::NearDuplicates);
    assert!(
        duplicates.is_some_and(|f| f.what.contains("copy.png")),
        "{duplicates:?}"
    );
}

#[test]
fn the_doctor_is_content_with_a_good_dataset() {
    let folder = Folder::new();
    for (i, scene) in [
        "beach", "forest", "street", "room", "snow", "rain", "night", "noon", "car", "boat",
    ]
    .iter()
    .enumerate()
    {
        folder.image(
            &format!("5_alice/{i}.png"),
            520 + 30 * i as u32,
            530 + 7 * i as u32,
        );
        folder.file(
            &format!("5_alice/{i}.txt"),
            format!("alicechan, standing, {scene}").as_bytes(),
        );
    }
    let config = DoctorConfig {
        look_at_images: false,
        trigger: Some("Alicechan".into()),
    };
    assert_eq!(examine(&load(&folder), &config), []);
}

#[test]
fn identical_captions_are_named() {
    let folder = Folder::new();
    for i in 0..5 {
        folder
            .image(&format!("5_a/{i}.png"), 512, 512)
            .file(&format!("5_a/{i}.txt"), b"alicechan");
    }
    let findings = examine(
        &load(&folder),
        &DoctorConfig {
            look_at_images: false,
            trigger: None,
        },
    );
    assert!(
        findings
            .iter()
            .any(|f| f.kind == FindingKind::IdenticalCaptions)
    );
}

#[test]
fn the_report_shows_the_whole_sum() {
    let folder = troubled();
    let dataset = load(&folder);
    let config = ReportConfig {
        gradient_accumulation_steps: 4,
        length: RunLength::Epochs(5),
        ..Default::default()
    };
    let report = DatasetReport::new(&dataset, &config);
    assert_eq!(report.steps.batches_per_epoch, dataset.batches_per_epoch());
    assert_eq!(
        report.total_steps,
        dataset.batches_per_epoch().div_ceil(4) * 5
    );
    let draws: usize = report.datasets[0]
        .buckets
        .iter()
        .map(|bucket| bucket.count)
        .sum();
    assert_eq!(draws, dataset.num_train_images());
    let text = report.to_string();
    for part in [
        "3_alice: 10 training images x 3, 10 captions",
        "updates",
        "as trained",
        "white background 9",
    ] {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
    assert_eq!(report.enlarged[0].0.file_name().unwrap(), "tiny.png");
}

#[test]
fn the_contact_sheet_is_a_png_of_all_pictures() {
    let folder = troubled();
    let sheet = folder.path().join("sheet.png");
    let config = ContactSheetConfig {
        columns: 4,
        cell: 64,
        caption_lines: 2,
        ..Default::default()
    };
    write_contact_sheet(&load(&folder), &sheet, &config).unwrap();
    let page = image::open(&sheet).unwrap().into_rgb8();
    assert_eq!(page.width(), 4 * (64 + 8) + 8);
    assert_eq!(page.height(), 3 * (64 + 4 * 11 + 8) + 8);
    let nowhere = folder.path().join("no/such/folder/sheet.png");
    let error = write_contact_sheet(&load(&folder), &nowhere, &config)
        .unwrap_err()
        .to_string();
    assert!(error.contains("sheet.png"), "{error}");
}
