//! What to draw.

use crate::infotext::{Infotext, infotext};
use crate::noise::NoiseRequest;
use crate::pipeline::hires::{Hires, Upscaler};
use crate::prompt::split_composition;
use crate::rng::NoiseSource;
use crate::sampler::{SamplerKind, SamplerOptions, SigmaOptions, SigmaSchedule};
use crate::{Error, Result};

/// A second seed mixed into the noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Variation {
    /// The seed of the variation; the pictures of a batch count up from it.
    pub seed: u64,
    /// 0 is the picture of the main seed, 1 that of this one.
    pub strength: f64,
}

/// What the weights of a prompt do to the text encoder's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Emphasis {
    /// Multiplied, and the mean of the chunk restored.
    #[default]
    Original,
    /// Multiplied only.
    NoNorm,
    /// Read and left out.
    Ignore,
    /// Brackets are text.
    None,
}

impl Emphasis {
    /// Names as the web UI shows them.
    pub const ALL: [(&'static str, Emphasis); 4] = [
        ("Original", Emphasis::Original),
        ("No norm", Emphasis::NoNorm),
        ("Ignore", Emphasis::Ignore),
        ("None", Emphasis::None),
    ];

    /// By name, in any letter case.
    ///
    /// # Errors
    /// [`Error::UnknownName`].
    pub fn from_name(name: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, e)| *e).ok_or_else(|| Error::UnknownName {
            what: "emphasis",
            name: name.to_string(),
            known: Self::ALL.map(|(n, _)| n).join(", "),
        })
    }

    fn name(self) -> &'static str {
        let found = Self::ALL.iter().find(|(_, e)| *e == self);
        found.map_or("Original", |(n, _)| n)
    }
}

/// One text-to-picture job.
#[derive(Debug, Clone, PartialEq)]
pub struct Txt2Img {
    /// What to draw: `(word:1.2)`, `[from:to:0.5]`, `[a|b]`, `BREAK`, `AND`,
    /// `<lora:name:0.8>` and the names of embeddings work.
    pub prompt: String,
    /// What to avoid. Tags of adapters are plain text here, as in the web UI.
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
    /// Mixes the noise of another seed in; all pictures then keep the main seed.
    pub variation: Option<Variation>,
    /// Width and height of the picture whose composition is wanted at this size.
    pub seed_resize: Option<(usize, usize)>,
    /// Added to the seed for the noise of the steps: "ENSD".
    pub eta_delta: i64,
    /// Pictures per batch.
    pub batch_size: usize,
    /// The method.
    pub sampler: SamplerKind,
    /// Noise levels; `None` is the sampler's own.
    pub schedule: Option<SigmaSchedule>,
    /// Ends and curvature of the noise levels.
    pub sigmas: SigmaOptions,
    /// Numbers of the method.
    pub options: SamplerOptions,
    /// 1 is the last text encoder layer, 2 the one before.
    pub clip_skip: usize,
    /// What prompt weights do.
    pub emphasis: Emphasis,
    /// How far back a full chunk is broken at a comma.
    pub comma_backtrack: usize,
    /// Below this noise level every second step leaves the negative prompt out: "NGMS".
    pub skip_negative_below: f64,
    /// Scales the first noise by `sqrt(1 + sigma^2)` instead of sigma: "SGM noise
    /// multiplier".
    pub sgm_noise: bool,
    /// Lengthens the shorter one of prompt and negative prompt by empty chunks, so that one
    /// call of the network does for both: "Pad prompt/negative prompt".
    pub pad: bool,
    /// Draws again at a larger size.
    pub hires: Option<Hires>,
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
            variation: None,
            seed_resize: None,
            eta_delta: 0,
            batch_size: 1,
            sampler: SamplerKind::default(),
            schedule: None,
            sigmas: SigmaOptions::default(),
            options: SamplerOptions::default(),
            clip_skip: 1,
            emphasis: Emphasis::default(),
            comma_backtrack: 20,
            skip_negative_below: 0.0,
            sgm_noise: false,
            pad: false,
            hires: None,
        }
    }
}

pub(crate) fn bad<T>(
    name: &'static str,
    value: impl ToString,
    expected: &'static str,
) -> Result<T> {
    Err(Error::BadValue {
        name,
        value: value.to_string(),
        expected,
    })
}

