//! Files of tensors by name: safetensors, written as f32 in the channels-first layout of other tools, and PyTorch's
//! (`torch`); read as F32, F16 or BF16.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value};

use super::torch;
use crate::error::{Error, Result};
use crate::layout;
use crate::params::{Layout, Params, Spec, Specs};
use crate::text::cut;

/// Whether a safetensors file has the length that its header claims. Reads only the header.
pub(super) fn is_whole(path: &Path) -> bool {
    open(path).is_ok()
}

/// A safetensors file whose header has been read.
struct Opened {
    file: File,
    header: Metadata,
    /// Where the data begin.
    data: u64,
}

/// The longest header that the format allows.
const LONGEST_HEADER: u64 = 100_000_000;

/// Opens a safetensors file, and compares what its header declares with the length of the file.
fn open(path: &Path) -> Result<Opened> {
    let unreadable = |e: io::Error| Error::file(path, format!("cannot be read: {e}"));
    let damaged = |e: &str| {
        let e = cut(e);
        Error::file(path, format!("is not a whole safetensors file ({e}); it is cut short or damaged"))
    };
    let mut file = File::open(path).map_err(unreadable)?;
    let len = file.metadata().map_err(unreadable)?.len();
    let mut size = [0; 8];
    if len < 8 {
        return Err(damaged("it has no header"));
    }
    file.read_exact(&mut size).map_err(unreadable)?;
    if size == *b"version " {
        let what = "is a pointer of Git LFS, not the weights; fetch them with git lfs pull";
        return Err(Error::file(path, what));
    }
    let size = u64::from_le_bytes(size);
    if size > LONGEST_HEADER.min(len - 8) {
        return Err(damaged(&format!("it says that its header has {size} bytes")));
    }
    let mut header = vec![0; size as usize];
    file.read_exact(&mut header).map_err(unreadable)?;
    // Also checks that the tensors lie end to end, each of the length that its shape says.
    let header: Metadata = serde_json::from_slice(&header).map_err(|e| damaged(&e.to_string()))?;
    let (has, wants) = (len - 8 - size, header.data_len() as u64);
    if has != wants {
        return Err(damaged(&format!("its header declares {wants} bytes of tensors, and {has} follow")));
    }
    Ok(Opened { file, header, data: 8 + size })
}

/// An open file, its tensors, and the metadata of safetensors.
type Contents = (File, BTreeMap<String, Place>, HashMap<String, String>);

