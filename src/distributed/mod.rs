//! Processes that train together: how each knows its rank, how they meet, watch each other and end.
//!
//! A run on several GPUs has one process, a rank, for each of them. [`World`] says which rank a process is, from the
//! variables that a launcher sets for it. The launcher is torchrun, srun, mpirun or, for the GPUs of one machine,
//! `launch`: the program itself, which starts itself anew for each rank and never opens a GPU. [`Control`] is the
//! connection of all ranks to rank 0. Over it they compare what they are about to do, agree on the step after which
//! they stop, pass small things to each other, and learn within seconds if one of them has died, and why.
//!
//! What it deliberately does not do: gradients and weights take another way, from GPU to GPU; nothing is encrypted; a
//! rank that is gone does not come back, since a run is started again by its launcher and goes on from its checkpoint.

mod control;
mod join;
#[cfg(all(feature = "cli", target_os = "linux"))]
pub mod launch;
pub mod message;
mod node_list;
mod world;

use std::time::{Duration, Instant};

pub use control::{Announced, Control, LastResort, Wait};
pub use join::Joining;
pub use message::{Fact, Stop, Who};
pub use world::{Launcher, World, token};

use crate::error::{Error, Result};

/// How long ranks wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For all ranks to come to the meeting; 120 s.
    pub join: Duration,
    /// For a sign of life, of which there is one every second; 30 s.
    pub silence: Duration,
    /// For another rank's part of a common task, although it is alive; 600 s.
    pub wait: Duration,
    /// For this process to end by itself once another rank has failed; 5 s.
    pub grace: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let [join, silence, wait, grace] = [120, 30, 600, 5].map(Duration::from_secs);
        Timeouts { join, silence, wait, grace }
    }
}

impl Timeouts {
    /// The usual ones, but for those that `DDPM_JOIN_SECONDS`, `DDPM_SILENCE_SECONDS` and `DDPM_WAIT_SECONDS` set.
    ///
    /// # Errors
    /// `Error::Usage` for a value that is no number from 0.1 to 86,400.
    pub fn from_environment() -> Result<Self> {
        let mut timeouts = Timeouts::default();
        let variables = [
            ("DDPM_JOIN_SECONDS", &mut timeouts.join),
            ("DDPM_SILENCE_SECONDS", &mut timeouts.silence),
            ("DDPM_WAIT_SECONDS", &mut timeouts.wait),
        ];
        for (name, timeout) in variables {
            if let Some(text) = world::environment(name) {
                *timeout = seconds(&text)
                    .ok_or_else(|| Error::Usage(format!("{name}={text}: a number from 0.1 to 86400 is expected")))?;
            }
        }
        Ok(timeouts)
    }

    /// Time between two signs of life.
    fn beat(&self) -> Duration {
        Duration::from_secs(1).min(self.silence / 4)
    }
}

fn seconds(text: &str) -> Option<Duration> {
    let seconds: f64 = text.trim().parse().ok()?;
    (0.1..=86_400.0).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}

/// Time that passes only while this process runs. One that was stopped, as by Ctrl-Z, would otherwise find on waking
/// that every deadline of every other rank is over, although they were stopped too.
#[derive(Clone, Copy, Debug)]
struct Patience {
    passed: Duration,
    last: Instant,
}

/// The most that can pass between two looks. Waits look several times a second.
const LONGEST_TICK: Duration = Duration::from_millis(500);

impl Patience {
    fn new() -> Self {
        Patience { passed: Duration::ZERO, last: Instant::now() }
    }

    /// The time since it began, or began again.
    fn passed(&mut self) -> Duration {
        self.passed_at(Instant::now())
    }

    fn passed_at(&mut self, now: Instant) -> Duration {
        self.passed += now.saturating_duration_since(self.last).min(LONGEST_TICK);
        self.last = now;
        self.passed
    }

    fn begin_again(&mut self) {
        *self = Patience::new();
    }
}

/// `a length of time` for messages: whole seconds where it is one.
fn in_words(time: Duration) -> String {
    format!("{} s", (time.as_secs_f64() * 10.0).round() / 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_does_not_pass_for_a_process_that_was_stopped() {
        let mut patience = Patience::new();
        let start = patience.last;
        for tick in 1..=4 {
            patience.passed_at(start + Duration::from_millis(250 * tick));
        }
        assert_eq!(patience.passed, Duration::from_secs(1));
        // An hour in the background of a shell.
        let woken = start + Duration::from_secs(3600);
        assert_eq!(patience.passed_at(woken), Duration::from_secs(1) + LONGEST_TICK);
        assert_eq!(patience.passed_at(woken), Duration::from_secs(1) + LONGEST_TICK);
    }

    #[test]
    fn seconds_are_a_positive_number() {
        assert_eq!(seconds(" 2.5 "), Some(Duration::from_millis(2500)));
        assert_eq!(seconds("86400"), Some(Duration::from_secs(86_400)));
        for wrong in ["", "0", "-1", "1e9", "NaN", "inf", "ten", "1 s"] {
            assert_eq!(seconds(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn lengths_of_time_are_readable() {
        assert_eq!([0.25, 1.0, 120.0].map(|s| in_words(Duration::from_secs_f64(s))), ["0.3 s", "1 s", "120 s"]);
    }
}
