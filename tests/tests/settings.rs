//! What settings do to a run: refused with words, named where they do nothing, or in effect.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use candle_core::{Device, Tensor};
use lora_core::format::TensorFile;
use lora_sd15::{Checkpoint, Posterior};
use lora_tests::golden_path;
use lora_train::{Event, Model, Outcome, Parts, Sd15, Steps, TrainConfig, Trainer};

fn model() -> PathBuf {
    golden_path("sd15", "mini_ldm.safetensors")
}

fn config(output: &Path) -> TrainConfig {
    TrainConfig {
        pretrained_model_name_or_path: Some(model()),
        train_data_dir: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo")),
        output_dir: Some(output.to_path_buf()),
        output_name: Some("zoe".into()),
        resolution: "64".into(),
        min_bucket_reso: 64,
        max_bucket_reso: 64,
        train_batch_size: 6,
        learning_rate: Some(1e-3),
        max_train_steps: 2,
        seed: Some(7),
        ..TrainConfig::default()
    }
}

/// What a run said, and how it ended.
#[derive(Debug, Default)]
struct Told {
    warnings: Vec<String>,
    plan: String,
    rates: Vec<f64>,
    skipped: usize,
    samples: usize,
}

fn watch(told: &mut Told) -> impl FnMut(&Event<'_>) {
    |event| match event {
        Event::Warning(text) => told.warnings.push(text.to_string()),
        Event::Planned(plan) => told.plan = plan.to_string(),
        Event::Batch(batch) => told.rates.push(batch.learning_rates[0].1),
        Event::Skipped { .. } => told.skipped += 1,
        Event::Sample { .. } => told.samples += 1,
        _ => {}
    }
}

fn run(config: TrainConfig) -> (Told, Result<PathBuf, String>) {
    let mut told = Told::default();
    let mut observer = watch(&mut told);
    let result = match Trainer::new(config, &Device::Cpu, &mut observer) {
        Ok(mut trainer) => trainer.run(&mut observer, &AtomicBool::new(false)),
        Err(error) => Err(error),
    };
    drop(observer);
    let path = result.map(|outcome| match outcome {
        Outcome::Finished(path) | Outcome::Stopped(path) => path,
    });
    (told, path.map_err(|error| error.to_string()))
}

fn weights(path: &Path) -> String {
    TensorFile::open(path).unwrap().metadata()["sshs_model_hash"].clone()
}

/// The names in a folder, without settings and logs.
fn written(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".safetensors") || name.ends_with("-state"))
        .collect();
    names.sort();
    names
}

type Change<'a> = &'a dyn Fn(&mut TrainConfig);

#[test]
fn settings_that_would_do_harm_are_refused_before_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let refused: &[(Change, &[&str])] = &[
        // sd-scripts would remove the very file that it saved.
        (
            &|c| c.save_last_n_epochs = Some(0),
            &["save_last_n_epochs", "at least 1"],
        ),
        (
            &|c| c.save_last_n_steps = Some(0),
            &["save_last_n_steps", "at least 1"],
        ),
        (&|c| c.huber_c = -0.1, &["huber_c", "above 0"]),
        (&|c| c.huber_scale = f64::NAN, &["huber_scale", "above 0"]),
        (
            &|c| c.max_grad_norm = -1.0,
            &["max_grad_norm", "0, which is off"],
        ),
        (
            &|c| {
                c.cache_latents_to_disk = true;
                c.color_aug = true;
            },
            &["cache_latents", "color_aug"],
        ),
        (
            &|c| {
                c.lr_scheduler = "cosine".into();
                c.lr_scheduler_args = vec!["T_max=10".into()];
            },
            &["T_max", "cosine takes none", "lr_scheduler_type"],
        ),
        (
            &|c| {
                c.lr_scheduler = "piecewise_constant".into();
                c.lr_scheduler_args = vec!["step_rule='1:1,0.1'".into()];
            },
            &["step_rule", "step_rules"],
        ),
        (
            &|c| c.lr_warmup_steps = Some(Steps::Count(3)),
            &["constant_with_warmup"],
        ),
        (
            &|c| c.base_weights_multiplier = vec![0.5],
            &["1 numbers for 0 base_weights"],
        ),
        (
            &|c| {
                c.optimizer_type = "Prodigy".into();
                c.learning_rate = Some(1.0);
                c.text_encoder_lr = vec![0.5];
            },
            &["0.5 and 1", "text_encoder_lr", "split_groups=True"],
        ),
        (
            &|c| {
                c.optimizer_type = "Prodigy".into();
                c.optimizer_args = vec!["weight_decay=0.01,".into()];
            },
            &["weight_decay", "trailing comma"],
        ),
    ];
    for (change, says) in refused {
        let mut config = config(folder.path());
        change(&mut config);
        let error = run(config).1.expect_err(says[0]);
        for part in *says {
            assert!(error.contains(part), "{part:?} is missing in: {error}");
        }
    }
    assert_eq!(written(folder.path()), [""; 0]);
}

