//! The options of `examples/generate.rs` and what they stand for.

use std::collections::BTreeSet;
use std::error::Error;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};

use crate::{demo_model, portraits};
use candle_core::{DType, Device};
use clap::Parser;
use lora_core::Adaptable;
use lora_core::format::sha256_of_file;
use lora_kernels::Compute;
use lora_sd15::prompt::{Styles, extract_tags};
use lora_sd15::sampler::{Prediction, SigmaSchedule};
use lora_sd15::{
    AdapterMode, Axis, Cell, Checkpoint, Emphasis, Image, Img2Img, Infotext, Inpaint,
    MaskedContent, NoiseSource, ResizeMode, SamplerKind, StableDiffusion, Sweep, Txt2Img,
    UpscaleNetwork, Upscaler, Variation, WeightStorage, find_adapter, find_model, find_upscaler,
};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Draws pictures from text with Stable Diffusion 1.5 and LoRAs.
#[derive(Debug, Parser)]
pub struct Arguments {
    /// Checkpoint file or diffusers folder.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Separate VAE file.
    #[arg(long)]
    pub vae: Option<PathBuf>,
    /// Folder in which `<lora:name:weight>` finds `name.safetensors`.
    #[arg(long, default_value = "out")]
    pub lora_dir: PathBuf,
    /// Folder of embeddings (textual inversion).
    #[arg(long)]
    pub embeddings_dir: Option<PathBuf>,
    /// Adds adapters to the weights instead of computing them beside: faster steps.
    #[arg(long)]
    pub merge_adapters: bool,
    /// Draws this picture (PNG, JPEG, WebP) again by the text in its file; options given
    /// beside it count more.
    #[arg(long)]
    pub from: Option<PathBuf>,
    /// What to draw.
    #[arg(long)]
    pub prompt: Option<String>,
    /// What to avoid.
    #[arg(long)]
    pub negative: Option<String>,
    /// Name of a style of the styles file to put around the prompt; may be given often.
    #[arg(long)]
    pub style: Vec<String>,
    /// A1111's styles: a CSV file with the columns name, prompt and negative_prompt.
    #[arg(long, default_value = "styles.csv")]
    pub styles_file: PathBuf,
    /// Seed of the first picture; -1 takes any.
    #[arg(long, value_parser = seed, allow_hyphen_values = true)]
    pub seed: Option<u64>,
    /// Which generator the seed is for: gpu (A1111's default, nv is the same) or cpu.
    #[arg(long)]
    pub rng: Option<String>,
    /// Seed of the variation; -1 takes any.
    #[arg(long, value_parser = seed, allow_hyphen_values = true)]
    pub variation_seed: Option<u64>,
    /// How much of the variation is mixed in, 0 to 1.
    #[arg(long)]
    pub variation_strength: Option<f64>,
    /// Size of the picture whose composition is wanted at another size.
    #[arg(long, value_name = "WxH")]
    pub seed_resize_from: Option<String>,
    /// Eta noise seed delta; A1111 users often have 31337.
    #[arg(long)]
    pub ensd: Option<i64>,
    /// Denoising steps.
    #[arg(long)]
    pub steps: Option<usize>,
    /// Guidance scale.
    #[arg(long)]
    pub cfg_scale: Option<f64>,
    /// Width in pixels; 512, or 128 for the miniature.
    #[arg(long)]
    pub width: Option<usize>,
    /// Height in pixels; 512, or 128 for the miniature.
    #[arg(long)]
    pub height: Option<usize>,
    /// Pictures drawn together.
    #[arg(long, default_value_t = 1, conflicts_with = "x")]
    pub batch_size: usize,
    /// Batches.
    #[arg(long, default_value_t = 1, conflicts_with = "x")]
    pub batch_count: u64,
    /// Sampler as in A1111, such as "Euler a", "DPM++ 2M" or "DPM++ 2M Karras".
    #[arg(long)]
    pub sampler: Option<String>,
    /// Schedule type as in A1111, such as Karras; Automatic is the sampler's own.
    #[arg(long)]
    pub schedule: Option<String>,
    /// Share of noise renewed per step by the samplers that do so.
    #[arg(long)]
    pub eta: Option<f64>,
    /// 1: last text encoder layer, 2: the one before.
    #[arg(long)]
    pub clip_skip: Option<usize>,
    /// What prompt weights do: "Original", "No norm", "Ignore" or "None".
    #[arg(long)]
    pub emphasis: Option<String>,
    /// Below this noise level every second step leaves the negative prompt out.
    #[arg(long)]
    pub ngms: Option<f64>,
    /// Scales the first noise as SDXL's own programs do: A1111's "SGM noise multiplier".
    #[arg(long)]
    pub sgm_noise: bool,
    /// Lengthens the shorter one of prompt and negative prompt by empty chunks.
    #[arg(long)]
    pub pad_prompts: bool,
    /// What the model predicts: epsilon or v.
    #[arg(long)]
    pub prediction: Option<String>,
    /// For v-prediction models trained to end in pure noise.
    #[arg(long)]
    pub zero_terminal_snr: bool,
    /// Draws again at this many times the size.
    #[arg(long)]
    pub hires_scale: Option<f64>,
    /// Draws again at this size; a side of 0 keeps the ratio.
    #[arg(long, value_name = "WxH", conflicts_with = "hires_scale")]
    pub hires_resize: Option<String>,
    /// Steps of the second pass; 0 is as many as in the first.
    #[arg(long)]
    pub hires_steps: Option<usize>,
    /// How the first picture is enlarged, as in A1111; Latent if not given. Besides A1111's names
    /// that of an ESRGAN network in the folder of upscalers.
    #[arg(long)]
    pub hires_upscaler: Option<String>,
    /// Folder of ESRGAN networks (.safetensors, .pth).
    #[arg(long, default_value = "upscalers")]
    pub upscaler_dir: PathBuf,
    /// How much is drawn anew from a picture or in the second pass, 0 to 1.
    #[arg(long)]
    pub strength: Option<f64>,
    /// Picture (PNG, JPEG, WebP, BMP) to start from.
    #[arg(long)]
    pub init: Option<PathBuf>,
    /// How it is brought to size: stretch, crop, fill or latent.
    #[arg(long)]
    pub resize: Option<String>,
    /// Makes all steps when drawing from a picture, not the share --strength of them.
    #[arg(long)]
    pub exactly_steps: bool,
    /// Factor on the noise when drawing from a picture.
    #[arg(long)]
    pub noise_multiplier: Option<f64>,
    /// Noise added besides when drawing from a picture.
    #[arg(long)]
    pub extra_noise: Option<f64>,
    /// Picture that is white where to paint anew.
    #[arg(long, requires = "init")]
    pub mask: Option<PathBuf>,
    /// Softening of the mask's edge in pixels.
    #[arg(long, requires = "mask")]
    pub mask_blur: Option<f64>,
    /// Paints where the mask is black.
    #[arg(long, requires = "mask")]
    pub invert_mask: bool,
    /// What is under the mask at first: fill, original, latent-noise, latent-nothing.
    #[arg(long, requires = "mask")]
    pub masked_content: Option<String>,
    /// Paints the masked area alone at full size, with this many pixels around it.
    #[arg(long, requires = "mask")]
    pub only_masked: Option<usize>,
    /// Writes a caption beside each picture: how one picture (--init) becomes a folder to
    /// train from.
    #[arg(long)]
    pub caption: Option<String>,
    /// Option to vary to the right, such as `Steps=10,20` or `LoRA weight=0.5-1 [3]`;
    /// `Checkpoint name=` and `VAE=` take files beside the model's.
    #[arg(long)]
    pub x: Option<String>,
    /// Option to vary downwards.
    #[arg(long, requires = "x")]
    pub y: Option<String>,
    /// Option to vary from grid to grid.
    #[arg(long, requires = "y")]
    pub z: Option<String>,
    /// Decodes pictures in tiles of this many pixels: less memory.
    #[arg(long)]
    pub vae_tile: Option<usize>,
    /// What products are computed in on the CPU: f32, or bf16, which is faster and rounds.
    #[arg(long)]
    pub compute: Option<String>,
    /// f32, bf16 or f16 for the UNet on a GPU. On the CPU, weights stay as the file has them
    /// and are computed with in f32.
    #[arg(long)]
    pub dtype: Option<String>,
    /// Folder for the pictures.
    #[arg(long, default_value = "out/images")]
    pub output: PathBuf,
    /// auto, cpu, cuda:0 or metal.
    #[arg(long, default_value = "auto")]
    pub device: String,
}

