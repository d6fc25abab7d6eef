//! Parts that may stand beside those of any family.
//!
//! * `diff_b` `[o]`: `bias delta = multiplier * diff_b`, on top of the family's own.
//!   Some trainers and extraction tools write it; ComfyUI honours it with every family.
//! * `bias`, dense in the weight's shape, or sparse as `bias_indices` `[2, n]`,
//!   `bias_values` `[n]` and `bias_size` `[2]`: what an extraction left over of the weight
//!   difference, added to the family's product before the scale. Not the layer's bias.
//! * `reshape_weight`: the shape to which ComfyUI pads the layer's weight first. Only the
//!   shape that the weight has already can be read.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::{Parts, precision, scaled_like};
use crate::Error;
use crate::adapter::{Adapter, Family, Reading};
use crate::control::Pass;
use crate::layer::{BaseLayer, LayerOp};

/// An adapter of any family, and what stands beside it.
#[derive(Debug, Clone)]
struct Beside {
    inner: Arc<dyn Adapter>,
    bias: Option<Tensor>,
    residual: Option<Residual>,
    reshape: Option<Vec<usize>>,
}

/// A weight change beside the factors.
#[derive(Debug, Clone)]
enum Residual {
    /// Of the weight's size.
    Dense(Tensor),
    /// Values at (row, column) of the weight as a matrix of this size.
    Sparse {
        indices: Vec<Vec<usize>>,
        values: Tensor,
        size: (usize, usize),
    },
}

impl Residual {
    /// In the shape and dtype of `base`.
    fn dense(&self, base: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(t) => t.to_dtype(base.dtype())?.reshape(base.shape()),
            Self::Sparse {
                indices,
                values,
                size: (rows, columns),
            } => {
                let mut all = vec![0f32; rows * columns];
                let values: Vec<f32> = values.to_dtype(DType::F32)?.to_vec1()?;
                if let [row, column] = indices.as_slice() {
                    for ((r, c), value) in row.iter().zip(column).zip(values) {
                        // Repeated places add up, as in a sparse matrix.
                        if let Some(place) = all.get_mut(r * columns + c) {
                            *place += value;
                        }
                    }
                }
                Tensor::from_vec(all, base.shape(), base.device())?.to_dtype(base.dtype())
            }
        }
    }
}

/// Adds the file's residual of the weight, if there is one, to an adapter.
pub(super) fn with_residual(
    inner: Arc<dyn Adapter>,
    parts: &mut Parts<'_>,
) -> crate::Result<Arc<dyn Adapter>> {
    let (o, i) = inner.matrix_dims();
    let residual = if let Some(dense) = parts.take("bias") {
        if dense.elem_count() != o.saturating_mul(i) || dense.dims().first() != Some(&o) {
            return Err(parts.mismatch("bias", format!("the weight's size [{o}, {i}]"), &dense));
        }
        Residual::Dense(dense)
    } else if parts.has("bias_indices") || parts.has("bias_values") {
        sparse(parts, (o, i))?
    } else {
        return Ok(inner);
    };
    Ok(Arc::new(Beside {
        inner,
        bias: None,
        residual: Some(residual),
        reshape: None,
    }))
}

fn sparse(parts: &mut Parts<'_>, size: (usize, usize)) -> crate::Result<Residual> {
    let values = parts.require("bias_values")?;
    let Some(indices) = parts.take_sizes("bias_indices")? else {
        return Err(parts.missing("bias_indices"));
    };
    let Some(written) = parts.take_sizes("bias_size")? else {
        return Err(parts.missing("bias_size"));
    };
    let (rows, columns) = size;
    let written = written.concat();
    let fits = match written.as_slice() {
        [] => false,
        [first, rest @ ..] => *first == rows && rest.iter().product::<usize>() == columns,
    };
    let inside = match indices.as_slice() {
        [r, c] => {
            r.len() == values.elem_count()
                && r.iter().all(|r| *r < rows)
                && c.iter().all(|c| *c < columns)
        }
        _ => false,
    };
    if !fits || !inside || values.rank() != 1 {
        let expected = format!(
            "one value per column of bias_indices [2, n], all inside bias_size [{rows}, {columns}]"
        );
        return Err(parts.mismatch("bias_values", expected, &values));
    }
    Ok(Residual::Sparse {
        indices,
        values,
        size,
    })
}

/// Adds the file's `diff_b` and `reshape_weight`, if they are left over, to an adapter.
pub(super) fn with_bias(
    inner: Arc<dyn Adapter>,
    parts: &mut Parts<'_>,
) -> crate::Result<Arc<dyn Adapter>> {
    let bias = parts.take("diff_b");
    if let Some(bias) = bias
        .as_ref()
        .filter(|b| b.rank() != 1 || b.elem_count() == 0)
    {
        return Err(parts.mismatch("diff_b", "[outputs]", bias));
    }
    let reshape = parts
        .take_sizes("reshape_weight")?
        .map(|rows| rows.concat());
    if bias.is_none() && reshape.is_none() {
        return Ok(inner);
    }
    Ok(Arc::new(Beside {
        inner,
        bias,
        residual: None,
        reshape,
    }))
}

