//! The words of sd-scripts (kohya): `optimizer_type`, `optimizer_args`, `lr_scheduler`,
//! and how it groups parameters.

mod blocks;
mod groups;
mod literal;
mod optimizer;
mod scheduler;

pub use blocks::{BlockWeights, block_index};
pub use groups::GroupOptions;
pub use literal::parse_args;
pub use optimizer::{KohyaOptimizer, OPTIMIZER_TYPES, from_kohya};
pub use scheduler::{KohyaScheduler, SCHEDULERS};
