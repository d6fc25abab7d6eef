//! Nearest-neighbour doubling. candle's own has a backward pass that replaces the
//! gradient already collected for its input instead of adding to it.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

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
        let mut y = Vec::with_capacity(4 * x.len());
        for line in x.chunks_exact(w.max(1)) {
            let start = y.len();
            y.extend(line.iter().flat_map(|&v| [v, v]));
            y.extend_from_within(start..);
        }
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
        let mut y = Vec::with_capacity(x.len() / 4);
        for pair in x.chunks_exact((2 * w).max(1)) {
            let (top, bottom) = pair.split_at(w);
            let columns = top.chunks_exact(2).zip(bottom.chunks_exact(2));
            y.extend(columns.map(|(t, b)| (t[0] + t[1]) + (b[0] + b[1])));
        }
        Ok((CpuStorage::F32(y), (n, c, h / 2, w / 2).into()))
    }
}
