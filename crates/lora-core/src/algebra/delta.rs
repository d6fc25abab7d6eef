//! One layer's change, whatever adapters it is the sum of, and its reduction to factors.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor};

use super::svd::matrix_dims;
use super::{RankRule, Svd, Weights};
use crate::adapter::{Adapter, Family};
use crate::family::Parts;
use crate::{Error, Result};

/// What became of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerReport {
    /// The layer's name in adapter files.
    pub layer: String,
    /// Rank of the result, for those that have one.
    pub rank: Option<usize>,
    /// Frobenius norm of the change that was wanted, multipliers included.
    pub norm: f64,
    /// Frobenius norm of what is missing from the result, divided by `norm`.
    pub error: f64,
}

/// The change of one layer, multipliers and scales included.
pub(crate) struct LayerDelta {
    pub(crate) layer: String,
    /// Dimensions of the layer's weight.
    pub(crate) dims: Vec<usize>,
    pub(crate) change: Change,
    pub(crate) bias: Option<Tensor>,
}

/// f32, on the CPU.
pub(crate) enum Change {
    /// `up` `[o, r]` times `down` `[r, n]`.
    Product(Tensor, Tensor),
    /// `[o, n]`.
    Dense(Tensor),
    /// Of a normalization layer, `[c]`.
    Norm(Tensor),
}

/// Whether a family's change can be computed without the base weight.
pub(crate) fn stands_alone(family: Family) -> bool {
    matches!(
        family,
        Family::Lora | Family::Loha | Family::Lokr | Family::Full | Family::Norm
    )
}

/// The dimensions of the weight that an adapter is for: of the base where there is one,
/// else as its factors show, else as Stable Diffusion 1.x has them by name.
pub(crate) fn weight_dims(
    layer: &str,
    adapter: &dyn Adapter,
    base: Option<&Weights>,
) -> Result<Vec<usize>> {
    if let Some(base) = base {
        let dims = base.require(layer)?.dims().to_vec();
        adapter.check(layer, &dims)?;
        return Ok(dims);
    }
    let (o, n) = adapter.matrix_dims();
    if adapter.family() == Family::Norm {
        return Ok(vec![o]);
    }
    let tensors = adapter.tensors()?;
    // A core tells the kernel better than a factor, which may be 1x1 beside it.
    let shown = |names: &[&str]| {
        tensors
            .iter()
            .find_map(|(name, tensor)| match *tensor.dims() {
                [.., kh, kw] if tensor.rank() == 4 && names.contains(name) => Some((kh, kw)),
                _ => None,
            })
    };
    let by_name = || {
        let ends = |list: &[&str]| list.iter().any(|end| layer.ends_with(end));
        if ends(&["_conv1", "_conv2", "_conv", "_conv_in", "_conv_out"]) && n % 9 == 0 {
            Some((3, 3))
        } else if ends(&["_proj_in", "_proj_out", "_conv_shortcut"]) {
            Some((1, 1))
        } else {
            None
        }
    };
    let kernel = shown(&["lora_mid.weight", "hada_t1", "lokr_t2"])
        .or_else(|| shown(&["lora_down.weight", "lokr_w2", "diff", "b2.weight"]))
        .or_else(by_name);
    Ok(match kernel {
        Some((kh, kw)) if kh * kw > 0 && n % (kh * kw) == 0 => vec![o, n / (kh * kw), kh, kw],
        _ => vec![o, n],
    })
}

impl LayerDelta {
    /// The sum of adapters on one layer.
    ///
    /// # Errors
    /// [`Error::NotPossible`] for families that need the base weight when there is none.
    pub(crate) fn sum(
        layer: &str,
        parts: &[(&dyn Adapter, f64)],
        base: Option<&Weights>,
    ) -> Result<Self> {
        let mut dims = Vec::new();
        for (adapter, _) in parts {
            let own = weight_dims(layer, *adapter, base)?;
            let same = |a: &[usize], b: &[usize]| {
                a.first() == b.first() && a.iter().product::<usize>() == b.iter().product::<usize>()
            };
            if !dims.is_empty() && !same(&dims, &own) {
                return Err(Error::ShapeMismatch {
                    layer: layer.into(),
                    tensor: format!("{} delta", adapter.family()),
                    expected: format!("the size of the other adapters' {dims:?}"),
                    got: own,
                });
            }
            if own.len() > dims.len() {
                dims = own;
            }
        }
        let bias = match base {
            Some(base) => base.bias(layer)?,
            None => None,
        };
        Ok(Self {
            layer: layer.to_string(),
            change: Self::change(layer, parts, base, &dims)?,
            bias: Self::bias_sum(parts, bias.as_ref(), &dims)?,
            dims,
        })
    }

