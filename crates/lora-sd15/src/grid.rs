//! Pictures side by side with labels, and text on pictures.

use font8x8::UnicodeFonts;

use crate::Image;

/// Width and height of a letter in pixels.
const LETTER: usize = 8;
const MARGIN: usize = 8;

/// A table of pictures with a label for each column and row, as X/Y grids are shown.
///
/// ```
/// use lora_sd15::{Grid, Image};
/// let square = Image { width: 16, height: 16, rgb: vec![200; 16 * 16 * 3] };
/// let grid = Grid {
///     columns: vec!["0.6".into(), "1.0".into()],
///     rows: vec!["zoe-000002".into()],
///     cells: vec![vec![Some(square.clone()), Some(square)]],
/// };
/// assert!(grid.draw().width > 2 * 16);
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Grid {
    /// Label of each column.
    pub columns: Vec<String>,
    /// Label of each row.
    pub rows: Vec<String>,
    /// Pictures, row by row; `None` leaves a cell empty.
    pub cells: Vec<Vec<Option<Image>>>,
}

impl Grid {
    /// The whole as one picture. Cells are as large as the largest picture; long labels
    /// are broken into lines.
    pub fn draw(&self) -> Image {
        let pictures = || self.cells.iter().flatten().flatten();
        let cell_width = pictures().map(|i| i.width).max().unwrap_or(64);
        let cell_height = pictures().map(|i| i.height).max().unwrap_or(64);
        let columns = self.cells.iter().map(Vec::len).max().unwrap_or(0);
        let heads: Vec<Vec<String>> = self
            .columns
            .iter()
            .map(|label| wrap(label, cell_width / LETTER))
            .collect();
        let sides: Vec<Vec<String>> = self.rows.iter().map(|label| wrap(label, 18)).collect();
        let lines = heads.iter().map(Vec::len).max().unwrap_or(0);
        let letters = sides
            .iter()
            .flatten()
            .map(|line| line.chars().count())
            .max()
            .unwrap_or(0);
        let top = if lines == 0 {
            0
        } else {
            lines * (LETTER + 2) + MARGIN
        };
        let left = if letters == 0 {
            0
        } else {
            letters * LETTER + MARGIN
        };
        let (step_x, step_y) = (cell_width + 4, cell_height + 4);
        let mut sheet = Image::plain(
            left + columns * step_x,
            top + self.cells.len() * step_y,
            [255; 3],
        );
        let black = [20; 3];
        for (i, lines) in heads.iter().enumerate() {
            for (k, line) in lines.iter().enumerate() {
                let width = line.chars().count() * LETTER;
                let x = left + i * step_x + cell_width.saturating_sub(width) / 2;
                sheet.write(x, MARGIN / 2 + k * (LETTER + 2), line, black);
            }
        }
        for (i, lines) in sides.iter().enumerate() {
            let y = top + i * step_y + cell_height / 2;
            for (k, line) in lines.iter().enumerate() {
                sheet.write(MARGIN / 2, y + k * (LETTER + 2), line, black);
            }
        }
        for (row, cells) in self.cells.iter().enumerate() {
            for (column, cell) in cells.iter().enumerate() {
                if let Some(picture) = cell {
                    sheet.paste(picture, left + column * step_x, top + row * step_y);
                }
            }
        }
        sheet
    }
}

/// Breaks text at blanks and commas where it can, else anywhere.
fn wrap(text: &str, letters: usize) -> Vec<String> {
    let letters = letters.max(4);
    let mut lines = Vec::new();
    let mut rest: Vec<char> = text.chars().collect();
    while rest.len() > letters {
        let at = rest
            .iter()
            .take(letters)
            .rposition(|c| matches!(c, ' ' | ',' | '-' | '_'))
            .filter(|at| *at > 0)
            .map_or(letters, |at| at + 1);
        let tail = rest.split_off(at);
        lines.push(rest.iter().collect());
        rest = tail;
    }
    if !rest.is_empty() {
        lines.push(rest.into_iter().collect());
    }
    lines
}

impl Image {
    /// A picture of one colour.
    pub fn plain(width: usize, height: usize, color: [u8; 3]) -> Self {
        Self {
            width,
            height,
            rgb: color.repeat(width * height),
        }
    }

    /// Copies `other` onto this picture with its upper left corner at `(x, y)`; what does
    /// not fit is cut off.
    pub fn paste(&mut self, other: &Image, x: usize, y: usize) {
        let wide = other.width.min(self.width.saturating_sub(x));
        for row in 0..other.height.min(self.height.saturating_sub(y)) {
            let from = 3 * row * other.width;
            let to = 3 * ((y + row) * self.width + x);
            if let (Some(source), Some(target)) = (
                other.rgb.get(from..from + 3 * wide),
                self.rgb.get_mut(to..to + 3 * wide),
            ) {
                target.copy_from_slice(source);
            }
        }
    }

    /// Sets one pixel, if it is inside.
    pub fn dot(&mut self, x: usize, y: usize, color: [u8; 3]) {
        if x < self.width
            && y < self.height
            && let Some(pixel) = self.rgb.as_chunks_mut::<3>().0.get_mut(y * self.width + x)
        {
            *pixel = color;
        }
    }

    /// Writes a line of text in letters of 8 x 8 pixels; what does not fit is cut off.
    pub fn write(&mut self, x: usize, y: usize, text: &str, color: [u8; 3]) {
        for (i, letter) in text.chars().enumerate() {
            let glyph = font8x8::BASIC_FONTS
                .get(letter)
                .or_else(|| font8x8::LATIN_FONTS.get(letter))
                .or_else(|| font8x8::BASIC_FONTS.get('?'))
                .unwrap_or_default();
            for (row, bits) in glyph.iter().enumerate() {
                for column in (0..LETTER).filter(|column| bits >> column & 1 == 1) {
                    self.dot(x + LETTER * i + column, y + row, color);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_where_their_labels_say() {
        let cell = |v| Some(Image::plain(10, 6, [v; 3]));
        let grid = Grid {
            columns: vec!["a".into(), "b".into()],
            rows: vec!["first".into(), "second".into()],
            cells: vec![vec![cell(1), cell(2)], vec![None, cell(4)]],
        };
        let sheet = grid.draw();
        let count = |v: u8| {
            sheet
                .rgb
                .as_chunks::<3>()
                .0
                .iter()
                .filter(|p| **p == [v; 3])
                .count()
        };
        assert_eq!([count(1), count(2), count(4)], [60, 60, 60]);
        let last = &sheet.rgb[3 * ((sheet.height - 5) * sheet.width + sheet.width - 5)..][..3];
        assert_eq!(last, [4; 3]);
    }

    #[test]
    fn long_labels_are_broken_at_blanks() {
        assert_eq!(wrap("zoe, red hat", 8), ["zoe, ", "red hat"]);
        assert_eq!(wrap("abcdefghij", 4), ["abcd", "efgh", "ij"]);
    }
}
