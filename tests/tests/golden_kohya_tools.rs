//! sd-scripts' file tools: merging, SVD merging, resizing, extracting.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use lora_core::algebra::{
    Clamp, ExtractOptions, RankRule, ResizeOptions, Strength, Weights, compose,
    compose_as_sd_scripts, extract, resize,
};
use lora_core::format::write_tensors;
use lora_core::{AdapterSet, merge};
use lora_tests::{Report, Tolerance, golden_json, golden_tensors, values};
use serde_json::Value;

type Tensors = BTreeMap<String, Tensor>;

struct Case<'a> {
    name: &'a str,
    json: &'a Value,
    config: &'a Value,
    inputs: Tensors,
    outputs: Tensors,
    tolerance: Tolerance,
    report: &'a mut Report,
}

impl Case<'_> {
    /// The adapter file `A`, `B`, ... through a real file.
    fn adapter(&self, folder: &Path, tag: &str) -> AdapterSet {
        let start = format!("{tag}.");
        let tensors: Tensors = (self.inputs.iter())
            .filter_map(|(k, t)| Some((k.strip_prefix(&start)?.to_string(), t.clone())))
            .collect();
        let path = folder.join(format!("{tag}.safetensors"));
        write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();
        AdapterSet::load(&path, &Device::Cpu).unwrap()
    }

    /// The adapter files in order, with their ratios.
    fn adapters(&self, folder: &Path) -> Vec<(AdapterSet, f64)> {
        let tags: BTreeSet<&str> = (self.inputs.keys())
            .filter_map(|k| k.split('.').next())
            .filter(|tag| *tag != "W")
            .collect();
        let ratios = self.config["ratios"].as_array().unwrap();
        assert_eq!(tags.len(), ratios.len(), "{}", self.name);
        (tags.into_iter().zip(ratios))
            .map(|(tag, ratio)| (self.adapter(folder, tag), ratio.as_f64().unwrap()))
            .collect()
    }

    fn compare(&mut self, key: &str, got: &Tensor) {
        let want = self.outputs.remove(key);
        let Some(want) = want else {
            self.report.fail(self.name, key, "no such output");
            return;
        };
        self.report
            .tensor(self.name, key, got, &want, self.tolerance);
    }

    /// Factors of an f32 decomposition: their errors go with the largest entry.
    fn compare_factor(&mut self, key: &str, got: &Tensor) {
        let largest = (self.outputs.get(key)).map_or(0.0, |want| {
            values(want).iter().fold(0f64, |m, v| m.max(v.abs()))
        });
        let tolerance = self.tolerance;
        self.tolerance.atol += tolerance.rtol * largest;
        self.compare(key, got);
        self.tolerance = tolerance;
    }

    /// Alphas, and products of factors without it, of all layers.
    fn compare_products(&mut self, set: &AdapterSet) {
        for (layer, adapter) in set.iter() {
            let alpha = Tensor::new(adapter.alpha().unwrap() as f32, &Device::Cpu).unwrap();
            self.compare(&format!("{layer}.alpha"), &alpha);
            self.compare(&format!("{layer}.product"), &bare_product(set, layer));
        }
    }

    /// Factors beside the products: compared through them where signs are free.
    fn forget(&mut self, suffixes: &[&str]) {
        let free = |k: &String| suffixes.iter().any(|s| k.ends_with(s));
        self.outputs.retain(|k, _| !free(k));
    }

    fn finish(self) {
        for key in self.outputs.keys() {
            self.report.fail(self.name, key, "not compared");
        }
    }
}

fn parts(set: &AdapterSet, layer: &str) -> (Tensor, Tensor) {
    let tensors: BTreeMap<&str, Tensor> = set
        .get(layer)
        .unwrap()
        .tensors()
        .unwrap()
        .into_iter()
        .collect();
    let flat = |name: &str| tensors[name].flatten_from(1).unwrap();
    (flat("lora_up.weight"), flat("lora_down.weight"))
}

/// `up down` without alpha.
fn bare_product(set: &AdapterSet, layer: &str) -> Tensor {
    let (up, down) = parts(set, layer);
    up.matmul(&down).unwrap()
}

fn delta(set: &AdapterSet, layer: &str) -> Tensor {
    let product = bare_product(set, layer);
    let adapter = set.get(layer).unwrap();
    adapter.delta(&product.zeros_like().unwrap(), 1.0).unwrap()
}

fn with_strength(sets: &[(AdapterSet, f64)]) -> Vec<(&AdapterSet, Strength)> {
    sets.iter()
        .map(|(set, ratio)| (set, Strength::new(*ratio, *ratio)))
        .collect()
}

