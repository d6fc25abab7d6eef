//! `<lora:name:0.8>` tags.

use std::sync::OnceLock;

use regex::Regex;

use super::strip_comments;

/// An adapter asked for in a prompt.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterTag {
    /// File stem, or the name it was trained under.
    pub name: String,
    /// Multiplier on the text encoder.
    pub text_encoder: f64,
    /// Multiplier on the UNet.
    pub unet: f64,
    /// Rank to cut to (`dyn`), if given.
    pub rank: Option<usize>,
    /// Multipliers per block (`lbw`), if given: 17 for the blocks with attention or 26 for
    /// all, the text encoder first.
    pub blocks: Option<Vec<f64>>,
    /// Arguments that could not be understood.
    pub unknown: Vec<String>,
}

/// Takes comments and all `<kind:...>` tags out of a prompt; returns the rest and
/// the adapters (`lora` and `lyco`) in order. The same name given twice adds up: one
/// adapter with the sum of the weights, or two where blocks or ranks differ.
/// Tags of other kinds are returned as text in the third part.
///
/// ```
/// use lora_sd15::prompt::extract_tags;
/// let (prompt, adapters, _) = extract_tags("zoe, <lora:zoe:0.8>hat");
/// assert_eq!(prompt, "zoe, hat");
/// assert_eq!((adapters[0].name.as_str(), adapters[0].unet), ("zoe", 0.8));
/// ```
pub fn extract_tags(prompt: &str) -> (String, Vec<AdapterTag>, Vec<String>) {
    static TAG: OnceLock<Regex> = OnceLock::new();
    let tag = TAG.get_or_init(|| {
        Regex::new(r"<(\w+):([^>]+)>").expect("the pattern is a constant that compiles")
    });
    let prompt = strip_comments(prompt);
    let (mut adapters, mut others) = (Vec::<AdapterTag>::new(), Vec::new());
    for found in tag.captures_iter(&prompt) {
        if !matches!(&found[1], "lora" | "lyco") {
            others.push(found[0].to_string());
            continue;
        }
        let new = parse(&found[2]);
        let same = |a: &&mut AdapterTag| {
            (&a.name, a.rank, &a.blocks) == (&new.name, new.rank, &new.blocks)
        };
        match adapters.iter_mut().find(same) {
            Some(old) => {
                old.text_encoder += new.text_encoder;
                old.unet += new.unet;
                old.unknown.extend(new.unknown);
            }
            None => adapters.push(new),
        }
    }
    (tag.replace_all(&prompt, "").into_owned(), adapters, others)
}

fn parse(arguments: &str) -> AdapterTag {
    let (mut positional, mut named, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
    for argument in arguments.split(':') {
        match argument.split_once('=') {
            Some(pair) => named.push(pair),
            None => positional.push(argument),
        }
    }
    let name = |key: &str| named.iter().rev().find(|(k, _)| *k == key).map(|(_, v)| *v);
    let mut read = |text: Option<&str>| -> Option<f64> {
        let text = text?.trim();
        let number = text.parse::<f64>().ok().filter(|n| n.is_finite());
        if number.is_none() {
            unknown.push(text.to_string());
        }
        number
    };
    let second = read(positional.get(1).copied()).unwrap_or(1.0);
    let text_encoder = read(name("te")).unwrap_or(second);
    let unet = match name("unet") {
        Some(text) => read(Some(text)),
        None => read(positional.get(2).copied()),
    };
    let rank = match name("dyn") {
        Some(text) => read(Some(text)),
        None => read(positional.get(3).copied()),
    };
    let blocks = name("lbw").map(|list| {
        let numbers = list.split(',').map(|part| read(Some(part)));
        numbers.map(|n| n.unwrap_or(0.0)).collect()
    });
    unknown.extend(
        named
            .iter()
            .filter(|(key, _)| !["te", "unet", "dyn", "lbw"].contains(key))
            .map(|(key, value)| format!("{key}={value}")),
    );
    unknown.extend(positional.iter().skip(4).map(ToString::to_string));
    AdapterTag {
        name: positional.first().copied().unwrap_or("").to_string(),
        text_encoder,
        unet: unet.unwrap_or(text_encoder),
        rank: rank.map(|r| r.max(1.0) as usize),
        blocks,
        unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_given_twice_adds_up_and_loses_nothing() {
        let tags = |prompt| extract_tags(prompt).1;
        let [sum] = &tags("<lora:zoe:0.5> <lyco:zoe:0.25:unet=1>")[..] else {
            panic!("one adapter");
        };
        assert_eq!((sum.text_encoder, sum.unet), (0.75, 1.5));
        // Different blocks or ranks cannot be one adapter.
        let two = tags("<lora:zoe:1:dyn=4> <lora:zoe:0.5:lbw=1,0> <lora:zoe:1:dyn=4>");
        let parts: Vec<_> = two.iter().map(|t| (t.unet, t.rank, &t.blocks)).collect();
        assert_eq!(
            parts,
            [(2.0, Some(4), &None), (0.5, None, &Some(vec![1.0, 0.0]))]
        );
        assert_eq!(
            tags("<lora:zoe> <lora:zoe:1:much=2>")[0].unknown,
            ["much=2"]
        );
    }
}
