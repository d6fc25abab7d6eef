//! Every operation and its gradients against the path composed of candle's own.

#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use lora_kernels::{
    Compute, Conv2dParams, Product, attention, conv2d, geglu, group_norm, layer_norm, linear,
    mix_groups, plain, row_products, scale_channels, silu, transpose, upsample_nearest2x,
    with_computed_weight,
};

/// A repeatable tensor with values in -1..1.
fn filled(seed: u64, dims: &[usize]) -> Tensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values: Vec<f32> = (0..dims.iter().product())
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
        })
        .collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn assert_close(what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let error = (got - want)
        .unwrap()
        .abs()
        .unwrap()
        .flatten_all()
        .unwrap()
        .max(0)
        .unwrap();
    let size = want
        .abs()
        .unwrap()
        .flatten_all()
        .unwrap()
        .max(0)
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    let error = error.to_scalar::<f32>().unwrap();
    // 3e-6 of the largest value: f32 sums of a few hundred terms in another order.
    assert!(
        error <= 3e-6 * size.max(1.0),
        "{what}: error {error:e} at size {size:e}"
    );
}

type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Compares outputs and the gradients of all inputs under a random linear loss.
fn compare(what: &str, shapes: &[&[usize]], fast: Op<'_>, reference: Op<'_>) {
    let run = |op: Op<'_>| {
        let vars: Vec<Var> = (1..)
            .zip(shapes)
            .map(|(seed, dims)| Var::from_tensor(&filled(seed, dims)).unwrap())
            .collect();
        let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let y = op(&inputs).unwrap();
        let weights = filled(99, y.dims());
        let grads = (&y * weights)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        let grads: Vec<Tensor> = vars.iter().map(|v| grads.get(v).unwrap().clone()).collect();
        (y, grads)
    };
    let ((y, dy), (want, dwant)) = (run(fast), run(reference));
    assert_close(what, &y, &want);
    for (i, (got, want)) in dy.iter().zip(&dwant).enumerate() {
        assert_close(&format!("{what}, gradient {i}"), got, want);
    }
}

#[test]
fn linear_agrees_with_candle() {
    for (m, i, o) in [
        (1, 1, 1),
        (7, 33, 5),
        (64, 40, 48),
        (3, 1, 17),
        (130, 77, 96),
    ] {
        let what = format!("linear {m} {i} {o}");
        compare(
            &what,
            &[&[m, i], &[o, i]],
            &|t| linear(&t[0], &t[1], None),
            &|t| plain::linear(&t[0], &t[1], None),
        );
        compare(
            &what,
            &[&[2, m, i], &[o, i], &[o]],
            &|t| linear(&t[0], &t[1], Some(&t[2])),
            &|t| plain::linear(&t[0], &t[1], Some(&t[2])),
        );
    }
}

#[test]
fn linear_accepts_transposed_views() {
    let x = filled(1, &[6, 5]).t().unwrap();
    let w = filled(2, &[6, 9]).t().unwrap();
    assert_close(
        "views",
        &linear(&x, &w, None).unwrap(),
        &plain::linear(&x, &w, None).unwrap(),
    );
}

#[test]
fn conv2d_agrees_with_candle() {
    let cases = [
        // n, c, h, w, o, k, stride, padding, dilation, groups
        (1, 3, 8, 8, 4, 3, 1, 1, 1, 1),
        (2, 5, 7, 9, 6, 3, 2, 1, 1, 1),
        (2, 4, 6, 5, 8, 1, 1, 0, 1, 1),
        (1, 4, 6, 5, 8, 1, 2, 0, 1, 1),
        (1, 6, 9, 9, 4, 3, 1, 2, 2, 2),
        (2, 2, 5, 5, 3, 3, 1, 0, 1, 1),
        (1, 2, 1, 1, 3, 3, 1, 1, 1, 1),
        (1, 3, 4, 4, 2, 1, 1, 1, 1, 1),
    ];
    for (n, c, h, w, o, k, stride, padding, dilation, groups) in cases {
        let p = Conv2dParams {
            stride,
            padding,
            dilation,
            groups,
        };
        let what = format!("conv2d {n}x{c}x{h}x{w} -> {o}, k {k}, {p:?}");
        let shapes: [&[usize]; 3] = [&[n, c, h, w], &[o, c / groups, k, k], &[o]];
        compare(
            &what,
            &shapes,
            &|t| conv2d(&t[0], &t[1], Some(&t[2]), p),
            &|t| reference(&t[0], &t[1], &t[2], p),
        );
    }
}

