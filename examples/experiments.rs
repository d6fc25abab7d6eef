//! Puts what users say about training LoRAs to the test on the bundled miniature, and prints
//! the tables of `docs/experiments.md`.
//!
//! ```text
//! cargo run --release --example experiments                # all: half an hour on two cores
//! cargo run --release --example experiments -- betas dims  # some
//! ```
//!
//! Every run has the same seed, 120 updates of 4 pictures and Prodigy, unless the table says
//! otherwise. Three numbers judge a file: *hits*, pictures of 24 that show Zoe; *obedience*,
//! pictures of 16 with the background asked for; *drift*, how much 8 pictures without her name
//! changed (mean difference per channel, of 255). Where three of the pictures are held back,
//! *validation* is their loss at the end.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device};
use lora_core::format::TensorFile;
use lora_examples::portraits::{Palette, draw, hits};
use lora_examples::{demo_config, demo_model, demo_pictures, println};
use lora_sd15::{Image, StableDiffusion};
use lora_train::logs::{Curve, draw_curves};
use lora_train::{Event, Outcome, TrainConfig, Trainer};

type Done<T> = Result<T, Box<dyn Error>>;

/// A name and what it runs.
type Experiment = (&'static str, fn() -> Done<()>);

const EXPERIMENTS: [Experiment; 7] = [
    ("betas", betas),
    ("dims", dims),
    ("epochs", epochs),
    ("repeats", repeats),
    ("pictures", pictures),
    ("captions", captions),
    ("precision", precision),
];

fn main() -> Done<()> {
    lora_kernels::keep_candle_to_one_thread();
    lora_kernels::keep_freed_memory();
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = wanted
        .iter()
        .find(|w| EXPERIMENTS.iter().all(|(n, _)| n != w))
    {
        let names = EXPERIMENTS.map(|(name, _)| name).join(", ");
        return Err(format!("no experiment {unknown}; there are {names}").into());
    }
    for (name, experiment) in EXPERIMENTS {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            println!("\n## {name}\n");
            println!(
                "| run | parameters | loss | validation | hits of 24 | obedience of 16 | drift |"
            );
            println!("|---|---|---|---|---|---|---|");
            experiment()?;
        }
    }
    Ok(())
}

fn betas() -> Done<()> {
    for betas in ["0.9,0.99", "0.9,0.999"] {
        let mut config = config(&format!("betas-{betas}"));
        config.optimizer_args = vec![format!("betas={betas}"), "weight_decay=0.01".into()];
        run(&format!("Prodigy, betas ({betas})"), config)?;
    }
    Ok(())
}

fn dims() -> Done<()> {
    for dim in [1, 2, 4, 8, 32] {
        run(&format!("LoHa dim {dim}"), family("algo=loha", dim, &[]))?;
    }
    for dim in [2, 4, 16] {
        run(&format!("LoRA dim {dim}"), family("algo=locon", dim, &[]))?;
    }
    for factor in [4, 8] {
        let more = [format!("factor={factor}")];
        run(
            &format!("LoKr factor {factor}"),
            family("algo=lokr", 10000, &more),
        )?;
    }
    Ok(())
}

/// The intermediate files of one longer run.
fn epochs() -> Done<()> {
    let mut config = config("epochs");
    config.max_train_steps = 300;
    config.save_every_n_steps = Some(30);
    config.validation_split = Some(0.25);
    config.validate_every_n_steps = Some(30);
    let trained = train(config)?;
    let mut curves = [
        Curve::new("hits", [0, 114, 178], vec![]),
        Curve::new("obedience", [213, 94, 0], vec![]),
        Curve::new("drift / 50", [0, 158, 115], vec![]),
    ];
    for (number, step) in (30..=300).step_by(30).enumerate() {
        let name = match step {
            300 => "epochs.safetensors".into(),
            _ => format!("epochs-step{step:08}.safetensors"),
        };
        let at_step = Trained {
            file: trained.file.with_file_name(name),
            loss: mean(&trained.losses[step - 30..step]),
            validations: trained
                .validations
                .iter()
                .take(number + 1)
                .copied()
                .collect(),
            losses: vec![],
        };
        let figures = report(&format!("after {step} updates"), &at_step)?;
        for (curve, figure) in curves.iter_mut().zip(figures) {
            curve.points.push((step as f64, figure));
        }
    }
    let plot = draw_curves("shares by updates", &curves);
    plot.save_png(folder().join("epochs.png"), None)?;
    Ok(())
}

