//! Tools for adapter files.
//!
//! ```text
//! lora inspect style.safetensors --clients
//! lora merge --base v1-5.safetensors a.safetensors:0.8 b.safetensors:0.5:0.2 -o merged.safetensors
//! lora extract --base v1-5.safetensors --tuned mine.safetensors --rank 32 -o mine-lora.safetensors
//! lora resize style.safetensors --rank sv_fro:0.95 --max 32 -o small.safetensors
//! lora convert lokr.safetensors --rank energy:0.99 -o lora.safetensors
//! lora convert style.safetensors --for sd.cpp -o style-cpp.safetensors
//! lora convert style.safetensors --layout diffusers -o style-diffusers.safetensors
//! lora compose a.safetensors:0.7 b.safetensors:0.3 --rank 32 -o both.safetensors
//! lora diff a.safetensors b.safetensors
//! ```
//!
//! Ranks are a number or a rule with its number: `fixed`, `threshold`, `ratio`,
//! `quantile`, `sv_ratio`, `sv_cumulative`, `sv_fro` or `energy`.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use clap::Parser;
use lora_core::algebra::{
    Clamp, ClientChange, ExtractOptions, LayerReport, MergeOptions, RankRule, ResizeOptions,
    Strength, Weights, compose, compose_as_sd_scripts, convert, convert_for, difference, extract,
    merge_into_file, resize, review_clients,
};
use lora_core::format::{FileReport, TensorFile};
use lora_core::{AdapterSet, SaveOptions};
use lora_examples::println;

#[path = "lora/arguments.rs"]
mod arguments;

