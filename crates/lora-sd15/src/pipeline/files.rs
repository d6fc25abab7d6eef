//! Files found by the names that prompts and grids give them.

use std::path::{Path, PathBuf};

use lora_core::format::TensorFile;

use crate::{Error, Result};

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
    let named = |file: &&PathBuf| {
        stem(file) == Some(name) || file.file_name().is_some_and(|whole| whole == name)
    };
    let found = files.iter().find(named).cloned();
    found.ok_or_else(|| not_found(what, folder, name, &files))
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
    let mut files = Vec::new();
    collect(folder, &mut files, 0)?;
    files.sort();
    Ok(files)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>, depth: usize) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if path.is_dir() && depth < 8 {
            collect(&path, files, depth + 1)?;
        } else if path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("safetensors"))
        {
            files.push(path);
        }
    }
    Ok(())
}
