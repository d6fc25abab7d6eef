//! The bundled miniature and pictures: what they draw, and whole runs of every family.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device};
use lora_core::AdapterSet;
use lora_examples::portraits::{
    Palette, draw, held_out, held_out_pictures, judge, round_trip, variety,
};
use lora_examples::{demo_config, demo_model};
use lora_sd15::{Checkpoint, Image, Part, StableDiffusion};
use lora_train::pick::{self, PickConfig};
use lora_train::{Event, Outcome, SamplePrompt, TrainConfig, Trainer};

fn miniature() -> StableDiffusion {
    StableDiffusion::load(demo_model(), DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn the_miniature_is_whole_and_small() {
    let checkpoint = Checkpoint::open(demo_model()).unwrap();
    for part in [Part::Unet, Part::Vae, Part::TextEncoder] {
        checkpoint.verify(part).unwrap();
    }
    assert!(checkpoint.ignored().is_empty());
    assert!(std::fs::metadata(demo_model()).unwrap().len() <= 12_000_000);
}

/// The model card has the figures for all 200 captions; these are 16 of them, with margins.
#[test]
fn the_miniature_draws_what_captions_say() {
    let mut sd = miniature();
    let psnr = round_trip(&sd, &held_out_pictures()).unwrap();
    assert!(psnr > MARGINS.psnr, "{psnr:.1} dB");
    let captions: Vec<_> = held_out().unwrap().into_iter().take(16).collect();
    let (figures, _) = judge(&mut sd, &captions).unwrap();
    assert!(figures.background >= MARGINS.background, "{figures:?}");
    assert!(figures.hair >= MARGINS.hair, "{figures:?}");
    assert!(figures.hat >= MARGINS.hat, "{figures:?}");
    assert!(figures.glasses >= MARGINS.glasses, "{figures:?}");
    let seeds: Vec<Image> = (0..4)
        .map(|seed| draw(&mut sd, "portrait", seed).unwrap())
        .collect();
    let variety = variety(&seeds);
    assert!(
        variety > 25.0,
        "pictures of different seeds differ by {variety:.1} of 255"
    );
}

/// Lowest figures that pass.
struct Margins {
    psnr: f64,
    background: f64,
    hair: f64,
    hat: f64,
    glasses: f64,
}

const MARGINS: Margins = Margins {
    psnr: 29.0,
    background: 0.9,
    hair: 0.5,
    hat: 0.8,
    glasses: 0.8,
};

/// Trains on the demonstration's pictures; returns the file and the loss of every batch.
fn train(config: TrainConfig) -> (std::path::PathBuf, Vec<f64>) {
    let mut losses = Vec::new();
    let mut observer = |event: &Event<'_>| {
        if let Event::Batch(batch) = event {
            losses.push(batch.loss);
        }
    };
    let mut trainer = Trainer::new(config, &Device::Cpu, &mut observer).unwrap();
    match trainer.run(&mut observer, &AtomicBool::new(false)).unwrap() {
        Outcome::Finished(path) => (path, losses),
        Outcome::Stopped(_) => panic!("stopped"),
    }
}

fn config(output: &Path, name: &str, steps: usize) -> TrainConfig {
    TrainConfig {
        output_dir: Some(output.into()),
        output_name: Some(name.into()),
        max_train_epochs: None,
        max_train_steps: steps,
        save_every_n_epochs: None,
        // Few noise levels, so that the losses of few updates can be compared.
        min_timestep: Some(400),
        max_timestep: Some(420),
        ..demo_config()
    }
}

/// Network arguments, dim, learning rate of AdamW.
const FAMILIES: [(&str, &[&str], usize, f64); 9] = [
    ("lora", &["algo=locon", "preset=attn-mlp"], 4, 5e-3),
    ("locon", &["algo=locon", "conv_dim=2"], 4, 5e-3),
    ("dora", &["algo=locon", "dora_wd=True"], 4, 5e-3),
    ("loha", &["algo=loha"], 2, 2e-2),
    ("lokr", &["algo=lokr", "factor=4"], 4, 1e-2),
    ("ia3", &["algo=ia3"], 1, 5e-2),
    ("glora", &["algo=glora", "preset=attn-mlp"], 4, 5e-3),
    ("boft", &["algo=boft", "preset=attn-mlp"], 8, 1e-2),
    ("full", &["algo=full"], 4, 1e-3),
];

#[test]
fn every_family_learns_and_its_file_changes_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let mut sd = miniature();
    let plain = draw(&mut sd, "zoe, portrait", 1).unwrap();
    for (name, arguments, dim, lr) in FAMILIES {
        let (path, losses) = train(TrainConfig {
            network_args: arguments.iter().map(|a| a.to_string()).collect(),
            network_dim: Some(dim),
            network_alpha: dim as f64,
            optimizer_type: "AdamW".into(),
            optimizer_args: vec![],
            learning_rate: Some(lr),
            train_batch_size: 2,
            ..config(folder.path(), name, 20)
        });
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        let (first, last) = (mean(&losses[..4]), mean(&losses[16..]));
        assert!(last < 0.9 * first, "{name}: {first:.4} -> {last:.4}");

        sd.add_adapter(name, AdapterSet::load(&path, &Device::Cpu).unwrap());
        let changed = draw(&mut sd, &format!("zoe, portrait <lora:{name}:1>"), 1).unwrap();
        assert_ne!(changed, plain, "{name}");
    }
}

