//! The image encoder and decoder: pictures `[n, 3, 8h, 8w]` in [-1, 1], latents
//! `[n, 4, h, w]`.

use candle_core::{Result, Tensor};
use candle_nn::{Module, VarBuilder};
use lora_core::{Compute, Conv2dParams, Layer};
use lora_kernels::{add, attention, reshape, transpose};

use crate::VaeConfig;
use crate::unet::{POINT, Resnet, SAME};

/// All group norms of the VAE.
const EPS: f64 = 1e-6;
/// 3x3, stride 2; the zero on the right and bottom is added by hand.
const HALVE: Conv2dParams = Conv2dParams {
    stride: 2,
    padding: 0,
    dilation: 1,
    groups: 1,
};

/// The autoencoder.
///
/// ```no_run
/// use candle_core::{DType, Device, Tensor};
/// use lora_sd15::{Checkpoint, Part, Vae};
/// let checkpoint = Checkpoint::open("v1-5-pruned-emaonly.safetensors")?;
/// let vae = Vae::new(&checkpoint.config().vae, checkpoint.var_builder(Part::Vae, DType::F32, &Device::Cpu)?)?;
/// let picture = Tensor::zeros((1, 3, 512, 512), DType::F32, &Device::Cpu)?;
/// let latents = vae.encode(&picture)?.mode(vae.scaling_factor())?;
/// assert_eq!(latents.dims(), [1, 4, 64, 64]);
/// # Ok::<(), lora_sd15::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Vae {
    encoder: Encoder,
    quant_conv: Layer,
    post_quant_conv: Layer,
    decoder: Decoder,
    scaling_factor: f64,
}

/// The encoder's answer: a normal distribution over unscaled latents.
#[derive(Debug, Clone)]
pub struct Posterior {
    /// Mean, `[n, 4, h, w]`.
    pub mean: Tensor,
    /// Logarithm of the variance, clamped to [-30, 20].
    pub logvar: Tensor,
}

impl Posterior {
    /// `(mean + std * noise) * scaling_factor` for standard normal `noise`: latents as
    /// the UNet expects them. sd-scripts trains on such samples.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn sample(&self, noise: &Tensor, scaling_factor: f64) -> Result<Tensor> {
        let std = (&self.logvar * 0.5)?.exp()?;
        (&self.mean + std * noise)? * scaling_factor
    }

    /// The mean times `scaling_factor`.
    ///
    /// # Errors
    /// When the product cannot be made.
    pub fn mode(&self, scaling_factor: f64) -> Result<Tensor> {
        &self.mean * scaling_factor
    }
}

#[derive(Debug, Clone)]
struct Encoder {
    conv_in: Layer,
    down: Vec<(Vec<Resnet>, Option<Layer>)>,
    mid: Mid,
    conv_norm_out: Layer,
    conv_out: Layer,
}

#[derive(Debug, Clone)]
struct Decoder {
    conv_in: Layer,
    mid: Mid,
    up: Vec<(Vec<Resnet>, Option<Layer>)>,
    conv_norm_out: Layer,
    conv_out: Layer,
}

impl Vae {
    /// Builds the network from tensors with diffusers names.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn new(config: &VaeConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let latent = config.latent_channels;
        Ok(Self {
            encoder: Encoder::new(config, vb.pp("encoder"))?,
            quant_conv: Layer::conv2d(2 * latent, 2 * latent, 1, POINT, vb.pp("quant_conv"))?,
            post_quant_conv: Layer::conv2d(latent, latent, 1, POINT, vb.pp("post_quant_conv"))?,
            decoder: Decoder::new(config, vb.pp("decoder"))?,
            scaling_factor: config.scaling_factor,
        })
    }

    /// 0.18215 for SD1.x: what unscaled latents are multiplied by for the UNet.
    pub fn scaling_factor(&self) -> f64 {
        self.scaling_factor
    }

    /// Encodes pictures `[n, 3, h, w]` in [-1, 1].
    ///
    /// # Errors
    /// When height or width is not a multiple of 8.
    pub fn encode(&self, pictures: &Tensor) -> Result<Posterior> {
        let (_, _, h, w) = pictures.dims4()?;
        if h % 8 != 0 || w % 8 != 0 {
            candle_core::bail!("picture of {w}x{h}: width and height must be multiples of 8");
        }
        let moments = lora_kernels::on_worker(pictures.device(), || {
            self.quant_conv.forward(&self.encoder.forward(pictures)?)
        })?;
        let half = moments.dim(1)? / 2;
        let logvar = moments
            .narrow(1, half, half)?
            .contiguous()?
            .clamp(-30f32, 20f32)?;
        Ok(Posterior {
            mean: moments.narrow(1, 0, half)?.contiguous()?,
            logvar,
        })
    }

    /// Decodes unscaled latents (already divided by the scaling factor); values are
    /// not clamped.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        lora_kernels::on_worker(latents.device(), || {
            let x = self.post_quant_conv.forward(latents)?;
            self.decoder.forward(&x)
        })
    }

    /// Values held at most while a picture of so many pixels is encoded by so many threads: an
    /// estimate, weights not counted. It is in the first ResNet block, at full size.
    pub fn encoding_peak(&self, pixels: usize, threads: usize) -> usize {
        let first = self.encoder.down.first().and_then(|(r, _)| r.first());
        first.map_or(0, |resnet| resnet.peak(pixels, threads))
    }

    /// The same for decoding, in the last level's first ResNet block.
    pub fn decoding_peak(&self, pixels: usize, threads: usize) -> usize {
        let first = self.decoder.up.last().and_then(|(r, _)| r.first());
        first.map_or(0, |resnet| resnet.peak(pixels, threads))
    }

    /// Encodes in tiles of `tile` latents (8 times as many pixels), a quarter of which
    /// overlaps: less memory, slightly other values.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_tiled(&self, pictures: &Tensor, tile: usize) -> Result<Posterior> {
        let (_, _, h, w) = pictures.dims4()?;
        let tile = tile.max(16);
        if h.max(w) <= 8 * tile {
            return self.encode(pictures);
        }
        let both = tiled(pictures, 8 * tile, &|part| {
            let posterior = self.encode(part)?;
            Tensor::cat(&[posterior.mean, posterior.logvar], 1)
        })?;
        let half = both.dim(1)? / 2;
        Ok(Posterior {
            mean: both.narrow(1, 0, half)?.contiguous()?,
            logvar: both.narrow(1, half, half)?.contiguous()?,
        })
    }

    /// Decodes in tiles of `tile` latents, a quarter of which overlaps: less memory,
    /// slightly other values.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_tiled(&self, latents: &Tensor, tile: usize) -> Result<Tensor> {
        let (_, _, h, w) = latents.dims4()?;
        let tile = tile.max(16);
        if h.max(w) <= tile {
            return self.decode(latents);
        }
        tiled(latents, tile, &|part| self.decode(part))
    }
}

