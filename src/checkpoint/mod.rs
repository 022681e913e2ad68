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
//!     timestep_sampling.safetensors                 the losses by which timesteps are drawn, if they are
//!     schedule.safetensors                          a learned schedule: its curve, moving average and Adam's moments
//!     run.json                                      the settings and the data that the numbers follow from
//! ```
//!
//! A classifier's checkpoint has classifier/ in place of unet/, with the same files, and no model_index.json, since no
//! pipeline of diffusers has such a network:
//!
//! ```text
//!     classifier/config.json                        the network; keys of UNet2DModel, its way down
//!     classifier/diffusion_pytorch_model.safetensors
//!     scheduler/scheduler_config.json               the process whose x_t it tells apart
//! ```
//!
//! Of a learned schedule the moving average is written as `trained_betas` of scheduler_config.json: that table is what
//! every command but training reads.
//!
//! A checkpoint is written under a temporary name beside the others, synced and renamed; only then are old ones
//! deleted. So the last good checkpoint survives a power failure at any moment. [`newest`] skips incomplete folders.
//!
//! This file saves, finds and deletes checkpoints; `tensors` has the files of tensors, `torch` and `pickle` those of
//! PyTorch, `diffusers` the configurations, `openai` the U-Nets of improved- and guided-diffusion, `origin` run.json.
//! A diffusers model whose configuration asks for something this network does not have is refused, naming the key;
//! nothing is silently ignored. What a file declares is compared with the file and with memory before anything is
//! allocated for it. A pickle is read, never executed.

mod diffusers;
mod openai;
mod origin;
mod tensors;
mod torch;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value, json};

pub use diffusers::{Stepping, Threshold};
pub use origin::{DataMark, Origin};
pub use tensors::read_weights;

use crate::config::{Config, Diffusion, Preset};
use crate::device::Device;
use crate::diffusion::{Curve, Importance, Kind, Prediction, Spacing, Variance};
use crate::error::{Error, Result, printable};
use crate::memory::available_memory;
use crate::output::{self, UNFINISHED};
use crate::params::{Init, Layout, Params, Specs};
use crate::tensor::{Shape, Tensor};
use crate::text::GIB;
use crate::unet::UNet;
use diffusers::{AUTOENCODERS, foreign_part};
use tensors::{TensorFile, write_tensors};

const MODEL_INDEX: &str = "model_index.json";
const UNET_CONFIG: &str = "unet/config.json";
const UNET_WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";
const CLASSIFIER_CONFIG: &str = "classifier/config.json";
const CLASSIFIER_WEIGHTS: &str = "classifier/diffusion_pytorch_model.safetensors";
const SCHEDULER_CONFIG: &str = "scheduler/scheduler_config.json";
const TRAINING_STATE: &str = "training_state.safetensors";
const TIMESTEP_SAMPLING: &str = "timestep_sampling.safetensors";
const SCHEDULE: &str = "schedule.safetensors";

/// The state of a run at one step, to be saved.
pub struct State<'a> {
    /// Steps done.
    pub step: u32,
    /// The weights.
    pub params: &'a Params,
    /// Their moving average, flat like the parameters.
    pub ema: &'a Tensor,
    /// Adam's first moments, alike.
    pub m: &'a Tensor,
    /// Adam's second moments, alike.
    pub v: &'a Tensor,
    /// What it was trained on, if that is known.
    pub data: Option<&'a DataMark>,
    /// The losses by which timesteps are drawn, if they are.
    pub importance: Option<&'a Importance>,
    /// The noise schedule, if it is learned.
    pub curve: Option<&'a Curve>,
}

/// The same, to be filled from a checkpoint.
pub struct StateMut<'a> {
    /// Steps done.
    pub step: &'a mut u32,
    /// The weights.
    pub params: &'a mut Params,
    /// The elements of the flat parameters that the next three are of: all, or a shard.
    pub shard: Range<usize>,
    /// The weights' moving average.
    pub ema: &'a mut Tensor,
    /// Adam's first moments.
    pub m: &'a mut Tensor,
    /// Adam's second moments.
    pub v: &'a mut Tensor,
    /// The losses by which timesteps are drawn, if they are.
    pub importance: Option<&'a mut Importance>,
    /// The noise schedule, if it is learned.
    pub curve: Option<&'a mut Curve>,
}

