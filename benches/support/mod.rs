//! What the benches share.

use ddpm_cuda::device::{Choice, Device, Precision};

/// The device to measure: the CPU, or what `DDPM_BENCH_DEVICE` names as `--device` does, in f32.
pub fn device() -> Device {
    let name = std::env::var("DDPM_BENCH_DEVICE").unwrap_or_else(|_| "cpu".into());
    let choice: Choice = name.parse().unwrap_or_else(|e| panic!("DDPM_BENCH_DEVICE: {e}"));
    let (device, note) = Device::open(choice, Precision::F32).unwrap_or_else(|e| panic!("DDPM_BENCH_DEVICE: {e}"));
    note.iter().for_each(|note| eprintln!("{note}"));
    device
}
