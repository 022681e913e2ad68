//! `ddpm-cuda data`: images of any source in one file that is mapped into memory.

use std::path::PathBuf;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use super::choice;
use crate::config::{Config, OnBadImage, Preset};
use crate::data::{self, Progress, Source, part_of};
use crate::error::{Error, Result};
use crate::output;
use crate::text::{self, GIB, grouped, shell_word};
use crate::{say, usage};

/// Off a terminal, seconds between two lines.
const QUIET_S: f64 = 30.0;

/// Arguments of `ddpm-cuda data`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Images: whatever --data of train takes, such as a folder, a .parquet or .tar file, or a pattern of several
    #[arg(value_name = "SOURCE")]
    pub source: String,
    /// The file to make; its name ends in .ddpm
    #[arg(long, value_name = "FILE.ddpm")]
    pub out: PathBuf,
    /// Size that images are cropped and resized to: 64 or 28x20, rows x columns [default: the data's, if it has one]
    #[arg(long, value_name = "N")]
    pub image_size: Option<String>,
    /// 1 for grey, 3 for colour [default: the data's]
    #[arg(long, value_name = "N")]
    pub channels: Option<usize>,
    /// What transparent images are laid over: white, black, grey or #rrggbb [default: white]
    #[arg(long, value_name = "COLOUR")]
    pub background: Option<String>,
    /// An image that cannot be used is an error (stop) or is left out and listed in FILE.ddpm.skipped.txt (skip)
    #[arg(long, default_value = "stop", value_parser = choice::<OnBadImage>())]
    pub on_bad_image: OnBadImage,
}

/// Runs the command.
///
/// # Errors `Error::Usage` for a name or a size that is none; `Error::File` for a source that cannot be used and a file
/// that cannot be written.
pub fn run(args: &Args) -> Result<()> {
    if args.out.extension().is_none_or(|ending| ending != "ddpm") {
        usage!("--out {}: a name that ends in .ddpm is expected", args.out.display());
    }
    let mut config = Config::preset(Preset::Auto);
    config.data.clone_from(&args.source);
    config.on_bad_image = args.on_bad_image;
    let channels = args.channels.unwrap_or(0).to_string();
    let size = args.image_size.as_deref().unwrap_or("0");
    let settings =
        [("image_size", Some(size)), ("channels", Some(&*channels)), ("background", args.background.as_deref())];
    for (key, value) in settings.into_iter().filter_map(|(key, value)| Some((key, value?))) {
        config.set(key, value).map_err(|e| Error::Usage(format!("--{}: {e}", key.replace('_', "-"))))?;
    }
    let source = Source::open_for(&config, &args.out)?;
    let mut terminal = Terminal::default();
    let converted = data::convert(source, &config, &args.out, &mut terminal);
    terminal.bar.finish_and_clear();
    let converted = converted.map_err(|e| match e {
        // In the words of this command's flags.
        Error::File { path, what } => {
            let what = what.replace("--set image_size=", "--image-size ").replace("--set channels=", "--channels ");
            Error::File { path, what }
        }
        other => other,
    });
    let converted = converted.inspect_err(|e| {
        if matches!(e, Error::File { .. }) && part_of(&args.out).exists() {
            say!("what is done is in {}, and the same command goes on from there", part_of(&args.out).display());
        }
    })?;
    let seconds = terminal.began.map_or(0.0, |began| began.elapsed().as_secs_f64());
    if !converted.skipped.is_empty() {
        let mut name = args.out.as_os_str().to_os_string();
        name.push(".skipped.txt");
        let list: String = converted.skipped.iter().map(|image| format!("{image}\n")).collect();
        output::write_atomically(name.as_ref(), list.as_bytes())?;
        say!(
            "left out {}, which cannot be used: {}",
            text::images(converted.skipped.len()),
            PathBuf::from(name).display()
        );
    }
    say!(
        "{}: {} of {}, {:.2} GiB; {} converted in {seconds:.1} s, {:.0} images/s",
        args.out.display(),
        text::images(converted.images),
        converted.extent,
        converted.bytes as f64 / GIB,
        grouped(converted.decoded as u64),
        converted.decoded as f64 / seconds.max(1e-9)
    );
    say!("to train on it: ddpm-cuda train --data {}", shell_word(&args.out));
    Ok(())
}

/// A bar on a terminal, lines off it.
struct Terminal {
    bar: ProgressBar,
    began: Option<Instant>,
    last_line: Instant,
}

impl Default for Terminal {
    fn default() -> Self {
        Terminal { bar: ProgressBar::hidden(), began: None, last_line: Instant::now() }
    }
}

impl Progress for Terminal {
    fn say(&mut self, line: &str) {
        self.bar.suspend(|| say!("{line}"));
    }

    fn images(&mut self, before: usize, done: usize, images: usize) {
        let Some(began) = self.began else {
            if before > 0 {
                say!("{} of {} images are there already", grouped(before as u64), grouped(images as u64));
            }
            let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} images, {per_sec}, {eta} left");
            self.bar = ProgressBar::new(images as u64)
                .with_style(style.expect("a valid template"))
                .with_position(before as u64);
            self.bar.reset_eta();
            self.began = Some(Instant::now());
            return;
        };
        self.bar.set_position(done as u64);
        if self.bar.is_hidden() && self.last_line.elapsed().as_secs_f64() > QUIET_S {
            let rate = (done - before) as f64 / began.elapsed().as_secs_f64();
            say!("{} of {} images, {rate:.0} images/s", grouped(done as u64), grouped(images as u64));
            self.last_line = Instant::now();
        }
    }
}
