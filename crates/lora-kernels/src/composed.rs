//! Layers for devices that have no kernels here: composed of candle's operations, but as
//! single nodes of the graph, so that frozen weights get no gradients, sums keep no
//! intermediate results, and attention and norms keep only what they were given.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::ops::softmax_last_dim;

use crate::added::{Added, detached};
use crate::gradient::Gradient;
use crate::node::{Gradients, Saved, Value, node};
use crate::{Compute, Conv2dParams, plain};

/// The dtype in which operands are multiplied. On a CPU candle has no products in bf16 worth
/// the name.
fn product_dtype(x: &Tensor, compute: Compute) -> DType {
    match compute {
        Compute::Bf16 if !x.device().is_cpu() && x.dtype() == DType::F32 => DType::BF16,
        _ => x.dtype(),
    }
}

/// A layer's frozen product, and that of its low-rank branches.
trait Layer: Send + Sync + 'static {
    fn name(&self) -> &'static str;
    fn forward(&self, x: &Tensor) -> Result<Tensor>;
    /// The gradient to x from that to the result.
    fn input_gradient(&self, dy: &Tensor) -> Result<Tensor>;
    /// `up middle`.
    fn branch(&self, middle: &Tensor, up: &Tensor) -> Result<Tensor>;
    /// The gradients to middle and up.
    fn branch_gradients(
        &self,
        middle: &Tensor,
        up: &Tensor,
        dy: &Tensor,
    ) -> Result<(Tensor, Tensor)>;
    /// One number per output channel in the shape that a result is shifted by.
    fn channels(&self, constant: &Tensor) -> Result<Tensor>;
}

/// The frozen layer's result and what is added to it, as one node.
fn added(
    layer: impl Layer,
    x: &Tensor,
    bias: Option<&Tensor>,
    added: &Added<'_>,
) -> Result<Tensor> {
    let mut y = layer.forward(&x.detach())?;
    for constant in bias.into_iter().chain(added.shift) {
        y = y.broadcast_add(&layer.channels(&constant.detach())?)?;
    }
    let pairs = detached(added.low_rank);
    for (middle, up) in &pairs {
        y = (y + layer.branch(middle, up)?)?;
    }
    if let Some(residual) = added.residual {
        y = (y + residual.detach())?;
    }
    let (name, input) = (layer.name(), x.track_op());
    let (residual, shift) = (added.residual.is_some(), added.shift.is_some());
    let gradients: Gradients = Box::new(move |dy| {
        let dy = dy.contiguous()?;
        let mut all = Vec::with_capacity(1 + 2 * pairs.len());
        all.push(match input {
            true => Some(layer.input_gradient(&dy)?),
            false => None,
        });
        for (middle, up) in &pairs {
            let (middle, up) = layer.branch_gradients(middle, up, &dy)?;
            all.extend([Some(middle), Some(up)]);
        }
        if residual {
            all.push(Some(dy.clone()));
        }
        if shift {
            all.push(Some(dy.sum((2, 3))?));
        }
        Ok(tensors(all))
    });
    let args: Vec<&Tensor> = std::iter::once(x).chain(added.tensors()).collect();
    node(name, &args, Value::Tensor(y), gradients)
}

/// As what a node gives its arguments.
fn tensors(all: impl IntoIterator<Item = Option<Tensor>>) -> Vec<Option<Gradient>> {
    let each = all.into_iter();
    each.map(|gradient| gradient.map(Gradient::Tensor))
        .collect()
}

/// See [`linear_added`](crate::linear_added); weight and bias are frozen.
pub(crate) fn linear_added(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    compute: Compute,
    what: &Added<'_>,
) -> Result<Tensor> {
    let layer = Linear {
        weight: weight.detach(),
        input: x.dims().to_vec(),
        dtype: product_dtype(x, compute),
    };
    added(layer, x, bias, what)
}

struct Linear {
    weight: Tensor,
    /// The input's shape.
    input: Vec<usize>,
    /// In which weight and input are multiplied.
    dtype: DType,
}

/// All axes but the last as one.
fn rows(t: &Tensor) -> Result<Tensor> {
    t.reshape(((), t.dim(D::Minus1)?))
}

