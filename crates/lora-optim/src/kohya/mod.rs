//! The words of sd-scripts (kohya): `optimizer_type`, `optimizer_args`, `lr_scheduler`.

mod literal;
mod optimizer;
mod scheduler;

pub use literal::parse_args;
pub use optimizer::{KohyaOptimizer, OPTIMIZER_TYPES, from_kohya};
pub use scheduler::{KohyaScheduler, SCHEDULERS};
