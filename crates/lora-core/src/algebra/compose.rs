//! Several adapters into one; one adapter into another form.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::delta::{Change, LayerDelta, LayerReport, adapter_from};
use super::{RankRule, Strength, Weights};
use crate::adapter::Adapter;
use crate::{AdapterSet, Error, Result};

type Layers = BTreeMap<String, (Arc<dyn Adapter>, LayerReport)>;

fn collect(layers: Layers, metadata: BTreeMap<String, String>) -> (AdapterSet, Vec<LayerReport>) {
    let mut set = AdapterSet::default();
    let mut reports = Vec::new();
    for (layer, (adapter, report)) in layers {
        set.insert(layer, adapter);
        reports.push(report);
    }
    *set.metadata_mut() = metadata;
    (set, reports)
}

/// What describes the network in a file's metadata, after its ranks have changed.
fn described(set: &mut AdapterSet, comment: &str) {
    let ranks: BTreeSet<usize> = set.iter().filter_map(|(_, a)| a.rank()).collect();
    let alphas: BTreeSet<String> = set
        .iter()
        .filter_map(|(_, a)| a.alpha().map(|alpha| alpha.to_string()))
        .collect();
    let one = |all: BTreeSet<String>| match all.len() {
        1 => all.into_iter().next().unwrap_or_default(),
        _ => "Dynamic".to_string(),
    };
    let ranks = ranks.iter().map(ToString::to_string).collect();
    let old = set.metadata().get("ss_training_comment").cloned();
    let comment = match old.filter(|old| !old.is_empty() && old != "None") {
        Some(old) => format!("{comment}; {old}"),
        None => comment.to_string(),
    };
    let lora = set.iter().all(|(_, a)| a.family() == crate::Family::Lora);
    let metadata = set.metadata_mut();
    metadata.insert("ss_network_dim".into(), one(ranks));
    metadata.insert("ss_network_alpha".into(), one(alphas));
    metadata.insert("ss_training_comment".into(), comment);
    if lora {
        metadata.insert("ss_network_module".into(), "networks.lora".into());
        metadata.remove("ss_network_args");
    } else {
        let module = metadata.entry("ss_network_module".into());
        module.or_insert_with(|| "lycoris.kohya".into());
    }
    for stale in [
        "sshs_model_hash",
        "sshs_legacy_hash",
        "modelspec.hash_sha256",
    ] {
        metadata.remove(stale);
    }
}

/// What is true of a sum if all its parts agree about it.
const SHARED: [&str; 11] = [
    "modelspec.architecture",
    "modelspec.encoder_layer",
    "modelspec.implementation",
    "modelspec.prediction_type",
    "modelspec.resolution",
    "modelspec.sai_model_spec",
    "ss_base_model_version",
    "ss_new_sd_model_hash",
    "ss_sd_model_hash",
    "ss_sd_model_name",
    "ss_v2",
];

/// The metadata of a sum. That of one adapter stays; several share only what they agree
/// about, and are named as sd-scripts does.
fn metadata_of_sum(sets: &[&AdapterSet]) -> BTreeMap<String, String> {
    if let [one] = sets {
        return one.metadata().clone();
    }
    let mut metadata = BTreeMap::new();
    for key in SHARED {
        let mut said = sets.iter().filter_map(|set| set.metadata().get(key));
        if let Some(first) = said.next()
            && said.all(|other| other == first)
        {
            metadata.insert(key.to_string(), first.clone());
        }
    }
    let titles: Vec<String> = sets.iter().filter_map(|set| set.title()).collect();
    metadata.insert("modelspec.merged_from".into(), titles.join(", "));
    metadata
}