/// A model to sample from or to evaluate.
pub struct Loaded {
    /// Network, names of the classes and diffusion process from the model's files; the rest from the run's
    /// `config.toml` if the model belongs to a run, otherwise from the preset `cifar10`.
    pub config: Config,
    /// The moving average of the weights.
    pub params: Params,
    /// What the model's scheduler says of sampling.
    pub stepping: Stepping,
    /// Sentences for the user, without a period: what was assumed, and what was chosen among several files.
    pub notes: Vec<String>,
}

/// A model by its configuration files alone.
pub struct Description {
    /// As in [`Loaded`].
    pub config: Config,
    /// As in [`Loaded`].
    pub stepping: Stepping,
    /// As in [`Loaded`].
    pub notes: Vec<String>,
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
    let path = of_step(run, state.step);
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

/// Where the checkpoint of a step is.
pub(crate) fn of_step(run: &Path, step: u32) -> PathBuf {
    run.join("checkpoints").join(step.to_string())
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
    let specs = state.params.specs().clone();
    let mut file = TensorFile::open(&path)?.fitting(&specs, &["weights.", "adam_m.", "adam_v."])?;
    let step = file.metadata("step").and_then(|step| step.parse().ok());
    *state.step = step.ok_or_else(|| Error::file(&path, "does not say in its metadata which step it is of"))?;
    let mut flat = vec![0.0; specs.flat_len()];
    file.read_into("weights.", &specs, &mut flat)?;
    state.params.write(&flat)?;
    for (prefix, moments) in [("adam_m.", state.m), ("adam_v.", state.v)] {
        file.read_into(prefix, &specs, &mut flat)?;
        moments.write(&flat[state.shard.clone()])?;
    }
    if let Some(importance) = state.importance {
        restore_importance(&checkpoint.join(TIMESTEP_SAMPLING), importance)?;
    }
    if let Some(curve) = state.curve {
        restore_curve(&checkpoint.join(SCHEDULE), curve)?;
    }
    let is_classifier = checkpoint.join(CLASSIFIER_CONFIG).is_file();
    let weights = checkpoint.join(if is_classifier { CLASSIFIER_WEIGHTS } else { UNET_WEIGHTS });
    TensorFile::of_weights(&weights)?.fitting(&specs, &[""])?.read_into("", &specs, &mut flat)?;
    state.ema.write(&flat[state.shard])
}

/// The tensors of [`TIMESTEP_SAMPLING`].
fn specs_of_importance(importance: &Importance) -> Specs {
    let mut specs = Specs::default();
    let names = ["losses", "counts", "pending.timesteps", "pending.losses"];
    for (name, numbers) in names.into_iter().zip(importance.to_numbers()) {
        specs.add(name.into(), Shape::vector(numbers.len()), Layout::Vector, Init::Zeros);
    }
    specs
}

fn write_importance(path: &Path, importance: &Importance) -> Result<()> {
    let specs = specs_of_importance(importance);
    let mut flat = vec![0.0; specs.flat_len()];
    for ((p, _), numbers) in specs.iter().zip(importance.to_numbers()) {
        flat[specs.range(p)].copy_from_slice(&numbers);
    }
    write_tensors(path, ("format", "pt"), &specs, &[("", &flat)])
}

fn restore_importance(path: &Path, importance: &mut Importance) -> Result<()> {
    let specs = specs_of_importance(importance);
    let mut flat = vec![0.0; specs.flat_len()];
    TensorFile::open(path)?.fitting(&specs, &[""])?.read_into("", &specs, &mut flat)?;
    let places: Vec<_> = specs.iter().map(|(p, _)| specs.range(p)).collect();
    let numbers = [0, 1, 2, 3].map(|k| &flat[places[k].clone()]);
    importance.set_numbers(numbers).map_err(|what| Error::file(path, what))
}

/// The tensors of [`SCHEDULE`], each as long as the curve has parameters.
fn specs_of_curve(curve: &Curve) -> Specs {
    let mut specs = Specs::default();
    for (name, numbers) in ["theta", "average", "adam_m", "adam_v"].into_iter().zip(curve.state()) {
        specs.add(name.into(), Shape::vector(numbers.len()), Layout::Vector, Init::Zeros);
    }
    specs
}

fn write_curve(path: &Path, curve: &Curve) -> Result<()> {
    let specs = specs_of_curve(curve);
    let mut flat = vec![0.0; specs.flat_len()];
    for ((p, _), numbers) in specs.iter().zip(curve.state()) {
        flat[specs.range(p)].copy_from_slice(numbers);
    }
    write_tensors(path, ("format", "pt"), &specs, &[("", &flat)])
}

fn restore_curve(path: &Path, curve: &mut Curve) -> Result<()> {
    let specs = specs_of_curve(curve);
    let mut flat = vec![0.0; specs.flat_len()];
    TensorFile::open(path)?.fitting(&specs, &[""])?.read_into("", &specs, &mut flat)?;
    let places: Vec<_> = specs.iter().map(|(p, _)| specs.range(p)).collect();
    let state = [0, 1, 2, 3].map(|k| &flat[places[k].clone()]);
    curve.set_state(state).map_err(|what| Error::file(path, what))
}

/// Opens a run folder (its newest checkpoint), a checkpoint, a diffusers model folder, with or without `unet/`, or a
/// `.pt` file of OpenAI's.
///
/// # Errors
/// `Error::File` for a folder that holds no model, a damaged one, or one that this network cannot represent;
/// `Error::Failed` for one that memory does not hold.
pub fn load(device: &Device, path: &Path) -> Result<Loaded> {
    load_with(device, path, &[])
}

/// [`load`] with flags of OpenAI's as `FLAG=VALUE`, for a `.pt` file.
///
/// # Errors
/// As [`load`], and `Error::Usage` for a flag that cannot be read or that this model does not take.
pub fn load_with(device: &Device, path: &Path, flags: &[String]) -> Result<Loaded> {
    if is_weights(path) {
        let openai::Found { config, file, notes } = openai::open(path, flags)?;
        return read(device, path, Description { config, stepping: Stepping::FOREIGN, notes }, file);
    }
    let place = Place::find(path)?;
    refuse_flags(path, flags)?;
    load_from(device, path, place)
}

/// Opens a run folder of a classifier (its newest checkpoint), a checkpoint of one, or a folder with `classifier/`.
///
/// # Errors
/// `Error::File` for a folder that holds no classifier or a damaged one; `Error::Failed` for one that memory does not
/// hold.
pub fn load_classifier(device: &Device, path: &Path) -> Result<Loaded> {
    load_from(device, path, Place::find_classifier(path)?)
}

fn load_from(device: &Device, path: &Path, place: Place) -> Result<Loaded> {
    let mut described = place.describe()?;
    let (file, note) = place.weights()?;
    described.notes.extend(note);
    read(device, path, described, file)
}

/// Reads the weights of what is described, from `file`.
fn read(device: &Device, path: &Path, described: Description, file: TensorFile) -> Result<Loaded> {
    let Description { config, stepping, notes } = described;
    let (_, specs) = UNet::new(&config.model)?;
    let mut file = file.fitting(&specs, &[""])?;
    // On the host twice while it is read.
    let (needed, available) = (2 * 4 * specs.flat_len() as u64, available_memory().unwrap_or(u64::MAX));
    if needed > available {
        return Err(Error::Failed(format!(
            "{}: reading this model takes {:.2} GiB of memory and {:.2} GiB are available",
            path.display(),
            needed as f64 / GIB,
            available as f64 / GIB
        )));
    }
    let mut params = Params::zeros(device, specs)?;
    file.read_params(&mut params)?;
    Ok(Loaded { config, params, stepping, notes })
}

/// Reads the configuration files of what [`load`] opens, and no weights.
///
/// # Errors
/// `Error::File` as in [`load`].
pub fn describe(path: &Path) -> Result<Description> {
    describe_with(path, &[])
}

/// [`describe`] with flags of OpenAI's as `FLAG=VALUE`, for a `.pt` file.
///
/// # Errors
/// As [`load_with`].
pub fn describe_with(path: &Path, flags: &[String]) -> Result<Description> {
    if is_weights(path) {
        let openai::Found { config, notes, .. } = openai::open(path, flags)?;
        return Ok(Description { config, stepping: Stepping::FOREIGN, notes });
    }
    let place = Place::find(path)?;
    refuse_flags(path, flags)?;
    place.describe()
}

/// Whether a path is a file of weights: PyTorch's by its name or its first bytes.
fn is_weights(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    let start = || {
        let mut start = Vec::new();
        let file = fs::File::open(path);
        file.is_ok_and(|file| file.take(8).read_to_end(&mut start).is_ok()) && torch::is_torch(&start)
    };
    path.is_file() && (["pt", "pth"].contains(&ending) || start())
}

/// Refuses OpenAI's flags for a model that says itself what it is.
fn refuse_flags(path: &Path, flags: &[String]) -> Result<()> {
    match flags.first() {
        None => Ok(()),
        Some(flag) => Err(Error::Usage(format!(
            "--set {flag}: {} says itself what it is; flags are for OpenAI's .pt files",
            path.display()
        ))),
    }
}

/// What a folder that [`write_folder`] makes is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum For {
    /// diffusers opens it and computes the same.
    Diffusers,
    /// This program opens it; diffusers refuses it if it cannot compute the same.
    Ours,
}

