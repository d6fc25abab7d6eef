//! Trains the miniature Stable Diffusion of `assets/mini` from scratch, in stages: the VAE; the
//! text encoder alone on what captions say of pictures, as CLIP was made; UNet and text
//! encoder, first plainly, then with more weight on noisy latents; the VAE's decoder alone, as
//! `sd-vae-ft-mse` was made.
//!
//! ```text
//! node assets/portraits/generate.mjs pretraining out/portraits/1_all
//! RAYON_NUM_THREADS=1 cargo run --release --example pretrain_mini -- \
//!     --portraits out/portraits --output out/mini.safetensors
//! ```
//!
//! Each batch is cut into 4 or 16 parts, worked on by one thread each: many small products on
//! one thread waste less than one small product on many, hence `RAYON_NUM_THREADS=1`. The
//! weights depend on the seed only, not on the number of workers. State is written every
//! 250 steps to `OUTPUT.state`; the same command goes on from there. Recipe: AdamW 1e-3
//! with cosine decay, EMA, shuffled tags, 10 % of tags and of whole captions left out.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use clap::Parser;
use lora_core::format::{TensorFile, write_tensors};
use lora_data::{
    BatchPlan, CaptionConfig, CaptionTime, Dataset, DatasetConfig, PlanItem, Size, Streams,
    SubsetConfig,
};
use lora_optim::schedule::{Cosine, WarmupFromFirst};
use lora_optim::{
    AdamW, AdamWConfig, Ema, EmaConfig, LrSchedule, OnChange, Optimizer, OptimizerState,
    ParamGroup, StepOptions,
};
use lora_sd15::{
    ModelConfig, NoiseSchedule, Part, TextConfig, TextEncoder, Tokenizer, TrainableModel, UNet,
    UnetConfig, Vae, VaeConfig,
};
use lora_train::{Draws, StepDraws};

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

const STATE_EVERY: u64 = 250;
const SIDE: u32 = 128;

#[derive(Parser)]
#[command(about = "Trains the miniature Stable Diffusion from scratch")]
struct Arguments {
    /// Folder that holds `1_all`, as `assets/portraits/generate.mjs` writes it.
    #[arg(long)]
    portraits: PathBuf,
    /// The checkpoint to write, in f16.
    #[arg(long)]
    output: PathBuf,
    /// Updates of the VAE.
    #[arg(long, default_value_t = 2400)]
    vae_steps: u64,
    /// Updates of the text encoder alone.
    #[arg(long, default_value_t = 2000)]
    text_steps: u64,
    /// Updates of UNet and text encoder.
    #[arg(long, default_value_t = 3200)]
    unet_steps: u64,
    /// Updates of UNet and text encoder with more weight on noisy latents.
    #[arg(long, default_value_t = 1200)]
    obey_steps: u64,
    /// Updates of the decoder.
    #[arg(long, default_value_t = 500)]
    decoder_steps: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads; one per core by default.
    #[arg(long)]
    workers: Option<usize>,
}

/// SD1.5's structure, narrower: 5.9 million parameters in all.
fn config() -> ModelConfig {
    ModelConfig {
        unet: UnetConfig {
            block_out_channels: vec![32, 64, 96, 96],
            num_heads: 4,
            cross_attention_dim: 64,
            norm_num_groups: 8,
            ..UnetConfig::default()
        },
        vae: VaeConfig {
            block_out_channels: vec![8, 16, 24, 24],
            norm_num_groups: 4,
            ..VaeConfig::default()
        },
        text: TextConfig {
            vocab_size: 1536,
            hidden_size: 64,
            intermediate_size: 256,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            ..TextConfig::default()
        },
    }
}

