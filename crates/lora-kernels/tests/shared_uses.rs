//! A value that is used several times gets the sum of the gradients of all uses, however they come
//! together: left there first, added in place, handed on, or by candle's own operations.

#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{Result, Tensor};
use common::{flat, noise, var};
use lora_kernels::{
    Added, Compute, Conv2dParams, Product, add, add_to_channels, attention, checkpoint,
    concat_channels, conv2d, conv2d_added, geglu, group_norm, layer_norm, linear, linear_added,
    mix_groups, reshape, row_products, scale_channels, silu, transpose, upsample_nearest2x,
    with_computed_weight,
};

type Use<'a> = &'a dyn Fn(&Tensor) -> Result<Tensor>;

/// The gradient to `x` when it goes through each of `uses` with a weight of its own.
fn gradient(shape: &[usize], uses: &[Use<'_>]) -> Vec<f32> {
    let x = var(shape, 1);
    // A value of this crate, not a variable.
    let value = silu(&x).unwrap();
    let mut loss: Option<Tensor> = None;
    for (seed, used) in (100u32..).zip(uses) {
        let y = used(&value).unwrap();
        let weighed = (&y * noise(y.dims(), seed)).unwrap().sum_all().unwrap();
        loss = Some(match loss {
            Some(loss) => (loss + weighed).unwrap(),
            None => weighed,
        });
    }
    let store = loss.unwrap().backward().unwrap();
    flat(store.get(&x).unwrap())
}

/// Uses that follow each other give what they give alone, added up.
fn add_up(name: &str, shape: &[usize], used: Use<'_>) {
    // By candle and unweighed by this crate, so that what comes first in the sum is none of its own.
    let doubled = |x: &Tensor| x * 2.0;
    let handed_on = |x: &Tensor| reshape(x, x.shape());
    let nothing = |x: &Tensor| x * 0.0;
    let orders: [[Use<'_>; 3]; 3] = [
        [used, used, &doubled],
        [&doubled, used, &handed_on],
        [&handed_on, &handed_on, used],
    ];
    for (number, order) in orders.iter().enumerate() {
        let together = gradient(shape, order);
        let mut apart = vec![0f32; together.len()];
        for place in 0..order.len() {
            // In its own place, with its own weight.
            let mut alone = [&nothing as Use<'_>; 3];
            alone[place] = order[place];
            for (sum, g) in apart.iter_mut().zip(gradient(shape, &alone)) {
                *sum += g;
            }
        }
        let scale = apart.iter().fold(1f32, |m, v| m.max(v.abs()));
        for (at, (got, want)) in together.iter().zip(&apart).enumerate() {
            assert!(
                (got - want).abs() <= 1e-5 * scale,
                "{name}, order {number}, value {at}: {got} instead of {want}"
            );
        }
    }
}

#[test]
fn layers() {
    let (weight, bias) = (noise(&[12, 20], 2), noise(&[12], 3));
    let (middle, up) = (noise(&[2, 9, 3], 4), noise(&[12, 3], 5));
    let low_rank = [(middle, up)];
    for compute in [Compute::F32, Compute::Bf16] {
        add_up("frozen linear", &[2, 9, 20], &|x| {
            let added = Added {
                low_rank: &low_rank,
                ..Added::default()
            };
            linear_added(x, &weight, Some(&bias), compute, &added)
        });
    }
    let (trained, shift) = (var(&[12, 20], 6), var(&[12], 7));
    add_up("trained linear", &[2, 9, 20], &|x| {
        linear(x, &trained, Some(&shift))
    });
    add_up("linear to itself", &[2, 9, 12], &|x| {
        let added = Added {
            residual: Some(x),
            ..Added::default()
        };
        let square = weight.narrow(1, 0, 12)?;
        linear_added(x, &square, None, Compute::F32, &added)
    });
    let root = var(&[12, 20], 8);
    add_up("computed weight", &[2, 9, 20], &|x| {
        with_computed_weight(Product::Linear, x, &[&root], |t| t[0].sqr())
    });
}

#[test]
fn convolutions() {
    let same = Conv2dParams {
        padding: 1,
        ..Conv2dParams::default()
    };
    let halve = Conv2dParams { stride: 2, ..same };
    let groups = Conv2dParams { groups: 2, ..same };
    let point = Conv2dParams::default();
    for (name, channels, side, kernel, p) in [
        ("3x3", 6, 7, 3, same),
        ("3x3 of many pixels", 32, 24, 3, same),
        ("3x3, stride 2", 6, 7, 3, halve),
        ("3x3, groups", 6, 7, 3, groups),
        ("1x1", 6, 7, 1, point),
    ] {
        let shape = [channels, channels / p.groups, kernel, kernel];
        let weight = (noise(&shape, 2) * 0.2).unwrap();
        let trained = var(&shape, 3);
        for compute in [Compute::F32, Compute::Bf16] {
            add_up(name, &[2, channels, side, side], &|x| {
                conv2d_added(x, &weight, None, p, compute, &Added::default())
            });
        }
        add_up(name, &[2, channels, side, side], &|x| {
            conv2d(x, &trained, None, p)
        });
    }
}

#[test]
fn attention_and_norms() {
    let other = var(&[2, 7, 8], 2);
    for compute in [Compute::F32, Compute::Bf16] {
        add_up("attention", &[2, 7, 8], &|x| {
            attention(x, x, x, 2, false, compute)
        });
        add_up("attention to others", &[2, 5, 8], &|x| {
            attention(x, &other, &other, 2, false, compute)
        });
    }
    let (w, b) = (var(&[8], 3), noise(&[8], 4));
    add_up("layer norm", &[2, 7, 8], &|x| layer_norm(x, &w, &b, 1e-5));
    add_up("group norm", &[2, 8, 5, 5], &|x| {
        group_norm(x, &w, &b, 4, 1e-5, true)
    });
}

#[test]
fn the_rest() {
    add_up("silu", &[3, 5], &silu);
    add_up("geglu", &[3, 10], &geglu);
    let weight = noise(&[6, 5], 2);
    let factors = [(var(&[2, 5], 3), var(&[6, 2], 4))]
        .map(|(down, up)| (down.as_tensor().clone(), up.as_tensor().clone()));
    add_up("layer behind geglu", &[3, 10], &|x| {
        let residual = x.narrow(1, 0, 6)?;
        let added = Added {
            factors: &factors,
            residual: Some(&residual),
            ..Added::default()
        };
        linear_added(&geglu(x)?, &weight, None, Compute::F32, &added)
    });
    add_up("checkpoint that hands on", &[3, 4], &|x| {
        checkpoint(&[x, x], |t| {
            let added = Added {
                residual: Some(&t[0]),
                ..Added::default()
            };
            let one = Tensor::eye(4, t[0].dtype(), t[0].device())?;
            linear_added(&t[1], &one, None, Compute::F32, &added)
        })
    });
    add_up("transpose", &[2, 33, 5], &transpose);
    add_up("upsample", &[2, 3, 4, 5], &upsample_nearest2x);
    let (picture, shift) = (var(&[2, 2, 4, 5], 3), var(&[1, 3], 4));
    add_up("first channels", &[2, 3, 4, 5], &|x| {
        concat_channels(x, &picture)
    });
    add_up("last channels", &[2, 3, 4, 5], &|x| {
        concat_channels(&picture, x)
    });
    add_up("both channels", &[2, 3, 4, 5], &|x| concat_channels(x, x));
    add_up("sum", &[3, 5], &|x| add(x, x));
    add_up("shift", &[2, 3, 4, 5], &|x| add_to_channels(x, &shift));
    let rows = var(&[4, 9], 5);
    add_up("row products", &[3, 9], &|x| row_products(x, &rows));
    let mixing = var(&[3, 4], 6);
    add_up("mixed groups", &[5, 4, 7], &|x| mix_groups(&mixing, x));
    let scale = var(&[6], 7);
    add_up("scaled channels", &[4, 6], &|x| {
        scale_channels(x, 1, &scale, None, Some(x))
    });
}
