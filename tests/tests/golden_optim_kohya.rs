//! sd-scripts' words: learning rates of its schedulers, parsing of its arguments, its
//! parameter groups.

use candle_core::{DType, Device, Var};
use lora_optim::kohya::{GroupOptions, KohyaScheduler, parse_args};
use lora_tests::{Report, Tolerance, golden_json, golden_tensors, values};
use serde_json::{Map, Value};

fn text(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is not a text"))
        .to_string()
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is not a number"))
}

fn texts(value: &Value) -> Vec<String> {
    value
        .as_array()
        .map(|a| a.iter().map(text).collect())
        .unwrap_or_default()
}

/// The options of one schedule case; the rates of the reference's groups beside them.
fn scheduler(name: &str, config: &Map<String, Value>) -> (KohyaScheduler, Vec<f64>) {
    // The optimizer behind the recorded tables was created with this rate.
    let mut options = KohyaScheduler {
        learning_rate: 1e-3,
        ..Default::default()
    };
    let mut base = Vec::new();
    let mut cycles = Vec::new();
    for (key, value) in config {
        match key.as_str() {
            "lr_scheduler" => options.lr_scheduler = text(value),
            "lr_scheduler_type" => options.lr_scheduler_type = text(value),
            "lr_scheduler_args" => options.lr_scheduler_args = texts(value),
            "max_train_steps" => options.max_train_steps = number(value) as u64,
            "lr_warmup_steps" => options.lr_warmup_steps = number(value),
            "lr_decay_steps" => options.lr_decay_steps = number(value),
            "lr_scheduler_num_cycles" => options.lr_scheduler_num_cycles = number(value),
            "lr_scheduler_power" => options.lr_scheduler_power = number(value),
            "lr_scheduler_timescale" => options.lr_scheduler_timescale = value.as_f64(),
            "lr_scheduler_min_lr_ratio" => options.lr_scheduler_min_lr_ratio = value.as_f64(),
            "base_lrs" => {
                base = value
                    .as_array()
                    .expect("rates")
                    .iter()
                    .map(number)
                    .collect()
            }
            // The two classes of LoRA_Easy_Training_Scripts are recorded by their arguments.
            "gamma"
            | "cycle_multiplier"
            | "first_cycle_max_steps"
            | "min_lr"
            | "warmup_steps"
            | "d" => {
                cycles.push(format!("{key}={value}"));
            }
            other => panic!("{name}: this test does not know the option {other}"),
        }
    }
    if !cycles.is_empty() {
        let class = if config.contains_key("d") {
            "RexAnnealingWarmRestarts"
        } else {
            "CosineAnnealingWarmRestarts"
        };
        options.lr_scheduler_type = format!("LoraEasyCustomOptimizer.{class}.{class}");
        options.lr_scheduler_args = cycles;
    }
    (options, base)
}

#[test]
fn golden_optim_kohya_learning_rates() {
    let index = golden_json("kohya", "index.json");
    let tensors = golden_tensors("kohya", "lr_schedules.safetensors");
    let mut report = Report::default();
    for case in index["cases"]
        .as_array()
        .expect("cases")
        .iter()
        .filter(|c| c["group"] == "lr_schedules")
    {
        let name = text(&case["name"]);
        let (options, base) = scheduler(&name, case["config"].as_object().expect("config"));
        let built = options.build();
        if case.get("error").is_some() {
            report.equal(&name, "refused", &built.is_err(), &true);
            continue;
        }
        let schedule = built.unwrap_or_else(|e| panic!("{name}: {e}"));
        let tol = Tolerance {
            atol: number(&case["tolerance"]["atol"]),
            rtol: number(&case["tolerance"]["rtol"]),
        };
        for key in texts(&case["outputs"]) {
            let want = &tensors[&key];
            let steps = want.dims()[0] as u64;
            let rates = |step| base.iter().map(move |lr| (step, *lr));
            let got: Vec<f64> = (0..steps)
                .flat_map(rates)
                .map(|(i, lr)| lr * schedule.factor_for(i, lr))
                .collect();
            report.slice(&name, &key, &got, &values(want), tol);
        }
    }
    report.finish();
}

