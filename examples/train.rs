//! Trains a LoRA.
//!
//! ```text
//! cargo run --release --example train                       # demonstration
//! cargo run --release --example train -- --config_file my.toml
//! cargo run --release --example train -- --pretrained_model_name_or_path v1-5.safetensors \
//!     --train_data_dir img --output_dir out --output_name zoe --resolution 512 \
//!     --network_dim 8 --network_alpha 4 --optimizer_type Prodigy --optimizer_args betas=0.9,0.99 \
//!     --max_train_epochs 10 --save_every_n_epochs 2
//! ```
//!
//! Options are sd-scripts'; `--help` lists them. The command line beats the file, which
//! may be sd-scripts' TOML, kohya_ss' JSON or LoRA_Easy_Training_Scripts' TOML.
//! `--device` is ours: auto, cpu, cuda:0, metal. So are `--dump-config`, which prints every
//! setting with its origin, and `--write-config FILE.toml`, which writes them as TOML of our
//! own and sd-scripts' form; neither trains.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use indicatif::{ProgressBar, ProgressStyle};
use lora_examples::portraits::request;
use lora_examples::{
    demo_config, demo_model, demo_pictures, device, peak_memory_mb, print, println,
};
use lora_sd15::{Grid, Image, StableDiffusion};
use lora_train::gui::{Form, read_config};
use lora_train::logs::Observers;
use lora_train::options::{Kind, Settings, Status, all_options};
use lora_train::{BatchReport, Event, Observer, Outcome, TrainConfig, Trainer, turning_point};

fn main() {
    if let Err(error) = run() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    lora_kernels::keep_candle_to_one_thread();
    lora_kernels::keep_freed_memory();
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|a| a == "--help" || a == "-h") {
        print_help();
        return Ok(());
    }
    let device = device(&take(&mut arguments, "--device")?.unwrap_or_else(|| "auto".into()))?;
    if arguments.is_empty() {
        return demonstration(&device);
    }
    let dump = arguments.iter().position(|a| a == "--dump-config");
    if let Some(at) = dump {
        arguments.remove(at);
    }
    let write = take(&mut arguments, "--write-config")?;
    let settings = settings(&arguments)?;
    let config = TrainConfig::from_settings(&settings)?;
    if dump.is_some() {
        print!("{}", config.dump(&settings)?);
        return Ok(());
    }
    if let Some(path) = write {
        config.write(Path::new(&path))?;
        println!("{path}");
        return Ok(());
    }
    train(config, &device)?;
    Ok(())
}

/// Removes `--name VALUE` from the arguments.
fn take(arguments: &mut Vec<String>, name: &str) -> Result<Option<String>, String> {
    let Some(at) = arguments.iter().position(|a| a == name) else {
        return Ok(None);
    };
    arguments.remove(at);
    if at < arguments.len() {
        Ok(Some(arguments.remove(at)))
    } else {
        Err(format!("{name} needs a value"))
    }
}

/// Config file below, command line on top.
fn settings(arguments: &[String]) -> Result<Settings, Box<dyn Error>> {
    let (line, rest) = Settings::from_arguments(arguments)?;
    if let Some(word) = rest.first() {
        return Err(
            format!("unexpected argument {word:?}; options start with --, see --help").into(),
        );
    }
    let mut settings = match line.get("config_file").and_then(|v| v.as_str()) {
        Some(file) => {
            let import = read_config(Path::new(file))?;
            if import.form != Form::SdScripts {
                eprintln!("{file}: {import}");
            }
            import.settings
        }
        None => Settings::default(),
    };
    settings.overlay(line);
    for (name, reason) in settings.without_effect() {
        eprintln!("note: {name} has no effect: {reason}");
    }
    Ok(settings)
}

