//! Stable Diffusion 1.5 for candle with adapter injection points: UNet, VAE, CLIP text encoder, tokenizer, samplers.
