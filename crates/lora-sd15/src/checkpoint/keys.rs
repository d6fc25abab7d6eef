//! Tensor names: the LDM layout of single files, the diffusers layout inside.

use crate::Part;

/// Prefixes of the three parts in a single file.
pub(super) const UNET: &str = "model.diffusion_model.";
pub(super) const VAE: &str = "first_stage_model.";
pub(super) const TEXT: &str = "cond_stage_model.transformer.";

/// Part and diffusers name of a single file's tensor; `None` for tensors that are
/// none of the model's weights.
pub fn ldm_to_diffusers(key: &str) -> Option<(Part, String)> {
    if let Some(rest) = key.strip_prefix(UNET) {
        return Some((Part::Unet, unet(rest)?));
    }
    if let Some(rest) = key.strip_prefix(VAE) {
        return Some((Part::Vae, vae(rest)?));
    }
    let rest = key.strip_prefix(TEXT)?;
    Some((Part::TextEncoder, text(rest)?))
}

/// The key of a tensor in a single file, from its part and diffusers name: the other
/// direction of [`ldm_to_diffusers`].
pub fn diffusers_to_ldm(part: Part, name: &str) -> String {
    match part {
        Part::Unet => format!("{UNET}{}", unet_to_ldm(name)),
        Part::Vae => format!("{VAE}{}", vae_to_ldm(name)),
        Part::TextEncoder => format!("{TEXT}{name}"),
    }
}

/// The text encoder's names carry `text_model.` except in some converted files.
pub(super) fn text(key: &str) -> Option<String> {
    if key.ends_with("position_ids") {
        return None;
    }
    if key.starts_with("text_model.") {
        return Some(key.to_string());
    }
    let known = ["embeddings.", "encoder.", "final_layer_norm."]
        .iter()
        .any(|p| key.starts_with(p));
    known.then(|| format!("text_model.{key}"))
}

fn unet(key: &str) -> Option<String> {
    let mut parts = key.splitn(4, '.');
    let (block, index) = (parts.next()?, parts.next()?);
    let number = index.parse::<usize>().ok();
    let (sub, rest) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
    Some(match (block, number?) {
        ("time_embed", n @ (0 | 2)) => format!("time_embedding.linear_{}.{sub}", n / 2 + 1),
        ("input_blocks", 0) => format!("conv_in.{rest}"),
        ("input_blocks", n) => {
            let (i, j) = ((n - 1) / 3, (n - 1) % 3);
            match (sub, j) {
                ("0", 2) => format!(
                    "down_blocks.{i}.downsamplers.0.conv.{}",
                    rest.strip_prefix("op.")?
                ),
                ("0", _) => format!("down_blocks.{i}.resnets.{j}.{}", resnet(rest)?),
                ("1", _) => format!("down_blocks.{i}.attentions.{j}.{rest}"),
                _ => return None,
            }
        }
        ("middle_block", 1) => format!("mid_block.attentions.0.{}", join(sub, rest)),
        ("middle_block", n @ (0 | 2)) => {
            format!("mid_block.resnets.{}.{}", n / 2, resnet(&join(sub, rest))?)
        }
        ("output_blocks", n) => {
            let (i, j) = (n / 3, n % 3);
            match (sub, rest.strip_prefix("conv.")) {
                ("0", _) => format!("up_blocks.{i}.resnets.{j}.{}", resnet(rest)?),
                ("1" | "2", Some(conv)) => format!("up_blocks.{i}.upsamplers.0.conv.{conv}"),
                ("1", None) => format!("up_blocks.{i}.attentions.{j}.{rest}"),
                _ => return None,
            }
        }
        ("out", 0) => format!("conv_norm_out.{sub}"),
        ("out", 2) => format!("conv_out.{sub}"),
        _ => return None,
    })
}

