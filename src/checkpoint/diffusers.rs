//! The configuration files of diffusers: a struct for each class, with its arguments in the order of the file and its
//! defaults, and the translation from and to ours.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::{ClassEmbedding, Diffusion, MiddleAttention, Model, Resampling, Size};
use crate::diffusion::schedule::{MOST_TIMESTEPS, betas_of_diffusers};
use crate::diffusion::{Kind, Prediction, Spacing, Variance};
use crate::error::Result;
use crate::names::{self, Named};
use crate::text::cut;

/// The version of diffusers whose file format this is.
pub(super) const VERSION: &str = "0.42.1";

/// A result whose error is a sentence that begins with the name of the file.
type Sentence<T> = std::result::Result<T, String>;

/// `unet/config.json`.
#[derive(Serialize, Deserialize)]
#[serde(default)]
pub(super) struct UNet2DModel {
    _class_name: Option<String>,
    /// Ours: the names of the classes. diffusers passes over keys that begin with an underscore.
    #[serde(skip_serializing_if = "Option::is_none")]
    _class_names: Option<Vec<String>>,
    _diffusers_version: Option<String>,
    /// Ours: what diffusers has no key for, and then `time_embedding_type` is [`OURS`].
    #[serde(skip_serializing_if = "Option::is_none")]
    _middle_attention: Option<String>,
    /// Ours: whether the last row of the table of classes is that of images without a class.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    _null_class: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    _num_heads: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    _time_channels: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    _timestep_scale: Option<f64>,
    act_fn: String,
    add_attention: bool,
    /// If absent, 8, which is rarely what is wanted; null means one head.
    attention_head_dim: Option<u32>,
    attn_norm_num_groups: Option<u32>,
    block_out_channels: Vec<u32>,
    center_input_sample: bool,
    class_embed_type: Option<String>,
    down_block_types: Vec<String>,
    downsample_padding: u32,
    downsample_type: String,
    dropout: f64,
    flip_sin_to_cos: bool,
    freq_shift: u32,
    in_channels: u32,
    layers_per_block: u32,
    /// A `Number`, so that it is written as an integer, as diffusers does.
    mid_block_scale_factor: serde_json::Number,
    mid_block_type: String,
    norm_eps: f64,
    norm_num_groups: u32,
    num_class_embeds: Option<u32>,
    num_train_timesteps: Value,
    out_channels: u32,
    resnet_time_scale_shift: String,
    /// A side or [rows, columns].
    sample_size: Value,
    time_embedding_dim: Option<u32>,
    time_embedding_type: String,
    up_block_types: Vec<String>,
    upsample_type: String,
}

impl Default for UNet2DModel {
    fn default() -> Self {
        UNet2DModel {
            _class_name: None,
            _class_names: None,
            _diffusers_version: None,
            _middle_attention: None,
            _null_class: false,
            _num_heads: None,
            _time_channels: None,
            _timestep_scale: None,
            act_fn: "silu".into(),
            add_attention: true,
            attention_head_dim: Some(8),
            attn_norm_num_groups: None,
            block_out_channels: vec![224, 448, 672, 896],
            center_input_sample: false,
            class_embed_type: None,
            down_block_types: [PLAIN_DOWN, ATTENTION_DOWN, ATTENTION_DOWN, ATTENTION_DOWN].map(String::from).into(),
            downsample_padding: 1,
            downsample_type: "conv".into(),
            dropout: 0.0,
            flip_sin_to_cos: true,
            freq_shift: 0,
            in_channels: 3,
            layers_per_block: 2,
            mid_block_scale_factor: 1.into(),
            mid_block_type: "UNetMidBlock2D".into(),
            norm_eps: 1e-5,
            norm_num_groups: 32,
            num_class_embeds: None,
            num_train_timesteps: Value::Null,
            out_channels: 3,
            resnet_time_scale_shift: "default".into(),
            sample_size: Value::Null,
            time_embedding_dim: None,
            time_embedding_type: "positional".into(),
            up_block_types: [ATTENTION_UP, ATTENTION_UP, ATTENTION_UP, PLAIN_UP].map(String::from).into(),
            upsample_type: "conv".into(),
        }
    }
}

/// Ours: the class of a classifier, which diffusers does not have. Of the way up it has the keys' values alone.
const CLASSIFIER: &str = "EncoderUNet2DModel";
const PLAIN_DOWN: &str = "DownBlock2D";
const RESNET_DOWN: &str = "ResnetDownsampleBlock2D";
const ATTENTION_DOWN: &str = "AttnDownBlock2D";
const PLAIN_UP: &str = "UpBlock2D";
const RESNET_UP: &str = "ResnetUpsampleBlock2D";
const ATTENTION_UP: &str = "AttnUpBlock2D";

/// The blocks of one way, and how their attention block resamples is another key's.
struct Blocks {
    /// The key of their list.
    types: &'static str,
    /// The key that says how the block with attention resamples; the other two ignore it.
    resampling: &'static str,
    attention: &'static str,
    conv: &'static str,
    resnet: &'static str,
}

const DOWN: Blocks = Blocks {
    types: "down_block_types",
    resampling: "downsample_type",
    attention: ATTENTION_DOWN,
    conv: PLAIN_DOWN,
    resnet: RESNET_DOWN,
};

