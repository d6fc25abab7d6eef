//! CAME (Luo et al. 2023): Adafactor with a first moment, whose steps shrink where it
//! disagrees with the present gradient.
//!
//! 1. The running mean of `g^2 + eps1` (decay b2, kept as row and column means) gives v;
//!    `u = g / sqrt(v)`, `u = u / max(1, rms(u) / clip_threshold)`
//! 2. `m = b1 * m + (1 - b1) * u`
//! 3. The running mean of `(u - m)^2 + eps2` (decay b3, kept the same way) gives the
//!    instability; `w = m / sqrt(instability)`. Tensors with one dimension: `w = m`
//! 4. `p = p * (1 - lr * wd) - lr * w`
//!
//! State: `exp_avg`, `exp_avg_sq_row`, `exp_avg_sq_col` (or `exp_avg_sq`),
//! `exp_avg_res_row`, `exp_avg_res_col`. Follows `came-pytorch` 0.1.3.
//! <https://arxiv.org/abs/2307.02047>

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, check_beta, check_not_negative, check_positive};
use crate::factored::Matrices;
use crate::plain::{clip_factor, mix};
use crate::slot::{Buffer, Slot};
use crate::stepper::{Rule, RuleConfig, Stepper};
use crate::table::{GroupDefaults, Table};

/// Options of [`Came`].
///
/// | name | default | meaning | range |
/// |---|---|---|---|
/// | `lr` | 2e-4 | the reference has no default | above 0 |
/// | `eps` | (1e-30, 1e-16) | added to the squares; to the squared differences | above 0 |
/// | `clip_threshold` | 1 | largest root mean square of an update | above 0 |
/// | `betas` | (0.9, 0.999, 0.9999) | | [0, 1) |
/// | `weight_decay` | 0 | (OneTrainer: 0.01) | 0 or more |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CameConfig {
    /// Learning rate.
    pub lr: f64,
    /// Added to the squares, and to the squared differences.
    pub eps: (f64, f64),
    /// Largest root mean square of an update.
    pub clip_threshold: f64,
    /// Decay rates of the first moment, the second, and the instability.
    pub betas: (f64, f64, f64),
    /// Weight decay.
    pub weight_decay: f64,
}

impl Default for CameConfig {
    fn default() -> Self {
        Self {
            lr: 2e-4,
            eps: (1e-30, 1e-16),
            clip_threshold: 1.0,
            betas: (0.9, 0.999, 0.9999),
            weight_decay: 0.0,
        }
    }
}

impl RuleConfig for CameConfig {
    fn validate(&self) -> Result<()> {
        check_positive("lr", self.lr)?;
        check_positive("eps", self.eps.0)?;
        check_positive("eps", self.eps.1)?;
        check_positive("clip_threshold", self.clip_threshold)?;
        check_beta("betas", self.betas.0)?;
        check_beta("betas", self.betas.1)?;
        check_beta("betas", self.betas.2)?;
        check_not_negative("weight_decay", self.weight_decay)
    }

    fn defaults(&self) -> GroupDefaults {
        GroupDefaults {
            lr: self.lr,
            weight_decay: self.weight_decay,
            betas: None,
            eps: None,
        }
    }
}

/// CAME.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use lora_optim::{Came, CameConfig, Optimizer, ParamGroup};
/// let w = Var::ones((3, 2), DType::F32, &Device::Cpu)?;
/// let groups = vec![ParamGroup::new("all", vec![("w".into(), w.clone())])];
/// let mut optimizer = Came::new(groups, CameConfig { lr: 1e-3, ..Default::default() })?;
/// let before = w.sqr()?.sum_all()?.to_scalar::<f32>()?;
/// optimizer.step(&w.as_tensor().sqr()?.sum_all()?.backward()?)?;
/// assert!(w.sqr()?.sum_all()?.to_scalar::<f32>()? < before);
/// # Ok::<(), lora_optim::Error>(())
/// ```
pub type Came = Stepper<CameRule>;

const ROW: usize = 0;
const COL: usize = 1;
const V: usize = 2;
const M: usize = 3;
const RES_ROW: usize = 4;
const RES_COL: usize = 5;

/// The update rule of [`Came`].
#[derive(Debug)]
pub struct CameRule;

impl Rule for CameRule {
    type Config = CameConfig;
    const NAME: &'static str = "CAME";
    const BUFFERS: &'static [&'static str] = &[
        "exp_avg_sq_row",
        "exp_avg_sq_col",
        "exp_avg_sq",
        "exp_avg",
        "exp_avg_res_row",
        "exp_avg_res_col",
    ];

    fn new(_: &CameConfig, _: &Table) -> Result<Self> {
        Ok(Self)
    }

    fn update(&mut self, config: &CameConfig, table: &mut Table) -> Result<()> {
        let numbers = table.per_group(|g, n| (table.rate(g), n.weight_decay));
        table.for_each(|slot| {
            let (lr, decay) = numbers[slot.group];
            match Matrices::of(slot.dims()) {
                matrices if slot.plain => tensor_step(config, lr, decay, matrices, slot),
                Some(matrices) => matrix_step(config, lr, decay, matrices, slot),
                None => vector_step(config, lr, decay, slot),
            }
        })
    }
}

/// Factor that brings the root mean square of the updates under the threshold.
fn clip(config: &CameConfig, squares: f64, len: usize) -> f32 {
    let rms = (squares / len.max(1) as f64).sqrt();
    (1.0 / (rms / config.clip_threshold).max(1.0)) as f32
}

