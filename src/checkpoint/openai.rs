//! The U-Nets of OpenAI's improved-diffusion and guided-diffusion: a `.pt` file of weights under their names.
//!
//! The shapes of the weights tell the network's widths, its depth, where it has attention, scale-shift norm, residual
//! resampling, classes and a learned variance. They do not tell the number of heads, the order of q, k and v, the size
//! of the images and the process. Those are flags of OpenAI's scripts, and are taken, a later source before an earlier
//! one, from the preset of a released file's name, from `model_and_diffusion.json` beside the file, and from
//! `FLAG=VALUE`. What is still missing is asked for, since a guess would be silently wrong; what contradicts the shapes
//! is refused.
//!
//! Names: `input_blocks.N.M`, `middle_block.M`, `output_blocks.N.M`, numbered through all levels. q, k and v lie in one
//! matrix: legacy order has each head's q, k and v together, the new order all heads' q, then k, then v.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::diffusers::Stepping;
use super::tensors::{Place, TensorFile, shape_in_file};
use super::{read_json, torch};
use crate::config::{ClassEmbedding, Config, Diffusion, MiddleAttention, Model, Preset, Resampling, Size};
use crate::diffusion::{Kind, Prediction, Variance};
use crate::error::{Error, Result, printable};
use crate::params::{Param, Params, Specs};
use crate::text::cut;
use crate::unet::UNet;

/// The flags of the scripts, beside a file of weights.
pub(super) const FLAGS_FILE: &str = "model_and_diffusion.json";

/// A result whose error is a sentence that begins with the name of the file.
type Sentence<T> = std::result::Result<T, String>;

/// Flags that change only training or the arithmetic, not what the network is.
const OF_TRAINING: [&str; 5] = ["use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas", "cond_fn"];

/// Flags that describe the network or the process.
const FLAGS: [&str; 21] = [
    "image_size",
    "num_channels",
    "num_res_blocks",
    "num_heads",
    "num_heads_upsample",
    "num_head_channels",
    "attention_resolutions",
    "channel_mult",
    "dropout",
    "class_cond",
    "use_scale_shift_norm",
    "resblock_updown",
    "use_new_attention_order",
    "learn_sigma",
    "sigma_small",
    "diffusion_steps",
    "noise_schedule",
    "timestep_respacing",
    "predict_xstart",
    "rescale_timesteps",
    "conv_resample",
];

/// The released files, by name without ending, with the flags that their shapes do not tell.
const RELEASED: [(&str, &str); 17] = [
    ("64x64_diffusion", GUIDED_64),
    (
        "128x128_diffusion",
        "image_size=128,num_heads=4,use_new_attention_order=false,diffusion_steps=1000,noise_schedule=linear",
    ),
    ("256x256_diffusion", GUIDED_256),
    ("256x256_diffusion_uncond", GUIDED_256),
    (
        "512x512_diffusion",
        "image_size=512,num_head_channels=64,use_new_attention_order=false,diffusion_steps=1000,noise_schedule=linear",
    ),
    ("lsun_bedroom", GUIDED_LSUN),
    ("lsun_cat", GUIDED_LSUN),
    ("lsun_horse", GUIDED_LSUN),
    (
        "cifar10_uncond_50M_500K",
        "image_size=32,dropout=0.3,num_heads=4,use_new_attention_order=false,diffusion_steps=4000,noise_schedule=cosine,rescale_timesteps=true",
    ),
    (
        "cifar10_uncond_vlb_50M_500K",
        "image_size=32,dropout=0.3,num_heads=4,use_new_attention_order=false,diffusion_steps=4000,noise_schedule=cosine,rescale_timesteps=true",
    ),
    ("imagenet64_uncond_100M_1500K", IMPROVED_64),
    ("imagenet64_uncond_vlb_100M_1500K", IMPROVED_64),
    (
        "imagenet64_cond_270M_250K",
        "image_size=64,num_heads=4,use_new_attention_order=false,diffusion_steps=4000,noise_schedule=cosine,rescale_timesteps=false",
    ),
    ("lsun_uncond_100M_1200K_bs128", IMPROVED_LSUN),
    ("lsun_uncond_100M_2400K_bs64", IMPROVED_LSUN),
    ("64_256_upsampler", ""),
    ("128_512_upsampler", ""),
];
const GUIDED_64: &str = "image_size=64,dropout=0.1,num_head_channels=64,use_new_attention_order=true,diffusion_steps=1000,noise_schedule=cosine";
const GUIDED_256: &str =
    "image_size=256,num_head_channels=64,use_new_attention_order=false,diffusion_steps=1000,noise_schedule=linear";
