//! Arithmetic that one formula needs, for one `f32` and for a whole tensor.
//!
//! An update rule is written once, generic over [`Lane`]. With `f32` the compiler
//! turns it into a fused, vectorised loop over slices; with [`TensorLane`] the same
//! text becomes a handful of candle operations on whatever device holds the tensor.

use std::ops::{Add, Div, Mul, Neg, Sub};
use std::sync::Arc;

use candle_core::Tensor;

/// A value of the update formulas.
pub(crate) trait Lane:
    Clone
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// `self * factor + term`, in this order.
    fn affine(self, factor: f32, term: f32) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Absolute value.
    fn abs(self) -> Self;
    /// The greater of two.
    fn max(self, other: Self) -> Self;
    /// -1, 0 or 1.
    fn sign(self) -> Self;
    /// `self * factor`.
    #[inline(always)]
    fn times(self, factor: f32) -> Self {
        self.affine(factor, 0.0)
    }
    /// `self + term`.
    #[inline(always)]
    fn plus(self, term: f32) -> Self {
        self.affine(1.0, term)
    }
}

impl Lane for f32 {
    #[inline(always)]
    fn affine(self, factor: f32, term: f32) -> Self {
        self * factor + term
    }
    #[inline(always)]
    fn times(self, factor: f32) -> Self {
        self * factor
    }
    #[inline(always)]
    fn plus(self, term: f32) -> Self {
        self + term
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn abs(self) -> Self {
        f32::abs(self)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if other > self { other } else { self }
    }
    #[inline(always)]
    fn sign(self) -> Self {
        (if self > 0.0 { 1.0 } else { 0.0 }) - (if self < 0.0 { 1.0 } else { 0.0 })
    }
}

/// A tensor in a formula. The first failed operation is kept and comes out at the end.
#[derive(Debug, Clone)]
pub(crate) struct TensorLane(Result<Tensor, Arc<candle_core::Error>>);

impl TensorLane {
    pub(crate) fn new(tensor: Tensor) -> Self {
        Self(Ok(tensor))
    }

    /// The tensor, or the first error on the way to it.
    pub(crate) fn finish(self) -> candle_core::Result<Tensor> {
        self.0.map_err(|e| candle_core::Error::Msg(e.to_string()))
    }

    fn unary(self, op: impl FnOnce(Tensor) -> candle_core::Result<Tensor>) -> Self {
        Self(self.0.and_then(|t| op(t).map_err(Arc::new)))
    }

    fn binary(
        self,
        other: Self,
        op: impl FnOnce(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> Self {
        Self(
            self.0
                .and_then(|a| other.0.and_then(|b| op(&a, &b).map_err(Arc::new))),
        )
    }
}

impl Add for TensorLane {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        self.binary(other, |a, b| a + b)
    }
}
impl Sub for TensorLane {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self.binary(other, |a, b| a - b)
    }
}
impl Mul for TensorLane {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        self.binary(other, |a, b| a * b)
    }
}
impl Div for TensorLane {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        self.binary(other, |a, b| a / b)
    }
}
impl Neg for TensorLane {
    type Output = Self;
    fn neg(self) -> Self {
        self.unary(|t| t.neg())
    }
}

impl Lane for TensorLane {
    fn affine(self, factor: f32, term: f32) -> Self {
        self.unary(|t| t.affine(f64::from(factor), f64::from(term)))
    }
    fn sqrt(self) -> Self {
        self.unary(|t| t.sqrt())
    }
    fn abs(self) -> Self {
        self.unary(|t| t.abs())
    }
    fn max(self, other: Self) -> Self {
        self.binary(other, |a, b| a.maximum(b))
    }
    fn sign(self) -> Self {
        self.unary(|t| t.sign())
    }
}

/// `m + (x - m) * (1 - beta)`: the running average of the Adam family.
#[inline(always)]
pub(crate) fn average<L: Lane>(m: L, x: L, one_minus_beta: f32) -> L {
    m.clone() + (x - m).times(one_minus_beta)
}

/// `beta * v + (1 - beta) * x`.
#[inline(always)]
pub(crate) fn decay_into<L: Lane>(v: L, x: L, beta: f32, one_minus_beta: f32) -> L {
    v.times(beta) + x.times(one_minus_beta)
}

/// `beta * v + gain * x^2`, in an order that keeps small squares in range.
#[inline(always)]
pub(crate) fn decay_into_square<L: Lane>(v: L, x: L, beta: f32, gain: f32) -> L {
    v.times(beta) + x.clone().times(gain) * x
}

/// `a + weight * (b - a)`, in the order that keeps the nearer end exact.
#[inline(always)]
pub(crate) fn lerp<L: Lane>(a: L, b: L, weight: f32) -> L {
    let difference = b.clone() - a.clone();
    if weight < 0.5 {
        a + difference.times(weight)
    } else {
        b - difference.times(1.0 - weight)
    }
}
