//! Holding images back for validation: disjoint, and never all or none of them.

use rand::seq::SliceRandom;

use crate::{Place, Purpose, Streams};

/// How many of `count` images are trained and how many are held back.
///
/// sd-scripts rounds both numbers on their own, so that its sets may share an image
/// or leave validation empty. Here the held-back number is rounded, at least one and
/// never all, and the rest is trained.
///
/// ```
/// use lora_data::split_sizes;
/// assert_eq!(split_sizes(11, 0.25), (8, 3));
/// assert_eq!(split_sizes(11, 0.01), (10, 1));
/// assert_eq!(split_sizes(1, 0.5), (1, 0));
/// ```
pub fn split_sizes(count: usize, validation_split: f64) -> (usize, usize) {
    if validation_split <= 0.0 || count < 2 {
        return (count, 0);
    }
    let wanted = (count as f64 * validation_split).round_ties_even() as usize;
    let held_back = wanted.clamp(1, count - 1);
    (count - held_back, held_back)
}

/// Which of `count` sorted images are held back.
pub(super) fn held_back(
    count: usize,
    validation_split: f64,
    seed: u64,
    subset: usize,
) -> Vec<bool> {
    let (_, held_back) = split_sizes(count, validation_split);
    let mut marks = vec![false; count];
    marks[..held_back].fill(true);
    let mut stream =
        Streams::new(seed).stream(Purpose::VALIDATION_SPLIT, Place::item(subset as u64));
    marks.shuffle(&mut stream);
    marks
}
