//! From a planned draw to pixels.

use super::Dataset;
use crate::picture::{DecodeOptions, Picture, decode_file, resize, shift_colors, shrink_part};
use crate::{Error, ImageRecord, PlanItem, Result, Size, mask};

/// An image as the model sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// Width and height.
    pub size: Size,
    /// Red, green and blue planes, row by row, from -1 to 1: `3 x height x width`.
    pub data: Vec<f32>,
    /// Weight of each pixel in the loss, from 0 to 1: `height x width`.
    pub mask: Option<Vec<f32>>,
}

impl Dataset {
    /// Decodes, resizes, crops and augments one draw. Everything random was decided by the plan.
    ///
    /// # Errors
    /// [`Error::Changed`] when the file is not what was listed, [`Error::Decode`], [`Error::Mask`].
    pub fn pixels(&self, item: &PlanItem) -> Result<Pixels> {
        let (picture, mask) = self.cropped(item)?;
        Ok(Pixels {
            size: picture.size,
            data: to_planes(&picture.rgb),
            mask,
        })
    }

    /// The same as 8-bit RGB, with the mask.
    pub(crate) fn cropped(&self, item: &PlanItem) -> Result<(Picture, Option<Vec<f32>>)> {
        let count = self.images().len();
        let image = self.images().get(item.image).ok_or(Error::OutOfRange {
            what: "image",
            index: item.image,
            count,
        })?;
        let end = (
            item.crop.0.saturating_add(item.size.width),
            item.crop.1.saturating_add(item.size.height),
        );
        if !item.resize.covers(Size::from(end)) {
            let what = format!(
                "a crop of {} at {:?} leaves the image of {}",
                item.size, item.crop, item.resize
            );
            return Err(Error::option("crop", what));
        }
        let options = self.subset(image);
        let decode = DecodeOptions {
            exif_orientation: self.config().exif_orientation,
            transparency: self.config().transparency,
            keep_alpha: options.alpha_mask,
        };
        let picture = decode_listed(image, decode)?;
        let dataset = self.config().datasets.get(image.dataset);
        let filter = options
            .resize_interpolation
            .or(dataset.and_then(|d| d.resize_interpolation));
        let mut picture = shrink_part(&picture, item.resize, filter, item.crop, item.size)
            .unwrap_or_else(|| crop(&resize(&picture, item.resize, filter), item));
        if let Some(shift) = item.color {
            shift_colors(&mut picture.rgb, shift);
        }
        let mut mask = match (&image.mask, options.alpha_mask) {
            (Some(file), _) => Some(mask::load(file, image.size, item, decode.exif_orientation)?),
            (None, true) => Some(alpha_weights(&picture)),
            (None, false) => None,
        };
        if item.flip {
            mirror::<3, u8>(&mut picture.rgb, item.size.width);
            if let Some(mask) = &mut mask {
                mirror::<1, f32>(mask, item.size.width);
            }
        }
        Ok((picture, mask))
    }
}

fn decode_listed(image: &ImageRecord, options: DecodeOptions) -> Result<Picture> {
    let picture = decode_file(&image.path, options).map_err(|error| match error {
        Error::Io { path, source } if source.kind() == std::io::ErrorKind::NotFound => {
            Error::Changed {
                path,
                what: "the file is gone".to_owned(),
            }
        }
        other => other,
    })?;
    if picture.size != image.size {
        let what = format!(
            "it is {} now and was {} when it was listed",
            picture.size, image.size
        );
        return Err(Error::Changed {
            path: image.path.clone(),
            what,
        });
    }
    Ok(picture)
}

/// The part of a resized picture that the plan wants.
pub(crate) fn crop(picture: &Picture, item: &PlanItem) -> Picture {
    if picture.size == item.size {
        return picture.clone();
    }
    Picture {
        size: item.size,
        rgb: crop_rows::<3>(&picture.rgb, picture.size, item),
        alpha: picture
            .alpha
            .as_ref()
            .map(|alpha| crop_rows::<1>(alpha, picture.size, item)),
    }
}

fn crop_rows<const C: usize>(source: &[u8], from: Size, item: &PlanItem) -> Vec<u8> {
    let columns = item.crop.0 as usize * C..(item.crop.0 + item.size.width) as usize * C;
    let rows = source.chunks_exact(from.width as usize * C);
    let rows = rows
        .skip(item.crop.1 as usize)
        .take(item.size.height as usize);
    rows.filter_map(|row| row.get(columns.clone()))
        .collect::<Vec<_>>()
        .concat()
}

fn alpha_weights(picture: &Picture) -> Vec<f32> {
    match &picture.alpha {
        Some(alpha) => alpha.iter().map(|&a| f32::from(a) / 255.0).collect(),
        None => vec![1.0; picture.rgb.len() / 3],
    }
}

fn mirror<const C: usize, T: Copy>(values: &mut [T], width: u32) {
    for row in values.chunks_exact_mut(width as usize * C) {
        row.as_chunks_mut::<C>().0.reverse();
    }
}

/// Interleaved bytes to planes from -1 to 1.
pub(crate) fn to_planes(rgb: &[u8]) -> Vec<f32> {
    let values: [f32; 256] = std::array::from_fn(|value| (value as f32 / 255.0 - 0.5) / 0.5);
    let pixels = rgb.as_chunks::<3>().0;
    let plane = |channel: usize| {
        pixels
            .iter()
            .map(move |pixel| values[usize::from(pixel[channel])])
    };
    plane(0).chain(plane(1)).chain(plane(2)).collect()
}
