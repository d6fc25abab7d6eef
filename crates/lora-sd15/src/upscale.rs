//! Upscaling networks: RRDBNet (ESRGAN, Wang et al. 2018; Real-ESRGAN, 2021) and the small
//! convolutional network of `realesr-*v3`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::ops::{pixel_shuffle, pixel_unshuffle};
use lora_core::format::TensorFile;
use lora_kernels::{Conv2dParams, conv2d, upsample_nearest2x};

use crate::resample::Filter;
use crate::{Error, Image, Result};

/// Side of the tiles that pictures are cut into, and how far they overlap, in pixels of the
/// small picture: the web UI's settings.
const TILE: usize = 192;
const OVERLAP: usize = 8;

/// A network that enlarges pictures, as hires fix of the web UI uses them.
///
/// ```no_run
/// use candle_core::Device;
/// use lora_sd15::{Hires, StableDiffusion, Txt2Img, UpscaleNetwork, Upscaler};
/// # fn draw(sd: &mut StableDiffusion) -> lora_sd15::Result<()> {
/// let network = UpscaleNetwork::load("4x-UltraSharp.pth", &Device::Cpu)?;
/// sd.add_upscaler("4x-UltraSharp", network);
/// let hires = Hires { upscaler: Upscaler::from_name("4x-UltraSharp"), ..Hires::default() };
/// let job = Txt2Img { prompt: "a castle".into(), hires: Some(hires), ..Txt2Img::default() };
/// sd.txt2img(&job, &mut |_| true)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct UpscaleNetwork {
    network: Network,
    /// Pixels of the result per pixel, along a side.
    scale: usize,
    device: Device,
}

#[derive(Debug)]
enum Network {
    Rrdb(Rrdb),
    Compact(Compact),
}

impl UpscaleNetwork {
    /// Reads a network from a safetensors file or from a `.pth` file as PyTorch 1.6 and later
    /// write it; nothing in the file is run. Its kind and scale are told by its tensors.
    ///
    /// # Errors
    /// [`Error::Io`] when there is no such file; [`Error::Upscaler`] when it is another kind of
    /// network.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let weights = Weights {
            path: path.to_path_buf(),
            tensors: read(path, device)?,
        };
        weights.network(device)
    }

    /// Pixels of the result per pixel, along a side.
    pub fn scale(&self) -> usize {
        self.scale
    }

    /// Enlarges `x` `[n, 3, h, w]`, channels in the order blue, green, red, values 0 to 1, to
    /// `[n, 3, scale h, scale w]`.
    ///
    /// # Errors
    /// When the shape is another.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match &self.network {
            Network::Rrdb(network) => network.forward(x)?,
            Network::Compact(network) => network.forward(x)?,
        })
    }

    /// The picture [`scale`](Self::scale) times as large, in tiles of 192 pixels that overlap by
    /// 8, where one fades into the next. The network is given blue, green and red in this order:
    /// as in the web UI.
    ///
    /// # Errors
    /// When the network cannot run.
    pub fn enlarge(&self, picture: &Image) -> Result<Image> {
        let (width, height) = (picture.width, picture.height);
        let mut large = Image {
            width: self.scale * width,
            height: self.scale * height,
            rgb: vec![0; 3 * self.scale * self.scale * width * height],
        };
        for (y, tile_height) in tiles(height) {
            // Tiles side by side first, then under the rows above.
            let mut row = Image {
                width: large.width,
                height: self.scale * tile_height,
                rgb: vec![0; 3 * large.width * self.scale * tile_height],
            };
            for (x, tile_width) in tiles(width) {
                let tile = picture.crop(x, y, tile_width, tile_height);
                let tile = self.enlarge_whole(&tile)?;
                fade_in(&mut row, &tile, (self.scale * x, 0), self.scale * OVERLAP);
            }
            fade_in(&mut large, &row, (0, self.scale * y), self.scale * OVERLAP);
        }
        Ok(large)
    }

    /// The picture in a size: enlarged, three times at most, until it is as large as that, then
    /// made smaller with Lanczos.
    ///
    /// # Errors
    /// When the network cannot run.
    pub fn enlarge_to(&self, picture: &Image, width: usize, height: usize) -> Result<Image> {
        const PASSES: usize = 3;
        let mut large = picture.clone();
        for _ in 0..PASSES {
            if large.width >= width && large.height >= height {
                break;
            }
            large = self.enlarge(&large)?;
            if self.scale == 1 {
                break;
            }
        }
        Ok(large.resize(width, height, Filter::Lanczos))
    }

    fn enlarge_whole(&self, picture: &Image) -> Result<Image> {
        let channel = |c: usize| picture.rgb.iter().skip(c).step_by(3);
        let planes = [2, 1, 0].into_iter().flat_map(channel);
        let values: Vec<f32> = planes.map(|v| f32::from(*v) / 255.0).collect();
        let shape = (1, 3, picture.height, picture.width);
        let y = self.forward(&Tensor::from_vec(values, shape, &self.device)?)?;
        let (_, _, height, width) = y.dims4()?;
        let values = y.flatten_all()?.to_vec1::<f32>()?;
        if values.iter().any(|v| v.is_nan()) {
            return Err(Error::NotFinite {
                what: "the enlarged picture",
                advice: "use another upscaler",
            });
        }
        let byte = |v: &f32| (255.0 * v.clamp(0.0, 1.0)).round_ties_even() as u8;
        let mut rgb = vec![0; 3 * width * height];
        let planes = values.chunks_exact((width * height).max(1));
        for (plane, channel) in planes.zip([2, 1, 0]) {
            for (to, value) in rgb.iter_mut().skip(channel).step_by(3).zip(plane) {
                *to = byte(value);
            }
        }
        Ok(Image { width, height, rgb })
    }
}

