//! Files of every family that the golden data does not hold: older layouts, damaged
//! parts, options that stand beside the file.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module;
use lora_core::format::write_tensors;
use lora_core::{
    Adaptable, AdapterConfig, AdapterSet, BaseLayer, Component, Family, Layer, LayerOp, Targets,
};
use rand::SeedableRng;

type Parts = Vec<(&'static str, Tensor)>;

/// Values that differ from each other, in a shape.
fn counting(dims: &[usize]) -> Tensor {
    let n: usize = dims.iter().product();
    let values: Vec<f32> = (0..n).map(|i| 0.1 * (i + 1) as f32).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn write(path: &Path, prefix: &str, parts: &Parts) {
    let tensors: BTreeMap<String, Tensor> = parts
        .iter()
        .map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone()))
        .collect();
    write_tensors(path, &tensors, &BTreeMap::new()).unwrap();
}

fn load(prefix: &str, parts: &Parts) -> lora_core::Result<AdapterSet> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file.safetensors");
    write(&path, prefix, parts);
    AdapterSet::load(&path, &Device::Cpu)
}

fn delta(set: &AdapterSet, base: &Tensor) -> Vec<f32> {
    let (_, adapter) = set.iter().next().unwrap();
    let delta = adapter.delta(base, 1.0).unwrap();
    delta.flatten_all().unwrap().to_vec1().unwrap()
}

const LAYER: &str = "lora_unet_layer.";

/// One sound file per family, for a weight of 4 outputs and 4 inputs.
fn samples() -> Vec<(Family, Parts)> {
    let number = |v: f32| Tensor::new(v, &Device::Cpu).unwrap();
    let lora = vec![
        ("lora_down.weight", counting(&[2, 4])),
        ("lora_up.weight", counting(&[4, 2])),
        ("alpha", number(1.0)),
    ];
    let mut dora = lora.clone();
    dora.push(("dora_scale", counting(&[4, 1])));
    vec![
        (Family::Lora, lora),
        (Family::Dora, dora),
        (
            Family::Loha,
            vec![
                ("hada_w1_a", counting(&[4, 2])),
                ("hada_w1_b", counting(&[2, 4])),
                ("hada_w2_a", counting(&[4, 2])),
                ("hada_w2_b", counting(&[2, 4])),
                ("alpha", number(1.0)),
            ],
        ),
        (
            Family::Lokr,
            vec![
                ("lokr_w1", counting(&[2, 2])),
                ("lokr_w2_a", counting(&[2, 1])),
                ("lokr_w2_b", counting(&[1, 2])),
                ("alpha", number(1.0)),
            ],
        ),
        (
            Family::Ia3,
            vec![
                ("weight", counting(&[4])),
                ("on_input", Tensor::new(1i64, &Device::Cpu).unwrap()),
            ],
        ),
        (
            Family::Glora,
            vec![
                ("a1.weight", counting(&[4, 2])),
                ("a2.weight", counting(&[2, 4])),
                ("b1.weight", counting(&[4, 2])),
                ("b2.weight", counting(&[2, 4])),
                ("alpha", number(1.0)),
            ],
        ),
        (
            Family::Oft,
            vec![
                ("oft_blocks", counting(&[2, 2, 2])),
                ("rescale", counting(&[4, 1])),
                ("alpha", number(0.5)),
            ],
        ),
        (
            Family::Boft,
            vec![
                ("oft_blocks", counting(&[2, 2, 2, 2])),
                ("rescale", counting(&[4, 1])),
                ("alpha", number(0.0)),
            ],
        ),
        (
            Family::Full,
            vec![("diff", counting(&[4, 4])), ("diff_b", counting(&[4]))],
        ),
        (
            Family::Norm,
            vec![("w_norm", counting(&[4])), ("b_norm", counting(&[4]))],
        ),
    ]
}

#[test]
fn families_are_detected_and_written_back() {
    let folder = tempfile::tempdir().unwrap();
    for (family, parts) in samples() {
        let set = load(LAYER, &parts).unwrap();
        let (_, adapter) = set.iter().next().unwrap();
        assert_eq!(adapter.family(), family);
        let path = folder.path().join("again.safetensors");
        set.save(&path, &Default::default()).unwrap();
        let again = AdapterSet::load(&path, &Device::Cpu).unwrap();
        let base = match family {
            Family::Norm => counting(&[4]),
            _ => counting(&[4, 4]),
        };
        assert_eq!(delta(&set, &base), delta(&again, &base), "{family}");
        assert_eq!(
            set.params().len(),
            0,
            "{family}: loaded for inference, nothing to train"
        );
        assert!(
            !set.trainable().unwrap().params().is_empty(),
            "{family}: trainable"
        );
    }
}

