//! Trouble in captions: triggers, tags that say too much, texts that are all the same.

use std::collections::{BTreeMap, BTreeSet};

use crate::{CaptionSource, Dataset, Finding, FindingKind, ImageRecord, Role};

/// A share of captions that counts as nearly all.
const NEARLY_ALL: f64 = 0.9;
/// From this share of captions on, a first tag is taken for the trigger word.
const MEANT_AS_TRIGGER: f64 = 0.6;
/// With fewer captions no share means much.
const ENOUGH: usize = 4;
/// Tokens the text encoder reads in one chunk.
const TOKENS_PER_CHUNK: usize = 75;

/// One caption file's text and tags.
struct Caption<'a> {
    image: &'a ImageRecord,
    tags: Vec<String>,
}

pub(super) fn examine(dataset: &Dataset, trigger: Option<&str>) -> Vec<Finding> {
    let images = dataset
        .images()
        .iter()
        .filter(|image| image.role == Role::Train);
    let captions: Vec<Caption<'_>> = images.filter(|image| has_text(image)).map(read).collect();
    let mut findings = Vec::new();
    if captions.len() >= ENOUGH {
        findings.extend(identical(&captions));
        findings.extend(background(&captions));
        findings.extend(tag_spelling(&captions));
    }
    let trigger = trigger.map(normal).or_else(|| likely_trigger(&captions));
    if let Some(trigger) = trigger {
        findings.extend(trigger_missing(&captions, &trigger));
        findings.extend(trigger_spelling(&captions, &trigger));
        findings.extend(trigger_in_regularization(dataset, &trigger));
    }
    findings.extend(long(&captions));
    findings
}

fn has_text(image: &ImageRecord) -> bool {
    let from_file = !matches!(
        image.caption_source,
        CaptionSource::ClassTokens | CaptionSource::Nothing
    );
    from_file && !image.caption.trim().is_empty()
}

fn read(image: &ImageRecord) -> Caption<'_> {
    let tags = image
        .caption
        .split(',')
        .map(normal)
        .filter(|tag| !tag.is_empty())
        .collect();
    Caption { image, tags }
}

fn normal(tag: &str) -> String {
    tag.trim().to_lowercase()
}

fn share(count: usize, of: usize) -> f64 {
    count as f64 / of.max(1) as f64
}

