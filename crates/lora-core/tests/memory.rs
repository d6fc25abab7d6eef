//! How much memory reading and computing take, counted by the allocator.

#![allow(clippy::unwrap_used)]
// An allocator cannot be written without; this one only counts what the system's hands out.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};
use lora_core::format::{FileReport, write_tensors};
use lora_core::{Adapter, BaseLayer, LayerOp, Loha, Lokr, LokrFactor};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One measurement at a time.
static TURN: Mutex<()> = Mutex::new(());

/// What `f` returns, how much it keeps and how much it held at most, in bytes: the least of
/// several runs, since tables and the threads' buffers are made once, by whoever comes first.
fn measured<T>(f: impl Fn() -> T) -> (T, usize, usize) {
    let once = || {
        let before = LIVE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let result = f();
        let kept = LIVE.load(Ordering::Relaxed).saturating_sub(before);
        (result, kept, PEAK.load(Ordering::Relaxed) - before)
    };
    let (mut result, mut kept, mut peak) = once();
    for _ in 0..6 {
        drop(result);
        let (again, k, p) = once();
        (result, kept, peak) = (again, kept.min(k), peak.min(p));
    }
    (result, kept, peak)
}

fn ones(dims: &[usize]) -> Tensor {
    Tensor::ones(dims, DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn loha_keeps_nothing_of_full_size_but_its_delta() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let n = 512;
    let side = || (ones(&[n, 4]), ones(&[4, n]), None);
    let loha = Loha::new("fc", [side(), side()], 2.0).unwrap();
    let loha = loha.trainable().unwrap();
    let base = ones(&[n, n]);
    let (delta, kept, _) = measured(|| loha.delta(&base, 1.0).unwrap());
    let size = n * n * 4;
    assert!(
        kept < size + size / 4,
        "{kept} bytes kept for a delta of {size}"
    );
    let grads = delta.sum_all().unwrap().backward().unwrap();
    for (name, var) in loha.vars() {
        assert!(grads.get(&var).is_some(), "{name}");
    }
}

#[test]
fn lokr_never_builds_its_delta() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let n = 2048;
    let factor = |m| LokrFactor::Full(ones(&[m, m]));
    let lokr = Lokr::new("fc", factor(32), factor(64), 1.0).unwrap();
    let layer = BaseLayer::new(ones(&[n, n]), None, LayerOp::Linear);
    let x = ones(&[2, n]);
    let (y, _, peak) = measured(|| lokr.branch(&x, &layer, 1.0, None).unwrap());
    assert_eq!(y.to_vec2::<f32>().unwrap()[1][7], n as f32);
    assert!(peak < n * n * 4 / 16, "{peak} bytes at most");
}

#[test]
fn a_report_does_not_read_the_factors() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.safetensors");
    let mut tensors = BTreeMap::new();
    for l in 0..12 {
        let layer = format!("lora_te_text_model_encoder_layers_{l}_mlp_fc1");
        tensors.insert(format!("{layer}.lora_down.weight"), ones(&[512, 768]));
        tensors.insert(format!("{layer}.lora_up.weight"), ones(&[3072, 512]));
    }
    write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();
    drop(tensors);
    let (report, _, peak) = measured(|| FileReport::open(&path).unwrap());
    assert_eq!(report.layers.len(), 12);
    let size = std::fs::metadata(&path).unwrap().len() as usize;
    assert!(peak < size / 100, "{peak} bytes for a file of {size}");
}

#[test]
fn headers_that_lie_cost_no_more_than_the_file() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lie.safetensors");
    let key = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight";
    for (shape, end) in [
        ("[4294967296,4294967296]", 8u64),
        ("[1099511627776]", 4398046511104),
        ("[1099511627776,0]", 0),
    ] {
        let header =
            format!(r#"{{"{key}":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}"#);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let (_, _, peak) = measured(|| {
            drop(FileReport::open(&path));
            drop(lora_core::AdapterSet::load(&path, &Device::Cpu));
        });
        assert!(peak < 1 << 20, "{shape}: {peak} bytes");
    }
}
