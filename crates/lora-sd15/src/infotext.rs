//! The `parameters` text that the web UI writes into its pictures.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::OnceLock;

use exif::{In, Reader, Tag, Value};
use regex::Regex;

use crate::{Error, Image, Result};

/// `Key: value` pairs below a prompt, in the web UI's order as given.
///
/// ```
/// let text = lora_sd15::infotext("1girl", "lowres", &[("Steps", "20".into()), ("Model", "a, b".into())]);
/// assert_eq!(text, "1girl\nNegative prompt: lowres\nSteps: 20, Model: \"a, b\"");
/// ```
pub fn infotext(prompt: &str, negative: &str, parameters: &[(&str, String)]) -> String {
    let mut text = prompt.to_string();
    if !negative.is_empty() {
        text.push_str("\nNegative prompt: ");
        text.push_str(negative);
    }
    let pairs: Vec<String> = parameters
        .iter()
        .map(|(key, value)| format!("{key}: {}", quote(value)))
        .collect();
    text.push('\n');
    text.push_str(&pairs.join(", "));
    text.trim().to_string()
}

/// Values that would break the list are written as JSON strings.
fn quote(value: &str) -> String {
    if value.contains([',', ':', '\n']) {
        serde_json::Value::from(value).to_string()
    } else {
        value.to_string()
    }
}

/// A `parameters` text, taken apart.
///
/// ```
/// use lora_sd15::Infotext;
/// let text = Infotext::parse("1girl\nNegative prompt: lowres\nSteps: 20, Seed: 7, Size: 512x768");
/// assert_eq!((text.prompt.as_str(), text.negative.as_str()), ("1girl", "lowres"));
/// assert_eq!((text.get("Seed"), text.get("Size-2")), (Some("7"), Some("768")));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Infotext {
    /// What was drawn.
    pub prompt: String,
    /// What was avoided.
    pub negative: String,
    /// Everything else; `Size: WxH` is stored as `Size-1` and `Size-2`.
    pub parameters: BTreeMap<String, String>,
}

