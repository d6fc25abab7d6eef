//! What kind of adapter to create.

use crate::control::Dropout;
use crate::{BlockValues, Error, Family, Result, Targets};

/// Options that hold for some layers instead of the general ones.
#[derive(Debug, Clone, PartialEq)]
pub struct Override {
    /// The layers.
    pub targets: Targets,
    /// Their options.
    pub config: AdapterConfig,
}

/// Options of a fresh adapter.
///
/// | name | default | meaning | kohya |
/// |---|---|---|---|
/// | `family` | LoRA | the formula | `network_module`, `algo` |
/// | `rank` | 4 | rank for linear layers and 1x1 convolutions | `network_dim` |
/// | `alpha` | 1 | scale is alpha / rank; 0 means rank | `network_alpha` |
/// | `conv_rank` | none | rank for larger kernels; none leaves them out | `conv_dim` |
/// | `conv_alpha` | 1 | the same for larger kernels | `conv_alpha` |
/// | `use_tucker` | false | core tensor for larger kernels | `use_tucker`, `use_cp` |
/// | `dropout` | off | dropout while training | `network_dropout`, ... |
/// | `rs_lora` | false | scale is alpha / sqrt(rank) | `rs_lora` |
/// | `factor` | -1 | LoKr: how dimensions are split, see [`factorization`](crate::factorization) | `factor` |
/// | `decompose_both`, `full_matrix`, `unbalanced_factorization` | false | LoKr | the same |
/// | `weight_decompose` | false | DoRA on top of LoRA, LoHa or LoKr | `dora_wd` |
/// | `wd_on_output` | true | DoRA: a magnitude per output, not per input | `wd_on_output` |
/// | `block_ranks`, `block_alphas` | none | ranks and alphas by block of the UNet, see [`BlockValues`] | `block_dims`, `block_alphas` |
/// | `conv_block_ranks`, `conv_block_alphas` | none | the same for larger kernels | `conv_block_dims`, `conv_block_alphas` |
/// | `overrides` | none | other options for some layers | `module_algo_map`, `name_algo_map` |
/// | `train_norm` | false | train the selected normalization layers too | `train_norm` |
/// | `train_on_input` | false | (IA)^3: factors on inputs | `train_on_input` |
/// | `constraint` | 0 | OFT, BOFT: bound of the rotation; 0 for none | `constraint` |
/// | `rescaled` | false | OFT, BOFT: a factor per output row | `rescaled` |
///
/// For OFT and BOFT `rank` bounds the block size, for sd-scripts' OFT it is the number of
/// blocks; Full, Norm and (IA)^3 have none. Where a block list has no value for a layer, the
/// options for all layers hold.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The family.
    pub family: Family,
    /// Rank for linear layers and 1x1 convolutions, at least 1.
    pub rank: usize,
    /// `alpha` for them; 0 means the rank.
    pub alpha: f64,
    /// Rank for convolutions with a larger kernel; `None` leaves these layers out.
    pub conv_rank: Option<usize>,
    /// `alpha` for them; 0 means the rank.
    pub conv_alpha: f64,
    /// Ranks by block for linear layers and 1x1 convolutions; 0 leaves a block out.
    pub block_ranks: Option<BlockValues>,
    /// `alpha` by block for them.
    pub block_alphas: Option<BlockValues>,
    /// Ranks by block for larger kernels; 0 leaves a block out.
    pub conv_block_ranks: Option<BlockValues>,
    /// `alpha` by block for them.
    pub conv_block_alphas: Option<BlockValues>,
    /// Other options for some of the selected layers; the last that matches holds. Their
    /// `dropout` and `overrides` mean nothing.
    pub overrides: Vec<Override>,
    /// Whether larger kernels are decomposed with a core tensor (Tucker).
    pub use_tucker: bool,
    /// Dropout while training.
    pub dropout: Dropout,
    /// rsLoRA (Kalajdzievski 2023): scale `alpha / sqrt(rank)`, written to files as an
    /// `alpha` that every reader understands.
    pub rs_lora: bool,
    /// LoKr: bound of the smaller Kronecker factor; -1 for none.
    pub factor: i64,
    /// LoKr: make the first factor low-rank too where that saves parameters.
    pub decompose_both: bool,
    /// LoKr: keep both factors full.
    pub full_matrix: bool,
    /// LoKr: give the first factor the larger part of the outputs.
    pub unbalanced_factorization: bool,
    /// LoRA, LoHa, LoKr: a trained number multiplies the whole change, as in LyCORIS.
    pub use_scalar: bool,
    /// DoRA: learned magnitudes on top of LoRA, LoHa or LoKr.
    pub weight_decompose: bool,
    /// DoRA: one magnitude per output; false: per input.
    pub wd_on_output: bool,
    /// Train the selected normalization layers too, see [`Norm`](crate::Norm).
    pub train_norm: bool,
    /// (IA)^3: factors on the inputs instead of the outputs.
    pub train_on_input: bool,
    /// OFT, BOFT: bound of the skew blocks' norm per output; 0 for none.
    pub constraint: f64,
    /// OFT, BOFT: learn a factor for every output row.
    pub rescaled: bool,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            family: Family::Lora,
            rank: 4,
            alpha: 1.0,
            conv_rank: None,
            conv_alpha: 1.0,
            block_ranks: None,
            block_alphas: None,
            conv_block_ranks: None,
            conv_block_alphas: None,
            overrides: Vec::new(),
            use_tucker: false,
            dropout: Dropout::default(),
            rs_lora: false,
            factor: -1,
            decompose_both: false,
            full_matrix: false,
            unbalanced_factorization: false,
            use_scalar: false,
            weight_decompose: false,
            wd_on_output: true,
            train_norm: false,
            train_on_input: false,
            constraint: 0.0,
            rescaled: false,
        }
    }
}

