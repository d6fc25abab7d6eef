//! Promises that hold for any optimizer, step and schedule.

// A helper that fails is a failed test.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::DType;
use common::{Problem, all, build, run};
use lora_optim::kohya::KohyaScheduler;
use lora_optim::schedule::LrSchedule;
use lora_optim::{OnChange, OptimizerState};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn saved_at_any_step_and_read_again_nothing_changes(which in 0usize..1000, stop in 0usize..14) {
        let table = all();
        let (name, options, _) = &table[which % table.len()];
        let whole = Problem::new(DType::F32, false);
        run(&whole, &mut *build(name, options, whole.groups()), 0, 14);

        let parts = Problem::new(DType::F32, false);
        let mut optimizer = build(name, options, parts.groups());
        run(&parts, &mut *optimizer, 0, stop);
        let file = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        optimizer.state().unwrap().save(&file).unwrap();
        let state = OptimizerState::load(&file).unwrap();
        let mut optimizer = build(name, options, parts.groups());
        optimizer.load_state(&state, OnChange::Refuse).unwrap();
        run(&parts, &mut *optimizer, stop, 14);
        prop_assert!(parts.bits() == whole.bits(), "{name} {options}, saved after step {stop}");
    }

    #[test]
    fn schedules_are_continuous_and_within_their_bounds(
        name in prop::sample::select(vec![
            "linear", "cosine", "polynomial", "constant_with_warmup", "inverse_sqrt",
            "cosine_with_min_lr", "warmup_stable_decay", "cosine_with_restarts",
        ]),
        total in 60u64..2000, warmup in 0u64..40, cycles in 1u32..5,
    ) {
        let warmup = match name {
            // They have no body without it, or count from it.
            "inverse_sqrt" | "warmup_stable_decay" => warmup.max(10),
            _ => warmup,
        };
        let scheduler = KohyaScheduler {
            lr_scheduler: name.into(),
            max_train_steps: total,
            lr_warmup_steps: warmup as f64,
            lr_decay_steps: if name == "warmup_stable_decay" { (total / 4) as f64 } else { 0.0 },
            lr_scheduler_num_cycles: if name == "cosine_with_restarts" { f64::from(cycles) } else { 1.0 },
            lr_scheduler_min_lr_ratio: (name.contains("min_lr") || name.contains("stable")).then_some(0.1),
            learning_rate: 1e-4,
            ..KohyaScheduler::default()
        };
        let schedule = scheduler.build().unwrap();
        // No body is steeper than five times a straight line over its length.
        let body = total - warmup;
        let shortest = match name {
            "warmup_stable_decay" => total / 4,
            // Its time scale is the warm-up.
            "inverse_sqrt" => warmup,
            _ => body / u64::from(cycles),
        };
        let steepest = 5.0 / shortest.max(1) as f64;
        let rise = 1.0 / warmup.max(1) as f64;
        let mut jumps = 0;
        for step in 0..total + 20 {
            let (now, next) = (schedule.factor_for(step, 1e-4), schedule.factor_for(step + 1, 1e-4));
            prop_assert!((0.0..=1.0 + 1e-12).contains(&now), "{name} at {step}: {now}");
            let most = if step < warmup { rise.max(steepest) } else { steepest };
            if (next - now).abs() > most + 1e-9 {
                // A restart leaps up from the bottom to the top.
                prop_assert!(now < 0.1 && next > 0.9, "{name} at {step}: {now} -> {next}");
                jumps += 1;
            }
        }
        let restarts = if name == "cosine_with_restarts" { cycles - 1 } else { 0 };
        prop_assert!(jumps <= restarts, "{name}: {jumps} jumps");
    }
}
