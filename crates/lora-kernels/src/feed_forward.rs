//! A transformer's feed-forward part in one pass over its rows, where no gradient is asked for: what
//! lies between its layers, eight times as wide as its input, never leaves the caches.

use candle_core::{Result, Tensor};

use crate::{Added, Compute, layer_norm, linear_added};
#[cfg(target_arch = "x86_64")]
use {
    crate::added::with_weight,
    crate::avx512::{self, Arithmetic, Bf16, Element, F32, Operand, Panels, Rows, TILE},
    crate::buffer::{Start, in_parts, maybe_with, share, with, with_both},
    crate::math::vectorized,
    crate::matrix::{PANEL, Values, native_products},
    crate::pointwise::gate,
    crate::{fast, norm},
    candle_core::{DType, Device},
    half::bf16,
    std::sync::Mutex,
};

/// Weights `[o, i]` and biases `[o]` of the layers of [`feed_forward`].
#[derive(Debug, Clone, Copy)]
pub struct FeedForward<'a> {
    /// Scale and shift of the layer norm, and what its variance is increased by.
    pub norm: (&'a Tensor, &'a Tensor, f64),
    /// To `8 c` channels, of which [`geglu`](crate::geglu) makes half as many.
    pub proj: (&'a Tensor, Option<&'a Tensor>),
    /// Back to `c` channels.
    pub out: (&'a Tensor, Option<&'a Tensor>),
    /// What the layers' products are computed in.
    pub compute: Compute,
}

/// `x + out(geglu(proj(layer_norm(x))))` for `x` `[.., c]`: the feed-forward part of a transformer
/// block, with frozen weights of f32, f16 or bf16. The result is to the bit that of
/// [`layer_norm`](crate::layer_norm), [`linear_added`](crate::linear_added) and
/// [`geglu`](crate::geglu) one after the other.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use lora_kernels::{Compute, FeedForward, feed_forward};
/// let (ones, zeros) = (Tensor::ones(2, DType::F32, &Device::Cpu)?, Tensor::zeros(2, DType::F32, &Device::Cpu)?);
/// let proj = Tensor::zeros((16, 2), DType::F32, &Device::Cpu)?;
/// let out = Tensor::ones((2, 8), DType::F32, &Device::Cpu)?;
/// let layers = FeedForward {
///     norm: (&ones, &zeros, 1e-5),
///     proj: (&proj, None),
///     out: (&out, None),
///     compute: Compute::F32,
/// };
/// let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// assert_eq!(feed_forward(&x, &layers)?.to_vec2::<f32>()?, [[1., 2.]]); // all that is added is zero
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When the shapes do not fit.
pub fn feed_forward(x: &Tensor, layers: &FeedForward<'_>) -> Result<Tensor> {
    let FeedForward {
        norm,
        proj,
        out,
        compute,
    } = *layers;
    #[cfg(target_arch = "x86_64")]
    if layers.in_one_pass(x)? {
        return layers.run(x);
    }
    let normal = layer_norm(x, norm.0, norm.1, norm.2)?;
    let wide = linear_added(&normal, proj.0, proj.1, compute, &Added::default())?;
    let gated = crate::geglu(&wide)?;
    let added = Added {
        residual: Some(x),
        ..Added::default()
    };
    linear_added(&gated, out.0, out.1, compute, &added)
}

/// Most rows of a task.
#[cfg(target_arch = "x86_64")]
const ROWS: usize = 96;

/// What a task works in.
#[cfg(target_arch = "x86_64")]
#[derive(Default)]
struct Work {
    normal: Vec<f32>,
    normal_rows: Rows,
    values: Vec<f32>,
    gates: Vec<f32>,
    gated: Vec<f32>,
    gated_rows: Rows,
}

