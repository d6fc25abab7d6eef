//! What all optimizers share around their update rule: gradients in, clipping,
//! skipping, half precision, saved state.

use std::fmt::Debug;

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::{Error, Result, check_not_negative, check_positive};
use crate::group::{GradSource, ParamGroup};
use crate::optimizer::{GroupReport, Optimizer, StepOptions, StepReport, WeightChange};
use crate::slot::{Buffer, HalfPrecision, Slot};
use crate::state::{ChangedOption, FORMAT, OnChange, OptimizerState, differences};
use crate::table::{GroupDefaults, Table};

/// Options of an update rule.
pub trait RuleConfig:
    Clone + Debug + Default + PartialEq + Serialize + DeserializeOwned + Send
{
    /// Checks every number.
    ///
    /// # Errors
    /// [`Error::Option`] naming the first bad one.
    fn validate(&self) -> Result<()>;

    /// The reference implementation's defaults, where they differ from ours.
    fn reference() -> Self {
        Self::default()
    }

    /// What groups get that do not say it themselves.
    fn defaults(&self) -> GroupDefaults;
}

/// An update rule: the part in which optimizers differ. Implemented inside this crate
/// only (its working types are private); users meet [`Optimizer`] and the concrete
/// types such as [`crate::AdamW`].
pub trait Rule: Debug + Send + Sized {
    /// Its options.
    type Config: RuleConfig;
    /// Name in saved states and error messages.
    const NAME: &'static str;
    /// Names of the state buffers, as the reference implementation calls them.
    const BUFFERS: &'static [&'static str];

    /// Fresh scalars; refuses combinations of options and groups.
    ///
    /// # Errors
    /// [`Error::Combination`] or [`Error::Option`].
    fn new(config: &Self::Config, table: &Table) -> Result<Self>;

    /// Moves every parameter that has a gradient.
    ///
    /// # Errors
    /// A failed tensor operation.
    fn update(&mut self, config: &Self::Config, table: &mut Table) -> Result<()>;

    /// Named numbers to save and to show.
    fn scalars(&self) -> Vec<(&'static str, Vec<f64>)> {
        Vec::new()
    }

    /// Takes over saved numbers, in the order of [`Rule::scalars`].
    fn set_scalars(&mut self, _values: &[Vec<f64>]) {}

    /// Estimated step size of a group, for rules that estimate one.
    fn d(&self, _group: usize) -> Option<f64> {
        None
    }

    /// The last raw estimate.
    fn d_hat(&self, _group: usize) -> Option<f64> {
        None
    }

    /// The rate in force, for rules that choose it themselves.
    fn shown_lr(&self, _group: usize) -> Option<f64> {
        None
    }

    /// Squared distance of one parameter from its start, if the rule knows it.
    ///
    /// # Errors
    /// A failed tensor operation.
    fn distance(&self, _slot: &crate::slot::Slot) -> Result<Option<f64>> {
        Ok(None)
    }

    /// Somebody scaled (`Some(factor)`) or replaced (`None`) this parameter.
    ///
    /// # Errors
    /// A failed tensor operation.
    fn weights_changed(
        &mut self,
        _config: &Self::Config,
        _slot: &mut crate::slot::Slot,
        _factor: Option<f64>,
    ) -> Result<()> {
        Ok(())
    }

    /// The weights to save and sample from, if they differ from the trained ones.
    ///
    /// # Errors
    /// A failed tensor operation.
    fn averaged(
        &self,
        _config: &Self::Config,
        _table: &Table,
        _slot: usize,
    ) -> Result<Option<Buffer>> {
        Ok(None)
    }
}

/// An optimizer: parameters in groups, a rule, and the rule's options.
///
/// Use it through its names: [`crate::AdamW`], [`crate::Prodigy`], ...
#[derive(Debug)]
pub struct Stepper<R: Rule> {
    pub(crate) table: Table,
    pub(crate) rule: R,
    pub(crate) config: R::Config,
    options: StepOptions,
    skips_in_a_row: u64,
    skipped: u64,
    group_norms: Option<Vec<f64>>,
    /// The trained weights while the averaged ones are in place.
    resting: Option<Vec<Buffer>>,
}