fn train(config: TrainConfig, device: &Device) -> Result<Outcome, Box<dyn Error>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    // The second Ctrl-C ends the program at once.
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nstopping after this batch and saving; press again to quit at once");
    })?;
    eprintln!(
        "settings beside the defaults: {}",
        config.differences()?.join(", ")
    );
    let mut observers = Observers::for_run(&config)?;
    observers.add(Display::default());
    let mut trainer = Trainer::new(config, device, &mut observers)?;
    let outcome = trainer.run(&mut observers, &stop)?;
    match &outcome {
        Outcome::Finished(path) => println!("{}", path.display()),
        Outcome::Stopped(path) => println!(
            "stopped; what there was is in {}; go on with --resume {}-state and the same options",
            path.display(),
            path.with_extension("").display()
        ),
    }
    Ok(outcome)
}

/// The progress bar, or plain lines when standard error is not a terminal.
#[derive(Default)]
struct Display {
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    batch_times: Vec<f64>,
    validations: Vec<(usize, f64)>,
}

impl Observer for Display {
    fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Warning(text) => self.line(&format!("warning: {text}")),
            Event::Dataset(report) => self.line(&report.to_string()),
            Event::Planned(plan) => self.line(&plan.to_string()),
            Event::Encoding { done, total } => {
                self.bar(*total, "encoding").set_position(*done as u64)
            }
            Event::EpochStarted { .. } | Event::EpochFinished { .. } => {}
            Event::Batch(report) => self.batch(report),
            Event::Skipped { what, .. } => self.line(&format!("skipped a batch: {what}")),
            Event::Saved(path) => self.line(&format!("saved {}", path.display())),
            Event::StateSaved(path) => self.line(&format!("saved the state {}", path.display())),
            Event::Removed(path) => self.line(&format!("removed {}", path.display())),
            Event::Sample { path, .. } => self.line(&format!("drew {}", path.display())),
            Event::Resumed { path, epoch, step } => self.line(&format!(
                "going on from {}: epoch {epoch}, {step} updates done",
                path.display()
            )),
            Event::Validated(v) => {
                self.validations.push((v.step, v.loss));
                let mark = if v.best { ", the lowest so far" } else { "" };
                self.line(&format!(
                    "validation loss {:.4} after {} updates{mark}",
                    v.loss, v.step
                ));
            }
            Event::Finished { path, skipped } => self.finish(path, *skipped),
            _ => {}
        }
    }
}

impl Display {
    /// A line above the bar.
    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    fn bar(&mut self, total: usize, what: &str) -> &ProgressBar {
        let fresh = self
            .bar
            .as_ref()
            .is_none_or(|b| b.length() != Some(total as u64) || b.prefix() != what);
        if fresh {
            if let Some(old) = self.bar.take() {
                old.finish_and_clear();
            }
            let bar = ProgressBar::new(total as u64).with_prefix(what.to_string());
            let template = "{prefix} {bar:30} {pos}/{len} [{elapsed}<{eta}] {msg}";
            bar.set_style(
                ProgressStyle::with_template(template)
                    .unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
            self.bar = Some(bar);
        }
        self.bar.get_or_insert_with(ProgressBar::hidden)
    }

    fn batch(&mut self, report: &BatchReport) {
        self.batch_times.push(report.elapsed.as_secs_f64());
        let rates: Vec<String> = report
            .learning_rates
            .iter()
            .map(|(name, _, effective)| format!("{name} {effective:.2e}"))
            .collect();
        let message = format!("loss {:.4}, lr {}", report.average_loss, rates.join(", "));
        let bar = self.bar(report.total_steps, "training");
        bar.set_message(message.clone());
        bar.set_position(report.step as u64);
        let hidden = bar.is_hidden();
        let due = self
            .last_line
            .is_none_or(|t| t.elapsed() > Duration::from_secs(10));
        if hidden && (due || report.step == report.total_steps) {
            self.last_line = Some(Instant::now());
            eprintln!(
                "epoch {}, step {}/{}: {message}",
                report.epoch, report.step, report.total_steps
            );
        }
    }

    fn finish(&mut self, path: &Path, skipped: usize) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
        self.batch_times.sort_by(f64::total_cmp);
        if let Some(median) = self.batch_times.get(self.batch_times.len() / 2) {
            let memory = peak_memory_mb()
                .map(|mb| format!(", peak memory {mb} MB"))
                .unwrap_or_default();
            eprintln!("median time per batch {median:.3} s{memory}");
        }
        if skipped > 0 {
            eprintln!("{skipped} batches were left out because something was not finite");
        }
        if let Some((step, loss, rising)) = turning_point(&self.validations) {
            let after = if rising { " and rose after it" } else { "" };
            eprintln!("validation loss was lowest, {loss:.4}, after {step} updates{after}");
        }
        if let Some(name) = path.file_stem().and_then(|s| s.to_str()) {
            eprintln!(
                "copy it to models/Lora of the web UI and write <lora:{name}:0.8> in a prompt"
            );
        }
    }
}