const GUIDED_LSUN: &str = "image_size=256,dropout=0.1,num_head_channels=64,use_new_attention_order=false,diffusion_steps=1000,noise_schedule=linear";
const IMPROVED_64: &str = "image_size=64,num_heads=4,use_new_attention_order=false,diffusion_steps=4000,noise_schedule=cosine,rescale_timesteps=true";
const IMPROVED_LSUN: &str =
    "image_size=256,num_heads=1,use_new_attention_order=false,diffusion_steps=1000,noise_schedule=linear";

/// A network by its file's tensors and flags, and where its weights are.
pub(super) struct Found {
    pub config: Config,
    pub file: TensorFile,
    pub notes: Vec<String>,
}

/// Opens a file of weights. `sets` are flags as `FLAG=VALUE`.
///
/// # Errors
/// `Error::Usage` for a flag that cannot be read; `Error::File` for a file that is no network of OpenAI's or of which
/// something must be said.
pub(super) fn open(path: &Path, sets: &[String]) -> Result<Found> {
    let file = TensorFile::open(path)?;
    let in_file = |e: String| Error::file(path, e);
    let shapes = Shapes::of(file.tensors()).map_err(in_file)?;
    let mut notes = Vec::new();
    let flags = Flags::near(path, sets, &mut notes)?;
    let (model, new_order) = shapes.model(&flags).map_err(in_file)?;
    let diffusion = shapes.diffusion(&flags, &mut notes).map_err(in_file)?;
    let model = Model {
        timestep_scale: if flags.is_true("rescale_timesteps").map_err(in_file)?.unwrap_or(false) {
            1000.0 / diffusion.timesteps as f64
        } else {
            1.0
        },
        ..model
    };
    let unfit = |e: Error| Error::file(path, format!("describes a network that cannot be built: {e}"));
    model.validate().map_err(unfit)?;
    diffusion.validate().map_err(|e| Error::file(path, format!("describes a process that cannot be: {e}")))?;
    notes.insert(0, format!("{}: its shapes tell {}", path.display(), shapes.sentence()));
    let notes = notes.iter().map(|note| printable(note)).collect();
    let tensors = renamed(file.tensors(), &model, new_order).map_err(in_file)?;
    let config = Config { model, diffusion, ..Config::preset(Preset::Cifar10) };
    Ok(Found { config, file: file.with_tensors(tensors), notes })
}

/// What the shapes of a file tell.
struct Shapes {
    channels: usize,
    learned_variance: bool,
    widths: Vec<usize>,
    blocks: usize,
    attention: Vec<bool>,
    time_channels: usize,
    classes: usize,
    scale_shift_norm: bool,
    resampling: Resampling,
}

impl Shapes {
    fn of(tensors: &BTreeMap<String, Place>) -> Sentence<Self> {
        let shape = |name: &str| match tensors.get(name) {
            Some(place) if !place.shape.is_empty() => Ok(&place.shape[..]),
            Some(_) => Err(format!("holds {name} as a single number; a matrix is expected")),
            None => Err(format!(
                "lacks {name}, so it is no U-Net of improved- or guided-diffusion; a model of diffusers is given by its folder"
            )),
        };
        let has = |name: String| tensors.contains_key(&name);
        let second = |name: &str| -> Sentence<usize> {
            shape(name)?.get(1).copied().ok_or_else(|| format!("holds {name} as a vector; a matrix is expected"))
        };
        let time_channels = second("time_embed.0.weight")?;
        let channels = second("input_blocks.0.0.weight")?;
        let out_channels = shape("out.2.weight")?[0];
        if channels == 6 && out_channels.is_multiple_of(3) && out_channels < 12 {
            return Err("is an upsampler, whose network takes a small image beside the noisy one (6 channels); only those that draw images by themselves are supported".into());
        }
        if channels == 0 || (out_channels != channels && out_channels != 2 * channels) {
            return Err(format!(
                "has {out_channels} output channels for {channels} input channels; as many or twice as many are expected"
            ));
        }
        let entries = (0..).take_while(|i| has(format!("output_blocks.{i}.0.in_layers.0.weight"))).count();
        let up = |i: usize| {
            let at = |part: &str| (1..=2).any(|m| has(format!("output_blocks.{i}.{m}.{part}.weight")));
            if at("conv") { Some(Resampling::Conv) } else { at("in_layers.0").then_some(Resampling::Resnet) }
        };
        let of_level = (0..entries).find(|&i| up(i).is_some()).map_or(entries, |i| i + 1);
        if entries == 0 || !entries.is_multiple_of(of_level) {
            return Err(format!(
                "has {entries} output_blocks, {of_level} in the first level; as many are expected in each"
            ));
        }
        let levels = entries / of_level;
        let resampling = up(of_level - 1).unwrap_or(Resampling::Conv);
        if let Some(i) = (0..entries).find(|i| {
            let last_of_level = (i + 1).is_multiple_of(of_level) && i + 1 < entries;
            up(*i) != last_of_level.then_some(resampling)
        }) {
            return Err(format!(
                "changes the size at output_blocks.{i} otherwise than at output_blocks.{}; all levels alike are expected",
                of_level - 1
            ));
        }
        let (mut widths, mut attention) = (Vec::new(), Vec::new());
        for i in (0..levels).rev().map(|level| level * of_level) {
            widths.push(shape(&format!("output_blocks.{i}.0.out_layers.0.weight"))?[0]);
            attention.push(has(format!("output_blocks.{i}.1.qkv.weight")));
        }
        let of_time = shape("middle_block.0.emb_layers.1.weight")?[0];
        let width = shape("middle_block.0.out_layers.0.weight")?[0];
        Ok(Shapes {
            channels,
            learned_variance: out_channels != channels,
            widths,
            blocks: of_level - 1,
            attention,
            time_channels,
            classes: if has("label_emb.weight".into()) { shape("label_emb.weight")?[0] } else { 0 },
            scale_shift_norm: of_time == width.saturating_mul(2),
            resampling,
        })
    }