/// The same run with products in f32 and in bf16.
fn precision() -> Done<()> {
    for precision in ["no", "bf16"] {
        let mut config = config(&format!("precision-{precision}"));
        config.mixed_precision = precision.into();
        run(&format!("mixed_precision = {precision}"), config)?;
    }
    Ok(())
}

/// The same number of updates from many repeats in few epochs, and the other way round.
fn repeats() -> Done<()> {
    for repeats in [1, 10, 40] {
        let folder = copy(
            &format!("repeats-{repeats}"),
            repeats,
            |_| true,
            |caption| caption.into(),
        )?;
        let config = TrainConfig {
            train_data_dir: Some(folder),
            ..config(&format!("repeats-{repeats}"))
        };
        run(&format!("{repeats} repeats"), config)?;
    }
    Ok(())
}

fn pictures() -> Done<()> {
    for count in [1, 3, 12] {
        let keep = move |number: usize| number < count;
        let folder = copy(&format!("pictures-{count}"), 120 / count, keep, |caption| {
            caption.into()
        })?;
        let config = TrainConfig {
            train_data_dir: Some(folder),
            ..config(&format!("pictures-{count}"))
        };
        run(&format!("{count} of the pictures"), config)?;
    }
    Ok(())
}

fn captions() -> Done<()> {
    // Pictures number 1 and 9 have the same background.
    let blue = |number: usize| number.is_multiple_of(8);
    let all = |_: usize| true;
    type Variant = (&'static str, fn(usize) -> bool, bool);
    let variants: [Variant; 4] = [
        ("backgrounds vary, tagged", all, true),
        ("backgrounds vary, not tagged", all, false),
        ("one background, tagged", blue, true),
        ("one background, not tagged", blue, false),
    ];
    for (number, (what, keep, tagged)) in variants.into_iter().enumerate() {
        let name = format!("captions-{number}");
        let edit = |caption: &str| {
            let tags = caption.split(", ");
            let kept: Vec<&str> = tags
                .filter(|t| tagged || !t.ends_with("background"))
                .collect();
            kept.join(", ")
        };
        let folder = copy(&name, 20, keep, edit)?;
        run(
            what,
            TrainConfig {
                train_data_dir: Some(folder),
                ..config(&name)
            },
        )?;
    }
    Ok(())
}

fn folder() -> PathBuf {
    Path::new("out").join("experiments")
}

fn config(name: &str) -> TrainConfig {
    TrainConfig {
        output_dir: Some(folder().join(name)),
        output_name: Some(name.replace(',', "-")),
        max_train_epochs: None,
        max_train_steps: 120,
        save_every_n_epochs: None,
        ..demo_config()
    }
}

fn family(algo: &str, dim: usize, more: &[String]) -> TrainConfig {
    let name = format!(
        "{}-{dim}{}",
        algo.replace("algo=", ""),
        more.concat().replace('=', "-")
    );
    let mut config = config(&name);
    config.network_args = vec![algo.into(), "preset=full".into()];
    config.network_args.extend_from_slice(more);
    if algo == "algo=locon" {
        config.network_args.push(format!("conv_dim={dim}"));
    }
    config.network_dim = Some(dim);
    config.validation_split = Some(0.25);
    config
}

/// A copy of the demonstration's folder with other repeats, fewer pictures or other captions.
fn copy(
    name: &str,
    repeats: usize,
    keep: impl Fn(usize) -> bool,
    edit: impl Fn(&str) -> String,
) -> Done<PathBuf> {
    let root = folder().join("data").join(name);
    let target = root.join(format!("{repeats}_zoe"));
    std::fs::create_dir_all(&target)?;
    for number in (0..12).filter(|n| keep(*n)) {
        let stem = format!("zoe_{:02}", number + 1);
        let source = demo_pictures().join("10_zoe").join(&stem);
        std::fs::copy(
            source.with_extension("png"),
            target.join(&stem).with_extension("png"),
        )?;
        let caption = std::fs::read_to_string(source.with_extension("txt"))?;
        std::fs::write(target.join(&stem).with_extension("txt"), edit(&caption))?;
    }
    Ok(root)
}

fn run(what: &str, config: TrainConfig) -> Done<()> {
    report(what, &train(config)?)?;
    Ok(())
}

/// What a run gave.
struct Trained {
    file: PathBuf,
    /// Mean over the last 40 batches.
    loss: f64,
    losses: Vec<f64>,
    validations: Vec<f64>,
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn train(config: TrainConfig) -> Done<Trained> {
    let (mut losses, mut validations) = (Vec::new(), Vec::new());
    let mut observer = |event: &Event<'_>| match event {
        Event::Batch(batch) => losses.push(batch.loss),
        Event::Validated(report) => validations.push(report.loss),
        _ => {}
    };
    let mut trainer = Trainer::new(config, &Device::Cpu, &mut observer)?;
    let outcome = trainer.run(&mut observer, &AtomicBool::new(false))?;
    drop(trainer);
    let (Outcome::Finished(file) | Outcome::Stopped(file)) = outcome;
    Ok(Trained {
        file,
        loss: mean(&losses[losses.len().saturating_sub(40)..]),
        losses,
        validations,
    })
}

const PLAIN: &str = "portrait, brown hair, short hair, tan skin, red shirt, smile, blue background";

/// What the model draws without a LoRA.
fn before() -> Done<&'static [Image]> {
    static PICTURES: OnceLock<Vec<Image>> = OnceLock::new();
    if let Some(pictures) = PICTURES.get() {
        return Ok(pictures);
    }
    let mut sd = StableDiffusion::load(demo_model(), DType::F32, &Device::Cpu)?;
    let pictures: Done<Vec<Image>> = (0..8).map(|seed| draw(&mut sd, PLAIN, seed)).collect();
    let pictures = pictures?;
    Ok(PICTURES.get_or_init(|| pictures))
}