fn main() {
    if let Err(error) = run(&Arguments::parse()) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    lora_kernels::keep_candle_to_one_thread();
    lora_kernels::keep_freed_memory();
    let workers = match arguments.workers {
        Some(n) => n.max(1),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let parts = [Part::Vae, Part::TextEncoder, Part::Unet];
    let model = TrainableModel::new(&config(), &parts, arguments.seed, &Device::Cpu)?;
    for part in parts {
        let parameters = model.parameters(part);
        let count: usize = parameters.iter().map(|(_, v)| v.elem_count()).sum();
        eprintln!("{part}: {count} parameters");
    }
    let trainer = Pretraining {
        model,
        workers,
        streams: Streams::new(arguments.seed),
        output: arguments.output.clone(),
        config: config(),
        portraits: portraits(&arguments.portraits)?,
        seed: arguments.seed,
    };
    trainer.train_vae(arguments.vae_steps)?;
    let latents = trainer.encode_all()?;
    trainer.train_text(arguments.text_steps, &latents)?;
    trainer.train_unet(("unet", 1e-3, arguments.unet_steps), 1.0, &latents)?;
    trainer.train_unet(("obey", 5e-4, arguments.obey_steps), 5.0, &latents)?;
    trainer.train_decoder(arguments.decoder_steps)?;
    Ok(trainer.model.save(&arguments.output, DType::F16)?)
}

/// The drawings with shuffled tags, 10 % of them and of whole captions left out.
fn portraits(folder: &Path) -> Result<Dataset> {
    let options = DatasetConfig {
        resolution: Size::square(SIDE),
        enable_bucket: false,
        subset: SubsetConfig {
            captions: CaptionConfig {
                shuffle_caption: true,
                caption_dropout_rate: 0.1,
                caption_tag_dropout_rate: 0.1,
                ..CaptionConfig::default()
            },
            ..SubsetConfig::default()
        },
        ..DatasetConfig::default()
    };
    Ok(Dataset::from_folder(folder, &options)?)
}

struct Pretraining {
    model: TrainableModel,
    config: ModelConfig,
    portraits: Dataset,
    workers: usize,
    streams: Streams,
    seed: u64,
    output: PathBuf,
}

impl Pretraining {
    /// Reconstruction error plus a very small pull towards a normal distribution, as in
    /// "High-Resolution Image Synthesis with Latent Diffusion Models".
    fn train_vae(&self, steps: u64) -> Result<()> {
        let vae = Vae::new(&self.config.vae, self.model.var_builder(Part::Vae))?;
        let parameters = self.parameters(&[Part::Vae]);
        let mut stage = Stage::new("vae", self, parameters, 2e-3, steps)?;
        let mut batches = Batches::new(self, 16);
        while stage.step < stage.total {
            let step = stage.step;
            let (_, batch) = batches.at(step);
            stage.update(&batch, 16, |items, place| {
                let pixels = self.pixels(items)?;
                // Quarters are cheaper; the last fifth sees whole pictures, as later use does.
                let pixels = match 5 * step < 4 * steps {
                    true => quarter(&pixels, place)?,
                    false => pixels,
                };
                let posterior = vae.encode(&pixels)?;
                let noise = self.draws(place).normal(posterior.mean.dims())?;
                let decoded = vae.decode(&posterior.sample(&noise, 1.0)?)?;
                let error = (decoded - &pixels)?.sqr()?.mean_all()?;
                let variance = posterior.logvar.exp()?;
                let divergence = ((posterior.mean.sqr()? + variance)? - &posterior.logvar)?;
                Ok((error + (divergence.mean_all()? * 1e-6)?)?)
            })?;
            if stage.step == stage.total {
                self.standardize_latents(&vae)?;
            }
            stage.report_and_save()?;
        }
        Ok(())
    }

    /// Folds into the VAE's outermost 1x1 convolutions what gives every channel of the
    /// latents mean 0 and, after the usual factor 0.18215, variance 1.
    fn standardize_latents(&self, vae: &Vae) -> Result<()> {
        let (_, items) = Batches::new(self, 64).at(0);
        let latents = vae.encode(&self.pixels(&items)?)?.mean;
        let channels = self.config.vae.latent_channels;
        let flat = latents
            .transpose(0, 1)?
            .contiguous()?
            .reshape((channels, ()))?;
        let mean = flat.mean(1)?;
        let deviation = flat.broadcast_sub(&flat.mean_keepdim(1)?)?;
        let spread = deviation.sqr()?.mean(1)?.sqrt()?;
        let factor = (spread * self.config.vae.scaling_factor)?;
        let var = |name: &str| self.variable(Part::Vae, name);
        let (w, b) = (var("quant_conv.weight")?, var("quant_conv.bias")?);
        let zeros = mean.zeros_like()?;
        let divisor = Tensor::cat(&[&factor, &factor.ones_like()?], 0)?;
        let shift = Tensor::cat(&[&mean, &zeros], 0)?;
        let log_shift = Tensor::cat(&[&zeros, &(factor.log()? * 2.0)?], 0)?;
        w.set(&w.broadcast_div(&divisor.reshape((2 * channels, 1, 1, 1))?)?)?;
        b.set(&((b.as_tensor() - shift)?.div(&divisor)? - log_shift)?)?;
        let (w, b) = (var("post_quant_conv.weight")?, var("post_quant_conv.bias")?);
        let matrix = w.reshape((channels, channels))?;
        b.set(&(b.as_tensor() + matrix.matmul(&mean.unsqueeze(1)?)?.squeeze(1)?)?)?;
        w.set(&w.broadcast_mul(&factor.reshape((1, channels, 1, 1))?)?)?;
        Ok(())
    }

    /// Which colour belongs to what is in the order of the words only, and denoising teaches
    /// that slowly. Here the mean over the encoder's states has to give, through one matrix, the
    /// latents of the picture.
    fn train_text(&self, steps: u64, latents: &[Tensor]) -> Result<()> {
        let captions = Captions::new(self)?;
        let side = SIDE as usize / 8;
        let outputs = self.config.vae.latent_channels * side * side;
        let width = self.config.text.hidden_size;
        let matrix = Var::zeros((width, outputs), DType::F32, &Device::Cpu)?;
        let mut parameters = self.parameters(&[Part::TextEncoder]);
        parameters.push(("to latents".into(), matrix.clone()));
        let mut stage = Stage::new("text", self, parameters, 1e-3, steps)?;
        let mut batches = Batches::new(self, 128);
        while stage.step < stage.total {
            let (epoch, batch) = batches.at(stage.step);
            stage.update(&batch, 16, |items, _| {
                let summary = captions.states(items, epoch)?.mean(1)?;
                let wanted = pick(latents, items)?.flatten_from(1)?;
                Ok((summary.matmul(matrix.as_tensor())? - wanted)?
                    .sqr()?
                    .mean_all()?)
            })?;
            stage.report_and_save()?;
        }
        Ok(())
    }

    /// eps-prediction on the VAE's latents; the text encoder learns along. Where there is more noise
    /// than signal an error counts as much more often, `most` times at most: what a picture shows is
    /// decided there, where the prompt alone tells it, and small things cost little loss.
    fn train_unet(
        &self,
        (name, lr, steps): (&'static str, f64, u64),
        most: f32,
        latents: &[Tensor],
    ) -> Result<()> {
        let unet = UNet::new(&self.config.unet, self.model.var_builder(Part::Unet))?;
        let captions = Captions::new(self)?;
        let schedule = NoiseSchedule::sd15();
        let parameters = self.parameters(&[Part::TextEncoder, Part::Unet]);
        let mut stage = Stage::new(name, self, parameters, lr, steps)?;
        let mut batches = Batches::new(self, 32);
        while stage.step < stage.total {
            let (epoch, batch) = batches.at(stage.step);
            stage.update(&batch, 4, |items, place| {
                let clean = pick(latents, items)?;
                let mut draws = self.draws(place);
                let noise = draws.normal(clean.dims())?;
                let timesteps = draws.timesteps(0, lora_sd15::TIMESTEPS, items.len());
                let noisy = schedule.add_noise(&clean, &noise, &timesteps)?;
                let times: Vec<f32> = timesteps.iter().map(|t| *t as f32).collect();
                let times = Tensor::new(times, &Device::Cpu)?;
                let guess = unet.forward(&noisy, &times, &captions.states(items, epoch)?)?;
                let errors = (guess - noise)?.sqr()?.flatten_from(1)?.mean(1)?;
                let weights = timesteps.iter().map(|t| schedule.snr(*t).recip());
                let weights: Vec<f32> = weights.map(|weight| weight.clamp(1.0, most)).collect();
                Ok((errors * Tensor::new(weights, &Device::Cpu)?)?.mean_all()?)
            })?;
            stage.report_and_save()?;
        }
        Ok(())
    }

    /// The decoder learns to invert the encoder as it is.
    fn train_decoder(&self, steps: u64) -> Result<()> {
        let encoder = Vae::new(&self.config.vae, self.frozen(Part::Vae))?;
        let vae = Vae::new(&self.config.vae, self.model.var_builder(Part::Vae))?;
        let mut parameters = self.parameters(&[Part::Vae]);
        parameters.retain(|(name, _)| name.contains("decoder") || name.contains("post_quant"));
        let mut stage = Stage::new("decoder", self, parameters, 1e-3, steps)?;
        let mut batches = Batches::new(self, 8);
        while stage.step < stage.total {
            let (_, batch) = batches.at(stage.step);
            stage.update(&batch, 4, |items, _| {
                let pixels = self.pixels(items)?;
                let latents = encoder.encode(&pixels)?.mean;
                Ok((vae.decode(&latents)? - pixels)?.sqr()?.mean_all()?)
            })?;
            stage.report_and_save()?;
        }
        Ok(())
    }

    /// Latents of all portraits, by their number in the dataset.
    fn encode_all(&self) -> Result<Vec<Tensor>> {
        let vae = Vae::new(&self.config.vae, self.frozen(Part::Vae))?;
        let batches = self.portraits.each_once(|_| true);
        let encoded = side_by_side(&batches, self.workers, |batch: &BatchPlan| {
            let posterior = vae.encode(&self.pixels(&batch.items)?)?;
            let latents = posterior.mode(vae.scaling_factor())?;
            let numbered = batch.items.iter().enumerate();
            numbered
                .map(|(i, item)| Ok((item.image, latents.get(i)?.copy()?)))
                .collect::<Result<Vec<_>>>()
        })?;
        let latents: BTreeMap<usize, Tensor> = encoded.into_iter().flatten().collect();
        eprintln!("{} portraits encoded", latents.len());
        Ok(latents.into_values().collect())
    }

    fn draws(&self, place: u64) -> StepDraws {
        StepDraws::new(self.streams, place, &Device::Cpu)
    }

    /// Named parameters of some parts.
    fn parameters(&self, parts: &[Part]) -> Vec<(String, Var)> {
        let named = |part: &Part| {
            let part = *part;
            let parameters = self.model.parameters(part).into_iter();
            parameters.map(move |(name, var)| (format!("{part}: {name}"), var))
        };
        parts.iter().flat_map(named).collect()
    }

    fn variable(&self, part: Part, name: &str) -> Result<Var> {
        let mut parameters = self.model.parameters(part).into_iter();
        let found = parameters.find(|(n, _)| n == name);
        Ok(found.ok_or_else(|| format!("the {part} has no {name}"))?.1)
    }

    /// Weights as they are now, without gradients.
    fn frozen(&self, part: Part) -> VarBuilder<'static> {
        let tensors = self.model.parameters(part).into_iter();
        let tensors = tensors.map(|(name, var)| (name, var.as_detached_tensor()));
        VarBuilder::from_tensors(tensors.collect(), DType::F32, &Device::Cpu)
    }

    /// Pixels of some portraits, `[n, 3, 128, 128]`.
    fn pixels(&self, items: &[PlanItem]) -> Result<Tensor> {
        let mut values = Vec::new();
        for item in items {
            values.extend(self.portraits.pixels(item)?.data);
        }
        let side = SIDE as usize;
        Ok(Tensor::from_vec(
            values,
            (items.len(), 3, side, side),
            &Device::Cpu,
        )?)
    }
}

/// From drawn portraits to the states of their captions.
struct Captions<'a> {
    pretraining: &'a Pretraining,
    tokenizer: Tokenizer,
    encoder: TextEncoder,
}