    /// For the user.
    fn sentence(&self) -> String {
        let widths: Vec<String> = self.widths.iter().map(usize::to_string).collect();
        let mut parts = vec![format!("widths {} with {} blocks a level", widths.join(","), self.blocks)];
        let levels: Vec<String> =
            (0..self.widths.len()).filter(|&l| self.attention[l]).map(|l| l.to_string()).collect();
        if !levels.is_empty() {
            parts.push(format!("attention at level {}", levels.join(",")));
        }
        parts.extend(self.scale_shift_norm.then(|| "scale-shift norm".into()));
        parts.extend((self.resampling == Resampling::Resnet).then(|| "residual up and down blocks".into()));
        parts.extend((self.classes > 0).then(|| format!("{} classes", self.classes)));
        parts.extend(self.learned_variance.then(|| "a learned variance".into()));
        parts.join(", ")
    }

    /// The network, and whether q, k and v are in the new order.
    fn model(&self, flags: &Flags) -> Sentence<(Model, bool)> {
        let side = flags.number("image_size")?.ok_or_else(|| missing("image_size", "64"))?;
        if !(1..=65_536).contains(&side) {
            return Err(format!("has image_size = {side}; the side of the images is expected"));
        }
        let sizes = |level: usize| side.checked_shr(level as u32).unwrap_or(0);
        let attended: Vec<usize> = (0..self.widths.len()).filter(|&l| self.attention[l]).map(sizes).collect();
        let channels_of_head = flags.signed("num_head_channels")?.filter(|&n| n != -1);
        let heads = flags.number("num_heads")?;
        // OpenAI's code takes num_head_channels if both are given.
        let (num_heads, head_dim) = match (channels_of_head, heads) {
            (Some(channels), _) => (0, usize::try_from(channels).unwrap_or(0)),
            (None, Some(heads)) => (heads, 0),
            (None, None) => return Err(missing("num_heads=4 or num_head_channels", "64")),
        };
        if (num_heads, head_dim) == (0, 0) {
            return Err("has num_heads = 0; a number of heads or num_head_channels is expected".into());
        }
        let of_up = flags.signed("num_heads_upsample")?.filter(|&n| n != -1 && Some(n) != heads.map(|n| n as i64));
        if let Some(other) = of_up {
            return Err(format!("has num_heads_upsample = {other}; as many heads on the way up as down are supported"));
        }
        if flags.is_true("conv_resample")? == Some(false) {
            return Err("has conv_resample = false; resampling without weights is not supported".into());
        }
        let model = Model {
            classifier: false,
            image_size: Size::square(side),
            channels: self.channels,
            widths: self.widths.clone(),
            blocks_per_level: self.blocks,
            attention_resolutions: attended.clone(),
            middle_attention: MiddleAttention::Norm,
            head_dim,
            num_heads,
            groups: 32,
            middle_groups: 0,
            norm_eps: 1e-5,
            scale_shift_norm: self.scale_shift_norm,
            downsample_type: self.resampling,
            upsample_type: self.resampling,
            dropout: flags.float("dropout")?.unwrap_or(0.0),
            classes: self.classes,
            class_embedding: ClassEmbedding::Table,
            null_class: false,
            learned_variance: self.learned_variance,
            downsample_padding: 1,
            freq_shift: 0,
            flip_sin_to_cos: true,
            time_channels: if self.widths.first() == Some(&self.time_channels) { 0 } else { self.time_channels },
            timestep_scale: 1.0,
        };
        // With a single head both orders are the same.
        let middle = self.widths.last().copied().unwrap_or(0);
        let new_order = match flags.is_true("use_new_attention_order")? {
            Some(new) => new,
            None if model.heads(middle) == 1 => false,
            None => return Err(missing("use_new_attention_order", "false")),
        };
        flags.agree("num_channels", self.time_channels)?;
        flags.agree("num_res_blocks", self.blocks)?;
        flags.agree("class_cond", self.classes > 0)?;
        flags.agree("use_scale_shift_norm", self.scale_shift_norm)?;
        flags.agree("learn_sigma", self.learned_variance)?;
        if self.widths.len() > 1 {
            flags.agree("resblock_updown", self.resampling == Resampling::Resnet)?;
        }
        if let Some(listed) = flags.text("attention_resolutions") {
            let mut given: Vec<usize> = listed.split(',').filter_map(|n| n.trim().parse().ok()).collect();
            // Resolutions that are no level have no effect.
            given.retain(|n| (0..self.widths.len()).any(|level| sizes(level) == *n));
            if given.len() != attended.len() || attended.iter().any(|n| !given.contains(n)) {
                return Err(format!(
                    "has attention at {attended:?}, counted from image_size = {side}, where attention_resolutions says {}; one of the two is of another model",
                    cut(&listed)
                ));
            }
        }
        if let Some(listed) = flags.text("channel_mult").filter(|listed| !listed.is_empty()) {
            let widths: Vec<f64> = listed.split(',').filter_map(|m| m.trim().parse().ok()).collect();
            let widths: Vec<usize> = widths.iter().map(|m| (m * self.time_channels as f64) as usize).collect();
            if widths != self.widths {
                let what = format!("has the widths {:?}, where channel_mult says {}", self.widths, cut(&listed));
                return Err(format!("{what}; one of the two is of another model"));
            }
        }
        Ok((model, new_order))
    }

