//! Masks: a folder with one grey image per training image, as weights of the loss.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::dataset::crop;
use crate::folder::FolderListing;
use crate::picture::{DecodeOptions, Picture, decode_file, resize};
use crate::{Error, Interpolation, PlanItem, Result, Size, Transparency};

/// Gives every image the mask of the same base name.
///
/// # Errors
/// [`Error::Mask`] for an image without a mask or a mask without an image.
pub(crate) fn attach<'a>(
    folder: &Path,
    images: impl Iterator<Item = (&'a Path, &'a mut Option<PathBuf>)>,
) -> Result<()> {
    let listing = FolderListing::read(folder)?;
    let stem = |path: &Path| {
        path.file_stem()
            .map(|s| s.to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    let mut masks: BTreeMap<String, PathBuf> =
        listing.images.into_iter().map(|p| (stem(&p), p)).collect();
    for (image, mask) in images {
        let found = masks.remove(&stem(image)).ok_or_else(|| Error::Mask {
            path: image.to_path_buf(),
            what: format!("no mask of the same name in {}", folder.display()),
        })?;
        *mask = Some(found);
    }
    match masks.into_values().next() {
        None => Ok(()),
        Some(path) => {
            let what = "no image of the same name belongs to this mask; remove it or add the image"
                .to_owned();
            Err(Error::Mask { path, what })
        }
    }
}

/// The weights of a mask file, resized and cropped as its image: red channel, 0 to 1.
///
/// # Errors
/// [`Error::Mask`] when its size is not the image's, or the file cannot be decoded.
pub(crate) fn load(
    path: &Path,
    image: Size,
    item: &PlanItem,
    exif_orientation: bool,
) -> Result<Vec<f32>> {
    let options = DecodeOptions {
        exif_orientation,
        transparency: Transparency::Drop,
        keep_alpha: false,
    };
    let picture = decode_file(path, options)?;
    if picture.size != image {
        let what = format!(
            "the mask is {} but its image is {image}; they must have the same size",
            picture.size
        );
        return Err(Error::Mask {
            path: path.to_path_buf(),
            what,
        });
    }
    // The reference always averages areas here, whatever the filter for images.
    let resized = resize(&picture, item.resize, Some(Interpolation::Area));
    let Picture { rgb, .. } = crop(&resized, item);
    Ok(rgb
        .as_chunks::<3>()
        .0
        .iter()
        .map(|pixel| f32::from(pixel[0]) / 255.0)
        .collect())
}

/// Averages a mask over the squares that become one latent pixel each.
///
/// `mask` is `height x width`; the result is `height / factor x width / factor`.
///
/// ```
/// use lora_data::{Size, shrink_mask};
/// assert_eq!(shrink_mask(&[1.0, 0.0, 0.0, 0.0], Size::new(2, 2), 2), [0.25]);
/// ```
pub fn shrink_mask(mask: &[f32], size: Size, factor: u32) -> Vec<f32> {
    let (width, factor) = (size.width as usize, factor.max(1) as usize);
    let columns = width / factor;
    let mut shrunk = Vec::with_capacity(mask.len() / (factor * factor));
    for rows in mask.chunks_exact(width.max(1) * factor) {
        let mut sums = vec![0f32; columns];
        for row in rows.chunks_exact(width.max(1)) {
            for (sum, values) in sums.iter_mut().zip(row.chunks_exact(factor)) {
                *sum += values.iter().sum::<f32>();
            }
        }
        shrunk.extend(sums.iter().map(|sum| sum / (factor * factor) as f32));
    }
    shrunk
}
