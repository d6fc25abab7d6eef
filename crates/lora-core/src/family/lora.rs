//! LoRA and LoCon: `delta = multiplier * alpha / rank * up down`.
//!
//! | layer | `lora_down.weight` | `lora_mid.weight` | `lora_up.weight` |
//! |---|---|---|---|
//! | linear | `[r, i]` | | `[o, r]` |
//! | convolution | `[r, i, kh, kw]` | | `[o, r, 1, 1]` |
//! | convolution, Tucker | `[r, i, 1, 1]` | `[r, r, kh, kw]` | `[o, r, 1, 1]` |
//!
//! plus `alpha`, a 0-d tensor. Papers: Hu et al. 2021 (linear), Yeh et al. 2023
//! (LyCORIS: convolutions, Tucker). Files that store a projection's linear factors
//! as 1x1 convolutions, or the other way round, are read by element count.
//!
//! A fresh adapter draws `down` from `U(-b, b)`, `b = 1 / sqrt(fan_in)` (PyTorch's
//! `kaiming_uniform_(a = sqrt 5)`, as sd-scripts does) and sets `up` to zero, so
//! that it changes nothing at first.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use lora_kernels::Conv2dParams;
use rand::RngCore;

use super::{Entry, Fresh, Parts, core_times, fold, middle, precision, scaled_like};
use crate::adapter::{Adapter, Family, LowRank, Middle, multiply};
use crate::control::{DropoutKind, Pass};
use crate::held::Held;
use crate::layer::{BaseLayer, LayerOp};
use crate::{Error, init};

pub(super) const ENTRY: Entry = Entry {
    family: Family::Lora,
    detect: |parts| parts.has("lora_up.weight") || parts.has("lora_down.weight"),
    read,
    create,
};

/// Factors of one layer's LoRA.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::{Adapter, Lora};
/// let down = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let up = Tensor::new(&[[3f32], [4.]], &Device::Cpu)?;
/// let lora = Lora::new("fc", down, None, up, 0.5)?;
/// let base = Tensor::zeros((2, 2), candle_core::DType::F32, &Device::Cpu)?;
/// assert_eq!(lora.delta(&base, 1.0)?.to_vec2::<f32>()?, [[1.5, 3.0], [2.0, 4.0]]);
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Lora {
    down: Tensor,
    mid: Option<Tensor>,
    up: Tensor,
    rank: usize,
    alpha: f64,
}

impl Lora {
    /// From factors in the shapes of the module's table. `layer` is for messages.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the factors disagree about the rank.
    pub fn new(
        layer: &str,
        down: Tensor,
        mid: Option<Tensor>,
        up: Tensor,
        alpha: f64,
    ) -> crate::Result<Self> {
        let mismatch = |tensor: &str, expected: String, got: &Tensor| Error::ShapeMismatch {
            layer: layer.to_string(),
            tensor: tensor.to_string(),
            expected,
            got: got.dims().to_vec(),
        };
        let rank = match *down.dims() {
            [rank, _] | [rank, _, _, _] if rank > 0 && down.elem_count() > 0 => rank,
            _ => {
                return Err(mismatch(
                    "lora_down.weight",
                    "[rank, in] or [rank, in, kh, kw]".into(),
                    &down,
                ));
            }
        };
        match *up.dims() {
            [o, r] | [o, r, 1, 1] if r == rank && o > 0 => {}
            _ => {
                return Err(mismatch(
                    "lora_up.weight",
                    format!("[out, {rank}] or [out, {rank}, 1, 1]"),
                    &up,
                ));
            }
        }
        if let Some(mid) = &mid {
            let squeezed = matches!(*down.dims(), [_, _] | [_, _, 1, 1]);
            match *mid.dims() {
                [a, b, _, _] if a == rank && b == rank && squeezed => {}
                _ => {
                    return Err(mismatch(
                        "lora_mid.weight",
                        format!("[{rank}, {rank}, kh, kw]"),
                        mid,
                    ));
                }
            }
        }
        if !alpha.is_finite() {
            return Err(Error::BadValue {
                layer: layer.to_string(),
                name: "alpha",
                value: alpha.to_string(),
                expected: "expected a finite number",
            });
        }
        Ok(Self {
            down,
            mid,
            up,
            rank,
            alpha,
        })
    }

