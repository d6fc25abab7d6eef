//! All parameters of an optimizer with their groups' numbers.

use rayon::prelude::*;

use crate::error::{Error, Result, check_not_negative};
use crate::group::{GradSource, ParamGroup, validate_groups};
use crate::lane::Lane;
use crate::slot::{HalfPrecision, Kernel, Slot, Source, collect_sums};

/// A group's numbers with the optimizer's defaults filled in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupNumbers {
    /// Learning rate at construction.
    pub initial_lr: f64,
    /// Learning rate now, before the schedule's factor.
    pub lr: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Term added to the denominator.
    pub eps: f64,
    /// Factor on the steps.
    pub multiplier: f64,
}

/// What an optimizer's options say for a group that does not say it itself.
/// `None` marks numbers that cannot be set per group.
#[derive(Debug, Clone, Copy)]
pub struct GroupDefaults {
    /// Learning rate.
    pub lr: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Decay rates of the two moments.
    pub betas: Option<(f64, f64)>,
    /// Term added to the denominator.
    pub eps: Option<f64>,
}

/// Parameters, groups, and what every update rule shares.
#[derive(Debug)]
pub struct Table {
    pub(crate) groups: Vec<ParamGroup>,
    pub(crate) numbers: Vec<GroupNumbers>,
    pub(crate) slots: Vec<Slot>,
    pub(crate) lr_factors: Vec<f64>,
    /// Steps taken, skipped ones not counted.
    pub(crate) steps: u64,
}

impl Table {
    pub(crate) fn new(
        groups: Vec<ParamGroup>,
        defaults: GroupDefaults,
        buffers: usize,
    ) -> Result<Self> {
        validate_groups(&groups)?;
        let mut numbers = Vec::with_capacity(groups.len());
        let mut slots = Vec::new();
        for (g, group) in groups.iter().enumerate() {
            let refuse = |what: &str| Error::Combination {
                what: format!("{what} of group {:?} with this optimizer", group.name),
                instead: "set it in the optimizer's own options",
            };
            if group.betas.is_some() && defaults.betas.is_none() {
                return Err(refuse("betas"));
            }
            if group.eps.is_some() && defaults.eps.is_none() {
                return Err(refuse("eps"));
            }
            let lr = group.lr.unwrap_or(defaults.lr);
            numbers.push(GroupNumbers {
                initial_lr: lr,
                lr,
                weight_decay: group.weight_decay.unwrap_or(defaults.weight_decay),
                betas: group.betas.or(defaults.betas).unwrap_or_default(),
                eps: group.eps.or(defaults.eps).unwrap_or_default(),
                multiplier: group.multiplier,
            });
            for (name, var) in &group.params {
                slots.push(Slot::new(
                    name.clone(),
                    var.clone(),
                    g,
                    slots.len(),
                    buffers,
                ));
            }
        }
        Ok(Self {
            lr_factors: vec![1.0; groups.len()],
            groups,
            numbers,
            slots,
            steps: 0,
        })
    }

    /// The group's learning rate now: its own, times the schedule's factor.
    pub(crate) fn lr(&self, group: usize) -> f64 {
        self.numbers[group].lr * self.lr_factors[group]
    }

    /// Learning rate times the group's multiplier.
    pub(crate) fn rate(&self, group: usize) -> f64 {
        self.lr(group) * self.numbers[group].multiplier
    }

    /// The learning rate that `groups` share; each must have it, or 0.
    pub(crate) fn shared_lr(
        &self,
        groups: impl Iterator<Item = usize> + Clone,
        instead: &'static str,
    ) -> Result<f64> {
        let shared = groups.clone().map(|g| self.lr(g)).fold(0.0, f64::max);
        match groups
            .map(|g| self.lr(g))
            .find(|lr| *lr != 0.0 && *lr != shared)
        {
            None => Ok(shared),
            Some(lr) => Err(Error::Combination {
                what: format!("learning rates {lr} and {shared} under one d"),
                instead,
            }),
        }
    }

    /// For each group the value of `f`.
    pub(crate) fn per_group<T>(&self, f: impl Fn(usize, &GroupNumbers) -> T) -> Vec<T> {
        self.numbers
            .iter()
            .enumerate()
            .map(|(g, n)| f(g, n))
            .collect()
    }

    pub(crate) fn set_group_lr(&mut self, group: usize, lr: f64) -> Result<()> {
        check_not_negative("lr", lr)?;
        let numbers = self.numbers.get_mut(group).ok_or_else(|| Error::Missing {
            what: "group",
            name: group.to_string(),
        })?;
        numbers.lr = lr;
        Ok(())
    }

    pub(crate) fn set_half(&mut self, half: HalfPrecision) {
        for slot in &mut self.slots {
            slot.half = half;
        }
    }

    pub(crate) fn slot_mut(&mut self, name: &str) -> Result<&mut Slot> {
        let found = self.slots.iter_mut().find(|s| s.name == name);
        found.ok_or_else(|| Error::Missing {
            what: "parameter",
            name: name.to_string(),
        })
    }

    /// Takes the gradients of this step into the slots.
    pub(crate) fn take_grads(&mut self, grads: &dyn GradSource, scale: f64) -> Result<()> {
        for slot in &mut self.slots {
            slot.grad = None;
            slot.grad_scale = scale as f32;
            if let Some(grad) = grads.grad(&slot.name, &slot.var) {
                slot.take_grad(grad)?;
            }
        }
        Ok(())
    }

    pub(crate) fn drop_grads(&mut self) {
        for slot in &mut self.slots {
            slot.grad = None;
        }
    }

    /// Runs `work` for every parameter that has a gradient, in parallel.
    pub(crate) fn for_each(
        &mut self,
        work: impl Fn(&mut Slot) -> Result<()> + Sync + Send,
    ) -> Result<()> {
        self.slots
            .par_iter_mut()
            .filter(|s| s.grad.is_some())
            .try_for_each(work)
    }

    /// As [`Table::for_each`]; afterwards [`Slot::sums`] hold what the kernels summed.
    pub(crate) fn for_each_sum(
        &mut self,
        work: impl Fn(&mut Slot) -> Result<()> + Sync + Send,
    ) -> Result<()> {
        self.for_each(|slot| {
            slot.sums = [0.0; 4];
            work(slot)
        })?;
        collect_sums(self.slots.iter_mut().filter(|s| s.grad.is_some()))
    }

    /// The parameters that take part in this step, in their fixed order.
    pub(crate) fn active(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(|s| s.grad.is_some())
    }

    /// L2 norm of all gradients per group, and the first parameter whose gradient is
    /// not finite.
    pub(crate) fn grad_norms(&mut self) -> Result<(Vec<f64>, Option<String>)> {
        self.for_each_sum(|slot| slot.run([], [Source::Grad], &SquareSum))?;
        let mut squares = vec![0.0; self.groups.len()];
        let mut bad = None;
        for slot in self.active() {
            squares[slot.group] += slot.sums[0];
            if !slot.sums[0].is_finite() && bad.is_none() {
                bad = Some(slot.name.clone());
            }
        }
        Ok((squares.into_iter().map(f64::sqrt).collect(), bad))
    }
}

/// Sum of squares.
struct SquareSum;

impl Kernel<0, 1, 1> for SquareSum {
    #[inline(always)]
    fn element<L: Lane>(&self, _: &mut [L; 0], [x]: [L; 1]) -> [L; 1] {
        [x.clone() * x]
    }
}