fn matrix_step(
    config: &CameConfig,
    lr: f64,
    decay: f64,
    matrices: Matrices,
    slot: &mut Slot,
) -> Result<()> {
    let (scale, len) = (slot.grad_scale, slot.numel());
    if slot.buffers[M].is_none() {
        slot.buffers[M] = Some(Buffer::F32(vec![0.0; len]));
        for (row, col) in [(ROW, COL), (RES_ROW, RES_COL)] {
            let (rows, cols) = matrices.zeros();
            (slot.buffers[row], slot.buffers[col]) = (Some(rows), Some(cols));
        }
    }
    let (b1, b2, b3) = config.betas;
    let (b1_keep, b1_gain) = (b1 as f32, (1.0 - b1) as f32);
    let (eps1, eps2) = (config.eps.0 as f32, config.eps.1 as f32);
    slot.on_host(|p, g, buffers| {
        let [
            Some(rows),
            Some(cols),
            _,
            Some(m),
            Some(res_rows),
            Some(res_cols),
        ] = buffers
        else {
            return Err(Error::state("CAME's moments are missing"));
        };
        let m = m.f32_mut();
        matrices.update(rows.f32_mut(), cols.f32_mut(), b2, |i| {
            (g[i] * scale) * (g[i] * scale) + eps1
        });
        let mut squares = 0.0f64;
        matrices.for_each(rows.f32(), cols.f32(), |i, f| {
            squares += f64::from(g[i] * scale * f).powi(2)
        });
        let clip = clip(config, squares, len);
        let mut differences = vec![0.0f32; len];
        matrices.for_each(rows.f32(), cols.f32(), |i, f| {
            let u = g[i] * scale * f * clip;
            m[i] = m[i] * b1_keep + u * b1_gain;
            differences[i] = (u - m[i]) * (u - m[i]) + eps2;
        });
        matrices.update(res_rows.f32_mut(), res_cols.f32_mut(), b3, |i| {
            differences[i]
        });
        let keep = (1.0 - lr * decay) as f32;
        matrices.for_each(res_rows.f32(), res_cols.f32(), |i, f| {
            p[i] = p[i] * keep - m[i] * f * lr as f32
        });
        Ok(())
    })
}

fn vector_step(config: &CameConfig, lr: f64, decay: f64, slot: &mut Slot) -> Result<()> {
    let (scale, len) = (slot.grad_scale, slot.numel());
    for i in [V, M] {
        slot.buffers[i].get_or_insert_with(|| Buffer::F32(vec![0.0; len]));
    }
    let (b1, b2, _) = config.betas;
    slot.on_host(|p, g, buffers| {
        let [_, _, Some(v), Some(m), ..] = buffers else {
            return Err(Error::state("CAME's moments are missing"));
        };
        let mut squares = 0.0f64;
        for (v, g) in v.f32_mut().iter_mut().zip(g) {
            let g = g * scale;
            *v = *v * b2 as f32 + (g * g + config.eps.0 as f32) * (1.0 - b2) as f32;
            squares += f64::from(g * (1.0 / v.sqrt())).powi(2);
        }
        let clip = clip(config, squares, len);
        let keep = (1.0 - lr * decay) as f32;
        for ((p, g), (m, v)) in p.iter_mut().zip(g).zip(m.f32_mut().iter_mut().zip(v.f32())) {
            let u = g * scale * (1.0 / v.sqrt()) * clip;
            *m = *m * b1 as f32 + u * (1.0 - b1) as f32;
            *p = *p * keep - *m * lr as f32;
        }
        Ok(())
    })
}

/// Either of the two with whole tensors.
fn tensor_step(
    config: &CameConfig,
    lr: f64,
    decay: f64,
    matrices: Option<Matrices>,
    slot: &mut Slot,
) -> Result<()> {
    let (b1, b2, b3) = config.betas;
    let (p, g) = (slot.weights_tensor(), slot.grad_tensor()?);
    slot.ensure_zeros(M)?;
    let squares = g.sqr()?.affine(1.0, config.eps.0)?;
    let update = match matrices {
        Some(matrices) => factored_tensors(matrices, (ROW, COL), b2, &squares, &g, slot)?,
        None => {
            slot.ensure_zeros(V)?;
            let v = mix(slot.state_tensor(V)?, b2, &squares, 1.0 - b2)?;
            let update = (g * v.sqrt()?.recip()?)?;
            slot.put_state(V, v);
            update
        }
    };
    let update = update.broadcast_mul(&clip_factor(&update, config.clip_threshold)?)?;
    let m = mix(slot.state_tensor(M)?, b1, &update, 1.0 - b1)?;
    let direction = match matrices {
        Some(matrices) => {
            let differences = (update - &m)?.sqr()?.affine(1.0, config.eps.1)?;
            factored_tensors(matrices, (RES_ROW, RES_COL), b3, &differences, &m, slot)?
        }
        None => m.clone(),
    };
    slot.put_state(M, m);
    slot.put_weights(&(p.affine(1.0 - lr * decay, 0.0)? - direction.affine(lr, 0.0)?)?)
}

/// Takes `squares` into the row and column means; returns `values` over their root.
fn factored_tensors(
    matrices: Matrices,
    (row, col): (usize, usize),
    beta: f64,
    squares: &Tensor,
    values: &Tensor,
    slot: &mut Slot,
) -> Result<Tensor> {
    if slot.buffers[row].is_none() {
        let (rows, cols) = matrices.zeros_on(values.device())?;
        slot.put_state(row, rows);
        slot.put_state(col, cols);
    }
    let (rows, cols) = (slot.state_tensor(row)?, slot.state_tensor(col)?);
    let (rows, cols) = matrices.updated(rows, cols, beta, squares)?;
    let result = matrices.normalised(values, &rows, &cols)?;
    slot.put_state(row, rows);
    slot.put_state(col, cols);
    Ok(result.reshape(slot.dims())?)
}