    /// The down factor.
    pub fn down(&self) -> &Tensor {
        &self.down
    }

    /// The up factor.
    pub fn up(&self) -> &Tensor {
        &self.up
    }

    /// The first `rank` ranks at the scale of the whole, `alpha / rank` unchanged: what the
    /// web UI's `dyn=` makes of a file.
    ///
    /// # Errors
    /// [`Error::BadValue`] when `rank` is 0 or above the adapter's, or there is a Tucker
    /// core.
    pub fn truncated(&self, rank: usize) -> crate::Result<Self> {
        if rank == 0 || rank > self.rank || self.mid.is_some() {
            return Err(Error::BadValue {
                layer: "a cut of the ranks".into(),
                name: "rank",
                value: rank.to_string(),
                expected: "expected 1 to the adapter's rank, without a Tucker core",
            });
        }
        Ok(Self {
            down: self.down.narrow(0, 0, rank)?,
            mid: None,
            up: self.up.narrow(1, 0, rank)?,
            rank,
            alpha: self.scale() * rank as f64,
        })
    }

    /// One step of LyCORIS' DyLoRA on a LoRA whose ranks are nested blocks: the blocks up
    /// to number `block` at the scale `alpha / (block + 1)`, `alpha` being the configured
    /// one, the gradient going to the last of them alone. Here `alpha` is the file's.
    ///
    /// # Errors
    /// [`Error::BadValue`] when the ranks are no such blocks.
    pub fn nested(&self, block_size: usize, block: usize) -> crate::Result<Self> {
        let (start, end) = (block_size * block, block_size * (block + 1));
        let mut cut = self.truncated(end)?;
        if block_size == 0 || !self.rank.is_multiple_of(block_size) {
            return Err(Error::BadValue {
                layer: "DyLoRA".into(),
                name: "block_size",
                value: block_size.to_string(),
                expected: "expected a divisor of the rank",
            });
        }
        if start > 0 {
            let last = |t: &Tensor, axis: usize| {
                let before = t.narrow(axis, 0, start)?.detach();
                Tensor::cat(&[before, t.narrow(axis, start, block_size)?], axis)
            };
            cut.down = last(&cut.down, 0)?;
            cut.up = last(&cut.up, 1)?;
        }
        cut.alpha = self.alpha / (block + 1) as f64 * end as f64;
        Ok(cut)
    }

    /// `[o, r]`.
    fn up_matrix(&self, dtype: DType) -> Result<Tensor> {
        matrix(&self.up)?.to_dtype(dtype)
    }

    /// `[r, i * kh * kw]`, the Tucker core applied.
    fn down_matrix(&self, dtype: DType) -> Result<Tensor> {
        let down = matrix(&self.down)?.to_dtype(dtype)?;
        match &self.mid {
            None => Ok(down),
            Some(mid) => core_times(&mid.to_dtype(dtype)?, &down),
        }
    }
}

impl Adapter for Lora {
    fn family(&self) -> Family {
        Family::Lora
    }

    fn rank(&self) -> Option<usize> {
        Some(self.rank)
    }

    fn alpha(&self) -> Option<f64> {
        Some(self.alpha)
    }

    fn matrix_dims(&self) -> (usize, usize) {
        let kernel: usize = self
            .mid
            .as_ref()
            .map_or(1, |mid| mid.dims()[2..].iter().product());
        (
            self.up.elem_count() / self.rank,
            self.down.elem_count() / self.rank * kernel,
        )
    }

