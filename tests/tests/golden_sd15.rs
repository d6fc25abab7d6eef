//! Stable Diffusion 1.5 against diffusers, transformers and the web UI.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use lora_core::{Adaptable, AdapterSet, Component, Lora};
use lora_sd15::{
    Checkpoint, NoiseSchedule, Part, TextEncoder, Tokenizer, UNet, UnevenSize, Vae,
    ldm_to_diffusers, timestep_embedding, weigh_restoring_mean,
};
use lora_tests::{Report, Tolerance, golden_json, golden_path, golden_tensors, values};
use serde_json::Value;

const CPU: Device = Device::Cpu;

type Tensors = BTreeMap<String, Tensor>;

/// A group of the index: its cases and its tensors.
fn group(name: &str) -> (Vec<Value>, Tensors) {
    let index = golden_json("sd15", "index.json");
    let group = &index["groups"][name];
    let cases = group["cases"]
        .as_array()
        .unwrap_or_else(|| panic!("no group {name}"))
        .clone();
    let tensors = group["file"]
        .as_str()
        .map(|f| golden_tensors("sd15", f))
        .unwrap_or_default();
    (cases, tensors)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key]
        .as_str()
        .unwrap_or_else(|| panic!("{key} is not text in {value}"))
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is not a number"))
}

fn tolerance(case: &Value) -> Tolerance {
    Tolerance {
        atol: case["atol"].as_f64().unwrap_or(0.0),
        rtol: case["rtol"].as_f64().unwrap_or(0.0),
    }
}

fn mini() -> Checkpoint {
    Checkpoint::open(golden_path("sd15", "mini_ldm.safetensors")).expect("the miniature opens")
}

fn unet(checkpoint: &Checkpoint) -> UNet {
    let vb = checkpoint
        .var_builder(Part::Unet, DType::F32, &CPU)
        .expect("UNet tensors");
    UNet::new(&checkpoint.config().unet, vb).expect("UNet")
}

fn timesteps(tensor: &Tensor) -> Vec<usize> {
    values(tensor).into_iter().map(|t| t as usize).collect()
}

fn f32s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// Every group of the index is run by some test: by this file, `golden_sd15_sampling.rs`,
/// `golden_sd15_prompts.rs` or `golden_sd15_train.rs`.
#[test]
fn golden_sd15_knows_every_group() {
    let known = [
        "basics",
        "unet",
        "vae",
        "text",
        "lora_grad_all",
        "lora_grad_linear",
        "lora_train_attn",
        "lora_train_all",
        "sigmas",
        "trajectories",
        "wrappers",
        "timestep_samplers",
        "lcm",
        "rng",
        "tokenizer",
        "prompts",
    ];
    let index = golden_json("sd15", "index.json");
    for name in index["groups"].as_object().unwrap().keys() {
        assert!(known.contains(&name.as_str()), "no test runs group {name}");
    }
}

