//! The options of sd-scripts' `train_network.py`, every one of them: used, without
//! effect here, or refused with advice. Nothing is dropped silently.

use std::collections::BTreeMap;
use std::path::Path;

use toml::{Table, Value};

use crate::config::{Inline, LENGTH};
use crate::{Error, Result};

/// What kind of value an option takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// On or off; on the command line the bare name switches it on.
    Switch,
    /// A whole number.
    Integer,
    /// A number.
    Number,
    /// Text.
    Text,
    /// Several texts.
    List,
    /// One or several numbers.
    Numbers,
    /// A number of steps, or a part of the run: `100`, `0.1`, `10%`.
    Steps,
}

/// What this trainer does with an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It has the effect it has in sd-scripts.
    Used,
    /// It is accepted, and has no effect for the reason given.
    NoEffect(&'static str),
    /// It is an error, with what to do instead.
    Refused(&'static str),
}

/// One option of sd-scripts.
#[derive(Debug, Clone, Copy)]
pub struct OptionRow {
    /// Its name, the same in files and on the command line.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// The values allowed, if they are a list.
    pub choices: &'static [&'static str],
    /// What becomes of it.
    pub status: Status,
}

const fn row(
    name: &'static str,
    kind: Kind,
    choices: &'static [&'static str],
    status: Status,
) -> OptionRow {
    OptionRow {
        name,
        kind,
        choices,
        status,
    }
}

