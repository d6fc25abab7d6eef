//! A config saved by kohya_ss.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lora_fuzz::settings("config.json", bytes));
