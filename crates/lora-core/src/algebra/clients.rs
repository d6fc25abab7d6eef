//! What other programs make of an adapter file, and files that they read right.
//!
//! The rules were found by running or reading AUTOMATIC1111 1.10, ComfyUI, diffusers
//! 0.42 (its Stable Diffusion 1.x loader), stable-diffusion.cpp of August 2026 and LyCORIS
//! 4.1.3. They are about layers on their own: what a program does with the whole file when
//! one layer fails is said in the finding.

use std::collections::{BTreeMap, BTreeSet};

use crate::adapter::{Adapter, Family};
use crate::format::{TensorFile, layer_from_ldm};
use crate::{AdapterSet, Error, Result};

/// A program that reads adapter files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Client {
    /// AUTOMATIC1111's web UI.
    A1111,
    /// ComfyUI.
    ComfyUi,
    /// Hugging Face diffusers.
    Diffusers,
    /// stable-diffusion.cpp.
    StableDiffusionCpp,
    /// LyCORIS, when it loads a file to train on.
    Lycoris,
}

impl Client {
    /// All of them.
    pub const ALL: [Client; 5] = [
        Self::A1111,
        Self::ComfyUi,
        Self::Diffusers,
        Self::StableDiffusionCpp,
        Self::Lycoris,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::A1111 => "a1111",
            Self::ComfyUi => "comfyui",
            Self::Diffusers => "diffusers",
            Self::StableDiffusionCpp => "sd.cpp",
            Self::Lycoris => "lycoris",
        }
    }

    /// The program with this name.
    ///
    /// # Errors
    /// [`Error::BadValue`] for another name.
    pub fn from_name(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|c| c.name() == name);
        found.ok_or_else(|| Error::BadValue {
            layer: "client".into(),
            name: "name",
            value: format!("{name:?}"),
            expected: "expected a1111, comfyui, diffusers, sd.cpp or lycoris",
        })
    }
}

impl std::fmt::Display for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How a program reads something, from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// As its author meant it.
    Right,
    /// Right under a condition that the finding names.
    Conditional,
    /// Not at all; the rest of the file is read.
    Ignored,
    /// With another meaning.
    Wrong,
    /// With an error.
    Fails,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Right => "read right",
            Self::Conditional => "right on a condition",
            Self::Ignored => "ignored",
            Self::Wrong => "read wrongly",
            Self::Fails => "fails",
        })
    }
}

/// One thing that a program makes of some layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How it is read.
    pub outcome: Outcome,
    /// What is behind it.
    pub what: &'static str,
    /// How many layers.
    pub layers: usize,
    /// One of them, or a key.
    pub example: String,
}

/// What one program makes of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientReport {
    /// The program.
    pub client: Client,
    /// Layers that it reads right without any condition.
    pub right: usize,
    /// Everything else, the worst first.
    pub findings: Vec<Finding>,
}

/// How keys are spelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Layout {
    Kohya,
    KohyaLdm,
    TextEncoder1,
    NoTextModel,
    Wrapper,
    Processors,
    DiffusersPeft,
    PeftFolder,
    Comfy,
}

impl Layout {
    fn of(key: &str) -> Option<Self> {
        let layer = key.split('.').next().unwrap_or(key);
        let has = |parts: &[&str]| parts.iter().any(|part| key.contains(part));
        Some(if key.starts_with("lora_te1_") {
            Self::TextEncoder1
        } else if let Some(path) = layer.strip_prefix("lora_te_") {
            if path.starts_with("encoder_layers_") {
                Self::NoTextModel
            } else {
                Self::Kohya
            }
        } else if let Some(path) = layer.strip_prefix("lora_unet_") {
            if layer_from_ldm(path).is_some() {
                Self::KohyaLdm
            } else {
                Self::Kohya
            }
        } else if key.starts_with("lora_") || key.starts_with("oft_unet_") {
            Self::Kohya
        } else if key.starts_with("lycoris_") {
            Self::Wrapper
        } else if key.starts_with("base_model.model.") {
            Self::PeftFolder
        } else if key.starts_with("diffusion_model.") {
            Self::Comfy
        } else if has(&[".lora_A.", ".lora_B.", ".lora_magnitude_vector"]) {
            Self::DiffusersPeft
        } else if has(&["_lora.", ".lora.", ".lora_linear_layer."]) {
            Self::Processors
        } else {
            return None;
        })
    }

