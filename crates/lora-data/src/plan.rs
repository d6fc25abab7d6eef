//! Which images make which batch of an epoch: a pure function of dataset, epoch and seed.

use std::collections::BTreeMap;

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha12Rng;

use crate::face::{Face, face_crop};
use crate::{Dataset, ImageRecord, Place, Purpose, Role, Size, Streams, SubsetConfig};

/// The batches of one epoch, in training order.
///
/// Every image is in it exactly as often as its repeats say.
#[derive(Debug, Clone, PartialEq)]
pub struct EpochPlan {
    /// Epoch, counted from 1.
    pub epoch: usize,
    /// The batches in the order in which they are trained.
    pub batches: Vec<BatchPlan>,
}

/// One batch: images of one dataset and one bucket.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchPlan {
    /// Number of the dataset.
    pub dataset: usize,
    /// The bucket: width and height of every image of the batch.
    pub size: Size,
    /// The images; the last batch of a bucket may have fewer than `batch_size`.
    pub items: Vec<PlanItem>,
}

/// One draw of an image, with every random decision about its pixels already made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlanItem {
    /// Number of the image in [`Dataset::images`].
    pub image: usize,
    /// Which repeat of the epoch this is, from 0.
    pub repeat: u32,
    /// Size the image is resized to.
    pub resize: Size,
    /// Left and top of the crop in the resized image.
    pub crop: (u32, u32),
    /// Size of the crop, the batch's bucket.
    pub size: Size,
    /// Mirror the image.
    pub flip: bool,
    /// Change its colours.
    pub color: Option<ColorShift>,
    /// Factor for the loss: `prior_loss_weight` for regularization images, else 1.
    pub loss_weight: f32,
}

impl PlanItem {
    /// A number that tells this draw from all others of the epoch, for [`Place::item`].
    pub fn key(&self) -> u64 {
        draw_key(self.image, self.repeat)
    }
}

fn draw_key(image: usize, repeat: u32) -> u64 {
    ((image as u64) << 32) | u64::from(repeat)
}

/// A small change of colour.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ColorShift {
    /// Turn the hue by this many degrees.
    Hue(f32),
    /// Raise every value (0 to 1) to this power.
    Gamma(f32),
}

impl Dataset {
    /// The batches of an epoch (counted from 1) in training order.
    ///
    /// Pure: the same dataset, epoch and seed give the same plan on every machine,
    /// whatever was planned or loaded before.
    pub fn epoch(&self, epoch: usize, seed: u64) -> EpochPlan {
        let streams = Streams::new(seed);
        let epoch_number = epoch as u64;
        let mut batches = Vec::with_capacity(self.batches_per_epoch());
        for (number, (&(dataset, size), images)) in self.buckets().iter().enumerate() {
            let mut draws = all_repeats(self.images(), images);
            let place = Place {
                epoch: epoch_number,
                step: 0,
                item: number as u64,
            };
            draws.shuffle(&mut streams.stream(Purpose::IMAGE_ORDER, place));
            for draws in draws.chunks(self.batch_size(dataset)) {
                let item = |&(image, repeat): &(usize, u32)| {
                    let place = Place {
                        epoch: epoch_number,
                        step: 0,
                        item: draw_key(image, repeat),
                    };
                    self.draw(image, repeat, &mut streams.stream(Purpose::AUGMENT, place))
                };
                batches.push(BatchPlan {
                    dataset,
                    size,
                    items: draws.iter().map(item).collect(),
                });
            }
        }
        batches.shuffle(&mut streams.stream(Purpose::BATCH_ORDER, Place::epoch(epoch_number)));
        EpochPlan { epoch, batches }
    }

    /// Every image once, unshuffled, centre-cropped and without augmentation.
    ///
    /// For caches, reports and validation: pass the role of the images wanted.
    pub fn each_once(&self, role: impl Fn(Role) -> bool) -> Vec<BatchPlan> {
        let mut by_bucket: BTreeMap<(usize, Size), Vec<PlanItem>> = BTreeMap::new();
        for (number, image) in self
            .images()
            .iter()
            .enumerate()
            .filter(|(_, image)| role(image.role))
        {
            by_bucket
                .entry((image.dataset, image.bucket))
                .or_default()
                .push(self.plain_draw(number, image));
        }
        let mut batches = Vec::new();
        for ((dataset, size), items) in by_bucket {
            for items in items.chunks(self.batch_size(dataset)) {
                batches.push(BatchPlan {
                    dataset,
                    size,
                    items: items.to_vec(),
                });
            }
        }
        batches
    }

