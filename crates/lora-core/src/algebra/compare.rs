//! Two adapters side by side.

use std::collections::BTreeSet;

use super::Weights;
use super::delta::{Change, LayerDelta, dense, norm, product_dot};
use crate::{AdapterSet, Result};

/// One layer of two adapters.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerDifference {
    /// The layer's name in adapter files.
    pub layer: String,
    /// Frobenius norm of the first adapter's change; `None` when it has none.
    pub first: Option<f64>,
    /// The same of the second.
    pub second: Option<f64>,
    /// Frobenius norm of the difference of the two changes.
    pub distance: f64,
    /// Cosine of the angle between the two changes; 0 when one is missing or zero.
    pub cosine: f64,
}

impl LayerDifference {
    /// `distance` divided by the larger of the two norms; 0 when both are zero.
    pub fn relative(&self) -> f64 {
        let size = self.first.unwrap_or(0.0).max(self.second.unwrap_or(0.0));
        if size > 0.0 {
            self.distance / size
        } else {
            0.0
        }
    }
}

/// Compares what two adapters change, layer by layer, at multiplier 1. Families whose
/// change depends on the weight need `base`. Changes of biases are not part of the
/// numbers.
///
/// # Errors
/// When the adapters are for layers of other sizes, or a base is needed.
pub fn difference(
    first: &AdapterSet,
    second: &AdapterSet,
    base: Option<&Weights>,
) -> Result<Vec<LayerDifference>> {
    let names: BTreeSet<&str> = first.names().chain(second.names()).collect();
    let mut all = Vec::new();
    for layer in names {
        let change = |set: &AdapterSet| -> Result<Option<Change>> {
            let Some(adapter) = set.get(layer) else {
                return Ok(None);
            };
            Ok(Some(
                LayerDelta::sum(layer, &[(adapter.as_ref(), 1.0)], base)?.change,
            ))
        };
        let (a, b) = (change(first)?, change(second)?);
        let norm_of = |change: &Option<Change>| change.as_ref().map(size).transpose();
        let (norm_a, norm_b) = (norm_of(&a)?, norm_of(&b)?);
        let dot = match (&a, &b) {
            (Some(a), Some(b)) => dot(layer, a, b)?,
            _ => 0.0,
        };
        let (x, y) = (norm_a.unwrap_or(0.0), norm_b.unwrap_or(0.0));
        let distance = match (&a, &b) {
            (Some(a), Some(b)) => {
                let square = x * x + y * y - 2.0 * dot;
                // Near-equal changes: the three terms cancel, the difference itself does not.
                if square < 1e-6 * (x * x + y * y) {
                    norm(&(dense(a)? - dense(b)?)?)?
                } else {
                    square.sqrt()
                }
            }
            _ => x.max(y),
        };
        all.push(LayerDifference {
            layer: layer.to_string(),
            first: norm_a,
            second: norm_b,
            distance,
            cosine: if x > 0.0 && y > 0.0 {
                dot / (x * y)
            } else {
                0.0
            },
        });
    }
    Ok(all)
}

fn size(change: &Change) -> Result<f64> {
    match change {
        Change::Product(up, down) => Ok(product_dot((up, down), (up, down))?.max(0.0).sqrt()),
        Change::Dense(matrix) => norm(matrix),
        Change::Norm(row) => norm(row),
    }
}

fn dot(layer: &str, a: &Change, b: &Change) -> Result<f64> {
    if let (Change::Product(up, down), Change::Product(other_up, other_down)) = (a, b)
        && up.dim(0)? == other_up.dim(0)?
        && down.dim(1)? == other_down.dim(1)?
    {
        return product_dot((up, down), (other_up, other_down));
    }
    let (a, b) = (dense(a)?, dense(b)?);
    if a.dims() != b.dims() {
        return Err(crate::Error::ShapeMismatch {
            layer: layer.into(),
            tensor: "second adapter's change".into(),
            expected: format!("the first adapter's {:?}", a.dims()),
            got: b.dims().to_vec(),
        });
    }
    let double = candle_core::DType::F64;
    let product = (a.to_dtype(double)? * b.to_dtype(double)?)?;
    Ok(product.sum_all()?.to_scalar::<f64>()?)
}
