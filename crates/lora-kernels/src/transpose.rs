//! Channels and pixels change places. candle copies one value after the other, on one thread.

use candle_core::{Result, Tensor};

use crate::buffer::{added_in_parts, in_parts, with};
use crate::fast;
use crate::gradient::Gradient;
use crate::math::vectorized;
use crate::node::{Value, node};

/// `x` `[n, a, b]` as `[n, b, a]`, contiguous.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[[[1f32, 2.], [3., 4.]]], &Device::Cpu)?;
/// let turned = lora_kernels::transpose(&x)?;
/// assert_eq!(turned.to_vec3::<f32>()?, [[[1., 3.], [2., 4.]]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When `x` does not have three dimensions.
pub fn transpose(x: &Tensor) -> Result<Tensor> {
    let (n, a, b) = x.dims3()?;
    if !fast(&[x]) {
        return x.transpose(1, 2)?.contiguous();
    }
    let turned = with(&x.detach(), |x| {
        in_parts(x.len(), ROWS * a, |first, out: &mut [f32]| {
            each_turned(out, x, first, (a, b), |out, x| *out = x);
        })
    })?;
    let gradients = move |dy: &Tensor| {
        let dy = dy.contiguous()?;
        let to_x = Gradient::made(move |dx| {
            with(&dy, |dy| {
                added_in_parts(dx, dy.len(), ROWS * b, |first, dx| {
                    each_turned(dx, dy, first, (b, a), |dx, dy| *dx += dy);
                })
            })
        });
        Ok(vec![Some(to_x)])
    };
    let value = Value::cpu(turned, (n, b, a));
    node("transpose", &[x], value, Box::new(gradients))
}

/// Rows of the result per task: they read the same lines of the cache.
const ROWS: usize = 16;

/// Calls `body` with values of the transposed `x` `[n, a, b]`, rows of `a` values that begin at
/// value `first`, and those of `x` that belong there.
fn each_turned(
    out: &mut [f32],
    x: &[f32],
    first: usize,
    (a, b): (usize, usize),
    body: impl Fn(&mut f32, f32),
) {
    let (width, start) = (a.max(1), first / a.max(1));
    vectorized(
        #[inline(always)]
        || {
            let mut block = [[0f32; ROWS]; ROWS];
            for (number, out) in out.chunks_mut(ROWS * width).enumerate() {
                let (row, rows) = (start + number * ROWS, out.len() / width);
                let (image, at) = (row / b, row % b);
                for column in (0..a).step_by(ROWS) {
                    for (line, values) in block.iter_mut().enumerate().take(a - column) {
                        let line = (image * a + column + line) * b;
                        if at + ROWS <= b && rows == ROWS {
                            values.copy_from_slice(&x[line + at..][..ROWS]);
                            continue;
                        }
                        for (at, value) in (at..).zip(&mut values[..rows]) {
                            // Rows past an image's end are the next one's.
                            *value = x[line + at / b * a * b + at % b];
                        }
                    }
                    for (at, out) in out.chunks_exact_mut(width).enumerate() {
                        let out = out[column..].iter_mut().zip(&block);
                        out.for_each(|(out, line)| body(out, line[at]));
                    }
                }
            }
        },
    );
}