/// Refuses sizes that the model cannot draw.
pub(crate) fn check_size(width: usize, height: usize) -> Result<()> {
    if !width.is_multiple_of(8) || !height.is_multiple_of(8) || width < 64 || height < 64 {
        return Err(Error::BadSize { width, height });
    }
    Ok(())
}

impl Txt2Img {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::BadSize`] or [`Error::BadValue`].
    pub fn validate(&self) -> Result<()> {
        check_size(self.width, self.height)?;
        if !(1..=1000).contains(&self.steps) {
            return bad("steps", self.steps, "expected 1 to 1000");
        }
        if self.batch_size == 0 {
            return bad("batch_size", 0, "expected at least 1");
        }
        if !self.guidance_scale.is_finite() {
            return bad("guidance_scale", self.guidance_scale, "expected a number");
        }
        if self.sampler.on_timesteps() && self.schedule.is_some() {
            let name = self.schedule.map_or("", SigmaSchedule::name);
            return bad(
                "schedule type",
                name,
                "DDIM, PLMS and UniPC have timesteps of their own; leave the schedule type out",
            );
        }
        if self.sampler == SamplerKind::Lcm && self.schedule.is_some() {
            let name = self.schedule.map_or("", SigmaSchedule::name);
            let expected = "LCM has noise levels of its own; leave the schedule type out";
            return bad("schedule type", name, expected);
        }
        let strength = self.variation.map_or(0.0, |v| v.strength);
        if !(0.0..=1.0).contains(&strength) {
            return bad("variation strength", strength, "expected 0 to 1");
        }
        for (name, value) in [
            ("sigma min", self.sigmas.min),
            ("sigma max", self.sigmas.max),
            ("rho", self.sigmas.rho),
        ] {
            if let Some(value) = value.filter(|v| !(v.is_finite() && *v > 0.0)) {
                return bad(name, value, "expected a number above 0");
            }
        }
        if let Some(eta) = self.options.eta.filter(|e| !(0.0..=1.0).contains(e)) {
            return bad("eta", eta, "expected 0 to 1");
        }
        if let Some(order) = self.options.unipc_order.filter(|o| !(1..=3).contains(o)) {
            return bad("UniPC order", order, "expected 1 to 3");
        }
        match &self.hires {
            Some(hires) => hires.validate(self),
            None => Ok(()),
        }
    }

    /// The seeds of picture `index`: its own, and its variation's.
    pub(crate) fn seeds(&self, index: usize) -> (u64, u64) {
        let varied = self.variation.filter(|v| v.strength > 0.0);
        let seed = match varied {
            Some(_) => self.seed,
            None => self.seed.wrapping_add(index as u64),
        };
        (
            seed,
            varied.map_or(0, |v| v.seed.wrapping_add(index as u64)),
        )
    }

    /// The noise of the batch at a latent size.
    pub(crate) fn noise_request(&self, height: usize, width: usize) -> NoiseRequest {
        let seeds = (0..self.batch_size).map(|i| self.seeds(i));
        let (seeds, variation_seeds) = seeds.unzip();
        NoiseRequest {
            source: self.noise,
            shape: [4, height, width],
            seeds,
            variation_seeds,
            variation_strength: self.variation.map_or(0.0, |v| v.strength),
            resize_from: self.seed_resize.map(|(w, h)| (h, w)),
            eta_delta: self.eta_delta,
        }
    }

    /// Calls of the denoiser in `steps` steps, as prompt schedules count them.
    pub(crate) fn counted(&self, steps: usize) -> usize {
        if self.sampler.is_second_order() {
            2 * steps
        } else {
            steps
        }
    }

    /// The web UI's parameters of picture `index` of the batch, without the model: first
    /// those that belong before it, then those behind.
    pub fn parameters(&self, index: usize) -> Vec<(&'static str, String)> {
        let (mut list, rest) = self.parameters_around_model(index);
        list.extend(rest);
        list
    }

    /// The `parameters` text of picture `index`; `model` (hash, name, VAE) goes where the
    /// web UI has it and `extra` to the end.
    pub fn infotext(
        &self,
        index: usize,
        model: &[(&'static str, String)],
        extra: &[(&'static str, String)],
    ) -> String {
        let (mut list, rest) = self.parameters_around_model(index);
        list.extend_from_slice(model);
        list.extend(rest);
        list.extend_from_slice(extra);
        infotext(&self.prompt, &self.negative, &list)
    }

    fn parameters_around_model(&self, index: usize) -> (Parameters, Parameters) {
        let (seed, variation_seed) = self.seeds(index);
        let mut list: Parameters = vec![
            ("Steps", self.steps.to_string()),
            ("Sampler", self.sampler.name().into()),
        ];
        if !self.sampler.on_timesteps() && self.sampler != SamplerKind::Lcm {
            let schedule = self.schedule.map_or("Automatic", SigmaSchedule::name);
            list.push(("Schedule type", schedule.into()));
        }
        list.push(("CFG scale", self.guidance_scale.to_string()));
        list.push(("Seed", seed.to_string()));
        list.push(("Size", format!("{}x{}", self.width, self.height)));

        let mut rest: Parameters = Vec::new();
        if let Some(variation) = self.variation.filter(|v| v.strength > 0.0) {
            rest.push(("Variation seed", variation_seed.to_string()));
            rest.push(("Variation seed strength", variation.strength.to_string()));
        }
        if let Some((w, h)) = self.seed_resize {
            rest.push(("Seed resize from", format!("{w}x{h}")));
        }
        if let Some(hires) = &self.hires {
            rest.push(("Denoising strength", hires.strength.to_string()));
        }
        if self.clip_skip > 1 {
            rest.push(("Clip skip", self.clip_skip.to_string()));
        }
        if self.eta_delta != 0 {
            rest.push(("ENSD", self.eta_delta.to_string()));
        }
        if self.noise == NoiseSource::Cpu {
            rest.push(("RNG", "CPU".into()));
        }
        if self.skip_negative_below > 0.0 {
            rest.push(("NGMS", self.skip_negative_below.to_string()));
        }
        if let Some(hires) = &self.hires {
            rest.extend(hires.parameters());
        }
        for (name, value) in [
            ("Schedule min sigma", self.sigmas.min),
            ("Schedule max sigma", self.sigmas.max),
            ("Schedule rho", self.sigmas.rho),
            (
                if self.sampler == SamplerKind::Ddim {
                    "Eta DDIM"
                } else {
                    "Eta"
                },
                self.options.eta,
            ),
        ] {
            if let Some(value) = value {
                rest.push((name, value.to_string()));
            }
        }
        if let Some(order) = self.options.unipc_order {
            rest.push(("UniPC order", order.to_string()));
        }
        let churn = self.options.churn;
        for (name, value, default) in [
            ("Sigma churn", churn.s_churn, 0.0),
            ("Sigma tmin", churn.s_tmin, 0.0),
            ("Sigma tmax", churn.s_tmax, f64::INFINITY),
            ("Sigma noise", churn.s_noise, 1.0),
        ] {
            if value != default {
                rest.push((name, value.to_string()));
            }
        }
        if self.emphasis != Emphasis::Original {
            rest.push(("Emphasis", self.emphasis.name().into()));
        }
        for (name, on) in [
            ("SGM noise multiplier", self.sgm_noise),
            ("Pad conds", self.pad),
        ] {
            if on {
                rest.push((name, "True".into()));
            }
        }
        if self.comma_backtrack != 20 {
            rest.push(("Comma backtrack", self.comma_backtrack.to_string()));
        }
        (list, rest)
    }

    /// The job that a picture's `parameters` text describes. What the text does not say is
    /// the web UI's default. The model, its VAE and adapters are left to the caller.
    ///
    /// # Errors
    /// [`Error::BadValue`] and [`Error::UnknownName`] for values that cannot be understood;
    /// [`Error::Picture`] for texts of img2img and of features that are not here.
    ///
    /// ```
    /// use lora_sd15::{Infotext, Txt2Img};
    /// let job = Txt2Img { prompt: "1girl".into(), seed: 7, clip_skip: 2, ..Default::default() };
    /// let text = Infotext::parse(&job.infotext(0, &[], &[]));
    /// assert_eq!(Txt2Img::from_infotext(&text)?, job);
    /// # Ok::<(), lora_sd15::Error>(())
    /// ```
    pub fn from_infotext(text: &Infotext) -> Result<Self> {
        let control = |key: &&str| key.starts_with("ControlNet");
        let mut keys = text.parameters.keys().map(String::as_str);
        if let Some(feature) = keys.find(|key| REFUSED.contains(key) || control(key)) {
            let what = format!(
                "the picture was drawn with {feature:?}, which cannot be repeated from its text; give the options by hand"
            );
            return Err(Error::Picture { what });
        }
        let sampler = text.get("Sampler").unwrap_or("Euler");
        let (sampler, mut schedule) = SamplerKind::from_name(sampler)?;
        match text.get("Schedule type") {
            None | Some("Automatic") => {}
            Some(name) => schedule = Some(SigmaSchedule::from_name(name)?),
        }
        let side = |key| number::<usize>(text, key);
        let mut job = Self {
            prompt: text.prompt.clone(),
            negative: text.negative.clone(),
            width: side("Size-1")?.unwrap_or(512),
            height: side("Size-2")?.unwrap_or(512),
            steps: number(text, "Steps")?.unwrap_or(20),
            guidance_scale: number(text, "CFG scale")?.unwrap_or(7.0),
            seed: number(text, "Seed")?.unwrap_or(0),
            noise: NoiseSource::from_name(text.get("RNG").unwrap_or("GPU"))?,
            eta_delta: number(text, "ENSD")?.unwrap_or(0),
            sampler,
            schedule,
            clip_skip: number(text, "Clip skip")?.unwrap_or(1),
            skip_negative_below: number(text, "NGMS")?.unwrap_or(0.0),
            comma_backtrack: number(text, "Comma backtrack")?.unwrap_or(20),
            sgm_noise: flag(text, "SGM noise multiplier")? || flag(text, "SGM noise multplier")?,
            pad: flag(text, "Pad conds")?,
            ..Self::default()
        };
        if let Some(strength) = number(text, "Variation seed strength")? {
            let seed = number(text, "Variation seed")?.unwrap_or(0);
            job.variation = Some(Variation { seed, strength });
        }
        if let (Some(w), Some(h)) = (side("Seed resize from-1")?, side("Seed resize from-2")?) {
            job.seed_resize = Some((w, h));
        }
        job.sigmas = SigmaOptions {
            min: number(text, "Schedule min sigma")?,
            max: number(text, "Schedule max sigma")?,
            rho: number(text, "Schedule rho")?,
        };
        job.options.eta = match number(text, "Eta")? {
            None => number(text, "Eta DDIM")?,
            eta => eta,
        };
        job.options.unipc_order = number(text, "UniPC order")?;
        let churn = &mut job.options.churn;
        churn.s_churn = number(text, "Sigma churn")?.unwrap_or(churn.s_churn);
        churn.s_tmin = number(text, "Sigma tmin")?.unwrap_or(churn.s_tmin);
        churn.s_tmax = number(text, "Sigma tmax")?.unwrap_or(churn.s_tmax);
        churn.s_noise = number(text, "Sigma noise")?.unwrap_or(churn.s_noise);
        if let Some(name) = text.get("Emphasis") {
            job.emphasis = Emphasis::from_name(name)?;
        }
        if let Some(upscaler) = text.get("Hires upscaler") {
            let resize = (side("Hires resize-1")?, side("Hires resize-2")?);
            job.hires = Some(Hires {
                scale: number(text, "Hires upscale")?.unwrap_or(2.0),
                size: resize.0.zip(resize.1),
                steps: number(text, "Hires steps")?.unwrap_or(0),
                strength: number(text, "Denoising strength")?.unwrap_or(0.7),
                upscaler: Upscaler::from_name(upscaler),
            });
        } else if text.get("Denoising strength").is_some() {
            let what = "the picture was drawn from another picture (img2img), which is needed to draw it again";
            return Err(Error::Picture { what: what.into() });
        }
        Ok(job)
    }

