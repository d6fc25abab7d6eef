//! The tensors of one layer in a file, on their way to becoming an adapter.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::{FAMILIES, beside};
use crate::adapter::Adapter;
use crate::{Error, Result};

/// The tensors of one layer, by suffix. What a family takes is consumed; what is left over
/// is reported.
#[derive(Debug, Default)]
pub(crate) struct Parts<'a> {
    pub(crate) layer: &'a str,
    pub(crate) tensors: BTreeMap<String, Tensor>,
    /// Whether the keys begin with the prefix of sd-scripts' `networks.oft`.
    pub(crate) kohya_oft: bool,
    /// Block size, where the file's metadata say that DyLoRA trained it.
    pub(crate) dylora_block: Option<usize>,
    /// Remarks on keys that mean nothing or that are missing without harm.
    notes: Vec<Note>,
}

/// A remark on a part of a layer that does not stop it from being read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Note {
    pub(crate) part: String,
    pub(crate) missing: bool,
    pub(crate) text: String,
}

/// What reading one layer gave.
pub(crate) struct Outcome {
    pub(crate) adapter: Result<Arc<dyn Adapter>>,
    /// Parts that no family understands.
    pub(crate) unknown: Vec<String>,
    pub(crate) notes: Vec<Note>,
}

impl<'a> Parts<'a> {
    pub(crate) fn new(layer: &'a str, tensors: BTreeMap<String, Tensor>) -> Self {
        Self {
            layer,
            tensors,
            ..Self::default()
        }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub(crate) fn take(&mut self, name: &str) -> Option<Tensor> {
        self.tensors.remove(name)
    }

    /// How many axes a tensor has.
    pub(crate) fn axes(&self, name: &str) -> Option<usize> {
        self.tensors.get(name).map(Tensor::rank)
    }

    pub(crate) fn require(&mut self, name: &'static str) -> Result<Tensor> {
        self.take(name).ok_or_else(|| self.missing(name))
    }

    pub(crate) fn missing(&self, missing: &'static str) -> Error {
        Error::MissingPart {
            path: Path::new("").to_path_buf(),
            layer: self.layer.to_string(),
            missing,
        }
    }

    pub(crate) fn mismatch(&self, part: &str, expected: impl Into<String>, got: &Tensor) -> Error {
        Error::ShapeMismatch {
            layer: self.layer.to_string(),
            tensor: part.to_string(),
            expected: expected.into(),
            got: got.dims().to_vec(),
        }
    }

    /// Drops a part that means nothing here, with a remark.
    pub(crate) fn ignore(&mut self, name: &str, why: &str) {
        if self.take(name).is_some() {
            self.note(name, false, why);
        }
    }

    pub(crate) fn note(&mut self, part: &str, missing: bool, text: impl Into<String>) {
        self.notes.push(Note {
            part: part.to_string(),
            missing,
            text: text.into(),
        });
    }

    /// `alpha`, a single number above 0; absent means scale 1, that is `rank`. A `scale`
    /// beside it, of some programs, is used instead of `alpha / rank`.
    pub(crate) fn take_alpha(&mut self, rank: usize) -> Result<f64> {
        let alpha = self.take_number("alpha")?;
        if let Some(scale) = self.take_number("scale")? {
            self.note("scale", false, "used instead of alpha / rank");
            return Ok(scale * rank as f64);
        }
        match alpha {
            Some(alpha) if alpha > 0.0 => Ok(alpha),
            Some(alpha) => Err(self.bad_value("alpha", alpha, "expected a number above 0")),
            None => {
                self.note("alpha", true, "no alpha: the scale is 1");
                Ok(rank as f64)
            }
        }
    }

    /// `alpha` where it is a constraint; absent or 0 means none.
    pub(crate) fn take_constraint(&mut self) -> Result<f64> {
        let constraint = self.take_number("alpha")?.unwrap_or(0.0);
        if constraint < 0.0 {
            return Err(self.bad_value("alpha", constraint, "expected a constraint of 0 or more"));
        }
        Ok(constraint)
    }

    /// `scalar`, a factor on the whole change that some trainers leave beside the others.
    pub(crate) fn take_scalar(&mut self) -> Result<Option<f64>> {
        let scalar = self.take_number("scalar")?;
        if scalar.is_some() {
            self.note("scalar", false, "multiplied into a factor, as in training");
        }
        Ok(scalar)
    }

    /// A finite number stored as a tensor of one element.
    pub(crate) fn take_number(&mut self, name: &'static str) -> Result<Option<f64>> {
        let Some(tensor) = self.take(name) else {
            return Ok(None);
        };
        if tensor.elem_count() != 1 {
            return Err(self.mismatch(name, "a single number", &tensor));
        }
        let number = tensor
            .flatten_all()?
            .to_dtype(DType::F64)?
            .get(0)?
            .to_scalar::<f64>()?;
        if !number.is_finite() {
            return Err(self.bad_value(name, number, "expected a finite number"));
        }
        Ok(Some(number))
    }

    /// Whole numbers of at least 0, stored in any dtype, and their shape.
    pub(crate) fn take_sizes(&mut self, name: &'static str) -> Result<Option<Vec<Vec<usize>>>> {
        let Some(tensor) = self.take(name) else {
            return Ok(None);
        };
        let rows = match *tensor.dims() {
            [_] => tensor.unsqueeze(0)?,
            [_, _] => tensor.clone(),
            _ => return Err(self.mismatch(name, "rows of whole numbers", &tensor)),
        };
        let rows: Vec<Vec<f64>> = rows.to_dtype(DType::F64)?.to_vec2()?;
        let whole = |v: f64| (v >= 0.0 && v.fract() == 0.0 && v < 1e9).then_some(v as usize);
        let rows = rows
            .into_iter()
            .map(|row| {
                let number = |v| {
                    whole(v).ok_or_else(|| {
                        self.bad_value(name, v, "expected whole numbers of at least 0")
                    })
                };
                row.into_iter().map(number).collect()
            })
            .collect::<Result<Vec<Vec<usize>>>>()?;
        Ok(Some(rows))
    }

    pub(crate) fn bad_value(
        &self,
        name: &'static str,
        value: f64,
        expected: &'static str,
    ) -> Error {
        Error::BadValue {
            layer: self.layer.to_string(),
            name,
            value: value.to_string(),
            expected,
        }
    }

    /// Builds the adapter; parts that nobody understands are named in the outcome.
    pub(crate) fn read(mut self) -> Outcome {
        let adapter = self.adapter();
        let unknown = match &adapter {
            // A broken family leaves parts that it would have understood.
            Err(_) => Vec::new(),
            Ok(_) => std::mem::take(&mut self.tensors).into_keys().collect(),
        };
        Outcome {
            adapter,
            unknown,
            notes: self.notes,
        }
    }

    fn adapter(&mut self) -> Result<Arc<dyn Adapter>> {
        let Some(entry) = FAMILIES.iter().find(|e| (e.detect)(self)) else {
            return Err(Error::UnknownKeys {
                path: Path::new("").to_path_buf(),
                layer: self.layer.to_string(),
                keys: std::mem::take(&mut self.tensors).into_keys().collect(),
            });
        };
        let adapter = beside::with_residual((entry.read)(self)?, self)?;
        beside::with_bias(adapter, self)
    }
}
