//! PyTorch's weight files, `.pt`, `.pth` and `.bin`: where their tensors lie, and writing one.
//!
//! Since PyTorch 1.6 such a file is a zip archive with the folder ROOT: `ROOT/data.pkl`, a pickle of the tensors'
//! names, shapes and storages (`pickle`), `ROOT/data/KEY`, the bytes of storage KEY, stored and not compressed, and
//! `ROOT/version`. Before that it was five pickles (a magic number, 1001, the machine, the tensors, the storages' keys)
//! and then each storage, the number of its elements before it.
//!
//! The tensors are those of a dictionary from names to tensors, alone or as the only such entry of a dictionary, as
//! training scripts save it. What a file declares is compared with its length before anything is read.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use safetensors::Dtype;
use zip::CompressionMethod;
use zip::write::SimpleFileOptions;

use super::tensors::Place;
use crate::error::{Error, Result};
use crate::output;
use crate::pickle::{self, Reads, Unpickled, Value, View};
use crate::text::cut;

/// What a legacy file begins with: a pickle of protocol 2 of the magic number.
const MAGIC: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";

/// The most entries of an archive that are looked at; a network has a few thousand tensors.
const MOST_ENTRIES: usize = 1 << 20;

/// A result whose error is a sentence that begins with the name of the file.
type Sentence<T> = std::result::Result<T, String>;

/// Whether a file is PyTorch's, by its first bytes.
pub(super) fn is_torch(start: &[u8]) -> bool {
    start.starts_with(b"PK\x03\x04") || start.starts_with(&MAGIC[..8])
}

/// The tensors of a file, by name.
///
/// # Errors
/// `Error::File` for a file that holds anything but tensors and plain containers, is damaged or cannot be read.
pub(super) fn tensors(path: &Path, file: &mut File) -> Result<BTreeMap<String, Place>> {
    let unreadable = |e: io::Error| Error::file(path, format!("cannot be read: {e}"));
    let mut start = [0; 15];
    file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
    let archive = file.read_exact(&mut start).is_err() || start != MAGIC;
    let found = if archive { of_archive(file) } else { of_legacy(file) };
    found.map_err(|e| Error::file(path, e))
}

fn of_archive(file: &mut File) -> Sentence<BTreeMap<String, Place>> {
    let damaged = |e: &dyn std::fmt::Display| {
        format!("is not a whole file of PyTorch ({}); it is cut short or damaged", cut(&e.to_string()))
    };
    let mut archive = zip::ZipArchive::new(&mut *file).map_err(|e| damaged(&e))?;
    if archive.len() > MOST_ENTRIES {
        return Err(format!("is an archive of {} entries; no weights have as many", archive.len()));
    }
    // Where the storages lie. The central directory does not say it: the alignment is padding in the local headers.
    let (mut storages, mut pickle, mut byte_order, mut scripted) = (HashMap::new(), None, None, false);
    for i in 0..archive.len() {
        let mut entry = archive.by_index(i).map_err(|e| damaged(&e))?;
        let name = entry.name().map_err(|e| damaged(&e))?.into_owned();
        let Some((_, inner)) = name.split_once('/') else { continue };
        let small = |entry: &mut zip::read::ZipFile<'_, &mut File>, most: usize| -> Sentence<Vec<u8>> {
            if entry.size() > most as u64 {
                return Err(format!(
                    "holds {} of {} bytes; no weights have more than {most}",
                    cut(&name),
                    entry.size()
                ));
            }
            let mut bytes = Vec::new();
            entry.take(most as u64 + 1).read_to_end(&mut bytes).map_err(|e| damaged(&e))?;
            Ok(bytes)
        };
        match inner {
            "data.pkl" if pickle.is_some() => return Err(damaged(&"it holds two data.pkl")),
            "data.pkl" => pickle = Some(small(&mut entry, pickle::LONGEST)?),
            "byteorder" => byte_order = Some(small(&mut entry, 16)?),
            "constants.pkl" => scripted = true,
            inner => {
                let Some(key) = inner.strip_prefix("data/").filter(|key| !key.is_empty()) else { continue };
                if entry.compression() != CompressionMethod::Stored {
                    return Err(format!("holds {} compressed; PyTorch stores tensors as they are", cut(&name)));
                }
                let start = entry.data_start().ok_or_else(|| damaged(&"an entry without a place"))?;
                if storages.insert(key.to_string(), (start, entry.size())).is_some() {
                    return Err(format!("holds {} twice", cut(&name)));
                }
            }
        }
    }
    let Some(pickle) = pickle else {
        return Err("is an archive without data.pkl; a file that torch.save wrote is expected".into());
    };
    if scripted {
        return Err("is a TorchScript program; save the state_dict of its network with torch.save".into());
    }
    if byte_order.is_some_and(|order| order != b"little") {
        return Err("was written on a big-endian machine, which is not read; save it again on another".into());
    }
    drop(archive);
    let len = file.metadata().map_err(|e| damaged(&e))?.len();
    let unpickled = pickle::read(&pickle, Reads::Weights)?;
    places(&unpickled, |view| {
        let (start, size) = *storages
            .get(&*view.storage.key)
            .ok_or_else(|| format!("refers to the storage {}, which it does not hold", cut(&view.storage.key)))?;
        (start.checked_add(size).is_some_and(|end| end <= len))
            .then_some((start, size))
            .ok_or_else(|| damaged(&format!("the storage {} reaches beyond its end", cut(&view.storage.key))))
    })
}