impl<'a> Captions<'a> {
    fn new(pretraining: &'a Pretraining) -> Result<Self> {
        let vb = pretraining.model.var_builder(Part::TextEncoder);
        Ok(Self {
            pretraining,
            tokenizer: Tokenizer::new(),
            encoder: TextEncoder::new(&pretraining.config.text, vb)?,
        })
    }

    /// `[n, 77, width]`.
    fn states(&self, items: &[PlanItem], epoch: usize) -> Result<Tensor> {
        let Pretraining {
            portraits,
            streams,
            config,
            ..
        } = self.pretraining;
        let time = CaptionTime {
            epoch,
            ..CaptionTime::default()
        };
        let ids: Vec<u32> = items
            .iter()
            .map(|item| portraits.caption(item, time, *streams))
            .flat_map(|caption| self.tokenizer.encode_padded(&caption))
            .map(|id| config.text.fold(id))
            .collect();
        let ids = Tensor::from_vec(ids, (items.len(), ()), &Device::Cpu)?;
        Ok(self.encoder.forward(&ids, 1)?)
    }
}

/// The latents of some portraits, `[n, 4, 16, 16]`.
fn pick(latents: &[Tensor], items: &[PlanItem]) -> Result<Tensor> {
    let picked: Vec<&Tensor> = items.iter().filter_map(|i| latents.get(i.image)).collect();
    Ok(Tensor::stack(&picked, 0)?)
}

