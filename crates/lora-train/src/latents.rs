//! Pictures as latents.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use lora_data::{
    BatchPlan, CacheConfig, Dataset, EncoderError, LatentCache, LatentEncoder, Latents, Loader,
    LoaderConfig, Pixels, Place, PlanItem, Purpose, Size, Streams, shrink_mask,
};
use rand_distr::{Distribution, StandardNormal};
use sha2::{Digest, Sha256};

use crate::{Error, Model, Result};

/// Latents and masks of one batch.
#[derive(Debug, Clone)]
pub struct LatentBatch {
    /// Scaled latents `[n, 4, h, w]`, f32.
    pub latents: Tensor,
    /// Loss masks `[n, 1, h, w]`, if any picture has one.
    pub mask: Option<Tensor>,
}

/// Where latents come from: a cache that was filled before training, or the pictures of
/// each batch as it is drawn, when they are cropped or coloured at random.
#[derive(Debug)]
pub struct LatentSource {
    cache: Option<LatentCache>,
    fixed: bool,
    scaling_factor: f64,
    device: Device,
}

impl LatentSource {
    /// Encodes every picture that always looks the same. `folder` keeps the results for
    /// later runs. `fixed` draws one sample per picture for the whole run (`cache_latents`
    /// in sd-scripts); otherwise every use draws a new one. `progress` is told the pictures
    /// done and their number.
    ///
    /// # Errors
    /// When a picture cannot be read, or the model answers with NaN; the picture is named.
    pub fn new(
        dataset: &Arc<Dataset>,
        model: &dyn Model,
        fixed: bool,
        folder: Option<PathBuf>,
        device: &Device,
        progress: impl FnMut(usize, usize),
    ) -> Result<Self> {
        let cache = if has_random_pixels(dataset) {
            None
        } else {
            let encoder = Encoder::new(model, folder.is_some(), device)?;
            let config = CacheConfig {
                dir: folder,
                batch_size: 1,
            };
            Some(LatentCache::build(dataset, &encoder, &config, progress)?)
        };
        Ok(Self {
            cache,
            fixed,
            scaling_factor: model.scaling_factor(),
            device: device.clone(),
        })
    }

    /// Starts loading the pictures of these batches ahead; `None` when all are cached.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn load_ahead(
        &self,
        dataset: &Arc<Dataset>,
        batches: &[BatchPlan],
    ) -> Result<Option<Loader>> {
        if self.cache.is_some() {
            return Ok(None);
        }
        Ok(Some(Loader::new(
            dataset.clone(),
            batches.to_vec(),
            LoaderConfig::default(),
        )?))
    }

    /// The latents of a batch, drawn from their posteriors with the numbers that belong to
    /// `step`. `pixels` are those that [`load_ahead`](Self::load_ahead) brought; without
    /// them uncached pictures are decoded here.
    ///
    /// # Errors
    /// When a picture cannot be read.
    pub fn batch(
        &self,
        dataset: &Dataset,
        plan: &BatchPlan,
        pixels: Option<Vec<Pixels>>,
        model: &dyn Model,
        streams: Streams,
        step: u64,
    ) -> Result<LatentBatch> {
        let mut loaded = pixels.map(Vec::into_iter);
        let (mut latents, mut masks) = (Vec::new(), Vec::new());
        for (position, item) in plan.items.iter().enumerate() {
            let pixels = loaded.as_mut().and_then(Iterator::next);
            let (posterior, mask) = self.posterior(dataset, item, pixels, model)?;
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
            latents.push(self.sample(posterior, |_| StandardNormal.sample(&mut rng))?);
            masks.push(self.mask(mask, item.size)?);
        }
        self.stack(latents, &masks)
    }

    /// The means of a batch's latents: the same numbers every time, for validation.
    ///
    /// # Errors
    /// As [`batch`](Self::batch).
    pub fn means(
        &self,
        dataset: &Dataset,
        plan: &BatchPlan,
        model: &dyn Model,
    ) -> Result<LatentBatch> {
        let (mut latents, mut masks) = (Vec::new(), Vec::new());
        for item in &plan.items {
            let (posterior, mask) = self.posterior(dataset, item, None, model)?;
            latents.push(self.sample(posterior, |_| 0.0)?);
            masks.push(self.mask(mask, item.size)?);
        }
        self.stack(latents, &masks)
    }

    /// What the encoder makes of a draw, and its mask.
    fn posterior(
        &self,
        dataset: &Dataset,
        item: &PlanItem,
        pixels: Option<Pixels>,
        model: &dyn Model,
    ) -> Result<(Latents, Option<Vec<f32>>)> {
        if let Some(cache) = &self.cache {
            let entry = cache.get(item)?;
            return Ok((entry.latents, entry.mask));
        }
        let pixels = match pixels {
            Some(pixels) => pixels,
            None => dataset.pixels(item)?,
        };
        let latents = encode(model, &pixels, &self.device).map_err(|error| {
            let image = dataset.images().get(item.image);
            lora_data::Error::Encoder {
                what: image.map_or_else(String::new, |i| i.path.display().to_string()),
                source: error.into(),
            }
        })?;
        Ok((latents, pixels.mask))
    }

    /// `(mean + std * noise) * scaling_factor`, `[1, c, h, w]`.
    fn sample(&self, posterior: Latents, mut noise: impl FnMut(usize) -> f32) -> Result<Tensor> {
        let [c, h, w] = posterior.shape;
        let mut values = posterior.mean;
        if let Some(std) = posterior.std {
            for (i, (value, std)) in values.iter_mut().zip(std).enumerate() {
                *value += std * noise(i);
            }
        }
        let latents = Tensor::from_vec(values, (1, c, h, w), &self.device)?;
        Ok((latents * self.scaling_factor)?)
    }

    fn mask(&self, mask: Option<Vec<f32>>, size: Size) -> Result<Option<Tensor>> {
        let Some(mask) = mask else { return Ok(None) };
        let (height, width) = (size.height as usize / 8, size.width as usize / 8);
        let small = shrink_mask(&mask, size, 8);
        Ok(Some(Tensor::from_vec(
            small,
            (1, 1, height, width),
            &self.device,
        )?))
    }

    fn stack(&self, latents: Vec<Tensor>, masks: &[Option<Tensor>]) -> Result<LatentBatch> {
        let latents = Tensor::cat(&latents, 0)?;
        let mask = masks
            .iter()
            .any(Option::is_some)
            .then(|| join_masks(masks, &latents))
            .transpose()?;
        Ok(LatentBatch { latents, mask })
    }
}

