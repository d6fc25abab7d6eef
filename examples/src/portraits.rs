//! Reads what a portrait shows: the judge of the bundled miniature.
//!
//! A portrait is a grid of 16x16 cells. `assets/portraits/palette.json` has the colours, and
//! the design has cells whose meaning is fixed: the outer columns are background, the
//! second row from the top of the head is hair or hat, the bridge of the nose is skin or glasses.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};

use lora_sd15::{Image, StableDiffusion, Txt2Img};
use serde::Deserialize;

use crate::repository;

/// Cells along each side.
const CELLS: usize = 16;

/// A colour as red, green and blue, 0 to 255.
type Color = [f64; 3];

/// The colours of the portraits.
#[derive(Debug, Clone, Deserialize)]
pub struct Palette {
    background: BTreeMap<String, Hex>,
    hair: BTreeMap<String, Hex>,
    hat: BTreeMap<String, Hex>,
    skin: BTreeMap<String, Hex>,
    glasses: Hex,
    zoe: Character,
}

/// Cells by which a character is known.
#[derive(Debug, Clone, Deserialize)]
struct Character {
    cells: Vec<KeyCells>,
}

#[derive(Debug, Clone, Deserialize)]
struct KeyCells {
    y: usize,
    x: Vec<usize>,
    colour: Hex,
}

/// A colour written as `17a0c4`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "String")]
struct Hex(Color);

impl TryFrom<String> for Hex {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let number = u32::from_str_radix(&text, 16).map_err(|e| format!("colour {text}: {e}"))?;
        let [_, r, g, b] = number.to_be_bytes();
        Ok(Self([r, g, b].map(f64::from)))
    }
}

/// A caption that pretraining did not see, with what it asks for.
#[derive(Debug, Clone, Deserialize)]
pub struct HeldOut {
    /// The tags.
    pub prompt: String,
    /// Name of the background's colour.
    pub background: String,
    /// Name of the hair's colour.
    pub hair: String,
    /// Name of the hat's colour, if there is one.
    pub hat: Option<String>,
    /// `glasses` or `sunglasses`.
    pub glasses: Option<String>,
}

/// What a picture shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Name of the background's colour.
    pub background: String,
    /// Name of the hair's colour, when no hat covers it.
    pub hair: Option<String>,
    /// Name of the hat's colour.
    pub hat: Option<String>,
    /// Whether there are glasses of any kind.
    pub glasses: bool,
}