/// One of the four quarters of pictures.
fn quarter(pixels: &Tensor, number: u64) -> Result<Tensor> {
    let half = SIDE as usize / 2;
    let (row, column) = (number as usize / 2 % 2, number as usize % 2);
    let rows = pixels.narrow(2, half * row, half)?;
    Ok(rows.narrow(3, half * column, half)?.contiguous()?)
}

/// The portraits of every step: epoch after epoch, each shuffled anew.
struct Batches<'a> {
    pretraining: &'a Pretraining,
    size: usize,
    epoch: usize,
    order: Vec<PlanItem>,
}

impl<'a> Batches<'a> {
    fn new(pretraining: &'a Pretraining, size: usize) -> Self {
        Self {
            pretraining,
            size,
            epoch: 0,
            order: Vec::new(),
        }
    }

    /// Epoch and portraits of a step.
    fn at(&mut self, step: u64) -> (usize, Vec<PlanItem>) {
        let Pretraining {
            portraits, seed, ..
        } = self.pretraining;
        let per_epoch = (portraits.images().len() / self.size).max(1);
        let epoch = step as usize / per_epoch + 1;
        if epoch != self.epoch {
            let batches = portraits.epoch(epoch, *seed).batches;
            self.order = batches.into_iter().flat_map(|b| b.items).collect();
            self.epoch = epoch;
        }
        let mut batches = self.order.chunks(self.size);
        let batch = batches.nth(step as usize % per_epoch);
        (epoch, batch.unwrap_or_default().to_vec())
    }
}

