//! What the benches share.

use std::env::{VarError, var};
use std::fmt::Display;
use std::str::FromStr;

use ddpm_cuda::device::{Choice, Device, Precision};

/// Images of a step on a GPU.
pub const BATCH: usize = 128;

/// What to measure: the CPU, or what `DDPM_BENCH_DEVICE` names as `--device` does, in f32 or the precision that
/// `DDPM_BENCH_PRECISION` names as `--precision` does.
pub fn choice() -> (Choice, Precision) {
    (setting("DDPM_BENCH_DEVICE", Choice::Cpu), setting("DDPM_BENCH_PRECISION", Precision::F32))
}

/// The value of a variable, or `default` where it is not set.
fn setting<T: FromStr<Err: Display>>(variable: &str, default: T) -> T {
    match var(variable) {
        Err(VarError::NotPresent) => default,
        Err(e) => panic!("{variable}: {e}"),
        Ok(name) => name.parse().unwrap_or_else(|e| panic!("{variable}: {e}")),
    }
}

/// What to measure, as a name of criterion's: with the precision, unless that is f32.
pub fn named(name: &str, device: &Device) -> String {
    match device.precision() {
        Precision::F32 => name.into(),
        precision => format!("{name} {precision}"),
    }
}

/// Waits for the device inside what is timed: a launch returns long before its kernel has run.
pub fn finish(device: &Device) {
    device.synchronize().expect("the kernels do what they should");
}
