//! From picture to picture, and inpainting.

use candle_core::{DType, Device, Tensor};

use super::diffuse::{MASK_FILTER, Pass, Progress, Start, img2img_steps};
use super::guidance::LatentMask;
use super::job::{Txt2Img, bad};
use super::{OnStep, StableDiffusion};
use crate::mask::{self, Mask, Rectangle};
use crate::noise::BatchNoise;
use crate::resample::{Filter, ResizeMode, resize_latents};
use crate::rng::NoiseGenerator;
use crate::{Error, Image, Infotext, Result};

/// What lies under the mask at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MaskedContent {
    /// The colours around it, smeared in.
    Fill,
    /// The picture.
    #[default]
    Original,
    /// Noise.
    LatentNoise,
    /// Nothing.
    LatentNothing,
}

impl MaskedContent {
    /// Names as the command line spells them.
    pub const ALL: [(&'static str, MaskedContent); 4] = [
        ("fill", MaskedContent::Fill),
        ("original", MaskedContent::Original),
        ("latent-noise", MaskedContent::LatentNoise),
        ("latent-nothing", MaskedContent::LatentNothing),
    ];

    /// By name.
    ///
    /// # Errors
    /// [`Error::UnknownName`].
    pub fn from_name(name: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, c)| *c).ok_or_else(|| Error::UnknownName {
            what: "masked content",
            name: name.to_string(),
            known: Self::ALL.map(|(n, _)| n).join(", "),
        })
    }
}

/// Where and how to paint anew.
#[derive(Debug, Clone, PartialEq)]
pub struct Inpaint {
    /// White is painted anew, black kept; of the picture's size.
    pub mask: Image,
    /// Paints where the mask is black instead.
    pub invert: bool,
    /// Radius in pixels by which the mask's edge is softened.
    pub blur: f64,
    /// What lies under the mask at the start.
    pub content: MaskedContent,
    /// Paints the masked area alone at the job's size, with this many pixels around it.
    pub only_masked: Option<usize>,
}

impl Inpaint {
    /// The web UI's defaults for a mask.
    pub fn new(mask: Image) -> Self {
        Self {
            mask,
            invert: false,
            blur: 4.0,
            content: MaskedContent::default(),
            only_masked: None,
        }
    }
}

/// A job that starts from a picture.
///
/// ```no_run
/// use candle_core::{DType, Device};
/// use lora_sd15::{Image, Img2Img, StableDiffusion, Txt2Img};
/// let mut sd = StableDiffusion::load("v1-5-pruned-emaonly.safetensors", DType::F32, &Device::Cpu)?;
/// let job = Txt2Img { prompt: "oil painting".into(), ..Default::default() };
/// let request = Img2Img::new(job, Image::open_png("photo.png")?);
/// sd.img2img(&request, &mut |_| true)?[0].save_png("painting.png", None)?;
/// # Ok::<(), lora_sd15::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Img2Img {
    /// Prompt, size, steps, sampler, seed.
    pub job: Txt2Img,
    /// The picture.
    pub picture: Image,
    /// How much is drawn anew: 0 nothing, 1 everything.
    pub strength: f64,
    /// How the picture is brought to the job's size.
    pub resize: ResizeMode,
    /// Makes all steps of the job instead of a share `strength` of them.
    pub exactly_steps: bool,
    /// Factor on the noise.
    pub noise_multiplier: f64,
    /// Noise added beyond that of the starting level.
    pub extra_noise: f64,
    /// Draws the latents from what the encoder answers instead of taking their mean.
    pub sample_posterior: bool,
    /// Paints a part only.
    pub inpaint: Option<Inpaint>,
}

impl Img2Img {
    /// With the web UI's defaults.
    pub fn new(job: Txt2Img, picture: Image) -> Self {
        Self {
            job,
            picture,
            strength: 0.75,
            resize: ResizeMode::default(),
            exactly_steps: false,
            noise_multiplier: 1.0,
            extra_noise: 0.0,
            sample_posterior: false,
            inpaint: None,
        }
    }

