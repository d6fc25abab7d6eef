//! Fresh adapters for a model's layers.

use rand::RngCore;

use crate::family::{self, Fresh};
use crate::layer::{Adaptable, Layer};
use crate::targets::{Kind, Targets};
use crate::{AdapterConfig, AdapterSet, Error, Family, Result};

impl AdapterSet {
    /// Draws a fresh, trainable adapter for every selected layer of `model`.
    ///
    /// Layers whose kernel is larger than 1x1 take part only with
    /// [`AdapterConfig::conv_rank`] or [`AdapterConfig::conv_block_ranks`]; a block whose
    /// rank is 0 takes no part.
    ///
    /// # Errors
    /// [`Error::NothingSelected`] when no layer matches, [`Error::BadValue`] for bad
    /// options.
    pub fn create(
        model: &mut dyn Adaptable,
        config: &AdapterConfig,
        targets: &Targets,
        rng: &mut dyn RngCore,
    ) -> Result<Self> {
        config.validate()?;
        let component = model.component();
        let mut set = Self::default();
        set.dropout = config.dropout;
        let mut seen = Vec::new();
        model.visit_layers(&mut |layer| {
            seen.push(layer.path().to_string());
            if targets.matches(layer.path()) {
                set.create_one(layer, component.layer_name(layer.path()), config, rng)?;
            }
            Ok(())
        })?;
        if set.is_empty() {
            return Err(Error::NothingSelected {
                targets: targets.to_string(),
                layers: seen.len(),
                example: seen.into_iter().next().unwrap_or_else(|| "none".into()),
            });
        }
        Ok(set)
    }

    fn create_one(
        &mut self,
        layer: &Layer,
        name: String,
        config: &AdapterConfig,
        rng: &mut dyn RngCore,
    ) -> Result<()> {
        let overrides = config
            .overrides
            .iter()
            .rev()
            .find(|o| o.targets.matches(layer.path()));
        let config = overrides.map_or(config, |o| &o.config);
        let kind = Kind::of(layer);
        let Some((rank, alpha)) = size(kind, &name, config) else {
            return Ok(());
        };
        let family = match kind {
            Kind::Norm => Family::Norm,
            _ if config.family == Family::Norm => return Ok(()),
            _ if config.weight_decompose => Family::Dora,
            _ => config.family,
        };
        let weight = &layer.base().weight;
        let fresh = Fresh {
            layer: &name,
            weight: weight.dims(),
            base: layer.base(),
            rank,
            alpha: stored_alpha(alpha, rank, config.rs_lora),
            config,
            device: weight.device(),
        };
        let mut adapter = (family::entry(family).create)(&fresh, rng)?;
        if config.use_scalar {
            adapter = family::with_scalar(adapter, &fresh, rng)?;
        }
        self.insert(name, adapter);
        Ok(())
    }
}

/// Rank and alpha of a layer, if it takes part.
fn size(kind: Kind, name: &str, config: &AdapterConfig) -> Option<(usize, f64)> {
    let listed = |list: &Option<crate::BlockValues>| list.as_ref().and_then(|l| l.get(name));
    let (rank, alpha) = match kind {
        Kind::Norm if config.train_norm || config.family == Family::Norm => {
            return Some((config.rank, config.alpha));
        }
        Kind::Norm => return None,
        Kind::Pointwise => (
            listed(&config.block_ranks).map_or(config.rank, |r| r as usize),
            listed(&config.block_alphas).unwrap_or(config.alpha),
        ),
        Kind::Spatial => {
            let listed_rank = listed(&config.conv_block_ranks).map(|r| r as usize);
            (
                listed_rank.or(config.conv_rank)?,
                listed(&config.conv_block_alphas).unwrap_or(config.conv_alpha),
            )
        }
    };
    (rank > 0).then_some((rank, alpha))
}

/// `alpha` as a file holds it: 0 means the rank, and rsLoRA's scale is written so that
/// `alpha / rank` gives it.
fn stored_alpha(alpha: f64, rank: usize, rs_lora: bool) -> f64 {
    let rank = rank as f64;
    let alpha = if alpha == 0.0 { rank } else { alpha };
    if rs_lora { alpha * rank.sqrt() } else { alpha }
}
