//! Single layers with an adapter against LyCORIS: the file's tensors are written, read
//! back, attached to a layer, and output, gradients and delta compared.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module;
use lora_core::format::{
    FileReport, Format, SaveLayout, TensorFile, layer_from_ldm, layer_path, layer_to_ldm,
    write_tensors,
};
use lora_core::{
    Adaptable, Adapter, AdapterConfig, AdapterSet, BaseLayer, Block, BlockValues, Component,
    Conv2dParams, DoraMultiplier, Error, Family, Layer, LayerOp, Lora, Reading, SaveOptions,
    Targets, merge,
};
use lora_tests::{
    Report, Tolerance, bundled_json, golden_json, golden_path, golden_tensors, values,
};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::Value;

type Tensors = BTreeMap<String, Tensor>;

/// A model of one layer.
struct One(Layer);

impl Adaptable for One {
    fn component(&self) -> Component {
        Component::Unet
    }
    fn visit_layers(
        &mut self,
        visit: &mut dyn FnMut(&mut Layer) -> lora_core::Result<()>,
    ) -> lora_core::Result<()> {
        visit(&mut self.0)
    }
}

fn base_layer(case: &Value, get: &dyn Fn(&str) -> Option<Tensor>) -> BaseLayer {
    let layer = &case["layer"];
    let number = |key: &str, default| layer[key].as_u64().map_or(default, |n| n as usize);
    let op = match layer["kind"].as_str() {
        Some("linear") => LayerOp::Linear,
        Some("conv") => LayerOp::Conv2d(Conv2dParams {
            stride: number("stride", 1),
            padding: number("padding", 0),
            dilation: number("dilation", 1),
            groups: number("groups", 1),
        }),
        // The peer's layers have torch's default epsilon.
        Some("layernorm") => LayerOp::LayerNorm { eps: 1e-5 },
        Some("groupnorm") => LayerOp::GroupNorm {
            groups: number("groups", 1),
            eps: 1e-5,
        },
        other => panic!("unknown kind of layer {other:?}"),
    };
    BaseLayer::new(
        get("base.weight").expect("a base weight"),
        get("base.bias"),
        op,
    )
}

/// Writes the tensors as the peer saves them and reads them as any file.
fn through_a_file(case: &Value, get: &dyn Fn(&str) -> Option<Tensor>) -> AdapterSet {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter_model.safetensors");
    let mut tensors = Tensors::new();
    for (key, source) in case["state_dict_keys"].as_object().unwrap() {
        let tensor = get(source.as_str().unwrap()).unwrap_or_else(|| panic!("no tensor {source}"));
        let key = match is_peft(case) {
            true => key.clone(),
            false => format!("lora_unet_layer.{key}"),
        };
        tensors.insert(key, tensor);
    }
    write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();
    if is_peft(case) {
        let config = folder.path().join("adapter_config.json");
        std::fs::write(config, case["config"].to_string()).unwrap();
    }
    AdapterSet::load(&path, &Device::Cpu).unwrap()
}

/// Whether PEFT made the case.
fn is_peft(case: &Value) -> bool {
    case["algo"].as_str().unwrap().starts_with("peft_")
}

/// The name under which the gradient of a factor is recorded; none for a factor that
/// saving changed (a folded scalar).
fn recorded_gradient(case: &Value, suffix: &str) -> Option<String> {
    if is_peft(case) {
        let name = match suffix {
            "lora_down.weight" => "lora_A.weight",
            "lora_up.weight" => "lora_B.weight",
            "dora_scale" => "lora_magnitude_vector.weight",
            other => other,
        };
        return Some(format!("out/grad/{name}"));
    }
    let source = case["state_dict_keys"][suffix].as_str()?;
    Some(format!("out/grad/{}", source.strip_prefix("param/")?))
}

/// The peer's own meaning where programs differ.
fn peers_reading(case: &Value) -> Reading {
    Reading {
        dora: DoraMultiplier::Lycoris,
        detached_norm: is_peft(case),
        through_bias: case["config"]["bypass_mode"].as_bool().unwrap_or(false),
        ..Reading::default()
    }
}

/// The reading that an `out/alt/` tensor is recorded for.
fn alternative(name: &str) -> Option<Reading> {
    let dora = match name {
        "interp" => DoraMultiplier::Interpolate,
        "scale_inside" => DoraMultiplier::ScaleInside,
        "norm_of_base" => DoraMultiplier::BaseNorm,
        _ => return None,
    };
    Some(Reading {
        dora,
        boft_interpolate: name == "interp",
        ..Reading::default()
    })
}

