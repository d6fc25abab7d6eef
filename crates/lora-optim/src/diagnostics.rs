//! What a run's numbers say, in words.

use std::fmt;

use crate::optimizer::GroupReport;

/// Something about a run that its owner would want to know.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Advice {
    /// d is where it began.
    Stuck {
        /// The group.
        group: String,
        /// Steps without movement.
        steps: u64,
        /// The value.
        d: f64,
        /// No gradient was above 0 either.
        no_gradient: bool,
    },
    /// d grew suddenly after it had been at rest.
    Surge {
        /// The group.
        group: String,
        /// Value before.
        from: f64,
        /// Value now.
        to: f64,
        /// The step at which it was still `from`.
        since: u64,
    },
    /// The step size is 0: nothing is learned.
    NoStepSize {
        /// The group.
        group: String,
        /// Steps in a row.
        steps: u64,
    },
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stuck {
                group,
                steps,
                d,
                no_gradient: true,
            } => {
                write!(
                    f,
                    "{group}: d has not moved for {steps} steps (d = {d:e}) because all its gradients are zero: is this part of the model in use?"
                )
            }
            Self::Stuck {
                group,
                steps,
                d,
                no_gradient: false,
            } => {
                write!(
                    f,
                    "{group}: d has not moved for {steps} steps (d = {d:e}): set d0 to {:e}, and check that weights and gradients are not in half precision",
                    d * 10.0
                )
            }
            Self::Surge {
                group,
                from,
                to,
                since,
            } => write!(
                f,
                "{group}: d grew from {from:.2e} to {to:.2e} since step {since} after a rest: runs often get worse from here; prefer a checkpoint from before step {since}, or use a smaller d_coef or a d_limit"
            ),
            Self::NoStepSize { group, steps } => {
                write!(
                    f,
                    "{group}: the effective learning rate has been 0 for {steps} steps: check the schedule's end and the group's lr"
                )
            }
        }
    }
}

/// Looks at the reports of a run and speaks up once about each thing.
///
/// ```
/// use lora_optim::{GroupReport, Watch};
/// let mut watch = Watch::default();
/// let report = GroupReport { name: "unet".into(), lr: 1.0, d: Some(1e-6), effective_lr: 1e-6, ..Default::default() };
/// let advice: Vec<_> = (1..=100).flat_map(|step| watch.observe(step, std::slice::from_ref(&report))).collect();
/// assert_eq!(advice.len(), 1);
/// assert!(advice[0].to_string().contains("d has not moved for 100 steps"));
/// ```
#[derive(Debug, Clone)]
pub struct Watch {
    /// Steps without movement that are worth a word; 100 by default.
    pub patience: u64,
    /// Growth of d after a rest that is worth a word; 2 by default.
    pub surge: f64,
    /// Steps within which it must happen; 10 by default.
    pub surge_steps: u64,
    groups: Vec<Seen>,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            patience: 100,
            surge: 2.0,
            surge_steps: 10,
            groups: Vec::new(),
        }
    }
}

/// Memory of one group.
#[derive(Debug, Clone)]
struct Seen {
    first_d: f64,
    /// Steps observed.
    steps: u64,
    any_gradient: bool,
    said_stuck: bool,
    /// Value of d at the end of its last rest, and that step.
    rest: Option<(f64, u64)>,
    /// Present value that d has kept within 1 %, and since when.
    level: (f64, u64),
    zero_steps: u64,
}

impl Watch {
    /// Takes one step's reports (see [`crate::Optimizer::report`]) and returns what is new.
    pub fn observe(&mut self, step: u64, reports: &[GroupReport]) -> Vec<Advice> {
        let mut out = Vec::new();
        for (i, report) in reports.iter().enumerate() {
            if self.groups.len() <= i {
                let d = report.d.unwrap_or(0.0);
                self.groups.push(Seen {
                    first_d: d,
                    steps: 0,
                    any_gradient: false,
                    said_stuck: false,
                    rest: None,
                    level: (d, step),
                    zero_steps: 0,
                });
            }
            let (patience, surge, surge_steps) = (self.patience, self.surge, self.surge_steps);
            let seen = &mut self.groups[i];
            seen.steps += 1;
            seen.any_gradient |= report.grad_norm.is_none_or(|n| n > 0.0);
            seen.zero_steps = if report.effective_lr == 0.0 {
                seen.zero_steps + 1
            } else {
                0
            };
            if seen.zero_steps == patience {
                out.push(Advice::NoStepSize {
                    group: report.name.clone(),
                    steps: patience,
                });
            }
            let Some(d) = report.d else { continue };
            if d <= seen.first_d && seen.steps >= patience && !seen.said_stuck {
                seen.said_stuck = true;
                let no_gradient = !seen.any_gradient;
                out.push(Advice::Stuck {
                    group: report.name.clone(),
                    steps: seen.steps,
                    d,
                    no_gradient,
                });
            }
            if d > seen.level.0 * 1.01 {
                if step - seen.level.1 >= patience && seen.level.0 > seen.first_d {
                    seen.rest = Some((seen.level.0, step - 1));
                }
                seen.level = (d, step);
            }
            if let Some((from, since)) = seen.rest {
                if step - since > surge_steps {
                    seen.rest = None;
                } else if d >= from * surge {
                    seen.rest = None;
                    out.push(Advice::Surge {
                        group: report.name.clone(),
                        from,
                        to: d,
                        since,
                    });
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(d: f64) -> [GroupReport; 1] {
        [GroupReport {
            name: "unet".into(),
            lr: 1.0,
            d: Some(d),
            effective_lr: d,
            grad_norm: Some(1.0),
            ..Default::default()
        }]
    }

    #[test]
    fn a_late_jump_of_d_is_told_once_with_the_step_before_it() {
        let mut watch = Watch::default();
        let d = |step: u64| match step {
            0..=5 => 1e-6,
            6..=300 => 1e-4,
            _ => 3e-4,
        };
        let advice: Vec<Advice> = (1..=400)
            .flat_map(|step| watch.observe(step, &report(d(step))))
            .collect();
        assert_eq!(
            advice,
            [Advice::Surge {
                group: "unet".into(),
                from: 1e-4,
                to: 3e-4,
                since: 300
            }]
        );
    }

    #[test]
    fn steady_growth_is_no_news() {
        let mut watch = Watch::default();
        assert!((1..=400).all(|step| {
            watch
                .observe(step, &report(1e-6 * 1.02f64.powi(step as i32)))
                .is_empty()
        }));
    }
}
