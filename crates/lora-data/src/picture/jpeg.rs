//! JPEG files, by the decoder behind the `image` crate and with its choices, read straight
//! from memory.
//!
//! `image` gives that decoder a reader that goes through `std::io` for every four bytes,
//! which is a tenth of the time of a photo.

use image::error::UnsupportedErrorKind::GenericFeature;
use image::error::{DecodingError, ImageFormatHint, LimitError, LimitErrorKind, UnsupportedError};
use image::metadata::Orientation;
use image::{DynamicImage, GrayImage, ImageError, ImageFormat, ImageResult, RgbImage};
use zune_core::bytestream::{ZByteIoError, ZByteReaderTrait, ZSeekFrom};
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;

/// Pixels as they are stored, and how they are to be turned.
pub(super) fn decode(bytes: &[u8], most: u64) -> ImageResult<(DynamicImage, Orientation)> {
    let options = DecoderOptions::default()
        .set_strict_mode(false)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX);
    let mut header = JpegDecoder::new_with_options(Bytes::new(bytes), options);
    header.decode_headers().map_err(error)?;
    let (Some((width, height)), Some(stored)) = (header.dimensions(), header.input_colorspace())
    else {
        return Err(damaged("the header has no size"));
    };
    let (space, channels) = match stored {
        ColorSpace::Luma => (ColorSpace::Luma, 1),
        _ => (ColorSpace::RGB, 3),
    };
    // Neither side of a JPEG has more than 65,535 pixels.
    let count = width * height * channels;
    if count as u64 > most {
        return Err(ImageError::Limits(LimitError::from_kind(
            LimitErrorKind::InsufficientMemory,
        )));
    }
    let exif = header
        .exif()
        .and_then(|exif| Orientation::from_exif_chunk(exif));
    let options = options.jpeg_set_out_colorspace(space);
    // Zeros, as what a damaged file does not fill must not depend on the picture before it.
    let mut pixels = vec![0; count];
    JpegDecoder::new_with_options(Bytes::new(bytes), options)
        .decode_into(&mut pixels)
        .map_err(error)?;
    let (width, height) = (width as u32, height as u32);
    let image = if channels == 1 {
        GrayImage::from_raw(width, height, pixels).map(DynamicImage::from)
    } else {
        RgbImage::from_raw(width, height, pixels).map(DynamicImage::from)
    };
    let image = image.ok_or_else(|| damaged("the pixels do not fill the size"))?;
    Ok((image, exif.unwrap_or(Orientation::NoTransforms)))
}

/// In the words of the `image` crate.
fn error(error: DecodeErrors) -> ImageError {
    let jpeg = ImageFormatHint::Exact(ImageFormat::Jpeg);
    match error {
        DecodeErrors::Unsupported(what) => {
            let what = GenericFeature(format!("{what:?}"));
            ImageError::Unsupported(UnsupportedError::from_format_and_kind(jpeg, what))
        }
        other => ImageError::Decoding(DecodingError::new(jpeg, other)),
    }
}

fn damaged(what: &'static str) -> ImageError {
    ImageError::Decoding(DecodingError::new(ImageFormat::Jpeg.into(), what))
}

/// A file in memory. Reading four bytes is a comparison and a load.
struct Bytes<'a> {
    bytes: &'a [u8],
    /// May lie behind the end.
    position: usize,
}

impl<'a> Bytes<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    #[inline(always)]
    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.position..).unwrap_or_default()
    }
}

