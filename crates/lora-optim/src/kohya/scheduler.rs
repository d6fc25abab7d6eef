//! sd-scripts' `lr_scheduler`, `lr_scheduler_type` and their numbers.

use serde_json::{Map, Value};

use super::parse_args;
use crate::error::{Error, Result, check};
use crate::schedule::{
    Constant, Cosine, CosineAnnealing, CosineRestarts, CycleShape, InverseSqrt, Linear, LrSchedule,
    OneCycle, PeakDecayCycles, Piecewise, Polynomial, RampShape, WarmRestarts, Warmup,
    WarmupStableDecay,
};

/// The values of `lr_scheduler` and, from `CosineAnnealingLR` on, `lr_scheduler_type`.
pub const SCHEDULERS: [&str; 15] = [
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "OneCycleLR",
    "LoraEasyCustomOptimizer.CosineAnnealingWarmRestarts.CosineAnnealingWarmRestarts",
    "LoraEasyCustomOptimizer.RexAnnealingWarmRestarts.RexAnnealingWarmRestarts",
];

/// sd-scripts' schedule options.
///
/// | name | default | meaning |
/// |---|---|---|
/// | `lr_scheduler` | "constant" | name of the schedule |
/// | `lr_scheduler_type` | "" | class name; wins over `lr_scheduler`, and needs warm-up 0 |
/// | `lr_scheduler_args` | empty | `key=value` for the class and for `piecewise_constant` |
/// | `max_train_steps` | 1600 | optimizer steps of the whole run |
/// | `lr_warmup_steps` | 0 | a count from 1 on, below 1 a share of all steps |
/// | `lr_decay_steps` | 0 | likewise, for `warmup_stable_decay` |
/// | `lr_scheduler_num_cycles` | 1 | restarts; waves of `cosine_with_min_lr` in halves |
/// | `lr_scheduler_power` | 1 | of `polynomial` |
/// | `lr_scheduler_timescale` | none | of `inverse_sqrt`; none is the warm-up, or 10000 |
/// | `lr_scheduler_min_lr_ratio` | none | lowest factor; needed by `cosine_with_min_lr` |
/// | `learning_rate` | 2e-6 | reference rate of `polynomial` |
///
/// ```
/// use lora_optim::kohya::KohyaScheduler;
/// let options = KohyaScheduler { lr_scheduler: "cosine".into(), max_train_steps: 100, lr_warmup_steps: 0.1, ..Default::default() };
/// let schedule = options.build()?;
/// assert_eq!(schedule.factor(5), 0.5); // a warm-up of 10 steps
/// # Ok::<(), lora_optim::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct KohyaScheduler {
    /// Name of the schedule.
    pub lr_scheduler: String,
    /// Class name of the schedule.
    pub lr_scheduler_type: String,
    /// Arguments of the class.
    pub lr_scheduler_args: Vec<String>,
    /// Optimizer steps of the whole run.
    pub max_train_steps: u64,
    /// Steps of the warm-up, or their share.
    pub lr_warmup_steps: f64,
    /// Steps of the decay, or their share.
    pub lr_decay_steps: f64,
    /// Restarts.
    pub lr_scheduler_num_cycles: f64,
    /// Power of `polynomial`.
    pub lr_scheduler_power: f64,
    /// Time scale of `inverse_sqrt`.
    pub lr_scheduler_timescale: Option<f64>,
    /// Lowest factor.
    pub lr_scheduler_min_lr_ratio: Option<f64>,
    /// Main learning rate.
    pub learning_rate: f64,
}

impl Default for KohyaScheduler {
    fn default() -> Self {
        Self {
            lr_scheduler: "constant".into(),
            lr_scheduler_type: String::new(),
            lr_scheduler_args: Vec::new(),
            max_train_steps: 1600,
            lr_warmup_steps: 0.0,
            lr_decay_steps: 0.0,
            lr_scheduler_num_cycles: 1.0,
            lr_scheduler_power: 1.0,
            lr_scheduler_timescale: None,
            lr_scheduler_min_lr_ratio: None,
            learning_rate: 2e-6,
        }
    }
}

/// End of sd-scripts' polynomial schedule.
const POLYNOMIAL_END: f64 = 1e-7;

