//! The `ss_*` and `modelspec.*` metadata of result files, in sd-scripts' spelling:
//! values are Python's `str()` of the setting.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lora_core::format::{model_hash_of_file, sha256_of_file};
use lora_data::Dataset;
use serde_json::{Map, Value, json};

use crate::config::{Steps, TrainConfig};
use crate::{Plan, Result};

/// Metadata keys and values.
pub type Metadata = BTreeMap<String, String>;

/// Metadata that is known when training starts. `started_at` is Unix time in seconds.
///
/// # Errors
/// When the checkpoint cannot be hashed, or `network_args` cannot be read.
pub fn training_metadata(
    config: &TrainConfig,
    dataset: &Dataset,
    plan: &Plan,
    started_at: f64,
) -> Result<Metadata> {
    let mut m = Writer::default();
    run(&mut m, config, plan, started_at)?;
    noise_and_loss(&mut m, config);
    model_files(&mut m, config)?;
    m.text("ss_num_validation_images", dataset.num_validation_images());
    data(&mut m, config, dataset)?;
    m.text("training_config", settings_without_paths(config)?);
    let mut metadata = m.0;
    if config.no_metadata {
        let kept = [
            "ss_v2",
            "ss_base_model_version",
            "ss_network_module",
            "ss_network_dim",
            "ss_network_alpha",
            "ss_network_args",
        ];
        metadata.retain(|key, _| kept.contains(&key.as_str()));
    }
    Ok(metadata)
}

/// Every setting as JSON, so that a file says how it was made; of paths the last part, as
/// people do not want to publish their folders.
fn settings_without_paths(config: &TrainConfig) -> Result<String> {
    let mut value = config.to_value()?;
    if let Some(map) = value.as_object_mut() {
        let is_path = |key: &str| {
            key.ends_with("_dir")
                || [
                    "pretrained_model_name_or_path",
                    "vae",
                    "dataset_config",
                    "in_json",
                    "network_weights",
                    "base_weights",
                    "resume",
                    "sample_prompts",
                ]
                .contains(&key)
        };
        map.retain(|key, _| key != "output_dir" && key != "logging_dir");
        for (_, value) in map.iter_mut().filter(|(key, _)| is_path(key)) {
            let names: Vec<&mut Value> = match value {
                Value::Array(items) => items.iter_mut().collect(),
                other => vec![other],
            };
            for name in names {
                let last = name
                    .as_str()
                    .and_then(|path| Path::new(path).file_name()?.to_str())
                    .map(str::to_string);
                *name = last.map_or(Value::Null, Into::into);
            }
        }
    }
    Ok(value.to_string())
}

fn run(m: &mut Writer, config: &TrainConfig, plan: &Plan, started_at: f64) -> Result<()> {
    m.text("ss_session_id", plan.seed % (1 << 31));
    m.float("ss_training_started_at", started_at);
    m.text("ss_output_name", config.name());
    m.float("ss_learning_rate", config.learning_rate());
    m.text(
        "ss_text_encoder_lr",
        config
            .text_encoder_lr
            .first()
            .map_or("None".into(), |lr| py_float(*lr)),
    );
    m.option("ss_unet_lr", config.unet_lr.map(py_float));
    m.text("ss_num_train_images", plan.train_images);
    m.text("ss_num_reg_images", plan.reg_images);
    m.text("ss_num_batches_per_epoch", plan.batches_per_epoch);
    m.text("ss_num_epochs", plan.epochs);
    m.flag("ss_gradient_checkpointing", config.gradient_checkpointing);
    m.text(
        "ss_gradient_accumulation_steps",
        config.gradient_accumulation_steps,
    );
    m.text("ss_max_train_steps", plan.total_steps);
    let warmup = match config.lr_warmup_steps {
        None => "0".into(),
        Some(Steps::Count(n)) => n.to_string(),
        Some(Steps::Share(part)) => py_float(part),
    };
    m.text("ss_lr_warmup_steps", warmup);
    m.text("ss_lr_scheduler", &config.lr_scheduler);
    m.text(
        "ss_network_module",
        config.network_module.as_deref().unwrap_or("networks.lora"),
    );
    m.text("ss_network_dim", config.network_rank());
    m.float("ss_network_alpha", config.network_alpha);
    m.option("ss_network_dropout", config.network_dropout.map(py_float));
    if !config.network_args.is_empty() {
        let mut args = Map::new();
        for arg in &config.network_args {
            if let Some((key, value)) = arg.split_once('=') {
                args.insert(key.trim().into(), Value::from(value));
            }
        }
        args.insert(
            "dropout".into(),
            config.network_dropout.map_or(Value::Null, Value::from),
        );
        m.text("ss_network_args", Value::Object(args));
    }
    m.text("ss_mixed_precision", &config.mixed_precision);
    m.text("ss_full_fp16", "False");
    m.text("ss_v2", "False");
    m.text(
        "ss_base_model_version",
        if config.v_parameterization {
            "sd_v1_v"
        } else {
            "sd_v1"
        },
    );
    m.option("ss_clip_skip", config.clip_skip);
    m.option(
        "ss_max_token_length",
        config.max_token_length.filter(|l| *l != 75),
    );
    m.flag("ss_cache_latents", config.caches_latents());
    m.text("ss_seed", plan.seed);
    m.text("ss_lowram", "False");
    m.option("ss_training_comment", config.training_comment.as_deref());
    m.text("ss_sd_scripts_commit_hash", "None");
    m.text("ss_optimizer", optimizer(config));
    m.float("ss_max_grad_norm", config.max_grad_norm);
    m.option(
        "ss_scale_weight_norms",
        config.scale_weight_norms.map(py_float),
    );
    m.text("ss_fp8_base", "False");
    m.text("ss_fp8_base_unet", "False");
    m.option("ss_validation_seed", config.validation_seed);
    m.option("ss_max_validation_steps", config.max_validation_steps);
    m.option("ss_validate_every_n_epochs", config.validate_every_n_epochs);
    m.option("ss_validate_every_n_steps", config.validate_every_n_steps);
    m.float(
        "ss_validation_split",
        config.validation_split.unwrap_or(0.0),
    );
    Ok(())
}

