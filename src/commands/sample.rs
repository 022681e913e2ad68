//! `ddpm-cuda sample`: draws images with a trained model.

use std::path::{Path, PathBuf};
use std::time::Instant;

use twox_hash::XxHash3_128;

use super::opened::{Opened, bar};
use super::parts::Parts;
use super::sampling::{SamplerName, Sampling, Way, drawings};
use super::several::{Stop, in_order};
use super::{Of, OnSeveral, say_once};
use crate::data::npy;
use crate::device::Device;
use crate::diffusion::Sampler;
use crate::diffusion::sampler::Samples;
use crate::error::{Error, Result};
use crate::layout;
use crate::memory::available_memory;
use crate::ops::sample_step::{Noise, start_from};
use crate::output::{self, Target};
use crate::sample::{Progress, Request, Shared};
use crate::tensor::Shape;
use crate::text::{self, GIB};
use crate::{say, usage};

/// Frames of an animation: about three seconds.
const GIF_FRAMES: usize = 60;
/// Most columns, and images, of the picture of predictions along the way.
const PROGRESSIVE: (usize, usize) = (20, 64);
/// Images if none are asked for.
const DEFAULT_COUNT: usize = 64;

/// Arguments of `ddpm-cuda sample`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `--model` and `--set`
    #[command(flatten)]
    pub of: Of,
    /// Number of images, any: they are kept batch by batch until they are written [default: 64, or those of --start]
    #[arg(long, value_name = "N")]
    pub count: Option<usize>,
    /// `--sampler` and what goes with it
    #[command(flatten)]
    pub sampling: Sampling,
    /// Seed of the noise; image i of a seed is the same whatever --count
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Start from this x_T of unit variance: f32, images x channels x rows x columns
    #[arg(long, value_name = "X.npy")]
    pub start: Option<PathBuf>,
    /// Write the x_T of the images there, as --start reads it
    #[arg(long, value_name = "X.npy")]
    pub save_start: Option<PathBuf>,
    /// Write the predictions of x_0 along the way there, an image a row, of up to 64 images
    #[arg(long, value_name = "FILE.png")]
    pub progressive: Option<PathBuf>,
    /// Images in a row of the grid share x_T and all noise down to x at this timestep
    #[arg(long, value_name = "T")]
    pub shared_noise: Option<u32>,
    /// Go on with the same command, interrupted
    #[arg(long)]
    pub resume: bool,
    /// FILE.png (one grid), FILE.npz (arr_0, u8 NHWC), FILE.gif (the reverse process) or DIR/ (a PNG each)
    #[arg(long, value_name = "FILE.png|FILE.npz|FILE.gif|DIR/")]
    pub out: PathBuf,
    /// `--device`, `--precision` and `--eager`
    #[command(flatten)]
    pub on: OnSeveral,
}