#[test]
fn settings_that_do_nothing_are_named() {
    let plain = config(Path::new("out"));
    let about_effects = |config: &TrainConfig| -> Vec<String> {
        let warnings = config.warnings().into_iter();
        warnings.filter(|w| w.contains("no effect")).collect()
    };
    assert_eq!(about_effects(&plain), [""; 0]);
    let ignored: &[(Change, &str)] = &[
        (
            &|c| c.dataset_config = Some("d.toml".into()),
            "train_data_dir has no effect: dataset_config",
        ),
        (
            &|c| {
                c.in_json = Some("d.json".into());
                c.reg_data_dir = Some("reg".into());
            },
            "reg_data_dir has no effect: in_json decides",
        ),
        (
            &|c| {
                c.optimizer_type = "AdamWScheduleFree".into();
                c.lr_warmup_steps = Some(Steps::Count(3));
            },
            "lr_warmup_steps has no effect",
        ),
        (
            &|c| {
                c.sample_prompts = Some("p.txt".into());
                c.sample_every_n_epochs = Some(1);
                c.sample_every_n_steps = Some(5);
            },
            "sample_every_n_steps has no effect: sample_every_n_epochs decides",
        ),
        (
            &|c| c.multires_noise_discount = 0.5,
            "multires_noise_discount has no effect without multires_noise_iterations",
        ),
        (
            &|c| c.noise_offset_random_strength = true,
            "without noise_offset",
        ),
        (
            &|c| c.huber_c = 0.2,
            "huber_c has no effect without loss_type huber",
        ),
        (
            &|c| c.lr_scheduler_num_cycles = 3,
            "lr_scheduler_num_cycles",
        ),
        (
            &|c| c.lr_scheduler_power = 2.0,
            "without lr_scheduler polynomial",
        ),
        (
            &|c| c.save_last_n_epochs = Some(3),
            "without save_every_n_epochs",
        ),
        (&|c| c.keep_tokens = 1, "without shuffle_caption"),
        (
            &|c| c.sample_prompts = Some("p.txt".into()),
            "sample_prompts has no effect without sample_every_n_epochs",
        ),
        (
            &|c| c.max_validation_steps = Some(3),
            "without validation_split",
        ),
        (&|c| c.enable_bucket = false, "min_bucket_reso"),
        (&|c| c.prior_loss_weight = 0.5, "without reg_data_dir"),
        (&|c| c.log_prefix = Some("x".into()), "without logging_dir"),
        (
            &|c| c.text_encoder_lr = vec![1e-4, 2e-4],
            "only the first number",
        ),
    ];
    for (change, says) in ignored {
        let mut config = plain.clone();
        change(&mut config);
        let warnings = config.warnings().join("\n");
        assert!(
            warnings.contains(says),
            "{says:?} is missing in: {warnings}"
        );
    }
    // With what they need, the same settings are fine.
    let used = TrainConfig {
        loss_type: "huber".into(),
        huber_c: 0.2,
        lr_scheduler: "cosine_with_restarts".into(),
        lr_scheduler_num_cycles: 3,
        save_every_n_epochs: Some(1),
        save_last_n_epochs: Some(3),
        shuffle_caption: true,
        keep_tokens: 1,
        validation_split: Some(0.2),
        max_validation_steps: Some(3),
        ..plain
    };
    assert_eq!(about_effects(&used), [""; 0]);
}