/// Python's tuples are recorded apart from its lists; both are lists here.
fn plain(value: &Value) -> Value {
    match value {
        Value::Object(map) if map.len() == 1 && map.contains_key("tuple") => map["tuple"].clone(),
        Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), plain(v))).collect(),
        other => other.clone(),
    }
}

#[test]
fn golden_optim_kohya_arguments() {
    let captions = golden_json("kohya", "captions.json");
    let mut report = Report::default();
    for case in captions["optimizer_args_parsing"]
        .as_array()
        .expect("cases")
    {
        let args = texts(&case["args"]);
        let name = args.join(" ");
        match (parse_args(&args), case.get("kwargs")) {
            (Ok(got), Some(want)) => {
                report.equal(&name, "arguments", &Value::Object(got), &plain(want))
            }
            (got, want) => report.equal(&name, "refused", &got.is_err(), &want.is_none()),
        }
    }
    report.finish();
}

#[test]
fn golden_optim_kohya_parameter_groups() {
    let cases = golden_json("kohya", "param_groups.json");
    let mut report = Report::default();
    for case in cases.as_array().expect("cases") {
        let name = text(&case["name"]);
        // All parameters of the recorded network, from the case that trains everything.
        let all = cases.as_array().and_then(|c| {
            c.iter()
                .find(|c| c["groups"].as_array().is_some_and(|g| g.len() == 2))
        });
        let all = all.expect("a case with both components");
        let mut params = Vec::new();
        for group in all["groups"].as_array().expect("groups") {
            for param in texts(&group["params"]) {
                params.push((param, Var::zeros(1, DType::F32, &Device::Cpu).expect("var")));
            }
        }
        let mut options = GroupOptions {
            text_encoder_lr: case["text_encoder_lr"].as_f64(),
            unet_lr: case["unet_lr"].as_f64(),
            learning_rate: number(&case["learning_rate"]),
            ..Default::default()
        };
        if case["unet_only"] == true {
            params.retain(|(name, _)| !name.starts_with("lora_te"));
        }
        for (key, value) in case["network_args"].as_object().expect("network_args") {
            options
                .set_network_arg(key, &text(value))
                .unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        let groups = options
            .groups(params)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let wanted = case["groups"].as_array().expect("groups");
        report.equal(&name, "number of groups", &groups.len(), &wanted.len());
        for (group, want) in groups.iter().zip(wanted) {
            let what = text(&want["description"]);
            report.equal(&name, "name of a group", &group.name, &what);
            let lr = group.lr.expect("lr");
            report.slice(
                &name,
                &format!("lr of {what}"),
                &[lr],
                &[number(&want["lr"])],
                Tolerance {
                    atol: 0.0,
                    rtol: 1e-12,
                },
            );
            let names: Vec<String> = group.params.iter().map(|(n, _)| n.clone()).collect();
            report.equal(
                &name,
                &format!("parameters of {what}"),
                &names,
                &texts(&want["params"]),
            );
        }
    }
    report.finish();
}

#[test]
fn golden_optim_kohya_block_weights() {
    let naming = golden_json("kohya", "naming_misc.json");
    let mut report = Report::default();
    for case in naming["block_lr_weight"].as_array().expect("cases") {
        let name = case["args"].to_string();
        let mut options = GroupOptions::default();
        for (key, value) in case["args"].as_object().expect("args") {
            options
                .set_network_arg(key, &text(value))
                .unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        let got = options.block_weights.expect("block weights").all();
        let want: Vec<f64> = case["weights"]
            .as_array()
            .expect("weights")
            .iter()
            .map(number)
            .collect();
        report.slice(
            &name,
            "weights",
            &got,
            &want,
            Tolerance {
                atol: 1e-15,
                rtol: 1e-12,
            },
        );
    }
    report.finish();
}
