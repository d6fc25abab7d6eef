//! `AND`: several prompts steering one picture.

use std::sync::OnceLock;

use regex::Regex;

/// One of the prompts joined by `AND`.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Its text.
    pub text: String,
    /// How strongly it steers; negative steers away.
    pub weight: f64,
}

/// Splits a prompt at the word `AND`; each part may end in `:weight`.
///
/// ```
/// use lora_sd15::prompt::split_composition;
/// let parts = split_composition("a cat AND snow:0.5");
/// assert_eq!((parts[1].text.as_str(), parts[1].weight), (" snow", 0.5));
/// ```
pub fn split_composition(prompt: &str) -> Vec<Part> {
    static AND: OnceLock<Regex> = OnceLock::new();
    static WEIGHT: OnceLock<Regex> = OnceLock::new();
    let and = AND.get_or_init(|| Regex::new(r"\bAND\b").expect("a constant pattern"));
    let weight = WEIGHT.get_or_init(|| {
        Regex::new(r"(?s)^(.*?)(?:\s*:\s*([-+]?(?:[0-9]+\.?|[0-9]*\.[0-9]+)))?\s*$")
            .expect("a constant pattern")
    });
    and.split(prompt)
        .map(|part| {
            let found = weight.captures(part);
            let text = found.as_ref().and_then(|f| f.get(1));
            let value = found.as_ref().and_then(|f| f.get(2));
            Part {
                text: text.map_or(part, |t| t.as_str()).to_string(),
                weight: value.and_then(|v| v.as_str().parse().ok()).unwrap_or(1.0),
            }
        })
        .collect()
}
