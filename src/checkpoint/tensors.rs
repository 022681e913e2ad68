//! The safetensors files of a checkpoint: parameters by name, written as f32 in the channels-first layout of other
//! tools, read as F32, F16 or BF16.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use safetensors::tensor::{Metadata, TensorInfo, TensorView};
use safetensors::{Dtype, SafeTensors};

use super::read;
use crate::error::{Error, Result};
use crate::layout;
use crate::params::{Layout, Params, Spec, Specs};

/// Whether a safetensors file has the length that its header claims. Reads only the header.
pub(super) fn is_whole(path: &Path) -> io::Result<bool> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut size = [0; 8];
    file.read_exact(&mut size)?;
    let size = u64::from_le_bytes(size);
    if size > len {
        return Ok(false);
    }
    let mut header = vec![0; size as usize];
    file.read_exact(&mut header)?;
    let metadata: Metadata = serde_json::from_slice(&header)?;
    Ok(8 + size + metadata.data_len() as u64 == len)
}

/// The value of `key` in a safetensors file's metadata.
pub(super) fn metadata(bytes: &[u8], key: &str) -> Option<String> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).ok()?;
    metadata.metadata().as_ref()?.get(key).cloned()
}

/// Writes each part's tensors, f32 in the layout of other tools, as `PREFIX` + name. Takes a single metadata entry,
/// since the order of several would be random: the same state must give the same bytes.
///
/// Does not use the library's writer, whose files only their owner can read.
pub(super) fn write_tensors(
    path: &Path,
    metadata: (&str, &str),
    specs: &Specs,
    parts: &[(&str, &[f32])],
) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::file(path, format!("cannot be written: {e}"));
    let mut infos = Vec::new();
    let mut end = 0;
    for (prefix, _) in parts {
        for (_, spec) in specs.iter() {
            let start = end;
            end += 4 * spec.shape.len();
            let info = TensorInfo { dtype: Dtype::F32, shape: shape_in_file(spec), data_offsets: (start, end) };
            infos.push((format!("{prefix}{}", spec.name), info));
        }
    }
    let metadata = HashMap::from([(metadata.0.to_string(), metadata.1.to_string())]);
    let metadata = Metadata::new(Some(metadata), infos).map_err(|e| failed(&e))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|e| failed(&e))?;
    header.resize(header.len().next_multiple_of(8), b' '); // tensors start aligned
    let write = || -> io::Result<()> {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for (_, flat) in parts {
            for (p, spec) in specs.iter() {
                let values = to_file_layout(spec, &flat[specs.range(p)]);
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                file.write_all(&bytes)?;
            }
        }
        file.into_inner()?.sync_all()
    };
    write().map_err(|e| failed(&e))
}

fn shape_in_file(spec: &Spec) -> Vec<usize> {
    let s = spec.shape;
    match spec.layout {
        Layout::Conv => vec![s.n, s.c, s.h, s.w],
        Layout::Matrix => vec![s.n, s.c],
        Layout::Vector => vec![s.c],
    }
}

fn to_file_layout(spec: &Spec, values: &[f32]) -> Vec<f32> {
    match spec.layout {
        Layout::Conv => layout::to_channels_first(values, spec.shape.c, spec.shape.pixels()),
        Layout::Matrix | Layout::Vector => values.to_vec(),
    }
}

fn from_file_layout(spec: &Spec, values: &[f32]) -> Vec<f32> {
    match spec.layout {
        Layout::Conv => layout::to_channels_last(values, spec.shape.c, spec.shape.pixels()),
        Layout::Matrix | Layout::Vector => values.to_vec(),
    }
}

/// Reads a model's weights into `params`: F32, F16 or BF16, under today's names or those of diffusers before 0.15.
///
/// # Errors
/// `Error::File` for a damaged file, or missing, unknown or misshapen tensors.
pub fn read_weights(path: &Path, params: &mut Params) -> Result<()> {
    let bytes = read(path)?;
    let specs = params.specs().clone();
    let file = TensorFile::parse(path, &bytes, &OLD_NAMES)?;
    file.refuse_unread(&specs, &[""])?;
    let mut flat = vec![0.0; specs.flat_len()];
    file.read_into("", &specs, &mut flat)?;
    params.write(&flat)
}

