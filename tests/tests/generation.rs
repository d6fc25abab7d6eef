//! Whole pictures with the miniature: what is asked for changes them, and what is written
//! into them draws them again.

use candle_core::{DType, Device, Tensor};
use lora_core::{Adaptable, AdapterSet, Component, Lora};
use lora_sd15::sampler::{Prediction, SigmaSchedule};
use lora_sd15::{
    AdapterMode, Hires, Image, Img2Img, Infotext, Inpaint, MaskedContent, ResizeMode, SamplerKind,
    StableDiffusion, Txt2Img, UpscaleNetwork, Upscaler, Variation,
};
use lora_tests::golden_path;

const CPU: Device = Device::Cpu;

fn model() -> StableDiffusion {
    StableDiffusion::load(
        golden_path("sd15", "mini_ldm.safetensors"),
        DType::F32,
        &CPU,
    )
    .unwrap()
}

fn job(prompt: &str) -> Txt2Img {
    Txt2Img {
        prompt: prompt.into(),
        width: 64,
        height: 64,
        steps: 4,
        seed: 5,
        ..Txt2Img::default()
    }
}

fn draw(sd: &mut StableDiffusion, job: &Txt2Img) -> Image {
    sd.txt2img(job, &mut |_| true).unwrap().remove(0)
}

/// A LoRA on one layer of each network.
fn adapter(sd: &mut StableDiffusion, scale: f64) -> AdapterSet {
    let mut set = AdapterSet::default();
    let mut add = |component: Component, model: &mut dyn Adaptable| {
        let mut wanted = 3;
        model
            .visit_layers(&mut |layer| {
                let dims = layer.base().weight.dims().to_vec();
                if let (&[out, into], true) = (dims.as_slice(), wanted > 0) {
                    wanted -= 1;
                    let name = component.layer_name(layer.path());
                    let down = Tensor::ones((2, into), DType::F32, &CPU).unwrap();
                    let up = (Tensor::ones((out, 2), DType::F32, &CPU).unwrap() * scale).unwrap();
                    let lora = Lora::new(&name, down, None, up, 1.0).unwrap();
                    set.insert(name, std::sync::Arc::new(lora));
                }
                Ok(())
            })
            .unwrap();
    };
    add(Component::Unet, &mut sd.unet);
    add(Component::TextEncoder, &mut sd.text_encoder);
    set
}

#[test]
fn every_sampler_draws_and_is_drawn_again_from_its_text() {
    let mut sd = model();
    for (name, sampler) in SamplerKind::ALL {
        let job = Txt2Img {
            sampler,
            variation: Some(Variation {
                seed: 9,
                strength: 0.2,
            }),
            eta_delta: 31337,
            clip_skip: 2,
            guidance_scale: 5.5,
            ..job("(zoe:1.3), [hat|cap], [red:blue:0.5] AND rain :0.4")
        };
        let image = draw(&mut sd, &job);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let text = job.infotext(0, &[("Model", "mini".into())], &[]);
        image.save_png(&path, Some(&text)).unwrap();

        let (saved, text) = Image::open_png_with_text(&path).unwrap();
        assert_eq!(saved, image, "{name}");
        let again = Txt2Img::from_infotext(&Infotext::parse(&text.unwrap())).unwrap();
        assert_eq!(again, job, "{name}");
        assert_eq!(draw(&mut sd, &again), image, "{name}");
    }
}

#[test]
fn all_options_survive_the_text() {
    let mut job = Txt2Img {
        negative: "low\nres, \u{732b}".into(),
        schedule: Some(SigmaSchedule::AlignYourSteps),
        sampler: SamplerKind::Heun,
        seed_resize: Some((128, 96)),
        skip_negative_below: 1.5,
        comma_backtrack: 0,
        emphasis: lora_sd15::Emphasis::NoNorm,
        noise: lora_sd15::NoiseSource::Cpu,
        sgm_noise: true,
        pad: true,
        hires: Some(Hires {
            steps: 3,
            strength: 0.55,
            upscaler: Upscaler::LatentBicubicAntialiased,
            ..Hires::default()
        }),
        ..job("one\ntwo: \"three\"")
    };
    job.sigmas.rho = Some(5.0);
    job.sigmas.min = Some(0.1);
    job.options.eta = Some(0.25);
    job.options.churn.s_churn = 2.0;
    job.options.churn.s_noise = 1.01;
    job.options.unipc_order = Some(2);
    job.validate().unwrap();
    let text = job.infotext(0, &[("Model", "a, b: c".into())], &[]);
    assert_eq!(
        Txt2Img::from_infotext(&Infotext::parse(&text)).unwrap(),
        job
    );
}

