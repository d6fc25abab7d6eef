//! The kernels at the shapes of the SD1.5 UNet at 512x512, batch 1.
//!
//! `cargo bench -p lora-benches --bench kernels -- [FILTER]`; `RAYON_NUM_THREADS` sets the
//! threads, `LORA_KERNELS=plain` times candle's own operations.

use candle_core::{DType, Device, Result, Tensor, Var};
use criterion::{Criterion, criterion_group, criterion_main};
use lora_kernels::{Added, Compute, Conv2dParams};

fn noise(dims: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Vec<f32> = (0..dims.iter().product())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(values, dims, &Device::Cpu)
}

/// Times `f` on a frozen input, and forward and backward pass together on a tracked one.
fn both(c: &mut Criterion, name: &str, dims: &[usize], f: impl Fn(&Tensor) -> Result<Tensor>) {
    let x = noise(dims, 1).and_then(|x| Var::from_tensor(&x));
    let x = x.expect("an input");
    let frozen = x.as_detached_tensor();
    c.bench_function(&format!("{name} forward"), |b| {
        b.iter(|| f(&frozen).expect("forward"));
    });
    c.bench_function(&format!("{name} forward+backward"), |b| {
        b.iter(|| f(&x).and_then(|y| y.backward()).expect("backward"));
    });
}

fn linear(c: &mut Criterion) -> Result<()> {
    for (m, k, n) in [
        (4096, 320, 320),
        (4096, 320, 2560),
        (1024, 640, 5120),
        (256, 1280, 10240),
        (64, 1280, 1280),
        (77, 768, 320),
    ] {
        let w = noise(&[n, k], 2)?;
        let narrow = w.to_dtype(DType::BF16)?;
        both(c, &format!("linear {m}x{k}x{n}"), &[m, k], |x| {
            lora_kernels::linear(x, &w, None)
        });
        both(c, &format!("linear bf16 {m}x{k}x{n}"), &[m, k], |x| {
            lora_kernels::linear(x, &narrow, None)
        });
        let pair = [(noise(&[m, 32], 3)?, noise(&[n, 32], 4)?)];
        let added = Added {
            low_rank: &pair,
            ..Added::default()
        };
        both(c, &format!("linear rank 32 {m}x{k}x{n}"), &[m, k], |x| {
            lora_kernels::linear_added(x, &w, None, Compute::F32, &added)
        });
    }
    Ok(())
}

fn convolution(c: &mut Criterion) -> Result<()> {
    let same = Conv2dParams {
        padding: 1,
        ..Conv2dParams::default()
    };
    for (i, o, side) in [
        (320, 320, 64),
        (960, 320, 64),
        (640, 640, 32),
        (1280, 1280, 16),
        (1280, 1280, 8),
    ] {
        let w = noise(&[o, i, 3, 3], 2)?;
        let name = format!("conv3x3 {i}->{o}@{side}");
        both(c, &name, &[1, i, side, side], |x| {
            lora_kernels::conv2d(x, &w, None, same)
        });
    }
    Ok(())
}

fn others(c: &mut Criterion) -> Result<()> {
    for (lq, lk, width) in [(4096, 4096, 320), (1024, 1024, 640), (4096, 77, 320)] {
        let (k, v) = (noise(&[1, lk, width], 2)?, noise(&[1, lk, width], 3)?);
        let name = format!("attention {lq}x{lk}x{}", width / 8);
        both(c, &name, &[1, lq, width], |q| {
            lora_kernels::attention(q, &k, &v, 8, false, Compute::F32)
        });
    }
    for (tokens, width, side) in [(4096, 320, 64), (1024, 640, 32), (256, 1280, 16)] {
        let (w, b) = (noise(&[width], 2)?, noise(&[width], 3)?);
        let dims = [1, width, side, side];
        both(c, &format!("group norm+silu {width}@{side}"), &dims, |x| {
            lora_kernels::group_norm(x, &w, &b, 32, 1e-5, true)
        });
        both(
            c,
            &format!("layer norm {tokens}x{width}"),
            &[tokens, width],
            |x| lora_kernels::layer_norm(x, &w, &b, 1e-5),
        );
        let dims = [tokens, 8 * width];
        both(c, &format!("geglu {tokens}x{}", 4 * width), &dims, |x| {
            lora_kernels::geglu(x)
        });
    }
    Ok(())
}

fn kernels(c: &mut Criterion) {
    linear(c).expect("linear");
    convolution(c).expect("convolution");
    others(c).expect("others");
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = kernels
}
criterion_main!(benches);