/// One training: optimizer, schedule, average, and the state on disk.
struct Stage<'a> {
    name: &'static str,
    pretraining: &'a Pretraining,
    parameters: Vec<(String, Var)>,
    optimizer: AdamW,
    schedule: WarmupFromFirst<Cosine>,
    ema: Ema,
    step: u64,
    total: u64,
    losses: Vec<f64>,
    since: Instant,
}

impl<'a> Stage<'a> {
    fn new(
        name: &'static str,
        pretraining: &'a Pretraining,
        parameters: Vec<(String, Var)>,
        lr: f64,
        total: u64,
    ) -> Result<Self> {
        let group = ParamGroup::new(name, parameters.clone());
        let config = AdamWConfig {
            lr,
            weight_decay: 0.01,
            ..AdamWConfig::default()
        };
        let mut optimizer = AdamW::new(vec![group], config)?;
        optimizer.set_step_options(StepOptions {
            max_grad_norm: 1.0,
            ..StepOptions::default()
        })?;
        let decay = EmaConfig {
            decay: 0.999,
            ..EmaConfig::default()
        };
        let schedule = WarmupFromFirst {
            steps: 100,
            start: None,
            body: Cosine::new(total.saturating_sub(100)),
        };
        let mut stage = Self {
            name,
            pretraining,
            ema: Ema::new(&parameters, decay)?,
            parameters,
            optimizer,
            schedule,
            step: 0,
            total,
            losses: Vec::new(),
            since: Instant::now(),
        };
        stage.resume()?;
        Ok(stage)
    }