/// Adds adapters up into one.
///
/// Without a rule the result is exact: ranks are concatenated, whole differences added,
/// and a layer on which other families meet becomes a whole difference (`diff`). With a
/// rule every layer becomes the nearest LoRA of the rank it picks, `most` at the most.
/// Families whose change depends on the weight (DoRA, OFT, ...) need `base`, and each is
/// taken relative to it. Of the metadata, the result has what the adapters agree about the
/// model they are for, and their titles (`modelspec.merged_from`), nothing of their training.
///
/// # Errors
/// [`Error::ShapeMismatch`] when the adapters disagree about a layer,
/// [`Error::NotPossible`] when a base is needed.
///
/// ```
/// use std::sync::Arc;
/// use candle_core::{Device, DType, Tensor};
/// use lora_core::{AdapterSet, Lora};
/// use lora_core::algebra::{Strength, compose};
/// let set = |value: f32| -> Result<AdapterSet, lora_core::Error> {
///     let down = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
///     let lora = Lora::new("fc", down, None, Tensor::new(&[[value]], &Device::Cpu)?, 1.0)?;
///     let mut set = AdapterSet::default();
///     set.insert("lora_unet_fc", Arc::new(lora));
///     Ok(set)
/// };
/// let (a, b) = (set(1.0)?, set(10.0)?);
/// let (sum, _) = compose(&[(&a, Strength::new(2.0, 1.0)), (&b, Strength::default())], None, None, None)?;
/// let base = Tensor::zeros((1, 2), DType::F32, &Device::Cpu)?;
/// let delta = sum.get("lora_unet_fc").unwrap().delta(&base, 1.0)?;
/// assert!((delta.to_vec2::<f32>()?[0][1] - 24.0).abs() < 1e-5);
/// # Ok::<(), lora_core::Error>(())
/// ```
pub fn compose(
    adapters: &[(&AdapterSet, Strength)],
    rule: Option<RankRule>,
    most: Option<usize>,
    base: Option<&Weights>,
) -> Result<(AdapterSet, Vec<LayerReport>)> {
    if let Some(rule) = rule {
        rule.validate()?;
    }
    let names: BTreeSet<&str> = adapters.iter().flat_map(|(set, _)| set.names()).collect();
    let names: Vec<&str> = names.into_iter().collect();
    let layers: Result<Layers> = names
        .into_par_iter()
        .map(|layer| {
            let parts: Vec<(&dyn Adapter, f64)> = adapters
                .iter()
                .filter_map(|(set, strength)| Some((set.get(layer)?.as_ref(), strength.of(layer))))
                .collect();
            let delta = LayerDelta::sum(layer, &parts, base)?;
            let result = match rule {
                Some(rule) => delta.reduced(rule, most)?,
                None => delta.exact()?,
            };
            Ok((layer.to_string(), result))
        })
        .collect();
    let sets: Vec<&AdapterSet> = adapters.iter().map(|(set, _)| *set).collect();
    let (mut set, reports) = collect(layers?, metadata_of_sum(&sets));
    if adapters.len() > 1 {
        described(&mut set, &format!("sum of {} adapters", adapters.len()));
    } else {
        described(&mut set, "converted to LoRA");
    }
    for (source, _) in adapters {
        for (key, tensor) in source.bundled_embeddings() {
            set.insert_bundled(format!("{}{key}", crate::format::BUNDLE), tensor.clone());
        }
    }
    Ok((set, reports))
}

/// Every layer as the nearest plain LoRA; the reports tell what was lost. Bias changes
/// stay beside it (`diff_b`), normalization layers stay what they are.
///
/// # Errors
/// As [`compose`].
pub fn convert(
    adapter: &AdapterSet,
    rule: RankRule,
    most: Option<usize>,
    base: Option<&Weights>,
) -> Result<(AdapterSet, Vec<LayerReport>)> {
    compose(&[(adapter, Strength::default())], Some(rule), most, base)
}

/// How [`resize`] picks ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ResizeOptions {
    /// The rule for linear layers and 1x1 convolutions.
    pub rule: RankRule,
    /// No rank above this.
    pub most: Option<usize>,
    /// The rule for larger kernels; `None` for the same.
    pub conv_rule: Option<RankRule>,
    /// No rank above this for larger kernels; `None` for the same.
    pub conv_most: Option<usize>,
    /// Count as sd-scripts does: dynamic rules keep one value more, at least two, and 1x1
    /// convolutions follow `conv_rule` and `conv_most`.
    pub sd_scripts: bool,
}

impl ResizeOptions {
    /// One rule for all layers.
    pub fn new(rule: RankRule) -> Self {
        Self {
            rule,
            most: None,
            conv_rule: None,
            conv_most: None,
            sd_scripts: false,
        }
    }
}

/// A LoRA with other ranks, each layer by the rule. `alpha / rank` of every layer stays,
/// and rules see the singular values of `up down` without it, as in sd-scripts.
///
/// # Errors
/// [`Error::NotPossible`] for layers that are not LoRA ([`convert`] them),
/// [`Error::BadValue`] for a rule that sd-scripts does not have in its mode.
pub fn resize(
    adapter: &AdapterSet,
    options: &ResizeOptions,
) -> Result<(AdapterSet, Vec<LayerReport>)> {
    options.rule.validate()?;
    options.conv_rule.unwrap_or(options.rule).validate()?;
    let entries: Vec<(&str, &Arc<dyn Adapter>)> = adapter.iter().collect();
    let layers: Result<Layers> = entries
        .into_par_iter()
        .map(|(layer, adapter)| {
            Ok((
                layer.to_string(),
                resize_layer(layer, adapter.as_ref(), options)?,
            ))
        })
        .collect();
    let (mut set, reports) = collect(layers?, adapter.metadata().clone());
    let old = adapter.metadata().get("ss_network_dim");
    let old = old.map_or("another rank", String::as_str);
    described(
        &mut set,
        &format!("resized from {old} by {:?}", options.rule),
    );
    Ok((set, reports))
}

