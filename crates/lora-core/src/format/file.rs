//! safetensors files: checked reading, sorted and atomic writing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata, TensorView};

use crate::{Error, Result};

/// A memory-mapped safetensors file whose header was checked: offsets lie within
/// the file and fit dtypes and shapes, so nothing in it can cause an allocation
/// beyond the file's size.
///
/// The file must not be changed by another program while it is open.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    header: Metadata,
    data_start: usize,
}

impl TensorFile {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Pickle`] or [`Error::Malformed`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(Error::io(path))?;
        let metadata = file.metadata().map_err(Error::io(path))?;
        let malformed = |reason: String| Error::Malformed {
            path: path.to_path_buf(),
            reason,
        };
        if metadata.is_dir() {
            return Err(malformed("it is a folder".into()));
        }
        if metadata.len() < 8 {
            return Err(malformed(format!("it has only {} bytes", metadata.len())));
        }
        // SAFETY: the map is read-only and private to this process. Undefined
        // behaviour would need another program to shorten the file meanwhile, which
        // the type's documentation rules out; writers of this project replace files
        // by renaming and never change them in place.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        // The first bytes are the header's length, which can be any: only a file that is no
        // safetensors can be a pickle.
        let pickled = map.starts_with(b"PK\x03\x04") || map.starts_with(b"\x80\x02");
        let (length, header) = SafeTensors::read_metadata(&map).map_err(|e| match pickled {
            true => Error::Pickle {
                path: path.to_path_buf(),
            },
            false => malformed(e.to_string()),
        })?;
        let data_start = length + 8;
        Ok(Self {
            path: path.to_path_buf(),
            map,
            header,
            data_start,
        })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.header.tensors().into_keys().collect();
        names.sort();
        names
    }

    /// The free-form metadata of the header, sorted.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.header
            .metadata()
            .iter()
            .flatten()
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect()
    }

    /// Shape of a tensor, if the file has it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.header.info(name).map(|info| info.shape.as_slice())
    }

    /// Dtype of a tensor, if the file has it and candle knows it.
    pub fn dtype(&self, name: &str) -> Option<DType> {
        self.header
            .info(name)
            .and_then(|info| info.dtype.try_into().ok())
    }

    /// Bytes of all tensors, in file order: what `sshs_model_hash` is computed from.
    pub fn data(&self) -> &[u8] {
        &self.map[self.data_start.min(self.map.len())..]
    }

    /// The tensors that hold NaN or infinite values, and how many; in order of names.
    /// Reads every value once, without copying.
    pub fn not_finite(&self) -> Vec<(String, usize)> {
        let count = |name: &String| {
            let info = self.header.info(name)?;
            let (start, end) = info.data_offsets;
            let bytes = self.data().get(start..end)?;
            let count = count_not_finite(info.dtype, bytes);
            (count > 0).then(|| (name.clone(), count))
        };
        self.names().iter().filter_map(count).collect()
    }

    /// The checked header.
    pub(crate) fn header(&self) -> &Metadata {
        &self.header
    }

    /// Where in the file the tensors' bytes begin.
    pub(crate) fn data_start(&self) -> u64 {
        self.data_start as u64
    }

    /// Copies a tensor to `device`, in the dtype of the file.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the file does not have it or its dtype is unknown.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let malformed = |reason: String| Error::Malformed {
            path: self.path.clone(),
            reason,
        };
        let info = self
            .header
            .info(name)
            .ok_or_else(|| malformed(format!("tensor {name} is missing")))?;
        let (start, end) = info.data_offsets;
        let bytes = self
            .data()
            .get(start..end)
            .ok_or_else(|| malformed(format!("tensor {name} is cut off")))?;
        let view = TensorView::new(info.dtype, info.shape.clone(), bytes)
            .map_err(|e| malformed(format!("tensor {name}: {e}")))?;
        view.load(device)
            .map_err(|e| malformed(format!("tensor {name} ({:?}): {e}", info.dtype)))
    }
}

impl TensorFile {
    /// Tells the system that a tensor's bytes are not needed again soon, so that they do
    /// not count as memory of this process; reading them again stays possible. Does
    /// nothing where the system does not offer that.
    pub fn release(&self, name: &str) {
        let Some(info) = self.header.info(name) else {
            return;
        };
        let (start, end) = info.data_offsets;
        if start < end && self.data_start + end <= self.map.len() {
            self.discard(self.data_start + start, end - start);
        }
    }

    #[cfg(target_os = "linux")]
    #[allow(unsafe_code)]
    fn discard(&self, offset: usize, len: usize) {
        // SAFETY: the map is a shared, read-only map of a file: pages that are dropped
        // are read from the file again, with the same bytes, when they are touched.
        let advice = unsafe {
            let drop = memmap2::UncheckedAdvice::DontNeed;
            self.map.unchecked_advise_range(drop, offset, len)
        };
        // It is advice: without it there is only less free memory.
        advice.unwrap_or_default();
    }

    #[cfg(not(target_os = "linux"))]
    fn discard(&self, _: usize, _: usize) {}
}

/// How many little-endian values are NaN or infinite.
pub(crate) fn count_not_finite(dtype: Dtype, bytes: &[u8]) -> usize {
    match dtype {
        Dtype::F16 => odd_words::<2>(bytes, |w| u16::from_le_bytes(w) & 0x7c00 == 0x7c00),
        Dtype::BF16 => odd_words::<2>(bytes, |w| u16::from_le_bytes(w) & 0x7f80 == 0x7f80),
        Dtype::F32 => odd_words::<4>(bytes, |w| {
            u32::from_le_bytes(w) & 0x7f80_0000 == 0x7f80_0000
        }),
        Dtype::F64 => odd_words::<8>(bytes, |w| !f64::from_le_bytes(w).is_finite()),
        _ => 0,
    }
}

/// Refuses bytes of `key` that hold NaN or infinite values, before they are written to `path`.
pub(crate) fn refuse_not_finite(path: &Path, key: &str, dtype: Dtype, bytes: &[u8]) -> Result<()> {
    match count_not_finite(dtype, bytes) {
        0 => Ok(()),
        count => Err(Error::WouldNotBeFinite {
            path: path.to_path_buf(),
            key: key.to_owned(),
            count,
            dtype: format!("{dtype:?}"),
        }),
    }
}

/// How many words of `N` bytes pass a test.
fn odd_words<const N: usize>(bytes: &[u8], odd: impl Fn([u8; N]) -> bool) -> usize {
    bytes
        .as_chunks::<N>()
        .0
        .iter()
        .map(|word| usize::from(odd(*word)))
        .sum()
}

/// Writes a file so that no other program ever sees half of it, and a crash leaves
/// either the old or the new one: temporary file in the same folder, sync, rename.
///
/// # Errors
/// [`Error::Io`]; an existing file is then untouched.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    replace_file(path, |file| {
        let mut buffer = std::io::BufWriter::with_capacity(1 << 20, file);
        write(&mut buffer)?;
        buffer.flush()
    })
}

/// The same for writers that need the file itself.
pub(crate) fn replace_file(
    path: &Path,
    write: impl FnOnce(&mut File) -> std::io::Result<()>,
) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::Builder::new()
        .prefix(".writing-")
        .suffix(".tmp")
        .tempfile_in(folder)
        .map_err(Error::io(path))?;
    write(file.as_file_mut()).map_err(Error::io(path))?;
    file.as_file().sync_all().map_err(Error::io(path))?;
    set_default_permissions(file.as_file(), path)?;
    file.persist(path).map_err(|e| Error::Io {
        path: path.to_path_buf(),
        source: e.error,
    })?;
    // The rename itself reaches the disk with the folder's entry.
    #[cfg(unix)]
    File::open(folder)
        .and_then(|d| d.sync_all())
        .map_err(Error::io(folder))?;
    Ok(())
}

/// Temporary files are private; a result should be readable as any new file is.
#[cfg(unix)]
fn set_default_permissions(file: &File, path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(path).map_or(0o644, |old| old.permissions().mode());
    file.set_permissions(std::fs::Permissions::from_mode(mode))
        .map_err(Error::io(path))
}

#[cfg(not(unix))]
fn set_default_permissions(_: &File, _: &Path) -> Result<()> {
    Ok(())
}

/// A serialised file in two parts: header (with its length) and the order in which
/// the tensors' bytes follow.
pub(crate) struct Layout {
    pub(crate) header: Vec<u8>,
    pub(crate) order: Vec<String>,
}

/// Lays out a file as the reference serialiser does: wider dtypes first, then by
/// name; metadata sorted, so that equal content gives equal bytes.
pub(crate) fn lay_out(
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<Layout> {
    let mut entries = Vec::new();
    for (name, tensor) in tensors {
        entries.push((safetensors_dtype(name, tensor)?, name, tensor));
    }
    entries.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(b.1)));

    let json = |text: &str| serde_json::Value::from(text).to_string();
    let mut fields = Vec::new();
    if !metadata.is_empty() {
        let pairs: Vec<String> = metadata
            .iter()
            .map(|(k, v)| format!("{}:{}", json(k), json(v)))
            .collect();
        fields.push(format!("\"__metadata__\":{{{}}}", pairs.join(",")));
    }
    let mut offset = 0;
    let mut order = Vec::new();
    for (dtype, name, tensor) in entries {
        let end = offset + tensor.elem_count() * tensor.dtype().size_in_bytes();
        let dims: Vec<String> = tensor.dims().iter().map(ToString::to_string).collect();
        fields.push(format!(
            "{}:{{\"dtype\":\"{dtype:?}\",\"shape\":[{}],\"data_offsets\":[{offset},{end}]}}",
            json(name),
            dims.join(",")
        ));
        order.push(name.clone());
        offset = end;
    }
    let mut text = format!("{{{}}}", fields.join(",")).into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    Ok(Layout { header, order })
}

pub(super) fn safetensors_dtype(name: &str, tensor: &Tensor) -> Result<Dtype> {
    Ok(match tensor.dtype() {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::I16 => Dtype::I16,
        DType::U32 => Dtype::U32,
        DType::U8 => Dtype::U8,
        other => {
            return Err(Error::Candle(candle_core::Error::Msg(format!(
                "tensor {name}: cannot be written as {other:?}"
            ))));
        }
    })
}

/// A tensor's values as little-endian bytes.
pub(crate) fn bytes(tensor: &Tensor) -> candle_core::Result<Vec<u8>> {
    macro_rules! le {
        ($type:ty) => {
            tensor
                .flatten_all()?
                .to_vec1::<$type>()?
                .into_iter()
                .flat_map(<$type>::to_le_bytes)
                .collect()
        };
    }
    Ok(match tensor.dtype() {
        DType::F64 => le!(f64),
        DType::F32 => le!(f32),
        DType::F16 => le!(f16),
        DType::BF16 => le!(bf16),
        DType::I64 => le!(i64),
        DType::I32 => le!(i32),
        DType::I16 => le!(i16),
        DType::U32 => le!(u32),
        DType::U8 => le!(u8),
        other => candle_core::bail!("{other:?} cannot be written"),
    })
}

/// Writes tensors and metadata as a safetensors file, atomically; equal content
/// gives equal bytes.
///
/// # Errors
/// [`Error::Io`], or when a dtype cannot be written.
pub fn write_tensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let layout = lay_out(tensors, metadata)?;
    write_atomically(path, |out| {
        out.write_all(&layout.header)?;
        for name in &layout.order {
            out.write_all(&bytes(&tensors[name]).map_err(std::io::Error::other)?)?;
        }
        Ok(())
    })
}
