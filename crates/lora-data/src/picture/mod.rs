//! Pictures: sizes without decoding, decoding, resizing, cropping, colours.

mod area;
#[cfg(feature = "avif")]
mod avif;
mod color;
mod decode;
mod header;
mod jpeg;
mod pillow;
mod resize;
mod taps;

pub(crate) use color::shift_colors;
pub use decode::{DecodeOptions, Picture, decode_file};
pub use header::{Header, read_header};
pub use resize::resize;
pub(crate) use resize::shrink_part;
