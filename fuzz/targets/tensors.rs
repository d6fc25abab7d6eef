//! A safetensors file: header, metadata, every tensor, hashes; as a checkpoint and as an
//! embedding.
#![no_main]

use candle_core::{DType, Device};
use libfuzzer_sys::fuzz_target;
use lora_core::format::{TensorFile, legacy_hash, model_hash_of_file};
use lora_sd15::prompt::Embeddings;
use lora_sd15::{Checkpoint, Part, Tokenizer};

fuzz_target!(|bytes: &[u8]| {
    let path = lora_fuzz::file("model.safetensors", bytes);
    if let Ok(file) = TensorFile::open(&path) {
        let _ = (file.metadata(), file.not_finite());
        let mut tensors = std::collections::BTreeMap::new();
        for name in file.names() {
            let _ = (file.shape(&name), file.dtype(&name));
            if let Ok(tensor) = file.tensor(&name, &Device::Cpu) {
                tensors.insert(name, tensor);
            }
        }
        let _ = legacy_hash(&tensors, &file.metadata());
        let _ = model_hash_of_file(&path);
    }
    if let Ok(checkpoint) = Checkpoint::open(&path) {
        for part in [Part::Unet, Part::Vae, Part::TextEncoder] {
            let _ = checkpoint.verify(part);
            let _ = checkpoint.var_builder(part, DType::F32, &Device::Cpu);
        }
    }
    let tokenizer = Tokenizer::new();
    let _ = Embeddings::default().load(&tokenizer, &path, &Device::Cpu);
});