impl Arguments {
    /// Fills in how the picture of `--from` was computed, where the command line does not
    /// say; returns its text.
    ///
    /// # Errors
    /// When it cannot be read or has no text.
    pub fn recall(&mut self) -> Outcome<Option<Infotext>> {
        let Some(path) = &self.from else {
            return Ok(None);
        };
        let mut text = Infotext::open(path)?;
        let mut take = |key| text.parameters.remove(key);
        let (compute, dtype) = (take(COMPUTE), take(DTYPE));
        let (tile, prediction) = (take(VAE_TILE), take(PREDICTION));
        self.compute = self.compute.take().or(compute);
        self.dtype = self.dtype.take().or(dtype);
        self.prediction = self.prediction.take().or(prediction);
        if let (None, Some(tile)) = (self.vae_tile, tile) {
            let wrong = |_| format!("{VAE_TILE} in the picture's text is {tile}, not a number");
            self.vae_tile = Some(tile.parse().map_err(wrong)?);
        }
        self.merge_adapters |= take(ADAPTERS).is_some_and(|mode| mode == "merged");
        self.zero_terminal_snr |= text
            .parameters
            .get(NOISE_SCHEDULE)
            .is_some_and(|name| name == ZERO_SNR);
        if self.zero_terminal_snr {
            text.parameters.remove(NOISE_SCHEDULE);
        }
        for key in Txt2Img::unread(&text) {
            let value = text.get(key).unwrap_or_default();
            eprintln!("warning: not understood in the picture's text: {key}: {value}");
        }
        Ok(Some(text))
    }

