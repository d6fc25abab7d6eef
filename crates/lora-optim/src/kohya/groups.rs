//! sd-scripts' parameter groups: text encoder, U-Net or its blocks, LoRA+.

use candle_core::Var;

use super::blocks::{BlockWeights, block_index};
use crate::error::{Error, Result, check_not_negative, check_positive};
use crate::group::ParamGroup;

/// Rates from which sd-scripts makes its groups.
///
/// | name | default | meaning |
/// |---|---|---|
/// | `learning_rate` | 2e-6 | for components without their own |
/// | `text_encoder_lr`, `unet_lr` | none | 0 leaves the component out |
/// | `text_encoder_plus_ratio`, `unet_plus_ratio` | none | LoRA+: up matrices in a group of their own with the rate times this |
/// | `block_weights` | none | factors on the U-Net's rate by block, one group per block |
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use lora_optim::kohya::GroupOptions;
/// let zeros = || Var::zeros(4, DType::F32, &Device::Cpu);
/// let params = vec![
///     ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight".to_string(), zeros()?),
///     ("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight".to_string(), zeros()?),
/// ];
/// let mut options = GroupOptions { learning_rate: 1e-4, ..Default::default() };
/// options.set_network_arg("loraplus_lr_ratio", "16")?;
/// let groups = options.groups(params)?;
/// assert_eq!((groups[1].name.as_str(), groups[1].lr), ("unet plus", Some(16.0 * 1e-4)));
/// # Ok::<(), lora_optim::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct GroupOptions {
    /// Rate of components without their own.
    pub learning_rate: f64,
    /// Rate of the text encoder.
    pub text_encoder_lr: Option<f64>,
    /// Rate of the U-Net.
    pub unet_lr: Option<f64>,
    /// LoRA+ ratio of the text encoder.
    pub text_encoder_plus_ratio: Option<f64>,
    /// LoRA+ ratio of the U-Net.
    pub unet_plus_ratio: Option<f64>,
    /// Factors on the U-Net's rate by block.
    pub block_weights: Option<BlockWeights>,
}

impl Default for GroupOptions {
    fn default() -> Self {
        Self {
            learning_rate: 2e-6,
            text_encoder_lr: None,
            unet_lr: None,
            text_encoder_plus_ratio: None,
            unet_plus_ratio: None,
            block_weights: None,
        }
    }
}

/// Named parameters.
type Params = Vec<(String, Var)>;

/// The `network_args` that concern groups.
const NETWORK_ARGS: [&str; 7] = [
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
    "block_lr_zero_threshold",
];

impl GroupOptions {
    /// Takes one of sd-scripts' `network_args` that concern groups. A specific LoRA+ ratio
    /// wins over `loraplus_lr_ratio`, whichever comes first.
    ///
    /// # Errors
    /// Another argument, or a value of the wrong form.
    pub fn set_network_arg(&mut self, key: &str, value: &str) -> Result<()> {
        let number = || -> Result<f64> {
            let problem = || Error::Argument {
                argument: format!("{key}={value}"),
                problem: "expected a number".into(),
            };
            value.trim().parse().map_err(|_| problem())
        };
        match key {
            "loraplus_lr_ratio" => {
                let ratio = Some(number()?);
                self.unet_plus_ratio = self.unet_plus_ratio.or(ratio);
                self.text_encoder_plus_ratio = self.text_encoder_plus_ratio.or(ratio);
            }
            "loraplus_unet_lr_ratio" => {
                self.unet_plus_ratio = Some(number()?)
                    .filter(|r| *r != 0.0)
                    .or(self.unet_plus_ratio)
            }
            "loraplus_text_encoder_lr_ratio" => {
                self.text_encoder_plus_ratio = Some(number()?)
                    .filter(|r| *r != 0.0)
                    .or(self.text_encoder_plus_ratio);
            }
            "block_lr_zero_threshold" => {
                self.block_weights.get_or_insert_default().zero_threshold = number()?
            }
            "down_lr_weight" => self.block_weights.get_or_insert_default().set_down(value)?,
            "up_lr_weight" => self.block_weights.get_or_insert_default().set_up(value)?,
            "mid_lr_weight" => self
                .block_weights
                .get_or_insert_default()
                .set_mid(number()?),
            _ => return Err(Error::unknown("network_args key", key, &NETWORK_ARGS)),
        }
        Ok(())
    }

    /// Sorts parameters by their kohya names (`lora_te...`, else the U-Net) into groups, in
    /// sd-scripts' order: text encoder first. A group with rate 0 is left out: its weights
    /// stay as they are.
    ///
    /// # Errors
    /// A negative rate or a LoRA+ ratio that is not above 0.
    pub fn groups(&self, params: Vec<(String, Var)>) -> Result<Vec<ParamGroup>> {
        let text_encoder_lr = self.text_encoder_lr.unwrap_or(self.learning_rate);
        let unet_lr = self.unet_lr.unwrap_or(self.learning_rate);
        check_not_negative("text_encoder_lr", text_encoder_lr)?;
        check_not_negative("unet_lr", unet_lr)?;
        let (text_encoder, unet): (Vec<_>, Vec<_>) = params
            .into_iter()
            .partition(|(name, _)| name.starts_with("lora_te"));
        let mut out = Vec::new();
        split_plus(
            "textencoder",
            text_encoder,
            text_encoder_lr,
            self.text_encoder_plus_ratio,
            &mut out,
        )?;
        // "The feature is on" once any block list was given; a threshold alone is not one.
        let Some(weights) = self.block_weights.as_ref().filter(|w| w.is_set()) else {
            split_plus("unet", unet, unet_lr, self.unet_plus_ratio, &mut out)?;
            return Ok(out);
        };
        let mut blocks: Vec<(Option<usize>, Params)> = Vec::new();
        for param in unet {
            let index = block_index(&param.0);
            match blocks.iter_mut().find(|(i, _)| *i == index) {
                Some((_, members)) => members.push(param),
                None => blocks.push((index, vec![param])),
            }
        }
        let factors = weights.all();
        for (index, members) in blocks {
            match index {
                Some(i) => split_plus(
                    &format!("unet_block{i}"),
                    members,
                    unet_lr * factors[i],
                    self.unet_plus_ratio,
                    &mut out,
                )?,
                None => split_plus("unet", members, unet_lr, self.unet_plus_ratio, &mut out)?,
            }
        }
        Ok(out)
    }
}

/// One group, or with a LoRA+ ratio two: the rest, and the up matrices.
fn split_plus(
    name: &str,
    params: Vec<(String, Var)>,
    lr: f64,
    ratio: Option<f64>,
    out: &mut Vec<ParamGroup>,
) -> Result<()> {
    let mut push = |name: String, params: Vec<(String, Var)>, lr: f64| {
        if lr != 0.0 && !params.is_empty() {
            out.push(ParamGroup {
                lr: Some(lr),
                ..ParamGroup::new(name, params)
            });
        }
    };
    let Some(ratio) = ratio else {
        push(name.to_string(), params, lr);
        return Ok(());
    };
    check_positive("loraplus_lr_ratio", ratio)?;
    let (plus, rest): (Vec<_>, Vec<_>) = params
        .into_iter()
        .partition(|(name, _)| name.contains("lora_up"));
    push(name.to_string(), rest, lr);
    push(format!("{name} plus"), plus, lr * ratio);
    Ok(())
}
