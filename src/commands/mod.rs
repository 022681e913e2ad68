//! The commands of the program, one file each, read from top to bottom: arguments, checks, what is called, what is
//! said. What they do is in the library below them; whoever calls that needs none of this.

pub mod info;
pub mod predict;
pub mod sample;
pub mod train;

use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::device::{Choice, Device, Precision};
use crate::error::Result;
use crate::names::Named;

/// `--device` and `--precision`, which every command that computes takes.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct On {
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: Choice,
    /// Type of activations and gradients
    #[arg(long, default_value = "f32", value_parser = choice::<Precision>())]
    pub precision: Precision,
}

impl On {
    /// [`Device::open`].
    ///
    /// # Errors
    /// `Error::Failed` for a GPU or a precision that cannot be had.
    pub fn open(&self) -> Result<Device> {
        Device::open(self.device, self.precision)
    }
}

/// Reads one of `T`'s names; the help lists them.
fn choice<T: Named + Send + Sync>() -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(T::NAMES).map(|name| T::named(&name).expect("clap lets none but these names through"))
}