/// candle's own gradient is not defined for all of these, so the reference sums
/// shifted products.
fn reference(x: &Tensor, w: &Tensor, bias: &Tensor, p: Conv2dParams) -> Result<Tensor> {
    let (_, c, h, wd) = x.dims4()?;
    let (o, cg, kh, kw) = w.dims4()?;
    let padded = x
        .pad_with_zeros(2, p.padding, p.padding)?
        .pad_with_zeros(3, p.padding, p.padding)?;
    let oh = (h + 2 * p.padding - p.dilation * (kh - 1) - 1) / p.stride + 1;
    let ow = (wd + 2 * p.padding - p.dilation * (kw - 1) - 1) / p.stride + 1;
    let pick = |start: usize, n: usize| {
        let index: Vec<u32> = (0..n).map(|i| (start + i * p.stride) as u32).collect();
        Tensor::new(index, &Device::Cpu)
    };
    let mut sum: Option<Tensor> = None;
    for ky in 0..kh {
        for kx in 0..kw {
            let shifted = padded
                .index_select(&pick(ky * p.dilation, oh)?, 2)?
                .index_select(&pick(kx * p.dilation, ow)?, 3)?;
            let tap = w.narrow(2, ky, 1)?.narrow(3, kx, 1)?.reshape((o, cg))?;
            let mut parts = vec![];
            for g in 0..p.groups {
                let input = shifted
                    .narrow(1, g * cg, cg)?
                    .contiguous()?
                    .permute((0, 2, 3, 1))?
                    .contiguous()?;
                let tap = tap
                    .narrow(0, g * (o / p.groups), o / p.groups)?
                    .contiguous()?;
                parts.push(plain::linear(&input, &tap, None)?.permute((0, 3, 1, 2))?);
            }
            let part = Tensor::cat(&parts, 1)?;
            sum = Some(match sum {
                Some(s) => (s + part)?,
                None => part,
            });
        }
    }
    let _ = c;
    sum.unwrap().broadcast_add(&bias.reshape((1, o, 1, 1))?)
}

#[test]
fn long_convolutions_are_cut_into_strips_without_a_seam() {
    // 256 channels, 3x3, 64x64: five strips; candle's forward is the reference.
    let (x, w) = (filled(1, &[1, 256, 64, 64]), filled(2, &[4, 256, 3, 3]));
    let p = Conv2dParams {
        padding: 1,
        ..Default::default()
    };
    let got = conv2d(&x, &w, None, p).unwrap();
    let want = plain::conv2d(&x, &w, None, p).unwrap();
    assert_close("strips", &got, &want);
}

#[test]
fn a_computed_weight_gives_its_factors_the_gradients_of_a_kept_one() {
    let p = Conv2dParams {
        stride: 2,
        padding: 1,
        ..Conv2dParams::default()
    };
    compare(
        "convolution",
        &[&[2, 4, 7, 9], &[6, 4, 3, 3]],
        &|t| with_computed_weight(Product::Conv2d(p), &t[0], &[&t[1]], |w| w[0].sqr()),
        &|t| {
            reference(
                &t[0],
                &t[1].sqr()?,
                &Tensor::zeros(6, DType::F32, &Device::Cpu)?,
                p,
            )
        },
    );
    compare(
        "linear layer",
        &[&[2, 5, 8], &[6, 3], &[3, 8]],
        &|t| {
            with_computed_weight(Product::Linear, &t[0], &[&t[1], &t[2]], |w| {
                w[0].matmul(&w[1])
            })
        },
        &|t| plain::linear(&t[0], &t[1].matmul(&t[2])?, None),
    );
}

#[test]
fn upsampling_agrees_and_adds_to_other_gradients() {
    compare(
        "upsample",
        &[&[2, 3, 4, 5]],
        &|t| upsample_nearest2x(&t[0]),
        &|t| plain::upsample_nearest2x(&t[0]),
    );
    // The input is used twice: its gradient is 4 (four copies) + 1.
    let x = Var::from_tensor(&filled(3, &[1, 1, 2, 2])).unwrap();
    let loss = (upsample_nearest2x(&x).unwrap().sum_all().unwrap() + x.sum_all().unwrap()).unwrap();
    let grads = loss.backward().unwrap();
    let grad = grads
        .get(&x)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1::<f32>()
        .unwrap();
    assert_eq!(grad, [5.0; 4]);
}

#[test]
fn transposition_agrees() {
    for (n, a, b) in [(1, 1, 1), (2, 3, 40), (3, 70, 17), (2, 320, 256)] {
        compare("transpose", &[&[n, a, b]], &|t| transpose(&t[0]), &|t| {
            t[0].transpose(1, 2)?.contiguous()
        });
    }
}

#[test]
fn frozen_weights_get_no_gradient() {
    let x = Var::from_tensor(&filled(1, &[2, 4, 6, 6])).unwrap();
    let w = filled(2, &[3, 4, 3, 3]);
    let y = conv2d(&x, &w, None, Conv2dParams::default()).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some());
    assert!(grads.get(&w).is_none());
}

