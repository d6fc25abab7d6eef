//! The boxes around the AV1 data of an AVIF file: which bytes are the picture, which its
//! alpha channel, and what is said of size, colours and orientation.

use image::metadata::Orientation;

use crate::Size;

/// What is wrong with a file.
pub(super) type Wrong = String;
type Result<T> = std::result::Result<T, Wrong>;
type Kind = [u8; 4];

/// Whether a file starts as AVIF files do.
pub(in super::super) fn is_avif(start: &[u8]) -> bool {
    start.get(4..8) == Some(b"ftyp")
        && matches!(
            start.get(8..12),
            Some(b"avif" | b"avis" | b"mif1" | b"msf1")
        )
}

/// What the container tells.
#[derive(Debug, Clone)]
pub(in super::super) struct Container {
    /// Width and height as stored.
    pub(in super::super) size: Size,
    /// The orientation, in the words of EXIF.
    pub(in super::super) orientation: Orientation,
    /// Where the picture is.
    pub(super) color: Extents,
    /// Where the alpha channel is.
    pub(super) alpha: Option<Extents>,
    /// The colours were multiplied by alpha.
    pub(super) premultiplied: bool,
    /// Matrix coefficients and whether the range is full, if the container names them.
    pub(super) matrix: Option<(u16, bool)>,
    /// Data stored in the header itself.
    inside: Vec<u8>,
}

impl Container {
    /// Whether there is an alpha channel.
    pub(in super::super) fn has_alpha(&self) -> bool {
        self.alpha.is_some()
    }

    /// Whether a file of this many bytes can hold all the data.
    pub(in super::super) fn fits(&self, length: u64) -> bool {
        [Some(&self.color), self.alpha.as_ref()]
            .into_iter()
            .flatten()
            .filter(|extents| !extents.inside)
            .flat_map(|extents| &extents.pieces)
            .all(|(offset, size)| offset.saturating_add((*size).max(1)) <= length)
    }
}

/// Pieces of an item: offset and length, 0 for all that follows.
#[derive(Debug, Clone, Default)]
pub(super) struct Extents {
    /// They count from the start of the header's data instead of the file's.
    inside: bool,
    pieces: Vec<(u64, u64)>,
}

/// The content of the header box.
pub(super) fn find_header(file: &[u8]) -> Result<&[u8]> {
    for found in Boxes(file) {
        let (kind, content) = found?;
        if &kind == b"meta" {
            return Ok(content);
        }
    }
    Err("no header box".to_owned())
}

/// The bytes of an item.
pub(super) fn data(file: &[u8], container: &Container, extents: &Extents) -> Result<Vec<u8>> {
    let source = if extents.inside {
        &container.inside
    } else {
        file
    };
    let mut data = Vec::new();
    for &(offset, length) in &extents.pieces {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = source.get(start..).ok_or("the data ends early")?;
        let length = match length {
            0 => rest.len(),
            length => usize::try_from(length).unwrap_or(usize::MAX),
        };
        data.extend_from_slice(rest.get(..length).ok_or("the data ends early")?);
        // Pieces that overlap could add up to anything.
        if data.len() > source.len() {
            return Err("the pieces of an image are larger than the file".to_owned());
        }
    }
    if data.is_empty() {
        return Err("an image has no data".to_owned());
    }
    Ok(data)
}

/// Reads the content of the header box.
pub(in super::super) fn parse(header: &[u8]) -> Result<Container> {
    let mut parts = Parts::default();
    let (_, content) = full_box(header)?;
    for found in Boxes(content) {
        let (kind, content) = found?;
        match &kind {
            b"pitm" => parts.primary = Some(primary(content)?),
            b"iinf" => parts.kinds = kinds(content)?,
            b"iloc" => parts.places = content,
            b"iref" => parts.references = references(content)?,
            b"iprp" => properties(content, &mut parts)?,
            b"idat" => parts.inside = content,
            _ => {}
        }
    }
    parts.container()
}

/// The boxes of the header that matter.
#[derive(Default)]
struct Parts<'a> {
    primary: Option<u32>,
    kinds: Vec<(u32, Kind)>,
    places: &'a [u8],
    references: Vec<(Kind, u32, u32)>,
    properties: Vec<(Kind, &'a [u8])>,
    /// Item, property counted from 1, whether it must be understood.
    associations: Vec<(u32, usize, bool)>,
    inside: &'a [u8],
}