#[test]
fn missing_and_misshapen_parts_never_panic() {
    let shapes: [&[usize]; 12] = [
        &[],
        &[0],
        &[1],
        &[4],
        &[0, 4],
        &[4, 0],
        &[1, 1],
        &[3, 5],
        &[2, 2, 2],
        &[1, 4, 1, 1],
        &[2, 3, 2, 2],
        &[1, 1, 1, 1, 1],
    ];
    let weights: [&[usize]; 4] = [&[4], &[4, 4], &[4, 4, 3, 3], &[1, 1]];
    let probe = |parts: &Parts| {
        let Ok(set) = load(LAYER, parts) else { return };
        for (_, adapter) in set.iter() {
            for dims in weights {
                if adapter.check("layer", dims).is_ok() {
                    // An error is as good as a delta; a panic is not.
                    drop(adapter.delta(&counting(dims), 0.5));
                    drop(adapter.bias_delta(Some(&counting(&dims[..1])), 0.5));
                }
            }
        }
    };
    for (_, parts) in samples() {
        for i in 0..parts.len() {
            let mut fewer = parts.clone();
            fewer.remove(i);
            probe(&fewer);
            for shape in shapes {
                let mut other = parts.clone();
                other[i].1 = counting(shape);
                probe(&other);
            }
        }
    }
}

#[test]
fn unknown_parts_are_named() {
    for (family, mut parts) in samples() {
        parts.push(("surplus", counting(&[1])));
        let error = load(LAYER, &parts).unwrap_err().to_string();
        assert!(error.contains("surplus"), "{family}: {error}");
        assert!(error.contains("lora_unet_layer"), "{family}: {error}");
    }
}

#[test]
fn old_glora_is_the_new_one_with_pairs_swapped() {
    let (a1, a2) = (counting(&[3, 2]), counting(&[2, 3]));
    let (b1, b2) = (counting(&[4, 2]), counting(&[2, 3]));
    let base = counting(&[4, 3]);
    let new = load(
        LAYER,
        &vec![
            ("a1.weight", a1.clone()),
            ("a2.weight", a2.clone()),
            ("b1.weight", b1.clone()),
            ("b2.weight", b2.clone()),
        ],
    );
    let old = load(
        LAYER,
        &vec![
            ("a1.weight", a2),
            ("a2.weight", a1),
            ("b1.weight", b2),
            ("b2.weight", b1),
        ],
    );
    assert_eq!(delta(&new.unwrap(), &base), delta(&old.unwrap(), &base));
}

#[test]
fn a_bias_change_beside_any_family() {
    let base = || BaseLayer::new(counting(&[4, 4]), Some(counting(&[4])), LayerOp::Linear);
    let x = counting(&[2, 4]);
    let change = [1f32, -2., 3., 0.5];
    for (family, mut parts) in samples() {
        if matches!(family, Family::Full | Family::Norm) {
            continue;
        }
        let alone = load(LAYER, &parts).unwrap();
        parts.push(("diff_b", Tensor::new(&change, &Device::Cpu).unwrap()));
        let both = load(LAYER, &parts).unwrap();
        assert_eq!(both.parameter_count(), alone.parameter_count() + 4);
        let output = |mut set: AdapterSet| {
            let mut model = Model::new();
            model.fc = Layer::new("layer", base());
            set.attach(&mut model, 0.5).unwrap().strict().unwrap();
            model.fc.forward(&x).unwrap().to_vec2::<f32>().unwrap()
        };
        let (alone, both) = (output(alone), output(both));
        for (a, b) in alone.iter().zip(&both) {
            for ((a, b), change) in a.iter().zip(b).zip(change) {
                assert!((b - a - 0.5 * change).abs() < 1e-4, "{family}: {a} {b}");
            }
        }
    }
}

#[test]
fn oft_diag_holds_rotations() {
    // A quarter turn: rows are multiplied by its transpose.
    let turn = Tensor::new(&[[[0f32, -1.], [1., 0.]]], &Device::Cpu).unwrap();
    let set = load(LAYER, &vec![("oft_diag", turn)]).unwrap();
    let base = Tensor::new(&[[1f32], [2.]], &Device::Cpu).unwrap();
    assert_eq!(delta(&set, &base), [1., -3.]);
}

