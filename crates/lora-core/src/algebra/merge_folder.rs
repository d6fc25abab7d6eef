//! A merge into a diffusers folder: some files changed, the others copied.

use std::collections::BTreeSet;
use std::path::Path;

use super::merge_file::Plan;
use super::weights::folder_files;
use super::{MergeOptions, MergeReport, Strength};
use crate::{AdapterSet, Error, Result};

/// See [`merge_into_file`](super::merge_into_file). The folder is made under a temporary
/// name and renamed; it is not written over another.
pub(crate) fn merge_folder(
    base: &Path,
    adapters: &[(&AdapterSet, Strength)],
    output: &Path,
    options: &MergeOptions,
) -> Result<MergeReport> {
    let exists = std::io::Error::new(
        std::io::ErrorKind::AlreadyExists,
        "a folder is only written to a new place",
    );
    if output.exists() {
        return Err(Error::io(output)(exists));
    }
    let list = folder_files(base)?;
    let plan = Plan::new(&list, adapters, options)?;
    let parent = match output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let folder = tempfile::Builder::new()
        .prefix(".writing-")
        .tempdir_in(parent)
        .map_err(Error::io(output))?;
    copy_others(
        base,
        folder.path(),
        &list.iter().map(|(p, _)| p.as_path()).collect(),
    )?;
    for (file, (path, _)) in plan.files.iter().zip(&list) {
        let inside = path.strip_prefix(base).unwrap_or(path);
        file.write(&folder.path().join(inside), options)?;
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder.path(), mode).map_err(Error::io(output))?;
    }
    // Kept only now: an error before removes the temporary folder.
    std::fs::rename(folder.keep(), output).map_err(Error::io(output))?;
    Ok(plan.report)
}

/// Copies a folder without the files that are merged and their variants.
fn copy_others(from: &Path, to: &Path, merged: &BTreeSet<&Path>) -> Result<()> {
    std::fs::create_dir_all(to).map_err(Error::io(to))?;
    for entry in std::fs::read_dir(from).map_err(Error::io(from))? {
        let entry = entry.map_err(Error::io(from))?;
        let (path, copy) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_others(&path, &copy, merged)?;
        } else if !merged.contains(path.as_path()) && !replaced(&path, merged) {
            std::fs::copy(&path, &copy).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

/// Whether a file is another form of merged weights, which would be stale.
fn replaced(path: &Path, merged: &BTreeSet<&Path>) -> bool {
    let weights = ["safetensors", "bin", "ckpt", "msgpack"];
    let weights = path
        .extension()
        .is_some_and(|e| weights.iter().any(|w| e == *w));
    weights && merged.iter().any(|m| m.parent() == path.parent())
}
