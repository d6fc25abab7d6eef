//! A GPU computes what the CPU does: operations with their gradients, optimizers, adapters of
//! every family, a training run and a picture.
//!
//! `cargo test --release -p lora-tests --features cuda --test gpu`, or `--features metal`, on a
//! machine that has one; without either feature there is nothing here.
#![cfg(any(feature = "cuda", feature = "metal"))]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device, Result, Tensor, Var};
use lora_core::AdapterSet;
use lora_examples::portraits::draw;
use lora_examples::{demo_config, demo_model};
use lora_kernels::{
    Added, Compute, Conv2dParams, attention, conv2d, conv2d_added, geglu, group_norm, layer_norm,
    linear, linear_added, silu, upsample_nearest2x,
};
use lora_optim::{ParamGroup, kohya::from_kohya};
use lora_sd15::StableDiffusion;
use lora_train::{Event, Outcome, TrainConfig, Trainer};
use rand::{Rng, SeedableRng, rngs::StdRng};

fn gpu() -> Device {
    let device = match cfg!(feature = "cuda") {
        true => Device::new_cuda(0),
        false => Device::new_metal(0),
    };
    device.expect("built for a GPU, and none answers")
}

fn noise(dims: &[usize], seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values = (0..dims.iter().product()).map(|_| rng.random::<f32>() * 2.0 - 1.0);
    Tensor::from_vec(values.collect::<Vec<f32>>(), dims, &Device::Cpu).unwrap()
}

/// Largest difference as a share of the largest value.
fn distance(a: &Tensor, b: &Tensor) -> f32 {
    let on_cpu = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F32);
    let (a, b) = (on_cpu(a).unwrap(), on_cpu(b).unwrap());
    assert_eq!(a.dims(), b.dims());
    let largest = |t: &Tensor| {
        let values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|v| v.is_finite()));
        values.into_iter().map(f32::abs).fold(0.0, f32::max)
    };
    largest(&(&a - &b).unwrap()) / largest(&a).max(1e-6)
}