    fn diffusion(&self, flags: &Flags, notes: &mut Vec<String>) -> Sentence<Diffusion> {
        let timesteps = flags.number("diffusion_steps")?.ok_or_else(|| missing("diffusion_steps", "1000"))?;
        let schedule = match flags.text("noise_schedule").ok_or_else(|| missing("noise_schedule", "linear"))?.as_str() {
            "linear" => Kind::Linear,
            "cosine" => Kind::Cosine,
            other => return Err(format!("has noise_schedule = {}; linear or cosine is expected", cut(other))),
        };
        if flags.is_true("rescale_timesteps")?.is_none() && timesteps != 1000 {
            return Err(missing("rescale_timesteps", "true"));
        }
        if let Some(respacing) = flags.text("timestep_respacing").filter(|text| !text.is_empty()) {
            return Err(format!(
                "has timestep_respacing = {}, which says how to sample; leave it out and give sample --steps",
                cut(&respacing)
            ));
        }
        let sigma_small = flags.is_true("sigma_small")?;
        let variance = match (self.learned_variance, sigma_small) {
            (true, _) => Variance::LearnedRange,
            (false, Some(true)) => Variance::FixedSmall,
            (false, _) => Variance::FixedLarge,
        };
        let predict_xstart = flags.is_true("predict_xstart")?;
        if predict_xstart.is_none() {
            notes.push("predict_xstart is not said: the network is taken to predict the noise".into());
        }
        if sigma_small.is_none() && !self.learned_variance {
            notes.push("sigma_small is not said: the variance is taken to be fixed_large".into());
        }
        Ok(Diffusion {
            schedule,
            timesteps,
            beta_start: 0.0,
            beta_end: 0.0,
            trained_betas: Vec::new(),
            zero_snr: false,
            prediction: if predict_xstart == Some(true) { Prediction::X0 } else { Prediction::Eps },
            variance,
        })
    }
}

/// The sentence that asks for a flag.
fn missing(flag: &str, example: &str) -> String {
    format!(
        "does not tell {flag}: give OpenAI's flags in {FLAGS_FILE} beside it or by --set, as in --set {flag}={example}"
    )
}

/// OpenAI's flags, by name.
struct Flags(BTreeMap<String, Value>);

