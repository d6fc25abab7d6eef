//! The same operations composed of candle's own: the path on devices other than
//! a CPU, for other dtypes, and the reference in tests.

use candle_core::{D, DType, Result, Tensor};

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

/// See [`geglu`](crate::geglu).
///
/// # Errors
/// When the last axis cannot be halved.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    let axis = x.rank() - 1;
    let half = x.dim(axis)? / 2;
    x.narrow(axis, 0, half)? * x.narrow(axis, half, half)?.gelu_erf()?
}

/// See [`layer_norm`](crate::layer_norm). Statistics are computed in f32.
///
/// # Errors
/// When the shapes do not fit.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let normal = normalize(&x.to_dtype(DType::F32)?, eps)?;
    let y = normal.broadcast_mul(&weight.to_dtype(DType::F32)?)?;
    y.broadcast_add(&bias.to_dtype(DType::F32)?)?
        .to_dtype(x.dtype())
}

/// See [`group_norm`](crate::group_norm). Statistics are computed in f32.
///
/// # Errors
/// When the shapes do not fit.
pub fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    let (n, c, h, w) = x.dims4()?;
    if groups == 0 || c % groups != 0 {
        candle_core::bail!("group_norm: {c} channels cannot be split into {groups} groups");
    }
    let rows = x
        .to_dtype(DType::F32)?
        .reshape((n, groups, c / groups * h * w))?;
    let normal = normalize(&rows, eps)?.reshape((n, c, h, w))?;
    let column = |t: &Tensor| t.to_dtype(DType::F32)?.reshape((1, c, 1, 1));
    let y = normal
        .broadcast_mul(&column(weight)?)?
        .broadcast_add(&column(bias)?)?;
    let y = if silu { y.silu()? } else { y };
    y.to_dtype(x.dtype())
}

/// Zero mean and unit variance along the last axis.
fn normalize(x: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(variance + eps)?.sqrt()?)
}

/// Most elements of one score matrix when no gradient is recorded (256 MB as f32);
/// longer queries are cut. With gradients every score is kept anyway.
const MAX_SCORES: usize = 64 << 20;

/// Minus infinity where query `start + row` must not see key `column`, else 0: `[rows, lk]`.
pub(crate) fn causal_mask(start: usize, rows: usize, lk: usize, like: &Tensor) -> Result<Tensor> {
    let hidden = |i: usize| match i % lk > start + i / lk {
        true => f32::NEG_INFINITY,
        false => 0.0,
    };
    let mask: Vec<f32> = (0..rows * lk).map(hidden).collect();
    Tensor::from_vec(mask, (rows, lk), like.device())?.to_dtype(like.dtype())
}

/// See [`attention`](crate::attention()). The softmax is computed in f32.
///
/// # Errors
/// When the shapes do not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let (n, lq, c) = q.dims3()?;
    let lk = k.dim(1)?;
    let width = c / heads.max(1);
    let split = |t: &Tensor, l: usize| {
        t.reshape((n, l, heads, width))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((n * heads, l, width))
    };
    let (q, k, v) = (
        (split(q, lq)? * (width as f64).powf(-0.5))?,
        split(k, lk)?,
        split(v, lk)?,
    );
    let kt = k.transpose(1, 2)?.contiguous()?;
    let rows = if q.track_op() {
        lq
    } else {
        (MAX_SCORES / (n * heads * lk).max(1)).clamp(1, lq.max(1))
    };
    let mut parts = Vec::new();
    for start in (0..lq).step_by(rows) {
        let len = rows.min(lq - start);
        let mut scores = q
            .narrow(1, start, len)?
            .contiguous()?
            .matmul(&kt)?
            .to_dtype(DType::F32)?;
        if causal {
            scores = scores.broadcast_add(&causal_mask(start, len, lk, &scores)?)?;
        }
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
        parts.push(weights.matmul(&v)?);
    }
    let y = if parts.len() == 1 {
        parts.remove(0)
    } else {
        Tensor::cat(&parts, 1)?
    };
    y.reshape((n, heads, lq, width))?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((n, lq, c))
}