    fn kernel(&self) -> Option<(usize, usize)> {
        match (&self.mid, self.down.dims()) {
            (Some(mid), _) => mid.dims().get(2).copied().zip(mid.dims().get(3).copied()),
            (None, [_, _, kh, kw]) => Some((*kh, *kw)),
            // A matrix says nothing about the kernel: its columns are counted.
            (None, _) => None,
        }
    }

    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        // f32 or better: the product is rounded once, when it is added to the base.
        let dtype = precision(base);
        let product = self.up_matrix(dtype)?.matmul(&self.down_matrix(dtype)?)?;
        scaled_like(&product, base, self.scale() * multiplier)
    }

    fn branch(
        &self,
        x: &Tensor,
        layer: &BaseLayer,
        multiplier: f64,
        pass: Option<&Pass<'_>>,
    ) -> Result<Tensor> {
        match self.low_rank(x, layer, multiplier, pass)? {
            Some(product) => product.apply(x, layer),
            None => {
                let delta = self.delta(&layer.weight_in(x.dtype())?, multiplier)?;
                layer.op.apply(x, &delta, None)
            }
        }
    }

    fn low_rank(
        &self,
        x: &Tensor,
        layer: &BaseLayer,
        multiplier: f64,
        pass: Option<&Pass<'_>>,
    ) -> Result<Option<LowRank>> {
        let dtype = x.dtype();
        let middle = match (layer.op, &self.mid) {
            (LayerOp::Conv2d(params), Some(mid)) if params.groups == 1 => {
                let down = self.down.to_dtype(dtype)?.reshape((self.rank, (), 1, 1))?;
                let middle = lora_kernels::conv2d(x, &down, None, Conv2dParams::default())?;
                let mid = mid.to_dtype(dtype)?;
                Middle::Values(lora_kernels::conv2d(&middle, &mid, None, params)?)
            }
            _ => match middle(x, &self.down_matrix(dtype)?, layer)? {
                Some(middle) => middle,
                None => return Ok(None),
            },
        };
        let middle = match pass.filter(|pass| drops(pass)) {
            Some(pass) => {
                let middle = middle.values(x, layer.compute)?;
                Middle::Values(drop_out(middle, layer.op.output_axis(x.rank()), pass)?)
            }
            None => middle,
        };
        let mut up = self.up_matrix(dtype)?;
        let scale = self.scale() * multiplier;
        if scale != 1.0 {
            up = (up * scale)?;
        }
        Ok(Some(LowRank {
            middle,
            up,
            outputs: None,
        }))
    }

    fn held(&self, _: &BaseLayer, rows: usize) -> Held {
        let rank = self.rank().unwrap_or(0);
        Held {
            kept: rank * rows,
            backward: rank * rows,
        }
    }

    fn factors(&self) -> Vec<(&'static str, &Tensor)> {
        let mid = self.mid.as_ref().map(|mid| ("lora_mid.weight", mid));
        [("lora_down.weight", &self.down)]
            .into_iter()
            .chain(mid)
            .chain([("lora_up.weight", &self.up)])
            .collect()
    }

    fn product(&self) -> Result<Option<(Tensor, Tensor)>> {
        let up = (self.up_matrix(DType::F32)? * self.scale())?;
        Ok(Some((up, self.down_matrix(DType::F32)?)))
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Self {
            down: f(&self.down)?,
            mid: self.mid.as_ref().map(&mut *f).transpose()?,
            up: f(&self.up)?,
            ..*self
        }))
    }

    fn rescale(&self, ratio: f64) -> Result<f64> {
        // sd-scripts splits the ratio over up and down; a Tucker core stays.
        let factor = ratio.sqrt();
        let mut vars = self.vars();
        vars.retain(|(name, _)| *name != "lora_mid.weight");
        multiply(vars, factor)?;
        Ok(factor)
    }
}

/// Whether [`drop_out`] does anything.
fn drops(pass: &Pass<'_>) -> bool {
    pass.dropout.neuron > 0.0 || pass.dropout.rank > 0.0
}

