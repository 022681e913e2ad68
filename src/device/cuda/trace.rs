//! What `DDPM_TRACE` shows of launches: `1` prints each; `sync` waits for each, so that an error inside a kernel names
//! it; `time` measures each by two events and prints the sums by kernel when the GPU is closed.
//!
//! An event is taken by the GPU when it gets there in the stream. So the time of a kernel that the GPU waits for,
//! because the host is late with its launch, has the wait in it: a microsecond or two.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use super::driver::{CudaEvent, CudaStream, DriverError, sys};
use super::driver_error;
use crate::error::{Error, Result};

/// Launches measured before the host waits for their times, so that few waits disturb the measurement and few events
/// exist.
const PENDING: usize = 4096;

/// What is shown.
pub(super) enum Trace {
    /// Nothing.
    Off,
    /// Each launch, before it.
    Print,
    /// Each launch is waited for.
    Sync,
    /// The time of each launch.
    Time(Mutex<Times>),
}

/// Times by kernel.
#[derive(Default)]
pub(super) struct Times {
    /// Kernels whose events the GPU may not have reached yet.
    pending: Vec<(&'static str, [CudaEvent; 2])>,
    /// Events for reuse.
    spare: Vec<[CudaEvent; 2]>,
    /// Launches and milliseconds.
    sums: HashMap<&'static str, (u64, f64)>,
    /// They are taken by whoever asked for them and not printed.
    silent: bool,
}

impl Trace {
    /// What the environment asks for.
    ///
    /// # Errors
    /// `Error::Usage` for a value that is unknown.
    pub fn from_environment() -> Result<Trace> {
        match std::env::var_os("DDPM_TRACE").unwrap_or_default().to_str() {
            Some("" | "0") => Ok(Trace::Off),
            Some("1") => Ok(Trace::Print),
            Some("sync") => Ok(Trace::Sync),
            Some("time") => Ok(Trace::Time(Mutex::default())),
            value => Err(Error::Usage(format!(
                "DDPM_TRACE is {}: use 1 (print each launch), sync (wait for each) or time (sums by kernel)",
                value.unwrap_or("not UTF-8")
            ))),
        }
    }

    /// Measures each launch, for [`Trace::take`].
    pub fn timing() -> Trace {
        Trace::Time(Mutex::new(Times { silent: true, ..Times::default() }))
    }

    /// Launches and milliseconds since the last call.
    pub fn take(&self) -> std::result::Result<BTreeMap<&'static str, (u64, f64)>, DriverError> {
        let Trace::Time(times) = self else { return Ok(BTreeMap::new()) };
        let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
        times.settle()?;
        Ok(std::mem::take(&mut times.sums).into_iter().collect())
    }

    /// True if anything is shown.
    pub fn is_on(&self) -> bool {
        !matches!(self, Trace::Off)
    }

    /// Runs `launch`, measured if times are asked for.
    pub fn around(
        &self,
        kernel: &'static str,
        stream: &CudaStream,
        launch: impl FnOnce() -> std::result::Result<(), DriverError>,
    ) -> std::result::Result<(), DriverError> {
        let Trace::Time(times) = self else { return launch() };
        let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
        let [start, end] = match times.spare.pop() {
            Some(events) => events,
            None => {
                let event = || stream.context().new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
                [event()?, event()?]
            }
        };
        start.record(stream)?;
        launch()?;
        end.record(stream)?;
        times.pending.push((kernel, [start, end]));
        if times.pending.len() >= PENDING { times.settle() } else { Ok(()) }
    }

    /// Writes the times to stderr, the longest first.
    pub fn report(&self) {
        let Trace::Time(times) = self else { return };
        let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
        if times.silent {
            return;
        }
        if let Err(e) = times.settle() {
            eprintln!("kernel time: {}", driver_error("reading the events", e));
            return;
        }
        let all = times.sums.values().fold((0, 0.0), |all, of| (all.0 + of.0, all.1 + of.1));
        if all.0 == 0 {
            return;
        }
        let mut lines: Vec<_> = times.sums.iter().map(|(&kernel, &sums)| (kernel, sums)).collect();
        lines.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
        for (kernel, (launches, ms)) in std::iter::once(("all kernels", all)).chain(lines) {
            eprintln!("kernel time: {kernel}, {launches} launches, {ms:.3} ms, {:.1} %", 100.0 * ms / all.1);
        }
    }
}

impl Times {
    /// Waits for the pending events and adds up their times.
    fn settle(&mut self) -> std::result::Result<(), DriverError> {
        for (kernel, events) in self.pending.drain(..) {
            let ms = events[0].elapsed_ms(&events[1])?;
            let sums = self.sums.entry(kernel).or_default();
            *sums = (sums.0 + 1, sums.1 + f64::from(ms));
            self.spare.push(events);
        }
        Ok(())
    }
}
