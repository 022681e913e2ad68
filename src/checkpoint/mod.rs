//! Checkpoints are model folders of diffusers (`DDPMPipeline.from_pretrained` opens them) with one file more to resume
//! from, and `--model` opens diffusers' own:
//!
//! ```text
//! RUN/checkpoints/STEP/
//!     model_index.json                              what the folder is
//!     unet/config.json                              the network; its keys are those of UNet2DModel
//!     unet/diffusion_pytorch_model.safetensors      the moving average of the weights, f32, OIHW
//!     scheduler/scheduler_config.json               schedule and variance
//!     training_state.safetensors                    weights.NAME, adam_m.NAME, adam_v.NAME; metadata: step
//! ```
//!
//! A checkpoint is written under another name beside the others, synced and renamed, and only then are old ones deleted: whenever
//! the power fails, the last good checkpoint is there under its name. [`newest`] passes over folders that are not complete.
//!
//! A model of diffusers whose configuration asks for something this network does not have is refused with the key; nothing is
//! ignored in silence. Deliberately absent: pickled weights (`.bin`, `.pt`), sharded files.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use crate::config::{Config, Diffusion, Model, Preset, Size};
use crate::device::Device;
use crate::diffusion::{Kind, Schedule, Variance};
use crate::error::{Error, Result};
use crate::layout;
use crate::output::{self, UNFINISHED};
use crate::params::{Layout, Params, Spec, Specs};
use crate::tensor::Tensor;
use crate::unet::UNet;

const MODEL_INDEX: &str = "model_index.json";
const UNET_CONFIG: &str = "unet/config.json";
const UNET_WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";
const SCHEDULER_CONFIG: &str = "scheduler/scheduler_config.json";
const TRAINING_STATE: &str = "training_state.safetensors";
/// The version of diffusers whose file format this is.
const DIFFUSERS_VERSION: &str = "0.42.1";

/// What a run is made of at one step, to be saved.
pub struct State<'a> {
    /// Steps done.
    pub step: u32,
    /// The weights.
    pub params: &'a Params,
    /// Their moving average.
    pub ema: &'a Params,
    /// Adam's first moments, flat like the parameters.
    pub m: &'a Tensor,
    /// Adam's second moments.
    pub v: &'a Tensor,
}

/// The same, to be filled from a checkpoint.
pub struct StateMut<'a> {
    /// Steps done.
    pub step: &'a mut u32,
    /// The weights.
    pub params: &'a mut Params,
    /// Their moving average.
    pub ema: &'a mut Params,
    /// Adam's first moments, flat like the parameters.
    pub m: &'a mut Tensor,
    /// Adam's second moments.
    pub v: &'a mut Tensor,
}

/// A model to sample from or to evaluate.
pub struct Loaded {
    /// Network and diffusion process as the model's files say; the rest from the run's `config.toml` where the model belongs to a
    /// run, otherwise that of a preset.
    pub config: Config,
    /// The moving average of the weights.
    pub params: Params,
}

/// Writes `run/checkpoints/STEP` and deletes all but the newest `config.keep_checkpoints`. Returns the folder.
///
/// If there is a complete checkpoint of that step already, it stays as it is: a run is a function of its settings, so it
/// holds the same numbers.
pub fn save(run: &Path, config: &Config, state: State<'_>) -> Result<PathBuf> {
    let folder = run.join("checkpoints");
    fs::create_dir_all(&folder).map_err(|e| Error::file(&folder, format!("cannot be created: {e}")))?;
    output::remove_unfinished(&folder)?;
    let path = folder.join(state.step.to_string());
    if !is_complete(&path) {
        if path.exists() {
            remove(&path)?;
        }
        output::write_folder_atomically(&path, |folder| write(folder, config, &state))?;
    }
    if config.keep_checkpoints > 0 {
        for (_, old) in complete(run)?.iter().rev().skip(config.keep_checkpoints) {
            remove(old)?;
        }
    }
    Ok(path)
}

/// The newest complete checkpoint of a run, if it has any.
pub fn newest(run: &Path) -> Result<Option<PathBuf>> {
    Ok(complete(run)?.pop_last().map(|(_, path)| path))
}

