//! Settings that are allowed and probably not meant.

use lora_core::{Compute, Family};

use crate::config::{Steps, TrainConfig};
use crate::setup::kohya_optimizer;

impl TrainConfig {
    /// Choices that are allowed and probably not meant, and settings that do nothing beside the
    /// others, in words.
    pub fn warnings(&self) -> Vec<String> {
        let mut list = Vec::new();
        self.network_warnings(&mut list);
        self.rate_warnings(&mut list);
        self.length_warnings(&mut list);
        self.ignored(&mut list);
        self.precision_warnings(&mut list);
        list
    }

    fn network_warnings(&self, list: &mut Vec<String>) {
        let rank = self.network_rank();
        if self.network_alpha > rank as f64 {
            list.push(format!(
                "network_alpha {} is above network_dim {rank}: the adapter acts {:.1} times as strongly as usual",
                self.network_alpha,
                self.network_alpha / rank as f64
            ));
        }
        let loha = self.adapter().is_ok_and(|a| a.family == Family::Loha);
        if loha && rank > 8 {
            list.push(format!(
                "LoHa of dim {rank} has as many parameters as LoRA of dim {}: 1 to 8 is usual",
                2 * rank
            ));
        }
        for arg in &self.network_args {
            let reason = match arg.split_once('=').map(|(k, v)| (k.trim(), v.trim())) {
                Some(("bypass_mode", "True" | "true")) => {
                    "the branch is computed in the faster way"
                }
                Some(("block_size", _)) => "only algo=dylora has blocks",
                _ => continue,
            };
            list.push(format!("network_args: {arg} has no effect: {reason}"));
        }
    }

    fn rate_warnings(&self, list: &mut Vec<String>) {
        if self.learning_rate.is_none() {
            list.push(format!(
                "learning_rate is not given: using {} (sd-scripts would use 2e-6)",
                self.learning_rate()
            ));
        }
        if self.adaptive()
            && [self.unet_learning_rate(), self.text_learning_rate()]
                .iter()
                .any(|lr| *lr != 0.0 && !(0.1..=10.0).contains(lr))
        {
            list.push(format!(
                "{} finds the learning rate itself: set learning_rate, unet_lr and text_encoder_lr to 1",
                self.optimizer_type
            ));
        }
        if let [first, others @ ..] = self.text_encoder_lr.as_slice()
            && others.iter().any(|lr| lr != first)
        {
            list.push(format!(
                "text_encoder_lr: only the first number, {first}, has an effect: there is one text encoder"
            ));
        }
        let long_memory = |arg: &String| {
            let plain: String = arg.chars().filter(|c| !" ()".contains(*c)).collect();
            plain == "betas=0.9,0.999"
        };
        let prodigy = self.optimizer_type.to_lowercase().starts_with("prodigy");
        if prodigy && self.optimizer_args.iter().any(long_memory) {
            list.push(
                "Prodigy with betas (0.9, 0.999) finds its step size slowly: (0.9, 0.99) is usual"
                    .into(),
            );
        }
        let has_schedule = !self.lr_scheduler_type.is_empty() || self.lr_scheduler != "constant";
        if self.has_own_schedule() && has_schedule {
            list.push(format!(
                "{} has a schedule of its own: lr_scheduler has no effect",
                self.optimizer_type
            ));
        }
    }

    fn length_warnings(&self, list: &mut Vec<String>) {
        let default = Self::default().max_train_steps;
        match self.max_train_epochs {
            Some(epochs) if self.max_train_steps != default => list.push(format!(
                "max_train_epochs {epochs} decides the length of the run, not max_train_steps {}",
                self.max_train_steps
            )),
            None if self.max_train_steps == default => list.push(format!(
                "max_train_steps {default}, which is the default, decides the length of the run; give \
                 max_train_epochs to count passes over the pictures"
            )),
            _ => {}
        }
    }

