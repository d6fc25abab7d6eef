//! The same operations composed of candle's own: the path on devices other than
//! a CPU, for other dtypes, and the reference in tests.

use candle_core::{Result, Tensor};

use crate::Conv2dParams;

/// See [`linear`](crate::linear).
///
/// # Errors
/// When the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (o, i) = weight.dims2()?;
    let mut out = x.dims().to_vec();
    if let Some(last) = out.last_mut() {
        *last = o;
    }
    // One flat product: candle would otherwise copy the weight for each batch item.
    let y = x.reshape(((), i))?.matmul(&weight.t()?)?.reshape(out)?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// See [`conv2d`](crate::conv2d()).
///
/// # Errors
/// When the shapes do not fit.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    p: Conv2dParams,
) -> Result<Tensor> {
    let y = x.conv2d(weight, p.padding, p.stride, p.dilation, p.groups)?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
        None => Ok(y),
    }
}

/// See [`upsample_nearest2x`](crate::upsample_nearest2x).
///
/// # Errors
/// When `x` does not have four dimensions.
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    let (n, c, h, w) = x.dims4()?;
    x.reshape((n, c, h, 1, w, 1))?
        .broadcast_as((n, c, h, 2, w, 2))?
        .contiguous()?
        .reshape((n, c, 2 * h, 2 * w))
}
