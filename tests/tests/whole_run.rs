//! Whole runs on the miniature model: from a folder of pictures to a file that draws.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Tensor};
use lora_core::format::TensorFile;
use lora_core::{AdapterSet, Component};
use lora_sd15::{StableDiffusion, Txt2Img};
use lora_tests::golden_path;
use lora_train::pick::{PickConfig, judge};
use lora_train::{Event, Outcome, SamplePrompt, Settings, TrainConfig, Trainer};

fn pictures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo")
}

fn model() -> PathBuf {
    golden_path("sd15", "mini_ldm.safetensors")
}

fn config(output: &Path) -> TrainConfig {
    TrainConfig {
        pretrained_model_name_or_path: Some(model()),
        train_data_dir: Some(pictures()),
        output_dir: Some(output.to_path_buf()),
        output_name: Some("zoe".into()),
        resolution: "64".into(),
        min_bucket_reso: 64,
        max_bucket_reso: 64,
        train_batch_size: 3,
        network_alpha: 4.0,
        learning_rate: Some(1e-3),
        max_train_steps: 12,
        seed: Some(7),
        ..TrainConfig::default()
    }
}

/// Trains to the end; returns the file and the loss of every batch.
fn train(config: TrainConfig) -> (PathBuf, Vec<f64>) {
    let mut losses = Vec::new();
    let mut observer = |event: &Event<'_>| {
        if let Event::Batch(batch) = event {
            losses.push(batch.loss);
        }
    };
    let mut trainer = Trainer::new(config, &Device::Cpu, &mut observer).unwrap();
    let outcome = trainer.run(&mut observer, &AtomicBool::new(false)).unwrap();
    let Outcome::Finished(path) = outcome else {
        panic!("stopped")
    };
    (path, losses)
}

fn model_hash(path: &Path) -> String {
    TensorFile::open(path).unwrap().metadata()["sshs_model_hash"].clone()
}

#[test]
fn training_lowers_the_loss_and_the_result_changes_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let (path, losses) = train(TrainConfig {
        max_train_steps: 40,
        ..config(folder.path())
    });
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(
        mean(&losses[30..]) < 0.9 * mean(&losses[..10]),
        "{losses:?}"
    );

    let mut sd = StableDiffusion::load(model(), DType::F32, &Device::Cpu).unwrap();
    let set = AdapterSet::load(&path, &Device::Cpu).unwrap();
    assert_eq!(
        (
            set.count(&Component::Unet),
            set.count(&Component::TextEncoder)
        ),
        (192, 18)
    );
    sd.add_adapter("zoe", set);
    let mut draw = |prompt: &str| {
        let request = Txt2Img {
            prompt: prompt.into(),
            width: 64,
            height: 64,
            steps: 4,
            seed: 3,
            ..Txt2Img::default()
        };
        sd.txt2img(&request, &mut |_| true).unwrap().remove(0)
    };
    let plain = draw("zoe");
    assert_ne!(draw("zoe <lora:zoe:1>"), plain);
    assert_eq!(draw("zoe <lora:zoe:0>"), plain);
    assert_eq!(
        draw("zoe"),
        plain,
        "the base model comes back to its exact bits"
    );
}

#[test]
fn the_same_seed_gives_the_same_file_and_another_seed_another() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, seed| {
        let (path, _) = train(TrainConfig {
            output_name: Some(name.into()),
            seed: Some(seed),
            max_train_steps: 4,
            network_dropout: Some(0.1),
            ..config(folder.path())
        });
        model_hash(&path)
    };
    let first = run("a", 1);
    assert_eq!(first, run("b", 1));
    assert_ne!(first, run("c", 2));
}

