//! A running average of the weights beside the training.
//!
//! `shadow = shadow - (1 - decay) * (shadow - p)`, kept in f32. With update number n from
//! 1 and `j = max(0, n - update_after_step - 1)` the decay is 0 while j is 0 (the shadow
//! is a copy), then `(1 + j) / (10 + j)`, or `1 - (1 + j / inv_gamma)^-power` with
//! `use_ema_warmup`, held between `min_decay` and `decay`. As diffusers' `EMAModel`;
//! OneTrainer's is [`EmaConfig::one_trainer`].

use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, check, check_positive};

/// Options of [`Ema`].
///
/// | name | default | meaning | range |
/// |---|---|---|---|
/// | `decay` | 0.9999 | largest decay | [0, 1] |
/// | `min_decay` | 0 | smallest decay once averaging has begun | [0, 1] |
/// | `update_after_step` | 0 | updates before averaging begins | |
/// | `use_ema_warmup` | false | grow the decay by the power law | |
/// | `inv_gamma` | 1 | its time scale | above 0 |
/// | `power` | 2/3 | its power | above 0 |
/// | `update_every` | 1 | updates that count, every so many calls | 1 or more |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmaConfig {
    /// Largest decay.
    pub decay: f64,
    /// Smallest decay.
    pub min_decay: f64,
    /// Updates before averaging begins.
    pub update_after_step: u64,
    /// Grow the decay by the power law.
    pub use_ema_warmup: bool,
    /// Time scale of the power law.
    pub inv_gamma: f64,
    /// Power of the power law.
    pub power: f64,
    /// Calls per update.
    pub update_every: u64,
}

impl Default for EmaConfig {
    fn default() -> Self {
        Self {
            decay: 0.9999,
            min_decay: 0.0,
            update_after_step: 0,
            use_ema_warmup: false,
            inv_gamma: 1.0,
            power: 2.0 / 3.0,
            update_every: 1,
        }
    }
}

impl EmaConfig {
    /// OneTrainer's defaults: decay at most 0.999, an update every fifth step.
    pub fn one_trainer() -> Self {
        Self {
            decay: 0.999,
            update_every: 5,
            ..Default::default()
        }
    }

    /// Checks every number.
    ///
    /// # Errors
    /// [`Error::Option`] naming the first bad one.
    pub fn validate(&self) -> Result<()> {
        check(
            (0.0..=1.0).contains(&self.decay),
            "decay",
            self.decay,
            "a number from 0 to 1",
        )?;
        check(
            (0.0..=1.0).contains(&self.min_decay),
            "min_decay",
            self.min_decay,
            "a number from 0 to 1",
        )?;
        check_positive("inv_gamma", self.inv_gamma)?;
        check_positive("power", self.power)?;
        check(
            self.update_every > 0,
            "update_every",
            self.update_every,
            "1 or more",
        )
    }

    /// Decay of call number `call`, from 1. Pure, so a resume needs the number only.
    pub fn decay_at(&self, call: u64) -> f64 {
        let j = call
            .saturating_sub(self.update_after_step)
            .saturating_sub(1) as f64;
        if j <= 0.0 {
            return 0.0;
        }
        let decay = if self.use_ema_warmup {
            1.0 - (1.0 + j / self.inv_gamma).powf(-self.power)
        } else {
            (1.0 + j) / (10.0 + j)
        };
        decay.min(self.decay).max(self.min_decay)
    }
}

/// A running average of named parameters.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora_optim::{Ema, EmaConfig};
/// let w = Var::from_tensor(&Tensor::new(&[0f32], &Device::Cpu)?)?;
/// let params = vec![("w".to_string(), w.clone())];
/// let mut ema = Ema::new(&params, EmaConfig::default())?;
/// ema.update()?; // the first update copies
/// w.set(&Tensor::new(&[11f32], &Device::Cpu)?)?;
/// ema.update()?; // decay 2 / 11
/// assert_eq!(ema.shadow()["w"].to_vec1::<f32>()?, [9.0]);
/// # Ok::<(), lora_optim::Error>(())
/// ```
#[derive(Debug)]
pub struct Ema {
    config: EmaConfig,
    params: Vec<(String, Var)>,
    shadow: BTreeMap<String, Tensor>,
    calls: u64,
    resting: Option<Vec<Tensor>>,
}

