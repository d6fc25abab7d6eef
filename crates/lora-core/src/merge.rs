//! Deltas added to weights: one f32 sum over all adapters, one rounding.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;

use crate::adapter::Adapter;
use crate::layer::Adaptable;
use crate::{AdapterSet, Component, Error};

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

/// Adapters added to base weights for a while: the weights without them are kept.
///
/// Faster to compute with than adapters on the side, at the price of a second copy of the
/// changed weights.
#[derive(Debug, Default)]
pub struct TemporaryMerge {
    originals: BTreeMap<String, (Tensor, Option<Tensor>)>,
}

impl TemporaryMerge {
    /// Adds all adapters of the model's component, each at its multiplier; every delta is
    /// computed against the unchanged weight. Layers that an adapter has and the model has
    /// not are returned by name.
    ///
    /// # Errors
    /// When an adapter does not fit or fits no layer at all; the model is then as before.
    pub fn apply(
        model: &mut dyn Adaptable,
        parts: &[(&AdapterSet, f64)],
    ) -> crate::Result<(Self, Vec<String>)> {
        let component = model.component();
        let mut merge = Self::default();
        let mut seen = BTreeSet::new();
        let outcome = model.visit_layers(&mut |layer| {
            let name = component.layer_name(layer.path());
            let mut here: Vec<(&dyn Adapter, f64)> = Vec::new();
            for (set, multiplier) in parts {
                if let Some(adapter) = set.get(&name) {
                    adapter.check(&name, layer.base().weight.dims())?;
                    here.push((adapter.as_ref(), *multiplier));
                }
            }
            seen.insert(name.clone());
            if !here.is_empty() {
                let base = layer.base().clone();
                let weight = merged_weight(&base.weight, &here)?;
                let bias = merged_bias(base.bias.as_ref(), &here)?;
                merge.originals.insert(name, (base.weight, base.bias));
                layer.set_base(weight, bias);
            }
            Ok(())
        });
        let mut unmatched = BTreeSet::new();
        let mut none = None;
        for (set, _) in parts {
            let names: Vec<&str> = set.names().filter(|n| component.owns(n)).collect();
            if !names.is_empty() && !names.iter().any(|n| seen.contains(*n)) {
                none = none.or(Some((names.len(), names.first().copied().unwrap_or(""))));
            }
            unmatched.extend(
                names
                    .into_iter()
                    .filter(|n| !seen.contains(*n))
                    .map(str::to_string),
            );
        }
        let outcome = outcome.and_then(|()| match none {
            None => Ok(()),
            Some((adapter_layers, example)) => Err(Error::NothingMatched {
                adapter_layers,
                example: example.to_string(),
                component: component.to_string(),
            }),
        });
        match outcome {
            Ok(()) => Ok((merge, unmatched.into_iter().collect())),
            Err(error) => {
                merge.undo(model)?;
                Err(error)
            }
        }
    }

    /// Puts the weights back as they were, to the bit.
    ///
    /// # Errors
    /// When the model's visitor fails.
    pub fn undo(mut self, model: &mut dyn Adaptable) -> crate::Result<()> {
        let component = model.component();
        model.visit_layers(&mut |layer| {
            if let Some((weight, bias)) = self.originals.remove(&component.layer_name(layer.path()))
            {
                layer.set_base(weight, bias);
            }
            Ok(())
        })
    }
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
