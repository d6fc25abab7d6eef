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
    (0..target)
        .map(|i| taps(f64::from(i), scale, source, kernel))
        .collect()
}

fn taps(i: f64, scale: f64, source: u32, kernel: Kernel) -> Taps {
    // Beyond the border the border pixel is repeated.
    let inside = |x: f64| x.clamp(0.0, f64::from(source) - 1.0) as usize;
    let center = (i + 0.5) * scale - 0.5;
    let (start, fraction) = (center.floor(), (center - center.floor()) as f32);
    match kernel {
        Kernel::Nearest => vec![(inside(nearest(i, scale, source)), 1.0)],
        Kernel::Bilinear => vec![
            (inside(start), 1.0 - fraction),
            (inside(start + 1.0), fraction),
        ],
        Kernel::Bicubic => {
            let weights = cubic(fraction);
            (-1..=2)
                .zip(weights)
                .map(|(offset, w)| (inside(start + f64::from(offset)), w))
                .collect()
        }
        Kernel::EnlargeArea => {
            let start = (i * scale).floor();
            let fraction = (i + 1.0) - (start + 1.0) / scale;
            let fraction = if fraction <= 0.0 {
                0.0
            } else {
                (fraction - fraction.floor()) as f32
            };
            vec![
                (inside(start), 1.0 - fraction),
                (inside(start + 1.0), fraction),
            ]
        }
    }
}

/// The pixel below the centre of target pixel `i`, in OpenCV's fixed-point numbers: they
/// decide where the centre falls between two pixels.
fn nearest(i: f64, scale: f64, source: u32) -> f64 {
    const ONE: f64 = 65_536.0;
    let step = (scale * ONE + 0.5).floor();
    let first = (step / 2.0).floor() - f64::from(source % 2);
    ((step * i + first) / ONE).floor()
}

/// Weights of the four pixels around a point, for OpenCV's parameter -0.75.
fn cubic(x: f32) -> [f32; 4] {
    const A: f32 = -0.75;
    let far = |d: f32| ((A * d - 5.0 * A) * d + 8.0 * A) * d - 4.0 * A;
    let near = |d: f32| ((A + 2.0) * d - (A + 3.0)) * d * d + 1.0;
    let [first, second, third] = [far(x + 1.0), near(x), near(1.0 - x)];
    [first, second, third, 1.0 - first - second - third]
}