    /// What of the command line a picture's text must hold to be drawn again, beyond the
    /// web UI's parameters.
    pub fn own_parameters(&self) -> Vec<(&'static str, String)> {
        let mut list = Vec::new();
        for (key, value, default) in [
            (COMPUTE, &self.compute, "f32"),
            (DTYPE, &self.dtype, "f32"),
            (PREDICTION, &self.prediction, ""),
        ] {
            let given = value.clone().filter(|v| v != default);
            list.extend(given.map(|v| (key, v)));
        }
        list.extend(self.vae_tile.map(|pixels| (VAE_TILE, pixels.to_string())));
        for (key, value, on) in [
            (ADAPTERS, "merged", self.merge_adapters),
            (NOISE_SCHEDULE, ZERO_SNR, self.zero_terminal_snr),
        ] {
            if on {
                list.push((key, value.to_string()));
            }
        }
        list
    }

    /// The job: that of a picture's text, or the defaults, with what was given.
    ///
    /// # Errors
    /// For values that cannot be understood.
    pub fn job(&self, text: Option<&Infotext>) -> Outcome<Txt2Img> {
        let mut job = match (text, &self.model) {
            (Some(text), _) if self.init.is_some() => self.picture_again(text)?.job,
            (Some(text), _) => Txt2Img::from_infotext(text)?,
            // The bundled miniature's size and guidance.
            (None, None) => portraits::request("portrait, smile", 1),
            (None, Some(_)) => Txt2Img {
                seed: 1,
                sampler: SamplerKind::EulerAncestral,
                ..Txt2Img::default()
            },
        };
        set(&mut job.prompt, &self.prompt);
        set(&mut job.negative, &self.negative);
        set(&mut job.seed, &self.seed);
        set(&mut job.steps, &self.steps);
        set(&mut job.guidance_scale, &self.cfg_scale);
        set(&mut job.width, &self.width);
        set(&mut job.height, &self.height);
        set(&mut job.clip_skip, &self.clip_skip);
        set(&mut job.eta_delta, &self.ensd);
        set(&mut job.skip_negative_below, &self.ngms);
        job.batch_size = self.batch_size;
        job.sgm_noise |= self.sgm_noise;
        job.pad |= self.pad_prompts;
        job.options.eta = self.eta.or(job.options.eta);
        if let Some(rng) = &self.rng {
            job.noise = NoiseSource::from_name(rng)?;
        }
        if let Some(name) = &self.sampler {
            (job.sampler, job.schedule) = SamplerKind::from_name(name)?;
        }
        match self.schedule.as_deref() {
            None => {}
            Some(name) if name.eq_ignore_ascii_case("automatic") => job.schedule = None,
            Some(name) => job.schedule = Some(SigmaSchedule::from_name(name)?),
        }
        if let Some(name) = &self.emphasis {
            job.emphasis = Emphasis::from_name(name)?;
        }
        if self.variation_strength.is_some() || self.variation_seed.is_some() {
            let recalled = job.variation;
            let strength = self.variation_strength.or(recalled.map(|v| v.strength));
            job.variation = Some(Variation {
                seed: self
                    .variation_seed
                    .or(recalled.map(|v| v.seed))
                    .unwrap_or(0),
                strength: strength.ok_or("--variation-seed: give --variation-strength, too")?,
            });
        }
        if let Some(text) = &self.seed_resize_from {
            job.seed_resize = Some(size("--seed-resize-from", text)?);
        }
        if self.hires_scale.is_some() || self.hires_resize.is_some() {
            let hires = job.hires.get_or_insert_default();
            set(&mut hires.scale, &self.hires_scale);
            let resize = self.hires_resize.as_deref();
            hires.size = resize
                .map(|text| size("--hires-resize", text))
                .transpose()?;
        }
        match &mut job.hires {
            Some(hires) => {
                set(&mut hires.steps, &self.hires_steps);
                set(&mut hires.strength, &self.strength);
                if let Some(name) = &self.hires_upscaler {
                    hires.upscaler = Upscaler::from_name(name);
                }
            }
            None if self.hires_steps.is_some() || self.hires_upscaler.is_some() => {
                return Err("there is no second pass: give --hires-scale or --hires-resize".into());
            }
            None if self.strength.is_some() && self.init.is_none() => {
                return Err("--strength needs --init, --hires-scale or --hires-resize".into());
            }
            None => {}
        }
        job.validate()?;
        Ok(job)
    }