impl Flags {
    /// Those of the released file of that name, of the file beside it, and of `sets`.
    fn near(path: &Path, sets: &[String], notes: &mut Vec<String>) -> Result<Self> {
        let mut flags = BTreeMap::new();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        if let Some((name, preset)) = RELEASED.iter().find(|(name, _)| *name == stem) {
            let pairs = preset.split(',').filter_map(|pair| pair.split_once('='));
            flags.extend(pairs.map(|(flag, value)| (flag.to_string(), Value::from(value))));
            flags.insert("predict_xstart".into(), Value::from(false)); // as all of them
            notes.push(format!("{}: the flags are those of OpenAI's {name}", path.display()));
        }
        let beside = path.with_file_name(FLAGS_FILE);
        if beside.is_file() {
            for (flag, value) in read_json(&beside)? {
                known(&flag).map_err(|e| Error::file(&beside, e))?;
                if value.is_array() || value.is_object() {
                    return Err(Error::file(&beside, format!("has a list as {flag}; a number or a text is expected")));
                }
                flags.insert(flag, value);
            }
            notes.push(format!("the flags are taken from {}", beside.display()));
        }
        for assignment in sets {
            let usage = |e: String| Error::Usage(format!("--set {assignment}: {e}"));
            let Some((flag, value)) = assignment.split_once('=') else {
                return Err(usage("there is no '='; write --set FLAG=VALUE, as in --set num_heads=4".into()));
            };
            known(flag.trim()).map_err(|e| usage(e.replacen("has ", "", 1)))?;
            flags.insert(flag.trim().into(), Value::from(value.trim()));
        }
        Ok(Flags(flags))
    }

    /// In the spelling of the command line; `None` if it is not given or null.
    fn text(&self, flag: &str) -> Option<String> {
        match self.0.get(flag)? {
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        }
    }

    fn read<T>(&self, flag: &str, expected: &str, read: impl Fn(&str) -> Option<T>) -> Sentence<Option<T>> {
        let Some(text) = self.text(flag) else { return Ok(None) };
        let value = read(&text).ok_or_else(|| format!("has {flag} = {}; {expected} is expected", cut(&text)))?;
        Ok(Some(value))
    }

    fn number(&self, flag: &str) -> Sentence<Option<usize>> {
        self.read(flag, "a whole number", |text| text.parse::<u32>().ok().map(|n| n as usize))
    }

    fn signed(&self, flag: &str) -> Sentence<Option<i64>> {
        self.read(flag, "a whole number", |text| text.parse::<i32>().ok().map(i64::from))
    }

    fn float(&self, flag: &str) -> Sentence<Option<f64>> {
        self.read(flag, "a number", |text| text.parse().ok())
    }

    fn is_true(&self, flag: &str) -> Sentence<Option<bool>> {
        self.read(flag, "true or false", |text| match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" => Some(true),
            "false" | "0" | "no" => Some(false),
            _ => None,
        })
    }

    /// Refuses a flag that says another thing than the shapes.
    fn agree<T: Told>(&self, flag: &str, told: T) -> Sentence<()> {
        match T::read(self, flag)? {
            Some(said) if said != told => Err(format!(
                "has {flag} = {told} by its shapes, where the flag says {said}; one of the two is of another model"
            )),
            _ => Ok(()),
        }
    }
}

/// What both shapes and flags tell.
trait Told: PartialEq + std::fmt::Display {
    fn read(flags: &Flags, flag: &str) -> Sentence<Option<Self>>
    where
        Self: Sized;
}

impl Told for usize {
    fn read(flags: &Flags, flag: &str) -> Sentence<Option<Self>> {
        flags.number(flag)
    }
}

impl Told for bool {
    fn read(flags: &Flags, flag: &str) -> Sentence<Option<Self>> {
        flags.is_true(flag)
    }
}

/// Refuses a flag that OpenAI's scripts do not have.
fn known(flag: &str) -> Sentence<()> {
    if ["large_size", "small_size"].contains(&flag) {
        return Err(format!(
            "has {flag}, a flag of upsamplers; only networks that draw images by themselves are supported"
        ));
    }
    if FLAGS.contains(&flag) || OF_TRAINING.contains(&flag) {
        return Ok(());
    }
    Err(format!("has {}, which is no flag of OpenAI's; one of {} is expected", cut(flag), FLAGS.join(", ")))
}

/// What of a tensor of theirs a parameter of ours is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Whole,
    /// q, k or v: 0, 1 or 2 of the heads given.
    Qkv(usize, usize),
}

