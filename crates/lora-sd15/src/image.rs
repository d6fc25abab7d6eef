//! Finished pictures.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

/// An RGB picture, 8 bits per channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// Rows from top to bottom, three bytes per pixel.
    pub rgb: Vec<u8>,
}

impl Image {
    /// From a tensor `[3, h, w]` in [-1, 1]; values are clamped and, as in the web UI,
    /// cut to whole numbers.
    ///
    /// # Errors
    /// [`Error::NotFinite`] when it holds NaN; or when the shape is another.
    pub fn from_tensor(picture: &Tensor) -> Result<Self> {
        let (_, height, width) = picture.dims3()?;
        let values = picture
            .permute((1, 2, 0))?
            .flatten_all()?
            .to_dtype(DType::F32)?
            .to_vec1::<f32>()?;
        if values.iter().any(|v| v.is_nan()) {
            return Err(Error::NotFinite {
                what: "the decoded picture",
                advice: "decode in f32, or use another VAE",
            });
        }
        let rgb = values
            .iter()
            .map(|v| ((v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0) as u8)
            .collect();
        Ok(Self { width, height, rgb })
    }

    /// As a tensor `[3, h, w]` in [-1, 1].
    ///
    /// # Errors
    /// When `rgb` does not have `3 * width * height` bytes.
    pub fn to_tensor(&self, device: &Device) -> Result<Tensor> {
        let values: Vec<f32> = self
            .rgb
            .iter()
            .map(|v| f32::from(*v) / 255.0 * 2.0 - 1.0)
            .collect();
        let tensor = Tensor::from_vec(values, (self.height, self.width, 3), device)?;
        Ok(tensor.permute((2, 0, 1))?.contiguous()?)
    }

    /// The picture as PNG bytes, with the web UI's `parameters` text if given.
    ///
    /// # Errors
    /// When the encoder fails.
    pub fn to_png(&self, parameters: Option<&str>) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        if let Some(text) = parameters {
            let latin1 = text.chars().all(|c| (c as u32) < 256);
            if latin1 {
                encoder
                    .add_text_chunk("parameters".into(), text.into())
                    .map_err(std::io::Error::other)?;
            } else {
                encoder
                    .add_itxt_chunk("parameters".into(), text.into())
                    .map_err(std::io::Error::other)?;
            }
        }
        let mut writer = encoder.write_header().map_err(std::io::Error::other)?;
        writer
            .write_image_data(&self.rgb)
            .map_err(std::io::Error::other)?;
        writer.finish().map_err(std::io::Error::other)?;
        Ok(bytes)
    }

    /// Writes a PNG: temporary file, sync, rename.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_png(&self, path: impl AsRef<Path>, parameters: Option<&str>) -> Result<()> {
        let path = path.as_ref();
        let bytes = self.to_png(parameters).map_err(Error::io(path))?;
        Ok(lora_core::format::write_atomically(path, |out| {
            out.write_all(&bytes)
        })?)
    }
}
