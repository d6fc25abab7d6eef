//! AdamW, Prodigy and their peers for candle, with exact resume, parameter groups and learning-rate schedules.