/// Fills a training state from a checkpoint, which must be one of the same network.
pub fn restore(checkpoint: &Path, state: StateMut<'_>) -> Result<()> {
    let path = checkpoint.join(TRAINING_STATE);
    let bytes = read(&path)?;
    let specs = state.params.specs().clone();
    let file = TensorFile::parse(&path, &bytes, &[])?;
    let mut flat = vec![0.0; specs.flat_len()];
    file.read_into("weights.", &specs, &mut flat)?;
    state.params.write(&flat)?;
    for (prefix, moments) in [("adam_m.", state.m), ("adam_v.", state.v)] {
        file.read_into(prefix, &specs, &mut flat)?;
        moments.write(&flat)?;
    }
    file.refuse_unread(&specs, &["weights.", "adam_m.", "adam_v."])?;
    let step =
        SafeTensors::read_metadata(&bytes).ok().and_then(|(_, m)| m.metadata().as_ref()?.get("step")?.parse().ok());
    *state.step = step.ok_or_else(|| Error::file(&path, "does not say in its metadata which step it is of"))?;
    read_weights(&checkpoint.join(UNET_WEIGHTS), state.ema)
}

/// Opens a run folder (its newest checkpoint), a checkpoint, or a model folder of diffusers, with or without `unet/`.
pub fn load(device: &Device, path: &Path) -> Result<Loaded> {
    let place = Place::find(path)?;
    let config = place.config()?;
    let (_, specs) = UNet::new(&config.model)?;
    let mut params = Params::zeros(device, specs)?;
    read_weights(&place.weights()?, &mut params)?;
    Ok(Loaded { config, params })
}

/// Where a model's files are.
struct Place {
    /// The run it belongs to.
    run: Option<PathBuf>,
    /// The folder with the U-Net's `config.json` and weights.
    unet: PathBuf,
    /// `scheduler_config.json`.
    scheduler: Option<PathBuf>,
}

impl Place {
    fn find(path: &Path) -> Result<Place> {
        if !path.is_dir() {
            let what = if path.exists() { "is a file" } else { "does not exist" };
            let wanted = "a run folder, a checkpoint or a model folder of diffusers is expected";
            return Err(Error::file(path, format!("{what}; {wanted}")));
        }
        if path.join("checkpoints").is_dir() && path.join("config.toml").is_file() {
            let Some(newest) = newest(path)? else {
                return Err(Error::file(path, "has no complete checkpoint yet"));
            };
            return Ok(Place { run: Some(path.to_path_buf()), ..Place::find(&newest)? });
        }
        let existing = |name: &str| Some(path.join(name)).filter(|file| file.is_file());
        if existing(UNET_CONFIG).is_some() {
            // RUN/checkpoints/STEP
            let run = path.ancestors().nth(2).filter(|run| path.starts_with(run.join("checkpoints")));
            let run = run.filter(|run| run.join("config.toml").is_file()).map(Path::to_path_buf);
            return Ok(Place { run, unet: path.join("unet"), scheduler: existing(SCHEDULER_CONFIG) });
        }
        if existing("config.json").is_some() {
            let scheduler =
                existing("scheduler_config.json").or_else(|| existing("../scheduler/scheduler_config.json"));
            return Ok(Place { run: None, unet: path.to_path_buf(), scheduler });
        }
        let what = format!(
            "is no run folder, checkpoint or model folder of diffusers: it holds neither checkpoints/, {UNET_CONFIG} nor config.json"
        );
        Err(Error::file(path, what))
    }

    fn config(&self) -> Result<Config> {
        let mut config = match &self.run {
            Some(run) => Config::read(&run.join("config.toml"))?,
            None => Config::preset(Preset::Cifar10),
        };
        let file = self.unet.join("config.json");
        config.model = model_from_json(&read_json(&file)?).map_err(|e| Error::file(&file, e))?;
        let unfit = |e: Error| Error::file(&file, format!("describes a network that cannot be built: {e}"));
        config.model.validate().map_err(unfit)?;
        config.diffusion = match &self.scheduler {
            Some(file) => diffusion_from_json(&read_json(file)?).map_err(|e| Error::file(file, e))?,
            // A U-Net alone: what diffusers' DDPMScheduler is without arguments.
            None => Diffusion { schedule: Kind::Linear, timesteps: 1000, variance: Variance::FixedSmall },
        };
        Ok(config)
    }

