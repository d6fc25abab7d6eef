//! What is refused, and in which words: before any long work, without touching
//! existing files.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use lora_core::format::{TensorFile, write_tensors};
use lora_core::{AdapterSet, Component, Lora};
use lora_sd15::sampler::SigmaSchedule;
use lora_sd15::{Checkpoint, Hires, Part, SamplerKind, StableDiffusion, Txt2Img};
use lora_tests::golden_path;
use lora_train::{Event, Settings, TrainConfig, Trainer};

fn config(folder: &Path) -> TrainConfig {
    TrainConfig {
        pretrained_model_name_or_path: Some(golden_path("sd15", "mini_ldm.safetensors")),
        train_data_dir: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo")),
        output_dir: Some(folder.join("out")),
        resolution: "64".into(),
        min_bucket_reso: 64,
        max_train_steps: 1,
        ..TrainConfig::default()
    }
}

/// The message with which a run is refused.
fn refusal(config: TrainConfig) -> String {
    Trainer::new(config, &Device::Cpu, &mut |_: &Event<'_>| {})
        .map(|_| ())
        .expect_err("a refusal")
        .to_string()
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is missing in: {message}");
    }
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn tensor(dims: &[usize]) -> Tensor {
    Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap()
}

fn file(folder: &Path, name: &str, keys: &[(&str, &[usize])]) -> PathBuf {
    let path = folder.join(name);
    let tensors = keys
        .iter()
        .map(|(key, dims)| (key.to_string(), tensor(dims)))
        .collect();
    write_tensors(&path, &tensors, &Default::default()).unwrap();
    path
}

#[test]
fn folders_without_pictures() {
    let dir = folder();
    std::fs::create_dir_all(dir.path().join("img/notes")).unwrap();
    std::fs::write(dir.path().join("img/notes/readme.md"), "x").unwrap();
    let message = refusal(TrainConfig {
        train_data_dir: Some(dir.path().join("img")),
        ..config(dir.path())
    });
    assert_says(&message, &["img"]);
    let missing = refusal(TrainConfig {
        train_data_dir: Some(dir.path().join("absent")),
        ..config(dir.path())
    });
    assert_says(&missing, &["absent"]);
}

#[test]
fn pictures_that_do_not_decode_are_named_and_skipped() {
    let dir = folder();
    let img = dir.path().join("img/1_x");
    std::fs::create_dir_all(&img).unwrap();
    std::fs::write(img.join("broken.png"), b"not a picture").unwrap();
    let message = refusal(TrainConfig {
        train_data_dir: Some(dir.path().join("img")),
        ..config(dir.path())
    });
    assert_says(&message, &["broken.png"]);

    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo/10_zoe/zoe_01.png");
    std::fs::copy(demo, img.join("good.png")).unwrap();
    let mut warnings = Vec::new();
    let mut observer = |event: &Event<'_>| {
        if let Event::Warning(text) = event {
            warnings.push(text.to_string());
        }
    };
    let config = TrainConfig {
        train_data_dir: Some(dir.path().join("img")),
        ..config(dir.path())
    };
    let trainer = Trainer::new(config, &Device::Cpu, &mut observer).unwrap();
    assert_eq!(trainer.plan().train_images, 1);
    assert!(
        warnings.iter().any(|w| w.contains("broken.png")),
        "{warnings:?}"
    );
}

#[test]
fn captions_that_are_not_text() {
    let dir = folder();
    let img = dir.path().join("img/1_x");
    std::fs::create_dir_all(&img).unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo/10_zoe/zoe_01.png");
    std::fs::copy(demo, img.join("a.png")).unwrap();
    std::fs::write(img.join("a.txt"), [0xff, 0xfe, 0x41, 0x00]).unwrap();
    let message = refusal(TrainConfig {
        train_data_dir: Some(dir.path().join("img")),
        ..config(dir.path())
    });
    assert_says(&message, &["a.txt", "UTF-8"]);
}

