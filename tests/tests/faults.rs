//! What happens to files when things go wrong: killed processes, full disks, folders that
//! cannot be written, pictures that vanish, two runs in one folder, clocks that jump.
//!
//! The test with a hundred kills takes minutes and runs alone:
//! `cargo test --release -p lora-tests --test faults -- --ignored --nocapture`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use candle_core::Device;
use lora_core::AdapterSet;
use lora_core::algebra::{MergeOptions, Strength, merge_into_file};
use lora_core::format::TensorFile;
use lora_optim::OptimizerState;
use lora_tests::golden_path;
use lora_train::{Event, Outcome, RunState, TrainConfig, Trainer};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn model() -> PathBuf {
    golden_path("sd15", "mini_ldm.safetensors")
}

fn pictures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo")
}

fn config(output: &Path) -> TrainConfig {
    TrainConfig {
        pretrained_model_name_or_path: Some(model()),
        train_data_dir: Some(pictures()),
        output_dir: Some(output.to_path_buf()),
        output_name: Some("zoe".into()),
        resolution: "64".into(),
        min_bucket_reso: 64,
        max_bucket_reso: 64,
        train_batch_size: 4,
        learning_rate: Some(1e-3),
        max_train_steps: 8,
        save_every_n_steps: Some(1),
        save_last_n_steps: Some(2),
        save_state: true,
        seed: Some(7),
        ..TrainConfig::default()
    }
}

fn train(config: TrainConfig) -> Result<PathBuf, String> {
    let mut observer = |_: &Event<'_>| {};
    let trainer = Trainer::new(config, &Device::Cpu, &mut observer);
    let mut trainer = trainer.map_err(|error| error.to_string())?;
    match trainer.run(&mut observer, &AtomicBool::new(false)) {
        Ok(Outcome::Finished(path) | Outcome::Stopped(path)) => Ok(path),
        Err(error) => Err(error.to_string()),
    }
}

/// The bytes after the header: times in the metadata may differ.
fn tensors(path: &Path) -> Vec<u8> {
    let bytes = std::fs::read(path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].to_vec()
}

/// Everything below a folder, hidden files included.
fn list(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = std::fs::read_dir(folder) else {
        return found;
    };
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            found.extend(list(&path));
        }
        found.push(path);
    }
    found.sort();
    found
}

fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().unwrap().to_string_lossy();
    name.ends_with(".tmp") || name.contains(".partial")
}

/// Every file with a finished name is whole; returns how many there are.
fn assert_whole(folder: &Path) -> usize {
    let mut count = 0;
    for path in list(folder) {
        let unfinished = path
            .ancestors()
            .take_while(|p| *p != folder)
            .any(is_unfinished);
        if unfinished {
            continue;
        }
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") {
            let file = TensorFile::open(&path).unwrap();
            assert_eq!(file.not_finite(), [], "{}", path.display());
            count += 1;
        } else if name.ends_with("-state") {
            let text = std::fs::read_to_string(path.join("train_state.json")).unwrap();
            serde_json::from_str::<RunState>(&text).unwrap();
            OptimizerState::load(path.join("optimizer.safetensors")).unwrap();
            count += 1;
        } else if name.ends_with(".json") {
            let text = std::fs::read_to_string(&path).unwrap();
            serde_json::from_str::<serde_json::Value>(&text).unwrap();
        }
    }
    count
}

