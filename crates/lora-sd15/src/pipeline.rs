//! Text to picture.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use lora_core::AdapterSet;

use crate::checkpoint::WeightStorage;
use crate::prompt::{AdapterTag, check_supported, chunk_prompt, extract_tags};
use crate::rng::{NoiseGenerator, NoiseSource};
use crate::sampler::{
    Ddim, Dpmpp2m, Euler, EulerAncestral, Query, Sampler, SigmaSchedule, ddim_timesteps,
};
use crate::text_encoder::weigh_restoring_mean;
use crate::{
    Checkpoint, Error, Image, NoiseSchedule, Part, Result, TextEncoder, Tokenizer, UNet, Vae,
};

/// The sampling methods, by the web UI's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum SamplerKind {
    /// "Euler".
    #[default]
    Euler,
    /// "Euler a".
    EulerAncestral,
    /// "DPM++ 2M", with the Karras schedule unless another is chosen.
    Dpmpp2m,
    /// "DDIM", with timesteps of its own.
    Ddim,
}

impl SamplerKind {
    /// Names as the web UI shows them.
    pub const ALL: [(&'static str, SamplerKind); 4] = [
        ("Euler", SamplerKind::Euler),
        ("Euler a", SamplerKind::EulerAncestral),
        ("DPM++ 2M", SamplerKind::Dpmpp2m),
        ("DDIM", SamplerKind::Ddim),
    ];

    /// Finds sampler and schedule by a name such as `Euler a`, `dpm++ 2m` or the older
    /// `DPM++ 2M Karras`.
    ///
    /// # Errors
    /// [`Error::UnknownName`] with the list.
    pub fn from_name(name: &str) -> Result<(Self, Option<SigmaSchedule>)> {
        let plain = |s: &str| s.to_lowercase().replace('_', " ");
        let wanted = plain(name.trim());
        let find = |wanted: &str| {
            Self::ALL
                .iter()
                .find(|(n, _)| plain(n) == wanted)
                .map(|(_, kind)| *kind)
        };
        if let Some(kind) = find(&wanted) {
            return Ok((kind, None));
        }
        let with_schedule = wanted.rsplit_once(' ').and_then(|(sampler, schedule)| {
            Some((
                find(sampler)?,
                Some(SigmaSchedule::from_name(schedule).ok()?),
            ))
        });
        with_schedule.ok_or_else(|| Error::UnknownName {
            what: "sampler",
            name: name.to_string(),
            known: Self::ALL
                .iter()
                .map(|(n, _)| *n)
                .collect::<Vec<_>>()
                .join(", "),
        })
    }

    /// The web UI's name.
    pub fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(_, k)| *k == self)
            .map_or("Euler", |(n, _)| n)
    }

    /// The schedule that "Automatic" stands for.
    pub fn automatic_schedule(self) -> SigmaSchedule {
        match self {
            SamplerKind::Dpmpp2m => SigmaSchedule::Karras,
            _ => SigmaSchedule::Uniform,
        }
    }
}

/// One text-to-picture job.
#[derive(Debug, Clone, PartialEq)]
pub struct Txt2Img {
    /// What to draw; `(word:1.2)`, `BREAK` and `<lora:name:0.8>` work.
    pub prompt: String,
    /// What to avoid.
    pub negative: String,
    /// Width in pixels, a multiple of 8.
    pub width: usize,
    /// Height in pixels, a multiple of 8.
    pub height: usize,
    /// Denoising steps, at least 1.
    pub steps: usize,
    /// Classifier-free guidance; 1 leaves the negative prompt out.
    pub guidance_scale: f64,
    /// Seed of the first picture; the others count up from it.
    pub seed: u64,
    /// Which generator the seed is for.
    pub noise: NoiseSource,
    /// Pictures per batch.
    pub batch_size: usize,
    /// The method.
    pub sampler: SamplerKind,
    /// Noise levels; `None` is the sampler's own.
    pub schedule: Option<SigmaSchedule>,
    /// 1 is the last text encoder layer, 2 the one before.
    pub clip_skip: usize,
}

