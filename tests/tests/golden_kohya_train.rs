//! Noise, losses, tokens, names, hashes and the LoRA module of sd-scripts.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Module, VarBuilder};
use lora_core::{
    Adapter, AdapterConfig, AdapterSet, BaseLayer, Component, Conv2dParams, Draws, Dropout,
    DropoutKind, Layer, LayerOp, Lora, Pass, Targets, format,
};
use lora_sd15::{NoiseSchedule, TextConfig, TextEncoder, UNet, UnetConfig, tokenizer};
use lora_tests::{Report, Tolerance, golden_json, golden_path, golden_tensors, values};
use lora_train::metadata::ModelSpec;
use lora_train::{
    HuberSchedule, LossAverage, LossConfig, LossType, Naming, NoiseConfig, SampleWeights,
    diffusion_loss, elementwise_loss, join_chunks, make_noise, outdated_epoch, outdated_step,
};
use rand_chacha::rand_core::SeedableRng;
use serde_json::Value;

const CPU: Device = Device::Cpu;

/// The cases of a group, with their name and tolerance.
fn cases(group: &str) -> Vec<(String, Value, Tolerance)> {
    let index = golden_json("kohya", "index.json");
    let all = index["cases"].as_array().unwrap();
    all.iter()
        .filter(|c| c["group"] == group)
        .map(|c| {
            let part = |key: &str| c["tolerance"][key].as_f64().unwrap_or(0.0);
            let tolerance = Tolerance {
                atol: part("atol"),
                rtol: part("rtol"),
            };
            (
                c["name"].as_str().unwrap().to_string(),
                c.clone(),
                tolerance,
            )
        })
        .collect()
}

fn number(config: &Value, key: &str) -> Option<f64> {
    config[key].as_f64()
}

fn flag(config: &Value, key: &str) -> bool {
    config[key].as_bool().unwrap_or(false)
}

fn timesteps(tensor: &Tensor) -> Vec<usize> {
    values(tensor).into_iter().map(|t| t as usize).collect()
}

#[test]
fn golden_kohya_ddpm() {
    let t = golden_tensors("kohya", "ddpm.safetensors");
    let mut report = Report::default();
    for (name, case, tol) in cases("ddpm") {
        let plain = NoiseSchedule::sd15();
        let zero = flag(&case["config"], "zero_terminal_snr");
        let schedule = if zero {
            plain.zero_terminal_snr()
        } else {
            plain.clone()
        };
        let get = |key: &str| &t[&format!("{name}.{key}")];
        let wide = |v: &[f32]| v.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        if case["inputs"].as_array().unwrap().is_empty() {
            report.slice(
                &name,
                "betas",
                &wide(schedule.betas()),
                &values(get("out.betas")),
                tol,
            );
            report.slice(
                &name,
                "acp",
                &wide(schedule.alphas_cumprod()),
                &values(get("out.alphas_cumprod")),
                tol,
            );
            // The reference keeps the table of the plain schedule; ours follows the
            // schedule in use, so it is compared where both mean the same.
            let snr: Vec<f64> = (0..1000).map(|i| f64::from(plain.snr(i))).collect();
            report.slice(&name, "snr", &snr, &values(get("out.all_snr")), tol);
        } else {
            let steps = timesteps(get("in.timesteps"));
            let noisy = schedule
                .add_noise(get("in.latents"), get("in.noise"), &steps)
                .unwrap();
            report.tensor(&name, "noisy", &noisy, get("out.noisy"), tol);
            let v = schedule
                .velocity(get("in.latents"), get("in.noise"), &steps)
                .unwrap();
            report.tensor(&name, "velocity", &v, get("out.velocity"), tol);
        }
    }
    report.finish();
}

/// Recorded draws, handed out in order.
struct Recorded(VecDeque<Tensor>);

impl lora_train::Draws for Recorded {
    fn normal(&mut self, _: &[usize]) -> Result<Tensor> {
        Ok(self.0.pop_front().expect("one more recorded draw"))
    }
    fn uniform(&mut self) -> f64 {
        values(&self.0.pop_front().expect("one more recorded draw"))[0]
    }
    fn timesteps(&mut self, _: usize, _: usize, _: usize) -> Vec<usize> {
        timesteps(&self.0.pop_front().expect("one more recorded draw"))
    }
}

