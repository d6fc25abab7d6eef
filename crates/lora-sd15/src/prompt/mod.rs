//! Prompts as the web UI reads them: styles, comments, adapter tags, composition, schedules, attention
//! weights, chunks, learned words.

mod attention;
mod chunks;
mod compose;
mod embeddings;
mod schedule;
mod styles;
mod tags;

pub use attention::{Piece, parse_attention};
pub use chunks::{Chunk, chunk_pieces, chunk_prompt};
pub use compose::{Part, split_composition};
pub use embeddings::Embeddings;
pub use schedule::{StepCount, Stretch, schedule_prompt};
pub use styles::{Styles, strip_comments};
pub use tags::{AdapterTag, extract_tags};
