//! Sample pictures during training, from sd-scripts' prompt files.

use std::path::Path;

use lora_sd15::{SamplerKind, Txt2Img};
use serde_json::{Map, Value};

use crate::config::bad;
use crate::{Error, Result};

/// The samplers by sd-scripts' names, and the one of this project that each stands for.
const SAMPLERS: &[(&str, &str)] = &[
    ("ddim", "DDIM"),
    ("pndm", "PLMS"),
    ("lms", "LMS"),
    ("k_lms", "LMS"),
    ("euler", "Euler"),
    ("k_euler", "Euler"),
    ("euler_a", "Euler a"),
    ("k_euler_a", "Euler a"),
    ("heun", "Heun"),
    ("dpm_2", "DPM2"),
    ("k_dpm_2", "DPM2"),
    ("dpm_2_a", "DPM2 a"),
    ("k_dpm_2_a", "DPM2 a"),
    ("dpmsolver", "DPM++ 2M"),
    ("dpmsolver++", "DPM++ 2M"),
    ("dpmsingle", "DPM++ 2S a"),
];

/// One picture to draw while training. Names and defaults are sd-scripts'.
///
/// ```
/// use lora_train::SamplePrompt;
/// let prompt = SamplePrompt::from_line("zoe, smile --n lowres --w 512 --h 768 --d 42 --s 28", "ddim")?;
/// assert_eq!((prompt.width, prompt.height, prompt.seed), (512, 768, Some(42)));
/// assert_eq!(prompt.negative_prompt, "lowres");
/// # Ok::<(), lora_train::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct SamplePrompt {
    /// What to draw.
    pub prompt: String,
    /// What to avoid.
    pub negative_prompt: String,
    /// Width in pixels, a multiple of 8.
    pub width: usize,
    /// Height in pixels, a multiple of 8.
    pub height: usize,
    /// Seed; a new one each time when absent.
    pub seed: Option<u64>,
    /// Classifier-free guidance.
    pub scale: f64,
    /// Denoising steps.
    pub sample_steps: usize,
    /// sd-scripts' name of the sampler.
    pub sample_sampler: String,
}

impl SamplePrompt {
    /// One line of a `.txt` file: the prompt, then options such as `--n` and `--w`.
    ///
    /// # Errors
    /// For options of other models, and values that cannot be used.
    pub fn from_line(line: &str, sampler: &str) -> Result<Self> {
        Self::from_map(&line_options(line), sampler)
    }

    /// From the keys of sd-scripts' JSON and TOML files.
    ///
    /// # Errors
    /// For unknown keys and values of the wrong type.
    pub fn from_map(options: &Map<String, Value>, sampler: &str) -> Result<Self> {
        let mut prompt = Self {
            prompt: String::new(),
            negative_prompt: String::new(),
            width: 512,
            height: 512,
            seed: None,
            scale: 7.5,
            sample_steps: 30,
            sample_sampler: sampler.to_string(),
        };
        for (key, value) in options {
            prompt.set(key, value)?;
        }
        prompt.width = (prompt.width / 8 * 8).max(64);
        prompt.height = (prompt.height / 8 * 8).max(64);
        prompt.request(1)?.validate()?;
        Ok(prompt)
    }

    fn set(&mut self, key: &str, value: &Value) -> Result<()> {
        let wrong = |wanted: &str| {
            bad::<()>(format!(
                "sample_prompts: {key}: expected {wanted}, got {value}"
            ))
        };
        let text = value.as_str();
        let count = value.as_u64();
        match key {
            "prompt" => match text {
                Some(text) => self.prompt = text.to_string(),
                None => return wrong("text"),
            },
            "negative_prompt" => match text {
                Some(text) => self.negative_prompt = text.to_string(),
                None => return wrong("text"),
            },
            "width" | "height" | "sample_steps" => {
                let Some(count) = count.and_then(|n| usize::try_from(n).ok()) else {
                    return wrong("a whole number");
                };
                match key {
                    "width" => self.width = count,
                    "height" => self.height = count,
                    _ => self.sample_steps = count.clamp(1, 1000),
                }
            }
            "seed" => match count {
                Some(seed) => self.seed = Some(seed),
                None => return wrong("a whole number"),
            },
            "scale" => match value.as_f64() {
                Some(scale) => self.scale = scale,
                None => return wrong("a number"),
            },
            "sample_sampler" => match text {
                Some(text) => self.sample_sampler = text.to_string(),
                None => return wrong("text"),
            },
            // sd-scripts numbers its prompts with these while it works.
            "enum" | "subset" => {}
            "guidance_scale" | "controlnet_image" | "cfg_trunc_ratio" | "renorm_cfg"
            | "flow_shift" => {
                return bad(format!(
                    "sample_prompts: {key} belongs to other models; leave it out"
                ));
            }
            _ => return bad(format!("sample_prompts: unknown key {key:?}")),
        }
        Ok(())
    }

    /// The picture job; the seed is 0 where none is given.
    ///
    /// # Errors
    /// For a sampler that is not known or not available.
    pub fn request(&self, clip_skip: usize) -> Result<Txt2Img> {
        let wanted = self.sample_sampler.to_lowercase();
        let Some((_, name)) = SAMPLERS.iter().find(|(name, _)| *name == wanted) else {
            let known: Vec<&str> = SAMPLERS.iter().map(|(name, _)| *name).collect();
            return bad(format!(
                "sample_sampler {:?}: expected one of {}",
                self.sample_sampler,
                known.join(", ")
            ));
        };
        let (sampler, schedule) = SamplerKind::from_name(name)?;
        Ok(Txt2Img {
            prompt: self.prompt.clone(),
            negative: self.negative_prompt.clone(),
            width: self.width,
            height: self.height,
            steps: self.sample_steps,
            guidance_scale: self.scale,
            seed: self.seed.unwrap_or(0),
            sampler,
            schedule,
            clip_skip,
            ..Txt2Img::default()
        })
    }
}

