//! Datasets: decoding and resizing photos, listing and planning large folders.
//!
//!     cargo bench -p lora-benches --bench data
//!
//! The pictures are made on the first run and kept in `target/tmp/bench-data`
//! (`BENCH_DATA` names another folder), so that other programs can be timed on
//! the same files.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use image::{ExtendedColorType, ImageEncoder, RgbImage};
use lora_data::{Dataset, DatasetConfig, Loader, LoaderConfig};

const PHOTOS: usize = 200;
const LISTED: usize = 100_000;

fn folder() -> PathBuf {
    match std::env::var_os("BENCH_DATA") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench-data"),
    }
}

/// A picture as smooth and as noisy as a photo: about 2 MB as JPEG.
fn photo(width: u32, height: u32, seed: u32) -> RgbImage {
    let wave = |a: u32, b: u32, scale: f32| {
        ((a as f32 / scale).sin() + (b as f32 / scale / 1.7).cos()) * 50.0
    };
    RgbImage::from_fn(width, height, |x, y| {
        let hash = (x.wrapping_mul(0x9e37_79b1) ^ y.wrapping_mul(0x85eb_ca6b) ^ seed)
            .wrapping_mul(0xc2b2_ae35);
        let grain = (hash >> 28) as f32;
        let light = 110.0 + wave(x + seed * 31, y, 170.0) + wave(y, x, 23.0) * 0.3 + grain;
        image::Rgb([light, light * 0.9 + wave(x, y, 300.0) * 0.2, light * 0.8].map(|v| v as u8))
    })
}

fn write_once(folder: &Path, count: usize, extension: &str, bytes: impl Fn(usize) -> Vec<u8>) {
    if folder.join("complete").exists() {
        return;
    }
    fs::create_dir_all(folder).expect("a folder");
    let samples: Vec<Vec<u8>> = (0..10).map(bytes).collect();
    for i in 0..count {
        let name = folder.join(format!("picture_{i:06}.{extension}"));
        fs::write(&name, &samples[i % samples.len()]).expect("a picture");
        fs::write(
            name.with_extension("txt"),
            format!("subject, tag {i}, background {}", i % 7),
        )
        .expect("a caption");
    }
    fs::write(folder.join("complete"), b"").expect("a mark");
}

/// Quality 90 with halved colour resolution, as cameras and phones write it.
fn jpeg(seed: usize) -> Vec<u8> {
    let (width, height) = (3000, 2000);
    let mut bytes = Vec::new();
    let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, 90);
    encoder.set_sampling_factor(jpeg_encoder::SamplingFactor::R_4_2_0);
    encoder
        .encode(
            &photo(width.into(), height.into(), seed as u32),
            width,
            height,
            jpeg_encoder::ColorType::Rgb,
        )
        .expect("a JPEG");
    bytes
}

fn png(seed: usize) -> Vec<u8> {
    let (width, height) = (64 + 8 * seed as u32, 96);
    let mut bytes = Vec::new();
    image::codecs::png::PngEncoder::new(&mut bytes)
        .write_image(
            &photo(width, height, seed as u32),
            width,
            height,
            ExtendedColorType::Rgb8,
        )
        .expect("a PNG");
    bytes
}

/// 200 JPEGs of 3000x2000 to tensors of their buckets.
fn photos_to_pixels(c: &mut Criterion) {
    let folder = folder().join("10_photos");
    write_once(&folder, PHOTOS, "jpg", jpeg);
    let mut group = c.benchmark_group("photos");
    group
        .sample_size(10)
        .throughput(Throughput::Elements(PHOTOS as u64));
    group.bench_function("list, decode, resize, crop", |b| {
        b.iter(|| {
            let dataset = Arc::new(
                Dataset::from_folder(&folder, &DatasetConfig::default()).expect("a dataset"),
            );
            let batches = dataset.each_once(|_| true);
            let loader = Loader::new(dataset, batches, LoaderConfig::default()).expect("a loader");
            loader
                .map(|batch| batch.expect("a batch").pixels.len())
                .sum::<usize>()
        });
    });
    group.finish();
}

/// 100,000 pictures with captions to the first epoch's plan.
fn list_and_plan(c: &mut Criterion) {
    let folder = folder().join("1_listed");
    write_once(&folder, LISTED, "png", png);
    let before = peak_memory_mb();
    let mut group = c.benchmark_group("100,000 pictures");
    group.sample_size(10);
    group.bench_function("list and plan", |b| {
        b.iter(|| {
            let options = DatasetConfig {
                batch_size: 4,
                ..Default::default()
            };
            Dataset::from_folder(&folder, &options)
                .expect("a dataset")
                .epoch(1, 42)
                .batches
                .len()
        });
    });
    group.finish();
    if let (Some(before), Some(after)) = (before, peak_memory_mb()) {
        println!("peak memory of the process: {before} MB before, {after} MB after listing");
    }
}

fn peak_memory_mb() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace()
        .nth(1)?
        .parse::<u64>()
        .ok()
        .map(|kb| kb / 1024)
}

// Listing first: its peak memory would drown in that of the photos.
criterion_group!(benches, list_and_plan, photos_to_pixels);
criterion_main!(benches);
