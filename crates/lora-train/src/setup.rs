//! The steps before training: each checks one thing and builds it.

use std::path::Path;

use candle_core::Device;
use lora_core::{Adaptable, AdapterSet, Targets};
use lora_data::{
    ConfigFile, ConfigSyntax, DataConfig, Dataset, DatasetConfig, Finding, Place, Purpose, Streams,
};
use lora_optim::kohya::{GroupOptions, KohyaOptimizer, KohyaScheduler, block_index};
use lora_optim::schedule::Constant;
use lora_optim::{LrSchedule, OnHost, Optimizer, ParamGroup};
use lora_sd15::Checkpoint;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::config::{Steps, TrainConfig, to_json};
use crate::samples::{SamplePrompt, read_sample_prompts};
use crate::{Error, Plan, Result};

/// Lists pictures and captions; also returns what the dataset config noticed.
pub(crate) fn dataset(config: &TrainConfig) -> Result<(Dataset, Vec<String>)> {
    let run = DataConfig {
        prior_loss_weight: config.prior_loss_weight as f32,
        masked_loss: config.masked_loss,
        ..DataConfig::default()
    };
    let options = config.dataset_options()?;
    let inline = Path::new("dataset part of the config");
    let file = match (&config.inline.dataset, &config.dataset_config) {
        (Some(text), _) => {
            let file = ConfigFile::parse(text, ConfigSyntax::Toml, inline, &options, &run)?;
            Some((file, inline))
        }
        (None, Some(path)) => Some((ConfigFile::read(path, &options, &run)?, path.as_path())),
        (None, None) => None,
    };
    if let Some((file, place)) = file {
        let mut noticed: Vec<String> = file.findings.iter().map(Finding::to_string).collect();
        let overridden = overridden(&options, &file.config)?;
        noticed.extend(
            overridden
                .into_iter()
                .map(|what| format!("{}: {what}", place.display())),
        );
        return Ok((Dataset::load(file.config)?, noticed));
    }
    if let Some(json) = &config.in_json {
        let mut subset = options.subset.clone();
        subset.metadata_file = Some(json.clone());
        subset.image_dir = config.train_data_dir.clone();
        let options = DatasetConfig {
            subsets: vec![subset],
            ..options
        };
        return Ok((
            Dataset::load(DataConfig {
                datasets: vec![options],
                ..run
            })?,
            Vec::new(),
        ));
    }
    let Some(train) = &config.train_data_dir else {
        return Err(Error::Missing {
            name: "train_data_dir",
            what: "the folder with pictures and captions",
        });
    };
    Ok((
        Dataset::from_folders(train, config.reg_data_dir.as_deref(), &options, &run)?,
        Vec::new(),
    ))
}

/// The options beside a dataset config that it sets otherwise everywhere, in words.
fn overridden(options: &DatasetConfig, file: &DataConfig) -> Result<Vec<String>> {
    let default = TrainConfig::default().dataset_options()?;
    let mut levels = vec![(
        flat(options)?,
        flat(&default)?,
        file.datasets.iter().map(flat).collect::<Result<Vec<_>>>()?,
    )];
    let subsets = file.datasets.iter().flat_map(|dataset| &dataset.subsets);
    levels.push((
        flat(&options.subset)?,
        flat(&default.subset)?,
        subsets.map(flat).collect::<Result<Vec<_>>>()?,
    ));
    let mut list = Vec::new();
    for (given, default, set) in levels {
        for (key, value) in &given {
            let differs = |other: &Map<String, Value>| other.get(key) != Some(value);
            if let Some(first) = set.first()
                && differs(&default)
                && set.iter().all(differs)
            {
                let name = match key.as_str() {
                    "batch_size" => "train_batch_size",
                    "num_repeats" => "dataset_repeats",
                    name => name,
                };
                let other = first.get(key).unwrap_or(&Value::Null);
                list.push(format!(
                    "{name} {value} has no effect beside it: it says {other}"
                ));
            }
        }
    }
    Ok(list)
}

/// Options by name, those of captions among them.
fn flat(options: &impl Serialize) -> Result<Map<String, Value>> {
    let Value::Object(mut map) = to_json(options)? else {
        return Ok(Map::new());
    };
    map.retain(|key, _| !["subset", "subsets", "conditioning_data_dir"].contains(&key.as_str()));
    if let Some(Value::Object(captions)) = map.remove("captions") {
        map.extend(captions);
    }
    Ok(map)
}