impl Parts<'_> {
    fn container(self) -> Result<Container> {
        let primary = self.primary.ok_or("no primary image")?;
        let is = |item: u32, kind: &Kind| self.kinds.contains(&(item, *kind));
        if is(primary, b"grid") {
            return Err("pictures put together from several (grids) are not read".to_owned());
        }
        if !is(primary, b"av01") {
            return Err("the primary image is not AV1".to_owned());
        }
        let refers = |kind: &Kind, from: u32, to: u32| self.references.contains(&(*kind, from, to));
        let alpha = self.kinds.iter().map(|&(item, _)| item).find(|&item| {
            is(item, b"av01")
                && refers(b"auxl", item, primary)
                && self.property(item, b"auxC").is_some_and(is_alpha)
        });
        self.check_understood(primary)?;
        let mut size = Reader(self.property(primary, b"ispe").ok_or("no size")?);
        size.skip(4)?;
        let size = Size::new(size.number(4)? as u32, size.number(4)? as u32);
        let alpha_extents = alpha.map(|item| self.extents(item)).transpose()?;
        Ok(Container {
            size,
            orientation: self.orientation(primary),
            color: self.extents(primary)?,
            alpha: alpha_extents,
            premultiplied: alpha.is_some_and(|alpha| refers(b"prem", primary, alpha)),
            matrix: self.matrix(primary),
            inside: self.inside.to_vec(),
        })
    }

    fn properties_of(&self, item: u32) -> impl Iterator<Item = (Kind, &[u8], bool)> {
        self.associations
            .iter()
            .filter(move |&&(of, _, _)| of == item)
            .filter_map(|&(_, number, essential)| {
                let &(kind, content) = self.properties.get(number.checked_sub(1)?)?;
                Some((kind, content, essential))
            })
    }

    fn property(&self, item: u32, wanted: &Kind) -> Option<&[u8]> {
        self.properties_of(item)
            .find(|(kind, _, _)| kind == wanted)
            .map(|(_, content, _)| content)
    }

    fn check_understood(&self, item: u32) -> Result<()> {
        // Cutting (clap) and pixel ratios (pasp) change nothing, as in Pillow.
        let known: [&Kind; 9] = [
            b"av1C", b"ispe", b"pixi", b"colr", b"irot", b"imir", b"clap", b"pasp", b"lsel",
        ];
        match self
            .properties_of(item)
            .find(|(kind, _, essential)| *essential && !known.contains(&kind))
        {
            Some((kind, _, _)) => Err(format!(
                "the property {} is not understood",
                kind.escape_ascii()
            )),
            None => Ok(()),
        }
    }

    /// Rotation comes first, then mirroring.
    fn orientation(&self, item: u32) -> Orientation {
        let low_bits = |kind: &Kind, bits: u8| {
            let content = self.property(item, kind)?;
            content.first().map(|byte| byte & bits)
        };
        let exif = match (low_bits(b"irot", 3).unwrap_or(0), low_bits(b"imir", 1)) {
            (0, None) => 1,
            (0, Some(0)) | (2, Some(1)) => 4,
            (0, Some(_)) | (2, Some(_)) => 2,
            (1, None) => 8,
            (1, Some(0)) | (3, Some(1)) => 5,
            (1, Some(_)) | (3, Some(_)) => 7,
            (2, None) => 3,
            _ => 6,
        };
        Orientation::from_exif(exif).unwrap_or(Orientation::NoTransforms)
    }

    fn matrix(&self, item: u32) -> Option<(u16, bool)> {
        self.properties_of(item).find_map(|(kind, content, _)| {
            let content = content.strip_prefix(b"nclx").filter(|_| &kind == b"colr")?;
            let &[_, _, _, _, high, low, range] = content.first_chunk::<7>()?;
            Some((u16::from_be_bytes([high, low]), range & 0x80 != 0))
        })
    }

    /// Where an item's data is, read from the `iloc` box.
    fn extents(&self, wanted: u32) -> Result<Extents> {
        let (version, content) = full_box(self.places)?;
        let mut reader = Reader(content);
        let sizes = reader.number(2)? as usize;
        let nibble = |shift: usize| sizes >> shift & 15;
        let (offset_size, length_size, base_size) = (nibble(12), nibble(8), nibble(4));
        let index_size = if version == 0 { 0 } else { nibble(0) };
        let id_size = if version < 2 { 2 } else { 4 };
        for _ in 0..reader.number(id_size)? {
            let item = reader.number(id_size)?;
            let construction = if version == 0 {
                0
            } else {
                reader.number(2)? & 15
            };
            reader.skip(2)?;
            let base = reader.number(base_size)?;
            let count = reader.number(2)?;
            // Pieces that take no bytes could be many in a small file.
            if count > 1 && offset_size + length_size + index_size == 0 {
                return Err("the pieces of an image have no places".to_owned());
            }
            let mut pieces = Vec::new();
            for _ in 0..count {
                reader.skip(index_size)?;
                let offset = base.saturating_add(reader.number(offset_size)?);
                pieces.push((offset, reader.number(length_size)?));
            }
            if item == u64::from(wanted) {
                return match construction {
                    0 | 1 => Ok(Extents {
                        inside: construction == 1,
                        pieces,
                    }),
                    _ => Err("an image is put together from other items".to_owned()),
                };
            }
        }
        Err("the place of an image is not given".to_owned())
    }
}