impl Layer for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight.to_dtype(self.dtype)?;
        plain::linear(&x.to_dtype(self.dtype)?, &weight, None)?.to_dtype(x.dtype())
    }

    fn input_gradient(&self, dy: &Tensor) -> Result<Tensor> {
        let weight = self.weight.to_dtype(self.dtype)?;
        let dx = rows(dy)?.to_dtype(self.dtype)?.matmul(&weight)?;
        dx.to_dtype(dy.dtype())?.reshape(self.input.as_slice())
    }

    fn branch(&self, middle: &Tensor, up: &Tensor) -> Result<Tensor> {
        plain::linear(middle, up, None)
    }

    fn branch_gradients(
        &self,
        middle: &Tensor,
        up: &Tensor,
        dy: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let dy = rows(dy)?;
        let to_middle = dy.matmul(up)?.reshape(middle.shape())?;
        Ok((to_middle, dy.t()?.matmul(&rows(middle)?)?))
    }

    fn channels(&self, constant: &Tensor) -> Result<Tensor> {
        Ok(constant.clone())
    }
}

/// See [`linear`](crate::linear); weight or bias are trained.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (saved, w) = (Saved::of(x)?, weight.detach());
    let y = plain::linear(&x.detach(), &w, bias.map(Tensor::detach).as_ref())?;
    let wanted = [x, weight].map(Tensor::track_op);
    let with_bias = bias.is_some();
    let gradients: Gradients = Box::new(move |dy| {
        let dy = dy.contiguous()?;
        let mut all = Vec::from(linear_gradients(&saved.value()?, &w, &dy, wanted)?);
        if with_bias {
            all.push(Some(rows(&dy)?.sum(0)?.into()));
        }
        Ok(all)
    });
    let args: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    node("linear", &args, Value::Tensor(y), gradients)
}

/// The gradients to x and weight that are wanted.
pub(crate) fn linear_gradients(
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    wanted: [bool; 2],
) -> Result<[Option<Gradient>; 2]> {
    let dy = rows(dy)?;
    let dx = match wanted[0] {
        true => Some(dy.matmul(weight)?.reshape(x.shape())?.into()),
        false => None,
    };
    let dw = match wanted[1] {
        true => Some(dy.t()?.matmul(&rows(x)?)?.into()),
        false => None,
    };
    Ok([dx, dw])
}

/// See [`conv2d_added`](crate::conv2d_added); weight and bias are frozen.
pub(crate) fn conv2d_added(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    params: Conv2dParams,
    compute: Compute,
    what: &Added<'_>,
) -> Result<Tensor> {
    let layer = Conv {
        dtype: product_dtype(x, compute),
        ..Conv::new(x, weight, params)?
    };
    added(layer, x, bias, what)
}

struct Conv {
    weight: Tensor,
    /// The input's height and width.
    size: (usize, usize),
    params: Conv2dParams,
    dtype: DType,
}

impl Conv {
    fn new(x: &Tensor, weight: &Tensor, params: Conv2dParams) -> Result<Self> {
        let (_, _, h, w) = x.dims4()?;
        Ok(Self {
            weight: weight.detach(),
            size: (h, w),
            params,
            dtype: x.dtype(),
        })
    }

    /// One group's gradient to the input: a convolution with the weight transposed and turned
    /// by 180 degrees, of gradients set apart by the stride. (candle's transposed convolution
    /// is a direct loop on GPUs.)
    fn one_group(&self, weight: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let (o, c, kh, kw) = weight.dims4()?;
        let Conv2dParams {
            stride,
            padding,
            dilation,
            ..
        } = self.params;
        let (reach_h, reach_w) = (dilation * (kh - 1), dilation * (kw - 1));
        if kh != kw || padding > reach_h {
            let (_, _, h, w) = dy.dims4()?;
            // What the stride leaves over on the far side.
            let beyond = |len: usize, out: usize, reach: usize| {
                (len + 2 * padding).saturating_sub((out - 1) * stride + reach + 1)
            };
            let (over_h, over_w) = (
                beyond(self.size.0, h, reach_h),
                beyond(self.size.1, w, reach_w),
            );
            let over = over_h.max(over_w);
            let dx = dy.conv_transpose2d(weight, padding, over, stride, dilation)?;
            return dx.narrow(2, 0, self.size.0)?.narrow(3, 0, self.size.1);
        }
        let turned: Vec<u32> = (0..(kh * kw) as u32).rev().collect();
        let turned = Tensor::new(turned, weight.device())?;
        let weight = weight
            .transpose(0, 1)?
            .reshape((c, o, kh * kw))?
            .index_select(&turned, 2)?
            .reshape((c, o, kh, kw))?;
        let (n, _, h, w) = dy.dims4()?;
        let apart = match stride {
            1 => dy.clone(),
            _ => dy
                .reshape((n, o, h, 1, w, 1))?
                .pad_with_zeros(3, 0, stride - 1)?
                .pad_with_zeros(5, 0, stride - 1)?
                .reshape((n, o, h * stride, w * stride))?,
        };
        let dx = apart.conv2d(&weight, reach_h - padding, 1, dilation, 1)?;
        dx.narrow(2, 0, self.size.0)?.narrow(3, 0, self.size.1)
    }