/// One case: its tensors by short name, and which outputs were compared.
struct Case<'a> {
    json: &'a Value,
    name: &'a str,
    tensors: &'a Tensors,
    report: &'a mut Report,
    compared: BTreeSet<String>,
}

impl Case<'_> {
    fn get(&self, key: &str) -> Option<Tensor> {
        self.tensors.get(&format!("{}/{key}", self.name)).cloned()
    }

    fn compare(&mut self, key: &str, got: &Tensor) {
        let want = self
            .get(key)
            .unwrap_or_else(|| panic!("{}: no tensor {key}", self.name));
        let size = values(&want).iter().fold(0f64, |m, v| m.max(v.abs()));
        let relative = self.json["outputs"][key]["rtol_of_max"]
            .as_f64()
            .unwrap_or(1.5e-6);
        let tolerance = Tolerance {
            atol: relative * size,
            rtol: 0.0,
        };
        self.report.tensor(self.name, key, got, &want, tolerance);
        self.compared.insert(key.to_string());
    }

    /// Every recorded output must have been compared, except gradients of factors that
    /// saving changed (a scalar folded into one).
    fn finish(self) {
        let folded = self.json["config"]["use_scalar"].as_bool().unwrap_or(false);
        for key in self.json["outputs"].as_object().unwrap().keys() {
            let excused = folded && key.starts_with("out/grad/");
            if !excused && !self.compared.contains(key) {
                self.report
                    .fail(self.name, key, "recorded but not compared");
            }
        }
    }

    /// Weight and bias, by themselves and added to the base.
    fn check_weights(&mut self, adapter: &dyn Adapter, base: &BaseLayer, multiplier: f64) {
        let delta = adapter.delta(&base.weight, multiplier).unwrap();
        self.compare("out/delta", &delta);
        if self.get("out/merged").is_some() {
            let merged = merge::merged_weight(&base.weight, &[(adapter, multiplier)]).unwrap();
            self.compare("out/merged", &merged);
        }
        if self.get("out/merged_bias").is_some() {
            let bias = merge::merged_bias(base.bias.as_ref(), &[(adapter, multiplier)]).unwrap();
            self.compare("out/merged_bias", &bias.unwrap());
        }
        let outputs = self.json["outputs"].as_object().unwrap();
        for key in outputs.keys().filter(|key| key.starts_with("out/alt/")) {
            let reading = alternative(key.trim_start_matches("out/alt/"))
                .unwrap_or_else(|| panic!("{}: unknown meaning {key}", self.name));
            let adapter = adapter.read_as(&reading).unwrap();
            let merged =
                merge::merged_weight(&base.weight, &[(adapter.as_ref(), multiplier)]).unwrap();
            self.compare(key, &merged);
        }
    }

    /// Output and gradients of the attached, trainable adapter.
    fn check_training(&mut self, set: &AdapterSet, base: BaseLayer, multiplier: f64) {
        let mut set = set.trainable().unwrap();
        let mut model = One(Layer::new("layer", base));
        set.attach(&mut model, multiplier)
            .unwrap()
            .strict()
            .unwrap();
        let x = Var::from_tensor(&self.get("x").unwrap()).unwrap();
        let y = model.0.forward(&x).unwrap();
        self.compare("out/y", &y);
        let loss = (&y * self.get("gy").unwrap()).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        self.compare("out/grad/x", grads.get(&x).unwrap());
        let full = set.iter().all(|(_, adapter)| adapter.rank().is_none());
        let set_has_cores = set
            .params()
            .iter()
            .any(|(name, _)| name.ends_with("hada_t1"));
        for (param, var) in set.params() {
            let (_, suffix) = param.split_once('.').unwrap();
            let Some(key) = recorded_gradient(self.json, suffix) else {
                continue;
            };
            if is_peft(self.json) && set_has_cores && suffix.ends_with("_a") {
                // PEFT's gradient of these is wrong: it takes the other side's core, as
                // older LyCORIS did. The group `loha` has the right ones.
                self.compared.insert(key);
                continue;
            }
            let mut gradient = grads.get(&var).unwrap().clone();
            if is_peft(self.json) {
                // PEFT's scale of two full LoKr matrices is folded into the first here.
                if full && suffix == "lokr_w1" {
                    gradient = (gradient * self.json["scale"].as_f64().unwrap()).unwrap();
                }
                // Its magnitudes have another shape.
                let shape = self.get(&key).unwrap().shape().clone();
                gradient = gradient.reshape(shape).unwrap();
            }
            self.compare(&key, &gradient);
        }
    }
}

