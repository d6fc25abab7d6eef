//! One run per output name: two that write the same files would mix their results.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Held while a run may write its files: an open, locked `.NAME.lock` in the output
/// folder, which holds the number of the process. The system releases it when the process
/// ends, however it ends; the file alone means nothing.
#[derive(Debug)]
pub(crate) struct RunLock {
    path: PathBuf,
    /// Closing it releases the lock.
    _file: File,
}

impl RunLock {
    /// Creates the folder, proves that files can be written there, and takes the lock.
    /// `warn` hears that the folder has no locks.
    pub(crate) fn take(folder: &Path, name: &str, warn: &mut dyn FnMut(&str)) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let path = folder.join(format!(".{name}.lock"));
        loop {
            let mut file = match open(&path) {
                Ok(file) => file,
                Err(error) if is_busy(&error) => return Err(busy(folder, name, &path)),
                Err(error) => return Err(Error::io(folder)(error)),
            };
            match lock(&file) {
                Ok(()) => {}
                Err(error) if is_busy(&error) => return Err(busy(folder, name, &path)),
                // Some network folders have no locks; without one the run is as safe as
                // its user.
                Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {
                    warn(&format!(
                        "{}: {error}; take care to start no second run with this output name",
                        path.display()
                    ));
                }
                Err(error) => return Err(Error::io(&path)(error)),
            }
            // The run before may have removed the file between opening and locking.
            if !is_at(&file, &path) {
                continue;
            }
            let pid = std::process::id().to_string();
            file.set_len(0)
                .and_then(|()| file.write_all(pid.as_bytes()))
                .map_err(Error::io(folder))?;
            return Ok(Self { path, _file: file });
        }
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        // Still locked: nobody else can hold this file. If it stays, the next run takes it.
        std::fs::remove_file(&self.path).unwrap_or_default();
    }
}

fn busy(folder: &Path, name: &str, path: &Path) -> Error {
    let mut process = String::new();
    if let Ok(mut file) = File::open(path) {
        file.read_to_string(&mut process).unwrap_or_default();
    }
    Error::Busy {
        path: folder.to_path_buf(),
        name: name.to_string(),
        process: match process.trim() {
            "" => String::new(),
            id => format!(" (process {id})"),
        },
    }
}

#[cfg(unix)]
fn open(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true);
    options.open(path)
}

#[cfg(unix)]
fn lock(file: &File) -> std::io::Result<()> {
    use rustix::fs::{FlockOperation, flock};
    Ok(flock(file, FlockOperation::NonBlockingLockExclusive)?)
}

#[cfg(unix)]
fn is_busy(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::WouldBlock
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let place = |m: std::fs::Metadata| (m.dev(), m.ino());
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(named)) => place(open) == place(named),
        _ => false,
    }
}

/// Nobody else may open the file while it is open.
#[cfg(windows)]
fn open(path: &Path) -> std::io::Result<File> {
    use std::os::windows::fs::OpenOptionsExt;
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true);
    options.share_mode(0).open(path)
}

#[cfg(windows)]
fn is_busy(error: &std::io::Error) -> bool {
    const ERROR_SHARING_VIOLATION: i32 = 32;
    error.raw_os_error() == Some(ERROR_SHARING_VIOLATION)
}

#[cfg(not(any(unix, windows)))]
fn open(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
}

#[cfg(not(any(unix, windows)))]
fn is_busy(_: &std::io::Error) -> bool {
    false
}

#[cfg(not(unix))]
fn lock(_: &File) -> std::io::Result<()> {
    Ok(())
}

#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_run_per_name_and_folder() {
        let folder = tempfile::tempdir().unwrap();
        let take = |name| RunLock::take(folder.path(), name, &mut |warning| panic!("{warning}"));
        let first = take("zoe").unwrap();
        take("other").unwrap();
        let message = take("zoe").unwrap_err().to_string();
        let process = std::process::id().to_string();
        assert!(
            message.contains(&process) && message.contains("zoe"),
            "{message}"
        );
        drop(first);
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
        // What a killed run leaves is no obstacle.
        std::fs::write(folder.path().join(".zoe.lock"), "1").unwrap();
        take("zoe").unwrap();
    }
}
