//! Draws pictures.
//!
//! ```text
//! cargo run --release --example generate -- --model v1-5.safetensors --lora-dir out \
//!     --prompt "1girl, zoe, smile <lora:zoe:0.8>" --negative "lowres" --seed 1 --steps 20
//! ```
//!
//! Without `--model` the bundled miniature is used, whose pictures are patterns.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use lora_core::AdapterSet;
use lora_core::format::{FileReport, LoadOptions, Strictness, sha256_of_file};
use lora_examples::{demo_model, device, peak_memory_mb};
use lora_sd15::prompt::extract_tags;
use lora_sd15::{
    Checkpoint, NoiseSource, SamplerKind, StableDiffusion, Txt2Img, find_adapter, infotext,
};

/// Draws pictures from text with Stable Diffusion 1.5 and LoRAs.
#[derive(Parser)]
struct Arguments {
    /// Checkpoint file or diffusers folder.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Separate VAE file.
    #[arg(long)]
    vae: Option<PathBuf>,
    /// Folder in which `<lora:name:weight>` finds `name.safetensors`.
    #[arg(long, default_value = "out")]
    lora_dir: PathBuf,
    /// What to draw.
    #[arg(long, default_value = "zoe, smile")]
    prompt: String,
    /// What to avoid.
    #[arg(long, default_value = "")]
    negative: String,
    /// Seed of the first picture.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Which generator the seed is for: A1111's default, or its CPU setting.
    #[arg(long, value_enum, default_value = "gpu")]
    rng: Rng,
    /// Denoising steps.
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Guidance scale.
    #[arg(long, default_value_t = 7.0)]
    cfg_scale: f64,
    /// Width in pixels; 512, or 128 for the miniature.
    #[arg(long)]
    width: Option<usize>,
    /// Height in pixels; 512, or 128 for the miniature.
    #[arg(long)]
    height: Option<usize>,
    /// Pictures drawn together.
    #[arg(long, default_value_t = 1)]
    batch_size: usize,
    /// Batches.
    #[arg(long, default_value_t = 1)]
    batch_count: u64,
    /// Euler, "Euler a", "DPM++ 2M", "DPM++ 2M Karras" or DDIM.
    #[arg(long, default_value = "Euler a")]
    sampler: String,
    /// 1: last text encoder layer, 2: the one before.
    #[arg(long, default_value_t = 1)]
    clip_skip: usize,
    /// Folder for the pictures.
    #[arg(long, default_value = "out/images")]
    output: PathBuf,
    /// auto, cpu, cuda:0 or metal.
    #[arg(long, default_value = "auto")]
    device: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum Rng {
    Gpu,
    Cpu,
}

fn main() {
    if let Err(error) = run(&Arguments::parse()) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    lora_kernels::keep_freed_memory();
    let device = device(&arguments.device)?;
    let mut request = request(arguments)?;
    let (_, tags, _) = extract_tags(&request.prompt);
    let loras: Vec<(String, PathBuf)> = tags
        .iter()
        .map(|tag| {
            Ok((
                tag.name.clone(),
                find_adapter(&arguments.lora_dir, &tag.name)?,
            ))
        })
        .collect::<Result<_, lora_sd15::Error>>()?;
    std::fs::create_dir_all(&arguments.output)
        .map_err(|e| format!("{}: {e}", arguments.output.display()))?;

    let model = arguments.model.clone().unwrap_or_else(demo_model);
    let hash = model_hash(&model);
    let mut sd = load(&model, arguments.vae.as_deref(), &device)?;
    let mut lora_hashes = Vec::new();
    for (name, path) in &loras {
        // A picture with most of an adapter is better than none.
        for finding in FileReport::open(path)?.errors() {
            eprintln!("warning: {}", finding.message);
        }
        let lenient = LoadOptions {
            strictness: Strictness::Lenient,
            ..Default::default()
        };
        let set = AdapterSet::load_with(path, &device, &lenient)?;
        let hash = set
            .metadata()
            .get("sshs_model_hash")
            .map(|h| h.chars().take(12).collect::<String>());
        lora_hashes.push(format!("{name}: {}", hash.unwrap_or_default()));
        sd.add_adapter(name, set);
    }
    let hash = hash.join().ok().flatten();
    let started = Instant::now();
    for batch in 0..arguments.batch_count {
        let bar = ProgressBar::new(request.steps as u64);
        bar.set_style(ProgressStyle::with_template(
            "batch {msg} {bar:30} {pos}/{len} [{elapsed}<{eta}, {per_sec}]",
        )?);
        bar.set_message(format!("{}/{}", batch + 1, arguments.batch_count));
        let images = sd.txt2img(&request, &mut |step| {
            bar.set_length(step.total as u64);
            bar.set_position(step.done as u64);
            true
        })?;
        bar.finish_and_clear();
        for (i, image) in images.iter().enumerate() {
            let text = parameters(
                &request,
                i,
                arguments,
                &model,
                hash.as_deref(),
                &lora_hashes,
            );
            let path = free_name(&arguments.output, request.seed + i as u64);
            image.save_png(&path, Some(&text))?;
            println!("{}", path.display());
        }
        request.seed += request.batch_size as u64;
    }
    let seconds = started.elapsed().as_secs_f64();
    let steps = arguments.batch_count as f64 * request.steps as f64;
    let memory = peak_memory_mb()
        .map(|mb| format!(", peak memory {mb} MB"))
        .unwrap_or_default();
    eprintln!(
        "{seconds:.1} s, {:.2} s per step with decoding{memory}",
        seconds / steps
    );
    Ok(())
}

fn request(arguments: &Arguments) -> Result<Txt2Img, Box<dyn Error>> {
    let (sampler, schedule) = SamplerKind::from_name(&arguments.sampler)?;
    let side = if arguments.model.is_some() { 512 } else { 128 };
    let request = Txt2Img {
        prompt: arguments.prompt.clone(),
        negative: arguments.negative.clone(),
        width: arguments.width.unwrap_or(side),
        height: arguments.height.unwrap_or(side),
        steps: arguments.steps,
        guidance_scale: arguments.cfg_scale,
        seed: arguments.seed,
        noise: match arguments.rng {
            Rng::Gpu => NoiseSource::Philox,
            Rng::Cpu => NoiseSource::Cpu,
        },
        batch_size: arguments.batch_size,
        sampler,
        schedule,
        clip_skip: arguments.clip_skip,
        ..Txt2Img::default()
    };
    request.validate()?;
    Ok(request)
}

fn load(
    model: &Path,
    vae: Option<&Path>,
    device: &Device,
) -> Result<StableDiffusion, lora_sd15::Error> {
    let mut checkpoint = Checkpoint::open(model)?;
    if let Some(vae) = vae {
        checkpoint = checkpoint.with_vae(vae)?;
    }
    StableDiffusion::from_checkpoint(&checkpoint, DType::F32, device)
}

/// Hashing gigabytes takes seconds: done beside the loading.
fn model_hash(model: &Path) -> std::thread::JoinHandle<Option<String>> {
    let model = model.to_path_buf();
    std::thread::spawn(move || {
        let hash = if model.is_file() {
            sha256_of_file(&model).ok()?
        } else {
            return None;
        };
        Some(hash.chars().take(10).collect())
    })
}

fn parameters(
    request: &Txt2Img,
    index: usize,
    arguments: &Arguments,
    model: &Path,
    hash: Option<&str>,
    lora_hashes: &[String],
) -> String {
    let mut list = request.parameters(index);
    if let Some(hash) = hash {
        list.push(("Model hash", hash.to_string()));
    }
    list.push((
        "Model",
        model
            .file_stem()
            .and_then(|s| s.to_str())
            .unwrap_or_default()
            .to_string(),
    ));
    if let Some(vae) = &arguments.vae {
        list.push((
            "VAE",
            vae.file_name()
                .and_then(|s| s.to_str())
                .unwrap_or_default()
                .to_string(),
        ));
    }
    if request.clip_skip > 1 {
        list.push(("Clip skip", request.clip_skip.to_string()));
    }
    if matches!(arguments.rng, Rng::Cpu) {
        list.push(("RNG", "CPU".into()));
    }
    if !lora_hashes.is_empty() {
        list.push(("Lora hashes", lora_hashes.join(", ")));
    }
    infotext(&request.prompt, &request.negative, &list)
}

/// `00001-SEED.png`, counting up: nothing is overwritten.
fn free_name(folder: &Path, seed: u64) -> PathBuf {
    (1..)
        .map(|n| folder.join(format!("{n:05}-{seed}.png")))
        .find(|path| !path.exists())
        .unwrap_or_else(|| folder.join("picture.png"))
}