#[test]
fn drawing_from_a_picture_is_drawn_again_from_its_text() {
    let mut sd = model();
    let picture = draw(&mut sd, &job("a house"));
    let request = Img2Img {
        strength: 0.6,
        resize: ResizeMode::Crop,
        exactly_steps: true,
        noise_multiplier: 0.9,
        extra_noise: 0.1,
        inpaint: Some(Inpaint {
            invert: true,
            blur: 2.5,
            content: MaskedContent::LatentNoise,
            only_masked: Some(16),
            ..Inpaint::new(Image::plain(64, 64, [255; 3]))
        }),
        ..Img2Img::new(job("a boat"), picture.clone())
    };
    let text = Infotext::parse(&request.job.infotext(0, &[], &request.parameters()));
    assert_eq!(Txt2Img::unread(&text), [""; 0]);
    let mask = request.inpaint.as_ref().map(|inpaint| inpaint.mask.clone());
    let again = Img2Img::from_infotext(&text, picture.clone(), mask).unwrap();
    assert_eq!(again, request);
    let error = Img2Img::from_infotext(&text, picture, None).unwrap_err();
    assert!(error.to_string().contains("mask"), "{error}");
}

#[test]
fn texts_of_what_is_not_here_are_refused_by_name() {
    for (feature, shown) in [
        ("Token merging ratio: 0.5", "Token merging ratio"),
        ("ControlNet 1: \"Module: canny\"", "ControlNet 1"),
        ("Pad conds v0: True", "Pad conds v0"),
        ("SGM noise multiplier: 2", "SGM noise multiplier"),
    ] {
        let text = format!("zoe\nSteps: 20, Sampler: Euler, Seed: 1, {feature}");
        let error = Txt2Img::from_infotext(&Infotext::parse(&text)).unwrap_err();
        assert!(error.to_string().contains(shown), "{error}");
    }
}

#[test]
fn padding_appends_empty_chunks_to_the_shorter_prompt() {
    let mut sd = model();
    let long = |negative: &str, pad| Txt2Img {
        negative: negative.into(),
        pad,
        ..job("zoe BREAK a red hat")
    };
    let padded = draw(&mut sd, &long("lowres", true));
    assert_eq!(padded, draw(&mut sd, &long("lowres BREAK BREAK", false)));
    assert_ne!(padded, draw(&mut sd, &long("lowres", false)));
}

#[test]
fn a_picture_does_not_depend_on_its_batch() {
    let mut sd = model();
    for sampler in [SamplerKind::EulerAncestral, SamplerKind::DpmppSde] {
        let pair = Txt2Img {
            batch_size: 2,
            sampler,
            ..job("zoe")
        };
        let both = sd.txt2img(&pair, &mut |_| true).unwrap();
        let second = Txt2Img {
            batch_size: 1,
            seed: pair.seed + 1,
            ..pair
        };
        let alone = draw(&mut sd, &second);
        let differing = alone
            .rgb
            .iter()
            .zip(&both[1].rgb)
            .filter(|(a, b)| a.abs_diff(**b) > 1);
        assert_eq!(differing.count(), 0, "{sampler:?}");
    }
}

#[test]
fn what_prompts_ask_for_has_an_effect() {
    let mut sd = model();
    let plain = draw(&mut sd, &job("a cat"));
    for other in [
        "a (cat:1.5)",
        "a [cat:dog:0.5]",
        "a [cat|dog]",
        "a cat AND a dog",
        "a cat AND a dog:-0.5",
        "a BREAK cat",
    ] {
        assert_ne!(draw(&mut sd, &job(other)), plain, "{other}");
    }
    // Changes that never come are none.
    assert_eq!(draw(&mut sd, &job("a [cat:dog:1.0]")), plain);
    assert_eq!(draw(&mut sd, &job("a cat AND a dog:0")), plain);
    sd.prediction = Prediction::V;
    assert_ne!(draw(&mut sd, &job("a cat")), plain);
    sd.zero_terminal_snr = true;
    draw(&mut sd, &job("a cat"));
}

