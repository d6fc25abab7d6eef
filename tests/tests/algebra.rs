//! Whole-file arithmetic on the miniature model: streaming merges against merges in
//! memory, conversions against the deltas they stand for, and bits that come back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use lora_core::algebra::{
    ExtractOptions, LiveMerge, MergeOptions, RankRule, Strength, Weights, compose, convert,
    difference, extract, merge_into_file,
};
use lora_core::format::{TensorFile, write_tensors};
use lora_core::{
    Adaptable, Adapter, AdapterConfig, AdapterSet, Component, Error, Family, SaveOptions, Targets,
    merge,
};
use lora_sd15::{Checkpoint, Part, UNet};
use lora_tests::{Report, Tolerance, golden_path};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

fn miniature() -> PathBuf {
    golden_path("sd15", "mini_ldm.safetensors")
}

fn unet() -> UNet {
    let checkpoint = Checkpoint::open(miniature()).unwrap();
    let vb = checkpoint
        .var_builder(Part::Unet, DType::F32, &Device::Cpu)
        .unwrap();
    UNet::new(&checkpoint.config().unet, vb).unwrap()
}

/// An adapter whose factors are all random, also those that start at zero.
fn random(config: &AdapterConfig, targets: &[&str], seed: u64) -> AdapterSet {
    let mut rng = ChaCha12Rng::seed_from_u64(seed);
    let targets = Targets::new(targets).unwrap();
    let set = AdapterSet::create(&mut unet(), config, &targets, &mut rng).unwrap();
    for (_, var) in set.params() {
        let values: Vec<f32> = (0..var.elem_count())
            .map(|_| rng.random_range(-0.2..0.2))
            .collect();
        var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap())
            .unwrap();
    }
    set
}

fn of_family(family: Family) -> AdapterConfig {
    AdapterConfig {
        family,
        rank: 4,
        alpha: 2.0,
        conv_rank: Some(4),
        conv_alpha: 2.0,
        ..AdapterConfig::default()
    }
}

fn all_families() -> Vec<AdapterSet> {
    let families = [
        Family::Lora,
        Family::Loha,
        Family::Lokr,
        Family::Glora,
        Family::Oft,
        Family::Ia3,
        Family::Full,
        Family::Norm,
    ];
    let mut sets: Vec<AdapterSet> = (families.into_iter().zip(1..))
        .map(|(family, seed)| random(&of_family(family), &["down_blocks", "mid_block"], seed))
        .collect();
    let dora = AdapterConfig {
        weight_decompose: true,
        ..of_family(Family::Lora)
    };
    sets.push(random(&dora, &["up_blocks"], 30));
    sets
}

/// Each tensor of `merged` against the merge of `base` in memory.
fn check(base: &Path, merged: &Path, adapters: &[(&AdapterSet, Strength)], dtype: DType) {
    let (base, merged) = (Weights::open(base).unwrap(), Weights::open(merged).unwrap());
    let mut report = Report::default();
    // Up to two units in the last place: the sums are made in another order.
    let ulp = match dtype {
        DType::F16 => 2f64.powi(-9),
        DType::BF16 => 2f64.powi(-6),
        _ => 2f64.powi(-21),
    };
    for layer in base.layers() {
        let parts: Vec<(&dyn Adapter, f64)> = adapters
            .iter()
            .filter_map(|(set, strength)| Some((set.get(layer)?.as_ref(), strength.of(layer))))
            .collect();
        let tolerance = Tolerance {
            atol: if parts.is_empty() { 0.0 } else { 2e-6 },
            rtol: if parts.is_empty() { 0.0 } else { ulp },
        };
        let cast = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
        let weight = cast(&base.weight(layer).unwrap().unwrap());
        let want = merge::merged_weight(&weight, &parts).unwrap();
        let got = merged.weight(layer).unwrap().unwrap();
        assert_eq!(got.dtype(), dtype, "{layer}");
        let want = want.to_dtype(dtype).unwrap();
        report.tensor("weight", layer, &got, &want, tolerance);
        if let Some(bias) = base.bias(layer).unwrap() {
            let want = merge::merged_bias(Some(&cast(&bias)), &parts)
                .unwrap()
                .unwrap();
            let got = merged.bias(layer).unwrap().unwrap();
            let want = want.to_dtype(dtype).unwrap();
            report.tensor("bias", layer, &got, &want, tolerance);
        }
    }
    report.finish();
}

