//! The report: one page of HTML with the curves, sample grids, settings and events of a run, or of several runs.
//!
//! The page is one file with everything in it: it is opened without a server and asks for nothing from anywhere, which
//! its content security policy also says to the browser. Its curves are drawn by `page.js` from numbers in the page.
//! What comes from users (paths, names of classes, sentences that quote them) is escaped, in text and in those numbers'
//! JSON. Its size is bounded, whatever the length of the run: curves are thinned so that extremes stay (`thin`), and
//! of many sample grids an even choice is shown.
//!
//! Deliberately absent: anything computed that is not in the run folder, editing, and pages that refresh themselves.

mod thin;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use crate::config::{Config, SETTINGS};
use crate::device::Precision;
use crate::error::Result;
use crate::history::{Curve, History, How, Point, Samples, Session, State};
use crate::names::Named;
use crate::output::{png_size, write_atomically};
use crate::text::{duration, grouped};

/// Points of a curve, at most.
const POINTS: usize = 1000;
/// Sample grids of a page, at most.
const GRIDS: usize = 60;
/// Their bytes in all, at most.
const GRID_BYTES: u64 = 8 << 20;
/// Pixels across that small grids are enlarged to, at most.
const GRID_WIDTH: u32 = 560;
/// Warnings, sessions and names of classes that are listed, at most; the newest or first ones.
const LISTED: usize = 100;

/// The report of a run folder.
pub fn path(run: &Path) -> PathBuf {
    run.join("report.html")
}

/// Writes a page of these runs.
///
/// # Errors
/// `Error::File` for a folder that is no run, or a file that cannot be written.
pub fn write(runs: &[&Path], out: &Path) -> Result<()> {
    let runs = runs.iter().map(|run| History::read(run)).collect::<Result<Vec<History>>>()?;
    write_atomically(out, page(&runs).as_bytes())
}

/// The page of these runs, at least one.
pub fn page(runs: &[History]) -> String {
    let names = names(runs);
    let title = if runs.len() == 1 { format!("{} \u{2013} ddpm-cuda", names[0]) } else { "Runs of ddpm-cuda".into() };
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
         script-src 'unsafe-inline'; img-src data:\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{}</title>\n\
         <style>\n{}</style>\n</head>\n<body>\n",
        escape(&title),
        include_str!("page.css"),
    );
    match runs {
        [run] => one_header(&mut html, run, &names[0]),
        runs => several_header(&mut html, runs, &names),
    }
    warnings(&mut html, runs, &names);
    let charts = charts(runs, &names);
    section_of_charts(&mut html, &charts);
    section_of_samples(&mut html, runs, &names);
    if runs.len() > 1 {
        differences(&mut html, runs, &names);
    }
    for (run, name) in runs.iter().zip(&names) {
        let title = if runs.len() == 1 { "Processes".into() } else { format!("Processes of {name}") };
        processes(&mut html, run, &title);
    }
    if let [run] = runs {
        settings(&mut html, run);
    }
    let _ = write!(
        html,
        "</main>\n<footer>Written by ddpm-cuda {} at {}. To write it anew: <code>ddpm-cuda report RUN</code>; to compare runs: \
         <code>ddpm-cuda report RUN RUN --out FILE.html</code>.</footer>\n\
         <script type=\"application/json\" id=\"charts\">{}</script>\n<script>\n{}</script>\n</body>\n</html>\n",
        env!("CARGO_PKG_VERSION"),
        time(&humantime::format_rfc3339_seconds(SystemTime::now()).to_string()),
        script_json(&charts),
        include_str!("page.js"),
    );
    html
}

/// Short names that differ: the last parts of the folders, or the whole paths.
fn names(runs: &[History]) -> Vec<String> {
    let last = |run: &History| {
        let path = fs::canonicalize(&run.path).unwrap_or_else(|_| run.path.clone());
        path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
    };
    let names: Vec<String> = runs.iter().map(last).collect();
    let is_unique = |name: &String| names.iter().filter(|other| *other == name).count() == 1;
    let name = |(run, name): (&History, &String)| match is_unique(name) {
        true => name.clone(),
        false => run.path.display().to_string(),
    };
    runs.iter().zip(&names).map(name).collect()
}

