//! A run that starts from the weights of a given model (fine-tuning): the model's network and process become the run's,
//! weights and moving average begin as the model's, at step 0 and with Adam's moments at zero.
//!
//! The network is fully convolutional, so the images may have another size than the model's; its levels keep their
//! attention. An unconditional model may be given classes: their embedding begins at zero, so that the network begins
//! as the model. Random rows, as of a new network, would disturb every block from the first step on. Classes that the
//! model has keep their numbers: the data's class k begins with the model's row k, which is said where names differ.

use std::path::{Path, PathBuf};

use super::Trainer;
use crate::checkpoint::{self, Description};
use crate::classes::first_difference;
use crate::config::{BETAS, Config, Diffusion, FILE_OF_BETAS, Given, Model, SETTINGS, Size};
use crate::error::Result;
use crate::usage;

/// The largest learning rate that is a default of such a run: the weights are trained already.
pub const LARGEST_LEARNING_RATE: f64 = 1e-4;

/// The settings `own` with those spelled as in `other` where 0 and a number mean the same network and process.
fn like(mut own: Config, other: &Config) -> Config {
    let (model, theirs) = (&mut own.model, &other.model);
    if model.time_channels == theirs.time_channels() {
        model.time_channels = theirs.time_channels;
    }
    if model.middle_groups == theirs.middle_groups() {
        model.middle_groups = theirs.middle_groups;
    }
    if own.diffusion.end_betas() == other.diffusion.end_betas() {
        own.diffusion.beta_start = other.diffusion.beta_start;
        own.diffusion.beta_end = other.diffusion.beta_end;
    }
    own
}

/// A model to start from.
pub struct Init {
    path: PathBuf,
    model: Description,
}

impl Init {
    /// Reads the configuration of the model at `path`, which may be anything that [`checkpoint::load`] opens.
    ///
    /// # Errors
    /// Those of [`checkpoint::describe`].
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Init { path: std::path::absolute(path).unwrap_or(path.into()), model: checkpoint::describe(path)? })
    }

    /// Makes the model's network and process those of `config`, and notes the model there. Of what is `given`, image
    /// size, dropout, variance and the classes of an unconditional model are kept. What the model decides counts as
    /// given from then on. Returns sentences for the user.
    ///
    /// # Errors
    /// `Error::Usage` for a setting that was given and contradicts the model.
    pub fn adopt(&self, config: &mut Config, given: &mut Given) -> Result<Vec<String>> {
        let (own, theirs) = (config.clone(), &self.model.config);
        config.model = theirs.model.clone();
        config.diffusion = theirs.diffusion.clone();
        config.class_names.clone_from(&theirs.class_names);
        config.init = self.path.to_string_lossy().into_owned();
        if given.has("image_size") {
            config.model.image_size = own.model.image_size;
        }
        if given.has("dropout") {
            config.model.dropout = own.model.dropout;
        }
        if given.has("variance") {
            config.diffusion.variance = own.diffusion.variance;
        }
        if config.model.classes == 0 {
            config.model.classes = own.model.classes;
        }
        config.model.null_class |= own.model.null_class;
        if config.model.image_size != Size::DATA {
            self.keep_attention(&mut config.model);
        }
        if own.diffusion.trained_betas != config.diffusion.trained_betas
            && let Some(key) = [FILE_OF_BETAS].iter().chain(&BETAS).find(|&&key| key != "timesteps" && given.has(key))
        {
            let has = if config.diffusion.trained_betas.is_empty() { "" } else { ", one by one" };
            usage!("{key} is given, but the model of --init has other betas{has}; leave it out to take them");
        }
        let asked = like(own, config);
        for ((setting, (key, asked)), (_, has)) in SETTINGS.iter().zip(asked.entries()).zip(config.entries()) {
            let open = key == "channels" && asked == "0";
            if given.has(key) && setting.is_of_model() && !open && asked != has {
                usage!("{key} = {asked} is given, but the model of --init has {has}; leave it out to take the model's");
            }
        }
        SETTINGS.iter().filter(|setting| setting.is_of_model()).for_each(|setting| given.add(setting.key));
        let mut notes = self.model.notes.clone();
        if !given.has("learning_rate") && config.learning_rate > LARGEST_LEARNING_RATE {
            config.learning_rate = LARGEST_LEARNING_RATE;
            given.add("learning_rate");
            notes.push(format!("learning_rate = {LARGEST_LEARNING_RATE}, since the weights are trained already"));
        }
        Ok(notes)
    }

    /// Names the levels with attention by the sides that they have in images of the size of `model`.
    fn keep_attention(&self, model: &mut Model) {
        let theirs = &self.model.config.model;
        let levels = (0..theirs.levels()).filter(|&level| theirs.attention_at(level));
        model.attention_resolutions = levels.map(|level| model.size_at(level).longer()).collect();
    }

    /// Settles what depends on the data, once they are known, and compares the settings with the model. Returns
    /// sentences for the user.
    ///
    /// # Errors
    /// `Error::Usage` for settings that are not those of the model.
    pub(super) fn settle(&self, config: &mut Config) -> Result<Vec<String>> {
        let theirs = &self.model.config;
        self.keep_attention(&mut config.model);
        let mut expected = config.clone();
        let Model { image_size, dropout, classes, .. } = config.model;
        expected.model = Model { image_size, dropout, null_class: config.model.null_class, ..theirs.model.clone() };
        if theirs.model.classes == 0 {
            expected.model.classes = classes;
        }
        self.keep_attention(&mut expected.model);
        expected.diffusion = Diffusion { variance: config.diffusion.variance, ..theirs.diffusion.clone() };
        for ((key, is), (_, wanted)) in config.entries().zip(expected.entries()) {
            if is != wanted {
                usage!("{key} = {is}, but the model of --init has {wanted}");
            }
        }
        if config.diffusion != expected.diffusion {
            usage!("the betas of this run are not those of the model of --init");
        }
        let mut notes = vec![format!("starts from the weights of {}", self.path.display())];
        if image_size != theirs.model.image_size {
            notes.push(format!(
                "images of {image_size} where the model has {}: the network is fully convolutional, and its levels keep their attention",
                theirs.model.image_size
            ));
        }
        if classes != theirs.model.classes {
            notes.push(format!(
                "the model has no classes: the embedding of {classes} classes is new and begins at zero"
            ));
        } else if config.model.null_class != theirs.model.null_class {
            notes.push("the model has no null class: its row of the embedding is new and begins at zero".into());
        }
        if let Some(k) = first_difference(&config.class_names, &theirs.class_names) {
            let (own, was) = (&config.class_names[k], &theirs.class_names[k]);
            notes.push(format!(
                "class {k} is {own} here and {was} in the model: classes keep their numbers, so its row starts as {was}"
            ));
        }
        Ok(notes)
    }

    /// Gives the model's weights to a trainer at step 0.
    ///
    /// # Errors
    /// Those of [`checkpoint::load`].
    pub(super) fn begin(&self, trainer: &mut Trainer) -> Result<()> {
        let given = checkpoint::load(trainer.device(), &self.path)?.params;
        trainer.begin_with(&given)
    }
}
