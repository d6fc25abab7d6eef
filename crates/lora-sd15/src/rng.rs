//! torch's normal random numbers, so that a seed gives the picture that other tools
//! draw with it.

use crate::{Error, Result};

/// Which generator a seed refers to: A1111's "RNG" setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NoiseSource {
    /// CUDA's Philox 4x32-10, computed on the host: A1111's default "GPU" and its "NV".
    #[default]
    Philox,
    /// torch's CPU generator, mt19937: A1111's "CPU", diffusers' examples.
    Cpu,
}

impl NoiseSource {
    /// By the web UI's name, in any letter case.
    ///
    /// # Errors
    /// [`Error::UnknownName`].
    pub fn from_name(name: &str) -> Result<Self> {
        match name.to_uppercase().as_str() {
            "GPU" | "NV" => Ok(Self::Philox),
            "CPU" => Ok(Self::Cpu),
            _ => Err(Error::UnknownName {
                what: "RNG",
                name: name.to_string(),
                known: "GPU, NV, CPU".into(),
            }),
        }
    }
}

/// A generator of standard normal numbers, one per image.
///
/// ```
/// use lora_sd15::{NoiseGenerator, NoiseSource};
/// let mut noise = NoiseGenerator::new(NoiseSource::Cpu, 0);
/// let first = noise.normal(1)[0];
/// assert!((first - 1.5409961).abs() < 1e-6); // torch.manual_seed(0); torch.randn(1)
/// ```
#[derive(Debug, Clone)]
pub struct NoiseGenerator(Generator);

#[derive(Debug, Clone)]
enum Generator {
    Philox { seed: u64, draw: u32 },
    Mt19937(Box<Mt19937>),
}

impl NoiseGenerator {
    /// A generator for one image's seed.
    pub fn new(source: NoiseSource, seed: u64) -> Self {
        Self(match source {
            NoiseSource::Philox => Generator::Philox { seed, draw: 0 },
            NoiseSource::Cpu => Generator::Mt19937(Box::new(Mt19937::new(seed as u32))),
        })
    }

    /// The next tensor of `n` numbers, as `torch.randn` would fill it.
    pub fn normal(&mut self, n: usize) -> Vec<f32> {
        match &mut self.0 {
            Generator::Philox { seed, draw } => {
                let values = (0..n)
                    .map(|i| philox_normal(*seed, *draw, i as u32))
                    .collect();
                *draw += 1;
                values
            }
            Generator::Mt19937(mt) => mt.normal(n),
        }
    }
}

/// Element `index` of draw number `draw`.
fn philox_normal(seed: u64, draw: u32, index: u32) -> f32 {
    let words = philox_words(seed, draw, index);
    let a = f64::from(2.328_306_4e-10_f32);
    let b = f64::from(2.328_306_4e-10_f32 * 6.283_185_5_f32);
    let u = f64::from(words[0]) * a + a / 2.0;
    let v = f64::from(words[1]) * b + b / 2.0;
    ((-2.0 * u.ln()).sqrt() * v.sin()) as f32
}

/// The four words of element `index` in draw number `draw`, as [`NoiseSource::Philox`]
/// takes them.
pub fn philox_words(seed: u64, draw: u32, index: u32) -> [u32; 4] {
    philox([draw, 0, index, 0], [seed as u32, (seed >> 32) as u32])
}

/// Ten rounds of Philox 4x32 (Salmon et al. 2011).
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [
                key[0].wrapping_add(0x9E37_79B9),
                key[1].wrapping_add(0xBB67_AE85),
            ];
        }
        let [c0, c1, c2, c3] = counter;
        let p0 = u64::from(c0) * 0xD251_1F53;
        let p1 = u64::from(c2) * 0xCD9E_8D57;
        counter = [
            (p1 >> 32) as u32 ^ c1 ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ c3 ^ key[1],
            p0 as u32,
        ];
    }
    counter
}

const N: usize = 624;
const M: usize = 397;

/// The Mersenne Twister (Matsumoto and Nishimura 1998) as torch drives it.
#[derive(Debug, Clone)]
struct Mt19937 {
    state: [u32; N],
    position: usize,
    spare: Option<f64>,
}

impl Mt19937 {
    fn new(seed: u32) -> Self {
        let mut state = [0u32; N];
        state[0] = seed;
        for i in 1..N {
            let previous = state[i - 1];
            state[i] = 1_812_433_253u32
                .wrapping_mul(previous ^ (previous >> 30))
                .wrapping_add(i as u32);
        }
        Self {
            state,
            position: N,
            spare: None,
        }
    }

    fn next(&mut self) -> u32 {
        if self.position == N {
            for i in 0..N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7FFF_FFFF);
                let odd = if y & 1 == 1 { 0x9908_B0DF } else { 0 };
                self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
            }
            self.position = 0;
        }
        let mut y = self.state[self.position];
        self.position += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9D2C_5680;
        y ^= (y << 15) & 0xEFC6_0000;
        y ^ (y >> 18)
    }

    fn uniform_f32(&mut self) -> f32 {
        (self.next() & 0x00FF_FFFF) as f32 / (1u32 << 24) as f32
    }

    fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.next());
        let word = (high << 32) | u64::from(self.next());
        (word & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
    }

    /// Tensors of 16 numbers or more are transformed in blocks of 16, shorter ones
    /// number by number in double precision.
    fn normal(&mut self, n: usize) -> Vec<f32> {
        if n < 16 {
            return (0..n).map(|_| self.scalar() as f32).collect();
        }
        let mut values: Vec<f32> = (0..n).map(|_| self.uniform_f32()).collect();
        for block in values.chunks_exact_mut(16) {
            box_muller(block);
        }
        if !n.is_multiple_of(16) {
            let tail = &mut values[n - 16..];
            for value in tail.iter_mut() {
                *value = self.uniform_f32();
            }
            box_muller(tail);
        }
        values
    }

    fn scalar(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let u1 = self.uniform_f64();
        let u2 = self.uniform_f64();
        let radius = (-2.0 * (1.0 - u2).ln()).sqrt();
        let angle = 2.0 * std::f64::consts::PI * u1;
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

/// Turns 16 uniform numbers into normal ones: 8 radii, 8 angles.
fn box_muller(block: &mut [f32]) {
    for j in 0..8 {
        let radius = (-2.0 * (1.0 - block[j]).ln()).sqrt();
        let angle = 2.0 * std::f32::consts::PI * block[j + 8];
        block[j] = radius * angle.cos();
        block[j + 8] = radius * angle.sin();
    }
}