/// Writes a model folder of diffusers, without the state of a training. `config.model`, `config.diffusion` and
/// `config.class_names` are taken.
///
/// # Errors
/// `Error::Failed` for a model that diffusers has no words for, if it is for diffusers; `Error::File` for a folder that
/// is not empty or cannot be written.
pub fn write_folder(path: &Path, config: &Config, params: &Params, stepping: &Stepping, whose: For) -> Result<()> {
    if whose == For::Diffusers
        && let Some(what) = diffusers::beyond_diffusers(&config.model)
            .or_else(|| diffusers::process_beyond_diffusers(&config.diffusion, stepping))
    {
        return Err(Error::Failed(format!(
            "{}: diffusers has no words for {what}; --to ours writes a folder that this program opens",
            path.display()
        )));
    }
    if path.exists() && fs::read_dir(path).map_or(true, |mut entries| entries.next().is_some()) {
        return Err(Error::file(path, "is not an empty folder; give a new or an empty one"));
    }
    let flat = params.host()?;
    output::write_folder_atomically(path, |folder| write_model(folder, config, (params.specs(), &*flat), stepping))
}

/// Writes a `.pt` file as OpenAI's scripts save it, with their flags beside it. Returns sentences for the user, without
/// a period.
///
/// # Errors
/// `Error::Failed` for a model that OpenAI's code cannot say; `Error::File` for what cannot be written.
pub fn write_openai(path: &Path, config: &Config, params: &Params, stepping: &Stepping) -> Result<Vec<String>> {
    openai::write(path, config, params, stepping)
}

