//! What every adapter family has in common.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use lora_kernels::{Added, Compute};

use crate::control::Pass;
use crate::held::Held;
use crate::layer::{BaseLayer, LayerOp};

/// An adapter family: the formula by which factors become a weight change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Low-rank product `up down` (Hu et al. 2021), with LoCon's convolutions.
    Lora,
    /// Elementwise product of two low-rank products (Hyeon-Woo et al. 2021).
    Loha,
    /// Kronecker product (Yeh et al. 2023).
    Lokr,
    /// LoRA, LoHa or LoKr with learned magnitudes (Liu et al. 2024).
    Dora,
    /// Learned factors on outputs or inputs, (IA)^3 (Liu et al. 2022).
    Ia3,
    /// Low-rank change that also multiplies the base weight (Chavan et al. 2023).
    Glora,
    /// Block rotations of the outputs, Diag-OFT (Qiu et al. 2023).
    Oft,
    /// Butterfly rotations of the outputs (Liu et al. 2023).
    Boft,
    /// The whole weight difference.
    Full,
    /// Weight and bias differences of normalization layers.
    Norm,
    /// Block rotations as sd-scripts' `networks.oft` trains them.
    KohyaOft,
    /// Low-rank product counted from the base weight's own largest directions.
    Tlora,
}

impl Family {
    /// The name in LyCORIS' `algo=` option.
    pub fn name(self) -> &'static str {
        match self {
            Family::Lora => "lora",
            Family::Loha => "loha",
            Family::Lokr => "lokr",
            Family::Dora => "dora",
            Family::Ia3 => "ia3",
            Family::Glora => "glora",
            Family::Oft => "diag-oft",
            Family::Boft => "boft",
            Family::Full => "full",
            Family::Norm => "norm",
            Family::KohyaOft => "kohya-oft",
            Family::Tlora => "tlora",
        }
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a multiplier other than 1 means for DoRA; programs disagree. `V` is the adapted
/// weight, `s` the magnitudes, `n` the norms of `V`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DoraMultiplier {
    /// `W + m (V s / n - W)`: the web UI's; 0 gives `W`.
    #[default]
    Interpolate,
    /// `V (1 + m (s / n - 1))`: LyCORIS'; 0 gives `V`.
    Lycoris,
    /// `V_m s / |V_m|` with `V_m = W + m D`: PEFT's and diffusers'; 0 gives `W s / |W|`.
    ScaleInside,
    /// As `Interpolate`, with the norms of `W` instead of `V` where magnitudes are per
    /// output: ComfyUI's.
    BaseNorm,
}

/// Choices among the meanings that programs give to the same file. The default is the
/// meaning that agrees with training at multiplier 1 and leaves the base at 0.
///
/// ```
/// use lora_core::{DoraMultiplier, Reading};
/// let lycoris = Reading { dora: DoraMultiplier::Lycoris, ..Reading::default() };
/// assert_ne!(lycoris, Reading::default());
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reading {
    /// DoRA: what the multiplier means.
    pub dora: DoraMultiplier,
    /// DoRA: the gradient takes the norms as constants, as the paper and PEFT do.
    pub detached_norm: bool,
    /// (IA)^3 on outputs, OFT, BOFT: the layer's bias is changed like its outputs, as in
    /// LyCORIS' bypass mode.
    pub through_bias: bool,
    /// BOFT: the multiplier interpolates the resulting weight, as in the web UI, not each
    /// stage.
    pub boft_interpolate: bool,
}

/// One layer's adapter.
///
/// [`delta`](Adapter::delta) defines what it means; every other path agrees with
/// it. Shapes: linear weight `[o, i]`, convolution weight `[o, i / groups, kh, kw]`.
///
/// A family says its formula, its sizes and its factors; saving, training and checking
/// follow from these.
pub trait Adapter: Debug + Send + Sync {
    /// The family.
    fn family(&self) -> Family;

    /// The rank read from the factors, for families that have one.
    fn rank(&self) -> Option<usize> {
        None
    }

    /// `alpha`, for families that have one.
    fn alpha(&self) -> Option<f64> {
        None
    }

    /// What the factors' product is multiplied by: `alpha / rank`, or 1 without a rank.
    fn scale(&self) -> f64 {
        match (self.rank(), self.alpha()) {
            (Some(rank), Some(alpha)) => alpha / rank.max(1) as f64,
            _ => 1.0,
        }
    }

    /// Outputs, and inputs times kernel area, of the weights this adapter is for.
    fn matrix_dims(&self) -> (usize, usize);

    /// Kernel height and width, where the factors tell.
    fn kernel(&self) -> Option<(usize, usize)> {
        None
    }

