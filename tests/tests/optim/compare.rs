//! Comparing a trajectory with the golden tensors of its case.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use lora_optim::OptimizerState;
use lora_tests::{Report, Tolerance, values};
use serde_json::Value;

use super::{Suite, Trace, expected, number, text};

/// A case's tolerance for parameters, `factor` times.
pub(crate) fn tolerance(case: &Value, against: &str, factor: f64) -> Tolerance {
    let bound = |kind: &str| number(&case["tolerance"][format!("param_{kind}_{against}")]) * factor;
    Tolerance {
        atol: bound("atol"),
        rtol: bound("rtol"),
    }
}

/// Cases whose reference keeps statistics in bfloat16: there one bit of a sum can grow to
/// 2^-8 in a step, so their bounds, taken from one disturbed run of the reference, are
/// widened to twice what disturbed runs of our own show.
pub(crate) fn has_bf16_state(case: &Value) -> bool {
    case["tolerance"].get("scalar_rtol_vs_f32").is_some()
}

/// Largest difference between a trajectory and disturbed ones.
fn sensitivity(
    values_of: impl Fn(&Trace) -> Vec<f64>,
    trace: &Trace,
    jittered: &[Trace],
    relative: bool,
) -> f64 {
    let own = values_of(trace);
    let difference =
        |(a, b): (f64, &f64)| (a - b).abs() / if relative { b.abs().max(1e-300) } else { 1.0 };
    jittered
        .iter()
        .flat_map(|other| values_of(other).into_iter().zip(&own).map(difference))
        .fold(0.0, f64::max)
}

/// Compares every expected tensor of a case.
pub(crate) fn compare(
    suite: &Suite,
    case: &Value,
    trace: &Trace,
    jittered: &[Trace],
    report: &mut Report,
) {
    let name = text(&case["name"]);
    let exact = case["tolerance"].get("param_atol_vs_f64").is_some();
    for key in expected(case) {
        let want = suite.tensor(case, &key);
        let rest = key.strip_prefix(&format!("{name}/")).expect("prefix");
        let (precision, what) = rest.split_once('/').expect("precision");
        // A f32 run may differ from another f32 run by twice what it may from exact numbers.
        let (against, factor) = match precision {
            "f64" => ("vs_f64", 1.0),
            "f32" if exact => ("vs_f64", 2.0),
            "f32" => ("vs_f32", 1.0),
            other => panic!("{name}: this test does not know the precision {other}"),
        };
        let mut tol = tolerance(case, against, factor);
        match what.split('/').next() {
            Some("param" | "z" | "eval") => match trace.rows.get(what) {
                Some(rows) => {
                    let all = |t: &Trace| t.rows[what].iter().flat_map(values).collect();
                    tol.atol = tol.atol.max(2.0 * sensitivity(all, trace, jittered, false));
                    let rows = Tensor::stack(rows, 0).expect("stack");
                    if case["algorithm"] == "AdamW8bit" {
                        nearly_all(case, rest, &rows, want, tol, report);
                    } else {
                        report.tensor(&name, rest, &rows, want, tol);
                    }
                }
                None => report.fail(&name, rest, "not produced"),
            },
            Some("scalar" | "grad_norm") => {
                let relative = case["tolerance"][format!("scalar_rtol_{against}")]
                    .as_f64()
                    .unwrap_or(5e-6)
                    * factor;
                let own = matches!(what, "scalar/d" | "scalar/d_max");
                let series = |t: &Trace| t.scalars.get(what).cloned().unwrap_or_default();
                let moved = 2.0 * sensitivity(series, trace, jittered, own);
                let largest = series(trace).iter().fold(1e-300f64, |a, x| a.max(x.abs()));
                let mut relative = relative.max(if own { moved } else { moved / largest });
                if what == "scalar/d_denom" && has_bf16_state(case) {
                    // The sum itself is rounded to bfloat16.
                    relative = relative.max(1.0 / 256.0);
                }
                scalars(&name, rest, what, trace, want, relative, report);
            }
            Some(kind) if kind == "state" || kind.starts_with("state_step") => {
                let step = match kind.strip_prefix("state_step") {
                    Some(step) => step.parse().expect("step"),
                    None => number(&case["state_after_step"]) as usize,
                };
                state(&name, rest, &trace.states[step - 1], want, case, report);
            }
            other => report.fail(
                &name,
                rest,
                format_args!("this test does not know the kind {other:?}"),
            ),
        }
    }
}

