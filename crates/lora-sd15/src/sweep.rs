//! Many pictures of one job with one to three options varied: X/Y/Z grids.

use std::sync::OnceLock;

use regex::Regex;

use crate::sampler::{SamplerKind, SigmaSchedule};
use crate::{
    Emphasis, Error, Grid, Image, Img2Img, NoiseSource, Result, Txt2Img, Upscaler, Variation,
};

/// What an axis changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Varied {
    Seed,
    Steps,
    Guidance,
    Sampler,
    Schedule,
    ClipSkip,
    Size,
    Width,
    Height,
    Replace,
    ReplaceNegative,
    Adapter,
    Multiplier,
    VariationSeed,
    VariationStrength,
    Eta,
    EtaDelta,
    Churn,
    SigmaMin,
    SigmaMax,
    Rho,
    ChurnMin,
    ChurnMax,
    ChurnNoise,
    Emphasis,
    SkipNegative,
    NoiseSource,
    SgmNoise,
    Order,
    UniPcOrder,
    HiresScale,
    HiresSteps,
    Strength,
    HiresUpscaler,
    NoiseMultiplier,
    ExtraNoise,
    Model,
    Vae,
    Styles,
    Nothing,
}

const OPTIONS: [(&str, Varied); 40] = [
    ("Seed", Varied::Seed),
    ("Steps", Varied::Steps),
    ("CFG Scale", Varied::Guidance),
    ("Sampler", Varied::Sampler),
    ("Schedule type", Varied::Schedule),
    ("Clip skip", Varied::ClipSkip),
    ("Size", Varied::Size),
    ("Width", Varied::Width),
    ("Height", Varied::Height),
    ("Prompt S/R", Varied::Replace),
    ("Negative S/R", Varied::ReplaceNegative),
    ("LoRA", Varied::Adapter),
    ("LoRA weight", Varied::Multiplier),
    ("Var. seed", Varied::VariationSeed),
    ("Var. strength", Varied::VariationStrength),
    ("Eta", Varied::Eta),
    ("ENSD", Varied::EtaDelta),
    ("Sigma Churn", Varied::Churn),
    ("Schedule min sigma", Varied::SigmaMin),
    ("Schedule max sigma", Varied::SigmaMax),
    ("Schedule rho", Varied::Rho),
    ("Sigma min", Varied::ChurnMin),
    ("Sigma max", Varied::ChurnMax),
    ("Sigma noise", Varied::ChurnNoise),
    ("Emphasis", Varied::Emphasis),
    ("Negative Guidance minimum sigma", Varied::SkipNegative),
    ("RNG source", Varied::NoiseSource),
    ("SGM noise multiplier", Varied::SgmNoise),
    ("Prompt order", Varied::Order),
    ("UniPC Order", Varied::UniPcOrder),
    ("Hires scale", Varied::HiresScale),
    ("Hires steps", Varied::HiresSteps),
    ("Denoising", Varied::Strength),
    ("Hires upscaler", Varied::HiresUpscaler),
    ("Initial noise multiplier", Varied::NoiseMultiplier),
    ("Extra noise", Varied::ExtraNoise),
    ("Checkpoint name", Varied::Model),
    ("VAE", Varied::Vae),
    ("Styles", Varied::Styles),
    ("Nothing", Varied::Nothing),
];

/// One option and the values it takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Axis {
    option: Varied,
    values: Vec<String>,
}