impl Palette {
    /// The bundled one.
    ///
    /// # Errors
    /// When the file is missing or damaged.
    pub fn bundled() -> Result<Self, Box<dyn Error>> {
        let text = std::fs::read_to_string(repository("assets/portraits/palette.json"))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Reads a portrait of any size that is a multiple of 16.
    pub fn read(&self, picture: &Image) -> Seen {
        let cell = |x, y| cell(picture, x, y);
        let sides: Vec<Color> = (0..CELLS / 2)
            .flat_map(|y| [cell(0, y), cell(CELLS - 1, y)])
            .collect();
        let head: Vec<Color> = (4..9).map(|x| cell(x, 2)).collect();
        let hair = self.hair.iter().map(|(name, hex)| ((name, false), hex.0));
        let hats = self.hat.iter().map(|(name, hex)| ((name, true), hex.0));
        let known: Vec<_> = hair.chain(hats).collect();
        let on_head = majority(head.iter().filter_map(|c| nearest(*c, &known)));
        let backgrounds: Vec<_> = self.background.iter().map(|(n, hex)| (n, hex.0)).collect();
        let skins = self.skin.values().map(|hex| (false, hex.0));
        let face: Vec<_> = skins.chain([(true, self.glasses.0)]).collect();
        let bridge = [(7, 6), (8, 6), (7, 7), (8, 7)].map(|(x, y)| cell(x, y));
        let part = |hat| {
            on_head
                .filter(|(_, is_hat)| *is_hat == hat)
                .map(|(n, _)| n.clone())
        };
        Seen {
            background: majority(sides.iter().filter_map(|c| nearest(*c, &backgrounds)))
                .cloned()
                .unwrap_or_default(),
            hair: part(false),
            hat: part(true),
            glasses: majority(bridge.iter().filter_map(|c| nearest(*c, &face))).unwrap_or(false),
        }
    }

    /// Colour distances (0 to 441) at the cells that make Zoe Zoe: hair buns, blue hair and the
    /// purple striped shirt.
    fn distances_to_zoe(&self, picture: &Image) -> Vec<f64> {
        let cells = self.zoe.cells.iter();
        cells
            .flat_map(|key| key.x.iter().map(move |x| (*x, key.y, key.colour.0)))
            .map(|(x, y, color)| distance(cell(picture, x, y), color))
            .collect()
    }

    /// Their mean.
    pub fn mean_distance_to_zoe(&self, picture: &Image) -> f64 {
        let distances = self.distances_to_zoe(picture);
        distances.iter().sum::<f64>() / distances.len().max(1) as f64
    }

    /// Whether a picture shows Zoe: every key cell within a distance of 90, less than that
    /// between any two of the palette's hair colours and hers.
    pub fn shows_zoe(&self, picture: &Image) -> bool {
        self.distances_to_zoe(picture).iter().all(|d| *d < 90.0)
    }
}

/// The 200 captions that pretraining did not see.
///
/// # Errors
/// When the file is missing or damaged.
pub fn held_out() -> Result<Vec<HeldOut>, Box<dyn Error>> {
    let text = std::fs::read_to_string(repository("assets/portraits/held_out.json"))?;
    Ok(serde_json::from_str(&text)?)
}

/// A portrait as the judge draws it: 128x128 pixels, 25 steps.
pub fn request(prompt: &str, seed: u64) -> Txt2Img {
    Txt2Img {
        prompt: prompt.into(),
        width: 128,
        height: 128,
        steps: 25,
        guidance_scale: GUIDANCE,
        seed,
        ..Txt2Img::default()
    }
}

/// Guidance that follows the tags without spoiling the colours.
const GUIDANCE: f64 = 3.0;

/// Draws one portrait.
///
/// # Errors
/// As [`StableDiffusion::txt2img`].
pub fn draw(sd: &mut StableDiffusion, prompt: &str, seed: u64) -> Result<Image, Box<dyn Error>> {
    let mut pictures = sd.txt2img(&request(prompt, seed), &mut |_| true)?;
    pictures.pop().ok_or_else(|| "no picture".into())
}

/// How well a model draws; shares are of 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    /// Pictures whose background has the wanted colour.
    pub background: f64,
    /// Of those without a hat: hair of the wanted colour.
    pub hair: f64,
    /// A hat where one is wanted, and none where not.
    pub hat: f64,
    /// Glasses where they are wanted, and none where not.
    pub glasses: f64,
}

/// Draws captions and reads what the pictures show.
///
/// # Errors
/// As [`draw`].
pub fn judge(
    sd: &mut StableDiffusion,
    captions: &[HeldOut],
) -> Result<(Figures, Vec<Image>), Box<dyn Error>> {
    let palette = Palette::bundled()?;
    let mut pictures = Vec::new();
    let (mut background, mut hat, mut glasses, mut hair, mut bare) = (0, 0, 0, 0, 0);
    for (number, want) in captions.iter().enumerate() {
        let picture = draw(sd, &want.prompt, number as u64)?;
        let seen = palette.read(&picture);
        background += usize::from(seen.background == want.background);
        hat += usize::from(seen.hat.is_some() == want.hat.is_some());
        glasses += usize::from(seen.glasses == want.glasses.is_some());
        if want.hat.is_none() {
            bare += 1;
            hair += usize::from(seen.hair.as_ref() == Some(&want.hair));
        }
        pictures.push(picture);
    }
    let share = |count: usize, of: usize| count as f64 / of.max(1) as f64;
    let all = captions.len();
    let figures = Figures {
        background: share(background, all),
        hair: share(hair, bare),
        hat: share(hat, all),
        glasses: share(glasses, all),
    };
    Ok((figures, pictures))
}

