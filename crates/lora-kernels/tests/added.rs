//! Fused sums, 16-bit weights and checkpointing against plain candle.

#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Tensor};
use common::{compare, flat, noise, var};
use lora_kernels::{Added, Compute, Conv2dParams, conv2d_added, linear_added, plain};

fn halves(weight: &Tensor) -> Vec<(DType, Tensor)> {
    [DType::F32, DType::F16, DType::BF16]
        .into_iter()
        .map(|d| (d, weight.to_dtype(d).unwrap()))
        .collect()
}

#[test]
fn linear_sums() {
    // Rows are divided where they are more than outputs, else outputs.
    for (rows, i, o, r) in [
        (7, 5, 9, 2),
        (33, 40, 48, 3),
        (154, 65, 31, 8),
        (9, 70, 150, 66),
    ] {
        let (x, m) = (var(&[2, rows, i], 1), var(&[2, rows, r], 2));
        let (down, up3) = (var(&[r, i], 10), var(&[o, r], 11));
        let (up, res) = (var(&[o, r], 3), var(&[2, rows, o], 4));
        let (m2, up2) = (var(&[2, rows, 1], 5), var(&[o, 1], 6));
        let bias = noise(&[o], 7);
        for (dtype, weight) in halves(&noise(&[o, i], 8)) {
            let wide = weight.to_dtype(DType::F32).unwrap();
            let low_rank = [
                (m.as_tensor().clone(), up.as_tensor().clone()),
                (m2.as_tensor().clone(), up2.as_tensor().clone()),
            ];
            let added = Added {
                low_rank: &low_rank,
                factors: &[(down.as_tensor().clone(), up3.as_tensor().clone())],
                residual: Some(&res),
                shift: None,
            };
            let vars = [
                x.clone(),
                m.clone(),
                up.clone(),
                m2.clone(),
                up2.clone(),
                res.clone(),
                down.clone(),
                up3.clone(),
            ];
            compare(
                &format!("linear {dtype:?} {rows}x{i}x{o}"),
                &vars,
                &|| linear_added(&x, &weight, Some(&bias), Compute::F32, &added),
                &|| {
                    let y = plain::linear(&x, &wide, Some(&bias))?;
                    let y = (y + plain::linear(&m, &up, None)?)?;
                    let y = (y + plain::linear(&plain::linear(&x, &down, None)?, &up3, None)?)?;
                    (y + plain::linear(&m2, &up2, None)?)? + res.as_tensor()
                },
            );
            // Nothing added, no bias; an input that is not contiguous.
            let xt = var(&[2, i, rows], 9);
            compare(
                &format!("transposed {dtype:?}"),
                std::slice::from_ref(&xt),
                &|| {
                    linear_added(
                        &xt.transpose(1, 2)?,
                        &weight,
                        None,
                        Compute::F32,
                        &Added::default(),
                    )
                },
                &|| plain::linear(&xt.transpose(1, 2)?.contiguous()?, &wide, None),
            );
        }
    }
}

#[test]
fn convolution_sums() {
    for (n, i, o, k, stride, h, w) in [
        (2, 5, 7, 3, 1, 9, 6),
        (1, 4, 3, 3, 2, 8, 6),
        (3, 6, 10, 1, 1, 5, 5),
    ] {
        let p = Conv2dParams {
            stride,
            padding: k / 2,
            ..Conv2dParams::default()
        };
        let x = var(&[n, i, h, w], 1);
        let bias = noise(&[o], 7);
        for (dtype, weight) in halves(&noise(&[o, i, k, k], 8)) {
            let wide = weight.to_dtype(DType::F32).unwrap();
            let like = plain::conv2d(&x.as_detached_tensor(), &wide, None, p).unwrap();
            let (oh, ow) = (like.dim(2).unwrap(), like.dim(3).unwrap());
            let (m, up) = (var(&[n, 2, oh, ow], 2), var(&[o, 2], 3));
            let (res, shift) = (var(&[n, o, oh, ow], 4), var(&[n, o], 5));
            let low_rank = [(m.as_tensor().clone(), up.as_tensor().clone())];
            let added = Added {
                low_rank: &low_rank,
                residual: Some(&res),
                shift: Some(&shift),
                ..Added::default()
            };
            compare(
                &format!("conv {dtype:?} {n} {i} {o} {k} {stride}"),
                &[x.clone(), m.clone(), up.clone(), res.clone(), shift.clone()],
                &|| conv2d_added(&x, &weight, Some(&bias), p, Compute::F32, &added),
                &|| {
                    let y = plain::conv2d(&x, &wide, Some(&bias), p)?;
                    let y = y.broadcast_add(&shift.reshape((n, o, 1, 1))?)?;
                    let up = up.reshape((o, 2, 1, 1))?;
                    let y = (y + plain::conv2d(&m, &up, None, Conv2dParams::default())?)?;
                    y + res.as_tensor()
                },
            );
            compare(
                &format!("bare conv {dtype:?}"),
                std::slice::from_ref(&x),
                &|| conv2d_added(&x, &weight, None, p, Compute::F32, &Added::default()),
                &|| plain::conv2d(&x, &wide, None, p),
            );
        }
    }
}

#[test]
fn a_weight_of_16_bits_gives_the_result_of_the_same_weight_in_f32() {
    let x = noise(&[3, 50, 64], 1);
    for dtype in [DType::F16, DType::BF16] {
        let narrow = noise(&[96, 64], 2).to_dtype(dtype).unwrap();
        let wide = narrow.to_dtype(DType::F32).unwrap();
        let a = linear_added(&x, &narrow, None, Compute::F32, &Added::default()).unwrap();
        let b = linear_added(&x, &wide, None, Compute::F32, &Added::default()).unwrap();
        assert_eq!(flat(&a), flat(&b));
    }
}

