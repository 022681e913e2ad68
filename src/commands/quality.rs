//! `ddpm-cuda quality`: how like the data a model's samples are, and whether they are copies of training images.

use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};

use super::opened::{self, Opened, say_notes};
use super::sampling::{Sampling, Way, drawings};
use super::several::{Stop, in_order};
use super::train::Terminal;
use super::{Of, OnSeveral, check_writable, choice, say_once};
use crate::config::{Config, OnBadImage, Preset, Size};
use crate::data::{self, Data, Dataset, npy};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::measures::{Features, Gaussian, NEIGHBOURS, Nearness};
use crate::output;
use crate::quality::{
    Extractor, Figures, Report, accuracy, nearest_in_features, nearest_in_pixels, pixels, some_of, write_picture,
};
use crate::sample::Request;
use crate::tensor::Shape;
use crate::text;
use crate::train::Watch;
use crate::{recipe, say, usage};

/// Samples that are drawn of a model unless asked otherwise.
const COUNT: usize = 2000;

/// Arguments of `ddpm-cuda quality`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("images").required(true).args(["model", "samples"])))]
pub struct Args {
    /// Draw the samples of this model: run folder (its newest checkpoint), checkpoint, model folder of diffusers, or
    /// .pt file of OpenAI's
    #[arg(long, value_name = "RUN|CHECKPOINT|FOLDER|FILE.pt")]
    pub model: Option<PathBuf>,
    /// A flag of OpenAI's scripts that FILE.pt does not tell, such as num_heads=4; may be given several times
    #[arg(long, value_name = "FLAG=VALUE", requires = "model")]
    pub set: Vec<String>,
    /// Measure these samples: .npz of `sample`, or images as --data takes them
    #[arg(long, value_name = "S.npz")]
    pub samples: Option<PathBuf>,
    /// The data that the model was trained on
    #[arg(long, value_name = "mnist|PATH")]
    pub data: String,
    /// An image of --data or --samples that cannot be used is an error (stop) or is left out and named (skip)
    /// [default: as the model's run says, stop for --samples]
    #[arg(long, value_name = "WHAT", value_parser = choice::<OnBadImage>(), conflicts_with = "features")]
    pub on_bad_image: Option<OnBadImage>,
    /// Number of samples [default: 2000 of a model, all of --samples]
    #[arg(long, value_name = "N")]
    pub count: Option<usize>,
    /// Features of your own network: arrays `samples` (images x numbers) and `data`, in the order of the files
    #[arg(long, value_name = "FEATURES.npz")]
    pub features: Option<PathBuf>,
    /// Statistics to compare these features with, in place of those of `data`: arrays `mu` and `sigma`
    #[arg(long, value_name = "STATS.npz")]
    pub reference: Option<PathBuf>,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE.json")]
    pub json: Option<PathBuf>,
    /// Write the samples most like a training image, each with its nearest training images in pixels and features, to
    /// this file [default: beside --json, if images of so many channels are pictures]
    #[arg(long, value_name = "FILE.png")]
    pub picture: Option<PathBuf>,
    /// Training mirrors images, so mirror images count as copies too [default: as the model's run says]
    #[arg(long)]
    pub flip: bool,
    /// Share of the images that the model's training held out, where the data has no test set [default: as the model's
    /// run says; without a run 0.05, and 0 of fewer than 20 images]
    #[arg(long, value_name = "SHARE")]
    pub held_out: Option<f64>,
    /// Seed of the samples of --model
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// `--sampler` and what goes with it, for --model, as of `sample`
    #[command(flatten)]
    pub sampling: Sampling,
    /// Folder that keeps the classifiers of the features [default: ddpm-cuda in the user's cache folder]
    #[arg(long, value_name = "FOLDER")]
    pub cache: Option<PathBuf>,
    /// `--device` and `--precision`, for drawing
    #[command(flatten)]
    pub on: OnSeveral,
}

/// What follows the arguments in the help.
pub const HELP: &str = "\
Figures: the Frechet distance of features to those of the training images (smaller is better), improved precision \
(share of samples among the data) and recall (share of the data among the samples), k = 3, and how near samples are to \
the training set compared with held-out images. Each has that of held-out images beside it, which a perfect model \
reaches. All depend on the number of images; compare figures of the same number only.

