//! Adapters beside the networks: several at once, found by name, read once.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Device;
use lora_core::format::{LoadOptions, Strictness, data_hash_of_file};
use lora_core::merge::TemporaryMerge;
use lora_core::{Adaptable, AdapterSet, Lora};

use crate::prompt::AdapterTag;
use crate::{Error, Result};

/// How adapters act on the networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AdapterMode {
    /// Computed beside each layer: changing multipliers costs nothing.
    #[default]
    Side,
    /// Added to the weights, which are kept and put back: faster steps, more memory.
    Merged,
}

/// A picture with most of an adapter is better than none: what cannot be read is left out,
/// and the set tells.
fn lenient() -> LoadOptions {
    LoadOptions {
        strictness: Strictness::Lenient,
        ..LoadOptions::default()
    }
}

/// The adapters of a pipeline.
#[derive(Debug, Default)]
pub(super) struct Adapters {
    pub(super) mode: AdapterMode,
    known: BTreeMap<String, AdapterSet>,
    /// By hash of their files, so that a file under two names is read once.
    by_hash: BTreeMap<String, AdapterSet>,
    hashes: BTreeMap<String, String>,
    /// What is on the networks now, and for which tags.
    active: Active,
    tags: Vec<AdapterTag>,
}

#[derive(Debug, Default)]
enum Active {
    #[default]
    Nothing,
    Side(Vec<AdapterSet>),
    Merged(TemporaryMerge, TemporaryMerge),
}

impl Adapters {
    pub(super) fn add(&mut self, name: String, adapter: AdapterSet) {
        self.hashes.remove(&name);
        self.tags.retain(|tag| tag.name != name);
        self.tags.push(AdapterTag::default()); // differs from every request
        self.known.insert(name, adapter);
    }

    pub(super) fn load(&mut self, name: &str, path: &Path, device: &Device) -> Result<&AdapterSet> {
        let hash = data_hash_of_file(path)?;
        if self.hashes.get(name) != Some(&hash) {
            let set = match self.by_hash.get(&hash) {
                Some(set) => set.clone(),
                None => AdapterSet::load_with(path, device, &lenient())?,
            };
            self.add(name.to_string(), set.clone());
            self.hashes.insert(name.to_string(), hash.clone());
            self.by_hash.insert(hash.clone(), set);
        }
        Ok(&self.by_hash[&hash])
    }

    pub(super) fn get(&self, name: &str) -> Option<&AdapterSet> {
        self.known.get(name)
    }

    pub(super) fn hash(&self, name: &str) -> Option<&str> {
        self.hashes.get(name).map(String::as_str)
    }

    /// Puts exactly these adapters on the networks.
    pub(super) fn apply(
        &mut self,
        tags: &[AdapterTag],
        unet: &mut dyn Adaptable,
        text_encoder: &mut dyn Adaptable,
    ) -> Result<()> {
        let same_mode = matches!(
            (&self.active, self.mode),
            (Active::Side(_), AdapterMode::Side) | (Active::Merged(..), AdapterMode::Merged)
        );
        if same_mode && self.tags == tags {
            return Ok(());
        }
        let mut layers: Vec<(AdapterSet, f64, f64)> = Vec::new();
        for tag in tags {
            layers.extend(self.shares(tag)?);
        }
        self.clear(unet, text_encoder)?;
        let outcome = match self.mode {
            AdapterMode::Side => self.attach(layers, unet, text_encoder),
            AdapterMode::Merged => self.merge(&layers, unet, text_encoder),
        };
        match outcome {
            Ok(()) => {
                self.tags = tags.to_vec();
                Ok(())
            }
            Err(error) => {
                self.clear(unet, text_encoder)?;
                Err(error)
            }
        }
    }

    fn clear(&mut self, unet: &mut dyn Adaptable, text: &mut dyn Adaptable) -> Result<()> {
        self.tags.clear();
        match std::mem::take(&mut self.active) {
            Active::Nothing => {}
            Active::Side(sets) => {
                for set in sets {
                    set.detach(unet)?;
                    set.detach(text)?;
                }
            }
            Active::Merged(on_unet, on_text) => {
                on_unet.undo(unet)?;
                on_text.undo(text)?;
            }
        }
        Ok(())
    }