fn of_legacy(file: &mut File) -> Sentence<BTreeMap<String, Place>> {
    let damaged = |e: &str| format!("is not a whole file of PyTorch ({e}); it is cut short or damaged");
    let failed = |e: io::Error| format!("cannot be read: {e}");
    let len = file.metadata().map_err(failed)?.len();
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    (&mut *file).take(pickle::LONGEST as u64).read_to_end(&mut bytes).map_err(failed)?;
    let mut at = 0;
    let mut next = || -> Sentence<Unpickled> {
        let read = pickle::read(&bytes[at..], Reads::Weights)?;
        at += read.len;
        Ok(read)
    };
    next()?; // the magic number
    let protocol = next()?.value;
    if !matches!(protocol, Value::Int(1001)) {
        return Err("is a file of PyTorch before 1.6 whose version is not 1001".into());
    }
    let machine = next()?;
    let little = |(key, value): &(Value, Value)| {
        matches!(key, Value::Text(key) if &**key == "little_endian") && matches!(value, Value::Bool(false))
    };
    if machine.dict(&machine.value).is_some_and(|entries| entries.iter().any(little)) {
        return Err("was written on a big-endian machine, which is not read; save it again on another".into());
    }
    let (tensors, keys) = (next()?, next()?);
    // The size of an element is the tensors' to say.
    let mut sizes = HashMap::new();
    for object in &tensors.objects {
        if let pickle::Object::Storage(storage) = object {
            let size = storage.dtype.bitsize() / 8;
            let known = *sizes.entry(storage.key.to_string()).or_insert(size);
            if known != size {
                return Err(damaged("a storage of two types"));
            }
        }
    }
    let mut storages = HashMap::new();
    let mut place = at as u64;
    for key in keys.list(&keys.value).ok_or_else(|| damaged("no list of storages"))? {
        let Value::Text(key) = key else { return Err(damaged("a storage without a name")) };
        let size = *sizes.get(&**key).ok_or_else(|| damaged("a storage that no tensor has"))?;
        let mut count = [0; 8];
        file.seek(SeekFrom::Start(place)).map_err(failed)?;
        file.read_exact(&mut count).map_err(|_| damaged("a storage is missing"))?;
        let (start, bytes) = (place + 8, u64::from_le_bytes(count).checked_mul(size as u64));
        let end = bytes.and_then(|bytes| start.checked_add(bytes)).filter(|&end| end <= len);
        place = end.ok_or_else(|| damaged("a storage reaches beyond its end"))?;
        storages.insert(key.to_string(), (start, place - start));
    }
    places(&tensors, |view| {
        let storage = storages.get(&*view.storage.key).copied();
        storage.ok_or_else(|| format!("refers to the storage {}, which it does not hold", cut(&view.storage.key)))
    })
}

/// Entries under which training scripts keep the weights.
const WRAPPERS: [&str; 4] = ["state_dict", "model", "model_state_dict", "ema"];

/// The tensors of the dictionary that holds them. `storage` says where the bytes of one's storage begin, and how many
/// they are.
fn places(read: &Unpickled, storage: impl Fn(&View) -> Sentence<(u64, u64)>) -> Sentence<BTreeMap<String, Place>> {
    let none = || "holds no dictionary from names to tensors; save the state_dict of the network".to_string();
    let of_tensors = |value: &Value| {
        let entries = read.dict(value)?;
        let tensor = |(key, value): &(Value, Value)| matches!(key, Value::Text(_)) && read.tensor(value).is_some();
        (!entries.is_empty() && entries.iter().all(tensor)).then_some(entries)
    };
    let entries = match of_tensors(&read.value) {
        Some(entries) => entries,
        None => {
            let outer = read.dict(&read.value).ok_or_else(none)?;
            let mut found = Vec::new();
            for (key, value) in outer {
                if let (Value::Text(key), Some(entries)) = (key, of_tensors(value)) {
                    found.push((key, entries));
                }
            }
            let named: Vec<_> = found.iter().filter(|(key, _)| WRAPPERS.contains(&&***key)).collect();
            match (&found[..], &named[..]) {
                ([(_, only)], _) | (_, [(_, only)]) => *only,
                ([], _) => return Err(none()),
                (several, _) => {
                    let names: Vec<String> = several.iter().take(4).map(|(key, _)| cut(key)).collect();
                    return Err(format!(
                        "holds several dictionaries of tensors ({}); save the one of the network alone",
                        names.join(", ")
                    ));
                }
            }
        }
    };
    let mut found = BTreeMap::new();
    for (key, value) in entries {
        let (Value::Text(name), Some(view)) = (key, read.tensor(value)) else { return Err(none()) };
        let (start, bytes) = storage(view)?;
        let place = place(view, start, bytes)
            .ok_or_else(|| format!("holds {}, which lies beyond its storage; it is damaged", cut(name)))?;
        if found.insert(name.to_string(), place).is_some() {
            return Err(format!("holds {} twice", cut(name)));
        }
    }
    Ok(found)
}

