//! The difference of two checkpoints as an adapter.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::delta::{Change, LayerDelta, LayerReport, lora_tensors, norm};
use super::fit::{nearest_hadamard, nearest_kronecker};
use super::{RankRule, Svd, Weights};
use crate::adapter::Adapter;
use crate::{AdapterSet, Component, Error, Result};

/// LoHa's fit costs memory by the square of the rank.
const MAX_LOHA_RANK: usize = 32;

/// The family that differences become.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ExtractFamily {
    /// LoRA, and LoCon for convolutions, by singular values.
    Lora,
    /// LoKr with two full matrices, the nearest Kronecker product; `factor` as in
    /// [`factorization`](crate::factorization).
    Lokr {
        /// Bound of the smaller factors, -1 for none.
        factor: i64,
    },
    /// LoHa of this rank, fitted step by step to a local minimum.
    Loha {
        /// The rank of each of the two products.
        rank: usize,
    },
}

/// A bound on the entries of extracted factors.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Clamp {
    /// None.
    #[default]
    Off,
    /// To the given quantile of the absolute values of all entries of both factors.
    Symmetric(f64),
    /// As sd-scripts does: to the quantile of the *signed* values, which depends on the
    /// arbitrary signs of singular vectors.
    SdScripts(f64),
}

impl Clamp {
    /// Clamps two factors together.
    ///
    /// # Errors
    /// [`Error::BadValue`] for a quantile outside of 0 to 1.
    pub fn apply(self, up: &Tensor, down: &Tensor) -> Result<(Tensor, Tensor)> {
        let (Self::Symmetric(q) | Self::SdScripts(q)) = self else {
            return Ok((up.clone(), down.clone()));
        };
        let mut values = up.flatten_all()?.to_vec1::<f32>()?;
        values.extend(down.flatten_all()?.to_vec1::<f32>()?);
        if matches!(self, Self::Symmetric(_)) {
            values.iter_mut().for_each(|v| *v = v.abs());
        }
        let bound = quantile(values, q)?;
        Ok((up.clamp(-bound, bound)?, down.clamp(-bound, bound)?))
    }
}

/// The q-quantile with linear interpolation.
fn quantile(mut values: Vec<f32>, q: f64) -> Result<f32> {
    values.sort_by(f32::total_cmp);
    let bad = || Error::BadValue {
        layer: "quantile".into(),
        name: "q",
        value: q.to_string(),
        expected: "expected 0 to 1, of at least one number",
    };
    if !(0.0..=1.0).contains(&q) {
        return Err(bad());
    }
    let place = q * values.len().saturating_sub(1) as f64;
    let at = |index: usize| values.get(index).map(|v| f64::from(*v));
    let low = at(place.floor() as usize).ok_or_else(bad)?;
    let high = at(place.ceil() as usize).ok_or_else(bad)?;
    Ok((low + (high - low) * place.fract()) as f32)
}

/// The entries of a residual whose absolute value is at least its `quantile`, the rest 0:
/// what LyCORIS stores beside extracted factors as a sparse `bias`.
///
/// # Errors
/// [`Error::BadValue`] for a quantile outside of 0 to 1.
pub fn largest_entries(residual: &Tensor, quantile_of: f64) -> Result<Tensor> {
    let values = residual
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    let bound = quantile(values.iter().map(|v| v.abs()).collect(), quantile_of)?;
    let kept: Vec<f32> = values
        .into_iter()
        .map(|v| if v.abs() >= bound { v } else { 0.0 })
        .collect();
    Ok(Tensor::from_vec(kept, residual.shape(), &Device::Cpu)?)
}

/// How [`extract`] works.
#[derive(Debug, Clone, PartialEq)]
pub struct ExtractOptions {
    /// The family.
    pub family: ExtractFamily,
    /// Ranks of linear layers and 1x1 convolutions.
    pub rule: RankRule,
    /// No rank above this.
    pub most: Option<usize>,
    /// Ranks of larger kernels; `None` extracts the transformers alone.
    pub conv_rule: Option<RankRule>,
    /// Layers outside of transformers and residual blocks too (time embedding, first and
    /// last convolution).
    pub everything: bool,
    /// Larger kernels with a core tensor of the same rank (LyCORIS' `small_conv`).
    pub tucker: bool,
    /// Store the whole difference where the rank reaches half of the outputs, as LyCORIS
    /// does.
    pub full_above_half: bool,
    /// Differences of normalization layers (`w_norm`, `b_norm`).
    pub norms: bool,
    /// Differences of biases (`diff_b`).
    pub biases: bool,
    /// Leave a component out when no weight differs by more than this.
    pub min_diff: f64,
    /// Bound on the factors' entries.
    pub clamp: Clamp,
}