    fn attach(
        &mut self,
        layers: Vec<(AdapterSet, f64, f64)>,
        unet: &mut dyn Adaptable,
        text: &mut dyn Adaptable,
    ) -> Result<()> {
        let mut sets = Vec::new();
        let mut outcome = Ok(());
        for (mut set, on_unet, on_text) in layers {
            outcome = set
                .attach(unet, on_unet)
                .and_then(|report| report.strict())
                .and_then(|_| set.attach(text, on_text))
                .and_then(|report| report.strict())
                .map(|_| ());
            sets.push(set);
            if outcome.is_err() {
                break;
            }
        }
        self.active = Active::Side(sets);
        Ok(outcome?)
    }

    fn merge(
        &mut self,
        layers: &[(AdapterSet, f64, f64)],
        unet: &mut dyn Adaptable,
        text: &mut dyn Adaptable,
    ) -> Result<()> {
        let strict = |layers: Vec<String>| {
            if layers.is_empty() {
                Ok(())
            } else {
                Err(lora_core::Error::UnmatchedLayers { layers })
            }
        };
        let of = |first: bool| -> Vec<(&AdapterSet, f64)> {
            let pick = |(_, u, t): &'_ (AdapterSet, f64, f64)| if first { *u } else { *t };
            layers.iter().map(|layer| (&layer.0, pick(layer))).collect()
        };
        let (on_unet, left) = TemporaryMerge::apply(unet, &of(true))?;
        let (on_text, more) = match TemporaryMerge::apply(text, &of(false)) {
            Ok(done) => done,
            Err(error) => {
                on_unet.undo(unet)?;
                return Err(error.into());
            }
        };
        self.active = Active::Merged(on_unet, on_text);
        strict(left)?;
        Ok(strict(more)?)
    }

    /// A tag's adapter as parts with one multiplier each for UNet and text encoder.
    fn shares(&self, tag: &AdapterTag) -> Result<Vec<(AdapterSet, f64, f64)>> {
        let refuse = |what: String| Error::Prompt {
            prompt: format!("<lora:{}>", tag.name),
            what,
        };
        if let Some(argument) = tag.unknown.first() {
            return Err(refuse(format!(
                "{argument:?} is not understood; known are numbers, te=, unet=, dyn= and lbw= with numbers"
            )));
        }
        let Some(set) = self.known.get(&tag.name) else {
            return Err(Error::UnknownName {
                what: "adapter",
                name: tag.name.clone(),
                known: self.known.keys().cloned().collect::<Vec<_>>().join(", "),
            });
        };
        // A copy of its own: attached copies share their multiplier.
        let mut copy = AdapterSet::default();
        for (name, adapter) in set.iter() {
            copy.insert(name, adapter.clone());
        }
        if let Some(rank) = tag.rank {
            copy = cut(&copy, rank).map_err(|e| match e {
                Some(family) => refuse(format!(
                    "dyn= cuts plain LoRA only, and this file has {family}; resize the file instead"
                )),
                None => refuse("dyn=: the factors cannot be cut".into()),
            })?;
        }
        let Some(blocks) = &tag.blocks else {
            return Ok(vec![(copy, tag.unet, tag.text_encoder)]);
        };
        let names: Vec<String> = match blocks.len() {
            17 => BLOCKS_WITH_ATTENTION
                .iter()
                .map(ToString::to_string)
                .collect(),
            26 => std::iter::once("BASE".to_string())
                .chain((0..12).map(|i| format!("IN{i:02}")))
                .chain(["MID".to_string()])
                .chain((0..12).map(|i| format!("OUT{i:02}")))
                .collect(),
            n => return Err(refuse(format!("lbw= has {n} numbers, expected 17 or 26"))),
        };
        let weight = |layer: &str| {
            let block = block_of(layer);
            let at = names.iter().position(|n| *n == block);
            at.and_then(|i| blocks.get(i)).copied().unwrap_or(0.0)
        };
        let mut groups: Vec<(f64, AdapterSet)> = Vec::new();
        for (name, adapter) in copy.iter() {
            let weight = weight(name);
            let at = match groups.iter().position(|(w, _)| *w == weight) {
                Some(at) => at,
                None => {
                    groups.push((weight, AdapterSet::default()));
                    groups.len() - 1
                }
            };
            if let Some((_, set)) = groups.get_mut(at) {
                set.insert(name, adapter.clone());
            }
        }
        Ok(groups
            .into_iter()
            .map(|(w, set)| (set, w * tag.unet, w * tag.text_encoder))
            .collect())
    }
}

