//! Adapters merged into a loaded model, changed and taken out again without loss.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::Strength;
use crate::adapter::Adapter;
use crate::layer::Adaptable;
use crate::merge::{merged_bias, merged_weight};
use crate::set::AttachReport;
use crate::{AdapterSet, Result};

/// Keeps the original weights of the layers that it merged into: other multipliers start
/// from them, and [`restore`](LiveMerge::restore) puts them back. Nothing is ever
/// subtracted, so nothing drifts.
///
/// Costs the memory of the changed layers once more; drawing then costs nothing extra,
/// unlike with [`AdapterSet::attach`], whose multipliers change for free.
///
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarBuilder;
/// use lora_core::algebra::{LiveMerge, Strength};
/// use lora_core::{Adaptable, AdapterSet, Component, Layer, Lora};
///
/// struct Model { fc: Layer }
/// impl Adaptable for Model {
///     fn component(&self) -> Component { Component::Unet }
///     fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut Layer) -> lora_core::Result<()>) -> lora_core::Result<()> {
///         visit(&mut self.fc)
///     }
/// }
///
/// let mut model = Model { fc: Layer::linear(1, 1, VarBuilder::zeros(DType::F32, &Device::Cpu).pp("fc"))? };
/// let one = Tensor::new(&[[1f32]], &Device::Cpu)?;
/// let mut set = AdapterSet::default();
/// set.insert("lora_unet_fc", Arc::new(Lora::new("fc", one.clone(), None, one, 1.0)?));
/// let weight = |model: &Model| model.fc.base().weight.to_vec2::<f32>();
///
/// let mut live = LiveMerge::default();
/// live.set(&mut model, &[(&set, Strength::new(0.5, 1.0))])?;
/// assert_eq!(weight(&model)?, [[0.5]]);
/// live.set(&mut model, &[(&set, Strength::new(0.75, 1.0))])?; // from the original again
/// assert_eq!(weight(&model)?, [[0.75]]);
/// live.restore(&mut model)?;
/// assert_eq!(weight(&model)?, [[0.0]]);
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct LiveMerge {
    originals: BTreeMap<String, (Tensor, Option<Tensor>)>,
}

impl LiveMerge {
    /// Makes the model's weights the originals plus these adapters, whatever was merged
    /// before through this object. Computed in f32, rounded once.
    ///
    /// # Errors
    /// When an adapter does not fit; the model is then as it was before any merge.
    pub fn set(
        &mut self,
        model: &mut dyn Adaptable,
        adapters: &[(&AdapterSet, Strength)],
    ) -> Result<AttachReport> {
        self.restore(model)?;
        let component = model.component();
        let mut report = AttachReport::default();
        let mut rest: Vec<String> = adapters
            .iter()
            .flat_map(|(set, _)| set.names())
            .filter(|name| component.owns(name))
            .map(ToString::to_string)
            .collect();
        let outcome = model.visit_layers(&mut |layer| {
            let name = component.layer_name(layer.path());
            let mut parts: Vec<(&dyn Adapter, f64)> = Vec::new();
            for (set, strength) in adapters {
                if let Some(adapter) = set.get(&name) {
                    adapter.check(&name, layer.base().weight.dims())?;
                    parts.push((adapter.as_ref(), strength.of(&name)));
                }
            }
            if parts.is_empty() {
                return Ok(());
            }
            rest.retain(|other| *other != name);
            report.attached += 1;
            parts.retain(|(_, multiplier)| *multiplier != 0.0);
            let (weight, bias) = (layer.base().weight.clone(), layer.base().bias.clone());
            let merged = merged_weight(&weight, &parts)?;
            let merged_bias = merged_bias(bias.as_ref(), &parts)?;
            layer.set_base(merged, merged_bias);
            self.originals.insert(name, (weight, bias));
            Ok(())
        });
        if let Err(error) = outcome {
            self.restore(model)?;
            return Err(error);
        }
        rest.sort();
        rest.dedup();
        report.unmatched = rest;
        Ok(report)
    }

    /// Puts the original weights back: the very tensors, so to the bit.
    ///
    /// # Errors
    /// When the model's visitor fails.
    pub fn restore(&mut self, model: &mut dyn Adaptable) -> Result<()> {
        let component = model.component();
        model.visit_layers(&mut |layer| {
            let name = component.layer_name(layer.path());
            if let Some((weight, bias)) = self.originals.remove(&name) {
                layer.set_base(weight, bias);
            }
            Ok(())
        })
    }
}