#[test]
fn embeddings_are_words() {
    let mut sd = model();
    let before = draw(&mut sd, &job("a zoestyle picture"));
    let width = sd.text_encoder.config().hidden_size;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("zoestyle.safetensors");
    let vectors = Tensor::ones((3, width), DType::F32, &CPU).unwrap();
    candle_core::safetensors::save(&[("emb_params", vectors)].into_iter().collect(), &path)
        .unwrap();
    assert_eq!(sd.load_embedding(&path).unwrap(), "zoestyle");
    assert_ne!(draw(&mut sd, &job("a zoestyle picture")), before);
    let pickle = folder.path().join("old.pt");
    std::fs::write(&pickle, b"x").unwrap();
    let error = sd.load_embedding(&pickle).unwrap_err().to_string();
    assert!(
        error.contains("old.pt") && error.contains("safetensors"),
        "{error}"
    );
    let wide = Tensor::ones((1, width + 1), DType::F32, &CPU).unwrap();
    let tokenizer = lora_sd15::Tokenizer::new();
    sd.embeddings.insert(&tokenizer, "widest", wide).unwrap();
    let error = sd.txt2img(&job("widest"), &mut |_| true).unwrap_err();
    assert!(error.to_string().contains("another model"), "{error}");
}

#[test]
fn adapters_beside_and_merged_draw_the_same() {
    let mut sd = model();
    let (one, two) = (adapter(&mut sd, 0.02), adapter(&mut sd, -0.03));
    sd.add_adapter("one", one);
    sd.add_adapter("two", two);
    let plain = draw(&mut sd, &job("zoe"));
    let both = job("zoe<lora:one:0.8><lora:two:te=0.1:unet=0.5>");
    let side = draw(&mut sd, &both);
    assert_ne!(side, plain);
    sd.set_adapter_mode(AdapterMode::Merged);
    let merged = draw(&mut sd, &both);
    let off = side
        .rgb
        .iter()
        .zip(&merged.rgb)
        .filter(|(a, b)| a.abs_diff(**b) > 2);
    assert_eq!(off.count(), 0);
    assert_eq!(draw(&mut sd, &job("zoe")), plain, "weights are put back");
    // Multipliers change from picture to picture; blocks and ranks are heeded.
    let more = draw(&mut sd, &job("zoe<lora:one:0.4>"));
    assert_ne!(more, draw(&mut sd, &job("zoe<lora:one:0.2>")));
    let nothing = "zoe<lora:one:1:lbw=0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0>";
    assert_eq!(draw(&mut sd, &job(nothing)), plain);
    assert_ne!(draw(&mut sd, &job("zoe<lora:one:0.4:dyn=1>")), more);
    // A name given twice adds up, block weights and all.
    let twice = format!("{nothing}<lora:one:0.4>");
    assert_eq!(draw(&mut sd, &job(&twice)), more);
    let error = sd
        .txt2img(&job("<lora:one:much>"), &mut |_| true)
        .unwrap_err();
    assert!(error.to_string().contains("much"), "{error}");
}

#[test]
fn a_file_is_read_once() {
    let mut sd = model();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one.safetensors");
    adapter(&mut sd, 0.02)
        .save(&path, &Default::default())
        .unwrap();
    sd.load_adapter("one", &path).unwrap();
    let hash = sd.adapter_hash("one").unwrap().to_string();
    let first = draw(&mut sd, &job("zoe<lora:one>"));
    sd.load_adapter("again", &path).unwrap();
    assert_eq!(sd.adapter_hash("again"), Some(hash.as_str()));
    assert_eq!(draw(&mut sd, &job("zoe<lora:again>")), first);
    // Another file under the same name is noticed.
    adapter(&mut sd, 0.05)
        .save(&path, &Default::default())
        .unwrap();
    sd.load_adapter("one", &path).unwrap();
    assert_ne!(draw(&mut sd, &job("zoe<lora:one>")), first);
}

