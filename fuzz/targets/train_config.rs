//! sd-scripts' TOML, and this trainer's own: read, checked, written and read again.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lora_fuzz::settings("config.toml", bytes));