    /// What the program does with keys spelled so, where it does not read them right.
    fn verdict(self, client: Client, attention: bool) -> Option<(Outcome, &'static str)> {
        use Client::{A1111, ComfyUi, Diffusers, Lycoris, StableDiffusionCpp as SdCpp};
        use Outcome::{Conditional, Fails, Ignored};
        let unknown = (Ignored, "names in a layout that this program does not know");
        match (self, client) {
            (Self::NoTextModel, _) => Some((
                Ignored,
                "text encoder names without text_model_ are read nowhere",
            )),
            (Self::Kohya | Self::TextEncoder1, A1111 | ComfyUi | Diffusers | SdCpp) => None,
            (Self::Kohya, Lycoris) => None,
            (Self::KohyaLdm, A1111 | ComfyUi | SdCpp) => None,
            (Self::KohyaLdm, Diffusers) => Some((
                Conditional,
                "LDM's block names are read only when the UNet's configuration is handed over",
            )),
            (Self::Wrapper, ComfyUi | SdCpp) => None,
            (Self::Wrapper, Lycoris) => Some((
                Conditional,
                "names of LyCORIS' stand-alone wrapper are read by that wrapper alone",
            )),
            (Self::Processors, ComfyUi | Diffusers | SdCpp) => None,
            (Self::DiffusersPeft, Diffusers | SdCpp) => None,
            (Self::DiffusersPeft, ComfyUi) if !attention => None,
            (Self::DiffusersPeft, ComfyUi) => Some((
                Ignored,
                "attention layers of the UNet under PEFT's names are not in its table",
            )),
            (Self::PeftFolder, Diffusers) => Some((
                Conditional,
                "PEFT's own layout is read through the peft package with adapter_config.json",
            )),
            (Self::Comfy, ComfyUi) => None,
            (Self::Wrapper, Diffusers) => Some((Fails, "names of LyCORIS' stand-alone wrapper")),
            _ => Some(unknown),
        }
    }
}

/// What matters about one layer's adapter.
pub(super) struct Traits {
    family: Family,
    /// The family below magnitudes.
    inner: Family,
    ranks: Vec<usize>,
    names: BTreeSet<&'static str>,
    /// Magnitudes per output (`false`: per input), for DoRA.
    output_axis: bool,
    constraint: bool,
}