fn is_alpha(content: &[u8]) -> bool {
    let name = content.get(4..).unwrap_or_default();
    name.starts_with(b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha")
        || name.starts_with(b"urn:mpeg:hevc:2015:auxid:1")
}

fn primary(content: &[u8]) -> Result<u32> {
    let (version, content) = full_box(content)?;
    Ok(Reader(content).number(if version == 0 { 2 } else { 4 })? as u32)
}

fn kinds(content: &[u8]) -> Result<Vec<(u32, Kind)>> {
    let (version, content) = full_box(content)?;
    let mut reader = Reader(content);
    reader.skip(if version == 0 { 2 } else { 4 })?;
    let mut kinds = Vec::new();
    for found in Boxes(reader.0) {
        let (kind, content) = found?;
        if &kind != b"infe" {
            continue;
        }
        let (version, content) = full_box(content)?;
        if version < 2 {
            continue;
        }
        let mut reader = Reader(content);
        let item = reader.number(if version == 2 { 2 } else { 4 })? as u32;
        reader.skip(2)?;
        kinds.push((item, reader.kind()?));
    }
    Ok(kinds)
}

fn references(content: &[u8]) -> Result<Vec<(Kind, u32, u32)>> {
    let (version, content) = full_box(content)?;
    let size = if version == 0 { 2 } else { 4 };
    let mut references = Vec::new();
    for found in Boxes(content) {
        let (kind, content) = found?;
        let mut reader = Reader(content);
        let from = reader.number(size)? as u32;
        for _ in 0..reader.number(2)? {
            references.push((kind, from, reader.number(size)? as u32));
        }
    }
    Ok(references)
}

fn properties<'a>(content: &'a [u8], parts: &mut Parts<'a>) -> Result<()> {
    for found in Boxes(content) {
        let (kind, content) = found?;
        if &kind == b"ipco" {
            parts.properties = Boxes(content).collect::<Result<_>>()?;
        } else if &kind == b"ipma" {
            let wide = content.get(3).is_some_and(|flags| flags & 1 != 0);
            let (version, content) = full_box(content)?;
            let mut reader = Reader(content);
            for _ in 0..reader.number(4)? {
                let item = reader.number(if version == 0 { 2 } else { 4 })? as u32;
                for _ in 0..reader.number(1)? {
                    let (bytes, essential) = if wide { (2, 0x8000) } else { (1, 0x80) };
                    let value = reader.number(bytes)?;
                    let number = (value & (essential - 1)) as usize;
                    parts
                        .associations
                        .push((item, number, value & essential != 0));
                }
            }
        }
    }
    Ok(())
}

/// The version of a box that has one, and what follows it.
fn full_box(content: &[u8]) -> Result<(u8, &[u8])> {
    match content.split_first_chunk::<4>() {
        Some((&[version, ..], content)) => Ok((version, content)),
        None => Err(SHORT.to_owned()),
    }
}

const SHORT: &str = "a box is shorter than its content";

/// The boxes in a stretch of bytes: their names and contents.
struct Boxes<'a>(&'a [u8]);

impl<'a> Iterator for Boxes<'a> {
    type Item = Result<(Kind, &'a [u8])>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let mut reader = Reader(self.0);
        let found = reader.one_box();
        // After damage there is no next box.
        self.0 = if found.is_ok() { reader.0 } else { &[] };
        Some(found)
    }
}

/// Bytes from front to back.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(SHORT)?;
        self.0 = rest;
        Ok(taken)
    }

    fn skip(&mut self, count: usize) -> Result<()> {
        self.take(count).map(|_| ())
    }

    /// A number of up to eight bytes, the highest first; 0 of none.
    fn number(&mut self, bytes: usize) -> Result<u64> {
        if bytes > 8 {
            return Err("a number has more than eight bytes".to_owned());
        }
        let bytes = self.take(bytes)?;
        Ok(bytes.iter().fold(0, |n, &byte| n << 8 | u64::from(byte)))
    }

    fn kind(&mut self) -> Result<Kind> {
        let (&kind, rest) = self.0.split_first_chunk().ok_or(SHORT)?;
        self.0 = rest;
        Ok(kind)
    }

    fn one_box(&mut self) -> Result<(Kind, &'a [u8])> {
        let size = self.number(4)?;
        let kind = self.kind()?;
        let content = match size {
            // To the end.
            0 => Some(self.0.len() as u64),
            1 => self.number(8)?.checked_sub(16),
            size => size.checked_sub(8),
        };
        let content = content.and_then(|size| usize::try_from(size).ok());
        Ok((kind, self.take(content.ok_or(SHORT)?)?))
    }
}
