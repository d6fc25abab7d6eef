//! sd-scripts' `optimizer_type` and `optimizer_args`.

use serde_json::{Map, Value};

use super::parse_args;
use crate::error::{Error, Result, check_not_negative};
use crate::group::ParamGroup;
use crate::optimizer::Optimizer;
use crate::registry::from_reference;

/// The values of `optimizer_type` that work here. Short names are compared without case;
/// class paths as written.
pub const OPTIMIZER_TYPES: [&str; 22] = [
    "AdamW",
    "AdamW8bit",
    "PagedAdamW",
    "PagedAdamW32bit",
    "PagedAdamW8bit",
    "Lion",
    "Lion8bit",
    "PagedLion8bit",
    "SGDNesterov",
    "DAdaptation",
    "DAdaptAdam",
    "DAdaptAdamPreprint",
    "Prodigy",
    "AdaFactor",
    "AdamWScheduleFree",
    "RAdamScheduleFree",
    "SGDScheduleFree",
    "Adam",
    "SGD",
    "prodigyplus.ProdigyPlusScheduleFree",
    "pytorch_optimizer.CAME",
    "came_pytorch.CAME",
];

/// What sd-scripts knows beside the type and its arguments.
///
/// | name | default | meaning |
/// |---|---|---|
/// | `optimizer_type` | "" | empty means AdamW |
/// | `optimizer_args` | empty | `key=value`, see [`parse_args`] |
/// | `learning_rate` | 2e-6 | for groups without their own |
/// | `prodigy_betas` | (0.9, 0.999) | Prodigy's betas when the arguments have none: what sd-scripts would use. Most users of diffusion models write `betas=0.9,0.99`, the default of [`crate::ProdigyConfig`] |
#[derive(Debug, Clone, PartialEq)]
pub struct KohyaOptimizer {
    /// The algorithm.
    pub optimizer_type: String,
    /// Its arguments.
    pub optimizer_args: Vec<String>,
    /// Learning rate of groups without their own.
    pub learning_rate: f64,
    /// Prodigy's betas when the arguments have none.
    pub prodigy_betas: (f64, f64),
}

impl Default for KohyaOptimizer {
    fn default() -> Self {
        Self {
            optimizer_type: String::new(),
            optimizer_args: Vec::new(),
            learning_rate: 2e-6,
            prodigy_betas: (0.9, 0.999),
        }
    }
}

impl KohyaOptimizer {
    /// Builds the optimizer.
    ///
    /// # Errors
    /// An unknown type or argument, with what exists; a type of the field that is not
    /// implemented, with the alternative; and everything the optimizer itself refuses.
    pub fn build(&self, mut groups: Vec<ParamGroup>) -> Result<Box<dyn Optimizer>> {
        check_not_negative("learning_rate", self.learning_rate)?;
        let name = class_name(&self.optimizer_type)?;
        let mut options = parse_args(&self.optimizer_args)?;
        let lower = self.optimizer_type.to_lowercase();
        if name == "Adafactor" && relative(&mut options) {
            // sd-scripts: the rate comes from the optimizer, group rates are dropped.
            groups.iter_mut().for_each(|g| g.lr = None);
            options.remove("lr");
        } else {
            options
                .entry("lr")
                .or_insert(Value::from(self.learning_rate));
        }
        if lower == "sgdnesterov" {
            options.entry("momentum").or_insert(Value::from(0.9));
            options.insert("nesterov".into(), Value::Bool(true));
        }
        if name == "Prodigy" {
            let (b1, b2) = self.prodigy_betas;
            options.entry("betas").or_insert(Value::from(vec![b1, b2]));
        }
        from_reference(name, &options, groups)
    }

    /// True when the optimizer brings its own schedule and sd-scripts ignores
    /// `lr_scheduler`: schedule-free ones and Adafactor with `relative_step`.
    ///
    /// # Errors
    /// As [`KohyaOptimizer::build`] for the type and the arguments.
    pub fn has_own_schedule(&self) -> Result<bool> {
        let name = class_name(&self.optimizer_type)?;
        Ok(name.ends_with("ScheduleFree")
            || (name == "Adafactor" && relative(&mut parse_args(&self.optimizer_args)?)))
    }

    /// True when learning rates should be 1 because the step size is estimated.
    ///
    /// # Errors
    /// As [`KohyaOptimizer::build`] for the type.
    pub fn estimates_step_size(&self) -> Result<bool> {
        let name = class_name(&self.optimizer_type)?;
        Ok(name.starts_with("Prodigy") || name.starts_with("DAdapt"))
    }
}

