//! The codes of [`crate::quantize`] with whole tensors, for states on a device.

use candle_core::{D, DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::quantize::{BLOCK, CodeTable};
use crate::slot::Slot;

/// A [`CodeTable`] on a device.
#[derive(Debug, Clone)]
pub(crate) struct TensorTable {
    values: Tensor,
    borders: Tensor,
    signed: bool,
}

impl TensorTable {
    pub(crate) fn new(table: &CodeTable, device: &Device) -> Result<Self> {
        Ok(Self {
            values: Tensor::from_slice(table.values(), 256, device)?,
            borders: Tensor::from_slice(table.borders(), 255, device)?,
            signed: table.is_signed(),
        })
    }

    /// Code of the value 0.
    fn zero(&self) -> u8 {
        if self.signed { 127 } else { 0 }
    }

    /// Codes (u8) and the largest magnitude of each block, both as vectors. As
    /// [`CodeTable::quantize`], but -0 counts as 0.
    pub(crate) fn quantize(&self, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let len = values.elem_count();
        let blocks = in_blocks(&values.flatten_all()?)?;
        let largest = blocks.abs()?.max_keepdim(D::Minus1)?;
        // A block of zeros is divided by 1.
        let divisor = (&largest + largest.eq(0f32)?.to_dtype(DType::F32)?)?;
        let scaled = blocks.broadcast_div(&divisor)?.flatten_all()?;
        // Eight halvings of the borders, as in memory. Codes are counted in f32, which
        // every device can add and cast.
        let borders = self.borders.to_device(values.device())?;
        let mut codes = scaled.zeros_like()?;
        for bit in (0..8).rev() {
            let half = f64::from(1u32 << bit);
            let at = codes.affine(1.0, half - 1.0)?.to_dtype(DType::U32)?;
            let above = borders.index_select(&at, 0)?.lt(&scaled)?;
            codes = (codes + above.to_dtype(DType::F32)?.affine(half, 0.0)?)?;
        }
        if self.signed {
            // A small negative value nearest to 0 keeps its sign.
            let zero = codes.eq(f32::from(self.zero()))?.to_dtype(DType::F32)?;
            codes = (codes - (zero * scaled.lt(0f32)?.to_dtype(DType::F32)?)?)?;
        }
        let codes = codes.to_dtype(DType::U8)?.narrow(0, 0, len)?.contiguous()?;
        Ok((codes, largest.flatten_all()?))
    }

    /// Restores `[len]` values from codes and the blocks' largest magnitudes.
    pub(crate) fn dequantize(&self, codes: &Tensor, largest: &Tensor) -> Result<Tensor> {
        let codes = codes.flatten_all()?;
        let values = self.values.to_device(codes.device())?;
        let values = values.index_select(&codes.to_dtype(DType::U32)?, 0)?;
        let largest = largest.reshape((largest.elem_count(), 1))?;
        let restored = in_blocks(&values)?.broadcast_mul(&largest)?;
        Ok(restored.flatten_all()?.narrow(0, 0, codes.elem_count())?)
    }

    /// Restores a state of `slot` from its buffers, or zeros before the first step.
    pub(crate) fn restore(&self, slot: &Slot, codes: usize, largest: usize) -> Result<Tensor> {
        if slot.buffers[codes].is_none() {
            return Ok(slot
                .var
                .as_detached_tensor()
                .zeros_like()?
                .to_dtype(DType::F32)?);
        }
        let values = self.dequantize(slot.state_tensor(codes)?, slot.state_tensor(largest)?)?;
        Ok(values.reshape(slot.dims())?)
    }
}

/// A vector as rows of one block each, the last filled up with zeros.
fn in_blocks(flat: &Tensor) -> Result<Tensor> {
    let len = flat.elem_count();
    let blocks = len.div_ceil(BLOCK);
    let padded = flat.pad_with_zeros(0, 0, blocks * BLOCK - len)?;
    Ok(padded.reshape((blocks, BLOCK))?)
}

/// One table of each kind on the device of the first parameter that needs them, made once.
pub(crate) fn cached<'a, const N: usize>(
    cache: &'a mut Option<[TensorTable; N]>,
    slots: &[Slot],
    tables: [&CodeTable; N],
) -> Result<Option<&'a [TensorTable; N]>> {
    let Some(slot) = slots.iter().find(|s| s.plain) else {
        return Ok(None);
    };
    if cache.is_none() {
        let mut made = Vec::with_capacity(N);
        for table in tables {
            made.push(TensorTable::new(table, slot.var.device())?);
        }
        *cache = Some(made.try_into().map_err(|_| Error::state("code tables"))?);
    }
    Ok(cache.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::{SIGNED, UNSIGNED};

    /// Values over nine decades of both signs, a block of zeros, and a short last block.
    #[test]
    fn codes_are_those_of_the_fused_path() -> Result<()> {
        let values: Vec<f32> = (0..3 * BLOCK + 77)
            .map(|i| match i / BLOCK {
                1 => 0.0,
                _ => (i as f32 * 0.37).sin() * 10f32.powi(-((i % 9) as i32)),
            })
            .collect();
        for (table, signed) in [(&*SIGNED, true), (&*UNSIGNED, false)] {
            let values: Vec<f32> = values
                .iter()
                .map(|x| if signed { *x } else { x * x })
                .collect();
            let tensors = TensorTable::new(table, &Device::Cpu)?;
            let input = Tensor::from_slice(&values, values.len(), &Device::Cpu)?;
            let (codes, largest) = tensors.quantize(&input)?;
            let restored = tensors.dequantize(&codes, &largest)?.to_vec1::<f32>()?;
            let (codes, largest) = (codes.to_vec1::<u8>()?, largest.to_vec1::<f32>()?);
            for (b, block) in values.chunks(BLOCK).enumerate() {
                let mut expected = vec![0u8; block.len()];
                let mut again = vec![0f32; block.len()];
                assert_eq!(table.quantize(block, &mut expected), largest[b]);
                table.dequantize(&expected, largest[b], &mut again);
                let range = b * BLOCK..b * BLOCK + block.len();
                assert_eq!(codes[range.clone()], expected);
                assert_eq!(restored[range], again);
            }
        }
        Ok(())
    }
}
