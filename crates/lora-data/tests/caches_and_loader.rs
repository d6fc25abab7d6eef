//! Loading ahead and caching: same results, whatever the threads, runs or edits.

mod common;

use std::cell::Cell;
use std::fs;
use std::sync::Arc;

use common::Folder;
use lora_data::{
    CacheConfig, Dataset, DatasetConfig, EncoderError, Error, LatentCache, LatentEncoder, Latents,
    Loader, LoaderConfig, Pixels, SubsetConfig, leftovers, remove_leftovers,
};

/// Mean of each channel, as if it were a VAE; counts what it encodes.
struct Mean {
    key: &'static str,
    broken: bool,
    seen: Cell<usize>,
}

impl Mean {
    fn new(key: &'static str) -> Self {
        Self {
            key,
            broken: false,
            seen: Cell::new(0),
        }
    }
}

impl LatentEncoder for Mean {
    fn key(&self) -> String {
        self.key.into()
    }

    fn encode(&self, images: &[Pixels]) -> Result<Vec<Latents>, EncoderError> {
        self.seen.set(self.seen.get() + images.len());
        let encode = |pixels: &Pixels| {
            let plane = pixels.size.area() as usize;
            // The first pixel tells a picture from its mirror image.
            let mut mean: Vec<f32> = pixels.data.chunks(plane).map(|p| p[0]).collect();
            if self.broken {
                mean[1] = f32::NAN;
            }
            Latents {
                shape: [3, 1, 1],
                std: Some(vec![0.5; 3]),
                mean,
            }
        };
        Ok(images.iter().map(encode).collect())
    }
}

fn dataset(folder: &Folder) -> Arc<Dataset> {
    let options = DatasetConfig {
        batch_size: 2,
        subset: SubsetConfig {
            flip_aug: true,
            ..Default::default()
        },
        ..Default::default()
    };
    Arc::new(Dataset::from_folder(folder.path(), &options).expect("a dataset"))
}

fn photos() -> Folder {
    let folder = Folder::new();
    for i in 0..7 {
        folder.image(&format!("2_a/{i}.png"), 100 + 40 * i, 140);
    }
    folder
}

#[test]
fn the_loader_gives_the_plan_in_order_with_any_number_of_threads() {
    let folder = photos();
    let dataset = dataset(&folder);
    let batches = dataset.epoch(1, 5).batches;
    let direct: Vec<Vec<Pixels>> = batches
        .iter()
        .map(|b| b.items.iter().map(|i| dataset.pixels(i).unwrap()).collect())
        .collect();
    for (threads, ahead) in [(1, 1), (2, 3), (5, 100)] {
        let loader = Loader::new(
            dataset.clone(),
            batches.clone(),
            LoaderConfig { threads, ahead },
        )
        .unwrap();
        let loaded: Vec<Vec<Pixels>> = loader.map(|batch| batch.unwrap().pixels).collect();
        assert_eq!(loaded, direct);
    }
}

#[test]
fn a_loader_can_be_dropped_early_and_passes_errors_on() {
    let folder = photos();
    let dataset = dataset(&folder);
    let batches = dataset.epoch(1, 5).batches;
    drop(Loader::new(dataset.clone(), batches.clone(), LoaderConfig::default()).unwrap());
    fs::remove_file(folder.path().join("2_a/3.png")).unwrap();
    let loader = Loader::new(dataset, batches, LoaderConfig::default()).unwrap();
    let errors: Vec<String> = loader
        .filter_map(|batch| batch.err().map(|e| e.to_string()))
        .collect();
    assert!(
        !errors.is_empty() && errors.iter().all(|e| e.contains("3.png")),
        "{errors:?}"
    );
}