#[test]
fn settings_that_make_no_sense() {
    let dir = folder();
    let base = || config(dir.path());
    for (config, parts) in [
        (
            TrainConfig {
                max_train_steps: 0,
                ..base()
            },
            &["max_train_steps"][..],
        ),
        (
            TrainConfig {
                max_train_epochs: Some(0),
                ..base()
            },
            &["max_train_epochs"],
        ),
        (
            TrainConfig {
                resolution: "banana".into(),
                ..base()
            },
            &["resolution", "banana"],
        ),
        (
            TrainConfig {
                network_dim: Some(0),
                ..base()
            },
            &["rank"],
        ),
        (
            TrainConfig {
                network_module: Some("networks.dylora".into()),
                ..base()
            },
            &["networks.dylora", "networks.lora"],
        ),
        (
            TrainConfig {
                optimizer_type: "Adamm".into(),
                ..base()
            },
            &["Adamm", "AdamW"],
        ),
        (
            TrainConfig {
                lr_scheduler: "cosin".into(),
                ..base()
            },
            &["cosin", "cosine"],
        ),
        (
            TrainConfig {
                save_model_as: "ckpt".into(),
                ..base()
            },
            &["safetensors"],
        ),
        (
            TrainConfig {
                unet_lr: Some(0.0),
                text_encoder_lr: vec![0.0],
                ..base()
            },
            &["nothing is trained"],
        ),
        (
            TrainConfig {
                pretrained_model_name_or_path: None,
                ..base()
            },
            &["pretrained_model_name_or_path"],
        ),
    ] {
        assert_says(&refusal(config), parts);
    }
}

#[test]
fn options_that_are_not_supported_are_named() {
    let words = |line: &str| line.split(' ').map(str::to_string).collect::<Vec<_>>();
    let base = "--pretrained_model_name_or_path m --train_data_dir d --output_dir o";
    let (settings, _) =
        Settings::from_arguments(&words(&format!("{base} --initial_step 100"))).unwrap();
    assert_says(
        &TrainConfig::from_settings(&settings)
            .unwrap_err()
            .to_string(),
        &["initial_step", "resume"],
    );
    let (settings, _) = Settings::from_arguments(&words(&format!("{base} --xformers"))).unwrap();
    assert_eq!(settings.without_effect().len(), 1);
    TrainConfig::from_settings(&settings).unwrap();
}

#[test]
fn an_output_folder_that_cannot_be_written() {
    let dir = folder();
    std::fs::write(dir.path().join("out"), "a file where the folder should be").unwrap();
    assert_says(&refusal(config(dir.path())), &["out"]);
    assert_eq!(
        std::fs::read_to_string(dir.path().join("out")).unwrap(),
        "a file where the folder should be"
    );
}

#[test]
fn checkpoints_of_other_families() {
    let dir = folder();
    let unet = "model.diffusion_model.";
    let cases: [(&str, String, &[usize], &str); 6] = [
        ("xl", "conditioner.embedders.0.x".into(), &[1], "SDXL"),
        (
            "two",
            "cond_stage_model.model.ln_final.bias".into(),
            &[1],
            "2.x",
        ),
        (
            "flux",
            "double_blocks.0.img_attn.proj.weight".into(),
            &[1],
            "Flux",
        ),
        (
            "lora",
            "lora_unet_mid_block_x.lora_down.weight".into(),
            &[1],
            "adapter",
        ),
        (
            "vae",
            "first_stage_model.encoder.conv_in.weight".into(),
            &[1],
            "VAE",
        ),
        (
            "pix",
            format!("{unet}input_blocks.0.0.weight"),
            &[4, 8, 3, 3],
            "pix2pix",
        ),
    ];
    for (name, key, dims, says) in cases {
        let path = file(
            dir.path(),
            &format!("{name}.safetensors"),
            &[(key.as_str(), dims)],
        );
        let message = Checkpoint::open(&path)
            .map(|_| ())
            .expect_err(name)
            .to_string();
        assert_says(&message, &[says, name]);
    }
    std::fs::write(dir.path().join("old.ckpt"), b"PK\x03\x04........").unwrap();
    let message = Checkpoint::open(dir.path().join("old.ckpt"))
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert_says(&message, &["pickle", "safetensors"]);
}

#[test]
fn checkpoints_with_missing_extra_or_misshapen_tensors() {
    let dir = folder();
    let source = golden_path("sd15", "mini_ldm.safetensors");
    let all = TensorFile::open(&source).unwrap();
    let write =
        |name: &str, change: &dyn Fn(&str) -> Option<Tensor>, extra: &[(&str, &[usize])]| {
            let mut tensors = std::collections::BTreeMap::new();
            for key in all.names() {
                if let Some(tensor) = change(&key) {
                    tensors.insert(key, tensor);
                }
            }
            for (key, dims) in extra {
                tensors.insert(key.to_string(), tensor(dims));
            }
            let path = dir.path().join(name);
            write_tensors(&path, &tensors, &Default::default()).unwrap();
            std::fs::copy(source.with_extension("json"), path.with_extension("json")).unwrap();
            Checkpoint::open(&path)
                .unwrap()
                .verify(Part::Unet)
                .unwrap_err()
                .to_string()
        };
    let keep = |key: &str| Some(all.tensor(key, &Device::Cpu).unwrap());
    let bias = "model.diffusion_model.out.2.bias";
    let message = write(
        "missing.safetensors",
        &|k| if k == bias { None } else { keep(k) },
        &[],
    );
    assert_says(
        &message,
        &["missing.safetensors", "lacks 1 tensors", "conv_out.bias"],
    );
    let message = write(
        "extra.safetensors",
        &|k| keep(k),
        &[("model.diffusion_model.motion.weight", &[3])],
    );
    assert_says(
        &message,
        &["extra.safetensors", "motion.weight", "different model"],
    );
    let message = write(
        "shape.safetensors",
        &|k| {
            if k == bias {
                Some(tensor(&[7]))
            } else {
                keep(k)
            }
        },
        &[],
    );
    assert_says(&message, &["shape.safetensors", bias, "[7]", "[4]"]);
}

