//! Listing one subset: its images with captions and sizes, read in parallel.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::caption::{CaptionSource, file};
use crate::folder::{FolderListing, WHAT_TO_DO};
use crate::picture::{DecodeOptions, Header, decode_file, read_header};
use crate::{
    DataConfig, DecodeCheck, Error, Finding, FindingKind, Result, Size, SubsetConfig, metadata,
};

/// One image of a subset before it has a bucket.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) path: PathBuf,
    pub(super) mask: Option<PathBuf>,
    pub(super) caption: String,
    pub(super) caption_source: CaptionSource,
    /// What the tag statistics count: the caption, or only the tags of a metadata entry.
    pub(super) tags: Option<String>,
    pub(super) size: Size,
    /// The file has an alpha channel.
    pub(super) has_alpha: bool,
    /// Some pixels are transparent, and `alpha_mask` is off.
    pub(super) is_transparent: bool,
}

/// The images of a subset.
#[derive(Debug, Default)]
pub(super) struct SubsetListing {
    /// Base name of the folder or the metadata file.
    pub(super) name: String,
    /// Images that can be used, sorted by path.
    pub(super) images: Vec<Listed>,
    /// Images that cannot be decoded: path and reason.
    pub(super) undecodable: Vec<(PathBuf, String)>,
    pub(super) findings: Vec<Finding>,
}

/// Lists a subset. Call inside the thread pool that is to be used.
pub(super) fn list(subset: &SubsetConfig, run: &DataConfig) -> Result<SubsetListing> {
    let listing = match (&subset.metadata_file, &subset.image_dir) {
        (Some(file), dir) => {
            let found = metadata::read(file, dir.as_deref(), &subset.captions)?;
            let entries = found.entries.into_par_iter().map(|entry| Candidate {
                path: entry.path,
                caption: entry.caption,
                source: CaptionSource::Metadata,
                tags: Some(entry.tags),
                is_blank_file: false,
            });
            let mut listing = check_all(entries.map(Ok), run, subset.alpha_mask)?;
            listing.findings.extend(found.findings);
            listing.name = base_name(file);
            listing
        }
        (None, Some(dir)) => list_folder(dir, subset, run)?,
        (None, None) => {
            return Err(Error::option(
                "image_dir",
                "a subset needs an image_dir or a metadata_file",
            ));
        }
    };
    Ok(listing)
}

/// An image whose header has not been read.
struct Candidate {
    path: PathBuf,
    caption: String,
    source: CaptionSource,
    tags: Option<String>,
    is_blank_file: bool,
}

fn list_folder(dir: &Path, subset: &SubsetConfig, run: &DataConfig) -> Result<SubsetListing> {
    let folder = FolderListing::read(dir)?;
    let extensions = file::extensions(subset.caption_extension.as_deref());
    let candidate = |path: PathBuf| caption_candidate(path, &folder.others, &extensions, subset);
    let mut listing = check_all(
        folder.images.clone().into_par_iter().map(candidate),
        run,
        subset.alpha_mask,
    )?;
    listing.name = base_name(dir);
    listing
        .findings
        .extend(folder_findings(dir, &folder, &listing, &extensions));
    Ok(listing)
}

fn caption_candidate(
    path: PathBuf,
    files: &HashSet<String>,
    extensions: &[String],
    subset: &SubsetConfig,
) -> Result<Candidate> {
    if let Some((file, source)) = file::find(&path, files, extensions) {
        let caption = file::caption_of(&file::read_text(&file)?, subset.captions.enable_wildcard);
        let is_blank_file = caption.is_empty();
        return Ok(Candidate {
            path,
            caption,
            source,
            tags: None,
            is_blank_file,
        });
    }
    let (caption, source) = match &subset.class_tokens {
        Some(tokens) => (tokens.clone(), CaptionSource::ClassTokens),
        None => (String::new(), CaptionSource::Nothing),
    };
    Ok(Candidate {
        path,
        caption,
        source,
        tags: None,
        is_blank_file: false,
    })
}

/// Reads every header and leaves out what cannot be decoded.
fn check_all(
    candidates: impl IndexedParallelIterator<Item = Result<Candidate>>,
    run: &DataConfig,
    uses_alpha: bool,
) -> Result<SubsetListing> {
    let checked = candidates.map(|candidate| {
        candidate.map(|c| {
            let header = usable_header(&c.path, run);
            // Many programs write an alpha channel without need: only its values tell.
            let is_transparent = !uses_alpha
                && header.as_ref().is_ok_and(|header| header.has_alpha)
                && has_transparent_pixels(&c.path);
            (header, is_transparent, c)
        })
    });
    let checked: Vec<_> = checked.collect::<Result<_>>()?;
    let mut listing = SubsetListing::default();
    let mut blank = Vec::new();
    for (header, is_transparent, candidate) in checked {
        match header {
            Ok(header) => {
                if candidate.is_blank_file {
                    blank.push(candidate.path.clone());
                }
                listing.images.push(Listed {
                    path: candidate.path,
                    mask: None,
                    caption: candidate.caption,
                    caption_source: candidate.source,
                    tags: candidate.tags,
                    size: match run.exif_orientation {
                        true => header.shown(),
                        false => header.stored,
                    },
                    has_alpha: header.has_alpha,
                    is_transparent,
                });
            }
            Err(error) => listing.undecodable.push((candidate.path, reason(&error))),
        }
    }
    for (path, reason) in &listing.undecodable {
        let what = format!("image left out: {reason}");
        let advice = "replace or remove the file";
        listing
            .findings
            .push(Finding::warning(FindingKind::Undecodable, what, advice).at(path));
    }
    if !blank.is_empty() {
        let what = format!(
            "{} empty caption files: {}",
            blank.len(),
            some_names(blank.iter().map(PathBuf::as_path))
        );
        let advice = "these images are trained without a text; write captions or delete the files";
        listing
            .findings
            .push(Finding::warning(FindingKind::EmptyCaption, what, advice));
    }
    Ok(listing)
}

