//! kohya_ss: a flat JSON object of all GUI fields.

use serde_json::{Map, Value};

use super::{Form, Import, count_images, python_text, to_toml};
use crate::options::{Kind, OPTIONS, Settings};
use crate::{Error, Result};

/// Fields that become `network_args`, and those that are said even when they are 0.
const STANDARD: &[&str] = &[
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
    "block_lr_zero_threshold",
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
    "rank_dropout",
    "module_dropout",
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
];
const LYCORIS: &[&str] = &[
    "conv_dim",
    "conv_alpha",
    "use_tucker",
    "rank_dropout",
    "bypass_mode",
    "dora_wd",
    "module_dropout",
    "use_scalar",
    "rank_dropout_scale",
    "train_norm",
];

/// Fields of 0 that mean 0 here, while the GUI would have dropped them and trained with
/// the trainer's default.
const ZERO_COUNTS: &[(&str, &str)] = &[
    ("max_grad_norm", "1.0"),
    ("prior_loss_weight", "1.0"),
    ("learning_rate", "2e-6"),
];

/// Fields without a counterpart, and why they are of no consequence.
const NO_COUNTERPART: &[(&str, &str)] = &[
    ("noise_offset_type", "chooses which noise fields count"),
    ("model_list", "a list of known models"),
    ("no_token_padding", "not a trainer option"),
    ("wandb_run_name", "nothing is uploaded"),
    ("wandb_api_key", "nothing is uploaded"),
    ("lowvram", "memory is managed automatically"),
    (
        "num_cpu_threads_per_process",
        "threads are chosen automatically",
    ),
    ("num_processes", "one process trains"),
    ("num_machines", "one process trains"),
    ("multi_gpu", "one process trains"),
    ("gpu_ids", "choose with --device"),
    ("main_process_port", "one process trains"),
    ("dynamo_mode", "there is nothing to compile"),
    ("dynamo_use_fullgraph", "there is nothing to compile"),
    ("dynamo_use_dynamic", "there is nothing to compile"),
    ("dynamo_backend", "there is nothing to compile"),
    ("extra_accelerate_launch_args", "there is no launcher"),
    ("train_inpainting", "not a trainer option"),
];

/// Fields that concern other models: ignored unless switched on.
const OTHER_MODELS: &[&str] = &[
    "sdxl",
    "flux1_",
    "sd3_",
    "t5xxl",
    "clip_l",
    "clip_g",
    "hunyuan_",
    "anima_",
    "lumina_",
    "ae",
    "single_",
    "double_",
    "img_",
    "txt_",
    "in_dims",
    "train_double",
    "train_single",
    "model_type",
    "discrete_flow",
    "model_prediction_type",
    "timestep_sampling",
    "split_",
    "train_blocks",
    "enable_all_linear",
    "guidance_scale",
    "mem_eff_save",
    "apply_t5",
    "train_t5xxl",
    "cpu_offload_checkpointing",
    "blocks_to_swap",
    "show_timesteps",
    "logit_",
    "mode_scale",
    "pos_emb",
    "save_clip",
    "save_t5xxl",
    "weighting_scheme",
    "train_lora_ggpo",
    "ggpo_",
];

struct Reader<'a> {
    map: &'a Map<String, Value>,
    place: &'a str,
    import: Import,
    done: Vec<&'a str>,
}

pub(super) fn import(map: &Map<String, Value>, place: &str) -> Result<Import> {
    let mut reader = Reader {
        map,
        place,
        import: Import {
            form: Form::KohyaSs,
            ..Import::default()
        },
        done: Vec::new(),
    };
    reader.network()?;
    reader.learning_rates()?;
    reader.noise()?;
    reader.length()?;
    reader.others()?;
    reader.additional()?;
    Ok(reader.import)
}

/// Empty, off or absent.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(s) => s.trim().is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

fn is_zero(value: &Value) -> bool {
    number(value) == Some(0.0)
}

/// Numbers are often kept as text in older files.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(n) => n.as_f64(),
        Value::String(s) => s.trim().parse().ok(),
        _ => None,
    }
}