#[test]
fn streaming_merge_of_every_family() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("merged.safetensors");
    let sets = all_families();
    let blocks: Vec<f64> = (0..26).map(|i| 1.0 - 0.03 * f64::from(i)).collect();
    let adapters: Vec<(&AdapterSet, Strength)> = sets
        .iter()
        .map(|set| (set, Strength::new(0.7, 0.3).with_blocks(&blocks).unwrap()))
        .collect();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let options = MergeOptions {
            dtype: Some(dtype),
            metadata: [("note".to_string(), "merged".to_string())].into(),
            ..MergeOptions::default()
        };
        let report = merge_into_file(&miniature(), &adapters, &output, &options).unwrap();
        assert!(report.changed > 100, "{report:?}");
        check(&miniature(), &output, &adapters, dtype);
        // Every tensor is there, and the metadata too.
        let (old, new) = (
            TensorFile::open(miniature()).unwrap(),
            TensorFile::open(&output).unwrap(),
        );
        assert_eq!(old.names(), new.names());
        let mut metadata = old.metadata();
        metadata.insert("note".into(), "merged".into());
        assert_eq!(new.metadata(), metadata);
    }
}

#[test]
fn streaming_merge_of_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let base = golden_path("sd15", "mini_diffusers");
    let output = folder.path().join("merged");
    let set = random(&of_family(Family::Lora), &["attentions", "resnets"], 5);
    let adapters = [(&set, Strength::new(-0.5, 1.0))];
    let options = MergeOptions {
        dtype: Some(DType::F32),
        ..MergeOptions::default()
    };
    merge_into_file(&base, &adapters, &output, &options).unwrap();
    check(&base, &output, &adapters, DType::F32);
    Checkpoint::open(&output).unwrap();
    // A folder is not written over, and nothing else is left behind.
    assert!(merge_into_file(&base, &adapters, &output, &options).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_merge_that_fails_leaves_the_file_alone() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("merged.safetensors");
    std::fs::write(&output, b"precious").unwrap();
    let mut set = random(&of_family(Family::Lora), &["attentions"], 5);
    let one = set.iter().next().unwrap().1.clone();
    set.insert("lora_unet_no_such_layer", one.clone());
    let run = |set: &AdapterSet, lenient| {
        let options = MergeOptions {
            lenient,
            ..MergeOptions::default()
        };
        merge_into_file(
            &miniature(),
            &[(set, Strength::default())],
            &output,
            &options,
        )
    };
    let error = run(&set, false).unwrap_err();
    assert!(matches!(error, Error::UnmatchedLayers { .. }), "{error}");
    let mut wrong = AdapterSet::default();
    wrong.insert("lora_unet_conv_out", one);
    let error = run(&wrong, false).unwrap_err();
    assert!(matches!(error, Error::ShapeMismatch { .. }), "{error}");
    assert_eq!(std::fs::read(&output).unwrap(), b"precious");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    let report = run(&set, true).unwrap();
    assert_eq!(report.unmatched, ["lora_unet_no_such_layer"]);
}

#[test]
fn at_multiplier_zero_the_tensors_keep_their_bits() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("merged.safetensors");
    let sets = all_families();
    let adapters: Vec<_> = (sets.iter())
        .map(|s| (s, Strength::new(0.0, 0.0)))
        .collect();
    merge_into_file(&miniature(), &adapters, &output, &MergeOptions::default()).unwrap();
    let bytes = |path: &Path| TensorFile::open(path).unwrap().data().to_vec();
    assert_eq!(bytes(&miniature()), bytes(&output));
}

