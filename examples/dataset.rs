//! Looks at a dataset before it is trained: the sum, the findings, a contact sheet.
//!
//!     cargo run --release -p lora-examples --example dataset -- photos --sheet sheet.png
//!
//! Takes what kohya users have: the parent of folders named `10_name`, one such
//! folder, a plain folder of images, or a dataset config file. Exits with 1 when
//! the dataset cannot be used, and with `--strict` also when something was found.
//!
//! `--images` lists every picture with its size, its bucket and what the crop takes away.
//!
//! `--clean-cache out/latent-cache` lists the cached latents that edited and removed pictures
//! left behind; `--delete` deletes them.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use lora_data::doctor::{DoctorConfig, examine};
use lora_data::{
    ContactSheetConfig, DataConfig, Dataset, DatasetConfig, DatasetReport, Finding, ReportConfig,
    RunLength, Severity, Size, leftovers, remove_leftovers, write_contact_sheet,
};
use lora_examples::{print, println};

#[derive(Parser)]
#[command(
    about = "Shows what a training run will make of a dataset, and what is likely to go wrong"
)]
struct Options {
    /// A folder of images, the parent of `N_name` folders, or a dataset config (.toml, .json)
    data: PathBuf,
    /// Folder of regularization images
    #[arg(long)]
    reg: Option<PathBuf>,
    /// Resolution, as 512 or 768,512
    #[arg(long, default_value = "512")]
    resolution: Size,
    /// Images per batch
    #[arg(long, default_value_t = 1)]
    batch_size: usize,
    /// Batches per update
    #[arg(long, default_value_t = 1)]
    gradient_accumulation_steps: usize,
    /// Epochs of the run
    #[arg(long, default_value_t = 10)]
    epochs: usize,
    /// Never enlarge an image
    #[arg(long)]
    bucket_no_upscale: bool,
    /// Shuffle tags
    #[arg(long)]
    shuffle_caption: bool,
    /// Tags at the front that stay
    #[arg(long, default_value_t = 0)]
    keep_tokens: usize,
    /// The trigger word, if it is not the most frequent first tag
    #[arg(long)]
    trigger: Option<String>,
    /// Write a contact sheet of the pictures as they are trained
    #[arg(long, value_name = "FILE.png")]
    sheet: Option<PathBuf>,
    /// List every picture: size, resized size, bucket, what the crop takes away
    #[arg(long)]
    images: bool,
    /// Do not decode the pictures (finds no near-duplicates)
    #[arg(long)]
    quick: bool,
    /// Exit with 1 when there is a warning
    #[arg(long)]
    strict: bool,
    /// Only list what edited and removed pictures left in this folder of cached latents
    #[arg(long, value_name = "OUTPUT_DIR/latent-cache")]
    clean_cache: Option<PathBuf>,
    /// With --clean-cache: delete it
    #[arg(long, requires = "clean_cache")]
    delete: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    let dataset = load(options)?;
    if let Some(folder) = &options.clean_cache {
        clean_cache(folder, &dataset, options.delete)?;
        return Ok(ExitCode::SUCCESS);
    }
    let config = ReportConfig {
        gradient_accumulation_steps: options.gradient_accumulation_steps,
        length: RunLength::Epochs(options.epochs),
        ..Default::default()
    };
    print!("{}", DatasetReport::new(&dataset, &config));

    if options.images {
        print_images(&dataset);
    }
    let doctor = DoctorConfig {
        look_at_images: !options.quick,
        trigger: options.trigger.clone(),
    };
    let mut findings: Vec<Finding> = dataset.findings().to_vec();
    findings.extend(examine(&dataset, &doctor));
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    println!("\n{} findings", findings.len());
    for finding in &findings {
        println!("  {:?}: {finding}", finding.severity);
    }

    if let Some(path) = &options.sheet {
        write_contact_sheet(&dataset, path, &ContactSheetConfig::default())?;
        println!("\ncontact sheet: {}", path.display());
    }
    let is_worrying = findings
        .iter()
        .any(|finding| finding.severity >= Severity::Warning);
    Ok(if options.strict && is_worrying {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// One line per picture, so that the worst can be sorted out.
fn print_images(dataset: &Dataset) {
    println!("original     resized      bucket       cropped  scale  image");
    for image in dataset.images() {
        println!(
            "{:<12} {:<12} {:<12} {:>5.1} %  {:>5.2}  {}",
            image.size.to_string(),
            image.resized.to_string(),
            image.bucket.to_string(),
            100.0 * image.cropped(),
            image.enlarged(),
            image.path.display()
        );
    }
}

/// Lists what no picture of the dataset needs, and deletes it if asked to.
fn clean_cache(folder: &Path, dataset: &Dataset, delete: bool) -> lora_data::Result<()> {
    let list = leftovers(folder, dataset)?;
    for file in &list {
        println!("{} ({})", file.path.display(), file.reason);
    }
    let bytes: u64 = list.iter().map(|file| file.bytes).sum();
    let what = format!("{} files, {:.1} MB", list.len(), bytes as f64 / 1e6);
    if delete {
        remove_leftovers(&list)?;
        println!("deleted {what}");
    } else {
        println!("{what} to delete; nothing was deleted: give --delete for that");
    }
    Ok(())
}

fn load(options: &Options) -> lora_data::Result<Dataset> {
    let mut dataset = DatasetConfig {
        resolution: options.resolution,
        min_bucket_reso: options
            .resolution
            .width
            .min(options.resolution.height)
            .min(256),
        batch_size: options.batch_size,
        bucket_no_upscale: options.bucket_no_upscale,
        ..Default::default()
    };
    dataset.subset.captions.shuffle_caption = options.shuffle_caption;
    dataset.subset.captions.keep_tokens = options.keep_tokens;
    let run = DataConfig::default();
    if options.data.is_file() {
        // In a file the defaults are sd-scripts' own: no buckets unless it says so.
        dataset.enable_bucket = false;
        return Dataset::from_config_file(&options.data, &dataset, &run);
    }
    Dataset::from_folders(&options.data, options.reg.as_ref(), &dataset, &run)
}