#[test]
fn golden_sd15_basics() {
    let (cases, t) = group("basics");
    let mut report = Report::default();
    let schedule = NoiseSchedule::sd15();
    for case in &cases {
        let (name, tol) = (text(case, "name"), tolerance(case));
        match name {
            "schedule" => {
                let f64_table = NoiseSchedule::sd15_f64();
                for (key, got) in [
                    ("betas_f32", schedule.betas()),
                    ("alphas_cumprod_f32", schedule.alphas_cumprod()),
                    ("alphas_cumprod_f64", f64_table.alphas_cumprod()),
                ] {
                    report.slice(name, key, &f32s(got), &values(&t[key]), tol);
                }
            }
            "add_noise" => {
                let steps = timesteps(&t["t"]);
                let noisy = schedule.add_noise(&t["x0"], &t["noise"], &steps).unwrap();
                report.tensor(name, "noisy", &noisy, &t["noisy"], tol);
                let v = schedule.velocity(&t["x0"], &t["noise"], &steps).unwrap();
                report.tensor(name, "v_target", &v, &t["v_target"], tol);
                let snr: Vec<f64> = steps.iter().map(|s| f64::from(schedule.snr(*s))).collect();
                report.slice(
                    name,
                    "snr",
                    &snr,
                    &values(&t["snr"]),
                    Tolerance { rtol: 1e-5, ..tol },
                );
            }
            "pixels" => {
                let (c, h, w) = t["rgb_f32"]
                    .squeeze(0)
                    .unwrap_or(t["rgb_f32"].clone())
                    .dims3()
                    .unwrap();
                let bytes: Vec<u8> = values(&t["rgb_u8"]).into_iter().map(|v| v as u8).collect();
                assert_eq!(c, 3);
                let image = lora_sd15::Image {
                    width: w,
                    height: h,
                    rgb: bytes,
                };
                let tensor = image.to_tensor(&CPU).unwrap();
                report.slice(
                    name,
                    "rgb_f32",
                    &values(&tensor),
                    &values(&t["rgb_f32"]),
                    tol,
                );
            }
            name if name.starts_with("timestep_embedding_") => {
                let width: usize = name["timestep_embedding_".len()..].parse().unwrap();
                for (input, kind) in [("t_int", "int"), ("t_float", "float")] {
                    let key = format!("temb.{width}.{kind}");
                    let got = timestep_embedding(&t[input], width).unwrap();
                    report.tensor(name, &key, &got, &t[&key], tol);
                }
            }
            other => report.fail(other, "case", "unknown kind of case"),
        }
    }
    report.finish();
}

#[test]
fn golden_sd15_key_map() {
    let mut report = Report::default();
    for row in lora_tests::bundled_json("sd15", "key_map.json")
        .as_array()
        .unwrap()
    {
        let part = match text(row, "component") {
            "unet" => Part::Unet,
            "vae" => Part::Vae,
            _ => Part::TextEncoder,
        };
        let ldm = text(row, "ldm");
        let want = row["diffusers"]
            .as_str()
            .map(|name| (part, name.to_string()));
        report.equal(ldm, "name", &ldm_to_diffusers(ldm), &want);
    }
    report.finish();
}

#[test]
fn golden_sd15_unet() {
    let (cases, t) = group("unet");
    let checkpoint = mini();
    let mut report = Report::default();
    for case in &cases {
        let (name, tol) = (text(case, "name"), tolerance(case));
        let inputs: Vec<&str> = case["inputs"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_str)
            .collect();
        let input = |suffix: &str| {
            inputs
                .iter()
                .find(|i| i.ends_with(suffix))
                .map(|i| t[*i].clone())
        };
        let wanted = case["outputs"][0].as_str().unwrap();
        let mut net = match input("conv_in.weight") {
            None => unet(&checkpoint),
            Some(weight) => widened(&checkpoint, weight),
        };
        if !wanted.ends_with("webui") {
            net.set_uneven_size(UnevenSize::Diffusers);
        }
        let (sample, context) = (input("sample").unwrap(), input("context").unwrap());
        let got = match input("timestep") {
            Some(timestep) => net.forward(&sample, &timestep, &context).unwrap(),
            None => guided(&net, &sample, &context, &case["config"]),
        };
        report.tensor(name, wanted, &got, &t[wanted], tol);
    }
    report.finish();
}

/// The miniature with another first convolution (inpainting: 9 channels).
fn widened(checkpoint: &Checkpoint, conv_in: Tensor) -> UNet {
    let vb = checkpoint
        .var_builder(Part::Unet, DType::F32, &CPU)
        .unwrap();
    let mut config = checkpoint.config().unet.clone();
    config.in_channels = conv_in.dim(1).unwrap();
    let swapped = Swapped {
        base: vb,
        name: "conv_in.weight",
        tensor: conv_in,
    };
    UNet::new(
        &config,
        VarBuilder::from_backend(Box::new(swapped), DType::F32, CPU),
    )
    .unwrap()
}

struct Swapped {
    base: VarBuilder<'static>,
    name: &'static str,
    tensor: Tensor,
}

