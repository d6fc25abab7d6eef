//! DoRA, weight decomposition: the magnitude of every output row (or input column) of
//! the adapted weight is a parameter of its own.
//!
//! With `D` the scaled delta of a LoRA, LoHa or LoKr, `V = W + D`, `n` the norms of `V`
//! over all axes but one and `s` the magnitudes: `W' = V s / n` at multiplier 1. What
//! other multipliers mean is [`DoraMultiplier`].
//!
//! `dora_scale` `[o, 1]` or `[o, 1, 1, 1]`: norms per output; `[1, i]` or `[1, i, 1, 1]`:
//! per input (LyCORIS before 3.2). Paper: Liu et al. 2024. Fresh magnitudes are the norms
//! of `W`. The gradient goes through `n`, as in LyCORIS; the paper and PEFT hold `n`
//! constant, see [`Reading::detached_norm`].

use std::sync::{Arc, Mutex};

use candle_core::{DType, Result, Tensor, TensorId};
use rand::RngCore;

use super::{Entry, FAMILIES, Fresh, Parts, beside, entry, held_with_product, middle, precision};
use crate::Error;
use crate::adapter::{Adapter, DoraMultiplier, Family, LowRank, Reading};
use crate::control::Pass;
use crate::held::Held;
use crate::layer::BaseLayer;

pub(super) const ENTRY: Entry = Entry {
    family: Family::Dora,
    detect: |parts| parts.has("dora_scale"),
    read,
    create,
};

/// Which norms the magnitudes replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Axis {
    Output,
    Input,
}

impl Axis {
    /// Norms of a weight over every axis but this one, in a shape that broadcasts.
    fn norms(self, weight: &Tensor) -> Result<Tensor> {
        let kept = usize::from(self == Axis::Input);
        let others: Vec<usize> = (0..weight.rank()).filter(|axis| *axis != kept).collect();
        weight.sqr()?.sum_keepdim(others)?.sqrt()
    }
}

/// A LoRA, LoHa or LoKr with magnitudes.
///
/// ```
/// use std::sync::Arc;
/// use candle_core::{Device, Tensor};
/// use lora_core::{Adapter, Dora, Lora};
/// let down = Tensor::new(&[[0f32, 4.]], &Device::Cpu)?;
/// let up = Tensor::new(&[[1f32]], &Device::Cpu)?;
/// let lora = Arc::new(Lora::new("fc", down, None, up, 1.0)?);
/// let dora = Dora::new("fc", lora, Tensor::new(&[[10f32]], &Device::Cpu)?)?;
/// let base = Tensor::new(&[[3f32, 0.]], &Device::Cpu)?;
/// // V = [3, 4] has norm 5, so W' = [6, 8].
/// assert_eq!(dora.delta(&base, 1.0)?.to_vec2::<f32>()?, [[3., 8.]]);
/// assert_eq!(dora.delta(&base, 0.5)?.to_vec2::<f32>()?, [[1.5, 4.]]);
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Dora {
    inner: Arc<dyn Adapter>,
    scale: Tensor,
    axis: Axis,
    reading: Reading,
    /// Squared norms of the rows of the weight with this id.
    squares: Arc<Mutex<Option<(TensorId, Tensor)>>>,
}

impl Dora {
    /// From the adapter of the direction and the magnitudes, whose shape tells the
    /// axis. `layer` is for messages.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for magnitudes of another shape.
    pub fn new(layer: &str, inner: Arc<dyn Adapter>, scale: Tensor) -> crate::Result<Self> {
        let (outputs, inputs) = inner.matrix_dims();
        let axis = match *scale.dims() {
            [o] | [o, 1] | [o, 1, 1, 1] if o == outputs => Axis::Output,
            [1, i] | [1, i, 1, 1] if i > 0 && inputs.is_multiple_of(i) => Axis::Input,
            _ => {
                return Err(Error::ShapeMismatch {
                    layer: layer.into(),
                    tensor: "dora_scale".into(),
                    expected: format!("[{outputs}, 1] or [1, inputs]"),
                    got: scale.dims().to_vec(),
                });
            }
        };
        Ok(Self {
            inner,
            scale,
            axis,
            reading: Reading::default(),
            squares: Arc::default(),
        })
    }

