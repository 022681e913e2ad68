//! `--data`, `--split` and `--count`: images that a model is judged by.

use std::path::Path;

use crate::classes::go_by_name;
use crate::config::{Config, OnBadImage};
use crate::data::{self, Dataset};
use crate::error::Result;
use crate::names::names;
use crate::sample::classes_by_name;
use crate::{recipe, say, usage};

/// A part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// What training does not see: the data's own test set, or the images that a run holds out.
    HeldOut,
    /// What training sees.
    Train,
    /// Both.
    All,
}

names!(Split { HeldOut = "held_out", Train = "train", All = "all" });

/// Arguments of commands that judge a model by images.
#[derive(Clone, Debug, clap::Args)]
pub struct OnData {
    /// mnist (built in), or a file or folder of images, as of `train` [default: what the model's run was trained on]
    #[arg(long, value_name = "DATA")]
    pub data: Option<String>,
    /// Which images: those that training does not see, those that it sees, or all
    #[arg(long, default_value = "held_out", value_parser = super::choice::<Split>())]
    pub split: Split,
    /// Number of images of the split, always the same ones, from all over it [default: all]
    #[arg(long, value_name = "N")]
    pub count: Option<usize>,
    /// An image that cannot be used is an error (stop) or is left out and named (skip) [default: as the model's run]
    #[arg(long, value_name = "WHAT", value_parser = super::choice::<OnBadImage>())]
    pub on_bad_image: Option<OnBadImage>,
}

/// Images with what a network needs to be judged by them.
pub struct Chosen {
    /// The training and the held-out images.
    pub data: data::Data,
    /// The images chosen: whether of the held-out ones, and the index there.
    pub images: Vec<(bool, usize)>,
    /// The class of each as the model numbers them, for a conditional network.
    pub labels: Option<Vec<u32>>,
}

impl Chosen {
    /// The bytes of image `i` of those chosen, (h, w, c).
    pub fn image(&self, i: usize) -> &[u8] {
        let (held_out, index) = self.images[i];
        if held_out { self.data.held_out.image(index) } else { self.data.train.image(index) }
    }

    /// The chosen images as a set of their own, in their order.
    pub fn dataset(&self) -> Dataset {
        let bytes = (0..self.images.len()).flat_map(|i| self.image(i).iter().copied()).collect();
        Dataset::new(self.data.train.extent(), bytes, self.labels.clone())
    }
}

impl OnData {
    /// Reads the images, fitted to the model of `config`, and says what was done to them.
    ///
    /// # Errors
    /// `Error::Usage` for a model without data, an empty split, or more images than there are; `Error::File` for data
    /// that is missing, damaged, or without the labels that the model needs.
    pub fn open(&self, config: &Config) -> Result<Chosen> {
        let mut config = config.clone();
        let has_run = !config.data.is_empty();
        if let Some(data) = &self.data {
            config.data.clone_from(data);
        }
        config.on_bad_image = self.on_bad_image.unwrap_or(config.on_bad_image);
        if config.data.is_empty() {
            usage!("this model does not say what it was trained on: give images with --data, as in --data mnist");
        }
        let (source, classes) = (data::Source::open(&config)?, config.model.classes);
        let survey = source.survey();
        if !has_run {
            config.held_out = recipe::held_out(config.held_out, survey.images);
        }
        let by_name = go_by_name(&survey.classes, &config.class_names);
        if by_name && classes > 0 {
            // The data's own numbers may go further than the model's.
            config.model.classes = survey.classes.len();
        }
        let data = source.load(&mut config)?;
        for note in &data.notes {
            say!("{note}");
        }
        let [train, held_out] = [data.train.len(), data.held_out.len()];
        let all: Vec<(bool, usize)> = match self.split {
            Split::HeldOut => (0..held_out).map(|i| (true, i)).collect(),
            Split::Train => (0..train).map(|i| (false, i)).collect(),
            Split::All => (0..train).map(|i| (false, i)).chain((0..held_out).map(|i| (true, i))).collect(),
        };
        if all.is_empty() {
            usage!(
                "--split {}: no image of {} is held out; --split train takes those there are",
                self.split,
                config.data
            );
        }
        let count = self.count.unwrap_or(all.len());
        if count == 0 || count > all.len() {
            usage!("--count {count}: {} has 1 to {} images of --split {}", config.data, all.len(), self.split);
        }
        let images: Vec<(bool, usize)> = data::choose(all.len(), count).into_iter().map(|i| all[i]).collect();
        for (held_out, set) in [(false, &data.train), (true, &data.held_out)] {
            let of_set: Vec<usize> = images.iter().filter(|image| image.0 == held_out).map(|image| image.1).collect();
            set.check(&set.rows(&of_set, false).rows)?;
        }
        let label = |&(held_out, index): &(bool, usize)| {
            let set = if held_out { &data.held_out } else { &data.train };
            set.labels().map(|labels| labels[index])
        };
        let labels: Option<Vec<u32>> = if classes > 0 { images.iter().map(label).collect() } else { None };
        let labels = match labels {
            None if classes > 0 => {
                usage!("{} has no labels, and this model needs the class of each image", config.data)
            }
            Some(own) if by_name => {
                Some(classes_by_name(Path::new(&config.data), &own, &data.classes, &config.class_names, classes)?)
            }
            own => own,
        };
        Ok(Chosen { data, images, labels })
    }
}
