//! What a file is, judged by names and shapes before any weight is read.

use std::path::{Path, PathBuf};

use lora_core::format::TensorFile;
use serde::Deserialize;

use super::{Part, first_names};
use crate::config::read_json;
use crate::{Error, ModelConfig, Result, UnetConfig};

/// Opens a weights file, refusing pickles by name.
pub(super) fn open(path: &Path) -> Result<TensorFile> {
    let pickle = path.extension().is_some_and(|e| {
        ["ckpt", "pt", "pth", "bin"]
            .iter()
            .any(|p| e.eq_ignore_ascii_case(p))
    });
    if pickle {
        return Err(lora_core::Error::Pickle {
            path: path.to_path_buf(),
        }
        .into());
    }
    Ok(TensorFile::open(path)?)
}

/// Refuses every family but SD1.x.
pub(super) fn family(path: &Path, file: &TensorFile) -> Result<()> {
    let names = file.names();
    let refuse = |what: &str| {
        Err(Error::NotSd15 {
            path: path.to_path_buf(),
            what: what.to_string(),
        })
    };
    let any = |test: &dyn Fn(&str) -> bool| names.iter().any(|n| test(n));
    let block = |rest: &str| file.shape(&format!("model.diffusion_model.{rest}"));

    if any(&|n| n.starts_with("conditioner.embedders.")) || block("label_emb.0.0.weight").is_some()
    {
        return refuse("this is an SDXL checkpoint; only Stable Diffusion 1.x is supported");
    }
    let wide = block("input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight")
        .and_then(<[usize]>::last)
        == Some(&1024);
    let linear = block("input_blocks.1.1.proj_in.weight").is_some_and(|s| s.len() == 2);
    if any(&|n| n.starts_with("cond_stage_model.model.")) || wide || linear {
        return refuse("this is a Stable Diffusion 2.x checkpoint; only 1.x is supported");
    }
    if any(&|n| n.contains("joint_blocks.")) {
        return refuse("this is a Stable Diffusion 3 checkpoint; only 1.x is supported");
    }
    if any(&|n| n.contains("double_blocks.")) {
        return refuse("this is a Flux checkpoint; only Stable Diffusion 1.x is supported");
    }
    if any(&|n| n.starts_with("control_model.")) {
        return refuse("this is a ControlNet, not a checkpoint");
    }
    if any(&|n| n.starts_with("lora_") || n.contains(".lora_") || n.starts_with("lycoris_")) {
        return refuse("this is an adapter (LoRA), not a checkpoint; load it as an adapter");
    }
    if any(&|n| n.starts_with("down_blocks.") || n.starts_with("encoder.down_blocks.")) {
        return refuse(
            "this is one part of a diffusers folder; give the folder that contains model_index.json",
        );
    }
    if any(&|n| n.starts_with("first_stage_model.") || n.starts_with("encoder.down."))
        && !any(&|n| n.starts_with("model.diffusion_model."))
    {
        return refuse("this is a VAE file, not a checkpoint; give it as the VAE");
    }
    match block("input_blocks.0.0.weight") {
        None if names.is_empty() => refuse("the file has no tensors"),
        None => refuse(&format!(
            "not a Stable Diffusion checkpoint: its {} tensors are named {}, ...",
            names.len(),
            first_names(&names, 2)
        )),
        Some([_, 8, _, _]) => {
            refuse("this is an instruct-pix2pix checkpoint, which is not supported")
        }
        Some([_, 5, _, _]) => {
            refuse("this is a depth-conditioned checkpoint, which is not supported")
        }
        Some(_) => Ok(()),
    }
}

