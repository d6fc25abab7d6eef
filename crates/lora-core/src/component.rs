//! The parts of a pipeline and their names in adapter files.

/// A model that adapters are attached to, known in files by a prefix.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Component {
    /// The denoiser: `lora_unet_...`.
    Unet,
    /// The text encoder: `lora_te_...`.
    TextEncoder,
    /// Another model, with its own prefix (without the trailing underscore).
    Custom(String),
}

impl Component {
    /// The prefix of layer names in files, without the underscore that follows it.
    pub fn prefix(&self) -> &str {
        match self {
            Component::Unet => "lora_unet",
            Component::TextEncoder => "lora_te",
            Component::Custom(prefix) => prefix,
        }
    }

    /// The name that files give to the layer at a dotted path:
    /// `mid_block.resnets.0.conv1` of the UNet is `lora_unet_mid_block_resnets_0_conv1`.
    pub fn layer_name(&self, path: &str) -> String {
        format!("{}_{}", self.prefix(), path.replace('.', "_"))
    }

    /// Whether a layer name in a file belongs to this component.
    pub fn owns(&self, name: &str) -> bool {
        name.strip_prefix(self.prefix())
            .is_some_and(|rest| rest.starts_with('_'))
    }
}

impl std::fmt::Display for Component {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Component::Unet => f.write_str("UNet"),
            Component::TextEncoder => f.write_str("text encoder"),
            Component::Custom(prefix) => f.write_str(prefix),
        }
    }
}