const UP: Blocks = Blocks {
    types: "up_block_types",
    resampling: "upsample_type",
    attention: ATTENTION_UP,
    conv: PLAIN_UP,
    resnet: RESNET_UP,
};

impl Blocks {
    /// The type of a level's block.
    fn name(&self, attention: bool, by: Resampling) -> String {
        let name = match (attention, by) {
            (true, _) => self.attention,
            (false, Resampling::Conv) => self.conv,
            (false, Resampling::Resnet) => self.resnet,
        };
        name.into()
    }

    /// Which blocks have attention, and how all but the last resample; the last does not.
    fn read(&self, types: &[String], resampling: &str, levels: usize) -> Sentence<(Vec<bool>, Resampling)> {
        if types.len() != levels {
            return Err(format!("has {} {} for {levels} block_out_channels", types.len(), self.types));
        }
        let Some(of_attention) = Resampling::named(resampling) else {
            let value = short(&json!(resampling));
            return Err(format!("has {} = {value}; one of conv, resnet is supported", self.resampling));
        };
        let (mut attention, mut found) = (Vec::new(), None);
        for (i, name) in types.iter().enumerate() {
            let by = match name.as_str() {
                name if name == self.attention => of_attention,
                name if name == self.conv => Resampling::Conv,
                name if name == self.resnet => Resampling::Resnet,
                name => {
                    let name = short(&json!(name));
                    return Err(format!(
                        "has a block of type {name}; only {}, {} and {} are supported",
                        self.conv, self.attention, self.resnet
                    ));
                }
            };
            attention.push(name == self.attention);
            if i + 1 < levels && *found.get_or_insert(by) != by {
                return Err(format!(
                    "changes the size by convolutions at some levels and in residual blocks at others ({} and {}), which is not supported",
                    self.types, self.resampling
                ));
            }
        }
        Ok((attention, found.unwrap_or(Resampling::Conv)))
    }
}

/// `time_embedding_type` of a network that diffusers does not have. It stops diffusers, which would otherwise pass over
/// keys that begin with an underscore and compute something else.
const OURS: &str = "ddpm_cuda";

/// What of a network diffusers' `UNet2DModel` has no words for.
pub(super) fn beyond_diffusers(m: &Model) -> Option<String> {
    let middle = (m.middle_attention != MiddleAttention::None).then(|| m.levels() - 1);
    let mut attended = (0..m.levels()).filter(|&level| m.attention_at(level)).chain(middle).map(|l| m.widths[l]);
    let first = attended.next();
    if m.num_heads > 0 && attended.any(|width| Some(width) != first) {
        return Some(format!("num_heads = {} in attentions of different widths", m.num_heads));
    }
    if m.time_channels() != m.widths[0] {
        return Some(format!("time_channels = {} beside widths that start with {}", m.time_channels(), m.widths[0]));
    }
    if m.timestep_scale != 1.0 {
        return Some(format!("timestep_scale = {} (rescaled timesteps)", m.timestep_scale));
    }
    if m.middle_attention == MiddleAttention::Bare && !m.scale_shift_norm {
        return Some("middle_attention = bare without scale_shift_norm".into());
    }
    None
}

/// What of a process diffusers' `DDPMScheduler` has no words for.
pub(super) fn process_beyond_diffusers(d: &Diffusion, stepping: &Stepping) -> Option<String> {
    if d.prediction.diffusers_name().is_none() {
        return Some(format!("prediction = {}", d.prediction));
    }
    if d.variance == Variance::Learned {
        return Some(format!("variance = {}, whose output is the logarithm", d.variance));
    }
    (stepping.spacing == Spacing::Stride).then(|| format!("spacing {}", stepping.spacing))
}

