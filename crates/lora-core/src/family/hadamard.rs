//! The elementwise product of two low-rank products, whose gradient needs the factors
//! alone: the two products are built again in the backward pass instead of being kept.

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Storage, Tensor};
use lora_kernels::row_products;

/// One side of the elementwise product: `a b` with `a` `[o, r]` and `b` `[r, n]`, or with a
/// Tucker core `[r, r, kh, kw]`, `a` `[r, o]` and `b` `[r, i]`.
#[derive(Debug, Clone)]
pub(super) struct Side {
    pub(super) a: Tensor,
    pub(super) b: Tensor,
    pub(super) core: Option<Tensor>,
}

impl Side {
    pub(super) fn rank(&self) -> usize {
        self.b.dims().first().copied().unwrap_or(0)
    }

    /// Outputs, and inputs times kernel area. The factors are matrices.
    pub(super) fn dims(&self) -> (usize, usize) {
        let (a, b) = (self.a.dims(), self.b.dims());
        match &self.core {
            None => (a[0], b[1]),
            Some(core) => (a[1], b[1] * core.dims()[2] * core.dims()[3]),
        }
    }

    pub(super) fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            a: f(&self.a)?,
            b: f(&self.b)?,
            core: self.core.as_ref().map(f).transpose()?,
        })
    }

    fn factors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.a, &self.b].into_iter().chain(&self.core)
    }

    /// What `a` is multiplied with: `b`, or the core applied to it; `[r, n]`.
    fn right(&self) -> Result<Tensor> {
        match &self.core {
            None => Ok(self.b.clone()),
            Some(core) => super::core_times(core, &self.b),
        }
    }

    /// The columns of `a` as rows, `[r, o]`.
    fn columns(&self) -> Result<Tensor> {
        match &self.core {
            None => self.a.t()?.contiguous(),
            Some(_) => Ok(self.a.clone()),
        }
    }

    /// `[o, n]`.
    fn product(&self) -> Result<Tensor> {
        let right = self.right()?;
        match self.core {
            None => self.a.matmul(&right),
            Some(_) => self.a.t()?.contiguous()?.matmul(&right),
        }
    }

    /// Gradients of `a`, `b` and the core from the gradient `[o, n]` of the product.
    fn gradients(&self, q: &Tensor) -> Result<Vec<Tensor>> {
        let right = self.right()?;
        let Some(core) = &self.core else {
            let b = self.a.t()?.contiguous()?.matmul(q)?;
            return Ok(vec![q.matmul(&right.t()?.contiguous()?)?, b]);
        };
        let (r, _, kh, kw) = core.dims4()?;
        let (i, k) = (self.b.dim(1)?, kh * kw);
        let a = right.matmul(&q.t()?.contiguous()?)?;
        // [p, k, i]
        let behind = self.a.matmul(q)?.reshape((r, i, k))?.transpose(1, 2)?;
        let behind = behind.contiguous()?.reshape((r * k, i))?;
        // core as [q, p k]
        let flat = core.reshape((r, r, k))?.transpose(0, 1)?.contiguous()?;
        let b = flat.reshape((r, r * k))?.matmul(&behind)?;
        let cores = behind.matmul(&self.b.t()?.contiguous()?)?;
        let cores = cores.reshape((r, k, r))?.transpose(1, 2)?.contiguous()?;
        Ok(vec![a, b, cores.reshape(core.shape())?])
    }
}

/// The rank of the elementwise product, the ranks' product, where working with it as a
/// low-rank product is less than half of working with the dense one.
pub(super) fn worthwhile_rank(sides: &[Side; 2]) -> Option<usize> {
    let (o, n) = sides[0].dims();
    let rank = sides[0].rank() * sides[1].rank();
    (2 * rank * (o + n) <= o * n).then_some(rank)
}

/// The elementwise product times `scale` as `up` `[o, r]` and `down` `[r, n]`, f32, with the
/// [`worthwhile_rank`], if there is one.
pub(super) fn low_rank(sides: &[Side; 2], scale: f64) -> Result<Option<(Tensor, Tensor)>> {
    if worthwhile_rank(sides).is_none() {
        return Ok(None);
    }
    let mut convert = |t: &Tensor| t.to_dtype(DType::F32);
    let [first, second] = [sides[0].map(&mut convert)?, sides[1].map(&mut convert)?];
    let left = (first.columns()? * scale)?;
    let up = row_products(&left, &second.columns()?)?;
    let down = row_products(&first.right()?, &second.right()?)?;
    Ok(Some((up.t()?.contiguous()?, down)))
}

/// `[o, n]` in `dtype`: the two sides' products multiplied elementwise, and with `scale`.
/// On a CPU the backward pass keeps the factors only.
pub(super) fn product(sides: &[Side; 2], dtype: DType, scale: f64) -> Result<Tensor> {
    let mut convert = |t: &Tensor| t.to_dtype(dtype);
    let mut sides = [sides[0].map(&mut convert)?, sides[1].map(&mut convert)?];
    // Scaled on the small side, so that no second product is kept for it.
    sides[0].a = (&sides[0].a * scale)?;
    let on_cpu = matches!(sides[0].a.device(), Device::Cpu);
    if !on_cpu || !matches!(dtype, DType::F32 | DType::F64) {
        return sides[0].product()? * sides[1].product()?;
    }
    let flat: Result<Vec<Tensor>> = sides
        .iter()
        .flat_map(Side::factors)
        .map(|t| t.flatten_all())
        .collect();
    let packed = Tensor::cat(&flat?, 0)?;
    let detached = |side: &Side| side.map(&mut |t| Ok(t.detach()));
    packed.apply_op1(Hadamard {
        sides: [detached(&sides[0])?, detached(&sides[1])?],
    })
}

/// The operation on all factors packed into one row; it holds them unpacked.
struct Hadamard {
    sides: [Side; 2],
}

impl CustomOp1 for Hadamard {
    fn name(&self) -> &'static str {
        "hadamard-product"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let product = (self.sides[0].product()? * self.sides[1].product()?)?;
        let shape = product.shape().clone();
        let (storage, _) = product.storage_and_layout();
        match &*storage {
            Storage::Cpu(values) => Ok((values.clone(), shape)),
            _ => candle_core::bail!("hadamard-product: the factors are not on the CPU"),
        }
    }

    fn bwd(&self, _arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.detach();
        let [first, second] = &self.sides;
        let mut all = first.gradients(&(&grad * second.product()?)?)?;
        all.extend(second.gradients(&(&grad * first.product()?)?)?);
        let flat: Result<Vec<Tensor>> = all.iter().map(Tensor::flatten_all).collect();
        Tensor::cat(&flat?, 0).map(Some)
    }
}
