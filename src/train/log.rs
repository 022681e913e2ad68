//! The logs of a run: a line of metrics.jsonl every few steps, and what all logs have in common.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use serde_json::json;

use super::{StepReport, Watch};
use crate::config::Config;
use crate::diffusion::Sampling;
use crate::error::{Error, Result};
use crate::history::METRICS;
use crate::meter::Quarters;
use crate::output;

/// Measurements accumulated since the last line of the log.
#[derive(Default)]
pub(super) struct Report {
    /// The last step.
    last: Option<StepReport>,
    steps: u32,
    loss: f64,
    vlb: f64,
    quarters: Quarters,
    /// Of a classifier.
    right: Quarters,
    images: usize,
    /// Seconds that the steps took.
    pub seconds: f64,
}

impl Report {
    pub fn add(&mut self, step: StepReport, images: usize) {
        self.steps += 1;
        self.loss += step.loss;
        self.vlb += step.vlb.unwrap_or_default();
        self.quarters.merge(&step.quarters);
        self.right.merge(&step.right);
        self.images += images;
        self.last = Some(step);
    }

    /// Mean loss of the steps.
    pub fn loss(&self) -> f64 {
        self.loss / f64::from(self.steps)
    }

    fn images_per_s(&self) -> f64 {
        self.images as f64 / self.seconds
    }

    pub fn message(&self) -> String {
        format!("loss {:.4}, {:.0} images/s", self.loss(), self.images_per_s())
    }

    /// The line of the log, of a classifier with its right answers.
    pub fn line(&self, done: u32, config: &Config) -> serde_json::Value {
        let by_quarter = match config.timestep_sampling {
            Sampling::Importance => self.quarters.means_of_weighted(config.diffusion.timesteps as u32),
            Sampling::Uniform | Sampling::Stratified => self.quarters.means(),
        };
        let mut line = json!({
            "step": done,
            "loss": self.loss(),
            "loss_by_quarter": by_quarter,
            "grad_norm": self.last.as_ref().map(|step| step.grad_norm),
            "lr": self.last.as_ref().map(|step| step.learning_rate),
            "images_per_s": self.images_per_s(),
        });
        if self.last.as_ref().is_some_and(|step| step.vlb.is_some()) {
            line["vlb"] = json!(self.vlb / f64::from(self.steps));
        }
        if config.model.classifier {
            line["accuracy"] = json!(self.right.mean());
            line["accuracy_by_quarter"] = json!(self.right.means());
        }
        line
    }
}

/// Makes the file of a log ready to be added to, if it is there.
type Prepare = Box<dyn Fn(&Path) -> Result<()>>;

/// A log of a run folder, a JSON object per line.
///
/// The file is opened anew for each write, and each write is a whole number of lines, so that whoever reads it
/// meanwhile sees whole lines, and a file that was moved away or put back is noticed. What cannot be written is kept
/// until it can.
pub(super) struct Lines {
    pub path: PathBuf,
    /// Without it nothing is written or kept: another rank writes the log.
    writes: bool,
    prepare: Prepare,
    /// True once that is done.
    prepared: bool,
    /// True once this process has written a line.
    begun: bool,
    /// Whole lines not yet written.
    waiting: String,
    fault: Fault,
}

impl Lines {
    /// A log at `path`, if this rank `writes` it. Before the first write `prepare` sees to what the file holds.
    pub fn new(path: PathBuf, writes: bool, prepare: impl Fn(&Path) -> Result<()> + 'static) -> Self {
        let (prepare, fault) = (Box::new(prepare), Fault::default());
        Lines { path, writes, prepare, prepared: false, begun: false, waiting: String::new(), fault }
    }

    /// Writes a line.
    pub fn write(&mut self, line: &impl serde::Serialize, watch: &mut dyn Watch) {
        if !self.writes {
            return;
        }
        self.waiting += &serde_json::to_string(line).expect("keys that are texts");
        self.waiting.push('\n');
        self.flush(watch);
    }

    /// The end of training: says so if lines could not be written.
    pub fn close(mut self, watch: &mut dyn Watch) {
        self.flush(watch);
        if !self.waiting.is_empty() {
            let lines = self.waiting.lines().count();
            watch.warn(&format!("{}: {lines} lines could not be written and are lost", self.path.display()));
        }
    }