/// Our sum is the true one, computed here from the inputs; sd-scripts' is reproduced.
fn check_merge(case: &mut Case<'_>, folder: &Path) {
    let sets = case.adapters(folder);
    let (sum, _) = compose(&with_strength(&sets), None, None, None).unwrap();
    for layer in sum.names() {
        let mut want: Option<Tensor> = None;
        for (set, ratio) in sets.iter().filter(|(set, _)| set.get(layer).is_some()) {
            let part = (delta(set, layer) * *ratio).unwrap();
            want = Some(match want {
                Some(sum) => (sum + part).unwrap(),
                None => part,
            });
        }
        let what = format!("true sum of {layer}");
        let (got, want) = (delta(&sum, layer), want.unwrap());
        case.report
            .tensor(case.name, &what, &got, &want, case.tolerance);
    }
    let concat = case.config["concat"].as_bool().unwrap_or(false);
    let borrowed: Vec<(&AdapterSet, f64)> = sets.iter().map(|(set, r)| (set, *r)).collect();
    let flawed = compose_as_sd_scripts(&borrowed, concat).unwrap();
    for (key, tensor) in flawed.tensors(None).unwrap() {
        // Theirs writes alpha as a tensor of the first file, ours of each layer.
        case.compare(&key, &tensor);
    }
    for (key, want) in case.json["metadata"].as_object().unwrap() {
        if matches!(key.as_str(), "ss_network_dim" | "ss_network_alpha") {
            continue;
        }
        if key == "ss_network_module" {
            let got = flawed.metadata().get(key).map(String::as_str);
            case.report.equal(case.name, key, &got, &want.as_str());
        }
    }
}

/// The tools' fake modules by layer name: `te.layer.q_proj.weight`.
fn layer_of(key: &str) -> String {
    let path = key.strip_suffix(".weight").unwrap();
    let path = path.replace('.', "_");
    match path.strip_prefix("te_") {
        Some(rest) => format!("lora_te_{rest}"),
        None => format!("lora_{path}"),
    }
}

fn check_merge_to_model(case: &mut Case<'_>, folder: &Path) {
    let sets = case.adapters(folder);
    let weights: Tensors = (case.inputs.iter())
        .filter_map(|(k, t)| Some((k.strip_prefix("W.")?.to_string(), t.clone())))
        .collect();
    for (key, weight) in weights {
        let layer = layer_of(&key);
        let parts: Vec<_> = (sets.iter())
            .filter_map(|(set, ratio)| Some((set.get(&layer)?.as_ref(), *ratio)))
            .collect();
        for (adapter, _) in &parts {
            adapter.check(&layer, weight.dims()).unwrap();
        }
        case.compare(&key, &merge::merged_weight(&weight, &parts).unwrap());
    }
}

/// Gives every pair of columns of `up` and rows of `down` the sign of the wanted ones.
fn aligned(up: &Tensor, down: &Tensor, want_up: &Tensor, want_down: &Tensor) -> (Tensor, Tensor) {
    let columns = |t: &Tensor| t.t().unwrap().to_vec2::<f32>().unwrap();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    let (a, b) = (columns(up), columns(want_up));
    let rows = down.to_vec2::<f32>().unwrap();
    let want_rows = want_down.to_vec2::<f32>().unwrap();
    let signs: Vec<f32> = (0..a.len())
        .map(|k| (dot(&a[k], &b[k]) + dot(&rows[k], &want_rows[k])).signum())
        .collect();
    let rank = signs.len();
    let signs = Tensor::from_vec(signs, (1, rank), &Device::Cpu).unwrap();
    (
        up.broadcast_mul(&signs).unwrap(),
        down.broadcast_mul(&signs.t().unwrap()).unwrap(),
    )
}

