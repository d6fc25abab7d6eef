//! Products of operands rounded to bf16. Where the operands are exact in bf16 the result is
//! that of f32 but for the order of the sums; where they are not, rounding them is the only
//! error.

#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::{compare, flat, noise, rounded, var};
use lora_kernels::{Added, Compute, Conv2dParams, attention, conv2d_added, linear_added, plain};

fn exact(dims: &[usize], seed: u32) -> Var {
    Var::from_tensor(&rounded(dims, seed)).unwrap()
}

fn kept(weight: &Tensor) -> [Tensor; 2] {
    [DType::F32, DType::BF16].map(|dtype| weight.to_dtype(dtype).unwrap())
}

#[test]
fn linear_of_exact_operands() {
    for (batch, rows, i, o) in [
        (1, 1, 1, 1),
        (2, 7, 5, 9),
        (2, 33, 40, 48),
        (1, 154, 65, 31),
        (3, 100, 130, 200),
        (1, 64, 1100, 70),
        (1, 9, 64, 400),
    ] {
        let x = exact(&[batch, rows, i], 1);
        let (m, up) = (exact(&[batch, rows, 3], 2), exact(&[o, 3], 3));
        let res = var(&[batch, rows, o], 4);
        let bias = noise(&[o], 7);
        let wide = rounded(&[o, i], 8);
        for weight in kept(&wide) {
            let low_rank = [(m.as_tensor().clone(), up.as_tensor().clone())];
            let added = Added {
                low_rank: &low_rank,
                residual: Some(&res),
                ..Added::default()
            };
            compare(
                &format!("linear {batch}x{rows}x{i}x{o}"),
                &[x.clone(), m.clone(), up.clone(), res.clone()],
                &|| linear_added(&x, &weight, Some(&bias), Compute::Bf16, &added),
                &|| {
                    let y = plain::linear(&x, &wide, Some(&bias))?;
                    (y + plain::linear(&m, &up, None)?)? + res.as_tensor()
                },
            );
            let turned = exact(&[batch, i, rows], 9);
            compare(
                "an input that is not contiguous",
                std::slice::from_ref(&turned),
                &|| {
                    let x = turned.transpose(1, 2)?;
                    linear_added(&x, &weight, None, Compute::Bf16, &Added::default())
                },
                &|| plain::linear(&turned.transpose(1, 2)?.contiguous()?, &wide, None),
            );
        }
    }
}

#[test]
fn convolution_of_exact_operands() {
    // From the eighth on without a matrix of patches where there are 512 pixels or more:
    // rows of whole vectors and others, output channels of whole tiles and others. The
    // one of 33 channels is done by Winograd's algorithm in f32.
    for (n, i, o, k, stride, groups, h, w) in [
        (2, 5, 7, 3, 1, 1, 9, 6),
        (1, 4, 3, 3, 2, 1, 8, 6),
        (2, 6, 10, 1, 1, 1, 5, 5),
        (1, 64, 96, 1, 1, 1, 16, 15),
        (1, 6, 4, 3, 1, 2, 7, 7),
        (2, 70, 65, 3, 1, 1, 8, 8),
        (1, 33, 40, 3, 1, 1, 35, 29),
        (2, 32, 31, 3, 1, 1, 32, 32),
        (2, 96, 18, 3, 1, 1, 11, 37),
        (2, 64, 96, 3, 1, 1, 5, 7),
        (1, 224, 32, 3, 1, 1, 5, 16),
        (1, 160, 4, 3, 1, 1, 23, 25),
    ] {
        let p = Conv2dParams {
            stride,
            padding: k / 2,
            groups,
            ..Conv2dParams::default()
        };
        let x = exact(&[n, i, h, w], 1);
        let bias = noise(&[o], 7);
        let wide = rounded(&[o, i / groups, k, k], 8);
        for weight in kept(&wide) {
            compare(
                &format!("conv {n} {i} {o} {k} {stride}"),
                std::slice::from_ref(&x),
                &|| {
                    conv2d_added(
                        &x,
                        &weight,
                        Some(&bias),
                        p,
                        Compute::Bf16,
                        &Added::default(),
                    )
                },
                &|| plain::conv2d(&x, &wide, Some(&bias), p),
            );
        }
    }
}

