//! The configuration files of diffusers: a struct for each class, with its arguments in the order of the file and its
//! defaults, and the translation from and to ours.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::{Diffusion, Model, Size};
use crate::diffusion::{Kind, Schedule, Variance};
use crate::error::Result;

/// The version of diffusers whose file format this is.
pub(super) const VERSION: &str = "0.42.1";

/// A result whose error is a sentence that begins with the name of the file.
type Sentence<T> = std::result::Result<T, String>;

/// `unet/config.json`.
#[derive(Serialize, Deserialize)]
#[serde(default)]
pub(super) struct UNet2DModel {
    _class_name: Option<String>,
    _diffusers_version: Option<String>,
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
            _diffusers_version: None,
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

const PLAIN_DOWN: &str = "DownBlock2D";
const ATTENTION_DOWN: &str = "AttnDownBlock2D";
const PLAIN_UP: &str = "UpBlock2D";
const ATTENTION_UP: &str = "AttnUpBlock2D";

impl UNet2DModel {
    /// The configuration of the network `m`.
    pub fn of(m: &Model) -> Self {
        let types = |level: usize, with: &str, without: &str| {
            if m.attention_at(level) { with.to_string() } else { without.to_string() }
        };
        let levels = 0..m.levels();
        let some = |n: usize| (n > 0).then_some(n as u32);
        let Size { h, w } = m.image_size;
        UNet2DModel {
            _class_name: Some("UNet2DModel".into()),
            _diffusers_version: Some(VERSION.into()),
            attention_head_dim: some(m.head_dim),
            block_out_channels: m.widths.iter().map(|&width| width as u32).collect(),
            down_block_types: levels.clone().map(|level| types(level, ATTENTION_DOWN, PLAIN_DOWN)).collect(),
            downsample_padding: m.downsample_padding as u32,
            dropout: m.dropout,
            flip_sin_to_cos: m.flip_sin_to_cos,
            freq_shift: m.freq_shift as u32,
            in_channels: m.channels as u32,
            layers_per_block: m.blocks_per_level as u32,
            norm_eps: m.norm_eps,
            norm_num_groups: m.groups as u32,
            num_class_embeds: some(m.classes),
            out_channels: m.out_channels() as u32,
            sample_size: if h == w { json!(h) } else { json!([h, w]) },
            up_block_types: levels.rev().map(|level| types(level, ATTENTION_UP, PLAIN_UP)).collect(),
            ..UNet2DModel::default()
        }
    }
}

/// The network that a `config.json` of `UNet2DModel` describes.
///
/// # Errors
/// A sentence with the first key and value that this network does not support.
pub(super) fn read_model(file: &Map<String, Value>) -> Sentence<Model> {
    let c: UNet2DModel = read(file)?;
    macro_rules! only {
        ($key:ident: $($accepted:expr),+) => {
            only(file, stringify!($key), &c.$key, &[$($accepted.into()),+])?
        };
    }
    only!(_class_name: "UNet2DModel".to_string());
    only!(center_input_sample: false);
    only!(time_embedding_type: "positional");
    only!(mid_block_type: "UNetMidBlock2D");
    only!(downsample_type: "conv");
    only!(upsample_type: "conv");
    only!(act_fn: "silu", "swish");
    only!(resnet_time_scale_shift: "default");
    only!(add_attention: true);
    only!(class_embed_type: None);
    only!(attn_norm_num_groups: None, c.norm_num_groups);
    only!(time_embedding_dim: None, 4 * c.block_out_channels.first().copied().unwrap_or(0));
    only!(out_channels: c.in_channels);
    if c.mid_block_scale_factor.as_f64() != Some(1.0) {
        return Err(format!("has mid_block_scale_factor = {}; only 1 is supported", c.mid_block_scale_factor));
    }
    let sides = match &c.sample_size {
        Value::Array(sides) if sides.len() == 2 => sides[0].as_u64().zip(sides[1].as_u64()),
        side => side.as_u64().map(|side| (side, side)),
    };
    let possible = |side: u64| (1..=65_536).contains(&side);
    let Some((h, w)) = sides.filter(|&(h, w)| possible(h) && possible(w)) else {
        let value = &c.sample_size;
        return Err(format!("has sample_size = {value}; the side of the images or [rows, columns] is expected"));
    };
    let image_size = Size { h: h as usize, w: w as usize };

    let levels = c.block_out_channels.len();
    let attention = |key: &str, types: &[String], with: &str, without: &str| -> Sentence<Vec<bool>> {
        if types.len() != levels {
            return Err(format!("has {} {key} for {levels} block_out_channels", types.len()));
        }
        let has_attention = |name: &String| match name {
            name if name == with => Ok(true),
            name if name == without => Ok(false),
            name => Err(format!("has a block of type {name:?}; only {without} and {with} are supported")),
        };
        types.iter().map(has_attention).collect()
    };
    let down = attention("down_block_types", &c.down_block_types, ATTENTION_DOWN, PLAIN_DOWN)?;
    let up = attention("up_block_types", &c.up_block_types, ATTENTION_UP, PLAIN_UP)?;
    if !down.iter().eq(up.iter().rev()) {
        return Err("has attention at other levels on the way up (up_block_types) than down (down_block_types), \
                    which is not supported"
            .into());
    }
    // Refuses unknown keys, unless they are private to diffusers or switched off.
    let known = json!(UNet2DModel::default());
    let off = |value: &Value| value.is_null() || *value == json!(false);
    if let Some((key, value)) =
        file.iter().find(|(key, v)| !key.starts_with('_') && known.get(key).is_none() && !off(v))
    {
        return Err(format!("has {key} = {value}, which is not known here"));
    }
    let side = |level: usize| image_size.longer().checked_shr(level as u32).unwrap_or(0);
    Ok(Model {
        image_size,
        channels: c.in_channels as usize,
        widths: c.block_out_channels.iter().map(|&width| width as usize).collect(),
        blocks_per_level: c.layers_per_block as usize,
        attention_resolutions: (0..levels).filter(|&level| down[level]).map(side).collect(),
        head_dim: c.attention_head_dim.unwrap_or(0) as usize,
        groups: c.norm_num_groups as usize,
        norm_eps: c.norm_eps,
        dropout: c.dropout,
        classes: c.num_class_embeds.unwrap_or(0) as usize,
        downsample_padding: c.downsample_padding as usize,
        freq_shift: c.freq_shift as usize,
        flip_sin_to_cos: c.flip_sin_to_cos,
    })
}

/// `scheduler/scheduler_config.json`.
#[derive(Serialize, Deserialize)]
#[serde(default)]
pub(super) struct DDPMScheduler {
    _class_name: Option<String>,
    _diffusers_version: Option<String>,
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

impl DDPMScheduler {
    /// The configuration of the process `d`.
    ///
    /// # Errors
    /// Those of [`Schedule::new`].
    pub fn of(d: &Diffusion) -> Result<Self> {
        let (beta_start, beta_end) = Kind::default_betas(d.timesteps);
        // diffusers has no constant schedule but accepts any betas.
        let trained_betas = match d.schedule.diffusers_name() {
            Some(_) => None,
            None => Some(Schedule::new(d.schedule, d.timesteps)?.betas().to_vec()),
        };
        Ok(DDPMScheduler {
            _class_name: Some("DDPMScheduler".into()),
            _diffusers_version: Some(VERSION.into()),
            beta_end,
            beta_schedule: Some(d.schedule.diffusers_name().unwrap_or("linear").into()),
            beta_start,
            num_train_timesteps: d.timesteps as u32,
            trained_betas,
            variance_type: Some(d.variance.name().into()),
            ..DDPMScheduler::default()
        })
    }
}

/// The process that a `scheduler_config.json` of any of diffusers' discrete schedulers describes: its betas and its
/// variance. It must predict noise and clip x_0. How that scheduler steps is ignored; `--sampler` decides.
///
/// # Errors
/// A sentence with the first key and value that is not supported.
pub(super) fn read_diffusion(file: &Map<String, Value>) -> Sentence<Diffusion> {
    let c: DDPMScheduler = read(file)?;
    macro_rules! only {
        ($key:ident: $accepted:expr) => {
            only(file, stringify!($key), &c.$key, &[$accepted.into()])?
        };
    }
    only!(prediction_type: "epsilon");
    only!(clip_sample: true);
    only!(clip_sample_range: 1.0);
    only!(thresholding: false);
    only!(rescale_betas_zero_snr: false);
    let variance = match c.variance_type.as_deref() {
        None | Some("fixed_small" | "fixed_small_log") => Variance::FixedSmall,
        Some("fixed_large") => Variance::FixedLarge,
        Some(other) => {
            let known = "only \"fixed_small\" and \"fixed_large\" are supported";
            return Err(format!("has variance_type = {other:?}; {known}"));
        }
    };
    let timesteps = c.num_train_timesteps as usize;
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b;
    let (start, end) = Kind::default_betas(timesteps.max(1));

    if let Some(betas) = &c.trained_betas {
        if betas.len() != timesteps || !betas.iter().all(|&beta| close(beta, end)) {
            let supported = format!("only {timesteps} times {end} (the constant schedule) is supported");
            return Err(format!("has trained_betas; {supported}"));
        }
        return Ok(Diffusion { schedule: Kind::Constant, timesteps, variance });
    }
    let name = c.beta_schedule.as_deref().unwrap_or("linear");
    let Some(schedule) = Kind::ALL.into_iter().find(|kind| kind.diffusers_name() == Some(name)) else {
        let known: Vec<&str> = Kind::ALL.into_iter().filter_map(Kind::diffusers_name).collect();
        return Err(format!("has beta_schedule = {name:?}; one of {} is supported", known.join(", ")));
    };
    if schedule != Kind::Cosine {
        for (key, value, want) in [("beta_start", c.beta_start, start), ("beta_end", c.beta_end, end)] {
            if !close(value, want) {
                return Err(format!("has {key} = {value}; for {timesteps} timesteps only {want} is supported"));
            }
        }
    }
    Ok(Diffusion { schedule, timesteps, variance })
}

/// A configuration from its file; absent keys get the defaults of the class.
///
/// # Errors
/// A sentence with the first key whose value has the wrong type, and the type expected.
fn read<C: DeserializeOwned>(file: &Map<String, Value>) -> Sentence<C> {
    // Key by key, since serde does not say which key it failed at.
    for (key, value) in file {
        let alone = Value::Object(Map::from_iter([(key.clone(), value.clone())]));
        if let Err(e) = serde_json::from_value::<C>(alone) {
            let text = e.to_string();
            let expected = match text.rsplit_once("expected ").map_or("another type", |(_, expected)| expected) {
                "u32" => "a whole number",
                "f64" => "a number",
                "a boolean" => "true or false",
                "a sequence" => "a list, one entry a level,",
                expected => expected,
            };
            return Err(format!("has {key} = {value}; {expected} is expected"));
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
    Err(format!("has {key} = {}{whence}; only {} is supported", json!(value), accepted.join(" or ")))
}
