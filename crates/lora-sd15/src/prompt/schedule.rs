//! `[from:to:when]` and `[a|b]`: prompts that change while a picture is drawn.

/// Brackets nested deeper than this are taken as plain text.
const DEEPEST: usize = 100;

/// One text of a changing prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    /// The last step it is for; steps count from 1.
    pub until: usize,
    /// What to draw in these steps, attention brackets still in it.
    pub text: String,
}

/// How steps are counted for [`schedule_prompt`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepCount {
    /// Steps of this pass; doubled for samplers that ask the denoiser twice per step.
    pub steps: usize,
    /// Steps of the pass before, when this is the second pass of a hires fix: whole numbers
    /// go on counting, and 1.0 is where this pass begins.
    pub before: Option<usize>,
}

/// The texts that a prompt stands for over the steps, in order.
///
/// ```
/// use lora_sd15::prompt::{StepCount, schedule_prompt};
/// let stretches = schedule_prompt("a [cat:dog:0.5]", StepCount { steps: 20, before: None });
/// assert_eq!((stretches[0].until, stretches[0].text.as_str()), (10, "a cat"));
/// assert_eq!((stretches[1].until, stretches[1].text.as_str()), (20, "a dog"));
/// ```
pub fn schedule_prompt(prompt: &str, count: StepCount) -> Vec<Stretch> {
    let Some(tree) = Parser(prompt).parse() else {
        return vec![Stretch {
            until: count.steps,
            text: prompt.to_string(),
        }];
    };
    let mut ends = vec![count.steps];
    tree.ends(count, &mut ends);
    ends.sort_unstable();
    ends.dedup();
    ends.into_iter()
        .map(|until| {
            let mut text = String::new();
            tree.write(until, count, &mut text);
            Stretch { until, text }
        })
        .collect()
}

/// A parsed prompt.
enum Node<'a> {
    Text(&'a str),
    All(Vec<Node<'a>>),
    Change {
        before: Option<Box<Node<'a>>>,
        after: Box<Node<'a>>,
        when: &'a str,
    },
    Turns(Vec<Node<'a>>),
}

impl Node<'_> {
    /// Collects the steps after which the text may change.
    fn ends(&self, count: StepCount, ends: &mut Vec<usize>) {
        match self {
            Node::Text(_) => {}
            Node::All(parts) => parts.iter().for_each(|part| part.ends(count, ends)),
            Node::Turns(options) => {
                ends.extend(1..=count.steps);
                options.iter().for_each(|option| option.ends(count, ends));
            }
            Node::Change {
                before,
                after,
                when,
            } => {
                if let Some(step) = usize::try_from(switch(when, count)).ok().filter(|s| *s > 0) {
                    ends.push(step);
                }
                if let Some(before) = before {
                    before.ends(count, ends);
                }
                after.ends(count, ends);
            }
        }
    }

    /// Writes the text of one step.
    fn write(&self, step: usize, count: StepCount, text: &mut String) {
        match self {
            Node::Text(part) => text.push_str(part),
            Node::All(parts) => parts.iter().for_each(|part| part.write(step, count, text)),
            Node::Turns(options) => {
                let turn = step.saturating_sub(1) % options.len().max(1);
                if let Some(option) = options.get(turn) {
                    option.write(step, count, text);
                }
            }
            Node::Change {
                before,
                after,
                when,
            } => {
                if step as i64 > switch(when, count) {
                    after.write(step, count, text);
                } else if let Some(before) = before {
                    before.write(step, count, text);
                }
            }
        }
    }
}

/// The last step before a change: a share of the steps if written with a point, else a
/// step number.
fn switch(when: &str, count: StepCount) -> i64 {
    let value = when.parse::<f64>().unwrap_or(0.0);
    let step = if when.contains('.') {
        let begin = if count.before.is_some() { 1.0 } else { 0.0 };
        (value - begin) * count.steps as f64
    } else {
        value - count.before.unwrap_or(0) as f64
    };
    (step as i64).min(count.steps as i64)
}

struct Parser<'a>(&'a str);

impl<'a> Parser<'a> {
    fn at(&self, i: usize) -> Option<char> {
        self.0.get(i..)?.chars().next()
    }