    /// A product of gradients and shifted input for each tap.
    fn weight_gradient(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let (o, _, kh, kw) = self.weight.dims4()?;
        let (_, _, h, w) = dy.dims4()?;
        let Conv2dParams {
            stride,
            padding,
            dilation,
            groups,
        } = self.params;
        let x = x
            .pad_with_zeros(2, padding, padding)?
            .pad_with_zeros(3, padding, padding)?;
        // Positions of the input that one tap reads along an axis.
        let read = |x: &Tensor, axis: usize, tap: usize, out: usize| {
            let start = tap * dilation;
            if stride == 1 {
                return x.narrow(axis, start, out);
            }
            let at: Vec<u32> = (0..out).map(|i| (start + i * stride) as u32).collect();
            x.index_select(&Tensor::new(at, x.device())?, axis)
        };
        // Channels first: samples and pixels are summed over alike.
        let flat = |t: &Tensor| t.transpose(0, 1)?.contiguous()?.flatten_from(1);
        let dy = flat(dy)?;
        let mut taps = Vec::with_capacity(kh * kw);
        for (ky, kx) in (0..kh).flat_map(|ky| (0..kw).map(move |kx| (ky, kx))) {
            let x = flat(&read(&read(&x, 2, ky, h)?, 3, kx, w)?)?;
            let pairs = dy.chunk(groups, 0)?.into_iter().zip(x.chunk(groups, 0)?);
            let parts = pairs.map(|(dy, x)| dy.matmul(&x.t()?));
            taps.push(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?);
        }
        Tensor::stack(&taps, 2)?.reshape((o, (), kh, kw))
    }
}

impl Layer for Conv {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight.to_dtype(self.dtype)?;
        let x_ = x.to_dtype(self.dtype)?;
        plain::conv2d(&x_, &weight, None, self.params)?.to_dtype(x.dtype())
    }

    fn input_gradient(&self, dy: &Tensor) -> Result<Tensor> {
        let weight = self.weight.to_dtype(self.dtype)?;
        let dy_ = dy.to_dtype(self.dtype)?;
        let groups = self.params.groups;
        let dx = match groups {
            1 => self.one_group(&weight, &dy_)?,
            _ => {
                let pairs = weight
                    .chunk(groups, 0)?
                    .into_iter()
                    .zip(dy_.chunk(groups, 1)?);
                let parts =
                    pairs.map(|(w, dy)| self.one_group(&w.contiguous()?, &dy.contiguous()?));
                Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)?
            }
        };
        dx.to_dtype(dy.dtype())?.contiguous()
    }

    fn branch(&self, middle: &Tensor, up: &Tensor) -> Result<Tensor> {
        let (n, r, h, w) = middle.dims4()?;
        let y = up.broadcast_matmul(&middle.reshape((n, r, h * w))?)?;
        y.reshape((n, up.dim(0)?, h, w))
    }

    fn branch_gradients(
        &self,
        middle: &Tensor,
        up: &Tensor,
        dy: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (dy, pixels) = (dy.flatten_from(2)?, middle.flatten_from(2)?);
        let to_middle = up.t()?.contiguous()?.broadcast_matmul(&dy)?;
        let to_up = dy.matmul(&pixels.transpose(1, 2)?.contiguous()?)?.sum(0)?;
        Ok((to_middle.reshape(middle.shape())?, to_up))
    }

    fn channels(&self, constant: &Tensor) -> Result<Tensor> {
        constant.reshape(((), self.weight.dim(0)?, 1, 1))
    }
}

/// See [`conv2d`](crate::conv2d()), without a bias; the weight is trained.
pub(crate) fn conv2d(x: &Tensor, weight: &Tensor, params: Conv2dParams) -> Result<Tensor> {
    let layer = Conv::new(x, weight, params)?;
    let (input, w) = (x.detach(), weight.detach());
    let y = layer.forward(&input)?;
    let wanted = [x, weight].map(Tensor::track_op);
    let gradients: Gradients = Box::new(move |dy| {
        let dy = dy.contiguous()?;
        conv2d_gradients(params, &input, &w, &dy, wanted).map(Vec::from)
    });
    node("conv2d", &[x, weight], Value::Tensor(y), gradients)
}

