//! Width and height of a picture, a bucket or a crop.

use std::fmt;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Width and height in pixels.
///
/// In a config it is written as one number for a square, as `[width, height]`,
/// or as the text `"512"` or `"768,512"`, as sd-scripts does.
///
/// ```
/// use lora_data::Size;
/// assert_eq!("768,512".parse::<Size>()?, Size::new(768, 512));
/// assert_eq!(Size::square(512).to_string(), "512x512");
/// # Ok::<(), lora_data::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
}

impl Size {
    /// Width first.
    pub const fn new(width: u32, height: u32) -> Self {
        Self { width, height }
    }

    /// Both sides the same.
    pub const fn square(side: u32) -> Self {
        Self::new(side, side)
    }

    /// Number of pixels.
    pub const fn area(self) -> u64 {
        self.width as u64 * self.height as u64
    }

    /// Width divided by height.
    pub fn aspect(self) -> f64 {
        f64::from(self.width) / f64::from(self.height)
    }

    /// Whether `other` fits inside without scaling.
    pub const fn covers(self, other: Self) -> bool {
        self.width >= other.width && self.height >= other.height
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl From<(u32, u32)> for Size {
    fn from((width, height): (u32, u32)) -> Self {
        Self { width, height }
    }
}

impl std::str::FromStr for Size {
    type Err = crate::Error;

    fn from_str(text: &str) -> crate::Result<Self> {
        let side = |part: &str| part.trim().parse::<u32>().ok();
        let size = match text.split_once([',', 'x']) {
            None => side(text).map(Self::square),
            Some((width, height)) => side(width).zip(side(height)).map(Self::from),
        };
        size.ok_or_else(|| {
            crate::Error::option(
                "resolution",
                format!("`{text}` is neither a number nor `width,height`"),
            )
        })
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        [self.width, self.height].serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SizeVisitor)
    }
}

struct SizeVisitor;

impl<'de> Visitor<'de> for SizeVisitor {
    type Value = Size;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("one whole number, [width, height], or \"width,height\"")
    }

    fn visit_u64<E: de::Error>(self, side: u64) -> Result<Size, E> {
        u32::try_from(side)
            .map(Size::square)
            .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(side), &self))
    }

    fn visit_i64<E: de::Error>(self, side: i64) -> Result<Size, E> {
        u32::try_from(side)
            .map(Size::square)
            .map_err(|_| E::invalid_value(de::Unexpected::Signed(side), &self))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
        text.parse()
            .map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sides: A) -> Result<Size, A::Error> {
        let width = sides
            .next_element()?
            .ok_or_else(|| de::Error::invalid_length(0, &self))?;
        let height = sides
            .next_element()?
            .ok_or_else(|| de::Error::invalid_length(1, &self))?;
        if sides.next_element::<u32>()?.is_some() {
            return Err(de::Error::invalid_length(3, &self));
        }
        Ok(Size { width, height })
    }
}
