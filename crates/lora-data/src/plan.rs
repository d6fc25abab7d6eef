//! Which images make which batch of an epoch: a pure function of dataset, epoch and seed.

use rand::Rng;
use rand::seq::SliceRandom;

use crate::{Place, Purpose, Size, Streams};

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

/// One draw of an image, with every random decision already made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlanItem {
    /// Number of the image in [`Dataset::images`](crate::Dataset::images).
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
        ((self.image as u64) << 32) | u64::from(self.repeat)
    }
}

/// A small change of colour.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ColorShift {
    /// Turn the hue by this many degrees.
    Hue(f32),
    /// Raise every value (0 to 1) to this power.
    Gamma(f32),
}
