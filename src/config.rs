//! Everything needed to repeat a run: presets, `--set KEY=VALUE`, `config.toml`.
//!
//! One table ([`SETTINGS`], made by the `settings!` macro below) lists every setting once, with its field in [`Config`]
//! and a line of help. The command line, the file reader and the file writer all use it, so they cannot disagree.
//! Values are spelled alike in all of them: lists as `32,64,64`, sizes as `32` or `28x20` (rows x columns). A file may
//! also hold a list as a TOML array.
//!
//! Sources of a setting, later ones win: the preset, the file of `--config`, `--set`, then flags such as `--steps`,
//! which the command line adds as further assignments.
//!
//! Which settings somebody chose, and which a preset filled in, is kept beside them ([`Given`]): a recipe may adapt the
//! latter to the data, never the former.
//!
//! Deliberately absent: what does not change the numbers of a run (the output folder, the device, progress output), and
//! the recipe for data of one's own, which needs the data ([`crate::recipe`]).

mod betas;
mod others;

pub use others::no_flag;

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use crate::device::Precision;
use crate::diffusion::objective::{Loss, Objective};
use crate::diffusion::{Kind, Prediction, Sampling, Schedule, Variance};
use crate::error::{Error, Result};
use crate::names::{self, Named, names};
use crate::tape::Recompute;
use crate::usage;

/// A network and training recipe to start from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// 28x28 grey digits; the data is built in; trains in minutes on two cores.
    Mnist,
    /// The paper's CIFAR-10 network, 35,746,307 parameters.
    Cifar10,
    /// The paper's 256x256 network, 113,673,219 parameters.
    CelebaHq256,
    /// What suits the data and the device; [`crate::recipe`] fills it in when the data is known.
    Auto,
}

names!(Preset { Mnist = "mnist", Cifar10 = "cifar10", CelebaHq256 = "celebahq256", Auto = "auto" });

/// Rows and columns of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
}

impl Size {
    /// The size of the data, filled in when the data is loaded.
    pub const DATA: Size = Size { h: 0, w: 0 };

    /// A square.
    pub const fn square(side: usize) -> Self {
        Size { h: side, w: side }
    }

    /// Rows times columns.
    pub const fn pixels(self) -> usize {
        self.h * self.w
    }

    /// The longer side, by which `attention_resolutions` names levels.
    pub fn longer(self) -> usize {
        self.h.max(self.w)
    }
}

/// The colour behind transparent images, red, green and blue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Background(pub [u8; 3]);

impl Background {
    const NAMES: [(&str, Background); 4] = [
        ("white", Background([255; 3])),
        ("black", Background([0; 3])),
        ("grey", Background([128; 3])),
        ("gray", Background([128; 3])),
    ];

    /// True if it is no colour, so that grey images over it stay grey.
    pub fn is_grey(self) -> bool {
        self.0 == [self.0[0]; 3]
    }
}

/// How the image is halved and doubled between levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resampling {
    /// By a convolution (the paper).
    Conv,
    /// In a residual block, both of whose branches average 2x2 pixels or repeat each (OpenAI's `resblock_updown`).
    Resnet,
}

// The names of diffusers' `downsample_type` and `upsample_type`.
names!(Resampling { Conv = "conv", Resnet = "resnet" });

/// The attention between the middle's two residual blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MiddleAttention {
    /// With a group norm before it (the paper).
    Norm,
    /// Without one: what diffusers makes of `resnet_time_scale_shift: scale_shift` without `attn_norm_num_groups`.
    Bare,
    /// None.
    None,
}

names!(MiddleAttention { Norm = "norm", Bare = "bare", None = "none" });

/// How a class becomes time features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClassEmbedding {
    /// A row of a table for each class.
    Table,
    /// The class's number, embedded as a timestep is.
    Timestep,
}

names!(ClassEmbedding { Table = "table", Timestep = "timestep" });

/// The network.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// Size of the images; [`Size::DATA`] until the data is known.
    pub image_size: Size,
    /// Channels of the images, in and out; 0 until the data is known.
    pub channels: usize,
    /// Channels of each level, finest first; each next level has half the rows and columns.
    pub widths: Vec<usize>,
    /// Residual blocks per level on the way down; one more on the way up.
    pub blocks_per_level: usize,
    /// Levels with self-attention after each block, named by their longer side in pixels. The middle has its own
    /// setting.
    pub attention_resolutions: Vec<usize>,
    /// The middle's attention.
    pub middle_attention: MiddleAttention,
    /// Channels per attention head; 0: one head over all channels, or as many as `num_heads` says.
    pub head_dim: usize,
    /// Heads of every attention, whatever its channels; 0: as `head_dim` says.
    pub num_heads: usize,
    /// Groups of every group normalisation.
    pub groups: usize,
    /// Groups of the normalisation before the middle's attention; 0: as many as all others have.
    pub middle_groups: usize,
    /// Epsilon of every group normalisation.
    pub norm_eps: f64,
    /// Whether the time features scale and shift the second normalisation's output in each residual block (OpenAI's
    /// `use_scale_shift_norm`) instead of being added before it (the paper).
    pub scale_shift_norm: bool,
    /// How the image is halved between levels.
    pub downsample_type: Resampling,
    /// How it is doubled.
    pub upsample_type: Resampling,
    /// Dropout probability in the residual blocks, in [0, 1).
    pub dropout: f64,
    /// Classes to condition on, of a classifier those that it tells apart; 0: none.
    pub classes: usize,
    /// How a class enters the network.
    pub class_embedding: ClassEmbedding,
    /// Whether the table of classes has one row more, for images without a class: what classifier-free guidance needs.
    /// No setting: it follows from `label_dropout`, or comes from a model and stays in `config.toml`.
    pub null_class: bool,
    /// Whether the network puts out a second half of channels, for the variance. No setting: it follows from
    /// `variance`.
    pub learned_variance: bool,
    /// The way down and the middle alone, with the classes' logits as output. No setting: the command that trains
    /// classifiers sets it, and it stays in `config.toml`.
    pub classifier: bool,
    /// Padding of the 3x3 convolutions of stride 2: 0 pads right and bottom only (the paper), 1 all four sides.
    pub downsample_padding: usize,
    /// freq_k = 10000^(-k / (dim/2 - freq_shift)): 1 is the paper's time embedding, 0 OpenAI's.
    pub freq_shift: usize,
    /// Time embedding [sin, cos] (false, the paper) or [cos, sin] (true, OpenAI).
    pub flip_sin_to_cos: bool,
    /// Sines and cosines of the time embedding, a quarter of the time features; 0: as many as `widths` starts with.
    pub time_channels: usize,
    /// Factor of the timestep within the network: 1000 / T is OpenAI's `rescale_timesteps`.
    pub timestep_scale: f64,
}

/// The forward process, and how the network's output makes the reverse process.
#[derive(Clone, Debug, PartialEq)]
pub struct Diffusion {
    /// Shape of the noise schedule.
    pub schedule: Kind,
    /// T, number of diffusion steps, at least 2.
    pub timesteps: usize,
    /// beta of the first timestep, in (0, 1); 0: [`Kind::default_betas`]. Not for the cosine and constant schedules and
    /// a learned one.
    pub beta_start: f64,
    /// beta of the last timestep, in (0, 1); 0: [`Kind::default_betas`]. Not for the cosine schedule and a learned one.
    pub beta_end: f64,
    /// beta of every timestep, each in (0, 1), of a model that has them one by one; then `schedule` and its end values
    /// have no meaning. Empty: they follow from these. No setting: it comes from a model or from `betas=FILE.npy` and
    /// stays in `config.toml`.
    pub trained_betas: Vec<f64>,
    /// Whether the betas are rescaled to zero terminal SNR ([`Schedule::with_zero_terminal_snr`]).
    pub zero_snr: bool,
    /// What the network predicts.
    pub prediction: Prediction,
    /// Variance of ancestral sampling.
    pub variance: Variance,
}

