//! Reading tar archives of images: shards of WebDataset, whose members `KEY.jpg` and `KEY.cls` or `KEY.json` are one
//! sample, KEY being the name up to the first dot of its last part; and archives of a folder of images, whose folders
//! are classes.
//!
//! The headers are read once and places are kept, so that any image can be read at any time. Shards follow each other
//! in the order of their names, members in the order of the archive.
//!
//! Deliberately absent: compressed archives, in which nothing can be found without unpacking what is before it.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::picture::READ;
use super::pictures::{Classes, Entry, Listing, Place};
use super::{NoLabels, litter, safe_name};
use crate::error::{Error, Result};
use crate::text::{self, cut};

/// Bytes of a label file, at most; a .json may hold more than the label.
const LONGEST_LABEL: u64 = 1 << 20;
/// Bytes of a dataset.json, at most.
const LONGEST_LIST: u64 = 1 << 30;

/// True for the first 512 bytes of a tar archive: its magic stands behind the first name.
pub fn is_tar(start: &[u8]) -> bool {
    start.get(257..262) == Some(b"ustar")
}

/// A label, or what stands in its place.
type Label = std::result::Result<u32, String>;

/// The images of the archives at `paths`, which are in the order of their names; `source` is what they are of.
pub fn open(source: &Path, paths: &[PathBuf]) -> Result<Listing> {
    let (mut entries, mut notes) = (Vec::new(), Vec::new());
    let mut archived = HashMap::new();
    let (mut labelled, mut wrong) = (0, None);
    for path in paths {
        let mut labels: HashMap<PathBuf, Label> = HashMap::new();
        let first = entries.len();
        if let Some(note) = read(path, paths.len() == 1, &mut entries, &mut labels, &mut archived)? {
            notes.push(note);
        }
        for entry in &mut entries[first..] {
            match labels.get(&key(&entry.name)) {
                Some(Ok(label)) => {
                    entry.label = Some(*label);
                    labelled += 1;
                }
                Some(Err(why)) => wrong = wrong.or_else(|| Some(NoLabels::new(&entry.path, why))),
                None => {}
            }
        }
    }
    if entries.is_empty() {
        return Err(Error::file(source, "holds no image file; images in it are .jpg, .png or .webp, and the like"));
    }
    let classes = match (wrong, labelled) {
        (Some(wrong), _) => Classes::None(wrong),
        (None, 0) => Classes::Named,
        (None, _) => Classes::Own { by: "the .cls or .json beside each image", names: Vec::new() },
    };
    if paths.len() > 1 {
        notes.push(format!("{} archives of {} together", paths.len(), text::images(entries.len())));
    }
    Ok(Listing { entries, classes, archived: Some(archived), notes, ..Listing::default() })
}

/// Adds what an archive holds; a note if it may be cut short.
fn read(
    path: &Path,
    alone: bool,
    entries: &mut Vec<Entry>,
    labels: &mut HashMap<PathBuf, Label>,
    archived: &mut HashMap<PathBuf, Vec<u8>>,
) -> Result<Option<String>> {
    let damaged = |e: &dyn std::fmt::Display| {
        let what = format!("is not a whole tar archive ({}); it is cut short or damaged", cut(&e.to_string()));
        Error::file(path, what.replace('\n', " "))
    };
    let file = File::open(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    let len = file.metadata().map_err(|e| Error::file(path, format!("cannot be read: {e}")))?.len();
    let shared: Arc<Path> = path.into();
    let mut archive = tar::Archive::new(file);
    let mut end = 0;
    for member in archive.entries_with_seek().map_err(|e| damaged(&e))? {
        let mut member = member.map_err(|e| damaged(&e))?;
        let (offset, size) = (member.raw_file_position(), member.size());
        if offset.checked_add(size).is_none_or(|end| end > len) {
            return Err(damaged(&format!("a member of {size} bytes reaches beyond its end")));
        }
        end = (offset + size).div_ceil(512) * 512;
        if !member.header().entry_type().is_file() {
            continue;
        }
        let name = safe_name(&member.path().map_err(|e| damaged(&e))?);
        if litter(&name) {
            continue;
        }
        let mut content = |most: u64| -> Result<std::result::Result<Vec<u8>, String>> {
            if size > most {
                return Ok(Err(format!("has {size} bytes in its file of labels; at most {most} are read")));
            }
            let mut bytes = Vec::new();
            (&mut member).take(most).read_to_end(&mut bytes).map_err(|e| damaged(&e))?;
            Ok(Ok(bytes))
        };
        match &*super::folder::ending(&name) {
            "cls" => {
                let label = content(LONGEST_LABEL)?.and_then(|bytes| of_cls(&bytes));
                labels.insert(key(&name), label);
            }
            "json" if alone && name.ends_with("dataset.json") => {
                let list = content(LONGEST_LIST)?.map_err(|e| Error::file(path.join(&name), e))?;
                archived.insert(name, list);
            }
            "json" => {
                if let Some(label) = content(LONGEST_LABEL)?.map_or_else(|e| Some(Err(e)), |bytes| of_json(&bytes)) {
                    labels.entry(key(&name)).or_insert(label);
                }
            }
            ending if READ.contains(&ending) => {
                let place = Place::Part { file: shared.clone(), offset, len: size, deflated: None };
                entries.push(Entry { path: path.join(&name), name, place, label: None });
            }
            _ => {}
        }
    }
    Ok((len < end + 512).then(|| format!("{} has no mark at its end and may be cut short", path.display())))
}

/// What the members of a sample have in common: their name up to the first dot of its last part.
fn key(name: &Path) -> PathBuf {
    let last = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name.with_file_name(last.split('.').next().unwrap_or_default())
}

/// The number in a .cls file.
fn of_cls(bytes: &[u8]) -> Label {
    let text = String::from_utf8_lossy(bytes);
    let wrong =
        |_| format!("has the label {} in its .cls file; a class number is expected, 0 or above", cut(text.trim()));
    text.trim().parse().map_err(wrong)
}

/// The number that a .json file calls `label` or `cls`; `None` if it calls nothing so.
fn of_json(bytes: &[u8]) -> Option<Label> {
    let json: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    let label = ["label", "cls"].into_iter().find_map(|name| json.get(name))?;
    let number = label.as_u64().and_then(|label| u32::try_from(label).ok());
    Some(number.ok_or_else(|| {
        format!("has the label {} in its .json file; a class number is expected, 0 or above", cut(&label.to_string()))
    }))
}
