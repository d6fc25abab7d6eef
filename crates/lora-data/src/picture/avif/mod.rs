//! AVIF: its container is read here, its AV1 data by rav1d, the translation of dav1d to Rust.
//!
//! As Pillow does with libavif: chroma is interpolated linearly, colours that were multiplied
//! by alpha are divided by it, transfer functions and ICC profiles change nothing.

mod container;

use image::error::{DecodingError, LimitError, LimitErrorKind};
use image::metadata::Orientation;
use image::{DynamicImage, ImageError, ImageFormat, ImageResult, RgbImage, RgbaImage};
use re_rav1d::dav1d::pixel::{MatrixCoefficients, YUVRange};
use re_rav1d::dav1d::{
    Decoder, Error, Picture, PixelLayout, PlanarImageComponent, Plane, Settings,
};

pub(super) use container::{is_avif, parse};

use crate::Size;

/// Bytes of a pixel in planes of 16 bits.
const PLANES: u64 = 6;

/// Pixels as they are stored, and how they are to be turned.
pub(super) fn decode(bytes: &[u8], most: u64) -> ImageResult<(DynamicImage, Orientation)> {
    let header = container::find_header(bytes).map_err(damaged)?;
    let container = parse(header).map_err(damaged)?;
    let size = container.size;
    let pixels = u64::from(size.width) * u64::from(size.height);
    if pixels.saturating_mul(PLANES) > most {
        return Err(ImageError::Limits(LimitError::from_kind(
            LimitErrorKind::InsufficientMemory,
        )));
    }
    let frame = |extents| {
        let data = container::data(bytes, &container, extents).map_err(damaged)?;
        frame(data, size)
    };
    let color = frame(&container.color)?;
    let rgb = to_rgb(&color, size, container.matrix)?;
    let image = match &container.alpha {
        Some(extents) => {
            let alpha = to_alpha(&frame(extents)?, size)?;
            let rgba = with_alpha(&rgb, &alpha, container.premultiplied);
            RgbaImage::from_raw(size.width, size.height, rgba).map(DynamicImage::from)
        }
        None => RgbImage::from_raw(size.width, size.height, rgb).map(DynamicImage::from),
    };
    let image = image.ok_or_else(|| damaged("the pixels do not fill the size"))?;
    Ok((image, container.orientation))
}

fn damaged(what: impl Into<String>) -> ImageError {
    ImageError::Decoding(DecodingError::new(ImageFormat::Avif.into(), what.into()))
}

/// Decodes one frame, which must have the announced size.
fn frame(data: Vec<u8>, size: Size) -> ImageResult<Picture> {
    let wrong = |error: Error| damaged(error.to_string());
    let mut settings = Settings::new();
    // Pictures are loaded side by side already.
    settings.set_n_threads(1);
    settings.set_max_frame_delay(1);
    settings.set_all_layers(false);
    // A frame of another size must not take memory either.
    settings.set_frame_size_limit(size.width.saturating_mul(size.height));
    let mut decoder = Decoder::with_settings(&settings).map_err(wrong)?;
    let mut sent = decoder.send_data(data, None, None, None);
    // Data comes in at most a few parts.
    for _ in 0..16 {
        match sent {
            Ok(()) | Err(Error::Again) => {}
            Err(error) => return Err(wrong(error)),
        }
        match decoder.get_picture() {
            Ok(picture) if (picture.width(), picture.height()) == (size.width, size.height) => {
                return Ok(picture);
            }
            Ok(_) => return Err(damaged("the size of the image is not the announced one")),
            Err(Error::Again) => sent = decoder.send_pending_data(),
            Err(error) => return Err(wrong(error)),
        }
    }
    Err(damaged("the data holds no image"))
}

/// The rows of one plane, as numbers whatever their bits.
struct Rows {
    plane: Plane,
    stride: usize,
    wide: bool,
    width: usize,
    height: usize,
}

impl Rows {
    fn new(picture: &Picture, component: PlanarImageComponent, halved: (bool, bool)) -> Self {
        let side = |length: u32, halved: bool| (length as usize).div_ceil(1 + usize::from(halved));
        Self {
            plane: picture.plane(component),
            stride: picture.stride(component) as usize,
            wide: picture.bit_depth() > 8,
            width: side(picture.width(), halved.0),
            height: side(picture.height(), halved.1),
        }
    }

