//! Files that appear whole or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// Writes to a temporary name in the same folder, syncs, and renames.
///
/// Two processes may write the same file: each has its own temporary name and the
/// last rename wins.
pub(crate) fn write(path: &Path, parts: &[&[u8]]) -> Result<()> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}-{number}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let result = write_and_sync(&temporary, parts).and_then(|()| fs::rename(&temporary, path));
    result.map_err(|error| {
        // Leave nothing half-written behind; the first error is the one to report.
        let _ = fs::remove_file(&temporary);
        Error::io(path, error)
    })
}

fn write_and_sync(path: &Path, parts: &[&[u8]]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    for part in parts {
        file.write_all(part)?;
    }
    file.sync_all()
}
