//! Cases that are no trajectories: quantization, clipping, rounding, EMA, schedules.

use candle_core::{DType, Tensor, Var};
use lora_optim::quantize::{BLOCK, CodeTable, SIGNED, UNSIGNED};
use lora_optim::schedule::{
    Advance, Constant, Cosine, CosineAnnealing, CosineRestarts, Floor, Hold, InverseSqrt, Linear,
    LrSchedule, OneCycle, Piecewise, Polynomial, RampShape, Rex, WarmRestarts, Warmup,
    WarmupFromFirst, WarmupStableDecay,
};
use lora_optim::{Ema, EmaConfig, clip_grad_norm, stochastic_bf16};
use lora_tests::{Report, Tolerance, values};
use serde_json::Value;

use super::{Suite, expected, number, text};

pub(crate) const QUANTIZATION: &str =
    "blockwise 8-bit quantization, block 256 (the last block is all zeros; unsigned input is |x|)";
pub(crate) const CLIPPING: &str = "clip_grad_norm";
pub(crate) const ROUNDING: &str = "bf16 = top 16 bits of (f32 bits + r), r uniform in 0..65535";
pub(crate) const EMA: &str = "EMA of weights";
pub(crate) const SCHEDULE: &str = "lr schedule";
/// All algorithms that this module tests.
pub(crate) const KNOWN: [&str; 5] = [QUANTIZATION, CLIPPING, ROUNDING, EMA, SCHEDULE];

/// Runs every case of one algorithm.
pub(crate) fn run(algorithm: &str, check: fn(&Suite, &Value, &mut Report)) {
    let suite = Suite::load();
    let mut report = Report::default();
    for case in suite.cases().iter().filter(|c| c["algorithm"] == algorithm) {
        check(&suite, case, &mut report);
    }
    report.finish();
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().expect("flat").to_vec1().expect("f32")
}

pub(crate) fn quantization(suite: &Suite, case: &Value, report: &mut Report) {
    let name = text(&case["name"]);
    let exact = Tolerance::default();
    for (kind, table) in [("signed", &*SIGNED), ("unsigned", &*UNSIGNED)] {
        let map = Tensor::new(&table.values()[..], &candle_core::Device::Cpu).expect("map");
        report.tensor(
            &name,
            &format!("map/{kind}"),
            &map,
            suite.tensor(case, &format!("map/{kind}")),
            exact,
        );
    }
    let x = floats(suite.tensor(case, "quant8/x"));
    for key in expected(case) {
        let want = values(suite.tensor(case, &key));
        let (table, what) = match key
            .strip_prefix(&format!("{name}/"))
            .and_then(|k| k.split_once('/'))
        {
            Some(("signed", what)) => (&*SIGNED, what),
            Some(("unsigned", what)) => (&*UNSIGNED, what),
            _ => panic!("{name}: this test does not know {key}"),
        };
        let input: Vec<f32> = if std::ptr::eq(table, &*UNSIGNED) {
            x.iter().map(|x| x.abs()).collect()
        } else {
            x.clone()
        };
        let (codes, largest, restored) = quantized(table, &input);
        match what {
            "codes" => report.slice(&name, &key, &codes, &want, exact),
            "absmax" => report.slice(&name, &key, &largest, &want, exact),
            "dequantized" => report.slice(
                &name,
                &key,
                &restored,
                &want,
                Tolerance {
                    atol: 0.0,
                    rtol: 1e-7,
                },
            ),
            other => report.fail(&name, &key, format_args!("this test does not know {other}")),
        }
    }
}

/// Codes, largest magnitudes and restored values, block by block.
fn quantized(table: &CodeTable, x: &[f32]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut codes, mut largest, mut restored) = (Vec::new(), Vec::new(), Vec::new());
    for block in x.chunks(BLOCK) {
        let mut block_codes = vec![0u8; block.len()];
        let most = table.quantize(block, &mut block_codes);
        let mut back = vec![0f32; block.len()];
        table.dequantize(&block_codes, most, &mut back);
        codes.extend(block_codes.iter().map(|c| f64::from(*c)));
        restored.extend(back.iter().map(|x| f64::from(*x)));
        largest.push(f64::from(most));
    }
    (codes, largest, restored)
}

pub(crate) fn clipping(suite: &Suite, case: &Value, report: &mut Report) {
    let name = text(&case["name"]);
    let tol = Tolerance {
        atol: 0.0,
        rtol: number(&case["tolerance"]["rtol"]),
    };
    let inputs: Vec<String> = case["inputs"]
        .as_array()
        .expect("inputs")
        .iter()
        .map(text)
        .collect();
    let mut grads: Vec<Tensor> = inputs
        .iter()
        .map(|k| suite.tensor(case, k).clone())
        .collect();
    let norm = clip_grad_norm(grads.iter_mut(), number(&case["config"]["max_norm"])).expect("clip");
    for key in expected(case) {
        let want = suite.tensor(case, &key);
        if key.ends_with("/norm") {
            report.slice(&name, &key, &[norm], &values(want), tol);
            continue;
        }
        let at = inputs
            .iter()
            .position(|i| i.replace("/grad/", "/clipped/") == key);
        match at {
            Some(at) => report.tensor(&name, &key, &grads[at], want, tol),
            None => report.fail(&name, &key, "no gradient of this name"),
        }
    }
}