impl UNet2DModel {
    /// The configuration of the network `m`, whose classes have the names `class_names`, if any.
    pub fn of(m: &Model, class_names: &[String]) -> Self {
        let levels = 0..m.levels();
        let ours = beyond_diffusers(m).is_some();
        let middle_groups = match m.middle_attention {
            MiddleAttention::Norm if m.scale_shift_norm || m.middle_groups() != m.groups => {
                Some(m.middle_groups() as u32)
            }
            _ => None,
        };
        // Of one width, since another is beyond diffusers; a network without attention has no heads.
        let heads_of = m.widths[m.levels() - 1];
        let head_dim = if m.num_heads > 0 { heads_of / m.heads(heads_of) } else { m.head_dim };
        let some = |n: usize| (n > 0).then_some(n as u32);
        let Size { h, w } = m.image_size;
        UNet2DModel {
            _class_name: Some(if m.classifier { CLASSIFIER } else { "UNet2DModel" }.into()),
            _class_names: (!class_names.is_empty()).then(|| class_names.to_vec()),
            _diffusers_version: Some(VERSION.into()),
            _middle_attention: (ours && m.middle_attention == MiddleAttention::Bare)
                .then(|| m.middle_attention.name().into()),
            _null_class: m.null_class,
            _num_heads: some(m.num_heads),
            _time_channels: ours.then(|| some(m.time_channels)).flatten(),
            _timestep_scale: (m.timestep_scale != 1.0).then_some(m.timestep_scale),
            add_attention: m.middle_attention != MiddleAttention::None,
            attention_head_dim: some(head_dim),
            attn_norm_num_groups: middle_groups,
            block_out_channels: m.widths.iter().map(|&width| width as u32).collect(),
            class_embed_type: (m.class_embedding == ClassEmbedding::Timestep).then(|| m.class_embedding.name().into()),
            down_block_types: levels.clone().map(|l| DOWN.name(m.attention_at(l), m.downsample_type)).collect(),
            downsample_padding: m.downsample_padding as u32,
            downsample_type: m.downsample_type.name().into(),
            dropout: m.dropout,
            flip_sin_to_cos: m.flip_sin_to_cos,
            freq_shift: m.freq_shift as u32,
            in_channels: m.channels as u32,
            layers_per_block: m.blocks_per_level as u32,
            norm_eps: m.norm_eps,
            norm_num_groups: m.groups as u32,
            num_class_embeds: some(m.class_rows()),
            out_channels: m.out_channels() as u32,
            resnet_time_scale_shift: if m.scale_shift_norm { SCALE_SHIFT.into() } else { "default".into() },
            sample_size: if h == w { json!(h) } else { json!([h, w]) },
            time_embedding_type: if ours { OURS.into() } else { "positional".into() },
            up_block_types: levels.rev().map(|l| UP.name(m.attention_at(l), m.upsample_type)).collect(),
            upsample_type: m.upsample_type.name().into(),
            ..UNet2DModel::default()
        }
    }
}

/// `resnet_time_scale_shift` of [`Model::scale_shift_norm`].
const SCALE_SHIFT: &str = "scale_shift";

/// What diffusers' `EMAModel` adds to the configuration of the network that it averages.
const EMA_KEYS: [&str; 7] =
    ["decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"];

