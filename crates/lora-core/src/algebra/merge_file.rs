//! Adapters merged into a checkpoint on disk, a few megabytes at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use candle_core::{DType, Tensor};
use rayon::prelude::*;
use safetensors::tensor::Dtype;

use super::Strength;
use super::chunk::{Bytes, Chunk, Product, read_at};
use super::merge_folder::merge_folder;
use super::weights::{Naming, place};
use crate::adapter::Adapter;
use crate::format::{TensorFile, refuse_not_finite, replace_file};
use crate::{AdapterSet, Error, Result};

/// Bytes of one piece of work, as f32.
const PIECE: usize = 1 << 20;
/// Pieces computed between two hand-overs to the writer.
const BATCH: usize = 48;
/// Bytes after which the writer has the system start on the disk.
const SYNC: usize = 192 << 20;

/// How [`merge_into_file`] writes.
#[derive(Debug, Clone, Default)]
pub struct MergeOptions {
    /// Dtype of all float tensors (f16, bf16 or f32); `None` keeps each as it is.
    pub dtype: Option<DType>,
    /// Metadata to add to the checkpoint's own.
    pub metadata: BTreeMap<String, String>,
    /// Go on when some of an adapter's layers do not exist in the checkpoint.
    pub lenient: bool,
}

/// What [`merge_into_file`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MergeReport {
    /// Tensors of the checkpoint that were changed.
    pub changed: usize,
    /// Tensors written in all.
    pub tensors: usize,
    /// Layers, or biases of layers, that the checkpoint does not have.
    pub unmatched: Vec<String>,
}

/// Metadata that tells hashes of the data, wrong after a merge.
const STALE: [&str; 3] = [
    "modelspec.hash_sha256",
    "sshs_model_hash",
    "sshs_legacy_hash",
];

/// Writes `base` with `adapters` added to `output`: a single file in LDM's layout, or a
/// diffusers folder, whose other files are copied.
///
/// `W' = W + sum of multiplier * scale * delta`, summed in f32 and rounded once; deltas
/// that depend on the base (DoRA, OFT, ...) are computed against the unchanged base. The
/// file is read and written a few megabytes at a time. `output` appears when it is
/// complete and on disk (temporary name, sync, rename).
///
/// # Errors
/// [`Error::UnmatchedLayers`] when the checkpoint lacks layers, unless
/// [`MergeOptions::lenient`]; [`Error::ShapeMismatch`]; [`Error::WouldNotBeFinite`] when sums
/// are NaN or too large for the dtype; [`Error::Io`]. `output` is then as it was.
pub fn merge_into_file(
    base: &Path,
    adapters: &[(&AdapterSet, Strength)],
    output: &Path,
    options: &MergeOptions,
) -> Result<MergeReport> {
    if let Some(dtype) = options.dtype.filter(|d| writable(*d).is_none()) {
        return Err(Error::BadValue {
            layer: "merged checkpoint".into(),
            name: "dtype",
            value: format!("{dtype:?}"),
            expected: "expected f16, bf16 or f32",
        });
    }
    if base.is_dir() {
        return merge_folder(base, adapters, output, options);
    }
    let plan = Plan::new(&[(base.to_path_buf(), Naming::Ldm)], adapters, options)?;
    for file in &plan.files {
        file.write(output, options)?;
    }
    Ok(plan.report)
}

fn writable(dtype: DType) -> Option<Dtype> {
    match dtype {
        DType::F16 => Some(Dtype::F16),
        DType::BF16 => Some(Dtype::BF16),
        DType::F32 => Some(Dtype::F32),
        _ => None,
    }
}

/// One layer's adapters with their multipliers.
type Parts = Vec<(Arc<dyn Adapter>, f64)>;

/// What is done to one tensor.
enum Change {
    Weight(Parts),
    Bias(Parts),
}

struct Entry {
    key: String,
    shape: Vec<usize>,
    from: Dtype,
    to: Dtype,
    /// Where in the source file.
    start: u64,
    length: usize,
    change: Option<Change>,
}

