//! `ddpm-cuda watch`: the state of a run in the terminal, from any process that can read its folder.
//!
//! It reads what the training writes ([`crate::history`]) every few seconds and asks nothing of the process that
//! trains. Off a terminal it says it once and ends.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, SystemTime};

use console::{Term, measure_text_width, truncate_str};

use crate::error::{Result, printable};
use crate::history::{History, State};
use crate::say;
use crate::text::{duration, grouped, shell_word};

/// Arguments of `ddpm-cuda watch`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folder
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Seconds between two looks
    #[arg(long, default_value_t = 2, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub every: u64,
    /// Say it once and end, on a terminal too
    #[arg(long)]
    pub once: bool,
}

/// Warnings that are shown, the newest.
const WARNINGS: usize = 3;
/// Columns of the curve of the loss, at most.
const COLUMNS: usize = 60;

/// Runs the command. On a terminal it ends when all steps are done, or by Ctrl-C.
///
/// # Errors
/// A folder that is no run, at the start or later.
pub fn run(args: &Args) -> Result<()> {
    let terminal = Term::stdout();
    let history = History::read(&args.run)?;
    if args.once || !std::io::stdout().is_terminal() {
        for line in lines(&history, SystemTime::now(), COLUMNS) {
            say!("{line}");
        }
        return Ok(());
    }
    let mut history = Some(history);
    let mut shown = 0;
    loop {
        let now = history.take().map_or_else(|| History::read(&args.run), Ok)?;
        let (_, columns) = terminal.size();
        let width = usize::from(columns).max(20) - 1;
        let mut lines = lines(&now, SystemTime::now(), COLUMNS.min(width.saturating_sub(28)));
        let ended = now.state() == State::Done && now.in_use != Some(true);
        if !ended {
            lines.push("Ctrl-C ends the watching, not the run".into());
        }
        // A closed terminal ends the process by a signal; nothing else is to be done about it.
        let _ = terminal.clear_last_lines(shown);
        for line in &lines {
            // A line that wraps would be two to clear.
            let _ = terminal.write_line(&truncate_str(line, width, "\u{2026}"));
        }
        shown = lines.len();
        if ended {
            return Ok(());
        }
        thread::sleep(Duration::from_secs(args.every));
    }
}

