//! What Prodigy offers beyond its reference.

// A helper that fails is a failed test.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use lora_optim::{Error, Optimizer, ParamGroup, Prodigy, ProdigyConfig, RuleConfig, WeightChange};

/// Two parameters with targets, each a group.
struct Pair {
    vars: [Var; 2],
    targets: [Tensor; 2],
}

impl Pair {
    fn new() -> Self {
        let var = || Var::zeros(64, DType::F32, &Device::Cpu).unwrap();
        let target = |scale: f64| {
            let values: Vec<f32> = (0..64)
                .map(|i| ((f64::from(i) * 1.7).sin() * scale) as f32)
                .collect();
            Tensor::from_vec(values, 64, &Device::Cpu).unwrap()
        };
        Self {
            vars: [var(), var()],
            targets: [target(1.0), target(0.01)],
        }
    }

    fn groups(&self, lrs: [f64; 2], multipliers: [f64; 2]) -> Vec<ParamGroup> {
        let group = |i: usize| ParamGroup {
            lr: Some(lrs[i]),
            multiplier: multipliers[i],
            ..ParamGroup::new(
                ["unet", "text encoder"][i],
                vec![(format!("w{i}"), self.vars[i].clone())],
            )
        };
        vec![group(0), group(1)]
    }

    fn run(&self, prodigy: &mut Prodigy, steps: usize) {
        for _ in 0..steps {
            let mut grads = BTreeMap::new();
            for i in 0..2 {
                grads.insert(
                    format!("w{i}"),
                    (self.vars[i].as_detached_tensor() - &self.targets[i]).unwrap(),
                );
            }
            prodigy.step(&grads).unwrap();
        }
    }

    fn moved(&self, i: usize) -> f32 {
        self.vars[i]
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .sqrt()
            .unwrap()
            .to_scalar()
            .unwrap()
    }
}

fn prodigy(pair: &Pair, config: ProdigyConfig) -> Prodigy {
    Prodigy::new(pair.groups([1.0; 2], [1.0; 2]), config).unwrap()
}

#[test]
fn mixed_learning_rates_are_refused_at_construction_with_both_ways_out() {
    let pair = Pair::new();
    let error =
        Prodigy::new(pair.groups([1.0, 0.5], [1.0; 2]), ProdigyConfig::default()).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Combination { .. }));
    assert!(
        text.contains("multiplier") && text.contains("split_groups"),
        "{text}"
    );
    let split = ProdigyConfig {
        split_groups: true,
        ..Default::default()
    };
    assert!(Prodigy::new(pair.groups([1.0, 0.5], [1.0; 2]), split).is_ok());
}

#[test]
fn without_first_moment_a_group_of_rate_0_is_refused() {
    let pair = Pair::new();
    let config = ProdigyConfig {
        betas: (0.0, 0.99),
        ..Default::default()
    };
    assert!(Prodigy::new(pair.groups([1.0, 0.0], [1.0; 2]), config).is_err());
}

#[test]
fn a_multiplier_scales_the_step_and_leaves_d_shared() {
    let pair = Pair::new();
    let mut optimizer =
        Prodigy::new(pair.groups([1.0; 2], [1.0, 0.5]), ProdigyConfig::default()).unwrap();
    pair.run(&mut optimizer, 5);
    let report = optimizer.report().unwrap();
    assert_eq!(report[0].d, report[1].d);
    assert_eq!(report[1].effective_lr, 0.5 * report[0].effective_lr);
    // All values move by about the same amount at first, whatever their gradient.
    let ratio = pair.moved(1) / pair.moved(0);
    assert!((0.4..0.6).contains(&ratio), "{ratio}");
}

#[test]
fn split_groups_find_a_step_size_each() {
    let pair = Pair::new();
    let config = ProdigyConfig {
        split_groups: true,
        ..Default::default()
    };
    let mut optimizer = prodigy(&pair, config);
    pair.run(&mut optimizer, 60);
    let d: Vec<f64> = optimizer
        .report()
        .unwrap()
        .iter()
        .map(|g| g.d.unwrap())
        .collect();
    // The second target is a hundred times nearer.
    assert!(d[0] > 20.0 * d[1], "{d:?}");
}

#[test]
fn d_stays_below_its_limit_and_where_it_was_frozen() {
    let pair = Pair::new();
    let mut limited = prodigy(
        &pair,
        ProdigyConfig {
            d_limit: 1e-4,
            ..Default::default()
        },
    );
    pair.run(&mut limited, 60);
    assert_eq!(limited.report().unwrap()[0].d, Some(1e-4));

    let pair = Pair::new();
    let mut frozen = prodigy(
        &pair,
        ProdigyConfig {
            freeze_d_after: Some(8),
            ..Default::default()
        },
    );
    pair.run(&mut frozen, 8);
    let (d, moved) = (frozen.report().unwrap()[0].d, pair.moved(0));
    pair.run(&mut frozen, 20);
    assert_eq!(frozen.report().unwrap()[0].d, d);
    assert!(d > Some(1e-6) && pair.moved(0) > moved, "{d:?}");
}

