//! Finding folders of images: which layout a path has, and what each folder holds.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Error, Finding, FindingKind, Result, SubsetConfig};

/// One folder that was looked at and not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FolderFound {
    /// The folder.
    pub path: PathBuf,
    /// Images directly in it.
    pub images: usize,
    /// Why it was passed over.
    pub why: String,
}

impl fmt::Display for FolderFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} images, {}",
            self.path.display(),
            self.images,
            self.why
        )
    }
}

/// How a path was understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// The parent of folders named `N_name`.
    Parent,
    /// One folder named `N_name`.
    Numbered,
    /// A folder of images without repeats in its name.
    Plain,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layout::Parent => "the parent of folders named `N_name`",
            Layout::Numbered => "one folder named `N_name`",
            Layout::Plain => "a plain folder of images, without repeats in its name",
        })
    }
}

/// The subsets found below a path.
#[derive(Debug, Clone, PartialEq)]
pub struct SubsetsFound {
    /// How the path was understood.
    pub layout: Layout,
    /// One subset per folder, sorted by name.
    pub subsets: Vec<SubsetConfig>,
    /// Folders that were passed over, and why.
    pub passed_over: Vec<FolderFound>,
    /// What was noticed on the way.
    pub findings: Vec<Finding>,
}

/// Subsets for a parent of `N_name` folders, one such folder, or a plain folder of images.
///
/// `template` gives every option but `image_dir`, `is_reg`, and, where the folder
/// name says them, `num_repeats` and `class_tokens`. Its masks are those of training images.
///
/// # Errors
/// [`Error::NothingFound`] with every folder looked at, [`Error::Io`] when `root` cannot be listed.
pub fn find_subsets(root: &Path, is_reg: bool, template: &SubsetConfig) -> Result<SubsetsFound> {
    let own = FolderListing::read(root)?;
    let masks = template.conditioning_data_dir.clone();
    let template = &SubsetConfig {
        is_reg,
        conditioning_data_dir: masks.filter(|_| !is_reg),
        ..template.clone()
    };
    let mut subsets = Vec::new();
    let mut passed_over = Vec::new();
    for name in &own.folders {
        let path = root.join(name);
        let listing = FolderListing::read(&path)?;
        match numbered_subset(&path, name, &listing, template) {
            Ok(subset) => subsets.push(subset),
            Err(why) => passed_over.push(FolderFound {
                path,
                images: listing.images.len(),
                why,
            }),
        }
    }
    if !subsets.is_empty() {
        let mut findings = passed_over_findings(&passed_over);
        if !own.images.is_empty() {
            findings.push(images_beside_folders(root, own.images.len()));
        }
        return Ok(SubsetsFound {
            layout: Layout::Parent,
            subsets,
            passed_over,
            findings,
        });
    }
    if own.images.is_empty() {
        passed_over.insert(
            0,
            FolderFound {
                path: root.to_path_buf(),
                images: 0,
                why: own.why_empty(),
            },
        );
        return Err(Error::NothingFound {
            path: root.to_path_buf(),
            looked_at: passed_over,
        });
    }
    let plain = SubsetConfig {
        image_dir: Some(root.to_path_buf()),
        ..template.clone()
    };
    // `5` alone is a plain folder here: only `5_name` says clearly that 5 are repeats.
    let name = root
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    let (layout, subset) = match parse_folder_name(&name) {
        Some((repeats, tokens)) if repeats >= 1 && name.contains('_') => {
            let class_tokens = Some(tokens.to_owned());
            (
                Layout::Numbered,
                SubsetConfig {
                    num_repeats: clamp_repeats(repeats),
                    class_tokens,
                    ..plain
                },
            )
        }
        _ => (Layout::Plain, plain),
    };
    let findings = passed_over_findings(&passed_over);
    Ok(SubsetsFound {
        layout,
        subsets: vec![subset],
        passed_over,
        findings,
    })
}

fn numbered_subset(
    path: &Path,
    name: &str,
    listing: &FolderListing,
    template: &SubsetConfig,
) -> std::result::Result<SubsetConfig, String> {
    let (repeats, tokens) = parse_folder_name(name)
        .ok_or_else(|| "the name does not start with repeats, as `10_name` does".to_owned())?;
    if repeats < 1 {
        return Err(format!("{repeats} repeats leave it out"));
    }
    if listing.images.is_empty() {
        return Err(listing.why_empty());
    }
    Ok(SubsetConfig {
        image_dir: Some(path.to_path_buf()),
        num_repeats: clamp_repeats(repeats),
        class_tokens: Some(tokens.to_owned()),
        ..template.clone()
    })
}

