//! The command line of the `lora` tool.

use std::path::PathBuf;

use candle_core::DType;
use clap::{Args, Parser, Subcommand, ValueEnum};
use lora_core::algebra::{Client, ExtractFamily, RankRule};
use lora_core::format::SaveLayout;

/// Inspects, merges, extracts, resizes, converts, adds and compares LoRA files.
#[derive(Parser)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Says what is in a file.
    Inspect {
        file: PathBuf,
        /// What A1111, ComfyUI, diffusers, stable-diffusion.cpp and LyCORIS make of it.
        #[arg(long)]
        clients: bool,
        /// Every layer with family, rank and alpha.
        #[arg(long)]
        layers: bool,
    },
    /// Lists unknown and missing keys and values that are no numbers; exits with 1 if there are any.
    Verify { file: PathBuf },
    /// Adds adapters to a checkpoint (LDM file or diffusers folder).
    Merge {
        /// FILE[:MULTIPLIER[:TEXT_ENCODER_MULTIPLIER]]
        #[arg(required = true)]
        adapters: Vec<Weighted>,
        #[arg(long)]
        base: PathBuf,
        #[arg(long, short)]
        output: PathBuf,
        /// Block weights, 17 or 26 numbers with commas; once per adapter, in order.
        #[arg(long)]
        blocks: Vec<String>,
        /// Dtype of the result; as the base if left out.
        #[arg(long)]
        dtype: Option<Float>,
        /// Go on when the base lacks some of the layers.
        #[arg(long)]
        lenient: bool,
    },
    /// Makes an adapter of the difference of two checkpoints.
    Extract {
        #[arg(long)]
        base: PathBuf,
        #[arg(long)]
        tuned: PathBuf,
        #[arg(long, value_parser = RankRule::parse, default_value = "32")]
        rank: RankRule,
        /// Rank of larger kernels; without it the transformers alone are extracted.
        #[arg(long, value_parser = RankRule::parse)]
        conv_rank: Option<RankRule>,
        /// No rank above this.
        #[arg(long)]
        max: Option<usize>,
        /// lora, lokr:FACTOR (nearest Kronecker product) or loha:RANK (fitted).
        #[arg(long, value_parser = family, default_value = "lora")]
        family: ExtractFamily,
        /// Time embedding, first and last convolution too (with --conv-rank).
        #[arg(long)]
        everything: bool,
        /// Core tensors for larger kernels.
        #[arg(long)]
        tucker: bool,
        /// Whole differences where the rank would reach half of the outputs.
        #[arg(long)]
        full: bool,
        /// Differences of normalization layers too.
        #[arg(long)]
        norms: bool,
        /// Differences of biases too.
        #[arg(long)]
        biases: bool,
        /// Bound the factors' entries by this quantile of their absolute values.
        #[arg(long)]
        clamp_quantile: Option<f64>,
        /// Leave a component out when nothing in it differs by more.
        #[arg(long, default_value_t = 0.0)]
        min_diff: f64,
        #[command(flatten)]
        write: Write,
    },
    /// Changes the ranks of a LoRA.
    Resize {
        file: PathBuf,
        #[arg(long, value_parser = RankRule::parse)]
        rank: RankRule,
        /// Rule for larger kernels; the same if left out.
        #[arg(long, value_parser = RankRule::parse)]
        conv_rank: Option<RankRule>,
        /// No rank above this.
        #[arg(long)]
        max: Option<usize>,
        /// No rank above this for larger kernels.
        #[arg(long)]
        conv_max: Option<usize>,
        /// Count as sd-scripts does: one more than the rule says.
        #[arg(long)]
        sd_scripts: bool,
        #[command(flatten)]
        write: Write,
    },
    /// Turns any adapter into plain LoRA, or into what one program reads right.
    Convert {
        file: PathBuf,
        /// Rank of the LoRA that the file becomes; energy:0.99 unless only the layout is
        /// to change.
        #[arg(long, value_parser = RankRule::parse)]
        rank: Option<RankRule>,
        /// No rank above this.
        #[arg(long, conflicts_with = "client")]
        max: Option<usize>,
        /// a1111, comfyui, diffusers, sd.cpp or lycoris.
        #[arg(long = "for", value_parser = Client::from_name)]
        client: Option<Client>,
        /// The checkpoint, for families whose change depends on it.
        #[arg(long)]
        base: Option<PathBuf>,
        #[command(flatten)]
        write: Write,
    },
    /// Adds adapters up into one, exactly or at a rank.
    Compose {
        /// FILE[:MULTIPLIER[:TEXT_ENCODER_MULTIPLIER]]
        #[arg(required = true)]
        adapters: Vec<Weighted>,
        /// Without it the sum is exact.
        #[arg(long, value_parser = RankRule::parse)]
        rank: Option<RankRule>,
        /// No rank above this.
        #[arg(long, requires = "rank")]
        max: Option<usize>,
        /// Block weights, 17 or 26 numbers with commas; once per adapter, in order.
        #[arg(long)]
        blocks: Vec<String>,
        /// The checkpoint, for families whose change depends on it.
        #[arg(long)]
        base: Option<PathBuf>,
        /// sd-scripts' merge_lora arithmetic, which is wrong, to reproduce old files.
        #[arg(long, conflicts_with_all = ["rank", "blocks", "base"])]
        sd_scripts: bool,
        /// With --sd-scripts: its --concat.
        #[arg(long, requires = "sd_scripts")]
        concat: bool,
        #[command(flatten)]
        write: Write,
    },
    /// Compares two adapters layer by layer.
    Diff {
        first: PathBuf,
        second: PathBuf,
        /// The checkpoint, for families whose change depends on it.
        #[arg(long)]
        base: Option<PathBuf>,
    },
}

