//! An adapter file of any layout: reported on, read strictly and leniently, its changes
//! computed, written and read again.
#![no_main]

use candle_core::Device;
use libfuzzer_sys::fuzz_target;
use lora_core::format::{LoadOptions, Strictness, TensorFile};
use lora_core::{AdapterSet, FileReport, SaveOptions};

fuzz_target!(|bytes: &[u8]| {
    let path = lora_fuzz::file("adapter.safetensors", bytes);
    if let Ok(report) = FileReport::open_checking_values(&path) {
        let _ = (report.format(), report.errors().count(), report.families());
        let _ = (report.ranks(), report.alphas(), report.parameters());
    }
    let lenient = LoadOptions {
        strictness: Strictness::Lenient,
        check_values: false,
    };
    for options in [LoadOptions::default(), lenient] {
        let Ok(set) = AdapterSet::load_with(&path, &Device::Cpu, &options) else {
            continue;
        };
        for (_, adapter) in set.iter() {
            let _ = adapter.norm();
        }
        if let Ok(file) = TensorFile::open(&path) {
            let _ = lora_core::algebra::review_clients(&file, &set);
        }
        if options.strictness == Strictness::Strict {
            let saved = lora_fuzz::folder().join("saved.safetensors");
            if set.save(&saved, &SaveOptions::default()).is_ok() {
                AdapterSet::load(&saved, &Device::Cpu).expect("what was saved can be read");
            }
        }
    }
});
