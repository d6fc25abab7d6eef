//! All settings of a run and what follows from them.

use std::path::{Path, PathBuf};

use candle_core::DType;
use lora_core::{AdapterConfig, Compute, Dropout, Family, Targets};
use lora_data::{CaptionConfig, DatasetConfig, Interpolation, Size, SubsetConfig};
use lora_sd15::{NoiseSchedule, TIMESTEPS, WeightStorage};
use serde::{Deserialize, Serialize};

use crate::loss::{HuberSchedule, LossConfig, LossType};
use crate::network::NetworkArgs;
use crate::noise::NoiseConfig;
use crate::options::Settings;
use crate::text::TextConfig;
use crate::{Error, Result};

/// A number of steps, or a share of the run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Steps {
    /// So many.
    Count(u64),
    /// This share of all updates; 1.0 is all of them.
    Share(f64),
}

impl Steps {
    /// The number for a run of `total` updates, rounded down.
    pub fn of(self, total: usize) -> u64 {
        match self {
            Steps::Count(n) => n,
            Steps::Share(part) => (part * total as f64) as u64,
        }
    }
}

/// Texts that a GUI's config holds and sd-scripts keeps in files of their own. The trainer
/// writes them beside the result.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Inline {
    /// A dataset config, TOML.
    pub dataset: Option<String>,
    /// Sample prompts, one per line.
    pub samples: Option<String>,
}

