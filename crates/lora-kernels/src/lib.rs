//! Fast CPU operations with gradients for models whose weights are frozen, as candle custom operations.
