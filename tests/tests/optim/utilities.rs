//! Cases that are no trajectories: quantization, clipping, rounding, EMA, schedules.

use lora_tests::Report;
use serde_json::Value;

use super::{Suite, text};

pub const QUANTIZATION: &str =
    "blockwise 8-bit quantization, block 256 (the last block is all zeros; unsigned input is |x|)";
pub const CLIPPING: &str = "clip_grad_norm";
pub const ROUNDING: &str = "bf16 = top 16 bits of (f32 bits + r), r uniform in 0..65535";
pub const EMA: &str = "EMA of weights";
pub const SCHEDULE: &str = "lr schedule";
/// All algorithms that this module tests.
pub const KNOWN: [&str; 5] = [QUANTIZATION, CLIPPING, ROUNDING, EMA, SCHEDULE];

/// Runs every case of one algorithm.
pub fn run(algorithm: &str, check: fn(&Suite, &Value, &mut Report)) {
    let suite = Suite::load();
    let mut report = Report::default();
    for case in suite.cases().iter().filter(|c| c["algorithm"] == algorithm) {
        check(&suite, case, &mut report);
    }
    report.finish();
}

pub fn quantization(_suite: &Suite, case: &Value, report: &mut Report) {
    report.fail(&text(&case["name"]), "", "todo");
}
pub fn clipping(_suite: &Suite, case: &Value, report: &mut Report) {
    report.fail(&text(&case["name"]), "", "todo");
}
pub fn rounding(_suite: &Suite, case: &Value, report: &mut Report) {
    report.fail(&text(&case["name"]), "", "todo");
}
pub fn ema(_suite: &Suite, case: &Value, report: &mut Report) {
    report.fail(&text(&case["name"]), "", "todo");
}
pub fn schedule(_suite: &Suite, case: &Value, report: &mut Report) {
    report.fail(&text(&case["name"]), "", "todo");
}