impl Default for Txt2Img {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative: String::new(),
            width: 512,
            height: 512,
            steps: 20,
            guidance_scale: 7.0,
            seed: 0,
            noise: NoiseSource::default(),
            batch_size: 1,
            sampler: SamplerKind::default(),
            schedule: None,
            clip_skip: 1,
        }
    }
}

impl Txt2Img {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::BadSize`] or [`Error::BadValue`].
    pub fn validate(&self) -> Result<()> {
        let (width, height) = (self.width, self.height);
        if width % 8 != 0 || height % 8 != 0 || width < 64 || height < 64 {
            return Err(Error::BadSize { width, height });
        }
        let bad = |name, value: String, expected| {
            Err(Error::BadValue {
                name,
                value,
                expected,
            })
        };
        if !(1..=1000).contains(&self.steps) {
            return bad("steps", self.steps.to_string(), "expected 1 to 1000");
        }
        if self.batch_size == 0 {
            return bad("batch_size", "0".into(), "expected at least 1");
        }
        if !self.guidance_scale.is_finite() {
            return bad(
                "guidance_scale",
                self.guidance_scale.to_string(),
                "expected a number",
            );
        }
        Ok(())
    }

    /// The web UI's parameters of picture `index` of the batch, without the model.
    pub fn parameters(&self, index: usize) -> Vec<(&'static str, String)> {
        let schedule = self.schedule.map_or("Automatic", SigmaSchedule::name);
        let mut list = vec![
            ("Steps", self.steps.to_string()),
            ("Sampler", self.sampler.name().into()),
        ];
        if self.sampler != SamplerKind::Ddim {
            list.push(("Schedule type", schedule.into()));
        }
        list.push(("CFG scale", self.guidance_scale.to_string()));
        list.push(("Seed", (self.seed + index as u64).to_string()));
        list.push(("Size", format!("{}x{}", self.width, self.height)));
        list
    }
}

/// What a caller is told while a batch is drawn.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Steps done.
    pub done: usize,
    /// Steps in all.
    pub total: usize,
    /// The latents so far, `[n, 4, h/8, w/8]`.
    pub latents: &'a Tensor,
}

/// The three networks and the adapters loaded beside them.
///
/// ```no_run
/// use candle_core::{DType, Device};
/// use lora_core::AdapterSet;
/// use lora_sd15::{StableDiffusion, Txt2Img};
/// let mut sd = StableDiffusion::load("v1-5-pruned-emaonly.safetensors", DType::F32, &Device::Cpu)?;
/// sd.add_adapter("style", AdapterSet::load("style.safetensors", &Device::Cpu)?);
/// let request = Txt2Img { prompt: "1girl, (smile:1.2) <lora:style:0.8>".into(), seed: 1, ..Default::default() };
/// sd.txt2img(&request, &mut |_| true)?[0].save_png("out.png", None)?;
/// # Ok::<(), lora_sd15::Error>(())
/// ```
#[derive(Debug)]
pub struct StableDiffusion {
    /// The denoiser, in the dtype asked for.
    pub unet: UNet,
    /// The text encoder, f32.
    pub text_encoder: TextEncoder,
    /// The autoencoder, f32.
    pub vae: Vae,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    adapters: BTreeMap<String, AdapterSet>,
    dtype: DType,
    device: Device,
}

impl StableDiffusion {
    /// Loads a single-file checkpoint or a diffusers folder. `dtype` is the UNet's;
    /// text encoder and VAE stay in f32.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`Checkpoint::verify`].
    pub fn load(path: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        Self::from_checkpoint(&Checkpoint::open(path)?, dtype, device)
    }

    /// The same from an opened checkpoint.
    ///
    /// # Errors
    /// As [`Checkpoint::verify`].
    pub fn from_checkpoint(checkpoint: &Checkpoint, dtype: DType, device: &Device) -> Result<Self> {
        let text = checkpoint.var_builder(Part::TextEncoder, DType::F32, device)?;
        let vae = checkpoint.var_builder(Part::Vae, DType::F32, device)?;
        let unet = checkpoint.var_builder(Part::Unet, dtype, device)?;
        Self::build(checkpoint, [text, vae, unet], dtype, device)
    }

