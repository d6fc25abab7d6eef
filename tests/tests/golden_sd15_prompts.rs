//! Prompts and the text in pictures against the web UI.

use std::collections::BTreeMap;

use lora_sd15::prompt::{
    StepCount, chunk_prompt, extract_tags, parse_attention, schedule_prompt, split_composition,
};
use lora_sd15::{Infotext, Tokenizer, infotext};
use lora_tests::{Report, Tolerance, golden_json};
use serde_json::Value;

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key]
        .as_str()
        .unwrap_or_else(|| panic!("{key} is not text in {value}"))
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is not a number"))
}

fn f32s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

#[test]
fn golden_sd15_prompts() {
    let tokenizer = Tokenizer::new();
    let mut report = Report::default();
    for group in golden_json("sd15", "prompts.json").as_array().unwrap() {
        for row in group["rows"].as_array().unwrap() {
            match text(group, "name") {
                "attention" => {
                    let case = text(row, "text");
                    let got: Vec<(String, f64)> = parse_attention(case)
                        .into_iter()
                        .map(|p| (p.text, p.weight))
                        .collect();
                    let want: Vec<(String, f64)> =
                        serde_json::from_value(row["result"].clone()).unwrap();
                    report.equal(case, "pieces", &got, &want);
                }
                "chunks" => check_chunks(&mut report, &tokenizer, row),
                "extra_networks" => check_tags(&mut report, row),
                "schedule" => check_schedule(&mut report, row),
                "and" => {
                    let case = text(row, "text");
                    let got: Vec<(String, f64)> = split_composition(case)
                        .into_iter()
                        .map(|p| (p.text, p.weight))
                        .collect();
                    let want: Vec<(String, f64)> =
                        serde_json::from_value(row["result"].clone()).unwrap();
                    report.equal(case, "parts", &got, &want);
                }
                "infotext" => check_infotext(&mut report, row),
                other => report.fail(other, "case", "unknown kind of case"),
            }
        }
    }
    report.finish();
}

fn check_schedule(report: &mut Report, row: &Value) {
    let count = |key: &str| row[key].as_u64().map(|n| n as usize);
    let base = count("steps").unwrap();
    let count = match count("hires_steps") {
        None => StepCount {
            steps: base,
            before: None,
        },
        Some(steps) => StepCount {
            steps,
            before: Some(base),
        },
    };
    let case = text(row, "text");
    let got: Vec<(usize, String)> = schedule_prompt(case, count)
        .into_iter()
        .map(|s| (s.until, s.text))
        .collect();
    let want: Vec<(usize, String)> = serde_json::from_value(row["result"].clone()).unwrap();
    report.equal(case, &format!("{count:?}"), &got, &want);
}

fn check_infotext(report: &mut Report, row: &Value) {
    let wanted = text(row, "text");
    let shown = |value: &Value| match value {
        Value::String(text) => text.clone(),
        // Python writes 7.0 where JSON has 7.0 too.
        other => other.to_string(),
    };
    let pairs: Vec<(String, String)> = row["params"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| (shown(&pair[0]), shown(&pair[1])))
        .collect();
    let pairs: Vec<(&str, String)> = pairs.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
    let got = infotext(text(row, "prompt"), text(row, "negative_prompt"), &pairs);
    report.equal(wanted, "text", &got.as_str(), &wanted);
    let parsed = Infotext::parse(wanted);
    let mut got = parsed.parameters;
    got.insert("Prompt".into(), parsed.prompt);
    got.insert("Negative prompt".into(), parsed.negative);
    let want: BTreeMap<String, String> = serde_json::from_value(row["parsed"].clone()).unwrap();
    report.equal(wanted, "parsed", &got, &want);
}

fn check_chunks(report: &mut Report, tokenizer: &Tokenizer, row: &Value) {
    let case = text(row, "text");
    let backtracks: Vec<usize> = match &row["backtrack"] {
        Value::Array(list) => list.iter().map(|b| b.as_u64().unwrap() as usize).collect(),
        one => vec![one.as_u64().unwrap() as usize],
    };
    for backtrack in backtracks {
        let chunks = chunk_prompt(tokenizer, case, backtrack);
        let want = row["chunks"].as_array().unwrap();
        report.equal(
            case,
            &format!("chunks (backtrack {backtrack})"),
            &chunks.len(),
            &want.len(),
        );
        for (i, (got, want)) in chunks.iter().zip(want).enumerate() {
            let tokens: Vec<u32> = serde_json::from_value(want["tokens"].clone()).unwrap();
            let weights: Vec<f64> = serde_json::from_value(want["multipliers"].clone()).unwrap();
            // Shown without the trailing run of padding beyond its first element.
            let mut full = tokens.clone();
            full.resize(77, 49407);
            report.equal(
                case,
                &format!("chunk {i} tokens (backtrack {backtrack})"),
                &got.tokens,
                &full,
            );
            let mut full = weights;
            full.resize(77, 1.0);
            report.slice(
                case,
                &format!("chunk {i} weights"),
                &f32s(&got.weights),
                &full,
                Tolerance {
                    atol: 1e-6,
                    rtol: 1e-6,
                },
            );
        }
    }
}

fn check_tags(report: &mut Report, row: &Value) {
    let case = text(row, "text");
    let (prompt, tags, others) = extract_tags(case);
    report.equal(case, "prompt", &prompt.as_str(), &text(row, "prompt"));
    let other = |tag: &&Value| !matches!(tag[0].as_str(), Some("lora" | "lyco"));
    let found = row["tags"].as_array().unwrap().iter().filter(other).count();
    report.equal(case, "tags of other kinds", &others.len(), &found);
    let ranks: Vec<Option<usize>> = tags.iter().map(|t| t.rank).collect();
    let want: Vec<Option<usize>> = row["loras"]
        .as_array()
        .unwrap()
        .iter()
        .map(|lora| lora["dyn"].as_u64().map(|n| n as usize))
        .collect();
    report.equal(case, "dyn", &ranks, &want);
    let mut sums: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    for lora in row["loras"].as_array().unwrap() {
        let entry = sums.entry(text(lora, "name").to_string()).or_default();
        entry.0 += number(&lora["te"]);
        entry.1 += number(&lora["unet"]);
    }
    let got: BTreeMap<String, (f64, f64)> = tags
        .into_iter()
        .map(|t| (t.name, (t.text_encoder, t.unet)))
        .collect();
    report.equal(case, "loras", &got, &sums);
}