/// Where a model's files are.
struct Place {
    /// The run it belongs to.
    run: Option<PathBuf>,
    /// The folder with the U-Net's `config.json` and weights.
    unet: PathBuf,
    /// `scheduler_config.json`.
    scheduler: Option<PathBuf>,
    /// Whether this program wrote it, to resume from.
    resumable: bool,
    /// Whether a classifier is wanted, not a network that predicts noise.
    classifier: bool,
    /// What was found by looking further.
    notes: Vec<String>,
}

/// Said of a classifier where a model is expected.
const DRAWS_NOTHING: &str = "is a classifier, which draws no images; a model is expected";

/// The name of a scheduler's configuration.
const SCHEDULER: &str = "scheduler_config.json";

impl Place {
    fn find(path: &Path) -> Result<Place> {
        const WANTED: &str = "a run folder, a checkpoint or a model folder of diffusers is expected";
        if !path.is_dir() {
            if path.exists() {
                return Err(Error::file(path, format!("is a file; {WANTED}")));
            }
            let what = match name_on_the_hub(path) {
                None => format!("does not exist; {WANTED}"),
                Some(name) => format!(
                    "does not exist; if it is a name on the Hugging Face hub, download it with `hf download {name} --local-dir {folder}` and give --model {folder}",
                    folder = name.rsplit('/').next().unwrap_or(name)
                ),
            };
            return Err(Error::file(path, what));
        }
        let has = |name: &str| path.join(name).is_file();
        if path.join("checkpoints").is_dir() && has("config.toml") {
            let Some(newest) = newest(path)? else {
                return Err(Error::file(path, "has no complete checkpoint yet"));
            };
            return Ok(Place { run: Some(path.to_path_buf()), ..Place::find(&newest)? });
        }
        if path.join("snapshots").is_dir() {
            return Place::find(&only_snapshot(path)?);
        }
        if has(CLASSIFIER_CONFIG) {
            return Err(Error::file(path, DRAWS_NOTHING));
        }
        check_images(path)?;
        // As diffusers' training scripts save them; the pipeline has the moving average as unet.
        let networks: Vec<&str> =
            ["unet", "unet_ema"].into_iter().filter(|n| has(&format!("{n}/config.json"))).collect();
        if let Some(&unet) = networks.first() {
            let (scheduler, mut notes) = scheduler_near(path, &["scheduler", ".", "../scheduler"]);
            if networks.len() > 1 {
                let ema = path.join("unet_ema");
                notes.push(format!(
                    "{}: unet is taken; the moving average of its weights is {}",
                    path.display(),
                    ema.display()
                ));
            }
            let resumable = has(TRAINING_STATE);
            let (run, unet) = (run_of(path), path.join(unet));
            return Ok(Place { run, unet, scheduler, resumable, classifier: false, notes });
        }
        if has("config.json") {
            let own_name = path.canonicalize().ok().and_then(|p| p.file_name()?.to_str().map(String::from));
            if own_name.is_some_and(|name| name.starts_with("unet")) {
                check_images(&path.join(".."))?;
            }
            let (scheduler, notes) = scheduler_near(path, &[".", "../scheduler", "../../scheduler"]);
            let resumable = path.join("..").join(TRAINING_STATE).is_file();
            let unet = path.to_path_buf();
            return Ok(Place { run: None, unet, scheduler, resumable, classifier: false, notes });
        }
        let what = match checkpoint_of_diffusers(path) {
            Some(newest) => format!("holds checkpoints of a training; give one of them, such as {}", newest.display()),
            None => format!(
                "is no run folder, checkpoint or model folder of diffusers: it holds neither checkpoints/, {UNET_CONFIG} nor config.json"
            ),
        };
        Err(Error::file(path, what))
    }

