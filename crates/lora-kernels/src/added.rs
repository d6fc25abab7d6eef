//! Linear layers and convolutions with frozen weights that add to their output what comes
//! next: low-rank branches, a residual, a shift per sample. One result instead of a chain of
//! sums, of which candle's graph would keep every step.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::buffer::{Onto, Start, maybe_with, with, with_both, written, zeros};
use crate::channels::plane_sums;
use crate::conv2d::Geometry;
use crate::gradient::{self, Gradient};
use crate::joined::add;
use crate::matrix::{Chain, Values, View, multiply_in, multiply_onto, reads_narrow};
use crate::node::{Saved, Value, node};
use crate::{Compute, Conv2dParams, as_nodes, composed, fast, plain};

/// What [`linear_added`] and [`conv2d_added`] add to the layer's own output.
#[derive(Debug, Clone, Copy, Default)]
pub struct Added<'a> {
    /// Products `up middle`: for a linear layer `middle` `[.., r]`, for a convolution
    /// `[n, r, h', w']`; `up` `[o, r]`.
    pub low_rank: &'a [(Tensor, Tensor)],
    /// Products `up down x`, of a linear layer's input: `down` `[r, i]`, `up` `[o, r]`. What is read once
    /// for the layer serves them, too.
    pub factors: &'a [(Tensor, Tensor)],
    /// In the shape of the output.
    pub residual: Option<&'a Tensor>,
    /// `[n, o]`, the same for all pixels of a sample; for convolutions only.
    pub shift: Option<&'a Tensor>,
}

impl Added<'_> {
    /// All tensors, in the order that gradients are returned in behind that of x.
    pub(crate) fn tensors(&self) -> Vec<&Tensor> {
        let pairs = self.pairs().flat_map(|(middle, up)| [middle, up]);
        pairs.chain(self.residual).chain(self.shift).collect()
    }

    /// Low-rank pairs, then factors.
    fn pairs(&self) -> impl Iterator<Item = &(Tensor, Tensor)> {
        self.low_rank.iter().chain(self.factors)
    }

    /// Whether a layer with these operands takes the fast path.
    fn fast(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> bool {
        let mut operands = vec![x];
        operands.extend(bias);
        operands.extend(self.tensors());
        let known = matches!(weight.dtype(), DType::F32 | DType::F16 | DType::BF16);
        fast(&operands) && known && frozen(weight, bias) && weight.device().is_cpu()
    }

    /// The sum by candle's operations; `product` multiplies a pair.
    fn plain(
        &self,
        mut y: Tensor,
        product: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if let Some(shift) = self.shift {
            y = crate::channels::add_to_channels(&y, shift)?;
        }
        for (middle, up) in self.low_rank {
            y = add(&y, &product(middle, up)?)?;
        }
        match self.residual {
            Some(residual) => add(&y, residual),
            None => Ok(y),
        }
    }
}

