//! Writes the seeds of the fuzz targets, made of the golden files:
//! `cargo test -p lora-tests --test fuzz_seeds -- --ignored`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use lora_core::format::{TensorFile, write_tensors};
use lora_optim::{AdamW, AdamWConfig, Optimizer, ParamGroup, Prodigy, ProdigyConfig, StepOptions};
use lora_sd15::Image;
use lora_tests::{bundled_json, golden_dir, golden_path};
use lora_train::TrainConfig;
use lora_train::options::all_options;
use serde_json::Value;

/// `fuzz/corpus`, or the folder named by `FUZZ_CORPUS`.
fn corpus(target: &str) -> PathBuf {
    let folder = match std::env::var_os("FUZZ_CORPUS") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus"),
    };
    let folder = folder.join(target);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn seed(target: &str, name: &str, bytes: impl AsRef<[u8]>) {
    std::fs::write(corpus(target).join(format!("seed-{name}")), bytes).unwrap();
}

/// Every text below a JSON value, by a key.
fn texts(value: &Value, key: &str, found: &mut Vec<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|v| texts(v, key, found)),
        Value::Object(map) => {
            for (name, inner) in map {
                match inner {
                    Value::String(text) if name == key => found.push(text.clone()),
                    _ => texts(inner, key, found),
                }
            }
        }
        _ => {}
    }
}

fn all_texts(value: &Value, key: &str) -> Vec<String> {
    let mut found = Vec::new();
    texts(value, key, &mut found);
    found
}

fn tensors_seed(target: &str, name: &str, tensors: BTreeMap<String, Tensor>, of: &TensorFile) {
    let path = corpus(target).join(format!("seed-{name}"));
    write_tensors(&path, &tensors, &of.metadata()).unwrap();
}

#[test]
#[ignore = "writes files"]
fn adapters_and_tensors() {
    for entry in std::fs::read_dir(golden_dir().join("adapters")).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let file = TensorFile::open(&path).unwrap();
        let tensor = |key: &String| file.tensor(key, &Device::Cpu).unwrap();
        if stem.starts_with("file_") {
            let first = file.names().into_iter().take(8);
            let cut = first.map(|key| (key.clone(), tensor(&key))).collect();
            tensors_seed("adapter", &stem, cut, &file);
            continue;
        }
        // Cases of one family each: the tensors that a file would hold.
        let mut cases = BTreeMap::<String, BTreeMap<String, Tensor>>::new();
        for key in file.names() {
            let parts: Vec<&str> = key.splitn(3, '/').collect();
            if let [case, "param" | "file", name] = parts[..] {
                let layer = "lora_unet_mid_block_attentions_0_proj_in";
                let small = tensor(&key);
                if small.elem_count() <= 2000 {
                    let cases = cases.entry(case.to_string()).or_default();
                    cases.insert(format!("{layer}.{name}"), small);
                }
            }
        }
        for (case, tensors) in cases {
            tensors_seed("adapter", &format!("{stem}-{case}"), tensors, &file);
        }
    }
    for name in [
        "sd15/mini_ldm",
        "sd15/rng",
        "kohya/sample_lora",
        "optim/utilities",
    ] {
        let path = golden_dir().join(format!("{name}.safetensors"));
        let Ok(file) = TensorFile::open(path) else {
            continue;
        };
        let small: BTreeMap<String, Tensor> = file
            .names()
            .into_iter()
            .map(|key| (key.clone(), file.tensor(&key, &Device::Cpu).unwrap()))
            .filter(|(_, tensor)| tensor.elem_count() <= 64)
            .take(12)
            .collect();
        tensors_seed("tensors", &name.replace('/', "-"), small, &file);
    }
    let file = TensorFile::open(golden_path("sd15", "mini_ldm.safetensors")).unwrap();
    for (name, dtype) in [
        ("f16", DType::F16),
        ("bf16", DType::BF16),
        ("i64", DType::I64),
    ] {
        let vectors = Tensor::ones((2, 8), dtype, &Device::Cpu).unwrap();
        let tensors = [("emb_params".to_string(), vectors)].into();
        tensors_seed("tensors", name, tensors, &file);
    }
}

