//! The fused loop: one kernel over slices, vectorised and split between threads.
//!
//! Results do not depend on the number of threads nor on the width of the CPU's
//! registers: tensors are split by their length alone, every sum is formed from
//! sixteen interleaved partial sums per chunk, and chunks are added in order in f64.

use std::ops::{Add, Div, Mul, Neg, Sub};

use pulp::{Simd, WithSimd};

use crate::lane::Lane;
use crate::slot::Kernel;

/// Elements whose sum is formed in f32 before it is added to the f64 total.
const CHUNK: usize = 4096;
/// A tensor longer than this is split between threads.
const LEAF: usize = 8 * CHUNK;
/// Independent partial sums inside a chunk.
const PARTS: usize = 16;
/// Elements handled at once; the widest registers hold a divisor of it.
const BLOCK: usize = 256;

/// Runs `kernel` over `len` elements of all slices; returns what it sums.
pub(crate) fn walk<const W: usize, const C: usize, const R: usize, K: Kernel<W, C, R>>(
    mut write: [&mut [f32]; W],
    read: [&[f32]; C],
    scale: [f32; C],
    len: usize,
    kernel: &K,
) -> [f64; R] {
    if len <= LEAF {
        return pulp::Arch::new().dispatch(Leaf {
            write,
            read,
            scale,
            len,
            kernel,
        });
    }
    let middle = (len / 2).next_multiple_of(CHUNK);
    let mut tail: [&mut [f32]; W] = std::array::from_fn(|_| &mut [][..]);
    for (w, t) in write.iter_mut().zip(tail.iter_mut()) {
        (*w, *t) = std::mem::take(w).split_at_mut(middle);
    }
    let (head_read, tail_read) = (read.map(|r| &r[..middle]), read.map(|r| &r[middle..]));
    let (a, b) = rayon::join(
        || walk(write, head_read, scale, middle, kernel),
        || walk(tail, tail_read, scale, len - middle, kernel),
    );
    std::array::from_fn(|i| a[i] + b[i])
}

/// A stretch that one thread walks.
struct Leaf<'a, const W: usize, const C: usize, const R: usize, K> {
    write: [&'a mut [f32]; W],
    read: [&'a [f32]; C],
    scale: [f32; C],
    len: usize,
    kernel: &'a K,
}

impl<const W: usize, const C: usize, const R: usize, K: Kernel<W, C, R>> WithSimd
    for Leaf<'_, W, C, R, K>
{
    type Output = [f64; R];

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> [f64; R] {
        let Leaf {
            mut write,
            read,
            scale,
            len,
            kernel,
        } = self;
        let mut total = [0.0f64; R];
        let mut partial = [[0.0f32; PARTS]; R];
        let mut terms = [[0.0f32; BLOCK]; R];
        let whole = len - len % BLOCK;
        let mut start = 0;
        while start < whole {
            let range = start..start + BLOCK;
            let outputs = write
                .each_mut()
                .map(|w| S::as_mut_simd_f32s(&mut w[range.clone()]).0);
            let inputs = read.map(|r| S::as_simd_f32s(&r[range.clone()]).0);
            let sums = terms.each_mut().map(|t| S::as_mut_simd_f32s(t).0);
            for j in 0..BLOCK / S::F32_LANES {
                let vector = |value| Vector { simd, value };
                let mut element: [Vector<S>; W] = std::array::from_fn(|i| vector(outputs[i][j]));
                let given = std::array::from_fn(|i| vector(inputs[i][j]).times(scale[i]));
                let terms: [Vector<S>; R] = kernel.element(&mut element, given);
                for i in 0..W {
                    outputs[i][j] = element[i].value;
                }
                for i in 0..R {
                    sums[i][j] = terms[i].value;
                }
            }
            for (partial, terms) in partial.iter_mut().zip(&terms) {
                for row in terms.as_chunks::<PARTS>().0 {
                    for (sum, term) in partial.iter_mut().zip(row) {
                        *sum += term;
                    }
                }
            }
            start += BLOCK;
            if start % CHUNK == 0 {
                collect(&mut partial, &mut total);
            }
        }
        for j in whole..len {
            let mut element: [f32; W] = std::array::from_fn(|i| write[i][j]);
            let terms =
                kernel.element(&mut element, std::array::from_fn(|i| read[i][j] * scale[i]));
            for i in 0..W {
                write[i][j] = element[i];
            }
            for i in 0..R {
                partial[i][j % PARTS] += terms[i];
            }
        }
        collect(&mut partial, &mut total);
        total
    }
}

/// Adds the partial sums of a chunk to the totals.
#[inline(always)]
fn collect<const R: usize>(partial: &mut [[f32; PARTS]; R], total: &mut [f64; R]) {
    for (total, partial) in total.iter_mut().zip(partial) {
        *total += partial.iter().map(|x| f64::from(*x)).sum::<f64>();
        *partial = [0.0; PARTS];
    }
}

/// One register of values.
#[derive(Clone, Copy)]
struct Vector<S: Simd> {
    simd: S,
    value: S::f32s,
}

macro_rules! operator {
    ($trait:ident, $function:ident, $intrinsic:ident) => {
        impl<S: Simd> $trait for Vector<S> {
            type Output = Self;
            #[inline(always)]
            fn $function(self, other: Self) -> Self {
                Self {
                    value: self.simd.$intrinsic(self.value, other.value),
                    ..self
                }
            }
        }
    };
}
operator!(Add, add, add_f32s);
operator!(Sub, sub, sub_f32s);
operator!(Mul, mul, mul_f32s);
operator!(Div, div, div_f32s);

impl<S: Simd> Neg for Vector<S> {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        Self {
            value: self.simd.neg_f32s(self.value),
            ..self
        }
    }
}