impl ZByteReaderTrait for Bytes<'_> {
    #[inline(always)]
    fn read_byte_no_error(&mut self) -> u8 {
        match self.bytes.get(self.position) {
            Some(&byte) => {
                self.position += 1;
                byte
            }
            None => 0,
        }
    }

    #[inline(always)]
    fn read_exact_bytes(&mut self, buffer: &mut [u8]) -> Result<(), ZByteIoError> {
        self.peek_exact_bytes(buffer)?;
        self.position += buffer.len();
        Ok(())
    }

    #[inline(always)]
    fn read_bytes(&mut self, buffer: &mut [u8]) -> Result<usize, ZByteIoError> {
        let count = self.peek_bytes(buffer)?;
        self.position += count;
        Ok(count)
    }

    #[inline(always)]
    fn peek_bytes(&mut self, buffer: &mut [u8]) -> Result<usize, ZByteIoError> {
        let rest = self.rest();
        let count = rest.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(rest) {
            *to = *from;
        }
        Ok(count)
    }

    #[inline(always)]
    fn peek_exact_bytes(&mut self, buffer: &mut [u8]) -> Result<(), ZByteIoError> {
        let rest = self.rest();
        match rest.get(..buffer.len()) {
            Some(bytes) => {
                buffer.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(ZByteIoError::NotEnoughBytes(rest.len(), buffer.len())),
        }
    }

    #[inline(always)]
    fn z_seek(&mut self, from: ZSeekFrom) -> Result<u64, ZByteIoError> {
        let (base, offset) = match from {
            ZSeekFrom::Start(position) => (0, i64::try_from(position).unwrap_or(i64::MAX)),
            ZSeekFrom::End(offset) => (self.bytes.len(), offset),
            ZSeekFrom::Current(offset) => (self.position, offset),
        };
        let position = isize::try_from(offset)
            .ok()
            .and_then(|offset| base.checked_add_signed(offset));
        match position {
            Some(position) => {
                self.position = position;
                Ok(position as u64)
            }
            None => Err(ZByteIoError::SeekError("a position before the start")),
        }
    }

    #[inline(always)]
    fn is_eof(&mut self) -> Result<bool, ZByteIoError> {
        Ok(self.position >= self.bytes.len())
    }

    #[inline(always)]
    fn z_position(&mut self) -> Result<u64, ZByteIoError> {
        Ok(self.position as u64)
    }

    fn read_remaining(&mut self, sink: &mut Vec<u8>) -> Result<usize, ZByteIoError> {
        let rest = self.rest();
        sink.extend_from_slice(rest);
        self.position = self.position.max(self.bytes.len());
        Ok(rest.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::ImageDecoder;
    use jpeg_encoder::{ColorType, Encoder, SamplingFactor};

    /// Damage can make the size larger.
    const MOST: u64 = 1 << 22;

    /// What the `image` crate makes of it.
    fn by_image(bytes: &[u8]) -> ImageResult<DynamicImage> {
        let reader = std::io::Cursor::new(bytes);
        let decoder = image::codecs::jpeg::JpegDecoder::new(reader)?;
        if decoder.total_bytes() > MOST {
            let much = LimitError::from_kind(LimitErrorKind::InsufficientMemory);
            return Err(ImageError::Limits(much));
        }
        DynamicImage::from_decoder(decoder)
    }

    fn same(bytes: &[u8], what: &str) {
        match (by_image(bytes), decode(bytes, MOST)) {
            (Ok(expected), Ok((image, _))) => assert!(expected == image, "{what}"),
            (Err(expected), Err(error)) => {
                assert_eq!(expected.to_string(), error.to_string(), "{what}");
            }
            (expected, got) => {
                let (expected, got) = (expected.is_ok(), got.is_ok());
                panic!("{what}: the image crate reads it: {expected}, this does: {got}");
            }
        }
    }

    fn files() -> Vec<(String, Vec<u8>)> {
        let (width, height) = (61, 45);
        let mut files = Vec::new();
        for (color, channels) in [
            (ColorType::Luma, 1),
            (ColorType::Rgb, 3),
            (ColorType::Cmyk, 4),
            (ColorType::CmykAsYcck, 4),
        ] {
            let pixel = |i: usize| (i * i / 37 + i * 11) as u8;
            let pixels: Vec<u8> = (0..61 * 45 * channels).map(pixel).collect();
            for sampling in [
                SamplingFactor::R_4_4_4,
                SamplingFactor::R_4_2_0,
                SamplingFactor::R_4_2_2,
            ] {
                for progressive in [false, true] {
                    let mut bytes = Vec::new();
                    let mut encoder = Encoder::new(&mut bytes, 80);
                    encoder.set_sampling_factor(sampling);
                    encoder.set_progressive(progressive);
                    encoder.set_restart_interval(if progressive { 0 } else { 3 });
                    encoder
                        .encode(&pixels, width, height, color)
                        .expect("a JPEG");
                    files.push((format!("{channels} {sampling:?} {progressive}"), bytes));
                }
            }
        }
        files
    }

    #[test]
    fn pixels_and_errors_are_those_of_the_image_crate() {
        for (name, bytes) in files() {
            same(&bytes, &name);
            for step in 1..60 {
                let at = bytes.len() * step / 60;
                same(&bytes[..at], &format!("{name}, cut off at {at}"));
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << (step % 8);
                damaged[at / 2] = 0xff;
                same(&damaged, &format!("{name}, damaged at {at}"));
            }
        }
    }

    #[test]
    fn a_size_over_the_limit_is_refused_before_memory_is_taken() {
        for (name, bytes) in files() {
            assert!(
                matches!(decode(&bytes, 61 * 45 - 1), Err(ImageError::Limits(_))),
                "{name}"
            );
        }
    }
}