/// Root of the mean square of the difference, relative to that of `b`.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (flat(a), flat(&b.to_dtype(DType::F32).unwrap()));
    let square = |v: f32| f64::from(v).powi(2);
    let error: f64 = a.iter().zip(&b).map(|(a, b)| square(a - b)).sum();
    (error / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

/// Relative error of rounding both factors of each product: each is off by up to 2^-9 of
/// itself, evenly distributed, so that the root mean square of a product's error is below
/// 2^-9. It does not grow with the number of products.
const ROUNDING: f64 = 1.0 / 512.0;

#[test]
fn other_operands_are_rounded_once() {
    let (rows, i, o) = (130, 700, 210);
    let x = var(&[rows, i], 1);
    let weight = noise(&[o, i], 2);
    let y = linear_added(&x, &weight, None, Compute::Bf16, &Added::default()).unwrap();
    let dy = noise(&[rows, o], 3);
    let grads = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
    let double = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let (x64, w64, dy64) = (double(&x), double(&weight), double(&dy));
    let forward = distance(&y, &x64.matmul(&w64.t().unwrap()).unwrap());
    let backward = distance(grads.get(&x).unwrap(), &dy64.matmul(&w64).unwrap());
    for error in [forward, backward] {
        assert!(error < 1.5 * ROUNDING, "{error}");
    }
}

#[test]
fn transformed_operands_are_rounded_once() {
    // By Winograd's algorithm: images whose tiles fill panels and rows of vectors, and others; more
    // channels than one task has; transformed input made in several parts.
    for (n, i, o, h, w) in [
        (1, 32, 32, 16, 16),
        (2, 32, 64, 8, 8),
        (2, 64, 96, 32, 32),
        (2, 96, 64, 11, 37),
        (3, 64, 100, 24, 9),
        (5, 32, 32, 7, 8),
        (1, 32, 224, 40, 48),
        (1, 1024, 32, 40, 70),
    ] {
        let p = Conv2dParams {
            padding: 1,
            ..Conv2dParams::default()
        };
        let x = var(&[n, i, h, w], 1);
        let residual = noise(&[n, o, h, w], 2);
        let dy = noise(&[n, o, h, w], 3);
        let wide = noise(&[o, i, 3, 3], 4);
        let run = |y: Result<Tensor>| {
            let y = y.unwrap();
            let grads = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
            [y - &residual, Ok(grads.get(&x).unwrap().clone())].map(Result::unwrap)
        };
        let plain = run(plain::conv2d(&x, &wide, None, p).and_then(|y| y + &residual));
        for weight in [wide.clone(), wide.to_dtype(DType::BF16).unwrap()] {
            let added = Added {
                residual: Some(&residual),
                ..Added::default()
            };
            let ours = run(conv2d_added(&x, &weight, None, p, Compute::Bf16, &added));
            for (what, (ours, plain)) in ["y", "dx"].iter().zip(ours.iter().zip(&plain)) {
                let error = distance(ours, plain);
                // Of rounded operands it is 1.2; with tiles of 2x2 outputs 1.7 times that, with 64
                // tiles of 4x4 or more below 0.9, and 1.2 with weights that are bf16 themselves.
                let most = match n * h.div_ceil(4) * w.div_ceil(4) {
                    ..64 => 2.4,
                    _ => 1.3,
                };
                assert!(
                    error < most * ROUNDING,
                    "{n} {i} {o} {h} {w}, {what}: {}",
                    error / ROUNDING
                );
            }
        }
    }
}

#[test]
fn sums_of_whole_numbers_do_not_overflow() {
    // All values of a size, so that transformed ones are as large as they can be, and all products
    // of one sign; channels of more than one part, and weights of which one is much larger.
    let (c, o, side) = (1056, 32, 32);
    let p = Conv2dParams {
        padding: 1,
        ..Conv2dParams::default()
    };
    let x = Tensor::full(3f32, (1, c, side, side), &Device::Cpu).unwrap();
    let even = Tensor::full(-2f32, (o, c, 3, 3), &Device::Cpu).unwrap();
    let uneven = (Tensor::ones((o, c, 3, 3), DType::F32, &Device::Cpu).unwrap() * 1e-3)
        .unwrap()
        .slice_assign(
            &[0..o, 7..8, 0..3, 0..3],
            &Tensor::full(5f32, (o, 1, 3, 3), &Device::Cpu).unwrap(),
        )
        .unwrap();
    for weight in [even, uneven] {
        let none = Added::default();
        let ours = conv2d_added(&x, &weight, None, p, Compute::Bf16, &none).unwrap();
        let plain = plain::conv2d(&x, &weight, None, p).unwrap();
        // Weights that are all alike are all off by the same, which does not even out; a sum that
        // overflows is off by more than itself.
        let error = distance(&ours, &plain);
        assert!(error < 8.0 * ROUNDING, "{}", error / ROUNDING);
    }
}

#[test]
fn what_is_no_number_stays_so_in_whole_numbers() {
    let p = Conv2dParams {
        padding: 1,
        ..Conv2dParams::default()
    };
    let weight = noise(&[32, 32, 3, 3], 1);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values = flat(&noise(&[1, 32, 32, 32], 2));
        values[5 * 32 * 32 + 17 * 32 + 9] = bad;
        let x = Tensor::from_vec(values, (1, 32, 32, 32), &Device::Cpu).unwrap();
        let none = Added::default();
        let y = conv2d_added(&x, &weight, None, p, Compute::Bf16, &none).unwrap();
        let y = flat(&y);
        for (row, column) in [(16, 8), (17, 9), (18, 10)] {
            assert!(!y[row * 32 + column].is_finite(), "{bad} {row} {column}");
        }
        // Tiles that do not read it are what they would be.
        assert!(y[0].is_finite() && y[31 * 32 + 31].is_finite());
        let mut weights = flat(&weight);
        weights[3 * 32 * 9 + 40] = bad;
        let weight = Tensor::from_vec(weights, weight.shape(), &Device::Cpu).unwrap();
        let x = noise(&[1, 32, 32, 32], 2);
        let y = flat(&conv2d_added(&x, &weight, None, p, Compute::Bf16, &none).unwrap());
        let planes: Vec<&[f32]> = y.chunks(32 * 32).collect();
        assert!(planes[3].iter().all(|y| !y.is_finite()), "{bad}");
        assert!(planes[2].iter().all(|y| y.is_finite()), "{bad}");
    }
}

