//! A resumed run gives the bytes of an uninterrupted one.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::Device;
use lora_tests::golden_path;
use lora_train::{Event, Outcome, TrainConfig, Trainer};

fn config(output: &Path) -> TrainConfig {
    TrainConfig {
        pretrained_model_name_or_path: Some(golden_path("sd15", "mini_ldm.safetensors")),
        train_data_dir: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo")),
        output_dir: Some(output.to_path_buf()),
        output_name: Some("zoe".into()),
        resolution: "64".into(),
        min_bucket_reso: 64,
        max_bucket_reso: 64,
        train_batch_size: 7,
        gradient_accumulation_steps: 2,
        network_alpha: 4.0,
        network_dropout: Some(0.1),
        learning_rate: Some(1e-3),
        max_train_epochs: Some(3),
        shuffle_caption: true,
        flip_aug: true,
        save_state: true,
        seed: Some(7),
        ..TrainConfig::default()
    }
}

/// Trains; `stop_after` ends the run after so many batches.
fn train(config: TrainConfig, stop_after: Option<usize>) -> PathBuf {
    let stop = AtomicBool::new(false);
    let mut batches = 0;
    let mut observer = |event: &Event<'_>| {
        if let Event::Batch(_) = event {
            batches += 1;
            if Some(batches) == stop_after {
                stop.store(true, Ordering::Relaxed);
            }
        }
    };
    let mut trainer = Trainer::new(config, &Device::Cpu, &mut observer).unwrap();
    match trainer.run(&mut observer, &stop).unwrap() {
        Outcome::Finished(path) | Outcome::Stopped(path) => path,
    }
}

/// The bytes after the header: times in the metadata may differ.
fn tensors(path: &Path) -> Vec<u8> {
    let bytes = std::fs::read(path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].to_vec()
}

fn only_state(folder: &Path) -> PathBuf {
    let states: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with("-state"))
        .collect();
    assert_eq!(states.len(), 1, "{states:?}");
    states[0].clone()
}

/// Some of the demonstration's pictures: epochs of three batches.
fn few_pictures(folder: &Path) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo/10_zoe");
    let to = folder.join("2_zoe");
    std::fs::create_dir(&to).unwrap();
    let mut names: Vec<_> = std::fs::read_dir(&from)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    // Pictures and captions alternate.
    for name in names.iter().take(2 * 4) {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
    folder.to_path_buf()
}

/// Stops a run in the middle of an epoch, goes on, and compares with the run that was left
/// alone.
fn check(change: impl Fn(&mut TrainConfig)) {
    let folder = tempfile::tempdir().unwrap();
    let pictures = folder.path().join("pictures");
    std::fs::create_dir(&pictures).unwrap();
    let pictures = few_pictures(&pictures);
    let make = |name: &str| {
        let mut config = TrainConfig {
            train_data_dir: Some(pictures.clone()),
            train_batch_size: 3,
            ..config(&folder.path().join(name))
        };
        change(&mut config);
        config
    };
    let whole = train(
        TrainConfig {
            save_state: false,
            ..make("whole")
        },
        None,
    );
    train(make("parts"), Some(4));
    let state = only_state(&folder.path().join("parts"));
    let resumed = train(
        TrainConfig {
            resume: Some(state),
            ..make("resumed")
        },
        None,
    );
    assert!(
        tensors(&whole) == tensors(&resumed),
        "the resumed run ended elsewhere"
    );
}

#[test]
fn adamw_with_accumulation_goes_on_bit_for_bit() {
    check(|_| ());
}

#[test]
fn every_kind_of_optimizer_goes_on_bit_for_bit() {
    for (optimizer, args) in [
        ("Prodigy", vec!["betas=0.9,0.99", "weight_decay=0.01"]),
        ("AdamW8bit", vec![]),
        ("Lion", vec![]),
        ("DAdaptAdam", vec![]),
        (
            "Adafactor",
            vec!["relative_step=False", "scale_parameter=False"],
        ),
        (
            "Adafactor",
            vec!["relative_step=True", "scale_parameter=True"],
        ),
        ("AdamWScheduleFree", vec![]),
        ("RAdamScheduleFree", vec![]),
        ("SGDScheduleFree", vec!["momentum=0.9"]),
        ("ProdigyPlusScheduleFree", vec![]),
        ("DAdaptation", vec![]),
        ("Lion8bit", vec![]),
        ("SGDNesterov", vec!["momentum=0.9"]),
        ("Adam", vec![]),
        ("came_pytorch.CAME", vec![]),
    ] {
        check(|config| {
            config.optimizer_type = optimizer.into();
            config.optimizer_args = args.iter().map(|a| a.to_string()).collect();
            config.max_train_epochs = Some(2);
            config.learning_rate = config.adaptive().then_some(1.0).or(Some(1e-3));
        });
    }
}