pub(crate) struct FilePlan {
    source: TensorFile,
    entries: Vec<Entry>,
}

pub(crate) struct Plan {
    pub(crate) files: Vec<FilePlan>,
    pub(crate) report: MergeReport,
}

impl Plan {
    pub(crate) fn new(
        list: &[(std::path::PathBuf, Naming)],
        adapters: &[(&AdapterSet, Strength)],
        options: &MergeOptions,
    ) -> Result<Self> {
        let mut wanted: BTreeMap<&str, Parts> = BTreeMap::new();
        for (set, strength) in adapters {
            for (layer, adapter) in set.iter() {
                let parts = wanted.entry(layer).or_default();
                let multiplier = strength.of(layer);
                if multiplier != 0.0 {
                    parts.push((adapter.clone(), multiplier));
                }
            }
        }
        let mut missing: BTreeSet<String> = wanted.keys().map(ToString::to_string).collect();
        for (layer, parts) in &wanted {
            if has_bias(parts)? {
                missing.insert(format!("{layer}.bias"));
            }
        }
        let (mut files, mut report) = (Vec::new(), MergeReport::default());
        for (path, naming) in list {
            let source = TensorFile::open(path)?;
            let mut entries = Vec::new();
            for (key, info) in source.header().tensors() {
                let mut change = None;
                if let Some(name) = place(*naming, &key)
                    && let Some((layer, part)) = name.rsplit_once('.')
                    && let Some(parts) = wanted.get(layer)
                {
                    if part == "weight" {
                        missing.remove(layer);
                        for (adapter, _) in parts {
                            adapter.check(layer, &info.shape)?;
                        }
                        change = Some(Change::Weight(parts.clone()));
                    } else {
                        missing.remove(&name);
                        change = has_bias(parts)?.then(|| Change::Bias(parts.clone()));
                    }
                    change = change.filter(|_| !parts.is_empty());
                }
                let float = matches!(
                    info.dtype,
                    Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64
                );
                if change.is_some() && !float {
                    return Err(Error::Malformed {
                        path: path.clone(),
                        reason: format!(
                            "tensor {key} is {:?}; only f16, bf16, f32 and f64 weights can be merged into",
                            info.dtype
                        ),
                    });
                }
                report.changed += usize::from(change.is_some());
                report.tensors += 1;
                let to = options.dtype.and_then(writable).filter(|_| float);
                entries.push(Entry {
                    shape: info.shape.clone(),
                    from: info.dtype,
                    to: to.unwrap_or(info.dtype),
                    start: source.data_start() + info.data_offsets.0 as u64,
                    length: info.data_offsets.1 - info.data_offsets.0,
                    change,
                    key,
                });
            }
            entries.sort_by(|a, b| a.start.cmp(&b.start).then_with(|| a.key.cmp(&b.key)));
            files.push(FilePlan { source, entries });
        }
        report.unmatched = missing.into_iter().collect();
        if report.changed == 0 && !wanted.values().all(Vec::is_empty) {
            return Err(Error::NothingMatched {
                adapter_layers: wanted.len(),
                example: wanted
                    .keys()
                    .next()
                    .map(ToString::to_string)
                    .unwrap_or_default(),
                component: "checkpoint".into(),
            });
        }
        if !report.unmatched.is_empty() && !options.lenient {
            return Err(Error::UnmatchedLayers {
                layers: report.unmatched,
            });
        }
        Ok(Self { files, report })
    }
}

