//! Files as people have them: damaged, half understood, or written by programs with
//! their own ideas; each read in its author's meaning or refused by name.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::Module;
use lora_core::algebra::{MergeOptions, Strength, compose, merge_into_file};
use lora_core::format::{
    BaseModel, FileReport, FindingKind, Format, LoadOptions, SaveLayout, Strictness, write_tensors,
};
use lora_core::{
    Adaptable, AdapterSet, BaseLayer, Component, Conv2dParams, Error, Family, Layer, LayerOp,
    SaveOptions,
};

type Tensors = Vec<(String, Tensor)>;

const LAYER: &str = "lora_unet_mid_block_attentions_0_proj_in";

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn counting(dims: &[usize]) -> Tensor {
    let n: usize = dims.iter().product();
    let values: Vec<f32> = (0..n).map(|i| 0.1 * ((i % 7) as f32 - 2.5)).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn number(value: f32) -> Tensor {
    Tensor::new(value, &Device::Cpu).unwrap()
}

fn keyed(prefix: &str, parts: Vec<(&str, Tensor)>) -> Tensors {
    let key = |(name, tensor)| (format!("{prefix}.{name}"), tensor);
    parts.into_iter().map(key).collect()
}

fn lora(prefix: &str, alpha: Option<f32>) -> Tensors {
    let mut parts = vec![
        ("lora_down.weight", counting(&[2, 4])),
        ("lora_up.weight", counting(&[6, 2])),
    ];
    parts.extend(alpha.map(|a| ("alpha", number(a))));
    keyed(prefix, parts)
}

fn write_at(path: &Path, tensors: &Tensors, metadata: &[(&str, &str)]) {
    let metadata = metadata
        .iter()
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .collect();
    let tensors: BTreeMap<String, Tensor> = tensors.iter().cloned().collect();
    write_tensors(path, &tensors, &metadata).unwrap();
}

/// A file, kept as long as the folder.
fn file(tensors: &Tensors, metadata: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
    let folder = folder();
    let path = folder.path().join("file.safetensors");
    write_at(&path, tensors, metadata);
    (folder, path)
}

fn load(tensors: &Tensors) -> lora_core::Result<AdapterSet> {
    let (_folder, path) = file(tensors, &[]);
    AdapterSet::load(path, &Device::Cpu)
}

fn lenient(path: &Path) -> AdapterSet {
    let options = LoadOptions {
        strictness: Strictness::Lenient,
        ..Default::default()
    };
    AdapterSet::load_with(path, &Device::Cpu, &options).unwrap()
}

fn delta_for(set: &AdapterSet, dims: &[usize]) -> Vec<f32> {
    let adapter = set.iter().next().unwrap().1;
    let delta = adapter.delta(&counting(dims), 1.0).unwrap();
    delta.flatten_all().unwrap().to_vec1().unwrap()
}

fn delta(tensors: &Tensors) -> Vec<f32> {
    delta_for(&load(tensors).unwrap(), &[6, 4])
}

#[track_caller]
fn close(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (g, w) in got.iter().zip(want) {
        assert!(
            (g - w).abs() <= 1e-5 * w.abs().max(1.0),
            "{got:?}\n{want:?}"
        );
    }
}

#[track_caller]
fn says(error: &Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

/// The same numbers times a factor.
fn times(values: &[f32], factor: f32) -> Vec<f32> {
    values.iter().map(|v| v * factor).collect()
}

// Findings.

#[test]
fn every_key_is_accounted_for() {
    let mut tensors = lora(LAYER, Some(1.0));
    tensors.extend(lora("lora_unet_mid_block_attentions_0_proj_out", None));
    tensors.push((format!("{LAYER}.surplus"), counting(&[3])));
    tensors.push(("nonsense".into(), counting(&[3])));
    tensors.push((
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight".into(),
        counting(&[6, 2]),
    ));
    tensors.push((
        "bundle_emb.face.string_to_param.*".into(),
        counting(&[2, 8]),
    ));
    let (_folder, path) = file(&tensors, &[("ss_base_model_version", "sd_v1")]);
    let report = FileReport::open(&path).unwrap();
    let found = |kind| {
        let mut findings = report.findings.iter().filter(move |f| f.kind == kind);
        let first = findings.next().unwrap_or_else(|| panic!("no {kind:?}"));
        assert!(findings.next().is_none(), "more than one {kind:?}");
        first.key.clone()
    };
    let unknown: Vec<&str> = report
        .findings
        .iter()
        .filter(|f| f.kind == FindingKind::UnknownKey)
        .map(|f| f.key.as_str())
        .collect();
    assert_eq!(unknown, ["nonsense", &format!("{LAYER}.surplus")]);
    let fc1 = "lora_te_text_model_encoder_layers_0_mlp_fc1";
    assert_eq!(
        found(FindingKind::MissingPart),
        format!("{fc1}.lora_down.weight")
    );
    assert_eq!(
        found(FindingKind::MissingAlpha),
        "lora_unet_mid_block_attentions_0_proj_out.alpha"
    );
    assert_eq!(report.base_model, BaseModel::Sd1);
    assert_eq!(report.format(), Some(Format::Kohya));
    assert_eq!(report.families(), BTreeMap::from([(Family::Lora, 2)]));
    assert_eq!(report.ranks(), BTreeMap::from([(2, 2)]));
    assert_eq!(report.alphas(), [1.0, 2.0]);
    assert_eq!(report.embeddings.iter().collect::<Vec<_>>(), ["face"]);
    let text = report.to_string();
    for word in [
        "kohya",
        "Stable Diffusion 1.x",
        "nonsense",
        "face",
        "error",
        "note",
    ] {
        assert!(text.contains(word), "{text}");
    }
    // Strict stops, lenient keeps what can be read.
    assert!(AdapterSet::load(&path, &Device::Cpu).is_err());
    let set = lenient(&path);
    assert_eq!(set.len(), 2);
    assert_eq!(set.bundled_embeddings().count(), 1);
    let left_out = set.left_out().join("\n");
    assert!(left_out.contains("nonsense"), "{left_out}");
}

#[test]
fn values_that_are_no_numbers_are_found() {
    for (bad, dtype) in [
        (f32::NAN, DType::F32),
        (f32::INFINITY, DType::F16),
        (f32::NEG_INFINITY, DType::BF16),
        (f32::NAN, DType::F64),
    ] {
        let mut tensors = lora(LAYER, Some(1.0));
        let up = Tensor::full(bad, (6, 2), &Device::Cpu).unwrap();
        tensors[1].1 = up.to_dtype(dtype).unwrap();
        tensors.extend(lora("lora_unet_mid_block_attentions_0_proj_out", Some(1.0)));
        let (_folder, path) = file(&tensors, &[]);
        assert_eq!(FileReport::open(&path).unwrap().errors().count(), 0);
        let report = FileReport::open_checking_values(&path).unwrap();
        let finding = report.errors().next().unwrap();
        assert_eq!(finding.kind, FindingKind::NotFinite);
        assert_eq!(finding.key, format!("{LAYER}.lora_up.weight"));
        let error = AdapterSet::load(&path, &Device::Cpu).unwrap_err();
        says(&error, &["file.safetensors", "lora_up.weight", "12", "NaN"]);
        assert_eq!(lenient(&path).len(), 1);
    }
}

#[test]
fn values_beyond_the_dtype_are_not_written() {
    let mut large = lora(LAYER, Some(2.0));
    large[1].1 = (&large[1].1 * 1e6).unwrap();
    // A factor beside the matrices, as old versions of LyCORIS wrote it, overflows f32.
    let mut scaled = lora(LAYER, Some(2.0));
    scaled[1].1 = (&scaled[1].1 * 1e30).unwrap();
    scaled.push((format!("{LAYER}.scalar"), number(1e30)));
    for (tensors, dtype) in [(large, DType::F16), (scaled, DType::F32)] {
        let (folder, path) = file(&tensors, &[]);
        let set = AdapterSet::load(&path, &Device::Cpu).unwrap();
        let options = SaveOptions {
            dtype: Some(dtype),
            ..SaveOptions::default()
        };
        let before = std::fs::read(&path).unwrap();
        let error = set.save(&path, &options).unwrap_err();
        says(
            &error,
            &["file.safetensors", "not written", "lora_up.weight"],
        );
        assert_eq!(std::fs::read(&path).unwrap(), before);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

#[test]
fn merged_values_beyond_the_dtype_are_not_written() {
    let folder = folder();
    let (base, output) = (folder.path().join("base"), folder.path().join("merged"));
    let key = "model.diffusion_model.middle_block.1.proj_in.weight";
    let weight = Tensor::ones((6, 4), DType::F16, &Device::Cpu).unwrap();
    write_at(&base, &vec![(key.to_owned(), weight)], &[]);
    let mut tensors = lora(LAYER, Some(2.0));
    tensors[1].1 = (&tensors[1].1 * 1e7).unwrap();
    let set = load(&tensors).unwrap();
    let merge = |multiplier: f64| {
        let adapters = [(&set, Strength::new(multiplier, multiplier))];
        merge_into_file(&base, &adapters, &output, &MergeOptions::default())
    };
    says(&merge(1.0).unwrap_err(), &["merged", key, "F16"]);
    assert!(!output.exists());
    merge(1e-4).unwrap();
}

#[test]
fn numbers_that_make_no_sense() {
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let (_folder, path) = file(&lora(LAYER, Some(bad)), &[]);
        let error = AdapterSet::load(&path, &Device::Cpu).unwrap_err();
        says(&error, &["file.safetensors", LAYER, "alpha"]);
        let report = FileReport::open(&path).unwrap();
        assert_eq!(report.errors().next().unwrap().kind, FindingKind::BadValue);
    }
    let mut tensors = lora(LAYER, None);
    tensors.push((format!("{LAYER}.alpha"), counting(&[2])));
    says(
        &load(&tensors).unwrap_err(),
        &["alpha", "[2]", "single number"],
    );
}

#[test]
fn partners_that_disagree_are_named_with_both_shapes() {
    let mut tensors = lora(LAYER, Some(1.0));
    tensors[1].1 = counting(&[6, 3]);
    says(
        &load(&tensors).unwrap_err(),
        &[
            "file.safetensors",
            LAYER,
            "lora_up.weight",
            "[6, 3]",
            "[out, 2]",
        ],
    );
    let loha = |b: &[usize]| {
        keyed(
            LAYER,
            vec![
                ("hada_w1_a", counting(&[6, 2])),
                ("hada_w1_b", counting(&[2, 4])),
                ("hada_w2_a", counting(&[6, 2])),
                ("hada_w2_b", counting(b)),
                ("alpha", number(1.0)),
            ],
        )
    };
    says(
        &load(&loha(&[3, 4])).unwrap_err(),
        &["hada_w2_b", "[3, 4]", "[2, inputs]"],
    );
    says(&load(&loha(&[2, 5])).unwrap_err(), &["hada_w2", "[6, 4]"]);
}

struct One(Layer);

impl Adaptable for One {
    fn component(&self) -> Component {
        Component::Unet
    }
    fn visit_layers(
        &mut self,
        visit: &mut dyn FnMut(&mut Layer) -> lora_core::Result<()>,
    ) -> lora_core::Result<()> {
        visit(&mut self.0)
    }
}

fn model(dims: &[usize]) -> One {
    let op = match dims.len() {
        2 => LayerOp::Linear,
        _ => LayerOp::Conv2d(Conv2dParams::default()),
    };
    One(Layer::new(
        "mid_block.attentions.0.proj_in",
        BaseLayer::new(counting(dims), None, op),
    ))
}

#[test]
fn an_adapter_for_another_model() {
    let (_folder, path) = file(&lora(LAYER, Some(1.0)), &[]);
    let mut set = AdapterSet::load(&path, &Device::Cpu).unwrap();
    let error = set.attach(&mut model(&[6, 5]), 1.0).unwrap_err();
    says(
        &error,
        &[
            "file.safetensors",
            LAYER,
            "lora_down.weight [2, 4]",
            "[6, 5]",
        ],
    );
    let error = set.merge(&mut model(&[7, 4]), 1.0).unwrap_err();
    says(&error, &["file.safetensors", LAYER, "[7, 4]", "[6, 4]"]);
    // A kernel of the right size and another form.
    let tensors = keyed(
        LAYER,
        vec![
            ("lora_down.weight", counting(&[2, 9, 1, 1])),
            ("lora_up.weight", counting(&[6, 2, 1, 1])),
        ],
    );
    let error = load(&tensors)
        .unwrap()
        .attach(&mut model(&[6, 1, 3, 3]), 1.0);
    says(&error.unwrap_err(), &["[6, 1, 3, 3]", "[2, 9, 1, 1]"]);
    for (key, kind) in [
        ("lora_te2_text_model_x.alpha", "SDXL"),
        ("lora_unet_double_blocks_0_x.alpha", "Flux"),
    ] {
        let tensors = vec![(key.to_string(), number(1.0))];
        says(&load(&tensors).unwrap_err(), &[kind, key]);
        let (_folder, path) = file(&tensors, &[]);
        let report = FileReport::open(&path).unwrap();
        let finding = report.errors().next().unwrap();
        assert_eq!(finding.kind, FindingKind::WrongModel);
        assert_ne!(report.base_model, BaseModel::Sd1);
    }
    let (_folder, path) = file(
        &keyed(
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
            vec![
                ("lora_down.weight", counting(&[2, 1024])),
                ("lora_up.weight", counting(&[6, 2])),
            ],
        ),
        &[("ss_base_model_version", "sd_v1")],
    );
    assert_eq!(FileReport::open(&path).unwrap().base_model, BaseModel::Sd2);
}

#[test]
fn ranks_above_the_layer_are_read_with_a_remark() {
    // Trainers make them for thin layers; the product is right all the same.
    let tensors = keyed(
        LAYER,
        vec![
            ("lora_down.weight", counting(&[8, 4])),
            ("lora_up.weight", counting(&[6, 8])),
            ("alpha", number(8.0)),
        ],
    );
    let (_folder, path) = file(&tensors, &[]);
    let report = FileReport::open(&path).unwrap();
    assert_eq!(report.errors().count(), 0);
    assert!(
        report
            .findings
            .iter()
            .any(|f| f.kind == FindingKind::LargeRank)
    );
    let product = counting(&[6, 8]).matmul(&counting(&[8, 4])).unwrap();
    let want: Vec<f32> = product.flatten_all().unwrap().to_vec1().unwrap();
    close(&delta(&tensors), &want);
}

#[test]
fn a_sum_tells_what_it_is_made_of_and_nothing_of_one_training() {
    let (_first, zoe) = file(
        &lora(LAYER, Some(1.0)),
        &[
            ("modelspec.title", "Zoe"),
            ("ss_base_model_version", "sd_v1"),
            ("ss_clip_skip", "1"),
            ("ss_network_args", "{}"),
            ("ss_output_name", "zoe"),
            ("ss_sd_model_name", "a.safetensors"),
            ("ss_training_comment", "first try"),
        ],
    );
    let (_second, other) = file(
        &lora(LAYER, Some(1.0)),
        &[
            ("ss_base_model_version", "sd_v1"),
            ("ss_sd_model_name", "b.safetensors"),
        ],
    );
    let sets = [zoe, other].map(|path| AdapterSet::load(path, &Device::Cpu).unwrap());
    let parts = [0, 1].map(|i| (&sets[i], Strength::default()));
    let (sum, _) = compose(&parts, None, None, None).unwrap();
    let expected = [
        ("modelspec.merged_from", "Zoe, file"),
        ("ss_base_model_version", "sd_v1"),
        ("ss_network_alpha", "4"),
        ("ss_network_dim", "4"),
        ("ss_network_module", "networks.lora"),
        ("ss_training_comment", "sum of 2 adapters"),
    ];
    let got = sum.metadata().iter();
    let got: Vec<_> = got.map(|(k, v)| (k.as_str(), v.as_str())).collect();
    assert_eq!(got, expected);
}

// Damaged bytes.

fn bytes() -> Vec<u8> {
    let (_folder, path) = file(&lora(LAYER, Some(1.0)), &[("ss_x", "y")]);
    std::fs::read(path).unwrap()
}

/// Opens bytes as a file in every way.
fn probe(bytes: &[u8]) -> (lora_core::Result<FileReport>, lora_core::Result<AdapterSet>) {
    let folder = folder();
    let path = folder.path().join("file.safetensors");
    std::fs::write(&path, bytes).unwrap();
    let options = LoadOptions {
        strictness: Strictness::Lenient,
        ..Default::default()
    };
    drop(AdapterSet::load_with(&path, &Device::Cpu, &options));
    (
        FileReport::open_checking_values(&path),
        AdapterSet::load(&path, &Device::Cpu),
    )
}

#[test]
fn truncated_files_are_refused_at_every_length() {
    let whole = bytes();
    for length in 0..whole.len() {
        let (report, set) = probe(&whole[..length]);
        says(&report.unwrap_err(), &["file.safetensors"]);
        says(&set.unwrap_err(), &["file.safetensors"]);
    }
}

#[test]
fn mutated_headers_never_panic() {
    let whole = bytes();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for place in 0..header {
        for byte in [0u8, b'0', b'9', b'"', b'[', b'-', 0xff] {
            let mut changed = whole.clone();
            changed[place] = byte;
            drop(probe(&changed));
        }
    }
}

/// A file with this header and this many bytes behind it.
fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut all = (header.len() as u64).to_le_bytes().to_vec();
    all.extend(header.as_bytes());
    all.resize(all.len() + data, 0);
    all
}

#[test]
fn headers_that_lie_are_refused() {
    let tensor = |dtype: &str, shape: &str, start: u64, end: u64| {
        format!(
            r#"{{"{LAYER}.lora_up.weight":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}}}"#
        )
    };
    let overlapping = format!(
        r#"{{"{LAYER}.lora_up.weight":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"{LAYER}.lora_down.weight":{{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}}}"#
    );
    let huge = u64::MAX;
    for (what, header, data) in [
        ("end beyond the file", tensor("F32", "[2]", 0, 8), 4),
        ("dtype of another size", tensor("F16", "[2]", 0, 8), 8),
        ("dtype that nobody knows", tensor("F31", "[2]", 0, 8), 8),
        ("start behind the end", tensor("F32", "[2]", 8, 0), 8),
        (
            "huge dims",
            tensor("F32", "[4294967296,4294967296,4294967296]", 0, 8),
            8,
        ),
        (
            "dims of zero bytes",
            tensor("F32", "[4294967296,0]", 0, 8),
            8,
        ),
        ("huge offsets", tensor("F32", "[2]", huge - 7, huge), 8),
        ("negative dims", tensor("F32", "[-2]", 0, 8), 8),
        ("a hole", tensor("F32", "[2]", 4, 12), 12),
        ("bytes left over", tensor("F32", "[2]", 0, 8), 16),
        ("overlap", overlapping, 12),
        ("no object", "[]".into(), 0),
        ("no JSON", "{".into(), 0),
    ] {
        let (report, set) = probe(&with_header(&header, data));
        let error = report.map(|_| ()).expect_err(what);
        says(&error, &["file.safetensors"]);
        assert!(set.is_err(), "{what}");
    }
    for length in [0u64, 1, 1 << 20, 1 << 40, u64::MAX, u64::MAX - 7] {
        let mut all = length.to_le_bytes().to_vec();
        all.extend(b"{}");
        assert!(probe(&all).0.is_err(), "{length}");
    }
}

#[test]
fn sound_headers_with_odd_tensors_are_refused_by_name() {
    for shape in ["[]", "[0]", "[0,2]", "[1,1,1,1,1,1,1,1]"] {
        let size = if shape.contains('0') { 0 } else { 4 };
        let header = format!(
            r#"{{"{LAYER}.lora_up.weight":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{size}]}},"{LAYER}.lora_down.weight":{{"dtype":"F32","shape":{shape},"data_offsets":[{size},{}]}}}}"#,
            2 * size
        );
        let (report, set) = probe(&with_header(&header, 2 * size));
        assert!(report.unwrap().errors().count() > 0, "{shape}");
        says(&set.unwrap_err(), &["file.safetensors", "lora_down.weight"]);
    }
}

// Parts that programs write or read in their own ways.

#[test]
fn bias_changes_stand_alone() {
    let change = counting(&[6]);
    let tensors = keyed(LAYER, vec![("diff_b", change.clone())]);
    let mut set = load(&tensors).unwrap();
    assert_eq!(set.iter().next().unwrap().1.family(), Family::Full);
    let mut model = model(&[6, 4]);
    let x = counting(&[1, 4]);
    let before: Vec<f32> = model
        .0
        .forward(&x)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap();
    set.attach(&mut model, 2.0).unwrap().strict().unwrap();
    let after: Vec<f32> = model
        .0
        .forward(&x)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap();
    let change: Vec<f32> = change.to_vec1().unwrap();
    let want: Vec<f32> = before
        .iter()
        .zip(&change)
        .map(|(b, c)| b + 2.0 * c)
        .collect();
    close(&after, &want);
    let error = set.attach(&mut self::model(&[5, 4]), 1.0).unwrap_err();
    says(&error, &["diff_b [6]", "[5, 4]"]);
}

#[test]
fn a_scale_replaces_alpha_over_rank() {
    let plain = delta(&lora(LAYER, Some(2.0)));
    let mut tensors = lora(LAYER, Some(2.0));
    tensors.push((format!("{LAYER}.scale"), number(0.25)));
    close(&delta(&tensors), &times(&plain, 0.25));
}

#[test]
fn a_scalar_is_part_of_the_change() {
    let families: [Vec<(&str, Tensor)>; 4] = [
        vec![
            ("lora_down.weight", counting(&[2, 4])),
            ("lora_up.weight", counting(&[6, 2])),
        ],
        vec![
            ("hada_w1_a", counting(&[6, 2])),
            ("hada_w1_b", counting(&[2, 4])),
            ("hada_w2_a", counting(&[6, 2])),
            ("hada_w2_b", counting(&[2, 4])),
        ],
        vec![
            ("lokr_w1", counting(&[2, 2])),
            ("lokr_w2_a", counting(&[3, 1])),
            ("lokr_w2_b", counting(&[1, 2])),
        ],
        vec![
            ("a1.weight", counting(&[4, 2])),
            ("a2.weight", counting(&[2, 4])),
            ("b1.weight", counting(&[6, 2])),
            ("b2.weight", counting(&[2, 4])),
        ],
    ];
    for parts in families {
        let plain = delta(&keyed(LAYER, parts.clone()));
        let mut with = parts;
        with.push(("scalar", number(0.5)));
        close(&delta(&keyed(LAYER, with)), &times(&plain, 0.5));
    }
}

#[test]
fn residuals_are_added_before_the_scale() {
    let plain = delta(&lora(LAYER, Some(1.0)));
    let mut dense = lora(LAYER, Some(1.0));
    dense.push((format!("{LAYER}.bias"), counting(&[6, 4])));
    let residual: Vec<f32> = counting(&[6, 4]).flatten_all().unwrap().to_vec1().unwrap();
    let want: Vec<f32> = plain
        .iter()
        .zip(&residual)
        .map(|(p, r)| p + 0.5 * r)
        .collect();
    close(&delta(&dense), &want);

    let indices = Tensor::new(&[[0i64, 5, 5], [1, 3, 3]], &Device::Cpu).unwrap();
    let sparse = |indices: &Tensor| {
        let mut tensors = lora(LAYER, Some(1.0));
        let size = Tensor::new(&[6i64, 4], &Device::Cpu).unwrap();
        tensors.extend(keyed(
            LAYER,
            vec![
                ("bias_indices", indices.to_dtype(DType::I16).unwrap()),
                (
                    "bias_values",
                    Tensor::new(&[2f32, 4., 8.], &Device::Cpu).unwrap(),
                ),
                ("bias_size", size.to_dtype(DType::I16).unwrap()),
            ],
        ));
        tensors
    };
    let mut want = plain;
    want[1] += 0.5 * 2.0;
    want[23] += 0.5 * 12.0;
    let tensors = sparse(&indices);
    close(&delta(&tensors), &want);
    // In the branch as in the delta, and through another file.
    let folder = folder();
    let path = folder.path().join("again.safetensors");
    let options = SaveOptions {
        dtype: Some(DType::F16),
        ..Default::default()
    };
    let mut set = load(&tensors).unwrap();
    set.save(&path, &options).unwrap();
    let again = delta_for(&AdapterSet::load(&path, &Device::Cpu).unwrap(), &[6, 4]);
    for (a, w) in again.iter().zip(&want) {
        assert!((a - w).abs() < 1e-2, "{again:?}\n{want:?}");
    }
    let mut model = model(&[6, 4]);
    let x = counting(&[3, 4]);
    let before = model.0.forward(&x).unwrap();
    set.attach(&mut model, 1.0).unwrap();
    let change = (model.0.forward(&x).unwrap() - before).unwrap();
    let weight = Tensor::from_vec(want, (6, 4), &Device::Cpu).unwrap();
    let want = x.matmul(&weight.t().unwrap()).unwrap();
    let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    close(&flat(change), &flat(want));
    // Places outside the weight.
    let outside = Tensor::new(&[[0i64, 6, 5], [1, 3, 3]], &Device::Cpu).unwrap();
    says(
        &load(&sparse(&outside)).unwrap_err(),
        &["bias_values", "[6, 4]"],
    );
}

#[test]
fn weights_are_not_padded() {
    let mut tensors = lora(LAYER, Some(2.0));
    let shape = Tensor::new(&[6i64, 4], &Device::Cpu).unwrap();
    tensors.push((format!("{LAYER}.reshape_weight"), shape));
    let mut set = load(&tensors).unwrap();
    set.attach(&mut model(&[6, 4]), 1.0).unwrap();
    tensors[2].1 = Tensor::new(&[6i64, 9], &Device::Cpu).unwrap();
    tensors.truncate(2);
    let shape = Tensor::new(&[6i64, 9], &Device::Cpu).unwrap();
    tensors.push((format!("{LAYER}.reshape_weight"), shape));
    let error = load(&tensors).unwrap().attach(&mut model(&[6, 4]), 1.0);
    says(
        &error.unwrap_err(),
        &["reshape_weight", "[6, 9]", "[6, 4]", "not supported"],
    );
}

#[test]
fn full_kronecker_factors_ignore_alpha_and_rank_ones_do_not() {
    let lokr = |parts: Vec<(&'static str, Tensor)>| delta(&keyed(LAYER, parts));
    let full = || {
        vec![
            ("lokr_w1", counting(&[2, 2])),
            ("lokr_w2", counting(&[3, 2])),
        ]
    };
    let plain = lokr(full());
    let mut with = full();
    with.push(("alpha", number(1000.0)));
    close(&lokr(with.clone()), &plain);
    with.push(("scale", number(0.5)));
    close(&lokr(with), &times(&plain, 0.5));
    // Rank 1: some readers take another axis for the rank, or the scale for 1.
    let low = |alpha| {
        lokr(vec![
            ("lokr_w1", counting(&[2, 2])),
            ("lokr_w2_a", counting(&[3, 1])),
            ("lokr_w2_b", counting(&[1, 2])),
            ("alpha", number(alpha)),
        ])
    };
    close(&low(0.5), &times(&low(1.0), 0.5));
}

#[test]
fn rank_one_is_read_from_the_right_axis() {
    let tensors = |alpha| {
        keyed(
            LAYER,
            vec![
                ("lora_down.weight", counting(&[1, 4])),
                ("lora_up.weight", counting(&[6, 1])),
                ("alpha", number(alpha)),
            ],
        )
    };
    close(&delta(&tensors(0.5)), &times(&delta(&tensors(1.0)), 0.5));
}

#[test]
fn a_missing_alpha_is_scale_one_even_where_other_layers_have_one() {
    let mut tensors = lora(LAYER, None);
    let plain = delta(&tensors);
    tensors.extend(lora("lora_unet_mid_block_attentions_0_proj_out", Some(0.5)));
    close(&delta(&tensors), &plain);
    close(&delta(&lora(LAYER, Some(2.0))), &plain);
}

#[test]
fn alpha_as_a_list_of_one_and_in_half_precision() {
    let plain = delta(&lora(LAYER, Some(0.5)));
    let mut tensors = lora(LAYER, None);
    let alpha = number(0.5)
        .reshape(1)
        .unwrap()
        .to_dtype(DType::F16)
        .unwrap();
    tensors.push((format!("{LAYER}.alpha"), alpha));
    close(&delta(&tensors), &plain);
}

#[test]
fn factors_of_projections_in_either_number_of_axes() {
    let flat = load(&lora(LAYER, Some(2.0))).unwrap();
    let deep = keyed(
        LAYER,
        vec![
            ("lora_down.weight", counting(&[2, 4, 1, 1])),
            ("lora_up.weight", counting(&[6, 2, 1, 1])),
            ("alpha", number(2.0)),
        ],
    );
    let deep = load(&deep).unwrap();
    for dims in [&[6usize, 4][..], &[6, 4, 1, 1]] {
        close(&delta_for(&flat, dims), &delta_for(&deep, dims));
        for set in [&flat, &deep] {
            set.clone().attach(&mut model(dims), 1.0).unwrap();
        }
    }
}

#[test]
fn tucker_axes_as_the_trainer_means_them() {
    // Index 0 of the core goes with up, index 1 with down.
    let mut core = vec![0f32; 2 * 2 * 9];
    core[9] = 1.0; // [0, 1, 0, 0]
    let core = Tensor::from_vec(core, (2, 2, 3, 3), &Device::Cpu).unwrap();
    let unit = |rows: usize, columns: usize, at: usize| {
        let mut values = vec![0f32; rows * columns];
        values[at] = 1.0;
        Tensor::from_vec(values, (rows, columns, 1, 1), &Device::Cpu).unwrap()
    };
    let tensors = keyed(
        LAYER,
        vec![
            ("lora_down.weight", unit(2, 1, 1)),
            ("lora_mid.weight", core),
            ("lora_up.weight", unit(1, 2, 0)),
        ],
    );
    let got = delta_for(&load(&tensors).unwrap(), &[1, 1, 3, 3]);
    assert_eq!(got[0], 1.0);
    assert!(got[1..].iter().all(|v| *v == 0.0));
}

#[test]
fn magnitudes_tell_their_axis_by_shape() {
    let with = |shape: &[usize]| {
        let mut tensors = lora(LAYER, Some(2.0));
        let scale = Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
        tensors.push((format!("{LAYER}.dora_scale"), scale));
        let set = load(&tensors).unwrap();
        let base = counting(&[6, 4]);
        let delta = set.iter().next().unwrap().1.delta(&base, 1.0).unwrap();
        (delta + base).unwrap()
    };
    let norms = |t: Tensor, axis: usize| -> Vec<f32> {
        t.sqr()
            .unwrap()
            .sum(axis)
            .unwrap()
            .sqrt()
            .unwrap()
            .to_vec1()
            .unwrap()
    };
    close(&norms(with(&[6, 1]), 1), &[1.0; 6]);
    close(&norms(with(&[1, 4]), 0), &[1.0; 4]);
}

#[test]
fn names_without_the_text_model_level() {
    let layer = "encoder_layers_0_mlp_fc1";
    for prefix in [
        "lora_te_",
        "lora_te1_",
        "lora_te_text_model_",
        "lora_te1_text_model_",
    ] {
        let set = load(&lora(&format!("{prefix}{layer}"), Some(1.0))).unwrap();
        let names: Vec<&str> = set.names().collect();
        assert_eq!(
            names,
            ["lora_te_text_model_encoder_layers_0_mlp_fc1"],
            "{prefix}"
        );
    }
}

#[test]
fn both_numbers_of_the_first_upsampler() {
    for n in [1, 2] {
        let set = load(&lora(&format!("lora_unet_output_blocks_2_{n}_conv"), None)).unwrap();
        let names: Vec<&str> = set.names().collect();
        assert_eq!(names, ["lora_unet_up_blocks_0_upsamplers_0_conv"]);
    }
}

#[test]
fn comfyui_spells_both_models_out() {
    let mut tensors = lora("diffusion_model.middle_block.1.proj_in", Some(1.0));
    let text = "text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc2";
    tensors.extend(lora(text, Some(1.0)));
    let (_folder, path) = file(&tensors, &[]);
    let report = FileReport::open(&path).unwrap();
    assert_eq!(report.format(), Some(Format::Comfy));
    let names: Vec<&str> = report.layers.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        ["lora_te_text_model_encoder_layers_3_mlp_fc2", LAYER]
    );
    close(&delta(&lora(LAYER, Some(1.0))), &delta(&tensors));
}

#[test]
fn ia3_by_its_own_keys() {
    let tensors = keyed(
        LAYER,
        vec![
            ("weight", counting(&[6])),
            ("on_input", Tensor::new(0i64, &Device::Cpu).unwrap()),
        ],
    );
    let folder = folder();
    let path = folder.path().join("again.safetensors");
    let options = SaveOptions {
        dtype: Some(DType::F16),
        ..Default::default()
    };
    load(&tensors).unwrap().save(&path, &options).unwrap();
    // The flag stays a whole number, whatever the dtype.
    let file = lora_core::format::TensorFile::open(&path).unwrap();
    assert_eq!(file.dtype(&format!("{LAYER}.on_input")), Some(DType::I64));
    assert_eq!(AdapterSet::load(&path, &Device::Cpu).unwrap().len(), 1);
    // A bare `weight` alone is nothing that could be told apart.
    let tensors = keyed(LAYER, vec![("weight", counting(&[6]))]);
    says(&load(&tensors).unwrap_err(), &[LAYER, "weight"]);
}

#[test]
fn norm_changes_without_a_bias() {
    let tensors = keyed("lora_unet_conv_norm_out", vec![("w_norm", counting(&[4]))]);
    let set = load(&tensors).unwrap();
    close(
        &delta_for(&set, &[4]),
        &counting(&[4]).to_vec1::<f32>().unwrap(),
    );
}

#[test]
fn a_core_between_gloras_second_pair() {
    let core = counting(&[2, 2, 3, 3]);
    let parts = |core: Option<Tensor>, b2: &[usize]| {
        let mut parts = vec![
            ("a1.weight", counting(&[4, 2, 1, 1])),
            ("a2.weight", counting(&[2, 4, 1, 1])),
            ("b1.weight", counting(&[6, 2, 1, 1])),
            ("b2.weight", counting(b2)),
        ];
        parts.extend(core.map(|t| ("bm.weight", t)));
        keyed(LAYER, parts)
    };
    // b2 and core multiplied out by hand.
    let b2 = counting(&[2, 4, 1, 1]);
    let mut product = vec![0f32; 2 * 4 * 9];
    let c: Vec<f32> = core.flatten_all().unwrap().to_vec1().unwrap();
    let b: Vec<f32> = b2.flatten_all().unwrap().to_vec1().unwrap();
    for p in 0..2 {
        for i in 0..4 {
            for k in 0..9 {
                let terms = (0..2).map(|q| c[(p * 2 + q) * 9 + k] * b[q * 4 + i]);
                product[(p * 4 + i) * 9 + k] = terms.sum();
            }
        }
    }
    let mut plain = parts(None, &[2, 4, 3, 3]);
    plain[3].1 = Tensor::from_vec(product, (2, 4, 3, 3), &Device::Cpu).unwrap();
    let dims = [6usize, 4, 3, 3];
    let want = delta_for(&load(&plain).unwrap(), &dims);
    let got = delta_for(&load(&parts(Some(core), &[2, 4, 1, 1])).unwrap(), &dims);
    close(&got, &want);
    let wrong = parts(Some(counting(&[3, 3, 3, 3])), &[2, 4, 1, 1]);
    says(&load(&wrong).unwrap_err(), &["bm.weight", "[3, 3, 3, 3]"]);
}

/// sd-scripts' OFT: its own prefix, and an alpha of 0 that holds the rotation still.
#[test]
fn sd_scripts_oft() {
    let prefix = LAYER.replace("lora_", "oft_");
    let blocks = counting(&[2, 3, 3]);
    let tensors = |alpha: f32| {
        keyed(
            &prefix,
            vec![("oft_blocks", blocks.clone()), ("alpha", number(alpha))],
        )
    };
    // Unbounded, both programs rotate alike.
    let lycoris = keyed(LAYER, vec![("oft_blocks", blocks.clone())]);
    close(&delta(&tensors(100.0)), &delta(&lycoris));
    let still = delta(&tensors(0.0));
    assert!(still.iter().all(|v| v.abs() < 1e-6), "{still:?}");
    // The bound is alpha times the outputs.
    let skew = (&blocks - blocks.transpose(1, 2).unwrap()).unwrap();
    let norm = skew
        .sqr()
        .unwrap()
        .sum_all()
        .unwrap()
        .to_scalar::<f32>()
        .unwrap()
        .sqrt();
    let alpha = 0.25 * norm / 6.0;
    let shrunk = keyed(LAYER, vec![("oft_blocks", (&blocks * 0.25).unwrap())]);
    close(&delta(&tensors(alpha)), &delta(&shrunk));
    // Its prefix is what tells it apart, so it is kept.
    let folder = folder();
    let path = folder.path().join("again.safetensors");
    let set = load(&tensors(alpha)).unwrap();
    assert_eq!(set.iter().next().unwrap().1.family(), Family::KohyaOft);
    for layout in [SaveLayout::Kohya, SaveLayout::KohyaLdm] {
        let options = SaveOptions {
            layout,
            ..Default::default()
        };
        set.save(&path, &options).unwrap();
        let again = AdapterSet::load(&path, &Device::Cpu).unwrap();
        assert_eq!(again.names().collect::<Vec<_>>(), [LAYER]);
        close(&delta_for(&again, &[6, 4]), &delta(&tensors(alpha)));
    }
}

#[test]
fn layouts_refuse_what_they_cannot_say() {
    let folder = folder();
    let path = folder.path().join("adapter_model.safetensors");
    let save = |set: &AdapterSet, layout| {
        let options = SaveOptions {
            layout,
            ..Default::default()
        };
        set.save(&path, &options).map(|_| ())
    };
    let strange = load(&lora("lora_unet_nowhere", Some(1.0))).unwrap();
    for layout in [
        SaveLayout::KohyaLdm,
        SaveLayout::Diffusers,
        SaveLayout::DiffusersOld,
        SaveLayout::Peft,
    ] {
        says(&save(&strange, layout).unwrap_err(), &["lora_unet_nowhere"]);
    }
    save(&strange, SaveLayout::Kohya).unwrap();
    let mut by_input = lora(LAYER, Some(1.0));
    by_input.push((format!("{LAYER}.dora_scale"), counting(&[1, 4])));
    let by_input = load(&by_input).unwrap();
    for layout in [SaveLayout::Diffusers, SaveLayout::Peft] {
        says(&save(&by_input, layout).unwrap_err(), &[LAYER, "per input"]);
    }
    let mut bundle = lora(LAYER, Some(1.0));
    bundle.push(("bundle_emb.x.clip_l".into(), counting(&[1, 768])));
    let bundle = load(&bundle).unwrap();
    says(
        &save(&bundle, SaveLayout::Diffusers).unwrap_err(),
        &["embedding"],
    );
    let mut two = lora(LAYER, Some(1.0));
    two.extend(lora(
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        Some(1.0),
    ));
    says(
        &save(&load(&two).unwrap(), SaveLayout::Peft).unwrap_err(),
        &["two models"],
    );
}

/// A length of 640 is stored as the bytes 80 02, with which pickles begin, too.
#[test]
fn a_header_may_have_any_length() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let mut header = br#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#.to_vec();
    header.resize(640, b' ');
    let mut bytes = 640u64.to_le_bytes().to_vec();
    bytes.extend(&header);
    bytes.extend(1f32.to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let file = lora_core::format::TensorFile::open(&path).unwrap();
    assert_eq!(file.names(), ["w"]);
    std::fs::write(&path, b"\x80\x02}q\x00X\x01\x00\x00\x00wq\x01K\x01s.").unwrap();
    let error = lora_core::format::TensorFile::open(&path).unwrap_err();
    assert!(matches!(error, lora_core::Error::Pickle { .. }), "{error}");
}
