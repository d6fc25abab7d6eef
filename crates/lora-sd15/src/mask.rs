//! Masks for painting a part of a picture.

use crate::Image;
use crate::resample::{Filter, resize_plane};

/// How much of each pixel is painted anew, 0 to 1.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Mask {
    width: usize,
    height: usize,
    values: Vec<f32>,
}

/// A part of a picture in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rectangle {
    pub(crate) x: usize,
    pub(crate) y: usize,
    pub(crate) width: usize,
    pub(crate) height: usize,
}

impl Mask {
    /// The brightness of a picture.
    pub(crate) fn from_image(image: &Image) -> Self {
        let pixels = image.rgb.as_chunks::<3>().0;
        let values = pixels
            .iter()
            .map(|&[r, g, b]| {
                (0.299 * f32::from(r) + 0.587 * f32::from(g) + 0.114 * f32::from(b)) / 255.0
            })
            .collect();
        Self {
            width: image.width,
            height: image.height,
            values,
        }
    }

    pub(crate) fn to_image(&self) -> Image {
        let bytes = self
            .values
            .iter()
            .map(|v| (v * 255.0).round().clamp(0.0, 255.0) as u8);
        Image {
            width: self.width,
            height: self.height,
            rgb: bytes.flat_map(|v| [v; 3]).collect(),
        }
    }

    pub(crate) fn invert(&mut self) {
        self.values.iter_mut().for_each(|v| *v = 1.0 - *v);
    }

    /// 0 or 1 everywhere.
    pub(crate) fn rounded(&self) -> Self {
        Self {
            values: self.values.iter().map(|v| v.round()).collect(),
            ..*self
        }
    }

    /// Softens edges by about `radius` pixels.
    pub(crate) fn blur(&mut self, radius: f64) {
        blur(&mut self.values, self.width, self.height, radius);
    }

    pub(crate) fn resized(&self, height: usize, width: usize, filter: Filter) -> Vec<f32> {
        let from = (self.height, self.width);
        resize_plane(&self.values, from, (height, width), filter, |v| {
            v.clamp(0.0, 1.0)
        })
    }

    /// `new` where it is painted, `old` elsewhere.
    pub(crate) fn lay_over(&self, old: &Image, new: &Image) -> Image {
        let mut mixed = old.clone();
        for ((pixel, (old, new)), weight) in mixed
            .rgb
            .iter_mut()
            .zip(old.rgb.iter().zip(&new.rgb))
            .zip(self.values.iter().flat_map(|v| [*v; 3]))
        {
            let value = f32::from(*old) * (1.0 - weight) + f32::from(*new) * weight;
            *pixel = value.round() as u8;
        }
        mixed
    }

    /// The smallest part around everything that is painted, widened by `padding` and to the
    /// shape of `width` x `height` where the picture allows.
    pub(crate) fn area(&self, padding: usize, width: usize, height: usize) -> Option<Rectangle> {
        let inside = |i: usize| self.values.get(i).is_some_and(|v| *v > 0.0);
        let mut bounds: Option<(usize, usize, usize, usize)> = None;
        for y in 0..self.height {
            for x in (0..self.width).filter(|x| inside(y * self.width + x)) {
                let (x1, y1, x2, y2) = bounds.unwrap_or((x, y, x, y));
                bounds = Some((x1.min(x), y1.min(y), x2.max(x), y2.max(y)));
            }
        }
        let (x1, y1, x2, y2) = bounds?;
        let (mut x1, mut y1) = (x1.saturating_sub(padding), y1.saturating_sub(padding));
        let (mut x2, mut y2) = (
            (x2 + 1 + padding).min(self.width),
            (y2 + 1 + padding).min(self.height),
        );
        let grow = |low: &mut usize, high: &mut usize, wanted: usize, limit: usize| {
            let missing = wanted.saturating_sub(*high - *low);
            *low = low.saturating_sub(missing / 2);
            *high = (*low + wanted.max(*high - *low)).min(limit);
            *low = high.saturating_sub(wanted.max(*high - *low));
        };
        let (w, h) = (x2 - x1, y2 - y1);
        if w * height > h * width {
            grow(&mut y1, &mut y2, (w * height).div_ceil(width), self.height);
        } else {
            grow(&mut x1, &mut x2, (h * width).div_ceil(height), self.width);
        }
        Some(Rectangle {
            x: x1,
            y: y1,
            width: x2 - x1,
            height: y2 - y1,
        })
    }
}

