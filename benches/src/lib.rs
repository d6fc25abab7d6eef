//! Benchmarks of the LoRA toolkit; see the files named `*.rs` beside `src/`.
