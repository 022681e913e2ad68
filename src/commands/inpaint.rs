//! `ddpm-cuda inpaint`: paints a part of given images anew (RePaint).

use std::path::PathBuf;

use super::opened::{Grid, Opened, bar, scaled, still};
use super::{Of, On, choice};
use crate::config::OnBadImage;
use crate::data;
use crate::error::{Error, Result};
use crate::output::{self, Target};
use crate::sample::inpaint::{Move, Painting, moves};
use crate::sample::{Call, Conditional, Drawing};
use crate::tensor::Tensor;
use crate::text;
use crate::{say, usage};

/// Levels of a stretch unless others are asked for, as in the paper (RePaint, section 5).
const JUMP: usize = 10;

/// Arguments of `ddpm-cuda inpaint`.
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
    /// What is painted: white is painted anew, black is kept; of the model's size
    #[arg(long, value_name = "M.png")]
    pub mask: PathBuf,
    /// How often each stretch of levels is gone through; more makes the parts agree better, 1 is no repetition
    #[arg(long, default_value_t = 10, value_name = "U")]
    pub resample: u32,
    /// Levels of a stretch, fewer than there are steps [default: 10, or all but one of fewer]
    #[arg(long, value_name = "N")]
    pub jump: Option<usize>,
    /// `--steps` and `--spacing`
    #[command(flatten)]
    pub grid: Grid,
    /// Images, the first ones [default: all]
    #[arg(long, value_name = "N")]
    pub count: Option<usize>,
    /// Class of every image, by name or number [default: the images' own]
    #[arg(long, value_name = "NAME|K")]
    pub class: Option<String>,
    /// Seed of the noise
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// FILE.png (one grid), FILE.npz or DIR/
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
    let target = still(&args.out)?;
    let kept = args.grid.kept(&opened, false)?;
    let jump = args.jump.unwrap_or(JUMP.min(kept.len() - 1).max(1));
    let moves = moves(kept.len(), jump, args.resample)?;
    let sampler = opened.ancestral(&kept, opened.schedule.len())?;
    let one = opened.shape(1);
    let grey = data::Extent { size: opened.model.config.model.image_size, channels: 1 };
    let mask = data::read_mask(&args.mask, grey)?;
    let mask: Vec<f32> = mask.iter().flat_map(|&new| std::iter::repeat_n(f32::from(u8::from(new)), one.c)).collect();
    let (mut bytes, mut labels) = opened.images(&args.images, args.class.as_deref(), args.on_bad_image)?;
    if let Some(count) = args.count {
        let there = bytes.len() / one.len();
        if count == 0 || count > there {
            usage!("--count {count}: {} holds {}, give from 1 to so many", args.images.display(), text::images(there));
        }
        bytes.truncate(count * one.len());
        labels = labels.map(|labels| labels[..count].to_vec());
    }
    let count = bytes.len() / one.len();
    if count > u32::MAX as usize {
        return Err(Error::file(
            &args.images,
            format!("holds {count} images; at most {} have noise of their own", u32::MAX),
        ));
    }
    target.check(&args.out, opened.shape(count))?;
    let (device, unet, params) = (&opened.device, &opened.unet, &opened.model.params);
    let together = count.min(Drawing { device, unet, params, sampler: &sampler, seed: args.seed }.batch());
    opened.check_pass(together)?;
    let chain = opened.schedule.keep(&kept);
    let passes = moves.iter().filter(|step| matches!(step, Move::Down(_))).count();
    let bar = bar(count.div_ceil(together) * passes);
    let mut images = Vec::with_capacity(bytes.len());
    for (k, bytes) in bytes.chunks(together * one.len()).enumerate() {
        let shape = opened.shape(bytes.len() / one.len());
        let labels = labels.as_ref().map(|labels| &labels[k * together..][..shape.n]);
        let network = Conditional::new(device, unet, params, labels, false)?;
        let painting = Painting {
            device,
            chain: &chain,
            sampler: &sampler,
            moves: &moves,
            seed: args.seed,
            first: (k * together) as u32,
            known: &Tensor::from_slice(device, shape, &scaled(bytes))?,
            mask: &Tensor::from_slice(device, shape, &mask.repeat(shape.n))?,
        };
        let network = |x: &Tensor, t: f32| network.call(Call { x, t, halves: 1, turn: None });
        images.extend(output::to_bytes(&painting.paint(network, || {
            bar.inc(1);
            Ok(())
        })?));
    }
    bar.finish_and_clear();
    let shape = opened.shape(count);
    match target {
        Target::Npz => output::write_npz(&args.out, shape, &images, labels.as_deref())?,
        Target::Folder => output::write_folder(&args.out, shape, &images)?,
        Target::Png | Target::Gif => output::write_grid(&args.out, shape, &images)?,
    }
    say!("{}, {passes} network passes each: {}", text::images(count), args.out.display());
    Ok(())
}