impl KohyaScheduler {
    /// The schedule.
    ///
    /// # Errors
    /// An unknown name or argument, with what exists; a warm-up with `constant` or a class;
    /// a missing `lr_scheduler_min_lr_ratio`.
    pub fn build(&self) -> Result<Box<dyn LrSchedule>> {
        let total = self.max_train_steps;
        let warmup = self.steps("lr_warmup_steps", self.lr_warmup_steps)?;
        let after = total.saturating_sub(warmup);
        let args = parse_args(&self.lr_scheduler_args)?;
        if !self.lr_scheduler_type.is_empty() {
            check(
                warmup == 0,
                "lr_warmup_steps",
                warmup,
                "0 with lr_scheduler_type",
            )?;
            return class(&self.lr_scheduler_type, args);
        }
        if self.lr_scheduler != "piecewise_constant" {
            // Warm-up, cycles and power have options of their own.
            if let Some(key) = args.keys().next() {
                return Err(Error::Argument {
                    argument: format!("lr_scheduler_args: {key}"),
                    problem: format!(
                        "lr_scheduler {} takes none: leave it out, or give the class as lr_scheduler_type",
                        self.lr_scheduler
                    ),
                });
            }
        }
        let waves = self.lr_scheduler_num_cycles / 2.0;
        let body: Box<dyn LrSchedule> = match self.lr_scheduler.as_str() {
            "constant" => {
                check(
                    warmup == 0,
                    "lr_warmup_steps",
                    warmup,
                    "0 with constant; constant_with_warmup has a warm-up",
                )?;
                Box::new(Constant)
            }
            "constant_with_warmup" => Box::new(Constant),
            "linear" => Box::new(Linear { total: after }),
            "cosine" => Box::new(Cosine {
                hold: false,
                ..Cosine::new(after)
            }),
            "cosine_with_restarts" => Box::new(CosineRestarts {
                total: after,
                cycles: self.lr_scheduler_num_cycles,
            }),
            "polynomial" => {
                let body = Polynomial {
                    total: after,
                    power: self.lr_scheduler_power,
                    end_lr: POLYNOMIAL_END,
                    reference_lr: self.learning_rate,
                };
                body.validate()?;
                Box::new(body)
            }
            "inverse_sqrt" => {
                let default = if warmup > 0 { warmup as f64 } else { 10_000.0 };
                Box::new(InverseSqrt {
                    timescale: self
                        .lr_scheduler_timescale
                        .filter(|t| *t > 0.0)
                        .unwrap_or(default),
                })
            }
            "cosine_with_min_lr" => {
                let min = self.lr_scheduler_min_lr_ratio;
                let min = min.ok_or_else(|| {
                    Error::option(
                        "lr_scheduler_min_lr_ratio",
                        min,
                        "a number with cosine_with_min_lr",
                    )
                })?;
                Box::new(Cosine {
                    total: after,
                    waves,
                    min,
                    hold: false,
                })
            }
            "warmup_stable_decay" => {
                let decay = self.steps("lr_decay_steps", self.lr_decay_steps)?;
                return Ok(Box::new(WarmupStableDecay {
                    warmup,
                    stable: after.saturating_sub(decay),
                    decay,
                    warmup_shape: RampShape::Linear,
                    decay_shape: RampShape::Cosine,
                    min: self.lr_scheduler_min_lr_ratio.unwrap_or(0.0),
                    waves,
                }));
            }
            "piecewise_constant" => {
                let args = Arguments::new("piecewise_constant", args, &["step_rules"])?;
                return Ok(Box::new(args.text("step_rules")?.parse::<Piecewise>()?));
            }
            "adafactor" => {
                return Err(Error::NotImplemented {
                    name: "lr_scheduler adafactor".into(),
                    instead: "Adafactor with relative_step brings its own rate: use constant",
                });
            }
            other => return Err(Error::unknown("lr_scheduler", other, &SCHEDULERS)),
        };
        Ok(if warmup > 0 {
            Box::new(Warmup {
                steps: warmup,
                body,
            })
        } else {
            body
        })
    }

    /// A count, or below 1 a share of all steps, rounded down.
    fn steps(&self, option: &'static str, value: f64) -> Result<u64> {
        check(
            value.is_finite() && value >= 0.0,
            option,
            value,
            "a number of steps, or below 1 a share of all",
        )?;
        Ok(if value < 1.0 {
            (value * self.max_train_steps as f64) as u64
        } else {
            value as u64
        })
    }
}

/// A schedule by class name.
fn class(name: &str, args: Map<String, Value>) -> Result<Box<dyn LrSchedule>> {
    match name
        .strip_prefix("torch.optim.lr_scheduler.")
        .unwrap_or(name)
    {
        "CosineAnnealingLR" => {
            let args = Arguments::new(name, args, &["T_max", "eta_min"])?;
            let half_period = args.count("T_max", None)?;
            Ok(Box::new(CosineAnnealing {
                half_period,
                min_lr: args.number("eta_min", Some(0.0))?,
            }))
        }
        "CosineAnnealingWarmRestarts" => {
            let args = Arguments::new(name, args, &["T_0", "T_mult", "eta_min"])?;
            let first = args.count("T_0", None)?;
            Ok(Box::new(WarmRestarts {
                first,
                growth: args.count("T_mult", Some(1))?,
                min_lr: args.number("eta_min", Some(0.0))?,
            }))
        }
        "OneCycleLR" => one_cycle(name, args),
        "LoraEasyCustomOptimizer.CosineAnnealingWarmRestarts.CosineAnnealingWarmRestarts" => {
            cycles(name, args, false)
        }
        "LoraEasyCustomOptimizer.RexAnnealingWarmRestarts.RexAnnealingWarmRestarts" => {
            cycles(name, args, true)
        }
        other => Err(Error::unknown(
            "lr_scheduler_type",
            other,
            &SCHEDULERS[10..],
        )),
    }
}