/// `x W^T + b` and what is [`Added`]: `x` `[.., i]`, `weight` `[o, i]`, `bias` `[o]`.
///
/// Inputs, sums and results are f32; a weight of f16 or bf16 is widened for the call. With
/// [`Compute::Bf16`] the operands of all products, also of low-rank branches and, in the backward
/// pass, of gradients, are rounded to bf16. Gradients go to `x` and to what is added;
/// a weight or bias that is tracked gets one, too, as from [`linear`](crate::linear).
///
/// # Errors
/// When the shapes do not fit.
pub fn linear_added(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    compute: Compute,
    added: &Added<'_>,
) -> Result<Tensor> {
    let (o, i) = weight.dims2()?;
    if added.shift.is_some() {
        candle_core::bail!("linear: a shift per sample is for convolutions");
    }
    if !added.fast(x, weight, bias) {
        let mut low_rank = added.low_rank.to_vec();
        for (down, up) in added.factors {
            let middle = linear_added(x, down, None, compute, &Added::default())?;
            low_rank.push((middle, up.clone()));
        }
        let added = Added {
            low_rank: &low_rank,
            factors: &[],
            ..*added
        };
        if as_nodes() && frozen(weight, bias) {
            return composed::linear_added(x, weight, bias, compute, &added);
        }
        let y = match weight.dtype() == x.dtype() && !frozen(weight, bias) {
            true => crate::linear::trained(x, weight, bias, compute)?,
            false => plain::linear(x, &weight.to_dtype(x.dtype())?, bias)?,
        };
        return added.plain(y, |middle, up| {
            linear_added(middle, up, None, compute, &Added::default())
        });
    }
    let dims = x.dims();
    let mut out = dims.to_vec();
    match out.last_mut() {
        Some(last) if *last == i => *last = o,
        _ => candle_core::bail!("linear: input {dims:?} does not fit weight [{o}, {i}]"),
    }
    let rows = x.elem_count() / i.max(1);
    check_pairs(added, &out, o, |middle, r| {
        middle.elem_count() == rows * r && middle.dims().last() == Some(&r)
    })?;
    for (down, up) in added.factors {
        match (down.dims(), up.dims()) {
            ([r, inputs], [outputs, s]) if r == s && *inputs == i && *outputs == o => {}
            (down, up) => {
                candle_core::bail!("factors {down:?}, {up:?} do not fit weight [{o}, {i}]")
            }
        }
    }
    if bias.is_some_and(|b| b.dims() != [o]) {
        candle_core::bail!("linear: the bias does not fit weight [{o}, {i}]");
    }
    let narrow = reads_narrow(compute);
    let mut middles = middles(rows, added.factors)?;
    let y = maybe_with(added.residual, |residual| {
        maybe_with(bias, |columns| {
            let start = Start {
                residual,
                columns,
                rows: None,
            };
            with_pairs(added.low_rank, |pairs| {
                let product = |(m, u, r): &(_, _, usize)| {
                    (View::rows(*m, rows, *r, *r), View::rows(*u, o, *r, *r).t())
                };
                let more: Vec<_> = pairs.iter().map(product).collect();
                with_pairs(added.factors, |factors| {
                    let chains = factors.iter().zip(&mut middles);
                    let mut chains: Vec<_> = chains
                        .map(|((down, up, r), middle)| Chain {
                            p: View::rows(*down, *r, i, i).t(),
                            q: View::rows(*up, o, *r, *r).t(),
                            middle,
                        })
                        .collect();
                    with(x, |x| {
                        with_weight(weight, narrow, |w| {
                            let own = (View::rows(x, rows, i, i), View::rows(w, o, i, i).t());
                            written(rows * o, |y| {
                                let onto = Onto::New(y, start);
                                multiply_onto(compute, onto, own, &more, &mut chains)
                            })
                        })
                    })
                })
            })
        })
    })??????;
    let back = Arc::new(LinearGradients {
        compute,
        sizes: (rows, o, i),
        weight: weight.detach(),
        factors: Factors::new(x, added.factors, middles)?,
    });
    let wanted = wanted(x, added);
    let pairs = detached(added.low_rank);
    let residual = added.residual.is_some();
    let gradients = move |dy: &Tensor| {
        let dy = dy.contiguous()?;
        let mut all = Vec::with_capacity(wanted.len() + 1);
        let now = Arc::new(Mutex::default());
        all.push(wanted[0].then(|| {
            let (back, dy, now) = (back.clone(), dy.clone(), now.clone());
            Gradient::made(move |dx| back.to_input(&dy, dx, &now))
        }));
        let mut wanted = wanted[1..].chunks(2);
        for ((middle, up), wanted) in pairs.iter().zip(&mut wanted) {
            let r = up.dim(1)?;
            let to_middle = wanted[0].then(|| {
                let (dy, up) = (dy.clone(), up.clone());
                Gradient::made(move |dm| to_middle(compute, &dy, &up, dm))
            });
            let to_up = wanted[1].then(|| {
                let (dy, middle) = (dy.clone(), middle.clone());
                Gradient::values(move |du, add| {
                    with_both(&dy, &middle, |dy, middle| {
                        let dy = View::rows(dy, rows, o, o).t();
                        multiply_in(compute, du, r, add, dy, View::rows(middle, rows, r, r));
                    })
                })
            });
            all.extend([to_middle, to_up]);
        }
        for (number, wanted) in wanted.enumerate() {
            for (which, wanted) in wanted.iter().enumerate() {
                all.push(wanted.then(|| {
                    let (back, dy, now) = (back.clone(), dy.clone(), now.clone());
                    Gradient::made(move |sum| {
                        let values = back.to_factor(&dy, &now, number, which)?;
                        Ok(match sum {
                            Some(sum) => {
                                gradient::add(sum, &values);
                                Vec::new()
                            }
                            None => values,
                        })
                    })
                }));
            }
        }
        if residual {
            all.push(Some(dy.into()));
        }
        Ok(all)
    };
    let args: Vec<&Tensor> = std::iter::once(x).chain(added.tensors()).collect();
    node("linear", &args, Value::cpu(y, out), Box::new(gradients))
}

