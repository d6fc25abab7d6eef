//! From checked levels to options: subset before dataset before `[general]` before the fallback.

use super::node::{Node, Value};
use crate::{ConfigFault, DatasetConfig, Error, Size, SubsetConfig};

/// The datasets of a checked tree.
///
/// # Errors
/// Values of the right type that cannot be used, with their lines.
pub(super) fn datasets(
    root: &Node,
    fallback: &DatasetConfig,
) -> Result<Vec<DatasetConfig>, Vec<ConfigFault>> {
    let general = root.get("general");
    let mut resolved = Vec::new();
    let mut faults = Vec::new();
    for (i, node) in root
        .get("datasets")
        .map_or(&[][..], Node::items)
        .iter()
        .enumerate()
    {
        let levels = [general, Some(node)];
        let mut dataset = DatasetConfig {
            subsets: Vec::new(),
            ..fallback.clone()
        };
        for level in levels.into_iter().flatten() {
            apply_dataset(level, &mut dataset);
        }
        note_fault(
            dataset.validate(),
            node,
            &levels,
            &format!("datasets[{i}]"),
            &mut faults,
        );
        for (j, node) in node
            .get("subsets")
            .map_or(&[][..], Node::items)
            .iter()
            .enumerate()
        {
            let levels = [general, levels[1], Some(node)];
            let mut subset = fallback.subset.clone();
            for level in levels.into_iter().flatten() {
                apply_subset(level, &mut subset);
            }
            // Masks given beside the file are those of the training images.
            if subset.is_reg && node.get("conditioning_data_dir").is_none() {
                subset.conditioning_data_dir = None;
            }
            note_fault(
                subset.validate(),
                node,
                &levels,
                &format!("datasets[{i}].subsets[{j}]"),
                &mut faults,
            );
            dataset.subsets.push(subset);
        }
        resolved.push(dataset);
    }
    if faults.is_empty() {
        Ok(resolved)
    } else {
        Err(faults)
    }
}

/// Gives a fault of a value the line of the innermost level that sets it.
fn note_fault(
    result: crate::Result<()>,
    table: &Node,
    levels: &[Option<&Node>],
    path: &str,
    faults: &mut Vec<ConfigFault>,
) {
    let Err(error) = result else { return };
    let (option, what) = match error {
        Error::Option { key, what } => (key, what),
        other => ("", other.to_string()),
    };
    let setting = levels
        .iter()
        .rev()
        .flatten()
        .find_map(|level| level.get(option));
    faults.push(ConfigFault {
        line: setting.unwrap_or(table).line,
        key: format!("{path}.{option}"),
        what,
    });
}

fn apply_dataset(level: &Node, dataset: &mut DatasetConfig) {
    set(level, "resolution", &mut dataset.resolution);
    set(level, "batch_size", &mut dataset.batch_size);
    set(level, "enable_bucket", &mut dataset.enable_bucket);
    set(level, "min_bucket_reso", &mut dataset.min_bucket_reso);
    set(level, "max_bucket_reso", &mut dataset.max_bucket_reso);
    set(level, "bucket_reso_steps", &mut dataset.bucket_reso_steps);
    set(level, "bucket_no_upscale", &mut dataset.bucket_no_upscale);
    set(level, "validation_split", &mut dataset.validation_split);
    set(level, "validation_seed", &mut dataset.validation_seed);
    set(
        level,
        "resize_interpolation",
        &mut dataset.resize_interpolation,
    );
}