fn one_cycle(name: &str, args: Map<String, Value>) -> Result<Box<dyn LrSchedule>> {
    let known = [
        "max_lr",
        "total_steps",
        "pct_start",
        "anneal_strategy",
        "div_factor",
        "final_div_factor",
        "three_phase",
        "cycle_momentum",
    ];
    let mut args = Arguments::new(name, args, &known)?;
    let strategy = args
        .fields
        .remove("anneal_strategy")
        .unwrap_or(Value::from("cos"));
    let linear = match strategy.as_str() {
        Some("cos") => false,
        Some("linear") => true,
        _ => {
            return Err(Error::Argument {
                argument: format!("anneal_strategy={strategy}"),
                problem: "expected 'cos' or 'linear'".into(),
            });
        }
    };
    Ok(Box::new(OneCycle {
        total: args.count("total_steps", None)?,
        max_lr: Some(args.number("max_lr", None)?),
        rise: args.number("pct_start", Some(0.3))?,
        start_divisor: args.number("div_factor", Some(25.0))?,
        end_divisor: args.number("final_div_factor", Some(1e4))?,
        three_phases: args.fields.remove("three_phase") == Some(Value::Bool(true)),
        linear,
    }))
}

fn cycles(name: &str, args: Map<String, Value>, rex: bool) -> Result<Box<dyn LrSchedule>> {
    let mut known = vec![
        "gamma",
        "cycle_multiplier",
        "first_cycle_max_steps",
        "min_lr",
        "warmup_steps",
    ];
    if rex {
        known.push("d");
    }
    let args = Arguments::new(name, args, &known)?;
    let (first, warmup) = (
        args.count("first_cycle_max_steps", None)?,
        args.count("warmup_steps", Some(0))?,
    );
    check(
        warmup < first,
        "warmup_steps",
        warmup,
        "less than first_cycle_max_steps",
    )?;
    Ok(Box::new(PeakDecayCycles {
        first,
        warmup,
        growth: args.number("cycle_multiplier", Some(1.0))?,
        gamma: args.number("gamma", Some(1.0))?,
        min_lr: args.number("min_lr", Some(1e-6))?,
        shape: if rex {
            CycleShape::Rex(args.number("d", Some(0.9))?)
        } else {
            CycleShape::Cosine
        },
    }))
}

/// Arguments of one class, each taken once.
struct Arguments {
    class: String,
    fields: Map<String, Value>,
}

impl Arguments {
    fn new(class: &str, fields: Map<String, Value>, known: &[&str]) -> Result<Self> {
        match fields.keys().find(|k| !known.contains(&k.as_str())) {
            Some(key) => Err(Error::unknown(format!("argument of {class}"), key, known)),
            None => Ok(Self {
                class: class.to_string(),
                fields,
            }),
        }
    }

    fn wrong(&self, key: &str, form: &str) -> Error {
        let found = self
            .fields
            .get(key)
            .map_or("missing".to_string(), Value::to_string);
        Error::Argument {
            argument: format!("{}: {key}", self.class),
            problem: format!("expected {form}, found {found}"),
        }
    }

    fn number(&self, key: &str, default: Option<f64>) -> Result<f64> {
        match (
            self.fields.get(key).and_then(Value::as_f64),
            self.fields.contains_key(key),
            default,
        ) {
            (Some(number), ..) => Ok(number),
            (None, false, Some(default)) => Ok(default),
            _ => Err(self.wrong(key, "a number")),
        }
    }

    fn count(&self, key: &str, default: Option<u64>) -> Result<u64> {
        match (
            self.fields.get(key).and_then(Value::as_u64),
            self.fields.contains_key(key),
            default,
        ) {
            (Some(count), ..) if count > 0 || default == Some(0) => Ok(count),
            (None, false, Some(default)) => Ok(default),
            _ => Err(self.wrong(key, "a whole number of steps")),
        }
    }

    fn text(&self, key: &str) -> Result<String> {
        match self.fields.get(key).and_then(Value::as_str) {
            Some(text) => Ok(text.to_string()),
            None => Err(self.wrong(key, "a quoted text")),
        }
    }
}
