//! Settings: the `CUDA_EMU_*` variables, read once by `cuInit`, and their overrides per host thread.
//!
//! What describes the machine (devices, capability, memory, multiprocessors) is fixed for the life of the process.
//! What describes how a kernel is run (checks, seed, threads, instruction set) may be overridden for the launches of
//! one host thread with `emu_configure`, so that the tests of one process do not disturb each other.

use crate::exec;
use std::cell::RefCell;
use std::mem::ManuallyDrop;
use std::path::PathBuf;
use std::sync::OnceLock;

/// What goes to stderr.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Log {
    /// Nothing.
    None,
    /// One line for every call that fails, and reports of leaks.
    Errors,
    /// The name of every call as well.
    Calls,
}

/// The level of logging; usable before `cuInit`, because `cuInit` may fail.
pub fn log() -> Log {
    static LOG: OnceLock<Log> = OnceLock::new();
    *LOG.get_or_init(|| match std::env::var("CUDA_EMU_LOG").as_deref() {
        Ok("none") => Log::None,
        Ok("calls") => Log::Calls,
        _ => Log::Errors,
    })
}

/// The machine, and the defaults of every launch.
#[derive(Clone)]
pub struct Settings {
    /// CUDA_EMU_DEVICES: how many devices there are.
    pub devices: u32,
    /// CUDA_EMU_CC: compute capability (major, minor) of each.
    pub capability: (u32, u32),
    /// CUDA_EMU_MEMORY: bytes of global memory of each.
    pub memory: u64,
    /// CUDA_EMU_SMS: multiprocessors of each.
    pub multiprocessors: u32,
    /// CUDA_EMU_PROFILE: where the counters go as JSON.
    pub profile: Option<PathBuf>,
    /// CUDA_EMU_CHECKS, CUDA_EMU_SEED, CUDA_EMU_THREADS, CUDA_EMU_ISA, and CUDA_EMU_BLOCKS, which no thread overrides:
    /// fresh memory is then zero, not poison, since what the other blocks would have written is missing.
    pub run: Run,
}

/// How kernels are run.
#[derive(Clone)]
pub struct Run {
    pub exec: exec::Settings,
    /// Report what is still allocated when a context is destroyed.
    pub leaks: bool,
    /// Refuse accesses from two streams that nothing orders.
    pub stream_order: bool,
}

thread_local! {
    static OVERRIDE: RefCell<ManuallyDrop<Option<Run>>> = const { RefCell::new(ManuallyDrop::new(None)) };
}

impl Settings {
    /// Reads the variables. An error is a sentence that names the variable, its value and what would be valid.
    pub fn from_environment() -> Result<Settings, String> {
        Settings::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Settings, String> {
        let mut settings = Settings {
            devices: 1,
            capability: (8, 0),
            memory: 16 << 30,
            multiprocessors: 108,
            profile: None,
            run: Run { exec: exec::Settings::default(), leaks: true, stream_order: true },
        };
        if let Some(value) = variable("CUDA_EMU_DEVICES") {
            settings.devices = number("CUDA_EMU_DEVICES", &value, 0, 64)?;
        }
        if let Some(value) = variable("CUDA_EMU_CC") {
            settings.capability = capability(&value)?;
        }
        if let Some(value) = variable("CUDA_EMU_MEMORY") {
            settings.memory = bytes(&value)?;
        }
        if let Some(value) = variable("CUDA_EMU_SMS") {
            settings.multiprocessors = number("CUDA_EMU_SMS", &value, 1, 1024)?;
        }
        settings.profile = variable("CUDA_EMU_PROFILE").map(PathBuf::from);
        if let Some(value) = variable("CUDA_EMU_BLOCKS").filter(|value| value != "all") {
            settings.run.exec.blocks = u64::from(number("CUDA_EMU_BLOCKS", &value, 1, u32::MAX)?);
        }
        for name in ["checks", "seed", "threads", "isa"] {
            let upper = format!("CUDA_EMU_{}", name.to_uppercase());
            if let Some(value) = variable(&upper) {
                settings.run.set(name, &value).map_err(|why| format!("{upper}={value}: {why}"))?;
            }
        }
        Ok(settings)
    }
}

impl Run {
    /// Sets `name` (checks, seed, threads, isa, kinds) from its text.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            "checks" => self.set_checks(value),
            "seed" if value == "none" => {
                self.exec.schedule_seed = None;
                Ok(())
            }
            "seed" => {
                let seed = value.parse().map_err(|_| "the seed must be `none` or an unsigned 64-bit number")?;
                self.exec.schedule_seed = Some(seed);
                Ok(())
            }
            "threads" => {
                self.exec.threads = number("threads", value, 0, 4096)? as usize;
                Ok(())
            }
            "isa" => {
                self.exec.isa = match value {
                    "auto" => None,
                    "portable" => Some(exec::Isa::Portable),
                    "avx2" => Some(exec::Isa::Avx2),
                    "avx512" => Some(exec::Isa::Avx512),
                    _ => {
                        return Err("the instruction set must be auto, portable, avx2 or avx512".into());
                    }
                };
                Ok(())
            }
            "kinds" => {
                let blocks = |part: &str| number("kinds", part, 0, i32::MAX as u32).map(u64::from);
                let parts = value.split(',').filter(|part| !part.trim().is_empty());
                self.exec.kinds = parts.map(blocks).collect::<Result<_, _>>()?;
                Ok(())
            }
            _ => Err(format!("there is no setting `{name}`: it must be checks, seed, threads, isa or kinds")),
        }
    }

    /// `all`, `fast`, `none`, or a list of names separated by commas.
    fn set_checks(&mut self, list: &str) -> Result<(), String> {
        let everything = list == "all";
        let mut checks = if everything { exec::Checks::ALL } else { exec::Checks::NONE };
        let (mut leaks, mut stream_order) = (everything, everything);
        if list == "fast" {
            checks = exec::Checks::FAST;
        } else if list != "all" && list != "none" {
            for name in list.split(',').map(str::trim) {
                match name {
                    "bounds" => checks.bounds = true,
                    "uninitialised" => checks.uninitialised = true,
                    "shared_races" => checks.shared_races = true,
                    "barrier_divergence" => checks.barrier_divergence = true,
                    "inactive_shuffle" => checks.inactive_shuffle = true,
                    "global_races" => checks.global_races = true,
                    "stream_order" => stream_order = true,
                    "leaks" => leaks = true,
                    _ => {
                        return Err(format!(
                            "there is no check `{name}`: the list must be all, fast, none, or some of bounds, \
                             uninitialised, shared_races, barrier_divergence, inactive_shuffle, global_races, \
                             stream_order, leaks"
                        ));
                    }
                }
            }
        }
        self.exec.checks = checks;
        (self.leaks, self.stream_order) = (leaks, stream_order);
        Ok(())
    }
}

