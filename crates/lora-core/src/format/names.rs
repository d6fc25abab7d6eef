//! Keys of every known layout, translated to kohya's: component prefix and diffusers path
//! with underscores, then the part's name.

use super::modules::layer_from_ldm;
use super::report::Format;

/// A key as the crate knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    /// `lora_unet_mid_block_attentions_0_proj_in`.
    pub(super) layer: String,
    /// `lora_down.weight`.
    pub(super) part: String,
    /// The layer's dotted path as the file spells it, where it does.
    pub(super) path: Option<String>,
    /// Whether this is PEFT's magnitude vector, whose shape tells no axis.
    pub(super) magnitude: bool,
    /// The layout that the key is written in.
    pub(super) format: Format,
}

/// Endings of keys whose layer is a dotted path, and the part they name. Longer ones
/// come before those that they end with.
const ENDINGS: &[(&str, &str)] = &[
    (".lora_A.default.weight", "lora_down.weight"),
    (".lora_B.default.weight", "lora_up.weight"),
    (".lora_A.weight", "lora_down.weight"),
    (".lora_B.weight", "lora_up.weight"),
    (".lora_magnitude_vector.default.weight", "dora_scale"),
    (".lora_magnitude_vector.weight", "dora_scale"),
    (".lora_magnitude_vector", "dora_scale"),
    (".lora_linear_layer.down.weight", "lora_down.weight"),
    (".lora_linear_layer.up.weight", "lora_up.weight"),
    (".lora.down.weight", "lora_down.weight"),
    (".lora.up.weight", "lora_up.weight"),
    ("_lora.down.weight", "lora_down.weight"),
    ("_lora.up.weight", "lora_up.weight"),
    (".lora_down.weight", "lora_down.weight"),
    (".lora_mid.weight", "lora_mid.weight"),
    (".lora_up.weight", "lora_up.weight"),
    (".lora_A", "lora_down.weight"),
    (".lora_B", "lora_up.weight"),
    (".hada_w1_a", "hada_w1_a"),
    (".hada_w1_b", "hada_w1_b"),
    (".hada_w2_a", "hada_w2_a"),
    (".hada_w2_b", "hada_w2_b"),
    (".hada_t1", "hada_t1"),
    (".hada_t2", "hada_t2"),
    (".lokr_w1", "lokr_w1"),
    (".lokr_w1_a", "lokr_w1_a"),
    (".lokr_w1_b", "lokr_w1_b"),
    (".lokr_w2", "lokr_w2"),
    (".lokr_w2_a", "lokr_w2_a"),
    (".lokr_w2_b", "lokr_w2_b"),
    (".lokr_t2", "lokr_t2"),
    (".oft_blocks", "oft_blocks"),
    (".oft_diag", "oft_diag"),
    (".rescale", "rescale"),
    (".a1.weight", "a1.weight"),
    (".a2.weight", "a2.weight"),
    (".b1.weight", "b1.weight"),
    (".b2.weight", "b2.weight"),
    (".bm.weight", "bm.weight"),
    (".diff", "diff"),
    (".diff_b", "diff_b"),
    (".w_norm", "w_norm"),
    (".b_norm", "b_norm"),
    (".dora_scale", "dora_scale"),
    (".reshape_weight", "reshape_weight"),
    (".bias_indices", "bias_indices"),
    (".bias_values", "bias_values"),
    (".bias_size", "bias_size"),
    (".scalar", "scalar"),
    (".scale", "scale"),
    (".alpha", "alpha"),
];

/// Translates a key, if its layout is known.
pub(super) fn translate(key: &str) -> Option<Key> {
    let (layer, part) = key.split_once('.')?;
    let (layer, format) = if layer.starts_with("lora_") {
        let plain = kohya_layer(layer);
        let ldm = layer.starts_with("lora_unet_") && plain != layer;
        (plain, if ldm { Format::KohyaLdm } else { Format::Kohya })
    } else if let Some(rest) = layer.strip_prefix("lycoris_") {
        // LyCORIS' wrapper of any model, which in practice is the UNet alone.
        (format!("lora_unet_{rest}"), Format::LycorisWrapper)
    } else if let Some(rest) = layer.strip_prefix("oft_") {
        if !rest.starts_with("unet_") && !rest.starts_with("te_") {
            return None;
        }
        (kohya_layer(&format!("lora_{rest}")), Format::KohyaOft)
    } else {
        return dotted(key);
    };
    Some(Key {
        layer,
        part: part.to_string(),
        path: None,
        magnitude: false,
        format,
    })
}

/// A kohya layer name with its variants removed: `lora_te1_`, which some trainers write
/// for the only text encoder; the missing `text_model`; LDM's names of UNet layers.
fn kohya_layer(layer: &str) -> String {
    if let Some(path) = layer
        .strip_prefix("lora_te1_")
        .or_else(|| layer.strip_prefix("lora_te_"))
    {
        return text_layer(path);
    }
    match layer.strip_prefix("lora_unet_").and_then(layer_from_ldm) {
        Some(path) => format!("lora_unet_{path}"),
        None => layer.to_string(),
    }
}

