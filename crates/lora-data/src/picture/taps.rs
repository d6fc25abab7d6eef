//! Resizing with a few source pixels per target pixel: OpenCV's bilinear, bicubic,
//! nearest, and what its `INTER_AREA` does when it enlarges.
//!
//! None of these widens its kernel when shrinking, so shrinking a lot skips pixels.

use crate::Size;

/// Source pixels and weights for one target pixel along an axis.
type Taps = Vec<(usize, f32)>;

/// Which source pixels count how much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    Bilinear,
    Bicubic,
    Nearest,
    /// Bilinear with the fractions that OpenCV uses for enlarging by area.
    EnlargeArea,
}

pub(super) fn resize<const C: usize>(
    source: &[u8],
    from: Size,
    to: Size,
    kernel: Kernel,
) -> Vec<u8> {
    let columns = axis(from.width, to.width, kernel);
    let rows = axis(from.height, to.height, kernel);
    let stride = from.width as usize * C;
    let mut target = Vec::with_capacity(to.width as usize * to.height as usize * C);
    let mut mixed = vec![0f32; stride];
    for taps in &rows {
        mixed.fill(0.0);
        for &(y, weight) in taps {
            let row = &source[y * stride..(y + 1) * stride];
            for (total, &value) in mixed.iter_mut().zip(row) {
                *total += weight * f32::from(value);
            }
        }
        let pixels = mixed.as_chunks::<C>().0;
        for taps in &columns {
            target.extend(mix::<C>(pixels, taps).map(|v| (v + 0.5).floor() as u8));
        }
    }
    target
}

fn mix<const C: usize>(pixels: &[[f32; C]], taps: &Taps) -> [f32; C] {
    let mut sum = [0f32; C];
    for &(x, weight) in taps {
        for (total, value) in sum.iter_mut().zip(&pixels[x]) {
            *total += weight * value;
        }
    }
    sum
}

fn axis(source: u32, target: u32, kernel: Kernel) -> Vec<Taps> {
    let scale = f64::from(source) / f64::from(target);
    // Beyond the border the border pixel is repeated.
    let inside = |x: f64| x.clamp(0.0, f64::from(source) - 1.0) as usize;
    let two = |start: f64, fraction: f64| {
        let fraction = fraction as f32;
        vec![
            (inside(start), 1.0 - fraction),
            (inside(start + 1.0), fraction),
        ]
    };
    let center = |i: u32| (f64::from(i) + 0.5) * scale - 0.5;
    let each = 0..target;
    match kernel {
        Kernel::Nearest => nearest(source, target),
        Kernel::Bilinear => each
            .map(center)
            .map(|x| two(x.floor(), x - x.floor()))
            .collect(),
        Kernel::Bicubic => {
            let four = |x: f64| {
                let weights = cubic((x - x.floor()) as f32);
                (-1..=2)
                    .zip(weights)
                    .map(|(step, w)| (inside(x.floor() + f64::from(step)), w))
                    .collect()
            };
            each.map(center).map(four).collect()
        }
        Kernel::EnlargeArea => {
            // In OpenCV's order of operations: it decides on which side of a pixel's edge a
            // target pixel starts.
            let inverse = f64::from(target) / f64::from(source);
            let taps = |i: u32| {
                let start = (f64::from(i) * (1.0 / inverse)).floor();
                let fraction = (f64::from(i + 1) - (start + 1.0) * inverse) as f32;
                two(
                    start,
                    if fraction <= 0.0 {
                        0.0
                    } else {
                        f64::from(fraction - fraction.floor())
                    },
                )
            };
            each.map(taps).collect()
        }
    }
}

/// The pixel under the centre of each target pixel.
///
/// OpenCV adds up the step, and its rounding errors decide where a centre lies exactly
/// between two pixels. So this adds up too instead of multiplying.
fn nearest(source: u32, target: u32) -> Vec<Taps> {
    let step = f64::from(source) / f64::from(target);
    let centers = std::iter::successors(Some(step * 0.5), |center| Some(center + step));
    let last = source.saturating_sub(1) as usize;
    centers
        .take(target as usize)
        .map(|center| vec![((center as usize).min(last), 1.0)])
        .collect()
}

/// Weights of the four pixels around a point, for OpenCV's parameter -0.75.
fn cubic(x: f32) -> [f32; 4] {
    const A: f32 = -0.75;
    let far = |d: f32| ((A * d - 5.0 * A) * d + 8.0 * A) * d - 4.0 * A;
    let near = |d: f32| ((A + 2.0) * d - (A + 3.0)) * d * d + 1.0;
    let [first, second, third] = [far(x + 1.0), near(x), near(1.0 - x)];
    [first, second, third, 1.0 - first - second - third]
}