/// The header of an image that can be decoded, as far as the check goes.
fn usable_header(path: &Path, run: &DataConfig) -> Result<Header> {
    let header = read_header(path)?;
    if run.decode_check == DecodeCheck::Full || header.looks_cut_off {
        decode_completely(path, &header)?;
    }
    Ok(header)
}

fn has_transparent_pixels(path: &Path) -> bool {
    let options = DecodeOptions {
        keep_alpha: true,
        ..DecodeOptions::default()
    };
    let alpha = decode_file(path, options).ok().and_then(|p| p.alpha);
    alpha.is_some_and(|alpha| alpha.iter().any(|a| *a < 255))
}

fn decode_completely(path: &Path, header: &Header) -> Result<()> {
    let options = DecodeOptions {
        exif_orientation: false,
        ..DecodeOptions::default()
    };
    let picture = decode_file(path, options)?;
    if picture.size != header.stored {
        let what = format!(
            "its header says {}, its content is {}",
            header.stored, picture.size
        );
        return Err(Error::decode(path, what));
    }
    // The JPEG decoder fills what is missing with grey instead of failing.
    if header.looks_cut_off && header.is_jpeg {
        return Err(Error::decode(path, "the file is cut off (no end marker)"));
    }
    Ok(())
}

fn reason(error: &Error) -> String {
    match error {
        Error::Decode { reason, .. } => reason.clone(),
        Error::Io { source, .. } => source.to_string(),
        other => other.to_string(),
    }
}

fn folder_findings(
    dir: &Path,
    folder: &FolderListing,
    listing: &SubsetListing,
    extensions: &[String],
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut sources: BTreeMap<CaptionSource, usize> = BTreeMap::new();
    for image in &listing.images {
        *sources.entry(image.caption_source).or_default() += 1;
    }
    let count = |source| sources.get(&source).copied().unwrap_or(0);
    let total = listing.images.len();
    let missing = count(CaptionSource::Nothing) + count(CaptionSource::ClassTokens);
    if missing > 0 {
        findings.push(missing_captions(missing, total, &listing.images, extensions).at(dir));
    }
    if count(CaptionSource::FallbackFile) > 0 {
        let what = format!(
            "{} of {total} captions come from .caption files",
            count(CaptionSource::FallbackFile)
        );
        findings.push(Finding::note(FindingKind::CaptionExtension, what).at(dir));
    }
    if folder.unreadable_pictures() > 0 {
        let what = format!(
            "{} pictures in formats that cannot be read",
            folder.unreadable_pictures()
        );
        let advice = format!("they are not trained; {WHAT_TO_DO}");
        findings.push(Finding::warning(FindingKind::Undecodable, what, advice).at(dir));
    }
    let caches = folder
        .others
        .iter()
        .filter(|name| name.ends_with(".npz"))
        .count();
    if caches > 0 {
        let what = format!("{caches} .npz latent caches of sd-scripts are ignored");
        findings.push(Finding::note(FindingKind::ForeignCache, what).at(dir));
    }
    findings
}

fn missing_captions(
    missing: usize,
    total: usize,
    images: &[Listed],
    extensions: &[String],
) -> Finding {
    let substitute = images
        .iter()
        .find(|i| i.caption_source == CaptionSource::ClassTokens);
    let instead = match substitute {
        Some(image) => format!("the caption is `{}` instead", image.caption),
        None => "they are trained without a text".to_owned(),
    };
    let what = format!(
        "{missing} of {total} images have no caption file ({})",
        extensions.join(", ")
    );
    let advice = format!("{instead}; write captions beside the images or set caption_extension");
    if missing == total && substitute.is_some() {
        // A usual way to train: the folder's name is the caption of all.
        return Finding {
            advice,
            ..Finding::note(FindingKind::MissingCaptions, what)
        };
    }
    Finding::warning(FindingKind::MissingCaptions, what, advice)
}

/// The first few file names of a long list.
pub(crate) fn some_names<'a>(paths: impl Iterator<Item = &'a Path>) -> String {
    const SHOWN: usize = 5;
    let mut names: Vec<String> = paths.take(SHOWN + 1).map(base_name).collect();
    if names.len() > SHOWN {
        names[SHOWN] = "...".to_owned();
    }
    names.join(", ")
}

pub(crate) fn base_name(path: &Path) -> String {
    path.file_name().map_or_else(
        || path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}