/// The gradient to what `up` `[o, r]` multiplies, added or new, from that to a linear layer's result.
fn to_middle(
    compute: Compute,
    dy: &Tensor,
    up: &Tensor,
    sum: Option<&mut [f32]>,
) -> Result<Vec<f32>> {
    let (o, r) = up.dims2()?;
    let rows = dy.elem_count() / o.max(1);
    with_both(dy, up, |dy, up| {
        let (dy, up) = (View::rows(dy, rows, o, o), View::rows(up, o, r, r));
        added_or_new(compute, sum, (rows, r), (dy, up), &mut [])
    })
}

/// Room for what the first factor of each pair makes of `rows` rows.
fn middles(rows: usize, factors: &[(Tensor, Tensor)]) -> Result<Vec<Vec<f32>>> {
    let middle = |(_, up): &(Tensor, Tensor)| Ok(zeros(rows * up.dim(1)?));
    factors.iter().map(middle).collect()
}

/// What the gradients of a linear layer's input and factors are made of.
struct LinearGradients {
    compute: Compute,
    /// Rows of the input, outputs and inputs.
    sizes: (usize, usize, usize),
    weight: Tensor,
    factors: Factors,
}

/// Pairs of down and up, and what their gradients take.
struct Factors {
    pairs: Vec<(Tensor, Tensor)>,
    /// What down made of the input.
    middles: Vec<Tensor>,
    /// Whether gradients to down and up are asked for.
    wanted: Vec<[bool; 2]>,
    /// The input, if one of the downs is trained.
    input: Option<Arc<Saved>>,
}

impl Factors {
    fn new(x: &Tensor, pairs: &[(Tensor, Tensor)], middles: Vec<Vec<f32>>) -> Result<Self> {
        let tracked = |(down, up): &(Tensor, Tensor)| [down.track_op(), up.track_op()];
        let wanted: Vec<_> = pairs.iter().map(tracked).collect();
        let input = match wanted.iter().any(|[down, _]| *down) {
            true => Some(Saved::of(x)?),
            false => None,
        };
        let middles = middles.into_iter();
        Ok(Self {
            pairs: detached(pairs),
            middles: middles
                .map(|middle| {
                    let n = middle.len();
                    Tensor::from_vec(middle, n, &Device::Cpu)
                })
                .collect::<Result<_>>()?,
            wanted,
            input,
        })
    }
}

/// What has been computed of one gradient to a linear layer's result.
#[derive(Default)]
struct Progress {
    /// Gradients to the middles, made with that to the input.
    middles: Option<Vec<Vec<f32>>>,
    /// Those to the factors.
    factors: Option<Vec<[Option<Vec<f32>>; 2]>>,
}

impl LinearGradients {
    /// The gradient to the input, added or new, by the weight and by the factors.
    fn to_input(
        &self,
        dy: &Tensor,
        dx: Option<&mut [f32]>,
        progress: &Mutex<Progress>,
    ) -> Result<Vec<f32>> {
        let (compute, (rows, o, i)) = (self.compute, self.sizes);
        let mut middles = middles(rows, &self.factors.pairs)?;
        let made = with_pairs(&self.factors.pairs, |factors| {
            let chains = factors.iter().zip(&mut middles);
            let mut chains: Vec<_> = chains
                .map(|((down, up, r), middle)| Chain {
                    p: View::rows(*up, o, *r, *r),
                    q: View::rows(*down, *r, i, i),
                    middle,
                })
                .collect();
            with(dy, |dy| {
                with_weight(&self.weight, reads_narrow(compute), |w| {
                    let own = (View::rows(dy, rows, o, o), View::rows(w, o, i, i));
                    added_or_new(compute, dx, (rows, i), own, &mut chains)
                })
            })
        })???;
        progress.lock().unwrap_or_else(|e| e.into_inner()).middles = Some(middles);
        Ok(made)
    }

