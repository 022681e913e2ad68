//! What a process does for a training on several devices: it starts the ranks, or is one of them and meets the others.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::signals;
use crate::device::{Choice, Device, Devices, cuda};
use crate::distributed::{Control, Fact, Joining, Launcher, Timeouts, World, token};
use crate::error::{Error, Result};
use crate::exchange::{Exchange, Sums};
use crate::train::{Run, Watch};
use crate::{history, kernels, say};

#[cfg(target_os = "linux")]
use crate::distributed::launch::{Launched, launch, launched};

/// What a process is to do.
pub(super) enum Part {
    /// Train alone, on this device.
    Alone(Choice),
    /// Nothing more: the ranks that it has started have ended, with this code.
    Launcher(ExitCode),
    /// Train with the others.
    Rank(Rank),
}

/// One of several processes, which has met the others.
pub(super) struct Rank {
    control: Arc<Control>,
    choice: Choice,
    wait: Duration,
    #[cfg(target_os = "linux")]
    launched: Option<Launched>,
}

impl Part {
    /// Starts the ranks of this machine if `devices` names several GPUs and no launcher has started this process; meets
    /// the others if one has. `facts` are what must be the same on all of them.
    ///
    /// # Errors
    /// Variables of a launcher that contradict each other or `devices`; ranks that cannot be started, do not come, or
    /// differ.
    pub fn of(
        devices: &Devices,
        launcher: Option<Launcher>,
        facts: impl FnOnce() -> Result<Vec<Fact>>,
    ) -> Result<Part> {
        #[cfg(target_os = "linux")]
        let mut launched = launched()?;
        let world = World::from_environment(launcher)?;
        match devices {
            Devices::One(choice) if world.size == 1 => return Ok(Part::Alone(*choice)),
            Devices::Gpus(gpus) if world.size == 1 => return start(gpus.len()).map(Part::Launcher),
            Devices::One(_) | Devices::Gpus(_) => {}
        }
        let gpus = if matches!(devices, Devices::One(Choice::Cpu)) { Vec::new() } else { cuda::devices()? };
        let choice = devices.of_rank(world.local_rank, world.local_size, gpus.len()).map_err(Error::Usage)?;
        let device = match choice {
            Choice::Cuda(number) => gpus.iter().find(|gpu| gpu.number == number).map_or("GPU", |gpu| &gpu.name),
            Choice::Cpu | Choice::Auto => "CPU",
        };
        let timeouts = Timeouts::from_environment()?;
        let mut same = vec![Fact::new("the build's kernels", kernels::hash())];
        same.extend(facts()?);
        let (control, notes) = Control::join(Joining {
            world,
            #[cfg(target_os = "linux")]
            listener: launched.as_mut().and_then(|launched| launched.listener.take()),
            #[cfg(not(target_os = "linux"))]
            listener: None,
            token: token()?,
            host: history::host(),
            device: device.into(),
            facts: same,
            timeouts,
            cancelled: Arc::new(AtomicBool::new(false)),
            last_resort: Some(Box::new(last_resort)),
        })?;
        notes.iter().for_each(|note| say!("{note}"));
        Ok(Part::Rank(Rank {
            control: Arc::new(control),
            choice,
            wait: timeouts.wait,
            #[cfg(target_os = "linux")]
            launched,
        }))
    }
}

#[cfg(target_os = "linux")]
fn start(ranks: usize) -> Result<ExitCode> {
    let ended = launch(ranks)?;
    for words in ended.words {
        // Lines of a log are indented. stderr may be closed; the exit code says it as well.
        let who = if words.starts_with(' ') { "" } else { "ddpm-cuda: " };
        let _ = writeln!(std::io::stderr(), "{who}{words}");
    }
    Ok(ExitCode::from(ended.code))
}

#[cfg(not(target_os = "linux"))]
fn start(ranks: usize) -> Result<ExitCode> {
    crate::usage!(
        "--device names {ranks} GPUs, and the program starts a process for each on Linux alone: start them with \
         a launcher that sets RANK and WORLD_SIZE"
    )
}

/// For a process that hangs, as in a driver, while the run has failed.
fn last_resort(why: &str) {
    let _ = writeln!(std::io::stderr(), "ddpm-cuda: {why}");
    signals::exit(1);
}

impl Rank {
    /// Its device.
    pub fn choice(&self) -> Choice {
        self.choice
    }

    /// What it exchanges with the others from `device`.
    ///
    /// # Errors
    /// Those of [`Exchange::processes`].
    pub fn exchange(&self, device: &Device, sums: Sums) -> Result<Exchange> {
        Exchange::processes(self.control.clone(), device, self.wait, sums)
    }

    /// The connection to the others.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// From now on what a rank other than the first writes is in RUN/ranks, if this program has started it.
    ///
    /// # Errors
    /// A log that cannot be written.
    pub fn log_to(&self, run: &Run) -> Result<()> {
        #[cfg(target_os = "linux")]
        if let Some(launched) = &self.launched {
            launched.log_to(run.folder())?;
        }
        #[cfg(not(target_os = "linux"))]
        let _ = run;
        Ok(())
    }

    /// Whether it says what it does: the first rank on the terminal, others in a log of their own alone.
    pub fn speaks(&self) -> bool {
        #[cfg(target_os = "linux")]
        let has_log = self.launched.is_some();
        #[cfg(not(target_os = "linux"))]
        let has_log = false;
        has_log || self.control.rank() == 0
    }
}

/// What a rank says that shares the terminal with the first: what went wrong.
pub(super) struct Quiet {
    pub rank: usize,
}

impl Watch for Quiet {
    fn say(&mut self, _line: &str) {}

    fn warn(&mut self, line: &str) {
        say!("rank {}: {line}", self.rank);
    }
}
