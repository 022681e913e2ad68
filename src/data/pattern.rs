//! Names of several files at once, as WebDataset and shells write them: `x-{000000..000099}.tar` counts, `{a,b}` lists,
//! and `*`, `?` and `[abc]` match.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Files that a pattern may name.
const MOST: usize = 1 << 20;

/// The files that `path` names, sorted as they are counted or listed and then by their names; none if it is no pattern,
/// or a file or folder of just this name.
///
/// # Errors
/// `Error::File` for a pattern that no file matches, or that cannot be understood.
pub fn expand(path: &Path) -> Result<Vec<PathBuf>> {
    let Some(text) = path.to_str().filter(|text| text.contains(['*', '?', '[', '{'])) else { return Ok(Vec::new()) };
    if path.exists() {
        return Ok(Vec::new());
    }
    let mut patterns = vec![text.to_string()];
    while let Some(k) = patterns.iter().position(|pattern| braces(pattern).is_some()) {
        let (first, items, last) = braces(&patterns[k]).expect("it has braces");
        if patterns.len() + items.len() > MOST {
            return Err(Error::file(path, format!("names more than {MOST} files")));
        }
        let expanded: Vec<String> = items.iter().map(|item| format!("{first}{item}{last}")).collect();
        patterns.splice(k..=k, expanded);
    }
    let mut files = Vec::new();
    for pattern in patterns {
        let matches =
            glob::glob(&pattern).map_err(|e| Error::file(path, format!("is no pattern of names: {}", e.msg)))?;
        let before = files.len();
        files.extend(matches.filter_map(|found| found.ok()).filter(|found| found.is_file()));
        if files.len() == before {
            let own = if pattern == text { String::new() } else { format!(": {pattern}") };
            return Err(Error::file(path, format!("names a file that does not exist{own}")));
        }
        if files.len() > MOST {
            return Err(Error::file(path, format!("names more than {MOST} files")));
        }
    }
    Ok(files)
}

/// What stands before the first braces that count or list, what they stand for, and what follows.
fn braces(pattern: &str) -> Option<(String, Vec<String>, String)> {
    let open = pattern.find('{')?;
    let close = open + pattern[open..].find('}')?;
    let inner = &pattern[open + 1..close];
    if inner.contains('{') {
        return None;
    }
    let items = match inner.split_once("..") {
        Some((from, to)) => {
            let (first, last): (u64, u64) = (from.parse().ok()?, to.parse().ok()?);
            if last < first || last - first >= MOST as u64 {
                return None;
            }
            (first..=last).map(|number| format!("{number:0width$}", width = from.len())).collect()
        }
        None if inner.contains(',') => inner.split(',').map(String::from).collect(),
        None => return None,
    };
    Some((pattern[..open].into(), items, pattern[close + 1..].into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_count_with_leading_zeros_and_list() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["x-008", "x-009", "x-010", "y-1", "z"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let names = |pattern: &str| {
            expand(&folder.path().join(pattern)).map(|files| {
                let name = |file: &PathBuf| file.file_name().unwrap().to_str().unwrap().to_string();
                files.iter().map(name).collect::<Vec<_>>()
            })
        };
        assert_eq!(names("x-{008..010}").unwrap(), ["x-008", "x-009", "x-010"]);
        assert_eq!(names("{z,y-*}").unwrap(), ["z", "y-1"]);
        assert_eq!(names("x-0[01]?").unwrap(), ["x-008", "x-009", "x-010"]);
        assert!(names("z").unwrap().is_empty(), "no pattern");
        let missing = names("x-{007..009}").unwrap_err().to_string();
        assert!(missing.contains("names a file that does not exist: ") && missing.ends_with("x-007"), "{missing}");
        assert!(
            names("x-{9..8}").is_err() && names("{a,{b,c}}").is_err() && names("x-{0..18446744073709551615}").is_err()
        );
    }
}