fn noise_and_loss(m: &mut Writer, config: &TrainConfig) {
    m.option("ss_noise_offset", config.noise_offset.map(py_float));
    m.option(
        "ss_multires_noise_iterations",
        config.multires_noise_iterations,
    );
    m.float("ss_multires_noise_discount", config.multires_noise_discount);
    m.option(
        "ss_adaptive_noise_scale",
        config.adaptive_noise_scale.map(py_float),
    );
    m.flag("ss_zero_terminal_snr", config.zero_terminal_snr);
    m.option("ss_ip_noise_gamma", config.ip_noise_gamma.map(py_float));
    m.flag(
        "ss_noise_offset_random_strength",
        config.noise_offset_random_strength,
    );
    m.flag(
        "ss_ip_noise_gamma_random_strength",
        config.ip_noise_gamma_random_strength,
    );
    m.float("ss_prior_loss_weight", config.prior_loss_weight);
    m.option("ss_min_snr_gamma", config.min_snr_gamma.map(py_float));
    m.flag("ss_debiased_estimation", config.debiased_estimation_loss);
    m.text("ss_loss_type", &config.loss_type);
    m.text("ss_huber_schedule", &config.huber_schedule);
    m.float("ss_huber_scale", config.huber_scale);
    m.float("ss_huber_c", config.huber_c);
}

fn model_files(m: &mut Writer, config: &TrainConfig) -> Result<()> {
    let files = [
        (
            &config.pretrained_model_name_or_path,
            "ss_sd_model_hash",
            "ss_new_sd_model_hash",
            "ss_sd_model_name",
        ),
        (&config.vae, "ss_vae_hash", "ss_new_vae_hash", "ss_vae_name"),
    ];
    for (path, short, long, name) in files {
        let Some(path) = path else { continue };
        m.text(
            name,
            path.file_name()
                .and_then(|n| n.to_str())
                .unwrap_or_default(),
        );
        if path.is_file() {
            m.text(short, model_hash_of_file(path)?);
            m.text(long, sha256_of_file(path)?);
        }
    }
    Ok(())
}

