//! The second pass at a larger size.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::job::{Parameters, Txt2Img, bad, check_size};
use crate::resample::{Filter, resize_latents};
use crate::{Error, Image, Result, UpscaleNetwork};

/// Networks by name.
pub(super) type Networks = BTreeMap<String, UpscaleNetwork>;

/// How the first picture is enlarged.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Upscaler {
    /// Latents, bilinear.
    #[default]
    Latent,
    /// Latents, bilinear with antialiasing.
    LatentAntialiased,
    /// Latents, bicubic.
    LatentBicubic,
    /// Latents, bicubic with antialiasing.
    LatentBicubicAntialiased,
    /// Latents, nearest neighbour.
    LatentNearest,
    /// Latents, nearest neighbour measured from pixel centres.
    LatentNearestExact,
    /// The decoded picture, Lanczos.
    Lanczos,
    /// The decoded picture, nearest neighbour.
    Nearest,
    /// The decoded picture, by the network that
    /// [`add_upscaler`](crate::StableDiffusion::add_upscaler) was given under this name.
    Network(String),
}

impl Upscaler {
    /// Names as the web UI shows them.
    pub const ALL: [(&'static str, Upscaler); 8] = [
        ("Latent", Upscaler::Latent),
        ("Latent (antialiased)", Upscaler::LatentAntialiased),
        ("Latent (bicubic)", Upscaler::LatentBicubic),
        (
            "Latent (bicubic antialiased)",
            Upscaler::LatentBicubicAntialiased,
        ),
        ("Latent (nearest)", Upscaler::LatentNearest),
        ("Latent (nearest-exact)", Upscaler::LatentNearestExact),
        ("Lanczos", Upscaler::Lanczos),
        ("Nearest", Upscaler::Nearest),
    ];

    /// By name, in any letter case; "None" is Lanczos, as in the web UI. Any other name is that
    /// of a network.
    pub fn from_name(name: &str) -> Self {
        if name.eq_ignore_ascii_case("None") {
            return Self::Lanczos;
        }
        let found = Self::ALL.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map_or_else(|| Self::Network(name.to_string()), |(_, u)| u.clone())
    }

    /// The web UI's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Network(name) => name,
            _ => {
                let found = Self::ALL.iter().find(|(_, u)| u == self);
                found.map_or("Latent", |(n, _)| n)
            }
        }
    }

    /// How latents are enlarged; `None` for those that enlarge pictures.
    fn on_latents(&self) -> Option<Filter> {
        Some(match self {
            Self::Latent => Filter::Bilinear { antialias: false },
            Self::LatentAntialiased => Filter::Bilinear { antialias: true },
            Self::LatentBicubic => Filter::Bicubic { antialias: false },
            Self::LatentBicubicAntialiased => Filter::Bicubic { antialias: true },
            Self::LatentNearest => Filter::Nearest { exact: false },
            Self::LatentNearestExact => Filter::Nearest { exact: true },
            Self::Lanczos | Self::Nearest | Self::Network(_) => return None,
        })
    }

    /// The picture in another size.
    fn on_picture(
        &self,
        networks: &Networks,
        picture: &Image,
        (width, height): (usize, usize),
    ) -> Result<Image> {
        Ok(match self {
            Self::Network(name) => find(networks, name)?.enlarge_to(picture, width, height)?,
            Self::Nearest => picture.resize(width, height, Filter::Nearest { exact: true }),
            _ => picture.resize(width, height, Filter::Lanczos),
        })
    }
}

fn find<'a>(networks: &'a Networks, name: &str) -> Result<&'a UpscaleNetwork> {
    let network = networks.get(name);
    network.ok_or_else(|| Error::UnknownName {
        what: "upscaler",
        name: name.to_string(),
        known: (Upscaler::ALL.iter().map(|(name, _)| *name))
            .chain(networks.keys().map(String::as_str))
            .collect::<Vec<_>>()
            .join(", "),
    })
}