    /// The job of drawing from a picture, if `--init` is given.
    ///
    /// # Errors
    /// For pictures that cannot be read and values that cannot be understood.
    pub fn from_picture(&self, job: &Txt2Img, text: Option<&Infotext>) -> Outcome<Option<Img2Img>> {
        let Some(init) = &self.init else {
            for (option, given) in [
                ("--resize", self.resize.is_some()),
                ("--exactly-steps", self.exactly_steps),
                ("--noise-multiplier", self.noise_multiplier.is_some()),
                ("--extra-noise", self.extra_noise.is_some()),
            ] {
                if given {
                    return Err(
                        format!("{option} is about drawing from a picture: give --init").into(),
                    );
                }
            }
            return Ok(None);
        };
        let mut request = match text {
            Some(text) => self.picture_again(text)?,
            None => Img2Img::new(job.clone(), open(init)?),
        };
        request.job = job.clone();
        set(&mut request.strength, &self.strength);
        set(&mut request.noise_multiplier, &self.noise_multiplier);
        set(&mut request.extra_noise, &self.extra_noise);
        request.exactly_steps |= self.exactly_steps;
        if let Some(name) = &self.resize {
            request.resize = ResizeMode::from_name(name)?;
        }
        if let (None, Some(mask)) = (&request.inpaint, &self.mask) {
            request.inpaint = Some(Inpaint::new(open(mask)?));
        }
        if let Some(inpaint) = &mut request.inpaint {
            inpaint.invert |= self.invert_mask;
            set(&mut inpaint.blur, &self.mask_blur);
            inpaint.only_masked = self.only_masked.or(inpaint.only_masked);
            if let Some(name) = &self.masked_content {
                inpaint.content = MaskedContent::from_name(name)?;
            }
        }
        request.validate()?;
        Ok(Some(request))
    }

