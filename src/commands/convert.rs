//! `ddpm-cuda convert`: a model in the files of another program.

use std::path::PathBuf;

use super::choice;
use crate::checkpoint::{self, For};
use crate::device::{Choice, Device, Precision};
use crate::error::{Error, Result};
use crate::names::names;
use crate::say;
use crate::usage;

/// Whose files are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// A model folder that diffusers opens.
    Diffusers,
    /// A model folder that this program opens, and diffusers where it can compute the same.
    Ours,
    /// A `.pt` file of improved- and guided-diffusion.
    OpenAi,
}

names!(To { Diffusers = "diffusers", Ours = "ours", OpenAi = "openai" });

/// Arguments of `ddpm-cuda convert`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folder (its newest checkpoint), checkpoint, model folder of diffusers, or .pt file of OpenAI's
    #[arg(long, value_name = "RUN|CHECKPOINT|FOLDER|FILE.pt")]
    pub model: PathBuf,
    /// FILE.pt for OpenAI's code, with its flags in model_and_diffusion.json beside it; otherwise a folder
    #[arg(long, value_name = "FOLDER|FILE.pt")]
    pub out: PathBuf,
    /// Whose files: diffusers, ours (also what diffusers has no words for), openai [default: by the ending of --out]
    #[arg(long, value_name = "WHOSE", value_parser = choice::<To>())]
    pub to: Option<To>,
    /// A flag of OpenAI's scripts that FILE.pt does not tell, such as num_heads=4; may be given several times
    #[arg(long, value_name = "FLAG=VALUE")]
    pub set: Vec<String>,
}

/// Runs the command.
///
/// # Errors
/// Those of reading the model; `Error::Usage` for an `--out` that does not go with `--to`; `Error::Failed` for a model
/// that the other files cannot say; `Error::File` for what cannot be written.
pub fn run(args: &Args) -> Result<()> {
    let out = &args.out;
    let is_pt = out.extension().is_some_and(|ending| ending == "pt");
    let to = args.to.unwrap_or(if is_pt { To::OpenAi } else { To::Diffusers });
    if is_pt != (to == To::OpenAi) {
        let wanted = if is_pt { "a folder is expected" } else { "a file that ends in .pt is expected" };
        usage!("--out {}: with --to {to} {wanted}", out.display());
    }
    if is_pt && out.exists() {
        return Err(Error::file(out, "exists already; give a new name"));
    }
    let (device, _) = Device::open(Choice::Cpu, Precision::F32)?;
    let model = checkpoint::load_with(&device, &args.model, &args.set)?;
    for note in &model.notes {
        say!("{note}");
    }
    match to {
        To::OpenAi => {
            for note in checkpoint::write_openai(out, &model.config, &model.params, &model.stepping)? {
                say!("{note}");
            }
        }
        To::Diffusers | To::Ours => {
            let whose = if to == To::Ours { For::Ours } else { For::Diffusers };
            checkpoint::write_folder(out, &model.config, &model.params, &model.stepping, whose)?;
        }
    }
    say!("{} parameters: {}", model.params.specs().count(), out.display());
    Ok(())
}