/// The gradients to x and weight that are wanted.
pub(crate) fn conv2d_gradients(
    params: Conv2dParams,
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    wanted: [bool; 2],
) -> Result<[Option<Gradient>; 2]> {
    let layer = Conv::new(x, weight, params)?;
    let dx = match wanted[0] {
        true => Some(layer.input_gradient(dy)?.into()),
        false => None,
    };
    let dw = match wanted[1] {
        true => Some(layer.weight_gradient(x, dy)?.into()),
        false => None,
    };
    Ok([dx, dw])
}

/// Layer norm of `x` `[.., c]`, or, of `groups`, group norm of `x` `[n, c, h, w]` with SiLU
/// behind it if wanted; weight and bias `[c]` are frozen.
pub(crate) fn norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: Option<usize>,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    let norm = Norm {
        x: x.detach(),
        weight: weight.detach().to_dtype(DType::F32)?,
        bias: bias.detach().to_dtype(DType::F32)?,
        groups,
        eps,
    };
    let normal = norm.normal()?.0;
    let y = norm.scaled(&normal)?;
    let y = if silu { y.silu()? } else { y };
    node(
        "norm",
        &[x],
        Value::Tensor(y.to_dtype(x.dtype())?),
        Box::new(move |dy| Ok(vec![Some(norm.gradient(dy, silu)?.into())])),
    )
}

struct Norm {
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: Option<usize>,
    eps: f64,
}

impl Norm {
    /// What is normalized together as rows, in f32.
    fn rows(&self, t: &Tensor) -> Result<Tensor> {
        let t = t.to_dtype(DType::F32)?;
        match self.groups {
            None => rows(&t),
            Some(groups) => t.reshape((t.dim(0)? * groups, ())),
        }
    }

    /// x of mean 0 and variance 1, in its own shape, and one over the deviation of each row.
    fn normal(&self) -> Result<(Tensor, Tensor)> {
        let x = self.rows(&self.x)?;
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let factor = (variance + self.eps)?.sqrt()?.recip()?;
        let normal = centred.broadcast_mul(&factor)?;
        Ok((normal.reshape(self.x.shape())?, factor))
    }

    /// One number per channel in a shape that x is multiplied by.
    fn channels(&self, t: &Tensor) -> Result<Tensor> {
        match self.groups {
            None => Ok(t.clone()),
            Some(_) => t.reshape((1, (), 1, 1)),
        }
    }

    fn scaled(&self, normal: &Tensor) -> Result<Tensor> {
        normal
            .broadcast_mul(&self.channels(&self.weight)?)?
            .broadcast_add(&self.channels(&self.bias)?)
    }

    fn gradient(&self, dy: &Tensor, silu: bool) -> Result<Tensor> {
        let (normal, factor) = self.normal()?;
        let mut dy = dy.contiguous()?.to_dtype(DType::F32)?;
        if silu {
            let y = self.scaled(&normal)?;
            let s = candle_nn::ops::sigmoid(&y)?;
            // s (1 + y (1 - s)) = s + y s (1 - s)
            let slope = ((&y * (&s - s.sqr()?)?)? + s)?;
            dy = (dy * slope)?;
        }
        let dy = self.rows(&dy.broadcast_mul(&self.channels(&self.weight)?)?)?;
        let normal = self.rows(&normal)?;
        let mean = dy.mean_keepdim(D::Minus1)?;
        let along = (&dy * &normal)?.mean_keepdim(D::Minus1)?;
        let dx = (dy.broadcast_sub(&mean)? - normal.broadcast_mul(&along)?)?;
        dx.broadcast_mul(&factor)?
            .reshape(self.x.shape())?
            .to_dtype(self.x.dtype())
    }
}

/// Most elements of one matrix of scores (64 MB as f32, of which the backward pass has five);
/// longer queries are cut.
const MAX_SCORES: usize = 16 << 20;

