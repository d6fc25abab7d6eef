//! LoKr: `delta = multiplier * scale * w1 kron w2`, each of the two either full or a
//! low-rank product.
//!
//! With outputs split as `a b` and inputs as `c d`: `lokr_w1` `[a, c]`, or `lokr_w1_a`
//! `[a, r]` and `lokr_w1_b` `[r, c]`; `lokr_w2` `[b, d]` or `[b, d, kh, kw]`, or
//! `lokr_w2_a` `[b, r]` and `lokr_w2_b` `[r, d kh kw]`, or with a Tucker core `lokr_t2`
//! `[r, r, kh, kw]`, `lokr_w2_a` `[r, b]`, `lokr_w2_b` `[r, d]`.
//!
//! `scale = alpha / rank` if either is low-rank; both full: 1, and `alpha` means nothing.
//! Shapes come from the tensors alone. Conventions of LyCORIS (Yeh et al. 2023).

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use lora_kernels::{Conv2dParams, reshape};
use rand::RngCore;

use super::{
    Entry, Fresh, Parts, branch_with_row_dropout, core_times, drop_rows, fold, kernel_of,
    precision, scaled_like,
};
use crate::adapter::{Adapter, Family};
use crate::control::Pass;
use crate::held::Held;
use crate::layer::{BaseLayer, LayerOp};
use crate::{Error, init};

pub(super) const ENTRY: Entry = Entry {
    family: Family::Lokr,
    detect: |parts| {
        ["lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"]
            .iter()
            .any(|name| parts.has(name))
    },
    read,
    create,
};

/// One Kronecker factor.
#[derive(Debug, Clone)]
pub enum LokrFactor {
    /// As it is: `[m, n]` or `[m, n, kh, kw]`.
    Full(Tensor),
    /// `a` `[m, r]` times `b` `[r, n kh kw]`.
    LowRank {
        /// `[m, r]`.
        a: Tensor,
        /// `[r, n kh kw]`.
        b: Tensor,
    },
    /// With a core `[r, r, kh, kw]`, `a` `[r, m]`, `b` `[r, n]`.
    Tucker {
        /// `[r, r, kh, kw]`.
        core: Tensor,
        /// `[r, m]`.
        a: Tensor,
        /// `[r, n]`.
        b: Tensor,
    },
}

impl LokrFactor {
    fn rank(&self) -> Option<usize> {
        match self {
            Self::Full(_) => None,
            Self::LowRank { b, .. } | Self::Tucker { b, .. } => b.dims().first().copied(),
        }
    }

    /// Rows, and columns times kernel area.
    fn dims(&self) -> (usize, usize) {
        match self {
            Self::Full(w) => (w.dims()[0], w.dims()[1..].iter().product()),
            Self::LowRank { a, b } => (a.dims()[0], b.dims()[1]),
            Self::Tucker { core, a, b } => {
                (a.dims()[1], b.dims()[1] * core.dims()[2] * core.dims()[3])
            }
        }
    }

