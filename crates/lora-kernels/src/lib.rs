//! Fast CPU operations for models whose weights are mostly frozen, as candle
//! custom operations with gradients.
//!
//! candle's own `matmul` and `conv2d` compute, and keep until the end of the
//! backward pass, the gradient of *every* operand, frozen or not. For a network
//! with 860 million frozen weights that is 3.4 GB and half of the time spent on
//! numbers nobody reads. The operations here return a gradient only for operands
//! that are tracked.
//!
//! * [`linear`]: `x W^T + b`
//! * [`conv2d`]: convolution with stride, padding, dilation and groups
//! * [`linear_added`], [`conv2d_added`]: the same with a frozen weight, which may be stored
//!   in 16 bits, and with low-rank branches, residual and shift added in place; in f32, or with
//!   operands rounded to bf16 ([`Compute`])
//! * [`attention`]: scaled dot-product attention that never holds all scores
//! * [`layer_norm`], [`group_norm`] (SiLU behind it if wanted), [`silu`], [`geglu`]
//! * [`upsample_nearest2x`]: nearest-neighbour doubling; [`transpose`]: channels and pixels change places;
//!   [`concat_channels`], [`reshape`], [`add()`]
//! * [`row_products`], [`mix_groups`], [`scale_channels`], [`add_to_channels`]: what LoHa, LoKr and
//!   DoRA do beside products
//! * [`with_computed_weight`]: a layer whose weight is computed from trained factors
//! * [`on_worker`]: runs many operations with less waiting
//! * [`checkpoint`]: gradient checkpointing around any function, on any device
//!
//! Each takes and returns ordinary candle tensors. On a CPU with f32 tensors the
//! kernels run; for every other device or dtype the same function is composed of candle's
//! operations, as one node of the graph with the same gradients. [`Compute::Bf16`] applies on
//! GPUs to f32 tensors, too (there the products' results are rounded as well).
//!
//! Matrix products and attention have AVX-512 kernels for processors with AVX512_BF16, found at
//! run time. Elsewhere products run on the [`gemm`] crate, those in bf16 on values rounded to
//! bf16 and widened again. The environment variable `LORA_KERNELS`, read once, forces a path:
//!
//! * `plain`: candle's operations everywhere; [`plain`] has them by name
//! * `composed`: on the CPU what other devices get, for tests
//! * `avx512`: no AMX
//! * `generic`: nothing that is compiled for a particular processor here; the gemm crate still
//!   chooses its own kernels
//! * anything else, or unset: what the processor has
//!
//! ```
//! use candle_core::{Device, Tensor};
//! let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
//! let weight = Tensor::new(&[[3f32, 4.], [5., 6.]], &Device::Cpu)?;
//! let bias = Tensor::new(&[0.5f32, 0.25], &Device::Cpu)?;
//! let y = lora_kernels::linear(&x, &weight, Some(&bias))?;
//! assert_eq!(y.to_vec2::<f32>()?, [[11.5, 17.25]]);
//! # Ok::<(), candle_core::Error>(())
//! ```

// Exempt are the kernels themselves, the call of the gemm crate's, and settings at a program's
// start; see docs/unsafe.md.
#![deny(unsafe_code)]

mod added;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod avx512;
mod buffer;
mod channels;
mod checkpoint;
mod composed;
mod computed;
mod conv2d;
mod conv3x3;
mod feed_forward;
mod gradient;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod implicit;
mod joined;
mod linear;
mod math;
mod matrix;
mod memory;
mod node;
mod norm;
pub mod plain;
mod pointwise;
mod rows;
mod transpose;
mod upsample;
mod winograd;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod winograd_avx512;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod winograd_int16;

use std::sync::OnceLock;

use candle_core::{DType, Tensor};