    /// Draw of an image as a cache or a report wants it.
    fn plain_draw(&self, number: usize, image: &ImageRecord) -> PlanItem {
        let offset = |resized: u32, bucket: u32| resized.saturating_sub(bucket) / 2;
        PlanItem {
            image: number,
            repeat: 0,
            resize: image.resized,
            crop: (
                offset(image.resized.width, image.bucket.width),
                offset(image.resized.height, image.bucket.height),
            ),
            size: image.bucket,
            flip: false,
            color: None,
            loss_weight: match image.role {
                Role::Regularization => self.config().prior_loss_weight,
                Role::Train | Role::Validation => 1.0,
            },
        }
    }

    fn draw(&self, number: usize, repeat: u32, rng: &mut ChaCha12Rng) -> PlanItem {
        let image = &self.images()[number];
        let options = self.subset(image);
        let mut item = PlanItem {
            repeat,
            ..self.plain_draw(number, image)
        };
        item.flip = options.flip_aug && rng.random_bool(0.5);
        if let Some(face) = self.face_of(image, options) {
            (item.resize, item.crop) = face_crop(image.size, image.bucket, face, options, rng);
        } else if options.random_crop {
            let spare = |resized: u32, bucket: u32| resized.saturating_sub(bucket);
            let left = rng.random_range(0..=spare(image.resized.width, image.bucket.width));
            let top = rng.random_range(0..=spare(image.resized.height, image.bucket.height));
            item.crop = (left, top);
        }
        item.color = if options.color_aug {
            draw_color(rng)
        } else {
            None
        };
        item
    }

    /// Faces count only with buckets off, as in sd-scripts.
    fn face_of(&self, image: &ImageRecord, options: &SubsetConfig) -> Option<Face> {
        let has_buckets = self
            .config()
            .datasets
            .get(image.dataset)
            .is_none_or(|d| d.enable_bucket);
        if has_buckets || options.face_crop_aug_range.is_none() {
            return None;
        }
        Face::from_file_name(&image.path)
    }
}

fn all_repeats(records: &[ImageRecord], images: &[usize]) -> Vec<(usize, u32)> {
    images
        .iter()
        .flat_map(|&i| (0..records[i].repeats).map(move |repeat| (i, repeat)))
        .collect()
}

/// A change in a third of the draws, half of them hue and half gamma.
fn draw_color(rng: &mut ChaCha12Rng) -> Option<ColorShift> {
    if !rng.random_bool(0.33) {
        None
    } else if rng.random_bool(0.5) {
        // The reference counts in half degrees: up to 8 of them.
        Some(ColorShift::Hue(rng.random_range(-16.0..=16.0)))
    } else {
        Some(ColorShift::Gamma(rng.random_range(0.95..=1.05)))
    }
}

/// How batches become updates.
///
/// ```
/// use lora_data::StepCount;
/// // 10 batches, 4 to an update: the last update of an epoch has only 2.
/// let steps = StepCount::new(10, 4);
/// assert_eq!((steps.updates_per_epoch, steps.total(3)), (3, 9));
/// assert_eq!(steps.epochs_for(1600), 534);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepCount {
    /// Batches per epoch.
    pub batches_per_epoch: usize,
    /// Optimizer updates per epoch; the leftover batches of an epoch make one too.
    pub updates_per_epoch: usize,
}

impl StepCount {
    /// For this many batches per epoch and per update.
    pub fn new(batches_per_epoch: usize, gradient_accumulation_steps: usize) -> Self {
        let updates_per_epoch = batches_per_epoch.div_ceil(gradient_accumulation_steps.max(1));
        Self {
            batches_per_epoch,
            updates_per_epoch,
        }
    }

    /// Updates of a run over this many epochs.
    pub fn total(&self, epochs: usize) -> usize {
        self.updates_per_epoch * epochs
    }

    /// Epochs begun by a run of this many updates.
    pub fn epochs_for(&self, max_train_steps: usize) -> usize {
        max_train_steps.div_ceil(self.updates_per_epoch.max(1))
    }
}
