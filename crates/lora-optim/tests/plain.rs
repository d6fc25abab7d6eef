//! Plain candle operations (what other devices run) against the fused path.

// A helper that fails is a failed test.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::DType;
use common::{Problem, all, build, run};
use lora_optim::{OnChange, OnHost, Optimizer, WeightChange};
use serde_json::{Value, json};

/// Options whose whole-tensor formulas differ from those of the table in `common`.
fn more() -> Vec<(&'static str, Value, usize)> {
    let plus = |mut options: Value| {
        options["d0"] = json!(1e-3);
        ("ProdigyPlusScheduleFree", options, 0)
    };
    vec![
        plus(json!({ "use_focus": true })),
        plus(json!({ "use_grams": true, "factored": false, "weight_decay": 0.01 })),
        plus(json!({ "use_cautious": true })),
        plus(json!({ "use_orthograd": true, "use_bias_correction": true })),
        plus(json!({ "use_schedulefree": false, "use_grams": true, "prodigy_steps": 3 })),
        plus(json!({ "use_schedulefree": false, "use_adopt": true, "eps": null })),
        plus(json!({ "weight_decay": 0.01, "weight_decay_by_lr": false })),
        (
            "Prodigy",
            json!({ "slice_p": 11, "decouple": false, "weight_decay": 1e-3, "safeguard_warmup": true }),
            0,
        ),
        (
            "Adafactor",
            json!({ "weight_decay": 0.01, "warmup_init": true, "beta1": 0.5 }),
            0,
        ),
        ("CAME", json!({ "lr": 0.02, "weight_decay": 0.01 }), 0),
    ]
}

/// 1e-4 of the weights' size (0.5); Prodigy-like rules multiply rounding errors of their
/// estimate, hence 2e-3 there.
fn allowed(name: &str) -> f32 {
    if name.contains("Prodigy") || name.contains("DAdapt") {
        1e-3
    } else {
        5e-5
    }
}

/// Same formulas, other order of rounding: 1e-4 of the weights' size (0.5) after 10 steps;
/// Prodigy-like rules multiply rounding errors of their estimate, hence 2e-3 there.
#[test]
fn the_fused_path_equals_plain_candle_operations() {
    for (name, options, _) in all().into_iter().chain(more()) {
        let fused = Problem::new(DType::F32, true);
        run(&fused, &mut *build(name, &options, fused.groups()), 0, 10);
        let plain = Problem::new(DType::F32, true);
        let mut optimizer = build(name, &options, plain.groups());
        optimizer.use_plain_operations().unwrap();
        run(&plain, &mut *optimizer, 0, 10);
        let worst = plain.worst_difference(&fused);
        assert!(worst <= allowed(name), "{name} {options}: {worst}");
    }
}

/// Plain operations keep their state elsewhere, but save and restore the same tensors; a
/// state saved by the fused path goes on with plain operations too.
#[test]
fn a_run_of_plain_operations_resumes_bit_for_bit() {
    for (name, options, _) in all().into_iter().chain(more()) {
        let start = || {
            let problem = Problem::new(DType::F32, true);
            let mut optimizer = build(name, &options, problem.groups());
            optimizer.use_plain_operations().unwrap();
            (problem, optimizer)
        };
        let (whole, mut optimizer) = start();
        run(&whole, &mut *optimizer, 0, 9);
        let (first, mut optimizer) = start();
        run(&first, &mut *optimizer, 0, 4);
        let state = optimizer.state().unwrap();
        let (second, mut optimizer) = start();
        optimizer.load_state(&state, OnChange::Refuse).unwrap();
        run(&second, &mut *optimizer, 4, 9);
        assert!(second.bits() == whole.bits(), "{name} {options}");

        let fused = Problem::new(DType::F32, true);
        let mut other = build(name, &options, fused.groups());
        other.load_state(&state, OnChange::Refuse).unwrap();
        run(&fused, &mut *other, 4, 6);
        let state = other.state().unwrap();
        let (third, mut optimizer) = start();
        optimizer.load_state(&state, OnChange::Refuse).unwrap();
        run(&third, &mut *optimizer, 6, 9);
        let worst = third.worst_difference(&whole);
        assert!(
            worst <= allowed(name),
            "{name} {options}: differs by {worst}"
        );
    }
}

/// Scales a parameter behind the optimizer's back, and says so.
fn halve(problem: &Problem, optimizer: &mut dyn Optimizer) {
    let scaled = problem.vars["b"].affine(0.5, 0.0).unwrap();
    problem.vars["b"].set(&scaled).unwrap();
    let change = WeightChange::Scaled {
        name: "b",
        factor: 0.5,
    };
    optimizer.weights_changed(&change).unwrap();
}

/// An optimizer that keeps copies of the parameters, as for a GPU.
#[test]
fn on_the_host_every_bit_is_the_same() {
    for (name, options, _) in all().into_iter().chain(more()) {
        let [direct, copied] = [false, true].map(|copied| {
            let problem = Problem::new(DType::F32, true);
            let start = || -> Box<dyn Optimizer> {
                match copied {
                    true => {
                        let inner = |groups| Ok(build(name, &options, groups));
                        Box::new(OnHost::new(problem.groups(), inner).unwrap())
                    }
                    false => build(name, &options, problem.groups()),
                }
            };
            let mut optimizer = start();
            run(&problem, &mut *optimizer, 0, 4);
            optimizer.set_training(false).unwrap();
            let judged = problem.bits();
            optimizer.set_training(true).unwrap();
            halve(&problem, &mut *optimizer);
            run(&problem, &mut *optimizer, 4, 6);
            let state = optimizer.state().unwrap();
            let mut optimizer = start();
            optimizer.load_state(&state, OnChange::Refuse).unwrap();
            run(&problem, &mut *optimizer, 6, 8);
            (judged, problem.bits())
        });
        assert!(direct == copied, "{name} {options}");
    }
}

/// Scaled and replaced weights, evaluation in between and half precision, with both paths.
#[test]
fn plain_operations_follow_changes_as_the_fused_path_does() {
    for dtype in [DType::F32, DType::BF16] {
        for (name, options, _) in all().into_iter().chain(more()) {
            let [fused, plain] = [false, true].map(|plain| {
                let problem = Problem::new(dtype, false);
                let mut optimizer = build(name, &options, problem.groups());
                if plain {
                    optimizer.use_plain_operations().unwrap();
                }
                run(&problem, &mut *optimizer, 0, 4);
                optimizer.set_training(false).unwrap();
                optimizer.set_training(true).unwrap();
                halve(&problem, &mut *optimizer);
                run(&problem, &mut *optimizer, 4, 6);
                let change = WeightChange::Replaced { name: "b" };
                optimizer.weights_changed(&change).unwrap();
                run(&problem, &mut *optimizer, 6, 8);
                assert!(optimizer.report().unwrap().len() == 2);
                problem
            });
            // In bfloat16 a rounding may fall to the other neighbour: 2^-8 of at most 0.5.
            let allowed = match dtype {
                DType::BF16 => 2e-3,
                _ => allowed(name),
            };
            let worst = plain.worst_difference(&fused);
            assert!(worst <= allowed, "{name} {options} {dtype:?}: {worst}");
        }
    }
}