/// The network that a `config.json` of `UNet2DModel` describes, and the names of its classes, if it has some.
///
/// # Errors
/// A sentence with the first key and value that this network does not support.
pub(super) fn read_model(file: &Map<String, Value>) -> Sentence<(Model, Vec<String>)> {
    let c: UNet2DModel = read(file)?;
    macro_rules! only {
        ($key:ident: $($accepted:expr),+) => {
            only(file, stringify!($key), &c.$key, &[$($accepted.into()),+])?
        };
    }
    let classifier = c._class_name.as_deref() == Some(CLASSIFIER);
    if !classifier {
        only!(_class_name: "UNet2DModel".to_string());
    }
    only!(center_input_sample: false);
    if c.time_embedding_type != OURS {
        only!(time_embedding_type: "positional");
        let ours = [
            ("_middle_attention", c._middle_attention.is_some()),
            ("_time_channels", c._time_channels.is_some()),
            ("_timestep_scale", c._timestep_scale.is_some()),
        ];
        if let Some((key, _)) = ours.into_iter().find(|(_, given)| *given) {
            let value = short(&file[key]);
            return Err(format!("has {key} = {value} with time_embedding_type = \"positional\"; {OURS:?} is expected"));
        }
    }
    only!(mid_block_type: "UNetMidBlock2D");
    only!(act_fn: "silu", "swish");
    only!(resnet_time_scale_shift: "default", SCALE_SHIFT);
    if c.class_embed_type.as_deref() == Some("identity") {
        return Err(
            "has class_embed_type = \"identity\", whose classes are vectors; only null or \"timestep\" is supported"
                .into(),
        );
    }
    only!(class_embed_type: None, Some(ClassEmbedding::Timestep.name().to_string()));
    let time_channels = c._time_channels.or(c.block_out_channels.first().copied()).unwrap_or(0);
    only!(time_embedding_dim: None, time_channels.saturating_mul(4));
    if classifier && c.out_channels != c.num_class_embeds.unwrap_or(0) {
        let (out, classes) = (c.out_channels, json!(c.num_class_embeds));
        return Err(format!("has out_channels = {out} for num_class_embeds = {classes}; a classifier has as many"));
    }
    if !classifier {
        only!(out_channels: c.in_channels, c.in_channels.saturating_mul(2));
    }
    if c.mid_block_scale_factor.as_f64() != Some(1.0) {
        return Err(format!("has mid_block_scale_factor = {}; only 1 is supported", c.mid_block_scale_factor));
    }
    let sides = match &c.sample_size {
        Value::Array(sides) if sides.len() == 2 => sides[0].as_u64().zip(sides[1].as_u64()),
        side => side.as_u64().map(|side| (side, side)),
    };
    let possible = |side: u64| (1..=65_536).contains(&side);
    let Some((h, w)) = sides.filter(|&(h, w)| possible(h) && possible(w)) else {
        let value = short(&c.sample_size);
        return Err(format!("has sample_size = {value}; the side of the images or [rows, columns] is expected"));
    };
    let image_size = Size { h: h as usize, w: w as usize };

    let levels = c.block_out_channels.len();
    let (down, downsample_type) = DOWN.read(&c.down_block_types, &c.downsample_type, levels)?;
    let (up, upsample_type) = UP.read(&c.up_block_types, &c.upsample_type, levels)?;
    if !down.iter().eq(up.iter().rev()) {
        return Err("has attention at other levels on the way up (up_block_types) than down (down_block_types), \
                    which is not supported"
            .into());
    }
    // Refuses unknown keys, unless they are private to diffusers or switched off.
    let known = json!(UNet2DModel::default());
    let off = |value: &Value| value.is_null() || *value == json!(false);
    let known = |key: &str| key.starts_with('_') || known.get(key).is_some() || EMA_KEYS.contains(&key);
    if let Some((key, value)) = file.iter().find(|(key, value)| !known(key) && !off(value)) {
        return Err(format!("has {} = {}, which is not known here", cut(key), short(value)));
    }
    let side = |level: usize| image_size.longer().checked_shr(level as u32).unwrap_or(0);
    let rows = c.num_class_embeds.unwrap_or(0) as usize;
    if c._null_class && rows < 2 {
        return Err(format!("has num_class_embeds = {rows} with _null_class; a class and the null class are expected"));
    }
    let classes = rows - usize::from(c._null_class);
    let class_embedding = match c.class_embed_type {
        None => ClassEmbedding::Table,
        Some(_) if rows == 0 => {
            return Err(
                "has class_embed_type = \"timestep\" without num_class_embeds; add it there, the number of classes"
                    .into(),
            );
        }
        Some(_) => ClassEmbedding::Timestep,
    };
    let scale_shift_norm = c.resnet_time_scale_shift == SCALE_SHIFT;
    // diffusers takes the groups of the other norms without scale_shift, and leaves the middle's norm out with it.
    let (middle_attention, middle_groups) = match (c.add_attention, c.attn_norm_num_groups) {
        (false, _) => (MiddleAttention::None, 0),
        (true, Some(0)) => return Err("has attn_norm_num_groups = 0; at least 1 group is expected".into()),
        (true, Some(groups)) if groups == c.norm_num_groups => (MiddleAttention::Norm, 0),
        (true, Some(groups)) => (MiddleAttention::Norm, groups as usize),
        (true, None) if scale_shift_norm => (MiddleAttention::Bare, 0),
        (true, None) => (MiddleAttention::Norm, 0),
    };
    let middle_attention = match c._middle_attention.as_deref() {
        None => middle_attention,
        Some(name) => MiddleAttention::named(name).ok_or_else(|| {
            format!("has _middle_attention = {}; {}", short(&json!(name)), names::expected::<MiddleAttention>())
        })?,
    };
    let (head_dim, num_heads) = match c._num_heads {
        Some(heads) => (0, heads as usize),
        None => (c.attention_head_dim.unwrap_or(0) as usize, 0),
    };
    let class_names = c._class_names.unwrap_or_default();
    if class_names.len() > classes {
        let (names, classes) = (class_names.len(), json!(c.num_class_embeds));
        return Err(format!(
            "has {names} _class_names for num_class_embeds = {classes}; at most one a class is expected"
        ));
    }
    let model = Model {
        image_size,
        channels: c.in_channels as usize,
        widths: c.block_out_channels.iter().map(|&width| width as usize).collect(),
        blocks_per_level: c.layers_per_block as usize,
        attention_resolutions: (0..levels).filter(|&level| down[level]).map(side).collect(),
        middle_attention,
        head_dim,
        num_heads,
        groups: c.norm_num_groups as usize,
        middle_groups,
        norm_eps: c.norm_eps,
        scale_shift_norm,
        downsample_type,
        upsample_type,
        dropout: c.dropout,
        classes,
        class_embedding,
        null_class: c._null_class,
        learned_variance: !classifier && c.out_channels != c.in_channels,
        classifier,
        downsample_padding: c.downsample_padding as usize,
        freq_shift: c.freq_shift as usize,
        flip_sin_to_cos: c.flip_sin_to_cos,
        time_channels: c._time_channels.unwrap_or(0) as usize,
        timestep_scale: c._timestep_scale.unwrap_or(1.0),
    };
    Ok((model, class_names))
}

/// `scheduler/scheduler_config.json`.
#[derive(Serialize, Deserialize)]
#[serde(default)]
pub(super) struct DDPMScheduler {
    _class_name: Option<String>,
    _diffusers_version: Option<String>,
    /// Ours, for what diffusers has no name for: a prediction and a variance of this program.
    #[serde(skip_serializing_if = "Option::is_none")]
    _prediction: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    _variance: Option<String>,
    beta_end: f64,
    /// Null is linear.
    beta_schedule: Option<String>,
    beta_start: f64,
    clip_sample: bool,
    clip_sample_range: f64,
    dynamic_thresholding_ratio: f64,
    num_train_timesteps: u32,
    prediction_type: String,
    rescale_betas_zero_snr: bool,
    sample_max_value: f64,
    steps_offset: u32,
    thresholding: bool,
    timestep_spacing: String,
    trained_betas: Option<Vec<f64>>,
    /// Other schedulers than DDPM's lack this key; DDPM's default is `fixed_small`.
    variance_type: Option<String>,
}