/// Settings of a run, in sd-scripts' names. `None` and empty mean "not given".
///
/// Build it from a file or the command line through [`Settings`], or directly:
///
/// ```
/// use lora_train::TrainConfig;
/// let config = TrainConfig { network_dim: Some(8), ..Default::default() };
/// assert_eq!(config.train_batch_size, 1);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Checkpoint file or diffusers folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pretrained_model_name_or_path: Option<PathBuf>,
    /// Separate VAE file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<PathBuf>,
    /// Folder of `N_name` folders, one such folder, or a plain folder of pictures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_data_dir: Option<PathBuf>,
    /// Folder of regularization pictures, in the same forms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reg_data_dir: Option<PathBuf>,
    /// TOML file that describes datasets in detail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset_config: Option<PathBuf>,
    /// Metadata JSON with captions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_json: Option<PathBuf>,
    /// Folder of masks, one per training picture and named like it; for several folders of pictures also with folders named like theirs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conditioning_data_dir: Option<PathBuf>,
    /// Where results go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_dir: Option<PathBuf>,
    /// Name of the result without extension; `last` without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_name: Option<String>,
    /// `512` or `768,512` (width, height).
    pub resolution: String,
    /// Pictures per step.
    pub train_batch_size: usize,
    /// Epochs; beats `max_train_steps`. Both on the command line are an error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_train_epochs: Option<usize>,
    /// Updates.
    pub max_train_steps: usize,
    /// Batches per update.
    pub gradient_accumulation_steps: usize,
    /// Master seed; drawn when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Repeats of folders without a number.
    pub dataset_repeats: u32,
    /// Sort pictures into buckets by aspect ratio (sd-scripts: off).
    pub enable_bucket: bool,
    /// Smallest bucket side.
    pub min_bucket_reso: u32,
    /// Largest bucket side.
    pub max_bucket_reso: u32,
    /// Bucket sides are multiples of this.
    pub bucket_reso_steps: u32,
    /// Never enlarge pictures.
    pub bucket_no_upscale: bool,
    /// Resize filter; area down and Lanczos up when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resize_interpolation: Option<String>,
    /// Caption files' extension; `.txt`, else `.caption`, when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_extension: Option<String>,
    /// Old spelling of `caption_extension`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_extention: Option<String>,
    /// Text between tags.
    pub caption_separator: String,
    /// Put before every caption.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_prefix: Option<String>,
    /// Put after every caption.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_suffix: Option<String>,
    /// Tags at the front that stay there.
    pub keep_tokens: usize,
    /// Marker between fixed and flexible tags.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub keep_tokens_separator: String,
    /// Joins tags that move together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secondary_separator: Option<String>,
    /// Of several lines in a caption, and of `{a|b}`, one is drawn each time.
    pub enable_wildcard: bool,
    /// Shuffle tags.
    pub shuffle_caption: bool,
    /// Share of empty captions.
    pub caption_dropout_rate: f64,
    /// In every epoch whose number is a multiple of this all captions are empty; 0 = never.
    pub caption_dropout_every_n_epochs: usize,
    /// Share of tags left out.
    pub caption_tag_dropout_rate: f64,
    /// Tags at the start of the warm-up.
    pub token_warmup_min: usize,
    /// Steps, or share of the run, until all tags are there.
    pub token_warmup_step: f64,
    /// `(word:1.2)` in captions sets weights.
    pub weighted_captions: bool,
    /// 150 or 225 for longer captions; 75 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_token_length: Option<usize>,
    /// 1 is the last text encoder layer, 2 the one before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_skip: Option<usize>,
    /// Mirror pictures at random.
    pub flip_aug: bool,
    /// Shift colours at random.
    pub color_aug: bool,
    /// Crop at random instead of in the middle.
    pub random_crop: bool,
    /// Face crop factors `1.5,3.0`; only without buckets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub face_crop_aug_range: Option<String>,
    /// Use the alpha channel as loss mask.
    pub alpha_mask: bool,
    /// Use `conditioning_data_dir` as loss masks.
    pub masked_loss: bool,
    /// Draw one latent per picture for the whole run; else a new one every time.
    pub cache_latents: bool,
    /// Keep encoded pictures in `OUTPUT_DIR/latent-cache` for later runs; implies `cache_latents`.
    pub cache_latents_to_disk: bool,
    /// Part of the pictures that is held back for validation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_split: Option<f64>,
    /// Decides which pictures are held back, and the noise of validation; 0 when absent, so that
    /// runs can be compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_seed: Option<u64>,
    /// Validate every so many epochs; when absent every one, or none with
    /// `validate_every_n_steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validate_every_n_epochs: Option<usize>,
    /// Validate every so many updates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validate_every_n_steps: Option<usize>,
    /// Most batches of a validation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_validation_steps: Option<usize>,
    /// Loss factor of regularization pictures.
    pub prior_loss_weight: f64,
    /// `networks.lora` (when absent), `networks.oft` or `lycoris.kohya`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_module: Option<String>,
    /// Rank; 4 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_dim: Option<usize>,
    /// Scale is alpha / dim; 0 means dim.
    pub network_alpha: f64,
    /// Dropout behind the down projection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_dropout: Option<f64>,
    /// `key=value` options of the network.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub network_args: Vec<String>,
    /// Adapter file to start from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_weights: Option<PathBuf>,
    /// Layers, ranks and alphas are those of `network_weights`.
    pub dim_from_weights: bool,
    /// No adapters on the text encoder.
    pub network_train_unet_only: bool,
    /// No adapters on the UNet.
    pub network_train_text_encoder_only: bool,
    /// Adapters merged into the model before training.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub base_weights: Vec<PathBuf>,
    /// Multipliers of `base_weights`; 1 when absent.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub base_weights_multiplier: Vec<f64>,
    /// Optimizer name; AdamW when empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub optimizer_type: String,
    /// `key=value` options of the optimizer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub optimizer_args: Vec<String>,
    /// Learning rate; when absent 1 for Prodigy and D-Adaptation, else 1e-4 (sd-scripts: 2e-6).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// The UNet's learning rate; `learning_rate` when absent, 0 does not train it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unet_lr: Option<f64>,
    /// The text encoder's learning rate; `learning_rate` when absent, 0 does not train it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub text_encoder_lr: Vec<f64>,
    /// Learning-rate schedule: constant, constant_with_warmup, linear, cosine, cosine_with_restarts,
    /// cosine_with_min_lr, polynomial, inverse_sqrt, warmup_stable_decay or piecewise_constant.
    pub lr_scheduler: String,
    /// Class name of the schedule, instead of `lr_scheduler`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub lr_scheduler_type: String,
    /// `key=value` options of the schedule.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lr_scheduler_args: Vec<String>,
    /// Warm-up steps, or share of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_warmup_steps: Option<Steps>,
    /// Decay steps, or share of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_decay_steps: Option<Steps>,
    /// Cycles of the schedules that have them.
    pub lr_scheduler_num_cycles: u32,
    /// Exponent of the polynomial schedule.
    pub lr_scheduler_power: f64,
    /// Of the inverse square root schedule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_scheduler_timescale: Option<u64>,
    /// Lowest share of the learning rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_scheduler_min_lr_ratio: Option<f64>,
    /// Clips all gradients together; 0 = off.
    pub max_grad_norm: f64,
    /// Largest norm of a layer's delta; 0 = off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale_weight_norms: Option<f64>,
    /// How the UNet's frozen weights are kept in memory: `no` (as in the file), `fp16`,
    /// `bf16` (rounded; the UNet's products, those of low-rank branches too, are computed in it).
    /// Everything else is f32.
    pub mixed_precision: String,
    /// Compute activations again in the backward pass, to save memory.
    pub gradient_checkpointing: bool,
    /// The text encoder's adapters learn for so many updates, or this share of the run
    /// (ours).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_text_encoder_training: Option<Steps>,
    /// Average the weights with this decay and save the average (ours).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema_decay: Option<f64>,
    /// Strength of a constant added to the noise per sample and channel; 0.05 to 0.1 makes darker and brighter pictures possible.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise_offset: Option<f64>,
    /// Draw that strength from 0 to the value for each batch.
    pub noise_offset_random_strength: bool,
    /// Added to the noise offset, times the mean magnitude of the latents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adaptive_noise_scale: Option<f64>,
    /// Add noise of so many coarser resolutions ("pyramid noise"); 6 to 10 is usual.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multires_noise_iterations: Option<usize>,
    /// Factor on each coarser noise.
    pub multires_noise_discount: f64,
    /// Strength of extra noise on the input only ("input perturbation"); 0.1 is usual.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_noise_gamma: Option<f64>,
    /// Draw that strength from 0 to the value for each batch.
    pub ip_noise_gamma_random_strength: bool,
    /// First timestep.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_timestep: Option<usize>,
    /// End of the timesteps, excluded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_timestep: Option<usize>,
    /// Error measure.
    pub loss_type: String,
    /// How the limit depends on the timestep.
    pub huber_schedule: String,
    /// Error above which huber and smooth_l1 grow linearly.
    pub huber_c: f64,
    /// Factor on that limit; not with `huber_schedule` snr, as in sd-scripts.
    pub huber_scale: f64,
    /// Weigh the loss by min(SNR, gamma) / SNR; 5 is usual.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_snr_gamma: Option<f64>,
    /// Weigh the loss by 1 / sqrt(SNR): all timesteps count alike in the picture.
    pub debiased_estimation_loss: bool,
    /// Train v-prediction, for models that were trained so.
    pub v_parameterization: bool,
    /// With v-prediction: weigh the loss as eps-prediction would.
    pub scale_v_pred_loss_like_noise_pred: bool,
    /// Add this much of a v-prediction-like loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub v_pred_like_loss: Option<f64>,
    /// Rescale the schedule so that the last step is pure noise.
    pub zero_terminal_snr: bool,
    /// Intermediate files by epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_every_n_epochs: Option<usize>,
    /// Files by epoch, so often that there are this many with the last one; beats
    /// `save_every_n_epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_n_epoch_ratio: Option<usize>,
    /// Intermediate files by step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_every_n_steps: Option<usize>,
    /// Keep only so many of the newest files by epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_last_n_epochs: Option<usize>,
    /// Keep only the files of so many last updates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_last_n_steps: Option<usize>,
    /// Write a state to go on from with every intermediate file and at the end.
    pub save_state: bool,
    /// Write a state at the end.
    pub save_state_on_train_end: bool,
    /// Like `save_last_n_epochs`, for states.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_last_n_epochs_state: Option<usize>,
    /// Like `save_last_n_steps`, for states.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_last_n_steps_state: Option<usize>,
    /// State folder to go on from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resume: Option<PathBuf>,
    /// Allow `resume` with another number of epochs or steps (ours).
    pub extend_run: bool,
    /// File of prompts to draw while training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample_prompts: Option<PathBuf>,
    /// Draw sample pictures every so many epochs; then `sample_every_n_steps` does not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample_every_n_epochs: Option<usize>,
    /// Draw sample pictures every so many updates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample_every_n_steps: Option<usize>,
    /// Draw sample pictures before training too.
    pub sample_at_first: bool,
    /// How sample pictures are drawn, where the prompt does not say; ddim when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample_sampler: Option<String>,
    /// Folder for TensorBoard and JSON logs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logging_dir: Option<PathBuf>,
    /// `tensorboard`; the JSON log is always written with `logging_dir`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_with: Option<String>,
    /// Put before the name of the log folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_prefix: Option<String>,
    /// Name of the folder inside the log folder; `network_train` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_tracker_name: Option<String>,
    /// Texts that a GUI's config holds and sd-scripts keeps in files of their own.
    #[serde(skip)]
    pub inline: Inline,
    /// `float`, `fp16` or `bf16`; f32 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_precision: Option<String>,
    /// Only `safetensors`.
    pub save_model_as: String,
    /// Leave training metadata out of the files.
    pub no_metadata: bool,
    /// Free text in the metadata.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training_comment: Option<String>,
    /// `modelspec.title` in the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata_title: Option<String>,
    /// `modelspec.author` in the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata_author: Option<String>,
    /// `modelspec.description` in the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata_description: Option<String>,
    /// `modelspec.license` in the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata_license: Option<String>,
    /// `modelspec.tags` in the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata_tags: Option<String>,
    /// `modelspec.usage_hint` in the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata_usage_hint: Option<String>,
    /// `modelspec.thumbnail` in the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata_thumbnail: Option<String>,
    /// `modelspec.merged_from` in the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata_merged_from: Option<String>,
    /// `modelspec.trigger_phrase` in the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata_trigger_phrase: Option<String>,
    /// `modelspec.preprocessor` in the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata_preprocessor: Option<String>,
    /// `modelspec.is_negative_embedding` in the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata_is_negative_embedding: Option<String>,
}