/// Trains a LoHa on twelve pictures of a character that the bundled miniature cannot draw,
/// then shows four prompts without and with it, and the loss.
fn demonstration(device: &Device) -> Result<(), Box<dyn Error>> {
    eprintln!(
        "demonstration: the bundled miniature draws 128x128 pixel-art portraits, but has never"
    );
    eprintln!(
        "seen Zoe. Twelve pictures of her are in {}.",
        demo_pictures().display()
    );
    let output = Path::new("out/demo");
    let Outcome::Finished(file) = train(demo_config(), device)? else {
        return Ok(());
    };
    let sheet = output.join("before-after.png");
    before_and_after(&file, &output.join("zoe-loss.png"), device)?.save_png(&sheet, None)?;
    println!("the pictures before and after: {}", sheet.display());
    println!(
        "draw more of her: cargo run --release --example generate -- --prompt \"zoe, red hat, <lora:zoe:1>\""
    );
    Ok(())
}

/// Four prompts without and with the LoRA, above the loss curve.
fn before_and_after(lora: &Path, curve: &Path, device: &Device) -> Result<Image, Box<dyn Error>> {
    let mut sd = StableDiffusion::load(demo_model(), DType::F32, device)?;
    sd.load_adapter("zoe", lora)?;
    let prompts = [
        "zoe, portrait, smile, blue background",
        "zoe, portrait, sad, glasses, white background",
        "zoe, portrait, smile, red hat, green background",
        "zoe, portrait, smile, sunglasses, earrings, orange background",
    ];
    let mut cells = Vec::new();
    for tag in ["", " <lora:zoe:1>"] {
        let mut row = Vec::new();
        for prompt in prompts {
            let request = request(&format!("{prompt}{tag}"), 1);
            row.extend(sd.txt2img(&request, &mut |_| true)?.into_iter().map(Some));
        }
        cells.push(row);
    }
    let pictures = Grid {
        columns: prompts.map(str::to_string).to_vec(),
        rows: vec!["before".into(), "with the LoRA".into()],
        cells,
    }
    .draw();
    let curve = Image::open_png(curve)?;
    let (width, height) = (
        pictures.width.max(curve.width),
        pictures.height + curve.height,
    );
    let mut sheet = Image::plain(width, height, [255; 3]);
    sheet.paste(&pictures, 0, 0);
    sheet.paste(&curve, 0, pictures.height);
    Ok(sheet)
}

fn print_help() {
    println!(
        "usage: train [--config_file FILE] [--OPTION VALUE ...] [--device auto|cpu|cuda:0|metal] [--dump-config] [--write-config FILE.toml]"
    );
    println!(
        "without options: a demonstration on the bundled miniature\n\noptions (as in sd-scripts):"
    );
    for option in all_options() {
        let takes = match option.kind {
            Kind::Switch => "",
            Kind::Integer => "N",
            Kind::Number => "X",
            Kind::Text => "TEXT",
            Kind::List => "TEXT ...",
            Kind::Numbers => "X ...",
            Kind::Steps => "N or SHARE",
        };
        let note = match option.status {
            Status::Used => option.choices.join(", "),
            Status::NoEffect(reason) => format!("accepted, no effect: {reason}"),
            Status::Refused(advice) => format!("not supported: {advice}"),
        };
        println!("  --{:<38} {note}", format!("{} {takes}", option.name));
    }
}