/// The child's part of all tests here: it does one thing in one folder.
#[test]
fn child_process() {
    let Ok(task) = std::env::var("FAULT_CHILD") else {
        return;
    };
    let folder = PathBuf::from(std::env::var_os("FAULT_FOLDER").unwrap());
    let done = match task.as_str() {
        "train" => {
            let mut states: Vec<PathBuf> = list(&folder)
                .into_iter()
                .filter(|path| path.to_string_lossy().ends_with("-state"))
                .collect();
            states.sort();
            let resume = states.pop();
            train(TrainConfig {
                resume,
                ..config(&folder)
            })
            .map(|_| ())
        }
        "cache" => {
            let config = TrainConfig {
                resolution: "256".into(),
                max_bucket_reso: 256,
                cache_latents: true,
                cache_latents_to_disk: true,
                ..config(&folder)
            };
            Trainer::new(config, &Device::Cpu, &mut |_: &Event<'_>| {})
                .map(|_| ())
                .map_err(|error| error.to_string())
        }
        "merge" => loop {
            merge(&folder, "merged.safetensors");
        },
        "list" => Ok(()),
        other => panic!("no task {other}"),
    };
    if let Err(error) = done {
        println!("refused: {error}");
    }
    // The folder may be gone with the process.
    assert_whole(&folder);
    for path in list(&folder) {
        println!("left: {}", path.display());
    }
}

fn merge(folder: &Path, name: &str) {
    let adapter = AdapterSet::load(folder.join("adapter.safetensors"), &Device::Cpu).unwrap();
    let adapters = [(&adapter, Strength::new(1.0, 1.0))];
    let options = MergeOptions::default();
    merge_into_file(&model(), &adapters, &folder.join(name), &options).unwrap();
}

/// This program as a child, started by a shell command if given (`"$@"` is the child).
fn child(task: &str, folder: &Path, shell: Option<&str>) -> Command {
    let program = std::env::current_exe().unwrap();
    let mut command = match shell {
        None => Command::new(program),
        Some(script) => {
            let mut shell = Command::new("sh");
            shell.args(["-c", script, "sh"]).arg(program);
            shell
        }
    };
    command
        .args([
            "child_process",
            "--exact",
            "--nocapture",
            "--test-threads=1",
        ])
        .env("FAULT_CHILD", task)
        .env("FAULT_FOLDER", folder);
    command
}

fn text_of(output: &Output) -> String {
    let both = [output.stdout.as_slice(), &output.stderr].concat();
    String::from_utf8_lossy(&both).into_owned()
}

#[track_caller]
fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

#[test]
fn two_runs_never_write_the_same_files() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder.path().join("out"));
    let mut observer = |_: &Event<'_>| {};
    let first = Trainer::new(config.clone(), &Device::Cpu, &mut observer).unwrap();
    let message = train(config.clone()).unwrap_err();
    let process = format!("process {}", std::process::id());
    assert_says(&message, &["out", "zoe", &process, "output_name"]);
    // Another name in the same folder is no conflict.
    let other = TrainConfig {
        output_name: Some("ada".into()),
        max_train_steps: 1,
        ..config.clone()
    };
    train(other).unwrap();
    drop(first);
    train(TrainConfig {
        max_train_steps: 1,
        ..config
    })
    .unwrap();
    assert!(
        !list(folder.path())
            .iter()
            .any(|path| path.ends_with(".zoe.lock"))
    );
}

#[test]
fn names_do_not_lead_out_of_the_output_folder() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["../zoe", "a/b", "a\\b", "..", ""] {
        let config = TrainConfig {
            output_name: Some(name.into()),
            ..config(&folder.path().join("out"))
        };
        assert_says(&train(config).unwrap_err(), &["output_name"]);
    }
    assert_eq!(list(folder.path()), [] as [PathBuf; 0]);
}

#[test]
fn what_vanishes_ends_the_run_with_a_state_to_go_on_from() {
    for (cached, vanishing, says) in [
        (false, "pictures", ".png"),
        (true, "cut/latent-cache", "cache"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let pictures_here = folder.path().join("pictures");
        std::fs::create_dir(&pictures_here).unwrap();
        for path in list(&pictures()).iter().filter(|path| path.is_file()) {
            std::fs::copy(path, pictures_here.join(path.file_name().unwrap())).unwrap();
        }
        let toml = format!("[[datasets]]\n[[datasets.subsets]]\nimage_dir = {pictures_here:?}\n");
        std::fs::write(folder.path().join("data.toml"), toml).unwrap();
        let config = |name: &str| TrainConfig {
            train_data_dir: None,
            dataset_config: Some(folder.path().join("data.toml")),
            // Pictures that always look the same are read once, before training.
            random_crop: !cached,
            cache_latents_to_disk: cached,
            save_every_n_steps: None,
            max_train_steps: 12,
            ..config(&folder.path().join(name))
        };
        let whole = train(config("whole")).unwrap();

        let (here, away) = (folder.path().join(vanishing), folder.path().join("away"));
        let mut observer = |event: &Event<'_>| {
            if matches!(event, Event::Batch(report) if report.step == 2) {
                std::fs::rename(&here, &away).unwrap();
            }
        };
        let mut trainer = Trainer::new(config("cut"), &Device::Cpu, &mut observer).unwrap();
        let error = trainer
            .run(&mut observer, &AtomicBool::new(false))
            .unwrap_err();
        assert_says(&error.to_string(), &[says]);
        drop(trainer);
        assert_whole(&folder.path().join("cut"));

        std::fs::rename(&away, &here).unwrap();
        let states = list(&folder.path().join("cut"));
        let state = states
            .iter()
            .find(|p| p.to_string_lossy().ends_with("-state"));
        let resumed = train(TrainConfig {
            resume: Some(state.unwrap().clone()),
            ..config("resumed")
        });
        assert!(tensors(&resumed.unwrap()) == tensors(&whole), "{vanishing}");
    }
}

