//! LyCORIS' presets: which layers are trained, and options for some of them.

use std::path::Path;

use lora_core::Targets;
use toml::{Table, Value};

use crate::config::bad;
use crate::{Error, Result};

/// What a preset says.
#[derive(Debug, Default)]
pub(crate) struct Preset {
    /// Layers of the UNet and of the text encoder.
    pub(crate) targets: (Option<Targets>, Option<Targets>),
    /// Whether kernels larger than 1x1 take part.
    pub(crate) kxk: bool,
    /// Options, as `network_args` spell them, for some of the layers; later ones win.
    pub(crate) overrides: Vec<(Targets, Vec<(String, String)>)>,
}

/// Classes of Stable Diffusion 1.x and the segments of paths that they stand for, outer
/// ones first. Classes of other models select nothing.
const CLASSES: [(&str, &[&str]); 14] = [
    ("Transformer2DModel", &["attentions"]),
    ("ResnetBlock2D", &["resnets"]),
    ("Downsample2D", &["downsamplers"]),
    ("Upsample2D", &["upsamplers"]),
    ("TimestepEmbedding", &["time_embedding"]),
    ("CLIPEncoderLayer", &["layers"]),
    ("BasicTransformerBlock", &["transformer_blocks"]),
    ("Attention", &["attn1", "attn2"]),
    ("CrossAttention", &["attn1", "attn2"]),
    ("SelfAttention", &["attn1", "attn2"]),
    ("FeedForward", &["ff"]),
    ("CLIPAttention", &["self_attn"]),
    ("CLIPSdpaAttention", &["self_attn"]),
    ("CLIPMLP", &["mlp"]),
];

const KEYS: [&str; 12] = [
    "enable_conv",
    "unet_target_module",
    "unet_target_name",
    "text_encoder_target_module",
    "text_encoder_target_name",
    "target_module",
    "target_name",
    "exclude_name",
    "use_fnmatch",
    "lora_prefix",
    "module_algo_map",
    "name_algo_map",
];

/// A preset by name, or from a TOML file.
///
/// # Errors
/// A name that is not known, a file that cannot be read, or keys in it that are not known.
pub(crate) fn preset(name: &str) -> Result<Preset> {
    let unet = |patterns: &[&str]| Targets::new(patterns).map(Some);
    let text = || Targets::new(&["self_attn", "mlp"]).map(Some);
    let blocks = [
        "resnets",
        "downsamplers",
        "upsamplers",
        "conv_in",
        "conv_out",
    ];
    let full = [&["attentions", "time_embedding"][..], &blocks].concat();
    let plain = |targets, kxk| Preset {
        targets,
        kxk,
        overrides: Vec::new(),
    };
    Ok(match name {
        "full" => plain((unet(&full)?, text()?), true),
        "full-lin" => plain(
            (unet(&["attentions", "resnets", "time_embedding"])?, text()?),
            false,
        ),
        "attn-mlp" => plain((unet(&["attentions"])?, text()?), false),
        "attn-only" => plain((unet(&["attn1", "attn2"])?, unet(&["self_attn"])?), false),
        "unet-only" => plain((unet(&full)?, None), true),
        "unet-transformer-only" => plain((unet(&["attentions"])?, None), false),
        "unet-convblock-only" => plain((unet(&blocks)?, None), true),
        "ia3" => Preset {
            overrides: vec![(
                Targets::new(&["ff.net.2", "mlp.fc2"])?,
                vec![("train_on_input".into(), "True".into())],
            )],
            ..plain(
                (
                    unet(&["to_k", "to_v", "ff.net.2"])?,
                    unet(&["k_proj", "v_proj", "mlp.fc2"])?,
                ),
                false,
            )
        },
        path if path.ends_with(".toml") => from_file(Path::new(path))?,
        other => {
            return bad(format!(
                "network_args: preset={other} is not supported; known are full, full-lin, attn-mlp, attn-only, \
                 unet-only, unet-transformer-only, unet-convblock-only, ia3, or the path of a .toml file"
            ));
        }
    })
}

fn from_file(path: &Path) -> Result<Preset> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let table: Table = match text.parse() {
        Ok(table) => table,
        Err(e) => return bad(format!("preset {}: {e}", path.display())),
    };
    from_table(&table).map_err(|e| Error::Config {
        place: path.display().to_string(),
        what: e.to_string(),
    })
}