/// The prompts to draw while training; each is checked now.
pub(crate) fn samples(config: &TrainConfig) -> Result<Vec<SamplePrompt>> {
    let sampler = config.sample_sampler();
    match (&config.inline.samples, &config.sample_prompts) {
        (Some(text), _) => text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| SamplePrompt::from_line(line, sampler))
            .collect(),
        (None, Some(path)) => read_sample_prompts(path, sampler),
        (None, None) => Ok(Vec::new()),
    }
}

/// Opens and checks the checkpoint.
pub(crate) fn checkpoint(config: &TrainConfig) -> Result<Checkpoint> {
    let Some(path) = &config.pretrained_model_name_or_path else {
        return Err(Error::Missing {
            name: "pretrained_model_name_or_path",
            what: "the checkpoint to train on",
        });
    };
    let checkpoint = Checkpoint::open(path)?;
    Ok(match &config.vae {
        Some(vae) => checkpoint.with_vae(vae)?,
        None => checkpoint,
    })
}

/// The learning-rate schedule for the whole run.
pub(crate) fn lr_schedule(config: &TrainConfig, plan: &Plan) -> Result<Box<dyn LrSchedule>> {
    if kohya_optimizer(config).has_own_schedule()? {
        return Ok(Box::new(Constant));
    }
    // Shares become counts here: a share of 1.0 is the whole run, a count of 1 one step.
    let steps = |s: Option<Steps>| s.map_or(0.0, |s| s.of(plan.total_steps) as f64);
    let schedule = KohyaScheduler {
        lr_scheduler: config.lr_scheduler.clone(),
        lr_scheduler_type: config.lr_scheduler_type.clone(),
        lr_scheduler_args: config.lr_scheduler_args.clone(),
        max_train_steps: plan.total_steps as u64,
        lr_warmup_steps: steps(config.lr_warmup_steps),
        lr_decay_steps: steps(config.lr_decay_steps),
        lr_scheduler_num_cycles: f64::from(config.lr_scheduler_num_cycles),
        lr_scheduler_power: config.lr_scheduler_power,
        lr_scheduler_timescale: config.lr_scheduler_timescale.map(|t| t as f64),
        lr_scheduler_min_lr_ratio: config.lr_scheduler_min_lr_ratio,
        learning_rate: config.learning_rate(),
    };
    Ok(schedule.build()?)
}

/// Merges `base_weights` into the model.
pub(crate) fn merge_base_weights(
    config: &TrainConfig,
    unet: &mut dyn Adaptable,
    text_encoder: &mut dyn Adaptable,
    device: &Device,
) -> Result<()> {
    for (i, path) in config.base_weights.iter().enumerate() {
        let multiplier = config
            .base_weights_multiplier
            .get(i)
            .copied()
            .unwrap_or(1.0);
        let set = AdapterSet::load(path, device)?;
        set.merge(unet, multiplier)?.strict()?;
        set.merge(text_encoder, multiplier)?.strict()?;
    }
    Ok(())
}

/// Creates the adapters, loads `network_weights` into them and attaches them.
pub(crate) fn adapters(
    config: &TrainConfig,
    unet: &mut dyn Adaptable,
    text_encoder: &mut dyn Adaptable,
    streams: Streams,
    warn: &mut dyn FnMut(&str),
) -> Result<AdapterSet> {
    if let (true, Some(path)) = (config.dim_from_weights, &config.network_weights) {
        let mut set = AdapterSet::load(path, &Device::Cpu)?.trainable()?;
        let unet_only = config.network_train_unet_only;
        let text_only = config.network_train_text_encoder_only;
        set.retain(|name| match name.starts_with("lora_te") {
            true => !unet_only,
            false => !text_only,
        });
        set.attach(unet, 1.0)?.strict()?;
        set.attach(text_encoder, 1.0)?.strict()?;
        return Ok(set);
    }
    let options = config.adapter()?;
    let rng = |item| streams.stream(Purpose::ADAPTER_INIT, Place::item(item));
    let (unet_targets, text_targets) = config.targets()?;
    let parts: [(Option<Targets>, &mut dyn Adaptable, u64); 2] =
        [(unet_targets, unet, 0), (text_targets, text_encoder, 1)];
    let mut set: Option<AdapterSet> = None;
    for (targets, model, item) in parts {
        let Some(targets) = targets else { continue };
        let part = AdapterSet::create(model, &options, &targets, &mut rng(item))?;
        match &mut set {
            None => set = Some(part),
            Some(set) => set.extend(part),
        }
    }
    let mut set = set.unwrap_or_default();
    if let Some(weights) = config
        .network()?
        .groups
        .block_weights
        .filter(|w| w.is_set())
    {
        // A block with weight 0 gets no adapters at all.
        let weights = weights.all();
        set.retain(|name| block_index(name).and_then(|i| weights.get(i)) != Some(&0.0));
    }
    if let Some(path) = &config.network_weights {
        load_weights(&mut set, path, config.network_alpha, warn)?;
    }
    set.attach(unet, 1.0)?.strict()?;
    set.attach(text_encoder, 1.0)?.strict()?;
    Ok(set)
}

