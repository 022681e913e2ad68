//! `ddpm-cuda predict`: evaluates the network once, from NumPy arrays to a NumPy array, to compare it with other
//! implementations.

use std::path::{Path, PathBuf};

use super::On;
use crate::checkpoint;
use crate::conditioning::Conditioning;
use crate::data::npy;
use crate::error::{Error, Result};
use crate::layout;
use crate::output;
use crate::say;
use crate::tape::{Tape, Var};
use crate::tensor::{Shape, Tensor};
use crate::unet::UNet;

/// Arguments of `ddpm-cuda predict`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folder (its newest checkpoint), checkpoint, model folder of diffusers, or .pt file of OpenAI's
    #[arg(long, value_name = "RUN|CHECKPOINT|FOLDER|FILE.pt")]
    pub model: PathBuf,
    /// A flag of OpenAI's scripts that FILE.pt does not tell, such as num_heads=4; may be given several times
    #[arg(long, value_name = "FLAG=VALUE")]
    pub set: Vec<String>,
    /// x_t: f32, images x channels x rows x columns
    #[arg(long, value_name = "X.npy")]
    pub x: PathBuf,
    /// Timesteps, one an image
    #[arg(long, value_name = "T.npy")]
    pub t: PathBuf,
    /// Classes, one an image, for a conditional model
    #[arg(long, value_name = "L.npy")]
    pub labels: Option<PathBuf>,
    /// The network's output: f32, images x channels x rows x columns
    #[arg(long, value_name = "OUT.npy")]
    pub out: PathBuf,
    /// `--device` and `--precision`
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
    let model = checkpoint::load_with(&device, &args.model, &args.set)?;
    for note in &model.notes {
        say!("{note}");
    }
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

    let x = layout::to_channels_last(&x, shape.c, shape.pixels());
    let mut tape = Tape::inference(&device, &model.params);
    let x = Var::constant(Tensor::from_slice_as(&device, device.activations(), shape, &x)?); // (n, h, w, c)
    let per_image = Shape::new(shape.n, 1, 1, 1);
    let t = Tensor::from_slice(&device, per_image, &t)?;
    let labels = labels.map(|l| Tensor::from_slice(&device, per_image, &l)).transpose()?;
    let conditioning = labels.map_or(Conditioning::NONE, Conditioning::on_labels);
    let y = unet.forward(&mut tape, &x, &t, &conditioning, None)?.into_value(); // (n, h, w, c)
    let out = y.shape();
    let y = layout::to_channels_first(&y.to_vec()?, out.c, out.pixels());
    output::write_npy(&args.out, &[out.n, out.c, out.h, out.w], &y)
}

fn one_per_image(path: &Path, n: usize) -> Result<npy::Array> {
    let array = npy::read(path)?;
    if array.shape[..] != [n] {
        return Err(Error::file(path, format!("holds an array of shape {:?}, but there are {n} images", array.shape)));
    }
    Ok(array)
}