impl Axis {
    /// From `OPTION=value,value,...`, such as `Steps=10,20`, `CFG Scale=5-9 (+2)`,
    /// `Seed=1-4`, `Prompt S/R=cat,dog` (the first is what is replaced), `LoRA=a-000002,a`
    /// or `LoRA weight=0.5-1 [3]`. A value with a comma is put in double quotes.
    ///
    /// # Errors
    /// [`Error::UnknownName`] with the list of options; [`Error::BadValue`] without values.
    pub fn parse(text: &str) -> Result<Self> {
        let (name, list) = text.split_once('=').unwrap_or((text, ""));
        let found = OPTIONS
            .iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name.trim()));
        let Some((_, option)) = found else {
            return Err(Error::UnknownName {
                what: "axis",
                name: name.to_string(),
                known: OPTIONS.map(|(n, _)| n).join(", "),
            });
        };
        let mut values = Vec::new();
        for value in split(list) {
            match range(&value) {
                Some(numbers) if option.takes_numbers() => values.extend(numbers),
                _ => values.push(value),
            }
        }
        if *option == Varied::Order {
            values = orders(&values)?;
        }
        if *option == Varied::Nothing {
            values = vec![String::new()];
        }
        if values.is_empty() {
            return Err(Error::BadValue {
                name: "axis",
                value: text.to_string(),
                expected: "expected OPTION=value,value",
            });
        }
        Ok(Self {
            option: *option,
            values,
        })
    }

    /// Puts seeds that `any` draws in place of -1 on axes of seeds. As in the web UI, a
    /// value's seed is the same in all cells of its row or column, so that they compare.
    pub fn with_seeds(mut self, any: &mut dyn FnMut() -> u64) -> Self {
        if matches!(self.option, Varied::Seed | Varied::VariationSeed) {
            for value in self.values.iter_mut().filter(|value| *value == "-1") {
                *value = any().to_string();
            }
        }
        self
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// `OPTION: value`.
    fn label(&self, index: usize) -> String {
        let value = self.values.get(index).map_or("", String::as_str);
        let found = OPTIONS.iter().find(|(_, o)| *o == self.option);
        match self.option {
            Varied::Nothing => String::new(),
            Varied::Replace
            | Varied::ReplaceNegative
            | Varied::Adapter
            | Varied::Sampler
            | Varied::Order
            | Varied::Model => value.to_string(),
            _ => format!("{}: {value}", found.map_or("", |(n, _)| n)),
        }
    }

    fn apply(&self, index: usize, cell: &mut Cell) -> Result<()> {
        let job = &mut cell.job;
        let value = self.values.get(index).map_or("", |v| v.trim());
        let first = self.values.first().map_or("", String::as_str);
        match self.option {
            Varied::Seed => job.seed = read("Seed", value)?,
            Varied::Steps => job.steps = read("Steps", value)?,
            Varied::Guidance => job.guidance_scale = read("CFG Scale", value)?,
            Varied::Sampler => {
                let (sampler, schedule) = SamplerKind::from_name(value)?;
                job.sampler = sampler;
                job.schedule = schedule.or(job.schedule.filter(|_| !sampler.on_timesteps()));
            }
            Varied::Schedule => {
                let automatic = value.eq_ignore_ascii_case("automatic");
                job.schedule = (!automatic)
                    .then(|| SigmaSchedule::from_name(value))
                    .transpose()?;
            }
            Varied::ClipSkip => job.clip_skip = read("Clip skip", value)?,
            Varied::Width => job.width = read("Width", value)?,
            Varied::Height => job.height = read("Height", value)?,
            Varied::Size => {
                let (w, h) = value.split_once('x').unwrap_or((value, value));
                (job.width, job.height) = (read("Size", w)?, read("Size", h)?);
            }
            Varied::Replace => job.prompt = replace(&job.prompt, first, &self.values, index)?,
            Varied::ReplaceNegative => {
                job.negative = replace(&job.negative, first, &self.values, index)?;
            }
            Varied::Adapter => job.prompt = with_adapter(&job.prompt, value),
            Varied::Multiplier => {
                let weight: f64 = read("LoRA weight", value)?;
                job.prompt = with_weight(&job.prompt, weight)?;
            }
            Varied::VariationSeed => {
                let seed = read("Var. seed", value)?;
                let strength = job.variation.map_or(0.5, |v| v.strength);
                job.variation = Some(Variation { seed, strength });
            }
            Varied::VariationStrength => {
                let strength = read("Var. strength", value)?;
                let seed = job.variation.map_or(0, |v| v.seed);
                job.variation = Some(Variation { seed, strength });
            }
            Varied::Eta => job.options.eta = Some(read("Eta", value)?),
            Varied::EtaDelta => job.eta_delta = read("ENSD", value)?,
            Varied::ChurnMin => job.options.churn.s_tmin = read("Sigma min", value)?,
            Varied::ChurnMax => job.options.churn.s_tmax = read("Sigma max", value)?,
            Varied::ChurnNoise => job.options.churn.s_noise = read("Sigma noise", value)?,
            Varied::SkipNegative => {
                job.skip_negative_below = read("Negative Guidance minimum sigma", value)?;
            }
            Varied::NoiseSource => job.noise = NoiseSource::from_name(value)?,
            Varied::SgmNoise => {
                job.sgm_noise = match value.to_lowercase().as_str() {
                    "true" | "yes" | "1" => true,
                    "false" | "no" | "0" => false,
                    _ => {
                        return Err(Error::BadValue {
                            name: "SGM noise multiplier",
                            value: value.to_string(),
                            expected: "expected True or False",
                        });
                    }
                };
            }
            Varied::Order => job.prompt = reordered(&job.prompt, value)?,
            Varied::UniPcOrder => job.options.unipc_order = Some(read("UniPC Order", value)?),
            Varied::Churn => job.options.churn.s_churn = read("Sigma Churn", value)?,
            Varied::SigmaMin => job.sigmas.min = Some(read("Schedule min sigma", value)?),
            Varied::SigmaMax => job.sigmas.max = Some(read("Schedule max sigma", value)?),
            Varied::Rho => job.sigmas.rho = Some(read("Schedule rho", value)?),
            Varied::Emphasis => job.emphasis = Emphasis::from_name(value)?,
            Varied::HiresScale => {
                let hires = job.hires.get_or_insert_default();
                hires.scale = read("Hires scale", value)?;
            }
            Varied::HiresSteps => {
                let hires = job.hires.get_or_insert_default();
                hires.steps = read("Hires steps", value)?;
            }
            Varied::Strength => cell.strength = Some(read("Denoising", value)?),
            Varied::NoiseMultiplier => {
                cell.noise_multiplier = Some(read("Initial noise multiplier", value)?);
            }
            Varied::ExtraNoise => cell.extra_noise = Some(read("Extra noise", value)?),
            Varied::Model => cell.model = Some(value.to_string()),
            Varied::Vae => cell.vae = Some(value.to_string()),
            Varied::Styles => {
                let names = value.split(',').map(|name| name.trim().to_string());
                cell.styles = names.filter(|n| !n.is_empty() && n != "None").collect();
            }
            Varied::Nothing => {}
            Varied::HiresUpscaler => {
                let hires = job.hires.get_or_insert_default();
                hires.upscaler = Upscaler::from_name(value);
            }
        }
        Ok(())
    }
}