    fn weights(&self) -> Result<PathBuf> {
        let names = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"];
        if let Some(file) = names.iter().map(|n| self.unet.join(n)).find(|f| f.is_file()) {
            return Ok(file);
        }
        let what = if self.unet.join("diffusion_pytorch_model.bin").is_file() {
            "holds its weights as diffusion_pytorch_model.bin, a pickle, which is not read; save it in diffusers with safe_serialization=True"
        } else {
            "holds no diffusion_pytorch_model.safetensors"
        };
        Err(Error::file(&self.unet, what))
    }
}

/// Checkpoints of a run by their names that are not complete, oldest first: damaged, since saving leaves none.
pub fn damaged(run: &Path) -> Result<Vec<PathBuf>> {
    Ok(by_step(run)?.into_values().filter(|path| !is_complete(path)).collect())
}

/// Complete checkpoints of a run by step.
fn complete(run: &Path) -> Result<BTreeMap<u32, PathBuf>> {
    Ok(by_step(run)?.into_iter().filter(|(_, path)| is_complete(path)).collect())
}

/// Everything in a run's `checkpoints` that is named like one, by step.
fn by_step(run: &Path) -> Result<BTreeMap<u32, PathBuf>> {
    let folder = run.join("checkpoints");
    let entries = match fs::read_dir(&folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        entries => entries.map_err(|e| Error::file(&folder, format!("cannot be read: {e}")))?,
    };
    let mut found = BTreeMap::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::file(&folder, format!("cannot be read: {e}")))?.path();
        let step = path.file_name().and_then(|n| n.to_str()?.parse::<u32>().ok());
        if let Some(step) = step {
            found.insert(step, path);
        }
    }
    Ok(found)
}

/// True if all files are there, the settings are JSON and the tensors as long as their headers say.
fn is_complete(checkpoint: &Path) -> bool {
    let has_json = |name: &str| read_json(&checkpoint.join(name)).is_ok();
    let has_tensors = |name: &str| is_whole(&checkpoint.join(name)).unwrap_or(false);
    [MODEL_INDEX, UNET_CONFIG, SCHEDULER_CONFIG].into_iter().all(has_json)
        && [UNET_WEIGHTS, TRAINING_STATE].into_iter().all(has_tensors)
}

