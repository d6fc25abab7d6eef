//! Whole training and sampling steps at the size of Stable Diffusion 1.5, on random weights
//! made in memory: no checkpoint is needed.
//!
//! `cargo bench -p lora-benches --bench step -- [--mode train|sample] [--resolution 512]
//! [--batch 1] [--family lora|loha|lokr|dora|...] [--convolutions] [--rank 32] [--steps 3]
//! [--warmup 1] [--checkpointing] [--storage f32|f16|bf16] [--compute f32|bf16] [--threads 2] [--device cpu|cuda|metal]`, for GPUs with
//! `--features cuda` behind `cargo bench`.
//!
//! One JSON object on the last line. A training step is forward pass, loss, backward pass,
//! norm of all gradients, clipping and AdamW, for a LoRA on attention, feed-forward and
//! projections (and with `--convolutions` on those, too), all factors non-zero. A sampling step is one guided evaluation: `batch`
//! pairs of a negative and a positive prompt. `peak_rss_mb` is that of the process, so run
//! it once per configuration; `cpu_s_median` is the processor time of all threads, which other
//! programs disturb less than the time on the clock. `LORA_KERNELS=plain` times candle's own operations.

use std::time::Instant;

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use lora_core::{Adaptable, AdapterConfig, AdapterSet, Family, Targets};
use lora_kernels::Compute;
use lora_optim::{AdamW, AdamWConfig, OnHost, Optimizer, ParamGroup, StepOptions};
use lora_sd15::{UNet, UnetConfig};
use rand::SeedableRng;
use rand::rngs::StdRng;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

struct Options {
    sample: bool,
    resolution: usize,
    batch: usize,
    family: Family,
    convolutions: bool,
    rank: usize,
    steps: usize,
    warmup: usize,
    checkpointing: bool,
    storage: DType,
    compute: Compute,
    threads: usize,
    device: Device,
}

fn options() -> Result<Options> {
    let mut o = Options {
        sample: false,
        resolution: 512,
        batch: 1,
        family: Family::Lora,
        convolutions: false,
        rank: 32,
        steps: 3,
        warmup: 1,
        checkpointing: false,
        storage: DType::F32,
        compute: Compute::F32,
        threads: 2,
        device: Device::Cpu,
    };
    // cargo bench adds --bench.
    let mut args = std::env::args().skip(1).filter(|a| a != "--bench");
    while let Some(arg) = args.next() {
        let switch = match arg.as_str() {
            "--checkpointing" => Some(&mut o.checkpointing),
            "--convolutions" => Some(&mut o.convolutions),
            _ => None,
        };
        if let Some(switch) = switch {
            *switch = true;
            continue;
        }
        let value = args.next().ok_or(format!("{arg} needs a value"))?;
        let number = || {
            value
                .parse::<usize>()
                .map_err(|_| format!("{arg} {value}: not a number"))
        };
        match arg.as_str() {
            "--mode" if value == "train" => o.sample = false,
            "--mode" if value == "sample" => o.sample = true,
            "--storage" => {
                o.storage = match value.as_str() {
                    "f32" => DType::F32,
                    "f16" => DType::F16,
                    "bf16" => DType::BF16,
                    _ => return Err(format!("--storage {value}: f32, f16 or bf16").into()),
                }
            }
            "--compute" => {
                o.compute = match value.as_str() {
                    "f32" => Compute::F32,
                    "bf16" => Compute::Bf16,
                    _ => return Err(format!("--compute {value}: f32 or bf16").into()),
                }
            }
            "--device" => {
                o.device = match value.as_str() {
                    "cpu" => Device::Cpu,
                    "cuda" => Device::new_cuda(0)?,
                    "metal" => Device::new_metal(0)?,
                    _ => return Err(format!("--device {value}: cpu, cuda or metal").into()),
                }
            }
            "--resolution" => o.resolution = number()?,
            "--batch" => o.batch = number()?,
            "--family" => {
                const ALL: [Family; 8] = [
                    Family::Lora,
                    Family::Loha,
                    Family::Lokr,
                    Family::Dora,
                    Family::Glora,
                    Family::Oft,
                    Family::Boft,
                    Family::Full,
                ];
                let known = ALL.into_iter().find(|f| f.name() == value);
                o.family = known.ok_or(format!("--family {value} is not one of {ALL:?}"))?;
            }
            "--rank" => o.rank = number()?,
            "--steps" => o.steps = number()?.max(1),
            "--warmup" => o.warmup = number()?,
            "--threads" => o.threads = number()?,
            _ => return Err(format!("{arg} {value} is not known").into()),
        }
    }
    Ok(o)
}

