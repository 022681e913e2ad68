//! Signals that save a training and stop it, and the code that the program then exits with: 128 + the signal's number,
//! as a shell reports a program that a signal has ended.
//!
//! A signal that is ignored when the program starts stays ignored: `nohup` ignores SIGHUP so that the program outlives
//! its terminal, and a shell script ignores SIGINT for what it starts in the background.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use crate::distributed::Control;
use crate::error::{Error, Result};

/// `timeout` and job schedulers signal a process and then its whole group, and mean one signal.
const ONE_SIGNAL: Duration = Duration::from_secs(1);
/// SIGINT, which a terminal sends for Ctrl-C.
const CTRL_C: i32 = 2;

/// Signals of a training, caught from [`listen`](Self::listen) on.
pub(super) struct Signals(Arc<Shared>);

struct Shared {
    /// False while the run is prepared. A signal then ends the program at once: there is nothing to save.
    training: AtomicBool,
    stop: AtomicBool,
    /// Number of the first signal, 0 before it.
    first: AtomicI32,
    /// The other ranks of the training.
    others: OnceLock<Weak<Control>>,
}

impl Signals {
    /// Catches the signals that are not ignored.
    ///
    /// # Errors
    /// `Error::Failed` if the system refuses.
    pub fn listen() -> Result<Self> {
        let shared = Arc::new(Shared {
            training: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            first: AtomicI32::new(0),
            others: OnceLock::new(),
        });
        let receiver = shared.clone();
        let mut since = None;
        system::catch(move |signal, name| receiver.receive(signal, name, &mut since))
            .map_err(|e| Error::Failed(format!("signals cannot be caught: {e}")))?;
        Ok(Signals(shared))
    }

    /// From now on there is something to save: the first signal sets [`stop`](Self::stop).
    pub fn training_begins(&self) {
        self.0.training.store(true, Ordering::SeqCst);
    }

    /// From now on the first signal is a request to all ranks, which stop after the same step.
    pub fn tell(&self, others: &Arc<Control>) {
        let _ = self.0.others.set(Arc::downgrade(others));
    }

    /// True once a signal has asked to save and stop.
    pub fn stop(&self) -> &AtomicBool {
        &self.0.stop
    }

    /// 128 + the number of the first signal.
    pub fn exit_code(&self) -> u8 {
        code(self.0.first.load(Ordering::SeqCst))
    }
}

impl Shared {
    /// Called for each signal; `since` is when the first one came.
    ///
    /// Only Ctrl-C ends the program at once, since a person then has waited and has had enough. A scheduler that says
    /// SIGUSR1 first and SIGTERM later still gives time to save.
    fn receive(&self, signal: i32, name: &str, since: &mut Option<Instant>) {
        if !self.training.load(Ordering::SeqCst) {
            system::exit(code(signal));
        }
        match since {
            None => {
                *since = Some(Instant::now());
                self.first.store(signal, Ordering::SeqCst);
                if let Some(others) = self.others.get().and_then(Weak::upgrade) {
                    others.ask_to_stop(code(signal), name);
                }
                self.stop.store(true, Ordering::SeqCst);
                let line = format!("{name}: stopping after this step; a further Ctrl-C stops at once\n");
                let _ = std::io::stderr().write_all(line.as_bytes());
            }
            Some(first) if signal == CTRL_C && first.elapsed() >= ONE_SIGNAL => system::exit(code(signal)),
            Some(_) => {}
        }
    }
}

/// Ends the program without waiting for its other threads.
pub(super) fn exit(code: u8) -> ! {
    system::exit(code)
}

fn code(signal: i32) -> u8 {
    128 + signal as u8
}

#[cfg(unix)]
mod system {
    use std::io;

    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU};
    use signal_hook::iterator::Signals;

    /// Ctrl-C, the end of a terminal, and what job schedulers send before they kill.
    const CAUGHT: [(i32, &str); 6] = [
        (SIGINT, "Ctrl-C"),
        (SIGTERM, "SIGTERM"),
        (SIGHUP, "SIGHUP"),
        (SIGUSR1, "SIGUSR1"),
        (SIGUSR2, "SIGUSR2"),
        (SIGXCPU, "SIGXCPU"),
    ];

    /// Calls `receive` with the number and the name of each signal, on a thread of its own.
    pub fn catch(mut receive: impl FnMut(i32, &str) + Send + 'static) -> io::Result<()> {
        let caught = CAUGHT.iter().map(|(signal, _)| *signal).filter(|signal| !is_ignored(*signal));
        let mut signals = Signals::new(caught)?;
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                let named = CAUGHT.iter().find(|(number, _)| *number == signal);
                receive(signal, named.map_or("signal", |(_, name)| name));
            }
        })?;
        Ok(())
    }

    /// Ends the program without waiting for its other threads.
    pub fn exit(code: u8) -> ! {
        signal_hook::low_level::exit(i32::from(code))
    }

    fn is_ignored(signal: i32) -> bool {
        let mut now = std::mem::MaybeUninit::<libc::sigaction>::uninit();
        // SAFETY: without a new action the call changes nothing. It fills `now`, which has the size of a `sigaction`,
        // if it returns 0, and `now` is read only then.
        unsafe {
            libc::sigaction(signal, std::ptr::null(), now.as_mut_ptr()) == 0
                && now.assume_init().sa_sigaction == libc::SIG_IGN
        }
    }
}

#[cfg(not(unix))]
mod system {
    use std::io;

    /// Calls `receive` for each Ctrl-C and when the console is closed, on a thread of its own.
    pub fn catch(mut receive: impl FnMut(i32, &str) + Send + 'static) -> io::Result<()> {
        ctrlc::set_handler(move || receive(super::CTRL_C, "Ctrl-C")).map_err(io::Error::other)
    }

    /// Ends the program without waiting for its other threads.
    pub fn exit(code: u8) -> ! {
        std::process::exit(i32::from(code))
    }
}
