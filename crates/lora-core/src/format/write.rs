//! Writing the layouts of diffusers and PEFT. Paths come from the table of layers, so that
//! only layers of Stable Diffusion 1.x can be written.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::{Map, Value, json};

use super::modules::layer_path;
use super::peft::config_path;
use crate::adapter::Adapter;
use crate::{AdapterSet, Component, Error, Family, Result};

/// The layout of keys in which a set is written.
///
/// diffusers' layouts have no reliable place for `alpha`: there the scale is multiplied into
/// the up factors, so that every reader gets it right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum SaveLayout {
    /// sd-scripts and LyCORIS; every family.
    #[default]
    Kohya,
    /// The same with LDM's names of UNet layers.
    KohyaLdm,
    /// diffusers' attention processors: LoRA without Tucker cores.
    DiffusersOld,
    /// diffusers since PEFT: LoRA without Tucker cores, and DoRA per output on it.
    Diffusers,
    /// PEFT: `adapter_config.json` is written beside the file. One component, and one of
    /// LoRA (DoRA per output on it), LoHa and LoKr. The file is usually called
    /// `adapter_model.safetensors`.
    Peft,
}

impl SaveLayout {
    fn name(self) -> &'static str {
        match self {
            Self::Kohya => "kohya",
            Self::KohyaLdm => "kohya with LDM names",
            Self::DiffusersOld => "diffusers attention processor",
            Self::Diffusers => "diffusers",
            Self::Peft => "PEFT",
        }
    }
}

/// What is to be written.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) tensors: BTreeMap<String, Tensor>,
    pub(super) metadata: BTreeMap<String, String>,
    /// `adapter_config.json`.
    pub(super) config: Option<Value>,
}

/// A set's tensors, metadata and configuration in a layout.
///
/// # Errors
/// [`Error::NotWritable`] for what the layout has no way to say.
pub(super) fn laid_out(
    set: &AdapterSet,
    layout: SaveLayout,
    dtype: Option<DType>,
) -> Result<Written> {
    let mut written = match layout {
        SaveLayout::Kohya => Written {
            tensors: set.tensors(None)?,
            ..Written::default()
        },
        SaveLayout::KohyaLdm => ldm(set)?,
        SaveLayout::DiffusersOld | SaveLayout::Diffusers | SaveLayout::Peft => {
            if set.bundled_embeddings().next().is_some() {
                return Err(not_writable(
                    "the file",
                    "a bundled embedding",
                    layout,
                    "take the embeddings out first",
                ));
            }
            if layout == SaveLayout::Peft {
                peft(set)?
            } else {
                diffusers(set, layout)?
            }
        }
    };
    if let Some(dtype) = dtype {
        for tensor in written.tensors.values_mut() {
            if tensor.dtype().is_float() {
                *tensor = tensor.to_dtype(dtype)?;
            }
        }
    }
    Ok(written)
}

/// Writes `adapter_config.json` beside a file.
pub(super) fn write_config(path: &Path, config: &Value) -> Result<()> {
    let text = format!("{config:#}\n");
    super::write_atomically(&config_path(path), |out| out.write_all(text.as_bytes()))
}

fn not_writable(layer: &str, what: &str, layout: SaveLayout, advice: &'static str) -> Error {
    Error::NotWritable {
        layer: layer.to_string(),
        what: what.to_string(),
        layout: layout.name(),
        advice,
    }
}

/// Component and dotted path of a layer.
fn place(layer: &str, layout: SaveLayout) -> Result<(Component, String)> {
    layer_path(layer).ok_or_else(|| {
        not_writable(
            layer,
            "a layer that Stable Diffusion 1.x does not have",
            layout,
            "use kohya's layout",
        )
    })
}

fn ldm(set: &AdapterSet) -> Result<Written> {
    let mut tensors = BTreeMap::new();
    for (key, tensor) in set.tensors(None)? {
        let renamed = key.split_once('.').and_then(|(layer, part)| {
            let name = layer
                .strip_prefix("oft_")
                .map(|rest| format!("lora_{rest}"));
            let path = super::layer_to_ldm(name.as_deref().unwrap_or(layer))?;
            let prefix = layer.split('_').next()?;
            Some(format!("{prefix}_unet_{}.{part}", path.replace('.', "_")))
        });
        if renamed.is_none() && key.contains("_unet_") {
            place(key.split('.').next().unwrap_or(&key), SaveLayout::KohyaLdm)?;
        }
        tensors.insert(renamed.unwrap_or(key), tensor);
    }
    Ok(Written {
        tensors,
        ..Written::default()
    })
}

