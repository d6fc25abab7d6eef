//! Assembling a dataset from its config: listing, splitting, balancing, buckets.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use rayon::ThreadPoolBuilder;

use super::balance::balance_regularization;
use super::listing::{self, Listed, SubsetListing, some_names};
use super::stats::count_tags;
use super::{
    BucketCount, BucketInfo, Dataset, DatasetStats, ImageRecord, Role, SubsetStats, split,
};
use crate::bucket::cover;
use crate::{
    BucketFit, BucketTable, DataConfig, DatasetConfig, Error, Finding, FindingKind, FolderFound,
    Result, Size, SubsetConfig, Transparency, mask,
};

pub(crate) fn build(config: DataConfig, findings: Vec<Finding>) -> Result<Dataset> {
    config.validate()?;
    if config.datasets.is_empty() {
        return Err(Error::option(
            "datasets",
            "no dataset is given; add [[datasets]] with [[datasets.subsets]]",
        ));
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(config.threads)
        .build()
        .map_err(|e| {
            Error::option(
                "threads",
                format!("no thread pool of this size can be started: {e}"),
            )
        })?;
    let mut builder = Builder {
        findings,
        ..Builder::default()
    };
    let mut listings = Vec::with_capacity(config.datasets.len());
    for number in 0..config.datasets.len() {
        listings.push(pool.install(|| builder.list_subsets(&config, number))?);
    }
    if config.masked_loss {
        attach_masks(&config, &mut listings)?;
    }
    for (number, listings) in listings.into_iter().enumerate() {
        builder.add_dataset(&config.datasets[number], number, listings)?;
    }
    builder.finish(config)
}

/// Gives the images of all datasets their masks: several folders may share one of masks.
fn attach_masks(config: &DataConfig, listings: &mut [Vec<SubsetListing>]) -> Result<()> {
    let subsets = config.datasets.iter().flat_map(|dataset| &dataset.subsets);
    let wanted = subsets
        .zip(listings.iter_mut().flatten())
        .filter_map(|(subset, listing)| {
            let images = listing.images.iter_mut();
            Some(mask::Wanted {
                masks: subset.conditioning_data_dir.as_deref()?,
                folder: subset.image_dir.as_deref(),
                images: images.map(|l| (l.path.as_path(), &mut l.mask)).collect(),
            })
        });
    mask::attach(wanted.collect())
}

#[derive(Default)]
struct Builder {
    images: Vec<ImageRecord>,
    stats: Vec<DatasetStats>,
    findings: Vec<Finding>,
    undecodable: Vec<(PathBuf, String)>,
    /// Images whose transparency is no mask.
    transparent: Vec<PathBuf>,
}

impl Builder {
    /// The listing of each subset; empty ones for subsets that were passed over.
    fn list_subsets(&mut self, config: &DataConfig, number: usize) -> Result<Vec<SubsetListing>> {
        let mut seen = HashSet::new();
        let mut listings = Vec::new();
        for subset in &config.datasets[number].subsets {
            let place = subset
                .metadata_file
                .as_ref()
                .or(subset.image_dir.as_ref())
                .cloned()
                .unwrap_or_default();
            if !seen.insert(place.canonicalize().unwrap_or_else(|_| place.clone())) {
                let what = "given twice in one dataset; the second is ignored";
                let advice = "raise num_repeats instead";
                self.findings
                    .push(Finding::warning(FindingKind::DuplicateFolder, what, advice).at(place));
                listings.push(SubsetListing::default());
                continue;
            }
            let mut listing = listing::list(subset, config)?;
            if listing.images.is_empty() && listing.undecodable.is_empty() {
                let what = "no images in this folder";
                let advice = "images must lie directly in it";
                self.findings
                    .push(Finding::warning(FindingKind::FolderPassedOver, what, advice).at(place));
            }
            self.findings.append(&mut listing.findings);
            self.undecodable.append(&mut listing.undecodable.clone());
            listings.push(listing);
        }
        Ok(listings)
    }

    fn add_dataset(
        &mut self,
        config: &DatasetConfig,
        number: usize,
        listings: Vec<SubsetListing>,
    ) -> Result<()> {
        let table = BucketTable::new(config)?;
        let mut stats = DatasetStats::default();
        let mut by_role: BTreeMap<Role, Vec<ImageRecord>> = BTreeMap::new();
        for (subset_number, listing) in listings.into_iter().enumerate() {
            let subset = &config.subsets[subset_number];
            let undecodable = listing.undecodable.len();
            let mut subset_stats = SubsetStats {
                name: listing.name.clone(),
                is_reg: subset.is_reg,
                n_repeats: subset.num_repeats,
                img_count: listing.images.len(),
                undecodable,
                ..SubsetStats::default()
            };
            self.note_alpha(subset, &listing);
            if subset.face_crop_aug_range.is_some() && config.enable_bucket {
                let what = "face_crop_aug_range has no effect with buckets";
                let advice = "set enable_bucket to false, or leave it out";
                self.findings.push(
                    Finding::warning(FindingKind::OptionWithoutEffect, what, advice)
                        .at(subset.image_dir.clone().unwrap_or_default()),
                );
            }
            let split = if subset.is_reg {
                0.0
            } else {
                config.validation_split
            };
            let seed = config.validation_seed.unwrap_or(0);
            let held_back = split::held_back(listing.images.len(), split, seed, subset_number);
            let frequency = stats.tag_frequency.entry(listing.name).or_default();
            for (image, is_held_back) in listing.images.into_iter().zip(held_back) {
                count_tags(image.tags.as_deref().unwrap_or(&image.caption), frequency);
                *subset_stats
                    .captions
                    .entry(image.caption_source)
                    .or_default() += 1;
                let role = match (subset.is_reg, is_held_back) {
                    (true, _) => Role::Regularization,
                    (false, true) => Role::Validation,
                    (false, false) => Role::Train,
                };
                subset_stats.validation_count += usize::from(is_held_back);
                let repeats = if is_held_back { 1 } else { subset.num_repeats };
                let record = new_record(
                    image,
                    &table,
                    config,
                    (number, subset_number),
                    role,
                    repeats,
                );
                by_role.entry(role).or_default().push(record);
            }
            stats.subsets.push(subset_stats);
        }
        self.register(config, stats, by_role);
        Ok(())
    }

    /// Remembers images whose transparency is not used, and reports masks that are not there.
    fn note_alpha(&mut self, subset: &SubsetConfig, listing: &SubsetListing) {
        let images = &listing.images;
        let transparent = images
            .iter()
            .filter(|i| i.is_transparent && i.mask.is_none());
        self.transparent
            .extend(transparent.map(|image| image.path.clone()));
        let expects_alpha = subset.alpha_mask && !subset.is_reg && !images.is_empty();
        if expects_alpha && !images.iter().any(|image| image.has_alpha) {
            let what = format!(
                "`{}`: alpha_mask is on, but no image has an alpha channel",
                listing.name
            );
            let advice = "every pixel counts in the loss; save the images with transparency, or switch it off";
            self.findings
                .push(Finding::warning(FindingKind::Masks, what, advice));
        }
    }

    /// Transparent pixels that are not masked, and masks that are asked for and absent.
    fn report_masks(&mut self, config: &DataConfig) {
        if !self.transparent.is_empty() {
            let what = format!(
                "{} of {} images have transparent pixels while alpha_mask is off: {}",
                self.transparent.len(),
                self.images.len(),
                some_names(self.transparent.iter().map(PathBuf::as_path))
            );
            let fate = match config.transparency {
                Transparency::Composite([255, 255, 255]) => "are laid on white".to_owned(),
                Transparency::Composite([r, g, b]) => format!("are laid on the colour {r},{g},{b}"),
                Transparency::Drop => "show whatever colour is stored below them".to_owned(),
            };
            let advice = format!(
                "these {fate} and are trained; switch alpha_mask on to leave them out of the loss"
            );
            self.findings
                .push(Finding::warning(FindingKind::Masks, what, advice));
        }
        let mut subsets = config.datasets.iter().flat_map(|dataset| &dataset.subsets);
        let has_masks = self.images.iter().any(|image| image.mask.is_some());
        if config.masked_loss && !has_masks && !subsets.any(|subset| subset.alpha_mask) {
            let what = "masked_loss is on, but there are no masks";
            let advice = "every pixel counts in the loss; give conditioning_data_dir, or switch alpha_mask on";
            self.findings
                .push(Finding::warning(FindingKind::Masks, what, advice));
        }
    }

    /// Balances, counts and keeps the images of one dataset.
    fn register(
        &mut self,
        config: &DatasetConfig,
        mut stats: DatasetStats,
        by_role: BTreeMap<Role, Vec<ImageRecord>>,
    ) {
        let mut by_role = by_role;
        let mut take = |role| by_role.remove(&role).unwrap_or_default();
        let (train, mut reg, validation) = (
            take(Role::Train),
            take(Role::Regularization),
            take(Role::Validation),
        );
        let samples =
            |images: &[ImageRecord]| images.iter().map(|i| i.repeats as usize).sum::<usize>();
        stats.num_train_images = samples(&train);
        stats.num_reg_images = samples(&reg);
        let given: Vec<u32> = reg.iter().map(|image| image.repeats).collect();
        for (image, repeats) in reg
            .iter_mut()
            .zip(balance_regularization(stats.num_train_images, &given))
        {
            image.repeats = repeats;
        }
        reg.retain(|image| image.repeats > 0);
        let unused = given.len() - reg.len();
        if unused > 0 {
            let what = format!(
                "{unused} of {} regularization images are never used",
                given.len()
            );
            let advice = "there are more of them than training images times repeats; raise the repeats of the training folders";
            self.findings.push(Finding::warning(
                FindingKind::UnusedRegularization,
                what,
                advice,
            ));
        }
        let trained = || train.iter().chain(&reg);
        self.report_sizes(config, trained().chain(&validation));
        (stats.bucket_info, stats.batches_per_epoch) = bucket_info(config, trained());
        self.images
            .extend(train.into_iter().chain(reg).chain(validation));
        self.stats.push(stats);
    }

    fn report_sizes<'a>(
        &mut self,
        config: &DatasetConfig,
        images: impl Iterator<Item = &'a ImageRecord> + Clone,
    ) {
        let mut report = |kind, of: &dyn Fn(&ImageRecord) -> bool, what: &str, advice: &str| {
            let count = images.clone().filter(|i| of(i)).count();
            if count > 0 {
                let names = some_names(images.clone().filter(|i| of(i)).map(|i| i.path.as_path()));
                self.findings.push(Finding::warning(
                    kind,
                    format!("{count} images {what}: {names}"),
                    advice,
                ));
            }
        };
        if !config.enable_bucket {
            report(
                FindingKind::SizeWithoutBuckets,
                &|i| i.size != config.resolution,
                &format!(
                    "are not {} and buckets are off, so they are resized and cropped",
                    config.resolution
                ),
                "turn enable_bucket on to keep their aspect ratios",
            );
        } else if config.bucket_no_upscale {
            report(
                FindingKind::TooSmall,
                &|i| !i.size.covers(i.resized),
                "are too small for any bucket and were enlarged in spite of bucket_no_upscale",
                "use larger versions or leave them out",
            );
        }
    }

    fn finish(mut self, config: DataConfig) -> Result<Dataset> {
        if !self.images.iter().any(|image| image.role == Role::Train) {
            return Err(self.nothing_found(&config));
        }
        self.report_masks(&config);
        let mut buckets: BTreeMap<(usize, Size), Vec<usize>> = BTreeMap::new();
        for (number, image) in self
            .images
            .iter()
            .enumerate()
            .filter(|(_, i)| i.role != Role::Validation)
        {
            buckets
                .entry((image.dataset, image.bucket))
                .or_default()
                .push(number);
        }
        Ok(Dataset {
            config,
            images: self.images,
            stats: self.stats,
            findings: self.findings,
            buckets,
            layouts: Vec::new(),
        })
    }

    fn nothing_found(self, config: &DataConfig) -> Error {
        if let Some((path, reason)) = self.undecodable.first() {
            let first = format!("{}: {reason}", path.display());
            return Error::NothingDecodes {
                count: self.undecodable.len(),
                first,
            };
        }
        let subsets = config.datasets.iter().flat_map(|d| &d.subsets);
        let looked_at: Vec<FolderFound> = subsets
            .map(|s| FolderFound {
                path: s
                    .metadata_file
                    .as_ref()
                    .or(s.image_dir.as_ref())
                    .cloned()
                    .unwrap_or_default(),
                images: 0,
                why: if s.is_reg {
                    "regularization only"
                } else {
                    "no images in it"
                }
                .to_owned(),
            })
            .collect();
        let path = looked_at
            .first()
            .map(|f| f.path.clone())
            .unwrap_or_default();
        Error::NothingFound { path, looked_at }
    }
}

