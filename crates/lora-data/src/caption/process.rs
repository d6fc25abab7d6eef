//! What is done to a caption when its image is drawn.
//!
//! The order is sd-scripts': prefix and suffix, dropout of the whole caption,
//! choice of a line and of alternatives, then the tags (warm-up, shuffle, tag
//! dropout), then the secondary separator. Two differences, both cures:
//! the marker `keep_tokens_separator` never stays in the text, and the epoch is
//! an argument, so captions are dropped in the right epochs.

use rand::seq::SliceRandom;
use rand::{Rng, RngCore};

use super::CaptionConfig;

/// Where in a run a caption is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CaptionTime {
    /// Epoch, counted from 1.
    pub epoch: usize,
    /// Updates made so far.
    pub step: usize,
    /// Updates of the whole run, for a `token_warmup_step` below 1.
    pub max_train_steps: usize,
}

/// The random decisions a caption needs. Implemented for every generator of
/// `rand`; implement it yourself to replay recorded decisions.
pub trait CaptionDraws {
    /// A number from 0 to below 1.
    fn unit(&mut self) -> f64;
    /// One of `count` alternatives; `count` is at least 1.
    fn choice(&mut self, count: usize) -> usize;
    /// A new order: place `i` gets what was at place `order[i]`.
    fn order(&mut self, count: usize) -> Vec<usize>;
}

impl<R: RngCore + ?Sized> CaptionDraws for R {
    fn unit(&mut self) -> f64 {
        self.random()
    }

    fn choice(&mut self, count: usize) -> usize {
        self.random_range(0..count.max(1))
    }

    fn order(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        order.shuffle(self);
        order
    }
}

/// The caption as the model sees it: a pure function of its arguments.
///
/// ```
/// use lora_data::{CaptionConfig, CaptionTime, Place, Purpose, Streams, process_caption};
///
/// let config = CaptionConfig { shuffle_caption: true, keep_tokens: 1, ..Default::default() };
/// let mut stream = Streams::new(42).stream(Purpose::CAPTION, Place::item(0));
/// let text = process_caption("alice, red hair, smile", &config, CaptionTime::default(), &mut stream);
/// assert!(text == "alice, red hair, smile" || text == "alice, smile, red hair");
/// ```
pub fn process_caption(
    raw: &str,
    config: &CaptionConfig,
    time: CaptionTime,
    draws: &mut (impl CaptionDraws + ?Sized),
) -> String {
    let text = with_prefix_and_suffix(raw, config);
    if is_dropped(config, time.epoch, draws) {
        return String::new();
    }
    let text = if config.enable_wildcard {
        choose(&text, draws)
    } else {
        first_line(&text).to_owned()
    };
    let text = process_tags(text, config, time, draws);
    match config.secondary_separator.as_deref() {
        Some(secondary) if !secondary.is_empty() => {
            text.replace(secondary, &config.caption_separator)
        }
        _ => text,
    }
}

fn with_prefix_and_suffix(raw: &str, config: &CaptionConfig) -> String {
    let mut text = String::with_capacity(raw.len());
    if let Some(prefix) = config.caption_prefix.as_deref().filter(|p| !p.is_empty()) {
        text.push_str(prefix);
        text.push(' ');
    }
    text.push_str(raw);
    if let Some(suffix) = config.caption_suffix.as_deref().filter(|s| !s.is_empty()) {
        text.push(' ');
        text.push_str(suffix);
    }
    text
}

fn is_dropped(
    config: &CaptionConfig,
    epoch: usize,
    draws: &mut (impl CaptionDraws + ?Sized),
) -> bool {
    let rate = config.caption_dropout_rate;
    // The number is drawn only when it is needed, as in the reference.
    let by_chance = rate > 0.0 && draws.unit() < rate;
    let every = config.caption_dropout_every_n_epochs;
    by_chance || (every > 0 && epoch.is_multiple_of(every))
}

fn first_line(text: &str) -> &str {
    text.split('\n').next().unwrap_or_default()
}

