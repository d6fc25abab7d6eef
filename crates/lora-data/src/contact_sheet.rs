//! A contact sheet: the pictures as training will see them, on one page.

use std::io::Cursor;
use std::path::Path;

use font8x8::UnicodeFonts;
use image::{ExtendedColorType, ImageEncoder, Rgb, RgbImage};
use rayon::prelude::*;

use crate::dataset::base_name;
use crate::picture::{Picture, resize};
use crate::{CaptionTime, Dataset, Error, PlanItem, Result, Size, Streams, atomic};

/// What a contact sheet looks like.
///
/// | name | default | meaning |
/// |---|---|---|
/// | `columns` | 6 | pictures per row |
/// | `cell` | 192 | width and height of a picture's square in pixels |
/// | `caption_lines` | 3 | lines of the caption shown |
/// | `max_images` | 120 | pictures shown at most, spread over the dataset |
/// | `seed` | 0 | seed of the captions shown |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContactSheetConfig {
    /// Pictures per row.
    pub columns: u32,
    /// Width and height of a picture's square in pixels.
    pub cell: u32,
    /// Lines of the caption shown.
    pub caption_lines: u32,
    /// Pictures shown at most, spread over the dataset.
    pub max_images: usize,
    /// Seed of the captions shown.
    pub seed: u64,
}

impl Default for ContactSheetConfig {
    fn default() -> Self {
        Self {
            columns: 6,
            cell: 192,
            caption_lines: 3,
            max_images: 120,
            seed: 0,
        }
    }
}

/// Width and height of a letter.
const LETTER: u32 = 8;
const LINE: u32 = LETTER + 3;
const MARGIN: u32 = 8;
const PAPER: Rgb<u8> = Rgb([250, 250, 248]);
const INK: Rgb<u8> = Rgb([30, 30, 30]);
const FAINT: Rgb<u8> = Rgb([120, 120, 120]);

/// Writes a PNG of the pictures, cropped, with their bucket, name and processed caption.
/// A picture that cannot be loaded is a red square.
///
/// # Errors
/// When the file cannot be written; an unusable option.
pub fn write_contact_sheet(
    dataset: &Dataset,
    path: &Path,
    config: &ContactSheetConfig,
) -> Result<()> {
    if config.columns == 0 || config.max_images == 0 || !(32..=2048).contains(&config.cell) {
        return Err(Error::option(
            "contact sheet",
            "columns and max_images must be 1 or more, cell 32 to 2048",
        ));
    }
    let page = draw_page(dataset, config);
    let mut png = Cursor::new(Vec::new());
    image::codecs::png::PngEncoder::new(&mut png)
        .write_image(
            page.as_raw(),
            page.width(),
            page.height(),
            ExtendedColorType::Rgb8,
        )
        .map_err(|e| Error::io(path, std::io::Error::other(e)))?;
    atomic::write(path, &[png.get_ref()])
}

fn draw_page(dataset: &Dataset, config: &ContactSheetConfig) -> RgbImage {
    let items: Vec<PlanItem> = dataset
        .each_once(|_| true)
        .into_iter()
        .flat_map(|batch| batch.items)
        .collect();
    let stride = items.len().div_ceil(config.max_images).max(1);
    let items: Vec<PlanItem> = items.into_iter().step_by(stride).collect();
    let small = |item: &PlanItem| match dataset.cropped(item) {
        Ok((picture, _)) => thumbnail(&picture, config.cell),
        Err(_) => unreadable(config.cell),
    };
    let pictures: Vec<Picture> = items.par_iter().map(small).collect();

    let columns = config
        .columns
        .min(u32::try_from(items.len()).unwrap_or(u32::MAX))
        .max(1);
    let rows = u32::try_from(items.len())
        .unwrap_or(u32::MAX)
        .div_ceil(columns);
    let text_height = (config.caption_lines + 2) * LINE;
    let (step_x, step_y) = (config.cell + MARGIN, config.cell + text_height + MARGIN);
    let mut page = RgbImage::from_pixel(columns * step_x + MARGIN, rows * step_y + MARGIN, PAPER);
    for ((number, item), picture) in (0u32..).zip(&items).zip(&pictures) {
        let left = MARGIN + number % columns * step_x;
        let top = MARGIN + number / columns * step_y;
        place(
            &mut page,
            picture,
            left,
            top + config.cell - picture.size.height,
        );
        label(
            &mut page,
            dataset,
            item,
            config,
            (left, top + config.cell + 3),
        );
    }
    page
}

/// A red square in place of a picture that cannot be loaded.
fn unreadable(cell: u32) -> Picture {
    Picture {
        size: Size::square(cell),
        rgb: [200, 40, 40].repeat((cell * cell) as usize),
        alpha: None,
    }
}

fn thumbnail(picture: &Picture, cell: u32) -> Picture {
    let Size { width, height } = picture.size;
    let longest = width.max(height).max(1);
    let side =
        |length: u32| (u64::from(length) * u64::from(cell) / u64::from(longest)).max(1) as u32;
    resize(picture, Size::new(side(width), side(height)), None)
}

fn place(page: &mut RgbImage, picture: &Picture, left: u32, top: u32) {
    let pixels = picture
        .rgb
        .as_chunks::<3>()
        .0
        .chunks_exact(picture.size.width as usize);
    for (y, row) in (top..).zip(pixels) {
        for (x, &pixel) in (left..).zip(row) {
            if let Some(place) = page.get_pixel_mut_checked(x, y) {
                *place = Rgb(pixel);
            }
        }
    }
}

/// Bucket and repeats, file name, and the caption as the model sees it.
fn label(
    page: &mut RgbImage,
    dataset: &Dataset,
    item: &PlanItem,
    config: &ContactSheetConfig,
    (left, top): (u32, u32),
) {
    let Some(image) = dataset.images().get(item.image) else {
        return;
    };
    let letters = (config.cell / LETTER) as usize;
    let mut y = top;
    let mut line = |text: &str, color| {
        write(page, text.chars().take(letters), (left, y), color);
        y += LINE;
    };
    line(&format!("{} x{}", item.size, image.repeats), FAINT);
    line(&base_name(&image.path), FAINT);
    let time = CaptionTime {
        epoch: 1,
        step: usize::MAX,
        max_train_steps: 1,
    };
    let caption: Vec<char> = dataset
        .caption(item, time, Streams::new(config.seed))
        .chars()
        .collect();
    for part in caption.chunks(letters).take(config.caption_lines as usize) {
        line(&part.iter().collect::<String>(), INK);
    }
}

fn write(
    page: &mut RgbImage,
    text: impl Iterator<Item = char>,
    (left, top): (u32, u32),
    color: Rgb<u8>,
) {
    for (x, letter) in (left..).step_by(LETTER as usize).zip(text) {
        let glyph = font8x8::BASIC_FONTS
            .get(letter)
            .or_else(|| font8x8::LATIN_FONTS.get(letter));
        let glyph = glyph
            .or_else(|| font8x8::BASIC_FONTS.get('?'))
            .unwrap_or_default();
        for (y, bits) in (top..).zip(glyph) {
            for column in (0..LETTER).filter(|column| bits >> column & 1 == 1) {
                if let Some(pixel) = page.get_pixel_mut_checked(x + column, y) {
                    *pixel = color;
                }
            }
        }
    }
}
