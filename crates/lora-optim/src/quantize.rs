//! Block-wise 8-bit numbers with dynamic exponents (Dettmers et al. 2022), the state
//! format of the 8-bit optimizers.
//!
//! A block of 256 values is stored as its largest magnitude (f32) and one code per value:
//! the nearest of 256 numbers in [-1, 1] (or [0, 1]) that are spaced evenly within each
//! decade from 1e-7 to 1. Signed codes keep the sign of every value, except of exact zeros
//! and of small positive values, which may become 0.
//! <https://arxiv.org/abs/2110.02861>

use std::sync::LazyLock;

/// Values per block.
pub const BLOCK: usize = 256;

/// A table of 256 code values and the borders between neighbours.
#[derive(Debug)]
pub struct CodeTable {
    values: [f32; 256],
    borders: [f32; 255],
    signed: bool,
}

/// Codes for values of both signs (first moments).
pub static SIGNED: LazyLock<CodeTable> = LazyLock::new(|| CodeTable::new(true));

/// Codes for values of 0 and above (second moments).
pub static UNSIGNED: LazyLock<CodeTable> = LazyLock::new(|| CodeTable::new(false));

impl CodeTable {
    fn new(signed: bool) -> Self {
        let mut values = vec![0.0f32, 1.0];
        for decade in 0..7 {
            let parts = if signed {
                1usize << decade
            } else {
                2 << decade
            };
            let scale = 10f64.powi(decade - 6) as f32;
            for i in 0..parts {
                let middle = (tenth_to_one(i, parts) + tenth_to_one(i + 1, parts)) / 2.0 * scale;
                values.push(middle);
                if signed {
                    values.push(-middle);
                }
            }
        }
        values.sort_by(f32::total_cmp);
        let values: [f32; 256] = std::array::from_fn(|i| values.get(i).copied().unwrap_or(1.0));
        let borders = std::array::from_fn(|i| (values[i] + values[i + 1]) * 0.5);
        Self {
            values,
            borders,
            signed,
        }
    }

    /// The 256 code values in rising order.
    pub fn values(&self) -> &[f32; 256] {
        &self.values
    }

    /// The 255 borders between neighbouring code values.
    pub(crate) fn borders(&self) -> &[f32; 255] {
        &self.borders
    }

    /// Whether the codes have signs.
    pub(crate) fn is_signed(&self) -> bool {
        self.signed
    }

    /// Code of the nearest value to `x` in [-1, 1]; half-way values go down.
    #[inline]
    fn nearest(&self, x: f32) -> u8 {
        // Eight halvings of the 255 borders, without branches.
        let mut at = 0usize;
        for bit in (0..8).rev() {
            let half = 1usize << bit;
            if at + half <= 255 && self.borders[at + half - 1] < x {
                at += half;
            }
        }
        at as u8
    }

    /// Quantizes one block (up to [`BLOCK`] values) and returns its largest magnitude.
    pub fn quantize(&self, block: &[f32], codes: &mut [u8]) -> f32 {
        let largest = block.iter().fold(0.0f32, |a, x| a.max(x.abs()));
        if largest == 0.0 {
            codes.fill(if self.signed { 127 } else { 0 });
            return 0.0;
        }
        for (code, x) in codes.iter_mut().zip(block) {
            *code = self.nearest(x / largest);
            if self.signed
                && self.values[usize::from(*code)].is_sign_negative() != x.is_sign_negative()
            {
                *code = if *x > 0.0 {
                    code.saturating_add(1)
                } else {
                    code.saturating_sub(1)
                };
            }
        }
        largest
    }

    /// Restores the values of one block.
    pub fn dequantize(&self, codes: &[u8], largest: f32, block: &mut [f32]) {
        for (x, code) in block.iter_mut().zip(codes) {
            *x = self.values[usize::from(*code)] * largest;
        }
    }
}

/// Point `i` of the even division of [0.1, 1] into `parts`, bit for bit as PyTorch's
/// `linspace`: an f32 step, counted from the nearer end, rounded once.
fn tenth_to_one(i: usize, parts: usize) -> f32 {
    let start = f64::from(0.1f32);
    let step = f64::from((1.0f32 - 0.1) / parts as f32);
    let point = if i < parts.div_ceil(2) {
        start + step * i as f64
    } else {
        1.0 - step * (parts - i) as f64
    };
    point as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_have_256_rising_values() {
        for table in [&*SIGNED, &*UNSIGNED] {
            assert!(table.values.windows(2).all(|w| w[0] < w[1]));
            assert_eq!(table.values[255], 1.0);
        }
        assert_eq!(SIGNED.values[127], 0.0);
        assert_eq!(UNSIGNED.values[0], 0.0);
    }

    #[test]
    fn every_code_restores_itself() {
        for table in [&*SIGNED, &*UNSIGNED] {
            let mut codes = [0u8; 256];
            assert_eq!(table.quantize(&table.values, &mut codes), 1.0);
            assert!(codes.iter().enumerate().all(|(i, c)| i == usize::from(*c)));
        }
    }
}
