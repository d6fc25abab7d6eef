//! The program `generate` as its users run it, with the miniature.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use candle_core::Device;
use lora_core::format::{TensorFile, write_tensors};
use lora_sd15::{Image, Part, ldm_to_diffusers};

/// The program, which cargo builds beside the tests.
fn program() -> Option<Command> {
    let here = std::env::current_exe().ok()?;
    let program = here.parent()?.parent()?.join("examples/generate");
    program.exists().then(|| Command::new(program))
}

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("lora-generate-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for the test");
    folder
}

fn drawn(arguments: &[&str], output: &Path) -> Output {
    let mut command = program().expect("checked by the caller");
    let command = command.args(arguments).arg("--output").arg(output);
    command.output().expect("the program starts")
}

fn pictures(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("the folder is there");
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("a file").path()).collect();
    files.sort();
    files
}

#[test]
fn a_picture_is_drawn_again_to_the_byte() {
    if program().is_none() {
        eprintln!("the example generate is not built, nothing tested");
        return;
    }
    let folder = folder("again");
    let (first, second, third) = (folder.join("1"), folder.join("2"), folder.join("3"));
    let styles = folder.join("styles.csv");
    std::fs::write(
        &styles,
        "name,prompt,negative_prompt\nred,\"{prompt}, red hair\",blue\n",
    )
    .expect("written");
    let styles = styles.to_string_lossy().into_owned();
    let how = [
        "--prompt",
        "portrait, (smile:1.2)",
        "--style",
        "red",
        "--styles-file",
        &styles,
        "--seed",
        "5",
        "--steps",
        "3",
        "--width",
        "64",
        "--height",
        "64",
        "--hires-scale",
        "1.5",
        "--sampler",
        "DPM++ 2M Karras",
        "--compute",
        "bf16",
        "--vae-tile",
        "64",
    ];
    let outcome = drawn(&how, &first);
    assert!(outcome.status.success(), "{outcome:?}");
    let before = pictures(&first).remove(0);
    let from = before.to_string_lossy().into_owned();
    let outcome = drawn(&["--from", &from], &second);
    let said = String::from_utf8_lossy(&outcome.stderr);
    assert!(
        outcome.status.success() && !said.contains("warning"),
        "{said}"
    );
    let again = pictures(&second).remove(0);
    let bytes = |path: &Path| std::fs::read(path).expect("a picture");
    assert!(bytes(&before) == bytes(&again), "{again:?}");

    // From a picture, in a grid; each cell is drawn again alone.
    let grid = [
        "--init",
        &from,
        "--x",
        "Denoising=0.4,0.8",
        "--seed",
        "3",
        "--steps",
        "3",
    ];
    let outcome = drawn(&grid, &third);
    assert!(outcome.status.success(), "{outcome:?}");
    let cells = pictures(&third);
    let last = cells.last().expect("the grid and two cells");
    let alone = folder.join("4");
    let outcome = drawn(
        &["--from", &last.to_string_lossy(), "--init", &from],
        &alone,
    );
    assert!(outcome.status.success(), "{outcome:?}");
    assert!(bytes(last) == bytes(&pictures(&alone).remove(0)));
    std::fs::remove_dir_all(folder).expect("the folder is ours");
}

#[test]
#[cfg(unix)]
fn ctrl_c_leaves_whole_pictures() {
    let Some(mut command) = program() else {
        eprintln!("the example generate is not built, nothing tested");
        return;
    };
    let folder = folder("stopped");
    let mut child = command
        .args(["--batch-count", "10000", "--steps", "2", "--output"])
        .arg(&folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut line = String::new();
    let mut told = std::io::BufReader::new(child.stdout.take().expect("piped"));
    std::io::BufRead::read_line(&mut told, &mut line).expect("a picture's name");
    let sent = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(sent.is_ok_and(|status| status.success()));
    let ended = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(130), "{said}");
    let files = pictures(&folder);
    assert!(said.contains(&format!(": {}", files.len())), "{said}");
    for file in files {
        lora_sd15::Image::open_png(file).expect("a whole picture");
    }
    std::fs::remove_dir_all(folder).expect("the folder is ours");
}

/// The miniature's VAE as files of their own, whose pictures are brighter: with the names
/// of checkpoints (`ldm`) and of diffusers.
fn bright_vaes(folder: &Path) {
    let file = TensorFile::open(lora_examples::demo_model()).expect("the miniature");
    let (mut ldm, mut diffusers) = (BTreeMap::new(), BTreeMap::new());
    for key in file.names() {
        let Some((Part::Vae, name)) = ldm_to_diffusers(&key) else {
            continue;
        };
        let mut tensor = file.tensor(&key, &Device::Cpu).expect("a tensor");
        if name == "decoder.conv_out.bias" {
            tensor = (tensor + 0.5).expect("a bias");
        }
        let short = key.strip_prefix("first_stage_model.").expect("its prefix");
        ldm.insert(short.to_string(), tensor.clone());
        diffusers.insert(name, tensor);
    }
    for (name, tensors) in [("ldm", ldm), ("diffusers", diffusers)] {
        let path = folder.join(name).with_extension("safetensors");
        write_tensors(&path, &tensors, &BTreeMap::new()).expect("written");
    }
}

#[test]
fn grids_compare_vaes_and_draw_seeds_that_the_pictures_tell() {
    if program().is_none() {
        eprintln!("the example generate is not built, nothing tested");
        return;
    }
    let folder = folder("grids");
    bright_vaes(&folder);
    let vae = folder
        .join("ldm.safetensors")
        .to_string_lossy()
        .into_owned();
    let small = ["--steps", "2", "--width", "64", "--height", "64"];
    let cells = |name: &str, axis: &str, more: &[&str]| {
        let output = folder.join(name);
        let outcome = drawn(&[&small, &["--x", axis][..], more].concat(), &output);
        assert!(outcome.status.success(), "{outcome:?}");
        let mut files = pictures(&output);
        files.retain(|file| !file.ends_with("00001-grid.png"));
        files
    };
    let image = |path: &Path| Image::open_png(path).expect("a picture");
    let mean = |image: &Image| {
        let sum: u64 = image.rgb.iter().map(|v| u64::from(*v)).sum();
        sum / image.rgb.len() as u64
    };
    let files = cells("vae", "VAE=None,ldm,diffusers", &["--vae", &vae]);
    let [own, ldm, diffusers] = [0, 1, 2].map(|i| image(&files[i]));
    assert!(mean(&ldm) > mean(&own) + 20 && ldm == diffusers);

    let files = cells("seeds", "Seed=-1,-1", &[]);
    assert_eq!(files.len(), 2);
    for (i, file) in files.iter().enumerate() {
        let again = folder.join(format!("again{i}"));
        let outcome = drawn(&["--from", &file.to_string_lossy()], &again);
        assert!(outcome.status.success(), "{outcome:?}");
        assert!(image(file) == image(&pictures(&again).remove(0)));
    }
    assert!(image(&files[0]) != image(&files[1]));
    std::fs::remove_dir_all(folder).expect("the folder is ours");
}
