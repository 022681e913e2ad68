//! No line is longer than 120 columns: Rust, CUDA, Python, shell scripts and the prose of Markdown files. `cargo fmt`
//! wraps code, but neither comments nor code with a long string.
//!
//! A line of Rust may be longer if a string literal crosses the last column, since messages are not split. In Markdown,
//! tables, code blocks and lines that are a single link may be longer.

#[path = "support/places.rs"]
mod places;

use std::fs;
use std::path::{Path, PathBuf};

/// As `max_width` in rustfmt.toml.
const COLUMNS: usize = 120;

/// Every file of a folder, in the order of the paths, except in build outputs, `runs` and hidden folders other than
/// those of CI.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry of the folder").path()).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().and_then(|name| name.to_str()).expect("names in UTF-8");
        if path.is_file() {
            found.push(path);
        } else if name == ".ci" || name == ".github" || !(name.starts_with('.') || name == "target" || name == "runs") {
            files(&path, found);
        }
    }
}

/// Numbers of the lines that are too long, counted from 1.
fn too_long(path: &Path, text: &str) -> Vec<usize> {
    let long = |line: &str| line.chars().count() > COLUMNS;
    let may_be_longer: Vec<bool> = match path.extension().and_then(|e| e.to_str()) {
        Some("rs") => literals_over_the_edge(text),
        Some("md") => prose(text).into_iter().map(|prose| !prose).collect(),
        // The CI script has no extension.
        Some("cu" | "cuh" | "h" | "py" | "sh" | "toml" | "yml") | None => vec![false; text.lines().count()],
        Some(_) => return Vec::new(),
    };
    let lines = text.lines().zip(may_be_longer).enumerate();
    lines.filter(|(_, (line, longer))| long(line) && !longer).map(|(i, _)| i + 1).collect()
}

/// For each line of Rust, true if a string literal covers the last allowed column and the one after it.
fn literals_over_the_edge(text: &str) -> Vec<bool> {
    let mut over = vec![false; text.lines().count()];
    let chars: Vec<char> = text.chars().collect();
    let (mut i, mut line, mut column) = (0, 0, 0);
    while i < chars.len() {
        let length = token(&chars[i..]);
        let is_literal = chars[i..i + length].contains(&'"') && chars[i] != '/' && chars[i] != '\'';
        for (k, &c) in chars[i..i + length].iter().enumerate() {
            // If the closing quote is in the last column, what follows it is too long.
            if is_literal && column == COLUMNS - 1 && k + 1 < length && c != '\n' {
                over[line] = true;
            }
            column += 1;
            if c == '\n' {
                (line, column) = (line + 1, 0);
            }
        }
        i += length;
    }
    over
}

/// Length of the comment, literal, name or single character at the start of `text`. A string and its prefix are one
/// literal.
fn token(text: &[char]) -> usize {
    let at = |i: usize| text.get(i).copied().unwrap_or('\0');
    let until = |from: usize, end: &dyn Fn(usize) -> bool| (from..text.len()).find(|&i| end(i)).unwrap_or(text.len());
    let word = until(0, &|i| !(at(i).is_alphanumeric() || at(i) == '_'));
    if at(0) == '/' && at(1) == '/' {
        return until(2, &|i| at(i) == '\n');
    }
    if at(0) == '/' && at(1) == '*' {
        let (mut depth, mut i) = (1, 2);
        while depth > 0 && i < text.len() {
            match (at(i), at(i + 1)) {
                ('/', '*') => (depth, i) = (depth + 1, i + 2),
                ('*', '/') => (depth, i) = (depth - 1, i + 2),
                _ => i += 1,
            }
        }
        return i.min(text.len());
    }
    // 'a', '\n' and '\u{7f}' are characters; 'a without a closing quote is a lifetime.
    if at(0) == '\'' {
        return match (at(1), at(2)) {
            ('\\', _) => (until(3, &|i| at(i) == '\'') + 1).min(text.len()),
            (_, '\'') => 3,
            _ => 1,
        };
    }
    let prefix: String = text[..word].iter().collect();
    let hashes = until(word, &|i| at(i) != '#') - word;
    if at(word + hashes) == '"' && ["r", "br", "cr"].contains(&prefix.as_str()) {
        let closes = |i: usize| at(i) == '"' && (1..=hashes).all(|k| at(i + k) == '#');
        return (until(word + hashes + 1, &closes) + 1 + hashes).min(text.len());
    }
    if at(word) == '"' && ["", "b", "c"].contains(&prefix.as_str()) {
        let mut i = word + 1;
        while i < text.len() && at(i) != '"' {
            i += if at(i) == '\\' { 2 } else { 1 };
        }
        return (i + 1).min(text.len());
    }
    word.max(1)
}

