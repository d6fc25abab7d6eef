//! A small problem and a table of all optimizers: a new one joins with one line.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use lora_optim::{Optimizer, ParamGroup, from_reference};
use serde_json::{Value, json};

/// Name, options, and steps until the problem below must be solved to a tenth.
pub(crate) fn all() -> Vec<(&'static str, Value, usize)> {
    vec![
        ("AdamW", json!({ "lr": 0.05 }), 100),
        ("AdamW", json!({ "lr": 0.05, "amsgrad": true }), 100),
        ("Adam", json!({ "lr": 0.05, "weight_decay": 1e-4 }), 100),
        ("AdamW8bit", json!({ "lr": 0.05, "min_8bit_size": 16 }), 150),
        (
            "SGD",
            json!({ "lr": 0.02, "momentum": 0.9, "nesterov": true }),
            100,
        ),
        ("Lion", json!({ "lr": 0.02 }), 150),
        ("Lion8bit", json!({ "lr": 0.02 }), 150),
        ("Prodigy", json!({ "betas": [0.9, 0.99] }), 300),
        (
            "Prodigy",
            json!({ "betas": [0.9, 0.99], "slice_p": 3, "weight_decay": 1e-3 }),
            300,
        ),
        (
            "Prodigy",
            json!({ "betas": [0.9, 0.99], "exact_displacement": true, "weight_decay": 1e-3 }),
            300,
        ),
        (
            "Prodigy",
            json!({ "betas": [0.0, 0.99], "decouple": false, "weight_decay": 1e-3 }),
            300,
        ),
        ("DAdaptAdam", json!({ "betas": [0.9, 0.99] }), 300),
        ("DAdaptAdamPreprint", json!({ "betas": [0.9, 0.99] }), 300),
        (
            "AdamWScheduleFree",
            json!({ "lr": 0.1, "warmup_steps": 5 }),
            200,
        ),
        (
            "RAdamScheduleFree",
            json!({ "lr": 0.1, "betas": [0.9, 0.99] }),
            300,
        ),
        ("SGDScheduleFree", json!({ "lr": 0.3 }), 200),
        ("ProdigyPlusScheduleFree", json!({ "d0": 1e-3 }), 400),
        (
            "ProdigyPlusScheduleFree",
            json!({ "d0": 1e-3, "use_speed": true, "eps": null }),
            600,
        ),
        (
            "ProdigyPlusScheduleFree",
            json!({ "d0": 1e-3, "use_schedulefree": false }),
            400,
        ),
        (
            "ProdigyPlusScheduleFree",
            json!({ "d0": 1e-3, "use_adopt": true }),
            600,
        ),
        (
            "Adafactor",
            json!({ "lr": 0.05, "relative_step": false, "scale_parameter": false, "beta1": 0.9 }),
            150,
        ),
        ("Adafactor", json!({}), 2000),
        ("CAME", json!({ "lr": 0.02 }), 200),
    ]
}

/// Shapes with a matrix, a tensor of four dimensions, a vector, and one long enough to be
/// split between threads.
const SHAPES: [(&str, &[usize]); 4] = [
    ("a", &[40, 6]),
    ("b", &[3, 4, 3, 3]),
    ("c", &[7]),
    ("long", &[64, 1100]),
];

fn pattern(dims: &[usize], seed: f64, scale: f64) -> Tensor {
    let len: usize = dims.iter().product();
    let values: Vec<f32> = (0..len)
        .map(|i| (((i as f64 + 1.0) * seed * 12.9898).sin() * scale) as f32)
        .collect();
    Tensor::from_vec(values, dims, &Device::Cpu).expect("tensor")
}

/// `sum (w - target)^2 / 2` over some tensors, the gradient disturbed a little in each step.
pub(crate) struct Problem {
    pub(crate) vars: BTreeMap<String, Var>,
    targets: BTreeMap<String, Tensor>,
}

