//! Size and orientation of a picture from the first bytes of its file.
//!
//! The decoders of the `image` crate read a whole JPEG before they tell its
//! size, so a folder of 100,000 photos would be read completely to be listed.
//! This reads a few hundred bytes per file, and looks at the end of the file,
//! which is where an interrupted copy shows.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use image::metadata::Orientation;

use crate::{Error, Result, Size};

/// What the first bytes of a picture tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Width and height as stored, before the orientation is applied.
    pub stored: Size,
    /// The EXIF orientation.
    pub orientation: Orientation,
    /// The end of the file is not where the format puts it: only decoding tells whether it is whole.
    pub looks_cut_off: bool,
    /// It is a JPEG, whose decoder does not notice a missing end.
    pub is_jpeg: bool,
    /// Pixels may be transparent: the file has an alpha channel or a transparent colour.
    pub has_alpha: bool,
}

impl Header {
    /// Width and height as shown.
    pub fn shown(&self) -> Size {
        let Size { width, height } = self.stored;
        if is_turned(self.orientation) {
            Size::new(height, width)
        } else {
            self.stored
        }
    }
}

/// Whether width and height change places.
fn is_turned(orientation: Orientation) -> bool {
    matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    )
}

/// Reads the header of a PNG, JPEG, WebP, BMP or, with the feature `avif`, AVIF file; other
/// formats go through their decoder.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read, [`Error::Decode`] when it is not a picture.
pub fn read_header(path: &Path) -> Result<Header> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let length = file.metadata().map_err(|e| Error::io(path, e))?.len();
    if length == 0 {
        return Err(Error::decode(path, "the file is empty"));
    }
    let mut reader = BufReader::with_capacity(1024, file);
    let header = parse(&mut reader, length).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => Error::decode(path, "the file ends within its header"),
        io::ErrorKind::InvalidData => Error::decode(path, e),
        _ => Error::io(path, e),
    })?;
    let header = match header {
        Some(header) => header,
        None => by_decoder(path)?,
    };
    if header.stored.area() == 0 {
        return Err(Error::decode(
            path,
            format!("its size is {}", header.stored),
        ));
    }
    Ok(header)
}

/// Slow path for formats that have no parser here.
fn by_decoder(path: &Path) -> Result<Header> {
    let reader = image::ImageReader::open(path).map_err(|e| Error::io(path, e))?;
    let reader = reader
        .with_guessed_format()
        .map_err(|e| Error::io(path, e))?;
    let (width, height) = reader
        .into_dimensions()
        .map_err(|e| Error::decode(path, e))?;
    let stored = Size::new(width, height);
    Ok(Header {
        stored,
        orientation: Orientation::NoTransforms,
        looks_cut_off: false,
        is_jpeg: false,
        has_alpha: false,
    })
}

fn parse(file: &mut BufReader<File>, length: u64) -> io::Result<Option<Header>> {
    let start = file.fill_buf()?;
    if start.starts_with(b"\x89PNG\r\n\x1a\n") {
        parse_png(file, length).map(Some)
    } else if start.starts_with(&[0xff, 0xd8]) {
        parse_jpeg(file, length).map(Some)
    } else if start.starts_with(b"RIFF") && start.get(8..12) == Some(b"WEBP") {
        parse_webp(file, length).map(Some)
    } else if start.starts_with(b"BM") {
        parse_bmp(file).map(Some)
    } else {
        #[cfg(feature = "avif")]
        if super::avif::is_avif(start) {
            return parse_avif(file, length).map(Some);
        }
        Ok(None)
    }
}

#[cfg(feature = "avif")]
fn parse_avif(file: &mut BufReader<File>, length: u64) -> io::Result<Header> {
    let mut position: u64 = 0;
    let mut header = None;
    // The end of every box is looked at, to know whether the file is whole.
    while position < length {
        let size = u32::from_be_bytes(take(file)?);
        let kind: [u8; 4] = take(file)?;
        let (head, size) = match size {
            0 => (8, length - position),
            1 => (16, u64::from_be_bytes(take(file)?)),
            size => (8, size.into()),
        };
        let content = size
            .checked_sub(head)
            .and_then(|content| i64::try_from(content).ok())
            .ok_or_else(|| invalid("a box is shorter than its head"))?;
        position = position.saturating_add(size);
        if &kind == b"meta" && header.is_none() {
            let content = take_vec(file, usize::try_from(content).unwrap_or(usize::MAX))?;
            header = Some(content);
        } else {
            skip(file, content)?;
        }
    }
    let header = header.ok_or_else(|| invalid("no header box"))?;
    let container = super::avif::parse(&header).map_err(|e| invalid(&e))?;
    Ok(Header {
        stored: container.size,
        orientation: container.orientation,
        looks_cut_off: position > length || !container.fits(length),
        is_jpeg: false,
        has_alpha: container.has_alpha(),
    })
}