/// The options that set the length of a run; the first beats the second, as in sd-scripts.
pub(crate) const LENGTH: [&str; 2] = ["max_train_epochs", "max_train_steps"];

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            pretrained_model_name_or_path: None,
            vae: None,
            train_data_dir: None,
            reg_data_dir: None,
            dataset_config: None,
            in_json: None,
            conditioning_data_dir: None,
            output_dir: None,
            output_name: None,
            resolution: "512".into(),
            train_batch_size: 1,
            max_train_epochs: None,
            max_train_steps: 1600,
            gradient_accumulation_steps: 1,
            seed: None,
            dataset_repeats: 1,
            enable_bucket: true,
            min_bucket_reso: 256,
            max_bucket_reso: 1024,
            bucket_reso_steps: 64,
            bucket_no_upscale: false,
            resize_interpolation: None,
            caption_extension: None,
            caption_extention: None,
            caption_separator: ",".into(),
            caption_prefix: None,
            caption_suffix: None,
            keep_tokens: 0,
            keep_tokens_separator: String::new(),
            secondary_separator: None,
            enable_wildcard: false,
            shuffle_caption: false,
            caption_dropout_rate: 0.0,
            caption_dropout_every_n_epochs: 0,
            caption_tag_dropout_rate: 0.0,
            token_warmup_min: 1,
            token_warmup_step: 0.0,
            weighted_captions: false,
            max_token_length: None,
            clip_skip: None,
            flip_aug: false,
            color_aug: false,
            random_crop: false,
            face_crop_aug_range: None,
            alpha_mask: false,
            masked_loss: false,
            cache_latents: false,
            cache_latents_to_disk: false,
            validation_split: None,
            validation_seed: None,
            validate_every_n_epochs: None,
            validate_every_n_steps: None,
            max_validation_steps: None,
            prior_loss_weight: 1.0,
            network_module: None,
            network_dim: None,
            network_alpha: 1.0,
            network_dropout: None,
            network_args: Vec::new(),
            network_weights: None,
            dim_from_weights: false,
            network_train_unet_only: false,
            network_train_text_encoder_only: false,
            base_weights: Vec::new(),
            base_weights_multiplier: Vec::new(),
            optimizer_type: String::new(),
            optimizer_args: Vec::new(),
            learning_rate: None,
            unet_lr: None,
            text_encoder_lr: Vec::new(),
            lr_scheduler: "constant".into(),
            lr_scheduler_type: String::new(),
            lr_scheduler_args: Vec::new(),
            lr_warmup_steps: None,
            lr_decay_steps: None,
            lr_scheduler_num_cycles: 1,
            lr_scheduler_power: 1.0,
            lr_scheduler_timescale: None,
            lr_scheduler_min_lr_ratio: None,
            max_grad_norm: 1.0,
            scale_weight_norms: None,
            mixed_precision: "no".into(),
            gradient_checkpointing: false,
            stop_text_encoder_training: None,
            ema_decay: None,
            noise_offset: None,
            noise_offset_random_strength: false,
            adaptive_noise_scale: None,
            multires_noise_iterations: None,
            multires_noise_discount: 0.3,
            ip_noise_gamma: None,
            ip_noise_gamma_random_strength: false,
            min_timestep: None,
            max_timestep: None,
            loss_type: "l2".into(),
            huber_schedule: "snr".into(),
            huber_c: 0.1,
            huber_scale: 1.0,
            min_snr_gamma: None,
            debiased_estimation_loss: false,
            v_parameterization: false,
            scale_v_pred_loss_like_noise_pred: false,
            v_pred_like_loss: None,
            zero_terminal_snr: false,
            save_every_n_epochs: None,
            save_n_epoch_ratio: None,
            save_every_n_steps: None,
            save_last_n_epochs: None,
            save_last_n_steps: None,
            save_state: false,
            save_state_on_train_end: false,
            save_last_n_epochs_state: None,
            save_last_n_steps_state: None,
            resume: None,
            extend_run: false,
            sample_prompts: None,
            sample_every_n_epochs: None,
            sample_every_n_steps: None,
            sample_at_first: false,
            sample_sampler: None,
            logging_dir: None,
            log_with: None,
            log_prefix: None,
            log_tracker_name: None,
            inline: Inline::default(),
            save_precision: None,
            save_model_as: "safetensors".into(),
            no_metadata: false,
            training_comment: None,
            metadata_title: None,
            metadata_author: None,
            metadata_description: None,
            metadata_license: None,
            metadata_tags: None,
            metadata_usage_hint: None,
            metadata_thumbnail: None,
            metadata_merged_from: None,
            metadata_trigger_phrase: None,
            metadata_preprocessor: None,
            metadata_is_negative_embedding: None,
        }
    }
}