pub(crate) fn rounding(suite: &Suite, case: &Value, report: &mut Report) {
    let name = text(&case["name"]);
    let x = floats(suite.tensor(case, &format!("{name}/x")));
    let r = suite
        .tensor(case, &format!("{name}/r"))
        .to_dtype(DType::I64)
        .expect("i64")
        .to_vec1::<i64>()
        .expect("bits");
    let got: Vec<f64> = x
        .iter()
        .zip(r)
        .map(|(x, r)| f64::from(stochastic_bf16(*x, r as u16)))
        .collect();
    for key in expected(case) {
        report.slice(
            &name,
            &key,
            &got,
            &values(suite.tensor(case, &key)),
            Tolerance::default(),
        );
    }
}

pub(crate) fn ema(suite: &Suite, case: &Value, report: &mut Report) {
    let name = text(&case["name"]);
    let var = Var::from_tensor(suite.tensor(case, &format!("{name}/init"))).expect("var");
    let config: EmaConfig =
        serde_json::from_value(case["config"].clone()).unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut ema = Ema::new(&[("p".to_string(), var.clone())], config).expect("ema");
    let trajectory = suite.tensor(case, &format!("{name}/trajectory"));
    let (mut decays, mut shadows) = (Vec::new(), Vec::new());
    for step in 0..trajectory.dims()[0] {
        var.set(&trajectory.get(step).expect("row")).expect("set");
        decays.push(ema.update().expect("update").expect("every step counts"));
        shadows.push(ema.shadow()["p"].clone());
    }
    let bound = |kind: &str| number(&case["tolerance"][kind]);
    for key in expected(case) {
        let want = suite.tensor(case, &key);
        match key.rsplit('/').next() {
            Some("decay") => report.slice(
                &name,
                &key,
                &decays,
                &values(want),
                Tolerance {
                    atol: 0.0,
                    rtol: bound("decay_rtol"),
                },
            ),
            Some("shadow") => {
                let got = Tensor::stack(&shadows, 0).expect("stack");
                report.tensor(
                    &name,
                    &key,
                    &got,
                    want,
                    Tolerance {
                        atol: bound("atol"),
                        rtol: bound("rtol"),
                    },
                );
            }
            other => report.fail(
                &name,
                &key,
                format_args!("this test does not know {other:?}"),
            ),
        }
    }
}

pub(crate) fn schedule(suite: &Suite, case: &Value, report: &mut Report) {
    let name = text(&case["name"]);
    let schedule = named_schedule(&name, &case["config"]);
    let base = case["config"]
        .get("max_lr")
        .map_or_else(|| number(&case["config"]["base_lr"]), number);
    let tol = Tolerance {
        atol: number(&case["tolerance"]["atol"]),
        rtol: number(&case["tolerance"]["rtol"]),
    };
    for key in expected(case) {
        let want = values(suite.tensor(case, &key));
        let got: Vec<f64> = (0..want.len() as u64)
            .map(|i| base * schedule.factor_for(i, base))
            .collect();
        report.slice(&name, &key, &got, &want, tol);
    }
}