/// Runs the command.
///
/// # Errors
/// `Error::Usage` for arguments that do not fit the model, `Error::File` for files that cannot be read or written,
/// `Error::Failed` for more images than fit into memory; those of [`OnSeveral::open`].
pub fn run(args: &Args) -> Result<()> {
    let on_each = Opened::on_each(&args.on, &args.of)?;
    let opened = &on_each[0];
    if args.count == Some(0) {
        usage!("--count 0: draw at least 1 image");
    }
    let target = Target::parse(&args.out)?;
    let ways = args.sampling.of_each(&on_each)?;
    let (way, sampler) = (&ways[0], &ways[0].sampler);
    let start = args.start.as_deref().map(|path| read_start(path, args, opened)).transpose()?;
    let image = opened.shape(1).len();
    let count = start.as_ref().map_or(args.count.unwrap_or(DEFAULT_COUNT), |start| start.len() / image);
    let (calls, shape) = (sampler.calls(), opened.shape(count));
    let frame_every = calls.div_ceil(GIF_FRAMES);
    let in_memory = match target {
        Target::Gif => calls.div_ceil(frame_every),
        Target::Png => 1,
        Target::Npz | Target::Folder => 0,
    };
    refuse_too_many(count, image.saturating_mul(count).saturating_mul(in_memory))?;
    target.check(&args.out, shape)?;
    let shared = match args.shared_noise {
        Some(until) if until as usize >= opened.schedule.len() => {
            usage!("--shared-noise {until}: this model has the timesteps 0 to {}", opened.schedule.len() - 1)
        }
        Some(until) if way.classes > 0 && way.class.is_none() && sampler.steps()[0].t > until => {
            usage!(
                "--shared-noise {until}: the images of a row have nothing in common if their classes differ, so give --class"
            )
        }
        until => until.map(|until| Shared { row: output::columns(shape) as u32, until }),
    };
    if let Some(path) = &args.progressive {
        check_progressive(path, shape, sampler)?;
    }
    if let Some(path) = &args.save_start {
        if args.start.is_some() {
            usage!("--save-start beside --start: they are the same numbers, so leave one out");
        }
        save_start(path, shape, args.seed, shared)?;
    }
    let (drawings, together) = drawings(&on_each, &ways, args.seed, count)?;
    if calls != sampler.steps().len() || args.sampling.sampler == Some(SamplerName::Heun) {
        say!("{} network passes an image", calls);
    }

    if args.resume && target == Target::Gif {
        usage!("--resume beside {}: the frames of a GIF are not kept for later, so leave it out", args.out.display());
    }
    if args.resume && !Parts::are_there(&args.out) && args.out.exists() {
        say!("{} is there already, and nothing of it is left to do", args.out.display());
        return Ok(());
    }
    let started = Instant::now();
    // A single batch is made at once; frames are of all batches.
    let parts = match target {
        Target::Gif => None,
        _ if together == count && !args.resume && !Parts::are_there(&args.out) => None,
        _ => Some(Parts::open(
            &args.out,
            &hash(args, opened, way, start.as_deref())?,
            args.resume,
            count,
            together,
            image,
        )?),
    };
    let together = parts.as_ref().map_or(together, |parts| parts.together);
    let shows_along = |first: usize| args.progressive.is_some() && first < PROGRESSIVE.1;
    let is_done = |parts: &Parts, first| parts.is_done(first) && (!shows_along(first) || parts.has_along(first));
    let missing: Vec<usize> = (0..count)
        .step_by(together)
        .filter(|&first| parts.as_ref().is_none_or(|parts| !is_done(parts, first)))
        .collect();
    if parts.is_some() && args.resume {
        say!("{} of {} batches are done", count.div_ceil(together) - missing.len(), count.div_ceil(together));
    }
    let bar = bar(missing.len() * calls);
    let draw = |device: usize, &first: &usize, stop: &Stop| {
        let batch = together.min(count - first);
        let mut along = Along::new(sampler.steps().len());
        let mut frames = Vec::new();
        let request = Request {
            first: first as u32,
            count: batch,
            labels: None,
            start: start.as_ref().map(|start| &start[first * image..][..batch * image]),
            shared,
            x_0: shows_along(first),
        };
        let drawn = ways[device].draw(&drawings[device], request, |p| {
            stop.check()?;
            bar.inc(1);
            along.see(&p)?;
            if target == Target::Gif && (p.done % frame_every == 0 || p.done == p.total) {
                frames.push(output::to_bytes(&p.x.to_vec()?));
            }
            Ok(())
        })?;
        Ok((output::to_bytes(&drawn), frames, along.columns))
    };
    let (mut images, mut frames, mut columns) = (Vec::new(), Vec::new(), Vec::new());
    let keep = |&first: &usize, (bytes, its_frames, its_columns): (Vec<u8>, _, Vec<Vec<u8>>)| {
        append(&mut frames, its_frames);
        match &parts {
            Some(parts) => {
                if shows_along(first) {
                    parts.keep_along(first, &its_columns.concat())?;
                }
                parts.keep(first, &bytes)?;
            }
            None => {
                images.extend(bytes);
                append(&mut columns, its_columns);
            }
        }
        Ok(())
    };
    let devices: Vec<&Device> = on_each.iter().map(|opened| &opened.device).collect();
    in_order(&devices, &missing, draw, keep)?;
    bar.finish_and_clear();
    say_once(devices.iter().flat_map(|device| device.take_notes()));

    let labels = (way.classes > 0).then(|| (0..count).map(|i| way.label(i).expect("there are classes")));
    match (target, &parts) {
        (Target::Gif, _) => output::write_gif(&args.out, shape, &frames)?,
        (Target::Png, None) => output::write_grid(&args.out, shape, &images)?,
        (Target::Png, Some(parts)) => {
            let read = parts.read().collect::<std::io::Result<Vec<_>>>();
            let images = read.map_err(|e| Error::file(&args.out, format!("cannot be made of its parts: {e}")))?;
            output::write_grid(&args.out, shape, &images.concat())?;
        }
        (Target::Npz, None) => output::write_npz_parts(&args.out, shape, std::iter::once(Ok(&images)), labels)?,
        (Target::Npz, Some(parts)) => output::write_npz_parts(&args.out, shape, parts.read(), labels)?,
        (Target::Folder, None) => output::write_folder(&args.out, shape, &images)?,
        (Target::Folder, Some(parts)) => output::write_folder_parts(&args.out, shape, parts.read())?,
    }
    if let Some(path) = &args.progressive {
        if let Some(parts) = &parts {
            for first in parts.firsts().filter(|&first| shows_along(first)) {
                append(&mut columns, parts.along(first)?);
            }
        }
        write_along(path, shape, &columns)?;
    }
    if let Some(parts) = parts {
        parts.delete()?;
    }
    say!("{} in {:.1} s: {}", text::images(count), started.elapsed().as_secs_f64(), args.out.display());
    Ok(())
}

