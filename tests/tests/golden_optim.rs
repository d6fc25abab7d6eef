//! The optimizers against trajectories of their reference implementations.
//!
//! One test per algorithm runs every case of the index that names it; one more fails when
//! the index names an algorithm that no test knows.

mod optim;

use lora_tests::Report;
use optim::{Suite, text, trajectories, utilities};

macro_rules! golden {
    ($($test:ident => $($algorithm:literal)|+,)*) => {
        $(#[test]
        fn $test() {
            trajectories(&[$($algorithm),+]);
        })*
        const TRAJECTORIES: &[&str] = &[$($($algorithm),+),*];
    };
}

golden! {
    golden_optim_adamw => "AdamW",
    golden_optim_adam => "Adam",
    golden_optim_sgd => "SGD",
    golden_optim_lion => "Lion",
    golden_optim_prodigy => "Prodigy",
    golden_optim_dadapt_adam => "DAdaptAdam",
    golden_optim_dadapt_adam_preprint => "DAdaptAdamPreprint",
    golden_optim_schedule_free => "AdamWScheduleFree" | "RAdamScheduleFree" | "SGDScheduleFree",
    golden_optim_prodigy_plus_schedule_free => "ProdigyPlusScheduleFree",
    golden_optim_adafactor => "Adafactor",
    golden_optim_came => "CAME",
    golden_optim_adamw_8bit => "AdamW8bit",
}

#[test]
fn golden_optim_quantization() {
    utilities::run(utilities::QUANTIZATION, utilities::quantization);
}

#[test]
fn golden_optim_clipping() {
    utilities::run(utilities::CLIPPING, utilities::clipping);
}

#[test]
fn golden_optim_stochastic_rounding() {
    utilities::run(utilities::ROUNDING, utilities::rounding);
}

#[test]
fn golden_optim_ema() {
    utilities::run(utilities::EMA, utilities::ema);
}

#[test]
fn golden_optim_schedules() {
    utilities::run(utilities::SCHEDULE, utilities::schedule);
}

#[test]
fn golden_optim_every_case_has_a_test() {
    let suite = Suite::load();
    let mut report = Report::default();
    for case in suite.cases() {
        let algorithm = text(&case["algorithm"]);
        let known = TRAJECTORIES.contains(&algorithm.as_str())
            || utilities::KNOWN.contains(&algorithm.as_str());
        report.equal(
            &text(&case["name"]),
            &format!("a test knows the algorithm {algorithm:?}"),
            &known,
            &true,
        );
    }
    report.finish();
}
