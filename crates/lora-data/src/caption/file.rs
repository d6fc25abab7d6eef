//! Caption files: which file belongs to an image and what its text is.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Where a caption came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CaptionSource {
    /// A caption file.
    File,
    /// A caption file with the second-choice extension.
    FallbackFile,
    /// The class tokens: the folder's name or the option.
    ClassTokens,
    /// A metadata file.
    Metadata,
    /// Nowhere: the caption is empty.
    Nothing,
}

/// The extensions to look for, best first, each with its dot.
pub(crate) fn extensions(option: Option<&str>) -> Vec<String> {
    match option {
        None => vec![".txt".into(), ".caption".into()],
        Some(given) if given.starts_with('.') => vec![given.into()],
        Some(given) => vec![format!(".{given}")],
    }
}

/// The caption file of an image among the files of its folder, and whether it is second choice.
///
/// A name with a face's position, `name_cx_cy_w_h.png`, may also have `name.txt`.
pub(crate) fn find(
    image: &Path,
    files: &HashSet<String>,
    extensions: &[String],
) -> Option<(PathBuf, CaptionSource)> {
    let stem = image.file_stem()?.to_string_lossy();
    let pieces: Vec<&str> = stem.split('_').collect();
    let without_face = pieces
        .len()
        .checked_sub(4)
        .filter(|&n| n > 0)
        .map(|n| pieces[..n].join("_"));
    for (rank, extension) in extensions.iter().enumerate() {
        let source = if rank == 0 {
            CaptionSource::File
        } else {
            CaptionSource::FallbackFile
        };
        for stem in [Some(stem.as_ref()), without_face.as_deref()]
            .into_iter()
            .flatten()
        {
            for name in [
                format!("{stem}{extension}"),
                format!("{stem}{}", extension.to_uppercase()),
            ] {
                if files.contains(&name) {
                    return Some((image.with_file_name(name), source));
                }
            }
        }
    }
    None
}

/// A whole text file. A byte-order mark is removed.
///
/// # Errors
/// [`Error::NotUtf8`] or [`Error::Io`], both naming the file.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let offset = e.utf8_error().valid_up_to();
        Error::NotUtf8 {
            path: path.to_path_buf(),
            offset,
        }
    })?;
    Ok(text
        .strip_prefix('\u{feff}')
        .map(str::to_owned)
        .unwrap_or(text))
}

/// The caption in a file's text: its first line, or with wildcards all lines that are not blank.
pub(crate) fn caption_of(text: &str, enable_wildcard: bool) -> String {
    let mut lines = text.split(['\n', '\r']).map(str::trim);
    if enable_wildcard {
        lines
            .filter(|line| !line.is_empty())
            .collect::<Vec<_>>()
            .join("\n")
    } else {
        lines.next().unwrap_or_default().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_face_name_finds_the_caption_of_the_whole_picture() {
        let files = HashSet::from(["anna.txt".to_owned()]);
        let found = find(
            Path::new("d/anna_10_20_30_40.png"),
            &files,
            &extensions(None),
        );
        assert_eq!(found, Some(("d/anna.txt".into(), CaptionSource::File)));
        assert_eq!(
            find(Path::new("d/10_20_30_40.png"), &files, &extensions(None)),
            None
        );
    }

    #[test]
    fn windows_line_ends_and_blank_lines_do_not_reach_the_caption() {
        assert_eq!(caption_of("a, b \r\nsecond\r\n", false), "a, b");
        assert_eq!(caption_of("\r\n a \r\n\r\n b\r\n", true), "a\nb");
        assert_eq!(caption_of("", true), "");
    }
}
