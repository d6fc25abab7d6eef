//! 3x3 convolutions of stride 1 by Winograd's algorithm F(4x4, 3x3) (Lavin and Gray 2015), for
//! any processor: 36 products per 16 outputs and channel pair instead of 144.
//!
//! Per image: 6x6 input tiles are transformed to `v[36][panel][channel][64]`; then, for a
//! chunk of output channels at a time, weights are transformed to `u[output][36][channel]`,
//! the 36 products `m = u v` computed, each by one thread, and transformed back to 4x4 output
//! tiles. Transformed weights are four times as large as the weights, so they are never kept.
//!
//! The result differs from direct summation by rounding (a few 1e-6 of the output's size).

use rayon::prelude::*;

use crate::Compute;
use crate::buffer::zeros;
use crate::conv3x3::{Conv3x3, Way};
use crate::math::vectorized;
use crate::matrix::{PANEL, Values, View, multiply_here};

/// Points of a transformed tile.
const POINTS: usize = 36;
/// Fewer tiles or channels do not pay for transforming the weights.
const MIN_TILES: usize = 64;
const MIN_CHANNELS: usize = 32;
/// Most output channels at a time, and those whose weights one task transforms.
const MAX_CHUNK: usize = 160;
const WEIGHTS: usize = 8;

/// A convolution done this way.
pub(crate) struct Winograd(pub(crate) Conv3x3);

impl Way for Winograd {
    fn conv(&self) -> &Conv3x3 {
        &self.0
    }

    fn pays(&self) -> bool {
        self.tiles() >= MIN_TILES && self.0.c >= MIN_CHANNELS && self.0.o >= MIN_CHANNELS
    }

    fn run(&self, y: &mut [f32], accumulate: bool, x: &[f32], weight: Values<'_>) {
        let inputs = x.chunks(self.0.c * self.0.area());
        let images = y.chunks_mut(self.0.o * self.0.area()).zip(inputs);
        images.for_each(|(y, x)| self.run_image(y, accumulate, x, weight));
    }
}

impl Winograd {
    fn rows(&self) -> usize {
        self.0.h.div_ceil(4)
    }

    fn columns(&self) -> usize {
        self.0.w.div_ceil(4)
    }

    fn tiles(&self) -> usize {
        self.rows() * self.columns()
    }

    /// Output channels at a time.
    fn chunk(&self) -> usize {
        self.0.o.div_ceil(self.0.o.div_ceil(MAX_CHUNK))
    }

    /// One image, `[c, h, w]` to `[o, h, w]`.
    fn run_image(&self, y: &mut [f32], accumulate: bool, x: &[f32], weight: Values<'_>) {
        let (tiles, panels) = (self.tiles(), self.tiles().div_ceil(PANEL));
        let plane = self.0.h * self.0.w;
        let v = self.transform_inputs(x);
        let chunk = self.chunk();
        let (mut u, mut m) = (Vec::new(), Vec::new());
        for (number, y) in y.chunks_mut(chunk * plane).enumerate() {
            let outputs = y.len() / plane;
            u.resize(outputs * POINTS * self.0.c, 0f32);
            u.par_chunks_mut(WEIGHTS * POINTS * self.0.c)
                .enumerate()
                .for_each(|(part, u)| {
                    let first = number * chunk + part * WEIGHTS;
                    vectorized(|| match weight {
                        Values::F32(w) => self.transform_weight(w, first, u),
                        Values::Bf16(w) => self.transform_weight(w, first, u),
                    });
                });
            m.resize(POINTS * outputs * tiles, 0f32);
            m.par_chunks_mut(outputs * tiles)
                .zip(v.par_chunks(panels * self.0.c * PANEL))
                .enumerate()
                .for_each(|(point, (m, v))| {
                    for (panel, v) in v.chunks_exact(self.0.c * PANEL).enumerate() {
                        let tile = panel * PANEL;
                        multiply_here(
                            Compute::F32,
                            &mut m[tile..],
                            tiles,
                            false,
                            View::rows(
                                &u[point * self.0.c..],
                                outputs,
                                self.0.c,
                                POINTS * self.0.c,
                            ),
                            View::rows(v, self.0.c, PANEL.min(tiles - tile), PANEL),
                        );
                    }
                });
            y.par_chunks_mut(plane).enumerate().for_each(|(output, y)| {
                let points = |point: usize| &m[(point * outputs + output) * tiles..][..tiles];
                vectorized(|| self.transform_output(points, y, accumulate));
            });
        }
    }