impl Infotext {
    /// The text that a picture's file holds: a PNG's `parameters`, or the comment in the EXIF
    /// data of a JPEG or WebP.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Picture`] when it is no such
    /// picture or has no text.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let wrong = |what: &str| Error::Picture {
            what: format!("{}: {what}", path.display()),
        };
        let mut file = BufReader::new(File::open(path).map_err(Error::io(path))?);
        let is_png = file
            .fill_buf()
            .map_err(Error::io(path))?
            .starts_with(b"\x89PNG");
        let text = match is_png {
            true => Image::open_png_with_text(path)?.1,
            false => comment(&mut file).map_err(|what| wrong(&what))?,
        };
        let text = text.ok_or_else(|| {
            wrong("it has no parameters text, which many programs drop; give the options by hand")
        })?;
        Ok(Self::parse(&text))
    }

    /// Reads a text as the web UI does. Never fails: what is no list of parameters is part
    /// of the prompt.
    pub fn parse(text: &str) -> Self {
        static PAIR: OnceLock<Regex> = OnceLock::new();
        static SIZE: OnceLock<Regex> = OnceLock::new();
        let pair = PAIR.get_or_init(|| {
            Regex::new(r#"\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)"#)
                .expect("a constant pattern")
        });
        let size =
            SIZE.get_or_init(|| Regex::new(r"^([0-9]+)x([0-9]+)$").expect("a constant pattern"));
        let mut lines: Vec<&str> = text.trim().split('\n').collect();
        let last = lines.pop().unwrap_or("");
        let mut parameters = BTreeMap::new();
        if pair.find_iter(last).count() < 3 {
            lines.push(last);
        } else {
            for found in pair.captures_iter(last) {
                let (key, value) = (&found[1], unquote(&found[2]));
                if let Some(sides) = size.captures(&value) {
                    for (i, side) in [(1, &sides[1]), (2, &sides[2])] {
                        parameters.insert(format!("{key}-{i}"), side.to_string());
                    }
                } else if !value.is_empty() {
                    parameters.insert(key.to_string(), value);
                }
            }
        }
        let (mut prompt, mut negative) = (Vec::new(), Vec::new());
        let mut negated = false;
        for line in lines.into_iter().map(str::trim) {
            let rest = line.strip_prefix("Negative prompt:");
            negated |= rest.is_some();
            let part = if negated { &mut negative } else { &mut prompt };
            // As there: no line break before the first text that is not empty.
            if !part.is_empty() && part.iter().any(|l: &&str| !l.is_empty()) {
                part.push("\n");
            }
            part.push(rest.map_or(line, str::trim));
        }
        Self {
            prompt: prompt.concat(),
            negative: negative.concat(),
            parameters,
        }
    }

    /// What the picture was drawn with according to its text and is not what it would be
    /// drawn with now: model, VAE, adapters and embeddings by their hashes. `now` are the
    /// same parameters as a picture drawn now would get.
    ///
    /// ```
    /// use lora_sd15::Infotext;
    /// let text = Infotext::parse("zoe\nSteps: 20, Model hash: 6ce0161689, Lora hashes: \"zoe: 1234, hat: 5678\"");
    /// let now = [("Model hash", "6ce0161689".to_string()), ("Lora hashes", "hat: 5678, zoe: 4321".into())];
    /// assert_eq!(text.mismatches(&now), ["zoe: the picture's has the hash 1234, this one 4321"]);
    /// ```
    pub fn mismatches(&self, now: &[(&str, String)]) -> Vec<String> {
        let current = |key: &str| now.iter().find(|(k, _)| *k == key).map(|(_, v)| v.as_str());
        let mut list = Vec::new();
        for (what, key) in [("model", "Model hash"), ("VAE", "VAE hash")] {
            match (self.get(key), current(key)) {
                (Some(then), Some(now)) => list.extend(differing(what, then, now)),
                (Some(then), None) => {
                    list.push(format!("{what}: the picture's has the hash {then}, this one none"));
                }
                (None, Some(now)) if key == "VAE hash" => list.push(format!(
                    "{what}: the picture was drawn without one of its own, this one has the hash {now}"
                )),
                (None, _) => {}
            }
        }
        for key in ["Lora hashes", "TI hashes"] {
            let now = current(key).unwrap_or_default();
            for (name, then) in pairs(self.get(key).unwrap_or_default()) {
                let same = pairs(now).find(|(n, _)| *n == name);
                list.extend(same.and_then(|(_, now)| differing(name, then, now)));
            }
        }
        list
    }

    /// One parameter.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.parameters.get(key).map(String::as_str)
    }
}

/// The comment in a picture's EXIF data (`UserComment`), if it has one: eight bytes name the
/// encoding of what follows.
fn comment(file: &mut BufReader<File>) -> std::result::Result<Option<String>, String> {
    let exif = match Reader::new().read_from_container(file) {
        Ok(exif) => exif,
        Err(exif::Error::NotFound(_)) => return Ok(None),
        Err(error) => return Err(format!("{error}; expected a PNG, JPEG or WebP file")),
    };
    let field = exif.get_field(Tag::UserComment, In::PRIMARY);
    let Some(Value::Undefined(bytes, _)) = field.map(|field| &field.value) else {
        return Ok(None);
    };
    let (encoding, text) = bytes.split_at_checked(8).unwrap_or_default();
    let text = match encoding {
        b"UNICODE\0" => utf16(text),
        b"ASCII\0\0\0" | [0, 0, 0, 0, 0, 0, 0, 0] => String::from_utf8_lossy(text).into_owned(),
        [] => return Ok(None),
        _ => return Err("its comment is neither Unicode nor ASCII; save it as PNG".into()),
    };
    Ok(Some(text.trim_matches(['\0', '\u{feff}']).to_string()))
}

