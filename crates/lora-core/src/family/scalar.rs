//! `use_scalar` of LyCORIS: a trained number that multiplies the whole change.
//!
//! `delta = scalar * D` with D the family's own. The number starts at 0, so that the
//! factor which would start at 0 can start at random values. It is not written to files:
//! it is multiplied into the factor named by [`folded`].

use std::sync::Arc;

use candle_core::{Result, Tensor, Var};
use rand::RngCore;

use super::Fresh;
use crate::adapter::{Adapter, Family, Reading};
use crate::control::Pass;
use crate::init::{normal, uniform};
use crate::layer::BaseLayer;

/// A family's adapter under a trained number.
#[derive(Debug, Clone)]
struct Scalar {
    inner: Arc<dyn Adapter>,
    scalar: Tensor,
}

/// The factor that takes the number when a file is written: for each family one.
fn folded(inner: &dyn Adapter) -> &'static str {
    let has = |name: &str| inner.factors().iter().any(|(n, _)| *n == name);
    match inner.family() {
        Family::Loha => "hada_w1_a",
        Family::Lokr if has("lokr_w1") => "lokr_w1",
        Family::Lokr => "lokr_w1_a",
        _ => "lora_up.weight",
    }
}

/// Puts the number around a fresh adapter, and random values into the factor that started
/// at 0. Families without such a factor are left alone.
pub(crate) fn with_scalar(
    inner: Arc<dyn Adapter>,
    fresh: &Fresh<'_>,
    rng: &mut dyn RngCore,
) -> Result<Arc<dyn Adapter>> {
    let zero: &[&str] = match inner.family() {
        Family::Lora => &["lora_up.weight"],
        Family::Loha => &["hada_w2_a"],
        Family::Lokr => &["lokr_w2", "lokr_w2_b"],
        _ => return Ok(inner),
    };
    let names: Vec<&str> = inner.factors().iter().map(|(name, _)| *name).collect();
    let mut names = names.into_iter();
    let family = inner.family();
    let inner = inner.map(&mut |factor| {
        let name = names.next().unwrap_or_default();
        if !zero.contains(&name) {
            return Ok(factor.clone());
        }
        let dims = factor.dims();
        let value = if family == Family::Loha {
            normal(dims, 0.1, rng, fresh.device)?
        } else {
            // Kaiming's bound: one by the square root of the inputs.
            let inputs: usize = dims.iter().skip(1).product();
            let bound = 1.0 / (inputs.max(1) as f64).sqrt();
            uniform(dims, bound, rng, fresh.device)?
        };
        Ok(Var::from_tensor(&value)?.into_inner())
    })?;
    let scalar = Var::from_tensor(&Tensor::zeros((), candle_core::DType::F32, fresh.device)?)?;
    Ok(Arc::new(Scalar {
        inner,
        scalar: scalar.into_inner(),
    }))
}

impl Scalar {
    fn times(&self, change: Tensor) -> Result<Tensor> {
        change.broadcast_mul(&self.scalar.to_dtype(change.dtype())?)
    }
}

impl Adapter for Scalar {
    fn family(&self) -> Family {
        self.inner.family()
    }

    fn rank(&self) -> Option<usize> {
        self.inner.rank()
    }

    fn alpha(&self) -> Option<f64> {
        self.inner.alpha()
    }

    fn matrix_dims(&self) -> (usize, usize) {
        self.inner.matrix_dims()
    }

    fn kernel(&self) -> Option<(usize, usize)> {
        self.inner.kernel()
    }

    fn check(&self, layer: &str, weight: &[usize]) -> crate::Result<()> {
        self.inner.check(layer, weight)
    }

    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        self.times(self.inner.delta(base, multiplier)?)
    }

    fn branch(
        &self,
        x: &Tensor,
        layer: &BaseLayer,
        multiplier: f64,
        pass: Option<&Pass<'_>>,
    ) -> Result<Tensor> {
        self.times(self.inner.branch(x, layer, multiplier, pass)?)
    }

    fn factors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut factors = self.inner.factors();
        factors.push(("scalar", &self.scalar));
        factors
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Self {
            inner: self.inner.map(f)?,
            scalar: f(&self.scalar)?,
        }))
    }

    fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let folded = folded(self.inner.as_ref());
        let tensors = self.inner.tensors()?.into_iter();
        tensors
            .map(|(name, tensor)| match name == folded {
                true => Ok((name, self.times(tensor)?)),
                false => Ok((name, tensor)),
            })
            .collect()
    }

    fn read_as(&self, reading: &Reading) -> Option<Arc<dyn Adapter>> {
        Some(Arc::new(Self {
            inner: self.inner.read_as(reading)?,
            scalar: self.scalar.clone(),
        }))
    }
}
