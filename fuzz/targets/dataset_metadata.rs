//! A dataset's metadata file: one object, or one object a line.
#![no_main]

use std::sync::Once;

use libfuzzer_sys::fuzz_target;
use lora_data::{
    CaptionTime, DataConfig, Dataset, DatasetConfig, DecodeCheck, Streams, SubsetConfig,
};

/// A picture for the file to name: one white pixel as a bitmap.
fn picture() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut bitmap =
            b"BM\x3a\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\x01\0\0\0\x01\0\0\0\x01\0\x18\0".to_vec();
        bitmap.resize(54, 0);
        bitmap.extend([255, 255, 255, 0]);
        lora_fuzz::file("a.bmp", &bitmap);
    });
}

fuzz_target!(|bytes: &[u8]| {
    picture();
    let Some((first, rest)) = lora_fuzz::choice(bytes) else {
        return;
    };
    let name = if first == b'L' {
        "meta.jsonl"
    } else {
        "meta.json"
    };
    let subset = SubsetConfig {
        image_dir: Some(lora_fuzz::folder().to_path_buf()),
        metadata_file: Some(lora_fuzz::file(name, rest)),
        ..SubsetConfig::default()
    };
    let config = DataConfig {
        datasets: vec![DatasetConfig {
            subsets: vec![subset],
            ..DatasetConfig::default()
        }],
        decode_check: DecodeCheck::Quick,
        threads: 1,
        ..DataConfig::default()
    };
    if let Ok(dataset) = Dataset::load(config) {
        for batch in dataset.epoch(1, 1).batches {
            for item in &batch.items {
                dataset.caption(item, CaptionTime::default(), Streams::new(1));
            }
        }
    }
});
