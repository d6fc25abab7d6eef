//! `key=value` arguments whose values are Python literals.

use serde_json::{Map, Number, Value};

use crate::error::{Error, Result};

/// Reads arguments as sd-scripts does: `weight_decay=0.01`, `betas=0.9,0.99`,
/// `decouple=True`, `y=None`, `name='text'`, `(1,2)`, `[1,2]`. A single argument that
/// holds several (a GUI's text field) is split at spaces outside quotes. Beyond the
/// reference, `inf` is a number (written as the text "inf").
///
/// ```
/// use lora_optim::kohya::parse_args;
/// let options = parse_args(&["betas=0.9,0.99 decouple=True".to_string()])?;
/// assert_eq!(serde_json::Value::Object(options).to_string(), r#"{"betas":[0.9,0.99],"decouple":true}"#);
/// # Ok::<(), lora_optim::Error>(())
/// ```
///
/// # Errors
/// [`Error::Argument`] for a missing or second `=`, and for words that are no literals
/// (`true`, `yes`): text needs quotes, and truth values are `True` and `False`.
pub fn parse_args(args: &[String]) -> Result<Map<String, Value>> {
    let mut out = Map::new();
    for argument in args.iter().flat_map(|a| split_outside_quotes(a)) {
        let argument = strip_quotes(&argument);
        let fail = |problem: &str| Error::Argument {
            argument: argument.to_string(),
            problem: problem.to_string(),
        };
        let (key, value) = argument
            .split_once('=')
            .ok_or_else(|| fail("expected key=value"))?;
        let mut reader = Reader {
            text: value,
            argument,
        };
        let parsed = reader.list()?;
        if !reader.text.is_empty() {
            return Err(fail("expected one Python literal after the first ="));
        }
        out.insert(key.trim().to_string(), parsed);
    }
    Ok(out)
}

/// Pieces between spaces, quotes and brackets respected.
fn split_outside_quotes(text: &str) -> Vec<String> {
    let mut pieces = vec![String::new()];
    let mut quote = None;
    let mut depth = 0i32;
    for c in text.chars() {
        match (quote, c) {
            (Some(q), _) if c == q => quote = None,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(c),
            (None, '(' | '[') => depth += 1,
            (None, ')' | ']') => depth -= 1,
            (None, _) if c.is_whitespace() && depth <= 0 => {
                pieces.push(String::new());
                continue;
            }
            _ => {}
        }
        if let Some(piece) = pieces.last_mut() {
            piece.push(c);
        }
    }
    // `key = value` and `0.9, 0.99` belong together: only a piece with its own key starts anew.
    let mut out: Vec<String> = Vec::new();
    for piece in pieces.into_iter().filter(|p| !p.is_empty()) {
        match out.last_mut() {
            Some(last)
                if !piece.contains('=')
                    || last.ends_with('=')
                    || piece.starts_with('=')
                    || !last.contains('=') =>
            {
                last.push_str(&piece)
            }
            _ => out.push(piece),
        }
    }
    out
}

/// `"weight_decay=0.01"` as it stands in a shell command or a GUI field.
fn strip_quotes(text: &str) -> &str {
    for quote in ['"', '\''] {
        if let Some(inner) = text.strip_prefix(quote).and_then(|t| t.strip_suffix(quote))
            && inner.contains('=')
        {
            return inner;
        }
    }
    text
}

struct Reader<'a> {
    text: &'a str,
    argument: &'a str,
}