#[test]
fn attention_agrees_with_candle() {
    for (n, heads, lq, lk, d, causal) in [
        (1, 1, 1, 1, 1, false),
        (2, 3, 7, 5, 4, false),
        (1, 2, 300, 77, 8, false),
        (2, 2, 77, 77, 5, true),
        (1, 1, 130, 260, 40, false),
    ] {
        let c = heads * d;
        let what =
            format!("attention {n} x {heads} heads, {lq} to {lk}, width {d}, causal {causal}");
        compare(
            &what,
            &[&[n, lq, c], &[n, lk, c], &[n, lk, c]],
            &|t| attention(&t[0], &t[1], &t[2], heads, causal, Compute::F32),
            &|t| plain::attention(&t[0], &t[1], &t[2], heads, causal),
        );
    }
}

/// Weights that are powers of e must neither overflow nor vanish, wherever the largest score is.
#[test]
fn attention_with_scores_of_any_size() {
    let (lq, lk, heads) = (70, 451, 2);
    let q = (filled(1, &[1, lq, 16]) * 8.0).unwrap();
    let v = filled(3, &[1, lk, 16]);
    for (what, size) in [
        ("growing", (|j| 0.01 * j as f32) as fn(usize) -> f32),
        ("leaping", |j| if j == 300 { 60.0 } else { 0.5 }),
        ("falling", |j| 90.0 / (1 + j) as f32),
        ("all large", |_| 40.0),
    ] {
        let sizes: Vec<f32> = (0..lk).map(size).collect();
        let sizes = Tensor::from_vec(sizes, (1, lk, 1), &Device::Cpu).unwrap();
        let k = filled(2, &[1, lk, 16]).broadcast_mul(&sizes).unwrap();
        let want = plain::attention(&q, &k, &v, heads, false).unwrap();
        for (compute, most) in [(Compute::F32, 1e-3), (Compute::Bf16, 2.0)] {
            let got = attention(&q, &k, &v, heads, false, compute).unwrap();
            let errors = (got - &want).unwrap().abs().unwrap().flatten_all().unwrap();
            // Weights are 0 or 1 here, and in bf16 rounding decides which of two large scores is
            // larger: there it is only seen that all are numbers.
            for error in errors.to_vec1::<f32>().unwrap() {
                assert!(error < most, "{what}, {compute:?}: {error}");
            }
        }
    }
}

#[test]
fn attention_with_frozen_keys_gives_the_queries_their_gradient() {
    let q = Var::from_tensor(&filled(1, &[1, 9, 8])).unwrap();
    let (k, v) = (filled(2, &[1, 6, 8]), filled(3, &[1, 6, 8]));
    let gradient = |y: Tensor| {
        y.sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap()
            .get(&q)
            .unwrap()
            .clone()
    };
    let got = gradient(attention(&q, &k, &v, 2, false, Compute::F32).unwrap());
    assert_close(
        "dq",
        &got,
        &gradient(plain::attention(&q, &k, &v, 2, false).unwrap()),
    );
}

/// Compares norms with frozen scales, and with trained ones.
fn compare_norms(what: &str, x: &[usize], channels: usize, fast: Op<'_>, reference: Op<'_>) {
    let (w, b) = (filled(7, &[channels]), filled(8, &[channels]));
    let with = |op: Op<'_>, t: &[Tensor]| op(&[t[0].clone(), w.clone(), b.clone()]);
    compare(what, &[x], &|t| with(fast, t), &|t| with(reference, t));
    let trained = format!("{what}, trained");
    compare(&trained, &[x, &[channels], &[channels]], fast, reference);
}

#[test]
fn norms_agree_with_candle() {
    for (rows, c) in [(1, 1), (3, 5), (70, 320), (2, 1000)] {
        compare_norms(
            &format!("layer norm {rows} x {c}"),
            &[2, rows, c],
            c,
            &|t| layer_norm(&t[0], &t[1], &t[2], 1e-5),
            &|t| plain::layer_norm(&t[0], &t[1], &t[2], 1e-5),
        );
    }
    for (n, c, groups, h, w) in [
        (1, 4, 2, 3, 3),
        (2, 32, 8, 5, 7),
        (1, 64, 32, 32, 33),
        (1, 6, 1, 1, 1),
    ] {
        for fused in [false, true] {
            compare_norms(
                &format!("group norm {n}x{c}x{h}x{w}, {groups} groups, silu {fused}"),
                &[n, c, h, w],
                c,
                &|t| group_norm(&t[0], &t[1], &t[2], groups, 1e-5, fused),
                &|t| plain::group_norm(&t[0], &t[1], &t[2], groups, 1e-5, fused),
            );
        }
    }
}