#[test]
fn a_file_that_has_learned_little_is_not_the_best_one() {
    let folder = tempfile::tempdir().unwrap();
    let config = TrainConfig {
        min_timestep: None,
        max_timestep: None,
        save_every_n_steps: Some(2),
        save_last_n_steps: None,
        validation_split: Some(0.25),
        ..config(folder.path(), "zoe", 24)
    };
    let mut ignore = |_: &Event<'_>| {};
    let mut trainer = Trainer::new(config, &Device::Cpu, &mut ignore).unwrap();
    trainer.run(&mut ignore, &AtomicBool::new(false)).unwrap();
    let prompt = |text: &str| {
        SamplePrompt::from_line(&format!("{text} --w 128 --h 128 --s 4"), "euler").unwrap()
    };
    let config = PickConfig {
        prompts: vec![prompt("zoe, smile"), prompt("zoe, sad, white background")],
        neutral: vec![prompt("portrait, beard, green background")],
        seeds: vec![1, 2],
    };
    let early = folder.path().join("zoe-step00000002.safetensors");
    let files = [early.clone(), folder.path().join("zoe.safetensors")];
    let list = pick::judge(&mut trainer, &files, &config).unwrap();
    // It changes nothing, so drift and variety alone would make it the best.
    let [best, other] = list.as_slice() else {
        panic!("{list:?}")
    };
    assert_eq!(other.file, early);
    assert!(other.drift < best.drift && best.held_out, "{list:?}");
    assert!(best.learned == 1.0 && other.learned < 0.5, "{list:?}");
}

#[test]
fn a_loha_of_dim_2_brings_the_pictures_nearer_to_the_character() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = train(TrainConfig {
        min_timestep: None,
        max_timestep: None,
        ..config(folder.path(), "zoe", 60)
    });
    let mut sd = miniature();
    sd.load_adapter("zoe", &path).unwrap();
    let palette = Palette::bundled().unwrap();
    let mut distance = |prompt: &str| {
        let pictures = (0..4).map(|seed| draw(&mut sd, prompt, seed).unwrap());
        pictures
            .map(|p| palette.mean_distance_to_zoe(&p))
            .sum::<f64>()
            / 4.0
    };
    let (before, after) = (
        distance("zoe, portrait"),
        distance("zoe, portrait <lora:zoe:1>"),
    );
    assert!(after < 0.7 * before, "{before:.0} -> {after:.0}");
}

/// The child's part of the test below.
#[test]
fn trains_in_a_child_process() {
    let Ok(folder) = std::env::var("THREADS_CHILD") else {
        return;
    };
    for precision in ["no", "bf16"] {
        train(TrainConfig {
            mixed_precision: precision.into(),
            network_args: vec!["algo=locon".into(), "preset=full".into()],
            network_dim: Some(4),
            ..config(Path::new(&folder), precision, 3)
        });
    }
}

#[test]
fn one_thread_and_two_give_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let outputs = ["1", "2"].map(|threads| {
        let output = folder.path().join(threads);
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["trains_in_a_child_process", "--exact", "--quiet"])
            .env("THREADS_CHILD", &output)
            .env("RAYON_NUM_THREADS", threads)
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
        output
    });
    for file in ["no.safetensors", "bf16.safetensors"] {
        // All but the header, which has the time in it.
        let [one, two] = outputs.each_ref().map(|output| {
            let bytes = std::fs::read(output.join(file)).unwrap();
            let header = u64::from_le_bytes(*bytes.first_chunk().unwrap());
            bytes[8 + header as usize..].to_vec()
        });
        assert!(one.len() > 100_000);
        assert!(one == two, "{file} depends on the number of threads");
    }
}