impl Varied {
    /// Whether `1-5` is a range for it.
    fn takes_numbers(self) -> bool {
        !matches!(
            self,
            Self::Sampler
                | Self::Schedule
                | Self::Size
                | Self::Replace
                | Self::ReplaceNegative
                | Self::Adapter
                | Self::Emphasis
                | Self::HiresUpscaler
                | Self::NoiseSource
                | Self::SgmNoise
                | Self::Order
                | Self::Model
                | Self::Vae
                | Self::Styles
                | Self::Nothing
        )
    }
}

fn read<T: std::str::FromStr>(name: &'static str, value: &str) -> Result<T> {
    value.trim().parse().map_err(|_| Error::BadValue {
        name,
        value: value.to_string(),
        expected: "expected a number",
    })
}

/// Values between commas; double quotes hold commas together.
fn split(list: &str) -> Vec<String> {
    let (mut values, mut value, mut quoted) = (Vec::new(), String::new(), false);
    for c in list.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => values.push(std::mem::take(&mut value)),
            c => value.push(c),
        }
    }
    values.push(value);
    values
        .iter()
        .map(|v| v.trim().to_string())
        .filter(|v| !v.is_empty())
        .collect()
}

/// `1-5`, `1-9 (+2)` or `0-1 [5]`.
fn range(text: &str) -> Option<Vec<String>> {
    static RANGE: OnceLock<Regex> = OnceLock::new();
    let pattern = RANGE.get_or_init(|| {
        Regex::new(
            r"^([-+]?[0-9.]+)\s*-\s*([-+]?[0-9.]+)(?:\s*\(([-+]?[0-9.]+)\s*\)|\s*\[([0-9]+)\])?$",
        )
        .expect("a constant pattern")
    });
    let found = pattern.captures(text)?;
    let number = |i: usize| found.get(i).and_then(|m| m.as_str().parse::<f64>().ok());
    let (from, to) = (number(1)?, number(2)?);
    let (count, step) = match (number(3), number(4)) {
        (_, Some(count)) => {
            let count = count.clamp(1.0, 10_000.0);
            (count as usize, (to - from) / (count - 1.0).max(1.0))
        }
        (step, None) => {
            let step = step.unwrap_or(if to >= from { 1.0 } else { -1.0 });
            let count = ((to - from) / step + 1e-9).floor() + 1.0;
            if step == 0.0 || !(1.0..=10_000.0).contains(&count) {
                return None;
            }
            (count as usize, step)
        }
    };
    let shown = |i: usize| {
        let value = from + step * i as f64;
        ((value * 1e6).round() / 1e6).to_string()
    };
    Some((0..count).map(shown).collect())
}