    /// Checks the numbers and the sizes of the pictures.
    ///
    /// # Errors
    /// [`Error::BadValue`], [`Error::BadSize`] or [`Error::Picture`].
    pub fn validate(&self) -> Result<()> {
        self.job.validate()?;
        if self.job.hires.is_some() {
            return bad("hires", "given", "a second pass belongs to text to picture");
        }
        if !(0.0..=1.0).contains(&self.strength) {
            return bad("strength", self.strength, "expected 0 to 1");
        }
        if self.exactly_steps && self.strength < 0.001 {
            return bad(
                "strength",
                self.strength,
                "exactly_steps needs at least 0.001",
            );
        }
        for (name, value) in [
            ("noise_multiplier", self.noise_multiplier),
            ("extra_noise", self.extra_noise),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return bad(name, value, "expected 0 or more");
            }
        }
        check_picture(&self.picture, "the picture")?;
        let Some(inpaint) = &self.inpaint else {
            return Ok(());
        };
        check_picture(&inpaint.mask, "the mask")?;
        let (mask, picture) = (&inpaint.mask, &self.picture);
        if (mask.width, mask.height) != (picture.width, picture.height) {
            let what = format!(
                "the mask is {}x{}, the picture {}x{}: they must have the same size",
                mask.width, mask.height, picture.width, picture.height
            );
            return Err(Error::Picture { what });
        }
        if !(inpaint.blur.is_finite() && (0.0..=512.0).contains(&inpaint.blur)) {
            return bad("mask blur", inpaint.blur, "expected 0 to 512");
        }
        // The web UI's own latent mode fails here: picture and mask differ in size then.
        let drawn = (self.job.width, self.job.height);
        let whole = inpaint.only_masked.is_none() && (picture.width, picture.height) != drawn;
        if self.resize == ResizeMode::Latent && whole {
            return bad(
                "resize",
                "latent",
                "under a mask it needs a picture of the size that is drawn, or only_masked; else stretch, crop or fill",
            );
        }
        Ok(())
    }

    /// The web UI's parameters that come on top of the job's.
    pub fn parameters(&self) -> Vec<(&'static str, String)> {
        let mut list = vec![("Denoising strength", self.strength.to_string())];
        if let Some(inpaint) = &self.inpaint {
            list.push(("Mask blur", inpaint.blur.to_string()));
            if inpaint.invert {
                list.push(("Mask mode", "Inpaint not masked".into()));
            }
            if let Some(padding) = inpaint.only_masked {
                list.push(("Inpaint area", "Only masked".into()));
                list.push(("Masked area padding", padding.to_string()));
            }
            let content = MaskedContent::ALL
                .iter()
                .find(|(_, c)| *c == inpaint.content);
            if let Some((name, _)) = content.filter(|(_, c)| *c != MaskedContent::Original) {
                list.push(("Masked content", (*name).to_string()));
            }
        }
        if self.resize != ResizeMode::default() {
            list.push(("Resize mode", self.resize.name().into()));
        }
        for (key, on) in [
            ("Exactly steps", self.exactly_steps),
            ("Sample posterior", self.sample_posterior),
        ] {
            if on {
                list.push((key, "True".into()));
            }
        }
        if self.noise_multiplier != 1.0 {
            list.push(("Noise multiplier", self.noise_multiplier.to_string()));
        }
        if self.extra_noise != 0.0 {
            list.push(("Extra noise", self.extra_noise.to_string()));
        }
        list
    }

    /// The job that a picture's `parameters` text describes, which was drawn from `picture`
    /// under `mask`. Resize mode and the like are in our texts, not in the web UI's.
    ///
    /// # Errors
    /// As [`Txt2Img::from_infotext`]; [`Error::Picture`] when the text is none of drawing
    /// from a picture, or does not go with `mask`.
    ///
    /// ```
    /// use lora_sd15::{Image, Img2Img, Infotext, Txt2Img};
    /// let job = Txt2Img { prompt: "zoe".into(), seed: 7, ..Default::default() };
    /// let picture = Image::plain(64, 64, [128; 3]);
    /// let request = Img2Img { strength: 0.4, ..Img2Img::new(job, picture.clone()) };
    /// let text = Infotext::parse(&request.job.infotext(0, &[], &request.parameters()));
    /// assert_eq!(Img2Img::from_infotext(&text, picture, None)?, request);
    /// # Ok::<(), lora_sd15::Error>(())
    /// ```
    pub fn from_infotext(text: &Infotext, picture: Image, mask: Option<Image>) -> Result<Self> {
        let wrong = |what: &str| Error::Picture { what: what.into() };
        let mut text = text.clone();
        let mut take = |key: &'static str| text.parameters.remove(key).map(|value| (key, value));
        let strength = take("Denoising strength")
            .ok_or_else(|| wrong("the text is of a picture that was not drawn from a picture"))?;
        let (blur, mode) = (take("Mask blur"), take("Mask mode"));
        let (area, padding) = (take("Inpaint area"), take("Masked area padding"));
        let content = take("Masked content");
        let resize = take("Resize mode");
        let (exactly, posterior) = (take("Exactly steps"), take("Sample posterior"));
        let (multiplier, extra) = (take("Noise multiplier"), take("Extra noise"));
        let mut request = Self::new(Txt2Img::from_infotext(&text)?, picture);
        request.strength = parsed(strength)?;
        request.exactly_steps = exactly.is_some();
        request.sample_posterior = posterior.is_some();
        if let Some((_, name)) = resize {
            request.resize = ResizeMode::from_name(&name)?;
        }
        if let Some(given) = multiplier {
            request.noise_multiplier = parsed(given)?;
        }
        if let Some(given) = extra {
            request.extra_noise = parsed(given)?;
        }
        request.inpaint = match (blur, mask) {
            (None, None) => None,
            (Some(_), None) => return Err(wrong("the picture was painted under a mask: give it")),
            (None, Some(_)) => return Err(wrong("the picture was not painted under a mask")),
            (Some(blur), Some(mask)) => Some(Inpaint {
                blur: parsed(blur)?,
                invert: mode.is_some_and(|(_, mode)| mode == "Inpaint not masked"),
                content: match content {
                    Some((_, name)) => MaskedContent::from_name(&name.replace(' ', "-"))?,
                    None => MaskedContent::default(),
                },
                only_masked: match area {
                    Some((_, area)) if area == "Only masked" => {
                        Some(padding.map_or(Ok(32), parsed)?)
                    }
                    _ => None,
                },
                ..Inpaint::new(mask)
            }),
        };
        request.validate()?;
        Ok(request)
    }

    pub(super) fn draw(
        &self,
        sd: &StableDiffusion,
        prompt: &str,
        on_step: &mut OnStep<'_>,
    ) -> Result<Vec<Image>> {
        let (width, height) = (self.job.width, self.job.height);
        let Some(inpaint) = &self.inpaint else {
            let picture = self.picture.fit(width, height, self.resize);
            let latents = self.latents(sd, &picture)?;
            let extra = sd.blank_conditioning(self.job.batch_size, (height / 8, width / 8))?;
            let latents = self.sample(sd, prompt, latents, None, extra, on_step)?;
            return sd.decode(&latents);
        };
        let mut mask = Mask::from_image(&inpaint.mask);
        if inpaint.invert {
            mask.invert();
        }
        mask.blur(inpaint.blur);
        let Some(padding) = inpaint.only_masked else {
            let picture = self.picture.fit(width, height, self.resize);
            let mask = Mask::from_image(&mask.to_image().fit(width, height, self.resize));
            let drawn = self.paint(sd, prompt, inpaint, &picture, &mask, on_step)?;
            return Ok(drawn.iter().map(|d| mask.lay_over(&picture, d)).collect());
        };
        let Some(area) = mask.area(padding, width, height) else {
            return Ok(vec![self.picture.clone(); self.job.batch_size]);
        };
        let Rectangle {
            x,
            y,
            width: w,
            height: h,
        } = area;
        let part = self
            .picture
            .crop(x, y, w, h)
            .resize(width, height, Filter::Lanczos);
        let part_mask = mask
            .to_image()
            .crop(x, y, w, h)
            .resize(width, height, Filter::Lanczos);
        let part_mask = Mask::from_image(&part_mask);
        let drawn = self.paint(sd, prompt, inpaint, &part, &part_mask, on_step)?;
        let whole = drawn.iter().map(|drawn| {
            let mut painted = self.picture.clone();
            painted.paste(&drawn.resize(w, h, Filter::Lanczos), x, y);
            mask.lay_over(&self.picture, &painted)
        });
        Ok(whole.collect())
    }

    /// Paints under a mask of the job's size.
    fn paint(
        &self,
        sd: &StableDiffusion,
        prompt: &str,
        inpaint: &Inpaint,
        picture: &Image,
        mask: &Mask,
        on_step: &mut OnStep<'_>,
    ) -> Result<Vec<Image>> {
        let (h, w) = (self.job.height / 8, self.job.width / 8);
        let device = sd.device();
        let repaint = mask.to_latent(h, w, MASK_FILTER, device)?;
        let source = match inpaint.content {
            MaskedContent::Fill => mask::fill(picture, mask),
            _ => picture.clone(),
        };
        let mut latents = self.latents(sd, &source)?;
        let keep = repaint.affine(-1.0, 1.0)?;
        match inpaint.content {
            MaskedContent::Fill | MaskedContent::Original => {}
            MaskedContent::LatentNothing => latents = latents.broadcast_mul(&keep)?,
            MaskedContent::LatentNoise => {
                let mut noise = BatchNoise::new(self.job.noise_request(h, w));
                let noise = noise.next(device)?.broadcast_mul(&repaint)?;
                latents = (latents.broadcast_mul(&keep)? + noise)?;
            }
        }
        let extra = if sd.unet.in_channels() == 9 {
            let hard = mask.rounded();
            let (high, wide) = (picture.height, picture.width);
            let visible = hard.to_latent(high, wide, Filter::Nearest { exact: false }, device)?;
            let visible = visible.affine(-1.0, 1.0)?;
            // What is hidden becomes 0: mid-grey.
            let pixels = picture
                .to_tensor(device)?
                .unsqueeze(0)?
                .broadcast_mul(&visible)?;
            let hidden = sd.encode_pixels(&pixels)?;
            let channel = hard.to_latent(h, w, Filter::Nearest { exact: false }, device)?;
            let both = Tensor::cat(&[&channel, &hidden], 1)?;
            Some(both.repeat((self.job.batch_size, 1, 1, 1))?)
        } else {
            None
        };
        let mask = LatentMask {
            kept: latents.clone(),
            repaint,
        };
        let latents = self.sample(sd, prompt, latents, Some(&mask), extra, on_step)?;
        sd.decode(&latents)
    }

    /// The picture's latents, one per picture of the batch.
    fn latents(&self, sd: &StableDiffusion, picture: &Image) -> Result<Tensor> {
        let (h, w) = (self.job.height / 8, self.job.width / 8);
        let mut picture = picture.clone();
        if self.resize == ResizeMode::Latent {
            let (wide, high) = (picture.width / 8 * 8, picture.height / 8 * 8);
            if wide < 64 || high < 64 {
                return Err(Error::Picture {
                    what: "the picture is too small for the resize mode latent: it needs 64 pixels on each side; use another mode".into(),
                });
            }
            picture = picture.crop(0, 0, wide, high);
        }
        let mut all = Vec::new();
        for i in 0..self.job.batch_size {
            let latents = if self.sample_posterior {
                let posterior = sd
                    .vae
                    .encode(&picture.to_tensor(sd.device())?.unsqueeze(0)?)?;
                // A stream of its own, so that it is not the noise of the first step.
                let seed = self.job.seeds(i).0.wrapping_add(0x9E37_79B9_7F4A_7C15);
                let count = posterior.mean.elem_count();
                let noise = NoiseGenerator::new(self.job.noise, seed).normal(count);
                let noise = Tensor::from_vec(noise, posterior.mean.dims(), sd.device())?;
                posterior.sample(&noise, sd.vae.scaling_factor())?
            } else if let Some(first) = all.first() {
                Tensor::clone(first)
            } else {
                sd.encode(&picture)?
            };
            all.push(latents);
        }
        let latents = Tensor::cat(&all, 0)?;
        if latents.dims4()?.2 == h && latents.dims4()?.3 == w {
            return Ok(latents);
        }
        resize_latents(&latents, h, w, Filter::Bilinear { antialias: false })
    }

    fn sample(
        &self,
        sd: &StableDiffusion,
        prompt: &str,
        latents: Tensor,
        mask: Option<&LatentMask>,
        extra: Option<Tensor>,
        on_step: &mut OnStep<'_>,
    ) -> Result<Tensor> {
        let job = &self.job;
        let size = (job.height / 8, job.width / 8);
        let steering = sd.encoding().steering(job, prompt, job.steps, None)?;
        let mut noise = BatchNoise::new(job.noise_request(size.0, size.1));
        let mut progress = Progress {
            on_step,
            before: 0,
            after: 0,
            cancelled: false,
        };
        let pass = Pass {
            job,
            steering: &steering,
            steps: job.steps,
            noise: &mut noise,
            size,
            start: Some(Start {
                latents,
                steps: img2img_steps(job.steps, self.strength, self.exactly_steps),
                extra_noise: self.extra_noise,
                noise_multiplier: self.noise_multiplier,
            }),
            mask,
            extra,
        };
        sd.run_pass(pass, &mut progress)
    }
}

fn parsed<T: std::str::FromStr>((key, value): (&'static str, String)) -> Result<T> {
    let number = value.trim().parse().ok();
    number.map_or_else(|| bad(key, value, "expected a number"), Ok)
}

fn check_picture(picture: &Image, name: &str) -> Result<()> {
    let Image { width, height, rgb } = picture;
    if *width == 0 || *height == 0 || rgb.len() != 3 * width * height {
        let what = format!(
            "{name} has {} bytes, which is not {width}x{height} pixels of 3 bytes",
            rgb.len()
        );
        return Err(Error::Picture { what });
    }
    Ok(())
}

impl Mask {
    /// 0 or 1 per latent, `[1, 1, h, w]`.
    fn to_latent(&self, h: usize, w: usize, filter: Filter, device: &Device) -> Result<Tensor> {
        let small = self.resized(h, w, filter);
        let values: Vec<f32> = small.iter().map(|v| v.round()).collect();
        Ok(Tensor::from_vec(values, (1, 1, h, w), device)?.to_dtype(DType::F32)?)
    }
}