    fn find_classifier(path: &Path) -> Result<Place> {
        let has = |name: &str| path.join(name).is_file();
        if path.join("checkpoints").is_dir() && has("config.toml") {
            let Some(newest) = newest(path)? else {
                return Err(Error::file(path, "has no complete checkpoint yet"));
            };
            return Ok(Place { run: Some(path.to_path_buf()), ..Place::find_classifier(&newest)? });
        }
        if !has(CLASSIFIER_CONFIG) {
            let what = match path.exists() {
                false => "does not exist; a run of ddpm-cuda train-classifier is expected",
                true => "holds no classifier; a run of ddpm-cuda train-classifier is expected",
            };
            return Err(Error::file(path, what));
        }
        let (scheduler, notes) = scheduler_near(path, &["scheduler"]);
        let (run, unet) = (run_of(path), path.join("classifier"));
        Ok(Place { run, unet, scheduler, resumable: has(TRAINING_STATE), classifier: true, notes })
    }

    fn describe(&self) -> Result<Description> {
        let mut config = match &self.run {
            Some(run) => Config::read(&run.join("config.toml"))?,
            None => Config::preset(Preset::Cifar10),
        };
        let file = self.unet.join("config.json");
        let (model, class_names) = diffusers::read_model(&read_json(&file)?).map_err(|e| Error::file(&file, e))?;
        let unfit = |e: Error| Error::file(&file, format!("describes a network that cannot be built: {e}"));
        model.validate().map_err(unfit)?;
        if model.classifier != self.classifier {
            let not = "describes a network that predicts noise; a classifier of train-classifier is expected";
            return Err(Error::file(&file, if self.classifier { not } else { DRAWS_NOTHING }));
        }
        config.model = model;
        if !class_names.is_empty() {
            config.class_names = class_names;
        }
        let mut notes = self.notes.clone();
        let mut stepping;
        (config.diffusion, stepping) = match &self.scheduler {
            Some(file) => {
                let json = read_json(file)?;
                let read = diffusers::read_diffusion(&json).map_err(|e| Error::file(file, e))?;
                if json.get("_class_name").is_none_or(Value::is_null) {
                    notes.push(format!("{}: names no class; DDPMScheduler is assumed", file.display()));
                }
                notes.extend(diffusers::steps_not_taken(&json).map(|what| format!("{}: {what}", file.display())));
                let unfit = |e: Error| Error::file(file, format!("describes a process that cannot be: {e}"));
                let fits = if self.classifier { read.0.validate_process() } else { read.0.validate() };
                fits.map_err(unfit)?;
                if read.0.variance.is_learned() != config.model.learned_variance {
                    let outputs = config.model.out_channels();
                    let variance = json.get("variance_type").and_then(Value::as_str).unwrap_or("fixed_small");
                    let what = format!(
                        "has variance_type = {variance}, but the network has {outputs} out_channels for {} in_channels; a learned variance takes twice as many, and no other does",
                        config.model.channels
                    );
                    return Err(Error::file(file, what));
                }
                read
            }
            None => {
                notes.push(format!(
                    "{}: there is no {SCHEDULER} with it; the process is assumed to be that of DDPMScheduler's defaults, linear betas from 0.0001 to 0.02 over 1000 timesteps{}",
                    self.unet.display(),
                    if config.model.learned_variance { ", with variance_type learned_range" } else { "" }
                ));
                let mut process = defaults_of_diffusers();
                if config.model.learned_variance {
                    process.variance = Variance::LearnedRange;
                }
                (process, Stepping::FOREIGN)
            }
        };
        // This program once wrote `leading` and drew evenly all the same. What such a checkpoint drew it still draws.
        if self.resumable && stepping.spacing == Spacing::Leading {
            stepping = Stepping { spacing: Spacing::Even, steps_offset: 0, ..stepping };
        }
        // And it once said `fixed_large` alone.
        stepping.small_if_fewer |= self.resumable;
        let notes = notes.iter().map(|note| printable(note)).collect();
        Ok(Description { config, stepping, notes })
    }