/// What becomes of an image that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnBadImage {
    /// It is an error.
    Stop,
    /// It is left out, and listed.
    Skip,
}

names!(OnBadImage { Stop = "stop", Skip = "skip" });

/// All settings of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The preset that the other settings started from.
    pub preset: Preset,
    /// The model whose weights the run started from, an absolute path; empty: from random ones.
    pub init: String,
    /// The names of the classes, in the order of their numbers; empty: not known. No setting: it comes from the data
    /// and stays in `config.toml`.
    pub class_names: Vec<String>,
    /// `mnist` or a path; empty: not given.
    pub data: String,
    /// Fraction of the images held out where the data has no test set of its own, in [0, 0.5].
    pub held_out: f64,
    /// The colour that images with transparency are laid over.
    pub background: Background,
    /// What becomes of images that cannot be used.
    pub on_bad_image: OnBadImage,
    /// The network.
    pub model: Model,
    /// The diffusion process.
    pub diffusion: Diffusion,
    /// What a step minimises.
    pub loss: Loss,
    /// Weight of L_vlb in [`Loss::Hybrid`], above 0.
    pub vlb_weight: f64,
    /// gamma of [`Loss::MinSnr`], above 0.
    pub min_snr_gamma: f64,
    /// How a step draws its timesteps.
    pub timestep_sampling: Sampling,
    /// Share of the labels that are replaced by the null class, in [0, 1): for classifier-free guidance.
    pub label_dropout: f64,
    /// Type of activations and their gradients, and what is multiplied.
    pub precision: Precision,
    /// Seed of all randomness.
    pub seed: u64,
    /// Training steps.
    pub steps: u32,
    /// Images per step.
    pub batch: usize,
    /// Micro-batches of equal size that a batch is split into, to save memory, and for devices to share. The result is
    /// the same but for rounding, and to the bit whichever device computes which.
    pub accumulate: usize,
    /// What the backward pass computes again, to save memory. The result is the same to the bit.
    pub recompute: Recompute,
    /// Adam's step size after the warm-up.
    pub learning_rate: f64,
    /// Steps over which the step size rises linearly.
    pub warmup_steps: u32,
    /// Share of the steps, at the end, over which the step size falls linearly to next to 0, in [0, 1].
    pub cooldown: f64,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// Norm that the gradient is clipped to; 0: no clipping.
    pub grad_clip: f64,
    /// Decay of the moving average of the weights, in [0, 1).
    pub ema_decay: f64,
    /// Mirror each training image left to right with probability 1/2.
    pub flip: bool,
    /// Steps between lines of `metrics.jsonl`.
    pub log_every: u32,
    /// Steps between validation losses; 0: never.
    pub validate_every: u32,
    /// Steps between sample grids, with one more at the end; 0: none.
    pub sample_every: u32,
    /// Steps between checkpoints, with one more at the end; 0: only at the end.
    pub checkpoint_every: u32,
    /// Number of newest checkpoints to keep; 0: all.
    pub keep_checkpoints: usize,
}

/// The keys of the settings that somebody chose, on the command line or in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// Those that a file chose.
    file: BTreeSet<&'static str>,
    /// Those of the command line, of a model or of the data, which have the last word.
    others: BTreeSet<&'static str>,
}

impl Given {
    /// Every setting: nothing is adapted.
    pub fn all() -> Self {
        Given { file: BTreeSet::new(), others: SETTINGS.iter().map(|s| s.key).collect() }
    }

    /// Whether this setting was chosen.
    pub fn has(&self, key: &str) -> bool {
        self.file.contains(key) || self.others.contains(key)
    }

    /// Whether a file chose settings that the file of a run holds and a file of a few settings does not.
    pub fn has_file_of_run(&self) -> bool {
        OF_EVERY_RUN.iter().all(|key| self.file.contains(key))
    }

    /// Forgets that a file chose these settings.
    pub fn forget_file(&mut self, keys: &[&str]) {
        self.file.retain(|key| !keys.contains(key));
    }

    /// Notes that a setting was chosen.
    pub fn add(&mut self, key: &'static str) {
        self.others.insert(key);
        if key == FILE_OF_BETAS {
            // The file says how many.
            self.others.insert("timesteps");
        }
    }
}

/// One setting: its name, a line of help, and how to read and write it as text.
pub struct Setting {
    /// The key of `--set` and `config.toml`.
    pub key: &'static str,
    /// One line of help.
    pub help: &'static str,
    /// The way to its field in [`Config`].
    path: &'static [&'static str],
    get: fn(&Config) -> toml::Value,
    copy: fn(&mut Config, &Config),
    set: fn(&mut Config, &str) -> std::result::Result<(), String>,
}

impl Setting {
    /// Whether it is of the network or of the diffusion process, not of the data or the training.
    pub fn is_of_model(&self) -> bool {
        ["model", "diffusion"].contains(&self.path[0])
    }
}

macro_rules! settings {
    ($($key:literal => $($field:ident).+, $help:literal;)*) => {
        /// Every setting, in the order in which files list them.
        pub const SETTINGS: &[Setting] = &[$(Setting {
            key: $key,
            help: $help,
            path: &[$(stringify!($field)),+],
            get: |c| c.$($field).+.write(),
            copy: |to, from| to.$($field).+.clone_from(&from.$($field).+),
            set: |c, text| {
                c.$($field).+ = Value::read(text)?;
                Ok(())
            },
        }),*];
    };
}