#[test]
fn conversion_to_lora_keeps_what_it_says() {
    let base = Weights::open(miniature()).unwrap();
    for set in all_families() {
        let needs_base = convert(&set, RankRule::Energy(0.9), None, None).is_err();
        let family = set.iter().next().unwrap().1.family();
        let alone = [
            Family::Lora,
            Family::Loha,
            Family::Lokr,
            Family::Full,
            Family::Norm,
        ];
        assert_eq!(needs_base, !alone.contains(&family), "{family}");
        for (energy, largest) in [(0.9, 0.1f64.sqrt() + 1e-3), (1.0, 2e-3)] {
            let rule = RankRule::Energy(energy);
            let (lora, reports) = convert(&set, rule, None, Some(&base)).unwrap();
            assert_eq!(lora.len(), set.len());
            for (layer, difference) in lora
                .names()
                .zip(difference(&set, &lora, Some(&base)).unwrap())
            {
                let report = reports.iter().find(|r| r.layer == layer).unwrap();
                let measured = difference.distance / difference.first.unwrap().max(1e-30);
                assert!(measured <= largest, "{family} {layer}: {measured}");
                assert!(
                    (measured - report.error).abs() < 2e-3,
                    "{family} {layer}: {measured} {report:?}"
                );
            }
        }
    }
}

