//! CLIP ViT-L/14's text tower: token ids `[n, 77]` to states `[n, 77, 768]`.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{Module, VarBuilder};
use lora_core::{Adaptable, Component, Held, Layer};

use crate::TextConfig;
use lora_kernels::attention;

/// The text encoder.
///
/// ```no_run
/// use candle_core::{DType, Device, Tensor};
/// use lora_sd15::{Checkpoint, Part, TextEncoder, Tokenizer};
/// let checkpoint = Checkpoint::open("v1-5-pruned-emaonly.safetensors")?;
/// let vb = checkpoint.var_builder(Part::TextEncoder, DType::F32, &Device::Cpu)?;
/// let encoder = TextEncoder::new(&checkpoint.config().text, vb)?;
/// let ids = Tensor::new(Tokenizer::new().encode_padded("1girl, smile"), &Device::Cpu)?.unsqueeze(0)?;
/// assert_eq!(encoder.forward(&ids, 1)?.dims(), [1, 77, 768]);
/// # Ok::<(), lora_sd15::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct TextEncoder {
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<EncoderLayer>,
    final_layer_norm: Layer,
    config: TextConfig,
}

#[derive(Debug, Clone)]
struct EncoderLayer {
    layer_norm1: Layer,
    q_proj: Layer,
    k_proj: Layer,
    v_proj: Layer,
    out_proj: Layer,
    layer_norm2: Layer,
    fc1: Layer,
    fc2: Layer,
    heads: usize,
}

impl TextEncoder {
    /// Builds the network from tensors with the original CLIP names
    /// (`text_model....`).
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn new(config: &TextConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let vb = vb.pp("text_model");
        let width = config.hidden_size;
        let embeddings = vb.pp("embeddings");
        let layers = (0..config.num_hidden_layers)
            .map(|i| EncoderLayer::new(config, vb.pp("encoder.layers").pp(i)))
            .collect::<Result<_>>()?;
        Ok(Self {
            token_embedding: embeddings
                .get((config.vocab_size, width), "token_embedding.weight")?,
            position_embedding: embeddings.get(
                (config.max_position_embeddings, width),
                "position_embedding.weight",
            )?,
            layers,
            final_layer_norm: Layer::layer_norm(width, 1e-5, vb.pp("final_layer_norm"))?,
            config: config.clone(),
        })
    }

    /// The dimensions.
    pub fn config(&self) -> &TextConfig {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> &candle_core::Device {
        self.token_embedding.device()
    }

    /// Encodes `ids` `[n, tokens]` (u32, at most 77 tokens). `clip_skip` counts from
    /// the end as in A1111 and sd-scripts: 1 is the last layer, 2 the one before; the
    /// final norm is applied in every case.
    ///
    /// # Errors
    /// When `clip_skip` exceeds the number of layers or an id the vocabulary.
    pub fn forward(&self, ids: &Tensor, clip_skip: usize) -> Result<Tensor> {
        self.forward_with(ids, &[], clip_skip)
    }

    /// The same with learned vectors `[n, width]` in the place of some tokens: each with
    /// its row of `ids` and its first token there.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and when vectors do not fit.
    pub fn forward_with(
        &self,
        ids: &Tensor,
        learned: &[(usize, usize, Tensor)],
        clip_skip: usize,
    ) -> Result<Tensor> {
        let Some(depth) = self
            .layers
            .len()
            .checked_sub(clip_skip.max(1) - 1)
            .filter(|d| *d > 0)
        else {
            candle_core::bail!(
                "clip_skip {clip_skip}: the text encoder has {} layers",
                self.layers.len()
            );
        };
        lora_kernels::on_worker(ids.device(), || {
            let mut x = self.embed(ids, learned)?;
            for layer in &self.layers[..depth] {
                x = layer.forward(&x)?;
            }
            self.final_layer_norm.forward(&x)
        })
    }

    /// The embedding output and the output of every layer, before the final norm.
    ///
    /// # Errors
    /// When an id exceeds the vocabulary.
    pub fn hidden_states(&self, ids: &Tensor) -> Result<Vec<Tensor>> {
        let mut x = self.embed(ids, &[])?;
        let mut states = vec![x.clone()];
        for layer in &self.layers {
            x = layer.forward(&x)?;
            states.push(x.clone());
        }
        Ok(states)
    }

    /// What a training step holds for this network with the adapters attached to it now,
    /// for so many chunks of 77 tokens: an estimate, weights not counted.
    pub fn held(&self, chunks: usize) -> Held {
        let tokens = chunks * self.config.max_position_embeddings;
        let layers = self.layers.iter().map(|layer| layer.held(tokens));
        layers.fold(self.final_layer_norm.held(tokens), Held::then)
    }

    fn embed(&self, ids: &Tensor, learned: &[(usize, usize, Tensor)]) -> Result<Tensor> {
        let (n, length) = ids.dims2()?;
        if length > self.config.max_position_embeddings {
            candle_core::bail!(
                "{length} tokens: a chunk has at most {}",
                self.config.max_position_embeddings
            );
        }
        let ids = ids.to_dtype(DType::U32)?.flatten_all()?.contiguous()?;
        let mut tokens = self
            .token_embedding
            .index_select(&ids, 0)?
            .reshape((n, length, ()))?;
        for (row, slot, vectors) in learned {
            let vectors = vectors
                .to_dtype(tokens.dtype())?
                .to_device(tokens.device())?;
            let (count, width) = vectors.dims2()?;
            let range = [*row..row + 1, *slot..slot + count, 0..width];
            tokens = tokens.slice_assign(&range, &vectors.unsqueeze(0)?)?;
        }
        tokens.broadcast_add(&self.position_embedding.narrow(0, 0, length)?)
    }
}

impl EncoderLayer {
    fn new(config: &TextConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let projection = |name| Layer::linear(width, width, vb.pp("self_attn").pp(name));
        Ok(Self {
            layer_norm1: Layer::layer_norm(width, 1e-5, vb.pp("layer_norm1"))?,
            q_proj: projection("q_proj")?,
            k_proj: projection("k_proj")?,
            v_proj: projection("v_proj")?,
            out_proj: projection("out_proj")?,
            layer_norm2: Layer::layer_norm(width, 1e-5, vb.pp("layer_norm2"))?,
            fc1: Layer::linear(width, inner, vb.pp("mlp.fc1"))?,
            fc2: Layer::linear(inner, width, vb.pp("mlp.fc2"))?,
            heads: config.num_attention_heads,
        })
    }

