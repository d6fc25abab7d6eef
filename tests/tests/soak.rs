//! A long run: memory and open files stay where they are.
//! `cargo test --release -p lora-tests --test soak -- --ignored --nocapture` (a few minutes).

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use candle_core::Device;
use lora_tests::golden_path;
use lora_train::{Event, TrainConfig, Trainer};

const UPDATES: usize = 2000;

/// Resident memory in kilobytes.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
#[ignore = "takes minutes"]
fn memory_and_open_files_stay_flat() {
    let folder = tempfile::tempdir().unwrap();
    let config = TrainConfig {
        pretrained_model_name_or_path: Some(golden_path("sd15", "mini_ldm.safetensors")),
        train_data_dir: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo")),
        output_dir: Some(folder.path().join("out")),
        logging_dir: Some(folder.path().join("logs")),
        resolution: "64".into(),
        min_bucket_reso: 64,
        max_bucket_reso: 128,
        train_batch_size: 2,
        max_train_steps: UPDATES,
        save_every_n_steps: Some(50),
        save_last_n_steps: Some(50),
        save_state: true,
        shuffle_caption: true,
        seed: Some(1),
        ..TrainConfig::default()
    };
    // Update, memory, open files; after a start in which buffers find their size.
    let mut samples: Vec<(usize, u64, usize)> = Vec::new();
    let started = Instant::now();
    let mut observer = |event: &Event<'_>| {
        if let Event::Batch(report) = event
            && report.step >= 200
            && report.step.is_multiple_of(100)
        {
            samples.push((report.step, memory(), open_files()));
        }
    };
    let mut trainer = Trainer::new(config, &Device::Cpu, &mut observer).unwrap();
    trainer.run(&mut observer, &AtomicBool::new(false)).unwrap();
    for (step, memory, files) in &samples {
        println!("update {step}: {} MB, {files} open files", memory / 1024);
    }
    println!(
        "{UPDATES} updates in {:.0} s",
        started.elapsed().as_secs_f64()
    );
    let half = samples.len() / 2;
    let most = |part: &[(usize, u64, usize)]| part.iter().map(|s| s.1).max().unwrap();
    let (early, late) = (most(&samples[..half]), most(&samples[half..]));
    assert!(
        late <= early + early / 20 + 4096,
        "{early} kB grew to {late} kB"
    );
    let files: Vec<usize> = samples.iter().map(|s| s.2).collect();
    assert!(
        files.iter().max().unwrap() - files.iter().min().unwrap() <= 2,
        "{files:?}"
    );
}