    /// Whether this adapter fits a layer whose weight has these dimensions.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`](crate::Error::ShapeMismatch), naming `layer`, the factors
    /// and their shapes.
    fn check(&self, layer: &str, weight: &[usize]) -> crate::Result<()> {
        let (o, i) = self.matrix_dims();
        let sizes = weight.first() == Some(&o) && weight.iter().skip(1).product::<usize>() == i;
        let kernel = match (self.kernel(), weight) {
            (Some(own), [_, _, kh, kw]) => own == (*kh, *kw),
            (Some(own), _) => own == (1, 1),
            (None, _) => true,
        };
        if sizes && kernel {
            return Ok(());
        }
        Err(misfit(layer, &self.factors(), weight, vec![o, i]))
    }

    /// Weight change for `base`, in its shape and dtype, scale (`alpha / rank`) and
    /// multiplier included. Additive families ignore the values of `base`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor>;

    /// Bias change, for the families that have one.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn bias_delta(&self, _bias: Option<&Tensor>, _multiplier: f64) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// What the adapter adds to the layer's output for input `x`. The default runs
    /// the layer's operation with [`delta`](Adapter::delta), which it computes again in the
    /// backward pass instead of keeping it. The layer's weight may be stored in 16 bits.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn branch(
        &self,
        x: &Tensor,
        layer: &BaseLayer,
        multiplier: f64,
        _pass: Option<&Pass<'_>>,
    ) -> Result<Tensor> {
        let Some(bias) = self.bias_delta(layer.bias.as_ref(), multiplier)? else {
            return crate::family::delta_branch(self, x, layer, multiplier);
        };
        let delta = self.delta(&layer.weight_in(x.dtype())?, multiplier)?;
        layer.op.apply(x, &delta, Some(&bias))
    }

    /// The branch as a product that the layer adds to its own in one pass. `None`, the
    /// default, where [`branch`](Adapter::branch) is not of that form, or would be more work
    /// in it.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn low_rank(
        &self,
        _x: &Tensor,
        _layer: &BaseLayer,
        _multiplier: f64,
        _pass: Option<&Pass<'_>>,
    ) -> Result<Option<LowRank>> {
        Ok(None)
    }

    /// What a training step holds for this adapter on a layer, for `rows` pixels or tokens of
    /// all pictures together: an estimate, in values. The default is for a [`branch`](Adapter::branch) that builds the
    /// delta.
    fn held(&self, layer: &BaseLayer, rows: usize) -> Held {
        crate::family::held_with_delta(self.matrix_dims(), layer, rows)
    }

    /// The factors in a fixed order, named by file suffix (`lora_down.weight`, ...): what
    /// is trained and saved.
    fn factors(&self) -> Vec<(&'static str, &Tensor)>;

    /// The same adapter with each factor, in the order of [`factors`](Adapter::factors),
    /// replaced by `f` of it. `f` must keep the shape.
    ///
    /// # Errors
    /// Those of `f`.
    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Arc<dyn Adapter>>;

    /// The numbers that a file holds beside the factors; `alpha` for families that have
    /// one.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    fn constants(&self) -> Result<Vec<(&'static str, Tensor)>> {
        self.alpha()
            .map(|alpha| Ok(("alpha", Tensor::new(alpha as f32, &Device::Cpu)?)))
            .into_iter()
            .collect()
    }

    /// The trainable factors; empty for an adapter loaded for inference.
    fn vars(&self) -> Vec<(&'static str, Var)> {
        self.factors()
            .into_iter()
            .filter_map(|(name, factor)| Some((name, var(factor)?)))
            .collect()
    }

    /// What a file holds: factors and constants.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let factors = self.factors().into_iter().map(|(n, t)| (n, t.clone()));
        Ok(factors.chain(self.constants()?).collect())
    }

    /// The same adapter with factors that record gradients, as f32.
    ///
    /// # Errors
    /// When the factors cannot be copied.
    fn trainable(&self) -> Result<Arc<dyn Adapter>> {
        self.map(&mut |factor| {
            Ok(Var::from_tensor(&factor.detach().to_dtype(DType::F32)?)?.into_inner())
        })
    }

    /// Number of values in all factors.
    fn parameter_count(&self) -> usize {
        self.factors().iter().map(|(_, t)| t.elem_count()).sum()
    }

    /// Frobenius norm of the delta at multiplier 1, for families whose delta does not
    /// depend on the base weight; of DoRA's direction, its delta before the magnitudes.
    ///
    /// # Errors
    /// When the delta cannot be computed.
    fn norm(&self) -> Result<Option<f64>> {
        let base = Tensor::zeros(self.matrix_dims(), DType::F32, &Device::Cpu)?;
        let delta = self.delta(&base, 1.0)?.detach().to_dtype(DType::F64)?;
        Ok(Some(delta.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()))
    }

    /// The delta at multiplier 1 as a product `up` `[o, r]` times `down`
    /// `[r, i kh kw]`, f32, scale included in `up`, in the graph of the factors; `None` where
    /// it is not one whose rank the factors show, or working with it is no less than with
    /// the delta.
    ///
    /// # Errors
    /// When the factors cannot be read.
    fn product(&self) -> Result<Option<(Tensor, Tensor)>> {
        Ok(None)
    }

    /// The same factors under another reading; `None` for families that all programs
    /// read alike.
    fn read_as(&self, _reading: &Reading) -> Option<Arc<dyn Adapter>> {
        None
    }

    /// Multiplies the delta by `ratio`, spread evenly over the factors in place; for
    /// max-norm scaling. Does nothing to an adapter loaded for inference. Returns the
    /// number each factor was multiplied by.
    ///
    /// # Errors
    /// When a factor cannot be written.
    fn rescale(&self, ratio: f64) -> Result<f64> {
        let vars = self.vars();
        let factor = ratio.powf(1.0 / vars.len().max(1) as f64);
        multiply(vars, factor)?;
        Ok(factor)
    }
}

