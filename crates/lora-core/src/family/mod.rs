//! The families: one file each, and the table that makes them known.

mod beside;
mod boft;
mod cayley;
mod dora;
mod full;
mod glora;
mod hadamard;
mod ia3;
mod loha;
mod lokr;
mod lora;
mod norm;
mod oft;
mod parts;
mod scalar;
mod tlora;

use std::sync::Arc;

use candle_core::{DType, Tensor};
use lora_kernels::{Added, Product, with_computed_weight};
use rand::RngCore;

use crate::adapter::{Adapter, Middle};
use crate::control::{DropoutKind, Pass};
use crate::held::Held;
use crate::layer::{BaseLayer, LayerOp};
use crate::{AdapterConfig, Error, Family, Result};

pub use boft::Boft;
pub use dora::Dora;
pub use full::Full;
pub use glora::Glora;
pub use ia3::Ia3;
pub use loha::Loha;
pub use lokr::{Lokr, LokrFactor, factorization};
pub use lora::Lora;
pub use norm::Norm;
pub use oft::Oft;
pub(crate) use parts::{Outcome, Parts};
pub(crate) use scalar::with_scalar;
pub use tlora::Tlora;

/// What the rest of the crate needs to know of a family.
pub(crate) struct Entry {
    pub(crate) family: Family,
    /// Whether these parts of one layer belong to the family.
    pub(crate) detect: fn(&Parts<'_>) -> bool,
    /// Builds the adapter from a file's parts.
    pub(crate) read: fn(&mut Parts<'_>) -> Result<Arc<dyn Adapter>>,
    /// Draws a fresh adapter for a layer whose weight has these dimensions.
    pub(crate) create: fn(&Fresh<'_>, &mut dyn RngCore) -> Result<Arc<dyn Adapter>>,
}

/// Every family, in the order in which files are tested for it; DoRA before those that
/// it builds on.
pub(crate) const FAMILIES: &[Entry] = &[
    dora::ENTRY,
    lora::ENTRY,
    loha::ENTRY,
    lokr::ENTRY,
    ia3::ENTRY,
    glora::ENTRY,
    oft::ENTRY,
    oft::KOHYA,
    boft::ENTRY,
    tlora::ENTRY,
    norm::ENTRY,
    full::ENTRY,
];

/// The table's row of a family.
pub(crate) fn entry(family: Family) -> &'static Entry {
    FAMILIES
        .iter()
        .find(|e| e.family == family)
        .unwrap_or(&lora::ENTRY)
}

/// The layer a fresh adapter is drawn for.
pub(crate) struct Fresh<'a> {
    pub(crate) layer: &'a str,
    pub(crate) weight: &'a [usize],
    pub(crate) base: &'a BaseLayer,
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    pub(crate) config: &'a AdapterConfig,
    pub(crate) device: &'a candle_core::Device,
}

impl Fresh<'_> {
    /// Outputs, inputs and kernel of a linear or convolution weight.
    pub(crate) fn matrix(&self) -> Result<(usize, usize, (usize, usize))> {
        match *self.weight {
            [o, i] => Ok((o, i, (1, 1))),
            [o, i, kh, kw] => Ok((o, i, (kh, kw))),
            _ => Err(Error::ShapeMismatch {
                layer: self.layer.to_string(),
                tensor: "weight".into(),
                expected: "a linear or convolution layer".into(),
                got: self.weight.to_vec(),
            }),
        }
    }
}