    /// The parameters of a text that [`from_infotext`](Self::from_infotext) has no use
    /// for and that may have changed the picture: those of extensions, for example.
    ///
    /// ```
    /// use lora_sd15::{Infotext, Txt2Img};
    /// let text = Infotext::parse("zoe\nSteps: 20, Seed: 1, Version: v1.10.1, ADetailer model: face");
    /// assert_eq!(Txt2Img::unread(&text), ["ADetailer model"]);
    /// ```
    pub fn unread(text: &Infotext) -> Vec<&str> {
        let picture = text.get("Denoising strength").is_some();
        let picture = picture && text.get("Hires upscaler").is_none();
        let read = |key: &&str| READ.contains(key) || (picture && READ_FROM_PICTURE.contains(key));
        let keys = text.parameters.keys().map(String::as_str);
        keys.filter(|key| !read(key)).collect()
    }

    /// How many prompts `AND` joins.
    pub(crate) fn parts(&self, prompt: &str) -> Vec<crate::prompt::Part> {
        split_composition(prompt)
    }
}

pub(crate) type Parameters = Vec<(&'static str, String)>;

/// Features of the web UI that are not here.
const REFUSED: [&str; 31] = [
    "Beta schedule alpha",
    "Beta schedule beta",
    "DDIM Discretize",
    "Discard penultimate sigma",
    "Downcast alphas_cumprod",
    "Face restoration",
    "Hires CFG Scale",
    "Hires CFG scale",
    "Hires checkpoint",
    "Hires negative prompt",
    "Hires prompt",
    "Hires sampler",
    "Hires schedule type",
    "Hypernet",
    "Image CFG scale",
    "Init image hash",
    "NGMS all steps",
    "Old prompt editing timelines",
    "Pad conds v0",
    "Refiner",
    "Refiner switch at",
    "Skip Early CFG",
    "Tiling",
    "Token merging ratio",
    "Token merging ratio hr",
    "UniPC lower order final",
    "UniPC skip type",
    "UniPC variant",
    "Use old emphasis implementation",
    "VAE Decoder",
    "VAE Encoder",
];

/// What a job is made from, and what does not change a picture or concerns files.
const READ: [&str; 46] = [
    "Batch pos",
    "Batch size",
    "CFG scale",
    "Clip skip",
    "Comma backtrack",
    "Denoising strength",
    "ENSD",
    "Emphasis",
    "Eta",
    "Eta DDIM",
    "Hires resize-1",
    "Hires resize-2",
    "Hires steps",
    "Hires upscale",
    "Hires upscaler",
    "Lora hashes",
    "Model",
    "Model hash",
    "NGMS",
    "Pad conds",
    "RNG",
    "SGM noise multiplier",
    "SGM noise multplier", // as some versions spell it
    "Sampler",
    "Schedule max sigma",
    "Schedule min sigma",
    "Schedule rho",
    "Schedule type",
    "Seed",
    "Seed resize from-1",
    "Seed resize from-2",
    "Sigma churn",
    "Sigma noise",
    "Sigma tmax",
    "Sigma tmin",
    "Size-1",
    "Size-2",
    "Steps",
    "TI hashes",
    "UniPC order",
    "User",
    "VAE",
    "VAE hash",
    "Variation seed",
    "Variation seed strength",
    "Version",
];

/// What [`Img2Img::from_infotext`](super::Img2Img::from_infotext) reads besides.
const READ_FROM_PICTURE: [&str; 10] = [
    "Exactly steps",
    "Extra noise",
    "Inpaint area",
    "Mask blur",
    "Mask mode",
    "Masked area padding",
    "Masked content",
    "Noise multiplier",
    "Resize mode",
    "Sample posterior",
];

/// Whether a parameters text says `True`; it leaves out what is not.
fn flag(text: &Infotext, key: &'static str) -> Result<bool> {
    match text.get(key) {
        None | Some("False") => Ok(false),
        Some("True") => Ok(true),
        Some(other) => bad(key, other, "expected True or False"),
    }
}

/// A number of a parameters text, if it is there.
pub(crate) fn number<T: std::str::FromStr>(
    text: &Infotext,
    key: &'static str,
) -> Result<Option<T>> {
    let Some(value) = text.get(key) else {
        return Ok(None);
    };
    match value.trim().parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => bad(key, value, "expected a number"),
    }
}
