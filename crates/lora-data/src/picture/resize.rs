//! Resizing with the filters sd-scripts uses, to the rounding of its libraries.

use super::decode::Picture;
use super::{area, pillow, taps};
use crate::{Interpolation, Size};

/// Resizes a picture and its alpha channel.
///
/// Without a filter: area averaging where neither side grows, else Lanczos.
/// Area, bilinear, bicubic and nearest give OpenCV's numbers, Lanczos and box Pillow's.
///
/// ```
/// use lora_data::{Picture, Size, resize};
///
/// let gray = Picture { size: Size::new(4, 2), rgb: [10, 30, 50, 70].repeat(6), alpha: None };
/// assert_eq!(resize(&gray, Size::new(2, 1), None).size, Size::new(2, 1));
/// ```
pub fn resize(picture: &Picture, to: Size, filter: Option<Interpolation>) -> Picture {
    let from = picture.size;
    if from == to || from.area() == 0 || to.area() == 0 {
        return picture.clone();
    }
    let filter = filter.unwrap_or(if from.covers(to) {
        Interpolation::Area
    } else {
        Interpolation::Lanczos
    });
    Picture {
        size: to,
        rgb: channels::<3>(&picture.rgb, from, to, filter),
        alpha: picture
            .alpha
            .as_ref()
            .map(|alpha| channels::<1>(alpha, from, to, filter)),
    }
}

fn channels<const C: usize>(source: &[u8], from: Size, to: Size, filter: Interpolation) -> Vec<u8> {
    match filter {
        Interpolation::Area if from.covers(to) => area::shrink::<C>(source, from, to),
        Interpolation::Area => taps::resize::<C>(source, from, to, taps::Kernel::EnlargeArea),
        Interpolation::Bilinear => taps::resize::<C>(source, from, to, taps::Kernel::Bilinear),
        Interpolation::Bicubic => taps::resize::<C>(source, from, to, taps::Kernel::Bicubic),
        Interpolation::Nearest => taps::resize::<C>(source, from, to, taps::Kernel::Nearest),
        Interpolation::Lanczos => pillow::resize::<C>(source, from, to, pillow::Kernel::Lanczos),
        Interpolation::Box => pillow::resize::<C>(source, from, to, pillow::Kernel::Box),
    }
}
