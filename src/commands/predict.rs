//! `ddpm-cuda predict`: evaluates the network once, from NumPy arrays to a NumPy array, to compare it with other
//! implementations.

use std::path::{Path, PathBuf};

use super::sampling::guidance_of;
use super::{Of, On, choice};
use crate::conditioning::Conditioning;
use crate::config::{Diffusion, Model};
use crate::data::npy;
use crate::diffusion::prediction::Mix;
use crate::diffusion::{Prediction, Schedule, Variance};
use crate::error::{Error, Result};
use crate::layout;
use crate::names::names;
use crate::output;
use crate::tape::{Tape, Var};
use crate::tensor::{Shape, Tensor};
use crate::unet::UNet;

/// What is made of the network's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// The noise.
    Eps,
    /// The image.
    X0,
    /// v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0.
    V,
    /// The mean of p(x_{t-1} | x_t).
    Mu,
    /// The logarithm of its variance.
    LogVariance,
    /// The score -eps / sqrt(1 - alpha_bar).
    Score,
    /// All channels as they are.
    Raw,
}

names!(Output {
    Eps = "eps",
    X0 = "x0",
    V = "v",
    Mu = "mu",
    LogVariance = "log_variance",
    Score = "score",
    Raw = "raw",
});

/// Arguments of `ddpm-cuda predict`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `--model` and `--set`
    #[command(flatten)]
    pub of: Of,
    /// x_t: f32, images x channels x rows x columns
    #[arg(long, value_name = "X.npy")]
    pub x: PathBuf,
    /// Timesteps, one an image
    #[arg(long, value_name = "T.npy")]
    pub t: PathBuf,
    /// Classes, one an image, for a conditional model
    #[arg(long, value_name = "L.npy")]
    pub labels: Option<PathBuf>,
    /// What to give: the prediction converted, unclipped, or raw, all channels [default: the network's prediction]
    #[arg(long, value_name = "WHAT", value_parser = choice::<Output>())]
    pub output: Option<Output>,
    /// Classifier-free guidance, as in sample; the variance stays that of the class
    #[arg(long, value_name = "W", allow_negative_numbers = true)]
    pub guidance: Option<f64>,
    /// The output: f32, images x channels x rows x columns
    #[arg(long, value_name = "OUT.npy")]
    pub out: PathBuf,
    /// `--device`, `--precision` and `--eager`
    #[command(flatten)]
    pub on: On,
}

