//! Checkpoint files: what they are, and their tensors under one set of names.
//!
//! A [`Checkpoint`] opens a single LDM-layout `.safetensors` file (the layout of
//! `v1-5-pruned-emaonly.safetensors`) or a diffusers folder, memory-mapped, checks
//! that it is a Stable Diffusion 1.x model, and hands out a `VarBuilder` per part
//! with diffusers names.

mod backend;
mod keys;
mod recognise;
mod storage;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use lora_core::format::TensorFile;

use crate::config::read_json;
use crate::{Error, ModelConfig, Result, TextEncoder, UNet, Vae};

use backend::{PartBackend, Recorder};
pub use keys::{diffusers_to_ldm, ldm_to_diffusers};
pub use storage::WeightStorage;

/// One of the three networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The denoiser.
    Unet,
    /// The image encoder and decoder.
    Vae,
    /// The text encoder.
    TextEncoder,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Part::Unet => "UNet",
            Part::Vae => "VAE",
            Part::TextEncoder => "text encoder",
        })
    }
}

/// Where a tensor lies.
#[derive(Debug, Clone)]
struct Place {
    file: usize,
    key: String,
}

/// Names (diffusers') and shapes of all tensors that a part is made of.
pub(crate) fn expected_shapes(
    config: &ModelConfig,
    part: Part,
) -> Result<BTreeMap<String, Vec<usize>>> {
    let asked = Arc::new(Mutex::new(BTreeMap::new()));
    let vb = VarBuilder::from_backend(Box::new(Recorder(asked.clone())), DType::F32, Device::Cpu);
    match part {
        Part::Unet => drop(UNet::new(&config.unet, vb)?),
        Part::Vae => drop(Vae::new(&config.vae, vb)?),
        Part::TextEncoder => drop(TextEncoder::new(&config.text, vb)?),
    }
    let asked = asked.lock().unwrap_or_else(|e| e.into_inner());
    Ok(asked.clone())
}

/// An opened model: one file or one folder.
///
/// ```no_run
/// use candle_core::{DType, Device};
/// use lora_sd15::{Checkpoint, Part, UNet};
/// let checkpoint = Checkpoint::open("v1-5-pruned-emaonly.safetensors")?;
/// let vb = checkpoint.var_builder(Part::Unet, DType::F32, &Device::Cpu)?;
/// let unet = UNet::new(&checkpoint.config().unet, vb)?;
/// # Ok::<(), lora_sd15::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Checkpoint {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    files: Vec<TensorFile>,
    places: BTreeMap<(Part, String), Place>,
    extra: BTreeMap<Part, Vec<String>>,
    ignored: Vec<String>,
    config: ModelConfig,
}