fn replace(prompt: &str, first: &str, values: &[String], index: usize) -> Result<String> {
    if !prompt.contains(first) {
        return Err(Error::Prompt {
            prompt: prompt.to_string(),
            what: format!("{first:?}, which the axis replaces, is not in it"),
        });
    }
    Ok(prompt.replace(first, values.get(index).map_or("", String::as_str)))
}

fn tag() -> &'static Regex {
    static TAG: OnceLock<Regex> = OnceLock::new();
    TAG.get_or_init(|| {
        Regex::new(r"<(lora|lyco):([^:>]+)((?::[^>]*)?)>").expect("a constant pattern")
    })
}

/// The first tag's name replaced; `None` takes the tag out. Without a tag, one is added.
fn with_adapter(prompt: &str, name: &str) -> String {
    let none = name.eq_ignore_ascii_case("none");
    match tag().captures(prompt) {
        None if none => prompt.to_string(),
        None => format!("{prompt}<lora:{name}:1>"),
        Some(found) => {
            let whole = found.get(0).map_or(0..0, |m| m.range());
            let new = if none {
                String::new()
            } else {
                format!("<{}:{name}{}>", &found[1], &found[3])
            };
            let mut changed = prompt.to_string();
            changed.replace_range(whole, &new);
            changed
        }
    }
}

/// All tags at one multiplier.
fn with_weight(prompt: &str, weight: f64) -> Result<String> {
    if !tag().is_match(prompt) {
        return Err(Error::Prompt {
            prompt: prompt.to_string(),
            what: "the axis changes the weight of a <lora:...> tag, and there is none".into(),
        });
    }
    let changed = tag().replace_all(prompt, |found: &regex::Captures<'_>| {
        let kept = found[3]
            .split(':')
            .filter(|argument| argument.starts_with("dyn=") || argument.starts_with("lbw="))
            .map(|argument| format!(":{argument}"));
        let kept: String = kept.collect();
        format!("<{}:{}:{weight}{kept}>", &found[1], &found[2])
    });
    Ok(changed.into_owned())
}