/// Our name of each parameter, theirs, and which part of it, in the order of their modules.
fn names(m: &Model) -> Vec<(String, String, Part)> {
    let mut list = Vec::new();
    let mut affine = |ours: String, theirs: String| {
        for part in ["weight", "bias"] {
            list.push((format!("{ours}.{part}"), format!("{theirs}.{part}"), Part::Whole));
        }
    };
    affine("time_embedding.linear_1".into(), "time_embed.0".into());
    affine("time_embedding.linear_2".into(), "time_embed.2".into());
    if m.classes > 0 {
        list.push(("class_embedding.weight".into(), "label_emb.weight".into(), Part::Whole));
    }
    let resnet = |list: &mut Vec<_>, ours: &str, theirs: &str, shortcut: bool| {
        let mut parts = vec![
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
        ];
        parts.extend(shortcut.then_some(("conv_shortcut", "skip_connection")));
        for (our, their) in parts {
            for part in ["weight", "bias"] {
                list.push((format!("{ours}.{our}.{part}"), format!("{theirs}.{their}.{part}"), Part::Whole));
            }
        }
    };
    let attention = |list: &mut Vec<_>, ours: &str, theirs: &str, heads: usize| {
        for part in ["weight", "bias"] {
            list.push((format!("{ours}.group_norm.{part}"), format!("{theirs}.norm.{part}"), Part::Whole));
        }
        for part in ["weight", "bias"] {
            for (i, our) in ["to_q", "to_k", "to_v"].into_iter().enumerate() {
                list.push((format!("{ours}.{our}.{part}"), format!("{theirs}.qkv.{part}"), Part::Qkv(i, heads)));
            }
        }
        for part in ["weight", "bias"] {
            list.push((format!("{ours}.to_out.0.{part}"), format!("{theirs}.proj_out.{part}"), Part::Whole));
        }
    };
    let resample = |list: &mut Vec<_>, ours: &str, theirs: &str, by: Resampling, their_conv: &str| match by {
        Resampling::Conv => {
            for part in ["weight", "bias"] {
                list.push((format!("{ours}.conv.{part}"), format!("{theirs}.{their_conv}.{part}"), Part::Whole));
            }
        }
        Resampling::Resnet => resnet(list, ours, theirs, false),
    };
    for part in ["weight", "bias"] {
        list.push((format!("conv_in.{part}"), format!("input_blocks.0.0.{part}"), Part::Whole));
    }
    let levels = m.levels();
    let (mut n, mut c, mut skips) = (1, m.widths[0], vec![m.widths[0]]);
    for (level, &width) in m.widths.iter().enumerate() {
        for j in 0..m.blocks_per_level {
            let ours = format!("down_blocks.{level}");
            resnet(&mut list, &format!("{ours}.resnets.{j}"), &format!("input_blocks.{n}.0"), c != width);
            if m.attention_at(level) {
                let (ours, theirs) = (format!("{ours}.attentions.{j}"), format!("input_blocks.{n}.1"));
                attention(&mut list, &ours, &theirs, m.heads(width));
            }
            c = width;
            skips.push(c);
            n += 1;
        }
        if level + 1 < levels {
            let (ours, theirs) = (format!("down_blocks.{level}.downsamplers.0"), format!("input_blocks.{n}.0"));
            resample(&mut list, &ours, &theirs, m.downsample_type, "op");
            skips.push(c);
            n += 1;
        }
    }
    resnet(&mut list, "mid_block.resnets.0", "middle_block.0", false);
    attention(&mut list, "mid_block.attentions.0", "middle_block.1", m.heads(c));
    resnet(&mut list, "mid_block.resnets.1", "middle_block.2", false);
    n = 0;
    for (i, level) in (0..levels).rev().enumerate() {
        let width = m.widths[level];
        for j in 0..=m.blocks_per_level {
            let skip = skips.pop().expect("one skip per block of the way up");
            let ours = format!("up_blocks.{i}");
            resnet(&mut list, &format!("{ours}.resnets.{j}"), &format!("output_blocks.{n}.0"), c + skip != width);
            let mut inner = 1;
            if m.attention_at(level) {
                let (ours, theirs) = (format!("{ours}.attentions.{j}"), format!("output_blocks.{n}.1"));
                attention(&mut list, &ours, &theirs, m.heads(width));
                inner = 2;
            }
            if level > 0 && j == m.blocks_per_level {
                let (ours, theirs) = (format!("{ours}.upsamplers.0"), format!("output_blocks.{n}.{inner}"));
                resample(&mut list, &ours, &theirs, m.upsample_type, "conv");
            }
            c = width;
            n += 1;
        }
    }
    for (ours, theirs) in [("conv_norm_out", "out.0"), ("conv_out", "out.2")] {
        for part in ["weight", "bias"] {
            list.push((format!("{ours}.{part}"), format!("{theirs}.{part}"), Part::Whole));
        }
    }
    list
}