/// First pixel and length of the tiles along a side.
fn tiles(side: usize) -> Vec<(usize, usize)> {
    if side <= TILE {
        return vec![(0, side)];
    }
    let count = (side - OVERLAP).div_ceil(TILE - OVERLAP);
    let step = (side - TILE) as f64 / (count - 1) as f64;
    let first = |i: usize| ((i as f64 * step) as usize).min(side - TILE);
    (0..count).map(|i| (first(i), TILE)).collect()
}

/// Copies `tile` to the place, where it covers what is to the left or above by `overlap` pixels
/// more and more.
fn fade_in(whole: &mut Image, tile: &Image, (x, y): (usize, usize), overlap: usize) {
    let row = 3 * whole.width;
    let lines = whole.rgb.chunks_exact_mut(row.max(1)).skip(y);
    let tile_lines = tile.rgb.chunks_exact((3 * tile.width).max(1));
    for (down, (line, tile)) in lines.zip(tile_lines).enumerate() {
        let pixels = line.as_chunks_mut::<3>().0.iter_mut().skip(x);
        for (across, (pixel, new)) in pixels.zip(tile.as_chunks::<3>().0).enumerate() {
            // Steps of a byte, as the masks of the web UI have them.
            let share = |at: usize| (at * 255 / overlap.max(1)) as u32;
            let mask = match () {
                () if x > 0 && across < overlap => share(across),
                () if y > 0 && down < overlap => share(down),
                () => 255,
            };
            for (value, new) in pixel.iter_mut().zip(new) {
                let mixed = u32::from(*new) * mask + u32::from(*value) * (255 - mask);
                *value = ((mixed + 127) / 255) as u8;
            }
        }
    }
}