#[cfg(target_arch = "x86_64")]
impl FeedForward<'_> {
    /// Whether one pass is possible, and pays: weights are read by every task, so that rows have to
    /// be many.
    fn in_one_pass(&self, x: &Tensor) -> Result<bool> {
        let (norm, weights) = (self.norm, [self.proj.0, self.out.0]);
        let operands: Vec<&Tensor> = [x, norm.0, norm.1]
            .into_iter()
            .chain(self.proj.1)
            .chain(self.out.1)
            .collect();
        let (c, hidden) = (norm.0.elem_count(), self.proj.0.dim(0)? / 2);
        let fit = x.dims().last() == Some(&c)
            && norm.1.elem_count() == c
            && self.proj.0.dims() == [2 * hidden, c]
            && self.out.0.dims() == [c, hidden]
            && self.proj.1.is_none_or(|b| b.dims() == [2 * hidden])
            && self.out.1.is_none_or(|b| b.dims() == [c]);
        let tracked = operands.iter().chain(&weights).any(|t| t.track_op());
        let known = |t: &&Tensor| {
            let dtype = matches!(t.dtype(), DType::F32 | DType::F16 | DType::BF16);
            dtype && t.device().is_cpu()
        };
        Ok(fit
            && !tracked
            && fast(&operands)
            && weights.iter().all(known)
            && native_products()
            && c > 0
            && hidden.is_multiple_of(PANEL)
            && x.elem_count() / c >= 2 * c)
    }

    fn run(&self, x: &Tensor) -> Result<Tensor> {
        let y = match self.compute {
            Compute::F32 => self.rows::<F32>(x),
            Compute::Bf16 => self.rows::<Bf16>(x),
        }?;
        Tensor::from_vec(y, x.shape(), &Device::Cpu)
    }

    fn rows<S: Arithmetic>(&self, x: &Tensor) -> Result<Vec<f32>>
    where
        f32: Element<S>,
        bf16: Element<S>,
    {
        let (c, hidden) = (self.norm.0.elem_count(), self.proj.0.dim(0)? / 2);
        let panels = |weight: &Tensor, o: usize, i: usize| {
            with_weight(weight, true, |w| match w {
                Values::F32(w) => Panels::<S>::of(Operand::dense(w, o, i), true),
                Values::Bf16(w) => Panels::<S>::of(Operand::dense(w, o, i), true),
            })
        };
        let proj = panels(self.proj.0, 2 * hidden, c)?;
        let out = panels(self.out.0, c, hidden)?;
        let task = |x: &[f32],
                    y: &mut [f32],
                    scales: (&[f32], &[f32]),
                    to: [Option<&[f32]>; 2],
                    work: &mut Work| {
            let rows = x.len() / c;
            work.normal.resize(x.len(), 0.0);
            norm::normalize(&mut work.normal, x, scales, self.norm.2);
            let normal = Operand::dense(work.normal.as_slice(), rows, c);
            work.normal_rows.lay::<S, _>(normal);
            // The last task has fewer rows.
            work.values.resize(rows * PANEL, 0.0);
            work.gates.resize(rows * PANEL, 0.0);
            work.gated.resize(rows * hidden, 0.0);
            for column in (0..hidden).step_by(PANEL) {
                let parts = [
                    (&mut work.values, column),
                    (&mut work.gates, hidden + column),
                ];
                for (sums, column) in parts {
                    let panel = proj.panel(column / PANEL);
                    let left = work.normal_rows.at(0, 0);
                    let size = (rows, PANEL);
                    avx512::multiply_panel::<S>(sums, PANEL, size, false, left, panel);
                }
                let bias = |from: usize| to[0].map(|bias| &bias[from..][..PANEL]);
                gate_columns(work, (hidden, column), bias(column), bias(hidden + column));
            }
            let gated = Operand::dense(work.gated.as_slice(), rows, hidden);
            work.gated_rows.lay::<S, _>(gated);
            let start = Start {
                residual: Some(x),
                columns: to[1],
                rows: None,
            };
            out.multiply_from(y, start, work.gated_rows.at(0, 0));
        };
        // Of threads that have done their task, to be used again.
        let spare = Mutex::new(Vec::new());
        with(x, |x| {
            with_both(self.norm.0, self.norm.1, |w, b| {
                maybe_with(self.proj.1, |to_proj| {
                    maybe_with(self.out.1, |to_out| {
                        let rows = share(x.len() / c, ROWS, TILE);
                        in_parts(x.len(), rows * c, |first, y: &mut [f32]| {
                            let again = spare.lock().ok().and_then(|mut all| all.pop());
                            let mut work: Work = again.unwrap_or_default();
                            let x = &x[first..first + y.len()];
                            task(x, y, (w, b), [to_proj, to_out], &mut work);
                            if let Ok(mut all) = spare.lock() {
                                all.push(work);
                            }
                        })
                    })
                })
            })
        })???
    }
}

/// Of 64 values and gates a row, without their biases, what GEGLU makes: rows of `hidden` values from
/// `column` on.
#[cfg(target_arch = "x86_64")]
fn gate_columns(
    work: &mut Work,
    (hidden, column): (usize, usize),
    to_values: Option<&[f32]>,
    to_gates: Option<&[f32]>,
) {
    const NONE: [f32; PANEL] = [0.0; PANEL];
    let biases = [to_values, to_gates].map(|bias| bias.unwrap_or(&NONE));
    let sums = work.values.chunks_exact(PANEL);
    let rows = sums.zip(work.gates.chunks_exact(PANEL));
    vectorized(
        #[inline(always)]
        || {
            for (out, (values, gates)) in work.gated.chunks_exact_mut(hidden).zip(rows) {
                let out = &mut out[column..][..PANEL];
                let sums = values.iter().zip(gates);
                let biases = biases[0].iter().zip(biases[1]);
                for (out, ((v, g), (to_v, to_g))) in out.iter_mut().zip(sums.zip(biases)) {
                    *out = gate(v + to_v, g + to_g);
                }
            }
        },
    );
}
