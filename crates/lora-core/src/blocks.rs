//! The blocks of the UNet, and lists with one value for each.

use crate::{Component, Error, Result};

/// A block of a Stable Diffusion 1.x pipeline, as block lists count them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Block {
    /// The text encoder.
    Base,
    /// `input_blocks.n`, 0 to 11.
    In(usize),
    /// The middle block.
    Mid,
    /// `output_blocks.n`, 0 to 11.
    Out(usize),
}

/// Blocks on one side.
const SIDE: usize = 12;

impl Block {
    /// The block of a layer, by its name in kohya's files; `None` for the UNet's time
    /// embedding and its output layers, which are in no block.
    ///
    /// ```
    /// use lora_core::Block;
    /// assert_eq!(Block::of("lora_unet_down_blocks_1_attentions_0_proj_in"), Some(Block::In(4)));
    /// assert_eq!(Block::of("lora_unet_up_blocks_0_upsamplers_0_conv"), Some(Block::Out(2)));
    /// assert_eq!(Block::of("lora_te_text_model_encoder_layers_0_mlp_fc1"), Some(Block::Base));
    /// assert_eq!(Block::of("lora_unet_conv_out"), None);
    /// ```
    pub fn of(layer: &str) -> Option<Self> {
        if Component::TextEncoder.owns(layer) {
            return Some(Block::Base);
        }
        let rest = layer.strip_prefix("lora_unet_")?;
        if rest.starts_with("mid_block_") {
            return Some(Block::Mid);
        }
        if rest == "conv_in" {
            return Some(Block::In(0));
        }
        let (down, rest) = match rest.strip_prefix("down_blocks_") {
            Some(rest) => (true, rest),
            None => (false, rest.strip_prefix("up_blocks_")?),
        };
        let mut words = rest.split('_');
        let block: usize = words.next()?.parse().ok()?;
        let inner = match words.next()? {
            "resnets" | "attentions" => words.next()?.parse().ok()?,
            "downsamplers" | "upsamplers" => 2,
            _ => return None,
        };
        let n = block.checked_mul(3)?.checked_add(inner)? + usize::from(down);
        let found = if down { Block::In(n) } else { Block::Out(n) };
        (n < SIDE).then_some(found)
    }

    /// Place among the 25 blocks of the UNet.
    fn index(self) -> Option<usize> {
        match self {
            Block::Base => None,
            Block::In(n) => Some(n),
            Block::Mid => Some(SIDE),
            Block::Out(n) => Some(SIDE + 1 + n),
        }
    }
}

/// One number for every block.
///
/// Lists of four lengths are known. 26: text encoder, IN00 to IN11, middle, OUT00 to
/// OUT11. 25: the same without the text encoder, as sd-scripts trains. 17: text encoder and
/// the blocks with transformers. 12: text encoder, IN04, 05, 07, 08, middle, OUT00 to OUT05,
/// as for SDXL. Blocks that a list does not name get 0.
///
/// ```
/// use lora_core::BlockValues;
/// let weights = BlockValues::parse("1,0,0,0,0,0,0,0.5,0,0,0,0,0,0,0,0,0")?;
/// assert_eq!(weights.get("lora_te_text_model_encoder_layers_0_mlp_fc1"), Some(1.0));
/// assert_eq!(weights.get("lora_unet_mid_block_attentions_0_proj_in"), Some(0.5));
/// assert_eq!(weights.get("lora_unet_down_blocks_0_attentions_0_proj_in"), Some(0.0));
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct BlockValues {
    base: Option<f64>,
    unet: [f64; 2 * SIDE + 1],
}

impl BlockValues {
    /// The same number for every block of the UNet, and none for the text encoder.
    pub fn uniform(value: f64) -> Self {
        Self {
            base: None,
            unet: [value; 2 * SIDE + 1],
        }
    }

    /// From 12, 17, 25 or 26 numbers.
    ///
    /// # Errors
    /// [`Error::BadValue`] for another length.
    pub fn new(values: &[f64]) -> Result<Self> {
        let mut all = Self::uniform(0.0);
        let (base, blocks): (Option<f64>, Vec<Block>) = match values.len() {
            25 => (None, side(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 0..12)),
            26 => (
                values.first().copied(),
                side(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 0..12),
            ),
            17 => (values.first().copied(), side(&[1, 2, 4, 5, 7, 8], 3..12)),
            12 => (values.first().copied(), side(&[4, 5, 7, 8], 0..6)),
            other => {
                return Err(Error::BadValue {
                    layer: "block list".into(),
                    name: "length",
                    value: other.to_string(),
                    expected: "expected 12, 17, 25 or 26 numbers",
                });
            }
        };
        all.base = base;
        let skipped = usize::from(base.is_some());
        for (block, value) in blocks.into_iter().zip(values.iter().skip(skipped)) {
            if let Some(slot) = block.index().and_then(|i| all.unet.get_mut(i)) {
                *slot = *value;
            }
        }
        Ok(all)
    }

    /// From numbers with commas.
    ///
    /// # Errors
    /// [`Error::BadValue`] for text that is no number, or another length.
    pub fn parse(text: &str) -> Result<Self> {
        let number = |item: &str| match item.trim().parse::<f64>() {
            Ok(value) if value.is_finite() => Ok(value),
            _ => Err(Error::BadValue {
                layer: "block list".into(),
                name: "value",
                value: format!("{item:?}"),
                expected: "expected numbers with commas between them",
            }),
        };
        let values: Result<Vec<f64>> = text.split(',').map(number).collect();
        Self::new(&values?)
    }

    /// The number for a layer, by its name in kohya's files; `None` where the list says
    /// nothing: layers in no block, and the text encoder in a list of 25.
    pub fn get(&self, layer: &str) -> Option<f64> {
        match Block::of(layer)? {
            Block::Base => self.base,
            block => self.unet.get(block.index()?).copied(),
        }
    }

    /// Sets the UNet's blocks to 0 where `zero`, of 25 values, is 0.
    pub fn zero_where(&mut self, zero: &[f64]) {
        for (value, factor) in self.unet.iter_mut().zip(zero) {
            if *factor == 0.0 {
                *value = 0.0;
            }
        }
    }

    /// All numbers, the text encoder's first if there is one.
    pub fn values(&self) -> impl Iterator<Item = f64> {
        self.base.into_iter().chain(self.unet)
    }
}

/// Blocks in the order of a list: on the way down, the middle, on the way up.
fn side(inputs: &[usize], outputs: std::ops::Range<usize>) -> Vec<Block> {
    let inputs = inputs.iter().map(|n| Block::In(*n));
    inputs
        .chain([Block::Mid])
        .chain(outputs.map(Block::Out))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_has_as_many_blocks() {
        for length in [12usize, 17, 25, 26] {
            let values: Vec<f64> = (1..=length).map(|i| i as f64).collect();
            let list = BlockValues::new(&values).unwrap();
            let got: Vec<f64> = list.values().filter(|v| *v != 0.0).collect();
            assert_eq!(got, values, "{length}");
        }
        assert!(BlockValues::new(&[1.0; 16]).is_err());
        assert!(BlockValues::parse("1,2,x").is_err());
    }
}