/// The factors of a LoRA or DoRA by file suffix, without `alpha`; other families and Tucker
/// cores are refused.
fn low_rank(
    layer: &str,
    adapter: &dyn Adapter,
    layout: SaveLayout,
) -> Result<BTreeMap<&'static str, Tensor>> {
    let advice = "convert it to plain LoRA first";
    let dora = layout != SaveLayout::DiffusersOld;
    match adapter.family() {
        Family::Lora => {}
        Family::Dora if dora => {}
        other => return Err(not_writable(layer, other.name(), layout, advice)),
    }
    let mut parts: BTreeMap<&str, Tensor> = adapter.tensors()?.into_iter().collect();
    parts.remove("alpha");
    let known = ["lora_down.weight", "lora_up.weight", "dora_scale"];
    match parts.keys().find(|name| !known.contains(name)) {
        Some(&part) => Err(not_writable(layer, part, layout, advice)),
        None => Ok(parts.into_iter().map(|(n, t)| (n, t.detach())).collect()),
    }
}

/// The factors of a LoHa or LoKr by file suffix, without `alpha`.
fn product(layer: &str, adapter: &dyn Adapter) -> Result<BTreeMap<&'static str, Tensor>> {
    let mut parts: BTreeMap<&str, Tensor> = adapter.tensors()?.into_iter().collect();
    parts.remove("alpha");
    let known = |name: &str| name.starts_with("hada_") || name.starts_with("lokr_");
    match parts.keys().find(|name| !known(name)) {
        Some(&part) => Err(not_writable(
            layer,
            part,
            SaveLayout::Peft,
            "keep kohya's layout",
        )),
        None => Ok(parts.into_iter().map(|(n, t)| (n, t.detach())).collect()),
    }
}

/// PEFT's shape of the magnitudes: `[o]`, or `[1, o, 1, 1]` for a convolution.
fn magnitude(layer: &str, scale: &Tensor, down: &Tensor, layout: SaveLayout) -> Result<Tensor> {
    let outputs = scale.elem_count();
    if scale.dims().first() != Some(&outputs) {
        let what = "DoRA with magnitudes per input";
        return Err(not_writable(layer, what, layout, "keep kohya's layout"));
    }
    Ok(match down.rank() {
        4 => scale.reshape((1, outputs, 1, 1))?,
        _ => scale.flatten_all()?,
    })
}

fn diffusers(set: &AdapterSet, layout: SaveLayout) -> Result<Written> {
    let mut tensors = BTreeMap::new();
    let mut ranks: BTreeMap<&str, BTreeMap<String, usize>> = BTreeMap::new();
    let mut decomposed: BTreeSet<&str> = BTreeSet::new();
    for (layer, adapter) in set.iter() {
        let (component, path) = place(layer, layout)?;
        let mut parts = low_rank(layer, adapter.as_ref(), layout)?;
        let rank = adapter.rank().unwrap_or(1);
        let prefix = match component {
            Component::TextEncoder => "text_encoder",
            _ => "unet",
        };
        ranks.entry(prefix).or_default().insert(path.clone(), rank);
        if let Some(up) = parts.get_mut("lora_up.weight") {
            let dtype = up.dtype();
            *up = (up.to_dtype(DType::F32)? * adapter.scale())?.to_dtype(dtype)?;
        }
        let down = parts.get("lora_down.weight").cloned();
        for (part, tensor) in parts {
            let (name, tensor) = match (part, &down) {
                ("dora_scale", Some(down)) => {
                    decomposed.insert(prefix);
                    (
                        "lora_magnitude_vector",
                        magnitude(layer, &tensor, down, layout)?,
                    )
                }
                ("lora_down.weight", _) => ("lora_A.weight", tensor),
                _ => ("lora_B.weight", tensor),
            };
            let key = match layout {
                SaveLayout::DiffusersOld => old_key(&component, &path, name),
                _ => format!("{prefix}.{path}.{name}"),
            };
            tensors.insert(key, tensor);
        }
    }
    let mut metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    if layout == SaveLayout::Diffusers {
        let mut all = Map::new();
        for (prefix, ranks) in &ranks {
            let (common, others) = exceptions(ranks);
            let own = json!({
                "peft_type": "LORA",
                "r": common,
                "lora_alpha": common,
                "rank_pattern": others,
                "alpha_pattern": others,
                "use_dora": decomposed.contains(prefix),
                "use_rslora": false,
                "target_modules": ranks.keys().collect::<Vec<_>>(),
            });
            for (key, value) in own.as_object().into_iter().flatten() {
                all.insert(format!("{prefix}.{key}"), value.clone());
            }
        }
        let text = Value::Object(all).to_string();
        metadata.insert("lora_adapter_metadata".into(), text);
    }
    Ok(Written {
        tensors,
        metadata,
        config: None,
    })
}

