//! Rounding f32 to half precision, to nearest or stochastically.
//!
//! Stochastic rounding to bfloat16 adds 16 random bits below the ones that stay and
//! cuts: a value is rounded away from zero with a probability equal to the fraction
//! that would be lost, so it is right on average. Values that already are bfloat16
//! never change, and non-finite values are left alone.

use candle_core::{DType, Tensor};
use half::{bf16, f16};

/// The value of `x` after rounding to `dtype`, as f32.
pub(crate) fn nearest(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Rounds to bfloat16 with the given 16 random bits.
///
/// ```
/// use lora_optim::stochastic_bf16;
/// assert_eq!(stochastic_bf16(1.0, u16::MAX), 1.0); // already bfloat16
/// assert_eq!(stochastic_bf16(1.001, 0), 1.0);
/// assert_eq!(stochastic_bf16(1.001, u16::MAX), 1.0078125);
/// ```
#[inline]
pub fn stochastic_bf16(x: f32, random: u16) -> f32 {
    if x.is_finite() {
        f32::from_bits(x.to_bits().wrapping_add(u32::from(random)) & 0xFFFF_0000)
    } else {
        x
    }
}

/// A stream of random bits addressed by (seed, step, tensor, element): it depends on
/// nothing else, so threads and a resume do not change it.
#[derive(Debug, Clone, Copy)]
pub struct Stream(u64);

impl Stream {
    /// The stream of one tensor at one step.
    pub fn new(seed: u64, step: u64, tensor: u64) -> Self {
        Self(mix(mix(mix(seed).wrapping_add(step)).wrapping_add(tensor)))
    }

    /// 16 random bits for one element.
    #[inline]
    pub fn bits(&self, element: u64) -> u16 {
        (mix(self.0.wrapping_add(element)) >> 48) as u16
    }
}

/// The finalizer of SplitMix64: every input bit reaches every output bit.
#[inline]
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

pub(crate) fn stochastic_in_place(values: &mut [f32], stream: Stream) {
    for (i, x) in values.iter_mut().enumerate() {
        *x = stochastic_bf16(*x, stream.bits(i as u64));
    }
}

/// A tensor rounded stochastically to bfloat16.
///
/// # Errors
/// When `tensor` is not a floating tensor.
pub fn stochastic_round_bf16(tensor: &Tensor, stream: Stream) -> candle_core::Result<Tensor> {
    let mut values = tensor
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    stochastic_in_place(&mut values, stream);
    Tensor::from_vec(values, tensor.dims(), tensor.device())?.to_dtype(DType::BF16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_of_many_roundings_is_the_value() {
        let x = 1.003f32;
        let stream = Stream::new(1, 2, 3);
        let mean = (0..20_000)
            .map(|i| f64::from(stochastic_bf16(x, stream.bits(i))))
            .sum::<f64>()
            / 20_000.0;
        // One step of bf16 here is 2^-7; the mean of 20000 draws is within 4 sigma = 1e-4.
        assert!((mean - f64::from(x)).abs() < 1e-4, "{mean}");
    }

    #[test]
    fn non_finite_values_stay() {
        assert!(stochastic_bf16(f32::NAN, 77).is_nan());
        assert_eq!(stochastic_bf16(f32::NEG_INFINITY, 77), f32::NEG_INFINITY);
    }
}
