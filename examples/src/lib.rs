//! What the programs beside `src/` share: devices, memory, the demonstration files.

pub mod drawing;
pub mod portraits;

use std::error::Error;
use std::fmt::Arguments;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use candle_core::Device;
use lora_train::{Event, Outcome, TrainConfig, Trainer};

/// `std::print`, for output that people read in part: see [`print_to_reader`].
#[macro_export]
macro_rules! print {
    ($($text:tt)*) => { $crate::print_to_reader(format_args!($($text)*)) };
}

/// `std::println`, for output that people read in part: see [`print_to_reader`].
#[macro_export]
macro_rules! println {
    ($($text:tt)*) => {
        $crate::print_to_reader(format_args!("{}\n", format_args!($($text)*)))
    };
}

/// Prints. A reader that has gone, as in `lora inspect FILE | head`, wants no more: the
/// program ends, and nothing is wrong. Any other trouble (a full disk) is an error.
pub fn print_to_reader(text: Arguments<'_>) {
    match std::io::stdout().write_fmt(text) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => {
            eprintln!("error: standard output: {error}");
            std::process::exit(1);
        }
    }
}

/// A device by name: `cpu`, `cuda:0`, `metal`, or `auto`, which takes a GPU if the
/// program was built for one and one answers, and otherwise the CPU, with a line that says
/// why.
///
/// # Errors
/// When the name is unknown, or the device asked for does not answer.
pub fn device(name: &str) -> Result<Device, String> {
    let device = device_by_name(name)?;
    lora_kernels::keep_freed_device_memory(&device);
    Ok(device)
}

fn device_by_name(name: &str) -> Result<Device, String> {
    let number = |text: &str| {
        text.parse::<usize>()
            .map_err(|_| format!("device {name:?}: expected a number"))
    };
    match name.split_once(':').unwrap_or((name, "0")) {
        ("cpu", _) => Ok(Device::Cpu),
        ("cuda", n) => Device::new_cuda(number(n)?).map_err(|e| format!("device {name}: {e}")),
        ("metal", n) => Device::new_metal(number(n)?).map_err(|e| format!("device {name}: {e}")),
        ("auto", _) => Ok(best_device()),
        _ => Err(format!(
            "unknown device {name:?}; known are auto, cpu, cuda:0, metal"
        )),
    }
}

/// What this program was built for decides what is tried: a program built for CUDA finds
/// out at run time only that there is none.
fn best_device() -> Device {
    let tried = if cfg!(feature = "cuda") {
        Device::new_cuda(0)
    } else if cfg!(feature = "metal") {
        Device::new_metal(0)
    } else {
        return Device::Cpu;
    };
    tried.unwrap_or_else(|error| {
        eprintln!("no GPU answers ({error}); using the CPU");
        Device::Cpu
    })
}

/// Prints what happens while training, one line per epoch.
pub fn print_events(event: &Event<'_>) {
    match event {
        Event::Warning(text) => eprintln!("warning: {text}"),
        Event::Planned(plan) => eprintln!("{plan}"),
        Event::Saved(path) => eprintln!("saved {}", path.display()),
        Event::EpochFinished {
            epoch,
            average_loss,
            ..
        } => eprintln!("epoch {epoch}: loss {average_loss:.4}"),
        _ => {}
    }
}

/// What the recipes have in common: `MODEL PICTURES OUTPUT` from the command line, or the
/// bundled miniature and pictures without arguments.
///
/// # Errors
/// For another number of arguments.
pub fn recipe(name: &str) -> Result<TrainConfig, Box<dyn Error>> {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let (model, pictures, output) = match paths.as_slice() {
        [model, pictures, output] => (model.clone(), pictures.clone(), output.clone()),
        [] => (demo_model(), demo_pictures(), Path::new("out").join(name)),
        _ => return Err("expected: MODEL PICTURES OUTPUT".into()),
    };
    let resolution = if paths.is_empty() { "128" } else { "512" };
    Ok(TrainConfig {
        pretrained_model_name_or_path: Some(model),
        train_data_dir: Some(pictures),
        output_dir: Some(output),
        output_name: Some(name.into()),
        resolution: resolution.into(),
        min_bucket_reso: 64,
        train_batch_size: 2,
        max_train_epochs: Some(4),
        seed: Some(1),
        ..TrainConfig::default()
    })
}

/// Trains on the CPU and prints the file that it gave.
///
/// # Errors
/// As [`Trainer`].
pub fn train(config: TrainConfig) -> Result<(), Box<dyn Error>> {
    lora_kernels::keep_candle_to_one_thread();
    lora_kernels::keep_freed_memory();
    let mut trainer = Trainer::new(config, &Device::Cpu, &mut print_events)?;
    match trainer.run(&mut print_events, &AtomicBool::new(false))? {
        Outcome::Finished(file) | Outcome::Stopped(file) => println!("{}", file.display()),
    }
    Ok(())
}

/// Peak memory of this process in megabytes, where the system tells.
pub fn peak_memory_mb() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace()
        .nth(1)?
        .parse::<u64>()
        .ok()
        .map(|kb| kb / 1024)
}

/// A file or folder of this repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map_or_else(|| path.into(), |root| root.join(path))
}

/// The bundled miniature: SD1.5's structure, narrower, which draws pixel-art portraits of
/// 128x128 pixels from tags.
pub fn demo_model() -> PathBuf {
    repository("assets/mini/mini.safetensors")
}

/// The bundled pictures of one character, in kohya's folder layout.
pub fn demo_pictures() -> PathBuf {
    repository("assets/demo")
}

/// The demonstration: a LoHa of dim 2 with Prodigy on twelve pictures, 240 updates.
pub fn demo_config() -> TrainConfig {
    TrainConfig {
        pretrained_model_name_or_path: Some(demo_model()),
        train_data_dir: Some(demo_pictures()),
        output_dir: Some("out/demo".into()),
        output_name: Some("zoe".into()),
        resolution: "128".into(),
        min_bucket_reso: 64,
        max_bucket_reso: 128,
        network_module: Some("lycoris.kohya".into()),
        network_args: vec!["algo=loha".into(), "preset=full".into()],
        network_dim: Some(2),
        network_alpha: 1.0,
        optimizer_type: "Prodigy".into(),
        optimizer_args: vec!["betas=0.9,0.99".into(), "weight_decay=0.01".into()],
        shuffle_caption: true,
        keep_tokens: 1,
        train_batch_size: 4,
        max_train_epochs: Some(8),
        save_every_n_epochs: Some(2),
        seed: Some(1),
        ..TrainConfig::default()
    }
}

/// The programs in the main README, compiled as tests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct ReadmeDoctests;

/// The programs in the book, compiled as tests.
#[cfg(doctest)]
#[doc = include_str!("../../docs/in-your-program.md")]
pub struct BookDoctests;

#[cfg(test)]
mod tests {
    use super::device;

    #[test]
    fn devices_by_name() {
        assert!(device("auto").is_ok() && device("cpu").is_ok_and(|d| d.is_cpu()));
        for (name, says) in [("gpu", "cuda:0"), ("cuda:x", "a number")] {
            assert!(device(name).is_err_and(|e| e.contains(says)), "{name}");
        }
        if cfg!(not(feature = "cuda")) {
            assert!(device("cuda:0").is_err_and(|e| e.contains("cuda:0")));
        }
    }
}
