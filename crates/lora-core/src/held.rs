//! What a training step holds in memory.

/// Values that a part of a model holds during a training step, as estimated from shapes.
///
/// ```
/// use lora_core::Held;
/// let first = Held { kept: 100, backward: 30 };
/// let second = Held { kept: 10, backward: 50 };
/// // One after the other: what is kept adds up, what is held for a moment does not.
/// assert_eq!(first.then(second), Held { kept: 110, backward: 50 });
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Held {
    /// From the forward pass to the end of the backward pass.
    pub kept: usize,
    /// Beside that, for a moment of the backward pass.
    pub backward: usize,
}

impl Held {
    /// Of two parts that run one after the other.
    pub fn then(self, other: Self) -> Self {
        Self {
            kept: self.kept + other.kept,
            backward: self.backward.max(other.backward),
        }
    }

    /// Under gradient checkpointing, which keeps the `result` only: the part runs once more
    /// in the backward pass, from copies of its `inputs`.
    pub fn checkpointed(self, inputs: usize, result: usize) -> Self {
        Self {
            kept: result,
            backward: inputs + self.kept + self.backward,
        }
    }
}
