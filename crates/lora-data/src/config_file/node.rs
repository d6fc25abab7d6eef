//! A parsed config as one kind of tree, whatever its syntax, with line numbers.

use serde_json::Value as Json;
use toml::de::{DeTable, DeValue};

use crate::ConfigFault;

/// A value and the line it stands on.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) line: Option<usize>,
    pub(super) value: Value,
}

#[derive(Debug, Clone)]
pub(super) enum Value {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Table(Vec<(String, Node)>),
    /// JSON's null, which counts as absent.
    Null,
    /// Anything no option accepts.
    Other(&'static str),
}

impl Node {
    pub(super) fn entries(&self) -> &[(String, Node)] {
        match &self.value {
            Value::Table(entries) => entries,
            _ => &[],
        }
    }

    /// An entry that is there and not null.
    pub(super) fn get(&self, key: &str) -> Option<&Node> {
        let entry = self.entries().iter().find(|(name, _)| name == key)?;
        Some(&entry.1).filter(|node| !matches!(node.value, Value::Null))
    }

    pub(super) fn items(&self) -> &[Node] {
        match &self.value {
            Value::List(items) => items,
            _ => &[],
        }
    }

    /// The kind of value in words, with the value where it is short.
    pub(super) fn describe(&self) -> String {
        match &self.value {
            Value::Bool(value) => format!("the truth value {value}"),
            Value::Int(value) => format!("the whole number {value}"),
            Value::Float(value) => format!("the number {value:?}"),
            Value::Text(value) => format!("the text \"{value}\""),
            Value::List(_) => "a list".into(),
            Value::Table(_) => "a table".into(),
            Value::Null => "null".into(),
            Value::Other(kind) => (*kind).into(),
        }
    }
}

pub(super) fn from_toml(text: &str) -> Result<Node, ConfigFault> {
    let lines = LineIndex::new(text);
    let root = DeTable::parse(text).map_err(|error| ConfigFault {
        line: error.span().map(|span| lines.line(span.start)),
        key: "TOML".into(),
        what: error.message().to_owned(),
    })?;
    Ok(Node {
        line: Some(1),
        value: toml_table(root.get_ref(), &lines),
    })
}

fn toml_table(table: &DeTable<'_>, lines: &LineIndex) -> Value {
    let entry = |(key, value): (&toml::Spanned<_>, &toml::Spanned<DeValue<'_>>)| {
        let line = Some(lines.line(key.span().start));
        let name: &std::borrow::Cow<'_, str> = key.get_ref();
        (
            name.to_string(),
            Node {
                line,
                value: toml_value(value.get_ref(), lines),
            },
        )
    };
    Value::Table(table.iter().map(entry).collect())
}

fn toml_value(value: &DeValue<'_>, lines: &LineIndex) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or(Value::Other("a number that is too large"), Value::Int),
        DeValue::Float(number) => number
            .as_str()
            .parse()
            .map_or(Value::Other("a number"), Value::Float),
        DeValue::Boolean(value) => Value::Bool(*value),
        DeValue::Datetime(_) => Value::Other("a date"),
        DeValue::Array(items) => {
            let node = |item: &toml::Spanned<DeValue<'_>>| Node {
                line: Some(lines.line(item.span().start)),
                value: toml_value(item.get_ref(), lines),
            };
            Value::List(items.iter().map(node).collect())
        }
        DeValue::Table(table) => toml_table(table, lines),
    }
}

pub(super) fn from_json(text: &str) -> Result<Node, ConfigFault> {
    let json: Json = serde_json::from_str(text).map_err(|error| ConfigFault {
        line: Some(error.line()),
        key: "JSON".into(),
        what: error.to_string(),
    })?;
    Ok(json_node(&json))
}

fn json_node(json: &Json) -> Node {
    let value = match json {
        Json::Null => Value::Null,
        Json::Bool(value) => Value::Bool(*value),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(int), _) => Value::Int(int),
            (None, Some(float)) => Value::Float(float),
            (None, None) => Value::Other("a number that is too large"),
        },
        Json::String(text) => Value::Text(text.clone()),
        Json::Array(items) => Value::List(items.iter().map(json_node).collect()),
        Json::Object(entries) => Value::Table(
            entries
                .iter()
                .map(|(key, value)| (key.clone(), json_node(value)))
                .collect(),
        ),
    };
    Node { line: None, value }
}

/// Byte offsets of line starts.
struct LineIndex(Vec<usize>);

impl LineIndex {
    fn new(text: &str) -> Self {
        Self(text.match_indices('\n').map(|(at, _)| at + 1).collect())
    }

    fn line(&self, offset: usize) -> usize {
        self.0.partition_point(|&start| start <= offset) + 1
    }
}
