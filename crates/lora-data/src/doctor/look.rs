//! Trouble that only the pixels show: pictures that are nearly the same.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

use rayon::prelude::*;

use crate::dataset::base_name;
use crate::picture::{Picture, resize};
use crate::{
    Dataset, Error, Finding, FindingKind, Interpolation, PlanItem, Result, Role, Severity, Size,
};

/// Bits of a hash that may differ.
const NEAR: u32 = 3;
/// Pictures a picture is compared with per band, so that thousands of equal ones take no hours.
const COMPARED: usize = 64;

/// Training images that cannot be loaded, and pairs of nearly the same perceptual hash.
pub(super) fn examine(dataset: &Dataset) -> Vec<Finding> {
    let batches = dataset.each_once(|role| role == Role::Train);
    let items: Vec<PlanItem> = batches.into_iter().flat_map(|batch| batch.items).collect();
    let hash = |item: &PlanItem| {
        dataset
            .cropped(item)
            .map(|(picture, _)| difference_hash(&picture))
    };
    let hashed: Vec<(&PathBuf, Result<u64>)> = items
        .par_iter()
        .map(|item| (&dataset.images()[item.image].path, hash(item)))
        .collect();
    let mut findings = Vec::new();
    let mut pictures = Vec::new();
    for (path, hash) in hashed {
        match hash {
            Ok(hash) => pictures.push((path, hash)),
            Err(error) => findings.push(unreadable(&error)),
        }
    }
    findings.extend(near_duplicates(&pictures));
    findings
}

fn unreadable(error: &Error) -> Finding {
    let advice = "training will stop at this picture; replace or remove it";
    let finding = Finding::warning(FindingKind::Undecodable, error.to_string(), advice);
    Finding {
        severity: Severity::Problem,
        ..finding
    }
}

fn near_duplicates(pictures: &[(&PathBuf, u64)]) -> Option<Finding> {
    let hashes: Vec<u64> = pictures.iter().map(|(_, hash)| *hash).collect();
    let pairs = near_pairs(&hashes)
        .into_iter()
        .map(|(a, b)| (pictures[a].0, pictures[b].0));
    // The same file in two datasets is meant to be there twice.
    let pairs: Vec<_> = pairs.filter(|(a, b)| a != b).collect();
    if pairs.is_empty() {
        return None;
    }
    let shown = pairs
        .iter()
        .take(5)
        .map(|(a, b)| format!("{} and {}", base_name(a), base_name(b)));
    let mut shown: Vec<String> = shown.collect();
    if pairs.len() > shown.len() {
        shown.push("...".into());
    }
    let what = format!(
        "{} pairs of pictures look nearly the same: {}",
        pairs.len(),
        shown.join(", ")
    );
    let advice = "they count twice and are learnt by heart first; keep one of each";
    Some(Finding::warning(FindingKind::NearDuplicates, what, advice))
}

/// One bit per pixel of an 8x8 grid: whether it is brighter than its right neighbour.
fn difference_hash(picture: &Picture) -> u64 {
    let small = resize(picture, Size::new(9, 8), Some(Interpolation::Area));
    let gray: Vec<u32> = small
        .rgb
        .as_chunks::<3>()
        .0
        .iter()
        .map(|&[r, g, b]| 299 * u32::from(r) + 587 * u32::from(g) + 114 * u32::from(b))
        .collect();
    let bits = gray
        .chunks_exact(9)
        .flat_map(|row| row.windows(2).map(|pair| pair[0] > pair[1]));
    bits.fold(0, |hash, bit| hash << 1 | u64::from(bit))
}

/// Hashes that differ in at most `NEAR` bits are equal in one of `NEAR + 1` bands.
fn near_pairs(hashes: &[u64]) -> BTreeSet<(usize, usize)> {
    let mut pairs = BTreeSet::new();
    for band in 0..=NEAR {
        let mut same: HashMap<u16, Vec<usize>> = HashMap::new();
        for (number, hash) in hashes.iter().enumerate() {
            let others = same.entry((hash >> (16 * band)) as u16).or_default();
            pairs.extend(
                others
                    .iter()
                    .take(COMPARED)
                    .filter(|&&o| (hashes[o] ^ hash).count_ones() <= NEAR)
                    .map(|&o| (o, number)),
            );
            others.push(number);
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_with_up_to_three_other_bits_are_found() {
        let hash = 0x1234_5678_9abc_def0_u64;
        let hashes = [hash, hash ^ 1 ^ (1 << 20) ^ (1 << 40), !hash, hash ^ 0b1111];
        assert_eq!(
            near_pairs(&hashes).into_iter().collect::<Vec<_>>(),
            [(0, 1)]
        );
    }
}
