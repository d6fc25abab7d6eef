//! File names of results, as sd-scripts gives them.

/// Names of one run's files.
///
/// ```
/// use lora_train::Naming;
/// let naming = Naming::new(Some("zoe"));
/// assert_eq!(naming.epoch(10), "zoe-000010.safetensors");
/// assert_eq!(naming.step(100), "zoe-step00000100.safetensors");
/// assert_eq!(naming.last(), "zoe.safetensors");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Naming {
    name: Option<String>,
}

impl Naming {
    /// `output_name`, if given.
    pub fn new(name: Option<&str>) -> Self {
        Self {
            name: name.map(str::to_string),
        }
    }

    fn base<'a>(&'a self, default: &'a str) -> &'a str {
        self.name.as_deref().unwrap_or(default)
    }

    /// The finished adapter.
    pub fn last(&self) -> String {
        format!("{}.safetensors", self.base("last"))
    }

    /// The file of an epoch, counted from 1.
    pub fn epoch(&self, epoch: usize) -> String {
        format!("{}-{epoch:06}.safetensors", self.base("epoch"))
    }

    /// The file of an update.
    pub fn step(&self, step: usize) -> String {
        format!("{}-step{step:08}.safetensors", self.base("at"))
    }

    /// The state folder of an epoch.
    pub fn epoch_state(&self, epoch: usize) -> String {
        format!("{}-{epoch:06}-state", self.base("epoch"))
    }

    /// The state folder of an update.
    pub fn step_state(&self, step: usize) -> String {
        format!("{}-step{step:08}-state", self.base("at"))
    }

    /// The state folder of a finished run.
    pub fn last_state(&self) -> String {
        format!("{}-state", self.base("last"))
    }
}

/// The epoch whose file goes when `epoch` is saved, keeping `keep` files of one every
/// `every` epochs.
pub fn outdated_epoch(epoch: usize, every: usize, keep: Option<usize>) -> Option<i64> {
    keep.map(|keep| epoch as i64 - (every * keep) as i64)
}

/// The update whose file goes when `step` is saved, keeping those of the last `keep`
/// updates, one every `every`.
pub fn outdated_step(step: usize, every: usize, keep: Option<usize>) -> Option<i64> {
    let every = every.max(1) as i64;
    keep.map(|keep| {
        let last = step as i64 - keep as i64 - 1;
        last - last.rem_euclid(every)
    })
}