    /// Row `y`, the last one beyond the end.
    fn read(&self, y: usize, row: &mut Vec<f32>) -> ImageResult<()> {
        let y = y.min(self.height.saturating_sub(1));
        let length = self.width * (1 + usize::from(self.wide));
        let start = y * self.stride;
        let bytes = self.plane.get(start..start + length);
        let bytes = bytes.ok_or_else(|| damaged("a plane is too small"))?;
        row.clear();
        if self.wide {
            let values = bytes.as_chunks().0.iter();
            row.extend(values.map(|&value| f32::from(u16::from_ne_bytes(value))));
        } else {
            row.extend(bytes.iter().map(|&value| f32::from(value)));
        }
        Ok(())
    }
}

/// From stored numbers to 0 to 1 and to -0.5 to 0.5.
#[derive(Clone, Copy)]
struct Range {
    luma: (f32, f32),
    chroma: (f32, f32),
}

impl Range {
    fn new(picture: &Picture, full: bool) -> ImageResult<Self> {
        let bits = picture.bits_per_component();
        let bits = bits.ok_or_else(|| damaged("the bits of a value are not known"))?;
        let top = ((1u32 << bits.0) - 1) as f32;
        let unit = (1u32 << (bits.0 - 8)) as f32;
        let middle = 128.0 * unit;
        Ok(if full {
            Self {
                luma: (0.0, top),
                chroma: (middle, top),
            }
        } else {
            Self {
                luma: (16.0 * unit, 219.0 * unit),
                chroma: (middle, 224.0 * unit),
            }
        })
    }
}

fn scaled(value: f32, (zero, one): (f32, f32)) -> f32 {
    (value - zero) / one
}

fn to_byte(value: f32) -> u8 {
    (value.clamp(0.0, 1.0) * 255.0 + 0.5) as u8
}

fn is_full(picture: &Picture) -> bool {
    picture.color_range() == YUVRange::Full
}

fn to_alpha(picture: &Picture, size: Size) -> ImageResult<Vec<u8>> {
    let range = Range::new(picture, is_full(picture))?;
    let rows = Rows::new(picture, PlanarImageComponent::Y, (false, false));
    let mut alpha = Vec::with_capacity(size.width as usize * size.height as usize);
    let mut row = Vec::new();
    for y in 0..size.height as usize {
        rows.read(y, &mut row)?;
        alpha.extend(row.iter().map(|&value| to_byte(scaled(value, range.luma))));
    }
    Ok(alpha)
}

fn with_alpha(rgb: &[u8], alpha: &[u8], premultiplied: bool) -> Vec<u8> {
    let pixels = rgb.as_chunks::<3>().0.iter().zip(alpha);
    let rgba = pixels.flat_map(|(&rgb, &alpha)| {
        let [red, green, blue] = if premultiplied && alpha > 0 {
            let (alpha, half) = (u32::from(alpha), u32::from(alpha) / 2);
            rgb.map(|value| ((u32::from(value) * 255 + half) / alpha).min(255) as u8)
        } else {
            rgb
        };
        [red, green, blue, alpha]
    });
    rgba.collect()
}

/// How three planes become red, green and blue.
#[derive(Clone, Copy)]
enum Matrix {
    /// They are green, blue and red.
    Identity,
    /// The shares of red and blue in the luma.
    Shares(f32, f32),
}

impl Matrix {
    /// By the number that standards give it.
    fn new(number: u16) -> ImageResult<Self> {
        Ok(match number {
            0 => Self::Identity,
            1 => Self::Shares(0.2126, 0.0722),
            // What is not told is taken for BT.601, as libavif does.
            2 | 5 | 6 => Self::Shares(0.299, 0.114),
            4 => Self::Shares(0.30, 0.11),
            7 => Self::Shares(0.212, 0.087),
            9 => Self::Shares(0.2627, 0.0593),
            _ => return Err(damaged(format!("colour matrix {number} is not read"))),
        })
    }

    fn of(picture: &Picture) -> ImageResult<Self> {
        Self::new(match picture.matrix_coefficients() {
            MatrixCoefficients::Identity => 0,
            MatrixCoefficients::BT709 => 1,
            MatrixCoefficients::Unspecified => 2,
            MatrixCoefficients::BT470M => 4,
            MatrixCoefficients::BT470BG | MatrixCoefficients::ST170M => 6,
            MatrixCoefficients::ST240M => 7,
            MatrixCoefficients::BT2020NonConstantLuminance => 9,
            other => return Err(damaged(format!("colour matrix {other} is not read"))),
        })
    }

