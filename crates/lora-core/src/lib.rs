//! LoRA, LoHa, LoKr and the other adapter families for candle models: mathematics, files, injection, merging.