/// A small generator: a billion weights should take a second.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    }

    /// Uniform values of about unit variance.
    fn tensor(&mut self, shape: impl Into<Shape>, scale: f32) -> candle_core::Result<Tensor> {
        let shape = shape.into();
        let values: Vec<f32> = (0..shape.elem_count())
            .map(|_| self.next() * 1.732 * scale)
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu)
    }
}

/// Weights that keep the size of activations: matrices in `storage`, all else in f32.
struct RandomWeights {
    storage: DType,
}

impl SimpleBackend for RandomWeights {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
        });
        let dims = shape.dims().to_vec();
        if dims.len() == 1 {
            // Norms scale by one; biases and shifts are zero.
            return match name.ends_with("weight") {
                true => Tensor::ones(shape, dtype, device),
                false => Tensor::zeros(shape, dtype, device),
            };
        }
        let inputs: usize = dims[1..].iter().product();
        let weight = Noise(seed).tensor(shape, 0.7 / (inputs.max(1) as f32).sqrt())?;
        weight.to_dtype(self.storage)?.to_device(device)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("{name}: asked for without a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

/// Peak resident memory of this process in MB; 0 where the system does not tell.
fn peak_rss_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:"));
    let kb = line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok());
    kb.unwrap_or(0) / 1024
}

/// Processor time of all threads of this process in seconds; 0 where the system does not
/// tell.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name in parentheses: fields 3 and on; 14 and 15 are ticks of 10 ms.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks = fields.split_whitespace().skip(11).take(2);
    ticks.filter_map(|t| t.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Steps to time: each returns the seconds of its parts.
type Step<'a> = Box<dyn FnMut() -> Result<Vec<f64>> + 'a>;

fn training<'a>(o: &'a Options, unet: &'a mut UNet) -> Result<(Step<'a>, usize)> {
    let config = AdapterConfig {
        family: o.family,
        rank: o.rank,
        alpha: o.rank as f64,
        conv_rank: o.convolutions.then_some(o.rank),
        ..AdapterConfig::default()
    };
    let mut rng = StdRng::seed_from_u64(0);
    let targets = match o.convolutions {
        true => Targets::attn_mlp_conv(),
        false => Targets::attn_mlp(),
    };
    let mut set = AdapterSet::create(unet, &config, &targets, &mut rng)?;
    let mut noise = Noise(1);
    for (_, var) in set.params() {
        let values = noise.tensor(var.shape().clone(), 1e-3)?;
        let values = values.to_device(var.device())?;
        var.set(&(var.as_detached_tensor() + values)?)?;
    }
    let count = set.parameter_count();
    set.attach(unet, 1.0)?.strict()?;
    let config = AdamWConfig {
        lr: 1e-4,
        ..AdamWConfig::default()
    };
    let groups = vec![ParamGroup::new("unet", set.params())];
    let build = |groups| Ok(Box::new(AdamW::new(groups, config)?) as Box<dyn Optimizer>);
    let mut optimizer = match o.device.is_cpu() {
        true => build(groups)?,
        // As the trainer does it.
        false => Box::new(OnHost::new(groups, build)?),
    };
    optimizer.set_step_options(StepOptions {
        max_grad_norm: 1.0,
        ..StepOptions::default()
    })?;
    unet.set_gradient_checkpointing(o.checkpointing);
    let side = o.resolution / 8;
    let mut input = |shape: &[usize]| noise.tensor(shape, 1.0)?.to_device(&o.device);
    let latents = input(&[o.batch, 4, side, side])?;
    let target = input(&[o.batch, 4, side, side])?;
    let context = input(&[o.batch, 77, 768])?;
    let timesteps = Tensor::full(500f32, o.batch, &o.device)?;
    let unet = &*unet;
    let step = move || {
        let start = Instant::now();
        let pred = unet.forward(&latents, &timesteps, &context)?;
        let loss = (pred - &target)?.sqr()?.mean_all()?;
        o.device.synchronize()?;
        let forward = start.elapsed().as_secs_f64();
        let grads = lora_kernels::on_worker(loss.device(), || loss.backward())?;
        o.device.synchronize()?;
        let backward = start.elapsed().as_secs_f64();
        optimizer.step(&grads)?;
        o.device.synchronize()?;
        let whole = start.elapsed().as_secs_f64();
        if !loss.to_scalar::<f32>()?.is_finite() {
            return Err("the loss is not finite".into());
        }
        Ok(vec![whole, forward, backward - forward, whole - backward])
    };
    Ok((Box::new(step), count))
}

