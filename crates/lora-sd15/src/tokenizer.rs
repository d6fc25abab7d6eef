//! CLIP's byte-pair tokenizer, vocabulary included.
//!
//! Text is normalized (NFC, white space to single blanks, lower case), split into
//! letters, single digits and runs of other characters, and each piece merged from
//! its bytes upwards. Underscores split words; letter case does not matter.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::OnceLock;

use regex::Regex;
use unicode_normalization::UnicodeNormalization;

/// Number of token ids.
pub const VOCAB_SIZE: usize = 49408;
/// `<|startoftext|>`.
pub const START: u32 = 49406;
/// `<|endoftext|>`, also the padding of SD1.x.
pub const END: u32 = 49407;
/// The token of a comma, where long prompts may be broken.
pub const COMMA: u32 = 267;
/// Tokens of a chunk between start and end.
pub const CHUNK: usize = 75;

/// Pairs of ids in rank order; pair number i makes id `FIRST_MERGE + i`.
static MERGES: &[u8] = include_bytes!("../assets/clip_merges.bin");
const FIRST_MERGE: u32 = 512;
/// Added to a byte's id at the end of a word.
const WORD_END: u32 = 256;

/// The tokenizer.
///
/// ```
/// use lora_sd15::Tokenizer;
/// let tokenizer = Tokenizer::new();
/// assert_eq!(tokenizer.encode("a photo of a cat"), [320, 1125, 539, 320, 2368]);
/// assert_eq!(tokenizer.encode_padded("").len(), 77);
/// ```
#[derive(Debug, Clone, Default)]
pub struct Tokenizer(());

/// Merge tables, built once per process.
struct Tables {
    ranks: HashMap<(u32, u32), u32>,
    bytes: [u32; 256],
    pieces: Regex,
}

impl Tables {
    fn get() -> &'static Self {
        static TABLES: OnceLock<Tables> = OnceLock::new();
        TABLES.get_or_init(|| {
            let id = |b: &[u8]| u32::from(u16::from_le_bytes([b[0], b[1]]));
            let ranks = MERGES.chunks_exact(4).enumerate().map(|(rank, b)| ((id(b), id(&b[2..])), rank as u32));
            let pieces = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+";
            Tables {
                ranks: ranks.collect(),
                bytes: byte_ids(),
                pieces: Regex::new(pieces).expect("the pattern is a constant that compiles"),
            }
        })
    }
}

/// Ids of bytes: printable Latin-1 first, then the rest in ascending order.
fn byte_ids() -> [u32; 256] {
    let printable = |b: &u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let order = (0..=255u8)
        .filter(printable)
        .chain((0..=255u8).filter(|b| !printable(b)));
    let mut ids = [0; 256];
    for (id, byte) in (0..).zip(order) {
        ids[usize::from(byte)] = id;
    }
    ids
}

impl Tokenizer {
    /// A tokenizer; the tables are shared by all.
    pub fn new() -> Self {
        Self(())
    }

    /// Ids of a text, without start and end, any length.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let tables = Tables::get();
        let normal: String = text.nfc().collect();
        let words: Vec<&str> = normal.split_whitespace().collect();
        let lower = words.join(" ").to_lowercase();
        let mut ids = Vec::new();
        for piece in tables.pieces.find_iter(&lower) {
            match piece.as_str() {
                "<|startoftext|>" => ids.push(START),
                "<|endoftext|>" => ids.push(END),
                piece => merge(tables, piece, &mut ids),
            }
        }
        ids
    }

    /// One chunk of 77: start, up to 75 tokens, end, padded with end. Longer texts
    /// are cut.
    pub fn encode_padded(&self, text: &str) -> Vec<u32> {
        let mut ids = vec![START];
        ids.extend(self.encode(text).into_iter().take(CHUNK));
        ids.resize(CHUNK + 2, END);
        ids
    }

    /// The chunks of sd-scripts' long captions: `chunks` is 1, 2 or 3 for
    /// `max_token_length` 75, 150 or 225. Each has 77 ids; the text is cut every 75
    /// tokens without regard to commas.
    pub fn encode_chunks(&self, text: &str, chunks: usize) -> Vec<Vec<u32>> {
        chunk_ids(&self.encode(text), chunks, START, END)
    }
}

/// See [`Tokenizer::encode_chunks`], for ids of any vocabulary.
pub fn chunk_ids(ids: &[u32], chunks: usize, start: u32, end: u32) -> Vec<Vec<u32>> {
    (0..chunks.max(1))
        .map(|i| {
            let mut chunk = vec![start];
            chunk.extend(ids.iter().skip(i * CHUNK).take(CHUNK));
            chunk.resize(CHUNK + 2, end);
            chunk
        })
        .collect()
}

/// Merges one piece's bytes, best rank first and from the left, and appends its ids. A
/// pair's rank is above those of its halves, so a queue of pairs gives the same as passes
/// over the whole, in time that long pieces can afford.
fn merge(tables: &Tables, piece: &str, out: &mut Vec<u32>) {
    /// In the place of an id that was merged into the one before it.
    const GONE: u32 = u32::MAX;
    let mut ids: Vec<u32> = piece
        .bytes()
        .map(|b| tables.bytes[usize::from(b)])
        .collect();
    if let Some(last) = ids.last_mut() {
        *last += WORD_END;
    }
    let count = ids.len();
    // The ids that are left, as a list; `count` is after the last.
    let mut next: Vec<usize> = (1..=count).collect();
    let mut before: Vec<usize> = (0..count).map(|i| i.wrapping_sub(1)).collect();
    let mut queue = BinaryHeap::new();
    let pair = |ids: &[u32], next: &[usize], at: usize| {
        let (left, right) = (*ids.get(at)?, *ids.get(*next.get(at)?)?);
        let rank = *tables.ranks.get(&(left, right))?;
        Some(Reverse((rank, at, left, right)))
    };
    queue.extend((0..count).filter_map(|at| pair(&ids, &next, at)));
    while let Some(Reverse((rank, at, left, right))) = queue.pop() {
        let second = next[at];
        if ids[at] != left || ids.get(second) != Some(&right) {
            continue;
        }
        ids[at] = FIRST_MERGE + rank;
        ids[second] = GONE;
        next[at] = next[second];
        if let Some(back) = before.get_mut(next[at]) {
            *back = at;
        }
        queue.extend(pair(&ids, &next, before[at]));
        queue.extend(pair(&ids, &next, at));
    }
    out.extend(ids.into_iter().filter(|id| *id != GONE));
}