settings! {
    "data" => data, "mnist (built in), .ddpm, .npy, .npz, IDX, .zip, .tar, .parquet, CIFAR's folder, folder of images";
    "init" => init, "model whose weights the run starts from, set by --init; empty: random weights";
    "held_out" => held_out, "share of the images kept for validation where the data has no test set of its own";
    "background" => background, "what transparent images are laid over: white, black, grey or #rrggbb";
    "on_bad_image" => on_bad_image, "an image that cannot be used ends the run (stop) or is left out and listed (skip)";
    "image_size" => model.image_size, "rows x columns; images of another size are cropped and resized; 0: as the data is";
    "channels" => model.channels, "1 grey, 3 colour; 0: as the data is";
    "widths" => model.widths, "channels of each level, finest first";
    "blocks_per_level" => model.blocks_per_level, "residual blocks of a level";
    "attention_resolutions" => model.attention_resolutions, "levels with self-attention, by the longer side in pixels";
    "middle_attention" => model.middle_attention, "in the middle: norm (the paper), bare (without its norm) or none";
    "head_dim" => model.head_dim, "channels of an attention head; 0: one head";
    "num_heads" => model.num_heads, "heads of every attention, in place of head_dim; 0: as head_dim says";
    "groups" => model.groups, "groups of the group normalisations";
    "middle_groups" => model.middle_groups, "groups of the norm before the middle's attention; 0: as groups";
    "norm_eps" => model.norm_eps, "epsilon of the group normalisations";
    "scale_shift_norm" => model.scale_shift_norm, "the timestep scales and shifts the second norm of a block (OpenAI)";
    "downsample_type" => model.downsample_type, "between levels: conv (the paper) or resnet, inside a residual block";
    "upsample_type" => model.upsample_type, "between levels: conv (the paper) or resnet, inside a residual block";
    "dropout" => model.dropout, "dropout in the residual blocks";
    "classes" => model.classes, "classes to condition on; 0: none";
    "class_embedding" => model.class_embedding, "table: a row for each class; timestep: its number, as a timestep";
    "downsample_padding" => model.downsample_padding, "0: right and bottom (the paper); 1: all sides";
    "freq_shift" => model.freq_shift, "time embedding: 1 the paper's frequencies, 0 OpenAI's";
    "flip_sin_to_cos" => model.flip_sin_to_cos, "time embedding: false [sin, cos] (the paper), true [cos, sin]";
    "time_channels" => model.time_channels, "time embedding: its length; 0: as many as widths starts with";
    "timestep_scale" => model.timestep_scale, "time embedding: factor of the timestep; 1000/T as OpenAI rescales";
    "schedule" => diffusion.schedule, "linear, cosine, quadratic, constant, sigmoid, or learned, trained with loss = vlb";
    "timesteps" => diffusion.timesteps, "T, steps of the diffusion process";
    "beta_start" => diffusion.beta_start, "first beta of the schedule; 0: the paper's for this T, 0.1/T";
    "beta_end" => diffusion.beta_end, "last beta of the schedule; 0: the paper's for this T, 20/T";
    "zero_snr" => diffusion.zero_snr, "rescale the betas so that nothing of an image is left at the last timestep";
    "prediction" => diffusion.prediction, "what the network puts out: eps, x0, v or mu";
    "variance" => diffusion.variance, "of ancestral sampling: fixed_small, fixed_large, learned or learned_range; over fewer steps than T fixed_large is fixed_small";
    "loss" => loss, "simple, vlb (the bound), hybrid (simple + vlb_weight vlb), min_snr or weighted (the paper's eq. 12)";
    "vlb_weight" => vlb_weight, "weight of the bound in bits per dimension in loss = hybrid";
    "min_snr_gamma" => min_snr_gamma, "gamma of loss = min_snr";
    "timestep_sampling" => timestep_sampling, "uniform, stratified (evenly over a batch) or importance (by the losses so far)";
    "label_dropout" => label_dropout, "share of the labels hidden from the network, for guidance without a classifier";
    "precision" => precision, "f32, or on a GPU tf32 (f32 in memory, products of 10 bits of fraction) or bf16 (activations and their gradients)";
    "seed" => seed, "seed of all randomness";
    "steps" => steps, "training steps";
    "batch" => batch, "images per step";
    "accumulate" => accumulate, "micro-batches that a batch is worked through in, to save memory or on several devices";
    "recompute" => recompute, "none, cheap (norms, dropout) or blocks again in the backward pass, to save memory";
    "learning_rate" => learning_rate, "Adam's step size";
    "warmup_steps" => warmup_steps, "steps over which the step size rises from 0";
    "cooldown" => cooldown, "share of the steps, at the end, over which the step size falls to 0; 0: it stays as it is";
    "weight_decay" => weight_decay, "AdamW's decoupled weight decay";
    "grad_clip" => grad_clip, "largest norm of the gradient; 0: no clipping";
    "ema_decay" => ema_decay, "decay of the moving average of the weights";
    "flip" => flip, "mirror half of the training images";
    "log_every" => log_every, "steps between lines of metrics.jsonl";
    "validate_every" => validate_every, "steps between validation losses; 0: never";
    "sample_every" => sample_every, "steps between sample grids, one at the end among them; 0: none";
    "checkpoint_every" => checkpoint_every, "steps between checkpoints; 0: only at the end";
    "keep_checkpoints" => keep_checkpoints, "newest checkpoints kept; 0: all";
}

/// Settings that the betas follow from.
pub const BETAS: [&str; 4] = ["schedule", "timesteps", "beta_start", "beta_end"];

/// Reads every beta, and their number, from a file. It is no setting: what it reads stays in `config.toml`, as
/// `trained_betas`.
pub const FILE_OF_BETAS: &str = "betas";

/// Settings that may change when a run is resumed: the numbers of the steps do not depend on them. `data` may name
/// another place, not other data, and `on_bad_image` leave out only what was left out before.
pub const MAY_CHANGE: [&str; 9] = [
    "data",
    "on_bad_image",
    "steps",
    "recompute",
    "log_every",
    "validate_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
];

/// Settings that a classifier of noised images does not have: what a network predicts, its loss, its way up, how it
/// sees classes, and the model that its weights start from.
pub const NOT_OF_CLASSIFIERS: [&str; 9] = [
    "prediction",
    "variance",
    "loss",
    "vlb_weight",
    "min_snr_gamma",
    "label_dropout",
    "class_embedding",
    "upsample_type",
    "init",
];

/// Settings of how a model was trained, which say nothing of how a classifier that guides it is.
pub const OF_A_MODELS_TRAINING: [&str; 8] = [
    "timestep_sampling",
    "steps",
    "learning_rate",
    "warmup_steps",
    "cooldown",
    "weight_decay",
    "ema_decay",
    "sample_every",
];

/// Settings that every `config.toml` of a run has, of any version of this program.
const OF_EVERY_RUN: [&str; 3] = ["image_size", "widths", "timesteps"];

/// Every setting with its value in the default preset, of a network or of a `classifier`, for `--help`.
pub fn help(classifier: bool) -> String {
    let mut text = String::from("Settings of --set and config.toml, with the values of --preset mnist:\n");
    let mut config = Config::preset(Preset::Mnist);
    if classifier {
        config = config.into_classifier();
    }
    let lacks = |key: &str| classifier && NOT_OF_CLASSIFIERS.contains(&key);
    for ((key, value), setting) in config.entries().zip(SETTINGS).filter(|((key, _), _)| !lacks(key)) {
        text += &format!("  {:<32} {}\n", format!("{key} = {value}"), setting.help);
    }
    let help = "one beta for each timestep, f32 or f64, in place of schedule, timesteps, beta_start and beta_end";
    text += &format!("  {:<32} {help}\n", format!("{FILE_OF_BETAS} = FILE.npy"));
    text
}

impl Preset {
    /// The preset for `data` if none is asked for: `mnist` for the digits or no data, `auto` for all other.
    fn of_data(data: &str) -> Self {
        if data.is_empty() || data == "mnist" { Preset::Mnist } else { Preset::Auto }
    }
}

impl Config {
    /// The settings of a preset.
    pub fn preset(preset: Preset) -> Self {
        match preset {
            Preset::Mnist => mnist(),
            Preset::Cifar10 => cifar10(),
            Preset::CelebaHq256 => celebahq256(),
            Preset::Auto => auto(),
        }
    }

    /// The same preset for a classifier of noised images. Weight decay as guided-diffusion has it, since classifiers
    /// learn their images by heart; half the steps, since they learn faster than networks that draw, and at one rate:
    /// the cool-down of `mnist` was tried for drawing alone.
    pub fn into_classifier(mut self) -> Self {
        self.model.classifier = true;
        self.weight_decay = 0.05;
        self.cooldown = 0.0;
        self.steps = (self.steps / 2).max(1);
        self.sample_every = 0;
        self
    }

    /// Preset, then the file of `--config`, then each `KEY=VALUE` of `--set`; and which settings file and `--set`
    /// chose. Without `preset` the preset is the file's own, and without that `mnist` for the built-in digits and
    /// [`Preset::Auto`] for other data. Call [`Config::validate`] afterwards.
    ///
    /// # Errors
    /// `Error::Usage` for an assignment, `Error::File` for a file that cannot be read or holds unusable settings.
    pub fn build(preset: Option<Preset>, file: Option<&Path>, sets: &[String]) -> Result<(Self, Given)> {
        let mut pairs = Vec::new();
        for assignment in sets {
            let (key, value) = pair(assignment)?;
            pairs.push((key, value, assignment));
        }
        let data = pairs.iter().rev().find(|(key, ..)| *key == "data").map(|(_, value, _)| *value);
        let (mut config, mut given) = match file {
            None => (Config::preset(preset.unwrap_or(Preset::of_data(data.unwrap_or_default()))), Given::default()),
            Some(path) => Config::read_over(path, preset, data)?,
        };
        // What is given beside a file of betas is compared with it, wherever it stands.
        pairs.sort_by_key(|(key, ..)| *key != FILE_OF_BETAS);
        let mut beside = Vec::new();
        for (key, value, assignment) in pairs {
            let key = config.set(key, value).map_err(|e| Error::Usage(format!("--set {assignment}: {e}")))?;
            beside.extend(BETAS.contains(&key).then_some(key));
            given.add(key);
        }
        config.check_beside_betas(&beside).map_err(|e| Error::Usage(format!("--set: {e}")))?;
        Ok((config, given))
    }

