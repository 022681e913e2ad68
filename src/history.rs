//! What a run folder tells of its run: settings, measurements, events, samples, checkpoints; and whether a process
//! trains in it.
//!
//! It is read while another process may write to it, and after any crash. What is missing or broken is left out and
//! named in [`History::faults`]; only a folder without settings is refused.
//!
//! events.jsonl holds what metrics.jsonl cannot: when processes began and ended, on which machines, what they warned
//! of. It is only ever added to, so it also knows of steps that a resumed run has done again. [`Entry`] is a line of
//! it, for its writer too ([`crate::train`]). Neither file is needed to resume a run.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint;
use crate::config::Config;
use crate::error::{Error, Result};

/// The file of the measurements in a run folder.
pub const METRICS: &str = "metrics.jsonl";
/// The file of the events in a run folder.
pub const EVENTS: &str = "events.jsonl";
/// Bytes of a log that are read at most; a line every step for a million steps is 400 MB.
const LONGEST_LOG: u64 = 1 << 30;

/// A line of events.jsonl.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// When: RFC 3339 in UTC, to the second.
    pub time: String,
    /// The step after which it happened.
    pub step: u32,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

impl Entry {
    /// An event that happens now.
    pub fn now(step: u32, event: Event) -> Self {
        Entry { time: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(), step, event }
    }
}

/// What happens to a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// A process begins to train.
    Start(Box<Process>),
    /// What the process said of settings, data and device before it began.
    Note {
        /// A sentence.
        text: String,
    },
    /// Something went wrong that training can do without.
    Warning {
        /// A sentence.
        text: String,
    },
    /// A checkpoint was saved.
    Checkpoint,
    /// The process has ended, and could say so.
    End {
        /// How it ended.
        how: How,
        /// Why it failed, one sentence.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        text: Option<String>,
    },
}

/// How a process ended that could say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// All steps are done.
    Done,
    /// It was asked to stop, as by Ctrl-C.
    Stopped,
    /// It failed.
    Failed,
}

/// A process that trains, and what it runs on. What is not known is empty or 0.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Process {
    /// Steps of the run in all.
    pub steps: u32,
    /// Whether it goes on with a run that was there.
    pub resumed: bool,
    /// Version of this program.
    pub version: String,
    /// The device, as it names itself.
    pub device: String,
    /// Type of the activations.
    pub precision: String,
    /// Name of the machine.
    pub host: String,
    /// Operating system and architecture.
    pub system: String,
    /// Name of the processor.
    pub processor: String,
    /// Hardware threads that the process may use.
    pub threads: usize,
    /// CUDA version of the driver, on a GPU.
    pub driver: String,
    /// CUDA version of the compiler that made the kernels, on a GPU.
    pub compiler: String,
    /// Number of the process.
    pub process: u32,
}

/// The measurements of a run: for each key of metrics.jsonl, and for each place of a list, a curve.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// In the order of their first appearance.
    pub curves: Vec<Curve>,
    /// Lines that are no measurement of a step.
    pub broken: usize,
}

/// Something measured, by step.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// Its key in metrics.jsonl.
    pub key: String,
    /// Its place, where the key holds a list.
    pub place: Option<usize>,
    /// In the order of the steps.
    pub points: Vec<Point>,
}

/// A measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// After this step.
    pub step: u32,
    /// Seconds of training until then; 0 if the line does not say.
    pub seconds: f64,
    /// What was measured; finite.
    pub value: f64,
}

