//! The U-Net of the DDPM paper (Ho et al. 2020, appendix B; hojonathanho's `unet.py`), eps_theta(x_t, t).
//!
//! Shapes: n images, h x w pixels at the level in question, c channels, e = 4 widths\[0\] time features (or 4
//! `time_channels`). Parameter
//! names are those of diffusers' `UNet2DModel`, whose structure with `downsample_padding: 0`, `freq_shift: 1` and
//! `flip_sin_to_cos: false` is the paper's.
//!
//! - time: sinusoid(t) -> linear -> SiLU -> linear (+ class embedding); SiLU again before each block's projection
//! - residual block: GN SiLU conv3x3, + projected time, GN SiLU dropout conv3x3, + input (1x1 convolution if c changes)
//! - attention block: GN, q k v, softmax(q k^T / sqrt(d)) v, projection, + input
//! - down: after each level but the last, a conv3x3 of stride 2, padded right and bottom only (`downsample_padding: 0`)
//! - up: nearest x2, conv3x3; every block on the way up takes the concatenation `[h, skip]`. On a GPU neither upsampled
//!   nor concatenated tensors are made: what reads them reads the tensors that they consist of
//!
//! And the network of OpenAI's improved-diffusion and guided-diffusion (Nichol and Dhariwal 2021; Dhariwal and Nichol
//! 2021), each part of it a setting of its own:
//!
//! - `scale_shift_norm`: the projected time gives a scale and a shift, and the second norm becomes
//!   GN (1 + scale) + shift instead of the sum before it
//! - `downsample_type`, `upsample_type` = resnet: a residual block between levels, which halves or doubles the image
//!   after its first SiLU, and its input as well; 2x2 means or repeated pixels
//! - `num_heads`, `head_dim`; `timestep_scale`; `time_channels`, the length of the sinusoid where it is not widths\[0\]
//!
//! A classifier p(y given x_t), for guidance, is the way down and the middle alone, with attention pooling in place of
//! the way up: the first of the tokens \[mean, pixels\] attends to all of them, and a linear layer makes the classes'
//! logits of it.
//!
//! A residual block is two parts, each of which ends with a convolution. If the tape is to recompute (a setting), it
//! keeps the inputs of the parts or of the whole block alone.
//!
//! Deliberately absent: resampling without weights, learned upsampling filters.

mod cost;

use std::sync::Arc;

use crate::conditioning::Conditioning;
use crate::config::{ClassEmbedding, MiddleAttention, Model, Resampling, Size};
use crate::error::Result;
use crate::ops::add::add;
use crate::ops::attention::{attention, attention_then_linear};
use crate::ops::avg_pool::avg_pool;
use crate::ops::concat::Joined;
use crate::ops::conv2d::{Geometry, Input, Pad, Plus, Shortcut, conv2d};
use crate::ops::embedding::embedding;
use crate::ops::group_norm::{Activation, Then, group_norm, scale_shift_group_norm};
use crate::ops::linear::{linear, linear_silu, linears};
use crate::ops::pool;
use crate::ops::silu::silu;
use crate::ops::time_embedding::{Sinusoid, Times, time_embedding};
use crate::params::{Init, Layout, Param, Specs};
use crate::rng::{Purpose, Streams};
use crate::tape::{Backward, Grads, Recompute, Tape, Var};
use crate::tensor::{Shape, Tensor};
use crate::usage;
pub use cost::Cost;

/// The paper initialises the last layer of every residual branch to almost zero: `init_scale=0` means 1e-10 in its
/// code.
const ALMOST_ZERO: f64 = 1e-10;

/// log2 of the dropout streams of a layer, one per image of a step.
const DROPOUT_IMAGES: u32 = 20;

/// Where a training step's dropout masks come from.
#[derive(Clone, Copy, Debug)]
pub struct DropoutSeed {
    /// The run's seed.
    pub seed: u64,
    /// The step within the run; each step has its own masks.
    pub step: u32,
    /// Index in the step's batch of the first image of this pass, so that micro-batches get the masks of the whole
    /// batch.
    pub first: u32,
}

struct Norm {
    gamma: Param,
    beta: Param,
    groups: usize,
}