impl<R: Rule> Stepper<R> {
    /// An optimizer at its start.
    ///
    /// # Errors
    /// Options out of range, combinations that the algorithm cannot run, duplicate or
    /// missing parameters.
    pub fn new(groups: Vec<ParamGroup>, config: R::Config) -> Result<Self> {
        config.validate()?;
        let table = Table::new(groups, config.defaults(), R::BUFFERS.len())?;
        let rule = R::new(&config, &table)?;
        Ok(Self {
            table,
            rule,
            config,
            options: StepOptions::default(),
            skips_in_a_row: 0,
            skipped: 0,
            group_norms: None,
            resting: None,
        })
    }

    /// The algorithm's options.
    pub fn config(&self) -> &R::Config {
        &self.config
    }

    /// Steps skipped so far because a gradient was not finite.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Norms, the check for non-finite gradients, and the clip factor.
    fn prepare(&mut self) -> Result<StepReport> {
        let mut report = StepReport {
            applied: true,
            grad_norm: None,
            clip: 1.0,
            non_finite: None,
        };
        if self.options.max_grad_norm == 0.0 && !self.options.check_finite {
            self.group_norms = None;
            return Ok(report);
        }
        let (norms, bad) = self.table.grad_norms()?;
        let norm = norms.iter().map(|n| n * n).sum::<f64>().sqrt();
        report.grad_norm = Some(norm);
        self.group_norms = Some(norms);
        if self.options.check_finite && bad.is_some() {
            report.applied = false;
            report.non_finite = bad;
            return Ok(report);
        }
        if self.options.max_grad_norm > 0.0 {
            report.clip = (self.options.max_grad_norm / (norm + 1e-6)).min(1.0);
            let scale = (self.options.grad_scale * report.clip) as f32;
            self.table
                .slots
                .iter_mut()
                .for_each(|s| s.grad_scale = scale);
        }
        Ok(report)
    }

    fn skip(&mut self, report: &StepReport) -> Result<()> {
        self.skipped += 1;
        self.skips_in_a_row += 1;
        if self.skips_in_a_row >= self.options.max_skips {
            let name = report.non_finite.clone().unwrap_or_default();
            return Err(Error::NonFinite {
                count: self.skips_in_a_row,
                name,
            });
        }
        Ok(())
    }

    fn apply(&mut self) -> Result<()> {
        for slot in self.table.slots.iter_mut().filter(|s| s.grad.is_some()) {
            slot.sync_master()?;
            slot.steps += 1;
        }
        self.rule.update(&self.config, &mut self.table)?;
        self.table.steps += 1;
        let step = self.table.steps;
        self.table
            .slots
            .iter_mut()
            .filter(|s| s.grad.is_some())
            .try_for_each(|s| s.publish(step))
    }

    /// Weights, buffers, counters and scalars under the names of the state format.
    fn tensors(&self) -> Result<std::collections::BTreeMap<String, Tensor>> {
        let mut out = std::collections::BTreeMap::new();
        for (i, slot) in self.table.slots.iter().enumerate() {
            let weights = match &self.resting {
                Some(resting) => resting[i].clone(),
                None => slot.weights()?,
            };
            out.insert(
                format!("weight.{}", slot.name),
                to_tensor(&weights, slot.dims())?,
            );
            out.insert(
                format!("step.{}", slot.name),
                Tensor::new(&[slot.steps as i64], &Device::Cpu)?,
            );
            for (kind, buffer) in R::BUFFERS.iter().zip(&slot.buffers) {
                if let Some(buffer) = buffer {
                    out.insert(
                        format!("state.{}.{kind}", slot.name),
                        to_tensor(buffer, slot.dims())?,
                    );
                }
            }
        }
        let common = [
            ("steps", self.table.steps as f64),
            ("skipped", self.skipped as f64),
            ("skips_in_a_row", self.skips_in_a_row as f64),
        ];
        for (name, value) in common {
            out.insert(
                format!("scalar.{name}"),
                Tensor::new(&[value], &Device::Cpu)?,
            );
        }
        for (name, values) in self.rule.scalars() {
            out.insert(
                format!("scalar.{name}"),
                Tensor::from_vec(values.clone(), values.len(), &Device::Cpu)?,
            );
        }
        Ok(out)
    }

