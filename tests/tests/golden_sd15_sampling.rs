//! Noise levels, samplers and random numbers against k-diffusion, torch and the web UI.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use lora_sd15::sampler::{
    Churn, Ddim, Denoiser, Dpm2, Dpm2Ancestral, Dpmpp2m, Dpmpp2mSde, Dpmpp2sAncestral, Dpmpp3mSde,
    DpmppSde, Euler, EulerAncestral, Heun, Lcm, Lms, Plms, Prediction, Query, Renewal, Sampler,
    SdeSolver, SigmaOptions, SigmaSchedule, UniPc, UniPcOptions, UniPcTimes, UniPcVariant,
    ddim_timesteps, lcm_sigmas,
};
use lora_sd15::{
    BatchNoise, BrownianTree, NoiseGenerator, NoiseRequest, NoiseSchedule, NoiseSource,
    img2img_steps, philox_words, seed_sequence,
};
use lora_tests::{Report, Tolerance, golden_json, golden_tensors, values};
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

fn f32s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

fn wide(tensor: &Tensor) -> Tensor {
    tensor.to_dtype(DType::F64).unwrap()
}

fn count(value: &Value) -> usize {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is not a count")) as usize
}

fn texts<'a>(case: &'a Value, key: &str) -> Vec<&'a str> {
    let list = case[key]
        .as_array()
        .unwrap_or_else(|| panic!("no {key} in {case}"));
    list.iter().filter_map(Value::as_str).collect()
}

/// Fails for options that the test does not hand on.
fn only(options: &Value, known: &[&str]) {
    for key in options.as_object().unwrap().keys() {
        assert!(known.contains(&key.as_str()), "unknown option {key}");
    }
}

#[test]
fn golden_sd15_sigmas() {
    let (cases, t) = group("sigmas");
    let schedule = NoiseSchedule::sd15_f64();
    let mut report = Report::default();
    for case in &cases {
        let name = text(case, "name");
        let mut options = SigmaOptions::default();
        let kind = match name {
            "sigma_to_t" => {
                let probes = values(&t["probe_sigma"]);
                let got: Vec<f64> = probes.iter().map(|s| schedule.timestep(*s)).collect();
                report.slice(name, "t", &got, &values(&t["probe_t"]), tolerance(case));
                let nearest = probes.iter().map(|s| schedule.nearest_timestep(*s) as f64);
                let got: Vec<f64> = nearest.collect();
                let want = values(&t["probe_t_quantized"]);
                report.slice(name, "nearest", &got, &want, tolerance(case));
                continue;
            }
            "t_to_sigma" => {
                let probes = values(&t["probe_t2"]);
                let got: Vec<f64> = probes.iter().map(|t| schedule.sigma_at(*t)).collect();
                let want = values(&t["probe_sigma2"]);
                report.slice(name, "sigma", &got, &want, tolerance(case));
                continue;
            }
            "polyexponential_rho2" => {
                options.rho = Some(2.0);
                SigmaSchedule::Polyexponential
            }
            name => SigmaSchedule::from_name(name).unwrap(),
        };
        for n in case["config"]["steps"].as_array().unwrap() {
            let n = count(n);
            let key = format!("{name}.n{n}");
            // 1e-5: the reference works in f32, where the steep schedules lose digits.
            let tol = Tolerance {
                rtol: tolerance(case).rtol.max(1e-5),
                atol: 0.0,
            };
            let got = kind.sigmas_with(n, &schedule, &options);
            report.slice(name, &key, &got, &values(&t[&key]), tol);
        }
    }
    report.finish();
}

/// The reference's stand-in for a denoiser.
fn toy_denoiser(x: &Tensor, sigma: f64, phase: &Tensor) -> Tensor {
    let wave = ((x * (0.7 / (1.0 + sigma))).unwrap() + phase)
        .unwrap()
        .sin()
        .unwrap();
    ((x * (0.9 / (1.0 + sigma * sigma))).unwrap() + (wave * 0.3).unwrap()).unwrap()
}