/// Weight and bias of a convolution or a linear layer.
struct Affine {
    weight: Param,
    bias: Param,
}

struct Resnet {
    place: String,
    index: u32,
    change: Change,
    norm1: Norm,
    conv1: Affine,
    time_emb_proj: Affine,
    norm2: Norm,
    conv2: Affine,
    conv_shortcut: Option<Affine>,
}

/// What a residual block does to the size of its image.
#[derive(Clone, Copy, PartialEq)]
enum Change {
    Keep,
    Halve,
    Double,
}

struct Attention {
    place: String,
    heads: usize,
    /// Only the middle's may be absent.
    group_norm: Option<Norm>,
    to_q: Affine,
    to_k: Affine,
    to_v: Affine,
    to_out: Affine,
}

/// One level on the way down or up: its blocks and what leads to the next level.
struct Level {
    blocks: Vec<(Arc<Resnet>, Option<Attention>)>,
    resample: Option<Resample>,
}

impl Level {
    /// Its residual blocks, in order.
    fn resnets(&self) -> Vec<&Arc<Resnet>> {
        let between = match &self.resample {
            Some(Resample::Resnet(resnet)) => Some(resnet),
            _ => None,
        };
        self.blocks.iter().map(|(resnet, _)| resnet).chain(between).collect()
    }
}

/// What halves or doubles the image between two levels.
enum Resample {
    Conv { place: String, conv: Affine },
    Resnet(Arc<Resnet>),
}

/// How classes become time features.
enum Classes {
    Table(Param),
    /// Two linear layers, as those of the timestep.
    Timestep(Affine, Affine),
}

/// The last layer.
enum Head {
    /// A convolution to the predicted noise.
    Noise(Affine),
    /// A classifier's.
    Classes(Pool),
}

/// Attention pooling and the layer after it.
struct Pool {
    heads: usize,
    positional_embedding: Param,
    to_q: Affine,
    to_k: Affine,
    to_v: Affine,
    to_classes: Affine,
}

/// The network: handles of its parameters and how they are connected. The values are in
/// [`Params`](crate::params::Params).
pub struct UNet {
    model: Arc<Model>,
    conv_in: Affine,
    time_linear_1: Affine,
    time_linear_2: Affine,
    class_embedding: Option<Classes>,
    down: Vec<Level>,
    middle: (Arc<Resnet>, Option<Attention>, Arc<Resnet>),
    up: Vec<Level>,
    conv_norm_out: Norm,
    head: Head,
}

/// Registers parameters under diffusers' names while the network is built.
struct Builder<'a> {
    specs: Specs,
    model: &'a Model,
    resnets: u32,
}

