//! Which options exist on which level, and of which type they are.

use std::path::Path;

use super::node::{Node, Value};
use crate::{ConfigFault, Finding, FindingKind, Interpolation};

/// The levels of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    General,
    Dataset,
    Subset,
}

/// Where an option may stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// `[general]` and `[[datasets]]`.
    Dataset,
    /// Everywhere.
    Subset,
    /// Only `[[datasets.subsets]]`.
    SubsetOnly,
}

/// The type of an option. Truth values pass as whole numbers, as they do in Python;
/// whole numbers do not pass as `Float`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Count,
    Float,
    Number,
    Bool,
    Text,
    Filter,
    Resolution,
    TwoFloats,
    Attributes,
}

struct Key {
    name: &'static str,
    scope: Scope,
    kind: Kind,
}

const fn key(name: &'static str, scope: Scope, kind: Kind) -> Key {
    Key { name, scope, kind }
}

const KEYS: &[Key] = &[
    key("resolution", Scope::Dataset, Kind::Resolution),
    key("batch_size", Scope::Dataset, Kind::Count),
    key("enable_bucket", Scope::Dataset, Kind::Bool),
    key("min_bucket_reso", Scope::Dataset, Kind::Count),
    key("max_bucket_reso", Scope::Dataset, Kind::Count),
    key("bucket_reso_steps", Scope::Dataset, Kind::Count),
    key("bucket_no_upscale", Scope::Dataset, Kind::Bool),
    key("network_multiplier", Scope::Dataset, Kind::Float),
    key("validation_seed", Scope::Dataset, Kind::Count),
    key("validation_split", Scope::Dataset, Kind::Float),
    key("resize_interpolation", Scope::Subset, Kind::Filter),
    key("num_repeats", Scope::Subset, Kind::Count),
    key("shuffle_caption", Scope::Subset, Kind::Bool),
    key("caption_separator", Scope::Subset, Kind::Text),
    key("keep_tokens", Scope::Subset, Kind::Count),
    key("keep_tokens_separator", Scope::Subset, Kind::Text),
    key("secondary_separator", Scope::Subset, Kind::Text),
    key("enable_wildcard", Scope::Subset, Kind::Bool),
    key("caption_prefix", Scope::Subset, Kind::Text),
    key("caption_suffix", Scope::Subset, Kind::Text),
    key("caption_dropout_rate", Scope::Subset, Kind::Number),
    key("caption_dropout_every_n_epochs", Scope::Subset, Kind::Count),
    key("caption_tag_dropout_rate", Scope::Subset, Kind::Number),
    key("token_warmup_min", Scope::Subset, Kind::Count),
    key("token_warmup_step", Scope::Subset, Kind::Number),
    key("color_aug", Scope::Subset, Kind::Bool),
    key("flip_aug", Scope::Subset, Kind::Bool),
    key("random_crop", Scope::Subset, Kind::Bool),
    key("face_crop_aug_range", Scope::Subset, Kind::TwoFloats),
    key("custom_attributes", Scope::Subset, Kind::Attributes),
    key("caption_extension", Scope::Subset, Kind::Text),
    key("class_tokens", Scope::Subset, Kind::Text),
    key("cache_info", Scope::Subset, Kind::Bool),
    key("image_dir", Scope::SubsetOnly, Kind::Text),
    key("is_reg", Scope::SubsetOnly, Kind::Bool),
    key("alpha_mask", Scope::SubsetOnly, Kind::Bool),
    key("metadata_file", Scope::SubsetOnly, Kind::Text),
    key("conditioning_data_dir", Scope::SubsetOnly, Kind::Text),
];

/// Names that people write here and that belong elsewhere.
const ELSEWHERE: &[(&str, &str)] = &[
    ("train_batch_size", "it is called `batch_size` here"),
    ("dataset_repeats", "it is called `num_repeats` here"),
    (
        "train_data_dir",
        "name the folder in a subset's `image_dir`",
    ),
    (
        "reg_data_dir",
        "name the folder in a subset's `image_dir` and set `is_reg = true`",
    ),
    (
        "in_json",
        "it is called `metadata_file` here and stands in a subset",
    ),
    (
        "prior_loss_weight",
        "it is an option of the whole run, not of a dataset",
    ),
    (
        "max_token_length",
        "it is an option of the whole run, not of a dataset",
    ),
    (
        "cache_latents",
        "it is an option of the whole run, not of a dataset",
    ),
    (
        "cache_latents_to_disk",
        "it is an option of the whole run, not of a dataset",
    ),
    (
        "vae_batch_size",
        "it is an option of the whole run, not of a dataset",
    ),
    (
        "debug_dataset",
        "it is an option of the whole run, not of a dataset",
    ),
];