    /// The same for computing in f32, with the UNet's frozen weights kept as `unet` says
    /// and those of text encoder and VAE as `others`.
    ///
    /// # Errors
    /// As [`Checkpoint::verify`].
    pub fn from_checkpoint_stored(
        checkpoint: &Checkpoint,
        unet: WeightStorage,
        others: WeightStorage,
        device: &Device,
    ) -> Result<Self> {
        let text = checkpoint.stored_var_builder(Part::TextEncoder, others, device)?;
        let vae = checkpoint.stored_var_builder(Part::Vae, others, device)?;
        let unet = checkpoint.stored_var_builder(Part::Unet, unet, device)?;
        Self::build(checkpoint, [text, vae, unet], DType::F32, device)
    }

    /// All parts were checked before the first weight is read.
    fn build(
        checkpoint: &Checkpoint,
        [text, vae, unet]: [VarBuilder<'_>; 3],
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let config = checkpoint.config();
        Ok(Self {
            unet: UNet::new(&config.unet, unet)?,
            text_encoder: TextEncoder::new(&config.text, text)?,
            vae: Vae::new(&config.vae, vae)?,
            tokenizer: Tokenizer::new(),
            adapters: BTreeMap::new(),
            dtype,
            device: device.clone(),
        })
    }

    /// Where the networks are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The UNet's dtype.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Makes an adapter available to prompts as `<lora:name:...>`.
    pub fn add_adapter(&mut self, name: impl Into<String>, adapter: AdapterSet) {
        self.adapters.insert(name.into(), adapter);
    }

    /// Whether an adapter of this name was added.
    pub fn has_adapter(&self, name: &str) -> bool {
        self.adapters.contains_key(name)
    }

    /// Attaches exactly these adapters, each with its two multipliers; all others are
    /// taken off. Base weights are never changed.
    ///
    /// # Errors
    /// [`Error::UnknownName`] for a name that was not added; [`lora_core::Error`] when
    /// an adapter does not fit the model.
    pub fn use_adapters(&mut self, tags: &[AdapterTag]) -> Result<()> {
        for set in self.adapters.values() {
            set.detach(&mut self.unet)?;
            set.detach(&mut self.text_encoder)?;
        }
        for tag in tags {
            if tag.rank.is_some() {
                let what = format!(
                    "<lora:{}> with a rank (dyn) is not supported; resize the file instead",
                    tag.name
                );
                return Err(Error::Prompt {
                    prompt: tag.name.clone(),
                    what,
                });
            }
            if !self.adapters.contains_key(&tag.name) {
                let known = self.adapters.keys().cloned().collect::<Vec<_>>().join(", ");
                return Err(Error::UnknownName {
                    what: "adapter",
                    name: tag.name.clone(),
                    known,
                });
            }
            let Some(set) = self.adapters.get_mut(&tag.name) else {
                continue;
            };
            set.attach(&mut self.unet, tag.unet)?.strict()?;
            set.attach(&mut self.text_encoder, tag.text_encoder)?
                .strict()?;
        }
        Ok(())
    }

    /// Encodes a prompt without tags: `[1, 77 * chunks, width]`, attention weights
    /// applied, the mean restored per chunk.
    ///
    /// # Errors
    /// [`Error::Prompt`] for syntax that is not supported.
    pub fn encode_prompt(&self, prompt: &str, clip_skip: usize) -> Result<Tensor> {
        check_supported(prompt)?;
        let mut states = Vec::new();
        for chunk in chunk_prompt(&self.tokenizer, prompt, 20) {
            let config = self.text_encoder.config();
            let ids: Vec<u32> = chunk.tokens.iter().map(|id| config.fold(*id)).collect();
            let ids = Tensor::new(ids, &self.device)?.unsqueeze(0)?;
            let mut encoded = self.text_encoder.forward(&ids, clip_skip)?;
            if chunk.weights.iter().any(|w| *w != 1.0) {
                let weights = Tensor::new(chunk.weights, &self.device)?.unsqueeze(0)?;
                encoded = weigh_restoring_mean(&encoded, &weights)?;
            }
            states.push(encoded);
        }
        Ok(Tensor::cat(&states, 1)?)
    }

    /// Draws one batch. `on_step` is called after every step; returning `false`
    /// cancels, and the pictures are decoded as they are then.
    ///
    /// # Errors
    /// For bad sizes, unknown adapters, unsupported prompts, or when the model
    /// produces NaN.
    pub fn txt2img(
        &mut self,
        request: &Txt2Img,
        on_step: &mut dyn FnMut(Step<'_>) -> bool,
    ) -> Result<Vec<Image>> {
        request.validate()?;
        let (prompt, tags, others) = extract_tags(&request.prompt);
        if let Some(tag) = others.first() {
            let what = format!("{tag} is not supported; known are <lora:...> and <lyco:...>");
            return Err(Error::Prompt {
                prompt: request.prompt.clone(),
                what,
            });
        }
        self.use_adapters(&tags)?;
        let latents = self.sample(request, &prompt, on_step)?;
        self.decode(&latents)
    }

    fn sample(
        &self,
        request: &Txt2Img,
        prompt: &str,
        on_step: &mut dyn FnMut(Step<'_>) -> bool,
    ) -> Result<Tensor> {
        let schedule = NoiseSchedule::sd15_f64();
        let guided = request.guidance_scale != 1.0;
        let cond = self.encode_prompt(prompt, request.clip_skip)?;
        let (negative, _, _) = extract_tags(&request.negative);
        let uncond = if guided {
            Some(self.encode_prompt(&negative, request.clip_skip)?)
        } else {
            None
        };
        let guidance = Guidance {
            unet: &self.unet,
            dtype: self.dtype,
            cond: cond.to_dtype(self.dtype)?,
            uncond: uncond.map(|u| u.to_dtype(self.dtype)).transpose()?,
            scale: request.guidance_scale,
        };

        let shape = [4, request.height / 8, request.width / 8];
        let mut generators: Vec<NoiseGenerator> = (0..request.batch_size as u64)
            .map(|i| NoiseGenerator::new(request.noise, request.seed + i))
            .collect();
        let mut draw = |_: f64, _: f64| {
            let images: candle_core::Result<Vec<Tensor>> = generators
                .iter_mut()
                .map(|g| Tensor::from_vec(g.normal(shape.iter().product()), &shape, &self.device))
                .collect();
            Tensor::stack(&images?, 0)
        };
        let start = draw(0.0, 0.0)?;
        let mut sampler = make_sampler(request, start, &schedule)?;
        loop {
            sampler.prepare(&mut draw)?;
            let Some(query) = sampler.query() else { break };
            let answer = guidance.answer(&query, &schedule)?;
            sampler.advance(&answer, &mut draw)?;
            let (done, total) = sampler.progress();
            if !on_step(Step {
                done,
                total,
                latents: sampler.latents(),
            }) {
                break;
            }
        }
        Ok(sampler.latents().clone())
    }

    /// Decodes scaled latents `[n, 4, h, w]` into pictures, one at a time to save
    /// memory.
    ///
    /// # Errors
    /// [`Error::NotFinite`] when the latents or pictures hold NaN.
    pub fn decode(&self, latents: &Tensor) -> Result<Vec<Image>> {
        let latents = (latents.to_dtype(DType::F32)? / self.vae.scaling_factor())?;
        let sum = latents.sum_all()?.to_scalar::<f32>()?;
        if !sum.is_finite() {
            return Err(Error::NotFinite {
                what: "the latents",
                advice: "use f32, another sampler or more steps",
            });
        }
        (0..latents.dim(0)?)
            .map(|i| {
                Image::from_tensor(
                    &self
                        .vae
                        .decode(&latents.narrow(0, i, 1)?.contiguous()?)?
                        .squeeze(0)?,
                )
            })
            .collect()
    }
}

fn make_sampler(
    request: &Txt2Img,
    noise: Tensor,
    schedule: &NoiseSchedule,
) -> Result<Box<dyn Sampler>> {
    if request.sampler == SamplerKind::Ddim {
        if request.schedule.is_some() {
            let expected = "DDIM has timesteps of its own; leave the schedule type out";
            let value = request.schedule.map_or("", SigmaSchedule::name).to_string();
            return Err(Error::BadValue {
                name: "schedule type",
                value,
                expected,
            });
        }
        let timesteps = ddim_timesteps(request.steps);
        return Ok(Box::new(Ddim::new(
            noise,
            timesteps,
            schedule.alphas_cumprod(),
            0.0,
        )));
    }
    let kind = request
        .schedule
        .unwrap_or(request.sampler.automatic_schedule());
    let sigmas = kind.sigmas(request.steps, schedule);
    let x = (noise * sigmas.first().copied().unwrap_or(1.0))?;
    Ok(match request.sampler {
        SamplerKind::EulerAncestral => Box::new(EulerAncestral::new(x, sigmas, Default::default())),
        SamplerKind::Dpmpp2m => Box::new(Dpmpp2m::new(x, sigmas)),
        SamplerKind::Euler | SamplerKind::Ddim => {
            Box::new(Euler::new(x, sigmas, Default::default()))
        }
    })
}

/// The UNet under classifier-free guidance.
struct Guidance<'a> {
    unet: &'a UNet,
    dtype: DType,
    cond: Tensor,
    uncond: Option<Tensor>,
    scale: f64,
}

impl Guidance<'_> {
    fn answer(&self, query: &Query, schedule: &NoiseSchedule) -> Result<Tensor> {
        match query {
            Query::Timestep { x, timestep } => self.eps(x, *timestep),
            Query::Sigma { x, sigma } => {
                let input = (x / (sigma * sigma + 1.0).sqrt())?;
                let eps = self.eps(&input, schedule.timestep(*sigma))?;
                Ok((x - (eps * *sigma)?)?)
            }
        }
    }

    /// The guided noise prediction, f32. Both prompts share one call when they have
    /// the same number of chunks.
    fn eps(&self, x: &Tensor, timestep: f64) -> Result<Tensor> {
        let n = x.dim(0)?;
        let input = x.to_dtype(self.dtype)?;
        let run = |input: &Tensor, context: &Tensor| -> Result<Tensor> {
            let t = Tensor::full(timestep as f32, input.dim(0)?, input.device())?;
            Ok(self
                .unet
                .forward(input, &t, context)?
                .to_dtype(DType::F32)?)
        };
        let repeat = |c: &Tensor| c.repeat((n, 1, 1));
        let Some(uncond) = &self.uncond else {
            return run(&input, &repeat(&self.cond)?);
        };
        let (c, u) = if uncond.dims() == self.cond.dims() {
            let both = run(
                &Tensor::cat(&[&input, &input], 0)?,
                &Tensor::cat(&[repeat(&self.cond)?, repeat(uncond)?], 0)?,
            )?;
            (both.narrow(0, 0, n)?, both.narrow(0, n, n)?)
        } else {
            (
                run(&input, &repeat(&self.cond)?)?,
                run(&input, &repeat(uncond)?)?,
            )
        };
        Ok((&u + ((c - &u)? * self.scale)?)?)
    }
}

/// Finds an adapter file in a folder (and its sub-folders) by file stem or by the
/// name it was trained under (`ss_output_name`).
///
/// # Errors
/// [`Error::UnknownName`] listing what is there.
pub fn find_adapter(folder: &Path, name: &str) -> Result<PathBuf> {
    let mut files = Vec::new();
    collect(folder, &mut files, 0)?;
    files.sort();
    let stem = |p: &PathBuf| p.file_stem().and_then(|s| s.to_str()).map(str::to_string);
    if let Some(file) = files.iter().find(|p| stem(p).as_deref() == Some(name)) {
        return Ok(file.clone());
    }
    for file in &files {
        let alias = lora_core::format::TensorFile::open(file)
            .ok()
            .and_then(|f| f.metadata().remove("ss_output_name"));
        if alias.as_deref() == Some(name) {
            return Ok(file.clone());
        }
    }
    let mut known: Vec<String> = files.iter().filter_map(stem).collect();
    if known.is_empty() {
        known.push(format!("none in {}", folder.display()));
    }
    Err(Error::UnknownName {
        what: "adapter",
        name: name.to_string(),
        known: known.join(", "),
    })
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>, depth: usize) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if path.is_dir() && depth < 8 {
            collect(&path, files, depth + 1)?;
        } else if path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("safetensors"))
        {
            files.push(path);
        }
    }
    Ok(())
}
