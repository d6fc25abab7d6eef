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