Features: of a classifier of the data's classes, trained on the training images with fixed settings and seed when it is \
first needed (a minute for mnist). Its name is in every figure: figures of different classifiers cannot be compared, and \
none is the FID of the literature, which needs Inception-v3. With --features the features are your own, in the order of \
the files, so that no image may be left out.

Samples of other programs, or drawn once for several measurements: give --samples S.npz.";

/// Samples as bytes.
struct Samples {
    bytes: Vec<u8>,
    shape: Shape,
}

/// Where samples come from.
enum Source {
    Model(Box<Drawn>),
    File(Samples),
}

/// A model on each of the devices and how samples of it are drawn.
struct Drawn {
    on_each: Vec<Opened>,
    ways: Vec<Way>,
    seed: u64,
    count: usize,
}

impl Drawn {
    fn draw(&self) -> Result<Samples> {
        let Drawn { on_each, ways, seed, count } = self;
        let (drawings, together) = drawings(on_each, ways, *seed, *count)?;
        let (firsts, shape): (Vec<usize>, _) = ((0..*count).step_by(together).collect(), on_each[0].shape(*count));
        let bar = opened::bar(firsts.len() * ways[0].sampler.calls());
        let draw = |device: usize, &first: &usize, stop: &Stop| {
            let count = together.min(count - first);
            let request = Request { first: first as u32, count, ..Request::default() };
            let drawn = ways[device].draw(&drawings[device], request, |_| {
                stop.check()?;
                bar.inc(1);
                Ok(())
            })?;
            Ok(output::to_bytes(&drawn))
        };
        let mut bytes = Vec::with_capacity(shape.len());
        let devices: Vec<&Device> = on_each.iter().map(|opened| &opened.device).collect();
        in_order(&devices, &firsts, draw, |_, images: Vec<u8>| {
            bytes.extend(images);
            Ok(())
        })?;
        bar.finish_and_clear();
        say_once(devices.iter().flat_map(|device| device.take_notes()));
        Ok(Samples { bytes, shape })
    }
}

/// Features of the three sets.
struct Sets {
    name: String,
    samples: Features,
    /// Of the training images, and after them of their mirror images if these count and there are features of them.
    train: Option<Features>,
    held_out: Option<Features>,
    accuracy: Option<f64>,
}