    fn rgb(self, luma: f32, blue: f32, red: f32) -> [f32; 3] {
        match self {
            Self::Identity => [red, luma, blue],
            Self::Shares(kr, kb) => {
                let (red, blue) = (2.0 * (1.0 - kr) * red, 2.0 * (1.0 - kb) * blue);
                let green = luma - (kr * red + kb * blue) / (1.0 - kr - kb);
                [luma + red, green, luma + blue]
            }
        }
    }
}

fn to_rgb(picture: &Picture, size: Size, named: Option<(u16, bool)>) -> ImageResult<Vec<u8>> {
    let (matrix, full) = match named {
        Some((number, full)) => (Matrix::new(number)?, full),
        None => (Matrix::of(picture)?, is_full(picture)),
    };
    let range = Range::new(picture, full)?;
    let halved = match picture.pixel_layout() {
        PixelLayout::I400 => None,
        PixelLayout::I420 => Some((true, true)),
        PixelLayout::I422 => Some((true, false)),
        PixelLayout::I444 => Some((false, false)),
    };
    let luma = Rows::new(picture, PlanarImageComponent::Y, (false, false));
    let chroma = halved.map(|halved| {
        let rows = |component| Chroma::new(Rows::new(picture, component, halved), halved);
        (rows(PlanarImageComponent::U), rows(PlanarImageComponent::V))
    });
    let mut rgb = Vec::with_capacity(size.width as usize * size.height as usize * 3);
    let mut row = Vec::new();
    let Some((mut blues, mut reds)) = chroma else {
        for y in 0..size.height as usize {
            luma.read(y, &mut row)?;
            rgb.extend(
                row.iter()
                    .flat_map(|&v| [to_byte(scaled(v, range.luma)); 3]),
            );
        }
        return Ok(rgb);
    };
    if matches!(matrix, Matrix::Identity) && halved != Some((false, false)) {
        return Err(damaged("planes of red, green and blue differ in size"));
    }
    let chroma_range = match matrix {
        Matrix::Identity => range.luma,
        Matrix::Shares(..) => range.chroma,
    };
    for y in 0..size.height as usize {
        luma.read(y, &mut row)?;
        blues.read(y)?;
        reds.read(y)?;
        for (x, &luma) in row.iter().enumerate() {
            let [blue, red] = [blues.at(x), reds.at(x)].map(|v| scaled(v, chroma_range));
            let luma = scaled(luma, range.luma);
            rgb.extend(matrix.rgb(luma, blue, red).map(to_byte));
        }
    }
    Ok(rgb)
}

/// A chroma plane in the size of the luma: the nearest value counts three times as much
/// as the next one, in each direction in which there are half as many.
struct Chroma {
    rows: Rows,
    halved: (bool, bool),
    mixed: Vec<f32>,
    next: Vec<f32>,
}

impl Chroma {
    fn new(rows: Rows, halved: (bool, bool)) -> Self {
        Self {
            rows,
            halved,
            mixed: Vec::new(),
            next: Vec::new(),
        }
    }

    /// The nearest of halved values to `i`, and the second nearest.
    fn neighbours(i: usize, count: usize) -> (usize, usize) {
        let near = i / 2;
        let far = if i.is_multiple_of(2) {
            near.saturating_sub(1)
        } else {
            (near + 1).min(count.saturating_sub(1))
        };
        (near, far)
    }

    /// Makes the values of row `y` of the luma ready.
    fn read(&mut self, y: usize) -> ImageResult<()> {
        if !self.halved.1 {
            return self.rows.read(y, &mut self.mixed);
        }
        let (near, far) = Self::neighbours(y, self.rows.height);
        self.rows.read(near, &mut self.mixed)?;
        self.rows.read(far, &mut self.next)?;
        for (value, next) in self.mixed.iter_mut().zip(&self.next) {
            *value = 0.75 * *value + 0.25 * next;
        }
        Ok(())
    }

    fn at(&self, x: usize) -> f32 {
        let value = |x: usize| self.mixed.get(x).copied().unwrap_or_default();
        if !self.halved.0 {
            return value(x);
        }
        let (near, far) = Self::neighbours(x, self.rows.width);
        0.75 * value(near) + 0.25 * value(far)
    }
}
