//! One number per channel added to a picture. candle's broadcast does the same, but its
//! backward pass sums slowly.

use candle_core::{Device, Result, Tensor};

use crate::buffer::{in_parts, with, with_both};
use crate::fast;
use crate::math::sum;
use crate::node::{Value, node};

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
    if !fits || !fast(&[y, shift]) {
        return y.broadcast_add(&shift.reshape((n, c, 1, 1))?);
    }
    let (_, _, h, w) = y.dims4()?;
    let plane = (h * w).max(1);
    let sums = with_both(&y.detach(), &shift.detach(), |y, shifts| {
        in_parts(y.len(), plane, |first, out: &mut [f32]| {
            let shift = shifts[first / plane % shifts.len()];
            let y = &y[first..];
            out.iter_mut().zip(y).for_each(|(out, y)| *out = y + shift);
        })
    })?;
    let to_shift = shift.track_op();
    let gradients = move |dy: &Tensor| {
        let dshift = match to_shift {
            true if n == 1 => Some(plane_sums(dy)?.sum_keepdim(0)?.into()),
            true => Some(plane_sums(dy)?.into()),
            false => None,
        };
        Ok(vec![Some(dy.clone().into()), dshift])
    };
    let value = Value::cpu(sums, y.shape());
    node("add_to_channels", &[y, shift], value, Box::new(gradients))
}

/// `[n, c, h, w]` to the sums over each plane, `[n, c]`.
pub(crate) fn plane_sums(x: &Tensor) -> Result<Tensor> {
    let (n, c, h, w) = x.dims4()?;
    let sums: Vec<f32> = with(x, |x| {
        let planes = x.chunks_exact((h * w).max(1));
        planes.map(|plane| sum(plane, |v| v) as f32).collect()
    })?;
    Tensor::from_vec(sums, (n, c), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

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
