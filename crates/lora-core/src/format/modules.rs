//! Every layer of the Stable Diffusion 1.x UNet and text encoder that adapters change:
//! diffusers' path and LDM's, both dotted. Names in files are converted by looking them
//! up here, in both directions; underscores are never split.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use crate::Component;

/// LDM's and diffusers' names of a residual block's layers.
const RESNET: [(&str, &str); 6] = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("emb_layers.1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
];

/// Layers of a transformer, which both name alike; those behind the first three are in
/// every one of its blocks.
const TRANSFORMER: [&str; 3] = ["norm", "proj_in", "proj_out"];
const BLOCK: [&str; 13] = [
    "norm1",
    "norm2",
    "norm3",
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
];

/// More blocks than any transformer of the family has.
const DEPTH: usize = 10;

/// Layers of a text encoder's block, and more blocks than there are.
const TEXT: [&str; 8] = [
    "layer_norm1",
    "layer_norm2",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
];
const TEXT_DEPTH: usize = 32;

/// Dotted paths of the UNet's layers: LDM's, diffusers'.
fn unet() -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = [
        ("input_blocks.0.0", "conv_in"),
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ]
    .map(|(ldm, name)| (ldm.into(), name.into()))
    .into();
    let mut resnet = |ldm: String, name: String| {
        let layer = |(l, n): &(&str, &str)| (format!("{ldm}.{l}"), format!("{name}.{n}"));
        all.extend(RESNET.iter().map(layer));
    };
    let mut transformers = Vec::new();
    let mut single = Vec::new();
    for i in 0..4 {
        for j in 0..2 {
            let ldm = format!("input_blocks.{}", 3 * i + j + 1);
            resnet(format!("{ldm}.0"), format!("down_blocks.{i}.resnets.{j}"));
            transformers.push((
                format!("{ldm}.1"),
                format!("down_blocks.{i}.attentions.{j}"),
            ));
        }
        for j in 0..3 {
            let ldm = format!("output_blocks.{}", 3 * i + j);
            resnet(format!("{ldm}.0"), format!("up_blocks.{i}.resnets.{j}"));
            if i > 0 {
                transformers.push((format!("{ldm}.1"), format!("up_blocks.{i}.attentions.{j}")));
            }
        }
        // The last block on the way down, or up, has none.
        if i < 3 {
            single.push((
                format!("input_blocks.{}.0.op", 3 * i + 3),
                format!("down_blocks.{i}.downsamplers.0.conv"),
            ));
            single.push((
                format!(
                    "output_blocks.{}.{}.conv",
                    3 * i + 2,
                    if i == 0 { 1 } else { 2 }
                ),
                format!("up_blocks.{i}.upsamplers.0.conv"),
            ));
        }
    }
    resnet("middle_block.0".into(), "mid_block.resnets.0".into());
    resnet("middle_block.2".into(), "mid_block.resnets.1".into());
    transformers.push(("middle_block.1".into(), "mid_block.attentions.0".into()));
    all.extend(single);
    for (ldm, name) in transformers {
        let blocks = (0..DEPTH).flat_map(|k| BLOCK.map(|b| format!("transformer_blocks.{k}.{b}")));
        for layer in TRANSFORMER.map(str::to_string).into_iter().chain(blocks) {
            all.push((format!("{ldm}.{layer}"), format!("{name}.{layer}")));
        }
    }
    all
}

/// Names with underscores, and what they stand for.
struct Names {
    /// LDM's name of a UNet layer: diffusers' name, with underscores too.
    from_ldm: BTreeMap<String, String>,
    /// Kohya's name: component, diffusers' path, LDM's path for the UNet.
    layers: BTreeMap<String, (Component, String, Option<String>)>,
}

static NAMES: LazyLock<Names> = LazyLock::new(|| {
    let (mut from_ldm, mut layers) = (BTreeMap::new(), BTreeMap::new());
    for (ldm, path) in unet() {
        from_ldm.insert(ldm.replace('.', "_"), path.replace('.', "_"));
        let name = Component::Unet.layer_name(&path);
        layers.insert(name, (Component::Unet, path, Some(ldm)));
    }
    // Some converters number the first upsampler as if attention came before it.
    from_ldm.insert(
        "output_blocks_2_2_conv".into(),
        "up_blocks_0_upsamplers_0_conv".into(),
    );
    let blocks = (0..TEXT_DEPTH)
        .flat_map(|l| TEXT.map(|layer| format!("text_model.encoder.layers.{l}.{layer}")));
    for path in blocks.chain(["text_model.final_layer_norm".into()]) {
        let name = Component::TextEncoder.layer_name(&path);
        layers.insert(name, (Component::TextEncoder, path, None));
    }
    Names { from_ldm, layers }
});

/// The diffusers path of a UNet layer known by LDM's path, both with underscores; `None`
/// for other names.
///
/// ```
/// use lora_core::format::layer_from_ldm;
/// assert_eq!(
///     layer_from_ldm("input_blocks_1_1_transformer_blocks_0_attn1_to_q").as_deref(),
///     Some("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"),
/// );
/// assert_eq!(layer_from_ldm("middle_block_2_in_layers_2").as_deref(), Some("mid_block_resnets_1_conv1"));
/// assert_eq!(layer_from_ldm("conv_in"), None);
/// ```
pub fn layer_from_ldm(path: &str) -> Option<String> {
    NAMES.from_ldm.get(path).cloned()
}

/// The component and the dotted diffusers path behind a layer's name in kohya's files;
/// `None` for layers that Stable Diffusion 1.x does not have.
///
/// ```
/// use lora_core::{Component, format::layer_path};
/// let (component, path) = layer_path("lora_unet_mid_block_attentions_0_proj_in").unwrap();
/// assert_eq!((component, path.as_str()), (Component::Unet, "mid_block.attentions.0.proj_in"));
/// assert_eq!(layer_path("lora_unet_nowhere"), None);
/// ```
pub fn layer_path(layer: &str) -> Option<(Component, String)> {
    let (component, path, _) = NAMES.layers.get(layer)?;
    Some((component.clone(), path.clone()))
}

/// The dotted LDM path of a UNet layer known by its name in kohya's files.
///
/// ```
/// use lora_core::format::layer_to_ldm;
/// assert_eq!(layer_to_ldm("lora_unet_conv_out").as_deref(), Some("out.2"));
/// assert_eq!(layer_to_ldm("lora_te_text_model_final_layer_norm"), None);
/// ```
pub fn layer_to_ldm(layer: &str) -> Option<String> {
    NAMES.layers.get(layer)?.2.clone()
}