/// Every option, sorted by name.
#[rustfmt::skip]
pub const OPTIONS: &[OptionRow] = &[
    row("adaptive_noise_scale", Kind::Number, &[], Status::Used),
    row("alpha_mask", Kind::Switch, &[], Status::Used),
    row("async_upload", Kind::Switch, &[], Status::NoEffect("nothing is uploaded")),
    row("base_weights", Kind::List, &[], Status::Used),
    row("base_weights_multiplier", Kind::Numbers, &[], Status::Used),
    row("bucket_no_upscale", Kind::Switch, &[], Status::Used),
    row("bucket_reso_steps", Kind::Integer, &[], Status::Used),
    row("cache_info", Kind::Switch, &[], Status::NoEffect("image headers are always read afresh, so edits are noticed")),
    row("cache_latents", Kind::Switch, &[], Status::Used),
    row("cache_latents_to_disk", Kind::Switch, &[], Status::Used),
    row("caption_dropout_every_n_epochs", Kind::Integer, &[], Status::Used),
    row("caption_dropout_rate", Kind::Number, &[], Status::Used),
    row("caption_extension", Kind::Text, &[], Status::Used),
    row("caption_extention", Kind::Text, &[], Status::Used),
    row("caption_prefix", Kind::Text, &[], Status::Used),
    row("caption_separator", Kind::Text, &[], Status::Used),
    row("caption_suffix", Kind::Text, &[], Status::Used),
    row("caption_tag_dropout_rate", Kind::Number, &[], Status::Used),
    row("clip_skip", Kind::Integer, &[], Status::Used),
    row("color_aug", Kind::Switch, &[], Status::Used),
    row("conditioning_data_dir", Kind::Text, &[], Status::Used),
    row("config_file", Kind::Text, &[], Status::Used),
    row("console_log_file", Kind::Text, &[], Status::NoEffect("redirect standard error instead")),
    row("console_log_level", Kind::Text, &["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], Status::NoEffect("all messages are shown, on standard error")),
    row("console_log_simple", Kind::Switch, &[], Status::NoEffect("logs are plain already")),
    row("cpu_offload_checkpointing", Kind::Switch, &[], Status::NoEffect("it belongs to other networks; gradient_checkpointing saves memory")),
    row("dataset_class", Kind::Text, &[], Status::Refused("it loads Python code; describe the pictures in a dataset_config")),
    row("dataset_config", Kind::Text, &[], Status::Used),
    row("dataset_repeats", Kind::Integer, &[], Status::Used),
    row("ddp_gradient_as_bucket_view", Kind::Switch, &[], Status::NoEffect("one process trains")),
    row("ddp_static_graph", Kind::Switch, &[], Status::NoEffect("one process trains")),
    row("ddp_timeout", Kind::Integer, &[], Status::NoEffect("one process trains")),
    row("debiased_estimation_loss", Kind::Switch, &[], Status::Used),
    row("debug_dataset", Kind::Switch, &[], Status::Refused("use the dataset example to see what training will see")),
    row("deepspeed", Kind::Switch, &[], Status::Refused("one process trains; leave it out")),
    row("dim_from_weights", Kind::Switch, &[], Status::Used),
    row("dynamo_backend", Kind::Text, &["no", "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt", "tensort", "ipex", "tvm"], Status::NoEffect("there is nothing to compile")),
    row("enable_bucket", Kind::Switch, &[], Status::Used),
    row("enable_wildcard", Kind::Switch, &[], Status::Used),
    row("face_crop_aug_range", Kind::Text, &[], Status::Used),
    row("flip_aug", Kind::Switch, &[], Status::Used),
    row("fp16_master_weights_and_gradients", Kind::Switch, &[], Status::Refused("adapters are always trained in f32; leave it out")),
    row("fp8_base", Kind::Switch, &[], Status::Refused("leave it out; mixed_precision bf16 keeps the frozen weights in 16 bits")),
    row("fp8_base_unet", Kind::Switch, &[], Status::Refused("leave it out; mixed_precision bf16 keeps the frozen weights in 16 bits")),
    row("full_bf16", Kind::Switch, &[], Status::Refused("adapters are always trained in f32: leave it out, and use save_precision for small files")),
    row("full_fp16", Kind::Switch, &[], Status::Refused("adapters are always trained in f32: leave it out, and use save_precision for small files")),
    row("fused_backward_pass", Kind::Switch, &[], Status::Refused("it belongs to other networks; leave it out")),
    row("gradient_accumulation_steps", Kind::Integer, &[], Status::Used),
    row("gradient_checkpointing", Kind::Switch, &[], Status::Used),
    row("highvram", Kind::Switch, &[], Status::NoEffect("memory is managed automatically")),
    row("huber_c", Kind::Number, &[], Status::Used),
    row("huber_scale", Kind::Number, &[], Status::Used),
    row("huber_schedule", Kind::Text, &["constant", "exponential", "snr"], Status::Used),
    row("huggingface_path_in_repo", Kind::Text, &[], Status::NoEffect("nothing is uploaded")),
    row("huggingface_repo_id", Kind::Text, &[], Status::Refused("uploading is not supported; copy the file")),
    row("huggingface_repo_type", Kind::Text, &[], Status::NoEffect("nothing is uploaded")),
    row("huggingface_repo_visibility", Kind::Text, &[], Status::NoEffect("nothing is uploaded")),
    row("huggingface_token", Kind::Text, &[], Status::NoEffect("nothing is uploaded")),
    row("in_json", Kind::Text, &[], Status::Used),
    row("initial_epoch", Kind::Integer, &[], Status::Refused("resume goes on exactly where the state stands; leave it out")),
    row("initial_step", Kind::Integer, &[], Status::Refused("resume goes on exactly where the state stands; leave it out")),
    row("ip_noise_gamma", Kind::Number, &[], Status::Used),
    row("ip_noise_gamma_random_strength", Kind::Switch, &[], Status::Used),
    row("keep_tokens", Kind::Integer, &[], Status::Used),
    row("keep_tokens_separator", Kind::Text, &[], Status::Used),
    row("learning_rate", Kind::Number, &[], Status::Used),
    row("log_config", Kind::Switch, &[], Status::NoEffect("the effective settings are always written beside the result")),
    row("log_prefix", Kind::Text, &[], Status::Used),
    row("log_tracker_config", Kind::Text, &[], Status::NoEffect("nothing is uploaded")),
    row("log_tracker_name", Kind::Text, &[], Status::Used),
    row("log_with", Kind::Text, &["tensorboard"], Status::Used),
    row("logging_dir", Kind::Text, &[], Status::Used),
    row("loss_type", Kind::Text, &["l1", "l2", "huber", "smooth_l1"], Status::Used),
    row("lowram", Kind::Switch, &[], Status::NoEffect("memory is managed automatically")),
    row("lr_decay_steps", Kind::Steps, &[], Status::Used),
    row("lr_scheduler", Kind::Text, &[], Status::Used),
    row("lr_scheduler_args", Kind::List, &[], Status::Used),
    row("lr_scheduler_min_lr_ratio", Kind::Number, &[], Status::Used),
    row("lr_scheduler_num_cycles", Kind::Integer, &[], Status::Used),
    row("lr_scheduler_power", Kind::Number, &[], Status::Used),
    row("lr_scheduler_timescale", Kind::Integer, &[], Status::Used),
    row("lr_scheduler_type", Kind::Text, &[], Status::Used),
    row("lr_warmup_steps", Kind::Steps, &[], Status::Used),
    row("masked_loss", Kind::Switch, &[], Status::Used),
    row("max_bucket_reso", Kind::Integer, &[], Status::Used),
    row("max_data_loader_n_workers", Kind::Integer, &[], Status::NoEffect("results do not depend on workers here")),
    row("max_grad_norm", Kind::Number, &[], Status::Used),
    row("max_timestep", Kind::Integer, &[], Status::Used),
    row("max_token_length", Kind::Integer, &["150", "225"], Status::Used),
    row("max_train_epochs", Kind::Integer, &[], Status::Used),
    row("max_train_steps", Kind::Integer, &[], Status::Used),
    row("max_validation_steps", Kind::Integer, &[], Status::Used),
    row("mem_eff_attn", Kind::Switch, &[], Status::NoEffect("changes speed only")),
    row("metadata_author", Kind::Text, &[], Status::Used),
    row("metadata_description", Kind::Text, &[], Status::Used),
    row("metadata_is_negative_embedding", Kind::Text, &[], Status::Used),
    row("metadata_license", Kind::Text, &[], Status::Used),
    row("metadata_merged_from", Kind::Text, &[], Status::Used),
    row("metadata_preprocessor", Kind::Text, &[], Status::Used),
    row("metadata_tags", Kind::Text, &[], Status::Used),
    row("metadata_thumbnail", Kind::Text, &[], Status::Used),
    row("metadata_title", Kind::Text, &[], Status::Used),
    row("metadata_trigger_phrase", Kind::Text, &[], Status::Used),
    row("metadata_usage_hint", Kind::Text, &[], Status::Used),
    row("min_bucket_reso", Kind::Integer, &[], Status::Used),
    row("min_snr_gamma", Kind::Number, &[], Status::Used),
    row("min_timestep", Kind::Integer, &[], Status::Used),
    row("mixed_precision", Kind::Text, &["no", "fp16", "bf16"], Status::Used),
    row("multires_noise_discount", Kind::Number, &[], Status::Used),
    row("multires_noise_iterations", Kind::Integer, &[], Status::Used),
    row("network_alpha", Kind::Number, &[], Status::Used),
    row("network_args", Kind::List, &[], Status::Used),
    row("network_dim", Kind::Integer, &[], Status::Used),
    row("network_dropout", Kind::Number, &[], Status::Used),
    row("network_module", Kind::Text, &[], Status::Used),
    row("network_train_text_encoder_only", Kind::Switch, &[], Status::Used),
    row("network_train_unet_only", Kind::Switch, &[], Status::Used),
    row("network_weights", Kind::Text, &[], Status::Used),
    row("no_half_vae", Kind::Switch, &[], Status::NoEffect("the VAE always runs in f32")),
    row("no_metadata", Kind::Switch, &[], Status::Used),
    row("noise_offset", Kind::Number, &[], Status::Used),
    row("noise_offset_random_strength", Kind::Switch, &[], Status::Used),
    row("offload_optimizer_device", Kind::Text, &["cpu", "nvme"], Status::Refused("it belongs to deepspeed; an 8-bit optimizer keeps a smaller state")),
    row("offload_optimizer_nvme_path", Kind::Text, &[], Status::NoEffect("one process trains")),
    row("offload_param_device", Kind::Text, &["cpu", "nvme"], Status::Refused("it belongs to deepspeed; mixed_precision bf16 keeps the frozen weights in 16 bits")),
    row("offload_param_nvme_path", Kind::Text, &[], Status::NoEffect("one process trains")),
    row("optimizer_args", Kind::List, &[], Status::Used),
    row("optimizer_type", Kind::Text, &[], Status::Used),
    row("output_config", Kind::Switch, &[], Status::Refused("the effective settings are always written beside the result; --write-config FILE.toml writes them without training")),
    row("output_dir", Kind::Text, &[], Status::Used),
    row("output_name", Kind::Text, &[], Status::Used),
    row("persistent_data_loader_workers", Kind::Switch, &[], Status::NoEffect("results do not depend on workers here")),
    row("pretrained_model_name_or_path", Kind::Text, &[], Status::Used),
    row("prior_loss_weight", Kind::Number, &[], Status::Used),
    row("random_crop", Kind::Switch, &[], Status::Used),
    row("reg_data_dir", Kind::Text, &[], Status::Used),
    row("resize_interpolation", Kind::Text, &["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"], Status::Used),
    row("resolution", Kind::Text, &[], Status::Used),
    row("resume", Kind::Text, &[], Status::Used),
    row("resume_from_huggingface", Kind::Switch, &[], Status::Refused("downloading is not supported; download the state and give its folder as resume")),
    row("sample_at_first", Kind::Switch, &[], Status::Used),
    row("sample_every_n_epochs", Kind::Integer, &[], Status::Used),
    row("sample_every_n_steps", Kind::Integer, &[], Status::Used),
    row("sample_prompts", Kind::Text, &[], Status::Used),
    row("sample_sampler", Kind::Text, &["ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"], Status::Used),
    row("save_every_n_epochs", Kind::Integer, &[], Status::Used),
    row("save_every_n_steps", Kind::Integer, &[], Status::Used),
    row("save_last_n_epochs", Kind::Integer, &[], Status::Used),
    row("save_last_n_epochs_state", Kind::Integer, &[], Status::Used),
    row("save_last_n_steps", Kind::Integer, &[], Status::Used),
    row("save_last_n_steps_state", Kind::Integer, &[], Status::Used),
    row("save_model_as", Kind::Text, &["safetensors"], Status::Used),
    row("save_n_epoch_ratio", Kind::Integer, &[], Status::Used),
    row("save_precision", Kind::Text, &["float", "fp16", "bf16"], Status::Used),
    row("save_state", Kind::Switch, &[], Status::Used),
    row("save_state_on_train_end", Kind::Switch, &[], Status::Used),
    row("save_state_to_huggingface", Kind::Switch, &[], Status::Refused("uploading is not supported; save_state writes it to output_dir")),
    row("scale_v_pred_loss_like_noise_pred", Kind::Switch, &[], Status::Used),
    row("scale_weight_norms", Kind::Number, &[], Status::Used),
    row("sdpa", Kind::Switch, &[], Status::NoEffect("changes speed only")),
    row("secondary_separator", Kind::Text, &[], Status::Used),
    row("seed", Kind::Integer, &[], Status::Used),
    row("shuffle_caption", Kind::Switch, &[], Status::Used),
    row("skip_cache_check", Kind::Switch, &[], Status::NoEffect("caches are checked by content, which is cheap")),
    row("skip_until_initial_step", Kind::Switch, &[], Status::NoEffect("resume always goes on at the next batch")),
    row("text_encoder_lr", Kind::Numbers, &[], Status::Used),
    row("token_warmup_min", Kind::Integer, &[], Status::Used),
    row("token_warmup_step", Kind::Number, &[], Status::Used),
    row("tokenizer_cache_dir", Kind::Text, &[], Status::NoEffect("the tokenizer is built in")),
    row("torch_compile", Kind::Switch, &[], Status::NoEffect("there is nothing to compile")),
    row("train_batch_size", Kind::Integer, &[], Status::Used),
    row("train_data_dir", Kind::Text, &[], Status::Used),
    row("training_comment", Kind::Text, &[], Status::Used),
    row("unet_lr", Kind::Number, &[], Status::Used),
    row("use_8bit_adam", Kind::Switch, &[], Status::Refused("use optimizer_type AdamW8bit")),
    row("use_lion_optimizer", Kind::Switch, &[], Status::Refused("use optimizer_type Lion")),
    row("v2", Kind::Switch, &[], Status::Refused("only Stable Diffusion 1.x is supported")),
    row("v_parameterization", Kind::Switch, &[], Status::Used),
    row("v_pred_like_loss", Kind::Number, &[], Status::Used),
    row("vae", Kind::Text, &[], Status::Used),
    row("vae_batch_size", Kind::Integer, &[], Status::NoEffect("pictures are encoded one at a time")),
    row("validate_every_n_epochs", Kind::Integer, &[], Status::Used),
    row("validate_every_n_steps", Kind::Integer, &[], Status::Used),
    row("validation_seed", Kind::Integer, &[], Status::Used),
    row("validation_split", Kind::Number, &[], Status::Used),
    row("wandb_api_key", Kind::Text, &[], Status::NoEffect("nothing is uploaded")),
    row("wandb_run_name", Kind::Text, &[], Status::NoEffect("nothing is uploaded")),
    row("weighted_captions", Kind::Switch, &[], Status::Used),
    row("xformers", Kind::Switch, &[], Status::NoEffect("changes speed only")),
    row("zero3_init_flag", Kind::Switch, &[], Status::NoEffect("one process trains")),
    row("zero3_save_16bit_model", Kind::Switch, &[], Status::NoEffect("one process trains")),
    row("zero_stage", Kind::Integer, &["0", "1", "2", "3"], Status::NoEffect("one process trains")),
    row("zero_terminal_snr", Kind::Switch, &[], Status::Used),
];

/// Options that sd-scripts does not have, sorted by name: ours, and those that kohya_ss
/// writes into the configs of its runs all the same.
#[rustfmt::skip]
pub const OWN_OPTIONS: &[OptionRow] = &[
    row("ema_decay", Kind::Number, &[], Status::Used),
    row("epoch", Kind::Integer, &[], Status::NoEffect("max_train_epochs or max_train_steps decides")),
    row("extend_run", Kind::Switch, &[], Status::Used),
    row("lowvram", Kind::Switch, &[], Status::NoEffect("memory is managed automatically")),
    row("no_token_padding", Kind::Switch, &[], Status::NoEffect("sd-scripts does not know it")),
    row("noise_offset_type", Kind::Text, &["Original", "Multires"], Status::NoEffect("the noise options decide")),
    row("stop_text_encoder_training", Kind::Steps, &[], Status::Used),
];

/// Settings by option name, with where each came from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings {
    values: BTreeMap<String, (Value, String)>,
    /// Texts of a GUI's config that are files in sd-scripts.
    pub inline: Inline,
}

impl Settings {
    /// Reads a config file as sd-scripts does: tables are flattened by one level,
    /// their names do not matter; a later key wins. `.toml` is appended to a name
    /// without it.
    ///
    /// # Errors
    /// [`Error::Config`] for broken TOML, an unknown option (with the nearest known
    /// names), a value of the wrong type or not in the list.
    pub fn from_toml(path: &Path) -> Result<Self> {
        let path = if path.extension().is_some_and(|e| e == "toml") {
            path.to_path_buf()
        } else {
            let mut name = path.as_os_str().to_os_string();
            name.push(".toml");
            name.into()
        };
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let place = path.display().to_string();
        let table: Table =
            text.trim_start_matches('\u{feff}')
                .parse()
                .map_err(|e: toml::de::Error| Error::Config {
                    place: place.clone(),
                    what: e.to_string().trim().to_string(),
                })?;
        let mut settings = Self::default();
        for (key, value) in table {
            match value {
                Value::Table(inner) => {
                    for (key, value) in inner {
                        settings.set(&key, value, &place)?;
                    }
                }
                value => settings.set(&key, value, &place)?,
            }
        }
        Ok(settings)
    }

    /// Reads `--name value` arguments with sd-scripts' names. Returns what is left
    /// over: arguments before the first option.
    ///
    /// # Errors
    /// As [`from_toml`](Self::from_toml).
    pub fn from_arguments(arguments: &[String]) -> Result<(Self, Vec<String>)> {
        let mut settings = Self::default();
        let mut rest = Vec::new();
        let mut queue = arguments.iter().peekable();
        while let Some(argument) = queue.next() {
            let Some(name) = argument.strip_prefix("--") else {
                rest.push(argument.clone());
                continue;
            };
            let (name, inline) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_string())),
                None => (name, None),
            };
            let option = find(name, "command line")?;
            let mut words: Vec<String> = inline.into_iter().collect();
            let many = matches!(option.kind, Kind::List | Kind::Numbers);
            let wanted = if many {
                usize::MAX
            } else {
                usize::from(option.kind != Kind::Switch)
            };
            while words.len() < wanted && queue.peek().is_some_and(|w| !w.starts_with("--")) {
                words.extend(queue.next().cloned());
            }
            settings.set(option.name, from_words(option, &words)?, "command line")?;
        }
        Ok((settings, rest))
    }

    /// Sets one option, checking its name, type and value.
    ///
    /// # Errors
    /// As [`from_toml`](Self::from_toml).
    pub fn set(&mut self, name: &str, value: Value, origin: &str) -> Result<()> {
        let option = find(name, origin)?;
        let value = checked(option, value, origin)?;
        self.values
            .insert(option.name.to_string(), (value, origin.to_string()));
        Ok(())
    }

    /// Puts `other` on top of these settings. Where it sets the length of the run, in epochs or
    /// in steps, what is below does not.
    pub fn overlay(&mut self, other: Settings) {
        if LENGTH.iter().any(|name| other.get(name).is_some()) {
            LENGTH.iter().for_each(|name| self.remove(name));
        }
        self.values.extend(other.values);
        let Inline { dataset, samples } = other.inline;
        self.inline.dataset = dataset.or(self.inline.dataset.take());
        self.inline.samples = samples.or(self.inline.samples.take());
    }

    /// Every value with its name and where it came from, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value, &str)> {
        self.values
            .iter()
            .map(|(name, (value, origin))| (name.as_str(), value, origin.as_str()))
    }

    /// Takes an option away.
    pub fn remove(&mut self, name: &str) {
        self.values.remove(name);
    }

    /// One value.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.values.get(name).map(|(value, _)| value)
    }

    /// Where a value came from.
    pub fn origin(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(|(_, origin)| origin.as_str())
    }

    /// Options that are set and have no effect, with the reason.
    pub fn without_effect(&self) -> Vec<(&'static str, &'static str)> {
        let both = LENGTH.iter().all(|name| self.get(name).is_some());
        let steps = both.then_some((
            "max_train_steps",
            "max_train_epochs decides the length of the run, as in sd-scripts",
        ));
        let active = |row: &OptionRow| {
            self.get(row.name)
                .is_some_and(|v| *v != Value::Boolean(false))
        };
        all_options()
            .filter_map(|row| match row.status {
                Status::NoEffect(reason) if active(row) => Some((row.name, reason)),
                _ => None,
            })
            .chain(steps)
            .collect()
    }

    /// The options that are used, as a flat table; a refused one is an error unless
    /// it is switched off.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub fn used(&self) -> Result<Table> {
        let mut table = Table::new();
        for (name, (value, origin)) in &self.values {
            match find(name, origin)?.status {
                Status::Used => {
                    table.insert(name.clone(), value.clone());
                }
                Status::NoEffect(_) => {}
                Status::Refused(_) if *value == Value::Boolean(false) => {}
                Status::Refused(advice) => {
                    return Err(Error::Refused {
                        name: name.clone(),
                        place: origin.clone(),
                        advice,
                    });
                }
            }
        }
        Ok(table)
    }
}

