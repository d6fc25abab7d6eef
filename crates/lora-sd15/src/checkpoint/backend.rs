//! Where a `VarBuilder` takes a model's tensors from.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;

use super::{Inner, Part, WeightStorage, same_shape};

/// Notes what is asked for and returns shapes without memory.
pub(super) struct Recorder(pub(super) Arc<Mutex<BTreeMap<String, Vec<usize>>>>);

impl SimpleBackend for Recorder {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let mut asked = self.0.lock().unwrap_or_else(|e| e.into_inner());
        asked.insert(name.to_string(), shape.dims().to_vec());
        Tensor::zeros((), dtype, device)?.broadcast_as(shape)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("{name}: asked for without a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

/// Tensors of one part, read from the mapped files when the first is asked for.
pub(super) struct PartBackend {
    pub(super) inner: Arc<Inner>,
    pub(super) part: Part,
    /// Overrides the dtype that is asked for.
    pub(super) storage: Option<WeightStorage>,
    /// What was read and not yet asked for.
    pub(super) read: OnceLock<Mutex<BTreeMap<String, Tensor>>>,
}

impl PartBackend {
    /// A tensor in the dtype it is to be kept in; handed out once, so that memory is not
    /// held twice.
    fn tensor(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        if device.is_cpu() {
            let read = self.read.get_or_init(|| Mutex::new(self.read_all(dtype)));
            let mut read = read.lock().unwrap_or_else(PoisonError::into_inner);
            // The first one asked for decided the dtype of all.
            let suits = |tensor: &Tensor| self.storage.is_some() || tensor.dtype() == dtype;
            if let Some(tensor) = read.remove(name).filter(suits) {
                return Ok(tensor);
            }
        }
        self.converted(name, dtype, device)
    }

    fn converted(&self, name: &str, asked: DType, device: &Device) -> candle_core::Result<Tensor> {
        let tensor = self.load(name, device)?;
        let dtype = match self.storage {
            Some(storage) => storage.dtype(name, tensor.rank(), tensor.dtype()),
            None => asked,
        };
        tensor.to_dtype(dtype)
    }

    /// All tensors of the part, read by several threads: most of the time goes into the
    /// system's handing out memory, page by page. What cannot be read is left out and gives
    /// its error when it is asked for.
    fn read_all(&self, dtype: DType) -> BTreeMap<String, Tensor> {
        let places = self.inner.places.keys();
        let names: Vec<&String> = places
            .filter(|(part, _)| *part == self.part)
            .map(|(_, name)| name)
            .collect();
        let (next, read) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
        let reader = || {
            while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Ok(tensor) = self.converted(name, dtype, &Device::Cpu) {
                    let mut read = read.lock().unwrap_or_else(PoisonError::into_inner);
                    read.insert((*name).clone(), tensor);
                }
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for _ in 1..threads.min(8) {
                scope.spawn(reader);
            }
            reader();
        });
        read.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn load(&self, name: &str, device: &Device) -> candle_core::Result<Tensor> {
        let place = self
            .inner
            .places
            .get(&(self.part, name.to_string()))
            .ok_or_else(|| candle_core::Error::CannotFindTensor {
                path: name.to_string(),
            })?;
        let file = &self.inner.files[place.file];
        let tensor = file
            .tensor(&place.key, device)
            .map_err(candle_core::Error::wrap)?;
        // The copy is all that is needed: the mapped pages would double its memory.
        file.release(&place.key);
        Ok(tensor)
    }
}

impl SimpleBackend for PartBackend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let tensor = self.tensor(name, dtype, device)?;
        if !same_shape(tensor.dims(), shape.dims()) {
            return Err(candle_core::Error::UnexpectedShape {
                msg: format!("shape mismatch for {name}"),
                expected: shape,
                got: tensor.shape().clone(),
            });
        }
        tensor.reshape(shape)
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        self.tensor(name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.inner
            .places
            .contains_key(&(self.part, name.to_string()))
    }
}
