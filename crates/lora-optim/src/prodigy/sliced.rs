//! Prodigy's statistics over every `slice_p`-th value.

use crate::error::{Error, Result};
use crate::lane::TensorLane;
use crate::plain::every;
use crate::prodigy::kernels::Statistics;
use crate::prodigy::{P0, S};
use crate::slot::{Buffer, Slot};

/// The weights as they are, every `stride`-th; one zero for a tensor of zeros.
pub(super) fn start(stride: usize, slot: &Slot) -> Result<Buffer> {
    Ok(match slot.weights()? {
        Buffer::Device(tensor) if stride == 1 => Buffer::Device(tensor),
        Buffer::Device(tensor) => Buffer::Device(every(&tensor, stride)?),
        host if host.f32().iter().all(|x| *x == 0.0) => Buffer::F32(vec![0.0]),
        host if stride == 1 => host,
        host => Buffer::F32(host.f32().iter().copied().step_by(stride).collect()),
    })
}

/// The statistics over every `stride`-th value.
pub(super) fn sliced(stats: &Statistics, stride: usize, slot: &mut Slot) -> Result<[f64; 2]> {
    let scale = slot.grad_scale;
    slot.on_host(|p, g, buffers| {
        let [_, _, Some(s), Some(p0), _] = buffers else {
            return Err(Error::state("s or p0 is missing"));
        };
        let p0 = p0.f32();
        let mut total = [0.0f64; 2];
        let values = p.iter().zip(g).step_by(stride);
        for (i, (s, (p, g))) in s.f32_mut().iter_mut().zip(values).enumerate() {
            let start = if p0.len() == 1 { p0[0] } else { p0[i] };
            let [dot, abs] = stats.sums(s, g * scale + p * stats.coupled, start - p);
            total[0] += f64::from(dot);
            total[1] += f64::from(abs);
        }
        Ok(total)
    })
}

/// The same with whole tensors; the sums stay on the device until all of them come back.
pub(super) fn sliced_tensors(stats: &Statistics, stride: usize, slot: &mut Slot) -> Result<()> {
    let (p, g) = (slot.weights_tensor(), slot.grad_tensor()?);
    let (p, g) = (every(&p, stride)?, every(&g, stride)?);
    let g = if stats.coupled == 0.0 {
        g
    } else {
        (g + p.affine(f64::from(stats.coupled), 0.0)?)?
    };
    let p0 = slot.state_tensor(P0)?.flatten_all()?;
    let displacement = p.neg()?.broadcast_add(&p0)?;
    let mut s = TensorLane::new(slot.state_tensor(S)?.flatten_all()?);
    let sums = stats.sums(&mut s, TensorLane::new(g), TensorLane::new(displacement));
    slot.put_state(S, s.finish()?);
    let mut kept = Vec::with_capacity(sums.len());
    for sum in sums {
        kept.push(sum.finish()?.sum_all()?);
    }
    slot.restore_device_sums(kept);
    Ok(())
}