impl Builder<'_> {
    fn norm(&mut self, name: &str, c: usize) -> Norm {
        let gamma = self.specs.add(format!("{name}.weight"), Shape::vector(c), Layout::Vector, Init::Ones);
        Norm { gamma, beta: self.bias(name, c), groups: self.model.groups }
    }

    fn conv(&mut self, name: &str, c_in: usize, c_out: usize, k: usize, scale: f64) -> Affine {
        let shape = Shape::new(c_out, k, k, c_in);
        let weight = self.specs.add(format!("{name}.weight"), shape, Layout::Conv, Init::FanAvg { scale });
        Affine { weight, bias: self.bias(name, c_out) }
    }

    fn linear(&mut self, name: &str, c_in: usize, c_out: usize, scale: f64) -> Affine {
        let shape = Shape::new(c_out, 1, 1, c_in);
        let weight = self.specs.add(format!("{name}.weight"), shape, Layout::Matrix, Init::FanAvg { scale });
        Affine { weight, bias: self.bias(name, c_out) }
    }

    fn bias(&mut self, name: &str, c: usize) -> Param {
        self.specs.add(format!("{name}.bias"), Shape::vector(c), Layout::Vector, Init::Zeros)
    }

    fn resample(&mut self, place: String, c: usize, by: Resampling, change: Change) -> Resample {
        match by {
            Resampling::Conv => Resample::Conv { conv: self.conv(&format!("{place}.conv"), c, c, 3, 1.0), place },
            Resampling::Resnet => Resample::Resnet(self.resnet(place, c, c, change)),
        }
    }

    fn resnet(&mut self, place: String, c_in: usize, c_out: usize, change: Change) -> Arc<Resnet> {
        self.resnets += 1;
        let of_time = if self.model.scale_shift_norm { 2 * c_out } else { c_out };
        Arc::new(Resnet {
            index: self.resnets - 1,
            change,
            norm1: self.norm(&format!("{place}.norm1"), c_in),
            conv1: self.conv(&format!("{place}.conv1"), c_in, c_out, 3, 1.0),
            time_emb_proj: self.linear(&format!("{place}.time_emb_proj"), time_features(self.model), of_time, 1.0),
            norm2: self.norm(&format!("{place}.norm2"), c_out),
            conv2: self.conv(&format!("{place}.conv2"), c_out, c_out, 3, ALMOST_ZERO),
            conv_shortcut: (c_in != c_out).then(|| self.conv(&format!("{place}.conv_shortcut"), c_in, c_out, 1, 1.0)),
            place,
        })
    }

    fn attention(&mut self, place: String, c: usize, groups: Option<usize>) -> Attention {
        Attention {
            heads: self.model.heads(c),
            group_norm: groups.map(|groups| Norm { groups, ..self.norm(&format!("{place}.group_norm"), c) }),
            to_q: self.linear(&format!("{place}.to_q"), c, c, 1.0),
            to_k: self.linear(&format!("{place}.to_k"), c, c, 1.0),
            to_v: self.linear(&format!("{place}.to_v"), c, c, 1.0),
            to_out: self.linear(&format!("{place}.to_out.0"), c, c, ALMOST_ZERO),
            place,
        }
    }

    fn middle_attention(&mut self, c: usize) -> Option<Attention> {
        let groups = match self.model.middle_attention {
            MiddleAttention::Norm => Some(self.model.middle_groups()),
            MiddleAttention::Bare => None,
            MiddleAttention::None => return None,
        };
        Some(self.attention("mid_block.attentions.0".into(), c, groups))
    }

    /// The pooling of images of `pixels` pixels.
    fn pool(&mut self, c: usize, pixels: usize) -> Pool {
        let shape = Shape::new(pixels + 1, 1, 1, c);
        // Uniform, of the variance 1/c.
        let init = Init::FanAvg { scale: (shape.n + c) as f64 / (2 * c) as f64 };
        Pool {
            heads: self.model.heads(c),
            positional_embedding: self.specs.add("pool.positional_embedding".into(), shape, Layout::Matrix, init),
            to_q: self.linear("pool.to_q", c, c, 1.0),
            to_k: self.linear("pool.to_k", c, c, 1.0),
            to_v: self.linear("pool.to_v", c, c, 1.0),
            to_classes: self.linear("pool.to_classes", c, self.model.classes, 1.0),
        }
    }

    /// Residual block `j` of a level, and the attention block after it if the level has attention.
    fn block(
        &mut self,
        level: &str,
        j: usize,
        c_in: usize,
        c_out: usize,
        attention: bool,
    ) -> (Arc<Resnet>, Option<Attention>) {
        let resnet = self.resnet(format!("{level}.resnets.{j}"), c_in, c_out, Change::Keep);
        let groups = Some(self.model.groups);
        (resnet, attention.then(|| self.attention(format!("{level}.attentions.{j}"), c_out, groups)))
    }
}