fn check_case(report: &mut Report, json: &Value, tensors: &Tensors) {
    let mut case = Case {
        json,
        name: json["name"].as_str().unwrap(),
        tensors,
        report,
        compared: BTreeSet::new(),
    };
    let multiplier = json["multiplier"].as_f64().unwrap();
    let get = |key: &str| case.get(key);
    let (mut set, base) = (through_a_file(json, &get), base_layer(json, &get));
    set.set_reading(&peers_reading(json));
    let adapter = set.get("lora_unet_layer").expect("an adapter").clone();
    let scale = json["scale"].as_f64().unwrap_or(1.0);
    let full = adapter.family() == Family::Lokr && adapter.rank().is_none();
    if full && !is_peft(json) && scale != 1.0 {
        // Full LoKr matrices under rsLoRA: the peer trains with a scale that its file
        // does not tell and no reader applies; our trainer refuses to make such files.
        let delta = adapter.delta(&base.weight, multiplier).unwrap();
        case.compare("out/delta", &(delta * scale).unwrap());
        return;
    }
    case.check_weights(adapter.as_ref(), &base, multiplier);
    case.check_training(&set, base, multiplier);
    case.finish();
}

fn check_group(group: &str) {
    let index = golden_json("adapters", "index.json");
    let groups = index["groups"].as_array().unwrap();
    let group = groups
        .iter()
        .find(|g| g["group"] == group)
        .unwrap_or_else(|| panic!("no group {group}"));
    let t = golden_tensors("adapters", group["file"].as_str().unwrap());
    let mut report = Report::default();
    for case in group["cases"].as_array().unwrap() {
        check_case(&mut report, case, &t);
    }
    report.finish();
}

#[test]
fn golden_adapters_lora() {
    check_group("lora");
}

#[test]
fn golden_adapters_loha() {
    check_group("loha");
}

#[test]
fn golden_adapters_lokr() {
    check_group("lokr");
}

#[test]
fn golden_adapters_dora() {
    check_group("dora");
}

#[test]
fn golden_adapters_misc() {
    check_group("misc");
}

#[test]
fn golden_adapters_oft() {
    check_group("oft");
}

#[test]
fn golden_adapters_peft() {
    check_group("peft");
}