    /// `weight` with its norms replaced by the magnitudes, as the factor `s / n`. `norm`
    /// is the tensor whose norms count.
    fn ratio(&self, norm: &Tensor) -> Result<Tensor> {
        self.ratio_of(self.axis.norms(norm)?)
    }

    /// The magnitudes by these norms, in their shape.
    fn ratio_of(&self, norms: Tensor) -> Result<Tensor> {
        let eps = match norms.dtype() {
            DType::F64 => f64::EPSILON,
            _ => f64::from(f32::EPSILON),
        };
        let mut norms = (norms + eps)?;
        if self.reading.detached_norm {
            norms = norms.detach();
        }
        let scale = self.scale.reshape(norms.shape())?;
        scale.to_dtype(norms.dtype())?.div(&norms)
    }

    /// The squared norms of the base weight's rows, `[o]`, f32; computed once per weight.
    fn squares(&self, weight: &Tensor) -> Result<Tensor> {
        let mut known = self.squares.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((id, squares)) = known.as_ref()
            && *id == weight.id()
        {
            return Ok(squares.clone());
        }
        let rows = weight.detach().flatten_from(1)?.to_dtype(DType::F32)?;
        let squares = rows.sqr()?.sum(1)?;
        *known = Some((weight.id(), squares.clone()));
        Ok(squares)
    }
}

impl Adapter for Dora {
    fn family(&self) -> Family {
        Family::Dora
    }

    fn rank(&self) -> Option<usize> {
        self.inner.rank()
    }

    fn alpha(&self) -> Option<f64> {
        self.inner.alpha()
    }

    fn matrix_dims(&self) -> (usize, usize) {
        self.inner.matrix_dims()
    }