#[test]
fn kernels_keep_their_digits_beside_a_large_mean() {
    let x = (filled(1, &[1, 4, 16, 16]) + 1000.0).unwrap();
    let (w, b) = (filled(2, &[4]), filled(3, &[4]));
    let got = group_norm(&x, &w, &b, 2, 1e-5, false).unwrap();
    let wide = |t: &Tensor| t.to_dtype(candle_core::DType::F64).unwrap();
    let rows = wide(&x).reshape((2, 512)).unwrap();
    let centred = rows.broadcast_sub(&rows.mean_keepdim(1).unwrap()).unwrap();
    let deviation = (centred.sqr().unwrap().mean_keepdim(1).unwrap() + 1e-5)
        .unwrap()
        .sqrt()
        .unwrap();
    let normal = centred
        .broadcast_div(&deviation)
        .unwrap()
        .reshape((1, 4, 16, 16))
        .unwrap();
    let column = |t: &Tensor| wide(t).reshape((1, 4, 1, 1)).unwrap();
    let want = normal
        .broadcast_mul(&column(&w))
        .unwrap()
        .broadcast_add(&column(&b))
        .unwrap();
    assert_close(
        "large mean",
        &got,
        &want.to_dtype(candle_core::DType::F32).unwrap(),
    );
}

#[test]
fn pointwise_operations_agree_with_candle() {
    compare("silu", &[&[3, 7777]], &|t| silu(&(&t[0] * 9.0)?), &|t| {
        (&t[0] * 9.0)?.silu()
    });
    compare(
        "geglu",
        &[&[3, 50, 640]],
        &|t| geglu(&(&t[0] * 4.0)?),
        &|t| plain::geglu(&(&t[0] * 4.0)?),
    );
}

#[test]
fn row_products_agree_with_a_broadcast() {
    for (r, q, n) in [(1, 1, 1), (2, 3, 7), (4, 4, 5000), (8, 2, 33)] {
        compare(
            &format!("row products {r} {q} {n}"),
            &[&[r, n], &[q, n]],
            &|t| row_products(&t[0], &t[1]),
            &|t| {
                let products = t[0].unsqueeze(1)?.broadcast_mul(&t[1].unsqueeze(0)?)?;
                products.reshape((r * q, n))
            },
        );
    }
}

#[test]
fn an_elementwise_product_of_low_rank_products_is_one_of_low_rank() {
    let (u1, u2) = (filled(1, &[9, 2]), filled(2, &[9, 3]));
    let (v1, v2) = (filled(3, &[2, 11]), filled(4, &[3, 11]));
    let dense = (u1.matmul(&v1).unwrap() * u2.matmul(&v2).unwrap()).unwrap();
    let up = row_products(&u1.t().unwrap(), &u2.t().unwrap()).unwrap();
    let product = up.t().unwrap().matmul(&row_products(&v1, &v2).unwrap());
    assert_close("low rank", &product.unwrap(), &dense);
}

#[test]
fn mixed_groups_agree_with_products() {
    for (rows, a, c, b) in [(1, 1, 1, 1), (3, 2, 5, 7), (130, 8, 8, 40), (70, 3, 4, 25)] {
        compare(
            &format!("mixed groups {rows} {a} {c} {b}"),
            &[&[a, c], &[rows, c, b]],
            &|t| mix_groups(&t[0], &t[1]),
            &|t| t[0].broadcast_left(rows)?.contiguous()?.matmul(&t[1]),
        );
    }
}

#[test]
fn scaled_channels_agree_with_broadcasts() {
    let cases: [(&[usize], usize); 5] = [
        (&[1, 1], 1),
        (&[2, 70, 33], 2),
        (&[300, 17], 1),
        (&[2, 5, 3, 7], 1),
        (&[3, 4, 1, 1], 1),
    ];
    for (dims, axis) in cases {
        let c = dims[axis];
        let bias = filled(5, &[c]);
        let broadcast = |t: &Tensor| {
            t.reshape(if axis == 1 && dims.len() == 4 {
                vec![1, c, 1, 1]
            } else {
                vec![c]
            })
        };
        compare(
            &format!("scaled channels {dims:?}"),
            &[dims, &[c], dims],
            &|t| scale_channels(&t[0], axis, &t[1], Some(&bias), Some(&t[2])),
            &|t| {
                let scaled = t[0].broadcast_mul(&broadcast(&t[1])?)?;
                scaled.broadcast_add(&broadcast(&bias)?)? + &t[2]
            },
        );
        compare(
            &format!("scaled channels {dims:?}, alone"),
            &[dims, &[c]],
            &|t| scale_channels(&t[0], axis, &t[1], None, None),
            &|t| t[0].broadcast_mul(&broadcast(&t[1])?),
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