    fn text(&self, from: usize, to: usize) -> Node<'a> {
        Node::Text(self.0.get(from..to).unwrap_or(""))
    }

    /// The end of a backslash and the character it protects; `None` at the end of a line,
    /// where it makes the whole prompt plain.
    fn escape(&self, i: usize) -> Option<usize> {
        let protected = self.at(i + 1).filter(|c| *c != '\n')?;
        Some(i + 1 + protected.len_utf8())
    }

    /// The whole prompt: groups that are well formed, and everything else as it stands.
    fn parse(&self) -> Option<Node<'a>> {
        let (mut parts, mut i) = (Vec::new(), 0);
        while let Some(c) = self.at(i) {
            let end = match c {
                '|' => return None,
                '\\' => self.escape(i)?,
                '(' | '[' => match self.group(i, 0) {
                    Some((node, end)) => {
                        parts.push(node);
                        i = end;
                        continue;
                    }
                    None => i + 1,
                },
                other => i + other.len_utf8(),
            };
            parts.push(self.text(i, end));
            i = end;
        }
        Some(Node::All(parts))
    }

    /// A well-formed prompt up to one of the characters in `stop`.
    fn inside(&self, mut i: usize, stop: &str, depth: usize) -> Option<(Node<'a>, usize)> {
        let mut parts = Vec::new();
        loop {
            let c = self.at(i)?;
            if stop.contains(c) {
                return Some((Node::All(parts), i));
            }
            match c {
                '\\' => {
                    let end = self.escape(i)?;
                    parts.push(self.text(i, end));
                    i = end;
                }
                '(' | '[' => {
                    let (node, end) = self.group(i, depth + 1)?;
                    parts.push(node);
                    i = end;
                }
                ')' | ']' | ':' | '|' => return None,
                _ => {
                    let rest = self.0.get(i..)?;
                    let length = rest
                        .find(['\\', '(', ')', '[', ']', ':', '|'])
                        .unwrap_or(rest.len());
                    parts.push(self.text(i, i + length));
                    i += length;
                }
            }
        }
    }

    fn group(&self, i: usize, depth: usize) -> Option<(Node<'a>, usize)> {
        if depth > DEEPEST {
            return None;
        }
        if self.at(i)? == '(' {
            let (first, end) = self.inside(i + 1, "):", depth)?;
            let mut parts = vec![self.text(i, i + 1), first];
            let mut close = end;
            if self.at(end)? == ':' {
                let (weight, end) = self.inside(end + 1, ")", depth)?;
                parts.extend([Node::Text(":"), weight]);
                close = end;
            }
            parts.push(self.text(close, close + 1));
            return Some((Node::All(parts), close + 1));
        }
        let (first, end) = self.inside(i + 1, "]:|", depth)?;
        match self.at(end)? {
            ']' => {
                let parts = vec![self.text(i, i + 1), first, self.text(end, end + 1)];
                Some((Node::All(parts), end + 1))
            }
            '|' => {
                let (mut options, mut end) = (vec![first], end);
                while self.at(end)? == '|' {
                    let (option, next) = self.inside(end + 1, "|]", depth)?;
                    options.push(option);
                    end = next;
                }
                Some((Node::Turns(options), end + 1))
            }
            _ => {
                let second = self.inside(end + 1, ":]", depth);
                if let Some((after, colon)) = second
                    && self.at(colon) == Some(':')
                    && let Some((when, end)) = self.number(colon + 1)
                {
                    let node = Node::Change {
                        before: Some(Box::new(first)),
                        after: Box::new(after),
                        when,
                    };
                    return Some((node, end));
                }
                let (when, end) = self.number(end + 1)?;
                let node = Node::Change {
                    before: None,
                    after: Box::new(first),
                    when,
                };
                Some((node, end))
            }
        }
    }

    /// A number with blanks around it and `]` behind; returns it and the end of the `]`.
    fn number(&self, i: usize) -> Option<(&'a str, usize)> {
        let rest = self.0.get(i..)?;
        // What no number has in it ends the search: brackets may be many, and far away.
        let other = |c: char| !(c.is_whitespace() || c.is_ascii_digit() || "+-.eE".contains(c));
        let end = rest
            .find(other)
            .filter(|end| self.at(i + end) == Some(']'))?;
        let number = rest.get(..end)?.trim();
        let digits = number.strip_prefix(['+', '-']).unwrap_or(number);
        let starts = digits.starts_with(|c: char| c.is_ascii_digit())
            || digits
                .strip_prefix('.')
                .is_some_and(|d| d.starts_with(|c: char| c.is_ascii_digit()));
        (starts && number.parse::<f64>().is_ok()).then_some((number, i + end + 1))
    }
}
