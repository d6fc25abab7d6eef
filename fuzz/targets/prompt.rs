//! Prompts: tags, composition, schedules, attention, chunks.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_sd15::Tokenizer;
use lora_sd15::prompt::{
    StepCount, chunk_prompt, extract_tags, parse_attention, schedule_prompt, split_composition,
};

fuzz_target!(|bytes: &[u8]| {
    let text = lora_fuzz::text(bytes);
    let (prompt, _, _) = extract_tags(&text);
    parse_attention(&text);
    let tokenizer = Tokenizer::new();
    for part in split_composition(&prompt) {
        for before in [None, Some(10)] {
            let count = StepCount { steps: 20, before };
            let stretches = schedule_prompt(&part.text, count);
            assert_eq!(stretches.last().map(|s| s.until), Some(20));
            for stretch in stretches.iter().take(4) {
                for chunk in chunk_prompt(&tokenizer, &stretch.text, 20) {
                    assert_eq!((chunk.tokens.len(), chunk.weights.len()), (77, 77));
                }
            }
        }
    }
});