/// The tensors of a file in f32, under the names in it.
fn read(path: &Path, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    std::fs::File::open(path).map_err(Error::io(path))?;
    let unreadable = |what: String| Error::Upscaler {
        path: path.to_path_buf(),
        what,
    };
    let pickled = path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("pth") || e.eq_ignore_ascii_case("pt"));
    let tensors: Vec<(String, Tensor)> = if pickled {
        // Trainers put the weights under one of these names, or nowhere.
        let keys = [Some("params_ema"), Some("params"), Some("state_dict"), None];
        let found = keys.into_iter().find_map(|key| {
            let tensors = candle_core::pickle::read_all_with_key(path, key).ok()?;
            (!tensors.is_empty()).then_some(tensors)
        });
        found.ok_or_else(|| {
            unreadable(
                "has no weights that can be read; files of PyTorch before 1.6 cannot: convert it to safetensors".into(),
            )
        })?
    } else {
        let file = TensorFile::open(path)?;
        let names = file.names();
        let tensor = |name: String| Ok((name.clone(), file.tensor(&name, device)?));
        names.into_iter().map(tensor).collect::<Result<_>>()?
    };
    let widened = |(name, tensor): (String, Tensor)| {
        Ok((name, tensor.to_dtype(DType::F32)?.to_device(device)?))
    };
    tensors.into_iter().map(widened).collect()
}

/// What is left of a file's tensors.
struct Weights {
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
}

impl Weights {
    fn wrong(&self, what: impl Into<String>) -> Error {
        Error::Upscaler {
            path: self.path.clone(),
            what: what.into(),
        }
    }

    fn network(mut self, device: &Device) -> Result<UpscaleNetwork> {
        if self.tensors.contains_key("model.0.weight") {
            self.rename()?;
        }
        let (network, scale) = if self.tensors.contains_key("conv_first.weight") {
            let (network, scale) = Rrdb::new(&mut self)?;
            (Network::Rrdb(network), scale)
        } else if self.tensors.contains_key("body.0.weight") {
            let network = Compact::new(&mut self)?;
            let scale = network.scale;
            (Network::Compact(network), scale)
        } else {
            return Err(self.wrong("is neither an ESRGAN network (RRDBNet) nor a compact one (SRVGGNet); others are not supported"));
        };
        if let Some(name) = self.tensors.keys().next() {
            return Err(self.wrong(format!(
                "has {} tensors that such a network has no place for, for example {name}",
                self.tensors.len()
            )));
        }
        Ok(UpscaleNetwork {
            network,
            scale,
            device: device.clone(),
        })
    }

    /// The names of the first ESRGAN to those of its successors.
    fn rename(&mut self) -> Result<()> {
        let number = |name: &str| -> Option<usize> {
            let (number, rest) = name.strip_prefix("model.")?.split_once('.')?;
            (rest == "weight").then(|| number.parse().ok()).flatten()
        };
        let mut outer: Vec<usize> = self.tensors.keys().filter_map(|n| number(n)).collect();
        outer.sort_unstable();
        let [_first, ups @ .., hr, last] = outer.as_slice() else {
            return Err(self.wrong("lacks the layers of an ESRGAN network"));
        };
        let mut names: Vec<(String, String)> = vec![
            ("model.0".into(), "conv_first".into()),
            (format!("model.{hr}"), "conv_hr".into()),
            (format!("model.{last}"), "conv_last".into()),
        ];
        let up =
            |(i, number): (usize, &usize)| (format!("model.{number}"), format!("conv_up{}", i + 1));
        names.extend(ups.iter().enumerate().map(up));
        let renamed = |name: &str| -> Option<String> {
            let (layer, part) = name.rsplit_once('.')?;
            if let Some((_, to)) = names.iter().find(|(from, _)| from == layer) {
                return Some(format!("{to}.{part}"));
            }
            let inner = layer.strip_prefix("model.1.sub.")?;
            Some(match inner.split_once(".RDB") {
                Some((block, rest)) => {
                    let (dense, conv) = rest.split_once(".conv")?;
                    let conv = conv.strip_suffix(".0")?;
                    format!("body.{block}.rdb{dense}.conv{conv}.{part}")
                }
                None => format!("conv_body.{part}"),
            })
        };
        let tensors = std::mem::take(&mut self.tensors);
        for (name, tensor) in tensors {
            let to = renamed(&name).unwrap_or(name);
            self.tensors.insert(to, tensor);
        }
        Ok(())
    }

