//! Reading zip archives of images, as EDM's and StyleGAN's tools write them: image files, mostly stored and not
//! deflated, and a dataset.json with their labels. Without it the folders of the archive are classes.
//!
//! The directory at the archive's end is read once and places are kept. Images are in the order of their names.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use zip::CompressionMethod;

use super::picture::READ;
use super::pictures::{Entry, Listing, Place};
use super::{litter, safe_name};
use crate::error::{Error, Result};
use crate::text::cut;

/// DEFLATE makes at most 1032 bytes of one.
const MOST_OF_ONE: u64 = 1100;
/// Bytes of a dataset.json and of an image, at most.
const LONGEST: u64 = 1 << 30;

/// True for the first bytes of a zip archive.
pub fn is_zip(start: &[u8]) -> bool {
    start.starts_with(b"PK")
}

/// The images of an archive; `None` if it holds arrays of NumPy or no images, and so is no archive of images.
///
/// # Errors
/// `Error::File` for an archive of images that is damaged or encrypted.
pub fn open(path: &Path) -> Result<Option<Listing>> {
    let damaged = |e: &dyn std::fmt::Display| {
        Error::file(path, format!("is not a whole zip archive ({}); it is cut short or damaged", cut(&e.to_string())))
    };
    let file = File::open(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    let len = file.metadata().map_err(|e| Error::file(path, format!("cannot be read: {e}")))?.len();
    // Whether it is an archive at all is said by whoever expects arrays in it.
    let Ok(mut archive) = zip::ZipArchive::new(BufReader::new(file)) else { return Ok(None) };
    let ends_in = |name: &str, endings: &[&str]| endings.contains(&&*super::folder::ending(Path::new(name)));
    let names: Vec<String> = archive.file_names().filter_map(|name| Some(name.ok()?.into_owned())).collect();
    let holds = |endings: &[&str]| names.iter().any(|name| ends_in(name, endings));
    if holds(&["npy"]) || !holds(&READ) {
        return Ok(None);
    }
    let shared: Arc<Path> = path.into();
    let (mut entries, mut archived) = (Vec::new(), HashMap::new());
    for index in 0..archive.len() {
        let member = archive.by_index_raw(index).map_err(|e| damaged(&e))?;
        let name = safe_name(Path::new(&*member.name().map_err(|e| damaged(&e))?));
        let is_list = name.ends_with("dataset.json");
        if !member.is_file() || litter(&name) || !(is_list || READ.contains(&&*super::folder::ending(&name))) {
            continue;
        }
        let (packed, size) = (member.compressed_size(), member.size());
        let refused = |what: String| Error::file(path.join(&name), what);
        if member.encrypted() {
            return Err(refused("is encrypted; unpack the archive and give the folder".into()));
        }
        let deflated = match member.compression() {
            CompressionMethod::Stored => None,
            CompressionMethod::Deflated => Some(size),
            other => {
                return Err(refused(format!("is compressed by {other}, which is not read; unpack the archive")));
            }
        };
        let offset = member.data_start().ok_or_else(|| damaged(&"a member without a place"))?;
        drop(member);
        if offset.checked_add(packed).is_none_or(|end| end > len) {
            return Err(refused(format!("claims {packed} bytes, which reach beyond the end of its archive")));
        }
        if size > LONGEST || (deflated.is_none() && size != packed) || size / MOST_OF_ONE > packed {
            return Err(refused(format!("claims {size} bytes, packed in {packed}; it is damaged or too large")));
        }
        if is_list {
            let mut list = Vec::new();
            let member = archive.by_index(index).map_err(|e| damaged(&e))?;
            member.take(size).read_to_end(&mut list).map_err(|e| damaged(&e))?;
            archived.insert(name, list);
        } else {
            let place = Place::Part { file: shared.clone(), offset, len: packed, deflated };
            entries.push(Entry { path: path.join(&name), name, place, label: None });
        }
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Some(Listing { entries, archived: Some(archived), ..Listing::default() }))
}
