//! `ddpm-cuda encode`: the noise that DDIM makes given images of.

use std::path::PathBuf;

use super::opened::{Grid, Opened, bar, scaled};
use super::{Of, On, choice};
use crate::config::OnBadImage;
use crate::diffusion::Method;
use crate::diffusion::Sampler;
use crate::diffusion::sampler::inversion;
use crate::error::Result;
use crate::layout;
use crate::output;
use crate::sample::encode::{Encoded, encode};
use crate::sample::{Call, Conditional, Drawing, label};
use crate::say;
use crate::tensor::Tensor;
use crate::text;

/// What the last round of a step may move x_t by, in silence: about a grey level, 2/255. Between two images that x_t
/// could be of, a little leads to the other: 0.05 let a digit pass that came back as another.
const SETTLED: f32 = 0.01;

/// Arguments of `ddpm-cuda encode`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `--model` and `--set`
    #[command(flatten)]
    pub of: Of,
    /// Images, read like --data of train
    #[arg(long, value_name = "FOLDER|FILE|mnist")]
    pub images: PathBuf,
    /// An image that cannot be used is an error (stop) or is left out and named (skip) [default: as the model's run]
    #[arg(long, value_name = "WHAT", value_parser = choice::<OnBadImage>())]
    pub on_bad_image: Option<OnBadImage>,
    /// `--steps` and `--spacing`
    #[command(flatten)]
    pub grid: Grid,
    /// Rounds of iteration a step; more where the images do not come back closely enough
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub rounds: u32,
    /// Class of every image, by name or number [default: the images' own]
    #[arg(long, value_name = "NAME|K")]
    pub class: Option<String>,
    /// x_T: f32, images x channels x rows x columns, as `sample --sampler ddim --clip-x0 false --start` takes it
    #[arg(long, value_name = "XT.npy")]
    pub out: PathBuf,
    /// `--device`, `--precision` and `--eager`
    #[command(flatten)]
    pub on: On,
}

/// Runs the command.
///
/// # Errors
/// `Error::Usage` for arguments that do not fit the model, `Error::File` for files that cannot be read or written;
/// those of [`On::open`].
pub fn run(args: &Args) -> Result<()> {
    let opened = Opened::new(&args.on, &args.of)?;
    let prediction = opened.model.config.diffusion.prediction;
    let kept = args.grid.kept(&opened, false)?;
    let steps = inversion(&opened.schedule, prediction, &kept, opened.shape(1).len())?;
    let (bytes, labels) = opened.images(&args.images, args.class.as_deref(), args.on_bad_image)?;
    if let Some(labels) = &labels {
        say_classes(labels, opened.model.config.model.classes);
    }
    let image = opened.shape(1).len();
    let count = bytes.len() / image;
    let (device, unet, params) = (&opened.device, &opened.unet, &opened.model.params);
    let sampler = Sampler::over(&opened.schedule, prediction, Method::Ddim { eta: 0.0 }, &kept)?;
    let together = count.min(Drawing { device, unet, params, sampler: &sampler, seed: 0 }.batch());
    opened.check_pass(together)?;
    let bar = bar(count.div_ceil(together) * steps.len() * (args.rounds as usize + 1));
    let mut encoded = Vec::with_capacity(bytes.len());
    let mut most = (0.0, 0);
    for (k, bytes) in bytes.chunks(together * image).enumerate() {
        let shape = opened.shape(bytes.len() / image);
        let labels = labels.as_ref().map(|labels| &labels[k * together..][..shape.n]);
        let network = Conditional::new(device, unet, params, labels, false)?;
        let x_0 = Tensor::from_slice(device, shape, &scaled(bytes))?;
        let network = |x: &Tensor, t: f32| network.call(Call { x, t, halves: 1, turn: None });
        let Encoded { x_t, moved, at } = encode(device, &steps, args.rounds, &x_0, network, || {
            bar.inc(1);
            Ok(())
        })?;
        encoded.extend(layout::to_channels_first(&x_t, shape.c, shape.pixels()));
        if moved > most.0 {
            most = (moved, at);
        }
    }
    bar.finish_and_clear();
    let (moved, at) = most;
    if moved > SETTLED {
        say!(
            "x_t has not settled at timestep {at}, where the last round moved it by {:.1} grey levels: images may come back as far off, or as others; more --rounds may help",
            moved * 127.5
        );
    }
    let s = opened.shape(count);
    output::write_npy(&args.out, &[s.n, s.c, s.h, s.w], &encoded)?;
    say!("{} in {} steps: {}", text::images(count), steps.len(), args.out.display());
    Ok(())
}

/// `sample --start` draws the classes in turn unless it is told one, so images of other classes need to be named.
fn say_classes(labels: &[u32], classes: usize) {
    let in_turn = labels.iter().enumerate().all(|(i, &k)| label(classes, None, i) == Some(k));
    match labels {
        _ if in_turn => {}
        [first, rest @ ..] if rest.iter().all(|k| k == first) => {
            say!("the images are of class {first}: draw them with --class {first}");
        }
        _ => say!("the images are of several classes: encode and draw each class on its own, with --class"),
    }
}
