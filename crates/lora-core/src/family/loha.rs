//! LoHa: `delta = multiplier * alpha / rank * (w1_a w1_b) o (w2_a w2_b)`, `o` being the
//! elementwise product, so that the delta's rank reaches `rank^2`.
//!
//! | layer | `hada_w*_a` | `hada_w*_b` | `hada_t*` |
//! |---|---|---|---|
//! | linear | `[o, r]` | `[r, i]` | |
//! | convolution | `[o, r]` | `[r, i kh kw]` | |
//! | convolution, Tucker | `[r, o]` | `[r, i]` | `[r, r, kh, kw]` |
//!
//! plus `alpha`. Paper: Hyeon-Woo et al. 2021 (FedPara); files and initial values as in
//! LyCORIS: `w1_b`, `w2_b` from N(0, 1), `w1_a` from N(0, 0.1), `w2_a` zero, cores from
//! N(0, 0.1). A LoHa of rank r has as many parameters as a LoRA of rank 2r.
//!
//! Being the sum of `r^2` products of a column and a row, the delta is a LoRA of rank `r^2`,
//! whose factors are the products of the two sides' columns and rows. Up to a rank of 8 or
//! so that is less work than the delta itself, and the layer computes it as it does a LoRA.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use rand::RngCore;

use super::hadamard::{self, Side};
use super::{
    Entry, Fresh, Parts, branch_with_row_dropout, fold, held_with_delta, held_with_product,
    kept_rows, kernel_of, middle, precision,
};
use crate::adapter::{Adapter, Family, LowRank};
use crate::control::Pass;
use crate::held::Held;
use crate::layer::BaseLayer;
use crate::{Error, init};

pub(super) const ENTRY: Entry = Entry {
    family: Family::Loha,
    detect: |parts| parts.has("hada_w1_a"),
    read,
    create,
};

/// Names of one side's factors: a, b, Tucker core.
const SIDES: [[&str; 3]; 2] = [
    ["hada_w1_a", "hada_w1_b", "hada_t1"],
    ["hada_w2_a", "hada_w2_b", "hada_t2"],
];

/// Factors of one layer's LoHa.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::{Adapter, Loha};
/// let column = |v: f32| Tensor::new(&[[v], [v]], &Device::Cpu);
/// let row = |v: f32| Tensor::new(&[[v, v]], &Device::Cpu);
/// let loha = Loha::new("fc", [(column(2.)?, row(3.)?, None), (column(5.)?, row(7.)?, None)], 1.0)?;
/// let base = Tensor::zeros((2, 2), candle_core::DType::F32, &Device::Cpu)?;
/// assert_eq!(loha.delta(&base, 1.0)?.to_vec2::<f32>()?, [[210., 210.], [210., 210.]]);
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Loha {
    sides: [Side; 2],
    alpha: f64,
}

impl Loha {
    /// From the two sides' factors (a, b, Tucker core) in the shapes of the module's
    /// table. `layer` is for messages.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when factors disagree.
    pub fn new(
        layer: &str,
        sides: [(Tensor, Tensor, Option<Tensor>); 2],
        alpha: f64,
    ) -> crate::Result<Self> {
        let sides = sides.map(|(a, b, core)| Side { a, b, core });
        let mismatch = |tensor: &str, expected: String, got: &Tensor| {
            Err(Error::ShapeMismatch {
                layer: layer.into(),
                tensor: tensor.into(),
                expected,
                got: got.dims().to_vec(),
            })
        };
        let rank = sides[0].rank();
        for (side, [a, b, t]) in sides.iter().zip(SIDES) {
            if side.b.rank() != 2 || side.rank() != rank || side.b.elem_count() == 0 {
                return mismatch(b, format!("[{rank}, inputs]"), &side.b);
            }
            let axis = usize::from(side.core.is_none());
            if side.a.rank() != 2 || side.a.dims()[axis] != rank || side.a.elem_count() == 0 {
                let expected = if axis == 1 {
                    format!("[outputs, {rank}]")
                } else {
                    format!("[{rank}, outputs]")
                };
                return mismatch(a, expected, &side.a);
            }
            if let Some(core) = &side.core
                && !matches!(*core.dims(), [p, q, _, _] if p == rank && q == rank)
            {
                return mismatch(t, format!("[{rank}, {rank}, kh, kw]"), core);
            }
        }
        let ((o, i), (other_o, other_i)) = (sides[0].dims(), sides[1].dims());
        if (o, i) != (other_o, other_i) {
            let (name, got) = match o == other_o {
                true => (SIDES[1][1], &sides[1].b),
                false => (SIDES[1][0], &sides[1].a),
            };
            let expected = format!(
                "factors of a product [{o}, {i}] as the first side's, not [{other_o}, {other_i}]"
            );
            return mismatch(name, expected, got);
        }
        Ok(Self { sides, alpha })
    }
}

