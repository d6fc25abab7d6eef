//! Datasets, captions, buckets and resizing against what sd-scripts does.
//!
//! Where the crate cures a fault of the reference on purpose, the wanted value is
//! cured here in plain sight, see `cured_*`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::Tensor;
use lora_data::{
    BucketTable, CaptionConfig, CaptionDraws, CaptionTime, ConfigFile, ConfigSyntax, DataConfig,
    Dataset, DatasetConfig, Interpolation, Picture, Role, Size, StepCount, crop_ltrb,
    process_caption, resize, side_limits, split_sizes,
};
use lora_tests::{Report, Tolerance, golden_json, golden_tensors, values};
use serde_json::{Value, json};

/// f64 arithmetic in the same order; 1e-12 allows for another one.
const F64: Tolerance = Tolerance {
    atol: 1e-12,
    rtol: 1e-12,
};

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key]
        .as_array()
        .unwrap_or_else(|| panic!("`{key}` is no list in {value}"))
}

fn number(value: &Value) -> u32 {
    value
        .as_u64()
        .and_then(|n| n.try_into().ok())
        .unwrap_or_else(|| panic!("{value} is no size"))
}

fn size(value: &Value) -> Size {
    Size::new(number(&value[0]), number(&value[1]))
}

/// Every key of an object must be known: another data set may have more.
fn check_keys(report: &mut Report, case: &str, object: &Value, known: &[&str]) {
    for key in object.as_object().into_iter().flat_map(|o| o.keys()) {
        if !known.contains(&key.as_str()) {
            report.fail(case, key, "this test does not know what to do with it");
        }
    }
}

// ---------------------------------------------------------------- buckets

fn bucket_config(case: &Value) -> DatasetConfig {
    DatasetConfig {
        resolution: size(&case["reso"]),
        enable_bucket: true,
        min_bucket_reso: number(&case["min"]),
        max_bucket_reso: number(&case["max"]),
        bucket_reso_steps: number(&case["steps"]),
        bucket_no_upscale: case["no_upscale"].as_bool().unwrap_or(false),
        ..Default::default()
    }
}

#[test]
fn golden_kohya_buckets() {
    let golden = golden_json("kohya", "buckets.json");
    let mut report = Report::default();
    check_keys(
        &mut report,
        "buckets",
        &golden,
        &["tables", "decisions", "no_bucket", "adjust"],
    );
    for case in list(&golden, "tables") {
        let name = format!(
            "table {} {}..{} step {}",
            case["reso"], case["min"], case["max"], case["steps"]
        );
        let table = BucketTable::new(&bucket_config(case)).expect("a table");
        let wanted: Vec<Size> = list(case, "resolutions_wh").iter().map(size).collect();
        report.equal(&name, "resolutions_wh", &table.sizes().to_vec(), &wanted);
    }
    for case in list(&golden, "decisions") {
        check_decision(&mut report, case);
    }
    for case in list(&golden, "no_bucket") {
        let name = format!("no bucket {}", case["image_wh"]);
        let config = DatasetConfig {
            enable_bucket: false,
            resolution: size(&case["bucket_wh"]),
            ..Default::default()
        };
        let fit = BucketTable::new(&config)
            .and_then(|t| t.assign(size(&case["image_wh"])))
            .expect("a fit");
        report.equal(&name, "bucket_wh", &fit.bucket, &size(&case["bucket_wh"]));
        report.equal(
            &name,
            "resized_wh",
            &fit.resized,
            &size(&case["resized_wh"]),
        );
    }
    for case in list(&golden, "adjust") {
        let name = format!(
            "adjust {}..{} step {}",
            case["min"], case["max"], case["steps"]
        );
        let mut case = case.clone();
        // The data set was made with this resolution.
        case["reso"] = json!([512, 512]);
        let limits = side_limits(&bucket_config(&case)).expect("limits");
        report.equal(
            &name,
            "adjusted",
            &limits,
            &(number(&case["adjusted"][0]), number(&case["adjusted"][1])),
        );
    }
    report.finish();
}