impl Checkpoint {
    /// Opens a `.safetensors` file or a diffusers folder and reads its dimensions;
    /// `NAME.json` beside `NAME.safetensors`, if there is one, tells what tensors
    /// cannot (numbers of heads and groups).
    ///
    /// # Errors
    /// [`Error::NotSd15`] saying what the file is, when it is something else;
    /// [`Error::Adapter`] when it is damaged or a pickle.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
        if metadata.is_dir() {
            Self::open_folder(path)
        } else {
            Self::open_file(path)
        }
    }

    fn open_file(path: &Path) -> Result<Self> {
        let file = recognise::open(path)?;
        let mut index = Index::default();
        for key in file.names() {
            index.add_ldm(0, key);
        }
        recognise::family(path, &file)?;
        let json = path.with_extension("json");
        let config = if json.is_file() {
            ModelConfig::read(&json)?
        } else {
            ModelConfig::default()
        };
        Self::finish(path, vec![file], index, config)
    }

    fn open_folder(path: &Path) -> Result<Self> {
        let mut config = ModelConfig::default();
        let (mut files, mut index) = (Vec::new(), Index::default());
        for part in [Part::Unet, Part::Vae, Part::TextEncoder] {
            let (folder, stem) = match part {
                Part::Unet => ("unet", "diffusion_pytorch_model"),
                Part::Vae => ("vae", "diffusion_pytorch_model"),
                Part::TextEncoder => ("text_encoder", "model"),
            };
            let folder = path.join(folder);
            for file in recognise::part_files(path, &folder, stem)? {
                let file = recognise::open(&file)?;
                for key in file.names() {
                    index.add_diffusers(part, files.len(), key);
                }
                files.push(file);
            }
            let json = folder.join("config.json");
            match part {
                Part::Unet => config.unet = recognise::unet_config(&json)?,
                Part::Vae => config.vae = read_json(&json)?,
                Part::TextEncoder => config.text = read_json(&json)?,
            }
        }
        Self::finish(path, files, index, config)
    }

    fn finish(
        path: &Path,
        files: Vec<TensorFile>,
        index: Index,
        mut config: ModelConfig,
    ) -> Result<Self> {
        let shape = |part: Part, name: &str| -> Option<Vec<usize>> {
            let place = index.places.get(&(part, name.to_string()))?;
            files[place.file].shape(&place.key).map(<[usize]>::to_vec)
        };
        recognise::dimensions(&mut config, &shape);
        config.validate(&path.display().to_string())?;
        let Index {
            places,
            extra,
            ignored,
        } = index;
        let inner = Inner {
            path: path.to_path_buf(),
            files,
            places,
            extra,
            ignored,
            config,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Opens a separate VAE file (LDM or diffusers names, with or without prefix) in
    /// place of this checkpoint's own.
    ///
    /// # Errors
    /// [`Error::NotSd15`] when the file is not a VAE.
    pub fn with_vae(&self, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = recognise::open(path)?;
        let mut index = Index::default();
        for key in file.names() {
            let name = keys::vae(key.strip_prefix(keys::VAE).unwrap_or(&key));
            match name {
                Some(name) => index.insert(Part::Vae, name, 0, key),
                None if keys::ignorable(&key) => index.ignored.push(key),
                None => index.extra.entry(Part::Vae).or_default().push(key),
            }
        }
        if index.places.is_empty() {
            let what = "not a VAE file: it has no encoder. or decoder. tensors".into();
            return Err(Error::NotSd15 {
                path: path.to_path_buf(),
                what,
            });
        }
        let mut config = ModelConfig {
            vae: self.config().vae.clone(),
            ..self.config().clone()
        };
        let json = path.with_extension("json");
        if json.is_file() {
            config.vae = ModelConfig::read(&json)?.vae;
        }
        let vae = Self::finish(path, vec![file], index, config)?;
        vae.verify(Part::Vae)?;
        let mut config = self.config().clone();
        config.vae = vae.config().vae.clone();
        let mut files = Vec::new();
        let mut places = self.inner.places.clone();
        for file in self.inner.files.iter().chain(&vae.inner.files) {
            files.push(recognise::open(file.path())?);
        }
        places.retain(|(part, _), _| *part != Part::Vae);
        places.extend(vae.inner.places.iter().map(|(name, place)| {
            let place = Place {
                file: place.file + self.inner.files.len(),
                key: place.key.clone(),
            };
            (name.clone(), place)
        }));
        let mut extra = self.inner.extra.clone();
        extra.remove(&Part::Vae);
        let inner = Inner {
            path: self.inner.path.clone(),
            files,
            places,
            extra,
            ignored: self.inner.ignored.clone(),
            config,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Dimensions of the three networks.
    pub fn config(&self) -> &ModelConfig {
        &self.inner.config
    }

    /// Tensors that are not weights of the model and were passed over.
    pub fn ignored(&self) -> &[String] {
        &self.inner.ignored
    }

    /// Checks, without reading weights, that a part has every tensor the model
    /// needs, in the right shape, and none that it has no place for.
    ///
    /// # Errors
    /// [`Error::MissingPart`], [`Error::MissingKeys`], [`Error::WrongShape`] or
    /// [`Error::ExtraKeys`].
    pub fn verify(&self, part: Part) -> Result<()> {
        let path = || self.inner.path.clone();
        let have: BTreeMap<&str, &Place> = self
            .inner
            .places
            .iter()
            .filter(|((p, _), _)| *p == part)
            .map(|((_, n), place)| (n.as_str(), place))
            .collect();
        if have.is_empty() {
            let advice = match part {
                Part::Unet => "it is not a whole checkpoint",
                Part::Vae => "give a VAE file separately",
                Part::TextEncoder => "use a checkpoint that includes it",
            };
            return Err(Error::MissingPart {
                path: path(),
                part,
                advice,
            });
        }
        let expected = expected_shapes(self.config(), part)?;
        let missing: Vec<String> = expected
            .keys()
            .filter(|n| !have.contains_key(n.as_str()))
            .cloned()
            .collect();
        if !missing.is_empty() {
            return Err(Error::MissingKeys {
                path: path(),
                part,
                keys: missing,
            });
        }
        let mut extra = self.inner.extra.get(&part).cloned().unwrap_or_default();
        for (name, place) in have {
            let Some(expected) = expected.get(name) else {
                extra.push(place.key.clone());
                continue;
            };
            let got = self.inner.files[place.file]
                .shape(&place.key)
                .unwrap_or_default();
            if !same_shape(got, expected) {
                let (key, got, expected) = (place.key.clone(), got.to_vec(), expected.clone());
                return Err(Error::WrongShape {
                    path: path(),
                    key,
                    expected,
                    got,
                });
            }
        }
        if extra.is_empty() {
            Ok(())
        } else {
            extra.sort();
            Err(Error::ExtraKeys {
                path: path(),
                part,
                keys: extra,
            })
        }
    }

    /// The tensors of one part under diffusers names, checked with
    /// [`verify`](Self::verify), in `dtype`. On the CPU all are read, by several threads,
    /// when the first is asked for, and each is handed out once without being read again.
    ///
    /// # Errors
    /// As [`verify`](Self::verify).
    pub fn var_builder(
        &self,
        part: Part,
        dtype: DType,
        device: &Device,
    ) -> Result<VarBuilder<'static>> {
        self.builder(part, None, dtype, device)
    }

    /// The same for computing in f32, with the weights of linear layers and convolutions
    /// kept as `storage` says.
    ///
    /// # Errors
    /// As [`verify`](Self::verify).
    pub fn stored_var_builder(
        &self,
        part: Part,
        storage: WeightStorage,
        device: &Device,
    ) -> Result<VarBuilder<'static>> {
        self.builder(part, Some(storage), DType::F32, device)
    }

    /// Bytes that the weights of a part take when kept as `storage` says.
    pub fn weight_bytes(&self, part: Part, storage: WeightStorage) -> usize {
        let places = self.inner.places.iter().filter(|((p, _), _)| *p == part);
        places
            .filter_map(|((_, name), place)| {
                let file = &self.inner.files[place.file];
                let shape = file.shape(&place.key)?;
                let dtype = storage.dtype(name, shape.len(), file.dtype(&place.key)?);
                Some(shape.iter().product::<usize>() * dtype.size_in_bytes())
            })
            .sum()
    }

    fn builder(
        &self,
        part: Part,
        storage: Option<WeightStorage>,
        dtype: DType,
        device: &Device,
    ) -> Result<VarBuilder<'static>> {
        self.verify(part)?;
        let backend = PartBackend {
            inner: self.inner.clone(),
            part,
            storage,
            read: OnceLock::new(),
        };
        Ok(VarBuilder::from_backend(
            Box::new(backend),
            dtype,
            device.clone(),
        ))
    }
}