    fn change(
        layer: &str,
        parts: &[(&dyn Adapter, f64)],
        base: Option<&Weights>,
        dims: &[usize],
    ) -> Result<Change> {
        let mut products = Vec::new();
        for (adapter, multiplier) in parts {
            if let Some((up, down)) = adapter.product()? {
                products.push(balanced((up.detach() * *multiplier)?, down.detach())?);
            }
        }
        if products.len() == parts.len() && !products.is_empty() {
            let (ups, downs): (Vec<_>, Vec<_>) = products.into_iter().unzip();
            return Ok(Change::Product(
                Tensor::cat(&ups, 1)?,
                Tensor::cat(&downs, 0)?,
            ));
        }
        let weight = match base {
            Some(base) => base.require(layer)?.to_dtype(DType::F32)?,
            None => {
                if let Some((adapter, _)) = parts.iter().find(|(a, _)| !stands_alone(a.family())) {
                    return Err(Error::NotPossible {
                        layer: layer.into(),
                        what: format!("{} without the base model", adapter.family()),
                        advice: "its change depends on the weight: name the checkpoint it was trained on",
                    });
                }
                Tensor::zeros(dims, DType::F32, &Device::Cpu)?
            }
        };
        let mut sum = weight.zeros_like()?;
        for (adapter, multiplier) in parts {
            sum = (sum + adapter.delta(&weight, *multiplier)?.detach())?;
        }
        if dims.len() < 2 {
            return Ok(Change::Norm(sum));
        }
        Ok(Change::Dense(sum.flatten_from(1)?))
    }

    fn bias_sum(
        parts: &[(&dyn Adapter, f64)],
        bias: Option<&Tensor>,
        dims: &[usize],
    ) -> Result<Option<Tensor>> {
        let zero = Tensor::zeros(dims.first().copied().unwrap_or(0), DType::F32, &Device::Cpu)?;
        let bias = bias.unwrap_or(&zero).to_dtype(DType::F32)?;
        let mut sum: Option<Tensor> = None;
        for (adapter, multiplier) in parts {
            if let Some(delta) = adapter.bias_delta(Some(&bias), *multiplier)? {
                let delta = delta.detach();
                sum = Some(match sum {
                    Some(sum) => (sum + delta)?,
                    None => delta,
                });
            }
        }
        Ok(sum)
    }

    /// The singular values and vectors that `rule` needs.
    pub(crate) fn svd(&self, rule: RankRule) -> Result<Svd> {
        match &self.change {
            Change::Product(up, down) if up.dim(1)? <= 512 => Svd::of_product(up, down),
            Change::Product(up, down) => Svd::for_rule(&up.matmul(down)?, rule),
            Change::Dense(matrix) => Svd::for_rule(matrix, rule),
            Change::Norm(row) => Svd::exact(&row.reshape((1, ()))?),
        }
    }

    /// The adapter without any loss: the factors, or the whole difference.
    pub(crate) fn exact(&self) -> Result<(Arc<dyn Adapter>, LayerReport)> {
        let report = |rank, norm| LayerReport {
            layer: self.layer.clone(),
            rank,
            norm,
            error: 0.0,
        };
        match &self.change {
            Change::Product(up, down) => {
                let rank = up.dim(1)?;
                let norm = product_dot((up, down), (up, down))?.max(0.0).sqrt();
                Ok((self.lora(up, down, rank as f64)?, report(Some(rank), norm)))
            }
            Change::Dense(matrix) => {
                let diff = matrix.reshape(self.dims.as_slice())?;
                Ok((
                    self.build([("diff".into(), diff)].into())?,
                    report(None, norm(matrix)?),
                ))
            }
            Change::Norm(row) => {
                let mut tensors: BTreeMap<String, Tensor> =
                    [("w_norm".to_string(), row.clone())].into();
                if let Some(bias) = &self.bias {
                    tensors.insert("b_norm".into(), bias.clone());
                }
                Ok((self.read(tensors)?, report(None, norm(row)?)))
            }
        }
    }

