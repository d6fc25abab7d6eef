//! Transformers of the UNet: self-attention, cross-attention, gated feed-forward.

use candle_core::{DType, Result, Tensor};
use candle_nn::{Module, VarBuilder};
use lora_core::{Held, Layer, LayerOp};

use super::memory::kept_for;
use super::{POINT, outputs, repeated};
use crate::UnetConfig;
use lora_kernels::{FeedForward as Layers, attention, feed_forward, geglu, reshape, transpose};

/// Group norm, 1x1 projection, one block over pixels as tokens, projection back.
#[derive(Debug, Clone)]
pub(super) struct Transformer {
    norm: Layer,
    proj_in: Layer,
    block: Block,
    proj_out: Layer,
}

#[derive(Debug, Clone)]
struct Block {
    norm1: Layer,
    attn1: Attention,
    norm2: Layer,
    attn2: Attention,
    norm3: Layer,
    ff: FeedForward,
}

#[derive(Debug, Clone)]
struct Attention {
    to_q: Layer,
    to_k: Layer,
    to_v: Layer,
    to_out: Layer,
    heads: usize,
}

#[derive(Debug, Clone)]
struct FeedForward {
    proj: Layer,
    out: Layer,
}

type Visit<'a> = &'a mut dyn FnMut(&mut Layer) -> lora_core::Result<()>;

impl Transformer {
    pub(super) fn new(c: usize, config: &UnetConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let vb_block = vb.pp("transformer_blocks.0");
        let attention =
            |context, name| Attention::new(c, context, config.num_heads, vb_block.pp(name));
        Ok(Self {
            norm: Layer::group_norm(config.norm_num_groups, c, 1e-6, vb.pp("norm"))?,
            proj_in: Layer::conv2d(c, c, 1, POINT, vb.pp("proj_in"))?,
            block: Block {
                norm1: Layer::layer_norm(c, 1e-5, vb_block.pp("norm1"))?,
                attn1: attention(c, "attn1")?,
                norm2: Layer::layer_norm(c, 1e-5, vb_block.pp("norm2"))?,
                attn2: attention(config.cross_attention_dim, "attn2")?,
                norm3: Layer::layer_norm(c, 1e-5, vb_block.pp("norm3"))?,
                ff: FeedForward {
                    proj: Layer::linear(c, 8 * c, vb_block.pp("ff.net.0.proj"))?,
                    out: Layer::linear(4 * c, c, vb_block.pp("ff.net.2"))?,
                },
            },
            proj_out: Layer::conv2d(c, c, 1, POINT, vb.pp("proj_out"))?,
        })
    }

    /// `x` `[n, c, h, w]`, `context` `[k n, tokens, width]`; gives `[k n, c, h, w]`.
    pub(super) fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (n, c, h, w) = x.dims4()?;
        let tokens = self.proj_in.forward(&self.norm.forward(x)?)?;
        let tokens = transpose(&reshape(&tokens, (n, c, h * w))?)?;
        let tokens = self.block.forward(&tokens, context)?;
        let n = tokens.dim(0)?;
        let y = reshape(&transpose(&tokens)?, (n, c, h, w))?;
        self.proj_out
            .forward_added(&y, None, Some(&repeated(x, n)?))
    }

    /// What a training step holds for `pixels` of all pictures and `tokens` of all contexts.
    pub(super) fn held(&self, pixels: usize, tokens: usize) -> Held {
        let c = outputs(&self.proj_out);
        let (own, other, ff) = (&self.block.attn1, &self.block.attn2, &self.block.ff);
        // Norms, where adapters follow.
        let norms: usize = [&self.proj_in, &own.to_q, &other.to_q, &ff.proj]
            .into_iter()
            .map(|layer| kept_for(layer, c * pixels))
            .sum();
        let norms_and_results = Held {
            // Both attentions with what their softmax keeps.
            kept: norms + 2 * c * pixels + 2 * own.heads * pixels,
            backward: 0,
        };
        let of_pixels = [&self.proj_in, &self.proj_out, &ff.proj]
            .into_iter()
            .chain([&own.to_q, &own.to_k, &own.to_v, &own.to_out])
            .chain([&other.to_q, &other.to_out])
            .map(|layer| layer.held(pixels));
        let of_tokens = [&other.to_k, &other.to_v]
            .into_iter()
            .map(|layer| layer.held(tokens));
        // What GEGLU gives is not kept. Its gradient, and that of the projection, which is twice as wide.
        let geglu = Held {
            kept: 0,
            backward: 12 * c * pixels,
        };
        of_pixels
            .chain(of_tokens)
            .chain([geglu, ff.out.held(pixels)])
            .fold(norms_and_results, Held::then)
    }

    pub(super) fn visit(&mut self, visit: Visit<'_>) -> lora_core::Result<()> {
        visit(&mut self.norm)?;
        visit(&mut self.proj_in)?;
        let block = &mut self.block;
        visit(&mut block.norm1)?;
        block.attn1.visit(visit)?;
        visit(&mut block.ff.proj)?;
        visit(&mut block.ff.out)?;
        visit(&mut block.norm2)?;
        block.attn2.visit(visit)?;
        visit(&mut block.norm3)?;
        visit(&mut self.proj_out)
    }
}

