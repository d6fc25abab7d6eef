//! Multipliers: one per component, and one per block of the UNet.

use crate::{Component, Error, Result};

/// Block names of the longest layout, in order; `BASE` is the text encoder.
const SLOTS: [&str; 26] = [
    "BASE", "IN00", "IN01", "IN02", "IN03", "IN04", "IN05", "IN06", "IN07", "IN08", "IN09", "IN10",
    "IN11", "MID", "OUT00", "OUT01", "OUT02", "OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08",
    "OUT09", "OUT10", "OUT11",
];
/// The slots that a list of 17 names: blocks with a transformer.
const SHORT: [usize; 17] = [0, 2, 3, 5, 6, 8, 9, 13, 17, 18, 19, 20, 21, 22, 23, 24, 25];

/// How strongly an adapter is applied, layer by layer.
///
/// The effective multiplier is that of the component times that of the block. Layers
/// outside of all blocks (time embedding, output) have the component's alone.
///
/// ```
/// use lora_core::algebra::Strength;
/// let strength = Strength::new(0.8, 0.5).with_blocks(&[1., 0., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1.])?;
/// assert_eq!(strength.of("lora_te_text_model_encoder_layers_0_mlp_fc1"), 0.5);
/// assert_eq!(strength.of("lora_unet_down_blocks_0_attentions_0_proj_in"), 0.0); // IN01
/// assert_eq!(strength.of("lora_unet_mid_block_attentions_0_proj_in"), 0.8);
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Strength {
    unet: f64,
    text_encoder: f64,
    blocks: [f64; 26],
}

impl Default for Strength {
    /// As trained: 1 everywhere.
    fn default() -> Self {
        Self::new(1.0, 1.0)
    }
}

impl Strength {
    /// Multipliers of the UNet and the text encoder.
    pub fn new(unet: f64, text_encoder: f64) -> Self {
        Self {
            unet,
            text_encoder,
            blocks: [1.0; 26],
        }
    }

    /// With block weights: 26 numbers (`BASE`, `IN00` to `IN11`, `MID`, `OUT00` to
    /// `OUT11`), or 17 (`BASE`, `IN01`, 02, 04, 05, 07, 08, `MID`, `OUT03` to `OUT11`;
    /// the blocks that are not named keep 1). `BASE` is the text encoder.
    ///
    /// # Errors
    /// [`Error::BadValue`] for another count (12 is SDXL's layout) or a number that is
    /// not finite.
    pub fn with_blocks(mut self, weights: &[f64]) -> Result<Self> {
        let slots: Vec<usize> = match weights.len() {
            17 => SHORT.to_vec(),
            26 => (0..26).collect(),
            n => {
                return Err(Error::BadValue {
                    layer: "block weights".into(),
                    name: "count",
                    value: n.to_string(),
                    expected: "expected 17 or 26 numbers (12 is the layout of SDXL)",
                });
            }
        };
        if let Some(bad) = weights.iter().find(|w| !w.is_finite()) {
            return Err(Error::BadValue {
                layer: "block weights".into(),
                name: "weight",
                value: bad.to_string(),
                expected: "expected a finite number",
            });
        }
        for (slot, weight) in slots.into_iter().zip(weights) {
            if let Some(place) = self.blocks.get_mut(slot) {
                *place = *weight;
            }
        }
        Ok(self)
    }

    /// The multiplier of a layer, by its name in adapter files.
    pub fn of(&self, layer: &str) -> f64 {
        let component = if Component::TextEncoder.owns(layer) {
            self.text_encoder
        } else {
            self.unet
        };
        let block = slot(layer).and_then(|slot| self.blocks.get(slot));
        component * block.unwrap_or(&1.0)
    }
}

/// The block that a layer belongs to, such as `IN04` or `BASE`; `None` for the time
/// embedding and the output layers.
///
/// ```
/// use lora_core::algebra::block_of;
/// assert_eq!(block_of("lora_unet_up_blocks_1_attentions_2_proj_in"), Some("OUT05"));
/// assert_eq!(block_of("lora_unet_conv_out"), None);
/// ```
pub fn block_of(layer: &str) -> Option<&'static str> {
    slot(layer).and_then(|slot| SLOTS.get(slot).copied())
}

fn slot(layer: &str) -> Option<usize> {
    if Component::TextEncoder.owns(layer) {
        return Some(0);
    }
    let path = layer.strip_prefix("lora_unet_")?;
    if path.starts_with("mid_block_") {
        return Some(13);
    }
    if path == "conv_in" {
        return Some(1);
    }
    let (start, rest) = if let Some(rest) = path.strip_prefix("down_blocks_") {
        (2, rest)
    } else {
        (14, path.strip_prefix("up_blocks_")?)
    };
    let mut parts = rest.split('_');
    let number = |text: Option<&str>| text?.parse::<usize>().ok();
    let block = number(parts.next()).filter(|n| *n < 4)?;
    let inner = match parts.next()? {
        "resnets" | "attentions" => number(parts.next()).filter(|n| *n < 3)?,
        "downsamplers" | "upsamplers" => 2,
        _ => return None,
    };
    Some(start + 3 * block + inner)
}
