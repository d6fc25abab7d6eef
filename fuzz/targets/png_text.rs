//! A PNG with its text chunks, and the text of any picture.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_sd15::{Image, Infotext};

fuzz_target!(|bytes: &[u8]| {
    let path = lora_fuzz::file("picture.png", bytes);
    if let Ok((image, _)) = Image::open_png_with_text(&path) {
        assert_eq!(image.rgb.len(), 3 * image.width * image.height);
    }
    drop(Infotext::open(&path));
});