/// Draws the picture again at a larger size, starting from the enlarged first one: "hires
/// fix".
#[derive(Debug, Clone, PartialEq)]
pub struct Hires {
    /// The larger side over the smaller, unless `size` is given.
    pub scale: f64,
    /// Width and height of the result; the picture is enlarged to cover it and cut. One of
    /// them may be 0, which keeps the ratio.
    pub size: Option<(usize, usize)>,
    /// Steps; 0 is as many as in the first pass.
    pub steps: usize,
    /// How much is drawn anew, 0 to 1.
    pub strength: f64,
    /// How the first picture is enlarged.
    pub upscaler: Upscaler,
}

impl Default for Hires {
    fn default() -> Self {
        Self {
            scale: 2.0,
            size: None,
            steps: 0,
            strength: 0.7,
            upscaler: Upscaler::default(),
        }
    }
}

impl Hires {
    /// Width and height of the result.
    pub fn target(&self, job: &Txt2Img) -> (usize, usize) {
        let scaled = |side: usize| (side as f64 * self.scale) as usize / 8 * 8;
        match self.size {
            None => (scaled(job.width), scaled(job.height)),
            Some((0, high)) => (high * job.width / job.height.max(1) / 8 * 8, high),
            Some((wide, 0)) => (wide, wide * job.height / job.width.max(1) / 8 * 8),
            Some(size) => size,
        }
    }

    /// Width and height to enlarge to before cutting to [`target`](Self::target).
    pub(crate) fn covering(&self, job: &Txt2Img) -> (usize, usize) {
        let (width, height) = self.target(job);
        let scale = (width as f64 / job.width as f64).max(height as f64 / job.height as f64);
        let side = |side: usize, least: usize| {
            (((side as f64 * scale / 8.0).round() as usize) * 8).max(least)
        };
        (side(job.width, width), side(job.height, height))
    }

    pub(crate) fn validate(&self, job: &Txt2Img) -> Result<()> {
        if !(self.scale.is_finite() && (1.0..=8.0).contains(&self.scale)) {
            return bad("hires scale", self.scale, "expected 1 to 8");
        }
        if !(self.strength > 0.0 && self.strength <= 1.0) {
            return bad("hires strength", self.strength, "expected above 0 to 1");
        }
        if self.steps > 1000 {
            return bad("hires steps", self.steps, "expected 0 to 1000");
        }
        let (width, height) = self.target(job);
        check_size(width, height)
    }

    /// Whether the network asked for, if any, is there.
    ///
    /// # Errors
    /// [`Error::UnknownName`] if it is not.
    pub(crate) fn check_network(&self, networks: &Networks) -> Result<()> {
        match &self.upscaler {
            Upscaler::Network(name) => find(networks, name).map(|_| ()),
            _ => Ok(()),
        }
    }

    /// The enlarged and cut picture, for upscalers that work on pictures.
    pub(crate) fn enlarge_picture(
        &self,
        job: &Txt2Img,
        networks: &Networks,
        picture: &Image,
    ) -> Result<Image> {
        let (wide, high) = self.covering(job);
        let (width, height) = self.target(job);
        let large = self.upscaler.on_picture(networks, picture, (wide, high))?;
        Ok(large.crop((wide - width) / 2, (high - height) / 2, width, height))
    }

    /// Enlarged and cut latents; `None` when the upscaler works on pictures.
    pub(crate) fn enlarge(&self, job: &Txt2Img, latents: &Tensor) -> Result<Option<Tensor>> {
        let Some(filter) = self.upscaler.on_latents() else {
            return Ok(None);
        };
        let (width, height) = self.covering(job);
        let large = resize_latents(latents, height / 8, width / 8, filter)?;
        let (target_w, target_h) = self.target(job);
        let (w, h) = (target_w / 8, target_h / 8);
        let cut = large
            .narrow(2, (height / 8 - h) / 2, h)?
            .narrow(3, (width / 8 - w) / 2, w)?;
        Ok(Some(cut.contiguous()?))
    }

    pub(crate) fn parameters(&self) -> Parameters {
        let mut list: Parameters = Vec::new();
        match self.size {
            Some((w, h)) => list.push(("Hires resize", format!("{w}x{h}"))),
            None => list.push(("Hires upscale", self.scale.to_string())),
        }
        if self.steps > 0 {
            list.push(("Hires steps", self.steps.to_string()));
        }
        list.push(("Hires upscaler", self.upscaler.name().into()));
        list
    }
}
