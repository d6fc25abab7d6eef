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
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use candle_core::Device;
use clap::Parser;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use lora_examples::drawing::{Arguments, ModelInfo, hashes};
use lora_examples::{device, peak_memory_mb, println};
use lora_sd15::{Cell, Image, Infotext, StableDiffusion, Step, Sweep};

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() {
    if let Err(error) = run(Arguments::parse()) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run(mut arguments: Arguments) -> Outcome<()> {
    lora_kernels::keep_candle_to_one_thread();
    lora_kernels::keep_freed_memory();
    let device = device(&arguments.device)?;
    let text = arguments.recall()?;
    let job = arguments.job(text.as_ref())?;
    let picture = arguments.from_picture(&job, text.as_ref())?;
    let (sweep, cells) = arguments.cells(&job)?;
    let files = cells.iter().map(|cell| arguments.files(cell));
    let files = files.collect::<Outcome<Vec<_>>>()?;
    std::fs::create_dir_all(&arguments.output)
        .map_err(|e| format!("{}: {e}", arguments.output.display()))?;
    let saved = stop_on_ctrl_c(arguments.output.clone())?;

    let mut progress = Progress::new(cells.len())?;
    let mut drawn: Vec<(usize, Image)> = Vec::new();
    let mut loaded: Option<Loaded> = None;
    let in_order = || (0..cells.len()).collect();
    for index in sweep.as_ref().map_or_else(in_order, Sweep::drawing_order) {
        let (cell, files) = (&cells[index], &files[index]);
        let model = match loaded.take().filter(|model| model.files == *files) {
            Some(model) => loaded.insert(model),
            None => loaded.insert(Loaded::new(
                &arguments,
                files,
                &device,
                &cells,
                text.as_ref(),
            )?),
        };
        let request = picture.as_ref().map(|picture| cell.from_picture(picture));
        let images = match &request {
            Some(request) => model
                .sd
                .img2img(request, &mut |step| progress.step(&step))?,
            None => model
                .sd
                .txt2img(&cell.job, &mut |step| progress.step(&step))?,
        };
        let mut extra = request.map_or_else(Vec::new, |request| request.parameters());
        extra.extend(hashes(&model.sd, &cell.job));
        extra.extend(arguments.own_parameters());
        for (i, image) in images.into_iter().enumerate() {
            let seed = cell.job.seed.wrapping_add(i as u64);
            let path = free_name(&arguments.output, &seed.to_string());
            let parameters = cell.job.infotext(i, model.info.get(), &extra);
            let mut saved = saved.lock().unwrap_or_else(PoisonError::into_inner);
            image.save_png(&path, Some(&parameters))?;
            if let Some(caption) = &arguments.caption {
                std::fs::write(path.with_extension("txt"), caption)?;
            }
            *saved += 1;
            println!("{}", path.display());
            if sweep.is_some() {
                drawn.push((index, image));
            }
        }
        progress.picture();
    }
    if let Some(sweep) = &sweep {
        drawn.sort_by_key(|(index, _)| *index);
        let pictures: Vec<Image> = drawn.into_iter().map(|(_, image)| image).collect();
        save_grids(sweep, &pictures, &arguments.output)?;
    }
    progress.finish();
    Ok(())
}

/// Ends the program at Ctrl-C, but not while a picture is written: who writes holds the
/// number of finished ones.
fn stop_on_ctrl_c(folder: PathBuf) -> Outcome<Arc<Mutex<usize>>> {
    let saved = Arc::new(Mutex::new(0));
    let seen = saved.clone();
    ctrlc::set_handler(move || {
        let saved = seen.lock().unwrap_or_else(PoisonError::into_inner);
        eprintln!(
            "\nstopped; finished pictures in {}: {saved}",
            folder.display()
        );
        std::process::exit(130);
    })?;
    Ok(saved)
}

/// The networks of one checkpoint and VAE.
struct Loaded {
    files: (PathBuf, Option<PathBuf>),
    sd: StableDiffusion,
    info: ModelInfo,
}

impl Loaded {
    fn new(
        arguments: &Arguments,
        files: &(PathBuf, Option<PathBuf>),
        device: &Device,
        cells: &[Cell],
        text: Option<&Infotext>,
    ) -> Outcome<Self> {
        let started = Instant::now();
        let (model, vae) = (&files.0, files.1.as_deref());
        let mut sd = arguments.load(model, vae, device)?;
        arguments.prepare(&mut sd, cells)?;
        let mut info = ModelInfo::of(model, vae);
        eprintln!(
            "{} read in {:.1} s",
            model.display(),
            started.elapsed().as_secs_f64()
        );
        if let (Some(text), Some(cell)) = (text, cells.first()) {
            let mut now = info.get().to_vec();
            now.extend(hashes(&sd, &cell.job));
            for difference in text.mismatches(&now) {
                eprintln!("warning: {difference}; the pictures will differ");
            }
        }
        Ok(Self {
            files: files.clone(),
            sd,
            info,
        })
    }
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