impl Traits {
    pub(super) fn of(adapter: &dyn Adapter) -> Result<Self> {
        let tensors = adapter.tensors()?;
        let names: BTreeSet<&'static str> = tensors.iter().map(|(name, _)| *name).collect();
        let has = |name: &str| names.contains(name);
        let dims = |name: &str| {
            tensors
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, t)| t.dims())
        };
        let inner = match adapter.family() {
            Family::Dora if has("hada_w1_a") => Family::Loha,
            Family::Dora if has("lora_up.weight") => Family::Lora,
            Family::Dora => Family::Lokr,
            family => family,
        };
        let ranks = ["lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"]
            .iter()
            .filter_map(|name| dims(name)?.first().copied())
            .collect();
        let constraint = adapter.alpha().is_some_and(|alpha| alpha > 0.0);
        Ok(Self {
            family: adapter.family(),
            inner,
            ranks,
            output_axis: dims("dora_scale").is_some_and(|d| d.first() != Some(&1)),
            constraint,
            names,
        })
    }

    fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// The rules of one program.
    pub(super) fn verdicts(&self, client: Client) -> Vec<(Outcome, &'static str)> {
        let mut all = Vec::new();
        let mut add = |outcome, what| all.push((outcome, what));
        let dora = self.family == Family::Dora;
        let beside = self.has("diff_b") && self.family != Family::Full;
        let tucker_lokr = self.has("lokr_t2");
        use Outcome::{Conditional, Fails, Ignored, Wrong};
        match (self.family, client) {
            (Family::Tlora, Client::Lycoris) => add(
                Conditional,
                "T-LoRA: right on the very checkpoint it was trained on",
            ),
            (Family::Tlora, Client::Diffusers) | (Family::KohyaOft, Client::A1111) => {}
            (Family::Tlora, _) => add(Ignored, "T-LoRA is read by LyCORIS only"),
            (Family::KohyaOft, Client::Diffusers) => {}
            (Family::KohyaOft, _) => add(Ignored, "OFT of sd-scripts (oft_unet_ names)"),
            _ => {}
        }
        match client {
            Client::A1111 => {
                match self.family {
                    Family::Dora if self.output_axis => add(
                        Wrong,
                        "DoRA magnitudes per output are applied along the inputs (noise pictures)",
                    ),
                    Family::Glora => add(
                        Fails,
                        "GLoRA factors are taken in the older order; the layer stays as it was",
                    ),
                    Family::Boft => add(
                        Conditional,
                        "BOFT: right at multiplier 1; others interpolate the weight, not the stages",
                    ),
                    Family::Norm if !self.has("b_norm") => {
                        add(Fails, "w_norm without b_norm: the whole file fails");
                    }
                    _ => {}
                }
                if beside {
                    add(Ignored, "diff_b beside another family");
                }
            }
            Client::ComfyUi => match self.family {
                Family::Dora if self.output_axis => add(
                    Wrong,
                    "DoRA magnitudes per output are divided by the norms of the unchanged weight",
                ),
                Family::Ia3 => add(Ignored, "(IA)^3"),
                Family::Oft if self.constraint => {
                    add(Wrong, "OFT's constraint is not multiplied by the outputs");
                }
                Family::Boft if self.constraint => {
                    add(Wrong, "BOFT's constraint is not multiplied by the outputs");
                }
                Family::Oft | Family::Boft => add(
                    Conditional,
                    "OFT: right at strength 1; other strengths are applied twice",
                ),
                _ => {}
            },
            Client::Diffusers => {
                match self.family {
                    Family::Lora if self.has("lora_mid.weight") => {
                        add(Fails, "Tucker cores (lora_mid)");
                    }
                    Family::Lora => {}
                    Family::Dora if self.inner == Family::Lora => {
                        add(Wrong, "DoRA magnitudes are dropped with a warning");
                    }
                    _ => add(Fails, "it reads no family but LoRA"),
                }
                if beside {
                    add(Fails, "diff_b is not a key it knows");
                }
            }
            Client::StableDiffusionCpp => {
                if self.ranks.contains(&1) {
                    add(
                        Wrong,
                        "rank 1: the scale becomes alpha / inputs, almost no effect",
                    );
                }
                if dora {
                    add(Wrong, "DoRA magnitudes are ignored");
                }
                if tucker_lokr {
                    add(Wrong, "LoKr's core lokr_t2 is ignored");
                }
                if self.has("lora_mid.weight") {
                    add(
                        Conditional,
                        "Tucker cores: right when merged, wrong in its run-time mode",
                    );
                }
                let known = [Family::Lora, Family::Loha, Family::Lokr, Family::Full];
                if !known.contains(&self.inner) {
                    add(Ignored, "a family it does not know");
                }
                if beside {
                    add(Ignored, "diff_b beside another family");
                }
            }
            Client::Lycoris => {
                match self.family {
                    Family::Ia3 => add(Fails, "it cannot load its own (IA)^3 files"),
                    Family::Dora if !self.output_axis => {
                        add(Fails, "DoRA magnitudes per input cannot be loaded again");
                    }
                    Family::Loha | Family::Lokr => add(
                        Conditional,
                        "right in training; its merging tools apply alpha / rank twice",
                    ),
                    _ => {}
                }
                if tucker_lokr || self.has("lokr_w1_a") && self.has("lokr_w2") {
                    add(Fails, "this form of LoKr cannot be loaded again");
                }
                if beside {
                    add(Ignored, "diff_b beside another family");
                }
            }
        }
        all
    }
}