impl Default for DDPMScheduler {
    fn default() -> Self {
        DDPMScheduler {
            _class_name: None,
            _diffusers_version: None,
            _prediction: None,
            _variance: None,
            beta_end: 0.02,
            beta_schedule: Some("linear".into()),
            beta_start: 1e-4,
            clip_sample: true,
            clip_sample_range: 1.0,
            dynamic_thresholding_ratio: 0.995,
            num_train_timesteps: 1000,
            prediction_type: "epsilon".into(),
            rescale_betas_zero_snr: false,
            sample_max_value: 1.0,
            steps_offset: 0,
            thresholding: false,
            timestep_spacing: "leading".into(),
            trained_betas: None,
            variance_type: Some("fixed_small".into()),
        }
    }
}

/// `variance_type` of [`Variance::Learned`], which diffusers does not have and stops at.
const LEARNED_LOG: &str = "learned_log";

/// And of [`Variance::LearnedRaw`].
const LEARNED_RAW: &str = "learned";

impl DDPMScheduler {
    /// The configuration of the process `d` with steps as `stepping` says.
    ///
    /// # Errors
    /// Those of [`Diffusion::noise_schedule`].
    pub fn of(d: &Diffusion, stepping: &Stepping) -> Result<Self> {
        let (beta_start, beta_end) = d.end_betas();
        // What we do by default is what others read; that all timesteps take `fixed_large` is a word of our own.
        let small = d.variance == Variance::FixedLarge && stepping.small_if_fewer;
        // diffusers has no constant schedule but accepts any betas.
        let trained_betas = match (d.trained_betas.is_empty(), d.schedule.diffusers_name()) {
            (true, Some(_)) => None,
            _ => Some(d.noise_schedule()?.betas().to_vec()),
        };
        Ok(DDPMScheduler {
            _class_name: Some("DDPMScheduler".into()),
            _diffusers_version: Some(VERSION.into()),
            _prediction: d.prediction.diffusers_name().is_none().then(|| d.prediction.name().into()),
            _variance: (small || d.variance == Variance::Learned).then(|| d.variance.name().into()),
            beta_end,
            beta_schedule: Some(d.schedule.diffusers_name().unwrap_or("linear").into()),
            beta_start,
            num_train_timesteps: d.timesteps as u32,
            // Names that diffusers does not know stop it, rather than being passed over.
            prediction_type: d.prediction.diffusers_name().unwrap_or(d.prediction.name()).into(),
            rescale_betas_zero_snr: d.zero_snr,
            clip_sample: stepping.clip,
            clip_sample_range: stepping.clip_range,
            dynamic_thresholding_ratio: stepping.threshold.map_or(0.995, |t| t.ratio),
            sample_max_value: stepping.threshold.map_or(1.0, |t| t.largest),
            steps_offset: stepping.steps_offset,
            thresholding: stepping.threshold.is_some(),
            timestep_spacing: match stepping.spacing {
                Spacing::Leading => "leading".into(),
                Spacing::Trailing => "trailing".into(),
                _ => "linspace".into(),
            },
            trained_betas,
            variance_type: Some(match d.variance {
                _ if small => Variance::FixedSmall.name().into(),
                // diffusers' `learned` is the variance itself, not its logarithm.
                Variance::Learned => LEARNED_LOG.into(),
                Variance::LearnedRaw => LEARNED_RAW.into(),
                named => named.name().into(),
            }),
        })
    }
}

/// How a model's scheduler steps, as far as it concerns other samplers too: what `sample` does by default.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stepping {
    /// Which timesteps are kept.
    pub spacing: Spacing,
    /// Added to the timesteps of [`Spacing::Leading`].
    pub steps_offset: u32,
    /// Whether the predicted x_0 is clipped to [-`clip_range`, `clip_range`]. Not where `threshold` is given.
    pub clip: bool,
    /// The largest absolute value that is left; above 0.
    pub clip_range: f64,
    /// Dynamic thresholding of the predicted x_0, in place of clipping.
    pub threshold: Option<Threshold>,
    /// Whether ancestral sampling over fewer steps than timesteps takes `fixed_small` in place of `fixed_large`, as
    /// this program does with its own models and diffusers with none.
    pub small_if_fewer: bool,
}

/// Dynamic thresholding (Saharia et al. 2022, section 2.3): each image's x_0 is clipped to [-s, s] and divided by s. s
/// is a quantile of its absolute values, but at least 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threshold {
    /// Which quantile, in (0, 1].
    pub ratio: f64,
    /// The largest s, above 1.
    pub largest: f64,
}

impl Stepping {
    /// What this program does with its own models.
    pub const OURS: Stepping = Stepping {
        spacing: Spacing::Even,
        steps_offset: 0,
        clip: true,
        clip_range: 1.0,
        threshold: None,
        small_if_fewer: true,
    };

    /// And with those of others whose files say nothing of it.
    pub const FOREIGN: Stepping = Stepping { small_if_fewer: false, ..Stepping::OURS };
}

/// Schedulers over the process of a DDPM: betas over `num_train_timesteps` and a network that is given a timestep.
/// They differ in how they step, and in the defaults of absent keys.
const LEADING: [&str; 7] = [
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
];
const LINSPACE: [&str; 9] = [
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
];
/// Absent betas are those of latent diffusion, 0.00085 to 0.012.
const LINSPACE_LATENT: [&str; 4] =
    ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"];

