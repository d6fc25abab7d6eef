//! The feed-forward part of a transformer in one pass is, to the bit, what its layers are one after
//! the other.

#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Tensor};
use common::{flat, noise};
use lora_kernels::{Added, Compute, FeedForward, feed_forward, geglu, layer_norm, linear_added};

#[test]
fn one_pass_is_its_layers() {
    // Rows that fill tasks and rows that do not, sums in one part and in two, too few rows for one
    // pass, and channels that no panel is made of.
    for (batch, rows, c) in [
        (2, 96, 16),
        (1, 197, 48),
        (1, 1300, 640),
        (1, 9, 32),
        (2, 50, 12),
    ] {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for compute in [Compute::F32, Compute::Bf16] {
                for biased in [true, false] {
                    let x = noise(&[batch, rows, c], 1);
                    let (scale, shift) = (noise(&[c], 2), noise(&[c], 3));
                    let proj = noise(&[8 * c, c], 4).to_dtype(dtype).unwrap();
                    let out = noise(&[c, 4 * c], 5).to_dtype(dtype).unwrap();
                    let biases = [noise(&[8 * c], 6), noise(&[c], 7)];
                    let [to_proj, to_out] = biases.each_ref().map(|b| biased.then_some(b));
                    let layers = FeedForward {
                        norm: (&scale, &shift, 1e-5),
                        proj: (&proj, to_proj),
                        out: (&out, to_out),
                        compute,
                    };
                    let got = feed_forward(&x, &layers).unwrap();
                    let linear = |x: &Tensor, weight: &Tensor, bias, residual| {
                        let added = Added {
                            residual,
                            ..Added::default()
                        };
                        linear_added(x, weight, bias, compute, &added).unwrap()
                    };
                    let normal = layer_norm(&x, &scale, &shift, 1e-5).unwrap();
                    let gated = geglu(&linear(&normal, &proj, to_proj, None)).unwrap();
                    let want = linear(&gated, &out, to_out, Some(&x));
                    assert_eq!(got.dims(), want.dims());
                    assert!(
                        flat(&got) == flat(&want),
                        "{batch}x{rows}x{c} {dtype:?} {compute:?}"
                    );
                }
            }
        }
    }
}
