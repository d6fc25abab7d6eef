//! Pillow's resampling: the kernel widens when shrinking, so nothing is skipped.
//!
//! The arithmetic is Pillow's to the bit: weights as fixed-point numbers with 22
//! fractional bits, and 8-bit values between the two passes.

use crate::Size;

const FRACTION_BITS: u32 = 22;

/// A resampling kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    Lanczos,
    Box,
}

impl Kernel {
    fn support(self) -> f64 {
        match self {
            Self::Lanczos => 3.0,
            Self::Box => 0.5,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Box if x > -0.5 && x <= 0.5 => 1.0,
            _ => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * std::f64::consts::PI;
    x.sin() / x
}

/// The source pixels of one target pixel along an axis.
struct Window {
    start: usize,
    weights: Vec<i32>,
}

pub(super) fn resize<const C: usize>(
    source: &[u8],
    from: Size,
    to: Size,
    kernel: Kernel,
) -> Vec<u8> {
    let columns = windows(from.width, to.width, kernel);
    let rows = windows(from.height, to.height, kernel);
    let across = |pixels: &[u8]| match from.width == to.width {
        true => pixels.to_vec(),
        false => along_rows::<C>(pixels, from.width, &columns),
    };
    let down = |pixels: &[u8], width: u32| match from.height == to.height {
        true => pixels.to_vec(),
        false => along_columns(pixels, width as usize * C, &rows),
    };
    if is_columns_first(from, to) {
        across(&down(source, from.width))
    } else {
        down(&across(source), to.width)
    }
}

/// Which pass comes first shows, because values between the passes are cut to 8 bits.
/// Pillow 13 starts with the columns where that drops clearly more rows.
fn is_columns_first(from: Size, to: Size) -> bool {
    let less = |from: u32, to: u32| i64::from(from) - i64::from(to);
    let rows_less = less(from.height, to.height);
    rows_less > 0 && rows_less > 2 * less(from.width, to.width)
}

fn windows(source: u32, target: u32, kernel: Kernel) -> Vec<Window> {
    let scale = f64::from(source) / f64::from(target);
    let widening = scale.max(1.0);
    let support = kernel.support() * widening;
    let window = |i: u32| {
        let center = (f64::from(i) + 0.5) * scale;
        let start = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(source as usize);
        let at = |x: usize| kernel.weight((x as f64 - center + 0.5) / widening);
        let weights: Vec<f64> = (start..end).map(at).collect();
        let sum: f64 = weights.iter().sum();
        let sum = if sum == 0.0 { 1.0 } else { sum };
        Window {
            start,
            weights: weights.iter().map(|w| fixed_point(w / sum)).collect(),
        }
    };
    (0..target).map(window).collect()
}

fn fixed_point(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << FRACTION_BITS);
    (if weight < 0.0 {
        scaled - 0.5
    } else {
        scaled + 0.5
    }) as i32
}

fn to_byte(sum: i32) -> u8 {
    (sum >> FRACTION_BITS).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (FRACTION_BITS - 1);

fn along_rows<const C: usize>(source: &[u8], width: u32, windows: &[Window]) -> Vec<u8> {
    let rows = source.chunks_exact(width as usize * C);
    let mut target = Vec::with_capacity(rows.len() * windows.len() * C);
    for row in rows {
        let pixels = row.as_chunks::<C>().0;
        for window in windows {
            let mut sum = [HALF; C];
            for (weight, pixel) in window.weights.iter().zip(&pixels[window.start..]) {
                for (total, &value) in sum.iter_mut().zip(pixel) {
                    *total += weight * i32::from(value);
                }
            }
            target.extend(sum.map(to_byte));
        }
    }
    target
}

fn along_columns(source: &[u8], stride: usize, windows: &[Window]) -> Vec<u8> {
    let mut target = Vec::with_capacity(stride * windows.len());
    let mut sum = vec![HALF; stride];
    for window in windows {
        sum.fill(HALF);
        let rows = source.chunks_exact(stride).skip(window.start);
        for (weight, row) in window.weights.iter().zip(rows) {
            for (total, &value) in sum.iter_mut().zip(row) {
                *total += weight * i32::from(value);
            }
        }
        target.extend(sum.iter().map(|&v| to_byte(v)));
    }
    target
}
