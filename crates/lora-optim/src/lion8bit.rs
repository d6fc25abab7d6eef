//! Lion with an 8-bit block-wise average: the rule of [`crate::Lion`], its `exp_avg` kept
//! as signed codes (see [`crate::quantize`]). Tensors of fewer than 4096 values keep it in
//! 32 bits. State: `state1`, `absmax1`, or `exp_avg` for small tensors.

use crate::error::{Error, Result};
use crate::lane::TensorLane;
use crate::lion::{LionConfig, LionStep};
use crate::quantize::{BLOCK, SIGNED};
use crate::quantize_tensor::{TensorTable, cached};
use crate::slot::{Buffer, Kernel, Slot, Source};
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
pub struct Lion8bitRule {
    /// The signed codes, for plain operations.
    tables: Option<[TensorTable; 1]>,
}

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
        Ok(Self { tables: None })
    }

    fn update(&mut self, config: &LionConfig, table: &mut Table) -> Result<()> {
        let steps = table.per_group(|g, n| {
            let lr = table.rate(g);
            LionStep::new(lr, config.keep(lr, n), n.betas)
        });
        let tables = cached(&mut self.tables, &table.slots, [&SIGNED])?;
        table.for_each(|slot| {
            let step = &steps[slot.group];
            if slot.numel() < MIN_8BIT_SIZE {
                slot.ensure_zeros(M)?;
                return slot.run([Source::Param, Source::State(M)], [Source::Grad], step);
            }
            if let (true, Some([codes])) = (slot.plain, tables) {
                return step_tensors(step, codes, slot);
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

/// The step of a large tensor with whole tensors.
fn step_tensors(step: &LionStep, table: &TensorTable, slot: &mut Slot) -> Result<()> {
    let mut lanes =
        [slot.weights_tensor(), table.restore(slot, CODES, LARGEST)?].map(TensorLane::new);
    let [] = step.element(&mut lanes, [TensorLane::new(slot.grad_tensor()?)]);
    let [p, m] = lanes;
    let (codes, largest) = table.quantize(&m.finish()?)?;
    slot.put_state(CODES, codes);
    slot.put_state(LARGEST, largest);
    slot.put_weights(&p.finish()?)
}
