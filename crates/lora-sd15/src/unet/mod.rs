//! The denoising UNet of Stable Diffusion 1.x.
//!
//! Shapes: latents `[n, 4, h, w]`, timesteps `[n]` (fractional allowed), context
//! `[n, tokens, 768]`; the prediction has the shape of the latents. There may be several contexts
//! for each of the latents, as guidance needs it. All layers are [`Layer`]s, so any of them can carry
//! adapters. Layout and names are diffusers'.

mod attention;
mod embedding;
mod memory;
mod resnet;

use candle_core::{Result, Tensor};
use candle_nn::{Module, VarBuilder};
use lora_core::{Adaptable, Component, Conv2dParams, Layer};

use crate::UnetConfig;
use attention::Transformer;
use embedding::TimeEmbedding;
pub use embedding::timestep_embedding;
pub use memory::StepSize;
pub(crate) use resnet::Resnet;

/// 3x3, stride 1, size kept.
pub(crate) const SAME: Conv2dParams = Conv2dParams {
    stride: 1,
    padding: 1,
    dilation: 1,
    groups: 1,
};
/// 3x3, stride 2, one zero on each side.
const HALVE: Conv2dParams = Conv2dParams {
    stride: 2,
    padding: 1,
    dilation: 1,
    groups: 1,
};
/// 1x1.
pub(crate) const POINT: Conv2dParams = Conv2dParams {
    stride: 1,
    padding: 0,
    dilation: 1,
    groups: 1,
};

/// What happens when latents are not a multiple of 8 in size, so that an upsampled
/// tensor is larger than the skip it meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnevenSize {
    /// Double, convolve, then nearest-resize to the skip: A1111's result.
    #[default]
    WebUi,
    /// Nearest-resize to the skip, then convolve: diffusers' result.
    Diffusers,
}

/// The network.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarBuilder;
/// use lora_sd15::{UNet, UnetConfig};
/// let config = UnetConfig {
///     block_out_channels: vec![8, 8, 8, 8], norm_num_groups: 4, num_heads: 2, cross_attention_dim: 6,
///     ..Default::default()
/// };
/// let unet = UNet::new(&config, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
/// let latents = Tensor::zeros((1, 4, 8, 8), DType::F32, &Device::Cpu)?;
/// let timesteps = Tensor::new(&[500f32], &Device::Cpu)?;
/// let context = Tensor::zeros((1, 77, 6), DType::F32, &Device::Cpu)?;
/// assert_eq!(unet.forward(&latents, &timesteps, &context)?.dims(), [1, 4, 8, 8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct UNet {
    conv_in: Layer,
    time_embedding: TimeEmbedding,
    down: Vec<DownBlock>,
    mid: MidBlock,
    up: Vec<UpBlock>,
    conv_norm_out: Layer,
    conv_out: Layer,
    uneven: UnevenSize,
    checkpointing: bool,
}

#[derive(Debug, Clone)]
struct DownBlock {
    resnets: Vec<Resnet>,
    attentions: Vec<Transformer>,
    downsampler: Option<Layer>,
}

#[derive(Debug, Clone)]
struct MidBlock {
    resnets: [Resnet; 2],
    attention: Transformer,
}

#[derive(Debug, Clone)]
struct UpBlock {
    resnets: Vec<Resnet>,
    attentions: Vec<Transformer>,
    upsampler: Option<Layer>,
}

impl UNet {
    /// Channels of the input: 4, or 9 for inpainting.
    pub fn in_channels(&self) -> usize {
        self.conv_in
            .base()
            .weight
            .dims()
            .get(1)
            .copied()
            .unwrap_or(0)
    }

    /// Builds the network from tensors with diffusers names.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn new(config: &UnetConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let channels = &config.block_out_channels;
        let (Some(&first), Some(&last)) = (channels.first(), channels.last()) else {
            candle_core::bail!("block_out_channels is empty");
        };
        let has_attention = |level: usize| config.attention.get(level).copied().unwrap_or(false);
        let temb = 4 * first;
        let resnet = |i, o, vb| Resnet::new(i, o, Some(temb), config.norm_num_groups, 1e-5, vb);
        let transformer = |c, vb| Transformer::new(c, config, vb);

        let mut down = Vec::new();
        let mut previous = first;
        for (level, &c) in channels.iter().enumerate() {
            let vb = vb.pp("down_blocks").pp(level);
            let mut block = DownBlock {
                resnets: vec![],
                attentions: vec![],
                downsampler: None,
            };
            for j in 0..config.layers_per_block {
                block
                    .resnets
                    .push(resnet(previous, c, vb.pp("resnets").pp(j))?);
                if has_attention(level) {
                    block
                        .attentions
                        .push(transformer(c, vb.pp("attentions").pp(j))?);
                }
                previous = c;
            }
            if level + 1 < channels.len() {
                block.downsampler =
                    Some(Layer::conv2d(c, c, 3, HALVE, vb.pp("downsamplers.0.conv"))?);
            }
            down.push(block);
        }