fn check_decision(report: &mut Report, case: &Value) {
    let name = format!(
        "{} {}..{} step {} no_upscale {} image {}",
        case["reso"], case["min"], case["max"], case["steps"], case["no_upscale"], case["image_wh"]
    );
    let options = ["reso", "min", "max", "steps", "no_upscale", "image_wh"];
    let results = [
        "bucket_wh",
        "resized_wh",
        "ar_error",
        "center_crop_xy",
        "crop_ltrb",
        "error",
    ];
    let covers = "bucket_smaller_than_or_equal_resized";
    check_keys(
        report,
        &name,
        case,
        &[&options[..], &results, &[covers]].concat(),
    );
    let image = size(&case["image_wh"]);
    let fit = match (
        BucketTable::new(&bucket_config(case)).and_then(|t| t.assign(image)),
        case.get("error"),
    ) {
        (Ok(fit), None) => fit,
        (Err(_), Some(_)) => return report.equal(&name, "error", &true, &true),
        (Ok(fit), Some(error)) => {
            return report.fail(&name, "error", format!("got {fit:?}, wanted {error}"));
        }
        (Err(error), None) => {
            return report.fail(&name, "bucket_wh", format!("got the error `{error}`"));
        }
    };
    report.equal(&name, "bucket_wh", &fit.bucket, &size(&case["bucket_wh"]));
    report.equal(
        &name,
        "resized_wh",
        &fit.resized,
        &size(&case["resized_wh"]),
    );
    let ar_error = case["ar_error"].as_f64().expect("ar_error");
    report.slice(&name, "ar_error", &[fit.aspect_error], &[ar_error], F64);
    if let Some(wanted) = case.get("center_crop_xy") {
        let wanted = (number(&wanted[0]), number(&wanted[1]));
        report.equal(&name, "center_crop_xy", &fit.center_crop(), &wanted);
    }
    if let Some(wanted) = case.get("crop_ltrb") {
        let wanted: Vec<f64> = wanted
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_f64)
            .collect();
        report.slice(
            &name,
            "crop_ltrb",
            &crop_ltrb(fit.bucket, image),
            &wanted,
            F64,
        );
    }
    if let Some(wanted) = case[covers].as_bool() {
        report.equal(&name, covers, &fit.resized.covers(fit.bucket), &wanted);
    }
}

// ---------------------------------------------------------------- resize

fn picture(tensor: &Tensor) -> Picture {
    let (height, width, _) = tensor.dims3().expect("an HWC image");
    let rgb = values(tensor).into_iter().map(|v| v as u8).collect();
    Picture {
        size: Size::new(width as u32, height as u32),
        rgb,
        alpha: None,
    }
}

#[test]
fn golden_kohya_resize() {
    let tensors = golden_tensors("kohya", "resize.safetensors");
    let index = golden_json("kohya", "index.json");
    let mut report = Report::default();
    for case in list(&index, "cases")
        .iter()
        .filter(|case| case["group"] == "resize")
    {
        let name = case["name"].as_str().expect("a name");
        let input = picture(&tensors[&format!("{name}.in.img")]);
        let wanted = &tensors[&format!("{name}.out.img")];
        let atol = case["tolerance"]["abs_u8"].as_f64().expect("abs_u8");
        let tolerance = Tolerance { atol, rtol: 0.0 };
        let config = &case["config"];
        if config.get("bucket_wh").is_some() {
            check_trim(&mut report, name, case, &input, &tensors, tolerance);
            continue;
        }
        check_keys(&mut report, name, config, &["from_hw", "to_hw", "mode"]);
        let filter = config["mode"]
            .as_str()
            .map(|m| m.parse::<Interpolation>().expect("a known filter"));
        let to = Size::new(number(&config["to_hw"][1]), number(&config["to_hw"][0]));
        let got: Vec<f64> = resize(&input, to, filter)
            .rgb
            .into_iter()
            .map(f64::from)
            .collect();
        report.slice(name, "img", &got, &values(wanted), tolerance);
    }
    report.finish();
}

