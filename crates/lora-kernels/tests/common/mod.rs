//! What the tests share.

#![allow(dead_code, clippy::unwrap_used)]

use candle_core::{DType, Device, Result, Tensor, Var};

/// Uniform values between -1 and 1.
pub(crate) fn noise(dims: &[usize], seed: u32) -> Tensor {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let values: Vec<f32> = (0..dims.iter().product())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

/// The same, all of them exact in bf16.
pub(crate) fn rounded(dims: &[usize], seed: u32) -> Tensor {
    let narrow = noise(dims, seed).to_dtype(DType::BF16).unwrap();
    narrow.to_dtype(DType::F32).unwrap()
}

pub(crate) fn var(dims: &[usize], seed: u32) -> Var {
    Var::from_tensor(&noise(dims, seed)).unwrap()
}

pub(crate) fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn close(what: &str, a: &Tensor, b: &Tensor) {
    assert_eq!(a.dims(), b.dims(), "{what}");
    let (a, b) = (flat(a), flat(b));
    let scale = b.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
    for (a, b) in a.iter().zip(&b) {
        assert!((a - b).abs() <= 2e-5 * scale, "{what}: {a} {b}");
    }
}

/// Compares values and gradients of two functions of the same variables.
pub(crate) fn compare(
    what: &str,
    vars: &[Var],
    fast: &dyn Fn() -> Result<Tensor>,
    slow: &dyn Fn() -> Result<Tensor>,
) {
    let (a, b) = (fast().unwrap(), slow().unwrap());
    close(what, &a, &b);
    let weight = rounded(a.dims(), 99);
    let grads = |y: Tensor| {
        (y * &weight)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap()
    };
    let (ga, gb) = (grads(a), grads(b));
    for (i, v) in vars.iter().enumerate() {
        let name = format!("{what}, gradient {i}");
        match (ga.get(v), gb.get(v)) {
            (Some(a), Some(b)) => close(&name, a, b),
            (a, b) => panic!("{name}: {} {}", a.is_some(), b.is_some()),
        }
    }
}

/// Runs the other tests of this program again on another path: `generic`, without the
/// processor's own instructions, or `composed`, as on a GPU. (The plain path is what they
/// compare with.)
pub(crate) fn again_with(path: &str) {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--skip",
            "other_path",
            "--skip",
            "kernels_keep_their_digits",
        ])
        .env("LORA_KERNELS", path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "LORA_KERNELS={path}\n{text}");
}
