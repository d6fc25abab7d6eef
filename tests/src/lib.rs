//! Reads the golden data and compares numbers with it.
//!
//! The data lies in `tests/golden/TOPIC/`, each topic with an `index.json`. The
//! environment variable `GOLDEN_DIR` names another folder of the same layout.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

/// The folder of all golden data: `GOLDEN_DIR` or the one in this package.
pub fn golden_dir() -> PathBuf {
    match std::env::var_os("GOLDEN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden"),
    }
}

/// Path of one golden file, for example `("sd15", "unet.safetensors")`.
pub fn golden_path(topic: &str, file: &str) -> PathBuf {
    golden_dir().join(topic).join(file)
}

/// A JSON table that is the same for every golden set, read from this package.
///
/// # Panics
/// When it cannot be read or is not JSON.
pub fn bundled_json(topic: &str, file: &str) -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(topic)
        .join(file);
    read_json(&path)
}

/// A golden JSON file.
///
/// # Panics
/// When it cannot be read or is not JSON: the test cannot go on.
pub fn golden_json(topic: &str, file: &str) -> Value {
    read_json(&golden_path(topic, file))
}

/// A golden JSON file, from this package where the golden folder lacks it.
///
/// # Panics
/// As [`golden_json`].
pub fn golden_or_bundled_json(topic: &str, file: &str) -> Value {
    if golden_path(topic, file).exists() {
        golden_json(topic, file)
    } else {
        bundled_json(topic, file)
    }
}

fn read_json(path: &std::path::Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All tensors of a golden safetensors file, by name.
///
/// # Panics
/// When it cannot be read.
pub fn golden_tensors(topic: &str, file: &str) -> BTreeMap<String, Tensor> {
    let path = golden_path(topic, file);
    candle_core::safetensors::load(&path, &Device::Cpu)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        .into_iter()
        .collect()
}

/// The values of a tensor as f64, row-major.
///
/// # Panics
/// When candle cannot convert the dtype.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.flatten_all().expect("flatten");
    match flat.dtype() {
        DType::F64 => flat.to_vec1::<f64>().expect("f64 values"),
        _ => flat
            .to_dtype(DType::F64)
            .expect("as f64")
            .to_vec1::<f64>()
            .expect("f64 values"),
    }
}

/// Allowed difference: `|got - want| <= atol + rtol * |want|`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tolerance {
    /// Absolute part.
    pub atol: f64,
    /// Part relative to the wanted value.
    pub rtol: f64,
}

/// Collects failures so that one run names every case that is off.
#[derive(Debug, Default)]
pub struct Report {
    checked: usize,
    failures: Vec<String>,
}

impl Report {
    /// Compares a tensor with the wanted one: shape and every element.
    pub fn tensor(&mut self, case: &str, name: &str, got: &Tensor, want: &Tensor, tol: Tolerance) {
        if got.dims() != want.dims() {
            self.fail(
                case,
                name,
                format_args!("shape {:?}, wanted {:?}", got.dims(), want.dims()),
            );
            return;
        }
        self.slice(case, name, &values(got), &values(want), tol);
    }

    /// Compares two rows of numbers.
    pub fn slice(&mut self, case: &str, name: &str, got: &[f64], want: &[f64], tol: Tolerance) {
        self.checked += 1;
        if got.len() != want.len() {
            self.fail(
                case,
                name,
                format_args!("{} values, wanted {}", got.len(), want.len()),
            );
            return;
        }
        let mut worst = (0.0f64, 0usize);
        let mut failed = 0usize;
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            if g.is_nan() && w.is_nan() || g == w {
                continue;
            }
            let error = (g - w).abs();
            let within = error <= tol.atol + tol.rtol * w.abs();
            if !within {
                failed += 1;
            }
            if error > worst.0 || error.is_nan() {
                worst = (error, i);
            }
        }
        if failed > 0 {
            let (error, i) = worst;
            self.fail(
                case,
                name,
                format_args!(
                    "{failed} of {} values off, largest error {error:.3e} at {i} (got {:.9e}, wanted {:.9e}, atol {:.1e}, rtol {:.1e})",
                    got.len(), got[i], want[i], tol.atol, tol.rtol
                ),
            );
        }
    }

    /// Compares two values that must be the same.
    pub fn equal<T: PartialEq + std::fmt::Debug>(
        &mut self,
        case: &str,
        name: &str,
        got: &T,
        want: &T,
    ) {
        self.checked += 1;
        if got != want {
            self.fail(case, name, format_args!("got {got:?}, wanted {want:?}"));
        }
    }

    /// Records a failure.
    pub fn fail(&mut self, case: &str, name: &str, what: impl Display) {
        self.failures.push(format!("{case}: {name}: {what}"));
    }

    /// Ends the test: panics with every failure, or when nothing was compared.
    ///
    /// # Panics
    /// When a comparison failed or none was made.
    pub fn finish(self) {
        assert!(
            self.failures.is_empty(),
            "{} of {} comparisons failed:\n{}",
            self.failures.len(),
            self.checked,
            self.failures
                .iter()
                .take(40)
                .cloned()
                .collect::<Vec<_>>()
                .join("\n")
        );
        assert!(self.checked > 0, "no golden case was compared");
    }
}
