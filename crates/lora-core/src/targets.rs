//! Which layers of a model get an adapter.

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
            exclude: Vec::new(),
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
        }
    }

    /// Whether a path is selected.
    pub fn matches(&self, path: &str) -> bool {
        let any = |patterns: &[String]| patterns.iter().any(|p| contains(path, p));
        any(&self.include) && !any(&self.exclude)
    }
}

impl std::fmt::Display for Targets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}]", self.include.join(", "))?;
        if !self.exclude.is_empty() {
            write!(f, " without [{}]", self.exclude.join(", "))?;
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