/// The tensors under our names; those that the network does not have keep theirs, and are refused by them.
fn renamed(tensors: &BTreeMap<String, Place>, m: &Model, new_order: bool) -> Sentence<BTreeMap<String, Place>> {
    let mut found = BTreeMap::new();
    let mut used = std::collections::BTreeSet::new();
    for (ours, theirs, part) in names(m) {
        let Some(place) = tensors.get(&theirs) else {
            return Err(format!("lacks {}, which a network of these shapes has", cut(&theirs)));
        };
        let place = match part {
            // Convolutions over one dimension: [c, c, 1].
            Part::Whole if theirs.ends_with("proj_out.weight") => place.without_last_of_one(),
            Part::Whole => place.clone(),
            Part::Qkv(which, heads) => {
                place.without_last_of_one().rows_of(which, if new_order { 1 } else { heads }).ok_or_else(|| {
                    format!(
                        "holds {} with {:?} rows, of which no {heads} heads have q, k and v",
                        cut(&theirs),
                        place.shape
                    )
                })?
            }
        };
        found.insert(ours, place);
        used.insert(theirs);
    }
    found.extend(tensors.iter().filter(|(name, _)| !used.contains(*name)).map(|(name, p)| (name.clone(), p.clone())));
    Ok(found)
}

/// What of a model OpenAI's files and flags have no words for.
fn beyond_openai(config: &Config) -> Option<String> {
    let (m, d) = (&config.model, &config.diffusion);
    let unlike = |key: &str, is: &dyn std::fmt::Display, wants: &dyn std::fmt::Display| {
        Some(format!("{key} = {is}; only {wants} is possible there"))
    };
    let last_two = m.levels() > 1 && m.downsample_type != m.upsample_type;
    match () {
        _ if m.groups != 32 => unlike("groups", &m.groups, &32),
        _ if m.middle_groups() != 32 => unlike("middle_groups", &m.middle_groups, &32),
        _ if m.norm_eps != 1e-5 => unlike("norm_eps", &m.norm_eps, &1e-5),
        _ if m.freq_shift != 0 => unlike("freq_shift", &m.freq_shift, &0),
        _ if !m.flip_sin_to_cos => unlike("flip_sin_to_cos", &false, &true),
        _ if m.downsample_type == Resampling::Conv && m.levels() > 1 && m.downsample_padding != 1 => {
            unlike("downsample_padding", &m.downsample_padding, &1)
        }
        _ if last_two => unlike("upsample_type", &m.upsample_type, &m.downsample_type),
        _ if m.middle_attention != MiddleAttention::Norm => {
            unlike("middle_attention", &m.middle_attention, &MiddleAttention::Norm)
        }
        _ if m.class_embedding != ClassEmbedding::Table => {
            unlike("class_embedding", &m.class_embedding, &ClassEmbedding::Table)
        }
        _ if m.null_class => Some("the null class; there all rows are classes".into()),
        // Their scripts multiply the length of the time embedding by whole numbers, to the widths.
        _ if channel_mult(m).is_none() => unlike(
            "widths",
            &m.widths.iter().map(usize::to_string).collect::<Vec<_>>().join(","),
            &format!("a whole multiple of time_channels = {} each", m.time_channels()),
        ),
        _ if m.image_size.h != m.image_size.w => unlike("image_size", &m.image_size, &"a square"),
        _ if !d.trained_betas.is_empty() => {
            Some("betas one by one; only the linear and the cosine schedule are possible there".into())
        }
        _ if d.zero_snr => unlike("zero_snr", &true, &false),
        _ if !matches!(d.schedule, Kind::Linear | Kind::Cosine) => unlike("schedule", &d.schedule, &"linear or cosine"),
        _ if (d.beta_start, d.beta_end) != (0.0, 0.0) => {
            let (start, end) = d.end_betas();
            Some(format!("betas from {start} to {end}; only those of its number of timesteps are possible there"))
        }
        _ if !matches!(d.prediction, Prediction::Eps | Prediction::X0) => {
            unlike("prediction", &d.prediction, &"eps or x0")
        }
        _ if matches!(d.variance, Variance::Learned | Variance::LearnedRaw) => {
            unlike("variance", &d.variance, &"learned_range")
        }
        _ if m.timestep_scale != 1.0 && m.timestep_scale != 1000.0 / d.timesteps as f64 => {
            unlike("timestep_scale", &m.timestep_scale, &"1 or 1000/T")
        }
        _ => None,
    }
}

