//! AdamW with 8-bit block-wise state, as bitsandbytes' CUDA kernel does it.
//!
//! Both moments are kept as 8-bit codes (see [`crate::quantize`]); tensors of fewer than
//! `min_8bit_size` values keep 32-bit moments. With t counting from 1:
//!
//! 1. `m = b1 * m + (1 - b1) * g`, `v = b2 * v + (1 - b2) * g^2` on the restored values
//! 2. `p = p - lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps * sqrt(1 - b2^t))`
//! 3. `p = p * (1 - lr * wd)`, **after** the step
//! 4. m and v are quantized again
//!
//! State: `state1`, `absmax1`, `state2`, `absmax2`, or `exp_avg`, `exp_avg_sq` for small
//! tensors. A second moment below about 1.6e-7 of its block's largest becomes 0 while the
//! first does not, and that value then takes a huge step: `keep_second_moment` prevents it.

use serde::{Deserialize, Serialize};

use crate::error::{Result, check_beta, check_not_negative};
use crate::lane::{Lane, TensorLane, decay_into, decay_into_square};
use crate::quantize::{BLOCK, SIGNED, UNSIGNED};
use crate::quantize_tensor::{TensorTable, cached};
use crate::slot::{Buffer, Kernel, Slot, Source};
use crate::stepper::{Rule, RuleConfig, Stepper};
use crate::table::{GroupDefaults, Table};

/// Options of [`AdamW8bit`].
///
/// | name | default | meaning | range |
/// |---|---|---|---|
/// | `lr` | 1e-3 | | 0 or more |
/// | `betas` | (0.9, 0.999) | | [0, 1) |
/// | `eps` | 1e-8 | | 0 or more |
/// | `weight_decay` | 0.01 | | 0 or more |
/// | `min_8bit_size` | 4096 | smaller tensors keep 32-bit state | |
/// | `keep_second_moment` | false | never let a second moment that is not 0 become 0 | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamW8bitConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Smallest tensor with 8-bit state.
    pub min_8bit_size: usize,
    /// Keep small second moments above 0.
    pub keep_second_moment: bool,
}

impl Default for AdamW8bitConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.01,
            min_8bit_size: 4096,
            keep_second_moment: false,
        }
    }
}

impl RuleConfig for AdamW8bitConfig {
    fn validate(&self) -> Result<()> {
        check_not_negative("lr", self.lr)?;
        check_beta("betas", self.betas.0)?;
        check_beta("betas", self.betas.1)?;
        check_not_negative("eps", self.eps)?;
        check_not_negative("weight_decay", self.weight_decay)
    }

    fn defaults(&self) -> GroupDefaults {
        GroupDefaults {
            lr: self.lr,
            weight_decay: self.weight_decay,
            betas: Some(self.betas),
            eps: Some(self.eps),
        }
    }
}

/// AdamW with 8-bit state: 2 bytes of state per value in place of 8.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use lora_optim::{AdamW8bit, AdamW8bitConfig, Optimizer, ParamGroup};
/// let w = Var::ones((64, 64), DType::F32, &Device::Cpu)?;
/// let groups = vec![ParamGroup::new("all", vec![("w".into(), w.clone())])];
/// let mut optimizer = AdamW8bit::new(groups, AdamW8bitConfig { lr: 0.1, weight_decay: 0.0, ..Default::default() })?;
/// optimizer.step(&w.as_tensor().sqr()?.sum_all()?.backward()?)?;
/// assert!(w.flatten_all()?.to_vec1::<f32>()?.iter().all(|x| (x - 0.9).abs() < 1e-6));
/// # Ok::<(), lora_optim::Error>(())
/// ```
pub type AdamW8bit = Stepper<AdamW8bitRule>;

/// The update rule of [`AdamW8bit`].
#[derive(Debug)]
pub struct AdamW8bitRule {
    /// The signed and the unsigned codes, for plain operations.
    tables: Option<[TensorTable; 2]>,
}

const M: usize = 0;
const V: usize = 1;
const CODES1: usize = 2;

impl Rule for AdamW8bitRule {
    type Config = AdamW8bitConfig;
    const NAME: &'static str = "AdamW8bit";
    const BUFFERS: &'static [&'static str] = &[
        "exp_avg",
        "exp_avg_sq",
        "state1",
        "absmax1",
        "state2",
        "absmax2",
    ];

    fn new(_: &AdamW8bitConfig, _: &Table) -> Result<Self> {
        Ok(Self { tables: None })
    }

    fn update(&mut self, config: &AdamW8bitConfig, table: &mut Table) -> Result<()> {
        let numbers = table.per_group(|g, n| (table.rate(g), *n));
        let tables = cached(&mut self.tables, &table.slots, [&SIGNED, &UNSIGNED])?;
        table.for_each(|slot| {
            let (lr, n) = numbers[slot.group];
            let t = slot.steps as i32;
            let correction1 = 1.0 - n.betas.0.powi(t);
            let correction2 = (1.0 - n.betas.1.powi(t)).sqrt();
            let step = Step8 {
                b1: n.betas.0 as f32,
                one_minus_b1: (1.0 - n.betas.0) as f32,
                b2: n.betas.1 as f32,
                one_minus_b2: (1.0 - n.betas.1) as f32,
                rate: (lr * correction2 / correction1) as f32,
                eps: (n.eps * correction2) as f32,
                keep: (1.0 - lr * n.weight_decay) as f32,
            };
            if slot.numel() < config.min_8bit_size {
                slot.ensure_zeros(M)?;
                slot.ensure_zeros(V)?;
                return slot.run(
                    [Source::Param, Source::State(M), Source::State(V)],
                    [Source::Grad],
                    &step,
                );
            }
            match tables {
                Some(tables) if slot.plain => {
                    step.quantized_tensors(config.keep_second_moment, tables, slot)
                }
                _ => step.quantized(config.keep_second_moment, slot),
            }
        })
    }
}

