//! Methods that use earlier answers without further noise: LMS and DPM++ 2M.

use candle_core::{Result, Tensor};

use super::descent::{Descent, mix};
use super::{Query, Sampler, StepNoise};

/// DPM-Solver++ (Lu et al. 2022), multistep of second order: "DPM++ 2M".
#[derive(Debug, Clone)]
pub struct Dpmpp2m {
    path: Descent,
    previous: Option<Tensor>,
}

impl Dpmpp2m {
    /// Starts from `x`, noise times the first sigma. `sigmas` fall and end in 0.
    pub fn new(x: Tensor, sigmas: Vec<f64>) -> Self {
        Self {
            path: Descent::new(x, sigmas),
            previous: None,
        }
    }
}

impl Sampler for Dpmpp2m {
    fn query(&self) -> Option<Query> {
        self.path.query()
    }

    fn advance(&mut self, denoised: &Tensor, _: &mut StepNoise<'_>) -> Result<()> {
        let Some((sigma, next)) = self.path.pair() else {
            return Ok(());
        };
        let h = sigma.ln() - next.ln();
        // At next = 0, h is infinite: x is replaced by the denoised latents.
        let target = match (&self.previous, self.path.earlier(1)) {
            (Some(previous), Some(last)) if next > 0.0 => {
                let r = (last.ln() - sigma.ln()) / h;
                mix(1.0 + 1.0 / (2.0 * r), denoised, -1.0 / (2.0 * r), previous)?
            }
            _ => denoised.clone(),
        };
        let x = mix(next / sigma, &self.path.x, -(-h).exp_m1(), &target)?;
        self.previous = Some(denoised.clone());
        self.path.arrive(x);
        Ok(())
    }

    fn latents(&self) -> &Tensor {
        &self.path.x
    }

    fn progress(&self) -> (usize, usize) {
        self.path.progress()
    }
}

/// Linear multistep of fourth order ("LMS"): the slope is extrapolated through the last
/// four as a polynomial of sigma.
#[derive(Debug, Clone)]
pub struct Lms {
    path: Descent,
    /// The last slopes, newest first.
    slopes: Vec<Tensor>,
}

/// How many slopes [`Lms`] uses.
const ORDER: usize = 4;

impl Lms {
    /// Starts from `x`, noise times the first sigma. `sigmas` fall and end in 0.
    pub fn new(x: Tensor, sigmas: Vec<f64>) -> Self {
        Self {
            path: Descent::new(x, sigmas),
            slopes: Vec::new(),
        }
    }
}

impl Sampler for Lms {
    fn query(&self) -> Option<Query> {
        self.path.query()
    }

    fn advance(&mut self, denoised: &Tensor, _: &mut StepNoise<'_>) -> Result<()> {
        let Some((sigma, next)) = self.path.pair() else {
            return Ok(());
        };
        self.slopes.insert(0, ((&self.path.x - denoised)? / sigma)?);
        self.slopes.truncate(ORDER);
        let known: Vec<f64> = (0..self.slopes.len())
            .filter_map(|back| self.path.earlier(back))
            .map(|earlier| earlier - sigma)
            .collect();
        let mut x = self.path.x.clone();
        for (j, slope) in self.slopes.iter().enumerate() {
            x = (x + slope * share(&known, j, next - sigma))?;
        }
        self.path.arrive(x);
        Ok(())
    }

    fn latents(&self) -> &Tensor {
        &self.path.x
    }

    fn progress(&self) -> (usize, usize) {
        self.path.progress()
    }
}

/// The integral from 0 to `end` of the polynomial that is 1 at point `j` of `points` and 0
/// at the others.
fn share(points: &[f64], j: usize, end: f64) -> f64 {
    let Some(at) = points.get(j) else { return 0.0 };
    // Coefficients, constant first.
    let mut polynomial = vec![1.0];
    for (_, point) in points.iter().enumerate().filter(|(m, _)| *m != j) {
        let mut product = vec![0.0; polynomial.len() + 1];
        for (power, c) in polynomial.iter().enumerate() {
            for (shift, factor) in [(0, -point), (1, 1.0)] {
                if let Some(p) = product.get_mut(power + shift) {
                    *p += c * factor / (at - point);
                }
            }
        }
        polynomial = product;
    }
    let terms = polynomial.iter().enumerate();
    terms
        .map(|(power, c)| c * end.powi(power as i32 + 1) / (power + 1) as f64)
        .sum()
}
