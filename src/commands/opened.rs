//! What the commands that draw have in common: a model opened on a device, its timesteps, images as its inputs.

use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};

use super::{Of, On, OnSeveral};
use crate::checkpoint::{Loaded, Stepping, Threshold};
use crate::classes::go_by_name;
use crate::config::{Config, OnBadImage};
use crate::data::{self, Data};
use crate::device::Device;
use crate::diffusion::sampler::Limit;
use crate::diffusion::{Method, Sampler, Schedule, Timesteps, Variance};
use crate::error::{Error, Result};
use crate::memory::available_on;
use crate::output::Target;
use crate::sample::{DEFAULT_STEPS, class_called, classes_by_name, default_variance, memory_of_forward};
use crate::tensor::Shape;
use crate::text::{self, GIB};
use crate::unet::UNet;
use crate::{say, usage};

/// A model and what follows from it.
pub(super) struct Opened {
    pub device: Device,
    pub model: Loaded,
    pub unet: UNet,
    pub schedule: Schedule,
}

impl Opened {
    /// Opens a model, saying what there is to say about it.
    pub fn new(on: &On, of: &Of) -> Result<Self> {
        Opened::on(on.open()?, of)
    }

    /// Opens a model on each of the devices, one at least. It is read once: a run may save a newer checkpoint
    /// meanwhile.
    pub fn on_each(on: &OnSeveral, of: &Of) -> Result<Vec<Self>> {
        let mut devices = on.open()?.into_iter();
        let mut all = vec![Opened::on(devices.next().expect("one device at least"), of)?];
        for device in devices {
            all.push(all[0].copy_to(device)?);
        }
        Ok(all)
    }

    fn on(device: Device, of: &Of) -> Result<Self> {
        let model = of.load(&device)?;
        let (unet, _) = UNet::new(&model.config.model)?;
        let schedule = model.config.diffusion.noise_schedule()?;
        Ok(Opened { device, model, unet, schedule })
    }

    fn copy_to(&self, device: Device) -> Result<Self> {
        let Loaded { config, params, stepping, .. } = &self.model;
        let (config, params, stepping) = (config.clone(), params.copy_to(&device)?, *stepping);
        let model = Loaded { config, params, stepping, notes: Vec::new() };
        let (unet, _) = UNet::new(&model.config.model)?;
        Ok(Opened { device, model, unet, schedule: self.schedule.clone() })
    }

    /// What the model's scheduler says that x_0 is confined to.
    pub fn limit(&self) -> Limit {
        match self.model.stepping {
            Stepping { threshold: Some(Threshold { ratio, largest }), .. } => Limit::Quantile { p: ratio, largest },
            Stepping { clip: true, clip_range, .. } => Limit::Range(clip_range),
            _ => Limit::None,
        }
    }

    /// The variance of the ancestral chain of `steps` of `timesteps`: the one `asked` for, else [`default_variance`],
    /// or that which the scheduler of another program's model says.
    pub fn variance(&self, asked: Option<Variance>, steps: usize, timesteps: usize) -> Result<Variance> {
        let own = self.model.config.diffusion.variance;
        match asked {
            Some(v) if v.is_learned() && v != own => {
                usage!("--variance {v}: this model was trained with {own}, so its network does not say it")
            }
            Some(v) => Ok(v),
            None if own != Variance::FixedLarge || self.model.stepping.small_if_fewer => {
                Ok(default_variance(own, steps, timesteps))
            }
            None => Ok(own),
        }
    }

    /// [`variance`](Self::variance) for images that are drawn, saying so where another may draw better.
    pub fn variance_to_draw(&self, asked: Option<Variance>, steps: usize, timesteps: usize) -> Result<Variance> {
        let variance = self.variance(asked, steps, timesteps)?;
        if asked.is_none() && variance == Variance::FixedLarge && steps < timesteps {
            say!(
                "{variance} is the variance, as the model says; in {steps} of {timesteps} steps --variance fixed_small may draw better"
            );
        }
        Ok(variance)
    }

    /// Shape of `count` images.
    pub fn shape(&self, count: usize) -> Shape {
        let m = &self.model.config.model;
        Shape::new(count, m.image_size.h, m.image_size.w, m.channels)
    }

    /// The number of the class that `--class` names.
    pub fn class(&self, class: Option<&str>) -> Result<Option<u32>> {
        let c = &self.model.config;
        class.map(|class| class_called(class, &c.class_names, c.model.classes)).transpose()
    }

    /// The bytes of the images at `path`, read like `--data` and fitted to the model, and their classes, if it is
    /// conditional: `class`, or their own. Of `bad` ones the model's run says what becomes of them if nobody else does.
    pub fn images(
        &self,
        path: &Path,
        class: Option<&str>,
        bad: Option<OnBadImage>,
    ) -> Result<(Vec<u8>, Option<Vec<u32>>)> {
        let class = self.class(class)?;
        let mut config: Config = self.model.config.clone();
        let Some(text) = path.to_str() else { return Err(Error::file(path, "its name is not UTF-8")) };
        (config.data, config.held_out, config.model.classes) = (text.into(), 0.0, 0);
        config.on_bad_image = bad.unwrap_or(config.on_bad_image);
        let data = data::load(&mut config)?;
        data.train.check_all()?;
        say_notes(&data);
        let images = (0..data.train.len()).flat_map(|i| data.train.image(i)).copied().collect();
        let (classes, names) = (self.model.config.model.classes, &self.model.config.class_names);
        let labels = match (class, data.train.labels()) {
            _ if classes == 0 => None,
            (Some(class), _) => Some(vec![class; data.train.len()]),
            (None, Some(own)) if go_by_name(&data.classes, names) => {
                Some(classes_by_name(path, own, &data.classes, names, classes)?)
            }
            (None, Some(own)) if own.iter().all(|&k| (k as usize) < classes) => Some(own.to_vec()),
            (None, _) => usage!("this model has {classes} classes, and these images say none of them: give --class"),
        };
        Ok((images, labels))
    }

