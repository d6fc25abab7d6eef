//! The files of a state folder: position and settings (first byte `J`), or an optimizer's
//! state, put into an optimizer.
#![no_main]

use std::path::Path;

use candle_core::{DType, Device, Var};
use libfuzzer_sys::fuzz_target;
use lora_optim::{
    AdamW, AdamWConfig, OnChange, Optimizer, OptimizerState, ParamGroup, Prodigy, ProdigyConfig,
};
use lora_train::{RunState, TrainConfig};

fn groups() -> Vec<ParamGroup> {
    let variable = Var::zeros((2, 3), DType::F32, &Device::Cpu).expect("six zeros");
    vec![ParamGroup::new("unet", vec![("a".into(), variable)])]
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = lora_fuzz::choice(bytes) else {
        return;
    };
    if first == b'J' {
        if let Ok(state) = serde_json::from_slice::<RunState>(rest) {
            let _ = state.check(Path::new("state"), &TrainConfig::default(), &state);
        }
        return;
    }
    let path = lora_fuzz::file("optimizer.safetensors", rest);
    let Ok(state) = OptimizerState::load(&path) else {
        return;
    };
    for on_change in [OnChange::Refuse, OnChange::UseNew] {
        let adam = AdamW::new(groups(), AdamWConfig::default());
        let _ = adam.expect("valid options").load_state(&state, on_change);
        let prodigy = Prodigy::new(groups(), ProdigyConfig::default());
        let _ = prodigy
            .expect("valid options")
            .load_state(&state, on_change);
    }
});
