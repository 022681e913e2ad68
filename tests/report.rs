//! What a run leaves for those who watch it: the report, TensorBoard's files, events.jsonl; and the commands `report`
//! and `watch`.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ddpm_cuda::history::{Event, How, parse_events};
use npyz::WriterBuilder;
use serde_json::Value;

use support::{PLAIN, TINY, places};

fn ddpm() -> Command {
    let mut command = Command::new(places::program());
    command.stdin(Stdio::null());
    command
}

/// Runs a command that must end with `code`; returns what it said on both.
#[track_caller]
fn ends(command: &mut Command, code: i32) -> (String, String) {
    let out = command.output().unwrap();
    let [stdout, stderr] = [out.stdout, out.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert_eq!(out.status.code(), Some(code), "{command:?}:\n{stdout}{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    (stdout, stderr)
}

/// A training on twenty small images, or on the built-in digits if `sets` ask for their classes.
fn train(run: &Path, steps: u32, sets: &[&str]) -> Command {
    let mut command = ddpm();
    command.args(["train", "--batch", "4", "--device", "cpu", "--steps", &steps.to_string(), "--out"]).arg(run);
    if !sets.contains(&"classes=10") {
        let data = run.parent().unwrap().join("images.npy");
        fs::create_dir_all(run.parent().unwrap()).unwrap();
        let options = npyz::WriteOptions::new().default_dtype().shape(&[20, 8, 8, 1]);
        let mut writer = options.writer(fs::File::create(&data).unwrap()).begin_nd().unwrap();
        writer.extend((0..20 * 64).map(|i| (i * 37 % 256) as u8)).unwrap();
        writer.finish().unwrap();
        command.args(["--preset", "mnist", "--data"]).arg(data);
    }
    command.args(TINY).args(PLAIN);
    let small = ["image_size=8", "attention_resolutions=4", "timesteps=5"];
    let often = ["keep_checkpoints=0", "log_every=1", "validate_every=2", "sample_every=2"];
    for set in small.iter().chain(&often).chain(sets) {
        command.args(["--set", set]);
    }
    command
}

fn resume(run: &Path, steps: u32) -> Command {
    let mut command = ddpm();
    command.args(["train", "--device", "cpu", "--steps", &steps.to_string(), "--resume"]).arg(run);
    command
}

fn report(runs: &[&Path]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    ends(ddpm().arg("report").args(runs).arg("--out").arg(&page), 0);
    fs::read_to_string(page).unwrap()
}

fn watch(run: &Path) -> String {
    ends(ddpm().arg("watch").arg(run), 0).0
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

fn metrics(run: &Path) -> Vec<Value> {
    read(run.join("metrics.jsonl")).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The charts of a page.
fn charts(page: &str) -> Vec<Value> {
    let (_, rest) = page.split_once("<script type=\"application/json\" id=\"charts\">").expect("numbers in the page");
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

/// Steps and values of a curve of a chart.
fn curve(page: &str, chart: &str, curve: usize) -> Vec<(u64, f64)> {
    let charts = charts(page);
    let found = charts.iter().find(|c| c["title"] == chart).unwrap_or_else(|| panic!("no chart {chart}"));
    let points = found["curves"][curve]["points"].as_array().unwrap();
    points.iter().map(|point| (point[0].as_f64().unwrap() as u64, point[2].as_f64().unwrap())).collect()
}

/// The bytes of a run's checkpoints.
fn checkpoints(run: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let folder = run.join("checkpoints");
    let files = walkdir::WalkDir::new(&folder).into_iter().map(|e| e.unwrap().into_path()).filter(|p| p.is_file());
    files.map(|file| (file.strip_prefix(&folder).unwrap().to_path_buf(), fs::read(&file).unwrap())).collect()
}

/// A record of an event file.
#[derive(Debug, Default, PartialEq)]
struct Record {
    step: u64,
    version: String,
    /// Of a session: 1 for its start.
    session: Option<u64>,
    scalars: Vec<(String, f32)>,
    /// Rows, columns and PNG.
    images: Vec<(String, u64, u64, Vec<u8>)>,
}

/// CRC-32C bit by bit, masked.
fn masked_crc(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    let crc = !crc;
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The fields of a message: number and value, that of a whole number or of bytes.
fn fields(mut bytes: &[u8]) -> Vec<(u64, u64, Vec<u8>)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let (number, content) = match key & 7 {
            0 => (varint(&mut bytes), 0),
            1 => (0, 8),
            2 => (0, varint(&mut bytes) as usize),
            5 => (0, 4),
            other => panic!("wire type {other}"),
        };
        found.push((key >> 3, number, bytes[..content].to_vec()));
        bytes = &bytes[content..];
    }
    found
}

/// The records of an event file, whose checksums must be right.
fn records(path: &Path) -> Vec<Record> {
    let bytes = fs::read(path).unwrap();
    let mut rest = &bytes[..];
    let mut records = Vec::new();
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        let crc = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
        let message = &rest[12..12 + length];
        assert_eq!((crc(8), crc(12 + length)), (masked_crc(&rest[..8]), masked_crc(message)), "checksums");
        let mut record = Record::default();
        for (field, number, content) in fields(message) {
            match field {
                1 => assert!(f64::from_le_bytes(content.try_into().unwrap()) > 1.6e9, "a time of this century"),
                2 => record.step = number,
                3 => record.version = String::from_utf8(content).unwrap(),
                5 => values(&content, &mut record),
                7 => record.session = fields(&content).first().map(|(_, status, _)| *status),
                other => panic!("field {other} of an event"),
            }
        }
        records.push(record);
        rest = &rest[16 + length..];
    }
    records
}

/// The values of a summary.
fn values(summary: &[u8], record: &mut Record) {
    for (_, _, value) in fields(summary) {
        let mut tag = String::new();
        for (field, _, content) in fields(&value) {
            match field {
                1 => tag = String::from_utf8(content).unwrap(),
                2 => record.scalars.push((tag.clone(), f32::from_le_bytes(content.try_into().unwrap()))),
                4 => {
                    let image = fields(&content);
                    let of = |field: u64| image.iter().find(|(number, ..)| *number == field).unwrap();
                    record.images.push((tag.clone(), of(1).1, of(2).1, of(4).2.clone()));
                }
                other => panic!("field {other} of a value"),
            }
        }
    }
}

/// The event files of a run in the order in which TensorBoard reads them.
fn event_files(run: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(run.join("tensorboard")).unwrap().map(|entry| entry.unwrap().path());
    files.collect::<BTreeSet<PathBuf>>().into_iter().collect()
}

#[test]
fn a_run_leaves_a_report_events_and_files_of_tensorboard() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    ends(&mut train(&run, 5, &["checkpoint_every=2"]), 0);
    let logged = metrics(&run);

    let page = read(run.join("report.html"));
    for part in [
        "<h1>run</h1>",
        "all steps done",
        "<th scope=\"row\">learning_rate</th>",
        "<mark>[8, 16]</mark>",
        std::env::consts::ARCH,
        "CPU, ",
        env!("CARGO_PKG_VERSION"),
        "3, the last at step 5",
    ] {
        assert!(page.contains(part), "{part:?} is not in the page");
    }
    let of = |key: &str| -> Vec<(u64, f64)> {
        logged.iter().filter_map(|line| Some((line["step"].as_u64()?, line[key].as_f64()?))).collect()
    };
    for (chart, place, key) in [
        ("Loss", 0, "loss"),
        ("Loss", 1, "validation_loss"),
        ("Gradient norm", 0, "grad_norm"),
        ("Learning rate", 0, "lr"),
        ("Images per second", 0, "images_per_s"),
    ] {
        let (shown, logged) = (curve(&page, chart, place), of(key));
        assert_eq!(shown.len(), logged.len(), "points of {key}");
        for (shown, logged) in shown.iter().zip(&logged) {
            assert!(shown.0 == logged.0 && (shown.1 / logged.1 - 1.0).abs() < 1e-5, "{key}: {shown:?} {logged:?}");
        }
    }
    assert_eq!(charts(&page).iter().filter(|chart| chart["title"].as_str().unwrap().contains("quarter")).count(), 2);
    assert_eq!(page.matches("src=\"data:image/png;base64,").count(), 3, "grids after steps 2, 4 and 5");
    // Nothing is asked of a network: the only address is the name of SVG's elements.
    assert_eq!(page.matches("://").count(), 1, "addresses in the page");

    let events = parse_events(read(run.join("events.jsonl")).as_bytes());
    let steps: Vec<u32> = events.iter().filter(|e| e.event == Event::Checkpoint).map(|e| e.step).collect();
    assert_eq!(steps, [2, 4, 5]);
    assert!(matches!(&events[0].event, Event::Start(process) if !process.resumed && process.steps == 5));
    assert_eq!(events.last().unwrap().event, Event::End { how: How::Done, text: None });

    let files = event_files(&run);
    assert_eq!(files.len(), 1);
    let records = records(&files[0]);
    assert_eq!((records[0].version.as_str(), records[1].session, records[1].step), ("brain.Event:2", Some(1), 1));
    for (tag, key) in [("train/loss", "loss"), ("train/lr", "lr"), ("validation/loss", "validation_loss")] {
        let found = records.iter().flat_map(|r| r.scalars.iter().map(|(tag, value)| (r.step, tag, *value)));
        let found: Vec<(u64, f32)> =
            found.filter(|(_, t, _)| *t == tag).map(|(step, _, value)| (step, value)).collect();
        let logged: Vec<(u64, f32)> = of(key).into_iter().map(|(step, value)| (step, value as f32)).collect();
        assert_eq!(found, logged, "{tag}");
    }
    let images: Vec<_> = records.iter().flat_map(|r| r.images.iter().map(|image| (r.step, image))).collect();
    assert_eq!(images.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [2, 4, 5]);
    for (step, (tag, h, w, png)) in images {
        let file = run.join(format!("samples/{step}.png"));
        let (width, height) = image::image_dimensions(&file).unwrap();
        assert_eq!((tag.as_str(), *h, *w), ("samples", u64::from(height), u64::from(width)));
        assert!(*png == fs::read(&file).unwrap(), "the picture of step {step} is another");
    }
}

/// A run that has lost its newest checkpoint goes on from the one before: TensorBoard is told to forget the steps that
/// are done again, and the page has them once.
#[test]
fn a_resumed_run_has_every_step_once() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    ends(&mut train(&run, 5, &["checkpoint_every=2"]), 0);
    for step in [4, 5] {
        fs::remove_dir_all(run.join(format!("checkpoints/{step}"))).unwrap();
    }
    // A crash has cut the last event short.
    let events = run.join("events.jsonl");
    fs::write(&events, read(&events).trim_end().trim_end_matches('}')).unwrap();
    ends(&mut resume(&run, 6), 0);
    assert!(read(&events).lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{}", read(&events));

    let files = event_files(&run);
    assert_eq!(files.len(), 2);
    let (first, second) = (records(&files[0]), records(&files[1]));
    assert!(first.iter().any(|record| record.step == 5), "the first process went on to step 5");
    assert_eq!((second[1].session, second[1].step), (Some(1), 3));
    // As TensorBoard does: a start forgets its step and later ones.
    let mut steps = Vec::new();
    for record in first.iter().chain(&second) {
        match record.session {
            Some(_) => steps.retain(|step| *step < record.step),
            None if record.scalars.iter().any(|(tag, _)| tag == "train/loss") => steps.push(record.step),
            None => {}
        }
    }
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);

    let page = read(run.join("report.html"));
    let shown: Vec<u64> = curve(&page, "Loss", 0).iter().map(|(step, _)| *step).collect();
    assert_eq!(shown, [1, 2, 3, 4, 5, 6]);
    assert_eq!(charts(&page)[0]["resumes"], serde_json::json!([2]));
    for part in ["resumed once", "killed, or the machine went down", "resumed <time", "all steps done"] {
        assert!(page.contains(part), "{part:?} is not in the page");
    }
}

#[test]
fn what_comes_from_users_stays_text() {
    let folder = tempfile::tempdir().unwrap();
    // Names of folders that Windows has, too.
    let run = folder.path().join("a&b 'c' {d}");
    ends(&mut train(&run, 2, &["classes=10", "sample_every=0", "held_out=0.001"]), 0);
    let evil = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'&amp;";
    let quoted = serde_json::to_string(evil).unwrap();
    let settings = run.join("config.toml");
    let with_names = read(&settings).lines().filter(|l| !l.starts_with("class_names")).collect::<Vec<_>>().join("\n");
    fs::write(&settings, format!("{with_names}\nclass_names = [{}]\n", [&quoted[..]; 10].join(", "))).unwrap();
    let add = |name: &str, line: String| fs::write(run.join(name), read(run.join(name)) + &line + "\n").unwrap();
    add("metrics.jsonl", format!("{{\"step\":9,{quoted}:1.5,\"loss\":1}}"));
    add("events.jsonl", format!("{{\"time\":{quoted},\"step\":9,\"event\":\"warning\",\"text\":{quoted}}}"));
    add(
        "events.jsonl",
        format!("{{\"time\":{quoted},\"step\":9,\"event\":\"end\",\"how\":\"failed\",\"text\":{quoted}}}"),
    );
    let other = folder.path().join("other");
    ends(&mut train(&other, 1, &["sample_every=0"]), 0);
    for page in [report(&[&run]), report(&[&run, &other])] {
        assert_eq!(page.matches("</script").count(), 2, "ends of scripts");
        for (part, count) in [("<script", 2), ("<img", 0), ("<!--", 0), ("alert(1)</", 0)] {
            assert_eq!(page.matches(part).count(), count, "{part}");
        }
        assert!(page.contains("&lt;img src=x onerror=alert(2)&gt;&quot;&#39;&amp;amp;"), "the text is shown as it is");
        assert!(page.contains("a&amp;b &#39;c&#39; {d}"), "the run's name");
        assert!(charts(&page).iter().any(|chart| chart["title"] == evil), "the measure's name in the numbers");
    }
    // Nor does it command a terminal.
    add("events.jsonl", "{\"time\":\"x\",\"step\":9,\"event\":\"warning\",\"text\":\"\\u001b[2J\\nx\"}".into());
    let said = watch(&run);
    assert!(said.contains("\\u{1b}[2J\\nx (step 9)"), "{said}");
}

#[test]
fn broken_and_missing_files_are_named_and_the_rest_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    ends(&mut train(&run, 4, &[]), 0);
    let log = run.join("metrics.jsonl");
    fs::write(&log, format!("not json\n[]\n{}{{\"step\": 9", read(&log))).unwrap();
    fs::write(run.join("samples/2.png"), "no picture").unwrap();
    let page = report(&[&run]);
    assert!(page.contains("2 lines of metrics.jsonl are no measurements"), "broken lines are counted");
    assert_eq!(curve(&page, "Loss", 0).len(), 4);
    assert!(page.contains("1 of 2 grids are in this page"), "what is no PNG is left out");

    // A run of a version that wrote neither events nor a report.
    fs::remove_file(run.join("events.jsonl")).unwrap();
    fs::remove_file(run.join("report.html")).unwrap();
    fs::remove_dir_all(run.join("tensorboard")).unwrap();
    ends(ddpm().arg("report").arg(&run), 0);
    let page = read(run.join("report.html"));
    assert!(page.contains("The run has no events.jsonl") && page.contains("all steps done"));
    assert!(watch(&run).contains("all steps are done"));

    // One that has not logged anything yet.
    fs::remove_file(&log).unwrap();
    fs::remove_dir_all(run.join("samples")).unwrap();
    fs::remove_dir_all(run.join("checkpoints")).unwrap();
    assert!(report(&[&run]).contains("no measurements yet"));
    let said = watch(&run);
    assert!(said.contains("not running; to go on: ddpm-cuda train --resume") && said.contains("none yet"), "{said}");
}

