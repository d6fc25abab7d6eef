//! From a file to 8-bit RGB pixels.

use std::io::Cursor;
use std::path::Path;

use image::error::{LimitError, LimitErrorKind};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader};

#[cfg(feature = "avif")]
use super::avif;
use super::jpeg;
use crate::{Error, Result, Size, Transparency};

/// A decoded picture: 8-bit RGB, row by row, with the alpha channel apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Width and height.
    pub size: Size,
    /// `height x width x 3` values.
    pub rgb: Vec<u8>,
    /// `height x width` values, if they were asked for and the file has them.
    pub alpha: Option<Vec<u8>>,
}

/// How a file becomes a [`Picture`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Turn and mirror as the EXIF orientation says.
    pub exif_orientation: bool,
    /// What to do with transparent pixels. With `keep_alpha` they are left as stored.
    pub transparency: Transparency,
    /// Keep the alpha channel.
    pub keep_alpha: bool,
}

impl Default for DecodeOptions {
    fn default() -> Self {
        Self {
            exif_orientation: true,
            transparency: Transparency::default(),
            keep_alpha: false,
        }
    }
}

/// Decodes a picture of any supported format; the content decides, not the extension.
///
/// 16-bit images are scaled to 8 bits, grey and palette images become RGB.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read, [`Error::Decode`] when it is no readable picture.
pub fn decode_file(path: &Path, options: DecodeOptions) -> Result<Picture> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    decode(&bytes, options).map_err(|e| Error::decode(path, e))
}

/// Pixels of 1 GiB, such as 18,900 x 18,900: more is a damaged or hostile header.
const MAX_BYTES: u64 = 1 << 30;

fn decode(bytes: &[u8], options: DecodeOptions) -> image::ImageResult<Picture> {
    let (mut image, orientation) = match image::guess_format(bytes) {
        Ok(ImageFormat::Jpeg) => jpeg::decode(bytes, MAX_BYTES)?,
        #[cfg(feature = "avif")]
        _ if avif::is_avif(bytes) => avif::decode(bytes, MAX_BYTES)?,
        _ => by_image(bytes)?,
    };
    if options.exif_orientation && orientation != Orientation::NoTransforms {
        image.apply_orientation(orientation);
    }
    Ok(to_picture(image, options))
}

fn by_image(bytes: &[u8]) -> image::ImageResult<(DynamicImage, Orientation)> {
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    let mut decoder = reader.into_decoder()?;
    if decoder.total_bytes() > MAX_BYTES {
        return Err(ImageError::Limits(LimitError::from_kind(
            LimitErrorKind::InsufficientMemory,
        )));
    }
    // A damaged EXIF block is no reason to refuse the picture.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    Ok((DynamicImage::from_decoder(decoder)?, orientation))
}

fn to_picture(image: DynamicImage, options: DecodeOptions) -> Picture {
    let size = Size::new(image.width(), image.height());
    if !image.color().has_alpha() {
        return Picture {
            size,
            rgb: image.into_rgb8().into_raw(),
            alpha: None,
        };
    }
    let rgba = image.into_rgba8().into_raw();
    let pixels = rgba.as_chunks::<4>().0;
    if options.keep_alpha {
        let alpha = pixels.iter().map(|p| p[3]).collect();
        let rgb = pixels.iter().flat_map(|&[r, g, b, _]| [r, g, b]).collect();
        return Picture {
            size,
            rgb,
            alpha: Some(alpha),
        };
    }
    let rgb = match options.transparency {
        Transparency::Drop => pixels.iter().flat_map(|&[r, g, b, _]| [r, g, b]).collect(),
        Transparency::Composite(back) => pixels.iter().flat_map(|&p| composite(p, back)).collect(),
    };
    Picture {
        size,
        rgb,
        alpha: None,
    }
}

fn composite([r, g, b, a]: [u8; 4], back: [u8; 3]) -> [u8; 3] {
    let over = |front: u8, back: u8| {
        let sum = u32::from(front) * u32::from(a) + u32::from(back) * u32::from(255 - a);
        // Rounded; at most 255.
        ((sum + 127) / 255) as u8
    };
    [over(r, back[0]), over(g, back[1]), over(b, back[2])]
}