impl<S: Simd> Lane for Vector<S> {
    // Two roundings, not one: the references do not fuse either.
    #[inline(always)]
    fn affine(self, factor: f32, term: f32) -> Self {
        self.times(factor).plus(term)
    }
    #[inline(always)]
    fn times(self, factor: f32) -> Self {
        Self {
            value: self.simd.mul_f32s(self.value, self.simd.splat_f32s(factor)),
            ..self
        }
    }
    #[inline(always)]
    fn plus(self, term: f32) -> Self {
        Self {
            value: self.simd.add_f32s(self.value, self.simd.splat_f32s(term)),
            ..self
        }
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        Self {
            value: self.simd.sqrt_f32s(self.value),
            ..self
        }
    }
    #[inline(always)]
    fn abs(self) -> Self {
        Self {
            value: self.simd.abs_f32s(self.value),
            ..self
        }
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self {
            value: self.simd.max_f32s(self.value, other.value),
            ..self
        }
    }
    #[inline(always)]
    fn sign(self) -> Self {
        let (zero, one) = (self.simd.splat_f32s(0.0), self.simd.splat_f32s(1.0));
        let above = self
            .simd
            .select_f32s(self.simd.greater_than_f32s(self.value, zero), one, zero);
        let below = self
            .simd
            .select_f32s(self.simd.less_than_f32s(self.value, zero), one, zero);
        Self {
            value: self.simd.sub_f32s(above, below),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sum;
    impl Kernel<1, 1, 1> for Sum {
        fn element<L: Lane>(&self, [w]: &mut [L; 1], [c]: [L; 1]) -> [L; 1] {
            *w = w.clone() + c.clone();
            [c]
        }
    }

    /// 1 / n over a length that needs a split, whole blocks and a rest.
    #[test]
    fn sums_are_the_same_with_any_number_of_threads() {
        let read: Vec<f32> = (0..3 * LEAF + 77).map(|i| 1.0 / (i + 1) as f32).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let mut write = vec![0.0f32; read.len()];
            let [sum] = pool.install(|| walk([&mut write], [&read], [2.0], read.len(), &Sum));
            assert!(write.iter().zip(&read).all(|(w, r)| *w == 2.0 * r));
            sum
        };
        let exact: f64 = read.iter().map(|x| 2.0 * f64::from(*x)).sum();
        let sums: Vec<f64> = [1, 2, 3, 8].map(run).to_vec();
        assert!(sums.iter().all(|s| s.to_bits() == sums[0].to_bits()));
        // f32 partial sums of 256 values each: relative error below 256 * 2^-24.
        assert!(
            (sums[0] - exact).abs() < 1.6e-5 * exact,
            "{} {exact}",
            sums[0]
        );
    }
}