/// What has become of a run, in a word or two and with the class of its colour.
fn state(run: &History) -> (&'static str, &'static str) {
    match run.state() {
        State::Running => ("was running when this was written", "running"),
        State::Suspended(_) => ("was suspended when this was written", "paused"),
        State::Done => ("all steps done", "done"),
        State::Stopped => ("stopped, can be resumed", "paused"),
        State::Failed(_) => ("failed", "failed"),
        State::Killed => ("killed, can be resumed", "failed"),
        State::Ended => ("not running", "paused"),
        State::Unknown => ("running, or killed", "paused"),
    }
}

fn one_header(html: &mut String, run: &History, name: &str) {
    let (words, class) = state(run);
    let _ = write!(
        html,
        "<header>\n<h1>{}</h1>\n<p class=\"state {class}\">{words}</p>\n</header>\n<main>\n<dl class=\"tiles\">\n",
        escape(name)
    );
    let mut tile = |name: &str, value: &str, more: &str| {
        let _ = writeln!(html, "<div><dt>{name}</dt><dd>{}<small>{}</small></dd></div>", escape(value), escape(more));
    };
    let (step, steps) = (run.step(), run.config.steps);
    let percent = 100.0 * f64::from(step) / f64::from(steps.max(1));
    tile("Step", &grouped(step.into()), &format!("of {}, {percent:.0} %", grouped(steps.into())));
    let loss = run.metrics.curve("loss");
    if let (Some(last), Some(best)) = (loss.last(), lowest(loss)) {
        tile("Loss", &number(last.value), &format!("lowest {} at step {}", number(best.value), best.step));
    }
    let held_out = run.metrics.curve("validation_loss");
    if let (Some(last), Some(best)) = (held_out.last(), lowest(held_out)) {
        let more = format!("lowest {} at step {}", number(best.value), best.step);
        tile("Validation loss", &number(last.value), &more);
    }
    if let Some(last) = run.metrics.last("validation_accuracy").or(run.metrics.last("accuracy")) {
        tile("Accuracy", &format!("{:.1} %", 100.0 * last.value), &format!("at step {}", last.step));
    }
    if let Some(last) = run.metrics.last("images_per_s") {
        tile("Images per second", &number(last.value), &format!("{} images a step", run.config.batch));
    }
    if let Some(seconds) = run.seconds() {
        let resumes = run.sessions.iter().filter(|session| session.process.resumed).count();
        let more = match resumes {
            0 => String::new(),
            1 => "resumed once".into(),
            many => format!("resumed {many} times"),
        };
        tile("Time", &duration(seconds), &more);
    }
    html.push_str("</dl>\n");
    if let State::Failed(text) = run.state() {
        let _ = writeln!(html, "<p class=\"failure\">{}</p>", escape(&text));
    }
}

fn several_header(html: &mut String, runs: &[History], names: &[String]) {
    let _ = write!(
        html,
        "<header>\n<h1>{} runs</h1>\n</header>\n<main>\n<div class=\"wide\"><table class=\"runs\">\n<tr><th>Run</th>\
         <th>State</th><th>Step</th><th>Loss</th><th>Validation loss</th><th>Images/s</th><th>Time</th><th>Device</th>\
         </tr>\n",
        runs.len()
    );
    for (i, (run, name)) in runs.iter().zip(names).enumerate() {
        let last = |key| run.metrics.last(key).map_or("\u{2013}".into(), |point: Point| number(point.value));
        let (words, class) = state(run);
        let device = run.sessions.last().map_or("not recorded", |session| &session.process.device);
        let _ = writeln!(
            html,
            "<tr><th scope=\"row\"><i class=\"c{}\"></i>{}</th><td><span class=\"state {class}\">{words}</span></td>\
             <td>{} of {}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            i % 8,
            escape(name),
            grouped(run.step().into()),
            grouped(run.config.steps.into()),
            last("loss"),
            last("validation_loss"),
            last("images_per_s"),
            run.seconds().map_or("\u{2013}".into(), duration),
            escape(device),
        );
    }
    html.push_str("</table></div>\n");
}