/// From the start of a resumed run to its end: each costs a sentence, and the weights are those of an undisturbed run.
#[test]
fn what_cannot_be_written_costs_a_sentence_each() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, run) = (folder.path().join("whole"), folder.path().join("run"));
    let sets = ["checkpoint_every=2"];
    ends(&mut train(&whole, 6, &sets), 0);
    ends(&mut train(&run, 2, &sets), 0);
    for file in ["events.jsonl", "report.html"] {
        fs::remove_file(run.join(file)).unwrap();
        fs::create_dir(run.join(file)).unwrap();
        fs::write(run.join(file).join("inside"), "").unwrap();
    }
    fs::remove_dir_all(run.join("tensorboard")).unwrap();
    fs::write(run.join("tensorboard"), "a file").unwrap();
    let (said, _) = ends(&mut resume(&run, 6), 0);
    for part in ["without the report", "TensorBoard lacks these steps", "events.jsonl: cannot be read", "are lost"] {
        assert_eq!(said.matches(part).count(), 1, "{part:?} in {said}");
    }
    let (run, whole) = (checkpoints(&run), checkpoints(&whole));
    assert!(!whole.is_empty() && whole.keys().all(|file| run.contains_key(file)), "the same files");
    let differ: Vec<_> = whole.iter().filter(|(file, bytes)| run[*file] != **bytes).map(|(file, _)| file).collect();
    // How many steps a run has in all is a setting that may change, and in no checkpoint.
    assert!(differ.is_empty(), "{differ:?}");
}