/// A branch as a product: what [`Adapter::low_rank`] returns.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// What `up` multiplies.
    pub middle: Middle,
    /// `[o, r]`.
    pub up: Tensor,
    /// `[o]`, of DoRA: the layer's product with its weight and this branch are multiplied by
    /// it, output by output. The bias is not.
    pub outputs: Option<Tensor>,
}

/// The first half of a [`LowRank`] branch.
#[derive(Debug, Clone)]
pub enum Middle {
    /// What `down` `[r, i]` of a linear layer makes of the input, computed together with the layer.
    Down(Tensor),
    /// `[.., r]`, of a convolution `[n, r, h', w']`.
    Values(Tensor),
}

impl Middle {
    /// The values, for the input `x` of a layer that computes like this.
    pub(crate) fn values(self, x: &Tensor, compute: Compute) -> Result<Tensor> {
        match self {
            Self::Values(values) => Ok(values),
            Self::Down(down) => {
                lora_kernels::linear_added(x, &down, None, compute, &Added::default())
            }
        }
    }
}

impl LowRank {
    /// `up middle` as an output of the layer for the input `x`; without [`outputs`](Self::outputs).
    pub(crate) fn apply(self, x: &Tensor, layer: &BaseLayer) -> Result<Tensor> {
        let (middle, up) = (self.middle.values(x, layer.compute)?, self.up);
        match layer.op {
            LayerOp::Conv2d(_) => {
                let (o, r) = up.dims2()?;
                let up = up.reshape((o, r, 1, 1))?;
                lora_kernels::conv2d(&middle, &up, None, Default::default())
            }
            _ => lora_kernels::linear(&middle, &up, None),
        }
    }

    /// Sorts branches into what a layer's product takes: pairs of middle and up, and factors.
    pub(crate) fn sorted(all: Vec<Self>) -> [Vec<(Tensor, Tensor)>; 2] {
        let (mut pairs, mut factors) = (Vec::new(), Vec::new());
        for Self { middle, up, .. } in all {
            match middle {
                Middle::Values(values) => pairs.push((values, up)),
                Middle::Down(down) => factors.push((down, up)),
            }
        }
        [pairs, factors]
    }
}

/// Multiplies variables in place.
pub(crate) fn multiply(vars: Vec<(&'static str, Var)>, factor: f64) -> Result<()> {
    for (_, var) in vars {
        var.set(&(var.as_detached_tensor() * factor)?)?;
    }
    Ok(())
}

/// The error of factors that are for another layer.
pub(crate) fn misfit(
    layer: &str,
    factors: &[(&'static str, &Tensor)],
    weight: &[usize],
    got: Vec<usize>,
) -> crate::Error {
    let shapes: Vec<String> = factors
        .iter()
        .map(|(name, t)| format!("{name} {:?}", t.dims()))
        .collect();
    crate::Error::ShapeMismatch {
        layer: layer.to_string(),
        tensor: format!("the change by {}", shapes.join(", ")),
        expected: format!("one for the layer's weight {weight:?}"),
        got,
    }
}

/// The variable behind a factor, if it is one.
pub(crate) fn var(factor: &Tensor) -> Option<Var> {
    // For a variable `from_tensor` returns the same variable, not a copy.
    factor
        .is_variable()
        .then(|| Var::from_tensor(factor).ok())
        .flatten()
}
