//! How images are drawn: the flags that `sample` and `quality` share, and what follows from them and a model.

use std::path::PathBuf;

use super::choice;
use super::opened::{Grid, Opened};
use super::several;
use crate::classifier::Classifier;
use crate::config::Model;
use crate::diffusion::sampler::{Corrector, Guidance, Limit};
use crate::diffusion::{Method, Sampler, Timesteps, Variance};
use crate::error::{Error, Result};
use crate::memory::available_on;
use crate::names::names;
use crate::sample::{Drawing, Progress, Request, class_called, label};
use crate::tensor::Tensor;
use crate::{say, usage};

/// Ratio of drift to noise of a correction, if none is asked for.
const DEFAULT_SNR: f64 = 0.16;

/// Names of the samplers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SamplerName {
    /// Ancestral sampling, algorithm 2 of the paper.
    Ddpm,
    /// DDIM: good images in few steps.
    Ddim,
    /// DPM-Solver++ 2M: good images in fewer.
    DpmPp,
    /// Heun's method: two network passes a step.
    Heun,
}

names!(SamplerName { Ddpm = "ddpm", Ddim = "ddim", DpmPp = "dpm++", Heun = "heun" });

/// Arguments of commands that draw images from noise.
#[derive(Clone, Debug, clap::Args)]
pub struct Sampling {
    /// How steps are taken: ddpm, the paper's algorithm 2; ddim or dpm++ (2M), good images in few steps; heun, two
    /// network passes a step [default: ddpm]
    #[arg(long, value_parser = choice::<SamplerName>())]
    pub sampler: Option<SamplerName>,
    /// `--steps` and `--spacing`
    #[command(flatten)]
    pub grid: Grid,
    /// DDIM's share of the ancestral noise, 0 to 1 [default: 0]
    #[arg(long, value_name = "ETA")]
    pub eta: Option<f64>,
    /// Variance of ancestral sampling [default: the model's for all timesteps or a learned range, else fixed_small]
    #[arg(long, value_name = "VARIANCE", value_parser = choice::<Variance>())]
    pub variance: Option<Variance>,
    /// Whether the predicted image is clipped to [-1, 1] at every step [default: the model's; true]
    #[arg(long, value_name = "true|false")]
    pub clip_x0: Option<bool>,
    /// Dynamic thresholding instead of clipping: the quantile of the predicted image's sizes, such as 0.995
    #[arg(long, value_name = "P")]
    pub threshold: Option<f64>,
    /// Classifier-free guidance: eps = eps_uncond + W (eps_class - eps_uncond); 1 is none
    #[arg(long, value_name = "W", allow_negative_numbers = true)]
    pub guidance: Option<f64>,
    /// How far guidance is rescaled to the deviation without it, 0 to 1 [default: 0]
    #[arg(long, value_name = "PHI")]
    pub guidance_rescale: Option<f64>,
    /// Guide only at noise levels sigma = sqrt((1 - alpha_bar) / alpha_bar) above A and up to B
    #[arg(long, value_name = "A,B")]
    pub guidance_interval: Option<String>,
    /// Guide by a classifier of noisy images: a run of train-classifier on the same data and process
    #[arg(long, value_name = "RUN")]
    pub classifier: Option<PathBuf>,
    /// How strongly it guides; 0 is not at all [default: 1]
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    pub classifier_scale: Option<f64>,
    /// Langevin steps with the score after each step (ddpm and ddim)
    #[arg(long, value_name = "N")]
    pub corrector: Option<u32>,
    /// Their ratio of drift to noise [default: 0.16]
    #[arg(long, value_name = "R")]
    pub snr: Option<f64>,
    /// Class of every image, by name or number; a conditional model without it draws the classes in turn
    #[arg(long, value_name = "NAME|K")]
    pub class: Option<String>,
}

/// The way from noise to images that the arguments ask for, of a model.
pub(super) struct Way {
    pub sampler: Sampler,
    /// The classifier that guides, and how strongly.
    pub guide: Option<(Classifier, f64)>,
    /// The class of every image; `None`: all in turn.
    pub class: Option<u32>,
    /// How many classes there are: the model's, or of an unconditional one those of the classifier that guides it.
    pub classes: usize,
}

impl Sampling {
    /// The first flag that is given.
    pub(super) fn first_given(&self) -> Option<&'static str> {
        let Sampling { sampler, grid: Grid { steps, spacing }, eta, variance, clip_x0, threshold, .. } = self;
        let Sampling { guidance, guidance_rescale, guidance_interval, classifier, classifier_scale, .. } = self;
        let Sampling { corrector, snr, class, .. } = self;
        let given = [
            ("--sampler", sampler.is_some()),
            ("--steps", steps.is_some()),
            ("--spacing", spacing.is_some()),
            ("--eta", eta.is_some()),
            ("--variance", variance.is_some()),
            ("--clip-x0", clip_x0.is_some()),
            ("--threshold", threshold.is_some()),
            ("--guidance", guidance.is_some()),
            ("--guidance-rescale", guidance_rescale.is_some()),
            ("--guidance-interval", guidance_interval.is_some()),
            ("--classifier", classifier.is_some()),
            ("--classifier-scale", classifier_scale.is_some()),
            ("--corrector", corrector.is_some()),
            ("--snr", snr.is_some()),
            ("--class", class.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag)
    }

