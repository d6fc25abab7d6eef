//! Line charts as small pictures.

use lora_sd15::Image;

const WIDTH: usize = 720;
const HEIGHT: usize = 360;
const LEFT: usize = 72;
const RIGHT: usize = 16;
const TOP: usize = 28;
const BOTTOM: usize = 28;

/// One line of a chart.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// What it shows.
    pub name: String,
    /// Red, green, blue.
    pub color: [u8; 3],
    /// Points, sorted by x.
    pub points: Vec<(f64, f64)>,
}

impl Curve {
    /// A line of these points; those that are not finite are left out.
    pub fn new(name: impl Into<String>, color: [u8; 3], points: Vec<(f64, f64)>) -> Self {
        let finite = |p: &(f64, f64)| p.0.is_finite() && p.1.is_finite();
        Self {
            name: name.into(),
            color,
            points: points.into_iter().filter(finite).collect(),
        }
    }
}

/// A chart of several lines over the same x, with axes and a legend.
///
/// ```
/// use lora_train::logs::{Curve, draw_curves};
/// let curve = Curve::new("average", [30, 90, 180], vec![(1.0, 0.4), (2.0, 0.2)]);
/// assert_eq!(draw_curves("loss", &[curve]).width, 720);
/// ```
pub fn draw_curves(title: &str, curves: &[Curve]) -> Image {
    let mut canvas = Image::plain(WIDTH, HEIGHT, [255; 3]);
    let all = || curves.iter().flat_map(|c| c.points.iter().copied());
    let (x0, x1) = range(all().map(|p| p.0));
    let (_, top) = range(percentile(all().map(|p| p.1).collect()));
    let (y0, y1) = (0.0, top);
    let at = |(x, y): (f64, f64)| {
        let w = (WIDTH - LEFT - RIGHT) as f64;
        let h = (HEIGHT - TOP - BOTTOM) as f64;
        let px = LEFT as f64 + (x - x0) / (x1 - x0) * w;
        let py = TOP as f64 + (1.0 - ((y - y0) / (y1 - y0)).clamp(0.0, 1.0)) * h;
        (px, py)
    };
    for i in 0..=4 {
        let y = y0 + (y1 - y0) * f64::from(i) / 4.0;
        let (_, py) = at((x0, y));
        line(
            &mut canvas,
            (LEFT as f64, py),
            ((WIDTH - RIGHT) as f64, py),
            [228; 3],
        );
        canvas.write(4, py as usize - 4, &short(y), [90; 3]);
    }
    canvas.write(LEFT, HEIGHT - 18, &short(x0), [90; 3]);
    let end = short(x1);
    canvas.write(WIDTH - RIGHT - 8 * end.len(), HEIGHT - 18, &end, [90; 3]);
    for curve in curves {
        for pair in curve.points.windows(2) {
            line(&mut canvas, at(pair[0]), at(pair[1]), curve.color);
        }
        if let [only] = curve.points.as_slice() {
            let (x, y) = at(*only);
            line(&mut canvas, (x - 2.0, y), (x + 2.0, y), curve.color);
        }
    }
    canvas.write(LEFT, 10, title, [20; 3]);
    let mut x = LEFT + 8 * (title.len() + 3);
    for curve in curves.iter().filter(|c| !c.points.is_empty()) {
        canvas.write(x, 10, &curve.name, curve.color);
        x += 8 * (curve.name.len() + 2);
    }
    canvas
}

/// Single outliers must not flatten the rest.
fn percentile(mut values: Vec<f64>) -> impl Iterator<Item = f64> {
    values.sort_by(f64::total_cmp);
    let keep = (values.len() * 99).div_ceil(100);
    values.truncate(keep.max(1));
    values.into_iter()
}

/// Smallest and largest value, never equal.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
        (l.min(v), h.max(v))
    });
    match (low.is_finite(), high > low) {
        (false, _) => (0.0, 1.0),
        (true, true) => (low, high),
        (true, false) => (low.min(0.0), low.max(0.0) + 1e-9),
    }
}

fn short(value: f64) -> String {
    if value.abs() >= 10.0 || value.fract() == 0.0 {
        return format!("{value:.0}");
    }
    if value.abs() < 1e-3 {
        return format!("{value:.1e}");
    }
    format!("{value:.3}")
}

fn line(image: &mut Image, from: (f64, f64), to: (f64, f64), color: [u8; 3]) {
    let steps = (to.0 - from.0).abs().max((to.1 - from.1).abs()).ceil();
    let steps = steps.max(1.0);
    for i in 0..=steps as usize {
        let t = i as f64 / steps;
        let x = from.0 + (to.0 - from.0) * t;
        let y = from.1 + (to.1 - from.1) * t;
        image.dot(x as usize, y as usize, color);
        image.dot(x as usize, y as usize + 1, color);
    }
}