fn data(m: &mut Writer, config: &TrainConfig, dataset: &Dataset) -> Result<()> {
    m.float("ss_caption_dropout_rate", config.caption_dropout_rate);
    m.text(
        "ss_caption_dropout_every_n_epochs",
        config.caption_dropout_every_n_epochs,
    );
    m.float(
        "ss_caption_tag_dropout_rate",
        config.caption_tag_dropout_rate,
    );
    m.option(
        "ss_face_crop_aug_range",
        config.face_crop_aug_range.as_deref(),
    );
    m.option(
        "ss_resize_interpolation",
        config.resize_interpolation.as_deref(),
    );
    m.text("ss_batch_size_per_device", config.train_batch_size);
    m.text("ss_total_batch_size", config.train_batch_size);
    let options = config.dataset_options()?;
    m.text(
        "ss_resolution",
        format!(
            "({}, {})",
            options.resolution.width, options.resolution.height
        ),
    );
    m.flag("ss_color_aug", config.color_aug);
    m.flag("ss_flip_aug", config.flip_aug);
    m.flag("ss_random_crop", config.random_crop);
    m.flag("ss_shuffle_caption", config.shuffle_caption);
    m.flag("ss_enable_bucket", config.enable_bucket);
    m.flag("ss_bucket_no_upscale", config.bucket_no_upscale);
    let bucketed = |side: u32| config.enable_bucket.then_some(side);
    m.option("ss_min_bucket_reso", bucketed(config.min_bucket_reso));
    m.option("ss_max_bucket_reso", bucketed(config.max_bucket_reso));
    m.text("ss_keep_tokens", config.keep_tokens);
    let (mut dirs, mut reg_dirs, mut tags) = (Map::new(), Map::new(), Map::new());
    let mut buckets = Value::Null;
    for stats in dataset.stats() {
        for (target, is_reg) in [(&mut dirs, false), (&mut reg_dirs, true)] {
            if let Value::Object(entries) = stats.dirs_json(is_reg) {
                target.extend(entries);
            }
        }
        for (folder, counts) in &stats.tag_frequency {
            tags.insert(folder.clone(), json!(counts));
        }
        buckets = stats
            .bucket_info
            .as_ref()
            .map_or(Value::Null, lora_data::BucketInfo::to_json);
    }
    m.text("ss_dataset_dirs", Value::Object(dirs));
    m.text("ss_reg_dataset_dirs", Value::Object(reg_dirs));
    m.text("ss_tag_frequency", Value::Object(tags));
    m.text("ss_bucket_info", buckets);
    Ok(())
}

/// `module.Class(k=v,...)` as sd-scripts writes it.
fn optimizer(config: &TrainConfig) -> String {
    let class = match config.optimizer_type.to_lowercase().as_str() {
        "" | "adamw" => "torch.optim.adamw.AdamW",
        "adamw8bit" => "bitsandbytes.optim.adamw.AdamW8bit",
        "prodigy" => "prodigyopt.prodigy.Prodigy",
        "lion" => "lion_pytorch.lion_pytorch.Lion",
        "adafactor" => "transformers.optimization.Adafactor",
        "adamwschedulefree" => "schedulefree.adamw_schedulefree.AdamWScheduleFree",
        _ => {
            return format!(
                "{}{}",
                config.optimizer_type,
                arguments(&config.optimizer_args)
            );
        }
    };
    format!("{class}{}", arguments(&config.optimizer_args))
}

fn arguments(args: &[String]) -> String {
    let pair = |arg: &String| {
        let (key, value) = arg.split_once('=').unwrap_or((arg, ""));
        // A bare tuple is printed with brackets.
        let value = match value {
            v if v.contains(',') && !v.starts_with(['(', '[']) => {
                let parts: Vec<&str> = v.split(',').map(str::trim).collect();
                format!("({})", parts.join(", "))
            }
            v => v.to_string(),
        };
        format!("{key}={value}")
    };
    if args.is_empty() {
        String::new()
    } else {
        format!("({})", args.iter().map(pair).collect::<Vec<_>>().join(","))
    }
}

/// What `modelspec.*` metadata is made from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelSpec {
    /// Unix time in seconds at which the file is written.
    pub timestamp: f64,
    /// `metadata_title` or the output name; `LoRA@TIME` without either.
    pub title: Option<String>,
    /// Width and height of the resolution option; 512x512 without it.
    pub resolution: Option<(u32, u32)>,
    /// Whether the model predicts v.
    pub v_parameterization: bool,
    /// Range of timesteps, if one was given.
    pub timesteps: Option<(usize, usize)>,
    /// `clip_skip`, if given.
    pub clip_skip: Option<usize>,
    /// Author, licence and so on, by their names without `modelspec.`.
    pub extra: BTreeMap<String, String>,
}

impl ModelSpec {
    /// From the settings of a run.
    ///
    /// # Errors
    /// When the resolution cannot be read.
    pub fn from_config(config: &TrainConfig, timestamp: f64) -> Result<Self> {
        let size = config.dataset_options()?.resolution;
        let given = config.min_timestep.is_some() || config.max_timestep.is_some();
        let noise = config.noise();
        let mut extra = BTreeMap::new();
        for (key, value) in [
            ("author", &config.metadata_author),
            ("description", &config.metadata_description),
            ("license", &config.metadata_license),
            ("tags", &config.metadata_tags),
            ("usage_hint", &config.metadata_usage_hint),
            ("thumbnail", &config.metadata_thumbnail),
            ("merged_from", &config.metadata_merged_from),
            ("trigger_phrase", &config.metadata_trigger_phrase),
            ("preprocessor", &config.metadata_preprocessor),
            (
                "is_negative_embedding",
                &config.metadata_is_negative_embedding,
            ),
        ] {
            if let Some(value) = value {
                extra.insert(key.to_string(), value.clone());
            }
        }
        Ok(Self {
            timestamp,
            title: config
                .metadata_title
                .clone()
                .or_else(|| Some(config.name().to_string())),
            resolution: Some((size.width, size.height)),
            v_parameterization: config.v_parameterization,
            timesteps: given.then_some((noise.min_timestep, noise.max_timestep)),
            clip_skip: config.clip_skip,
            extra,
        })
    }

