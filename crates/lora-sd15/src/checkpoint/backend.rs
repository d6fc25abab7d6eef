//! Where a `VarBuilder` takes a model's tensors from.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

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

/// Tensors of one part, read from the mapped files when asked for.
pub(super) struct PartBackend {
    pub(super) inner: Arc<Inner>,
    pub(super) part: Part,
    /// Overrides the dtype that is asked for.
    pub(super) storage: Option<WeightStorage>,
}

impl PartBackend {
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

    fn dtype(&self, name: &str, tensor: &Tensor, asked: DType) -> DType {
        match self.storage {
            Some(storage) => storage.dtype(name, tensor.rank(), tensor.dtype()),
            None => asked,
        }
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
        let tensor = self.load(name, device)?;
        if !same_shape(tensor.dims(), shape.dims()) {
            return Err(candle_core::Error::UnexpectedShape {
                msg: format!("shape mismatch for {name}"),
                expected: shape,
                got: tensor.shape().clone(),
            });
        }
        let dtype = self.dtype(name, &tensor, dtype);
        tensor.reshape(shape)?.to_dtype(dtype)
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let tensor = self.load(name, device)?;
        let dtype = self.dtype(name, &tensor, dtype);
        tensor.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.inner
            .places
            .contains_key(&(self.part, name.to_string()))
    }
}
