//! Finished pictures.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

/// No PNG packs its pixels closer than this: deflate's limit is 1032.
const MOST_PACKED: u64 = 1100;
/// Pixels of 1 GiB: more is a damaged or hostile header.
const MOST_BYTES: u64 = 1 << 30;

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

    /// Reads a PNG of 8 or 16 bits; transparency is laid over white.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::Picture`] when it is no PNG.
    pub fn open_png(path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self::open_png_with_text(path)?.0)
    }

    /// The same with the web UI's `parameters` text, if the file has one.
    ///
    /// # Errors
    /// As [`open_png`](Self::open_png).
    pub fn open_png_with_text(path: impl AsRef<Path>) -> Result<(Self, Option<String>)> {
        let path = path.as_ref();
        let file = std::fs::File::open(path).map_err(Error::io(path))?;
        let length = file.metadata().map_err(Error::io(path))?.len();
        let bad = |what: String| Error::Picture {
            what: format!("{}: {what}", path.display()),
        };
        let mut decoder = png::Decoder::new(std::io::BufReader::new(file));
        decoder.set_transformations(png::Transformations::normalize_to_color8());
        let mut reader = decoder.read_info().map_err(|e| bad(e.to_string()))?;
        let size = reader.output_buffer_size().unwrap_or(usize::MAX);
        if size as u64 > length.saturating_mul(MOST_PACKED).min(MOST_BYTES) {
            let (width, height) = (reader.info().width, reader.info().height);
            return Err(bad(format!(
                "a file of {length} bytes cannot hold {width} x {height} pixels, or they are too many"
            )));
        }
        let mut bytes = vec![0; size];
        let frame = reader
            .next_frame(&mut bytes)
            .map_err(|e| bad(e.to_string()))?;
        // Texts may stand behind the picture.
        reader.finish().map_err(|e| bad(e.to_string()))?;
        let pixels = bytes.get(..frame.buffer_size()).unwrap_or(&bytes);
        let over_white = |v: u8, alpha: u8| {
            let (v, alpha) = (u32::from(v), u32::from(alpha));
            ((v * alpha + 255 * (255 - alpha) + 127) / 255) as u8
        };
        let rgb: Vec<u8> = match frame.color_type {
            png::ColorType::Rgb => pixels.to_vec(),
            png::ColorType::Grayscale => pixels.iter().flat_map(|v| [*v; 3]).collect(),
            png::ColorType::GrayscaleAlpha => {
                let (pixels, _) = pixels.as_chunks::<2>();
                pixels
                    .iter()
                    .flat_map(|&[v, a]| [over_white(v, a); 3])
                    .collect()
            }
            png::ColorType::Rgba => {
                let (pixels, _) = pixels.as_chunks::<4>();
                let flat = |&[r, g, b, a]: &[u8; 4]| [r, g, b].map(|v| over_white(v, a));
                pixels.iter().flat_map(flat).collect()
            }
            other => return Err(bad(format!("{other:?} pixels are not supported"))),
        };
        let info = reader.info();
        let plain = info.uncompressed_latin1_text.iter();
        let mut texts = plain.map(|t| (t.keyword.clone(), Some(t.text.clone())));
        let text = texts
            .find(|(key, _)| key == "parameters")
            .and_then(|(_, text)| text);
        let unicode = info.utf8_text.iter().find(|t| t.keyword == "parameters");
        let text = text.or_else(|| unicode.and_then(|t| t.get_text().ok()));
        let compressed = info.compressed_latin1_text.iter();
        let text = text.or_else(|| {
            let mut found = compressed.filter(|t| t.keyword == "parameters");
            found.next().and_then(|t| t.get_text().ok())
        });
        let image = Self {
            width: frame.width as usize,
            height: frame.height as usize,
            rgb,
        };
        Ok((image, text))
    }
}
