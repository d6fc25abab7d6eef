//! Tensors side by side and in other shapes, whose gradients do not go through candle's store.

use candle_core::{Result, Shape, Tensor};

use crate::buffer::{added_in_parts, in_parts, with, with_both};
use crate::gradient::Gradient;
use crate::node::{Value, node, view};
use crate::{as_nodes, fast};

/// `x` in another shape, as candle's `reshape`. As arguments of the operations here, uses of the
/// result are summed by themselves in the backward pass, before the sum joins those of other uses
/// of `x`.
///
/// ```
/// use candle_core::{Device, Var};
/// let x = Var::new(&[[1f32, 2.]], &Device::Cpu)?;
/// assert_eq!(lora_kernels::reshape(&x, 2)?.to_vec1::<f32>()?, [1., 2.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When the number of values differs.
pub fn reshape(x: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    match as_nodes() {
        true => view(x, shape.into()),
        false => x.reshape(shape.into()),
    }
}

/// The channels of `a` `[n, i, h, w]` and then those of `b` `[n, j, h, w]`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let a = Tensor::new(&[[[[1f32]]]], &Device::Cpu)?;
/// let b = Tensor::new(&[[[[2f32]]]], &Device::Cpu)?;
/// assert_eq!(lora_kernels::concat_channels(&a, &b)?.dims(), [1, 2, 1, 1]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When the shapes do not fit.
pub fn concat_channels(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !fast(&[a, b]) {
        return Tensor::cat(&[a, b], 1);
    }
    let ((n, i, h, w), (samples, j, height, width)) = (a.dims4()?, b.dims4()?);
    if (n, h, w) != (samples, height, width) {
        candle_core::bail!("concat: {:?} and {:?} do not fit", a.dims(), b.dims());
    }
    let (plane, shape) = ((h * w).max(1), (n, i + j, h, w));
    let joined = with_both(&a.detach(), &b.detach(), |a, b| {
        in_parts(n * (i + j) * h * w, plane, |first, out: &mut [f32]| {
            let (sample, channel) = (first / plane / (i + j), first / plane % (i + j));
            let from = match channel < i {
                true => &a[(sample * i + channel) * plane..],
                false => &b[(sample * j + channel - i) * plane..],
            };
            out.copy_from_slice(&from[..plane]);
        })
    })?;
    let gradients = move |dy: &Tensor| {
        let dy = dy.contiguous()?;
        // Channels from `skip` on go to one of both.
        let part = |channels: usize, skip: usize| {
            let dy = dy.clone();
            Gradient::made(move |dx| {
                with(&dy, |dy| {
                    added_in_parts(dx, n * channels * h * w, plane, |first, dx| {
                        let number = first / plane;
                        let (sample, channel) = (number / channels, number % channels);
                        let dy = &dy[(sample * (i + j) + skip + channel) * plane..];
                        dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx += dy);
                    })
                })
            })
        };
        Ok(vec![Some(part(i, 0)), Some(part(j, i))])
    };
    let value = Value::cpu(joined, shape);
    node("concat_channels", &[a, b], value, Box::new(gradients))
}

/// `a + b` of the same shape.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let a = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
/// assert_eq!(lora_kernels::add(&a, &a)?.to_vec1::<f32>()?, [2., 4.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When the shapes differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !as_nodes() {
        return a + b;
    }
    if a.shape() != b.shape() {
        candle_core::bail!("add: {:?} and {:?} differ", a.shape(), b.shape());
    }
    let value = match fast(&[a, b]) {
        true => {
            let sums = with_both(&a.detach(), &b.detach(), |a, b| {
                in_parts(a.len(), 1 << 15, |first, out: &mut [f32]| {
                    let terms = a[first..].iter().zip(&b[first..]);
                    out.iter_mut()
                        .zip(terms)
                        .for_each(|(out, (a, b))| *out = a + b);
                })
            })?;
            Value::cpu(sums, a.shape())
        }
        false => Value::Tensor((a.detach() + b.detach())?),
    };
    let gradients = |dy: &Tensor| {
        let dy = || Some(Gradient::Tensor(dy.clone()));
        Ok(vec![dy(), dy()])
    };
    node("add", &[a, b], value, Box::new(gradients))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn values_and_gradients_are_those_of_candle() -> Result<()> {
        let a = Var::randn(0f32, 1.0, (2, 3, 4, 5), &Device::Cpu)?;
        let b = Var::randn(0f32, 1.0, (2, 2, 4, 5), &Device::Cpu)?;
        let weigh = Tensor::randn(0f32, 1.0, (2, 5, 20), &Device::Cpu)?;
        let all = |joined: Tensor, shaped: Tensor| {
            let store = (shaped * &weigh)?.sum_all()?.backward()?;
            let of = |var: &Var| store.get(var).unwrap().flatten_all()?.to_vec1::<f32>();
            Ok::<_, candle_core::Error>((joined.flatten_all()?.to_vec1::<f32>()?, of(&a)?, of(&b)?))
        };
        let theirs = Tensor::cat(&[a.as_tensor(), b.as_tensor()], 1)?;
        let ours = concat_channels(&a, &b)?;
        let want = all(theirs.clone(), theirs.reshape((2, 5, 20))?)?;
        assert_eq!(all(ours.clone(), reshape(&ours, (2, 5, 20))?)?, want);
        Ok(())
    }
}