        let vb_mid = vb.pp("mid_block");
        let mid = MidBlock {
            resnets: [
                resnet(last, last, vb_mid.pp("resnets.0"))?,
                resnet(last, last, vb_mid.pp("resnets.1"))?,
            ],
            attention: transformer(last, vb_mid.pp("attentions.0"))?,
        };

        let mut up = Vec::new();
        let mut previous = last;
        for (i, level) in (0..channels.len()).rev().enumerate() {
            let vb = vb.pp("up_blocks").pp(i);
            let c = channels[level];
            let below = channels[level.saturating_sub(1)];
            let mut block = UpBlock {
                resnets: vec![],
                attentions: vec![],
                upsampler: None,
            };
            for j in 0..=config.layers_per_block {
                let skip = if j == config.layers_per_block {
                    below
                } else {
                    c
                };
                block
                    .resnets
                    .push(resnet(previous + skip, c, vb.pp("resnets").pp(j))?);
                if has_attention(level) {
                    block
                        .attentions
                        .push(transformer(c, vb.pp("attentions").pp(j))?);
                }
                previous = c;
            }
            if level > 0 {
                block.upsampler = Some(Layer::conv2d(c, c, 3, SAME, vb.pp("upsamplers.0.conv"))?);
            }
            up.push(block);
        }

        Ok(Self {
            conv_in: Layer::conv2d(config.in_channels, first, 3, SAME, vb.pp("conv_in"))?,
            time_embedding: TimeEmbedding::new(first, vb.pp("time_embedding"))?,
            down,
            mid,
            up,
            conv_norm_out: Layer::group_norm(
                config.norm_num_groups,
                first,
                1e-5,
                vb.pp("conv_norm_out"),
            )?,
            conv_out: Layer::conv2d(first, config.out_channels, 3, SAME, vb.pp("conv_out"))?,
            uneven: UnevenSize::default(),
            checkpointing: false,
        })
    }

    /// Chooses the rule for latent sizes that are not a multiple of 8.
    pub fn set_uneven_size(&mut self, rule: UnevenSize) {
        self.uneven = rule;
    }

    /// Trades time for memory when gradients are recorded: of each ResNet block and the
    /// transformer behind it only the inputs are kept, and the backward pass computes the
    /// rest again. Gradients stay the same to the bit.
    pub fn set_gradient_checkpointing(&mut self, on: bool) {
        self.checkpointing = on;
    }

    /// Predicts noise (or v) for `latents` `[n, c, h, w]` at `timesteps` `[n]` under
    /// `context` `[n, tokens, width]`.
    ///
    /// With `context` `[k n, tokens, width]` the prediction is `[k n, c, h, w]`: of all latents under the
    /// first `n` contexts, then under the next ones, the same as if latents and timesteps were repeated
    /// `k` times. What comes before the first look at the context is computed once: of a pair at 512x512, as
    /// classifier-free guidance asks for it, some 3 % of the arithmetic.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward(
        &self,
        latents: &Tensor,
        timesteps: &Tensor,
        context: &Tensor,
    ) -> Result<Tensor> {
        lora_kernels::on_worker(latents.device(), || {
            self.predict(latents, timesteps, context)
        })
    }

    fn predict(&self, latents: &Tensor, timesteps: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (n, contexts) = (latents.dim(0)?, context.dim(0)?);
        if n == 0 || contexts % n != 0 {
            candle_core::bail!("{contexts} contexts do not fit {n} latents");
        }
        // Every ResNet block projects silu(temb): computed once.
        let mut temb = self
            .time_embedding
            .forward(timesteps, latents.dtype())?
            .silu()?;
        let mut x = self.conv_in.forward(latents)?;
        let mut skips = vec![x.clone()];
        for block in &self.down {
            for (j, resnet) in block.resnets.iter().enumerate() {
                x = self.stage(resnet, block.attentions.get(j), &x, &temb, context)?;
                temb = repeated(&temb, x.dim(0)?)?;
                skips.push(x.clone());
            }
            if let Some(downsampler) = &block.downsampler {
                x = downsampler.forward(&x)?;
                skips.push(x.clone());
            }
        }

        let [first, second] = &self.mid.resnets;
        x = self.stage(first, Some(&self.mid.attention), &x, &temb, context)?;
        temb = repeated(&temb, x.dim(0)?)?;
        x = self.stage(second, None, &x, &temb, context)?;

        for block in &self.up {
            for (j, resnet) in block.resnets.iter().enumerate() {
                let Some(skip) = skips.pop() else {
                    candle_core::bail!("skip connections do not match")
                };
                let both = lora_kernels::concat_channels(&x, &repeated(&skip, x.dim(0)?)?)?;
                x = self.stage(resnet, block.attentions.get(j), &both, &temb, context)?;
            }
            if let (Some(upsampler), Some(skip)) = (&block.upsampler, skips.last()) {
                x = self.upsample(&x, upsampler, skip)?;
            }
        }
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)
    }

    /// A ResNet block and the transformer behind it, if there is one.
    fn stage(
        &self,
        resnet: &Resnet,
        attention: Option<&Transformer>,
        x: &Tensor,
        temb: &Tensor,
        context: &Tensor,
    ) -> Result<Tensor> {
        if self.checkpointing {
            let (resnet, attention) = (resnet.clone(), attention.cloned());
            return lora_kernels::checkpoint(&[x, temb, context], move |t| match t {
                [x, temb, context] => stage(&resnet, attention.as_ref(), x, temb, context),
                _ => candle_core::bail!("a stage has three inputs"),
            });
        }
        // Under a new name each, so that gradients are summed over the stage before they
        // join those of other stages: in the order that checkpointing sums them.
        let (x, temb, context) = (rename(x)?, rename(temb)?, rename(context)?);
        stage(resnet, attention, &x, &temb, &context)
    }

    fn upsample(&self, x: &Tensor, conv: &Layer, skip: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = skip.dims4()?;
        let (_, _, xh, xw) = x.dims4()?;
        if (h, w) == (2 * xh, 2 * xw) {
            return conv.forward(&lora_kernels::upsample_nearest2x(x)?);
        }
        match self.uneven {
            UnevenSize::WebUi => {
                let doubled = conv.forward(&lora_kernels::upsample_nearest2x(x)?)?;
                resize_nearest(&doubled, h, w)
            }
            UnevenSize::Diffusers => conv.forward(&resize_nearest(x, h, w)?),
        }
    }
}