/// Opens a file of tensors of either kind.
fn open_any(path: &Path) -> Result<Contents> {
    let unreadable = |e: io::Error| Error::file(path, format!("cannot be read: {e}"));
    let mut file = File::open(path).map_err(unreadable)?;
    let mut start = Vec::new();
    (&mut file).take(8).read_to_end(&mut start).map_err(unreadable)?;
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    if torch::is_torch(&start) || (["bin", "pt", "pth"].contains(&ending) && start != b"version ") {
        let tensors = torch::tensors(path, &mut file)?;
        return Ok((file, tensors, HashMap::new()));
    }
    let Opened { file, header, data } = open(path)?;
    let place = |info: &TensorInfo| {
        let (start, end) = info.data_offsets;
        let shape = info.shape.clone();
        Place { file: 0, dtype: info.dtype, shape, start: data + start as u64, len: end - start, dims: None }
    };
    let tensors = header.tensors().iter().map(|(name, info)| (name.clone(), place(info))).collect();
    Ok((file, tensors, header.metadata().clone().unwrap_or_default()))
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

pub(super) fn shape_in_file(spec: &Spec) -> Vec<usize> {
    let s = spec.shape;
    match spec.layout {
        Layout::Conv => vec![s.n, s.c, s.h, s.w],
        Layout::Matrix => vec![s.n, s.c],
        Layout::Vector => vec![s.c],
    }
}

pub(super) fn to_file_layout(spec: &Spec, values: &[f32]) -> Vec<f32> {
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

/// Reads a model's weights into `params`: F32, F16 or BF16, under today's names or those of diffusers before 0.15, each
/// name with the same prefix or without one.
///
/// # Errors
/// `Error::File` for a damaged file, or missing, unknown or misshapen tensors.
pub fn read_weights(path: &Path, params: &mut Params) -> Result<()> {
    let specs = params.specs().clone();
    TensorFile::of_weights(path)?.fitting(&specs, &[""])?.read_params(params)
}

/// Parts of attention layer names in old files, and their names today.
const OLD_NAMES: [(&str, &str); 4] =
    [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")];

/// Files of tensors, under today's names.
pub(super) struct TensorFile {
    /// The file that errors name: the only one, or the index of several.
    path: PathBuf,
    files: Vec<(PathBuf, File)>,
    /// The metadata of the first file, if it is safetensors.
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, Place>,
}

/// Where a tensor's data are.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Index of the file.
    pub file: usize,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// The byte of its first number.
    pub start: u64,
    /// Bytes from there to the end of its last.
    pub len: usize,
    /// Extents and strides in numbers, slowest first, if the numbers do not simply follow each other.
    pub dims: Option<Vec<(usize, usize)>>,
}

impl Place {
    /// Extents and strides.
    fn dims(&self) -> Vec<(usize, usize)> {
        // Of nothing, extents may be any.
        let after = |i: usize| self.shape[i + 1..].iter().fold(1, |product: usize, &d| product.saturating_mul(d));
        let dense = |i: usize| (self.shape[i], after(i));
        self.dims.clone().unwrap_or_else(|| (0..self.shape.len()).map(dense).collect())
    }

    /// Without a last dimension of 1 after two others: a convolution over one dimension as a matrix.
    pub fn without_last_of_one(&self) -> Self {
        let mut place = self.clone();
        if let [_, _, 1] = self.shape[..] {
            place.shape.pop();
            place.dims = self.dims.clone().map(|mut dims| {
                dims.pop();
                dims
            });
        }
        place
    }

    /// Of a matrix or vector whose rows are `heads` times three parts (q, k, v), all rows of part `which`: those of the
    /// first head, of the second, and so on. `None` if the rows do not divide so.
    pub fn rows_of(&self, which: usize, heads: usize) -> Option<Self> {
        let dims = self.dims();
        let (&(rows, stride), columns) = dims.split_first()?;
        if heads == 0 || rows == 0 || !rows.is_multiple_of(3 * heads) {
            return None;
        }
        let of_head = rows / (3 * heads);
        let mut split = vec![(heads, 3 * of_head * stride), (of_head, stride)];
        split.extend(columns);
        let last: usize = split.iter().map(|&(extent, stride)| extent.saturating_sub(1) * stride).sum();
        let size = self.dtype.bitsize() / 8;
        let shape = [&[rows / 3], &self.shape[1..]].concat();
        let start = self.start + (which * of_head * stride * size) as u64;
        Some(Place { shape, start, len: (last + 1) * size, dims: Some(split), ..self.clone() })
    }

    /// The numbers in the order of the shape, from the bytes at `start`.
    fn numbers(&self, bytes: &[u8]) -> Vec<f32> {
        let numbers = to_f32(self.dtype, bytes);
        let Some(dims) = &self.dims else { return numbers };
        let mut places = vec![0];
        for &(extent, stride) in dims {
            places = places.iter().flat_map(|&at| (0..extent).map(move |i| at + i * stride)).collect();
        }
        places.into_iter().map(|at| numbers[at]).collect()
    }
}

impl TensorFile {
    /// A single file.
    pub fn open(path: &Path) -> Result<Self> {
        TensorFile::of_all(path, &[path.to_path_buf()])
    }

    fn of_all(path: &Path, files: &[PathBuf]) -> Result<Self> {
        let mut all =
            TensorFile { path: path.into(), files: Vec::new(), metadata: HashMap::new(), tensors: BTreeMap::new() };
        for (file, path) in files.iter().enumerate() {
            let (opened, tensors, metadata) = open_any(path)?;
            for (name, place) in tensors {
                if all.tensors.insert(name.clone(), Place { file, ..place }).is_some() {
                    return Err(Error::file(path, format!("holds {}, which another shard holds too", cut(&name))));
                }
            }
            if file == 0 {
                all.metadata = metadata;
            }
            all.files.push((path.clone(), opened));
        }
        Ok(all)
    }

    /// The tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Place> {
        &self.tensors
    }

    /// The same file with its tensors under other names.
    pub fn with_tensors(self, tensors: BTreeMap<String, Place>) -> Self {
        TensorFile { tensors, ..self }
    }

    /// The weights of a model in a single file.
    pub fn of_weights(path: &Path) -> Result<Self> {
        TensorFile::open(path)?.into_weights()
    }

    /// The tensors under today's names and without what precedes all names, such as the `module.` of a wrapper.
    fn into_weights(self) -> Result<Self> {
        const FIRST: &str = "conv_in.weight";
        let prefix = self.tensors.keys().find_map(|name| name.strip_suffix(FIRST)).map(String::from);
        let prefix = prefix.filter(|prefix| self.tensors.keys().all(|name| name.starts_with(prefix)));
        let prefix = prefix.unwrap_or_default();
        let today = |name: &str| OLD_NAMES.iter().fold(name.to_string(), |name, (old, new)| name.replace(old, new));
        let mut tensors = BTreeMap::new();
        for (name, at) in self.tensors {
            if tensors.insert(today(&name[prefix.len()..]), at).is_some() {
                let what = format!("holds {} twice, under its old name and today's", cut(&today(&name)));
                return Err(Error::file(&self.path, what));
            }
        }
        Ok(TensorFile { tensors, ..self })
    }

    /// The weights in the shards that an index (`diffusion_pytorch_model.safetensors.index.json`) names, which lie
    /// beside it; `weight_map` has the file of each tensor.
    pub fn of_shards(index: &Path, weight_map: &Map<String, Value>) -> Result<Self> {
        let mut files: BTreeSet<&str> = BTreeSet::new();
        for file in weight_map.values() {
            let name = file.as_str().filter(|name| {
                let mut parts = Path::new(name).components();
                let plain = matches!(parts.next(), Some(Component::Normal(part)) if part == *name);
                let of_weights = name.ends_with(".safetensors") || name.ends_with(".bin");
                plain && parts.next().is_none() && of_weights && !name.contains('\\')
            });
            let Some(name) = name else {
                let file = cut(&file.to_string());
                let what =
                    format!("has {file} in weight_map; the name of a .safetensors or .bin file beside it is expected");
                return Err(Error::file(index, what));
            };
            files.insert(name);
        }
        if let Some(missing) = files.iter().find(|name| !index.with_file_name(name).is_file()) {
            return Err(Error::file(index, format!("names the shard {}, which is not beside it", cut(missing))));
        }
        let paths: Vec<PathBuf> = files.iter().map(|name| index.with_file_name(name)).collect();
        let found = TensorFile::of_all(index, &paths)?;
        let names: BTreeSet<&String> = weight_map.keys().chain(found.tensors.keys()).collect();
        let file_of =
            |name: &String| found.tensors.get(name).and_then(|at| found.files[at.file].0.file_name()?.to_str());
        for name in names {
            let (says, is) = (weight_map.get(name).and_then(Value::as_str), file_of(name));
            if says != is {
                let none = "no shard";
                let (says, is) = (says.unwrap_or(none), is.unwrap_or(none));
                let what = format!("places {} in {}, but it is in {}", cut(name), cut(says), cut(is));
                return Err(Error::file(index, what));
            }
        }
        found.into_weights()
    }

    /// The value of `key` in the metadata of the first file.
    pub fn metadata(&self, key: &str) -> Option<&String> {
        self.metadata.get(key)
    }

    /// Refuses a file unless it has exactly the tensors of `specs` under each of `prefixes`, of the shapes there and of
    /// a type that is read. Nothing has been allocated for them until then.
    pub fn fitting(self, specs: &Specs, prefixes: &[&str]) -> Result<Self> {
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
        if !faults.is_empty() {
            return Err(Error::file(&self.path, faults.join(" and ")));
        }
        let mut misfits = Vec::new();
        let in_order = prefixes.iter().flat_map(|prefix| specs.iter().map(move |(_, spec)| (prefix, spec)));
        for (prefix, spec) in in_order {
            let name = format!("{prefix}{}", spec.name);
            let (info, want) = (&self.tensors[&name], shape_in_file(spec));
            // Attention layers were once 1x1 convolutions: [c, c, 1, 1].
            let is_old_matrix = spec.layout == Layout::Matrix && info.shape == [want[0], want[1], 1, 1];
            if info.shape != want && !is_old_matrix {
                misfits.push(format!("{name} has shape {:?} instead of {want:?}", info.shape));
            } else if !torch::is_float(info.dtype) {
                let what = format!("holds {name} as {:?}; F32, F16 and BF16 are read", info.dtype);
                return Err(Error::file(&self.path, what));
            }
        }
        if misfits.is_empty() {
            return Ok(self);
        }
        let misfits: Vec<&str> = misfits.iter().map(String::as_str).collect();
        Err(Error::file(&self.path, format!("does not fit this network: {}", named(&misfits))))
    }

    /// Reads every parameter of a file that is [`fitting`](Self::fitting) from the tensor `prefix` + name into its
    /// range of `flat`.
    pub fn read_into(&mut self, prefix: &str, specs: &Specs, flat: &mut [f32]) -> Result<()> {
        assert_eq!(flat.len(), specs.flat_len(), "a flat buffer of {} parameters", specs.count());
        for (p, spec) in specs.iter() {
            let place = &self.tensors[&format!("{prefix}{}", spec.name)];
            let (path, file) = &mut self.files[place.file];
            let mut bytes = vec![0; place.len];
            let mut read = || -> io::Result<()> {
                file.seek(SeekFrom::Start(place.start))?;
                file.read_exact(&mut bytes)
            };
            read().map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
            flat[specs.range(p)].copy_from_slice(&from_file_layout(spec, &place.numbers(&bytes)));
        }
        Ok(())
    }

    /// Reads the parameters of a file that is [`fitting`](Self::fitting).
    pub fn read_params(&mut self, params: &mut Params) -> Result<()> {
        let specs = params.specs().clone();
        let mut flat = vec![0.0; specs.flat_len()];
        self.read_into("", &specs, &mut flat)?;
        params.write(&flat)
    }
}

/// A list for a sentence: the first four items, and how many more.
fn named(items: &[&str]) -> String {
    let (shown, more) = items.split_at(items.len().min(4));
    let shown: Vec<String> = shown.iter().map(|item| cut(item)).collect();
    let more = if more.is_empty() { String::new() } else { format!(" and {} more", more.len()) };
    format!("{}{more}", shown.join(", "))
}

fn to_f32(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let pairs = bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::F16 => pairs.map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => pairs.map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
        other => unreachable!("{other:?}, which `fitting` refuses"),
    }
}