#[test]
fn golden_kohya_noise() {
    let t = golden_tensors("kohya", "noise.safetensors");
    let schedule = NoiseSchedule::sd15();
    let mut report = Report::default();
    for (name, case, tol) in cases("noise") {
        let c = &case["config"];
        let config = NoiseConfig {
            noise_offset: number(c, "noise_offset").unwrap_or(0.0),
            noise_offset_random_strength: flag(c, "noise_offset_random_strength"),
            adaptive_noise_scale: number(c, "adaptive_noise_scale").unwrap_or(0.0),
            multires_noise_iterations: number(c, "multires_noise_iterations").unwrap_or(0.0)
                as usize,
            multires_noise_discount: number(c, "multires_noise_discount").unwrap_or(0.3),
            ip_noise_gamma: number(c, "ip_noise_gamma").unwrap_or(0.0),
            ip_noise_gamma_random_strength: flag(c, "ip_noise_gamma_random_strength"),
            min_timestep: number(c, "min_timestep").unwrap_or(0.0) as usize,
            max_timestep: number(c, "max_timestep").unwrap_or(1000.0) as usize,
        };
        let known = BTreeSet::from([
            "noise_offset",
            "noise_offset_random_strength",
            "adaptive_noise_scale",
            "multires_noise_iterations",
            "multires_noise_discount",
            "ip_noise_gamma",
            "ip_noise_gamma_random_strength",
            "min_timestep",
            "max_timestep",
        ]);
        for key in c
            .as_object()
            .unwrap()
            .keys()
            .filter(|k| !known.contains(k.as_str()))
        {
            report.fail(&name, key, "unknown option");
        }
        let mut draws: Vec<&String> = t
            .keys()
            .filter(|k| k.starts_with(&format!("{name}.in.draw_")))
            .collect();
        draws.sort();
        let mut recorded = Recorded(draws.into_iter().map(|k| t[k].clone()).collect());
        let got = make_noise(
            &t[&format!("{name}.in.latents")],
            &config,
            &schedule,
            &mut recorded,
        )
        .unwrap();
        report.equal(&name, "draws left over", &recorded.0.len(), &0);
        report.tensor(
            &name,
            "noise",
            &got.noise,
            &t[&format!("{name}.out.noise")],
            tol,
        );
        report.tensor(
            &name,
            "noisy",
            &got.noisy,
            &t[&format!("{name}.out.noisy")],
            tol,
        );
        report.equal(
            &name,
            "timesteps",
            &got.timesteps,
            &timesteps(&t[&format!("{name}.out.timesteps")]),
        );
    }
    report.finish();
}

fn loss_config(c: &Value) -> LossConfig {
    LossConfig {
        loss_type: match c["loss_type"].as_str() {
            None | Some("l2") => LossType::L2,
            Some("l1") => LossType::L1,
            Some("huber") => LossType::Huber,
            Some("smooth_l1") => LossType::SmoothL1,
            Some(other) => panic!("loss type {other}"),
        },
        huber_schedule: match c["huber_schedule"].as_str().or(c["schedule"].as_str()) {
            None | Some("snr") => HuberSchedule::Snr,
            Some("exponential") => HuberSchedule::Exponential,
            Some("constant") => HuberSchedule::Constant,
            Some(other) => panic!("huber schedule {other}"),
        },
        huber_c: number(c, "huber_c").unwrap_or(0.1),
        huber_scale: number(c, "huber_scale").unwrap_or(1.0),
        v_parameterization: flag(c, "v"),
        min_snr_gamma: number(c, "gamma")
            .or(number(c, "min_snr_gamma"))
            .unwrap_or(0.0),
        debiased_estimation_loss: flag(c, "debiased"),
        v_pred_like_loss: number(c, "v_pred_like_loss").unwrap_or(0.0),
        ..Default::default()
    }
}

#[test]
fn golden_kohya_loss() {
    let t = golden_tensors("kohya", "loss.safetensors");
    let schedule = NoiseSchedule::sd15();
    let mut report = Report::default();
    for (name, case, tol) in cases("loss") {
        let mut config = loss_config(&case["config"]);
        let get = |key: &str| &t[&format!("{name}.{key}")];
        if name.starts_with("debiased") {
            config.debiased_estimation_loss = true;
        }
        if name.starts_with("scale_v_pred") {
            config.scale_v_pred_loss_like_noise_pred = true;
        }
        if let Some(want) = t.get(&format!("{name}.out.w")) {
            let got: Vec<f64> = (0..want.elem_count())
                .map(|s| config.weight(s, &schedule))
                .collect();
            report.slice(&name, "w", &got, &values(want), tol);
        } else if let Some(want) = t.get(&format!("{name}.out.c")) {
            let got: Vec<f64> = (0..want.elem_count())
                .map(|s| config.huber_c_at(s, &schedule))
                .collect();
            report.slice(&name, "c", &got, &values(want), tol);
        } else if name.starts_with("loss_") {
            let steps = timesteps(get("in.timesteps"));
            let got =
                elementwise_loss(get("in.pred"), get("in.target"), &steps, &config, &schedule)
                    .unwrap();
            report.tensor(&name, "elementwise", &got, get("out.elementwise"), tol);
            let per_sample = got.flatten_from(1).unwrap().mean(1).unwrap();
            report.tensor(&name, "per_sample", &per_sample, get("out.per_sample"), tol);
        } else if name.starts_with("masked_") {
            check_mask(&mut report, &name, &t, tol);
        } else if name == "full_reduction" {
            let steps = timesteps(get("in.timesteps"));
            let weights: Vec<f32> =
                serde_json::from_value(case["config"]["loss_weights"].clone()).unwrap();
            let samples = SampleWeights {
                weights,
                mask: None,
            };
            let got = diffusion_loss(
                get("in.pred"),
                get("in.target"),
                &steps,
                &samples,
                &config,
                &schedule,
            )
            .unwrap();
            report.slice(
                &name,
                "final",
                &values(&got),
                &values(get("out.final")),
                tol,
            );
        } else {
            report.fail(&name, "case", "unknown kind of case");
        }
    }
    report.finish();
}