#[test]
fn a_dataset_config_names_what_it_overrides() {
    let folder = tempfile::tempdir().unwrap();
    let pictures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo/10_zoe");
    let toml = format!(
        "[general]\nresolution = 64\nmin_bucket_reso = 64\n[[datasets]]\nbatch_size = 4\n\
         [[datasets.subsets]]\nimage_dir = {pictures:?}\nkeep_tokens = 2\n"
    );
    std::fs::write(folder.path().join("d.toml"), toml).unwrap();
    let config = TrainConfig {
        train_data_dir: None,
        dataset_config: Some(folder.path().join("d.toml")),
        // Larger than the largest bucket below, were it not for the file.
        resolution: "128".into(),
        train_batch_size: 3,
        keep_tokens: 1,
        shuffle_caption: true,
        ..config(folder.path())
    };
    let (told, result) = run(config);
    result.unwrap();
    let named: Vec<&String> = told
        .warnings
        .iter()
        .filter(|w| w.contains("beside it"))
        .collect();
    for part in [
        "resolution",
        "train_batch_size 3",
        "it says 4",
        "keep_tokens 1",
    ] {
        assert!(named.iter().any(|w| w.contains(part)), "{part}: {named:?}");
    }
    // What the file does not say is taken from the settings.
    assert_eq!(named.len(), 3, "{named:?}");
    assert!(
        told.plan.contains("12 pictures a pass") && told.plan.contains("3 batches"),
        "{}",
        told.plan
    );
}

#[test]
fn a_piecewise_schedule_follows_its_rules() {
    let folder = tempfile::tempdir().unwrap();
    let (told, result) = run(TrainConfig {
        lr_scheduler: "piecewise_constant".into(),
        lr_scheduler_args: vec!["step_rules='1:2,0.5:3,0.1'".into()],
        max_train_steps: 4,
        ..config(folder.path())
    });
    result.unwrap();
    let want = [1e-3, 1e-3, 5e-4, 1e-4];
    let near = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-12;
    // Rules of the first two updates, of the third, and of the rest, after sd-scripts' count.
    assert!(
        told.rates.len() == 4 && told.rates.iter().zip(&want).all(near),
        "{:?}",
        told.rates
    );
}

#[test]
fn samples_every_0_epochs_leave_the_steps_to_decide() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("prompts.txt");
    std::fs::write(&prompts, "zoe --w 64 --h 64 --s 1\n").unwrap();
    for (epochs, samples) in [(Some(0), 2), (None, 2), (Some(1), 1)] {
        let (told, result) = run(TrainConfig {
            sample_prompts: Some(prompts.clone()),
            sample_every_n_epochs: epochs,
            sample_every_n_steps: Some(1),
            ..config(folder.path())
        });
        result.unwrap();
        assert_eq!(told.samples, samples, "{epochs:?}");
    }
}

#[test]
fn a_cache_on_disk_is_a_cache() {
    let folder = tempfile::tempdir().unwrap();
    let hash = |name: &str, change: Change| {
        let mut config = config(&folder.path().join(name));
        change(&mut config);
        weights(&run(config).1.unwrap())
    };
    let memory = hash("memory", &|c| c.cache_latents = true);
    // One sample per picture for the whole run, written or not, and read back the same.
    assert_eq!(hash("disk", &|c| c.cache_latents_to_disk = true), memory);
    assert_eq!(hash("disk", &|c| c.cache_latents_to_disk = true), memory);
    assert_ne!(hash("none", &|_| ()), memory);
}

