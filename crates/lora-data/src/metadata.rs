//! Metadata files (`in_json`): captions, tags and sizes of images in one JSON or JSON Lines file.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::caption::file::read_text;
use crate::{CaptionConfig, Error, Finding, FindingKind, Result};

/// What a metadata file says.
#[derive(Debug)]
pub(crate) struct MetadataFile {
    /// Its images, sorted by path.
    pub(crate) entries: Vec<MetadataEntry>,
    pub(crate) findings: Vec<Finding>,
}

/// One image of a metadata file.
#[derive(Debug)]
pub(crate) struct MetadataEntry {
    pub(crate) path: PathBuf,
    /// Caption and tags together.
    pub(crate) caption: String,
    /// Tags alone.
    pub(crate) tags: String,
}

/// The fields that matter; kohya's tools write more.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Fields {
    image_path: Option<String>,
    caption: Option<String>,
    tags: Option<String>,
}

/// Reads a metadata file. Relative names are joined to `image_dir`.
///
/// # Errors
/// [`Error::Metadata`] with the line where the file is malformed or names no images.
pub(crate) fn read(
    path: &Path,
    image_dir: Option<&Path>,
    captions: &CaptionConfig,
) -> Result<MetadataFile> {
    let text = read_text(path)?;
    let is_lines = path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("jsonl"));
    let named = if is_lines {
        parse_lines(path, &text)?
    } else {
        parse_object(path, &text)?
    };
    let mut entries = Vec::with_capacity(named.len());
    let mut missing = Vec::new();
    for (name, fields) in named {
        match locate(&name, image_dir) {
            Some(path) => {
                let tags = fields.tags.unwrap_or_default();
                let caption = join(&fields.caption.unwrap_or_default(), &tags, captions);
                entries.push(MetadataEntry {
                    path,
                    caption,
                    tags,
                });
            }
            None => missing.push(name),
        }
    }
    if entries.is_empty() {
        let what = match missing.first() {
            None => "it names no images".to_owned(),
            Some(first) => {
                format!(
                    "none of its {} images exists (the first: {first}); set image_dir to their folder",
                    missing.len()
                )
            }
        };
        return Err(Error::Metadata {
            path: path.to_path_buf(),
            line: None,
            what,
        });
    }
    entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    entries.dedup_by(|a, b| a.path == b.path);
    let missing = missing.iter().map(|name| {
        let advice = "the entry is left out; correct its path or remove it";
        Finding::warning(
            FindingKind::Metadata,
            format!("no such image: {name}"),
            advice,
        )
        .at(path)
    });
    Ok(MetadataFile {
        entries,
        findings: missing.collect(),
    })
}

fn parse_object(path: &Path, text: &str) -> Result<Vec<(String, Fields)>> {
    let object: std::collections::BTreeMap<String, Fields> =
        serde_json::from_str(text).map_err(|e| malformed(path, e.line(), &e))?;
    Ok(object.into_iter().collect())
}

fn parse_lines(path: &Path, text: &str) -> Result<Vec<(String, Fields)>> {
    let mut entries = Vec::new();
    for (i, line) in text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
    {
        let mut fields: Fields =
            serde_json::from_str(line).map_err(|e| malformed(path, i + 1, &e))?;
        let Some(name) = fields.image_path.take() else {
            let what = "the object has no image_path".to_owned();
            return Err(Error::Metadata {
                path: path.to_path_buf(),
                line: Some(i + 1),
                what,
            });
        };
        entries.push((name, fields));
    }
    Ok(entries)
}

fn malformed(path: &Path, line: usize, error: &serde_json::Error) -> Error {
    Error::Metadata {
        path: path.to_path_buf(),
        line: Some(line),
        what: error.to_string(),
    }
}

/// The file an entry names: as it stands, below `image_dir`, and there with any image extension.
fn locate(name: &str, image_dir: Option<&Path>) -> Option<PathBuf> {
    let given = PathBuf::from(name);
    if given.is_absolute() && given.is_file() {
        return Some(given);
    }
    let joined = image_dir.map_or_else(|| given.clone(), |dir| dir.join(&given));
    if joined.is_file() {
        return Some(joined);
    }
    let with_extension =
        |extension: &str| PathBuf::from(format!("{}.{extension}", joined.display()));
    ["png", "jpg", "jpeg", "webp", "bmp"]
        .map(with_extension)
        .into_iter()
        .find(|path| path.is_file())
}

/// Caption and tags as one text; with wildcards on, every line of the caption gets the tags.
fn join(caption: &str, tags: &str, options: &CaptionConfig) -> String {
    let separator = &options.caption_separator;
    let with_tags = |line: &str| match (line.is_empty(), tags.is_empty()) {
        (_, true) => line.to_owned(),
        (true, false) => tags.to_owned(),
        (false, false) => format!("{line}{separator}{tags}"),
    };
    if !options.enable_wildcard {
        return with_tags(caption);
    }
    let lines: Vec<&str> = caption
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    if lines.is_empty() {
        tags.to_owned()
    } else {
        lines
            .into_iter()
            .map(with_tags)
            .collect::<Vec<_>>()
            .join("\n")
    }
}
