//! Time of optimizer steps on 13.6 million parameters in 384 LoRA-shaped tensors.
//!
//! `cargo bench -p lora-benches --bench optim -- [--threads N] [--steps N] [--only NAME]`
//!
//! One JSON object per line. `step` is the bare step, comparable with
//! `torch.optim.AdamW(fused=True).step()` and `prodigyopt.Prodigy.step()` on the same
//! shapes; `step_clip` adds the norm of all gradients, the check for non-finite values and
//! clipping. `bytes_per_param` is what the rule must move at least; `gb_per_s` follows.

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{Device, Result, Tensor, Var};
use lora_optim::{
    Adafactor, AdafactorConfig, AdamW, AdamW8bit, AdamW8bitConfig, AdamWConfig, Came, CameConfig,
    DAdaptAdam, DAdaptConfig, Lion, LionConfig, Optimizer, ParamGroup, Prodigy, ProdigyConfig,
    ProdigyPlus, ProdigyPlusConfig, ScheduleFree, ScheduleFreeConfig, Sgd, SgdConfig, StepOptions,
};

/// Down and up matrices of rank 32 for all attention and feed-forward layers of SD 1.5.
fn shapes() -> Vec<(usize, usize)> {
    let mut out = Vec::new();
    for (channels, blocks) in [(320, 5), (640, 5), (1280, 6)] {
        for _ in 0..blocks {
            out.extend([(32, channels), (channels, 32)].repeat(8));
            out.extend([(32, 768), (channels, 32)].repeat(2));
            out.extend([
                (32, channels),
                (8 * channels, 32),
                (32, 4 * channels),
                (channels, 32),
            ]);
        }
    }
    out
}

/// Values that look random and do not depend on a generator.
fn noise(shape: (usize, usize), seed: usize, scale: f32) -> Result<Tensor> {
    let values: Vec<f32> = (0..shape.0 * shape.1)
        .map(|i| {
            let x = (i * 2_654_435_761 + seed * 40_503) % 65_521;
            scale * (x as f32 / 32_760.5 - 1.0)
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

type Make = fn(Vec<ParamGroup>) -> lora_optim::Result<Box<dyn Optimizer>>;

/// Name, least traffic in bytes per parameter, constructor.
const CASES: [(&str, f64, Make); 11] = [
    ("prodigy", 52.0, |g| {
        Ok(Box::new(Prodigy::new(
            g,
            ProdigyConfig {
                weight_decay: 0.01,
                ..Default::default()
            },
        )?))
    }),
    ("prodigy_slice11", 41.0, |g| {
        Ok(Box::new(Prodigy::new(
            g,
            ProdigyConfig {
                slice_p: 11,
                ..Default::default()
            },
        )?))
    }),
    ("adamw", 28.0, |g| {
        Ok(Box::new(AdamW::new(
            g,
            AdamWConfig {
                lr: 1e-4,
                ..Default::default()
            },
        )?))
    }),
    ("adamw8bit", 16.1, |g| {
        Ok(Box::new(AdamW8bit::new(
            g,
            AdamW8bitConfig {
                lr: 1e-4,
                ..Default::default()
            },
        )?))
    }),
    ("lion", 20.0, |g| {
        Ok(Box::new(Lion::new(g, LionConfig::default())?))
    }),
    ("sgd_momentum", 20.0, |g| {
        Ok(Box::new(Sgd::new(
            g,
            SgdConfig {
                momentum: 0.9,
                ..Default::default()
            },
        )?))
    }),
    ("schedule_free_adamw", 28.0, |g| {
        Ok(Box::new(ScheduleFree::new(
            g,
            ScheduleFreeConfig::default(),
        )?))
    }),
    ("dadapt_adam", 52.0, |g| {
        Ok(Box::new(DAdaptAdam::new(g, DAdaptConfig::default())?))
    }),
    ("prodigy_plus", 28.6, |g| {
        Ok(Box::new(ProdigyPlus::new(g, ProdigyPlusConfig::default())?))
    }),
    ("adafactor", 12.0, |g| {
        let config = AdafactorConfig {
            lr: Some(1e-4),
            relative_step: false,
            scale_parameter: false,
            ..Default::default()
        };
        Ok(Box::new(Adafactor::new(g, config)?))
    }),
    ("came", 20.0, |g| {
        Ok(Box::new(Came::new(g, CameConfig::default())?))
    }),
];

struct Options {
    threads: usize,
    steps: usize,
    only: Option<String>,
}

fn options() -> Options {
    let mut out = Options {
        threads: 2,
        steps: 15,
        only: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_default();
        match arg.as_str() {
            "--threads" => out.threads = value().parse().unwrap_or(out.threads),
            "--steps" => out.steps = value().parse().unwrap_or(out.steps),
            "--only" => out.only = Some(value()),
            _ => {}
        }
    }
    out
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let options = options();
    rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .build_global()?;
    for (name, bytes, make) in CASES {
        if options.only.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        let mut params = Vec::new();
        let mut grads = BTreeMap::new();
        for (i, shape) in shapes().into_iter().enumerate() {
            let key = format!("p{i}");
            params.push((key.clone(), Var::from_tensor(&noise(shape, i, 0.02)?)?));
            grads.insert(key, noise(shape, i + 7, 1e-3)?);
        }
        let group = ParamGroup::new("all", params);
        let count = group.numel();
        let mut optimizer = make(vec![group])?;
        for (kind, max_grad_norm, check_finite) in [("step", 0.0, false), ("step_clip", 1.0, true)]
        {
            optimizer.set_step_options(StepOptions {
                max_grad_norm,
                check_finite,
                ..Default::default()
            })?;
            let mut times = Vec::new();
            for step in 0..options.steps + 2 {
                let start = Instant::now();
                optimizer.step(&grads)?;
                if step >= 2 {
                    times.push(start.elapsed().as_secs_f64());
                }
            }
            times.sort_by(f64::total_cmp);
            let (best, median) = (times[0], times[times.len() / 2]);
            let line = serde_json::json!({
                "kind": "optim", "name": name, "what": kind, "params": count, "tensors": grads.len(), "threads": options.threads,
                "median_ms": round(1e3 * median), "best_ms": round(1e3 * best), "ns_per_param": round(1e9 * median / count as f64),
                "bytes_per_param": bytes, "gb_per_s": round(bytes * count as f64 / best / 1e9),
            });
            println!("{line}");
        }
    }
    Ok(())
}

fn round(x: f64) -> f64 {
    (x * 100.0).round() / 100.0
}
