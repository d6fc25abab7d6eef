//! Prodigy with schedule-free averaging, "Prodigy+" (LoganBooker's
//! `prodigy-plus-schedule-free` 2.0.1).
//!
//! Prodigy's estimate of the step size with three savings (statistics from every 11th
//! value only, a factored second moment, no first moment) around the schedule-free point.
//! With k from 1, `dlr = d * lr`, u the update and y, z, x as in [`crate::ScheduleFree`]:
//!
//! 1. `v = b2 * v + (1 - b2) * d^2 * g^2`, factored where a dimension has 32 or more;
//!    `u = d * g / (sqrt(v) + d * eps)`, or `4 / pi * atan2(d * g, sqrt(v))` without `eps`
//! 2. `use_stableadamw`: `u = u / sqrt(max(1, rms(u)))`
//! 3. `du = d^2 / sqrt(d0)`, `N += du * sum(g * (p0 - z))`, `s = b3 * s + du * g`,
//!    `D += sum |s|`, over every 11th value, with z as it was before the step
//! 4. `w = dlr^2`, `weight_sum += w`, `c = w / weight_sum`, `xy = 1 - b1 * (1 - c)`,
//!    `u = u + wd * y`, `y = lerp(y, z, c) - dlr * xy * u`, `z = z - dlr * u`
//! 5. `num = b3 * num + N`, `d_hat = num / D`, at most `2^(1/4) * d` with `d_limiter`;
//!    `d = max(d, d_coef * d_hat)`
//!
//! Two departures from the reference by default, both switched back by
//! [`crate::RuleConfig::reference`]: p0 and s are kept in f32 (the reference's bfloat16 p0 makes
//! the estimate mostly rounding noise for weights that start at ordinary size), and the
//! factored mean is taken over the right dimension (the reference loses the row factor of
//! matrices with more rows than columns).

mod config;
mod second_moment;
mod step;
mod tensors;

pub use config::ProdigyPlusConfig;

use crate::error::{Error, Result};
use crate::prodigy_plus::step::GroupStep;
use crate::schedule_free::{extrapolate, follow, rectification};
use crate::slot::{Buffer, Slot};
use crate::stepper::{Rule, Stepper};
use crate::table::Table;

/// Prodigy with schedule-free averaging: constant schedule, no gradient clipping, and
/// [`crate::Optimizer::set_training`] off around saving and sampling.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use lora_optim::{Optimizer, ParamGroup, ProdigyPlus, ProdigyPlusConfig};
/// let x = Var::zeros(3, DType::F32, &Device::Cpu)?;
/// let target = Tensor::new(&[1f32, -2., 3.], &Device::Cpu)?;
/// let groups = vec![ParamGroup::new("x", vec![("x".into(), x.clone())])];
/// let config = ProdigyPlusConfig { d0: 1e-3, ..Default::default() };
/// let mut optimizer = ProdigyPlus::new(groups, config)?;
/// for _ in 0..300 {
///     let loss = (x.as_tensor() - &target)?.sqr()?.sum_all()?;
///     optimizer.step(&loss.backward()?)?;
/// }
/// optimizer.set_training(false)?;
/// let distance = (x.as_tensor() - &target)?.sqr()?.sum_all()?.to_scalar::<f32>()?;
/// assert!(distance < 0.5);
/// # Ok::<(), lora_optim::Error>(())
/// ```
pub type ProdigyPlus = Stepper<ProdigyPlusRule>;

const Z: usize = 0;
const M: usize = 1;
const V: usize = 2;
const ROW: usize = 3;
const COL: usize = 4;
const P0: usize = 5;
const S: usize = 6;
const SPEED: usize = 7;

/// Scalars of one group.
#[derive(Debug, Clone, Copy)]
struct Estimate {
    d: f64,
    d_prev: f64,
    numerator: f64,
    denominator: f64,
    prev_numerator: f64,
    max_numerator: f64,
    weight_sum: f64,
    effective_lr: f64,
    k: f64,
}

/// The update rule of [`ProdigyPlus`].
#[derive(Debug)]
pub struct ProdigyPlusRule {
    groups: Vec<Estimate>,
    /// Harmonic mean of all d, with `split_groups_mean`; 0 before the first step.
    shared_d: f64,
    split: bool,
}

