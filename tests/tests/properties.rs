//! Promises that hold for any adapter, file and text.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lora_core::algebra::{LiveMerge, Strength};
use lora_core::format::{SaveLayout, TensorFile, write_tensors};
use lora_core::merge::{TemporaryMerge, merged_weight};
use lora_core::{
    Adaptable, Adapter, AdapterConfig, AdapterSet, BaseLayer, Component, Family, Layer, LayerOp,
    SaveOptions, Targets,
};
use lora_sd15::{Infotext, infotext};
use lora_train::gui::read_config;
use lora_train::{Steps, TrainConfig};
use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const LINEAR: &str = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q";
const CONVOLUTION: &str = "mid_block.resnets.0.conv1";

/// A linear layer and a convolution under names of the UNet.
struct Model {
    layers: [Layer; 2],
}

impl Model {
    fn new(outputs: usize, inputs: usize, dtype: DType, seed: u64) -> Self {
        let weight = |dims: &[usize], seed| random(dims, seed).to_dtype(dtype).unwrap();
        let linear = BaseLayer::new(
            weight(&[outputs, inputs], seed),
            Some(weight(&[outputs], seed + 1)),
            LayerOp::Linear,
        );
        let convolution = BaseLayer::new(
            weight(&[outputs, inputs, 3, 3], seed + 2),
            None,
            LayerOp::Conv2d(lora_core::Conv2dParams {
                padding: 1,
                ..Default::default()
            }),
        );
        Self {
            layers: [
                Layer::new(LINEAR, linear),
                Layer::new(CONVOLUTION, convolution),
            ],
        }
    }

    fn bits(&self) -> Vec<Vec<f64>> {
        let weights = self.layers.iter().flat_map(|layer| {
            let base = layer.base();
            [Some(&base.weight), base.bias.as_ref()]
        });
        weights.flatten().map(lora_tests::values).collect()
    }
}

impl Adaptable for Model {
    fn component(&self) -> Component {
        Component::Unet
    }

    fn visit_layers(
        &mut self,
        visit: &mut dyn FnMut(&mut Layer) -> lora_core::Result<()>,
    ) -> lora_core::Result<()> {
        self.layers.iter_mut().try_for_each(visit)
    }
}

