//! Nearest-neighbour doubling. candle's own has a backward pass that replaces the
//! gradient already collected for its input instead of adding to it.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use crate::buffer::in_parts;
use crate::{fast, plain, values};

/// Doubles height and width of `x` `[n, c, h, w]` by repeating pixels.
///
/// # Errors
/// When `x` does not have four dimensions.
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    if fast(&[x]) {
        x.contiguous()?.apply_op1(Double)
    } else {
        plain::upsample_nearest2x(x)
    }
}

struct Double;

impl CustomOp1 for Double {
    fn name(&self) -> &'static str {
        "upsample_nearest2x"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, c, h, w) = layout.shape().dims4()?;
        let x = values(storage, layout)?;
        let y = in_parts(4 * x.len(), 4 * h * w, |first, y: &mut [f32]| {
            let lines = x[first / 4..].chunks_exact(w.max(1));
            for (y, line) in y.chunks_exact_mut((4 * w).max(1)).zip(lines) {
                let (top, bottom) = y.split_at_mut(2 * w);
                for (y, v) in top.chunks_exact_mut(2).zip(line) {
                    y.fill(*v);
                }
                bottom.copy_from_slice(top);
            }
        });
        Ok((CpuStorage::F32(y), (n, c, 2 * h, 2 * w).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        Ok(Some(
            dy.detach().contiguous()?.apply_op1_no_bwd(&SumSquares)?,
        ))
    }
}

/// Sums each 2x2 square.
struct SumSquares;

impl CustomOp1 for SumSquares {
    fn name(&self) -> &'static str {
        "sum_2x2"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, c, h, w) = layout.shape().dims4()?;
        let x = values(storage, layout)?;
        let y = in_parts(x.len() / 4, h * w / 4, |first, y: &mut [f32]| {
            let pairs = x[4 * first..].chunks_exact((2 * w).max(1));
            for (y, pair) in y.chunks_exact_mut((w / 2).max(1)).zip(pairs) {
                let (top, bottom) = pair.split_at(w);
                let columns = top.chunks_exact(2).zip(bottom.chunks_exact(2));
                for (y, (t, b)) in y.iter_mut().zip(columns) {
                    *y = (t[0] + t[1]) + (b[0] + b[1]);
                }
            }
        });
        Ok((CpuStorage::F32(y), (n, c, h / 2, w / 2).into()))
    }
}