/// A preset's table.
fn from_table(table: &Table) -> Result<Preset> {
    if let Some(key) = table.keys().find(|k| !KEYS.contains(&k.as_str())) {
        return bad(format!(
            "{key:?} is not known; known are {}",
            KEYS.join(", ")
        ));
    }
    for key in ["target_module", "target_name", "lora_prefix"] {
        if table.contains_key(key) {
            return bad(format!(
                "{key} is for LyCORIS' wrapper of any model; use unet_target_* and text_encoder_target_*"
            ));
        }
    }
    let flag = |key: &str, default| match table.get(key) {
        None => Ok(default),
        Some(Value::Boolean(value)) => Ok(*value),
        Some(other) => bad(format!("{key}: expected true or false, got {other}")),
    };
    let fnmatch = flag("use_fnmatch", false)?;
    let exclude = strings(table, "exclude_name")?;
    let defaults = preset("full")?;
    let side = |modules: &str, names: &str, default: Option<Targets>| {
        let targets = if !table.contains_key(modules) && !table.contains_key(names) {
            default
        } else {
            let mut segments = Vec::new();
            for class in strings(table, modules)? {
                segments.extend(segments_of(&class));
            }
            let names = strings(table, names)?;
            (!segments.is_empty() || !names.is_empty())
                .then(|| Targets::new(&segments)?.with_names(&names, fnmatch))
                .transpose()?
        };
        let without = |t: Targets| t.without_names(&exclude, fnmatch);
        Ok::<_, Error>(targets.map(without).transpose()?)
    };
    let (unet, text) = defaults.targets;
    let mut found = Preset {
        targets: (
            side("unet_target_module", "unet_target_name", unet)?,
            side(
                "text_encoder_target_module",
                "text_encoder_target_name",
                text,
            )?,
        ),
        kxk: flag("enable_conv", true)?,
        overrides: Vec::new(),
    };
    let classes = maps(table, "module_algo_map")?;
    for (class, segments) in CLASSES {
        for (_, options) in classes.iter().filter(|(name, _)| name == class) {
            let entry = (Targets::new(segments)?, options.clone());
            found.overrides.push(entry);
        }
    }
    // The first name that matches wins in LyCORIS, the last override here.
    for (name, options) in maps(table, "name_algo_map")?.into_iter().rev() {
        let targets = Targets::new(&[])?.with_names(&[name], fnmatch)?;
        found.overrides.push((targets, options));
    }
    Ok(found)
}

fn segments_of(class: &str) -> impl Iterator<Item = &'static str> {
    CLASSES
        .iter()
        .filter(move |(name, _)| *name == class)
        .flat_map(|(_, segments)| segments.iter().copied())
}

fn strings(table: &Table, key: &str) -> Result<Vec<String>> {
    let Some(value) = table.get(key) else {
        return Ok(Vec::new());
    };
    let items = value.as_array().and_then(|items| {
        let text = |item: &Value| item.as_str().map(str::to_string);
        items.iter().map(text).collect::<Option<Vec<String>>>()
    });
    items.map_or_else(|| bad(format!("{key}: expected a list of strings")), Ok)
}

type Options = Vec<(String, String)>;

/// Tables of options by name.
fn maps(table: &Table, key: &str) -> Result<Vec<(String, Options)>> {
    let Some(value) = table.get(key) else {
        return Ok(Vec::new());
    };
    let Some(entries) = value.as_table() else {
        return bad(format!("{key}: expected a table"));
    };
    let mut all = Vec::new();
    for (name, options) in entries {
        let Some(options) = options.as_table() else {
            return bad(format!("{key}.{name}: expected a table of options"));
        };
        let text = |value: &Value| match value.as_str() {
            Some(text) => text.to_string(),
            None => value.to_string(),
        };
        let options = options.iter().map(|(k, v)| (k.clone(), text(v)));
        all.push((name.clone(), options.collect()));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preset_file() {
        let text = r#"
            enable_conv = false
            unet_target_module = ["Transformer2DModel", "HunYuanDiTBlock"]
            unet_target_name = ["conv_in", ".*resnets.*time_emb_proj"]
            exclude_name = ["mid_block"]
            [module_algo_map.FeedForward]
            algo = "lokr"
            dim = 64
        "#;
        let preset = from_table(&text.parse().unwrap()).unwrap();
        assert!(!preset.kxk);
        let unet = preset.targets.0.unwrap();
        let block = "down_blocks.0.attentions.0.transformer_blocks.0";
        assert!(unet.matches(&format!("{block}.attn1.to_q")));
        assert!(unet.matches("conv_in"));
        assert!(unet.matches("down_blocks.0.resnets.1.time_emb_proj"));
        assert!(!unet.matches("down_blocks.0.resnets.1.conv1"));
        assert!(!unet.matches("mid_block.attentions.0.proj_in"));
        assert!(
            preset
                .targets
                .1
                .unwrap()
                .matches("text_model.encoder.layers.0.mlp.fc1")
        );
        let (targets, options) = &preset.overrides[0];
        assert!(targets.matches(&format!("{block}.ff.net.2")));
        assert!(!targets.matches(&format!("{block}.attn1.to_q")));
        assert!(options.contains(&("dim".into(), "64".into())));
    }

    #[test]
    fn keys_that_are_not_known_are_refused() {
        for text in [
            "surplus = 1",
            "target_name = []",
            "enable_conv = 3",
            "exclude_name = 1",
        ] {
            assert!(from_table(&text.parse().unwrap()).is_err(), "{text}");
        }
    }
}