/// The dtype in which deltas for `base` are computed: f32 or better.
pub(crate) fn precision(base: &Tensor) -> DType {
    match base.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// `change * multiplier` in the dtype of `base`.
pub(crate) fn scaled_like(
    change: &Tensor,
    base: &Tensor,
    multiplier: f64,
) -> candle_core::Result<Tensor> {
    (change.to_dtype(precision(base))? * multiplier)?
        .reshape(base.shape())?
        .to_dtype(base.dtype())
}

/// Height and width of a factor that is a kernel.
pub(crate) fn kernel_of(factor: &Tensor) -> Option<(usize, usize)> {
    match factor.dims() {
        [_, _, kh, kw] => Some((*kh, *kw)),
        _ => None,
    }
}

/// A factor times a number that a file keeps apart.
pub(crate) fn fold(factor: Tensor, number: Option<f64>) -> candle_core::Result<Tensor> {
    match number {
        Some(number) => factor.affine(number, 0.0),
        None => Ok(factor),
    }
}

/// A Tucker core `[p, q, kh, kw]` applied to `b` `[q, i]`: `[p, i kh kw]`.
pub(crate) fn core_times(core: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    let (p, q, kh, kw) = core.dims4()?;
    let (i, k) = (b.dim(1)?, kh * kw);
    let core = core.reshape((p, q, k))?.transpose(1, 2)?.contiguous()?;
    core.reshape((p * k, q))?
        .matmul(b)?
        .reshape((p, k, i))?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((p, i * k))
}

/// The branch of families that build their delta, with [`drop_rows`].
pub(crate) fn branch_with_row_dropout(
    adapter: &dyn Adapter,
    x: &Tensor,
    layer: &BaseLayer,
    multiplier: f64,
    pass: Option<&Pass<'_>>,
) -> candle_core::Result<Tensor> {
    let y = delta_branch(adapter, x, layer, multiplier)?;
    drop_rows(y, &layer.op, pass)
}

/// The layer's operation with an adapter's delta for its weight. While it is trained the graph
/// keeps the factors only, and the backward pass builds the delta again.
pub(crate) fn delta_branch<A: Adapter + ?Sized>(
    adapter: &A,
    x: &Tensor,
    layer: &BaseLayer,
    multiplier: f64,
) -> candle_core::Result<Tensor> {
    let factors: Vec<&Tensor> = adapter.factors().into_iter().map(|(_, t)| t).collect();
    let trained = factors.iter().any(|t| t.track_op());
    let product = match layer.op {
        LayerOp::Linear if trained => Product::Linear,
        LayerOp::Conv2d(params) if trained => Product::Conv2d(params),
        _ => {
            let delta = adapter.delta(&layer.weight_in(x.dtype())?, multiplier)?;
            return layer.op.apply(x, &delta, None);
        }
    };
    let (base, dtype) = (layer.weight.detach(), x.dtype());
    let shape = adapter.map(&mut |t| Ok(t.detach()))?;
    with_computed_weight(product, x, &factors, move |factors| {
        let mut factors = factors.iter();
        let adapter = shape.map(&mut |t| Ok(factors.next().unwrap_or(t).clone()))?;
        adapter.delta(&base.to_dtype(dtype)?, multiplier)
    })
}

/// What a layer's branch by a delta of its weight's size holds.
pub(crate) fn held_with_delta(dims: (usize, usize), layer: &BaseLayer, rows: usize) -> Held {
    let (outputs, inputs) = dims;
    if layer.op.is_norm() {
        return Held {
            kept: outputs * rows,
            backward: 0,
        };
    }
    Held {
        // The branch's sum with the layer's own product is the output.
        kept: 0,
        // The delta, its gradient and three products of its size.
        backward: 5 * outputs * inputs,
    }
}

/// What a layer's branch by a product of computed factors holds.
pub(crate) fn held_with_product(rank: usize, dims: (usize, usize), rows: usize) -> Held {
    let factors = rank * (dims.0 + dims.1);
    Held {
        // The middle; the factors, of which the left one is made transposed.
        kept: rank * rows + 2 * factors,
        backward: rank * rows + factors,
    }
}

/// The layer's operation with the weight `down` `[r, i kh kw]`: the middle of a low-rank
/// branch. `None` for layers that have none.
pub(crate) fn middle(
    x: &Tensor,
    down: &Tensor,
    layer: &BaseLayer,
) -> candle_core::Result<Option<Middle>> {
    let down = down.to_dtype(x.dtype())?;
    match layer.op {
        LayerOp::Linear => Ok(Some(Middle::Down(down))),
        LayerOp::Conv2d(params) if params.groups == 1 => {
            let (_, i, kh, kw) = layer.weight.dims4()?;
            let down = down.reshape(((), i, kh, kw))?;
            let added = Added::default();
            let middle = lora_kernels::conv2d_added(x, &down, None, params, layer.compute, &added)?;
            Ok(Some(Middle::Values(middle)))
        }
        // Grouped convolutions and norms have no low-rank shortcut.
        _ => Ok(None),
    }
}

/// Rank dropout as LyCORIS applies it: whole rows of the delta, which are channels of the
/// branch's output, are dropped. The rest is scaled only with `rank_scale`.
pub(crate) fn drop_rows(
    y: Tensor,
    op: &LayerOp,
    pass: Option<&Pass<'_>>,
) -> candle_core::Result<Tensor> {
    let axis = op.output_axis(y.rank());
    let Some(keep) = kept_rows(y.dim(axis)?, pass) else {
        return Ok(y);
    };
    let mut dims = vec![1; y.rank()];
    dims[axis] = keep.len();
    y.broadcast_mul(&Tensor::from_vec(keep, dims, y.device())?.to_dtype(y.dtype())?)
}

/// What [`drop_rows`] multiplies the rows by, if it is on.
pub(crate) fn kept_rows(rows: usize, pass: Option<&Pass<'_>>) -> Option<Vec<f32>> {
    let pass = pass.filter(|p| p.dropout.rank > 0.0)?;
    let draws = pass.draws.uniform(DropoutKind::Rank, rows);
    let mut keep: Vec<f32> = draws
        .into_iter()
        .map(|u| f32::from(f64::from(u) > pass.dropout.rank))
        .collect();
    let kept: f32 = keep.iter().sum();
    if pass.dropout.rank_scale && kept > 0.0 {
        let factor = rows as f32 / kept;
        keep.iter_mut().for_each(|k| *k *= factor);
    }
    Some(keep)
}
