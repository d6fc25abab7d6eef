//! The options of `examples/generate.rs` and what they stand for.

use std::error::Error;
use std::path::{Path, PathBuf};

use crate::portraits;
use clap::Parser;
use lora_core::format::{FileReport, sha256_of_file};
use lora_sd15::prompt::extract_tags;
use lora_sd15::sampler::{Prediction, SigmaSchedule};
use lora_sd15::{
    AdapterMode, Axis, Emphasis, Hires, Image, Img2Img, Infotext, Inpaint, MaskedContent,
    NoiseSource, ResizeMode, SamplerKind, StableDiffusion, Txt2Img, Upscaler, Variation,
    find_adapter,
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
    /// Draws the picture again that this PNG holds, by its text; options given beside it
    /// count more.
    #[arg(long)]
    pub from: Option<PathBuf>,
    /// What to draw.
    #[arg(long)]
    pub prompt: Option<String>,
    /// What to avoid.
    #[arg(long)]
    pub negative: Option<String>,
    /// Seed of the first picture.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Which generator the seed is for: gpu (A1111's default, nv is the same) or cpu.
    #[arg(long)]
    pub rng: Option<String>,
    /// Seed of the variation.
    #[arg(long, default_value_t = 0)]
    pub variation_seed: u64,
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
    #[arg(long, default_value_t = 1)]
    pub batch_size: usize,
    /// Batches.
    #[arg(long, default_value_t = 1)]
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
    /// What the model predicts: epsilon or v.
    #[arg(long)]
    pub prediction: Option<String>,
    /// For v-prediction models trained to end in pure noise.
    #[arg(long)]
    pub zero_terminal_snr: bool,
    /// Draws again at this many times the size.
    #[arg(long)]
    pub hires_scale: Option<f64>,
    /// Steps of the second pass; 0 is as many as in the first.
    #[arg(long, default_value_t = 0)]
    pub hires_steps: usize,
    /// How the first picture is enlarged, as in A1111.
    #[arg(long, default_value = "Latent")]
    pub hires_upscaler: String,
    /// How much is drawn anew from a picture or in the second pass, 0 to 1.
    #[arg(long)]
    pub strength: Option<f64>,
    /// Picture (PNG, JPEG, WebP, BMP) to start from.
    #[arg(long)]
    pub init: Option<PathBuf>,
    /// How it is brought to size: stretch, crop, fill or latent.
    #[arg(long, default_value = "stretch")]
    pub resize: String,
    /// Picture that is white where to paint anew.
    #[arg(long, requires = "init")]
    pub mask: Option<PathBuf>,
    /// Softening of the mask's edge in pixels.
    #[arg(long, default_value_t = 4.0)]
    pub mask_blur: f64,
    /// Paints where the mask is black.
    #[arg(long, requires = "mask")]
    pub invert_mask: bool,
    /// What is under the mask at first: fill, original, latent-noise, latent-nothing.
    #[arg(long, default_value = "original")]
    pub masked_content: String,
    /// Paints the masked area alone at full size, with this many pixels around it.
    #[arg(long, requires = "mask")]
    pub only_masked: Option<usize>,
    /// Writes a caption beside each picture: how one picture (--init) becomes a folder to
    /// train from.
    #[arg(long)]
    pub caption: Option<String>,
    /// Option to vary to the right, such as `Steps=10,20` or `LoRA weight=0.5-1 [3]`.
    #[arg(long, conflicts_with = "init")]
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
    /// f32, bf16 or f16 for the UNet.
    #[arg(long, default_value = "f32")]
    pub dtype: String,
    /// Folder for the pictures.
    #[arg(long, default_value = "out/images")]
    pub output: PathBuf,
    /// auto, cpu, cuda:0 or metal.
    #[arg(long, default_value = "auto")]
    pub device: String,
}