impl Adapter for Beside {
    fn family(&self) -> Family {
        self.inner.family()
    }

    fn rank(&self) -> Option<usize> {
        self.inner.rank()
    }

    fn alpha(&self) -> Option<f64> {
        self.inner.alpha()
    }

    fn scale(&self) -> f64 {
        self.inner.scale()
    }

    fn matrix_dims(&self) -> (usize, usize) {
        self.inner.matrix_dims()
    }

    fn kernel(&self) -> Option<(usize, usize)> {
        self.inner.kernel()
    }

    fn check(&self, layer: &str, weight: &[usize]) -> crate::Result<()> {
        self.inner.check(layer, weight)?;
        let mismatch = |tensor: &str, expected: String, got: Vec<usize>| {
            Err(Error::ShapeMismatch {
                layer: layer.into(),
                tensor: tensor.into(),
                expected,
                got,
            })
        };
        if let Some(shape) = self.reshape.as_ref().filter(|s| *s != weight) {
            let expected = format!(
                "the layer's weight {weight:?}: padding a weight to another shape is not supported"
            );
            return mismatch("reshape_weight", expected, shape.clone());
        }
        match &self.bias {
            Some(bias) if weight.first() != Some(&bias.elem_count()) => mismatch(
                "diff_b",
                format!("one value per output of the layer's weight {weight:?}"),
                bias.dims().to_vec(),
            ),
            _ => Ok(()),
        }
    }

    fn delta(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        let delta = self.inner.delta(base, multiplier)?;
        let Some(residual) = &self.residual else {
            return Ok(delta);
        };
        let wide = base.to_dtype(precision(base))?;
        let scaled = (residual.dense(&wide)? * (self.scale() * multiplier))?;
        (delta.to_dtype(scaled.dtype())? + scaled)?.to_dtype(base.dtype())
    }

    fn bias_delta(&self, bias: Option<&Tensor>, multiplier: f64) -> Result<Option<Tensor>> {
        let inner = self.inner.bias_delta(bias, multiplier)?;
        let Some(change) = &self.bias else {
            return Ok(inner);
        };
        let own = scaled_like(change, bias.unwrap_or(change), multiplier)?;
        Ok(Some(match inner {
            Some(inner) => (inner + own)?,
            None => own,
        }))
    }

    fn branch(
        &self,
        x: &Tensor,
        layer: &BaseLayer,
        multiplier: f64,
        pass: Option<&Pass<'_>>,
    ) -> Result<Tensor> {
        let mut y = self.inner.branch(x, layer, multiplier, pass)?;
        if let Some(residual) = &self.residual {
            let weight =
                (residual.dense(&layer.weight_in(x.dtype())?)? * (self.scale() * multiplier))?;
            y = (y + layer.op.apply(x, &weight, None)?)?;
        }
        let Some(bias) = &self.bias else {
            return Ok(y);
        };
        let bias = (bias.to_dtype(y.dtype())? * multiplier)?;
        match layer.op {
            LayerOp::Conv2d(_) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
            _ => y.broadcast_add(&bias),
        }
    }

    fn factors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut factors = self.inner.factors();
        factors.extend(self.bias.as_ref().map(|bias| ("diff_b", bias)));
        factors
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Self {
            inner: self.inner.map(f)?,
            bias: self.bias.as_ref().map(f).transpose()?,
            ..self.clone()
        }))
    }

    fn constants(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let mut all = self.inner.constants()?;
        let numbers = |rows: Vec<i64>, shape: &[usize]| Tensor::from_vec(rows, shape, &Device::Cpu);
        let whole = |sizes: &[usize]| sizes.iter().map(|n| *n as i64).collect::<Vec<_>>();
        match &self.residual {
            None => {}
            Some(Residual::Dense(t)) => all.push(("bias", t.clone())),
            Some(Residual::Sparse {
                indices,
                values,
                size,
            }) => {
                let flat = whole(&indices.concat());
                let shape = [2, values.elem_count()];
                all.push(("bias_indices", numbers(flat, &shape)?));
                all.push(("bias_values", values.clone()));
                all.push(("bias_size", numbers(whole(&[size.0, size.1]), &[2])?));
            }
        }
        if let Some(shape) = &self.reshape {
            all.push(("reshape_weight", numbers(whole(shape), &[shape.len()])?));
        }
        Ok(all)
    }

    fn product(&self) -> Result<Option<(Tensor, Tensor)>> {
        match self.residual {
            None => self.inner.product(),
            Some(_) => Ok(None),
        }
    }

    fn norm(&self) -> Result<Option<f64>> {
        self.inner.norm()
    }

    fn read_as(&self, reading: &Reading) -> Option<Arc<dyn Adapter>> {
        Some(Arc::new(Self {
            inner: self.inner.read_as(reading)?,
            ..self.clone()
        }))
    }

    fn rescale(&self, ratio: f64) -> Result<f64> {
        self.inner.rescale(ratio)
    }
}
