//! The stem rule: everything about an operation has one name. `src/ops/S.rs` has its tests in `tests/ops/S.rs`, its
//! benches in `benches/ops/S.rs` and its kernels in `kernels/S.cu`. Every file there belongs to an operation, and each
//! `main.rs` lists all of its files. `tests/ops/main.rs` checks that the tests of an operation launch each of its
//! kernels.

#[path = "support/places.rs"]
mod places;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Stems of the files in a folder that end with `ending`, without the folder's own `mod.rs` or `main.rs`.
fn stems(folder: &Path, ending: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let paths = entries.map(|entry| entry.expect("an entry of the folder").path());
    let stem = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.strip_suffix(ending)?.to_string();
        (name != "mod" && name != "main").then_some(name)
    };
    paths.filter_map(stem).collect()
}

/// Modules that a file declares outside nested modules, one `mod S;` a line, but for those that serve all operations.
fn modules(file: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let name = |line: &str| Some(line.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';')?.to_string());
    text.lines().filter_map(name).filter(|name| name != "support" && name != "group").collect()
}

/// Describes what `found` lacks and what it has in excess; `None` if it agrees.
fn difference(what: &str, found: &BTreeSet<String>, operations: &BTreeSet<String>) -> Option<String> {
    let lacks: Vec<_> = operations.difference(found).collect();
    let orphans: Vec<_> = found.difference(operations).collect();
    (found != operations).then(|| format!("{what}: nothing for {lacks:?}, no operation for {orphans:?}\n"))
}

#[test]
fn everything_about_an_operation_has_one_stem() {
    let root = places::root();
    let operations = stems(&root.join("src/ops"), ".rs");
    assert!(operations.contains("add"), "no operations found in {}", root.display());
    let found = [
        ("src/ops/mod.rs", modules(&root.join("src/ops/mod.rs"))),
        ("tests/ops", stems(&root.join("tests/ops"), ".rs")),
        ("tests/ops/main.rs", modules(&root.join("tests/ops/main.rs"))),
        ("benches/ops", stems(&root.join("benches/ops"), ".rs")),
        ("benches/ops/main.rs", modules(&root.join("benches/ops/main.rs"))),
        ("kernels", stems(&root.join("kernels"), ".cu")),
    ];
    let differences: String = found.iter().filter_map(|(what, found)| difference(what, found, &operations)).collect();
    assert!(differences.is_empty(), "the stem rule is broken\n{differences}");
}

#[test]
fn both_sides_of_a_difference_are_named() {
    let set = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<BTreeSet<_>>();
    assert_eq!(difference("benches", &set(&["add"]), &set(&["add"])), None);
    let text = difference("benches", &set(&["add", "lost"]), &set(&["add", "silu"])).expect("a difference");
    assert_eq!(text, "benches: nothing for [\"silu\"], no operation for [\"lost\"]\n");
}
