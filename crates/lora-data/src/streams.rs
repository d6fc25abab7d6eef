//! Named streams of random numbers.
//!
//! There is no global generator. Every random decision of a run draws from a
//! stream of its own, found from the run's seed, the purpose and the place
//! (epoch, step, item). So adding a draw in one place moves no other, the
//! number of loader threads does not matter, and a resumed run continues with
//! exactly the numbers it would have had.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;
use sha2::{Digest, Sha256};

/// What a stream is drawn for. Two purposes never share numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Purpose(&'static str);

impl Purpose {
    /// Order of the images inside a bucket.
    pub const IMAGE_ORDER: Self = Self("image order");
    /// Order of the batches of an epoch.
    pub const BATCH_ORDER: Self = Self("batch order");
    /// Flip, crop and colour of one drawn image.
    pub const AUGMENT: Self = Self("augment");
    /// Shuffling, dropout and wildcards of one drawn caption.
    pub const CAPTION: Self = Self("caption");
    /// Which images are held back for validation.
    pub const VALIDATION_SPLIT: Self = Self("validation split");
    /// Sampling latents from their posterior.
    pub const LATENT_SAMPLE: Self = Self("latent sample");
    /// Training noise.
    pub const NOISE: Self = Self("noise");
    /// Training timesteps.
    pub const TIMESTEPS: Self = Self("timesteps");
    /// Dropout inside adapters.
    pub const ADAPTER_DROPOUT: Self = Self("adapter dropout");
    /// Initial values of adapters.
    pub const ADAPTER_INIT: Self = Self("adapter init");

    /// A purpose of your own. The name is part of the numbers: keep it.
    pub const fn named(name: &'static str) -> Self {
        Self(name)
    }
}

/// Where in a run a stream is drawn. Coordinates that do not matter stay 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Place {
    /// Epoch, counted from 1.
    pub epoch: u64,
    /// Optimizer or batch step.
    pub step: u64,
    /// Image, layer or position in the batch.
    pub item: u64,
}

impl Place {
    /// Only the epoch matters.
    pub const fn epoch(epoch: u64) -> Self {
        Self {
            epoch,
            step: 0,
            item: 0,
        }
    }

    /// Only the step and the item in it matter.
    pub const fn step(step: u64, item: u64) -> Self {
        Self {
            epoch: 0,
            step,
            item,
        }
    }

    /// Only the item matters.
    pub const fn item(item: u64) -> Self {
        Self {
            epoch: 0,
            step: 0,
            item,
        }
    }
}

/// The source of all random streams of one run.
///
/// ```
/// use lora_data::{Place, Purpose, Streams};
/// use rand::Rng;
///
/// let streams = Streams::new(42);
/// let mut noise = streams.stream(Purpose::NOISE, Place::step(7, 0));
/// let mut again = streams.stream(Purpose::NOISE, Place::step(7, 0));
/// let mut other = streams.stream(Purpose::NOISE, Place::step(8, 0));
/// let first: u64 = noise.random();
/// assert_eq!(first, again.random::<u64>());
/// assert_ne!(first, other.random::<u64>());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streams {
    seed: u64,
}

impl Streams {
    /// All streams that belong to `seed`.
    pub const fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The seed given.
    pub const fn seed(self) -> u64 {
        self.seed
    }

    /// The stream for a purpose at a place: always the same numbers for the same arguments.
    pub fn stream(self, purpose: Purpose, place: Place) -> ChaCha12Rng {
        let mut hash = Sha256::new();
        hash.update(b"lora stream 1");
        for number in [self.seed, place.epoch, place.step, place.item] {
            hash.update(number.to_le_bytes());
        }
        // Last, because it is the only part of variable length.
        hash.update(purpose.0.as_bytes());
        ChaCha12Rng::from_seed(hash.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;

    #[test]
    fn every_coordinate_gives_other_numbers() {
        let draw = |seed, purpose, place| Streams::new(seed).stream(purpose, place).random::<u64>();
        let place = Place {
            epoch: 1,
            step: 2,
            item: 3,
        };
        let draws = [
            draw(1, Purpose::NOISE, place),
            draw(2, Purpose::NOISE, place),
            draw(1, Purpose::TIMESTEPS, place),
            draw(1, Purpose::NOISE, Place { epoch: 2, ..place }),
            draw(1, Purpose::NOISE, Place { step: 3, ..place }),
            draw(1, Purpose::NOISE, Place { item: 4, ..place }),
            draw(1, Purpose::named("noise 2"), place),
        ];
        let distinct: std::collections::BTreeSet<_> = draws.iter().collect();
        assert_eq!(distinct.len(), draws.len());
    }

    #[test]
    fn numbers_are_the_same_in_every_release() {
        // A resumed run relies on this value.
        let first: u64 = Streams::new(42)
            .stream(Purpose::NOISE, Place::step(1, 0))
            .random();
        assert_eq!(first, FIRST_NOISE);
    }

    const FIRST_NOISE: u64 = 7_941_199_962_019_182_534;
}
