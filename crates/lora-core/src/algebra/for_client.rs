//! The nearest file that a program reads right.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Tensor;

use super::clients::{Client, Outcome, Traits};
use super::delta::{Change, LayerDelta, adapter_from};
use super::{RankRule, Weights};
use crate::adapter::{Adapter, Family};
use crate::{AdapterSet, Result};

/// What was done to a layer for a program.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientChange {
    /// The layer's name in adapter files.
    pub layer: String,
    /// What was done.
    pub what: &'static str,
    /// Relative error of the change; 1 for a layer that was left out.
    pub error: f64,
}

/// Rewrites an adapter so that `client` reads every layer right at multiplier 1: exactly
/// where there is a form for that (rank 1 filled up to 2 with twice the `alpha`, Tucker
/// cores multiplied out), else as the nearest LoRA by `rule`. What the program has no
/// form for is left out. The changes are listed; layers not listed are as they were.
/// Saving the result writes kohya's names and every `alpha`, which all programs read.
///
/// # Errors
/// [`Error::NotPossible`](crate::Error::NotPossible) when a family needs the base weight
/// to be rewritten and there is none.
pub fn convert_for(
    client: Client,
    adapter: &AdapterSet,
    rule: RankRule,
    base: Option<&Weights>,
) -> Result<(AdapterSet, Vec<ClientChange>)> {
    rule.validate()?;
    let mut set = AdapterSet::default();
    let mut changes = Vec::new();
    for (layer, adapter) in adapter.iter() {
        let mut current = adapter.clone();
        // One repair can uncover another: a LoRA by SVD may have rank 1.
        for _ in 0..4 {
            let Some((next, what, error)) = repaired(client, layer, &current, rule, base)? else {
                set.insert(layer, current);
                break;
            };
            changes.push(ClientChange {
                layer: layer.to_string(),
                what,
                error,
            });
            match next {
                Some(next) => current = next,
                None => break,
            }
        }
    }
    *set.metadata_mut() = adapter.metadata().clone();
    if client == Client::A1111 {
        for (key, tensor) in adapter.bundled_embeddings() {
            set.insert_bundled(format!("{}{key}", crate::format::BUNDLE), tensor.clone());
        }
    }
    Ok((set, changes))
}