/// Runs the command.
///
/// # Errors
/// `Error::Usage` for arguments that do not go together, `Error::File` for files that cannot be read, do not fit or
/// cannot be written, `Error::Failed` for data without classes and too few images; those of [`OnSeveral::open`].
pub fn run(args: &Args) -> Result<()> {
    if let (Some(reference), None) = (&args.reference, &args.features) {
        usage!(
            "--reference {}: mu and sigma belong to the network that made them; give its features of the samples with --features",
            reference.display()
        );
    }
    if let (Some(features), None) = (&args.features, &args.samples) {
        usage!("--features {}: say with --samples whose features they are", features.display());
    }
    let few = NEIGHBOURS + 1;
    if let Some(count) = args.count.filter(|count| *count < few) {
        usage!("--count {count}: at least {few} samples are needed, and thousands to tell anything");
    }
    let picture = args.picture.clone().or_else(|| Some(args.json.as_ref()?.with_extension("png")));
    for (flag, file) in [("--json", &args.json), ("--picture", &picture)] {
        if let Some(file) = file {
            check_writable(flag, file)?;
        }
    }

    let mut terminal = Terminal::default();
    let (source, mut config) = match (&args.model, &args.samples) {
        (Some(model), _) => open_model(args, model)?,
        (None, Some(samples)) => read(args, samples)?,
        (None, None) => usage!("give --model or --samples"),
    };
    let channels = config.model.channels;
    let pictures = output::are_pictures(channels);
    if let (Some(file), false) = (&args.picture, pictures) {
        usage!(
            "--picture {}: images of {channels} channels are no pictures, only those of 1 and 3 are; leave --picture out",
            file.display()
        );
    }
    let flip = args.flip || (args.model.is_some() && config.flip);
    if let Some(share) = args.held_out {
        config.held_out = share;
    }
    let data = load(args, &mut config, &mut terminal)?;
    let (train, train_shape) = pixels(&data.train, flip);
    let (held_out, held_out_shape) = pixels(&data.held_out, false);
    // What may be refused comes before the drawing, which takes longest.
    let extractor = match &args.features {
        Some(_) => None,
        None => Some(Extractor::of(&data, &cache(args)?, &mut terminal)?),
    };
    let samples = match source {
        Source::Model(model) => model.draw()?,
        Source::File(samples) => samples,
    };
    let image = Shape { n: 1, ..samples.shape };

    let sets = match (&args.features, extractor) {
        (Some(file), _) => brought(file, samples.shape.n, args.count.is_some(), &data)?,
        (None, None) => unreachable!("there is an extractor where no features are brought"),
        (None, Some(extractor)) => {
            let all = samples.shape.n + train_shape.n + held_out_shape.n;
            let bar = bar(all, "images through the classifier");
            let each = |n: usize| bar.inc(n as u64);
            let (of_samples, _) = extractor.features(&samples.bytes, samples.shape, each)?;
            let (of_train, _) = extractor.features(&train, train_shape, each)?;
            let (of_held_out, accuracy) = match data.held_out.is_empty() {
                true => (None, None),
                false => {
                    let (features, classes) = extractor.features(&held_out, held_out_shape, each)?;
                    (Some(features), data.held_out.labels().map(|labels| accuracy(&classes, labels)))
                }
            };
            bar.finish_and_clear();
            let name = extractor.name().to_string();
            Sets { name, samples: of_samples, train: Some(of_train), held_out: of_held_out, accuracy }
        }
    };

    // Mirror images count for copies alone.
    let unmirrored = sets.train.as_ref().map(|train| train.select(0..data.train.len()));
    let (reference, compared) = match (&args.reference, &unmirrored) {
        (Some(file), _) => (statistics(file, sets.samples.d())?, format!("mu and sigma of {}", file.display())),
        (None, Some(train)) => (Gaussian::of(train)?, format!("{} training images", train.len())),
        (None, None) => {
            let file = args.features.as_deref().unwrap_or(Path::new("features"));
            let what = "holds no array `data`, the features of --data; without it --reference is needed";
            return Err(Error::file(file, what));
        }
    };
    let figures = |of: &Features| Figures::of(of, &reference, unmirrored.as_ref());
    let count = sets.samples.len();
    let baseline = match &sets.held_out {
        Some(held_out) if held_out.len() >= few => Some(figures(&some_of(held_out, count))?),
        _ => None,
    };
    let fewer = baseline.as_ref().filter(|baseline| baseline.images < count);
    let samples_of_baseline = fewer.map(|fewer| figures(&some_of(&sets.samples, fewer.images))).transpose()?;

    let mut near_in_features = None;
    let mut nearness = None;
    if let Some(train) = &sets.train {
        let near = nearest_in_features(&sets.samples, train, data.train.len());
        if let Some(held_out) = &sets.held_out {
            nearness = Some(Nearness::of(&near, &nearest_in_features(held_out, train, data.train.len())));
        }
        near_in_features = Some(near);
    }
    let train = (train, train_shape);
    let near_in_pixels = nearest_in_pixels(&samples.bytes, &train, data.train.len());
    let of_held_out = nearest_in_pixels(&held_out, &train, data.train.len());
    let in_pixels = (!of_held_out.is_empty()).then(|| Nearness::of(&near_in_pixels, &of_held_out));
    let report = Report {
        features: sets.name,
        d: sets.samples.d(),
        accuracy: sets.accuracy,
        reference: compared,
        samples: figures(&sets.samples)?,
        baseline,
        samples_of_baseline,
        pixels: in_pixels,
        nearness,
    };
    for line in report.lines() {
        say!("{line}");
    }
    // The figures first: a picture that cannot be written must not cost them.
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&report.json()).map_err(|e| Error::file(file, e))?;
        output::write_atomically(file, (text + "\n").as_bytes())?;
    }
    match &picture {
        Some(file) if pictures => {
            let near = near_in_features.as_deref();
            write_picture(file, &samples.bytes, &train.0, image, &near_in_pixels, near)?;
            say!("nearest training images: {}", file.display());
        }
        Some(_) => say!("nearest training images are not drawn, since images of {channels} channels are no pictures"),
        None => {}
    }
    Ok(())
}

