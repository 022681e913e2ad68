//! The launcher of the ranks of one machine: the program starts itself anew for each of them and watches them.
//!
//! It opens no GPU. The ranks get torchrun's variables; rank 0 gets the socket that the others connect to, already
//! open, as its standard input, as inetd hands sockets over, so that no other process can take the port in between.
//! Rank 0 writes to the terminal. What the others write goes to a file each, which becomes RUN/ranks/R.log once they
//! know the run's folder, and of which the last lines are shown if that rank is the one that has failed.
//!
//! Each rank has a process group of its own: the terminal's Ctrl-C and Ctrl-Z reach the launcher alone, which passes
//! them on, so that no rank gets a signal twice. The kernel ends the ranks with the launcher, however that one ends.
//!
//! It does not start a rank again: its exit code and `--resume` are enough for whoever wants that.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::symlink;
use std::os::unix::process::{CommandExt, ExitStatusExt, parent_id};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use libc::{SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2, SIGXCPU};
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;

use super::world::environment;
use super::{Patience, in_words};
use crate::error::{Error, Result, printable};

/// The launcher's process, for its ranks.
const LAUNCHER: &str = "DDPM_LAUNCHER";
/// The file that a rank's output goes to.
const LOG: &str = "DDPM_RANK_LOG";
/// Signals that are passed on to all ranks.
const PASSED_ON: [i32; 6] = [SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU];
/// How long the other ranks may live once one has ended. Those that work know within seconds that one has failed, and
/// ranks that have done all their work end together.
const GRACE: Duration = Duration::from_secs(20);
/// Between two looks at the ranks.
const LOOK: Duration = Duration::from_millis(50);
/// What is shown of a log.
const LAST_LINES: usize = 10;
const LAST_BYTES: u64 = 8192;

/// How the ranks have ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The exit code of the run: that of the first rank that has not ended with 0; 1 if a signal has ended it.
    pub code: u8,
    /// For the user: which rank has failed, if it could not say so on the terminal itself, and its last lines.
    pub words: Vec<String>,
}

/// A rank that was started.
struct Rank {
    rank: usize,
    child: Child,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

/// Ends what still runs when it is dropped.
struct Ranks(Vec<Rank>);

impl Ranks {
    fn running(&self) -> impl Iterator<Item = &Rank> {
        self.0.iter().filter(|rank| rank.ended.is_none())
    }

    /// Sends a signal to all that run, and to what they have started.
    fn signal(&self, number: i32) {
        for rank in self.running() {
            // SAFETY: the call takes two numbers. The group is that of a child that was not waited for, so that its
            // number belongs to nobody else.
            unsafe { libc::kill(-(rank.child.id() as i32), number) };
        }
    }

    /// Ctrl-Z: all stop, and go on with this process.
    fn suspend(&self) {
        self.signal(SIGSTOP);
        // SAFETY: it takes a number, stops the process and returns when that continues.
        unsafe { libc::raise(SIGSTOP) };
        self.signal(SIGCONT);
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.signal(SIGKILL);
        for rank in self.0.iter_mut().filter(|rank| rank.ended.is_none()) {
            let _ = rank.child.wait();
        }
    }
}

/// Starts this program with its own arguments as `size` ranks of this machine, and waits until they have ended. They do
/// not outlive the thread that calls.
///
/// # Errors
/// `Error::Failed` if they cannot be started.
pub fn launch(size: usize) -> Result<Ended> {
    let failed = |e: io::Error| Error::Failed(format!("the {size} ranks cannot be started: {e}"));
    let logs = tempfile::Builder::new().prefix("ddpm-cuda-ranks-").tempdir().map_err(failed)?;
    let ranks = start(size, logs.path()).map_err(failed)?;
    // Only now: a signal that is ignored, as SIGHUP under nohup, is ignored by the ranks too, and one that is caught
    // would not be.
    let signals = Signals::new(PASSED_ON.iter().chain([&SIGTSTP])).map_err(failed)?;
    watch(ranks, signals).map_err(failed)
}

fn start(size: usize, logs: &Path) -> io::Result<Ranks> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (port, token) = (listener.local_addr()?.port(), token()?);
    let program = std::env::current_exe()?;
    let threads = thread::available_parallelism().map_or(1, |all| (all.get() / size).max(1));
    let mut listener = Some(listener);
    let mut ranks = Ranks(Vec::new());
    for rank in 0..size {
        let log = logs.join(format!("{rank}.log"));
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).process_group(0).stdin(Stdio::null());
        for (name, value) in [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size), ("LOCAL_WORLD_SIZE", size)] {
            command.env(name, value.to_string());
        }
        command.env("MASTER_ADDR", Ipv4Addr::LOCALHOST.to_string()).env("MASTER_PORT", port.to_string());
        command.env("DDPM_JOIN_TOKEN", &token).env(LAUNCHER, std::process::id().to_string());
        command.env_remove("DDPM_PORT").env_remove("TORCHELASTIC_USE_AGENT_STORE").env_remove(LOG);
        if std::env::var_os("RAYON_NUM_THREADS").is_none() {
            // All cores for each of them would be as many threads too many.
            command.env("RAYON_NUM_THREADS", threads.to_string());
        }
        if rank == 0 {
            command.stdin(OwnedFd::from(listener.take().expect("there is one rank 0")));
        } else {
            let file = File::options().append(true).create(true).open(&log)?;
            command.env(LOG, &log).stdout(file.try_clone()?).stderr(file);
        }
        ranks.0.push(Rank { rank, child: command.spawn()?, log, ended: None });
    }
    Ok(ranks)
}