    /// Each `KEY=VALUE` of `--set` for a run that is resumed.
    ///
    /// # Errors
    /// `Error::Usage` for an unusable assignment and for a key that is not in [`MAY_CHANGE`].
    pub fn change(&mut self, sets: &[String]) -> Result<()> {
        for assignment in sets {
            let (key, value) = pair(assignment)?;
            let key = self.set(key, value).map_err(|e| Error::Usage(format!("--set {assignment}: {e}")))?;
            if !MAY_CHANGE.contains(&key) {
                usage!(
                    "--set {assignment}: a resumed run may change {} and nothing else; start a new run from its weights with --init",
                    MAY_CHANGE.join(", ")
                );
            }
        }
        Ok(())
    }

    /// Reads a `config.toml`. Does not validate it.
    ///
    /// # Errors
    /// `Error::File` for a file that cannot be read or holds unusable settings.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Config::read_over(path, None, None)?.0)
    }

    fn read_over(path: &Path, preset: Option<Preset>, data: Option<&str>) -> Result<(Self, Given)> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
        Config::from_toml(&text, preset, data).map_err(|e| Error::file(path, e))
    }

    /// Whether a text is a `config.toml` of this program, of any version of it: a few settings are enough.
    pub fn is_of_run(text: &str) -> bool {
        let table = text.parse::<toml::Table>();
        table.is_ok_and(|table| OF_EVERY_RUN.iter().all(|key| table.contains_key(*key)))
    }

    /// Settings from the text of a `config.toml`; a given `preset` replaces the text's own. `data` is what will replace
    /// its data.
    fn from_toml(text: &str, preset: Option<Preset>, data: Option<&str>) -> std::result::Result<(Self, Given), String> {
        let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
            // toml's own message is a drawing over several lines; one sentence is wanted.
            let line = e.span().map_or(0, |s| text[..s.start].matches('\n').count() + 1);
            format!("line {line} is not TOML ({}); settings are lines KEY = VALUE", e.message())
        })?;
        let own = match table.remove("preset") {
            None => None,
            Some(value) => Some(Preset::read(&spelling("preset", &value)?)?),
        };
        let class_names = list(&mut table, "class_names", "names", |value| value.as_str().map(String::from))?;
        let trained_betas = list(&mut table, "trained_betas", "numbers", toml::Value::as_float)?;
        if !trained_betas.is_empty() && table.contains_key(FILE_OF_BETAS) {
            return Err("has both trained_betas and betas; either gives every beta".into());
        }
        let null_class = match table.remove("null_class") {
            None => false,
            Some(value) => value.as_bool().ok_or("null_class is neither true nor false")?,
        };
        let classifier = match table.remove("classifier") {
            None => false,
            Some(value) => value.as_bool().ok_or_else(|| format!("classifier = {value} is neither true nor false"))?,
        };
        let data = data.or(table.get("data").and_then(toml::Value::as_str)).unwrap_or_default();
        let mut config = Config::preset(preset.or(own).unwrap_or(Preset::of_data(data)));
        let mut given = Given::default();
        if let Some(value) = table.remove(FILE_OF_BETAS) {
            given.add(config.set(FILE_OF_BETAS, &spelling(FILE_OF_BETAS, &value)?)?);
        }
        for (key, value) in &table {
            given.add(config.set(key, &spelling(key, value)?)?);
        }
        let beside: Vec<&str> = BETAS.into_iter().filter(|key| table.contains_key(*key)).collect();
        config.check_beside_betas(&beside)?;
        let given = Given { file: given.others, others: BTreeSet::new() };
        config.class_names = class_names;
        if !trained_betas.is_empty() {
            config.diffusion.trained_betas = trained_betas;
        }
        config.model.null_class |= null_class;
        config.model.classifier = classifier;
        Ok((config, given))
    }

    /// Sets one setting from text; returns its key.
    ///
    /// # Errors
    /// A sentence for an unknown key or a value that cannot be read.
    pub fn set(&mut self, key: &str, value: &str) -> std::result::Result<&'static str, String> {
        if key == FILE_OF_BETAS {
            let betas = betas::read(value).map_err(|e| format!("{key} = {value}: {e}"))?;
            // As of a model that has its betas one by one. A preset or a file may have had another schedule.
            self.diffusion = Diffusion {
                schedule: Kind::Linear,
                timesteps: betas.len(),
                beta_start: 0.0,
                beta_end: 0.0,
                trained_betas: betas,
                ..self.diffusion
            };
            return Ok(FILE_OF_BETAS);
        }
        let Some(setting) = SETTINGS.iter().find(|s| s.key == key) else { return Err(others::no_setting(key)) };
        (setting.set)(self, value).map_err(|e| format!("{key} = {value}: {e}"))?;
        if setting.key == "label_dropout" {
            self.model.null_class = false;
        }
        self.derive();
        Ok(setting.key)
    }

    /// Refuses settings of [`BETAS`], those with the keys `beside`, that make other betas than those given one by one.
    fn check_beside_betas(&self, beside: &[&str]) -> std::result::Result<(), String> {
        const BETAS_ARE_GIVEN: &str = "given one by one, as trained_betas or by betas=FILE.npy";
        let Diffusion { timesteps, trained_betas: betas, .. } = &self.diffusion;
        let (Some(first), Some(last)) = (betas.first(), betas.last()) else { return Ok(()) };
        if beside.contains(&"timesteps") && *timesteps != betas.len() {
            let count = betas.len();
            return Err(format!(
                "timesteps = {timesteps}, but {count} betas are {BETAS_ARE_GIVEN}; leave one of the two out"
            ));
        }
        // 0 stands for the schedule's own.
        let says = |(key, value): &(&str, String)| beside.contains(key) && *key != "timesteps" && value != "0.0";
        let said: Vec<String> = self.entries().filter(says).map(|(key, value)| format!("{key} = {value}")).collect();
        let named = Diffusion { trained_betas: Vec::new(), ..self.diffusion.clone() }.betas_as_given();
        // A file may hold them in f32.
        let same = |named: Schedule| named.betas().iter().zip(betas).all(|(a, b)| *a as f32 == *b as f32);
        if said.is_empty() || named.is_ok_and(same) {
            return Ok(());
        }
        let said = said.join(", ");
        Err(format!("{said}, but betas from {first:.3e} to {last:.3e} are {BETAS_ARE_GIVEN}; leave one of the two out"))
    }

    /// Name of the run's folder if none is asked for: that of the preset, or of the data for [`Preset::Auto`].
    pub fn run_name(&self) -> String {
        let path = Path::new(&self.data);
        let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
        let name = name.map(|name| name.to_string_lossy().trim_start_matches('.').to_string());
        let name = match name {
            Some(name) if self.preset == Preset::Auto && !name.is_empty() => name,
            _ => self.preset.to_string(),
        };
        if self.model.classifier { name + "-classifier" } else { name }
    }

    /// Refuses `KEY=VALUE` of `--set` whose setting is among `keys`, which `what` does not have.
    ///
    /// # Errors
    /// `Error::Usage`, with the first.
    pub fn refuse_sets(sets: &[String], keys: &[&str], what: &str) -> Result<()> {
        for assignment in sets {
            let (key, _) = pair(assignment)?;
            if keys.contains(&key) {
                usage!("--set {assignment}: {what} has no {key}, so leave it out");
            }
        }
        Ok(())
    }

    /// Refuses a setting that somebody chose and that the loss does not have. The file of a run holds every setting, so
    /// it chose none of them.
    ///
    /// # Errors
    /// `Error::Usage`, with the first.
    pub fn refuse_unused(&self, given: &Given) -> Result<()> {
        let chosen = |key: &str| given.others.contains(key) || given.file.contains(key) && !given.has_file_of_run();
        for (key, value, of) in
            [("vlb_weight", self.vlb_weight, Loss::Hybrid), ("min_snr_gamma", self.min_snr_gamma, Loss::MinSnr)]
        {
            if chosen(key) && self.loss != of {
                usage!("{key} = {value}: only loss = {of} has it and here loss = {}, so leave it out", self.loss);
            }
        }
        Ok(())
    }

    /// Takes every setting that is not `given` from `other`.
    pub fn fill(&mut self, given: &Given, other: &Config) {
        for setting in SETTINGS.iter().filter(|setting| !given.has(setting.key)) {
            (setting.copy)(self, other);
        }
        self.derive();
    }

    /// Fills in what follows from the settings.
    fn derive(&mut self) {
        self.model.learned_variance = self.diffusion.variance.is_learned();
        self.model.null_class |= self.label_dropout > 0.0;
    }

    /// What training minimises.
    ///
    /// # Errors
    /// `Error::Usage` for settings that cannot work together.
    pub fn objective(&self) -> Result<Objective> {
        let Diffusion { prediction, variance, .. } = self.diffusion;
        let objective = Objective::new(self.loss, prediction, variance, &self.diffusion.noise_schedule()?);
        let objective = objective.with_weights(self.vlb_weight, self.min_snr_gamma);
        objective.check()?;
        Ok(objective)
    }

    /// Key and value of every setting.
    pub fn values(&self) -> impl Iterator<Item = (&'static str, toml::Value)> {
        SETTINGS.iter().map(|s| (s.key, (s.get)(self)))
    }

    /// Key and value of every setting, spelled as in `config.toml`.
    pub fn entries(&self) -> impl Iterator<Item = (&'static str, String)> {
        self.values().map(|(key, value)| (key, value.to_string()))
    }

    /// The text of a `config.toml` that holds these settings, each with its help.
    pub fn to_toml(&self) -> String {
        let mut text = format!("preset = {}\n", self.preset.write());
        for ((key, value), setting) in self.entries().zip(SETTINGS) {
            text += &format!("{:<36} # {}\n", format!("{key} = {value}"), setting.help);
        }
        if !self.class_names.is_empty() {
            text += &format!("class_names = {}\n", toml::Value::from(self.class_names.clone()));
        }
        if !self.diffusion.trained_betas.is_empty() {
            text += &format!("trained_betas = {}\n", toml::Value::from(self.diffusion.trained_betas.clone()));
        }
        if self.model.null_class && self.label_dropout == 0.0 {
            text += "null_class = true\n";
        }
        if self.model.classifier {
            text += "classifier = true\n";
        }
        text
    }

    /// Refuses settings that cannot work. Checks that depend on the image size are skipped until it is known, so call
    /// this again after loading the data.
    ///
    /// # Errors
    /// `Error::Usage`, with the value and one that would work.
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        if self.model.classifier {
            self.diffusion.validate_process()?
        } else {
            self.diffusion.validate()?
        }
        self.objective()?;
        if self.diffusion.prediction == Prediction::Mu && self.precision == Precision::Bf16 {
            usage!(
                "prediction = mu with precision = bf16: a mean differs from x_t by less than bf16 rounds it at most timesteps; precision = f32 would do, or prediction = eps"
            );
        }
        if self.diffusion.schedule == Kind::Learned {
            self.validate_learned()?;
        }
        if self.model.classifier && self.timestep_sampling == Sampling::Importance {
            // Its weights would be left out of the loss, which would then favour the timesteps drawn most.
            usage!("timestep_sampling = importance: a classifier's loss has no weights; take uniform or stratified");
        }
        if !(0.0..1.0).contains(&self.label_dropout) {
            usage!("label_dropout = {} must be at least 0 and below 1; 0.1 is usual", self.label_dropout);
        }
        if self.label_dropout > 0.0 && self.model.classes == 0 {
            usage!(
                "label_dropout = {}: the network has no classes to leave out; set classes to their number",
                self.label_dropout
            );
        }
        if self.class_names.len() > self.model.classes {
            let (names, classes) = (self.class_names.len(), self.model.classes);
            usage!("class_names holds {names} names for classes = {classes}; one for each class is expected");
        }
        positive("steps", self.steps as usize)?;
        positive("batch", self.batch)?;
        positive("accumulate", self.accumulate)?;
        positive("log_every", self.log_every as usize)?;
        if !self.batch.is_multiple_of(self.accumulate) {
            usage!(
                "accumulate = {} does not divide batch = {}; the micro-batches must be equal, as with accumulate = {}",
                self.accumulate,
                self.batch,
                (1..self.accumulate).rev().take(1 << 20).find(|&a| self.batch.is_multiple_of(a)).unwrap_or(1)
            );
        }
        if self.learning_rate <= 0.0 {
            usage!("learning_rate = {} must be above 0; the paper has 0.0002", self.learning_rate);
        }
        if !(0.0..=1.0).contains(&self.cooldown) {
            usage!("cooldown = {} must be a share of the steps between 0 (none) and 1", self.cooldown);
        }
        if self.weight_decay < 0.0 {
            usage!("weight_decay = {} must be 0 (off) or above", self.weight_decay);
        }
        if self.grad_clip < 0.0 {
            usage!("grad_clip = {} must be 0 (off) or above; the paper has 1", self.grad_clip);
        }
        if !(0.0..1.0).contains(&self.ema_decay) {
            usage!("ema_decay = {} must be at least 0 and below 1; the paper has 0.9999", self.ema_decay);
        }
        if self.model.classifier && self.sample_every > 0 {
            usage!("sample_every = {}: a classifier draws no samples, so leave it at 0", self.sample_every);
        }
        if !(0.0..=0.5).contains(&self.held_out) {
            usage!("held_out = {} must be a share between 0 (no validation) and 0.5", self.held_out);
        }
        Ok(())
    }
}