/// The schedule that a case describes. Every field of the description must be used.
fn named_schedule(name: &str, config: &Value) -> Box<dyn LrSchedule> {
    let mut fields = config.as_object().expect("config").clone();
    fields.remove("base_lr");
    let base = number(&config["base_lr"]);
    let kind = text(&fields.remove("type").expect("type"));
    let mut take = |key: &str| fields.remove(key).filter(|v| !v.is_null());
    let warmup = take("warmup").map_or(0, |v| number(&v) as u64);
    let total = take("total").map_or(0, |v| number(&v) as u64);
    let after = total.saturating_sub(warmup);
    let mut amount = |key: &str, default: f64| take(key).map_or(default, |v| number(&v));
    // An ordinary warm-up stands before every body but those that return on their own.
    let body: Box<dyn LrSchedule> = match kind.as_str() {
        "constant" | "constant_with_warmup" => Box::new(Constant),
        "linear" => Box::new(Linear { total: after }),
        "cosine" => Box::new(Cosine {
            total: after,
            waves: amount("num_cycles", 0.5),
            min: 0.0,
            hold: false,
        }),
        "cosine_with_restarts" => Box::new(CosineRestarts {
            total: after,
            cycles: amount("num_cycles", 1.0),
        }),
        "polynomial" => Box::new(Polynomial {
            total: after,
            power: amount("power", 1.0),
            end_lr: amount("lr_end", 1e-7),
            reference_lr: base,
        }),
        "inverse_sqrt" => {
            let default = if warmup > 0 { warmup as f64 } else { 10_000.0 };
            Box::new(InverseSqrt {
                timescale: amount("timescale", default),
            })
        }
        "cosine_with_min_lr" => {
            let (waves, min) = (amount("num_cycles", 0.5), amount("min_lr_rate", f64::NAN));
            Box::new(Cosine {
                total: after,
                waves,
                min,
                hold: false,
            })
        }
        "cosine_warmup_with_min_lr" => {
            let start = take("warmup_lr_rate").map(|v| number(&v));
            let mut amount = |key: &str, default: f64| take(key).map_or(default, |v| number(&v));
            let (waves, min) = (amount("num_cycles", 0.5), amount("min_lr_rate", f64::NAN));
            let body = Advance {
                by: 1,
                body: Cosine {
                    total: after,
                    waves,
                    min,
                    hold: false,
                },
            };
            assert!(
                fields.is_empty(),
                "{name}: this test does not know {fields:?}"
            );
            return Box::new(WarmupFromFirst {
                steps: warmup,
                start,
                body,
            });
        }
        "warmup_stable_decay" => {
            let (stable, decay) = (amount("stable", 0.0) as u64, amount("decay", 0.0) as u64);
            let (min, waves) = (amount("min_lr_ratio", 0.0), amount("num_cycles", 0.5));
            let mut shape = |key: &str| {
                take(key).map_or(RampShape::Linear, |v| text(&v).parse().expect("shape"))
            };
            let (warmup_shape, decay_shape) = (shape("warmup_type"), shape("decay_type"));
            assert!(
                fields.is_empty(),
                "{name}: this test does not know {fields:?}"
            );
            return Box::new(WarmupStableDecay {
                warmup,
                stable,
                decay,
                warmup_shape,
                decay_shape,
                min,
                waves,
            });
        }
        "piecewise_constant" => Box::new(
            text(&take("step_rules").expect("rules"))
                .parse::<Piecewise>()
                .expect("rules"),
        ),
        "rex" => {
            let (d, min) = (amount("d", f64::NAN), amount("min_factor", 0.0));
            let rex = Rex { total: after, d };
            // The floor lies under the body, not under the warm-up.
            Box::new(Floor { min, body: rex })
        }
        "OneCycleLR" => Box::new(OneCycle {
            max_lr: None,
            rise: {
                drop(take("max_lr"));
                take("pct_start").map_or(0.3, |v| number(&v))
            },
            start_divisor: take("div_factor").map_or(25.0, |v| number(&v)),
            end_divisor: take("final_div_factor").map_or(1e4, |v| number(&v)),
            three_phases: take("three_phase") == Some(Value::Bool(true)),
            linear: match text(&take("anneal").expect("anneal")).as_str() {
                "cos" => false,
                "linear" => true,
                other => panic!("{name}: this test does not know the strategy {other}"),
            },
            ..OneCycle::new(total)
        }),
        "CosineAnnealingLR" => Box::new(CosineAnnealing {
            half_period: amount("T_max", 0.0) as u64,
            min_lr: amount("eta_min", 0.0),
        }),
        "CosineAnnealingWarmRestarts" => Box::new(WarmRestarts {
            first: amount("T_0", 0.0) as u64,
            growth: amount("T_mult", 1.0) as u64,
            min_lr: amount("eta_min", 0.0),
        }),
        "onetrainer_linear"
        | "onetrainer_cosine"
        | "onetrainer_cosine_with_restarts"
        | "onetrainer_cosine_with_hard_restarts" => {
            let (min, cycles) = (amount("min_factor", 0.0), amount("num_cycles", 1.0));
            let body: Box<dyn LrSchedule> = match kind.as_str() {
                "onetrainer_linear" => Box::new(Linear { total: after }),
                "onetrainer_cosine" => Box::new(Cosine {
                    hold: false,
                    ..Cosine::new(after)
                }),
                "onetrainer_cosine_with_restarts" => Box::new(Hold {
                    last: after - 1,
                    body: Cosine {
                        total: after,
                        waves: cycles,
                        min: 0.0,
                        hold: false,
                    },
                }),
                _ => Box::new(Hold {
                    last: after - 1,
                    body: CosineRestarts {
                        total: after,
                        cycles,
                    },
                }),
            };
            Box::new(Floor { min, body })
        }
        other => panic!("{name}: this test does not know the schedule {other}"),
    };
    assert!(
        fields.is_empty(),
        "{name}: this test does not know {fields:?}"
    );
    if warmup > 0 {
        Box::new(Warmup {
            steps: warmup,
            body,
        })
    } else {
        body
    }
}