    fn held(&self, tokens: usize) -> Held {
        let values = |layer: &Layer| layer.base().weight.dims()[0] * tokens;
        let (width, inner) = (values(&self.out_proj), values(&self.fc1));
        let between = Held {
            // Attention, both residual sums, and three steps of the activation function.
            kept: 3 * width + 3 * inner,
            backward: 2 * width + 3 * inner,
        };
        [&self.layer_norm1, &self.layer_norm2]
            .into_iter()
            .chain([&self.q_proj, &self.k_proj, &self.v_proj, &self.out_proj])
            .chain([&self.fc1, &self.fc2])
            .map(|layer| layer.held(tokens))
            .fold(between, Held::then)
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let normal = self.layer_norm1.forward(x)?;
        let (q, k, v) = (
            self.q_proj.forward(&normal)?,
            self.k_proj.forward(&normal)?,
            self.v_proj.forward(&normal)?,
        );
        let y = attention(&q, &k, &v, self.heads, true, self.q_proj.compute())?;
        let x = self.out_proj.forward_added(&y, None, Some(x))?;
        let inner = quick_gelu(&self.fc1.forward(&self.layer_norm2.forward(&x)?)?)?;
        self.fc2.forward_added(&inner, None, Some(&x))
    }
}

/// `x * sigmoid(1.702 x)`.
fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    x * candle_nn::ops::sigmoid(&(x * 1.702)?)?
}

impl Adaptable for TextEncoder {
    fn component(&self) -> Component {
        Component::TextEncoder
    }

    fn visit_layers(
        &mut self,
        visit: &mut dyn FnMut(&mut Layer) -> lora_core::Result<()>,
    ) -> lora_core::Result<()> {
        for layer in &mut self.layers {
            visit(&mut layer.k_proj)?;
            visit(&mut layer.v_proj)?;
            visit(&mut layer.q_proj)?;
            visit(&mut layer.out_proj)?;
            visit(&mut layer.layer_norm1)?;
            visit(&mut layer.fc1)?;
            visit(&mut layer.fc2)?;
            visit(&mut layer.layer_norm2)?;
        }
        visit(&mut self.final_layer_norm)
    }
}

/// Means over all values are restored after token weights were applied: A1111's
/// "Original" emphasis. `states` `[n, tokens, width]`, `weights` `[n, tokens]`.
///
/// # Errors
/// When the shapes do not fit.
pub fn weigh_restoring_mean(states: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let weighted = weigh(states, weights)?;
    let ratio = states
        .mean_all()?
        .to_dtype(DType::F64)?
        .to_scalar::<f64>()?
        / weighted
            .mean_all()?
            .to_dtype(DType::F64)?
            .to_scalar::<f64>()?;
    weighted * ratio
}

/// Token weights multiplied onto states, nothing restored: sd-scripts' weighted
/// captions.
///
/// # Errors
/// When the shapes do not fit.
pub fn weigh(states: &Tensor, weights: &Tensor) -> Result<Tensor> {
    states.broadcast_mul(&weights.to_dtype(states.dtype())?.unsqueeze(D::Minus1)?)
}
