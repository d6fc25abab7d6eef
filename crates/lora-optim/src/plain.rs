//! Whole-tensor arithmetic for rules that need more than elementwise kernels away from
//! a CPU's memory: factored moments, limits on a root mean square, every n-th value.
//!
//! Factors that depend on the values stay on the device as tensors of one element, so
//! that no step waits for a number to come back.

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::slot::{Buffer, Slot};

impl Slot {
    /// The f32 weights, sharing the variable's memory where they can.
    pub(crate) fn weights_tensor(&self) -> Tensor {
        match &self.master {
            Some(Buffer::Device(master)) => master.clone(),
            _ => self.var.as_detached_tensor(),
        }
    }

    /// Stores the stepped weights.
    pub(crate) fn put_weights(&mut self, weights: &Tensor) -> Result<()> {
        let weights = weights.reshape(self.dims())?;
        if self.is_half() {
            self.master = Some(Buffer::Device(weights));
        } else {
            self.var.set(&weights)?;
        }
        Ok(())
    }

    /// The gradient of this step, scaled.
    pub(crate) fn grad_tensor(&self) -> Result<Tensor> {
        let grad = self.grad.as_ref().ok_or_else(|| Error::Missing {
            what: "gradient",
            name: self.name.clone(),
        })?;
        Ok(if self.grad_scale == 1.0 {
            grad.clone()
        } else {
            grad.affine(f64::from(self.grad_scale), 0.0)?
        })
    }

    /// A state buffer on the device.
    pub(crate) fn state_tensor(&self, index: usize) -> Result<&Tensor> {
        match &self.buffers[index] {
            Some(Buffer::Device(tensor)) => Ok(tensor),
            _ => Err(Error::Missing {
                what: "state",
                name: self.name.clone(),
            }),
        }
    }

    /// Stores a state buffer on the device.
    pub(crate) fn put_state(&mut self, index: usize, tensor: Tensor) {
        self.buffers[index] = Some(Buffer::Device(tensor));
    }

    /// Creates a state buffer of `len` zeros on the device if it does not exist.
    pub(crate) fn ensure_device_zeros(&mut self, index: usize, len: usize) -> Result<()> {
        if self.buffers[index].is_none() {
            self.put_state(index, Tensor::zeros(len, DType::F32, self.var.device())?);
        }
        Ok(())
    }
}

/// `keep * mean + gain * value`.
pub(crate) fn mix(mean: &Tensor, keep: f64, value: &Tensor, gain: f64) -> Result<Tensor> {
    Ok((mean.affine(keep, 0.0)? + value.affine(gain, 0.0)?)?)
}

/// Root of the mean square, as a tensor of one element.
pub(crate) fn rms(values: &Tensor) -> Result<Tensor> {
    Ok(values.sqr()?.mean_all()?.sqrt()?)
}

/// The factor that brings the root mean square of `values` under `threshold`.
pub(crate) fn clip_factor(values: &Tensor, threshold: f64) -> Result<Tensor> {
    Ok(rms(values)?
        .affine(1.0 / threshold, 0.0)?
        .maximum(1.0)?
        .recip()?)
}

/// Every `stride`-th value, from the first, as a vector.
pub(crate) fn every(tensor: &Tensor, stride: usize) -> Result<Tensor> {
    let flat = tensor.flatten_all()?;
    let len = flat.elem_count();
    let (whole, rest) = (len / stride, len % stride);
    let head = flat
        .narrow(0, 0, whole * stride)?
        .reshape((whole, stride))?
        .narrow(1, 0, 1)?
        .flatten_all()?;
    if rest == 0 {
        return Ok(head);
    }
    let tail = flat.narrow(0, whole * stride, 1)?;
    if whole == 0 {
        return Ok(tail.copy()?);
    }
    Ok(Tensor::cat(&[head, tail], 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn every_third_value_of_any_length() -> Result<()> {
        for len in 1..8u32 {
            let values = Tensor::arange(0, len, &Device::Cpu)?;
            let expected: Vec<u32> = (0..len).step_by(3).collect();
            assert_eq!(every(&values, 3)?.to_vec1::<u32>()?, expected);
        }
        Ok(())
    }
}