    /// What follows from the flags for a model.
    ///
    /// # Errors
    /// `Error::Usage` for flags that do not fit the model or each other, `Error::File` for a classifier that cannot be
    /// read.
    pub(super) fn of(&self, opened: &Opened) -> Result<Way> {
        let sampler = self.sampler(opened)?;
        let guide = self.guide(opened)?;
        let (class, classes) = match &guide {
            Some((classifier, _)) if opened.model.config.model.classes == 0 => {
                let c = classifier.config();
                let class = self.class.as_deref().map(|class| class_called(class, &c.class_names, c.model.classes));
                (class.transpose()?, c.model.classes)
            }
            _ => (opened.class(self.class.as_deref())?, opened.model.config.model.classes),
        };
        Ok(Way { sampler, guide, class, classes })
    }

    /// [`of`](Self::of) for a model on each of several devices.
    ///
    /// # Errors
    /// Those of [`of`](Self::of).
    pub(super) fn of_each(&self, opened: &[Opened]) -> Result<Vec<Way>> {
        let mut ways = vec![self.of(&opened[0])?];
        for other in &opened[1..] {
            let Way { sampler, guide, class, classes } = &ways[0];
            let copied = |(classifier, scale): &(Classifier, f64)| Ok((classifier.copy_to(&other.device)?, *scale));
            let guide = guide.as_ref().map(copied).transpose()?;
            ways.push(Way { sampler: sampler.clone(), guide, class: *class, classes: *classes });
        }
        Ok(ways)
    }

    /// The steps that the arguments ask for.
    fn sampler(&self, opened: &Opened) -> Result<Sampler> {
        let name = self.sampler.unwrap_or(SamplerName::Ddpm);
        let (process, m, schedule) = (&opened.model.config.diffusion, &opened.model.config.model, &opened.schedule);
        let solver = matches!(name, SamplerName::DpmPp | SamplerName::Heun);
        if let (Some(eta), true) = (self.eta, name != SamplerName::Ddim) {
            usage!("--eta {eta}: only DDIM has it, so add --sampler ddim");
        }
        match (name, self.variance) {
            (SamplerName::Ddpm, _) | (_, None) => {}
            (SamplerName::Ddim, Some(v)) => usage!("--variance {v}: DDIM's noise is --eta, so leave --variance out"),
            (_, Some(v)) => usage!("--variance {v}: {name} adds no noise, so leave --variance out"),
        }
        let (spacing, steps) = self.grid.resolve(&opened.model.stepping, schedule.len(), solver)?;
        let sampler = if name == SamplerName::Heun && spacing == Timesteps::Karras {
            Sampler::heun_over_levels(schedule, process.prediction, steps)?
        } else {
            let kept = self.grid.kept(opened, solver)?;
            let method = match name {
                SamplerName::Ddpm => {
                    Method::Ancestral(opened.variance_to_draw(self.variance, kept.len(), schedule.len())?)
                }
                SamplerName::Ddim => Method::Ddim { eta: self.eta.unwrap_or(0.0) },
                SamplerName::DpmPp => Method::DpmPp,
                SamplerName::Heun => Method::Heun,
            };
            Sampler::over(schedule, process.prediction, method, &kept)?
        };
        let limit = match (self.threshold, self.clip_x0) {
            (Some(p), Some(false)) => {
                usage!("--threshold {p} beside --clip-x0 false: thresholding limits the image, so leave one out")
            }
            (Some(p), _) => Limit::quantile(p)?,
            (None, Some(true)) => Limit::Range(1.0),
            (None, Some(false)) => Limit::None,
            (None, None) => opened.limit(),
        };
        let mut sampler = sampler.limited(limit);
        match self.guidance {
            Some(weight) => {
                let mut guidance = guidance_of(weight, m)?.rescaled(self.guidance_rescale.unwrap_or(0.0))?;
                if let Some(text) = &self.guidance_interval {
                    let (low, high) = interval(text)?;
                    guidance = guidance.within(low, high)?;
                }
                sampler = sampler.guided(guidance);
            }
            None if self.guidance_rescale.is_some() => {
                usage!("--guidance-rescale: there is no guidance to rescale, add --guidance W")
            }
            None if self.guidance_interval.is_some() => {
                usage!("--guidance-interval: there is no guidance there, add --guidance W")
            }
            None => {}
        }
        match (self.corrector, self.snr) {
            (Some(steps), snr) => sampler.corrected(Corrector { steps, snr: snr.unwrap_or(DEFAULT_SNR) }),
            (None, Some(snr)) => usage!("--snr {snr}: it is that of the corrections, so add --corrector N"),
            (None, None) => Ok(sampler),
        }
    }

