//! The tokenizer against another implementation of the same vocabulary.

use instant_clip_tokenizer::{Token, Tokenizer as Other};
use lora_sd15::Tokenizer;

/// Texts of random pieces: letters of several scripts, digits, punctuation, blanks.
fn texts() -> impl Iterator<Item = String> {
    let pieces = [
        "1girl",
        "solo",
        ", ",
        " ",
        "_",
        "(",
        ")",
        ":1.2",
        "don't",
        "'s",
        "é",
        "日本",
        "ß",
        "straw hat",
        "HELLO",
        "supercalifragilistic",
        "!!",
        "...",
        "3.14",
        "\n",
        "a",
        "zz",
        "-",
        "😀",
        "ё",
        "x2y",
        "ing",
        "er",
        "'ve",
    ];
    let mut state = 1u64;
    let mut next = move |n: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    (0..2000).map(move |_| {
        (0..1 + next(12))
            .map(|_| pieces[next(pieces.len())])
            .collect()
    })
}

#[test]
fn ids_equal_those_of_an_independent_implementation() {
    let (ours, other) = (Tokenizer::new(), Other::new());
    for text in texts() {
        let mut want: Vec<Token> = Vec::new();
        other.encode(&text, &mut want);
        let want: Vec<u32> = want.into_iter().map(|t| u32::from(t.to_u16())).collect();
        assert_eq!(ours.encode(&text), want, "{text:?}");
    }
}

#[test]
fn long_texts_are_cut_with_start_and_end_in_place() {
    let ids = Tokenizer::new().encode_padded(&"word ".repeat(200));
    assert_eq!((ids.len(), ids[0], ids[76]), (77, 49406, 49407));
    assert!(ids[1..76].iter().all(|id| *id == ids[1]));
}
