//! T-LoRA: `delta = multiplier * alpha / rank * (P diag(l) Q - P0 diag(l0) Q0)`.
//!
//! `p_layer.weight` `[o, r]`, `lambda_layer` `[1, r]`, `q_layer.weight` `[r, i]` (with 1x1
//! kernels for a convolution), `alpha`. `P0`, `l0`, `Q0` are the `r` largest singular
//! directions of the base weight, from which training started; files do not hold them, so
//! that such a file means something on the checkpoint that it was trained on only. Written
//! by LyCORIS 4.x with its default `sig_type`; other choices leave no trace in the file.
//! Larger kernels, which the reference approximates by 1x1 ones, are not supported, and
//! nothing is trained in this family: its mask by timestep is not part of a layer.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Tensor, TensorId};
use rand::RngCore;

use super::{Entry, Fresh, Parts, precision, scaled_like};
use crate::Error;
use crate::adapter::{Adapter, Family, misfit};

pub(super) const ENTRY: Entry = Entry {
    family: Family::Tlora,
    detect: |parts| parts.has("lambda_layer"),
    read,
    create,
};

/// Factors of one layer's T-LoRA.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::{Adapter, Tlora};
/// let base = Tensor::new(&[[3f32, 0.], [0., 1.]], &Device::Cpu)?;
/// let p = Tensor::new(&[[1f32], [0.]], &Device::Cpu)?;
/// let q = Tensor::new(&[[1f32, 0.]], &Device::Cpu)?;
/// let tlora = Tlora::new("fc", p, Tensor::new(&[[5f32]], &Device::Cpu)?, q, 1.0)?;
/// // 5 along the direction in which the base has 3.
/// let delta = tlora.delta(&base, 1.0)?.to_vec2::<f32>()?;
/// assert!((delta[0][0] - 2.0).abs() < 1e-6 && delta[1][1].abs() < 1e-6);
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Tlora {
    p: Tensor,
    lambda: Tensor,
    q: Tensor,
    rank: usize,
    alpha: f64,
    /// The start of the training for the base weight seen last.
    start: Mutex<Option<(TensorId, Tensor)>>,
}

impl Tlora {
    /// From `P` `[o, r]`, `l` `[1, r]` and `Q` `[r, i]`. `layer` is for messages.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when they disagree about the rank.
    pub fn new(
        layer: &str,
        p: Tensor,
        lambda: Tensor,
        q: Tensor,
        alpha: f64,
    ) -> crate::Result<Self> {
        let rank = q.dims().first().copied().unwrap_or(0);
        let sound = |t: &Tensor, name: &str, fits: bool, expected: String| {
            if fits && t.elem_count() > 0 {
                return Ok(());
            }
            Err(Error::ShapeMismatch {
                layer: layer.into(),
                tensor: name.into(),
                expected,
                got: t.dims().to_vec(),
            })
        };
        let flat = |t: &Tensor| matches!(t.dims(), [_, _] | [_, _, 1, 1]);
        sound(&q, "q_layer.weight", flat(&q), "[rank, in]".into())?;
        let fits = flat(&p) && p.dims().get(1) == Some(&rank);
        sound(&p, "p_layer.weight", fits, format!("[out, {rank}]"))?;
        let fits = lambda.elem_count() == rank;
        sound(&lambda, "lambda_layer", fits, format!("[1, {rank}]"))?;
        Ok(Self {
            p,
            lambda,
            q,
            rank,
            alpha,
            start: Mutex::new(None),
        })
    }

    /// `P0 diag(l0) Q0` of a base weight, `[o, i]` in its dtype.
    fn start(&self, base: &Tensor) -> Result<Tensor> {
        let mut known = self.start.lock().unwrap_or_else(|e| e.into_inner());
        match &*known {
            Some((id, start)) if *id == base.id() => Ok(start.clone()),
            _ => {
                let start = largest_directions(base, self.rank)?;
                *known = Some((base.id(), start.clone()));
                Ok(start)
            }
        }
    }
}