    /// The channels `[c, h, w]` to `[36][panel][c][64]`, where panels are of 64 tiles: as the
    /// products read them.
    #[allow(unsafe_code)]
    fn transform_inputs(&self, x: &[f32]) -> Vec<f32> {
        /// Where each channel writes its own lines.
        struct Lines(*mut f32);
        // SAFETY: no two channels write the same line.
        unsafe impl Sync for Lines {}
        impl Lines {
            fn line(&self, number: usize) -> *mut f32 {
                self.0.wrapping_add(number * PANEL)
            }
        }

        let (tiles, panels) = (self.tiles(), self.tiles().div_ceil(PANEL));
        let mut v: Vec<f32> = zeros(POINTS * panels * self.0.c * PANEL);
        let lines = Lines(v.as_mut_ptr());
        let channels = x.par_chunks(self.0.h * self.0.w).enumerate().take(self.0.c);
        channels.for_each_init(
            || vec![0f32; POINTS * tiles],
            |points, (channel, x)| {
                vectorized(|| self.transform_input(x, points));
                for (point, values) in points.chunks_exact(tiles).enumerate() {
                    for (panel, values) in values.chunks(PANEL).enumerate() {
                        let line = lines.line((point * panels + panel) * self.0.c + channel);
                        // SAFETY: there are 36 times `panels` times `c` lines of 64 values; this
                        // one is written for this channel only.
                        unsafe {
                            std::ptr::copy_nonoverlapping(values.as_ptr(), line, values.len());
                        }
                    }
                }
            },
        );
        v
    }

    /// One channel `[h, w]` to `[36][tile]`.
    #[inline(always)]
    fn transform_input(&self, x: &[f32], v: &mut [f32]) {
        let (columns, tiles) = (self.columns(), self.tiles());
        let width = 4 * columns + 4;
        let mut lines = vec![0f32; 6 * width];
        // The values of a line by their place in a tile: 0 to 3, of the next tile, too.
        let mut parts = vec![0f32; 4 * (columns + 1)];
        for row in 0..self.rows() {
            for (r, line) in lines.chunks_exact_mut(width).enumerate() {
                line.fill(0.0);
                if let Some(source) = (4 * row + r).checked_sub(1).filter(|y| *y < self.0.h) {
                    line[1..=self.0.w].copy_from_slice(&x[source * self.0.w..][..self.0.w]);
                }
            }
            let (d01, d2345) = lines.split_at_mut(2 * width);
            let (d0, d1) = d01.split_at_mut(width);
            let (d23, d45) = d2345.split_at_mut(2 * width);
            let (d2, d3) = d23.split_at_mut(width);
            let (d4, d5) = d45.split_at_mut(width);
            for i in 0..width {
                let d = input_points([d0[i], d1[i], d2[i], d3[i], d4[i], d5[i]]);
                [d0[i], d1[i], d2[i], d3[i], d4[i], d5[i]] = d;
            }
            for (r, line) in lines.chunks_exact(width).enumerate() {
                let (q01, q23) = parts.split_at_mut(2 * (columns + 1));
                let (q0, q1) = q01.split_at_mut(columns + 1);
                let (q2, q3) = q23.split_at_mut(columns + 1);
                for (j, four) in line.chunks_exact(4).enumerate() {
                    (q0[j], q1[j], q2[j], q3[j]) = (four[0], four[1], four[2], four[3]);
                }
                let mut out = v[6 * r * tiles..][..6 * tiles].chunks_exact_mut(tiles);
                let mut next = || match out.next() {
                    Some(point) => &mut point[row * columns..][..columns],
                    None => &mut [],
                };
                let [o0, o1, o2, o3, o4, o5] = [next(), next(), next(), next(), next(), next()];
                for j in 0..columns {
                    let d = [q0[j], q1[j], q2[j], q3[j], q0[j + 1], q1[j + 1]];
                    [o0[j], o1[j], o2[j], o3[j], o4[j], o5[j]] = input_points(d);
                }
            }
        }
    }

