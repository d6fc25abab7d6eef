//! An application that draws with candle-transformers' own Stable Diffusion keeps its code:
//! it builds its networks from a `VarBuilder` that has an adapter merged in.
//!
//! ```text
//! cargo run --release --example embed_in_app -- unet/diffusion_pytorch_model.safetensors zoe.safetensors 0.8
//! ```

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::stable_diffusion::unet_2d::{
    UNet2DConditionModel, UNet2DConditionModelConfig,
};
use lora_core::{AdapterSet, Component};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(unet), Some(adapter)) = (arguments.next(), arguments.next()) else {
        return Err("usage: embed_in_app UNET.safetensors ADAPTER.safetensors [MULTIPLIER]".into());
    };
    let multiplier: f64 = arguments.next().map_or(Ok(1.0), |m| m.parse())?;
    let device = Device::Cpu;

    // SD1.5's UNet in diffusers' layout, and an adapter for it in any layout.
    let file = candle_core::safetensors::load(unet, &device)?;
    let base = VarBuilder::from_tensors(file, DType::F32, &device);
    let adapter = AdapterSet::load(adapter, &device)?;
    let styled = adapter.merged(base.clone(), Component::Unet, multiplier);

    // The application's own code knows nothing of adapters.
    let latents = Tensor::randn(0f32, 1., (1, 4, 64, 64), &device)?;
    let context = Tensor::zeros((1, 77, 768), DType::F32, &device)?;
    let noise = |weights: VarBuilder<'_>| {
        let config = UNet2DConditionModelConfig {
            cross_attention_dim: 768,
            ..Default::default()
        };
        let unet = UNet2DConditionModel::new(weights, 4, 4, false, config)?;
        unet.forward(&latents, 500.0, &context)
    };
    let change = (noise(styled)? - noise(base)?)?;
    let mean = change.abs()?.mean_all()?.to_scalar::<f32>()?;
    println!("the adapter changes the predicted noise by {mean:.4} on average");
    Ok(())
}
