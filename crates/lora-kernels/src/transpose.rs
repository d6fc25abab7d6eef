//! Channels and pixels change places. candle copies one value after the other, on one thread.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use crate::buffer::in_parts;
use crate::math::vectorized;
use crate::{fast, values};

/// `x` `[n, a, b]` as `[n, b, a]`, contiguous.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[[[1f32, 2.], [3., 4.]]], &Device::Cpu)?;
/// let turned = lora_kernels::transpose(&x)?;
/// assert_eq!(turned.to_vec3::<f32>()?, [[[1., 3.], [2., 4.]]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When `x` does not have three dimensions.
pub fn transpose(x: &Tensor) -> Result<Tensor> {
    x.dims3()?;
    if fast(&[x]) {
        x.contiguous()?.apply_op1(Transpose)
    } else {
        x.transpose(1, 2)?.contiguous()
    }
}

struct Transpose;

impl CustomOp1 for Transpose {
    fn name(&self) -> &'static str {
        "transpose"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, a, b) = layout.shape().dims3()?;
        let x = values(storage, layout)?;
        /// Rows of the result per task: they read the same lines of the cache.
        const ROWS: usize = 16;
        let turned = in_parts(x.len(), ROWS * a, |first, out: &mut [f32]| {
            vectorized(
                #[inline(always)]
                || {
                    for (row, out) in (first / a.max(1)..).zip(out.chunks_exact_mut(a.max(1))) {
                        let (image, row) = (row / b, row % b);
                        let x = &x[image * a * b + row..];
                        for (value, x) in out.iter_mut().zip(x.iter().step_by(b)) {
                            *value = *x;
                        }
                    }
                },
            );
        });
        Ok((CpuStorage::F32(turned), (n, b, a).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        x.track_op().then(|| transpose(&dy.detach())).transpose()
    }
}