#[test]
fn intermediate_files_settings_and_metadata_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = train(TrainConfig {
        max_train_epochs: Some(3),
        save_every_n_epochs: Some(1),
        save_last_n_epochs: Some(1),
        save_every_n_steps: Some(15),
        train_batch_size: 12,
        gradient_accumulation_steps: 2,
        save_precision: Some("fp16".into()),
        metadata_author: Some("me".into()),
        optimizer_args: vec!["weight_decay=0.1".into(), "betas=0.9,0.99".into()],
        ..config(folder.path())
    });
    let mut names: Vec<String> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    // 120 pictures a pass in batches of 12, two of them per update: 5 updates an epoch.
    assert_eq!(
        names,
        [
            "zoe-000002.safetensors",
            "zoe-step00000015.safetensors",
            "zoe.json",
            "zoe.safetensors",
            "zoe.toml"
        ]
    );

    let file = TensorFile::open(&path).unwrap();
    assert!(
        file.names()
            .iter()
            .all(|n| file.dtype(n) == Some(DType::F16))
    );
    let metadata = file.metadata();
    for (key, value) in [
        ("ss_steps", "15"),
        ("ss_epoch", "3"),
        ("ss_num_train_images", "120"),
        (
            "ss_optimizer",
            "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))",
        ),
        (
            "ss_dataset_dirs",
            r#"{"10_zoe":{"img_count":12,"n_repeats":10}}"#,
        ),
        ("ss_base_model_version", "sd_v1"),
        ("modelspec.author", "me"),
    ] {
        assert_eq!(metadata.get(key).map(String::as_str), Some(value), "{key}");
    }
    assert!(metadata["ss_tag_frequency"].contains(r#""portrait":12"#));

    // The settings file is a config file that means the same.
    let settings = Settings::from_toml(&folder.path().join("zoe.toml")).unwrap();
    let again = TrainConfig::from_settings(&settings).unwrap();
    assert_eq!(
        (
            again.seed,
            again.gradient_accumulation_steps,
            again.max_train_epochs
        ),
        (Some(7), 2, Some(3))
    );
}

#[test]
fn stopping_saves_what_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    let mut quiet = |_: &Event<'_>| {};
    let mut trainer = Trainer::new(config(folder.path()), &Device::Cpu, &mut quiet).unwrap();
    let mut observer = |event: &Event<'_>| {
        if matches!(event, Event::Batch(batch) if batch.step == 2) {
            stop.store(true, Ordering::Relaxed);
        }
    };
    let Outcome::Stopped(path) = trainer.run(&mut observer, &stop).unwrap() else {
        panic!("finished")
    };
    assert_eq!(path.file_name().unwrap(), "zoe-step00000002.safetensors");
    assert_eq!(
        AdapterSet::load(&path, &Device::Cpu).unwrap().metadata()["ss_steps"],
        "2"
    );
}

#[test]
fn training_continues_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let (first, _) = train(TrainConfig {
        max_train_steps: 2,
        ..config(folder.path())
    });
    // Learning rate 0 on the UNet: its weights must come out as they went in.
    let (second, _) = train(TrainConfig {
        max_train_steps: 2,
        output_name: Some("second".into()),
        network_weights: Some(first.clone()),
        unet_lr: Some(0.0),
        ..config(folder.path())
    });
    let (first, second) = (
        TensorFile::open(&first).unwrap(),
        TensorFile::open(&second).unwrap(),
    );
    let (mut unet_same, mut text_changed) = (true, false);
    for name in first.names() {
        let values = |file: &TensorFile| {
            file.tensor(&name, &Device::Cpu)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
        };
        let same = values(&first) == values(&second);
        unet_same &= same || !name.starts_with("lora_unet");
        text_changed |= !same && name.starts_with("lora_te");
    }
    assert!(unet_same && text_changed);
}

#[test]
fn every_option_of_a_run_with_masks_noise_and_plus_rates_works_together() {
    let folder = tempfile::tempdir().unwrap();
    let (_, losses) = train(TrainConfig {
        max_train_steps: 3,
        network_args: vec![
            "conv_dim=2".into(),
            "conv_alpha=1".into(),
            "rank_dropout=0.1".into(),
            "loraplus_lr_ratio=4".into(),
            "mid_lr_weight=0.5".into(),
        ],
        noise_offset: Some(0.05),
        multires_noise_iterations: Some(4),
        min_snr_gamma: Some(5.0),
        loss_type: "huber".into(),
        flip_aug: true,
        random_crop: true,
        shuffle_caption: true,
        caption_dropout_rate: 0.2,
        weighted_captions: true,
        max_token_length: Some(150),
        clip_skip: Some(2),
        scale_weight_norms: Some(0.5),
        lr_scheduler: "cosine".into(),
        lr_warmup_steps: Some(lora_train::Steps::Count(1)),
        optimizer_type: "AdamW8bit".into(),
        ..config(folder.path())
    });
    assert!(losses.iter().all(|l| l.is_finite()));
}

#[test]
fn loha_and_lokr_train_with_prodigy_and_their_files_load() {
    let folder = tempfile::tempdir().unwrap();
    for (algo, extra) in [("loha", "use_tucker=True"), ("lokr", "factor=4")] {
        let (path, losses) = train(TrainConfig {
            output_name: Some(algo.into()),
            network_module: Some("lycoris.kohya".into()),
            network_args: vec![format!("algo={algo}"), extra.into()],
            network_dim: Some(2),
            network_alpha: 1.0,
            optimizer_type: "Prodigy".into(),
            optimizer_args: vec!["betas=0.9,0.99".into()],
            learning_rate: Some(1.0),
            max_train_steps: 3,
            scale_weight_norms: Some(1.0),
            ..config(folder.path())
        });
        assert!(losses.iter().all(|l| l.is_finite()));
        let set = AdapterSet::load(&path, &Device::Cpu).unwrap();
        assert_eq!(set.count(&Component::Unet), 282);
        assert_eq!(set.iter().next().unwrap().1.family().name(), algo);
        assert_eq!(set.metadata()["ss_network_module"], "lycoris.kohya");
    }
}

