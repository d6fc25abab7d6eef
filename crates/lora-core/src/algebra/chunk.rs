//! A run of a tensor's rows: read, widened, changed, narrowed.

use std::cell::RefCell;
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

/// What is written to the file.
pub(crate) enum Bytes {
    Plain(Vec<u8>),
    /// 16-bit numbers in the file's byte order.
    Halves(Vec<u16>),
}

impl Bytes {
    pub(crate) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Plain(bytes) => bytes,
            Self::Halves(halves) => bytemuck::cast_slice(halves),
        }
    }
}

thread_local! {
    /// Large allocations are given back to the system and cleared anew each time: one
    /// buffer per thread for the f32 values.
    static VALUES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Chunk {
    /// The bytes to write.
    pub(crate) fn run(&self, source: &File) -> Result<Bytes> {
        let row = self.columns * self.from.bitsize() / 8;
        let start = self.start + (self.rows.start * row) as u64;
        let count = self.rows.len() * self.columns;
        VALUES.with_borrow_mut(|values| {
            values.resize(count, 0.0);
            let same_size = self.from.bitsize() == 16 && self.to.bitsize() == 16;
            if !same_size {
                self.decode(&read_at(source, start, self.rows.len() * row)?, values);
                self.add(values);
                return Ok(self.encode(values));
            }
            let mut halves = vec![0u16; count];
            read_exact_at(source, bytemuck::cast_slice_mut(&mut halves), start)
                .map_err(Error::io("checkpoint"))?;
            swap(&mut halves);
            widen(self.from, &halves, values);
            self.add(values);
            narrow(self.to, values, &mut halves);
            Ok(Bytes::Halves(halves))
        })
    }

    fn add(&self, values: &mut [f32]) {
        for product in &self.products {
            product.add(values, &self.rows, self.columns);
        }
    }

    /// Values of `from` bytes as f32, as many as fit.
    pub(crate) fn decode(&self, bytes: &[u8], values: &mut [f32]) {
        match self.from {
            Dtype::F16 | Dtype::BF16 => {
                let pairs = bytes.as_chunks::<2>().0;
                let halves: Vec<u16> = pairs.iter().map(|p| u16::from_le_bytes(*p)).collect();
                widen(self.from, &halves, values);
            }
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
    }

    /// Values as `to` bytes, rounded to nearest.
    pub(crate) fn encode(&self, values: &[f32]) -> Bytes {
        match self.to {
            Dtype::F16 | Dtype::BF16 => {
                let mut halves = vec![0u16; values.len()];
                narrow(self.to, values, &mut halves);
                Bytes::Halves(halves)
            }
            Dtype::F64 => {
                let bytes = values.iter().flat_map(|v| f64::from(*v).to_le_bytes());
                Bytes::Plain(bytes.collect())
            }
            _ => Bytes::Plain(values.iter().flat_map(|v| v.to_le_bytes()).collect()),
        }
    }
}

/// f16 or bf16 numbers in this machine's byte order as f32; both of one length.
fn widen(from: Dtype, halves: &[u16], values: &mut [f32]) {
    let count = halves.len().min(values.len());
    let (halves, values) = (&halves[..count], &mut values[..count]);
    match from {
        Dtype::BF16 => halves
            .reinterpret_cast::<bf16>()
            .convert_to_f32_slice(values),
        _ => halves
            .reinterpret_cast::<f16>()
            .convert_to_f32_slice(values),
    }
}

/// f32 as f16 or bf16 numbers in the file's byte order; both of one length.
fn narrow(to: Dtype, values: &[f32], halves: &mut [u16]) {
    match to {
        Dtype::BF16 => halves
            .reinterpret_cast_mut::<bf16>()
            .convert_from_f32_slice(values),
        _ => halves
            .reinterpret_cast_mut::<f16>()
            .convert_from_f32_slice(values),
    }
    swap(halves);
}

/// Between the file's byte order and this machine's.
fn swap(halves: &mut [u16]) {
    if cfg!(target_endian = "big") {
        halves.iter_mut().for_each(|h| *h = h.swap_bytes());
    }
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