/// DyLoRA: the delta and gradients of one nested step, and the file read as all blocks were
/// trained.
fn check_dylora(case: &mut Case<'_>) {
    let config = &case.json["config"];
    let number = |key: &str| config[key].as_u64().unwrap() as usize;
    let (size, rank) = (number("block_size"), number("rank"));
    let block = rank.div_ceil(size);
    let joined = |name: &str, axis: usize| {
        let parts = (0..number("lora_dim") / size)
            .map(|i| case.get(&format!("param/{name}_list.{i}")).unwrap());
        Tensor::cat(&parts.collect::<Vec<_>>(), axis).unwrap()
    };
    let alpha = config["alpha"].as_f64().unwrap();
    let shape = case.get("gdelta").unwrap().shape().clone();
    let base = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let (down, up) = (joined("down", 0), joined("up", 1));
    let (down, up) = (
        Var::from_tensor(&down).unwrap(),
        Var::from_tensor(&up).unwrap(),
    );
    let tensors = (down.as_tensor().clone(), up.as_tensor().clone());
    let whole = Lora::new(case.name, tensors.0, None, tensors.1, alpha).unwrap();
    let step = whole.nested(size, block).unwrap();
    let delta = step
        .delta(&base, case.json["multiplier"].as_f64().unwrap())
        .unwrap();
    case.compare("out/delta", &delta);
    let loss = (&delta * case.get("gdelta").unwrap())
        .unwrap()
        .sum_all()
        .unwrap();
    let grads = loss.backward().unwrap();
    for (name, var, axis) in [("down", &down, 0), ("up", &up, 1)] {
        let gradient = grads.get(var).unwrap();
        for i in 0..number("lora_dim") / size {
            let own = gradient.narrow(axis, i * size, size).unwrap();
            case.compare(&format!("out/grad/{name}_list.{i}"), &own);
        }
    }
    // The file: told by its metadata, at the scale of the last block's step.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dylora.safetensors");
    let files = ["alpha", "lora_down.weight", "lora_up.weight"];
    let tensors: Tensors = files
        .map(|part| {
            let tensor = case.get(&format!("file/{part}")).unwrap();
            (format!("lora_unet_layer.{part}"), tensor)
        })
        .into();
    let args = format!(r#"{{"algo": "dylora", "block_size": "{size}"}}"#);
    let metadata = BTreeMap::from([
        ("ss_network_module".to_string(), "lycoris.kohya".to_string()),
        ("ss_network_args".to_string(), args),
    ]);
    write_tensors(&path, &tensors, &metadata).unwrap();
    let set = AdapterSet::load(&path, &Device::Cpu).unwrap();
    let last = whole.nested(size, number("lora_dim") / size - 1).unwrap();
    let want = last.delta(&base, 1.0).unwrap();
    let tolerance = Tolerance {
        atol: 1e-6,
        rtol: 1e-6,
    };
    let again = folder.path().join("again.safetensors");
    set.save(&again, &Default::default()).unwrap();
    for path in [&path, &again] {
        let set = AdapterSet::load(path, &Device::Cpu).unwrap();
        let got = set
            .get("lora_unet_layer")
            .unwrap()
            .delta(&base, 1.0)
            .unwrap();
        case.report
            .tensor(case.name, "file", &got, &want, tolerance);
    }
}

fn check_tlora(case: &mut Case<'_>) {
    let get = |key: &str| case.get(key).unwrap();
    let mut tensors: Tensors = ["p_layer.weight", "q_layer.weight", "lambda_layer"]
        .map(|part| {
            (
                format!("lora_unet_layer.{part}"),
                get(&format!("param/{part}")),
            )
        })
        .into();
    let alpha = case.json["config"]["alpha"].as_f64().unwrap() as f32;
    let alpha = Tensor::new(alpha, &Device::Cpu).unwrap();
    tensors.insert("lora_unet_layer.alpha".into(), alpha);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tlora.safetensors");
    write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();
    let set = AdapterSet::load(&path, &Device::Cpu).unwrap();
    let multiplier = case.json["multiplier"].as_f64().unwrap();
    let adapter = set.get("lora_unet_layer").unwrap();
    let delta = adapter.delta(&get("base.weight"), multiplier).unwrap();
    case.compare("out/delta", &delta);
}

#[test]
fn golden_adapters_dylora_tlora() {
    let index = golden_json("adapters", "index.json");
    let groups = index["groups"].as_array().unwrap();
    let group = groups
        .iter()
        .find(|g| g["group"] == "dylora_tlora")
        .unwrap();
    let t = golden_tensors("adapters", group["file"].as_str().unwrap());
    let mut report = Report::default();
    for json in group["cases"].as_array().unwrap() {
        // One tolerance for all outputs here.
        let mut json = json.clone();
        let name = json["name"].as_str().unwrap().to_string();
        let any = json["outputs"]["out/*"].clone();
        let prefix = format!("{name}/");
        let outputs = t.keys().filter_map(|k| k.strip_prefix(&prefix));
        let outputs = outputs.filter(|k| k.starts_with("out/"));
        json["outputs"] = outputs.map(|k| (k.to_string(), any.clone())).collect();
        let mut case = Case {
            json: &json,
            name: &name,
            tensors: &t,
            report: &mut report,
            compared: BTreeSet::new(),
        };
        match json["algo"].as_str().unwrap() {
            "dylora" => check_dylora(&mut case),
            "tlora" => check_tlora(&mut case),
            other => panic!("no test for {other}"),
        }
        case.finish();
    }
    report.finish();
}

/// Groups and whole files that no test knows must not pass unnoticed.
#[test]
fn golden_adapters_every_group_has_a_test() {
    let index = golden_json("adapters", "index.json");
    let known = [
        "lora",
        "loha",
        "lokr",
        "dora",
        "misc",
        "oft",
        "dylora_tlora",
        "peft",
        // In golden_adapters_extract.rs.
        "extract",
    ];
    for group in index["groups"].as_array().unwrap() {
        let name = group["group"].as_str().unwrap();
        assert!(known.contains(&name), "no test for group {name}");
    }
    let parts = [
        "versions",
        "seed",
        "variant",
        "conventions",
        "groups",
        "merge_dtypes",
        "whole_files",
    ];
    for key in index.as_object().unwrap().keys() {
        assert!(parts.contains(&key.as_str()), "no test for {key}");
    }
}

/// Every golden file, written in every layout that can hold it and read again, has the same
/// deltas.
#[test]
fn golden_adapters_layouts_round_trip() {
    let index = golden_json("adapters", "index.json");
    let whole = &index["whole_files"];
    let bases = base_weights(whole["base_weights"].as_str().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let mut report = Report::default();
    for entry in whole["files"].as_array().unwrap() {
        let file = entry["file"].as_str().unwrap();
        let mut set = AdapterSet::load(golden_path("adapters", file), &Device::Cpu).unwrap();
        set.take_embeddings();
        for layout in [
            SaveLayout::Kohya,
            SaveLayout::KohyaLdm,
            SaveLayout::DiffusersOld,
            SaveLayout::Diffusers,
            SaveLayout::Peft,
        ] {
            let mut parts = vec![set.clone()];
            if layout == SaveLayout::Peft {
                // One file per model.
                parts = [Component::Unet, Component::TextEncoder]
                    .map(|component| {
                        let mut part = set.clone();
                        part.retain(|name| component.owns(name));
                        part
                    })
                    .into_iter()
                    .filter(|part| !part.is_empty())
                    .collect();
            }
            for part in parts {
                let path = folder.path().join("adapter_model.safetensors");
                let options = SaveOptions {
                    layout,
                    ..Default::default()
                };
                match part.save(&path, &options) {
                    Ok(_) => {}
                    Err(Error::NotWritable { .. }) if !holds(layout, &part) => continue,
                    Err(error) => panic!("{file} as {layout:?}: {error}"),
                }
                assert!(
                    holds(layout, &part),
                    "{file} as {layout:?} should be refused"
                );
                let again = AdapterSet::load(&path, &Device::Cpu).unwrap();
                report.equal(
                    file,
                    &format!("{layout:?}"),
                    &again.names().collect::<Vec<_>>(),
                    &part.names().collect::<Vec<_>>(),
                );
                for (name, adapter) in part.iter() {
                    let Some(other) = again.get(name) else {
                        continue;
                    };
                    let want = adapter.delta(&bases[name], 1.0).unwrap();
                    let got = other.delta(&bases[name], 1.0).unwrap();
                    let size = values(&want).iter().fold(0f64, |m, v| m.max(v.abs()));
                    let tolerance = Tolerance {
                        atol: 1e-6 * size,
                        rtol: 0.0,
                    };
                    report.tensor(file, &format!("{layout:?} {name}"), &got, &want, tolerance);
                }
            }
        }
    }
    report.finish();
}

/// Which sets a layout can hold.
fn holds(layout: SaveLayout, set: &AdapterSet) -> bool {
    let cores = set
        .iter()
        .any(|(_, a)| a.factors().iter().any(|(n, _)| *n == "lora_mid.weight"));
    let families: BTreeSet<Family> = set.iter().map(|(_, a)| a.family()).collect();
    let only = |allowed: &[Family]| families.iter().all(|f| allowed.contains(f));
    match layout {
        SaveLayout::DiffusersOld => only(&[Family::Lora]) && !cores,
        SaveLayout::Diffusers => only(&[Family::Lora, Family::Dora]) && !cores,
        SaveLayout::Peft => {
            (only(&[Family::Lora, Family::Dora]) && !cores)
                || only(&[Family::Loha])
                || only(&[Family::Lokr])
        }
        _ => true,
    }
}

/// The layouts of one adapter have the keys that the peers' files have.
#[test]
fn golden_adapters_layouts_have_the_peers_keys() {
    let load = |file: &str| {
        let path = golden_path("adapters", file);
        AdapterSet::load(path, &Device::Cpu).unwrap()
    };
    let source = load("file_lora_attn_mlp.safetensors");
    let folder = tempfile::tempdir().unwrap();
    let mut report = Report::default();
    for (layout, file) in [
        (SaveLayout::Kohya, "file_lora_attn_mlp.safetensors"),
        (
            SaveLayout::KohyaLdm,
            "file_lora_attn_mlp_ldm_names.safetensors",
        ),
        (
            SaveLayout::DiffusersOld,
            "file_lora_attn_mlp_diffusers_old.safetensors",
        ),
        (
            SaveLayout::Diffusers,
            "file_lora_attn_mlp_diffusers_peft.safetensors",
        ),
        (
            SaveLayout::Peft,
            "file_lora_attn_mlp_peft_unet_adapter_model.safetensors",
        ),
    ] {
        let mut set = source.clone();
        if layout == SaveLayout::Peft {
            set.retain(|name| Component::Unet.owns(name));
        }
        let path = folder.path().join("adapter_model.safetensors");
        let options = SaveOptions {
            layout,
            ..Default::default()
        };
        set.save(&path, &options).unwrap();
        let (got, want) = (
            TensorFile::open(&path).unwrap(),
            TensorFile::open(golden_path("adapters", file)).unwrap(),
        );
        report.equal(file, "keys", &got.names(), &want.names());
        for name in want.names() {
            let shapes = (got.shape(&name), want.shape(&name));
            report.equal(file, &name, &shapes.0, &shapes.1);
        }
    }
    report.finish();
}

/// The report on every golden file names its format and accounts for every key.
#[test]
fn golden_adapters_file_reports() {
    let index = golden_json("adapters", "index.json");
    let mut report = Report::default();
    for entry in index["whole_files"]["files"].as_array().unwrap() {
        let file = entry["file"].as_str().unwrap();
        let found = FileReport::open_checking_values(golden_path("adapters", file)).unwrap();
        let set = AdapterSet::load(golden_path("adapters", file), &Device::Cpu).unwrap();
        let format = match file {
            f if f.contains("ldm_names") => Format::KohyaLdm,
            f if f.contains("diffusers_old") => Format::DiffusersOld,
            f if f.contains("diffusers_peft") => Format::Diffusers,
            f if f.contains("adapter_model") => Format::Peft,
            _ => Format::Kohya,
        };
        report.equal(file, "format", &found.format(), &Some(format));
        report.equal(file, "errors", &found.errors().count(), &0);
        report.equal(file, "layers", &found.layers.len(), &set.len());
        report.equal(file, "values", &found.parameters(), &set.parameter_count());
        for (name, adapter) in set.iter() {
            let layer = &found.layers[name];
            report.equal(name, "family", &layer.family, &adapter.family());
            report.equal(name, "rank", &layer.rank, &adapter.rank());
            report.equal(name, "alpha", &layer.alpha, &adapter.alpha());
        }
    }
    report.finish();
}

const FINGERPRINT: &str = "delta_fingerprint [sum, sum_sq, dot cos(1..n)]";

/// Sum, sum of squares, dot product with cos(1), cos(2), ...
fn fingerprint(delta: &Tensor) -> [f64; 3] {
    let values = values(delta);
    let cosines = (1..).map(|n| f64::from(n).cos());
    [
        values.iter().sum(),
        values.iter().map(|v| v * v).sum(),
        values.iter().zip(cosines).map(|(v, c)| v * c).sum(),
    ]
}

/// The base weights by layer name.
fn base_weights(file: &str) -> BTreeMap<String, Tensor> {
    let by_path = golden_tensors("adapters", file).into_iter();
    by_path
        .filter_map(|(key, tensor)| {
            let (component, path) = key.strip_suffix(".weight")?.split_once('.')?;
            let component = match component {
                "unet" => Component::Unet,
                "text_encoder" => Component::TextEncoder,
                other => panic!("unknown component {other}"),
            };
            Some((component.layer_name(path), tensor))
        })
        .collect()
}

/// The scale that a format does not hold, for the entries that tell it.
fn missing_scale(entry: &Value, adapter: &dyn Adapter) -> f64 {
    let Some(alphas) = entry["network_alphas"].as_object() else {
        return 1.0;
    };
    let mut alphas = alphas.values().map(|v| v.as_f64().unwrap());
    let alpha = alphas.next().unwrap();
    assert!(alphas.all(|other| other == alpha), "different alphas");
    alpha / adapter.rank().unwrap() as f64
}

#[test]
fn golden_adapters_whole_files() {
    let index = golden_json("adapters", "index.json");
    let whole = &index["whole_files"];
    let files = whole["files"].as_array().unwrap();
    let bases = base_weights(whole["base_weights"].as_str().unwrap());
    let mut report = Report::default();
    for entry in files {
        let file = entry["file"].as_str().unwrap();
        let source = match entry["same_adapter_as"].as_str() {
            None => entry,
            Some(other) => files.iter().find(|f| f["file"] == other).unwrap(),
        };
        let set = AdapterSet::load(golden_path("adapters", file), &Device::Cpu).unwrap();
        let component = match entry["subset"].as_str() {
            None => None,
            Some("unet") => Some(Component::Unet),
            Some("text_encoder") => Some(Component::TextEncoder),
            Some(other) => panic!("unknown subset {other}"),
        };
        let wanted: BTreeMap<String, [f64; 3]> =
            serde_json::from_value(source[FINGERPRINT].clone()).unwrap();
        let wanted: BTreeMap<_, _> = wanted
            .into_iter()
            .filter(|(name, _)| component.as_ref().is_none_or(|c| c.owns(name)))
            .collect();
        report.equal(
            file,
            "layers",
            &set.names().collect::<Vec<_>>(),
            &wanted.keys().map(String::as_str).collect::<Vec<_>>(),
        );
        let multiplier = source["multiplier"].as_f64().unwrap();
        let rtol = source["rtol"].as_f64().unwrap();
        for (name, want) in &wanted {
            let Some(adapter) = set.get(name) else {
                continue;
            };
            let base = &bases[name];
            adapter.check(name, base.dims()).unwrap();
            let strength = multiplier * missing_scale(entry, adapter.as_ref());
            let got = fingerprint(&adapter.delta(base, strength).unwrap());
            let size = want[1].sqrt();
            for (i, atol) in [size, 0.0, size].into_iter().enumerate() {
                let tolerance = Tolerance {
                    atol: rtol * atol,
                    rtol,
                };
                report.slice(file, name, &got[i..=i], &want[i..=i], tolerance);
            }
        }
        let bundled = set.bundled_embeddings().count();
        report.equal(file, "bundled", &(bundled > 0), &file.contains("bundle"));
    }
    report.finish();
}

#[test]
fn golden_adapters_ldm_names() {
    let names = bundled_json("adapters", "sd15_module_names.json");
    let mut report = Report::default();
    for module in names["unet"].as_array().unwrap() {
        let path = |key: &str| {
            module[key]
                .as_str()
                .unwrap()
                .trim_start_matches("lora_unet_")
        };
        let got = layer_from_ldm(path("kohya_ldm"));
        report.equal(
            path("kohya_ldm"),
            "layer",
            &got.as_deref(),
            &Some(path("kohya")),
        );
        let kohya = module["kohya"].as_str().unwrap();
        let dotted = module["diffusers"].as_str().unwrap().to_string();
        report.equal(
            kohya,
            "path",
            &layer_path(kohya),
            &Some((Component::Unet, dotted)),
        );
        let slot = |block: Block| match block {
            Block::Base => "BASE".to_string(),
            Block::In(n) => format!("IN{n:02}"),
            Block::Mid => "MID".into(),
            Block::Out(n) => format!("OUT{n:02}"),
        };
        let block = Block::of(kohya).map(slot);
        report.equal(
            kohya,
            "block",
            &block.as_deref(),
            &module["block26"].as_str(),
        );
        let ldm = layer_to_ldm(kohya).map(|p| p.replace('.', "_"));
        report.equal(kohya, "LDM", &ldm.as_deref(), &Some(path("kohya_ldm")));
    }
    for module in names["text_encoder"].as_array().unwrap() {
        let kohya = module["kohya"].as_str().unwrap();
        let dotted = module["diffusers"].as_str().unwrap();
        if dotted.contains("embedding") {
            continue;
        }
        let want = Some((Component::TextEncoder, dotted.to_string()));
        report.equal(kohya, "path", &layer_path(kohya), &want);
        report.equal(kohya, "block", &Block::of(kohya), &Some(Block::Base));
    }
    // A list of each length gives every layer the number at its block's place.
    for (length, blocks) in names["block_weight_layouts"].as_object().unwrap() {
        let places: Vec<&str> = blocks
            .as_array()
            .unwrap()
            .iter()
            .map(|b| b.as_str().unwrap())
            .collect();
        let numbers: Vec<f64> = (1..=places.len()).map(|i| i as f64).collect();
        let list = BlockValues::new(&numbers).unwrap();
        for module in names["unet"].as_array().unwrap() {
            let kohya = module["kohya"].as_str().unwrap();
            let want = module["block26"].as_str().map(|block| {
                let place = places.iter().position(|p| *p == block);
                place.map_or(0.0, |i| numbers[i])
            });
            report.equal(kohya, length, &list.get(kohya), &want);
        }
    }
    report.finish();
}

#[test]
fn golden_adapters_merge_dtypes() {
    let index = golden_json("adapters", "index.json");
    let group = &index["merge_dtypes"];
    let t = golden_tensors("adapters", group["file"].as_str().unwrap());
    let mut report = Report::default();
    for case in group["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let get = |key: &str| t[&format!("{name}/{key}")].clone();
        let adapters: Vec<(Lora, f64)> = case["multipliers"]
            .as_array()
            .unwrap()
            .iter()
            .enumerate()
            .map(|(i, m)| {
                let part = |suffix: &str| get(&format!("{i}/{suffix}"));
                let alpha = values(&part("alpha"))[0];
                let (down, up) = (part("lora_down.weight"), part("lora_up.weight"));
                (
                    Lora::new(name, down, None, up, alpha).unwrap(),
                    m.as_f64().unwrap(),
                )
            })
            .collect();
        let parts: Vec<(&dyn Adapter, f64)> = adapters
            .iter()
            .map(|(a, m)| (a as &dyn Adapter, *m))
            .collect();
        let weight = get("weight");
        let ulp = match weight.dtype() {
            DType::F16 => 2f64.powi(-10),
            DType::BF16 => 2f64.powi(-7),
            _ => 2f64.powi(-23),
        };
        // One unit of the storage type; f32 is also the type of the sum, whose own
        // rounding is relative to its largest term.
        let largest = values(&weight).iter().fold(0f64, |m, v| m.max(v.abs()));
        let sum = if weight.dtype() == DType::F32 {
            ulp
        } else {
            0.0
        };
        let tolerance = Tolerance {
            atol: sum * largest,
            rtol: ulp,
        };
        for (key, parts) in [
            ("merged_first", &parts[..1]),
            ("merged_both_one_rounding", &parts[..]),
        ] {
            let merged = merge::merged_weight(&weight, parts).unwrap();
            assert_eq!(merged.dtype(), weight.dtype());
            report.tensor(name, key, &merged, &get(key), tolerance);
        }
    }
    report.finish();
}

#[test]
fn golden_adapters_factorization() {
    let tables = golden_json("adapters", "tables.json");
    let mut report = Report::default();
    for (dimension, row) in tables["factorization"].as_object().unwrap() {
        for (factor, want) in row.as_object().unwrap() {
            let (m, n) =
                lora_core::factorization(dimension.parse().unwrap(), factor.parse().unwrap());
            let want: Vec<usize> = serde_json::from_value(want.clone()).unwrap();
            report.equal(dimension, &format!("factor {factor}"), &vec![m, n], &want);
        }
    }
    report.finish();
}

#[test]
fn golden_adapters_parameter_counts() {
    let tables = golden_json("adapters", "tables.json");
    let mut report = Report::default();
    for row in tables["parameter_counts"].as_array().unwrap() {
        let family = match row["algo"].as_str().unwrap() {
            "locon" => Family::Lora,
            "loha" => Family::Loha,
            "lokr" => Family::Lokr,
            "glora" => Family::Glora,
            "diag-oft" => Family::Oft,
            "boft" => Family::Boft,
            "ia3" => Family::Ia3,
            "full" => Family::Full,
            other => panic!("unknown family {other}"),
        };
        let size = |i: usize| row["in_out_k"][i].as_u64().unwrap() as usize;
        let (i, o) = (size(0), size(1));
        let (weight, op) = match row["layer"].as_str().unwrap() {
            "linear" => (vec![o, i], LayerOp::Linear),
            _ => (
                vec![o, i, size(2), size(2)],
                LayerOp::Conv2d(Conv2dParams::default()),
            ),
        };
        let c = &row["config"];
        let flag = |key: &str| c[key].as_bool().unwrap_or(false);
        let rank = row["dim"].as_u64().unwrap() as usize;
        let config = AdapterConfig {
            family,
            rank,
            conv_rank: Some(rank),
            use_tucker: flag("use_tucker"),
            factor: c["factor"].as_i64().unwrap_or(-1),
            decompose_both: flag("decompose_both"),
            full_matrix: flag("full_matrix"),
            unbalanced_factorization: flag("unbalanced_factorization"),
            ..Default::default()
        };
        let weight = Tensor::zeros(weight, DType::F32, &Device::Cpu).unwrap();
        let mut model = One(Layer::new(
            "layer",
            BaseLayer::new(
                weight,
                Some(Tensor::zeros(o, DType::F32, &Device::Cpu).unwrap()),
                op,
            ),
        ));
        let mut rng = ChaCha12Rng::seed_from_u64(1);
        let targets = Targets::new(&["layer"]).unwrap();
        let set = AdapterSet::create(&mut model, &config, &targets, &mut rng).unwrap();
        let case = row.to_string();
        report.equal(
            &case,
            "trainable",
            &set.parameter_count(),
            &(row["trainable"].as_u64().unwrap() as usize),
        );
        let shapes: BTreeMap<String, Vec<usize>> = set
            .params()
            .into_iter()
            .map(|(name, var)| {
                // The peer trains the absolute weight and writes the difference.
                let suffix = match name.split_once('.').unwrap().1 {
                    "diff" => "weight",
                    "diff_b" => "bias",
                    other => other,
                };
                (suffix.to_string(), var.dims().to_vec())
            })
            .collect();
        let want: BTreeMap<String, Vec<usize>> =
            serde_json::from_value(row["shapes"].clone()).unwrap();
        report.equal(&case, "shapes", &shapes, &want);
    }
    report.finish();
}
