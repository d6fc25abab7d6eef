//! Pictures and latents in other sizes.

use candle_core::{DType, Tensor};

use crate::{Error, Image, Result};

/// How values between pixels are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// The nearest pixel, as torch measures (`exact`: from pixel centres).
    Nearest {
        /// From pixel centres.
        exact: bool,
    },
    /// Linear.
    Bilinear {
        /// Averages where the picture shrinks.
        antialias: bool,
    },
    /// Cubic.
    Bicubic {
        /// Averages where the picture shrinks.
        antialias: bool,
    },
    /// Lanczos with three lobes, averaging where the picture shrinks.
    Lanczos,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Filter::Nearest { .. } => 0.5,
            Filter::Bilinear { .. } => 1.0,
            Filter::Bicubic { .. } => 2.0,
            Filter::Lanczos => 3.0,
        }
    }

    fn antialias(self) -> bool {
        match self {
            Filter::Nearest { .. } => false,
            Filter::Bilinear { antialias } | Filter::Bicubic { antialias } => antialias,
            Filter::Lanczos => true,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Filter::Nearest { .. } => 1.0,
            Filter::Bilinear { .. } => (1.0 - x).max(0.0),
            Filter::Bicubic { antialias } => {
                // torch's constants.
                let a = if antialias { -0.5 } else { -0.75 };
                if x < 1.0 {
                    ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
                } else if x < 2.0 {
                    (((x - 5.0) * x + 8.0) * x - 4.0) * a
                } else {
                    0.0
                }
            }
            Filter::Lanczos => {
                let sinc = |x: f64| {
                    let y = std::f64::consts::PI * x;
                    if y == 0.0 { 1.0 } else { y.sin() / y }
                };
                if x < 3.0 {
                    sinc(x) * sinc(x / 3.0)
                } else {
                    0.0
                }
            }
        }
    }
}

/// For each pixel of a row of `to`, the pixels of a row of `from` with their weights.
fn taps(from: usize, to: usize, filter: Filter) -> Vec<Vec<(usize, f32)>> {
    let scale = from as f64 / to as f64;
    let last = from.saturating_sub(1);
    (0..to)
        .map(|i| {
            if let Filter::Nearest { exact } = filter {
                let place = if exact { i as f64 + 0.5 } else { i as f64 };
                return vec![(((place * scale) as usize).min(last), 1.0)];
            }
            let centre = (i as f64 + 0.5) * scale;
            if !filter.antialias() {
                // Pixels beyond the edge repeat it.
                let first = (centre - 0.5).floor() as i64 + 1 - filter.support() as i64;
                return (0..2 * filter.support() as i64)
                    .map(|k| {
                        let at = first + k;
                        let weight = filter.weight(centre - 0.5 - at as f64);
                        (at.clamp(0, last as i64) as usize, weight as f32)
                    })
                    .collect();
            }
            let stretch = scale.max(1.0);
            let reach = filter.support() * stretch;
            let first = (centre - reach + 0.5).max(0.0) as usize;
            let end = ((centre + reach + 0.5) as usize).min(from);
            let weights: Vec<f64> = (first..end)
                .map(|at| filter.weight((at as f64 + 0.5 - centre) / stretch))
                .collect();
            let sum: f64 = weights.iter().sum();
            (first..end)
                .zip(&weights)
                .map(|(at, w)| (at, (w / sum) as f32))
                .collect()
        })
        .collect()
}

/// One plane of `from` (height, width) values in another size; `round` is applied after
/// each of the two passes.
pub(crate) fn resize_plane(
    plane: &[f32],
    from: (usize, usize),
    to: (usize, usize),
    filter: Filter,
    round: impl Fn(f32) -> f32,
) -> Vec<f32> {
    let value = |row: &[f32], tap: &[(usize, f32)], stride: usize, offset: usize| -> f32 {
        tap.iter()
            .map(|(at, w)| row.get(at * stride + offset).copied().unwrap_or(0.0) * w)
            .sum()
    };
    let columns = taps(from.1, to.1, filter);
    let mut wide = Vec::with_capacity(from.0 * to.1);
    for row in plane.chunks_exact(from.1.max(1)) {
        wide.extend(columns.iter().map(|tap| round(value(row, tap, 1, 0))));
    }
    let rows = taps(from.0, to.0, filter);
    let mut result = Vec::with_capacity(to.0 * to.1);
    for tap in &rows {
        result.extend((0..to.1).map(|x| round(value(&wide, tap, to.1, x))));
    }
    result
}

/// Latents `[n, c, h, w]` in another size.
pub(crate) fn resize_latents(
    latents: &Tensor,
    height: usize,
    width: usize,
    filter: Filter,
) -> Result<Tensor> {
    let (n, c, h, w) = latents.dims4()?;
    let values = latents
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    let mut all = Vec::with_capacity(n * c * height * width);
    for plane in values.chunks_exact((h * w).max(1)) {
        all.extend(resize_plane(plane, (h, w), (height, width), filter, |v| v));
    }
    Ok(Tensor::from_vec(
        all,
        (n, c, height, width),
        latents.device(),
    )?)
}

/// How a picture is brought to a size of another shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ResizeMode {
    /// Stretched.
    #[default]
    Stretch,
    /// Enlarged to cover, and cut.
    Crop,
    /// Fitted inside; the borders repeat its edges.
    Fill,
    /// Encoded as it is and stretched as latents.
    Latent,
}

