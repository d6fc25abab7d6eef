//! Warm-up, a long constant part, and a decay at the end.

use std::f64::consts::PI;

use crate::schedule::LrSchedule;

/// Shape of a rise or a fall.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RampShape {
    /// A straight line.
    Linear,
    /// Half a cosine.
    #[default]
    Cosine,
    /// `1 - sqrt(x)`: steep at first.
    OneMinusSqrt,
}

impl std::str::FromStr for RampShape {
    type Err = crate::error::Error;

    fn from_str(text: &str) -> crate::error::Result<Self> {
        match text {
            "linear" => Ok(Self::Linear),
            "cosine" => Ok(Self::Cosine),
            "1-sqrt" => Ok(Self::OneMinusSqrt),
            _ => Err(crate::error::Error::unknown(
                "shape",
                text,
                &["linear", "cosine", "1-sqrt"],
            )),
        }
    }
}

/// Warm-up, stable, decay: the constant part can be as long as one likes, a decay from any
/// of its checkpoints gives a finished model. As in transformers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WarmupStableDecay {
    /// Steps of the rise, which starts at `min`.
    pub warmup: u64,
    /// Steps at 1.
    pub stable: u64,
    /// Steps of the fall to `min`.
    pub decay: u64,
    /// Shape of the rise.
    pub warmup_shape: RampShape,
    /// Shape of the fall.
    pub decay_shape: RampShape,
    /// Lowest factor.
    pub min: f64,
    /// Waves of a cosine fall; 0.5 goes down once.
    pub waves: f64,
}

impl LrSchedule for WarmupStableDecay {
    fn factor_for(&self, step: u64, _: f64) -> f64 {
        let lift = |x: f64| (x * (1.0 - self.min) + self.min).max(0.0);
        if step < self.warmup {
            let x = step as f64 / self.warmup as f64;
            return lift(match self.warmup_shape {
                RampShape::Linear => x,
                RampShape::Cosine => 0.5 * (1.0 - (PI * x).cos()),
                RampShape::OneMinusSqrt => 1.0 - (1.0 - x).sqrt(),
            });
        }
        let after = step - self.warmup;
        if after < self.stable {
            return 1.0;
        }
        let falling = after - self.stable;
        if falling >= self.decay {
            return self.min;
        }
        let x = falling as f64 / self.decay as f64;
        lift(match self.decay_shape {
            RampShape::Linear => 1.0 - x,
            RampShape::Cosine => 0.5 * (1.0 + (PI * self.waves * 2.0 * x).cos()),
            RampShape::OneMinusSqrt => 1.0 - x.sqrt(),
        })
    }
}