    /// The gradient to a pair's down (0) or up (1); all are computed when the first is asked for.
    fn to_factor(
        &self,
        dy: &Tensor,
        progress: &Mutex<Progress>,
        number: usize,
        which: usize,
    ) -> Result<Vec<f32>> {
        let mut progress = progress.lock().unwrap_or_else(|e| e.into_inner());
        if progress.factors.is_none() {
            let middles = progress.middles.take();
            progress.factors = Some(self.of_factors(dy, middles)?);
        }
        let all = progress.factors.iter_mut().flatten();
        match all.flatten().nth(2 * number + which).and_then(Option::take) {
            Some(values) => Ok(values),
            None => candle_core::bail!("linear: a factor's gradient is asked for twice"),
        }
    }

    fn of_factors(
        &self,
        dy: &Tensor,
        made: Option<Vec<Vec<f32>>>,
    ) -> Result<Vec<[Option<Vec<f32>>; 2]>> {
        let (compute, (rows, o, i)) = (self.compute, self.sizes);
        let Factors {
            pairs,
            middles,
            wanted,
            input,
        } = &self.factors;
        let input = input.as_ref().map(|saved| saved.value()).transpose()?;
        let mut all = Vec::with_capacity(pairs.len());
        for (number, (((_, up), middle), wanted)) in
            pairs.iter().zip(middles).zip(wanted).enumerate()
        {
            let r = up.dim(1)?;
            let of_middle = made.as_ref().and_then(|made| made.get(number));
            let to_down = || {
                let input = input.as_ref().filter(|_| wanted[0]);
                let Some(input) = input else {
                    return Ok(None);
                };
                let own;
                let of_middle = match of_middle {
                    Some(there) => there,
                    None => {
                        own = to_middle(compute, dy, up, None)?;
                        &own
                    }
                };
                let mut sums = zeros(r * i);
                with(input, |x| {
                    let dm = View::rows(of_middle.as_slice(), rows, r, r).t();
                    multiply_in(compute, &mut sums, i, false, dm, View::rows(x, rows, i, i));
                })?;
                Ok::<_, candle_core::Error>(Some(sums))
            };
            let to_up = || {
                if !wanted[1] {
                    return Ok(None);
                }
                let mut sums = zeros(o * r);
                with_both(dy, middle, |dy, middle| {
                    let (dy, m) = (View::rows(dy, rows, o, o), View::rows(middle, rows, r, r));
                    multiply_in(compute, &mut sums, r, false, dy.t(), m);
                })?;
                Ok::<_, candle_core::Error>(Some(sums))
            };
            // Each has few panels: together they keep more threads busy.
            let (down, up) = rayon::join(to_down, to_up);
            all.push([down?, up?]);
        }
        Ok(all)
    }
}