/// Masks are averaged over squares down to the size of the loss, then multiplied on.
fn check_mask(report: &mut Report, name: &str, t: &BTreeMap<String, Tensor>, tol: Tolerance) {
    let loss = &t[&format!("{name}.in.loss")];
    let (n, _, h, w) = loss.dims4().unwrap();
    let mask = match t.get(&format!("{name}.in.mask")) {
        Some(mask) => mask.clone(),
        None => ((&t[&format!("{name}.in.cond")] / 2.0).unwrap() + 0.5)
            .unwrap()
            .narrow(1, 0, 1)
            .unwrap(),
    };
    let dims = mask.dims().to_vec();
    let (mh, mw) = (dims[dims.len() - 2], dims[dims.len() - 1]);
    let mask = mask.contiguous().unwrap().reshape((n, mh * mw)).unwrap();
    let mut parts = Vec::new();
    for i in 0..n {
        let pixels: Vec<f32> = mask.get(i).unwrap().to_vec1().unwrap();
        let size = lora_data::Size {
            width: mw as u32,
            height: mh as u32,
        };
        let small = lora_data::shrink_mask(&pixels, size, (mh / h) as u32);
        parts.push(Tensor::from_vec(small, (1, 1, h, w), &CPU).unwrap());
    }
    let masked = loss
        .broadcast_mul(&Tensor::cat(&parts, 0).unwrap())
        .unwrap();
    report.tensor(
        name,
        "masked",
        &masked,
        &t[&format!("{name}.out.masked")],
        tol,
    );
}

#[test]
fn golden_kohya_tokens() {
    let t = golden_tensors("kohya", "tokens.safetensors");
    let mut report = Report::default();
    for (name, case, tol) in cases("tokens") {
        let ids: Vec<u32> = values(&t[&format!("{name}.in.ids")])
            .iter()
            .map(|v| *v as u32)
            .collect();
        let chunks = (case["config"]["max_token_length"].as_u64().unwrap_or(75) / 75) as usize;
        let got = tokenizer::chunk_ids(&ids, chunks, tokenizer::START, tokenizer::END);
        let want: Vec<u32> = values(&t[&format!("{name}.out.input_ids")])
            .iter()
            .map(|v| *v as u32)
            .collect();
        report.equal(&name, "input_ids", &got.concat(), &want);
        let states: Vec<Tensor> = got.iter().map(|chunk| fake_encoder(chunk)).collect();
        let joined = join_chunks(&Tensor::stack(&states, 0).unwrap()).unwrap();
        let hidden = &t[&format!("{name}.out.hidden")];
        report.slice(
            &name,
            "hidden",
            &values(&joined),
            &values(hidden),
            Tolerance { atol: 1e-6, ..tol },
        );
    }
    report.finish();
}

/// The reference's stand-in for a text encoder: a function of id and position.
fn fake_encoder(ids: &[u32]) -> Tensor {
    let state = |(position, id): (usize, &u32)| {
        let (position, id) = (position as f32, *id as f32);
        [id * 1e-3 + position, position * 2.0, id * 1e-4]
    };
    let states: Vec<f32> = ids.iter().enumerate().flat_map(state).collect();
    Tensor::from_vec(states, (ids.len(), 3), &CPU).unwrap()
}

/// Full-size SD1.5 layers without memory behind them.
fn shapes_only() -> VarBuilder<'static> {
    struct Shapes;
    impl candle_nn::var_builder::SimpleBackend for Shapes {
        fn get(
            &self,
            shape: candle_core::Shape,
            _: &str,
            _: candle_nn::Init,
            dtype: DType,
            device: &Device,
        ) -> Result<Tensor> {
            Tensor::zeros((), dtype, device)?.broadcast_as(shape)
        }
        fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
            candle_core::bail!("{name} without a shape")
        }
        fn contains_tensor(&self, _: &str) -> bool {
            true
        }
    }
    VarBuilder::from_backend(Box::new(Shapes), DType::F32, CPU)
}

