//! AVIF files beside what Pillow 13 (libavif 1.4) reads from them, kept as PNG files.
#![cfg(feature = "avif")]

use std::fs;
use std::path::{Path, PathBuf};

use lora_data::{DecodeOptions, Picture, Size, Transparency, decode_file, read_header};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/avif")
        .join(name)
}

/// With the alpha channel as it is stored.
fn read(path: &Path) -> Picture {
    let options = DecodeOptions {
        keep_alpha: true,
        transparency: Transparency::Drop,
        ..Default::default()
    };
    decode_file(path, options).expect("a picture")
}

/// The largest difference of two values.
fn difference(one: &[u8], other: &[u8]) -> u8 {
    assert_eq!(one.len(), other.len());
    let pairs = one.iter().zip(other);
    pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0)
}

#[test]
fn pixels_are_those_of_pillow() {
    for (name, most) in [
        ("c420", 2),
        ("limited422", 2),
        ("alpha444", 1),
        ("ten_bits", 3),
        ("gray", 1),
        ("turned", 2),
    ] {
        let picture = read(&file(&format!("{name}.avif")));
        let expected = read(&file(&format!("{name}.png")));
        assert_eq!(picture.size, expected.size, "{name}");
        let rgb = difference(&picture.rgb, &expected.rgb);
        assert!(rgb <= most, "{name}: differs by {rgb}");
        match (picture.alpha, expected.alpha) {
            (Some(alpha), Some(expected)) => {
                assert!(difference(&alpha, &expected) <= 1, "{name}");
            }
            (alpha, expected) => assert_eq!(alpha, expected, "{name}"),
        }
    }
}

/// Where hardly anything of a colour was kept, dividing by alpha makes much of little.
#[test]
fn colors_multiplied_by_alpha_are_divided_by_it() {
    let picture = read(&file("premultiplied.avif"));
    let expected = read(&file("premultiplied.png"));
    let (alpha, kept) = (
        picture.alpha.expect("alpha"),
        expected.alpha.expect("alpha"),
    );
    assert!(difference(&alpha, &kept) <= 1);
    let pixels = picture.rgb.as_chunks::<3>().0.iter();
    for ((pixel, expected), &alpha) in pixels.zip(expected.rgb.as_chunks::<3>().0).zip(&alpha) {
        if alpha > 0 {
            let most = 2 + 2 * 255 / u16::from(alpha);
            let differs = difference(pixel, expected);
            assert!(u16::from(differs) <= most, "{differs} at alpha {alpha}");
        }
    }
}

#[test]
fn headers_are_read_without_decoding() {
    let header = |name| read_header(&file(name)).expect("a header");
    let turned = header("turned.avif");
    assert_eq!(turned.stored, Size::new(52, 36));
    assert_eq!(turned.shown(), Size::new(36, 52));
    assert!(!turned.has_alpha && !turned.looks_cut_off);
    assert!(header("alpha444.avif").has_alpha);
}

#[test]
fn sizes_are_not_believed() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("large.avif");
    let bytes = fs::read(file("c420.avif")).expect("a file");
    let at = bytes.windows(4).position(|w| w == b"ispe").expect("a size") + 8;
    for (side, why) in [
        (100_000u32, "Memory limit exceeded"),
        (13_000, "not the announced one"),
        (20, ""),
    ] {
        let mut large = bytes.clone();
        large[at..at + 4].copy_from_slice(&side.to_be_bytes());
        large[at + 4..at + 8].copy_from_slice(&side.to_be_bytes());
        fs::write(&path, &large).expect("a file");
        let error = decode_file(&path, DecodeOptions::default()).expect_err("a false size");
        assert!(error.to_string().contains(why), "{error}");
    }
}

#[test]
fn files_that_end_early_are_errors() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("short.avif");
    let bytes = fs::read(file("alpha444.avif")).expect("a file");
    for end in 1..bytes.len() {
        fs::write(&path, &bytes[..end]).expect("a file");
        assert!(
            decode_file(&path, DecodeOptions::default()).is_err(),
            "{end}"
        );
        let whole = read_header(&path).is_ok_and(|header| !header.looks_cut_off);
        assert!(!whole, "{end}");
    }
}

#[test]
fn damaged_boxes_are_no_panic() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("damaged.avif");
    for name in ["alpha444.avif", "turned.avif"] {
        let bytes = fs::read(file(name)).expect("a file");
        let data = bytes.windows(4).position(|w| w == b"mdat").expect("data");
        for at in (0..data).step_by(3) {
            let mut damaged = bytes.clone();
            damaged[at] ^= [1, 0x7f, 0xff][at % 9 / 3];
            fs::write(&path, &damaged).expect("a file");
            // Whatever they are: a result or an error.
            let _ = decode_file(&path, DecodeOptions::default());
            let _ = read_header(&path);
        }
    }
}