/// What is to be said of a run, with a curve of the loss of so many columns.
fn lines(run: &History, now: SystemTime, columns: usize) -> Vec<String> {
    let since = |then: SystemTime| now.duration_since(then).unwrap_or_default().as_secs_f64();
    let ago = |then: Option<SystemTime>| then.map_or(String::new(), |then| format!(", {} ago", duration(since(then))));
    let parse = |time: &str| humantime::parse_rfc3339(time).ok();
    let mut lines = Vec::new();
    let mut line = |name: &str, text: String| {
        let gap = 16usize.saturating_sub(measure_text_width(name));
        lines.push(format!("{name}{:gap$}{}", "", printable(&text)));
    };
    let (step, steps, state) = (run.step(), run.config.steps, run.state());
    let session = run.sessions.last();
    let ended = session.and_then(|session| session.end.as_ref()).and_then(|(time, ..)| parse(time));
    let resume = {
        let command = if run.config.model.classifier { "train-classifier" } else { "train" };
        format!("to go on: ddpm-cuda {command} --resume {}", shell_word(&run.path))
    };
    let mut words = match &state {
        State::Running => "running".into(),
        State::Suspended(process) => format!("suspended; process {process} goes on with: kill -CONT {process}"),
        State::Done => format!("all steps are done{}", ago(ended)),
        State::Stopped => format!("stopped{}; {resume}", ago(ended)),
        State::Failed(text) => format!("failed{}: {text}", ago(ended)),
        State::Killed => format!("killed, or the machine went down; {resume}"),
        State::Ended => format!("not running; {resume}"),
        State::Unknown => "running or killed; this system does not say whether a process trains in the folder".into(),
    };
    if run.in_use == Some(true) && matches!(state, State::Done | State::Stopped | State::Failed(_)) {
        words = format!("a process has opened the run and makes ready to go on; before, it was {words}");
    }
    line("run", run.path.display().to_string());
    line("state", words);
    let percent = 100.0 * f64::from(step) / f64::from(steps.max(1));
    line("step", format!("{} of {} ({percent:.0} %)", grouped(step.into()), grouped(steps.into())));
    let loss = run.metrics.curve("loss");
    if let Some(last) = loss.last() {
        let values: Vec<f64> = loss.iter().map(|point| point.value).collect();
        line("loss", format!("{:<10} {}", format!("{:.4}", last.value), sparkline(&values, columns)));
    }
    if let Some(last) = run.metrics.last("validation_loss") {
        line("validation loss", format!("{:.4} after step {}", last.value, last.step));
    }
    if let Some(last) = run.metrics.last("validation_accuracy") {
        line("accuracy", format!("{:.1} % of held-out images, after step {}", 100.0 * last.value, last.step));
    }
    if let Some(last) = run.metrics.last("images_per_s") {
        line("images/s", format!("{:.0}", last.value));
    }
    if let Some(seconds) = run.seconds() {
        let mut text = duration(seconds);
        if step < steps
            && let Some(per_step) = run.seconds_per_step()
        {
            text += &format!(", {} left", duration(per_step * f64::from(steps - step)));
        }
        line("time", text);
    }
    match &run.checkpoint {
        Some((step, _, written)) => line("last checkpoint", format!("step {step}{}", ago(*written))),
        None => line("last checkpoint", "none yet".into()),
    }
    if let Some(last) = run.samples.last() {
        line("last samples", format!("{}{}", last.path.display(), ago(last.written)));
    }
    if let Some(session) = session {
        let p = &session.process;
        let whose = if p.host.is_empty() { String::new() } else { format!(" on {}", p.host) };
        line("device", format!("{}{whose}, process {}{}", p.device, p.process, ago(parse(&session.start.0))));
        let older = session.warnings.len().saturating_sub(WARNINGS);
        for (at, step, text) in &session.warnings[older..] {
            line("warning", format!("{text} (step {step}{})", ago(parse(at))));
        }
        if older > 0 {
            line("", format!("{older} earlier warnings are in events.jsonl"));
        }
    }
    for fault in &run.faults {
        line("warning", fault.clone());
    }
    lines
}

/// A curve of block characters, at most `columns` long, of means of equally many values; the lowest and the highest of
/// them are the lowest and the highest block. Positive ones are on a logarithmic scale, on which the end of a training
/// is seen beside its start.
fn sparkline(values: &[f64], columns: usize) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let count = values.len().min(columns);
    let part = |i: usize| &values[i * values.len() / count..(i + 1) * values.len() / count];
    let means: Vec<f64> = (0..count).map(|i| part(i).iter().sum::<f64>() / part(i).len() as f64).collect();
    let level = if means.iter().all(|mean| *mean > 0.0) { f64::ln } else { |mean| mean };
    let means: Vec<f64> = means.into_iter().map(level).collect();
    let low = means.iter().copied().fold(f64::INFINITY, f64::min);
    let high = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let block = |mean: f64| match high > low {
        true => BLOCKS[((mean - low) / (high - low) * 7.0).round() as usize],
        false => BLOCKS[0],
    };
    means.into_iter().map(block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_shows_every_value_or_means_of_them() {
        assert_eq!(sparkline(&[0.0, 1.0, 2.0, 7.0], 10), "▁▂▃█");
        assert_eq!(sparkline(&[1.0, 0.1, 0.01, 0.001], 10), "█▆▃▁");
        assert_eq!(sparkline(&[3.0, 3.0], 10), "▁▁");
        assert_eq!(sparkline(&[8.0, 6.0, 1.0, -1.0, 0.0, 0.0], 3), "█▁▁");
        assert_eq!((sparkline(&[], 5), sparkline(&[1.0], 0)), (String::new(), String::new()));
        assert_eq!(sparkline(&(0..1000).map(f64::from).collect::<Vec<_>>(), 60).chars().count(), 60);
    }
}