#[test]
fn runs_are_compared() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = ["a/run", "b/run"].map(|name| folder.path().join(name));
    for (run, rate) in [(&a, "learning_rate=0.01"), (&b, "learning_rate=0.02")] {
        ends(&mut train(run, 4, &[rate]), 0);
    }
    let page = report(&[&a, &b]);
    let (_, differences) = page.split_once("<h2>Settings that differ</h2>").unwrap();
    let (differences, _) = differences.split_once("</section>").unwrap();
    let rows: Vec<&str> = differences.matches("<th scope=\"row\">").collect();
    // The learning rate, and the place of the data.
    assert!(rows.len() == 2 && differences.contains("<td>0.01</td><td>0.02</td>"), "{differences}");
    for (place, run) in [&a, &b].into_iter().enumerate() {
        assert_eq!(curve(&page, "Loss", place).len(), 4);
        assert_eq!(curve(&page, "Loss, validation", place).len(), 2);
        // Of the same name, so they are named by their whole paths.
        assert!(page.contains(&run.display().to_string()), "{}", run.display());
    }
    assert_ne!(curve(&page, "Loss", 0), curve(&page, "Loss", 1));
    assert_eq!(page.matches("<figure class=\"grids\">").count(), 2);
    assert!(report(&[&a, &a]).contains("the runs have the same settings"));

    assert!(ends(ddpm().arg("report").arg(&a).args(["--out", "page.txt"]), 2).1.contains(".html"));
    assert!(ends(ddpm().arg("report"), 2).1.contains("RUN"));
    let missing = folder.path().join("missing");
    for command in ["report", "watch"] {
        for (path, says) in [(&missing, "there is no such folder"), (&folder.path().to_path_buf(), "no config.toml")] {
            let (_, said) = ends(ddpm().arg(command).arg(path), 1);
            assert!(said.contains(says) && said.lines().count() == 1, "{command}: {said}");
        }
    }
    let (_, said) = ends(ddpm().arg("report").arg(&a).arg("--out").arg(missing.join("page.html")), 1);
    assert!(said.contains("page.html: cannot be written") && said.lines().count() == 1, "{said}");
}

