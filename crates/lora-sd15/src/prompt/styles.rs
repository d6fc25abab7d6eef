//! Saved prompts (`styles.csv`) and comments in prompts.

use std::path::Path;

use crate::{Error, Result};

/// The web UI's styles: prompts under names, from a CSV file with the columns `name`,
/// `prompt` and `negative_prompt`.
///
/// ```
/// use lora_sd15::prompt::Styles;
/// let styles = Styles::parse("name,prompt,negative_prompt\nink,\"ink drawing of {prompt}, lines\",color\n")?;
/// let (mut prompt, mut negative) = ("zoe".to_string(), "lowres".to_string());
/// styles.apply("ink", &mut prompt, &mut negative)?;
/// assert_eq!(prompt, "ink drawing of zoe, lines");
/// assert_eq!(negative, "lowres, color");
/// # Ok::<(), lora_sd15::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Styles {
    /// Name, prompt and negative prompt.
    list: Vec<[String; 3]>,
}

impl Styles {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::Styles`] when it is no list of styles.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        Self::parse(&text).map_err(|error| match error {
            Error::Styles { what } => Error::Styles {
                what: format!("{}: {what}", path.display()),
            },
            other => other,
        })
    }

    /// Reads the text of a file. The column `text` of old files is `prompt`; others are
    /// passed over.
    ///
    /// # Errors
    /// [`Error::Styles`] without the columns `name` and `prompt`, and for an open quote.
    pub fn parse(text: &str) -> Result<Self> {
        let mut rows = rows(text.trim_start_matches('\u{feff}'))?.into_iter();
        let head = rows.next().unwrap_or_default();
        let column = |name: &str| head.iter().position(|field| field.trim() == name);
        let (Some(name), Some(prompt)) =
            (column("name"), column("prompt").or_else(|| column("text")))
        else {
            let what = "expected the columns name,prompt,negative_prompt in the first line".into();
            return Err(Error::Styles { what });
        };
        let negative = column("negative_prompt");
        let list = rows.map(|row| {
            let field = |at: usize| row.get(at).cloned().unwrap_or_default();
            let negative = negative.map_or_else(String::new, field);
            [field(name), field(prompt), negative]
        });
        Ok(Self {
            list: list.filter(|[name, ..]| !name.is_empty()).collect(),
        })
    }

    /// The names, in the order of the file.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.list.iter().map(|[name, ..]| name.as_str())
    }

    /// Puts a style around a prompt and its negative: in place of `{prompt}`, or behind.
    ///
    /// # Errors
    /// [`Error::UnknownName`].
    pub fn apply(&self, name: &str, prompt: &mut String, negative: &mut String) -> Result<()> {
        let Some([_, style, against]) = self.list.iter().find(|[n, ..]| n == name) else {
            return Err(Error::UnknownName {
                what: "style",
                name: name.to_string(),
                known: self.names().collect::<Vec<_>>().join(", "),
            });
        };
        *prompt = merged(style, prompt);
        *negative = merged(against, negative);
        Ok(())
    }
}

fn merged(style: &str, prompt: &str) -> String {
    if style.contains("{prompt}") {
        return style.replace("{prompt}", prompt);
    }
    let parts = [prompt.trim(), style.trim()];
    let given: Vec<&str> = parts.into_iter().filter(|p| !p.is_empty()).collect();
    given.join(", ")
}

/// The fields of a CSV text: in double quotes, fields may hold commas, line breaks and
/// doubled quotes.
fn rows(text: &str) -> Result<Vec<Vec<String>>> {
    let (mut rows, mut row, mut field) = (Vec::new(), Vec::new(), String::new());
    let mut quoted = false;
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '"' if quoted && letters.peek() == Some(&'"') => {
                letters.next();
                field.push('"');
            }
            '"' if quoted || field.is_empty() => quoted = !quoted,
            ',' if !quoted => row.push(std::mem::take(&mut field)),
            '\r' if !quoted => {}
            '\n' if !quoted => {
                row.push(std::mem::take(&mut field));
                rows.push(std::mem::take(&mut row));
            }
            other => field.push(other),
        }
    }
    if quoted {
        let what = "a quote is opened and never closed".into();
        return Err(Error::Styles { what });
    }
    if !field.is_empty() || !row.is_empty() {
        row.push(field);
        rows.push(row);
    }
    Ok(rows)
}

/// A prompt without its comments, which go from `#` to the end of the line.
///
/// ```
/// use lora_sd15::prompt::strip_comments;
/// assert_eq!(strip_comments("zoe, hat # red?\nsmile"), "zoe, hat \nsmile");
/// assert_eq!(strip_comments("# all of this\nzoe"), "\nzoe");
/// ```
pub fn strip_comments(prompt: &str) -> String {
    let lines = prompt.split('\n');
    let kept: Vec<&str> = lines
        .map(|line| line.split('#').next().unwrap_or(""))
        .collect();
    kept.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_web_ui_are_read() {
        let text = "\u{feff}name,text,negative_prompt,x\r\n\"a, b\",\"say \"\"hi\"\"\nthere\",,1\r\n,,\r\nlast,end";
        let styles = Styles::parse(text).unwrap();
        assert_eq!(styles.names().collect::<Vec<_>>(), ["a, b", "last"]);
        let apply = |name: &str| {
            let (mut prompt, mut negative) = (String::new(), "no".to_string());
            styles.apply(name, &mut prompt, &mut negative).unwrap();
            (prompt, negative)
        };
        assert_eq!(apply("a, b"), ("say \"hi\"\nthere".into(), "no".into()));
        assert_eq!(apply("last"), ("end".into(), "no".into()));
        for wrong in ["", "prompt\nx", "name,prompt\n\"x"] {
            assert!(Styles::parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