impl Metrics {
    /// From the bytes of a metrics.jsonl. Of lines whose steps do not grow, as after a crash, the later ones count.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut metrics = Metrics::default();
        let mut lines: Vec<(u32, serde_json::Map<String, Value>)> = Vec::new();
        // What stands behind the last newline may be a line that is being written.
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        for line in bytes[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            let parsed = serde_json::from_slice::<serde_json::Map<String, Value>>(line).ok();
            let step = |line: &serde_json::Map<String, Value>| u32::try_from(line.get("step")?.as_u64()?).ok();
            let Some((step, line)) = parsed.and_then(|line| Some((step(&line)?, line))) else {
                metrics.broken += 1;
                continue;
            };
            while lines.last().is_some_and(|(last, _)| *last >= step) {
                lines.pop();
            }
            lines.push((step, line));
        }
        let mut places: BTreeMap<(String, Option<usize>), usize> = BTreeMap::new();
        let Metrics { curves, .. } = &mut metrics;
        for (step, line) in lines {
            let seconds = line.get("elapsed_s").and_then(Value::as_f64).unwrap_or(0.0);
            let mut add = |key: &str, place: Option<usize>, value: &Value| {
                let Some(value) = value.as_f64().filter(|value| value.is_finite()) else { return };
                let curve = *places.entry((key.to_string(), place)).or_insert_with(|| {
                    curves.push(Curve { key: key.to_string(), place, points: Vec::new() });
                    curves.len() - 1
                });
                curves[curve].points.push(Point { step, seconds, value });
            };
            for (key, value) in line.iter().filter(|(key, _)| *key != "step") {
                match value {
                    Value::Array(values) => {
                        values.iter().enumerate().for_each(|(place, value)| add(key, Some(place), value));
                    }
                    value => add(key, None, value),
                }
            }
        }
        metrics
    }

    /// The curve of a key that holds no list.
    pub fn curve(&self, key: &str) -> &[Point] {
        let curve = self.curves.iter().find(|curve| curve.key == key && curve.place.is_none());
        curve.map_or(&[], |curve| &curve.points)
    }

    /// The last measurement of a key that holds no list.
    pub fn last(&self, key: &str) -> Option<Point> {
        self.curve(key).last().copied()
    }
}

/// A file of the run's samples.
#[derive(Clone, Debug)]
pub struct Samples {
    /// The step after which they were drawn.
    pub step: u32,
    /// A PNG.
    pub path: PathBuf,
    /// Its bytes.
    pub bytes: u64,
    /// When it was written, if the system says.
    pub written: Option<SystemTime>,
}

/// What one process did for the run.
#[derive(Clone, Debug)]
pub struct Session {
    /// When it began to train, and after which step.
    pub start: (String, u32),
    /// What it ran on.
    pub process: Process,
    /// The steps of its checkpoints.
    pub checkpoints: Vec<u32>,
    /// What it said before it began.
    pub notes: Vec<String>,
    /// What it warned of, with time and step.
    pub warnings: Vec<(String, u32, String)>,
    /// Time, step, how and why it ended; `None` if it trains still or was killed.
    pub end: Option<(String, u32, How, Option<String>)>,
}

/// What has become of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// A process trains.
    Running,
    /// A process of this number trains, but is suspended.
    Suspended(u32),
    /// All steps are done.
    Done,
    /// It was asked to stop, and can be resumed.
    Stopped,
    /// It failed, with this sentence.
    Failed(String),
    /// The process ended without a word.
    Killed,
    /// No process trains; an earlier version did not note how the last one ended.
    Ended,
    /// It may be running; this system does not say.
    Unknown,
}

/// What a run folder tells.
#[derive(Clone, Debug)]
pub struct History {
    /// The folder.
    pub path: PathBuf,
    /// The settings.
    pub config: Config,
    /// What was measured.
    pub metrics: Metrics,
    /// What the processes did, in their order; none for a run of an earlier version.
    pub sessions: Vec<Session>,
    /// Pictures of samples, by step.
    pub samples: Vec<Samples>,
    /// Number of files of samples that no PNG can hold.
    pub arrays: usize,
    /// The newest whole checkpoint, with the time when it was written.
    pub checkpoint: Option<(u32, PathBuf, Option<SystemTime>)>,
    /// Whether a process holds the folder; `None` if the system does not say.
    pub in_use: Option<bool>,
    /// What could not be read, a sentence each.
    pub faults: Vec<String>,
}

impl History {
    /// Reads a run folder.
    ///
    /// # Errors
    /// `Error::File` if there is none, it has no config.toml, or that cannot be read.
    pub fn read(run: &Path) -> Result<Self> {
        let settings = run.join("config.toml");
        if !settings.is_file() {
            let what = match run.is_dir() {
                false => "is not a run folder: there is no such folder",
                true => "is not a run folder: it holds no config.toml; a run of ddpm-cuda train has one",
            };
            return Err(Error::file(run, what));
        }
        let config = Config::read(&settings)?;
        // Before the events and after them, so that neither a process that ends meanwhile nor one that begins is taken
        // for one that was killed.
        let before = is_in_use(run);
        let mut faults = Vec::new();
        let metrics = Metrics::parse(&read_log(&run.join(METRICS), &mut faults));
        if metrics.broken > 0 {
            faults.push(format!("{} lines of {METRICS} are no measurements of a step and left out", metrics.broken));
        }
        let entries = parse_events(&read_log(&run.join(EVENTS), &mut faults));
        let (samples, arrays) = list_samples(&run.join("samples"));
        let checkpoint = checkpoint::newest(run).ok().flatten().and_then(|path| {
            let step = path.file_name()?.to_str()?.parse().ok()?;
            let written = fs::metadata(&path).and_then(|found| found.modified()).ok();
            Some((step, path, written))
        });
        let sessions = sessions(entries);
        let in_use = if before == Some(false) { is_in_use(run) } else { before };
        Ok(History { path: run.into(), config, metrics, sessions, samples, arrays, checkpoint, in_use, faults })
    }