    /// The tensor, which is taken out.
    fn take(&mut self, name: &str) -> Result<Tensor> {
        let tensor = self.tensors.remove(name);
        tensor.ok_or_else(|| self.wrong(format!("lacks {name}")))
    }

    fn conv(&mut self, name: &str, inputs: usize) -> Result<Conv> {
        let weight = self.take(&format!("{name}.weight"))?;
        let bias = self.take(&format!("{name}.bias"))?;
        match (weight.dims(), bias.dims()) {
            ([outputs, i, 3, 3], [b]) if *i == inputs && b == outputs => Ok(Conv { weight, bias }),
            (weight, bias) => Err(self.wrong(format!(
                "{name} has shapes {weight:?} and {bias:?}, expected a 3x3 convolution of {inputs} channels"
            ))),
        }
    }
}

/// A 3x3 convolution that keeps the size.
#[derive(Debug)]
struct Conv {
    weight: Tensor,
    bias: Tensor,
}

impl Conv {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let same = Conv2dParams {
            padding: 1,
            ..Conv2dParams::default()
        };
        conv2d(x, &self.weight, Some(&self.bias), same)
    }

    fn outputs(&self) -> usize {
        self.bias.elem_count()
    }
}

/// Leaky ReLU of slope 0.2.
fn leaky(x: &Tensor) -> candle_core::Result<Tensor> {
    x.maximum(&(x * 0.2)?)
}

/// Blocks of three dense blocks of five convolutions, then doublings.
#[derive(Debug)]
struct Rrdb {
    /// Pixels of a side that become channels first.
    unshuffle: usize,
    first: Conv,
    blocks: Vec<[[Conv; 5]; 3]>,
    body: Conv,
    ups: Vec<Conv>,
    hr: Conv,
    last: Conv,
}

impl Rrdb {
    fn new(weights: &mut Weights) -> Result<(Self, usize)> {
        let inputs = weights.tensors.get("conv_first.weight");
        let inputs = inputs.and_then(|w| w.dims().get(1).copied()).unwrap_or(0);
        let unshuffle = match inputs {
            3 => 1,
            12 => 2,
            48 => 4,
            _ => {
                return Err(weights.wrong(format!("takes {inputs} channels, expected 3, 12 or 48")));
            }
        };
        let first = weights.conv("conv_first", inputs)?;
        let features = first.outputs();
        let mut blocks = Vec::new();
        while weights
            .tensors
            .contains_key(&format!("body.{}.rdb1.conv1.weight", blocks.len()))
        {
            let mut dense = |number: usize| -> Result<[Conv; 5]> {
                let name = |conv: usize| format!("body.{}.rdb{number}.conv{conv}", blocks.len());
                let one = weights.conv(&name(1), features)?;
                let grown = |by: usize| features + by * one.outputs();
                let [two, three, four, five] = [2, 3, 4, 5].map(|i| (name(i), grown(i - 1)));
                let two = weights.conv(&two.0, two.1)?;
                let three = weights.conv(&three.0, three.1)?;
                let four = weights.conv(&four.0, four.1)?;
                let five = weights.conv(&five.0, five.1)?;
                Ok([one, two, three, four, five])
            };
            let block = [dense(1)?, dense(2)?, dense(3)?];
            blocks.push(block);
        }
        let body = weights.conv("conv_body", features)?;
        let mut ups = Vec::new();
        while weights
            .tensors
            .contains_key(&format!("conv_up{}.weight", ups.len() + 1))
        {
            ups.push(weights.conv(&format!("conv_up{}", ups.len() + 1), features)?);
        }
        let hr = weights.conv("conv_hr", features)?;
        let last = weights.conv("conv_last", hr.outputs())?;
        let scale = (1usize << ups.len().min(8)) / unshuffle;
        if !(1..=16).contains(&scale) || last.outputs() != 3 {
            return Err(weights.wrong(format!(
                "enlarges {scale} times to {} channels, expected 1 to 16 times and 3",
                last.outputs()
            )));
        }
        let network = Self {
            unshuffle,
            first,
            blocks,
            body,
            ups,
            hr,
            last,
        };
        Ok((network, scale))
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (_, _, h, w) = x.dims4()?;
        let short = |side: usize| side.next_multiple_of(self.unshuffle) - side;
        let mut x = x
            .pad_with_same(2, 0, short(h))?
            .pad_with_same(3, 0, short(w))?;
        if self.unshuffle > 1 {
            x = pixel_unshuffle(&x, self.unshuffle)?;
        }
        let first = self.first.forward(&x)?;
        let mut y = first.clone();
        for block in &self.blocks {
            let mut inner = y.clone();
            for dense in block {
                inner = Self::dense(dense, &inner)?;
            }
            y = ((inner * 0.2)? + y)?;
        }
        y = (self.body.forward(&y)? + first)?;
        for up in &self.ups {
            y = leaky(&up.forward(&upsample_nearest2x(&y)?)?)?;
        }
        let y = self.last.forward(&leaky(&self.hr.forward(&y)?)?)?;
        let scale = (1 << self.ups.len()) / self.unshuffle;
        y.narrow(2, 0, scale * h)?.narrow(3, 0, scale * w)
    }