impl UNet {
    /// Builds the network and the list of its parameters.
    ///
    /// # Errors
    /// What [`Model::validate`] refuses, and a classifier without classes or an image size.
    pub fn new(model: &Model) -> Result<(UNet, Specs)> {
        model.validate()?;
        if model.classifier && (model.classes < 2 || model.image_size == Size::DATA) {
            let (classes, size) = (model.classes, model.image_size);
            usage!(
                "a classifier of classes = {classes} and image_size = {size}: it needs two classes or more and a size"
            );
        }
        let mut b = Builder { specs: Specs::default(), model, resnets: 0 };
        let (widths, levels) = (&model.widths, model.levels());

        let conv_in = b.conv("conv_in", model.channels, widths[0], 3, 1.0);
        let time_linear_1 = b.linear("time_embedding.linear_1", model.time_channels(), time_features(model), 1.0);
        let time_linear_2 = b.linear("time_embedding.linear_2", time_features(model), time_features(model), 1.0);
        let class_embedding = model.is_conditional().then(|| match model.class_embedding {
            ClassEmbedding::Table => {
                let shape = Shape::new(model.class_rows(), 1, 1, time_features(model));
                Classes::Table(b.specs.add("class_embedding.weight".into(), shape, Layout::Matrix, Init::Normal))
            }
            ClassEmbedding::Timestep => Classes::Timestep(
                b.linear("class_embedding.linear_1", model.time_channels(), time_features(model), 1.0),
                b.linear("class_embedding.linear_2", time_features(model), time_features(model), 1.0),
            ),
        });

        let mut c = widths[0];
        let mut skips = vec![c];
        let mut down = Vec::new();
        for (i, &width) in widths.iter().enumerate() {
            let place = format!("down_blocks.{i}");
            let mut blocks = Vec::new();
            for j in 0..model.blocks_per_level {
                blocks.push(b.block(&place, j, c, width, model.attention_at(i)));
                c = width;
                skips.push(c);
            }
            let resample = (i + 1 < levels)
                .then(|| b.resample(format!("{place}.downsamplers.0"), c, model.downsample_type, Change::Halve));
            if resample.is_some() {
                skips.push(c);
            }
            down.push(Level { blocks, resample });
        }

        let middle = (
            b.resnet("mid_block.resnets.0".into(), c, c, Change::Keep),
            b.middle_attention(c),
            b.resnet("mid_block.resnets.1".into(), c, c, Change::Keep),
        );

        let mut up = Vec::new();
        let levels_up = if model.classifier { 0 } else { levels };
        for (i, level) in (0..levels).rev().take(levels_up).enumerate() {
            let place = format!("up_blocks.{i}");
            let width = widths[level];
            let mut blocks = Vec::new();
            for j in 0..=model.blocks_per_level {
                let skip = skips.pop().expect("one skip per block of the way up");
                blocks.push(b.block(&place, j, c + skip, width, model.attention_at(level)));
                c = width;
            }
            let resample = (level > 0)
                .then(|| b.resample(format!("{place}.upsamplers.0"), c, model.upsample_type, Change::Double));
            up.push(Level { blocks, resample });
        }

        let conv_norm_out = b.norm("conv_norm_out", c);
        let head = match model.classifier {
            false => Head::Noise(b.conv("conv_out", c, model.out_channels(), 3, ALMOST_ZERO)),
            true => Head::Classes(b.pool(c, model.size_at(levels - 1).pixels())),
        };
        let unet = UNet {
            model: Arc::new(model.clone()),
            conv_in,
            time_linear_1,
            time_linear_2,
            class_embedding,
            down,
            middle,
            up,
            conv_norm_out,
            head,
        };
        Ok((unet, b.specs))
    }

