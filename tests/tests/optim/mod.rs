//! Running the golden optimizer cases.

pub(crate) mod compare;
pub(crate) mod utilities;

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};
use lora_optim::{
    Optimizer, OptimizerState, ParamGroup, StepOptions, StepReport, Stream, from_reference,
};
use lora_tests::{Report, golden_json, golden_tensors, values};
use serde_json::Value;

/// The index and all tensor files.
pub(crate) struct Suite {
    index: Value,
    files: BTreeMap<String, BTreeMap<String, Tensor>>,
}

impl Suite {
    pub(crate) fn load() -> Self {
        let index = golden_json("optim", "index.json");
        let mut names: Vec<String> = index["cases"]
            .as_array()
            .expect("cases")
            .iter()
            .map(|c| text(&c["file"]))
            .collect();
        names.push("problems.safetensors".into());
        names.sort();
        names.dedup();
        let files = names
            .into_iter()
            .map(|n| (n.clone(), golden_tensors("optim", &n)))
            .collect();
        Self { index, files }
    }

    pub(crate) fn cases(&self) -> &[Value] {
        self.index["cases"].as_array().expect("cases")
    }

    /// A tensor of a case's file.
    pub(crate) fn tensor(&self, case: &Value, name: &str) -> &Tensor {
        let file = text(&case["file"]);
        self.files[&file]
            .get(name)
            .unwrap_or_else(|| panic!("{file} has no {name}"))
    }

    /// A tensor of a case's problem.
    pub(crate) fn problem(&self, case: &Value, what: &str) -> &Tensor {
        let name = format!("{}/{what}", text(&case["problem"]));
        self.files["problems.safetensors"]
            .get(&name)
            .unwrap_or_else(|| panic!("no problem tensor {name}"))
    }
}

pub(crate) fn text(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is not a text"))
        .to_string()
}

pub(crate) fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is not a number"))
}

pub(crate) fn integers(value: &Value) -> Vec<usize> {
    value
        .as_array()
        .map(|a| a.iter().map(|v| number(v) as usize).collect())
        .unwrap_or_default()
}

pub(crate) fn expected(case: &Value) -> Vec<String> {
    case["expected"]
        .as_array()
        .expect("expected")
        .iter()
        .map(text)
        .collect()
}

/// One case being run: parameters by name, and the optimizer over them.
pub(crate) struct Run<'a> {
    suite: &'a Suite,
    case: &'a Value,
    /// Seed of a relative disturbance of the gradients of about 1e-7.
    jitter: Option<u64>,
    pub(crate) vars: BTreeMap<String, Var>,
    pub(crate) optimizer: Box<dyn Optimizer>,
}

impl<'a> Run<'a> {
    pub(crate) fn new(suite: &'a Suite, case: &'a Value) -> Self {
        let name = text(&case["name"]);
        let mut vars = BTreeMap::new();
        let mut groups = Vec::new();
        for (g, options) in case["groups"]
            .as_array()
            .expect("groups")
            .iter()
            .enumerate()
        {
            let mut group = ParamGroup {
                name: format!("group {g}"),
                ..Default::default()
            };
            for (key, value) in options.as_object().expect("group") {
                match key.as_str() {
                    "params" => {
                        for param in value.as_array().expect("params").iter().map(text) {
                            let var =
                                Var::from_tensor(suite.problem(case, &format!("init/{param}")))
                                    .expect("var");
                            group.params.push((param.clone(), var.clone()));
                            vars.insert(param, var);
                        }
                    }
                    "lr" => group.lr = Some(number(value)),
                    "weight_decay" => group.weight_decay = Some(number(value)),
                    "eps" => group.eps = Some(number(value)),
                    "betas" => group.betas = Some((number(&value[0]), number(&value[1]))),
                    "layer_scale" => group.multiplier = number(value),
                    other => panic!("{name}: this test does not know the group option {other}"),
                }
            }
            groups.push(group);
        }
        let config = case["config"].as_object().expect("config");
        let built = from_reference(&text(&case["algorithm"]), config, groups);
        let mut optimizer = built.unwrap_or_else(|e| panic!("{name}: {e}"));
        let max_grad_norm = case.get("clip_grad_norm").map_or(0.0, number);
        optimizer
            .set_step_options(StepOptions {
                max_grad_norm,
                ..Default::default()
            })
            .expect("step options");
        Self {
            suite,
            case,
            jitter: None,
            vars,
            optimizer,
        }
    }

    pub(crate) fn name(&self) -> String {
        text(&self.case["name"])
    }

    fn steps(&self) -> usize {
        number(&self.case["steps"]) as usize
    }