fn unet_to_ldm(name: &str) -> String {
    let parts: Vec<&str> = name.splitn(5, '.').collect();
    let number = |text: &str| text.parse::<usize>().unwrap_or(0);
    match parts.as_slice() {
        ["time_embedding", linear, rest @ ..] => {
            let n = if *linear == "linear_2" { 2 } else { 0 };
            format!("time_embed.{n}.{}", rest.join("."))
        }
        ["conv_in", rest @ ..] => format!("input_blocks.0.0.{}", rest.join(".")),
        ["conv_norm_out", rest @ ..] => format!("out.0.{}", rest.join(".")),
        ["conv_out", rest @ ..] => format!("out.2.{}", rest.join(".")),
        ["mid_block", "attentions", _, rest @ ..] => format!("middle_block.1.{}", rest.join(".")),
        ["mid_block", "resnets", j, rest @ ..] => {
            format!(
                "middle_block.{}.{}",
                2 * number(j),
                resnet_to_ldm(&rest.join("."))
            )
        }
        ["down_blocks", i, kind, j, rest] => {
            let n = 3 * number(i) + 1;
            match *kind {
                "resnets" => format!("input_blocks.{}.0.{}", n + number(j), resnet_to_ldm(rest)),
                "attentions" => format!("input_blocks.{}.1.{rest}", n + number(j)),
                _ => format!(
                    "input_blocks.{}.0.{}",
                    n + 2,
                    rest.replacen("conv.", "op.", 1)
                ),
            }
        }
        ["up_blocks", i, kind, j, rest] => {
            let n = 3 * number(i);
            match *kind {
                "resnets" => format!("output_blocks.{}.0.{}", n + number(j), resnet_to_ldm(rest)),
                "attentions" => format!("output_blocks.{}.1.{rest}", n + number(j)),
                // The lowest level has no attention before its upsampler.
                _ => format!(
                    "output_blocks.{}.{}.{rest}",
                    n + 2,
                    if n == 0 { 1 } else { 2 }
                ),
            }
        }
        _ => name.to_string(),
    }
}

fn join(a: &str, b: &str) -> String {
    if b.is_empty() {
        a.to_string()
    } else {
        format!("{a}.{b}")
    }
}

/// Parts of a ResNet block: LDM's name, diffusers'.
const RESNET: [(&str, &str); 6] = [
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
];

fn resnet(key: &str) -> Option<String> {
    RESNET
        .iter()
        .find_map(|(ldm, name)| Some(format!("{name}{}", key.strip_prefix(ldm)?)))
}

fn resnet_to_ldm(name: &str) -> String {
    RESNET
        .iter()
        .find_map(|(ldm, own)| Some(format!("{ldm}{}", name.strip_prefix(own)?)))
        .unwrap_or_else(|| name.to_string())
}

/// Levels of the VAE: LDM counts the decoder's from the lowest resolution up.
const VAE_LEVELS: usize = 4;

/// A VAE name without prefix, LDM or diffusers of any generation.
pub(super) fn vae(key: &str) -> Option<String> {
    if key.starts_with("quant_conv.") || key.starts_with("post_quant_conv.") {
        return Some(key.to_string());
    }
    let (side, rest) = key.split_once('.')?;
    if !matches!(side, "encoder" | "decoder") {
        return None;
    }
    Some(format!("{side}.{}", vae_side(rest)?))
}

fn vae_side(key: &str) -> Option<String> {
    if let Some(rest) = key.strip_prefix("norm_out.") {
        return Some(format!("conv_norm_out.{rest}"));
    }
    if let Some(rest) = key.strip_prefix("mid.attn_1.") {
        return Some(format!("mid_block.attentions.0.{}", vae_attention(rest)));
    }
    if let Some(rest) = key.strip_prefix("mid_block.attentions.0.") {
        return Some(format!("mid_block.attentions.0.{}", vae_attention(rest)));
    }
    if let Some(rest) = key.strip_prefix("mid.block_") {
        let (number, rest) = rest.split_once('.')?;
        return Some(format!(
            "mid_block.resnets.{}.{}",
            number.parse::<usize>().ok()?.checked_sub(1)?,
            shortcut(rest)
        ));
    }
    let mut parts = key.splitn(5, '.');
    let (Some(block), Some(level)) = (parts.next(), parts.next()) else {
        return Some(key.to_string());
    };
    let (Ok(level), Some(kind)) = (level.parse::<usize>(), parts.next()) else {
        return Some(key.to_string());
    };
    let rest: Vec<&str> = parts.collect();
    let rest = rest.join(".");
    match (block, kind) {
        ("down", "block") => Some(format!("down_blocks.{level}.resnets.{}", shortcut(&rest))),
        ("down", "downsample") => Some(format!("down_blocks.{level}.downsamplers.0.{rest}")),
        ("up", "block") => Some(format!(
            "up_blocks.{}.resnets.{}",
            (VAE_LEVELS - 1).checked_sub(level)?,
            shortcut(&rest)
        )),
        ("up", "upsample") => Some(format!(
            "up_blocks.{}.upsamplers.0.{rest}",
            (VAE_LEVELS - 1).checked_sub(level)?
        )),
        ("down_blocks" | "up_blocks" | "mid_block", _) => Some(key.to_string()),
        _ => None,
    }
}