#[test]
fn the_first_jump_can_be_limited_too() {
    for limit_first_jump in [false, true] {
        let pair = Pair::new();
        let config = ProdigyConfig {
            growth_rate: 1.02,
            limit_first_jump,
            ..Default::default()
        };
        let mut optimizer = prodigy(&pair, config);
        let mut growth = 0.0f64;
        let mut before = 1e-6;
        for _ in 0..20 {
            pair.run(&mut optimizer, 1);
            let d = optimizer.report().unwrap()[0].d.unwrap();
            growth = growth.max(d / before);
            before = d;
        }
        assert_eq!(growth <= 1.02 + 1e-9, limit_first_jump, "{growth}");
    }
}

#[test]
fn a_run_can_begin_with_the_d_of_an_earlier_one() {
    let pair = Pair::new();
    let mut optimizer = prodigy(
        &pair,
        ProdigyConfig {
            init_d: Some(1e-3),
            ..Default::default()
        },
    );
    assert_eq!(optimizer.effective_lr(0), 1e-3);
    pair.run(&mut optimizer, 30);
    assert!(optimizer.effective_lr(0) > 1e-3);
}

/// Weights that start at 0.5 lose the digits in which the first steps happen; the kept
/// displacement does not. A start at zero gives the d that is meant.
#[test]
fn the_exact_displacement_removes_the_rounding_of_large_weights() {
    let d_after = |start: f64, exact_displacement: bool| {
        let pair = Pair::new();
        let shift = |t: &Tensor| (t + start).unwrap();
        let pair = Pair {
            vars: pair.vars.map(|v| Var::from_tensor(&shift(&v)).unwrap()),
            targets: pair.targets.map(|t| shift(&t)),
        };
        let mut optimizer = prodigy(
            &pair,
            ProdigyConfig {
                exact_displacement,
                ..Default::default()
            },
        );
        pair.run(&mut optimizer, 4);
        optimizer.report().unwrap()[0].d.unwrap()
    };
    let meant = d_after(0.0, false);
    let error = |d: f64| (d / meant - 1.0).abs();
    let (rounded, exact) = (error(d_after(0.5, false)), error(d_after(0.5, true)));
    assert!(
        exact < 1e-3 && exact < 0.1 * rounded,
        "rounded {rounded:e}, exact {exact:e}"
    );
}

#[test]
fn telling_of_a_scaling_keeps_d_undisturbed() {
    let d_after = |tell: bool| {
        let pair = Pair::new();
        let mut optimizer = prodigy(&pair, ProdigyConfig::default());
        pair.run(&mut optimizer, 40);
        let before = optimizer.report().unwrap()[0].distance.unwrap();
        pair.vars[0]
            .set(&pair.vars[0].affine(0.25, 0.0).unwrap())
            .unwrap();
        if tell {
            optimizer
                .weights_changed(&WeightChange::Scaled {
                    name: "w0",
                    factor: 0.25,
                })
                .unwrap();
        }
        (before, optimizer.report().unwrap()[0].distance.unwrap())
    };
    let (before, told) = d_after(true);
    assert!(
        (told / before - 1.0).abs() < 1e-5,
        "the distance travelled stays: {before} {told}"
    );
    let (before, untold) = d_after(false);
    assert!(untold < 0.5 * before);
}

#[test]
fn defaults_are_those_of_users_and_the_reference_keeps_its_own() {
    assert_eq!(ProdigyConfig::default().betas, (0.9, 0.99));
    assert_eq!(ProdigyConfig::reference().betas, (0.9, 0.999));
}

#[test]
fn bad_options_name_themselves() {
    let pair = Pair::new();
    for (config, option) in [
        (
            ProdigyConfig {
                d0: 0.0,
                ..Default::default()
            },
            "d0",
        ),
        (
            ProdigyConfig {
                lr: -1.0,
                ..Default::default()
            },
            "lr",
        ),
        (
            ProdigyConfig {
                betas: (0.9, 1.0),
                ..Default::default()
            },
            "betas",
        ),
        (
            ProdigyConfig {
                growth_rate: 0.5,
                ..Default::default()
            },
            "growth_rate",
        ),
        (
            ProdigyConfig {
                slice_p: 0,
                ..Default::default()
            },
            "slice_p",
        ),
    ] {
        let error = Prodigy::new(pair.groups([1.0; 2], [1.0; 2]), config)
            .unwrap_err()
            .to_string();
        assert!(error.starts_with(option), "{error}");
    }
}