/// Peak signal-to-noise ratio in dB of encoding and decoding the PNGs of a folder.
///
/// # Errors
/// When a picture cannot be read.
pub fn round_trip(sd: &StableDiffusion, folder: &Path) -> Result<f64, Box<dyn Error>> {
    let mut error = 0.0;
    let mut count = 0.0;
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "png") {
            let picture = Image::open_png(&path)?;
            let decoded = sd.decode(&sd.encode(&picture)?)?;
            for (a, b) in picture.rgb.iter().zip(decoded.iter().flat_map(|d| &d.rgb)) {
                error += (f64::from(*a) - f64::from(*b)).powi(2);
                count += 1.0;
            }
        }
    }
    Ok(10.0 * (255.0 * 255.0 * count / error).log10())
}

/// The folder of portraits that pretraining did not see.
pub fn held_out_pictures() -> PathBuf {
    repository("assets/portraits/held_out")
}

/// Mean absolute difference (0 to 255) of all pairs of pictures.
pub fn variety(pictures: &[Image]) -> f64 {
    let mut sum = 0.0;
    let mut count = 0.0;
    for (i, a) in pictures.iter().enumerate() {
        for b in pictures.iter().skip(i + 1) {
            let pairs = a.rgb.iter().zip(&b.rgb);
            sum += pairs.map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>();
            count += a.rgb.len() as f64;
        }
    }
    sum / f64::max(count, 1.0)
}

/// How many of `count` pictures show Zoe.
///
/// # Errors
/// As [`draw`].
pub fn hits(sd: &mut StableDiffusion, prompt: &str, count: u64) -> Result<usize, Box<dyn Error>> {
    let palette = Palette::bundled()?;
    let mut hits = 0;
    for seed in 0..count {
        hits += usize::from(palette.shows_zoe(&draw(sd, prompt, seed)?));
    }
    Ok(hits)
}

/// Mean colour of one cell, its outermost pixels left out.
fn cell(picture: &Image, x: usize, y: usize) -> Color {
    let (w, h) = (picture.width / CELLS, picture.height / CELLS);
    let mut sum = [0.0; 3];
    let mut count = 0.0;
    for row in y * h + h / 4..(y + 1) * h - h / 4 {
        for column in x * w + w / 4..(x + 1) * w - w / 4 {
            let start = 3 * (row * picture.width + column);
            for (sum, value) in sum.iter_mut().zip(picture.rgb.iter().skip(start)) {
                *sum += f64::from(*value);
            }
            count += 1.0;
        }
    }
    sum.map(|v| v / f64::max(count, 1.0))
}

fn distance(a: Color, b: Color) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| (a - b).powi(2));
    squares.sum::<f64>().sqrt()
}

fn nearest<N: Copy>(color: Color, known: &[(N, Color)]) -> Option<N> {
    let by_distance =
        |a: &&(N, Color), b: &&(N, Color)| distance(color, a.1).total_cmp(&distance(color, b.1));
    known.iter().min_by(by_distance).map(|(name, _)| *name)
}

/// The most frequent value.
fn majority<T: Copy + Ord>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts = BTreeMap::new();
    for value in values {
        *counts.entry(value).or_insert(0) += 1;
    }
    counts
        .into_iter()
        .max_by_key(|(_, n)| *n)
        .map(|(value, _)| value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo_pictures;

    #[test]
    fn the_judge_reads_what_the_captions_of_the_drawings_say() {
        let palette = Palette::bundled().unwrap();
        let mut read = 0;
        for entry in std::fs::read_dir(demo_pictures().join("10_zoe")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "txt") {
                continue;
            }
            let caption = std::fs::read_to_string(path.with_extension("txt")).unwrap();
            let tags: Vec<&str> = caption.split(", ").collect();
            let picture = Image::open_png(&path).unwrap();
            let seen = palette.read(&picture);
            let place = path.display();
            let background = format!("{} background", seen.background);
            assert!(tags.contains(&background.as_str()), "{place}: {seen:?}");
            assert_eq!(seen.glasses, tags.contains(&"glasses"), "{place}: {seen:?}");
            assert!(palette.shows_zoe(&picture), "{place}");
            read += 1;
        }
        assert_eq!(read, 12);
    }
}