fn parse_png(file: &mut BufReader<File>, length: u64) -> io::Result<Header> {
    let mut stored = None;
    let mut orientation = Orientation::NoTransforms;
    let mut has_alpha = false;
    file.seek_relative(8)?;
    loop {
        let size = u32::from_be_bytes(take(file)?);
        let kind: [u8; 4] = take(file)?;
        match &kind {
            b"IHDR" => {
                let [width, height] = [
                    u32::from_be_bytes(take(file)?),
                    u32::from_be_bytes(take(file)?),
                ];
                stored = Some(Size::new(width, height));
                let [_depth, color]: [u8; 2] = take(file)?;
                // Grey or RGB with alpha.
                has_alpha = matches!(color, 4 | 6);
                skip(file, i64::from(size) - 10 + 4)?;
            }
            b"tRNS" => {
                has_alpha = true;
                skip(file, i64::from(size) + 4)?;
            }
            b"eXIf" => {
                orientation = exif_orientation(&take_vec(file, size as usize)?);
                skip(file, 4)?;
            }
            b"IDAT" | b"IEND" => break,
            _ => skip(file, i64::from(size) + 4)?,
        }
    }
    let stored = stored.ok_or_else(|| invalid("no IHDR chunk before the image data"))?;
    let looks_cut_off = !tail(file, length, 64)?.windows(4).any(|w| w == b"IEND");
    Ok(Header {
        stored,
        orientation,
        looks_cut_off,
        is_jpeg: false,
        has_alpha,
    })
}

fn parse_jpeg(file: &mut BufReader<File>, length: u64) -> io::Result<Header> {
    let mut stored = None;
    let mut orientation = None;
    skip(file, 2)?;
    loop {
        let marker = next_marker(file)?;
        match marker {
            // Markers without content.
            0x01 | 0xd0..=0xd8 => continue,
            // Start of scan or end of image: the header is over.
            0xda | 0xd9 => break,
            _ => {}
        }
        let size = usize::from(u16::from_be_bytes(take(file)?)).saturating_sub(2);
        let is_frame = matches!(marker, 0xc0..=0xcf) && !matches!(marker, 0xc4 | 0xc8 | 0xcc);
        if is_frame && size >= 5 {
            let [_precision]: [u8; 1] = take(file)?;
            let height = u16::from_be_bytes(take(file)?);
            let width = u16::from_be_bytes(take(file)?);
            stored = Some(Size::new(width.into(), height.into()));
            skip(file, size as i64 - 5)?;
        } else if marker == 0xe1 && orientation.is_none() {
            let segment = take_vec(file, size)?;
            orientation = segment.strip_prefix(b"Exif\0\0").map(exif_orientation);
        } else {
            skip(file, size as i64)?;
        }
    }
    let stored = stored.ok_or_else(|| invalid("no frame header before the image data"))?;
    let looks_cut_off = !tail(file, length, 65_536)?
        .windows(2)
        .any(|w| w == [0xff, 0xd9]);
    Ok(Header {
        stored,
        orientation: orientation.unwrap_or(Orientation::NoTransforms),
        looks_cut_off,
        is_jpeg: true,
        has_alpha: false,
    })
}

fn next_marker(file: &mut BufReader<File>) -> io::Result<u8> {
    let [mut byte]: [u8; 1] = take(file)?;
    // Some writers leave padding before a marker.
    while byte != 0xff {
        [byte] = take(file)?;
    }
    while byte == 0xff {
        [byte] = take(file)?;
    }
    Ok(byte)
}

