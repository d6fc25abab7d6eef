//! Which layers of a model get an adapter.

use regex::Regex;

use crate::layer::{Layer, LayerOp};

/// A selection of layers by their dotted paths.
///
/// A pattern is a run of path segments, `*` standing for any one segment:
/// `attentions` selects everything below an `attentions` list, `attn1.to_q` the
/// queries of self-attention, `ff.net.2` the second feed-forward layer.
///
/// ```
/// use lora_core::Targets;
/// let targets = Targets::new(&["attn2.to_*", "ff"]).unwrap_err();
/// assert!(targets.to_string().contains("to_*"));
/// let targets = Targets::new(&["attn2.*", "ff"])?;
/// assert!(targets.matches("down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k"));
/// assert!(!targets.matches("down_blocks.0.resnets.0.conv1"));
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Targets {
    include: Vec<String>,
    exclude: Vec<String>,
    names: Vec<Name>,
    excluded_names: Vec<Name>,
}

/// A pattern of whole paths.
#[derive(Debug, Clone)]
struct Name {
    text: String,
    regex: Regex,
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text && self.regex.as_str() == other.regex.as_str()
    }
}

impl Eq for Name {}

impl Name {
    /// LyCORIS' ways to name layers: a regular expression that the path begins with, or a
    /// shell pattern of the whole path.
    fn new(text: &str, fnmatch: bool) -> crate::Result<Self> {
        let expression = if fnmatch {
            let parts: Vec<String> = text
                .chars()
                .map(|c| match c {
                    '*' => ".*".to_string(),
                    '?' => ".".to_string(),
                    // Sets of characters are written alike.
                    '[' | ']' => c.to_string(),
                    other => regex::escape(&other.to_string()),
                })
                .collect();
            format!("^(?s:{})$", parts.concat().replace("[!", "[^"))
        } else {
            format!("^(?:{text})")
        };
        match Regex::new(&expression) {
            Ok(regex) => Ok(Self {
                text: text.to_string(),
                regex,
            }),
            Err(_) => Err(crate::Error::BadValue {
                layer: "targets".into(),
                name: "name",
                value: format!("{text:?}"),
                expected: "expected a regular expression, or a shell pattern with use_fnmatch",
            }),
        }
    }

    fn matches(&self, path: &str) -> bool {
        path == self.text || self.regex.is_match(path)
    }
}

impl Targets {
    /// A selection by patterns.
    ///
    /// # Errors
    /// [`Error::BadValue`](crate::Error::BadValue) for an empty pattern or one with
    /// `*` inside a segment.
    pub fn new(include: &[&str]) -> crate::Result<Self> {
        Ok(Self {
            include: patterns(include)?,
            ..Self::known(&[])
        })
    }

    /// The same selection without what these patterns match.
    ///
    /// # Errors
    /// As [`Targets::new`].
    pub fn without(mut self, exclude: &[&str]) -> crate::Result<Self> {
        self.exclude.extend(patterns(exclude)?);
        Ok(self)
    }

    /// The same selection and the layers that LyCORIS' `target_name` means: the path, or a
    /// regular expression that it begins with, or with `fnmatch` a shell pattern of all of
    /// it.
    ///
    /// # Errors
    /// [`Error::BadValue`](crate::Error::BadValue) for a pattern that cannot be read.
    ///
    /// ```
    /// use lora_core::Targets;
    /// let targets = Targets::new(&["attn1"])?.with_names(&[".*conv[12]"], false)?;
    /// assert!(targets.matches("mid_block.resnets.0.conv1"));
    /// assert!(!targets.matches("mid_block.resnets.0.conv_shortcut"));
    /// # Ok::<(), lora_core::Error>(())
    /// ```
    pub fn with_names(mut self, names: &[impl AsRef<str>], fnmatch: bool) -> crate::Result<Self> {
        for name in names {
            self.names.push(Name::new(name.as_ref(), fnmatch)?);
        }
        Ok(self)
    }

