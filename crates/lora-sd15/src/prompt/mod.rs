//! Prompts as the web UI reads them: adapter tags, attention weights, chunks.

mod attention;
mod chunks;
mod tags;

pub use attention::{Piece, parse_attention};
pub use chunks::{Chunk, chunk_prompt};
pub use tags::{AdapterTag, extract_tags};

use crate::{Error, Result};

/// Refuses the prompt syntax that is not supported, instead of drawing it as text:
/// `AND` composition, `[from:to:when]` scheduling and `[a|b]` alternation.
///
/// # Errors
/// [`Error::Prompt`].
pub fn check_supported(prompt: &str) -> Result<()> {
    let refuse = |what: &str| {
        Err(Error::Prompt {
            prompt: prompt.to_string(),
            what: what.to_string(),
        })
    };
    if prompt.split_whitespace().any(|w| w == "AND") {
        return refuse("AND composition is not supported; write `and`, or a single prompt");
    }
    // Innermost square brackets, escapes aside.
    let mut open: Vec<usize> = Vec::new();
    let mut previous = ' ';
    for (i, c) in prompt.char_indices() {
        match c {
            '[' if previous != '\\' => open.push(i),
            ']' if previous != '\\' => {
                let Some(start) = open.pop() else { continue };
                let inside = &prompt[start + 1..i];
                if inside.contains('|') {
                    return refuse("alternation [a|b] is not supported; choose one");
                }
                let when = inside.rsplit_once(':').map(|(_, when)| when.trim());
                if when.is_some_and(|w| w.parse::<f64>().is_ok()) {
                    return refuse(
                        "scheduling [from:to:when] is not supported; choose one, or use (word:1.2) for a weight",
                    );
                }
            }
            _ => {}
        }
        previous = if previous == '\\' { ' ' } else { c };
    }
    Ok(())
}
