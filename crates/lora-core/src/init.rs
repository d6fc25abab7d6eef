//! Random tensors for fresh adapters, drawn on the host so that a seed gives the
//! same factors on every device.

use candle_core::{Device, Result, Tensor};
use rand::{Rng, RngCore};
use rand_distr::{Distribution, StandardNormal};

/// f32 values from `U(-bound, bound)`.
pub(crate) fn uniform(
    dims: &[usize],
    bound: f64,
    rng: &mut dyn RngCore,
    device: &Device,
) -> Result<Tensor> {
    let values: Vec<f32> = (0..dims.iter().product::<usize>())
        .map(|_| ((rng.random::<f64>() * 2.0 - 1.0) * bound) as f32)
        .collect();
    Tensor::from_vec(values, dims, device)
}

/// f32 values from `N(0, std)`.
pub(crate) fn normal(
    dims: &[usize],
    std: f64,
    rng: &mut dyn RngCore,
    device: &Device,
) -> Result<Tensor> {
    let values: Vec<f32> = (0..dims.iter().product::<usize>())
        .map(|_| {
            let unit: f64 = StandardNormal.sample(rng);
            (unit * std) as f32
        })
        .collect();
    Tensor::from_vec(values, dims, device)
}
