//! How many singular values are kept.

use crate::{Error, Result};

/// A rule that picks a rank from the singular values `s_1 >= s_2 >= ...` of a matrix.
///
/// | rule | keeps | known from |
/// |---|---|---|
/// | `Fixed(n)` | n | everywhere |
/// | `Threshold(p)` | values above p | LyCORIS extraction |
/// | `Ratio(p)` | values above `p s_1` | LyCORIS extraction |
/// | `Quantile(p)` | as many as sum to less than p of the sum of all | LyCORIS extraction |
/// | `SvRatio(p)` | values above `s_1 / p` | sd-scripts resize |
/// | `SvCumulative(p)` | the fewest that sum to p of the sum of all | sd-scripts resize |
/// | `SvFro(p)` | the fewest with p of the Frobenius norm | sd-scripts resize |
/// | `Energy(p)` | the fewest with p of the squared Frobenius norm | |
///
/// Every rule keeps at least one value. sd-scripts itself keeps one more than its
/// rules say, and at least two: see [`RankRule::sd_scripts_rank`].
///
/// ```
/// use lora_core::algebra::RankRule;
/// let s = [4.0, 2.0, 1.0, 1.0];
/// assert_eq!(RankRule::SvRatio(3.0).rank(&s, 22.0), 2);
/// assert_eq!(RankRule::SvCumulative(0.75).rank(&s, 22.0), 2);
/// assert_eq!(RankRule::Quantile(0.8).rank(&s, 22.0), 2);
/// assert_eq!(RankRule::SvRatio(3.0).sd_scripts_rank(&s), Some(3));
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RankRule {
    /// This rank.
    Fixed(usize),
    /// Values above a number.
    Threshold(f64),
    /// Values above a part of the largest.
    Ratio(f64),
    /// Values while their sum stays below a part of the sum of all.
    Quantile(f64),
    /// Values above the largest divided by a number.
    SvRatio(f64),
    /// The fewest whose sum reaches a part of the sum of all.
    SvCumulative(f64),
    /// The fewest that reach a part of the Frobenius norm.
    SvFro(f64),
    /// The fewest that reach a part of the squared Frobenius norm.
    Energy(f64),
}

impl RankRule {
    /// The rule by name, as `fixed`, `threshold`, `ratio`, `quantile`, `sv_ratio`,
    /// `sv_cumulative`, `sv_fro` or `energy`, and its number.
    ///
    /// # Errors
    /// [`Error::BadValue`] for an unknown name or a number out of range.
    pub fn from_name(name: &str, parameter: f64) -> Result<Self> {
        let bad = |value: String, expected| {
            Err(Error::BadValue {
                layer: "rank rule".into(),
                name: "rule",
                value,
                expected,
            })
        };
        let rule = match name {
            "fixed" if parameter >= 1.0 && parameter.fract() == 0.0 && parameter < 1e6 => {
                Self::Fixed(parameter as usize)
            }
            "fixed" => return bad(parameter.to_string(), "expected a whole rank of at least 1"),
            "threshold" => Self::Threshold(parameter),
            "ratio" => Self::Ratio(parameter),
            "quantile" => Self::Quantile(parameter),
            "sv_ratio" => Self::SvRatio(parameter),
            "sv_cumulative" => Self::SvCumulative(parameter),
            "sv_fro" => Self::SvFro(parameter),
            "energy" => Self::Energy(parameter),
            _ => {
                return bad(
                    format!("{name:?}"),
                    "expected fixed, threshold, ratio, quantile, sv_ratio, sv_cumulative, sv_fro or energy",
                );
            }
        };
        rule.validate()?;
        Ok(rule)
    }

    /// A rule as text: `32`, or a name of [`from_name`](Self::from_name) and its number
    /// with a colon between, such as `sv_fro:0.9`.
    ///
    /// # Errors
    /// As [`from_name`](Self::from_name).
    pub fn parse(text: &str) -> Result<Self> {
        let (name, number) = text.split_once(':').unwrap_or(("fixed", text));
        Self::from_name(name, number.parse().unwrap_or(f64::NAN))
    }

    /// Checks the rule's number.
    ///
    /// # Errors
    /// [`Error::BadValue`] when it is out of range.
    pub fn validate(self) -> Result<()> {
        let (value, sound, expected) = match self {
            Self::Fixed(n) => (n as f64, n > 0, "expected a rank of at least 1"),
            Self::Threshold(p) => (p, p >= 0.0, "expected a number of at least 0"),
            Self::SvRatio(p) => (p, p >= 1.0, "expected a number of at least 1"),
            Self::Ratio(p) => (p, (0.0..1.0).contains(&p), "expected 0 or more, below 1"),
            Self::Quantile(p) | Self::SvCumulative(p) | Self::SvFro(p) | Self::Energy(p) => {
                (p, p > 0.0 && p <= 1.0, "expected more than 0 and at most 1")
            }
        };
        if sound && value.is_finite() {
            return Ok(());
        }
        Err(Error::BadValue {
            layer: "rank rule".into(),
            name: "number",
            value: value.to_string(),
            expected,
        })
    }