    /// Gradients of one step (from 1), computed from the present weights.
    fn gradients(&self, step: usize) -> candle_core::Result<BTreeMap<String, Tensor>> {
        let input = |what: &str| self.suite.problem(self.case, what);
        let problem = &self.suite.index["problems"][text(&self.case["problem"])];
        let mut out = BTreeMap::new();
        match problem["kind"].as_str() {
            Some("sequence") => {
                for name in self.vars.keys() {
                    out.insert(name.clone(), input(&format!("grad/{name}")).get(step - 1)?);
                }
            }
            Some("quad") => {
                for (name, var) in &self.vars {
                    let away = (var.as_detached_tensor() - input(&format!("t/{name}")))?;
                    let noise = input(&format!("n/{name}")).get(step - 1)?;
                    out.insert(
                        name.clone(),
                        ((input(&format!("h/{name}")) * away)? + noise)?,
                    );
                }
            }
            Some("lora") => {
                let scale = number(&problem["scale"]);
                let (a, b) = (
                    self.vars["A"].as_detached_tensor(),
                    self.vars["B"].as_detached_tensor(),
                );
                let x = input("X");
                let weight = (input("W") + (b.matmul(&a)? * scale)?)?;
                let residual = (weight.matmul(x)? - input("T"))?;
                let slope = 2.0 / residual.elem_count() as f64;
                let outer = (residual * slope)?.matmul(&x.t()?)?;
                out.insert("A".into(), (b.t()?.matmul(&outer)? * scale)?);
                out.insert("B".into(), (outer.matmul(&a.t()?)? * scale)?);
            }
            other => panic!(
                "{}: this test does not know the problem kind {other:?}",
                self.name()
            ),
        }
        if integers(&self.case["zero_gradient_steps"]).contains(&step) {
            for grad in out.values_mut() {
                *grad = grad.zeros_like()?;
            }
        }
        out.retain(|name, _| !integers(&self.case["missing_gradient_steps"][name]).contains(&step));
        Ok(out)
    }

    fn step(&mut self, step: usize) -> StepReport {
        if let Some(table) = self.case.get("lr_per_step_and_group") {
            let row = self
                .suite
                .tensor(self.case, &text(table))
                .get(step - 1)
                .expect("row of learning rates");
            for (group, lr) in values(&row).into_iter().enumerate() {
                self.optimizer.set_group_lr(group, lr).expect("lr");
            }
        }
        let mut grads = self.gradients(step).expect("gradients");
        if let Some(seed) = self.jitter {
            for (i, grad) in grads.values_mut().enumerate() {
                *grad = disturbed(grad, Stream::new(seed, step as u64, i as u64)).expect("jitter");
            }
        }
        self.optimizer
            .step(&grads)
            .unwrap_or_else(|e| panic!("{}: step {step}: {e}", self.name()))
    }

    /// A named scalar, one value for each group of the case.
    fn scalar(&self, name: &str) -> Vec<f64> {
        let groups = 0..self.optimizer.groups().len();
        if name == "lr" {
            return groups.map(|g| self.optimizer.lr(g)).collect();
        }
        let scalars = self.optimizer.scalars();
        let found = scalars.iter().find(|(n, _)| *n == name);
        let (_, found) =
            found.unwrap_or_else(|| panic!("{}: the optimizer has no scalar {name}", self.name()));
        groups.map(|g| *found.get(g).unwrap_or(&found[0])).collect()
    }
}

/// Every value changed by up to two units of its last digit.
fn disturbed(grad: &Tensor, stream: Stream) -> candle_core::Result<Tensor> {
    let count = grad.elem_count() as u64;
    let factors: Vec<f32> = (0..count)
        .map(|i| 1.0 + (f32::from(stream.bits(i)) / 32768.0 - 1.0) * 2.4e-7)
        .collect();
    grad * Tensor::from_vec(factors, grad.dims(), grad.device())?
}

/// What a trajectory left behind, keyed like the golden tensors without `NAME/f32/`.
#[derive(Default)]
pub(crate) struct Trace {
    /// Tensors at every checkpoint.
    pub(crate) rows: BTreeMap<String, Vec<Tensor>>,
    /// Scalars after every step, one row of groups after the other.
    pub(crate) scalars: BTreeMap<String, Vec<f64>>,
    /// The saved state after every step.
    pub(crate) states: Vec<OptimizerState>,
}