/// What each program makes of a file. `set` is the same file, read.
///
/// # Errors
/// When a factor cannot be read.
pub fn review_clients(file: &TensorFile, set: &AdapterSet) -> Result<Vec<ClientReport>> {
    let names = file.names();
    let layers = by_layer(&names);
    let alphas = layers.values().filter(|l| l.alpha).count();
    let mut traits = BTreeMap::new();
    for (layer, adapter) in set.iter() {
        traits.insert(layer, Traits::of(adapter.as_ref())?);
    }
    let mut reports = Vec::new();
    for client in Client::ALL {
        let mut found: BTreeMap<(Outcome, &'static str), Finding> = BTreeMap::new();
        let mut add = |outcome, what, example: &str| {
            let finding = found.entry((outcome, what)).or_insert_with(|| Finding {
                outcome,
                what,
                layers: 0,
                example: example.to_string(),
            });
            finding.layers += 1;
        };
        let mut spoiled = BTreeSet::new();
        for (layer, entry) in &layers {
            let attention = layer.starts_with("unet.") && layer.contains(".attn");
            if let Some((outcome, what)) = entry.layout.verdict(client, attention) {
                add(outcome, what, layer);
                spoiled.insert(layer.clone());
            } else if entry.scaled && !entry.alpha {
                let verdict = match client {
                    Client::Lycoris => Some((Outcome::Fails, "alpha is missing")),
                    Client::Diffusers if alphas > 0 => Some((
                        Outcome::Wrong,
                        "alpha is missing here and present elsewhere: the most common one is taken",
                    )),
                    _ => None,
                };
                if let Some((outcome, what)) = verdict {
                    add(outcome, what, layer);
                    spoiled.insert(layer.clone());
                }
            }
        }
        let mut right = set.len().saturating_sub(spoiled.len());
        for (layer, traits) in &traits {
            let old_order = file
                .shape(&format!("{layer}.a1.weight"))
                .is_some_and(|dims| dims.first() < dims.get(1));
            let verdicts: Vec<_> = (traits.verdicts(client).into_iter())
                .filter(|_| !(old_order && client == Client::A1111))
                .collect();
            if !verdicts.is_empty() && !spoiled.contains(*layer) {
                right = right.saturating_sub(1);
            }
            for (outcome, what) in verdicts {
                add(outcome, what, layer);
            }
        }
        let bundled = names.iter().find(|n| n.starts_with(crate::format::BUNDLE));
        if let (Some(key), true) = (bundled, client != Client::A1111) {
            add(Outcome::Ignored, "bundled embeddings", key);
        }
        let mut findings: Vec<Finding> = found.into_values().collect();
        findings.sort_by_key(|f| std::cmp::Reverse(f.outcome));
        reports.push(ClientReport {
            client,
            right,
            findings,
        });
    }
    Ok(reports)
}

/// What a layer's keys look like in the file.
struct FileLayer {
    layout: Layout,
    /// Whether it is of a family whose scale is alpha / rank, and alpha stands in keys.
    scaled: bool,
    alpha: bool,
}

fn by_layer(names: &[String]) -> BTreeMap<String, FileLayer> {
    let mut layers: BTreeMap<String, FileLayer> = BTreeMap::new();
    for key in names {
        let Some(layout) = Layout::of(key) else {
            continue;
        };
        let keyed = matches!(
            layout,
            Layout::Kohya | Layout::KohyaLdm | Layout::TextEncoder1 | Layout::Wrapper
        );
        let layer = if keyed || layout == Layout::NoTextModel {
            key.split('.').next().unwrap_or(key)
        } else {
            let ends = [".lora_", "_lora.", ".lora.", ".hada_", ".lokr_", ".alpha"];
            let end = ends.iter().filter_map(|end| key.find(end)).min();
            end.and_then(|end| key.get(..end)).unwrap_or(key)
        };
        let entry = layers.entry(layer.to_string()).or_insert(FileLayer {
            layout,
            scaled: false,
            alpha: false,
        });
        let part = key.strip_prefix(layer).unwrap_or_default();
        let scaled = [".lora_down", ".hada_w1_b", ".lokr_w"];
        entry.scaled |= keyed && scaled.iter().any(|start| part.starts_with(start));
        entry.alpha |= part == ".alpha";
    }
    layers
}