    /// What it was built from.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The network's output, (n, h, w, out_channels), for noisy images `x` (n, h, w, channels) at timesteps `t`, in
    /// 0..T, a tensor (n, 1, 1, 1), f32, or other [`Times`]: the prediction in the first `channels`, and the variance
    /// in as many more if it is learned; of a classifier the logits of p(y given x_t), (n, 1, 1, classes). Output and
    /// intermediate values have the type of `x`, the device's activation type.
    ///
    /// h and w must divide by 2^(levels - 1); a classifier takes images of its model's size alone. `conditioning` has
    /// labels, all below `class_rows`, if and only if the network is conditional, which a classifier is not. `dropout`
    /// applies the masks of a training step; `None` drops nothing.
    ///
    /// # Errors
    /// A non-finite value on a tape that checks for them, and a GPU that fails.
    pub fn forward<'t>(
        &self,
        tape: &mut Tape<'_>,
        x: &Var,
        t: impl Into<Times<'t>>,
        conditioning: &Conditioning,
        dropout: Option<DropoutSeed>,
    ) -> Result<Var> {
        let h = self.trunk(tape, x, t.into(), conditioning, dropout)?; // (n, h, w, c)
        match &self.head {
            Head::Noise(conv_out) => conv3x3(tape, &h, conv_out), // (n, h, w, out_channels)
            Head::Classes(pool) => {
                let features = pool.features(tape, &h)?; // (n, 1, 1, c)
                dense(tape, &features, &pool.to_classes) // (n, 1, 1, classes)
            }
        }
    }

    /// Of a classifier: what its last layer sees, (n, 1, 1, c) with c the width of the coarsest level, and the logits,
    /// (n, 1, 1, classes).
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn features(&self, tape: &mut Tape<'_>, x: &Var, t: &Tensor) -> Result<(Var, Var)> {
        let Head::Classes(pool) = &self.head else { panic!("features of a network that is no classifier") };
        let h = self.trunk(tape, x, t.into(), &Conditioning::NONE, None)?; // (n, h, w, c)
        let features = pool.features(tape, &h)?; // (n, 1, 1, c)
        let logits = dense(tape, &features, &pool.to_classes)?; // (n, 1, 1, classes)
        Ok((features, logits))
    }

    /// Every residual block, in the order of the network, which is that of their indices.
    fn resnets(&self) -> Vec<&Arc<Resnet>> {
        let down = self.down.iter().flat_map(Level::resnets);
        let up = self.up.iter().flat_map(Level::resnets);
        down.chain([&self.middle.0, &self.middle.2]).chain(up).collect()
    }

    /// Everything before the head, (n, h, w, c): at full size, or of a classifier at the coarsest level.
    fn trunk(
        &self,
        tape: &mut Tape<'_>,
        x: &Var,
        t: Times<'_>,
        conditioning: &Conditioning,
        dropout: Option<DropoutSeed>,
    ) -> Result<Var> {
        let m = &self.model;
        let s = x.shape();
        let multiple = 1 << (m.levels() - 1);
        assert!(
            s.h.is_multiple_of(multiple) && s.w.is_multiple_of(multiple),
            "{s} must divide by {multiple} in h and w"
        );
        assert_eq!(s.n, t.count(), "{} images but {} timesteps", s.n, t.count());
        assert_eq!(conditioning.labels().is_some(), m.is_conditional(), "labels go with a conditional network");

        tape.at("time_embedding");
        let form = Sinusoid { freq_shift: m.freq_shift, flip_sin_to_cos: m.flip_sin_to_cos, scale: m.timestep_scale };
        let temb = Var::constant(time_embedding(tape.device(), t, m.time_channels(), form)?); // (n, 1, 1, e/4)
        let temb = dense_silu(tape, &temb, &self.time_linear_1)?; // (n, 1, 1, e)
        // What every block projects is the SiLU of the second layer, to which a class is added before it.
        let temb = match (&self.class_embedding, conditioning.labels()) {
            (Some(Classes::Table(table)), Some(labels)) => {
                let temb = dense(tape, &temb, &self.time_linear_2)?; // (n, 1, 1, e)
                let temb = embedding(tape, *table, labels, &temb)?; // (n, 1, 1, e)
                silu(tape, &temb)? // (n, 1, 1, e)
            }
            (Some(Classes::Timestep(linear_1, linear_2)), Some(labels)) => {
                let temb = dense(tape, &temb, &self.time_linear_2)?; // (n, 1, 1, e)
                tape.at("class_embedding");
                let form = Sinusoid { scale: 1.0, ..form };
                let c = time_embedding(tape.device(), labels, m.time_channels(), form)?; // (n, 1, 1, e/4)
                let c = Var::constant(c);
                let c = dense_silu(tape, &c, linear_1)?; // (n, 1, 1, e)
                let c = dense(tape, &c, linear_2)?; // (n, 1, 1, e)
                let temb = add(tape, &temb, &c)?; // (n, 1, 1, e)
                silu(tape, &temb)? // (n, 1, 1, e)
            }
            _ => dense_silu(tape, &temb, &self.time_linear_2)?, // (n, 1, 1, e)
        };
        tape.at("time_embedding");
        let resnets = self.resnets();
        assert!(resnets.iter().enumerate().all(|(i, resnet)| resnet.index as usize == i));
        let projections = resnets.into_iter().map(|resnet| &resnet.time_emb_proj).collect();
        let times = denses(tape, &temb, projections)?; // of each block (n, 1, 1, c), or 2c: scale and shift

        tape.at("conv_in");
        let mut h = conv3x3(tape, x, &self.conv_in)?; // (n, h, w, widths[0])
        let mut skips = vec![h.clone()];
        for level in &self.down {
            for (resnet, attention) in &level.blocks {
                h = resnet.forward(tape, m, &h, None, &times, dropout)?; // (n, h, w, width)
                if let Some(attention) = attention {
                    h = attention.forward(tape, m, &h)?; // (n, h, w, width)
                }
                skips.push(h.clone());
            }
            if let Some(down) = &level.resample {
                h = match down {
                    Resample::Conv { place, conv } => {
                        tape.at(place);
                        let before = m.downsample_padding;
                        let pad = Pad { top: before, left: before, bottom: 1, right: 1 };
                        let halve = Geometry { stride: 2, pad };
                        conv2d(tape, &h, conv.weight, conv.bias, halve, Plus::default())? // (n, h/2, w/2, width)
                    }
                    Resample::Resnet(resnet) => {
                        resnet.forward(tape, m, &h, None, &times, dropout)? // (n, h/2, w/2, width)
                    }
                };
                skips.push(h.clone());
            }
        }

        h = self.middle.0.forward(tape, m, &h, None, &times, dropout)?;
        if let Some(attention) = &self.middle.1 {
            h = attention.forward(tape, m, &h)?;
        }
        h = self.middle.2.forward(tape, m, &h, None, &times, dropout)?;

        for level in &self.up {
            for (resnet, attention) in &level.blocks {
                let skip = skips.pop().expect("one skip per block of the way up");
                h = resnet.forward(tape, m, &h, Some(&skip), &times, dropout)?; // (n, h, w, width)
                if let Some(attention) = attention {
                    h = attention.forward(tape, m, &h)?; // (n, h, w, width)
                }
            }
            match &level.resample {
                Some(Resample::Conv { place, conv }) => {
                    tape.at(place);
                    h = conv3x3(tape, Input::doubled(&h), conv)?; // (n, 2h, 2w, width)
                }
                Some(Resample::Resnet(resnet)) => {
                    h = resnet.forward(tape, m, &h, None, &times, dropout)?; // (n, 2h, 2w, width)
                }
                None => {}
            }
        }

        tape.at(self.head.place());
        norm(tape, m, &h, &self.conv_norm_out, Activation::Silu) // (n, h, w, c)
    }
}