    /// Whether the rule depends on every singular value.
    pub(crate) fn needs_all(self) -> bool {
        matches!(self, Self::Quantile(_) | Self::SvCumulative(_))
    }

    /// The rank for descending values of a matrix with this squared Frobenius norm; at
    /// least 1, at most as many as there are values.
    pub fn rank(self, values: &[f64], energy: f64) -> usize {
        let count = self.count(values, energy);
        count.clamp(1, values.len().max(1))
    }

    /// Whether leading values are enough to know the rank.
    pub(crate) fn decided(self, values: &[f64], energy: f64) -> bool {
        self.count(values, energy) < values.len()
    }

    fn count(self, values: &[f64], energy: f64) -> usize {
        let above = |bound: f64| values.iter().take_while(|s| **s > bound).count();
        let first = values.first().copied().unwrap_or(0.0);
        let sum = || values.iter().sum::<f64>();
        // How many leading terms leave the running sum below `goal`.
        let below = |terms: &dyn Fn(f64) -> f64, goal: f64| {
            let mut total = 0.0;
            let mut short = |s: &&f64| {
                total += terms(**s);
                total < goal
            };
            values.iter().take_while(|s| short(s)).count()
        };
        // Rounding must not ask for values that are not there.
        let whole = |p: f64| p * (1.0 - 1e-12);
        match self {
            Self::Fixed(n) => n,
            Self::Threshold(p) => above(p),
            Self::Ratio(p) => above(p * first),
            Self::SvRatio(p) => above(first / p),
            Self::Quantile(p) => below(&|s| s, p * sum()),
            Self::SvCumulative(p) => below(&|s| s, whole(p) * sum()) + 1,
            Self::SvFro(p) => below(&|s| s * s, whole(p * p) * energy) + 1,
            Self::Energy(p) => below(&|s| s * s, whole(p) * energy) + 1,
        }
    }

    /// The rank that sd-scripts' `resize_lora.py` takes by the same rule from all
    /// `min(out, in)` values: one more than the rule says, at least 2, and 1 for a
    /// matrix of zeros. `None` for rules that it does not have.
    pub fn sd_scripts_rank(self, values: &[f64]) -> Option<usize> {
        let n = values.len();
        let index = match self {
            Self::Fixed(rank) => return Some(rank.min(n)),
            _ if values.first().is_none_or(|s| *s <= 1e-6) => return Some(1),
            Self::SvRatio(_) | Self::SvCumulative(_) | Self::SvFro(_) => {
                self.count(values, values.iter().map(|s| s * s).sum())
            }
            _ => return None,
        };
        Some((index.clamp(1, n.saturating_sub(1).max(1)) + 1).min(n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_keep_what_they_say() {
        let s = [8.0, 4.0, 2.0, 1.0];
        let energy = 85.0;
        let rank = |rule: RankRule| rule.rank(&s, energy);
        assert_eq!(rank(RankRule::Fixed(9)), 4);
        assert_eq!(rank(RankRule::Threshold(2.0)), 2);
        assert_eq!(rank(RankRule::Threshold(100.0)), 1);
        assert_eq!(rank(RankRule::Ratio(0.25)), 2);
        assert_eq!(rank(RankRule::Quantile(0.5)), 1);
        assert_eq!(rank(RankRule::SvCumulative(1.0)), 4);
        assert_eq!(rank(RankRule::SvFro(0.85)), 1);
        assert_eq!(rank(RankRule::SvFro(0.95)), 2);
        assert_eq!(rank(RankRule::Energy(80.0 / 85.0)), 2);
    }

    #[test]
    fn bad_numbers_are_refused() {
        for (name, p) in [
            ("fixed", 0.0),
            ("fixed", 1.5),
            ("energy", 0.0),
            ("sv_fro", 1.1),
            ("sv_ratio", 0.5),
            ("threshold", f64::NAN),
            ("rank", 4.0),
        ] {
            assert!(RankRule::from_name(name, p).is_err(), "{name} {p}");
        }
        assert_eq!(
            RankRule::from_name("fixed", 8.0).unwrap(),
            RankRule::Fixed(8)
        );
    }
}
