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

/// A part of the target: its left upper corner and its size.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) corner: (u32, u32),
    pub(super) size: Size,
}

/// Shrinks from `from` to `to` and returns a part of that, as if it were cut out afterwards.
///
/// The target must not be larger than the source on either side; nothing of `part` that leaves
/// the target is returned.
pub(super) fn shrink<const C: usize>(source: &[u8], from: Size, to: Size, part: Part) -> Vec<u8> {
    // The loops are compiled for the widest registers that the processor has.
    pulp::Arch::new().dispatch(Shrink::<C> {
        source,
        from,
        to,
        part,
    })
}

/// A call of [`shrink_with`].
struct Shrink<'a, const C: usize> {
    source: &'a [u8],
    from: Size,
    to: Size,
    part: Part,
}

impl<const C: usize> pulp::NullaryFnOnce for Shrink<'_, C> {
    type Output = Vec<u8>;

    #[inline(always)]
    fn call(self) -> Vec<u8> {
        let (from, to) = (self.from, self.to);
        if from.width == 2 * to.width && from.height == 2 * to.height {
            shrink_with::<C>(self, |mean| (mean + 0.5) as u8)
        } else {
            shrink_with::<C>(self, half_to_even)
        }
    }
}

/// `round_ties_even` for values from 0 to 255, which has no instruction on every processor:
/// adding 2^23 leaves no bits for the fraction, and the hardware rounds half to even.
#[inline(always)]
fn half_to_even(mean: f32) -> u8 {
    const NO_FRACTION: f32 = 8_388_608.0;
    (mean + NO_FRACTION).to_bits() as u8
}

#[inline(always)]
fn shrink_with<const C: usize>(call: Shrink<'_, C>, round: impl Fn(f32) -> u8) -> Vec<u8> {
    let Shrink {
        source,
        from,
        to,
        part: Part { corner, size },
    } = call;
    let columns = covers(from.width, to.width, corner.0, size.width);
    let rows = covers(from.height, to.height, corner.1, size.height);
    let stride = from.width as usize * C;
    let length = columns.len() * C;
    let mut target = vec![0; rows.len() * length];
    let mut whole = vec![0u16; stride];
    let mut sum = vec![0f32; stride + LANES];
    for (cover, row) in rows.iter().zip(target.chunks_exact_mut(length)) {
        sum_rows(source, stride, cover, &mut whole, &mut sum[..stride]);
        for (column, pixel) in columns.iter().zip(row.as_chunks_mut::<C>().0) {
            let norm = cover.norm * column.norm;
            *pixel = sum_columns::<C>(&sum, column).map(|v| round(v * norm));
        }
    }
    target
}

/// The covers of `count` target pixels from `first` on.
fn covers(source: u32, target: u32, first: u32, count: u32) -> Vec<Cover> {
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
    (first.min(target)..first.saturating_add(count).min(target))
        .map(cover)
        .collect()
}

/// The weighted sum of the rows of `cover`.
#[inline(always)]
fn sum_rows(source: &[u8], stride: usize, cover: &Cover, whole: &mut [u16], sum: &mut [f32]) {
    let row = |y: usize| &source[y * stride..(y + 1) * stride];
    let (mut start, end) = cover.whole;
    // Rows that do not count have the weight 0, so that one pass does for all.
    let (first, last) = (row(cover.first.0), row(cover.last.0));
    let (first_weight, last_weight) = (cover.first.1, cover.last.1);
    let rest = |whole: u16, first: u8, last: u8| {
        f32::from(whole) + first_weight * f32::from(first) + last_weight * f32::from(last)
    };
    if end - start <= MOST_ROWS {
        sum_whole_rows((start..end).map(row), whole);
        let parts = whole.iter().zip(first).zip(last);
        for (total, ((&part, &first), &last)) in sum.iter_mut().zip(parts) {
            *total = rest(part, first, last);
        }
        return;
    }
    // A u16 holds 257 rows of at most 255; only enormous scales come here.
    sum.fill(0.0);
    while end - start > MOST_ROWS {
        sum_whole_rows((start..start + MOST_ROWS).map(row), whole);
        for (total, &part) in sum.iter_mut().zip(whole.iter()) {
            *total += f32::from(part);
        }
        start += MOST_ROWS;
    }
    sum_whole_rows((start..end).map(row), whole);
    let parts = whole.iter().zip(first).zip(last);
    for (total, ((&part, &first), &last)) in sum.iter_mut().zip(parts) {
        *total += rest(part, first, last);
    }
}

const MOST_ROWS: usize = 257;

#[inline(always)]
fn sum_whole_rows<'a>(mut rows: impl Iterator<Item = &'a [u8]>, whole: &mut [u16]) {
    match rows.next() {
        Some(row) => {
            for (total, &value) in whole.iter_mut().zip(row) {
                *total = u16::from(value);
            }
        }
        None => whole.fill(0),
    }
    for row in rows {
        for (total, &value) in whole.iter_mut().zip(row) {
            *total += u16::from(value);
        }
    }
}

/// A pixel is read together with what follows it, up to this many values: one addition of
/// a register, whatever the number of channels.
const LANES: usize = 4;

/// The weighted sum of the pixels of `cover` in one summed row, behind which `LANES` more
/// values can be read.
#[inline(always)]
fn sum_columns<const C: usize>(row: &[f32], cover: &Cover) -> [f32; C] {
    let mut sum = [0f32; LANES];
    let mut add = |weight: f32, x: usize| {
        if let Some(values) = row[x * C..].first_chunk::<LANES>() {
            for (total, value) in sum.iter_mut().zip(values) {
                *total += weight * value;
            }
        }
    };
    for x in cover.whole.0..cover.whole.1 {
        add(1.0, x);
    }
    for (x, weight) in [cover.first, cover.last] {
        if weight > 0.0 {
            add(weight, x);
        }
    }
    std::array::from_fn(|channel| sum[channel])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_go_to_the_even_neighbour() {
        for quarter in 0..=255 * 4 {
            let value = quarter as f32 / 4.0;
            assert_eq!(
                half_to_even(value),
                value.round_ties_even() as u8,
                "{value}"
            );
        }
    }

    #[test]
    fn a_huge_picture_of_one_color_keeps_it() {
        let from = Size::new(3, 1500);
        let to = Size::new(1, 2);
        let pixels = [255, 1, 128].repeat(3 * 1500);
        assert_eq!(
            shrink::<3>(&pixels, from, to, whole(to)),
            [255, 1, 128, 255, 1, 128]
        );
    }

    fn whole(size: Size) -> Part {
        let corner = (0, 0);
        Part { corner, size }
    }

    #[test]
    fn a_part_is_what_would_be_cut_out() {
        let (from, to) = (Size::new(61, 45), Size::new(13, 11));
        let pixels: Vec<u8> = (0..61 * 45 * 3).map(|i| (i * i / 37) as u8).collect();
        let all = shrink::<3>(&pixels, from, to, whole(to));
        for (left, top, width, height) in [(0, 0, 13, 11), (2, 3, 9, 7), (12, 10, 1, 1)] {
            let part = Part {
                corner: (left, top),
                size: Size::new(width, height),
            };
            let expected: Vec<u8> = (top..top + height)
                .flat_map(|y| {
                    let start = (y * 13 + left) as usize * 3;
                    &all[start..start + width as usize * 3]
                })
                .copied()
                .collect();
            assert_eq!(shrink::<3>(&pixels, from, to, part), expected);
        }
    }
}