/// A secret of 128 bits.
fn token() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

fn watch(mut ranks: Ranks, mut signals: Signals) -> io::Result<Ended> {
    // The places of those that have ended, in that order, and signals that were passed on.
    let (mut order, mut passed_on, mut words) = (Vec::new(), Vec::new(), Vec::new());
    let mut since_first: Option<Patience> = None;
    while order.len() < ranks.0.len() {
        for number in signals.pending() {
            if number == SIGTSTP {
                ranks.suspend();
            } else {
                ranks.signal(number);
                passed_on.push(number);
            }
        }
        for rank in ranks.0.iter_mut().filter(|rank| rank.ended.is_none()) {
            rank.ended = rank.child.try_wait()?;
            if rank.ended.is_some() {
                order.push(rank.rank);
                since_first.get_or_insert_with(Patience::new);
            }
        }
        if since_first.as_mut().is_some_and(|since| since.passed() > GRACE) && order.len() < ranks.0.len() {
            let left: Vec<String> =
                ranks.running().map(|rank| format!("rank {} (process {})", rank.rank, rank.child.id())).collect();
            words.push(format!(
                "killed, since still there {} after rank {} had ended: {}",
                in_words(GRACE),
                order[0],
                left.join(", ")
            ));
            ranks.signal(SIGKILL);
            since_first = Some(Patience::new());
        }
        thread::sleep(LOOK);
    }
    let first = order.iter().map(|&rank| &ranks.0[rank]).find(|rank| rank.ended.is_some_and(|how| !how.success()));
    Ok(match first {
        None => Ended { code: 0, words },
        Some(first) => {
            let (code, mut own) = verdict(first, &passed_on);
            own.extend(words);
            Ended { code, words: own }
        }
    })
}

/// The exit code of a run that ends with `rank`, and what is to be said of it.
fn verdict(rank: &Rank, passed_on: &[i32]) -> (u8, Vec<String>) {
    let ended = rank.ended.expect("it has ended");
    let who = format!("rank {} (process {})", rank.rank, rank.child.id());
    let (code, how) = match (ended.code(), ended.signal()) {
        // Told to stop, before it could listen.
        (None, Some(signal)) if passed_on.contains(&signal) => return (128 + signal as u8, Vec::new()),
        (None, signal) => {
            let signal = signal.unwrap_or_default();
            (1, format!("{who} was ended by signal {signal} ({})", signal_name(signal).unwrap_or("of no name")))
        }
        (Some(code), _) => {
            let code = code as u8;
            // Stopped by a signal, or it has said why on the terminal.
            if rank.rank == 0 || passed_on.iter().any(|&signal| 128 + signal as u8 == code) {
                return (code, Vec::new());
            }
            (code, format!("{who} has ended with exit code {code}"))
        }
    };
    let lines = last_lines(&rank.log).unwrap_or_default();
    if lines.is_empty() {
        return (code, vec![how]);
    }
    let place = fs::read_link(&rank.log).map_or(String::new(), |log| format!(" of {}", log.display()));
    let mut words = vec![format!("{how}; the last lines{place}:")];
    words.extend(lines.iter().map(|line| format!("  {line}")));
    (code, words)
}

