//! `network_module` and `network_args`, as users of sd-scripts and LyCORIS write them.

use lora_core::{AdapterConfig, Family, Targets};
use lora_optim::kohya::GroupOptions;

use crate::config::bad;
use crate::{Result, TrainConfig};

/// What `network_module` and `network_args` say.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkArgs {
    /// Family and its options; rank and alpha are those of the run.
    pub adapter: AdapterConfig,
    /// Layers of the UNet and of the text encoder.
    pub targets: (Option<Targets>, Option<Targets>),
    /// What concerns learning rates: LoRA+ ratios, block weights.
    pub groups: GroupOptions,
}

/// Collected while the arguments are read.
struct Reader {
    lycoris: bool,
    algo: String,
    preset: String,
    conv_dim: Option<usize>,
    conv_alpha: Option<f64>,
    adapter: AdapterConfig,
    groups: GroupOptions,
}

impl NetworkArgs {
    pub(crate) fn parse(config: &TrainConfig) -> Result<Self> {
        let lycoris = match config.network_module.as_deref() {
            None | Some("networks.lora") => false,
            Some("lycoris.kohya") => true,
            Some(other) => {
                return bad(format!(
                    "network_module {other:?} is not supported; use networks.lora or lycoris.kohya"
                ));
            }
        };
        let mut reader = Reader {
            lycoris,
            algo: "lora".into(),
            preset: "full".into(),
            conv_dim: None,
            conv_alpha: None,
            adapter: AdapterConfig::default(),
            groups: GroupOptions::default(),
        };
        for arg in &config.network_args {
            let Some((key, value)) = arg.split_once('=') else {
                return bad(format!(
                    "network_args: {arg:?} is not of the form key=value"
                ));
            };
            reader.set(key.trim(), value.trim())?;
        }
        reader.finish(config)
    }
}

fn number(key: &str, value: &str) -> Result<f64> {
    match value.parse::<f64>() {
        Ok(n) if n.is_finite() && n >= 0.0 => Ok(n),
        _ => bad(format!(
            "network_args: {key}: expected a number, got {value:?}"
        )),
    }
}

fn integer(key: &str, value: &str) -> Result<i64> {
    value.parse().or_else(|_| {
        bad(format!(
            "network_args: {key}: expected a whole number, got {value:?}"
        ))
    })
}

fn switch(key: &str, value: &str) -> Result<bool> {
    match value.to_lowercase().as_str() {
        "true" | "1" | "yes" => Ok(true),
        "false" | "0" | "no" => Ok(false),
        _ => bad(format!(
            "network_args: {key}: expected True or False, got {value:?}"
        )),
    }
}