/// Compares factors that sd-scripts clamped by the quantile of signed values: with its
/// signs, which are arbitrary, our clamp gives its factors.
fn check_clamped(case: &mut Case<'_>, set: &AdapterSet, q: f64) {
    let layers: Vec<String> = set.names().map(ToString::to_string).collect();
    for layer in layers {
        let (up, down) = parts(set, &layer);
        let [up_key, down_key] =
            ["lora_up.weight", "lora_down.weight"].map(|part| format!("{layer}.{part}"));
        let (Some(want_up), Some(want_down)) =
            (case.outputs.get(&up_key), case.outputs.get(&down_key))
        else {
            case.report
                .fail(case.name, &layer, "sd-scripts has no such layer");
            continue;
        };
        let (up_dims, down_dims) = (want_up.dims().to_vec(), want_down.dims().to_vec());
        let (want_up, want_down) = (
            want_up.flatten_from(1).unwrap(),
            want_down.flatten_from(1).unwrap(),
        );
        if want_up.dims() != up.dims() {
            let what = format!("rank {:?}, wanted {:?}", up.dims(), want_up.dims());
            case.report.fail(case.name, &layer, what);
            continue;
        }
        let (up, down) = aligned(&up, &down, &want_up, &want_down);
        let (up, down) = Clamp::SdScripts(q).apply(&up, &down).unwrap();
        let product = up.matmul(&down).unwrap();
        case.compare(&format!("{layer}.product"), &product);
        case.compare_factor(&up_key, &up.reshape(up_dims).unwrap());
        case.compare_factor(&down_key, &down.reshape(down_dims).unwrap());
        let alpha = Tensor::new(
            set.get(&layer).unwrap().alpha().unwrap() as f32,
            &Device::Cpu,
        );
        case.compare(&format!("{layer}.alpha"), &alpha.unwrap());
    }
}

/// Singular values as recorded, in the order in which the tool met the layers.
fn check_singular_values(case: &mut Case<'_>, matrices: &[Tensor]) {
    for (index, matrix) in matrices.iter().enumerate() {
        let svd = lora_core::algebra::Svd::exact(matrix).unwrap();
        let got: Vec<f32> = svd.values().iter().map(|s| *s as f32).collect();
        let count = got.len();
        let got = Tensor::from_vec(got, count, &Device::Cpu).unwrap();
        case.compare(&format!("svd{index:02}.s"), &got);
    }
    // The vectors' signs are arbitrary; the clamped factors above depend on them.
    case.forget(&[".u", ".vh"]);
}

/// The factors that sd-scripts cuts: `up` with the singular values.
fn kohya_factors(set: AdapterSet, rank: usize, conv_rank: usize) -> AdapterSet {
    let options = ResizeOptions {
        conv_rule: Some(RankRule::Fixed(conv_rank)),
        ..ResizeOptions::new(RankRule::Fixed(rank))
    };
    resize(&set, &options).unwrap().0
}

fn check_svd_merge(case: &mut Case<'_>, folder: &Path) {
    let sets = case.adapters(folder);
    let mut adapters = with_strength(&sets);
    if let Some(lists) = case.config["lbws"].as_array() {
        for ((_, strength), list) in adapters.iter_mut().zip(lists) {
            let list: Vec<f64> = serde_json::from_str(list.as_str().unwrap()).unwrap();
            *strength = strength.clone().with_blocks(&list).unwrap();
        }
    }
    let rank = case.config["new_rank"].as_u64().unwrap() as usize;
    let conv = case.config["new_conv_rank"]
        .as_u64()
        .map_or(rank, |r| r as usize);
    let (sum, _) = compose(&adapters, None, None, None).unwrap();
    // The sum has alpha = rank, so that its bare product is the whole change.
    if let Some(order) = case.json["module_order"].as_array() {
        let matrices: Vec<Tensor> = order
            .iter()
            .map(|layer| bare_product(&sum, layer.as_str().unwrap()))
            .collect();
        check_singular_values(case, &matrices);
    }
    let reduced = kohya_factors(sum, rank, conv);
    let q = case.config["clamp_quantile"].as_f64().unwrap_or(0.99);
    check_clamped(case, &reduced, q);
}

fn check_resize(case: &mut Case<'_>, folder: &Path) {
    let set = case.adapter(folder, "A");
    let number = |key: &str| case.config[key].as_u64().unwrap() as usize;
    let (rank, conv) = (number("new_rank"), number("new_conv_rank"));
    let dynamic = case.config["dynamic_method"].as_str().map(|method| {
        RankRule::from_name(method, case.config["dynamic_param"].as_f64().unwrap()).unwrap()
    });
    let options = ResizeOptions {
        most: Some(rank),
        conv_rule: Some(dynamic.unwrap_or(RankRule::Fixed(conv))),
        conv_most: Some(conv),
        sd_scripts: true,
        ..ResizeOptions::new(dynamic.unwrap_or(RankRule::Fixed(rank)))
    };
    let (resized, _) = resize(&set, &options).unwrap();
    let ranks: BTreeMap<String, usize> = (resized.iter())
        .map(|(layer, a)| (layer.to_string(), a.rank().unwrap()))
        .collect();
    let want: BTreeMap<String, usize> =
        serde_json::from_value(case.config["ranks"].clone()).unwrap();
    case.report.equal(case.name, "ranks", &ranks, &want);
    case.compare_products(&resized);
    if dynamic.is_none() {
        let layers: Vec<String> = set.names().map(ToString::to_string).collect();
        let matrices: Vec<Tensor> = layers.iter().map(|l| bare_product(&set, l)).collect();
        // Recorded in the file's own order; found by value.
        let recorded: Vec<String> = case
            .outputs
            .keys()
            .filter(|k| k.ends_with(".s"))
            .cloned()
            .collect();
        case.report.equal(
            case.name,
            "singular values",
            &recorded.len(),
            &matrices.len(),
        );
        for matrix in &matrices {
            let svd = lora_core::algebra::Svd::exact(matrix).unwrap();
            let near = |key: &&String| {
                let want = values(&case.outputs[*key]);
                want.len() == svd.values().len()
                    && (want.iter().zip(svd.values())).all(|(w, g)| {
                        (w - g).abs() <= case.tolerance.atol + case.tolerance.rtol * w
                    })
            };
            let found = recorded
                .iter()
                .filter(|k| case.outputs.contains_key(*k))
                .find(near)
                .cloned();
            match found {
                Some(key) => drop(case.outputs.remove(&key)),
                None => case
                    .report
                    .fail(case.name, "singular values", "of no recorded layer"),
            }
        }
        case.forget(&[".u", ".vh", ".lora_up.weight", ".lora_down.weight"]);
    }
}