use arguments::{Arguments, Command, Weighted, Write};

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() {
    if let Err(error) = run(Arguments::parse().command) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run(command: Command) -> Outcome<()> {
    lora_kernels::keep_candle_to_one_thread();
    lora_kernels::keep_freed_memory();
    match command {
        Command::Inspect {
            file,
            clients,
            layers,
        } => inspect(&file, clients, layers),
        Command::Verify { file } => verify(&file),
        Command::Merge {
            adapters,
            base,
            output,
            blocks,
            dtype,
            lenient,
        } => {
            let sets = load_all(&adapters)?;
            let options = MergeOptions {
                dtype: dtype.map(DType::from),
                lenient,
                ..MergeOptions::default()
            };
            let report = merge_into_file(
                &base,
                &strengths(&adapters, &sets, &blocks)?,
                &output,
                &options,
            )?;
            for layer in &report.unmatched {
                eprintln!("warning: not in the base: {layer}");
            }
            println!(
                "{}: {} of {} tensors changed",
                output.display(),
                report.changed,
                report.tensors
            );
            Ok(())
        }
        Command::Extract {
            base,
            tuned,
            rank,
            conv_rank,
            max,
            family,
            everything,
            tucker,
            full,
            norms,
            biases,
            clamp_quantile,
            min_diff,
            write,
        } => {
            let options = ExtractOptions {
                family,
                most: max,
                conv_rule: conv_rank,
                everything,
                tucker,
                full_above_half: full,
                norms,
                biases,
                min_diff,
                clamp: clamp_quantile.map_or(Clamp::Off, Clamp::Symmetric),
                ..ExtractOptions::new(rank)
            };
            let (set, reports) = extract(&Weights::open(base)?, &Weights::open(tuned)?, &options)?;
            save(&set, &reports, &write, &[])
        }
        Command::Resize {
            file,
            rank,
            conv_rank,
            max,
            conv_max,
            sd_scripts,
            write,
        } => {
            let options = ResizeOptions {
                most: max,
                conv_rule: conv_rank,
                conv_most: conv_max,
                sd_scripts,
                ..ResizeOptions::new(rank)
            };
            let (set, reports) = resize(&load(&file)?, &options)?;
            save(&set, &reports, &write, &[&file])
        }
        Command::Convert {
            file,
            rank,
            max,
            client,
            base,
            write,
        } => {
            let (set, base) = (load(&file)?, open(base)?);
            if rank.is_none() && client.is_none() && write.layout.is_some() {
                return save(&set, &[], &write, &[&file]);
            }
            let rank = rank.unwrap_or(RankRule::Energy(0.99));
            let Some(client) = client else {
                let (set, reports) = convert(&set, rank, max, base.as_ref())?;
                return save(&set, &reports, &write, &[&file]);
            };
            let (set, changes) = convert_for(client, &set, rank, base.as_ref())?;
            summarise(&changes, write.verbose);
            save(&set, &[], &write, &[&file])
        }
        Command::Compose {
            adapters,
            rank,
            max,
            blocks,
            base,
            sd_scripts,
            concat,
            write,
        } => {
            let sets = load_all(&adapters)?;
            let files: Vec<&Path> = adapters.iter().map(|a| a.path.as_path()).collect();
            if sd_scripts {
                let sets: Vec<_> = sets
                    .iter()
                    .zip(&adapters)
                    .map(|(s, a)| (s, a.unet))
                    .collect();
                return save(&compose_as_sd_scripts(&sets, concat)?, &[], &write, &files);
            }
            let adapters = strengths(&adapters, &sets, &blocks)?;
            let (set, reports) = compose(&adapters, rank, max, open(base)?.as_ref())?;
            save(&set, &reports, &write, &files)
        }
        Command::Diff {
            first,
            second,
            base,
        } => diff(&load(&first)?, &load(&second)?, open(base)?.as_ref()),
    }
}

fn load(path: &Path) -> Outcome<AdapterSet> {
    Ok(AdapterSet::load(path, &Device::Cpu)?)
}

fn load_all(adapters: &[Weighted]) -> Outcome<Vec<AdapterSet>> {
    adapters.iter().map(|a| load(&a.path)).collect()
}

fn open(base: Option<PathBuf>) -> Outcome<Option<Weights>> {
    Ok(base.map(Weights::open).transpose()?)
}

fn strengths<'a>(
    adapters: &[Weighted],
    sets: &'a [AdapterSet],
    blocks: &[String],
) -> Outcome<Vec<(&'a AdapterSet, Strength)>> {
    if !blocks.is_empty() && blocks.len() != adapters.len() {
        return Err(format!("{} --blocks for {} adapters", blocks.len(), adapters.len()).into());
    }
    let mut all = Vec::new();
    for (i, (set, adapter)) in sets.iter().zip(adapters).enumerate() {
        let mut strength = Strength::new(adapter.unet, adapter.text_encoder);
        if let Some(list) = blocks.get(i) {
            let list: Result<Vec<f64>, _> = list.split(',').map(|n| n.trim().parse()).collect();
            strength = strength.with_blocks(&list.map_err(|e| format!("--blocks: {e}"))?)?;
        }
        all.push((set, strength));
    }
    Ok(all)
}

/// The dtype that holds every value of these files; f16 when there are none.
fn common_dtype(files: &[&Path]) -> Outcome<DType> {
    let mut dtypes = BTreeSet::new();
    for path in files {
        let file = TensorFile::open(path)?;
        let names = file.names();
        dtypes.extend(
            names
                .iter()
                .filter_map(|name| file.dtype(name))
                .map(|d| d.as_str()),
        );
    }
    Ok(match dtypes.into_iter().collect::<Vec<_>>()[..] {
        [] | ["f16"] => DType::F16,
        ["bf16"] => DType::BF16,
        _ => DType::F32,
    })
}

