//! All adapters of one file or one training run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;

use crate::adapter::{Adapter, Family, Reading};
use crate::control::Control;
use crate::format::{self, LoadOptions, SaveOptions};
use crate::layer::{Adaptable, Attachment};
use crate::merge;
use crate::{Component, Dropout, Error, Result};

/// An ordered map from layer names, as files spell them, to adapters.
///
/// Clones share the factors, multipliers and dropout state.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder};
/// use lora_core::{AdapterConfig, AdapterSet, Adaptable, Component, Layer, Targets};
/// use rand::SeedableRng;
///
/// struct Model { fc: Layer }
/// impl Adaptable for Model {
///     fn component(&self) -> Component { Component::Custom("lora_model".into()) }
///     fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut Layer) -> lora_core::Result<()>) -> lora_core::Result<()> {
///         visit(&mut self.fc)
///     }
/// }
///
/// let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
/// let mut model = Model { fc: Layer::linear(8, 8, vb.pp("fc"))? };
/// let mut rng = rand_chacha::ChaCha12Rng::seed_from_u64(1);
/// let mut set = AdapterSet::create(&mut model, &AdapterConfig::default(), &Targets::new(&["fc"])?, &mut rng)?;
/// set.attach(&mut model, 1.0)?;
/// assert_eq!(set.names().collect::<Vec<_>>(), ["lora_model_fc"]);
/// assert_eq!(set.parameter_count(), 4 * (8 + 8));
/// let y = model.fc.forward(&Tensor::ones((1, 8), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(y.sum_all()?.to_scalar::<f32>()?, 0.0); // a fresh adapter changes nothing
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct AdapterSet {
    entries: BTreeMap<String, Arc<dyn Adapter>>,
    /// Embeddings that came with the file, by full key.
    bundled: BTreeMap<String, Tensor>,
    metadata: BTreeMap<String, String>,
    pub(crate) dropout: Dropout,
    /// The file it was read from.
    origin: Option<PathBuf>,
    left_out: Vec<String>,
    controls: BTreeMap<Component, Arc<Control>>,
}

/// What [`AdapterSet::attach`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttachReport {
    /// How many layers carry an adapter now.
    pub attached: usize,
    /// Names of this component's adapters that the model has no layer for.
    pub unmatched: Vec<String>,
}

impl AttachReport {
    /// Turns leftovers into an error, for callers that want none.
    ///
    /// # Errors
    /// [`Error::UnmatchedLayers`].
    pub fn strict(self) -> Result<Self> {
        if self.unmatched.is_empty() {
            Ok(self)
        } else {
            Err(Error::UnmatchedLayers {
                layers: self.unmatched,
            })
        }
    }
}