    /// The job of drawing from a picture that a picture's text describes.
    fn picture_again(&self, text: &Infotext) -> Outcome<Img2Img> {
        let init = self.init.as_deref().ok_or("--init is needed")?;
        let mask = self.mask.as_deref().map(open).transpose()?;
        Ok(Img2Img::from_infotext(text, open(init)?, mask)?)
    }

    /// All pictures to draw: a sweep's, if an axis is given, or batches whose seeds count on.
    ///
    /// # Errors
    /// For axes and styles that are not known.
    pub fn cells(&self, job: &Txt2Img) -> Outcome<(Option<Sweep>, Vec<Cell>)> {
        let axes = [&self.x, &self.y, &self.z].into_iter().flatten();
        let axes: Vec<Axis> = axes
            .map(|text| Ok(Axis::parse(text)?.with_seeds(&mut any_seed)))
            .collect::<Outcome<_>>()?;
        let sweep = match (axes.is_empty(), &self.init) {
            (true, _) => None,
            (false, None) => Some(Sweep::new(job.clone(), axes)?),
            (false, Some(_)) => Some(Sweep::from_picture(job.clone(), axes)?),
        };
        let mut cells = match &sweep {
            Some(sweep) => sweep.cells().to_vec(),
            None => (0..self.batch_count).map(|i| batch(job, i)).collect(),
        };
        let styled = |cell: &Cell| !(self.style.is_empty() && cell.styles.is_empty());
        if cells.iter().any(styled) {
            let styles = Styles::open(&self.styles_file)?;
            for Cell {
                job, styles: more, ..
            } in &mut cells
            {
                for name in self.style.iter().chain(more.iter()) {
                    styles.apply(name, &mut job.prompt, &mut job.negative)?;
                }
            }
        }
        Ok((sweep, cells))
    }

    /// The files that a cell is drawn with: checkpoint and VAE.
    ///
    /// # Errors
    /// For names that are not found beside the checkpoint.
    pub fn files(&self, cell: &Cell) -> Outcome<(PathBuf, Option<PathBuf>)> {
        let model = self.model.clone().unwrap_or_else(demo_model);
        let beside = |path: &Path| match path.parent() {
            Some(folder) if folder.as_os_str().is_empty() => PathBuf::from("."),
            Some(folder) => folder.to_path_buf(),
            None => PathBuf::from("."),
        };
        let folder = beside(&model);
        let model = match &cell.model {
            Some(name) => find_model(&folder, "checkpoint", name)?,
            None => model,
        };
        let vae = match cell.vae.as_deref() {
            None => self.vae.clone(),
            Some("Automatic" | "None") => None,
            Some(name) => {
                let folder = self.vae.as_deref().map_or(folder, beside);
                Some(find_model(&folder, "VAE", name)?)
            }
        };
        Ok((model, vae))
    }