fn stage(
    resnet: &Resnet,
    attention: Option<&Transformer>,
    x: &Tensor,
    temb: &Tensor,
    context: &Tensor,
) -> Result<Tensor> {
    let y = resnet.forward(x, Some(temb))?;
    match attention {
        Some(attention) => attention.forward(&y, context),
        None => Ok(y),
    }
}

/// All of `x` `[m, ..]` again and again, up to `n` in all, which is a multiple of `m`.
fn repeated(x: &Tensor, n: usize) -> Result<Tensor> {
    match n / x.dim(0)?.max(1) {
        1 => Ok(x.clone()),
        times => Tensor::cat(&vec![x; times], 0),
    }
}

/// The channels that a layer gives.
fn outputs(layer: &Layer) -> usize {
    layer.base().weight.dims().first().copied().unwrap_or(0)
}

/// The same values as another node of the graph.
fn rename(x: &Tensor) -> Result<Tensor> {
    lora_kernels::reshape(x, x.shape())
}

/// Nearest-neighbour resize of `[n, c, h, w]`: source index `floor(i * from / to)`.
fn resize_nearest(x: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (_, _, from_h, from_w) = x.dims4()?;
    let index = |from: usize, to: usize| {
        let rows: Vec<u32> = (0..to).map(|i| (i * from / to) as u32).collect();
        Tensor::new(rows, x.device())
    };
    x.index_select(&index(from_h, h)?, 2)?
        .index_select(&index(from_w, w)?, 3)
}

impl Adaptable for UNet {
    fn component(&self) -> Component {
        Component::Unet
    }

    /// In the order of sd-scripts' network, whose adapters are created in it: input,
    /// down, up, middle, output; within a block transformers before ResNets.
    fn visit_layers(
        &mut self,
        visit: &mut dyn FnMut(&mut Layer) -> lora_core::Result<()>,
    ) -> lora_core::Result<()> {
        visit(&mut self.conv_in)?;
        self.time_embedding.visit(visit)?;
        for block in &mut self.down {
            block
                .attentions
                .iter_mut()
                .try_for_each(|a| a.visit(visit))?;
            block.resnets.iter_mut().try_for_each(|r| r.visit(visit))?;
            block.downsampler.iter_mut().try_for_each(&mut *visit)?;
        }
        for block in &mut self.up {
            block
                .attentions
                .iter_mut()
                .try_for_each(|a| a.visit(visit))?;
            block.resnets.iter_mut().try_for_each(|r| r.visit(visit))?;
            block.upsampler.iter_mut().try_for_each(&mut *visit)?;
        }
        self.mid.attention.visit(visit)?;
        self.mid
            .resnets
            .iter_mut()
            .try_for_each(|r| r.visit(visit))?;
        visit(&mut self.conv_norm_out)?;
        visit(&mut self.conv_out)
    }
}
