//! The memory estimate of the plan against what a process really takes. Each run is a
//! process of its own: a peak never falls again.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use candle_core::Device;
use lora_examples::{demo_config, peak_memory_mb};
use lora_train::{Event, TrainConfig, Trainer};

/// What the child is to do.
const TASK: &str = "MEMORY_CHILD";

fn config(task: &str, folder: &Path) -> TrainConfig {
    let plain = TrainConfig {
        output_dir: Some(folder.into()),
        resolution: "384".into(),
        min_bucket_reso: 256,
        max_bucket_reso: 1024,
        train_batch_size: 2,
        max_train_epochs: None,
        max_train_steps: 2,
        save_every_n_epochs: None,
        ..demo_config()
    };
    let lora = TrainConfig {
        network_module: None,
        network_args: vec![],
        network_dim: Some(16),
        optimizer_type: "AdamW".into(),
        optimizer_args: vec![],
        ..plain.clone()
    };
    match task {
        "loha" => plain,
        "lora" => lora,
        "checkpointing" => TrainConfig {
            gradient_checkpointing: true,
            train_batch_size: 6,
            ..lora
        },
        // Ten batches per update hold no more than one.
        "accumulation" => TrainConfig {
            gradient_accumulation_steps: 10,
            max_train_steps: 1,
            ..lora
        },
        "dora" => TrainConfig {
            network_module: Some("lycoris.kohya".into()),
            network_args: vec!["algo=locon".into(), "dora_wd=True".into()],
            ..lora
        },
        "lokr" => TrainConfig {
            network_module: Some("lycoris.kohya".into()),
            network_args: vec!["algo=lokr".into(), "factor=4".into()],
            ..lora
        },
        // As many steps as the pictures of a real run have.
        "samples" => {
            let prompts = folder.join("prompts.txt");
            std::fs::write(&prompts, "zoe --w 384 --h 384 --s 12 --d 1\n").unwrap();
            TrainConfig {
                sample_prompts: Some(prompts),
                sample_at_first: true,
                ..lora
            }
        }
        other => panic!("no task {other}"),
    }
}

/// The child's part of the tests: it trains and prints what it estimated and what it took.
#[test]
fn child_process() {
    let Ok(task) = std::env::var(TASK) else {
        return;
    };
    lora_kernels::keep_candle_to_one_thread();
    lora_kernels::keep_freed_memory();
    let (task, folder) = task.split_once(' ').unwrap();
    let mut observer = |event: &Event<'_>| {
        if let Event::Warning(text) = event {
            assert!(!text.contains("not drawn"), "{text}");
        }
    };
    let config = config(task, &PathBuf::from(folder));
    let mut trainer = Trainer::new(config, &Device::Cpu, &mut observer).unwrap();
    trainer.run(&mut observer, &AtomicBool::new(false)).unwrap();
    let estimate = trainer.plan().memory.clone().unwrap();
    let peak = peak_memory_mb().unwrap() * (1 << 20);
    println!("PEAK {} {peak}", estimate.peak());
}

#[test]
fn the_estimate_is_within_15_percent_of_the_peak() {
    let folder = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    for task in [
        "lora",
        "checkpointing",
        "loha",
        "lokr",
        "dora",
        "samples",
        "accumulation",
    ] {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["child_process", "--exact", "--quiet", "--nocapture"])
            .env(TASK, format!("{task} {}", folder.path().display()))
            // A test runs on a thread, which has a heap of its own before the child can choose.
            .env("MALLOC_ARENA_MAX", "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&child.stdout);
        let figures = text.lines().find_map(|line| line.split("PEAK ").nth(1));
        let error = String::from_utf8_lossy(&child.stderr);
        let figures = figures.unwrap_or_else(|| panic!("{task}: {text}{error}"));
        let (estimate, peak) = figures.split_once(' ').unwrap();
        let (estimate, peak): (f64, f64) = (estimate.parse().unwrap(), peak.parse().unwrap());
        let line = format!(
            "{task}: estimated {:.0} MB, took {:.0} MB",
            estimate / 1e6,
            peak / 1e6
        );
        println!("{line}");
        if (estimate / peak - 1.0).abs() > 0.15 {
            wrong.push(line);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
