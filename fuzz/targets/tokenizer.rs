//! Any text becomes tokens, and chunks of 77.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_sd15::Tokenizer;
use lora_sd15::tokenizer::VOCAB_SIZE;

fuzz_target!(|bytes: &[u8]| {
    let tokenizer = Tokenizer::new();
    let text = lora_fuzz::text(bytes);
    let ids = tokenizer.encode(&text);
    assert!(ids.iter().all(|id| (*id as usize) < VOCAB_SIZE));
    assert_eq!(tokenizer.encode_padded(&text).len(), 77);
    for chunks in 1..=3 {
        let all = tokenizer.encode_chunks(&text, chunks);
        assert!(all.iter().all(|chunk| chunk.len() == 77));
    }
});