    fn compare_options(
        &self,
        state: &OptimizerState,
        on_change: OnChange,
    ) -> Result<Vec<ChangedOption>> {
        // Through text, so that both sides have made the same round trip.
        let now: Value = serde_json::from_str(&serde_json::to_string(&self.options()?)?)?;
        let saved: Value = serde_json::from_str(&serde_json::to_string(&state.options)?)?;
        if saved.get("format") != now.get("format") {
            return Err(Error::state(format!(
                "format {}: this version reads format {FORMAT}",
                saved.get("format").unwrap_or(&Value::Null)
            )));
        }
        let mut changes = Vec::new();
        differences("", &saved, &now, &mut changes);
        let structural =
            |c: &ChangedOption| c.option == "algorithm" || c.option.ends_with("params");
        if changes.is_empty() || (on_change == OnChange::UseNew && !changes.iter().any(structural))
        {
            return Ok(changes);
        }
        Err(Error::OptionsChanged { changes })
    }
}

impl<R: Rule> Optimizer for Stepper<R> {
    fn algorithm(&self) -> &'static str {
        R::NAME
    }

    fn step(&mut self, grads: &dyn GradSource) -> Result<StepReport> {
        if self.resting.is_some() {
            return Err(Error::NotTraining { algorithm: R::NAME });
        }
        self.table.set_half(self.options.half_precision);
        self.table.take_grads(grads, self.options.grad_scale)?;
        let report = self.prepare()?;
        let outcome = if report.applied {
            self.skips_in_a_row = 0;
            self.apply()
        } else {
            self.skip(&report)
        };
        self.table.drop_grads();
        outcome.map(|()| report)
    }

    fn groups(&self) -> &[ParamGroup] {
        &self.table.groups
    }

    fn steps(&self) -> u64 {
        self.table.steps
    }

    fn step_options(&self) -> &StepOptions {
        &self.options
    }

    fn set_step_options(&mut self, options: StepOptions) -> Result<()> {
        check_not_negative("max_grad_norm", options.max_grad_norm)?;
        check_positive("grad_scale", options.grad_scale)?;
        check_rounding(&self.table, options.half_precision)?;
        self.options = options;
        Ok(())
    }

    fn set_lr_factor(&mut self, factor: f64) {
        self.table.lr_factors.fill(factor);
    }

    fn set_group_lr_factor(&mut self, group: usize, factor: f64) {
        if let Some(present) = self.table.lr_factors.get_mut(group) {
            *present = factor;
        }
    }

    fn base_lr(&self, group: usize) -> f64 {
        self.table.numbers[group].lr
    }

    fn set_group_lr(&mut self, group: usize, lr: f64) -> Result<()> {
        self.table.set_group_lr(group, lr)
    }

    fn lr(&self, group: usize) -> f64 {
        self.table.lr(group)
    }

    fn effective_lr(&self, group: usize) -> f64 {
        let rate = self
            .rule
            .shown_lr(group)
            .unwrap_or_else(|| self.table.rate(group));
        rate * self.rule.d(group).unwrap_or(1.0)
    }

    fn report(&self) -> Result<Vec<GroupReport>> {
        let mut out: Vec<GroupReport> = self.table.per_group(|g, _| GroupReport {
            name: self.table.groups[g].name.clone(),
            lr: self.table.lr(g),
            d: self.rule.d(g),
            d_hat: self.rule.d_hat(g),
            effective_lr: self.effective_lr(g),
            distance: None,
            grad_norm: self.group_norms.as_ref().map(|n| n[g]),
        });
        for slot in &self.table.slots {
            if let Some(square) = self.rule.distance(slot)? {
                let sum = out[slot.group].distance.get_or_insert(0.0);
                *sum += square;
            }
        }
        for group in &mut out {
            group.distance = group.distance.map(f64::sqrt);
        }
        Ok(out)
    }

    fn scalars(&self) -> Vec<(&'static str, Vec<f64>)> {
        self.rule.scalars()
    }

    fn weights_changed(&mut self, change: &WeightChange<'_>) -> Result<()> {
        let (name, factor) = match change {
            WeightChange::Scaled { name, factor } => (*name, Some(*factor)),
            WeightChange::Replaced { name } => (*name, None),
        };
        let slot = self.table.slot_mut(name)?;
        if slot.master.is_some() {
            match (factor, slot.half) {
                // The master keeps its extra digits through a scaling.
                (Some(factor), crate::slot::HalfPrecision::Master) => {
                    let scaled = match slot.weights()? {
                        Buffer::Device(t) => Buffer::Device(t.affine(factor, 0.0)?),
                        other => {
                            Buffer::F32(other.f32().iter().map(|x| x * factor as f32).collect())
                        }
                    };
                    slot.set_weights(&scaled)?;
                }
                _ => {
                    slot.master = None;
                    slot.sync_master()?;
                }
            }
        }
        self.rule.weights_changed(&self.config, slot, factor)
    }

    fn set_training(&mut self, on: bool) -> Result<()> {
        if on {
            if let Some(resting) = self.resting.take() {
                for (slot, weights) in self.table.slots.iter_mut().zip(&resting) {
                    slot.set_weights(weights)?;
                }
            }
            return Ok(());
        }
        if self.resting.is_some() {
            return Ok(());
        }
        let mut averaged = Vec::with_capacity(self.table.slots.len());
        for i in 0..self.table.slots.len() {
            averaged.push(self.rule.averaged(&self.config, &self.table, i)?);
        }
        if averaged.iter().all(Option::is_none) {
            return Ok(());
        }
        let mut resting = Vec::with_capacity(averaged.len());
        for (slot, average) in self.table.slots.iter_mut().zip(averaged) {
            resting.push(slot.weights()?);
            if let Some(average) = average {
                slot.set_weights(&average)?;
            }
        }
        self.resting = Some(resting);
        Ok(())
    }

    fn options(&self) -> Result<Value> {
        let groups: Vec<Value> = self.table.per_group(|g, n| {
            let group = &self.table.groups[g];
            let params: Vec<Value> = group.params.iter().map(|(name, var)| json!([name, var.dims()])).collect();
            json!({ "name": group.name, "lr": n.lr, "initial_lr": n.initial_lr, "weight_decay": n.weight_decay,
                    "betas": [n.betas.0, n.betas.1], "eps": n.eps, "multiplier": n.multiplier, "params": params })
        });
        let step = json!({ "max_grad_norm": self.options.max_grad_norm,
                           "check_finite": self.options.check_finite,
                           "half_precision": format!("{:?}", self.options.half_precision) });
        Ok(
            json!({ "format": FORMAT, "algorithm": R::NAME, "config": serde_json::to_value(&self.config)?, "groups": groups, "step": step }),
        )
    }

    fn state(&self) -> Result<OptimizerState> {
        Ok(OptimizerState {
            options: self.options()?,
            tensors: self.tensors()?,
        })
    }

    fn load_state(
        &mut self,
        state: &OptimizerState,
        on_change: OnChange,
    ) -> Result<Vec<ChangedOption>> {
        let changes = self.compare_options(state, on_change)?;
        let scalar = |name: &str| -> Result<Vec<f64>> {
            Ok(state
                .tensor(&format!("scalar.{name}"))?
                .to_dtype(DType::F64)?
                .to_vec1()?)
        };
        let one = |name: &str| -> Result<f64> {
            scalar(name)?
                .first()
                .copied()
                .ok_or_else(|| Error::state(format!("scalar.{name} is empty")))
        };
        // Everything is read before anything is changed.
        let (steps, skipped, in_a_row) = (one("steps")?, one("skipped")?, one("skips_in_a_row")?);
        let mut scalars = Vec::new();
        for (name, present) in self.rule.scalars() {
            let values = scalar(name)?;
            if values.len() != present.len() {
                return Err(Error::state(format!(
                    "scalar.{name} has {} values, expected {}",
                    values.len(),
                    present.len()
                )));
            }
            scalars.push(values);
        }
        let mut slots = Vec::with_capacity(self.table.slots.len());
        for slot in &self.table.slots {
            let weight = state.tensor(&format!("weight.{}", slot.name))?;
            if weight.dims() != slot.dims() {
                return Err(Error::Shape {
                    what: "weight".into(),
                    name: slot.name.clone(),
                    expected: slot.dims().to_vec(),
                    got: weight.dims().to_vec(),
                });
            }
            let count = state
                .tensor(&format!("step.{}", slot.name))?
                .to_vec1::<i64>()?;
            let count = count.first().copied().and_then(|c| u64::try_from(c).ok());
            let count =
                count.ok_or_else(|| Error::state(format!("step.{} is not a count", slot.name)))?;
            let mut buffers = Vec::with_capacity(R::BUFFERS.len());
            for kind in R::BUFFERS {
                let tensor = state.tensors.get(&format!("state.{}.{kind}", slot.name));
                buffers.push(tensor.map(|t| from_tensor(t, slot)).transpose()?);
            }
            slots.push((from_tensor(weight, slot)?, count, buffers));
        }
        for (slot, (weight, count, buffers)) in self.table.slots.iter_mut().zip(slots) {
            slot.master = None;
            slot.set_weights(&weight)?;
            slot.steps = count;
            slot.buffers = buffers;
        }
        self.rule.set_scalars(&scalars);
        (self.table.steps, self.skipped, self.skips_in_a_row) =
            (steps as u64, skipped as u64, in_a_row as u64);
        self.resting = None;
        Ok(changes)
    }

    fn use_plain_operations(&mut self) -> Result<()> {
        if self.table.steps > 0 {
            return Err(Error::Combination {
                what: format!(
                    "plain operations and {} after {} steps",
                    R::NAME,
                    self.table.steps
                ),
                instead: "choose before the first step",
            });
        }
        self.table.slots.iter_mut().for_each(|s| s.plain = true);
        check_rounding(&self.table, self.options.half_precision)
    }
}