fn parse_webp(file: &mut BufReader<File>, length: u64) -> io::Result<Header> {
    skip(file, 4)?;
    let riff_end = u64::from(u32::from_le_bytes(take(file)?)) + 8;
    skip(file, 4)?;
    let mut stored = None;
    let mut orientation = Orientation::NoTransforms;
    let mut has_alpha = false;
    let mut position = 12;
    while position + 8 <= riff_end.min(length) {
        let kind: [u8; 4] = take(file)?;
        let size = u32::from_le_bytes(take(file)?);
        let padded = u64::from(size) + u64::from(size % 2);
        match &kind {
            b"VP8X" | b"VP8L" | b"VP8 " if stored.is_none() => {
                let bytes: [u8; 10] = take(file)?;
                has_alpha = match &kind {
                    b"VP8X" => bytes[0] & 0x10 != 0,
                    b"VP8L" => bytes[4] & 0x10 != 0,
                    _ => false,
                };
                stored = Some(webp_size(&kind, bytes));
                skip(file, padded as i64 - 10)?;
                // Only the extended layout can carry EXIF.
                if &kind != b"VP8X" {
                    break;
                }
            }
            b"EXIF" => {
                let chunk = take_vec(file, size as usize)?;
                orientation = exif_orientation(chunk.strip_prefix(b"Exif\0\0").unwrap_or(&chunk));
                break;
            }
            _ => skip(file, padded as i64)?,
        }
        position += 8 + padded;
    }
    let stored = stored.ok_or_else(|| invalid("no image chunk"))?;
    Ok(Header {
        stored,
        orientation,
        looks_cut_off: riff_end > length,
        is_jpeg: false,
        has_alpha,
    })
}

fn webp_size(kind: &[u8; 4], bytes: [u8; 10]) -> Size {
    let u24 = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], 0]);
    match kind {
        b"VP8X" => Size::new(u24(4) + 1, u24(7) + 1),
        b"VP8L" => {
            let bits = u32::from_le_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
            Size::new((bits & 0x3fff) + 1, ((bits >> 14) & 0x3fff) + 1)
        }
        _ => {
            let side =
                |at: usize| u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]) & 0x3fff);
            Size::new(side(6), side(8))
        }
    }
}

fn parse_bmp(file: &mut BufReader<File>) -> io::Result<Header> {
    skip(file, 14)?;
    let stored = if u32::from_le_bytes(take(file)?) == 12 {
        let [width, height] = [
            u16::from_le_bytes(take(file)?),
            u16::from_le_bytes(take(file)?),
        ];
        Size::new(width.into(), height.into())
    } else {
        let [width, height] = [
            i32::from_le_bytes(take(file)?),
            i32::from_le_bytes(take(file)?),
        ];
        // A negative height means rows from top to bottom.
        Size::new(width.unsigned_abs(), height.unsigned_abs())
    };
    Ok(Header {
        stored,
        orientation: Orientation::NoTransforms,
        looks_cut_off: false,
        is_jpeg: false,
        has_alpha: false,
    })
}

fn exif_orientation(chunk: &[u8]) -> Orientation {
    Orientation::from_exif_chunk(chunk).unwrap_or(Orientation::NoTransforms)
}

fn take<const N: usize>(file: &mut BufReader<File>) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn take_vec(file: &mut BufReader<File>, size: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // `take` bounds the memory by the file, whatever the size field claims.
    file.take(size as u64).read_to_end(&mut bytes)?;
    if bytes.len() < size {
        Err(io::ErrorKind::UnexpectedEof.into())
    } else {
        Ok(bytes)
    }
}

fn skip(file: &mut BufReader<File>, count: i64) -> io::Result<()> {
    if count < 0 {
        return Err(invalid("a chunk is shorter than its content"));
    }
    file.seek_relative(count)
}

fn tail(file: &mut BufReader<File>, length: u64, wanted: u64) -> io::Result<Vec<u8>> {
    let inner = file.get_mut();
    let read_last = |inner: &mut File, count: u64| {
        inner.seek(SeekFrom::Start(length.saturating_sub(count)))?;
        let mut bytes = Vec::new();
        inner.take(count).read_to_end(&mut bytes)?;
        io::Result::Ok(bytes)
    };
    // Nearly every file ends where it should: look at few bytes first.
    let last = read_last(inner, wanted.min(16))?;
    if last.ends_with(&[0xff, 0xd9]) || last.windows(4).any(|w| w == b"IEND") {
        return Ok(last);
    }
    read_last(inner, wanted)
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