impl ExtractOptions {
    /// A LoRA of the transformers by this rule, nothing else.
    pub fn new(rule: RankRule) -> Self {
        Self {
            family: ExtractFamily::Lora,
            rule,
            most: None,
            conv_rule: None,
            everything: false,
            tucker: false,
            full_above_half: false,
            norms: false,
            biases: false,
            min_diff: 0.0,
            clamp: Clamp::Off,
        }
    }

    /// Whether a layer with a weight of these dimensions takes part.
    fn selects(&self, layer: &str, dims: &[usize]) -> bool {
        let has = |parts: &[&str]| parts.iter().any(|part| layer.contains(part));
        if dims.len() == 1 {
            return self.norms;
        }
        if has(&["_embeddings_"]) {
            return false;
        }
        if Component::TextEncoder.owns(layer) || has(&["_attentions_"]) {
            return true;
        }
        let spatial = has(&["_resnets_", "_downsamplers_", "_upsamplers_"]);
        self.conv_rule.is_some() && (spatial || self.everything)
    }
}

/// Makes an adapter of what `tuned` changed in `base`, with a report on every layer.
/// Layers that are equal in both are left out.
///
/// # Errors
/// [`Error::ShapeMismatch`] when the two models differ in shape, [`Error::BadValue`] when
/// nothing differs or an option makes no sense.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::algebra::{ExtractOptions, RankRule, Weights, extract};
/// let weights = |rows: [[f32; 2]; 2]| -> Result<Weights, lora_core::Error> {
///     let name = "lora_unet_mid_block_attentions_0_fc.weight".to_string();
///     Ok(Weights::from_tensors([(name, Tensor::new(&rows, &Device::Cpu)?)].into()))
/// };
/// let (base, tuned) = (weights([[0., 0.], [0., 0.]])?, weights([[3., 0.], [0., 4.]])?);
/// let (set, reports) = extract(&base, &tuned, &ExtractOptions::new(RankRule::Fixed(1)))?;
/// assert_eq!(set.len(), 1);
/// assert!((reports[0].error - 0.6).abs() < 1e-6); // 3 of 5
/// # Ok::<(), lora_core::Error>(())
/// ```
pub fn extract(
    base: &Weights,
    tuned: &Weights,
    options: &ExtractOptions,
) -> Result<(AdapterSet, Vec<LayerReport>)> {
    options.rule.validate()?;
    if let Some(rule) = options.conv_rule {
        rule.validate()?;
    }
    if let ExtractFamily::Loha { rank } = options.family
        && !(1..=MAX_LOHA_RANK).contains(&rank)
    {
        return Err(Error::BadValue {
            layer: "extraction".into(),
            name: "LoHa rank",
            value: rank.to_string(),
            expected: "expected 1 to 32: the fit solves systems of rank^2 numbers per row",
        });
    }
    let layers: Vec<&str> = base.layers().collect();
    let results: Result<Vec<Option<Extracted>>> = layers
        .into_par_iter()
        .map(|layer| one(layer, base, tuned, options))
        .collect();
    let found: Vec<Extracted> = results?.into_iter().flatten().collect();
    let mut largest: BTreeMap<bool, f64> = BTreeMap::new();
    for layer in found.iter().filter(|l| l.matrix) {
        let text = Component::TextEncoder.owns(&layer.report.layer);
        let most = largest.entry(text).or_default();
        *most = most.max(layer.largest);
    }
    let (mut set, mut reports) = (AdapterSet::default(), Vec::new());
    for layer in found {
        let text = Component::TextEncoder.owns(&layer.report.layer);
        let most = largest.get(&text).copied().unwrap_or(f64::INFINITY);
        if most > options.min_diff && layer.changed {
            set.insert(layer.report.layer.clone(), layer.adapter);
            reports.push(layer.report);
        }
    }
    if set.is_empty() {
        return Err(Error::BadValue {
            layer: "extraction".into(),
            name: "difference",
            value: "0".into(),
            expected: "the two models do not differ in the selected layers",
        });
    }
    describe(&mut set, options);
    Ok((set, reports))
}