/// Writes a model as OpenAI's scripts save it, q, k and v in the legacy order, and its flags beside it. Returns
/// sentences for the user: what the file does not hold.
///
/// # Errors
/// `Error::Failed` for a model that it cannot say; `Error::File` for a file of other flags beside it, or what cannot be
/// written.
pub(super) fn write(path: &Path, config: &Config, params: &Params, stepping: &Stepping) -> Result<Vec<String>> {
    if let Some(what) = beyond_openai(config) {
        return Err(Error::Failed(format!("{}: OpenAI's files cannot say {what}", path.display())));
    }
    let (m, d) = (&config.model, &config.diffusion);
    let beside = path.with_file_name(FLAGS_FILE);
    let flags = flags_of(m, d);
    if beside.exists() && read_json(&beside)? != flags {
        let what = "holds the flags of another model; give --out a folder of its own";
        return Err(Error::file(&beside, what));
    }
    let (_, specs) = UNet::new(m)?;
    let by_name: BTreeMap<&str, Param> = specs.iter().map(|(p, spec)| (spec.name.as_str(), p)).collect();
    // One entry for each of their tensors; q, k and v follow each other.
    let mut entries: Vec<(torch::Entry, Vec<Param>, usize)> = Vec::new();
    for (ours, theirs, part) in names(m) {
        let p = by_name[ours.as_str()];
        let mut shape = shape_in_file(specs.spec(p));
        match part {
            Part::Whole => {
                if theirs.ends_with("proj_out.weight") {
                    shape.push(1);
                }
                entries.push(((theirs, shape), vec![p], 1));
            }
            Part::Qkv(0, heads) => {
                shape[0] *= 3;
                if shape.len() == 2 {
                    shape.push(1);
                }
                entries.push(((theirs, shape), vec![p], heads));
            }
            Part::Qkv(..) => entries.last_mut().expect("q comes first").1.push(p),
        }
    }
    let flat = params.host()?;
    let headers: Vec<torch::Entry> = entries.iter().map(|(entry, _, _)| entry.clone()).collect();
    torch::write(path, &headers, |i| joined(&specs, &flat, &entries[i].1, entries[i].2))?;
    if !beside.exists() {
        crate::output::write_atomically(
            &beside,
            (serde_json::to_string_pretty(&flags).expect("plain values") + "\n").as_bytes(),
        )?;
    }
    let mut notes = vec![format!("the flags are in {}", beside.display())];
    if !config.class_names.is_empty() {
        notes.push("the names of the classes are not kept: OpenAI's files have none".into());
    }
    if !matches!(*stepping, Stepping::OURS | Stepping::FOREIGN) {
        notes.push("how the model's scheduler steps is not kept: OpenAI's files do not say it".into());
    }
    Ok(notes)
}

/// The numbers of a parameter, or of q, k and v in the legacy order: each head's rows of q, of k, of v.
fn joined(specs: &Specs, flat: &[f32], parts: &[Param], heads: usize) -> Vec<f32> {
    let values: Vec<Vec<f32>> =
        parts.iter().map(|&p| super::tensors::to_file_layout(specs.spec(p), &flat[specs.range(p)])).collect();
    let each = values[0].len() / heads;
    (0..heads).flat_map(|head| values.iter().flat_map(move |v| v[head * each..][..each].to_vec())).collect()
}

/// `channel_mult` of a network, if there is one: its scripts read whole numbers, and nothing as their own for the size
/// of the images, of which 512x512 alone has a half.
fn channel_mult(m: &Model) -> Option<String> {
    let channels = m.time_channels();
    let halves = [1, 2, 2, 4, 4, 8, 8].map(|halves| halves * channels);
    if m.image_size.h == 512 && m.widths.iter().map(|width| 2 * width).eq(halves) {
        return Some(String::new());
    }
    let multiple = |&width: &usize| width.is_multiple_of(channels).then(|| (width / channels).to_string());
    m.widths.iter().map(multiple).collect::<Option<Vec<_>>>().map(|multiples| multiples.join(","))
}

/// The flags of a network that [`beyond_openai`] accepts.
fn flags_of(m: &Model, d: &Diffusion) -> Map<String, Value> {
    // Their scripts read one number at least. This one is of no level.
    let none = [2 * m.image_size.h];
    let attended = if m.attention_resolutions.is_empty() { &none[..] } else { &m.attention_resolutions };
    let attended = attended.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let flags = json!({
        "image_size": m.image_size.h,
        "num_channels": m.time_channels(),
        "num_res_blocks": m.blocks_per_level,
        "channel_mult": channel_mult(m).expect("widths that the flags can say"),
        "attention_resolutions": attended,
        "num_heads": if m.num_heads == 0 { 1 } else { m.num_heads },
        "num_head_channels": if m.head_dim == 0 { -1 } else { m.head_dim as i64 },
        "use_new_attention_order": false,
        "use_scale_shift_norm": m.scale_shift_norm,
        "resblock_updown": m.downsample_type == Resampling::Resnet,
        "dropout": m.dropout,
        "class_cond": m.classes > 0,
        "learn_sigma": m.learned_variance,
        "sigma_small": d.variance == Variance::FixedSmall,
        "diffusion_steps": d.timesteps,
        "noise_schedule": d.schedule.name(),
        "predict_xstart": d.prediction == Prediction::X0,
        "rescale_timesteps": m.timestep_scale != 1.0,
    });
    match flags {
        Value::Object(map) => map,
        _ => unreachable!("an object was made"),
    }
}