    /// The last step that is known to be done.
    pub fn step(&self) -> u32 {
        let logged = self.metrics.last("loss").map_or(0, |point| point.step);
        match self.sessions.last() {
            Some(session) => {
                let ended = session.end.as_ref().map_or(session.start.1, |(_, step, ..)| *step);
                session.checkpoints.last().copied().unwrap_or(0).max(ended).max(logged)
            }
            None => logged.max(self.checkpoint.as_ref().map_or(0, |(step, ..)| *step)),
        }
    }

    /// Seconds of training, over all processes.
    pub fn seconds(&self) -> Option<f64> {
        self.metrics.last("elapsed_s").map(|point| point.value)
    }

    /// Seconds that a step takes, from the last ten lines of the log.
    pub fn seconds_per_step(&self) -> Option<f64> {
        let times = self.metrics.curve("elapsed_s");
        let last = times.last()?;
        let first = times[..times.len() - 1].iter().rev().take(10).next_back();
        let (step, seconds) = first.map_or((0, 0.0), |first| (first.step, first.value));
        let per_step = (last.value - seconds) / f64::from(last.step - step);
        (per_step.is_finite() && per_step >= 0.0).then_some(per_step)
    }

    /// What has become of the run.
    pub fn state(&self) -> State {
        match self.sessions.last() {
            Some(Session { end: Some((_, _, how, text)), .. }) => match how {
                How::Done => State::Done,
                How::Stopped => State::Stopped,
                How::Failed => State::Failed(text.clone().unwrap_or_default()),
            },
            Some(session) => match self.in_use {
                Some(true) if is_suspended(&session.process) => State::Suspended(session.process.process),
                Some(true) => State::Running,
                Some(false) => State::Killed,
                None => State::Unknown,
            },
            None if self.in_use == Some(true) => State::Running,
            None if self.step() >= self.config.steps => State::Done,
            None => State::Ended,
        }
    }
}

/// The lines of an events.jsonl; what is none is left out, as events of later versions are.
pub fn parse_events(bytes: &[u8]) -> Vec<Entry> {
    bytes.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

/// The events by the process that wrote them.
fn sessions(entries: Vec<Entry>) -> Vec<Session> {
    let mut sessions: Vec<Session> = Vec::new();
    for Entry { time, step, event } in entries {
        if let Event::Start(process) = event {
            let (checkpoints, notes, warnings) = (Vec::new(), Vec::new(), Vec::new());
            let process = *process;
            sessions.push(Session { start: (time, step), process, checkpoints, notes, warnings, end: None });
            continue;
        }
        // What comes before the first start is of a file that was cut.
        let Some(session) = sessions.last_mut() else { continue };
        match event {
            Event::Start(_) => {}
            Event::Note { text } => session.notes.push(text),
            Event::Warning { text } => session.warnings.push((time, step, text)),
            Event::Checkpoint => session.checkpoints.push(step),
            Event::End { how, text } => session.end = Some((time, step, how, text)),
        }
    }
    sessions
}

/// The bytes of a log, none if there is no such file.
fn read_log(path: &Path, faults: &mut Vec<String>) -> Vec<u8> {
    let read = || -> io::Result<Vec<u8>> {
        let file = File::open(path)?;
        if file.metadata()?.len() > LONGEST_LOG {
            return Err(io::Error::other("it is longer than 1 GiB"));
        }
        let mut bytes = Vec::new();
        file.take(LONGEST_LOG).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().unwrap_or_else(|e| {
        if e.kind() != io::ErrorKind::NotFound {
            faults.push(Error::file(path, format!("cannot be read: {e}")).to_string());
        }
        Vec::new()
    })
}

/// The files STEP.png of a folder by step, and the number of files STEP.npz.
fn list_samples(folder: &Path) -> (Vec<Samples>, usize) {
    let Ok(entries) = fs::read_dir(folder) else { return (Vec::new(), 0) };
    let (mut samples, mut arrays) = (Vec::new(), 0);
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let Some(step) = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok()) else { continue };
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("png") => {
                let Ok(found) = fs::metadata(&path) else { continue };
                samples.push(Samples { step, bytes: found.len(), written: found.modified().ok(), path });
            }
            Some("npz") => arrays += 1,
            _ => {}
        }
    }
    samples.sort_by_key(|samples| samples.step);
    (samples, arrays)
}

