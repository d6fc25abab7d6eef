//! Aspect-ratio buckets: which sizes there are and which one an image goes to.
//!
//! A bucket is a size of about the target area. Every image is resized to cover
//! its bucket and cropped to it, so that a batch has one size. Table and
//! assignment are sd-scripts', number for number.

use crate::{DatasetConfig, Error, Result, Size};

/// The buckets of one dataset.
///
/// ```
/// use lora_data::{BucketTable, DatasetConfig, Size};
///
/// let table = BucketTable::new(&DatasetConfig::default())?; // 512, buckets on
/// let fit = table.assign(Size::new(1920, 1080))?;
/// assert_eq!(fit.bucket, Size::new(640, 384));
/// assert_eq!(fit.resized, Size::new(683, 384));
/// # Ok::<(), lora_data::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct BucketTable {
    rule: Rule,
    sizes: Vec<Size>,
}

/// How one image is brought to its bucket.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BucketFit {
    /// The bucket, which is the size the model sees.
    pub bucket: Size,
    /// The size the image is resized to before it is cropped to the bucket.
    pub resized: Size,
    /// Aspect ratio of the bucket minus that of the image.
    pub aspect_error: f64,
}

impl BucketFit {
    /// Left and top of the centre crop.
    pub fn center_crop(&self) -> (u32, u32) {
        let offset = |resized: u32, bucket: u32| resized.saturating_sub(bucket) / 2;
        (
            offset(self.resized.width, self.bucket.width),
            offset(self.resized.height, self.bucket.height),
        )
    }