/// A training that a test ends.
struct Training(Child);

impl Training {
    fn start(command: &mut Command) -> Self {
        Training(command.stdout(Stdio::null()).spawn().unwrap())
    }

    #[cfg(unix)]
    fn signal(&self, name: &str) {
        ends(Command::new("kill").args([&format!("-{name}"), &self.0.id().to_string()]), 0);
    }
}

impl Drop for Training {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Looks at a run until it says `part`.
#[track_caller]
fn watch_until(run: &Path, part: &str) -> String {
    let started = Instant::now();
    loop {
        let said = if run.join("config.toml").exists() { watch(run) } else { String::new() };
        if said.contains(part) {
            return said;
        }
        assert!(started.elapsed() < Duration::from_secs(120), "watch does not say {part:?}, but {said}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(unix)]
#[test]
fn watch_says_whether_a_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let often = ["checkpoint_every=5", "sample_every=5", "validate_every=5", "keep_checkpoints=2"];
    let mut training = Training::start(&mut train(&run, 1_000_000, &often));
    let said = watch_until(&run, "last samples");
    assert!(said.contains("running") && said.contains("of 1,000,000"), "{said}");
    let said = watch_until(&run, "last checkpoint step");
    for part in ["validation loss", "images/s", " left", "CPU, ", "samples/"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    if cfg!(target_os = "linux") {
        training.signal("STOP");
        watch_until(&run, "kill -CONT");
        training.signal("CONT");
        watch_until(&run, "running");
    }
    training.signal("KILL");
    training.0.wait().unwrap();
    let said = watch(&run);
    assert!(said.contains("killed") && said.contains("--resume"), "{said}");
    assert!(report(&[&run]).contains("killed, can be resumed"));

    let mut training = Training::start(&mut resume(&run, 1_000_000));
    // While it makes ready, a signal ends it without a word.
    let said = watch_until(&run, &format!("process {}", training.0.id()));
    assert!(said.contains("running"), "{said}");
    training.signal("TERM");
    assert_eq!(training.0.wait().unwrap().code(), Some(143));
    let said = watch(&run);
    assert!(said.contains("stopped") && said.contains("--resume"), "{said}");
    let page = read(run.join("report.html"));
    assert!(page.contains("stopped, can be resumed") && page.contains("resumed once"), "the report of the stopped run");
}

#[test]
fn a_failure_is_told_with_its_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let sets = ["learning_rate=1e30", "warmup_steps=0", "grad_clip=0"];
    let (_, said) = ends(&mut train(&run, 50, &sets), 1);
    let sentence = said.trim().strip_prefix("ddpm-cuda: ").unwrap();
    let told = watch(&run);
    assert!(told.contains("failed") && told.contains(sentence), "{told} does not say {sentence}");
    assert!(read(run.join("report.html")).contains("class=\"failure\""));
}