    /// `[m, n k]`.
    fn matrix(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Full(w) => w.to_dtype(dtype)?.flatten_from(1),
            Self::LowRank { a, b } => a.to_dtype(dtype)?.matmul(&b.to_dtype(dtype)?),
            Self::Tucker { core, a, b } => {
                let right = core_times(&core.to_dtype(dtype)?, &b.to_dtype(dtype)?)?;
                a.to_dtype(dtype)?.t()?.contiguous()?.matmul(&right)
            }
        }
    }

    /// Kernel height and width, where the factor tells.
    fn kernel(&self) -> Option<(usize, usize)> {
        match self {
            Self::Full(w) | Self::Tucker { core: w, .. } => kernel_of(w),
            Self::LowRank { .. } => None,
        }
    }

    /// Names in files for factor number `which` (1 or 2), in a fixed order.
    fn tensors(&self, which: usize) -> Vec<(&'static str, &Tensor)> {
        let [full, a_name, b_name] = NAMES[which - 1];
        match self {
            Self::Full(w) => vec![(full, w)],
            Self::LowRank { a, b } => vec![(a_name, a), (b_name, b)],
            Self::Tucker { core, a, b } => vec![("lokr_t2", core), (a_name, a), (b_name, b)],
        }
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(match self {
            Self::Full(w) => Self::Full(f(w)?),
            Self::LowRank { a, b } => Self::LowRank { a: f(a)?, b: f(b)? },
            Self::Tucker { core, a, b } => Self::Tucker {
                core: f(core)?,
                a: f(a)?,
                b: f(b)?,
            },
        })
    }

    fn check(&self, layer: &str, which: usize) -> crate::Result<()> {
        let sound = match self {
            Self::Full(w) => matches!(w.rank(), 2 | 4),
            Self::LowRank { a, b } => a.rank() == 2 && b.rank() == 2 && a.dims()[1] == b.dims()[0],
            Self::Tucker { core, a, b } => {
                matches!(*core.dims(), [p, q, _, _] if a.rank() == 2 && b.rank() == 2 && a.dims()[0] == p && b.dims()[0] == q)
            }
        };
        match self
            .tensors(which)
            .into_iter()
            .find(|(_, t)| !sound || t.elem_count() == 0)
        {
            None => Ok(()),
            Some((name, t)) => Err(Error::ShapeMismatch {
                layer: layer.into(),
                tensor: name.into(),
                expected: "factors that fit each other".into(),
                got: t.dims().to_vec(),
            }),
        }
    }
}

/// Full, a, b of both factors.
const NAMES: [[&str; 3]; 2] = [
    ["lokr_w1", "lokr_w1_a", "lokr_w1_b"],
    ["lokr_w2", "lokr_w2_a", "lokr_w2_b"],
];

/// Factors of one layer's LoKr.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::{Adapter, Lokr, LokrFactor};
/// let w1 = Tensor::new(&[[2f32, 3.]], &Device::Cpu)?;
/// let w2 = Tensor::new(&[[1f32], [10.]], &Device::Cpu)?;
/// let lokr = Lokr::new("fc", LokrFactor::Full(w1), LokrFactor::Full(w2), 1.0)?;
/// let base = Tensor::zeros((2, 2), candle_core::DType::F32, &Device::Cpu)?;
/// assert_eq!(lokr.delta(&base, 1.0)?.to_vec2::<f32>()?, [[2., 3.], [20., 30.]]);
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Lokr {
    w1: LokrFactor,
    w2: LokrFactor,
    alpha: f64,
}

impl Lokr {
    /// From the two factors. `layer` is for messages.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when parts of a factor disagree.
    pub fn new(layer: &str, w1: LokrFactor, w2: LokrFactor, alpha: f64) -> crate::Result<Self> {
        w1.check(layer, 1)?;
        w2.check(layer, 2)?;
        Ok(Self { w1, w2, alpha })
    }

    /// The change of a linear layer's output: `x` as rows of `c d`, the second factor on
    /// the last axis, the first on the other. The delta is never built.
    fn linear(&self, x: &Tensor, multiplier: f64) -> Result<Tensor> {
        let ((a, c), (b, d)) = (self.w1.dims(), self.w2.dims());
        let dtype = x.dtype();
        let mut shape = x.dims().to_vec();
        let rows = x.elem_count() / (c * d).max(1);
        let w1 = (self.w1.matrix(dtype)? * (self.scale() * multiplier))?;
        let x = reshape(&x.contiguous()?, (rows * c, d))?;
        let z = lora_kernels::linear(&x, &self.w2.matrix(dtype)?, None)?;
        let y = lora_kernels::mix_groups(&w1, &reshape(&z, (rows, c, b))?)?;
        if let Some(last) = shape.last_mut() {
            *last = a * b;
        }
        reshape(&y, shape)
    }

