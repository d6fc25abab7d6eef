//! Colour augmentation: small changes of hue or brightness curve.

use crate::ColorShift;

/// Changes the colours of 8-bit RGB pixels in place.
///
/// sd-scripts turns the hue of data whose red and blue are swapped; as the turn is
/// drawn symmetrically around 0, that is the same augmentation.
pub(crate) fn shift_colors(rgb: &mut [u8], shift: ColorShift) {
    match shift {
        ColorShift::Gamma(power) => {
            let curve: [u8; 256] = std::array::from_fn(|value| {
                // Truncated, as the reference's table is.
                ((value as f32 / 255.0).powf(power) * 255.0).clamp(0.0, 255.0) as u8
            });
            for value in rgb {
                *value = curve[usize::from(*value)];
            }
        }
        ColorShift::Hue(degrees) => {
            for pixel in rgb.as_chunks_mut::<3>().0 {
                *pixel = turn_hue(*pixel, degrees);
            }
        }
    }
}

fn turn_hue(rgb: [u8; 3], degrees: f32) -> [u8; 3] {
    let [r, g, b] = rgb.map(f32::from);
    let (max, min) = (r.max(g).max(b), r.min(g).min(b));
    let chroma = max - min;
    if chroma == 0.0 {
        return rgb;
    }
    let sextant = if max == r {
        (g - b) / chroma
    } else if max == g {
        (b - r) / chroma + 2.0
    } else {
        (r - g) / chroma + 4.0
    };
    let hue = (sextant + degrees / 60.0).rem_euclid(6.0);
    // Each channel is a trapezoid over the hue circle, shifted by a third.
    [5.0, 3.0, 1.0].map(|offset| {
        let k = (offset + hue) % 6.0;
        (max - chroma * k.min(4.0 - k).clamp(0.0, 1.0)).round() as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_turn_of_the_hue_changes_nothing_and_a_third_moves_the_channels() {
        for rgb in [[200, 30, 90], [0, 0, 0], [12, 250, 3], [40, 41, 42]] {
            assert_eq!(turn_hue(rgb, 360.0), rgb);
            let [r, g, b] = rgb;
            assert_eq!(turn_hue(rgb, 120.0), [b, r, g]);
        }
    }
}
