//! Clipping gradients by their common norm.

use candle_core::{DType, Tensor};

use crate::error::Result;

/// Scales gradients so that the L2 norm of all of them together is at most `max_norm`
/// (above 0), and returns the norm before. As PyTorch's `clip_grad_norm_`: the factor is
/// `min(1, max_norm / (norm + 1e-6))`, and one that is exactly 1 changes nothing.
///
/// [`crate::StepOptions::max_grad_norm`] does the same inside the step without writing
/// the gradients.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let mut grads = vec![Tensor::new(&[3f32], &Device::Cpu)?, Tensor::new(&[4f32], &Device::Cpu)?];
/// assert_eq!(lora_optim::clip_grad_norm(grads.iter_mut(), 1.0)?, 5.0);
/// assert!((grads[0].to_vec1::<f32>()?[0] - 0.6).abs() < 1e-6);
/// # Ok::<(), lora_optim::Error>(())
/// ```
///
/// # Errors
/// `max_norm` not above 0, or a failed tensor operation.
pub fn clip_grad_norm<'a>(
    grads: impl IntoIterator<Item = &'a mut Tensor>,
    max_norm: f64,
) -> Result<f64> {
    crate::error::check_positive("max_norm", max_norm)?;
    let grads: Vec<&mut Tensor> = grads.into_iter().collect();
    let mut squares = 0.0;
    for grad in &grads {
        squares += square_sum(grad)?;
    }
    let norm = squares.sqrt();
    let factor = max_norm / (norm + 1e-6);
    if factor < 1.0 {
        for grad in grads {
            *grad = grad.affine(factor, 0.0)?;
        }
    }
    Ok(norm)
}

/// Sum of squares; in f64 where the values are in memory.
pub(crate) fn square_sum(tensor: &Tensor) -> candle_core::Result<f64> {
    if tensor.device().is_cpu() {
        let values = tensor
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1::<f32>()?;
        return Ok(values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum());
    }
    Ok(f64::from(
        tensor
            .to_dtype(DType::F32)?
            .sqr()?
            .sum_all()?
            .to_scalar::<f32>()?,
    ))
}