    /// The weights, and a note if they are not those of the usual name.
    fn weights(&self) -> Result<(TensorFile, Option<String>)> {
        let (file, note) = match self.choose_weights()? {
            Weights::Single(name) => (TensorFile::of_weights(&self.unet.join(&name))?, name),
            Weights::Shards(name) => {
                let path = self.unet.join(&name);
                let index = read_json(&path)?;
                let Some(Value::Object(weight_map)) = index.get("weight_map") else {
                    return Err(Error::file(&path, "has no weight_map, which says which shard holds which tensor"));
                };
                (TensorFile::of_shards(&path, weight_map)?, name)
            }
        };
        let usual =
            [WEIGHTS, "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.fp16.safetensors"];
        let note = (!usual.contains(&note.as_str()))
            .then(|| format!("the weights are taken from {}", self.unet.join(note).display()));
        Ok((file, note))
    }

    /// The file of the weights: without a variant if there is one, else the only variant or, of several, fp16.
    fn choose_weights(&self) -> Result<Weights> {
        let unreadable = |e: io::Error| Error::file(&self.unet, format!("cannot be read: {e}"));
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.unet).map_err(unreadable)? {
            names.extend(entry.map_err(unreadable)?.file_name().into_string());
        }
        names.sort();
        // PyTorch's own files only where there is no other: diffusers prefers safetensors too.
        let mut found: BTreeMap<String, Vec<Weights>> = BTreeMap::new();
        for ending in [".safetensors", ".bin"] {
            if !found.is_empty() {
                break;
            }
            for name in &names {
                let Some(rest) = name.strip_prefix("diffusion_pytorch_model") else { continue };
                let is_shard = rest.contains("-of-");
                if let Some(variant) = rest.strip_suffix(ending).filter(|_| !is_shard) {
                    found.entry(variant.into()).or_default().push(Weights::Single(name.clone()));
                } else if rest.contains(ending) && rest.contains(".index") && rest.ends_with(".json") {
                    let variant = rest.replacen(ending, "", 1).replacen(".index", "", 1).replacen(".json", "", 1);
                    found.entry(variant).or_default().push(Weights::Shards(name.clone()));
                }
            }
        }
        let variants: Vec<String> = found.keys().cloned().collect();
        let chosen = match (&variants[..], found.remove("").or_else(|| found.remove(".fp16"))) {
            (_, Some(chosen)) => Some(chosen),
            ([only], None) => found.remove(only),
            (_, None) => None,
        };
        match chosen.as_deref() {
            Some([one]) => return Ok(one.clone()),
            Some(_) => {
                let what = "holds its weights twice, as one file and as an index of shards; take out the older";
                return Err(Error::file(&self.unet, what));
            }
            None => {}
        }
        let what = if variants.len() > 1 {
            format!(
                "holds several variants of its weights ({}) and none is called {WEIGHTS}; give one that name",
                variants.join(", ")
            )
        } else if let Some(shard) = names.iter().find(|n| n.contains("-of-") && n.ends_with(".safetensors")) {
            format!("holds the shard {shard} and no diffusion_pytorch_model.safetensors.index.json; download that too")
        } else if let Some(shard) = names.iter().find(|n| n.contains("-of-") && n.ends_with(".bin")) {
            format!("holds the shard {shard} and no diffusion_pytorch_model.bin.index.json; download that too")
        } else {
            format!("holds no {WEIGHTS}")
        };
        Err(Error::file(&self.unet, what))
    }
}

