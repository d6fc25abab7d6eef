//! What is printed to a reader that stops reading, as `head` does.
#![cfg(unix)]

use std::process::{Command, Stdio};

#[test]
fn programs_end_quietly_when_nobody_reads_on() {
    let here = std::env::current_exe().expect("this test's own file");
    let folder = here.ancestors().nth(2).expect("cargo's folder");
    let picture_folder = lora_examples::demo_pictures();
    let pictures = picture_folder.to_string_lossy();
    for (name, arguments) in [
        ("dataset", vec![&*pictures, "--quick", "--images"]),
        ("train", vec!["--help"]),
        ("doctor", vec![]),
    ] {
        let program = folder.join("examples").join(name);
        if !program.exists() {
            eprintln!("the example {name} is not built, nothing tested");
            continue;
        }
        let mut child = Command::new(program)
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        drop(child.stdout.take());
        let ended = child.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success() && said.is_empty(), "{name}: {said}");
    }
}
