//! The families: one file each, and the table that makes them known.

mod biased;
mod boft;
mod cayley;
mod dora;
mod full;
mod glora;
mod ia3;
mod loha;
mod lokr;
mod lora;
mod norm;
mod oft;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor, Var};
use rand::RngCore;

use crate::adapter::Adapter;
use crate::control::{DropoutKind, Pass};
use crate::layer::BaseLayer;
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
    boft::ENTRY,
    full::ENTRY,
    norm::ENTRY,
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

/// A copy of a factor that records gradients, f32.
pub(crate) fn variable(factor: &Tensor) -> candle_core::Result<Tensor> {
    Ok(Var::from_tensor(&factor.detach().to_dtype(DType::F32)?)?.into_inner())
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

/// The branch of families that build their delta: LyCORIS drops whole output rows of
/// it (rank dropout), without scaling the rest.
pub(crate) fn branch_with_row_dropout(
    adapter: &dyn Adapter,
    x: &Tensor,
    layer: &BaseLayer,
    multiplier: f64,
    pass: Option<&Pass<'_>>,
) -> candle_core::Result<Tensor> {
    let mut delta = adapter.delta(&layer.weight, multiplier)?;
    if let Some(pass) = pass.filter(|p| p.dropout.rank > 0.0) {
        let rows = delta.dim(0)?;
        let draws = pass.draws.uniform(DropoutKind::Rank, rows);
        let keep: Vec<f32> = draws
            .into_iter()
            .map(|u| f32::from(f64::from(u) > pass.dropout.rank))
            .collect();
        let mut dims = vec![1; delta.rank()];
        dims[0] = rows;
        delta = delta.broadcast_mul(
            &Tensor::from_vec(keep, dims, delta.device())?.to_dtype(delta.dtype())?,
        )?;
    }
    layer.op.apply(x, &delta, None)
}

/// The tensors of one layer in a file, by suffix. What a family takes is consumed;
/// what is left over is reported.
pub(crate) struct Parts<'a> {
    pub(crate) path: &'a Path,
    pub(crate) layer: &'a str,
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

impl Parts<'_> {
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub(crate) fn take(&mut self, name: &str) -> Option<Tensor> {
        self.tensors.remove(name)
    }

    /// How many axes a tensor has.
    pub(crate) fn axes(&self, name: &str) -> Option<usize> {
        self.tensors.get(name).map(Tensor::rank)
    }

    pub(crate) fn require(&mut self, name: &'static str) -> Result<Tensor> {
        self.take(name).ok_or_else(|| self.missing(name))
    }

    pub(crate) fn missing(&self, missing: &'static str) -> Error {
        Error::MissingPart {
            path: self.path.to_path_buf(),
            layer: self.layer.to_string(),
            missing,
        }
    }

    /// `alpha`, a single number; absent means scale 1, that is `rank`.
    pub(crate) fn take_alpha(&mut self, rank: usize) -> Result<f64> {
        Ok(self.take_number("alpha")?.unwrap_or(rank as f64))
    }

    /// `alpha` where it is a constraint; absent or 0 means none.
    pub(crate) fn take_constraint(&mut self) -> Result<f64> {
        let constraint = self.take_number("alpha")?.unwrap_or(0.0);
        if constraint < 0.0 {
            return Err(self.bad_value("alpha", constraint, "expected a constraint of 0 or more"));
        }
        Ok(constraint)
    }

    /// A finite number stored as a tensor of one element.
    pub(crate) fn take_number(&mut self, name: &'static str) -> Result<Option<f64>> {
        let Some(tensor) = self.take(name) else {
            return Ok(None);
        };
        if tensor.elem_count() != 1 {
            return Err(Error::ShapeMismatch {
                layer: self.layer.to_string(),
                tensor: name.into(),
                expected: "a single number".into(),
                got: tensor.dims().to_vec(),
            });
        }
        let number = tensor
            .flatten_all()?
            .to_dtype(DType::F64)?
            .get(0)?
            .to_scalar::<f64>()?;
        if !number.is_finite() {
            return Err(self.bad_value(name, number, "expected a finite number"));
        }
        Ok(Some(number))
    }

    pub(crate) fn bad_value(
        &self,
        name: &'static str,
        value: f64,
        expected: &'static str,
    ) -> Error {
        Error::BadValue {
            layer: self.layer.to_string(),
            name,
            value: value.to_string(),
            expected,
        }
    }

    /// Builds the adapter and insists that every part was understood.
    pub(crate) fn read(mut self) -> Result<Arc<dyn Adapter>> {
        let Some(entry) = FAMILIES.iter().find(|e| (e.detect)(&self)) else {
            return Err(self.unknown());
        };
        let adapter = biased::with_bias((entry.read)(&mut self)?, &mut self)?;
        if self.tensors.is_empty() {
            Ok(adapter)
        } else {
            Err(self.unknown())
        }
    }

    fn unknown(self) -> Error {
        Error::UnknownKeys {
            path: self.path.to_path_buf(),
            layer: self.layer.to_string(),
            keys: self.tensors.into_keys().collect(),
        }
    }
}
