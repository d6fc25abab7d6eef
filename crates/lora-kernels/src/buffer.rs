//! Large buffers that all threads fill. One thread that sets a tensor's memory to zero, or
//! copies it, while the others wait, takes as long as many a product.

use std::mem::MaybeUninit;

use candle_core::{Result, Storage, Tensor};
use rayon::prelude::*;

use crate::values;

/// Values per task, where nothing else divides them.
const PART: usize = 1 << 15;

/// `n` values, made in parts of `part`: `write(first, values)` gets each part, all zeros, and
/// where it begins.
#[allow(unsafe_code)]
pub(crate) fn in_parts<T: Copy + Default + Send>(
    n: usize,
    part: usize,
    write: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<T> {
    let part = part.max(1);
    let mut values = Vec::with_capacity(n);
    let fill = |(number, out): (usize, &mut [MaybeUninit<T>])| {
        for value in &mut *out {
            value.write(T::default());
        }
        // SAFETY: all of them have just been written.
        write(number * part, unsafe { out.assume_init_mut() });
    };
    let out = &mut values.spare_capacity_mut()[..n];
    if n <= part {
        fill((0, out));
    } else {
        out.par_chunks_mut(part).enumerate().for_each(fill);
    }
    // SAFETY: there is room for `n` values, and `fill` has written each.
    unsafe { values.set_len(n) };
    values
}

/// [`in_parts`], or, where there are values, their parts with `write` adding to them.
pub(crate) fn added_in_parts(
    sum: Option<&mut [f32]>,
    n: usize,
    part: usize,
    write: impl Fn(usize, &mut [f32]) + Sync,
) -> Vec<f32> {
    let Some(sum) = sum else {
        return in_parts(n, part, write);
    };
    let part = part.max(1);
    match &mut sum[..n] {
        sum if n <= part => write(0, sum),
        sum => {
            let parts = sum.par_chunks_mut(part).enumerate();
            parts.for_each(|(number, out)| write(number * part, out));
        }
    }
    Vec::new()
}

/// `n` values that `write` makes in memory that has none yet; it returns all of it.
///
/// # Panics
/// When it returns something else.
#[allow(unsafe_code)]
pub(crate) fn written(
    n: usize,
    write: impl for<'a> FnOnce(&'a mut [MaybeUninit<f32>]) -> &'a mut [f32],
) -> Vec<f32> {
    let mut values = Vec::with_capacity(n);
    let start = values.as_ptr();
    let made = write(&mut values.spare_capacity_mut()[..n]);
    assert!(made.len() == n && made.as_ptr() == start, "another result");
    // SAFETY: there is room for `n` values, and those that `write` returned are there.
    unsafe { values.set_len(n) };
    values
}

/// Has `write` make one part after the other, of `part` values each.
///
/// # Panics
/// When it returns something else than the part that it gets.
#[allow(unsafe_code)]
pub(crate) fn each_written<'d>(
    values: &'d mut [MaybeUninit<f32>],
    part: usize,
    mut write: impl for<'a> FnMut(usize, &'a mut [MaybeUninit<f32>]) -> &'a mut [f32],
) -> &'d mut [f32] {
    for (number, part) in values.chunks_mut(part.max(1)).enumerate() {
        let (start, n) = (part.as_ptr(), part.len());
        let made = write(number, part);
        assert!(
            made.len() == n && made.as_ptr() == start.cast(),
            "another result"
        );
    }
    // SAFETY: all parts have been returned as values.
    unsafe { values.assume_init_mut() }
}

/// What the rows of a result begin with, before products are added to them.
#[derive(Clone, Copy, Default)]
pub(crate) struct Start<'a> {
    /// As many values as the result has.
    pub(crate) residual: Option<&'a [f32]>,
    /// A value for each column.
    pub(crate) columns: Option<&'a [f32]>,
    /// A value for each row.
    pub(crate) rows: Option<&'a [f32]>,
}

impl<'a> Start<'a> {
    /// # Panics
    /// When it is not that of `rows` rows of `columns` values.
    pub(crate) fn check(&self, rows: usize, columns: usize) {
        let is = |values: Option<&[f32]>, n| values.is_none_or(|values| values.len() == n);
        assert!(
            is(self.residual, rows * columns) && is(self.columns, columns) && is(self.rows, rows),
            "a result begins with values of other sizes"
        );
    }

