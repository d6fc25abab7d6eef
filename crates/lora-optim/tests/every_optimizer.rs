//! What every optimizer promises, for each line of the table in `common`.

// A helper that fails is a failed test.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::DType;
use common::{Problem, all, build, run};
use lora_optim::{Error, HalfPrecision, OnChange, OptimizerState, StepOptions, WeightChange};

#[test]
fn a_simple_problem_is_solved() {
    for (name, options, steps) in all() {
        let problem = Problem::new(DType::F32, false);
        let before = problem.distance();
        let mut optimizer = build(name, &options, problem.groups());
        run(&problem, &mut *optimizer, 0, steps);
        optimizer.set_training(false).unwrap();
        let after = problem.distance();
        assert!(
            after < 0.1 * before,
            "{name} {options}: {before} -> {after}"
        );
    }
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_bit_for_bit() {
    let folder = std::env::temp_dir().join(format!("lora-optim-resume-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for (i, (name, options, _)) in all().into_iter().enumerate() {
        let whole = Problem::new(DType::F32, true);
        run(&whole, &mut *build(name, &options, whole.groups()), 0, 12);

        // A different step each time, steps with a missing gradient among them.
        let stop = 1 + (i * 7) % 10;
        let first = Problem::new(DType::F32, true);
        let mut optimizer = build(name, &options, first.groups());
        run(&first, &mut *optimizer, 0, stop);
        let file = folder.join(format!("{i}.safetensors"));
        optimizer.state().unwrap().save(&file).unwrap();

        let second = Problem::new(DType::F32, true);
        let mut optimizer = build(name, &options, second.groups());
        optimizer
            .load_state(&OptimizerState::load(&file).unwrap(), OnChange::Refuse)
            .unwrap();
        assert_eq!(optimizer.steps(), stop as u64, "{name}");
        run(&second, &mut *optimizer, stop, 12);
        assert!(
            second.bits() == whole.bits(),
            "{name} {options}: resumed after step {stop}"
        );
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for (name, options, _) in all() {
        let results = [1, 2, 3, 7].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let problem = Problem::new(DType::F32, true);
            let mut optimizer = build(name, &options, problem.groups());
            pool.install(|| run(&problem, &mut *optimizer, 0, 6));
            problem.bits()
        });
        assert!(results.iter().all(|r| *r == results[0]), "{name} {options}");
    }
}

#[test]
fn evaluating_in_between_changes_no_bit() {
    for (name, options, _) in all() {
        let results = [false, true].map(|evaluate| {
            let problem = Problem::new(DType::F32, false);
            let mut optimizer = build(name, &options, problem.groups());
            for step in 0..8 {
                run(&problem, &mut *optimizer, step, step + 1);
                if evaluate {
                    optimizer.set_training(false).unwrap();
                    optimizer.set_training(false).unwrap();
                    optimizer.set_training(true).unwrap();
                }
            }
            problem.bits()
        });
        assert!(results[0] == results[1], "{name} {options}");
    }
}

#[test]
fn clipping_in_the_step_equals_clipping_before_it() {
    for (name, options, _) in all() {
        let inside = Problem::new(DType::F32, false);
        let mut optimizer = build(name, &options, inside.groups());
        optimizer
            .set_step_options(StepOptions {
                max_grad_norm: 0.5,
                ..Default::default()
            })
            .unwrap();
        let before = Problem::new(DType::F32, false);
        let mut other = build(name, &options, before.groups());
        for step in 0..5 {
            let report = optimizer.step(&inside.gradients(step)).unwrap();
            let mut grads = before.gradients(step);
            let norm = lora_optim::clip_grad_norm(grads.values_mut(), 0.5).unwrap();
            other.step(&grads).unwrap();
            assert!(
                (report.grad_norm.unwrap() - norm).abs() < 1e-5 * norm,
                "{name}: norm"
            );
            assert!(report.clip < 1.0, "{name}: nothing was clipped");
        }
        for (name_of, var) in &inside.vars {
            let difference = (var.as_tensor() - before.vars[name_of].as_tensor())
                .unwrap()
                .abs()
                .unwrap();
            let worst = difference
                .flatten_all()
                .unwrap()
                .max(0)
                .unwrap()
                .to_scalar::<f32>()
                .unwrap();
            // One rounding of the gradient; Lion may take the other sign of a value near 0.
            let allowed = if name.starts_with("Lion") { 0.21 } else { 2e-4 };
            assert!(
                worst <= allowed,
                "{name} {options}: {name_of} differs by {worst}"
            );
        }
    }
}

#[test]
fn a_missing_gradient_leaves_the_parameter_alone() {
    for (name, options, _) in all() {
        let problem = Problem::new(DType::F32, false);
        let mut optimizer = build(name, &options, problem.groups());
        run(&problem, &mut *optimizer, 0, 3);
        let state = optimizer.state().unwrap();
        let mut grads = problem.gradients(3);
        grads.remove("b");
        optimizer.step(&grads).unwrap();
        for (key, after) in &optimizer.state().unwrap().tensors {
            if [".b", ".b."]
                .iter()
                .any(|p| key.ends_with(p) || (*p == ".b." && key.contains(p)))
            {
                let same = state.tensors[key]
                    .to_dtype(DType::F64)
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f64>()
                    .unwrap()
                    == after
                        .to_dtype(DType::F64)
                        .unwrap()
                        .flatten_all()
                        .unwrap()
                        .to_vec1::<f64>()
                        .unwrap();
                assert!(same, "{name} {options}: {key} changed");
            }
        }
    }
}

#[test]
fn a_non_finite_gradient_skips_the_step_and_keeps_every_state() {
    for (name, options, _) in all() {
        let problem = Problem::new(DType::F32, false);
        let mut optimizer = build(name, &options, problem.groups());
        run(&problem, &mut *optimizer, 0, 2);
        let before = problem.bits();
        let mut grads = problem.gradients(2);
        let bad = (&grads["b"] / 0.0).unwrap();
        grads.insert("b".into(), bad);
        let report = optimizer.step(&grads).unwrap();
        assert!(
            !report.applied && report.non_finite.as_deref() == Some("b"),
            "{name}: {report:?}"
        );
        assert!(problem.bits() == before && optimizer.steps() == 2, "{name}");

        let strict = StepOptions {
            max_skips: 2,
            ..Default::default()
        };
        optimizer.set_step_options(strict).unwrap();
        let error = optimizer.step(&grads).unwrap_err();
        assert!(
            matches!(error, Error::NonFinite { count: 2, .. }),
            "{name}: {error}"
        );
    }
}

#[test]
fn half_precision_parameters_train_through_f32_masters() {
    for dtype in [DType::BF16, DType::F16] {
        for (name, options, steps) in all() {
            let problem = Problem::new(dtype, false);
            let before = problem.distance();
            let mut optimizer = build(name, &options, problem.groups());
            run(&problem, &mut *optimizer, 0, steps);
            optimizer.set_training(false).unwrap();
            assert!(
                problem.distance() < 0.1 * before,
                "{name} {options} {dtype:?}: {before} -> {}",
                problem.distance()
            );
            assert!(problem.vars.values().all(|v| v.dtype() == dtype), "{name}");
        }
    }
}

#[test]
fn half_precision_runs_resume_bit_for_bit() {
    for half_precision in [HalfPrecision::Master, HalfPrecision::Stochastic { seed: 5 }] {
        for (name, options, _) in all() {
            let start = || {
                let problem = Problem::new(DType::BF16, false);
                let mut optimizer = build(name, &options, problem.groups());
                optimizer
                    .set_step_options(StepOptions {
                        half_precision,
                        ..Default::default()
                    })
                    .unwrap();
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
            assert!(
                second.bits() == whole.bits(),
                "{name} {options} {half_precision:?}"
            );
        }
    }
}

#[test]
fn a_changed_option_is_listed_and_refused_unless_forced() {
    for (name, options, _) in all() {
        let problem = Problem::new(DType::F32, false);
        let mut optimizer = build(name, &options, problem.groups());
        run(&problem, &mut *optimizer, 0, 2);
        let state = optimizer.state().unwrap();
        let mut changed = build(name, &options, problem.groups());
        changed
            .set_step_options(StepOptions {
                max_grad_norm: 0.25,
                ..Default::default()
            })
            .unwrap();
        let error = changed.load_state(&state, OnChange::Refuse).unwrap_err();
        let Error::OptionsChanged { changes } = error else {
            panic!("{name}: {error}")
        };
        assert_eq!(
            changes[0].to_string(),
            "step.max_grad_norm was 0.0, now 0.25",
            "{name}"
        );
        assert_eq!(
            changed.steps(),
            0,
            "{name}: a refused state changed something"
        );
        assert_eq!(
            changed.load_state(&state, OnChange::UseNew).unwrap(),
            changes,
            "{name}"
        );
        assert_eq!(changed.steps(), 2);
    }
}

#[test]
fn a_state_of_other_parameters_is_refused_even_when_forced() {
    for (name, options, _) in all() {
        let problem = Problem::new(DType::F32, false);
        let state = build(name, &options, problem.groups()).state().unwrap();
        let mut groups = problem.groups();
        groups[1].params.pop();
        let mut other = build(name, &options, groups);
        assert!(
            other.load_state(&state, OnChange::UseNew).is_err(),
            "{name}"
        );
    }
}

#[test]
fn scaling_the_weights_keeps_the_optimizer_running() {
    for (name, options, _) in all() {
        let problem = Problem::new(DType::F32, false);
        let mut optimizer = build(name, &options, problem.groups());
        run(&problem, &mut *optimizer, 0, 5);
        let scaled = problem.vars["b"].affine(0.5, 0.0).unwrap();
        problem.vars["b"].set(&scaled).unwrap();
        optimizer
            .weights_changed(&WeightChange::Scaled {
                name: "b",
                factor: 0.5,
            })
            .unwrap();
        run(&problem, &mut *optimizer, 5, 8);
        optimizer
            .weights_changed(&WeightChange::Replaced { name: "b" })
            .unwrap();
        run(&problem, &mut *optimizer, 8, 10);
        assert!(problem.distance().is_finite(), "{name} {options}");
        assert!(
            optimizer
                .weights_changed(&WeightChange::Replaced { name: "nobody" })
                .is_err()
        );
    }
}

#[test]
fn a_gradient_of_another_shape_is_refused_by_name() {
    for (name, options, _) in all() {
        let problem = Problem::new(DType::F32, false);
        let mut optimizer = build(name, &options, problem.groups());
        let mut grads = problem.gradients(0);
        grads.insert("b".into(), grads["c"].clone());
        let error = optimizer.step(&grads).unwrap_err().to_string();
        assert!(error.contains("gradient of \"b\""), "{name}: {error}");
    }
}