/// x_T of `--start`, (n, h, w, c).
fn read_start(path: &Path, args: &Args, opened: &Opened) -> Result<Vec<f32>> {
    let array = npy::read(path)?;
    let s = opened.shape(1);
    let count = match array.shape[..] {
        [n, c, h, w] if n > 0 && (h, w, c) == (s.h, s.w, s.c) => n,
        _ => {
            let what = format!(
                "holds an array of shape {}, but this model starts from images x {}x{}x{}",
                npy::extent(&array.shape),
                s.c,
                s.h,
                s.w
            );
            return Err(Error::file(path, what));
        }
    };
    if let Some(asked) = args.count.filter(|&asked| asked != count) {
        usage!("--count {asked}: {} holds {count}, so leave --count out", path.display());
    }
    let x = array.to_f32().map_err(|e| Error::file(path, e))?;
    if let Some(bad) = x.iter().find(|v| !v.is_finite()) {
        return Err(Error::file(path, format!("holds {bad}; only finite numbers can be started from")));
    }
    Ok(layout::to_channels_last(&x, s.c, s.pixels()))
}

/// Writes the x_T that the images will be drawn from. It has the same bits on every device.
fn save_start(path: &Path, shape: Shape, seed: u64, shared: Option<Shared>) -> Result<()> {
    let cpu = Device::cpu();
    let one = Shape { n: 1, ..shape };
    let row = shared.map_or(1, |shared| shared.row);
    let mut failed = None;
    let images = (0..shape.n as u32).map_while(|first| {
        let streams = Samples { seed, first }.start();
        match start_from(&cpu, one, Noise { streams, row }, 1) {
            Ok(state) => Some(layout::to_channels_first(state.x.data(), shape.c, shape.pixels())),
            Err(e) => {
                failed = Some(e);
                None
            }
        }
    });
    output::write_npy_from(path, &[shape.n, shape.c, shape.h, shape.w], images.flatten())?;
    failed.map_or(Ok(()), Err)
}