    /// Part of the resized image that the crop removes, from 0 to 1.
    pub fn cropped(&self) -> f64 {
        1.0 - self.bucket.area() as f64 / self.resized.area() as f64
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Rule {
    /// The nearest of a fixed table.
    Table,
    /// Sizes made to fit each image, at most this area.
    NoUpscale { area: u64, step: u32 },
}

impl BucketTable {
    /// The buckets for a dataset's options. With buckets off the resolution is the only one.
    ///
    /// # Errors
    /// [`Error::Option`] when `min_bucket_reso` or `max_bucket_reso` leave out the resolution.
    pub fn new(config: &DatasetConfig) -> Result<Self> {
        let step = config.bucket_reso_steps;
        if !config.enable_bucket {
            return Ok(Self {
                rule: Rule::Table,
                sizes: vec![config.resolution],
            });
        }
        if step == 0 {
            return Err(Error::option(
                "bucket_reso_steps",
                "0 is no step, 64 is usual",
            ));
        }
        let area = config.resolution.area();
        if config.bucket_no_upscale {
            return Ok(Self {
                rule: Rule::NoUpscale { area, step },
                sizes: Vec::new(),
            });
        }
        let (min, max) = side_limits(config)?;
        Ok(Self {
            rule: Rule::Table,
            sizes: table(area, min, max, step),
        })
    }

    /// The fixed table, sorted by width and height. Empty with `bucket_no_upscale`.
    pub fn sizes(&self) -> &[Size] {
        &self.sizes
    }

    /// The bucket of an image and the size it is resized to.
    ///
    /// With `bucket_no_upscale` a side smaller than the step gives a bucket side of 0;
    /// [`Dataset`](crate::Dataset) enlarges such images and reports them.
    ///
    /// # Errors
    /// [`Error::TooNarrow`] when no size of at least one step keeps the aspect ratio.
    pub fn assign(&self, image: Size) -> Result<BucketFit> {
        match self.rule {
            Rule::Table => Ok(fit_table(&self.sizes, image)),
            Rule::NoUpscale { area, step } => fit_without_upscale(image, area, step),
        }
    }
}

/// `min_bucket_reso` rounded down and `max_bucket_reso` rounded up to the step.
///
/// # Errors
/// [`Error::Option`] when the resolution lies outside.
pub fn side_limits(config: &DatasetConfig) -> Result<(u32, u32)> {
    let step = config.bucket_reso_steps.max(1);
    let Size { width, height } = config.resolution;
    let min = config.min_bucket_reso - config.min_bucket_reso % step;
    let max = config.max_bucket_reso.div_ceil(step).saturating_mul(step);
    if min > width.min(height) {
        let what = format!(
            "{min} is larger than the smaller side of the resolution {}",
            config.resolution
        );
        return Err(Error::option("min_bucket_reso", what));
    }
    if max < width.max(height) {
        let what = format!(
            "{max} is smaller than the larger side of the resolution {}",
            config.resolution
        );
        return Err(Error::option("max_bucket_reso", what));
    }
    Ok((min, max))
}

fn table(area: u64, min: u32, max: u32, step: u32) -> Vec<Size> {
    let step = u64::from(step);
    let (min, max) = (u64::from(min).max(step), u64::from(max));
    let square = area.isqrt() / step * step;
    let mut sides = vec![(square, square)];
    let mut width = min;
    while width <= max {
        let height = max.min(area / width / step * step);
        if height >= min {
            sides.push((width, height));
            sides.push((height, width));
        }
        width += step;
    }
    // Sides are at most `max`, which came from a u32.
    let mut sizes: Vec<Size> = sides
        .into_iter()
        .map(|(w, h)| Size::new(w as u32, h as u32))
        .collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

fn fit_table(sizes: &[Size], image: Size) -> BucketFit {
    let aspect = image.aspect();
    let error = |size: &Size| (size.aspect() - aspect).abs();
    let nearest = || {
        // The first of equals wins, so `min_by` (which keeps the first) fits.
        sizes
            .iter()
            .copied()
            .min_by(|a, b| error(a).total_cmp(&error(b)))
            .unwrap_or(image)
    };
    let bucket = if sizes.contains(&image) {
        image
    } else {
        nearest()
    };
    BucketFit {
        bucket,
        resized: cover(image, bucket),
        aspect_error: bucket.aspect() - aspect,
    }
}

/// The size of `image` scaled so that it just covers `bucket`.
pub(crate) fn cover(image: Size, bucket: Size) -> Size {
    let (width, height) = (f64::from(image.width), f64::from(image.height));
    let scale = if image.aspect() > bucket.aspect() {
        f64::from(bucket.height) / height
    } else {
        f64::from(bucket.width) / width
    };
    Size::new(round_half_up(width * scale), round_half_up(height * scale))
}

fn fit_without_upscale(image: Size, area: u64, step: u32) -> Result<BucketFit> {
    let aspect = image.aspect();
    let resized = if image.area() > area {
        shrink_to_steps(image, area, step)?
    } else {
        image
    };
    let bucket = Size::new(
        resized.width - resized.width % step,
        resized.height - resized.height % step,
    );
    Ok(BucketFit {
        bucket,
        resized,
        aspect_error: bucket.aspect() - aspect,
    })
}

/// The size of about `area` with the image's aspect ratio that has one side on the step grid.
fn shrink_to_steps(image: Size, area: u64, step: u32) -> Result<Size> {
    let aspect = image.aspect();
    let on_grid = |side: f64| {
        let side = round_half_up(side);
        side - side % step
    };
    let wanted_width = (area as f64 * aspect).sqrt();
    let width = on_grid(wanted_width);
    let height_of_width = on_grid(f64::from(width) / aspect);
    let height = on_grid(area as f64 / wanted_width);
    let width_of_height = on_grid(f64::from(height) * aspect);
    if height_of_width == 0 || height == 0 {
        return Err(Error::TooNarrow { image, step });
    }
    let by_width = Size::new(width, height_of_width).aspect();
    let by_height = Size::new(width_of_height, height).aspect();
    Ok(if (by_width - aspect).abs() < (by_height - aspect).abs() {
        Size::new(width, round_half_up(f64::from(width) / aspect))
    } else {
        Size::new(round_half_up(f64::from(height) * aspect), height)
    })
}

/// `floor(x + 0.5)`, which is how sd-scripts rounds sizes.
pub(crate) fn round_half_up(x: f64) -> u32 {
    (x + 0.5) as u32
}

/// Where the original picture lies relative to its bucket: left, top, right, bottom.
///
/// sd-scripts stores these numbers in its latent caches and newer models take them as input.
pub fn crop_ltrb(bucket: Size, image: Size) -> [f64; 4] {
    let (width, height) = (f64::from(bucket.width), f64::from(bucket.height));
    let (shown_width, shown_height) = if bucket.aspect() > image.aspect() {
        (height * image.aspect(), height)
    } else {
        (width, width / image.aspect())
    };
    let left = ((width - shown_width) / 2.0).floor();
    let top = ((height - shown_height) / 2.0).floor();
    [left, top, left + shown_width, top + shown_height]
}
