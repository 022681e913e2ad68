//! The log of a run: a line of metrics.jsonl every few steps.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use super::StepReport;
use crate::error::{Error, Result};
use crate::meter::Quarters;
use crate::output;

/// Measurements accumulated since the last line of the log.
#[derive(Default)]
pub(super) struct Report {
    /// The last step.
    last: Option<StepReport>,
    steps: u32,
    loss: f64,
    quarters: Quarters,
    images: usize,
    /// Seconds that the steps took.
    pub seconds: f64,
}

impl Report {
    pub fn add(&mut self, step: StepReport, images: usize) {
        self.steps += 1;
        self.loss += step.loss;
        self.quarters.merge(&step.quarters);
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

    pub fn line(&self, done: u32) -> serde_json::Value {
        json!({
            "step": done,
            "loss": self.loss(),
            "loss_by_quarter": self.quarters.means(),
            "grad_norm": self.last.as_ref().map(|step| step.grad_norm),
            "lr": self.last.as_ref().map(|step| step.learning_rate),
            "images_per_s": self.images_per_s(),
        })
    }
}

/// metrics.jsonl: one object per line.
pub(super) struct Log {
    path: PathBuf,
    file: File,
    /// Seconds that the run took before this process, and when this process began.
    before: f64,
    started: Instant,
}

impl Log {
    /// Opens the log of a run that continues after step `done`. Drops lines of later steps and a last line that a crash
    /// cut short.
    pub fn open(run: &Path, done: u32) -> Result<Self> {
        let path = run.join("metrics.jsonl");
        let text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            other => other.map_err(|e| Error::file(&path, format!("cannot be read: {e}")))?,
        };
        let mut kept = String::new();
        let mut before = 0.0;
        for line in text.lines() {
            let Ok(value) = serde_json::from_str::<serde_json::Value>(line) else { continue };
            if value["step"].as_u64().is_some_and(|step| step <= u64::from(done)) {
                before = value["elapsed_s"].as_f64().unwrap_or(before);
                kept.push_str(line);
                kept.push('\n');
            }
        }
        output::write_atomically(&path, kept.as_bytes())?;
        let file = fs::OpenOptions::new().append(true).open(&path);
        let file = file.map_err(|e| Error::file(&path, format!("cannot be written: {e}")))?;
        Ok(Log { path, file, before, started: Instant::now() })
    }

    pub fn write(&mut self, mut line: serde_json::Value) -> Result<()> {
        line["elapsed_s"] = json!(self.before + self.started.elapsed().as_secs_f64());
        let written = writeln!(self.file, "{line}");
        written.map_err(|e| Error::file(&self.path, format!("cannot be written: {e}")))
    }
}