    /// The nearest LoRA of the rank that `rule` picks; normalization layers stay what
    /// they are. `alpha` is the rank.
    pub(crate) fn reduced(
        &self,
        rule: RankRule,
        most: Option<usize>,
    ) -> Result<(Arc<dyn Adapter>, LayerReport)> {
        if matches!(self.change, Change::Norm(_)) {
            return self.exact();
        }
        let svd = self.svd(rule)?;
        let rank = rule.rank(svd.values(), svd.energy());
        let rank = rank.min(most.unwrap_or(rank)).max(1);
        let (up, down) = svd.balanced_factors(rank)?;
        let report = LayerReport {
            layer: self.layer.clone(),
            rank: Some(rank),
            norm: svd.energy().sqrt(),
            error: svd.error(rank),
        };
        Ok((self.lora(&up, &down, rank as f64)?, report))
    }

    /// A LoRA on this layer, with its bias change beside it.
    pub(crate) fn lora(&self, up: &Tensor, down: &Tensor, alpha: f64) -> Result<Arc<dyn Adapter>> {
        self.build(lora_tensors(up, down, &self.dims, alpha)?)
    }

    /// An adapter from its parts, with the bias change.
    pub(crate) fn build(&self, mut parts: BTreeMap<String, Tensor>) -> Result<Arc<dyn Adapter>> {
        if let Some(bias) = &self.bias {
            parts.insert("diff_b".into(), bias.clone());
        }
        self.read(parts)
    }

    fn read(&self, parts: BTreeMap<String, Tensor>) -> Result<Arc<dyn Adapter>> {
        adapter_from(&self.layer, parts)
    }
}

/// An adapter from the parts that a file would hold.
pub(crate) fn adapter_from(
    layer: &str,
    tensors: BTreeMap<String, Tensor>,
) -> Result<Arc<dyn Adapter>> {
    Parts::new(layer, tensors).read().adapter
}

/// A LoRA's parts in the shapes that files have for a weight of these dimensions.
pub(crate) fn lora_tensors(
    up: &Tensor,
    down: &Tensor,
    dims: &[usize],
    alpha: f64,
) -> Result<BTreeMap<String, Tensor>> {
    let rank = up.dim(D::Minus1)?;
    let (up, down) = match *dims {
        [o, i, kh, kw] => (
            up.reshape((o, rank, 1, 1))?,
            down.reshape((rank, i, kh, kw))?,
        ),
        _ => (up.clone(), down.clone()),
    };
    Ok(BTreeMap::from([
        ("lora_up.weight".to_string(), up.contiguous()?),
        ("lora_down.weight".to_string(), down.contiguous()?),
        (
            "alpha".to_string(),
            Tensor::new(alpha as f32, &Device::Cpu)?,
        ),
    ]))
}

/// The same product with both factors of equal norm, so that neither leaves f16's range.
fn balanced(up: Tensor, down: Tensor) -> Result<(Tensor, Tensor)> {
    let (left, right) = (norm(&up)?, norm(&down)?);
    if left == 0.0 || right == 0.0 {
        return Ok((up, down));
    }
    let ratio = (right / left).sqrt();
    Ok(((up * ratio)?, (down * (1.0 / ratio))?))
}

/// Frobenius norm, in f64.
pub(crate) fn norm(tensor: &Tensor) -> Result<f64> {
    let square = tensor.to_dtype(DType::F64)?.sqr()?.sum_all()?;
    Ok(square.to_scalar::<f64>()?.sqrt())
}

/// The inner product of two low-rank matrices, through their factors, in f64.
pub(crate) fn product_dot(a: (&Tensor, &Tensor), b: (&Tensor, &Tensor)) -> Result<f64> {
    let double = |t: &Tensor| t.to_dtype(DType::F64);
    let ups = double(a.0)?.t()?.contiguous()?.matmul(&double(b.0)?)?;
    let downs = double(a.1)?.matmul(&double(b.1)?.t()?.contiguous()?)?;
    Ok((ups * downs)?.sum_all()?.to_scalar::<f64>()?)
}

/// `[o, n]` view of a change; products are multiplied out.
pub(crate) fn dense(change: &Change) -> Result<Tensor> {
    Ok(match change {
        Change::Product(up, down) => up.matmul(down)?,
        Change::Dense(matrix) => matrix.clone(),
        Change::Norm(row) => row.reshape(matrix_dims(row))?,
    })
}
