//! Captions: separators, kept tags, wildcards, dropout; options come from the first line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_data::{CaptionConfig, CaptionTime, Place, Purpose, Streams, process_caption};

fuzz_target!(|bytes: &[u8]| {
    let text = lora_fuzz::text(bytes);
    let (options, caption) = text.split_once('\n').unwrap_or(("", &text));
    let mut parts = options.split('\t');
    let mut next = || parts.next().unwrap_or("").to_string();
    let (flags, separator) = (next(), next());
    let flag = |c: char| flags.contains(c);
    let config = CaptionConfig {
        shuffle_caption: flag('s'),
        enable_wildcard: flag('w'),
        caption_dropout_rate: if flag('d') { 0.5 } else { 0.0 },
        caption_tag_dropout_rate: if flag('t') { 0.5 } else { 0.0 },
        token_warmup_step: if flag('u') { 0.5 } else { 0.0 },
        keep_tokens: flags.len(),
        caption_separator: separator,
        keep_tokens_separator: next(),
        secondary_separator: Some(next()),
        caption_prefix: Some(next()),
        caption_suffix: Some(next()),
        ..CaptionConfig::default()
    };
    if config.validate().is_err() {
        return;
    }
    for step in [0, 7] {
        let time = CaptionTime {
            epoch: 1,
            step,
            max_train_steps: 20,
        };
        let mut stream = Streams::new(42).stream(Purpose::CAPTION, Place::item(step as u64));
        process_caption(caption, &config, time, &mut stream);
    }
});
