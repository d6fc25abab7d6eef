//! Which file of a run is best?
//!
//! ```text
//! cargo run --release --example pick -- --settings out/zoe.toml \
//!     --prompt "zoe, smile" --prompt "zoe, red hat" --neutral "a house" --size 512
//! ```
//!
//! Takes `NAME.toml`, which training wrote beside its files, draws every file at several
//! multipliers with fixed seeds, and judges each by the loss on the held-out pictures, by
//! what it does to prompts without the trigger word, and by the variety that is left.
//! Writes `pick.png`, the labelled grid, and `pick.html`, the report.

use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Parser;
use lora_examples::{device, println};
use lora_sd15::Grid;
use lora_train::gui::read_config;
use lora_train::pick::{Judgement, PickConfig, judge};
use lora_train::{Event, SamplePrompt, TrainConfig, Trainer};

#[derive(Parser)]
struct Args {
    /// `NAME.toml` beside the files of the run.
    #[arg(long)]
    settings: PathBuf,
    /// Prompts with the trigger word; options as in sample prompt files.
    #[arg(long = "prompt", required = true)]
    prompts: Vec<String>,
    /// Prompts without it.
    #[arg(long, default_values_t = ["a house".to_string(), "a man, portrait".to_string()])]
    neutral: Vec<String>,
    /// Multipliers of the grid.
    #[arg(long, value_delimiter = ',', default_values_t = [0.6, 0.8, 1.0])]
    multipliers: Vec<f64>,
    /// Seeds per prompt.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Denoising steps.
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Width and height of the pictures.
    #[arg(long, default_value_t = 512)]
    size: usize,
    /// auto, cpu, cuda:0, metal.
    #[arg(long, default_value = "auto")]
    device: String,
}

fn main() -> Result<(), Box<dyn Error>> {
    lora_kernels::keep_candle_to_one_thread();
    lora_kernels::keep_freed_memory();
    let args = Args::parse();
    let config = TrainConfig {
        resume: None,
        sample_prompts: None,
        sample_every_n_epochs: None,
        sample_every_n_steps: None,
        sample_at_first: false,
        ..TrainConfig::from_settings(&read_config(&args.settings)?.settings)?
    };
    let folder = config.output_dir().to_path_buf();
    let files = files(&folder, config.name())?;
    let prompts = |texts: &[String]| -> Result<Vec<SamplePrompt>, Box<dyn Error>> {
        let add = format!(" --w {0} --h {0} --s {1}", args.size, args.steps);
        texts
            .iter()
            .map(|text| Ok(SamplePrompt::from_line(&format!("{text}{add}"), "euler_a")?))
            .collect()
    };
    let pick = PickConfig {
        prompts: prompts(&args.prompts)?,
        neutral: prompts(&args.neutral)?,
        seeds: (1..=args.seeds).collect(),
    };
    let mut warn = |event: &Event<'_>| {
        if let Event::Warning(text) = event {
            eprintln!("warning: {text}");
        }
    };
    let mut trainer = Trainer::new(config, &device(&args.device)?, &mut warn)?;

    let mut grid = Grid::default();
    for file in &files {
        trainer.show(file)?;
        for (prompt, text) in pick.prompts.iter().zip(&args.prompts) {
            grid.rows.push(format!("{} {text}", stem(file)));
            let mut row = Vec::new();
            for multiplier in &args.multipliers {
                trainer.set_multiplier(*multiplier);
                let prompt = SamplePrompt {
                    seed: Some(1),
                    ..prompt.clone()
                };
                row.push(Some(trainer.draw(&prompt)?));
            }
            grid.cells.push(row);
        }
        eprintln!("drew {}", stem(file));
    }
    grid.columns = args.multipliers.iter().map(f64::to_string).collect();
    trainer.set_multiplier(1.0);
    grid.draw().save_png(folder.join("pick.png"), None)?;

    let list = judge(&mut trainer, &files, &pick)?;
    std::fs::write(folder.join("pick.html"), html(&list))?;
    for judgement in &list {
        println!("{}: {}", stem(&judgement.file), judgement.reasons());
    }
    if let Some(best) = list.first() {
        println!("best: {}", best.file.display());
        if best.learned <= 0.0 {
            println!("but no file has a lower loss than the model without adapter: train longer");
        }
    }
    println!("{} and pick.html", folder.join("pick.png").display());
    Ok(())
}

/// The intermediate files of a run and its last, in order.
fn files(folder: &Path, name: &str) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut list: Vec<PathBuf> = std::fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .filter(|path| stem(path).starts_with(&format!("{name}-")))
        .collect();
    list.sort();
    list.push(folder.join(format!("{name}.safetensors")));
    Ok(list)
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .map(|s| s.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

fn html(list: &[Judgement]) -> String {
    let mut page = String::from(
        "<!doctype html><meta charset=utf-8><title>Which file is best</title>\
         <style>body{font:15px sans-serif;margin:2em}td,th{padding:4px 12px;text-align:right}\
         td:first-child{text-align:left}tr:nth-child(2){background:#e7f3e7}</style>\
         <h1>Which file is best</h1><table><tr><th>file<th>loss<th>learned<th>drift<th>variety<th>response<th>score",
    );
    for j in list {
        // Writing to a String cannot fail.
        let _ = write!(
            page,
            "<tr><td>{}<td>{:.4}<td>{:.0} %<td>{:.3}<td>{:.2}<td>{:.2}<td>{:.3}",
            escaped(&stem(&j.file)),
            j.loss,
            100.0 * j.learned,
            j.drift,
            j.variety,
            j.response,
            j.score
        );
    }
    page.push_str("</table>");
    if let Some(best) = list.first() {
        let name = escaped(&stem(&best.file));
        let _ = write!(page, "<p><b>{name}</b>: {}.", best.reasons());
    }
    page.push_str(
        "<p>Loss: on held-out pictures where there are any. Learned: the part of the way from \
         the loss without adapter to the lowest. Drift: how much pictures \
         without the trigger word change. Variety and response: how much seeds and prompts still \
         differ, as part of the model without adapter. The first file has the lowest score.\
         <p><img src=pick.png>",
    );
    page
}
