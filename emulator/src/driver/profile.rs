//! Counters, summed per kernel and written as JSON.
//!
//! The file contains no times, so that two runs of a deterministic program write the same bytes. It is written when a
//! context is destroyed, at cuProfilerStop and when the process ends, under a temporary name that is then renamed.

use super::call::Answer;
use super::state::{Driver, driver, driver_if_any};
use crate::exec::Counters;
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::mem::ManuallyDrop;

#[derive(Default)]
pub struct Profile {
    kernels: BTreeMap<String, (u64, Counters)>,
    /// Sentences of the faults so far.
    pub faults: Vec<String>,
    /// Reports of leaks so far.
    pub leaks: Vec<String>,
}

thread_local! {
    /// Kernel and counters of this thread's last launch.
    static LAST: RefCell<ManuallyDrop<Option<(String, Counters)>>> = const { RefCell::new(ManuallyDrop::new(None)) };
}

macro_rules! counters {
    ($($field:ident)*) => {
        /// Adds every counter; a new one that is not listed here does not compile.
        fn add(sum: &mut Counters, more: &Counters) {
            let Counters { $($field),* } = more;
            $(sum.$field += $field;)*
        }

        fn fields(counters: &Counters) -> Map<String, Value> {
            let Counters { $($field),* } = counters;
            let mut map = Map::new();
            $(map.insert(stringify!($field).into(), json!($field));)*
            map
        }
    };
}

counters! {
    mma fma arithmetic special global shared local control
    flops_f16 flops_bf16 flops_tf32 flops_f32 flops_f64
    global_load_bytes global_store_bytes global_sectors distinct_bytes distinct_read_bytes distinct_written_bytes
    shared_wavefronts shared_ideal shared_load_cycles shared_load_ideal shared_store_cycles shared_store_ideal
    divergent_branches barriers atomics blocks
}

/// Adds a launch.
pub fn count(kernel: &str, counters: Counters) -> Answer {
    let mut profile = driver()?.profile.lock().unwrap();
    let sum = profile.kernels.entry(kernel.to_string()).or_default();
    sum.0 += 1;
    add(&mut sum.1, &counters);
    LAST.with_borrow_mut(|last| **last = Some((kernel.to_string(), counters)));
    Ok(())
}

fn entry(name: &str, launches: u64, counters: &Counters) -> Value {
    let mut map = Map::new();
    map.insert("name".into(), json!(name));
    map.insert("launches".into(), json!(launches));
    map.extend(fields(counters));
    // Sector bytes moved per byte requested: 1 is perfect.
    let asked = counters.global_load_bytes + counters.global_store_bytes;
    if asked > 0 {
        let ratio = (counters.global_sectors * 32) as f64 / asked as f64;
        map.insert("sector_bytes_per_byte".into(), json!(ratio));
    }
    Value::Object(map)
}

/// All counters so far.
pub fn as_json(driver: &Driver) -> String {
    let profile = driver.profile.lock().unwrap();
    let kernels: Vec<Value> =
        profile.kernels.iter().map(|(name, (launches, counters))| entry(name, *launches, counters)).collect();
    let (major, minor) = driver.settings.capability;
    let all = json!({
        "device": {
            "compute_capability": format!("{major}.{minor}"),
            "multiprocessors": driver.settings.multiprocessors,
            "memory_bytes": driver.settings.memory,
        },
        "kernels": kernels,
        "faults": profile.faults,
        "leaks": profile.leaks,
    });
    format!("{all:#}\n")
}

/// The last launch of this thread; `null` before the first.
pub fn last_launch_as_json() -> String {
    LAST.with_borrow(|last| match &**last {
        Some((name, counters)) => format!("{:#}\n", entry(name, 1, counters)),
        None => "null\n".into(),
    })
}

/// Resets the counters.
pub fn reset(driver: &Driver) {
    *driver.profile.lock().unwrap() = Profile::default();
    LAST.with_borrow_mut(|last| **last = None);
}

/// Writes the file that CUDA_EMU_PROFILE names, if it names one.
pub fn write(driver: &Driver) {
    let Some(path) = &driver.settings.profile else {
        return;
    };
    let mut beside = path.clone().into_os_string();
    beside.push(format!(".{}.part", std::process::id()));
    let written = std::fs::write(&beside, as_json(driver)).and_then(|()| std::fs::rename(&beside, path));
    if let Err(why) = written {
        eprintln!("cuda_emu: CUDA_EMU_PROFILE={}: {why}", path.display());
    }
}

extern "C" fn at_exit() {
    let _ = std::panic::catch_unwind(|| {
        if let Some(driver) = driver_if_any() {
            write(driver);
        }
    });
}

pub fn write_at_exit(driver: &Driver) {
    if driver.settings.profile.is_some() {
        // SAFETY: the library is never unloaded (-z nodelete), so the function is there when the process ends.
        unsafe { libc::atexit(at_exit) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_ratios() {
        let one = Counters {
            fma: 3,
            global_load_bytes: 64,
            global_store_bytes: 64,
            global_sectors: 8,
            ..Counters::default()
        };
        let mut sum = Counters::default();
        add(&mut sum, &one);
        add(&mut sum, &one);
        let entry = entry("k", 2, &sum);
        assert_eq!((&entry["fma"], &entry["launches"]), (&json!(6), &json!(2)));
        assert_eq!(entry["sector_bytes_per_byte"], json!(2.0));
    }
}