    /// Ancestral sampling over the timesteps `kept` of the first `timesteps`, x_0 confined as the scheduler says.
    pub fn ancestral(&self, kept: &[u32], timesteps: usize) -> Result<Sampler> {
        let process = &self.model.config.diffusion;
        let variance = self.variance_to_draw(None, kept.len(), timesteps)?;
        let sampler = Sampler::over(&self.schedule, process.prediction, Method::Ancestral(variance), kept)?;
        Ok(sampler.limited(self.limit()))
    }

    /// Refuses a pass over `images` images that memory does not hold; `advice` ends the sentence.
    pub fn check_memory(&self, images: usize, needed: u64, advice: &str) -> Result<()> {
        let available = available_on(&self.device).unwrap_or(u64::MAX);
        if needed > available {
            let m = &self.model.config.model;
            return Err(Error::Failed(format!(
                "drawing {} of {}x{} together takes {:.2} GiB of memory and {:.2} GiB are available: {advice}",
                text::images(images),
                m.image_size,
                m.channels,
                needed as f64 / GIB,
                available as f64 / GIB
            )));
        }
        Ok(())
    }

    /// [`check_memory`](Self::check_memory) of a pass over images asked once.
    pub fn check_pass(&self, images: usize) -> Result<()> {
        let needed = memory_of_forward(&self.device, &self.unet, &self.model.params, self.shape(images))?;
        self.check_memory(images, needed, "this model is too large to draw here")
    }
}

/// Says what was done to images that nothing is trained on.
pub(super) fn say_notes(data: &Data) {
    // Whether they have classes matters to a training.
    for note in data.notes.iter().filter(|note| !note.contains("not used: classes = 0")) {
        say!("{note}");
    }
}

/// Where images go that do not move.
pub(super) fn still(out: &Path) -> Result<Target> {
    match Target::parse(out)? {
        Target::Gif => usage!("--out {}: give FILE.png, FILE.npz or DIR/", out.display()),
        target => Ok(target),
    }
}

/// Bytes as numbers in [-1, 1].
pub(super) fn scaled(bytes: &[u8]) -> Vec<f32> {
    bytes.iter().map(|&byte| (2.0 * f32::from(byte) - 255.0) / 255.0).collect()
}

/// `--steps` and `--spacing`.
#[derive(Clone, Debug, clap::Args)]
pub struct Grid {
    /// Steps from noise to image, up to the model's number of timesteps [default: 100; 20 with dpm++ and heun]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Which timesteps are kept when there are fewer steps: even, stride, leading, trailing, karras (the timesteps
    /// nearest to its noise levels, with their own; heun takes the levels themselves), or a list such as 10,15,20, so
    /// many in each of equal sections [default: the model's; even if it says nothing]
    #[arg(long, value_name = "SPACING|LIST", value_parser = |text: &str| text.parse::<Timesteps>())]
    pub spacing: Option<Timesteps>,
}

/// Steps of the solvers if none are asked for.
const DEFAULT_SOLVER_STEPS: usize = 20;

impl Grid {
    /// The spacing, and the number of steps.
    pub(super) fn resolve(&self, stepping: &Stepping, timesteps: usize, solver: bool) -> Result<(Timesteps, usize)> {
        let spacing = self.spacing.clone().unwrap_or(Timesteps::Spaced(stepping.spacing));
        let steps = match (spacing.own_steps(), self.steps) {
            (Some(_), Some(steps)) => {
                usage!("--steps {steps} beside --spacing {spacing}: the list says how many, so leave --steps out")
            }
            (Some(own), None) => own,
            (None, Some(steps)) => steps,
            (None, None) if solver => DEFAULT_SOLVER_STEPS.min(timesteps - 1),
            (None, None) => DEFAULT_STEPS.min(timesteps),
        };
        Ok((spacing, steps))
    }

    /// The timesteps kept, saying so if they are fewer than the steps asked for.
    pub(super) fn kept(&self, opened: &Opened, solver: bool) -> Result<Vec<u32>> {
        let stepping = &opened.model.stepping;
        let (spacing, steps) = self.resolve(stepping, opened.schedule.len(), solver)?;
        let kept = spacing.kept(&opened.schedule, solver, stepping.steps_offset, steps)?;
        if kept.len() < steps {
            say!("{} steps of {steps}, since several noise levels fall on the same timestep", kept.len());
        }
        Ok(kept)
    }
}

/// A bar over so many evaluations of the network.
pub(super) fn bar(passes: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} network passes, {eta} left");
    ProgressBar::new(passes as u64).with_style(style.expect("a valid template"))
}
