//! The module diagram in src/lib.rs is true: it names every module, and no import goes up.

#[path = "support/places.rs"]
mod places;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use walkdir::WalkDir;

fn source() -> PathBuf {
    places::root().join("src")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The layers of the diagram in `lib.rs`, lowest first: the modules of each line between the line
/// "```text modules" and the next fence. A line is `MODULE MODULE ... - what they are`.
fn layers(lib: &str) -> Vec<Vec<String>> {
    let lines = lib.lines().map(|line| line.trim_start_matches("//!").trim());
    let drawing = lines.skip_while(|line| *line != "```text modules").skip(1).take_while(|line| *line != "```");
    let modules = |line: &str| {
        let (names, _) = line.split_once(" - ").unwrap_or_else(|| panic!("`{line}` does not say what its modules are"));
        names.split_whitespace().map(String::from).collect()
    };
    let mut layers: Vec<Vec<String>> = drawing.map(modules).collect();
    layers.reverse();
    layers
}

/// The module of a file below `src`: the first part of its path.
fn module_of(path: &Path) -> String {
    let first = path.strip_prefix(source()).expect("a file below src").components().next().expect("a name");
    first.as_os_str().to_str().expect("a name in UTF-8").trim_end_matches(".rs").to_string()
}

/// Modules that a text imports from the crate. Comments do not count: documentation may refer to higher modules.
fn imports(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let code: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect();
    let code = code.join("\n");
    for prefix in ["crate::", "ddpm_cuda::"] {
        for (at, _) in code.match_indices(prefix) {
            // The first name of a path, or of each path of a list in braces, which may be nested.
            let (mut depth, mut expected) = (0, true);
            let mut rest = &code[at + prefix.len()..];
            while let Some(c) = rest.chars().next() {
                let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                if end > 0 {
                    if expected {
                        found.insert(rest[..end].to_string());
                    }
                    expected = false;
                    rest = &rest[end..];
                } else {
                    match c {
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        ',' => expected = depth == 1,
                        _ => {}
                    }
                    rest = &rest[c.len_utf8()..];
                }
                if depth == 0 && !expected {
                    break;
                }
            }
        }
    }
    // Exported macros are at the crate root and are defined in error.rs.
    if found.remove("usage") | found.remove("say") {
        found.insert("error".into());
    }
    found
}

/// Every import that goes up, or to another module of the same line, as `FROM -> TO`.
fn upward(layers: &[Vec<String>], imports: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let layer = |module: &str| {
        let found = layers.iter().position(|names| names.iter().any(|name| name == module));
        found.unwrap_or_else(|| panic!("{module} is not in the drawing of src/lib.rs"))
    };
    let up = |from: &String, to: &String| from != to && layer(to) >= layer(from);
    let pairs = imports.iter().flat_map(|(from, all)| all.iter().map(move |to| (from, to)));
    pairs.filter(|(from, to)| up(from, to)).map(|(from, to)| format!("{from} -> {to}")).collect()
}

#[test]
fn no_import_goes_up() {
    let lib = read(&source().join("lib.rs"));
    let layers = layers(&lib);
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in WalkDir::new(source()) {
        let path = file.expect("a file of src").into_path();
        if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("lib.rs") {
            all.entry(module_of(&path)).or_default().extend(imports(&read(&path)));
        }
    }
    assert!(all["train"].contains("checkpoint") && all["ops"].contains("device"), "imports are found: {all:?}");
    let drawn: BTreeSet<&String> = layers.iter().flatten().collect();
    let there: BTreeSet<&String> = all.keys().collect();
    assert_eq!(drawn, there, "the drawing of src/lib.rs and the modules there are");
    let up = upward(&layers, &all);
    assert!(up.is_empty(), "imports that go up in the drawing of src/lib.rs: {}", up.join(", "));
}

#[test]
fn imports_are_found_and_those_that_go_up_are_named() {
    let text = "use crate::tensor::Shape; // crate::not\nuse crate::{say, unet::{UNet, Cost}, memory};\nlet x = crate::ops::add::sum;";
    let names = ["error", "memory", "ops", "tensor", "unet"];
    assert_eq!(imports(text), names.map(String::from).into_iter().collect::<BTreeSet<_>>());
    let drawing =
        "//! ```text modules\n//! top - the top\n//! left right - the middle\n//! low - the bottom\n//! ```\n";
    let layers = layers(drawing);
    assert_eq!(layers, [vec!["low"], vec!["left", "right"], vec!["top"]]);
    let edge = |from: &str, to: &str| BTreeMap::from([(from.to_string(), BTreeSet::from([to.to_string()]))]);
    assert!(upward(&layers, &edge("top", "low")).is_empty());
    assert_eq!(upward(&layers, &edge("low", "left")), ["low -> left"]);
    assert_eq!(upward(&layers, &edge("left", "right")), ["left -> right"]);
}