/// The run that a checkpoint RUN/checkpoints/STEP belongs to, if it does. A path from inside `checkpoints` does not
/// name the run.
fn run_of(checkpoint: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(checkpoint).ok()?;
    let run = path.ancestors().nth(2).filter(|run| path.starts_with(run.join("checkpoints")));
    run.filter(|run| run.join("config.toml").is_file()).map(Path::to_path_buf)
}

const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

/// The file to read weights from.
#[derive(Clone)]
enum Weights {
    Single(String),
    /// The index of the shards.
    Shards(String),
}

/// The process of a `DDPMScheduler` without arguments.
fn defaults_of_diffusers() -> Diffusion {
    Diffusion {
        schedule: Kind::Linear,
        timesteps: 1000,
        beta_start: 0.0,
        beta_end: 0.0,
        trained_betas: Vec::new(),
        zero_snr: false,
        prediction: Prediction::Eps,
        variance: Variance::FixedSmall,
    }
}

/// The first `scheduler_config.json` in these folders in, beside or above a network, with a note if it is not in the
/// folder that was given.
fn scheduler_near(path: &Path, folders: &[&str]) -> (Option<PathBuf>, Vec<String>) {
    let file = |folder: &&str| path.join(folder).join(SCHEDULER);
    let Some(folder) = folders.iter().find(|folder| file(folder).is_file()) else { return (None, Vec::new()) };
    let file = file(folder);
    let notes = match folder.starts_with("..") {
        true => vec![format!("the process is taken from {}", file.canonicalize().unwrap_or(file.clone()).display())],
        false => Vec::new(),
    };
    (Some(file), notes)
}

/// Refuses a pipeline whose network does not work on images alone.
fn check_images(folder: &Path) -> Result<()> {
    let index = folder.join(MODEL_INDEX);
    if index.is_file() {
        return diffusers::check_pipeline(&read_json(&index)?).map_err(|e| Error::file(&index, e));
    }
    match AUTOENCODERS.iter().find(|name| folder.join(name).join("config.json").is_file()) {
        None => Ok(()),
        Some(name) => Err(Error::file(folder.join(name), format!("lies beside the U-Net: {}", foreign_part(name)))),
    }
}

/// The only snapshot in a folder of the hub's cache, `models--OWNER--NAME`.
fn only_snapshot(path: &Path) -> Result<PathBuf> {
    let folder = path.join("snapshots");
    let entries = fs::read_dir(&folder).map_err(|e| Error::file(&folder, format!("cannot be read: {e}")))?;
    let mut snapshots: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.is_dir()).collect();
    snapshots.sort();
    match snapshots.len() {
        1 => Ok(snapshots.remove(0)),
        0 => Err(Error::file(path, "is a folder of the hub's cache without a snapshot; download the model again")),
        many => {
            let main = fs::read_to_string(path.join("refs/main")).map(|name| folder.join(name.trim())).ok();
            let newest = main.filter(|main| snapshots.contains(main)).unwrap_or(snapshots.swap_remove(0));
            Err(Error::file(path, format!("holds {many} snapshots; give one of them, such as {}", newest.display())))
        }
    }
}

/// The `checkpoint-N` of the largest N in the output folder of diffusers' training scripts.
fn checkpoint_of_diffusers(path: &Path) -> Option<PathBuf> {
    let numbered = |entry: io::Result<fs::DirEntry>| {
        let path = entry.ok()?.path();
        let number: u64 = path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse().ok()?;
        path.join(UNET_CONFIG).is_file().then_some((number, path))
    };
    Some(fs::read_dir(path).ok()?.filter_map(numbered).max()?.1)
}