/// Reads off the tensors what they can tell.
pub(super) fn dimensions(
    config: &mut ModelConfig,
    shape: &dyn Fn(Part, &str) -> Option<Vec<usize>>,
) {
    let first = |part, name: &str| shape(part, name).and_then(|s| s.first().copied());
    let second = |part, name: &str| shape(part, name).and_then(|s| s.get(1).copied());
    let count = |part, name: &dyn Fn(usize) -> String| {
        (0..)
            .take_while(|i| shape(part, &name(*i)).is_some())
            .count()
    };
    let set = |slot: &mut usize, value: Option<usize>| {
        if let Some(value) = value {
            *slot = value;
        }
    };

    let unet = &mut config.unet;
    set(&mut unet.in_channels, second(Part::Unet, "conv_in.weight"));
    set(&mut unet.out_channels, first(Part::Unet, "conv_out.weight"));
    let level = |i: usize| {
        first(
            Part::Unet,
            &format!("down_blocks.{i}.resnets.0.conv1.weight"),
        )
    };
    let channels: Vec<usize> = (0..).map_while(level).collect();
    if !channels.is_empty() {
        unet.attention = (0..channels.len())
            .map(|i| {
                shape(
                    Part::Unet,
                    &format!("down_blocks.{i}.attentions.0.proj_in.weight"),
                )
                .is_some()
            })
            .collect();
        unet.block_out_channels = channels;
    }
    let keys = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight";
    set(&mut unet.cross_attention_dim, second(Part::Unet, keys));

    let vae = &mut config.vae;
    set(
        &mut vae.in_channels,
        second(Part::Vae, "encoder.conv_in.weight"),
    );
    set(
        &mut vae.out_channels,
        first(Part::Vae, "decoder.conv_out.weight"),
    );
    set(
        &mut vae.latent_channels,
        second(Part::Vae, "post_quant_conv.weight"),
    );
    let level = |i: usize| {
        first(
            Part::Vae,
            &format!("encoder.down_blocks.{i}.resnets.0.conv1.weight"),
        )
    };
    let channels: Vec<usize> = (0..).map_while(level).collect();
    if !channels.is_empty() {
        vae.block_out_channels = channels;
    }

    let text = &mut config.text;
    let tokens = "text_model.embeddings.token_embedding.weight";
    set(&mut text.vocab_size, first(Part::TextEncoder, tokens));
    set(&mut text.hidden_size, second(Part::TextEncoder, tokens));
    let fc1 = |i: usize| format!("text_model.encoder.layers.{i}.mlp.fc1.weight");
    set(
        &mut text.intermediate_size,
        first(Part::TextEncoder, &fc1(0)),
    );
    let positions = "text_model.embeddings.position_embedding.weight";
    set(
        &mut text.max_position_embeddings,
        first(Part::TextEncoder, positions),
    );
    match count(Part::TextEncoder, &fc1) {
        0 => {}
        layers => text.num_hidden_layers = layers,
    }
}

/// A UNet's `config.json`; what marks other families is refused.
pub(super) fn unet_config(json: &Path) -> Result<UnetConfig> {
    #[derive(Deserialize)]
    struct Other {
        #[serde(default)]
        use_linear_projection: bool,
        #[serde(default)]
        addition_embed_type: Option<String>,
        #[serde(default)]
        down_block_types: Vec<String>,
    }
    let other: Other = read_json(json)?;
    let folder = json
        .parent()
        .and_then(Path::parent)
        .unwrap_or(json)
        .to_path_buf();
    if other.addition_embed_type.is_some() {
        let what = "this is an SDXL folder; only Stable Diffusion 1.x is supported".into();
        return Err(Error::NotSd15 { path: folder, what });
    }
    if other.use_linear_projection {
        let what = "this is a Stable Diffusion 2.x folder; only 1.x is supported".into();
        return Err(Error::NotSd15 { path: folder, what });
    }
    let mut config: UnetConfig = read_json(json)?;
    if !other.down_block_types.is_empty() {
        config.attention = other
            .down_block_types
            .iter()
            .map(|t| t.contains("CrossAttn"))
            .collect();
    }
    Ok(config)
}

/// The weight files of one part of a diffusers folder: one file, its `fp16`
/// variant, or shards.
pub(super) fn part_files(root: &Path, folder: &Path, stem: &str) -> Result<Vec<PathBuf>> {
    let index = folder.join(format!("{stem}.safetensors.index.json"));
    if index.is_file() {
        #[derive(Deserialize)]
        struct Shards {
            weight_map: std::collections::BTreeMap<String, String>,
        }
        let shards: Shards = read_json(&index)?;
        let mut files: Vec<String> = shards.weight_map.into_values().collect();
        files.sort();
        files.dedup();
        // A shard is a file of this folder, whatever the index says.
        if let Some(odd) = files
            .iter()
            .find(|f| Path::new(f).file_name().is_none_or(|n| n != f.as_str()))
        {
            let what = format!("shard {odd:?} is not a plain file name");
            return Err(Error::BadConfig {
                place: index.display().to_string(),
                what,
            });
        }
        return Ok(files.into_iter().map(|f| folder.join(f)).collect());
    }
    let candidates = [
        format!("{stem}.safetensors"),
        format!("{stem}.fp16.safetensors"),
    ];
    if let Some(file) = candidates
        .iter()
        .map(|f| folder.join(f))
        .find(|f| f.is_file())
    {
        return Ok(vec![file]);
    }
    let pickle = folder.join(format!("{stem}.bin"));
    if pickle.is_file() || folder.join("diffusion_pytorch_model.bin").is_file() {
        return Err(lora_core::Error::Pickle { path: pickle }.into());
    }
    let what = format!(
        "not a diffusers folder of Stable Diffusion 1.x: {} is missing",
        folder.join(&candidates[0]).display()
    );
    Err(Error::NotSd15 {
        path: root.to_path_buf(),
        what,
    })
}