    /// The same for a convolution: the second factor convolves every group of `d`
    /// channels, the first mixes the groups.
    fn conv(
        &self,
        x: &Tensor,
        params: Conv2dParams,
        kernel: (usize, usize),
        multiplier: f64,
    ) -> Result<Tensor> {
        let (n, _, h, w) = x.dims4()?;
        let ((a, c), (b, dk)) = (self.w1.dims(), self.w2.dims());
        let (kh, kw) = kernel;
        let d = dk / (kh * kw).max(1);
        let dtype = x.dtype();
        let w1 = (self.w1.matrix(dtype)? * (self.scale() * multiplier))?;
        let w2 = self.w2.matrix(dtype)?.reshape((b, d, kh, kw))?;
        let x = reshape(&x.contiguous()?, (n * c, d, h, w))?;
        let z = lora_kernels::conv2d(&x, &w2, None, params)?;
        let (_, _, h, w) = z.dims4()?;
        let z = reshape(&z, (n, c, b * h, w))?;
        let w1 = w1.reshape((a, c, 1, 1))?;
        let y = lora_kernels::conv2d(&z, &w1, None, Conv2dParams::default())?;
        reshape(&y, (n, a * b, h, w))
    }
}

impl Adapter for Lokr {
    fn family(&self) -> Family {
        Family::Lokr
    }

    fn rank(&self) -> Option<usize> {
        self.w1.rank().or(self.w2.rank())
    }

    fn alpha(&self) -> Option<f64> {
        Some(self.alpha)
    }

    fn matrix_dims(&self) -> (usize, usize) {
        let ((a, c), (b, dk)) = (self.w1.dims(), self.w2.dims());
        (a * b, c * dk)
    }

    fn kernel(&self) -> Option<(usize, usize)> {
        self.w2.kernel()
    }

    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        let dtype = precision(base);
        let ((a, c), (b, dk)) = (self.w1.dims(), self.w2.dims());
        // Scaled on the small side, before the product is spread out.
        let w1 = (self.w1.matrix(dtype)? * (self.scale() * multiplier))?.reshape((a, 1, c, 1))?;
        let w2 = self.w2.matrix(dtype)?.reshape((1, b, 1, dk))?;
        scaled_like(&w1.broadcast_mul(&w2)?, base, 1.0)
    }

    fn branch(
        &self,
        x: &Tensor,
        layer: &BaseLayer,
        multiplier: f64,
        pass: Option<&Pass<'_>>,
    ) -> Result<Tensor> {
        match layer.op {
            LayerOp::Linear => drop_rows(self.linear(x, multiplier)?, &layer.op, pass),
            LayerOp::Conv2d(params) if params.groups == 1 => {
                let (_, _, kh, kw) = layer.weight.dims4()?;
                let y = self.conv(x, params, (kh, kw), multiplier)?;
                drop_rows(y, &layer.op, pass)
            }
            _ => branch_with_row_dropout(self, x, layer, multiplier, pass),
        }
    }

    fn held(&self, _: &BaseLayer, rows: usize) -> Held {
        let ((a, c), (b, _)) = (self.w1.dims(), self.w2.dims());
        Held {
            // Behind the second factor.
            kept: rows * c * b,
            backward: 2 * rows * a * b,
        }
    }

    fn factors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut factors = self.w1.tensors(1);
        factors.extend(self.w2.tensors(2));
        factors
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Self {
            w1: self.w1.map(f)?,
            w2: self.w2.map(f)?,
            ..*self
        }))
    }
}

fn read(parts: &mut Parts<'_>) -> crate::Result<Arc<dyn Adapter>> {
    let mut factor = |which: usize| -> crate::Result<LokrFactor> {
        let [full, a, b] = NAMES[which - 1];
        if let Some(w) = parts.take(full) {
            return Ok(LokrFactor::Full(w));
        }
        let core = if which == 2 {
            parts.take("lokr_t2")
        } else {
            None
        };
        let (a, b) = (parts.require(a)?, parts.require(b)?);
        Ok(match core {
            Some(core) => LokrFactor::Tucker { core, a, b },
            None => LokrFactor::LowRank { a, b },
        })
    };
    let (w1, w2) = (factor(1)?, factor(2)?);
    let mut lokr = Lokr::new(parts.layer, w1, w2, 1.0)?;
    lokr.w1 = match lokr.w1 {
        LokrFactor::Full(w) => LokrFactor::Full(fold(w, parts.take_scalar()?)?),
        LokrFactor::LowRank { a, b } => LokrFactor::LowRank {
            a: fold(a, parts.take_scalar()?)?,
            b,
        },
        tucker => tucker,
    };
    match lokr.rank() {
        Some(rank) => lokr.alpha = parts.take_alpha(rank)?,
        None => {
            // Two full matrices have no scale but one that is written out.
            lokr.alpha = parts.take_number("alpha")?.unwrap_or(1.0);
            let scale = parts.take_number("scale")?;
            if let LokrFactor::Full(w) = lokr.w1 {
                lokr.w1 = LokrFactor::Full(fold(w, scale)?);
            }
        }
    }
    Ok(Arc::new(lokr))
}

