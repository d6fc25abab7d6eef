//! Learning-rate factors for the 25 blocks of the U-Net.

use std::f64::consts::FRAC_PI_2;

use crate::error::{Error, Result};

/// Blocks on the way down, and on the way up.
const SIDE: usize = 12;

/// Factors on the U-Net's learning rate by block: 12 down, the middle, 12 up.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BlockWeights {
    down: Option<Vec<f64>>,
    mid: Option<f64>,
    up: Option<Vec<f64>>,
    /// Factors up to this become 0.
    pub zero_threshold: f64,
}

impl BlockWeights {
    /// The way down: numbers with commas (filled with 1, cut at 12), or a curve with an
    /// optional base such as `sine+0.2`.
    ///
    /// # Errors
    /// Neither numbers nor a known curve.
    pub fn set_down(&mut self, text: &str) -> Result<()> {
        self.down = Some(side(text)?);
        Ok(())
    }

    /// The middle block.
    pub fn set_mid(&mut self, weight: f64) {
        self.mid = Some(weight);
    }

    /// The way up, as [`BlockWeights::set_down`].
    ///
    /// # Errors
    /// Neither numbers nor a known curve.
    pub fn set_up(&mut self, text: &str) -> Result<()> {
        self.up = Some(side(text)?);
        Ok(())
    }

    /// True when any part was given.
    pub fn is_set(&self) -> bool {
        self.down.is_some() || self.mid.is_some() || self.up.is_some()
    }

    /// All 25 factors; parts not given are 1.
    pub fn all(&self) -> Vec<f64> {
        let side = |given: &Option<Vec<f64>>| given.clone().unwrap_or_else(|| vec![1.0; SIDE]);
        let mut all = side(&self.down);
        all.push(self.mid.unwrap_or(1.0));
        all.extend(side(&self.up));
        all.into_iter()
            .map(|w| if w <= self.zero_threshold { 0.0 } else { w })
            .collect()
    }
}

/// Twelve factors from a list or a curve.
fn side(text: &str) -> Result<Vec<f64>> {
    let text = text.trim();
    let fail = |problem: String| Error::Argument {
        argument: text.to_string(),
        problem,
    };
    let number = |t: &str| -> Result<f64> {
        t.trim()
            .parse()
            .map_err(|_| fail(format!("{t:?} is not a number")))
    };
    if text.contains(',') {
        let mut out = Vec::new();
        for item in text.split(',').take(SIDE) {
            out.push(if item.trim().is_empty() {
                0.0
            } else {
                number(item)?
            });
        }
        out.resize(SIDE, 1.0);
        return Ok(out);
    }
    let (curve, base) = match text.split_once('+') {
        Some((curve, base)) => (curve, number(base)?),
        None => (text, 0.0),
    };
    let rise = |i: usize| i as f64 / (SIDE - 1) as f64;
    let value: Box<dyn Fn(usize) -> f64> = match curve {
        "sine" => Box::new(|i| (FRAC_PI_2 * rise(i)).sin()),
        "cosine" => Box::new(|i| (FRAC_PI_2 * rise(SIDE - 1 - i)).sin()),
        "linear" => Box::new(rise),
        "reverse_linear" => Box::new(|i| rise(SIDE - 1 - i)),
        "zeros" => Box::new(|_| 0.0),
        _ => match number(text) {
            Ok(first) => {
                let mut out = vec![1.0; SIDE];
                out[0] = first;
                return Ok(out);
            }
            Err(_) => {
                return Err(Error::unknown(
                    "curve of block weights",
                    curve,
                    &["sine", "cosine", "linear", "reverse_linear", "zeros"],
                ));
            }
        },
    };
    Ok((0..SIDE).map(|i| value(i) + base).collect())
}

/// The block of a U-Net parameter, 1 to 24, by its kohya name: 1 to 11 down, 12 the
/// middle, 13 to 24 up. `None` for names outside the blocks.
pub fn block_index(name: &str) -> Option<usize> {
    let rest = name.strip_prefix("lora_unet_")?;
    if rest.starts_with("mid_block_") {
        return Some(SIDE);
    }
    let (first, rest) = match rest.strip_prefix("down_blocks_") {
        Some(rest) => (1, rest),
        None => (SIDE + 1, rest.strip_prefix("up_blocks_")?),
    };
    let mut parts = rest.split(['_', '.']);
    let block: usize = parts.next()?.parse().ok()?;
    let layer = match parts.next()? {
        "resnets" | "attentions" => parts.next()?.parse().ok()?,
        "downsamplers" | "upsamplers" => 2,
        _ => return None,
    };
    Some(first + 3 * block + layer).filter(|i| *i <= 2 * SIDE)
}