impl Rule for ProdigyPlusRule {
    type Config = ProdigyPlusConfig;
    const NAME: &'static str = "ProdigyPlusScheduleFree";
    const BUFFERS: &'static [&'static str] = &[
        "z",
        "exp_avg",
        "exp_avg_sq",
        "exp_avg_sq_row",
        "exp_avg_sq_col",
        "p0",
        "s",
        "speed",
    ];

    fn new(config: &ProdigyPlusConfig, table: &Table) -> Result<Self> {
        if config.use_schedulefree && table.numbers.iter().any(|n| n.betas.0 == 0.0) {
            return Err(Error::Combination {
                what: "use_schedulefree and beta1 = 0".into(),
                instead: "the averaged weights cannot be evaluated; use beta1 above 0, usually 0.9",
            });
        }
        let groups = table.per_group(|_, n| Estimate {
            d: config.d0,
            d_prev: config.d0,
            numerator: 0.0,
            denominator: 0.0,
            prev_numerator: 0.0,
            max_numerator: 0.0,
            weight_sum: 0.0,
            effective_lr: n.lr,
            k: 1.0,
        });
        Ok(Self {
            split: config.split_groups && groups.len() > 1,
            groups,
            shared_d: 0.0,
        })
    }

    fn update(&mut self, config: &ProdigyPlusConfig, table: &mut Table) -> Result<()> {
        let steps = table.per_group(|g, _| self.group_step(config, table, g));
        table.for_each_sum(|slot| {
            slot.sums = step::step(config, &steps[slot.group], slot)?;
            Ok(())
        })?;
        let mut numerators = vec![0.0; self.groups.len()];
        let mut denominators = vec![0.0; self.groups.len()];
        let mut moved = vec![false; self.groups.len()];
        for slot in table.active() {
            let collector = if self.split { slot.group } else { 0 };
            numerators[collector] = config.rounded(numerators[collector] + slot.sums[0]);
            denominators[collector] = config.rounded(denominators[collector] + slot.sums[1]);
            moved[slot.group] |= slot.sums[2] != 0.0;
        }
        let collectors = if self.split { self.groups.len() } else { 1 };
        for g in 0..collectors {
            let beta3 = config
                .beta3
                .unwrap_or_else(|| table.numbers[g].betas.1.sqrt());
            self.groups[g].estimate(config, beta3, numerators[g], denominators[g]);
        }
        if !self.split {
            let Estimate {
                d,
                d_prev,
                numerator,
                denominator,
                prev_numerator,
                max_numerator,
                ..
            } = self.groups[0];
            for group in &mut self.groups {
                *group = Estimate {
                    d,
                    d_prev,
                    numerator,
                    denominator,
                    prev_numerator,
                    max_numerator,
                    ..*group
                };
            }
        } else if config.split_groups_mean {
            let inverse: f64 = self.groups.iter().map(|e| 1.0 / e.d).sum();
            self.shared_d = self.groups.len() as f64 / inverse;
        }
        for (g, group) in self.groups.iter_mut().enumerate() {
            if !config.use_schedulefree {
                group.effective_lr = table.lr(g);
            } else if moved[g] {
                group.weight_sum = steps[g].weight_sum;
                group.effective_lr = table.lr(g) * steps[g].xy;
            }
            group.k += 1.0;
        }
        Ok(())
    }

    fn scalars(&self) -> Vec<(&'static str, Vec<f64>)> {
        let each = |f: fn(&Estimate) -> f64| self.groups.iter().map(f).collect::<Vec<_>>();
        vec![
            ("d", each(|e| e.d)),
            ("d_prev", each(|e| e.d_prev)),
            ("d_numerator", each(|e| e.numerator)),
            ("d_denom", each(|e| e.denominator)),
            ("prev_d_numerator", each(|e| e.prev_numerator)),
            ("max_d_numerator", each(|e| e.max_numerator)),
            ("weight_sum", each(|e| e.weight_sum)),
            ("effective_lr", each(|e| e.effective_lr)),
            ("k", each(|e| e.k)),
            ("shared_d", vec![self.shared_d]),
        ]
    }

    fn set_scalars(&mut self, values: &[Vec<f64>]) {
        for (g, estimate) in self.groups.iter_mut().enumerate() {
            let at = |i: usize| values[i][g];
            *estimate = Estimate {
                d: at(0),
                d_prev: at(1),
                numerator: at(2),
                denominator: at(3),
                prev_numerator: at(4),
                max_numerator: at(5),
                weight_sum: at(6),
                effective_lr: at(7),
                k: at(8),
            };
        }
        self.shared_d = values[9][0];
    }

    fn d(&self, group: usize) -> Option<f64> {
        Some(if self.shared_d > 0.0 {
            self.shared_d
        } else {
            self.groups[group].d
        })
    }

    fn shown_lr(&self, group: usize) -> Option<f64> {
        Some(self.groups[group].effective_lr)
    }

    fn averaged(
        &self,
        config: &ProdigyPlusConfig,
        table: &Table,
        slot: usize,
    ) -> Result<Option<Buffer>> {
        let slot = &table.slots[slot];
        if !config.use_schedulefree {
            return Ok(None);
        }
        extrapolate(slot, Z, 1.0 - 1.0 / table.numbers[slot.group].betas.0)
    }

    fn weights_changed(
        &mut self,
        config: &ProdigyPlusConfig,
        slot: &mut Slot,
        factor: Option<f64>,
    ) -> Result<()> {
        step::rebase(config, slot, factor)?;
        follow(slot, Z, factor)
    }
}