/// Those that clip x_0 unless they say otherwise.
const CLIPPING: [&str; 6] = [
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "RePaintScheduler",
];

/// Refuses a scheduler whose process is not a DDPM's.
///
/// # Errors
/// A sentence with the class.
pub(super) fn check_scheduler(class: &str) -> Sentence<()> {
    if [&LEADING[..], &LINSPACE, &LINSPACE_LATENT].concat().contains(&class) {
        return Ok(());
    }
    let begins = |names: &[&str]| names.iter().any(|name| class.starts_with(name));
    let why = if begins(&["FlowMatch", "FlowMap", "Helios", "LTXEuler"]) {
        "its network predicts the velocity of flow matching, not the noise of a DDPM"
    } else if begins(&["EDM", "KarrasVe", "CosineDPM"]) {
        "its noise levels are the sigmas of EDM, without timesteps"
    } else if begins(&["ScoreSde"]) {
        "its process is a stochastic differential equation in continuous time"
    } else if begins(&["LCM", "TCD", "CMStochastic", "Consistency", "SCM"]) {
        "its network is distilled to a consistency model of few steps"
    } else if begins(&["VQDiffusion", "Amused", "DiscreteDDIM", "BlockRefinement", "EntropyBound"]) {
        "its process works on tokens, not on the pixels of images"
    } else {
        "its process is not known here"
    };
    let class = short(&json!(class));
    Err(format!(
        "has _class_name = {class}: {why}; a scheduler with betas over discrete timesteps is supported, such as DDPMScheduler or DDIMScheduler"
    ))
}

/// Keys of the accepted schedulers that change how they step, not the process, and that other samplers do not have;
/// with the values that ask for nothing unusual.
const STEPS_ONLY: [(&str, &[&str]); 29] = [
    ("algorithm_type", &["\"dpmsolver++\"", "\"data_prediction\"", "\"deis\""]),
    ("clip_predicted_image", &["true"]),
    ("corrector_order", &["2"]),
    ("disable_corrector", &["[]"]),
    ("eta", &["0", "0.0"]),
    ("euler_at_final", &["false"]),
    ("final_sigmas_type", &["\"zero\""]),
    ("flow_shift", &["1", "1.0"]),
    ("interpolation_type", &["\"linear\""]),
    ("lambda_min_clipped", &["\"-inf\""]),
    ("lower_order_final", &["true"]),
    ("noise_sampler_seed", &[]),
    ("predict_x0", &["true"]),
    ("predictor_order", &["2"]),
    ("set_alpha_to_one", &["true"]),
    ("shift_terminal", &[]),
    ("sigma_max", &[]),
    ("sigma_min", &[]),
    ("skip_prk_steps", &["false", "true"]),
    ("solver_order", &["2"]),
    ("solver_p", &[]),
    ("solver_type", &["\"midpoint\"", "\"bh2\"", "\"logrho\""]),
    ("tau_func", &[]),
    ("tensor_format", &["\"pt\"", "\"np\""]),
    ("time_shift_type", &["\"exponential\""]),
    ("use_beta_sigmas", &["false"]),
    ("use_exponential_sigmas", &["false"]),
    ("use_karras_sigmas", &["false"]),
    ("use_lu_lambdas", &["false"]),
];

/// A sentence about the keys of a `scheduler_config.json` that ask for steps which `sample` does not take.
pub(super) fn steps_not_taken(file: &Map<String, Value>) -> Option<String> {
    let asked: Vec<String> = STEPS_ONLY
        .iter()
        .filter_map(|(key, usual)| Some((key, usual, file.get(*key).filter(|value| !value.is_null())?)))
        .filter(|(_, usual, value)| !usual.contains(&value.to_string().as_str()))
        .map(|(key, _, value)| format!("{key} = {}", short(value)))
        .collect();
    let karras = file.get("use_karras_sigmas") == Some(&json!(true));
    let remedy = if karras { "; --spacing karras takes its noise levels" } else { "" };
    let how = "--sampler and --spacing say how steps are taken";
    (!asked.is_empty()).then(|| format!("{} is not taken over: {how}{remedy}", asked.join(", ")))
}

