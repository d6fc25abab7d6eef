//! A run of a tensor's rows: read, widened, changed, narrowed.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use safetensors::tensor::Dtype;

use crate::{Error, Result};

/// A low-rank change of a weight, row-major f32.
pub(crate) struct Product {
    up: Vec<f32>,
    down: Vec<f32>,
    rank: usize,
    multiplier: f32,
}

impl Product {
    pub(crate) fn new(up: &Tensor, down: &Tensor, multiplier: f64) -> Result<Self> {
        Ok(Self {
            rank: up.dim(1)?,
            up: up.flatten_all()?.to_vec1()?,
            down: down.flatten_all()?.to_vec1()?,
            multiplier: multiplier as f32,
        })
    }

    /// Adds the rows `rows` of the change to `values`.
    fn add(&self, values: &mut [f32], rows: &Range<usize>, columns: usize) {
        let up = self.up.get(rows.start * self.rank..rows.end * self.rank);
        let fits = self.down.len() == self.rank * columns && values.len() == rows.len() * columns;
        // Shapes were checked when the merge was planned.
        let (Some(up), true) = (up, fits) else { return };
        matmul(
            MatMut::from_row_major_slice_mut(values, rows.len(), columns),
            Accum::Add,
            MatRef::from_row_major_slice(up, rows.len(), self.rank),
            MatRef::from_row_major_slice(&self.down, self.rank, columns),
            self.multiplier,
            Par::Seq,
        );
    }
}

/// Rows of one tensor, and the changes to add to them.
pub(crate) struct Chunk {
    /// Where in the source file the tensor begins.
    pub(crate) start: u64,
    pub(crate) from: Dtype,
    pub(crate) to: Dtype,
    pub(crate) rows: Range<usize>,
    pub(crate) columns: usize,
    pub(crate) products: Vec<Arc<Product>>,
}

impl Chunk {
    /// The bytes to write.
    pub(crate) fn run(&self, source: &File) -> Result<Vec<u8>> {
        let row = self.columns * self.from.bitsize() / 8;
        let start = self.start + (self.rows.start * row) as u64;
        let bytes = read_at(source, start, self.rows.len() * row)?;
        let mut values = self.decode(bytes);
        for product in &self.products {
            product.add(&mut values, &self.rows, self.columns);
        }
        Ok(self.encode(&values))
    }

    /// Values of `from` bytes as f32.
    pub(crate) fn decode(&self, bytes: Vec<u8>) -> Vec<f32> {
        let size = (self.from.bitsize() / 8).max(1);
        let mut values = vec![0f32; bytes.len() / size];
        match self.from {
            Dtype::F16 => halves(&bytes)
                .reinterpret_cast::<f16>()
                .convert_to_f32_slice(&mut values),
            Dtype::BF16 => halves(&bytes)
                .reinterpret_cast::<bf16>()
                .convert_to_f32_slice(&mut values),
            Dtype::F64 => {
                for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<8>().0) {
                    *value = f64::from_le_bytes(*bytes) as f32;
                }
            }
            _ => {
                for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*bytes);
                }
            }
        }
        values
    }

    /// Values as `to` bytes, rounded to nearest.
    pub(crate) fn encode(&self, values: &[f32]) -> Vec<u8> {
        match self.to {
            Dtype::F16 => {
                let mut bytes = vec![0u16; values.len()];
                bytes
                    .reinterpret_cast_mut::<f16>()
                    .convert_from_f32_slice(values);
                little(&bytes)
            }
            Dtype::BF16 => {
                let mut bytes = vec![0u16; values.len()];
                bytes
                    .reinterpret_cast_mut::<bf16>()
                    .convert_from_f32_slice(values);
                little(&bytes)
            }
            Dtype::F64 => values
                .iter()
                .flat_map(|v| f64::from(*v).to_le_bytes())
                .collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }
}

/// 16-bit numbers from little-endian bytes.
fn halves(bytes: &[u8]) -> Vec<u16> {
    let pairs = bytes.as_chunks::<2>().0;
    pairs.iter().map(|pair| u16::from_le_bytes(*pair)).collect()
}

fn little(halves: &[u16]) -> Vec<u8> {
    if cfg!(target_endian = "little") {
        return bytemuck::cast_slice(halves).to_vec();
    }
    halves.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Reads a part of a file without moving its position.
pub(crate) fn read_at(file: &File, start: u64, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    read_exact_at(file, &mut bytes, start).map_err(Error::io("checkpoint"))?;
    Ok(bytes)
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], start: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, start)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut start: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, start)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => {
                bytes = &mut bytes[n..];
                start += n as u64;
            }
        }
    }
    Ok(())
}