/// Resize to cover, crop, normalize: run through a dataset of that one image.
fn check_trim(
    report: &mut Report,
    name: &str,
    case: &Value,
    input: &Picture,
    tensors: &BTreeMap<String, Tensor>,
    tolerance: Tolerance,
) {
    check_keys(report, name, &case["config"], &["bucket_wh", "resized_wh"]);
    let bucket = size(&case["config"]["bucket_wh"]);
    let resized = size(&case["config"]["resized_wh"]);
    report.equal(
        name,
        "original_wh",
        &input.size,
        &size(&case["original_wh"]),
    );
    let ltrb: Vec<f64> = list(case, "crop_ltrb")
        .iter()
        .filter_map(Value::as_f64)
        .collect();
    report.slice(
        name,
        "crop_ltrb",
        &crop_ltrb(bucket, input.size),
        &ltrb,
        F64,
    );

    let folder = tempfile::tempdir().expect("a folder");
    save_png(&folder.path().join("a.png"), input.size, &input.rgb);
    // The resolution only has to be valid: the draw below says what is done.
    let dataset =
        Dataset::from_folder(folder.path(), &DatasetConfig::default()).expect("a dataset");
    let mut item = dataset.each_once(|_| true)[0].items[0];
    item.size = bucket;
    item.resize = resized;
    item.crop = (
        (resized.width - bucket.width) / 2,
        (resized.height - bucket.height) / 2,
    );
    let pixels = dataset.pixels(&item).expect("pixels");
    let norm: Vec<f64> = pixels.data.iter().map(|&v| f64::from(v)).collect();
    let wanted = values(&tensors[&format!("{name}.out.norm")]);
    let one_step = Tolerance {
        atol: tolerance.atol * 2.0 / 255.0 + 1e-6,
        rtol: 0.0,
    };
    report.slice(name, "norm", &norm, &wanted, one_step);
    let plane = bucket.area() as usize;
    let wanted = values(&tensors[&format!("{name}.out.img")]);
    let bytes: Vec<f64> = (0..plane * 3)
        .map(|i| ((norm[i % 3 * plane + i / 3] + 1.0) * 127.5).round())
        .collect();
    report.slice(name, "img", &bytes, &wanted, tolerance);
}

fn save_png(path: &Path, size: Size, rgb: &[u8]) {
    let file = fs::File::create(path).expect("a file");
    let mut encoder = png::Encoder::new(file, size.width, size.height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_compression(png::Compression::Fastest);
    let mut writer = encoder.write_header().expect("a header");
    writer.write_image_data(rgb).expect("image data");
}

// ---------------------------------------------------------------- captions

/// Replays recorded decisions and notices when another kind is asked for.
struct Recorded {
    draws: std::vec::IntoIter<Value>,
    wrong: Vec<String>,
}

impl Recorded {
    fn next(&mut self, kind: &str) -> Value {
        match self.draws.next() {
            Some(draw) if draw[0] == kind => draw,
            other => {
                self.wrong
                    .push(format!("asked for {kind}, recorded {other:?}"));
                Value::Null
            }
        }
    }
}

impl CaptionDraws for Recorded {
    fn unit(&mut self) -> f64 {
        self.next("random")[1].as_f64().unwrap_or_default()
    }

    fn choice(&mut self, count: usize) -> usize {
        let draw = self.next("choice_index");
        if draw[2].as_u64() != Some(count as u64) {
            self.wrong
                .push(format!("chose among {count}, recorded {draw}"));
        }
        draw[1].as_u64().unwrap_or_default() as usize
    }

    fn order(&mut self, count: usize) -> Vec<usize> {
        let draw = self.next("shuffle_permutation");
        let order: Vec<usize> = draw[1]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_u64)
            .map(|i| i as usize)
            .collect();
        if order.len() != count {
            self.wrong
                .push(format!("shuffled {count}, recorded {draw}"));
        }
        order
    }
}

fn caption_config(options: &Value) -> CaptionConfig {
    // Absent and null mean the default, as in sd-scripts.
    let given = options
        .as_object()
        .expect("options")
        .iter()
        .filter(|(_, value)| !value.is_null());
    let given: serde_json::Map<_, _> = given
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    serde_json::from_value(Value::Object(given)).expect("caption options of known names and types")
}