/// Whether a safetensors file has the length that its header claims; reads the header alone.
fn is_whole(path: &Path) -> io::Result<bool> {
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

/// Deletes a checkpoint; it loses its name first, so that half of one is never seen under it.
fn remove(checkpoint: &Path) -> Result<()> {
    let mut name = std::ffi::OsString::from(".");
    name.push(checkpoint.file_name().unwrap_or_default());
    name.push(UNFINISHED);
    let doomed = checkpoint.with_file_name(name);
    fs::rename(checkpoint, &doomed)
        .and_then(|()| fs::remove_dir_all(&doomed))
        .map_err(|e| Error::file(checkpoint, format!("cannot be deleted: {e}")))
}

fn write(folder: &Path, config: &Config, state: &State<'_>) -> Result<()> {
    for sub in ["unet", "scheduler"] {
        fs::create_dir(folder.join(sub))
            .map_err(|e| Error::file(folder.join(sub), format!("cannot be created: {e}")))?;
    }
    let index = json!({
        "_class_name": "DDPMPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    });
    write_json(&folder.join(MODEL_INDEX), &index)?;
    write_json(&folder.join(UNET_CONFIG), &model_to_json(&config.model))?;
    write_json(&folder.join(SCHEDULER_CONFIG), &diffusion_to_json(&config.diffusion)?)?;

    let specs = state.params.specs();
    // transformers and diffusers look for this mark.
    write_tensors(&folder.join(UNET_WEIGHTS), ("format", "pt"), specs, &[("", &state.ema.host()?)])?;
    let step = state.step.to_string();
    let (m, v, weights) = (state.m.host()?, state.v.host()?, state.params.host()?);
    let parts: [(&str, &[f32]); 3] = [("adam_m.", &m), ("adam_v.", &v), ("weights.", &weights)];
    write_tensors(&folder.join(TRAINING_STATE), ("step", &step), specs, &parts)
}

/// Writes each part's tensors, f32 in the layout of other tools, as `PREFIX` + name. One entry of metadata, since their order in
/// a file would be random: the same state gives the same bytes.
///
/// By hand and not through the library's writer, which would make files that none but their owner can read.
fn write_tensors(path: &Path, metadata: (&str, &str), specs: &Specs, parts: &[(&str, &[f32])]) -> Result<()> {
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
pub fn read_weights(path: &Path, params: &mut Params) -> Result<()> {
    let bytes = read(path)?;
    let specs = params.specs().clone();
    let file = TensorFile::parse(path, &bytes, &OLD_NAMES)?;
    file.refuse_unread(&specs, &[""])?;
    let mut flat = vec![0.0; specs.flat_len()];
    file.read_into("", &specs, &mut flat)?;
    params.write(&flat)
}

/// Parts of the names of attention's layers in old files, and what they are called today.
const OLD_NAMES: [(&str, &str); 4] =
    [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")];

/// A safetensors file whose tensors are looked up by today's names.
struct TensorFile<'a> {
    path: &'a Path,
    tensors: BTreeMap<String, safetensors::tensor::TensorView<'a>>,
}

impl<'a> TensorFile<'a> {
    fn parse(path: &'a Path, bytes: &'a [u8], old_names: &[(&str, &str)]) -> Result<Self> {
        let file = SafeTensors::deserialize(bytes).map_err(|e| {
            Error::file(path, format!("is not a whole safetensors file ({e}); it is cut short or damaged"))
        })?;
        let today = |name: String| old_names.iter().fold(name, |name, (old, new)| name.replace(old, new));
        Ok(TensorFile { path, tensors: file.tensors().into_iter().map(|(name, view)| (today(name), view)).collect() })
    }

    /// Refuses a file that has other tensors than `specs` under `prefixes`, naming those that are missing and those that are
    /// too many.
    fn refuse_unread(&self, specs: &Specs, prefixes: &[&str]) -> Result<()> {
        let wanted: std::collections::BTreeSet<String> =
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
    fn read_into(&self, prefix: &str, specs: &Specs, flat: &mut [f32]) -> Result<()> {
        assert_eq!(flat.len(), specs.flat_len(), "a flat buffer of {} parameters", specs.count());
        let mut misfits = Vec::new();
        for (p, spec) in specs.iter() {
            let name = format!("{prefix}{}", spec.name);
            let Some(tensor) = self.tensors.get(&name) else {
                return Err(Error::file(self.path, format!("lacks the tensor {name}")));
            };
            let want = shape_in_file(spec);
            // Attention's layers were 1x1 convolutions once: [c, c, 1, 1].
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

/// A list for a sentence; of a long one the first four, and how many more.
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

/// `unet/config.json`: every argument of `UNet2DModel`, in the order in which diffusers writes them.
fn model_to_json(m: &Model) -> Value {
    let levels = 0..m.levels();
    let kind = |level: usize, with: &str, without: &str| {
        if m.attention_at(level) { with.to_string() } else { without.to_string() }
    };
    let down: Vec<String> = levels.clone().map(|l| kind(l, "AttnDownBlock2D", "DownBlock2D")).collect();
    let up: Vec<String> = levels.rev().map(|l| kind(l, "AttnUpBlock2D", "UpBlock2D")).collect();
    let Size { h, w } = m.image_size;
    json!({
        "_class_name": "UNet2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "add_attention": true,
        "attention_head_dim": if m.head_dim == 0 { Value::Null } else { json!(m.head_dim) },
        "attn_norm_num_groups": null,
        "block_out_channels": m.widths,
        "center_input_sample": false,
        "class_embed_type": null,
        "down_block_types": down,
        "downsample_padding": m.downsample_padding,
        "downsample_type": "conv",
        "dropout": m.dropout,
        "flip_sin_to_cos": m.flip_sin_to_cos,
        "freq_shift": m.freq_shift,
        "in_channels": m.channels,
        "layers_per_block": m.blocks_per_level,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2D",
        "norm_eps": m.norm_eps,
        "norm_num_groups": m.groups,
        "num_class_embeds": if m.classes == 0 { Value::Null } else { json!(m.classes) },
        "num_train_timesteps": null,
        "out_channels": m.channels,
        "resnet_time_scale_shift": "default",
        "sample_size": if h == w { json!(h) } else { json!([h, w]) },
        "time_embedding_dim": null,
        "time_embedding_type": "positional",
        "up_block_types": up,
        "upsample_type": "conv",
    })
}

/// `scheduler/scheduler_config.json`: every argument of `DDPMScheduler`.
fn diffusion_to_json(d: &Diffusion) -> Result<Value> {
    let (start, end) = Kind::default_betas(d.timesteps);
    // diffusers has no constant schedule, but takes any betas.
    let trained = match d.schedule.diffusers_name() {
        Some(_) => Value::Null,
        None => json!(Schedule::new(d.schedule, d.timesteps)?.betas()),
    };
    Ok(json!({
        "_class_name": "DDPMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_end": end,
        "beta_schedule": d.schedule.diffusers_name().unwrap_or("linear"),
        "beta_start": start,
        "clip_sample": true,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "num_train_timesteps": d.timesteps,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": false,
        "sample_max_value": 1.0,
        "steps_offset": 0,
        "thresholding": false,
        "timestep_spacing": "leading",
        "trained_betas": trained,
        "variance_type": d.variance.name(),
    }))
}

/// A configuration of diffusers, read key by key; a key that is absent has the default of the class there.
struct Json<'a>(&'a Map<String, Value>);

type Sentence<T> = std::result::Result<T, String>;

impl Json<'_> {
    /// Refuses any value of `key` but `accepted`.
    fn only(&self, key: &str, default: Value, accepted: &[Value]) -> Sentence<()> {
        let (value, whence) = self.0.get(key).map_or((&default, " (the default of diffusers)"), |v| (v, ""));
        let equal = |a: &Value| a == value || (a.is_number() && a.as_f64() == value.as_f64());
        if accepted.iter().any(equal) {
            return Ok(());
        }
        let accepted: Vec<String> = accepted.iter().map(Value::to_string).collect();
        Err(format!("has {key} = {value}{whence}; only {} is supported", accepted.join(" or ")))
    }

    /// Refuses any value of `key` but the default.
    fn only_default(&self, key: &str, default: Value) -> Sentence<()> {
        self.only(key, default.clone(), &[default])
    }

    fn number(&self, key: &str, default: f64) -> Sentence<f64> {
        match self.0.get(key) {
            None => Ok(default),
            Some(v) => v.as_f64().ok_or_else(|| format!("has {key} = {v}; a number is expected")),
        }
    }

    fn boolean(&self, key: &str, default: bool) -> Sentence<bool> {
        match self.0.get(key) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| format!("has {key} = {v}; true or false is expected")),
        }
    }

    fn count(&self, key: &str, default: usize) -> Sentence<usize> {
        match self.0.get(key) {
            None => Ok(default),
            Some(v) => count(v).ok_or_else(|| format!("has {key} = {v}; a whole number is expected")),
        }
    }

    /// `null` is 0.
    fn count_or_null(&self, key: &str, default: usize) -> Sentence<usize> {
        if self.0.get(key) == Some(&Value::Null) { Ok(0) } else { self.count(key, default) }
    }

    fn list<T>(&self, key: &str, element: impl Fn(&Value) -> Option<T>) -> Sentence<Vec<T>> {
        let value = self.0.get(key).unwrap_or(&Value::Null);
        let list = value.as_array().and_then(|l| l.iter().map(element).collect::<Option<Vec<T>>>());
        list.ok_or_else(|| format!("has {key} = {value}; a list is expected, one entry a level"))
    }

    /// Refuses keys that nobody has looked at, unless they are private to diffusers or switched off.
    fn refuse_unknown(&self, known: &[&str]) -> Sentence<()> {
        let off = |v: &Value| v.is_null() || *v == json!(false);
        match self.0.iter().find(|(k, v)| !k.starts_with('_') && !known.contains(&k.as_str()) && !off(v)) {
            None => Ok(()),
            Some((key, value)) => Err(format!("has {key} = {value}, which is not known here")),
        }
    }
}

fn count(value: &Value) -> Option<usize> {
    value.as_u64().filter(|&n| n <= u64::from(u32::MAX)).map(|n| n as usize)
}

/// The network that a `config.json` of `UNet2DModel` describes. Defaults are that class's.
fn model_from_json(json: &Map<String, Value>) -> Sentence<Model> {
    let c = Json(json);
    c.only("_class_name", Value::Null, &[json!("UNet2DModel")])?;
    c.only_default("center_input_sample", json!(false))?;
    c.only_default("time_embedding_type", json!("positional"))?;
    c.only_default("mid_block_type", json!("UNetMidBlock2D"))?;
    c.only_default("mid_block_scale_factor", json!(1))?;
    c.only_default("downsample_type", json!("conv"))?;
    c.only_default("upsample_type", json!("conv"))?;
    c.only("act_fn", json!("silu"), &[json!("silu"), json!("swish")])?;
    c.only_default("resnet_time_scale_shift", json!("default"))?;
    c.only_default("add_attention", json!(true))?;
    c.only_default("class_embed_type", Value::Null)?;

    let widths = c.list("block_out_channels", count)?;
    let groups = c.count("norm_num_groups", 32)?;
    let channels = c.count("in_channels", 3)?;
    c.only("attn_norm_num_groups", Value::Null, &[Value::Null, json!(groups)])?;
    c.only("time_embedding_dim", Value::Null, &[Value::Null, json!(4 * widths.first().copied().unwrap_or(0))])?;
    c.only("out_channels", json!(3), &[json!(channels)])?;
    let image_size = match json.get("sample_size") {
        Some(Value::Array(sides)) if sides.len() == 2 => sides[0].as_u64().zip(sides[1].as_u64()),
        Some(side) => side.as_u64().map(|s| (s, s)),
        None => None,
    };
    let image_size = image_size.filter(|&(h, w)| (1..=65_536).contains(&h) && (1..=65_536).contains(&w));
    let Some((h, w)) = image_size else {
        let value = json.get("sample_size").unwrap_or(&Value::Null);
        return Err(format!("has sample_size = {value}; the side of the images or [rows, columns] is expected"));
    };
    let image_size = Size { h: h as usize, w: w as usize };

    let block = |with: &str, without: &str, v: &Value| match v.as_str() {
        Some(name) if name == with => Ok(true),
        Some(name) if name == without => Ok(false),
        _ => Err(format!("has a block of type {v}; only {without} and {with} are supported")),
    };
    let types = |key: &str, with: &str, without: &str| -> Sentence<Vec<bool>> {
        let names = c.list(key, |v| Some(v.clone()))?;
        if names.len() != widths.len() {
            return Err(format!("has {} {key} for {} block_out_channels", names.len(), widths.len()));
        }
        names.iter().map(|v| block(with, without, v)).collect()
    };
    let down = types("down_block_types", "AttnDownBlock2D", "DownBlock2D")?;
    let up = types("up_block_types", "AttnUpBlock2D", "UpBlock2D")?;
    if !down.iter().eq(up.iter().rev()) {
        return Err("has attention at other levels on the way up (up_block_types) than down (down_block_types), which is not supported".into());
    }
    c.refuse_unknown(&KNOWN_MODEL_KEYS)?;
    let side = |level: usize| image_size.longer().checked_shr(level as u32).unwrap_or(0);
    Ok(Model {
        image_size,
        channels,
        blocks_per_level: c.count("layers_per_block", 2)?,
        attention_resolutions: (0..widths.len()).filter(|&l| down[l]).map(side).collect(),
        // null is one head; absent is 8, which is diffusers' default and few people's wish.
        head_dim: c.count_or_null("attention_head_dim", 8)?,
        widths,
        groups,
        norm_eps: c.number("norm_eps", 1e-5)?,
        dropout: c.number("dropout", 0.0)?,
        classes: c.count_or_null("num_class_embeds", 0)?,
        downsample_padding: c.count("downsample_padding", 1)?,
        freq_shift: c.count("freq_shift", 0)?,
        flip_sin_to_cos: c.boolean("flip_sin_to_cos", true)?,
    })
}

const KNOWN_MODEL_KEYS: [&str; 28] = [
    "act_fn",
    "add_attention",
    "attention_head_dim",
    "attn_norm_num_groups",
    "block_out_channels",
    "center_input_sample",
    "class_embed_type",
    "down_block_types",
    "downsample_padding",
    "downsample_type",
    "dropout",
    "flip_sin_to_cos",
    "freq_shift",
    "in_channels",
    "layers_per_block",
    "mid_block_scale_factor",
    "mid_block_type",
    "norm_eps",
    "norm_num_groups",
    "num_class_embeds",
    "num_train_timesteps",
    "out_channels",
    "resnet_time_scale_shift",
    "sample_size",
    "time_embedding_dim",
    "time_embedding_type",
    "up_block_types",
    "upsample_type",
];

/// The process that a `scheduler_config.json` of any of diffusers' discrete schedulers describes: its betas, its variance, that it
/// predicts noise and clips x_0. How such a scheduler would step is not taken over; `--sampler` says that.
fn diffusion_from_json(json: &Map<String, Value>) -> Sentence<Diffusion> {
    let c = Json(json);
    c.only_default("prediction_type", json!("epsilon"))?;
    c.only_default("clip_sample", json!(true))?;
    c.only_default("clip_sample_range", json!(1.0))?;
    c.only_default("thresholding", json!(false))?;
    c.only_default("rescale_betas_zero_snr", json!(false))?;
    let timesteps = c.count("num_train_timesteps", 1000)?;
    let diffusion = |schedule| -> Sentence<Diffusion> {
        let variance = json.get("variance_type").unwrap_or(&Value::Null);
        let variance = match variance.as_str() {
            // Schedulers other than DDPM's have no such key; DDPM's default is the small one.
            None if variance.is_null() => Variance::FixedSmall,
            Some("fixed_small" | "fixed_small_log") => Variance::FixedSmall,
            Some("fixed_large") => Variance::FixedLarge,
            _ => {
                return Err(format!(
                    "has variance_type = {variance}; only \"fixed_small\" and \"fixed_large\" are supported"
                ));
            }
        };
        Ok(Diffusion { schedule, timesteps, variance })
    };
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b;
    let (start, end) = Kind::default_betas(timesteps.max(1));

    if json.get("trained_betas").is_some_and(|v| !v.is_null()) {
        let betas = c.list("trained_betas", Value::as_f64)?;
        if betas.len() != timesteps || !betas.iter().all(|&b| close(b, end)) {
            return Err(format!(
                "has trained_betas; only {timesteps} times {end} (the constant schedule) is supported"
            ));
        }
        return diffusion(Kind::Constant);
    }
    let name = json.get("beta_schedule").unwrap_or(&Value::Null);
    let name = if name.is_null() { "linear" } else { name.as_str().unwrap_or_default() };
    let Some(kind) = Kind::ALL.into_iter().find(|k| k.diffusers_name() == Some(name)) else {
        let known: Vec<&str> = Kind::ALL.into_iter().filter_map(Kind::diffusers_name).collect();
        return Err(format!("has beta_schedule = \"{name}\"; one of {} is supported", known.join(", ")));
    };
    if kind != Kind::Cosine {
        for (key, default, want) in [("beta_start", 1e-4, start), ("beta_end", 0.02, end)] {
            let value = c.number(key, default)?;
            if !close(value, want) {
                return Err(format!("has {key} = {value}; for {timesteps} timesteps only {want} is supported"));
            }
        }
    }
    diffusion(kind)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))
}

fn read_json(path: &Path) -> Result<Map<String, Value>> {
    let bytes = read(path)?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::file(path, "is no JSON object")),
        Err(e) => Err(Error::file(path, format!("is not JSON: {e}"))),
    }
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = format!("{value:#}\n");
    fs::write(path, text).map_err(|e| Error::file(path, format!("cannot be written: {e}")))
}
