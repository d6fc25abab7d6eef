//! Promises that hold for any input.

use lora_data::{
    BucketTable, CaptionConfig, CaptionTime, DatasetConfig, Picture, Place, Purpose, Size, Streams,
    balance_regularization, process_caption, resize,
};
use proptest::prelude::*;

fn tags(caption: &str) -> Vec<String> {
    let mut tags: Vec<String> = caption
        .split(',')
        .map(|tag| tag.trim().to_owned())
        .collect();
    tags.sort();
    tags
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn shuffling_loses_no_tag_and_keeps_the_first_ones(
        caption in "[a-z ]{1,8}(, ?[a-z_\\\\()]{0,8}){0,12}", keep in 0usize..4, seed: u64,
    ) {
        let config = CaptionConfig { shuffle_caption: true, keep_tokens: keep, ..Default::default() };
        let mut stream = Streams::new(seed).stream(Purpose::CAPTION, Place::item(0));
        let shuffled = process_caption(&caption, &config, CaptionTime::default(), &mut stream);
        prop_assert_eq!(tags(&shuffled), tags(&caption));
        let first = |text: &str| text.split(',').take(keep).map(|t| t.trim().to_owned()).collect::<Vec<_>>();
        prop_assert_eq!(first(&shuffled), first(&caption));
    }

    #[test]
    fn captions_of_any_text_are_processed(caption: String, epoch in 0usize..5, step in 0usize..300, seed: u64) {
        let config = CaptionConfig {
            shuffle_caption: true,
            enable_wildcard: true,
            keep_tokens_separator: "|||".into(),
            secondary_separator: Some(";".into()),
            caption_prefix: Some("pre".into()),
            caption_tag_dropout_rate: 0.3,
            token_warmup_step: 0.5,
            ..Default::default()
        };
        let mut stream = Streams::new(seed).stream(Purpose::CAPTION, Place::item(0));
        let time = CaptionTime { epoch, step, max_train_steps: 400 };
        let text = process_caption(&caption, &config, time, &mut stream);
        prop_assert!(!text.contains("|||"));
    }

    #[test]
    fn every_image_covers_its_bucket(
        width in 1u32..5000, height in 1u32..5000, side in 4u32..17, no_upscale: bool,
    ) {
        let config = DatasetConfig {
            resolution: Size::square(side * 64),
            bucket_no_upscale: no_upscale,
            max_bucket_reso: 2048,
            ..Default::default()
        };
        if let Ok(fit) = BucketTable::new(&config).and_then(|table| table.assign(Size::new(width, height))) {
            prop_assert!(fit.resized.covers(fit.bucket), "{fit:?}");
            prop_assert!(fit.bucket.width % 64 == 0 && fit.bucket.height % 64 == 0);
        }
    }

    #[test]
    fn regularization_is_at_least_as_frequent_as_training(
        train in 1usize..500, given in prop::collection::vec(1u32..20, 1..40),
    ) {
        let balanced: usize = balance_regularization(train, &given).iter().map(|&r| r as usize).sum();
        prop_assert!(balanced >= train);
        prop_assert!(balanced < train + 20);
    }

    #[test]
    fn resizing_one_color_keeps_it(
        width in 1u32..40, height in 1u32..40, to_width in 1u32..40, to_height in 1u32..40, color: [u8; 3],
    ) {
        let size = Size::new(width, height);
        let picture = Picture { size, rgb: color.repeat(size.area() as usize), alpha: None };
        for filter in ["area", "lanczos", "bilinear", "bicubic", "nearest", "box"] {
            let resized = resize(&picture, Size::new(to_width, to_height), filter.parse().ok());
            prop_assert!(resized.rgb.as_chunks::<3>().0.iter().all(|pixel| *pixel == color), "{filter}");
        }
    }
}