/// All orders of the parts of a prompt, each as one value.
fn orders(parts: &[String]) -> Result<Vec<String>> {
    if !(2..=5).contains(&parts.len()) {
        return Err(Error::BadValue {
            name: "Prompt order",
            value: parts.join(","),
            expected: "expected two to five parts of the prompt",
        });
    }
    let mut all: Vec<Vec<&str>> = vec![Vec::new()];
    for _ in parts {
        all = all.iter().flat_map(|order| longer(order, parts)).collect();
    }
    Ok(all.iter().map(|order| order.join(", ")).collect())
}

/// An order of some parts with each of the others behind it.
fn longer<'a>(order: &[&'a str], parts: &'a [String]) -> Vec<Vec<&'a str>> {
    let left = parts.iter().filter(|part| !order.contains(&part.as_str()));
    left.map(|part| [order, &[part]].concat()).collect()
}

/// The prompt with the named parts in this order at the places that they have in it.
fn reordered(prompt: &str, order: &str) -> Result<String> {
    let parts: Vec<&str> = order.split(", ").collect();
    let mut places = Vec::new();
    for part in &parts {
        let Some(at) = prompt.find(part) else {
            return Err(Error::Prompt {
                prompt: prompt.to_string(),
                what: format!("{part:?}, which the axis moves, is not in it"),
            });
        };
        places.push((at, part.len()));
    }
    places.sort_unstable();
    let (mut changed, mut end) = (String::new(), 0);
    for (part, (at, length)) in parts.iter().zip(places) {
        changed.push_str(prompt.get(end..at).unwrap_or_default());
        changed.push_str(part);
        end = at + length;
    }
    changed.push_str(prompt.get(end..).unwrap_or_default());
    Ok(changed)
}

/// One picture of a [`Sweep`]: a job, and what belongs to no job. What is `None` is as the
/// caller has it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Cell {
    /// What to draw.
    pub job: Txt2Img,
    /// The checkpoint's name.
    pub model: Option<String>,
    /// The VAE's name.
    pub vae: Option<String>,
    /// Names of [styles](crate::prompt::Styles) to put around the prompt.
    pub styles: Vec<String>,
    /// How much is drawn anew of a picture.
    pub strength: Option<f64>,
    /// Factor on the noise on a picture.
    pub noise_multiplier: Option<f64>,
    /// Noise added on a picture.
    pub extra_noise: Option<f64>,
}

impl Cell {
    /// The cell's job of drawing from a picture, the rest as in `base`.
    pub fn from_picture(&self, base: &Img2Img) -> Img2Img {
        Img2Img {
            job: self.job.clone(),
            strength: self.strength.unwrap_or(base.strength),
            noise_multiplier: self.noise_multiplier.unwrap_or(base.noise_multiplier),
            extra_noise: self.extra_noise.unwrap_or(base.extra_noise),
            ..base.clone()
        }
    }

    /// Checks what can be checked; `from_picture` says whether it is drawn from one.
    fn validate(&self, from_picture: bool) -> Result<()> {
        let strength = self.strength.filter(|_| self.job.hires.is_none());
        for (axis, value) in [
            ("Denoising", strength),
            ("Initial noise multiplier", self.noise_multiplier),
            ("Extra noise", self.extra_noise),
        ] {
            if value.is_some() && !from_picture {
                return Err(Error::BadValue {
                    name: "axis",
                    value: axis.to_string(),
                    expected: "it is about drawing from a picture, and there is none",
                });
            }
        }
        self.job.validate()
    }
}

/// A job with up to three axes.
///
/// ```
/// use lora_sd15::{Axis, Sweep, Txt2Img};
/// let base = Txt2Img { prompt: "zoe <lora:zoe:1>".into(), ..Default::default() };
/// let x = Axis::parse("LoRA weight=0.5-1 [3]")?;
/// let y = Axis::parse("Seed=1,2")?;
/// let sweep = Sweep::new(base, vec![x, y])?;
/// assert_eq!(sweep.cells().len(), 6);
/// assert_eq!(sweep.cells()[1].job.prompt, "zoe <lora:zoe:0.75>");
/// # Ok::<(), lora_sd15::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sweep {
    axes: Vec<Axis>,
    cells: Vec<Cell>,
}

