//! The sampling methods by name.

use candle_core::{Result as TensorResult, Tensor};

use super::{
    Churn, Ddim, Dpm2, Dpm2Ancestral, Dpmpp2m, Dpmpp2mSde, Dpmpp2sAncestral, Dpmpp3mSde, DpmppSde,
    Euler, EulerAncestral, Heun, Lcm, Lms, Plms, Renewal, Sampler, SdeSolver, SigmaSchedule, UniPc,
    UniPcOptions,
};
use crate::{Error, NoiseSchedule, Result};

/// The sampling methods, by the web UI's names.
///
/// ```
/// use lora_sd15::SamplerKind;
/// use lora_sd15::sampler::SigmaSchedule;
/// let (kind, schedule) = SamplerKind::from_name("DPM++ 2M Karras")?;
/// assert_eq!((kind, schedule), (SamplerKind::Dpmpp2m, Some(SigmaSchedule::Karras)));
/// # Ok::<(), lora_sd15::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum SamplerKind {
    /// "DPM++ 2M".
    Dpmpp2m,
    /// "DPM++ SDE".
    DpmppSde,
    /// "DPM++ 2M SDE".
    Dpmpp2mSde,
    /// "DPM++ 2M SDE Heun".
    Dpmpp2mSdeHeun,
    /// "DPM++ 2S a".
    Dpmpp2sAncestral,
    /// "DPM++ 3M SDE".
    Dpmpp3mSde,
    /// "Euler a".
    EulerAncestral,
    /// "Euler".
    #[default]
    Euler,
    /// "LMS".
    Lms,
    /// "Heun".
    Heun,
    /// "DPM2".
    Dpm2,
    /// "DPM2 a".
    Dpm2Ancestral,
    /// "LCM", for latent consistency models and adapters.
    Lcm,
    /// "DDIM", with timesteps of its own.
    Ddim,
    /// "PLMS", with timesteps of its own.
    Plms,
    /// "UniPC", with timesteps of its own.
    UniPc,
}

/// Numbers that some samplers take; the others pass them over.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SamplerOptions {
    /// Share of noise renewed per step; the default is 0 for DDIM and 1 elsewhere.
    pub eta: Option<f64>,
    /// Churn of Euler, Heun and DPM2, and the size of added noise.
    pub churn: Churn,
    /// Order of UniPC, 1 to 3; the default is 3.
    pub unipc_order: Option<usize>,
}