/// Shapes are equal up to trailing ones: 1x1 convolutions stored as matrices.
fn same_shape(a: &[usize], b: &[usize]) -> bool {
    let trim = |s: &[usize]| s[..s.iter().rposition(|d| *d != 1).map_or(0, |i| i + 1)].to_vec();
    a == b || (trim(a) == trim(b) && a.len().max(b.len()) == 4)
}

/// Collects where tensors lie.
#[derive(Default)]
struct Index {
    places: BTreeMap<(Part, String), Place>,
    extra: BTreeMap<Part, Vec<String>>,
    ignored: Vec<String>,
}

impl Index {
    fn insert(&mut self, part: Part, name: String, file: usize, key: String) {
        self.places.insert((part, name), Place { file, key });
    }

    fn add_ldm(&mut self, file: usize, key: String) {
        if keys::ignorable(&key) {
            self.ignored.push(key);
        } else if let Some((part, name)) = ldm_to_diffusers(&key) {
            self.insert(part, name, file, key);
        } else {
            let parts = [
                (keys::UNET, Part::Unet),
                (keys::VAE, Part::Vae),
                (keys::TEXT, Part::TextEncoder),
            ];
            match parts.iter().find(|(prefix, _)| key.starts_with(prefix)) {
                Some((_, part)) => self.extra.entry(*part).or_default().push(key),
                None => self.ignored.push(key),
            }
        }
    }

    fn add_diffusers(&mut self, part: Part, file: usize, key: String) {
        let name = match part {
            Part::Unet => Some(key.clone()),
            Part::Vae => keys::vae(&key),
            Part::TextEncoder => keys::text(&key),
        };
        match name {
            Some(name) => self.insert(part, name, file, key),
            None if keys::ignorable(&key) => self.ignored.push(key),
            None => self.extra.entry(part).or_default().push(key),
        }
    }
}

/// All tensor names of a set of files, for messages.
pub(crate) fn first_names(names: &[String], n: usize) -> String {
    let unique: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    unique.into_iter().take(n).collect::<Vec<_>>().join(", ")
}