/// `OWNER/NAME` if that is how a path reads, also in an address of the hub. A folder OWNER speaks against it.
fn name_on_the_hub(path: &Path) -> Option<&str> {
    let text = path.to_str()?;
    let address =
        ["https://huggingface.co/", "https://hf.co/", "hf://"].iter().find_map(|site| text.strip_prefix(site));
    let name = address.unwrap_or(text).trim_end_matches('/');
    let (owner, model) = name.split_once('/')?;
    let plain = |part: &str| {
        let mut letters = part.chars();
        letters.next().is_some_and(|c| c.is_ascii_alphanumeric())
            && letters.all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    (plain(owner) && plain(model) && !Path::new(owner).exists()).then_some(name)
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
    let has_tensors = |name: &str| tensors::is_whole(&checkpoint.join(name));
    let network = match checkpoint.join("classifier").is_dir() {
        true => has_json(CLASSIFIER_CONFIG) && has_tensors(CLASSIFIER_WEIGHTS),
        false => has_json(MODEL_INDEX) && has_json(UNET_CONFIG) && has_tensors(UNET_WEIGHTS),
    };
    let more = [TIMESTEP_SAMPLING, SCHEDULE].iter().all(|name| !checkpoint.join(name).exists() || has_tensors(name));
    network && more && has_json(SCHEDULER_CONFIG) && Origin::read(checkpoint).is_ok() && has_tensors(TRAINING_STATE)
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
    let mut model = config.clone();
    if let Some(curve) = state.curve {
        model.diffusion.trained_betas = curve.average().betas().to_vec();
        write_curve(&folder.join(SCHEDULE), curve)?;
    }
    write_model(folder, &model, (state.params.specs(), &*state.ema.host()?), &Stepping::OURS)?;
    Origin::new(config, state.data).write(folder)?;
    if let Some(importance) = state.importance {
        write_importance(&folder.join(TIMESTEP_SAMPLING), importance)?;
    }

    let specs = state.params.specs();
    let step = state.step.to_string();
    let (m, v, weights) = (state.m.host()?, state.v.host()?, state.params.host()?);
    let parts: [(&str, &[f32]); 3] = [("adam_m.", &m), ("adam_v.", &v), ("weights.", &weights)];
    write_tensors(&folder.join(TRAINING_STATE), ("step", &step), specs, &parts)
}

/// Writes the files of a model folder of diffusers, with the weights `flat`.
fn write_model(folder: &Path, config: &Config, (specs, flat): (&Specs, &[f32]), stepping: &Stepping) -> Result<()> {
    let classifier = config.model.classifier;
    for sub in [if classifier { "classifier" } else { "unet" }, "scheduler"] {
        fs::create_dir(folder.join(sub))
            .map_err(|e| Error::file(folder.join(sub), format!("cannot be created: {e}")))?;
    }
    let index = json!({
        "_class_name": "DDPMPipeline",
        "_diffusers_version": diffusers::VERSION,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    });
    let network = diffusers::UNet2DModel::of(&config.model, &config.class_names);
    if classifier {
        write_json(&folder.join(CLASSIFIER_CONFIG), &network)?;
    } else {
        write_json(&folder.join(MODEL_INDEX), &index)?;
        write_json(&folder.join(UNET_CONFIG), &network)?;
    }
    write_json(&folder.join(SCHEDULER_CONFIG), &diffusers::DDPMScheduler::of(&config.diffusion, stepping)?)?;
    // transformers and diffusers look for this entry.
    let weights = folder.join(if classifier { CLASSIFIER_WEIGHTS } else { UNET_WEIGHTS });
    write_tensors(&weights, ("format", "pt"), specs, &[("", flat)])
}

/// The longest configuration that is read: a million betas have 26 MB.
const LONGEST_JSON: u64 = 32 << 20;

/// And the largest number of commas in it. A value takes many times its text once it is parsed.
const MOST_COMMAS: usize = 1_100_000;

fn read_json(path: &Path) -> Result<Map<String, Value>> {
    let failed = |e: io::Error| Error::file(path, format!("cannot be read: {e}"));
    let len = fs::metadata(path).map_err(failed)?.len();
    if len > LONGEST_JSON {
        return Err(Error::file(path, format!("has {len} bytes; no configuration has more than {LONGEST_JSON}")));
    }
    let text = fs::read(path).map_err(failed)?;
    let commas = text.iter().filter(|&&byte| byte == b',').count();
    if commas > MOST_COMMAS {
        return Err(Error::file(path, format!("holds some {commas} values; no configuration has more than a million")));
    }
    match serde_json::from_slice(&text) {
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