impl<'a> Reader<'a> {
    /// The field, unless it is empty; it counts as read.
    fn get(&mut self, key: &'a str) -> Option<&'a Value> {
        self.done.push(key);
        self.map.get(key).filter(|value| !is_empty(value))
    }

    /// The field, unless it is empty or 0.
    fn given(&mut self, key: &'a str) -> Option<&'a Value> {
        self.get(key).filter(|value| !is_zero(value))
    }

    fn number(&mut self, key: &'a str) -> f64 {
        self.get(key).and_then(number).unwrap_or(0.0)
    }

    fn text(&mut self, key: &'a str) -> &'a str {
        self.get(key).and_then(Value::as_str).unwrap_or("")
    }

    fn set(&mut self, name: &str, value: toml::Value, key: &str) -> Result<()> {
        let origin = format!("{}: {key}", self.place);
        self.import.settings.set(name, value, &origin)
    }

    fn fail<T>(&self, what: String) -> Result<T> {
        Err(Error::Config {
            place: self.place.to_string(),
            what,
        })
    }

    fn network(&mut self) -> Result<()> {
        let kind = match self.text("LoRA_type") {
            "" => "Standard",
            "LoCon" => "LyCORIS/LoCon",
            kind => kind,
        };
        let (module, algo) = match kind {
            "Standard" | "Kohya LoCon" => ("networks.lora", None),
            "LyCORIS/LoCon" => ("lycoris.kohya", Some("locon")),
            "LyCORIS/LoHa" => ("lycoris.kohya", Some("loha")),
            "LyCORIS/LoKr" => ("lycoris.kohya", Some("lokr")),
            "LyCORIS/iA3" => ("lycoris.kohya", Some("ia3")),
            "LyCORIS/GLoRA" => ("lycoris.kohya", Some("glora")),
            "LyCORIS/BOFT" => ("lycoris.kohya", Some("boft")),
            "LyCORIS/Diag-OFT" => ("lycoris.kohya", Some("diag-oft")),
            "LyCORIS/Native Fine-Tuning" => ("lycoris.kohya", Some("full")),
            other => {
                return self.fail(format!(
                    "LoRA_type {other:?} is not supported; choose Standard, Kohya LoCon or one of LyCORIS"
                ));
            }
        };
        self.set("network_module", module.into(), "LoRA_type")?;
        let mut args = Vec::new();
        let conv = ["conv_dim", "conv_alpha"];
        match algo {
            None => {
                if kind == "Kohya LoCon" {
                    for key in conv {
                        if let Some(value) = self.get(key) {
                            args.push(format!("{key}={}", python_text(value)));
                        }
                    }
                }
                for key in STANDARD {
                    if let Some(value) = self.given(key) {
                        args.push(format!("{key}={}", python_text(value)));
                    }
                }
            }
            Some(algo) => {
                if let Some(preset) = self.get("LyCORIS_preset") {
                    args.push(format!("preset={}", python_text(preset)));
                }
                let own: &[&str] = match algo {
                    "lokr" => &["factor", "use_cp", "decompose_both"],
                    "ia3" => &["train_on_input"],
                    "diag-oft" | "boft" => &["constrain", "rescaled"],
                    _ => &[],
                };
                for key in LYCORIS.iter().chain(own) {
                    let Some(value) = self.given(key) else {
                        continue;
                    };
                    let name = if *key == "constrain" {
                        "constraint"
                    } else {
                        key
                    };
                    args.push(format!("{name}={}", python_text(value)));
                }
                args.push(format!("algo={algo}"));
            }
        }
        // What belongs to other kinds of networks is in every file.
        self.done.extend(STANDARD.iter().chain(LYCORIS).chain(&[
            "factor",
            "use_cp",
            "decompose_both",
            "train_on_input",
            "constrain",
            "rescaled",
            "unit",
            "LyCORIS_preset",
        ]));
        let args = args.into_iter().map(toml::Value::String).collect();
        self.set("network_args", toml::Value::Array(args), "LoRA_type")
    }

    fn learning_rates(&mut self) -> Result<()> {
        let (unet, text) = (self.number("unet_lr"), self.number("text_encoder_lr"));
        let given = |reader: &Self, key: &str| reader.map.contains_key(key);
        if unet != 0.0 {
            self.set("unet_lr", unet.into(), "unet_lr")?;
        } else if text != 0.0 && given(self, "unet_lr") {
            self.set("network_train_text_encoder_only", true.into(), "unet_lr")?;
        }
        if text != 0.0 {
            // The GUI writes one for each text encoder of larger models.
            let both = toml::Value::Array(vec![text.into(), text.into()]);
            self.set("text_encoder_lr", both, "text_encoder_lr")?;
        } else if unet != 0.0 && given(self, "text_encoder_lr") {
            self.set("network_train_unet_only", true.into(), "text_encoder_lr")?;
        }
        let steps = self.number("lr_warmup_steps");
        let percent = self.number("lr_warmup");
        if steps > 0.0 {
            self.set(
                "lr_warmup_steps",
                toml::Value::Integer(steps as i64),
                "lr_warmup_steps",
            )?;
        } else if percent > 0.0 {
            self.set("lr_warmup_steps", (percent / 100.0).into(), "lr_warmup")?;
        }
        Ok(())
    }

    fn noise(&mut self) -> Result<()> {
        let multires = self.text("noise_offset_type") == "Multires";
        let (used, other): (&[&str], &[&str]) = if multires {
            (
                &["multires_noise_iterations", "multires_noise_discount"],
                &[
                    "noise_offset",
                    "adaptive_noise_scale",
                    "noise_offset_random_strength",
                ],
            )
        } else {
            (
                &[
                    "noise_offset",
                    "adaptive_noise_scale",
                    "noise_offset_random_strength",
                ],
                &["multires_noise_iterations", "multires_noise_discount"],
            )
        };
        self.done.extend(other);
        for key in used {
            if let Some(value) = self.given(key) {
                self.plain(key, key, value)?;
            }
        }
        Ok(())
    }

    /// `epoch` only counts when neither steps nor epochs are given; the GUI turns it into
    /// a number of steps then.
    fn length(&mut self) -> Result<()> {
        let (epochs, steps) = (
            self.number("max_train_epochs"),
            self.number("max_train_steps"),
        );
        let epoch = self.number("epoch");
        if epochs > 0.0 {
            self.set(
                "max_train_epochs",
                toml::Value::Integer(epochs as i64),
                "max_train_epochs",
            )?;
        }
        if steps > 0.0 {
            self.set(
                "max_train_steps",
                toml::Value::Integer(steps as i64),
                "max_train_steps",
            )?;
            if epoch > 0.0 && epochs == 0.0 {
                self.import.changed.push(format!(
                    "epoch {epoch}: max_train_steps {steps} decides, as in kohya_ss"
                ));
            }
            return Ok(());
        }
        if epochs > 0.0 || epoch == 0.0 {
            return Ok(());
        }
        let folder = self.map.get("train_data_dir").and_then(Value::as_str);
        let Some(folder) = folder.filter(|f| !f.is_empty()) else {
            // A dataset config: the trainer itself can count.
            return self.set(
                "max_train_epochs",
                toml::Value::Integer(epoch as i64),
                "epoch",
            );
        };
        let positive = |key: &str| {
            let n = self.map.get(key).and_then(number).unwrap_or(1.0);
            if n > 0.0 { n } else { 1.0 }
        };
        let batch = positive("train_batch_size");
        let accumulation = positive("gradient_accumulation_steps");
        let has_reg = self.map.get("reg_data_dir").is_some_and(|v| !is_empty(v));
        let reg = if has_reg { 2.0 } else { 1.0 };
        let images = count_images(folder, batch as usize)? as f64;
        let total = (images / batch / accumulation * epoch * reg).ceil();
        self.import.changed.push(format!(
            "epoch {epoch}: becomes max_train_steps {total}, as kohya_ss computes it from {images} pictures a pass"
        ));
        self.set(
            "max_train_steps",
            toml::Value::Integer(total as i64),
            "epoch",
        )
    }

    fn others(&mut self) -> Result<()> {
        for (key, value) in self.map {
            if self.done.contains(&key.as_str()) {
                continue;
            }
            if let Some((_, default)) = ZERO_COUNTS.iter().find(|(name, _)| name == key)
                && is_zero(value)
            {
                self.import.changed.push(format!(
                    "{key} 0: kept; kohya_ss would drop it and train with {default}"
                ));
                self.plain(key, key, value)?;
                continue;
            }
            if is_empty(value) || (is_zero(value) && key != "network_alpha" && key != "seed") {
                continue;
            }
            match key.as_str() {
                "max_resolution" => self.plain("resolution", key, value)?,
                "optimizer" => self.plain("optimizer_type", key, value)?,
                "lora_network_weights" => self.plain("network_weights", key, value)?,
                "optimizer_args" | "lr_scheduler_args" => self.arguments(key, value)?,
                "xformers" => {} // a choice of attention code: changes speed only
                "use_8bit_adam" => self.set("optimizer_type", "AdamW8bit".into(), key)?,
                "sample_prompts" => {
                    self.import.settings.inline.samples = value.as_str().map(str::to_string);
                }
                "sample_sampler" if !self.samples() => {}
                "log_with" if matches!(value.as_str(), Some("wandb" | "all")) => {
                    self.import.left_out.push(
                        "log_with: nothing is uploaded; logging_dir alone makes TensorBoard files"
                            .into(),
                    )
                }
                "stop_text_encoder_training" => {
                    let percent = number(value).unwrap_or(0.0);
                    self.import.changed.push(format!(
                        "{key} {percent}: taken as percent of the run; kohya_ss does not pass it on"
                    ));
                    self.set(key, (percent / 100.0).into(), key)?;
                }
                "additional_parameters" => {}
                "network_alpha" if is_zero(value) => {
                    self.import.changed.push(
                        "network_alpha 0: kept, it means the dim; kohya_ss would drop it and train with 1"
                            .into(),
                    );
                    self.plain(key, key, value)?;
                }
                "seed" if is_zero(value) => self
                    .import
                    .changed
                    .push("seed 0: a random one, as in kohya_ss".into()),
                _ if NO_COUNTERPART.iter().any(|(name, _)| name == key) => {}
                _ if OPTIONS.iter().any(|option| option.name == key) => {
                    self.plain(key, key, value)?;
                }
                _ if OTHER_MODELS.iter().any(|prefix| key.starts_with(prefix)) => self
                    .import
                    .left_out
                    .push(format!("{key}: belongs to other models")),
                _ => {
                    return self.fail(format!(
                        "unknown field {key:?}; remove it if it is not needed"
                    ));
                }
            }
        }
        Ok(())
    }

    fn samples(&self) -> bool {
        self.map.get("sample_prompts").is_some_and(|v| !is_empty(v))
    }

    /// A field whose value is the option's, after the kinds are brought together.
    fn plain(&mut self, name: &str, key: &str, value: &Value) -> Result<()> {
        let kind = OPTIONS
            .iter()
            .find(|option| option.name == name)
            .map(|option| option.kind);
        let parsed = match (kind, value) {
            (Some(Kind::Integer), v) => number(v).map(|n| toml::Value::Integer(n as i64)),
            (Some(Kind::Number), v) => number(v).map(toml::Value::Float),
            (Some(Kind::Text), v @ Value::Number(_)) => Some(toml::Value::String(python_text(v))),
            (Some(Kind::Switch), Value::String(s)) => {
                Some(toml::Value::Boolean(s.eq_ignore_ascii_case("true")))
            }
            (_, v) => to_toml(v),
        };
        match parsed {
            Some(value) => self.set(name, value, key),
            None => self.fail(format!("{key}: {value} cannot be read")),
        }
    }

    /// `"weight_decay=0.1" "betas=0.9,0.99"`: quotes go, blanks separate.
    fn arguments(&mut self, key: &str, value: &Value) -> Result<()> {
        let Some(text) = value.as_str() else {
            return self.fail(format!("{key}: expected text, got {value}"));
        };
        // A blank after a comma belongs to the value: `betas=(0.9, 0.99)`.
        let joined = text.replace(['"', '\''], "").replace(", ", ",");
        let words = joined
            .split_whitespace()
            .map(|word| toml::Value::String(word.to_string()))
            .collect();
        self.set(key, toml::Value::Array(words), key)
    }

    /// Command-line words on top of everything.
    fn additional(&mut self) -> Result<()> {
        let text = self.text("additional_parameters");
        let words: Vec<String> = text.split_whitespace().map(str::to_string).collect();
        let (settings, rest) = Settings::from_arguments(&words)?;
        if let Some(word) = rest.first() {
            return self.fail(format!("additional_parameters: unexpected {word:?}"));
        }
        self.import.settings.overlay(settings);
        Ok(())
    }
}