#[test]
fn golden_kohya_module_names() {
    let golden = golden_json("kohya", "module_names.json");
    let names =
        |key: &str| -> BTreeSet<String> { serde_json::from_value(golden[key].clone()).unwrap() };
    let mut unet = UNet::new(&UnetConfig::default(), shapes_only()).unwrap();
    let mut text = TextEncoder::new(&TextConfig::default(), shapes_only()).unwrap();
    let mut rng = rand_chacha::ChaCha12Rng::seed_from_u64(1);
    let mut report = Report::default();
    let rank = 2;
    let plain = AdapterConfig {
        rank,
        ..Default::default()
    };
    let conv = AdapterConfig {
        rank,
        conv_rank: Some(rank),
        ..Default::default()
    };
    for (key, set) in [
        (
            "unet_lora",
            AdapterSet::create(&mut unet, &plain, &Targets::attn_mlp(), &mut rng).unwrap(),
        ),
        (
            "unet_with_conv",
            AdapterSet::create(&mut unet, &conv, &Targets::attn_mlp_conv(), &mut rng).unwrap(),
        ),
        (
            "text_encoder",
            AdapterSet::create(&mut text, &plain, &Targets::attn_mlp(), &mut rng).unwrap(),
        ),
    ] {
        let got: BTreeSet<String> = set.names().map(str::to_string).collect();
        report.equal(key, "names", &got, &names(key));
        let per_rank = golden["parameters_per_rank"][key].as_u64().unwrap() as usize;
        report.equal(
            key,
            "parameters",
            &set.parameter_count(),
            &(per_rank * rank),
        );
        for (name, tensor) in set.tensors(None).unwrap() {
            let (layer, part) = name.split_once('.').unwrap();
            let shape = match part {
                "alpha" => Value::Array(vec![]),
                "lora_down.weight" => golden["modules"][layer]["down"].clone(),
                _ => golden["modules"][layer]["up"].clone(),
            };
            let want: Vec<usize> = shape
                .as_array()
                .unwrap()
                .iter()
                .map(|d| d.as_u64().map_or(rank, |d| d as usize))
                .collect();
            report.equal(&name, "shape", &tensor.dims().to_vec(), &want);
        }
    }
    report.finish();
}

#[test]
fn lycoris_presets_select_the_documented_layers() {
    let mut unet = UNet::new(&UnetConfig::default(), shapes_only()).unwrap();
    let mut text = TextEncoder::new(&TextConfig::default(), shapes_only()).unwrap();
    let mut rng = rand_chacha::ChaCha12Rng::seed_from_u64(1);
    for (preset, in_unet, in_text) in [
        ("full", 282, 72),
        ("full-lin", 230, 72),
        ("attn-mlp", 192, 72),
        ("attn-only", 128, 48),
        ("unet-only", 282, 0),
        ("unet-transformer-only", 192, 0),
        ("unet-convblock-only", 88, 0),
        ("ia3", 80, 36),
    ] {
        let config = lora_train::TrainConfig {
            network_module: Some("lycoris.kohya".into()),
            network_args: vec!["algo=loha".into(), format!("preset={preset}")],
            network_dim: Some(1),
            ..Default::default()
        };
        let (unet_targets, text_targets) = config.targets().unwrap();
        let options = config.adapter().unwrap();
        let set =
            AdapterSet::create(&mut unet, &options, &unet_targets.unwrap(), &mut rng).unwrap();
        assert_eq!(set.len(), in_unet, "{preset}");
        let text_count = text_targets.map_or(0, |targets| {
            AdapterSet::create(&mut text, &options, &targets, &mut rng)
                .unwrap()
                .len()
        });
        assert_eq!(text_count, in_text, "{preset}");
    }
}

