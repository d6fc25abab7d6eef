//! Files found by the names that prompts and grids give them.

use std::path::{Path, PathBuf};

use lora_core::format::TensorFile;

use crate::{Error, Result, Upscaler};

/// Finds an adapter file in a folder (and its sub-folders) by file stem or by the
/// name it was trained under (`ss_output_name`).
///
/// # Errors
/// [`Error::UnknownName`] listing what is there.
pub fn find_adapter(folder: &Path, name: &str) -> Result<PathBuf> {
    let files = weights(folder)?;
    if let Some(file) = files.iter().find(|file| stem(file) == Some(name)) {
        return Ok(file.clone());
    }
    for file in &files {
        let alias = TensorFile::open(file)
            .ok()
            .and_then(|f| f.metadata().remove("ss_output_name"));
        if alias.as_deref() == Some(name) {
            return Ok(file.clone());
        }
    }
    Err(not_found("adapter", folder, name, &files))
}

/// Finds a checkpoint or VAE (`what` it is, for messages) by its path or, in a folder and
/// its sub-folders, by file name or stem; the hash that the web UI shows behind it, as in
/// `name.safetensors [6ce0161689]`, is left out.
///
/// # Errors
/// [`Error::UnknownName`] listing what is there.
pub fn find_model(folder: &Path, what: &'static str, name: &str) -> Result<PathBuf> {
    let name = match name.rsplit_once(" [") {
        Some((name, hash)) if hash.ends_with(']') => name,
        _ => name,
    };
    if Path::new(name).exists() {
        return Ok(name.into());
    }
    let files = weights(folder)?;
    let found = files.iter().find(|file| is_named(file, name)).cloned();
    found.ok_or_else(|| not_found(what, folder, name, &files))
}

/// The names that the web UI shows for files of Real-ESRGAN.
const SHOWN: [(&str, &str); 6] = [
    ("R-ESRGAN 4x+", "RealESRGAN_x4plus"),
    ("R-ESRGAN 4x+ Anime6B", "RealESRGAN_x4plus_anime_6B"),
    ("R-ESRGAN 2x+", "RealESRGAN_x2plus"),
    ("R-ESRGAN General 4xV3", "realesr-general-x4v3"),
    ("R-ESRGAN General WDN 4xV3", "realesr-general-wdn-x4v3"),
    ("R-ESRGAN AnimeVideo", "realesr-animevideov3"),
];

/// Finds an upscaling network in a folder (and its sub-folders) by file name or stem, or by the
/// name that the web UI shows for it.
///
/// # Errors
/// [`Error::UnknownName`] listing the upscalers that need no file, and what is there.
pub fn find_upscaler(folder: &Path, name: &str) -> Result<PathBuf> {
    let files = match folder.is_dir() {
        true => files_of(folder, &["safetensors", "pth", "pt"])?,
        false => Vec::new(),
    };
    let shown = SHOWN.iter().find(|(shown, _)| *shown == name);
    let names = [Some(name), shown.map(|(_, stem)| *stem)];
    let named = |file: &&PathBuf| names.iter().flatten().any(|name| is_named(file, name));
    let found = files.iter().find(named).cloned();
    found.ok_or_else(|| Error::UnknownName {
        what: "upscaler",
        name: name.to_string(),
        known: Upscaler::ALL
            .iter()
            .map(|(name, _)| *name)
            .chain(files.iter().filter_map(|file| stem(file)))
            .chain([format!("networks in {}", folder.display()).as_str()])
            .collect::<Vec<_>>()
            .join(", "),
    })
}

/// Whether it is the file's name or its stem.
fn is_named(file: &Path, name: &str) -> bool {
    stem(file) == Some(name) || file.file_name().is_some_and(|whole| whole == name)
}

fn stem(path: &Path) -> Option<&str> {
    path.file_stem()?.to_str()
}

fn not_found(what: &'static str, folder: &Path, name: &str, files: &[PathBuf]) -> Error {
    let known: Vec<&str> = files.iter().filter_map(|file| stem(file)).collect();
    Error::UnknownName {
        what,
        name: name.to_string(),
        known: if known.is_empty() {
            format!("none in {}", folder.display())
        } else {
            known.join(", ")
        },
    }
}

/// The safetensors files of a folder, sorted.
fn weights(folder: &Path) -> Result<Vec<PathBuf>> {
    files_of(folder, &["safetensors"])
}

/// The files of a folder with one of these extensions, sorted.
fn files_of(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    collect(folder, extensions, &mut files, 0)?;
    files.sort();
    Ok(files)
}

fn collect(
    folder: &Path,
    extensions: &[&str],
    files: &mut Vec<PathBuf>,
    depth: usize,
) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if path.is_dir() && depth < 8 {
            collect(&path, extensions, files, depth + 1)?;
        } else if path
            .extension()
            .is_some_and(|e| extensions.iter().any(|known| e.eq_ignore_ascii_case(known)))
        {
            files.push(path);
        }
    }
    Ok(())
}