#[test]
#[ignore = "writes files"]
fn settings() {
    let config = TrainConfig {
        pretrained_model_name_or_path: Some("m".into()),
        train_data_dir: Some("d".into()),
        output_dir: Some("o".into()),
        network_module: Some("lycoris.kohya".into()),
        network_args: vec!["algo=loha".into(), "conv_dim=4".into()],
        optimizer_args: vec!["betas=0.9,0.99".into()],
        lr_scheduler: "cosine_with_restarts".into(),
        ..TrainConfig::default()
    };
    seed("train_config", "all", config.to_toml().unwrap());
    let short = "output_name = \"zoe\"\n[optimizer_arguments]\nlearning_rate = 1e-4\nlr_warmup_steps = 0.1\n";
    seed("train_config", "short", short);
    for case in bundled_json("kohya", "gui_kohya_ss.json")["cases"]
        .as_array()
        .unwrap()
    {
        seed(
            "kohya_json",
            case["name"].as_str().unwrap(),
            case["gui"].to_string(),
        );
    }
    for (i, text) in all_texts(&bundled_json("kohya", "gui_lora_easy.json"), "easy_toml")
        .iter()
        .enumerate()
    {
        seed("lora_easy", &i.to_string(), text);
    }
    let dataset = bundled_json("kohya", "dataset_config.json");
    seed(
        "dataset_config",
        "toml",
        format!("T{}", dataset["toml"].as_str().unwrap()),
    );
    for (i, case) in dataset["validation"].as_array().unwrap().iter().enumerate() {
        seed(
            "dataset_config",
            &format!("json-{i}"),
            format!("J{}", case["config"]),
        );
    }
    let object = r#"{"a.bmp":{"caption":"zoe","tags":"smile, red hair","train_resolution":[64,64]},"b.png":{"tags":""}}"#;
    seed("dataset_metadata", "object", format!("J{object}"));
    let lines = "{\"image_path\":\"a.bmp\",\"caption\":\"zoe\"}\n\n{\"image_path\":\"b.png\"}\n";
    seed("dataset_metadata", "lines", format!("L{lines}"));
    let lines = [
        "--network_module=networks.lora\n--network_args\nconv_dim=4\nblock_dims=1,2,3\ndown_lr_weight=sine+.25\nloraplus_lr_ratio=16",
        "--network_module\nlycoris.kohya\n--network_args\nalgo=lokr\nfactor=8\npreset=attn-mlp\n--max_train_epochs\n3",
        "--optimizer_type\nProdigy\n--optimizer_args\nbetas=0.9,0.99\nweight_decay=0.01\nd_coef=(1+1)",
        "--lr_scheduler\ncosine\n--lr_warmup_steps\n0.1\n--lr_scheduler_args\nnum_cycles=2\n--resolution\n512,768",
        "LoRA weight=0.5-1 [3]\nSteps=10-30(+5)\nSampler=\"a, b\",Euler\nsv_ratio=4\nrank=8\n512x768\nzoe --w 512 --n bad",
    ];
    for (i, line) in lines.iter().enumerate() {
        seed("arguments", &i.to_string(), line);
    }
    // Names of options help to find what belongs to them.
    let words: String = all_options()
        .map(|option| format!("\"{}\"\n", option.name))
        .collect();
    std::fs::write(corpus("").join("options.dict"), words).unwrap();
}