/// For each line of Markdown, false in tables, in code blocks and where the line is a single link.
fn prose(text: &str) -> Vec<bool> {
    let mut code = false;
    let line = |line: &str| {
        let line = line.trim();
        let fence = line.starts_with("```");
        code ^= fence;
        let link = line.trim_start_matches(['!', '-', '*', ' ']).starts_with('[')
            && (line.ends_with(')') && line.matches("](").count() == 1 || line.contains("]: "));
        !(code || fence || line.starts_with('|') || link)
    };
    text.lines().map(line).collect()
}

#[test]
fn no_line_is_longer_than_120_columns() {
    let root = &places::root();
    let mut found = Vec::new();
    files(root, &mut found);
    let name = |path: &Path| path.strip_prefix(root).expect("below the root").display().to_string();
    let names: Vec<String> = found.iter().map(|path| name(path)).collect();
    for expected in ["README.md", "src/lib.rs", "kernels/conv2d.cu", "emulator/src/lib.rs", "tests/style.rs", ".ci/run"]
    {
        assert!(names.iter().any(|name| name == expected), "{expected} is not looked at");
    }
    let long: Vec<String> = (found.iter())
        .filter_map(|path| Some((path, fs::read_to_string(path).ok()?)))
        .flat_map(|(path, text)| too_long(path, &text).into_iter().map(|line| format!("{}:{line}", name(path))))
        .collect();
    assert!(long.is_empty(), "{} lines are longer than {COLUMNS} columns:\n{}", long.len(), long.join("\n"));
}

#[test]
fn comments_are_too_long_and_messages_are_not() {
    let of = |name: &str, text: &str| too_long(Path::new(name), text);
    let (x, word) = ("x".repeat(COLUMNS), "x".repeat(COLUMNS - 10));
    // Exactly as long as allowed, counted in characters, and one longer.
    for name in ["a.rs", "a.cu", "a.cuh", "a.py", "a.sh", "a.md", "run"] {
        assert_eq!(of(name, &format!("{x}\n{}\n{x}x\n", "é".repeat(COLUMNS))), [3], "{name}");
    }
    assert!(of("a.ptx", &format!("{x}x")).is_empty());
    for fine in [
        format!("    let a = \"{word} {word}\";"),
        format!("    f(r#\"{word} \"{word}\"#, b\"\\\"\", '\"');"),
        format!("\"{word}\\\n  {x}x\n\""),
        format!("    f('\"', '\\'', &'a x, \"{x}\")"),
    ] {
        assert!(of("a.rs", &fine).is_empty(), "{fine}");
    }
    for long in [
        format!("    // a \"{x}\""),
        format!("/* \"\n * {x} */"),
        format!("    let a = \"{}\"; // and a comment", "x".repeat(COLUMNS - 15)),
        format!("    f('\"', {x}, '\"');"),
        format!("    let a = r\"\\\"; // {x}\""),
        format!("{x}(\"a\")"),
    ] {
        assert_eq!(of("a.rs", &long), [long.lines().count()], "{long}");
    }
    let table =
        format!("| {x} |\n```text\n{x}x\n```\n{x} |\n[link](https://{x})\n- [a](b) [c](d) {x}\n[b]: https://{x}\n");
    assert_eq!(of("a.md", &table), [5, 7]);
}