#[test]
fn a_cache_on_disk_is_found_again_and_notices_every_change() {
    let (folder, cache) = (photos(), Folder::new());
    let config = CacheConfig {
        dir: Some(cache.path().to_path_buf()),
        batch_size: 3,
    };
    let encoded = |dataset: &Arc<Dataset>, key| {
        let encoder = Mean::new(key);
        let built = LatentCache::build(dataset, &encoder, &config, |_, _| ()).unwrap();
        assert_eq!(built.encoded(), encoder.seen.get());
        encoder.seen.get()
    };
    assert_eq!(
        encoded(&dataset(&folder), "vae"),
        14,
        "7 pictures and their mirror images"
    );
    assert_eq!(encoded(&dataset(&folder), "vae"), 0);
    assert_eq!(encoded(&dataset(&folder), "other vae"), 14);
    // Renaming changes nothing, another content does.
    fs::rename(
        folder.path().join("2_a/0.png"),
        folder.path().join("2_a/z.png"),
    )
    .unwrap();
    assert_eq!(encoded(&dataset(&folder), "vae"), 0);
    folder.image("2_a/z.png", 108, 140);
    assert_eq!(encoded(&dataset(&folder), "vae"), 2);
    // A damaged file is written again.
    let file = fs::read_dir(cache.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    fs::write(file, b"half").unwrap();
    assert!(encoded(&dataset(&folder), "vae") + encoded(&dataset(&folder), "other vae") >= 1);
    let names = fs::read_dir(cache.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap());
    assert!(
        names.into_iter().all(|name| name.ends_with(".safetensors")),
        "temporary files are left"
    );
}

#[test]
fn what_edited_pictures_leave_is_found_and_removed_and_nothing_else() {
    let (folder, cache) = (photos(), Folder::new());
    let config = CacheConfig {
        dir: Some(cache.path().to_path_buf()),
        batch_size: 3,
    };
    let encode = |key| {
        let encoder = Mean::new(key);
        LatentCache::build(&dataset(&folder), &encoder, &config, |_, _| ()).unwrap();
        encoder.seen.get()
    };
    encode("vae");
    encode("other vae");
    let mine = cache.path().join("notes.txt");
    fs::write(&mine, "mine").unwrap();
    let left = || leftovers(cache.path(), &dataset(&folder)).unwrap();
    assert_eq!(left(), []);
    // A renamed picture is the same picture; an edited and a removed one are not.
    let picture = |name: &str| folder.path().join("2_a").join(name);
    fs::rename(picture("1.png"), picture("y.png")).unwrap();
    folder.image("2_a/0.png", 108, 140);
    fs::remove_file(picture("3.png")).unwrap();
    let half = format!("{}.safetensors.17-0.tmp", "0".repeat(64));
    fs::write(cache.path().join(half), "half").unwrap();
    let found = left();
    assert_eq!(found.len(), 2 * 2 * 2 + 1, "{found:?}");
    assert!(
        found
            .iter()
            .all(|file| file.bytes > 0 && file.path.exists())
    );
    remove_leftovers(&found).unwrap();
    assert_eq!(left(), []);
    assert!(mine.exists());
    assert_eq!(encode("vae"), 2, "the edited picture, twice");
}

#[test]
fn memory_and_disk_give_what_the_encoder_gave() {
    let (folder, cache) = (photos(), Folder::new());
    let dataset = dataset(&folder);
    let dirs = [None, Some(cache.path().to_path_buf())];
    let encoder = Mean::new("vae");
    for dir in dirs {
        let config = CacheConfig { dir, batch_size: 4 };
        let mut last = (0, 0);
        let cache =
            LatentCache::build(&dataset, &encoder, &config, |done, of| last = (done, of)).unwrap();
        assert_eq!(last, (14, 14));
        for item in dataset
            .epoch(1, 9)
            .batches
            .iter()
            .flat_map(|batch| &batch.items)
        {
            let wanted = encoder
                .encode(&[dataset.pixels(item).unwrap()])
                .unwrap()
                .remove(0);
            assert_eq!(cache.get(item).unwrap().latents, wanted);
        }
    }
}

#[test]
fn latents_that_are_not_finite_name_the_picture() {
    let folder = photos();
    let encoder = Mean {
        broken: true,
        ..Mean::new("vae")
    };
    let error = LatentCache::build(
        &dataset(&folder),
        &encoder,
        &CacheConfig::default(),
        |_, _| (),
    )
    .unwrap_err();
    assert!(matches!(error, Error::Encoder { .. }), "{error}");
    assert!(error.to_string().contains(".png"), "{error}");
}

#[test]
fn random_crops_cannot_be_cached() {
    let folder = photos();
    let options = DatasetConfig {
        subset: SubsetConfig {
            random_crop: true,
            ..Default::default()
        },
        ..Default::default()
    };
    let dataset = Arc::new(Dataset::from_folder(folder.path(), &options).unwrap());
    let error = LatentCache::build(
        &dataset,
        &Mean::new("vae"),
        &CacheConfig::default(),
        |_, _| (),
    )
    .unwrap_err();
    assert!(error.to_string().starts_with("random_crop: "), "{error}");
}