    fn check(&self, layer: &str, weight: &[usize]) -> crate::Result<()> {
        self.inner.check(layer, weight)?;
        let count = self.scale.elem_count();
        let kept = usize::from(self.axis == Axis::Input);
        if weight.get(kept) == Some(&count) {
            return Ok(());
        }
        Err(Error::ShapeMismatch {
            layer: layer.into(),
            tensor: "dora_scale".into(),
            expected: format!("one magnitude per entry of axis {kept} of {weight:?}"),
            got: self.scale.dims().to_vec(),
        })
    }

    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        let weight = base.to_dtype(precision(base))?;
        let inside = match self.reading.dora {
            DoraMultiplier::ScaleInside => multiplier,
            _ => 1.0,
        };
        let adapted = (&weight + self.inner.delta(&weight, inside)?)?;
        let ratio = match (self.reading.dora, self.axis) {
            (DoraMultiplier::BaseNorm, Axis::Output) => self.ratio(&weight)?,
            _ => self.ratio(&adapted)?,
        };
        let delta = match self.reading.dora {
            DoraMultiplier::Interpolate | DoraMultiplier::BaseNorm => {
                ((adapted.broadcast_mul(&ratio)? - weight)? * multiplier)?
            }
            DoraMultiplier::ScaleInside => (adapted.broadcast_mul(&ratio)? - weight)?,
            DoraMultiplier::Lycoris => {
                let ratio = (((ratio - 1.0)? * multiplier)? + 1.0)?;
                (adapted.broadcast_mul(&ratio)? - weight)?
            }
        };
        delta.to_dtype(base.dtype())
    }

    /// At multiplier 1, where all readings agree about the product of `V` and `x`: `s / n`
    /// times the products of `W` and of a low-rank `D`.
    fn low_rank(
        &self,
        x: &Tensor,
        layer: &BaseLayer,
        multiplier: f64,
        _pass: Option<&Pass<'_>>,
    ) -> Result<Option<LowRank>> {
        if multiplier != 1.0 || self.axis != Axis::Output || layer.weight.dtype() == DType::F64 {
            return Ok(None);
        }
        let Some((up, down)) = self.inner.product()? else {
            return Ok(None);
        };
        let Some(middle) = middle(x, &down, layer)? else {
            return Ok(None);
        };
        let squares = self.squares(&layer.weight)?;
        let squares = match self.reading.dora {
            DoraMultiplier::BaseNorm => squares,
            // |W + U D|^2, row by row, without the sum of weight and delta.
            _ => {
                let weight = layer.weight.flatten_from(1)?;
                let crossed = lora_kernels::linear(&down, &weight, None)?.t()?;
                let own =
                    lora_kernels::linear(&up, &lora_kernels::linear(&down, &down, None)?, None)?;
                let terms = (((crossed * 2.0)? + own)? * &up)?.sum(1)?;
                // Rounding must not make a row of zeros negative.
                (squares + terms)?.relu()?
            }
        };
        let outputs = self.ratio_of(squares.sqrt()?)?;
        Ok(Some(LowRank {
            middle,
            up: up.to_dtype(x.dtype())?,
            outputs: Some(outputs.to_dtype(x.dtype())?),
        }))
    }

    fn held(&self, layer: &BaseLayer, rows: usize) -> Held {
        let (outputs, inputs) = self.matrix_dims();
        let weight = outputs * inputs;
        // A weight of 16 bits is widened.
        let widened = usize::from(layer.weight.dtype() != DType::F32) * weight;
        let product = self.inner.product().ok().flatten();
        if let (Axis::Output, Some((_, down))) = (self.axis, product) {
            let rank = down.dims().first().copied().unwrap_or(0);
            let product = held_with_product(rank, self.matrix_dims(), rows);
            return Held {
                // The product before it is multiplied.
                kept: outputs * rows + product.kept,
                backward: outputs * rows + product.backward.max(widened),
            };
        }
        Held {
            // The branch's sum with the layer's own product is the output.
            kept: 0,
            // The inner delta and what it is scaled from, weight plus delta, its squares, the same
            // scaled, the difference to the weight, that scaled, and gradients.
            backward: widened + 12 * weight,
        }
    }

    fn factors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut factors = self.inner.factors();
        factors.push(("dora_scale", &self.scale));
        factors
    }

    fn constants(&self) -> Result<Vec<(&'static str, Tensor)>> {
        self.inner.constants()
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Self {
            inner: self.inner.map(f)?,
            scale: f(&self.scale)?,
            ..self.clone()
        }))
    }

    fn rescale(&self, ratio: f64) -> Result<f64> {
        self.inner.rescale(ratio)
    }

    fn norm(&self) -> Result<Option<f64>> {
        self.inner.norm()
    }

    fn read_as(&self, reading: &Reading) -> Option<Arc<dyn Adapter>> {
        Some(Arc::new(Self {
            reading: *reading,
            ..self.clone()
        }))
    }
}

/// The families that can be decomposed.
fn decomposable(family: Family) -> bool {
    matches!(family, Family::Lora | Family::Loha | Family::Lokr)
}

fn read(parts: &mut Parts<'_>) -> crate::Result<Arc<dyn Adapter>> {
    let scale = parts.require("dora_scale")?;
    let inner = FAMILIES
        .iter()
        .find(|e| decomposable(e.family) && (e.detect)(parts));
    let Some(inner) = inner else {
        return Err(parts.missing("lora_down.weight, hada_w1_a or lokr_w1 beside dora_scale"));
    };
    let inner = beside::with_residual((inner.read)(parts)?, parts)?;
    Ok(Arc::new(Dora::new(parts.layer, inner, scale)?))
}

fn create(fresh: &Fresh<'_>, rng: &mut dyn RngCore) -> crate::Result<Arc<dyn Adapter>> {
    let family = match fresh.config.family {
        Family::Dora => Family::Lora,
        family => family,
    };
    let inner = (entry(family).create)(fresh, rng)?;
    let axis = if fresh.config.wd_on_output {
        Axis::Output
    } else {
        Axis::Input
    };
    let scale = axis.norms(&fresh.base.weight.to_dtype(DType::F32)?)?;
    Ok(Dora::new(fresh.layer, inner, scale)?.trainable()?)
}
