//! Latents of every image, encoded once.

use std::collections::HashMap;
use std::sync::Arc;

use rayon::prelude::*;

use super::entry::{Entry, Tensor};
use super::{CacheConfig, EncoderError, Key, Store};
use crate::{BatchPlan, Dataset, Error, Loader, LoaderConfig, Pixels, PlanItem, Result, Size};

/// What an encoder makes of one image, not scaled.
///
/// With a standard deviation it is the posterior, from which training draws a new sample
/// at every step, as it does without a cache. Without, it is one sample or the mean, used
/// every time; sd-scripts caches one sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Latents {
    /// Channels, height, width.
    pub shape: [usize; 3],
    /// Mean of the posterior, or a sample of it.
    pub mean: Vec<f32>,
    /// Standard deviation of the posterior.
    pub std: Option<Vec<f32>>,
}

/// An encoder of images, such as the VAE of Stable Diffusion.
pub trait LatentEncoder {
    /// A text that changes whenever the encoder's results do: weights, precision, options.
    fn key(&self) -> String;

    /// Encodes images of one size, in order.
    ///
    /// # Errors
    /// Whatever can go wrong; it is passed on.
    fn encode(&self, images: &[Pixels]) -> std::result::Result<Vec<Latents>, EncoderError>;
}

/// Latents and mask of one draw.
#[derive(Debug, Clone, PartialEq)]
pub struct CachedLatents {
    /// What the encoder made of the image.
    pub latents: Latents,
    /// Weight of each pixel in the loss: `height x width` of the bucket.
    pub mask: Option<Vec<f32>>,
}

/// The latents of a dataset, mirrored ones included where images are flipped.
#[derive(Debug)]
pub struct LatentCache {
    store: Store,
    keys: HashMap<(usize, bool), Place>,
    encoded: usize,
}

/// Where the latents of a picture are.
#[derive(Debug, Clone, Copy)]
struct Place {
    entry: Key,
    /// Hash of the picture's content.
    picture: Key,
}