    /// The same selection without the layers that LyCORIS' `exclude_name` means.
    ///
    /// # Errors
    /// As [`Targets::with_names`].
    pub fn without_names(
        mut self,
        names: &[impl AsRef<str>],
        fnmatch: bool,
    ) -> crate::Result<Self> {
        for name in names {
            self.excluded_names.push(Name::new(name.as_ref(), fnmatch)?);
        }
        Ok(self)
    }

    /// Transformers: the layers of a plain LoRA (sd-scripts' "LierLa"), 192 in the
    /// SD1.5 UNet and 72 in its text encoder.
    pub fn attn_mlp() -> Self {
        Self::known(&["attentions", "self_attn", "mlp"])
    }

    /// Transformers, residual blocks and samplers: sd-scripts' "C3Lier", 278 layers
    /// in the SD1.5 UNet and 72 in its text encoder.
    pub fn attn_mlp_conv() -> Self {
        Self::known(&[
            "attentions",
            "self_attn",
            "mlp",
            "resnets",
            "downsamplers",
            "upsamplers",
        ])
    }

    fn known(include: &[&str]) -> Self {
        Self {
            include: include.iter().map(ToString::to_string).collect(),
            exclude: Vec::new(),
            names: Vec::new(),
            excluded_names: Vec::new(),
        }
    }

    /// Whether a path is selected.
    pub fn matches(&self, path: &str) -> bool {
        let any = |patterns: &[String]| patterns.iter().any(|p| contains(path, p));
        let named = |names: &[Name]| names.iter().any(|n| n.matches(path));
        (any(&self.include) || named(&self.names))
            && !any(&self.exclude)
            && !named(&self.excluded_names)
    }
}

impl std::fmt::Display for Targets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |patterns: &[String], names: &[Name]| {
            let names = names.iter().map(|n| &n.text);
            let all: Vec<&str> = patterns.iter().chain(names).map(String::as_str).collect();
            all.join(", ")
        };
        write!(f, "[{}]", list(&self.include, &self.names))?;
        if !self.exclude.is_empty() || !self.excluded_names.is_empty() {
            write!(
                f,
                " without [{}]",
                list(&self.exclude, &self.excluded_names)
            )?;
        }
        Ok(())
    }
}

fn patterns(list: &[&str]) -> crate::Result<Vec<String>> {
    list.iter()
        .map(|pattern| {
            let sound = |segment: &str| segment == "*" || (!segment.is_empty() && !segment.contains('*'));
            if pattern.split('.').all(sound) {
                Ok(pattern.to_string())
            } else {
                Err(crate::Error::BadValue {
                    layer: "targets".into(),
                    name: "pattern",
                    value: format!("{pattern:?}"),
                    expected: "expected path segments joined by dots, `*` standing for a whole segment",
                })
            }
        })
        .collect()
}

/// Whether the segments of `pattern` occur in `path` one after another.
fn contains(path: &str, pattern: &str) -> bool {
    let path: Vec<&str> = path.split('.').collect();
    let pattern: Vec<&str> = pattern.split('.').collect();
    path.windows(pattern.len())
        .any(|run| run.iter().zip(&pattern).all(|(s, p)| *p == "*" || s == p))
}

/// How a layer counts for rank and selection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Linear layers and 1x1 convolutions: `rank`.
    Pointwise,
    /// Convolutions with a larger kernel: `conv_rank`.
    Spatial,
    /// Normalization layers.
    Norm,
}

impl Kind {
    pub(crate) fn of(layer: &Layer) -> Self {
        match (layer.base().op, layer.base().weight.dims()) {
            (LayerOp::Linear, _) | (LayerOp::Conv2d(_), [_, _, 1, 1]) => Kind::Pointwise,
            (LayerOp::Conv2d(_), _) => Kind::Spatial,
            _ => Kind::Norm,
        }
    }
}