impl ResizeMode {
    /// Names as the command line spells them.
    pub const ALL: [(&'static str, ResizeMode); 4] = [
        ("stretch", ResizeMode::Stretch),
        ("crop", ResizeMode::Crop),
        ("fill", ResizeMode::Fill),
        ("latent", ResizeMode::Latent),
    ];

    /// The name.
    pub fn name(self) -> &'static str {
        let found = Self::ALL.iter().find(|(_, mode)| *mode == self);
        found.map_or("stretch", |(name, _)| name)
    }

    /// By name, or by the web UI's number.
    ///
    /// # Errors
    /// [`Error::UnknownName`].
    pub fn from_name(name: &str) -> Result<Self> {
        let found = Self::ALL
            .iter()
            .enumerate()
            .find(|(i, (n, _))| n.eq_ignore_ascii_case(name) || i.to_string() == name);
        found
            .map(|(_, (_, m))| *m)
            .ok_or_else(|| Error::UnknownName {
                what: "resize mode",
                name: name.to_string(),
                known: Self::ALL.map(|(n, _)| n).join(", "),
            })
    }
}

impl Image {
    /// The picture in another size.
    pub fn resize(&self, width: usize, height: usize, filter: Filter) -> Image {
        if (width, height) == (self.width, self.height) {
            return self.clone();
        }
        let mut resized = Image::plain(width, height, [0; 3]);
        for channel in 0..3 {
            let plane: Vec<f32> = self
                .rgb
                .iter()
                .skip(channel)
                .step_by(3)
                .map(|v| f32::from(*v))
                .collect();
            let byte = |v: f32| v.round().clamp(0.0, 255.0);
            let plane = resize_plane(
                &plane,
                (self.height, self.width),
                (height, width),
                filter,
                byte,
            );
            for (to, from) in resized.rgb.iter_mut().skip(channel).step_by(3).zip(plane) {
                *to = from as u8;
            }
        }
        resized
    }

    /// The picture brought to a size; [`ResizeMode::Latent`] leaves it as it is.
    pub fn fit(&self, width: usize, height: usize, mode: ResizeMode) -> Image {
        let ratio = |a: usize, b: usize| a as f64 / b.max(1) as f64;
        let (sx, sy) = (ratio(width, self.width), ratio(height, self.height));
        let scaled = |scale: f64| {
            let side = |side: usize| ((side as f64 * scale).round() as usize).max(1);
            self.resize(side(self.width), side(self.height), Filter::Lanczos)
        };
        match mode {
            ResizeMode::Latent => self.clone(),
            ResizeMode::Stretch => self.resize(width, height, Filter::Lanczos),
            ResizeMode::Crop => {
                let large = scaled(sx.max(sy));
                let x = large.width.saturating_sub(width) / 2;
                let y = large.height.saturating_sub(height) / 2;
                large.crop(x, y, width, height)
            }
            ResizeMode::Fill => {
                let small = scaled(sx.min(sy));
                let (left, top) = (
                    width.saturating_sub(small.width) / 2,
                    height.saturating_sub(small.height) / 2,
                );
                let mut filled = Image::plain(width, height, [0; 3]);
                for y in 0..height {
                    for x in 0..width {
                        let inside = |v: usize, start: usize, length: usize| {
                            v.saturating_sub(start).min(length.saturating_sub(1))
                        };
                        let color =
                            small.pixel(inside(x, left, small.width), inside(y, top, small.height));
                        filled.dot(x, y, color);
                    }
                }
                filled
            }
        }
    }

    /// A part of the picture; what lies outside repeats the edge.
    pub fn crop(&self, x: usize, y: usize, width: usize, height: usize) -> Image {
        let mut part = Image::plain(width, height, [0; 3]);
        for row in 0..height {
            for column in 0..width {
                let (from_x, from_y) = (
                    (x + column).min(self.width.saturating_sub(1)),
                    (y + row).min(self.height.saturating_sub(1)),
                );
                part.dot(column, row, self.pixel(from_x, from_y));
            }
        }
        part
    }

    /// One pixel; black outside.
    pub fn pixel(&self, x: usize, y: usize) -> [u8; 3] {
        if x >= self.width {
            return [0; 3];
        }
        let pixels = self.rgb.as_chunks::<3>().0;
        pixels.get(y * self.width + x).copied().unwrap_or([0; 3])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_pictures_stay_flat_in_every_mode() {
        let image = Image::plain(40, 24, [10, 200, 77]);
        for (name, mode) in ResizeMode::ALL {
            let got = image.fit(64, 64, mode);
            assert!(
                got.rgb
                    .as_chunks::<3>()
                    .0
                    .iter()
                    .all(|p| *p == [10, 200, 77]),
                "{name}"
            );
        }
    }

    #[test]
    fn bilinear_is_torchs() {
        // torch.nn.functional.interpolate(torch.tensor([[[[0., 1.]]]]), size=(1, 4), mode="bilinear")
        let plane = resize_plane(
            &[0.0, 1.0],
            (1, 2),
            (1, 4),
            Filter::Bilinear { antialias: false },
            |v| v,
        );
        assert_eq!(plane, [0.0, 0.25, 0.75, 1.0]);
        let nearest = resize_plane(
            &[1.0, 2.0],
            (1, 2),
            (1, 3),
            Filter::Nearest { exact: false },
            |v| v,
        );
        assert_eq!(nearest, [1.0, 1.0, 2.0]);
    }
}