/// The process that a `scheduler_config.json` of any of diffusers' discrete schedulers describes, and the parts of its
/// stepping that other samplers can take over. The network must predict the noise.
///
/// # Errors
/// A sentence with the first key and value that is not supported.
pub(super) fn read_diffusion(file: &Map<String, Value>) -> Sentence<(Diffusion, Stepping)> {
    let mut c: DDPMScheduler = read(file)?;
    let class = c._class_name.as_deref().unwrap_or("DDPMScheduler");
    check_scheduler(class)?;
    let absent = |key: &str| !file.contains_key(key);
    if !LEADING.contains(&class) && absent("timestep_spacing") {
        c.timestep_spacing = "linspace".into();
    }
    if LINSPACE_LATENT.contains(&class) {
        c.beta_start = if absent("beta_start") { 0.00085 } else { c.beta_start };
        c.beta_end = if absent("beta_end") { 0.012 } else { c.beta_end };
    }
    if !CLIPPING.contains(&class) && absent("clip_sample") {
        c.clip_sample = false;
    }
    if c.clip_sample && (c.clip_sample_range <= 0.0 || !c.clip_sample_range.is_finite()) {
        return Err(format!("has clip_sample_range = {}; a number above 0 is expected", c.clip_sample_range));
    }
    let threshold = if c.thresholding {
        let Threshold { ratio, largest } =
            Threshold { ratio: c.dynamic_thresholding_ratio, largest: c.sample_max_value };
        if !(ratio > 0.0 && ratio <= 1.0) {
            return Err(format!("has dynamic_thresholding_ratio = {ratio}; a number above 0 and up to 1 is expected"));
        }
        if !(1.0..f64::INFINITY).contains(&largest) {
            return Err(format!("has sample_max_value = {largest}; a number from 1 on is expected"));
        }
        (c.clip_sample, c.clip_sample_range) = (true, 1.0);
        // With 1, the default of diffusers, s is always 1: plain clipping.
        (largest > 1.0).then_some(Threshold { ratio, largest })
    } else {
        None
    };
    // Keys of some schedulers only, with the values under which the process is a DDPM's.
    let others = [
        ("predict_epsilon", json!(true)), // prediction_type before diffusers 0.9
        ("use_flow_sigmas", json!(false)),
        ("use_dynamic_shifting", json!(false)),
        ("timestep_type", json!("discrete")),
        // eps is derived again from the limited x_0. Where nothing is limited, that is no difference.
        ("use_clipped_model_output", json!(true)),
    ];
    let known = json!(DDPMScheduler::default());
    for (key, value) in file.iter().filter(|(key, value)| !key.starts_with('_') && !value.is_null()) {
        if let Some((_, only)) = others.iter().find(|(other, _)| other == key) {
            if value != only && (key != "use_clipped_model_output" || c.clip_sample) {
                return Err(format!("has {key} = {}; only {only} is supported", short(value)));
            }
        } else if known.get(key).is_none() && *value != json!(false) && !STEPS_ONLY.iter().any(|(only, _)| only == key)
        {
            let remedy = "take it out if it changes only how steps are taken";
            return Err(format!("has {} = {}, which is not known here; {remedy}", cut(key), short(value)));
        }
    }
    let prediction = c._prediction.as_deref().unwrap_or(&c.prediction_type);
    let Some(prediction) = Prediction::named(prediction) else {
        let known = "one of epsilon, sample, v_prediction is supported";
        return Err(format!("has prediction_type = {}; {known}", short(&json!(prediction))));
    };
    let variance = match (c._variance.as_deref(), c.variance_type.as_deref()) {
        (Some("learned"), Some(LEARNED_LOG)) => Variance::Learned,
        (Some("fixed_large"), Some("fixed_small")) => Variance::FixedLarge,
        (None, None | Some("fixed_small" | "fixed_small_log")) => Variance::FixedSmall,
        (None, Some("fixed_large")) => Variance::FixedLarge,
        (None, Some("learned_range")) => Variance::LearnedRange,
        // diffusers takes the output itself for the variance.
        (None, Some(LEARNED_RAW)) => Variance::LearnedRaw,
        (_, other) => {
            let known = "one of fixed_small, fixed_large, learned, learned_range is supported";
            return Err(format!("has variance_type = {}; {known}", short(&json!(other))));
        }
    };
    let spacing = match c.timestep_spacing.as_str() {
        "leading" => Spacing::Leading,
        "linspace" => Spacing::Even,
        "trailing" => Spacing::Trailing,
        other => {
            let known = "one of leading, linspace, trailing is supported";
            return Err(format!("has timestep_spacing = {}; {known}", short(&json!(other))));
        }
    };
    let stepping = Stepping {
        spacing,
        steps_offset: c.steps_offset,
        clip: c.clip_sample,
        clip_range: if c.clip_sample { c.clip_sample_range } else { 1.0 },
        threshold,
        small_if_fewer: c._variance.as_deref() == Some("fixed_large"),
    };
    let timesteps = c.num_train_timesteps as usize;
    if !(2..=MOST_TIMESTEPS).contains(&timesteps) {
        return Err(format!("has num_train_timesteps = {timesteps}; from 2 to {MOST_TIMESTEPS} are supported"));
    }
    let process = |schedule: Kind| Diffusion {
        schedule,
        timesteps,
        beta_start: 0.0,
        beta_end: 0.0,
        trained_betas: Vec::new(),
        zero_snr: c.rescale_betas_zero_snr,
        prediction,
        variance,
    };
    // End values that are the default are left to it, so that they have its bits.
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b;
    let unless_default = |value: f64, default: f64| if close(value, default) { 0.0 } else { value };
    let possible = |beta: f64| beta > 0.0 && beta < 1.0;
    let (start, end) = Kind::default_betas(timesteps);

    if let Some(betas) = c.trained_betas {
        if betas.len() != timesteps {
            return Err(format!("has {} trained_betas for num_train_timesteps = {timesteps}", betas.len()));
        }
        let last_is_one = |t: usize, beta: f64| beta == 1.0 && t + 1 == timesteps;
        let impossible = |&(t, &beta): &(usize, &f64)| !(possible(beta) || last_is_one(t, beta));
        if let Some((t, beta)) = betas.iter().enumerate().find(impossible) {
            return Err(format!("has {beta} in trained_betas at timestep {t}; numbers between 0 and 1 are expected"));
        }
        let same = betas.iter().all(|&beta| beta == betas[0]);
        return Ok(match same {
            true => (Diffusion { beta_end: unless_default(betas[0], end), ..process(Kind::Constant) }, stepping),
            false => (Diffusion { trained_betas: betas, ..process(Kind::Linear) }, stepping),
        });
    }
    let name = c.beta_schedule.as_deref().unwrap_or("linear");
    if let Some(betas) = betas_of_diffusers(name, timesteps) {
        return Ok((Diffusion { trained_betas: betas, ..process(Kind::Linear) }, stepping));
    }
    let Some(schedule) = Kind::ALL.into_iter().find(|kind| kind.diffusers_name() == Some(name)) else {
        let known: Vec<&str> = Kind::ALL.into_iter().filter_map(Kind::diffusers_name).collect();
        let (name, known) = (short(&json!(name)), known.join(", "));
        return Err(format!("has beta_schedule = {name}; one of {known}, laplace, exp is supported"));
    };
    if schedule == Kind::Cosine {
        return Ok((process(schedule), stepping));
    }
    for (key, value) in [("beta_start", c.beta_start), ("beta_end", c.beta_end)] {
        if !possible(value) {
            return Err(format!("has {key} = {value}; a number between 0 and 1 is expected"));
        }
    }
    let beta_start = unless_default(c.beta_start, start);
    let beta_end = unless_default(c.beta_end, end);
    Ok((Diffusion { beta_start, beta_end, ..process(schedule) }, stepping))
}

