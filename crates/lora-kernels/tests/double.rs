//! Every operation in f32, values and gradients, against the same in double precision.

#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{D, DType, Result, Tensor, Var};
use common::noise;
use lora_kernels::{
    Added, Compute, Conv2dParams, attention, conv2d, geglu, group_norm, layer_norm, linear,
    linear_added, plain, silu, upsample_nearest2x,
};

/// A function of some tensors, in whatever dtype they have.
type Function<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Largest error of values and gradients relative to the largest value, for results that
/// are sums of `terms` products.
fn check(what: &str, dims: &[&[usize]], terms: usize, fast: Function<'_>, exact: Function<'_>) {
    let run = |dtype: DType, f: Function<'_>| -> Vec<Vec<f64>> {
        let vars: Vec<Var> = (dims.iter().zip(1..))
            .map(|(d, seed)| Var::from_tensor(&noise(d, seed).to_dtype(dtype).unwrap()).unwrap())
            .collect();
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let y = f(&tensors).unwrap();
        let dy = noise(y.dims(), 99).to_dtype(dtype).unwrap();
        let grads = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap();
        let mut all = vec![y];
        all.extend(vars.iter().map(|v| grads.get(v).unwrap().clone()));
        let flat = |t: &Tensor| t.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
        all.iter().map(|t| flat(t).unwrap()).collect()
    };
    // A few units in the last place for each root of the number of terms.
    let tolerance = 6.0 * f64::from(f32::EPSILON) * (terms as f64).sqrt().max(1.0);
    for (i, (a, b)) in run(DType::F32, fast)
        .iter()
        .zip(run(DType::F64, exact))
        .enumerate()
    {
        assert_eq!(a.len(), b.len(), "{what}, {i}");
        let scale = b.iter().fold(0.1f64, |m, v| m.max(v.abs()));
        for (a, b) in a.iter().zip(&b) {
            assert!(
                (a - b).abs() <= tolerance * scale,
                "{what}, {i}: {a} {b}, tolerance {tolerance} of {scale}"
            );
        }
    }
}

/// [`noise`] in the dtype of `like`.
fn constant(dims: &[usize], seed: u32, like: &Tensor) -> Result<Tensor> {
    noise(dims, seed).to_dtype(like.dtype())
}

#[test]
fn linear_layers() {
    for (m, k, n) in [(1, 1, 1), (7, 13, 5), (65, 320, 97), (33, 1300, 64)] {
        let frozen = |t: &[Tensor]| constant(&[n, k], 50, &t[0]);
        check(
            &format!("linear {m}x{k}x{n}"),
            &[&[m, k]],
            k.max(n),
            &|t| linear_added(&t[0], &frozen(t)?, None, Compute::F32, &Added::default()),
            &|t| plain::linear(&t[0], &frozen(t)?, None),
        );
        check(
            &format!("trained linear {m}x{k}x{n}"),
            &[&[2, m, k], &[n, k], &[n]],
            k.max(n).max(2 * m),
            &|t| linear(&t[0], &t[1], Some(&t[2])),
            &|t| plain::linear(&t[0], &t[1], Some(&t[2])),
        );
    }
}

#[test]
fn convolutions() {
    // The last is done by Winograd's algorithm, whose error is a little larger.
    for (n, i, o, k, stride, side, terms) in [
        (2, 5, 7, 3, 1, 9, 63),
        (1, 4, 3, 3, 2, 8, 36),
        (2, 19, 10, 1, 1, 5, 19),
        (2, 33, 40, 3, 1, 33, 4 * 360),
    ] {
        let p = Conv2dParams {
            stride,
            padding: k / 2,
            ..Conv2dParams::default()
        };
        let frozen = |t: &[Tensor]| constant(&[o, i, k, k], 50, &t[0]);
        check(
            &format!("conv {n} {i} {o} {k} {stride}"),
            &[&[n, i, side, side]],
            terms,
            &|t| conv2d(&t[0], &frozen(t)?, None, p),
            &|t| plain::conv2d(&t[0], &frozen(t)?, None, p),
        );
    }
}