impl Config {
    /// Refuses what a schedule cannot be learned with.
    fn validate_learned(&self) -> Result<()> {
        if self.model.classifier {
            usage!(
                "schedule = learned: a classifier learns none; give that of the model, by --set betas=RUN/betas.npy"
            );
        }
        if self.loss != Loss::Vlb {
            usage!(
                "schedule = learned with loss = {}: only the bound says which schedule is better, others are least where there is nothing to predict; loss = vlb trains it",
                self.loss
            );
        }
        if self.timestep_sampling == Sampling::Importance {
            usage!(
                "timestep_sampling = importance: with schedule = learned the last losses are those of other schedules; take stratified or uniform"
            );
        }
        Ok(())
    }
}

impl Model {
    /// Channels of the network's output: as many as the images have for the prediction, and as many for the variance if
    /// it is learned; a classifier's are its classes.
    pub fn out_channels(&self) -> usize {
        match (self.classifier, self.learned_variance) {
            (true, _) => self.classes,
            (false, true) => 2 * self.channels,
            (false, false) => self.channels,
        }
    }

    /// Rows of the table of classes; 0: the network is unconditional.
    pub fn class_rows(&self) -> usize {
        self.classes + usize::from(self.null_class)
    }

    /// Whether the network is given classes, as a classifier is not.
    pub fn is_conditional(&self) -> bool {
        self.classes > 0 && !self.classifier
    }