/// The reference's stand-in for a network.
fn toy_network(x: &Tensor, t: f64, phase: &Tensor) -> Tensor {
    let angle = (x + 0.003 * t).unwrap().broadcast_add(phase).unwrap();
    ((x * 0.8).unwrap() + (angle.sin().unwrap() * 0.2).unwrap()).unwrap()
}

fn k_sampler(case: &Value, start: Tensor, sigmas: Vec<f64>) -> Box<dyn Sampler> {
    let options = &case["config"]["options"];
    only(
        options,
        &[
            "s_churn",
            "s_tmin",
            "s_tmax",
            "s_noise",
            "eta",
            "solver_type",
        ],
    );
    let option = |key: &str, default: f64| options[key].as_f64().unwrap_or(default);
    let churn = Churn {
        s_churn: option("s_churn", 0.0),
        s_tmin: option("s_tmin", 0.0),
        s_tmax: option("s_tmax", f64::INFINITY),
        s_noise: option("s_noise", 1.0),
    };
    let renewal = Renewal {
        eta: option("eta", 1.0),
        s_noise: option("s_noise", 1.0),
    };
    match text(case, "algorithm") {
        "sample_euler" => Box::new(Euler::new(start, sigmas, churn)),
        "sample_euler_ancestral" => Box::new(EulerAncestral::new(start, sigmas, renewal)),
        "sample_heun" => Box::new(Heun::new(start, sigmas, churn)),
        "sample_lms" => Box::new(Lms::new(start, sigmas)),
        "sample_dpm_2" => Box::new(Dpm2::new(start, sigmas, churn)),
        "sample_dpm_2_ancestral" => Box::new(Dpm2Ancestral::new(start, sigmas, renewal)),
        "sample_dpmpp_2s_ancestral" => Box::new(Dpmpp2sAncestral::new(start, sigmas, renewal)),
        "sample_dpmpp_2m" => Box::new(Dpmpp2m::new(start, sigmas)),
        "sample_dpmpp_sde" => Box::new(DpmppSde::new(start, sigmas, renewal)),
        "sample_dpmpp_2m_sde" => {
            let solver = match options["solver_type"].as_str() {
                None | Some("midpoint") => SdeSolver::Midpoint,
                Some("heun") => SdeSolver::Heun,
                Some(other) => panic!("unknown solver {other}"),
            };
            Box::new(Dpmpp2mSde::new(start, sigmas, renewal, solver))
        }
        "sample_dpmpp_3m_sde" => Box::new(Dpmpp3mSde::new(start, sigmas, renewal)),
        other => panic!("unknown kind of case {other}"),
    }
}

#[test]
fn golden_sd15_sampler_trajectories() {
    let (cases, t) = group("trajectories");
    let mut report = Report::default();
    for case in &cases {
        let (name, tol) = (text(case, "name"), tolerance(case));
        let sigmas = values(&t[texts(case, "inputs")[0]]);
        let start = (wide(&t["init_noise"]) * sigmas[0]).unwrap();
        let mut sampler = k_sampler(case, start, sigmas);
        let phase = wide(&t["phase"]);
        let mut used = 0;
        let mut noise = |_: f64, _: f64| {
            used += 1;
            t["noises"].get(used - 1)?.to_dtype(DType::F64)
        };
        let key = |suffix: &str| {
            let outputs = texts(case, "outputs");
            *outputs.iter().find(|o| o.ends_with(suffix)).unwrap()
        };
        let (xs, denoised) = (&t[key("|x")], &t[key("|denoised")]);
        let mut compared = 0;
        loop {
            sampler.prepare(&mut noise).unwrap();
            let Some(Query::Sigma { x, sigma }) = sampler.query() else {
                break;
            };
            let (step, _) = sampler.progress();
            let answer = toy_denoiser(&x, sigma, &phase);
            // The first question of a step; the reference records the latents with churn
            // applied.
            if step == compared {
                let want = wide(&xs.get(step).unwrap());
                report.tensor(name, &format!("x[{step}]"), &x, &want, tol);
                let want = wide(&denoised.get(step).unwrap());
                report.tensor(name, &format!("denoised[{step}]"), &answer, &want, tol);
                compared += 1;
            }
            sampler.advance(&answer, &mut noise).unwrap();
        }
        report.equal(name, "steps", &compared, &denoised.dim(0).unwrap());
        let want = wide(&xs.get(compared).unwrap());
        report.tensor(name, "result", sampler.latents(), &want, tol);
        // Churn's noise is drawn only where churn is asked for, so the count may be lower.
        let most = count(&case["config"]["noises_used"]);
        report.equal(name, "noise", &(used <= most), &true);
    }
    report.finish();
}