#[test]
fn every_family_trains_and_its_file_loads_and_draws() {
    let folder = tempfile::tempdir().unwrap();
    let mut sd = StableDiffusion::load(model(), DType::F32, &Device::Cpu).unwrap();
    for args in [
        &["algo=locon", "dora_wd=True"][..],
        &["algo=loha", "dora_wd=True", "wd_on_output=False"],
        &["algo=lokr", "decompose_both=True", "factor=2"],
        &["algo=ia3"],
        &["algo=glora"],
        &["algo=diag-oft", "constraint=0.01", "rescaled=True"],
        &["algo=boft"],
        &["algo=full", "train_norm=True"],
        &["algo=locon", "use_scalar=True"],
        &["algo=loha", "rank_dropout=0.2", "rank_dropout_scale=True"],
        // sd-scripts' own.
        &["enable_all_linear=True"],
    ] {
        let kohya = args[0].starts_with("enable");
        let preset = (!kohya).then_some("preset=attn-mlp");
        let module = if kohya {
            "networks.oft"
        } else {
            "lycoris.kohya"
        };
        let (path, losses) = train(TrainConfig {
            output_name: Some(args.join("-")),
            network_module: Some(module.into()),
            network_args: args
                .iter()
                .copied()
                .chain(preset)
                .map(str::to_string)
                .collect(),
            // BOFT needs blocks that divide the miniature's widths into powers of two.
            network_dim: Some(8),
            max_train_steps: 2,
            ..config(folder.path())
        });
        assert!(losses.iter().all(|l| l.is_finite()), "{args:?}: {losses:?}");
        let set = AdapterSet::load(&path, &Device::Cpu).unwrap_or_else(|e| panic!("{args:?}: {e}"));
        assert!(set.count(&Component::Unet) >= 192, "{args:?}");
        sd.add_adapter("x", set);
        let mut draw = |prompt: String| {
            let request = Txt2Img {
                prompt,
                width: 64,
                height: 64,
                steps: 2,
                ..Txt2Img::default()
            };
            sd.txt2img(&request, &mut |_| true).unwrap().remove(0)
        };
        assert_ne!(
            draw("zoe <lora:x:1>".into()),
            draw("zoe".into()),
            "{args:?}"
        );
    }
}

