//! Upscaling networks against spandrel, which the web UI loads them with. The files in `upscale/`
//! are small networks of random weights, and what spandrel 0.4.2 makes of `x` with each.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use lora_core::format::{TensorFile, write_tensors};
use lora_sd15::{Error, Image, UpscaleNetwork, find_upscaler};

fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/upscale", name]
        .iter()
        .collect()
}

#[test]
fn networks_agree_with_spandrel() {
    let expected = TensorFile::open(fixture("expected.safetensors")).unwrap();
    let of = |name: &str| expected.tensor(name, &Device::Cpu).unwrap();
    // The first ESRGAN's names; a pixel-unshuffling one under `params_ema`; a compact one.
    for (file, scale) in [
        ("old4.pth", 4),
        ("new2.pth", 2),
        ("compact4.safetensors", 4),
    ] {
        let network = UpscaleNetwork::load(fixture(file), &Device::Cpu).unwrap();
        assert_eq!(network.scale(), scale);
        let want = of(file.split_once('.').unwrap().0);
        let got = network.forward(&of("x")).unwrap();
        assert_eq!(got.dims(), want.dims(), "{file}");
        let error = (got - want).unwrap().abs().unwrap();
        let error: f32 = error.max_all().unwrap().to_scalar().unwrap();
        assert!(error < 2e-6, "{file}: {error}");
    }
}

/// `picture2.png` is what the web UI's functions for tiles make of `picture.png` with spandrel and
/// `new2.pth`: four tiles.
#[test]
fn pictures_are_those_of_the_web_ui() {
    let picture = Image::open_png(fixture("picture.png")).unwrap();
    let want = Image::open_png(fixture("picture2.png")).unwrap();
    let network = UpscaleNetwork::load(fixture("new2.pth"), &Device::Cpu).unwrap();
    let got = network.enlarge(&picture).unwrap();
    assert_eq!((got.width, got.height), (want.width, want.height));
    let off = got.rgb.iter().zip(&want.rgb).map(|(a, b)| a.abs_diff(*b));
    // Sums in another order may round to the next number.
    assert!(off.clone().all(|difference| difference <= 1));
    assert!(off.filter(|difference| *difference > 0).count() * 1000 < want.rgb.len());
}

/// A network that repeats each pixel twice in both directions and adds nothing.
fn repeating() -> BTreeMap<String, Tensor> {
    let zeros =
        |dims: &[usize]| Tensor::zeros(dims, candle_core::DType::F32, &Device::Cpu).unwrap();
    BTreeMap::from([
        ("body.0.weight".to_string(), zeros(&[4, 3, 3, 3])),
        ("body.0.bias".to_string(), zeros(&[4])),
        ("body.1.weight".to_string(), zeros(&[4])),
        ("body.2.weight".to_string(), zeros(&[12, 4, 3, 3])),
        ("body.2.bias".to_string(), zeros(&[12])),
    ])
}

fn load(tensors: BTreeMap<String, Tensor>) -> lora_sd15::Result<UpscaleNetwork> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("network.safetensors");
    write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();
    UpscaleNetwork::load(&path, &Device::Cpu)
}

#[test]
fn tiles_join_without_a_seam() {
    let network = load(repeating()).unwrap();
    let (width, height) = (407, 215);
    let rgb: Vec<u8> = (0..3 * width * height)
        .map(|i| (i * 7 % 251) as u8)
        .collect();
    let picture = Image { width, height, rgb };
    let large = network.enlarge(&picture).unwrap();
    assert_eq!((large.width, large.height), (2 * width, 2 * height));
    for y in 0..large.height {
        for x in 0..large.width {
            assert_eq!(large.pixel(x, y), picture.pixel(x / 2, y / 2), "{x} {y}");
        }
    }
    // Twice is not enough for 900 columns: it is enlarged again, then made smaller.
    let sized = network.enlarge_to(&picture, 900, 476).unwrap();
    assert_eq!((sized.width, sized.height), (900, 476));
}

#[test]
fn other_files_are_refused_by_name() {
    let mut without = repeating();
    without.remove("body.2.bias");
    let mut more = repeating();
    let extra = more["body.0.bias"].clone();
    more.insert("attention.weight".into(), extra);
    let other = BTreeMap::from([(
        "conv1.weight".to_string(),
        repeating()["body.0.bias"].clone(),
    )]);
    for (tensors, part) in [
        (without, "lacks body.2.bias"),
        (more, "no place for, for example attention.weight"),
        (other, "others are not supported"),
    ] {
        let message = load(tensors).unwrap_err().to_string();
        assert!(
            message.contains(part) && message.contains("network.safetensors"),
            "{message}"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.pth");
    std::fs::write(&path, b"\x80\x02not a zip file").unwrap();
    let error = UpscaleNetwork::load(&path, &Device::Cpu).unwrap_err();
    assert!(matches!(error, Error::Upscaler { .. }), "{error}");
}

#[test]
fn networks_are_found_by_the_web_uis_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("RealESRGAN_x4plus_anime_6B.pth");
    std::fs::write(&path, b"").unwrap();
    for name in ["R-ESRGAN 4x+ Anime6B", "RealESRGAN_x4plus_anime_6B"] {
        assert_eq!(find_upscaler(folder.path(), name).unwrap(), path);
    }
    let message = find_upscaler(folder.path(), "4x-UltraSharp")
        .unwrap_err()
        .to_string();
    for part in ["4x-UltraSharp", "Lanczos", "RealESRGAN_x4plus_anime_6B"] {
        assert!(message.contains(part), "{message}");
    }
}