/// Runs the command.
///
/// # Errors
/// `Error::Usage` for labels that are missing or not wanted; `Error::File` for arrays that do not fit the model and
/// files that cannot be read or written; those of [`On::open`].
pub fn run(args: &Args) -> Result<()> {
    let device = args.on.open()?;
    let model = args.of.load(&device)?;
    let m = &model.config.model;
    let (unet, _) = UNet::new(m)?;

    let x = npy::read(&args.x)?;
    let multiple = 1 << (m.levels() - 1);
    let shape = match x.shape[..] {
        [n, c, h, w]
            if c == m.channels
                && n > 0
                && h > 0
                && w > 0
                && h.is_multiple_of(multiple)
                && w.is_multiple_of(multiple) =>
        {
            Shape::new(n, h, w, c)
        }
        _ => {
            let what = format!(
                "holds an array of shape {:?}, but this model takes images x {} x rows x columns, rows and columns multiples of {multiple}",
                x.shape, m.channels
            );
            return Err(Error::file(&args.x, what));
        }
    };
    let x = x.to_f32().map_err(|e| Error::file(&args.x, e))?;
    let t = one_per_image(&args.t, shape.n)?.to_f32().map_err(|e| Error::file(&args.t, e))?;
    for (path, numbers) in [(&args.x, &x), (&args.t, &t)] {
        if let Some(bad) = numbers.iter().find(|v| !v.is_finite()) {
            return Err(Error::file(path, format!("holds {bad}; only finite numbers can be evaluated")));
        }
    }
    let labels = match (&args.labels, m.classes) {
        (None, 0) => None,
        (None, classes) => {
            return Err(Error::Usage(format!(
                "this model has {classes} classes: give one an image with --labels L.npy"
            )));
        }
        (Some(path), 0) => {
            return Err(Error::Usage(format!(
                "--labels {}: this model is unconditional, leave --labels out",
                path.display()
            )));
        }
        (Some(path), classes) => Some(
            one_per_image(path, shape.n)?
                .to_i64()
                .map_err(|e| Error::file(path, e))?
                .iter()
                .map(|&l| usize::try_from(l).ok().filter(|&l| l < classes).map(|l| l as f32).ok_or(l))
                .collect::<std::result::Result<Vec<f32>, i64>>()
                .map_err(|l| {
                    Error::file(
                        path,
                        format!("holds the class {l}, but this model has the classes 0 to {}", classes - 1),
                    )
                })?,
        ),
    };

    let guidance = args.guidance.map(|weight| guidance_of(weight, m)).transpose()?.filter(|g| g.weight != 1.0);
    let process = &model.config.diffusion;
    let schedule = process.noise_schedule()?;
    let conversion = Conversion { process, model: m, schedule: &schedule, output: args.output };
    let steps = conversion.steps(&args.t, &t)?;

    let x = layout::to_channels_last(&x, shape.c, shape.pixels());
    let forward = |labels: Option<&[f32]>| -> Result<Vec<f32>> {
        let mut tape = Tape::inference(&device, &model.params);
        let x = Var::constant(Tensor::from_slice_as(&device, device.activations(), shape, &x)?); // (n, h, w, c)
        let per_image = Shape::new(shape.n, 1, 1, 1);
        let t = Tensor::from_slice(&device, per_image, &t)?;
        let labels = labels.map(|l| Tensor::from_slice(&device, per_image, l)).transpose()?;
        let conditioning = labels.map_or(Conditioning::NONE, Conditioning::on_labels);
        unet.forward(&mut tape, &x, &t, &conditioning, None)?.into_value().to_vec() // (n, h, w, c or 2c)
    };
    let mut y = forward(labels.as_deref())?;
    if let Some(guidance) = guidance {
        let without = forward(Some(&vec![m.classes as f32; shape.n]))?;
        // The variance is that of the class.
        let pixels = y.chunks_exact_mut(m.out_channels()).zip(without.chunks_exact(m.out_channels()));
        for (with, without) in pixels.flat_map(|(with, without)| with.iter_mut().zip(without).take(shape.c)) {
            *with = (f64::from(*without) + guidance.weight * (f64::from(*with) - f64::from(*without))) as f32;
        }
    }
    let y = conversion.of(&x, &y, &steps, shape);
    let channels = y.len() / shape.rows();
    let y = layout::to_channels_first(&y, channels, shape.pixels());
    output::write_npy(&args.out, &[shape.n, channels, shape.h, shape.w], &y)
}

/// From what the network puts out to what is asked for.
struct Conversion<'a> {
    process: &'a Diffusion,
    model: &'a Model,
    schedule: &'a Schedule,
    output: Option<Output>,
}

/// What one timestep makes of the output.
enum At {
    /// Nothing.
    Same,
    /// A mixture of x_t and the prediction.
    Mixed(Mix),
    /// The logarithm of a variance: `offset + factor v`.
    LogVariance(f64, f64),
    /// The logarithm of v, which is a variance.
    LogOfRaw,
}