    /// Number of levels.
    pub fn levels(&self) -> usize {
        self.widths.len()
    }

    /// Size of the images at a level, 0 being the finest.
    pub fn size_at(&self, level: usize) -> Size {
        Size { h: self.image_size.h >> level, w: self.image_size.w >> level }
    }

    /// Whether the blocks of a level are followed by self-attention.
    pub fn attention_at(&self, level: usize) -> bool {
        self.attention_resolutions.contains(&self.size_at(level).longer())
    }

    /// Replaces each entry of `attention_resolutions` that is no level of this image size by the nearest level, or
    /// drops it if that is more than a factor of sqrt(2) away: the levels are finer or coarser than what was meant.
    /// True if something changed. For entries that a preset filled in; the image size must be known.
    pub fn adapt_attention(&mut self) -> bool {
        let sides: Vec<usize> = (0..self.levels()).map(|l| self.size_at(l).longer()).collect();
        let near = |r: &usize| {
            let ratio = |side: usize| (side as f64 / *r as f64).max(*r as f64 / side as f64);
            let nearest = sides.iter().copied().min_by(|&a, &b| ratio(a).total_cmp(&ratio(b)));
            nearest.filter(|&side| ratio(side) <= std::f64::consts::SQRT_2)
        };
        let mut adapted: Vec<usize> = self.attention_resolutions.iter().filter_map(near).collect();
        adapted.dedup();
        let changed = adapted != self.attention_resolutions;
        self.attention_resolutions = adapted;
        changed
    }

    /// Number of heads of an attention over `width` channels.
    pub fn heads(&self, width: usize) -> usize {
        match self.num_heads {
            0 => width.checked_div(self.head_dim).unwrap_or(1),
            heads => heads,
        }
    }

    /// Sines and cosines of the time embedding.
    pub fn time_channels(&self) -> usize {
        if self.time_channels == 0 { self.widths[0] } else { self.time_channels }
    }

    /// Groups of the normalisation before the middle's attention.
    pub fn middle_groups(&self) -> usize {
        if self.middle_groups == 0 { self.groups } else { self.middle_groups }
    }

    /// Refuses a network that cannot be built.
    ///
    /// # Errors
    /// `Error::Usage`, with the value and one that would work.
    pub fn validate(&self) -> Result<()> {
        if self.widths.is_empty() {
            usage!("widths is empty; give the channels of each level, as in widths=32,64,64");
        }
        if self.levels() > MOST_LEVELS {
            usage!("widths holds {} levels; no image can be halved more than {} times", self.levels(), MOST_LEVELS - 1);
        }
        positive("blocks_per_level", self.blocks_per_level)?;
        positive("groups", self.groups)?;
        // Larger than any network ever trained, and small enough that sizes in bytes do not overflow.
        at_most("blocks_per_level", self.blocks_per_level, 128)?;
        at_most("channels", self.channels, 65_536)?;
        at_most("groups", self.groups, 65_536)?;
        at_most("head_dim", self.head_dim, 65_536)?;
        at_most("num_heads", self.num_heads, 65_536)?;
        at_most("middle_groups", self.middle_groups, 65_536)?;
        at_most("time_channels", self.time_channels, 65_536)?;
        for &width in &self.widths {
            at_most("widths", width, 65_536)?;
        }
        for &width in &self.widths {
            positive("widths", width)?;
            if !width.is_multiple_of(self.groups) {
                let fits = (1..self.groups).rev().find(|&g| self.widths.iter().all(|w| w.is_multiple_of(g)));
                usage!(
                    "groups = {} does not divide the width {width}; groups = {} divides all of {}",
                    self.groups,
                    fits.unwrap_or(1),
                    join(&self.widths)
                );
            }
        }
        let unfit = |channels: usize| channels < 4 || channels % 2 == 1;
        if self.time_channels > 0 && unfit(self.time_channels) {
            usage!("time_channels = {} must be even and at least 4, or 0", self.time_channels);
        }
        if self.time_channels == 0 && unfit(self.widths[0]) {
            usage!(
                "widths starts with {}; the first is the length of the time embedding too, so it must be even and at least 4",
                self.widths[0]
            );
        }
        let last = self.widths[self.levels() - 1];
        if !last.is_multiple_of(self.middle_groups()) {
            usage!(
                "middle_groups = {} does not divide the width {last} of the middle; {} would",
                self.middle_groups,
                (1..self.middle_groups).rev().find(|&g| last.is_multiple_of(g)).unwrap_or(1)
            );
        }
        if self.head_dim > 0 && self.num_heads > 0 {
            usage!(
                "head_dim = {} and num_heads = {} exclude each other; leave one at 0",
                self.head_dim,
                self.num_heads
            );
        }
        if self.class_embedding == ClassEmbedding::Timestep && self.classes == 0 {
            usage!("class_embedding = timestep: there are no classes; give their number, as in classes=10");
        }
        if self.timestep_scale <= 0.0 || !self.timestep_scale.is_finite() {
            usage!("timestep_scale = {} must be above 0; 1 leaves timesteps as they are", self.timestep_scale);
        }
        if self.classifier && self.classes == 1 {
            usage!("classes = 1: a classifier tells two classes or more apart");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            usage!("dropout = {} must be at least 0 and below 1", self.dropout);
        }
        // It is used as f32.
        let norm_eps = self.norm_eps as f32; // as the kernels have it
        if norm_eps <= 0.0 || !norm_eps.is_finite() {
            usage!("norm_eps = {:?} must be above 0 and within f32; the paper's code has 1e-6", self.norm_eps);
        }
        if self.downsample_padding > 1 {
            usage!("downsample_padding = {} must be 0 (right and bottom) or 1 (all sides)", self.downsample_padding);
        }
        if self.freq_shift > 1 {
            usage!("freq_shift = {} must be 0 or 1", self.freq_shift);
        }
        if self.image_size != Size::DATA {
            self.validate_sizes()?;
        }
        Ok(())
    }

    fn validate_sizes(&self) -> Result<()> {
        let (size, levels) = (self.image_size, self.levels());
        let step = u32::try_from(levels - 1).ok().and_then(|l| 1usize.checked_shl(l)).unwrap_or(usize::MAX);
        if !size.h.is_multiple_of(step) || !size.w.is_multiple_of(step) {
            let near = |side: usize| side.next_multiple_of(step);
            let fits = if size.longer() <= 1 << 20 && step <= 1 << 20 {
                format!("{} would do, and so would fewer widths", Size { h: near(size.h), w: near(size.w) })
            } else {
                "use fewer widths".into()
            };
            usage!(
                "image_size = {size} cannot be halved {} times, which the {levels} levels of widths = {} ask for; {fits}",
                levels - 1,
                join(&self.widths),
            );
        }
        let sides: Vec<usize> = (0..levels).map(|l| self.size_at(l).longer()).collect();
        if let Some(odd) = self.attention_resolutions.iter().find(|r| !sides.contains(r)) {
            usage!(
                "attention_resolutions holds {odd}, but the longer sides of the levels of image_size = {size} are {}",
                join(&sides)
            );
        }
        let middle = self.middle_attention != MiddleAttention::None;
        for level in (0..levels).filter(|&l| self.attention_at(l) || (middle && l == levels - 1)) {
            let width = self.widths[level];
            if self.num_heads > 0 && !width.is_multiple_of(self.num_heads) {
                usage!(
                    "num_heads = {} does not divide the width {width} of the attention at {}; {} would",
                    self.num_heads,
                    self.size_at(level),
                    (1..self.num_heads).rev().find(|&h| width.is_multiple_of(h)).unwrap_or(1)
                );
            }
            if self.head_dim > 0 && !width.is_multiple_of(self.head_dim) {
                usage!(
                    "head_dim = {} does not divide the width {width} of the attention at {}; {} would, and 0 is one head",
                    self.head_dim,
                    self.size_at(level),
                    (1..self.head_dim).rev().find(|&d| width.is_multiple_of(d)).unwrap_or(1)
                );
            }
        }
        Ok(())
    }
}