#[test]
fn the_validation_loss_does_not_depend_on_what_training_drops() {
    let folder = tempfile::tempdir().unwrap();
    let loss = |change: Change| {
        let mut config = TrainConfig {
            validation_split: Some(0.34),
            ..config(folder.path())
        };
        change(&mut config);
        let mut trainer = Trainer::new(config, &Device::Cpu, &mut |_: &Event<'_>| {}).unwrap();
        trainer.validate().unwrap().unwrap().loss
    };
    let plain = loss(&|_| ());
    let same: [Change; 5] = [
        &|c| c.caption_dropout_rate = 1.0,
        &|c| c.caption_dropout_every_n_epochs = 1,
        &|c| c.caption_tag_dropout_rate = 1.0,
        &|c| c.shuffle_caption = true,
        &|c| c.seed = Some(8),
    ];
    for (i, change) in same.into_iter().enumerate() {
        assert_eq!(loss(change), plain, "{i}");
    }
    // Captions do count.
    assert_ne!(loss(&|c| c.caption_prefix = Some("a house".into())), plain);
}

#[test]
fn what_does_not_learn_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let plan = |change: Change| {
        let mut config = config(folder.path());
        change(&mut config);
        let trainer = Trainer::new(config, &Device::Cpu, &mut |_: &Event<'_>| {}).unwrap();
        trainer.plan().to_string()
    };
    let line = |plan: &str, start: &str| {
        let line = plan
            .lines()
            .find(|line| line.trim_start().starts_with(start));
        line.unwrap_or_default().to_string()
    };
    let off = plan(&|c| c.text_encoder_lr = vec![0.0]);
    assert!(line(&off, "text encoder").contains("not trained"), "{off}");
    assert!(
        !line(&off, "self attention").contains("not trained"),
        "{off}"
    );
    assert!(plan(&|c| c.network_train_unet_only = true).contains("text encoder: not trained"));
    // LoKr's rank follows from the layers and the factor.
    let lokr = plan(&|c| {
        c.network_module = Some("lycoris.kohya".into());
        c.network_args = vec!["algo=lokr".into(), "factor=4".into()];
        c.network_dim = Some(2);
        c.network_alpha = 0.5;
    });
    assert!(
        lokr.contains("lokr of dim 2, alpha 0.5: rank up to 4 in the smallest layers, 16 in"),
        "{lokr}"
    );
}

#[test]
fn an_extended_run_keeps_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let short = TrainConfig {
        save_state: true,
        ..config(folder.path())
    };
    let first = weights(&run(short.clone()).1.unwrap());
    let longer = TrainConfig {
        resume: Some(folder.path().join("zoe-state")),
        extend_run: true,
        max_train_steps: 4,
        ..short.clone()
    };
    let second = weights(&run(longer).1.unwrap());
    let whole = TrainConfig {
        max_train_steps: 4,
        ..config(&folder.path().join("whole"))
    };
    // The first part ended within an epoch: the second goes on there.
    assert_eq!(weights(&run(whole).1.unwrap()), second);
    assert_eq!(
        written(folder.path()),
        [
            "zoe-state",
            "zoe-step00000002-state",
            "zoe-step00000002.safetensors",
            "zoe.safetensors"
        ]
    );
    assert_eq!(
        weights(&folder.path().join("zoe-step00000002.safetensors")),
        first
    );
    assert_ne!(first, second);

    // Another run of the same name replaces the result, as in sd-scripts, and says so.
    let (told, _) = run(short);
    assert!(
        told.warnings.iter().any(|w| w.contains("will be replaced")),
        "{:?}",
        told.warnings
    );
}

/// A model whose answers to some calls are not numbers.
#[derive(Debug)]
struct Failing {
    inner: Sd15,
    calls: Cell<usize>,
    fails: std::ops::Range<usize>,
    sees: bool,
}

impl Model for Failing {
    fn parts(&mut self) -> Parts<'_> {
        self.inner.parts()
    }

    fn encode_pictures(&self, pixels: &Tensor) -> lora_train::Result<Posterior> {
        let mut posterior = self.inner.encode_pictures(pixels)?;
        if !self.sees {
            posterior.mean = (posterior.mean * f64::NAN)?;
        }
        Ok(posterior)
    }

    fn scaling_factor(&self) -> f64 {
        self.inner.scaling_factor()
    }

    fn encode_captions(&mut self, captions: &[String], fixed: bool) -> lora_train::Result<Tensor> {
        self.inner.encode_captions(captions, fixed)
    }

    fn predict(
        &self,
        noisy: &Tensor,
        times: &Tensor,
        context: &Tensor,
    ) -> lora_train::Result<Tensor> {
        let call = self.calls.get();
        self.calls.set(call + 1);
        let answer = self.inner.predict(noisy, times, context)?;
        match self.fails.contains(&call) {
            true => Ok((answer * f64::NAN)?),
            false => Ok(answer),
        }
    }
}