#[test]
#[ignore = "writes files"]
fn prompts_and_captions() {
    let captions = bundled_json("kohya", "captions.json");
    for (i, text) in all_texts(&captions, "caption").iter().enumerate() {
        let flags = ["sw", "w", "std", "su", ""][i % 5];
        let line = format!("{flags}\t,\t|||\t;;;\tp\tq\n{text}");
        seed("caption", &i.to_string(), line);
    }
    for (i, line) in all_texts(&captions, "line").iter().enumerate() {
        seed("sample_prompts", &i.to_string(), format!("x{line}"));
    }
    let toml = "[prompt]\nwidth = 512\nsteps = 20\n[[prompt.subset]]\nprompt = \"zoe\"\nseed = 1\n";
    seed("sample_prompts", "toml", format!("T{toml}"));
    let json = r#"[{"prompt":"zoe","scale":7.5,"height":64},"a --w 64 --ss euler_a"]"#;
    seed("sample_prompts", "json", format!("J{json}"));
    let golden = bundled_json("sd15", "prompts.json");
    for (i, text) in all_texts(&golden, "text").iter().enumerate() {
        seed("prompt", &i.to_string(), text);
    }
    let all = "a (b:1.2) [c] ((d)) \\(e\\) BREAK <lora:x:0.8:te=0.5> [f:g:0.3] [h|i] AND j :0.5";
    seed("prompt", "all", all);
    for (i, text) in all_texts(&bundled_json("sd15", "tokenizer.json"), "text")
        .iter()
        .enumerate()
    {
        seed("tokenizer", &i.to_string(), text);
    }
    let info = "1girl, <lora:zoe:0.8>\nNegative prompt: lowres\nSteps: 20, Sampler: DPM++ 2M Karras, Schedule type: Karras, CFG scale: 7, Seed: 7, Size: 512x768, Model hash: abc, Model: \"a, b\", Denoising strength: 0.5, Clip skip: 2, ENSD: 31337, Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent, Variation seed: 1, Variation seed strength: 0.1, Version: 1.10";
    seed("infotext", "all", info);
    seed(
        "infotext",
        "short",
        "a\nSteps: 20, Sampler: Euler a, Seed: 1",
    );
}

#[test]
#[ignore = "writes files"]
fn pictures() {
    let picture = Image {
        width: 5,
        height: 3,
        rgb: (0..45).collect(),
    };
    for (name, text) in [
        ("plain", None),
        ("latin", Some("a\nSteps: 1, Seed: 2, Size: 8x8")),
        ("unicode", Some("日本")),
    ] {
        let png = picture.to_png(text).unwrap();
        seed("png_text", name, &png);
        seed("picture", &format!("png-{name}"), &png);
    }
    let mut compressed = Vec::new();
    {
        let mut encoder = png::Encoder::new(&mut compressed, 2, 2);
        encoder.set_color(png::ColorType::GrayscaleAlpha);
        encoder.set_depth(png::BitDepth::Sixteen);
        encoder
            .add_ztxt_chunk("parameters".into(), "a, b".repeat(20))
            .unwrap();
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(&[7; 16]).unwrap();
    }
    seed("png_text", "compressed", &compressed);
    seed("picture", "png-grey", &compressed);
    let rgb = image::RgbImage::from_raw(5, 3, picture.rgb.clone()).unwrap();
    for format in [
        image::ImageFormat::Jpeg,
        image::ImageFormat::WebP,
        image::ImageFormat::Bmp,
    ] {
        let mut bytes = std::io::Cursor::new(Vec::new());
        rgb.write_to(&mut bytes, format).unwrap();
        let name = format!("{format:?}").to_lowercase();
        seed("picture", &name, bytes.into_inner());
    }
    let avif = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/lora-data/tests/avif");
    for entry in std::fs::read_dir(avif).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "avif")
        {
            let name = path.file_name().unwrap().to_string_lossy();
            seed("picture", &name, std::fs::read(&path).unwrap());
        }
    }
}

#[test]
#[ignore = "writes files"]
fn states() {
    let json = r#"{"format":1,"config":{"seed":1},"dataset":"a","model":null,"seed":1,"started_at":1.0,"total_steps":10,"epoch":1,"position":2,"batch":3,"step":1,"failures":0,"skipped":0,"loss_slots":[0.1,0.2],"validation":[[1,0.5]]}"#;
    seed("state", "json", format!("J{json}"));
    let groups = || {
        let variable = Var::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        vec![ParamGroup::new("unet", vec![("a".into(), variable)])]
    };
    let adam = AdamW::new(groups(), AdamWConfig::default()).unwrap();
    let prodigy = Prodigy::new(groups(), ProdigyConfig::default()).unwrap();
    let optimizers: [(&str, Box<dyn Optimizer>); 2] =
        [("adamw", Box::new(adam)), ("prodigy", Box::new(prodigy))];
    for (name, mut optimizer) in optimizers {
        optimizer.set_step_options(StepOptions::default()).unwrap();
        let path = corpus("state").join("partial");
        optimizer.state().unwrap().save(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        seed("state", name, [b"O".as_slice(), &bytes].concat());
    }
}