/// Refuses a pipeline whose network does not work on images alone, by its `model_index.json`.
///
/// # Errors
/// A sentence with the pipeline and the part that says so.
pub(super) fn check_pipeline(index: &Map<String, Value>) -> Sentence<()> {
    let of_parts = index.iter().filter(|(name, _)| !name.starts_with('_'));
    for (name, value) in of_parts {
        let class = value.get(1).and_then(Value::as_str);
        match (name.as_str(), class) {
            ("scheduler", Some(class)) => check_scheduler(class)?,
            ("unet" | "scheduler", _) | (_, None) => {}
            (name, Some(class)) => {
                let pipeline = index.get("_class_name").map_or("a pipeline".into(), short);
                return Err(format!(
                    "is of {pipeline} with {} ({}): {}; a pipeline of unet and scheduler alone is supported, such as DDPMPipeline",
                    cut(name),
                    cut(class),
                    foreign_part(name)
                ));
            }
        }
    }
    Ok(())
}

/// Parts of pipelines whose U-Net works on latents.
pub(super) const AUTOENCODERS: [&str; 3] = ["vae", "vqvae", "movq"];

/// Why a pipeline with the part `name` is none of images alone.
pub(super) fn foreign_part(name: &str) -> &'static str {
    match name {
        name if AUTOENCODERS.contains(&name) => "its U-Net works on latents, not on images",
        "text_encoder" | "bert" | "tokenizer" => "its U-Net is conditioned on text",
        "transformer" => "its network is a transformer, not a U-Net",
        _ => "it is not known here what its U-Net works on",
    }
}

/// A configuration from its file; absent keys get the defaults of the class.
///
/// # Errors
/// A sentence with the first key whose value has the wrong type, and the type expected.
fn read<C: DeserializeOwned>(file: &Map<String, Value>) -> Sentence<C> {
    // Key by key, since serde does not say which key it failed at.
    for (key, value) in file {
        let most = if ["trained_betas", "_class_names"].contains(&key.as_str()) { MOST_TIMESTEPS } else { 1000 };
        if let Some(items) = value.as_array().filter(|items| items.len() > most) {
            return Err(format!("has a list of {} as {}; at most {most} are read", items.len(), cut(key)));
        }
        let alone = Value::Object(Map::from_iter([(key.clone(), value.clone())]));
        if let Err(e) = serde_json::from_value::<C>(alone) {
            let text = e.to_string();
            let expected = match text.rsplit_once("expected ").map_or("another type", |(_, expected)| expected) {
                "u32" => "a whole number from 0 to 4294967295",
                "f64" => "a number",
                "a boolean" => "true or false",
                "a sequence" => "a list",
                expected => expected,
            };
            return Err(format!("has {} = {}; {expected} is expected", cut(key), short(value)));
        }
    }
    serde_json::from_value(Value::Object(file.clone())).map_err(|e| format!("cannot be understood: {e}"))
}

/// Refuses a value of `key` that is not among those accepted.
fn only<T: PartialEq + Serialize>(file: &Map<String, Value>, key: &str, value: &T, accepted: &[T]) -> Sentence<()> {
    if accepted.contains(value) {
        return Ok(());
    }
    let whence = if file.contains_key(key) { "" } else { " (the default of diffusers)" };
    let accepted: Vec<String> = accepted.iter().map(|value| json!(value).to_string()).collect();
    Err(format!("has {key} = {}{whence}; only {} is supported", short(&json!(value)), accepted.join(" or ")))
}

/// A value for a sentence.
fn short(value: &Value) -> String {
    cut(&value.to_string())
}