/// UTF-16 whose byte order nothing tells for sure: the web UI writes the high byte first,
/// others follow the file's. In the list of parameters most high bytes are 0.
fn utf16(bytes: &[u8]) -> String {
    let (pairs, _) = bytes.as_chunks::<2>();
    let zeros = |at: usize| pairs.iter().filter(|pair| pair[at] == 0).count();
    let number = match zeros(0) >= zeros(1) {
        true => u16::from_be_bytes,
        false => u16::from_le_bytes,
    };
    let units: Vec<u16> = pairs.iter().map(|pair| number(*pair)).collect();
    String::from_utf16_lossy(&units)
}

/// A message when neither hash is the beginning of the other.
fn differing(what: &str, then: &str, now: &str) -> Option<String> {
    let same = then.starts_with(now) || now.starts_with(then);
    (!same).then(|| format!("{what}: the picture's has the hash {then}, this one {now}"))
}

/// `name: hash, name: hash`.
fn pairs(list: &str) -> impl Iterator<Item = (&str, &str)> {
    let pair = |item| str::rsplit_once(item, ':');
    list.split(',')
        .filter_map(pair)
        .map(|(name, hash)| (name.trim(), hash.trim()))
}

/// JSON strings are read; others stay as they are.
fn unquote(value: &str) -> String {
    if value.starts_with('"') && value.ends_with('"') {
        serde_json::from_str(value).unwrap_or_else(|_| value.to_string())
    } else {
        value.to_string()
    }
}

#[cfg(test)]
mod tests {
    use exif::Field;
    use exif::experimental::Writer;

    use super::*;

    /// EXIF data with nothing but this comment.
    fn exif(comment: Vec<u8>) -> Vec<u8> {
        let field = Field {
            tag: Tag::UserComment,
            ifd_num: In::PRIMARY,
            value: Value::Undefined(comment, 0),
        };
        let mut writer = Writer::new();
        writer.push_field(&field);
        let mut bytes = std::io::Cursor::new(Vec::new());
        writer.write(&mut bytes, false).unwrap();
        bytes.into_inner()
    }

    fn jpeg(exif: &[u8]) -> Vec<u8> {
        let length = (exif.len() as u16 + 8).to_be_bytes();
        let head: [&[u8]; 4] = [b"\xff\xd8\xff\xe1", &length, b"Exif\0\0", exif];
        [&head.concat()[..], b"\xff\xd9"].concat()
    }

    fn webp(exif: &[u8]) -> Vec<u8> {
        let mut chunk = exif.to_vec();
        chunk.resize(exif.len().next_multiple_of(2), 0);
        let (whole, length) = (chunk.len() as u32 + 12, exif.len() as u32);
        let (whole, length) = (whole.to_le_bytes(), length.to_le_bytes());
        let parts: [&[u8]; 6] = [b"RIFF", &whole, b"WEBP", b"EXIF", &length, &chunk];
        parts.concat()
    }

    #[test]
    fn pictures_of_every_format_tell_how_they_were_drawn() {
        let text = "zoe, \u{732b}\nNegative prompt: lowres\nSteps: 20, Seed: 7, Size: 512x768";
        let units = || text.encode_utf16();
        let big: Vec<u8> = units().flat_map(u16::to_be_bytes).collect();
        let little: Vec<u8> = units().flat_map(u16::to_le_bytes).collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("picture");
        let image = Image::plain(8, 8, [0; 3]);
        for bytes in [
            jpeg(&exif([b"UNICODE\0", &big[..]].concat())),
            jpeg(&exif([b"UNICODE\0", &little[..]].concat())),
            jpeg(&exif([b"\0\0\0\0\0\0\0\0", text.as_bytes()].concat())),
            webp(&exif([b"UNICODE\0", &big[..]].concat())),
            image.to_png(Some(text)).unwrap(),
        ] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(Infotext::open(&path).unwrap(), Infotext::parse(text));
        }
        for (bytes, says) in [
            (b"\xff\xd8\xff\xd9".to_vec(), "no parameters text"),
            (image.to_png(None).unwrap(), "no parameters text"),
            (jpeg(&exif(b"JIS\0\0\0\0\0zoe".to_vec())), "save it as PNG"),
            (b"hello".to_vec(), "expected a PNG, JPEG or WebP"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = Infotext::open(&path).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("picture"), "{error}");
        }
    }
}
