//! A config saved by LoRA_Easy_Training_Scripts.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lora_fuzz::settings("config.toml", bytes));