#[test]
fn hires_fix_enlarges_in_every_way() {
    let mut sd = model();
    for (name, upscaler) in Upscaler::ALL {
        let hires = Hires {
            scale: 1.5,
            upscaler,
            ..Hires::default()
        };
        let mut steps = Vec::new();
        let job = Txt2Img {
            hires: Some(hires),
            ..job("zoe [a:b:1.5]")
        };
        let images = sd.txt2img(&job, &mut |step| {
            steps.push((step.done, step.total));
            true
        });
        let image = images.unwrap().remove(0);
        assert_eq!((image.width, image.height), (96, 96), "{name}");
        assert_eq!(steps.last(), Some(&(8, 8)), "{name}: {steps:?}");
    }
    let wide = Txt2Img {
        hires: Some(Hires {
            size: Some((128, 72)),
            ..Hires::default()
        }),
        ..job("zoe")
    };
    let text = "zoe\nSteps: 2, Sampler: Euler, Seed: 1, Size: 64x64, Hires upscale: 1.5, Hires upscaler: 4x-UltraSharp";
    let by_network = Txt2Img::from_infotext(&Infotext::parse(text)).unwrap();
    let error = sd
        .txt2img(&by_network, &mut |_| true)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("4x-UltraSharp") && error.contains("Latent (antialiased)"),
        "{error}"
    );
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../crates/lora-sd15/tests/upscale/new2.pth"
    );
    let network = UpscaleNetwork::load(file, sd.device()).unwrap();
    sd.add_upscaler("4x-UltraSharp", network);
    let image = draw(&mut sd, &by_network);
    assert_eq!((image.width, image.height), (96, 96));
    assert!(
        by_network
            .infotext(0, &[], &[])
            .contains("Hires upscaler: 4x-UltraSharp")
    );
    let image = draw(&mut sd, &wide);
    assert_eq!((image.width, image.height), (128, 72));
}

#[test]
fn strength_says_how_much_of_a_picture_is_kept() {
    let mut sd = model();
    let picture = draw(&mut sd, &job("a house"));
    let distance = |a: &Image, b: &Image| -> u64 {
        a.rgb
            .iter()
            .zip(&b.rgb)
            .map(|(a, b)| u64::from(a.abs_diff(*b)))
            .sum()
    };
    let latents = sd.encode(&picture).unwrap();
    let through = sd.decode(&latents).unwrap().remove(0);
    for sampler in [
        SamplerKind::Euler,
        SamplerKind::Ddim,
        SamplerKind::UniPc,
        SamplerKind::Dpm2,
    ] {
        let mut drawn = |strength: f64| {
            let request = Img2Img {
                strength,
                ..Img2Img::new(
                    Txt2Img {
                        sampler,
                        steps: 12,
                        ..job("a boat")
                    },
                    picture.clone(),
                )
            };
            sd.img2img(&request, &mut |_| true).unwrap().remove(0)
        };
        let (weak, strong) = (drawn(0.1), drawn(0.9));
        assert!(
            distance(&weak, &through) < distance(&strong, &through),
            "{sampler:?}: {} {}",
            distance(&weak, &through),
            distance(&strong, &through)
        );
    }
    for (_, resize) in ResizeMode::ALL {
        let request = Img2Img {
            resize,
            exactly_steps: true,
            sample_posterior: true,
            ..Img2Img::new(
                Txt2Img {
                    width: 96,
                    batch_size: 2,
                    ..job("a boat")
                },
                picture.clone(),
            )
        };
        let images = sd.img2img(&request, &mut |_| true).unwrap();
        assert_eq!(
            (images.len(), images[0].width, images[0].height),
            (2, 96, 64)
        );
    }
}

#[test]
fn inpainting_leaves_the_rest_alone() {
    let mut sd = model();
    let picture = draw(&mut sd, &job("a house"));
    let mut mask = Image::plain(64, 64, [0; 3]);
    for y in 16..40 {
        for x in 24..56 {
            mask.dot(x, y, [255; 3]);
        }
    }
    for (name, content) in MaskedContent::ALL {
        for only_masked in [None, Some(8)] {
            for sampler in [
                SamplerKind::EulerAncestral,
                SamplerKind::Plms,
                SamplerKind::Lcm,
            ] {
                let inpaint = Inpaint {
                    blur: 1.0,
                    content,
                    only_masked,
                    ..Inpaint::new(mask.clone())
                };
                let request = Img2Img {
                    inpaint: Some(inpaint),
                    ..Img2Img::new(
                        Txt2Img {
                            sampler,
                            ..job("a boat")
                        },
                        picture.clone(),
                    )
                };
                let image = sd.img2img(&request, &mut |_| true).unwrap().remove(0);
                assert_eq!(image.pixel(2, 60), picture.pixel(2, 60), "{name}");
                assert_eq!(image.pixel(60, 4), picture.pixel(60, 4), "{name}");
                assert_ne!(image, picture, "{name}");
            }
        }
    }
    let other = Img2Img {
        inpaint: Some(Inpaint::new(Image::plain(32, 64, [255; 3]))),
        ..Img2Img::new(job("a boat"), picture)
    };
    let error = sd.img2img(&other, &mut |_| true).unwrap_err().to_string();
    assert!(error.contains("32x64"), "{error}");
}