impl SamplerKind {
    /// Names as the web UI shows them.
    pub const ALL: [(&'static str, SamplerKind); 16] = [
        ("DPM++ 2M", SamplerKind::Dpmpp2m),
        ("DPM++ SDE", SamplerKind::DpmppSde),
        ("DPM++ 2M SDE", SamplerKind::Dpmpp2mSde),
        ("DPM++ 2M SDE Heun", SamplerKind::Dpmpp2mSdeHeun),
        ("DPM++ 2S a", SamplerKind::Dpmpp2sAncestral),
        ("DPM++ 3M SDE", SamplerKind::Dpmpp3mSde),
        ("Euler a", SamplerKind::EulerAncestral),
        ("Euler", SamplerKind::Euler),
        ("LMS", SamplerKind::Lms),
        ("Heun", SamplerKind::Heun),
        ("DPM2", SamplerKind::Dpm2),
        ("DPM2 a", SamplerKind::Dpm2Ancestral),
        ("LCM", SamplerKind::Lcm),
        ("DDIM", SamplerKind::Ddim),
        ("PLMS", SamplerKind::Plms),
        ("UniPC", SamplerKind::UniPc),
    ];

    /// Finds sampler and schedule by a name such as `Euler a`, `dpm++ 2m` or the older
    /// `DPM++ 2M Karras`.
    ///
    /// # Errors
    /// [`Error::UnknownName`] with the list.
    pub fn from_name(name: &str) -> Result<(Self, Option<SigmaSchedule>)> {
        let plain = |s: &str| s.to_lowercase().replace('_', " ");
        let wanted = plain(name.trim());
        for (known, kind) in Self::ALL {
            if plain(known) == wanted {
                return Ok((kind, None));
            }
        }
        for (known, kind) in Self::ALL {
            let schedule = wanted
                .strip_prefix(&plain(known))
                .and_then(|rest| rest.strip_prefix(' '))
                .and_then(|rest| SigmaSchedule::from_name(rest).ok());
            if let Some(schedule) = schedule {
                return Ok((kind, Some(schedule)));
            }
        }
        Err(Error::UnknownName {
            what: "sampler",
            name: name.to_string(),
            known: Self::ALL.map(|(n, _)| n).join(", "),
        })
    }

    /// The web UI's name.
    pub fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(_, k)| *k == self)
            .map_or("Euler", |(n, _)| n)
    }

    /// The schedule that "Automatic" stands for.
    pub fn automatic_schedule(self) -> SigmaSchedule {
        match self {
            Self::Dpmpp2m
            | Self::DpmppSde
            | Self::Dpmpp2sAncestral
            | Self::Dpm2
            | Self::Dpm2Ancestral => SigmaSchedule::Karras,
            Self::Dpmpp2mSde | Self::Dpmpp2mSdeHeun | Self::Dpmpp3mSde => {
                SigmaSchedule::Exponential
            }
            _ => SigmaSchedule::Uniform,
        }
    }

    /// Whether it works on timesteps and noise predictions: no sigma schedule then.
    pub fn on_timesteps(self) -> bool {
        matches!(self, Self::Ddim | Self::Plms | Self::UniPc)
    }

    /// Whether levels are made for one step more and the last above 0 left out.
    pub fn discards_next_to_last(self) -> bool {
        matches!(self, Self::Dpm2 | Self::Dpm2Ancestral | Self::Dpmpp3mSde)
    }

    /// Whether the denoiser is asked twice per step: prompt schedules then count two.
    pub fn is_second_order(self) -> bool {
        matches!(
            self,
            Self::DpmppSde | Self::Dpmpp2sAncestral | Self::Heun | Self::Dpm2 | Self::Dpm2Ancestral
        )
    }

    /// Whether its noise comes from a Brownian motion.
    pub fn is_brownian(self) -> bool {
        matches!(
            self,
            Self::DpmppSde | Self::Dpmpp2mSde | Self::Dpmpp2mSdeHeun | Self::Dpmpp3mSde
        )
    }

    /// Whether the web UI writes ENSD into the picture for it.
    pub fn shows_ensd(self) -> bool {
        matches!(
            self,
            Self::EulerAncestral | Self::Dpm2Ancestral | Self::Dpmpp2sAncestral
        )
    }

    /// The sampler over falling `sigmas`, starting from `x` (at the first of them);
    /// `None` for those [`on_timesteps`](Self::on_timesteps).
    pub fn over_sigmas(
        self,
        x: Tensor,
        sigmas: Vec<f64>,
        options: &SamplerOptions,
    ) -> Option<Box<dyn Sampler>> {
        let churn = options.churn;
        let renewal = Renewal {
            eta: options.eta.unwrap_or(1.0),
            s_noise: churn.s_noise,
        };
        Some(match self {
            Self::Euler => Box::new(Euler::new(x, sigmas, churn)),
            Self::EulerAncestral => Box::new(EulerAncestral::new(x, sigmas, renewal)),
            Self::Heun => Box::new(Heun::new(x, sigmas, churn)),
            Self::Lms => Box::new(Lms::new(x, sigmas)),
            Self::Dpm2 => Box::new(Dpm2::new(x, sigmas, churn)),
            Self::Dpm2Ancestral => Box::new(Dpm2Ancestral::new(x, sigmas, renewal)),
            Self::Dpmpp2sAncestral => Box::new(Dpmpp2sAncestral::new(x, sigmas, renewal)),
            Self::Dpmpp2m => Box::new(Dpmpp2m::new(x, sigmas)),
            Self::DpmppSde => Box::new(DpmppSde::new(x, sigmas, renewal)),
            Self::Dpmpp2mSde => Box::new(Dpmpp2mSde::new(x, sigmas, renewal, SdeSolver::Midpoint)),
            Self::Dpmpp2mSdeHeun => Box::new(Dpmpp2mSde::new(x, sigmas, renewal, SdeSolver::Heun)),
            Self::Dpmpp3mSde => Box::new(Dpmpp3mSde::new(x, sigmas, renewal)),
            Self::Lcm => Box::new(Lcm::new(x, sigmas)),
            Self::Ddim | Self::Plms | Self::UniPc => return None,
        })
    }

    /// The sampler over ascending `timesteps`, starting from variance-preserving `x`;
    /// `None` for those over sigmas. `partial` says that `x` holds a picture already: UniPC
    /// then starts at the last timestep instead of pure noise.
    pub fn over_timesteps(
        self,
        x: Tensor,
        timesteps: Vec<usize>,
        schedule: &NoiseSchedule,
        options: &SamplerOptions,
        partial: bool,
    ) -> Option<Box<dyn Sampler>> {
        let acp = schedule.alphas_cumprod();
        Some(match self {
            Self::Ddim => Box::new(Ddim::new(x, timesteps, acp, options.eta.unwrap_or(0.0))),
            Self::Plms => Box::new(Plms::new(x, timesteps, acp)),
            Self::UniPc => {
                let start = match timesteps.last() {
                    Some(last) if partial => (last + 1) as f64 / crate::TIMESTEPS as f64,
                    _ => 1.0,
                };
                let mut unipc = UniPcOptions {
                    start,
                    ..UniPcOptions::default()
                };
                unipc.order = options.unipc_order.unwrap_or(unipc.order);
                Box::new(UniPc::new(x, timesteps.len(), schedule, unipc))
            }
            _ => return None,
        })
    }
}

/// Noisy latents of a picture at a timestep, for samplers
/// [`on_timesteps`](SamplerKind::on_timesteps).
///
/// # Errors
/// When the shapes differ.
pub fn noisy_at(
    latents: &Tensor,
    noise: &Tensor,
    timestep: usize,
    schedule: &NoiseSchedule,
) -> TensorResult<Tensor> {
    let acp = schedule.alphas_cumprod().get(timestep).copied();
    let acp = f64::from(acp.unwrap_or(0.0));
    super::descent::mix(acp.sqrt(), latents, (1.0 - acp).sqrt(), noise)
}