/// sd-scripts' options and ours.
pub fn all_options() -> impl Iterator<Item = &'static OptionRow> {
    OPTIONS.iter().chain(OWN_OPTIONS)
}

/// The table's row of a name; its few old spellings are understood.
fn find(name: &str, place: &str) -> Result<&'static OptionRow> {
    all_options().find(|o| o.name == name).ok_or_else(|| {
        let mut near: Vec<(usize, &str)> = all_options()
            .map(|o| (distance(name, o.name), o.name))
            .collect();
        near.sort();
        let names: Vec<&str> = near.iter().take(3).map(|(_, n)| *n).collect();
        Error::Config {
            place: place.to_string(),
            what: format!(
                "unknown option {name:?}; similar ones are {}",
                names.join(", ")
            ),
        }
    })
}

/// Number of single-letter edits between two names.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = (diagonal + usize::from(x != *y))
                .min(above + 1)
                .min(row[j] + 1);
            diagonal = above;
        }
    }
    row[b.len()]
}

/// Checks type and list of a value, and brings it into one form.
fn checked(option: &OptionRow, value: Value, place: &str) -> Result<Value> {
    let fail = |what: String| {
        Err(Error::Config {
            place: place.to_string(),
            what: format!("{}: {what}", option.name),
        })
    };
    let number = |v: &Value| match v {
        Value::Integer(i) => Some(Value::Float(*i as f64)),
        Value::Float(f) => Some(Value::Float(*f)),
        _ => None,
    };
    let value = match (option.kind, &value) {
        (_, Value::Integer(_) | Value::Array(_)) if option.name == "resolution" => {
            resolution_text(&value)
        }
        (Kind::Integer, Value::Integer(number)) if *number < 0 => {
            return fail(format!(
                "expected a whole number of at least 0, got {number}"
            ));
        }
        (Kind::Switch, Value::Boolean(_))
        | (Kind::Integer, Value::Integer(_))
        | (Kind::Text, Value::String(_))
        | (Kind::Steps, Value::Integer(_) | Value::Float(_)) => value,
        (Kind::Number, v) if number(v).is_some() => number(v).unwrap_or(value),
        (Kind::Numbers, v) if number(v).is_some() => Value::Array(number(v).into_iter().collect()),
        (Kind::Numbers, Value::Array(items)) if items.iter().all(|v| number(v).is_some()) => {
            Value::Array(items.iter().filter_map(number).collect())
        }
        (Kind::List, Value::Array(items)) if items.iter().all(Value::is_str) => value,
        (Kind::List, Value::String(_)) => Value::Array(vec![value]),
        (kind, other) => {
            let wanted = match kind {
                Kind::Switch => "true or false",
                Kind::Integer => "a whole number",
                Kind::Number => "a number",
                Kind::Text => "text in quotes",
                Kind::List => "a list of texts",
                Kind::Numbers => "a number or a list of numbers",
                Kind::Steps => "a whole number of steps, or a part of the run below 1",
            };
            return fail(format!("expected {wanted}, got {other}"));
        }
    };
    match value.as_str() {
        Some(text) if !option.choices.is_empty() && !option.choices.contains(&text) => fail(
            format!("{text:?} is not one of {}", option.choices.join(", ")),
        ),
        _ => Ok(value),
    }
}

