//! The model behind the trainer.

use candle_core::{Device, Tensor};
use lora_core::Adaptable;
use lora_sd15::sampler::Prediction;
use lora_sd15::{Checkpoint, Image, Part, Posterior, StableDiffusion, StepSize, WeightStorage};

use crate::memory::{LargestBatch, ModelMemory};
use crate::samples::SamplePrompt;
use crate::text::{Captions, TextConfig};
use crate::{Error, Result};

/// Where adapters attach.
pub struct Parts<'a> {
    /// The denoiser.
    pub unet: &'a mut dyn Adaptable,
    /// The text encoder.
    pub text_encoder: &'a mut dyn Adaptable,
}

impl std::fmt::Debug for Parts<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Parts")
    }
}

/// A latent diffusion model whose adapters can be trained.
///
/// [`Sd15`] is the one that [`Trainer::new`](crate::Trainer::new) loads; another model
/// implements this trait and goes to [`Trainer::with_model`](crate::Trainer::with_model).
/// Gradients flow through [`predict`](Self::predict) to the adapters attached to
/// [`parts`](Self::parts), and through [`encode_captions`](Self::encode_captions) to those
/// of the text encoder.
pub trait Model: std::fmt::Debug {
    /// Where adapters attach.
    fn parts(&mut self) -> Parts<'_>;

    /// The posterior of pictures `[n, 3, height, width]` with values from -1 to 1. The
    /// latents are 8 times smaller.
    ///
    /// # Errors
    /// When the network fails.
    fn encode_pictures(&self, pixels: &Tensor) -> Result<Posterior>;

    /// What latents are multiplied with before the denoiser sees them.
    fn scaling_factor(&self) -> f64;

    /// What the denoiser is shown for captions: `[n, length, width]`. `fixed` says that
    /// nothing of the text encoder is trained now, so that results may be kept.
    ///
    /// # Errors
    /// When the network fails.
    fn encode_captions(&mut self, captions: &[String], fixed: bool) -> Result<Tensor>;

    /// The denoiser's answer to noisy latents `[n, channels, h, w]` at timesteps `[n]`.
    ///
    /// # Errors
    /// When the network fails.
    fn predict(&self, noisy: &Tensor, timesteps: &Tensor, context: &Tensor) -> Result<Tensor>;

    /// Trades time for memory in [`predict`](Self::predict): activations inside blocks are
    /// computed again in the backward pass. Gradients stay the same.
    ///
    /// # Errors
    /// When the model cannot do that.
    fn set_gradient_checkpointing(&mut self, on: bool) -> Result<()> {
        if on {
            return Err(Error::Config {
                place: "settings".into(),
                what: "gradient_checkpointing: this model does not support it; leave it out".into(),
            });
        }
        Ok(())
    }

    /// What the model will need of memory, with the adapters attached to it now: an estimate,
    /// printed before a run starts. `None`, the default, when it cannot say.
    fn memory(&self, _batch: &LargestBatch) -> Option<ModelMemory> {
        None
    }

    /// Draws a sample picture with the adapters as they are.
    ///
    /// # Errors
    /// When the prompt cannot be drawn; without an implementation, always.
    fn draw(&mut self, prompt: &SamplePrompt) -> Result<Image> {
        Err(Error::Config {
            place: "sample_prompts".into(),
            what: format!(
                "this model cannot draw {:?}: leave sample_prompts out",
                prompt.prompt
            ),
        })
    }
}

/// Stable Diffusion 1.5.
#[derive(Debug)]
pub struct Sd15 {
    sd: StableDiffusion,
    captions: Captions,
    text: TextConfig,
    /// Bytes of all weights, as they are kept and with the UNet's rounded to 16 bits.
    weights: (usize, usize),
}

