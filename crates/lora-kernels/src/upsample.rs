//! Nearest-neighbour doubling. candle's own has a backward pass that replaces the
//! gradient already collected for its input instead of adding to it.

use candle_core::{Result, Tensor};

use crate::buffer::{added_in_parts, in_parts, with};
use crate::gradient::Gradient;
use crate::node::{Value, node};
use crate::{fast, plain};

/// Doubles height and width of `x` `[n, c, h, w]` by repeating pixels.
///
/// # Errors
/// When `x` does not have four dimensions.
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    if !fast(&[x]) {
        return plain::upsample_nearest2x(x);
    }
    let (n, c, h, w) = x.dims4()?;
    let y = with(&x.detach(), |x| {
        in_parts(4 * x.len(), 4 * h * w, |first, y: &mut [f32]| {
            let lines = x[first / 4..].chunks_exact(w.max(1));
            for (y, line) in y.chunks_exact_mut((4 * w).max(1)).zip(lines) {
                let (top, bottom) = y.split_at_mut(2 * w);
                for (y, v) in top.chunks_exact_mut(2).zip(line) {
                    y.fill(*v);
                }
                bottom.copy_from_slice(top);
            }
        })
    })?;
    let gradients = move |dy: &Tensor| {
        let dy = dy.contiguous()?;
        let to_x = Gradient::made(move |dx| {
            with(&dy, |dy| {
                added_in_parts(dx, dy.len() / 4, h * w, |first, dx| {
                    add_squares(dx, &dy[4 * first..], w);
                })
            })
        });
        Ok(vec![Some(to_x)])
    };
    let value = Value::cpu(y, (n, c, 2 * h, 2 * w));
    node("upsample_nearest2x", &[x], value, Box::new(gradients))
}

/// Adds the sum of each 2x2 square of `dy` to the pixel of `dx` in its place; lines of `dx` have `w`
/// pixels.
fn add_squares(dx: &mut [f32], dy: &[f32], w: usize) {
    let pairs = dy.chunks_exact((4 * w).max(1));
    for (dx, pair) in dx.chunks_exact_mut(w.max(1)).zip(pairs) {
        let (top, bottom) = pair.split_at(2 * w);
        let columns = top.chunks_exact(2).zip(bottom.chunks_exact(2));
        for (dx, (t, b)) in dx.iter_mut().zip(columns) {
            *dx += (t[0] + t[1]) + (b[0] + b[1]);
        }
    }
}
