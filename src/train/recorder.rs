//! What a run leaves for those who watch it, beside metrics.jsonl: events, TensorBoard's files, the report.
//!
//! None of it is needed to train or to resume. What cannot be written costs a sentence. Of several ranks the first
//! alone writes.

use std::fs;
use std::mem;
use std::path::{Path, PathBuf};

use super::log::{Fault, Lines, drop_unfinished_line};
use super::{Trainer, Watch};
use crate::device::{Device, cuda};
use crate::error::{Error, Result};
use crate::history::{self, EVENTS, Entry, Event, How, Process};
use crate::kernels;
use crate::output::png_size;
use crate::output::tensorboard::{self, EventFile, Value};
use crate::report;

/// Passes everything on to a [`Watch`], and keeps what is said until there is a folder to write it to.
pub(super) struct Said<'a> {
    pub watch: &'a mut dyn Watch,
    pub events: Vec<Event>,
}

impl Watch for Said<'_> {
    fn say(&mut self, line: &str) {
        self.watch.say(line);
        self.events.push(Event::Note { text: line.into() });
    }

    fn warn(&mut self, line: &str) {
        self.watch.warn(line);
        self.events.push(Event::Warning { text: line.into() });
    }
}

/// Passes everything on to a [`Watch`], and writes what is worth to be kept to the run's folder.
pub(super) struct Recorder<'a> {
    watch: &'a mut dyn Watch,
    run: PathBuf,
    /// This rank writes to it.
    writes: bool,
    events: Lines,
    /// Steps done.
    step: u32,
    board: Option<EventFile>,
    /// The first step of the next event file of TensorBoard.
    next: u32,
    board_fault: Fault,
    report_fault: Fault,
}

impl<'a> Recorder<'a> {
    /// Records that `trainer` begins in the folder `run`, and what was said before.
    pub fn open(run: &Path, trainer: &Trainer, resumed: bool, said: Vec<Event>, watch: &'a mut dyn Watch) -> Self {
        let (step, writes) = (trainer.steps_done(), trainer.exchange().is_first());
        let mut recorder = Recorder {
            watch,
            run: run.into(),
            writes,
            events: Lines::new(run.join(EVENTS), writes, drop_unfinished_line),
            step,
            board: None,
            next: step + 1,
            board_fault: Fault::default(),
            report_fault: Fault::default(),
        };
        recorder.event(Event::Start(Box::new(process(trainer, resumed))));
        said.into_iter().for_each(|event| recorder.event(event));
        recorder
    }

    fn event(&mut self, event: Event) {
        self.events.write(&Entry::now(self.step, event), self.watch);
    }

    /// A line of metrics.jsonl, of `step`.
    pub fn line(&mut self, step: u32, line: &serde_json::Value) {
        self.board(step, &scalars(line));
    }

    /// A file of samples, of `step`. TensorBoard shows pictures alone.
    pub fn samples(&mut self, step: u32, path: &Path) {
        if self.writes && path.extension().is_some_and(|ending| ending == "png") {
            match fs::read(path) {
                Ok(png) => {
                    if let Some((h, w)) = png_size(&png) {
                        self.board(step, &[("samples".into(), Value::Image { h, w, png: &png })]);
                    }
                }
                Err(e) => self.board_said(Err(Error::file(path, format!("cannot be read: {e}")))),
            }
        }
    }

    /// A checkpoint has been saved after `step`.
    pub fn saved(&mut self, step: u32) {
        self.step = step;
        self.event(Event::Checkpoint);
    }

    /// Training has ended after `step`.
    pub fn ended(&mut self, step: u32, how: How, text: Option<String>) {
        self.step = step;
        self.event(Event::End { how, text });
    }

    /// Writes the report anew.
    pub fn report(&mut self) {
        if !self.writes {
            return;
        }
        let path = report::path(&self.run);
        let mut fault = mem::take(&mut self.report_fault);
        match report::write(&[&self.run], &path) {
            Ok(()) => fault.is_over(&path, self),
            Err(e) => fault.occurred(&e, "training goes on without the report", self),
        }
        self.report_fault = fault;
    }

    /// The end: says so if events could not be written.
    pub fn close(self) {
        self.events.close(self.watch);
    }

    fn board(&mut self, step: u32, values: &[(String, Value<'_>)]) {
        if self.writes {
            let written = self.try_board(step, values);
            self.board_said(written);
        }
    }

    fn try_board(&mut self, step: u32, values: &[(String, Value<'_>)]) -> Result<()> {
        if self.board.as_ref().is_some_and(|board| !board.is_there()) {
            self.board = None;
            self.next = step;
        }
        let board = match self.board.take() {
            Some(board) => board,
            None => EventFile::create(&tensorboard::folder(&self.run), &history::host(), self.next)?,
        };
        self.board.insert(board).write(step, values)
    }

    fn board_said(&mut self, written: Result<()>) {
        let mut fault = mem::take(&mut self.board_fault);
        match written {
            Ok(()) => fault.is_over(&tensorboard::folder(&self.run), self),
            Err(e) => fault.occurred(&e, "training goes on, and TensorBoard lacks these steps", self),
        }
        self.board_fault = fault;
    }
}

impl Watch for Recorder<'_> {
    fn say(&mut self, line: &str) {
        self.watch.say(line);
    }

    fn warn(&mut self, line: &str) {
        self.watch.warn(line);
        self.event(Event::Warning { text: line.into() });
    }

    fn begin(&mut self, done: u32, steps: u32) {
        self.watch.begin(done, steps);
    }

    fn measured(&mut self, text: String) {
        self.watch.measured(text);
    }

    fn step(&mut self) {
        self.step += 1;
        self.watch.step();
    }

    fn end(&mut self) {
        self.watch.end();
    }
}

/// The numbers of a line of metrics.jsonl with their tags: those of the held-out images in a group of their own, those
/// of a list counted from 1.
fn scalars(line: &serde_json::Value) -> Vec<(String, Value<'static>)> {
    let mut scalars = Vec::new();
    for (key, value) in line.as_object().into_iter().flatten().filter(|(key, _)| *key != "step") {
        let tag = match key.strip_prefix("validation_") {
            Some(key) => format!("validation/{key}"),
            None => format!("train/{key}"),
        };
        // What was not measured is null.
        let mut add = |tag, value: &serde_json::Value| {
            scalars.extend(value.as_f64().map(|number| (tag, Value::Scalar(number))));
        };
        match value.as_array() {
            Some(list) => list.iter().zip(1..).for_each(|(value, place)| add(format!("{tag}/{place}"), value)),
            None => add(tag, value),
        }
    }
    scalars
}

/// What this process runs on.
fn process(trainer: &Trainer, resumed: bool) -> Process {
    let device = trainer.device();
    let (driver, compiler) = match device {
        Device::Cuda(_) => (cuda::driver_version().ok().flatten(), kernels::COMPILER.map(String::from)),
        Device::Cpu(_) | Device::Meta(_) => (None, None),
    };
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpus.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
    Process {
        steps: trainer.config().steps,
        resumed,
        version: env!("CARGO_PKG_VERSION").into(),
        device: device.to_string(),
        precision: device.precision().to_string(),
        host: history::host(),
        system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        processor: name.map_or(String::new(), |(_, name)| name.trim().into()),
        threads: rayon::current_num_threads(),
        driver: driver.unwrap_or_default(),
        compiler: compiler.unwrap_or_default(),
        process: std::process::id(),
    }
}