/// Whether a process holds a run folder; `None` if the system does not say.
fn is_in_use(run: &Path) -> Option<bool> {
    // A shared lock, given back at once: a process that wants the folder in this moment tries again.
    match File::open(run).ok()?.try_lock_shared() {
        Ok(()) => Some(false),
        Err(TryLockError::WouldBlock) => Some(true),
        Err(TryLockError::Error(_)) => None,
    }
}

/// Whether the process runs on this machine and is stopped, as by Ctrl-Z.
fn is_suspended(process: &Process) -> bool {
    if !cfg!(target_os = "linux") || process.host != host() {
        return false;
    }
    // `NUMBER (NAME) STATE ...`; a name may hold parentheses.
    let state = fs::read_to_string(format!("/proc/{}/stat", process.process)).unwrap_or_default();
    state.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}

/// The name of this machine, empty if it does not say.
pub fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = name.or_else(|| ["COMPUTERNAME", "HOSTNAME"].iter().find_map(|key| std::env::var(key).ok()));
    name.unwrap_or_default().trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(metrics: &Metrics, key: &str) -> Vec<(u32, f64)> {
        metrics.curve(key).iter().map(|point| (point.step, point.value)).collect()
    }

    #[test]
    fn broken_lines_are_counted_and_the_last_one_may_be_unfinished() {
        let text = "{\"step\":1,\"loss\":2.0,\"elapsed_s\":0.5}\nnonsense\n{\"loss\":1}\n[1]\n\
                    {\"step\":4294967296,\"loss\":1}\n\
                    {\"step\":2,\"loss\":null,\"by\":[1,null,3]}\n{\"step\":3,\"lo";
        let metrics = Metrics::parse(text.as_bytes());
        assert_eq!(metrics.broken, 4);
        assert_eq!(points(&metrics, "loss"), [(1, 2.0)]);
        assert_eq!(metrics.curve("loss")[0].seconds, 0.5);
        let by: Vec<_> = metrics.curves.iter().filter(|curve| curve.key == "by").map(|curve| curve.place).collect();
        assert_eq!(by, [Some(0), Some(2)]);
        assert_eq!(Metrics::parse(b"").curves, []);
    }

    #[test]
    fn of_steps_that_were_done_twice_the_later_lines_count() {
        let line = |step: u32, loss: f64| format!("{{\"step\":{step},\"loss\":{loss}}}\n");
        let text: String = [(1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (4, 40.0)].map(|(s, l)| line(s, l)).concat();
        assert_eq!(points(&Metrics::parse(text.as_bytes()), "loss"), [(1, 1.0), (2, 20.0), (4, 40.0)]);
    }

    #[test]
    fn events_are_read_as_they_were_written() {
        let process = Process { steps: 9, host: "a \"b\"\n".into(), ..Process::default() };
        let events = [
            Event::Note { text: "before".into() },
            Event::Start(Box::new(process.clone())),
            Event::Warning { text: "line\nbreak".into() },
            Event::Checkpoint,
            Event::End { how: How::Failed, text: Some("why".into()) },
        ];
        let entries: Vec<Entry> = events.into_iter().map(|event| Entry::now(7, event)).collect();
        let mut text: String = entries.iter().map(|e| serde_json::to_string(e).unwrap() + "\n").collect();
        assert_eq!(text.lines().count(), entries.len(), "one line each: {text}");
        text += "{\"time\":\"x\",\"step\":8,\"event\":\"of a later version\"}\nnonsense\n{\"time\":\"x\",\"st";
        let read = parse_events(text.as_bytes());
        assert_eq!(read, entries);
        let sessions = sessions(read);
        assert_eq!((sessions.len(), &sessions[0].process, &sessions[0].checkpoints[..]), (1, &process, &[7][..]));
        assert_eq!(sessions[0].end.as_ref().map(|(_, step, how, _)| (*step, *how)), Some((7, How::Failed)));
        assert!(sessions[0].notes.is_empty(), "what stands before the first start is left out");
    }
}