/// `512` and `[512, 768]` as sd-scripts' text form.
fn resolution_text(value: &Value) -> Value {
    match value {
        Value::Array(items) => Value::String(
            items
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(","),
        ),
        other => Value::String(other.to_string()),
    }
}

/// Command-line words as a value.
fn from_words(option: &OptionRow, words: &[String]) -> Result<Value> {
    let fail = |what: String| {
        Err(Error::Config {
            place: "command line".into(),
            what: format!("--{}: {what}", option.name),
        })
    };
    if option.kind == Kind::Switch {
        return match words {
            [] => Ok(Value::Boolean(true)),
            [word] if word == "true" || word == "false" => Ok(Value::Boolean(word == "true")),
            [word, ..] => fail(format!("takes no value, got {word:?}")),
        };
    }
    let Some(first) = words.first() else {
        return fail("needs a value".into());
    };
    let number = |word: &String| word.trim().parse::<f64>().ok().filter(|f| f.is_finite());
    Ok(match option.kind {
        Kind::Text => Value::String(first.clone()),
        Kind::List => Value::Array(words.iter().cloned().map(Value::String).collect()),
        Kind::Integer => match first.parse::<i64>() {
            Ok(i) => Value::Integer(i),
            Err(_) => return fail(format!("expected a whole number, got {first:?}")),
        },
        Kind::Number => match number(first) {
            Some(f) => Value::Float(f),
            None => return fail(format!("expected a number, got {first:?}")),
        },
        Kind::Numbers => match words.iter().map(number).collect::<Option<Vec<f64>>>() {
            Some(list) => Value::Array(list.into_iter().map(Value::Float).collect()),
            None => return fail(format!("expected numbers, got {words:?}")),
        },
        Kind::Steps | Kind::Switch => match (
            first.strip_suffix('%').map(|p| p.parse::<f64>()),
            first.parse::<i64>(),
        ) {
            (Some(Ok(percent)), _) => Value::Float(percent / 100.0),
            (None, Ok(steps)) => Value::Integer(steps),
            _ => match number(first) {
                Some(part) if part < 1.0 => Value::Float(part),
                _ => {
                    return fail(format!(
                        "expected steps, a part below 1 or a percentage, got {first:?}"
                    ));
                }
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_string).collect()
    }

    #[test]
    fn a_misspelt_option_is_an_error_that_names_the_right_one() {
        let error = Settings::from_arguments(&words("--netwrok_dim 8")).unwrap_err();
        assert!(error.to_string().contains("network_dim"), "{error}");
    }

    #[test]
    fn arguments_are_read_like_sd_scripts_reads_them() {
        let line = "--network_dim 8 --optimizer_args weight_decay=0.01 betas=0.9,0.99 --flip_aug --lr_warmup_steps 10%";
        let (settings, rest) = Settings::from_arguments(&words(line)).unwrap();
        assert!(rest.is_empty());
        assert_eq!(settings.get("network_dim"), Some(&Value::Integer(8)));
        assert_eq!(settings.get("flip_aug"), Some(&Value::Boolean(true)));
        assert_eq!(settings.get("lr_warmup_steps"), Some(&Value::Float(0.1)));
        assert_eq!(
            settings
                .get("optimizer_args")
                .and_then(Value::as_array)
                .map(Vec::len),
            Some(2)
        );
    }

    #[test]
    fn wrong_types_and_values_are_refused_by_name() {
        let mut settings = Settings::default();
        for (name, value, hint) in [
            ("learning_rate", Value::String("1e-4".into()), "a number"),
            ("loss_type", Value::String("foo".into()), "huber"),
            ("network_dim", Value::Float(1.5), "whole"),
            ("seed", Value::Integer(-1), "at least 0"),
        ] {
            let error = settings.set(name, value, "file").unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(hint), "{error}");
        }
    }

    #[test]
    fn one_setting_decides_the_length_of_a_run() {
        let needed = "--pretrained_model_name_or_path m --train_data_dir d --output_dir o";
        let line = |more: &str| {
            let (settings, _) =
                Settings::from_arguments(&words(&format!("{needed}{more}"))).unwrap();
            settings
        };
        let length = |settings: &Settings| {
            let config = crate::TrainConfig::from_settings(settings).unwrap();
            (config.max_train_epochs, config.max_train_steps)
        };
        assert_eq!(length(&line("")), (None, 1600));
        assert_eq!(length(&line(" --max_train_steps 50")), (None, 50));

        let both = line(" --max_train_epochs 2 --max_train_steps 50");
        let error = crate::TrainConfig::from_settings(&both).unwrap_err();
        assert!(error.to_string().contains("leave one out"), "{error}");

        // GUIs write both into one file: then epochs decide, and the other is named.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("both.toml");
        std::fs::write(&path, "max_train_epochs = 2\nmax_train_steps = 1600\n").unwrap();
        let mut settings = Settings::from_toml(&path).unwrap();
        assert_eq!(settings.without_effect()[0].0, "max_train_steps");
        settings.overlay(line(""));
        assert_eq!(length(&settings), (Some(2), 1600));
        let written = crate::TrainConfig::from_settings(&settings)
            .and_then(|config| config.to_toml())
            .unwrap();
        assert!(!written.contains("max_train_steps"), "{written}");

        // The command line beats the file, whichever way it counts.
        settings.overlay(line(" --max_train_steps 50"));
        assert_eq!(length(&settings), (None, 50));
    }

    #[test]
    fn the_table_is_sorted_and_has_every_name_once() {
        for table in [OPTIONS, OWN_OPTIONS] {
            assert!(table.windows(2).all(|pair| pair[0].name < pair[1].name));
        }
    }
}