/// Files that grow beyond a limit fail to be written, as on a full disk.
#[cfg(unix)]
#[test]
fn a_file_that_cannot_grow_leaves_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let old = folder.path().join("zoe.safetensors");
    std::fs::copy(
        golden_path("adapters", "file_lora_attn_mlp.safetensors"),
        &old,
    )
    .unwrap();
    let before = std::fs::read(&old).unwrap();
    // In blocks of 512 bytes: settings fit, an adapter does not.
    let limited = "trap '' XFSZ; ulimit -f 60; exec \"$@\"";
    let output = child("train", folder.path(), Some(limited))
        .output()
        .unwrap();
    let text = text_of(&output);
    assert!(output.status.success(), "{text}");
    assert_says(&text, &["refused: ", ".safetensors", "too large"]);
    assert!(std::fs::read(&old).unwrap() == before);
    let unfinished: Vec<PathBuf> = list(folder.path())
        .into_iter()
        .filter(|p| is_unfinished(p))
        .collect();
    assert_eq!(unfinished, [] as [PathBuf; 0]);
}

/// Small file systems of their own, where the system lets us have them.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_and_a_read_only_one_are_named_and_leave_no_halves() {
    let on = |options: &str| {
        let folder = tempfile::tempdir().unwrap();
        let script =
            format!("mount -t tmpfs -o {options} tmpfs \"$FAULT_FOLDER\" || exit 42; exec \"$@\"");
        let inner = format!("exec unshare -rm sh -c '{script}' sh \"$@\"");
        let output = child("train", folder.path(), Some(&inner))
            .output()
            .unwrap();
        let text = text_of(&output);
        (output.status.success(), text)
    };
    let (runs, full) = on("size=400k");
    if !runs && !full.contains("left: ") && !full.contains("panicked") {
        eprintln!("no file systems of our own here, nothing tested: {full}");
        return;
    }
    assert_says(&full, &["refused: ", "No space left"]);
    assert!(
        !full.contains("left: ") || !full.contains(".tmp\n"),
        "{full}"
    );
    assert!(!full.contains(".partial\n"), "{full}");
    let (_, read_only) = on("ro");
    assert_says(&read_only, &["refused: ", "Read-only"]);
}