impl ProdigyPlusRule {
    /// The numbers that all parameters of a group share in this step.
    fn group_step(&self, config: &ProdigyPlusConfig, table: &Table, g: usize) -> GroupStep {
        let (estimate, n) = (&self.groups[g], &table.numbers[g]);
        let (b1, mut b2) = n.betas;
        let beta3 = config.beta3.unwrap_or_else(|| b2.sqrt());
        let shared = self.split && config.split_groups_mean && self.shared_d > 0.0;
        let mut dlr = if shared { self.shared_d } else { estimate.d } * table.rate(g);
        let mut settled = true;
        if config.use_bias_correction {
            let rectified = rectification(b2, estimate.k);
            settled = rectified.is_some();
            dlr *= rectified.unwrap_or(0.0);
            b2 = 1.0 - (1.0 - b2) / (1.0 - b2.powf(estimate.k));
        }
        let weight = dlr * dlr;
        let weight_sum = estimate.weight_sum + weight;
        let mut c = if weight_sum == 0.0 {
            0.0
        } else {
            weight / weight_sum
        };
        if config.schedulefree_c > 0.0 {
            c = (c * (1.0 - b1) * config.schedulefree_c).min(1.0);
        }
        GroupStep {
            d: estimate.d,
            dlr,
            b1,
            b2,
            beta3,
            settled,
            k: estimate.k,
            c,
            xy: 1.0 - b1 * (1.0 - c),
            weight_sum,
            weight_decay: n.weight_decay,
            adapting: config.prodigy_steps == 0 || estimate.k < config.prodigy_steps as f64,
        }
    }
}

impl Estimate {
    /// Takes the sums of one step into the estimate.
    fn estimate(
        &mut self,
        config: &ProdigyPlusConfig,
        beta3: f64,
        numerator: f64,
        denominator: f64,
    ) {
        if config.prodigy_steps > 0 && self.k >= config.prodigy_steps as f64 {
            return;
        }
        let mut next = beta3 * self.numerator;
        // Nothing negative is collected before d has grown for the first time.
        if self.d > config.d0 || numerator > 0.0 {
            next += numerator;
        }
        self.prev_numerator = self.numerator;
        self.max_numerator = self.max_numerator.max(next);
        self.numerator = next;
        self.denominator = denominator;
        self.d_prev = self.d;
        let most = 2f64.powf(0.25);
        if config.use_speed {
            if next >= self.max_numerator && next > 0.0 && self.prev_numerator > 0.0 {
                let growth = most.min((next / self.prev_numerator).sqrt());
                self.d = self.d.max(self.d * growth * config.d_coef.powf(0.125));
            }
        } else if denominator > 0.0 {
            let mut d_hat = next / denominator;
            if config.d_limiter {
                d_hat = d_hat.min(self.d * most);
            }
            self.d = self.d.max(d_hat * config.d_coef);
        }
    }
}