fn new_record(
    image: Listed,
    table: &BucketTable,
    config: &DatasetConfig,
    (dataset, subset): (usize, usize),
    role: Role,
    repeats: u32,
) -> ImageRecord {
    let fit = fit_or_enlarge(table, image.size, config.bucket_reso_steps);
    ImageRecord {
        path: image.path,
        mask: image.mask,
        dataset,
        subset,
        role,
        repeats,
        caption: image.caption,
        caption_source: image.caption_source,
        size: image.size,
        bucket: fit.bucket,
        resized: fit.resized,
        aspect_error: fit.aspect_error,
    }
}

/// The bucket of an image; one that fits none without upscaling gets the nearest that exists.
fn fit_or_enlarge(table: &BucketTable, image: Size, step: u32) -> BucketFit {
    match table.assign(image) {
        Ok(fit) if fit.bucket.area() > 0 => fit,
        _ => {
            let on_grid = |side: u32| (side - side % step).max(step);
            // At least one step wide; the longer side keeps the aspect ratio.
            let resized = cover(
                image,
                Size::new(
                    on_grid(image.width.min(step)),
                    step.min(image.height).max(step),
                ),
            );
            let bucket = Size::new(on_grid(resized.width), on_grid(resized.height));
            let resized = if resized.covers(bucket) {
                resized
            } else {
                cover(image, bucket)
            };
            BucketFit {
                bucket,
                resized,
                aspect_error: bucket.aspect() - image.aspect(),
            }
        }
    }
}

/// The buckets in use (none with buckets off) and the number of batches.
fn bucket_info<'a>(
    config: &DatasetConfig,
    images: impl Iterator<Item = &'a ImageRecord>,
) -> (Option<BucketInfo>, usize) {
    let mut counts: BTreeMap<Size, usize> = BTreeMap::new();
    let (mut error, mut images_seen) = (0.0, 0usize);
    for image in images {
        *counts.entry(image.bucket).or_default() += image.repeats as usize;
        error += image.aspect_error.abs();
        images_seen += 1;
    }
    let batches = counts
        .values()
        .map(|count| count.div_ceil(config.batch_size))
        .sum();
    let info = BucketInfo {
        buckets: counts
            .into_iter()
            .map(|(resolution, count)| BucketCount { resolution, count })
            .collect(),
        mean_img_ar_error: if images_seen == 0 {
            0.0
        } else {
            error / images_seen as f64
        },
    };
    (config.enable_bucket.then_some(info), batches)
}