#[test]
fn golden_sd15_timestep_samplers() {
    let (cases, t) = group("timestep_samplers");
    let schedule = NoiseSchedule::sd15_f64();
    let acp = schedule.alphas_cumprod();
    let mut report = Report::default();
    for case in &cases {
        let (name, config, tol) = (text(case, "name"), &case["config"], tolerance(case));
        let start = wide(&t["init_noise"]);
        let timesteps = |steps: &Value| ddim_timesteps(count(steps));
        let mut check_timesteps = |got: &[usize]| {
            if let Some(key) = texts(case, "inputs")
                .iter()
                .find(|k| k.starts_with("timesteps"))
            {
                let want: Vec<usize> = values(&t[*key]).iter().map(|v| *v as usize).collect();
                report.equal(name, "timesteps", &got.to_vec(), &want);
            }
        };
        let mut sampler: Box<dyn Sampler> = match text(case, "algorithm") {
            "DDIM" => {
                let timesteps = timesteps(&config["steps"]);
                check_timesteps(&timesteps);
                Box::new(Ddim::new(start, timesteps, acp, number(&config["eta"])))
            }
            "PLMS" => {
                let timesteps = timesteps(&config["steps"]);
                check_timesteps(&timesteps);
                Box::new(Plms::new(start, timesteps, acp))
            }
            "UniPC" => {
                if !config["requested_steps"].is_null() {
                    check_timesteps(&timesteps(&config["requested_steps"]));
                }
                let options = UniPcOptions {
                    order: count(&config["order"]),
                    variant: match text(config, "variant") {
                        "bh1" => UniPcVariant::Bh1,
                        "bh2" => UniPcVariant::Bh2,
                        other => panic!("unknown variant {other}"),
                    },
                    times: match text(config, "skip_type") {
                        "time_uniform" => UniPcTimes::Uniform,
                        "time_quadratic" => UniPcTimes::Quadratic,
                        "logSNR" => UniPcTimes::LogSnr,
                        other => panic!("unknown times {other}"),
                    },
                    ..UniPcOptions::default()
                };
                let steps = count(&config["solver_steps"]);
                let sampler = UniPc::new(start, steps, &schedule, options);
                let key = *texts(case, "outputs")
                    .iter()
                    .find(|o| o.ends_with(".t"))
                    .unwrap();
                let tol = Tolerance {
                    atol: 1e-6,
                    rtol: 1e-6,
                };
                report.slice(name, "times", sampler.times(), &values(&t[key]), tol);
                Box::new(sampler)
            }
            other => {
                report.fail(name, other, "unknown kind of case");
                continue;
            }
        };
        let phase = wide(&t["phase"]);
        let mut used = 0;
        let mut noise = |_: f64, _: f64| {
            used += 1;
            t["noises"].get(used - 1)?.to_dtype(DType::F64)
        };
        let outputs = texts(case, "outputs");
        let xs = &t[*outputs.iter().find(|o| o.ends_with(".x")).unwrap()];
        loop {
            let (step, _) = sampler.progress();
            let want = wide(&xs.get(step).unwrap());
            report.tensor(name, &format!("x[{step}]"), sampler.latents(), &want, tol);
            let Some(query) = sampler.query() else { break };
            let Query::Timestep { x, timestep } = query else {
                panic!("{name} asks for a sigma");
            };
            let eps = toy_network(&x, timestep, &phase);
            sampler.advance(&eps, &mut noise).unwrap();
        }
        let (done, total) = sampler.progress();
        report.equal(
            name,
            "steps",
            &(done, total),
            &(total, xs.dim(0).unwrap() - 1),
        );
    }
    report.finish();
}

