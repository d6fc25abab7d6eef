//! From a job to pictures.

mod adapters;
mod conditioning;
mod diffuse;
mod files;
mod guidance;
mod hires;
mod img2img;
mod job;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use lora_core::AdapterSet;

use crate::prompt::{AdapterTag, Embeddings, extract_tags};
use crate::sampler::Prediction;
use crate::{
    Checkpoint, Error, Image, Part, Result, TextEncoder, Tokenizer, UNet, UpscaleNetwork, Vae,
    WeightStorage,
};

pub use adapters::AdapterMode;
pub use diffuse::img2img_steps;
pub use files::{find_adapter, find_model, find_upscaler};
pub use hires::{Hires, Upscaler};
pub use img2img::{Img2Img, Inpaint, MaskedContent};
pub use job::{Emphasis, Txt2Img, Variation};

use adapters::Adapters;
use conditioning::Encoding;
use hires::Networks;

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

/// Called after every step; `false` cancels.
pub type OnStep<'a> = dyn FnMut(Step<'_>) -> bool + 'a;

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
    /// Learned words that prompts may use.
    pub embeddings: Embeddings,
    /// What the UNet answers. Weights do not tell, except by a tensor named `v_pred`.
    pub prediction: Prediction,
    /// Whether the noise schedule is rescaled to end in pure noise, as some v-prediction
    /// models are trained.
    pub zero_terminal_snr: bool,
    /// Pictures whose latents have a side longer than this are encoded and decoded in
    /// tiles of that size, which saves memory and changes them slightly. 64 is 512 pixels.
    pub vae_tile: Option<usize>,
    adapters: Adapters,
    upscalers: Networks,
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
    /// As [`Checkpoint::verify`]; [`Error::NotSd15`] for UNets with other inputs than
    /// latents (4 channels) or those of inpainting (9).
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
    /// As [`from_checkpoint`](Self::from_checkpoint).
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
        let channels = config.unet.in_channels;
        if ![4, 9].contains(&channels) {
            return Err(Error::NotSd15 {
                path: checkpoint.path().to_path_buf(),
                what: format!(
                    "its UNet takes {channels} channels; text to picture models take 4, inpainting models 9 (8 is instruct-pix2pix, which is not supported)"
                ),
            });
        }
        let v = checkpoint.ignored().iter().any(|key| key == "v_pred");
        Ok(Self {
            unet: UNet::new(&config.unet, unet)?,
            text_encoder: TextEncoder::new(&config.text, text)?,
            vae: Vae::new(&config.vae, vae)?,
            tokenizer: Tokenizer::new(),
            embeddings: Embeddings::default(),
            prediction: if v {
                Prediction::V
            } else {
                Prediction::Epsilon
            },
            zero_terminal_snr: false,
            vae_tile: None,
            adapters: Adapters::default(),
            upscalers: Networks::new(),
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
        self.adapters.add(name.into(), adapter);
    }

    /// Reads an adapter file under a name, with the embeddings bundled in it. A file whose
    /// content was read before is not read again. Returns a message for each layer and key
    /// that cannot be read and is left out.
    ///
    /// # Errors
    /// When nothing of the file can be used, as [`AdapterSet::load_with`].
    pub fn load_adapter(&mut self, name: &str, path: impl AsRef<Path>) -> Result<Vec<String>> {
        let set = self.adapters.load(name, path.as_ref(), &self.device)?;
        self.embeddings.add_bundled(&self.tokenizer, set)?;
        Ok(set.left_out().to_vec())
    }

    /// Makes a network available to hires fix as
    /// [`Upscaler::Network`] of this name; one of that name before is replaced.
    pub fn add_upscaler(&mut self, name: impl Into<String>, network: UpscaleNetwork) {
        self.upscalers.insert(name.into(), network);
    }

    /// Whether a network of this name was added.
    pub fn has_upscaler(&self, name: &str) -> bool {
        self.upscalers.contains_key(name)
    }

    /// Reads an embedding (textual inversion) file; its name is the file's stem.
    ///
    /// # Errors
    /// As [`Embeddings::load`].
    pub fn load_embedding(&mut self, path: impl AsRef<Path>) -> Result<String> {
        self.embeddings
            .load(&self.tokenizer, path.as_ref(), &self.device)
    }

    /// Whether an adapter of this name was added.
    pub fn has_adapter(&self, name: &str) -> bool {
        self.adapters.get(name).is_some()
    }

    /// The hash of an adapter read by [`load_adapter`](Self::load_adapter), as the web UI
    /// shows it.
    pub fn adapter_hash(&self, name: &str) -> Option<&str> {
        self.adapters.hash(name).and_then(|hash| hash.get(..12))
    }

    /// How adapters act from the next picture on.
    pub fn set_adapter_mode(&mut self, mode: AdapterMode) {
        self.adapters.mode = mode;
    }

    /// Puts exactly these adapters on the networks, each with its multipliers; all others
    /// are taken off. Without adapters the weights are what they were, to the bit.
    ///
    /// # Errors
    /// [`Error::UnknownName`] for a name that was not added; [`Error::Prompt`] for
    /// arguments that are not understood; [`lora_core::Error`] when an adapter does not fit
    /// the model.
    pub fn use_adapters(&mut self, tags: &[AdapterTag]) -> Result<()> {
        self.adapters
            .apply(tags, &mut self.unet, &mut self.text_encoder)
    }

    fn encoding(&self) -> Encoding<'_> {
        Encoding {
            tokenizer: &self.tokenizer,
            encoder: &self.text_encoder,
            embeddings: &self.embeddings,
            device: &self.device,
            dtype: self.dtype,
        }
    }

    /// Encodes a prompt without tags, `AND` and changes over the steps:
    /// `[1, 77 * chunks, width]`, attention weights applied, the mean restored per chunk.
    ///
    /// # Errors
    /// [`Error::BadValue`] for a clip skip that the encoder has no layers for.
    pub fn encode_prompt(&self, prompt: &str, clip_skip: usize) -> Result<Tensor> {
        self.encoding()
            .encode(&[prompt], clip_skip, Emphasis::Original, 20)
    }

    /// Takes the tags out of a prompt and puts their adapters on.
    fn prepare_prompt(&mut self, prompt: &str) -> Result<String> {
        let (text, tags, others) = extract_tags(prompt);
        if let Some(tag) = others.first() {
            return Err(Error::Prompt {
                prompt: prompt.to_string(),
                what: format!("{tag} is not supported; known are <lora:...> and <lyco:...>"),
            });
        }
        self.use_adapters(&tags)?;
        Ok(text)
    }

    /// Draws one batch. `on_step` is called after every step; returning `false`
    /// cancels, and the pictures are decoded as they are then.
    ///
    /// # Errors
    /// For bad sizes, unknown adapters, unsupported prompts, or when the model
    /// produces NaN.
    pub fn txt2img(&mut self, request: &Txt2Img, on_step: &mut OnStep<'_>) -> Result<Vec<Image>> {
        request.validate()?;
        let prompt = self.prepare_prompt(&request.prompt)?;
        let latents = self.sample(request, &prompt, on_step)?;
        self.decode(&latents)
    }

    /// Draws one batch from a picture, whole or where a mask says.
    ///
    /// # Errors
    /// As [`txt2img`](Self::txt2img), and for pictures and masks that do not suit.
    pub fn img2img(&mut self, request: &Img2Img, on_step: &mut OnStep<'_>) -> Result<Vec<Image>> {
        request.validate()?;
        let prompt = self.prepare_prompt(&request.job.prompt)?;
        request.draw(self, &prompt, on_step)
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
                let one = latents.narrow(0, i, 1)?.contiguous()?;
                let picture = match self.vae_tile {
                    Some(tile) => self.vae.decode_tiled(&one, tile)?,
                    None => self.vae.decode(&one)?,
                };
                Image::from_tensor(&picture.squeeze(0)?)
            })
            .collect()
    }

    /// Scaled latents `[1, 4, h/8, w/8]` of a picture: the mean of what the encoder
    /// answers.
    ///
    /// # Errors
    /// [`Error::BadSize`] when a side is not a multiple of 8.
    pub fn encode(&self, picture: &Image) -> Result<Tensor> {
        if !picture.width.is_multiple_of(8)
            || !picture.height.is_multiple_of(8)
            || picture.width * picture.height == 0
        {
            return Err(Error::BadSize {
                width: picture.width,
                height: picture.height,
            });
        }
        self.encode_pixels(&picture.to_tensor(&self.device)?.unsqueeze(0)?)
    }

    fn encode_pixels(&self, pixels: &Tensor) -> Result<Tensor> {
        let posterior = match self.vae_tile {
            Some(tile) => self.vae.encode_tiled(pixels, tile)?,
            None => self.vae.encode(pixels)?,
        };
        Ok(posterior.mode(self.vae.scaling_factor())?)
    }
}