pub(crate) fn bad<T>(what: impl Into<String>) -> Result<T> {
    Err(Error::Config {
        place: "settings".into(),
        what: what.into(),
    })
}

fn unwritable(error: impl std::fmt::Display) -> Error {
    Error::Config {
        place: "settings".into(),
        what: error.to_string(),
    }
}

/// Settings as JSON.
pub(crate) fn to_json(settings: &impl Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(settings).map_err(unwritable)
}

impl TrainConfig {
    /// From settings that were read from files and the command line.
    ///
    /// # Errors
    /// [`Error::Refused`] for options that are not supported, [`Error::Config`] for
    /// values out of range.
    pub fn from_settings(settings: &Settings) -> Result<Self> {
        let mut table = settings.used()?;
        table.remove("config_file");
        let [epochs, steps] = LENGTH.map(|name| settings.origin(name));
        if epochs.is_some() && steps.is_some() {
            if epochs == Some("command line") && steps == epochs {
                return bad(
                    "max_train_epochs and max_train_steps both set the length of the run: leave one out",
                );
            }
            table.remove("max_train_steps");
        }
        let mut config: Self = table
            .try_into()
            .map_err(|e: toml::de::Error| Error::Config {
                place: "settings".into(),
                what: e.to_string().trim().replace('\n', ", "),
            })?;
        config.inline = settings.inline.clone();
        config.validate()?;
        Ok(config)
    }

