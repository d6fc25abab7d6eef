//! Groups, registries and names.

// A helper that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use lora_optim::kohya::{KohyaOptimizer, KohyaScheduler, from_kohya};
use lora_optim::schedule::{Constant, LrSchedule, Warmup};
use lora_optim::{AdamW, AdamWConfig, Error, Optimizer, ParamGroup, Prodigy, ProdigyConfig};

fn var() -> Var {
    Var::ones(4, DType::F32, &Device::Cpu).unwrap()
}

fn group(name: &str) -> Vec<ParamGroup> {
    vec![ParamGroup::new(name, vec![("w".into(), var())])]
}

#[test]
fn empty_groups_double_names_and_whole_numbers_are_refused() {
    let make = |params| AdamW::new(vec![ParamGroup::new("g", params)], AdamWConfig::default());
    assert!(matches!(make(vec![]), Err(Error::NoParameters)));
    assert!(matches!(
        make(vec![("a".into(), var()), ("a".into(), var())]),
        Err(Error::DuplicateParameter { .. })
    ));
    let shared = var();
    assert!(matches!(
        make(vec![("a".into(), shared.clone()), ("b".into(), shared)]),
        Err(Error::DuplicateParameter { .. })
    ));
    let whole = Var::from_tensor(&Tensor::new(&[1u32], &Device::Cpu).unwrap()).unwrap();
    assert!(matches!(
        make(vec![("a".into(), whole)]),
        Err(Error::ParameterDtype { .. })
    ));
}

#[test]
fn a_group_option_that_the_optimizer_does_not_have_is_refused() {
    let mut groups = group("unet");
    groups[0].betas = Some((0.9, 0.99));
    assert!(
        Prodigy::new(groups, ProdigyConfig::default())
            .unwrap_err()
            .to_string()
            .contains("betas of group \"unet\"")
    );
}

#[test]
fn a_gradient_that_is_the_parameter_itself_works() {
    let w = var();
    let mut optimizer = AdamW::new(
        vec![ParamGroup::new("g", vec![("w".into(), w.clone())])],
        AdamWConfig::default(),
    )
    .unwrap();
    let grads = std::collections::BTreeMap::from([("w".to_string(), w.as_tensor().clone())]);
    optimizer.step(&grads).unwrap();
    let view = w
        .as_tensor()
        .reshape((2, 2))
        .unwrap()
        .flatten_all()
        .unwrap();
    optimizer
        .step(&std::collections::BTreeMap::from([("w".to_string(), view)]))
        .unwrap();
    assert!(w.to_vec1::<f32>().unwrap()[0] < 1.0);
}

#[test]
fn a_schedule_sets_every_group() {
    let mut groups = group("a");
    groups.push(ParamGroup {
        lr: Some(0.5),
        ..ParamGroup::new("b", vec![("v".into(), var())])
    });
    let mut optimizer = AdamW::new(
        groups,
        AdamWConfig {
            lr: 1.0,
            ..Default::default()
        },
    )
    .unwrap();
    Warmup {
        steps: 4,
        body: Constant,
    }
    .apply(1, &mut optimizer);
    assert_eq!([optimizer.lr(0), optimizer.lr(1)], [0.25, 0.125]);
}

#[test]
fn unknown_names_say_what_exists() {
    let error = from_kohya("Prodgy", &[], 1.0, group("g"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("did you mean \"Prodigy\"") && error.contains("AdaFactor"),
        "{error}"
    );
    let error = from_kohya("Prodigy", &["d_coeff=2".into()], 1.0, group("g"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("did you mean \"d_coef\"") && error.contains("growth_rate"),
        "{error}"
    );
    let error = from_kohya("DAdaptLion", &[], 1.0, group("g"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("not implemented") && error.contains("DAdaptAdam"),
        "{error}"
    );
    let options = KohyaScheduler {
        lr_scheduler: "cosin".into(),
        ..Default::default()
    };
    assert!(
        options
            .build()
            .unwrap_err()
            .to_string()
            .contains("did you mean \"cosine\"")
    );
}

#[test]
fn a_trailing_comma_names_the_argument() {
    let error = from_kohya("AdamW", &["weight_decay=0.5,".into()], 1e-4, group("g"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("weight_decay") && error.contains("comma"),
        "{error}"
    );
}

#[test]
fn sd_scripts_types_build_their_classes() {
    for (kind, algorithm) in [
        ("", "AdamW"),
        ("adamw8BIT", "AdamW8bit"),
        ("PagedAdamW8bit", "AdamW8bit"),
        ("Lion", "Lion"),
        ("SGDNesterov", "SGD"),
        ("DAdaptation", "DAdaptAdamPreprint"),
        ("DAdaptAdam", "DAdaptAdam"),
        ("prodigy", "Prodigy"),
        ("AdaFactor", "Adafactor"),
        ("RAdamScheduleFree", "ScheduleFree"),
        (
            "prodigyplus.ProdigyPlusScheduleFree",
            "ProdigyPlusScheduleFree",
        ),
        ("pytorch_optimizer.CAME", "CAME"),
    ] {
        let optimizer =
            from_kohya(kind, &[], 1.0, group("g")).unwrap_or_else(|e| panic!("{kind}: {e}"));
        assert_eq!(optimizer.algorithm(), algorithm, "{kind}");
    }
}

#[test]
fn prodigys_betas_from_sd_scripts_are_the_references_unless_said_otherwise() {
    let betas = |args: &[&str], prodigy_betas| {
        let options = KohyaOptimizer {
            optimizer_type: "Prodigy".into(),
            optimizer_args: args.iter().map(ToString::to_string).collect(),
            learning_rate: 1.0,
            prodigy_betas,
        };
        options.build(group("g")).unwrap().options().unwrap()["config"]["betas"].to_string()
    };
    let reference = KohyaOptimizer::default().prodigy_betas;
    assert_eq!(betas(&[], reference), "[0.9,0.999]");
    assert_eq!(betas(&[], (0.9, 0.99)), "[0.9,0.99]");
    assert_eq!(betas(&["betas=0.8,0.9"], reference), "[0.8,0.9]");
}

#[test]
fn relative_adafactor_drops_the_rates_and_brings_its_own_schedule() {
    let mut groups = group("g");
    groups[0].lr = Some(1e-4);
    let options = KohyaOptimizer {
        optimizer_type: "AdaFactor".into(),
        ..Default::default()
    };
    assert!(options.has_own_schedule().unwrap());
    options.build(groups.clone()).unwrap();
    let fixed = KohyaOptimizer {
        optimizer_args: vec!["relative_step=False scale_parameter=False warmup_init=False".into()],
        ..options
    };
    assert!(!fixed.has_own_schedule().unwrap());
    assert_eq!(fixed.build(groups).unwrap().lr(0), 1e-4);
}