impl Head {
    /// Where it is in the network.
    fn place(&self) -> &'static str {
        match self {
            Head::Noise(_) => "conv_out",
            Head::Classes(_) => "pool",
        }
    }
}

impl Pool {
    fn features(&self, tape: &mut Tape<'_>, x: &Var) -> Result<Var> {
        let tokens = pool::tokens(tape, x, self.positional_embedding)?; // (n, 1, h w + 1, c)
        let qkv = denses(tape, &tokens, vec![&self.to_q, &self.to_k, &self.to_v])?; // each (n, 1, h w + 1, c)
        // All tokens attend, though only the first is looked at: at this level they are few.
        let tokens = attention(tape, &qkv[0], &qkv[1], &qkv[2], self.heads)?; // (n, 1, h w + 1, c)
        pool::first(tape, &tokens) // (n, 1, 1, c)
    }
}

impl Resnet {
    /// Of `x` or, on the way up, of the concatenation of `x` and `skip`.
    fn forward(
        self: &Arc<Self>,
        tape: &mut Tape<'_>,
        m: &Arc<Model>,
        x: &Var,
        skip: Option<&Var>,
        times: &[Var],
        masks: Option<DropoutSeed>,
    ) -> Result<Var> {
        tape.at(&self.place);
        let time = &times[self.index as usize]; // (n, 1, 1, c), or 2c: scale and shift
        match tape.recompute() {
            Recompute::None => {
                let h = self.first(tape, m, x, skip, time)?; // (n, h, w, c)
                self.second(tape, m, &h, x, skip, time, masks) // (n, h, w, c)
            }
            Recompute::Cheap => {
                let of = |h| Part::new(self, m, h, x, skip, time, masks);
                let h = of(Half::First).push(tape)?; // (n, h, w, c)
                of(Half::Second(h)).push(tape) // (n, h, w, c)
            }
            Recompute::Blocks => Part::new(self, m, Half::Both, x, skip, time, masks).push(tape), // (n, h, w, c)
        }
    }

