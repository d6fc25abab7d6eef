//! Deltas added to weights: one f32 sum over all adapters, one rounding.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;

use crate::Component;
use crate::adapter::Adapter;

/// `base` with the deltas of `parts` (adapter, multiplier) added, in `base`'s dtype.
/// Each delta is computed against the unchanged base.
///
/// # Errors
/// When an adapter does not fit.
pub fn merged_weight(base: &Tensor, parts: &[(&dyn Adapter, f64)]) -> Result<Tensor> {
    let base32 = base.to_dtype(DType::F32)?;
    let mut sum = base32.clone();
    for (adapter, multiplier) in parts {
        sum = (sum + adapter.delta(&base32, *multiplier)?.detach())?;
    }
    sum.to_dtype(base.dtype())
}

/// The same for a layer's bias; adapters that leave it alone add nothing.
///
/// # Errors
/// When an adapter does not fit.
pub fn merged_bias(bias: Option<&Tensor>, parts: &[(&dyn Adapter, f64)]) -> Result<Option<Tensor>> {
    let bias32 = bias.map(|b| b.to_dtype(DType::F32)).transpose()?;
    let mut sum = bias32.clone();
    for (adapter, multiplier) in parts {
        let Some(delta) = adapter.bias_delta(bias32.as_ref(), *multiplier)? else {
            continue;
        };
        sum = Some(match sum {
            Some(sum) => (sum + delta.detach())?,
            None => delta.detach(),
        });
    }
    let dtype = bias.map_or(DType::F32, Tensor::dtype);
    sum.map(|b| b.to_dtype(dtype)).transpose()
}

/// See [`AdapterSet::merged`](crate::AdapterSet::merged).
pub(crate) fn merged_builder<'a>(
    entries: BTreeMap<String, Arc<dyn Adapter>>,
    base: VarBuilder<'a>,
    component: Component,
    multiplier: f64,
) -> VarBuilder<'a> {
    let (dtype, device) = (base.dtype(), base.device().clone());
    VarBuilder::from_backend(
        Box::new(Merged {
            entries,
            base,
            component,
            multiplier,
        }),
        dtype,
        device,
    )
}

struct Merged<'a> {
    entries: BTreeMap<String, Arc<dyn Adapter>>,
    base: VarBuilder<'a>,
    component: Component,
    multiplier: f64,
}

impl Merged<'_> {
    /// The adapter that changes the tensor `name`, and whether it is the bias.
    fn adapter(&self, name: &str) -> Option<(&dyn Adapter, bool)> {
        let (path, part) = name.rsplit_once('.')?;
        let bias = match part {
            "weight" => false,
            "bias" => true,
            _ => return None,
        };
        let adapter = self.entries.get(&self.component.layer_name(path))?;
        Some((adapter.as_ref(), bias))
    }

    fn apply(&self, base: Tensor, name: &str) -> Result<Tensor> {
        match self.adapter(name) {
            None => Ok(base),
            Some((adapter, false)) => {
                adapter
                    .check(name, base.dims())
                    .map_err(candle_core::Error::wrap)?;
                merged_weight(&base, &[(adapter, self.multiplier)])
            }
            Some((adapter, true)) => {
                Ok(merged_bias(Some(&base), &[(adapter, self.multiplier)])?.unwrap_or(base))
            }
        }
    }
}

impl SimpleBackend for Merged<'_> {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let base = self.base.clone().set_device(device.clone());
        self.apply(base.get_with_hints_dtype(shape, name, init, dtype)?, name)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let base = self.base.clone().set_device(device.clone());
        self.apply(base.get_unchecked_dtype(name, dtype)?, name)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.base.contains_tensor(name)
    }
}
