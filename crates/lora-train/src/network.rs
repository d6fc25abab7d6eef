//! `network_module` and `network_args`, as users of sd-scripts and LyCORIS write them.

use lora_core::{AdapterConfig, BlockValues, Family, Override, Targets};
use lora_optim::kohya::GroupOptions;

use crate::config::bad;
use crate::preset::{Preset, preset};
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

/// The programs whose arguments are understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Module {
    /// sd-scripts' `networks.lora`.
    Lora,
    /// sd-scripts' `networks.oft`.
    Oft,
    /// `lycoris.kohya`.
    Lycoris,
}

/// Collected while the arguments are read.
struct Reader {
    module: Module,
    algo: String,
    preset: String,
    conv_dim: Option<usize>,
    conv_alpha: Option<f64>,
    /// `dim` and `alpha` of some layers, in a preset's maps.
    dim: Option<usize>,
    alpha: Option<f64>,
    /// sd-scripts' OFT: feed-forward layers and projections too, convolutions too.
    all_linear: bool,
    convolutions: bool,
    adapter: AdapterConfig,
    groups: GroupOptions,
}

impl NetworkArgs {
    pub(crate) fn parse(config: &TrainConfig) -> Result<Self> {
        let module = match config.network_module.as_deref() {
            None | Some("networks.lora") => Module::Lora,
            Some("networks.oft") => Module::Oft,
            Some("lycoris.kohya") => Module::Lycoris,
            Some(other) => {
                return bad(format!(
                    "network_module {other:?} is not supported; use networks.lora, networks.oft or lycoris.kohya"
                ));
            }
        };
        let mut reader = Reader::new(module);
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

fn size(key: &str, value: &str) -> Result<usize> {
    usize::try_from(integer(key, value)?)
        .or_else(|_| bad(format!("network_args: {key}: {value} is negative")))
}

fn blocks(key: &str, value: &str) -> Result<Option<BlockValues>> {
    match BlockValues::parse(value) {
        Ok(values) => Ok(Some(values)),
        Err(e) => bad(format!("network_args: {key}: {e}")),
    }
}

impl Reader {
    fn new(module: Module) -> Self {
        Self {
            module,
            algo: "lora".into(),
            preset: "full".into(),
            conv_dim: None,
            conv_alpha: None,
            dim: None,
            alpha: None,
            all_linear: false,
            convolutions: false,
            adapter: AdapterConfig::default(),
            groups: GroupOptions::default(),
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match (self.module, key) {
            (Module::Oft, "enable_all_linear") => self.all_linear = switch(key, value)?,
            (Module::Oft, "enable_conv") => self.convolutions = switch(key, value)?,
            (Module::Oft, _) => {
                return bad(format!(
                    "network_args: {key:?} is not known to networks.oft; known are enable_all_linear, enable_conv"
                ));
            }
            (_, "conv_dim") => self.conv_dim = Some(size(key, value)?),
            (_, "conv_alpha") => self.conv_alpha = Some(number(key, value)?),
            (_, "rank_dropout") => self.adapter.dropout.rank = number(key, value)?,
            (_, "module_dropout") => self.adapter.dropout.module = number(key, value)?,
            (Module::Lycoris, _) => self.set_lycoris(key, value)?,
            (Module::Lora, "block_dims") => self.adapter.block_ranks = blocks(key, value)?,
            (Module::Lora, "block_alphas") => self.adapter.block_alphas = blocks(key, value)?,
            (Module::Lora, "conv_block_dims") => {
                self.adapter.conv_block_ranks = blocks(key, value)?;
            }
            (Module::Lora, "conv_block_alphas") => {
                self.adapter.conv_block_alphas = blocks(key, value)?;
            }
            (Module::Lora, _) => self.groups.set_network_arg(key, value)?,
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
            "use_scalar" => adapter.use_scalar = switch(key, value)?,
            "rank_dropout_scale" => adapter.dropout.rank_scale = switch(key, value)?,
            // Of algo=dylora, which is refused; other networks' configs carry it too.
            "block_size" => {
                size(key, value)?;
            }
            _ => {
                return bad(format!(
                    "network_args: {key:?} is not known; known are algo, preset, conv_dim, conv_alpha, dropout, \
                     rank_dropout, module_dropout, use_tucker, rs_lora, factor, decompose_both, full_matrix, \
                     unbalanced_factorization, dora_wd, wd_on_output, \
                     train_norm, train_on_input, constraint, rescaled, use_scalar, rank_dropout_scale"
                ));
            }
        }
        Ok(())
    }

    fn finish(mut self, config: &TrainConfig) -> Result<NetworkArgs> {
        let (rank, alpha) = (config.network_rank(), config.network_alpha);
        let targets = match self.module {
            Module::Lycoris => self.finish_lycoris(rank, alpha)?,
            Module::Oft => self.finish_oft(rank, alpha)?,
            Module::Lora => self.finish_lora(rank),
        };
        Ok(NetworkArgs {
            adapter: self.adapter,
            targets,
            groups: self.groups,
        })
    }

    fn finish_lora(&mut self, rank: usize) -> (Option<Targets>, Option<Targets>) {
        let adapter = &mut self.adapter;
        adapter.conv_rank = self.conv_dim.filter(|rank| *rank > 0);
        adapter.conv_alpha = self.conv_alpha.unwrap_or(1.0);
        // A block that does not learn gets no adapter, as in sd-scripts.
        let weights = self.groups.block_weights.as_ref();
        if let Some(weights) = weights.filter(|w| w.is_set()) {
            let factors = weights.all();
            let ranks = adapter.block_ranks.take();
            let mut ranks = ranks.unwrap_or(BlockValues::uniform(rank as f64));
            ranks.zero_where(&factors);
            adapter.block_ranks = Some(ranks);
            let same = adapter.conv_rank.map(|r| BlockValues::uniform(r as f64));
            adapter.conv_block_ranks = adapter.conv_block_ranks.take().or(same);
            if let Some(ranks) = &mut adapter.conv_block_ranks {
                ranks.zero_where(&factors);
            }
        }
        if self.conv_dim.is_some() || adapter.conv_block_ranks.is_some() {
            both(Targets::attn_mlp_conv())
        } else {
            both(Targets::attn_mlp())
        }
    }

    /// sd-scripts' OFT: `network_dim` blocks per layer, `network_alpha` their constraint, the
    /// UNet alone.
    fn finish_oft(
        &mut self,
        rank: usize,
        alpha: f64,
    ) -> Result<(Option<Targets>, Option<Targets>)> {
        self.adapter.family = Family::KohyaOft;
        self.adapter.constraint = alpha;
        self.adapter.conv_rank = self.convolutions.then_some(rank);
        let mut parts = if self.all_linear {
            vec!["attentions"]
        } else {
            vec!["attn1", "attn2"]
        };
        if self.convolutions {
            parts.extend(["resnets", "downsamplers", "upsamplers"]);
        }
        Ok((Some(Targets::new(&parts)?), None))
    }

    fn finish_lycoris(
        &mut self,
        rank: usize,
        alpha: f64,
    ) -> Result<(Option<Targets>, Option<Targets>)> {
        self.adapter.family = family(&self.algo)?;
        let Preset {
            targets,
            kxk,
            overrides,
        } = preset(&self.preset)?;
        // Larger kernels are trained unless the preset says no; a conv_dim of 0 says no too.
        let conv_rank = self.conv_dim.unwrap_or(rank);
        self.adapter.conv_rank = Some(conv_rank).filter(|rank| kxk && *rank > 0);
        self.adapter.conv_alpha = self.conv_alpha.unwrap_or(alpha);
        for (targets, options) in overrides {
            let mut own = Reader::new(Module::Lycoris);
            own.algo = self.algo.clone();
            own.adapter = AdapterConfig {
                rank,
                alpha,
                overrides: Vec::new(),
                ..self.adapter.clone()
            };
            for (key, value) in options {
                match key.as_str() {
                    "dim" => own.dim = Some(size(&key, &value)?).filter(|d| *d > 0),
                    "alpha" => own.alpha = Some(number(&key, &value)?).filter(|a| *a > 0.0),
                    "preset" | "dropout" | "rank_dropout" | "module_dropout" => {
                        return bad(format!("preset: {key} cannot be set for some layers only"));
                    }
                    _ => own.set(&key, &value)?,
                }
            }
            own.adapter.family = family(&own.algo)?;
            if let Some(dim) = own.dim {
                // One dim for all kernels, which brings the larger ones in.
                own.adapter.rank = dim;
                own.adapter.conv_rank = Some(dim);
            }
            if let Some(alpha) = own.alpha {
                own.adapter.alpha = alpha;
                own.adapter.conv_alpha = alpha;
            }
            if let Some(dim) = own.conv_dim {
                own.adapter.conv_rank = Some(dim).filter(|d| *d > 0);
            }
            own.adapter.conv_alpha = own.conv_alpha.unwrap_or(own.adapter.conv_alpha);
            own.adapter.dropout = Default::default();
            self.adapter.overrides.push(Override {
                targets,
                config: own.adapter,
            });
        }
        Ok(targets)
    }
}

/// The family behind LyCORIS' `algo`.
fn family(algo: &str) -> Result<Family> {
    Ok(match algo {
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
    })
}

fn both(targets: Targets) -> (Option<Targets>, Option<Targets>) {
    (Some(targets.clone()), Some(targets))
}