/// The picture with the colours around the masked part smeared into it: blurred copies of
/// what is kept, from coarse to fine.
pub(crate) fn fill(picture: &Image, mask: &Mask) -> Image {
    let (width, height) = (picture.width, picture.height);
    let keep: Vec<f32> = mask.values.iter().map(|v| 1.0 - v).collect();
    let channel = |c: usize| -> Vec<f32> {
        let values = picture.rgb.iter().skip(c).step_by(3);
        values.zip(&keep).map(|(v, k)| f32::from(*v) * k).collect()
    };
    let kept = [channel(0), channel(1), channel(2)];
    let mut filled = [const { Vec::new() }; 3];
    filled
        .iter_mut()
        .for_each(|f| f.resize(width * height, 0f32));
    for (radius, times) in [
        (256.0, 1),
        (64.0, 1),
        (16.0, 2),
        (4.0, 4),
        (2.0, 2),
        (0.0, 1),
    ] {
        let mut alpha = keep.clone();
        blur(&mut alpha, width, height, radius);
        for (kept, filled) in kept.iter().zip(&mut filled) {
            let mut color = kept.clone();
            blur(&mut color, width, height, radius);
            for ((f, c), a) in filled.iter_mut().zip(&color).zip(&alpha) {
                for _ in 0..times {
                    *f = c + *f * (1.0 - a);
                }
            }
        }
    }
    let mut result = picture.clone();
    for (c, filled) in filled.iter().enumerate() {
        for (to, from) in result.rgb.iter_mut().skip(c).step_by(3).zip(filled) {
            *to = from.round().clamp(0.0, 255.0) as u8;
        }
    }
    result
}

/// A Gaussian of this standard deviation, as three box filters with fractional ends.
fn blur(values: &mut [f32], width: usize, height: usize, radius: f64) {
    if radius <= 0.0 || width == 0 || height == 0 {
        return;
    }
    let variance = radius * radius / 3.0;
    let whole = (((12.0 * variance + 1.0).sqrt() - 1.0) / 2.0).floor();
    let part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
        / (6.0 * (variance - (whole + 1.0).powi(2)));
    let (reach, edge) = (whole as usize, part as f32);
    let norm = 1.0 / (2.0 * whole as f32 + 1.0 + 2.0 * edge);
    let pass = |line: &[f32]| -> Vec<f32> {
        let at = |i: i64| {
            let i = i.clamp(0, line.len() as i64 - 1) as usize;
            line.get(i).copied().unwrap_or(0.0)
        };
        // Running sums, in f64 so that they stay exact.
        let mut sum: f64 = (-(reach as i64)..=reach as i64)
            .map(|i| f64::from(at(i)))
            .sum();
        (0..line.len() as i64)
            .map(|i| {
                let reach = reach as i64;
                let ends = at(i - reach - 1) + at(i + reach + 1);
                let value = (sum as f32 + edge * ends) * norm;
                sum += f64::from(at(i + reach + 1)) - f64::from(at(i - reach));
                value
            })
            .collect()
    };
    for row in values.chunks_exact_mut(width) {
        for _ in 0..3 {
            row.copy_from_slice(&pass(row));
        }
    }
    for x in 0..width {
        let mut column: Vec<f32> = values.iter().skip(x).step_by(width).copied().collect();
        for _ in 0..3 {
            column = pass(&column);
        }
        for (to, from) in values.iter_mut().skip(x).step_by(width).zip(column) {
            *to = from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn square() -> Mask {
        let mut image = Image::plain(64, 48, [0; 3]);
        for y in 10..20 {
            for x in 30..40 {
                image.dot(x, y, [255; 3]);
            }
        }
        Mask::from_image(&image)
    }

    #[test]
    fn blurring_keeps_the_sum() {
        let mut mask = square();
        mask.blur(2.5);
        let sum: f32 = mask.values.iter().sum();
        assert!((sum - 100.0).abs() < 0.1, "{sum}");
    }

    #[test]
    fn the_area_has_the_shape_asked_for() {
        let area = square().area(2, 100, 50).unwrap();
        assert_eq!((area.width, area.height), (28, 14));
        assert!(area.x <= 28 && area.x + area.width >= 42);
    }

    #[test]
    fn filling_takes_the_colours_around() {
        let mut picture = Image::plain(64, 48, [200, 10, 90]);
        for y in 10..20 {
            for x in 30..40 {
                picture.dot(x, y, [0; 3]);
            }
        }
        let middle = fill(&picture, &square()).pixel(35, 15);
        assert!(middle[0] > 150 && middle[1] < 20, "{middle:?}");
    }
}