fn trace(run: &mut Run<'_>) -> Trace {
    let mut out = Trace::default();
    let checkpoints = integers(&run.case["checkpoints"]);
    let prefix = format!("{}/f32/scalar/", run.name());
    let scalars: Vec<String> = expected(run.case)
        .iter()
        .filter_map(|k| k.strip_prefix(&prefix).map(String::from))
        .collect();
    for step in 1..=run.steps() {
        let report = run.step(step);
        out.scalars
            .entry("grad_norm".into())
            .or_default()
            .push(report.grad_norm.expect("norm"));
        for name in &scalars {
            let row = run.scalar(name);
            out.scalars
                .entry(format!("scalar/{name}"))
                .or_default()
                .extend(row);
        }
        let state = run.optimizer.state().expect("state");
        if checkpoints.contains(&step) {
            let snapshot = |var: &Var| var.as_detached_tensor().copy().expect("copy");
            for (name, var) in &run.vars {
                out.rows
                    .entry(format!("param/{name}"))
                    .or_default()
                    .push(snapshot(var));
                if let Some(z) = state.tensors.get(&format!("state.{name}.z")) {
                    out.rows
                        .entry(format!("z/{name}"))
                        .or_default()
                        .push(z.clone());
                }
            }
            run.optimizer.set_training(false).expect("evaluation");
            for (name, var) in &run.vars {
                out.rows
                    .entry(format!("eval/{name}"))
                    .or_default()
                    .push(snapshot(var));
            }
            run.optimizer.set_training(true).expect("training");
        }
        out.states.push(state);
    }
    out
}

/// The same trajectory with gradients that another order of rounding could have given.
fn jittered(suite: &Suite, case: &Value) -> Vec<Trace> {
    let run = |seed| {
        let mut run = Run::new(suite, case);
        run.jitter = Some(seed);
        trace(&mut run)
    };
    (1..=8).map(run).collect()
}

/// Starts from the reference's state in the middle of a run and goes on to its end.
fn resume(run: &mut Run<'_>, report: &mut Report) {
    let (suite, case, name) = (run.suite, run.case, run.name());
    let split = number(&case["split_after_step"]) as usize;
    // The layout of our own state at the same step, filled with the reference's values.
    for step in 1..=split {
        run.step(step);
    }
    let mut state = run.optimizer.state().expect("state");
    for (param, var) in &run.vars {
        let weight = suite.tensor(case, &format!("{name}/param_at_split/{param}"));
        assert_eq!(weight.dims(), var.dims());
        state
            .tensors
            .insert(format!("weight.{param}"), weight.clone());
        let prefix = format!("{name}/state_at_split/{param}/");
        for key in case["inputs"].as_array().expect("inputs").iter().map(text) {
            let Some(kind) = key.strip_prefix(&prefix) else {
                continue;
            };
            let value = suite.tensor(case, &key).flatten_all().expect("flat");
            let own = if kind == "step" {
                continue;
            } else {
                format!("state.{param}.{kind}")
            };
            assert!(
                state.tensors.contains_key(&own),
                "{name}: no {own} in our state"
            );
            let shape = state.tensors[&own].shape().clone();
            state
                .tensors
                .insert(own, value.reshape(shape).expect("shape"));
        }
    }
    let scalars = &case["group_scalars_at_split"];
    for (key, tensor) in &mut state.tensors {
        let Some(scalar) = key.strip_prefix("scalar.") else {
            continue;
        };
        if let Some(value) = scalars.get(scalar).and_then(Value::as_f64) {
            *tensor = (tensor.ones_like().expect("ones") * value).expect("scalar");
        }
    }
    let steps = run.steps();
    let mut resumed = Run::new(suite, case);
    resumed
        .optimizer
        .load_state(&state, Default::default())
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    for step in split + 1..=steps {
        resumed.step(step);
    }
    let tol = compare::tolerance(case, "vs_f32", 1.0);
    for (param, var) in &resumed.vars {
        let key = format!("param_end/{param}");
        report.tensor(
            &name,
            &key,
            var.as_tensor(),
            suite.tensor(case, &format!("{name}/{key}")),
            tol,
        );
    }
}

/// Runs every trajectory of some algorithms.
pub(crate) fn trajectories(algorithms: &[&str]) {
    let suite = Suite::load();
    let mut report = Report::default();
    for case in suite
        .cases()
        .iter()
        .filter(|c| algorithms.iter().any(|a| c["algorithm"] == *a))
    {
        let mut run = Run::new(&suite, case);
        if case.get("split_after_step").is_some() {
            resume(&mut run, &mut report);
        } else {
            let trace = trace(&mut run);
            let jitter = if compare::has_bf16_state(case) {
                jittered(&suite, case)
            } else {
                Vec::new()
            };
            compare::compare(&suite, case, &trace, &jitter, &mut report);
        }
    }
    report.finish();
}