fn has_random_pixels(dataset: &Dataset) -> bool {
    dataset.config().datasets.iter().any(|dataset| {
        dataset.subsets.iter().any(|subset| {
            subset.random_crop
                || subset.color_aug
                || (subset.face_crop_aug_range.is_some() && !dataset.enable_bucket)
        })
    })
}

/// The model's picture encoder, as lora-data's cache calls it.
struct Encoder<'a> {
    model: &'a dyn Model,
    key: String,
    device: Device,
}

impl<'a> Encoder<'a> {
    /// On disk an entry must be told from that of another encoder: the key is a hash of
    /// what the encoder makes of a test picture.
    fn new(model: &'a dyn Model, on_disk: bool, device: &Device) -> Result<Self> {
        let mut key = String::from("memory");
        if on_disk {
            let size = Size::new(64, 64);
            let data = (0..3 * 64 * 64)
                .map(|i| ((i * 37 % 255) as f32 / 127.0) - 1.0)
                .collect();
            let probe = Pixels {
                size,
                data,
                mask: None,
            };
            let latents = encode(model, &probe, device)?;
            let mut hash = Sha256::new();
            for value in latents.mean.iter().chain(latents.std.iter().flatten()) {
                hash.update(value.to_le_bytes());
            }
            key = hash
                .finalize()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
        }
        Ok(Self {
            model,
            key,
            device: device.clone(),
        })
    }
}

impl LatentEncoder for Encoder<'_> {
    fn key(&self) -> String {
        self.key.clone()
    }

    fn encode(&self, images: &[Pixels]) -> std::result::Result<Vec<Latents>, EncoderError> {
        images
            .iter()
            .map(|pixels| encode(self.model, pixels, &self.device).map_err(EncoderError::from))
            .collect()
    }
}

/// The posterior of one picture.
fn encode(model: &dyn Model, pixels: &Pixels, device: &Device) -> Result<Latents> {
    let (width, height) = (pixels.size.width as usize, pixels.size.height as usize);
    let picture = Tensor::from_slice(&pixels.data, (1, 3, height, width), device)?;
    let posterior = model.encode_pictures(&picture)?;
    let (_, c, h, w) = posterior.mean.dims4()?;
    let std = (posterior.logvar * 0.5)?.exp()?;
    let latents = Latents {
        shape: [c, h, w],
        mean: posterior.mean.flatten_all()?.to_vec1()?,
        std: Some(std.flatten_all()?.to_vec1()?),
    };
    let mut values = latents.mean.iter().chain(latents.std.iter().flatten());
    if values.any(|v| !v.is_finite()) {
        return Err(Error::Config {
            place: "VAE".into(),
            what: "its latents of this picture are not finite; try another VAE with --vae".into(),
        });
    }
    Ok(latents)
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