/// One of several lines, then one alternative of each `{a|b}`.
fn choose(text: &str, draws: &mut (impl CaptionDraws + ?Sized)) -> String {
    let lines: Vec<&str> = text.split('\n').collect();
    let line = match lines.len() {
        1 => text,
        count => lines.get(draws.choice(count)).copied().unwrap_or(text),
    };
    let tokens = tokenize(line);
    let mut chosen = String::with_capacity(line.len());
    let mut rest = tokens.as_slice();
    while let Some((first, after)) = rest.split_first() {
        let close = after.iter().position(|t| *t == Token::Close);
        match close {
            // `{}` has no content and stays as it is.
            Some(end) if *first == Token::Open && end > 0 => {
                let alternatives: Vec<&[Token]> =
                    after[..end].split(|t| *t == Token::Char('|')).collect();
                let alternative = alternatives.get(draws.choice(alternatives.len()));
                chosen.extend(
                    alternative
                        .into_iter()
                        .copied()
                        .flatten()
                        .map(|t| t.as_char()),
                );
                rest = &after[end + 1..];
            }
            _ => {
                chosen.push(first.as_char());
                rest = after;
            }
        }
    }
    chosen
}

/// A caption's characters, with braces that mean alternatives told from doubled ones.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Token {
    Open,
    Close,
    Char(char),
}

impl Token {
    fn as_char(self) -> char {
        match self {
            Self::Open => '{',
            Self::Close => '}',
            Self::Char(c) => c,
        }
    }
}

fn tokenize(line: &str) -> Vec<Token> {
    let mut tokens = Vec::with_capacity(line.len());
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        let doubled = matches!(c, '{' | '}') && chars.next_if_eq(&c).is_some();
        tokens.push(match c {
            '{' if !doubled => Token::Open,
            '}' if !doubled => Token::Close,
            c => Token::Char(c),
        });
    }
    tokens
}

/// The tags of one caption by what may happen to them.
struct Tags<'a> {
    fixed: Vec<&'a str>,
    flexible: Vec<&'a str>,
    fixed_end: Vec<&'a str>,
}

fn process_tags(
    text: String,
    config: &CaptionConfig,
    time: CaptionTime,
    draws: &mut (impl CaptionDraws + ?Sized),
) -> String {
    let marker = config.keep_tokens_separator.as_str();
    let is_marked = !marker.is_empty() && text.contains(marker);
    let changes_tags = config.shuffle_caption
        || config.token_warmup_step > 0.0
        || config.caption_tag_dropout_rate > 0.0;
    if !changes_tags && !is_marked {
        return text;
    }
    let mut tags = if is_marked {
        split_at_marker(&text, config)
    } else {
        split_at_count(&text, config)
    };
    if let Some(shown) = warmup_length(config, time, tags.flexible.len()) {
        tags.flexible.truncate(shown);
    }
    if config.shuffle_caption {
        let order = draws.order(tags.flexible.len());
        tags.flexible = order
            .iter()
            .filter_map(|&from| tags.flexible.get(from).copied())
            .collect();
    }
    let rate = config.caption_tag_dropout_rate;
    if rate > 0.0 {
        tags.flexible.retain(|_| draws.unit() >= rate);
    }
    [tags.fixed, tags.flexible, tags.fixed_end]
        .concat()
        .join(", ")
}

fn split_at_marker<'a>(text: &'a str, config: &CaptionConfig) -> Tags<'a> {
    let marker = config.keep_tokens_separator.as_str();
    let pieces = |part: &'a str| -> Vec<&'a str> {
        part.split(config.caption_separator.as_str())
            .map(str::trim)
            .filter(|p| !p.is_empty())
            .collect()
    };
    let mut parts = text.split(marker);
    let fixed = parts.next().map(pieces).unwrap_or_default();
    let flexible = parts.next().map(pieces).unwrap_or_default();
    // A third marker and later ones separate nothing more; they vanish too.
    let fixed_end = parts.flat_map(pieces).collect();
    Tags {
        fixed,
        flexible,
        fixed_end,
    }
}

fn split_at_count<'a>(text: &'a str, config: &CaptionConfig) -> Tags<'a> {
    let mut fixed: Vec<&str> = text
        .split(config.caption_separator.as_str())
        .map(str::trim)
        .collect();
    let flexible = fixed.split_off(config.keep_tokens.min(fixed.len()));
    Tags {
        fixed,
        flexible,
        fixed_end: Vec::new(),
    }
}

/// How many flexible tags are shown while the warm-up lasts.
fn warmup_length(config: &CaptionConfig, time: CaptionTime, flexible: usize) -> Option<usize> {
    let given = config.token_warmup_step;
    let warmup = if given < 1.0 {
        (given * time.max_train_steps as f64).floor()
    } else {
        given
    };
    let step = time.step as f64;
    if warmup <= 0.0 || step >= warmup {
        return None;
    }
    let min = config.token_warmup_min as f64;
    let growth = (step * ((flexible as f64 - min) / warmup)).floor();
    Some((growth + min).max(0.0) as usize)
}
