//! Damaged files: thousands of them per reader, from fixed seeds. A reader may refuse a
//! file or, where the damage is in the numbers, read it; it must not panic, hang, or ask
//! for more memory than the file could fill.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::Device;
use lora_core::AdapterSet;
use lora_core::format::FileReport;
use lora_data::{ConfigFile, ConfigSyntax, DataConfig, DatasetConfig};
use lora_sd15::prompt::{extract_tags, parse_attention};
use lora_tests::{bundled_json, golden_path};
use lora_train::gui::read_config;
use lora_train::{RunState, SamplePrompt, TrainConfig};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const FILES: usize = 10_000;
/// No reader of the small files here may ask for this much at once.
const LIMIT: usize = 64 << 20;

/// Refuses allocations beyond [`LIMIT`] by aborting with a message, in every thread.
struct Capped;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed on unchanged to the system's allocator.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Capped {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Capped = Capped;

/// One to four random changes.
fn mutate(bytes: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut out = bytes.to_vec();
    // Headers and grammar are at the front: half of the changes go there.
    let place = |out: &[u8], rng: &mut ChaCha8Rng| {
        let front = out.len().min(2048);
        if rng.random() {
            rng.random_range(0..front.max(1))
        } else {
            rng.random_range(0..out.len().max(1))
        }
    };
    for _ in 0..rng.random_range(1..=4) {
        if out.is_empty() {
            break;
        }
        let at = place(&out, rng).min(out.len() - 1);
        match rng.random_range(0..8) {
            0 => out[at] ^= 1 << rng.random_range(0..8),
            1 => out[at] = rng.random(),
            2 => out.truncate(at),
            3 => {
                out.remove(at);
            }
            4 => out.insert(at, *b"09-{[\"}],:\\e".get(rng.random_range(0..12)).unwrap()),
            5 => {
                let end = (at + rng.random_range(1..64)).min(out.len());
                let copy = out[at..end].to_vec();
                out.splice(at..at, copy);
            }
            6 => {
                let end = (at + rng.random_range(1..64)).min(out.len());
                out.drain(at..end);
            }
            _ => {
                let digits = b"99999999999999999999";
                out.splice(at..at, digits[..rng.random_range(1..20)].iter().copied());
            }
        }
    }
    out
}

/// Runs a reader over mutated copies of a file.
fn attack(name: &str, seed: u64, original: &[u8], count: usize, mut read: impl FnMut(&[u8])) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    LARGEST.store(0, Ordering::Relaxed);
    for i in 0..count {
        let bytes = mutate(original, &mut rng);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| read(&bytes)));
        assert!(
            result.is_ok(),
            "{name}: file {i} of seed {seed} made the reader panic"
        );
    }
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(
        largest < LIMIT,
        "{name}: {largest} bytes were asked for at once"
    );
}

/// A small file of every family, cut down to its first layers.
fn small_adapter(name: &str) -> Vec<u8> {
    let file = lora_core::format::TensorFile::open(golden_path("adapters", name)).unwrap();
    let tensors = file
        .names()
        .into_iter()
        .take(12)
        .map(|key| {
            let tensor = file.tensor(&key, &Device::Cpu).unwrap();
            (key, tensor)
        })
        .collect();
    let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    lora_core::format::write_tensors(&path, &tensors, &file.metadata()).unwrap();
    std::fs::read(&path).unwrap()
}

// All in one test: the allocator's mark is shared.
#[test]
fn damaged_files_are_refused_or_read_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file.safetensors");
    let put = |path: &Path, bytes: &[u8]| std::fs::write(path, bytes).unwrap();

    let adapters = [
        "file_lora_attn_mlp.safetensors",
        "file_loha.safetensors",
        "file_lokr.safetensors",
        "file_dora_out.safetensors",
        "file_full_norm.safetensors",
        "file_lora_attn_mlp_diffusers_peft.safetensors",
    ];
    for (seed, name) in adapters.into_iter().enumerate() {
        let original = small_adapter(name);
        attack(
            name,
            seed as u64,
            &original,
            FILES / adapters.len(),
            |bytes| {
                put(&path, bytes);
                let _ = FileReport::open_checking_values(&path);
                if let Ok(set) = AdapterSet::load(&path, &Device::Cpu) {
                    for (_, adapter) in set.iter() {
                        let _ = adapter.norm();
                    }
                }
            },
        );
    }

    let toml = TrainConfig {
        pretrained_model_name_or_path: Some("m".into()),
        train_data_dir: Some("d".into()),
        output_dir: Some("o".into()),
        network_args: vec!["algo=loha".into(), "conv_dim=4".into()],
        optimizer_args: vec!["betas=0.9,0.99".into()],
        ..TrainConfig::default()
    }
    .to_toml()
    .unwrap();
    let settings = folder.path().join("c.toml");
    attack("sd-scripts TOML", 10, toml.as_bytes(), FILES, |bytes| {
        put(&settings, bytes);
        if let Ok(import) = read_config(&settings) {
            let _ = TrainConfig::from_settings(&import.settings);
        }
    });

    let gui = bundled_json("kohya", "gui_kohya_ss.json")["cases"][1]["gui"].to_string();
    let json = folder.path().join("c.json");
    attack("kohya_ss JSON", 11, gui.as_bytes(), FILES, |bytes| {
        put(&json, bytes);
        let _ = read_config(&json);
    });

    let easy = &bundled_json("kohya", "gui_lora_easy.json")["cases"][1];
    let easy = easy["easy_toml"].as_str().unwrap().to_string();
    attack("LoRA_Easy TOML", 12, easy.as_bytes(), FILES, |bytes| {
        put(&settings, bytes);
        let _ = read_config(&settings);
    });

    let dataset = "[general]\nshuffle_caption = true\n[[datasets]]\nresolution = [512, 768]\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = \"a\"\nnum_repeats = 10\nface_crop_aug_range = [1.5, 2.0]\n";
    attack("dataset config", 13, dataset.as_bytes(), FILES, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let (defaults, run) = (DatasetConfig::default(), DataConfig::default());
        let _ = ConfigFile::parse(&text, ConfigSyntax::Toml, Path::new("d"), &defaults, &run);
    });

    let prompt = "a (b:1.2) [c] ((d)) \\(e\\) BREAK <lora:x:0.8:te=0.5> [f:g:0.3] {h|i}, j";
    attack("prompt", 14, prompt.as_bytes(), FILES, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let (rest, _, _) = extract_tags(&text);
        parse_attention(&rest);
    });

    let line = "zoe, smile --n lowres, bad --w 512 --h 768 --d 42 --l 7.5 --s 28 --ss euler_a";
    attack("sample prompt", 15, line.as_bytes(), FILES, |bytes| {
        let _ = SamplePrompt::from_line(&String::from_utf8_lossy(bytes), "ddim");
    });

    let state = r#"{"format":1,"config":{},"dataset":"a","model":null,"seed":1,"started_at":1.0,"total_steps":10,"epoch":1,"position":2,"batch":3,"step":1,"failures":0,"skipped":0,"loss_slots":[0.1,0.2],"validation":[[1,0.5]]}"#;
    serde_json::from_str::<RunState>(state).unwrap();
    attack("run state", 16, state.as_bytes(), FILES, |bytes| {
        let _ = serde_json::from_slice::<RunState>(bytes);
    });
}
