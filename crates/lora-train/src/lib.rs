//! The training loop of a LoRA trainer as a library: config, losses, steps, saving, resume, metadata.
