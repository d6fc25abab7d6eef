//! Masks: a folder with one grey image per training image, as weights of the loss.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use crate::dataset::crop;
use crate::folder::FolderListing;
use crate::picture::{DecodeOptions, Picture, decode_file, resize};
use crate::{Error, Interpolation, PlanItem, Result, Size, Transparency};

/// Images that want masks, and the folder of these.
pub(crate) struct Wanted<'a> {
    /// `conditioning_data_dir`.
    pub(crate) masks: &'a Path,
    /// The folder of the images.
    pub(crate) folder: Option<&'a Path>,
    /// Their paths, and where those of the masks go.
    pub(crate) images: Vec<(&'a Path, &'a mut Option<PathBuf>)>,
}

/// Gives every image the mask of the same base name. Where the folder of masks has a folder
/// named like that of the images, the masks lie there; else all folders of images share it.
///
/// # Errors
/// [`Error::Mask`] for an image without a mask, a mask without an image, two masks of one
/// name, and a mask that images of several folders could mean.
pub(crate) fn attach(wanted: Vec<Wanted<'_>>) -> Result<()> {
    let mut folders: BTreeMap<PathBuf, Masks> = BTreeMap::new();
    for Wanted {
        masks,
        folder,
        images,
    } in wanted
    {
        let own = folder
            .and_then(Path::file_name)
            .map(|name| masks.join(name))
            .filter(|own| own.is_dir());
        let masks = own.unwrap_or_else(|| masks.to_path_buf());
        let found = match folders.entry(masks.clone()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(Masks::read(&masks)?),
        };
        for (image, mask) in images {
            *mask = Some(found.of(image, &masks)?);
        }
    }
    let unused = |masks: Masks| masks.0.into_values().find(|(_, image)| image.is_none());
    match folders.into_values().find_map(unused) {
        None => Ok(()),
        Some((path, _)) => {
            let what = "no image of the same name belongs to this mask; remove it or add the image"
                .to_owned();
            Err(Error::Mask { path, what })
        }
    }
}

/// The masks of a folder by base name, with the image that each was given to.
struct Masks(BTreeMap<String, (PathBuf, Option<PathBuf>)>);

impl Masks {
    fn read(folder: &Path) -> Result<Self> {
        let mut masks = BTreeMap::new();
        for path in FolderListing::read(folder)?.images {
            if let Some((other, _)) = masks.insert(stem(&path), (path.clone(), None)) {
                let what = format!("{} has the same name; remove one of both", other.display());
                return Err(Error::Mask { path, what });
            }
        }
        Ok(Self(masks))
    }

    fn of(&mut self, image: &Path, folder: &Path) -> Result<PathBuf> {
        let Some((mask, given)) = self.0.get_mut(&stem(image)) else {
            return Err(Error::Mask {
                path: image.to_path_buf(),
                what: format!("no mask of the same name in {}", folder.display()),
            });
        };
        // Several datasets may show the same image in several sizes.
        match given {
            Some(other) if other != image => Err(Error::Mask {
                path: mask.clone(),
                what: format!(
                    "{} and {} have the same name; put the masks into folders named like those of the images",
                    other.display(),
                    image.display()
                ),
            }),
            _ => {
                *given = Some(image.to_path_buf());
                Ok(mask.clone())
            }
        }
    }
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .map(|s| s.to_string_lossy().into_owned())
        .unwrap_or_default()
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
