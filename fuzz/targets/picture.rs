//! Pictures of a dataset: PNG, JPEG, WebP, BMP, AVIF, with orientation and transparency.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_data::{DecodeOptions, decode_file, read_header};

fuzz_target!(|bytes: &[u8]| {
    let path = lora_fuzz::file("picture", bytes);
    let _ = read_header(&path);
    let _ = decode_file(&path, DecodeOptions::default());
});