impl Reader {
    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "conv_dim" => match usize::try_from(integer(key, value)?) {
                Ok(dim) => self.conv_dim = Some(dim),
                Err(_) => return bad(format!("network_args: conv_dim: {value} is negative")),
            },
            "conv_alpha" => self.conv_alpha = Some(number(key, value)?),
            "rank_dropout" => self.adapter.dropout.rank = number(key, value)?,
            "module_dropout" => self.adapter.dropout.module = number(key, value)?,
            "block_dims" | "block_alphas" | "conv_block_dims" | "conv_block_alphas" => {
                return bad(format!(
                    "network_args: {key}: ranks per block are not supported; use one network_dim"
                ));
            }
            _ if self.lycoris => self.set_lycoris(key, value)?,
            _ => self.groups.set_network_arg(key, value)?,
        }
        Ok(())
    }

    fn set_lycoris(&mut self, key: &str, value: &str) -> Result<()> {
        let adapter = &mut self.adapter;
        match key {
            "algo" => self.algo = value.to_lowercase(),
            "preset" => self.preset = value.to_string(),
            "dropout" => adapter.dropout.neuron = number(key, value)?,
            "use_tucker" | "use_cp" | "use_conv_cp" => adapter.use_tucker = switch(key, value)?,
            "disable_conv_cp" => adapter.use_tucker = !switch(key, value)?,
            "rs_lora" => adapter.rs_lora = switch(key, value)?,
            "factor" => adapter.factor = integer(key, value)?,
            "decompose_both" => adapter.decompose_both = switch(key, value)?,
            "full_matrix" => adapter.full_matrix = switch(key, value)?,
            "unbalanced_factorization" => adapter.unbalanced_factorization = switch(key, value)?,
            "dora_wd" | "weight_decompose" => adapter.weight_decompose = switch(key, value)?,
            "wd_on_output" | "wd_on_out" => adapter.wd_on_output = switch(key, value)?,
            "train_norm" => adapter.train_norm = switch(key, value)?,
            "train_on_input" => adapter.train_on_input = switch(key, value)?,
            "constraint" | "constrain" => adapter.constraint = number(key, value)?,
            "rescaled" => adapter.rescaled = switch(key, value)?,
            // How the branch is computed, not what it is.
            "bypass_mode" => {
                switch(key, value)?;
            }
            "rank_dropout_scale" | "use_scalar" | "block_size"
                if matches!(value.to_lowercase().as_str(), "false" | "0" | "") => {}
            "rank_dropout_scale" | "use_scalar" | "block_size" => {
                return bad(format!(
                    "network_args: {key}={value} is not supported; leave it out"
                ));
            }
            _ => {
                return bad(format!(
                    "network_args: {key:?} is not known; known are algo, preset, conv_dim, conv_alpha, dropout, \
                     rank_dropout, module_dropout, use_tucker, rs_lora, factor, decompose_both, full_matrix, \
                     unbalanced_factorization, dora_wd, wd_on_output, train_norm, train_on_input, constraint, rescaled"
                ));
            }
        }
        Ok(())
    }

    fn finish(mut self, config: &TrainConfig) -> Result<NetworkArgs> {
        let rank = config.network_rank();
        let (targets, kxk) = if self.lycoris {
            self.adapter.family = match self.algo.as_str() {
                "lora" | "locon" => Family::Lora,
                "loha" => Family::Loha,
                "lokr" => Family::Lokr,
                "ia3" => Family::Ia3,
                "glora" => Family::Glora,
                "diag-oft" | "oft" => Family::Oft,
                "boft" => Family::Boft,
                "full" => Family::Full,
                other => {
                    return bad(format!(
                        "network_args: algo={other} is not supported; known are lora, locon, loha, lokr, ia3, glora, \
                         diag-oft, boft, full"
                    ));
                }
            };
            preset(&self.preset)?
        } else if self.conv_dim.is_some() {
            (both(Targets::attn_mlp_conv()), true)
        } else {
            (both(Targets::attn_mlp()), false)
        };
        // LyCORIS trains larger kernels unless the preset says no; a conv_dim of 0 says no too.
        let conv_rank = if self.lycoris {
            self.conv_dim.or(Some(rank))
        } else {
            self.conv_dim
        };
        let conv_alpha = if self.lycoris {
            config.network_alpha
        } else {
            1.0
        };
        self.adapter.conv_rank = conv_rank.filter(|rank| kxk && *rank > 0);
        self.adapter.conv_alpha = self.conv_alpha.unwrap_or(conv_alpha);
        Ok(NetworkArgs {
            adapter: self.adapter,
            targets,
            groups: self.groups,
        })
    }
}

fn both(targets: Targets) -> (Option<Targets>, Option<Targets>) {
    (Some(targets.clone()), Some(targets))
}

/// LyCORIS' presets for SD1.5: targets, and whether kernels larger than 1x1 take part.
#[allow(clippy::type_complexity)]
fn preset(name: &str) -> Result<((Option<Targets>, Option<Targets>), bool)> {
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
    Ok(match name {
        "full" => ((unet(&full)?, text()?), true),
        "full-lin" => (
            (unet(&["attentions", "resnets", "time_embedding"])?, text()?),
            false,
        ),
        "attn-mlp" => ((unet(&["attentions"])?, text()?), false),
        "attn-only" => (
            (
                unet(&["attn1", "attn2"])?,
                Targets::new(&["self_attn"]).map(Some)?,
            ),
            false,
        ),
        "unet-only" => ((unet(&full)?, None), true),
        "unet-transformer-only" => ((unet(&["attentions"])?, None), false),
        "unet-convblock-only" => ((unet(&blocks)?, None), true),
        other => {
            return bad(format!(
                "network_args: preset={other} is not supported; known are full, full-lin, attn-mlp, attn-only, \
                 unet-only, unet-transformer-only, unet-convblock-only"
            ));
        }
    })
}