/// A text encoder layer by its underscored path, with `text_model` or without.
fn text_layer(path: &str) -> String {
    let inner = path.strip_prefix("text_model_").unwrap_or(path);
    if inner.starts_with("encoder_layers_") || inner.starts_with("final_layer_norm") {
        format!("lora_te_text_model_{inner}")
    } else {
        format!("lora_te_{path}")
    }
}

/// Keys of diffusers, PEFT and ComfyUI: dotted path, then one of [`ENDINGS`].
fn dotted(key: &str) -> Option<Key> {
    let (ending, part) = ENDINGS.iter().find(|(ending, _)| key.ends_with(ending))?;
    let full = key.strip_suffix(ending)?;
    let path = full.strip_prefix("base_model.model.").unwrap_or(full);
    let processor = ending.starts_with('_');
    let format = if path != full {
        Format::Peft
    } else if path.starts_with("diffusion_model.") || path.starts_with("text_encoders.") {
        Format::Comfy
    } else if processor || ending.contains(".lora.") || ending.contains("linear_layer") {
        Format::DiffusersOld
    } else {
        Format::Diffusers
    };
    // ComfyUI spells the way to the text encoder out.
    let text =
        path.strip_prefix("text_encoders.clip_l.transformer.")
            .or(path.strip_prefix("text_encoder."))
            .or(Some(path)
                .filter(|p| p.starts_with("text_model.") || p.starts_with("encoder.layers.")));
    let layer = if let Some(path) = text {
        text_layer(&plain_path(path, processor, true)?.replace('.', "_"))
    } else if let Some(path) = path.strip_prefix("diffusion_model.") {
        let path = path.replace('.', "_");
        format!("lora_unet_{}", layer_from_ldm(&path).unwrap_or(path))
    } else {
        let path = path.strip_prefix("unet.").unwrap_or(path);
        let path = plain_path(path, processor, false)?.replace('.', "_");
        format!("lora_unet_{path}")
    };
    Some(Key {
        layer,
        part: (*part).to_string(),
        path: Some(path.to_string()),
        magnitude: ending.contains("magnitude"),
        format,
    })
}

/// The module's path behind diffusers' old attention processors:
/// `attn1.processor.to_out` (of `to_out_lora.down.weight`) is `attn1.to_out.0`, and in the
/// text encoder `self_attn.to_q` is `self_attn.q_proj`.
fn plain_path(path: &str, processor: bool, text: bool) -> Option<String> {
    if !processor {
        return Some(path.to_string());
    }
    let path = path.replace(".processor.", ".");
    let (parent, last) = path.rsplit_once(".to_")?;
    let last = match (last, text) {
        ("q" | "k" | "v" | "out", true) => format!("{last}_proj"),
        ("q" | "k" | "v", false) => format!("to_{last}"),
        ("out", false) => "to_out.0".to_string(),
        _ => return None,
    };
    Some(format!("{parent}.{last}"))
}

#[cfg(test)]
mod tests {
    use super::translate;

    fn check(key: &str, layer: &str, part: &str) {
        let found = translate(key).map(|k| (k.layer, k.part));
        assert_eq!(found, Some((layer.to_string(), part.to_string())), "{key}");
    }

    #[test]
    fn every_layout_leads_to_the_same_name() {
        let block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1";
        let out = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0";
        let up = "lora_up.weight";
        check(&format!("{out}.lora_up.weight"), out, up);
        check(
            &format!("unet.{block}.processor.to_out_lora.up.weight"),
            out,
            up,
        );
        check(&format!("{block}.processor.to_out_lora.up.weight"), out, up);
        check(&format!("unet.{block}.to_out.0.lora_B.weight"), out, up);
        check(&format!("unet.{block}.to_out.0.lora.up.weight"), out, up);
        check(
            &format!("base_model.model.{block}.to_out.0.lora_B.default.weight"),
            out,
            up,
        );
        check(
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
            out,
            up,
        );
        check(
            "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.lora_up.weight",
            out,
            up,
        );
        check(
            "lycoris_mid_block_attentions_0_proj_in.lokr_w1",
            "lora_unet_mid_block_attentions_0_proj_in",
            "lokr_w1",
        );
    }

    #[test]
    fn text_encoder_names() {
        let q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj";
        check(&format!("{q}.alpha"), q, "alpha");
        check(
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha",
            q,
            "alpha",
        );
        check(
            "lora_te_encoder_layers_0_self_attn_q_proj.alpha",
            q,
            "alpha",
        );
        let path = "text_encoder.text_model.encoder.layers.0.self_attn";
        check(
            &format!("{path}.to_q_lora.down.weight"),
            q,
            "lora_down.weight",
        );
        check(
            &format!("{path}.q_proj.lora_linear_layer.down.weight"),
            q,
            "lora_down.weight",
        );
    }

    #[test]
    fn comfyui_and_sd_scripts_oft_keys() {
        let q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj";
        let path = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj";
        check(&format!("{path}.lora_up.weight"), q, "lora_up.weight");
        check(
            "oft_unet_mid_block_attentions_0_proj_in.oft_blocks",
            "lora_unet_mid_block_attentions_0_proj_in",
            "oft_blocks",
        );
    }

    #[test]
    fn other_keys_are_not_translated() {
        assert_eq!(translate("model.diffusion_model.out.2.weight"), None);
        assert_eq!(translate("attn1.processor.to_x_lora.up.weight"), None);
    }
}