/// The miniature with the nine input channels of inpainting models; those for mask and
/// picture are multiplied with `weight`.
fn inpainting_model(weight: f64) -> StableDiffusion {
    let folder = tempfile::tempdir().unwrap();
    let file = golden_path("sd15", "mini_ldm.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &CPU).unwrap();
    let key = "model.diffusion_model.input_blocks.0.0.weight";
    let four = &tensors[key];
    let more = (four.narrow(1, 0, 1).unwrap().repeat((1, 5, 1, 1)).unwrap() * weight).unwrap();
    let nine = Tensor::cat(&[four, &more], 1).unwrap();
    tensors.insert(key.into(), nine);
    let path = folder.path().join("nine.safetensors");
    candle_core::safetensors::save(&tensors, &path).unwrap();
    std::fs::copy(file.with_extension("json"), folder.path().join("nine.json")).unwrap();
    StableDiffusion::load(&path, DType::F32, &CPU).unwrap()
}

#[test]
fn inpainting_models_are_shown_mask_and_picture() {
    let picture = draw(&mut model(), &job("a house"));
    let mut half = Image::plain(64, 64, [0; 3]);
    half.paste(&Image::plain(32, 64, [255; 3]), 0, 0);
    let painted = |sd: &mut StableDiffusion| {
        let request = Img2Img {
            strength: 1.0,
            inpaint: Some(Inpaint::new(half.clone())),
            ..Img2Img::new(job("a boat"), picture.clone())
        };
        sd.img2img(&request, &mut |_| true).unwrap().remove(0)
    };
    let (mut four, mut blind, mut nine) = (model(), inpainting_model(0.0), inpainting_model(0.5));
    let close = |a: &Image, b: &Image| a.rgb.iter().zip(&b.rgb).all(|(a, b)| a.abs_diff(*b) <= 1);
    // Weights of zero see nothing more than the ordinary model; others do.
    let whole = |sd: &mut StableDiffusion| draw(sd, &job("a boat"));
    let both: [&dyn Fn(&mut StableDiffusion) -> Image; 2] = [&painted, &whole];
    for draws in both {
        assert!(close(&draws(&mut four), &draws(&mut blind)));
        assert!(!close(&draws(&mut four), &draws(&mut nine)));
    }
    assert_eq!(painted(&mut nine).pixel(60, 8), picture.pixel(60, 8));
}

#[test]
fn tiles_decode_nearly_the_same_picture() {
    let mut sd = model();
    let whole = draw(
        &mut sd,
        &Txt2Img {
            width: 256,
            height: 192,
            steps: 1,
            ..job("zoe")
        },
    );
    sd.vae_tile = Some(16);
    let tiled = draw(
        &mut sd,
        &Txt2Img {
            width: 256,
            height: 192,
            steps: 1,
            ..job("zoe")
        },
    );
    assert_eq!((tiled.width, tiled.height), (256, 192));
    let off = |a: &Image, b: &Image| {
        let sum: u64 = a
            .rgb
            .iter()
            .zip(&b.rgb)
            .map(|(a, b)| u64::from(a.abs_diff(*b)))
            .sum();
        sum as f64 / a.rgb.len() as f64
    };
    assert!(off(&whole, &tiled) < 16.0, "{}", off(&whole, &tiled));
    let latents = sd.encode(&whole).unwrap();
    assert_eq!(latents.dims(), [1, 4, 24, 32]);
}

#[test]
fn drawing_can_be_cancelled() {
    let mut sd = model();
    let mut calls = 0;
    let request = Txt2Img {
        hires: Some(Hires::default()),
        ..job("zoe")
    };
    let images = sd.txt2img(&request, &mut |_| {
        calls += 1;
        calls < 2
    });
    assert_eq!((images.unwrap().len(), calls), (1, 2));
}
