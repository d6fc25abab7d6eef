//! A config saved by kohya_ss.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_train::TrainConfig;
use lora_train::gui::read_config;

fuzz_target!(|bytes: &[u8]| {
    let path = lora_fuzz::file("config.json", bytes);
    if let Ok(import) = read_config(&path) {
        let _ = import.to_string();
        if let Ok(config) = TrainConfig::from_settings(&import.settings) {
            let _ = (
                config.validate(),
                config.warnings(),
                config.dump(&import.settings),
            );
            let _ = config.to_toml();
        }
    }
});
