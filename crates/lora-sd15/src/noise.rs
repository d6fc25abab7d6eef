//! The noise of a batch of pictures: seeds, variations, other sizes.

use candle_core::{Device, Result, Tensor};

use crate::rng::{NoiseGenerator, NoiseSource};

/// What is asked of the noise of one batch.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseRequest {
    /// Which generator seeds are for.
    pub source: NoiseSource,
    /// Channels, height and width of one picture's latents.
    pub shape: [usize; 3],
    /// One seed per picture.
    pub seeds: Vec<u64>,
    /// Seeds of the variations, one per picture.
    pub variation_seeds: Vec<u64>,
    /// From 0, the noise of `seeds`, to 1, that of `variation_seeds`.
    pub variation_strength: f64,
    /// Height and width in pixels at which the seeds drew the picture that is wanted again.
    pub resize_from: Option<(usize, usize)>,
    /// Added to the seeds for all noise after the first: "ENSD".
    pub eta_delta: i64,
}

/// Draws the noise of a batch, picture by picture, so that a picture does not depend on the
/// batch it is in.
///
/// ```
/// use lora_sd15::{BatchNoise, NoiseRequest, NoiseSource};
/// let request = NoiseRequest {
///     source: NoiseSource::Philox,
///     shape: [4, 8, 8],
///     seeds: vec![1, 2],
///     variation_seeds: Vec::new(),
///     variation_strength: 0.0,
///     resize_from: None,
///     eta_delta: 0,
/// };
/// let mut noise = BatchNoise::new(request);
/// assert_eq!(noise.next(&candle_core::Device::Cpu)?.dims(), [2, 4, 8, 8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct BatchNoise {
    request: NoiseRequest,
    generators: Vec<NoiseGenerator>,
    fresh: bool,
}

impl BatchNoise {
    /// Before the first draw.
    pub fn new(request: NoiseRequest) -> Self {
        let generators = generators(&request, 0);
        Self {
            request,
            generators,
            fresh: true,
        }
    }

    /// The next noise, `[pictures, channels, height, width]`: first the initial noise, then
    /// that of each step.
    ///
    /// # Errors
    /// When the tensor cannot be made.
    pub fn next(&mut self, device: &Device) -> Result<Tensor> {
        let shape = self.request.shape;
        let pictures: Vec<Vec<f32>> = if std::mem::take(&mut self.fresh) {
            let first = (0..self.generators.len()).map(|i| self.first(i)).collect();
            if self.request.eta_delta != 0 {
                self.generators = generators(&self.request, self.request.eta_delta);
            }
            first
        } else {
            let count = shape.iter().product();
            self.generators
                .iter_mut()
                .map(|g| g.normal(count))
                .collect()
        };
        let all = pictures.concat();
        let [c, h, w] = shape;
        Tensor::from_vec(all, (pictures.len(), c, h, w), device)
    }

    /// The initial noise of one picture.
    fn first(&mut self, i: usize) -> Vec<f32> {
        let request = &self.request;
        let shape = request.shape;
        let drawn = match request.resize_from {
            Some((h, w)) if h > 0 && w > 0 => [shape[0], h / 8, w / 8],
            _ => shape,
        };
        let fresh = |seed: u64, shape: [usize; 3]| {
            NoiseGenerator::new(request.source, seed).normal(shape.iter().product())
        };
        let variation = (request.variation_strength != 0.0)
            .then(|| fresh(request.variation_seeds.get(i).copied().unwrap_or(0), drawn));
        let seed = request.seeds.get(i).copied().unwrap_or(0);
        let strength = request.variation_strength;
        let mut own = |shape: [usize; 3]| {
            let generator = self.generators.get_mut(i);
            generator.map_or_else(Vec::new, |g| g.normal(shape.iter().product()))
        };
        let mut noise = if drawn == shape {
            own(shape)
        } else {
            fresh(seed, drawn)
        };
        if let Some(variation) = variation {
            noise = slerp(strength, &noise, &variation, drawn);
        }
        if drawn != shape {
            let mut whole = own(shape);
            place_centred(&noise, drawn, &mut whole, shape);
            noise = whole;
        }
        noise
    }
}

fn generators(request: &NoiseRequest, delta: i64) -> Vec<NoiseGenerator> {
    let seeds = request.seeds.iter();
    seeds
        .map(|seed| NoiseGenerator::new(request.source, seed.wrapping_add_signed(delta)))
        .collect()
}

/// Copies `small` into the middle of `large`, cut where it is larger.
fn place_centred(small: &[f32], from: [usize; 3], large: &mut [f32], to: [usize; 3]) {
    // Halves are rounded down, below zero too.
    let middle = |to: usize, from: usize| (to as i64 - from as i64).div_euclid(2);
    let span = |to: usize, from: usize| {
        let shift = middle(to, from);
        let length = if shift >= 0 {
            from as i64
        } else {
            from as i64 + 2 * shift
        };
        (
            shift.max(0) as usize,
            (-shift).max(0) as usize,
            length.max(0) as usize,
        )
    };
    let (ty, sy, height) = span(to[1], from[1]);
    let (tx, sx, width) = span(to[2], from[2]);
    for c in 0..to[0].min(from[0]) {
        for y in 0..height {
            let source = (c * from[1] + sy + y) * from[2] + sx;
            let target = (c * to[1] + ty + y) * to[2] + tx;
            let width = width.min(to[2].saturating_sub(tx));
            if ty + y < to[1]
                && let (Some(from), Some(to)) = (
                    small.get(source..source + width),
                    large.get_mut(target..target + width),
                )
            {
                to.copy_from_slice(from);
            }
        }
    }
}

/// Interpolates on the sphere, each column of each channel for itself, as the web UI does.
fn slerp(strength: f64, low: &[f32], high: &[f32], shape: [usize; 3]) -> Vec<f32> {
    let [channels, height, width] = shape;
    let column = |data: &[f32], c: usize, x: usize| -> Vec<f64> {
        (0..height)
            .filter_map(|y| data.get((c * height + y) * width + x))
            .map(|v| f64::from(*v))
            .collect()
    };
    let mut angles = Vec::with_capacity(channels * width);
    for c in 0..channels {
        for x in 0..width {
            let (a, b) = (column(low, c, x), column(high, c, x));
            let dot: f64 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            let norm = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
            angles.push((dot / (norm(&a) * norm(&b))).clamp(-1.0, 1.0));
        }
    }
    let mean = angles.iter().sum::<f64>() / angles.len().max(1) as f64;
    let blend = |i: usize, a: f64, b: f64| -> f64 {
        let dot = angles
            .get(i / (height * width) * width + i % width)
            .copied()
            .unwrap_or(1.0);
        let omega = dot.acos();
        let sine = omega.sin();
        if mean > 0.9995 {
            return a * strength + b * (1.0 - strength);
        }
        if sine < 1e-9 {
            return a * (1.0 - strength) + b * strength;
        }
        ((1.0 - strength) * omega).sin() / sine * a + (strength * omega).sin() / sine * b
    };
    low.iter()
        .zip(high)
        .enumerate()
        .map(|(i, (a, b))| blend(i, f64::from(*a), f64::from(*b)) as f32)
        .collect()
}