/// Values from -1 to 1.
fn random(dims: &[usize], seed: u64) -> Tensor {
    use rand::Rng;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let count = dims.iter().product();
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

/// An adapter on both layers, away from its start.
fn adapter(model: &mut Model, family: Family, rank: usize, seed: u64) -> AdapterSet {
    // Blocks of rotations divide the outputs.
    let rank = match family {
        Family::Oft | Family::Boft => 4,
        _ => rank,
    };
    let config = AdapterConfig {
        family,
        rank,
        conv_rank: Some(rank),
        alpha: 1.5,
        conv_alpha: 1.5,
        factor: 2,
        ..AdapterConfig::default()
    };
    let targets = Targets::new(&["to_q", "conv1"]).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let fresh = AdapterSet::create(model, &config, &targets, &mut rng).unwrap();
    let mut moved = AdapterSet::default();
    for (i, (name, adapter)) in fresh.iter().enumerate() {
        let mut shift =
            |t: &Tensor| t.detach() + random(t.dims(), seed + i as u64).affine(0.2, 0.0)?;
        moved.insert(name, adapter.map(&mut shift).unwrap());
    }
    moved
}

fn families() -> impl Strategy<Value = Family> {
    prop::sample::select(vec![
        Family::Lora,
        Family::Loha,
        Family::Lokr,
        Family::Dora,
        Family::Oft,
        Family::Boft,
        Family::Glora,
        Family::Ia3,
        Family::Full,
    ])
}

fn tensors(set: &AdapterSet) -> BTreeMap<String, Vec<f64>> {
    let tensors = set.tensors(None).unwrap();
    tensors
        .iter()
        .map(|(name, t)| (name.clone(), lora_tests::values(t)))
        .collect()
}

fn deltas(set: &AdapterSet, model: &Model, multiplier: f64) -> Vec<Vec<f64>> {
    let weights = model.layers.iter().map(|layer| {
        let name = Component::Unet.layer_name(layer.path());
        let weight = layer.base().weight.to_dtype(DType::F32).unwrap();
        lora_tests::values(&set.get(&name).unwrap().delta(&weight, multiplier).unwrap())
    });
    weights.collect()
}

fn near(a: &[Vec<f64>], b: &[Vec<f64>]) -> bool {
    let most = a.iter().flatten().fold(1e-3f64, |m, v| m.max(v.abs()));
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.into_iter().all(|(a, b)| (a - b).abs() <= 2e-5 * most)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn merged_and_taken_out_again_the_weights_are_the_same_bits(
        family in families(), outputs in 1usize..3, inputs in 1usize..6, rank in 1usize..4,
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
        multipliers in prop::collection::vec(-2.0f64..2.0, 1..4), seed in 0u64..1000,
    ) {
        let mut model = Model::new(8 * outputs, 4 * inputs, dtype, seed);
        let set = adapter(&mut model, family, rank, seed);
        let before = model.bits();
        let mut live = LiveMerge::default();
        for multiplier in &multipliers {
            let (merge, unmatched) = TemporaryMerge::apply(&mut model, &[(&set, *multiplier)]).unwrap();
            prop_assert!(unmatched.is_empty());
            let merged = model.bits();
            merge.undo(&mut model).unwrap();
            prop_assert_eq!(&model.bits(), &before);
            live.set(&mut model, &[(&set, Strength::new(*multiplier, 0.0))]).unwrap();
            prop_assert_eq!(model.bits(), merged);
            live.restore(&mut model).unwrap();
            prop_assert_eq!(&model.bits(), &before);
        }
    }

    #[test]
    fn changes_are_linear_in_the_multiplier_and_add_up(
        family in prop::sample::select(vec![Family::Lora, Family::Loha, Family::Lokr, Family::Full]),
        rank in 1usize..4, a in -2.0f64..2.0, b in -2.0f64..2.0, seed in 0u64..1000,
    ) {
        let mut model = Model::new(8, 12, DType::F32, seed);
        let set = adapter(&mut model, family, rank, seed);
        let (one, two) = (deltas(&set, &model, a), deltas(&set, &model, b));
        let both = deltas(&set, &model, a + b);
        // The parts' rounding counts where they nearly cancel.
        let most = one.iter().chain(&two).flatten().fold(1e-3f64, |m, v| m.max(v.abs()));
        let parts = one.iter().flatten().zip(two.iter().flatten());
        for (both, (one, two)) in both.iter().flatten().zip(parts) {
            prop_assert!((both - (one + two)).abs() <= 2e-5 * most, "{both} is not {one} + {two}");
        }
        prop_assert!(deltas(&set, &model, 0.0).iter().flatten().all(|v| *v == 0.0));
        // Two merged together are the sum of both, in any order.
        let other = adapter(&mut model, Family::Lora, 2, seed + 50);
        let name = Component::Unet.layer_name(LINEAR);
        let (one, two): (&Arc<dyn Adapter>, &Arc<dyn Adapter>) = (set.get(&name).unwrap(), other.get(&name).unwrap());
        let base = &model.layers[0].base().weight;
        let merged = |parts: &[(&dyn Adapter, f64)]| vec![lora_tests::values(&merged_weight(base, parts).unwrap())];
        let forward = merged(&[(one.as_ref(), a), (two.as_ref(), b)]);
        prop_assert!(near(&forward, &merged(&[(two.as_ref(), b), (one.as_ref(), a)])));
    }

    #[test]
    fn adapter_files_of_every_layout_are_read_back(
        family in families(), rank in 1usize..4, seed in 0u64..1000,
        layout in prop::sample::select(vec![
            SaveLayout::Kohya, SaveLayout::KohyaLdm, SaveLayout::DiffusersOld, SaveLayout::Diffusers, SaveLayout::Peft,
        ]),
        note in "[ -~é漢]{0,20}",
    ) {
        let mut model = Model::new(8, 12, DType::F32, seed);
        let set = adapter(&mut model, family, rank, seed);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("adapter_model.safetensors");
        let options = SaveOptions {
            layout,
            metadata: [("note".to_string(), note.clone())].into(),
            ..SaveOptions::default()
        };
        // Not every layout can hold every family; it is refused then, not written wrongly.
        let Ok(_) = set.save(&path, &options) else {
            prop_assert!(layout != SaveLayout::Kohya && layout != SaveLayout::KohyaLdm);
            return Ok(());
        };
        let again = AdapterSet::load(&path, &Device::Cpu).unwrap();
        prop_assert_eq!(again.metadata().get("note"), Some(&note));
        prop_assert!(near(&deltas(&again, &model, 0.7), &deltas(&set, &model, 0.7)));
        if layout == SaveLayout::Kohya {
            prop_assert_eq!(tensors(&again), tensors(&set));
        }
    }

    #[test]
    fn tensors_of_any_shape_and_name_are_read_back(
        entries in prop::collection::btree_map("[ -~é漢]{1,12}", (prop::collection::vec(0usize..4, 0..4), 0usize..5), 0..5),
        seed in 0u64..1000,
    ) {
        let tensors: BTreeMap<String, Tensor> = entries
            .into_iter()
            .filter(|(name, _)| name != "__metadata__")
            .map(|(name, (dims, dtype))| {
                let dtype = [DType::F32, DType::F16, DType::BF16, DType::F64, DType::I64][dtype];
                (name, random(&dims, seed).affine(5.0, 0.0).unwrap().to_dtype(dtype).unwrap())
            })
            .collect();
        let path: PathBuf = tempfile::NamedTempFile::new().unwrap().into_temp_path().to_path_buf();
        write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();
        let file = TensorFile::open(&path).unwrap();
        prop_assert_eq!(file.names(), tensors.keys().cloned().collect::<Vec<_>>());
        for (name, tensor) in &tensors {
            let read = file.tensor(name, &Device::Cpu).unwrap();
            prop_assert_eq!((read.dims(), read.dtype()), (tensor.dims(), tensor.dtype()));
            prop_assert_eq!(lora_tests::values(&read.to_dtype(DType::F64).unwrap()), lora_tests::values(&tensor.to_dtype(DType::F64).unwrap()));
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn settings_are_read_back(
        name in "[a-zA-Z0-9 _.-]{1,10}[a-z]", dim in 1usize..200, alpha in 0.01f64..64.0, rate in 1e-7f64..1.0,
        steps in 1usize..100_000, warmup in prop::option::of(0u64..1000), comment in prop::option::of("[ -~é漢\\n]{0,20}"),
        flags: [bool; 4], seed: u32, args in prop::collection::vec("[a-z_]{1,8}=[0-9.,]{1,6}", 0..4),
    ) {
        let config = TrainConfig {
            pretrained_model_name_or_path: Some("model file.safetensors".into()),
            train_data_dir: Some("pictures".into()),
            output_dir: Some("out".into()),
            output_name: Some(name),
            network_dim: Some(dim),
            network_alpha: alpha,
            learning_rate: Some(rate),
            max_train_steps: steps,
            lr_warmup_steps: warmup.map(|n| Steps::Count(n as _)),
            training_comment: comment,
            shuffle_caption: flags[0],
            cache_latents: flags[1],
            flip_aug: flags[2],
            save_state: flags[3],
            seed: Some(u64::from(seed)),
            optimizer_args: args,
            ..TrainConfig::default()
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        std::fs::write(&path, config.to_toml().unwrap()).unwrap();
        let again = TrainConfig::from_settings(&read_config(&path).unwrap().settings).unwrap();
        prop_assert_eq!(again, config);
    }

    #[test]
    fn parameters_texts_are_read_back(
        prompt in "[a-z(][a-z ,():<>0-9.]{0,30}[a-z)]", negative in "([a-z][a-z ,()]{0,20}[a-z])?",
        steps in 1usize..200, seed: u32, model in "[a-zA-Z0-9_.-]{1,10}|[a-z], [a-z:]{1,5}",
    ) {
        let parameters = [
            ("Steps", steps.to_string()),
            ("Sampler", "Euler a".to_string()),
            ("Seed", seed.to_string()),
            ("Model", model.clone()),
        ];
        let read = Infotext::parse(&infotext(&prompt, &negative, &parameters));
        prop_assert_eq!((read.prompt, read.negative), (prompt, negative));
        for (key, value) in parameters {
            prop_assert_eq!(read.parameters.get(key), Some(&value));
        }
    }
}