#[test]
fn tracked_weights_still_get_their_gradient() {
    let (x, w, m, up) = (
        var(&[4, 6], 1),
        var(&[5, 6], 2),
        var(&[4, 2], 3),
        var(&[5, 2], 4),
    );
    let low_rank = [(m.as_tensor().clone(), up.as_tensor().clone())];
    let added = Added {
        low_rank: &low_rank,
        ..Added::default()
    };
    compare(
        "tracked",
        &[x.clone(), w.clone(), m.clone(), up.clone()],
        &|| linear_added(&x, &w, None, Compute::F32, &added),
        &|| plain::linear(&x, &w, None)? + plain::linear(&m, &up, None)?,
    );
}

#[test]
fn threads_do_not_change_results() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let x = var(&[1, 32, 40, 40], 1);
            let (m, up) = (var(&[1, 8, 40, 40], 2), var(&[64, 8], 3));
            let weight = noise(&[64, 32, 3, 3], 4).to_dtype(DType::BF16).unwrap();
            let low_rank = [(m.as_tensor().clone(), up.as_tensor().clone())];
            let added = Added {
                low_rank: &low_rank,
                ..Added::default()
            };
            let p = Conv2dParams {
                padding: 1,
                ..Conv2dParams::default()
            };
            let y = conv2d_added(&x, &weight, None, p, Compute::F32, &added).unwrap();
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let mut all = flat(&y);
            for v in [&x, &m, &up] {
                all.extend(flat(grads.get(v).unwrap()));
            }
            all
        })
    };
    assert!(run(1) == run(2));
}

#[test]
fn sizes_that_do_not_fit_are_errors() {
    let (x, w) = (noise(&[2, 3], 1), noise(&[4, 3], 2));
    let wrong = [(noise(&[2, 2], 3), noise(&[5, 2], 4))];
    let added = Added {
        low_rank: &wrong,
        ..Added::default()
    };
    assert!(linear_added(&x, &w, None, Compute::F32, &added).is_err());
    let residual = noise(&[2, 5], 5);
    let added = Added {
        residual: Some(&residual),
        ..Added::default()
    };
    assert!(linear_added(&x, &w, None, Compute::F32, &added).is_err());
    assert!(
        linear_added(
            &noise(&[2, 4], 6),
            &w,
            None,
            Compute::F32,
            &Added::default()
        )
        .is_err()
    );
    let shift = noise(&[2, 4], 7);
    let added = Added {
        shift: Some(&shift),
        ..Added::default()
    };
    assert!(linear_added(&x, &w, None, Compute::F32, &added).is_err());
}

#[test]
fn a_checkpoint_passes_gradients_of_shared_and_unused_tensors() {
    let (x, w) = (var(&[3], 1), var(&[3], 2));
    let tracked = (x.as_tensor() * 2.0).unwrap();
    let inner = w.as_tensor().clone();
    // The second input is not used inside; w is used inside and outside.
    let f = move |t: &[Tensor]| t[0].sqr()? * &inner;
    let y = lora_kernels::checkpoint(&[&tracked, &tracked], f).unwrap();
    let y = ((y + w.as_tensor()).unwrap() + &tracked).unwrap();
    let grads = y.backward().unwrap();
    let (xs, ws) = (flat(&x), flat(&w));
    let dx: Vec<f32> = xs.iter().zip(&ws).map(|(x, w)| 8.0 * x * w + 2.0).collect();
    let dw: Vec<f32> = xs.iter().map(|x| 4.0 * x * x + 1.0).collect();
    for (got, want) in [(&x, dx), (&w, dw)] {
        for (g, w) in flat(grads.get(got).unwrap()).iter().zip(&want) {
            assert!((g - w).abs() < 1e-5, "{g} {w}");
        }
    }
    // Nothing tracked: a plain call.
    let plain = lora_kernels::checkpoint(&[&noise(&[2], 3)], |t| t[0].sqr()).unwrap();
    assert!(!plain.track_op());
}

/// Sizes at which Winograd's algorithm runs: not multiples of its tiles, several images,
/// channels that fill no chunk.
#[test]
fn large_3x3_convolutions_agree_with_candle() {
    let p = Conv2dParams {
        padding: 1,
        ..Conv2dParams::default()
    };
    for (n, c, o, h, w) in [
        (1, 32, 33, 32, 32),
        (2, 35, 70, 33, 30),
        (1, 40, 48, 31, 47),
        (2, 64, 96, 33, 70),
        (3, 32, 64, 17, 15),
        (2, 96, 32, 8, 9),
    ] {
        let x = var(&[n, c, h, w], 1);
        let res = var(&[n, o, h, w], 2);
        let weight = (noise(&[o, c, 3, 3], 3) * 0.1).unwrap();
        let added = Added {
            residual: Some(&res),
            ..Added::default()
        };
        compare(
            &format!("3x3 {n} {c} {o} {h} {w}"),
            &[x.clone(), res.clone()],
            &|| conv2d_added(&x, &weight, None, p, Compute::F32, &added),
            &|| plain::conv2d(&x, &weight, None, p)? + res.as_tensor(),
        );
        compare(
            &format!("3x3 alone {n} {c} {o} {h} {w}"),
            std::slice::from_ref(&x),
            &|| conv2d_added(&x, &weight, None, p, Compute::F32, &Added::default()),
            &|| plain::conv2d(&x, &weight, None, p),
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
