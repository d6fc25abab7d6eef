//! Single layers with an adapter against LyCORIS: the file's tensors are written, read
//! back, attached to a layer, and output, gradients and delta compared.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module;
use lora_core::format::write_tensors;
use lora_core::{
    Adaptable, AdapterConfig, AdapterSet, BaseLayer, Component, Conv2dParams, Family, Layer,
    LayerOp, Targets, merge,
};
use lora_tests::{Report, Tolerance, golden_json, golden_tensors, values};
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
        other => panic!("unknown kind of layer {other:?}"),
    };
    BaseLayer {
        weight: get("base.weight").expect("a base weight"),
        bias: get("base.bias"),
        op,
    }
}

/// Writes the tensors as the peer saves them and reads them as any file.
fn through_a_file(case: &Value, get: &dyn Fn(&str) -> Option<Tensor>) -> AdapterSet {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("case.safetensors");
    let mut tensors = Tensors::new();
    for (key, source) in case["state_dict_keys"].as_object().unwrap() {
        let tensor = get(source.as_str().unwrap()).unwrap_or_else(|| panic!("no tensor {source}"));
        tensors.insert(format!("lora_unet_layer.{key}"), tensor);
    }
    write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();
    AdapterSet::load(&path, &Device::Cpu).unwrap()
}

fn check_case(report: &mut Report, case: &Value, t: &Tensors) {
    let name = case["name"].as_str().unwrap();
    let get = |key: &str| t.get(&format!("{name}/{key}")).cloned();
    let tolerance = |key: &str| {
        let want = &t[&format!("{name}/{key}")];
        let size = values(want).iter().fold(0f64, |m, v| m.max(v.abs()));
        let relative = case["outputs"][key]["rtol_of_max"]
            .as_f64()
            .unwrap_or(1.5e-6);
        Tolerance {
            atol: relative * size,
            rtol: 0.0,
        }
    };
    let mut compare = |key: &str, got: &Tensor| {
        report.tensor(name, key, got, &t[&format!("{name}/{key}")], tolerance(key))
    };

    let multiplier = case["multiplier"].as_f64().unwrap();
    let set = through_a_file(case, &get);
    let base = base_layer(case, &get);
    let adapter = set
        .get("lora_unet_layer")
        .expect("the layer's adapter")
        .clone();
    let delta = adapter.delta(&base.weight, multiplier).unwrap();
    let scale = case["scale"].as_f64().unwrap_or(1.0);
    if adapter.rank().is_none() && scale != 1.0 {
        // Full LoKr matrices under rsLoRA: the peer trains with a scale that its file
        // does not tell and no reader applies; our trainer refuses to make such files.
        compare("out/delta", &(delta * scale).unwrap());
        return;
    }
    compare("out/delta", &delta);
    if get("out/merged").is_some() {
        let merged = merge::merged_weight(&base.weight, &[(adapter.as_ref(), multiplier)]).unwrap();
        compare("out/merged", &merged);
    }

    let mut set = set.trainable().unwrap();
    let mut model = One(Layer::new("layer", base));
    set.attach(&mut model, multiplier)
        .unwrap()
        .strict()
        .unwrap();
    let x = Var::from_tensor(&get("x").unwrap()).unwrap();
    let y = model.0.forward(&x).unwrap();
    compare("out/y", &y);
    let grads = (&y * get("gy").unwrap())
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    compare("out/grad/x", grads.get(&x).unwrap());
    for (param, var) in set.params() {
        let (_, suffix) = param.split_once('.').unwrap();
        // A factor that saving changed (a folded scalar) has no recorded gradient.
        let raw = case["state_dict_keys"][suffix]
            .as_str()
            .is_some_and(|s| s.starts_with("param/"));
        if raw {
            compare(&format!("out/grad/{suffix}"), grads.get(&var).unwrap());
        }
    }
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
            _ => continue,
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
            BaseLayer {
                weight,
                bias: None,
                op,
            },
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
                (
                    name.split_once('.').unwrap().1.to_string(),
                    var.dims().to_vec(),
                )
            })
            .collect();
        let want: BTreeMap<String, Vec<usize>> =
            serde_json::from_value(row["shapes"].clone()).unwrap();
        report.equal(&case, "shapes", &shapes, &want);
    }
    report.finish();
}