/// diffusers' older key of a factor: attention projections belong to a processor, other
/// layers carry the factors themselves.
fn old_key(component: &Component, path: &str, part: &str) -> String {
    let direction = if part == "lora_A.weight" {
        "down"
    } else {
        "up"
    };
    let (parent, last) = path.rsplit_once('.').unwrap_or(("", path));
    if *component == Component::TextEncoder {
        return match (parent.ends_with(".self_attn"), last.strip_suffix("_proj")) {
            (true, Some(name)) => {
                format!("text_encoder.{parent}.to_{name}_lora.{direction}.weight")
            }
            _ => format!("text_encoder.{path}.lora_linear_layer.{direction}.weight"),
        };
    }
    let attention = path.strip_suffix(".0").unwrap_or(path).rsplit_once(".to_");
    match attention {
        Some((parent, name)) => {
            format!("unet.{parent}.processor.to_{name}_lora.{direction}.weight")
        }
        None => format!("unet.{path}.lora.{direction}.weight"),
    }
}

/// The value that most layers have, and those of the others by path.
fn exceptions<T: Copy + PartialEq>(values: &BTreeMap<String, T>) -> (Option<T>, BTreeMap<&str, T>) {
    let common = values
        .values()
        .max_by_key(|v| values.values().filter(|o| o == v).count())
        .copied();
    let others = values
        .iter()
        .filter(|(_, v)| Some(**v) != common)
        .map(|(path, v)| (path.as_str(), *v))
        .collect();
    (common, others)
}

fn peft(set: &AdapterSet) -> Result<Written> {
    let layout = SaveLayout::Peft;
    let mut tensors = BTreeMap::new();
    let (mut ranks, mut alphas) = (BTreeMap::new(), BTreeMap::new());
    let (mut components, mut kinds) = (BTreeSet::new(), BTreeSet::new());
    let (mut decomposed, mut cores) = (false, false);
    let mut kronecker = Vec::new();
    for (layer, adapter) in set.iter() {
        let (component, path) = place(layer, layout)?;
        components.insert(component);
        let family = adapter.family();
        let parts = match family {
            Family::Loha | Family::Lokr => product(layer, adapter.as_ref())?,
            _ => low_rank(layer, adapter.as_ref(), layout)?,
        };
        kinds.insert(match family {
            Family::Loha => "LOHA",
            Family::Lokr => "LOKR",
            _ => "LORA",
        });
        cores |= parts
            .keys()
            .any(|n| n.ends_with("_t1") || n.ends_with("_t2"));
        let mut rank = adapter.rank();
        if family == Family::Lokr {
            let sizes = KroneckerSizes::of(&path, &parts, adapter.matrix_dims());
            // PEFT makes both factors full where the rank is no smaller than they are.
            rank = rank.or(Some(sizes.largest().div_ceil(2)));
            kronecker.push((layer.to_string(), rank.unwrap_or(1), sizes));
        }
        ranks.insert(path.clone(), rank.unwrap_or(1));
        alphas.insert(path.clone(), adapter.scale() * rank.unwrap_or(1) as f64);
        let down = parts.get("lora_down.weight").cloned();
        for (part, tensor) in parts {
            let (name, tensor) = match (part, &down) {
                ("dora_scale", Some(down)) => {
                    decomposed = true;
                    let tensor = magnitude(layer, &tensor, down, layout)?;
                    ("lora_magnitude_vector", tensor)
                }
                ("lora_down.weight", _) => ("lora_A.weight", tensor),
                ("lora_up.weight", _) => ("lora_B.weight", tensor),
                (other, _) => (other, tensor),
            };
            tensors.insert(format!("base_model.model.{path}.{name}"), tensor);
        }
    }
    let advice = "write each by itself";
    if components.len() > 1 {
        return Err(not_writable(
            "the set",
            "an adapter of two models",
            layout,
            advice,
        ));
    }
    let kind = match kinds.into_iter().collect::<Vec<_>>().as_slice() {
        [kind] => *kind,
        [] => {
            return Err(not_writable(
                "the set",
                "no layer at all",
                layout,
                "add one",
            ));
        }
        _ => {
            return Err(not_writable(
                "the set",
                "a mixture of families",
                layout,
                advice,
            ));
        }
    };
    let (rank, rank_pattern) = exceptions(&ranks);
    let (alpha, alpha_pattern) = exceptions(&alphas);
    let mut config = json!({
        "peft_type": kind,
        "base_model_name_or_path": null,
        "task_type": null,
        "inference_mode": true,
        "r": rank,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": ranks.keys().collect::<Vec<_>>(),
    });
    let own = match kind {
        "LORA" => json!({
            "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": false,
            "use_dora": decomposed, "use_rslora": false,
        }),
        "LOHA" => json!({ "alpha": alpha, "use_effective_conv2d": cores }),
        _ => {
            let (factor, both) = decomposition(&kronecker)?;
            json!({
                "alpha": alpha, "use_effective_conv2d": cores, "decompose_both": both,
                "decompose_factor": factor,
            })
        }
    };
    if let (Some(all), Some(own)) = (config.as_object_mut(), own.as_object()) {
        all.extend(own.clone());
    }
    Ok(Written {
        tensors,
        metadata: BTreeMap::from([("format".to_string(), "pt".to_string())]),
        config: Some(config),
    })
}

