//! Optimizers by name, with options as a map: for configuration files and importers.

use serde_json::{Map, Value};

use crate::adafactor::{AdafactorConfig, AdafactorRule};
use crate::adamw::{AdamWConfig, AdamWRule};
use crate::adamw8bit::AdamW8bitRule;
use crate::came::CameRule;
use crate::dadapt::DAdaptRule;
use crate::dadapt_preprint::DAdaptPreprintRule;
use crate::error::{Error, Result};
use crate::group::ParamGroup;
use crate::lion::LionRule;
use crate::lion8bit::Lion8bitRule;
use crate::optimizer::Optimizer;
use crate::prodigy::ProdigyRule;
use crate::prodigy_plus::ProdigyPlusRule;
use crate::schedule_free::{ScheduleFreeBase, ScheduleFreeConfig, ScheduleFreeRule};
use crate::sgd::SgdRule;
use crate::stepper::{Rule, RuleConfig, Stepper};

/// Class names that [`from_reference`] understands.
pub const REFERENCE_NAMES: [&str; 15] = [
    "Adafactor",
    "Adam",
    "AdamW",
    "AdamW8bit",
    "AdamWScheduleFree",
    "CAME",
    "DAdaptAdam",
    "DAdaptAdamPreprint",
    "Lion",
    "Lion8bit",
    "Prodigy",
    "ProdigyPlusScheduleFree",
    "RAdamScheduleFree",
    "SGD",
    "SGDScheduleFree",
];

/// Options of the references that choose an implementation and change no number.
const WITHOUT_EFFECT: [&str; 11] = [
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "fsdp_in_use",
    "log_every",
    "fused_back_pass",
    "factored_fp32",
    "stochastic_rounding",
    "block_wise",
    "percentile_clipping",
];

/// An optimizer by the class name of its reference implementation; options not given have
/// the **reference's** defaults (Prodigy's betas are (0.9, 0.999) here).
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use lora_optim::{Optimizer, ParamGroup, from_reference};
/// let var = Var::zeros(4, DType::F32, &Device::Cpu)?;
/// let groups = vec![ParamGroup::new("all", vec![("w".into(), var)])];
/// let options = serde_json::json!({ "lr": 1e-4, "betas": [0.9, 0.99] });
/// let optimizer = from_reference("AdamW", options.as_object().unwrap(), groups)?;
/// assert_eq!(optimizer.lr(0), 1e-4);
/// # Ok::<(), lora_optim::Error>(())
/// ```
///
/// # Errors
/// An unknown name or option (with the list of known ones), a value of the wrong form, and
/// everything that [`Stepper::new`] refuses.
pub fn from_reference(
    name: &str,
    options: &Map<String, Value>,
    groups: Vec<ParamGroup>,
) -> Result<Box<dyn Optimizer>> {
    match name {
        "AdamW" => build::<AdamWRule>(name, AdamWConfig::reference(), options, groups),
        "Adam" => {
            let adam = AdamWConfig {
                decoupled: false,
                weight_decay: 0.0,
                ..Default::default()
            };
            build::<AdamWRule>(name, adam, options, groups)
        }
        "AdamW8bit" => build::<AdamW8bitRule>(name, RuleConfig::reference(), options, groups),
        "Lion" => build::<LionRule>(name, RuleConfig::reference(), options, groups),
        "Lion8bit" => build::<Lion8bitRule>(name, RuleConfig::reference(), options, groups),
        "SGD" => build::<SgdRule>(name, RuleConfig::reference(), options, groups),
        "Prodigy" => build::<ProdigyRule>(name, RuleConfig::reference(), options, groups),
        "ProdigyPlusScheduleFree" => {
            build::<ProdigyPlusRule>(name, RuleConfig::reference(), options, groups)
        }
        "DAdaptAdam" => build::<DAdaptRule>(name, RuleConfig::reference(), options, groups),
        "DAdaptAdamPreprint" => {
            build::<DAdaptPreprintRule>(name, RuleConfig::reference(), options, groups)
        }
        "AdamWScheduleFree" => {
            build::<ScheduleFreeRule>(name, RuleConfig::reference(), options, groups)
        }
        "RAdamScheduleFree" => {
            let radam = ScheduleFreeConfig {
                base: ScheduleFreeBase::RAdam,
                ..Default::default()
            };
            build::<ScheduleFreeRule>(name, radam, options, groups)
        }
        "SGDScheduleFree" => {
            let sgd = ScheduleFreeConfig {
                base: ScheduleFreeBase::Sgd,
                lr: 1.0,
                ..Default::default()
            };
            build::<ScheduleFreeRule>(name, sgd, &momentum_as_beta(options), groups)
        }
        "Adafactor" => build::<AdafactorRule>(name, AdafactorConfig::reference(), options, groups),
        "CAME" => build::<CameRule>(name, RuleConfig::reference(), options, groups),
        _ => Err(Error::unknown("optimizer", name, &REFERENCE_NAMES)),
    }
}

