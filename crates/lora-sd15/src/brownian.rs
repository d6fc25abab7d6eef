//! The Brownian motion behind the noise of SDE samplers: the same picture at any number of
//! steps.

use candle_core::{Device, Result, Tensor};

use crate::rng::{NoiseGenerator, NoiseSource};

/// One picture's Brownian motion over noise levels, refined where it is asked.
///
/// ```
/// use lora_sd15::{BrownianTree, NoiseSource};
/// let mut tree = BrownianTree::new(NoiseSource::Philox, 42, 4 * 8 * 8, 0.03, 14.6);
/// let noise = tree.between(14.6, 7.0);
/// assert_eq!(noise.len(), 4 * 8 * 8);
/// assert_eq!(noise, tree.between(14.6, 7.0));
/// ```
#[derive(Debug, Clone)]
pub struct BrownianTree {
    source: NoiseSource,
    seed: u64,
    low: f64,
    high: f64,
    root: Node,
}

#[derive(Debug, Clone)]
struct Node {
    low: f64,
    high: f64,
    /// Place among the nodes of its depth.
    key: u32,
    depth: u32,
    /// The motion from `low` to `high`.
    change: Vec<f32>,
    halves: Option<Box<Halves>>,
}

#[derive(Debug, Clone)]
struct Halves {
    middle: f64,
    left: Node,
    right: Node,
}

impl BrownianTree {
    /// The motion of `count` numbers between the levels `low` and `high`.
    pub fn new(source: NoiseSource, seed: u64, count: usize, low: f64, high: f64) -> Self {
        let (low, high) = (f64::from(low as f32), f64::from(high as f32));
        let word = seed_sequence(seed, &[], 1).first().copied().unwrap_or(0);
        let spread = (high - low).max(0.0).sqrt() as f32;
        let mut change = NoiseGenerator::new(source, word.into()).normal(count);
        change.iter_mut().for_each(|v| *v *= spread);
        let root = Node {
            low: rounded(low),
            high: rounded(high),
            key: 0,
            depth: 0,
            change,
            halves: None,
        };
        Self {
            source,
            seed,
            low,
            high,
            root,
        }
    }

    /// Standard normal numbers for the step between two levels, in any order.
    pub fn between(&mut self, from: f64, to: f64) -> Vec<f32> {
        let (low, high) = (from.min(to) as f32, from.max(to) as f32);
        let a = rounded(f64::from(low).max(self.low));
        let b = rounded(f64::from(high).min(self.high));
        let mut sum = vec![0f32; self.root.change.len()];
        if a < b {
            let refine = Refine {
                source: self.source,
                seed: self.seed,
            };
            refine.add(&mut self.root, a, b, &mut sum);
        }
        let width = (high - low).sqrt();
        if width > 0.0 {
            sum.iter_mut().for_each(|v| *v /= width);
        }
        sum
    }
}

/// Levels are told apart to six decimals.
fn rounded(level: f64) -> f64 {
    format!("{level:.6}").parse().unwrap_or(level)
}

struct Refine {
    source: NoiseSource,
    seed: u64,
}