/// The reference leaves the marker in a caption whose tags it does not touch; the crate never does.
fn cured_marker(caption: &str, marker: &str) -> Vec<String> {
    let pieces = caption.split(marker).flat_map(|part| part.split(','));
    pieces
        .map(|piece| piece.trim().to_owned())
        .filter(|piece| !piece.is_empty())
        .collect()
}

#[test]
fn golden_kohya_captions() {
    let golden = golden_json("kohya", "captions.json");
    let mut report = Report::default();
    let others = [
        "parse_prompt_attention",
        "sample_prompt_lines",
        "warmup_number_parsing",
        "optimizer_args_parsing",
    ];
    check_keys(
        &mut report,
        "captions",
        &golden,
        &[&others[..], &["process_caption"]].concat(),
    );
    for case in list(&golden, "process_caption") {
        let name = case["name"].as_str().expect("a name");
        let known = [
            "name",
            "caption",
            "options",
            "epoch",
            "step",
            "max_train_steps",
            "draws",
            "result",
        ];
        check_keys(&mut report, name, case, &known);
        let config = caption_config(&case["options"]);
        let count = |key: &str| case[key].as_u64().expect("a count") as usize;
        let time = CaptionTime {
            epoch: count("epoch"),
            step: count("step"),
            max_train_steps: count("max_train_steps"),
        };
        let mut recorded = Recorded {
            draws: list(case, "draws").to_vec().into_iter(),
            wrong: Vec::new(),
        };
        let got = process_caption(
            case["caption"].as_str().expect("a caption"),
            &config,
            time,
            &mut recorded,
        );
        let wanted = case["result"].as_str().expect("a result");
        report.equal(name, "draws", &recorded.wrong, &Vec::new());
        report.equal(
            name,
            "draws left over",
            &recorded.draws.collect::<Vec<_>>(),
            &Vec::new(),
        );
        let marker = config.keep_tokens_separator.as_str();
        if !marker.is_empty() && wanted.contains(marker) {
            report.equal(name, "marker in the caption", &got.contains(marker), &false);
            report.equal(
                name,
                "result",
                &cured_marker(&got, marker),
                &cured_marker(wanted, marker),
            );
        } else {
            report.equal(name, "result", &got, &wanted.to_owned());
        }
    }
    report.finish();
}

// ---------------------------------------------------------------- dataset

/// The reference keeps a byte-order mark as part of the first tag; the crate removes it.
fn cured_caption(text: &str) -> String {
    text.trim_start_matches('\u{feff}').trim().to_owned()
}

fn write_layout(root: &Path, layout: &[Value]) {
    for file in layout {
        let text = |key: &str| file[key].as_str().expect("a text");
        let folder = root.join(text("root")).join(text("dir"));
        fs::create_dir_all(&folder).expect("a folder");
        let image = folder.join(text("file"));
        let image_size = size(&file["size_wh"]);
        save_png(
            &image,
            image_size,
            &vec![90; image_size.area() as usize * 3],
        );
        if let Some(caption) = file["caption_file"].as_str() {
            fs::write(image.with_extension("txt"), caption).expect("a caption");
        }
    }
}

fn load_run(root: &Path, run: &Value) -> Dataset {
    let options = DatasetConfig {
        resolution: Size::square(512),
        batch_size: run["batch_size"].as_u64().expect("batch_size") as usize,
        enable_bucket: run["enable_bucket"].as_bool().expect("enable_bucket"),
        bucket_no_upscale: run["no_upscale"].as_bool().expect("no_upscale"),
        ..Default::default()
    };
    Dataset::from_folders(
        root.join("train"),
        Some(root.join("reg")),
        &options,
        &DataConfig::default(),
    )
    .expect("a dataset")
}

