//! A doctor for datasets: names likely trouble, what it does to the training, and what to do.
//!
//! Everything here is a rule of thumb; nothing stops a run.

mod captions;
mod images;
mod look;

use crate::{Dataset, Finding};

/// How the doctor looks.
///
/// | name | default | meaning |
/// |---|---|---|
/// | `look_at_images` | true | decode every picture to find near-duplicates |
/// | `trigger` | none | the trigger word; none takes the most frequent first tag |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoctorConfig {
    /// Decode every picture to find near-duplicates.
    pub look_at_images: bool,
    /// The trigger word; none takes the most frequent first tag.
    pub trigger: Option<String>,
}

impl Default for DoctorConfig {
    fn default() -> Self {
        Self {
            look_at_images: true,
            trigger: None,
        }
    }
}

/// Examines a dataset. What was noticed while listing is in [`Dataset::findings`].
pub fn examine(dataset: &Dataset, config: &DoctorConfig) -> Vec<Finding> {
    let mut findings = captions::examine(dataset, config.trigger.as_deref());
    findings.extend(images::examine(dataset));
    if config.look_at_images {
        findings.extend(look::examine(dataset));
    }
    findings
}
