//! Timesteps as vectors.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, VarBuilder};
use lora_core::Layer;

/// Sinusoidal embedding of `timesteps` `[n]` as `[n, width]`, cosines first, always
/// computed and returned in f32: in half precision angles up to 999 would lose all
/// their digits. An odd `width` ends in a zero.
///
/// # Errors
/// When `timesteps` is not one-dimensional.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let t = Tensor::new(&[0f32], &Device::Cpu)?;
/// let e = lora_sd15::timestep_embedding(&t, 4)?;
/// assert_eq!(e.to_vec2::<f32>()?, [[1.0, 1.0, 0.0, 0.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn timestep_embedding(timesteps: &Tensor, width: usize) -> Result<Tensor> {
    let half = width / 2;
    let frequencies: Vec<f32> = (0..half)
        .map(|i| (-(10000f64.ln()) * i as f64 / half as f64).exp() as f32)
        .collect();
    // On the host: a handful of numbers, and the same digits on every device.
    let t = timesteps
        .to_dtype(DType::F32)?
        .to_device(&Device::Cpu)?
        .to_vec1::<f32>()?;
    let mut values = Vec::with_capacity(t.len() * width);
    for &t in &t {
        let angles = || frequencies.iter().map(|f| f64::from(t * f));
        values.extend(angles().map(|a| a.cos() as f32));
        values.extend(angles().map(|a| a.sin() as f32));
        values.extend(std::iter::repeat_n(0f32, width - 2 * half));
    }
    Tensor::from_vec(values, (t.len(), width), timesteps.device())
}

/// Sinusoid, two linear layers with silu between.
#[derive(Debug, Clone)]
pub(super) struct TimeEmbedding {
    linear_1: Layer,
    linear_2: Layer,
    width: usize,
}

impl TimeEmbedding {
    pub(super) fn new(width: usize, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            linear_1: Layer::linear(width, 4 * width, vb.pp("linear_1"))?,
            linear_2: Layer::linear(4 * width, 4 * width, vb.pp("linear_2"))?,
            width,
        })
    }

    pub(super) fn forward(&self, timesteps: &Tensor, dtype: DType) -> Result<Tensor> {
        let x = timestep_embedding(timesteps, self.width)?.to_dtype(dtype)?;
        self.linear_2.forward(&self.linear_1.forward(&x)?.silu()?)
    }

    pub(super) fn visit(
        &mut self,
        visit: &mut dyn FnMut(&mut Layer) -> lora_core::Result<()>,
    ) -> lora_core::Result<()> {
        visit(&mut self.linear_1)?;
        visit(&mut self.linear_2)
    }
}