    /// Every setting as JSON.
    pub(crate) fn to_value(&self) -> Result<serde_json::Value> {
        to_json(self)
    }

    /// The sampler of sample pictures, with sd-scripts' default.
    pub fn sample_sampler(&self) -> &str {
        self.sample_sampler.as_deref().unwrap_or("ddim")
    }

    /// Every setting as TOML that [`Settings::from_toml`] and sd-scripts'
    /// `--config_file` read.
    ///
    /// # Errors
    /// When a value cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(&self.table()?).map_err(unwritable)
    }

    pub(crate) fn table(&self) -> Result<toml::Table> {
        let mut table = toml::Table::try_from(self).map_err(unwritable)?;
        if self.max_train_epochs.is_some() {
            table.remove("max_train_steps");
        }
        Ok(table)
    }

    /// The settings that differ from the defaults, each as `name = value`, sorted by name.
    ///
    /// ```
    /// use lora_train::TrainConfig;
    /// let config = TrainConfig { network_alpha: 0.5, flip_aug: true, ..Default::default() };
    /// assert_eq!(config.differences()?, ["flip_aug = true", "network_alpha = 0.5"]);
    /// # Ok::<(), lora_train::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`to_toml`](Self::to_toml).
    pub fn differences(&self) -> Result<Vec<String>> {
        let defaults = Self::default().table()?;
        let own = self.table()?;
        let differs = |(name, value): &(&String, &toml::Value)| defaults.get(*name) != Some(value);
        let list = own.iter().filter(differs);
        Ok(list
            .map(|(name, value)| format!("{name} = {value}"))
            .collect())
    }

    /// Every effective setting as TOML, with a comment that says where it came from.
    ///
    /// # Errors
    /// As [`to_toml`](Self::to_toml).
    pub fn dump(&self, settings: &Settings) -> Result<String> {
        use std::fmt::Write;
        let mut text = String::new();
        for line in self.to_toml()?.lines() {
            let name = line.split(' ').next().unwrap_or("");
            let origin = settings.origin(name).unwrap_or("default");
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{line:<60} # {origin}");
        }
        let inline = [
            ("dataset config", &self.inline.dataset),
            ("sample prompts", &self.inline.samples),
        ];
        for (what, inside) in inline {
            let Some(inside) = inside else { continue };
            let _ = writeln!(
                text,
                "# {what} inside the config, which go before the options above:"
            );
            for line in inside.lines() {
                let _ = writeln!(text, "#   {line}");
            }
        }
        Ok(text)
    }

    /// Checks each value and the combinations that contradict each other.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Missing`].
    pub fn validate(&self) -> Result<()> {
        for (name, what, given) in [
            (
                "pretrained_model_name_or_path",
                "the checkpoint to train on",
                self.pretrained_model_name_or_path.is_some(),
            ),
            (
                "output_dir",
                "where the result goes",
                self.output_dir.is_some(),
            ),
        ] {
            if !given {
                return Err(Error::Missing { name, what });
            }
        }
        for (option, name) in [
            ("output_name", &self.output_name),
            ("log_prefix", &self.log_prefix),
            ("log_tracker_name", &self.log_tracker_name),
        ] {
            // They become parts of file names: a config must not write elsewhere.
            let name = name.as_deref().unwrap_or("-");
            if name.contains(['/', '\\', '\0']) || name == ".." {
                return bad(format!("{option}: {name:?} is no plain name"));
            }
        }
        if self.output_name.as_deref() == Some("") {
            return bad("output_name is empty; leave it out or give a name");
        }
        let sources = [
            self.train_data_dir.is_some(),
            self.dataset_config.is_some(),
            self.in_json.is_some(),
            self.inline.dataset.is_some(),
        ];
        if !sources.contains(&true) {
            return Err(Error::Missing {
                name: "train_data_dir",
                what: "the folder with pictures and captions",
            });
        }
        if self.train_batch_size == 0 || self.gradient_accumulation_steps == 0 {
            return bad("train_batch_size and gradient_accumulation_steps must be at least 1");
        }
        if self.max_train_epochs == Some(0)
            || (self.max_train_epochs.is_none() && self.max_train_steps == 0)
        {
            return bad("there is nothing to do: max_train_epochs or max_train_steps is 0");
        }
        if !matches!(self.max_token_length, None | Some(75 | 150 | 225)) {
            return bad("max_token_length: expected 75, 150 or 225");
        }
        if self.clip_skip == Some(0) {
            return bad("clip_skip: expected at least 1");
        }
        if self.save_model_as != "safetensors" {
            return bad(
                "save_model_as: only safetensors is supported; other formats are Python pickles",
            );
        }
        if self.network_train_unet_only && self.network_train_text_encoder_only {
            return bad(
                "network_train_unet_only and network_train_text_encoder_only exclude each other",
            );
        }
        if self.adaptive_noise_scale.is_some() && self.noise_offset.is_none() {
            return bad("adaptive_noise_scale needs noise_offset");
        }
        if self.scale_v_pred_loss_like_noise_pred && !self.v_parameterization {
            return bad("scale_v_pred_loss_like_noise_pred needs v_parameterization");
        }
        if self.v_pred_like_loss.unwrap_or(0.0) != 0.0 && self.v_parameterization {
            return bad("v_pred_like_loss cannot be combined with v_parameterization");
        }
        for (name, every) in [
            ("save_every_n_epochs", self.save_every_n_epochs),
            ("save_every_n_steps", self.save_every_n_steps),
            ("save_n_epoch_ratio", self.save_n_epoch_ratio),
            ("save_last_n_epochs", self.save_last_n_epochs),
            ("save_last_n_steps", self.save_last_n_steps),
            ("save_last_n_epochs_state", self.save_last_n_epochs_state),
            ("save_last_n_steps_state", self.save_last_n_steps_state),
        ] {
            if every == Some(0) {
                return bad(format!(
                    "{name}: expected at least 1; leave it out if it is not wanted"
                ));
            }
        }
        for (name, every) in [
            ("validate_every_n_epochs", self.validate_every_n_epochs),
            ("validate_every_n_steps", self.validate_every_n_steps),
        ] {
            if every == Some(0) {
                return bad(format!(
                    "{name}: expected at least 1; without validation_split there is no validation"
                ));
            }
        }
        if self.draws_samples() && self.sample_prompts.is_none() && self.inline.samples.is_none() {
            return bad("sample pictures need sample_prompts, a file of prompts");
        }
        if self.conditioning_data_dir.is_some() && !self.masked_loss {
            return bad(
                "conditioning_data_dir holds masks, but masked_loss is off: switch it on, or leave the folder out",
            );
        }
        if self.extend_run && self.resume.is_none() {
            return bad("extend_run needs resume, the state folder to go on from");
        }
        if self.dim_from_weights && self.network_weights.is_none() {
            return bad("dim_from_weights needs network_weights");
        }
        if self
            .ema_decay
            .is_some_and(|decay| !(0.0..1.0).contains(&decay))
        {
            return bad("ema_decay: expected a number from 0 to below 1, such as 0.99");
        }
        if self
            .log_with
            .as_deref()
            .is_some_and(|with| with != "tensorboard")
        {
            return bad("log_with: only tensorboard is supported; nothing is uploaded");
        }
        if self.log_with.is_some() && self.logging_dir.is_none() {
            return bad("log_with needs logging_dir");
        }
        if self.caches_latents() && (self.color_aug || self.random_crop) {
            return bad("cache_latents cannot be combined with color_aug or random_crop");
        }
        if self.base_weights_multiplier.len() > self.base_weights.len() {
            return bad(format!(
                "base_weights_multiplier has {} numbers for {} base_weights: give at most one for each",
                self.base_weights_multiplier.len(),
                self.base_weights.len()
            ));
        }
        for (name, value) in [
            ("min_snr_gamma", self.min_snr_gamma.unwrap_or(0.0)),
            ("scale_weight_norms", self.scale_weight_norms.unwrap_or(0.0)),
            ("max_grad_norm", self.max_grad_norm),
        ] {
            if value.is_nan() || value < 0.0 {
                return bad(format!("{name} {value}: expected 0, which is off, or more"));
            }
        }
        if !(self.huber_c > 0.0 && self.huber_scale > 0.0) {
            return bad("huber_c and huber_scale: expected numbers above 0");
        }
        let noise = self.noise();
        if noise.min_timestep >= TIMESTEPS
            || noise.max_timestep > TIMESTEPS
            || noise.min_timestep > noise.max_timestep
        {
            return bad(format!(
                "min_timestep {} and max_timestep {}: expected a range within 0 to 1000",
                noise.min_timestep, noise.max_timestep
            ));
        }
        let adapter = self.adapter()?;
        adapter.validate()?;
        let scalable = matches!(adapter.family, Family::Lora | Family::Loha | Family::Lokr);
        if self.scale_weight_norms.is_some()
            && (!scalable || adapter.weight_decompose || adapter.train_norm)
        {
            return bad("scale_weight_norms: this family does not support it; leave it out");
        }
        self.loss()?;
        self.save_dtype()?;
        self.dataset_options()?;
        Ok(())
    }

    /// Whether each picture gets one latent for the whole run; `cache_latents_to_disk` implies
    /// it, as in sd-scripts.
    pub fn caches_latents(&self) -> bool {
        self.cache_latents || self.cache_latents_to_disk
    }

    /// The largest norm of a layer's delta; 0 sets no limit, as in sd-scripts.
    pub(crate) fn max_norm(&self) -> Option<f64> {
        self.scale_weight_norms.filter(|norm| *norm > 0.0)
    }

    /// How the UNet's frozen weights are kept, by `mixed_precision`; as in the file for
    /// `no`, but in f32 where `base_weights` are merged into them.
    pub fn weight_storage(&self) -> WeightStorage {
        match self.mixed_precision.as_str() {
            "bf16" => WeightStorage::Bf16,
            "fp16" => WeightStorage::F16,
            _ if self.base_weights.is_empty() => WeightStorage::AsStored,
            _ => WeightStorage::F32,
        }
    }

    /// What the UNet's products with frozen weights are computed in: bf16 for
    /// `mixed_precision` `bf16`, else f32.
    pub fn compute(&self) -> Compute {
        match self.mixed_precision.as_str() {
            "bf16" => Compute::Bf16,
            _ => Compute::F32,
        }
    }

    /// Whether the optimizer finds its own learning rate.
    pub fn adaptive(&self) -> bool {
        let name = self.optimizer_type.to_lowercase();
        name.starts_with("prodigy") || name.starts_with("dadapt")
    }

    /// Whether a dataset config, as a file or inside a GUI's config, describes the pictures.
    pub(crate) fn has_dataset_config(&self) -> bool {
        self.dataset_config.is_some() || self.inline.dataset.is_some()
    }

    /// The learning rate, with its default.
    pub fn learning_rate(&self) -> f64 {
        self.learning_rate
            .unwrap_or(if self.adaptive() { 1.0 } else { 1e-4 })
    }

    /// `network_dim`, with its default.
    pub fn network_rank(&self) -> usize {
        self.network_dim.unwrap_or(4)
    }

    /// The UNet's learning rate.
    pub fn unet_learning_rate(&self) -> f64 {
        self.unet_lr.unwrap_or(self.learning_rate())
    }

    /// The text encoder's learning rate; of a list the first, as in sd-scripts.
    pub fn text_learning_rate(&self) -> f64 {
        self.text_encoder_lr
            .first()
            .copied()
            .unwrap_or(self.learning_rate())
    }

    /// The options inside `network_args`, and what `network_module` makes of them.
    ///
    /// # Errors
    /// [`Error::Config`] for one that is not known.
    pub fn network(&self) -> Result<NetworkArgs> {
        NetworkArgs::parse(self)
    }

    /// What kind of adapter to create.
    ///
    /// # Errors
    /// [`Error::Config`] for bad `network_args`.
    pub fn adapter(&self) -> Result<AdapterConfig> {
        let args = self.network()?;
        let rank = self.network_rank();
        Ok(AdapterConfig {
            rank,
            alpha: self.network_alpha,
            dropout: Dropout {
                neuron: self.network_dropout.unwrap_or(args.adapter.dropout.neuron),
                ..args.adapter.dropout
            },
            ..args.adapter
        })
    }

    /// Which layers get an adapter: of the UNet, and of the text encoder; `None` for
    /// none.
    ///
    /// # Errors
    /// [`Error::Config`] for bad `network_args`.
    pub fn targets(&self) -> Result<(Option<Targets>, Option<Targets>)> {
        let (unet, text) = self.network()?.targets;
        Ok((
            unet.filter(|_| !self.network_train_text_encoder_only),
            text.filter(|_| !self.network_train_unet_only),
        ))
    }

    /// How noise is made.
    pub fn noise(&self) -> NoiseConfig {
        NoiseConfig {
            noise_offset: self.noise_offset.unwrap_or(0.0),
            noise_offset_random_strength: self.noise_offset_random_strength,
            adaptive_noise_scale: self.adaptive_noise_scale.unwrap_or(0.0),
            multires_noise_iterations: self.multires_noise_iterations.unwrap_or(0),
            multires_noise_discount: self.multires_noise_discount,
            ip_noise_gamma: self.ip_noise_gamma.unwrap_or(0.0),
            ip_noise_gamma_random_strength: self.ip_noise_gamma_random_strength,
            min_timestep: self.min_timestep.unwrap_or(0),
            max_timestep: self.max_timestep.unwrap_or(TIMESTEPS),
        }
    }

    /// How the loss is computed.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown name.
    pub fn loss(&self) -> Result<LossConfig> {
        Ok(LossConfig {
            loss_type: match self.loss_type.as_str() {
                "l2" => LossType::L2,
                "l1" => LossType::L1,
                "huber" => LossType::Huber,
                "smooth_l1" => LossType::SmoothL1,
                other => {
                    return bad(format!(
                        "loss_type {other:?}: expected l1, l2, huber or smooth_l1"
                    ));
                }
            },
            huber_schedule: match self.huber_schedule.as_str() {
                "constant" => HuberSchedule::Constant,
                "exponential" => HuberSchedule::Exponential,
                "snr" => HuberSchedule::Snr,
                other => {
                    return bad(format!(
                        "huber_schedule {other:?}: expected constant, exponential or snr"
                    ));
                }
            },
            huber_c: self.huber_c,
            huber_scale: self.huber_scale,
            v_parameterization: self.v_parameterization,
            min_snr_gamma: self.min_snr_gamma.unwrap_or(0.0),
            debiased_estimation_loss: self.debiased_estimation_loss,
            scale_v_pred_loss_like_noise_pred: self.scale_v_pred_loss_like_noise_pred,
            v_pred_like_loss: self.v_pred_like_loss.unwrap_or(0.0),
        })
    }

    /// The noise schedule of training.
    pub fn schedule(&self) -> NoiseSchedule {
        let schedule = NoiseSchedule::sd15();
        if self.zero_terminal_snr {
            schedule.zero_terminal_snr()
        } else {
            schedule
        }
    }

    /// How captions are encoded.
    pub fn text(&self) -> TextConfig {
        TextConfig {
            chunks: self.max_token_length.unwrap_or(75).div_ceil(75),
            clip_skip: self.clip_skip.unwrap_or(1),
            weighted: self.weighted_captions,
        }
    }

    /// Dtype of saved files.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown name.
    pub fn save_dtype(&self) -> Result<DType> {
        match self.save_precision.as_deref() {
            None | Some("float") => Ok(DType::F32),
            Some("fp16") => Ok(DType::F16),
            Some("bf16") => Ok(DType::BF16),
            Some(other) => bad(format!(
                "save_precision {other:?}: expected float, fp16 or bf16"
            )),
        }
    }

    /// The result's name without extension.
    pub fn name(&self) -> &str {
        self.output_name.as_deref().unwrap_or("last")
    }

    /// Where results go.
    pub fn output_dir(&self) -> &Path {
        self.output_dir.as_deref().unwrap_or(Path::new("."))
    }

    /// The dataset options that are not paths.
    ///
    /// # Errors
    /// [`Error::Config`] for values that cannot be read; [`Error::Data`] for values out
    /// of range, unless there is a dataset config, which is checked when it is read.
    pub fn dataset_options(&self) -> Result<DatasetConfig> {
        let extension = self
            .caption_extention
            .clone()
            .or_else(|| self.caption_extension.clone());
        let options = DatasetConfig {
            resolution: parse_resolution(&self.resolution)?,
            batch_size: self.train_batch_size,
            enable_bucket: self.enable_bucket,
            min_bucket_reso: self.min_bucket_reso,
            max_bucket_reso: self.max_bucket_reso,
            bucket_reso_steps: self.bucket_reso_steps,
            bucket_no_upscale: self.bucket_no_upscale,
            resize_interpolation: self.interpolation()?,
            validation_split: self.validation_split.unwrap_or(0.0),
            validation_seed: self.validation_seed,
            subset: SubsetConfig {
                num_repeats: self.dataset_repeats,
                caption_extension: extension,
                captions: self.captions(),
                flip_aug: self.flip_aug,
                color_aug: self.color_aug,
                random_crop: self.random_crop,
                face_crop_aug_range: self.face_crop()?,
                alpha_mask: self.alpha_mask,
                conditioning_data_dir: self.conditioning_data_dir.clone(),
                ..SubsetConfig::default()
            },
            ..DatasetConfig::default()
        };
        // Of a dataset config, which may set these anew, each dataset is checked.
        if !self.has_dataset_config() {
            options.validate()?;
        }
        Ok(options)
    }

    fn interpolation(&self) -> Result<Option<Interpolation>> {
        let Some(name) = &self.resize_interpolation else {
            return Ok(None);
        };
        let value = serde_json::Value::from(name.as_str());
        match serde_json::from_value(value) {
            Ok(filter) => Ok(Some(filter)),
            Err(e) => bad(format!("resize_interpolation: {e}")),
        }
    }

    fn face_crop(&self) -> Result<Option<(f64, f64)>> {
        let Some(text) = &self.face_crop_aug_range else {
            return Ok(None);
        };
        let pair = text
            .split_once(',')
            .and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
        match pair {
            Some(pair) => Ok(Some(pair)),
            None => bad(format!(
                "face_crop_aug_range {text:?}: expected two numbers such as 2.0,4.0"
            )),
        }
    }

    fn captions(&self) -> CaptionConfig {
        CaptionConfig {
            shuffle_caption: self.shuffle_caption,
            caption_separator: self.caption_separator.clone(),
            keep_tokens: self.keep_tokens,
            keep_tokens_separator: self.keep_tokens_separator.clone(),
            secondary_separator: self.secondary_separator.clone(),
            enable_wildcard: self.enable_wildcard,
            caption_prefix: self.caption_prefix.clone(),
            caption_suffix: self.caption_suffix.clone(),
            caption_dropout_rate: self.caption_dropout_rate,
            caption_dropout_every_n_epochs: self.caption_dropout_every_n_epochs,
            caption_tag_dropout_rate: self.caption_tag_dropout_rate,
            token_warmup_min: self.token_warmup_min,
            token_warmup_step: self.token_warmup_step,
        }
    }
}

/// `512` or `768,512`, width first.
fn parse_resolution(text: &str) -> Result<Size> {
    let numbers: Option<Vec<u32>> = text.split(',').map(|n| n.trim().parse().ok()).collect();
    match numbers.as_deref() {
        Some([side]) if *side > 0 => Ok(Size {
            width: *side,
            height: *side,
        }),
        Some([width, height]) if *width > 0 && *height > 0 => Ok(Size {
            width: *width,
            height: *height,
        }),
        _ => bad(format!(
            "resolution {text:?}: expected a size such as 512 or 768,512"
        )),
    }
}