impl Problem {
    /// All tensors, or the small ones only.
    pub(crate) fn new(dtype: DType, long: bool) -> Self {
        let (mut vars, mut targets) = (BTreeMap::new(), BTreeMap::new());
        for (i, (name, dims)) in SHAPES
            .iter()
            .enumerate()
            .filter(|(_, (name, _))| long || *name != "long")
        {
            // "a" starts at zero, like the up matrix of a LoRA.
            let start = pattern(dims, 1.0 + i as f64, if *name == "a" { 0.0 } else { 0.02 });
            vars.insert(
                (*name).to_string(),
                Var::from_tensor(&start.to_dtype(dtype).expect("dtype")).expect("var"),
            );
            targets.insert((*name).to_string(), pattern(dims, 7.0 + i as f64, 0.5));
        }
        Self { vars, targets }
    }

    /// Two groups: "a", and the rest.
    pub(crate) fn groups(&self) -> Vec<ParamGroup> {
        let all = || self.vars.iter().map(|(n, v)| (n.clone(), v.clone()));
        let (first, rest): (Vec<_>, Vec<_>) = all().partition(|(n, _)| n == "a");
        vec![
            ParamGroup::new("first", first),
            ParamGroup::new("rest", rest),
        ]
    }

    pub(crate) fn gradients(&self, step: usize) -> BTreeMap<String, Tensor> {
        let gradient = |(name, var): (&String, &Var)| {
            let w = var.as_detached_tensor().to_dtype(DType::F32).expect("f32");
            let noise = pattern(w.dims(), 1.0 + 0.37 * step as f64, 0.01);
            let grad = ((w - &self.targets[name]).expect("difference") + noise).expect("sum");
            (name.clone(), grad)
        };
        self.vars.iter().map(gradient).collect()
    }

    /// Mean square distance from the target.
    pub(crate) fn distance(&self) -> f64 {
        let mut total = 0.0;
        for (name, var) in &self.vars {
            let w = var.as_detached_tensor().to_dtype(DType::F32).expect("f32");
            let square = (w - &self.targets[name])
                .and_then(|d| d.sqr()?.mean_all()?.to_scalar::<f32>())
                .expect("distance");
            total += f64::from(square);
        }
        total / self.vars.len() as f64
    }

    /// The greatest difference between two weights at the same place.
    pub(crate) fn worst_difference(&self, other: &Self) -> f32 {
        let values = |var: &Var| {
            var.as_detached_tensor()
                .to_dtype(DType::F32)
                .and_then(|t| t.flatten_all()?.to_vec1::<f32>())
                .expect("values")
        };
        let pairs = self.vars.iter().flat_map(|(name, var)| {
            let others = values(&other.vars[name]);
            values(var).into_iter().zip(others)
        });
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    /// The bits of all weights.
    pub(crate) fn bits(&self) -> Vec<Vec<u32>> {
        let bits = |var: &Var| {
            let w = var
                .as_detached_tensor()
                .to_dtype(DType::F32)
                .and_then(|t| t.flatten_all()?.to_vec1::<f32>());
            w.expect("values").into_iter().map(f32::to_bits).collect()
        };
        self.vars.values().map(bits).collect()
    }
}

pub(crate) fn build(name: &str, options: &Value, groups: Vec<ParamGroup>) -> Box<dyn Optimizer> {
    from_reference(name, options.as_object().expect("options"), groups)
        .unwrap_or_else(|e| panic!("{name} {options}: {e}"))
}

/// Steps `from..to`, leaving out the gradient of "c" in every fifth.
pub(crate) fn run(problem: &Problem, optimizer: &mut dyn Optimizer, from: usize, to: usize) {
    for step in from..to {
        let mut grads = problem.gradients(step);
        if step % 5 == 3 {
            grads.remove("c");
        }
        optimizer
            .step(&grads)
            .unwrap_or_else(|e| panic!("{}: {e}", optimizer.algorithm()));
    }
}
