//! Ten training steps followed one by one.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lora_core::{Adaptable, AdapterSet, Component, Lora};
use lora_optim::{AdamW, AdamWConfig, Optimizer, ParamGroup};
use lora_sd15::{Checkpoint, NoiseSchedule, Part, UNet};
use lora_tests::{Report, Tolerance, golden_json, golden_path, golden_tensors, values};
use serde_json::Value;

type Tensors = BTreeMap<String, Tensor>;

fn unet() -> UNet {
    let checkpoint = Checkpoint::open(golden_path("sd15", "mini_ldm.safetensors")).unwrap();
    let vb = checkpoint
        .var_builder(Part::Unet, DType::F32, &Device::Cpu)
        .unwrap();
    UNet::new(&checkpoint.config().unet, vb).unwrap()
}

/// Dotted module paths by the names that files give them.
fn paths(net: &mut UNet) -> BTreeMap<String, String> {
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

fn adapters(t: &Tensors, config: &Value) -> AdapterSet {
    let mut set = AdapterSet::default();
    for (key, down) in t {
        let Some(module) = key
            .strip_prefix("init.")
            .and_then(|k| k.strip_suffix(".lora_down.weight"))
        else {
            continue;
        };
        let up = match t.get(&format!("init.{module}.lora_up.weight")) {
            Some(up) => up.clone(),
            None => {
                assert_eq!(config["lora_up_init"], "zero");
                t[&format!("after1.{module}.lora_up.weight")]
                    .zeros_like()
                    .unwrap()
            }
        };
        let name = Component::Unet.layer_name(module);
        let lora = Lora::new(
            &name,
            down.clone(),
            None,
            up,
            config["alpha"].as_f64().unwrap(),
        )
        .unwrap();
        set.insert(name, Arc::new(lora));
    }
    set.trainable().unwrap()
}

fn follow(group: &str) {
    let index = golden_json("sd15", "index.json");
    let group = &index["groups"][group];
    let t = golden_tensors("sd15", group["file"].as_str().unwrap());
    let schedule = NoiseSchedule::sd15();
    let mut report = Report::default();
    for case in group["cases"].as_array().unwrap() {
        let (name, config) = (case["name"].as_str().unwrap(), &case["config"]);
        let number = |key: &str| config[key].as_f64().unwrap();
        let mut net = unet();
        let names = paths(&mut net);
        let mut set = adapters(&t, config);
        set.attach(&mut net, 1.0).unwrap().strict().unwrap();
        let options = AdamWConfig {
            lr: number("lr"),
            betas: (
                config["betas"][0].as_f64().unwrap(),
                config["betas"][1].as_f64().unwrap(),
            ),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
            ..Default::default()
        };
        let groups = vec![ParamGroup::new("unet", set.params())];
        let mut optimizer = AdamW::new(groups, options).unwrap();
        let steps = config["steps"].as_u64().unwrap() as usize;
        let contexts = t["contexts"].dim(0).unwrap();
        let mut losses = Vec::new();
        for step in 0..steps {
            let pick = |key: &str| t[key].get(step).unwrap();
            let timesteps: Vec<usize> = values(&pick("timesteps"))
                .iter()
                .map(|v| *v as usize)
                .collect();
            let (x0, noise) = (pick("x0"), pick("noise"));
            let noisy = schedule.add_noise(&x0, &noise, &timesteps).unwrap();
            let context = t["contexts"].get(step % contexts).unwrap();
            let pred = net.forward(&noisy, &pick("timesteps"), &context).unwrap();
            let loss = (&pred - &noise).unwrap().sqr().unwrap().mean_all().unwrap();
            losses.push(f64::from(loss.to_scalar::<f32>().unwrap()));
            optimizer.step(&loss.backward().unwrap()).unwrap();
            compare_factors(&mut report, case, &t, &set, &names, step + 1);
        }
        let tol = Tolerance {
            atol: case["atol"].as_f64().unwrap(),
            rtol: 0.0,
        };
        report.slice(name, "losses", &losses, &values(&t["losses"]), tol);
    }
    report.finish();
}

/// Adam divides by the root of the second moment, so single elements whose gradient is
/// at rounding level may go either way: 99 % must be within tolerance, all within
/// a step of the learning rate.
fn compare_factors(
    report: &mut Report,
    case: &Value,
    t: &Tensors,
    set: &AdapterSet,
    names: &BTreeMap<String, String>,
    step: usize,
) {
    let name = case["name"].as_str().unwrap();
    let atol = case["final_factor_atol"].as_f64().unwrap();
    let lr = case["config"]["lr"].as_f64().unwrap();
    let (mut total, mut off, mut worst) = (0usize, 0usize, 0f64);
    for (param, var) in set.params() {
        let (layer, suffix) = param.split_once('.').unwrap();
        let Some(want) = t.get(&format!("after{step}.{}.{suffix}", names[layer])) else {
            continue;
        };
        for (g, w) in values(&var).iter().zip(values(want)) {
            total += 1;
            off += usize::from((g - w).abs() > atol);
            worst = worst.max((g - w).abs());
        }
    }
    if total > 0 && (off * 100 > total || worst > 2.0 * lr * step as f64) {
        let what = format!(
            "{off} of {total} factor values off by more than {atol:.1e}, largest {worst:.3e}"
        );
        report.fail(name, &format!("factors after step {step}"), what);
    }
}

#[test]
fn golden_sd15_training_attention_is_followed_step_by_step() {
    follow("lora_train_attn");
}

#[test]
fn golden_sd15_training_all_layers_is_followed_step_by_step() {
    follow("lora_train_all");
}

/// The operations that GPUs get, forced on the CPU in a process of its own.
#[test]
fn golden_sd15_training_with_the_operations_of_gpus() {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .arg("step_by_step")
        .env("LORA_KERNELS", "composed")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "LORA_KERNELS=composed\n{text}");
}