/// Whether any of the adapters changes the bias of a layer that has one.
fn has_bias(parts: &[(Arc<dyn Adapter>, f64)]) -> Result<bool> {
    for (adapter, multiplier) in parts {
        let bias = Tensor::zeros(
            adapter.matrix_dims().0,
            DType::F32,
            &candle_core::Device::Cpu,
        )?;
        if adapter.bias_delta(Some(&bias), *multiplier)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What the writer gets, in file order.
enum Piece {
    Bytes(Bytes),
    /// So many bytes of the source from here, unchanged.
    Copy(u64, u64),
}

impl FilePlan {
    fn header(&self, options: &MergeOptions) -> Vec<u8> {
        let json = |text: &str| serde_json::Value::from(text).to_string();
        let mut metadata = self.source.metadata();
        metadata.retain(|key, _| !STALE.contains(&key.as_str()));
        metadata.extend(options.metadata.clone());
        let mut fields = Vec::new();
        if !metadata.is_empty() {
            let pairs: Vec<String> = metadata
                .iter()
                .map(|(k, v)| format!("{}:{}", json(k), json(v)))
                .collect();
            fields.push(format!("\"__metadata__\":{{{}}}", pairs.join(",")));
        }
        let mut offset = 0;
        for entry in &self.entries {
            let end = offset + entry.output_length();
            fields.push(format!(
                "{}:{{\"dtype\":\"{:?}\",\"shape\":{:?},\"data_offsets\":[{offset},{end}]}}",
                json(&entry.key),
                entry.to,
                entry.shape
            ));
            offset = end;
        }
        let mut text = format!("{{{}}}", fields.join(",")).into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        header
    }

    pub(crate) fn write(&self, output: &Path, options: &MergeOptions) -> Result<()> {
        let path = self.source.path();
        // The tensors are read from the file, not through the map: pages of a map count
        // as this process' memory.
        let source = File::open(path).map_err(Error::io(path))?;
        let header = self.header(options);
        let mut failed = None;
        replace_file(output, |file| {
            file.write_all(&header)?;
            let (send, receive) = sync_channel(2);
            let mut reader = source.try_clone()?;
            std::thread::scope(|scope| {
                let writer = scope.spawn(move || write_pieces(&receive, &mut reader, file));
                let outcome = self.compute(&source, output, &mut |batch| send.send(batch).is_ok());
                drop(send);
                let written = writer.join();
                if let Err(error) = outcome {
                    failed = Some(error);
                    return Err(std::io::Error::other("merging failed"));
                }
                written.unwrap_or_else(|_| Err(std::io::Error::other("the writer stopped")))
            })
        })
        .map_err(|error| failed.take().unwrap_or(error))
    }

    /// Computes all pieces in file order; `send` returns false when nobody wants more.
    fn compute(
        &self,
        source: &File,
        output: &Path,
        send: &mut dyn FnMut(Vec<Piece>) -> bool,
    ) -> Result<()> {
        let mut batch = Vec::with_capacity(BATCH);
        let flush = |batch: &mut Vec<Work<'_>>, send: &mut dyn FnMut(Vec<Piece>) -> bool| {
            let pieces: Result<Vec<Piece>> = std::mem::take(batch)
                .into_par_iter()
                .map(|work| work.run(source, output))
                .collect();
            Ok::<bool, Error>(send(pieces?))
        };
        for entry in &self.entries {
            for work in entry.work()? {
                batch.push(work);
                if batch.len() >= BATCH && !flush(&mut batch, send)? {
                    return Ok(());
                }
            }
        }
        flush(&mut batch, send)?;
        Ok(())
    }
}

/// Writes in order. A second handle has the data brought to the disk meanwhile, so that
/// little is left to wait for at the end.
fn write_pieces(
    pieces: &Receiver<Vec<Piece>>,
    source: &mut File,
    file: &mut File,
) -> std::io::Result<()> {
    let early = file.try_clone()?;
    std::thread::scope(|scope| {
        let (due, wanted) = sync_channel::<()>(1);
        // The system tells an error once per open file: it must not get lost here.
        let syncing = scope.spawn(move || wanted.iter().try_for_each(|()| early.sync_data()));
        let mut written = 0;
        for piece in pieces.iter().flatten() {
            match piece {
                Piece::Bytes(bytes) => {
                    file.write_all(bytes.as_slice())?;
                    written += bytes.as_slice().len();
                }
                Piece::Copy(start, length) => {
                    source.seek(SeekFrom::Start(start))?;
                    let copied = std::io::copy(&mut Read::by_ref(source).take(length), file)?;
                    if copied != length {
                        return Err(std::io::ErrorKind::UnexpectedEof.into());
                    }
                    written += length as usize;
                }
            }
            // Full: it is busy with what came before.
            if written >= SYNC && due.try_send(()).is_ok() {
                written = 0;
            }
        }
        drop(due);
        let stopped = |_| Err(std::io::Error::other("the sync thread stopped"));
        syncing.join().unwrap_or_else(stopped)
    })
}

/// One piece of a tensor, to be computed.
enum Work<'a> {
    Copy(u64, u64),
    Chunk(&'a Entry, Chunk),
    /// A whole tensor whose adapters have no factors to multiply row by row.
    Whole(&'a Entry),
}

impl Work<'_> {
    fn run(self, source: &File, output: &Path) -> Result<Piece> {
        let (entry, bytes) = match self {
            Self::Copy(start, length) => return Ok(Piece::Copy(start, length)),
            Self::Chunk(entry, chunk) => (entry, chunk.run(source)?),
            Self::Whole(entry) => (entry, entry.whole(source)?),
        };
        refuse_not_finite(output, &entry.key, entry.to, bytes.as_slice())?;
        Ok(Piece::Bytes(bytes))
    }
}

impl Entry {
    fn output_length(&self) -> usize {
        match self.from.bitsize() / 8 {
            0 => self.length,
            size => self.length / size * (self.to.bitsize() / 8),
        }
    }

    /// The pieces of work, in order.
    fn work(&self) -> Result<Vec<Work<'_>>> {
        let products = match &self.change {
            None if self.from == self.to => {
                return Ok(vec![Work::Copy(self.start, self.length as u64)]);
            }
            None => Vec::new(),
            Some(Change::Bias(_)) => return Ok(vec![Work::Whole(self)]),
            Some(Change::Weight(parts)) => {
                let mut products = Vec::new();
                for (adapter, multiplier) in parts {
                    match adapter.product()? {
                        Some((up, down)) => {
                            products.push(Arc::new(Product::new(&up, &down, *multiplier)?));
                        }
                        None => return Ok(vec![Work::Whole(self)]),
                    }
                }
                products
            }
        };
        let (rows, columns) = if products.is_empty() {
            (self.shape.iter().product(), 1)
        } else {
            let rows = self.shape.first().copied().unwrap_or(1);
            (rows, self.shape.iter().skip(1).product::<usize>())
        };
        let step = (PIECE / 4 / columns.max(1)).max(1);
        Ok((0..rows)
            .step_by(step)
            .map(|first| {
                let chunk = Chunk {
                    start: self.start,
                    from: self.from,
                    to: self.to,
                    rows: first..(first + step).min(rows),
                    columns,
                    products: products.clone(),
                };
                Work::Chunk(self, chunk)
            })
            .collect())
    }

    fn whole(&self, source: &File) -> Result<Bytes> {
        let chunk = |from, to| Chunk {
            start: self.start,
            from,
            to,
            rows: 0..self.shape.iter().product(),
            columns: 1,
            products: Vec::new(),
        };
        let bytes = read_at(source, self.start, self.length)?;
        let mut values = vec![0f32; self.shape.iter().product()];
        chunk(self.from, Dtype::F32).decode(&bytes, &mut values);
        let base = Tensor::from_vec(values, self.shape.as_slice(), &candle_core::Device::Cpu)?;
        let merged = match &self.change {
            None => base,
            Some(Change::Weight(parts)) => {
                let parts: Vec<(&dyn Adapter, f64)> =
                    parts.iter().map(|(a, m)| (a.as_ref(), *m)).collect();
                crate::merge::merged_weight(&base, &parts)?
            }
            Some(Change::Bias(parts)) => {
                let parts: Vec<(&dyn Adapter, f64)> =
                    parts.iter().map(|(a, m)| (a.as_ref(), *m)).collect();
                crate::merge::merged_bias(Some(&base), &parts)?.unwrap_or(base)
            }
        };
        let values = merged.flatten_all()?.to_vec1::<f32>()?;
        Ok(chunk(Dtype::F32, self.to).encode(&values))
    }
}