/// Numbers of one parameter's step.
struct Step8 {
    b1: f32,
    one_minus_b1: f32,
    b2: f32,
    one_minus_b2: f32,
    rate: f32,
    eps: f32,
    keep: f32,
}

impl Kernel<3, 1, 0> for Step8 {
    #[inline(always)]
    fn element<L: Lane>(&self, [p, m, v]: &mut [L; 3], [g]: [L; 1]) -> [L; 0] {
        *m = decay_into(m.clone(), g.clone(), self.b1, self.one_minus_b1);
        *v = decay_into_square(v.clone(), g, self.b2, self.one_minus_b2);
        let update = m.clone() / v.clone().sqrt().plus(self.eps);
        *p = (p.clone() - update.times(self.rate)).times(self.keep);
        []
    }
}

impl Step8 {
    fn quantized(&self, keep_second_moment: bool, slot: &mut Slot) -> Result<()> {
        let len = slot.numel();
        let blocks = len.div_ceil(BLOCK);
        if slot.buffers[CODES1].is_none() {
            for i in [CODES1, CODES1 + 2] {
                slot.buffers[i] = Some(Buffer::U8(vec![if i == CODES1 { 127 } else { 0 }; len]));
                slot.buffers[i + 1] = Some(Buffer::F32(vec![0.0; blocks]));
            }
        }
        let scale = slot.grad_scale;
        slot.on_host(|p, g, buffers| {
            let [
                _,
                _,
                Some(codes1),
                Some(largest1),
                Some(codes2),
                Some(largest2),
            ] = buffers
            else {
                return Err(crate::Error::state("8-bit state is incomplete"));
            };
            let moments1 = codes1.u8_mut().chunks_mut(BLOCK).zip(largest1.f32_mut());
            let moments2 = codes2.u8_mut().chunks_mut(BLOCK).zip(largest2.f32_mut());
            let values = p.chunks_mut(BLOCK).zip(g.chunks(BLOCK));
            for ((p, g), ((codes1, largest1), (codes2, largest2))) in
                values.zip(moments1.zip(moments2))
            {
                let (mut m, mut v) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
                let (m, v) = (&mut m[..p.len()], &mut v[..p.len()]);
                SIGNED.dequantize(codes1, *largest1, m);
                UNSIGNED.dequantize(codes2, *largest2, v);
                for i in 0..p.len() {
                    let mut lanes = [p[i], m[i], v[i]];
                    let [] = self.element(&mut lanes, [g[i] * scale]);
                    [p[i], m[i], v[i]] = lanes;
                }
                *largest1 = SIGNED.quantize(m, codes1);
                *largest2 = UNSIGNED.quantize(v, codes2);
                if keep_second_moment {
                    for (code, v) in codes2.iter_mut().zip(v) {
                        *code = (*code).max(u8::from(*v > 0.0));
                    }
                }
            }
            Ok(())
        })
    }

    /// The same with whole tensors.
    fn quantized_tensors(
        &self,
        keep_second_moment: bool,
        [signed, unsigned]: &[TensorTable; 2],
        slot: &mut Slot,
    ) -> Result<()> {
        let mut lanes = [
            slot.weights_tensor(),
            signed.restore(slot, CODES1, CODES1 + 1)?,
            unsigned.restore(slot, CODES1 + 2, CODES1 + 3)?,
        ]
        .map(TensorLane::new);
        let [] = self.element(&mut lanes, [TensorLane::new(slot.grad_tensor()?)]);
        let [p, m, v] = lanes;
        let (m, v) = (m.finish()?, v.finish()?);
        let (codes, largest) = signed.quantize(&m)?;
        slot.put_state(CODES1, codes);
        slot.put_state(CODES1 + 1, largest);
        let (mut codes, largest) = unsigned.quantize(&v)?;
        if keep_second_moment {
            codes = codes.maximum(&v.flatten_all()?.gt(0f32)?)?;
        }
        slot.put_state(CODES1 + 2, codes);
        slot.put_state(CODES1 + 3, largest);
        slot.put_weights(&p.finish()?)
    }
}