#[test]
fn golden_kohya_dataset() {
    let golden = golden_json("kohya", "dataset.json");
    let mut report = Report::default();
    check_keys(
        &mut report,
        "dataset",
        &golden,
        &["layout", "subsets", "runs", "steps", "split"],
    );
    let root = tempfile::tempdir().expect("a folder");
    write_layout(root.path(), list(&golden, "layout"));
    for (i, run) in list(&golden, "runs").iter().enumerate() {
        let name = format!("run {i}");
        let options = ["batch_size", "enable_bucket", "no_upscale"];
        let counts = ["num_train_images", "num_reg_images", "batches_per_epoch"];
        let results = ["bucket_info", "tag_frequency", "images"];
        check_keys(
            &mut report,
            &name,
            run,
            &[options, counts, results].concat(),
        );
        let dataset = load_run(root.path(), run);
        check_subsets(&mut report, &name, &dataset, list(&golden, "subsets"));
        check_counts(&mut report, &name, &dataset, run);
        check_images(&mut report, &name, &dataset, run, root.path());
        check_epochs(&mut report, &name, &dataset);
    }
    for case in list(&golden, "steps") {
        let count = |key: &str| case[key].as_u64().expect("a count") as usize;
        let total = StepCount::new(count("batches"), count("grad_accum")).total(count("epochs"));
        report.equal(
            "steps",
            &case.to_string(),
            &total,
            &count("max_train_steps"),
        );
    }
    for case in list(&golden, "split") {
        check_split(&mut report, case);
    }
    report.finish();
}

fn check_subsets(report: &mut Report, name: &str, dataset: &Dataset, wanted: &[Value]) {
    let subsets = dataset.config().datasets[0].subsets.iter();
    let got = subsets.map(|subset| {
        let dir = subset
            .image_dir
            .as_deref()
            .and_then(Path::file_name)
            .map(|n| n.to_string_lossy());
        json!({
            "image_dir": dir, "num_repeats": subset.num_repeats,
            "is_reg": subset.is_reg, "class_tokens": subset.class_tokens,
        })
    });
    report.equal(name, "subsets", &got.collect::<Vec<_>>(), &wanted.to_vec());
}

fn check_counts(report: &mut Report, name: &str, dataset: &Dataset, run: &Value) {
    report.equal(
        name,
        "num_train_images",
        &json!(dataset.num_train_images()),
        &run["num_train_images"],
    );
    report.equal(
        name,
        "num_reg_images",
        &json!(dataset.num_reg_images()),
        &run["num_reg_images"],
    );
    report.equal(
        name,
        "batches_per_epoch",
        &json!(dataset.batches_per_epoch()),
        &run["batches_per_epoch"],
    );
    let stats = &dataset.stats()[0];
    let mut wanted_info = run["bucket_info"].clone();
    let mut info = stats
        .bucket_info
        .as_ref()
        .map_or(Value::Null, |info| info.to_json());
    if !wanted_info.is_null() {
        let error = |info: &mut Value| {
            info["mean_img_ar_error"]
                .take()
                .as_f64()
                .unwrap_or(f64::NAN)
        };
        report.slice(
            name,
            "mean_img_ar_error",
            &[error(&mut info)],
            &[error(&mut wanted_info)],
            F64,
        );
    }
    report.equal(name, "bucket_info", &info, &wanted_info);
    let mut wanted_tags: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
    for (folder, tags) in run["tag_frequency"].as_object().expect("tag_frequency") {
        let counts = wanted_tags.entry(folder.clone()).or_default();
        for (tag, count) in tags.as_object().expect("tags") {
            *counts.entry(cured_caption(tag)).or_default() +=
                count.as_u64().expect("a count") as usize;
        }
    }
    report.equal(name, "tag_frequency", &stats.tag_frequency, &wanted_tags);
}

fn check_images(report: &mut Report, name: &str, dataset: &Dataset, run: &Value, root: &Path) {
    let wanted = run["images"].as_object().expect("images");
    report.equal(
        name,
        "number of images",
        &dataset.images().len(),
        &wanted.len(),
    );
    for image in dataset.images() {
        let path = image
            .path
            .strip_prefix(root)
            .expect("a path below the root")
            .display()
            .to_string();
        let Some(wanted) = wanted.get(&path) else {
            report.fail(name, &path, "not among the reference's images");
            continue;
        };
        let got = json!({
            "repeats": image.repeats, "is_reg": image.role == Role::Regularization, "caption": image.caption,
            "bucket_wh": image.bucket, "resized_wh": image.resized,
        });
        let mut wanted = wanted.clone();
        wanted["caption"] = cured_caption(wanted["caption"].as_str().expect("a caption")).into();
        report.equal(name, &path, &got, &wanted);
    }
}