impl LatentCache {
    /// Encodes every image that is not in the cache yet.
    ///
    /// `progress` is called with the images done and their number.
    ///
    /// # Errors
    /// [`Error::Option`] when images are cropped at random or change colour, since no
    /// cache can hold that; [`Error::Encoder`] naming the image, also for values that are
    /// not finite; file errors.
    pub fn build(
        dataset: &Arc<Dataset>,
        encoder: &dyn LatentEncoder,
        config: &CacheConfig,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self> {
        refuse_random_pixels(dataset)?;
        let mut cache = Self {
            store: Store::new(config)?,
            keys: keys(dataset, &encoder.key())?,
            encoded: 0,
        };
        let total = cache.keys.len();
        let missing = cache.missing(dataset);
        let mut done = total - missing.iter().map(|batch| batch.items.len()).sum::<usize>();
        progress(done, total);
        let batches = rebatch(missing, config.batch_size);
        for batch in Loader::new(dataset.clone(), batches, LoaderConfig::default())? {
            let batch = batch?;
            let name = || name_of(dataset, &batch.plan.items);
            let latents = encoder
                .encode(&batch.pixels)
                .map_err(|source| Error::Encoder {
                    what: name(),
                    source,
                })?;
            if latents.len() != batch.pixels.len() {
                let source = format!(
                    "{} latents for {} images",
                    latents.len(),
                    batch.pixels.len()
                )
                .into();
                return Err(Error::Encoder {
                    what: name(),
                    source,
                });
            }
            for ((item, latents), pixels) in batch.plan.items.iter().zip(latents).zip(batch.pixels)
            {
                check(&latents).map_err(|what| Error::Encoder {
                    what: name_of(dataset, &[*item]),
                    source: what.into(),
                })?;
                cache.put(item, latents, pixels)?;
                done += 1;
                progress(done, total);
            }
        }
        Ok(cache)
    }

    /// The latents of a planned draw.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for an image of another dataset, [`Error::Changed`] when the cache
    /// file has vanished or is damaged.
    pub fn get(&self, item: &PlanItem) -> Result<CachedLatents> {
        let key = self
            .keys
            .get(&(item.image, item.flip))
            .map(|place| place.entry)
            .ok_or(Error::OutOfRange {
                what: "cached image",
                index: item.image,
                count: self.keys.len(),
            })?;
        self.store
            .get(key)
            .as_deref()
            .and_then(from_entry)
            .ok_or_else(|| Error::Changed {
                path: key.file_name().into(),
                what: "the cache file is gone or damaged".to_owned(),
            })
    }

    /// How many images were encoded by [`LatentCache::build`]; the others were there already.
    pub fn encoded(&self) -> usize {
        self.encoded
    }

    fn put(&mut self, item: &PlanItem, latents: Latents, pixels: Pixels) -> Result<()> {
        let Some(&place) = self.keys.get(&(item.image, item.flip)) else {
            return Ok(());
        };
        let mut entry = to_entry(latents, pixels.mask, pixels.size);
        entry.picture = Some(place.picture.hex());
        self.store.put(place.entry, entry)?;
        self.encoded += 1;
        Ok(())
    }

    /// Every draw without a usable entry, by dataset and bucket.
    fn missing(&self, dataset: &Dataset) -> Vec<BatchPlan> {
        let is_missing = |item: &PlanItem| {
            let place = self.keys.get(&(item.image, item.flip));
            place
                .and_then(|place| self.store.get(place.entry))
                .as_deref()
                .and_then(from_entry)
                .is_none()
        };
        let with_mirrored = |item: PlanItem| {
            let flips = dataset
                .images()
                .get(item.image)
                .is_some_and(|i| dataset.subset(i).flip_aug);
            [Some(item), flips.then_some(PlanItem { flip: true, ..item })]
                .into_iter()
                .flatten()
        };
        let mut batches = dataset.each_once(|_| true);
        for batch in &mut batches {
            batch.items = batch
                .items
                .drain(..)
                .flat_map(with_mirrored)
                .filter(is_missing)
                .collect();
        }
        batches.retain(|batch| !batch.items.is_empty());
        batches
    }
}

fn refuse_random_pixels(dataset: &Dataset) -> Result<()> {
    for dataset in &dataset.config().datasets {
        for subset in &dataset.subsets {
            let random = [
                ("random_crop", subset.random_crop),
                ("color_aug", subset.color_aug),
                (
                    "face_crop_aug_range",
                    subset.face_crop_aug_range.is_some() && !dataset.enable_bucket,
                ),
            ];
            if let Some((key, _)) = random.into_iter().find(|(_, is_on)| *is_on) {
                let what = "latents cannot be cached while it changes the pixels of every draw; \
                            turn it or cache_latents off";
                return Err(Error::option(key, what));
            }
        }
    }
    Ok(())
}

/// The key of every image, and of its mirror image where it is flipped.
fn keys(dataset: &Dataset, encoder: &str) -> Result<HashMap<(usize, bool), Place>> {
    let items: Vec<PlanItem> = dataset
        .each_once(|_| true)
        .into_iter()
        .flat_map(|batch| batch.items)
        .collect();
    let keys = items.par_iter().map(|item| {
        let Some(image) = dataset.images().get(item.image) else {
            return Ok(Vec::new());
        };
        let options = dataset.subset(image);
        let picture = Key::of_file(&image.path)?;
        let mask = image.mask.as_deref().map(Key::of_file).transpose()?;
        let filter = dataset
            .config()
            .datasets
            .get(image.dataset)
            .and_then(|d| d.resize_interpolation);
        let filter = options.resize_interpolation.or(filter);
        let config = dataset.config();
        let pixels = format!(
            "{:?} {:?} {:?} {filter:?} {} {:?} {} {mask:?}",
            item.size,
            item.resize,
            item.crop,
            config.exif_orientation,
            config.transparency,
            options.alpha_mask,
        );
        let flips: &[bool] = if options.flip_aug {
            &[false, true]
        } else {
            &[false]
        };
        let key = |&flip: &bool| {
            let parts: [&[u8]; 5] = [
                b"lora-data latents 1",
                encoder.as_bytes(),
                &picture.0,
                pixels.as_bytes(),
                &[u8::from(flip)],
            ];
            let entry = Key::of(&parts);
            ((item.image, flip), Place { entry, picture })
        };
        Ok(flips.iter().map(key).collect())
    });
    let keys: Vec<Vec<_>> = keys.collect::<Result<_>>()?;
    Ok(keys.into_iter().flatten().collect())
}

/// Batches of another size, still of one bucket each.
fn rebatch(batches: Vec<BatchPlan>, batch_size: usize) -> Vec<BatchPlan> {
    let mut merged: Vec<BatchPlan> = Vec::new();
    for batch in batches {
        match merged.last_mut() {
            Some(last) if (last.dataset, last.size) == (batch.dataset, batch.size) => {
                last.items.extend(batch.items)
            }
            _ => merged.push(batch),
        }
    }
    let split = |batch: BatchPlan| {
        let part = move |items: &[PlanItem]| BatchPlan {
            items: items.to_vec(),
            ..batch
        };
        batch
            .items
            .clone()
            .chunks(batch_size.max(1))
            .map(part)
            .collect::<Vec<_>>()
    };
    merged.into_iter().flat_map(split).collect()
}

fn check(latents: &Latents) -> std::result::Result<(), String> {
    let count: usize = latents.shape.iter().product();
    let std = latents.std.as_deref().unwrap_or(&[]);
    if latents.mean.len() != count || !(std.is_empty() || std.len() == count) {
        return Err(format!(
            "{} values for the shape {:?}",
            latents.mean.len(),
            latents.shape
        ));
    }
    if latents
        .mean
        .iter()
        .chain(std)
        .any(|value| !value.is_finite())
    {
        return Err("the latents are not finite; encode in float32".to_owned());
    }
    Ok(())
}

fn to_entry(latents: Latents, mask: Option<Vec<f32>>, size: Size) -> Entry {
    let shape = latents.shape.to_vec();
    let mut entry = Entry::default().with("mean", shape.clone(), latents.mean);
    if let Some(std) = latents.std {
        entry = entry.with("std", shape, std);
    }
    if let Some(mask) = mask {
        entry = entry.with(
            "mask",
            vec![size.height as usize, size.width as usize],
            mask,
        );
    }
    entry
}

fn from_entry(entry: &Entry) -> Option<CachedLatents> {
    let Tensor { shape, data } = entry.tensors.get("mean")?;
    let values = |name: &str| entry.tensors.get(name).map(|tensor| tensor.data.clone());
    let shape = shape.as_slice().try_into().ok()?;
    Some(CachedLatents {
        latents: Latents {
            shape,
            mean: data.clone(),
            std: values("std"),
        },
        mask: values("mask"),
    })
}

fn name_of(dataset: &Dataset, items: &[PlanItem]) -> String {
    let paths = items
        .iter()
        .filter_map(|item| dataset.images().get(item.image));
    paths
        .map(|image| image.path.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}