fn describe(set: &mut AdapterSet, options: &ExtractOptions) {
    let text = |rule: RankRule| match rule {
        RankRule::Fixed(rank) => (rank.to_string(), format!("{rank}.0")),
        _ => ("Dynamic".into(), "Dynamic".into()),
    };
    let (dim, alpha) = text(options.rule);
    let mut arguments = BTreeMap::new();
    if let Some(rule) = options.conv_rule {
        let (dim, alpha) = text(rule);
        arguments.insert("conv_dim", dim);
        arguments.insert("conv_alpha", alpha);
    }
    let (module, algo) = match options.family {
        ExtractFamily::Lora if options.tucker || options.norms || options.full_above_half => {
            ("lycoris.kohya", Some("locon"))
        }
        ExtractFamily::Lora => ("networks.lora", None),
        ExtractFamily::Lokr { .. } => ("lycoris.kohya", Some("lokr")),
        ExtractFamily::Loha { .. } => ("lycoris.kohya", Some("loha")),
    };
    if let Some(algo) = algo {
        arguments.insert("algo", algo.into());
    }
    let arguments: Vec<String> = arguments
        .iter()
        .map(|(key, value)| format!("\"{key}\": \"{value}\""))
        .collect();
    let metadata = set.metadata_mut();
    for (key, value) in [
        ("ss_network_module", module.to_string()),
        ("ss_network_dim", dim),
        ("ss_network_alpha", alpha),
        ("ss_network_args", format!("{{{}}}", arguments.join(", "))),
        ("ss_base_model_version", "sd_v1".into()),
        ("ss_v2", "False".into()),
    ] {
        metadata.insert(key.into(), value);
    }
}

struct Extracted {
    adapter: Arc<dyn Adapter>,
    report: LayerReport,
    /// Largest absolute difference of the weights.
    largest: f64,
    /// Whether weight or bias differ at all.
    changed: bool,
    /// Whether it is a linear layer or a convolution.
    matrix: bool,
}

fn one(
    layer: &str,
    base: &Weights,
    tuned: &Weights,
    options: &ExtractOptions,
) -> Result<Option<Extracted>> {
    let (Some(old), Some(new)) = (base.weight(layer)?, tuned.weight(layer)?) else {
        return Ok(None);
    };
    if !options.selects(layer, old.dims()) {
        return Ok(None);
    }
    let subtract = |new: &Tensor, old: &Tensor| -> Result<Tensor> {
        if new.dims() != old.dims() {
            return Err(Error::ShapeMismatch {
                layer: layer.into(),
                tensor: "the tuned model's tensor".into(),
                expected: format!("the base model's {:?}", old.dims()),
                got: new.dims().to_vec(),
            });
        }
        Ok((new.to_dtype(DType::F32)? - old.to_dtype(DType::F32)?)?)
    };
    let difference = subtract(&new, &old)?;
    let norm_layer = difference.rank() == 1;
    let bias = match (base.bias(layer)?, tuned.bias(layer)?) {
        (Some(old), Some(new)) if options.biases || norm_layer => Some(subtract(&new, &old)?),
        _ => None,
    };
    let bias = match bias {
        Some(bias) if norm_layer || largest(&bias)? > 0.0 => Some(bias),
        _ => None,
    };
    let largest_difference = largest(&difference)?;
    let changed = largest_difference > 0.0 || bias.as_ref().map_or(Ok(0.0), largest)? > 0.0;
    if !changed {
        return Ok(None);
    }
    let (adapter, report) = extract_layer(layer, &difference, bias, options)?;
    Ok(Some(Extracted {
        adapter,
        report,
        largest: largest_difference,
        changed,
        matrix: !norm_layer,
    }))
}

fn largest(tensor: &Tensor) -> Result<f64> {
    let most = tensor.abs()?.flatten_all()?.max(0)?;
    Ok(f64::from(most.to_scalar::<f32>()?))
}