fn failing(config: &TrainConfig, fails: std::ops::Range<usize>, sees: bool) -> Box<dyn Model> {
    let checkpoint = Checkpoint::open(model()).unwrap();
    let storage = config.weight_storage();
    Box::new(Failing {
        inner: Sd15::load(&checkpoint, config.text(), false, storage, &Device::Cpu).unwrap(),
        calls: Cell::new(0),
        fails,
        sees,
    })
}

/// Trains 20 updates, saving after each and keeping few.
fn train_with_failures(folder: &Path, fails: std::ops::Range<usize>) -> (Told, Result<(), String>) {
    let config = TrainConfig {
        max_train_steps: 20,
        save_every_n_steps: Some(1),
        save_last_n_steps: Some(1),
        ..config(folder)
    };
    let model = failing(&config, fails, true);
    let mut told = Told::default();
    let mut observer = watch(&mut told);
    let mut trainer = Trainer::with_model(config, model, &Device::Cpu, &mut observer).unwrap();
    let result = trainer.run(&mut observer, &AtomicBool::new(false));
    drop(observer);
    (told, result.map(|_| ()).map_err(|error| error.to_string()))
}

#[test]
fn a_picture_whose_latents_are_no_numbers_is_named() {
    let folder = tempfile::tempdir().unwrap();
    // Encoded before training, and for each batch.
    for random_crop in [false, true] {
        let config = TrainConfig {
            random_crop,
            ..config(folder.path())
        };
        let model = failing(&config, 0..0, false);
        let observer = &mut |_: &Event<'_>| {};
        let result = match Trainer::with_model(config, model, &Device::Cpu, observer) {
            Ok(mut trainer) => trainer.run(observer, &AtomicBool::new(false)),
            Err(error) => Err(error),
        };
        let text = result.unwrap_err().to_string();
        assert!(
            text.contains("zoe_") && text.contains("not finite"),
            "{text}"
        );
    }
}

#[test]
fn bad_batches_are_skipped_counted_and_do_not_cost_the_good_files() {
    let folder = tempfile::tempdir().unwrap();
    let (told, result) = train_with_failures(folder.path(), 5..9);
    result.unwrap();
    assert_eq!(told.skipped, 4);
    let names = written(folder.path());
    // The files before the trouble stay; later the old ones are removed again.
    for (step, stays) in [(3, false), (4, true), (5, true), (12, false), (20, true)] {
        let name = format!("zoe-step{step:08}.safetensors");
        assert_eq!(names.contains(&name), stays, "{name}: {names:?}");
    }
}

#[test]
fn ten_bad_batches_end_the_run_and_its_last_good_file_and_a_state_stay() {
    let folder = tempfile::tempdir().unwrap();
    let (told, result) = train_with_failures(folder.path(), 5..1000);
    let error = result.unwrap_err();
    assert!(
        error.contains("10 times in a row") && error.contains("zoe_"),
        "{error}"
    );
    assert_eq!(told.skipped, 10);
    let names = written(folder.path());
    assert!(
        names.contains(&"zoe-step00000005.safetensors".into()),
        "{names:?}"
    );
    assert!(
        names.iter().any(|name| name.ends_with("-state")),
        "{names:?}"
    );
}

#[test]
fn weights_that_are_no_numbers_are_written_nowhere() {
    let folder = tempfile::tempdir().unwrap();
    let (told, result) = run(TrainConfig {
        learning_rate: Some(3e38),
        save_every_n_steps: Some(1),
        save_state: true,
        ..config(folder.path())
    });
    let error = result.unwrap_err();
    assert!(
        error.contains("is not written") && error.contains("no numbers"),
        "{error}"
    );
    assert!(
        told.warnings
            .iter()
            .any(|w| w.contains("the state could not be saved"))
    );
    assert_eq!(written(folder.path()), [""; 0]);
}