/// d relative to itself, the other scalars relative to the largest of their series.
fn scalars(
    name: &str,
    rest: &str,
    what: &str,
    trace: &Trace,
    want: &Tensor,
    relative: f64,
    report: &mut Report,
) {
    let want = values(want);
    let mut got = trace.scalars.get(what).cloned().unwrap_or_default();
    // A scalar that the reference has not set in a step is NaN there.
    for (g, w) in got.iter_mut().zip(&want) {
        if w.is_nan() {
            *g = f64::NAN;
        }
    }
    let largest = want
        .iter()
        .filter(|x| x.is_finite())
        .fold(0.0f64, |a, x| a.max(x.abs()));
    let tol = match what {
        "scalar/d" | "scalar/d_max" => Tolerance {
            atol: 0.0,
            rtol: relative,
        },
        _ => Tolerance {
            atol: relative * largest,
            rtol: 0.0,
        },
    };
    report.slice(name, rest, &got, &want, tol);
}

/// 8-bit codes may fall on the other side of a border: 99.5 % of the values must be
/// within the tolerance, the others within a tenth of the learning rate.
fn nearly_all(
    case: &Value,
    rest: &str,
    got: &Tensor,
    want: &Tensor,
    tol: Tolerance,
    report: &mut Report,
) {
    let name = text(&case["name"]);
    let loose = Tolerance {
        atol: 0.1 * number(&case["config"]["lr"]),
        rtol: tol.rtol,
    };
    report.tensor(&name, rest, got, want, loose);
    let (got, want) = (values(got), values(want));
    let off = got
        .iter()
        .zip(&want)
        .filter(|(g, w)| (*g - *w).abs() > tol.atol + tol.rtol * w.abs())
        .count();
    let many = off * 200 > want.len();
    report.equal(
        &name,
        &format!(
            "{rest}: {off} of {} values off: more than 0.5 %",
            want.len()
        ),
        &many,
        &false,
    );
}

/// One tensor of the optimizer state, `PRECISION/STATE/PARAM/KIND` in the reference's names.
fn state(
    name: &str,
    rest: &str,
    saved: &OptimizerState,
    want: &Tensor,
    case: &Value,
    report: &mut Report,
) {
    let mut parts = rest.rsplit('/');
    let (kind, param) = (parts.next().expect("kind"), parts.next().expect("param"));
    let eight_bit = BTreeMap::from([
        ("q1", "state1"),
        ("a1", "absmax1"),
        ("q2", "state2"),
        ("a2", "absmax2"),
        ("m", "exp_avg"),
        ("v", "exp_avg_sq"),
    ]);
    let key = match kind {
        "step" => format!("step.{param}"),
        // A display value of Adafactor and CAME that nothing reads.
        "RMS" => return,
        _ => format!("state.{param}.{}", eight_bit.get(kind).unwrap_or(&kind)),
    };
    let Some(got) = saved.tensors.get(&key) else {
        report.fail(name, rest, format_args!("no {key} in the saved state"));
        return;
    };
    let (values_got, want) = (values(got), values(want));
    if got.dtype() == DType::U8 {
        let distances = values_got.iter().zip(&want).map(|(g, w)| (g - w).abs());
        let off = distances.clone().filter(|d| *d > 0.0).count();
        report.equal(
            name,
            &format!("{rest}: codes"),
            &values_got.len(),
            &want.len(),
        );
        report.equal(
            name,
            &format!("{rest}: a code off by more than 1"),
            &distances.clone().any(|d| d > 1.0),
            &false,
        );
        report.equal(
            name,
            &format!("{rest}: {off} codes off: more than 0.1 %"),
            &(off * 1000 > want.len()),
            &false,
        );
        return;
    }
    // The index gives no bound for states. They are averages of what moves the
    // parameters; allow the relative error allowed for scalars, at least 1e-4 of the
    // largest value, and two bf16 units where the reference keeps bfloat16.
    let largest = want.iter().fold(0.0f64, |a, x| a.max(x.abs()));
    let scalar = |key: &str| case["tolerance"][key].as_f64().unwrap_or(0.0);
    let mut relative = scalar("scalar_rtol_vs_f64")
        .max(scalar("scalar_rtol_vs_f32"))
        .max(5e-5)
        * 2.0;
    if got.dtype() == DType::BF16 {
        relative = relative.max(2.0 / 256.0);
    }
    report.slice(
        name,
        rest,
        &values_got,
        &want,
        Tolerance {
            atol: relative * largest,
            rtol: 0.0,
        },
    );
}
