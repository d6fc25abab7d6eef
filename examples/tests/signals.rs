//! Ending the trainer from outside: it saves, says how to go on, and goes on.
#![cfg(unix)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The trainer, which cargo builds beside the tests.
fn trainer() -> Option<PathBuf> {
    let here = std::env::current_exe().ok()?;
    let program = here.parent()?.parent()?.join("examples/train");
    program.exists().then_some(program)
}

/// Starts a long run, sends a signal after its first update; returns what it printed.
fn stopped_by(signal: &str, program: &Path, output: &Path, resume: Option<&str>) -> String {
    let mut command = Command::new(program);
    command
        .args(["--pretrained_model_name_or_path"])
        .arg(lora_examples::demo_model())
        .arg("--train_data_dir")
        .arg(lora_examples::demo_pictures())
        .arg("--output_dir")
        .arg(output)
        .args([
            "--output_name",
            "zoe",
            "--resolution",
            "64",
            "--min_bucket_reso",
            "64",
        ])
        .args(["--max_train_steps", "100000", "--seed", "1"]);
    if let Some(state) = resume {
        command.args(["--resume", state]);
    }
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the trainer starts");
    let mut seen = String::new();
    let mut told = false;
    for line in BufReader::new(child.stderr.take().expect("piped")).lines() {
        let line = line.expect("text");
        seen.push_str(&line);
        seen.push('\n');
        if line.starts_with("epoch ") && !told {
            told = true;
            let id = child.id().to_string();
            let sent = Command::new("kill").args([signal, &id]).status();
            assert!(sent.is_ok_and(|status| status.success()));
        }
    }
    let ended = child.wait_with_output().expect("it ends");
    assert!(ended.status.success(), "{seen}");
    seen + &String::from_utf8_lossy(&ended.stdout)
}

#[test]
fn a_stopped_run_saves_and_says_how_to_go_on() {
    let Some(program) = trainer() else {
        eprintln!("the example train is not built, nothing tested");
        return;
    };
    let folder = std::env::temp_dir().join(format!("lora-signals-{}", std::process::id()));
    let text = stopped_by("-TERM", &program, &folder, None);
    let (_, hint) = text.split_once("go on with --resume ").expect(&text);
    let state = hint.split(" and ").next().unwrap_or("");
    assert!(Path::new(state).join("train_state.json").exists(), "{text}");

    let text = stopped_by("-INT", &program, &folder, Some(state));
    assert!(
        text.contains("going on from") && text.contains("saved"),
        "{text}"
    );
    std::fs::remove_dir_all(folder).expect("the folder is ours");
}