impl Arguments {
    /// The job: that of `--from`, or the defaults, with what was given.
    ///
    /// # Errors
    /// For values that cannot be understood and pictures without text.
    pub fn job(&self) -> Outcome<Txt2Img> {
        let mut job = match (&self.from, &self.model) {
            (Some(path), _) => Txt2Img::from_infotext(&picture_text(path)?)?,
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
        job.options.eta = self.eta.or(job.options.eta);
        if let Some(rng) = &self.rng {
            job.noise = match rng.to_lowercase().as_str() {
                "gpu" | "nv" => NoiseSource::Philox,
                "cpu" => NoiseSource::Cpu,
                _ => return Err(format!("--rng {rng}: expected gpu, nv or cpu").into()),
            };
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
        if let Some(strength) = self.variation_strength {
            let seed = self.variation_seed;
            job.variation = Some(Variation { seed, strength });
        }
        if let Some(size) = &self.seed_resize_from {
            let sides = size.split_once('x');
            let sides = sides.and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
            let wrong = || format!("--seed-resize-from {size}: expected WIDTHxHEIGHT");
            job.seed_resize = Some(sides.ok_or_else(wrong)?);
        }
        if let Some(scale) = self.hires_scale {
            job.hires = Some(Hires {
                scale,
                size: None,
                steps: self.hires_steps,
                strength: self.strength.unwrap_or(0.7),
                upscaler: Upscaler::from_name(&self.hires_upscaler)?,
            });
        }
        job.validate()?;
        Ok(job)
    }

    /// The job of drawing from a picture, if `--init` is given.
    ///
    /// # Errors
    /// For pictures that cannot be read and values that cannot be understood.
    pub fn from_picture(&self, job: &Txt2Img) -> Outcome<Option<Img2Img>> {
        let Some(init) = &self.init else {
            return Ok(None);
        };
        let mut request = Img2Img::new(job.clone(), open(init)?);
        request.strength = self.strength.unwrap_or(request.strength);
        request.resize = ResizeMode::from_name(&self.resize)?;
        if let Some(mask) = &self.mask {
            request.inpaint = Some(Inpaint {
                mask: open(mask)?,
                invert: self.invert_mask,
                blur: self.mask_blur,
                content: MaskedContent::from_name(&self.masked_content)?,
                only_masked: self.only_masked,
            });
        }
        request.validate()?;
        Ok(Some(request))
    }

    /// The axes of a grid.
    ///
    /// # Errors
    /// As [`Axis::parse`].
    pub fn axes(&self) -> Outcome<Vec<Axis>> {
        let given = [&self.x, &self.y, &self.z].into_iter().flatten();
        Ok(given
            .map(|text| Axis::parse(text))
            .collect::<Result<_, _>>()?)
    }

    /// Sets up the pipeline: prediction, tiles, embeddings, and the adapters of prompts.
    ///
    /// # Errors
    /// For adapters that are not there and files that cannot be read.
    pub fn prepare(&self, sd: &mut StableDiffusion, jobs: &[Txt2Img]) -> Outcome<()> {
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
        for job in jobs {
            for tag in extract_tags(&job.prompt).1 {
                if !sd.has_adapter(&tag.name) {
                    let path = find_adapter(&self.lora_dir, &tag.name)?;
                    for finding in FileReport::open(&path)?.errors() {
                        eprintln!("warning: left out of {}: {}", tag.name, finding.message);
                    }
                    sd.load_adapter(&tag.name, path)?;
                }
            }
        }
        Ok(())
    }
}

fn set<T: Clone>(place: &mut T, value: &Option<T>) {
    if let Some(value) = value {
        place.clone_from(value);
    }
}

/// The web UI's text in a PNG.
fn picture_text(path: &Path) -> Outcome<Infotext> {
    let (_, text) = Image::open_png_with_text(path)?;
    let missing = || format!("{}: it has no parameters text", path.display());
    Ok(Infotext::parse(&text.ok_or_else(missing)?))
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

/// What the text of a picture says about the model: computed beside the loading, since
/// hashing gigabytes takes seconds.
#[derive(Debug)]
pub struct ModelInfo {
    list: std::thread::JoinHandle<Vec<(&'static str, String)>>,
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
        Self { list }
    }

    /// The parameters.
    pub fn finish(self) -> Vec<(&'static str, String)> {
        self.list.join().unwrap_or_default()
    }
}

/// What the text of a picture says about the adapters and embeddings of its prompts.
pub fn hashes(sd: &StableDiffusion, job: &Txt2Img) -> Vec<(&'static str, String)> {
    let (prompt, tags, _) = extract_tags(&job.prompt);
    let loras: Vec<String> = tags
        .iter()
        .filter_map(|tag| Some(format!("{}: {}", tag.name, sd.adapter_hash(&tag.name)?)))
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
