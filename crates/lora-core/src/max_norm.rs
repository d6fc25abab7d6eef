//! Max-norm scaling, sd-scripts' `scale_weight_norms`.

use crate::{AdapterSet, Result};

/// What [`AdapterSet::scale_norms`] did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NormReport {
    /// The layers that were scaled down, with the factor on each of their factors.
    pub factors: Vec<(String, f64)>,
    /// Mean norm of the deltas afterwards.
    pub mean: f64,
    /// Largest norm afterwards.
    pub max: f64,
}

impl AdapterSet {
    /// Scales down every delta whose Frobenius norm exceeds `max_norm`: sd-scripts'
    /// `scale_weight_norms`. Small norms count as half of `max_norm`, as there.
    ///
    /// # Errors
    /// When a factor cannot be read or written.
    pub fn scale_norms(&self, max_norm: f64) -> Result<NormReport> {
        let (mut factors, mut norms) = (Vec::new(), Vec::new());
        for (name, adapter) in self.iter() {
            // Families whose delta depends on the base weight have no norm of their own.
            let Some(norm) = adapter.norm()? else {
                continue;
            };
            let clamped = norm.max(max_norm / 2.0);
            let ratio = clamped.min(max_norm) / clamped;
            if ratio < 1.0 {
                factors.push((name.to_string(), adapter.rescale(ratio)?));
            }
            norms.push(norm * ratio);
        }
        let max = norms.iter().copied().fold(0.0, f64::max);
        let mean = norms.iter().sum::<f64>() / norms.len().max(1) as f64;
        Ok(NormReport { factors, mean, max })
    }
}