impl Sweep {
    /// All combinations; the first axis goes to the right, the second down, the third makes
    /// further grids. Every cell is one picture.
    ///
    /// # Errors
    /// [`Error::BadValue`] for no or more than three axes, and for axes that only a picture
    /// to draw from has; as [`Txt2Img::validate`].
    pub fn new(base: Txt2Img, axes: Vec<Axis>) -> Result<Self> {
        Self::build(base, axes, false)
    }

    /// The same for drawing from a picture: see [`Cell::from_picture`].
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_picture(base: Txt2Img, axes: Vec<Axis>) -> Result<Self> {
        Self::build(base, axes, true)
    }

    fn build(base: Txt2Img, axes: Vec<Axis>, from_picture: bool) -> Result<Self> {
        if !(1..=3).contains(&axes.len()) {
            return Err(Error::BadValue {
                name: "axes",
                value: axes.len().to_string(),
                expected: "expected one to three",
            });
        }
        let total = axes.iter().map(Axis::len).product();
        let mut cells = Vec::new();
        for i in 0..total {
            let job = Txt2Img {
                batch_size: 1,
                ..base.clone()
            };
            let mut cell = Cell {
                job,
                ..Cell::default()
            };
            let mut rest: usize = i;
            for axis in &axes {
                axis.apply(rest % axis.len(), &mut cell)?;
                rest /= axis.len();
            }
            if let (Some(hires), Some(strength)) = (&mut cell.job.hires, cell.strength) {
                hires.strength = strength;
            }
            cell.validate(from_picture)?;
            cells.push(cell);
        }
        Ok(Self { axes, cells })
    }

    /// The cells, in the order that [`grids`](Self::grids) wants their pictures.
    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// Positions of all cells in an order in which each model is loaded once.
    pub fn drawing_order(&self) -> Vec<usize> {
        let file = |i: &usize| {
            let cell = self.cells.get(*i)?;
            let first = |other: &&Cell| (&other.model, &other.vae) == (&cell.model, &cell.vae);
            self.cells.iter().position(|other| first(&other))
        };
        let mut order: Vec<usize> = (0..self.cells.len()).collect();
        order.sort_by_key(file);
        order
    }