/// Options that the reference accepts and ignores, or that have no use here.
const WITHOUT_EFFECT: &[(&str, &str)] = &[
    ("network_multiplier", "sd-scripts ignores it too"),
    (
        "cache_info",
        "folders are listed anew each time, which takes seconds",
    ),
];

/// Walks the tree and collects faults.
#[derive(Debug, Default)]
pub(super) struct Checker {
    /// Masks were asked for, so `conditioning_data_dir` may be given.
    accepts_masks: bool,
    pub(super) faults: Vec<ConfigFault>,
    ignored: Vec<(String, &'static str)>,
}

impl Checker {
    pub(super) fn new(accepts_masks: bool) -> Self {
        Self {
            accepts_masks,
            ..Self::default()
        }
    }

    pub(super) fn check_root(&mut self, root: &Node) {
        for (name, node) in root.entries() {
            match name.as_str() {
                "general" => self.check_level(node, Level::General, "general"),
                "datasets" => {
                    self.check_list(node, "datasets", "[[datasets]]", Self::check_dataset)
                }
                _ => {
                    let nearest = nearest_name(name, ["general", "datasets"].into_iter());
                    let hint =
                        nearest.map_or_else(String::new, |n| format!(", did you mean `{n}`?"));
                    let what = format!(
                        "options stand in [general], [[datasets]] or [[datasets.subsets]]{hint}"
                    );
                    self.fault(node, name, what);
                }
            }
        }
    }

    fn check_list(
        &mut self,
        node: &Node,
        path: &str,
        header: &str,
        check: fn(&mut Self, &Node, &str),
    ) {
        if !matches!(node.value, Value::List(_)) {
            return self.fault(
                node,
                path,
                format!(
                    "expected a list of tables ({header}), found {}",
                    node.describe()
                ),
            );
        }
        for (i, item) in node.items().iter().enumerate() {
            check(self, item, &format!("{path}[{i}]"));
        }
    }

    fn check_dataset(&mut self, dataset: &Node, path: &str) {
        self.check_level(dataset, Level::Dataset, path);
        let Some(subsets) = dataset.get("subsets") else {
            return;
        };
        self.check_list(
            subsets,
            &format!("{path}.subsets"),
            "[[datasets.subsets]]",
            Self::check_subset,
        );
        let kinds: Vec<bool> = subsets
            .items()
            .iter()
            .map(|s| s.get("metadata_file").is_some())
            .collect();
        if kinds.contains(&true) && kinds.contains(&false) {
            let what = "folders with caption files and metadata files cannot be mixed in one dataset; \
                        put them into two [[datasets]]";
            self.fault(subsets, &format!("{path}.subsets"), what);
        }
    }

    fn check_subset(&mut self, subset: &Node, path: &str) {
        self.check_level(subset, Level::Subset, path);
        if subset.get("image_dir").is_none() && subset.get("metadata_file").is_none() {
            self.fault(
                subset,
                &format!("{path}.image_dir"),
                "it is missing: name the folder of images",
            );
        }
        if let Some(masks) = subset
            .get("conditioning_data_dir")
            .filter(|_| !self.accepts_masks)
        {
            let what = "masks are given but masked_loss is off; turn it on to use them";
            self.fault(masks, &format!("{path}.conditioning_data_dir"), what);
        }
    }

    fn check_level(&mut self, table: &Node, level: Level, path: &str) {
        if !matches!(table.value, Value::Table(_)) {
            return self.fault(
                table,
                path,
                format!("expected a table, found {}", table.describe()),
            );
        }
        for (name, node) in table.entries() {
            if level == Level::Dataset && name == "subsets" {
                continue;
            }
            let path = format!("{path}.{name}");
            match KEYS.iter().find(|key| key.name == name) {
                None => self.fault(node, &path, unknown(name, level)),
                Some(key) if !allowed(key.scope, level) => {
                    self.fault(node, &path, wrong_level(key.scope))
                }
                Some(key) => self.check_value(node, &path, key),
            }
        }
    }

