//! The commands of the program, one file each: arguments, checks, calls, output. The work is done by the library below,
//! which does not need this module.

pub mod convert;
pub mod data;
pub mod encode;
pub mod eval;
pub mod info;
pub mod inpaint;
pub mod interpolate;
pub mod likelihood;
mod on_data;
mod opened;
mod parts;
pub mod predict;
pub mod profile;
pub mod quality;
mod ranks;
pub mod report;
pub mod sample;
mod sampling;
mod several;
mod signals;
pub mod train;
pub mod train_classifier;
pub mod watch;

use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::checkpoint::{self, Loaded};
use crate::device::{Choice, Device, Devices, Precision};
use crate::error::{Error, Result};
use crate::names::Named;
use crate::output;
use crate::{say, usage};

/// The help of `--precision`.
const PRECISION: &str = "f32; tf32: f32 in memory, but convolutions and linear layers multiply operands of 10 bits of \
                         fraction, each off by up to 2^-11, on tensor cores; bf16: activations and gradients of half \
                         the size. All but f32 need a GPU";

/// `--model` and `--set`, for the commands that use a model.
#[derive(Clone, Debug, clap::Args)]
pub struct Of {
    /// Run folder (its newest checkpoint), checkpoint, model folder of diffusers, or .pt file of OpenAI's
    #[arg(long, value_name = "RUN|CHECKPOINT|FOLDER|FILE.pt")]
    pub model: PathBuf,
    /// A flag of OpenAI's scripts that FILE.pt does not tell, such as num_heads=4; may be given several times
    #[arg(long, value_name = "FLAG=VALUE")]
    pub set: Vec<String>,
}

impl Of {
    /// [`checkpoint::load_with`], saying what it says.
    ///
    /// # Errors
    /// Those of [`checkpoint::load_with`].
    pub fn load(&self, device: &Device) -> Result<Loaded> {
        let model = checkpoint::load_with(device, &self.model, &self.set)?;
        for note in &model.notes {
            say!("{note}");
        }
        Ok(model)
    }
}

/// `--device`, `--precision` and `--eager`, for the commands that use a model.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct On {
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: Choice,
    /// What is computed in.
    #[arg(long, help = PRECISION, default_value = "f32", value_parser = choice::<Precision>())]
    pub precision: Precision,
    /// On a GPU, launch kernel by kernel instead of whole steps as CUDA graphs: slower, the same numbers
    #[arg(long)]
    pub eager: bool,
}

impl On {
    /// [`Device::open`], saying what it says.
    ///
    /// # Errors
    /// `Error::Failed` for a GPU or a precision that is not available.
    pub fn open(&self) -> Result<Device> {
        open(self.device, self.precision, self.eager)
    }
}

/// [`On`] for the commands that share out images among several GPUs.
#[derive(Clone, Debug, clap::Args)]
pub struct OnSeveral {
    /// auto, cpu, cuda, cuda:N, or several GPUs of one kind as cuda:0-7 or cuda:0,2,3, which share out the images
    #[arg(long, default_value = "auto", value_name = "DEVICES")]
    pub device: Devices,
    /// What is computed in.
    #[arg(long, help = PRECISION, default_value = "f32", value_parser = choice::<Precision>())]
    pub precision: Precision,
    /// On a GPU, launch kernel by kernel instead of whole steps as CUDA graphs: slower, the same numbers
    #[arg(long)]
    pub eager: bool,
}

impl OnSeveral {
    /// [`Device::open`] for each of the devices, one at least, saying what they say.
    ///
    /// # Errors
    /// `Error::Usage` for GPUs of different kinds; those of [`On::open`].
    pub fn open(&self) -> Result<Vec<Device>> {
        let choices = match &self.device {
            Devices::One(choice) => vec![*choice],
            Devices::Gpus(gpus) => gpus.iter().map(|&gpu| Choice::Cuda(gpu)).collect(),
        };
        let opened = choices.into_iter().map(|choice| open_quietly(choice, self.precision, self.eager));
        let (devices, notes): (Vec<Device>, Vec<_>) = opened.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        several::check_alike(&devices)?;
        say_once(notes.into_iter().flatten());
        Ok(devices)
    }
}

/// [`On::open`] for flags of any source.
fn open(device: Choice, precision: Precision, eager: bool) -> Result<Device> {
    let (device, notes) = open_quietly(device, precision, eager)?;
    say_once(notes);
    Ok(device)
}

/// Opens a device; the sentences are to be said.
fn open_quietly(device: Choice, precision: Precision, eager: bool) -> Result<(Device, Vec<String>)> {
    let (device, notes) = Device::open(device, precision)?;
    if let (Device::Cuda(gpu), true) = (&device, eager) {
        gpu.launch_eagerly();
    }
    Ok((device, notes))
}

/// Says each sentence, those that several devices have in common once.
fn say_once(notes: impl IntoIterator<Item = String>) {
    let mut said = Vec::new();
    for note in notes {
        if !said.contains(&note) {
            say!("{note}");
            said.push(note);
        }
    }
}

/// Refuses a file of `flag` that cannot be written, before hours are spent on what it is to hold.
fn check_writable(flag: &str, file: &Path) -> Result<()> {
    let parent = output::parent(file);
    if !parent.is_dir() {
        return Err(Error::file(file, format!("cannot be written: there is no folder {}", parent.display())));
    }
    if file.is_dir() {
        usage!("{flag} {}: is a folder; a file is expected", file.display());
    }
    tempfile::tempfile_in(parent).map_err(|e| Error::file(file, format!("cannot be written: {e}")))?;
    Ok(())
}

/// Parses a name of `T`; the help lists them.
fn choice<T: Named + Send + Sync>() -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(T::NAMES).map(|name| T::named(&name).expect("clap lets none but these names through"))
}