impl candle_nn::var_builder::SimpleBackend for Swapped {
    fn get(
        &self,
        shape: candle_core::Shape,
        name: &str,
        init: candle_nn::Init,
        dtype: DType,
        _: &Device,
    ) -> candle_core::Result<Tensor> {
        if name == self.name {
            Ok(self.tensor.clone())
        } else {
            self.base.get_with_hints_dtype(shape, name, init, dtype)
        }
    }
    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> candle_core::Result<Tensor> {
        self.base.get_unchecked_dtype(name, dtype)
    }
    fn contains_tensor(&self, name: &str) -> bool {
        self.base.contains_tensor(name)
    }
}

fn guided(net: &UNet, sample: &Tensor, context: &Tensor, config: &Value) -> Tensor {
    let t = Tensor::full(
        number(&config["timestep"]) as f32,
        sample.dim(0).unwrap(),
        &CPU,
    )
    .unwrap();
    let scale = number(&config["scale"]);
    let run = |i: usize| {
        net.forward(sample, &t, &context.narrow(0, i, 1).unwrap())
            .unwrap()
    };
    let (c, u) = (run(0), run(1));
    (&u + ((c - &u).unwrap() * scale).unwrap()).unwrap()
}

#[test]
fn golden_sd15_vae() {
    let (cases, t) = group("vae");
    let checkpoint = mini();
    let vb = checkpoint.var_builder(Part::Vae, DType::F32, &CPU).unwrap();
    let vae = Vae::new(&checkpoint.config().vae, vb).unwrap();
    let mut report = Report::default();
    for case in &cases {
        let (name, tol) = (text(case, "name"), tolerance(case));
        let Some((set, kind)) = name.split_once('_') else {
            panic!("case {name}")
        };
        let get = |suffix: &str| &t[&format!("{set}.{suffix}")];
        match kind {
            "encode" => {
                let posterior = vae.encode(get("image")).unwrap();
                report.tensor(name, "mean", &posterior.mean, get("mean"), tol);
                report.tensor(name, "logvar", &posterior.logvar, get("logvar"), tol);
                let latent = posterior
                    .sample(get("noise"), vae.scaling_factor())
                    .unwrap();
                report.tensor(name, "latent", &latent, get("latent"), tol);
            }
            "decode" => report.tensor(
                name,
                "decoded",
                &vae.decode(get("z")).unwrap(),
                get("decoded"),
                tol,
            ),
            other => report.fail(name, other, "unknown kind of case"),
        }
    }
    report.finish();
}

#[test]
fn golden_sd15_text() {
    let (cases, t) = group("text");
    let checkpoint = mini();
    let vb = checkpoint
        .var_builder(Part::TextEncoder, DType::F32, &CPU)
        .unwrap();
    let encoder = TextEncoder::new(&checkpoint.config().text, vb).unwrap();
    let mut report = Report::default();
    for case in &cases {
        let (name, tol) = (text(case, "name"), tolerance(case));
        for output in case["outputs"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_str)
        {
            let got = match output.split_once('.') {
                Some(("hidden_states", i)) => encoder.hidden_states(&t["input_ids"]).unwrap()
                    [i.parse::<usize>().unwrap()]
                .clone(),
                Some(("clip_skip", s)) => encoder
                    .forward(&t["input_ids"], s.parse().unwrap())
                    .unwrap(),
                Some(("emphasis", "z")) => {
                    weigh_restoring_mean(&t["clip_skip.1"], &t["emphasis.multipliers"]).unwrap()
                }
                _ => {
                    report.fail(name, output, "unknown kind of output");
                    continue;
                }
            };
            report.tensor(name, output, &got, &t[output], tol);
        }
    }
    report.finish();
}

#[test]
fn golden_sd15_folder_and_single_file_are_the_same_model() {
    let folder = Checkpoint::open(golden_path("sd15", "mini_diffusers")).unwrap();
    let file = mini();
    assert_eq!(folder.config(), file.config());
    let (cases, t) = group("unet");
    let case = cases.iter().find(|c| c["name"] == "square").unwrap();
    let get = |suffix: &str| &t[&format!("square.{suffix}")];
    let got = unet(&folder)
        .forward(get("sample"), get("timestep"), get("context"))
        .unwrap();
    let mut report = Report::default();
    report.tensor("mini_diffusers", "eps", &got, get("eps"), tolerance(case));
    report.finish();
}