/// See [`attention`](crate::attention()): the backward pass computes the scores again.
pub(crate) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    causal: bool,
    compute: Compute,
) -> Result<Tensor> {
    let (n, lq, c) = q.dims3()?;
    let width = c / heads.max(1);
    let this = Attention {
        q: q.detach(),
        k: k.detach(),
        v: v.detach(),
        n,
        heads,
        width,
        causal,
        dtype: product_dtype(q, compute),
    };
    let [qs, ks, vs] = this.operands()?;
    let mut parts = Vec::new();
    for (start, rows) in this.blocks()? {
        let weights = this.weights(&qs, &ks, start, rows)?;
        parts.push(weights.to_dtype(this.dtype)?.matmul(&vs)?);
    }
    let y = this.joined(Tensor::cat(&parts, 1)?, lq)?;
    node(
        "attention",
        &[q, k, v],
        Value::Tensor(y),
        Box::new(move |dy| Ok(tensors(this.gradients(dy)?))),
    )
}

struct Attention {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n: usize,
    heads: usize,
    /// Width of a head.
    width: usize,
    causal: bool,
    dtype: DType,
}

impl Attention {
    /// `[n, l, c]` as `[n heads, l, width]`.
    fn split(&self, t: &Tensor) -> Result<Tensor> {
        let l = t.dim(1)?;
        t.to_dtype(self.dtype)?
            .reshape((self.n, l, self.heads, self.width))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((self.n * self.heads, l, self.width))
    }

    /// The other way round, in the dtype of the arguments.
    fn joined(&self, t: Tensor, l: usize) -> Result<Tensor> {
        t.reshape((self.n, self.heads, l, self.width))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((self.n, l, self.heads * self.width))?
            .to_dtype(self.q.dtype())
    }

    fn scale(&self) -> f64 {
        (self.width as f64).powf(-0.5)
    }

    /// Scaled q, k and v, split.
    fn operands(&self) -> Result<[Tensor; 3]> {
        let q = (&self.q * self.scale())?;
        Ok([self.split(&q)?, self.split(&self.k)?, self.split(&self.v)?])
    }

    /// First query and number of queries of each block.
    fn blocks(&self) -> Result<Vec<(usize, usize)>> {
        let (lq, lk) = (self.q.dim(1)?, self.k.dim(1)?);
        let rows = (MAX_SCORES / (self.n * self.heads * lk).max(1)).clamp(1, lq.max(1));
        let starts = (0..lq).step_by(rows);
        Ok(starts.map(|start| (start, rows.min(lq - start))).collect())
    }

    /// The softmax of a block's scores, in f32 (or the arguments' dtype, if wider).
    fn weights(&self, q: &Tensor, k: &Tensor, start: usize, rows: usize) -> Result<Tensor> {
        let lk = k.dim(1)?;
        let q = q.narrow(1, start, rows)?.contiguous()?;
        let scores = q.matmul(&k.transpose(1, 2)?)?;
        let mut scores = match scores.dtype() {
            DType::F64 => scores,
            _ => scores.to_dtype(DType::F32)?,
        };
        if self.causal {
            let mask = plain::causal_mask(start, rows, lk, &scores)?;
            scores = scores.broadcast_add(&mask)?;
        }
        softmax_last_dim(&scores.contiguous()?)
    }

    fn gradients(&self, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let [q, k, v] = self.operands()?;
        let dy = self.split(dy)?;
        let vt = v.transpose(1, 2)?;
        let (mut dq, mut dk, mut dv) = (Vec::new(), k.zeros_like()?, v.zeros_like()?);
        for (start, rows) in self.blocks()? {
            let p = self.weights(&q, &k, start, rows)?;
            let dy = dy.narrow(1, start, rows)?.contiguous()?;
            let transposed = p.to_dtype(self.dtype)?.transpose(1, 2)?;
            dv = (dv + transposed.matmul(&dy)?)?;
            let dp = dy.matmul(&vt)?.to_dtype(p.dtype())?;
            let along = (&dp * &p)?.sum_keepdim(D::Minus1)?;
            let ds = (dp.broadcast_sub(&along)? * p)?.to_dtype(self.dtype)?;
            dq.push((ds.matmul(&k)? * self.scale())?);
            let q = q.narrow(1, start, rows)?.contiguous()?;
            dk = (dk + ds.transpose(1, 2)?.matmul(&q)?)?;
        }
        let (lq, lk) = (self.q.dim(1)?, self.k.dim(1)?);
        Ok(vec![
            Some(self.joined(Tensor::cat(&dq, 1)?, lq)?),
            Some(self.joined(dk, lk)?),
            Some(self.joined(dv, lk)?),
        ])
    }
}