pub use added::{Added, conv2d_added, linear_added};
pub use attention::attention;
pub use channels::add_to_channels;
pub use checkpoint::checkpoint;
pub use computed::{Product, with_computed_weight};
pub use conv2d::{Conv2dParams, conv2d};
pub use feed_forward::{FeedForward, feed_forward};
pub use joined::{add, concat_channels, reshape};
pub use linear::linear;
pub use memory::{
    device_memory, keep_candle_to_one_thread, keep_freed_device_memory, keep_freed_memory,
    on_worker,
};
pub use norm::{group_norm, layer_norm};
pub use pointwise::{geglu, silu};
pub use rows::{mix_groups, row_products, scale_channels};
pub use transpose::transpose;
pub use upsample::upsample_nearest2x;

/// What the products of layers, and those inside attention, are computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Compute {
    /// f32 throughout.
    #[default]
    F32,
    /// Operands are rounded to bf16 once, sums and results are f32. Norms, activation functions
    /// and softmax are f32. Where there are many pixels, what 3x3 convolutions round are sums of
    /// inputs and of weights (Winograd's algorithm): of 6x6 inputs, to whole numbers of 16 bits,
    /// with about the error of bf16 inputs, or, between 128 and 1024 pixels, of four inputs, to
    /// bf16; or nothing where channels are no multiple of 32. Low-rank branches are multiplied as
    /// under PyTorch's autocast: their weights and gradients are f32, rounded as operands (on GPUs
    /// only `down`, and where it is frozen). What other adapters compute is f32.
    Bf16,
}

/// Which implementation runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    /// candle's operations.
    Plain,
    /// What other devices get, on the CPU.
    Composed,
    /// No instruction beyond the target's, except those inside the gemm crate.
    Generic,
    /// What the processor has, but not its matrix registers.
    Vectors,
    /// What the processor has.
    Native,
}

/// The path that `LORA_KERNELS` asks for; read once.
fn path() -> Path {
    static PATH: OnceLock<Path> = OnceLock::new();
    *PATH.get_or_init(|| match std::env::var("LORA_KERNELS").as_deref() {
        Ok("plain") => Path::Plain,
        Ok("composed") => Path::Composed,
        Ok("generic") => Path::Generic,
        Ok("avx512") => Path::Vectors,
        _ => Path::Native,
    })
}

/// The processor's level that the operations here make use of, in words.
///
/// ```
/// println!("running on {}", lora_kernels::level());
/// ```
pub fn level() -> &'static str {
    match path() {
        Path::Plain => return "plain operations (LORA_KERNELS=plain)",
        Path::Composed => return "composed operations (LORA_KERNELS=composed)",
        Path::Generic => return "generic kernels (LORA_KERNELS=generic)",
        Path::Vectors | Path::Native => {}
    }
    #[cfg(target_arch = "x86_64")]
    {
        if avx512::available() && matrix_registers() {
            "AVX-512 with BF16, and AMX"
        } else if avx512::available() {
            "AVX-512 with BF16"
        } else if is_x86_feature_detected!("avx512f") {
            "AVX-512"
        } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            "AVX2"
        } else {
            "SSE2"
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::env::consts::ARCH
}

/// Whether products in bf16 use the matrix registers of AMX.
#[cfg(target_arch = "x86_64")]
fn matrix_registers() -> bool {
    path() == Path::Native && amx::available()
}

/// Whether the kernels apply to these operands: all f32, on a CPU, and not switched off by
/// `LORA_KERNELS`.
fn fast(tensors: &[&Tensor]) -> bool {
    !matches!(path(), Path::Plain | Path::Composed)
        && tensors
            .iter()
            .all(|t| t.device().is_cpu() && t.dtype() == DType::F32)
}

/// Whether operations without a kernel are single nodes ([`composed`]); if not, they are
/// candle's own.
fn as_nodes() -> bool {
    path() != Path::Plain
}

/// The f32 values of a contiguous CPU operand.
fn values<'a>(
    storage: &'a candle_core::CpuStorage,
    layout: &candle_core::Layout,
) -> candle_core::Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (candle_core::CpuStorage::F32(v), Some((start, end))) => Ok(&v[start..end]),
        (candle_core::CpuStorage::F32(_), None) => {
            candle_core::bail!(
                "operand must be contiguous, got strides {:?}",
                layout.stride()
            )
        }
        _ => candle_core::bail!("operand must be f32"),
    }
}

/// The README's programs, compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct ReadmeDoctests;