/// Opens a model. Returns it with its settings.
fn open_model(args: &Args, path: &Path) -> Result<(Source, Config)> {
    let on_each = Opened::on_each(&args.on, &Of { model: path.into(), set: args.set.clone() })?;
    let ways = args.sampling.of_each(&on_each)?;
    let count = args.count.unwrap_or(COUNT);
    if count > u32::MAX as usize {
        usage!("--count {count}: at most {} images have noise of their own", u32::MAX);
    }
    let config = on_each[0].model.config.clone();
    Ok((Source::Model(Box::new(Drawn { on_each, ways, seed: args.seed, count })), config))
}

/// Reads samples from a file or folder. Returns them, and the settings that the data are read with.
fn read(args: &Args, path: &Path) -> Result<(Source, Config)> {
    if let Some(flag) = args.sampling.first_given() {
        usage!("{flag}: the samples of --samples are drawn already, so leave {flag} out");
    }
    let mut config = Config::preset(Preset::Auto);
    config.data = path.to_string_lossy().into_owned();
    config.held_out = 0.0;
    config.on_bad_image = args.on_bad_image.unwrap_or(config.on_bad_image);
    let samples = data::load(&mut config)?;
    say_notes(&samples);
    let set = samples.train;
    set.check_all()?;
    let count = args.count.unwrap_or(set.len());
    if count > set.len() {
        usage!("--count {count}: {} holds {}", path.display(), text::images(set.len()));
    }
    if args.features.is_none() && count <= NEIGHBOURS {
        return Err(Error::file(
            path,
            format!("holds {}; at least {} are needed", text::images(count), NEIGHBOURS + 1),
        ));
    }
    let (mut bytes, shape) = pixels(&set, false);
    bytes.truncate(count * shape.len() / shape.n);
    let (size, channels) = (config.model.image_size, config.model.channels);
    let mut config = Config::preset(Preset::Auto);
    (config.model.image_size, config.model.channels) = (size, channels);
    Ok((Source::File(Samples { bytes, shape: Shape { n: count, ..shape } }), config))
}

/// Reads the data at the size of the samples, with classes unless features are brought.
fn load(args: &Args, config: &mut Config, watch: &mut dyn Watch) -> Result<Data> {
    if !(0.0..=0.5).contains(&config.held_out) {
        usage!("--held-out {} must be a share between 0 (none) and 0.5", config.held_out);
    }
    let has_run = !config.data.is_empty();
    config.data.clone_from(&args.data);
    config.on_bad_image = args.on_bad_image.unwrap_or(config.on_bad_image);
    assert!(config.model.image_size != Size::DATA && config.model.channels > 0, "samples have a size");
    let source = data::Source::open(config)?;
    if args.held_out.is_none() && !has_run {
        config.held_out = recipe::held_out(config.held_out, source.survey().images);
    }
    // Labels are looked at only if they are needed.
    config.model.classes = if args.features.is_some() { 0 } else { source.survey().classes.len() };
    let data = source.load(config)?;
    data.train.check_all()?;
    data.held_out.check_all()?;
    for note in &data.notes {
        watch.say(note);
    }
    Ok(data)
}