fn resize_layer(
    layer: &str,
    adapter: &dyn Adapter,
    options: &ResizeOptions,
) -> Result<(Arc<dyn Adapter>, LayerReport)> {
    let delta = LayerDelta::sum(layer, &[(adapter, 1.0)], None)?;
    let Change::Product(up, down) = &delta.change else {
        if matches!(delta.change, Change::Norm(_)) {
            return delta.exact();
        }
        return Err(Error::NotPossible {
            layer: layer.into(),
            what: format!("resizing {}", adapter.family()),
            advice: "convert it to LoRA first",
        });
    };
    let rank = adapter.rank().unwrap_or(1).max(1) as f64;
    let scale = adapter.alpha().map_or(1.0, |alpha| alpha / rank);
    let scale = if scale == 0.0 { 1.0 } else { scale };
    let conv = match delta.dims.as_slice() {
        [_, _, kh, kw] => kh * kw > 1 || options.sd_scripts,
        _ => false,
    };
    let (rule, most) = if conv {
        (
            options.conv_rule.unwrap_or(options.rule),
            options.conv_most.or(options.most),
        )
    } else {
        (options.rule, options.most)
    };
    let svd = super::Svd::of_product(&(up * (1.0 / scale))?, down)?;
    let rank = if options.sd_scripts {
        let mut values = svd.values().to_vec();
        let columns: usize = delta.dims.iter().skip(1).product();
        values.resize(columns.min(delta.dims.first().copied().unwrap_or(1)), 0.0);
        rule.sd_scripts_rank(&values)
            .ok_or_else(|| Error::BadValue {
                layer: layer.into(),
                name: "rule",
                value: format!("{rule:?}"),
                expected: "sd-scripts has fixed, sv_ratio, sv_cumulative and sv_fro",
            })?
    } else {
        rule.rank(svd.values(), svd.energy())
    };
    let rank = rank.min(most.unwrap_or(rank)).max(1);
    let report = LayerReport {
        layer: layer.to_string(),
        rank: Some(rank),
        norm: svd.energy().sqrt() * scale.abs(),
        error: svd.error(rank),
    };
    let (mut up, mut down) = svd.factors(rank)?;
    let missing = rank - up.dim(1)?;
    if missing > 0 {
        up = up.pad_with_zeros(1, 0, missing)?;
        down = down.pad_with_zeros(0, 0, missing)?;
    }
    Ok((delta.lora(&up, &down, scale * rank as f64)?, report))
}

/// sd-scripts' `merge_lora.py` for LoRAs among themselves, **wrong arithmetic kept**, to
/// reproduce old files; use [`compose`] for anything else.
///
/// Every factor of file j is multiplied by `sqrt(alpha_j / alpha_1) ratio_j` (its absolute
/// value for `up`), so that a delta grows with the square of its ratio. The factors are
/// then added, which makes terms of one file's `up` with another's `down`, or with
/// `concat` put side by side while `alpha` stays, which divides by the new rank.
///
/// # Errors
/// [`Error::NotPossible`] for families other than LoRA without core,
/// [`Error::ShapeMismatch`] when ranks differ and `concat` is off.
pub fn compose_as_sd_scripts(adapters: &[(&AdapterSet, f64)], concat: bool) -> Result<AdapterSet> {
    let mut sums: BTreeMap<String, (Tensor, Tensor, f64)> = BTreeMap::new();
    for (set, ratio) in adapters {
        for (layer, adapter) in set.iter() {
            let tensors: BTreeMap<&str, Tensor> = adapter.tensors()?.into_iter().collect();
            let (Some(up), Some(down), Some(alpha), 3) = (
                tensors.get("lora_up.weight"),
                tensors.get("lora_down.weight"),
                adapter.alpha(),
                tensors.len(),
            ) else {
                return Err(Error::NotPossible {
                    layer: layer.into(),
                    what: format!("{} in sd-scripts' merge", adapter.family()),
                    advice: "use compose without the compatibility mode",
                });
            };
            let float = candle_core::DType::F32;
            let (up, down) = (up.to_dtype(float)?, down.to_dtype(float)?);
            let first = sums.get(layer).map_or(alpha, |(_, _, alpha)| *alpha);
            let scale = (alpha / first).sqrt() * ratio;
            let (up, down) = ((up * scale.abs())?, (down * scale)?);
            let sum = match sums.remove(layer) {
                None => (up, down),
                Some((a, b, _)) if concat => {
                    (Tensor::cat(&[a, up], 1)?, Tensor::cat(&[b, down], 0)?)
                }
                Some((a, b, _)) if a.dims() == up.dims() && b.dims() == down.dims() => {
                    ((a + up)?, (b + down)?)
                }
                Some((a, _, _)) => {
                    return Err(Error::ShapeMismatch {
                        layer: layer.into(),
                        tensor: "lora_up.weight".into(),
                        expected: format!("the shape {:?} of the files before", a.dims()),
                        got: up.dims().to_vec(),
                    });
                }
            };
            sums.insert(layer.to_string(), (sum.0, sum.1, first));
        }
    }
    let mut result = AdapterSet::default();
    for (layer, (up, down, alpha)) in sums {
        let parts = BTreeMap::from([
            ("lora_up.weight".to_string(), up),
            ("lora_down.weight".to_string(), down),
            (
                "alpha".to_string(),
                Tensor::new(alpha as f32, &Device::Cpu)?,
            ),
        ]);
        result.insert(layer.clone(), adapter_from(&layer, parts)?);
    }
    let sets: Vec<&AdapterSet> = adapters.iter().map(|(set, _)| *set).collect();
    *result.metadata_mut() = metadata_of_sum(&sets);
    described(&mut result, "merged as sd-scripts does");
    Ok(result)
}