/// LyCORIS' split of a dimension in two, the smaller first: `factor` itself if it
/// divides, else the largest divisor up to `factor` before the square root (-1: any).
///
/// ```
/// use lora_core::factorization;
/// assert_eq!(factorization(320, -1), (16, 20));
/// assert_eq!(factorization(320, 8), (8, 40));
/// assert_eq!(factorization(768, 5), (4, 192));
/// ```
pub fn factorization(n: usize, factor: i64) -> (usize, usize) {
    let sorted = |a: usize, b: usize| (a.min(b), a.max(b));
    if let Ok(factor) = usize::try_from(factor)
        && factor > 0
        && n.is_multiple_of(factor)
    {
        return sorted(factor, n / factor);
    }
    let bound = usize::try_from(factor).ok().filter(|f| *f > 0).unwrap_or(n);
    let best = n + 1;
    let (mut m, mut q) = (1, n);
    while m < q {
        let Some(next) = (m + 1..=n).find(|d| n.is_multiple_of(*d)) else {
            break;
        };
        if next + n / next > best || next > bound {
            break;
        }
        (m, q) = (next, n / next);
    }
    sorted(m, q)
}

fn create(fresh: &Fresh<'_>, rng: &mut dyn RngCore) -> crate::Result<Arc<dyn Adapter>> {
    let (o, i, (kh, kw)) = fresh.matrix()?;
    let config = fresh.config;
    let (mut a, mut b) = factorization(o, config.factor);
    if config.unbalanced_factorization {
        (a, b) = (b, a);
    }
    let (c, d) = factorization(i, config.factor);
    let (r, k) = (fresh.rank, kh * kw);
    let device = fresh.device;
    let bound = |n: usize| 1.0 / (n as f64).sqrt();
    let mut uniform = |dims: &[usize], n: usize| init::uniform(dims, bound(n), rng, device);
    let low_rank = |m: usize, n: usize| !config.full_matrix && 2 * r < m.max(n);
    let w1 = if config.decompose_both && low_rank(a, c) {
        LokrFactor::LowRank {
            a: uniform(&[a, r], r)?,
            b: uniform(&[r, c], c)?,
        }
    } else {
        LokrFactor::Full(uniform(&[a, c], c)?)
    };
    // The second factor starts at zero, so that the adapter changes nothing at first.
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, device);
    let w2 = if !low_rank(b, d) {
        let dims: &[usize] = if fresh.weight.len() == 2 {
            &[b, d]
        } else {
            &[b, d, kh, kw]
        };
        LokrFactor::Full(zeros(dims)?)
    } else if config.use_tucker && k > 1 {
        LokrFactor::Tucker {
            core: uniform(&[r, r, kh, kw], r * k)?,
            a: uniform(&[r, b], b)?,
            b: zeros(&[r, d])?,
        }
    } else {
        LokrFactor::LowRank {
            a: uniform(&[b, r], r)?,
            b: zeros(&[r, d * k])?,
        }
    };
    let full = w1.rank().is_none() && w2.rank().is_none();
    // Both full: the scale is 1 whatever alpha says; LyCORIS writes the rank.
    let alpha = if full { r as f64 } else { fresh.alpha };
    Ok(Lokr::new(fresh.layer, w1, w2, alpha)?.trainable()?)
}
