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

/// The same by area, if the filter or its absence asks for that and neither side grows; only
/// the part from `corner` on is made, as if it were cut out afterwards.
pub(crate) fn shrink_part(
    picture: &Picture,
    to: Size,
    filter: Option<Interpolation>,
    corner: (u32, u32),
    size: Size,
) -> Option<Picture> {
    let from = picture.size;
    let by_area = matches!(filter, None | Some(Interpolation::Area));
    if !by_area || from == to || !from.covers(to) || to.area() == 0 || size.area() == 0 {
        return None;
    }
    let part = area::Part { corner, size };
    let alpha = picture.alpha.as_ref();
    Some(Picture {
        size,
        rgb: area::shrink::<3>(&picture.rgb, from, to, part),
        alpha: alpha.map(|alpha| area::shrink::<1>(alpha, from, to, part)),
    })
}

fn channels<const C: usize>(source: &[u8], from: Size, to: Size, filter: Interpolation) -> Vec<u8> {
    match filter {
        Interpolation::Area if from.covers(to) => {
            let corner = (0, 0);
            area::shrink::<C>(source, from, to, area::Part { corner, size: to })
        }
        Interpolation::Area => taps::resize::<C>(source, from, to, taps::Kernel::EnlargeArea),
        Interpolation::Bilinear => taps::resize::<C>(source, from, to, taps::Kernel::Bilinear),
        Interpolation::Bicubic => taps::resize::<C>(source, from, to, taps::Kernel::Bicubic),
        Interpolation::Nearest => taps::resize::<C>(source, from, to, taps::Kernel::Nearest),
        Interpolation::Lanczos => pillow::resize::<C>(source, from, to, pillow::Kernel::Lanczos),
        Interpolation::Box => pillow::resize::<C>(source, from, to, pillow::Kernel::Box),
    }
}