    /// Each convolution is given everything before it.
    fn dense(convs: &[Conv; 5], x: &Tensor) -> candle_core::Result<Tensor> {
        let [one, two, three, four, five] = convs;
        let mut all = x.contiguous()?;
        for conv in [one, two, three, four] {
            all = Tensor::cat(&[&all, &leaky(&conv.forward(&all)?)?], 1)?;
        }
        (five.forward(&all)? * 0.2)? + x
    }
}

/// Convolutions at the small size with a learned slope per channel between them, added to the
/// picture with its pixels repeated.
#[derive(Debug)]
struct Compact {
    first: Conv,
    /// Slope below zero `[1, c, 1, 1]`, then a convolution.
    rest: Vec<(Tensor, Conv)>,
    scale: usize,
}

impl Compact {
    fn new(weights: &mut Weights) -> Result<Self> {
        let first = weights.conv("body.0", 3)?;
        let mut channels = first.outputs();
        let mut rest = Vec::new();
        while weights
            .tensors
            .contains_key(&format!("body.{}.weight", 2 * rest.len() + 1))
        {
            let name = format!("body.{}.weight", 2 * rest.len() + 1);
            let slope = weights.take(&name)?;
            if slope.dims() != [channels] {
                return Err(weights.wrong(format!(
                    "{name} has shape {:?}, expected [{channels}]",
                    slope.dims()
                )));
            }
            let slope = slope.reshape((1, channels, 1, 1))?;
            let conv = weights.conv(&format!("body.{}", 2 * rest.len() + 2), channels)?;
            channels = conv.outputs();
            rest.push((slope, conv));
        }
        let scale = (1..=8).find(|scale| 3 * scale * scale == channels);
        let scale = scale.ok_or_else(|| {
            weights.wrong(format!(
                "gives {channels} channels, expected 3, 12, 27, 48 ..."
            ))
        })?;
        Ok(Self { first, rest, scale })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut y = self.first.forward(x)?;
        for (slope, conv) in &self.rest {
            let below = y.minimum(&y.zeros_like()?)?.broadcast_mul(slope)?;
            y = conv.forward(&(y.relu()? + below)?)?;
        }
        let (_, _, h, w) = x.dims4()?;
        let repeated = x.upsample_nearest2d(self.scale * h, self.scale * w)?;
        pixel_shuffle(&y, self.scale)? + repeated
    }
}
