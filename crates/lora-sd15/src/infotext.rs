//! The `parameters` text that the web UI writes into its pictures.

/// `Key: value` pairs below a prompt, in the web UI's order as given.
///
/// ```
/// let text = lora_sd15::infotext("1girl", "lowres", &[("Steps", "20".into()), ("Model", "a, b".into())]);
/// assert_eq!(text, "1girl\nNegative prompt: lowres\nSteps: 20, Model: \"a, b\"");
/// ```
pub fn infotext(prompt: &str, negative: &str, parameters: &[(&str, String)]) -> String {
    let mut text = prompt.to_string();
    if !negative.is_empty() {
        text.push_str("\nNegative prompt: ");
        text.push_str(negative);
    }
    let pairs: Vec<String> = parameters
        .iter()
        .map(|(key, value)| format!("{key}: {}", quote(value)))
        .collect();
    text.push('\n');
    text.push_str(&pairs.join(", "));
    text.trim().to_string()
}

/// Values that would break the list are written as JSON strings.
fn quote(value: &str) -> String {
    if value.contains([',', ':', '\n']) {
        serde_json::Value::from(value).to_string()
    } else {
        value.to_string()
    }
}
