//! Every operation and its gradients against the path composed of candle's own.

use candle_core::{Device, Result, Tensor, Var};
use lora_kernels::{Conv2dParams, conv2d, linear, plain, upsample_nearest2x};

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
fn frozen_weights_get_no_gradient() {
    let x = Var::from_tensor(&filled(1, &[2, 4, 6, 6])).unwrap();
    let w = filled(2, &[3, 4, 3, 3]);
    let y = conv2d(&x, &w, None, Conv2dParams::default()).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some());
    assert!(grads.get(&w).is_none());
}
