//! The residual block that the UNet and the VAE share.

use candle_core::{Result, Tensor};
use candle_nn::{Module, VarBuilder};
use lora_core::{Held, Layer};

use super::memory::kept_for;
use super::{POINT, SAME, outputs};

/// Norm, silu, convolution, twice; the time embedding is added in between.
#[derive(Debug, Clone)]
pub(crate) struct Resnet {
    norm1: Layer,
    conv1: Layer,
    time_emb_proj: Option<Layer>,
    norm2: Layer,
    conv2: Layer,
    conv_shortcut: Option<Layer>,
}

impl Resnet {
    /// `temb` is the width of the time embedding, `None` in the VAE.
    pub(crate) fn new(
        i: usize,
        o: usize,
        temb: Option<usize>,
        groups: usize,
        eps: f64,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        Ok(Self {
            norm1: Layer::group_norm(groups, i, eps, vb.pp("norm1"))?,
            conv1: Layer::conv2d(i, o, 3, SAME, vb.pp("conv1"))?,
            time_emb_proj: temb
                .map(|temb| Layer::linear(temb, o, vb.pp("time_emb_proj")))
                .transpose()?,
            norm2: Layer::group_norm(groups, o, eps, vb.pp("norm2"))?,
            conv2: Layer::conv2d(o, o, 3, SAME, vb.pp("conv2"))?,
            conv_shortcut: (i != o)
                .then(|| Layer::conv2d(i, o, 1, POINT, vb.pp("conv_shortcut")))
                .transpose()?,
        })
    }

    /// `temb` `[n, width]` has silu applied already.
    pub(crate) fn forward(&self, x: &Tensor, temb: Option<&Tensor>) -> Result<Tensor> {
        let shift = match (&self.time_emb_proj, temb) {
            (Some(proj), Some(temb)) => Some(proj.forward(temb)?),
            _ => None,
        };
        let normal = self.norm1.forward_silu(x)?;
        let h = self.conv1.forward_added(&normal, shift.as_ref(), None)?;
        let normal = self.norm2.forward_silu(&h)?;
        match &self.conv_shortcut {
            Some(shortcut) => {
                let x = shortcut.forward(x)?;
                self.conv2.forward_added(&normal, None, Some(&x))
            }
            None => self.conv2.forward_added(&normal, None, Some(x)),
        }
    }

    /// Channels of the result.
    pub(super) fn outputs(&self) -> usize {
        outputs(&self.conv2)
    }

    /// Values held at most when no gradients are recorded, for one picture of so many pixels:
    /// at the first convolution input and norm, at the second all that is named in
    /// [`forward`](Self::forward); each with its result and, in the Winograd form, 36 values per tile of
    /// 16 pixels for every input channel and for the 32 output channels of each thread's task.
    pub(crate) fn peak(&self, pixels: usize, threads: usize) -> usize {
        let inputs = self.conv1.base().weight.dims().get(1).copied().unwrap_or(0);
        let outputs = self.outputs();
        let shortcut = usize::from(self.conv_shortcut.is_some()) * outputs;
        let tiles = |channels: usize| (channels + 32 * threads) * 36 / 16;
        let first = 2 * inputs + outputs + tiles(inputs);
        let second = 2 * inputs + 3 * outputs + shortcut + tiles(outputs);
        first.max(second) * pixels
    }

    /// What a training step holds for `pixels` of all `pictures`, of which each has so many input channels.
    pub(super) fn held(&self, inputs: usize, pixels: usize, pictures: usize) -> Held {
        let norms = Held {
            kept: kept_for(&self.conv1, inputs * pixels)
                + kept_for(&self.conv2, self.outputs() * pixels),
            // Gradients of a convolution's result, of its input, of the norm's and of the residual.
            backward: 4 * self.outputs().max(inputs) * pixels,
        };
        let shortcut = self.conv_shortcut.iter();
        let shortcut = shortcut.map(|layer| layer.held_by_adapters(pixels));
        let shift = self.time_emb_proj.iter().map(|layer| layer.held(pictures));
        [self.conv1.held(pixels), self.conv2.held(pixels)]
            .into_iter()
            .chain(shortcut)
            .chain(shift)
            .fold(norms, Held::then)
    }

    pub(crate) fn visit(
        &mut self,
        visit: &mut dyn FnMut(&mut Layer) -> lora_core::Result<()>,
    ) -> lora_core::Result<()> {
        visit(&mut self.norm1)?;
        visit(&mut self.conv1)?;
        self.time_emb_proj.iter_mut().try_for_each(&mut *visit)?;
        visit(&mut self.norm2)?;
        visit(&mut self.conv2)?;
        self.conv_shortcut.iter_mut().try_for_each(visit)
    }
}
