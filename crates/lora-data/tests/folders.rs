//! What a user sees when pointing the crate at folders, good and bad.

mod common;

use std::fs;

use common::{Folder, gray};
use lora_data::{
    CaptionConfig, CaptionSource, CaptionTime, DataConfig, Dataset, DatasetConfig, DatasetReport,
    DecodeCheck, Error, FindingKind, Layout, ReportConfig, Size, Streams, SubsetConfig,
};

fn load(folder: &Folder) -> lora_data::Result<Dataset> {
    Dataset::from_folder(folder.path(), &DatasetConfig::default())
}

fn captions(dataset: &Dataset) -> Vec<&str> {
    dataset
        .images()
        .iter()
        .map(|image| image.caption.as_str())
        .collect()
}

#[test]
fn the_parent_one_numbered_folder_and_a_plain_folder_all_work() {
    let folder = Folder::new();
    folder
        .image("3_alice/a.png", 64, 64)
        .image("3_alice/b.PNG", 80, 64);
    let parent = load(&folder).unwrap();
    assert_eq!(
        (parent.num_train_images(), captions(&parent)),
        (6, vec!["alice", "alice"])
    );
    let layout = |dataset: &Dataset| dataset.layouts()[0].1;
    assert_eq!(layout(&parent), Layout::Parent);
    let numbered =
        Dataset::from_folder(folder.path().join("3_alice"), &DatasetConfig::default()).unwrap();
    assert_eq!(numbered.num_train_images(), 6);
    assert_eq!(layout(&numbered), Layout::Numbered);
    fs::rename(folder.path().join("3_alice"), folder.path().join("photos")).unwrap();
    let repeats = DatasetConfig {
        subset: SubsetConfig {
            num_repeats: 4,
            ..Default::default()
        },
        ..Default::default()
    };
    let plain = Dataset::from_folder(folder.path().join("photos"), &repeats).unwrap();
    assert_eq!(
        (plain.num_train_images(), captions(&plain)),
        (8, vec!["", ""])
    );
    assert_eq!(layout(&plain), Layout::Plain);
    let report = DatasetReport::new(&plain, &ReportConfig::default()).to_string();
    assert!(
        report.contains("photos: read as a plain folder"),
        "{report}"
    );
}