fn identical(captions: &[Caption<'_>]) -> Option<Finding> {
    let texts: BTreeSet<&str> = captions.iter().map(|c| c.image.caption.as_str()).collect();
    (texts.len() == 1).then(|| {
        let what = format!(
            "all {} captions are the same: {}",
            captions.len(),
            captions[0].image.caption
        );
        let advice = "whatever differs between the pictures cannot be told apart later; \
                      describe what should stay changeable";
        Finding::warning(FindingKind::IdenticalCaptions, what, advice)
    })
}

fn background(captions: &[Caption<'_>]) -> Option<Finding> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for tag in captions
        .iter()
        .flat_map(|c| c.tags.iter().map(String::as_str).collect::<BTreeSet<_>>())
    {
        let is_background = tag.ends_with("background") || matches!(tag, "indoors" | "outdoors");
        if is_background {
            *counts.entry(tag).or_default() += 1;
        }
    }
    let (tag, count) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    (share(count, captions.len()) >= NEARLY_ALL).then(|| {
        let what = format!("`{tag}` is in {count} of {} captions", captions.len());
        let advice = "the background is learnt with the subject and returns in every picture; \
                      add pictures with other backgrounds";
        Finding::warning(FindingKind::CommonBackground, what, advice)
    })
}

/// The most frequent first tag, if it is clearly meant as one.
fn likely_trigger(captions: &[Caption<'_>]) -> Option<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for first in captions.iter().filter_map(|caption| caption.tags.first()) {
        *counts.entry(first).or_default() += 1;
    }
    let (tag, count) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    let is_meant = captions.len() >= ENOUGH && share(count, captions.len()) >= MEANT_AS_TRIGGER;
    is_meant.then(|| tag.to_owned())
}

fn trigger_missing(captions: &[Caption<'_>], trigger: &str) -> Vec<Finding> {
    let has = |caption: &&Caption<'_>| caption.tags.iter().any(|tag| tag == trigger);
    let is_first = |caption: &&Caption<'_>| caption.tags.first().is_some_and(|tag| tag == trigger);
    let missing: Vec<_> = captions.iter().filter(|c| !has(c)).collect();
    let later: Vec<_> = captions.iter().filter(|c| has(c) && !is_first(c)).collect();
    let mut findings = Vec::new();
    if !missing.is_empty() {
        let what = format!(
            "`{trigger}` is not in {} of {} captions: {}",
            missing.len(),
            captions.len(),
            names(&missing)
        );
        let advice = "these pictures do not strengthen the trigger word; add it as the first tag";
        findings.push(Finding::warning(FindingKind::Trigger, what, advice));
    }
    if !later.is_empty() {
        let what = format!(
            "`{trigger}` is not the first tag in {} captions: {}",
            later.len(),
            names(&later)
        );
        let advice = "keep_tokens and the text encoder favour the front; move it there";
        findings.push(Finding::warning(FindingKind::Trigger, what, advice));
    }
    findings
}

/// First tags that differ from the trigger only in case, separators or one letter.
fn trigger_spelling(captions: &[Caption<'_>], trigger: &str) -> Option<Finding> {
    let bare = |tag: &str| {
        tag.chars()
            .filter(|c| c.is_alphanumeric())
            .collect::<String>()
    };
    let raw_first = |caption: &Caption<'_>| {
        caption
            .image
            .caption
            .split(',')
            .next()
            .map(|tag| tag.trim().to_owned())
    };
    let is_same = |tag: &str| {
        let (tag, trigger) = (bare(&tag.to_lowercase()), bare(trigger));
        tag == trigger || (trigger.len() >= 5 && one_edit_apart(&tag, &trigger))
    };
    let spellings: BTreeSet<String> = captions
        .iter()
        .filter_map(raw_first)
        .filter(|tag| is_same(tag))
        .collect();
    (spellings.len() > 1).then(|| {
        let list = spellings.into_iter().collect::<Vec<_>>().join("`, `");
        let what = format!("the trigger word is spelt in several ways: `{list}`");
        let advice =
            "each spelling is learnt apart and so less well (case alone does not matter); use one";
        Finding::warning(FindingKind::TriggerSpelling, what, advice)
    })
}

/// Whether one letter inserted, removed or replaced turns one text into the other.
fn one_edit_apart(a: &str, b: &str) -> bool {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.len().abs_diff(b.len()) > 1 {
        return false;
    }
    let same_start = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
    let same_end = a
        .iter()
        .rev()
        .zip(b.iter().rev())
        .take_while(|(a, b)| a == b)
        .count();
    same_start + same_end + 1 >= a.len().max(b.len())
}

fn trigger_in_regularization(dataset: &Dataset, trigger: &str) -> Option<Finding> {
    let reg = dataset
        .images()
        .iter()
        .filter(|image| image.role == Role::Regularization);
    let count = reg
        .filter(|image| image.caption.split(',').any(|tag| normal(tag) == trigger))
        .count();
    (count > 0).then(|| {
        let what = format!("`{trigger}` is in {count} captions of regularization images");
        let advice = "they then teach the trigger word the wrong look; remove it there";
        Finding::warning(FindingKind::Regularization, what, advice)
    })
}

/// Tags that occur both with underscores and with spaces.
fn tag_spelling(captions: &[Caption<'_>]) -> Option<Finding> {
    let tags: BTreeSet<&str> = captions
        .iter()
        .flat_map(|c| &c.tags)
        .map(String::as_str)
        .collect();
    let with_spaces =
        |tag: &&str| tag.contains('_') && tags.contains(tag.replace('_', " ").as_str());
    let mixed: Vec<&str> = tags
        .iter()
        .copied()
        .filter(|tag| with_spaces(tag))
        .take(5)
        .collect();
    (!mixed.is_empty()).then(|| {
        let what = format!(
            "tags are written with underscores and with spaces: {}",
            mixed.join(", ")
        );
        let advice =
            "the text encoder reads these as different words; use one way (spaces are usual)";
        Finding::warning(FindingKind::TagSpelling, what, advice)
    })
}

fn long(captions: &[Caption<'_>]) -> Option<Finding> {
    let is_long =
        |caption: &&Caption<'_>| estimated_tokens(&caption.image.caption) > TOKENS_PER_CHUNK;
    let long: Vec<_> = captions.iter().filter(is_long).collect();
    (!long.is_empty()).then(|| {
        let what = format!("{} captions are longer than about {TOKENS_PER_CHUNK} tokens: {}", long.len(), names(&long));
        let advice = "with max_token_length unset the rest is cut off; set it to 150 or 225, or shorten them";
        Finding::warning(FindingKind::LongCaption, what, advice)
    })
}

/// About one token per word of up to 8 letters and one per sign.
fn estimated_tokens(caption: &str) -> usize {
    let words = caption
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty());
    let signs = caption
        .chars()
        .filter(|c| !c.is_alphanumeric() && !c.is_whitespace())
        .count();
    words.map(|word| word.len().div_ceil(8)).sum::<usize>() + signs
}

fn names(captions: &[&Caption<'_>]) -> String {
    crate::dataset::some_names(captions.iter().map(|caption| caption.image.path.as_path()))
}
