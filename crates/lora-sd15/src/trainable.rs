//! Models whose every weight can be trained.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use lora_core::format::{write_atomically, write_tensors};

use crate::checkpoint::{Checkpoint, diffusers_to_ldm, expected_shapes};
use crate::{Error, ModelConfig, NoiseGenerator, NoiseSource, Part, Result};

/// The weights of a model as variables, for training from scratch or in full.
///
/// In a [`new`](Self::new) one linear layers and convolutions begin as PyTorch's do (spread `1 / sqrt(inputs)`), norms as
/// the identity, biases at zero; the last layer of each of the UNet's residual branches
/// begins at zero, as in the original Stable Diffusion. Weights are a function of (config, seed).
///
/// ```
/// use candle_core::Device;
/// use lora_sd15::{TrainableModel, ModelConfig, Part, TextConfig, TextEncoder, UnetConfig};
/// let config = ModelConfig {
///     unet: UnetConfig { cross_attention_dim: 8, ..Default::default() },
///     text: TextConfig {
///         vocab_size: 100, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 1,
///         num_attention_heads: 2, ..Default::default()
///     },
///     ..Default::default()
/// };
/// let model = TrainableModel::new(&config, &[Part::TextEncoder], 1, &Device::Cpu)?;
/// let encoder = TextEncoder::new(&config.text, model.var_builder(Part::TextEncoder))?;
/// // `encoder` computes with `model.parameters(..)`, so an optimizer over these trains it.
/// assert_eq!(model.parameters(Part::TextEncoder).len(), 20);
/// # Ok::<(), lora_sd15::Error>(())
/// ```
#[derive(Debug)]
pub struct TrainableModel {
    config: ModelConfig,
    device: Device,
    weights: BTreeMap<Part, BTreeMap<String, Var>>,
}

impl TrainableModel {
    /// Untrained weights for the given parts.
    ///
    /// # Errors
    /// [`Error::BadConfig`] when the numbers describe no model.
    pub fn new(config: &ModelConfig, parts: &[Part], seed: u64, device: &Device) -> Result<Self> {
        config.validate("a new model")?;
        let mut weights = BTreeMap::new();
        for (number, &part) in parts.iter().enumerate() {
            let mut noise =
                NoiseGenerator::new(NoiseSource::Philox, seed ^ ((number as u64) << 32));
            let vars = expected_shapes(config, part)?
                .into_iter()
                .map(|(name, shape)| {
                    let values = initial(part, &name, &shape, &mut noise);
                    let tensor = Tensor::from_vec(values, shape, device)?;
                    Ok((name, Var::from_tensor(&tensor)?))
                })
                .collect::<Result<_>>()?;
            weights.insert(part, vars);
        }
        Ok(Self {
            config: config.clone(),
            device: device.clone(),
            weights,
        })
    }

    /// The weights of a checkpoint's parts, in f32.
    ///
    /// # Errors
    /// As [`Checkpoint::var_builder`].
    pub fn from_checkpoint(
        checkpoint: &Checkpoint,
        parts: &[Part],
        device: &Device,
    ) -> Result<Self> {
        let mut weights = BTreeMap::new();
        for &part in parts {
            let vb = checkpoint.var_builder(part, DType::F32, device)?;
            let vars = expected_shapes(checkpoint.config(), part)?
                .into_iter()
                .map(|(name, shape)| {
                    let var = Var::from_tensor(&vb.get(shape, &name)?)?;
                    Ok((name, var))
                })
                .collect::<Result<_>>()?;
            weights.insert(part, vars);
        }
        Ok(Self {
            config: checkpoint.config().clone(),
            device: device.clone(),
            weights,
        })
    }

    /// The variables of one part under diffusers names, to build the network from.
    pub fn var_builder(&self, part: Part) -> VarBuilder<'static> {
        let tensors = self
            .parameters(part)
            .into_iter()
            .map(|(name, var)| (name, var.as_tensor().clone()))
            .collect();
        VarBuilder::from_tensors(tensors, DType::F32, &self.device)
    }

    /// The variables of one part by name, in the names' order: an optimizer's parameters.
    pub fn parameters(&self, part: Part) -> Vec<(String, Var)> {
        self.weights
            .get(&part)
            .into_iter()
            .flatten()
            .map(|(name, var)| (name.clone(), var.clone()))
            .collect()
    }

    /// Writes a single-file checkpoint in `dtype` with the layout of
    /// `v1-5-pruned-emaonly.safetensors`, and its dimensions beside it as `.json`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>, dtype: DType) -> Result<()> {
        let path = path.as_ref();
        let mut tensors = BTreeMap::new();
        for (&part, vars) in &self.weights {
            for (name, var) in vars {
                let tensor = var.as_detached_tensor().to_dtype(dtype)?;
                tensors.insert(diffusers_to_ldm(part, name), tensor);
            }
        }
        write_tensors(path, &tensors, &BTreeMap::new())?;
        let json = path.with_extension("json");
        let text = serde_json::to_string_pretty(&self.config).map_err(|e| Error::BadConfig {
            place: json.display().to_string(),
            what: e.to_string(),
        })?;
        Ok(write_atomically(&json, |out| writeln!(out, "{text}"))?)
    }
}

/// Initial values of one tensor.
fn initial(part: Part, name: &str, shape: &[usize], noise: &mut NoiseGenerator) -> Vec<f32> {
    let count = shape.iter().product();
    let ends_a_branch = ["conv2.weight", "proj_out.weight"]
        .iter()
        .any(|end| name.ends_with(end))
        || name == "conv_out.weight";
    if name.ends_with("bias") || (part == Part::Unet && ends_a_branch) {
        return vec![0.0; count];
    }
    if shape.len() == 1 {
        return vec![1.0; count];
    }
    let spread = if name.contains("embedding.weight") {
        0.02
    } else {
        let inputs: usize = shape.iter().skip(1).product();
        // PyTorch draws evenly from +-1/sqrt(inputs); a normal distribution as wide as that.
        (1.0 / (3.0 * inputs as f32)).sqrt()
    };
    let mut values = noise.normal(count);
    for value in &mut values {
        *value *= spread;
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TextConfig, UnetConfig, VaeConfig};

    #[test]
    fn a_saved_model_opens_as_an_ordinary_checkpoint() {
        let config = ModelConfig {
            unet: UnetConfig {
                block_out_channels: vec![8, 8, 16, 16],
                norm_num_groups: 4,
                num_heads: 2,
                cross_attention_dim: 8,
                ..UnetConfig::default()
            },
            vae: VaeConfig {
                block_out_channels: vec![4, 4, 8, 8],
                norm_num_groups: 2,
                ..VaeConfig::default()
            },
            text: TextConfig {
                vocab_size: 50,
                hidden_size: 8,
                intermediate_size: 16,
                num_hidden_layers: 2,
                num_attention_heads: 2,
                ..TextConfig::default()
            },
        };
        let parts = [Part::Unet, Part::Vae, Part::TextEncoder];
        let model = TrainableModel::new(&config, &parts, 1, &Device::Cpu).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fresh.safetensors");
        model.save(&path, DType::F32).unwrap();

        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.config(), &config);
        for part in parts {
            checkpoint.verify(part).unwrap();
            let vb = checkpoint
                .var_builder(part, DType::F32, &Device::Cpu)
                .unwrap();
            for (name, var) in model.parameters(part) {
                let stored = vb.get(var.shape(), &name).unwrap();
                let same = (stored - var.as_tensor()).unwrap().sqr().unwrap().sum_all();
                assert_eq!(same.unwrap().to_scalar::<f32>().unwrap(), 0.0, "{name}");
            }
        }
    }
}