impl Block {
    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let normal = self.norm1.forward(x)?;
        let x = self.attn1.forward(&normal, &normal, x)?;
        let x = self.attn2.forward(&self.norm2.forward(&x)?, context, &x)?;
        self.ff.forward(&self.norm3, &x)
    }
}

impl Attention {
    fn new(c: usize, context: usize, heads: usize, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            to_q: Layer::linear_no_bias(c, c, vb.pp("to_q"))?,
            to_k: Layer::linear_no_bias(context, c, vb.pp("to_k"))?,
            to_v: Layer::linear_no_bias(context, c, vb.pp("to_v"))?,
            to_out: Layer::linear(c, c, vb.pp("to_out.0"))?,
            heads,
        })
    }

    fn forward(&self, x: &Tensor, context: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let (k, v) = (self.to_k.forward(context)?, self.to_v.forward(context)?);
        let n = k.dim(0)?;
        let q = repeated(&self.to_q.forward(x)?, n)?;
        let y = attention(&q, &k, &v, self.heads, false, self.to_q.compute())?;
        self.to_out
            .forward_added(&y, None, Some(&repeated(residual, n)?))
    }

    fn visit(&mut self, visit: Visit<'_>) -> lora_core::Result<()> {
        visit(&mut self.to_q)?;
        visit(&mut self.to_k)?;
        visit(&mut self.to_v)?;
        visit(&mut self.to_out)
    }
}

impl FeedForward {
    /// Of `x` after `norm`, added to `x`. GEGLU: the first half of the projection times gelu (exact
    /// form) of the second.
    fn forward(&self, norm: &Layer, x: &Tensor) -> Result<Tensor> {
        if let Some(layers) = self.in_one_pass(norm, x) {
            return feed_forward(x, &layers);
        }
        let wide = self.proj.forward(&norm.forward(x)?)?;
        self.out.forward_added(&geglu(&wide)?, None, Some(x))
    }

    /// The layers where nothing but their weights counts: no gradient is asked for, and no adapter
    /// is attached.
    fn in_one_pass<'a>(&'a self, norm: &'a Layer, x: &Tensor) -> Option<Layers<'a>> {
        let layers = [norm, &self.proj, &self.out];
        let plain = |layer: &&Layer| {
            let base = layer.base();
            let tracked = base.bias.as_ref().is_some_and(Tensor::track_op);
            layer.attached() == 0 && !base.weight.track_op() && !tracked
        };
        let (LayerOp::LayerNorm { eps }, Some(shift)) = (norm.base().op, &norm.base().bias) else {
            return None;
        };
        let elsewhere = !x.device().is_cpu() || x.dtype() != DType::F32;
        if elsewhere
            || x.track_op()
            || !layers.iter().all(plain)
            || self.proj.compute() != self.out.compute()
        {
            return None;
        }
        let of = |layer: &'a Layer| (&layer.base().weight, layer.base().bias.as_ref());
        Some(Layers {
            norm: (of(norm).0, shift, eps),
            proj: of(&self.proj),
            out: of(&self.out),
            compute: self.proj.compute(),
        })
    }
}
