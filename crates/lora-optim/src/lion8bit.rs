//! Lion with an 8-bit block-wise average: the rule of [`crate::Lion`], its `exp_avg` kept
//! as signed codes (see [`crate::quantize`]). Tensors of fewer than 4096 values keep it in
//! 32 bits. State: `state1`, `absmax1`, or `exp_avg` for small tensors.

use crate::error::{Error, Result};
use crate::lion::{LionConfig, LionStep};
use crate::quantize::{BLOCK, SIGNED};
use crate::slot::{Buffer, Kernel, Source};
use crate::stepper::{Rule, Stepper};
use crate::table::Table;

/// Lion with 8-bit state: 1 byte of state per value.
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use lora_optim::{Lion8bit, LionConfig, Optimizer, ParamGroup};
/// let w = Var::ones((64, 64), DType::F32, &Device::Cpu)?;
/// let groups = vec![ParamGroup::new("all", vec![("w".into(), w.clone())])];
/// let mut lion = Lion8bit::new(groups, LionConfig { lr: 0.25, ..Default::default() })?;
/// lion.step(&w.as_tensor().sqr()?.sum_all()?.backward()?)?;
/// assert_eq!(w.mean_all()?.to_scalar::<f32>()?, 0.75);
/// # Ok::<(), lora_optim::Error>(())
/// ```
pub type Lion8bit = Stepper<Lion8bitRule>;

/// The update rule of [`Lion8bit`].
#[derive(Debug)]
pub struct Lion8bitRule;

/// Smaller tensors keep 32-bit state.
const MIN_8BIT_SIZE: usize = 4096;
const M: usize = 0;
const CODES: usize = 1;
const LARGEST: usize = 2;

impl Rule for Lion8bitRule {
    type Config = LionConfig;
    const NAME: &'static str = "Lion8bit";
    const BUFFERS: &'static [&'static str] = &["exp_avg", "state1", "absmax1"];

    fn new(_: &LionConfig, _: &Table) -> Result<Self> {
        Ok(Self)
    }

    fn update(&mut self, config: &LionConfig, table: &mut Table) -> Result<()> {
        let steps = table.per_group(|g, n| {
            let lr = table.rate(g);
            LionStep::new(lr, config.keep(lr, n), n.betas)
        });
        table.for_each(|slot| {
            let step = &steps[slot.group];
            if slot.numel() < MIN_8BIT_SIZE {
                slot.ensure_zeros(M)?;
                return slot.run([Source::Param, Source::State(M)], [Source::Grad], step);
            }
            if slot.buffers[CODES].is_none() {
                slot.buffers[CODES] = Some(Buffer::U8(vec![127; slot.numel()]));
                slot.buffers[LARGEST] = Some(Buffer::F32(vec![0.0; slot.numel().div_ceil(BLOCK)]));
            }
            let scale = slot.grad_scale;
            slot.on_host(|p, g, buffers| {
                let [_, Some(codes), Some(largest)] = buffers else {
                    return Err(Error::state("8-bit state is incomplete"));
                };
                let moments = codes.u8_mut().chunks_mut(BLOCK).zip(largest.f32_mut());
                for ((p, g), (codes, largest)) in
                    p.chunks_mut(BLOCK).zip(g.chunks(BLOCK)).zip(moments)
                {
                    let mut m = [0.0f32; BLOCK];
                    let m = &mut m[..p.len()];
                    SIGNED.dequantize(codes, *largest, m);
                    for i in 0..p.len() {
                        let mut lanes = [p[i], m[i]];
                        let [] = step.element(&mut lanes, [g[i] * scale]);
                        [p[i], m[i]] = lanes;
                    }
                    *largest = SIGNED.quantize(m, codes);
                }
                Ok(())
            })
        })
    }
}