/// The best approximation of a weight, as a matrix, by one of this rank.
fn largest_directions(weight: &Tensor, rank: usize) -> Result<Tensor> {
    let matrix = weight.detach().flatten_from(1)?;
    let rows: Vec<Vec<f64>> = matrix
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .to_vec2()?;
    let (o, i) = matrix.dims2()?;
    let full = faer::Mat::from_fn(o, i, |r, c| rows[r][c]);
    let Ok(svd) = full.thin_svd() else {
        candle_core::bail!("the singular values of a weight [{o}, {i}] do not converge");
    };
    let r = rank.min(o).min(i);
    let u = svd.U().subcols(0, r);
    let v = svd.V().subcols(0, r);
    let s = svd.S().column_vector();
    let scaled = faer::Mat::from_fn(o, r, |row, k| u[(row, k)] * s[k]);
    let product = &scaled * v.transpose();
    let values: Vec<f64> = (0..o)
        .flat_map(|row| (0..i).map(move |column| (row, column)))
        .map(|place| product[place])
        .collect();
    Tensor::from_vec(values, (o, i), weight.device())?.to_dtype(precision(weight))
}

impl Adapter for Tlora {
    fn family(&self) -> Family {
        Family::Tlora
    }

    fn rank(&self) -> Option<usize> {
        Some(self.rank)
    }

    fn alpha(&self) -> Option<f64> {
        Some(self.alpha)
    }

    fn matrix_dims(&self) -> (usize, usize) {
        (
            self.p.elem_count() / self.rank,
            self.q.elem_count() / self.rank,
        )
    }

    fn check(&self, layer: &str, weight: &[usize]) -> crate::Result<()> {
        let (o, i) = self.matrix_dims();
        match weight {
            [rows, columns] | [rows, columns, 1, 1] if (*rows, *columns) == (o, i) => Ok(()),
            _ => Err(misfit(layer, &self.factors(), weight, vec![o, i])),
        }
    }

    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        let dtype = precision(base);
        let p = self.p.to_dtype(dtype)?.flatten_from(1)?;
        let lambda = self.lambda.to_dtype(dtype)?.reshape((1, self.rank))?;
        let q = self.q.to_dtype(dtype)?.flatten_from(1)?;
        let now = p.broadcast_mul(&lambda)?.matmul(&q)?;
        let start = self.start(base)?.to_dtype(dtype)?;
        scaled_like(&(now - start)?, base, self.scale() * multiplier)
    }

    fn factors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![
            ("p_layer.weight", &self.p),
            ("lambda_layer", &self.lambda),
            ("q_layer.weight", &self.q),
        ]
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Self {
            p: f(&self.p)?,
            lambda: f(&self.lambda)?,
            q: f(&self.q)?,
            rank: self.rank,
            alpha: self.alpha,
            start: Mutex::new(None),
        }))
    }

    fn norm(&self) -> Result<Option<f64>> {
        Ok(None)
    }
}

fn read(parts: &mut Parts<'_>) -> crate::Result<Arc<dyn Adapter>> {
    let p = parts.require("p_layer.weight")?;
    let lambda = parts.require("lambda_layer")?;
    let q = parts.require("q_layer.weight")?;
    let mut tlora = Tlora::new(parts.layer, p, lambda, q, 1.0)?;
    tlora.alpha = parts.take_alpha(tlora.rank)?;
    parts.note(
        "lambda_layer",
        false,
        "T-LoRA: right on the checkpoint that it was trained on only",
    );
    Ok(Arc::new(tlora))
}

fn create(fresh: &Fresh<'_>, _rng: &mut dyn RngCore) -> crate::Result<Arc<dyn Adapter>> {
    Err(Error::BadValue {
        layer: fresh.layer.to_string(),
        name: "family",
        value: Family::Tlora.name().into(),
        expected: "T-LoRA files are read, not trained; expected another family",
    })
}
