//! Prodigy's formulas for one value: the first pass gathers, the second applies.

use crate::lane::{Lane, decay_into, decay_into_square};
use crate::slot::Kernel;

pub(super) struct Moments {
    pub(super) coupled: f32,
    pub(super) b1: f32,
    pub(super) m_new: f32,
    pub(super) b2: f32,
    pub(super) v_new: f32,
}

impl Moments {
    #[inline(always)]
    fn second<L: Lane>(&self, v: &mut L, g: &L) {
        *v = decay_into_square(v.clone(), g.clone(), self.b2, self.v_new);
    }
}

impl Kernel<2, 2, 0> for Moments {
    #[inline(always)]
    fn element<L: Lane>(&self, [m, v]: &mut [L; 2], [g, p]: [L; 2]) -> [L; 0] {
        let g = g + p.times(self.coupled);
        *m = decay_into(m.clone(), g.clone(), self.b1, self.m_new);
        self.second(v, &g);
        []
    }
}

impl Kernel<1, 2, 0> for Moments {
    #[inline(always)]
    fn element<L: Lane>(&self, [v]: &mut [L; 1], [g, p]: [L; 2]) -> [L; 0] {
        self.second(v, &(g + p.times(self.coupled)));
        []
    }
}

pub(super) struct Statistics {
    pub(super) coupled: f32,
    pub(super) b3: f32,
    pub(super) gain: f32,
}

impl Statistics {
    /// Sums of `g * displacement` and `|s|`.
    #[inline(always)]
    pub(super) fn sums<L: Lane>(&self, s: &mut L, g: L, displacement: L) -> [L; 2] {
        *s = decay_into(s.clone(), g.clone(), self.b3, self.gain);
        [g * displacement, s.clone().abs()]
    }
}

impl Kernel<1, 3, 2> for Statistics {
    #[inline(always)]
    fn element<L: Lane>(&self, [s]: &mut [L; 1], [g, p, p0]: [L; 3]) -> [L; 2] {
        self.sums(s, g + p.clone().times(self.coupled), p0 - p)
    }
}

/// A parameter that started at zero.
impl Kernel<1, 2, 2> for Statistics {
    #[inline(always)]
    fn element<L: Lane>(&self, [s]: &mut [L; 1], [g, p]: [L; 2]) -> [L; 2] {
        self.sums(s, g + p.clone().times(self.coupled), -p)
    }
}

pub(super) struct WithDisplacement(pub(super) Statistics);

impl Kernel<1, 3, 2> for WithDisplacement {
    #[inline(always)]
    fn element<L: Lane>(&self, [s]: &mut [L; 1], [g, p, u]: [L; 3]) -> [L; 2] {
        self.0.sums(s, g + p.times(self.0.coupled), u)
    }
}

/// Moments and statistics in one walk.
pub(super) struct Both {
    pub(super) moments: Moments,
    pub(super) stats: Statistics,
}

impl Both {
    #[inline(always)]
    fn all<L: Lane>(&self, [m, v, s]: &mut [L; 3], g: L, displacement: L) -> [L; 2] {
        *m = decay_into(m.clone(), g.clone(), self.moments.b1, self.moments.m_new);
        self.moments.second(v, &g);
        self.stats.sums(s, g, displacement)
    }
}

impl Kernel<3, 3, 2> for Both {
    #[inline(always)]
    fn element<L: Lane>(&self, state: &mut [L; 3], [g, p, p0]: [L; 3]) -> [L; 2] {
        self.all(state, g + p.clone().times(self.stats.coupled), p0 - p)
    }
}

impl Kernel<3, 2, 2> for Both {
    #[inline(always)]
    fn element<L: Lane>(&self, state: &mut [L; 3], [g, p]: [L; 2]) -> [L; 2] {
        self.all(state, g + p.clone().times(self.stats.coupled), -p)
    }
}

pub(super) struct Apply {
    pub(super) decay: f32,
    pub(super) coupled: f32,
    pub(super) step: f32,
    pub(super) eps: f32,
}

impl Apply {
    /// What is subtracted from the parameter, apart from the decoupled decay.
    #[inline(always)]
    fn amount<L: Lane>(&self, p: &L, m: L, v: L) -> L {
        (m + p.clone().times(self.coupled)).times(self.step) / v.sqrt().plus(self.eps)
    }
}

impl Kernel<1, 2, 0> for Apply {
    #[inline(always)]
    fn element<L: Lane>(&self, [p]: &mut [L; 1], [m, v]: [L; 2]) -> [L; 0] {
        let amount = self.amount(p, m, v);
        *p = p.clone() - p.clone().times(self.decay) - amount;
        []
    }
}

impl Kernel<2, 2, 0> for Apply {
    #[inline(always)]
    fn element<L: Lane>(&self, [p, u]: &mut [L; 2], [m, v]: [L; 2]) -> [L; 0] {
        let amount = self.amount(p, m, v) + p.clone().times(self.decay);
        *p = p.clone() - amount.clone();
        *u = u.clone() + amount;
        []
    }
}