/// The promise that the reference's loader does not keep: each image exactly `repeats` times.
fn check_epochs(report: &mut Report, name: &str, dataset: &Dataset) {
    for epoch in 1..=2 {
        let plan = dataset.epoch(epoch, 42);
        report.equal(
            name,
            "planned batches",
            &plan.batches.len(),
            &dataset.batches_per_epoch(),
        );
        let mut seen = vec![0u32; dataset.images().len()];
        for batch in &plan.batches {
            for item in &batch.items {
                seen[item.image] += 1;
                report.equal(
                    name,
                    "bucket of the batch",
                    &dataset.images()[item.image].bucket,
                    &batch.size,
                );
            }
        }
        let wanted: Vec<u32> = dataset.images().iter().map(|image| image.repeats).collect();
        report.equal(name, &format!("draws in epoch {epoch}"), &seen, &wanted);
    }
}

/// The reference may share an image between the sets or leave validation empty; the crate does neither.
fn check_split(report: &mut Report, case: &Value) {
    let n = case["n"].as_u64().expect("n") as usize;
    let share = case["validation_split"].as_f64().expect("validation_split");
    let held_back = list(case, "val").len().max(1);
    report.equal(
        "split",
        &case.to_string(),
        &split_sizes(n, share),
        &(n - held_back, held_back),
    );
}

#[test]
fn golden_kohya_split_is_disjoint() {
    let golden = golden_json("kohya", "dataset.json");
    let mut report = Report::default();
    for case in list(&golden, "split") {
        let folder = tempfile::tempdir().expect("a folder");
        let n = case["n"].as_u64().expect("n") as usize;
        for i in 0..n {
            save_png(
                &folder.path().join(format!("p{i:02}.png")),
                Size::square(64),
                &[7; 64 * 64 * 3],
            );
        }
        let options = DatasetConfig {
            validation_split: case["validation_split"].as_f64().expect("validation_split"),
            validation_seed: case["seed"].as_u64(),
            ..Default::default()
        };
        let dataset = Dataset::from_folder(folder.path(), &options).expect("a dataset");
        let count = |role| {
            dataset
                .images()
                .iter()
                .filter(|image| image.role == role)
                .count()
        };
        let got = (count(Role::Train), count(Role::Validation));
        report.equal(
            "split",
            &case.to_string(),
            &got,
            &split_sizes(n, options.validation_split),
        );
        report.equal("split", "images", &dataset.images().len(), &n);
        let plan = dataset.epoch(1, 1);
        let trained = plan.batches.iter().flat_map(|batch| &batch.items);
        let held_back = trained
            .filter(|item| dataset.images()[item.image].role == Role::Validation)
            .count();
        report.equal("split", "validation images trained", &held_back, &0);
    }
    report.finish();
}

// ---------------------------------------------------------------- dataset config

/// Options given on sd-scripts' command line, over its defaults.
fn command_line(words: &[Value]) -> DatasetConfig {
    let mut options = serde_json::to_value(DatasetConfig::sd_scripts()).expect("options as JSON");
    let mut words = words.iter().filter_map(Value::as_str).peekable();
    while let Some(flag) = words.next() {
        let name = match flag.trim_start_matches("--") {
            "train_batch_size" => "batch_size",
            "dataset_repeats" => "num_repeats",
            name => name,
        };
        let value = words.next_if(|word| !word.starts_with("--"));
        let value = value.map_or(json!(true), |text| {
            text.parse().map_or(json!(text), Value::Number)
        });
        let slots = ["", "/subset", "/subset/captions"].map(|level| format!("{level}/{name}"));
        let slot = slots.iter().find(|slot| options.pointer(slot).is_some());
        let slot = slot.unwrap_or_else(|| panic!("no option for `{flag}`"));
        *options.pointer_mut(slot).expect("found just now") = value;
    }
    serde_json::from_value(options).expect("options of the right types")
}

