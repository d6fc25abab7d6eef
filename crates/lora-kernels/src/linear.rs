//! `y = x W^T + b` with gradients for tracked operands only.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

use crate::added::{Added, frozen, linear_added};
use crate::buffer::{in_parts, rows_of, zeros};
use crate::matrix::{View, fill_rows, multiply};
use crate::{Compute, as_nodes, composed, fast, plain, values};

/// Linear layer: `x` `[.., i]`, `weight` `[o, i]`, `bias` `[o]`; returns `[.., o]`.
///
/// # Errors
/// When the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if frozen(weight, bias) || weight.dtype() != x.dtype() {
        return linear_added(x, weight, bias, Compute::F32, &Added::default());
    }
    let mut operands = vec![x, weight];
    operands.extend(bias);
    if !fast(&operands) {
        return match as_nodes() {
            true => composed::linear(x, weight, bias),
            false => plain::linear(x, weight, bias),
        };
    }
    let x = x.contiguous()?;
    let weight = weight.contiguous()?;
    match bias {
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, Linear),
        None => x.apply_op2(&weight, Linear),
    }
}

/// The operation on (x, weight) or (x, weight, bias).
struct Linear;

impl Linear {
    fn forward(
        x: &[f32],
        xl: &Layout,
        w: &[f32],
        wl: &Layout,
        bias: Option<&[f32]>,
    ) -> Result<(CpuStorage, Shape)> {
        let (o, i) = wl.shape().dims2()?;
        let dims = xl.dims();
        if dims.last() != Some(&i) || bias.is_some_and(|b| b.len() != o) {
            candle_core::bail!("linear: input {dims:?} and bias do not fit weight [{o}, {i}]");
        }
        let rows = x.len() / i.max(1);
        let mut y = in_parts(rows * o, rows_of(o), |_, y: &mut [f32]| {
            if let Some(bias) = bias {
                fill_rows(y, bias);
            }
        });
        multiply(
            &mut y,
            o,
            bias.is_some(),
            View::rows(x, rows, i, i),
            View::rows(w, o, i, i).t(),
        );
        let mut out = dims.to_vec();
        if let Some(last) = out.last_mut() {
            *last = o;
        }
        Ok((CpuStorage::F32(y), out.into()))
    }

    fn backward(x: &Tensor, w: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        gradients(x, w, dy, [x.track_op(), w.track_op()])
    }
}

/// The gradients to x and weight that are wanted; all contiguous.
pub(crate) fn gradients(
    x: &Tensor,
    w: &Tensor,
    dy: &Tensor,
    wanted: [bool; 2],
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let (o, i) = w.dims2()?;
    let dy = dy.detach().contiguous()?.reshape(((), o))?;
    let dx = if wanted[0] {
        Some(
            dy.apply_op2_no_bwd(&w.detach(), &Product)?
                .reshape(x.shape())?,
        )
    } else {
        None
    };
    let dw = if wanted[1] {
        Some(dy.apply_op2_no_bwd(&x.detach().reshape(((), i))?, &ProductTn)?)
    } else {
        None
    };
    Ok((dx, dw))
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Self::forward(values(s1, l1)?, l1, values(s2, l2)?, l2, None)
    }
    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Self::backward(x, w, dy)
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Self::forward(
            values(s1, l1)?,
            l1,
            values(s2, l2)?,
            l2,
            Some(values(s3, l3)?),
        )
    }
    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = Self::backward(x, w, dy)?;
        let db = if b.track_op() {
            // The sum over rows as a product with ones: candle's sum is slow in this direction.
            let dy = dy.detach().contiguous()?.reshape(((), b.elem_count()))?;
            let ones = Tensor::ones((dy.dim(0)?, 1), dy.dtype(), dy.device())?;
            Some(dy.apply_op2_no_bwd(&ones, &ProductTn)?.flatten_all()?)
        } else {
            None
        };
        Ok((dx, dw, db))
    }
}

/// `a b` of `[m, k]` and `[k, n]`.
struct Product;

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((m, k), (_, n)) = (l1.shape().dims2()?, l2.shape().dims2()?);
        let (a, b) = (values(s1, l1)?, values(s2, l2)?);
        let mut y = zeros(m * n);
        multiply(
            &mut y,
            n,
            false,
            View::rows(a, m, k, k),
            View::rows(b, k, n, n),
        );
        Ok((CpuStorage::F32(y), (m, n).into()))
    }
}

/// `a^T b` of `[k, m]` and `[k, n]`.
struct ProductTn;

impl CustomOp2 for ProductTn {
    fn name(&self) -> &'static str {
        "product_tn"
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((k, m), (_, n)) = (l1.shape().dims2()?, l2.shape().dims2()?);
        let (a, b) = (values(s1, l1)?, values(s2, l2)?);
        let mut y = zeros(m * n);
        multiply(
            &mut y,
            n,
            false,
            View::rows(a, k, m, m).t(),
            View::rows(b, k, n, n),
        );
        Ok((CpuStorage::F32(y), (m, n).into()))
    }
}
