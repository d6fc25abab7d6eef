//! A layer with frozen base weights and any number of attached adapters.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use candle_nn::{Module, VarBuilder};
use lora_kernels::{Added, Compute, Conv2dParams};

use crate::adapter::{Adapter, LowRank};
use crate::control::Control;
use crate::held::Held;

/// What a layer does with its weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LayerOp {
    /// `y = x W^T + b`, weight `[o, i]`.
    Linear,
    /// Convolution, weight `[o, i / groups, kh, kw]`.
    Conv2d(Conv2dParams),
    /// Normalization over the last axis, weight `[c]`.
    LayerNorm {
        /// Added to the variance.
        eps: f64,
    },
    /// Normalization over channel groups of `[n, c, h, w]`, weight `[c]`.
    GroupNorm {
        /// Number of groups.
        groups: usize,
        /// Added to the variance.
        eps: f64,
    },
}

impl LayerOp {
    /// Applies the operation with the given weight and bias.
    ///
    /// Normalization statistics are computed in f32 whatever the dtype of `x`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn apply(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match *self {
            LayerOp::Linear => lora_kernels::linear(x, weight, bias),
            LayerOp::Conv2d(params) => lora_kernels::conv2d(x, weight, bias, params),
            LayerOp::LayerNorm { eps } => {
                lora_kernels::layer_norm(x, weight, &shift(bias, weight)?, eps)
            }
            LayerOp::GroupNorm { groups, eps } => {
                lora_kernels::group_norm(x, weight, &shift(bias, weight)?, groups, eps, false)
            }
        }
    }

    /// The axis of the layer's outputs, or channels, in its result of `rank` axes.
    pub(crate) fn output_axis(&self, rank: usize) -> usize {
        match self {
            LayerOp::Conv2d(_) | LayerOp::GroupNorm { .. } => 1,
            _ => rank.saturating_sub(1),
        }
    }

    /// Whether this is a normalization layer.
    pub fn is_norm(&self) -> bool {
        matches!(self, LayerOp::LayerNorm { .. } | LayerOp::GroupNorm { .. })
    }
}

/// The bias, or zeros.
fn shift(bias: Option<&Tensor>, weight: &Tensor) -> Result<Tensor> {
    bias.map_or_else(|| weight.zeros_like(), |bias| Ok(bias.clone()))
}

/// Frozen weight, bias and operation: what adapters change.
#[derive(Debug, Clone)]
pub struct BaseLayer {
    /// The weight.
    pub weight: Tensor,
    /// The bias, if the layer has one.
    pub bias: Option<Tensor>,
    /// What the layer does with them.
    pub op: LayerOp,
    /// What its products, and those of adapters' low-rank branches, are computed in.
    pub compute: Compute,
}

impl BaseLayer {
    /// A layer that computes in f32.
    pub fn new(weight: Tensor, bias: Option<Tensor>, op: LayerOp) -> Self {
        Self {
            weight,
            bias,
            op,
            compute: Compute::F32,
        }
    }

    /// The weight in `dtype`, for adapters that compute with it; a norm's as it is.
    pub(crate) fn weight_in(&self, dtype: DType) -> Result<Tensor> {
        match self.op.is_norm() {
            true => Ok(self.weight.clone()),
            false => self.weight.to_dtype(dtype),
        }
    }
}

/// A linear, convolution or normalization layer that adapters can be attached to.
///
/// Without an attached adapter it is an ordinary layer. The base weight is never
/// written to, except by [`AdapterSet::merge`](crate::AdapterSet::merge).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::{Module, VarBuilder};
/// use lora_core::Layer;
/// # let weights = [("fc.weight".to_string(), Tensor::new(&[[1f32, 2.]], &Device::Cpu)?),
/// #   ("fc.bias".to_string(), Tensor::new(&[0.5f32], &Device::Cpu)?)].into_iter().collect();
/// let vb = VarBuilder::from_tensors(weights, candle_core::DType::F32, &Device::Cpu);
/// let layer = Layer::linear(2, 1, vb.pp("fc"))?;
/// assert_eq!(layer.path(), "fc");
/// let y = layer.forward(&Tensor::new(&[[3f32, 4.]], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[11.5]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Layer {
    path: String,
    base: BaseLayer,
    attached: Vec<Attachment>,
}

/// One adapter on one layer.
#[derive(Debug, Clone)]
pub(crate) struct Attachment {
    pub(crate) name: Arc<str>,
    pub(crate) adapter: Arc<dyn Adapter>,
    pub(crate) control: Arc<Control>,
}

impl Layer {
    /// A layer from its parts. `path` is its dotted place in the model, from which
    /// adapter files derive its name.
    pub fn new(path: impl Into<String>, base: BaseLayer) -> Self {
        Self {
            path: path.into(),
            base,
            attached: Vec::new(),
        }
    }

