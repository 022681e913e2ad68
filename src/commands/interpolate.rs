//! `ddpm-cuda interpolate`: from one image to another through the noise (DDPM, figures 8 and 9).

use std::path::PathBuf;

use super::opened::{Opened, bar, scaled, still};
use super::{Of, On};
use crate::data;
use crate::diffusion::Spacing;
use crate::error::Result;
use crate::ops::sample_step::Noise;
use crate::output::{self, Target};
use crate::sample::interpolate::{lambdas, mixtures};
use crate::sample::{DEFAULT_STEPS, Drawing, Request, Shared};
use crate::tensor::Shape;
use crate::{say, usage};

/// Arguments of `ddpm-cuda interpolate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `--model` and `--set`
    #[command(flatten)]
    pub of: Of,
    /// The two image files
    #[arg(long, num_args = 2, value_names = ["A.png", "B.png"], required = true)]
    pub images: Vec<PathBuf>,
    /// The timestep that they are noised to and mixed at: high ones change more than the details
    #[arg(long, value_name = "T")]
    pub t: u32,
    /// Mixtures, the first of A alone and the last of B alone
    #[arg(long, default_value_t = 11, value_name = "N")]
    pub frames: usize,
    /// Steps from there to the images [default: 100, or T + 1]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Class of the images, by name or number
    #[arg(long, value_name = "NAME|K")]
    pub class: Option<String>,
    /// Seed of the noise, which all frames share
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// FILE.png (a row, A and B at its ends), or FILE.npz or DIR/ (the frames)
    #[arg(long, value_name = "FILE.png|FILE.npz|DIR/")]
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
    let classes = opened.model.config.model.classes;
    if args.frames == 0 {
        usage!("--frames 0: give at least 1");
    }
    let timesteps = opened.schedule.len();
    if args.t as usize >= timesteps {
        usage!("--t {}: this model has the timesteps 0 to {}", args.t, timesteps - 1);
    }
    let target = still(&args.out)?;
    let shape = opened.shape(args.frames);
    target.check(&args.out, Shape { n: args.frames + 2, ..shape })?;
    let below = args.t as usize + 1;
    let steps = args.steps.unwrap_or(DEFAULT_STEPS.min(below));
    let kept = Spacing::Even.timesteps(below, steps)?;
    let sampler = opened.ancestral(&kept, below)?;
    let extent = data::Extent { size: opened.model.config.model.image_size, channels: shape.c };
    let background = opened.model.config.background;
    let sources =
        args.images.iter().map(|path| data::read_picture(path, extent, background)).collect::<Result<Vec<_>>>()?;
    let class = match (classes, opened.class(args.class.as_deref())?) {
        (0, _) => None,
        (_, None) => usage!("this model has {classes} classes: give that of the images with --class"),
        (_, class) => class,
    };
    let [a, b] = [scaled(&sources[0]), scaled(&sources[1])];
    let drawing = Drawing {
        device: &opened.device,
        unet: &opened.unet,
        params: &opened.model.params,
        sampler: &sampler,
        seed: args.seed,
    };
    let together = args.frames.min(drawing.batch());
    opened.check_pass(together)?;
    let bar = bar(args.frames.div_ceil(together) * sampler.calls());
    let mut images = Vec::with_capacity(shape.len());
    for (k, lambdas) in lambdas(args.frames).chunks(together).enumerate() {
        let shape = opened.shape(lambdas.len());
        let x_t = mixtures(&opened.device, &opened.schedule, args.t, args.seed, shape, [&a, &b], lambdas)?.to_vec()?;
        let labels = class.map(|class| vec![class; shape.n]);
        let request = Request {
            first: (k * together) as u32,
            count: shape.n,
            labels: labels.as_deref(),
            start: Some(&x_t),
            shared: Some(Shared { row: Noise::ALL, until: 0 }),
            x_0: false,
        };
        images.extend(output::to_bytes(&drawing.draw(&request, None, |_| {
            bar.inc(1);
            Ok(())
        })?));
    }
    bar.finish_and_clear();
    for note in opened.device.take_notes() {
        say!("{note}");
    }
    match target {
        Target::Npz => output::write_npz(&args.out, shape, &images, None)?,
        Target::Folder => output::write_folder(&args.out, shape, &images)?,
        Target::Png | Target::Gif => {
            let row = [&sources[0][..], &images, &sources[1]].concat();
            output::write_table(&args.out, Shape { n: args.frames + 2, ..shape }, &row, args.frames + 2)?;
        }
    }
    say!("{} frames: {}", args.frames, args.out.display());
    Ok(())
}