/// What the processes warned of, and what of the folders could not be read.
fn warnings(html: &mut String, runs: &[History], names: &[String]) {
    let mut items = String::new();
    for (run, name) in runs.iter().zip(names) {
        let whose = if runs.len() == 1 { String::new() } else { format!("{}: ", escape(name)) };
        let all: Vec<_> = run.sessions.iter().flat_map(|session| &session.warnings).collect();
        let left_out = all.len().saturating_sub(LISTED);
        for (at, step, text) in &all[left_out..] {
            let _ = writeln!(items, "<li>{whose}{} <small>step {step}, {}</small></li>", escape(text), time(at));
        }
        if left_out > 0 {
            let _ = writeln!(items, "<li>{whose}{left_out} earlier ones are in events.jsonl</li>");
        }
        for fault in &run.faults {
            let _ = writeln!(items, "<li>{whose}{}</li>", escape(fault));
        }
    }
    if !items.is_empty() {
        let _ = write!(html, "<section class=\"warnings\">\n<h2>Warnings</h2>\n<ul>\n{items}</ul>\n</section>\n");
    }
}

/// A chart: one or several curves over steps.
#[derive(serde::Serialize)]
struct Chart {
    title: String,
    /// What one might want to know.
    help: String,
    /// Whether a logarithmic axis suits it, if its values are positive.
    log: bool,
    curves: Vec<Line>,
    /// Steps after which the run was resumed.
    resumes: Vec<u32>,
}

/// A curve of a chart.
#[derive(serde::Serialize)]
struct Line {
    name: String,
    /// Step, seconds and value.
    points: Vec<[f64; 3]>,
}

impl Chart {
    fn new(title: impl Into<String>, help: &str, log: bool) -> Self {
        Chart { title: title.into(), help: help.into(), log, curves: Vec::new(), resumes: Vec::new() }
    }

    fn add(&mut self, name: &str, points: &[Point]) {
        let points = thin::curve(points, POINTS);
        let points = points.iter().map(|p| [f64::from(p.step), rounded(p.seconds), rounded(p.value)]).collect();
        self.curves.push(Line { name: name.into(), points });
    }
}

