//! Imports go down: the documentation of a module that has parts lists them, "each using only those below it". Unit
//! tests, which may import what they like, are at the end of their files.

use std::path::{Path, PathBuf};

/// Says that the list that follows is an order.
const MARK: &str = "//! The modules, each using only those below it:";

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// A file's text without comments and unit tests.
fn code(path: &Path) -> String {
    let text = std::fs::read_to_string(path).expect("a source file");
    let code = text.split("#[cfg(test)]").next().expect("a first part");
    let code = code.split("#[cfg(all(test").next().expect("a first part");
    code.lines().map(|line| line.split("//").next().expect("a first part").to_string() + "\n").collect()
}

/// The modules that a documentation lists, from the top down.
fn order(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).expect("a source file");
    let list = text.split_once(MARK).unwrap_or_else(|| panic!("no order of modules in {}", path.display())).1;
    let lines = list.lines().skip(1).skip_while(|line| *line == "//!").take_while(|line| line.len() > 3);
    // `- [`a`]: ...`, or `- `a`, `b`: ...`: every word in backquotes before the colon.
    let heads = lines.filter(|line| line.starts_with("//! - ")).map(|line| line.split_once(':').expect("a colon").0);
    heads.flat_map(|head| head.split('`').skip(1).step_by(2).map(|name| name.replace("()", ""))).collect()
}

/// The first names of all paths that begin with `prefix`, in groups too: `super::{a::b, c}` gives a and c.
fn names(code: &str, prefix: &str) -> Vec<String> {
    let identifier = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut names = vec![];
    for (at, _) in code.match_indices(prefix) {
        let deeper = code[..at].ends_with("::") || code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let rest = &code[at + prefix.len()..];
        if deeper {
            continue;
        }
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut part = String::new();
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => names.push(identifier(std::mem::take(&mut part).trim())),
                    _ => part.push(c),
                }
            }
            names.push(identifier(part.trim()));
        } else {
            names.push(identifier(rest));
        }
    }
    names
}

/// The files of a module: `name.rs`, or all below `name/`.
fn files(folder: &Path, name: &str) -> Vec<PathBuf> {
    let file = folder.join(format!("{name}.rs"));
    if file.exists() {
        return vec![file];
    }
    let folder = folder.join(name);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|why| panic!("{}: {why}", folder.display()));
    entries
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension() == Some("rs".as_ref()))
        .collect()
}

/// Checks the modules of `folder` that its documentation in `listed` orders. `prefix` begins a path to one of them.
fn check(folder: &Path, listed: &str, prefix: &str) -> usize {
    let listed = folder.join(listed);
    let order = order(&listed);
    let declared = code(&listed);
    let mut declared: Vec<&str> = declared
        .lines()
        .filter_map(|line| line.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';'))
        .collect();
    let mut sorted: Vec<&str> = order.iter().map(String::as_str).collect();
    declared.sort_unstable();
    sorted.sort_unstable();
    assert_eq!(sorted, declared, "the modules that {} lists, and those it declares", listed.display());
    let mut imports = 0;
    for (rank, module) in order.iter().enumerate() {
        for file in files(folder, module) {
            let code = code(&file);
            // From a module inside the file, a sibling of the file is one level further up.
            for name in names(&code, prefix).into_iter().chain(names(&code, &format!("{prefix}super::"))) {
                let Some(other) = order.iter().position(|listed| *listed == name) else { continue };
                imports += usize::from(other != rank);
                assert!(other >= rank, "{} uses {name}, which is above {module}", file.display());
            }
        }
    }
    imports
}

#[test]
fn imports_go_down() {
    let source = source();
    // Each has some imports, or the test has read nothing.
    assert!(check(&source, "lib.rs", "crate::") >= 10);
    for (module, least) in [("exec", 20), ("ptx", 8), ("num", 8)] {
        assert!(check(&source.join(module), "mod.rs", "super::") >= least, "{module}");
    }
}
