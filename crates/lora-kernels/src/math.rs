//! Elementary functions without branches, so that loops over them vectorize, and
//! the choice of vector width at run time.

use pulp::Arch;

use crate::{Path, path};

/// Runs `body` compiled for the widest vectors of this processor. Everything called
/// inside must be `#[inline(always)]` to take part.
pub(crate) fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    match path() {
        Path::Native | Path::Vectors => Arch::new().dispatch(body),
        Path::Generic | Path::Plain | Path::Composed => body(),
    }
}

/// `e^x`, relative error below 2e-7; 0 below -87, finite above 88.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding this rounds to a whole number and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    let exponent = shifted
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(127)
        << 23;
    let value = p * f32::from_bits(exponent);
    if x < -87.0 { 0.0 } else { value }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Distribution function of the standard normal: `(1 + erf(x / sqrt 2)) / 2`, absolute
/// error below 2e-7 (Abramowitz and Stegun 7.1.26).
#[inline(always)]
pub(crate) fn normal_cdf(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let p = 1.061_405_4;
    let p = p * t - 1.453_152_1;
    let p = p * t + 1.421_413_8;
    let p = p * t - 0.284_496_72;
    let p = p * t + 0.254_829_6;
    let tail = 0.5 * p * t * exp(-z * z);
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// Density of the standard normal.
#[inline(always)]
pub(crate) fn normal_pdf(x: f32) -> f32 {
    const FACTOR: f32 = 0.398_942_3;
    FACTOR * exp(-0.5 * x * x)
}

/// Vector lanes that sums are spread over.
pub(crate) const LANES: usize = 16;

/// Sum of `f` over two rows of equal length, in a fixed order: 16 lanes in f32 over
/// short stretches, stretches in f64.
#[inline(always)]
pub(crate) fn sum2(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f64 {
    let mut total = 0f64;
    for (a, b) in a.chunks(1024).zip(b.chunks(1024)) {
        let mut lanes = [0f32; LANES];
        let (mut wide_a, mut wide_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        for (x, y) in (&mut wide_a).zip(&mut wide_b) {
            for i in 0..LANES {
                lanes[i] += f(x[i], y[i]);
            }
        }
        let rest: f32 = wide_a
            .remainder()
            .iter()
            .zip(wide_b.remainder())
            .map(|(x, y)| f(*x, *y))
            .sum();
        total += f64::from(lanes.iter().sum::<f32>()) + f64::from(rest);
    }
    total
}

/// Sum of `f` over one row, in the same order.
#[inline(always)]
pub(crate) fn sum(a: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    sum2(a, a, |x, _| f(x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_agree_with_double_precision() {
        for i in -8800..=8800 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            let error = (f64::from(exp(x)) - want).abs();
            assert!(error <= 3e-7 * want + 2e-38, "exp({x})");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
        for (x, want) in [
            (0.0, 0.5),
            (1.0, 0.841_344_746),
            (-1.0, 0.158_655_254),
            (3.0, 0.998_650_102),
            (-6.0, 9.865_876e-10),
        ] {
            assert!((f64::from(normal_cdf(x)) - want).abs() < 2.5e-7, "cdf({x})");
        }
    }
}