/// A measure of metrics.jsonl: its key, its title and a line of help, and whether a logarithmic axis suits it.
struct Measure(&'static str, &'static str, &'static str, bool);

/// How the titles of measures by quarter end.
const BY_QUARTER: &str = " by quarter of the timesteps";

/// The measures in the order of the page. That of held-out images stands in the chart of its twin.
const MEASURES: [Measure; 9] = [
    Measure("loss", "Loss", "in training the mean since the last line of the log", true),
    Measure("loss_by_quarter", "Loss by quarter of the timesteps", "from least noise (1) to most (4)", true),
    Measure("vlb", "Variational bound", "bits per dimension, without L_T", false),
    Measure("accuracy", "Accuracy", "share of noised images whose class is told rightly", false),
    Measure("accuracy_by_quarter", "Accuracy by quarter of the timesteps", "from least noise (1) to most (4)", false),
    Measure("grad_norm", "Gradient norm", "before clipping", true),
    Measure("lr", "Learning rate", "", false),
    Measure("images_per_s", "Images per second", "", false),
    Measure("log_snr", "Learned log-SNR", "of the first (1) and the last (2) timestep", false),
];

fn charts(runs: &[History], names: &[String]) -> Vec<Chart> {
    let mut charts = Vec::new();
    let mut keys: Vec<&str> = MEASURES.iter().map(|Measure(key, ..)| *key).collect();
    // Measures of other versions come last, under their keys.
    for curve in runs.iter().flat_map(|run| &run.metrics.curves) {
        let key = curve.key.strip_prefix("validation_").unwrap_or(&curve.key);
        if !keys.contains(&key) && key != "elapsed_s" {
            keys.push(key);
        }
    }
    if runs.len() > 1 {
        // Then each quarter is a chart, and what has one chart comes first.
        keys.sort_by_key(|key| key.ends_with("_by_quarter"));
    }
    for key in keys {
        let Measure(_, title, help, log) =
            MEASURES.iter().find(|Measure(known, ..)| *known == key).unwrap_or(&Measure("", "", "", false));
        let title = if title.is_empty() { key } else { title };
        match runs {
            [run] => of_one(&mut charts, run, key, Chart::new(title, help, *log)),
            runs => of_several(&mut charts, runs, names, key, title, (help, *log)),
        }
    }
    charts
}

/// Training and validation in one chart; where there are several curves of each, in two.
fn of_one(charts: &mut Vec<Chart>, run: &History, key: &str, mut chart: Chart) {
    let of = |key: &str| {
        let mut curves: Vec<&Curve> = run.metrics.curves.iter().filter(|curve| curve.key == key).collect();
        // The first quarter may be measured after another.
        curves.sort_by_key(|curve| curve.place);
        curves
    };
    let (training, held_out) = (of(key), of(&format!("validation_{key}")));
    let resumed = |session: &&Session| session.process.resumed && session.start.1 > 0;
    let resumes: Vec<u32> = run.sessions.iter().filter(resumed).map(|session| session.start.1).collect();
    let title = chart.title.clone();
    let mut of_held_out = Chart::new(format!("{title}, validation"), &chart.help, chart.log);
    for curve in training {
        chart.add(&place_name(curve, "training"), &curve.points);
    }
    for curve in held_out {
        let into = if curve.place.is_some() { &mut of_held_out } else { &mut chart };
        into.add(&place_name(curve, "validation"), &curve.points);
    }
    for mut chart in [chart, of_held_out].into_iter().filter(|chart| !chart.curves.is_empty()) {
        chart.resumes.clone_from(&resumes);
        charts.push(chart);
    }
}

fn place_name(curve: &Curve, name: &str) -> String {
    curve.place.map_or(name.into(), |place| format!("{}", place + 1))
}

/// A chart for each curve of the key, and for each of its held-out twin, with a line for each run.
fn of_several(
    charts: &mut Vec<Chart>,
    runs: &[History],
    names: &[String],
    key: &str,
    title: &str,
    (help, log): (&str, bool),
) {
    for (key, of) in [(key.to_string(), ""), (format!("validation_{key}"), ", validation")] {
        let curves = || runs.iter().flat_map(|run| &run.metrics.curves).filter(|curve| curve.key == key);
        let mut places: Vec<Option<usize>> = curves().map(|curve| curve.place).collect();
        places.sort_unstable();
        places.dedup();
        for place in places {
            let title = match (place, title.strip_suffix(BY_QUARTER)) {
                (None, _) => format!("{title}{of}"),
                (Some(place), None) => format!("{title}{of}, {}", place + 1),
                (Some(quarter), Some(title)) => format!("{title}{of}, quarter {}", quarter + 1),
            };
            let mut chart = Chart::new(title, help, log);
            for (run, name) in runs.iter().zip(names) {
                let same = |curve: &&Curve| curve.key == key && curve.place == place;
                let points = run.metrics.curves.iter().find(same).map_or(&[][..], |curve| &curve.points);
                // An empty one too, so that a run has one colour in all charts.
                chart.add(name, points);
            }
            charts.push(chart);
        }
    }
}

fn section_of_charts(html: &mut String, charts: &[Chart]) {
    html.push_str("<section>\n<h2>Curves</h2>\n");
    if charts.is_empty() {
        html.push_str("<p>metrics.jsonl holds no measurements yet.</p>\n</section>\n");
        return;
    }
    html.push_str(
        "<noscript><p>The curves are drawn by JavaScript, which is off.</p></noscript>\n\
         <p class=\"controls\"><label>Horizontal axis <select id=\"axis\"><option value=\"0\">steps</option>\
         <option value=\"1\">time</option></select></label></p>\n<div class=\"charts\">\n",
    );
    for (i, chart) in charts.iter().enumerate() {
        let help =
            if chart.help.is_empty() { String::new() } else { format!("<small>{}</small>", escape(&chart.help)) };
        let _ = writeln!(
            html,
            "<figure class=\"chart\" data-chart=\"{i}\"><figcaption><h3>{}</h3>{help}</figcaption></figure>",
            escape(&chart.title)
        );
    }
    html.push_str("</div>\n</section>\n");
}

fn section_of_samples(html: &mut String, runs: &[History], names: &[String]) {
    if runs.iter().all(|run| run.samples.is_empty() && run.arrays == 0) {
        return;
    }
    html.push_str("<section>\n<h2>Samples</h2>\n<div class=\"samples\">\n<div class=\"slides\">\n");
    let (grids, bytes) = (GRIDS / runs.len(), GRID_BYTES / runs.len() as u64);
    let mut figures = String::new();
    for (run, name) in runs.iter().zip(names) {
        let chosen = thin::grids(&run.samples, grids.max(1), bytes);
        let shown: Vec<(&Samples, Vec<u8>, (u32, u32))> = chosen.iter().filter_map(|samples| read(samples)).collect();
        let _ = write!(figures, "<figure class=\"grids\">");
        for (i, (samples, png, (h, w))) in shown.iter().enumerate() {
            let hidden = if i + 1 == shown.len() { "" } else { " hidden" };
            // Whole pixels of small pictures stay whole.
            let scale = (GRID_WIDTH / w).max(1);
            let _ = write!(
                figures,
                "<img data-step=\"{}\" width=\"{}\" height=\"{}\" alt=\"samples of {} after step {}\"{hidden} \
                 src=\"data:image/png;base64,{}\">",
                samples.step,
                w.saturating_mul(scale),
                h.saturating_mul(scale),
                escape(name),
                samples.step,
                STANDARD.encode(png),
            );
        }
        let step = shown.last().map_or("no samples".into(), |(samples, ..)| format!("step {}", samples.step));
        let whose = if runs.len() == 1 { String::new() } else { format!("{}, ", escape(name)) };
        let mut said = format!("{whose}<output>{step}</output>");
        if shown.len() < run.samples.len() {
            let (shown, all) = (shown.len(), run.samples.len());
            let _ = write!(said, " <small>{shown} of {all} grids are in this page, evenly chosen</small>");
        }
        if run.arrays > 0 {
            let _ = write!(said, " <small>{} files .npz are no pictures and left out</small>", run.arrays);
        }
        let _ = writeln!(figures, "<figcaption>{said}</figcaption></figure>");
    }
    html.push_str(&figures);
    html.push_str(
        "</div>\n<p class=\"controls\" id=\"slider\" hidden><button type=\"button\" id=\"play\">Play</button>\
         <label>Step <input type=\"range\" id=\"at\" min=\"0\" step=\"1\"></label></p>\n</div>\n\
         </section>\n",
    );
}

/// A sample grid with its bytes, rows and columns; `None` for a file that is gone or no PNG.
fn read(samples: &Samples) -> Option<(&Samples, Vec<u8>, (u32, u32))> {
    let png = fs::read(&samples.path).ok().filter(|png| png.len() as u64 <= GRID_BYTES)?;
    let size = png_size(&png)?;
    Some((samples, png, size))
}

/// The settings as rows of key, value and help: beside those of the table what a run folder's config.toml has more.
fn entries(config: &Config) -> Vec<(&'static str, String, &'static str)> {
    let mut entries = vec![("preset", config.preset.to_string(), "what the other settings started from")];
    entries.extend(config.entries().zip(SETTINGS).map(|((key, value), setting)| (key, value, setting.help)));
    if config.model.classifier {
        entries.push(("classifier", "true".into(), "a classifier of noised images"));
    }
    if !config.class_names.is_empty() {
        let (names, all) = (&config.class_names, config.class_names.len());
        let mut text = names[..all.min(LISTED)].join(", ");
        if all > LISTED {
            let _ = write!(text, " and {} more", all - LISTED);
        }
        entries.push(("class_names", text, "names of the classes, in the order of their numbers"));
    }
    if !config.diffusion.trained_betas.is_empty() {
        let text = format!("{} given one by one", config.diffusion.trained_betas.len());
        entries.push(("trained_betas", text, "in place of schedule, beta_start and beta_end"));
    }
    entries
}

fn settings(html: &mut String, run: &History) {
    let preset = Config::preset(run.config.preset);
    let preset = entries(&if run.config.model.classifier { preset.into_classifier() } else { preset });
    let _ = write!(
        html,
        "<section>\n<h2>Settings</h2>\n<details open><summary>all settings; <mark>marked</mark> where the preset has \
         another value</summary>\n<div class=\"wide\"><table class=\"settings\">\n"
    );
    for (key, value, help) in entries(&run.config) {
        let is_presets = preset.iter().any(|(k, v, _)| *k == key && *v == value);
        let value = if is_presets { escape(&value) } else { format!("<mark>{}</mark>", escape(&value)) };
        let _ = writeln!(html, "<tr><th scope=\"row\">{key}</th><td>{value}</td><td>{}</td></tr>", escape(help));
    }
    html.push_str("</table></div>\n</details>\n</section>\n");
}

/// The settings that are not the same in all runs.
fn differences(html: &mut String, runs: &[History], names: &[String]) {
    let all: Vec<Vec<(&str, String, &str)>> = runs.iter().map(|run| entries(&run.config)).collect();
    let mut keys: Vec<&str> = Vec::new();
    for (key, ..) in all.iter().flatten() {
        if !keys.contains(key) {
            keys.push(key);
        }
    }
    let value = |entries: &[(&str, String, &str)], key: &str| {
        entries.iter().find(|(k, ..)| *k == key).map_or("\u{2013}".into(), |(_, value, _)| value.clone())
    };
    html.push_str("<section>\n<h2>Settings that differ</h2>\n");
    let rows: Vec<(&str, Vec<String>)> = keys
        .into_iter()
        .map(|key| (key, all.iter().map(|entries| value(entries, key)).collect::<Vec<String>>()))
        .filter(|(_, values)| values.iter().any(|value| *value != values[0]))
        .collect();
    if rows.is_empty() {
        html.push_str("<p>None: the runs have the same settings.</p>\n</section>\n");
        return;
    }
    html.push_str("<div class=\"wide\"><table class=\"several settings\">\n<tr><th>Setting</th>");
    for (i, name) in names.iter().enumerate() {
        let _ = write!(html, "<th><i class=\"c{}\"></i>{}</th>", i % 8, escape(name));
    }
    html.push_str("</tr>\n");
    for (key, values) in rows {
        let _ = write!(html, "<tr><th scope=\"row\">{key}</th>");
        for value in values {
            let _ = write!(html, "<td>{}</td>", escape(&value));
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</table></div>\n</section>\n");
}

/// The processes that have trained a run: when, on what, how they ended.
fn processes(html: &mut String, run: &History, title: &str) {
    let _ = write!(html, "<section>\n<h2>{}</h2>\n<p>Run folder <code>{}</code></p>\n", escape(title), {
        let path = fs::canonicalize(&run.path).unwrap_or_else(|_| run.path.clone());
        escape(&path.display().to_string())
    });
    let Some(last) = run.sessions.last() else {
        html.push_str(
            "<p>The run has no events.jsonl, as runs of earlier versions have none: on which machines and devices it was \
             trained, when it was resumed and what it warned of is not known.</p>\n</section>\n",
        );
        return;
    };
    let left_out = run.sessions.len().saturating_sub(LISTED);
    if left_out > 0 {
        let _ = writeln!(html, "<p>{left_out} earlier processes are in events.jsonl.</p>");
    }
    html.push_str(
        "<div class=\"wide\"><table>\n<tr><th>Began</th><th>Steps</th><th>Ended</th><th>Checkpoints</th><th>Device</th>\
         <th>Machine</th><th>Versions</th></tr>\n",
    );
    for session in &run.sessions[left_out..] {
        let p = &session.process;
        let (at, from) = &session.start;
        let began = if p.resumed { "resumed" } else { "started" };
        let is_last = std::ptr::eq(session, last);
        let (until, ended) = match &session.end {
            Some((at, step, how, _)) => {
                let how = match how {
                    How::Done => "all steps done",
                    How::Stopped => "stopped",
                    How::Failed => "failed",
                };
                (step.to_string(), format!("{how} {}", time(at)))
            }
            None if is_last && run.state() != State::Killed => (run.step().to_string(), "training".into()),
            None => ("?".into(), "killed, or the machine went down".into()),
        };
        let checkpoints = match (session.checkpoints.len(), session.checkpoints.last()) {
            (1, Some(last)) => format!("step {last}"),
            (count, Some(last)) => format!("{count}, the last at step {last}"),
            _ => "none".into(),
        };
        let machine = list(&[
            &p.host,
            &p.processor,
            &if p.threads > 0 { format!("{} threads", p.threads) } else { String::new() },
            &p.system,
        ]);
        let labelled =
            |label: &str, text: &str| if text.is_empty() { String::new() } else { format!("{label} {text}") };
        let versions = list(&[
            &labelled("ddpm-cuda", &p.version),
            &labelled("driver: CUDA", &p.driver),
            &labelled("kernels: CUDA", &p.compiler),
        ]);
        let _ = writeln!(
            html,
            "<tr><td>{began} {}</td><td>{from} to {until}</td><td>{ended}</td><td>{checkpoints}</td><td>{}</td>\
             <td>{machine}</td><td>{versions}</td></tr>",
            time(at),
            list(&[&p.device, Precision::named(&p.precision).map_or(p.precision.as_str(), |known| known.described())]),
        );
    }
    html.push_str("</table></div>\n");
    if !last.notes.is_empty() {
        html.push_str("<details><summary>what the last of them said before it began</summary>\n<ul>\n");
        for note in last.notes.iter().take(LISTED) {
            let _ = writeln!(html, "<li>{}</li>", escape(note));
        }
        html.push_str("</ul>\n</details>\n");
    }
    html.push_str("</section>\n");
}

/// What is not empty, with commas, escaped.
fn list(parts: &[&str]) -> String {
    let parts: Vec<String> = parts.iter().filter(|part| !part.is_empty()).map(|part| escape(part)).collect();
    parts.join(", ")
}

/// A time of events.jsonl, which the page shows in the reader's own zone.
fn time(rfc3339: &str) -> String {
    let text = escape(rfc3339);
    format!("<time datetime=\"{text}\">{text}</time>")
}

/// The lowest point, the first of equals.
fn lowest(points: &[Point]) -> Option<&Point> {
    points.iter().min_by(|a, b| a.value.total_cmp(&b.value))
}

/// A number with four significant digits.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if !(1e-3..1e6).contains(&size) => format!("{value:.2e}"),
        size => {
            let decimals = (3.0 - size.log10().floor()).max(0.0) as usize;
            format!("{value:.decimals$}")
        }
    }
}

/// Six significant digits, which is more than a screen shows and half of the bytes.
fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// Text for HTML, in an element or in an attribute with double quotes.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // HTML knows no others.
            c if c.is_control() && c != '\n' && c != '\t' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// JSON within a script element, which neither an end tag nor a comment in a text can end: all that begins one is an
/// escape of JSON.
fn script_json(charts: &[Chart]) -> String {
    json!(charts).to_string().replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
}