impl Sd15 {
    /// Loads all three networks, the UNet's frozen weights kept as `storage` says, those of
    /// the others in f32 or as the file has them; everything is computed in f32.
    /// `v_prediction` says how sample pictures are drawn.
    ///
    /// # Errors
    /// As [`Checkpoint::verify`].
    pub fn load(
        checkpoint: &Checkpoint,
        text: TextConfig,
        v_prediction: bool,
        storage: WeightStorage,
        device: &Device,
    ) -> Result<Self> {
        let others = storage_of_others(storage);
        let weights = Self::weight_bytes(checkpoint, storage);
        let mut sd = StableDiffusion::from_checkpoint_stored(checkpoint, storage, others, device)?;
        let layers = sd.text_encoder.config().num_hidden_layers;
        if text.clip_skip > layers {
            return Err(Error::Config {
                place: "settings".into(),
                what: format!(
                    "clip_skip {}: the text encoder has {layers} layers",
                    text.clip_skip
                ),
            });
        }
        sd.prediction = if v_prediction {
            Prediction::V
        } else {
            Prediction::Epsilon
        };
        Ok(Self {
            sd,
            captions: Captions::new(text),
            text,
            weights,
        })
    }

    /// Bytes of all weights in memory, kept as `storage` says and with the UNet's rounded to 16
    /// bits; read from the file's header.
    pub(crate) fn weight_bytes(checkpoint: &Checkpoint, storage: WeightStorage) -> (usize, usize) {
        let bytes = |unet, others| {
            checkpoint.weight_bytes(Part::Unet, unet)
                + checkpoint.weight_bytes(Part::TextEncoder, others)
                + checkpoint.weight_bytes(Part::Vae, others)
        };
        (
            bytes(storage, storage_of_others(storage)),
            bytes(WeightStorage::Bf16, WeightStorage::AsStored),
        )
    }
}

/// How text encoder and VAE are kept beside a UNet kept as `storage` says.
fn storage_of_others(storage: WeightStorage) -> WeightStorage {
    match storage {
        WeightStorage::F32 => WeightStorage::F32,
        _ => WeightStorage::AsStored,
    }
}

impl Model for Sd15 {
    fn parts(&mut self) -> Parts<'_> {
        Parts {
            unet: &mut self.sd.unet,
            text_encoder: &mut self.sd.text_encoder,
        }
    }

    fn encode_pictures(&self, pixels: &Tensor) -> Result<Posterior> {
        Ok(self.sd.vae.encode(pixels)?)
    }

    fn scaling_factor(&self) -> f64 {
        self.sd.vae.scaling_factor()
    }

    fn encode_captions(&mut self, captions: &[String], fixed: bool) -> Result<Tensor> {
        Ok(self
            .captions
            .encode(captions, &self.sd.text_encoder, fixed)?)
    }

    fn predict(&self, noisy: &Tensor, timesteps: &Tensor, context: &Tensor) -> Result<Tensor> {
        Ok(self.sd.unet.forward(noisy, timesteps, context)?)
    }

    fn set_gradient_checkpointing(&mut self, on: bool) -> Result<()> {
        self.sd.unet.set_gradient_checkpointing(on);
        Ok(())
    }

    fn memory(&self, batch: &LargestBatch) -> Option<ModelMemory> {
        let (width, height) = (batch.size.width as usize, batch.size.height as usize);
        let chunks = self.text.chunks;
        let mut step = self.sd.unet.held(StepSize {
            pictures: batch.pictures,
            height: height / 8,
            width: width / 8,
            tokens: 75 * chunks + 2,
        });
        if batch.text_encoder {
            // Captions are encoded one by one.
            for _ in 0..batch.pictures {
                step = step.then(self.sd.text_encoder.held(chunks));
            }
        }
        let (vae, threads) = (&self.sd.vae, rayon::current_num_threads());
        let drawing = batch
            .sample
            .map_or(0, |size| vae.decoding_peak(size.area() as usize, threads));
        const F32: usize = 4;
        Some(ModelMemory {
            weights: self.weights.0,
            narrow_weights: self.weights.1,
            step: F32 * (step.kept + step.backward),
            encoding: F32 * vae.encoding_peak(width * height, threads),
            drawing: F32 * drawing,
        })
    }

    fn draw(&mut self, prompt: &SamplePrompt) -> Result<Image> {
        let request = prompt.request(self.text.clip_skip)?;
        let mut images = self.sd.txt2img(&request, &mut |_| true)?;
        images.pop().ok_or_else(|| Error::Config {
            place: "sample_prompts".into(),
            what: format!("nothing was drawn for {:?}", prompt.prompt),
        })
    }
}