#[test]
fn peft_scales_come_from_the_config_beside_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter_model.safetensors");
    let parts = vec![
        (
            "lora_A.weight",
            Tensor::ones((2, 1), DType::F32, &Device::Cpu).unwrap(),
        ),
        (
            "lora_B.weight",
            Tensor::ones((1, 2), DType::F32, &Device::Cpu).unwrap(),
        ),
    ];
    write(&path, "base_model.model.mid_block.attn1.to_q.", &parts);
    let error = AdapterSet::load(&path, &Device::Cpu)
        .unwrap_err()
        .to_string();
    assert!(error.contains("adapter_config.json"), "{error}");

    let base = Tensor::zeros((1, 1), DType::F32, &Device::Cpu).unwrap();
    for (config, want) in [
        (r#"{"r": 2, "lora_alpha": 6}"#, 6.0),
        (
            r#"{"r": 2, "lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 2}}"#,
            2.0,
        ),
        (
            r#"{"r": 2, "lora_alpha": 6, "alpha_pattern": {"1.to_q": 2}}"#,
            6.0,
        ),
        (
            r#"{"r": 2, "lora_alpha": 6, "alpha_pattern": {"^attn1.to_q": 2}}"#,
            6.0,
        ),
        (
            r#"{"r": 2, "lora_alpha": 2, "use_rslora": true}"#,
            2.0 * 2f32.sqrt(),
        ),
    ] {
        std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
        let set = AdapterSet::load(&path, &Device::Cpu).unwrap();
        assert_eq!(
            set.names().collect::<Vec<_>>(),
            ["lora_unet_mid_block_attn1_to_q"]
        );
        let got = delta(&set, &base)[0];
        assert!((got - want).abs() < 1e-6, "{config}: {got}, wanted {want}");
    }
    for config in ["[]", "{", r#"{"lora_alpha": "many"}"#] {
        std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
        assert!(AdapterSet::load(&path, &Device::Cpu).is_err(), "{config}");
    }
}

#[test]
fn a_part_named_twice_is_an_error() {
    let parts: Parts = vec![
        ("lora_unet_layer.alpha", counting(&[])),
        ("lycoris_layer.alpha", counting(&[])),
    ];
    let error = load("", &parts).unwrap_err().to_string();
    assert!(error.contains("second key"), "{error}");
}

/// A linear layer and a norm.
struct Model {
    fc: Layer,
    norm: Layer,
}