#[test]
fn composition_is_the_sum() {
    let base = Weights::open(miniature()).unwrap();
    let sets = all_families();
    let adapters: Vec<(&AdapterSet, Strength)> = sets
        .iter()
        .map(|set| (set, Strength::new(0.4, 1.0)))
        .collect();
    let (sum, _) = compose(&adapters, None, None, Some(&base)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (one, many) = (folder.path().join("one"), folder.path().join("many"));
    let options = MergeOptions::default();
    merge_into_file(&miniature(), &[(&sum, Strength::default())], &one, &options).unwrap();
    merge_into_file(&miniature(), &adapters, &many, &options).unwrap();
    let (one, many) = (Weights::open(&one).unwrap(), Weights::open(&many).unwrap());
    let mut report = Report::default();
    let tolerance = Tolerance {
        atol: 2e-5,
        rtol: 1e-5,
    };
    for layer in one.layers() {
        let weight = |w: &Weights| w.weight(layer).unwrap().unwrap();
        report.tensor("sum", layer, &weight(&one), &weight(&many), tolerance);
    }
    report.finish();
}

#[test]
fn extraction_finds_the_lora_again() {
    let folder = tempfile::tempdir().unwrap();
    let tuned = folder.path().join("tuned.safetensors");
    let set = random(&of_family(Family::Lora), &["attentions", "resnets"], 9);
    let adapters = [(&set, Strength::default())];
    merge_into_file(&miniature(), &adapters, &tuned, &MergeOptions::default()).unwrap();
    let options = ExtractOptions {
        conv_rule: Some(RankRule::Fixed(4)),
        ..ExtractOptions::new(RankRule::Fixed(4))
    };
    let (base, tuned) = (
        Weights::open(miniature()).unwrap(),
        Weights::open(tuned).unwrap(),
    );
    let (found, reports) = extract(&base, &tuned, &options).unwrap();
    let path = folder.path().join("found.safetensors");
    found.save(&path, &SaveOptions::default()).unwrap();
    let found = AdapterSet::load(&path, &Device::Cpu).unwrap();
    assert_eq!(
        found.names().collect::<Vec<_>>(),
        set.names().collect::<Vec<_>>()
    );
    assert!(reports.iter().all(|r| r.error < 1e-4));
    for layer in difference(&set, &found, None).unwrap() {
        assert!(layer.relative() < 1e-4, "{layer:?}");
    }
    assert!(extract(&base, &base, &options).is_err());
}

/// The bits of all base weights and biases.
fn bits(model: &mut UNet) -> BTreeMap<String, Vec<u32>> {
    let mut all = BTreeMap::new();
    let mut add = |name: String, tensor: &Tensor| {
        let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        all.insert(name, values.into_iter().map(f32::to_bits).collect());
    };
    model
        .visit_layers(&mut |layer| {
            add(format!("{}.weight", layer.path()), &layer.base().weight);
            if let Some(bias) = &layer.base().bias {
                add(format!("{}.bias", layer.path()), bias);
            }
            Ok(())
        })
        .unwrap();
    all
}

#[test]
fn base_weights_come_back_to_the_bit() {
    let mut model = unet();
    let before = bits(&mut model);
    let mut sets = all_families();
    for set in &mut sets {
        set.attach(&mut model, 0.6).unwrap();
    }
    for set in &sets {
        set.set_multiplier(&Component::Unet, -1.3);
        set.detach(&mut model).unwrap();
    }
    assert!(bits(&mut model) == before, "after detaching");
    let mut live = LiveMerge::default();
    for multiplier in [0.6, -1.3, 0.1] {
        let adapters: Vec<(&AdapterSet, Strength)> = sets
            .iter()
            .map(|set| (set, Strength::new(multiplier, 1.0)))
            .collect();
        let report = live.set(&mut model, &adapters).unwrap();
        assert!(report.unmatched.is_empty());
        assert!(bits(&mut model) != before, "merged at {multiplier}");
        // The same as from the file, however many multipliers came before.
        let mut fresh = unet();
        LiveMerge::default().set(&mut fresh, &adapters).unwrap();
        assert!(bits(&mut fresh) == bits(&mut model), "at {multiplier}");
    }
    live.restore(&mut model).unwrap();
    assert!(bits(&mut model) == before, "after restoring");
}

#[test]
fn a_file_that_is_no_checkpoint_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.safetensors");
    let tensor = Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap();
    write_tensors(
        &path,
        &[("x.weight".to_string(), tensor)].into(),
        &BTreeMap::new(),
    )
    .unwrap();
    let error = Weights::open(&path).unwrap_err().to_string();
    assert!(error.contains("other.safetensors"), "{error}");
    let set = random(&of_family(Family::Lora), &["attentions"], 5);
    let adapters = [(&set, Strength::default())];
    let output = folder.path().join("out.safetensors");
    let error = merge_into_file(&path, &adapters, &output, &MergeOptions::default()).unwrap_err();
    assert!(matches!(error, Error::NothingMatched { .. }), "{error}");
    assert!(!output.exists());
}

#[test]
fn an_outline_tells_what_the_file_does() {
    let index = lora_tests::golden_json("adapters", "index.json");
    for entry in index["whole_files"]["files"].as_array().unwrap() {
        let path = golden_path("adapters", entry["file"].as_str().unwrap());
        let set = AdapterSet::load(&path, &Device::Cpu).unwrap();
        let outline = AdapterSet::outline(&path).unwrap();
        assert_eq!(outline.metadata(), set.metadata());
        assert_eq!(outline.parameter_count(), set.parameter_count());
        let shown = |set: &AdapterSet| -> Vec<_> {
            (set.iter())
                .map(|(n, a)| {
                    (
                        n.to_string(),
                        a.family(),
                        a.rank(),
                        a.alpha(),
                        a.matrix_dims(),
                    )
                })
                .collect()
        };
        assert_eq!(shown(&outline), shown(&set), "{}", path.display());
    }
}

#[test]
fn what_needs_the_base_says_so() {
    let set = random(&of_family(Family::Ia3), &["attentions"], 3);
    let error = convert(&set, RankRule::Fixed(4), None, None).unwrap_err();
    assert!(matches!(error, Error::NotPossible { .. }), "{error}");
    assert!(error.to_string().contains("ia3"), "{error}");
}