    fn precision_warnings(&self, list: &mut Vec<String>) {
        if self.zero_terminal_snr && !self.v_parameterization {
            list.push("zero_terminal_snr is meant for v-prediction models".into());
        }
        if self.mixed_precision != "no" {
            list.push(format!(
                "mixed_precision {}: the UNet's frozen weights are kept so{}; adapters, norms, loss \
                 and optimizer are computed in f32",
                self.mixed_precision,
                match self.compute() {
                    Compute::Bf16 => ", and their products computed in it",
                    Compute::F32 => "",
                }
            ));
        }
    }

    /// Settings that differ from their defaults and do nothing beside the others.
    fn ignored(&self, list: &mut Vec<String>) {
        let (Ok(own), Ok(default)) = (self.table(), Self::default().table()) else {
            return;
        };
        let given = |name: &str| match name {
            "dataset_config" => self.has_dataset_config(),
            _ => own.get(name) != default.get(name),
        };
        for (name, others) in self.decided_elsewhere() {
            if let (true, Some(other)) = (given(name), others.iter().find(|other| given(other))) {
                list.push(format!("{name} has no effect: {other} decides"));
            }
        }
        for (name, acts, needs) in self.dependent() {
            if given(name) && !acts {
                list.push(format!("{name} has no effect without {needs}"));
            }
        }
        for (name, every) in [
            ("sample_every_n_epochs", self.sample_every_n_epochs),
            ("sample_every_n_steps", self.sample_every_n_steps),
        ] {
            if every == Some(0) {
                list.push(format!("{name} is 0: no sample pictures are drawn by it"));
            }
        }
    }