#[test]
fn schedules_averages_and_norms_go_on_bit_for_bit() {
    check(|config| {
        config.lr_scheduler = "cosine".into();
        config.lr_warmup_steps = Some(lora_train::Steps::Count(3));
        config.ema_decay = Some(0.9);
        config.scale_weight_norms = Some(0.01);
        config.stop_text_encoder_training = Some(lora_train::Steps::Share(0.5));
        config.noise_offset = Some(0.05);
        config.cache_latents_to_disk = true;
    });
}

#[test]
fn random_crops_go_on_bit_for_bit() {
    check(|config| config.random_crop = true);
}

#[test]
fn a_state_of_another_run_is_refused_with_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    train(config(&folder.path().join("a")), Some(6));
    let state = only_state(&folder.path().join("a"));
    type Change = dyn Fn(&mut TrainConfig);
    let changes: [(&Change, &str); 4] = [
        (&|c| c.network_dim = Some(2), "network_dim"),
        (&|c| c.seed = Some(8), "seed"),
        (&|c| c.max_train_epochs = Some(4), "extend_run"),
        (&|c| c.shuffle_caption = false, "shuffle_caption"),
    ];
    for (change, hint) in changes {
        let mut config = TrainConfig {
            resume: Some(state.clone()),
            ..config(&folder.path().join("b"))
        };
        change(&mut config);
        let error = Trainer::new(config, &Device::Cpu, &mut |_: &Event<'_>| {}).unwrap_err();
        assert!(error.to_string().contains(hint), "{error}");
    }
}

#[test]
fn a_finished_run_can_be_extended() {
    let folder = tempfile::tempdir().unwrap();
    let short = TrainConfig {
        max_train_epochs: Some(1),
        ..config(&folder.path().join("short"))
    };
    train(short, None);
    let state = folder.path().join("short/zoe-state");
    let longer = TrainConfig {
        resume: Some(state),
        extend_run: true,
        ..config(&folder.path().join("longer"))
    };
    let longer = train(longer, None);
    let whole = train(config(&folder.path().join("whole")), None);
    // A constant learning rate: nothing depends on the length of the run.
    assert!(tensors(&longer) == tensors(&whole));
}

/// The child's part of the test below: it trains until it is killed.
#[test]
fn child_process() {
    let Ok(folder) = std::env::var("RESUME_CHILD") else {
        return;
    };
    let folder = PathBuf::from(folder);
    let mut config = killed_config(&folder);
    // The newest complete state.
    let mut states: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with("-state"))
        .collect();
    states.sort();
    config.resume = states.pop();
    train(config, None);
}

fn killed_config(folder: &Path) -> TrainConfig {
    TrainConfig {
        save_every_n_steps: Some(1),
        save_last_n_steps_state: Some(2),
        gradient_accumulation_steps: 1,
        max_train_epochs: Some(2),
        ..config(folder)
    }
}

fn spawn(folder: &Path, threads: usize) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["child_process", "--exact", "--quiet"])
        .env("RESUME_CHILD", folder)
        .env("RAYON_NUM_THREADS", threads.to_string())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_at_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let whole = train(killed_config(&folder.path().join("whole")), None);
    let output = folder.path().join("killed");
    std::fs::create_dir(&output).unwrap();
    let result = output.join("zoe.safetensors");
    // Times between two kills that reach loading, training and writing.
    for (attempt, millis) in [900u64, 1300, 1700, 1100, 1500, 2100]
        .into_iter()
        .enumerate()
    {
        let mut child = spawn(&output, 1 + attempt % 2);
        let until = Instant::now() + Duration::from_millis(millis);
        while Instant::now() < until && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(20));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    if !result.exists() {
        assert!(spawn(&output, 2).wait().unwrap().success());
    }
    assert!(tensors(&whole) == tensors(&result));
}