#[test]
fn golden_sd15_lcm() {
    let (cases, t) = group("lcm");
    let schedule = NoiseSchedule::sd15_f64();
    let denoiser = Denoiser::lcm(schedule.clone(), Prediction::Epsilon);
    let mut report = Report::default();
    for case in &cases {
        report.equal(
            text(case, "name"),
            "algorithm",
            &text(case, "algorithm"),
            &"LCM",
        );
        let (name, tol) = (text(case, "name"), tolerance(case));
        let n = count(&case["config"]["steps"]);
        let sigmas = lcm_sigmas(n, &schedule);
        let relative = Tolerance {
            atol: 0.0,
            rtol: 2e-6,
        };
        let want = values(&t[&format!("n{n}.sigmas")]);
        report.slice(name, "sigmas", &sigmas, &want, relative);
        let start = (wide(&t["init_noise"]) * sigmas[0]).unwrap();
        let mut sampler = Lcm::new(start, sigmas);
        let phase = wide(&t["phase"]);
        let mut used = 0;
        let mut noise = |_: f64, _: f64| {
            used += 1;
            t["noises"].get(used - 1)?.to_dtype(DType::F64)
        };
        let xs = &t[&format!("n{n}.x")];
        loop {
            let (step, _) = sampler.progress();
            let want = wide(&xs.get(step).unwrap());
            report.tensor(name, &format!("x[{step}]"), sampler.latents(), &want, tol);
            let Some(Query::Sigma { x, sigma }) = sampler.query() else {
                break;
            };
            let (input, timestep) = denoiser.input(&x, sigma).unwrap();
            let answer = toy_network(&input, timestep, &phase);
            let denoised = denoiser.denoised(&x, sigma, &answer).unwrap();
            sampler.advance(&denoised, &mut noise).unwrap();
        }
        report.equal(name, "steps", &sampler.progress(), &(n, n));
    }
    report.finish();
}

#[test]
fn golden_sd15_wrappers() {
    let (cases, t) = group("wrappers");
    let mut report = Report::default();
    for case in &cases {
        let (name, tol) = (text(case, "name"), tolerance(case));
        match name {
            "wrap" => {
                let schedule = NoiseSchedule::sd15_f64();
                let none = Tensor::zeros(1, DType::F32, &CPU).unwrap();
                for output in texts(case, "outputs") {
                    let denoiser = |p| Denoiser::new(schedule.clone(), p);
                    let denoiser = match output {
                        "eps_denoised" => denoiser(Prediction::Epsilon),
                        "eps_quantized_denoised" => denoiser(Prediction::Epsilon).quantized(),
                        "v_denoised" => denoiser(Prediction::V),
                        other => panic!("unknown wrapper {other}"),
                    };
                    for (i, sigma) in values(&t["sigma"]).into_iter().enumerate() {
                        let x = t["x"].get(i).unwrap();
                        let (input, timestep) = denoiser.input(&x, sigma).unwrap();
                        let answer = toy_network(&input, timestep, &none);
                        let got = denoiser.denoised(&x, sigma, &answer).unwrap();
                        let want = t[output].get(i).unwrap();
                        report.tensor(name, &format!("{output}[{i}]"), &got, &want, tol);
                    }
                }
            }
            "img2img_steps" => {
                for row in case["rows"].as_array().unwrap() {
                    let steps = count(&row["steps"]);
                    let strength = number(&row["denoising_strength"]);
                    let exactly = row["do_exactly_steps"].as_bool().unwrap();
                    let got = img2img_steps(steps, strength, exactly);
                    let want = (count(&row["total_steps"]), count(&row["t_enc"]));
                    report.equal(name, &row.to_string(), &got, &want);
                }
            }
            other => report.fail(other, "case", "unknown kind of case"),
        }
    }
    report.finish();
}