#[test]
fn golden_kohya_hashes() {
    let golden = golden_json("kohya", "hashes.json");
    let mut report = Report::default();
    let small = &golden["small"];
    let path = golden_path("kohya", small["file"].as_str().unwrap());
    let tensors = golden_tensors("kohya", small["file"].as_str().unwrap());
    let metadata: BTreeMap<String, String> =
        serde_json::from_value(small["metadata"].clone()).unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_string();
    report.equal(
        "small",
        "sshs_model_hash",
        &format::model_hash(&tensors).unwrap(),
        &text(&small["sshs_model_hash"]),
    );
    let legacy = format::legacy_hash(&tensors, &metadata).unwrap();
    report.equal(
        "small",
        "sshs_legacy_hash",
        &legacy,
        &text(&small["sshs_legacy_hash"]),
    );
    let file = format::model_hash_of_file(&path).unwrap();
    report.equal(
        "small",
        "model_hash_of_file",
        &file,
        &text(&small["model_hash_of_file"]),
    );
    let sha = format::sha256_of_file(&path).unwrap();
    report.equal(
        "small",
        "sha256_of_file",
        &sha,
        &text(&small["sha256_of_file"]),
    );

    let big = &golden["big"];
    let (rows, columns) = (
        big["shape"][0].as_u64().unwrap() as usize,
        big["shape"][1].as_u64().unwrap() as usize,
    );
    let data: Vec<f32> = (0..rows * columns)
        .map(|i| ((i * 37 % 1000) as f32) / 1000.0 - 0.5)
        .collect();
    let tensor = Tensor::from_vec(data, (rows, columns), &CPU).unwrap();
    let tensors = BTreeMap::from([(text(&big["tensor"]), tensor)]);
    let metadata: BTreeMap<String, String> =
        serde_json::from_value(big["metadata"].clone()).unwrap();
    report.equal(
        "big",
        "sshs_model_hash",
        &format::model_hash(&tensors).unwrap(),
        &text(&big["sshs_model_hash"]),
    );
    let legacy = format::legacy_hash(&tensors, &metadata).unwrap();
    report.equal(
        "big",
        "sshs_legacy_hash",
        &legacy,
        &text(&big["sshs_legacy_hash"]),
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("big.safetensors");
    format::write_tensors(&path, &tensors, &metadata).unwrap();
    report.equal(
        "big",
        "file_bytes",
        &std::fs::metadata(&path).unwrap().len(),
        &big["file_bytes"].as_u64().unwrap(),
    );
    let file = format::model_hash_of_file(&path).unwrap();
    report.equal(
        "big",
        "model_hash_of_file",
        &file,
        &text(&big["model_hash_of_file"]),
    );

    let raw = folder.path().join("raw.bin");
    let bytes: Vec<u8> = (0..1_200_000usize)
        .map(|i| ((i * 31 + 7) % 251) as u8)
        .collect();
    std::fs::write(&raw, bytes).unwrap();
    let hash = format::model_hash_of_file(&raw).unwrap();
    report.equal(
        "raw_file",
        "model_hash",
        &hash,
        &text(&golden["raw_file"]["model_hash"]),
    );
    let sha = format::sha256_of_file(&raw).unwrap();
    report.equal(
        "raw_file",
        "sha256",
        &sha,
        &text(&golden["raw_file"]["sha256"]),
    );
    report.finish();
}

#[test]
fn golden_kohya_naming() {
    let golden = golden_json("kohya", "naming_misc.json");
    let mut report = Report::default();
    for row in golden["ckpt"].as_array().unwrap() {
        let naming = Naming::new(row["output_name"].as_str());
        let case = row["output_name"].as_str().unwrap_or("(none)");
        for (key, got) in [
            ("epoch_10", naming.epoch(10)),
            ("step_100", naming.step(100)),
            ("last", naming.last()),
            ("epoch_state", naming.epoch_state(10)),
            ("step_state", naming.step_state(100)),
            ("last_state", naming.last_state()),
        ] {
            report.equal(case, key, &got.as_str(), &row[key].as_str().unwrap());
        }
    }
    let count = |v: &Value| v.as_u64().map(|n| n as usize);
    for (i, row) in golden["remove"].as_array().unwrap().iter().enumerate() {
        let (got, want) = match count(&row["every_n_epochs"]) {
            Some(every) => {
                let epoch = count(&row["epoch"]).unwrap();
                (
                    outdated_epoch(epoch, every, count(&row["save_last_n_epochs"])),
                    row["removed_epoch"].as_i64(),
                )
            }
            None => {
                let (step, every) = (
                    count(&row["step"]).unwrap(),
                    count(&row["every_n_steps"]).unwrap(),
                );
                (
                    outdated_step(step, every, count(&row["save_last_n_steps"])),
                    row["removed_step"].as_i64(),
                )
            }
        };
        report.equal(&format!("remove {i}"), "number", &got, &want);
    }
    let mut average = LossAverage::default();
    for row in golden["loss_recorder"].as_array().unwrap() {
        let part = |key: &str| count(&row[key]).unwrap();
        let got = average.add(part("step"), row["loss"].as_f64().unwrap());
        let case = format!("epoch {} step {}", part("epoch"), part("step"));
        let tol = Tolerance {
            atol: 1e-12,
            rtol: 0.0,
        };
        report.slice(
            &case,
            "average",
            &[got],
            &[row["average"].as_f64().unwrap()],
            tol,
        );
    }
    for (i, row) in golden["modelspec"].as_array().unwrap().iter().enumerate() {
        let got = model_spec(row).metadata();
        let want: BTreeMap<String, String> =
            serde_json::from_value(row["metadata"].clone()).unwrap();
        report.equal(&format!("modelspec {i}"), "metadata", &got, &want);
    }
    report.finish();
}

fn model_spec(row: &Value) -> ModelSpec {
    let args = &row["args"];
    let sizes: Vec<u32> = match &args["reso"] {
        Value::String(text) => text.split(',').map(|n| n.trim().parse().unwrap()).collect(),
        Value::Array(list) => list.iter().map(|n| n.as_u64().unwrap() as u32).collect(),
        Value::Number(n) => vec![n.as_u64().unwrap() as u32],
        _ => Vec::new(),
    };
    let pair: Option<Vec<usize>> = serde_json::from_value(args["timesteps"].clone()).ok();
    let mut extra = BTreeMap::new();
    for (key, value) in args.as_object().unwrap() {
        let fixed = [
            "title",
            "reso",
            "timesteps",
            "clip_skip",
            "v_parameterization",
            "v2",
        ];
        if let (false, Some(text)) = (fixed.contains(&key.as_str()), value.as_str()) {
            extra.insert(key.clone(), text.to_string());
        }
    }
    ModelSpec {
        timestamp: row["timestamp"].as_f64().unwrap(),
        title: args["title"].as_str().map(str::to_string),
        resolution: sizes.first().map(|w| (*w, *sizes.last().unwrap())),
        v_parameterization: flag(args, "v_parameterization"),
        timesteps: pair.map(|p| (p[0], p[1])),
        clip_skip: args["clip_skip"].as_u64().map(|n| n as usize),
        extra,
    }
}

/// Hands out one recorded list of numbers.
struct OneDraw(Vec<f32>);

impl Draws for OneDraw {
    fn uniform(&self, kind: DropoutKind, n: usize) -> Vec<f32> {
        assert_eq!((kind, n), (DropoutKind::Rank, self.0.len()));
        self.0.clone()
    }
}

#[test]
fn golden_kohya_lora_forward() {
    let t = golden_tensors("kohya", "lora_forward.safetensors");
    let mut report = Report::default();
    for (name, case, tol) in cases("lora_forward") {
        if name.starts_with("max_norm_") {
            check_max_norm(&mut report, &name, &case, &t, tol);
            continue;
        }
        let input = |key: &str| t.get(&format!("{name}.in.{key}"));
        let config = &case["config"];
        let rank = config["dim"].as_u64().unwrap() as f64;
        let alpha = number(config, "alpha")
            .filter(|a| *a != 0.0)
            .unwrap_or(rank);
        let (down, up) = (
            input("lora_down").unwrap().clone(),
            input("lora_up").unwrap().clone(),
        );
        let weight = input("weight").unwrap().clone();
        let lora = Lora::new(&name, down, None, up, alpha).unwrap();
        lora.check(&name, weight.dims()).unwrap();
        if let Some(want) = t.get(&format!("{name}.out.weight")) {
            let multiplier = number(config, "multiplier").unwrap();
            let merged = lora_core::merge::merged_weight(&weight, &[(&lora, multiplier)]).unwrap();
            report.tensor(&name, "merged weight", &merged, want, tol);
            continue;
        }
        let layer = BaseLayer::new(weight, input("bias").cloned(), op(config));
        if let Some(rand) = input("rand") {
            let dropout = Dropout {
                rank: number(config, "rank_dropout").unwrap(),
                ..Default::default()
            };
            let draws = OneDraw(values(rand).into_iter().map(|v| v as f32).collect());
            let pass = Pass {
                dropout,
                draws: &draws,
            };
            let x = input("x").unwrap();
            let base = layer
                .op
                .apply(x, &layer.weight, layer.bias.as_ref())
                .unwrap();
            let y = (base + lora.branch(x, &layer, 1.0, Some(&pass)).unwrap()).unwrap();
            report.tensor(&name, "y", &y, &t[&format!("{name}.out.y")], tol);
            continue;
        }
        check_forward(&mut report, &name, &t, layer, &lora, tol);
    }
    report.finish();
}

fn op(config: &Value) -> LayerOp {
    let first = |key: &str| config[key][0].as_u64().map(|n| n as usize);
    match (first("stride"), first("padding")) {
        (Some(stride), Some(padding)) => LayerOp::Conv2d(Conv2dParams {
            stride,
            padding,
            ..Default::default()
        }),
        _ => LayerOp::Linear,
    }
}

/// Output, gradients, delta, and the output at another multiplier, through a layer
/// with the adapter attached.
fn check_forward(
    report: &mut Report,
    name: &str,
    t: &BTreeMap<String, Tensor>,
    layer: BaseLayer,
    lora: &Lora,
    tol: Tolerance,
) {
    struct One(Layer);
    impl lora_core::Adaptable for One {
        fn component(&self) -> Component {
            Component::Custom("lora_one".into())
        }
        fn visit_layers(
            &mut self,
            visit: &mut dyn FnMut(&mut Layer) -> lora_core::Result<()>,
        ) -> lora_core::Result<()> {
            visit(&mut self.0)
        }
    }
    let get = |key: &str| &t[&format!("{name}.{key}")];
    let delta = lora.delta(&layer.weight, 1.0).unwrap();
    report.tensor(name, "delta", &delta, get("out.delta"), tol);
    let mut model = One(Layer::new("layer", layer));
    let mut set = AdapterSet::default();
    set.insert("lora_one_layer", lora.trainable().unwrap());
    set.attach(&mut model, 1.0).unwrap();
    let x = Var::from_tensor(get("in.x")).unwrap();
    let y = model.0.forward(&x).unwrap();
    report.tensor(name, "y", &y, get("out.y"), tol);
    let grads = (&y * get("in.dy"))
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    report.tensor(name, "dx", grads.get(&x).unwrap(), get("out.dx"), tol);
    for (param, var) in set.params() {
        let key = if param.contains("lora_down") {
            "out.d_down"
        } else {
            "out.d_up"
        };
        report.tensor(name, key, grads.get(&var).unwrap(), get(key), tol);
    }
    for key in t
        .keys()
        .filter_map(|k| k.strip_prefix(&format!("{name}.out.y_mult")))
    {
        set.set_multiplier(&Component::Custom("lora_one".into()), key.parse().unwrap());
        report.tensor(
            name,
            &format!("y at {key}"),
            &model.0.forward(&x).unwrap(),
            get(&format!("out.y_mult{key}")),
            tol,
        );
    }
}

fn check_max_norm(
    report: &mut Report,
    name: &str,
    case: &Value,
    t: &BTreeMap<String, Tensor>,
    tol: Tolerance,
) {
    let config = &case["config"];
    let part = |layer: &str, suffix: &str| t[&format!("{name}.in.sd.{layer}.{suffix}")].clone();
    let prefix = format!("{name}.in.sd.");
    let layers: Vec<String> = t
        .keys()
        .filter_map(|k| {
            k.strip_prefix(&prefix)?
                .strip_suffix(".alpha")
                .map(str::to_string)
        })
        .collect();
    let mut set = AdapterSet::default();
    for layer in &layers {
        let alpha = values(&part(layer, "alpha"))[0];
        let (down, up) = (
            part(layer, "lora_down.weight"),
            part(layer, "lora_up.weight"),
        );
        set.insert(
            layer.clone(),
            Arc::new(Lora::new(layer, down, None, up, alpha).unwrap()),
        );
    }
    let set = set.trainable().unwrap();
    let got = set
        .scale_norms(number(config, "scale_weight_norms").unwrap())
        .unwrap();
    report.equal(
        name,
        "keys_scaled",
        &got.factors.len(),
        &(config["keys_scaled"].as_u64().unwrap() as usize),
    );
    let wide = Tolerance {
        atol: 1e-5,
        rtol: 1e-5,
    };
    report.slice(
        name,
        "mean_norm",
        &[got.mean],
        &[number(config, "mean_norm").unwrap()],
        wide,
    );
    report.slice(
        name,
        "max_norm",
        &[got.max],
        &[number(config, "max_norm").unwrap()],
        wide,
    );
    for (param, tensor) in set.tensors(None).unwrap() {
        if let Some(want) = t.get(&format!("{name}.out.sd.{param}")) {
            report.tensor(name, &param, &tensor, want, tol);
        }
    }
}

/// The fresh adapter that these arguments make for the SD1.5 UNet.
fn unet_adapter(module: &str, args: &[&str]) -> AdapterSet {
    let mut unet = UNet::new(&UnetConfig::default(), shapes_only()).unwrap();
    let config = lora_train::TrainConfig {
        network_module: Some(module.into()),
        network_args: args.iter().map(ToString::to_string).collect(),
        network_dim: Some(4),
        network_alpha: 2.0,
        ..Default::default()
    };
    let mut rng = rand_chacha::ChaCha12Rng::seed_from_u64(1);
    let targets = config.targets().unwrap().0.unwrap();
    AdapterSet::create(&mut unet, &config.adapter().unwrap(), &targets, &mut rng).unwrap()
}

fn list(values: impl IntoIterator<Item = usize>) -> String {
    let values: Vec<String> = values.into_iter().map(|v| v.to_string()).collect();
    values.join(",")
}

#[test]
fn ranks_by_block() {
    // Every block another rank; the second block none.
    let dims = list((0..25).map(|i| if i == 2 { 0 } else { i + 1 }));
    let alphas = list(26..51);
    let args = [
        format!("block_dims={dims}"),
        format!("block_alphas={alphas}"),
        format!("conv_block_dims={}", list([3; 25])),
    ];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let set = unet_adapter("networks.lora", &args);
    let mut spatial = 0;
    for (name, adapter) in set.iter() {
        let i = lora_optim::kohya::block_index(name).unwrap();
        let large = adapter.kernel().is_some_and(|kernel| kernel != (1, 1));
        let want = if large {
            (3, 1.0)
        } else {
            (i + 1, (26 + i) as f64)
        };
        spatial += usize::from(large);
        assert_eq!(
            (adapter.rank().unwrap(), adapter.alpha().unwrap()),
            want,
            "{name}"
        );
        assert!(i != 2 || large, "{name}");
    }
    assert_eq!(spatial, 50);
    // The 17 places of a plain LoRA, text encoder first.
    let mut short = [5; 17];
    short[7] = 9;
    let set = unet_adapter("networks.lora", &[&format!("block_dims={}", list(short))]);
    assert_eq!(set.len(), 192);
    for (name, adapter) in set.iter() {
        let want = if name.contains("mid_block") { 9 } else { 5 };
        assert_eq!(
            (adapter.rank(), adapter.alpha()),
            (Some(want), Some(2.0)),
            "{name}"
        );
    }
}

#[test]
fn blocks_that_do_not_learn_get_no_adapter() {
    let args = [
        "down_lr_weight=linear",
        "mid_lr_weight=0",
        "up_lr_weight=cosine+0.2",
        "block_lr_zero_threshold=0.25",
        "conv_dim=2",
    ];
    let set = unet_adapter("networks.lora", &args);
    assert!(set.len() > 100);
    for name in set.names() {
        let i = lora_optim::kohya::block_index(name).unwrap();
        // linear: i / 11 is above the threshold from 3 on; the cosine ends at 0.2.
        assert!((3..12).contains(&i) || (13..24).contains(&i), "{name}: {i}");
    }
}

#[test]
fn sd_scripts_oft_selects_its_layers() {
    for (args, count) in [
        (&[][..], 128),
        (&["enable_all_linear=True"][..], 192),
        (&["enable_all_linear=True", "enable_conv=True"], 278),
    ] {
        let set = unet_adapter("networks.oft", args);
        assert_eq!(set.len(), count, "{args:?}");
        for (name, adapter) in set.iter() {
            assert_eq!(adapter.family(), lora_core::Family::KohyaOft, "{name}");
            assert_eq!(adapter.alpha(), Some(2.0));
            let blocks = adapter.factors()[0].1.dims().to_vec();
            assert_eq!(blocks[0], 4, "{name}");
            if count == 278 {
                break;
            }
        }
    }
}

#[test]
fn a_preset_file_gives_some_layers_other_options() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("preset.toml");
    let text = r#"
        enable_conv = false
        unet_target_module = ["Transformer2DModel"]
        unet_target_name = ["conv_in"]
        [module_algo_map.FeedForward]
        algo = "lokr"
        dim = 2
        factor = 8
        [name_algo_map.conv_in]
        dim = 3
        alpha = 1
    "#;
    std::fs::write(&path, text).unwrap();
    let preset = format!("preset={}", path.display());
    let set = unet_adapter("lycoris.kohya", &["algo=loha", &preset]);
    assert_eq!(set.len(), 193);
    for (name, adapter) in set.iter() {
        let found = (adapter.family(), adapter.rank(), adapter.alpha());
        let want = match name {
            n if n.contains("_ff_") => (lora_core::Family::Lokr, Some(2), Some(2.0)),
            "lora_unet_conv_in" => (lora_core::Family::Loha, Some(3), Some(1.0)),
            _ => (lora_core::Family::Loha, Some(4), Some(2.0)),
        };
        assert_eq!(found, want, "{name}");
    }
}

#[test]
fn network_args_that_make_no_sense() {
    for (module, arg, word) in [
        ("networks.lora", "block_dims=1,2,3", "12, 17, 25 or 26"),
        ("networks.lora", "block_dims=a", "block_dims"),
        ("networks.lora", "conv_dim=-1", "negative"),
        ("networks.lora", "surplus=1", "surplus"),
        ("networks.oft", "conv_dim=4", "conv_dim"),
        ("lycoris.kohya", "block_dims=1", "block_dims"),
        ("lycoris.kohya", "preset=absent.toml", "absent.toml"),
        ("lycoris.kohya", "algo=dylora", "dylora"),
    ] {
        let config = lora_train::TrainConfig {
            network_module: Some(module.into()),
            network_args: vec![arg.into()],
            ..Default::default()
        };
        let error = config.adapter().unwrap_err().to_string();
        assert!(error.contains(word), "{arg}: {error}");
    }
    let config = lora_train::TrainConfig {
        network_args: vec![format!("block_dims={}", ["0.5"; 25].join(","))],
        ..Default::default()
    };
    let error = config
        .adapter()
        .unwrap()
        .validate()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("block_ranks") && error.contains("0.5"),
        "{error}"
    );
}
