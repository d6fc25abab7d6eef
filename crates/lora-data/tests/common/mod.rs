//! A folder of small files for one test.
#![allow(dead_code, clippy::unwrap_used)] // each test file uses a part

use std::fs;
use std::path::Path;

use image::{ExtendedColorType, ImageEncoder, Rgb, RgbImage, Rgba, RgbaImage};

pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> &Self {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
        self
    }

    /// A picture with some structure; the format is the extension's.
    pub(crate) fn image(&self, name: &str, width: u32, height: u32) -> &Self {
        self.file(name, b"");
        pattern(width, height).save(self.path().join(name)).unwrap();
        self
    }

    pub(crate) fn rgba(&self, name: &str, width: u32, height: u32, color: [u8; 4]) -> &Self {
        self.file(name, b"");
        RgbaImage::from_pixel(width, height, Rgba(color))
            .save(self.path().join(name))
            .unwrap();
        self
    }

    pub(crate) fn jpeg(&self, name: &str, width: u32, height: u32) -> &Self {
        self.file(name, &jpeg_bytes(width, height))
    }

    /// A JPEG with an EXIF orientation.
    pub(crate) fn exif_jpeg(&self, name: &str, width: u32, height: u32, orientation: u8) -> &Self {
        let jpeg = jpeg_bytes(width, height);
        // One entry: tag 0x0112, type SHORT, count 1.
        let tiff = [
            b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".as_slice(),
            &[orientation, 0, 0, 0, 0, 0, 0],
        ];
        let exif = [b"Exif\0\0", tiff.concat().as_slice()].concat();
        let segment = [
            &[0xff, 0xe1],
            &(exif.len() as u16 + 2).to_be_bytes()[..],
            &exif,
        ]
        .concat();
        self.file(name, &[&jpeg[..2], &segment, &jpeg[2..]].concat())
    }
}

fn pattern(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        Rgb([(x * 7) as u8, (y * 5) as u8, (x * y) as u8])
    })
}

fn jpeg_bytes(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 90);
    encoder
        .write_image(
            &pattern(width, height),
            width,
            height,
            ExtendedColorType::Rgb8,
        )
        .unwrap();
    bytes
}

/// The model's value for an 8-bit value.
pub(crate) fn gray(value: u8) -> f32 {
    (f32::from(value) / 255.0 - 0.5) / 0.5
}