fn source(name: &str) -> NoiseSource {
    match name {
        "philox" => NoiseSource::Philox,
        "cpu" => NoiseSource::Cpu,
        other => panic!("unknown source {other}"),
    }
}

fn seeds(value: &Value) -> Vec<u64> {
    serde_json::from_value(value.clone()).unwrap_or_default()
}

#[test]
fn golden_sd15_rng() {
    let (cases, t) = group("rng");
    let mut report = Report::default();
    for case in &cases {
        let (name, config, tol) = (text(case, "name"), &case["config"], tolerance(case));
        let words: Vec<&str> = name.split(' ').collect();
        match words.as_slice() {
            ["seed", "sequence"] => {
                for row in case["rows"].as_array().unwrap() {
                    assert_eq!(row["pool_size"], 24, "another pool");
                    let key: Vec<u32> = serde_json::from_value(row["spawn_key"].clone()).unwrap();
                    let want: Vec<u32> = serde_json::from_value(row["state"].clone()).unwrap();
                    let entropy = row["entropy"].as_u64().unwrap();
                    let got = seed_sequence(entropy, &key, want.len());
                    report.equal(name, &row.to_string(), &got, &want);
                }
            }
            ["seed", _, "shape", _] => {
                for (prefix, kind) in [("philox", NoiseSource::Philox), ("cpu", NoiseSource::Cpu)] {
                    let mut generator = NoiseGenerator::new(kind, config["seed"].as_u64().unwrap());
                    let outputs = texts(case, "outputs");
                    for key in outputs.iter().filter(|o| o.starts_with(prefix)) {
                        let got = generator.normal(t[*key].elem_count());
                        report.slice(name, key, &f32s(&got), &values(&t[*key]), tol);
                    }
                }
            }
            ["philox", "words"] => {
                let seed = config["seed"].as_u64().unwrap();
                let want = values(&t["philox_words"]);
                let rows = (0..want.len() as u32 / 4)
                    .map(|i| philox_words(seed, count(&config["offset"]) as u32, i));
                let got: Vec<f64> = rows.flatten().map(f64::from).collect();
                report.slice(name, "words", &got, &want, tol);
            }
            ["image", "rng", kind, _] => {
                only(
                    config,
                    &[
                        "seeds", "shape", "subseeds", "strength", "from_h", "from_w", "ensd",
                    ],
                );
                let shape: [usize; 3] = serde_json::from_value(config["shape"].clone()).unwrap();
                let side = |key: &str| config[key].as_u64().map(|v| v as usize);
                let mut noise = BatchNoise::new(NoiseRequest {
                    source: source(kind),
                    shape,
                    seeds: seeds(&config["seeds"]),
                    variation_seeds: seeds(&config["subseeds"]),
                    variation_strength: config["strength"].as_f64().unwrap_or(0.0),
                    resize_from: side("from_h").zip(side("from_w")),
                    eta_delta: config["ensd"].as_i64().unwrap_or(0),
                });
                for key in texts(case, "outputs") {
                    let got = noise.next(&CPU).unwrap();
                    report.tensor(name, key, &got, &t[key], tol);
                }
            }
            ["brownian", kind, "seed", _] => {
                let sigmas: Vec<f64> = serde_json::from_value(config["sigmas"].clone()).unwrap();
                let seed = config["seed"].as_u64().unwrap();
                let want = &t[texts(case, "outputs")[0]];
                let size = want.get(0).unwrap().elem_count();
                let (high, low) = (sigmas[0], sigmas[sigmas.len() - 1]);
                let mut tree = BrownianTree::new(source(kind), seed, size, low, high);
                for (i, pair) in sigmas.windows(2).enumerate() {
                    let got = tree.between(pair[0], pair[1]);
                    let want = values(&want.get(i).unwrap());
                    report.slice(name, &format!("step {i}"), &f32s(&got), &want, tol);
                }
            }
            _ => report.fail(name, "case", "unknown kind of case"),
        }
    }
    report.finish();
}
