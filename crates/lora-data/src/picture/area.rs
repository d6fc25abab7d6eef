//! Shrinking by area averaging: each target pixel is the mean of the source area it covers.
//!
//! The numbers are OpenCV's `INTER_AREA`. With scale `s` = source / target, target
//! pixel `i` covers the interval `[i s, (i + 1) s)`; a source pixel counts by its
//! overlap. The result is rounded half to even, except for exactly half the size
//! in both directions, where OpenCV rounds half up.
//!
//! Rows are summed before columns: whole rows add up in integers, which the
//! compiler turns into wide additions, and only few summed rows are left for
//! the slower pass along the row.

use crate::Size;

/// The source pixels that one target pixel covers along an axis.
#[derive(Debug, Clone, Copy)]
struct Cover {
    /// First source pixel, and how much of it counts.
    first: (usize, f32),
    /// Source pixels that count fully.
    whole: (usize, usize),
    /// Last source pixel, and how much of it counts; 0 when there is none.
    last: (usize, f32),
    /// One by the sum of all parts.
    norm: f32,
}

/// The target must not be larger than the source on either side.
pub(super) fn shrink<const C: usize>(source: &[u8], from: Size, to: Size) -> Vec<u8> {
    let halves = from.width == 2 * to.width && from.height == 2 * to.height;
    let round: fn(f32) -> u8 = if halves {
        |v| (v + 0.5) as u8
    } else {
        |v| v.round_ties_even() as u8
    };
    let columns = covers(from.width, to.width);
    let stride = from.width as usize * C;
    let mut target = Vec::with_capacity(to.width as usize * to.height as usize * C);
    let mut whole = vec![0u16; stride];
    let mut sum = vec![0f32; stride];
    for cover in covers(from.height, to.height) {
        sum_rows(source, stride, &cover, &mut whole, &mut sum);
        for column in &columns {
            let norm = cover.norm * column.norm;
            target.extend(sum_columns::<C>(&sum, column).map(|v| round(v * norm)));
        }
    }
    target
}

fn covers(source: u32, target: u32) -> Vec<Cover> {
    let scale = f64::from(source) / f64::from(target);
    let end = source as usize;
    let cover = |i: u32| {
        let (from, to) = (
            f64::from(i) * scale,
            (f64::from(i) * scale + scale).min(f64::from(source)),
        );
        // Overlaps below this are rounding errors of the multiplication.
        let tiny = 1e-3;
        let whole = (from.ceil() as usize, (to.floor() as usize).min(end));
        let whole = (whole.0.min(whole.1), whole.1);
        let first_part = whole.0 as f64 - from;
        let last_part = to - whole.1 as f64;
        let first = if first_part > tiny {
            (whole.0.saturating_sub(1), first_part as f32)
        } else {
            (0, 0.0)
        };
        let last = if last_part > tiny && whole.1 < end {
            (whole.1, last_part as f32)
        } else {
            (0, 0.0)
        };
        let sum = (whole.1 - whole.0) as f32 + first.1 + last.1;
        Cover {
            first,
            whole,
            last,
            norm: 1.0 / sum,
        }
    };
    (0..target).map(cover).collect()
}

/// The weighted sum of the rows of `cover`.
fn sum_rows(source: &[u8], stride: usize, cover: &Cover, whole: &mut [u16], sum: &mut [f32]) {
    let row = |y: usize| &source[y * stride..(y + 1) * stride];
    sum.fill(0.0);
    let rows: Vec<usize> = (cover.whole.0..cover.whole.1).collect();
    // 256 rows of at most 255 fit a u16.
    for rows in rows.chunks(256) {
        whole.fill(0);
        for &y in rows {
            for (total, &value) in whole.iter_mut().zip(row(y)) {
                *total += u16::from(value);
            }
        }
        for (total, &part) in sum.iter_mut().zip(whole.iter()) {
            *total += f32::from(part);
        }
    }
    for (y, weight) in [cover.first, cover.last] {
        if weight > 0.0 {
            for (total, &value) in sum.iter_mut().zip(row(y)) {
                *total += weight * f32::from(value);
            }
        }
    }
}

/// The weighted sum of the pixels of `cover` in one summed row.
fn sum_columns<const C: usize>(row: &[f32], cover: &Cover) -> [f32; C] {
    let pixels = row.as_chunks::<C>().0;
    let mut sum = [0f32; C];
    for pixel in &pixels[cover.whole.0..cover.whole.1] {
        for (total, value) in sum.iter_mut().zip(pixel) {
            *total += value;
        }
    }
    for (x, weight) in [cover.first, cover.last] {
        if weight > 0.0 {
            for (total, value) in sum.iter_mut().zip(&pixels[x]) {
                *total += weight * value;
            }
        }
    }
    sum
}