#[test]
fn clocks_may_jump() {
    let folder = tempfile::tempdir().unwrap();
    let whole = train(config(&folder.path().join("whole"))).unwrap();
    let out = folder.path().join("out");
    for (time, steps) in [("4102444800", 3), ("-1", 5), ("nonsense", 8)] {
        let mut command = child("train", &out, None);
        command.env("SOURCE_DATE_EPOCH", time);
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        let reached = out.join(format!("zoe-step{steps:08}-state"));
        while child.try_wait().unwrap().is_none() && !(steps < 8 && reached.exists()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(tensors(&whole) == tensors(&out.join("zoe.safetensors")));
}

/// Kills children at random moments, and looks at their files each time.
struct Killer {
    rng: ChaCha8Rng,
    kills: usize,
}

impl Killer {
    /// Runs a child for at most `longest`; returns whether it came to its end.
    fn run(&mut self, mut child: Child, longest: Duration) -> bool {
        let until = Instant::now() + longest.mul_f64(self.rng.random());
        while Instant::now() < until {
            if child.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        self.kills += 1;
        false
    }
}

fn spawn(task: &str, folder: &Path) -> Child {
    let mut command = child(task, folder, None);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

fn fresh(folder: &Path) {
    if folder.exists() {
        std::fs::remove_dir_all(folder).unwrap();
    }
    std::fs::create_dir_all(folder).unwrap();
}

#[test]
#[ignore = "takes minutes"]
fn a_hundred_kills_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let seed = std::env::var("FAULT_SEED").map_or(1, |text| text.parse().unwrap());
    let mut killer = Killer {
        rng: ChaCha8Rng::seed_from_u64(seed),
        kills: 0,
    };
    let (mut checked, mut leftovers) = (0, 0);

    // Training: each child goes on from the newest state.
    let started = Instant::now();
    let whole = folder.path().join("whole");
    fresh(&whole);
    assert!(spawn("train", &whole).wait().unwrap().success());
    let one_run = started.elapsed();
    let expected = tensors(&whole.join("zoe.safetensors"));
    let out = folder.path().join("train");
    fresh(&out);
    let mut finished = 0;
    while killer.kills < 60 || finished == 0 {
        let ended = killer.run(spawn("train", &out), one_run);
        checked += assert_whole(&out);
        let result = out.join("zoe.safetensors");
        if result.exists() {
            assert!(
                tensors(&result) == expected,
                "the resumed run ended elsewhere"
            );
            finished += 1;
            leftovers += list(&out).iter().filter(|p| is_unfinished(p)).count();
            fresh(&out);
        } else {
            assert!(!ended, "a run ended without a result");
        }
    }
    println!(
        "training: {} kills, {finished} runs finished with the same bytes",
        killer.kills
    );

    // Merging: the old file or the new one, never a mixture.
    let out = folder.path().join("merge");
    fresh(&out);
    std::fs::copy(
        whole.join("zoe.safetensors"),
        out.join("adapter.safetensors"),
    )
    .unwrap();
    let merge_started = Instant::now();
    merge(&out, "expected.safetensors");
    let longest = Duration::from_millis(300) + 4 * merge_started.elapsed();
    let (old, new) = (
        b"old".to_vec(),
        std::fs::read(out.join("expected.safetensors")).unwrap(),
    );
    let (merged, before) = (out.join("merged.safetensors"), killer.kills);
    let mut changed = 0;
    while killer.kills < before + 30 {
        std::fs::write(&merged, &old).unwrap();
        killer.run(spawn("merge", &out), longest);
        let is = std::fs::read(&merged).unwrap();
        assert!(is == old || is == new, "a half-written file");
        changed += usize::from(is == new);
        checked += 1;
    }
    leftovers += list(&out).iter().filter(|p| is_unfinished(p)).count();
    println!(
        "merging: {} kills, {changed} left the new file, the others the old one",
        killer.kills - before
    );

    // Caching: every entry is whole, and the next run uses it.
    let out = folder.path().join("cache");
    fresh(&out);
    let started = Instant::now();
    assert!(spawn("cache", &out).wait().unwrap().success());
    let (longest, before) = (started.elapsed(), killer.kills);
    let whole_cache: Vec<(PathBuf, Vec<u8>)> = cache_entries(&out);
    assert!(!whole_cache.is_empty());
    fresh(&out);
    let mut entries = 0;
    while killer.kills < before + 30 {
        let ended = killer.run(spawn("cache", &out), longest);
        for entry in cache_entries(&out) {
            assert!(whole_cache.contains(&entry), "{}", entry.0.display());
            entries += 1;
        }
        checked += assert_whole(&out);
        if ended {
            assert_eq!(cache_entries(&out), whole_cache);
            leftovers += list(&out).iter().filter(|p| is_unfinished(p)).count();
            fresh(&out);
        }
    }
    println!(
        "caching: {} kills, {entries} entries compared",
        killer.kills - before
    );
    println!(
        "{} kills in all, {checked} finished files and states checked, {leftovers} temporary ones left behind",
        killer.kills
    );
}

/// Finished cache files with their bytes.
fn cache_entries(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    list(&folder.join("latent-cache"))
        .into_iter()
        .filter(|path| path.is_file() && !is_unfinished(path))
        .map(|path| {
            let bytes = std::fs::read(&path).unwrap();
            (path, bytes)
        })
        .collect()
}
