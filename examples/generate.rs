//! Draws pictures.
//!
//! ```text
//! cargo run --release --example generate -- --model v1-5.safetensors --lora-dir out \
//!     --prompt "1girl, zoe, smile <lora:zoe:0.8>" --negative "lowres" --seed 1 --steps 20
//! cargo run --release --example generate -- --model v1-5.safetensors --from picture.png
//! cargo run --release --example generate -- --model v1-5.safetensors \
//!     --prompt "zoe <lora:zoe:1>" --x "LoRA weight=0.4-1 [4]" --y "Seed=1-3"
//! cargo run --release --example generate -- --model v1-5.safetensors --init photo.jpg \
//!     --prompt "photo of zoe" --strength 0.4 --batch-count 20 --caption "zoe"
//! ```
//!
//! Without `--model` the bundled miniature is used, whose pictures are patterns.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::DType;
use clap::Parser;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use lora_examples::drawing::{Arguments, ModelInfo, hashes};
use lora_examples::{demo_model, device, peak_memory_mb};
use lora_sd15::{Checkpoint, Image, Img2Img, StableDiffusion, Step, Sweep, Txt2Img};

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() {
    if let Err(error) = run(&Arguments::parse()) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run(arguments: &Arguments) -> Outcome<()> {
    lora_kernels::keep_candle_to_one_thread();
    lora_kernels::keep_freed_memory();
    let device = device(&arguments.device)?;
    let dtype = match arguments.dtype.as_str() {
        "f32" => DType::F32,
        "bf16" => DType::BF16,
        "f16" => DType::F16,
        other => return Err(format!("--dtype {other}: expected f32, bf16 or f16").into()),
    };
    let job = arguments.job()?;
    let picture = arguments.from_picture(&job)?;
    let axes = arguments.axes()?;
    let sweep = (!axes.is_empty())
        .then(|| Sweep::new(job.clone(), axes))
        .transpose()?;
    let jobs: Vec<Txt2Img> = match &sweep {
        Some(sweep) => sweep.jobs().to_vec(),
        None => (0..arguments.batch_count).map(|i| batch(&job, i)).collect(),
    };
    std::fs::create_dir_all(&arguments.output)
        .map_err(|e| format!("{}: {e}", arguments.output.display()))?;

    let model = arguments.model.clone().unwrap_or_else(demo_model);
    let info = ModelInfo::of(&model, arguments.vae.as_deref());
    let mut checkpoint = Checkpoint::open(&model)?;
    if let Some(vae) = &arguments.vae {
        checkpoint = checkpoint.with_vae(vae)?;
    }
    let mut sd = StableDiffusion::from_checkpoint(&checkpoint, dtype, &device)?;
    arguments.prepare(&mut sd, &jobs)?;
    let info = info.finish();

    let mut progress = Progress::new(jobs.len())?;
    let mut drawn = Vec::new();
    for job in &jobs {
        let request = picture.as_ref().map(|picture| Img2Img {
            job: job.clone(),
            ..picture.clone()
        });
        let images = match &request {
            Some(request) => sd.img2img(request, &mut |step| progress.step(&step))?,
            None => sd.txt2img(job, &mut |step| progress.step(&step))?,
        };
        let mut extra = request.map_or_else(Vec::new, |request| request.parameters());
        extra.extend(hashes(&sd, job));
        for (i, image) in images.iter().enumerate() {
            let path = free_name(
                &arguments.output,
                &job.seed.wrapping_add(i as u64).to_string(),
            );
            image.save_png(&path, Some(&job.infotext(i, &info, &extra)))?;
            if let Some(caption) = &arguments.caption {
                std::fs::write(path.with_extension("txt"), caption)?;
            }
            println!("{}", path.display());
        }
        drawn.extend(images);
        progress.picture();
    }
    if let Some(sweep) = &sweep {
        save_grids(sweep, &drawn, &arguments.output)?;
    }
    progress.finish();
    Ok(())
}

/// The job of batch `index`: seeds count on.
fn batch(job: &Txt2Img, index: u64) -> Txt2Img {
    let mut job = job.clone();
    let before = index * job.batch_size as u64;
    match &mut job.variation {
        Some(variation) if variation.strength > 0.0 => {
            variation.seed = variation.seed.wrapping_add(before);
        }
        _ => job.seed = job.seed.wrapping_add(before),
    }
    job
}

fn save_grids(sweep: &Sweep, drawn: &[Image], folder: &Path) -> Outcome<()> {
    for grid in sweep.grids(drawn) {
        let path = free_name(folder, "grid");
        grid.draw().save_png(&path, None)?;
        println!("{}", path.display());
    }
    Ok(())
}

/// `00001-NAME.png`, counting up: nothing is overwritten.
fn free_name(folder: &Path, name: &str) -> PathBuf {
    (1..)
        .map(|n| folder.join(format!("{n:05}-{name}.png")))
        .find(|path| !path.exists())
        .unwrap_or_else(|| folder.join("picture.png"))
}

/// Bars for the current batch and for all, and the times at the end.
struct Progress {
    one: ProgressBar,
    all: ProgressBar,
    started: Instant,
    steps: usize,
}

impl Progress {
    fn new(batches: usize) -> Outcome<Self> {
        let bars = MultiProgress::new();
        let one = bars.add(ProgressBar::new(1));
        one.set_style(ProgressStyle::with_template(
            "steps {bar:30} {pos}/{len} [{elapsed}<{eta}, {msg}]",
        )?);
        let all = bars.add(ProgressBar::new(batches as u64));
        all.set_style(ProgressStyle::with_template(
            "in all {bar:29} {pos}/{len} [{elapsed}<{eta}]",
        )?);
        Ok(Self {
            one,
            all,
            started: Instant::now(),
            steps: 0,
        })
    }

    fn step(&mut self, step: &Step<'_>) -> bool {
        self.steps += 1;
        if step.done == 1 {
            self.one.reset();
        }
        self.one.set_length(step.total as u64);
        self.one.set_position(step.done as u64);
        let seconds = self.one.elapsed().as_secs_f64() / step.done.max(2).saturating_sub(1) as f64;
        self.one.set_message(format!("{seconds:.2} s/it"));
        true
    }

    fn picture(&self) {
        self.all.inc(1);
    }

    fn finish(&self) {
        self.one.finish_and_clear();
        self.all.finish_and_clear();
        let seconds = self.started.elapsed().as_secs_f64();
        let memory = peak_memory_mb().map_or(String::new(), |mb| format!(", peak memory {mb} MB"));
        eprintln!(
            "{seconds:.1} s, {:.2} s/it with decoding{memory}",
            seconds / self.steps.max(1) as f64
        );
    }
}
