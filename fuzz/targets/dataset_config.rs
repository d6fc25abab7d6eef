//! A dataset config, TOML or JSON by the first byte.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use lora_data::{ConfigFile, ConfigSyntax, DataConfig, DatasetConfig};

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = lora_fuzz::choice(bytes) else {
        return;
    };
    let syntax = if first == b'J' {
        ConfigSyntax::Json
    } else {
        ConfigSyntax::Toml
    };
    let text = lora_fuzz::text(rest);
    for defaults in [DatasetConfig::default(), DatasetConfig::sd_scripts()] {
        let run = DataConfig::default();
        if let Ok(file) = ConfigFile::parse(&text, syntax, Path::new("d"), &defaults, &run) {
            let _ = file.config.validate();
        }
    }
});