/// A convolution of `x` `[n, i, h, w]` with `weight` `[o, i / groups, kh, kw]` and `bias`
/// `[o]`, and what is [`Added`]; dtypes and gradients as in [`linear_added`].
///
/// # Errors
/// When the shapes do not fit.
pub fn conv2d_added(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    params: Conv2dParams,
    compute: Compute,
    added: &Added<'_>,
) -> Result<Tensor> {
    if !added.factors.is_empty() {
        candle_core::bail!("conv2d: factors are for linear layers");
    }
    if !added.fast(x, weight, bias) {
        if as_nodes() && frozen(weight, bias) {
            return composed::conv2d_added(x, weight, bias, params, compute, added);
        }
        let y = match weight.dtype() == x.dtype() && !frozen(weight, bias) {
            true => crate::conv2d::trained(x, weight, bias, params, compute)?,
            false => plain::conv2d(x, &weight.to_dtype(x.dtype())?, bias, params)?,
        };
        return added.plain(y, |middle, up| {
            let (o, r) = up.dims2()?;
            let up = up.reshape((o, r, 1, 1))?;
            let params = Conv2dParams::default();
            conv2d_added(middle, &up, None, params, compute, &Added::default())
        });
    }
    let g = Geometry::new(x.shape(), weight.shape(), params)?;
    let (n, o, plane) = (g.n, g.o, g.oh * g.ow);
    let out = [n, o, g.oh, g.ow];
    check_pairs(added, &out, o, |middle, r| {
        middle.dims() == [n, r, g.oh, g.ow]
    })?;
    if bias.is_some_and(|b| b.dims() != [o]) || added.shift.is_some_and(|s| s.dims() != [n, o]) {
        candle_core::bail!("conv2d: bias or shift do not fit an output of {out:?}");
    }
    let constants = constants(n * o, bias, added.shift)?;
    let y = maybe_with(added.residual, |residual| {
        let start = Start {
            residual,
            columns: None,
            rows: constants.as_deref(),
        };
        with_pairs(added.low_rank, |pairs| {
            with(x, |x| {
                with_weight(weight, g.reads_narrow(compute, false), |w| {
                    written(n * o * plane, |y| {
                        g.forward_new(compute, y, start, x, w, pairs)
                    })
                })
            })
        })
    })????;
    let (weight, wanted) = (weight.detach(), wanted(x, added));
    let pairs = detached(added.low_rank);
    let (residual, shift) = (added.residual.is_some(), added.shift.is_some());
    let gradients = move |dy: &Tensor| {
        let dy = dy.contiguous()?;
        let mut all = Vec::with_capacity(wanted.len() + 2);
        all.push(wanted[0].then(|| {
            let (dy, weight) = (dy.clone(), weight.clone());
            Gradient::made(move |dx| {
                let narrow = g.reads_narrow(compute, true);
                with(&dy, |dy| {
                    with_weight(&weight, narrow, |w| match dx {
                        Some(dx) => {
                            g.input_gradient(compute, dx, true, w, dy);
                            Vec::new()
                        }
                        None => g.new_input_gradient(compute, w, dy),
                    })
                })?
            })
        }));
        for ((middle, up), wanted) in pairs.iter().zip(wanted[1..].chunks(2)) {
            let r = up.dim(1)?;
            let to_middle = wanted[0].then(|| {
                let (dy, up) = (dy.clone(), up.clone());
                Gradient::values(move |dm, add| {
                    with_both(&dy, &up, |dy, up| {
                        for number in 0..n {
                            let dm = &mut dm[number * r * plane..];
                            let up = View::rows(up, o, r, r).t();
                            multiply_in(
                                compute,
                                dm,
                                plane,
                                add,
                                up,
                                View::rows(&dy[number * o * plane..], o, plane, plane),
                            );
                        }
                    })
                })
            });
            let to_up = wanted[1].then(|| {
                let (dy, middle) = (dy.clone(), middle.clone());
                Gradient::values(move |du, add| {
                    with_both(&dy, &middle, |dy, middle| {
                        for number in 0..n {
                            let m = View::rows(&middle[number * r * plane..], r, plane, plane);
                            multiply_in(
                                compute,
                                du,
                                r,
                                add || number > 0,
                                View::rows(&dy[number * o * plane..], o, plane, plane),
                                m.t(),
                            );
                        }
                    })
                })
            });
            all.extend([to_middle, to_up]);
        }
        if residual {
            all.push(Some(dy.clone().into()));
        }
        if shift {
            all.push(Some(plane_sums(&dy)?.into()));
        }
        Ok(all)
    };
    let args: Vec<&Tensor> = std::iter::once(x).chain(added.tensors()).collect();
    node(
        "conv2d",
        &args,
        Value::cpu(y, (n, o, g.oh, g.ow)),
        Box::new(gradients),
    )
}

/// Adds the product of a pair, rows by columns as given, to what is there, or returns it.
fn added_or_new(
    compute: Compute,
    sum: Option<&mut [f32]>,
    (rows, columns): (usize, usize),
    pair: (View<'_>, View<'_>),
    chains: &mut [Chain<'_, '_>],
) -> Vec<f32> {
    match sum {
        Some(sum) => {
            let onto = Onto::Sum(&mut sum[..rows * columns]);
            multiply_onto(compute, onto, pair, &[], chains);
            Vec::new()
        }
        None => written(rows * columns, |new| {
            let onto = Onto::New(new, Start::default());
            multiply_onto(compute, onto, pair, &[], chains)
        }),
    }
}

/// Whether neither weight nor bias is tracked.
pub(crate) fn frozen(weight: &Tensor, bias: Option<&Tensor>) -> bool {
    !weight.track_op() && !bias.is_some_and(Tensor::track_op)
}