    /// The keys and values. The date is in UTC.
    pub fn metadata(&self) -> Metadata {
        let mut m = Writer::default();
        let (width, height) = self.resolution.unwrap_or((512, 512));
        m.text("modelspec.sai_model_spec", "1.0.1");
        m.text("modelspec.architecture", "stable-diffusion-v1/lora");
        m.text("modelspec.implementation", "diffusers");
        m.text(
            "modelspec.title",
            self.title
                .clone()
                .unwrap_or_else(|| format!("LoRA@{}", py_float(self.timestamp))),
        );
        m.text("modelspec.date", iso_date(self.timestamp));
        m.text("modelspec.resolution", format!("{width}x{height}"));
        m.text(
            "modelspec.prediction_type",
            if self.v_parameterization {
                "v"
            } else {
                "epsilon"
            },
        );
        if let Some((low, high)) = self.timesteps {
            m.text("modelspec.timestep_range", format!("{low},{high}"));
        }
        if let Some(skip) = self.clip_skip {
            m.text("modelspec.encoder_layer", skip);
        }
        for (key, value) in &self.extra {
            m.text(&format!("modelspec.{key}"), value);
        }
        m.0
    }
}

/// `2023-11-14T22:13:20` of a Unix time, in UTC, whole seconds.
fn iso_date(timestamp: f64) -> String {
    let seconds = timestamp.max(0.0) as i64;
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Civil date from days since 1970-01-01, counting years from March.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 {
        month_index + 3
    } else {
        month_index - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}",
        rest / 3600,
        rest % 3600 / 60,
        rest % 60
    )
}

/// `20231114221320` of a Unix time, in UTC, as sd-scripts writes times into names.
pub(crate) fn compact_time(timestamp: f64) -> String {
    iso_date(timestamp)
        .chars()
        .filter(char::is_ascii_digit)
        .collect()
}

/// Seconds since 1970; those of `SOURCE_DATE_EPOCH` where it is set, so that the same run
/// gives the same bytes.
pub(crate) fn unix_time() -> f64 {
    let fixed = std::env::var("SOURCE_DATE_EPOCH").ok();
    fixed.and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or(Duration::ZERO)
            .as_secs_f64()
    })
}

/// A number as Python prints it: `0.0001`, `1e-05`, `1.0`.
pub(crate) fn py_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    match scientific
        .split_once('e')
        .map(|(m, e)| (m, e.parse::<i32>()))
    {
        Some((mantissa, Ok(exponent))) if value != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{mantissa}e{sign}{:02}", exponent.abs())
        }
        _ if value.fract() == 0.0 && value.is_finite() => format!("{value:.1}"),
        _ => format!("{value}"),
    }
}

/// Collects values in Python's spelling.
#[derive(Default)]
struct Writer(Metadata);

impl Writer {
    fn text(&mut self, key: &str, value: impl ToString) {
        self.0.insert(key.to_string(), value.to_string());
    }

    fn float(&mut self, key: &str, value: f64) {
        self.text(key, py_float(value));
    }

    fn flag(&mut self, key: &str, value: bool) {
        self.text(key, if value { "True" } else { "False" });
    }

    fn option<T: ToString>(&mut self, key: &str, value: Option<T>) {
        self.text(key, value.map_or("None".into(), |v| v.to_string()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spelt_as_python_spells_them() {
        for (value, text) in [
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.0, "1.0"),
            (2.5e-6, "2.5e-06"),
            (0.0, "0.0"),
            (1e16, "1e+16"),
            (0.3, "0.3"),
        ] {
            assert_eq!(py_float(value), text);
        }
    }

    #[test]
    fn optimizer_arguments_are_spelt_as_sd_scripts_spells_them() {
        let config = TrainConfig {
            optimizer_type: "AdamW".into(),
            optimizer_args: vec!["weight_decay=0.1".into(), "betas=0.9,0.99".into()],
            ..Default::default()
        };
        assert_eq!(
            optimizer(&config),
            "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))"
        );
    }
}
