//! Tokens in chunks of 75, broken at commas where possible.

use super::attention::{Piece, parse_attention};
use crate::tokenizer::{CHUNK, COMMA, END, START, Tokenizer};

/// One chunk as the text encoder sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// 77 ids: start, 75 tokens and padding, end.
    pub tokens: Vec<u32>,
    /// A weight per id; 1 for start, end and padding.
    pub weights: Vec<f32>,
}

/// Splits a prompt into chunks. When a chunk is full, what follows its last comma
/// moves to the next one, if that comma is at most `backtrack` tokens back (the web
/// UI's default is 20; 0 switches it off). `BREAK` ends a chunk.
pub fn chunk_prompt(tokenizer: &Tokenizer, prompt: &str, backtrack: usize) -> Vec<Chunk> {
    let mut builder = Builder::default();
    for piece in parse_attention(prompt) {
        builder.add(tokenizer, &piece, backtrack);
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
    /// Tokens up to and including the last comma.
    comma: Option<usize>,
}

impl Builder {
    fn add(&mut self, tokenizer: &Tokenizer, piece: &Piece, backtrack: usize) {
        if piece.text == "BREAK" && piece.weight == -1.0 {
            self.close();
            return;
        }
        for id in tokenizer.encode(&piece.text) {
            if id == COMMA {
                self.comma = Some(self.tokens.len());
            } else if backtrack != 0 && self.tokens.len() == CHUNK {
                self.break_at_comma(backtrack);
            }
            if self.tokens.len() == CHUNK {
                self.close();
            }
            self.tokens.push(id);
            self.weights.push(piece.weight as f32);
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
        self.close();
        (self.tokens, self.weights) = (tokens, weights);
    }

    fn close(&mut self) {
        let mut tokens = vec![START];
        tokens.append(&mut self.tokens);
        tokens.resize(CHUNK + 2, END);
        let mut weights = vec![1.0];
        weights.append(&mut self.weights);
        weights.resize(CHUNK + 2, 1.0);
        self.chunks.push(Chunk { tokens, weights });
        self.comma = None;
    }
}