impl Model {
    fn new() -> Self {
        let base =
            |dims: &[usize], op| BaseLayer::new(counting(dims), Some(counting(&dims[..1])), op);
        Self {
            fc: Layer::new("fc", base(&[8, 6], LayerOp::Linear)),
            norm: Layer::new("norm", base(&[6], LayerOp::LayerNorm { eps: 1e-5 })),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        self.fc.forward(&self.norm.forward(x).unwrap()).unwrap()
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
        visit(&mut self.fc)?;
        visit(&mut self.norm)
    }
}

#[test]
fn fresh_adapters_change_nothing_and_have_gradients() {
    let x = counting(&[2, 6]);
    let plain = Model::new().forward(&x).to_vec2::<f32>().unwrap();
    let decomposed = |family| AdapterConfig {
        family,
        weight_decompose: true,
        ..Default::default()
    };
    let mut configs: Vec<AdapterConfig> = samples()
        .into_iter()
        .map(|(family, _)| AdapterConfig {
            family,
            rescaled: true,
            constraint: 0.1,
            train_norm: true,
            ..Default::default()
        })
        .collect();
    configs.extend([Family::Lora, Family::Loha, Family::Lokr].map(decomposed));
    configs.push(AdapterConfig {
        wd_on_output: false,
        ..decomposed(Family::Lora)
    });
    for config in configs {
        let mut model = Model::new();
        let mut rng = rand_chacha::ChaCha12Rng::seed_from_u64(7);
        let targets = Targets::new(&["fc", "norm"]).unwrap();
        let mut set = AdapterSet::create(&mut model, &config, &targets, &mut rng).unwrap();
        set.attach(&mut model, 1.0).unwrap().strict().unwrap();
        let y = model.forward(&x);
        let got = y.to_vec2::<f32>().unwrap();
        for (a, b) in got.iter().flatten().zip(plain.iter().flatten()) {
            assert!((a - b).abs() < 1e-4, "{config:?}: {a}, was {b}");
        }
        let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        for (name, var) in set.params() {
            assert!(grads.get(&var).is_some(), "{config:?}: {name}");
        }
        set.scale_norms(1.0).unwrap();
    }
}

/// Every family's branch is the layer's operation with its delta, in convolutions of groups
/// too, whose weights see a part of the inputs only.
#[test]
fn branches_agree_with_deltas() {
    use lora_core::Conv2dParams;
    let grouped = LayerOp::Conv2d(Conv2dParams {
        padding: 1,
        groups: 2,
        ..Default::default()
    });
    let strided = LayerOp::Conv2d(Conv2dParams {
        stride: 2,
        padding: 2,
        dilation: 2,
        ..Default::default()
    });
    for (op, weight, x) in [
        (LayerOp::Linear, &[4usize, 4][..], &[2usize, 3, 4][..]),
        (strided, &[4, 4, 3, 3], &[2, 4, 7, 6]),
        (grouped, &[4, 4, 3, 3], &[2, 8, 7, 6]),
    ] {
        let layer = BaseLayer::new(counting(weight), Some(counting(&[4])), op);
        let x = Var::from_tensor(&counting(x)).unwrap();
        for config in samples().into_iter().map(|(family, _)| AdapterConfig {
            family,
            rank: 2,
            conv_rank: Some(2),
            use_tucker: family == Family::Loha,
            factor: 2,
            ..Default::default()
        }) {
            if config.family == Family::Norm {
                continue;
            }
            let mut model = Model::new();
            model.fc = Layer::new("fc", layer.clone());
            let mut rng = rand_chacha::ChaCha12Rng::seed_from_u64(7);
            let targets = Targets::new(&["fc"]).unwrap();
            let set = AdapterSet::create(&mut model, &config, &targets, &mut rng).unwrap();
            let (_, adapter) = set.iter().next().unwrap();
            // Away from the start, where there is nothing to see.
            let adapter = adapter
                .map(&mut |t| {
                    let moved = (t.detach() + (counting(t.dims()) * 0.3)?)?;
                    Ok(Var::from_tensor(&moved)?.into_inner())
                })
                .unwrap();
            adapter.check("fc", weight).unwrap();
            let got = adapter.branch(&x, &layer, 0.7, None).unwrap();
            let delta = adapter.delta(&layer.weight, 0.7).unwrap();
            let bias = adapter.bias_delta(layer.bias.as_ref(), 0.7).unwrap();
            let want = op.apply(&x, &delta, bias.as_ref()).unwrap();
            assert_eq!(got.dims(), want.dims(), "{config:?}");
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let size = flat(&want).iter().fold(0f32, |m, v| m.max(v.abs()));
            for (g, w) in flat(&got).iter().zip(flat(&want)) {
                assert!((g - w).abs() <= 1e-5 * size, "{op:?} {config:?}: {g} {w}");
            }
            let grads = |y: &Tensor| {
                let loss = (y * counting(y.dims())).unwrap().sum_all().unwrap();
                loss.backward().unwrap()
            };
            let (got, want) = (grads(&got), grads(&want));
            let factors = adapter.factors().into_iter();
            for (name, leaf) in factors.chain([("x", x.as_tensor())]) {
                let (Some(got), Some(want)) = (got.get(leaf), want.get(leaf)) else {
                    assert!(
                        got.get(leaf).is_none() && want.get(leaf).is_none(),
                        "{name}"
                    );
                    continue;
                };
                let size = flat(want).iter().fold(1e-3f32, |m, v| m.max(v.abs()));
                for (g, w) in flat(got).iter().zip(flat(want)) {
                    let what = format!("{op:?} {config:?} {name}: {g} {w}");
                    assert!((g - w).abs() <= 1e-4 * size, "{what}");
                }
            }
        }
    }
}

/// Values around zero that follow no plane, in a shape.
fn wavy(dims: &[usize]) -> Tensor {
    let n: usize = dims.iter().product();
    let values: Vec<f32> = (0..n)
        .map(|i| (i as f32 * 1.7 + (i as f32).sqrt()).sin())
        .collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

/// LoHa and DoRA as low-rank branches of the layer's own product: outputs and gradients are
/// those of the operation with weight plus delta.
#[test]
fn low_rank_shortcuts_agree_with_deltas() {
    use lora_core::{DoraMultiplier, Reading};
    let conv = LayerOp::Conv2d(lora_core::Conv2dParams {
        padding: 1,
        ..Default::default()
    });
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let layers = [
        (LayerOp::Linear, vec![40, 36], vec![2, 5, 36]),
        (conv, vec![24, 20, 3, 3], vec![2, 20, 4, 5]),
    ];
    let families = [
        (Family::Loha, false, false),
        (Family::Loha, true, false),
        (Family::Lora, false, true),
        (Family::Loha, false, true),
    ];
    let readings = [
        DoraMultiplier::Interpolate,
        DoraMultiplier::Lycoris,
        DoraMultiplier::ScaleInside,
        DoraMultiplier::BaseNorm,
    ];
    for ((op, dims, input), dtype) in layers
        .iter()
        .flat_map(|layer| [DType::F32, DType::BF16].map(|dtype| (layer, dtype)))
    {
        let weight = (wavy(dims) * 0.1).unwrap().to_dtype(dtype).unwrap();
        let wide = weight.to_dtype(DType::F32).unwrap();
        let base = BaseLayer::new(weight, Some(wavy(&dims[..1])), *op);
        let x = Var::from_tensor(&wavy(input)).unwrap();
        for ((family, use_tucker, weight_decompose), dora) in
            families.iter().flat_map(|f| readings.map(|r| (*f, r)))
        {
            if !weight_decompose && dora != DoraMultiplier::Interpolate {
                continue;
            }
            let config = AdapterConfig {
                family,
                rank: 2,
                alpha: 1.0,
                conv_rank: Some(2),
                use_tucker,
                weight_decompose,
                ..Default::default()
            };
            let what =
                format!("{op:?} {dtype:?} {family} {use_tucker} {weight_decompose} {dora:?}");
            let mut model = Model::new();
            model.fc = Layer::new("fc", base.clone());
            let mut rng = rand_chacha::ChaCha12Rng::seed_from_u64(7);
            let targets = Targets::new(&["fc"]).unwrap();
            let mut set = AdapterSet::create(&mut model, &config, &targets, &mut rng).unwrap();
            set.set_reading(&Reading {
                dora,
                ..Default::default()
            });
            set.attach(&mut model, 1.0).unwrap().strict().unwrap();
            let (_, adapter) = set.iter().next().unwrap();
            for (_, var) in adapter.vars() {
                // Away from the start, where there is nothing to see.
                let t = var.as_detached_tensor();
                let moved = (&t + (wavy(t.dims()) * 0.03).unwrap()).unwrap();
                var.set(&moved).unwrap();
            }
            for multiplier in [1.0, 0.7] {
                let product = adapter.low_rank(&x, &base, multiplier, None).unwrap();
                assert!(product.is_some() || multiplier != 1.0, "{what}");
                set.set_multiplier(&Component::Unet, multiplier);
                let y = model.fc.forward(&x).unwrap();
                let shape = y.dims().to_vec();
                let residual = wavy(&shape);
                let shift = wavy(&[shape[0], dims[0]]);
                let shift = matches!(op, LayerOp::Conv2d(_)).then_some(&shift);
                let got = model.fc.forward_added(&x, shift, Some(&residual)).unwrap();
                let changed = (&wide + adapter.delta(&wide, multiplier).unwrap()).unwrap();
                let mut want = op.apply(&x, &changed, base.bias.as_ref()).unwrap();
                if let Some(shift) = shift {
                    let shift = shift.reshape((shape[0], dims[0], 1, 1)).unwrap();
                    want = want.broadcast_add(&shift).unwrap();
                }
                let want = (want + &residual).unwrap();
                let compare = |name: &str, got: &Tensor, want: &Tensor| {
                    let size = flat(want).iter().fold(1e-3f32, |m, v| m.max(v.abs()));
                    for (g, w) in flat(got).iter().zip(flat(want)) {
                        let close = (g - w).abs() <= 2e-5 * size;
                        assert!(close, "{what} at {multiplier}, {name}: {g} {w}");
                    }
                };
                compare("output", &got, &want);
                let grads = |y: &Tensor| {
                    let loss = (y * wavy(y.dims())).unwrap().sum_all().unwrap();
                    loss.backward().unwrap()
                };
                let (got, want) = (grads(&got), grads(&want));
                for (name, leaf) in adapter.factors().into_iter().chain([("x", x.as_tensor())]) {
                    compare(name, got.get(leaf).unwrap(), want.get(leaf).unwrap());
                }
            }
        }
    }
}
