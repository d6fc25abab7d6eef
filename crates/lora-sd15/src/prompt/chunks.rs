//! Tokens in chunks of 75, broken at commas where possible.

use super::attention::{Piece, parse_attention};
use super::embeddings::Embeddings;
use crate::tokenizer::{CHUNK, COMMA, END, START, Tokenizer};

/// One chunk as the text encoder sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// 77 ids: start, 75 tokens and padding, end. Slots of an embedding are 0.
    pub tokens: Vec<u32>,
    /// A weight per id; 1 for start, end and padding.
    pub weights: Vec<f32>,
    /// Embeddings by name, with the slot of their first vector in `tokens`.
    pub embeddings: Vec<(usize, String)>,
}

impl Chunk {
    /// A chunk of padding: what an empty prompt gives.
    pub fn empty() -> Self {
        let mut tokens = vec![START];
        tokens.resize(CHUNK + 2, END);
        Self {
            tokens,
            weights: vec![1.0; CHUNK + 2],
            embeddings: Vec::new(),
        }
    }
}

/// Splits a prompt into chunks. When a chunk is full, what follows its last comma
/// moves to the next one, if that comma is at most `backtrack` tokens back (the web
/// UI's default is 20; 0 switches it off). `BREAK` ends a chunk.
pub fn chunk_prompt(tokenizer: &Tokenizer, prompt: &str, backtrack: usize) -> Vec<Chunk> {
    let pieces = parse_attention(prompt);
    chunk_pieces(tokenizer, &pieces, backtrack, &Embeddings::default())
}

/// The same for parsed pieces, with the names of embeddings replaced by their slots.
pub fn chunk_pieces(
    tokenizer: &Tokenizer,
    pieces: &[Piece],
    backtrack: usize,
    embeddings: &Embeddings,
) -> Vec<Chunk> {
    let mut builder = Builder::default();
    for piece in pieces {
        builder.add(tokenizer, piece, backtrack, embeddings);
    }
    if !builder.tokens.is_empty() || builder.chunks.is_empty() {
        builder.close();
    }
    builder.chunks
}

#[derive(Default)]
struct Builder {
    chunks: Vec<Chunk>,
    tokens: Vec<u32>,
    weights: Vec<f32>,
    /// First slots and names, slots counted without the start token.
    embeddings: Vec<(usize, String)>,
    /// Tokens up to and including the last comma.
    comma: Option<usize>,
}

impl Builder {
    fn add(
        &mut self,
        tokenizer: &Tokenizer,
        piece: &Piece,
        backtrack: usize,
        embeddings: &Embeddings,
    ) {
        if piece.text == "BREAK" && piece.weight == -1.0 {
            self.close();
            return;
        }
        let ids = tokenizer.encode(&piece.text);
        let mut rest = ids.as_slice();
        while let Some((&id, after)) = rest.split_first() {
            if id == COMMA {
                self.comma = Some(self.tokens.len());
            } else if backtrack != 0 && self.tokens.len() == CHUNK {
                self.break_at_comma(backtrack);
            }
            if self.tokens.len() == CHUNK {
                self.close();
            }
            let (vectors, id) = match embeddings.at(rest) {
                None => {
                    rest = after;
                    (1, id)
                }
                Some(found) => {
                    if self.tokens.len() + found.vectors > CHUNK {
                        self.close();
                    }
                    self.embeddings
                        .push((self.tokens.len(), found.name.to_string()));
                    rest = rest.get(found.tokens..).unwrap_or(&[]);
                    (found.vectors, 0)
                }
            };
            self.tokens.resize(self.tokens.len() + vectors, id);
            self.weights.resize(self.tokens.len(), piece.weight as f32);
        }
    }

    fn break_at_comma(&mut self, backtrack: usize) {
        let Some(comma) = self.comma.filter(|c| self.tokens.len() - c <= backtrack) else {
            return;
        };
        let keep = comma + 1;
        if keep > self.tokens.len() {
            return;
        }
        let (tokens, weights) = (self.tokens.split_off(keep), self.weights.split_off(keep));
        let (stay, moved) = std::mem::take(&mut self.embeddings)
            .into_iter()
            .partition(|(slot, _)| *slot < keep);
        self.embeddings = stay;
        self.close();
        (self.tokens, self.weights) = (tokens, weights);
        self.embeddings = moved;
        self.embeddings
            .iter_mut()
            .for_each(|(slot, _)| *slot -= keep);
    }

    fn close(&mut self) {
        let mut chunk = Chunk::empty();
        for (slot, (id, weight)) in self
            .tokens
            .drain(..)
            .zip(self.weights.drain(..))
            .enumerate()
        {
            if let (Some(i), Some(w)) = (
                chunk.tokens.get_mut(slot + 1),
                chunk.weights.get_mut(slot + 1),
            ) {
                (*i, *w) = (id, weight);
            }
        }
        chunk.embeddings = std::mem::take(&mut self.embeddings);
        chunk.embeddings.iter_mut().for_each(|(slot, _)| *slot += 1);
        self.chunks.push(chunk);
        self.comma = None;
    }
}