/// Scale and shift of a norm over `c` channels.
fn scale_and_shift(c: usize, like: &Tensor) -> Result<(Tensor, Tensor)> {
    Ok((constant(&[c], 50, like)?, constant(&[c], 51, like)?))
}

/// Attention by its formula.
fn scores(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let (n, l, c) = q.dims3()?;
    let width = c / heads;
    let split = |t: &Tensor| {
        let l = t.dim(1)?;
        t.reshape((n, l, heads, width))?
            .transpose(1, 2)?
            .contiguous()
    };
    let (q, k, v) = (split(q)?, split(k)?, split(v)?);
    let scores = (q.matmul(&k.t()?.contiguous()?)? * (width as f64).powf(-0.5))?;
    let e = scores
        .broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?
        .exp()?;
    let weights = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
    let y = weights.matmul(&v)?;
    y.transpose(1, 2)?.contiguous()?.reshape((n, l, c))
}

#[test]
fn attention_of_several_heads() {
    for (n, heads, lq, lk, width) in [(2, 2, 17, 9, 5), (1, 8, 140, 77, 40), (1, 1, 300, 300, 16)] {
        let c = heads * width;
        check(
            &format!("attention {n} {heads} {lq} {lk} {width}"),
            &[&[n, lq, c], &[n, lk, c], &[n, lk, c]],
            2 * lk.max(lq),
            &|t| attention(&t[0], &t[1], &t[2], heads, false, Compute::F32),
            &|t| scores(&t[0], &t[1], &t[2], heads),
        );
    }
}

/// Zero mean and unit variance along the last axis.
fn normal(x: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(variance + eps)?.sqrt()?)
}

#[test]
fn norms() {
    for (n, c, groups, side) in [(1, 8, 4, 5), (2, 64, 32, 9), (1, 30, 3, 17)] {
        for with_silu in [false, true] {
            let weights = |t: &[Tensor]| scale_and_shift(c, &t[0]);
            check(
                &format!("group norm {n} {c} {side} {with_silu}"),
                &[&[n, c, side, side]],
                16,
                &|t| {
                    let (w, b) = weights(t)?;
                    group_norm(&t[0], &w, &b, groups, 1e-5, with_silu)
                },
                &|t| {
                    let (w, b) = weights(t)?;
                    let rows = t[0].reshape((n, groups, ()))?;
                    let y = normal(&rows, 1e-5)?.reshape(t[0].shape())?;
                    let y = y.broadcast_mul(&w.reshape((1, c, 1, 1))?)?;
                    let y = y.broadcast_add(&b.reshape((1, c, 1, 1))?)?;
                    if with_silu { y.silu() } else { Ok(y) }
                },
            );
        }
        let weights = |t: &[Tensor]| scale_and_shift(c, &t[0]);
        check(
            &format!("layer norm {n} {c}"),
            &[&[n, side, c]],
            16,
            &|t| {
                let (w, b) = weights(t)?;
                layer_norm(&t[0], &w, &b, 1e-5)
            },
            &|t| {
                let (w, b) = weights(t)?;
                normal(&t[0], 1e-5)?.broadcast_mul(&w)?.broadcast_add(&b)
            },
        );
    }
}

#[test]
fn activations_and_upsampling() {
    for dims in [[2, 3, 7, 10], [1, 1, 1, 2], [2, 5, 33, 66]] {
        check("geglu", &[&dims], 4, &|t| geglu(&t[0]), &|t| {
            plain::geglu(&t[0])
        });
        check("silu", &[&dims], 4, &|t| silu(&t[0]), &|t| t[0].silu());
        check(
            "upsampling",
            &[&dims],
            4,
            &|t| upsample_nearest2x(&t[0]),
            &|t| plain::upsample_nearest2x(&t[0]),
        );
    }
}

#[test]
fn other_path_generic() {
    common::again_with("generic");
}

#[test]
fn other_path_composed() {
    common::again_with("composed");
}