fn apply_subset(level: &Node, subset: &mut SubsetConfig) {
    set(level, "image_dir", &mut subset.image_dir);
    set(level, "metadata_file", &mut subset.metadata_file);
    set(
        level,
        "conditioning_data_dir",
        &mut subset.conditioning_data_dir,
    );
    set(level, "is_reg", &mut subset.is_reg);
    set(level, "num_repeats", &mut subset.num_repeats);
    set(level, "class_tokens", &mut subset.class_tokens);
    set(level, "caption_extension", &mut subset.caption_extension);
    set(level, "flip_aug", &mut subset.flip_aug);
    set(level, "color_aug", &mut subset.color_aug);
    set(level, "random_crop", &mut subset.random_crop);
    set(
        level,
        "face_crop_aug_range",
        &mut subset.face_crop_aug_range,
    );
    set(level, "alpha_mask", &mut subset.alpha_mask);
    set(
        level,
        "resize_interpolation",
        &mut subset.resize_interpolation,
    );
    if let Some(attributes) = level.get("custom_attributes") {
        set(
            attributes,
            "diff_output_preservation",
            &mut subset.diff_output_preservation,
        );
    }
    let captions = &mut subset.captions;
    set(level, "shuffle_caption", &mut captions.shuffle_caption);
    set(level, "caption_separator", &mut captions.caption_separator);
    set(level, "keep_tokens", &mut captions.keep_tokens);
    set(
        level,
        "keep_tokens_separator",
        &mut captions.keep_tokens_separator,
    );
    set(
        level,
        "secondary_separator",
        &mut captions.secondary_separator,
    );
    set(level, "enable_wildcard", &mut captions.enable_wildcard);
    set(level, "caption_prefix", &mut captions.caption_prefix);
    set(level, "caption_suffix", &mut captions.caption_suffix);
    set(
        level,
        "caption_dropout_rate",
        &mut captions.caption_dropout_rate,
    );
    set(
        level,
        "caption_dropout_every_n_epochs",
        &mut captions.caption_dropout_every_n_epochs,
    );
    set(
        level,
        "caption_tag_dropout_rate",
        &mut captions.caption_tag_dropout_rate,
    );
    set(level, "token_warmup_min", &mut captions.token_warmup_min);
    set(level, "token_warmup_step", &mut captions.token_warmup_step);
}

/// Sets an option if the level has it. The checker has seen to the types.
fn set<T: FromNode>(level: &Node, key: &str, option: &mut T) {
    if let Some(value) = level.get(key).and_then(T::from_node) {
        *option = value;
    }
}

trait FromNode: Sized {
    fn from_node(node: &Node) -> Option<Self>;
}

impl<T: FromNode> FromNode for Option<T> {
    fn from_node(node: &Node) -> Option<Self> {
        T::from_node(node).map(Some)
    }
}

impl FromNode for bool {
    fn from_node(node: &Node) -> Option<Self> {
        if let Value::Bool(value) = node.value {
            Some(value)
        } else {
            None
        }
    }
}

impl FromNode for u32 {
    fn from_node(node: &Node) -> Option<Self> {
        match node.value {
            Value::Int(number) => number.try_into().ok(),
            Value::Bool(value) => Some(value.into()),
            _ => None,
        }
    }
}

impl FromNode for u64 {
    fn from_node(node: &Node) -> Option<Self> {
        u32::from_node(node).map(Self::from)
    }
}

impl FromNode for usize {
    fn from_node(node: &Node) -> Option<Self> {
        u32::from_node(node).map(|number| number as Self)
    }
}

impl FromNode for f64 {
    fn from_node(node: &Node) -> Option<Self> {
        match node.value {
            Value::Float(number) => Some(number),
            Value::Int(number) => Some(number as Self),
            Value::Bool(value) => Some(u8::from(value).into()),
            _ => None,
        }
    }
}

impl FromNode for String {
    fn from_node(node: &Node) -> Option<Self> {
        if let Value::Text(text) = &node.value {
            Some(text.clone())
        } else {
            None
        }
    }
}

impl FromNode for std::path::PathBuf {
    fn from_node(node: &Node) -> Option<Self> {
        String::from_node(node).map(Self::from)
    }
}

impl FromNode for crate::Interpolation {
    fn from_node(node: &Node) -> Option<Self> {
        String::from_node(node)?.parse().ok()
    }
}

impl FromNode for Size {
    fn from_node(node: &Node) -> Option<Self> {
        match node.items() {
            [width, height] => Some(Self::new(u32::from_node(width)?, u32::from_node(height)?)),
            _ => u32::from_node(node).map(Self::square),
        }
    }
}

impl FromNode for (f64, f64) {
    fn from_node(node: &Node) -> Option<Self> {
        match node.items() {
            [from, to] => Some((f64::from_node(from)?, f64::from_node(to)?)),
            _ => None,
        }
    }
}