fn sampling<'a>(o: &'a Options, unet: &'a UNet) -> Result<Step<'a>> {
    let mut noise = Noise(1);
    let side = o.resolution / 8;
    let mut input = |shape: &[usize]| noise.tensor(shape, 1.0)?.to_device(&o.device);
    let latents = input(&[o.batch, 4, side, side])?;
    // With and without the prompt, as the pipeline asks.
    let context = input(&[2 * o.batch, 77, 768])?;
    let timesteps = Tensor::full(500f32, o.batch, &o.device)?;
    let step = move || {
        let start = Instant::now();
        let pair = unet.forward(&latents, &timesteps, &context)?;
        let parts = pair.chunk(2, 0)?;
        let guided = (&parts[0] + ((&parts[1] - &parts[0])? * 7.5)?)?;
        o.device.synchronize()?;
        let whole = start.elapsed().as_secs_f64();
        if !guided.sum_all()?.to_scalar::<f32>()?.is_finite() {
            return Err("the prediction is not finite".into());
        }
        Ok(vec![whole, whole, 0.0, 0.0])
    };
    Ok(Box::new(step))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

fn main() -> Result<()> {
    let o = options()?;
    lora_kernels::keep_candle_to_one_thread();
    lora_kernels::keep_freed_memory();
    rayon::ThreadPoolBuilder::new()
        .num_threads(o.threads)
        .build_global()?;
    lora_kernels::keep_freed_device_memory(&o.device);
    let vb = VarBuilder::from_backend(
        Box::new(RandomWeights { storage: o.storage }),
        DType::F32,
        o.device.clone(),
    );
    let mut unet = UNet::new(&UnetConfig::default(), vb)?;
    unet.set_compute(o.compute)?;
    let loaded = peak_rss_mb();
    let (mut step, adapter_params) = match o.sample {
        true => (sampling(&o, &unet)?, 0),
        false => training(&o, &mut unet)?,
    };
    let mut rows = Vec::new();
    for i in 0..o.warmup + o.steps {
        let cpu = cpu_seconds();
        let mut row = step()?;
        row.push(cpu_seconds() - cpu);
        eprintln!(
            "step {i}: {:.3} s, processor {:.2} s, peak {} MB",
            row[0],
            row[4],
            peak_rss_mb()
        );
        if i >= o.warmup {
            rows.push(row);
        }
    }
    let column = |i: usize| rows.iter().map(|r| r[i]).collect::<Vec<f64>>();
    let seconds = |i: usize| (median(column(i)) * 1e3).round() / 1e3;
    let best = column(0).into_iter().fold(f64::INFINITY, f64::min);
    println!(
        "{}",
        serde_json::json!({
            "kind": if o.sample { "sample" } else { "step" },
            "storage": o.storage.as_str(),
            "compute": format!("{:?}", o.compute).to_lowercase(),
            "batch": o.batch,
            "resolution": o.resolution,
            "family": o.family.name(),
            "convolutions": o.convolutions,
            "rank": o.rank,
            "checkpointing": o.checkpointing,
            "device": format!("{:?}", o.device.location()),
            "threads": o.threads,
            "steps": o.steps,
            "adapter_params": adapter_params,
            "total_s_median": seconds(0),
            "total_s_best": (best * 1e3).round() / 1e3,
            "forward_s_median": seconds(1),
            "backward_s_median": seconds(2),
            "optimizer_s_median": seconds(3),
            "cpu_s_median": seconds(4),
            "loaded_rss_mb": loaded,
            "peak_rss_mb": peak_rss_mb(),
        })
    );
    Ok(())
}