fn check_extract(case: &mut Case<'_>) {
    let weights = |ending: &str| {
        let tensors: Tensors = (case.inputs.iter())
            .filter_map(|(k, t)| {
                let key = k.strip_prefix("W.")?.strip_suffix(ending)?;
                Some((format!("{}.weight", layer_of(key)), t.clone()))
            })
            .collect();
        Weights::from_tensors(tensors)
    };
    let (base, tuned) = (weights(".org"), weights(".tuned"));
    let rank = |key: &str| {
        case.config[key]
            .as_u64()
            .map(|r| RankRule::Fixed(r as usize))
    };
    let options = ExtractOptions {
        conv_rule: rank("conv_dim"),
        min_diff: case.config["min_diff"].as_f64().unwrap(),
        ..ExtractOptions::new(rank("dim").unwrap())
    };
    let (set, _) = extract(&base, &tuned, &options).unwrap();
    let text = set.names().any(|n| n.starts_with("lora_te_"));
    let same = case.config["text_encoder_same"].as_bool().unwrap();
    case.report
        .equal(case.name, "text encoder left out", &!text, &same);
    for (key, want) in case.json["metadata"].as_object().unwrap() {
        let got = set.metadata().get(key).cloned().unwrap_or_default();
        let want = want.as_str().unwrap();
        if key == "ss_network_args" {
            // The same object, whatever the order of its keys.
            let parse = |text: &str| serde_json::from_str::<Value>(text).unwrap();
            case.report
                .equal(case.name, key, &parse(&got), &parse(want));
        } else {
            case.report.equal(case.name, key, &got.as_str(), &want);
        }
    }
    let q = case.config["clamp_quantile"].as_f64().unwrap();
    check_clamped(case, &set, q);
    case.forget(&[".u", ".vh", ".s"]);
}

#[test]
fn golden_kohya_tools() {
    let index = golden_json("kohya", "index.json");
    let tensors = golden_tensors("kohya", "tools.safetensors");
    let folder = tempfile::tempdir().unwrap();
    let mut report = Report::default();
    let cases = index["cases"].as_array().unwrap();
    for json in cases.iter().filter(|c| c["group"] == "tools") {
        let name = json["name"].as_str().unwrap();
        let part = |kind: &str| -> Tensors {
            let start = format!("{name}.{kind}.");
            (tensors.iter())
                .filter_map(|(k, t)| Some((k.strip_prefix(&start)?.to_string(), t.clone())))
                .map(|(k, t)| (k, t.to_dtype(DType::F32).unwrap()))
                .collect()
        };
        let number = |key: &str| json["tolerance"][key].as_f64().unwrap();
        let mut case = Case {
            name,
            json,
            config: &json["config"],
            inputs: part("in"),
            outputs: part("out"),
            tolerance: Tolerance {
                atol: number("atol"),
                rtol: number("rtol"),
            },
            report: &mut report,
        };
        match name {
            "merge_to_model" => check_merge_to_model(&mut case, folder.path()),
            _ if name.starts_with("merge_") => check_merge(&mut case, folder.path()),
            _ if name.starts_with("svd_merge") => check_svd_merge(&mut case, folder.path()),
            _ if name.starts_with("resize_") => check_resize(&mut case, folder.path()),
            _ if name.starts_with("extract_") => check_extract(&mut case),
            other => panic!("unknown kind of case {other}"),
        }
        case.finish();
    }
    report.finish();
}