#[test]
fn a_run_shows_samples_validation_and_logs() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("prompts.txt");
    std::fs::write(
        &prompts,
        "# two pictures\nzoe --w 64 --h 64 --s 2 --d 5\nzoe, red hat --w 64 --h 64 --s 2\n",
    )
    .unwrap();
    let config = TrainConfig {
        max_train_epochs: Some(2),
        validation_split: Some(0.34),
        sample_prompts: Some(prompts),
        sample_every_n_epochs: Some(1),
        sample_at_first: true,
        logging_dir: Some(folder.path().join("logs")),
        ..config(&folder.path().join("out"))
    };
    let mut validations = Vec::new();
    let mut samples = Vec::new();
    let mut observers = lora_train::logs::Observers::for_run(&config).unwrap();
    observers.add(|event: &Event<'_>| match event {
        Event::Validated(v) => validations.push((v.step, v.loss, v.by_timestep.clone())),
        Event::Sample { path, .. } => samples.push(path.to_path_buf()),
        Event::Warning(text) => assert!(!text.contains("not drawn"), "{text}"),
        _ => {}
    });
    let mut trainer = Trainer::new(config.clone(), &Device::Cpu, &mut observers).unwrap();
    trainer
        .run(&mut observers, &AtomicBool::new(false))
        .unwrap();
    // The same weights give the same validation loss.
    let last = trainer.validate().unwrap().unwrap();
    drop(observers);
    assert_eq!(validations.len(), 2);
    assert_eq!(validations[1].1, last.loss);
    assert_eq!(
        last.by_timestep.iter().map(|(t, _)| *t).collect::<Vec<_>>(),
        [200, 400, 600, 800]
    );

    assert_eq!(samples.len(), 6, "2 prompts at first and after each epoch");
    let name = samples[2]
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .to_string();
    assert!(
        name.starts_with("zoe_e000001_00_") && name.ends_with("_5.png"),
        "{name}"
    );
    let first = std::fs::read(&samples[0]).unwrap();
    assert!(String::from_utf8_lossy(&first).contains("Steps: 2, Sampler: DDIM"));
    assert_ne!(
        first,
        std::fs::read(&samples[4]).unwrap(),
        "training changes pictures"
    );

    let out = folder.path().join("out");
    for file in ["zoe.safetensors", "zoe.toml", "zoe.json", "zoe-loss.png"] {
        assert!(out.join(file).exists(), "{file}");
    }
    let log = std::fs::read_to_string(out.join("zoe.log.jsonl")).unwrap();
    let count = |what: &str| log.matches(&format!("\"event\":\"{what}\"")).count();
    assert_eq!(
        (
            count("batch"),
            count("validation"),
            count("sample"),
            count("finished")
        ),
        (54, 2, 6, 1)
    );
    // Both forms of the settings are read back; of the two lengths only the one that decides.
    let again = lora_train::gui::read_config(&out.join("zoe.toml")).unwrap();
    let written = TrainConfig {
        max_train_steps: TrainConfig::default().max_train_steps,
        ..trainer.config().clone()
    };
    assert_eq!(
        TrainConfig::from_settings(&again.settings).unwrap(),
        written
    );
    lora_train::gui::read_config(&out.join("zoe.json")).unwrap();

    let run = std::fs::read_dir(folder.path().join("logs"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let events = std::fs::read_dir(run.path().join("network_train"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let bytes = std::fs::read(events.path()).unwrap();
    for tag in [
        "loss/current",
        "lr/unet",
        "loss/validation/step_average",
        "sample/1",
    ] {
        assert!(
            bytes.windows(tag.len()).any(|w| w == tag.as_bytes()),
            "{tag}"
        );
    }
}

#[test]
fn files_of_a_run_are_judged_by_loss_drift_and_variety() {
    let folder = tempfile::tempdir().unwrap();
    let config = TrainConfig {
        max_train_epochs: Some(2),
        save_every_n_epochs: Some(1),
        validation_split: Some(0.34),
        learning_rate: Some(3e-3),
        ..config(folder.path())
    };
    train(config.clone());
    let mut ignore = |_: &Event<'_>| {};
    let mut trainer = Trainer::new(config, &Device::Cpu, &mut ignore).unwrap();
    let prompt = |text: &str| {
        SamplePrompt::from_line(&format!("{text} --w 64 --h 64 --s 2"), "euler").unwrap()
    };
    let pick = PickConfig {
        prompts: vec![prompt("zoe"), prompt("zoe, red hat")],
        neutral: vec![prompt("a house")],
        seeds: vec![1, 2],
    };
    let files = ["zoe-000001.safetensors", "zoe.safetensors"].map(|f| folder.path().join(f));
    let list = judge(&mut trainer, &files, &pick).unwrap();
    assert_eq!(list.len(), 2);
    assert!(list[0].score <= list[1].score);
    assert!(list.iter().all(|j| j.held_out && j.loss > 0.0));
    let drift = |name: &str| list.iter().find(|j| j.file.ends_with(name)).unwrap().drift;
    assert!(0.0 < drift("zoe-000001.safetensors"));
    assert!(drift("zoe-000001.safetensors") < drift("zoe.safetensors"));

    // A file of another run is refused, not shown in part.
    let other = TrainConfig {
        network_dim: Some(2),
        max_train_steps: 1,
        ..self::config(&folder.path().join("other"))
    };
    let (other, _) = train(other);
    assert!(
        trainer
            .show(&other)
            .unwrap_err()
            .to_string()
            .contains("no file of this run")
    );
}

#[test]
fn a_trained_scalar_is_folded_into_the_file() {
    for algo in ["locon", "loha", "lokr"] {
        let folder = tempfile::tempdir().unwrap();
        let config = TrainConfig {
            network_module: Some("lycoris.kohya".into()),
            network_args: vec![
                format!("algo={algo}"),
                "preset=attn-mlp".into(),
                "use_scalar=True".into(),
            ],
            max_train_steps: 3,
            ..config(folder.path())
        };
        let mut ignore = |_: &Event<'_>| {};
        let mut trainer = Trainer::new(config, &Device::Cpu, &mut ignore).unwrap();
        trainer.run(&mut ignore, &AtomicBool::new(false)).unwrap();
        let file = AdapterSet::load(folder.path().join("zoe.safetensors"), &Device::Cpu).unwrap();
        let mut largest = 0f32;
        for (name, live) in trainer.adapters().iter() {
            let base = Tensor::zeros(live.matrix_dims(), DType::F32, &Device::Cpu).unwrap();
            let delta = |adapter: &dyn lora_core::Adapter| {
                let delta = adapter.delta(&base, 1.0).unwrap();
                delta.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            let saved = delta(file.get(name).unwrap().as_ref());
            for (a, b) in delta(live.as_ref()).iter().zip(&saved) {
                assert!(
                    (a - b).abs() <= 1e-6 * (1.0 + a.abs()),
                    "{algo} {name}: {a} {b}"
                );
                largest = largest.max(a.abs());
            }
        }
        assert!(largest > 0.0, "{algo}: nothing was learned");
    }
}