fn clamp_repeats(repeats: i64) -> u32 {
    u32::try_from(repeats).unwrap_or(u32::MAX)
}

/// Repeats and class tokens of a folder name like `10_name`.
fn parse_folder_name(name: &str) -> Option<(i64, &str)> {
    let (number, tokens) = name.split_once('_').unwrap_or((name, ""));
    Some((number.trim().parse().ok()?, tokens))
}

fn passed_over_findings(folders: &[FolderFound]) -> Vec<Finding> {
    let finding = |folder: &FolderFound| {
        let what = format!(
            "folder passed over: {} images, {}",
            folder.images, folder.why
        );
        let advice = if folder.images == 0 {
            ""
        } else {
            "rename it like `10_name` to train on it"
        };
        Finding::warning(FindingKind::FolderPassedOver, what, advice).at(&folder.path)
    };
    folders.iter().map(finding).collect()
}

fn images_beside_folders(root: &Path, count: usize) -> Finding {
    let what = format!("{count} images lie beside the `N_name` folders and are not used");
    Finding::warning(
        FindingKind::FilesOutside,
        what,
        "move them into a folder named like `10_name`",
    )
    .at(root)
}

/// What lies directly in a folder, sorted by name.
#[derive(Debug, Clone, Default)]
pub(crate) struct FolderListing {
    /// Image files.
    pub(crate) images: Vec<PathBuf>,
    /// Names of sub-folders.
    pub(crate) folders: Vec<String>,
    /// Names of all other files.
    pub(crate) others: HashSet<String>,
}

impl FolderListing {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let mut listing = Self::default();
        for entry in fs::read_dir(path).map_err(|e| Error::io(path, e))? {
            let entry = entry.map_err(|e| Error::io(path, e))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Hidden files, such as the `._name.png` companions macOS writes.
            if name.starts_with('.') {
                continue;
            }
            let kind = entry.file_type().map_err(|e| Error::io(entry.path(), e))?;
            let is_folder = kind.is_dir() || (kind.is_symlink() && entry.path().is_dir());
            if is_folder {
                listing.folders.push(name);
            } else if is_image_name(&name) {
                listing.images.push(entry.path());
            } else {
                listing.others.insert(name);
            }
        }
        listing.images.sort_unstable();
        listing.folders.sort_unstable();
        Ok(listing)
    }

    /// Files in formats that are pictures but cannot be read.
    pub(crate) fn unreadable_pictures(&self) -> usize {
        let known = ["avif", "jxl", "gif", "tif", "tiff", "heic", "heif", "psd"];
        self.others
            .iter()
            .filter(|name| has_extension(name, &known))
            .count()
    }

    fn why_empty(&self) -> String {
        let none = format!("no {} file in it", FORMATS.join(", "));
        match self.unreadable_pictures() {
            0 => none,
            n => format!("{none} ({n} in other formats: {WHAT_TO_DO})"),
        }
    }
}

/// Extensions of the pictures that this build reads.
const FORMATS: &[&str] = if cfg!(feature = "avif") {
    &["png", "jpg", "jpeg", "webp", "bmp", "avif"]
} else {
    &["png", "jpg", "jpeg", "webp", "bmp"]
};

/// What to do about pictures in other formats.
pub(crate) const WHAT_TO_DO: &str = if cfg!(feature = "avif") {
    "convert them"
} else {
    "convert them; AVIF is read with the feature `avif`"
};

fn is_image_name(name: &str) -> bool {
    has_extension(name, FORMATS)
}

fn has_extension(name: &str, extensions: &[&str]) -> bool {
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    extensions
        .iter()
        .any(|known| extension.eq_ignore_ascii_case(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_names_give_repeats_and_tokens() {
        assert_eq!(parse_folder_name("3_alice girl"), Some((3, "alice girl")));
        assert_eq!(
            parse_folder_name("10_bob_the builder"),
            Some((10, "bob_the builder"))
        );
        assert_eq!(parse_folder_name("5"), Some((5, "")));
        assert_eq!(parse_folder_name("-1_neg"), Some((-1, "neg")));
        assert_eq!(parse_folder_name("x3_bad"), None);
        assert_eq!(parse_folder_name("noreps"), None);
    }
}
