//! Checkpoints are diffusers model folders (`DDPMPipeline.from_pretrained` opens them) plus one file to resume from;
//! `--model` also opens folders written by diffusers.
//!
//! ```text
//! RUN/checkpoints/STEP/
//!     model_index.json                              the classes of pipeline, scheduler and network
//!     unet/config.json                              the network; its keys are those of UNet2DModel
//!     unet/diffusion_pytorch_model.safetensors      the moving average of the weights, f32, OIHW
//!     scheduler/scheduler_config.json               schedule and variance
//!     training_state.safetensors                    weights.NAME, adam_m.NAME, adam_v.NAME; metadata: step
//!     run.json                                      the settings and the data that the numbers follow from
//! ```
//!
//! A checkpoint is written under a temporary name beside the others, synced and renamed; only then are old ones
//! deleted. So the last good checkpoint survives a power failure at any moment. [`newest`] skips incomplete folders.
//!
//! This file saves, finds and deletes checkpoints; `tensors` has the safetensors files, `diffusers` the configurations,
//! `origin` run.json.
//! A diffusers model whose configuration asks for something this network does not have is refused, naming the key;
//! nothing is silently ignored. Deliberately absent: pickled weights (`.bin`, `.pt`), sharded files.

mod diffusers;
mod origin;
mod tensors;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value, json};

pub use origin::{DataMark, Origin};
pub use tensors::read_weights;

use crate::config::{Config, Diffusion, Preset};
use crate::device::Device;
use crate::diffusion::{Kind, Variance};
use crate::error::{Error, Result};
use crate::output::{self, UNFINISHED};
use crate::params::Params;
use crate::tensor::Tensor;
use crate::unet::UNet;
use tensors::{TensorFile, write_tensors};

const MODEL_INDEX: &str = "model_index.json";
const UNET_CONFIG: &str = "unet/config.json";
const UNET_WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";
const SCHEDULER_CONFIG: &str = "scheduler/scheduler_config.json";
const TRAINING_STATE: &str = "training_state.safetensors";

/// The state of a run at one step, to be saved.
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
    /// What it was trained on, if that is known.
    pub data: Option<&'a DataMark>,
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
    /// Network and diffusion process from the model's files; the rest from the run's `config.toml` if the model belongs
    /// to a run, otherwise from the preset `cifar10`.
    pub config: Config,
    /// The moving average of the weights.
    pub params: Params,
}

/// Writes `run/checkpoints/STEP` and deletes all but the newest `config.keep_checkpoints`. Returns the folder.
///
/// A complete checkpoint of that step is left as it is: a run is a function of its settings, so it holds the same
/// numbers.
///
/// # Errors
/// `Error::File` if something cannot be written or deleted.
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

/// The newest complete checkpoint of a run, if there is one.
///
/// # Errors
/// `Error::File` if the folder of the checkpoints cannot be read.
pub fn newest(run: &Path) -> Result<Option<PathBuf>> {
    Ok(complete(run)?.pop_last().map(|(_, path)| path))
}

/// Fills a training state from a checkpoint.
///
/// # Errors
/// `Error::File` for a damaged checkpoint or one of another network.
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
    let step = tensors::metadata(&bytes, "step").and_then(|step| step.parse().ok());
    *state.step = step.ok_or_else(|| Error::file(&path, "does not say in its metadata which step it is of"))?;
    read_weights(&checkpoint.join(UNET_WEIGHTS), state.ema)
}

/// Opens a run folder (its newest checkpoint), a checkpoint, or a diffusers model folder, with or without `unet/`.
///
/// # Errors
/// `Error::File` for a folder that holds no model, a damaged one, or one that this network cannot represent.
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
        config.model = diffusers::read_model(&read_json(&file)?).map_err(|e| Error::file(&file, e))?;
        let unfit = |e: Error| Error::file(&file, format!("describes a network that cannot be built: {e}"));
        config.model.validate().map_err(unfit)?;
        config.diffusion = match &self.scheduler {
            Some(file) => diffusers::read_diffusion(&read_json(file)?).map_err(|e| Error::file(file, e))?,
            // A U-Net without a scheduler: the defaults of diffusers' DDPMScheduler.
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

/// Folders of a run named like checkpoints but incomplete, oldest first. They were damaged later, since saving leaves
/// none.
///
/// # Errors
/// `Error::File` if the folder of the checkpoints cannot be read.
pub fn damaged(run: &Path) -> Result<Vec<PathBuf>> {
    Ok(by_step(run)?.into_values().filter(|path| !is_complete(path)).collect())
}

/// Complete checkpoints of a run by step.
fn complete(run: &Path) -> Result<BTreeMap<u32, PathBuf>> {
    Ok(by_step(run)?.into_iter().filter(|(_, path)| is_complete(path)).collect())
}

/// Everything in a run's `checkpoints` that is named like a checkpoint, by step.
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

/// True if all files exist, the configurations are JSON objects and the tensor files have the length that their headers
/// say.
fn is_complete(checkpoint: &Path) -> bool {
    let has_json = |name: &str| read_json(&checkpoint.join(name)).is_ok();
    let has_tensors = |name: &str| tensors::is_whole(&checkpoint.join(name)).unwrap_or(false);
    [MODEL_INDEX, UNET_CONFIG, SCHEDULER_CONFIG].into_iter().all(has_json)
        && Origin::read(checkpoint).is_ok()
        && [UNET_WEIGHTS, TRAINING_STATE].into_iter().all(has_tensors)
}

/// Deletes a checkpoint. It is renamed first, so that a half-deleted one never has the name of a checkpoint.
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
        "_diffusers_version": diffusers::VERSION,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    });
    write_json(&folder.join(MODEL_INDEX), &index)?;
    write_json(&folder.join(UNET_CONFIG), &diffusers::UNet2DModel::of(&config.model))?;
    write_json(&folder.join(SCHEDULER_CONFIG), &diffusers::DDPMScheduler::of(&config.diffusion)?)?;
    Origin::new(config, state.data).write(folder)?;

    let specs = state.params.specs();
    // transformers and diffusers look for this entry.
    write_tensors(&folder.join(UNET_WEIGHTS), ("format", "pt"), specs, &[("", &state.ema.host()?)])?;
    let step = state.step.to_string();
    let (m, v, weights) = (state.m.host()?, state.v.host()?, state.params.host()?);
    let parts: [(&str, &[f32]); 3] = [("adam_m.", &m), ("adam_v.", &v), ("weights.", &weights)];
    write_tensors(&folder.join(TRAINING_STATE), ("step", &step), specs, &parts)
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

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::file(path, format!("cannot be written: {e}"));
    let text = serde_json::to_string_pretty(value).map_err(|e| failed(&e))?;
    fs::write(path, text + "\n").map_err(|e| failed(&e))
}