/// Parts of attention layer names in old files, and their names today.
const OLD_NAMES: [(&str, &str); 4] =
    [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")];

/// A safetensors file with its tensors under today's names.
pub(super) struct TensorFile<'a> {
    path: &'a Path,
    tensors: BTreeMap<String, TensorView<'a>>,
}

impl<'a> TensorFile<'a> {
    pub fn parse(path: &'a Path, bytes: &'a [u8], old_names: &[(&str, &str)]) -> Result<Self> {
        let file = SafeTensors::deserialize(bytes).map_err(|e| {
            Error::file(path, format!("is not a whole safetensors file ({e}); it is cut short or damaged"))
        })?;
        let today = |name: String| old_names.iter().fold(name, |name, (old, new)| name.replace(old, new));
        Ok(TensorFile { path, tensors: file.tensors().into_iter().map(|(name, view)| (today(name), view)).collect() })
    }

    /// Refuses a file unless it has exactly the tensors of `specs` under each of `prefixes`, naming missing and extra
    /// ones.
    pub fn refuse_unread(&self, specs: &Specs, prefixes: &[&str]) -> Result<()> {
        let wanted: BTreeSet<String> =
            prefixes.iter().flat_map(|p| specs.iter().map(move |(_, s)| format!("{p}{}", s.name))).collect();
        let missing: Vec<&str> = wanted.iter().filter(|n| !self.tensors.contains_key(*n)).map(String::as_str).collect();
        let extra: Vec<&str> = self.tensors.keys().filter(|n| !wanted.contains(*n)).map(String::as_str).collect();
        let mut faults = Vec::new();
        if !missing.is_empty() {
            faults.push(format!("lacks {}", named(&missing)));
        }
        if !extra.is_empty() {
            faults.push(format!("holds {}, which this network does not have", named(&extra)));
        }
        if faults.is_empty() { Ok(()) } else { Err(Error::file(self.path, faults.join(" and "))) }
    }

    /// Reads every parameter of `specs` from the tensor `prefix` + name into its range of `flat`.
    pub fn read_into(&self, prefix: &str, specs: &Specs, flat: &mut [f32]) -> Result<()> {
        assert_eq!(flat.len(), specs.flat_len(), "a flat buffer of {} parameters", specs.count());
        let mut misfits = Vec::new();
        for (p, spec) in specs.iter() {
            let name = format!("{prefix}{}", spec.name);
            let Some(tensor) = self.tensors.get(&name) else {
                return Err(Error::file(self.path, format!("lacks the tensor {name}")));
            };
            let want = shape_in_file(spec);
            // Attention layers were once 1x1 convolutions: [c, c, 1, 1].
            let is_old_matrix = spec.layout == Layout::Matrix && tensor.shape() == [want[0], want[1], 1, 1];
            if tensor.shape() != want && !is_old_matrix {
                misfits.push(format!("{name} has shape {:?} instead of {want:?}", tensor.shape()));
                continue;
            }
            let values = to_f32(tensor.dtype(), tensor.data()).ok_or_else(|| {
                Error::file(self.path, format!("holds {name} as {:?}; F32, F16 and BF16 are read", tensor.dtype()))
            })?;
            flat[specs.range(p)].copy_from_slice(&from_file_layout(spec, &values));
        }
        if misfits.is_empty() {
            return Ok(());
        }
        let misfits: Vec<&str> = misfits.iter().map(String::as_str).collect();
        Err(Error::file(self.path, format!("does not fit this network: {}", named(&misfits))))
    }
}

/// A list for a sentence: the first four items, and how many more.
fn named(items: &[&str]) -> String {
    let (shown, more) = items.split_at(items.len().min(4));
    let more = if more.is_empty() { String::new() } else { format!(" and {} more", more.len()) };
    format!("{}{more}", shown.join(", "))
}

fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let pairs = bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F32 => Some(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
        Dtype::F16 => Some(pairs.map(|b| half::f16::from_le_bytes(b).to_f32()).collect()),
        Dtype::BF16 => Some(pairs.map(|b| half::bf16::from_le_bytes(b).to_f32()).collect()),
        _ => None,
    }
}