impl Diffusion {
    /// Refuses a process that cannot be, and one that the prediction cannot learn.
    ///
    /// # Errors
    /// `Error::Usage`, with the value and what would be right.
    pub fn validate(&self) -> Result<()> {
        self.validate_process()?;
        if self.prediction == Prediction::Eps && self.noise_schedule()?.has_zero_terminal_snr() {
            usage!(
                "prediction = eps: with zero terminal SNR (zero_snr = {}) the last x_t is the noise itself, from which nothing is learned; prediction = v or x0 would do",
                self.zero_snr
            );
        }
        Ok(())
    }

    /// Refuses a process that cannot be, whatever is predicted: a classifier predicts nothing of it.
    ///
    /// # Errors
    /// `Error::Usage`, with the value and what would be right.
    pub fn validate_process(&self) -> Result<()> {
        if self.timesteps < 2 {
            usage!("timesteps = {} must be at least 2; the paper has 1000", self.timesteps);
        }
        if self.trained_betas.is_empty() {
            let unused = match self.schedule {
                Kind::Linear | Kind::Quadratic | Kind::Sigmoid => [None, None],
                Kind::Constant => [Some(("beta_start", self.beta_start)), None],
                Kind::Cosine | Kind::Learned => {
                    [Some(("beta_start", self.beta_start)), Some(("beta_end", self.beta_end))]
                }
            };
            if let Some((key, value)) = unused.into_iter().flatten().find(|&(_, value)| value != 0.0) {
                usage!("{key} = {value}: the {} schedule does not have it, so leave it at 0", self.schedule);
            }
        }
        if self.schedule == Kind::Learned && !self.trained_betas.is_empty() {
            usage!(
                "schedule = learned: the betas are given one by one already, and stay; take those out, or another schedule"
            );
        }
        if self.schedule == Kind::Learned && self.zero_snr {
            usage!(
                "zero_snr = true: with schedule = learned the bound finds where the schedule ends, so leave zero_snr at false"
            );
        }
        self.noise_schedule().map(|_| ())
    }

    /// The betas of the process.
    ///
    /// # Errors
    /// `Error::Usage` for betas or a number of timesteps out of range.
    pub fn noise_schedule(&self) -> Result<Schedule> {
        let named = self.betas_as_given()?;
        Ok(if self.zero_snr && !named.has_zero_terminal_snr() { named.with_zero_terminal_snr() } else { named })
    }

    fn betas_as_given(&self) -> Result<Schedule> {
        let Diffusion { schedule, timesteps, beta_start, beta_end, .. } = *self;
        if !self.trained_betas.is_empty() {
            if self.trained_betas.len() != timesteps {
                usage!("trained_betas holds {} numbers for {timesteps} timesteps", self.trained_betas.len());
            }
            return Schedule::from_betas(self.trained_betas.clone());
        }
        if beta_start == 0.0 && beta_end == 0.0 {
            return Schedule::new(schedule, timesteps);
        }
        let (start, end) = self.end_betas();
        Schedule::with_betas(schedule, timesteps, start, end)
    }

    /// The first and the last beta of a named schedule, with the default in place of 0.
    pub fn end_betas(&self) -> (f64, f64) {
        let (start, end) = Kind::default_betas(self.timesteps.max(1));
        let or = |value: f64, default: f64| if value == 0.0 { default } else { value };
        (or(self.beta_start, start), or(self.beta_end, end))
    }
}

/// An image of 65,536 pixels a side can be halved sixteen times.
const MOST_LEVELS: usize = 17;

/// Readable digits after seven minutes on two cores. Found by trial: a narrow network, since seeing more images beats
/// having more channels; the cosine schedule, since at this size the linear one spends half of its timesteps where next
/// to nothing of the image is left; small batches at five times the paper's learning rate; a moving average over about
/// a thousand steps; a network that predicts x_0, and a step size that falls during the second half
/// (docs/recipes.md has the figures of these two).
fn mnist() -> Config {
    Config {
        preset: Preset::Mnist,
        data: "mnist".into(),
        held_out: 0.05,
        model: Model {
            image_size: Size::square(28),
            channels: 1,
            widths: vec![32, 32, 64],
            blocks_per_level: 1,
            attention_resolutions: vec![7],
            groups: 8,
            dropout: 0.0,
            ..cifar10().model
        },
        diffusion: Diffusion { schedule: Kind::Cosine, prediction: Prediction::X0, ..cifar10().diffusion },
        steps: 2400,
        batch: 32,
        learning_rate: 1e-3,
        warmup_steps: 100,
        cooldown: 0.5,
        ema_decay: 0.999,
        flip: false,
        log_every: 20,
        validate_every: 400,
        sample_every: 400,
        checkpoint_every: 400,
        ..cifar10()
    }
}

/// What [`crate::recipe`] starts from on the CPU: the digits' recipe with a network for images in colour. Size and
/// channels are the data's.
///
/// Widths by trial on 3,786 emoji at 32x32, one thread each: 64,96,128 had a training loss of 0.102 after 200 s and
/// 0.059 after 800 s, 32,64,128 had 0.094 and 0.058 in twice as many steps. So the wider network wins within the hour.
/// What the digits gain by predicting x_0 and by the falling step size has been measured on them alone.
fn auto() -> Config {
    Config {
        preset: Preset::Auto,
        data: String::new(),
        model: Model {
            image_size: Size::DATA,
            channels: 0,
            widths: vec![64, 96, 128, 128],
            attention_resolutions: vec![8],
            ..mnist().model
        },
        diffusion: Diffusion { prediction: Prediction::Eps, ..mnist().diffusion },
        cooldown: 0.0,
        flip: true,
        ..mnist()
    }
}

/// As in `scripts/run_cifar.py` of the paper's code and appendix B.
fn cifar10() -> Config {
    Config {
        preset: Preset::Cifar10,
        init: String::new(),
        class_names: Vec::new(),
        data: String::new(),
        held_out: 0.05,
        background: Background([255; 3]),
        on_bad_image: OnBadImage::Stop,
        model: Model {
            image_size: Size::square(32),
            channels: 3,
            widths: vec![128, 256, 256, 256],
            blocks_per_level: 2,
            attention_resolutions: vec![16],
            middle_attention: MiddleAttention::Norm,
            head_dim: 0,
            num_heads: 0,
            groups: 32,
            middle_groups: 0,
            norm_eps: 1e-6,
            scale_shift_norm: false,
            downsample_type: Resampling::Conv,
            upsample_type: Resampling::Conv,
            dropout: 0.1,
            classes: 0,
            class_embedding: ClassEmbedding::Table,
            null_class: false,
            learned_variance: false,
            classifier: false,
            downsample_padding: 0,
            freq_shift: 1,
            flip_sin_to_cos: false,
            time_channels: 0,
            timestep_scale: 1.0,
        },
        diffusion: Diffusion {
            schedule: Kind::Linear,
            timesteps: 1000,
            beta_start: 0.0,
            beta_end: 0.0,
            trained_betas: Vec::new(),
            zero_snr: false,
            prediction: Prediction::Eps,
            variance: Variance::FixedLarge,
        },
        loss: Loss::Simple,
        vlb_weight: 0.001,
        min_snr_gamma: 5.0,
        timestep_sampling: Sampling::Uniform,
        label_dropout: 0.0,
        precision: Precision::F32,
        seed: 0,
        steps: 800_000,
        batch: 128,
        accumulate: 1,
        recompute: Recompute::None,
        learning_rate: 2e-4,
        warmup_steps: 5000,
        cooldown: 0.0,
        weight_decay: 0.0,
        grad_clip: 1.0,
        ema_decay: 0.9999,
        flip: true,
        log_every: 100,
        validate_every: 5000,
        sample_every: 5000,
        checkpoint_every: 5000,
        keep_checkpoints: 2,
    }
}

