//! Programs made of the toolkit; each file beside `src/` is one.