type Repair = (Option<Arc<dyn Adapter>>, &'static str, f64);

/// The next repair that a layer needs; `None` when the program reads it right.
fn repaired(
    client: Client,
    layer: &str,
    adapter: &Arc<dyn Adapter>,
    rule: RankRule,
    base: Option<&Weights>,
) -> Result<Option<Repair>> {
    let traits = Traits::of(adapter.as_ref())?;
    let verdicts = traits.verdicts(client);
    let tensors: BTreeMap<&str, Tensor> = adapter.tensors()?.into_iter().collect();
    let has = |name: &str| tensors.contains_key(name);
    let bad = verdicts.iter().any(|(o, _)| *o > Outcome::Conditional);
    // A condition on the multiplier is nobody's fault; one on the program's mode is.
    let cored = client == Client::StableDiffusionCpp && has("lora_mid.weight");
    if !(bad || cored) {
        return Ok(None);
    }
    let rebuilt = |change: &dyn Fn(&mut BTreeMap<String, Tensor>) -> Result<()>| {
        let mut parts: BTreeMap<String, Tensor> = (tensors.iter())
            .map(|(name, tensor)| (name.to_string(), tensor.clone()))
            .collect();
        change(&mut parts)?;
        adapter_from(layer, parts)
    };
    if has("diff_b") && adapter.family() != Family::Full && client != Client::ComfyUi {
        let without = rebuilt(&|parts| {
            parts.remove("diff_b");
            Ok(())
        })?;
        return Ok(Some((Some(without), "bias change left out", 0.0)));
    }
    if adapter.family() == Family::Norm {
        if client == Client::A1111 {
            let filled = rebuilt(&|parts| {
                let zero = parts.get("w_norm").map(Tensor::zeros_like).transpose()?;
                parts.extend(zero.map(|zero| ("b_norm".to_string(), zero)));
                Ok(())
            })?;
            return Ok(Some((Some(filled), "b_norm of zeros added", 0.0)));
        }
        return Ok(Some((None, "normalization layer left out", 1.0)));
    }
    let plain = matches!(adapter.family(), Family::Lora | Family::Loha | Family::Lokr);
    if client == Client::StableDiffusionCpp && plain && !has("lokr_t2") && !has("lora_mid.weight") {
        // Only rank 1 is left to be wrong.
        let doubled = rebuilt(&|parts| {
            for (name, tensor) in parts.iter_mut() {
                *tensor = match name.as_str() {
                    // Its axes depend on whether there is a core.
                    "hada_w1_a" | "hada_w2_a" | "lokr_w2_a" => {
                        let core = has("hada_t1") || has("lokr_t2");
                        tensor.pad_with_zeros(usize::from(!core), 0, 1)?
                    }
                    "alpha" => (&*tensor * 2.0)?,
                    _ => padded(name, tensor, 1)?,
                };
            }
            Ok(())
        })?;
        return Ok(Some((
            Some(doubled),
            "rank 1 filled up to 2, alpha doubled",
            0.0,
        )));
    }
    let delta = LayerDelta::sum(layer, &[(adapter.as_ref(), 1.0)], base)?;
    if let Change::Product(up, down) = &delta.change {
        let rank = up.dim(1)? as f64;
        let folded = delta.lora(up, down, rank)?;
        return Ok(Some((Some(folded), "Tucker core multiplied out", 0.0)));
    }
    let (lora, report) = delta.reduced(rule, None)?;
    Ok(Some((Some(lora), "nearest LoRA", report.error)))
}

/// A part of a layer with zeros added to its rank axes.
fn padded(name: &str, tensor: &Tensor, missing: usize) -> Result<Tensor> {
    let axes: &[usize] = match name {
        "lora_down.weight" | "hada_w1_b" | "hada_w2_b" | "lokr_w1_b" | "lokr_w2_b" => &[0],
        "lora_up.weight" | "lokr_w1_a" => &[1],
        "lora_mid.weight" | "hada_t1" | "hada_t2" | "lokr_t2" => &[0, 1],
        _ => &[],
    };
    let mut tensor = tensor.clone();
    for axis in axes {
        tensor = tensor.pad_with_zeros(*axis, 0, missing)?;
    }
    Ok(tensor)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::algebra::review_clients;
    use crate::format::TensorFile;
    use crate::{Loha, Lora, SaveOptions};

    fn tensor(rows: usize, columns: usize, seed: usize) -> Tensor {
        let values = (0..rows * columns).map(|k| ((k * 31 + seed * 17) as f32).sin());
        Tensor::from_vec(values.collect::<Vec<_>>(), (rows, columns), &Device::Cpu).unwrap()
    }

    fn mixed() -> AdapterSet {
        let mut set = AdapterSet::default();
        let name = |n: &str| format!("lora_unet_mid_block_attentions_0_{n}");
        let lora = Lora::new("", tensor(1, 6, 1), None, tensor(5, 1, 2), 0.5).unwrap();
        set.insert(name("rank_one"), Arc::new(lora));
        let sides = [3, 5].map(|s| (tensor(5, 1, s), tensor(1, 6, s + 1), None));
        set.insert(name("loha"), Arc::new(Loha::new("", sides, 0.25).unwrap()));
        let core = tensor(2, 18, 7).reshape((2, 2, 3, 3)).unwrap();
        let down = tensor(2, 4, 8).reshape((2, 4, 1, 1)).unwrap();
        let up = tensor(5, 2, 9).reshape((5, 2, 1, 1)).unwrap();
        let tucker = Lora::new("", down, Some(core), up, 1.0).unwrap();
        set.insert("lora_unet_mid_block_resnets_0_conv1", Arc::new(tucker));
        let mut biased: BTreeMap<String, Tensor> = BTreeMap::new();
        biased.insert("lora_down.weight".into(), tensor(2, 6, 1));
        biased.insert("lora_up.weight".into(), tensor(5, 2, 2));
        biased.insert("diff_b".into(), tensor(1, 5, 2).flatten_all().unwrap());
        let biased = adapter_from("", biased).unwrap();
        set.insert(name("biased"), biased);
        let norm = BTreeMap::from([("w_norm".into(), tensor(1, 5, 2).flatten_all().unwrap())]);
        set.insert(
            "lora_unet_mid_block_resnets_0_norm1",
            adapter_from("", norm).unwrap(),
        );
        set
    }

    #[test]
    fn converted_files_are_read_right() {
        let set = mixed();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        for client in Client::ALL {
            let (converted, changes) =
                convert_for(client, &set, RankRule::Energy(1.0), None).unwrap();
            converted.save(&path, &SaveOptions::default()).unwrap();
            let review = review_clients(&TensorFile::open(&path).unwrap(), &converted).unwrap();
            let report = review.iter().find(|r| r.client == client).unwrap();
            let worst = report.findings.iter().map(|f| f.outcome).max();
            assert!(worst <= Some(Outcome::Conditional), "{client}: {report:?}");
            // Same change, wherever the layer is still there.
            for (layer, adapter) in converted.iter() {
                let old = set.get(layer).unwrap();
                let (o, n) = old.matrix_dims();
                let dims = if layer.ends_with("conv1") {
                    vec![5, 4, 3, 3]
                } else if n == 1 {
                    vec![o]
                } else {
                    vec![o, n]
                };
                let base = Tensor::zeros(dims, candle_core::DType::F32, &Device::Cpu).unwrap();
                let values = |a: &dyn Adapter| {
                    let delta = a.delta(&base, 1.0).unwrap();
                    delta.flatten_all().unwrap().to_vec1::<f32>().unwrap()
                };
                for (x, y) in values(adapter.as_ref()).iter().zip(values(old.as_ref())) {
                    assert!((x - y).abs() < 1e-5, "{client} {layer}: {x} {y}");
                }
            }
            assert_eq!(
                changes.is_empty(),
                client == Client::ComfyUi,
                "{client}: {changes:?}"
            );
        }
    }

    #[test]
    fn every_client_has_its_say() {
        let set = mixed();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        set.save(&path, &SaveOptions::default()).unwrap();
        let review = review_clients(&TensorFile::open(&path).unwrap(), &set).unwrap();
        let count = |client| {
            let report = review.iter().find(|r| r.client == client).unwrap();
            let bad = report
                .findings
                .iter()
                .filter(|f| f.outcome > Outcome::Conditional);
            bad.map(|f| f.layers).sum::<usize>()
        };
        // Bias and w_norm alone; LoHa, core, bias, norm; two of rank 1, bias, norm.
        assert_eq!(count(Client::A1111), 2);
        assert_eq!(count(Client::ComfyUi), 0);
        assert_eq!(count(Client::Diffusers), 4);
        assert_eq!(count(Client::StableDiffusionCpp), 4);
        assert_eq!(count(Client::Lycoris), 1);
    }
}