/// Where a view lies whose storage is at `start`, `bytes` long; `None` if it reaches beyond it.
fn place(view: &View, start: u64, bytes: u64) -> Option<Place> {
    let size = view.storage.dtype.bitsize() / 8;
    if view.storage.len.checked_mul(size)? as u64 > bytes {
        return None;
    }
    let count = view.shape.iter().try_fold(1usize, |count, &extent| count.checked_mul(extent))?;
    // The last number's place, counted from the first's.
    let last =
        view.shape.iter().zip(&view.strides).try_fold(0usize, |last, (&extent, &stride)| {
            last.checked_add(extent.saturating_sub(1).checked_mul(stride)?)
        })?;
    let span = if count == 0 { 0 } else { last + 1 };
    // A view that repeats numbers may claim any size.
    if view.offset.checked_add(span)? > view.storage.len || count > view.storage.len {
        return None;
    }
    let mut dense = 1;
    let contiguous = count == 0
        || view.shape.iter().zip(&view.strides).rev().all(|(&extent, &stride)| {
            let fits = extent == 1 || stride == dense;
            dense *= extent.max(1);
            fits
        });
    Some(Place {
        file: 0,
        dtype: view.storage.dtype,
        shape: view.shape.clone(),
        start: start + (view.offset * size) as u64,
        len: span * size,
        dims: (!contiguous).then(|| view.shape.iter().copied().zip(view.strides.iter().copied()).collect()),
    })
}

/// A tensor to write: its name and shape.
pub(super) type Entry = (String, Vec<usize>);

/// Writes `path` as torch.save writes an ordered dictionary of f32 tensors; `numbers` gives those of the i-th entry.
///
/// # Errors
/// `Error::File` if it cannot be written.
pub(super) fn write(path: &Path, entries: &[Entry], mut numbers: impl FnMut(usize) -> Vec<f32>) -> Result<()> {
    output::write_archive(path, |archive| {
        let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).with_alignment(64);
        archive.start_file("archive/data.pkl", stored)?;
        archive.write_all(&pickled(entries))?;
        archive.start_file("archive/byteorder", stored)?;
        archive.write_all(b"little")?;
        for (i, (_, shape)) in entries.iter().enumerate() {
            let values = numbers(i);
            assert_eq!(values.len(), shape.iter().product::<usize>(), "numbers of a tensor of {shape:?}");
            let large = 4 * values.len() as u64 > u64::from(u32::MAX);
            archive.start_file(format!("archive/data/{i}"), stored.large_file(large))?;
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            archive.write_all(&bytes)?;
        }
        archive.start_file("archive/version", stored)?;
        archive.write_all(b"3\n")
    })
}

/// The pickle, of protocol 2, of an ordered dictionary of tensors, the i-th of storage i.
fn pickled(entries: &[Entry]) -> Vec<u8> {
    let mut to = b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec();
    let text = |to: &mut Vec<u8>, text: &str| {
        to.push(b'X');
        to.extend((text.len() as u32).to_le_bytes());
        to.extend(text.as_bytes());
    };
    let number = |to: &mut Vec<u8>, number: usize| match i32::try_from(number) {
        Ok(number) => {
            to.push(b'J');
            to.extend(number.to_le_bytes());
        }
        Err(_) => {
            to.extend(b"\x8a\x08");
            to.extend((number as u64).to_le_bytes());
        }
    };
    for (i, (name, shape)) in entries.iter().enumerate() {
        text(&mut to, name);
        to.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut to, "storage");
        to.extend(b"ctorch\nFloatStorage\n");
        text(&mut to, &i.to_string());
        text(&mut to, "cpu");
        number(&mut to, shape.iter().product());
        to.extend(b"tQ");
        number(&mut to, 0);
        let strides: Vec<usize> = (0..shape.len()).map(|d| shape[d + 1..].iter().product()).collect();
        for extents in [shape, &strides] {
            to.push(b'(');
            extents.iter().for_each(|&extent| number(&mut to, extent));
            to.push(b't');
        }
        // requires_grad, then the hooks.
        to.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    to.extend(b"u.");
    to
}

/// The types of numbers that are read.
pub(super) fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}
