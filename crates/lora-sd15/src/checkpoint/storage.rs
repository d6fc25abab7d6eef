//! How frozen weights are kept in memory.

use candle_core::DType;

/// How the weights of linear layers and convolutions are kept. Everything is computed in
/// f32 whatever the choice: a weight of 16 bits is widened for each use, and biases, norms
/// and embeddings stay in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightStorage {
    /// In f32: 3.4 GB for the UNet.
    #[default]
    F32,
    /// As the file has them where it has 16 bits, else in f32. Results are those of
    /// [`F32`](Self::F32) to the bit; a UNet from a 16-bit file takes 1.7 GB.
    ///
    /// Merging an adapter into a layer rounds to its storage: choose `F32` for that.
    AsStored,
    /// Rounded to bf16.
    Bf16,
    /// Rounded to f16.
    F16,
}

impl WeightStorage {
    /// The dtype of a tensor that the file has as `stored` and `rank` dimensions.
    pub(super) fn dtype(self, name: &str, rank: usize, stored: DType) -> DType {
        let half = |d| matches!(d, DType::F16 | DType::BF16);
        // Embeddings are looked up, not multiplied with.
        let matrix = rank >= 2 && name.ends_with("weight") && !name.ends_with("embedding.weight");
        match self {
            Self::AsStored if matrix && half(stored) => stored,
            Self::Bf16 if matrix => DType::BF16,
            Self::F16 if matrix => DType::F16,
            _ => DType::F32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_matrices_are_narrow() {
        let conv = "mid_block.resnets.0.conv1.weight";
        let stored = DType::F16;
        assert_eq!(WeightStorage::AsStored.dtype(conv, 4, stored), DType::F16);
        assert_eq!(
            WeightStorage::AsStored.dtype(conv, 4, DType::F32),
            DType::F32
        );
        assert_eq!(WeightStorage::Bf16.dtype(conv, 4, DType::F32), DType::BF16);
        for name in [
            "text_model.embeddings.token_embedding.weight",
            "x.position_ids",
        ] {
            assert_eq!(WeightStorage::F16.dtype(name, 2, stored), DType::F32);
        }
        assert_eq!(
            WeightStorage::F16.dtype("norm.weight", 1, stored),
            DType::F32
        );
        assert_eq!(WeightStorage::F32.dtype(conv, 4, stored), DType::F32);
    }
}
