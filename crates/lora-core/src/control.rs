//! What a loaded or trained adapter shares with the layers it is attached to: the
//! multiplier, and the dropout draws of the current training step.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::Rng;
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;

/// Probabilities of the three kinds of dropout that sd-scripts and LyCORIS know,
/// all in `[0, 1)`, 0 meaning off.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Dropout {
    /// `network_dropout`: zeroes values behind the down projection, scaling the rest
    /// by `1 / (1 - p)`.
    pub neuron: f64,
    /// `rank_dropout`: zeroes whole ranks per sample, scaling the rest by `1 / (1 - p)`.
    pub rank: f64,
    /// `rank_dropout_scale` of LyCORIS: where `rank` drops rows of the delta, the rest is
    /// scaled by the share that was kept.
    pub rank_scale: bool,
    /// `module_dropout`: skips the layer's adapter for the step.
    pub module: f64,
}

impl Dropout {
    /// Whether any kind is on.
    pub fn is_on(&self) -> bool {
        self.neuron > 0.0 || self.rank > 0.0 || self.module > 0.0
    }
}

/// Which dropout a draw is for: each kind has its own stream of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropoutKind {
    /// Skipping the whole module.
    Module,
    /// Zeroing values.
    Neuron,
    /// Zeroing ranks.
    Rank,
}

/// Where dropout takes its uniform numbers from.
pub trait Draws {
    /// `n` numbers in `[0, 1)`.
    fn uniform(&self, kind: DropoutKind, n: usize) -> Vec<f32>;
}

/// One training pass through one layer. At inference there is none.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// Probabilities.
    pub dropout: Dropout,
    /// Random numbers for this step and layer.
    pub draws: &'a dyn Draws,
}

impl std::fmt::Debug for Pass<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pass")
            .field("dropout", &self.dropout)
            .finish_non_exhaustive()
    }
}

/// Draws that depend only on (step seed, layer name, kind): recomputing a layer
/// within a step gives the same masks.
struct LayerDraws<'a> {
    seed: u64,
    layer: &'a str,
}

impl Draws for LayerDraws<'_> {
    fn uniform(&self, kind: DropoutKind, n: usize) -> Vec<f32> {
        let mut rng = ChaCha12Rng::seed_from_u64(self.seed ^ hash(self.layer));
        rng.set_stream(kind as u64);
        (0..n).map(|_| rng.random::<f32>()).collect()
    }
}

/// FNV-1a: stable across platforms and releases, unlike the standard hasher.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Shared by an adapter set and the layers it is attached to, for one component.
#[derive(Debug)]
pub(crate) struct Control {
    multiplier: AtomicU64,
    step: Mutex<Option<(u64, Dropout)>>,
}

impl Control {
    pub(crate) fn new(multiplier: f64) -> Self {
        Self {
            multiplier: AtomicU64::new(multiplier.to_bits()),
            step: Mutex::new(None),
        }
    }

    pub(crate) fn multiplier(&self) -> f64 {
        f64::from_bits(self.multiplier.load(Ordering::Relaxed))
    }

    pub(crate) fn set_multiplier(&self, multiplier: f64) {
        self.multiplier
            .store(multiplier.to_bits(), Ordering::Relaxed);
    }

    /// Starts a training step (dropout on), or ends training with `None`.
    pub(crate) fn set_step(&self, step: Option<(u64, Dropout)>) {
        *self.step.lock().unwrap_or_else(|e| e.into_inner()) = step.filter(|(_, d)| d.is_on());
    }

    /// Runs `branch` with this step's dropout, or skips it (`None`) when module
    /// dropout says so.
    pub(crate) fn with_pass<T, E>(
        &self,
        layer: &str,
        branch: impl FnOnce(Option<&Pass<'_>>) -> Result<T, E>,
    ) -> Result<Option<T>, E> {
        let step = *self.step.lock().unwrap_or_else(|e| e.into_inner());
        let Some((seed, dropout)) = step else {
            return branch(None).map(Some);
        };
        let draws = LayerDraws { seed, layer };
        if dropout.module > 0.0
            && f64::from(draws.uniform(DropoutKind::Module, 1)[0]) < dropout.module
        {
            return Ok(None);
        }
        branch(Some(&Pass {
            dropout,
            draws: &draws,
        }))
        .map(Some)
    }
}