/// Adafactor's `relative_step`, true unless said otherwise; `warmup_init` turns it on.
fn relative(options: &mut Map<String, Value>) -> bool {
    let says = |key: &str| options.get(key).and_then(Value::as_bool);
    let relative = says("relative_step").unwrap_or(true) || says("warmup_init") == Some(true);
    options.insert("relative_step".into(), Value::Bool(relative));
    relative
}

/// The reference's class behind an `optimizer_type`.
fn class_name(optimizer_type: &str) -> Result<&'static str> {
    let short = match optimizer_type.to_lowercase().as_str() {
        "" | "adamw" | "pagedadamw" | "pagedadamw32bit" => "AdamW",
        "adamw8bit" | "pagedadamw8bit" => "AdamW8bit",
        "lion" => "Lion",
        "lion8bit" | "pagedlion8bit" => "Lion8bit",
        "sgdnesterov" => "SGD",
        "dadaptation" | "dadaptadampreprint" => "DAdaptAdamPreprint",
        "dadaptadam" => "DAdaptAdam",
        "prodigy" => "Prodigy",
        "adafactor" => "Adafactor",
        "adamwschedulefree" => "AdamWScheduleFree",
        "radamschedulefree" => "RAdamScheduleFree",
        "sgdschedulefree" => "SGDScheduleFree",
        "dadaptadagrad" | "dadaptadan" | "dadaptadanip" | "dadaptlion" | "dadaptsgd" => {
            return Err(refuse(optimizer_type, "use DAdaptAdam or Prodigy"));
        }
        "sgdnesterov8bit" => {
            return Err(refuse(
                optimizer_type,
                "use SGDNesterov, whose state is one 32-bit number per value",
            ));
        }
        _ => "",
    };
    if !short.is_empty() {
        return Ok(short);
    }
    match optimizer_type {
        "Adam" | "torch.optim.Adam" => Ok("Adam"),
        "torch.optim.AdamW" => Ok("AdamW"),
        "SGD" | "torch.optim.SGD" => Ok("SGD"),
        "prodigyopt.Prodigy" => Ok("Prodigy"),
        "lion_pytorch.Lion" => Ok("Lion"),
        "dadaptation.DAdaptAdam" => Ok("DAdaptAdam"),
        "dadaptation.experimental.DAdaptAdamPreprint" => Ok("DAdaptAdamPreprint"),
        "bitsandbytes.optim.AdamW8bit" => Ok("AdamW8bit"),
        "bitsandbytes.optim.Lion8bit" => Ok("Lion8bit"),
        "transformers.optimization.Adafactor" => Ok("Adafactor"),
        "schedulefree.AdamWScheduleFree" => Ok("AdamWScheduleFree"),
        "schedulefree.RAdamScheduleFree" => Ok("RAdamScheduleFree"),
        "schedulefree.SGDScheduleFree" => Ok("SGDScheduleFree"),
        "ProdigyPlusScheduleFree"
        | "prodigyplus.ProdigyPlusScheduleFree"
        | "prodigyplus.prodigy_plus_schedulefree.ProdigyPlusScheduleFree" => {
            Ok("ProdigyPlusScheduleFree")
        }
        "CAME"
        | "came_pytorch.CAME"
        | "pytorch_optimizer.CAME"
        | "LoraEasyCustomOptimizer.came.CAME" => Ok("CAME"),
        other => Err(Error::unknown("optimizer_type", other, &OPTIMIZER_TYPES)),
    }
}

fn refuse(name: &str, instead: &'static str) -> Error {
    Error::NotImplemented {
        name: name.to_string(),
        instead,
    }
}

/// Builds an optimizer from sd-scripts' words; see [`KohyaOptimizer`] for more settings.
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use lora_optim::{Optimizer, ParamGroup, kohya::from_kohya};
/// let var = Var::zeros(4, DType::F32, &Device::Cpu)?;
/// let groups = vec![ParamGroup::new("unet", vec![("w".into(), var)])];
/// let args = ["betas=0.9,0.99".to_string(), "weight_decay=0.01".to_string()];
/// let optimizer = from_kohya("Prodigy", &args, 1.0, groups)?;
/// assert_eq!(optimizer.algorithm(), "Prodigy");
/// # Ok::<(), lora_optim::Error>(())
/// ```
///
/// # Errors
/// As [`KohyaOptimizer::build`].
pub fn from_kohya(
    optimizer_type: &str,
    optimizer_args: &[String],
    learning_rate: f64,
    groups: Vec<ParamGroup>,
) -> Result<Box<dyn Optimizer>> {
    let options = KohyaOptimizer {
        optimizer_type: optimizer_type.to_string(),
        optimizer_args: optimizer_args.to_vec(),
        learning_rate,
        ..Default::default()
    };
    options.build(groups)
}