fn vae_to_ldm(name: &str) -> String {
    let parts: Vec<&str> = name.splitn(6, '.').collect();
    let number = |text: &str| text.parse::<usize>().unwrap_or(0);
    let level = |side: &str, text: &str| match side {
        "up_blocks" => format!("up.{}", (VAE_LEVELS - 1).saturating_sub(number(text))),
        _ => format!("down.{text}"),
    };
    match parts.as_slice() {
        [side, "conv_norm_out", rest] => format!("{side}.norm_out.{rest}"),
        [side, "mid_block", "attentions", _, rest @ ..] => {
            let rest = rest.join(".");
            let names = [
                ("group_norm.", "norm."),
                ("to_q.", "q."),
                ("to_k.", "k."),
                ("to_v.", "v."),
                ("to_out.0.", "proj_out."),
            ];
            let renamed = names
                .iter()
                .find_map(|(own, ldm)| Some(format!("{ldm}{}", rest.strip_prefix(own)?)));
            format!("{side}.mid.attn_1.{}", renamed.unwrap_or(rest))
        }
        [side, "mid_block", "resnets", j, rest @ ..] => {
            format!("{side}.mid.block_{}.{}", number(j) + 1, rest.join("."))
        }
        [side, blocks, i, "resnets", j, rest] => {
            let rest = rest.replacen("conv_shortcut.", "nin_shortcut.", 1);
            format!("{side}.{}.block.{j}.{rest}", level(blocks, i))
        }
        [side, blocks, i, "downsamplers", _, rest] => {
            format!("{side}.{}.downsample.{rest}", level(blocks, i))
        }
        [side, blocks, i, "upsamplers", _, rest] => {
            format!("{side}.{}.upsample.{rest}", level(blocks, i))
        }
        _ => name.to_string(),
    }
}

fn shortcut(key: &str) -> String {
    key.replace("nin_shortcut.", "conv_shortcut.")
}

fn vae_attention(key: &str) -> String {
    let names = [
        ("norm.", "group_norm."),
        ("query.", "to_q."),
        ("key.", "to_k."),
        ("value.", "to_v."),
        ("proj_attn.", "to_out.0."),
        ("q.", "to_q."),
        ("k.", "to_k."),
        ("v.", "to_v."),
        ("proj_out.", "to_out.0."),
    ];
    let renamed = names
        .iter()
        .find_map(|(old, new)| Some(format!("{new}{}", key.strip_prefix(old)?)));
    renamed.unwrap_or_else(|| key.to_string())
}

/// Tensors that single files carry beside the weights and that nobody needs.
pub(super) fn ignorable(key: &str) -> bool {
    let prefixes = [
        "model_ema.",
        "first_stage_model.loss.",
        "loss.",
        "cond_stage_model.logit_scale",
        "cond_stage_model.text_projection",
        "cond_stage_model.transformer.text_projection",
        "cond_stage_model.transformer.logit_scale",
        "posterior_",
        "embedding_manager.",
    ];
    let names = [
        "betas",
        "logvar",
        "scale_factor",
        "model_ema",
        "v_pred",
        "lvlb_weights",
        "global_step",
    ];
    key.ends_with("position_ids")
        || key.contains("alphas_cumprod")
        || names.contains(&key)
        || prefixes.iter().any(|p| key.starts_with(p))
}