    /// One update with the gradient of the batch's mean loss. `loss` gets some items and a
    /// number from which it may derive random streams. The gradients of the `parts` of the
    /// batch are added in their order.
    fn update(
        &mut self,
        batch: &[PlanItem],
        parts: usize,
        loss: impl Fn(&[PlanItem], u64) -> Result<Tensor> + Sync,
    ) -> Result<()> {
        let size = batch.len();
        let workers = self.pretraining.workers;
        let first = self.step * parts as u64;
        let parts: Vec<(u64, &[PlanItem])> = (first..)
            .zip(batch.chunks(size.div_ceil(parts).max(1)))
            .collect();
        let results = side_by_side(&parts, workers, |(place, items)| {
            let share = items.len() as f64 / size as f64;
            let loss = (loss(items, *place)? * share)?;
            Ok((f64::from(loss.to_scalar::<f32>()?), loss.backward()?))
        })?;
        self.losses.push(results.iter().map(|(loss, _)| loss).sum());
        let sums = side_by_side(&self.parameters, workers, |(name, var)| {
            let mut gradients = results
                .iter()
                .filter_map(|(_, store)| store.get(var.as_tensor()));
            let Some(first) = gradients.next() else {
                return Ok(None);
            };
            let sum = gradients.try_fold(first.clone(), |sum, next| sum + next)?;
            Ok(Some((name.clone(), sum)))
        })?;
        let gradients: BTreeMap<String, Tensor> = sums.into_iter().flatten().collect();
        self.schedule.apply(self.step, &mut self.optimizer);
        self.optimizer.step(&gradients)?;
        self.ema.update()?;
        self.step += 1;
        if self.step == self.total {
            self.ema.swap_in(true)?;
        }
        Ok(())
    }

    fn report_and_save(&mut self) -> Result<()> {
        let done = self.step == self.total;
        if !done && !self.step.is_multiple_of(STATE_EVERY) {
            return Ok(());
        }
        let mean = self.losses.iter().sum::<f64>() / self.losses.len().max(1) as f64;
        let pace = self.since.elapsed().as_secs_f64() / self.losses.len().max(1) as f64;
        eprintln!(
            "{} {}/{}: loss {mean:.5}, {pace:.3} s per step",
            self.name, self.step, self.total
        );
        self.losses.clear();
        self.save_state()?;
        if !done {
            self.ema.swap_in(true)?;
        }
        self.pretraining
            .model
            .save(&self.pretraining.output, DType::F16)?;
        if !done {
            self.ema.swap_in(false)?;
        }
        self.since = Instant::now();
        Ok(())
    }

    fn state_file(&self) -> PathBuf {
        let output = self.pretraining.output.display();
        PathBuf::from(format!("{output}.{}-state", self.name))
    }

    fn save_state(&self) -> Result<()> {
        let state = self.optimizer.state()?;
        let mut tensors = state.tensors;
        tensors.extend(self.ema.state()?);
        let metadata = BTreeMap::from([
            ("optimizer".to_string(), state.options.to_string()),
            ("step".to_string(), self.step.to_string()),
        ]);
        Ok(write_tensors(&self.state_file(), &tensors, &metadata)?)
    }

    fn resume(&mut self) -> Result<()> {
        let path = self.state_file();
        if !path.exists() {
            return Ok(());
        }
        let file = TensorFile::open(&path)?;
        let metadata = file.metadata();
        let (Some(options), Some(step)) = (metadata.get("optimizer"), metadata.get("step")) else {
            return Err(format!("{}: not a state of this program", path.display()).into());
        };
        let mut tensors = BTreeMap::new();
        for name in file.names() {
            tensors.insert(name.clone(), file.tensor(&name, &Device::Cpu)?);
        }
        self.ema.load_state(&tensors)?;
        tensors.retain(|name, _| !name.starts_with("ema"));
        let state = OptimizerState {
            options: serde_json::from_str(options)?,
            tensors,
        };
        self.optimizer.load_state(&state, OnChange::Refuse)?;
        self.step = step.parse()?;
        eprintln!("{}: going on after step {}", self.name, self.step);
        Ok(())
    }
}

/// `f` of every item by some threads, the results in the items' order. Each thread is a pool
/// of its own, so that parallel loops inside `f` stay on it.
fn side_by_side<T: Sync, R: Send>(
    items: &[T],
    workers: usize,
    f: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(BTreeMap::new());
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(number) else { break };
            let result = f(item);
            let mut done = done.lock().unwrap_or_else(|e| e.into_inner());
            done.insert(number, result);
        }
    };
    std::thread::scope(|scope| -> Result<()> {
        for _ in 0..workers.min(items.len()) {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
            scope.spawn(move || pool.install(work));
        }
        Ok(())
    })?;
    let done = done.into_inner().unwrap_or_else(|e| e.into_inner());
    done.into_values().collect()
}