    /// Reads `weight` `[o, i]` and `bias` `[o]`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn linear(in_features: usize, out_features: usize, vb: VarBuilder<'_>) -> Result<Self> {
        let bias = Some(vb.get(out_features, "bias")?);
        let weight = vb.get((out_features, in_features), "weight")?;
        Ok(Self::new(
            vb.prefix(),
            BaseLayer::new(weight, bias, LayerOp::Linear),
        ))
    }

    /// Reads `weight` `[o, i]`; no bias.
    ///
    /// # Errors
    /// When the tensor is missing or has another shape.
    pub fn linear_no_bias(
        in_features: usize,
        out_features: usize,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let weight = vb.get((out_features, in_features), "weight")?;
        Ok(Self::new(
            vb.prefix(),
            BaseLayer::new(weight, None, LayerOp::Linear),
        ))
    }

    /// Reads `weight` `[o, i / groups, k, k]` and `bias` `[o]`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn conv2d(
        i: usize,
        o: usize,
        kernel: usize,
        params: Conv2dParams,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let weight = vb.get((o, i / params.groups.max(1), kernel, kernel), "weight")?;
        let bias = Some(vb.get(o, "bias")?);
        Ok(Self::new(
            vb.prefix(),
            BaseLayer::new(weight, bias, LayerOp::Conv2d(params)),
        ))
    }

    /// Reads `weight` and `bias` `[c]` of a layer norm.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn layer_norm(channels: usize, eps: f64, vb: VarBuilder<'_>) -> Result<Self> {
        Self::norm(channels, LayerOp::LayerNorm { eps }, vb)
    }

    /// Reads `weight` and `bias` `[c]` of a group norm.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn group_norm(
        groups: usize,
        channels: usize,
        eps: f64,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            candle_core::bail!(
                "{}: {channels} channels cannot be split into {groups} groups",
                vb.prefix()
            );
        }
        Self::norm(channels, LayerOp::GroupNorm { groups, eps }, vb)
    }

    fn norm(channels: usize, op: LayerOp, vb: VarBuilder<'_>) -> Result<Self> {
        let weight = vb.get(channels, "weight")?;
        let bias = Some(vb.get(channels, "bias")?);
        Ok(Self::new(vb.prefix(), BaseLayer::new(weight, bias, op)))
    }

    /// The layer's dotted place in its model, such as `mid_block.resnets.0.conv1`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Weight, bias and operation.
    pub fn base(&self) -> &BaseLayer {
        &self.base
    }

    /// What products are computed in; f32 at first.
    pub fn compute(&self) -> Compute {
        self.base.compute
    }

    /// Chooses what products with the base weight, and those of low-rank branches, are computed
    /// in. Weights that other adapters compute, and norms, stay in f32.
    pub fn set_compute(&mut self, compute: Compute) {
        self.base.compute = compute;
    }

    /// Replaces the base weight and bias; for merging.
    pub(crate) fn set_base(&mut self, weight: Tensor, bias: Option<Tensor>) {
        self.base.weight = weight;
        self.base.bias = bias;
    }

    pub(crate) fn attach(&mut self, attachment: Attachment) {
        self.attached.push(attachment);
    }

    /// Removes what the owner of `control` attached.
    pub(crate) fn detach(&mut self, control: &Arc<Control>) {
        self.attached.retain(|a| !Arc::ptr_eq(&a.control, control));
    }

    /// The layer's output passed through SiLU; in one pass for a group norm without
    /// adapters.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        match (&self.base.op, &self.base.bias) {
            (LayerOp::GroupNorm { groups, eps }, Some(bias)) if self.attached.is_empty() => {
                lora_kernels::group_norm(x, &self.base.weight, bias, *groups, *eps, true)
            }
            _ => lora_kernels::silu(&self.forward(x)?),
        }
    }

    /// [`forward`](Module::forward) with more added in the same pass: `shift` `[n, o]`, the
    /// same for all pixels (convolutions only), and `residual` in the shape of the output.
    /// Where the base weight is stored in 16 bits it is widened for the call.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward_added(
        &self,
        x: &Tensor,
        shift: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        // Low-rank branches are added to the base product; others follow.
        let (mut low_rank, mut branches) = (Vec::new(), Vec::new());
        let mut multiplied = None;
        for attachment in &self.attached {
            let multiplier = attachment.control.multiplier();
            if multiplier == 0.0 {
                continue;
            }
            let adapter = attachment.adapter.as_ref();
            attachment.control.with_pass(&attachment.name, |pass| {
                match adapter.low_rank(x, &self.base, multiplier, pass)? {
                    Some(product) if product.outputs.is_none() => low_rank.push(product),
                    // The layer's own product can be multiplied once.
                    Some(product) if multiplied.is_none() => multiplied = Some(product),
                    _ => branches.push(adapter.branch(x, &self.base, multiplier, pass)?),
                }
                Ok::<(), candle_core::Error>(())
            })?;
        }
        if let Some(product) = multiplied
            && let Some(outputs) = product.outputs.clone()
        {
            for other in low_rank {
                branches.push(other.apply(x, &self.base)?);
            }
            branches.extend(residual.cloned());
            return self.forward_multiplied(x, product, &outputs, &branches, shift);
        }
        branches.extend(residual.cloned());
        // One is added in the same pass.
        let (first, others) = branches.split_first().unzip();
        let [low_rank, factors] = LowRank::sorted(low_rank);
        let added = Added {
            low_rank: &low_rank,
            factors: &factors,
            residual: first,
            shift,
        };
        let BaseLayer { bias, op, .. } = &self.base;
        let mut y = match *op {
            LayerOp::Linear | LayerOp::Conv2d(_) => self.product(x, bias.as_ref(), &added)?,
            _ if shift.is_some() || !(low_rank.is_empty() && factors.is_empty()) => {
                candle_core::bail!("{}: norms take neither shift nor low rank", self.path)
            }
            _ => {
                let y = op.apply(x, &self.base.weight, bias.as_ref())?;
                match added.residual {
                    Some(residual) => lora_kernels::add(&y, residual)?,
                    None => y,
                }
            }
        };
        for branch in others.into_iter().flatten() {
            y = lora_kernels::add(&y, branch)?;
        }
        Ok(y)
    }

    /// The product of a linear layer or convolution with the base weight, and what is added.
    fn product(&self, x: &Tensor, bias: Option<&Tensor>, added: &Added<'_>) -> Result<Tensor> {
        let weight = &self.base.weight;
        match self.base.op {
            LayerOp::Conv2d(params) => {
                lora_kernels::conv2d_added(x, weight, bias, params, self.base.compute, added)
            }
            _ => lora_kernels::linear_added(x, weight, bias, self.base.compute, added),
        }
    }

    /// [`forward_added`](Self::forward_added) where an adapter multiplies the layer's own product
    /// and its low-rank branch by `outputs` `[o]`.
    fn forward_multiplied(
        &self,
        x: &Tensor,
        product: LowRank,
        outputs: &Tensor,
        branches: &[Tensor],
        shift: Option<&Tensor>,
    ) -> Result<Tensor> {
        let [low_rank, factors] = LowRank::sorted(vec![product]);
        let added = Added {
            low_rank: &low_rank,
            factors: &factors,
            ..Added::default()
        };
        let y = self.product(x, None, &added)?;
        let (first, others) = branches.split_first().unzip();
        let (axis, bias) = (self.base.op.output_axis(y.rank()), self.base.bias.as_ref());
        let mut y = lora_kernels::scale_channels(&y, axis, outputs, bias, first)?;
        if let Some(shift) = shift {
            y = lora_kernels::add_to_channels(&y, shift)?;
        }
        for branch in others.into_iter().flatten() {
            y = lora_kernels::add(&y, branch)?;
        }
        Ok(y)
    }

    /// What a training step holds for one pass of this layer over `rows` pixels or tokens
    /// of all pictures together, counted in its output: an estimate.
    pub fn held(&self, rows: usize) -> Held {
        let outputs = self.base.weight.dims().first().copied().unwrap_or(0);
        let own = Held {
            kept: outputs * rows,
            backward: 0,
        };
        own.then(self.held_by_adapters(rows))
    }

    /// [`held`](Self::held) without the layer's output.
    pub fn held_by_adapters(&self, rows: usize) -> Held {
        self.attached
            .iter()
            .filter(|a| a.control.multiplier() != 0.0)
            .fold(Held::default(), |held, a| {
                held.then(a.adapter.held(&self.base, rows))
            })
    }

    /// How many adapters are attached.
    pub fn attached(&self) -> usize {
        self.attached.len()
    }
}