impl Reader<'_> {
    fn fail<T>(&self, problem: impl Into<String>) -> Result<T> {
        Err(Error::Argument {
            argument: self.argument.to_string(),
            problem: problem.into(),
        })
    }

    fn skip_space(&mut self) {
        self.text = self.text.trim_start();
    }

    fn accept(&mut self, c: char) -> bool {
        self.skip_space();
        match self.text.strip_prefix(c) {
            Some(rest) => {
                self.text = rest;
                true
            }
            None => false,
        }
    }

    /// A literal, or several with commas between: a tuple without brackets.
    fn list(&mut self) -> Result<Value> {
        let first = self.value()?;
        if !self.accept(',') {
            return Ok(first);
        }
        let mut items = vec![first];
        self.skip_space();
        while !self.text.is_empty() {
            items.push(self.value()?);
            if !self.accept(',') {
                break;
            }
            self.skip_space();
        }
        Ok(Value::Array(items))
    }

    fn items(&mut self, close: char) -> Result<(Vec<Value>, bool)> {
        let (mut items, mut comma) = (Vec::new(), false);
        loop {
            if self.accept(close) {
                return Ok((items, comma));
            }
            items.push(self.value()?);
            comma = self.accept(',');
            if !comma {
                return if self.accept(close) {
                    Ok((items, false))
                } else {
                    self.fail(format!("expected , or {close}"))
                };
            }
        }
    }

    fn value(&mut self) -> Result<Value> {
        self.skip_space();
        if self.accept('[') {
            return Ok(Value::Array(self.items(']')?.0));
        }
        if self.accept('(') {
            let (mut items, comma) = self.items(')')?;
            // (0.5) is a number, (0.5,) a tuple.
            return Ok(if items.len() == 1 && !comma {
                items.remove(0)
            } else {
                Value::Array(items)
            });
        }
        if let Some(quote) = self.text.chars().next().filter(|c| matches!(c, '\'' | '"')) {
            let inner = &self.text[1..];
            let Some(end) = inner.find(quote) else {
                return self.fail(format!("expected a closing {quote}"));
            };
            self.text = &inner[end + 1..];
            return Ok(Value::String(inner[..end].to_string()));
        }
        let end = self
            .text
            .find(|c: char| c == ',' || c == ')' || c == ']' || c.is_whitespace())
            .unwrap_or(self.text.len());
        let word = &self.text[..end];
        let value = match word {
            "True" => Value::Bool(true),
            "False" => Value::Bool(false),
            "None" => Value::Null,
            "inf" | "-inf" => Value::String(word.to_string()),
            _ => match number(word) {
                Some(number) => Value::Number(number),
                None => return self.fail(unreadable(word)),
            },
        };
        self.text = &self.text[end..];
        self.skip_space();
        Ok(value)
    }
}

fn number(word: &str) -> Option<Number> {
    let word = word.strip_prefix('+').unwrap_or(word).replace('_', "");
    if !word.starts_with(|c: char| c.is_ascii_digit() || c == '-' || c == '.') {
        return None;
    }
    word.parse::<i64>()
        .map(Number::from)
        .ok()
        .or_else(|| word.parse::<f64>().ok().and_then(Number::from_f64))
}

fn unreadable(word: &str) -> String {
    match word.to_lowercase().as_str() {
        "true" | "false" => format!("{word} is not a Python literal: write True or False"),
        "none" | "null" => format!("{word} is not a Python literal: write None"),
        "" => "the value is missing".to_string(),
        _ => format!("{word} is not a Python literal: text needs quotes ('{word}')"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> String {
        match parse_args(&[text.to_string()]) {
            Ok(map) => Value::Object(map).to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn literals_are_read_as_python_reads_them() {
        assert_eq!(
            parse("a=1 b=-2.5e-3 c=True d=None"),
            r#"{"a":1,"b":-0.0025,"c":true,"d":null}"#
        );
        assert_eq!(parse("betas=(0.9, 0.99)"), r#"{"betas":[0.9,0.99]}"#);
        assert_eq!(
            parse("betas=0.9, 0.99 x=[1]"),
            r#"{"betas":[0.9,0.99],"x":[1]}"#
        );
        assert_eq!(parse("x=(1)"), r#"{"x":1}"#);
        assert_eq!(parse("x=1,"), r#"{"x":[1]}"#);
        assert_eq!(
            parse("\"betas=0.9,0.99\" 'decouple=True'"),
            r#"{"betas":[0.9,0.99],"decouple":true}"#
        );
        assert_eq!(parse("rules='1:10, 0.1'"), r#"{"rules":"1:10, 0.1"}"#);
        assert_eq!(parse("growth_rate=inf"), r#"{"growth_rate":"inf"}"#);
    }

    #[test]
    fn errors_say_how_to_write_it() {
        assert!(parse("x=true").contains("write True or False"));
        assert!(parse("x=cosine").contains("'cosine'"));
        assert!(parse("x").contains("expected key=value"));
        assert!(parse("a=b=c").contains("a=b=c"));
        assert!(parse("a=(1,2").contains(')'));
        assert!(parse("a=").contains("missing"));
    }
}