/// Puts the factors `PREFIX.MODULE.lora_*.weight` on the UNet as trainable LoRAs.
fn adapters(net: &mut UNet, t: &Tensors, prefix: &str, alpha: f64) -> AdapterSet {
    let mut set = AdapterSet::default();
    for (key, down) in t {
        let Some(module) = key
            .strip_prefix(prefix)
            .and_then(|k| k.strip_suffix(".lora_down.weight"))
        else {
            continue;
        };
        let up = t[&format!("{prefix}{module}.lora_up.weight")].clone();
        let name = Component::Unet.layer_name(module);
        set.insert(
            name.clone(),
            std::sync::Arc::new(Lora::new(&name, down.clone(), None, up, alpha).unwrap()),
        );
    }
    let mut set = set.trainable().unwrap();
    set.attach(net, 1.0).unwrap().strict().unwrap();
    set
}

/// Kohya's name of each module, back to the dotted one of the golden file.
fn dotted(net: &mut UNet) -> BTreeMap<String, String> {
    let mut names = BTreeMap::new();
    net.visit_layers(&mut |layer| {
        names.insert(
            Component::Unet.layer_name(layer.path()),
            layer.path().to_string(),
        );
        Ok(())
    })
    .unwrap();
    names
}

fn golden_gradients(name: &str) {
    let (cases, t) = group(name);
    let schedule = NoiseSchedule::sd15();
    let mut report = Report::default();
    for case in &cases {
        let (name, tol) = (text(case, "name"), tolerance(case));
        let mut net = unet(&mini());
        let set = adapters(&mut net, &t, "factor.", number(&case["config"]["alpha"]));
        report.equal(
            name,
            "modules",
            &set.len(),
            &(case["modules"].as_u64().unwrap() as usize),
        );
        let noisy = schedule
            .add_noise(&t["x0"], &t["noise"], &timesteps(&t["timesteps"]))
            .unwrap();
        report.tensor(name, "noisy", &noisy, &t["noisy"], tol);
        let (noisy, context) = (
            Var::from_tensor(&noisy).unwrap(),
            Var::from_tensor(&t["context"]).unwrap(),
        );
        let pred = net.forward(&noisy, &t["timesteps"], &context).unwrap();
        report.tensor(name, "pred", &pred, &t["pred"], tol);
        let loss = (&pred - &t["noise"])
            .unwrap()
            .sqr()
            .unwrap()
            .mean_all()
            .unwrap();
        report.tensor(name, "loss", &loss, &t["loss"], tol);
        let grads = loss.backward().unwrap();
        report.tensor(
            name,
            "grad.noisy",
            grads.get(&noisy).unwrap(),
            &t["grad.noisy"],
            tol,
        );
        report.tensor(
            name,
            "grad.context",
            grads.get(&context).unwrap(),
            &t["grad.context"],
            tol,
        );
        let tol = Tolerance {
            atol: number(&case["factor_grad_atol"]),
            rtol: 0.0,
        };
        let paths = dotted(&mut net);
        for (param, var) in set.params() {
            let (layer, suffix) = param.split_once('.').unwrap();
            let key = format!("grad.{}.{suffix}", paths[layer]);
            report.tensor(name, &key, grads.get(&var).unwrap(), &t[&key], tol);
        }
    }
    report.finish();
}

#[test]
fn golden_sd15_lora_gradients_all() {
    golden_gradients("lora_grad_all");
}

#[test]
fn golden_sd15_lora_gradients_linear() {
    golden_gradients("lora_grad_linear");
}

#[test]
fn golden_sd15_tokenizer() {
    let tokenizer = Tokenizer::new();
    let mut report = Report::default();
    for group in golden_json("sd15", "tokenizer.json").as_array().unwrap() {
        for row in group["rows"].as_array().unwrap() {
            let ids = |key: &str| -> Vec<u32> { serde_json::from_value(row[key].clone()).unwrap() };
            let case = text(row, "text");
            report.equal(case, "ids", &tokenizer.encode(case), &ids("ids"));
            report.equal(case, "ids77", &tokenizer.encode_padded(case), &ids("ids77"));
        }
    }
    report.finish();
}
