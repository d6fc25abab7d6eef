//! Extraction, resizing and nearest Kronecker products against LyCORIS, sd-scripts and
//! exact arithmetic.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lora_core::algebra::{
    ExtractFamily, ExtractOptions, RankRule, ResizeOptions, Svd, convert, extract_layer,
    largest_entries, nearest_kronecker, resize,
};
use lora_core::{Adapter, AdapterSet, Family, Lora};
use lora_tests::{Report, Tolerance, golden_json, golden_tensors, values};
use serde_json::Value;

type Tensors = BTreeMap<String, Tensor>;

/// A layer that is selected by every rule and is no convolution by name.
const LAYER: &str = "lora_unet_mid_block_attentions_0_layer";

struct Case<'a> {
    json: &'a Value,
    tensors: &'a Tensors,
    report: &'a mut Report,
    compared: BTreeSet<String>,
}

impl Case<'_> {
    fn name(&self) -> &str {
        self.json["name"].as_str().unwrap()
    }

    fn input(&self, index: usize) -> Tensor {
        self.tensors[self.json["inputs"][index].as_str().unwrap()].clone()
    }

    /// `|got - want| <= rtol_of_max * max|want|`.
    fn compare(&mut self, output: &str, got: &Tensor) {
        let key = format!("{}/{output}", self.name());
        let want = &self.tensors[&key];
        let part = self.json["outputs"]["*"]["rtol_of_max"].as_f64().unwrap();
        let largest = values(want).iter().fold(0f64, |m, v| m.max(v.abs()));
        let tolerance = Tolerance {
            atol: part * largest,
            rtol: 0.0,
        };
        let name = self.name().to_string();
        self.report.tensor(&name, output, got, want, tolerance);
        self.compared.insert(key);
    }

    fn equal<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, got: T, want: T) {
        let name = self.name().to_string();
        self.report.equal(&name, what, &got, &want);
    }

    /// Every recorded output must have been compared.
    fn finish(self) {
        let start = format!("{}/", self.name());
        let inputs: Vec<&str> = self.json["inputs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|i| i.as_str().unwrap())
            .collect();
        for key in self.tensors.keys().filter(|k| k.starts_with(&start)) {
            if !self.compared.contains(key) && !inputs.contains(&key.as_str()) {
                let name = self.name().to_string();
                self.report.fail(&name, key, "not compared");
            }
        }
    }
}

fn delta(adapter: &dyn Adapter, like: &Tensor) -> Tensor {
    adapter
        .delta(
            &like.to_dtype(DType::F32).unwrap().zeros_like().unwrap(),
            1.0,
        )
        .unwrap()
}

fn number(json: &Value) -> f64 {
    json.as_f64().unwrap_or_else(|| panic!("no number: {json}"))
}

fn check_extract(case: &mut Case<'_>) {
    let config = case.json["config"].clone();
    let (mode, parameter) = (config["mode"].as_str().unwrap(), number(&config["param"]));
    let rule = RankRule::from_name(mode, parameter).unwrap();
    let tucker = config["small_conv"].as_bool().unwrap_or(false);
    let options = ExtractOptions {
        conv_rule: Some(rule),
        full_above_half: true,
        tucker,
        ..ExtractOptions::new(rule)
    };
    let difference = case.input(0);
    let (adapter, report) = extract_layer(LAYER, &difference, None, &options).unwrap();
    let product = delta(adapter.as_ref(), &difference);
    if let Some(shapes) = case.json["shapes"].as_object() {
        let tensors: BTreeMap<&str, Tensor> = adapter.tensors().unwrap().into_iter().collect();
        for (part, dims) in shapes {
            let dims: Vec<usize> = serde_json::from_value(dims.clone()).unwrap();
            case.equal(
                part,
                tensors[format!("{part}.weight").as_str()].dims().to_vec(),
                dims,
            );
        }
        case.compare("product", &product);
        return;
    }
    let family = match case.json["decision"].as_str().unwrap() {
        "low rank" => Family::Lora,
        "full" => Family::Full,
        other => panic!("unknown decision {other}"),
    };
    case.equal("decision", adapter.family(), family);
    let residual = (&difference - &product).unwrap();
    if family == Family::Full {
        case.equal("difference kept", values(&product), values(&difference));
        return;
    }
    let rank = case.json["rank"].as_u64().unwrap() as usize;
    case.equal("rank", adapter.rank(), Some(rank));
    case.equal("alpha", adapter.alpha(), Some(rank as f64));
    case.compare("product", &product);
    case.compare("residual", &residual);
    let missing = values(&residual).iter().map(|v| v * v).sum::<f64>().sqrt();
    let error = (report.error * report.norm - missing).abs();
    case.equal("reported error is true", error < 1e-5 * report.norm, true);
    let svd = Svd::exact(&difference).unwrap();
    let singular: Vec<f32> = svd.values().iter().map(|s| *s as f32).collect();
    let count = singular.len();
    case.compare(
        "singular_values",
        &Tensor::from_vec(singular, count, &Device::Cpu).unwrap(),
    );
    let sparse = largest_entries(&residual.flatten_from(1).unwrap(), 0.9).unwrap();
    case.compare("sparse_bias_0.9", &sparse);
}