/// How a LoKr splits its layer.
#[derive(Debug)]
struct KroneckerSizes {
    /// Of the first factor, and of the second.
    outputs: (usize, usize),
    inputs: (usize, usize),
    low_rank: (bool, bool),
}

impl KroneckerSizes {
    /// From the factors, and from the outputs and the inputs times kernel area of the layer
    /// at a path.
    fn of(path: &str, parts: &BTreeMap<&str, Tensor>, matrix: (usize, usize)) -> Self {
        let size = |name: &str, axis: usize| {
            let dims = parts.get(name).map(Tensor::dims);
            dims.and_then(|d| d.get(axis).copied())
        };
        let a = size("lokr_w1", 0).or(size("lokr_w1_a", 0)).unwrap_or(1);
        let c = size("lokr_w1", 1).or(size("lokr_w1_b", 1)).unwrap_or(1);
        let (a, c) = (a.max(1), c.max(1));
        // A low-rank factor does not tell its kernel; the layer's name does.
        let last = path.rsplit('.').next().unwrap_or(path);
        let large = ["conv", "conv1", "conv2", "conv_in", "conv_out"].contains(&last);
        let inputs = matrix.1 / if large { 9 } else { 1 };
        Self {
            outputs: (a, matrix.0 / a),
            inputs: (c, inputs / c),
            low_rank: (
                parts.contains_key("lokr_w1_a"),
                parts.contains_key("lokr_w2_a"),
            ),
        }
    }

    fn largest(&self) -> usize {
        [self.outputs.0, self.outputs.1, self.inputs.0, self.inputs.1]
            .into_iter()
            .fold(1, usize::max)
    }

    /// Whether PEFT splits this layer so, given its two options.
    fn fits(&self, rank: usize, factor: i64, both: bool) -> bool {
        let split = |n: usize| match usize::try_from(factor) {
            // PEFT does not sort these two.
            Ok(f) if f > 0 && n.is_multiple_of(f) => (f, n / f),
            _ => crate::factorization(n, factor),
        };
        let ((a, b), (c, d)) = (self.outputs, self.inputs);
        let low = (both && 2 * rank < a.max(c), 2 * rank < b.max(d));
        split(a * b) == self.outputs && split(c * d) == self.inputs && low == self.low_rank
    }
}

/// PEFT's `decompose_factor` and `decompose_both`, from which it derives every shape.
fn decomposition(layers: &[(String, usize, KroneckerSizes)]) -> Result<(i64, bool)> {
    let both = layers.iter().any(|(_, _, sizes)| sizes.low_rank.0);
    let sizes = layers
        .iter()
        .flat_map(|(_, _, s)| [s.outputs.0, s.inputs.0]);
    let mut factors: Vec<i64> = sizes.filter_map(|n| i64::try_from(n).ok()).collect();
    factors.push(-1);
    factors.sort_unstable();
    factors.dedup();
    let misfit = |factor: i64| {
        let mut layers = layers.iter();
        layers.find(|(_, rank, sizes)| !sizes.fits(*rank, factor, both))
    };
    match factors.iter().find(|f| misfit(**f).is_none()) {
        Some(factor) => Ok((*factor, both)),
        None => {
            let layer = misfit(-1).map_or("the set", |(layer, _, _)| layer);
            Err(not_writable(
                layer,
                "a Kronecker product whose factors no decompose_factor gives",
                SaveLayout::Peft,
                "keep kohya's layout",
            ))
        }
    }
}