/// Features from a file, sorted into the three sets. Those of more images than there are samples are of other images,
/// unless `counted`, if --count says that the first ones are meant.
fn brought(file: &Path, samples: usize, counted: bool, data: &Data) -> Result<Sets> {
    let bytes = std::fs::read(file).map_err(|e| Error::file(file, format!("cannot be read: {e}")))?;
    let mut archive = npy::Archive::open(bytes).map_err(|e| Error::file(file, e))?;
    let names = archive.names();
    let mut matrix = |name: &str| -> Result<Option<Features>> {
        if !names.iter().any(|n| n == name) {
            return Ok(None);
        }
        let array = archive.array(name).map_err(|e| Error::file(file, e))?;
        let (&[rows, d], true) = (&array.shape[..], !array.shape.contains(&0)) else {
            let what = format!("holds `{name}` of shape {}; images x numbers is expected", npy::extent(&array.shape));
            return Err(Error::file(file, what));
        };
        let numbers = array.to_f64().map_err(|e| Error::file(file, e))?;
        assert_eq!(numbers.len(), rows * d, "an array has as many numbers as its shape says");
        Features::new(numbers, d).map(Some).map_err(|e| Error::file(file, format!("`{name}`: {e}")))
    };
    let Some(of_samples) = matrix("samples")? else {
        let what = format!("holds no array `samples`; its arrays are: {}", names.join(", "));
        return Err(Error::file(file, what));
    };
    if of_samples.len() < samples {
        let what = format!("holds features of {} samples, but there are {samples}", of_samples.len());
        return Err(Error::file(file, what));
    }
    if of_samples.len() > samples && !counted {
        let what = format!(
            "holds features of {} samples, but there are {samples}; --count {samples} takes the first {samples}",
            of_samples.len()
        );
        return Err(Error::file(file, what));
    }
    let of_samples = of_samples.select(0..samples);
    let of_data = matrix("data")?;
    let name = file.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let Some(of_data) = of_data else {
        return Ok(Sets { name, samples: of_samples, train: None, held_out: None, accuracy: None });
    };
    if of_data.d() != of_samples.d() {
        let what = format!("holds `samples` of {} numbers and `data` of {}", of_samples.d(), of_data.d());
        return Err(Error::file(file, what));
    }
    // A test set of the data's own lies in other files, after the others.
    let shared = std::ptr::eq(data.train.images().pixels, data.held_out.images().pixels);
    let all = data.train.images().shape.n + if shared { 0 } else { data.held_out.len() };
    if of_data.len() != all {
        let what = format!("holds `data` of {} images, but the data has {all}", of_data.len());
        return Err(Error::file(file, what));
    }
    let of = |set: &Dataset, from: usize| -> Option<Features> {
        let rows = set.rows(&(0..set.len()).collect::<Vec<_>>(), false).indices();
        (!set.is_empty()).then(|| of_data.select(rows.into_iter().map(|row| from + row)))
    };
    let from = if shared { 0 } else { data.train.images().shape.n };
    let (train, held_out) = (of(&data.train, 0), of(&data.held_out, from));
    Ok(Sets { name, samples: of_samples, train, held_out, accuracy: None })
}

/// `mu` and `sigma` of a file, for features of `d` numbers.
fn statistics(file: &Path, d: usize) -> Result<Gaussian> {
    let broken = |e: String| Error::file(file, e);
    let bytes = std::fs::read(file).map_err(|e| broken(format!("cannot be read: {e}")))?;
    let mut archive = npy::Archive::open(bytes).map_err(broken)?;
    let names = archive.names();
    if let Some(missing) = ["mu", "sigma"].iter().find(|name| !names.iter().any(|n| n == *name)) {
        return Err(broken(format!("holds no array `{missing}`; its arrays are: {}", names.join(", "))));
    }
    let (mu, sigma) = (archive.array("mu").map_err(broken)?, archive.array("sigma").map_err(broken)?);
    if mu.shape[..] != [d] || sigma.shape[..] != [d, d] {
        let shapes = [&mu.shape, &sigma.shape].map(|shape| npy::extent(shape));
        let what =
            format!("holds mu of shape {} and sigma of {}, but the features have {d} numbers", shapes[0], shapes[1]);
        return Err(broken(what));
    }
    let (mu, sigma) = (mu.to_f64().map_err(broken)?, sigma.to_f64().map_err(broken)?);
    Gaussian::from_statistics(&mu, &sigma).map_err(|e| broken(e.to_string()))
}

/// The folder of the classifiers.
fn cache(args: &Args) -> Result<PathBuf> {
    if let Some(cache) = &args.cache {
        return Ok(cache.clone());
    }
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let user =
        folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache"))).or_else(|| folder("LOCALAPPDATA"));
    match user {
        Some(user) => Ok(user.join("ddpm-cuda")),
        None => usage!(
            "neither XDG_CACHE_HOME, HOME nor LOCALAPPDATA names a folder; say with --cache FOLDER where the classifier is kept"
        ),
    }
}

fn bar(length: usize, of: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(&format!("{{wide_bar}} {{pos}}/{{len}} {of}, {{eta}} left"));
    ProgressBar::new(length as u64).with_style(style.expect("a valid template"))
}
