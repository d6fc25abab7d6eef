//! Gradients with checkpointing are those without, to the bit.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use lora_core::{AdapterConfig, AdapterSet, Dropout, Family, Targets};
use lora_sd15::{Checkpoint, Part, TextEncoder, UNet};
use lora_tests::golden_path;
use rand::{Rng, SeedableRng, rngs::StdRng};

fn noise(dims: &[usize], rng: &mut StdRng) -> Tensor {
    let n = dims.iter().product();
    let values: Vec<f32> = (0..n).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

/// The miniature's UNet and text encoder, both with adapters of one kind.
struct Model {
    unet: UNet,
    text: TextEncoder,
    adapters: AdapterSet,
    width: usize,
}

fn model(config: &AdapterConfig, targets: &Targets) -> Model {
    let checkpoint = Checkpoint::open(golden_path("sd15", "mini_ldm.safetensors")).unwrap();
    let vb = |part| {
        checkpoint
            .var_builder(part, DType::F32, &Device::Cpu)
            .unwrap()
    };
    let mut unet = UNet::new(&checkpoint.config().unet, vb(Part::Unet)).unwrap();
    let mut text = TextEncoder::new(&checkpoint.config().text, vb(Part::TextEncoder)).unwrap();
    let mut rng = StdRng::seed_from_u64(5);
    let mut adapters = AdapterSet::create(&mut unet, config, targets, &mut rng).unwrap();
    let of_text = Targets::attn_mlp();
    adapters.extend(AdapterSet::create(&mut text, config, &of_text, &mut rng).unwrap());
    for (_, var) in adapters.params() {
        let moved = var.as_detached_tensor() + (noise(var.dims(), &mut rng) * 0.1).unwrap();
        var.set(&moved.unwrap()).unwrap();
    }
    adapters.attach(&mut unet, 1.0).unwrap();
    adapters.attach(&mut text, 1.0).unwrap();
    let width = checkpoint.config().unet.in_channels;
    Model {
        unet,
        text,
        adapters,
        width,
    }
}

fn gradients(m: &mut Model, on: bool) -> (f32, GradStore) {
    m.unet.set_gradient_checkpointing(on);
    m.adapters.begin_step(11);
    let mut rng = StdRng::seed_from_u64(6);
    let latents = noise(&[2, m.width, 8, 16], &mut rng);
    let target = noise(&[2, m.width, 8, 16], &mut rng);
    let ids: Vec<u32> = (0..154u32).map(|i| i * 7 % 90).collect();
    let ids = Tensor::from_vec(ids, (2, 77), &Device::Cpu).unwrap();
    let context = m.text.forward(&ids, 1).unwrap();
    let timesteps = Tensor::new(&[20f32, 700.0], &Device::Cpu).unwrap();
    let y = m.unet.forward(&latents, &timesteps, &context).unwrap();
    let loss = (y - target).unwrap().sqr().unwrap().mean_all().unwrap();
    let value = loss.to_scalar().unwrap();
    (value, loss.backward().unwrap())
}

fn check(name: &str, config: &AdapterConfig, targets: &Targets) {
    let mut m = model(config, targets);
    let (loss, plain) = gradients(&mut m, false);
    let (again, kept) = gradients(&mut m, true);
    assert_eq!(loss.to_bits(), again.to_bits(), "{name}: loss");
    let bits = |t: &Tensor| -> Vec<u32> {
        let flat = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        flat.into_iter().map(f32::to_bits).collect()
    };
    let (mut with, mut nonzero) = (0, 0);
    for (param, var) in m.adapters.params() {
        match (plain.get(&var), kept.get(&var)) {
            (Some(a), Some(b)) => {
                assert_eq!(bits(a), bits(b), "{name}: {param}");
                with += 1;
                nonzero += usize::from(bits(a).iter().any(|b| *b != 0));
            }
            (None, None) => {}
            (a, b) => panic!("{name}: {param}: {} {}", a.is_some(), b.is_some()),
        }
    }
    assert!(nonzero > 20 && with > 20, "{name}: {with} {nonzero}");
}

#[test]
fn gradients_do_not_change() {
    let base = AdapterConfig {
        rank: 2,
        alpha: 2.0,
        conv_rank: Some(2),
        ..AdapterConfig::default()
    };
    check("LoRA", &base, &Targets::attn_mlp());
    check("LoCon", &base, &Targets::attn_mlp_conv());
    // Every layer: the time embedding's gradient is summed over all blocks.
    let all = Targets::new(&["*"]).unwrap();
    check("all layers", &base, &all);
    let dropout = AdapterConfig {
        dropout: Dropout {
            neuron: 0.2,
            rank: 0.2,
            module: 0.3,
            ..Default::default()
        },
        ..base.clone()
    };
    check("dropout", &dropout, &Targets::attn_mlp_conv());
    for family in [Family::Loha, Family::Lokr, Family::Full, Family::Oft] {
        let config = AdapterConfig {
            family,
            ..base.clone()
        };
        check(&format!("{family:?}"), &config, &Targets::attn_mlp_conv());
    }
    let dora = AdapterConfig {
        weight_decompose: true,
        ..base
    };
    check("DoRA", &dora, &Targets::attn_mlp_conv());
}
