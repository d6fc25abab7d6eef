//! What the fuzz targets share: a file for readers that take a path, and bytes cut into
//! parts.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A folder of this process, in memory where the system has such a place.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let memory = Path::new("/dev/shm");
        let base = if memory.is_dir() {
            memory.to_path_buf()
        } else {
            std::env::temp_dir()
        };
        let folder = base.join(format!("lora-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        folder
    })
}

/// Writes the bytes to a file of that name in [`folder`].
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder().join(name);
    std::fs::write(&path, bytes).expect("a temporary file");
    path
}

/// Any bytes as text.
pub fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// The first byte, which chooses among variants, and the rest.
pub fn choice(bytes: &[u8]) -> Option<(u8, &[u8])> {
    bytes.split_first().map(|(first, rest)| (*first, rest))
}

/// Reads settings from a file of that name, checks them and writes them again.
pub fn settings(name: &str, bytes: &[u8]) {
    let Ok(import) = lora_train::gui::read_config(&file(name, bytes)) else {
        return;
    };
    let _ = import.to_string();
    if let Ok(config) = lora_train::TrainConfig::from_settings(&import.settings) {
        let _ = (
            config.validate(),
            config.warnings(),
            config.dump(&import.settings),
        );
        let _ = config.to_toml();
    }
}