/// Reads a file of sample prompts: `.txt` (one per line, `#` for comments), `.toml`
/// (`[prompt]` with `[[prompt.subset]]`) or `.json` (a list).
///
/// # Errors
/// [`Error::Io`] for a file that cannot be read, [`Error::Config`] for one that cannot be
/// understood.
pub fn read_sample_prompts(path: &Path, sampler: &str) -> Result<Vec<SamplePrompt>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let text = text.trim_start_matches('\u{feff}');
    let place = |what: String| Error::Config {
        place: path.display().to_string(),
        what,
    };
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    let maps = match extension.to_lowercase().as_str() {
        "toml" => {
            let table: Value = toml::from_str(text).map_err(|e| place(e.to_string()))?;
            toml_prompts(&table).map_err(place)?
        }
        "json" => {
            let list: Value = serde_json::from_str(text).map_err(|e| place(e.to_string()))?;
            json_prompts(&list).map_err(place)?
        }
        _ => text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(line_options)
            .collect(),
    };
    if maps.is_empty() {
        return Err(place("there is no prompt in it".into()));
    }
    maps.iter()
        .map(|map| SamplePrompt::from_map(map, sampler))
        .collect()
}

fn toml_prompts(table: &Value) -> std::result::Result<Vec<Map<String, Value>>, String> {
    let Some(Value::Object(defaults)) = table.get("prompt") else {
        return Err("expected a [prompt] table".into());
    };
    let mut defaults = defaults.clone();
    let subsets = match defaults.remove("subset") {
        None => return Ok(vec![defaults]),
        Some(Value::Array(subsets)) => subsets,
        Some(_) => return Err("expected [[prompt.subset]] tables".into()),
    };
    subsets
        .into_iter()
        .map(|subset| match subset {
            Value::Object(own) => {
                let mut map = defaults.clone();
                map.extend(own);
                Ok(map)
            }
            _ => Err("expected [[prompt.subset]] tables".into()),
        })
        .collect()
}

fn json_prompts(list: &Value) -> std::result::Result<Vec<Map<String, Value>>, String> {
    let Value::Array(items) = list else {
        return Err("expected a list of prompts".into());
    };
    items
        .iter()
        .map(|item| match item {
            Value::String(line) => Ok(line_options(line)),
            Value::Object(map) => Ok(map.clone()),
            other => Err(format!("expected text or an object, got {other}")),
        })
        .collect()
}

/// The options of one line under sd-scripts' key names.
///
/// The text itself is tried as an option too, and what cannot be read is passed over, both
/// as sd-scripts does.
pub fn line_options(line: &str) -> Map<String, Value> {
    let mut map = Map::new();
    let parts: Vec<&str> = line.split(" --").collect();
    map.insert("prompt".into(), parts.first().copied().unwrap_or("").into());
    for part in parts {
        let Some((name, rest)) = part.split_once(' ') else {
            continue;
        };
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        let decimal: String = rest
            .chars()
            .take_while(|c| c.is_ascii_digit() || *c == '.')
            .collect();
        let whole = digits.parse::<u64>().ok().map(Value::from);
        let number = decimal.parse::<f64>().ok().map(Value::from);
        let text = (!rest.is_empty()).then(|| Value::from(rest));
        let (key, value) = match name.to_lowercase().as_str() {
            "w" => ("width", whole),
            "h" => ("height", whole),
            "d" => ("seed", whole),
            "s" => {
                let steps = digits.parse::<u64>().ok();
                ("sample_steps", steps.map(|n| Value::from(n.clamp(1, 1000))))
            }
            "l" => ("scale", number),
            "n" => ("negative_prompt", text),
            "ss" => ("sample_sampler", text),
            "g" => ("guidance_scale", number),
            "cn" => ("controlnet_image", text),
            "ctr" => ("cfg_trunc_ratio", number),
            "rcfg" => ("renorm_cfg", number),
            "fs" => ("flow_shift", number),
            _ => continue,
        };
        if let Some(value) = value {
            map.insert(key.into(), value);
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_file_forms_say_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            read_sample_prompts(&path, "euler_a").unwrap()
        };
        let lines = write(
            "p.txt",
            "# two\n\nzoe --w 128 --h 130\nzoe, hat --w 128 --h 130 --d 3\n",
        );
        assert_eq!(lines.len(), 2);
        assert_eq!((lines[1].height, lines[1].seed), (128, Some(3)));
        let table = "[prompt]\nwidth = 128\nheight = 130\n[[prompt.subset]]\nprompt = \"zoe\"\n[[prompt.subset]]\nprompt = \"zoe, hat\"\nseed = 3\n";
        assert_eq!(write("p.toml", table), lines);
        let list = r#"["zoe --w 128 --h 130", {"prompt": "zoe, hat", "width": 128, "height": 130, "seed": 3}]"#;
        assert_eq!(write("p.json", list), lines);
    }

    #[test]
    fn every_sampler_of_sd_scripts_is_there() {
        for (name, _) in SAMPLERS {
            let prompt = SamplePrompt::from_line("zoe", name).unwrap();
            prompt.request(2).unwrap().validate().unwrap();
        }
    }

    #[test]
    fn options_of_other_models_and_unknown_keys_are_named() {
        for (line, hint) in [
            ("zoe --g 3.5", "guidance_scale"),
            ("zoe --ss magic", "magic"),
        ] {
            let error = SamplePrompt::from_line(line, "ddim").unwrap_err();
            assert!(error.to_string().contains(hint), "{error}");
        }
    }
}