impl Conversion<'_> {
    /// For each image, whose timestep must be a whole one of the model unless nothing is converted.
    fn steps(&self, path: &Path, t: &[f32]) -> Result<Vec<At>> {
        let last = self.schedule.len() - 1;
        let own = match self.process.prediction {
            Prediction::Eps => Output::Eps,
            Prediction::X0 => Output::X0,
            Prediction::V => Output::V,
            Prediction::Mu => Output::Mu,
        };
        let output = self.output.filter(|&output| output != own && output != Output::Raw);
        t.iter()
            .map(|&time| {
                let Some(output) = output else { return Ok(At::Same) };
                if time.fract() != 0.0 || time < 0.0 || time > last as f32 {
                    let what =
                        format!("holds the timestep {time}, but --output {output} needs whole ones from 0 to {last}");
                    return Err(Error::file(path, what));
                }
                self.at(output, time as usize)
            })
            .collect()
    }

    fn at(&self, output: Output, t: usize) -> Result<At> {
        let (s, prediction) = (self.schedule, self.process.prediction);
        let (signal, noise) = s.q_sample_coefficients(t);
        assert!(signal > 0.0 || prediction != Prediction::Eps, "eps with zero terminal SNR, which no model loads with");
        let (x_0, eps) = (prediction.x_0(s, t), prediction.eps(s, t));
        let mix = |of_x_0: f64, of_eps: f64| Mix {
            xt: of_x_0 * x_0.xt + of_eps * eps.xt,
            output: of_x_0 * x_0.output + of_eps * eps.output,
        };
        Ok(At::Mixed(match output {
            Output::Eps => eps,
            Output::X0 => x_0,
            Output::V => mix(-noise, signal),
            Output::Score => mix(0.0, -1.0 / noise),
            Output::Mu => {
                let (c_x0, c_xt) = s.posterior_mean_coefficients(t);
                let mean = mix(c_x0, 0.0);
                Mix { xt: mean.xt + c_xt, ..mean }
            }
            Output::LogVariance => {
                let (offset, factor) = match self.process.variance {
                    Variance::Learned => (0.0, 1.0),
                    Variance::LearnedRaw => return Ok(At::LogOfRaw),
                    Variance::LearnedRange => {
                        let (low, high) = (s.log_variance(Variance::FixedSmall, t), s.betas()[t].ln());
                        (0.5 * (high + low), 0.5 * (high - low))
                    }
                    fixed => (s.log_variance(fixed, t), 0.0),
                };
                return Ok(At::LogVariance(offset, factor));
            }
            Output::Raw => return Ok(At::Same),
        }))
    }

    /// The numbers asked for, (n, h, w, c), or (n, h, w, 2c) if all channels are.
    fn of(&self, x: &[f32], y: &[f32], steps: &[At], shape: Shape) -> Vec<f32> {
        let (c, channels) = (shape.c, self.model.out_channels());
        if self.output == Some(Output::Raw) {
            return y.to_vec();
        }
        let pixels = x.chunks_exact(c).zip(y.chunks_exact(channels)).enumerate();
        let pixel = |(k, (x, y)): (usize, (&[f32], &[f32]))| -> Vec<f32> {
            match steps[k / shape.pixels()] {
                At::Same => y[..c].to_vec(),
                At::Mixed(mix) => {
                    let pairs = x.iter().zip(y).map(|(&x, &y)| (f64::from(x), f64::from(y)));
                    pairs.map(|(x, y)| (mix.xt * x + mix.output * y) as f32).collect()
                }
                At::LogOfRaw => y[c..].iter().map(|&v| f64::from(v).ln() as f32).collect(),
                At::LogVariance(offset, 0.0) => vec![offset as f32; c],
                At::LogVariance(offset, factor) => {
                    y[c..].iter().map(|&v| (offset + factor * f64::from(v)) as f32).collect()
                }
            }
        };
        pixels.flat_map(pixel).collect()
    }
}

fn one_per_image(path: &Path, n: usize) -> Result<npy::Array> {
    let array = npy::read(path)?;
    if array.shape[..] != [n] {
        return Err(Error::file(path, format!("holds an array of shape {:?}, but there are {n} images", array.shape)));
    }
    Ok(array)
}
