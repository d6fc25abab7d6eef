//! What a training step holds in memory, block by block. Follows the forward functions of
//! this folder: every tensor that the graph keeps is counted. Norms keep what they are given,
//! attention its operands and its result, layers what an adapter multiplies.

use lora_core::{Held, Layer};

use super::attention::Transformer;
use super::{Resnet, UNet, outputs};

/// How many pictures go through the network at once, and how large they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepSize {
    /// Pictures in the batch.
    pub pictures: usize,
    /// Height of the latents.
    pub height: usize,
    /// Width of the latents.
    pub width: usize,
    /// Tokens of context per picture.
    pub tokens: usize,
}

impl StepSize {
    /// Pixels of all latents together, after so many halvings.
    fn pixels(&self, level: usize) -> usize {
        let side = |length: usize| length.div_ceil(1 << level);
        self.pictures * side(self.height) * side(self.width)
    }
}

/// So many values of the layer's input, if an adapter needs them in the backward pass.
pub(super) fn kept_for(layer: &Layer, values: usize) -> usize {
    match layer.attached() {
        0 => 0,
        _ => values,
    }
}

impl UNet {
    /// What a training step holds for this network, with the adapters attached to it now and
    /// with gradient checkpointing as it is set: an estimate, weights not counted.
    pub fn held(&self, size: StepSize) -> Held {
        let first = outputs(&self.conv_in);
        let mut held = self.conv_in.held(size.pixels(0));
        let mut skips = vec![first];
        let mut channels = first;
        for (level, block) in self.down.iter().enumerate() {
            for (j, resnet) in block.resnets.iter().enumerate() {
                let transformer = block.attentions.get(j);
                held = held.then(self.stage_held(resnet, transformer, channels, level, size));
                channels = resnet.outputs();
                skips.push(channels);
            }
            if let Some(downsampler) = &block.downsampler {
                held = held.then(downsampler.held(size.pixels(level + 1)));
                skips.push(channels);
            }
        }
        let level = self.down.len().saturating_sub(1);
        let [first, second] = &self.mid.resnets;
        let attention = Some(&self.mid.attention);
        held = held.then(self.stage_held(first, attention, channels, level, size));
        held = held.then(self.stage_held(second, None, channels, level, size));
        for (i, block) in self.up.iter().enumerate() {
            let level = self.up.len() - 1 - i;
            for (j, resnet) in block.resnets.iter().enumerate() {
                let joined = channels + skips.pop().unwrap_or(0);
                held.kept += joined * size.pixels(level);
                let transformer = block.attentions.get(j);
                held = held.then(self.stage_held(resnet, transformer, joined, level, size));
                channels = resnet.outputs();
            }
            if let Some(upsampler) = &block.upsampler {
                let pixels = size.pixels(level.saturating_sub(1));
                held.kept += kept_for(upsampler, channels * pixels);
                held = held.then(upsampler.held(pixels));
            }
        }
        // The last norm with SiLU behind it.
        let normal = outputs(&self.conv_norm_out) * size.pixels(0);
        held.kept += kept_for(&self.conv_out, normal);
        held.then(self.conv_out.held(size.pixels(0)))
    }

    /// A ResNet block of `inputs` channels and the transformer behind it.
    fn stage_held(
        &self,
        resnet: &Resnet,
        transformer: Option<&Transformer>,
        inputs: usize,
        level: usize,
        size: StepSize,
    ) -> Held {
        let pixels = size.pixels(level);
        let mut held = resnet.held(inputs, pixels, size.pictures);
        if let Some(transformer) = transformer {
            held = held.then(transformer.held(pixels, size.pictures * size.tokens));
        }
        match self.checkpointing {
            true => held.checkpointed(inputs * pixels, resnet.outputs() * pixels),
            false => held,
        }
    }
}
