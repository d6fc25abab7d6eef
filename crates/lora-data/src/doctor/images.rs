//! Trouble that sizes and numbers show, without decoding a picture.

use crate::dataset::some_names;
use crate::{Dataset, Finding, FindingKind, ImageRecord, Role};

/// Enlarging by more than this blurs what is learnt.
const ENLARGED_A_LOT: f64 = 1.5;
/// Losing more than this part often cuts the subject.
const CROPPED_A_LOT: f64 = 0.25;
/// Fewer pictures are mostly learnt by heart.
const FEW_IMAGES: usize = 10;
/// More repeats look like a year or a number that was not meant as repeats.
const MANY_REPEATS: u32 = 200;

pub(super) fn examine(dataset: &Dataset) -> Vec<Finding> {
    let train: Vec<&ImageRecord> = dataset
        .images()
        .iter()
        .filter(|image| image.role == Role::Train)
        .collect();
    [few(&train), enlarged(&train), cropped(&train)]
        .into_iter()
        .flatten()
        .chain(repeats(dataset))
        .chain(regularization(dataset))
        .collect()
}

fn few(train: &[&ImageRecord]) -> Option<Finding> {
    let mut paths: Vec<_> = train.iter().map(|image| &image.path).collect();
    paths.sort_unstable();
    paths.dedup();
    (paths.len() < FEW_IMAGES).then(|| {
        let what = format!("{} training images", paths.len());
        let advice = "so few are soon learnt by heart, poses and backgrounds included; \
                      15 to 50 varied pictures are usual, else stop early and use a low rank";
        Finding::warning(FindingKind::FewImages, what, advice)
    })
}

fn enlarged(train: &[&ImageRecord]) -> Option<Finding> {
    let advice = "blur is learnt as part of the subject; use larger versions, leave them out or lower the resolution";
    of_many(
        train,
        |i| i.enlarged() > ENLARGED_A_LOT,
        FindingKind::Enlarged,
        "are enlarged more than 1.5 times",
        advice,
    )
}

fn cropped(train: &[&ImageRecord]) -> Option<Finding> {
    let advice =
        "heads and hands at the edges are cut off; crop them yourself or widen min/max_bucket_reso";
    of_many(
        train,
        |i| i.cropped() > CROPPED_A_LOT,
        FindingKind::Cropped,
        "lose more than 25 % at the edges",
        advice,
    )
}

fn of_many(
    train: &[&ImageRecord],
    of: impl Fn(&ImageRecord) -> bool,
    kind: FindingKind,
    what: &str,
    advice: &str,
) -> Option<Finding> {
    let images: Vec<_> = train.iter().filter(|image| of(image)).collect();
    (!images.is_empty()).then(|| {
        let names = some_names(images.iter().map(|image| image.path.as_path()));
        Finding::warning(
            kind,
            format!("{} images {what}: {names}", images.len()),
            advice,
        )
    })
}

fn repeats(dataset: &Dataset) -> Vec<Finding> {
    let folders = dataset.stats().iter().flat_map(|stats| &stats.subsets);
    let many = folders.filter(|folder| folder.n_repeats > MANY_REPEATS);
    let finding = |folder: &crate::SubsetStats| {
        let what = format!("`{}` has {} repeats", folder.name, folder.n_repeats);
        let advice = "each epoch shows every picture that often; if the number is a year or a count, \
                      rename the folder like `10_name`";
        Finding::warning(FindingKind::Repeats, what, advice)
    };
    many.map(finding).collect()
}

fn regularization(dataset: &Dataset) -> Vec<Finding> {
    let mut findings = Vec::new();
    for stats in dataset
        .stats()
        .iter()
        .filter(|stats| stats.num_reg_images > 0)
    {
        let (train, reg) = (stats.num_train_images, stats.num_reg_images);
        if reg * 10 < train {
            let what =
                format!("{reg} regularization draws are repeated to match {train} training draws");
            let advice = "each is seen more than 10 times per epoch and is learnt by heart; add more of them";
            findings.push(Finding::warning(FindingKind::Regularization, what, advice));
        }
        let what = format!(
            "regularization images double the epoch: {train} training draws and about as many of them"
        );
        findings.push(Finding::note(FindingKind::Regularization, what));
    }
    findings
}