/// The options of a dataset or subset under the reference's names.
fn flat(options: impl serde::Serialize) -> serde_json::Map<String, Value> {
    let mut flat = serde_json::to_value(options).expect("options as JSON");
    let mut flat = flat.as_object_mut().map(std::mem::take).expect("an object");
    if let Some(Value::Object(captions)) = flat.remove("captions") {
        flat.extend(captions);
    }
    flat
}

fn check_options(
    report: &mut Report,
    case: &str,
    got: &serde_json::Map<String, Value>,
    wanted: &Value,
    others: &[&str],
) {
    for (key, wanted) in wanted.as_object().expect("options") {
        if others.contains(&key.as_str()) {
            continue;
        }
        match got.get(key) {
            // 1 and 1.0 are the same value.
            Some(got) if got.as_f64().is_some() => {
                report.equal(case, key, &got.as_f64(), &wanted.as_f64())
            }
            Some(got) => report.equal(case, key, got, wanted),
            None => report.fail(case, key, "this option is not known"),
        }
    }
}

#[test]
fn golden_kohya_dataset_config() {
    let golden = golden_json("kohya", "dataset_config.json");
    let mut report = Report::default();
    check_keys(
        &mut report,
        "dataset_config",
        &golden,
        &["toml", "command_line", "resolved", "validation"],
    );
    let fallback = command_line(list(&golden, "command_line"));
    let run = DataConfig::default();
    let parse = |text: &str, syntax, fallback: &DatasetConfig| {
        ConfigFile::parse(text, syntax, Path::new("golden"), fallback, &run)
    };
    let file = parse(
        golden["toml"].as_str().expect("toml"),
        ConfigSyntax::Toml,
        &fallback,
    )
    .expect("a valid file");
    report.equal(
        "resolved",
        "datasets",
        &file.config.datasets.len(),
        &list(&golden, "resolved").len(),
    );
    for (i, (got, wanted)) in file
        .config
        .datasets
        .iter()
        .zip(list(&golden, "resolved"))
        .enumerate()
    {
        check_dataset_options(&mut report, &format!("dataset {i}"), got, wanted);
    }
    for case in list(&golden, "validation") {
        let name = case["name"].as_str().expect("a name");
        check_keys(&mut report, name, case, &["name", "config", "ok", "error"]);
        let result = parse(
            &case["config"].to_string(),
            ConfigSyntax::Json,
            &DatasetConfig::sd_scripts(),
        );
        match (&result, case["ok"].as_bool().expect("ok")) {
            (Ok(_), true) | (Err(_), false) => report.equal(name, "ok", &true, &true),
            (Ok(_), false) => report.fail(
                name,
                "ok",
                format!("accepted, wanted the error {}", case["error"]),
            ),
            (Err(error), true) => {
                report.fail(name, "ok", format!("got the error {error}, wanted none"))
            }
        }
    }
    report.finish();
}

fn check_dataset_options(report: &mut Report, name: &str, got: &DatasetConfig, wanted: &Value) {
    check_keys(
        report,
        name,
        wanted,
        &["is_dreambooth", "params", "subsets"],
    );
    // No part of a dataset here: run-wide, without effect in the reference, or for debugging.
    let others = ["network_multiplier", "debug_dataset", "prior_loss_weight"];
    check_options(report, name, &flat(got), &wanted["params"], &others);
    let is_folders = got
        .subsets
        .iter()
        .all(|subset| subset.metadata_file.is_none());
    report.equal(
        name,
        "is_dreambooth",
        &json!(is_folders),
        &wanted["is_dreambooth"],
    );
    report.equal(
        name,
        "subsets",
        &got.subsets.len(),
        &list(wanted, "subsets").len(),
    );
    for (j, (got, wanted)) in got.subsets.iter().zip(list(wanted, "subsets")).enumerate() {
        let name = format!("{name} subset {j}");
        let mut subset = flat(got);
        let preserve = json!({ "diff_output_preservation": true });
        let attributes = if got.diff_output_preservation {
            preserve
        } else {
            Value::Null
        };
        subset.insert("custom_attributes".into(), attributes);
        // Validation belongs to the dataset here; the listing cache does not exist.
        check_options(
            report,
            &name,
            &subset,
            wanted,
            &["validation_seed", "validation_split", "cache_info"],
        );
    }
}
