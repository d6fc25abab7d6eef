//! What this machine offers: devices, processor, memory.
//!
//! ```text
//! cargo run --release --example doctor
//! ```

use lora_examples::{device, peak_memory_mb, println};

fn main() {
    println!("version {}", env!("CARGO_PKG_VERSION"));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    println!("processor: {threads} threads, {}", lora_kernels::level());
    match memory() {
        Some((total, free)) => println!("memory: {total} MB, {free} MB available"),
        None => println!("memory: this system does not tell"),
    }
    for name in ["cpu", "cuda:0", "metal"] {
        match device(name) {
            Ok(device) => match lora_kernels::device_memory(&device) {
                Some((free, total)) => println!(
                    "device {name}: answers, {} MB, {} MB free",
                    total >> 20,
                    free >> 20
                ),
                None => println!("device {name}: answers"),
            },
            Err(why) => println!("device {name}: {why}"),
        }
    }
    match device("auto") {
        Ok(device) => println!("--device auto takes {:?}", device.location()),
        Err(why) => println!("--device auto: {why}"),
    }
    if let Some(mb) = peak_memory_mb() {
        println!("this program took {mb} MB");
    }
}

/// Megabytes in all, and available to a new program.
fn memory() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let number = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        let kb: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kb / 1024)
    };
    Some((number("MemTotal:")?, number("MemAvailable:")?))
}