#[test]
fn attention_is_off_by_rounding_only() {
    for (n, heads, lq, lk, width, causal) in [
        (2, 2, 17, 9, 5, false),
        (1, 8, 300, 77, 40, false),
        (1, 2, 150, 150, 16, true),
        (2, 1, 257, 257, 80, false),
    ] {
        let c = heads * width;
        let (q, k, v) = (
            var(&[n, lq, c], 1),
            var(&[n, lk, c], 2),
            var(&[n, lk, c], 3),
        );
        let dy = noise(&[n, lq, c], 4);
        let run = |y: Result<Tensor>| {
            let y = y.unwrap();
            let grads = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
            let mut all = vec![y];
            all.extend([&q, &k, &v].map(|t| grads.get(t).unwrap().clone()));
            all
        };
        let narrow = run(attention(&q, &k, &v, heads, causal, Compute::Bf16));
        let wide = run(plain::attention(&q, &k, &v, heads, causal));
        for (i, (a, b)) in narrow.iter().zip(&wide).enumerate() {
            let error = distance(a, b);
            assert!(
                error < 6.0 * ROUNDING,
                "{n} {lq} {lk} {width}, {i}: {error}"
            );
        }
    }
}

#[test]
fn threads_do_not_change_results() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let mut all = Vec::new();
            for (rows, i, o) in [(500, 320, 130), (90, 1100, 600)] {
                let x = var(&[rows, i], 1);
                let weight = noise(&[o, i], 2).to_dtype(DType::BF16).unwrap();
                let added = Added::default();
                let y = linear_added(&x, &weight, None, Compute::Bf16, &added).unwrap();
                let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                all.extend(flat(&y));
                all.extend(flat(grads.get(&x).unwrap()));
            }
            let x = var(&[2, 96, 40, 42], 5);
            let weight = noise(&[200, 96, 3, 3], 6);
            let p = Conv2dParams {
                padding: 1,
                ..Conv2dParams::default()
            };
            let added = Added::default();
            let y = conv2d_added(&x, &weight, None, p, Compute::Bf16, &added).unwrap();
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            all.extend(flat(&y));
            all.extend(flat(grads.get(&x).unwrap()));
            let q = var(&[1, 200, 160], 3);
            let y = attention(&q, &q, &q, 4, false, Compute::Bf16).unwrap();
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            all.extend(flat(&y));
            all.extend(flat(grads.get(&q).unwrap()));
            all
        })
    };
    assert!(run(1) == run(2));
}

