//! One number per channel added to a picture. candle's broadcast does the same, but its
//! backward pass sums slowly.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use crate::buffer::in_parts;
use crate::{fast, values};

/// `y` `[n, c, h, w]` plus `shift` `[n, c]`, or `[1, c]` for all samples.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let y = Tensor::zeros((1, 2, 1, 1), candle_core::DType::F32, &Device::Cpu)?;
/// let shift = Tensor::new(&[[3f32, 4.]], &Device::Cpu)?;
/// let shifted = lora_kernels::add_to_channels(&y, &shift)?;
/// assert_eq!(shifted.flatten_all()?.to_vec1::<f32>()?, [3., 4.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When the shapes do not fit.
pub fn add_to_channels(y: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let (n, c) = shift.dims2()?;
    let (samples, channels, _, _) = y.dims4()?;
    let fits = c == channels && (n == 1 || n == samples);
    if fits && fast(&[y, shift]) {
        y.contiguous()?
            .apply_op2(&shift.contiguous()?, AddToChannels)
    } else {
        y.broadcast_add(&shift.reshape((n, c, 1, 1))?)
    }
}

struct AddToChannels;

impl CustomOp2 for AddToChannels {
    fn name(&self) -> &'static str {
        "add_to_channels"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, _, h, w) = l1.shape().dims4()?;
        let (y, shifts, plane) = (values(s1, l1)?, values(s2, l2)?, (h * w).max(1));
        let y = in_parts(y.len(), plane, |first, out: &mut [f32]| {
            let shift = shifts[first / plane % shifts.len()];
            let y = &y[first..];
            out.iter_mut().zip(y).for_each(|(out, y)| *out = y + shift);
        });
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    fn bwd(
        &self,
        y: &Tensor,
        shift: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.detach();
        let to_shift = |rows: usize| {
            let sums = dy.contiguous()?.apply_op1_no_bwd(&PlaneSums)?;
            match rows {
                1 => sums.sum_keepdim(0),
                _ => Ok(sums),
            }
        };
        let dshift = shift
            .track_op()
            .then(|| to_shift(shift.dim(0)?))
            .transpose()?;
        Ok((y.track_op().then_some(dy), dshift))
    }
}

/// `[n, c, h, w]` to the sums over each plane, `[n, c]`.
struct PlaneSums;

impl CustomOp1 for PlaneSums {
    fn name(&self) -> &'static str {
        "plane_sums"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, c, h, w) = layout.shape().dims4()?;
        let planes = values(storage, layout)?.chunks_exact((h * w).max(1));
        let sums = planes.map(|plane| crate::math::sum(plane, |v| v) as f32);
        Ok((CpuStorage::F32(sums.collect()), (n, c).into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn sums_and_gradients_are_those_of_a_broadcast() -> Result<()> {
        let y = Var::randn(0f32, 1.0, (3, 5, 4, 7), &Device::Cpu)?;
        let weigh = Tensor::randn(0f32, 1.0, (3, 5, 4, 7), &Device::Cpu)?;
        for rows in [1, 3] {
            let shift = Var::randn(0f32, 1.0, (rows, 5), &Device::Cpu)?;
            let broadcast = y.broadcast_add(&shift.reshape((rows, 5, 1, 1))?)?;
            let ours = add_to_channels(&y, &shift)?;
            let gradients = |sum: &Tensor| {
                let store = (sum * &weigh)?.sum_all()?.backward()?;
                let of = |var: &Var| store.get(var).cloned();
                Ok::<_, candle_core::Error>((of(&y), of(&shift)))
            };
            let largest =
                |a: &Tensor, b: &Tensor| (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
            assert!(largest(&ours, &broadcast)? < 1e-6);
            let ((dy, ds), (want_dy, want_ds)) = (gradients(&ours)?, gradients(&broadcast)?);
            for (got, want) in [(dy, want_dy), (ds, want_ds)] {
                assert!(largest(&got.unwrap(), &want.unwrap())? < 1e-5);
            }
        }
        Ok(())
    }
}
