//! Files of sample prompts; the first byte chooses text, TOML or JSON.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_train::read_sample_prompts;

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = lora_fuzz::choice(bytes) else {
        return;
    };
    let name = match first {
        b'T' => "prompts.toml",
        b'J' => "prompts.json",
        _ => "prompts.txt",
    };
    if let Ok(prompts) = read_sample_prompts(&lora_fuzz::file(name, rest), "ddim") {
        for prompt in prompts {
            if let Ok(request) = prompt.request(1) {
                let _ = request.validate();
            }
        }
    }
});
