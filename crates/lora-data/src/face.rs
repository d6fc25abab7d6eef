//! Cropping around a face whose position is part of the file name.

use std::path::Path;

use rand::{Rng, RngCore};

use crate::bucket::round_half_up;
use crate::{Size, SubsetConfig};

/// A face in an image, from a file name like `name_cx_cy_w_h.png`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Face {
    center: (u32, u32),
    size: (u32, u32),
}

impl Face {
    pub(crate) fn from_file_name(path: &Path) -> Option<Self> {
        let stem = path.file_stem()?.to_str()?;
        let pieces: Vec<&str> = stem.split('_').collect();
        let [.., cx, cy, w, h] = pieces.as_slice() else {
            return None;
        };
        if pieces.len() < 5 {
            return None;
        }
        let number = |text: &str| text.parse::<u32>().ok();
        let face = Self {
            center: (number(cx)?, number(cy)?),
            size: (number(w)?, number(h)?),
        };
        (face.center.0 > 0 && face.size.0.max(face.size.1) > 0).then_some(face)
    }
}

/// Size to resize to and place to crop at, so that the face fills the wanted part of the picture.
pub(crate) fn face_crop(
    image: Size,
    target: Size,
    face: Face,
    options: &SubsetConfig,
    rng: &mut dyn RngCore,
) -> (Size, (u32, u32)) {
    let (closest, widest) = options.face_crop_aug_range.unwrap_or((1.0, 1.0));
    let face_side = f64::from(face.size.0.max(face.size.1));
    let wanted = f64::from(target.width.min(target.height)) / face_side;
    // Never so small that the picture no longer covers the target, never enlarged for the face.
    let covering = f64::max(
        f64::from(target.height) / f64::from(image.height),
        f64::from(target.width) / f64::from(image.width),
    );
    let from = covering.max(wanted / widest).min(1.0_f64.max(covering));
    let to = from.max(wanted / closest).min(1.0_f64.max(covering));
    let scale = if from < to {
        rng.random_range(from..=to)
    } else {
        from
    };

    let scaled = |side: u32| round_half_up(f64::from(side) * scale);
    let resized = Size::new(
        scaled(image.width).max(target.width),
        scaled(image.height).max(target.height),
    );
    let jitter = Jitter::new(options, face_side, target);
    let left = jitter.place(scaled(face.center.0), resized.width, target.width, rng);
    let top = jitter.place(scaled(face.center.1), resized.height, target.height, rng);
    (resized, (left, top))
}

/// How far the crop may move from the face.
#[derive(Debug, Clone, Copy)]
enum Jitter {
    /// Anywhere along the axis, nearer places more often.
    Anywhere,
    /// By up to this many pixels.
    Slight(i64),
}

impl Jitter {
    fn new(options: &SubsetConfig, face_side: f64, target: Size) -> Self {
        if options.random_crop {
            return Self::Anywhere;
        }
        let is_range = options
            .face_crop_aug_range
            .is_some_and(|(from, to)| from != to);
        let is_large =
            face_side > f64::from(target.width.min(target.height)) / 10.0 && face_side >= 40.0;
        Self::Slight(if is_range && is_large {
            (face_side / 20.0) as i64
        } else {
            0
        })
    }

    fn place(self, center: u32, length: u32, target: u32, rng: &mut dyn RngCore) -> u32 {
        let (center, length, target) = (i64::from(center), i64::from(length), i64::from(target));
        let start = center - target / 2;
        let moved = match self {
            Self::Anywhere => {
                let reach = (length - center).max(center).max(0);
                start + rng.random_range(0..=reach) + rng.random_range(0..=reach) - reach
            }
            Self::Slight(reach) => start + rng.random_range(-reach..=reach),
        };
        // Between 0 and a u32.
        moved.clamp(0, (length - target).max(0)) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Place, Purpose, Streams};

    #[test]
    fn the_crop_holds_the_face_and_stays_inside_the_picture() {
        let face = Face::from_file_name(Path::new("a/anna_700_300_120_150.png")).unwrap();
        let options = SubsetConfig {
            face_crop_aug_range: Some((2.0, 4.0)),
            ..Default::default()
        };
        let target = Size::square(256);
        for item in 0..50 {
            let mut rng = Streams::new(1).stream(Purpose::AUGMENT, Place::item(item));
            let image = Size::new(1000, 800);
            let (resized, (left, top)) = face_crop(image, target, face, &options, &mut rng);
            assert!(left + target.width <= resized.width && top + target.height <= resized.height);
            let scale = f64::from(resized.width) / 1000.0;
            let center = (700.0 * scale, 300.0 * scale);
            assert!((f64::from(left)..f64::from(left + 256)).contains(&center.0));
            assert!((f64::from(top)..f64::from(top + 256)).contains(&center.1));
        }
    }

    #[test]
    fn a_name_without_four_numbers_has_no_face() {
        assert_eq!(Face::from_file_name(Path::new("10_20_30_40.png")), None);
        assert_eq!(Face::from_file_name(Path::new("a_b_20_30_40.png")), None);
    }
}