#[test]
fn adapters_for_other_models() {
    let dir = folder();
    let (down, up) = ("lora_down.weight", "lora_up.weight");
    let xl = file(
        dir.path(),
        "xl.safetensors",
        &[(&format!("lora_te2_x.{down}"), &[1, 2])],
    );
    let message = AdapterSet::load(&xl, &Device::Cpu).unwrap_err().to_string();
    assert_says(&message, &["xl.safetensors", "SDXL"]);

    let mut sd = StableDiffusion::load(
        golden_path("sd15", "mini_ldm.safetensors"),
        DType::F32,
        &Device::Cpu,
    )
    .unwrap();
    let layer = "lora_unet_input_nowhere";
    let path = file(
        dir.path(),
        "other.safetensors",
        &[
            (&format!("{layer}.{down}"), &[1, 2]),
            (&format!("{layer}.{up}"), &[2, 1]),
        ],
    );
    let mut set = AdapterSet::load(&path, &Device::Cpu).unwrap();
    assert_says(
        &set.attach(&mut sd.unet, 1.0).unwrap_err().to_string(),
        &[layer, "another architecture"],
    );

    // A layer that exists, of another width.
    let layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q";
    let path = file(
        dir.path(),
        "wide.safetensors",
        &[
            (&format!("{layer}.{down}"), &[1, 1280]),
            (&format!("{layer}.{up}"), &[1280, 1]),
        ],
    );
    let mut set = AdapterSet::load(&path, &Device::Cpu).unwrap();
    assert_says(
        &set.attach(&mut sd.unet, 1.0).unwrap_err().to_string(),
        &[layer, "1280", "48"],
    );
}