    /// Settings that others replace.
    fn decided_elsewhere(&self) -> Vec<(&'static str, &'static [&'static str])> {
        let mut list: Vec<(&str, &[&str])> = vec![
            ("train_data_dir", &["dataset_config"]),
            ("in_json", &["dataset_config"]),
            ("reg_data_dir", &["dataset_config", "in_json"]),
            ("caption_extension", &["in_json"]),
            ("save_every_n_epochs", &["save_n_epoch_ratio"]),
            ("lr_scheduler", &["lr_scheduler_type"]),
            ("training_comment", &["no_metadata"]),
        ];
        if self.sample_every_n_epochs > Some(0) {
            list.push(("sample_every_n_steps", &["sample_every_n_epochs"]));
        }
        if self.dim_from_weights {
            let names = ["network_dim", "network_alpha", "network_dropout"];
            list.extend(names.map(|name| (name, &["dim_from_weights"][..])));
        }
        list
    }

    /// Settings that need another one: name, whether it acts now, and what it needs.
    #[rustfmt::skip]
    fn dependent(&self) -> Vec<(&'static str, bool, &'static str)> {
        let above_0 = |number: Option<f64>| number.is_some_and(|n| n != 0.0);
        let huber = matches!(self.loss_type.as_str(), "huber" | "smooth_l1");
        let by_epochs = self.save_every_n_epochs.or(self.save_n_epoch_ratio).is_some();
        let by_steps = self.save_every_n_steps.is_some();
        let logs = self.logging_dir.is_some();
        let text = !self.network_train_unet_only || !above_0(self.text_encoder_lr.first().copied());
        let unet = !self.network_train_text_encoder_only || !above_0(self.unet_lr);
        let own = self.has_own_schedule();
        let named = !own && self.lr_scheduler_type.is_empty();
        let schedule = |names: &[&str]| named && names.contains(&self.lr_scheduler.as_str());
        let warmup = self.lr_warmup_steps.is_some_and(|s| !matches!(s, Steps::Count(0) | Steps::Share(0.0)));
        let mut list = vec![
            ("noise_offset_random_strength", above_0(self.noise_offset), "noise_offset"),
            ("multires_noise_discount", self.multires_noise_iterations > Some(0), "multires_noise_iterations"),
            ("ip_noise_gamma_random_strength", above_0(self.ip_noise_gamma), "ip_noise_gamma"),
            ("huber_c", huber, "loss_type huber or smooth_l1"),
            ("huber_schedule", huber, "loss_type huber or smooth_l1"),
            ("huber_scale", huber && self.huber_schedule != "snr", "huber_schedule constant or exponential"),
            ("save_last_n_epochs", by_epochs, "save_every_n_epochs"),
            ("save_last_n_steps", by_steps, "save_every_n_steps"),
            ("save_last_n_epochs_state", by_epochs && self.save_state, "save_state and save_every_n_epochs"),
            ("save_last_n_steps_state", by_steps && self.save_state, "save_state and save_every_n_steps"),
            ("sample_prompts", self.draws_samples(), "sample_every_n_epochs, sample_every_n_steps or sample_at_first"),
            ("sample_sampler", self.draws_samples(), "sample pictures"),
            ("log_prefix", logs, "logging_dir"),
            ("log_tracker_name", logs, "logging_dir"),
            ("text_encoder_lr", text, "adapters on the text encoder"),
            ("stop_text_encoder_training", !self.network_train_unet_only, "adapters on the text encoder"),
            ("unet_lr", unet, "adapters on the UNet"),
            ("lr_warmup_steps", !own || !warmup, "a schedule: the optimizer has its own"),
            ("lr_scheduler_args", !own, "a schedule: the optimizer has its own"),
            ("lr_scheduler_num_cycles", schedule(&["cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"]), "an lr_scheduler with cycles"),
            ("lr_scheduler_power", schedule(&["polynomial"]), "lr_scheduler polynomial"),
            ("lr_scheduler_timescale", schedule(&["inverse_sqrt"]), "lr_scheduler inverse_sqrt"),
            ("lr_scheduler_min_lr_ratio", schedule(&["cosine_with_min_lr", "warmup_stable_decay"]), "lr_scheduler cosine_with_min_lr or warmup_stable_decay"),
            ("lr_decay_steps", schedule(&["warmup_stable_decay"]), "lr_scheduler warmup_stable_decay"),
        ];
        // Subsets of a dataset config may have their own.
        if !self.has_dataset_config() {
            let warmup = self.token_warmup_step > 0.0;
            let moves = self.shuffle_caption || self.caption_tag_dropout_rate > 0.0 || warmup;
            let holds_back = above_0(self.validation_split);
            let table = self.enable_bucket && !self.bucket_no_upscale;
            list.extend([
                ("keep_tokens", moves, "shuffle_caption, caption_tag_dropout_rate or token_warmup_step"),
                ("token_warmup_min", warmup, "token_warmup_step"),
                ("prior_loss_weight", self.reg_data_dir.is_some(), "reg_data_dir"),
                ("validation_seed", holds_back, "validation_split"),
                ("validate_every_n_epochs", holds_back, "validation_split"),
                ("validate_every_n_steps", holds_back, "validation_split"),
                ("max_validation_steps", holds_back, "validation_split"),
                ("bucket_no_upscale", self.enable_bucket, "enable_bucket"),
                ("bucket_reso_steps", self.enable_bucket, "enable_bucket"),
                ("min_bucket_reso", table, "enable_bucket, or beside bucket_no_upscale"),
                ("max_bucket_reso", table, "enable_bucket, or beside bucket_no_upscale"),
            ]);
        }
        list
    }

    /// Whether any sample pictures are drawn.
    pub(crate) fn draws_samples(&self) -> bool {
        let set = |every: Option<usize>| every.is_some_and(|n| n > 0);
        self.sample_at_first || set(self.sample_every_n_epochs) || set(self.sample_every_n_steps)
    }

    /// Whether the optimizer brings its schedule; one that is refused later does not.
    fn has_own_schedule(&self) -> bool {
        kohya_optimizer(self).has_own_schedule().unwrap_or(false)
    }
}