const BLOCKS_WITH_ATTENTION: [&str; 17] = [
    "BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", "OUT03", "OUT04", "OUT05",
    "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11",
];

/// The block of the original network that a layer belongs to; the text encoder and what is
/// outside blocks is `BASE`.
fn block_of(layer: &str) -> String {
    let Some(path) = layer.strip_prefix("lora_unet_") else {
        return "BASE".into();
    };
    let digit = |text: &str| text.chars().next().and_then(|c| c.to_digit(10));
    let inside = |rest: &str, down: bool| -> Option<String> {
        let level = digit(rest)?;
        let rest = rest.get(2..)?;
        let position = match rest.split_once('_')? {
            ("downsamplers", _) => 3 + 3 * level,
            ("upsamplers", _) => 2 + 3 * level,
            (_, rest) => digit(rest)? + 3 * level + u32::from(down),
        };
        Some(format!("{}{position:02}", if down { "IN" } else { "OUT" }))
    };
    let block = if path.starts_with("mid_block_") {
        Some("MID".into())
    } else if path.starts_with("conv_in") {
        Some("IN00".into())
    } else if let Some(rest) = path.strip_prefix("down_blocks_") {
        inside(rest, true)
    } else if let Some(rest) = path.strip_prefix("up_blocks_") {
        inside(rest, false)
    } else {
        None
    };
    block.unwrap_or_else(|| "BASE".into())
}

/// The first `rank` ranks of every LoRA; the family's name when one is something else.
fn cut(set: &AdapterSet, rank: usize) -> std::result::Result<AdapterSet, Option<String>> {
    let mut short = AdapterSet::default();
    for (name, adapter) in set.iter() {
        let tensors: BTreeMap<_, _> = adapter.tensors().map_err(|_| None)?.into_iter().collect();
        let plain = tensors.keys().all(|k| {
            matches!(
                *k,
                "lora_down.weight" | "lora_up.weight" | "alpha" | "lora_mid.weight"
            )
        });
        let (Some(down), Some(up)) = (
            tensors.get("lora_down.weight"),
            tensors.get("lora_up.weight"),
        ) else {
            return Err(Some(format!("{:?}", adapter.family())));
        };
        if !plain || tensors.contains_key("lora_mid.weight") {
            return Err(Some(format!("{:?}", adapter.family())));
        }
        let build = || -> lora_core::Result<Lora> {
            let full = down.dim(0)?;
            let keep = rank.clamp(1, full);
            let alpha = match tensors.get("alpha") {
                Some(alpha) => {
                    let alpha = alpha.flatten_all()?.to_dtype(candle_core::DType::F64)?;
                    alpha
                        .to_vec1::<f64>()?
                        .first()
                        .copied()
                        .unwrap_or(full as f64)
                }
                None => full as f64,
            };
            let (down, up) = (
                down.narrow(0, 0, keep)?.contiguous()?,
                up.narrow(1, 0, keep)?.contiguous()?,
            );
            // The scale stays that of the whole file.
            Lora::new(name, down, None, up, alpha * keep as f64 / full as f64)
        };
        short.insert(name, std::sync::Arc::new(build().map_err(|_| None)?));
    }
    Ok(short)
}

#[cfg(test)]
mod tests {
    use lora_core::Component;

    use super::*;

    #[test]
    fn blocks_are_those_of_the_original_network() {
        let block = |path: &str| block_of(&Component::Unet.layer_name(path));
        assert_eq!(block("down_blocks.0.attentions.1.proj_in"), "IN02");
        assert_eq!(block("down_blocks.2.attentions.0.proj_in"), "IN07");
        assert_eq!(block("down_blocks.1.downsamplers.0.conv"), "IN06");
        assert_eq!(block("mid_block.resnets.0.conv1"), "MID");
        assert_eq!(block("up_blocks.1.attentions.0.proj_in"), "OUT03");
        assert_eq!(block("up_blocks.3.attentions.2.proj_in"), "OUT11");
        assert_eq!(block("up_blocks.0.upsamplers.0.conv"), "OUT02");
        let text = Component::TextEncoder.layer_name("text_model.encoder.layers.0.mlp.fc1");
        assert_eq!(block_of(&text), "BASE");
    }
}
