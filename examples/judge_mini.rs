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
use lora_examples::portraits::{HeldOut, Palette, held_out};
use lora_examples::{demo_model, demo_pictures};
use lora_sd15::{Grid, Image, StableDiffusion, Txt2Img};

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
    lora_kernels::keep_freed_memory();
    let arguments = Arguments::parse();
    let model = arguments.model.clone().unwrap_or_else(demo_model);
    let mut sd = StableDiffusion::load(model, DType::F32, &Device::Cpu)?;
    match &arguments.lora {
        Some(lora) => hit_rate(&mut sd, lora),
        None => judge(&mut sd, &arguments),
    }
}

/// How all judged pictures are drawn: 25 steps, guidance 5.
fn draw(sd: &mut StableDiffusion, prompt: &str, seed: u64) -> Result<Image, Box<dyn Error>> {
    let request = Txt2Img {
        prompt: prompt.into(),
        width: 128,
        height: 128,
        steps: 25,
        guidance_scale: 5.0,
        seed,
        ..Txt2Img::default()
    };
    let mut pictures = sd.txt2img(&request, &mut |_| true)?;
    pictures.pop().ok_or_else(|| "no picture".into())
}

fn judge(sd: &mut StableDiffusion, arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let palette = Palette::bundled()?;
    println!(
        "VAE: {:.1} dB over the demonstration's pictures",
        round_trip(sd)?
    );

    let captions: Vec<HeldOut> = held_out()?.into_iter().take(arguments.prompts).collect();
    let (mut background, mut hat, mut glasses) = (0, 0, 0);
    let (mut hair, mut bare) = (0, 0);
    let mut pictures = Vec::new();
    for (number, want) in captions.iter().enumerate() {
        let picture = draw(sd, &want.prompt, number as u64)?;
        let seen = palette.read(&picture);
        background += usize::from(seen.background == want.background);
        hat += usize::from(seen.hat.is_some() == want.hat.is_some());
        glasses += usize::from(seen.glasses == want.glasses.is_some());
        if want.hat.is_none() {
            bare += 1;
            hair += usize::from(seen.hair.as_ref() == Some(&want.hair));
        }
        pictures.push(picture);
    }
    let share = |n: usize, of: usize| 100.0 * n as f64 / of.max(1) as f64;
    let all = captions.len();
    println!("background right: {:.1} %", share(background, all));
    println!(
        "hair colour right: {:.1} % of {bare} without a hat",
        share(hair, bare)
    );
    println!("hat there or not, right: {:.1} %", share(hat, all));
    println!("glasses there or not, right: {:.1} %", share(glasses, all));

    let mut seeds = Vec::new();
    for seed in 0..16 {
        seeds.push(draw(sd, "portrait", 1000 + seed)?);
    }
    println!(
        "mean difference between 16 seeds of \"portrait\": {:.1} of 255",
        variety(&seeds)
    );
    if let Some(path) = &arguments.sheet {
        pictures.truncate(60);
        let cells = pictures
            .chunks(10)
            .map(|row| row.iter().cloned().map(Some).collect());
        let sheet = Grid {
            columns: vec![],
            rows: vec![],
            cells: cells.collect(),
        };
        sheet.draw().save_png(path, None)?;
    }
    Ok(())
}

/// Peak signal-to-noise ratio of encoding and decoding, in dB.
fn round_trip(sd: &StableDiffusion) -> Result<f64, Box<dyn Error>> {
    let mut error = 0.0;
    let mut count = 0.0;
    for entry in std::fs::read_dir(demo_pictures().join("10_zoe"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "png") {
            let picture = Image::open_png(&path)?;
            let decoded = sd.decode(&sd.encode(&picture)?)?;
            for (a, b) in picture.rgb.iter().zip(decoded.iter().flat_map(|d| &d.rgb)) {
                error += (f64::from(*a) - f64::from(*b)).powi(2);
                count += 1.0;
            }
        }
    }
    Ok(10.0 * (255.0 * 255.0 * count / error).log10())
}

/// Mean absolute difference of all pairs.
fn variety(pictures: &[Image]) -> f64 {
    let mut sum = 0.0;
    let mut count = 0.0;
    for (i, a) in pictures.iter().enumerate() {
        for b in pictures.iter().skip(i + 1) {
            let pairs = a.rgb.iter().zip(&b.rgb);
            sum += pairs.map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>();
            count += a.rgb.len() as f64;
        }
    }
    sum / count
}

/// Of 100 pictures each: how many show Zoe by a description alone, and with the LoRA.
fn hit_rate(sd: &mut StableDiffusion, lora: &Path) -> Result<(), Box<dyn Error>> {
    let palette = Palette::bundled()?;
    sd.load_adapter("zoe", lora)?;
    let description = "portrait, blue hair, hair buns, long hair, light skin, striped purple shirt";
    for (what, prompt) in [
        ("description alone", description.to_string()),
        ("trigger word alone", "zoe, portrait".to_string()),
        ("with the LoRA", "zoe, portrait <lora:zoe:1>".to_string()),
    ] {
        let mut hits = 0;
        for seed in 0..100 {
            hits += usize::from(palette.shows_zoe(&draw(sd, &prompt, seed)?));
        }
        println!("{what}: {hits} of 100");
    }
    Ok(())
}