#[derive(Args)]
pub(crate) struct Write {
    #[arg(long, short)]
    pub(crate) output: PathBuf,
    /// Dtype of the result; that of the adapters it is made of if left out, f16 for extract.
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<Float>,
    /// Names and parts as this program writes them; kohya unless given.
    #[arg(long, value_enum)]
    pub(crate) layout: Option<Layout>,
    /// Prints every layer.
    #[arg(long)]
    pub(crate) verbose: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Layout {
    /// sd-scripts and LyCORIS.
    Kohya,
    /// The same with the UNet's names in checkpoints.
    KohyaLdm,
    /// diffusers since PEFT.
    Diffusers,
    /// diffusers' attention processors.
    DiffusersOld,
    /// PEFT, with adapter_config.json beside the file.
    Peft,
}

impl From<Layout> for SaveLayout {
    fn from(layout: Layout) -> Self {
        match layout {
            Layout::Kohya => SaveLayout::Kohya,
            Layout::KohyaLdm => SaveLayout::KohyaLdm,
            Layout::Diffusers => SaveLayout::Diffusers,
            Layout::DiffusersOld => SaveLayout::DiffusersOld,
            Layout::Peft => SaveLayout::Peft,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Float {
    F16,
    Bf16,
    F32,
}

impl From<Float> for DType {
    fn from(float: Float) -> Self {
        match float {
            Float::F16 => DType::F16,
            Float::Bf16 => DType::BF16,
            Float::F32 => DType::F32,
        }
    }
}

/// An adapter file and its multipliers.
#[derive(Clone)]
pub(crate) struct Weighted {
    pub(crate) path: PathBuf,
    pub(crate) unet: f64,
    pub(crate) text_encoder: f64,
}

impl std::str::FromStr for Weighted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut path = text;
        let mut numbers = Vec::new();
        while let Some((rest, number)) = path.rsplit_once(':')
            && let Ok(number) = number.parse::<f64>()
            && numbers.len() < 2
        {
            numbers.insert(0, number);
            path = rest;
        }
        let unet = numbers.first().copied().unwrap_or(1.0);
        let text_encoder = numbers.get(1).copied().unwrap_or(unet);
        if !unet.is_finite() || !text_encoder.is_finite() {
            return Err("expected finite multipliers".into());
        }
        Ok(Self {
            path: path.into(),
            unet,
            text_encoder,
        })
    }
}

fn family(text: &str) -> Result<ExtractFamily, String> {
    match text.split_once(':').unwrap_or((text, "")) {
        ("lora", "") => Ok(ExtractFamily::Lora),
        ("lokr", factor) => factor
            .parse()
            .map(|factor| ExtractFamily::Lokr { factor })
            .map_err(|_| "expected lokr:FACTOR, for example lokr:8 or lokr:-1".into()),
        ("loha", rank) => match rank.parse() {
            Ok(rank) if rank > 0 => Ok(ExtractFamily::Loha { rank }),
            _ => Err("expected loha:RANK, for example loha:4".into()),
        },
        _ => Err("expected lora, lokr:FACTOR or loha:RANK".into()),
    }
}