/// Writes `set`, which was made of the adapters in `files`.
fn save(set: &AdapterSet, reports: &[LayerReport], write: &Write, files: &[&Path]) -> Outcome<()> {
    let rank = |report: &LayerReport| report.rank.map_or("-".into(), |r| r.to_string());
    if write.verbose {
        for r in reports {
            println!(
                "{:>5} {:>9.3e} {:>7.3}%  {}",
                rank(r),
                r.norm,
                100.0 * r.error,
                r.layer
            );
        }
    }
    // A sum has no title yet.
    let name = write.output.file_stem().and_then(|stem| stem.to_str());
    let title = name.filter(|_| files.len() > 1);
    let title = title.map(|name| ("modelspec.title".to_string(), name.to_string()));
    let options = SaveOptions {
        dtype: Some(match write.dtype {
            Some(dtype) => dtype.into(),
            None => common_dtype(files)?,
        }),
        layout: write.layout.map(Into::into).unwrap_or_default(),
        metadata: title.into_iter().collect(),
    };
    set.save(&write.output, &options)?;
    let square =
        |f: &dyn Fn(&LayerReport) -> f64| reports.iter().map(|r| f(r).powi(2)).sum::<f64>();
    let all = square(&|r| r.norm);
    println!(
        "{}: {} layers, {} parameters",
        write.output.display(),
        set.len(),
        set.parameter_count()
    );
    if all > 0.0 {
        let missing = (square(&|r| r.norm * r.error) / all).sqrt();
        let worst = reports.iter().max_by(|a, b| a.error.total_cmp(&b.error));
        let worst = worst.map(|r| format!("{:.3}% ({})", 100.0 * r.error, r.layer));
        println!(
            "error {:.3}% in all, at most {}",
            100.0 * missing,
            worst.unwrap_or_default()
        );
    }
    Ok(())
}

fn summarise(changes: &[ClientChange], verbose: bool) {
    let mut kinds: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
    for change in changes {
        let kind = kinds.entry(change.what).or_default();
        *kind = (kind.0 + 1, kind.1.max(change.error));
        if verbose {
            println!(
                "{}: {}, error {:.3}%",
                change.layer,
                change.what,
                100.0 * change.error
            );
        }
    }
    for (what, (count, error)) in kinds {
        println!(
            "{count} layers: {what}, error at most {:.3}%",
            100.0 * error
        );
    }
}

fn inspect(path: &Path, clients: bool, layers: bool) -> Outcome<()> {
    let report = FileReport::open_checking_values(path)?;
    if layers {
        for (layer, part) in &report.layers {
            let rank = part.rank.map_or("-".into(), |r| r.to_string());
            let alpha = part.alpha.map_or("-".into(), |a| a.to_string());
            println!("{:>8} {rank:>5} {alpha:>8}  {layer}", part.family);
        }
    }
    println!("{report}");
    for (key, value) in &report.metadata {
        let short: String = value.chars().take(120).collect();
        println!("  {key}: {short}");
    }
    if clients {
        let file = TensorFile::open(path)?;
        for report in review_clients(&file, &AdapterSet::outline(path)?)? {
            println!("{}: {} layers read right", report.client, report.right);
            for f in &report.findings {
                println!(
                    "  {}: {} ({} layers, such as {})",
                    f.outcome, f.what, f.layers, f.example
                );
            }
        }
    }
    Ok(())
}

fn verify(path: &Path) -> Outcome<()> {
    let report = FileReport::open_checking_values(path)?;
    for finding in &report.findings {
        let kind = match finding.kind.is_error() {
            true => "error",
            false => "note",
        };
        println!("{kind}: {}", finding.message);
    }
    match report.errors().count() {
        0 => println!(
            "{}: {} layers, no errors",
            path.display(),
            report.layers.len()
        ),
        count => return Err(format!("{}: {count} errors", path.display()).into()),
    }
    Ok(())
}

fn diff(first: &AdapterSet, second: &AdapterSet, base: Option<&Weights>) -> Outcome<()> {
    println!(
        "{:>10} {:>10} {:>9} {:>7}  layer",
        "norm 1", "norm 2", "distance", "cosine"
    );
    let norm = |norm: Option<f64>| norm.map_or("-".into(), |n| format!("{n:.3e}"));
    for d in difference(first, second, base)? {
        println!(
            "{:>10} {:>10} {:>8.3}% {:>7.4}  {}",
            norm(d.first),
            norm(d.second),
            100.0 * d.relative(),
            d.cosine,
            d.layer
        );
    }
    let (a, b) = (first.metadata(), second.metadata());
    for key in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
        if a.get(key) != b.get(key) {
            let text = |m: &BTreeMap<String, String>| m.get(key).cloned().unwrap_or("-".into());
            println!("{key}: {} | {}", text(a), text(b));
        }
    }
    Ok(())
}