/// Applies `f` to overlapping tiles and blends the results linearly over the overlaps.
fn tiled(x: &Tensor, tile: usize, f: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let rows = spans(h, tile);
    let columns = spans(w, tile);
    let mut sheet: Option<(Tensor, usize, usize)> = None;
    for row in &rows {
        let mut strip: Option<Tensor> = None;
        let mut right = 0;
        for column in &columns {
            let part = x
                .narrow(2, row.0, row.1 - row.0)?
                .narrow(3, column.0, column.1 - column.0)?
                .contiguous()?;
            let done = f(&part)?;
            let inner = column.1 - column.0;
            let overlap = scaled(right - column.0.min(right), done.dim(3)?, inner);
            strip = Some(match strip {
                None => done,
                Some(left) => blend(&left, &done, overlap, 3)?,
            });
            right = column.1;
        }
        let Some(strip) = strip else {
            candle_core::bail!("nothing to tile in {:?}", x.dims());
        };
        let inner = row.1 - row.0;
        sheet = Some(match sheet {
            None => (strip, row.1, inner),
            Some((above, bottom, _)) => {
                let overlap = scaled(bottom - row.0.min(bottom), strip.dim(2)?, inner);
                (blend(&above, &strip, overlap, 2)?, row.1, inner)
            }
        });
    }
    match sheet {
        Some((sheet, _, _)) => Ok(sheet),
        None => candle_core::bail!("nothing to tile in {:?}", x.dims()),
    }
}

/// A length of the input in the output's measure.
fn scaled(length: usize, output: usize, input: usize) -> usize {
    length * output / input.max(1)
}

/// Where tiles begin and end: at least a quarter overlaps; all have the tile's length.
fn spans(length: usize, tile: usize) -> Vec<(usize, usize)> {
    if length <= tile {
        return vec![(0, length)];
    }
    // Multiples of 8, so that pixels and latents meet.
    let step = (tile * 3 / 4 / 8 * 8).max(8);
    let last = length - tile;
    let mut starts: Vec<usize> = (0..last).step_by(step).collect();
    starts.push(last);
    starts.into_iter().map(|s| (s, s + tile)).collect()
}

/// Joins two tensors whose last and first `overlap` rows (along `dim`) are the same place.
fn blend(first: &Tensor, second: &Tensor, overlap: usize, dim: usize) -> Result<Tensor> {
    let (a, b) = (first.dim(dim)?, second.dim(dim)?);
    let overlap = overlap.min(a).min(b);
    if overlap == 0 {
        return Tensor::cat(&[first, second], dim);
    }
    let weights: Vec<f32> = (0..overlap)
        .map(|i| (i as f32 + 0.5) / overlap as f32)
        .collect();
    let mut shape = vec![1; 4];
    if let Some(side) = shape.get_mut(dim) {
        *side = overlap;
    }
    let rise = Tensor::from_vec(weights, shape, first.device())?.to_dtype(first.dtype())?;
    let fall = rise.affine(-1.0, 1.0)?;
    let old = first
        .narrow(dim, a - overlap, overlap)?
        .broadcast_mul(&fall)?;
    let new = second.narrow(dim, 0, overlap)?.broadcast_mul(&rise)?;
    let parts = [
        first.narrow(dim, 0, a - overlap)?,
        (old + new)?,
        second.narrow(dim, overlap, b - overlap)?,
    ];
    Tensor::cat(&parts, dim)
}