/// LoKr whose second factor is not decomposed ignores alpha; people then wonder why nothing
/// changes.
pub(crate) fn alpha_without_effect(adapters: &AdapterSet) -> Option<String> {
    let full = |adapter: &dyn lora_core::Adapter| {
        let names: Vec<&str> = adapter.factors().iter().map(|(name, _)| *name).collect();
        names.contains(&"lokr_w1") && names.contains(&"lokr_w2")
    };
    let count = adapters.iter().filter(|(_, a)| full(a.as_ref())).count();
    (count > 0).then(|| {
        format!(
            "LoKr: alpha has no effect on {count} of {} layers, whose factors are both full at this dim",
            adapters.len()
        )
    })
}

/// Puts a file's adapters in place of the fresh ones.
fn load_weights(
    set: &mut AdapterSet,
    path: &Path,
    alpha: f64,
    warn: &mut dyn FnMut(&str),
) -> Result<()> {
    let loaded = AdapterSet::load(path, &Device::Cpu)?.trainable()?;
    let mut unused = Vec::new();
    let mut other_alpha = 0;
    for (name, adapter) in loaded.iter() {
        let Some(fresh) = set.get(name) else {
            unused.push(name.to_string());
            continue;
        };
        if fresh.rank() != adapter.rank() {
            return Err(Error::Config {
                place: path.display().to_string(),
                what: format!(
                    "{name} has rank {:?}, the run is set to {:?}: make network_dim equal",
                    adapter.rank(),
                    fresh.rank()
                ),
            });
        }
        other_alpha += usize::from(adapter.alpha().is_some_and(|a| a != alpha && alpha != 0.0));
        set.insert(name.to_string(), adapter.clone());
    }
    if !unused.is_empty() {
        return Err(lora_core::Error::UnmatchedLayers { layers: unused }.into());
    }
    if other_alpha > 0 {
        warn(&format!(
            "{}: {other_alpha} layers keep the alpha of the file, not network_alpha {alpha}",
            path.display()
        ));
    }
    if loaded.len() < set.len() {
        warn(&format!(
            "{}: has {} of {} layers; the others start fresh",
            path.display(),
            loaded.len(),
            set.len()
        ));
    }
    Ok(())
}

/// sd-scripts' parameter groups: text encoder, then UNet, split further by LoRA+ and
/// block weights. A group with learning rate 0 is left out.
///
/// # Errors
/// [`Error::Config`] when nothing is left to train.
pub fn param_groups(config: &TrainConfig, adapters: &AdapterSet) -> Result<Vec<ParamGroup>> {
    let options = GroupOptions {
        learning_rate: config.learning_rate(),
        text_encoder_lr: config.text_encoder_lr.first().copied(),
        unet_lr: config.unet_lr,
        ..config.network()?.groups
    };
    let groups = options.groups(adapters.params())?;
    if groups.is_empty() {
        let what = "nothing is trained: all learning rates are 0".into();
        return Err(Error::Config {
            place: "settings".into(),
            what,
        });
    }
    Ok(groups)
}

/// The optimizer by sd-scripts' name and arguments; on the CPU, wherever the adapters are.
pub(crate) fn optimizer(
    config: &TrainConfig,
    groups: Vec<ParamGroup>,
) -> Result<Box<dyn Optimizer>> {
    let build = |groups| kohya_optimizer(config).build(groups);
    let elsewhere = |group: &ParamGroup| group.params.iter().any(|(_, v)| !v.device().is_cpu());
    match groups.iter().any(elsewhere) {
        true => Ok(Box::new(OnHost::new(groups, build)?)),
        false => Ok(build(groups)?),
    }
}

/// Prodigy without `betas` gets (0.9, 0.99) here.
pub(crate) fn kohya_optimizer(config: &TrainConfig) -> KohyaOptimizer {
    KohyaOptimizer {
        optimizer_type: config.optimizer_type.clone(),
        optimizer_args: config.optimizer_args.clone(),
        learning_rate: config.learning_rate(),
        prodigy_betas: (0.9, 0.99),
    }
}