/// What the drawn bytes follow from: the arguments, the networks and their weights, the start, the kind of the devices.
fn hash(args: &Args, opened: &Opened, way: &Way, start: Option<&[f32]>) -> Result<String> {
    let mut hash = XxHash3_128::new();
    let plain = (args.seed, way.class, args.shared_noise, args.on.precision, opened.device.kind());
    hash.write(format!("{plain:?} {:?} {:?}", args.count, way.sampler).as_bytes());
    // Some settings change the network and leave its weights as they are.
    hash.write(format!("{:?}", opened.model.config.model).as_bytes());
    hash.write(bytemuck::cast_slice(&opened.model.params.host()?));
    hash.write(bytemuck::cast_slice(start.unwrap_or_default()));
    if let Some((classifier, scale)) = &way.guide {
        hash.write(&scale.to_le_bytes());
        hash.write(format!("{:?}", classifier.config().model).as_bytes());
        hash.write(bytemuck::cast_slice(&classifier.params().host()?));
    }
    Ok(format!("{:032x}", hash.finish_128()))
}

fn check_progressive(path: &Path, shape: Shape, sampler: &Sampler) -> Result<()> {
    match Target::parse(path)? {
        Target::Png => {}
        _ => usage!("--progressive {}: a picture FILE.png is expected", path.display()),
    }
    let columns = sampler.steps().len().min(PROGRESSIVE.0);
    Target::Png.check(path, Shape { n: shape.n.min(PROGRESSIVE.1) * columns, ..shape })
}

/// Adds the bytes of the next images to those of the images before, for each step that is shown.
fn append(all: &mut Vec<Vec<u8>>, more: Vec<Vec<u8>>) {
    all.resize_with(all.len().max(more.len()), Vec::new);
    all.iter_mut().zip(more).for_each(|(all, more)| all.extend(more));
}

/// The predictions of x_0 along the way (DDPM, figure 6), of a batch.
struct Along {
    /// Steps between two that are kept, of the last of which there is always one.
    every: usize,
    total: usize,
    step: usize,
    /// For each kept step the bytes of the images.
    columns: Vec<Vec<u8>>,
}

impl Along {
    fn new(total: usize) -> Self {
        Along { every: total.div_ceil(PROGRESSIVE.0), total, step: 0, columns: Vec::new() }
    }

    fn see(&mut self, progress: &Progress<'_>) -> Result<()> {
        let Some(x_0) = progress.x_0 else { return Ok(()) };
        self.step += 1;
        // Counted from the end, so that the last is the image.
        let left = self.total - self.step;
        if left.is_multiple_of(self.every) {
            self.columns.push(output::to_bytes(&x_0.to_vec()?));
        }
        Ok(())
    }
}

/// Writes the picture of the first `PROGRESSIVE.1` images along the way: a row of `columns` for each.
fn write_along(path: &Path, shape: Shape, columns: &[Vec<u8>]) -> Result<()> {
    let image = Shape { n: 1, ..shape }.len();
    let n = shape.n.min(PROGRESSIVE.1);
    let row = |i: usize| columns.iter().flat_map(move |column| &column[i * image..][..image]);
    let images: Vec<u8> = (0..n).flat_map(row).copied().collect();
    output::write_table(path, Shape { n: n * columns.len(), ..shape }, &images, columns.len())
}

/// Refuses more images than fit into memory: their `bytes`, and as much again while they are written.
fn refuse_too_many(count: usize, bytes: usize) -> Result<()> {
    if count > u32::MAX as usize {
        usage!("--count {count}: at most {} images have noise of their own", u32::MAX);
    }
    // If the machine does not say how much there is, nothing is refused for it.
    let (needed, available) = ((bytes as u64).saturating_mul(2), available_memory().unwrap_or(u64::MAX));
    if needed > available {
        return Err(Error::Failed(format!(
            "--count {count}: a picture of these images needs {:.2} GiB of memory and {:.2} GiB are available; draw fewer, or into FILE.npz or DIR/",
            needed as f64 / GIB,
            available as f64 / GIB
        )));
    }
    Ok(())
}