#[test]
fn nothing_found_names_every_folder_and_why() {
    let folder = Folder::new();
    folder
        .image("images/a.png", 8, 8)
        .file("10_empty/readme.md", b"")
        .image("0_off/a.png", 8, 8);
    let error = load(&folder).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::NothingFound { .. }), "{text}");
    for part in [
        "images: 1 images, the name does not start with repeats",
        "10_empty",
        "0_off",
        "`10_name`",
    ] {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn a_folder_without_a_number_is_reported_when_others_have_one() {
    let folder = Folder::new();
    folder
        .image("2_a/a.png", 64, 64)
        .image("extra/b.png", 64, 64)
        .image("c.png", 64, 64);
    let dataset = load(&folder).unwrap();
    let kinds: Vec<_> = dataset.findings().iter().map(|f| f.kind).collect();
    assert!(
        kinds.contains(&FindingKind::FolderPassedOver)
            && kinds.contains(&FindingKind::FilesOutside)
    );
    assert_eq!(dataset.images().len(), 1);
}

#[test]
fn broken_images_are_left_out_and_named() {
    let folder = Folder::new();
    folder
        .image("1_a/good.png", 64, 64)
        .file("1_a/text.png", b"not a picture")
        .file("1_a/empty.jpg", b"");
    let whole = fs::read(folder.path().join("1_a/good.png")).unwrap();
    folder
        .file("1_a/cut.png", &whole[..whole.len() / 2])
        .jpeg("1_a/cut.jpg", 64, 64);
    let jpeg = fs::read(folder.path().join("1_a/cut.jpg")).unwrap();
    folder.file("1_a/cut.jpg", &jpeg[..jpeg.len() - 100]);
    let dataset = load(&folder).unwrap();
    assert_eq!(dataset.images().len(), 1);
    let named = dataset
        .findings()
        .iter()
        .filter(|f| f.kind == FindingKind::Undecodable);
    let mut named: Vec<_> = named
        .filter_map(|f| f.path.as_deref()?.file_name()?.to_str().map(str::to_owned))
        .collect();
    named.sort();
    assert_eq!(named, ["cut.jpg", "cut.png", "empty.jpg", "text.png"]);
    fs::remove_file(folder.path().join("1_a/good.png")).unwrap();
    assert!(matches!(
        load(&folder),
        Err(Error::NothingDecodes { count: 4, .. })
    ));
}

#[test]
fn a_full_check_finds_damage_in_the_middle_of_a_file() {
    let folder = Folder::new();
    folder.image("1_a/a.png", 64, 64).image("1_a/b.png", 64, 64);
    let mut bytes = fs::read(folder.path().join("1_a/b.png")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 8].fill(0x55);
    folder.file("1_a/b.png", &bytes);
    let run = DataConfig {
        decode_check: DecodeCheck::Full,
        ..Default::default()
    };
    let none: Option<&str> = None;
    let dataset =
        Dataset::from_folders(folder.path(), none, &DatasetConfig::default(), &run).unwrap();
    assert_eq!(dataset.images().len(), 1);
}

#[test]
fn captions_come_from_txt_then_caption_then_the_folder_name() {
    let folder = Folder::new();
    for name in ["a", "b", "c", "d"] {
        folder.image(&format!("1_alice/{name}.png"), 64, 64);
    }
    folder
        .file(
            "1_alice/a.txt",
            b"\xef\xbb\xbf one, two \r\nsecond line\r\n",
        )
        .file("1_alice/b.caption", b"three");
    folder.file("1_alice/d.txt", b"");
    let dataset = load(&folder).unwrap();
    assert_eq!(captions(&dataset), ["one, two", "three", "alice", ""]);
    let sources: Vec<_> = dataset
        .images()
        .iter()
        .map(|image| image.caption_source)
        .collect();
    let (file, second) = (CaptionSource::File, CaptionSource::FallbackFile);
    assert_eq!(sources, [file, second, CaptionSource::ClassTokens, file]);
    let kinds: Vec<_> = dataset.findings().iter().map(|f| f.kind).collect();
    assert!(
        kinds.contains(&FindingKind::EmptyCaption) && kinds.contains(&FindingKind::MissingCaptions)
    );
}

#[test]
fn a_caption_that_is_not_utf8_stops_the_run_and_is_named() {
    let folder = Folder::new();
    folder
        .image("1_a/x.png", 64, 64)
        .file("1_a/x.txt", b"caf\xe9, smile");
    let error = load(&folder).unwrap_err();
    assert!(
        matches!(&error, Error::NotUtf8 { offset: 3, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("x.txt"), "{error}");
}

#[test]
fn the_plan_is_pure_and_another_seed_or_epoch_gives_another_one() {
    let folder = Folder::new();
    for i in 0..12 {
        folder.image(&format!("2_a/{i}.png"), 64 + i * 8, 64);
    }
    let options = DatasetConfig {
        batch_size: 3,
        subset: SubsetConfig {
            flip_aug: true,
            color_aug: true,
            random_crop: true,
            ..Default::default()
        },
        ..Default::default()
    };
    let dataset = Dataset::from_folder(folder.path(), &options).unwrap();
    assert_eq!(dataset.epoch(3, 7), dataset.epoch(3, 7));
    assert_ne!(dataset.epoch(3, 7), dataset.epoch(4, 7));
    assert_ne!(dataset.epoch(3, 7), dataset.epoch(3, 8));
    for batch in dataset.epoch(3, 7).batches {
        for item in batch.items {
            let pixels = dataset.pixels(&item).unwrap();
            assert_eq!(pixels.size, batch.size);
            assert_eq!(pixels.data.len() as u64, batch.size.area() * 3);
        }
    }
}

#[test]
fn captions_drop_only_in_their_epochs_and_do_not_depend_on_the_order_of_calls() {
    let folder = Folder::new();
    folder
        .image("1_a/x.png", 64, 64)
        .file("1_a/x.txt", b"a, b, c, d, e, f, g, h");
    let captions = CaptionConfig {
        shuffle_caption: true,
        caption_dropout_every_n_epochs: 2,
        ..Default::default()
    };
    let options = DatasetConfig {
        subset: SubsetConfig {
            captions,
            ..Default::default()
        },
        ..Default::default()
    };
    let dataset = Dataset::from_folder(folder.path(), &options).unwrap();
    let item = dataset.epoch(1, 1).batches[0].items[0];
    let at = |epoch| {
        dataset.caption(
            &item,
            CaptionTime {
                epoch,
                ..Default::default()
            },
            Streams::new(1),
        )
    };
    let first = at(1);
    assert_eq!((at(2).as_str(), at(4).as_str()), ("", ""));
    assert_ne!(first, at(3));
    assert_eq!(first, at(1));
}

#[test]
fn photos_are_turned_as_their_camera_says_unless_told_otherwise() {
    let folder = Folder::new();
    folder.exif_jpeg("1_a/x.jpg", 96, 64, 6);
    let turned = load(&folder).unwrap();
    assert_eq!(turned.images()[0].size, Size::new(64, 96));
    let pixels = turned
        .pixels(&turned.epoch(1, 1).batches[0].items[0])
        .unwrap();
    assert!(pixels.size.height > pixels.size.width);
    let run = DataConfig {
        exif_orientation: false,
        ..Default::default()
    };
    let none: Option<&str> = None;
    let kept = Dataset::from_folders(folder.path(), none, &DatasetConfig::default(), &run).unwrap();
    assert_eq!(kept.images()[0].size, Size::new(96, 64));
    assert!(kept.pixels(&kept.epoch(1, 1).batches[0].items[0]).is_ok());
}

#[test]
fn transparent_pixels_are_laid_on_white_or_become_a_mask() {
    let folder = Folder::new();
    folder.rgba("1_a/x.png", 512, 512, [10, 20, 30, 0]);
    let dataset = load(&folder).unwrap();
    let item = dataset.epoch(1, 1).batches[0].items[0];
    let pixels = dataset.pixels(&item).unwrap();
    assert_eq!((pixels.data[0], pixels.mask), (1.0, None));
    let options = DatasetConfig {
        subset: SubsetConfig {
            alpha_mask: true,
            ..Default::default()
        },
        ..Default::default()
    };
    let dataset = Dataset::from_folder(folder.path(), &options).unwrap();
    let pixels = dataset.pixels(&item).unwrap();
    assert_eq!(pixels.mask, Some(vec![0.0; 512 * 512]));
    assert_eq!(pixels.data[0], gray(10));
}

#[test]
fn a_picture_that_vanishes_or_changes_is_a_clear_error() {
    let folder = Folder::new();
    folder.image("1_a/x.png", 64, 64);
    let dataset = load(&folder).unwrap();
    let item = dataset.epoch(1, 1).batches[0].items[0];
    folder.image("1_a/x.png", 72, 64);
    let error = dataset.pixels(&item).unwrap_err().to_string();
    assert!(
        error.contains("72x64") && error.contains("64x64"),
        "{error}"
    );
    fs::remove_file(folder.path().join("1_a/x.png")).unwrap();
    let error = dataset.pixels(&item).unwrap_err().to_string();
    assert!(error.contains("the file is gone"), "{error}");
}

#[test]
fn an_image_too_small_for_any_bucket_is_enlarged_and_named() {
    let folder = Folder::new();
    folder
        .image("1_a/tiny.png", 40, 30)
        .image("1_a/thin.png", 20, 3000)
        .image("1_a/good.png", 512, 512);
    let options = DatasetConfig {
        bucket_no_upscale: true,
        ..Default::default()
    };
    let dataset = Dataset::from_folder(folder.path(), &options).unwrap();
    for item in dataset
        .epoch(1, 1)
        .batches
        .iter()
        .flat_map(|batch| &batch.items)
    {
        assert!(dataset.pixels(item).unwrap().size.area() > 0);
    }
    let finding = dataset
        .findings()
        .iter()
        .find(|f| f.kind == FindingKind::TooSmall)
        .unwrap();
    assert!(
        finding.what.contains("tiny.png") && finding.what.contains("thin.png"),
        "{finding}"
    );
}

#[test]
fn masks_of_a_folder_are_cropped_with_their_images() {
    let folder = Folder::new();
    folder
        .image("img/x.png", 640, 512)
        .image("masks/x.png", 640, 512);
    let subset = SubsetConfig {
        image_dir: Some(folder.path().join("img")),
        conditioning_data_dir: Some(folder.path().join("masks")),
        ..Default::default()
    };
    let datasets = vec![DatasetConfig {
        subsets: vec![subset],
        ..Default::default()
    }];
    let dataset = Dataset::load(DataConfig {
        datasets: datasets.clone(),
        masked_loss: true,
        ..Default::default()
    })
    .unwrap();
    let pixels = dataset
        .pixels(&dataset.epoch(1, 1).batches[0].items[0])
        .unwrap();
    assert_eq!(
        pixels.mask.map(|m| m.len() as u64),
        Some(pixels.size.area())
    );
    folder.image("masks/y.png", 64, 64);
    let error = Dataset::load(DataConfig {
        datasets,
        masked_loss: true,
        ..Default::default()
    })
    .unwrap_err();
    assert!(
        matches!(error, Error::Mask { .. }) && error.to_string().contains("y.png"),
        "{error}"
    );
}

#[test]
fn several_folders_share_masks_and_regularization_needs_none() {
    let folder = Folder::new();
    folder
        .image("img/2_a/x.png", 64, 64)
        .image("img/1_b/y.png", 64, 64)
        .image("reg/1_c/z.png", 64, 64)
        .image("masks/x.png", 64, 64)
        .image("masks/y.png", 64, 64);
    let load = || {
        let options = DatasetConfig {
            subset: SubsetConfig {
                conditioning_data_dir: Some(folder.path().join("masks")),
                ..Default::default()
            },
            ..Default::default()
        };
        let run = DataConfig {
            masked_loss: true,
            ..Default::default()
        };
        let (img, reg) = (folder.path().join("img"), folder.path().join("reg"));
        let dataset = Dataset::from_folders(img, Some(reg), &options, &run)?;
        let masks = dataset.images().iter().map(|image| {
            let mask = image.mask.as_ref()?;
            let parts = mask.strip_prefix(folder.path()).unwrap().iter();
            Some(
                parts
                    .map(|p| p.to_str().unwrap())
                    .collect::<Vec<_>>()
                    .join("/"),
            )
        });
        Ok(masks.collect::<Vec<_>>())
    };
    let some = |path: &str| Some(path.to_string());
    // Training images by folder, then regularization.
    let shared = [some("masks/y.png"), some("masks/x.png"), None];
    assert_eq!(load().unwrap(), shared);

    // The same name in two folders: only folders of masks tell which is meant.
    folder.image("img/1_b/x.png", 64, 64);
    let error: Error = load().unwrap_err();
    for part in ["1_b", "2_a", "named like those of the images"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    folder
        .image("masks/1_b/x.png", 64, 64)
        .image("masks/1_b/y.png", 64, 64);
    let error = load().unwrap_err().to_string();
    assert!(
        error.contains("y.png") && error.contains("no image"),
        "{error}"
    );
    std::fs::remove_file(folder.path().join("masks/y.png")).unwrap();
    let own = ["masks/1_b/x.png", "masks/1_b/y.png", "masks/x.png"].map(some);
    assert_eq!(load().unwrap()[..3], own);
}

#[test]
fn validation_captions_are_complete_whatever_training_drops() {
    let folder = Folder::new();
    for i in 0..6 {
        folder.image(&format!("1_x/{i}.png"), 64, 64);
        folder.file(&format!("1_x/{i}.txt"), b"zoe, a, b, c, d, e, f, g");
    }
    let captions = |seed, change: &dyn Fn(&mut SubsetConfig)| -> Vec<String> {
        let mut options = DatasetConfig {
            validation_split: 0.5,
            ..Default::default()
        };
        options.subset.captions.caption_prefix = Some("photo of".into());
        change(&mut options.subset);
        let dataset = Dataset::from_folder(folder.path(), &options).unwrap();
        let batches = dataset.validation();
        let items = batches.iter().flat_map(|batch| &batch.items);
        items
            .map(|item| dataset.complete_caption(item, Streams::new(seed)))
            .collect()
    };
    let whole = ["photo of zoe, a, b, c, d, e, f, g"; 3];
    let changes: [&dyn Fn(&mut SubsetConfig); 5] = [
        &|s| s.captions.caption_dropout_rate = 1.0,
        &|s| s.captions.caption_dropout_every_n_epochs = 1,
        &|s| s.captions.caption_tag_dropout_rate = 1.0,
        &|s| s.captions.shuffle_caption = true,
        &|s| s.captions.token_warmup_step = 100.0,
    ];
    for (i, change) in changes.into_iter().enumerate() {
        assert_eq!(captions(i as u64, change), whole, "{i}");
    }
}

#[test]
fn metadata_files_give_captions_and_tags() {
    let folder = Folder::new();
    folder.image("img/a.png", 64, 64).image("img/b.png", 64, 64);
    folder.file(
        "meta.json",
        br#"{"a.png": {"caption": "a girl", "tags": "Smile, red hair"}, "b": {"tags": "solo"}, "gone.png": {}}"#,
    );
    let subset = SubsetConfig {
        image_dir: Some(folder.path().join("img")),
        metadata_file: Some(folder.path().join("meta.json")),
        num_repeats: 2,
        ..Default::default()
    };
    let config = DataConfig {
        datasets: vec![DatasetConfig {
            subsets: vec![subset],
            ..Default::default()
        }],
        ..Default::default()
    };
    let dataset = Dataset::load(config.clone()).unwrap();
    assert_eq!(captions(&dataset), ["a girl,Smile, red hair", "solo"]);
    assert_eq!(dataset.num_train_images(), 4);
    let tags = &dataset.stats()[0].tag_frequency["meta.json"];
    assert_eq!(
        tags.keys().collect::<Vec<_>>(),
        ["red hair", "smile", "solo"]
    );
    assert!(
        dataset
            .findings()
            .iter()
            .any(|f| f.kind == FindingKind::Metadata && f.what.contains("gone.png"))
    );
    folder.file("meta.json", b"{\n \"a.png\": {\"caption\": 3}\n}");
    let error = Dataset::load(config).unwrap_err().to_string();
    assert!(error.contains("line 2"), "{error}");
}

#[test]
fn alpha_channels_and_masks_that_do_not_fit_the_options_are_said_once() {
    let folder = Folder::new();
    folder
        .rgba("2_cut/a.png", 64, 64, [200, 0, 0, 0])
        .rgba("2_cut/b.webp", 64, 64, [200, 0, 0, 128])
        .rgba("2_cut/c.png", 64, 64, [200, 0, 0, 255])
        .jpeg("2_photo/d.jpg", 64, 64);
    let none: Option<&str> = None;
    let findings = |alpha_mask: bool, masked_loss: bool| -> Vec<String> {
        let options = DatasetConfig {
            subset: SubsetConfig {
                alpha_mask,
                ..Default::default()
            },
            ..Default::default()
        };
        let run = DataConfig {
            masked_loss,
            ..Default::default()
        };
        let dataset = Dataset::from_folders(folder.path(), none, &options, &run).unwrap();
        let about_masks = dataset.findings().iter();
        about_masks
            .filter(|finding| finding.kind == FindingKind::Masks)
            .map(ToString::to_string)
            .collect()
    };
    let off = findings(false, false);
    assert_eq!(off.len(), 1, "{off:?}");
    for part in ["2 of 4 images", "a.png, b.webp", "on white", "alpha_mask"] {
        assert!(off[0].contains(part), "{off:?}");
    }
    // The photos have no channel to be a mask.
    let on = findings(true, true);
    assert_eq!(on.len(), 1, "{on:?}");
    assert!(on[0].contains("2_photo"), "{on:?}");
    let asked = findings(false, true);
    assert!(
        asked.iter().any(|text| text.contains("there are no masks")),
        "{asked:?}"
    );
}