/// One layer's difference as an adapter: `difference` has the weight's shape.
///
/// # Errors
/// As [`extract`].
pub fn extract_layer(
    layer: &str,
    difference: &Tensor,
    bias: Option<Tensor>,
    options: &ExtractOptions,
) -> Result<(Arc<dyn Adapter>, LayerReport)> {
    let dims = difference.dims().to_vec();
    let change = match dims.len() {
        1 => Change::Norm(difference.clone()),
        2 | 4 => Change::Dense(difference.flatten_from(1)?),
        _ => {
            return Err(Error::ShapeMismatch {
                layer: layer.into(),
                tensor: "weight".into(),
                expected: "a linear, convolution or normalization layer".into(),
                got: dims,
            });
        }
    };
    let delta = LayerDelta {
        layer: layer.to_string(),
        dims,
        change,
        bias,
    };
    match (&delta.change, options.family) {
        (Change::Dense(matrix), ExtractFamily::Lora) => lora(&delta, matrix, options),
        (Change::Dense(matrix), ExtractFamily::Lokr { factor }) => {
            let (w1, w2) = nearest_kronecker(difference, factor)?;
            let alpha = Tensor::new(1f32, &Device::Cpu)?;
            let parts = [("lokr_w1", w1), ("lokr_w2", w2), ("alpha", alpha)];
            fitted(&delta, matrix, parts, None)
        }
        (Change::Dense(matrix), ExtractFamily::Loha { rank }) => {
            let [a1, b1, a2, b2] = nearest_hadamard(matrix, rank.max(1))?;
            let alpha = Tensor::new(rank as f32, &Device::Cpu)?;
            let parts = [
                ("hada_w1_a", a1),
                ("hada_w1_b", b1),
                ("hada_w2_a", a2),
                ("hada_w2_b", b2),
                ("alpha", alpha),
            ];
            fitted(&delta, matrix, parts, Some(rank))
        }
        _ => delta.exact(),
    }
}

/// An adapter that was fitted, with its measured error.
fn fitted<const N: usize>(
    delta: &LayerDelta,
    matrix: &Tensor,
    parts: [(&str, Tensor); N],
    rank: Option<usize>,
) -> Result<(Arc<dyn Adapter>, LayerReport)> {
    let parts = parts.map(|(name, tensor)| (name.to_string(), tensor));
    let adapter = delta.build(parts.into())?;
    let got = adapter.delta(&matrix.zeros_like()?, 1.0)?;
    let size = norm(matrix)?;
    let missing = norm(&(matrix - got)?)?;
    let report = LayerReport {
        layer: delta.layer.clone(),
        rank,
        norm: size,
        error: if size > 0.0 { missing / size } else { 0.0 },
    };
    Ok((adapter, report))
}

fn lora(
    delta: &LayerDelta,
    matrix: &Tensor,
    options: &ExtractOptions,
) -> Result<(Arc<dyn Adapter>, LayerReport)> {
    let spatial = matches!(*delta.dims, [_, _, kh, kw] if kh * kw > 1);
    let rule = match options.conv_rule {
        Some(rule) if spatial => rule,
        _ => options.rule,
    };
    let svd = Svd::for_rule(matrix, rule)?;
    let outputs = delta.dims.first().copied().unwrap_or(1);
    let inputs = delta.dims.get(1).copied().unwrap_or(1);
    let rank = rule.rank(svd.values(), svd.energy());
    let rank = rank
        .min(options.most.unwrap_or(rank))
        .clamp(1, outputs.min(inputs).max(1));
    if options.full_above_half && 2 * rank >= outputs {
        return delta.exact();
    }
    let mut report = LayerReport {
        layer: delta.layer.clone(),
        rank: Some(rank),
        norm: svd.energy().sqrt(),
        error: svd.error(rank),
    };
    let (up, down) = svd.factors(rank)?;
    let (up, down) = options.clamp.apply(&up, &down)?;
    let mut parts = lora_tensors(&up, &down, &delta.dims, rank as f64)?;
    if options.tucker
        && spatial
        && let [_, i, kh, kw] = *delta.dims
    {
        // down [r, i, k] seen as [i, r k] is of rank r at most n: its factors are the 1x1
        // down and the core.
        let turned = down
            .reshape((rank, i, kh * kw))?
            .transpose(0, 1)?
            .contiguous()?;
        let inner = Svd::exact(&turned.reshape((i, rank * kh * kw))?)?;
        let (left, right) = inner.factors(rank)?;
        let kept = left.dim(1)?;
        let core = right.reshape((kept, rank, kh, kw))?.transpose(0, 1)?;
        parts.insert("lora_mid.weight".into(), core.contiguous()?);
        let thin = left.t()?.contiguous()?.reshape((kept, i, 1, 1))?;
        parts.insert("lora_down.weight".into(), thin);
    }
    let adapter = delta.build(parts)?;
    if options.tucker || options.clamp != Clamp::Off {
        let got = adapter.delta(&matrix.zeros_like()?, 1.0)?;
        report.error = norm(&(matrix - got)?)? / report.norm.max(f64::MIN_POSITIVE);
    }
    Ok((adapter, report))
}