/// Prints a row; returns hits and obedience as shares, and a 50th of the drift.
fn report(what: &str, trained: &Trained) -> Done<[f64; 3]> {
    let file = &trained.file;
    let palette = Palette::bundled()?;
    let mut sd = StableDiffusion::load(demo_model(), DType::F32, &Device::Cpu)?;
    sd.load_adapter("zoe", file)?;
    let found = hits(&mut sd, "zoe, portrait <lora:zoe:1>", 24)?;
    let colours = [
        "blue", "green", "yellow", "pink", "purple", "grey", "white", "orange",
    ];
    let mut obeyed = 0;
    for seed in 0..16u64 {
        let colour = colours[seed as usize % colours.len()];
        let prompt = format!("zoe, portrait, {colour} background <lora:zoe:1>");
        obeyed += usize::from(palette.read(&draw(&mut sd, &prompt, seed)?).background == colour);
    }
    let mut drift = 0.0;
    for (seed, before) in before()?.iter().enumerate() {
        let after = draw(&mut sd, &format!("{PLAIN} <lora:zoe:1>"), seed as u64)?;
        let pairs = before.rgb.iter().zip(&after.rgb);
        let sum: f64 = pairs.map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
        drift += sum / before.rgb.len() as f64 / 8.0;
    }
    let opened = TensorFile::open(file)?;
    let sizes = opened
        .names()
        .into_iter()
        .filter(|name| !name.ends_with("alpha"));
    let parameters: usize = sizes
        .filter_map(|name| {
            opened
                .shape(&name)
                .map(|shape| shape.iter().product::<usize>())
        })
        .sum();
    let loss = trained.loss;
    let validation = trained.validations.last().map(|v| format!("{v:.4}"));
    let validation = validation.unwrap_or_default();
    println!(
        "| {what} | {parameters} | {loss:.4} | {validation} | {found} | {obeyed} | {drift:.1} |"
    );
    Ok([found as f64 / 24.0, obeyed as f64 / 16.0, drift / 50.0])
}