/// Stochastic rounding works on the fused CPU path only.
fn check_rounding(table: &Table, half: HalfPrecision) -> Result<()> {
    let stochastic = matches!(half, HalfPrecision::Stochastic { .. });
    let concerned = |slot: &Slot| slot.plain && slot.var.dtype() != DType::F32;
    match table
        .slots
        .iter()
        .find(|slot| stochastic && concerned(slot))
    {
        None => Ok(()),
        Some(slot) => Err(Error::Combination {
            what: format!("stochastic rounding of {} on this device", slot.name),
            instead: "HalfPrecision::Master, which loses nothing",
        }),
    }
}

fn to_tensor(buffer: &Buffer, dims: &[usize]) -> Result<Tensor> {
    let shaped = |len: usize| {
        if len == dims.iter().product::<usize>() {
            dims.to_vec()
        } else {
            vec![len]
        }
    };
    Ok(match buffer {
        Buffer::F32(v) => Tensor::from_slice(v, shaped(v.len()), &Device::Cpu)?,
        Buffer::Bf16(v) => {
            Tensor::from_slice(v, shaped(v.len()), &Device::Cpu)?.to_dtype(DType::BF16)?
        }
        Buffer::U8(v) => Tensor::from_slice(v, shaped(v.len()), &Device::Cpu)?,
        Buffer::Device(t) => t
            .to_device(&Device::Cpu)?
            .copy()?
            .reshape(shaped(t.elem_count()))?,
    })
}

fn from_tensor(tensor: &Tensor, slot: &crate::slot::Slot) -> Result<Buffer> {
    if slot.plain {
        return Ok(Buffer::Device(tensor.to_device(slot.var.device())?.copy()?));
    }
    let flat = tensor.flatten_all()?;
    Ok(match flat.dtype() {
        DType::U8 => Buffer::U8(flat.to_vec1()?),
        DType::BF16 => Buffer::Bf16(flat.to_dtype(DType::F32)?.to_vec1()?),
        _ => Buffer::F32(flat.to_dtype(DType::F32)?.to_vec1()?),
    })
}
