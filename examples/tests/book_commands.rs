//! Every `cargo run --release --example ...` in the documentation names a program that exists,
//! a command that it has and options that it knows.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use lora_examples::repository;

/// Pages with commands.
fn pages() -> Vec<PathBuf> {
    let mut pages = vec![repository("README.md"), repository("assets/mini/README.md")];
    for folder in ["docs", "crates"] {
        for entry in std::fs::read_dir(repository(folder)).expect("a folder") {
            let path = entry.expect("an entry").path();
            match path.extension().is_some_and(|e| e == "md") {
                true => pages.push(path),
                false => pages.push(path.join("README.md")),
            }
        }
    }
    pages.retain(|path| path.is_file());
    pages
}

/// Commands with their continued lines joined, up to the end of the line, a comment or the
/// backtick that closes them.
fn commands(text: &str) -> Vec<String> {
    let joined = text.replace("\\\n", " ");
    let starts = joined.match_indices("cargo run --release --example ");
    let rests = starts.map(|(at, start)| &joined[at + start.len()..]);
    rests
        .map(|rest| {
            let end = rest.find(['\n', '`', '#']).unwrap_or(rest.len());
            rest[..end].trim().to_owned()
        })
        .collect()
}

/// Words; those in quotes are one word.
fn words(command: &str) -> Vec<&str> {
    let mut words = Vec::new();
    for (number, part) in command.split('"').enumerate() {
        match number % 2 {
            0 => words.extend(part.split_whitespace()),
            _ => words.push(part),
        }
    }
    words
}

#[test]
fn commands_in_the_documentation_exist() {
    // Cargo builds the examples beside the tests.
    let here = std::env::current_exe().expect("this program has a file");
    let folder = here.parent().and_then(|p| p.parent()).expect("a folder");
    let mut helps: BTreeMap<String, String> = BTreeMap::new();
    let mut seen = 0;
    for page in pages() {
        let text = std::fs::read_to_string(&page).expect("a page");
        for command in commands(&text) {
            let words = words(&command);
            let name = words[0];
            assert!(
                repository(&format!("examples/{name}.rs")).exists(),
                "{}: no example {name}",
                page.display()
            );
            let mut call = vec![name.to_owned()];
            // The tool for files has commands of its own; the trainer's options are looked at
            // by the tests of its settings.
            if name == "lora" {
                call.extend(words.get(2).map(|w| w.to_string()));
            }
            let program = folder.join("examples").join(name);
            let options: Vec<_> = words
                .iter()
                .filter(|w| w.starts_with('-'))
                .skip(1)
                .collect();
            if name == "train" || options.is_empty() || !program.exists() {
                continue;
            }
            let help = helps.entry(call.join(" ")).or_insert_with(|| {
                let output = Command::new(&program)
                    .args(&call[1..])
                    .arg("--help")
                    .output()
                    .expect("the program starts");
                assert!(output.status.success(), "{call:?} is no command");
                String::from_utf8_lossy(&output.stdout).into_owned()
            });
            for option in options.into_iter().copied() {
                let known = help
                    .split(|c: char| c.is_whitespace() || c == ',' || c == '=')
                    .any(|word| word == option);
                assert!(known, "{}: {call:?} knows no {option}", page.display());
                seen += 1;
            }
        }
    }
    assert!(
        folder.join("examples/lora").exists() == (seen > 10),
        "{seen}"
    );
}