    /// The weights of output channels from `first` on, as many as there is room for:
    /// `[output][36][channel]`.
    #[inline(always)]
    fn transform_weight<T: Copy + Into<f32>>(&self, weight: &[T], first: usize, u: &mut [f32]) {
        let c = self.0.c;
        let outputs = u.len() / (POINTS * c);
        // Taps apart: [output][9][channel].
        let mut taps = vec![0f32; outputs * 9 * c];
        if self.0.transposed {
            for channel in 0..c {
                let kernels = &weight[(channel * self.0.o + first) * 9..][..outputs * 9];
                for (output, kernel) in kernels.chunks_exact(9).enumerate() {
                    for (tap, value) in kernel.iter().enumerate() {
                        taps[(output * 9 + 8 - tap) * c + channel] = (*value).into();
                    }
                }
            }
        } else {
            let kernels = &weight[first * c * 9..][..outputs * c * 9];
            for (output, kernels) in kernels.chunks_exact(c * 9).enumerate() {
                let taps = &mut taps[output * 9 * c..][..9 * c];
                for (channel, kernel) in kernels.chunks_exact(9).enumerate() {
                    for (tap, value) in kernel.iter().enumerate() {
                        taps[tap * c + channel] = (*value).into();
                    }
                }
            }
        }
        let mut half = vec![0f32; 18 * c];
        for (output, taps) in taps.chunks_exact(9 * c).enumerate() {
            // Columns of the kernel first, then its rows.
            for k in 0..3 {
                let (a, b, d) = (&taps[k * c..], &taps[(k + 3) * c..], &taps[(k + 6) * c..]);
                for i in 0..c {
                    for (r, value) in weight_points([a[i], b[i], d[i]]).into_iter().enumerate() {
                        half[(r * 3 + k) * c + i] = value;
                    }
                }
            }
            for (r, row) in half.chunks_exact(3 * c).enumerate() {
                let (a, rest) = row.split_at(c);
                let (b, d) = rest.split_at(c);
                for k in 0..6 {
                    let at = (output * POINTS + r * 6 + k) * c;
                    for (((u, a), b), d) in u[at..at + c].iter_mut().zip(a).zip(b).zip(d) {
                        *u = weight_points([*a, *b, *d])[k];
                    }
                }
            }
        }
    }

    /// One output channel's 36 points, each of all tiles, to `[h, w]`.
    #[inline(always)]
    fn transform_output<'m>(
        &self,
        points: impl Fn(usize) -> &'m [f32],
        y: &mut [f32],
        accumulate: bool,
    ) {
        let columns = self.columns();
        // Four lines by six points, then one line of outputs by their place in a tile.
        let mut lines = vec![0f32; 24 * columns];
        let mut line = vec![0f32; 4 * columns];
        for row in 0..self.rows() {
            for k in 0..6 {
                let point = |r: usize| &points(r * 6 + k)[row * columns..][..columns];
                let [m0, m1, m2, m3, m4, m5] = [0, 1, 2, 3, 4, 5].map(point);
                for j in 0..columns {
                    let out = output_points([m0[j], m1[j], m2[j], m3[j], m4[j], m5[j]]);
                    for (r, value) in out.into_iter().enumerate() {
                        lines[(r * 6 + k) * columns + j] = value;
                    }
                }
            }
            for (r, points) in lines.chunks_exact(6 * columns).enumerate() {
                let at = 4 * row + r;
                if at >= self.0.h {
                    break;
                }
                let point = |k: usize| &points[k * columns..][..columns];
                let [m0, m1, m2, m3, m4, m5] = [0, 1, 2, 3, 4, 5].map(point);
                for (j, out) in line.chunks_exact_mut(4).enumerate() {
                    let four = output_points([m0[j], m1[j], m2[j], m3[j], m4[j], m5[j]]);
                    out.copy_from_slice(&four);
                }
                let y = &mut y[at * self.0.w..][..self.0.w];
                if accumulate {
                    y.iter_mut().zip(&line).for_each(|(y, v)| *y += v);
                } else {
                    y.copy_from_slice(&line[..self.0.w]);
                }
            }
        }
    }
}

/// `B^T d`.
#[inline(always)]
fn input_points(d: [f32; 6]) -> [f32; 6] {
    let (even, odd) = (d[4] - 4.0 * d[2], d[3] - 4.0 * d[1]);
    let (even2, odd2) = (d[4] - d[2], 2.0 * (d[3] - d[1]));
    [
        4.0 * d[0] - 5.0 * d[2] + d[4],
        even + odd,
        even - odd,
        even2 + odd2,
        even2 - odd2,
        4.0 * d[1] - 5.0 * d[3] + d[5],
    ]
}

/// `G g`.
#[inline(always)]
fn weight_points(g: [f32; 3]) -> [f32; 6] {
    let (sum, sum2) = ((g[0] + g[2]) / -6.0, (g[0] + 4.0 * g[2]) / 24.0);
    [
        g[0] / 4.0,
        sum - g[1] / 6.0,
        sum + g[1] / 6.0,
        sum2 + g[1] / 12.0,
        sum2 - g[1] / 12.0,
        g[2],
    ]
}

/// `A^T m`.
#[inline(always)]
fn output_points(m: [f32; 6]) -> [f32; 4] {
    let (a, b) = (m[1] + m[2], m[1] - m[2]);
    let (c, e) = (m[3] + m[4], m[3] - m[4]);
    [m[0] + a + c, b + 2.0 * e, a + 4.0 * c, b + 8.0 * e + m[5]]
}