#[test]
fn adapter_files_with_damaged_or_strange_content() {
    let dir = folder();
    let load = |keys: &[(&str, &[usize])]| {
        let path = file(dir.path(), "a.safetensors", keys);
        AdapterSet::load(&path, &Device::Cpu)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    assert_says(
        &load(&[("lora_unet_a.lora_up.weight", &[2, 1])]),
        &["lora_unet_a", "lora_down.weight"],
    );
    assert_says(
        &load(&[
            ("lora_unet_a.lora_up.weight", &[2, 3]),
            ("lora_unet_a.lora_down.weight", &[4, 2]),
        ]),
        &["lora_unet_a", "lora_up.weight", "[2, 3]"],
    );
    assert_says(
        &load(&[
            ("lora_unet_a.lora_up.weight", &[2, 1]),
            ("lora_unet_a.lora_down.weight", &[1, 2]),
            ("lora_unet_a.extra", &[1]),
        ]),
        &["lora_unet_a", "extra"],
    );
    assert_says(&load(&[("weight", &[2, 1])]), &["no adapter"]);

    let good = file(
        dir.path(),
        "g.safetensors",
        &[
            ("lora_unet_a.lora_up.weight", &[2, 1]),
            ("lora_unet_a.lora_down.weight", &[1, 2]),
        ],
    );
    let bytes = std::fs::read(&good).unwrap();
    for cut in [0, 7, 8, 40, bytes.len() - 1] {
        std::fs::write(dir.path().join("cut.safetensors"), &bytes[..cut]).unwrap();
        let message = AdapterSet::load(dir.path().join("cut.safetensors"), &Device::Cpu)
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert_says(&message, &["cut.safetensors"]);
    }
}

#[test]
fn picture_sizes_and_prompts_that_cannot_be_drawn() {
    let mut sd = StableDiffusion::load(
        golden_path("sd15", "mini_ldm.safetensors"),
        DType::F32,
        &Device::Cpu,
    )
    .unwrap();
    let mut refuse = |request: Txt2Img| {
        sd.txt2img(&request, &mut |_| true)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    let base = || Txt2Img {
        width: 64,
        height: 64,
        steps: 1,
        ..Txt2Img::default()
    };
    assert_says(
        &refuse(Txt2Img {
            width: 100,
            ..base()
        }),
        &["100x64", "multiples of 8"],
    );
    assert_says(&refuse(Txt2Img { steps: 0, ..base() }), &["steps"]);
    assert_says(
        &refuse(Txt2Img {
            clip_skip: 0,
            ..base()
        }),
        &["clip_skip"],
    );
    assert_says(
        &refuse(Txt2Img {
            sampler: SamplerKind::Plms,
            schedule: Some(SigmaSchedule::Karras),
            ..base()
        }),
        &["schedule type", "Karras"],
    );
    assert_says(
        &refuse(Txt2Img {
            hires: Some(Hires {
                size: Some((100, 128)),
                ..Hires::default()
            }),
            ..base()
        }),
        &["100x128"],
    );
    assert_says(
        &refuse(Txt2Img {
            prompt: "<lora:nobody>".into(),
            ..base()
        }),
        &["nobody"],
    );
    assert_says(
        &refuse(Txt2Img {
            prompt: "<hypernet:x:1>".into(),
            ..base()
        }),
        &["hypernet"],
    );
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let dir = folder();
    let path = dir.path().join("a.safetensors");
    std::fs::write(&path, "old").unwrap();
    let result = lora_core::format::write_atomically(&path, |out| {
        out.write_all(b"half")?;
        Err(std::io::Error::other("disk full"))
    });
    assert_says(
        &result.unwrap_err().to_string(),
        &["a.safetensors", "disk full"],
    );
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        1,
        "no temporary file is left"
    );
}

#[test]
fn adapters_are_not_changed_by_a_failed_attachment() {
    let mut sd = StableDiffusion::load(
        golden_path("sd15", "mini_ldm.safetensors"),
        DType::F32,
        &Device::Cpu,
    )
    .unwrap();
    let good = Component::Unet.layer_name("mid_block.attentions.0.proj_in");
    let bad = Component::Unet.layer_name("mid_block.attentions.0.proj_out");
    let mut set = AdapterSet::default();
    let lora = |i: usize| Lora::new("x", tensor(&[1, i]), None, tensor(&[48, 1]), 1.0).unwrap();
    set.insert(good, std::sync::Arc::new(lora(48)));
    set.insert(bad, std::sync::Arc::new(lora(47)));
    set.attach(&mut sd.unet, 1.0).unwrap_err();
    let mut attached = 0;
    lora_core::Adaptable::visit_layers(&mut sd.unet, &mut |layer| {
        attached += layer.attached();
        Ok(())
    })
    .unwrap();
    assert_eq!(attached, 0);
}

/// Texts come out of strangers' pictures: no pattern in them makes a reader hang.
#[test]
fn long_texts_take_no_long_time() {
    use lora_data::{CaptionConfig, CaptionTime, Place, Purpose, Streams, process_caption};
    use lora_sd15::prompt::*;
    use lora_sd15::{Infotext, Tokenizer};
    let parts = [
        "(",
        ")",
        "[",
        "]",
        "()",
        "a",
        "[a:b:0.5]",
        "[a|",
        "[a:",
        "<lora:a:1>",
        "<lora:",
        "AND ",
        "{a|b}",
        "{",
        "|",
        ",",
        "\\",
        "BREAK ",
        "(a:1.2)",
        "a: 1, ",
        "\"",
        "--n ",
        "\u{301}",
        "ab ",
        "\n",
    ];
    let tokenizer = Tokenizer::new();
    let config = CaptionConfig {
        enable_wildcard: true,
        shuffle_caption: true,
        caption_tag_dropout_rate: 0.1,
        ..CaptionConfig::default()
    };
    let count = StepCount {
        steps: 20,
        before: None,
    };
    let mut slow = Vec::new();
    for part in parts {
        let text = part.repeat(20_000 / part.len());
        let mut time = |name: &str, work: &mut dyn FnMut()| {
            let start = std::time::Instant::now();
            work();
            if start.elapsed() > std::time::Duration::from_secs(60) {
                slow.push(format!("{name} of {part:?}: {:?}", start.elapsed()));
            }
        };
        time("tokenizer", &mut || drop(tokenizer.encode(&text)));
        time("tags", &mut || drop(extract_tags(&text)));
        time("AND", &mut || drop(split_composition(&text)));
        time("schedule", &mut || drop(schedule_prompt(&text, count)));
        time("attention", &mut || drop(parse_attention(&text)));
        time("chunks", &mut || drop(chunk_prompt(&tokenizer, &text, 20)));
        time("infotext", &mut || drop(Infotext::parse(&text)));
        time("sample prompt", &mut || {
            drop(lora_train::line_options(&text))
        });
        time("caption", &mut || {
            let mut stream = Streams::new(42).stream(Purpose::CAPTION, Place::item(0));
            process_caption(&text, &config, CaptionTime::default(), &mut stream);
        });
    }
    assert!(slow.is_empty(), "{slow:#?}");
}
