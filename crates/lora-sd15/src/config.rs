//! Dimensions of the three networks. The file's tensors tell most of them; a JSON
//! beside it tells the rest (numbers of heads and groups); the default is SD1.5.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Dimensions of all three networks.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelConfig {
    /// The denoiser.
    pub unet: UnetConfig,
    /// The image encoder and decoder.
    pub vae: VaeConfig,
    /// The text encoder.
    pub text: TextConfig,
}

/// Dimensions of the UNet. Field names follow diffusers' `unet/config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UnetConfig {
    /// Channels of the input: 4, or 9 for inpainting models.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Channels per level; each further level halves the resolution.
    pub block_out_channels: Vec<usize>,
    /// Which levels have transformers.
    pub attention: Vec<bool>,
    /// ResNet blocks per level on the way down (one more on the way up).
    pub layers_per_block: usize,
    /// Attention heads. diffusers calls this `attention_head_dim` for SD1.x.
    #[serde(alias = "attention_head_dim")]
    pub num_heads: usize,
    /// Width of the text encoder's states.
    pub cross_attention_dim: usize,
    /// Groups of all group norms.
    pub norm_num_groups: usize,
}

impl Default for UnetConfig {
    fn default() -> Self {
        Self {
            in_channels: 4,
            out_channels: 4,
            block_out_channels: vec![320, 640, 1280, 1280],
            attention: vec![true, true, true, false],
            layers_per_block: 2,
            num_heads: 8,
            cross_attention_dim: 768,
            norm_num_groups: 32,
        }
    }
}

/// Dimensions of the VAE. Field names follow diffusers' `vae/config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    /// Channels of pictures.
    pub in_channels: usize,
    /// Channels of decoded pictures.
    pub out_channels: usize,
    /// Channels per level.
    pub block_out_channels: Vec<usize>,
    /// ResNet blocks per level of the encoder (one more in the decoder).
    pub layers_per_block: usize,
    /// Channels of latents.
    pub latent_channels: usize,
    /// Groups of all group norms.
    pub norm_num_groups: usize,
    /// Latents are multiplied by this before the UNet sees them.
    pub scaling_factor: f64,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            latent_channels: 4,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
        }
    }
}

/// Dimensions of the text encoder. Field names follow transformers' CLIP config.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    /// Number of token ids. Smaller than 49408 only in miniature models, see
    /// [`TextConfig::fold`].
    pub vocab_size: usize,
    /// Width of the states.
    pub hidden_size: usize,
    /// Width inside the MLPs.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Positions per chunk: 77.
    pub max_position_embeddings: usize,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            vocab_size: crate::tokenizer::VOCAB_SIZE,
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            max_position_embeddings: 77,
        }
    }
}

impl TextConfig {
    /// Maps a CLIP token id into a miniature vocabulary: start and end markers become
    /// the last two ids, all others are taken modulo the rest. The identity for the
    /// real vocabulary.
    pub fn fold(&self, id: u32) -> u32 {
        let full = crate::tokenizer::VOCAB_SIZE as u32;
        let size = self.vocab_size as u32;
        match id {
            id if size >= full => id,
            crate::tokenizer::START => size.saturating_sub(2),
            crate::tokenizer::END => size.saturating_sub(1),
            id => id % size.saturating_sub(2).max(1),
        }
    }
}

impl ModelConfig {
    /// Checks that the numbers can describe a model.
    ///
    /// # Errors
    /// [`Error::BadConfig`] naming the field.
    pub fn validate(&self, place: &str) -> Result<()> {
        let check = |ok: bool, field: &str, what: String| {
            if ok {
                Ok(())
            } else {
                Err(Error::BadConfig {
                    place: format!("{place}: {field}"),
                    what,
                })
            }
        };
        let (unet, vae, text) = (&self.unet, &self.vae, &self.text);
        for (name, channels, groups) in [
            ("unet", &unet.block_out_channels, unet.norm_num_groups),
            ("vae", &vae.block_out_channels, vae.norm_num_groups),
        ] {
            let field = format!("{name}.block_out_channels");
            check(
                channels.len() == 4,
                &field,
                format!("expected 4 levels, got {channels:?}"),
            )?;
            let fits = groups > 0 && channels.iter().all(|c| *c > 0 && c % groups == 0);
            check(
                fits,
                &field,
                format!("{channels:?} cannot be split into norm_num_groups = {groups}"),
            )?;
        }
        check(
            unet.attention.len() == 4 && unet.layers_per_block == 2 && vae.layers_per_block == 2,
            "layout",
            "expected 4 attention flags and layers_per_block = 2".into(),
        )?;
        let heads = unet.num_heads;
        let split = heads > 0 && unet.block_out_channels.iter().all(|c| c % heads == 0);
        check(
            split,
            "unet.num_heads",
            format!("{heads} heads do not divide {:?}", unet.block_out_channels),
        )?;
        let (width, heads) = (text.hidden_size, text.num_attention_heads);
        check(
            heads > 0 && width % heads == 0,
            "text.num_attention_heads",
            format!("{heads} heads do not divide {width}"),
        )?;
        check(
            text.vocab_size > 2,
            "text.vocab_size",
            format!("{} is too small", text.vocab_size),
        )?;
        check(
            text.hidden_size == unet.cross_attention_dim,
            "unet.cross_attention_dim",
            format!(
                "{} differs from the text encoder's width {width}",
                unet.cross_attention_dim
            ),
        )
    }

    /// Reads a JSON with the objects `unet`, `vae`, `text`.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        read_json(path)
    }
}

/// Reads any JSON file into a configuration.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|e| Error::BadConfig {
        place: path.display().to_string(),
        what: e.to_string(),
    })
}
