//! `(word)`, `(word:1.3)`, `[word]` and backslash escapes.

/// A piece of a prompt with its weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// The text, escapes resolved.
    pub text: String,
    /// 1 for plain text; `BREAK` is a piece of its own with weight -1.
    pub weight: f64,
}

/// A round bracket without a number multiplies by this, a square one divides.
const ROUND: f64 = 1.1;
const SQUARE: f64 = 1.0 / 1.1;

/// Splits a prompt into weighted pieces as the web UI does. Never fails: brackets
/// that do not match count as text or reach to the end.
///
/// ```
/// use lora_sd15::prompt::parse_attention;
/// let pieces = parse_attention("a (red:1.3) [hat]");
/// assert_eq!((pieces[1].text.as_str(), pieces[1].weight), ("red", 1.3));
/// ```
pub fn parse_attention(prompt: &str) -> Vec<Piece> {
    let mut parser = Parser::default();
    let mut rest = prompt;
    while let Some(c) = rest.chars().next() {
        rest = match c {
            '\\' => parser.escape(rest),
            '(' => parser.open(Bracket::Round, rest),
            '[' => parser.open(Bracket::Square, rest),
            ')' => parser.close(Bracket::Round, rest),
            ']' => parser.close(Bracket::Square, rest),
            ':' => parser.colon(rest),
            _ => {
                let end = rest
                    .find(['\\', '(', ')', '[', ']', ':'])
                    .unwrap_or(rest.len());
                parser.text(&rest[..end]);
                &rest[end..]
            }
        };
    }
    parser.finish()
}

#[derive(Clone, Copy, PartialEq)]
enum Bracket {
    Round,
    Square,
}

#[derive(Default)]
struct Parser {
    pieces: Vec<Piece>,
    /// Index of the first piece inside each open bracket.
    round: Vec<usize>,
    square: Vec<usize>,
}

impl Parser {
    fn stack(&mut self, bracket: Bracket) -> &mut Vec<usize> {
        if bracket == Bracket::Round {
            &mut self.round
        } else {
            &mut self.square
        }
    }

    fn multiply(&mut self, from: usize, factor: f64) {
        for piece in &mut self.pieces[from..] {
            piece.weight *= factor;
        }
    }

    fn push(&mut self, text: &str, weight: f64) {
        self.pieces.push(Piece {
            text: text.to_string(),
            weight,
        });
    }

    /// Plain text, cut at the word BREAK.
    fn text(&mut self, text: &str) {
        let mut rest = text;
        let mut first = true;
        loop {
            let (part, tail) = match find_break(rest) {
                Some((start, end)) => (&rest[..start], Some(&rest[end..])),
                None => (rest, None),
            };
            if !first {
                self.push("BREAK", -1.0);
            }
            self.push(part, 1.0);
            first = false;
            match tail {
                Some(tail) => rest = tail,
                None => return,
            }
        }
    }

    fn escape<'a>(&mut self, rest: &'a str) -> &'a str {
        let tail = &rest[1..];
        match tail.chars().next() {
            Some(c) if "()[]\\".contains(c) => {
                self.text(&tail[..1]);
                &tail[1..]
            }
            // A lone backslash vanishes.
            _ => {
                self.text("");
                tail
            }
        }
    }

    fn open<'a>(&mut self, bracket: Bracket, rest: &'a str) -> &'a str {
        let at = self.pieces.len();
        self.stack(bracket).push(at);
        &rest[1..]
    }

    fn close<'a>(&mut self, bracket: Bracket, rest: &'a str) -> &'a str {
        match self.stack(bracket).pop() {
            Some(from) => self.multiply(
                from,
                if bracket == Bracket::Round {
                    ROUND
                } else {
                    SQUARE
                },
            ),
            None => self.text(&rest[..1]),
        }
        &rest[1..]
    }

    /// `: number )` sets a weight inside a round bracket; any other colon is text.
    fn colon<'a>(&mut self, rest: &'a str) -> &'a str {
        let Some((weight, end)) = weight(rest) else {
            self.text(&rest[..1]);
            return &rest[1..];
        };
        match self.round.pop() {
            Some(from) => self.multiply(from, weight),
            None => self.text(&rest[..end]),
        }
        &rest[end..]
    }

    fn finish(mut self) -> Vec<Piece> {
        // Brackets left open reach to the end.
        for from in std::mem::take(&mut self.round) {
            self.multiply(from, ROUND);
        }
        for from in std::mem::take(&mut self.square) {
            self.multiply(from, SQUARE);
        }
        let mut joined: Vec<Piece> = Vec::new();
        for piece in self.pieces {
            match joined.last_mut() {
                Some(last) if last.weight == piece.weight => last.text.push_str(&piece.text),
                _ => joined.push(piece),
            }
        }
        if joined.is_empty() {
            joined.push(Piece {
                text: String::new(),
                weight: 1.0,
            });
        }
        joined
    }
}

/// The word BREAK with the blanks around it: start and end in `text`.
fn find_break(text: &str) -> Option<(usize, usize)> {
    let mut from = 0;
    loop {
        let at = from + text[from..].find("BREAK")?;
        let end = at + "BREAK".len();
        let word = |c: char| c.is_alphanumeric() || c == '_';
        let inside = text[..at].chars().next_back().is_some_and(word)
            || text[end..].chars().next().is_some_and(word);
        if !inside {
            let before = text[..at].trim_end().len();
            let after = text.len() - text[end..].trim_start().len();
            return Some((before, after));
        }
        from = end;
    }
}

/// Value and length of `: number )` at the start of `text`.
fn weight(text: &str) -> Option<(f64, usize)> {
    let body = text.strip_prefix(':')?.trim_start();
    let digits = body
        .find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '+' || c == '-'))
        .unwrap_or(body.len());
    let (number, tail) = body.split_at(digits);
    let signed = number.strip_prefix(['+', '-']).unwrap_or(number);
    if signed.is_empty() || signed.contains(['+', '-']) {
        return None;
    }
    let value = number.parse::<f64>().ok()?;
    let tail = tail.trim_start().strip_prefix(')')?;
    Some((value, text.len() - tail.len()))
}