    /// That of `rows` rows from row `first` on, of `columns` values.
    pub(crate) fn of_rows(&self, first: usize, rows: usize, columns: usize) -> Self {
        let part = |values: &'a [f32], width| &values[first * width..][..rows * width];
        Self {
            residual: self.residual.map(|values| part(values, columns)),
            columns: self.columns,
            rows: self.rows.map(|values| part(values, 1)),
        }
    }

    /// Writes it, or zeros, to rows of `columns` values.
    pub(crate) fn written<'d>(
        &self,
        to: &'d mut [MaybeUninit<f32>],
        columns: usize,
    ) -> &'d mut [f32] {
        let columns = columns.max(1);
        self.check(to.len() / columns, columns);
        let fill = |(part, out): (usize, &mut [MaybeUninit<f32>])| {
            let first = part * (rows_of(columns) / columns);
            for (row, out) in (first..).zip(out.chunks_mut(columns)) {
                let constant = self.rows.map_or(0.0, |rows| rows[row]);
                let residual = self.residual.map(|values| &values[row * columns..]);
                for (column, out) in out.iter_mut().enumerate() {
                    let residual = residual.map_or(0.0, |values| values[column]);
                    let own = self.columns.map_or(0.0, |values| values[column]);
                    out.write(residual + own + constant);
                }
            }
        };
        to.par_chunks_mut(rows_of(columns))
            .enumerate()
            .for_each(fill);
        // SAFETY: all rows have been written, each to its end.
        #[allow(unsafe_code)]
        unsafe {
            to.assume_init_mut()
        }
    }
}

/// Where a product goes.
pub(crate) enum Onto<'d, 's> {
    /// To memory that has no values yet, with what they begin with.
    New(&'d mut [MaybeUninit<f32>], Start<'s>),
    /// To values that it is added to.
    Sum(&'d mut [f32]),
}

impl<'d> Onto<'d, '_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::New(dst, _) => dst.len(),
            Self::Sum(dst) => dst.len(),
        }
    }

    /// The values, of rows of `columns`, that products are to be added to.
    pub(crate) fn begun(self, columns: usize) -> &'d mut [f32] {
        match self {
            Self::New(dst, start) => start.written(dst, columns),
            Self::Sum(dst) => dst,
        }
    }
}

/// `n` zeros.
pub(crate) fn zeros<T: Copy + Default + Send>(n: usize) -> Vec<T> {
    in_parts(n, PART, |_, _| {})
}

/// The same values.
pub(crate) fn copied<T: Copy + Default + Send + Sync>(values: &[T]) -> Vec<T> {
    in_parts(values.len(), PART, |first, out: &mut [T]| {
        out.copy_from_slice(&values[first..first + out.len()]);
    })
}

/// How much of `total` a task takes, in whole units and at most `most`, so that threads have about as much
/// as one another. What tasks compute must not depend on it.
pub(crate) fn share(total: usize, most: usize, unit: usize) -> usize {
    let threads = rayon::current_num_threads();
    // What the thread with most has: tasks of the same size, and a last one that is smaller.
    let load = |size: usize| match (total / size, total % size) {
        (whole, rest) if whole.is_multiple_of(threads) => whole / threads * size + rest,
        (whole, _) => whole.div_ceil(threads) * size,
    };
    let sizes = (1..=most / unit).rev().map(|units| units * unit);
    let sizes = sizes.take_while(|size| 2 * size >= most);
    sizes.min_by_key(|size| load(*size)).unwrap_or(most)
}

/// Values per task that are whole rows of `width`.
pub(crate) fn rows_of(width: usize) -> usize {
    width.max(1) * (PART / width.max(1)).max(1)
}

/// Runs `body` on the values of an f32 tensor on the CPU.
pub(crate) fn with<R>(t: &Tensor, body: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(body(values(storage, layout)?)),
        _ => candle_core::bail!("expected a tensor on the CPU"),
    }
}

/// [`with`] for a tensor that may be absent.
pub(crate) fn maybe_with<R>(
    t: Option<&Tensor>,
    body: impl FnOnce(Option<&[f32]>) -> R,
) -> Result<R> {
    match t {
        Some(t) => with(t, |values| body(Some(values))),
        None => Ok(body(None)),
    }
}

/// [`with`] for two tensors.
pub(crate) fn with_both<R>(
    a: &Tensor,
    b: &Tensor,
    body: impl FnOnce(&[f32], &[f32]) -> R,
) -> Result<R> {
    with(a, |a| with(b, |b| body(a, b)))?
}