impl AdapterConfig {
    /// Checks every value.
    ///
    /// # Errors
    /// [`Error::BadValue`] for the first that is out of range.
    pub fn validate(&self) -> Result<()> {
        let bad = |name, value: String, expected| {
            Err(Error::BadValue {
                layer: "adapter options".into(),
                name,
                value,
                expected,
            })
        };
        if self.rank == 0 || self.conv_rank == Some(0) {
            return bad("rank", "0".into(), "expected at least 1");
        }
        for (name, alpha) in [("alpha", self.alpha), ("conv_alpha", self.conv_alpha)] {
            if !alpha.is_finite() || alpha < 0.0 {
                return bad(
                    name,
                    alpha.to_string(),
                    "expected a finite number, 0 (meaning the rank) or more",
                );
            }
        }
        let lists = [
            ("block_ranks", &self.block_ranks, true),
            ("conv_block_ranks", &self.conv_block_ranks, true),
            ("block_alphas", &self.block_alphas, false),
            ("conv_block_alphas", &self.conv_block_alphas, false),
        ];
        for (name, list, whole) in lists {
            let mut values = list.iter().flat_map(BlockValues::values);
            let odd = |v: &f64| *v < 0.0 || (whole && (v.fract() != 0.0 || *v > 1e6));
            if let Some(value) = values.find(odd) {
                return bad(
                    name,
                    value.to_string(),
                    "expected numbers of at least 0, whole ones for ranks",
                );
            }
        }
        for other in &self.overrides {
            other.config.validate()?;
        }
        if self.family == Family::Tlora {
            return bad(
                "family",
                self.family.to_string(),
                "T-LoRA files are read, not trained; expected another family",
            );
        }
        if self.use_scalar && self.weight_decompose {
            return bad(
                "use_scalar",
                "true".into(),
                "DoRA has trained magnitudes already; leave use_scalar or dora_wd out",
            );
        }
        let Dropout {
            neuron,
            rank,
            module,
            ..
        } = self.dropout;
        for (name, p) in [
            ("dropout", neuron),
            ("rank_dropout", rank),
            ("module_dropout", module),
        ] {
            if !(0.0..1.0).contains(&p) {
                return bad(
                    name,
                    p.to_string(),
                    "expected a probability of at least 0 and less than 1",
                );
            }
        }
        if self.family != Family::Lora && neuron > 0.0 {
            return bad(
                "dropout",
                neuron.to_string(),
                "this family has no dropout inside; use rank_dropout or module_dropout",
            );
        }
        let decomposable = matches!(
            self.family,
            Family::Lora | Family::Loha | Family::Lokr | Family::Dora
        );
        if self.weight_decompose && !decomposable {
            return bad(
                "weight_decompose",
                "true".into(),
                "expected LoRA, LoHa or LoKr as the family",
            );
        }
        let low_rank = matches!(self.family, Family::Lora | Family::Loha | Family::Lokr);
        if (self.weight_decompose || !low_rank) && neuron.max(rank) > 0.0 {
            return bad(
                "dropout",
                neuron.max(rank).to_string(),
                "this family and weight decomposition have no dropout inside; use module_dropout",
            );
        }
        if !self.constraint.is_finite() || self.constraint < 0.0 {
            return bad(
                "constraint",
                self.constraint.to_string(),
                "expected a finite number of at least 0",
            );
        }
        if self.family == Family::Lokr && self.full_matrix && self.rs_lora {
            return bad(
                "rs_lora",
                "true".into(),
                "full matrices have no rank; leave it out",
            );
        }
        Ok(())
    }
}