/// Whether the gradient of each argument is asked for: x, then pair by pair.
fn wanted(x: &Tensor, added: &Added<'_>) -> Vec<bool> {
    let pairs = added.pairs().flat_map(|(middle, up)| [middle, up]);
    std::iter::once(x)
        .chain(pairs)
        .map(|t| t.track_op())
        .collect()
}

/// Pairs without their place in the graph.
pub(crate) fn detached(pairs: &[(Tensor, Tensor)]) -> Vec<(Tensor, Tensor)> {
    pairs
        .iter()
        .map(|(middle, up)| (middle.detach(), up.detach()))
        .collect()
}

fn check_pairs(
    added: &Added<'_>,
    out: &[usize],
    o: usize,
    fits: impl Fn(&Tensor, usize) -> bool,
) -> Result<()> {
    for (middle, up) in added.low_rank {
        match up.dims() {
            [rows, r] if *rows == o && fits(middle, *r) => {}
            up => candle_core::bail!(
                "low-rank branch {:?}, {up:?} does not fit an output of {out:?}",
                middle.dims()
            ),
        }
    }
    match added.residual {
        Some(residual) if residual.dims() != out => candle_core::bail!(
            "residual {:?} does not fit an output of {out:?}",
            residual.dims()
        ),
        _ => Ok(()),
    }
}

/// Runs `body` on the values of low-rank pairs and their ranks.
fn with_pairs<R>(
    pairs: &[(Tensor, Tensor)],
    body: impl FnOnce(&[(&[f32], &[f32], usize)]) -> R,
) -> Result<R> {
    /// The same, with pairs whose values are there already.
    fn behind<R>(
        there: &[(&[f32], &[f32], usize)],
        pairs: &[(Tensor, Tensor)],
        body: impl FnOnce(&[(&[f32], &[f32], usize)]) -> R,
    ) -> Result<R> {
        let Some(((middle, up), pairs)) = pairs.split_first() else {
            return Ok(body(there));
        };
        let r = up.dim(1)?;
        with_both(middle, up, |middle, up| {
            let mut there = there.to_vec();
            there.push((middle, up, r));
            behind(&there, pairs, body)
        })?
    }
    behind(&[], pairs, body)
}

/// What is added to all pixels of each of `planes` channels, sample by sample.
fn constants(
    planes: usize,
    bias: Option<&Tensor>,
    shift: Option<&Tensor>,
) -> Result<Option<Vec<f32>>> {
    let mut sums = None;
    for values in [bias, shift].into_iter().flatten() {
        let sums = sums.get_or_insert_with(|| vec![0f32; planes]);
        with(values, |values| {
            // A bias repeats for every sample.
            let values = values.iter().cycle();
            sums.iter_mut().zip(values).for_each(|(sum, v)| *sum += v);
        })?;
    }
    Ok(sums)
}

/// Values widened per task.
const WIDEN: usize = 1 << 16;

/// Runs `body` on the values of a weight: of f32 or, with `narrow`, bf16 as they are stored,
/// else widened to f32 in memory that lives for the call.
pub(crate) fn with_weight<R>(
    weight: &Tensor,
    narrow: bool,
    body: impl FnOnce(Values<'_>) -> R,
) -> Result<R> {
    let weight = weight.contiguous()?;
    let (storage, layout) = weight.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("expected a contiguous weight");
    };
    let mut wide = Vec::new();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(v)) => return Ok(body(v[start..end].into())),
        Storage::Cpu(CpuStorage::BF16(v)) if narrow => return Ok(body(v[start..end].into())),
        Storage::Cpu(CpuStorage::F16(v)) => {
            wide.resize(end - start, 0f32);
            wide.par_chunks_mut(WIDEN)
                .zip(v[start..end].par_chunks(WIDEN))
                .for_each(|(out, v)| v.convert_to_f32_slice(out));
        }
        Storage::Cpu(CpuStorage::BF16(v)) => {
            wide.resize(end - start, 0f32);
            wide.par_chunks_mut(WIDEN)
                .zip(v[start..end].par_chunks(WIDEN))
                .for_each(|(out, v)| {
                    for (out, v) in out.iter_mut().zip(v) {
                        *out = f32::from_bits(u32::from(v.to_bits()) << 16);
                    }
                });
        }
        _ => candle_core::bail!("expected a weight of f32, f16 or bf16 on the CPU"),
    }
    Ok(body(wide.as_slice().into()))
}