impl Adapter for Loha {
    fn family(&self) -> Family {
        Family::Loha
    }

    fn rank(&self) -> Option<usize> {
        Some(self.sides[0].rank())
    }

    fn alpha(&self) -> Option<f64> {
        Some(self.alpha)
    }

    fn matrix_dims(&self) -> (usize, usize) {
        self.sides[0].dims()
    }

    fn kernel(&self) -> Option<(usize, usize)> {
        self.sides[0].core.as_ref().and_then(kernel_of)
    }

    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        hadamard::product(&self.sides, precision(base), self.scale() * multiplier)?
            .reshape(base.shape())?
            .to_dtype(base.dtype())
    }

    fn branch(
        &self,
        x: &Tensor,
        layer: &BaseLayer,
        multiplier: f64,
        pass: Option<&Pass<'_>>,
    ) -> Result<Tensor> {
        branch_with_row_dropout(self, x, layer, multiplier, pass)
    }

    fn low_rank(
        &self,
        x: &Tensor,
        layer: &BaseLayer,
        multiplier: f64,
        pass: Option<&Pass<'_>>,
    ) -> Result<Option<LowRank>> {
        let Some((mut up, down)) = self.product()? else {
            return Ok(None);
        };
        let Some(middle) = middle(x, &down, layer)? else {
            return Ok(None);
        };
        if multiplier != 1.0 {
            up = (up * multiplier)?;
        }
        if let Some(keep) = kept_rows(up.dim(0)?, pass) {
            up = up.broadcast_mul(&Tensor::from_vec(keep, (up.dim(0)?, 1), up.device())?)?;
        }
        Ok(Some(LowRank {
            middle,
            up: up.to_dtype(x.dtype())?,
            outputs: None,
        }))
    }

    fn product(&self) -> Result<Option<(Tensor, Tensor)>> {
        hadamard::low_rank(&self.sides, self.scale())
    }

    fn held(&self, layer: &BaseLayer, rows: usize) -> Held {
        match hadamard::worthwhile_rank(&self.sides) {
            Some(rank) if !layer.op.is_norm() => held_with_product(rank, self.matrix_dims(), rows),
            _ => held_with_delta(self.matrix_dims(), layer, rows),
        }
    }

    fn factors(&self) -> Vec<(&'static str, &Tensor)> {
        let named = self.sides.iter().zip(SIDES).flat_map(|(side, [a, b, t])| {
            let core = side.core.as_ref().map(|core| (t, core));
            [(a, &side.a), (b, &side.b)].into_iter().chain(core)
        });
        named.collect()
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Arc<dyn Adapter>> {
        let sides = [self.sides[0].map(f)?, self.sides[1].map(f)?];
        Ok(Arc::new(Self { sides, ..*self }))
    }
}

fn read(parts: &mut Parts<'_>) -> crate::Result<Arc<dyn Adapter>> {
    let scalar = parts.take_scalar()?;
    let mut side = |[a, b, t]: [&'static str; 3]| -> crate::Result<_> {
        Ok((parts.require(a)?, parts.require(b)?, parts.take(t)))
    };
    let (mut first, second) = (side(SIDES[0])?, side(SIDES[1])?);
    first.0 = fold(first.0, scalar)?;
    let alpha = parts.take_alpha(first.1.dims().first().copied().unwrap_or(0))?;
    Ok(Arc::new(Loha::new(parts.layer, [first, second], alpha)?))
}

fn create(fresh: &Fresh<'_>, rng: &mut dyn RngCore) -> crate::Result<Arc<dyn Adapter>> {
    let r = fresh.rank;
    let (o, i, kernel) = fresh.matrix()?;
    let tucker = fresh.config.use_tucker && kernel.0 * kernel.1 > 1;
    let (a, b) = if tucker {
        ([r, o], [r, i])
    } else {
        ([o, r], [r, i * kernel.0 * kernel.1])
    };
    let mut side = |first: bool| -> crate::Result<_> {
        let b = init::normal(&b, 1.0, rng, fresh.device)?;
        let a = if first {
            init::normal(&a, 0.1, rng, fresh.device)?
        } else {
            Tensor::zeros(&a, DType::F32, fresh.device)?
        };
        let core = tucker
            .then(|| init::normal(&[r, r, kernel.0, kernel.1], 0.1, rng, fresh.device))
            .transpose()?;
        Ok((a, b, core))
    };
    let sides = [side(true)?, side(false)?];
    Ok(Loha::new(fresh.layer, sides, fresh.alpha)?.trainable()?)
}
