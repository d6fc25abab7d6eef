//! Judges the bundled miniature, or another checkpoint of the same kind.
//!
//! ```text
//! cargo run --release --example judge_mini                        # assets/mini/mini.safetensors
//! cargo run --release --example judge_mini -- --model other.safetensors --sheet sheet.png
//! cargo run --release --example judge_mini -- --lora out/demo/zoe.safetensors   # hit rate
//! ```

use std::error::Error;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use clap::Parser;
use lora_examples::portraits::{
    draw, held_out, held_out_pictures, hits, judge, round_trip, variety,
};
use lora_examples::{demo_model, demo_pictures, println};
use lora_sd15::{Grid, StableDiffusion};

#[derive(Parser)]
#[command(about = "Judges the bundled miniature by what its pictures show")]
struct Arguments {
    /// A checkpoint made by `pretrain_mini`; the bundled one by default.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Captions to draw, 200 at most.
    #[arg(long, default_value_t = 200)]
    prompts: usize,
    /// Instead of judging the model: how often this LoRA draws Zoe in 100 pictures.
    #[arg(long)]
    lora: Option<PathBuf>,
    /// Draws the first 60 captions onto this PNG.
    #[arg(long)]
    sheet: Option<PathBuf>,
}

fn main() -> Result<(), Box<dyn Error>> {
    lora_kernels::keep_candle_to_one_thread();
    lora_kernels::keep_freed_memory();
    let arguments = Arguments::parse();
    let model = arguments.model.clone().unwrap_or_else(demo_model);
    let mut sd = StableDiffusion::load(model, DType::F32, &Device::Cpu)?;
    match &arguments.lora {
        Some(lora) => hit_rate(&mut sd, lora),
        None => report(&mut sd, &arguments),
    }
}

fn report(sd: &mut StableDiffusion, arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    for (what, folder) in [
        ("portraits it has not seen", held_out_pictures()),
        (
            "the demonstration's pictures",
            demo_pictures().join("10_zoe"),
        ),
    ] {
        println!("VAE: {:.1} dB over {what}", round_trip(sd, &folder)?);
    }
    let mut captions = held_out()?;
    captions.truncate(arguments.prompts);
    let (figures, mut pictures) = judge(sd, &captions)?;
    println!("background right: {:.1} %", 100.0 * figures.background);
    println!(
        "hair colour right where no hat is: {:.1} %",
        100.0 * figures.hair
    );
    println!("hat there or not, right: {:.1} %", 100.0 * figures.hat);
    println!(
        "glasses there or not, right: {:.1} %",
        100.0 * figures.glasses
    );

    let mut seeds = Vec::new();
    for seed in 0..16 {
        seeds.push(draw(sd, "portrait", 1000 + seed)?);
    }
    let variety = variety(&seeds);
    println!("mean difference between 16 seeds of \"portrait\": {variety:.1} of 255");
    if let Some(path) = &arguments.sheet {
        pictures.truncate(60);
        let rows = pictures.chunks(10);
        let cells = rows.map(|row| row.iter().cloned().map(Some).collect());
        let sheet = Grid {
            cells: cells.collect(),
            ..Grid::default()
        };
        sheet.draw().save_png(path, None)?;
    }
    Ok(())
}

/// How many of 100 pictures show Zoe by a description, by her name, and with the LoRA.
fn hit_rate(sd: &mut StableDiffusion, lora: &Path) -> Result<(), Box<dyn Error>> {
    sd.load_adapter("zoe", lora)?;
    let described = "portrait, blue hair, hair buns, long hair, light skin, striped purple shirt";
    for (what, prompt) in [
        ("a description alone", described),
        ("her name alone", "zoe, portrait"),
        ("her name with the LoRA", "zoe, portrait <lora:zoe:1>"),
    ] {
        println!("{what}: {} of 100", hits(sd, prompt, 100)?);
    }
    Ok(())
}