    fn check_value(&mut self, node: &Node, path: &str, key: &Key) {
        if matches!(node.value, Value::Null) {
            return;
        }
        if let Err(wanted) = check_kind(node, key.kind) {
            self.fault(
                node,
                path,
                format!("expected {wanted}, found {}", node.describe()),
            );
        }
        if key.kind == Kind::Attributes {
            self.check_attributes(node, path);
        }
        if let Some((_, why)) = WITHOUT_EFFECT.iter().find(|(name, _)| *name == key.name) {
            self.ignored.push((path.to_owned(), why));
        }
    }

    /// `custom_attributes` may hold anything; one entry means something here.
    fn check_attributes(&mut self, attributes: &Node, path: &str) {
        for (name, node) in attributes.entries() {
            let path = format!("{path}.{name}");
            if name != "diff_output_preservation" {
                self.ignored
                    .push((path, "only `diff_output_preservation` is known here"));
            } else if !matches!(node.value, Value::Bool(_)) {
                self.fault(
                    node,
                    &path,
                    format!("expected true or false, found {}", node.describe()),
                );
            }
        }
    }

    fn fault(&mut self, node: &Node, key: &str, what: impl Into<String>) {
        self.faults.push(ConfigFault {
            line: node.line,
            key: key.to_owned(),
            what: what.into(),
        });
    }

    pub(super) fn without_effect(self, origin: &Path) -> Vec<Finding> {
        let note = |(key, why): (String, &str)| {
            Finding::note(
                FindingKind::OptionWithoutEffect,
                format!("`{key}` has no effect: {why}"),
            )
            .at(origin)
        };
        self.ignored.into_iter().map(note).collect()
    }
}

fn allowed(scope: Scope, level: Level) -> bool {
    match scope {
        Scope::Dataset => level != Level::Subset,
        Scope::Subset => true,
        Scope::SubsetOnly => level == Level::Subset,
    }
}

fn wrong_level(scope: Scope) -> &'static str {
    match scope {
        Scope::Dataset => "this option stands in [general] or [[datasets]], not in a subset",
        Scope::Subset | Scope::SubsetOnly => "this option stands only in [[datasets.subsets]]",
    }
}

fn unknown(name: &str, level: Level) -> String {
    if let Some((_, hint)) = ELSEWHERE.iter().find(|(known, _)| *known == name) {
        return format!("unknown option, {hint}");
    }
    let known = KEYS
        .iter()
        .filter(|key| allowed(key.scope, level))
        .map(|key| key.name);
    match nearest_name(name, known) {
        Some(nearest) => format!("unknown option, did you mean `{nearest}`?"),
        None => "unknown option".to_owned(),
    }
}

/// The type that was wanted, when the value is of another.
fn check_kind(node: &Node, kind: Kind) -> Result<(), &'static str> {
    let fits_u32 = |n: i64| u32::try_from(n).is_ok();
    let is_count = |node: &Node| match node.value {
        Value::Int(n) => fits_u32(n),
        Value::Bool(_) => true,
        _ => false,
    };
    let is_float = |node: &Node| matches!(node.value, Value::Float(_));
    let (fits, wanted) = match kind {
        Kind::Count => (is_count(node), "a whole number of 0 or more"),
        Kind::Float => (is_float(node), "a number with a decimal point, such as 1.0"),
        Kind::Number => (
            matches!(node.value, Value::Float(_) | Value::Int(_) | Value::Bool(_)),
            "a number",
        ),
        Kind::Bool => (matches!(node.value, Value::Bool(_)), "true or false"),
        Kind::Text => (matches!(node.value, Value::Text(_)), "a text in quotes"),
        Kind::Filter => (
            matches!(&node.value, Value::Text(name) if name.parse::<Interpolation>().is_ok()),
            "one of \"area\", \"lanczos\", \"bilinear\", \"bicubic\", \"nearest\", \"box\"",
        ),
        Kind::Resolution => (
            is_count(node) || (node.items().len() == 2 && node.items().iter().all(is_count)),
            "a whole number or [width, height] in whole numbers",
        ),
        Kind::TwoFloats => (
            node.items().len() == 2 && node.items().iter().all(is_float),
            "two numbers, such as [2.0, 4.0]",
        ),
        Kind::Attributes => (matches!(node.value, Value::Table(_)), "a table"),
    };
    if fits { Ok(()) } else { Err(wanted) }
}

/// The known name with the fewest edits, if it is near enough to be meant.
fn nearest_name<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |known: &&str| edit_distance(name, known);
    let nearest = known.min_by_key(distance)?;
    (edit_distance(name, nearest) <= 1 + name.len() / 4).then_some(nearest)
}

/// Insertions, deletions and replacements that turn one text into the other.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row.last().copied().unwrap_or_default()
}
