//! `ddpm-cuda report`: a run, or several side by side, as one page of HTML.

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::{report, say, usage};

/// Arguments of `ddpm-cuda report`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folders; several are compared
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// The page to write [default: RUN/report.html; for several runs report.html]
    #[arg(long, value_name = "FILE.html")]
    pub out: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// A folder that is no run, a page that cannot be written.
pub fn run(args: &Args) -> Result<()> {
    let out = match (&args.out, &args.runs[..]) {
        (Some(out), _) => out.clone(),
        (None, [run]) => report::path(run),
        (None, _) => "report.html".into(),
    };
    if !out.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("html")) {
        usage!("--out {}: the page is HTML, so its name must end in .html", out.display());
    }
    let runs: Vec<&Path> = args.runs.iter().map(PathBuf::as_path).collect();
    report::write(&runs, &out)?;
    say!("report: {}", out.display());
    Ok(())
}