impl Ema {
    /// Starts with a copy of the parameters.
    ///
    /// # Errors
    /// Options out of range, or a failed tensor operation.
    pub fn new(params: &[(String, Var)], config: EmaConfig) -> Result<Self> {
        config.validate()?;
        let mut shadow = BTreeMap::new();
        for (name, var) in params {
            if shadow
                .insert(
                    name.clone(),
                    var.as_detached_tensor().to_dtype(DType::F32)?.copy()?,
                )
                .is_some()
            {
                return Err(Error::DuplicateParameter { name: name.clone() });
            }
        }
        Ok(Self {
            config,
            params: params.to_vec(),
            shadow,
            calls: 0,
            resting: None,
        })
    }

    /// Takes the present weights into the average; call it after every optimizer step.
    /// Returns the decay used, `None` when this call does not count.
    ///
    /// # Errors
    /// A failed tensor operation.
    pub fn update(&mut self) -> Result<Option<f64>> {
        self.calls += 1;
        if !self.calls.is_multiple_of(self.config.update_every) {
            return Ok(None);
        }
        let decay = self.config.decay_at(self.calls);
        for (name, var) in &self.params {
            let p = var.as_detached_tensor().to_dtype(DType::F32)?;
            if let Some(shadow) = self.shadow.get_mut(name) {
                *shadow = (&*shadow - (&*shadow - p)?.affine(1.0 - decay, 0.0)?)?;
            }
        }
        Ok(Some(decay))
    }

    /// The averaged weights by name, in f32.
    pub fn shadow(&self) -> &BTreeMap<String, Tensor> {
        &self.shadow
    }

    /// Puts the averaged weights into the parameters (`true`) to save and sample, or the
    /// trained ones back (`false`). No bit of the trained weights changes.
    ///
    /// # Errors
    /// A failed tensor operation.
    pub fn swap_in(&mut self, averaged: bool) -> Result<()> {
        match (averaged, self.resting.take()) {
            (true, None) => {
                let mut resting = Vec::with_capacity(self.params.len());
                for (name, var) in &self.params {
                    resting.push(var.as_detached_tensor().copy()?);
                    if let Some(shadow) = self.shadow.get(name) {
                        var.set(&shadow.to_dtype(var.dtype())?)?;
                    }
                }
                self.resting = Some(resting);
            }
            (false, Some(resting)) => {
                for ((_, var), trained) in self.params.iter().zip(resting) {
                    var.set(&trained)?;
                }
            }
            (_, resting) => self.resting = resting,
        }
        Ok(())
    }

    /// The average and its counter, to be saved: `ema.NAME` and `ema_calls`.
    ///
    /// # Errors
    /// A failed tensor operation.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut out = BTreeMap::new();
        for (name, shadow) in &self.shadow {
            out.insert(
                format!("ema.{name}"),
                shadow.to_device(&candle_core::Device::Cpu)?.copy()?,
            );
        }
        out.insert(
            "ema_calls".into(),
            Tensor::new(&[self.calls as i64], &candle_core::Device::Cpu)?,
        );
        Ok(out)
    }

    /// Goes on from [`Ema::state`].
    ///
    /// # Errors
    /// A missing tensor or another shape; then nothing is changed.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let get = |name: &str| {
            state.get(name).ok_or_else(|| Error::Missing {
                what: "tensor",
                name: name.to_string(),
            })
        };
        let calls = get("ema_calls")?
            .to_vec1::<i64>()?
            .first()
            .copied()
            .and_then(|c| u64::try_from(c).ok());
        let calls = calls.ok_or_else(|| Error::state("ema_calls is not a count"))?;
        let mut shadow = BTreeMap::new();
        for (name, present) in &self.shadow {
            let saved = get(&format!("ema.{name}"))?;
            if saved.dims() != present.dims() {
                return Err(Error::Shape {
                    what: "average".into(),
                    name: name.clone(),
                    expected: present.dims().to_vec(),
                    got: saved.dims().to_vec(),
                });
            }
            shadow.insert(
                name.clone(),
                saved.to_device(present.device())?.to_dtype(DType::F32)?,
            );
        }
        (self.shadow, self.calls) = (shadow, calls);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_trainer_counts_every_fifth_step() {
        let config = EmaConfig::one_trainer();
        // At its step 4 (the fifth) the decay is (1 + 4) / (10 + 4).
        assert_eq!(config.decay_at(5), 5.0 / 14.0);
    }
}
