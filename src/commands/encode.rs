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
use crate::sample::encode::encode;
use crate::sample::{Call, Conditional, Drawing};
use crate::say;
use crate::tensor::Tensor;
use crate::text;

/// Ratio of the noise levels of a step above which the iteration hardly contracts, by 1 - 1/ratio a round.
const WIDEST: f64 = 8.0;

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
    /// Rounds of iteration a step; without, the images do not come back
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
    let steps = inversion(&opened.schedule, prediction, &kept)?;
    if let [.., before, last] = &steps[..]
        && last.level > WIDEST * before.level
    {
        say!(
            "the last step, to timestep {}, leads from noise sigma {:.3} to {:.4}: over so much the iteration may not settle and the images not come back; --spacing leading stops below, for encode and sample",
            last.t,
            before.level,
            last.level
        );
    }
    let (bytes, labels) = opened.images(&args.images, args.class.as_deref(), args.on_bad_image)?;
    let image = opened.shape(1).len();
    let count = bytes.len() / image;
    let (device, unet, params) = (&opened.device, &opened.unet, &opened.model.params);
    let sampler = Sampler::over(&opened.schedule, prediction, Method::Ddim { eta: 0.0 }, &kept)?;
    let together = count.min(Drawing { device, unet, params, sampler: &sampler, seed: 0 }.batch());
    opened.check_pass(together)?;
    let bar = bar(count.div_ceil(together) * steps.len() * (args.rounds as usize + 1));
    let mut encoded = Vec::with_capacity(bytes.len());
    for (k, bytes) in bytes.chunks(together * image).enumerate() {
        let shape = opened.shape(bytes.len() / image);
        let labels = labels.as_ref().map(|labels| &labels[k * together..][..shape.n]);
        let network = Conditional::new(device, unet, params, labels, false)?;
        let x_0 = Tensor::from_slice(device, shape, &scaled(bytes))?;
        let network = |x: &Tensor, t: f32| network.call(Call { x, t, halves: 1, turn: None });
        let x_t = encode(device, &steps, args.rounds, &x_0, network, || {
            bar.inc(1);
            Ok(())
        })?;
        encoded.extend(layout::to_channels_first(&x_t, shape.c, shape.pixels()));
    }
    bar.finish_and_clear();
    let s = opened.shape(count);
    output::write_npy(&args.out, &[s.n, s.c, s.h, s.w], &encoded)?;
    say!("{} in {} steps: {}", text::images(count), steps.len(), args.out.display());
    Ok(())
}
