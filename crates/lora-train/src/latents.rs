//! Pictures as latents.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use lora_data::{BatchPlan, Dataset, Place, PlanItem, Purpose, Streams, shrink_mask};
use lora_sd15::{Posterior, Vae};
use rand_distr::{Distribution, StandardNormal};

use crate::Result;

/// Latents and masks of one batch.
#[derive(Debug, Clone)]
pub struct LatentBatch {
    /// Scaled latents `[n, 4, h, w]`, f32.
    pub latents: Tensor,
    /// Loss masks `[n, 1, h, w]`, if any picture has one.
    pub mask: Option<Tensor>,
}

/// Encodes pictures when they are first needed and keeps the posteriors, as long as
/// a picture is always cropped and coloured alike.
#[derive(Debug)]
pub struct LatentCache {
    known: HashMap<(usize, bool), Entry>,
    fixed: bool,
}

#[derive(Debug, Clone)]
struct Entry {
    posterior: Posterior,
    mask: Option<Tensor>,
}

impl LatentCache {
    /// `fixed` draws one sample per picture for the whole run (`cache_latents` in
    /// sd-scripts); otherwise every use draws a new one.
    pub fn new(fixed: bool) -> Self {
        Self {
            known: HashMap::new(),
            fixed,
        }
    }

    /// How many pictures are kept.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Encodes an item now if it can be kept and is not yet; returns whether the VAE
    /// ran.
    ///
    /// # Errors
    /// When the picture cannot be read.
    pub fn warm(
        &mut self,
        dataset: &Dataset,
        item: &PlanItem,
        vae: &Vae,
        device: &Device,
    ) -> Result<bool> {
        let key = (item.image, item.flip);
        if !cacheable(dataset, item) || self.known.contains_key(&key) {
            return Ok(false);
        }
        let entry = encode(dataset, item, vae, device)?;
        self.known.insert(key, entry);
        Ok(true)
    }

    /// The latents of a batch, drawn from their posteriors with the numbers that
    /// belong to `step`.
    ///
    /// # Errors
    /// When a picture cannot be read.
    pub fn batch(
        &mut self,
        dataset: &Dataset,
        plan: &BatchPlan,
        vae: &Vae,
        streams: Streams,
        step: u64,
        device: &Device,
    ) -> Result<LatentBatch> {
        let (mut latents, mut masks) = (Vec::new(), Vec::new());
        for (position, item) in plan.items.iter().enumerate() {
            self.warm(dataset, item, vae, device)?;
            let entry = match self
                .known
                .get(&(item.image, item.flip))
                .filter(|_| cacheable(dataset, item))
            {
                Some(entry) => entry.clone(),
                None => encode(dataset, item, vae, device)?,
            };
            let place = if self.fixed {
                Place {
                    epoch: u64::from(item.flip),
                    step: 0,
                    item: item.image as u64,
                }
            } else {
                // Counted from 1, so that no step shares numbers with the fixed sample.
                Place {
                    epoch: 2,
                    step,
                    item: position as u64,
                }
            };
            let mut rng = streams.stream(Purpose::LATENT_SAMPLE, place);
            let shape = entry.posterior.mean.shape().clone();
            let noise: Vec<f32> = (0..shape.elem_count())
                .map(|_| StandardNormal.sample(&mut rng))
                .collect();
            let noise = Tensor::from_vec(noise, shape, device)?;
            latents.push(entry.posterior.sample(&noise, vae.scaling_factor())?);
            masks.push(entry.mask);
        }
        let latents = Tensor::cat(&latents, 0)?;
        let mask = masks
            .iter()
            .any(Option::is_some)
            .then(|| join_masks(&masks, &latents))
            .transpose()?;
        Ok(LatentBatch { latents, mask })
    }
}

/// Whether an item looks the same every time it is drawn.
fn cacheable(dataset: &Dataset, item: &PlanItem) -> bool {
    dataset.images().get(item.image).is_some_and(|image| {
        let subset = dataset.subset(image);
        !subset.random_crop && !subset.color_aug && subset.face_crop_aug_range.is_none()
    })
}

fn encode(dataset: &Dataset, item: &PlanItem, vae: &Vae, device: &Device) -> Result<Entry> {
    let pixels = dataset.pixels(item)?;
    let (width, height) = (pixels.size.width as usize, pixels.size.height as usize);
    let picture = Tensor::from_vec(pixels.data, (1, 3, height, width), device)?;
    let mask = match pixels.mask {
        None => None,
        Some(mask) => {
            let small = shrink_mask(&mask, pixels.size, 8);
            Some(Tensor::from_vec(
                small,
                (1, 1, height / 8, width / 8),
                device,
            )?)
        }
    };
    let posterior = vae.encode(&picture)?;
    Ok(Entry { posterior, mask })
}

/// Pictures without a mask count fully.
fn join_masks(masks: &[Option<Tensor>], latents: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = latents.dims4()?;
    let parts: candle_core::Result<Vec<Tensor>> = masks
        .iter()
        .map(|mask| match mask {
            Some(mask) => Ok(mask.clone()),
            None => Tensor::ones((1, 1, h, w), latents.dtype(), latents.device()),
        })
        .collect();
    Ok(Tensor::cat(&parts?, 0)?)
}