    /// Loads the networks. On the CPU, weights stay as the file has them.
    ///
    /// # Errors
    /// As [`Checkpoint::verify`], and for a dtype that is not known.
    pub fn load(
        &self,
        model: &Path,
        vae: Option<&Path>,
        device: &Device,
    ) -> Outcome<StableDiffusion> {
        let dtype = match self.dtype.as_deref().unwrap_or("f32") {
            "f32" => DType::F32,
            "bf16" => DType::BF16,
            "f16" => DType::F16,
            other => return Err(format!("--dtype {other}: expected f32, bf16 or f16").into()),
        };
        let compute = match self.compute.as_deref().unwrap_or("f32") {
            "f32" => Compute::F32,
            "bf16" if device.is_cpu() && dtype == DType::F32 => Compute::Bf16,
            "bf16" => {
                return Err("--compute bf16 is for the CPU and f32; on a GPU give --dtype".into());
            }
            other => return Err(format!("--compute {other}: expected f32 or bf16").into()),
        };
        let mut checkpoint = Checkpoint::open(model)?;
        if let Some(vae) = vae {
            checkpoint = checkpoint.with_vae(vae)?;
        }
        if !device.is_cpu() || dtype != DType::F32 {
            return Ok(StableDiffusion::from_checkpoint(
                &checkpoint,
                dtype,
                device,
            )?);
        }
        let (unet, others) = match compute {
            // Merging into 16 bits would round.
            _ if self.merge_adapters => (WeightStorage::F32, WeightStorage::F32),
            Compute::Bf16 => (WeightStorage::Bf16, WeightStorage::AsStored),
            Compute::F32 => (WeightStorage::AsStored, WeightStorage::AsStored),
        };
        let mut sd = StableDiffusion::from_checkpoint_stored(&checkpoint, unet, others, device)?;
        sd.unet.set_compute(compute)?;
        Ok(sd)
    }

    /// Sets up the pipeline: prediction, tiles, embeddings, and the adapters of prompts.
    ///
    /// # Errors
    /// For adapters that are not there and files that cannot be read.
    pub fn prepare(&self, sd: &mut StableDiffusion, cells: &[Cell]) -> Outcome<()> {
        if let Some(name) = &self.prediction {
            sd.prediction = Prediction::from_name(name)?;
        }
        sd.zero_terminal_snr = self.zero_terminal_snr;
        sd.vae_tile = self.vae_tile.map(|pixels| pixels / 8);
        if self.merge_adapters {
            sd.set_adapter_mode(AdapterMode::Merged);
        }
        if let Some(folder) = &self.embeddings_dir {
            let entries =
                std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
            let mut files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
            files.sort();
            for file in files.iter().filter(|file| file.is_file()) {
                sd.load_embedding(file)?;
            }
        }
        for cell in cells {
            let upscaler = cell.job.hires.as_ref().map(|hires| &hires.upscaler);
            if let Some(Upscaler::Network(name)) = upscaler
                && !sd.has_upscaler(name)
            {
                let path = find_upscaler(&self.upscaler_dir, name)?;
                let network = UpscaleNetwork::load(path, sd.device())?;
                sd.add_upscaler(name, network);
            }
            for tag in extract_tags(&cell.job.prompt).1 {
                if !sd.has_adapter(&tag.name) {
                    let path = find_adapter(&self.lora_dir, &tag.name)?;
                    for what in sd.load_adapter(&tag.name, path)? {
                        eprintln!("warning: left out of the adapter {}: {what}", tag.name);
                    }
                }
            }
        }
        Ok(())
    }
}

// Parameters of our own, for what the web UI does not have or does not write.
const COMPUTE: &str = "Compute";
const DTYPE: &str = "UNet dtype";
const VAE_TILE: &str = "VAE tile";
const PREDICTION: &str = "Prediction";
const ADAPTERS: &str = "Adapters";
// As the web UI writes it.
const NOISE_SCHEDULE: &str = "Noise Schedule";
const ZERO_SNR: &str = "Zero Terminal SNR";

/// The job of batch `index`: seeds count on.
fn batch(job: &Txt2Img, index: u64) -> Cell {
    let mut job = job.clone();
    let before = index * job.batch_size as u64;
    match &mut job.variation {
        Some(variation) if variation.strength > 0.0 => {
            variation.seed = variation.seed.wrapping_add(before);
        }
        _ => job.seed = job.seed.wrapping_add(before),
    }
    Cell {
        job,
        ..Cell::default()
    }
}

