//! Frozen weights kept in 16 bits: a 16-bit file trains to the bit as if widened.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use lora_core::format::{TensorFile, write_tensors};
use lora_core::{Adaptable, AdapterConfig, AdapterSet, Family, Targets};
use lora_sd15::{Checkpoint, Part, StableDiffusion, UNet, WeightStorage};
use lora_tests::golden_path;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// The miniature with all weights rounded to `dtype`.
fn rounded(folder: &Path, dtype: DType) -> Checkpoint {
    let file = TensorFile::open(golden_path("sd15", "mini_ldm.safetensors")).unwrap();
    let mut tensors = BTreeMap::new();
    for name in file.names() {
        let tensor = file.tensor(&name, &Device::Cpu).unwrap();
        let float = matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16);
        let tensor = if float {
            tensor.to_dtype(dtype).unwrap()
        } else {
            tensor
        };
        tensors.insert(name, tensor);
    }
    let path = folder.join("mini.safetensors");
    write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();
    std::fs::copy(
        golden_path("sd15", "mini_ldm.json"),
        folder.join("mini.json"),
    )
    .unwrap();
    Checkpoint::open(path).unwrap()
}

fn noise(dims: &[usize], rng: &mut StdRng) -> Tensor {
    let n = dims.iter().product();
    let values: Vec<f32> = (0..n).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Prediction and all gradients of a UNet with adapters.
fn run(checkpoint: &Checkpoint, storage: WeightStorage, config: &AdapterConfig) -> Vec<Vec<f32>> {
    let vb = checkpoint
        .stored_var_builder(Part::Unet, storage, &Device::Cpu)
        .unwrap();
    let mut unet = UNet::new(&checkpoint.config().unet, vb).unwrap();
    let mut rng = StdRng::seed_from_u64(5);
    let targets = Targets::attn_mlp_conv();
    let mut adapters = AdapterSet::create(&mut unet, config, &targets, &mut rng).unwrap();
    for (_, var) in adapters.params() {
        let moved = var.as_detached_tensor() + (noise(var.dims(), &mut rng) * 0.1).unwrap();
        var.set(&moved.unwrap()).unwrap();
    }
    adapters.attach(&mut unet, 1.0).unwrap();
    let unet_config = &checkpoint.config().unet;
    let latents = noise(&[2, unet_config.in_channels, 8, 8], &mut rng);
    let context = noise(&[2, 77, unet_config.cross_attention_dim], &mut rng);
    let timesteps = Tensor::new(&[20f32, 700.0], &Device::Cpu).unwrap();
    let y = unet.forward(&latents, &timesteps, &context).unwrap();
    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let mut all = vec![values(&y)];
    all.extend(
        adapters
            .params()
            .iter()
            .filter_map(|(_, v)| grads.get(v).map(values)),
    );
    all
}

#[test]
fn a_16_bit_file_gives_the_same_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    for dtype in [DType::F16, DType::BF16] {
        let checkpoint = rounded(folder.path(), dtype);
        let base = AdapterConfig {
            rank: 2,
            alpha: 2.0,
            conv_rank: Some(2),
            ..AdapterConfig::default()
        };
        let dora = AdapterConfig {
            weight_decompose: true,
            ..base.clone()
        };
        let mut kinds = vec![base.clone(), dora];
        for family in [
            Family::Loha,
            Family::Lokr,
            Family::Full,
            Family::Oft,
            Family::Ia3,
            Family::Glora,
        ] {
            kinds.push(AdapterConfig {
                family,
                ..base.clone()
            });
        }
        for config in &kinds {
            let narrow = run(&checkpoint, WeightStorage::AsStored, config);
            let wide = run(&checkpoint, WeightStorage::F32, config);
            assert!(
                narrow.len() > 10 && narrow == wide,
                "{dtype:?} {:?}",
                config.family
            );
        }
        // Rounding is a small change, and a change.
        let wide = run(&checkpoint, WeightStorage::F32, &base);
        let other = match dtype {
            DType::F16 => WeightStorage::Bf16,
            _ => WeightStorage::F16,
        };
        let near = run(&checkpoint, other, &base);
        let norm = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let difference: Vec<f32> = wide[0].iter().zip(&near[0]).map(|(a, b)| a - b).collect();
        assert!(norm(&difference) < 0.05 * norm(&wide[0]), "{dtype:?}");
    }
}

#[test]
fn all_three_networks_load_in_16_bits() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = rounded(folder.path(), DType::F16);
    let load = |storage| {
        StableDiffusion::from_checkpoint_stored(&checkpoint, storage, storage, &Device::Cpu)
            .unwrap()
    };
    let (mut narrow, wide) = (load(WeightStorage::AsStored), load(WeightStorage::F32));
    let mut halves = 0;
    let mut count = |layer: &mut lora_core::Layer| {
        halves += usize::from(layer.base().weight.dtype() == DType::F16);
        Ok(())
    };
    narrow.unet.visit_layers(&mut count).unwrap();
    narrow.text_encoder.visit_layers(&mut count).unwrap();
    assert!(halves > 100, "{halves}");
    let ids = Tensor::from_vec((0..77u32).collect(), (1, 77), &Device::Cpu).unwrap();
    let states = |sd: &StableDiffusion| values(&sd.text_encoder.forward(&ids, 1).unwrap());
    assert!(states(&narrow) == states(&wide));
    let mut rng = StdRng::seed_from_u64(1);
    let pixels = noise(&[1, 3, 64, 64], &mut rng);
    let mean = |sd: &StableDiffusion| values(&sd.vae.encode(&pixels).unwrap().mode(1.0).unwrap());
    assert!(mean(&narrow) == mean(&wide));
}

/// As guidance asks: what comes before the first look at the context is computed once.
#[test]
fn several_contexts_for_one_latent_are_as_latents_repeated() {
    let checkpoint = Checkpoint::open(golden_path("sd15", "mini_ldm.safetensors")).unwrap();
    let vb = checkpoint.var_builder(Part::Unet, DType::F32, &Device::Cpu);
    let config = &checkpoint.config().unet;
    let unet = UNet::new(config, vb.unwrap()).unwrap();
    let mut rng = StdRng::seed_from_u64(7);
    let latents = noise(&[2, config.in_channels, 8, 16], &mut rng);
    let contexts = noise(&[6, 77, config.cross_attention_dim], &mut rng);
    let timesteps = Tensor::new(&[20f32, 700.0], &Device::Cpu).unwrap();
    let together = unet.forward(&latents, &timesteps, &contexts).unwrap();
    let latents = Tensor::cat(&[&latents; 3], 0).unwrap();
    let timesteps = Tensor::cat(&[&timesteps; 3], 0).unwrap();
    let repeated = unet.forward(&latents, &timesteps, &contexts).unwrap();
    for (a, b) in values(&together).into_iter().zip(values(&repeated)) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
    let five = contexts.narrow(0, 0, 5).unwrap();
    let error = unet.forward(&latents, &timesteps, &five).unwrap_err();
    assert!(error.to_string().contains("5 contexts"), "{error}");
}