impl AdapterSet {
    /// Reads an adapter file, detecting its format. Anything that is not understood is an
    /// error; [`load_with`](Self::load_with) can be lenient.
    ///
    /// # Errors
    /// When the file is not an adapter, damaged, or in a format that is not
    /// supported; the error says which.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        Self::load_with(path, device, &LoadOptions::default())
    }

    /// Reads an adapter file as `options` say. [`FileReport`](crate::format::FileReport)
    /// tells what is in a file without loading it.
    ///
    /// # Errors
    /// As [`load`](Self::load); lenient reading fails on files that are no adapter, or not
    /// for this architecture, only.
    pub fn load_with(
        path: impl AsRef<Path>,
        device: &Device,
        options: &LoadOptions,
    ) -> Result<Self> {
        format::load(path.as_ref(), device, options)
    }

    /// Reads what a file consists of, not its numbers: families, ranks, alphas, shapes and
    /// metadata are right, the factors are zeros that take no memory. For listings; takes
    /// milliseconds whatever the file's size.
    ///
    /// # Errors
    /// As [`load`](Self::load), values that are no numbers apart.
    pub fn outline(path: impl AsRef<Path>) -> Result<Self> {
        format::outline(path.as_ref())
    }

    /// An empty set that remembers where it comes from.
    pub(crate) fn from_file(path: &Path, metadata: BTreeMap<String, String>) -> Self {
        Self {
            origin: Some(path.to_path_buf()),
            metadata,
            ..Self::default()
        }
    }

    /// What the adapter is called: its title, or the name of its file.
    pub(crate) fn title(&self) -> Option<String> {
        let title = self.metadata.get("modelspec.title").cloned();
        let file = || Some(self.origin.as_ref()?.file_stem()?.to_str()?.to_string());
        title.filter(|title| !title.is_empty()).or_else(file)
    }

    pub(crate) fn with_left_out(self, left_out: Vec<String>) -> Self {
        Self { left_out, ..self }
    }

    /// What [lenient](crate::format::Strictness::Lenient) reading left out of the file, one
    /// message for each layer and key.
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    /// An error about one of the adapters, with the file that it came from.
    fn blame(&self, error: Error) -> Error {
        match &self.origin {
            Some(path) => error.in_file(path),
            None => error,
        }
    }

    /// Writes the adapter as a safetensors file, in kohya's layout unless `options` say
    /// otherwise: temporary file, sync, rename. Returns the hash of the tensor data
    /// (`sshs_model_hash`).
    ///
    /// # Errors
    /// When a tensor cannot be read or the file not be written; an existing file is
    /// then still whole. [`Error::NotWritable`] when the layout has no way to write a
    /// layer's adapter; [`Error::WouldNotBeFinite`] for NaN, or values beyond the dtype's.
    pub fn save(&self, path: impl AsRef<Path>, options: &SaveOptions) -> Result<String> {
        format::save(self, path.as_ref(), options)
    }

    /// Adds or replaces one layer's adapter. `name` is the layer's name as files
    /// spell it, see [`Component::layer_name`].
    pub fn insert(&mut self, name: impl Into<String>, adapter: Arc<dyn Adapter>) {
        self.entries.insert(name.into(), adapter);
    }

    /// Keeps an embedding that came with the file, by its full key.
    pub(crate) fn insert_bundled(&mut self, key: String, tensor: Tensor) {
        self.bundled.insert(key, tensor);
    }

    /// Embeddings bundled with the adapter: name and the key inside the embedding
    /// (`style.string_to_param.*`), and the tensor. They are written back when the set is
    /// saved.
    pub fn bundled_embeddings(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.bundled
            .iter()
            .map(|(key, t)| (key.strip_prefix(format::BUNDLE).unwrap_or(key), t))
    }

    /// Takes the bundled embeddings out, by their full keys, for layouts that have no place
    /// for them.
    pub fn take_embeddings(&mut self) -> BTreeMap<String, Tensor> {
        std::mem::take(&mut self.bundled)
    }

    /// Keeps the adapters whose layer name passes the test.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.entries.retain(|name, _| keep(name));
    }

    /// Takes over another set's adapters, for example the text encoder's.
    pub fn extend(&mut self, other: Self) {
        if self.origin != other.origin {
            // No one file is to blame any more.
            self.origin = None;
        }
        self.entries.extend(other.entries);
        self.bundled.extend(other.bundled);
        self.metadata.extend(other.metadata);
    }

    /// The layer names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Layer names and adapters, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Arc<dyn Adapter>)> {
        self.entries
            .iter()
            .map(|(name, adapter)| (name.as_str(), adapter))
    }

    /// The adapter of one layer.
    pub fn get(&self, name: &str) -> Option<&Arc<dyn Adapter>> {
        self.entries.get(name)
    }

    /// How many layers have an adapter.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many layers of one component have an adapter.
    pub fn count(&self, component: &Component) -> usize {
        self.entries
            .keys()
            .filter(|name| component.owns(name))
            .count()
    }

    /// The file's metadata (`ss_*`, `modelspec.*`), sorted.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The metadata, to change it.
    pub fn metadata_mut(&mut self) -> &mut BTreeMap<String, String> {
        &mut self.metadata
    }

    /// Attaches the adapters of the model's component at `multiplier` (1 = as
    /// trained). Attaching again replaces what this set attached before.
    ///
    /// # Errors
    /// [`Error::NothingMatched`] when the set has adapters for this component and the
    /// model none of their layers; [`Error::ShapeMismatch`] when one does not fit. The
    /// model is then left without this set's adapters.
    pub fn attach(&mut self, model: &mut dyn Adaptable, multiplier: f64) -> Result<AttachReport> {
        self.detach(model)?;
        let component = model.component();
        let control = self.control(&component, multiplier);
        let mut rest: BTreeMap<&str, &Arc<dyn Adapter>> = self
            .entries
            .iter()
            .filter(|(n, _)| component.owns(n))
            .map(|(n, a)| (n.as_str(), a))
            .collect();
        let total = rest.len();
        let first = rest
            .keys()
            .next()
            .map(ToString::to_string)
            .unwrap_or_default();
        let mut attached = 0;
        let outcome = model.visit_layers(&mut |layer| {
            let name = component.layer_name(layer.path());
            if let Some(adapter) = rest.remove(name.as_str()) {
                let fits = adapter.check(&name, layer.base().weight.dims());
                fits.map_err(|e| self.blame(e))?;
                let (name, adapter) = (Arc::from(name), adapter.clone());
                layer.attach(Attachment {
                    name,
                    adapter,
                    control: control.clone(),
                });
                attached += 1;
            }
            Ok(())
        });
        let unmatched: Vec<String> = rest.keys().map(ToString::to_string).collect();
        if let Err(error) = outcome {
            self.detach(model)?;
            return Err(error);
        }
        if attached == 0 && total > 0 {
            return Err(Error::NothingMatched {
                adapter_layers: total,
                example: first,
                component: component.to_string(),
            });
        }
        Ok(AttachReport {
            attached,
            unmatched,
        })
    }

    fn control(&mut self, component: &Component, multiplier: f64) -> Arc<Control> {
        let control = self
            .controls
            .entry(component.clone())
            .or_insert_with(|| Arc::new(Control::new(multiplier)));
        control.set_multiplier(multiplier);
        control.clone()
    }

    /// Removes what this set attached; the model computes what it did before, to the
    /// bit.
    ///
    /// # Errors
    /// When the model's visitor fails.
    pub fn detach(&self, model: &mut dyn Adaptable) -> Result<()> {
        let Some(control) = self.controls.get(&model.component()) else {
            return Ok(());
        };
        model.visit_layers(&mut |layer| {
            layer.detach(control);
            Ok(())
        })
    }

    /// Changes the multiplier of attached adapters, between two images for example.
    pub fn set_multiplier(&self, component: &Component, multiplier: f64) {
        if let Some(control) = self.controls.get(component) {
            control.set_multiplier(multiplier);
        }
    }

    /// Starts a training step: dropout masks are functions of (seed, layer), so that
    /// recomputing a layer sees the same. Without this call there is no dropout.
    pub fn begin_step(&self, seed: u64) {
        for control in self.controls.values() {
            control.set_step(Some((seed, self.dropout)));
        }
    }

    /// Ends training: dropout is off until the next [`begin_step`](Self::begin_step).
    pub fn end_training(&self) {
        for control in self.controls.values() {
            control.set_step(None);
        }
    }

    /// The trainable factors, named `LAYER.SUFFIX`, sorted by layer.
    pub fn params(&self) -> Vec<(String, Var)> {
        let of = |(name, adapter): (&String, &Arc<dyn Adapter>)| {
            let name = name.clone();
            adapter
                .vars()
                .into_iter()
                .map(move |(suffix, var)| (format!("{name}.{suffix}"), var))
        };
        self.entries.iter().flat_map(of).collect()
    }

    /// Chooses among the meanings that programs give to some families' files. Attach the
    /// set anew afterwards: layers keep the reading that they were attached with.
    pub fn set_reading(&mut self, reading: &Reading) {
        for adapter in self.entries.values_mut() {
            if let Some(other) = adapter.read_as(reading) {
                *adapter = other;
            }
        }
    }

    /// Number of values in all factors, `alpha` not counted.
    pub fn parameter_count(&self) -> usize {
        self.entries.values().map(|a| a.parameter_count()).sum()
    }

    /// The same adapters with factors that record gradients, to train them further.
    ///
    /// # Errors
    /// When factors cannot be copied.
    pub fn trainable(&self) -> Result<Self> {
        let mut set = Self {
            bundled: self.bundled.clone(),
            metadata: self.metadata.clone(),
            origin: self.origin.clone(),
            dropout: self.dropout,
            ..Self::default()
        };
        for (name, adapter) in &self.entries {
            set.insert(name.clone(), adapter.trainable()?);
        }
        Ok(set)
    }

    /// The same adapters over the same values, without gradients: attached in place of these,
    /// they compute the same, follow every change of the variables, and leave no graph behind.
    ///
    /// # Errors
    /// Those of [`Adapter::map`](crate::Adapter::map).
    pub fn without_gradients(&self) -> Result<Self> {
        let mut set = Self::default();
        for (name, adapter) in &self.entries {
            set.insert(name.clone(), adapter.map(&mut |t| Ok(t.detach()))?);
        }
        Ok(set)
    }

    /// Adds the deltas of the model's component to its base weights, for good:
    /// computed in f32, rounded once to the weight's dtype.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn merge(&self, model: &mut dyn Adaptable, multiplier: f64) -> Result<AttachReport> {
        let component = model.component();
        let mut report = AttachReport::default();
        let mut rest: Vec<&str> = self.names().filter(|n| component.owns(n)).collect();
        let total = rest.len();
        model.visit_layers(&mut |layer| {
            let name = component.layer_name(layer.path());
            if let Some(adapter) = self.entries.get(&name) {
                let fits = adapter.check(&name, layer.base().weight.dims());
                fits.map_err(|e| self.blame(e))?;
                let weight =
                    merge::merged_weight(&layer.base().weight, &[(adapter.as_ref(), multiplier)])?;
                let bias = merge::merged_bias(
                    layer.base().bias.as_ref(),
                    &[(adapter.as_ref(), multiplier)],
                )?;
                layer.set_base(weight, bias);
                report.attached += 1;
                rest.retain(|n| *n != name);
            }
            Ok(())
        })?;
        report.unmatched = rest.into_iter().map(ToString::to_string).collect();
        if report.attached == 0 && total > 0 {
            return Err(Error::NothingMatched {
                adapter_layers: total,
                example: report.unmatched.swap_remove(0),
                component: component.to_string(),
            });
        }
        Ok(report)
    }

    /// A `VarBuilder` that returns base weights with the deltas added: any candle
    /// model built from it has the adapter merged in, without a change of its code.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::VarBuilder;
    /// use lora_core::{AdapterSet, Component, Lora};
    /// # let down = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
    /// # let up = Tensor::new(&[[1f32], [1.]], &Device::Cpu)?;
    /// # let mut style = AdapterSet::default();
    /// # style.insert("lora_unet_mid_fc", std::sync::Arc::new(Lora::new("", down, None, up, 1.0)?));
    /// let base = VarBuilder::zeros(DType::F32, &Device::Cpu); // or from_mmaped_safetensors
    /// let vb = style.merged(base, Component::Unet, 0.5);
    /// let fc = candle_nn::linear(2, 2, vb.pp("mid.fc"))?;
    /// assert_eq!(fc.weight().to_vec2::<f32>()?, [[0.5, 1.0], [0.5, 1.0]]);
    /// # Ok::<(), lora_core::Error>(())
    /// ```
    pub fn merged<'a>(
        &self,
        base: VarBuilder<'a>,
        component: Component,
        multiplier: f64,
    ) -> VarBuilder<'a> {
        merge::merged_builder(self.entries.clone(), base, component, multiplier)
    }

    /// All tensors as a file in kohya's layout holds them; those of real numbers in
    /// `dtype` if given.
    ///
    /// # Errors
    /// When a tensor cannot be converted.
    pub fn tensors(&self, dtype: Option<DType>) -> Result<BTreeMap<String, Tensor>> {
        let converted = |tensor: Tensor| match dtype.filter(|_| tensor.dtype().is_float()) {
            Some(dtype) => tensor.to_dtype(dtype),
            None => Ok(tensor),
        };
        let mut all = BTreeMap::new();
        for (name, adapter) in &self.entries {
            // sd-scripts' OFT is known by its prefix alone.
            let name = match (adapter.family(), name.strip_prefix("lora_")) {
                (Family::KohyaOft, Some(rest)) => format!("oft_{rest}"),
                _ => name.clone(),
            };
            for (suffix, tensor) in adapter.tensors()? {
                all.insert(format!("{name}.{suffix}"), converted(tensor.detach())?);
            }
        }
        for (key, tensor) in &self.bundled {
            all.insert(key.clone(), converted(tensor.clone())?);
        }
        Ok(all)
    }
}
