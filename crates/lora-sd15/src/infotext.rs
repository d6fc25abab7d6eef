//! The `parameters` text that the web UI writes into its pictures.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use regex::Regex;

/// `Key: value` pairs below a prompt, in the web UI's order as given.
///
/// ```
/// let text = lora_sd15::infotext("1girl", "lowres", &[("Steps", "20".into()), ("Model", "a, b".into())]);
/// assert_eq!(text, "1girl\nNegative prompt: lowres\nSteps: 20, Model: \"a, b\"");
/// ```
pub fn infotext(prompt: &str, negative: &str, parameters: &[(&str, String)]) -> String {
    let mut text = prompt.to_string();
    if !negative.is_empty() {
        text.push_str("\nNegative prompt: ");
        text.push_str(negative);
    }
    let pairs: Vec<String> = parameters
        .iter()
        .map(|(key, value)| format!("{key}: {}", quote(value)))
        .collect();
    text.push('\n');
    text.push_str(&pairs.join(", "));
    text.trim().to_string()
}

/// Values that would break the list are written as JSON strings.
fn quote(value: &str) -> String {
    if value.contains([',', ':', '\n']) {
        serde_json::Value::from(value).to_string()
    } else {
        value.to_string()
    }
}

/// A `parameters` text, taken apart.
///
/// ```
/// use lora_sd15::Infotext;
/// let text = Infotext::parse("1girl\nNegative prompt: lowres\nSteps: 20, Seed: 7, Size: 512x768");
/// assert_eq!((text.prompt.as_str(), text.negative.as_str()), ("1girl", "lowres"));
/// assert_eq!((text.get("Seed"), text.get("Size-2")), (Some("7"), Some("768")));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Infotext {
    /// What was drawn.
    pub prompt: String,
    /// What was avoided.
    pub negative: String,
    /// Everything else; `Size: WxH` is stored as `Size-1` and `Size-2`.
    pub parameters: BTreeMap<String, String>,
}

impl Infotext {
    /// Reads a text as the web UI does. Never fails: what is no list of parameters is part
    /// of the prompt.
    pub fn parse(text: &str) -> Self {
        static PAIR: OnceLock<Regex> = OnceLock::new();
        static SIZE: OnceLock<Regex> = OnceLock::new();
        let pair = PAIR.get_or_init(|| {
            Regex::new(r#"\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)"#)
                .expect("a constant pattern")
        });
        let size =
            SIZE.get_or_init(|| Regex::new(r"^([0-9]+)x([0-9]+)$").expect("a constant pattern"));
        let mut lines: Vec<&str> = text.trim().split('\n').collect();
        let last = lines.pop().unwrap_or("");
        let mut parameters = BTreeMap::new();
        if pair.find_iter(last).count() < 3 {
            lines.push(last);
        } else {
            for found in pair.captures_iter(last) {
                let (key, value) = (&found[1], unquote(&found[2]));
                if let Some(sides) = size.captures(&value) {
                    for (i, side) in [(1, &sides[1]), (2, &sides[2])] {
                        parameters.insert(format!("{key}-{i}"), side.to_string());
                    }
                } else if !value.is_empty() {
                    parameters.insert(key.to_string(), value);
                }
            }
        }
        let (mut prompt, mut negative) = (Vec::new(), Vec::new());
        let mut negated = false;
        for line in lines.into_iter().map(str::trim) {
            let rest = line.strip_prefix("Negative prompt:");
            negated |= rest.is_some();
            let part = if negated { &mut negative } else { &mut prompt };
            // As there: no line break before the first text that is not empty.
            if !part.is_empty() && part.iter().any(|l: &&str| !l.is_empty()) {
                part.push("\n");
            }
            part.push(rest.map_or(line, str::trim));
        }
        Self {
            prompt: prompt.concat(),
            negative: negative.concat(),
            parameters,
        }
    }

    /// What the picture was drawn with according to its text and is not what it would be
    /// drawn with now: model, VAE, adapters and embeddings by their hashes. `now` are the
    /// same parameters as a picture drawn now would get.
    ///
    /// ```
    /// use lora_sd15::Infotext;
    /// let text = Infotext::parse("zoe\nSteps: 20, Model hash: 6ce0161689, Lora hashes: \"zoe: 1234, hat: 5678\"");
    /// let now = [("Model hash", "6ce0161689".to_string()), ("Lora hashes", "hat: 5678, zoe: 4321".into())];
    /// assert_eq!(text.mismatches(&now), ["zoe: the picture's has the hash 1234, this one 4321"]);
    /// ```
    pub fn mismatches(&self, now: &[(&str, String)]) -> Vec<String> {
        let current = |key: &str| now.iter().find(|(k, _)| *k == key).map(|(_, v)| v.as_str());
        let mut list = Vec::new();
        for (what, key) in [("model", "Model hash"), ("VAE", "VAE hash")] {
            match (self.get(key), current(key)) {
                (Some(then), Some(now)) => list.extend(differing(what, then, now)),
                (Some(then), None) => {
                    list.push(format!("{what}: the picture's has the hash {then}, this one none"));
                }
                (None, Some(now)) if key == "VAE hash" => list.push(format!(
                    "{what}: the picture was drawn without one of its own, this one has the hash {now}"
                )),
                (None, _) => {}
            }
        }
        for key in ["Lora hashes", "TI hashes"] {
            let now = current(key).unwrap_or_default();
            for (name, then) in pairs(self.get(key).unwrap_or_default()) {
                let same = pairs(now).find(|(n, _)| *n == name);
                list.extend(same.and_then(|(_, now)| differing(name, then, now)));
            }
        }
        list
    }

    /// One parameter.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.parameters.get(key).map(String::as_str)
    }
}

/// A message when neither hash is the beginning of the other.
fn differing(what: &str, then: &str, now: &str) -> Option<String> {
    let same = then.starts_with(now) || now.starts_with(then);
    (!same).then(|| format!("{what}: the picture's has the hash {then}, this one {now}"))
}

/// `name: hash, name: hash`.
fn pairs(list: &str) -> impl Iterator<Item = (&str, &str)> {
    let pair = |item| str::rsplit_once(item, ':');
    list.split(',')
        .filter_map(pair)
        .map(|(name, hash)| (name.trim(), hash.trim()))
}

/// JSON strings are read; others stay as they are.
fn unquote(value: &str) -> String {
    if value.starts_with('"') && value.ends_with('"') {
        serde_json::from_str(value).unwrap_or_else(|_| value.to_string())
    } else {
        value.to_string()
    }
}