/// Inputs: shape, and whether it is trained.
type Inputs<'a> = &'a [(&'a [usize], bool)];

/// Result and gradients on one device.
fn evaluated(
    device: &Device,
    inputs: Inputs<'_>,
    f: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) -> Vec<Tensor> {
    let mut vars = Vec::new();
    let tensors: Vec<Tensor> = inputs
        .iter()
        .enumerate()
        .map(|(i, (dims, trained))| {
            let tensor = noise(dims, i as u64).to_device(device).unwrap();
            match trained {
                true => {
                    let var = Var::from_tensor(&tensor).unwrap();
                    vars.push(var.clone());
                    var.into_inner()
                }
                false => tensor,
            }
        })
        .collect();
    let y = f(&tensors).unwrap();
    let weights = noise(y.dims(), 99).to_device(device).unwrap();
    let loss = (&y * weights).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    let gradients = vars.iter().map(|v| grads.get(v).unwrap().clone());
    std::iter::once(y).chain(gradients).collect()
}

fn agrees(name: &str, tolerance: f32, inputs: Inputs<'_>, f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let cpu = evaluated(&Device::Cpu, inputs, &f);
    let there = evaluated(&gpu(), inputs, &f);
    for (i, (cpu, there)) in cpu.iter().zip(&there).enumerate() {
        let error = distance(cpu, there);
        assert!(
            error < tolerance,
            "{name}, output or gradient {i}: {error:e}"
        );
    }
}

#[test]
fn layers() {
    for (compute, tolerance) in [(Compute::F32, 2e-5), (Compute::Bf16, 3e-2)] {
        agrees(
            "linear",
            tolerance,
            &[
                (&[2, 77, 48], true),
                (&[40, 48], false),
                (&[40], false),
                (&[2, 77, 4], true),
                (&[40, 4], true),
                (&[2, 77, 40], true),
            ],
            |t| {
                let added = Added {
                    low_rank: &[(t[3].clone(), t[4].clone())],
                    residual: Some(&t[5]),
                    shift: None,
                };
                linear_added(&t[0], &t[1], Some(&t[2]), compute, &added)
            },
        );
        for (kernel, stride) in [(3, 1), (3, 2), (1, 1)] {
            let (h, w) = (12usize, 10usize);
            let (oh, ow) = (h.div_ceil(stride), w.div_ceil(stride));
            agrees(
                &format!("conv2d {kernel}x{kernel} / {stride}"),
                tolerance,
                &[
                    (&[2, 16, h, w], true),
                    (&[24, 16, kernel, kernel], false),
                    (&[24], false),
                    (&[2, 4, oh, ow], true),
                    (&[24, 4], true),
                    (&[2, 24, oh, ow], true),
                    (&[2, 24], true),
                ],
                |t| {
                    let added = Added {
                        low_rank: &[(t[3].clone(), t[4].clone())],
                        residual: Some(&t[5]),
                        shift: Some(&t[6]),
                    };
                    let params = Conv2dParams {
                        stride,
                        padding: kernel / 2,
                        ..Conv2dParams::default()
                    };
                    conv2d_added(&t[0], &t[1], Some(&t[2]), params, compute, &added)
                },
            );
        }
        for causal in [false, true] {
            agrees(
                "attention",
                tolerance,
                &[
                    (&[2, 33, 32], true),
                    (&[2, 33, 32], true),
                    (&[2, 33, 32], true),
                ],
                |t| attention(&t[0], &t[1], &t[2], 4, causal, compute),
            );
        }
    }
    let trained = [
        (&[2usize, 9, 48][..], true),
        (&[40, 48], true),
        (&[40], true),
    ];
    agrees("trained linear", 2e-5, &trained, |t| {
        linear(&t[0], &t[1], Some(&t[2]))
    });
    for (stride, padding) in [(1, 1), (2, 1), (2, 0)] {
        let inputs = [
            (&[2usize, 8, 12, 9][..], true),
            (&[6, 8, 3, 3], true),
            (&[6], true),
        ];
        agrees("trained conv2d", 2e-5, &inputs, |t| {
            let params = Conv2dParams {
                stride,
                padding,
                ..Conv2dParams::default()
            };
            conv2d(&t[0], &t[1], Some(&t[2]), params)
        });
    }
}

#[test]
fn norms_and_activations() {
    let norm = [(&[2usize, 7, 32][..], true), (&[32], false), (&[32], false)];
    agrees("layer_norm", 1e-4, &norm, |t| {
        layer_norm(&t[0], &t[1], &t[2], 1e-5)
    });
    for trained in [false, true] {
        let norm = [
            (&[2usize, 32, 6, 5][..], true),
            (&[32], trained),
            (&[32], trained),
        ];
        agrees("group_norm", 1e-4, &norm, |t| {
            group_norm(&t[0], &t[1], &t[2], 8, 1e-5, true)
        });
    }
    agrees("silu", 2e-5, &[(&[5, 40], true)], |t| silu(&t[0]));
    agrees("geglu", 2e-5, &[(&[2, 5, 64], true)], |t| geglu(&t[0]));
    agrees("upsample", 2e-5, &[(&[2, 3, 4, 5], true)], |t| {
        upsample_nearest2x(&t[0])
    });
}

/// Parameters after some updates.
fn optimized(device: &Device, name: &str, arguments: &[String], lr: f64) -> Tensor {
    let start = noise(&[24, 16], 1).to_device(device).unwrap();
    let var = Var::from_tensor(&start).unwrap();
    let group = ParamGroup::new("unet", vec![("w".to_string(), var.clone())]);
    let mut optimizer = from_kohya(name, arguments, lr, vec![group]).unwrap();
    optimizer.set_training(true).unwrap();
    for step in 0..6 {
        let gradient = noise(&[24, 16], 10 + step).to_device(device).unwrap();
        let grads: BTreeMap<String, Tensor> = [("w".to_string(), gradient)].into();
        optimizer.step(&grads).unwrap();
    }
    optimizer.set_training(false).unwrap();
    var.as_detached_tensor()
}

#[test]
fn optimizers() {
    let list = [
        ("AdamW", 1e-2),
        ("AdamW8bit", 1e-2),
        ("Lion", 1e-2),
        ("Lion8bit", 1e-2),
        ("SGDNesterov", 1e-2),
        ("Prodigy", 1.0),
        ("DAdaptAdam", 1.0),
        ("DAdaptation", 1.0),
        ("AdaFactor", 1e-2),
        ("AdamWScheduleFree", 1e-2),
        ("RAdamScheduleFree", 1e-2),
        ("SGDScheduleFree", 1e-2),
        ("Adam", 1e-2),
        ("SGD", 1e-2),
        ("prodigyplus.ProdigyPlusScheduleFree", 1.0),
        ("came_pytorch.CAME", 1e-2),
    ];
    for (name, lr) in list {
        let cpu = optimized(&Device::Cpu, name, &[], lr);
        let error = distance(&cpu, &optimized(&gpu(), name, &[], lr));
        assert!(error < 1e-4, "{name}: {error:e}");
    }
}

fn train(
    device: &Device,
    folder: &Path,
    name: &str,
    dim: usize,
    arguments: &[&str],
) -> (AdapterSet, f64) {
    let mut losses = Vec::new();
    let mut observer = |event: &Event<'_>| {
        if let Event::Batch(batch) = event {
            losses.push(batch.loss);
        }
    };
    let config = TrainConfig {
        output_dir: Some(folder.into()),
        output_name: Some(name.into()),
        max_train_epochs: None,
        max_train_steps: 4,
        save_every_n_epochs: None,
        network_args: arguments.iter().map(|a| a.to_string()).collect(),
        network_dim: Some(dim),
        network_alpha: dim as f64,
        optimizer_type: "AdamW".into(),
        optimizer_args: vec![],
        learning_rate: Some(1e-3),
        ..demo_config()
    };
    let mut trainer = Trainer::new(config, device, &mut observer).unwrap();
    let outcome = trainer.run(&mut observer, &AtomicBool::new(false)).unwrap();
    let Outcome::Finished(path) = outcome else {
        panic!("stopped");
    };
    let mean = losses.iter().sum::<f64>() / losses.len() as f64;
    (AdapterSet::load(path, &Device::Cpu).unwrap(), mean)
}

#[test]
fn training_of_every_family_and_pictures_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let families: [(&str, usize, &[&str]); 11] = [
        ("lora", 4, &["algo=locon", "preset=attn-mlp"]),
        ("locon", 4, &["algo=locon", "conv_dim=2"]),
        ("dora", 4, &["algo=locon", "dora_wd=True"]),
        // As a low-rank branch, and by its delta.
        ("loha2", 2, &["algo=loha"]),
        ("loha", 16, &["algo=loha"]),
        ("lokr", 4, &["algo=lokr", "factor=4"]),
        ("ia3", 4, &["algo=ia3"]),
        ("glora", 4, &["algo=glora"]),
        ("boft", 8, &["algo=boft"]),
        ("oft", 8, &["algo=diag-oft"]),
        ("full", 4, &["algo=full"]),
    ];
    let gpu = gpu();
    let load = |device: &Device| StableDiffusion::load(demo_model(), DType::F32, device).unwrap();
    let (mut here, mut there) = (load(&Device::Cpu), load(&gpu));
    for (name, dim, arguments) in families {
        let (cpu, cpu_loss) = train(
            &Device::Cpu,
            folder.path(),
            &format!("{name}-cpu"),
            dim,
            arguments,
        );
        let there_too = format!("{name}-gpu");
        let (_, gpu_loss) = train(&gpu, folder.path(), &there_too, dim, arguments);
        let error = (gpu_loss / cpu_loss - 1.0).abs();
        assert!(
            error < 1e-3,
            "{name}: loss {cpu_loss} on the CPU, {gpu_loss} on the GPU"
        );

        here.add_adapter(name, cpu);
        let file = folder.path().join(format!("{name}-cpu.safetensors"));
        there.add_adapter(name, AdapterSet::load(&file, &gpu).unwrap());
        let prompt = format!("zoe, portrait <lora:{name}:1>");
        let pictures = [&mut here, &mut there].map(|sd| draw(sd, &prompt, 1).unwrap());
        let [a, b] = pictures.each_ref().map(|p| &p.rgb);
        let difference = a
            .iter()
            .zip(b)
            .map(|(a, b)| a.abs_diff(*b) as f64)
            .sum::<f64>();
        let difference = difference / a.len() as f64;
        assert!(
            difference < 1.0,
            "{name}: pictures differ by {difference:.2} of 255"
        );
    }
}
