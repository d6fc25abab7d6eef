//! Command lines (words by line break) with network, optimizer and scheduler arguments,
//! and the small grammars: axes, sizes, rank rules.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_core::algebra::RankRule;
use lora_data::Size;
use lora_sd15::Axis;
use lora_train::{Settings, TrainConfig, line_options};

fuzz_target!(|bytes: &[u8]| {
    let text = lora_fuzz::text(bytes);
    let words: Vec<String> = text.lines().map(str::to_string).collect();
    if let Ok((settings, _)) = Settings::from_arguments(&words)
        && let Ok(config) = TrainConfig::from_settings(&settings)
    {
        let _ = (config.validate(), config.warnings(), config.to_toml());
    }
    let _ = lora_optim::kohya::parse_args(&words);
    for word in &words {
        let _ = (
            Axis::parse(word),
            RankRule::parse(word),
            word.parse::<Size>(),
        );
        line_options(word);
    }
});
