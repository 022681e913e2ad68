//! `run.json` of a checkpoint: what it was made from, so that a run is not continued with anything else.
//!
//! It holds the settings that the numbers follow from, all but [`MAY_CHANGE`], and what the data were. Its bytes follow
//! from the state of the run: they hold no date, no machine and no full path.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{read_json, write_json};
use crate::config::{Config, MAY_CHANGE};
use crate::data::Data;
use crate::error::{Error, Result};
use crate::text::shell_word;

const FILE: &str = "run.json";

/// What a checkpoint was made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    settings: Map<String, Value>,
    /// The betas, if they do not follow from settings.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    trained_betas: Vec<f64>,
    data: Option<DataMark>,
}

/// What a run's data are: enough to notice that they have changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataMark {
    /// `mnist`, or the last part of the path.
    pub source: String,
    /// Number of images to train on.
    pub training_images: usize,
    /// Number of images kept out of training.
    pub held_out_images: usize,
    /// Rows x columns x channels of each image.
    pub extent: String,
    /// [`Data::fingerprint`].
    pub fingerprint: String,
}

impl DataMark {
    /// The mark of `data`, which was read from `config.data`.
    pub fn of(config: &Config, data: &Data) -> Self {
        let name = Path::new(&config.data).file_name();
        DataMark {
            source: name.map_or_else(|| config.data.clone(), |name| name.to_string_lossy().into_owned()),
            training_images: data.train.len(),
            held_out_images: data.held_out.len(),
            extent: data.train.extent().to_string(),
            fingerprint: data.fingerprint(),
        }
    }

    fn extent_and_numbers(&self) -> String {
        let DataMark { training_images, held_out_images, extent, .. } = self;
        format!("{training_images} training and {held_out_images} held-out images of {extent}")
    }
}

impl Origin {
    pub(super) fn new(config: &Config, data: Option<&DataMark>) -> Self {
        let settings = config.values().filter(|(key, _)| is_kept(key));
        Origin {
            settings: settings.map(|(key, value)| (key.to_string(), json_of(value))).collect(),
            trained_betas: config.diffusion.trained_betas.clone(),
            data: data.cloned(),
        }
    }

    /// Reads the file of a checkpoint; `None` if it has none, as those of earlier versions.
    ///
    /// # Errors
    /// `Error::File` for a file that is damaged.
    pub fn read(checkpoint: &Path) -> Result<Option<Self>> {
        let path = checkpoint.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let origin = serde_json::from_value(Value::Object(read_json(&path)?));
        origin.map(Some).map_err(|e| Error::file(&path, format!("does not say what the checkpoint was made from: {e}")))
    }

    pub(super) fn write(&self, checkpoint: &Path) -> Result<()> {
        write_json(&checkpoint.join(FILE), self)
    }

    /// Refuses settings with which the run would not go on as it began, naming each with both values. `settings` is
    /// where they stand.
    ///
    /// # Errors
    /// `Error::File` for such settings, and for a checkpoint with a setting that this version does not know.
    pub fn check_settings(&self, checkpoint: &Path, settings: &Path, config: &Config) -> Result<()> {
        let mut then = config.clone();
        for (key, value) in self.settings.iter().filter(|(key, _)| is_kept(key)) {
            then.set(key, &spelling(value)).map_err(|e| Error::file(checkpoint.join(FILE), e))?;
        }
        let differ = config.entries().zip(then.entries()).filter(|(now, then)| now != then);
        let mut differ: Vec<String> =
            differ.map(|((key, now), (_, then))| format!("{key} = {now} where the checkpoint has {then}")).collect();
        if config.diffusion.trained_betas != self.trained_betas {
            differ.push("trained_betas has other betas than the checkpoint".into());
        }
        if differ.is_empty() {
            return Ok(());
        }
        let what = format!(
            "is not what {} was trained with: {}; set it back, or start a new run from its weights with --init {}",
            checkpoint.display(),
            differ.join(", "),
            shell_word(checkpoint)
        );
        Err(Error::file(settings, what))
    }

    /// Refuses data other than those the run began with. `source` is where `data` were read. A .ddpm file and what it
    /// was made of are the same data.
    ///
    /// # Errors
    /// `Error::File` for such data.
    pub fn check_data(&self, checkpoint: &Path, source: &str, config: &Config, data: &Data) -> Result<()> {
        let Some(then) = &self.data else { return Ok(()) };
        let fingerprint = data.fingerprint_like(&then.fingerprint);
        if then.fingerprint == fingerprint {
            return Ok(());
        }
        let now = DataMark { fingerprint, ..DataMark::of(config, data) };
        let (was, is) = (then.extent_and_numbers(), now.extent_and_numbers());
        let change = if was == is {
            format!("{was} as before, but with other pixels or labels")
        } else {
            format!("{is}, where there were {was}")
        };
        let what = format!(
            "is not the data that {} was trained on: {change}; put them back, or start a new run from its weights with --init {}",
            checkpoint.display(),
            shell_word(checkpoint)
        );
        Err(Error::file(source, what))
    }
}

/// Whether the numbers of a run follow from this setting. From `init` they do only at the first step, and it is a path.
fn is_kept(key: &str) -> bool {
    !MAY_CHANGE.contains(&key) && key != "init"
}

fn json_of(value: toml::Value) -> Value {
    serde_json::to_value(value).expect("no setting is a date, and numbers and text are JSON")
}

/// A value in the spelling of `--set`.
fn spelling(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(spelling).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}
