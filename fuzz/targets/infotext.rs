//! The parameters text of a picture, and the job it stands for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_sd15::{Infotext, Txt2Img};

fuzz_target!(|bytes: &[u8]| {
    let text = Infotext::parse(&lora_fuzz::text(bytes));
    if let Ok(request) = Txt2Img::from_infotext(&text)
        && request.validate().is_ok()
    {
        let _ = request.parameters(0);
    }
});