/// Any seed of 32 bits.
fn any_seed() -> u64 {
    RandomState::new().build_hasher().finish() >> 32
}

/// A seed; -1 is any.
fn seed(text: &str) -> Result<u64, String> {
    if text == "-1" {
        return Ok(any_seed());
    }
    text.parse()
        .map_err(|_| "expected a number from 0, or -1 for any".into())
}

fn size(option: &str, text: &str) -> Result<(usize, usize), String> {
    let sides = text.split_once('x');
    let sides = sides.and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
    sides.ok_or_else(|| format!("{option} {text}: expected WIDTHxHEIGHT"))
}

fn set<T: Clone>(place: &mut T, value: &Option<T>) {
    if let Some(value) = value {
        place.clone_from(value);
    }
}

/// A picture in any format that datasets may have.
fn open(path: &Path) -> Outcome<Image> {
    if path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("png"))
    {
        return Ok(Image::open_png(path)?);
    }
    let picture = lora_data::decode_file(path, lora_data::DecodeOptions::default())?;
    Ok(Image {
        width: picture.size.width as usize,
        height: picture.size.height as usize,
        rgb: picture.rgb,
    })
}

/// What the text of a picture says about the model: computed beside the drawing, since
/// hashing gigabytes takes seconds.
#[derive(Debug)]
pub enum ModelInfo {
    /// Being computed.
    Running(std::thread::JoinHandle<Vec<(&'static str, String)>>),
    /// The parameters.
    Known(Vec<(&'static str, String)>),
}

impl ModelInfo {
    /// Starts hashing.
    pub fn of(model: &Path, vae: Option<&Path>) -> Self {
        let (model, vae) = (model.to_path_buf(), vae.map(Path::to_path_buf));
        let text = |part: Option<&std::ffi::OsStr>| {
            part.and_then(|s| s.to_str())
                .unwrap_or_default()
                .to_string()
        };
        let hash = |path: &Path| -> Option<String> {
            let hash = sha256_of_file(path).ok().filter(|_| path.is_file())?;
            Some(hash.chars().take(10).collect())
        };
        let list = std::thread::spawn(move || {
            let mut list = Vec::new();
            list.extend(hash(&model).map(|hash| ("Model hash", hash)));
            list.push(("Model", text(model.file_stem())));
            if let Some(vae) = vae {
                list.extend(hash(&vae).map(|hash| ("VAE hash", hash)));
                list.push(("VAE", text(vae.file_name())));
            }
            list
        });
        Self::Running(list)
    }

    /// The parameters, waited for.
    pub fn get(&mut self) -> &[(&'static str, String)] {
        if let Self::Running(_) = self
            && let Self::Running(list) = std::mem::replace(self, Self::Known(Vec::new()))
        {
            *self = Self::Known(list.join().unwrap_or_default());
        }
        match self {
            Self::Known(list) => list,
            Self::Running(_) => &[],
        }
    }
}

/// What the text of a picture says about the adapters and embeddings of its prompts.
pub fn hashes(sd: &StableDiffusion, job: &Txt2Img) -> Vec<(&'static str, String)> {
    let (prompt, tags, _) = extract_tags(&job.prompt);
    let names: BTreeSet<&str> = tags.iter().map(|tag| tag.name.as_str()).collect();
    let loras: Vec<String> = names
        .iter()
        .filter_map(|name| Some(format!("{name}: {}", sd.adapter_hash(name)?)))
        .collect();
    let words = sd.embeddings.names();
    let words: Vec<String> = words
        .filter(|name| prompt.contains(name) || job.negative.contains(name))
        .filter_map(|name| Some(format!("{name}: {}", sd.embeddings.hash(name)?)))
        .collect();
    [("Lora hashes", loras), ("TI hashes", words)]
        .into_iter()
        .filter(|(_, list)| !list.is_empty())
        .map(|(key, list)| (key, list.join(", ")))
        .collect()
}
