//! Merging, extracting and inspecting at the sizes of Stable Diffusion 1.5.
//!
//! `cargo bench -p lora-benches --bench algebra`
//!
//! `merge` and `copy` need a checkpoint: `LORA_BENCH_CHECKPOINT=full.safetensors`; the
//! merged file is written beside it and removed. Both end when the data is on disk.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use lora_core::algebra::{MergeOptions, Strength, Svd, Weights, merge_into_file, review_clients};
use lora_core::format::TensorFile;
use lora_core::{AdapterSet, Lora, SaveOptions};

/// Values that look random and do not depend on a generator.
fn noise(dims: &[usize], seed: usize) -> Tensor {
    let values = (0..dims.iter().product::<usize>())
        .map(|i| (((i * 2_654_435_761 + seed * 40_503) % 65_536) as f32 / 32_768.0 - 1.0) * 0.02);
    Tensor::from_vec(values.collect::<Vec<f32>>(), dims, &Device::Cpu).expect("a tensor")
}

/// A LoRA for every transformer layer, by name and the weight's shape.
fn adapter(layers: &[(String, Vec<usize>)], rank: usize) -> AdapterSet {
    let mut set = AdapterSet::default();
    for (seed, (name, dims)) in layers.iter().enumerate() {
        let (down, up) = match *dims.as_slice() {
            [o, i] => (vec![rank, i], vec![o, rank]),
            [o, i, kh, kw] => (vec![rank, i, kh, kw], vec![o, rank, 1, 1]),
            _ => continue,
        };
        let lora = Lora::new(name, noise(&down, seed), None, noise(&up, seed + 1), 1.0);
        set.insert(name.clone(), Arc::new(lora.expect("a LoRA")));
    }
    set
}

/// SD1.5's transformer layers, near enough.
fn layers() -> Vec<(String, Vec<usize>)> {
    let mut all = Vec::new();
    let blocks = [(0, 320), (1, 640), (2, 1280)];
    for (block, c) in blocks
        .into_iter()
        .chain(blocks)
        .chain([(0, 1280), (1, 640)])
    {
        for (part, o, i) in [
            ("attn1_to_q", c, c),
            ("attn1_to_k", c, c),
            ("attn1_to_v", c, c),
            ("attn1_to_out_0", c, c),
            ("ff_net_0_proj", 8 * c, c),
            ("ff_net_2", c, 4 * c),
            ("attn2_to_k", c, 768),
            ("attn2_to_v", c, 768),
        ] {
            let n = all.len() / 8 % 2;
            let name = format!(
                "lora_unet_down_blocks_{block}_attentions_{n}_{part}_{}",
                all.len()
            );
            all.push((name, vec![o, i]));
        }
    }
    all
}

fn inspect(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("large.safetensors");
    let options = SaveOptions {
        dtype: Some(DType::F16),
        ..SaveOptions::default()
    };
    adapter(&layers(), 384)
        .save(&path, &options)
        .expect("a file");
    c.bench_function("inspect", |b| {
        b.iter(|| {
            let file = TensorFile::open(&path).expect("a file");
            let set = AdapterSet::outline(&path).expect("a set");
            review_clients(&file, &set).expect("a report")
        });
    });
}

fn svd(c: &mut Criterion) {
    let mut group = c.benchmark_group("svd rank 32");
    group.sample_size(10);
    for (o, i) in [(320, 320), (1280, 1280), (10240, 1280)] {
        let matrix = noise(&[o, i], 7);
        group.bench_function(format!("{o}x{i}"), |b| {
            b.iter(|| Svd::truncated(&matrix, 32))
        });
    }
    group.finish();
}

/// Reads and writes the whole file and waits for the disk, as merging does.
fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::copy(from, to)?;
    let mut file = std::fs::OpenOptions::new().append(true).open(to)?;
    file.flush()?;
    file.sync_all()
}

fn merge(c: &mut Criterion) {
    let Some(base) = std::env::var_os("LORA_BENCH_CHECKPOINT").map(PathBuf::from) else {
        return;
    };
    let weights = Weights::open(&base).expect("a checkpoint");
    let mut targets = Vec::new();
    for layer in weights.layers() {
        let transformer = ["_attentions_", "_self_attn_", "_mlp_"];
        if transformer.iter().any(|part| layer.contains(part)) {
            let weight = weights.weight(layer).expect("readable").expect("there");
            if weight.rank() > 1 {
                targets.push((layer.to_string(), weight.dims().to_vec()));
            }
        }
    }
    let set = adapter(&targets, 32);
    let output = base.with_extension("merged.tmp");
    let mut group = c.benchmark_group("checkpoint");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(60));
    group.bench_function("copy", |b| b.iter(|| copy(&base, &output).expect("copied")));
    group.bench_function("merge", |b| {
        b.iter(|| {
            let adapters = [(&set, Strength::default())];
            merge_into_file(&base, &adapters, &output, &MergeOptions::default()).expect("merged")
        });
    });
    group.finish();
    std::fs::remove_file(&output).expect("removed");
}

criterion_group!(benches, inspect, svd, merge);
criterion_main!(benches);