    /// The classifier that guides, and how strongly.
    fn guide(&self, opened: &Opened) -> Result<Option<(Classifier, f64)>> {
        let Some(path) = &self.classifier else {
            return match self.classifier_scale {
                Some(scale) => {
                    usage!("--classifier-scale {scale}: there is no classifier to scale, add --classifier RUN")
                }
                None => Ok(None),
            };
        };
        let scale = self.classifier_scale.unwrap_or(1.0);
        if !scale.is_finite() {
            usage!("--classifier-scale {scale}: a number is expected, as in 1");
        }
        let classifier = Classifier::load(&opened.device, path)?;
        for note in classifier.notes() {
            say!("{note}");
        }
        classifier.check_guides(&opened.model.config)?;
        Ok(Some((classifier, scale)))
    }
}

impl Way {
    /// The class of image `i`, if there are classes.
    pub fn label(&self, i: usize) -> Option<u32> {
        label(self.classes, self.class, i)
    }

    /// The drawing of a model with this way.
    pub fn drawing<'a>(&'a self, opened: &'a Opened, seed: u64) -> Drawing<'a> {
        let Opened { device, model, unet, .. } = opened;
        Drawing { device, unet, params: &model.params, sampler: &self.sampler, seed }
    }

    /// Draws a batch, in [-1, 1]: of `request`, whose labels are filled in. `each` is called after every step.
    ///
    /// # Errors
    /// Those of [`Drawing::draw`].
    pub fn draw(
        &self,
        drawing: &Drawing<'_>,
        request: Request<'_>,
        each: impl FnMut(Progress<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let first = request.first as usize;
        let labels: Option<Vec<u32>> = (first..first + request.count).map(|i| self.label(i)).collect();
        let conditional = drawing.unet.model().classes > 0;
        let request = Request { labels: labels.as_deref().filter(|_| conditional), ..request };
        let wanted = labels.clone().unwrap_or_default();
        let mut slope = self.guide.as_ref().map(|(classifier, scale)| {
            (move |x: &Tensor, t: f32| classifier.gradient(drawing.device, x, t, &wanted), *scale)
        });
        let slope = slope.as_mut().map(|(gradient, scale)| (gradient as &mut dyn FnMut(&Tensor, f32) -> _, *scale));
        drawing.draw(&request, slope, each)
    }
}

/// The drawing of a model on each of several devices, and how many images of `count` one of them draws together.
///
/// # Errors
/// `Error::Failed` for a device without room for so many.
pub(super) fn drawings<'a>(
    opened: &'a [Opened],
    ways: &'a [Way],
    seed: u64,
    count: usize,
) -> Result<(Vec<Drawing<'a>>, usize)> {
    let drawings: Vec<_> = opened.iter().zip(ways).map(|(opened, way)| way.drawing(opened, seed)).collect();
    let most = drawings.iter().map(Drawing::batch).min().expect("one device at least");
    let mut together = several::batch(most, count, drawings.len());
    let needed = |drawing: &Drawing<'_>, way: &Way, together| {
        let of_guide = |(classifier, _): &(Classifier, f64)| classifier.memory(drawing.device, drawing.shape(together));
        Ok::<u64, Error>(drawing.memory(together)? + way.guide.as_ref().map_or(Ok(0), of_guide)?)
    };
    // Drawing::batch knows nothing of a classifier, whose pass keeps what its gradient needs.
    for (drawing, way) in drawings.iter().zip(ways).filter(|(_, way)| way.guide.is_some()) {
        let available = available_on(drawing.device).unwrap_or(u64::MAX);
        while together > 1 && needed(drawing, way, together)? > available {
            together = together.div_ceil(2);
        }
    }
    let advice = if together > 1 { "draw fewer with --count" } else { "this model is too large to draw here" };
    for ((opened, drawing), way) in opened.iter().zip(&drawings).zip(ways) {
        opened.check_memory(together, needed(drawing, way, together)?, advice)?;
    }
    Ok((drawings, together))
}

/// `--guidance` of a model: any weight but 1 asks it without a class.
///
/// # Errors
/// `Error::Usage` for a weight that is no number or that the model cannot be guided by.
pub(super) fn guidance_of(weight: f64, m: &Model) -> Result<Guidance> {
    if m.classes == 0 {
        usage!("--guidance {weight}: this model is unconditional, leave --guidance out");
    }
    let guidance = Guidance::new(weight)?;
    if !m.null_class && weight != 1.0 {
        usage!("--guidance {weight}: this model knows no images without a class; train one with label_dropout above 0");
    }
    Ok(guidance)
}

/// `A,B` of `--guidance-interval`.
fn interval(text: &str) -> Result<(f64, f64)> {
    let ends = text.split_once(',').and_then(|(low, high)| Some((low.trim().parse().ok()?, high.trim().parse().ok()?)));
    ends.ok_or_else(|| {
        Error::Usage(format!(
            "--guidance-interval {text}: two noise levels with a comma are expected, such as 0.28,2.9"
        ))
    })
}