    /// Writes the lines that wait. Says what prevents it, once.
    pub fn flush(&mut self, watch: &mut dyn Watch) {
        if !self.writes {
            return;
        }
        if self.begun && !self.path.exists() {
            watch.warn(&format!("{} was removed; a new one begins", self.path.display()));
            self.begun = false;
        }
        match self.try_flush() {
            Err(e) => self.fault.occurred(&e, "training goes on, and keeps the lines until they can be written", watch),
            Ok(()) => self.fault.is_over(&self.path, watch),
        }
    }

    fn try_flush(&mut self) -> Result<()> {
        if !self.prepared {
            (self.prepare)(&self.path)?;
            self.prepared = true;
        }
        if self.waiting.is_empty() {
            return Ok(());
        }
        let append = || -> io::Result<()> {
            let mut file = File::options().append(true).create(true).open(&self.path)?;
            let whole = file.metadata()?.len();
            file.write_all(self.waiting.as_bytes()).inspect_err(|_| {
                // A full disk may have taken a part of a line.
                let _ = file.set_len(whole);
            })
        };
        append().map_err(|e| Error::file(&self.path, format!("cannot be written: {e}")))?;
        self.begun = true;
        self.waiting.clear();
        Ok(())
    }
}

/// metrics.jsonl.
pub(super) struct Log {
    lines: Lines,
    /// Seconds that the run took before this process, and when this process began.
    before: Rc<Cell<f64>>,
    started: Instant,
}

impl Log {
    /// Opens the log of a run that continues after step `done`, if this rank `writes` it. Drops lines of later steps
    /// and a last line that a crash cut short.
    pub fn open(run: &Path, writes: bool, done: u32, watch: &mut dyn Watch) -> Self {
        let before = Rc::new(Cell::new(0.0));
        let seconds = before.clone();
        let prepare = move |path: &Path| drop_later_lines(path, done).map(|before| seconds.set(before));
        let mut lines = Lines::new(run.join(METRICS), writes, prepare);
        lines.flush(watch);
        Log { lines, before, started: Instant::now() }
    }

    /// Writes a line.
    pub fn write(&mut self, mut line: serde_json::Value, watch: &mut dyn Watch) {
        line["elapsed_s"] = json!(self.before.get() + self.started.elapsed().as_secs_f64());
        self.lines.write(&line, watch);
    }

    /// The end of training: says so if lines could not be written.
    pub fn close(self, watch: &mut dyn Watch) {
        self.lines.close(watch);
    }
}

/// Leaves only whole lines of steps up to `done` in a metrics.jsonl. Returns the seconds until the last of them.
fn drop_later_lines(path: &Path, done: u32) -> Result<f64> {
    let Some(found) = read(path)? else { return Ok(0.0) };
    let (mut kept, mut seconds) = (Vec::new(), 0.0);
    for line in found.split(|&byte| byte == b'\n') {
        let Ok(value) = serde_json::from_slice::<serde_json::Value>(line) else { continue };
        if value["step"].as_u64().is_some_and(|step| step <= u64::from(done)) {
            seconds = value["elapsed_s"].as_f64().unwrap_or(seconds);
            kept.extend_from_slice(line);
            kept.push(b'\n');
        }
    }
    if kept != found {
        output::write_atomically(path, &kept)?;
    }
    Ok(seconds)
}

/// Drops a last line that a crash cut short.
pub(super) fn drop_unfinished_line(path: &Path) -> Result<()> {
    let Some(found) = read(path)? else { return Ok(()) };
    let whole = found.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    if whole < found.len() { output::write_atomically(path, &found[..whole]) } else { Ok(()) }
}

/// The bytes of a file, if it exists.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        found => found.map(Some).map_err(|e| Error::file(path, format!("cannot be read: {e}"))),
    }
}

/// A file that training can do without and that cannot be written: said once for each cause, and again when it is over.
#[derive(Default)]
pub(super) struct Fault {
    cause: Option<String>,
}

impl Fault {
    /// `error` has occurred; what follows from it is said with it.
    pub fn occurred(&mut self, error: &Error, consequence: &str, watch: &mut dyn Watch) {
        let cause = match error {
            // The same cause meets another file at each sample.
            Error::File { what, .. } => what.clone(),
            other => other.to_string(),
        };
        if self.cause.as_ref() != Some(&cause) {
            watch.warn(&format!("{error}; {consequence}"));
            self.cause = Some(cause);
        }
    }

    /// `path` was written.
    pub fn is_over(&mut self, path: &Path, watch: &mut dyn Watch) {
        if self.cause.take().is_some() {
            watch.say(&format!("{} is written again", path.display()));
        }
    }
}