    /// Up to the first convolution: (n, h, w, c), with the block's h and w.
    fn first(&self, tape: &mut Tape<'_>, m: &Model, x: &Var, skip: Option<&Var>, time: &Var) -> Result<Var> {
        let joined = skip.map_or_else(|| Joined::from(x), |skip| Joined::from([x, skip])); // (n, h, w, c_in)
        let h = norm(tape, m, joined, &self.norm1, Activation::Silu)?; // (n, h, w, c_in)
        // From here on h and w are those of the block's output.
        let h = match self.change {
            Change::Keep => Input::from(&h),                    // (n, h, w, c_in)
            Change::Double => Input::doubled(&h),               // (n, h, w, c_in)
            Change::Halve => Input::from(&avg_pool(tape, &h)?), // (n, h, w, c_in)
        };
        let plus = Plus { shift: (!m.scale_shift_norm).then_some(time), ..Plus::default() };
        conv2d(tape, h, self.conv1.weight, self.conv1.bias, Geometry::SAME_3X3, plus)
    }

    /// From the first convolution's output `h`, (n, h, w, c), to the block's, of the same shape.
    #[expect(clippy::too_many_arguments, reason = "all that a block sees")]
    fn second(
        &self,
        tape: &mut Tape<'_>,
        m: &Model,
        h: &Var,
        x: &Var,
        skip: Option<&Var>,
        time: &Var,
        masks: Option<DropoutSeed>,
    ) -> Result<Var> {
        // Each is (n, h, w, c_in), or (n, h/2, w/2, c_in) in a block that doubles.
        let x = if self.change == Change::Halve { avg_pool(tape, x)? } else { x.clone() };
        let joined = skip.map_or_else(|| Joined::from(&x), |skip| Joined::from([&x, skip]));
        let dropout = masks.map(|DropoutSeed { seed, step, first }| {
            let end = first as usize + h.shape().n;
            assert!(end <= 1 << DROPOUT_IMAGES, "dropout for {end} images in a step: a layer has 2^20 streams");
            let first = (self.index << DROPOUT_IMAGES) + first;
            (m.dropout as f32, Streams { seed, purpose: Purpose::Dropout, step, first })
        });
        let then = Then { activation: Activation::Silu, dropout };
        let h = if m.scale_shift_norm {
            let (Norm { gamma, beta, groups }, eps) = (&self.norm2, m.norm_eps as f32);
            scale_shift_group_norm(tape, h, time, *gamma, *beta, *groups, eps, then)? // (n, h, w, c)
        } else {
            norm(tape, m, h, &self.norm2, then)? // (n, h, w, c)
        };
        let conv = self.conv_shortcut.as_ref();
        let conv = conv.map(|s| Shortcut { x: joined, weight: s.weight, bias: s.bias });
        let residual = if conv.is_none() { Some(&x) } else { None };
        let plus = Plus { shift: None, residual, shortcut: conv.as_ref() };
        conv2d(tape, &h, self.conv2.weight, self.conv2.bias, Geometry::SAME_3X3, plus) // (n, h, w, c)
    }
}

/// What of a residual block is recorded as a whole.
enum Half {
    First,
    /// After the first half's output.
    Second(Var),
    Both,
}

/// A residual block, or half of it, of which the tape keeps the inputs alone.
struct Part {
    resnet: Arc<Resnet>,
    model: Arc<Model>,
    half: Half,
    x: Var,
    skip: Option<Var>,
    time: Var,
    masks: Option<DropoutSeed>,
}

impl Part {
    fn new(
        resnet: &Arc<Resnet>,
        model: &Arc<Model>,
        half: Half,
        x: &Var,
        skip: Option<&Var>,
        time: &Var,
        masks: Option<DropoutSeed>,
    ) -> Self {
        let (resnet, model) = (resnet.clone(), model.clone());
        Part { resnet, model, half, x: x.clone(), skip: skip.cloned(), time: time.clone(), masks }
    }