fn last_lines(log: &Path) -> io::Result<Vec<String>> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LAST_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(LAST_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    Ok(lines[lines.len().saturating_sub(LAST_LINES)..].iter().map(|line| printable(line)).collect())
}

/// What the launcher has given to a rank.
#[derive(Debug)]
pub struct Launched {
    /// The socket that the others connect to; rank 0's.
    pub listener: Option<TcpListener>,
    rank: String,
    log: Option<PathBuf>,
}

/// To be called early by a process that may be a rank: what the launcher has given to it, if there is one. From then on
/// the process ends with the launcher.
///
/// # Errors
/// `Error::Failed` if the launcher has ended already, or what it gives is not there.
pub fn launched() -> Result<Option<Launched>> {
    let Some(launcher) = environment(LAUNCHER) else { return Ok(None) };
    // SAFETY: this option takes a signal's number, and only makes the kernel send it when the parent ends.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, SIGKILL as libc::c_ulong) };
    // It may have ended before that.
    if launcher != parent_id().to_string() {
        return Err(Error::Failed(format!("the launcher of this rank, process {launcher}, has ended")));
    }
    let rank = environment("RANK").unwrap_or_default();
    let listener = match rank == "0" {
        true => Some(inherited().map_err(|e| Error::Failed(format!("the launcher has given rank 0 no socket: {e}")))?),
        false => None,
    };
    Ok(Some(Launched { listener, rank, log: environment(LOG).map(PathBuf::from) }))
}

/// The socket that is standard input, which becomes empty.
fn inherited() -> io::Result<TcpListener> {
    let listener = TcpListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    let port = listener.local_addr()?.port().to_string();
    if environment("MASTER_PORT").as_ref() != Some(&port) {
        return Err(io::Error::other(format!("its port is {port}, and MASTER_PORT another one")));
    }
    redirect(libc::STDIN_FILENO, &File::open("/dev/null")?)?;
    Ok(listener)
}

/// Makes a standard stream of this process that of a file.
fn redirect(stream: RawFd, to: &File) -> io::Result<()> {
    // SAFETY: it takes two numbers, of which the second is an open file's. The standard streams of the process are
    // owned by nobody, and stay open.
    match unsafe { libc::dup2(to.as_raw_fd(), stream) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

impl Launched {
    /// From now on what this rank writes goes to RUN/ranks/R.log, and so does what it has written before. Rank 0 goes
    /// on writing to the terminal.
    ///
    /// # Errors
    /// `Error::File` if that cannot be written.
    pub fn log_to(&self, run: &Path) -> Result<()> {
        let Some(log) = &self.log else { return Ok(()) };
        let path = run.join("ranks").join(format!("{}.log", self.rank));
        self.move_log(log, &path).map_err(|e| Error::file(&path, format!("cannot be written: {e}")))
    }

    fn move_log(&self, log: &Path, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path.parent().expect("it is in a folder"))?;
        let mut file = File::options().append(true).create(true).open(path)?;
        io::stdout().flush()?;
        io::copy(&mut File::open(log)?, &mut file)?;
        redirect(libc::STDOUT_FILENO, &file)?;
        redirect(libc::STDERR_FILENO, &file)?;
        // For the launcher, which knows the log by its first name alone.
        let new = log.with_extension("new");
        symlink(std::path::absolute(path)?, &new)?;
        fs::rename(new, log)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_a_log_are_printable_and_few() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("1.log");
        let lines: String = (0..5000).map(|i| format!("line {i}\n\n")).collect();
        fs::write(&log, lines + "\u{1b}[31mred\u{1b}[0m and \tbell \u{7}").unwrap();
        let last = last_lines(&log).unwrap();
        assert_eq!(last.len(), LAST_LINES);
        assert_eq!(last[0], "line 4991");
        assert_eq!(last[9], "\\u{1b}[31mred\\u{1b}[0m and \\tbell \\u{7}");
        fs::write(&log, b"\xff\xfe").unwrap();
        assert_eq!(last_lines(&log).unwrap(), ["\u{fffd}\u{fffd}"]);
        fs::write(&log, b"").unwrap();
        assert!(last_lines(&log).unwrap().is_empty() && last_lines(&folder.path().join("none")).is_err());
    }

    #[test]
    fn secrets_are_drawn() {
        let [a, b] = [token().unwrap(), token().unwrap()];
        assert!(a.len() == 32 && b.len() == 32 && a != b, "{a} and {b}");
    }
}