/// Schedule-free SGD calls its interpolation `momentum`.
fn momentum_as_beta(options: &Map<String, Value>) -> Map<String, Value> {
    let mut options = options.clone();
    if let Some(momentum) = options.remove("momentum") {
        options.insert(
            "betas".into(),
            Value::Array(vec![momentum, Value::from(0.999)]),
        );
    }
    options
}

/// Puts `options` over `base` and builds the optimizer.
fn build<R: Rule + 'static>(
    name: &str,
    base: R::Config,
    options: &Map<String, Value>,
    groups: Vec<ParamGroup>,
) -> Result<Box<dyn Optimizer>> {
    Ok(Box::new(Stepper::<R>::new(
        groups,
        overlay(name, &base, options)?,
    )?))
}

/// `base` with some options replaced.
fn overlay<C: RuleConfig>(name: &str, base: &C, options: &Map<String, Value>) -> Result<C> {
    let Value::Object(mut fields) = serde_json::to_value(base)? else {
        return Err(Error::state("options are not a map"));
    };
    let mut config = base.clone();
    for (key, value) in options {
        if WITHOUT_EFFECT.contains(&key.as_str())
            || (key == "maximize" && *value == Value::Bool(false))
        {
            continue;
        }
        if !fields.contains_key(key) {
            let known: Vec<&str> = fields.keys().map(String::as_str).collect();
            return Err(Error::unknown(format!("option of {name}"), key, &known));
        }
        let before = fields.insert(key.clone(), value.clone());
        config =
            serde_json::from_value(Value::Object(fields.clone())).map_err(|_| Error::Argument {
                argument: format!("{key}={value}"),
                problem: form_expected(value, before.as_ref()),
            })?;
    }
    Ok(config)
}

fn form_expected(value: &Value, default: Option<&Value>) -> String {
    let comma = matches!(value, Value::Array(items) if items.len() == 1);
    let hint = if comma {
        " (a trailing comma makes a list of one)"
    } else {
        ""
    };
    format!(
        "expected a value of the form {}{hint}",
        default.unwrap_or(&Value::Null)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_where_a_number_belongs_names_the_key() {
        let options = serde_json::json!({ "weight_decay": [0.5] });
        let error = overlay(
            "AdamW",
            &AdamWConfig::default(),
            options.as_object().unwrap(),
        )
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("weight_decay=[0.5]") && error.contains("trailing comma"),
            "{error}"
        );
    }

    #[test]
    fn an_unknown_option_lists_the_known_ones() {
        let options = serde_json::json!({ "weight_deacy": 0.5 });
        let error = overlay(
            "AdamW",
            &AdamWConfig::default(),
            options.as_object().unwrap(),
        )
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("did you mean \"weight_decay\"") && error.contains("amsgrad"),
            "{error}"
        );
    }
}