impl Refine {
    fn split<'a>(&self, node: &'a mut Node) -> &'a mut Halves {
        let (low, high) = (node.low, node.high);
        node.halves.get_or_insert_with(|| {
            let middle = rounded(0.5 * (low + high));
            let word = seed_sequence(self.seed, &[node.key, node.depth], 1);
            let word = word.first().copied().unwrap_or(0);
            let noise = NoiseGenerator::new(self.source, word.into()).normal(node.change.len());
            let inverse = 1.0 / (high - low);
            let (before, after) = (middle - low, high - middle);
            let spread = (before * after * inverse).max(0.0).sqrt() as f32;
            let change = node.change.iter().zip(&noise);
            let left: Vec<f32> = change
                .map(|(w, n)| before as f32 * w * inverse as f32 + spread * n)
                .collect();
            let right = node.change.iter().zip(&left).map(|(w, l)| w - l).collect();
            let child = |low, high, key, change| Node {
                low,
                high,
                key,
                depth: node.depth + 1,
                change,
                halves: None,
            };
            let key = node.key.wrapping_mul(2);
            Box::new(Halves {
                middle,
                left: child(low, middle, key, left),
                right: child(middle, high, key.wrapping_add(1), right),
            })
        })
    }

    /// Adds the motion between `a` and `b`, both inside `node`.
    fn add(&self, node: &mut Node, a: f64, b: f64, sum: &mut [f32]) {
        // Levels closer than the rounding cannot be split further.
        let whole = (a <= node.low && b >= node.high) || node.high - node.low < 1.5e-6;
        if whole {
            sum.iter_mut().zip(&node.change).for_each(|(s, c)| *s += c);
            return;
        }
        let halves = self.split(node);
        let middle = halves.middle;
        if a < middle {
            self.add(&mut halves.left, a, b.min(middle), sum);
        }
        if b > middle {
            self.add(&mut halves.right, a.max(middle), b, sum);
        }
    }
}

/// The motions of a batch: one tree per picture.
#[derive(Debug, Clone)]
pub(crate) struct BrownianBatch {
    trees: Vec<BrownianTree>,
    shape: [usize; 3],
}

impl BrownianBatch {
    pub(crate) fn new(
        source: NoiseSource,
        seeds: &[u64],
        shape: [usize; 3],
        sigmas: &[f64],
    ) -> Self {
        let above = sigmas.iter().copied().filter(|s| *s > 0.0);
        let low = above.clone().fold(f64::INFINITY, f64::min);
        let high = above.fold(0.0, f64::max);
        let count = shape.iter().product();
        let tree = |seed: &u64| BrownianTree::new(source, *seed, count, low.min(high), high);
        Self {
            trees: seeds.iter().map(tree).collect(),
            shape,
        }
    }

    pub(crate) fn between(&mut self, from: f64, to: f64, device: &Device) -> Result<Tensor> {
        let pictures: Vec<Vec<f32>> = self.trees.iter_mut().map(|t| t.between(from, to)).collect();
        let [c, h, w] = self.shape;
        Tensor::from_vec(pictures.concat(), (pictures.len(), c, h, w), device)
    }
}

/// How many words numpy's pool is told to hold here.
const POOL: usize = 24;

/// Words of numpy's `SeedSequence(entropy, spawn_key=..., pool_size=24)`.
pub fn seed_sequence(entropy: u64, spawn_key: &[u32], words: usize) -> Vec<u32> {
    let mut input = vec![entropy as u32];
    if entropy >> 32 != 0 {
        input.push((entropy >> 32) as u32);
    }
    input.resize(POOL, 0);
    input.extend(spawn_key);

    let mut state = 0x43B0_D7E5u32;
    let mut hash = |mut value: u32| {
        value ^= state;
        state = state.wrapping_mul(0x931E_8875);
        value = value.wrapping_mul(state);
        value ^ (value >> 16)
    };
    let mix = |x: u32, y: u32| {
        let r = 0xCA01_F9DDu32
            .wrapping_mul(x)
            .wrapping_sub(0x4973_F715u32.wrapping_mul(y));
        r ^ (r >> 16)
    };
    let mut pool = [0u32; POOL];
    for (slot, word) in pool.iter_mut().zip(&input) {
        *slot = hash(*word);
    }
    for source in 0..POOL {
        for target in (0..POOL).filter(|t| *t != source) {
            pool[target] = mix(pool[target], hash(pool[source]));
        }
    }
    for word in input.iter().skip(POOL) {
        for slot in &mut pool {
            *slot = mix(*slot, hash(*word));
        }
    }
    let mut state = 0x8B51_F9DDu32;
    pool.iter()
        .cycle()
        .take(words)
        .map(|word| {
            let mut value = word ^ state;
            state = state.wrapping_mul(0x58F3_8DED);
            value = value.wrapping_mul(state);
            value ^ (value >> 16)
        })
        .collect()
}