impl Encoder {
    fn new(config: &VaeConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let (channels, groups) = (&config.block_out_channels, config.norm_num_groups);
        let (Some(&first), Some(&last)) = (channels.first(), channels.last()) else {
            candle_core::bail!("block_out_channels is empty");
        };
        let mut down = Vec::new();
        let mut previous = first;
        for (level, &c) in channels.iter().enumerate() {
            let vb = vb.pp("down_blocks").pp(level);
            let mut resnets = Vec::new();
            for j in 0..config.layers_per_block {
                resnets.push(Resnet::new(
                    previous,
                    c,
                    None,
                    groups,
                    EPS,
                    vb.pp("resnets").pp(j),
                )?);
                previous = c;
            }
            let last = level + 1 == channels.len();
            let downsampler = (!last)
                .then(|| Layer::conv2d(c, c, 3, HALVE, vb.pp("downsamplers.0.conv")))
                .transpose()?;
            down.push((resnets, downsampler));
        }
        Ok(Self {
            conv_in: Layer::conv2d(config.in_channels, first, 3, SAME, vb.pp("conv_in"))?,
            down,
            mid: Mid::new(last, groups, vb.pp("mid_block"))?,
            conv_norm_out: Layer::group_norm(groups, last, EPS, vb.pp("conv_norm_out"))?,
            conv_out: Layer::conv2d(last, 2 * config.latent_channels, 3, SAME, vb.pp("conv_out"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(x)?;
        for (resnets, downsampler) in &self.down {
            for resnet in resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(downsampler) = downsampler {
                let padded = x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?;
                x = downsampler.forward(&padded)?;
            }
        }
        let x = self.mid.forward(&x)?;
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)
    }
}

impl Decoder {
    fn new(config: &VaeConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let (channels, groups) = (&config.block_out_channels, config.norm_num_groups);
        let (Some(&first), Some(&last)) = (channels.first(), channels.last()) else {
            candle_core::bail!("block_out_channels is empty");
        };
        let mut up = Vec::new();
        let mut previous = last;
        for (i, &c) in channels.iter().rev().enumerate() {
            let vb = vb.pp("up_blocks").pp(i);
            let mut resnets = Vec::new();
            for j in 0..=config.layers_per_block {
                resnets.push(Resnet::new(
                    previous,
                    c,
                    None,
                    groups,
                    EPS,
                    vb.pp("resnets").pp(j),
                )?);
                previous = c;
            }
            let last = i + 1 == channels.len();
            let upsampler = (!last)
                .then(|| Layer::conv2d(c, c, 3, SAME, vb.pp("upsamplers.0.conv")))
                .transpose()?;
            up.push((resnets, upsampler));
        }
        Ok(Self {
            conv_in: Layer::conv2d(config.latent_channels, last, 3, SAME, vb.pp("conv_in"))?,
            mid: Mid::new(last, groups, vb.pp("mid_block"))?,
            up,
            conv_norm_out: Layer::group_norm(groups, first, EPS, vb.pp("conv_norm_out"))?,
            conv_out: Layer::conv2d(first, config.out_channels, 3, SAME, vb.pp("conv_out"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.mid.forward(&self.conv_in.forward(x)?)?;
        for (resnets, upsampler) in &self.up {
            for resnet in resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(upsampler) = upsampler {
                x = upsampler.forward(&lora_kernels::upsample_nearest2x(&x)?)?;
            }
        }
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)
    }
}

/// ResNet, single-head attention over all pixels, ResNet.
#[derive(Debug, Clone)]
struct Mid {
    resnets: [Resnet; 2],
    group_norm: Layer,
    to_q: Layer,
    to_k: Layer,
    to_v: Layer,
    to_out: Layer,
}

impl Mid {
    fn new(c: usize, groups: usize, vb: VarBuilder<'_>) -> Result<Self> {
        let resnet = |name| Resnet::new(c, c, None, groups, EPS, vb.pp(name));
        let vb_attention = vb.pp("attentions.0");
        let linear = |name| Layer::linear(c, c, vb_attention.pp(name));
        Ok(Self {
            resnets: [resnet("resnets.0")?, resnet("resnets.1")?],
            group_norm: Layer::group_norm(groups, c, EPS, vb_attention.pp("group_norm"))?,
            to_q: linear("to_q")?,
            to_k: linear("to_k")?,
            to_v: linear("to_v")?,
            to_out: linear("to_out.0")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.resnets[0].forward(x, None)?;
        let (n, c, h, w) = x.dims4()?;
        let tokens = transpose(&reshape(&self.group_norm.forward(&x)?, (n, c, h * w))?)?;
        let (q, k, v) = (
            self.to_q.forward(&tokens)?,
            self.to_k.forward(&tokens)?,
            self.to_v.forward(&tokens)?,
        );
        let y = attention(&q, &k, &v, 1, false, Compute::F32)?;
        let y = reshape(&transpose(&self.to_out.forward(&y)?)?, (n, c, h, w))?;
        let x = add(&y, &x)?;
        self.resnets[1].forward(&x, None)
    }
}