#[test]
fn infinities_and_empty_operands() {
    let weight = Tensor::ones((3, 4), DType::BF16, &Device::Cpu).unwrap();
    let run = |x: &Tensor| linear_added(x, &weight, None, Compute::Bf16, &Added::default());
    let x = Tensor::new(&[[f32::INFINITY, 1.0, 2.0, 3.0]], &Device::Cpu).unwrap();
    assert!(flat(&run(&x).unwrap()).iter().all(|y| *y == f32::INFINITY));
    let x = Tensor::new(&[[f32::NAN, 1.0, 2.0, 3.0]], &Device::Cpu).unwrap();
    assert!(flat(&run(&x).unwrap()).iter().all(|y| y.is_nan()));
    let none = Tensor::zeros((0, 4), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(run(&none).unwrap().dims(), [0, 3]);
}

#[test]
fn other_path_generic() {
    common::again_with("generic");
}

#[test]
fn factors_are_a_middle_computed_apart() -> Result<()> {
    // Rows divided, and outputs.
    for (rows, i, o, r) in [(150, 70, 90, 5), (40, 64, 200, 66)] {
        let (x, weight) = (var(&[rows, i], 1), noise(&[o, i], 2));
        let (down, up) = (var(&[r, i], 3), var(&[o, r], 4));
        let weigh = noise(&[rows, o], 5);
        for compute in [Compute::F32, Compute::Bf16] {
            let run = |apart: bool| {
                let factor = |t: &Var| t.as_tensor().clone();
                let middle = linear_added(&x, &down, None, compute, &Added::default())?;
                let pair = [(if apart { middle } else { factor(&down) }, factor(&up))];
                let none = Vec::new();
                let [low_rank, factors] = match apart {
                    true => [pair.as_slice(), &none],
                    false => [&none, pair.as_slice()],
                };
                let added = Added {
                    low_rank,
                    factors,
                    ..Added::default()
                };
                let y = linear_added(&x, &weight, None, compute, &added)?;
                let store = (&y * &weigh)?.sum_all()?.backward()?;
                let of = |var: &Var| store.get(var).map(flat).unwrap();
                Ok::<_, candle_core::Error>([flat(&y), of(&x), of(&down), of(&up)])
            };
            let ([y, dx, dd, du], [want, dx2, dd2, du2]) = (run(false)?, run(true)?);
            assert_eq!(y, want, "{compute:?} {rows} {o}");
            for (what, got, want) in [("x", dx, dx2), ("down", dd, dd2), ("up", du, du2)] {
                let size = want.iter().fold(0f32, |m, v| m.max(v.abs()));
                for (got, want) in got.iter().zip(&want) {
                    assert!((got - want).abs() <= 1e-6 * size, "{what}: {got} {want}");
                }
            }
        }
    }
    Ok(())
}