    fn push(self, tape: &mut Tape<'_>) -> Result<Var> {
        let [x, skip, time, h] = self.inputs().map(|input| input.cloned());
        let forward = |tape: &mut Tape<'_>| self.forward(tape, [x, skip, time, h]);
        let y = tape.compute_part(forward)?;
        tape.push("resnet", y, || self)
    }

    /// x, skip, the projected time and the first half's output, as far as there are any.
    fn inputs(&self) -> [Option<&Var>; 4] {
        let h = if let Half::Second(h) = &self.half { Some(h) } else { None };
        [Some(&self.x), self.skip.as_ref(), Some(&self.time), h]
    }

    fn forward(&self, tape: &mut Tape<'_>, [x, skip, time, h]: [Option<Var>; 4]) -> Result<Var> {
        let Part { resnet, model: m, masks, .. } = self;
        let (x, skip, time) = (x.expect("an input"), skip.as_ref(), time.expect("an input"));
        match (&self.half, h) {
            (Half::First, _) => resnet.first(tape, m, &x, skip, &time), // (n, h, w, c)
            (_, Some(h)) => resnet.second(tape, m, &h, &x, skip, &time, *masks), // (n, h, w, c)
            (_, None) => {
                let h = resnet.first(tape, m, &x, skip, &time)?; // (n, h, w, c)
                resnet.second(tape, m, &h, &x, skip, &time, *masks) // (n, h, w, c)
            }
        }
    }
}

impl Backward for Part {
    fn name(&self) -> &'static str {
        "resnet"
    }

    fn saved(&self) -> Vec<&Tensor> {
        self.inputs().into_iter().flatten().map(Var::value).collect()
    }

    /// It ends with a convolution.
    fn wants_pixel_sums(&self) -> bool {
        true
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let last = if let Half::First = self.half { &self.resnet.conv1 } else { &self.resnet.conv2 };
        let forward = |tape: &mut Tape<'_>, inputs: [Option<Var>; 4]| self.forward(tape, inputs);
        grads.again(&self.resnet.place, self.inputs(), last.weight, dy, forward)
    }
}

impl Attention {
    fn forward(&self, tape: &mut Tape<'_>, m: &Model, x: &Var) -> Result<Var> {
        tape.at(&self.place);
        let h = match &self.group_norm {
            Some(group_norm) => norm(tape, m, x, group_norm, Activation::Identity)?, // (n, h, w, c)
            None => x.clone(),
        };
        let qkv = denses(tape, &h, vec![&self.to_q, &self.to_k, &self.to_v])?; // each (n, h, w, c)
        let qkv = [&qkv[0], &qkv[1], &qkv[2]];
        attention_then_linear(tape, qkv, self.heads, self.to_out.weight, self.to_out.bias, x) // (n, h, w, c)
    }
}

/// e: features of the time embedding.
fn time_features(model: &Model) -> usize {
    4 * model.time_channels()
}

fn conv3x3(tape: &mut Tape<'_>, x: impl Into<Input>, conv: &Affine) -> Result<Var> {
    conv2d(tape, x, conv.weight, conv.bias, Geometry::SAME_3X3, Plus::default())
}

fn dense(tape: &mut Tape<'_>, x: &Var, layer: &Affine) -> Result<Var> {
    linear(tape, x, layer.weight, Some(layer.bias), None)
}

fn dense_silu(tape: &mut Tape<'_>, x: &Var, layer: &Affine) -> Result<Var> {
    linear_silu(tape, x, layer.weight, layer.bias)
}

/// Layers of the same `x`.
fn denses(tape: &mut Tape<'_>, x: &Var, layers: Vec<&Affine>) -> Result<Vec<Var>> {
    let layers: Vec<(Param, Param)> = layers.iter().map(|layer| (layer.weight, layer.bias)).collect();
    linears(tape, x, &layers)
}

fn norm(tape: &mut Tape<'_>, m: &Model, x: impl Into<Joined>, norm: &Norm, then: impl Into<Then>) -> Result<Var> {
    group_norm(tape, x, norm.gamma, norm.beta, norm.groups, m.norm_eps as f32, then)
}