    /// Labelled grids of the pictures, one per value of the third axis.
    pub fn grids(&self, pictures: &[Image]) -> Vec<Grid> {
        let labels = |i: usize| -> Vec<String> {
            let axis = self.axes.get(i);
            axis.map_or_else(Vec::new, |a| (0..a.len()).map(|k| a.label(k)).collect())
        };
        let (columns, rows, sheets) = (labels(0), labels(1), labels(2));
        let (wide, high) = (columns.len().max(1), rows.len().max(1));
        (0..sheets.len().max(1))
            .map(|z| {
                let mut rows = rows.clone();
                if let Some(sheet) = sheets.get(z) {
                    match rows.first_mut() {
                        Some(first) => *first = format!("{sheet} / {first}"),
                        None => rows.push(sheet.clone()),
                    }
                }
                let cell = |y: usize, x: usize| pictures.get((z * high + y) * wide + x).cloned();
                Grid {
                    columns: columns.clone(),
                    rows,
                    cells: (0..high)
                        .map(|y| (0..wide).map(|x| cell(y, x)).collect())
                        .collect(),
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_lists_and_ranges() {
        let values = |text| Axis::parse(text).unwrap().values;
        assert_eq!(values("Steps=1-3, 10"), ["1", "2", "3", "10"]);
        assert_eq!(values("cfg scale=0-1 (+0.5)"), ["0", "0.5", "1"]);
        assert_eq!(values("Seed=5-1 (-2)"), ["5", "3", "1"]);
        assert_eq!(values("Prompt S/R=\"a, b\",1-2"), ["a, b", "1-2"]);
        assert_eq!(values("LoRA=zoe-1-2"), ["zoe-1-2"]);
    }

    #[test]
    fn adapters_and_words_are_replaced_in_prompts() {
        assert_eq!(
            with_adapter("a <lora:x:0.7:dyn=2>", "y"),
            "a <lora:y:0.7:dyn=2>"
        );
        assert_eq!(with_adapter("a <lora:x>", "None"), "a ");
        assert_eq!(
            with_weight("<lora:x:1:0.5:dyn=2>", 0.25).unwrap(),
            "<lora:x:0.25:dyn=2>"
        );
        let axis = Axis::parse("Prompt S/R=cat,dog").unwrap();
        let sweep = |prompt: &str| {
            let base = Txt2Img {
                prompt: prompt.into(),
                ..Txt2Img::default()
            };
            Sweep::new(base, vec![axis.clone()])
        };
        assert_eq!(sweep("a cat").unwrap().cells()[1].job.prompt, "a dog");
        assert!(sweep("a bird").is_err());
    }

    #[test]
    fn each_model_is_loaded_once() {
        let axes = ["Checkpoint name=a,b", "Seed=1,2"].map(|text| Axis::parse(text).unwrap());
        let sweep = Sweep::new(Txt2Img::default(), axes.to_vec()).unwrap();
        assert_eq!(sweep.drawing_order(), [0, 2, 1, 3]);
        let cell = &sweep.cells()[3];
        assert_eq!((cell.model.as_deref(), cell.job.seed), (Some("b"), 2));
    }

    #[test]
    fn any_seed_is_drawn_once_for_a_column() {
        let mut drawn = 40..;
        let mut any = || drawn.next().unwrap();
        let axes = ["Seed=-1,7,-1", "Steps=1,2"].map(|text| Axis::parse(text).unwrap());
        let axes = axes.map(|axis| axis.with_seeds(&mut any));
        let sweep = Sweep::new(Txt2Img::default(), axes.to_vec()).unwrap();
        let seeds: Vec<u64> = sweep.cells().iter().map(|cell| cell.job.seed).collect();
        assert_eq!(seeds, [40, 7, 41, 40, 7, 41]);
    }

    #[test]
    fn parts_of_a_prompt_change_places() {
        let axis = Axis::parse("Prompt order=red,hat,zoe").unwrap();
        let base = Txt2Img {
            prompt: "a red (hat:1.2), zoe!".into(),
            ..Txt2Img::default()
        };
        let sweep = Sweep::new(base, vec![axis]).unwrap();
        let prompts: Vec<&str> = sweep
            .cells()
            .iter()
            .map(|c| c.job.prompt.as_str())
            .collect();
        assert_eq!(prompts.len(), 6);
        assert_eq!(prompts[0], "a red (hat:1.2), zoe!");
        assert_eq!(prompts[5], "a zoe (hat:1.2), red!");
    }

    #[test]
    fn axes_of_drawing_from_a_picture_need_one() {
        let axes = || vec![Axis::parse("Denoising=0.3,0.6").unwrap()];
        assert!(Sweep::new(Txt2Img::default(), axes()).is_err());
        let with_hires = Txt2Img {
            hires: Some(Default::default()),
            ..Txt2Img::default()
        };
        let sweep = Sweep::new(with_hires, axes()).unwrap();
        let hires = sweep.cells()[1].job.hires.as_ref().unwrap();
        assert_eq!(hires.strength, 0.6);
        let base = Img2Img::new(Txt2Img::default(), Image::plain(64, 64, [0; 3]));
        let sweep = Sweep::from_picture(Txt2Img::default(), axes()).unwrap();
        assert_eq!(sweep.cells()[0].from_picture(&base).strength, 0.3);
    }
}
