//! Scaled dot-product attention.

use candle_core::{D, DType, Result, Tensor};

/// Most elements of one score matrix when no gradient is recorded (256 MB as f32);
/// longer queries are cut. With gradients every score is kept anyway.
const MAX_SCORES: usize = 64 << 20;

/// Attention over `heads`: `q` `[n, lq, c]`, `k` and `v` `[n, lk, c]`, an additive
/// f32 `mask` `[lq, lk]`; returns `[n, lq, c]`. The softmax is computed in f32.
pub(crate) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    let (n, lq, c) = q.dims3()?;
    let lk = k.dim(1)?;
    let width = c / heads;
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
        if let Some(mask) = mask {
            scores = scores.broadcast_add(&mask.narrow(0, start, len)?)?;
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