/// Neuron and rank dropout on the middle of the branch, as sd-scripts applies them:
/// a value or a (sample, rank) pair stays when its draw exceeds the probability.
fn drop_out(middle: Tensor, rank_axis: usize, pass: &Pass<'_>) -> Result<Tensor> {
    let mut per_rank = vec![1; middle.rank()];
    for axis in [0, rank_axis] {
        per_rank[axis] = middle.dim(axis)?;
    }
    let masks = [
        (
            DropoutKind::Neuron,
            pass.dropout.neuron,
            middle.dims().to_vec(),
        ),
        (DropoutKind::Rank, pass.dropout.rank, per_rank),
    ];
    let mut middle = middle;
    for (kind, p, shape) in masks.into_iter().filter(|(_, p, _)| *p > 0.0) {
        let kept = (1.0 / (1.0 - p)) as f32;
        let draws = pass.draws.uniform(kind, shape.iter().product());
        let mask: Vec<f32> = draws
            .into_iter()
            .map(|u| if f64::from(u) > p { kept } else { 0.0 })
            .collect();
        let mask = Tensor::from_vec(mask, shape, middle.device())?.to_dtype(middle.dtype())?;
        middle = middle.broadcast_mul(&mask)?;
    }
    Ok(middle)
}

fn read(parts: &mut Parts<'_>) -> crate::Result<Arc<dyn Adapter>> {
    let down = parts.require("lora_down.weight")?;
    let scalar = parts.take_scalar()?;
    let up = fold(parts.require("lora_up.weight")?, scalar)?;
    let mid = parts.take("lora_mid.weight");
    let mut lora = Lora::new(parts.layer, down, mid, up, 1.0)?;
    lora.alpha = parts.take_alpha(lora.rank)?;
    if let Some(block) = parts.dylora_block {
        parts.note(
            "alpha",
            false,
            format!("multiplied by DyLoRA's block size {block}, as all blocks were trained with"),
        );
        lora.alpha *= block as f64;
    }
    Ok(Arc::new(lora))
}

fn create(fresh: &Fresh<'_>, rng: &mut dyn RngCore) -> crate::Result<Arc<dyn Adapter>> {
    let rank = fresh.rank;
    let uniform = |rng: &mut dyn RngCore, dims: &[usize], bound: f64| {
        init::uniform(dims, bound, rng, fresh.device)
    };
    let (down, mid, up): (Vec<usize>, Option<Vec<usize>>, Vec<usize>) = match *fresh.weight {
        [o, i] => (vec![rank, i], None, vec![o, rank]),
        [o, i, kh, kw] if fresh.config.use_tucker && kh * kw > 1 => (
            vec![rank, i, 1, 1],
            Some(vec![rank, rank, kh, kw]),
            vec![o, rank, 1, 1],
        ),
        [o, i, kh, kw] => (vec![rank, i, kh, kw], None, vec![o, rank, 1, 1]),
        _ => {
            return Err(Error::ShapeMismatch {
                layer: fresh.layer.to_string(),
                tensor: "weight".into(),
                expected: "a linear or convolution layer for LoRA".into(),
                got: fresh.weight.to_vec(),
            });
        }
    };
    let bound = |dims: &[usize]| 1.0 / (dims[1..].iter().product::<usize>().max(1) as f64).sqrt();
    let up = Tensor::zeros(up, DType::F32, fresh.device)?;
    let mid = mid
        .map(|dims| uniform(rng, &dims, bound(&dims)))
        .transpose()?;
    let down = uniform(rng, &down, bound(&down))?;
    Ok(Lora::new(fresh.layer, down, mid, up, fresh.alpha)?.trainable()?)
}

/// One row per output channel, or per rank; a matrix stays itself, so that its gradient takes no
/// detour.
fn matrix(t: &Tensor) -> Result<Tensor> {
    match t.rank() {
        2 => Ok(t.clone()),
        _ => t.flatten_from(1),
    }
}