/// As in `scripts/run_celebahq.py` of the paper's code and appendix B.
fn celebahq256() -> Config {
    Config {
        preset: Preset::CelebaHq256,
        model: Model {
            image_size: Size::square(256),
            widths: vec![128, 128, 256, 256, 512, 512],
            dropout: 0.0,
            ..cifar10().model
        },
        diffusion: Diffusion { variance: Variance::FixedSmall, ..cifar10().diffusion },
        steps: 500_000,
        batch: 64,
        learning_rate: 2e-5,
        ..cifar10()
    }
}

/// Key and value of a `--set`.
fn pair(assignment: &str) -> Result<(&str, &str)> {
    let Some((key, value)) = assignment.split_once('=') else {
        usage!("--set {assignment}: there is no '='; write --set KEY=VALUE, as in --set widths=32,64,64");
    };
    Ok((key.trim(), value.trim()))
}

fn positive(key: &str, value: usize) -> Result<()> {
    if value == 0 {
        usage!("{key} = 0 must be at least 1");
    }
    Ok(())
}

fn at_most(key: &str, value: usize, most: usize) -> Result<()> {
    if value > most {
        usage!("{key} holds {value}; the largest possible is {most}");
    }
    Ok(())
}

/// Takes the list `key`, which is no setting, out of a file's table; empty if it is absent.
fn list<T>(
    table: &mut toml::Table,
    key: &str,
    of: &str,
    read: impl Fn(&toml::Value) -> Option<T>,
) -> std::result::Result<Vec<T>, String> {
    let Some(value) = table.remove(key) else { return Ok(Vec::new()) };
    let items = value.as_array().and_then(|items| items.iter().map(read).collect());
    items.ok_or_else(|| format!("{key} is no list of {of}"))
}

/// A TOML value in the spelling of `--set`.
fn spelling(key: &str, value: &toml::Value) -> std::result::Result<String, String> {
    Ok(match value {
        toml::Value::String(s) => s.clone(),
        toml::Value::Integer(_) | toml::Value::Float(_) | toml::Value::Boolean(_) => value.to_string(),
        toml::Value::Array(items) => {
            let items: std::result::Result<Vec<String>, String> = items.iter().map(|i| spelling(key, i)).collect();
            items?.join(",")
        }
        toml::Value::Table(_) => {
            return Err(format!("[{key}] is a table; settings stand at the top level, KEY = VALUE"));
        }
        toml::Value::Datetime(_) => return Err(format!("{key} = {value} is a date; no setting is")),
    })
}

fn join(list: &[usize]) -> String {
    list.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

/// The type of a setting: how to read it from text and write it as TOML.
trait Value: Sized {
    fn read(text: &str) -> std::result::Result<Self, String>;
    fn write(&self) -> toml::Value;
}

impl Value for u64 {
    fn read(text: &str) -> std::result::Result<Self, String> {
        // Whole floats are accepted: people write large step counts as 1e5.
        let whole = |f: f64| (f.fract() == 0.0 && (0.0..9e15).contains(&f)).then_some(f as u64);
        let number = text.replace('_', "");
        number
            .parse()
            .ok()
            .or_else(|| number.parse().ok().and_then(whole))
            .ok_or_else(|| "a whole number of 0 or more is expected".to_string())
    }

    fn write(&self) -> toml::Value {
        // TOML's integers end at 2^63 - 1.
        i64::try_from(*self).map_or_else(|_| toml::Value::String(self.to_string()), toml::Value::Integer)
    }
}

impl Value for u32 {
    fn read(text: &str) -> std::result::Result<Self, String> {
        u64::read(text)?.try_into().map_err(|_| format!("the largest number possible is {}", u32::MAX))
    }

    fn write(&self) -> toml::Value {
        u64::from(*self).write()
    }
}

impl Value for usize {
    fn read(text: &str) -> std::result::Result<Self, String> {
        Ok(u32::read(text)? as usize)
    }

    fn write(&self) -> toml::Value {
        (*self as u64).write()
    }
}

impl Value for f64 {
    fn read(text: &str) -> std::result::Result<Self, String> {
        text.parse().ok().filter(|f: &f64| f.is_finite()).ok_or_else(|| "a number is expected, as in 2e-4".to_string())
    }

    fn write(&self) -> toml::Value {
        toml::Value::Float(*self)
    }
}

impl Value for bool {
    fn read(text: &str) -> std::result::Result<Self, String> {
        text.parse().map_err(|_| "true or false is expected".to_string())
    }

    fn write(&self) -> toml::Value {
        toml::Value::Boolean(*self)
    }
}

impl Value for String {
    fn read(text: &str) -> std::result::Result<Self, String> {
        Ok(text.into())
    }

    fn write(&self) -> toml::Value {
        toml::Value::String(self.clone())
    }
}

impl Value for Vec<usize> {
    fn read(text: &str) -> std::result::Result<Self, String> {
        let items = text.split(',').map(str::trim).filter(|_| !text.trim().is_empty());
        items
            .map(|i| u32::read(i).map(|n| n as usize))
            .collect::<std::result::Result<_, _>>()
            .map_err(|_| "whole numbers with commas between are expected, as in 32,64,64".into())
    }

    fn write(&self) -> toml::Value {
        toml::Value::Array(self.iter().map(Value::write).collect())
    }
}

impl Value for Size {
    fn read(text: &str) -> std::result::Result<Self, String> {
        let (h, w) = text.split_once('x').unwrap_or((text, text));
        match (h.trim().parse::<u32>(), w.trim().parse::<u32>()) {
            (Ok(0), Ok(0)) => Ok(Size::DATA),
            (Ok(h @ 1..=65_536), Ok(w @ 1..=65_536)) => Ok(Size { h: h as usize, w: w as usize }),
            _ => {
                Err("a size between 1 and 65536 is expected: 32 (square), 28x20 (rows x columns), or 0 (the data's)"
                    .into())
            }
        }
    }

    fn write(&self) -> toml::Value {
        match *self {
            Size { h, w } if h == w => h.write(),
            size => toml::Value::String(size.to_string()),
        }
    }
}

impl Value for Background {
    fn read(text: &str) -> std::result::Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        if let Some((_, named)) = Background::NAMES.iter().find(|(name, _)| *name == lower) {
            return Ok(*named);
        }
        let digits = lower.strip_prefix('#').filter(|d| d.len() == 6 && d.bytes().all(|b| b.is_ascii_hexdigit()));
        let number = digits.and_then(|d| u32::from_str_radix(d, 16).ok());
        let [_, rgb @ ..] = number.ok_or("white, black, grey or #rrggbb is expected, as in #ff8000")?.to_be_bytes();
        Ok(Background(rgb))
    }

    fn write(&self) -> toml::Value {
        let name = Background::NAMES.iter().find(|(_, named)| named == self);
        let [r, g, b] = self.0;
        toml::Value::String(name.map_or(format!("#{r:02x}{g:02x}{b:02x}"), |(name, _)| name.to_string()))
    }
}

impl fmt::Display for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.write().as_str().expect("it is written as text"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.h, self.w)
    }
}

impl<T: Named + fmt::Display> Value for T {
    fn read(text: &str) -> std::result::Result<Self, String> {
        T::named(text).ok_or_else(names::expected::<T>)
    }

    fn write(&self) -> toml::Value {
        toml::Value::String(self.to_string())
    }
}
