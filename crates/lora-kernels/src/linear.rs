//! `y = x W^T + b` with gradients for tracked operands only.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::added::{Added, frozen, linear_added};
use crate::buffer::{in_parts, maybe_with, rows_of, with, with_both};
use crate::gradient::Gradient;
use crate::matrix::{View, fill_rows, multiply, multiply_in};
use crate::node::{Saved, Value, node};
use crate::{Compute, as_nodes, composed, fast, plain};

/// Linear layer: `x` `[.., i]`, `weight` `[o, i]`, `bias` `[o]`; returns `[.., o]`.
///
/// # Errors
/// When the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if frozen(weight, bias) || weight.dtype() != x.dtype() {
        return linear_added(x, weight, bias, Compute::F32, &Added::default());
    }
    trained(x, weight, bias, Compute::F32)
}

/// [`linear`] of operands of one dtype.
pub(crate) fn trained(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    compute: Compute,
) -> Result<Tensor> {
    let mut operands = vec![x, weight];
    operands.extend(bias);
    if !fast(&operands) {
        return match as_nodes() {
            true => composed::linear(x, weight, bias),
            false => plain::linear(x, weight, bias),
        };
    }
    let (o, i) = weight.dims2()?;
    let mut dims = x.dims().to_vec();
    match dims.last_mut() {
        Some(last) if *last == i && bias.is_none_or(|b| b.dims() == [o]) => *last = o,
        _ => candle_core::bail!("linear: input {dims:?} and bias do not fit weight [{o}, {i}]"),
    }
    let (input, w) = (x.contiguous()?, weight.detach().contiguous()?);
    let (saved, input) = (Saved::of(&input)?, input.detach());
    let rows = x.elem_count() / i.max(1);
    let mut y = maybe_with(bias, |bias| {
        in_parts(rows * o, rows_of(o), |_, y: &mut [f32]| {
            if let Some(bias) = bias {
                fill_rows(y, bias);
            }
        })
    })?;
    with_both(&input, &w, |x, w| {
        let (x, w) = (View::rows(x, rows, i, i), View::rows(w, o, i, i));
        multiply_in(compute, &mut y, o, bias.is_some(), x, w.t());
    })?;
    let wanted = [x, weight].map(Tensor::track_op);
    let to_bias = bias.is_some_and(Tensor::track_op);
    let backward = move |dy: &Tensor| {
        let dy = dy.contiguous()?;
        let mut all = Vec::from(gradients(&saved, &w, &dy, compute, wanted)?);
        // The sum over rows as a product with ones.
        all.push(to_bias.then(|| {
            Gradient::values(move |db, add| {
                let ones = vec![1f32; rows];
                with(&dy, |dy| {
                    let dy = View::rows(dy, rows, o, o).t();
                    multiply(db, 1, add, dy, View::rows(ones.as_slice(), rows, 1, 1));
                })
            })
        }));
        Ok(all)
    };
    let args: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    node("linear", &args, Value::cpu(y, dims), Box::new(backward))
}

/// The gradients to x and weight that are wanted; all contiguous.
pub(crate) fn gradients(
    x: &Arc<Saved>,
    w: &Tensor,
    dy: &Tensor,
    compute: Compute,
    wanted: [bool; 2],
) -> Result<[Option<Gradient>; 2]> {
    let (o, i) = w.dims2()?;
    let rows = dy.elem_count() / o.max(1);
    let to_x = wanted[0].then(|| {
        let (dy, w) = (dy.clone(), w.clone());
        Gradient::values(move |dx, add| {
            with_both(&dy, &w, |dy, w| {
                let (dy, w) = (View::rows(dy, rows, o, o), View::rows(w, o, i, i));
                multiply_in(compute, dx, i, add, dy, w);
            })
        })
    });
    let to_w = wanted[1].then(|| {
        let (dy, x) = (dy.clone(), x.clone());
        Gradient::values(move |dw, add| {
            with_both(&dy, &x.value()?, |dy, x| {
                let (dy, x) = (View::rows(dy, rows, o, o), View::rows(x, rows, i, i));
                multiply_in(compute, dw, i, add, dy.t(), x);
            })
        })
    });
    Ok([to_x, to_w])
}