impl Module for Layer {
    /// The base layer's output plus the branch of every attached adapter.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_added(x, None, None)
    }
}

/// A model whose layers can take adapters: a hand-written visitor in declaration
/// order.
///
/// ```
/// use lora_core::{Adaptable, Component, Layer};
/// struct Mlp { fc1: Layer, fc2: Layer }
/// impl Adaptable for Mlp {
///     fn component(&self) -> Component { Component::Custom("lora_mlp".into()) }
///     fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut Layer) -> lora_core::Result<()>) -> lora_core::Result<()> {
///         visit(&mut self.fc1)?;
///         visit(&mut self.fc2)
///     }
/// }
/// ```
pub trait Adaptable {
    /// Which part of a pipeline this model is: decides the prefix of names in files.
    fn component(&self) -> crate::Component;

    /// Calls `visit` with every layer, always in the same order.
    ///
    /// # Errors
    /// The first error that `visit` returns.
    fn visit_layers(
        &mut self,
        visit: &mut dyn FnMut(&mut Layer) -> crate::Result<()>,
    ) -> crate::Result<()>;

    /// [`Layer::set_compute`] for every layer.
    ///
    /// # Errors
    /// Those of [`visit_layers`](Self::visit_layers).
    fn set_compute(&mut self, compute: Compute) -> crate::Result<()> {
        self.visit_layers(&mut |layer| {
            layer.set_compute(compute);
            Ok(())
        })
    }
}