/// How launches of this thread are run: its own settings if it has some, else `defaults`.
pub fn of_this_thread(defaults: &Run) -> Run {
    OVERRIDE.with_borrow(|own| own.as_ref().unwrap_or(defaults).clone())
}

/// Changes one setting for this thread; `None` as a value drops all of its own settings.
pub fn configure(defaults: &Run, name: &str, value: Option<&str>) -> Result<(), String> {
    let Some(value) = value else {
        OVERRIDE.with_borrow_mut(|own| **own = None);
        return Ok(());
    };
    let mut run = of_this_thread(defaults);
    run.set(name, value)?;
    OVERRIDE.with_borrow_mut(|own| **own = Some(run));
    Ok(())
}

fn number(name: &str, value: &str, least: u32, most: u32) -> Result<u32, String> {
    match value.trim().parse() {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => Err(format!("{name}={value}: it must be a number from {least} to {most}")),
    }
}

/// `8.0`, or `80`.
fn capability(value: &str) -> Result<(u32, u32), String> {
    let split = match value.split_once('.') {
        Some((major, minor)) => major.parse().ok().zip(minor.parse().ok()),
        None => value.parse().ok().map(|both: u32| (both / 10, both % 10)),
    };
    match split {
        Some((major @ 5..=12, minor @ 0..=9)) => Ok((major, minor)),
        _ => Err(format!("CUDA_EMU_CC={value}: it must be a compute capability as 8.0 or 80")),
    }
}

/// A number of bytes, with K, M, G or T for binary multiples.
fn bytes(value: &str) -> Result<u64, String> {
    let text = value.trim().trim_end_matches(['B', 'b']).trim_end_matches('i');
    let (digits, shift) = match text.char_indices().next_back() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    digits
        .trim()
        .parse::<u64>()
        .ok()
        .and_then(|count| count.checked_mul(1 << shift))
        .filter(|&count| (1 << 20..=1 << 40).contains(&count))
        .ok_or_else(|| format!("CUDA_EMU_MEMORY={value}: it must be from 1M to 1T, as 512M or 16G"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(&str, &str)]) -> Result<Settings, String> {
        Settings::from_variables(|name| {
            let found = pairs.iter().find(|pair| pair.0 == name);
            found.map(|pair| pair.1.to_string())
        })
    }

    #[test]
    fn variables_are_read() {
        let settings = with(&[
            ("CUDA_EMU_DEVICES", "2"),
            ("CUDA_EMU_CC", "9.0"),
            ("CUDA_EMU_MEMORY", "512M"),
            ("CUDA_EMU_SMS", "4"),
            ("CUDA_EMU_SEED", "7"),
            ("CUDA_EMU_CHECKS", "bounds, leaks"),
            ("CUDA_EMU_BLOCKS", "16"),
        ]);
        let settings = settings.unwrap_or_else(|why| panic!("{why}"));
        assert_eq!((settings.devices, settings.capability), (2, (9, 0)));
        assert_eq!((settings.memory, settings.multiprocessors), (512 << 20, 4));
        assert_eq!((settings.run.exec.schedule_seed, settings.run.exec.blocks), (Some(7), 16));
        let checks = &settings.run.exec.checks;
        assert!(checks.bounds && !checks.uninitialised && !checks.shared_races);
        assert!(settings.run.leaks);
    }

    #[test]
    fn what_cannot_be_right_is_refused_by_name() {
        for (name, value) in [
            ("CUDA_EMU_DEVICES", "many"),
            ("CUDA_EMU_CC", "3.5"),
            ("CUDA_EMU_MEMORY", "0"),
            ("CUDA_EMU_MEMORY", "16X"),
            ("CUDA_EMU_SMS", "0"),
            ("CUDA_EMU_SEED", "-1"),
            ("CUDA_EMU_CHECKS", "bonds"),
            ("CUDA_EMU_ISA", "sse"),
            ("CUDA_EMU_BLOCKS", "0"),
        ] {
            let message = with(&[(name, value)]).err().expect(value);
            assert!(message.starts_with(&format!("{name}={value}: ")), "{message}");
        }
    }
}