fn check_resize(case: &mut Case<'_>) {
    let config = case.json["config"].clone();
    let most = config["max_rank"].as_u64().unwrap() as usize;
    let rule = match config["method"].as_str() {
        None => RankRule::Fixed(most),
        Some(method) => RankRule::from_name(method, number(&config["param"])).unwrap(),
    };
    let (up, down) = (case.input(0), case.input(1));
    let alpha = values(&case.input(2))[0];
    let old_rank = down.dims()[0];
    let mut set = AdapterSet::default();
    let lora = Lora::new(LAYER, down.clone(), None, up.clone(), alpha).unwrap();
    set.insert(LAYER, Arc::new(lora));
    let options = ResizeOptions {
        most: Some(most),
        sd_scripts: true,
        ..ResizeOptions::new(rule)
    };
    let (resized, _) = resize(&set, &options).unwrap();
    let adapter = resized.get(LAYER).unwrap();
    let rank = case.json["new_rank"].as_u64().unwrap() as usize;
    case.equal("new_rank", adapter.rank(), Some(rank));
    let new_alpha = adapter.alpha().unwrap();
    case.equal("new_alpha", new_alpha, number(&case.json["new_alpha"]));
    let weight = Tensor::zeros((up.dims()[0], down.dims()[1]), DType::F32, &Device::Cpu).unwrap();
    case.compare("effective_delta", &delta(adapter.as_ref(), &weight));

    // Done right, a dynamic rule keeps one value less, and what it promises holds.
    let singular: Vec<f64> = {
        let recorded = values(&case.tensors["resize/singular_values"]);
        recorded.into_iter().take(old_rank).collect()
    };
    let right = ResizeOptions {
        sd_scripts: false,
        ..options
    };
    let (resized, reports) = resize(&set, &right).unwrap();
    let kept = resized.get(LAYER).unwrap().rank().unwrap();
    let all: f64 = singular.iter().sum();
    let square: f64 = singular.iter().map(|s| s * s).sum();
    let sum = |n: usize| singular[..n].iter().sum::<f64>();
    let squares = |n: usize| singular[..n].iter().map(|s| s * s).sum::<f64>();
    let capped = kept == most;
    let promise = match rule {
        RankRule::Fixed(n) => kept == n.min(old_rank),
        RankRule::SvRatio(p) => {
            let bound = singular[0] / p;
            (capped || singular.get(kept).is_none_or(|s| *s <= bound))
                && (kept == 1 || singular[kept - 1] > bound)
        }
        RankRule::SvCumulative(p) => (capped || sum(kept) >= p * all) && sum(kept - 1) < p * all,
        RankRule::SvFro(p) => {
            let goal = p * p * square;
            (capped || squares(kept) >= goal) && squares(kept - 1) < goal
        }
        other => panic!("unknown rule {other:?}"),
    };
    case.equal("the rule's promise", promise, true);
    let missing = ((square - squares(kept)).max(0.0) / square).sqrt();
    case.equal(
        "reported error",
        (reports[0].error - missing).abs() < 1e-5,
        true,
    );
}

fn check_kronecker(case: &mut Case<'_>) {
    let factor = case.json["config"]["factor"].as_i64().unwrap();
    let difference = case.input(0);
    let (w1, w2) = nearest_kronecker(&difference, factor).unwrap();
    let dims = |key: &str| serde_json::from_value::<Vec<usize>>(case.json[key].clone()).unwrap();
    let (want1, want2) = (dims("w1_shape"), dims("w2_shape"));
    case.equal("w1", w1.dims().to_vec(), want1);
    case.equal("w2", w2.dims().to_vec(), want2);
    let options = ExtractOptions {
        family: ExtractFamily::Lokr { factor },
        ..ExtractOptions::new(RankRule::Fixed(1))
    };
    let (adapter, report) = extract_layer(LAYER, &difference, None, &options).unwrap();
    case.equal("family", adapter.family(), Family::Lokr);
    case.compare("best_kron", &delta(adapter.as_ref(), &difference));
    let residual = report.error * report.norm;
    let want = number(&case.json["residual_fro"]);
    case.equal("residual", (residual - want).abs() < 1e-5 * want, true);
    // A Kronecker product as LoRA: exact at full rank.
    let mut set = AdapterSet::default();
    set.insert(LAYER, adapter);
    let (lora, reports) = convert(&set, RankRule::Energy(1.0), None, None).unwrap();
    case.equal("as LoRA", lora.get(LAYER).unwrap().family(), Family::Lora);
    case.equal("error as LoRA", reports[0].error < 1e-5, true);
    case.compare(
        "best_kron",
        &delta(lora.get(LAYER).unwrap().as_ref(), &difference),
    );
}

#[test]
fn golden_adapters_extract() {
    let index = golden_json("adapters", "index.json");
    let groups = index["groups"].as_array().unwrap();
    let group = groups.iter().find(|g| g["group"] == "extract").unwrap();
    let tensors = golden_tensors("adapters", group["file"].as_str().unwrap());
    let mut report = Report::default();
    for json in group["cases"].as_array().unwrap() {
        let mut case = Case {
            json,
            tensors: &tensors,
            report: &mut report,
            compared: BTreeSet::new(),
        };
        match json["algo"].as_str().unwrap() {
            "extract" => check_extract(&mut case),
            "resize" => check_resize(&mut case),
            "extract_lokr" => check_kronecker(&mut case),
            other => panic!("{}: unknown kind of case {other}", case.name()),
        }
        case.finish();
    }
    report.finish();
}
