//! DPM-Solver++ (Lu et al. 2022), multistep of second order.

use candle_core::{Result, Tensor};

use super::{Query, Sampler, StepNoise};

/// DPM++ 2M.
#[derive(Debug, Clone)]
pub struct Dpmpp2m {
    x: Tensor,
    sigmas: Vec<f64>,
    step: usize,
    previous: Option<Tensor>,
}

impl Dpmpp2m {
    /// Starts from `x`, noise times the first sigma. `sigmas` fall and end in 0.
    pub fn new(x: Tensor, sigmas: Vec<f64>) -> Self {
        Self {
            x,
            sigmas,
            step: 0,
            previous: None,
        }
    }
}

impl Sampler for Dpmpp2m {
    fn query(&self) -> Option<Query> {
        let &[sigma, _] = self.sigmas.get(self.step..self.step + 2)? else {
            return None;
        };
        Some(Query::Sigma {
            x: self.x.clone(),
            sigma,
        })
    }

    fn advance(&mut self, denoised: &Tensor, _: &mut StepNoise<'_>) -> Result<()> {
        let Some(&[sigma, next]) = self.sigmas.get(self.step..self.step + 2) else {
            return Ok(());
        };
        let h = sigma.ln() - next.ln();
        // At next = 0, h is infinite: x is replaced by the denoised latents.
        let target = match (
            &self.previous,
            self.step.checked_sub(1).and_then(|i| self.sigmas.get(i)),
        ) {
            (Some(previous), Some(last)) if next > 0.0 => {
                let r = (last.ln() - sigma.ln()) / h;
                ((denoised * (1.0 + 1.0 / (2.0 * r)))? - previous * (1.0 / (2.0 * r)))?
            }
            _ => denoised.clone(),
        };
        self.x = ((&self.x * (next / sigma))? - target * (-h).exp_m1())?;
        self.previous = Some(denoised.clone());
        self.step += 1;
        Ok(())
    }

    fn latents(&self) -> &Tensor {
        &self.x
    }

    fn progress(&self) -> (usize, usize) {
        (self.step, self.sigmas.len().saturating_sub(1))
    }
}
